//! Activations for the quantised matmul: each row by itself, in blocks of 32, in 15 bits as two bytes a value.
//!
//! A block's values are `scale * (128 * high + low)`. Not one byte a value: a few huge activations take the range of their block, and what
//! that does to log-probabilities the parity gate takes for an adapter that is served otherwise than it was trained (`docs/LOG.md`).

use super::simd::{LANES, Level, Simd, dispatch};
use crate::kernels::blocks::BLOCK;

/// The largest quantised value.
const LARGEST: f32 = 127.0 * 128.0;

/// Quantised rows `[rows, cols]`.
#[derive(Debug, Default)]
pub struct QuantizedRows {
    rows: usize,
    blocks: usize,
    high: Vec<i8>,
    low: Vec<i8>,
    /// Of each block.
    scale: Vec<f32>,
    /// The sum of the block's values.
    sum: Vec<f32>,
}

/// One row, to be read.
#[derive(Debug, Clone, Copy)]
pub(super) struct QRow<'a> {
    pub high: &'a [[i8; BLOCK]],
    pub low: &'a [[i8; BLOCK]],
    pub scale: &'a [f32],
    pub sum: &'a [f32],
}

/// All rows, to be written by several threads, each its own.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowWriter {
    rows: usize,
    blocks: usize,
    high: *mut i8,
    low: *mut i8,
    scale: *mut f32,
    sum: *mut f32,
}

// SAFETY: `write` is unsafe and asks that no two threads write the same row.
unsafe impl Send for RowWriter {}
// SAFETY: as above.
unsafe impl Sync for RowWriter {}

impl QuantizedRows {
    /// Makes room for `rows` rows, reusing the buffers. `cols` is a multiple of 32.
    pub(super) fn resize(&mut self, rows: usize, cols: usize) -> RowWriter {
        let blocks = cols / BLOCK;
        (self.rows, self.blocks) = (rows, blocks);
        self.high.resize(rows * cols, 0);
        self.low.resize(rows * cols, 0);
        for buffer in [&mut self.scale, &mut self.sum] {
            buffer.resize(rows * blocks, 0.0);
        }
        RowWriter {
            rows,
            blocks,
            high: self.high.as_mut_ptr(),
            low: self.low.as_mut_ptr(),
            scale: self.scale.as_mut_ptr(),
            sum: self.sum.as_mut_ptr(),
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
            sum: &self.sum[at..][..n],
        }
    }
}

impl RowWriter {
    /// Quantises `x` as row `row`.
    ///
    /// # Safety
    /// The rows this was made of are alive, and nobody else reads or writes this one.
    pub unsafe fn write(&self, row: usize, x: &[f32]) {
        // SAFETY: the caller vouches for it.
        unsafe { self.write_at(Level::best(), row, x) };
    }

    /// # Safety
    /// As of [`RowWriter::write`].
    unsafe fn write_at(&self, level: Level, row: usize, x: &[f32]) {
        assert!(row < self.rows && x.len() == self.blocks * BLOCK, "a row fits");
        let (at, n) = (row * self.blocks, self.blocks);
        // SAFETY: the row lies within the buffers, which were made for `rows` rows, and is ours.
        let mut to = unsafe {
            Place {
                high: std::slice::from_raw_parts_mut(self.high.add(at * BLOCK), n * BLOCK),
                low: std::slice::from_raw_parts_mut(self.low.add(at * BLOCK), n * BLOCK),
                scale: std::slice::from_raw_parts_mut(self.scale.add(at), n),
                sum: std::slice::from_raw_parts_mut(self.sum.add(at), n),
            }
        };
        let to = &mut to;
        dispatch!(level, quantize, x: &[f32], to: &mut Place<'_>);
    }
}

/// Where a quantised row goes.
struct Place<'a> {
    high: &'a mut [i8],
    low: &'a mut [i8],
    scale: &'a mut [f32],
    sum: &'a mut [f32],
}

#[inline(always)]
fn quantize<S: Simd>(s: S, x: &[f32], to: &mut Place<'_>) {
    let quants = to.high.as_chunks_mut::<BLOCK>().0.iter_mut().zip(to.low.as_chunks_mut::<BLOCK>().0);
    for (b, (x, (high, low))) in x.as_chunks::<BLOCK>().0.iter().zip(quants).enumerate() {
        let halves = x.as_chunks::<LANES>().0;
        let x = [s.load(&halves[0]), s.load(&halves[1])];
        let largest = f32::from_bits(s.largest(x));
        let inverse = if largest > 0.0 { LARGEST / largest } else { 0.0 };
        let sum = s.split(x, inverse, high, low);
        // What is broken must not look like zeros.
        let unit = if largest.is_finite() { largest / LARGEST } else { f32::NAN };
        to.scale[b] = unit;
        to.sum[b] = unit * sum as f32;
    }
}

#[cfg(test)]
impl QuantizedRows {
    /// Quantises whole rows on this thread.
    pub fn of(x: &[f32], cols: usize) -> Self {
        let mut q = Self::default();
        let writer = q.resize(x.len() / cols, cols);
        // SAFETY: the rows are alive and written one by one.
        x.chunks_exact(cols).enumerate().for_each(|(row, x)| unsafe { writer.write(row, x) });
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
            unsafe { writer.write_at(level, 0, x) };
            // The quants of a block whose scale is not a number are anything.
            let quants = (0..320).filter(|i| q.scale[i / BLOCK].is_finite()).map(|i| (q.high[i], q.low[i]));
            let bits = |v: &[f32]| v.iter().map(|x| if x.is_nan() { 1 } else { x.to_bits() }).collect::<Vec<_>>();
            (quants.collect::<Vec<_>>(), bits(&q.scale), bits(&q.sum))
        };
        assert_eq!(quantized(Level::Portable, &broken).1.iter().filter(|bits| **bits == 1).count(), 2);
        for (level, x) in Level::all().flat_map(|level| [(level, &sound), (level, &broken)]) {
            assert_eq!(quantized(level, x), quantized(Level::Portable, x), "{level:?}");
        }
    }

    #[test]
    fn values_are_kept_to_half_a_step() {
        let mut x: Vec<f32> = (0..96).map(|i| (i as f32 * 0.7).sin()).collect();
        x[40] = -500.0;
        let q = QuantizedRows::of(&x, 96);
        for (col, x) in x.iter().enumerate() {
            let step = f64::from(q.row(0).scale[col / BLOCK]);
            assert!((q.value(0, col) - f64::from(*x)).abs() <= 0.51 * step, "{col}");
        }
    }

    #[test]
    fn what_is_broken_does_not_look_like_zeros() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; 64];
            x[3] = bad;
            let q = QuantizedRows::of(&x, 64);
            assert!(q.row(0).scale[0].is_nan() && q.row(0).sum[0].is_nan() && q.row(0).scale[1] == 1.0 / LARGEST);
        }
    }
}
