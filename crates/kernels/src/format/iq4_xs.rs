//! IQ4_XS: 256 values of `d, 16 bits, 4 bytes, 128 bytes of nibbles`: d * (scale - 32) times the entry of IQ4_NL's table that
//! the nibble names. A scale for each 32 values: four bits in the bytes, two in the 16 bits. In a tile the 16 rows' d,
//! their scales (less 32) of each 32 columns, then the nibbles of each 32.

use super::iq4_nl::{TABLE, UNSIGNED};
use super::layout::{self, NIBBLES};
use super::{BLOCK, BlockFormat, FOURS, Quants, Scale, Scaled, TILE_ROWS, half_at};
use crate::cpu::lanes::MicroKernel;
use crate::cpu::products::OneScale;

/// The format.
pub struct IQ4_XS;

/// Blocks of 32 values.
const PARTS: usize = 8;

/// Where a block's nibbles begin.
const BLOCK_AT: usize = 8;

/// Where a tile's scales begin.
const SCALES: usize = 2 * TILE_ROWS;

/// Where its nibbles begin: at a line of memory.
const AT: usize = (SCALES + PARTS * TILE_ROWS).next_multiple_of(64);

fn unpacked(block: &[u8]) -> [i8; PARTS] {
    let high = u16::from_le_bytes([block[2], block[3]]);
    std::array::from_fn(|j| {
        let low = block[4 + j / 2] >> (j % 2 * 4) & 15;
        (low | ((high >> (2 * j) & 3) as u8) << 4) as i8 - 32
    })
}

fn packed(scales: &[i8; PARTS]) -> [u8; 6] {
    let scales = scales.map(|scale| (scale + 32) as u8);
    let high = scales.iter().enumerate().fold(0, |high, (j, scale)| high | u16::from(scale >> 4) << (2 * j));
    let [a, b] = high.to_le_bytes();
    let [c, d, e, f] = std::array::from_fn(|i| scales[2 * i] & 15 | scales[2 * i + 1] << 4);
    [a, b, c, d, e, f]
}

impl BlockFormat for IQ4_XS {
    const NAME: &'static str = "IQ4_XS";
    const NUMBER: u32 = 23;
    const VALUES: usize = 256;
    const BYTES: usize = BLOCK_AT + 128;
    const TILE_BYTES: usize = AT + PARTS * NIBBLES;
    const HALVES: &'static [usize] = &[0];
    type Kernel = OneScale;

    fn pack(block: &[u8], r: usize, tile: &mut [u8]) {
        layout::put_half(tile, r, &block[..2]);
        for (j, scale) in unpacked(block).into_iter().enumerate() {
            tile[SCALES + TILE_ROWS * j + r] = scale as u8;
        }
        let blocks = block[BLOCK_AT..].chunks_exact(BLOCK / 2);
        for (block, tile) in blocks.zip(tile[AT..].chunks_exact_mut(NIBBLES)) {
            layout::put_fours(tile, r, block);
        }
    }

    fn unpack(tile: &[u8], r: usize, block: &mut [u8]) {
        layout::get_half(tile, r, &mut block[..2]);
        let scales = std::array::from_fn(|j| tile[SCALES + TILE_ROWS * j + r] as i8);
        block[2..BLOCK_AT].copy_from_slice(&packed(&scales));
        let blocks = block[BLOCK_AT..].chunks_exact_mut(BLOCK / 2);
        for (block, tile) in blocks.zip(tile[AT..].chunks_exact(NIBBLES)) {
            layout::get_fours(tile, r, block);
        }
    }

    fn dequantize(block: &[u8], out: &mut [f32]) {
        let d = half_at(block, 0);
        let blocks = block[BLOCK_AT..].chunks_exact(BLOCK / 2).zip(out.chunks_exact_mut(BLOCK));
        for ((block, out), scale) in blocks.zip(unpacked(block)) {
            let d = d * f32::from(scale);
            layout::each_nibble(block, out, |q| d * f32::from(TABLE[usize::from(q)]));
        }
    }
}

impl Scaled for IQ4_XS {
    const QUANTS: Quants = Quants::Bytes;

    #[inline(always)]
    fn quants<L: MicroKernel>(l: L, tile: &[u8], b: usize, at: usize) -> [L::Bytes; FOURS] {
        layout::looked_up(l, &tile[AT + NIBBLES * b..], &UNSIGNED, at)
    }

    #[inline(always)]
    fn scale<L: MicroKernel>(l: L, tile: &[u8], b: usize, at: usize) -> Scale<L> {
        let d = l.mul(l.load_f16(&tile[2 * at..]), l.load_i8(&tile[SCALES + TILE_ROWS * b + at..]));
        Scale { d, m: None }
    }
}
