//! Blocks of quantised weights times rows of quantised activations in the registers of a kind of machine: the integers'
//! products are summed exactly, so that every kind gives the same bits, by whatever way it comes to them.

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod plain;

use super::quantize::{Halves, PANEL, PanelBlock, RowWords, Shift};
use crate::format::{FOURS, TILE_ROWS};

#[cfg(target_arch = "x86_64")]
pub(super) use avx2::Avx2Maddubs;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512Vnni;
pub(super) use plain::Plain;

/// Some rows of a tile at a time, one a lane.
pub(crate) trait MicroKernel: Copy {
    /// Lanes; they divide [`crate::format::TILE_ROWS`].
    const ROWS: usize;
    /// Rows of activations that share the unpacking of a block.
    const GROUP: usize;
    /// Strips that share what is read of a panel of activations: 1 or 2.
    const STRIPS: usize;
    /// What is added to the quants of columns 16 to 31 for [`MicroKernel::ready_fives`].
    const SECOND: u8;
    /// Four columns' quants, a byte each.
    type Bytes: Copy;
    /// A block's quants, ready for their products.
    type Quants: Copy;
    /// Eight columns' integers of two bytes.
    type Words: Copy;
    type Int: Copy;
    type Float: Copy;

    fn zero(self) -> Self::Float;
    /// The values of `ROWS` half-precision numbers.
    fn load_f16(self, bytes: &[u8]) -> Self::Float;
    /// The values of `ROWS` bfloat16 numbers.
    fn load_bf16(self, bytes: &[u8]) -> Self::Float;
    /// The values of `ROWS` float32 numbers.
    fn load_f32(self, bytes: &[u8]) -> Self::Float;
    /// The values of `ROWS` bytes without sign, each shifted right by N and masked.
    fn load_u8<const N: u32>(self, bytes: &[u8], mask: u8) -> Self::Float;
    /// The values of `ROWS` bytes with a sign.
    fn load_i8(self, bytes: &[u8]) -> Self::Float;
    /// The table's entries for `ROWS` bytes.
    fn look_up_floats(self, bytes: &[u8], table: &[f32; 256]) -> Self::Float;
    fn scale(self, a: Self::Float, by: f32) -> Self::Float;
    /// a * b + c, rounded once.
    fn mul_add(self, a: Self::Float, b: f32, c: Self::Float) -> Self::Float;
    /// (float(t) << shift) * d + c, the product and the sum rounded once together. The shift is added to the exponent,
    /// which costs less than to shift t; the least of numbers that makes of a zero is lost in any sum but that of zeros.
    fn add_product(self, t: Self::Int, shift: Shift, d: Self::Float, c: Self::Float) -> Self::Float;
    /// (a << shift) * d + c, as [`MicroKernel::add_product`].
    fn add_shifted(self, a: Self::Float, shift: Shift, d: Self::Float, c: Self::Float) -> Self::Float;
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn sub(self, a: Self::Float, b: Self::Float) -> Self::Float;
    fn mul(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// `ROWS` floats.
    fn load(self, from: &[f32]) -> Self::Float;
    fn store(self, a: Self::Float, out: &mut [f32]);

    /// The outputs that a row's sums in its unit are. Where all products of a row are zeros, what
    /// [`MicroKernel::add_product`] makes of them is left out.
    #[inline(always)]
    fn finish(self, sums: Self::Float, unit: f32) -> Self::Float {
        const MORE: [f32; TILE_ROWS] = [1.0 / (1u128 << 70) as f32; TILE_ROWS];
        let more = self.load(&MORE);
        self.scale(self.sub(self.add(sums, more), more), unit)
    }

    /// `ROWS * 4` bytes.
    fn load_bytes(self, from: &[u8]) -> Self::Bytes;
    /// Each byte's bits that the mask has.
    fn and(self, a: Self::Bytes, mask: u8) -> Self::Bytes;
    /// Each byte's bits and those of the mask.
    fn or(self, a: Self::Bytes, mask: u8) -> Self::Bytes;
    fn or_bytes(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// Pairs of bytes shifted as one number: what comes from a neighbour is to be masked.
    fn shift_right<const N: u32>(self, a: Self::Bytes) -> Self::Bytes;
    /// As [`MicroKernel::shift_right`].
    fn shift_left<const N: u32>(self, a: Self::Bytes) -> Self::Bytes;
    /// `by` more, wrapping, where a byte's bit is set; `ROWS / 2` bytes of bits.
    fn add_where(self, a: Self::Bytes, bits: &[u8], by: u8) -> Self::Bytes;
    /// The table's entries for bytes below 16.
    fn look_up(self, a: Self::Bytes, table: &[u8; 16]) -> Self::Bytes;

    /// The table's entries for `ROWS * 8` nibbles: of a row's four bytes, nibble i is column 2 i, nibble 4 + i column
    /// 2 i + 1.
    fn look_up_words(self, nibbles: &[u8], table: &WordTable) -> Self::Words;

    /// Quants of a block from 0 to 15, made ready for products with P rows.
    fn ready_nibbles<const P: usize>(self, w: [Self::Bytes; FOURS]) -> Self::Quants;
    /// Quants with a sign, from -16 to 15; those of columns 16 to 31 with [`MicroKernel::SECOND`] added.
    fn ready_fives(self, w: [Self::Bytes; FOURS]) -> Self::Quants;
    /// Quants that are 128 more than they stand for.
    fn ready_bytes(self, w: [Self::Bytes; FOURS]) -> Self::Quants;
    /// Quants in the highest bits of their bytes, of which the lowest `shift` are zeros.
    fn ready_halves(self, w: [Self::Bytes; FOURS], shift: u32) -> Self::Quants;
    /// The exact sums of a block's 32 products, for each of S strips with P rows of a panel from `first` on.
    fn dot_nibbles<const P: usize, const S: usize>(
        self,
        w: &[Self::Quants; S],
        x: &PanelBlock,
        first: usize,
    ) -> [[Self::Int; P]; S];
    /// The same for quants from -16 to 15.
    fn dot_fives<const P: usize, const S: usize>(
        self,
        w: &[Self::Quants; S],
        x: &PanelBlock,
        first: usize,
    ) -> [[Self::Int; P]; S];
    /// The same for quants less 128.
    fn dot_bytes<const P: usize, const S: usize>(
        self,
        w: &[Self::Quants; S],
        x: &PanelBlock,
        first: usize,
    ) -> [[Self::Int; P]; S];
    /// The same for the columns of one half of the block, 0 to 15 or 16 to 31, of quants as
    /// [`MicroKernel::ready_halves`] takes them; less 128 where `centred` says what belongs to the block.
    fn dot_half<const P: usize, const S: usize>(
        self,
        half: usize,
        w: &[Self::Quants; S],
        shift: u32,
        centred: Option<&Halves>,
        x: &PanelBlock,
        first: usize,
    ) -> [[Self::Int; P]; S];
    /// The sum of a block's 32 products of integers of two bytes, for one row of activations: of each eight the exact sum
    /// as a float, s0 to s3, and of these (s0 + s1) + (s2 + s3).
    fn dot_words(self, w: &[Self::Words; EIGHTS], x: &RowWords) -> Self::Float;
}

/// A table of integers of two bytes, also as bytes for look-ups of bytes.
pub(crate) struct WordTable {
    words: [i16; 16],
    low: [u8; 16],
    high: [u8; 16],
}

impl WordTable {
    /// The table of some integers.
    pub const fn new(words: [i16; 16]) -> Self {
        let (mut low, mut high) = ([0; 16], [0; 16]);
        let mut i = 0;
        while i < 16 {
            [low[i], high[i]] = words[i].to_le_bytes();
            i += 1;
        }
        Self { words, low, high }
    }

    /// The integers.
    pub const fn words(&self) -> &[i16; 16] {
        &self.words
    }
}

/// A block's groups of eight columns.
pub(crate) const EIGHTS: usize = crate::format::BLOCK / 8;

/// Pairs of columns in eight.
const PAIRS: usize = 4;

/// Where x's bytes `4 g..4 g + 4` begin, as one integer.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn four(x: &[i8; crate::format::BLOCK], g: usize) -> i32 {
    let [a, b, c, d] = x.as_chunks::<4>().0[g];
    i32::from_le_bytes([a as u8, b as u8, c as u8, d as u8])
}

/// x's integers `2 i..2 i + 2` as one.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn pair(x: &RowWords, i: usize) -> i32 {
    let [a, b] = x.as_chunks::<2>().0[i];
    i32::from(b) << 16 | i32::from(a as u16)
}
