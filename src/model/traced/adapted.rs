//! Linear layers as an adapter changes them, forward and backward.
//!
//! - LoRA: `y = x W^T + b + scale * ((drop(x) A^T) B^T + bias)`, b being the base's or a copy that is trained in its place, which all may have.
//! - DoRA: `y = c * (x W^T + scale * (drop(x) A^T) B^T) + b`, c being the magnitudes over the norms of the rows of W + scale * B A. As in PEFT and
//!   the paper's section 4.3, the norms are constants to the gradient.
//! - An adapter that began as a part of the base (PiSSA, OLoRA): W is the base without it, W - scale * B0 A0. Nothing of that part is dropped or
//!   trained.
//! - (IA)3: `y = l * (x W^T + b)` or `y = (l * x) W^T + b`.
//! - Bottleneck: `y = u + act(u down^T + down_bias) up^T + up_bias`, u being `x W^T + b`.
//! - Full fine-tuning: the same with a W and a b of its own.

use std::ops::Range;

use rayon::prelude::*;

use super::buffers::Buffer;
use super::{Scope, add};
use crate::adapter::{Adapter, Bottleneck, LowRank, RowNorms, ScaledSide, Site, SiteDelta};
use crate::arch::decoder::{SiteId, Slot};
use crate::kernels::cpu;
use crate::kernels::gemm::{Mat, Out, mul, mul_nt, mul_tn};
use crate::random::{Purpose, Stream};

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

impl Scope<'_> {
    /// Returns what the pass's adapter has at a site.
    pub(super) fn adapted(&self, site: SiteId) -> Option<&SiteDelta> {
        self.options.adapter?.sites.get(&self.model.site(site))
    }

    /// Returns whether the pass's adapter trains anything of a linear layer.
    pub(super) fn trains(&self, site: SiteId) -> bool {
        self.changes(site) || self.copy_of(Slot::Bias(site)).is_some()
    }

    /// Returns whether the pass's adapter changes what a linear layer's input is multiplied with.
    pub(super) fn changes(&self, site: SiteId) -> bool {
        self.adapted(site).is_some() || self.copy_of(Slot::Matrix(site)).is_some()
    }

    /// Computes linear layers that share the input `x` `[rows, in]`, whose values stay as they are; gives `[rows, out]` of each.
    pub(super) fn linear(&self, x: &mut [f32], sites: Range<SiteId>) -> Vec<Buffer> {
        let scaled = sites.clone().find_map(|site| match self.adapted(site) {
            Some(SiteDelta::Scaled { side: ScaledSide::Input, values }) => Some(values),
            _ => None,
        });
        let mut outputs = match scaled {
            // The only layer of its input.
            Some(by) => self.frozen(&mut self.scaled(x, by), sites.clone()),
            None => self.frozen(x, sites.clone()),
        };
        for (site, y) in sites.zip(&mut outputs) {
            match self.adapted(site) {
                Some(SiteDelta::LowRank(pair)) => {
                    self.add_pair(site, pair, x, y);
                    if pair.magnitude.is_some() {
                        self.scale_rows(site, pair, y);
                    }
                    self.yield_to_serving();
                }
                Some(SiteDelta::Scaled { side: ScaledSide::Output, values }) => multiply(y, values),
                Some(SiteDelta::Bottleneck(bottleneck)) => {
                    self.add_bottleneck(bottleneck, y);
                    self.yield_to_serving();
                }
                Some(SiteDelta::Scaled { side: ScaledSide::Input, .. }) | None => {}
            }
        }
        outputs
    }

    /// From `dy` `[rows, out]` adds the gradients of the adapter's tensors at the site, and that of the input to `dx` `[rows, in]`, where
    /// that is wanted. `x`: the input, needed where there is an adapter.
    pub(super) fn linear_backward(
        &self,
        site: SiteId,
        x: &[f32],
        dy: &[f32],
        dx: Option<&mut [f32]>,
        gradients: &mut Adapter,
    ) {
        let onward = self.delta_backward(site, x, dy, gradients);
        if let Some(dx) = dx {
            self.input_backward(site, dy, onward, dx);
        }
        self.yield_to_serving();
    }

    /// The first half of [`Scope::linear_backward`], after which the input is needed no more: the gradients of the adapter's tensors.
    pub(super) fn delta_backward(&self, site: SiteId, x: &[f32], dy: &[f32], gradients: &mut Adapter) -> Onward<'_> {
        let matrix = self.weight(site);
        let Adapter { sites, copies, .. } = gradients;
        if let Some(db) = copies.get_mut(&Slot::Bias(site)) {
            add_rows(db, dy);
        }
        match (self.adapted(site), sites.get_mut(&self.model.site(site))) {
            (Some(SiteDelta::LowRank(pair)), Some(SiteDelta::LowRank(gradient))) => {
                let d = gradient.magnitude.as_mut().map(|dm| self.magnitude_backward(site, pair, x, dy, dm));
                let pairs = self.pair_backward(site, pair, x, d.as_deref().unwrap_or(dy), gradient);
                Onward::Product { d, pairs }
            }
            (
                Some(SiteDelta::Scaled { side: ScaledSide::Output, values }),
                Some(SiteDelta::Scaled { values: dl, .. }),
            ) => {
                let y = self.frozen(&mut self.copied(x), site..site + 1).swap_remove(0);
                add_products(dl, dy, &y);
                drop(y);
                Onward::Product { d: Some(self.scaled(dy, values)), pairs: Vec::new() }
            }
            (
                Some(SiteDelta::Scaled { side: ScaledSide::Input, values }),
                Some(SiteDelta::Scaled { values: dl, .. }),
            ) => {
                let mut d = self.zeros(x.len());
                self.frozen_backward(matrix, dy, &mut d);
                add_products(dl, &d, x);
                Onward::Scaled { d, by: values }
            }
            (Some(SiteDelta::Bottleneck(bottleneck)), Some(SiteDelta::Bottleneck(gradient))) => {
                let u = self.frozen(&mut self.copied(x), site..site + 1).swap_remove(0);
                let du = self.bottleneck_backward(bottleneck, &u, dy, gradient);
                Onward::Product { d: Some(du), pairs: Vec::new() }
            }
            _ => {
                if let Some(dw) = copies.get_mut(&Slot::Matrix(site)) {
                    self.copy_backward(matrix, x, dy, dw);
                }
                Onward::Product { d: None, pairs: Vec::new() }
            }
        }
    }

    /// The second half: adds the gradient of the input to `dx` `[rows, in]`.
    pub(super) fn input_backward(&self, site: SiteId, dy: &[f32], onward: Onward<'_>, dx: &mut [f32]) {
        let matrix = self.weight(site);
        match onward {
            Onward::Scaled { mut d, by } => {
                multiply(&mut d, by);
                add(dx, &d);
            }
            Onward::Product { d, pairs } => {
                self.frozen_backward(matrix, d.as_deref().unwrap_or(dy), dx);
                let width = matrix.cols();
                for PairGradient { pair, shrunk, dropout } in pairs {
                    let (dshrunk, a) = (Mat::dense(&shrunk, pair.rank), Mat::dense(&pair.a, width));
                    match dropout {
                        None => mul(Out { data: dx, stride: width, accumulate: true }, dshrunk, a, true),
                        Some(dropout) => {
                            let mut dinput = self.take(dx.len());
                            mul(Out { data: &mut dinput, stride: width, accumulate: false }, dshrunk, a, true);
                            dropout.apply(site, &mut dinput);
                            add(dx, &dinput);
                        }
                    }
                }
            }
        }
    }

    /// u down^T + down_bias, `[rows, size]`.
    fn inner(&self, bottleneck: &Bottleneck, u: &[f32]) -> Buffer {
        let (size, width) = (bottleneck.size(), bottleneck.up_bias.len());
        let mut inner = self.take(u.len() / width * size);
        each_row(&mut inner, size, |row| row.copy_from_slice(&bottleneck.down_bias));
        let out = Out { data: &mut inner, stride: size, accumulate: true };
        mul_nt(out, Mat::dense(u, width), Mat::dense(&bottleneck.down, width), true);
        inner
    }

    /// y += act(y down^T + down_bias) up^T + up_bias.
    fn add_bottleneck(&self, bottleneck: &Bottleneck, y: &mut [f32]) {
        let (size, width) = (bottleneck.size(), bottleneck.up_bias.len());
        let mut inner = self.inner(bottleneck, y);
        let ones = self.ones(inner.len());
        cpu::gated(bottleneck.non_linearity.into(), &mut inner, &ones);
        each_row(y, width, |y| y.iter_mut().zip(&bottleneck.up_bias).for_each(|(y, bias)| *y += bias));
        let out = Out { data: y, stride: width, accumulate: true };
        mul_nt(out, Mat::dense(&inner, size), Mat::dense(&bottleneck.up, size), true);
    }

    /// Adds the gradients of a bottleneck's tensors, and gives that of what went in, from that of what came out.
    fn bottleneck_backward(&self, bottleneck: &Bottleneck, u: &[f32], dy: &[f32], gradient: &mut Bottleneck) -> Buffer {
        let (size, width) = (bottleneck.size(), bottleneck.up_bias.len());
        let activation = bottleneck.non_linearity.into();
        let mut inner = self.inner(bottleneck, u);
        let mut activated = self.copied(&inner);
        let mut ones = self.ones(inner.len());
        cpu::gated(activation, &mut activated, &ones);
        let dy_mat = Mat::dense(dy, width);
        add_rows(&mut gradient.up_bias, dy);
        let up = Out { data: &mut gradient.up, stride: size, accumulate: true };
        mul_tn(up, dy_mat, Mat::dense(&activated, size), true);
        let mut d_activated = activated;
        let out = Out { data: &mut d_activated, stride: size, accumulate: false };
        mul(out, dy_mat, Mat::dense(&bottleneck.up, size), true);
        cpu::gated_backward(activation, &mut inner, &mut ones, &d_activated);
        add_rows(&mut gradient.down_bias, &inner);
        let d_inner = Mat::dense(&inner, size);
        let down = Out { data: &mut gradient.down, stride: width, accumulate: true };
        mul_tn(down, d_inner, Mat::dense(u, width), true);
        let mut du = self.copied(dy);
        let out = Out { data: &mut du, stride: width, accumulate: true };
        mul(out, d_inner, Mat::dense(&bottleneck.down, width), true);
        du
    }

    fn ones(&self, len: usize) -> Buffer {
        let mut ones = self.take(len);
        ones.fill(1.0);
        ones
    }

    /// Returns what is taken out of the base at a site.
    fn taken_out(&self, site: SiteId) -> Option<&LowRank> {
        self.options.without?.pair(self.model.site(site))
    }

    /// y += scale * ((drop(x) A^T) B^T + bias), less scale * (x A0^T) B0^T where that is taken out of the base.
    fn add_pair(&self, site: SiteId, pair: &LowRank, x: &[f32], y: &mut [f32]) {
        add_expanded(pair, &self.shrink(pair, pair.scale, &self.dropped(site, x)), y);
        if let Some(bias) = &pair.bias {
            each_row(y, bias.len(), |y| y.iter_mut().zip(bias).for_each(|(y, bias)| *y += pair.scale * bias));
        }
        if let Some(start) = self.taken_out(site) {
            add_expanded(start, &self.shrink(start, -start.scale, x), y);
        }
    }

    /// Adds the gradients of a pair's tensors, from the gradient of what the layer and it add up to. Gives what is left of the backward of
    /// what is taken out of the base, and of the pair.
    fn pair_backward<'p>(
        &'p self,
        site: SiteId,
        pair: &'p LowRank,
        x: &[f32],
        dy: &[f32],
        gradient: &mut LowRank,
    ) -> Vec<PairGradient<'p>> {
        let (rank, scale, matrix) = (pair.rank, pair.scale, self.weight(site));
        let start = self.taken_out(site).map(|start| {
            let shrunk = self.shrunk_gradient(start, -start.scale, dy);
            PairGradient { pair: start, shrunk, dropout: None }
        });
        let input = self.dropped(site, x);
        if let Some(dbias) = &mut gradient.bias {
            let mut sums = vec![0.0; dbias.len()];
            add_rows(&mut sums, dy);
            dbias.iter_mut().zip(sums).for_each(|(d, sum)| *d += scale * sum);
        }
        let shrunk = self.shrink(pair, scale, &input);
        let db = Out { data: &mut gradient.b, stride: rank, accumulate: true };
        mul_tn(db, Mat::dense(dy, matrix.rows()), Mat::dense(&shrunk, rank), true);
        let dshrunk = self.shrunk_gradient(pair, scale, dy);
        let width = matrix.cols();
        let da = Out { data: &mut gradient.a, stride: width, accumulate: true };
        mul_tn(da, Mat::dense(&dshrunk, rank), Mat::dense(&input, width), true);
        let own = PairGradient { pair, shrunk: dshrunk, dropout: self.dropout() };
        start.into_iter().chain([own]).collect()
    }

    /// Multiplies each output but its bias by the magnitude over the norm of its row.
    fn scale_rows(&self, site: SiteId, pair: &LowRank, y: &mut [f32]) {
        let scales = self.row_scales(site, pair);
        let bias = self.bias(site).unwrap_or_default();
        each_row(y, scales.len(), |y| {
            if bias.is_empty() {
                return y.iter_mut().zip(&scales).for_each(|(y, scale)| *y *= scale);
            }
            y.iter_mut().zip(&scales).zip(bias).for_each(|((y, scale), bias)| *y = scale * (*y - bias) + bias);
        });
    }

    /// Adds the gradient of a magnitude, and gives that of the sum it multiplies.
    fn magnitude_backward(&self, site: SiteId, pair: &LowRank, x: &[f32], dy: &[f32], dm: &mut [f32]) -> Buffer {
        let matrix = self.weight(site);
        let mut sum = self.products(&mut self.copied(x), &[(matrix, None)]).swap_remove(0);
        self.add_pair(site, pair, x, &mut sum);
        let mut dc = vec![0.0; dm.len()];
        add_products(&mut dc, dy, &sum);
        let norms = self.norms.get(&self.model.site(site)).map(Vec::as_slice).unwrap_or_default();
        dm.iter_mut().zip(dc).zip(norms).for_each(|((dm, dc), norm)| *dm += dc / norm);
        self.scaled(dy, &self.row_scales(site, pair))
    }

    /// The magnitudes over the norms, `[out]`.
    fn row_scales(&self, site: SiteId, pair: &LowRank) -> Vec<f32> {
        let norms = self.norms.get(&self.model.site(site)).map(Vec::as_slice).unwrap_or_default();
        pair.row_scales(norms).unwrap_or_default()
    }

    pub(super) fn copied(&self, x: &[f32]) -> Buffer {
        let mut copy = self.take(x.len());
        copy.copy_from_slice(x);
        copy
    }

    /// Rows times `by`, element by element.
    fn scaled(&self, x: &[f32], by: &[f32]) -> Buffer {
        let mut scaled = self.copied(x);
        multiply(&mut scaled, by);
        scaled
    }

    fn dropout(&self) -> Option<Dropout> {
        self.options.dropout.filter(|dropout| dropout.rate > 0.0)
    }

    /// The adapter's input.
    fn dropped<'x>(&self, site: SiteId, x: &'x [f32]) -> Input<'x> {
        let Some(dropout) = self.dropout() else { return Input::Whole(x) };
        let mut input = self.copied(x);
        dropout.apply(site, &mut input);
        Input::Dropped(input)
    }

    /// scale * dy B, `[rows, rank]`.
    fn shrunk_gradient(&self, pair: &LowRank, scale: f32, dy: &[f32]) -> Buffer {
        let outputs = pair.b.len() / pair.rank;
        let mut dshrunk = self.take(dy.len() / outputs * pair.rank);
        let out = Out { data: &mut dshrunk, stride: pair.rank, accumulate: false };
        mul(out, Mat::dense(dy, outputs), Mat::dense(&pair.b, pair.rank), true);
        dshrunk.iter_mut().for_each(|d| *d *= scale);
        dshrunk
    }

    /// scale * input A^T, `[rows, rank]`.
    fn shrink(&self, pair: &LowRank, scale: f32, input: &[f32]) -> Buffer {
        let width = pair.a.len() / pair.rank;
        let mut shrunk = self.take(input.len() / width * pair.rank);
        let out = Out { data: &mut shrunk, stride: pair.rank, accumulate: false };
        mul_nt(out, Mat::dense(input, width), Mat::dense(&pair.a, width), true);
        shrunk.iter_mut().for_each(|h| *h *= scale);
        shrunk
    }

    /// Computes the norms of the rows of W + scale * B A of all sites with a magnitude, from the exact weights.
    pub(super) fn row_norms(&self, adapter: &Adapter) -> RowNorms {
        let with_magnitude = adapter.pairs().filter(|(_, pair)| pair.magnitude.is_some());
        let norms = |(site, pair): (Site, &LowRank)| {
            let norms = match self.options.without.and_then(|start| start.pair(site)) {
                Some(start) => self.norms_of(site, &pair.without(start))?,
                None => self.norms_of(site, pair)?,
            };
            Some((site, norms))
        };
        with_magnitude.filter_map(norms).collect()
    }

    /// |w + s b A|^2 = |w|^2 + 2 s (w A^T) b + s^2 b (A A^T) b, row by row of W and B.
    fn norms_of(&self, site: Site, pair: &LowRank) -> Option<Vec<f32>> {
        let matrix = self.weight(self.model.shape().index(site)?);
        let (rank, width) = (pair.rank, matrix.cols());
        let a = Mat::dense(&pair.a, width);
        let mut gram = vec![0.0; rank * rank];
        mul_nt(Out { data: &mut gram, stride: rank, accumulate: false }, a, a, false);
        let mut norms = vec![0.0; matrix.rows()];
        self.pieces(matrix, rank, |from, dense| {
            let rows = dense.len() / width;
            let mut wa = self.take(rows * rank);
            let out = Out { data: &mut wa, stride: rank, accumulate: false };
            mul_nt(out, Mat::dense(dense, width), a, true);
            let of_rows = dense.par_chunks_exact(width).zip(wa.par_chunks_exact(rank));
            let of_rows = of_rows.zip(pair.b[from * rank..].par_chunks_exact(rank)).zip(&mut norms[from..from + rows]);
            of_rows.for_each(|(((w, wa), b), norm)| {
                let scale = f64::from(pair.scale);
                let dot =
                    |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
                let square =
                    gram.chunks_exact(rank).zip(b).map(|(gram, b_k)| f64::from(*b_k) * dot(gram, b)).sum::<f64>();
                *norm = (dot(w, w) + 2.0 * scale * dot(wa, b) + scale * scale * square).sqrt() as f32;
            });
        });
        Some(norms)
    }
}

/// y += shrunk B^T.
fn add_expanded(pair: &LowRank, shrunk: &[f32], y: &mut [f32]) {
    let (shrunk, b) = (Mat::dense(shrunk, pair.rank), Mat::dense(&pair.b, pair.rank));
    mul_nt(Out { stride: pair.b.len() / pair.rank, data: y, accumulate: true }, shrunk, b, true);
}

/// Runs `f` over rows of so many values.
fn each_row(x: &mut [f32], width: usize, f: impl Fn(&mut [f32]) + Send + Sync) {
    x.par_chunks_exact_mut(width).with_min_len(8).for_each(f);
}

/// Multiplies each row by `by`, element by element.
fn multiply(x: &mut [f32], by: &[f32]) {
    each_row(x, by.len(), |x| x.iter_mut().zip(by).for_each(|(x, by)| *x *= by));
}

/// Adds to `sums` those of a b over the rows, element by element.
pub(super) fn add_products(sums: &mut [f32], a: &[f32], b: &[f32]) {
    let width = sums.len();
    for (a, b) in a.chunks_exact(width).zip(b.chunks_exact(width)) {
        sums.iter_mut().zip(a).zip(b).for_each(|((sum, a), b)| *sum += a * b);
    }
}

/// Adds rows up.
fn add_rows(sums: &mut [f32], rows: &[f32]) {
    for row in rows.chunks_exact(sums.len()) {
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
    }
}

/// What the gradient of a layer's input is made of, once the input itself is needed no more.
pub(super) enum Onward<'a> {
    /// The gradient of what the frozen product gave, where it is not that of the layer; and the pairs beside it.
    Product { d: Option<Buffer>, pairs: Vec<PairGradient<'a>> },
    /// The gradient of the input times these values.
    Scaled { d: Buffer, by: &'a [f32] },
}

/// A pair and the gradient of what its A gave, `[rows, rank]`.
pub(super) struct PairGradient<'a> {
    pair: &'a LowRank,
    shrunk: Buffer,
    /// Of its input; of what is taken out of the base nothing is dropped.
    dropout: Option<Dropout>,
}

/// The input of an adapter: the layer's, or a copy of which some is dropped.
enum Input<'x> {
    Whole(&'x [f32]),
    Dropped(Buffer),
}

impl std::ops::Deref for Input<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::Whole(x) => x,
            Self::Dropped(x) => x,
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::model::Model;
    use crate::model::traced::testing::{assert_close, gradients, sinusoid, tensor, values};
    use crate::model::traced::{ForwardOptions, Products, Workspace};
    use crate::request::LoraSpec;

    /// Against candle's operations on the dequantised weights, with and without dropout.
    #[test]
    fn an_adapted_layer_and_its_gradients_are_those_of_the_plain_form() {
        let (model, workspace) = (Model::tiny(1).0, Workspace::default());
        // The last layer's down_proj.
        let site = model.decoder().sites.len() - 1;
        let (inputs, outputs, rank, rows) = (96, 64, 3, 10);
        let (x, a, b) = (sinusoid(rows, inputs, 0.7), sinusoid(rank, inputs, 0.3), sinusoid(outputs, rank, 1.1));
        let layer = LowRank { rank, alpha: 1.5, scale: 0.5, a: values(&a), b: values(&b), magnitude: None, bias: None };
        let adapter = Adapter::lora(LoraSpec::default(), [(model.site(site), layer)]);
        let mut weights = vec![0.0; outputs * inputs];
        model.matrix(site).dequantize(0, &mut weights);
        let weights = tensor(&weights, (outputs, inputs));
        for dropout in [None, Some(Dropout { rate: 0.4, seed: 3, step: 5 })] {
            let options = ForwardOptions {
                adapter: Some(&adapter),
                dropout,
                products: Products::Exact,
                ..ForwardOptions::default()
            };
            let scope = Scope::new(&model, &workspace, options);
            let mut mask = vec![1.0; rows * inputs];
            dropout.iter().for_each(|dropout| dropout.apply(site, &mut mask));
            assert_eq!(mask.contains(&0.0), dropout.is_some());
            let mask = candle_core::Tensor::from_vec(mask, (rows, inputs), &Device::Cpu).unwrap();
            let plain = || -> candle_core::Result<_> {
                let shrunk = ((x.as_tensor() * mask)?.matmul(&a.t()?)? * 0.5)?;
                x.matmul(&weights.t()?)? + shrunk.matmul(&b.t()?)?
            };
            let plain = plain().unwrap();
            let mut input = values(&x);
            assert_close(&scope.linear(&mut input, site..site + 1)[0], &plain);
            assert_eq!(input, values(&x));
            let (d, mut dx, mut of) =
                (values(&sinusoid(rows, outputs, 0.21)), vec![0.0; rows * inputs], adapter.zeros_like());
            scope.linear_backward(site, &input, &d, Some(&mut dx), &mut of);
            let pair = of.pair(model.site(site)).unwrap();
            let ours = [dx, pair.a.clone(), pair.b.clone()];
            for (ours, plain) in ours.iter().zip(gradients(&plain, &d, &[x.clone(), a.clone(), b.clone()])) {
                assert_close(ours, &plain);
            }
            let alone = |site| scope.adapted(site).is_some();
            assert!(alone(site) && !alone(0));
        }
    }
}
