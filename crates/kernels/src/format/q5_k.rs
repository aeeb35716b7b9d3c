//! Q5_K: 256 values of `d, dmin, 12 bytes of scales, 32 bytes of fifth bits, 128 bytes of nibbles`: d * scale * q - dmin *
//! minimum. The nibbles lie as in Q4_K; bit b of byte i of the fifth bits is that of value `32 b + i`. In a tile the
//! scales (`k_scales.rs`), then of each 32 columns the nibbles and the fifth bits.

use candle_core::quantized::GgmlDType;

use super::layout::{self, BITS, NIBBLES};
use super::q4_k::{nibbles, put_nibbles};
use super::search;
use super::{BLOCK, BlockFormat, FOURS, Quantizer, Quants, Scale, Scaled, k_scales};
use crate::cpu::lanes::MicroKernel;
use crate::cpu::products::OneScale;

/// The format.
pub struct Q5_K;

/// Where a block's fifth bits begin.
const BLOCK_HIGH: usize = k_scales::AFTER;

/// Where its nibbles begin.
const BLOCK_LOW: usize = BLOCK_HIGH + BLOCK;

/// Bytes of 32 columns of a tile: nibbles, then fifth bits.
const PART: usize = NIBBLES + BITS;

fn high(block: &[u8], b: usize) -> [u8; BLOCK] {
    std::array::from_fn(|i| block[BLOCK_HIGH + i] >> b & 1)
}

fn quantize(x: &[f32], block: &mut [u8]) {
    let scales = k_scales::quantize(x, block, 31);
    block[BLOCK_HIGH..].fill(0);
    for (b, (x, scale)) in x.chunks_exact(BLOCK).zip(scales).enumerate() {
        let quants: [u8; BLOCK] = search::quants(x, scale, 31);
        put_nibbles(&mut block[BLOCK_LOW..], b, &quants.map(|q| q & 15));
        block[BLOCK_HIGH..BLOCK_LOW].iter_mut().zip(quants).for_each(|(byte, q)| *byte |= q >> 4 << b);
    }
}

impl BlockFormat for Q5_K {
    const NAME: &'static str = "Q5_K";
    const NUMBER: u32 = 13;
    const VALUES: usize = 256;
    const BYTES: usize = 176;
    const TILE_BYTES: usize = k_scales::QUANTS + k_scales::PARTS * PART;
    const HALVES: &'static [usize] = &[0, 2];
    const CANDLE: Option<GgmlDType> = Some(GgmlDType::Q5K);
    const QUANTIZE: Option<Quantizer> = Some(quantize);
    type Kernel = OneScale;

    fn pack(block: &[u8], r: usize, tile: &mut [u8]) {
        k_scales::pack(block, r, tile);
        for (b, part) in tile[k_scales::QUANTS..].chunks_exact_mut(PART).enumerate() {
            layout::put_nibbles(part, r, &nibbles(&block[BLOCK_LOW..], b));
            layout::put_bits(&mut part[NIBBLES..], r, &high(block, b));
        }
    }

    fn unpack(tile: &[u8], r: usize, block: &mut [u8]) {
        k_scales::unpack(tile, r, block);
        block[BLOCK_HIGH..].fill(0);
        for (b, part) in tile[k_scales::QUANTS..].chunks_exact(PART).enumerate() {
            put_nibbles(&mut block[BLOCK_LOW..], b, &layout::get_nibbles(part, r));
            for (byte, bit) in block[BLOCK_HIGH..].iter_mut().zip(layout::get_bits(&part[NIBBLES..], r)) {
                *byte |= bit << b;
            }
        }
    }

    fn dequantize(block: &[u8], out: &mut [f32]) {
        k_scales::dequantize(block, out, |b| {
            let (low, high) = (nibbles(&block[BLOCK_LOW..], b), high(block, b));
            std::array::from_fn(|i| low[i] | high[i] << 4)
        });
    }
}

impl Scaled for Q5_K {
    const QUANTS: Quants = Quants::Fives;

    #[inline(always)]
    fn quants<L: MicroKernel>(l: L, tile: &[u8], b: usize, at: usize) -> [L::Bytes; FOURS] {
        let part = &tile[k_scales::QUANTS + PART * b..];
        layout::fives(l, part, &part[NIBBLES..], at)
    }

    /// The quants come with 16 taken off, which m makes good.
    #[inline(always)]
    fn scale<L: MicroKernel>(l: L, tile: &[u8], b: usize, at: usize) -> Scale<L> {
        let scale = k_scales::scale(l, tile, b, at);
        let Some(m) = scale.m else { return scale };
        Scale { d: scale.d, m: Some(l.mul_add(scale.d, 16.0, m)) }
    }
}
