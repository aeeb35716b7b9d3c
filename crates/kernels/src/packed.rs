//! A frozen matrix in tile order: the only copy of the base's weights in host memory, packed once at load.
//!
//! A tile is [`TILE_ROWS`] rows by one block of columns. In place of each row's `d, m, quants` a tile holds the 16 d, the
//! 16 m where the format has them, and the quants so that four neighbours of each of the 16 rows lie together, which is
//! what the dot product instructions of CPUs take; each format's file says where (`format`). Tiles of the same rows
//! follow one another: a strip. No value changes. What all blocks of a matrix have in common, NF4's nested scales, lies
//! beside the tiles.

use rayon::prelude::*;

use super::format::nested::{NestedScales, StripScales};
use super::format::nf4;
use super::format::{BlockFormat, QType, with_format};

pub use super::format::TILE_ROWS;

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
    /// Empty but for formats that have them.
    nested: NestedScales,
}

/// The most bytes of a block.
const MAX_BLOCK: usize = 256;

impl PackedMatrix {
    /// `file`: rows of `qtype.row_bytes(cols)` bytes as GGUF has them, after `qtype.nested_bytes(rows, cols)` bytes of nested
    /// scales. `cols` is a multiple of the block's values.
    pub fn pack(qtype: QType, rows: usize, cols: usize, file: &[u8]) -> Self {
        let (nested, file) = file.split_at(qtype.nested_bytes(rows, cols));
        let mut packer = Packer::nested(qtype, rows, cols, nested);
        packer.push(file);
        packer.finish()
    }

    /// What [`PackedMatrix::pack`] takes: the rows as GGUF has them, after the nested scales where the format has them.
    pub fn unpack(&self) -> Vec<u8> {
        let (row_bytes, from) = (self.qtype.row_bytes(self.cols), self.qtype.nested_bytes(self.rows, self.cols));
        let mut file = vec![0; from + self.rows * row_bytes];
        let (nested, rows) = file.split_at_mut(from);
        if from > 0 {
            nested.copy_from_slice(&self.nested.to_bytes());
        }
        for (row, out) in rows.chunks_exact_mut(row_bytes).enumerate() {
            let tiles = self.strip(row / TILE_ROWS);
            with_format!(self.qtype, F => {
                for (tile, block) in tiles.chunks_exact(F::TILE_BYTES).zip(out.chunks_exact_mut(F::BYTES)) {
                    F::unpack(tile, row % TILE_ROWS, block);
                }
            });
        }
        file
    }

    /// The exact values of rows `from..from + out.len() / cols`.
    pub fn dequantize(&self, from: usize, out: &mut [f32]) {
        for (row, out) in (from..).zip(out.chunks_exact_mut(self.cols)) {
            let tiles = self.strip(row / TILE_ROWS);
            with_format!(self.qtype, F => dequantize_row::<F>(tiles, row, &self.nested, out));
        }
    }

    /// Returns the bytes that a matrix takes.
    pub fn bytes_of(qtype: QType, rows: usize, cols: usize) -> usize {
        Self::tile_bytes_of(qtype, rows, cols) + qtype.nested_bytes(rows, cols)
    }

    /// Returns the bytes of its tiles.
    fn tile_bytes_of(qtype: QType, rows: usize, cols: usize) -> usize {
        let tiles = rows.div_ceil(TILE_ROWS) * (cols / qtype.block_values());
        (tiles * qtype.tile_bytes()).next_multiple_of(size_of::<Line>())
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

    /// The nested scales from row `16 i` on.
    pub(crate) fn nested_from(&self, i: usize) -> StripScales<'_> {
        StripScales::new(&self.nested, i, self.cols / self.qtype.block_values())
    }

    fn strip_bytes(&self) -> usize {
        self.cols / self.qtype.block_values() * self.qtype.tile_bytes()
    }

    /// All tiles.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: a line is 64 bytes without padding, and bytes have no alignment.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), size_of_val(&*self.lines)) }
    }

    /// Gives an NF4 matrix its nested scales and each block, row by row, the code of its own.
    pub(crate) fn set_scales(&mut self, nested: NestedScales, codes: &[u8]) {
        let (strip_bytes, of_row) = (self.strip_bytes(), self.cols / self.qtype.block_values());
        let strips = self.bytes_mut().par_chunks_exact_mut(strip_bytes).zip(codes.par_chunks(TILE_ROWS * of_row));
        strips.for_each(|(strip, codes)| {
            for (r, codes) in codes.chunks_exact(of_row).enumerate() {
                nf4::put_scales(strip, r, codes);
            }
        });
        self.nested = nested;
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; any byte is a valid line.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), size_of_val(&*self.lines)) }
    }
}

/// A matrix that is being packed, from rows that come piece by piece: what is in memory is the matrix and a piece.
#[derive(Debug)]
pub struct Packer {
    matrix: PackedMatrix,
    /// Rows that have come.
    filled: usize,
}

/// The least bytes of a strip's rows that a thread takes at a time.
const MIN_BYTES: usize = 1 << 16;

impl Packer {
    /// A matrix without rows yet, of a format without nested scales. `cols` is a multiple of the block's values.
    pub fn new(qtype: QType, rows: usize, cols: usize) -> Self {
        Self::nested(qtype, rows, cols, &[])
    }

    /// A matrix without rows yet, with the `qtype.nested_bytes(rows, cols)` bytes of its nested scales.
    pub fn nested(qtype: QType, rows: usize, cols: usize, nested: &[u8]) -> Self {
        assert!(qtype.fits(cols), "rows are whole blocks");
        assert_eq!(nested.len(), qtype.nested_bytes(rows, cols), "a format with nested scales has them");
        let lines = vec![Line([0; 64]); PackedMatrix::tile_bytes_of(qtype, rows, cols) / size_of::<Line>()];
        let nested = NestedScales::of_bytes(nested);
        Self { matrix: PackedMatrix { qtype, rows, cols, lines, nested }, filled: 0 }
    }

    /// Packs the rows that come next, any number of them, in the order of the file; on rayon's pool.
    pub fn push(&mut self, rows: &[u8]) {
        let (qtype, first) = (self.matrix.qtype, self.filled);
        let row_bytes = qtype.row_bytes(self.matrix.cols);
        let end = first + rows.len() / row_bytes;
        assert!(rows.len().is_multiple_of(row_bytes) && end <= self.matrix.rows, "as many rows as the shape says");
        let (strip_bytes, from) = (self.matrix.strip_bytes(), first / TILE_ROWS);
        let strips = self.matrix.bytes_mut()[from * strip_bytes..].par_chunks_exact_mut(strip_bytes);
        let strips = strips.take(end.div_ceil(TILE_ROWS) - from).enumerate();
        strips.with_min_len(MIN_BYTES.div_ceil(strip_bytes)).for_each(|(i, strip)| {
            let begin = (from + i) * TILE_ROWS;
            for row in begin.max(first)..end.min(begin + TILE_ROWS) {
                let file = &rows[(row - first) * row_bytes..][..row_bytes];
                with_format!(qtype, F => pack_row::<F>(file, row - begin, strip));
            }
        });
        self.filled = end;
    }

    /// The matrix, once all of its rows have come.
    pub fn finish(self) -> PackedMatrix {
        assert_eq!(self.filled, self.matrix.rows, "as many rows as the shape says");
        self.matrix
    }
}

/// Puts row `r` into a strip's tiles.
fn pack_row<F: BlockFormat>(row: &[u8], r: usize, strip: &mut [u8]) {
    for (block, tile) in row.chunks_exact(F::BYTES).zip(strip.chunks_exact_mut(F::TILE_BYTES)) {
        F::pack(block, r, tile);
    }
}

/// The values of a row, which lies in a strip's tiles.
fn dequantize_row<F: BlockFormat>(strip: &[u8], row: usize, nested: &NestedScales, out: &mut [f32]) {
    let mut block = [0; MAX_BLOCK];
    let block = &mut block[..F::BYTES];
    let first = row * (out.len() / F::VALUES);
    for (t, (tile, out)) in strip.chunks_exact(F::TILE_BYTES).zip(out.chunks_exact_mut(F::VALUES)).enumerate() {
        F::unpack(tile, row % TILE_ROWS, block);
        if F::NESTED {
            F::dequantize_nested(block, nested.of(first + t), out);
        } else {
            F::dequantize(block, out);
        }
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
            qtype in prop::sample::select(QType::ALL),
            rows in 1usize..40, blocks in 1usize..5, from in 0usize..40, seed in any::<u64>(),
        ) {
            let (cols, from) = (blocks * qtype.block_values(), from % rows);
            let file = random_matrix(qtype, rows, cols, seed);
            let packed = PackedMatrix::pack(qtype, rows, cols, &file);
            prop_assert_eq!(packed.unpack(), file.clone());
            let (nested, file) = file.split_at(qtype.nested_bytes(rows, cols));
            let strips = file.len().next_multiple_of(16 * qtype.row_bytes(cols));
            prop_assert!(packed.bytes().len() as f64 <= 1.06 * strips as f64 + 64.0, "{} of {strips} bytes", packed.bytes().len());
            let (mut got, mut want) = (vec![0.0; (rows - from) * cols], vec![0.0; (rows - from) * cols]);
            packed.dequantize(from, &mut got);
            let nested = NestedScales::of_bytes(nested);
            let each = file.chunks_exact(qtype.block_bytes()).enumerate().skip(from * blocks);
            for ((i, block), want) in each.zip(want.chunks_exact_mut(qtype.block_values())) {
                with_format!(qtype, F => if F::NESTED {
                    F::dequantize_nested(block, nested.of(i), want);
                } else {
                    F::dequantize(block, want);
                });
            }
            prop_assert_eq!(got, want);
        }

        #[test]
        fn pieces_make_the_same_matrix(
            qtype in prop::sample::select(QType::ALL), pieces in prop::collection::vec(0usize..40, 0..6), seed in any::<u64>(),
        ) {
            let (rows, cols) = (pieces.iter().sum(), qtype.block_values());
            let file = random_matrix(qtype, rows, cols, seed);
            let (nested, mut rest) = file.split_at(qtype.nested_bytes(rows, cols));
            let mut packer = Packer::nested(qtype, rows, cols, nested);
            for piece in pieces {
                let (now, later) = rest.split_at(piece * qtype.row_bytes(cols));
                packer.push(now);
                rest = later;
            }
            let whole = PackedMatrix::pack(qtype, rows, cols, &file);
            let pieces = packer.finish();
            prop_assert_eq!(pieces.bytes(), whole.bytes());
            prop_assert_eq!(whole.unpack(), file);
        }
    }
}
