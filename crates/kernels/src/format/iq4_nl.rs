//! IQ4_NL: 32 values of `d, 16 bytes of nibbles`: d times the entry of a table that the nibble names. In a tile as Q4_0.

use super::layout::{self, NIBBLES};
use super::{BlockFormat, FOURS, Quants, Scale, Scaled, TILE_ROWS, half_at};
use crate::cpu::lanes::MicroKernel;
use crate::cpu::products::OneScale;

/// The format.
pub struct IQ4_NL;

/// What nibbles stand for.
pub(super) const TABLE: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The table, 128 more, as the matmul takes it.
pub(super) const UNSIGNED: [u8; 16] = {
    let mut table = [0; 16];
    let mut i = 0;
    while i < 16 {
        table[i] = TABLE[i] as u8 ^ 0x80;
        i += 1;
    }
    table
};

/// Where a tile's nibbles begin.
const AT: usize = 2 * TILE_ROWS;

impl BlockFormat for IQ4_NL {
    const NAME: &'static str = "IQ4_NL";
    const NUMBER: u32 = 20;
    const VALUES: usize = 32;
    const BYTES: usize = 18;
    const TILE_BYTES: usize = AT + NIBBLES;
    const HALVES: &'static [usize] = &[0];
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
        layout::each_nibble(&block[2..], out, |q| d * f32::from(TABLE[usize::from(q)]));
    }
}

impl Scaled for IQ4_NL {
    const QUANTS: Quants = Quants::Bytes;

    #[inline(always)]
    fn quants<L: MicroKernel>(l: L, tile: &[u8], _: usize, at: usize) -> [L::Bytes; FOURS] {
        layout::looked_up(l, &tile[AT..], &UNSIGNED, at)
    }

    #[inline(always)]
    fn scale<L: MicroKernel>(l: L, tile: &[u8], _: usize, at: usize) -> Scale<L> {
        Scale { d: l.load_f16(&tile[2 * at..]), m: None }
    }
}
