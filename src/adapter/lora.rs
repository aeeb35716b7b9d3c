//! A LoRA adapter in memory: for each site a pair A `[rank, in]`, B `[out, rank]` and a scale; y += scale * B (A x).

use std::collections::BTreeMap;

use crate::error::Result;
use crate::ids::Digest;
use crate::request::{LoraSpec, Target};

/// The shapes an adapter must fit.
#[derive(Debug, Clone, PartialEq)]
pub struct BaseShape {
    /// For people, e.g. `SmolLM2-135M-Instruct.Q4_1`.
    pub name: String,
    pub digest: Digest,
    pub layers: u32,
    /// (in, out) of each target, in the order of `Target::ALL`.
    pub dims: [(usize, usize); 7],
}

impl BaseShape {
    /// (in, out) features of a target.
    pub fn dims(&self, target: Target) -> (usize, usize) {
        self.dims[target as usize]
    }
}

/// A linear layer of the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Site {
    pub layer: u32,
    pub target: Target,
}

/// The pair of one site.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraLayer {
    pub rank: usize,
    /// alpha / r, or alpha / sqrt(r) for a rank-stabilised adapter.
    pub scale: f32,
    /// `[rank, in]`, row-major.
    pub a: Vec<f32>,
    /// `[out, rank]`, row-major.
    pub b: Vec<f32>,
}

/// An adapter. Immutable once made.
#[derive(Debug, Clone, PartialEq)]
pub struct Lora {
    pub spec: LoraSpec,
    pub layers: BTreeMap<Site, LoraLayer>,
}

impl Lora {
    /// As PEFT starts one: A uniform in +-sqrt(1/in) (Kaiming with a = sqrt(5)), B zero. A function of the seed alone.
    pub fn fresh(_spec: &LoraSpec, _shape: &BaseShape, _seed: u64) -> Result<Self> {
        todo!()
    }

    /// Bytes of the float32 tensors.
    pub fn byte_size(&self) -> u64 {
        self.layers.values().map(|l| 4 * (l.a.len() + l.b.len()) as u64).sum()
    }

    /// True where every effective delta is zero: for each site A or B is all zero.
    pub fn is_zero(&self) -> bool {
        self.layers.values().all(|l| l.a.iter().all(|x| *x == 0.0) || l.b.iter().all(|x| *x == 0.0))
    }
}
