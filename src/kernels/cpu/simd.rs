//! One source, several forms. Rust never fuses or reorders float operations, so all forms give the same bits.
//!
//! - [`multiversion!`] compiles loops that the compiler vectorises for the baseline, AVX2 and AVX-512, and picks at run time.
//! - [`Simd`] is 16 floats at a time for kernels that must keep them in registers; [`dispatch!`] gives a kernel the best implementation.

use std::sync::OnceLock;

/// What the machine can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Portable,
    /// With FMA and F16C.
    Avx2,
    /// F, BW, DQ, VL and VNNI.
    Avx512,
}

impl Level {
    /// The best of this machine.
    #[inline]
    pub fn best() -> Self {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(Self::detect)
    }

    #[cfg(target_arch = "x86_64")]
    fn detect() -> Self {
        macro_rules! has {
            ($($feature:tt)*) => { $(std::arch::is_x86_feature_detected!($feature))&&* };
        }
        if !has!("avx2" "fma" "f16c") {
            Self::Portable
        } else if has!("avx512f" "avx512bw" "avx512dq" "avx512vl" "avx512vnni") {
            Self::Avx512
        } else {
            Self::Avx2
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn detect() -> Self {
        Self::Portable
    }

    /// All that this machine can do, for tests that compare them.
    #[cfg(test)]
    pub fn all() -> impl Iterator<Item = Self> {
        [Self::Portable, Self::Avx2, Self::Avx512].into_iter().filter(|level| *level <= Self::best())
    }
}

macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn portable($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                use $crate::kernels::cpu::simd::Level;
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    portable($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    portable($($arg),*)
                }
                match Level::best() {
                    // SAFETY: the machine has what the form uses.
                    Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    Level::Avx2 => return unsafe { avx2($($arg),*) },
                    Level::Portable => {}
                }
            }
            portable($($arg),*)
        }
    };
}
pub(super) use multiversion;

/// Calls `$kernel(simd, args...)`, a function that is generic over [`Simd`] and inlined, in the form of `$level`.
macro_rules! dispatch {
    ($level:expr, $kernel:path, $($arg:ident: $ty:ty),* $(,)?) => {{
        #[cfg(target_arch = "x86_64")]
        {
            use $crate::kernels::cpu::simd::{Avx2, Avx512, Level};
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
            fn avx512($($arg: $ty),*) {
                // SAFETY: this function is called where the machine has what it uses.
                $kernel(unsafe { Avx512::new() }, $($arg),*)
            }
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $ty),*) {
                // SAFETY: as above.
                $kernel(unsafe { Avx2::new() }, $($arg),*)
            }
            match $level {
                // SAFETY: nobody has a level that the machine lacks.
                Level::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                Level::Avx2 => unsafe { avx2($($arg),*) },
                Level::Portable => $kernel($crate::kernels::cpu::simd::Portable, $($arg),*),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = $level;
            $kernel($crate::kernels::cpu::simd::Portable, $($arg),*)
        }
    }};
}
pub(super) use dispatch;

/// 16 floats at a time. The value is the proof that the machine can do it.
pub(super) trait Simd: Copy + Send + Sync {
    type F: Copy;

    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; LANES]) -> Self::F;
    fn store(self, x: Self::F, out: &mut [f32; LANES]);
    /// a * b + c, rounded once.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The values of half-precision bits.
    fn halves(self, bits: &[u16; LANES]) -> Self::F;
    /// The values of bfloat16 bits.
    fn brains(self, bits: &[u16; LANES]) -> Self::F;
    /// The larger of |a| and b.
    fn max_abs(self, a: Self::F, b: Self::F) -> Self::F;
    /// Integers q = round(a * by) << shift, ties to even, as `128 * high + low` with low in [-64, 63]; gives the sum of each q and `sums`.
    /// |a * by| is at most 127 * 128; where it is not a number q is anything.
    fn split(self, a: Self::F, by: f32, shift: u32, sums: &mut [i32; LANES], out: (&mut [i8; LANES], &mut [i8; LANES]));
}

/// Any machine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Portable;

impl Simd for Portable {
    type F = [f32; LANES];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        *x
    }
    #[inline(always)]
    fn store(self, x: Self::F, out: &mut [f32; LANES]) {
        *out = x;
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn halves(self, bits: &[u16; LANES]) -> Self::F {
        bits.map(f16_value)
    }
    #[inline(always)]
    fn brains(self, bits: &[u16; LANES]) -> Self::F {
        bits.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }
    #[inline(always)]
    fn max_abs(self, a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].abs().max(b[i]))
    }
    #[inline(always)]
    fn split(
        self,
        a: Self::F,
        by: f32,
        shift: u32,
        sums: &mut [i32; LANES],
        out: (&mut [i8; LANES], &mut [i8; LANES]),
    ) {
        for i in 0..LANES {
            let q = ((a[i] * by).round_ties_even() as i32) << shift;
            let high = (q + 64) >> 7;
            (out.0[i], out.1[i]) = (high as i8, (q - (high << 7)) as i8);
            sums[i] += q;
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LANES, Simd};
    use std::arch::x86_64::*;

    /// Proof of AVX2, FMA and F16C.
    #[derive(Debug, Clone, Copy)]
    pub struct Avx2(());

    /// Proof of AVX-512 F, BW, DQ, VL and VNNI.
    #[derive(Debug, Clone, Copy)]
    pub struct Avx512(());

    impl Avx2 {
        /// # Safety
        /// The machine has AVX2, FMA and F16C.
        #[inline(always)]
        pub unsafe fn new() -> Self {
            Self(())
        }
    }

    impl Avx512 {
        /// # Safety
        /// The machine has AVX-512 F, BW, DQ, VL and VNNI.
        #[inline(always)]
        pub unsafe fn new() -> Self {
            Self(())
        }
    }

    // SAFETY of all blocks below: the value proves the features, and every load and store is within its array.
    impl Simd for Avx2 {
        type F = [__m256; 2];

        #[inline(always)]
        fn splat(self, x: f32) -> Self::F {
            unsafe { [_mm256_set1_ps(x); 2] }
        }
        #[inline(always)]
        fn load(self, x: &[f32; LANES]) -> Self::F {
            unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
        }
        #[inline(always)]
        fn store(self, x: Self::F, out: &mut [f32; LANES]) {
            unsafe {
                _mm256_storeu_ps(out.as_mut_ptr(), x[0]);
                _mm256_storeu_ps(out.as_mut_ptr().add(8), x[1]);
            }
        }
        #[inline(always)]
        fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
            unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
        }
        #[inline(always)]
        fn halves(self, bits: &[u16; LANES]) -> Self::F {
            unsafe {
                let bits = bits.as_ptr().cast::<__m128i>();
                [_mm256_cvtph_ps(_mm_loadu_si128(bits)), _mm256_cvtph_ps(_mm_loadu_si128(bits.add(1)))]
            }
        }
        #[inline(always)]
        fn brains(self, bits: &[u16; LANES]) -> Self::F {
            unsafe {
                let bits = bits.as_ptr().cast::<__m128i>();
                let wide = |half| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)));
                [wide(_mm_loadu_si128(bits)), wide(_mm_loadu_si128(bits.add(1)))]
            }
        }
        #[inline(always)]
        fn max_abs(self, a: Self::F, b: Self::F) -> Self::F {
            unsafe {
                let sign = _mm256_set1_ps(-0.0);
                [_mm256_max_ps(_mm256_andnot_ps(sign, a[0]), b[0]), _mm256_max_ps(_mm256_andnot_ps(sign, a[1]), b[1])]
            }
        }
        #[inline(always)]
        fn split(
            self,
            a: Self::F,
            by: f32,
            shift: u32,
            sums: &mut [i32; LANES],
            out: (&mut [i8; LANES], &mut [i8; LANES]),
        ) {
            unsafe {
                let (by, shift, half) = (_mm256_set1_ps(by), _mm_cvtsi32_si128(shift as i32), _mm256_set1_epi32(64));
                let (mut high, mut low) = ([half; 2], [half; 2]);
                for i in 0..2 {
                    let q = _mm256_sll_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(a[i], by)), shift);
                    high[i] = _mm256_srai_epi32::<7>(_mm256_add_epi32(q, half));
                    low[i] = _mm256_sub_epi32(q, _mm256_slli_epi32::<7>(high[i]));
                    let sum = sums.as_mut_ptr().add(8 * i).cast::<__m256i>();
                    _mm256_storeu_si256(sum, _mm256_add_epi32(_mm256_loadu_si256(sum), q));
                }
                for (parts, out) in [(high, out.0), (low, out.1)] {
                    // The packing works within 128 bits: the middle quarters are to be exchanged.
                    let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(parts[0], parts[1]));
                    let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
                    _mm_storeu_si128(out.as_mut_ptr().cast(), bytes);
                }
            }
        }
    }

    impl Simd for Avx512 {
        type F = __m512;

        #[inline(always)]
        fn splat(self, x: f32) -> Self::F {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        fn load(self, x: &[f32; LANES]) -> Self::F {
            unsafe { _mm512_loadu_ps(x.as_ptr()) }
        }
        #[inline(always)]
        fn store(self, x: Self::F, out: &mut [f32; LANES]) {
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) }
        }
        #[inline(always)]
        fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn halves(self, bits: &[u16; LANES]) -> Self::F {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bits.as_ptr().cast())) }
        }
        #[inline(always)]
        fn brains(self, bits: &[u16; LANES]) -> Self::F {
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(bits.as_ptr().cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        fn max_abs(self, a: Self::F, b: Self::F) -> Self::F {
            unsafe { _mm512_max_ps(_mm512_abs_ps(a), b) }
        }
        #[inline(always)]
        fn split(
            self,
            a: Self::F,
            by: f32,
            shift: u32,
            sums: &mut [i32; LANES],
            out: (&mut [i8; LANES], &mut [i8; LANES]),
        ) {
            unsafe {
                let q = _mm512_cvtps_epi32(_mm512_mul_ps(a, _mm512_set1_ps(by)));
                let q = _mm512_sll_epi32(q, _mm_cvtsi32_si128(shift as i32));
                let high = _mm512_srai_epi32::<7>(_mm512_add_epi32(q, _mm512_set1_epi32(64)));
                let low = _mm512_sub_epi32(q, _mm512_slli_epi32::<7>(high));
                let sum = sums.as_mut_ptr().cast::<__m512i>();
                _mm512_storeu_si512(sum, _mm512_add_epi32(_mm512_loadu_si512(sum), q));
                _mm_storeu_si128(out.0.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(high));
                _mm_storeu_si128(out.1.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(low));
            }
        }
    }
}

/// Floats of a vector, and partial sums of a dot product.
pub(super) const LANES: usize = 16;

/// a . b, summed in 16 lanes, then pairwise.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_whole, a_rest) = a.as_chunks::<LANES>();
    let (b_whole, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_whole.iter().zip(b_whole) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    let mut rest = 0.0;
    for (a, b) in a_rest.iter().zip(b_rest) {
        rest += a * b;
    }
    sum_pairwise(lanes) + rest
}

/// x = softmax(scale * x), its sum in 16 lanes, then pairwise.
#[inline(always)]
pub(super) fn softmax(x: &mut [f32], scale: f32) {
    let largest = x.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let mut lanes = [0.0f32; LANES];
    let (whole, rest) = x.as_chunks_mut::<LANES>();
    for chunk in whole {
        for i in 0..LANES {
            chunk[i] = exp((chunk[i] - largest) * scale);
            lanes[i] += chunk[i];
        }
    }
    for (x, lane) in rest.iter_mut().zip(&mut lanes) {
        *x = exp((*x - largest) * scale);
        *lane += *x;
    }
    let inverse = 1.0 / sum_pairwise(lanes);
    for x in x {
        *x *= inverse;
    }
}

/// The largest of the lanes.
#[inline(always)]
pub(super) fn max_pairwise(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = lanes[i].max(lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// The sum of the lanes: halves on halves.
#[inline(always)]
pub(super) fn sum_pairwise(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// e^x to about one unit in the last place (Cephes' polynomial); 0 below -87.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let clamped = x.clamp(-87.0, 88.0);
    let n = (clamped * std::f32::consts::LOG2_E + 0.5).floor();
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let power = f32::from_bits(((n as i32 + 127) << 23) as u32);
    let value = (p * r * r + r + 1.0) * power;
    if x < -87.0 { 0.0 } else { value }
}

/// The value of half-precision bits; infinity is taken for not a number, which is what a cache that saturates can hold beside numbers.
#[inline(always)]
pub fn f16_value(bits: u16) -> f32 {
    // The exponents' biases differ by 112: a multiplication by 2^112 sets it right, subnormals included.
    let magnitude = f32::from_bits(u32::from(bits & 0x7FFF) << 13) * f32::from_bits(0x7780_0000);
    let magnitude = if magnitude < 65536.0 { magnitude } else { f32::NAN };
    f32::from_bits(magnitude.to_bits() | (u32::from(bits & 0x8000) << 16))
}

/// The nearest half-precision number's bits, saturating.
#[inline]
pub fn f16_bits(x: f32) -> u16 {
    half::f16::from_f32(x.clamp(-65504.0, 65504.0)).to_bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close() {
        for i in -2000..2000 {
            let x = i as f32 * 0.04;
            let (got, want) = (exp(x), f64::from(x).exp());
            assert!((f64::from(got) - want).abs() <= 3e-7 * want, "{x}: {got} {want}");
        }
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn every_finite_half_has_its_value() {
        for bits in 0..=u16::MAX {
            let want = half::f16::from_bits(bits);
            if want.is_finite() {
                assert_eq!(f16_value(bits).to_bits(), want.to_f32().to_bits(), "{bits:#x}");
                assert_eq!(f16_bits(want.to_f32()), bits);
            } else {
                assert!(f16_value(bits).is_nan());
            }
        }
        assert!(f16_value(f16_bits(f32::NAN)).is_nan());
    }
}
