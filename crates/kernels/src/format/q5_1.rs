//! Q5_1: 32 values of `d, m, 32 fifth bits, 16 bytes of nibbles`: d * q + m. In a tile the 16 rows' d, their m, their
//! nibbles, then their fifth bits.

use candle_core::quantized::GgmlDType;

use super::layout::{self, BITS, NIBBLES};
use super::q5_0::{put_quants, quants};
use super::search;
use super::{BlockFormat, FOURS, Quantizer, Quants, Scale, Scaled, TILE_ROWS, half_at};
use crate::cpu::lanes::MicroKernel;
use crate::cpu::products::OneScale;

/// The format.
pub struct Q5_1;

/// Where a tile's m begin.
const M: usize = 2 * TILE_ROWS;

/// Where its nibbles begin.
const AT: usize = 2 * M;

/// Where its fifth bits begin.
const HIGH: usize = AT + NIBBLES;

fn quantize(x: &[f32], block: &mut [u8]) {
    let (d, m) = search::scale_and_least(x, 31.0, false);
    let (d, m) = (search::half(d), search::half(m));
    block[..2].copy_from_slice(&d.to_le_bytes());
    block[2..4].copy_from_slice(&m.to_le_bytes());
    let quants = search::quants(x, (d.to_f32(), m.to_f32()), 31);
    put_quants(block, 4, &quants, &quants.map(|q| q >> 4));
}

impl BlockFormat for Q5_1 {
    const NAME: &'static str = "Q5_1";
    const NUMBER: u32 = 7;
    const VALUES: usize = 32;
    const BYTES: usize = 24;
    const TILE_BYTES: usize = HIGH + BITS;
    const HALVES: &'static [usize] = &[0, 2];
    const CANDLE: Option<GgmlDType> = Some(GgmlDType::Q5_1);
    const QUANTIZE: Option<Quantizer> = Some(quantize);
    type Kernel = OneScale;

    fn pack(block: &[u8], r: usize, tile: &mut [u8]) {
        layout::put_half(tile, r, &block[..2]);
        layout::put_half(&mut tile[M..], r, &block[2..4]);
        let quants = quants(block, 4);
        layout::put_nibbles(&mut tile[AT..], r, &quants);
        layout::put_bits(&mut tile[HIGH..], r, &quants.map(|q| q >> 4));
    }

    fn unpack(tile: &[u8], r: usize, block: &mut [u8]) {
        layout::get_half(tile, r, &mut block[..2]);
        layout::get_half(&tile[M..], r, &mut block[2..4]);
        put_quants(block, 4, &layout::get_nibbles(&tile[AT..], r), &layout::get_bits(&tile[HIGH..], r));
    }

    fn dequantize(block: &[u8], out: &mut [f32]) {
        let (d, m) = (half_at(block, 0), half_at(block, 2));
        for (x, q) in out.iter_mut().zip(quants(block, 4)) {
            *x = d * f32::from(q) + m;
        }
    }
}

impl Scaled for Q5_1 {
    const QUANTS: Quants = Quants::Fives;

    #[inline(always)]
    fn quants<L: MicroKernel>(l: L, tile: &[u8], _: usize, at: usize) -> [L::Bytes; FOURS] {
        layout::fives(l, &tile[AT..], &tile[HIGH..], at)
    }

    /// The quants come with 16 taken off, which m makes good.
    #[inline(always)]
    fn scale<L: MicroKernel>(l: L, tile: &[u8], _: usize, at: usize) -> Scale<L> {
        let d = l.load_f16(&tile[2 * at..]);
        Scale { d, m: Some(l.mul_add(d, 16.0, l.load_f16(&tile[M + 2 * at..]))) }
    }
}
