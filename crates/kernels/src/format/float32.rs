//! F32, float32: the values themselves. In a tile the 16 rows' values of each column.

use candle_core::quantized::GgmlDType;

use super::{BLOCK, BlockFormat, Float, TILE_ROWS};
use crate::cpu::lanes::MicroKernel;
use crate::cpu::products::Floats;

/// The format.
pub struct F32;

/// Bytes of a value.
const SIZE: usize = 4;

/// Bytes of a column of a tile.
const COLUMN: usize = SIZE * TILE_ROWS;

fn value(bytes: &[u8; SIZE]) -> f32 {
    f32::from_le_bytes(*bytes)
}

impl BlockFormat for F32 {
    const NAME: &'static str = "F32";
    const NUMBER: u32 = 0;
    const VALUES: usize = BLOCK;
    const FILE_VALUES: usize = 1;
    const BYTES: usize = SIZE * BLOCK;
    const TILE_BYTES: usize = COLUMN * BLOCK;
    const HALVES: &'static [usize] = &[];
    const CANDLE: Option<GgmlDType> = Some(GgmlDType::F32);
    type Kernel = Floats;

    fn pack(block: &[u8], r: usize, tile: &mut [u8]) {
        for (value, column) in block.as_chunks::<SIZE>().0.iter().zip(tile.chunks_exact_mut(COLUMN)) {
            column[SIZE * r..][..SIZE].copy_from_slice(value);
        }
    }

    fn unpack(tile: &[u8], r: usize, block: &mut [u8]) {
        for (value, column) in block.as_chunks_mut::<SIZE>().0.iter_mut().zip(tile.chunks_exact(COLUMN)) {
            value.copy_from_slice(&column[SIZE * r..][..SIZE]);
        }
    }

    fn dequantize(block: &[u8], out: &mut [f32]) {
        block.as_chunks().0.iter().zip(out).for_each(|(bytes, x)| *x = value(bytes));
    }

    fn is_sound(block: &[u8]) -> bool {
        block.as_chunks().0.iter().all(|bytes| value(bytes).is_finite())
    }

    fn tame(block: &mut [u8]) {
        for bytes in block.as_chunks_mut::<SIZE>().0 {
            let last = &mut bytes[SIZE - 1];
            *last = *last & 0x80 | 0x3D;
        }
    }
}

impl Float for F32 {
    #[inline(always)]
    fn column<L: MicroKernel>(l: L, tile: &[u8], c: usize, at: usize) -> L::Float {
        l.load_f32(&tile[COLUMN * c + SIZE * at..])
    }
}
