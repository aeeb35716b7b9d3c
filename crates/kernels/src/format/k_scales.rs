//! What Q4_K and Q5_K have in common: 256 values of `d, dmin, 12 bytes, ...`, where the 12 bytes are of each 32 values a
//! scale and a minimum of six bits; their tiles begin with the rows' d and -dmin, then, of each 32 columns, the rows'
//! scales and then their minima, a byte each.

use super::layout;
use super::{BLOCK, Scale, TILE_ROWS, half_at};
use crate::cpu::lanes::MicroKernel;

/// Blocks of 32 values.
pub const PARTS: usize = 8;

/// Where a block's scales begin.
const SCALES: usize = 4;

/// Where what follows them begins.
pub const AFTER: usize = SCALES + 12;

/// Where the -dmin of a tile begin.
const DMIN: usize = 2 * TILE_ROWS;

/// Where the scales of a tile begin.
const TILE_SCALES: usize = 2 * DMIN;

/// Where the minima of a tile begin.
const TILE_MINIMA: usize = TILE_SCALES + PARTS * TILE_ROWS;

/// Where the quants of a tile begin.
pub const QUANTS: usize = TILE_MINIMA + PARTS * TILE_ROWS;

/// A half-precision number's sign is in its second byte.
const SIGN: u8 = 0x80;

/// The scales and the minima. Of the last four, the low four bits lie together in the last four bytes, and the high two
/// above the first four's.
fn unpacked(bytes: &[u8]) -> [[u8; PARTS]; 2] {
    let own = |from: usize, last: u32| {
        std::array::from_fn(|j| match j {
            0..4 => bytes[from + j] & 63,
            _ => bytes[4 + j] >> last & 15 | bytes[from + j - 4] >> 6 << 4,
        })
    };
    [own(0, 0), own(4, 4)]
}

fn packed([scales, minima]: &[[u8; PARTS]; 2]) -> [u8; 12] {
    std::array::from_fn(|i| match i {
        0..4 => scales[i] | scales[i + 4] >> 4 << 6,
        4..8 => minima[i - 4] | minima[i] >> 4 << 6,
        _ => scales[i - 4] & 15 | minima[i - 4] << 4,
    })
}

/// Puts a block's scales into a tile.
pub fn pack(block: &[u8], r: usize, tile: &mut [u8]) {
    layout::put_half(tile, r, &block[..2]);
    layout::put_half(&mut tile[DMIN..], r, &[block[2], block[3] ^ SIGN]);
    let [scales, minima] = unpacked(&block[SCALES..AFTER]);
    for j in 0..PARTS {
        tile[TILE_SCALES + TILE_ROWS * j + r] = scales[j];
        tile[TILE_MINIMA + TILE_ROWS * j + r] = minima[j];
    }
}

/// Takes them out again.
pub fn unpack(tile: &[u8], r: usize, block: &mut [u8]) {
    layout::get_half(tile, r, &mut block[..2]);
    layout::get_half(&tile[DMIN..], r, &mut block[2..4]);
    block[3] ^= SIGN;
    let own = [TILE_SCALES, TILE_MINIMA].map(|at| std::array::from_fn(|j| tile[at + TILE_ROWS * j + r]));
    block[SCALES..AFTER].copy_from_slice(&packed(&own));
}

/// d * scale and dmin * minimum of each 32 values; both are exact.
pub fn scales(block: &[u8]) -> [(f32, f32); PARTS] {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let [scales, minima] = unpacked(&block[SCALES..AFTER]);
    std::array::from_fn(|j| (d * f32::from(scales[j]), dmin * f32::from(minima[j])))
}

/// The values of a block, of which `quants(b)` are those of values `32 b..32 b + 32`.
pub fn dequantize(block: &[u8], out: &mut [f32], quants: impl Fn(usize) -> [u8; BLOCK]) {
    for (b, (out, (d, m))) in out.as_chunks_mut::<BLOCK>().0.iter_mut().zip(scales(block)).enumerate() {
        for (x, q) in out.iter_mut().zip(quants(b)) {
            *x = d * f32::from(q) - m;
        }
    }
}

/// What columns `32 b..32 b + 32` of a tile are multiplied by.
#[inline(always)]
pub fn scale<L: MicroKernel>(l: L, tile: &[u8], b: usize, at: usize) -> Scale<L> {
    let scale = l.load_u8::<0>(&tile[TILE_SCALES + TILE_ROWS * b + at..], 0xFF);
    let minimum = l.load_u8::<0>(&tile[TILE_MINIMA + TILE_ROWS * b + at..], 0xFF);
    let d = l.mul(l.load_f16(&tile[2 * at..]), scale);
    Scale { d, m: Some(l.mul(l.load_f16(&tile[DMIN + 2 * at..]), minimum)) }
}
