//! Q4_0: 32 values of `d, 16 bytes of nibbles`: d * (q - 8). In a tile the 16 rows' d, then their nibbles.

use candle_core::quantized::GgmlDType;

use super::layout::{self, NIBBLES};
use super::search;
use super::{BlockFormat, FOURS, Quantizer, Quants, Scale, Scaled, TILE_ROWS, half_at};
use crate::cpu::lanes::MicroKernel;
use crate::cpu::products::OneScale;

/// The format.
pub struct Q4_0;

/// Where a tile's nibbles begin.
const AT: usize = 2 * TILE_ROWS;

fn quantize(x: &[f32], block: &mut [u8]) {
    let d = search::half(search::scale(x, 8.0));
    block[..2].copy_from_slice(&d.to_le_bytes());
    let d = d.to_f32();
    block[2..].copy_from_slice(&layout::to_nibbles(&search::quants(x, (d, -8.0 * d), 15)));
}

impl BlockFormat for Q4_0 {
    const NAME: &'static str = "Q4_0";
    const NUMBER: u32 = 2;
    const VALUES: usize = 32;
    const BYTES: usize = 18;
    const TILE_BYTES: usize = AT + NIBBLES;
    const HALVES: &'static [usize] = &[0];
    const CANDLE: Option<GgmlDType> = Some(GgmlDType::Q4_0);
    const CUDA: bool = true;
    const QUANTIZE: Option<Quantizer> = Some(quantize);
    type Kernel = OneScale;

    fn pack(block: &[u8], r: usize, tile: &mut [u8]) {
        layout::put_half(tile, r, &block[..2]);
        layout::put_fours(&mut tile[AT..], r, &block[2..]);
    }

    fn unpack(tile: &[u8], r: usize, block: &mut [u8]) {
        layout::get_half(tile, r, &mut block[..2]);
        layout::get_fours(&tile[AT..], r, &mut block[2..]);
    }

    fn dequantize(block: &[u8], out: &mut [f32]) {
        let d = half_at(block, 0);
        layout::each_nibble(&block[2..], out, |q| d * (f32::from(q) - 8.0));
    }
}

impl Scaled for Q4_0 {
    const QUANTS: Quants = Quants::Nibbles;

    #[inline(always)]
    fn quants<L: MicroKernel>(l: L, tile: &[u8], _: usize, at: usize) -> [L::Bytes; FOURS] {
        layout::nibbles(l, &tile[AT..], at)
    }

    #[inline(always)]
    fn scale<L: MicroKernel>(l: L, tile: &[u8], _: usize, at: usize) -> Scale<L> {
        let d = l.load_f16(&tile[2 * at..]);
        Scale { d, m: Some(l.scale(d, -8.0)) }
    }
}
