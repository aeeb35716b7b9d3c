//! The dot product instruction that the matmul rests on, by itself: the instruction peak of a roofline.

#[cfg(target_arch = "x86_64")]
use super::lanes::amx::{self, Amx};
use super::simd::Level;

/// Executes about `rounds` times a dozen of the machine's best dot product instructions, which wait neither for memory
/// nor for each other, on this thread. Gives the products that were summed, of which a weight
/// times an activation takes two.
pub fn dot_products(rounds: u64) -> u64 {
    match Level::best() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: nobody has a level that the machine lacks.
        Level::Amx => amx::products(unsafe { Amx::new() }, rounds),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx512 => unsafe { x86::vnni(rounds) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { x86::maddubs(rounds) },
        _ => portable(rounds),
    }
}

/// Sums that run side by side: more than an instruction takes cycles.
const SUMS: usize = 12;

fn portable(rounds: u64) -> u64 {
    let (a, b) = (std::hint::black_box([3u8; 64]), std::hint::black_box([-5i8; 64]));
    let mut sum = 0i32;
    for _ in 0..rounds {
        sum = a.iter().zip(&b).fold(sum, |sum, (a, b)| sum.wrapping_add(i32::from(*a) * i32::from(*b)));
        std::hint::black_box(sum);
    }
    rounds * 64
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::SUMS;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn vnni(rounds: u64) -> u64 {
        let (a, b) = (black_box(_mm512_set1_epi8(3)), black_box(_mm512_set1_epi8(-5)));
        let mut sums = [_mm512_setzero_si512(); SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        black_box(sums);
        rounds * SUMS as u64 * 64
    }

    #[target_feature(enable = "avx2")]
    pub fn maddubs(rounds: u64) -> u64 {
        let (a, mut b) = (black_box(_mm256_set1_epi8(3)), black_box(_mm256_set1_epi8(-5)));
        let mut sums = [_mm256_setzero_si256(); SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(a, b));
            }
            // Another factor each round, so that no product is computed once for all.
            b = _mm256_add_epi8(b, a);
        }
        black_box(sums);
        rounds * SUMS as u64 * 32
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn counts_what_it_does() {
        assert!(super::dot_products(100) >= 100 * 64);
        assert_eq!(super::dot_products(200), 2 * super::dot_products(100));
    }
}
