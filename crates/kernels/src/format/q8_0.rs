//! Q8_0: 32 values of `d, 32 int8`: d * q. In a tile the 16 rows' d, then their q plus 128, without sign.

use candle_core::quantized::GgmlDType;

use super::layout;
use super::search;
use super::{BlockFormat, FOURS, Quantizer, Quants, Scale, Scaled, TILE_ROWS, half_at};
use crate::cpu::lanes::MicroKernel;
use crate::cpu::products::OneScale;

/// The format.
pub struct Q8_0;

/// Where a tile's quants begin.
const AT: usize = 2 * TILE_ROWS;

/// Turns a byte with a sign into one that is 128 more, and back.
const FLIP: u8 = 0x80;

fn quantize(x: &[f32], block: &mut [u8]) {
    let d = search::half(search::extreme(x).abs() / 127.0);
    block[..2].copy_from_slice(&d.to_le_bytes());
    let quants: [u8; 32] = search::quants(x, (d.to_f32(), -127.0 * d.to_f32()), 254);
    block[2..].copy_from_slice(&quants.map(|q| q.wrapping_sub(127)));
}

impl BlockFormat for Q8_0 {
    const NAME: &'static str = "Q8_0";
    const NUMBER: u32 = 8;
    const VALUES: usize = 32;
    const BYTES: usize = 34;
    const TILE_BYTES: usize = AT + layout::BYTES;
    const HALVES: &'static [usize] = &[0];
    const CANDLE: Option<GgmlDType> = Some(GgmlDType::Q8_0);
    const CUDA: bool = true;
    const QUANTIZE: Option<Quantizer> = Some(quantize);
    type Kernel = OneScale;

    fn pack(block: &[u8], r: usize, tile: &mut [u8]) {
        layout::put_half(tile, r, &block[..2]);
        let quants: [u8; 32] = std::array::from_fn(|i| block[2 + i] ^ FLIP);
        layout::put_fours(&mut tile[AT..], r, &quants);
    }

    fn unpack(tile: &[u8], r: usize, block: &mut [u8]) {
        layout::get_half(tile, r, &mut block[..2]);
        layout::get_fours(&tile[AT..], r, &mut block[2..]);
        block[2..].iter_mut().for_each(|q| *q ^= FLIP);
    }

    fn dequantize(block: &[u8], out: &mut [f32]) {
        let d = half_at(block, 0);
        for (x, &q) in out.iter_mut().zip(&block[2..]) {
            *x = d * f32::from(q as i8);
        }
    }
}

impl Scaled for Q8_0 {
    const QUANTS: Quants = Quants::Bytes;

    #[inline(always)]
    fn quants<L: MicroKernel>(l: L, tile: &[u8], _: usize, at: usize) -> [L::Bytes; FOURS] {
        layout::bytes(l, &tile[AT..], at)
    }

    #[inline(always)]
    fn scale<L: MicroKernel>(l: L, tile: &[u8], _: usize, at: usize) -> Scale<L> {
        Scale { d: l.load_f16(&tile[2 * at..]), m: None }
    }
}
