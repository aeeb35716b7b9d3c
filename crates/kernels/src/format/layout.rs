//! How quants lie in a tile: four neighbours of each of the 16 rows together, which is what the dot product instructions
//! of CPUs take. `r` is the row within the tile.
//!
//! What is generic over [`MicroKernel`] is written without closures: one that the compiler does not inline is compiled
//! without the instructions of the kernel's machine, and then takes several times as long.

use super::{BLOCK, FOURS, TILE_ROWS};
use crate::cpu::lanes::MicroKernel;

/// Bytes of four columns of a tile, a byte a quant.
const COLUMNS: usize = 4 * TILE_ROWS;

/// Bytes of 32 columns of nibbles.
pub const NIBBLES: usize = COLUMNS * FOURS / 2;

/// Bytes of 32 columns of bytes.
pub const BYTES: usize = COLUMNS * FOURS;

/// Puts the half-precision number (or any two bytes) of row `r` among those of a tile.
pub fn put_half(halves: &mut [u8], r: usize, half: &[u8]) {
    halves[2 * r..][..2].copy_from_slice(half);
}

/// Takes it out again.
pub fn get_half(halves: &[u8], r: usize, half: &mut [u8]) {
    half.copy_from_slice(&halves[2 * r..][..2]);
}

/// Puts rows' bytes, four columns each, into a tile's: of nibbles (byte i has column i and, high, column 16 + i) or of
/// bytes.
pub fn put_fours(tile: &mut [u8], r: usize, bytes: &[u8]) {
    for (four, columns) in bytes.as_chunks::<4>().0.iter().zip(tile.chunks_exact_mut(COLUMNS)) {
        columns[4 * r..][..4].copy_from_slice(four);
    }
}

/// Takes them out again.
pub fn get_fours(tile: &[u8], r: usize, bytes: &mut [u8]) {
    for (four, columns) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(tile.chunks_exact(COLUMNS)) {
        four.copy_from_slice(&columns[4 * r..][..4]);
    }
}

/// Nibbles as the quants they are.
#[inline(always)]
pub fn nibbles<L: MicroKernel>(l: L, tile: &[u8], at: usize) -> [L::Bytes; FOURS] {
    let mut quants = [l.load_bytes(&tile[4 * at..]); FOURS];
    for c in 0..FOURS / 2 {
        let both = l.load_bytes(&tile[COLUMNS * c + 4 * at..]);
        quants[c] = l.and(both, 15);
        quants[FOURS / 2 + c] = l.and(l.shift_right::<4>(both), 15);
    }
    quants
}

/// Bytes as they are.
#[inline(always)]
pub fn bytes<L: MicroKernel>(l: L, tile: &[u8], at: usize) -> [L::Bytes; FOURS] {
    let mut quants = [l.load_bytes(&tile[4 * at..]); FOURS];
    for (g, quants) in quants.iter_mut().enumerate().skip(1) {
        *quants = l.load_bytes(&tile[COLUMNS * g + 4 * at..]);
    }
    quants
}

/// The values of 16 bytes of nibbles: value i is the low one of byte i, value i + 16 the high one.
pub fn each_nibble(bytes: &[u8], out: &mut [f32], value: impl Fn(u8) -> f32) {
    let (low, high) = out.split_at_mut(BLOCK / 2);
    for ((byte, low), high) in bytes.iter().zip(low).zip(high) {
        *low = value(byte & 15);
        *high = value(byte >> 4);
    }
}

/// Bytes of 32 columns of two bits.
pub const TWOS: usize = COLUMNS * FOURS / 4;

/// Bytes of 32 columns of bits.
pub const BITS: usize = COLUMNS * FOURS / 8;

/// The low nibbles of 32 quants, as [`put_fours`] takes them.
pub fn to_nibbles(quants: &[u8; BLOCK]) -> [u8; BLOCK / 2] {
    std::array::from_fn(|i| quants[i] & 15 | quants[BLOCK / 2 + i] << 4)
}

/// The quants of nibbles.
pub fn of_nibbles(bytes: &[u8; BLOCK / 2]) -> [u8; BLOCK] {
    std::array::from_fn(|i| bytes[i % (BLOCK / 2)] >> (i / (BLOCK / 2) * 4) & 15)
}

/// Puts the low nibbles of row `r` into a tile's.
pub fn put_nibbles(tile: &mut [u8], r: usize, quants: &[u8; BLOCK]) {
    put_fours(&mut tile[..NIBBLES], r, &to_nibbles(quants));
}

/// Takes them out again.
pub fn get_nibbles(tile: &[u8], r: usize) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK / 2];
    get_fours(&tile[..NIBBLES], r, &mut bytes);
    of_nibbles(&bytes)
}

/// Puts the two low bits of 32 quants of row `r` into a tile's: bits `2 k..2 k + 2` of byte `64 p + 4 r + i` are those of
/// column `16 p + 4 k + i`.
pub fn put_twos(tile: &mut [u8], r: usize, quants: &[u8; BLOCK]) {
    for (columns, quants) in tile.chunks_exact_mut(COLUMNS).zip(quants.as_chunks::<{ BLOCK / 2 }>().0) {
        let fours = quants.as_chunks::<4>().0.iter().enumerate();
        let word = fours.fold(0, |word, (k, four)| word | (u32::from_le_bytes(*four) & 0x0303_0303) << (2 * k));
        columns[4 * r..][..4].copy_from_slice(&word.to_le_bytes());
    }
}

/// Takes them out again.
pub fn get_twos(tile: &[u8], r: usize) -> [u8; BLOCK] {
    let byte = |at: usize| tile[COLUMNS * (at / 16) + 4 * r + at % 4] >> (at % 16 / 4 * 2) & 3;
    std::array::from_fn(byte)
}

/// Puts the lowest bits of 32 quants of row `r` into a tile's, where zeros are: bit `4 r + i` of the eight bytes from `8
/// g` on is that of column `4 g + i`.
pub fn put_bits(tile: &mut [u8], r: usize, quants: &[u8; BLOCK]) {
    for (four, bytes) in quants.as_chunks::<4>().0.iter().zip(tile.chunks_exact_mut(TILE_ROWS / 2)) {
        // The product brings the four bits together.
        let bits = (u32::from_le_bytes(*four) & 0x0101_0101).wrapping_mul(0x0102_0408) >> 24 & 15;
        bytes[r / 2] |= (bits as u8) << (r % 2 * 4);
    }
}

/// Takes them out again.
pub fn get_bits(tile: &[u8], r: usize) -> [u8; BLOCK] {
    std::array::from_fn(|at| tile[TILE_ROWS / 2 * (at / 4) + r / 2] >> (r % 2 * 4 + at % 4) & 1)
}

/// The bits of four columns, as [`MicroKernel::add_where`] takes them.
fn bits_of(tile: &[u8], g: usize, at: usize) -> &[u8] {
    &tile[TILE_ROWS / 2 * g + at / 2..]
}

/// Quants of five bits, less 16: nibbles and, from `high` on, fifth bits. As [`MicroKernel::ready_fives`] takes them.
#[inline(always)]
pub fn fives<L: MicroKernel>(l: L, tile: &[u8], high: &[u8], at: usize) -> [L::Bytes; FOURS] {
    let mut quants = nibbles(l, tile, at);
    for (g, quants) in quants.iter_mut().enumerate() {
        let least = if g < FOURS / 2 { 0xF0 } else { 0xF0 ^ L::SECOND };
        *quants = l.add_where(l.or(*quants, least), bits_of(high, g, at), 16);
    }
    quants
}

/// Quants of two bits, in the highest of their bytes.
#[inline(always)]
pub fn twos<L: MicroKernel>(l: L, tile: &[u8], at: usize) -> [L::Bytes; FOURS] {
    let mut quants = [l.load_bytes(&tile[4 * at..]); FOURS];
    for p in 0..2 {
        let four = l.load_bytes(&tile[COLUMNS * p + 4 * at..]);
        let places = [l.shift_left::<6>(four), l.shift_left::<4>(four), l.shift_left::<2>(four), four];
        for k in 0..4 {
            quants[4 * p + k] = l.and(places[k], 0b1100_0000);
        }
    }
    quants
}

/// Quants of three bits, in the highest of their bytes: two, and from `high` on the third.
#[inline(always)]
pub fn threes<L: MicroKernel>(l: L, tile: &[u8], high: &[u8], at: usize) -> [L::Bytes; FOURS] {
    let mut quants = [l.load_bytes(&tile[4 * at..]); FOURS];
    for p in 0..2 {
        let four = l.load_bytes(&tile[COLUMNS * p + 4 * at..]);
        let places =
            [l.shift_left::<5>(four), l.shift_left::<3>(four), l.shift_left::<1>(four), l.shift_right::<1>(four)];
        for k in 0..4 {
            let low = l.and(places[k], 0b0110_0000);
            quants[4 * p + k] = l.add_where(low, bits_of(high, 4 * p + k, at), 0b1000_0000);
        }
    }
    quants
}

/// Quants of six bits, in the highest of their bytes: nibbles, and from `high` on the two above.
#[inline(always)]
pub fn sixes<L: MicroKernel>(l: L, tile: &[u8], high: &[u8], at: usize) -> [L::Bytes; FOURS] {
    let mut quants = [l.load_bytes(&tile[4 * at..]); FOURS];
    for c in 0..FOURS / 2 {
        let both = l.load_bytes(&tile[COLUMNS * c + 4 * at..]);
        quants[c] = l.and(l.shift_left::<2>(both), 0b0011_1100);
        quants[FOURS / 2 + c] = l.and(l.shift_right::<2>(both), 0b0011_1100);
    }
    for p in 0..2 {
        let four = l.load_bytes(&high[COLUMNS * p + 4 * at..]);
        let places = [l.shift_left::<6>(four), l.shift_left::<4>(four), l.shift_left::<2>(four), four];
        for k in 0..4 {
            quants[4 * p + k] = l.or_bytes(quants[4 * p + k], l.and(places[k], 0b1100_0000));
        }
    }
    quants
}

/// Quants that nibbles name in a table.
#[inline(always)]
pub fn looked_up<L: MicroKernel>(l: L, tile: &[u8], table: &[u8; 16], at: usize) -> [L::Bytes; FOURS] {
    let mut quants = nibbles(l, tile, at);
    for quants in &mut quants {
        *quants = l.look_up(*quants, table);
    }
    quants
}
