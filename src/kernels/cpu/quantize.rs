//! Activations for the quantised matmul: each row by itself, in blocks of 32, in 15 bits as two bytes a value.
//!
//! A block's values are `scale * (128 * high + low)`. Not one byte a value: a few huge activations take the range of their block, and what
//! that does to log-probabilities the parity gate takes for an adapter that is served otherwise than it was trained (`docs/LOG.md`).

use super::simd::{LANES, Level, Simd, dispatch};
use crate::kernels::blocks::BLOCK;

/// The largest quantised value.
const LARGEST: f32 = 127.0 * 128.0;

/// Rows of a panel.
pub(super) const PANEL: usize = 8;

/// A block of 32 columns of a panel's rows, as the matmul reads them: one stream of memory for all of its rows.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct PanelBlock {
    /// Of each row the high bytes and the low ones.
    pub quants: [[[i8; BLOCK]; 2]; PANEL],
    pub scale: [f32; PANEL],
    /// The sum of the block's values.
    pub sum: [f32; PANEL],
}

const EMPTY: PanelBlock = PanelBlock { quants: [[[0; BLOCK]; 2]; PANEL], scale: [0.0; PANEL], sum: [0.0; PANEL] };

/// Quantised rows `[rows, cols]`, in panels of 8 rows, the last one filled up.
#[derive(Debug, Default)]
pub struct QuantizedRows {
    rows: usize,
    blocks: usize,
    /// `[panels, blocks]`.
    panels: Vec<PanelBlock>,
}

/// All rows, to be written by several threads, each its own.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowWriter {
    rows: usize,
    blocks: usize,
    panels: *mut PanelBlock,
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
        self.panels.resize(rows.div_ceil(PANEL) * blocks, EMPTY);
        RowWriter { rows, blocks, panels: self.panels.as_mut_ptr() }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.blocks * BLOCK
    }

    /// The blocks of rows `8 i..8 i + 8`.
    #[inline(always)]
    pub(super) fn panel(&self, i: usize) -> &[PanelBlock] {
        &self.panels[i * self.blocks..][..self.blocks]
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
        // SAFETY: the row lies within the panels, which were made for `rows` rows, and is ours.
        let to = unsafe { Place { blocks: self.panels.add(row / PANEL * self.blocks), row: row % PANEL } };
        dispatch!(level, quantize, x: &[f32], to: Place);
    }
}

/// Where a quantised row goes: a panel's blocks, of which this row alone is ours.
#[derive(Clone, Copy)]
struct Place {
    blocks: *mut PanelBlock,
    row: usize,
}

#[inline(always)]
fn quantize<S: Simd>(s: S, x: &[f32], to: Place) {
    for (b, x) in x.as_chunks::<BLOCK>().0.iter().enumerate() {
        let halves = x.as_chunks::<LANES>().0;
        let x = [s.load(&halves[0]), s.load(&halves[1])];
        let largest = f32::from_bits(s.largest(x));
        let inverse = if largest > 0.0 { LARGEST / largest } else { 0.0 };
        // What is broken must not look like zeros.
        let unit = if largest.is_finite() { largest / LARGEST } else { f32::NAN };
        // SAFETY: the panel has as many blocks as the row, and within them the row's places are ours.
        unsafe {
            let block = to.blocks.add(b);
            let [high, low] = &mut (*block).quants[to.row];
            let sum = s.split(x, inverse, high, low);
            (*block).scale[to.row] = unit;
            (*block).sum[to.row] = unit * sum as f32;
        }
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
        let block = &self.panel(row / PANEL)[col / BLOCK];
        let [high, low] = block.quants[row % PANEL].map(|part| i32::from(part[col % BLOCK]));
        f64::from(block.scale[row % PANEL]) * f64::from(128 * high + low)
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
            let writer = q.resize(PANEL + 2, 320);
            // SAFETY: the rows are alive and written one by one.
            [1, PANEL + 1].into_iter().for_each(|row| unsafe { writer.write_at(level, row, x) });
            let row = |panel: usize| {
                let bits = |x: f32| if x.is_nan() { 1 } else { x.to_bits() };
                // The quants of a block whose scale is not a number are anything.
                let quants = |block: &PanelBlock| block.scale[1].is_finite().then_some(block.quants[1]);
                let blocks = q.panel(panel).iter();
                blocks.map(|block| (quants(block), bits(block.scale[1]), bits(block.sum[1]))).collect::<Vec<_>>()
            };
            assert_eq!(row(0), row(1), "the same row wherever it lies");
            row(0)
        };
        assert_eq!(quantized(Level::Portable, &broken).iter().filter(|(_, scale, _)| *scale == 1).count(), 2);
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
            let step = f64::from(q.panel(0)[col / BLOCK].scale[0]);
            assert!((q.value(0, col) - f64::from(*x)).abs() <= 0.51 * step, "{col}");
        }
    }

    #[test]
    fn what_is_broken_does_not_look_like_zeros() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; 64];
            x[3] = bad;
            let q = QuantizedRows::of(&x, 64);
            let [first, second] = [&q.panel(0)[0], &q.panel(0)[1]];
            assert!(first.scale[0].is_nan() && first.sum[0].is_nan() && second.scale[0] == 1.0 / LARGEST);
        }
    }
}
