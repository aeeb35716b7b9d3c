//! Any machine.

use super::{EIGHTS, Halves, MicroKernel, PAIRS, PanelBlock, RowWords, Shift, WordTable};
use crate::cpu::simd::f16_value;
use crate::format::{BLOCK, FOURS, TILE_ROWS};

/// Any machine.
#[derive(Clone, Copy)]
pub struct Plain;

impl Plain {
    /// The sums of some columns' products, `value` being what a byte of the weights is.
    #[inline(always)]
    fn sum(self, w: &[[u8; 4 * TILE_ROWS]], x: &[i8], value: impl Fn(u8) -> i32) -> [i32; TILE_ROWS] {
        std::array::from_fn(|r| {
            let of_four = |(w, x): (&[u8; 4 * TILE_ROWS], &[i8; 4])| {
                (0..4).map(|i| value(w[4 * r + i]) * i32::from(x[i])).sum::<i32>()
            };
            w.iter().zip(x.as_chunks::<4>().0).map(of_four).sum()
        })
    }

    /// The sums of products with rows' values, of which `x` are the high bytes and the low ones.
    #[inline(always)]
    fn dot(self, w: &[[u8; 4 * TILE_ROWS]], x: [&[i8]; 2], value: impl Fn(u8) -> i32) -> [i32; TILE_ROWS] {
        let [high, low] = x.map(|part| self.sum(w, part, &value));
        std::array::from_fn(|r| 128 * high[r] + low[r])
    }
    /// The sums of whole blocks.
    #[inline(always)]
    fn dot_all<const P: usize, const S: usize>(
        self,
        w: &[[[u8; 4 * TILE_ROWS]; FOURS]; S],
        x: &PanelBlock,
        first: usize,
        value: impl Fn(u8) -> i32 + Copy,
    ) -> [[[i32; TILE_ROWS]; P]; S] {
        w.each_ref()
            .map(|w| std::array::from_fn(|i| self.dot(w, x.quants[first + i].each_ref().map(|part| &part[..]), value)))
    }
}

impl MicroKernel for Plain {
    const ROWS: usize = TILE_ROWS;
    const GROUP: usize = 4;
    const STRIPS: usize = 1;
    const SECOND: u8 = 0;
    type Bytes = [u8; 4 * TILE_ROWS];
    type Quants = [Self::Bytes; FOURS];
    type Words = [[i16; 2 * PAIRS]; TILE_ROWS];
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
    fn load_bf16(self, bytes: &[u8]) -> Self::Float {
        std::array::from_fn(|r| f32::from_bits(u32::from(u16::from_le_bytes([bytes[2 * r], bytes[2 * r + 1]])) << 16))
    }
    #[inline(always)]
    fn load_f32(self, bytes: &[u8]) -> Self::Float {
        std::array::from_fn(|r| f32::from_le_bytes(std::array::from_fn(|i| bytes[4 * r + i])))
    }
    #[inline(always)]
    fn load_u8<const N: u32>(self, bytes: &[u8], mask: u8) -> Self::Float {
        std::array::from_fn(|r| f32::from(bytes[r] >> N & mask))
    }
    #[inline(always)]
    fn load_i8(self, bytes: &[u8]) -> Self::Float {
        std::array::from_fn(|r| f32::from(bytes[r] as i8))
    }
    #[inline(always)]
    fn look_up_floats(self, bytes: &[u8], table: &[f32; 256]) -> Self::Float {
        std::array::from_fn(|r| table[usize::from(bytes[r])])
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
    fn add_shifted(self, a: Self::Float, shift: Shift, d: Self::Float, c: Self::Float) -> Self::Float {
        std::array::from_fn(|r| f32::from_bits(a[r].to_bits().wrapping_add(shift.0)).mul_add(d[r], c[r]))
    }
    #[inline(always)]
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|r| a[r] + b[r])
    }
    #[inline(always)]
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|r| a[r] - b[r])
    }
    #[inline(always)]
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|r| a[r] * b[r])
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
    fn load_bytes(self, from: &[u8]) -> Self::Bytes {
        std::array::from_fn(|i| from[i])
    }
    #[inline(always)]
    fn and(self, a: Self::Bytes, mask: u8) -> Self::Bytes {
        a.map(|a| a & mask)
    }
    #[inline(always)]
    fn shift_right<const N: u32>(self, a: Self::Bytes) -> Self::Bytes {
        pairs(a, |pair| pair >> N)
    }
    #[inline(always)]
    fn or(self, a: Self::Bytes, mask: u8) -> Self::Bytes {
        a.map(|a| a | mask)
    }
    #[inline(always)]
    fn or_bytes(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    fn shift_left<const N: u32>(self, a: Self::Bytes) -> Self::Bytes {
        pairs(a, |pair| pair << N)
    }
    #[inline(always)]
    fn add_where(self, a: Self::Bytes, bits: &[u8], by: u8) -> Self::Bytes {
        std::array::from_fn(|i| if bits[i / 8] >> (i % 8) & 1 == 1 { a[i].wrapping_add(by) } else { a[i] })
    }
    #[inline(always)]
    fn look_up(self, a: Self::Bytes, table: &[u8; 16]) -> Self::Bytes {
        a.map(|a| table[usize::from(a & 15)])
    }
    #[inline(always)]
    fn look_up_words(self, nibbles: &[u8], table: &WordTable) -> Self::Words {
        std::array::from_fn(|r| {
            let row = u32::from_le_bytes(std::array::from_fn(|i| nibbles[4 * r + i]));
            let nibble = |column: usize| row >> (4 * (column / 2 + column % 2 * PAIRS)) & 15;
            std::array::from_fn(|column| table.words()[nibble(column) as usize])
        })
    }
    #[inline(always)]
    fn ready_nibbles<const P: usize>(self, w: [Self::Bytes; FOURS]) -> Self::Quants {
        w
    }
    #[inline(always)]
    fn ready_fives(self, w: [Self::Bytes; FOURS]) -> Self::Quants {
        w
    }
    #[inline(always)]
    fn ready_bytes(self, w: [Self::Bytes; FOURS]) -> Self::Quants {
        w
    }
    #[inline(always)]
    fn ready_halves(self, w: [Self::Bytes; FOURS], _: u32) -> Self::Quants {
        w
    }
    #[inline(always)]
    fn dot_nibbles<const P: usize, const S: usize>(
        self,
        w: &[Self::Quants; S],
        x: &PanelBlock,
        first: usize,
    ) -> [[Self::Int; P]; S] {
        self.dot_all(w, x, first, i32::from)
    }
    #[inline(always)]
    fn dot_fives<const P: usize, const S: usize>(
        self,
        w: &[Self::Quants; S],
        x: &PanelBlock,
        first: usize,
    ) -> [[Self::Int; P]; S] {
        let value = |w: u8| i32::from(w as i8);
        self.dot_all(w, x, first, value)
    }
    #[inline(always)]
    fn dot_bytes<const P: usize, const S: usize>(
        self,
        w: &[Self::Quants; S],
        x: &PanelBlock,
        first: usize,
    ) -> [[Self::Int; P]; S] {
        let value = |w: u8| i32::from(w) - 128;
        self.dot_all(w, x, first, value)
    }
    #[inline(always)]
    fn dot_half<const P: usize, const S: usize>(
        self,
        half: usize,
        w: &[Self::Quants; S],
        _: u32,
        centred: Option<&Halves>,
        x: &PanelBlock,
        first: usize,
    ) -> [[Self::Int; P]; S] {
        let value = |w: u8| i32::from(w) - if centred.is_some() { 128 } else { 0 };
        w.each_ref().map(|w| {
            std::array::from_fn(|i| {
                let x = x.quants[first + i].each_ref().map(|part| &part[BLOCK / 2 * half..][..BLOCK / 2]);
                self.dot(&w[FOURS / 2 * half..][..FOURS / 2], x, value)
            })
        })
    }
    #[inline(always)]
    fn dot_words(self, w: &[Self::Words; EIGHTS], x: &RowWords) -> Self::Float {
        let x = x.as_chunks::<{ 2 * PAIRS }>().0;
        std::array::from_fn(|r| {
            let of_eight = |eight: usize| {
                let pairs = w[eight][r].iter().zip(&x[eight]);
                pairs.map(|(w, x)| i32::from(*w) * i32::from(*x)).sum::<i32>() as f32
            };
            (of_eight(0) + of_eight(1)) + (of_eight(2) + of_eight(3))
        })
    }
}

/// Each two bytes as one number.
#[inline(always)]
fn pairs(a: [u8; 4 * TILE_ROWS], f: impl Fn(u16) -> u16) -> [u8; 4 * TILE_ROWS] {
    let mut out = a;
    for pair in out.as_chunks_mut::<2>().0 {
        *pair = f(u16::from_le_bytes(*pair)).to_le_bytes();
    }
    out
}
