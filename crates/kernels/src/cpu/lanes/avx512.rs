//! AVX-512 with VNNI.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{Halves, MicroKernel, PanelBlock, Shift, four};
use crate::cpu::simd::{Avx512, unrolled};
use crate::format::{BLOCK, FOURS};

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
    fn splat(self, x: i32) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_set1_epi32(x) }
    }
    /// The sum of some columns' products with bytes of a row, from `start` on.
    #[inline(always)]
    fn sum(self, start: __m512i, q: &Quants, x: &[i8; BLOCK], vectors: Range<usize>) -> __m512i {
        let mut sum = start;
        for g in vectors {
            // SAFETY: `self` proves the features.
            sum = unsafe { _mm512_dpbusd_epi32(sum, q.w[g], self.splat(four(x, g))) };
        }
        sum
    }
    /// The sum of some columns' products as they are, the high bytes' from `start` on. The low bytes' follow on what the
    /// high ones' have come to, which saves a sum; a single row, where that would be waited for, has both side by side.
    #[inline(always)]
    fn dot<const P: usize>(
        self,
        start: __m512i,
        q: &Quants,
        [high, low]: &[[i8; BLOCK]; 2],
        vectors: Range<usize>,
    ) -> __m512i {
        let high = self.sum(start, q, high, vectors.clone());
        if P == 1 {
            return self.join(high, self.sum(self.splat(0), q, low, vectors));
        }
        // SAFETY: `self` proves the features.
        let start = unsafe { _mm512_slli_epi32::<7>(high) };
        self.sum(start, q, low, vectors)
    }
    /// 128 * high + low.
    #[inline(always)]
    fn join(self, high: __m512i, low: __m512i) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_add_epi32(_mm512_slli_epi32::<7>(high), low) }
    }
    /// Nibbles times the row `first`, whose high bytes are not in pairs.
    #[inline(always)]
    fn dot_one<const P: usize>(self, q: &Quants, x: &PanelBlock, first: usize) -> [__m512i; P] {
        [self.dot::<P>(self.splat(0), q, &x.quants[first], 0..FOURS); P]
    }
}

impl MicroKernel for Avx512Vnni {
    const ROWS: usize = 16;
    const GROUP: usize = 8;
    const SECOND: u8 = 128;
    type Bytes = __m512i;
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
    fn load_bf16(self, bytes: &[u8]) -> __m512 {
        // SAFETY: `self` proves the features, and what is read lies within the slice or array.
        unsafe {
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(
                bytes[..32].as_ptr().cast(),
            ))))
        }
    }
    #[inline(always)]
    fn load_f32(self, bytes: &[u8]) -> __m512 {
        // SAFETY: `self` proves the features, and what is read lies within the slice or array.
        unsafe { _mm512_loadu_ps(bytes[..64].as_ptr().cast()) }
    }
    #[inline(always)]
    fn load_u8<const N: u32>(self, bytes: &[u8], mask: u8) -> __m512 {
        // SAFETY: `self` proves the features, and what is read lies within the slice or array.
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes[..16].as_ptr().cast()));
            _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32::<N>(bytes), _mm512_set1_epi32(mask.into())))
        }
    }
    #[inline(always)]
    fn load_i8(self, bytes: &[u8]) -> __m512 {
        // SAFETY: `self` proves the features, and what is read lies within the slice or array.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes[..16].as_ptr().cast()))) }
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
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_mul_ps(a, b) }
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
    fn load_bytes(self, from: &[u8]) -> __m512i {
        // SAFETY: `self` proves the features, and what is read lies within the slice or array.
        unsafe { _mm512_loadu_si512(from[..64].as_ptr().cast()) }
    }
    #[inline(always)]
    fn and(self, a: __m512i, mask: u8) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_and_si512(a, _mm512_set1_epi8(mask as i8)) }
    }
    #[inline(always)]
    fn shift_right<const N: u32>(self, a: __m512i) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_srli_epi16::<N>(a) }
    }
    #[inline(always)]
    fn or(self, a: __m512i, mask: u8) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_or_si512(a, _mm512_set1_epi8(mask as i8)) }
    }
    #[inline(always)]
    fn or_bytes(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    fn shift_left<const N: u32>(self, a: __m512i) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_slli_epi16::<N>(a) }
    }
    #[inline(always)]
    fn add_where(self, a: __m512i, bits: &[u8], by: u8) -> __m512i {
        let Some(bits) = bits.first_chunk() else { return a };
        let mask = u64::from_le_bytes(*bits);
        // SAFETY: `self` proves the features.
        unsafe { _mm512_mask_add_epi8(a, mask, a, _mm512_set1_epi8(by as i8)) }
    }
    #[inline(always)]
    fn look_up(self, a: __m512i, table: &[u8; 16]) -> __m512i {
        // SAFETY: `self` proves the features, and what is read lies within the slice or array.
        unsafe { _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast())), a) }
    }
    #[inline(always)]
    fn ready_nibbles<const P: usize>(self, mut w: [__m512i; FOURS]) -> Quants {
        // SAFETY: `self` proves the features.
        unsafe {
            let (offset, mut pairs) = (_mm512_set1_epi8(if P == 1 { 0 } else { -128 }), _mm512_setzero_si512());
            for g in 0..HALF {
                w[HALF + g] = _mm512_or_si512(w[HALF + g], offset);
                pairs = _mm512_dpbusd_epi32(pairs, w[HALF + g], w[g]);
            }
            Quants { w, start: _mm512_sub_epi32(_mm512_setzero_si512(), pairs) }
        }
    }
    #[inline(always)]
    fn ready_fives(self, w: [__m512i; FOURS]) -> Quants {
        // SAFETY: `self` proves the features.
        unsafe {
            let mut pairs = _mm512_setzero_si512();
            for g in 0..HALF {
                pairs = _mm512_dpbusd_epi32(pairs, w[HALF + g], w[g]);
            }
            Quants { w, start: _mm512_sub_epi32(_mm512_setzero_si512(), pairs) }
        }
    }
    #[inline(always)]
    fn ready_bytes(self, w: [__m512i; FOURS]) -> Quants {
        // SAFETY: `self` proves the features.
        Quants { w, start: unsafe { _mm512_setzero_si512() } }
    }
    #[inline(always)]
    fn dot_nibbles<const P: usize>(self, q: &Quants, x: &PanelBlock, first: usize) -> [__m512i; P] {
        if P == 1 {
            return self.dot_one(q, x, first);
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
    fn dot_fives<const P: usize>(self, q: &Quants, x: &PanelBlock, first: usize) -> [__m512i; P] {
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
                    // The low bytes have no sign, and w1 has one.
                    low[r] = _mm512_dpbusd_epi32(low[r], _mm512_set1_epi32(four(l, g)), w1);
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
    fn ready_halves(self, w: [__m512i; FOURS], _: u32) -> Quants {
        self.ready_bytes(w)
    }
    #[inline(always)]
    fn dot_bytes<const P: usize>(self, q: &Quants, x: &PanelBlock, first: usize) -> [__m512i; P] {
        let mut sums = [q.start; P];
        unrolled!(r in P => {
            sums[r] = self.dot::<P>(self.splat(x.less[first + r]), q, &x.quants[first + r], 0..FOURS);
        });
        sums
    }
    #[inline(always)]
    fn dot_halves<const P: usize>(
        self,
        q: &Quants,
        _: u32,
        centred: Option<&Halves>,
        x: &PanelBlock,
        first: usize,
    ) -> [[__m512i; 2]; P] {
        let mut sums = [[q.start; 2]; P];
        unrolled!(r in P => {
            let mut starts = [self.splat(0); 2];
            if let Some(halves) = centred {
                starts = halves.less.map(|less| self.splat(less[first + r]));
            }
            sums[r][0] = self.dot::<P>(starts[0], q, &x.quants[first + r], 0..HALF);
            sums[r][1] = self.dot::<P>(starts[1], q, &x.quants[first + r], HALF..FOURS);
        });
        sums
    }
}
