//! Q3_K: 256 values of `32 bytes of third bits, 64 bytes of two bits, 12 bytes of scales, d`: d * (scale - 32) * (q - 4), a
//! scale of six bits for each 16 values. Of each 128 values, byte i of the two bits has values i, 32 + i, 64 + i, 96 + i;
//! bit b of byte i of the third bits is that of value `32 b + i`. In a tile the 16 rows' d, their scales (less 32) of
//! each 16 columns, the two bits of each 32 columns, then their third bits.

use candle_core::quantized::GgmlDType;

use super::layout::{self, BITS, TWOS};
use super::q2_k::{put_twos, twos};
use super::{BLOCK, BlockFormat, FOURS, Halved, TILE_ROWS, half_at};
use crate::cpu::lanes::MicroKernel;
use crate::cpu::products::TwoScales;

/// The format.
pub struct Q3_K;

/// Blocks of 32 values.
const PARTS: usize = 8;

/// Scales of a block.
const COUNT: usize = 16;

/// Where a block's two bits begin.
const BLOCK_LOW: usize = BLOCK;

/// Where its scales begin.
const BLOCK_SCALES: usize = BLOCK_LOW + 64;

/// Where its d is.
const BLOCK_D: usize = BLOCK_SCALES + 12;

/// Where a tile's scales begin.
const SCALES: usize = 2 * TILE_ROWS;

/// Where its quants begin: at a line of memory.
const AT: usize = (SCALES + COUNT * TILE_ROWS).next_multiple_of(64);

/// Bytes of 32 columns of a tile: two bits, then third bits.
const PART: usize = TWOS + BITS;

/// What quants are more than they stand for.
const OFFSET: f32 = 4.0;

/// The scales: four bits in the first eight bytes, low ones first, and two in the last four.
fn unpacked(bytes: &[u8]) -> [i8; COUNT] {
    std::array::from_fn(|i| {
        let low = bytes[i % 8] >> (i / 8 * 4) & 15;
        let high = bytes[8 + i % 4] >> (i / 4 * 2) & 3;
        (low | high << 4) as i8 - 32
    })
}

fn packed(scales: &[i8; COUNT]) -> [u8; 12] {
    let mut bytes = [0; 12];
    for (i, scale) in scales.iter().enumerate() {
        let scale = (scale + 32) as u8;
        bytes[i % 8] |= (scale & 15) << (i / 8 * 4);
        bytes[8 + i % 4] |= (scale >> 4) << (i / 4 * 2);
    }
    bytes
}

fn high(block: &[u8], b: usize) -> [u8; BLOCK] {
    std::array::from_fn(|i| block[i] >> b & 1)
}

impl BlockFormat for Q3_K {
    const NAME: &'static str = "Q3_K";
    const NUMBER: u32 = 11;
    const VALUES: usize = 256;
    const BYTES: usize = BLOCK_D + 2;
    const TILE_BYTES: usize = AT + PARTS * PART;
    const HALVES: &'static [usize] = &[BLOCK_D];
    const CANDLE: Option<GgmlDType> = Some(GgmlDType::Q3K);
    type Kernel = TwoScales;

    fn pack(block: &[u8], r: usize, tile: &mut [u8]) {
        layout::put_half(tile, r, &block[BLOCK_D..][..2]);
        for (i, scale) in unpacked(&block[BLOCK_SCALES..]).into_iter().enumerate() {
            tile[SCALES + TILE_ROWS * i + r] = scale as u8;
        }
        for (b, part) in tile[AT..].chunks_exact_mut(PART).enumerate() {
            let (low_part, high_part) = part.split_at_mut(TWOS);
            layout::put_twos(low_part, r, &twos(&block[BLOCK_LOW..], b));
            layout::put_bits(high_part, r, &high(block, b));
        }
    }

    fn unpack(tile: &[u8], r: usize, block: &mut [u8]) {
        block.fill(0);
        layout::get_half(tile, r, &mut block[BLOCK_D..][..2]);
        let scales = std::array::from_fn(|i| tile[SCALES + TILE_ROWS * i + r] as i8);
        block[BLOCK_SCALES..BLOCK_D].copy_from_slice(&packed(&scales));
        for (b, part) in tile[AT..].chunks_exact(PART).enumerate() {
            put_twos(&mut block[BLOCK_LOW..], b, &layout::get_twos(part, r));
            for (byte, bit) in block.iter_mut().zip(layout::get_bits(&part[TWOS..], r)) {
                *byte |= bit << b;
            }
        }
    }

    fn dequantize(block: &[u8], out: &mut [f32]) {
        let (d, scales) = (half_at(block, BLOCK_D), unpacked(&block[BLOCK_SCALES..]));
        for (b, out) in out.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            let scales = [0, 1].map(|half| d * f32::from(scales[2 * b + half]));
            let (low, high) = (twos(&block[BLOCK_LOW..], b), high(block, b));
            for (i, x) in out.iter_mut().enumerate() {
                *x = scales[i / 16] * (f32::from(low[i] | high[i] << 2) - OFFSET);
            }
        }
    }
}

impl Halved for Q3_K {
    const SHIFT: u32 = 5;

    #[inline(always)]
    fn quants<L: MicroKernel>(l: L, tile: &[u8], b: usize, at: usize) -> [L::Bytes; FOURS] {
        let part = &tile[AT + PART * b..];
        layout::threes(l, part, &part[TWOS..], at)
    }

    #[inline(always)]
    fn scales<L: MicroKernel>(l: L, tile: &[u8], b: usize, at: usize) -> ([L::Float; 2], Option<[L::Float; 2]>) {
        let d = l.scale(l.load_f16(&tile[2 * at..]), 1.0 / 32.0);
        let scales = &tile[SCALES + 2 * TILE_ROWS * b + at..];
        ([l.mul(d, l.load_i8(scales)), l.mul(d, l.load_i8(&scales[TILE_ROWS..]))], None)
    }
}
