//! A decoder as data: the steps that the rows of a batch go through, over the tables of its linear layers and norms. Every executor
//! interprets the same list, and what comes next is the next step.

use std::ops::Range;

use crate::arch::config::ModelConfig;
use crate::request::Target;

/// A linear layer's number: its place in [`Decoder::sites`].
pub type SiteId = usize;

/// A norm's number: its place in [`Decoder::norms`].
pub type NormId = usize;

/// A linear layer by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Site {
    /// The transformer block, from 0.
    pub layer: u32,
    /// The linear layer within the block.
    pub target: Target,
}

/// A linear layer that adapters can change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SiteSpec {
    /// Its name.
    pub site: Site,
    /// Values that go in.
    pub inputs: usize,
    /// Values that come out.
    pub outputs: usize,
}

/// An RMS norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NormSpec {
    /// The transformer block; `None` is the norm before the head.
    pub layer: Option<usize>,
    /// Which of the block's.
    pub kind: NormKind,
    /// Its weights.
    pub width: usize,
}

/// What a norm is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Before attention.
    Attention,
    /// Before the feed-forward network.
    FeedForward,
    /// Before the head.
    Final,
}

/// The half of a block that a projection begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The sites are q, k and v.
    Attention,
    /// The sites are gate and up.
    FeedForward,
}

/// A step. `x` is the residual stream, `[rows, hidden_size]`; `y` what goes into the next output layer.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// x = the embeddings of the rows' ids.
    Embed,
    /// The sites' outputs, of norm(x).
    Project {
        /// The norm of their input.
        norm: NormId,
        /// The layers that share the input.
        sites: Range<SiteId>,
        /// What they are.
        part: Part,
    },
    /// y = causal attention of the turned q over the sequence's turned k and v, this batch's included.
    Attend {
        /// The transformer block, whose keys and values are kept.
        layer: usize,
    },
    /// y = silu(gate) * up.
    Gate,
    /// x += the site's output, of y.
    Output {
        /// The linear layer.
        site: SiteId,
    },
    /// Only the wanted rows of x go on.
    Select,
    /// The head's input: norm(x).
    Finish {
        /// The norm before the head.
        norm: NormId,
    },
}

/// A decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoder {
    /// In their order.
    pub steps: Vec<Step>,
    /// Linear layers by number; they are numbered in the order in which they are met, so those of a block lie together.
    pub sites: Vec<SiteSpec>,
    /// Norms by number.
    pub norms: Vec<NormSpec>,
}

impl SiteSpec {
    fn new(layer: usize, target: Target, inputs: usize, outputs: usize) -> Self {
        Self { site: Site { layer: layer as u32, target }, inputs, outputs }
    }
}

impl Step {
    /// Returns the linear layers of this step.
    pub fn sites(&self) -> Range<SiteId> {
        match self {
            Self::Project { sites, .. } => sites.clone(),
            Self::Output { site } => *site..site + 1,
            _ => 0..0,
        }
    }
}

/// Returns the linear layers that come first in some steps; none where only the head is left.
pub fn next_sites(steps: &[Step]) -> Range<SiteId> {
    steps.iter().map(Step::sites).find(|sites| !sites.is_empty()).unwrap_or(0..0)
}

impl Decoder {
    /// Lays out the decoder of a base.
    pub fn new(config: &ModelConfig) -> Self {
        let mut decoder = Self { steps: vec![Step::Embed], sites: Vec::new(), norms: Vec::new() };
        for layer in 0..config.layers {
            decoder.block(config, layer);
        }
        let norm = decoder.norm(None, NormKind::Final, config.hidden_size);
        decoder.steps.extend([Step::Select, Step::Finish { norm }]);
        decoder
    }

    fn block(&mut self, config: &ModelConfig, layer: usize) {
        let hidden = config.hidden_size;
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let norm = self.norm(Some(layer), NormKind::Attention, hidden);
        let sites = [(Target::QProj, q), (Target::KProj, kv), (Target::VProj, kv)];
        self.project(layer, norm, &sites, hidden, Part::Attention);
        self.steps.push(Step::Attend { layer });
        self.output(layer, Target::OProj, (q, hidden));
        let norm = self.norm(Some(layer), NormKind::FeedForward, hidden);
        let sites = [Target::GateProj, Target::UpProj].map(|target| (target, config.intermediate_size));
        self.project(layer, norm, &sites, hidden, Part::FeedForward);
        self.steps.push(Step::Gate);
        self.output(layer, Target::DownProj, (config.intermediate_size, hidden));
    }

    fn project(&mut self, layer: usize, norm: NormId, sites: &[(Target, usize)], inputs: usize, part: Part) {
        let first = self.sites.len();
        self.sites.extend(sites.iter().map(|&(target, outputs)| SiteSpec::new(layer, target, inputs, outputs)));
        self.steps.push(Step::Project { norm, sites: first..self.sites.len(), part });
    }

    fn output(&mut self, layer: usize, target: Target, (inputs, outputs): (usize, usize)) {
        self.steps.push(Step::Output { site: self.sites.len() });
        self.sites.push(SiteSpec::new(layer, target, inputs, outputs));
    }

    fn norm(&mut self, layer: Option<usize>, kind: NormKind, width: usize) -> NormId {
        self.norms.push(NormSpec { layer, kind, width });
        self.norms.len() - 1
    }

    /// Returns the linear layers of the first block: those of the others are the same.
    pub fn block_sites(&self) -> &[SiteSpec] {
        let count = self.sites.iter().take_while(|site| site.site.layer == 0).count();
        &self.sites[..count]
    }
}

/// Does what steps say.
pub trait StepExecutor {
    /// What can go wrong.
    type Error;

    /// Takes one step; `next` are those after it.
    fn take(&mut self, step: &Step, next: &[Step]) -> Result<(), Self::Error>;

    /// Takes all steps.
    fn run(&mut self, steps: &[Step]) -> Result<(), Self::Error> {
        (0..steps.len()).try_for_each(|i| self.take(&steps[i], &steps[i + 1..]))
    }
}
