//! Activations for the quantised matmul: each row by itself, in blocks of 32, in one or two bytes a value.
//!
//! A block's values are `scale * (128 * high + low)`. Where its largest value stands out of its row the block is *fine*: 15 bits, and
//! the matmul takes `low` too. Else it is *coarse*: 8 bits, `low` is zero and is not read. A few huge activations that take the range of
//! their block are what costs accuracy on real models; see `docs/LOG.md` for what each choice does to log-probabilities.

use super::simd::{LANES, Level, Simd, dispatch, dot};
use crate::kernels::blocks::BLOCK;

const LARGEST_COARSE: f32 = 127.0;
const LARGEST_FINE: f32 = 127.0 * 128.0;

/// Quantised rows `[rows, cols]`.
#[derive(Debug, Default)]
pub struct QuantizedRows {
    rows: usize,
    blocks: usize,
    high: Vec<i8>,
    low: Vec<i8>,
    /// Of each block.
    scale: Vec<f32>,
    /// scale * 128, for coarse blocks.
    coarse_scale: Vec<f32>,
    /// The sum of the block's values.
    sum: Vec<f32>,
    /// A bit for each block, `words` words a row.
    fine: Vec<u64>,
    words: usize,
}

/// One row, to be read.
#[derive(Debug, Clone, Copy)]
pub(super) struct QRow<'a> {
    pub high: &'a [[i8; BLOCK]],
    pub low: &'a [[i8; BLOCK]],
    pub scale: &'a [f32],
    pub coarse_scale: &'a [f32],
    pub sum: &'a [f32],
    pub fine: &'a [u64],
}

/// All rows, to be written by several threads, each its own.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowWriter {
    rows: usize,
    blocks: usize,
    words: usize,
    high: *mut i8,
    low: *mut i8,
    scale: *mut f32,
    coarse_scale: *mut f32,
    sum: *mut f32,
    fine: *mut u64,
}

// SAFETY: `write` is unsafe and asks that no two threads write the same row.
unsafe impl Send for RowWriter {}
// SAFETY: as above.
unsafe impl Sync for RowWriter {}

impl QuantizedRows {
    /// Makes room for `rows` rows, reusing the buffers. `cols` is a multiple of 32.
    pub(super) fn resize(&mut self, rows: usize, cols: usize) -> RowWriter {
        let blocks = cols / BLOCK;
        (self.rows, self.blocks, self.words) = (rows, blocks, blocks.div_ceil(64));
        self.high.resize(rows * cols, 0);
        self.low.resize(rows * cols, 0);
        for buffer in [&mut self.scale, &mut self.coarse_scale, &mut self.sum] {
            buffer.resize(rows * blocks, 0.0);
        }
        self.fine.resize(rows * self.words, 0);
        RowWriter {
            rows,
            blocks,
            words: self.words,
            high: self.high.as_mut_ptr(),
            low: self.low.as_mut_ptr(),
            scale: self.scale.as_mut_ptr(),
            coarse_scale: self.coarse_scale.as_mut_ptr(),
            sum: self.sum.as_mut_ptr(),
            fine: self.fine.as_mut_ptr(),
        }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.blocks * BLOCK
    }

    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> QRow<'_> {
        let (at, n) = (row * self.blocks, self.blocks);
        QRow {
            high: &self.high[at * BLOCK..][..n * BLOCK].as_chunks().0[..n],
            low: &self.low[at * BLOCK..][..n * BLOCK].as_chunks().0[..n],
            scale: &self.scale[at..][..n],
            coarse_scale: &self.coarse_scale[at..][..n],
            sum: &self.sum[at..][..n],
            fine: &self.fine[row * self.words..][..self.words],
        }
    }
}

impl RowWriter {
    /// Quantises `x` as row `row`. Its blocks are coarse where their largest value is at most `coarse` times the row's root mean square.
    ///
    /// # Safety
    /// The rows this was made of are alive, and nobody else reads or writes this one.
    pub unsafe fn write(&self, row: usize, x: &[f32], coarse: f32) {
        // SAFETY: the caller vouches for it.
        unsafe { self.write_at(Level::best(), row, x, coarse) };
    }

    /// # Safety
    /// As of [`RowWriter::write`].
    unsafe fn write_at(&self, level: Level, row: usize, x: &[f32], coarse: f32) {
        assert!(row < self.rows && x.len() == self.blocks * BLOCK, "a row fits");
        let (at, n) = (row * self.blocks, self.blocks);
        // SAFETY: the row lies within the buffers, which were made for `rows` rows, and is ours.
        let mut to = unsafe {
            Place {
                high: std::slice::from_raw_parts_mut(self.high.add(at * BLOCK), n * BLOCK),
                low: std::slice::from_raw_parts_mut(self.low.add(at * BLOCK), n * BLOCK),
                scale: std::slice::from_raw_parts_mut(self.scale.add(at), n),
                coarse_scale: std::slice::from_raw_parts_mut(self.coarse_scale.add(at), n),
                sum: std::slice::from_raw_parts_mut(self.sum.add(at), n),
                fine: std::slice::from_raw_parts_mut(self.fine.add(row * self.words), self.words),
            }
        };
        let to = &mut to;
        dispatch!(level, quantize, x: &[f32], coarse: f32, to: &mut Place<'_>);
    }
}

/// Where a quantised row goes.
struct Place<'a> {
    high: &'a mut [i8],
    low: &'a mut [i8],
    scale: &'a mut [f32],
    coarse_scale: &'a mut [f32],
    sum: &'a mut [f32],
    fine: &'a mut [u64],
}

#[inline(always)]
fn quantize<S: Simd>(s: S, x: &[f32], coarse: f32, to: &mut Place<'_>) {
    let limit = if coarse > 0.0 { coarse * (dot(x, x) / x.len() as f32).sqrt() } else { 0.0 };
    to.fine.fill(0);
    let quants = to.high.as_chunks_mut::<BLOCK>().0.iter_mut().zip(to.low.as_chunks_mut::<BLOCK>().0);
    for (b, (x, (high, low))) in x.as_chunks::<BLOCK>().0.iter().zip(quants).enumerate() {
        let halves = x.as_chunks::<LANES>().0;
        let x = [s.load(&halves[0]), s.load(&halves[1])];
        let largest = f32::from_bits(s.largest(x));
        let is_coarse = largest <= limit;
        let (range, shift) = if is_coarse { (LARGEST_COARSE, 7) } else { (LARGEST_FINE, 0) };
        let inverse = if largest > 0.0 { range / largest } else { 0.0 };
        let sum = s.split(x, inverse, shift, high, low);
        // What is broken must not look like zeros.
        let unit = if largest.is_finite() { largest / LARGEST_FINE } else { f32::NAN };
        to.scale[b] = unit;
        to.coarse_scale[b] = unit * 128.0;
        to.sum[b] = unit * sum as f32;
        to.fine[b / 64] |= u64::from(!is_coarse) << (b % 64);
    }
}

#[cfg(test)]
impl QuantizedRows {
    /// Quantises whole rows on this thread.
    pub fn of(x: &[f32], cols: usize, coarse: f32) -> Self {
        let mut q = Self::default();
        let writer = q.resize(x.len() / cols, cols);
        // SAFETY: the rows are alive and written one by one.
        x.chunks_exact(cols).enumerate().for_each(|(row, x)| unsafe { writer.write(row, x, coarse) });
        q
    }

    /// The value that a place stands for.
    pub fn value(&self, row: usize, col: usize) -> f64 {
        let (row, b, i) = (self.row(row), col / BLOCK, col % BLOCK);
        f64::from(row.scale[b]) * f64::from(128 * i32::from(row.high[b][i]) + i32::from(row.low[b][i]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_forms_give_the_same_numbers() {
        let mut sound: Vec<f32> = (0..320).map(|i| (i as f32 * 1.7).sin() * (i as f32 / 40.0).exp()).collect();
        sound[130] = 1e-40;
        sound[200..260].fill(0.0);
        let mut broken = sound.clone();
        (broken[3], broken[70]) = (f32::NAN, f32::INFINITY);
        let quantized = |level, x: &[f32]| {
            let mut q = QuantizedRows::default();
            let writer = q.resize(1, 320);
            // SAFETY: the row is alive and written once.
            unsafe { writer.write_at(level, 0, x, 1.5) };
            // The quants of a block whose scale is not a number are anything.
            let quants = (0..320).filter(|i| q.scale[i / BLOCK].is_finite()).map(|i| (q.high[i], q.low[i]));
            let bits = |v: &[f32]| v.iter().map(|x| if x.is_nan() { 1 } else { x.to_bits() }).collect::<Vec<_>>();
            (quants.collect::<Vec<_>>(), bits(&q.scale), bits(&q.coarse_scale), bits(&q.sum), q.fine.clone())
        };
        let fine = quantized(Level::Portable, &sound).4[0].count_ones();
        assert!(fine > 0 && fine < 10, "some of the blocks are fine: {fine}");
        assert_eq!(quantized(Level::Portable, &broken).1.iter().filter(|bits| **bits == 1).count(), 2);
        for (level, x) in Level::all().flat_map(|level| [(level, &sound), (level, &broken)]) {
            assert_eq!(quantized(level, x), quantized(Level::Portable, x), "{level:?}");
        }
    }

    #[test]
    fn an_outlier_makes_its_block_fine_and_no_other() {
        let mut x: Vec<f32> = (0..96).map(|i| (i as f32 * 0.7).sin()).collect();
        x[40] = 500.0;
        let q = QuantizedRows::of(&x, 96, 4.0);
        let row = q.row(0);
        assert_eq!(row.fine[0] & 2, 2);
        for (col, x) in x.iter().enumerate() {
            let step =
                f64::from(row.scale[col / BLOCK]) * if row.fine[0] >> (col / BLOCK) & 1 == 1 { 1.0 } else { 128.0 };
            assert!((q.value(0, col) - f64::from(*x)).abs() <= 0.51 * step, "{col}");
        }
    }

    #[test]
    fn what_is_broken_does_not_look_like_zeros() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; 64];
            x[3] = bad;
            let q = QuantizedRows::of(&x, 64, 0.0);
            assert!(q.row(0).scale[0].is_nan() && q.row(0).sum[0].is_nan() && q.row(0).scale[1] == 1.0 / LARGEST_FINE);
        }
    }
}
