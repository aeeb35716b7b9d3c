//! The frozen matrices under autograd: `y = x W^T`, with or without an adapter on top, and, at the head, log-probabilities. Weights are
//! dequantised piece by piece per call; the backward gives dL/dx and never dL/dW. Between pieces, training gives way to serving.

use std::borrow::Cow;
use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::Model;
use super::autograd::{PIECE_MACS, slice, to_vec};
use crate::arch::decoder::SiteId;
use crate::device::YieldPoint;
use crate::kernels::gemm::{Mat, Out, mul, mul_nt, mul_tn};
use crate::kernels::packed::PackedMatrix;
use crate::random::{Purpose, Stream};
use crate::sync::lock;

/// Runs `f(first row, dequantised rows)` over pieces of `w` small enough that `rows` activations against one take about [`PIECE_MACS`].
fn pieces(w: &PackedMatrix, rows: usize, compute: &YieldPoint, mut f: impl FnMut(usize, &[f32])) {
    let piece = (PIECE_MACS / (w.cols() * rows.max(1))).max(1).next_multiple_of(64).min(w.rows().min(4096));
    let mut dense = vec![0.0; piece * w.cols()];
    for from in (0..w.rows()).step_by(piece) {
        let count = piece.min(w.rows() - from);
        let dense = &mut dense[..count * w.cols()];
        dense.par_chunks_mut(16 * w.cols()).enumerate().for_each(|(i, rows)| w.dequantize(from + 16 * i, rows));
        f(from, dense);
        compute.yield_to_serving();
    }
}

/// `y = x W^T + b` at a site. x: `[rows, in]`, y: `[rows, out]`.
pub(super) struct FrozenLinear {
    pub model: Arc<Model>,
    pub site: SiteId,
    pub compute: YieldPoint,
}

impl FrozenLinear {
    fn forward(&self, x: &[f32]) -> Vec<f32> {
        let w = self.model.matrix(self.site);
        let x = Mat::dense(x, w.cols());
        let mut y = vec![0.0; x.rows() * w.rows()];
        pieces(w, x.rows(), &self.compute, |from, dense| {
            mul_nt(
                Out { data: &mut y[from..], stride: w.rows(), accumulate: false },
                x,
                Mat::dense(dense, w.cols()),
                true,
            );
        });
        if let Some(bias) = self.model.bias(self.site) {
            y.chunks_exact_mut(bias.len()).for_each(|y| y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias));
        }
        y
    }

    fn backward(&self, dy: &[f32]) -> Vec<f32> {
        let w = self.model.matrix(self.site);
        let rows = dy.len() / w.rows();
        let mut dx = vec![0.0; rows * w.cols()];
        pieces(w, rows, &self.compute, |from, dense| {
            let count = dense.len() / w.cols();
            let dy = Mat::new(&dy[from..], rows, count, w.rows());
            mul(Out { data: &mut dx, stride: w.cols(), accumulate: true }, dy, Mat::dense(dense, w.cols()), true);
        });
        dx
    }
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = self.forward(slice(x, layout)?);
        let rows = layout.dims()[0];
        let shape = (rows, y.len() / rows).into();
        Ok((CpuStorage::F32(y), shape))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Tensor::from_vec(self.backward(&to_vec(dy)?), x.shape(), x.device()).map(Some)
    }
}

/// Dropout on the adapter's input: masks are a function of (seed, step, site, element) by Philox.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// The share of the inputs that are set to zero.
    pub rate: f32,
    /// What is dropped is a function of the seed and the place.
    pub seed: u64,
    /// Counts forward passes of the training.
    pub step: u64,
}

impl Dropout {
    /// x times 0 or 1 / (1 - rate), element by element.
    fn apply(&self, site: SiteId, x: &mut [f32]) {
        let stream = Stream::new(self.seed, Purpose::Dropout);
        let place = (self.step << 16) + site as u64;
        let keep = 1.0 / (1.0 - self.rate);
        x.par_iter_mut().with_min_len(4096).enumerate().for_each(|(i, x)| {
            *x *= if stream.uniform(place, i as u32) < self.rate { 0.0 } else { keep };
        });
    }
}

/// The frozen layer and an adapter on top as one node: `y = x W^T + scale * (drop(x) A^T) B^T`, with gradients of x, A and B. Kept
/// are x and y alone; A: `[rank, in]`, B: `[out, rank]`.
pub(super) struct AdaptedLinear {
    pub frozen: FrozenLinear,
    pub scale: f32,
    pub dropout: Option<Dropout>,
}

impl AdaptedLinear {
    /// The adapter's input, and scale * input A^T, `[rows, rank]`.
    fn shrink<'x>(&self, x: &'x [f32], a: &[f32]) -> (Cow<'x, [f32]>, Vec<f32>) {
        let width = self.frozen.model.matrix(self.frozen.site).cols();
        let mut input = Cow::Borrowed(x);
        if let Some(dropout) = self.dropout {
            dropout.apply(self.frozen.site, input.to_mut());
        }
        let rank = a.len() / width;
        let mut shrunk = vec![0.0; x.len() / width * rank];
        let out = Out { data: &mut shrunk, stride: rank, accumulate: false };
        mul_nt(out, Mat::dense(&input, width), Mat::dense(a, width), true);
        shrunk.iter_mut().for_each(|h| *h *= self.scale);
        (input, shrunk)
    }
}

impl CustomOp3 for AdaptedLinear {
    fn name(&self) -> &'static str {
        "adapted-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        l1: &Layout,
        a: &CpuStorage,
        l2: &Layout,
        b: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, a, b) = (slice(x, l1)?, slice(a, l2)?, slice(b, l3)?);
        let (out, rank) = l3.shape().dims2()?;
        let mut y = self.frozen.forward(x);
        let (_, shrunk) = self.shrink(x, a);
        mul_nt(
            Out { data: &mut y, stride: out, accumulate: true },
            Mat::dense(&shrunk, rank),
            Mat::dense(b, rank),
            true,
        );
        self.frozen.compute.yield_to_serving();
        Ok((CpuStorage::F32(y), (l1.dims()[0], out).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (xs, av, bv, dy) = (to_vec(x)?, to_vec(a)?, to_vec(b)?, to_vec(dy)?);
        let ((out, rank), width) = (b.dims2()?, x.dims()[1]);
        let mut dx = self.frozen.backward(&dy);
        let dy = Mat::dense(&dy, out);
        let (input, shrunk) = self.shrink(&xs, &av);
        let mut db = vec![0.0; bv.len()];
        mul_tn(Out { data: &mut db, stride: rank, accumulate: false }, dy, Mat::dense(&shrunk, rank), true);
        let mut dshrunk = vec![0.0; shrunk.len()];
        mul(Out { data: &mut dshrunk, stride: rank, accumulate: false }, dy, Mat::dense(&bv, rank), true);
        dshrunk.iter_mut().for_each(|d| *d *= self.scale);
        let (dshrunk, av) = (Mat::dense(&dshrunk, rank), Mat::dense(&av, width));
        let mut da = vec![0.0; rank * width];
        mul_tn(Out { data: &mut da, stride: width, accumulate: false }, dshrunk, Mat::dense(&input, width), true);
        match self.dropout {
            None => mul(Out { data: &mut dx, stride: width, accumulate: true }, dshrunk, av, true),
            Some(dropout) => {
                let mut dinput = vec![0.0; dx.len()];
                mul(Out { data: &mut dinput, stride: width, accumulate: false }, dshrunk, av, true);
                dropout.apply(self.frozen.site, &mut dinput);
                dx.iter_mut().zip(dinput).for_each(|(dx, d)| *dx += d);
            }
        }
        self.frozen.compute.yield_to_serving();
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device()).map(Some);
        Ok((tensor(dx, x)?, tensor(da, a)?, tensor(db, b)?))
    }
}

/// `ln softmax(x W^T)[target]` at the head, without ever holding all logits: the log-sum-exp runs over pieces of the vocabulary.
/// x: `[rows, width]`; the result: `[rows]`.
pub(super) struct TokenLogprobs {
    model: Arc<Model>,
    targets: Vec<u32>,
    compute: YieldPoint,
    /// Of each row, kept from the forward for the backward.
    log_sum_exp: Mutex<Vec<f32>>,
    /// What the forward has found.
    is_greedy: Arc<Mutex<Vec<bool>>>,
}

/// What is known of a row's logits so far.
#[derive(Debug, Clone, Copy)]
struct RowLogits {
    largest: f32,
    /// The first id with the largest logit.
    best: usize,
    /// Sum of the exponentials of the logits less the largest.
    sum: f64,
    of_target: f32,
}

impl TokenLogprobs {
    /// One target a row. The forward says in the second part whether each is the most likely id of its row.
    pub fn new(model: Arc<Model>, targets: Vec<u32>, compute: YieldPoint) -> (Self, Arc<Mutex<Vec<bool>>>) {
        let is_greedy = Arc::<Mutex<Vec<bool>>>::default();
        (Self { model, targets, compute, log_sum_exp: Mutex::default(), is_greedy: is_greedy.clone() }, is_greedy)
    }

    /// Runs `f(first id, logits [rows, ids], their weights)` over the vocabulary.
    fn logits(&self, x: &[f32], mut f: impl FnMut(usize, &mut [f32], Mat<'_>)) {
        let head = self.model.head();
        let rows = self.targets.len();
        let mut logits = Vec::new();
        pieces(head, rows, &self.compute, |from, dense| {
            let count = dense.len() / head.cols();
            let weights = Mat::dense(dense, head.cols());
            logits.resize(rows * count, 0.0);
            let out = Out { data: &mut logits, stride: count, accumulate: false };
            mul_nt(out, Mat::dense(x, head.cols()), weights, true);
            self.model.config().logits.apply(&mut logits);
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
        let mut state = vec![RowLogits { largest: f32::NEG_INFINITY, best: 0, sum: 0.0, of_target: 0.0 }; rows];
        self.logits(x, |from, logits, _| {
            let count = logits.len() / rows;
            let of_row = logits.par_chunks_exact(count).zip(&mut state).zip(&self.targets);
            of_row.for_each(|((logits, row), target)| {
                let top = logits.iter().fold(row.largest, |a, &b| a.max(b));
                if top > row.largest {
                    row.best = from + logits.iter().position(|logit| *logit == top).unwrap_or_default();
                }
                row.sum *= f64::from((row.largest - top).exp());
                row.sum += logits.iter().map(|l| f64::from((l - top).exp())).sum::<f64>();
                row.largest = top;
                if let Some(logit) = (*target as usize).checked_sub(from).and_then(|i| logits.get(i)) {
                    row.of_target = *logit;
                }
            });
        });
        let lse: Vec<f32> = state.iter().map(|row| (f64::from(row.largest) + row.sum.ln()) as f32).collect();
        let logprobs = state.iter().zip(&lse).map(|(row, lse)| row.of_target - lse).collect();
        let is_greedy = state.iter().zip(&self.targets).map(|(row, target)| row.best == *target as usize).collect();
        *lock(&self.is_greedy) = is_greedy;
        *lock(&self.log_sum_exp) = lse;
        Ok((CpuStorage::F32(logprobs), rows.into()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (values, dy) = (to_vec(x)?, to_vec(dy)?);
        let (rows, width) = x.dims2()?;
        let (lse, config) = (lock(&self.log_sum_exp), self.model.config().logits);
        let mut dx = vec![0.0; values.len()];
        self.logits(&values, |from, logits, weights| {
            let count = logits.len() / rows;
            let of_row = logits.par_chunks_exact_mut(count).zip(&*lse).zip(self.targets.par_iter().zip(&dy));
            of_row.for_each(|((logits, lse), (target, dy))| {
                let before = (!config.is_plain()).then(|| logits.to_vec());
                for logit in logits.iter_mut() {
                    *logit = -dy * (*logit - lse).exp();
                }
                if let Some(logit) = (*target as usize).checked_sub(from).and_then(|i| logits.get_mut(i)) {
                    *logit += dy;
                }
                if let Some(before) = before {
                    config.backward(&before, logits);
                }
            });
            let dlogits = Mat::dense(logits, count);
            mul(Out { data: &mut dx, stride: width, accumulate: true }, dlogits, weights, true);
        });
        Tensor::from_vec(dx, (rows, width), x.device()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    /// One node with its own backward against candle's operations around the frozen layer, with and without dropout.
    #[test]
    fn an_adapted_layer_is_the_sum_of_its_parts() {
        let (model, _) = Model::tiny(1);
        // The last layer's down_proj.
        let site = model.decoder().sites.len() - 1;
        let (inputs, outputs, rank, rows) = (96, 64, 3, 10);
        let sinusoid = |shape: (usize, usize), step: f32| {
            let values: Vec<f32> = (0..shape.0 * shape.1).map(|i| (i as f32 * step).sin()).collect();
            Var::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        let (x, a, b) = (sinusoid((rows, inputs), 0.7), sinusoid((rank, inputs), 0.3), sinusoid((outputs, rank), 1.1));
        let weights = sinusoid((rows, outputs), 0.21);
        let frozen = || FrozenLinear { model: model.clone(), site, compute: YieldPoint::default() };
        for dropout in [None, Some(Dropout { rate: 0.4, seed: 3, step: 5 })] {
            let mut mask = vec![1.0; rows * inputs];
            dropout.iter().for_each(|dropout| dropout.apply(site, &mut mask));
            assert_eq!(mask.contains(&0.0), dropout.is_some());
            let mask = Tensor::from_vec(mask, (rows, inputs), &Device::Cpu).unwrap();
            let ours = x.apply_op3(&a, &b, AdaptedLinear { frozen: frozen(), scale: 0.5, dropout }).unwrap();
            let shrunk = ((x.as_tensor() * mask).unwrap().matmul(&a.t().unwrap()).unwrap() * 0.5).unwrap();
            let plain = (x.apply_op1(frozen()).unwrap() + shrunk.matmul(&b.t().unwrap()).unwrap()).unwrap();
            let close = |a: &Tensor, b: &Tensor| {
                let difference = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                assert!(difference < 1e-4, "{difference}");
            };
            close(&ours, &plain);
            let gradients = |y: &Tensor| (y * weights.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
            let (ours, plain) = (gradients(&ours), gradients(&plain));
            for var in [&x, &a, &b] {
                close(ours.get(var).unwrap(), plain.get(var).unwrap());
            }
        }
    }
}
