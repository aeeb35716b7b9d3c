//! The numbers of a base: what its settings say, checked against each other.

use crate::arch::decoder::Part;
use crate::arch::rope::RopeConfig;
use crate::arch::settings::{self as keys, Settings};
use crate::arch::{Architecture, unsupported};
use crate::error::{Error, Result};
use crate::kernels::spec::Activation;

/// Most tokens of a context.
pub const MAX_CONTEXT: usize = 1 << 20;

/// Most transformer blocks.
const MAX_LAYERS: usize = 1024;

/// The numbers of a decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The name of the file or folder, without its extension.
    pub name: String,
    /// What its file calls the architecture.
    pub architecture: &'static str,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward network.
    pub intermediate_size: usize,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Tokens.
    pub context_length: usize,
    /// What the RMS norms add to the mean square.
    pub norm_eps: f32,
    /// What the gate of the feed-forward network goes through.
    pub activation: Activation,
    /// How queries, keys and values are made and meet.
    pub attention: AttentionConfig,
    /// Whether what attention and the feed-forward network give is normed before it is added.
    pub post_norms: bool,
    /// Whether q, k and v are one matrix, and gate and up another.
    pub fused_projections: bool,
    /// What embeddings are multiplied with.
    pub embedding_scale: f32,
    /// What trained embeddings that stand before a sequence are multiplied with: the embedding's scale where the model applies it to whatever it
    /// is given, and not the embedding layer itself.
    pub virtual_scale: f32,
    /// What attention and the feed-forward network give is multiplied with, before it is added.
    pub residual_scale: f32,
    /// What becomes of logits.
    pub logits: LogitConfig,
    /// Rotations that the blocks refer to.
    pub ropes: Vec<RopeConfig>,
    /// Transformer blocks.
    pub layers: Vec<LayerConfig>,
}

/// Attention's numbers, the same in every block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionConfig {
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Values of a head.
    pub head_dim: usize,
    /// What the products of queries and keys are multiplied with.
    pub scale: f32,
    /// A scaled score s becomes `cap * tanh(s / cap)`.
    pub softcap: Option<f32>,
    /// Whether the heads of q and k are normed.
    pub qk_norm: bool,
    /// Queries grow with their position.
    pub temperature: Option<Temperature>,
}

/// What a query at position p is multiplied with: `1 + beta * ln(1 + floor(p / original_context))`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Temperature {
    /// How much.
    pub beta: f32,
    /// Tokens after which it begins.
    pub original_context: usize,
}

impl Temperature {
    /// Returns the factor of a position.
    pub fn at(&self, position: usize) -> f32 {
        1.0 + self.beta * ((1 + position / self.original_context) as f32).ln()
    }
}

/// What becomes of logits: `scale`, then `cap * tanh(logit / cap)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitConfig {
    /// What they are multiplied with.
    pub scale: f32,
    /// Their bound.
    pub softcap: Option<f32>,
}

/// What is a block's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// The rotation, by its place in [`ModelConfig::ropes`]; `None` where nothing turns.
    pub rope: Option<usize>,
    /// How many positions a query sees, its own included; `None` is all before it.
    pub window: Option<usize>,
}

impl ModelConfig {
    /// Reads a base of this name whose vocabulary has so many tokens.
    ///
    /// # Errors
    /// UNSUPPORTED_BASE where a setting is missing, is no sane number, or does not fit the others.
    pub fn read(
        architecture: &'static Architecture,
        settings: &dyn Settings,
        name: String,
        vocab_size: usize,
    ) -> Result<Self> {
        let layers = settings.count(keys::NUM_LAYERS)?;
        if layers > MAX_LAYERS {
            let message = format!("is {layers}; up to {MAX_LAYERS} are served");
            return Err(unsupported(settings.name(keys::NUM_LAYERS), message));
        }
        let attention = AttentionConfig::read(settings)?;
        let mut config = Self {
            name,
            architecture: architecture.name,
            hidden_size: settings.count(keys::HIDDEN_SIZE)?,
            intermediate_size: settings.count(keys::INTERMEDIATE_SIZE)?,
            vocab_size,
            context_length: settings.count(keys::CONTEXT_LENGTH)?,
            norm_eps: settings.required(keys::NORM_EPS)?,
            activation: Activation::Silu,
            post_norms: false,
            fused_projections: false,
            embedding_scale: 1.0,
            virtual_scale: 1.0,
            residual_scale: 1.0,
            logits: LogitConfig { scale: 1.0, softcap: None },
            ropes: vec![RopeConfig::read(settings, attention.head_dim)?],
            layers: vec![LayerConfig { rope: Some(0), window: None }; layers],
            attention,
        };
        (architecture.configure)(&mut config, settings)?;
        config.check(settings)?;
        Ok(config)
    }

    fn check(&self, settings: &dyn Settings) -> Result<()> {
        let AttentionConfig { heads, kv_heads, head_dim, .. } = self.attention;
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            let message = format!("is {kv_heads}, which does not divide the {heads} heads");
            return Err(unsupported(settings.name(keys::NUM_KV_HEADS), message));
        }
        if head_dim == 0 || !head_dim.is_multiple_of(8) {
            let message = format!("is {head_dim}; heads of a multiple of 8 values are served");
            return Err(unsupported(settings.name(keys::HEAD_DIM), message));
        }
        for rope in &self.ropes {
            rope.check(settings, head_dim)?;
        }
        if self.context_length > MAX_CONTEXT {
            let message = format!("is {}; contexts of up to {MAX_CONTEXT} tokens are served", self.context_length);
            return Err(unsupported(settings.name(keys::CONTEXT_LENGTH), message));
        }
        if self.vocab_size == 0 {
            return Err(unsupported("tokenizer", "has no tokens"));
        }
        Ok(())
    }

    /// Returns the widths of q, k and v of a token.
    pub fn qkv_widths(&self) -> [usize; 3] {
        let AttentionConfig { heads, kv_heads, head_dim, .. } = self.attention;
        [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    }

    /// Returns the widths of what a projection gives a token.
    pub fn widths(&self, part: Part) -> Vec<usize> {
        match part {
            Part::Attention => self.qkv_widths().into(),
            Part::FeedForward => vec![self.intermediate_size; 2],
        }
    }

    /// Takes the context that is asked for, in tokens; without one what the base was trained for, which of a base with two sets of frequencies
    /// (LongRoPE) is its original context: the others are taken for longer contexts alone, and answer short prompts differently.
    ///
    /// # Errors
    /// UNSUPPORTED_BASE where more is asked for than the base was trained for.
    pub fn take_context(&mut self, asked: Option<usize>) -> Result<()> {
        let original = self.ropes.iter().filter_map(|rope| rope.scaling.short_context()).min();
        let most = self.context_length;
        match asked {
            Some(asked) if asked > most || asked == 0 => {
                let message = format!("is {asked}; must be from 1 to {most} tokens, what this base was trained for");
                return Err(Error::invalid_because("UNSUPPORTED_BASE", "context", message));
            }
            asked => self.context_length = asked.unwrap_or(original.unwrap_or(most).min(most)),
        }
        Ok(())
    }

    /// Gives windows to the blocks that the settings give one, to all where they do not say which.
    ///
    /// # Errors
    /// UNSUPPORTED_BASE where a setting is none.
    pub fn read_windows(&mut self, settings: &dyn Settings) -> Result<()> {
        let window = settings.integer(keys::SLIDING_WINDOW)?.unwrap_or(0);
        let pattern = settings.pattern(keys::SLIDING_WINDOW_PATTERN)?;
        self.set_windows(window, |layer| pattern.as_ref().is_none_or(|pattern| pattern.has(layer)));
        Ok(())
    }

    /// Gives a window of so many tokens to the blocks that `windowed` names; 0 is none.
    pub fn set_windows(&mut self, window: usize, windowed: impl Fn(usize) -> bool) {
        for (i, layer) in self.layers.iter_mut().enumerate() {
            layer.window = (window > 0 && windowed(i)).then_some(window);
        }
    }
}

impl AttentionConfig {
    fn read(settings: &dyn Settings) -> Result<Self> {
        let (hidden_size, heads) = (settings.count(keys::HIDDEN_SIZE)?, settings.count(keys::NUM_HEADS)?);
        let head_dim = match settings.integer(keys::HEAD_DIM)? {
            Some(head_dim) => head_dim,
            None => hidden_size / heads,
        };
        if let Some(values) = settings.integer(keys::VALUE_DIM)?.filter(|values| *values != head_dim) {
            let message =
                format!("is {values}, and the heads of queries have {head_dim} values; both must be the same");
            return Err(unsupported(settings.name(keys::VALUE_DIM), message));
        }
        Ok(Self {
            heads,
            kv_heads: settings.integer(keys::NUM_KV_HEADS)?.unwrap_or(heads),
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            softcap: None,
            qk_norm: false,
            temperature: None,
        })
    }
}
