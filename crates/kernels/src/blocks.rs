//! The block formats of GGUF that a base's matrices may have, and their exact values in float32.
//!
//! A row is a run of blocks of 32 values. All integers are little-endian, `d` and `m` are IEEE half precision:
//! Q4_0 `d, 16 bytes of nibbles`: d * (q - 8). Q4_1 `d, m, 16 bytes of nibbles`: d * q + m. Q8_0 `d, 32 int8`: d * q.
//! In a byte of nibbles i, value i is the low one and value i + 16 the high one.

use half::f16;

/// Values a block.
pub const BLOCK: usize = 32;

/// How a matrix's values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QType {
    /// 32 quants of four bits around 8, times a half-precision scale.
    Q4_0,
    /// 32 quants of four bits, times a half-precision scale, plus a half-precision least value.
    Q4_1,
    /// 32 quants of eight bits, times a half-precision scale.
    Q8_0,
}

impl QType {
    /// Bytes of a row of `cols` values; `cols` is a multiple of [`BLOCK`].
    pub fn row_bytes(self, cols: usize) -> usize {
        match self {
            Self::Q4_0 => cols / BLOCK * 18,
            Self::Q4_1 => cols / BLOCK * 20,
            Self::Q8_0 => cols / BLOCK * 34,
        }
    }

    /// Whether rows may have this many values.
    pub fn fits(self, cols: usize) -> bool {
        cols.is_multiple_of(BLOCK)
    }

    /// The exact values of one row: `row` holds `row_bytes(out.len())` bytes.
    pub fn dequantize_row(self, row: &[u8], out: &mut [f32]) {
        match self {
            Self::Q4_0 => each_block::<18>(row, out, |block, out| {
                let d = half_at(block, 0);
                nibbles(&block[2..], out, |q| d * (f32::from(q) - 8.0));
            }),
            Self::Q4_1 => each_block::<20>(row, out, |block, out| {
                let (d, m) = (half_at(block, 0), half_at(block, 2));
                nibbles(&block[4..], out, |q| d * f32::from(q) + m);
            }),
            Self::Q8_0 => each_block::<34>(row, out, |block, out| {
                let d = half_at(block, 0);
                for (x, &q) in out.iter_mut().zip(&block[2..]) {
                    *x = d * f32::from(q as i8);
                }
            }),
        }
    }
}

/// A half-precision number in a block.
#[inline(always)]
pub(super) fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn each_block<const N: usize>(row: &[u8], out: &mut [f32], f: impl Fn(&[u8; N], &mut [f32; BLOCK])) {
    for (block, out) in row.as_chunks::<N>().0.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        f(block, out);
    }
}

fn nibbles(bytes: &[u8], out: &mut [f32; BLOCK], value: impl Fn(u8) -> f32) {
    let (low, high) = out.split_at_mut(BLOCK / 2);
    for ((byte, low), high) in bytes.iter().zip(low).zip(high) {
        *low = value(byte & 15);
        *high = value(byte >> 4);
    }
}
