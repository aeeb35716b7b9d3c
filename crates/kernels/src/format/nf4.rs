//! NF4 with double quantisation (QLoRA, Dettmers et al. 2023, arXiv:2305.14314): 64 values of `a byte, 32 bytes of codes`, as
//! bitsandbytes has them: the scale's code, then two codes a byte, the first one in the high nibble. What the scale's code
//! stands for belongs to the matrix (`nested.rs`). In a tile the 16 rows' scale codes, then for each 8 columns four bytes
//! of every row: nibble i is column 2 i, nibble 4 + i column 2 i + 1.

use super::dynamic::DYNAMIC_CODE;
use super::nested::Nested;
use super::normal_float::NF4_CODE;
use super::{BlockFormat, TILE_ROWS, Tabled};
use crate::cpu::lanes::{MicroKernel, WordTable};
use crate::cpu::products::LookedUp;

/// The format.
pub struct NF4;

/// Values of a block.
pub(crate) const VALUES: usize = 64;

/// Bytes of eight columns of a row.
const EIGHT: usize = 4;

/// Where a tile's codes begin.
const AT: usize = TILE_ROWS;

/// Bytes of eight columns of a tile.
const COLUMNS: usize = EIGHT * TILE_ROWS;

/// What 1 is in the matmul: the codes' numbers are then within 0.22 of integers (root mean square 0.106), 1.4e-5 of a
/// block's largest magnitude.
const ONE: f64 = 15_683.94;

/// The numbers in parts of [`ONE`].
const TABLE: WordTable = {
    let mut words = [0; 16];
    let mut i = 0;
    while i < 16 {
        let x = NF4_CODE[i] as f64 * ONE;
        words[i] = (x + if x < 0.0 { -0.5 } else { 0.5 }) as i16;
        i += 1;
    }
    WordTable::new(words)
};

/// The nibbles of eight codes in a tile.
fn to_tile(codes: [u8; EIGHT]) -> [u8; EIGHT] {
    let pairs = codes.into_iter().enumerate();
    let [first, second] = pairs.fold([0u16; 2], |[first, second], (i, pair)| {
        [first | u16::from(pair >> 4) << (4 * i), second | u16::from(pair & 15) << (4 * i)]
    });
    let ([a, b], [c, d]) = (first.to_le_bytes(), second.to_le_bytes());
    [a, b, c, d]
}

/// Takes them out again.
fn of_tile([a, b, c, d]: [u8; EIGHT]) -> [u8; EIGHT] {
    let (first, second) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
    std::array::from_fn(|i| ((first >> (4 * i) & 15) << 4 | second >> (4 * i) & 15) as u8)
}

/// Puts the scale codes of row `r` into a strip's tiles.
pub(crate) fn put_scales(strip: &mut [u8], r: usize, codes: &[u8]) {
    strip.chunks_exact_mut(NF4::TILE_BYTES).zip(codes).for_each(|(tile, code)| tile[r] = *code);
}

impl BlockFormat for NF4 {
    const NAME: &'static str = "NF4";
    const NUMBER: u32 = u32::from_le_bytes(*b"TNF4");
    const VALUES: usize = VALUES;
    const BYTES: usize = 1 + VALUES / 2;
    const TILE_BYTES: usize = AT + VALUES / 8 * COLUMNS;
    const HALVES: &'static [usize] = &[];
    const NESTED: bool = true;
    type Kernel = LookedUp;

    fn pack(block: &[u8], r: usize, tile: &mut [u8]) {
        tile[r] = block[0];
        for (codes, columns) in block[1..].as_chunks().0.iter().zip(tile[AT..].chunks_exact_mut(COLUMNS)) {
            columns[EIGHT * r..][..EIGHT].copy_from_slice(&to_tile(*codes));
        }
    }

    fn unpack(tile: &[u8], r: usize, block: &mut [u8]) {
        block[0] = tile[r];
        for (codes, columns) in block[1..].as_chunks_mut().0.iter_mut().zip(tile[AT..].chunks_exact(COLUMNS)) {
            let columns = &columns[EIGHT * r..];
            *codes = of_tile([columns[0], columns[1], columns[2], columns[3]]);
        }
    }

    fn dequantize(block: &[u8], out: &mut [f32]) {
        Self::dequantize_nested(block, Nested::UNIT, out);
    }

    fn dequantize_nested(block: &[u8], nested: Nested, out: &mut [f32]) {
        let scale = nested.scale_of(block[0]);
        for (pair, out) in block[1..].iter().zip(out.as_chunks_mut::<2>().0) {
            *out = [pair >> 4, pair & 15].map(|code| NF4_CODE[usize::from(code)] * scale);
        }
    }
}

impl Tabled for NF4 {
    const TABLE: &'static WordTable = &TABLE;

    #[inline(always)]
    fn indices(tile: &[u8], eight: usize, at: usize) -> &[u8] {
        &tile[AT + COLUMNS * eight + EIGHT * at..]
    }

    #[inline(always)]
    fn scale<L: MicroKernel>(l: L, tile: &[u8], nested: &[f32; TILE_ROWS], offset: f32, at: usize) -> L::Float {
        let scales = l.mul(l.look_up_floats(&tile[at..], &DYNAMIC_CODE), l.load(&nested[at..]));
        l.scale(l.add(scales, l.load(&[offset; TILE_ROWS])), (1.0 / ONE) as f32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_give_codes_back() {
        for codes in [[0x12, 0x34, 0x56, 0x78], [0xFE, 0xDC, 0xBA, 0x98], [0xF0; 4], [0x0F; 4]] {
            assert_eq!(of_tile(to_tile(codes)), codes);
        }
    }

    /// What the matmul multiplies by is next to the number itself, and eight products fit 32 bits.
    #[test]
    fn words_are_near() {
        for (word, x) in TABLE.words().iter().zip(NF4_CODE) {
            assert!((f64::from(*word) / ONE - f64::from(x)).abs() <= 1.4e-5, "{word}");
            assert!(8 * i64::from(word.abs()) * 128 * 128 <= i64::from(i32::MAX), "{word}");
        }
    }
}
