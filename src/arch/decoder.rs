//! A decoder as data: the steps that the rows of a batch go through, over the tables of its linear layers and norms. Every executor
//! interprets the same list, and what comes next is the next step.

use std::ops::Range;

use crate::arch::config::{AttentionConfig, LayerConfig, ModelConfig, Temperature};
use crate::kernels::spec::{Activation, AttentionSpec};
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
    /// Of each head of queries.
    Query,
    /// Of each head of keys.
    Key,
    /// Of what attention gives.
    PostAttention,
    /// Before the feed-forward network.
    FeedForward,
    /// Of what the feed-forward network gives.
    PostFeedForward,
    /// Before the head.
    Final,
}

/// A tensor of a base, by what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Slot {
    /// `[vocab_size, hidden_size]`.
    Embedding,
    /// `[vocab_size, hidden_size]`, where it is not the embedding.
    Head,
    /// The matrix of a linear layer, `[out, in]`.
    Matrix(SiteId),
    /// The bias of a linear layer, `[out]`.
    Bias(SiteId),
    /// The weights of a norm.
    Norm(NormId),
    /// Of RoPE's frequencies.
    Factors(FactorKind),
}

impl Slot {
    /// Returns whether it is multiplied with, or looked up in.
    pub fn is_matrix(self) -> bool {
        matches!(self, Self::Embedding | Self::Head | Self::Matrix(_))
    }
}

/// Which contexts some factors of frequencies are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FactorKind {
    /// All.
    All,
    /// Those up to the original one.
    Short,
    /// Those beyond it.
    Long,
}

/// The half of a block that a projection begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Of q, k and v.
    Attention,
    /// Of gate and up.
    FeedForward,
}

/// A step. `x` is the residual stream, `[rows, hidden_size]`; `y` what goes into the next output layer.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// x = scale * the embeddings of the rows' ids.
    Embed {
        /// What they are multiplied with.
        scale: f32,
    },
    /// q, k and v, or gate and up: the sites' outputs, of norm(x).
    Project {
        /// The norm of their input.
        norm: NormId,
        /// The layers that share the input: one for each output, or one for all, whose outputs lie side by side.
        sites: Range<SiteId>,
        /// What comes out.
        part: Part,
    },
    /// y = causal attention of the turned q over the sequence's turned k and v, this batch's included.
    Attend(Attend),
    /// y = activation(gate) * up.
    Gate {
        /// What the gate goes through.
        activation: Activation,
    },
    /// x += the site's output, of y.
    Output {
        /// The linear layer.
        site: SiteId,
        /// What becomes of the output before it is added.
        merge: Merge,
    },
    /// Only the wanted rows of x go on.
    Select,
    /// The head's input: norm(x).
    Finish {
        /// The norm before the head.
        norm: NormId,
    },
}

/// What a block's attention does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attend {
    /// The transformer block, whose keys and values are kept.
    pub layer: usize,
    /// The scores.
    pub spec: AttentionSpec,
    /// Norms of each head of q and of k, before they turn.
    pub norms: Option<[NormId; 2]>,
    /// By which of [`ModelConfig::ropes`] q and k turn.
    pub rope: Option<usize>,
    /// What q is multiplied with after it has turned.
    pub temperature: Option<Temperature>,
}

/// How an output layer's result goes into the residual stream.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Merge {
    /// As it is.
    Add,
    /// Multiplied.
    Scaled(f32),
    /// Normed.
    Normed(NormId),
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
            Self::Output { site, .. } => *site..site + 1,
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
        let embed = Step::Embed { scale: config.embedding_scale };
        let mut decoder = Self { steps: vec![embed], sites: Vec::new(), norms: Vec::new() };
        for layer in 0..config.layers.len() {
            decoder.attention(config, layer);
            decoder.feed_forward(config, layer);
        }
        let norm = decoder.norm(None, NormKind::Final, config.hidden_size);
        decoder.steps.extend([Step::Select, Step::Finish { norm }]);
        decoder
    }

    fn attention(&mut self, config: &ModelConfig, layer: usize) {
        let norm = self.norm(Some(layer), NormKind::Attention, config.hidden_size);
        let [q, k, v] = config.qkv_widths();
        let sites: &[_] = match config.fused_projections {
            true => &[(Target::QkvProj, q + k + v)],
            false => &[(Target::QProj, q), (Target::KProj, k), (Target::VProj, v)],
        };
        self.project(layer, norm, sites, config.hidden_size, Part::Attention);
        let AttentionConfig { heads, head_dim, scale, softcap, qk_norm, temperature, .. } = config.attention;
        let LayerConfig { rope, window } = config.layers[layer];
        let norms =
            qk_norm.then(|| [NormKind::Query, NormKind::Key].map(|kind| self.norm(Some(layer), kind, head_dim)));
        let spec = AttentionSpec { heads, scale, softcap, window };
        self.steps.push(Step::Attend(Attend { layer, spec, norms, rope, temperature }));
        self.output(config, layer, Target::OProj, q, NormKind::PostAttention);
    }

    fn feed_forward(&mut self, config: &ModelConfig, layer: usize) {
        let width = config.intermediate_size;
        let norm = self.norm(Some(layer), NormKind::FeedForward, config.hidden_size);
        let sites: &[_] = match config.fused_projections {
            true => &[(Target::GateUpProj, 2 * width)],
            false => &[(Target::GateProj, width), (Target::UpProj, width)],
        };
        self.project(layer, norm, sites, config.hidden_size, Part::FeedForward);
        self.steps.push(Step::Gate { activation: config.activation });
        self.output(config, layer, Target::DownProj, width, NormKind::PostFeedForward);
    }

    fn project(&mut self, layer: usize, norm: NormId, sites: &[(Target, usize)], inputs: usize, part: Part) {
        let first = self.sites.len();
        self.sites.extend(sites.iter().map(|&(target, outputs)| SiteSpec::new(layer, target, inputs, outputs)));
        self.steps.push(Step::Project { norm, sites: first..self.sites.len(), part });
    }

    fn output(&mut self, config: &ModelConfig, layer: usize, target: Target, inputs: usize, post_norm: NormKind) {
        let merge = match (config.post_norms, config.residual_scale) {
            (true, _) => Merge::Normed(self.norm(Some(layer), post_norm, config.hidden_size)),
            (false, 1.0) => Merge::Add,
            (false, scale) => Merge::Scaled(scale),
        };
        self.steps.push(Step::Output { site: self.sites.len(), merge });
        self.sites.push(SiteSpec::new(layer, target, inputs, config.hidden_size));
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
