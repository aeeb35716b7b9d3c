//! Linear layers as an adapter changes them, forward and backward: `y = x W^T + b + scale * (drop(x) A^T) B^T`, with gradients of x, A and B.

use std::ops::Range;

use rayon::prelude::*;

use super::buffers::Buffer;
use super::{Scope, add};
use crate::adapter::{Lora, LoraLayer};
use crate::arch::decoder::SiteId;
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
    pub(super) fn adapted(&self, site: SiteId) -> Option<&LoraLayer> {
        self.options.lora?.layers.get(&self.model.site(site))
    }

    /// Computes linear layers that share the input `x` `[rows, in]`, whose values stay as they are; gives `[rows, out]` of each.
    pub(super) fn linear(&self, x: &mut [f32], sites: Range<SiteId>) -> Vec<Buffer> {
        let mut outputs = self.frozen(x, sites.clone());
        for (site, y) in sites.zip(&mut outputs) {
            let Some(layer) = self.adapted(site) else { continue };
            let shrunk = self.shrink(layer, &self.dropped(site, x));
            let (shrunk, b) = (Mat::dense(&shrunk, layer.rank), Mat::dense(&layer.b, layer.rank));
            let y = Out { stride: layer.b.len() / layer.rank, data: y, accumulate: true };
            mul_nt(y, shrunk, b, true);
            self.yield_to_serving();
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
        gradients: &mut Lora,
    ) {
        let matrix = self.model.matrix(site);
        let mut dx = dx;
        if let Some(dx) = dx.as_deref_mut() {
            self.frozen_backward(matrix, dy, dx);
        }
        let gradient = gradients.layers.get_mut(&self.model.site(site));
        let (Some(layer), Some(gradient)) = (self.adapted(site), gradient) else { return };
        let LoraLayer { rank, scale, .. } = *layer;
        let (input, dy) = (self.dropped(site, x), Mat::dense(dy, matrix.rows()));
        let shrunk = self.shrink(layer, &input);
        let db = Out { data: &mut gradient.b, stride: rank, accumulate: true };
        mul_tn(db, dy, Mat::dense(&shrunk, rank), true);
        let mut dshrunk = self.take(shrunk.len());
        let out = Out { data: &mut dshrunk, stride: rank, accumulate: false };
        mul(out, dy, Mat::dense(&layer.b, rank), true);
        dshrunk.iter_mut().for_each(|d| *d *= scale);
        let (dshrunk, width) = (Mat::dense(&dshrunk, rank), matrix.cols());
        let da = Out { data: &mut gradient.a, stride: width, accumulate: true };
        mul_tn(da, dshrunk, Mat::dense(&input, width), true);
        if let Some(dx) = dx {
            let a = Mat::dense(&layer.a, width);
            match self.dropout() {
                None => mul(Out { data: dx, stride: width, accumulate: true }, dshrunk, a, true),
                Some(dropout) => {
                    let mut dinput = self.take(dx.len());
                    mul(Out { data: &mut dinput, stride: width, accumulate: false }, dshrunk, a, true);
                    dropout.apply(site, &mut dinput);
                    add(dx, &dinput);
                }
            }
        }
        self.yield_to_serving();
    }

    fn dropout(&self) -> Option<Dropout> {
        self.options.dropout.filter(|dropout| dropout.rate > 0.0)
    }

    /// The adapter's input.
    fn dropped<'x>(&self, site: SiteId, x: &'x [f32]) -> Input<'x> {
        let Some(dropout) = self.dropout() else { return Input::Whole(x) };
        let mut input = self.take(x.len());
        input.copy_from_slice(x);
        dropout.apply(site, &mut input);
        Input::Dropped(input)
    }

    /// scale * input A^T, `[rows, rank]`.
    fn shrink(&self, layer: &LoraLayer, input: &[f32]) -> Buffer {
        let width = layer.a.len() / layer.rank;
        let mut shrunk = self.take(input.len() / width * layer.rank);
        let out = Out { data: &mut shrunk, stride: layer.rank, accumulate: false };
        mul_nt(out, Mat::dense(input, width), Mat::dense(&layer.a, width), true);
        shrunk.iter_mut().for_each(|h| *h *= layer.scale);
        shrunk
    }
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
        let layer = LoraLayer { rank, alpha: 1.5, scale: 0.5, a: values(&a), b: values(&b) };
        let lora = Lora { spec: LoraSpec::default(), layers: [(model.site(site), layer)].into() };
        let mut weights = vec![0.0; outputs * inputs];
        model.matrix(site).dequantize(0, &mut weights);
        let weights = tensor(&weights, (outputs, inputs));
        for dropout in [None, Some(Dropout { rate: 0.4, seed: 3, step: 5 })] {
            let options =
                ForwardOptions { lora: Some(&lora), dropout, products: Products::Exact, ..ForwardOptions::default() };
            let scope = Scope { model: &model, workspace: &workspace, options };
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
                (values(&sinusoid(rows, outputs, 0.21)), vec![0.0; rows * inputs], lora.zeros_like());
            scope.linear_backward(site, &input, &d, Some(&mut dx), &mut of);
            let ours = [dx, of.layers[&model.site(site)].a.clone(), of.layers[&model.site(site)].b.clone()];
            for (ours, plain) in ours.iter().zip(gradients(&plain, &d, &[x.clone(), a.clone(), b.clone()])) {
                assert_close(ours, &plain);
            }
            let alone = |site| scope.adapted(site).is_some();
            assert!(alone(site) && !alone(0));
        }
    }
}
