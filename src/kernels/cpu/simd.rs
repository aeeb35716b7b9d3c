//! One source, two forms: [`multiversion!`] compiles a function for the baseline and for AVX2 and picks at run time. Rust never fuses
//! or reorders float operations, so both forms give the same bits; the loops here are written in lanes that the compiler can vectorise.

/// Whether the AVX2 forms may run; they use F16C too.
#[inline]
pub(super) fn has_avx2() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("f16c")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
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
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    portable($($arg),*)
                }
                if $crate::kernels::cpu::simd::has_avx2() {
                    // SAFETY: the machine has AVX2, as was just asked.
                    return unsafe { avx2($($arg),*) };
                }
            }
            portable($($arg),*)
        }
    };
}
pub(super) use multiversion;

const LANES: usize = 16;

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

#[inline(always)]
fn sum_pairwise(mut lanes: [f32; LANES]) -> f32 {
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
