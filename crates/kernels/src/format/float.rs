//! What the formats of floats have alike: a block is the values themselves, and a tile has the 16 rows' values of each
//! column.

use candle_core::quantized::GgmlDType;

use super::{BLOCK, BlockFormat, TILE_ROWS};
use crate::cpu::lanes::MicroKernel;
use crate::cpu::products::Floats;

/// A format of floats.
pub(crate) trait Float: Sized {
    /// As of [`BlockFormat`].
    const NAME: &'static str;
    /// As of [`BlockFormat`].
    const NUMBER: u32;
    /// As of [`BlockFormat`].
    const CANDLE: GgmlDType;
    /// Bytes of a value.
    const SIZE: usize;
    /// What is kept of the last byte of a random value, and what is set, for a small number.
    const TAME: [u8; 2];

    /// The value of some bytes.
    fn value(bytes: &[u8]) -> f32;

    /// The values of `L::ROWS` rows, side by side.
    fn load<L: MicroKernel>(l: L, bytes: &[u8]) -> L::Float;

    /// The values of column `c` of a tile, of the rows from `at` on.
    #[inline(always)]
    fn column<L: MicroKernel>(l: L, tile: &[u8], c: usize, at: usize) -> L::Float {
        Self::load(l, &tile[Self::SIZE * (TILE_ROWS * c + at)..])
    }
}

impl<F: Float> BlockFormat for F {
    const NAME: &'static str = F::NAME;
    const NUMBER: u32 = F::NUMBER;
    const VALUES: usize = BLOCK;
    const FILE_VALUES: usize = 1;
    const BYTES: usize = F::SIZE * BLOCK;
    const TILE_BYTES: usize = F::SIZE * TILE_ROWS * BLOCK;
    const HALVES: &'static [usize] = &[];
    const CANDLE: Option<GgmlDType> = Some(F::CANDLE);
    type Kernel = Floats;

    fn pack(block: &[u8], r: usize, tile: &mut [u8]) {
        for (value, column) in block.chunks_exact(F::SIZE).zip(tile.chunks_exact_mut(F::SIZE * TILE_ROWS)) {
            column[F::SIZE * r..][..F::SIZE].copy_from_slice(value);
        }
    }

    fn unpack(tile: &[u8], r: usize, block: &mut [u8]) {
        for (value, column) in block.chunks_exact_mut(F::SIZE).zip(tile.chunks_exact(F::SIZE * TILE_ROWS)) {
            value.copy_from_slice(&column[F::SIZE * r..][..F::SIZE]);
        }
    }

    fn dequantize(block: &[u8], out: &mut [f32]) {
        block.chunks_exact(F::SIZE).zip(out).for_each(|(bytes, x)| *x = F::value(bytes));
    }

    fn is_sound(block: &[u8]) -> bool {
        block.chunks_exact(F::SIZE).all(|bytes| F::value(bytes).is_finite())
    }

    fn tame(block: &mut [u8]) {
        let [kept, set] = F::TAME;
        block.chunks_exact_mut(F::SIZE).for_each(|bytes| bytes[F::SIZE - 1] = bytes[F::SIZE - 1] & kept | set);
    }
}
