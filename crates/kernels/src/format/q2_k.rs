//! Q2_K: 256 values of `16 bytes of scales, 64 bytes of two bits, d, dmin`: d * scale * q - dmin * minimum; of each 16 values
//! a byte has the scale and, high, the minimum. Of each 128 values, byte i of the two bits has values i, 32 + i, 64 + i,
//! 96 + i. In a tile the 16 rows' d, their -dmin, their bytes of scales of each 16 columns, then the two bits of each 32.

use candle_core::quantized::GgmlDType;

use super::layout::{self, TWOS};
use super::{BLOCK, BlockFormat, FOURS, Halved, TILE_ROWS, half_at};
use crate::cpu::lanes::MicroKernel;
use crate::cpu::products::TwoScales;

/// The format.
pub struct Q2_K;

/// Blocks of 32 values.
const PARTS: usize = 8;

/// Bytes of scales of a block.
const COUNT: usize = 16;

/// Where a block's d and dmin are.
const BLOCK_D: usize = COUNT + 64;

/// Where a tile's -dmin begin.
const DMIN: usize = 2 * TILE_ROWS;

/// Where its scales begin.
const SCALES: usize = 2 * DMIN;

/// Where its quants begin.
const AT: usize = SCALES + COUNT * TILE_ROWS;

/// A half-precision number's sign is in its second byte.
const SIGN: u8 = 0x80;

/// The two bits of values `32 b..32 b + 32`, of which 128 share 32 bytes.
pub(super) fn twos(bytes: &[u8], b: usize) -> [u8; BLOCK] {
    let (bytes, shift) = (&bytes[b / 4 * BLOCK..][..BLOCK], b % 4 * 2);
    std::array::from_fn(|i| bytes[i] >> shift & 3)
}

/// Puts them there, where zeros are.
pub(super) fn put_twos(bytes: &mut [u8], b: usize, quants: &[u8; BLOCK]) {
    for (byte, q) in bytes[b / 4 * BLOCK..][..BLOCK].iter_mut().zip(quants) {
        *byte |= q << (b % 4 * 2);
    }
}

impl BlockFormat for Q2_K {
    const NAME: &'static str = "Q2_K";
    const NUMBER: u32 = 10;
    const VALUES: usize = 256;
    const BYTES: usize = BLOCK_D + 4;
    const TILE_BYTES: usize = AT + PARTS * TWOS;
    const HALVES: &'static [usize] = &[BLOCK_D, BLOCK_D + 2];
    const CANDLE: Option<GgmlDType> = Some(GgmlDType::Q2K);
    type Kernel = TwoScales;

    fn pack(block: &[u8], r: usize, tile: &mut [u8]) {
        layout::put_half(tile, r, &block[BLOCK_D..][..2]);
        layout::put_half(&mut tile[DMIN..], r, &[block[BLOCK_D + 2], block[BLOCK_D + 3] ^ SIGN]);
        for (i, scale) in block[..COUNT].iter().enumerate() {
            tile[SCALES + TILE_ROWS * i + r] = *scale;
        }
        for (b, tile) in tile[AT..].chunks_exact_mut(TWOS).enumerate() {
            layout::put_twos(tile, r, &twos(&block[COUNT..], b));
        }
    }

    fn unpack(tile: &[u8], r: usize, block: &mut [u8]) {
        block.fill(0);
        layout::get_half(tile, r, &mut block[BLOCK_D..][..2]);
        layout::get_half(&tile[DMIN..], r, &mut block[BLOCK_D + 2..][..2]);
        block[BLOCK_D + 3] ^= SIGN;
        for (i, scale) in block[..COUNT].iter_mut().enumerate() {
            *scale = tile[SCALES + TILE_ROWS * i + r];
        }
        for (b, tile) in tile[AT..].chunks_exact(TWOS).enumerate() {
            put_twos(&mut block[COUNT..], b, &layout::get_twos(tile, r));
        }
    }

    fn dequantize(block: &[u8], out: &mut [f32]) {
        let (d, dmin) = (half_at(block, BLOCK_D), half_at(block, BLOCK_D + 2));
        for (b, out) in out.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            let scales = [0, 1].map(|half| {
                let byte = block[2 * b + half];
                (d * f32::from(byte & 15), dmin * f32::from(byte >> 4))
            });
            for (i, (x, q)) in out.iter_mut().zip(twos(&block[COUNT..], b)).enumerate() {
                let (d, m) = scales[i / 16];
                *x = d * f32::from(q) - m;
            }
        }
    }
}

impl Halved for Q2_K {
    const SHIFT: u32 = 6;

    #[inline(always)]
    fn quants<L: MicroKernel>(l: L, tile: &[u8], b: usize, at: usize) -> [L::Bytes; FOURS] {
        layout::twos(l, &tile[AT + TWOS * b..], at)
    }

    #[inline(always)]
    fn scales<L: MicroKernel>(l: L, tile: &[u8], b: usize, at: usize) -> ([L::Float; 2], Option<[L::Float; 2]>) {
        let (d, dmin) = (l.scale(l.load_f16(&tile[2 * at..]), 1.0 / 64.0), l.load_f16(&tile[DMIN + 2 * at..]));
        let first = &tile[SCALES + 2 * TILE_ROWS * b + at..];
        let second = &first[TILE_ROWS..];
        let scales = [l.mul(d, l.load_u8::<0>(first, 15)), l.mul(d, l.load_u8::<0>(second, 15))];
        (scales, Some([l.mul(dmin, l.load_u8::<4>(first, 15)), l.mul(dmin, l.load_u8::<4>(second, 15))]))
    }
}
