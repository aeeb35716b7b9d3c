//! The frozen layers of a pass, `y = x W^T + b`. Forward by the kernels that serve, or in float32 from dequantised weights, which is the
//! reference; backward dL/dx = dL/dy W in float32, and never dL/dW. Where an adapter has a copy of the base's matrix, that takes its place, in
//! float32 both ways. Between pieces, training gives way to serving.

use std::ops::Range;

use rayon::prelude::*;

use super::buffers::Buffer;
use super::{PIECE_MACS, Products, Scope};
use crate::arch::decoder::{SiteId, Slot};
use crate::kernels::cpu::{self, GROUP_ROWS, Linear, Next, RowGroup, Team};
use crate::kernels::gemm::{Mat, Out, mul, mul_nt, mul_tn};
use crate::kernels::packed::PackedMatrix;
use crate::sync::lock;

/// A matrix, `[out, in]`.
#[derive(Debug, Clone, Copy)]
pub(super) enum Weight<'m> {
    /// The base's.
    Frozen(&'m PackedMatrix),
    /// What takes its place.
    Copy { values: &'m [f32], cols: usize },
}

impl Weight<'_> {
    pub(super) fn rows(&self) -> usize {
        match self {
            Self::Frozen(matrix) => matrix.rows(),
            Self::Copy { values, cols } => values.len() / cols,
        }
    }

    pub(super) fn cols(&self) -> usize {
        match self {
            Self::Frozen(matrix) => matrix.cols(),
            Self::Copy { cols, .. } => *cols,
        }
    }
}

/// A matrix and what is added to its products, `[out]`.
type Layer<'m> = (Weight<'m>, Option<&'m [f32]>);

/// A frozen matrix, what is added to its products, and where they go.
type Served<'m, 'y> = (&'m PackedMatrix, Option<&'m [f32]>, &'y mut [f32]);

/// Multiply-adds that the serving kernels take for each that float32 takes in the same time, at least.
const SERVED_TIMES: usize = 4;

impl Scope<'_> {
    /// The matrix of a linear layer.
    pub(super) fn weight(&self, site: SiteId) -> Weight<'_> {
        self.copy_or(Slot::Matrix(site), self.model.matrix(site))
    }

    /// The bias of a linear layer, `[out]`.
    pub(super) fn bias(&self, site: SiteId) -> Option<&[f32]> {
        self.copy_of(Slot::Bias(site)).or(self.model.bias(site))
    }

    /// The output matrix.
    pub(super) fn head(&self) -> Weight<'_> {
        self.copy_or(self.model.head_slot(), self.model.head())
    }

    fn copy_or<'m>(&'m self, slot: Slot, matrix: &'m PackedMatrix) -> Weight<'m> {
        match self.copy_of(slot) {
            Some(values) => Weight::Copy { values, cols: matrix.cols() },
            None => Weight::Frozen(matrix),
        }
    }

    /// Runs `f(first row, rows in float32)` over pieces of `w` so small that `rows` activations against one take about [`PIECE_MACS`].
    pub(super) fn pieces(&self, w: Weight<'_>, rows: usize, mut f: impl FnMut(usize, &[f32])) {
        let (piece, cols) = (piece_of(w, rows), w.cols());
        let mut dense = self.take(if let Weight::Frozen(_) = w { piece * cols } else { 0 });
        for from in (0..w.rows()).step_by(piece) {
            let count = piece.min(w.rows() - from);
            match w {
                Weight::Frozen(w) => {
                    let dense = &mut dense[..count * cols];
                    dense.par_chunks_mut(16 * cols).enumerate().for_each(|(i, rows)| w.dequantize(from + 16 * i, rows));
                    f(from, dense);
                }
                Weight::Copy { values, .. } => f(from, &values[from * cols..(from + count) * cols]),
            }
            self.yield_to_serving();
        }
    }

    /// Computes the layers of these sites, which share the input `x` `[rows, in]`, whose values stay as they are; gives `[rows, out]` of each.
    pub(super) fn frozen(&self, x: &mut [f32], sites: Range<SiteId>) -> Vec<Buffer> {
        let layers: Vec<Layer<'_>> = sites.map(|site| (self.weight(site), self.bias(site))).collect();
        self.products(x, &layers)
    }

    /// As [`Scope::frozen`], of any layers.
    pub(super) fn products(&self, x: &mut [f32], layers: &[Layer<'_>]) -> Vec<Buffer> {
        let rows = x.len() / layers[0].0.cols();
        let mut products: Vec<Buffer> = layers.iter().map(|(matrix, _)| self.take(rows * matrix.rows())).collect();
        let mut served: Vec<Served<'_, '_>> = Vec::new();
        for ((matrix, bias), y) in layers.iter().zip(&mut products) {
            match (matrix, self.options.products) {
                (Weight::Frozen(matrix), Products::Served) => served.push((matrix, *bias, y)),
                _ => self.exact(x, (*matrix, *bias), y),
            }
        }
        if !served.is_empty() {
            self.served(x, &mut served);
        }
        products
    }

    fn served(&self, x: &mut [f32], layers: &mut [Served<'_, '_>]) {
        let width = layers[0].0.cols();
        let macs_a_row: usize = layers.iter().map(|(matrix, ..)| matrix.rows() * width).sum();
        let most = served_rows(macs_a_row);
        let mut quantized = lock(&self.workspace.quantized);
        let quantized = quantized.get_or_insert_with(|| cpu::QuantizedRows::new(self.model.formats()));
        let mut from = 0;
        for x in x.chunks_mut(most * width) {
            let rows = x.len() / width;
            let group = |first| RowGroup { first, count: GROUP_ROWS.min(rows - first), adapter: None };
            let groups: Vec<RowGroup> = (0..rows).step_by(GROUP_ROWS).map(group).collect();
            cpu::prepare(Team::get(), &groups, (x, width), quantized, None, |_, _| {});
            let parts = layers.iter_mut().map(|(matrix, bias, y)| {
                let y = &mut y[from * matrix.rows()..(from + rows) * matrix.rows()];
                Linear { matrix, bias: *bias, y, accumulate: false }
            });
            let mut linears: Vec<Linear<'_>> = parts.collect();
            cpu::linear(Team::get(), quantized, &mut linears, None, Next::default());
            from += rows;
            self.yield_to_serving();
        }
    }

    fn exact(&self, x: &[f32], (w, bias): Layer<'_>, y: &mut [f32]) {
        let x = Mat::dense(x, w.cols());
        self.pieces(w, x.rows(), |from, dense| {
            let y = Out { data: &mut y[from..], stride: w.rows(), accumulate: false };
            mul_nt(y, x, Mat::dense(dense, w.cols()), true);
        });
        if let Some(bias) = bias {
            y.chunks_exact_mut(bias.len()).for_each(|y| y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias));
        }
    }

    /// Adds the gradient of a matrix's input, `dy W`, to `dx` `[rows, in]`. `dy`: `[rows, out]`.
    pub(super) fn frozen_backward(&self, w: Weight<'_>, dy: &[f32], dx: &mut [f32]) {
        let rows = dy.len() / w.rows();
        self.pieces(w, rows, |from, dense| {
            let dy = Mat::new(&dy[from..], rows, dense.len() / w.cols(), w.rows());
            mul(Out { data: dx, stride: w.cols(), accumulate: true }, dy, Mat::dense(dense, w.cols()), true);
        });
    }

    /// Adds the gradient of a copy, `dy^T x`, to `dw` `[out, in]`. `dy`: `[rows, out]`, `x`: `[rows, in]`.
    pub(super) fn copy_backward(&self, w: Weight<'_>, x: &[f32], dy: &[f32], dw: &mut [f32]) {
        let (rows, out, cols) = (dy.len() / w.rows(), w.rows(), w.cols());
        let piece = piece_of(w, rows);
        for (i, dw) in dw.chunks_mut(piece * cols).enumerate() {
            let dy = Mat::new(&dy[i * piece..], rows, dw.len() / cols, out);
            mul_tn(Out { data: dw, stride: cols, accumulate: true }, dy, Mat::dense(x, cols), true);
            self.yield_to_serving();
        }
    }
}

/// Rows of a matrix that are dequantised at a time to be multiplied with so many rows.
pub(super) fn piece_of(w: Weight<'_>, rows: usize) -> usize {
    (PIECE_MACS / (w.cols() * rows.max(1))).max(1).next_multiple_of(64).min(w.rows()).min(4096)
}

/// Rows that layers of so many weights in all are multiplied with by the serving kernels at a time.
pub(super) fn served_rows(weights: usize) -> usize {
    (SERVED_TIMES * PIECE_MACS / weights).max(1).next_multiple_of(64)
}
