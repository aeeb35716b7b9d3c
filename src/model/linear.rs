//! The frozen matrices under autograd: `y = x W^T` and, at the head, log-probabilities. Weights are dequantised piece by piece per
//! call; the backward gives dL/dx and never dL/dW. Between pieces, training gives way to serving.

use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::Model;
use super::autograd::{PIECE_MACS, give_way, slice, to_vec};
use crate::adapter::Site;
use crate::device::TrainPermit;
use crate::kernels::blocks::QMatrixRef;
use crate::kernels::gemm::{Mat, Out, mul, mul_nt};

/// Runs `f(first row, dequantised rows)` over pieces of `w` small enough that `rows` activations against one take about [`PIECE_MACS`].
fn pieces(w: QMatrixRef<'_>, rows: usize, permit: &Option<Arc<TrainPermit>>, mut f: impl FnMut(usize, &[f32])) {
    let piece = (PIECE_MACS / (w.cols * rows.max(1))).max(1).next_multiple_of(64).min(w.rows.min(4096));
    let mut dense = vec![0.0; piece * w.cols];
    for from in (0..w.rows).step_by(piece) {
        let count = piece.min(w.rows - from);
        let dense = &mut dense[..count * w.cols];
        dense.par_chunks_mut(16 * w.cols).enumerate().for_each(|(i, rows)| w.dequantize(from + 16 * i, rows));
        f(from, dense);
        give_way(permit);
    }
}

/// `y = x W^T` at a site. x: `[rows, in]`, y: `[rows, out]`.
pub(super) struct FrozenLinear {
    pub model: Arc<Model>,
    pub site: Site,
    pub permit: Option<Arc<TrainPermit>>,
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let w = self.model.matrix(self.site);
        let x = Mat::dense(slice(x, layout)?, w.cols);
        let rows = layout.dims()[0];
        let mut y = vec![0.0; rows * w.rows];
        pieces(w, rows, &self.permit, |from, dense| {
            mul_nt(Out { data: &mut y[from..], stride: w.rows, accumulate: false }, x, Mat::dense(dense, w.cols), true);
        });
        Ok((CpuStorage::F32(y), (rows, w.rows).into()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let w = self.model.matrix(self.site);
        let rows = x.dims()[0];
        let dy = to_vec(dy)?;
        let mut dx = vec![0.0; rows * w.cols];
        pieces(w, rows, &self.permit, |from, dense| {
            let count = dense.len() / w.cols;
            let dy = Mat::new(&dy[from..], rows, count, w.rows);
            mul(Out { data: &mut dx, stride: w.cols, accumulate: true }, dy, Mat::dense(dense, w.cols), true);
        });
        Tensor::from_vec(dx, (rows, w.cols), x.device()).map(Some)
    }
}

/// ln softmax(x W^T)[target] at the head, without ever holding all logits: the log-sum-exp runs over pieces of the vocabulary.
/// x: `[rows, width]`; the result: `[rows]`.
pub(super) struct TokenLogprobs {
    model: Arc<Model>,
    targets: Vec<u32>,
    permit: Option<Arc<TrainPermit>>,
    /// Of each row, kept from the forward for the backward.
    log_sum_exp: Mutex<Vec<f32>>,
}

impl TokenLogprobs {
    /// One target a row.
    pub fn new(model: Arc<Model>, targets: Vec<u32>, permit: Option<Arc<TrainPermit>>) -> Self {
        Self { model, targets, permit, log_sum_exp: Mutex::default() }
    }

    /// Runs `f(first id, logits [rows, ids], their weights)` over the vocabulary.
    fn logits(&self, x: &[f32], mut f: impl FnMut(usize, &mut [f32], Mat<'_>)) {
        let head = self.model.head();
        let rows = self.targets.len();
        let mut logits = Vec::new();
        pieces(head, rows, &self.permit, |from, dense| {
            let count = dense.len() / head.cols;
            let weights = Mat::dense(dense, head.cols);
            logits.resize(rows * count, 0.0);
            let out = Out { data: &mut logits, stride: count, accumulate: false };
            mul_nt(out, Mat::dense(x, head.cols), weights, true);
            f(from, &mut logits, weights);
        });
    }
}

impl CustomOp1 for TokenLogprobs {
    fn name(&self) -> &'static str {
        "token-logprobs"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, layout)?;
        let rows = self.targets.len();
        // Of each row so far: the largest logit, the sum of exponentials below it, the target's logit.
        let mut state = vec![(f32::NEG_INFINITY, 0.0f64, 0.0f32); rows];
        self.logits(x, |from, logits, _| {
            let count = logits.len() / rows;
            let of_row = logits.par_chunks_exact(count).zip(&mut state).zip(&self.targets);
            of_row.for_each(|((logits, (largest, sum, chosen)), target)| {
                let top = logits.iter().fold(*largest, |a, &b| a.max(b));
                *sum *= f64::from((*largest - top).exp());
                *sum += logits.iter().map(|l| f64::from((l - top).exp())).sum::<f64>();
                *largest = top;
                if let Some(logit) = (*target as usize).checked_sub(from).and_then(|i| logits.get(i)) {
                    *chosen = *logit;
                }
            });
        });
        let lse: Vec<f32> = state.iter().map(|(largest, sum, _)| (f64::from(*largest) + sum.ln()) as f32).collect();
        let logprobs = state.iter().zip(&lse).map(|((_, _, chosen), lse)| chosen - lse).collect();
        *self.log_sum_exp.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = lse;
        Ok((CpuStorage::F32(logprobs), rows.into()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (values, dy) = (to_vec(x)?, to_vec(dy)?);
        let (rows, width) = x.dims2()?;
        let lse = self.log_sum_exp.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut dx = vec![0.0; values.len()];
        self.logits(&values, |from, logits, weights| {
            let count = logits.len() / rows;
            let of_row = logits.par_chunks_exact_mut(count).zip(&*lse).zip(self.targets.par_iter().zip(&dy));
            of_row.for_each(|((logits, lse), (target, dy))| {
                for logit in logits.iter_mut() {
                    *logit = -dy * (*logit - lse).exp();
                }
                if let Some(logit) = (*target as usize).checked_sub(from).and_then(|i| logits.get_mut(i)) {
                    *logit += dy;
                }
            });
            let dlogits = Mat::dense(logits, count);
            mul(Out { data: &mut dx, stride: width, accumulate: true }, dlogits, weights, true);
        });
        Tensor::from_vec(dx, (rows, width), x.device()).map(Some)
    }
}
