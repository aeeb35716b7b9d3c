//! AVX2 with FMA and F16C.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{EIGHTS, Halves, MicroKernel, PAIRS, PanelBlock, RowWords, Shift, WordTable, four, pair};
use crate::cpu::simd::{Avx2, unrolled};
use crate::format::{BLOCK, FOURS};

/// AVX2: 8 lanes, 32 products an instruction, summed in pairs in int16. Holds the proof that the machine has it.
#[derive(Clone, Copy)]
pub struct Avx2Maddubs(Avx2);

impl Avx2Maddubs {
    /// Returns the form for a machine that is proved to have it.
    #[inline(always)]
    pub fn new(proof: Avx2) -> Self {
        Self(proof)
    }
    /// The sum of products of quants up to `most` and bytes of a row, in int16 as far as these hold it: 16 products of
    /// at most 15 * 127 are 30,480, 8 of 31 * 127, and 4 of 63 * 127.
    #[inline(always)]
    fn sum(self, w: &[__m256i; FOURS], most: u8, x: &[i8; BLOCK], vectors: Range<usize>) -> __m256i {
        let together = match most {
            0..16 => FOURS,
            16..32 => FOURS / 2,
            _ => FOURS / 4,
        };
        // SAFETY: `self` proves the features.
        unsafe {
            let mut sum = _mm256_setzero_si256();
            let (w, from) = (&w[vectors.start..vectors.end], vectors.start);
            for (i, w) in w.chunks(together).enumerate() {
                let mut part = _mm256_setzero_si256();
                for (g, w) in w.iter().enumerate() {
                    let x = _mm256_set1_epi32(four(x, from + i * together + g));
                    part = _mm256_add_epi16(part, _mm256_maddubs_epi16(*w, x));
                }
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
            }
            sum
        }
    }
    /// The sum for quants of eight bits, as two nibbles.
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
            let (low, high) = (self.sum(&low, 15, x, 0..FOURS), self.sum(&high, 15, x, 0..FOURS));
            _mm256_add_epi32(_mm256_slli_epi32::<4>(high), low)
        }
    }
    #[inline(always)]
    fn add_to(self, a: __m256i, x: i32) -> __m256i {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_add_epi32(a, _mm256_set1_epi32(x)) }
    }
    /// 128 * high + low.
    #[inline(always)]
    fn join(self, high: __m256i, low: __m256i) -> __m256i {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_add_epi32(_mm256_slli_epi32::<7>(high), low) }
    }
}

/// The body's sums, for each strip's quants and each of P rows.
macro_rules! each_sum {
    ($w:ident in $all:ident, $r:ident => $sum:block) => {{
        let mut sums = [[$all[0][0]; P]; S];
        unrolled!(s in S up to 2 => {
            let $w = &$all[s];
            unrolled!($r in P up to 4 => {
                sums[s][$r] = $sum;
            });
        });
        sums
    }};
}

impl MicroKernel for Avx2Maddubs {
    const ROWS: usize = 8;
    const GROUP: usize = 4;
    const STRIPS: usize = 1;
    const SECOND: u8 = 0;
    type Bytes = __m256i;
    type Quants = [__m256i; FOURS];
    type Words = [__m256i; PAIRS];
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
    fn load_bf16(self, bytes: &[u8]) -> __m256 {
        // SAFETY: `self` proves the features, and what is read lies within the slice or array.
        unsafe {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(
                bytes[..16].as_ptr().cast(),
            ))))
        }
    }
    #[inline(always)]
    fn load_f32(self, bytes: &[u8]) -> __m256 {
        // SAFETY: `self` proves the features, and what is read lies within the slice or array.
        unsafe { _mm256_loadu_ps(bytes[..32].as_ptr().cast()) }
    }
    #[inline(always)]
    fn load_u8<const N: u32>(self, bytes: &[u8], mask: u8) -> __m256 {
        // SAFETY: `self` proves the features, and what is read lies within the slice or array.
        unsafe {
            let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(bytes[..8].as_ptr().cast()));
            let bytes = _mm256_srl_epi32(bytes, _mm_cvtsi32_si128(N as i32));
            _mm256_cvtepi32_ps(_mm256_and_si256(bytes, _mm256_set1_epi32(mask.into())))
        }
    }
    #[inline(always)]
    fn load_i8(self, bytes: &[u8]) -> __m256 {
        // SAFETY: `self` proves the features, and what is read lies within the slice or array.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(bytes[..8].as_ptr().cast()))) }
    }
    #[inline(always)]
    fn look_up_floats(self, bytes: &[u8], table: &[f32; 256]) -> __m256 {
        let at = |i: usize| table[usize::from(bytes[i])];
        // SAFETY: `self` proves the features.
        unsafe { _mm256_setr_ps(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)) }
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
    fn add_shifted(self, a: __m256, shift: Shift, d: __m256, c: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe {
            let a = _mm256_add_epi32(_mm256_castps_si256(a), _mm256_set1_epi32(shift.0 as i32));
            _mm256_fmadd_ps(_mm256_castsi256_ps(a), d, c)
        }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_mul_ps(a, b) }
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
    fn load_bytes(self, from: &[u8]) -> __m256i {
        // SAFETY: `self` proves the features, and what is read lies within the slice or array.
        unsafe { _mm256_loadu_si256(from[..32].as_ptr().cast()) }
    }
    #[inline(always)]
    fn and(self, a: __m256i, mask: u8) -> __m256i {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_and_si256(a, _mm256_set1_epi8(mask as i8)) }
    }
    #[inline(always)]
    fn shift_right<const N: u32>(self, a: __m256i) -> __m256i {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_srl_epi16(a, _mm_cvtsi32_si128(N as i32)) }
    }
    #[inline(always)]
    fn or(self, a: __m256i, mask: u8) -> __m256i {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_or_si256(a, _mm256_set1_epi8(mask as i8)) }
    }
    #[inline(always)]
    fn or_bytes(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_or_si256(a, b) }
    }
    #[inline(always)]
    fn shift_left<const N: u32>(self, a: __m256i) -> __m256i {
        // SAFETY: `self` proves the features.
        unsafe { _mm256_sll_epi16(a, _mm_cvtsi32_si128(N as i32)) }
    }
    #[inline(always)]
    fn add_where(self, a: __m256i, bits: &[u8], by: u8) -> __m256i {
        let Some(bits) = bits.first_chunk() else { return a };
        let bits = u32::from_le_bytes(*bits);
        // SAFETY: `self` proves the features.
        unsafe {
            // Every byte gets the byte that has its bit, and then keeps that bit alone.
            let places = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
            let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits as i32), places);
            let own = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
            let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, own), own);
            _mm256_add_epi8(a, _mm256_and_si256(set, _mm256_set1_epi8(by as i8)))
        }
    }
    #[inline(always)]
    fn look_up(self, a: __m256i, table: &[u8; 16]) -> __m256i {
        // SAFETY: `self` proves the features, and what is read lies within the slice or array.
        unsafe { _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())), a) }
    }
    #[inline(always)]
    fn look_up_words(self, nibbles: &[u8], table: &WordTable) -> Self::Words {
        let nibbles = self.load_bytes(nibbles);
        let mut words = [nibbles; PAIRS];
        for (i, nibbles) in [nibbles, self.shift_right::<4>(nibbles)].into_iter().enumerate() {
            let index = self.and(nibbles, 15);
            let (low, high) = (self.look_up(index, &table.low), self.look_up(index, &table.high));
            // SAFETY: `self` proves the features.
            unsafe {
                let byte = _mm256_set1_epi16(0xFF);
                words[i] = _mm256_or_si256(_mm256_and_si256(low, byte), _mm256_slli_epi16::<8>(high));
                words[2 + i] = _mm256_or_si256(_mm256_srli_epi16::<8>(low), _mm256_andnot_si256(byte, high));
            }
        }
        words
    }
    #[inline(always)]
    fn ready_nibbles<const P: usize>(self, w: [__m256i; FOURS]) -> Self::Quants {
        w
    }
    #[inline(always)]
    fn ready_fives(self, w: [__m256i; FOURS]) -> Self::Quants {
        w
    }
    #[inline(always)]
    fn ready_bytes(self, w: [__m256i; FOURS]) -> Self::Quants {
        w
    }
    #[inline(always)]
    fn ready_halves(self, mut w: [__m256i; FOURS], shift: u32) -> Self::Quants {
        for w in &mut w {
            // SAFETY: `self` proves the features.
            *w = unsafe { _mm256_srl_epi16(*w, _mm_cvtsi32_si128(shift as i32)) };
            *w = self.and(*w, 0xFF >> shift);
        }
        w
    }
    #[inline(always)]
    fn dot_nibbles<const P: usize, const S: usize>(
        self,
        w: &[Self::Quants; S],
        x: &PanelBlock,
        first: usize,
    ) -> [[__m256i; P]; S] {
        each_sum!(w in w, r => {
            let [high, low] = &x.quants[first + r];
            self.join(self.sum(w, 15, high, 0..FOURS), self.sum(w, 15, low, 0..FOURS))
        })
    }
    #[inline(always)]
    fn dot_fives<const P: usize, const S: usize>(
        self,
        w: &[Self::Quants; S],
        x: &PanelBlock,
        first: usize,
    ) -> [[__m256i; P]; S] {
        each_sum!(w in w, r => {
            let [h, l] = &x.quants[first + r];
            // SAFETY: `self` proves the features.
            unsafe {
                let (mut high, mut low) = (_mm256_setzero_si256(), _mm256_setzero_si256());
                for (g, w) in w.iter().enumerate() {
                    // 16 products of at most 16 * 112, and 16 of 16 * 127: 32,512.
                    let signed = _mm256_sign_epi8(_mm256_set1_epi32(four(h, g)), *w);
                    high = _mm256_add_epi16(high, _mm256_maddubs_epi16(_mm256_abs_epi8(*w), signed));
                    low = _mm256_add_epi16(low, _mm256_maddubs_epi16(_mm256_set1_epi32(four(l, g)), *w));
                }
                let one = _mm256_set1_epi16(1);
                self.join(_mm256_madd_epi16(high, one), _mm256_madd_epi16(low, one))
            }
        })
    }
    #[inline(always)]
    fn dot_bytes<const P: usize, const S: usize>(
        self,
        w: &[Self::Quants; S],
        x: &PanelBlock,
        first: usize,
    ) -> [[__m256i; P]; S] {
        each_sum!(w in w, r => {
            let [high, low] = &x.quants[first + r];
            let high = self.add_to(self.sum_of_bytes(w, high), x.less[first + r]);
            self.join(high, self.sum_of_bytes(w, low))
        })
    }
    #[inline(always)]
    fn dot_half<const P: usize, const S: usize>(
        self,
        half: usize,
        w: &[Self::Quants; S],
        shift: u32,
        centred: Option<&Halves>,
        x: &PanelBlock,
        first: usize,
    ) -> [[Self::Int; P]; S] {
        let (vectors, most) = (FOURS / 2 * half..FOURS / 2 * (half + 1), 0xFF >> shift);
        each_sum!(w in w, r => {
            let [high, low] = &x.quants[first + r];
            let low = self.sum(w, most, low, vectors.clone());
            let all = self.join(self.sum(w, most, high, vectors.clone()), low);
            // SAFETY: `self` proves the features.
            let all = unsafe { _mm256_sll_epi32(all, _mm_cvtsi32_si128(shift as i32)) };
            centred.map_or(all, |halves| self.add_to(all, 128 * halves.less[half][first + r]))
        })
    }
    #[inline(always)]
    fn dot_words(self, w: &[Self::Words; EIGHTS], x: &RowWords) -> __m256 {
        let mut sums = [self.zero(); EIGHTS];
        for (eight, (w, sum)) in w.iter().zip(&mut sums).enumerate() {
            // SAFETY: `self` proves the features.
            unsafe {
                let mut t = _mm256_setzero_si256();
                for (i, w) in w.iter().enumerate() {
                    t = _mm256_add_epi32(t, _mm256_madd_epi16(*w, _mm256_set1_epi32(pair(x, PAIRS * eight + i))));
                }
                *sum = _mm256_cvtepi32_ps(t);
            }
        }
        self.add(self.add(sums[0], sums[1]), self.add(sums[2], sums[3]))
    }
}
