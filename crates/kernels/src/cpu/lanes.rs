//! Blocks of quantised weights times rows of quantised activations in the registers of a kind of machine: the integers'
//! products are summed exactly, so that every kind gives the same bits, by whatever way it comes to them.

use super::quantize::{PanelBlock, Shift};
use super::simd::{f16_value, unrolled};
use crate::blocks::BLOCK;
use crate::packed::TILE_ROWS;

/// Vectors of quants in a block: four columns each.
const FOURS: usize = BLOCK / 4;

/// Some rows of a tile at a time, one a lane.
pub(super) trait MicroKernel: Copy {
    /// Lanes; they divide [`TILE_ROWS`].
    const ROWS: usize;
    /// Rows of activations that share the unpacking of a block.
    const GROUP: usize;
    /// A block's quants, ready for their products.
    type Quants: Copy;
    type Int: Copy;
    type Float: Copy;

    fn zero(self) -> Self::Float;
    /// The values of `ROWS` half-precision numbers.
    fn load_f16(self, bytes: &[u8]) -> Self::Float;
    fn scale(self, a: Self::Float, by: f32) -> Self::Float;
    /// a * b + c, rounded once.
    fn mul_add(self, a: Self::Float, b: f32, c: Self::Float) -> Self::Float;
    /// (float(t) << shift) * d + c, the product and the sum rounded once together. The shift is added to the exponent,
    /// which costs less than to shift t; the least of numbers that makes of a zero is lost in any sum.
    fn add_product(self, t: Self::Int, shift: Shift, d: Self::Float, c: Self::Float) -> Self::Float;
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// `ROWS` floats.
    fn load(self, from: &[f32]) -> Self::Float;
    fn store(self, a: Self::Float, out: &mut [f32]);

    /// The quants of a block, `ROWS * 4` bytes of each 64 from `at` on: of four bits, for P rows, or of eight.
    fn nibbles<const P: usize>(self, quants: &[u8], at: usize) -> Self::Quants;
    fn bytes(self, quants: &[u8], at: usize) -> Self::Quants;
    /// The exact sums of a block's 32 products, for P rows of a panel from `first` on.
    fn dot_nibbles<const P: usize>(self, w: &Self::Quants, x: &PanelBlock, first: usize) -> [Self::Int; P];
    fn dot_bytes<const P: usize>(self, w: &Self::Quants, x: &PanelBlock, first: usize) -> [Self::Int; P];
}

/// Any machine.
#[derive(Clone, Copy)]
pub(super) struct Plain;

impl Plain {
    #[inline(always)]
    fn sum(self, w: &<Self as MicroKernel>::Quants, x: &[i8; BLOCK]) -> <Self as MicroKernel>::Int {
        std::array::from_fn(|r| {
            let of_four = |(w, x): (&[u8; 4 * TILE_ROWS], &[i8; 4])| {
                (0..4).map(|i| i32::from(w[4 * r + i]) * i32::from(x[i])).sum::<i32>()
            };
            w.iter().zip(x.as_chunks::<4>().0).map(of_four).sum()
        })
    }
}

impl MicroKernel for Plain {
    const ROWS: usize = TILE_ROWS;
    const GROUP: usize = 4;
    type Quants = [[u8; 4 * TILE_ROWS]; FOURS];
    type Int = [i32; TILE_ROWS];
    type Float = [f32; TILE_ROWS];

    #[inline(always)]
    fn zero(self) -> Self::Float {
        [0.0; TILE_ROWS]
    }
    #[inline(always)]
    fn load_f16(self, bytes: &[u8]) -> Self::Float {
        std::array::from_fn(|r| f16_value(u16::from_le_bytes([bytes[2 * r], bytes[2 * r + 1]])))
    }
    #[inline(always)]
    fn scale(self, a: Self::Float, by: f32) -> Self::Float {
        a.map(|a| a * by)
    }
    #[inline(always)]
    fn mul_add(self, a: Self::Float, b: f32, c: Self::Float) -> Self::Float {
        std::array::from_fn(|r| a[r].mul_add(b, c[r]))
    }
    #[inline(always)]
    fn add_product(self, t: Self::Int, shift: Shift, d: Self::Float, c: Self::Float) -> Self::Float {
        std::array::from_fn(|r| f32::from_bits((t[r] as f32).to_bits().wrapping_add(shift.0)).mul_add(d[r], c[r]))
    }
    #[inline(always)]
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|r| a[r] + b[r])
    }
    #[inline(always)]
    fn load(self, from: &[f32]) -> Self::Float {
        std::array::from_fn(|r| from[r])
    }
    #[inline(always)]
    fn store(self, a: Self::Float, out: &mut [f32]) {
        out.copy_from_slice(&a);
    }
    #[inline(always)]
    fn nibbles<const P: usize>(self, quants: &[u8], at: usize) -> Self::Quants {
        std::array::from_fn(|g| {
            let shift = if g < FOURS / 2 { 0 } else { 4 };
            std::array::from_fn(|i| quants[64 * (g % (FOURS / 2)) + at + i] >> shift & 15)
        })
    }
    #[inline(always)]
    fn bytes(self, quants: &[u8], at: usize) -> Self::Quants {
        std::array::from_fn(|g| std::array::from_fn(|i| quants[64 * g + at + i]))
    }
    #[inline(always)]
    fn dot_nibbles<const P: usize>(self, w: &Self::Quants, x: &PanelBlock, first: usize) -> [Self::Int; P] {
        self.dot_bytes(w, x, first)
    }
    #[inline(always)]
    fn dot_bytes<const P: usize>(self, w: &Self::Quants, x: &PanelBlock, first: usize) -> [Self::Int; P] {
        std::array::from_fn(|i| {
            let [high, low] = x.quants[first + i].each_ref().map(|part| self.sum(w, part));
            std::array::from_fn(|r| 128 * high[r] + low[r])
        })
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2Maddubs, Avx512Vnni};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{BLOCK, FOURS, MicroKernel, PanelBlock, Shift, unrolled};
    use crate::cpu::simd::{Avx2, Avx512};

    /// Where x's bytes `4 g..4 g + 4` begin, as one integer.
    #[inline(always)]
    fn four(x: &[i8; BLOCK], g: usize) -> i32 {
        let [a, b, c, d] = x.as_chunks::<4>().0[g];
        i32::from_le_bytes([a as u8, b as u8, c as u8, d as u8])
    }

    /// AVX-512 with VNNI: 16 lanes, 64 products an instruction.
    ///
    /// Quants of four bits meet the high bytes of several rows in pairs: x1 w1 + x2 w2 = (x1 + w2) (x2 + w1) - x1 x2 -
    /// w1 w2 (S. Winograd, A New Algorithm for Inner Product, 1968), one product and two sums of bytes in place of two
    /// products. Sums have twice as many of a core's pipes as dot products; with the low bytes multiplied as they are,
    /// all of them have as much to do.
    ///
    /// A value of it holds the proof that the machine has the instructions, so that its methods may be safe.
    #[derive(Clone, Copy)]
    pub struct Avx512Vnni(Avx512);

    #[derive(Clone, Copy)]
    pub struct Quants {
        /// For pairs, the second half is 128 more than it is: its sums with signed bytes are then unsigned ones, as the
        /// first factors of dot products have to be.
        w: [__m512i; FOURS],
        /// Where the sums of pairs begin: what the weights alone add to them, negative.
        start: __m512i,
    }

    /// Vectors of a block's first half, whose columns are paired with those of the second.
    const HALF: usize = FOURS / 2;

    /// The sums as they are, at a place that the compiler does not move their parts across. It would put all pairs
    /// before all other products, and then some pipes wait, and then the others.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn in_turn(mut high: __m512i, mut low: __m512i) -> (__m512i, __m512i) {
        // SAFETY: no instruction.
        unsafe {
            std::arch::asm!("/* {} {} */", inout(zmm_reg) high, inout(zmm_reg) low, options(nomem, nostack, preserves_flags));
        }
        (high, low)
    }

    impl Avx512Vnni {
        /// Returns the form for a machine that is proved to have it.
        #[inline(always)]
        pub fn new(proof: Avx512) -> Self {
            Self(proof)
        }
        #[inline(always)]
        fn sum(self, w: &[__m512i; FOURS], x: &[i8; BLOCK]) -> __m512i {
            // SAFETY: `self` proves the features.
            let mut sum = unsafe { _mm512_setzero_si512() };
            for (g, w) in w.iter().enumerate() {
                // SAFETY: `self` proves the features.
                sum = unsafe { _mm512_dpbusd_epi32(sum, *w, _mm512_set1_epi32(four(x, g))) };
            }
            sum
        }
        /// 128 * high + low.
        #[inline(always)]
        fn join(self, high: __m512i, low: __m512i) -> __m512i {
            // SAFETY: `self` proves the features.
            unsafe { _mm512_add_epi32(_mm512_slli_epi32::<7>(high), low) }
        }
    }

    impl MicroKernel for Avx512Vnni {
        const ROWS: usize = 16;
        const GROUP: usize = 8;
        type Quants = Quants;
        type Int = __m512i;
        type Float = __m512;

        #[inline(always)]
        fn zero(self) -> __m512 {
            // SAFETY: `self` proves the features.
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        fn load_f16(self, bytes: &[u8]) -> __m512 {
            // SAFETY: `self` proves the features, and what is read lies within the slice or array.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bytes[..32].as_ptr().cast())) }
        }
        #[inline(always)]
        fn scale(self, a: __m512, by: f32) -> __m512 {
            // SAFETY: `self` proves the features.
            unsafe { _mm512_mul_ps(a, _mm512_set1_ps(by)) }
        }
        #[inline(always)]
        fn mul_add(self, a: __m512, b: f32, c: __m512) -> __m512 {
            // SAFETY: `self` proves the features.
            unsafe { _mm512_fmadd_ps(a, _mm512_set1_ps(b), c) }
        }
        #[inline(always)]
        fn add_product(self, t: __m512i, shift: Shift, d: __m512, c: __m512) -> __m512 {
            // SAFETY: `self` proves the features.
            unsafe {
                let t = _mm512_castps_si512(_mm512_cvtepi32_ps(t));
                let t = _mm512_add_epi32(t, _mm512_set1_epi32(shift.0 as i32));
                _mm512_fmadd_ps(_mm512_castsi512_ps(t), d, c)
            }
        }
        #[inline(always)]
        fn add(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: `self` proves the features.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        fn load(self, from: &[f32]) -> __m512 {
            // SAFETY: `self` proves the features, and what is read lies within the slice or array.
            unsafe { _mm512_loadu_ps(from[..16].as_ptr()) }
        }
        #[inline(always)]
        fn store(self, a: __m512, out: &mut [f32]) {
            // SAFETY: `self` proves the features, and what is written lies within the slice or array.
            unsafe { _mm512_storeu_ps(out[..16].as_mut_ptr(), a) }
        }
        #[inline(always)]
        fn nibbles<const P: usize>(self, quants: &[u8], at: usize) -> Quants {
            let quants = quants[at..at + HALF * 64].as_ptr().cast::<__m512i>();
            // SAFETY: `self` proves the features, and what is read lies within the slice or array.
            unsafe {
                let (mask, offset) = (_mm512_set1_epi8(15), _mm512_set1_epi8(if P == 1 { 0 } else { -128 }));
                let (mut w, mut pairs) = ([mask; FOURS], _mm512_setzero_si512());
                for g in 0..HALF {
                    let both = _mm512_loadu_si512(quants.add(g));
                    w[g] = _mm512_and_si512(both, mask);
                    let second = _mm512_srli_epi16::<4>(both);
                    // second & mask | offset
                    w[HALF + g] = _mm512_ternarylogic_epi32::<0b11101010>(second, mask, offset);
                    pairs = _mm512_dpbusd_epi32(pairs, w[HALF + g], w[g]);
                }
                Quants { w, start: _mm512_sub_epi32(_mm512_setzero_si512(), pairs) }
            }
        }
        #[inline(always)]
        fn bytes(self, quants: &[u8], at: usize) -> Quants {
            let quants = quants[at..at + FOURS * 64].as_ptr().cast::<__m512i>();
            // SAFETY: `self` proves the features, and what is read lies within the slice or array.
            unsafe {
                let mut w = [_mm512_setzero_si512(); FOURS];
                for (g, w) in w.iter_mut().enumerate() {
                    *w = _mm512_loadu_si512(quants.add(g));
                }
                Quants { w, start: _mm512_setzero_si512() }
            }
        }
        #[inline(always)]
        fn dot_nibbles<const P: usize>(self, q: &Quants, x: &PanelBlock, first: usize) -> [__m512i; P] {
            if P == 1 {
                return self.dot_bytes(q, x, first);
            }
            let (mut high, mut low) = ([q.start; P], [q.start; P]);
            // SAFETY: `self` proves the features.
            unsafe {
                unrolled!(r in P => {
                    low[r] = _mm512_set1_epi32(x.pairs[first + r]);
                });
                for g in 0..HALF {
                    let (w1, w2) = (q.w[g], q.w[HALF + g]);
                    unrolled!(r in P => {
                        let [h, l] = &x.quants[first + r];
                        let one = _mm512_add_epi8(w2, _mm512_set1_epi32(four(h, g)));
                        let two = _mm512_add_epi8(w1, _mm512_set1_epi32(four(h, HALF + g)));
                        low[r] = _mm512_dpbusd_epi32(low[r], w1, _mm512_set1_epi32(four(l, g)));
                        high[r] = _mm512_dpbusd_epi32(high[r], one, two);
                        low[r] = _mm512_dpbusd_epi32(low[r], w2, _mm512_set1_epi32(four(l, HALF + g)));
                        (high[r], low[r]) = in_turn(high[r], low[r]);
                    });
                }
            }
            unrolled!(r in P => {
                high[r] = self.join(high[r], low[r]);
            });
            high
        }
        #[inline(always)]
        fn dot_bytes<const P: usize>(self, q: &Quants, x: &PanelBlock, first: usize) -> [__m512i; P] {
            let mut sums = [q.start; P];
            unrolled!(r in P => {
                let [high, low] = &x.quants[first + r];
                sums[r] = self.join(self.sum(&q.w, high), self.sum(&q.w, low));
            });
            sums
        }
    }

    /// AVX2: 8 lanes, 32 products an instruction, summed in pairs in int16. Holds the proof that the machine has it.
    #[derive(Clone, Copy)]
    pub struct Avx2Maddubs(Avx2);

    impl Avx2Maddubs {
        /// Returns the form for a machine that is proved to have it.
        #[inline(always)]
        pub fn new(proof: Avx2) -> Self {
            Self(proof)
        }
        #[inline(always)]
        fn sum(self, w: &[__m256i; FOURS], x: &[i8; BLOCK]) -> __m256i {
            // SAFETY: `self` proves the features.
            unsafe {
                // A lane's two halves each sum 16 products of at most 15 * 127: 30,480.
                let mut sum = _mm256_setzero_si256();
                for (g, w) in w.iter().enumerate() {
                    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(*w, _mm256_set1_epi32(four(x, g))));
                }
                _mm256_madd_epi16(sum, _mm256_set1_epi16(1))
            }
        }
        /// The sum for quants of eight bits, as two nibbles: int16 would not hold products of 255.
        #[inline(always)]
        fn sum_of_bytes(self, w: &[__m256i; FOURS], x: &[i8; BLOCK]) -> __m256i {
            // SAFETY: `self` proves the features.
            unsafe {
                let mask = _mm256_set1_epi8(15);
                let (mut low, mut high) = (*w, *w);
                for g in 0..FOURS {
                    low[g] = _mm256_and_si256(w[g], mask);
                    high[g] = _mm256_and_si256(_mm256_srli_epi16::<4>(w[g]), mask);
                }
                _mm256_add_epi32(_mm256_slli_epi32::<4>(self.sum(&high, x)), self.sum(&low, x))
            }
        }
        /// 128 * high + low.
        #[inline(always)]
        fn join(self, high: __m256i, low: __m256i) -> __m256i {
            // SAFETY: `self` proves the features.
            unsafe { _mm256_add_epi32(_mm256_slli_epi32::<7>(high), low) }
        }
    }

    impl MicroKernel for Avx2Maddubs {
        const ROWS: usize = 8;
        const GROUP: usize = 4;
        type Quants = [__m256i; FOURS];
        type Int = __m256i;
        type Float = __m256;

        #[inline(always)]
        fn zero(self) -> __m256 {
            // SAFETY: `self` proves the features.
            unsafe { _mm256_setzero_ps() }
        }
        #[inline(always)]
        fn load_f16(self, bytes: &[u8]) -> __m256 {
            // SAFETY: `self` proves the features, and what is read lies within the slice or array.
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(bytes[..16].as_ptr().cast())) }
        }
        #[inline(always)]
        fn scale(self, a: __m256, by: f32) -> __m256 {
            // SAFETY: `self` proves the features.
            unsafe { _mm256_mul_ps(a, _mm256_set1_ps(by)) }
        }
        #[inline(always)]
        fn mul_add(self, a: __m256, b: f32, c: __m256) -> __m256 {
            // SAFETY: `self` proves the features.
            unsafe { _mm256_fmadd_ps(a, _mm256_set1_ps(b), c) }
        }
        #[inline(always)]
        fn add_product(self, t: __m256i, shift: Shift, d: __m256, c: __m256) -> __m256 {
            // SAFETY: `self` proves the features.
            unsafe {
                let t = _mm256_castps_si256(_mm256_cvtepi32_ps(t));
                let t = _mm256_add_epi32(t, _mm256_set1_epi32(shift.0 as i32));
                _mm256_fmadd_ps(_mm256_castsi256_ps(t), d, c)
            }
        }
        #[inline(always)]
        fn add(self, a: __m256, b: __m256) -> __m256 {
            // SAFETY: `self` proves the features.
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        fn load(self, from: &[f32]) -> __m256 {
            // SAFETY: `self` proves the features, and what is read lies within the slice or array.
            unsafe { _mm256_loadu_ps(from[..8].as_ptr()) }
        }
        #[inline(always)]
        fn store(self, a: __m256, out: &mut [f32]) {
            // SAFETY: `self` proves the features, and what is written lies within the slice or array.
            unsafe { _mm256_storeu_ps(out[..8].as_mut_ptr(), a) }
        }
        #[inline(always)]
        fn nibbles<const P: usize>(self, quants: &[u8], at: usize) -> Self::Quants {
            let quants = quants[at..at + 3 * 64 + 32].as_ptr();
            // SAFETY: `self` proves the features, and what is read lies within the slice or array.
            unsafe {
                let mask = _mm256_set1_epi8(15);
                let mut w = [mask; FOURS];
                for g in 0..4 {
                    let both = _mm256_loadu_si256(quants.add(64 * g).cast());
                    w[g] = _mm256_and_si256(both, mask);
                    w[g + 4] = _mm256_and_si256(_mm256_srli_epi16::<4>(both), mask);
                }
                w
            }
        }
        #[inline(always)]
        fn bytes(self, quants: &[u8], at: usize) -> Self::Quants {
            let quants = quants[at..at + 7 * 64 + 32].as_ptr();
            // SAFETY: `self` proves the features, and what is read lies within the slice or array.
            unsafe {
                let mut w = [_mm256_setzero_si256(); FOURS];
                for (g, w) in w.iter_mut().enumerate() {
                    *w = _mm256_loadu_si256(quants.add(64 * g).cast());
                }
                w
            }
        }
        #[inline(always)]
        fn dot_nibbles<const P: usize>(self, w: &Self::Quants, x: &PanelBlock, first: usize) -> [__m256i; P] {
            let mut sums = [w[0]; P];
            unrolled!(r in P => {
                let [high, low] = &x.quants[first + r];
                sums[r] = self.join(self.sum(w, high), self.sum(w, low));
            });
            sums
        }
        #[inline(always)]
        fn dot_bytes<const P: usize>(self, w: &Self::Quants, x: &PanelBlock, first: usize) -> [__m256i; P] {
            let mut sums = [w[0]; P];
            unrolled!(r in P => {
                let [high, low] = &x.quants[first + r];
                sums[r] = self.join(self.sum_of_bytes(w, high), self.sum_of_bytes(w, low));
            });
            sums
        }
    }
}
