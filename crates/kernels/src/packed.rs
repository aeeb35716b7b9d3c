//! A frozen matrix in tile order: the only copy of the base's weights in host memory, packed once at load.
//!
//! A tile is [`TILE_ROWS`] rows by one block of 32 columns. In place of each row's `d, m, quants` a tile holds the 16
//! d, the 16 m where the format has them, and the quants so that four neighbours of each of the 16 rows lie together,
//! which is what the dot product instructions of CPUs take. Tiles of the same rows follow one another: a strip. No
//! value changes, and no byte is added but the padding to whole strips. `d` and `m` are half precision, little-endian.
//!
//! Quants of Q4_0 and Q4_1, 256 bytes: byte `64 c + 4 r + i` has, of row r, column `4 c + i` in its low nibble and
//! column `16 + 4 c + i` in its high one. Of Q8_0, 512 bytes: byte `64 c + 4 r + i` is column `4 c + i` of row r plus
//! 128, without sign.

use super::blocks::{BLOCK, QType};

/// Rows of a tile.
pub const TILE_ROWS: usize = 16;

/// A cache line, which the quants of most formats are aligned to.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// A matrix `[rows, cols]` in tile order.
#[derive(Debug)]
pub struct PackedMatrix {
    qtype: QType,
    rows: usize,
    cols: usize,
    lines: Vec<Line>,
}

/// Where the quants of a format's tile begin.
fn quants_at(qtype: QType) -> usize {
    match qtype {
        QType::Q4_0 | QType::Q8_0 => 2 * TILE_ROWS,
        QType::Q4_1 => 4 * TILE_ROWS,
    }
}

/// Bytes of a tile.
pub const fn tile_bytes(qtype: QType) -> usize {
    TILE_ROWS
        * match qtype {
            QType::Q4_0 => 18,
            QType::Q4_1 => 20,
            QType::Q8_0 => 34,
        }
}

/// Bytes between a row's blocks in the file, and the bytes of its d and m.
fn file_parts(qtype: QType) -> (usize, usize) {
    (tile_bytes(qtype) / TILE_ROWS, quants_at(qtype) / TILE_ROWS)
}

impl PackedMatrix {
    /// `file`: rows of `qtype.row_bytes(cols)` bytes as GGUF has them. `cols` is a multiple of 32.
    pub fn pack(qtype: QType, rows: usize, cols: usize, file: &[u8]) -> Self {
        assert_eq!(file.len(), rows * qtype.row_bytes(cols), "a matrix has as many bytes as its shape says");
        let blocks = cols / BLOCK;
        let bytes = rows.div_ceil(TILE_ROWS) * blocks * tile_bytes(qtype);
        let mut packed = Self { qtype, rows, cols, lines: vec![Line([0; 64]); bytes.div_ceil(64)] };
        let (block_bytes, head) = file_parts(qtype);
        let quants = quants_at(qtype);
        let flip = if qtype == QType::Q8_0 { 0x80 } else { 0 };
        let data = packed.bytes_mut();
        for (row, file) in file.chunks_exact(qtype.row_bytes(cols)).enumerate() {
            let (strip, r) = (row / TILE_ROWS, row % TILE_ROWS);
            for (b, block) in file.chunks_exact(block_bytes).enumerate() {
                let tile = &mut data[(strip * blocks + b) * tile_bytes(qtype)..][..tile_bytes(qtype)];
                for (i, half) in block[..head].chunks_exact(2).enumerate() {
                    tile[2 * (TILE_ROWS * i + r)..][..2].copy_from_slice(half);
                }
                for (c, four) in block[head..].chunks_exact(4).enumerate() {
                    let place = &mut tile[quants + 64 * c + 4 * r..][..4];
                    place.iter_mut().zip(four).for_each(|(to, from)| *to = from ^ flip);
                }
            }
        }
        packed
    }

    /// The rows as GGUF has them.
    pub fn unpack(&self) -> Vec<u8> {
        let row_bytes = self.qtype.row_bytes(self.cols);
        let mut file = vec![0; self.rows * row_bytes];
        let (block_bytes, _) = file_parts(self.qtype);
        for (row, out) in file.chunks_exact_mut(row_bytes).enumerate() {
            for (b, block) in out.chunks_exact_mut(block_bytes).enumerate() {
                self.unpack_block(row, b, block);
            }
        }
        file
    }

    fn unpack_block(&self, row: usize, b: usize, block: &mut [u8]) {
        let (_, head) = file_parts(self.qtype);
        let quants = quants_at(self.qtype);
        let flip = if self.qtype == QType::Q8_0 { 0x80 } else { 0 };
        let (tile, r) = (self.tile(row / TILE_ROWS, b), row % TILE_ROWS);
        for (i, half) in block[..head].chunks_exact_mut(2).enumerate() {
            half.copy_from_slice(&tile[2 * (TILE_ROWS * i + r)..][..2]);
        }
        for (c, four) in block[head..].chunks_exact_mut(4).enumerate() {
            four.copy_from_slice(&tile[quants + 64 * c + 4 * r..][..4]);
            four.iter_mut().for_each(|byte| *byte ^= flip);
        }
    }

    fn tile(&self, strip: usize, b: usize) -> &[u8] {
        &self.strip(strip)[b * tile_bytes(self.qtype)..][..tile_bytes(self.qtype)]
    }

    /// The exact values of rows `from..from + out.len() / cols`.
    pub fn dequantize(&self, from: usize, out: &mut [f32]) {
        let (block_bytes, _) = file_parts(self.qtype);
        let mut block = [0u8; 34];
        for (i, out) in out.chunks_exact_mut(self.cols).enumerate() {
            for (b, out) in out.chunks_exact_mut(BLOCK).enumerate() {
                self.unpack_block(from + i, b, &mut block[..block_bytes]);
                self.qtype.dequantize_row(&block[..block_bytes], out);
            }
        }
    }

    /// Returns the format of its blocks.
    pub fn qtype(&self) -> QType {
        self.qtype
    }

    /// Returns the outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Returns how many tiles of rows it has, the last one filled up.
    pub fn strips(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// The tiles of rows `16 i..16 i + 16`.
    pub fn strip(&self, i: usize) -> &[u8] {
        &self.strips_from(i)[..self.strip_bytes()]
    }

    /// The tiles from row `16 i` on.
    pub fn strips_from(&self, i: usize) -> &[u8] {
        &self.bytes()[i * self.strip_bytes()..]
    }

    fn strip_bytes(&self) -> usize {
        self.cols / BLOCK * tile_bytes(self.qtype)
    }

    /// All tiles.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: a line is 64 bytes without padding, and bytes have no alignment.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), size_of_val(&*self.lines)) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; any byte is a valid line.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), size_of_val(&*self.lines)) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::random_matrix;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn packing_changes_no_value(
            qtype in prop::sample::select(vec![QType::Q4_0, QType::Q4_1, QType::Q8_0]),
            rows in 1usize..40, blocks in 1usize..5, from in 0usize..40, seed in any::<u64>(),
        ) {
            let (cols, from) = (blocks * BLOCK, from % rows);
            let file = random_matrix(qtype, rows, cols, seed);
            let packed = PackedMatrix::pack(qtype, rows, cols, &file);
            prop_assert_eq!(packed.unpack(), file.clone());
            prop_assert!(packed.bytes().len() < file.len().next_multiple_of(16 * qtype.row_bytes(cols)) + 64);
            let (mut got, mut want) = (vec![0.0; (rows - from) * cols], vec![0.0; (rows - from) * cols]);
            packed.dequantize(from, &mut got);
            for (row, want) in file.chunks_exact(qtype.row_bytes(cols)).skip(from).zip(want.chunks_exact_mut(cols)) {
                qtype.dequantize_row(row, want);
            }
            prop_assert_eq!(got, want);
        }
    }
}
