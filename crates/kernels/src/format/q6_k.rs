//! Q6_K: 256 values of `128 bytes of nibbles, 64 bytes of two bits, 16 int8 scales, d`: d * scale * (q - 32), a scale for
//! each 16 values. Of each 128 values, byte i of the nibbles has value i and, high, value 64 + i; byte i of the two bits
//! values i, 32 + i, 64 + i, 96 + i. In a tile the 16 rows' d, their scales of each 16 columns, the nibbles of each 32
//! columns, then their two bits.

use candle_core::quantized::GgmlDType;

use super::layout::{self, NIBBLES, TWOS};
use super::search;
use super::{BLOCK, BlockFormat, FOURS, Halved, Quantizer, TILE_ROWS, half_at};
use crate::cpu::lanes::MicroKernel;
use crate::cpu::products::TwoScales;

/// The format.
pub struct Q6_K;

/// Blocks of 32 values.
const PARTS: usize = 8;

/// Where a block's two bits begin.
const BLOCK_HIGH: usize = 128;

/// Where its scales begin.
const BLOCK_SCALES: usize = BLOCK_HIGH + 64;

/// Where its d is.
const BLOCK_D: usize = BLOCK_SCALES + 16;

/// Where a tile's scales begin.
const SCALES: usize = 2 * TILE_ROWS;

/// Where its quants begin: at a line of memory.
const AT: usize = (SCALES + 2 * PARTS * TILE_ROWS).next_multiple_of(64);

/// Bytes of 32 columns of a tile: nibbles, then two bits.
const PART: usize = NIBBLES + TWOS;

/// What quants are more than they stand for.
const OFFSET: f32 = 32.0;

/// Where the nibbles of values `32 b..32 b + 32` begin, and their shift.
fn low_place(b: usize) -> (usize, usize) {
    (b / 4 * 64 + b % 2 * BLOCK, b % 4 / 2 * 4)
}

/// As [`low_place`], of the two bits.
fn high_place(b: usize) -> (usize, usize) {
    (BLOCK_HIGH + b / 4 * BLOCK, b % 4 * 2)
}

fn quants(block: &[u8], b: usize) -> [u8; BLOCK] {
    let ((low, shift), (high, high_shift)) = (low_place(b), high_place(b));
    let (low, high) = (&block[low..][..BLOCK], &block[high..][..BLOCK]);
    std::array::from_fn(|i| low[i] >> shift & 15 | (high[i] >> high_shift & 3) << 4)
}

/// What the largest scale becomes.
const LARGEST: f32 = -128.0;

fn quantize(x: &[f32], block: &mut [u8]) {
    block.fill(0);
    let mut fits = [0.0; 2 * PARTS];
    for (fit, x) in fits.iter_mut().zip(x.chunks_exact(BLOCK / 2)) {
        *fit = search::scale(x, OFFSET);
    }
    let d = search::half(search::extreme(&fits) / LARGEST);
    block[BLOCK_D..].copy_from_slice(&d.to_le_bytes());
    let d = d.to_f32();
    for (b, x) in x.chunks_exact(BLOCK).enumerate() {
        let mut quants = [0; BLOCK];
        for (half, (x, quants)) in x.chunks_exact(16).zip(quants.chunks_exact_mut(16)).enumerate() {
            let near = ((fits[2 * b + half] / d).round() as i32).clamp(-128, 127);
            let scale = best_scale(x, d, near);
            block[BLOCK_SCALES + 2 * b + half] = scale as u8;
            let d = d * scale as f32;
            quants.copy_from_slice(&search::quants::<16>(x, (d, -OFFSET * d), 63));
        }
        put_quants(block, b, &quants);
    }
}

/// Of the scale and its neighbours that with the least error.
fn best_scale(x: &[f32], d: f32, near: i32) -> i32 {
    let error = |scale: i32| {
        let d = d * scale as f32;
        let quants: [u8; 16] = search::quants(x, (d, -OFFSET * d), 63);
        x.iter().zip(quants).map(|(x, q)| (d * (f32::from(q) - OFFSET) - x).powi(2)).sum::<f32>()
    };
    let neighbours = [near, near - 1, near + 1].into_iter().filter(|scale| (-128..=127).contains(scale));
    neighbours.min_by(|a, b| error(*a).total_cmp(&error(*b))).unwrap_or(near)
}

/// Puts quants in their places, where zeros are.
fn put_quants(block: &mut [u8], b: usize, quants: &[u8; BLOCK]) {
    let ((low, shift), (high, high_shift)) = (low_place(b), high_place(b));
    for (i, q) in quants.iter().enumerate() {
        block[low + i] |= (q & 15) << shift;
        block[high + i] |= q >> 4 << high_shift;
    }
}

impl BlockFormat for Q6_K {
    const NAME: &'static str = "Q6_K";
    const NUMBER: u32 = 14;
    const VALUES: usize = 256;
    const BYTES: usize = BLOCK_D + 2;
    const TILE_BYTES: usize = AT + PARTS * PART;
    const HALVES: &'static [usize] = &[BLOCK_D];
    const CANDLE: Option<GgmlDType> = Some(GgmlDType::Q6K);
    const QUANTIZE: Option<Quantizer> = Some(quantize);
    type Kernel = TwoScales;

    fn pack(block: &[u8], r: usize, tile: &mut [u8]) {
        layout::put_half(tile, r, &block[BLOCK_D..][..2]);
        for (i, scale) in block[BLOCK_SCALES..BLOCK_D].iter().enumerate() {
            tile[SCALES + TILE_ROWS * i + r] = *scale;
        }
        for (b, part) in tile[AT..].chunks_exact_mut(PART).enumerate() {
            let quants = quants(block, b);
            layout::put_nibbles(part, r, &quants);
            layout::put_twos(&mut part[NIBBLES..], r, &quants.map(|q| q >> 4));
        }
    }

    fn unpack(tile: &[u8], r: usize, block: &mut [u8]) {
        block.fill(0);
        layout::get_half(tile, r, &mut block[BLOCK_D..][..2]);
        for (i, scale) in block[BLOCK_SCALES..BLOCK_D].iter_mut().enumerate() {
            *scale = tile[SCALES + TILE_ROWS * i + r];
        }
        for (b, part) in tile[AT..].chunks_exact(PART).enumerate() {
            let (low, high) = (layout::get_nibbles(part, r), layout::get_twos(&part[NIBBLES..], r));
            let mut quants = low;
            quants.iter_mut().zip(high).for_each(|(q, high)| *q |= high << 4);
            put_quants(block, b, &quants);
        }
    }

    fn dequantize(block: &[u8], out: &mut [f32]) {
        let d = half_at(block, BLOCK_D);
        for (b, out) in out.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            let scales = [0, 1].map(|half| d * f32::from(block[BLOCK_SCALES + 2 * b + half] as i8));
            for (i, (x, q)) in out.iter_mut().zip(quants(block, b)).enumerate() {
                *x = scales[i / 16] * (f32::from(q) - OFFSET);
            }
        }
    }
}

impl Halved for Q6_K {
    const SHIFT: u32 = 2;

    #[inline(always)]
    fn quants<L: MicroKernel>(l: L, tile: &[u8], b: usize, at: usize) -> [L::Bytes; FOURS] {
        let part = &tile[AT + PART * b..];
        layout::sixes(l, part, &part[NIBBLES..], at)
    }

    #[inline(always)]
    fn scales<L: MicroKernel>(l: L, tile: &[u8], b: usize, at: usize) -> ([L::Float; 2], Option<[L::Float; 2]>) {
        let d = l.scale(l.load_f16(&tile[2 * at..]), 1.0 / 4.0);
        let scales = &tile[SCALES + 2 * TILE_ROWS * b + at..];
        ([l.mul(d, l.load_i8(scales)), l.mul(d, l.load_i8(&scales[TILE_ROWS..]))], None)
    }
}
