//! Q4_K: 256 values of `d, dmin, 12 bytes of scales, 128 bytes of nibbles`: d * scale * q - dmin * minimum. Of each 64
//! values the low nibbles of 32 bytes are the first half, the high ones the second. In a tile the scales (`k_scales.rs`), then the
//! nibbles of each 32 columns.

use candle_core::quantized::GgmlDType;

use super::layout::{self, NIBBLES};
use super::search;
use super::{BLOCK, BlockFormat, FOURS, Quantizer, Quants, Scale, Scaled, k_scales};
use crate::cpu::lanes::MicroKernel;
use crate::cpu::products::OneScale;

/// The format.
pub struct Q4_K;

/// The low nibbles of values `32 b..32 b + 32`, of which 64 share 32 bytes.
pub(super) fn nibbles(bytes: &[u8], b: usize) -> [u8; BLOCK] {
    let (bytes, shift) = (&bytes[b / 2 * BLOCK..][..BLOCK], b % 2 * 4);
    std::array::from_fn(|i| bytes[i] >> shift & 15)
}

/// Puts them there, where zeros are.
pub(super) fn put_nibbles(bytes: &mut [u8], b: usize, quants: &[u8; BLOCK]) {
    for (byte, q) in bytes[b / 2 * BLOCK..][..BLOCK].iter_mut().zip(quants) {
        *byte |= q << (b % 2 * 4);
    }
}

fn quantize(x: &[f32], block: &mut [u8]) {
    let scales = k_scales::quantize(x, block, 15);
    let to = &mut block[k_scales::AFTER..];
    to.fill(0);
    for (b, (x, scale)) in x.chunks_exact(BLOCK).zip(scales).enumerate() {
        put_nibbles(to, b, &search::quants(x, scale, 15));
    }
}

impl BlockFormat for Q4_K {
    const NAME: &'static str = "Q4_K";
    const NUMBER: u32 = 12;
    const VALUES: usize = 256;
    const BYTES: usize = 144;
    const TILE_BYTES: usize = k_scales::QUANTS + k_scales::PARTS * NIBBLES;
    const HALVES: &'static [usize] = &[0, 2];
    const CANDLE: Option<GgmlDType> = Some(GgmlDType::Q4K);
    const QUANTIZE: Option<Quantizer> = Some(quantize);
    type Kernel = OneScale;

    fn pack(block: &[u8], r: usize, tile: &mut [u8]) {
        k_scales::pack(block, r, tile);
        for (b, tile) in tile[k_scales::QUANTS..].chunks_exact_mut(NIBBLES).enumerate() {
            layout::put_nibbles(tile, r, &nibbles(&block[k_scales::AFTER..], b));
        }
    }

    fn unpack(tile: &[u8], r: usize, block: &mut [u8]) {
        k_scales::unpack(tile, r, block);
        let to = &mut block[k_scales::AFTER..];
        to.fill(0);
        for (b, tile) in tile[k_scales::QUANTS..].chunks_exact(NIBBLES).enumerate() {
            put_nibbles(to, b, &layout::get_nibbles(tile, r));
        }
    }

    fn dequantize(block: &[u8], out: &mut [f32]) {
        k_scales::dequantize(block, out, |b| nibbles(&block[k_scales::AFTER..], b));
    }
}

impl Scaled for Q4_K {
    const QUANTS: Quants = Quants::Nibbles;

    #[inline(always)]
    fn quants<L: MicroKernel>(l: L, tile: &[u8], b: usize, at: usize) -> [L::Bytes; FOURS] {
        layout::nibbles(l, &tile[k_scales::QUANTS + NIBBLES * b..], at)
    }

    #[inline(always)]
    fn scale<L: MicroKernel>(l: L, tile: &[u8], b: usize, at: usize) -> Scale<L> {
        k_scales::scale(l, tile, b, at)
    }
}
