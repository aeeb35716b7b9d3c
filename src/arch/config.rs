//! The numbers of a base: what its settings say, checked against each other.

use crate::arch::settings::{self as keys, Settings};
use crate::arch::{Architecture, unsupported};
use crate::error::Result;

/// Most tokens of a context.
const MAX_CONTEXT: usize = 1 << 20;

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
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Values of a head.
    pub head_dim: usize,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Tokens.
    pub context_length: usize,
    /// What the RMS norms add to the mean square.
    pub norm_eps: f32,
    /// The rotation of queries and keys.
    pub rope: RopeConfig,
    /// Transformer blocks.
    pub layers: usize,
}

/// A rotary embedding (Su et al. 2021).
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// The base of the frequencies.
    pub base: f32,
    /// Values of a head that turn.
    pub dims: usize,
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
        let (hidden_size, heads) = (settings.count(keys::HIDDEN_SIZE)?, settings.count(keys::NUM_HEADS)?);
        let rope_dims = settings.integer(keys::ROPE_DIMS)?;
        let head_dim = settings.integer(keys::HEAD_DIM)?.or(rope_dims).unwrap_or(hidden_size / heads);
        if let Some(kind) = settings.text(keys::ROPE_SCALING)?.filter(|kind| kind != "none") {
            let message = format!("is {kind:?}; scaled RoPE is not supported");
            return Err(unsupported(settings.name(keys::ROPE_SCALING), message));
        }
        let mut config = Self {
            name,
            architecture: architecture.name,
            hidden_size,
            intermediate_size: settings.count(keys::INTERMEDIATE_SIZE)?,
            heads,
            kv_heads: settings.integer(keys::NUM_KV_HEADS)?.unwrap_or(heads),
            head_dim,
            vocab_size,
            context_length: settings.count(keys::CONTEXT_LENGTH)?,
            norm_eps: settings.required(keys::NORM_EPS)?,
            rope: RopeConfig {
                base: settings.positive(keys::ROPE_BASE)?.unwrap_or(10_000.0),
                dims: rope_dims.unwrap_or(head_dim),
            },
            layers: settings.count(keys::NUM_LAYERS)?,
        };
        (architecture.configure)(&mut config, settings)?;
        config.check(settings)?;
        Ok(config)
    }

    fn check(&self, settings: &dyn Settings) -> Result<()> {
        let Self { heads, kv_heads, head_dim, context_length, layers, .. } = *self;
        if vec![kv_heads, self.vocab_size].contains(&0) || !heads.is_multiple_of(kv_heads) {
            let message = format!("is {kv_heads}, which does not divide the {heads} heads");
            return Err(unsupported(settings.name(keys::NUM_KV_HEADS), message));
        }
        if head_dim == 0 || !head_dim.is_multiple_of(8) || self.rope.dims != head_dim {
            let message = format!("is {head_dim}, of which {} turn; all must turn", self.rope.dims);
            return Err(unsupported(settings.name(keys::ROPE_DIMS), message));
        }
        if context_length > MAX_CONTEXT {
            let message = format!("is {context_length}; contexts of up to {MAX_CONTEXT} tokens are served");
            return Err(unsupported(settings.name(keys::CONTEXT_LENGTH), message));
        }
        if layers > MAX_LAYERS {
            let message = format!("is {layers}; up to {MAX_LAYERS} are served");
            return Err(unsupported(settings.name(keys::NUM_LAYERS), message));
        }
        Ok(())
    }
}
