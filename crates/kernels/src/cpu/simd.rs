//! One source, several forms. Rust never fuses or reorders float operations, so all forms give the same bits.
//!
//! - [`multiversion!`] compiles loops that the compiler vectorises for the baseline, AVX2 and AVX-512, and picks at run
//!   time.
//! - [`Simd`] is 16 floats at a time for kernels that must keep them in registers; [`dispatch!`] gives a kernel the
//!   best implementation.

use std::sync::OnceLock;

use crate::format::BLOCK;

/// What the machine can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Portable,
    /// With FMA and F16C.
    Avx2,
    /// F, BW, DQ, VL and VNNI.
    Avx512,
    /// All that and AMX with bfloat16, whose tiles the system lets the process use.
    Amx,
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
        } else if !has!("avx512f" "avx512bw" "avx512dq" "avx512vl" "avx512vnni") {
            Self::Avx2
        } else if !(has_tiles() && may_use_tiles()) {
            Self::Avx512
        } else {
            Self::Amx
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn detect() -> Self {
        Self::Portable
    }

    /// All that this machine can do, for tests that compare them.
    #[cfg(test)]
    pub fn all() -> impl Iterator<Item = Self> {
        [Self::Portable, Self::Avx2, Self::Avx512, Self::Amx].into_iter().filter(|level| *level <= Self::best())
    }
}

/// Whether the processor has AMX's tiles and their products of bfloat16.
#[cfg(target_arch = "x86_64")]
fn has_tiles() -> bool {
    const EXTENDED_FEATURES: u32 = 7;
    const BFLOAT16: u32 = 1 << 22;
    const TILES: u32 = 1 << 24;
    let features = std::arch::x86_64::__cpuid_count(EXTENDED_FEATURES, 0).edx;
    features & BFLOAT16 != 0 && features & TILES != 0
}

/// Asks the system to let this process use tiles, whose contents it has to keep for each thread. It may not know them, or
/// refuse.
#[cfg(target_arch = "x86_64")]
fn may_use_tiles() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILE_DATA: libc::c_long = 18;
        // SAFETY: the call reads and writes no memory of ours.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    false
}

macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn portable($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                use $crate::cpu::simd::Level;
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
                    Level::Avx512 | Level::Amx => return unsafe { avx512($($arg),*) },
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
            use $crate::cpu::simd::{Avx2, Avx512, Level};
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
                Level::Avx512 | Level::Amx => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                Level::Avx2 => unsafe { avx2($($arg),*) },
                Level::Portable => $kernel($crate::cpu::simd::Portable, $($arg),*),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = $level;
            $kernel($crate::cpu::simd::Portable, $($arg),*)
        }
    }};
}
pub(super) use dispatch;

/// The body for each r below N, at most 12, without a loop: what is indexed by r then stays in registers. `by P`: for
/// each P-th, at most 4 of them. `up to`: for an N that is never more, which spares the compiler the rest.
macro_rules! unrolled {
    ($r:ident in $n:ident up to 2 => $body:block) => {
        const { assert!($n <= 2) };
        unrolled!(@ $r, $n, 1, $body, 0 1)
    };
    ($r:ident in $n:ident up to 4 => $body:block) => {
        const { assert!($n <= 4) };
        unrolled!(@ $r, $n, 1, $body, 0 1 2 3)
    };
    ($r:ident in $n:ident => $body:block) => {
        const { assert!($n <= 12) };
        unrolled!(@ $r, $n, 1, $body, 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    ($r:ident in $n:ident by $p:ident => $body:block) => {
        const { assert!($n <= 4 * $p) };
        unrolled!(@ $r, $n, $p, $body, 0 1 2 3)
    };
    (@ $r:ident, $n:ident, $p:tt, $body:block, $($i:literal)*) => {
        $(if $i * $p < $n {
            let $r = $i * $p;
            $body
        })*
    };
}
pub(super) use unrolled;

/// 16 floats at a time. The value is the proof that the machine can do it.
pub(super) trait Simd: Copy + Send + Sync {
    type F: Copy;
    /// How many of these a kernel may sum in and expect to find in registers.
    const SUMS: usize;

    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; LANES]) -> Self::F;
    fn store(self, x: Self::F, out: &mut [f32; LANES]);
    /// a * b + c, rounded once.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The values of half-precision bits.
    fn load_f16(self, bits: &[u16; LANES]) -> Self::F;
    /// The values of bytes.
    fn load_i8(self, bytes: &[i8; LANES]) -> Self::F;
    /// The nearest half-precision numbers' bits, saturating.
    fn to_f16(self, x: Self::F) -> [u16; LANES];
    /// The values of bfloat16 bits.
    fn load_bf16(self, bits: &[u16; LANES]) -> Self::F;
    /// Lane by lane the largest magnitude, as integers compare: of infinity or more where a value is not finite.
    fn max_abs(self, largest: Self::F, x: [Self::F; 2]) -> Self::F;
    /// The bits of the largest lane; none has a sign.
    fn largest(self, x: Self::F) -> u32;
    /// Integers q = round(x * by), ties to even, as `128 * high + low` with low in [0, 127]. |x * by| is at most 127 *
    /// 128; where it is not a number q is anything.
    fn split(self, x: [Self::F; 2], by: f32, high: &mut [i8; BLOCK], low: &mut [i8; BLOCK]) -> Split;
}

/// What the matmul is to know of a block's integers q.
#[derive(Debug, Clone, Copy)]
pub(super) struct Split {
    /// The sum of q.
    pub sum: i32,
    /// The sum of the first 16.
    pub first_sum: i32,
    /// What is too much in a block's product where the high bytes are multiplied in pairs and 128 is added to the
    /// quants of columns 16 to 31 (see [`super::lanes`]), negative: -128 (sum of high\[i\] * high\[i + 16\] + sum of
    /// q\[i + 16\]), i below 16.
    pub pairs: i32,
}

/// Any machine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Portable;

impl Simd for Portable {
    type F = [f32; LANES];
    const SUMS: usize = 6;

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
    fn load_f16(self, bits: &[u16; LANES]) -> Self::F {
        bits.map(f16_value)
    }
    #[inline(always)]
    fn load_i8(self, bytes: &[i8; LANES]) -> Self::F {
        bytes.map(f32::from)
    }
    #[inline(always)]
    fn to_f16(self, x: Self::F) -> [u16; LANES] {
        x.map(f16_bits)
    }
    #[inline(always)]
    fn load_bf16(self, bits: &[u16; LANES]) -> Self::F {
        bits.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }
    #[inline(always)]
    fn max_abs(self, largest: Self::F, x: [Self::F; 2]) -> Self::F {
        let bits = |x: f32| x.to_bits() & MAGNITUDE;
        std::array::from_fn(|i| f32::from_bits(bits(largest[i]).max(bits(x[0][i])).max(bits(x[1][i]))))
    }
    #[inline(always)]
    fn largest(self, x: Self::F) -> u32 {
        x.iter().fold(0, |largest, x| largest.max(x.to_bits()))
    }
    #[inline(always)]
    fn split(self, x: [Self::F; 2], by: f32, high: &mut [i8; BLOCK], low: &mut [i8; BLOCK]) -> Split {
        let q = x.map(|x| x.map(|x| (x * by).round_ties_even() as i32));
        let upper = q.map(|q| q.map(|q| q >> 7));
        for (i, (q, upper)) in q.as_flattened().iter().zip(upper.as_flattened()).enumerate() {
            (high[i], low[i]) = (*upper as i8, (q - (upper << 7)) as i8);
        }
        let pairs: i32 = (0..LANES).map(|i| upper[0][i] * upper[1][i] + q[1][i]).sum();
        let [first_sum, second] = q.map(|q| q.iter().sum::<i32>());
        Split { sum: first_sum + second, first_sum, pairs: -128 * pairs }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LANES, LARGEST_HALF, MAGNITUDE, Simd, Split};
    use crate::format::BLOCK;
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

    impl Simd for Avx2 {
        type F = [__m256; 2];
        const SUMS: usize = 6;

        #[inline(always)]
        fn splat(self, x: f32) -> Self::F {
            // SAFETY: `self` proves the features.
            unsafe { [_mm256_set1_ps(x); 2] }
        }
        #[inline(always)]
        fn load(self, x: &[f32; LANES]) -> Self::F {
            // SAFETY: `self` proves the features, and what is read lies within the slice or array.
            unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
        }
        #[inline(always)]
        fn store(self, x: Self::F, out: &mut [f32; LANES]) {
            // SAFETY: `self` proves the features, and what is written lies within the slice or array.
            unsafe {
                _mm256_storeu_ps(out.as_mut_ptr(), x[0]);
                _mm256_storeu_ps(out.as_mut_ptr().add(8), x[1]);
            }
        }
        #[inline(always)]
        fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
            // SAFETY: `self` proves the features.
            unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
        }
        #[inline(always)]
        fn load_f16(self, bits: &[u16; LANES]) -> Self::F {
            // SAFETY: `self` proves the features, and what is read lies within the slice or array.
            unsafe {
                let bits = bits.as_ptr().cast::<__m128i>();
                [_mm256_cvtph_ps(_mm_loadu_si128(bits)), _mm256_cvtph_ps(_mm_loadu_si128(bits.add(1)))]
            }
        }
        #[inline(always)]
        fn load_i8(self, bytes: &[i8; LANES]) -> Self::F {
            // SAFETY: `self` proves the features, and what is read lies within the slice or array.
            unsafe {
                let bytes = _mm_loadu_si128(bytes.as_ptr().cast());
                let wide = |half| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(half));
                [wide(bytes), wide(_mm_srli_si128::<8>(bytes))]
            }
        }
        #[inline(always)]
        fn to_f16(self, x: Self::F) -> [u16; LANES] {
            // SAFETY: `self` proves the features, and what is written lies within the slice or array.
            unsafe {
                let (most, least) = (_mm256_set1_ps(LARGEST_HALF), _mm256_set1_ps(-LARGEST_HALF));
                let mut bits = [0; LANES];
                for (i, x) in x.into_iter().enumerate() {
                    // What is not a number comes second, and so comes through.
                    let x = _mm256_max_ps(least, _mm256_min_ps(most, x));
                    let to = bits.as_mut_ptr().add(8 * i).cast();
                    _mm_storeu_si128(to, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x));
                }
                bits
            }
        }
        #[inline(always)]
        fn load_bf16(self, bits: &[u16; LANES]) -> Self::F {
            // SAFETY: `self` proves the features, and what is read lies within the slice or array.
            unsafe {
                let bits = bits.as_ptr().cast::<__m128i>();
                let wide = |half| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)));
                [wide(_mm_loadu_si128(bits)), wide(_mm_loadu_si128(bits.add(1)))]
            }
        }
        #[inline(always)]
        fn max_abs(self, largest: Self::F, x: [Self::F; 2]) -> Self::F {
            // SAFETY: `self` proves the features.
            unsafe {
                let mask = _mm256_set1_epi32(MAGNITUDE as i32);
                let bits = |x: __m256| _mm256_and_si256(_mm256_castps_si256(x), mask);
                let mut larger = largest;
                for (i, larger) in larger.iter_mut().enumerate() {
                    let of_x = _mm256_max_epi32(bits(x[0][i]), bits(x[1][i]));
                    *larger = _mm256_castsi256_ps(_mm256_max_epi32(bits(*larger), of_x));
                }
                larger
            }
        }
        #[inline(always)]
        fn largest(self, x: Self::F) -> u32 {
            // SAFETY: `self` proves the features.
            unsafe {
                let eight = _mm256_max_epi32(_mm256_castps_si256(x[0]), _mm256_castps_si256(x[1]));
                let four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
                let two = _mm_max_epi32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
                _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two))) as u32
            }
        }
        #[inline(always)]
        fn split(self, x: [Self::F; 2], by: f32, high: &mut [i8; BLOCK], low: &mut [i8; BLOCK]) -> Split {
            // SAFETY: `self` proves the features, and what is written lies within the slice or array.
            unsafe {
                let (by, seven) = (_mm256_set1_ps(by), _mm256_set1_epi32(127));
                let (mut highs, mut lows, mut qs) = ([seven; 4], [seven; 4], [seven; 4]);
                for (i, x) in [x[0][0], x[0][1], x[1][0], x[1][1]].into_iter().enumerate() {
                    let q = _mm256_cvtps_epi32(_mm256_mul_ps(x, by));
                    highs[i] = _mm256_srai_epi32::<7>(q);
                    lows[i] = _mm256_and_si256(q, seven);
                    qs[i] = q;
                }
                for (parts, out) in [(highs, high), (lows, low)] {
                    // Packing works within 128 bits: the groups of four are to be put in order again.
                    let first = _mm256_packs_epi32(parts[0], parts[1]);
                    let bytes = _mm256_packs_epi16(first, _mm256_packs_epi32(parts[2], parts[3]));
                    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
                    _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_permutevar8x32_epi32(bytes, order));
                }
                let (first, second) = (_mm256_add_epi32(qs[0], qs[1]), _mm256_add_epi32(qs[2], qs[3]));
                let (one, two) = (_mm256_mullo_epi32(highs[0], highs[2]), _mm256_mullo_epi32(highs[1], highs[3]));
                split([first, second], _mm256_add_epi32(one, two))
            }
        }
    }

    /// From the lanes' sums of each half's q, and of the products of high bytes (see [`Split::pairs`]).
    #[inline(always)]
    unsafe fn split([first, second]: [__m256i; 2], products: __m256i) -> Split {
        // SAFETY: the caller has AVX2.
        unsafe {
            // All at once: each 128 bits have two lanes of either half, then one of all three.
            let sums = _mm256_hadd_epi32(first, second);
            let all = _mm256_hadd_epi32(sums, _mm256_hadd_epi32(products, products));
            let all = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256::<1>(all));
            let (first_sum, second) = (_mm_cvtsi128_si32(all), _mm_extract_epi32::<1>(all));
            let pairs = (_mm_extract_epi32::<2>(all) + second).wrapping_mul(-128);
            Split { sum: first_sum + second, first_sum, pairs }
        }
    }

    #[inline(always)]
    unsafe fn halves_added(x: __m512i) -> __m256i {
        // SAFETY: the caller has AVX-512 F.
        unsafe { _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64::<1>(x)) }
    }

    impl Simd for Avx512 {
        type F = __m512;
        const SUMS: usize = 24;

        #[inline(always)]
        fn splat(self, x: f32) -> Self::F {
            // SAFETY: `self` proves the features.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        fn load(self, x: &[f32; LANES]) -> Self::F {
            // SAFETY: `self` proves the features, and what is read lies within the slice or array.
            unsafe { _mm512_loadu_ps(x.as_ptr()) }
        }
        #[inline(always)]
        fn store(self, x: Self::F, out: &mut [f32; LANES]) {
            // SAFETY: `self` proves the features, and what is written lies within the slice or array.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) }
        }
        #[inline(always)]
        fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
            // SAFETY: `self` proves the features.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn load_f16(self, bits: &[u16; LANES]) -> Self::F {
            // SAFETY: `self` proves the features, and what is read lies within the slice or array.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bits.as_ptr().cast())) }
        }
        #[inline(always)]
        fn load_i8(self, bytes: &[i8; LANES]) -> Self::F {
            // SAFETY: `self` proves the features, and what is read lies within the slice or array.
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()))) }
        }
        #[inline(always)]
        fn to_f16(self, x: Self::F) -> [u16; LANES] {
            // SAFETY: `self` proves the features, and what is written lies within the slice or array.
            unsafe {
                let (most, least) = (_mm512_set1_ps(LARGEST_HALF), _mm512_set1_ps(-LARGEST_HALF));
                // What is not a number comes second, and so comes through.
                let x = _mm512_max_ps(least, _mm512_min_ps(most, x));
                let mut bits = [0; LANES];
                let halves = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
                _mm256_storeu_si256(bits.as_mut_ptr().cast(), halves);
                bits
            }
        }
        #[inline(always)]
        fn load_bf16(self, bits: &[u16; LANES]) -> Self::F {
            // SAFETY: `self` proves the features, and what is read lies within the slice or array.
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(bits.as_ptr().cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        fn max_abs(self, largest: Self::F, x: [Self::F; 2]) -> Self::F {
            // SAFETY: `self` proves the features.
            unsafe {
                let mask = _mm512_set1_epi32(MAGNITUDE as i32);
                let [first, second] = [_mm512_castps_si512(x[0]), _mm512_castps_si512(x[1])];
                let of_x = _mm512_max_epi32(_mm512_and_si512(first, mask), _mm512_and_si512(second, mask));
                _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(largest), of_x))
            }
        }
        #[inline(always)]
        fn largest(self, x: Self::F) -> u32 {
            // SAFETY: `self` proves the features.
            unsafe { _mm512_reduce_max_epi32(_mm512_castps_si512(x)) as u32 }
        }
        #[inline(always)]
        fn split(self, x: [Self::F; 2], by: f32, high: &mut [i8; BLOCK], low: &mut [i8; BLOCK]) -> Split {
            // SAFETY: `self` proves the features, and what is written lies within the slice or array.
            unsafe {
                let (by, seven) = (_mm512_set1_ps(by), _mm512_set1_epi32(127));
                let (mut qs, mut uppers) = ([seven; 2], [seven; 2]);
                for (i, x) in x.into_iter().enumerate() {
                    let q = _mm512_cvtps_epi32(_mm512_mul_ps(x, by));
                    let upper = _mm512_srai_epi32::<7>(q);
                    let lower = _mm512_and_si512(q, seven);
                    _mm_storeu_si128(high.as_mut_ptr().add(16 * i).cast(), _mm512_cvtepi32_epi8(upper));
                    _mm_storeu_si128(low.as_mut_ptr().add(16 * i).cast(), _mm512_cvtepi32_epi8(lower));
                    (qs[i], uppers[i]) = (q, upper);
                }
                let products = _mm512_mullo_epi32(uppers[0], uppers[1]);
                split(qs.map(|q| halves_added(q)), halves_added(products))
            }
        }
    }
}

/// The bits of a float but its sign.
const MAGNITUDE: u32 = 0x7FFF_FFFF;

/// The largest finite half-precision number.
const LARGEST_HALF: f32 = 65504.0;

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

/// The sum of a b c, in 16 lanes, then pairwise.
#[inline(always)]
pub(super) fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_whole, a_rest) = a.as_chunks::<LANES>();
    let (b_whole, b_rest) = b.as_chunks::<LANES>();
    let (c_whole, c_rest) = c.as_chunks::<LANES>();
    for ((a, b), c) in a_whole.iter().zip(b_whole).zip(c_whole) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i] * c[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).zip(c_rest).map(|((a, b), c)| a * b * c).sum();
    sum_pairwise(lanes) + rest
}

/// x = softmax(scale * x), its sum in 16 lanes, then pairwise.
#[inline(always)]
pub(super) fn softmax(x: &mut [f32], scale: f32) {
    let largest = x.iter().fold(f32::NEG_INFINITY, |a, &b| larger(a, b));
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

/// The larger of two numbers: one instruction, where `max` takes three to see to what is not a number. Here `b`, if
/// that is not one, is left out.
#[inline(always)]
pub(super) fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// The largest of the lanes.
#[inline(always)]
pub(super) fn max_pairwise(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = larger(lanes[i], lanes[i + width]);
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
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits: a conversion that saturates, as `as` does,
    // is not vectorised.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_4, clamped));
    let mut p = 1.987_569_1e-4f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p.mul_add(r, c);
    }
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    let value = (p * r).mul_add(r, r + 1.0) * power;
    if x < -87.0 { 0.0 } else { value }
}

/// tanh(x), to about 1e-7 of 1.
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

/// Says that this line will be read soon, where the machine listens.
#[inline(always)]
pub(super) fn prefetch(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// As [`prefetch`], into the second cache, which waits for more lines at a time than the first.
#[inline(always)]
pub(super) fn prefetch_far(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch reads nothing, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// The value of half-precision bits; infinity is taken for not a number, which is what a cache that saturates can hold
/// beside numbers.
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
    half::f16::from_f32(x.clamp(-LARGEST_HALF, LARGEST_HALF)).to_bits()
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
    fn tanh_is_close() {
        for i in -2000..2000 {
            let x = i as f32 * 0.04;
            assert!((f64::from(tanh(x)) - f64::from(x).tanh()).abs() <= 3e-7, "{x}");
        }
        assert_eq!([tanh(f32::INFINITY), tanh(f32::NEG_INFINITY)], [1.0, -1.0]);
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn all_forms_round_to_the_same_halves() {
        fn kernel<S: Simd>(s: S, x: &[f32; LANES], out: &mut [u16; LANES]) {
            *out = s.to_f16(s.load(x));
        }
        let special =
            [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e9, -1e9, 65_519.9, 1e-7, -3e-8, 1e-9, -0.0, 0.1, 1.0];
        let mut x = [0.333; LANES];
        x[..special.len()].copy_from_slice(&special);
        for level in Level::all() {
            let mut got = [0; LANES];
            let (x, out) = (&x, &mut got);
            dispatch!(level, kernel, x: &[f32; LANES], out: &mut [u16; LANES]);
            let same = |(got, x): (&u16, &f32)| *got == f16_bits(*x) || x.is_nan() && f16_value(*got).is_nan();
            assert!(got.iter().zip(x).all(same), "{level:?} {got:x?}");
        }
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
