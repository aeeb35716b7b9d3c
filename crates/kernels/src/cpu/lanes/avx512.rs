//! AVX-512 with VNNI.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{EIGHTS, Halves, MicroKernel, PAIRS, PANEL, PanelBlock, RowWords, Shift, WordTable, four};
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

/// The sums of eight columns' products of integers of two bytes each. Written out, since the compiler makes two
/// instructions of each `vpdpwssd`, and a third that broadcasts.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
fn sums_of_eight(w: &[[__m512i; PAIRS]; EIGHTS], x: &RowWords) -> [__m512i; EIGHTS] {
    let [mut t0, mut t1, mut t2, mut t3] = [_mm512_setzero_si512(); EIGHTS];
    // SAFETY: what is read is the array.
    unsafe {
        std::arch::asm!(
            "vpdpwssd {t0}, {w00}, [{x}]{{1to16}}",
            "vpdpwssd {t1}, {w10}, [{x} + 16]{{1to16}}",
            "vpdpwssd {t2}, {w20}, [{x} + 32]{{1to16}}",
            "vpdpwssd {t3}, {w30}, [{x} + 48]{{1to16}}",
            "vpdpwssd {t0}, {w01}, [{x} + 4]{{1to16}}",
            "vpdpwssd {t1}, {w11}, [{x} + 20]{{1to16}}",
            "vpdpwssd {t2}, {w21}, [{x} + 36]{{1to16}}",
            "vpdpwssd {t3}, {w31}, [{x} + 52]{{1to16}}",
            "vpdpwssd {t0}, {w02}, [{x} + 8]{{1to16}}",
            "vpdpwssd {t1}, {w12}, [{x} + 24]{{1to16}}",
            "vpdpwssd {t2}, {w22}, [{x} + 40]{{1to16}}",
            "vpdpwssd {t3}, {w32}, [{x} + 56]{{1to16}}",
            "vpdpwssd {t0}, {w03}, [{x} + 12]{{1to16}}",
            "vpdpwssd {t1}, {w13}, [{x} + 28]{{1to16}}",
            "vpdpwssd {t2}, {w23}, [{x} + 44]{{1to16}}",
            "vpdpwssd {t3}, {w33}, [{x} + 60]{{1to16}}",
            t0 = inout(zmm_reg) t0,
            t1 = inout(zmm_reg) t1,
            t2 = inout(zmm_reg) t2,
            t3 = inout(zmm_reg) t3,
            w00 = in(zmm_reg) w[0][0],
            w01 = in(zmm_reg) w[0][1],
            w02 = in(zmm_reg) w[0][2],
            w03 = in(zmm_reg) w[0][3],
            w10 = in(zmm_reg) w[1][0],
            w11 = in(zmm_reg) w[1][1],
            w12 = in(zmm_reg) w[1][2],
            w13 = in(zmm_reg) w[1][3],
            w20 = in(zmm_reg) w[2][0],
            w21 = in(zmm_reg) w[2][1],
            w22 = in(zmm_reg) w[2][2],
            w23 = in(zmm_reg) w[2][3],
            w30 = in(zmm_reg) w[3][0],
            w31 = in(zmm_reg) w[3][1],
            w32 = in(zmm_reg) w[3][2],
            w33 = in(zmm_reg) w[3][3],
            x = in(reg) x.as_ptr(),
            options(pure, readonly, nostack, preserves_flags),
        );
    }
    [t0, t1, t2, t3]
}

impl Avx512Vnni {
    /// Returns the form for a machine that is proved to have it.
    #[inline(always)]
    pub fn new(proof: Avx512) -> Self {
        Self(proof)
    }
    /// a * b + c, rounded once.
    #[inline(always)]
    pub fn fused(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn splat(self, x: i32) -> __m512i {
        // SAFETY: `self` proves the features.
        unsafe { _mm512_set1_epi32(x) }
    }
    /// 128 * high + low.
    #[inline(always)]
    fn join<const P: usize, const S: usize>(
        self,
        mut high: [[__m512i; P]; S],
        low: [[__m512i; P]; S],
    ) -> [[__m512i; P]; S] {
        unrolled!(s in S up to 2 => {
            unrolled!(r in P up to 4 => {
                // SAFETY: `self` proves the features.
                high[s][r] = unsafe { _mm512_add_epi32(_mm512_slli_epi32::<7>(high[s][r]), low[s][r]) };
            });
        });
        high
    }
    /// The sums of some columns' products as they are, of which those with the high bytes begin with `start`.
    ///
    /// With one strip the registers hold the sums of a group's rows: a row's low bytes follow on what its high ones have
    /// come to. With two, and with a single row, where that would be waited for, both are summed side by side.
    #[inline(always)]
    fn dot<const P: usize, const S: usize>(
        self,
        q: &[Quants; S],
        x: &PanelBlock,
        first: usize,
        start: &[i32; PANEL],
        vectors: Range<usize>,
    ) -> [[__m512i; P]; S] {
        let (mut high, mut low) = ([[self.splat(0); P]; S], [[self.splat(0); P]; S]);
        unrolled!(s in S up to 2 => {
            unrolled!(r in P up to 4 => {
                high[s][r] = self.splat(start[first + r]);
            });
        });
        if S == 1 && P > 1 {
            unrolled!(r in P up to 4 => {
                let [h, l] = &x.quants[first + r];
                let high = self.sum(high[0][r], &q[0], h, vectors.clone());
                // SAFETY: `self` proves the features.
                let high = unsafe { _mm512_slli_epi32::<7>(high) };
                low[0][r] = self.sum(high, &q[0], l, vectors.clone());
            });
            return low;
        }
        for g in vectors {
            unrolled!(r in P up to 4 => {
                let [h, l] = &x.quants[first + r];
                let (h, l) = (self.splat(four(h, g)), self.splat(four(l, g)));
                unrolled!(s in S up to 2 => {
                    // SAFETY: `self` proves the features.
                    unsafe {
                        high[s][r] = _mm512_dpbusd_epi32(high[s][r], q[s].w[g], h);
                        low[s][r] = _mm512_dpbusd_epi32(low[s][r], q[s].w[g], l);
                    }
                });
            });
        }
        self.join(high, low)
    }
    /// The sum of some columns' products with bytes of a row, from `sum` on.
    #[inline(always)]
    fn sum(self, mut sum: __m512i, q: &Quants, x: &[i8; BLOCK], vectors: Range<usize>) -> __m512i {
        for g in vectors {
            // SAFETY: `self` proves the features.
            sum = unsafe { _mm512_dpbusd_epi32(sum, q.w[g], self.splat(four(x, g))) };
        }
        sum
    }
    /// The sums with the high bytes in pairs. The low bytes have no sign, and the first quants have one where they are
    /// `SIGNED`: then the bytes are the factor without.
    #[inline(always)]
    fn dot_pairs<const SIGNED: bool, const P: usize, const S: usize>(
        self,
        q: &[Quants; S],
        x: &PanelBlock,
        first: usize,
    ) -> [[__m512i; P]; S] {
        let (mut high, mut low) = ([[q[0].start; P]; S], [[q[0].start; P]; S]);
        // SAFETY: `self` proves the features.
        unsafe {
            unrolled!(s in S up to 2 => {
                unrolled!(r in P up to 4 => {
                    high[s][r] = q[s].start;
                    low[s][r] = self.splat(x.pairs[first + r]);
                });
            });
            for g in 0..HALF {
                unrolled!(r in P up to 4 => {
                    let [h, l] = &x.quants[first + r];
                    let (h1, h2) = (self.splat(four(h, g)), self.splat(four(h, HALF + g)));
                    let (l1, l2) = (self.splat(four(l, g)), self.splat(four(l, HALF + g)));
                    unrolled!(s in S up to 2 => {
                        let (w1, w2) = (q[s].w[g], q[s].w[HALF + g]);
                        let (one, two) = (_mm512_add_epi8(w2, h1), _mm512_add_epi8(w1, h2));
                        let (a, b) = if SIGNED { (l1, w1) } else { (w1, l1) };
                        low[s][r] = _mm512_dpbusd_epi32(low[s][r], a, b);
                        high[s][r] = _mm512_dpbusd_epi32(high[s][r], one, two);
                        low[s][r] = _mm512_dpbusd_epi32(low[s][r], w2, l2);
                        (high[s][r], low[s][r]) = in_turn(high[s][r], low[s][r]);
                    });
                });
            }
        }
        self.join(high, low)
    }
}

impl MicroKernel for Avx512Vnni {
    const ROWS: usize = 16;
    const GROUP: usize = 8;
    const STRIPS: usize = 2;
    const SECOND: u8 = 128;
    type Bytes = __m512i;
    type Quants = Quants;
    type Words = [__m512i; PAIRS];
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
    fn look_up_floats(self, bytes: &[u8], table: &[f32; 256]) -> __m512 {
        // SAFETY: `self` proves the features, what is read lies within the slice, and a byte is a place of the table.
        unsafe {
            let index = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes[..16].as_ptr().cast()));
            _mm512_i32gather_ps::<4>(index, table.as_ptr())
        }
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
    fn add_shifted(self, a: __m512, shift: Shift, d: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe {
            let a = _mm512_add_epi32(_mm512_castps_si512(a), _mm512_set1_epi32(shift.0 as i32));
            _mm512_fmadd_ps(_mm512_castsi512_ps(a), d, c)
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
    fn look_up_words(self, nibbles: &[u8], table: &WordTable) -> Self::Words {
        let nibbles = self.load_bytes(nibbles);
        // SAFETY: `self` proves the features, and what is read lies within the array.
        unsafe {
            // Twice the table: of an index of five bits the highest is the next nibble's.
            let table = _mm512_broadcast_i64x4(_mm256_loadu_si256(table.words.as_ptr().cast()));
            [
                _mm512_permutexvar_epi16(nibbles, table),
                _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(nibbles), table),
                _mm512_permutexvar_epi16(_mm512_srli_epi16::<8>(nibbles), table),
                _mm512_permutexvar_epi16(_mm512_srli_epi16::<12>(nibbles), table),
            ]
        }
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
    fn dot_nibbles<const P: usize, const S: usize>(
        self,
        q: &[Quants; S],
        x: &PanelBlock,
        first: usize,
    ) -> [[__m512i; P]; S] {
        if P == 1 {
            // High bytes of one row are not in pairs.
            return self.dot(q, x, first, &[0; PANEL], 0..FOURS);
        }
        self.dot_pairs::<false, P, S>(q, x, first)
    }
    #[inline(always)]
    fn dot_fives<const P: usize, const S: usize>(
        self,
        q: &[Quants; S],
        x: &PanelBlock,
        first: usize,
    ) -> [[__m512i; P]; S] {
        self.dot_pairs::<true, P, S>(q, x, first)
    }
    #[inline(always)]
    fn ready_halves(self, w: [__m512i; FOURS], _: u32) -> Quants {
        self.ready_bytes(w)
    }
    #[inline(always)]
    fn dot_bytes<const P: usize, const S: usize>(
        self,
        q: &[Quants; S],
        x: &PanelBlock,
        first: usize,
    ) -> [[__m512i; P]; S] {
        self.dot(q, x, first, &x.less, 0..FOURS)
    }
    #[inline(always)]
    fn dot_half<const P: usize, const S: usize>(
        self,
        half: usize,
        q: &[Self::Quants; S],
        _: u32,
        centred: Option<&Halves>,
        x: &PanelBlock,
        first: usize,
    ) -> [[Self::Int; P]; S] {
        let start = centred.map_or(&[0; PANEL], |halves| &halves.less[half]);
        self.dot(q, x, first, start, HALF * half..HALF * (half + 1))
    }
    #[inline(always)]
    fn dot_words(self, w: &[Self::Words; EIGHTS], x: &RowWords) -> __m512 {
        // SAFETY: `self` proves the features.
        unsafe {
            let [a, b, c, d] = sums_of_eight(w, x);
            let first = _mm512_add_ps(_mm512_cvtepi32_ps(a), _mm512_cvtepi32_ps(b));
            _mm512_add_ps(first, _mm512_add_ps(_mm512_cvtepi32_ps(c), _mm512_cvtepi32_ps(d)))
        }
    }
}
