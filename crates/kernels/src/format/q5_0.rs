//! Q5_0: 32 values of `d, 32 fifth bits, 16 bytes of nibbles`: d * (q - 16). In a tile the 16 rows' d, their nibbles, then
//! their fifth bits.

use candle_core::quantized::GgmlDType;

use super::layout::{self, BITS, NIBBLES};
use super::search;
use super::{BLOCK, BlockFormat, FOURS, Quantizer, Quants, Scale, Scaled, TILE_ROWS, half_at};
use crate::cpu::lanes::MicroKernel;
use crate::cpu::products::OneScale;

/// The format.
pub struct Q5_0;

/// Where a tile's nibbles begin.
const AT: usize = 2 * TILE_ROWS;

/// Where its fifth bits begin.
const HIGH: usize = AT + NIBBLES;

/// The quants, from `at` on in a block: 32 bits, then 16 bytes of nibbles.
pub(super) fn quants(block: &[u8], at: usize) -> [u8; BLOCK] {
    let high = u32::from_le_bytes(std::array::from_fn(|i| block[at + i]));
    let low = layout::of_nibbles(&std::array::from_fn(|i| block[at + 4 + i]));
    std::array::from_fn(|i| low[i] | ((high >> i & 1) as u8) << 4)
}

/// Puts them there.
pub(super) fn put_quants(block: &mut [u8], at: usize, low: &[u8; BLOCK], high: &[u8; BLOCK]) {
    let bits = high.iter().enumerate().fold(0, |bits, (i, bit)| bits | u32::from(*bit) << i);
    block[at..at + 4].copy_from_slice(&bits.to_le_bytes());
    block[at + 4..].copy_from_slice(&layout::to_nibbles(low));
}

fn quantize(x: &[f32], block: &mut [u8]) {
    let d = search::half(search::scale(x, 16.0));
    block[..2].copy_from_slice(&d.to_le_bytes());
    let quants = search::quants(x, (d.to_f32(), -16.0 * d.to_f32()), 31);
    put_quants(block, 2, &quants, &quants.map(|q| q >> 4));
}

impl BlockFormat for Q5_0 {
    const NAME: &'static str = "Q5_0";
    const NUMBER: u32 = 6;
    const VALUES: usize = 32;
    const BYTES: usize = 22;
    const TILE_BYTES: usize = HIGH + BITS;
    const HALVES: &'static [usize] = &[0];
    const CANDLE: Option<GgmlDType> = Some(GgmlDType::Q5_0);
    const QUANTIZE: Option<Quantizer> = Some(quantize);
    type Kernel = OneScale;

    fn pack(block: &[u8], r: usize, tile: &mut [u8]) {
        layout::put_half(tile, r, &block[..2]);
        let quants = quants(block, 2);
        layout::put_nibbles(&mut tile[AT..], r, &quants);
        layout::put_bits(&mut tile[HIGH..], r, &quants.map(|q| q >> 4));
    }

    fn unpack(tile: &[u8], r: usize, block: &mut [u8]) {
        layout::get_half(tile, r, &mut block[..2]);
        put_quants(block, 2, &layout::get_nibbles(&tile[AT..], r), &layout::get_bits(&tile[HIGH..], r));
    }

    fn dequantize(block: &[u8], out: &mut [f32]) {
        let d = half_at(block, 0);
        for (x, q) in out.iter_mut().zip(quants(block, 2)) {
            *x = d * (f32::from(q) - 16.0);
        }
    }
}

impl Scaled for Q5_0 {
    const QUANTS: Quants = Quants::Fives;

    #[inline(always)]
    fn quants<L: MicroKernel>(l: L, tile: &[u8], _: usize, at: usize) -> [L::Bytes; FOURS] {
        layout::fives(l, &tile[AT..], &tile[HIGH..], at)
    }

    #[inline(always)]
    fn scale<L: MicroKernel>(l: L, tile: &[u8], _: usize, at: usize) -> Scale<L> {
        Scale { d: l.load_f16(&tile[2 * at..]), m: None }
    }
}
