//! An adapter in memory: what it does at each site of the base, in float32, as it is trained.

use std::collections::{BTreeMap, BTreeSet};

use crate::adapter::BaseShape;
use crate::adapter::packed::{Beside, Layout, adapter_bytes};
use crate::adapter::virtual_tokens::{VirtualForm, VirtualTokens};
use crate::arch::decoder::{Site, Slot};
use crate::error::{Error, Result};
use crate::random::{Purpose, Stream};
use crate::request::{
    AdapterKind, BottleneckSpec, FullSpec, Ia3Spec, LinearLayers, LoraInit, LoraSpec, NonLinearity, Placement, Target,
    TunerSpec,
};

/// An adapter. Its gradient is a value of the same shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// What it was made with, or what its configuration says.
    pub spec: TunerSpec,
    /// The sites that it changes; others are as the base has them.
    pub sites: BTreeMap<Site, SiteDelta>,
    /// What it puts before a sequence.
    pub virtual_tokens: Option<VirtualTokens>,
    /// Copies of the base's tensors that take their place, row-major: all that a full fine-tuning has; of a LoRA biases of linear layers at most.
    pub copies: BTreeMap<Slot, Vec<f32>>,
    /// Rows of the embedding, or of a head of its own, that take the place of the base's. Where the head is the embedding, those are its too.
    pub tokens: BTreeMap<Slot, TokenRows>,
}

/// The rows of some tokens in a table of all tokens (PEFT's trainable tokens).
#[derive(Debug, Clone, PartialEq)]
pub struct TokenRows {
    /// Each once.
    pub ids: Vec<u32>,
    /// `[ids, hidden_size]`, row-major.
    pub rows: Vec<f32>,
}

impl TokenRows {
    /// Returns the row of an id, `[hidden_size]`; `None` where the base's stays.
    pub fn row(&self, id: u32) -> Option<&[f32]> {
        let at = self.ids.iter().position(|own| *own == id)?;
        self.rows.chunks_exact(self.rows.len() / self.ids.len()).nth(at)
    }

    /// As [`TokenRows::row`], to be changed.
    pub fn row_mut(&mut self, id: u32) -> Option<&mut [f32]> {
        let (at, width) = (self.ids.iter().position(|own| *own == id)?, self.rows.len() / self.ids.len());
        self.rows.chunks_exact_mut(width).nth(at)
    }
}

/// What an adapter does at a site, whose frozen layer is y = W x + b.
#[derive(Debug, Clone, PartialEq)]
pub enum SiteDelta {
    /// LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024).
    LowRank(LowRank),
    /// (IA)3 (Liu et al. 2022): what goes into the layer, or what comes out of it, is multiplied by these, element by element.
    Scaled {
        /// Where.
        side: ScaledSide,
        /// `[in]` or `[out]`.
        values: Vec<f32>,
    },
    /// A bottleneck adapter (Houlsby et al. 2019): what comes out of the layer goes through it.
    Bottleneck(Bottleneck),
}

/// A small network behind a layer: y += up act(down y + down_bias) + up_bias.
#[derive(Debug, Clone, PartialEq)]
pub struct Bottleneck {
    /// The non-linearity.
    pub non_linearity: NonLinearity,
    /// `[size, out]`, row-major.
    pub down: Vec<f32>,
    /// `[size]`.
    pub down_bias: Vec<f32>,
    /// `[out, size]`, row-major.
    pub up: Vec<f32>,
    /// `[out]`.
    pub up_bias: Vec<f32>,
}

impl Bottleneck {
    /// Returns how many values there are between down and up.
    pub fn size(&self) -> usize {
        self.down_bias.len()
    }
}

/// A pair of matrices: y += scale * (B (A x) + bias). With a magnitude, and then without a bias, the sum of both products is multiplied, row by
/// row of W, by the magnitude over the norm of the row of W + scale * B A.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
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
    /// `[out]`; `None` where it is no DoRA.
    pub magnitude: Option<Vec<f32>>,
    /// `[out]`: PEFT's `lora_bias`.
    pub bias: Option<Vec<f32>>,
}

impl LowRank {
    /// Returns the magnitudes over the norms of their rows, `[out]`; `None` where there are none, or not as many norms.
    pub fn row_scales(&self, norms: &[f32]) -> Option<Vec<f32>> {
        let magnitude = self.magnitude.as_ref().filter(|magnitude| magnitude.len() == norms.len())?;
        Some(magnitude.iter().zip(norms).map(|(magnitude, norm)| magnitude / norm).collect())
    }

    /// Returns the plain pair that adds scale * (B A - B0 A0), of one that began as B0 A0, of the same shape: `[B, -B0] [A; A0]`, with its
    /// magnitude. The alpha is this pair's.
    pub fn without(&self, start: &Self) -> Self {
        let rows = self.b.chunks_exact(self.rank).zip(start.b.chunks_exact(start.rank));
        let b = rows.flat_map(|(b, b0)| b.iter().copied().chain(b0.iter().map(|x| -x))).collect();
        let a = [&self.a[..], &start.a].concat();
        let (magnitude, bias) = (self.magnitude.clone(), self.bias.clone());
        Self { rank: self.rank + start.rank, a, b, magnitude, bias, ..*self }
    }
}

/// What of a layer (IA)3 multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaledSide {
    /// What goes in. Only of layers that share their input with no other.
    Input,
    /// What comes out, the bias included.
    Output,
}

/// Norms of the rows of W + scale * B A, `[out]`, of each site with a magnitude.
pub type RowNorms = BTreeMap<Site, Vec<f32>>;

impl AdapterKind {
    /// Returns the kind that a tuner makes.
    pub fn of(spec: &TunerSpec) -> Self {
        match spec {
            TunerSpec::Lora(LoraSpec { use_dora: true, .. }) => Self::Dora,
            TunerSpec::Lora(_) => Self::Lora,
            TunerSpec::Ia3(_) => Self::Ia3,
            TunerSpec::Prompt(_) => Self::Prompt,
            TunerSpec::Prefix(_) => Self::Prefix,
            TunerSpec::Bottleneck(_) => Self::Bottleneck,
            TunerSpec::Full(_) => Self::Full,
        }
    }
}

impl TunerSpec {
    /// Says what was left to the base.
    ///
    /// # Errors
    /// INVALID_ARGUMENT where the base has no linear layer of a name.
    pub fn fill_in(&mut self, shape: &BaseShape) -> Result<()> {
        match self {
            Self::Lora(spec) => spec.targets = spec.targets_of(shape)?,
            Self::Full(FullSpec { linear: Some(linear), .. }) => {
                linear.targets = targets_of(FULL, &linear.targets, shape)?;
            }
            Self::Full(FullSpec { linear: None, .. }) => {}
            Self::Ia3(spec) => {
                let sites = spec.sites(shape)?;
                let targets = |wanted: &dyn Fn(ScaledSide) -> bool| {
                    let found = sites.iter().filter(|(_, side)| wanted(*side)).map(|(site, _)| site.target);
                    found.collect::<BTreeSet<_>>().into_iter().collect()
                };
                *spec =
                    Ia3Spec { targets: targets(&|_| true), feedforward: targets(&|side| side == ScaledSide::Input) };
            }
            Self::Prompt(_) | Self::Prefix(_) | Self::Bottleneck(_) => {}
        }
        Ok(())
    }

    /// Returns what a fresh adapter of it takes where it serves, in bytes; of full fine-tuning what the LoRA does that is made of it.
    ///
    /// # Errors
    /// INVALID_ARGUMENT names the field: no target, no layer, one that the base lacks, a number out of its range.
    pub fn memory_bytes(&self, shape: &BaseShape) -> Result<u64> {
        let sites: Vec<(Site, Layout)> = match self {
            Self::Lora(spec) => {
                let layout = Layout::pair(spec.published_rank() as usize, 0.0, spec.use_dora, spec.lora_bias);
                spec.sites(shape)?.into_iter().map(|site| (site, layout)).collect()
            }
            Self::Ia3(spec) => {
                spec.sites(shape)?.into_iter().map(|(site, side)| (site, Layout::scales(side))).collect()
            }
            Self::Bottleneck(spec) => {
                let layout = Layout::bottleneck(spec.size as usize, spec.non_linearity);
                spec.sites(shape)?.into_iter().map(|site| (site, layout)).collect()
            }
            Self::Prompt(_) | Self::Prefix(_) => Vec::new(),
            Self::Full(FullSpec { extract_rank: None, .. }) => Vec::new(),
            Self::Full(spec @ FullSpec { extract_rank: Some(rank), .. }) => {
                let layout = Layout::pair(*rank as usize, 0.0, false, false);
                spec.sites(shape)?.into_iter().map(|site| (site, layout)).collect()
            }
        };
        let tokens = match self {
            Self::Lora(spec) => [spec.trainable_token_indices.len(), 0],
            _ => [0; 2],
        };
        Ok(adapter_bytes(sites, Beside { virtual_tokens: VirtualForm::of(self), tokens }, shape))
    }

    /// Returns how many values of a fresh adapter of it are trained; of full fine-tuning `Model::trained_values` does.
    ///
    /// # Errors
    /// As of [`TunerSpec::memory_bytes`].
    pub fn parameters(&self, shape: &BaseShape) -> Result<usize> {
        let dims = |site: &Site| shape.dims(site.target).unwrap_or_default();
        Ok(match self {
            Self::Lora(spec) => {
                let of_dims = |(inputs, outputs)| {
                    let vectors = usize::from(spec.use_dora) + usize::from(spec.lora_bias);
                    spec.rank as usize * (inputs + outputs) + vectors * outputs
                };
                let rows = spec.trainable_token_indices.len() * shape.hidden_size;
                spec.sites(shape)?.iter().map(dims).map(of_dims).sum::<usize>() + rows
            }
            Self::Ia3(spec) => {
                let of_site = |(site, side): &(Site, ScaledSide)| match side {
                    ScaledSide::Input => dims(site).0,
                    ScaledSide::Output => dims(site).1,
                };
                spec.sites(shape)?.iter().map(of_site).sum()
            }
            Self::Bottleneck(spec) => {
                let size = spec.size as usize;
                spec.sites(shape)?.iter().map(dims).map(|(_, outputs)| 2 * size * outputs + size + outputs).sum()
            }
            Self::Full(_) => return Err(Error::internal("the base knows how many values its tensors have")),
            Self::Prompt(spec) => spec.virtual_tokens as usize * VirtualForm::Embeddings.width(shape),
            Self::Prefix(spec) => {
                let (count, outputs) = (spec.virtual_tokens as usize, VirtualForm::KeysAndValues.width(shape));
                match spec.projection {
                    None => count * outputs,
                    Some(width) => {
                        let (inputs, width) = (shape.kv_width(), width as usize);
                        count * inputs + width * (inputs + 1) + outputs * (width + 1)
                    }
                }
            }
        })
    }

    /// Returns the share of an adapter's inputs that is dropped in training.
    pub fn dropout(&self) -> f32 {
        match self {
            Self::Lora(spec) => spec.dropout,
            Self::Ia3(_) | Self::Prompt(_) | Self::Prefix(_) | Self::Bottleneck(_) | Self::Full(_) => 0.0,
        }
    }
}

impl LoraSpec {
    /// alpha / r, or alpha / sqrt(r).
    pub fn scale(&self, alpha: f32, rank: u32) -> f32 {
        alpha / if self.use_rslora { (rank as f32).sqrt() } else { rank as f32 }
    }

    /// Returns the rank that a version has: twice the rank where it holds, negated, the part of the base that it began as.
    pub fn published_rank(&self) -> u32 {
        if self.init.is_of_base() { self.rank.saturating_mul(2) } else { self.rank }
    }

    /// The layers it adapts. Errors name the field: no target, no layer, a layer that the base lacks, rank 0.
    pub fn sites(&self, shape: &BaseShape) -> Result<Vec<Site>> {
        let layers = layers_of(LORA, self.layers.as_deref(), shape)?;
        if self.rank == 0 {
            return Err(Error::invalid("lora.rank", "must be at least 1"));
        }
        if !self.alpha.is_finite() {
            return Err(Error::invalid("lora.alpha", "must be a finite number"));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::invalid("lora.dropout", "must be in [0, 1)"));
        }
        if self.lora_bias && (self.use_dora || self.init != LoraInit::Default) {
            let message = "needs a LoRA that is no DoRA and starts as the default does; PEFT knows no other";
            return Err(Error::invalid("lora.lora_bias", message));
        }
        if let Some(id) = self.trainable_token_indices.iter().find(|id| **id as usize >= shape.vocab_size) {
            let message = format!("token {id} does not exist; the base has {}, counted from 0", shape.vocab_size);
            return Err(Error::invalid("lora.trainable_token_indices", message));
        }
        if layers.is_empty() {
            return Err(Error::invalid("lora.target_modules", "selects no layer of the base"));
        }
        Ok(sites_of(&layers, &self.targets_of(shape)?))
    }

    /// Returns the linear layers of a block that it adapts, sorted.
    ///
    /// # Errors
    /// INVALID_ARGUMENT where the base has none of that name.
    pub fn targets_of(&self, shape: &BaseShape) -> Result<Vec<Target>> {
        targets_of(LORA, &self.targets, shape)
    }
}

impl FullSpec {
    /// Returns the linear layers that it trains.
    ///
    /// # Errors
    /// INVALID_ARGUMENT names the field: a layer that the base lacks, in either sense.
    pub fn sites(&self, shape: &BaseShape) -> Result<Vec<Site>> {
        let Some(LinearLayers { targets, layers }) = &self.linear else { return Ok(shape.sites().collect()) };
        Ok(sites_of(&layers_of(FULL, layers.as_deref(), shape)?, &targets_of(FULL, targets, shape)?))
    }
}

/// The messages whose fields name layers, as errors call them.
const LORA: &str = "lora";
const FULL: &str = "full";

/// The linear layers of a block that a field names, sorted, which is all where it is empty.
fn targets_of(message: &str, targets: &[Target], shape: &BaseShape) -> Result<Vec<Target>> {
    if let Some(target) = targets.iter().find(|target| shape.dims(**target).is_none()) {
        let why = format!("{} is no linear layer of this base; it has {}", target.name(), shape.target_names());
        return Err(Error::invalid(format!("{message}.target_modules"), why));
    }
    let mut targets = if targets.is_empty() { shape.targets().collect() } else { targets.to_vec() };
    targets.sort_unstable();
    Ok(targets)
}

fn sites_of(layers: &[u32], targets: &[Target]) -> Vec<Site> {
    layers.iter().flat_map(|&layer| targets.iter().map(move |&target| Site { layer, target })).collect()
}

/// The layers that are meant.
fn layers_of(field: &str, layers: Option<&[u32]>, shape: &BaseShape) -> Result<Vec<u32>> {
    let layers = layers.map_or_else(|| (0..shape.layers).collect(), <[u32]>::to_vec);
    match layers.iter().find(|layer| **layer >= shape.layers) {
        Some(layer) => {
            let message = format!("layer {layer} does not exist; the base has {}, counted from 0", shape.layers);
            Err(Error::invalid(format!("{field}.layers_to_transform"), message))
        }
        None => Ok(layers),
    }
}

impl BottleneckSpec {
    /// Returns the sites behind which there is one, in order.
    ///
    /// # Errors
    /// INVALID_ARGUMENT where the base lacks a layer, and for a size of 0.
    pub fn sites(&self, shape: &BaseShape) -> Result<Vec<Site>> {
        let layers = layers_of("bottleneck", self.layers.as_deref(), shape)?;
        if self.size == 0 {
            return Err(Error::invalid("bottleneck.bottleneck_size", "must be at least 1"));
        }
        let targets: &[Target] = match self.placement {
            Placement::FeedForward => &[Target::DownProj],
            Placement::Both => &[Target::OProj, Target::DownProj],
        };
        Ok(layers.iter().flat_map(|&layer| targets.iter().map(move |&target| Site { layer, target })).collect())
    }
}

impl Ia3Spec {
    /// Returns the sites that it changes, in order, and the side of each.
    ///
    /// # Errors
    /// INVALID_ARGUMENT where the base has no linear layer of a name, and where an input is to be scaled that other layers share.
    pub fn sites(&self, shape: &BaseShape) -> Result<Vec<(Site, ScaledSide)>> {
        use Target::{DownProj, KProj, QkvProj, VProj};
        for (field, targets) in [("target_modules", &self.targets), ("feedforward_modules", &self.feedforward)] {
            if let Some(target) = targets.iter().find(|target| shape.dims(**target).is_none()) {
                let (name, has) = (target.name(), shape.target_names());
                let message = format!("{name} is no linear layer of this base; it has {has}");
                return Err(Error::invalid(format!("ia3.{field}"), message));
            }
        }
        let default = self.targets.is_empty();
        let wanted = |target: Target| match default {
            true => matches!(target, KProj | VProj | QkvProj | DownProj),
            false => self.targets.contains(&target),
        };
        let feedforward =
            |target: Target| if default { target == DownProj } else { self.feedforward.contains(&target) };
        if let Some(target) = self.feedforward.iter().find(|target| !default && !self.targets.contains(target)) {
            let message = format!("has {}, which target_modules has not", target.name());
            return Err(Error::invalid("ia3.feedforward_modules", message));
        }
        let side = |site: Site| match feedforward(site.target) {
            true if shape.shares_input(site.target) => Err(Error::invalid(
                "ia3.feedforward_modules",
                format!(
                    "has {}, whose input is that of other layers too and cannot be scaled for it alone; name o_proj or down_proj",
                    site.target.name()
                ),
            )),
            true => Ok((site, ScaledSide::Input)),
            false => Ok((site, ScaledSide::Output)),
        };
        shape.sites().filter(|site| wanted(site.target)).map(side).collect()
    }
}

impl SiteDelta {
    /// Returns the tensors that are trained, in a fixed order.
    pub(super) fn tensors(&self) -> impl Iterator<Item = &[f32]> {
        let tensors = match self {
            Self::LowRank(LowRank { a, b, magnitude, bias, .. }) => {
                [Some(a), Some(b), magnitude.as_ref(), bias.as_ref()]
            }
            Self::Scaled { values, .. } => [Some(values), None, None, None],
            Self::Bottleneck(Bottleneck { down, down_bias, up, up_bias, .. }) => {
                [Some(down), Some(down_bias), Some(up), Some(up_bias)]
            }
        };
        tensors.into_iter().flatten().map(Vec::as_slice)
    }

    /// As [`SiteDelta::tensors`], to be changed.
    fn tensors_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        let tensors = match self {
            Self::LowRank(LowRank { a, b, magnitude, bias, .. }) => {
                [Some(a), Some(b), magnitude.as_mut(), bias.as_mut()]
            }
            Self::Scaled { values, .. } => [Some(values), None, None, None],
            Self::Bottleneck(Bottleneck { down, down_bias, up, up_bias, .. }) => {
                [Some(down), Some(down_bias), Some(up), Some(up_bias)]
            }
        };
        tensors.into_iter().flatten().map(Vec::as_mut_slice)
    }
}

impl Adapter {
    /// A LoRA of these pairs.
    pub fn lora(spec: LoraSpec, pairs: impl IntoIterator<Item = (Site, LowRank)>) -> Self {
        let sites = pairs.into_iter().map(|(site, pair)| (site, SiteDelta::LowRank(pair))).collect();
        let spec = TunerSpec::Lora(spec);
        Self { spec, sites, virtual_tokens: None, copies: BTreeMap::new(), tokens: BTreeMap::new() }
    }

    /// As PEFT starts one: of LoRA A uniform in +-1/sqrt(in) (Kaiming with a = sqrt(5)), B and a bias zero, of (IA)3 ones; of a bottleneck down as A, and
    /// zero all else. A function of the seed alone. What is the base's is zero until whoever has the base fills it in (`Model::begin`): DoRA's
    /// magnitudes, virtual tokens, rows of tokens; and what pairs start as that start as a part of it (`Model::start_as_part`). Of full fine-tuning that is all
    /// (`Model::copies`), and there is nothing to begin with here.
    pub fn fresh<S: Clone + Into<TunerSpec>>(spec: &S, shape: &BaseShape, seed: u64) -> Result<Self> {
        let spec = spec.clone().into();
        let sites = match &spec {
            TunerSpec::Lora(spec) => fresh_pairs(spec, shape, seed)?,
            TunerSpec::Ia3(spec) => {
                let ones = |(site, side): (Site, ScaledSide)| {
                    let (inputs, outputs) = shape.dims(site.target).unwrap_or_default();
                    let len = if side == ScaledSide::Input { inputs } else { outputs };
                    (site, SiteDelta::Scaled { side, values: vec![1.0; len] })
                };
                spec.sites(shape)?.into_iter().map(ones).collect()
            }
            TunerSpec::Bottleneck(spec) => fresh_bottlenecks(spec, shape, seed)?,
            TunerSpec::Prompt(_) | TunerSpec::Prefix(_) => BTreeMap::new(),
            TunerSpec::Full(_) => return Err(Error::internal("copies of the base's tensors begin as these")),
        };
        let virtual_tokens = VirtualTokens::fresh(&spec, shape, seed);
        let tokens = match &spec {
            TunerSpec::Lora(LoraSpec { trainable_token_indices: ids, .. }) if !ids.is_empty() => {
                let rows = vec![0.0; ids.len() * shape.hidden_size];
                [(Slot::Embedding, TokenRows { ids: ids.clone(), rows })].into()
            }
            _ => BTreeMap::new(),
        };
        Ok(Self { spec, sites, virtual_tokens, copies: BTreeMap::new(), tokens })
    }

    /// Makes each magnitude the norm of its row, so that a fresh DoRA changes nothing.
    pub fn set_magnitudes(&mut self, norms: &RowNorms) {
        for (site, pair) in self.pairs_mut() {
            if let (Some(magnitude), Some(norms)) = (&mut pair.magnitude, norms.get(&site)) {
                magnitude.clone_from(norms);
            }
        }
    }

    /// Returns whether its pairs, as its spec has them start, are a part of the base, which is taken out of it while they are trained.
    pub fn is_of_base(&self) -> bool {
        matches!(&self.spec, TunerSpec::Lora(spec) if spec.init.is_of_base())
    }

    /// Returns the LoRA that does on the base as it is what this one does where `start` has been taken out of the base, of the same sites: each
    /// pair as [`LowRank::without`] gives it, of twice the rank.
    pub fn without(&self, start: &Self) -> Self {
        let TunerSpec::Lora(spec) = &self.spec else { return self.clone() };
        let by = if spec.use_rslora { 2_f32.sqrt() } else { 2.0 };
        let pairs = self.pairs().filter_map(|(site, pair)| {
            let plain = pair.without(start.pair(site)?);
            Some((site, LowRank { alpha: by * pair.alpha, ..plain }))
        });
        let spec = LoraSpec { rank: 2 * spec.rank, alpha: by * spec.alpha, init: LoraInit::Default, ..spec.clone() };
        Self { copies: self.copies.clone(), tokens: self.tokens.clone(), ..Self::lora(spec, pairs) }
    }

    /// Returns its kind.
    pub fn kind(&self) -> AdapterKind {
        AdapterKind::of(&self.spec)
    }

    /// Returns how many virtual tokens it puts before a sequence.
    pub fn virtual_count(&self) -> usize {
        self.virtual_tokens.as_ref().map_or(0, |tokens| tokens.count)
    }

    /// Returns the pair of a site.
    pub fn pair(&self, site: Site) -> Option<&LowRank> {
        match self.sites.get(&site)? {
            SiteDelta::LowRank(pair) => Some(pair),
            SiteDelta::Scaled { .. } | SiteDelta::Bottleneck(_) => None,
        }
    }

    /// Returns the pairs of matrices.
    pub fn pairs(&self) -> impl Iterator<Item = (Site, &LowRank)> {
        self.sites.iter().filter_map(|(site, delta)| match delta {
            SiteDelta::LowRank(pair) => Some((*site, pair)),
            SiteDelta::Scaled { .. } | SiteDelta::Bottleneck(_) => None,
        })
    }

    /// As [`Adapter::pairs`], to be changed.
    pub fn pairs_mut(&mut self) -> impl Iterator<Item = (Site, &mut LowRank)> {
        self.sites.iter_mut().filter_map(|(site, delta)| match delta {
            SiteDelta::LowRank(pair) => Some((*site, pair)),
            SiteDelta::Scaled { .. } | SiteDelta::Bottleneck(_) => None,
        })
    }

    /// Returns the biases of linear layers that take the place of the base's.
    pub fn biases<'a>(&'a self, shape: &'a BaseShape) -> impl Iterator<Item = (Site, &'a [f32])> {
        self.copies.iter().filter_map(|(slot, values)| match slot {
            Slot::Bias(id) => Some((shape.sites().nth(*id)?, values.as_slice())),
            _ => None,
        })
    }

    /// Returns the tensors that are trained, in a fixed order: by site; A, B, magnitude, bias. Then those of virtual tokens, then copies, then
    /// rows of tokens.
    pub fn tensors(&self) -> impl Iterator<Item = &[f32]> {
        let virtual_tokens = self.virtual_tokens.iter().flat_map(VirtualTokens::tensors);
        let copies = self.copies.values().chain(self.tokens.values().map(|tokens| &tokens.rows)).map(Vec::as_slice);
        self.sites.values().flat_map(SiteDelta::tensors).chain(virtual_tokens).chain(copies)
    }

    /// As [`Adapter::tensors`], to be changed.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        let virtual_tokens = self.virtual_tokens.iter_mut().flat_map(VirtualTokens::tensors_mut);
        let rows = self.tokens.values_mut().map(|tokens| &mut tokens.rows);
        let copies = self.copies.values_mut().chain(rows).map(Vec::as_mut_slice);
        self.sites.values_mut().flat_map(SiteDelta::tensors_mut).chain(virtual_tokens).chain(copies)
    }

    /// Returns an adapter of the same shape whose tensors are zero: where gradients are added up.
    pub fn zeros_like(&self) -> Self {
        let mut zeros = self.clone();
        zeros.tensors_mut().for_each(|tensor| tensor.fill(0.0));
        zeros
    }

    /// Returns how many values are trained.
    pub fn parameters(&self) -> usize {
        self.tensors().map(<[f32]>::len).sum()
    }

    /// Returns whether every value is a number.
    pub fn is_finite(&self) -> bool {
        let scales = self.pairs().all(|(_, pair)| pair.scale.is_finite());
        scales && self.tensors().flatten().all(|x| x.is_finite())
    }
}

/// `rank` rows over the `inputs` of a site, uniform in +-1/sqrt(inputs).
fn uniform_rows(stream: Stream, site: Site, (rank, inputs): (usize, usize), shape: &BaseShape) -> Vec<f32> {
    let bound = 1.0 / (inputs as f32).sqrt();
    let place = shape.index(site).unwrap_or_default() as u64;
    (0..rank * inputs).map(|i| bound * (2.0 * stream.uniform(place, i as u32) - 1.0)).collect()
}

/// `rank` rows over the `inputs` of a site, normal with standard deviation 1/rank.
fn normal_rows(stream: Stream, site: Site, (rank, inputs): (usize, usize), shape: &BaseShape) -> Vec<f32> {
    let place = shape.index(site).unwrap_or_default() as u64;
    (0..rank * inputs).map(|i| stream.normal(place, i as u32) / rank as f32).collect()
}

fn fresh_bottlenecks(spec: &BottleneckSpec, shape: &BaseShape, seed: u64) -> Result<BTreeMap<Site, SiteDelta>> {
    let (stream, size) = (Stream::new(seed, Purpose::Initialisation), spec.size as usize);
    let of_site = |site: Site| {
        let (_, outputs) = shape.dims(site.target).unwrap_or_default();
        let down = uniform_rows(stream, site, (size, outputs), shape);
        let [down_bias, up, up_bias] = [size, outputs * size, outputs].map(|len| vec![0.0; len]);
        let bottleneck = Bottleneck { non_linearity: spec.non_linearity, down, down_bias, up, up_bias };
        (site, SiteDelta::Bottleneck(bottleneck))
    };
    Ok(spec.sites(shape)?.into_iter().map(of_site).collect())
}

fn fresh_pairs(spec: &LoraSpec, shape: &BaseShape, seed: u64) -> Result<BTreeMap<Site, SiteDelta>> {
    let stream = Stream::new(seed, Purpose::Initialisation);
    let rank = spec.rank as usize;
    let pairs = spec.sites(shape)?.into_iter().map(|site| {
        let (inputs, outputs) = shape.dims(site.target).unwrap_or_default();
        let a = match spec.init {
            LoraInit::Gaussian => normal_rows(stream, site, (rank, inputs), shape),
            _ => uniform_rows(stream, site, (rank, inputs), shape),
        };
        let (scale, b) = (spec.scale(spec.alpha, spec.rank), vec![0.0; outputs * rank]);
        let [magnitude, bias] = [spec.use_dora, spec.lora_bias].map(|has| has.then(|| vec![0.0; outputs]));
        let pair = LowRank { rank, alpha: spec.alpha, scale, a, b, magnitude, bias };
        (site, SiteDelta::LowRank(pair))
    });
    Ok(pairs.collect())
}
