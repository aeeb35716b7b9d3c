//! Training and reference: candle tensors with autograd, gradients for adapter tensors only.

use candle_core::{Tensor, Var};

use crate::adapter::{Lora, Site};
use crate::device::TrainPermit;
use crate::error::Result;
use crate::model::Model;

/// A LoRA as candle tensors: `Var`s where it is trained.
#[derive(Debug)]
pub struct TracedLora {}

impl TracedLora {
    /// Tensors without gradients.
    pub fn frozen(_lora: &Lora) -> Result<Self> {
        todo!()
    }

    /// `Var`s.
    pub fn trainable(_lora: &Lora) -> Result<Self> {
        todo!()
    }

    /// The `Var`s in a fixed order: by site, A before B. Empty for a frozen one.
    pub fn vars(&self) -> Vec<(Site, &'static str, Var)> {
        todo!()
    }

    /// The present values.
    pub fn to_lora(&self) -> Result<Lora> {
        todo!()
    }
}

/// Dropout on the adapter's input: masks are a function of (seed, step, site, element) by Philox.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    pub rate: f32,
    pub seed: u64,
    pub step: u64,
}

/// One forward of whole sequences without a KV cache.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pass<'a> {
    /// `None` is the base.
    pub lora: Option<&'a TracedLora>,
    pub dropout: Option<Dropout>,
    /// Gives way to serving at every frozen layer, forward and backward.
    pub permit: Option<&'a std::sync::Arc<TrainPermit>>,
}

impl Model {
    /// ln p(ids[i+1] given ids[..=i]) of each sequence, for every (sequence, i) in `wanted`, in that order: a float32 tensor `[wanted.len()]`
    /// that carries gradients to the `Var`s of `pass.lora`. Rows not wanted never reach the head.
    pub fn token_logprobs(&self, _sequences: &[&[u32]], _wanted: &[(usize, usize)], _pass: Pass<'_>) -> Result<Tensor> {
        todo!()
    }

    /// All logits after position i, for every (sequence, i) in `wanted`: `[wanted.len(), vocab]`. The float32 reference; no gradients.
    pub fn reference_logits(
        &self,
        _sequences: &[&[u32]],
        _wanted: &[(usize, usize)],
        _lora: Option<&TracedLora>,
    ) -> Result<Tensor> {
        todo!()
    }
}
