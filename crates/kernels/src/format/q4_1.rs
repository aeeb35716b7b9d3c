//! Q4_1: 32 values of `d, m, 16 bytes of nibbles`: d * q + m. In a tile the 16 rows' d, their m, then their nibbles.

use candle_core::quantized::GgmlDType;

use super::layout::{self, NIBBLES};
use super::search;
use super::{BlockFormat, FOURS, Quantizer, Quants, Scale, Scaled, TILE_ROWS, half_at};
use crate::cpu::lanes::MicroKernel;
use crate::cpu::products::OneScale;

/// The format.
pub struct Q4_1;

/// Where a tile's m begin.
const M: usize = 2 * TILE_ROWS;

/// Where its nibbles begin.
const AT: usize = 2 * M;

fn quantize(x: &[f32], block: &mut [u8]) {
    let (d, m) = search::scale_and_least(x, 15.0, false);
    let (d, m) = (search::half(d), search::half(m));
    block[..2].copy_from_slice(&d.to_le_bytes());
    block[2..4].copy_from_slice(&m.to_le_bytes());
    block[4..].copy_from_slice(&layout::to_nibbles(&search::quants(x, (d.to_f32(), m.to_f32()), 15)));
}

impl BlockFormat for Q4_1 {
    const NAME: &'static str = "Q4_1";
    const NUMBER: u32 = 3;
    const VALUES: usize = 32;
    const BYTES: usize = 20;
    const TILE_BYTES: usize = AT + NIBBLES;
    const HALVES: &'static [usize] = &[0, 2];
    const CANDLE: Option<GgmlDType> = Some(GgmlDType::Q4_1);
    const CUDA: bool = true;
    const QUANTIZE: Option<Quantizer> = Some(quantize);
    type Kernel = OneScale;

    fn pack(block: &[u8], r: usize, tile: &mut [u8]) {
        layout::put_half(tile, r, &block[..2]);
        layout::put_half(&mut tile[M..], r, &block[2..4]);
        layout::put_fours(&mut tile[AT..], r, &block[4..]);
    }

    fn unpack(tile: &[u8], r: usize, block: &mut [u8]) {
        layout::get_half(tile, r, &mut block[..2]);
        layout::get_half(&tile[M..], r, &mut block[2..4]);
        layout::get_fours(&tile[AT..], r, &mut block[4..]);
    }

    fn dequantize(block: &[u8], out: &mut [f32]) {
        let (d, m) = (half_at(block, 0), half_at(block, 2));
        layout::each_nibble(&block[4..], out, |q| d * f32::from(q) + m);
    }
}

impl Scaled for Q4_1 {
    const QUANTS: Quants = Quants::Nibbles;

    #[inline(always)]
    fn quants<L: MicroKernel>(l: L, tile: &[u8], _: usize, at: usize) -> [L::Bytes; FOURS] {
        layout::nibbles(l, &tile[AT..], at)
    }

    #[inline(always)]
    fn scale<L: MicroKernel>(l: L, tile: &[u8], _: usize, at: usize) -> Scale<L> {
        Scale { d: l.load_f16(&tile[2 * at..]), m: Some(l.load_f16(&tile[M + 2 * at..])) }
    }
}
