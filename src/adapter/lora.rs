//! A LoRA adapter in memory: for each site a pair A `[rank, in]`, B `[out, rank]` and a scale; y += scale * B (A x)
//! (Hu et al. 2021).

use std::collections::BTreeMap;

use crate::adapter::BaseNames;
use crate::adapter::packed::adapter_bytes;
use crate::arch::decoder::{Site, SiteSpec};
use crate::error::{Error, Result};
use crate::ids::Digest;
use crate::random::{Purpose, Stream};
use crate::request::{LoraSpec, Target};

/// The shapes an adapter must fit.
#[derive(Debug, Clone, PartialEq)]
pub struct BaseShape {
    /// For people, e.g. `SmolLM2-135M-Instruct.Q4_1`.
    pub name: String,
    /// By which adapters may call it.
    pub names: BaseNames,
    /// SHA-256 of the base's file.
    pub digest: Digest,
    /// Transformer blocks.
    pub layers: u32,
    /// The linear layers of a block, in the order in which they are computed; every block has the same.
    pub linears: Vec<LinearShape>,
}

/// The shape of a linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearShape {
    /// Its name within the block.
    pub target: Target,
    /// Values that go in.
    pub inputs: usize,
    /// Values that come out.
    pub outputs: usize,
}

impl From<&SiteSpec> for LinearShape {
    fn from(spec: &SiteSpec) -> Self {
        Self { target: spec.site.target, inputs: spec.inputs, outputs: spec.outputs }
    }
}

impl BaseShape {
    /// A base whose blocks have the seven linear layers of llama's, of these (in, out); for tests.
    pub fn llama(name: &str, digest: Digest, layers: u32, dims: [(usize, usize); 7]) -> Self {
        use Target::{DownProj, GateProj, KProj, OProj, QProj, UpProj, VProj};
        let targets = [QProj, KProj, VProj, OProj, GateProj, UpProj, DownProj];
        let linears = targets.into_iter().zip(dims);
        let linears = linears.map(|(target, (inputs, outputs))| LinearShape { target, inputs, outputs }).collect();
        Self { name: name.to_owned(), names: BaseNames::default(), digest, layers, linears }
    }

    /// Returns (in, out) of a linear layer; `None` where the base has none of that name.
    pub fn dims(&self, target: Target) -> Option<(usize, usize)> {
        let linear = self.linears.iter().find(|linear| linear.target == target)?;
        Some((linear.inputs, linear.outputs))
    }

    /// Returns a site's number, counted through the blocks; `None` where the base does not have it.
    pub fn index(&self, site: Site) -> Option<usize> {
        let within = self.linears.iter().position(|linear| linear.target == site.target)?;
        (site.layer < self.layers).then(|| site.layer as usize * self.linears.len() + within)
    }

    /// Returns the sites by their numbers.
    pub fn sites(&self) -> impl Iterator<Item = Site> + '_ {
        (0..self.layers).flat_map(|layer| self.targets().map(move |target| Site { layer, target }))
    }

    /// Returns the linear layers of a block.
    pub fn targets(&self) -> impl Iterator<Item = Target> + '_ {
        self.linears.iter().map(|linear| linear.target)
    }

    /// Returns the names of a block's linear layers, for people.
    pub fn target_names(&self) -> String {
        self.targets().map(Target::name).collect::<Vec<_>>().join(", ")
    }
}

/// The pair of one site.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraLayer {
    /// The inner dimension of B A.
    pub rank: usize,
    /// The spec's, or this layer's own.
    pub alpha: f32,
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
    /// What it was made with, or what its configuration says.
    pub spec: LoraSpec,
    /// The sites that it changes; others are as the base has them.
    pub layers: BTreeMap<Site, LoraLayer>,
}

impl LoraSpec {
    /// alpha / r, or alpha / sqrt(r).
    pub fn scale(&self, alpha: f32, rank: u32) -> f32 {
        alpha / if self.use_rslora { (rank as f32).sqrt() } else { rank as f32 }
    }

    /// The layers it adapts. Errors name the field: no target, no layer, a layer that the base lacks, rank 0.
    pub fn sites(&self, shape: &BaseShape) -> Result<Vec<Site>> {
        let layers = match &self.layers {
            Some(layers) => layers.clone(),
            None => (0..shape.layers).collect(),
        };
        if let Some(layer) = layers.iter().find(|layer| **layer >= shape.layers) {
            let message = format!("layer {layer} does not exist; the base has {}, counted from 0", shape.layers);
            return Err(Error::invalid("lora.layers_to_transform", message));
        }
        if self.rank == 0 {
            return Err(Error::invalid("lora.rank", "must be at least 1"));
        }
        if !self.alpha.is_finite() {
            return Err(Error::invalid("lora.alpha", "must be a finite number"));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::invalid("lora.dropout", "must be in [0, 1)"));
        }
        if layers.is_empty() {
            return Err(Error::invalid("lora.target_modules", "selects no layer of the base"));
        }
        let targets = self.targets_of(shape)?;
        Ok(layers.iter().flat_map(|&layer| targets.iter().map(move |&target| Site { layer, target })).collect())
    }

    /// Returns the linear layers of a block that it adapts, sorted.
    ///
    /// # Errors
    /// INVALID_ARGUMENT where the base has none of that name.
    pub fn targets_of(&self, shape: &BaseShape) -> Result<Vec<Target>> {
        if let Some(target) = self.targets.iter().find(|target| shape.dims(**target).is_none()) {
            let message = format!("{} is no linear layer of this base; it has {}", target.name(), shape.target_names());
            return Err(Error::invalid("lora.target_modules", message));
        }
        let mut targets = if self.targets.is_empty() { shape.targets().collect() } else { self.targets.clone() };
        targets.sort_unstable();
        Ok(targets)
    }
}

impl LoraSpec {
    /// Bytes that it takes where it serves.
    pub fn memory_bytes(&self, shape: &BaseShape) -> Result<u64> {
        Ok(adapter_bytes(self.sites(shape)?.into_iter().map(|site| (site, self.rank as usize)), shape))
    }
}

impl Lora {
    /// As PEFT starts one: A uniform in +-1/sqrt(in) (Kaiming with a = sqrt(5)), B zero. A function of the seed alone.
    pub fn fresh(spec: &LoraSpec, shape: &BaseShape, seed: u64) -> Result<Self> {
        let stream = Stream::new(seed, Purpose::Initialisation);
        let rank = spec.rank as usize;
        let layers = spec.sites(shape)?.into_iter().map(|site| {
            let (inputs, outputs) = shape.dims(site.target).unwrap_or_default();
            let bound = 1.0 / (inputs as f32).sqrt();
            let place = shape.index(site).unwrap_or_default() as u64;
            let a = (0..rank * inputs).map(|i| bound * (2.0 * stream.uniform(place, i as u32) - 1.0)).collect();
            let scale = spec.scale(spec.alpha, spec.rank);
            (site, LoraLayer { rank, alpha: spec.alpha, scale, a, b: vec![0.0; outputs * rank] })
        });
        Ok(Self { spec: spec.clone(), layers: layers.collect() })
    }

    /// Returns the tensors that are trained, in a fixed order: by site, A before B.
    pub fn tensors(&self) -> impl Iterator<Item = &[f32]> {
        self.layers.values().flat_map(|layer| [&layer.a[..], &layer.b[..]])
    }

    /// As [`Lora::tensors`], to be changed.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        self.layers.values_mut().flat_map(|layer| [&mut layer.a[..], &mut layer.b[..]])
    }

    /// Returns an adapter of the same shape whose tensors are zero: where gradients are added up.
    pub fn zeros_like(&self) -> Self {
        let mut zeros = self.clone();
        zeros.tensors_mut().for_each(|tensor| tensor.fill(0.0));
        zeros
    }

    /// True where every effective delta is zero: for each site the product B A is, or the scale.
    pub fn is_zero(&self) -> bool {
        let zero = |values: &[f32]| values.iter().all(|x| *x == 0.0);
        self.layers.values().all(|l| l.scale == 0.0 || zero(&l.a) || zero(&l.b))
    }

    /// Returns whether every value is a number.
    pub fn is_finite(&self) -> bool {
        let finite = |values: &[f32]| values.iter().all(|x| x.is_finite());
        self.layers.values().all(|l| l.scale.is_finite() && finite(&l.a) && finite(&l.b))
    }
}
