//! Where a base's settings come from, as architectures read them: a key has a name in GGUF and one in Hugging Face's `config.json`.

use crate::arch::unsupported;
use crate::error::Result;

/// A setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// In GGUF, after the architecture's name and a dot; empty where its files do not say it.
    pub gguf: &'static str,
    /// In `config.json`, `rope.` standing for what it has of the rotation, wherever that is; empty where it does not say it.
    pub hf: &'static str,
}

/// Which blocks have something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pattern {
    /// All but every so manieth.
    Period(usize),
    /// Said for each.
    Each(Vec<bool>),
}

impl Pattern {
    /// Returns whether a block has it.
    pub fn has(&self, layer: usize) -> bool {
        match self {
            Self::Period(period) => *period > 0 && layer % period < period - 1,
            Self::Each(flags) => flags.get(layer).copied().unwrap_or_default(),
        }
    }
}

/// A base's settings.
pub trait Settings {
    /// Returns what the source calls the key, for errors.
    fn name(&self, key: Key) -> String;

    /// Returns a whole number from 0 to 2^31 - 1; `None` where the source does not have the key.
    ///
    /// # Errors
    /// UNSUPPORTED_BASE where it is something else.
    fn integer(&self, key: Key) -> Result<Option<usize>>;

    /// Returns a finite number; `None` where the source does not have the key.
    ///
    /// # Errors
    /// UNSUPPORTED_BASE where it is something else.
    fn number(&self, key: Key) -> Result<Option<f32>>;

    /// Returns a list of yes and no, or one for each block as a number that says how often; `None` where the source does not have the key.
    ///
    /// # Errors
    /// UNSUPPORTED_BASE where it is something else.
    fn pattern(&self, key: Key) -> Result<Option<Pattern>>;

    /// Returns a text; `None` where the source does not have the key.
    ///
    /// # Errors
    /// UNSUPPORTED_BASE where it is something else.
    fn text(&self, key: Key) -> Result<Option<String>>;
}

impl dyn Settings + '_ {
    fn missing(&self, key: Key) -> crate::error::Error {
        unsupported(self.name(key), "is missing from the base's settings")
    }

    /// Returns a whole number over 0.
    ///
    /// # Errors
    /// UNSUPPORTED_BASE where it is missing or something else.
    pub fn count(&self, key: Key) -> Result<usize> {
        match self.integer(key)? {
            None => Err(self.missing(key)),
            Some(0) => Err(unsupported(self.name(key), "is 0; must be over 0")),
            Some(count) => Ok(count),
        }
    }

    /// Returns a number over 0; `None` where the source does not have the key.
    ///
    /// # Errors
    /// UNSUPPORTED_BASE where it is something else.
    pub fn positive(&self, key: Key) -> Result<Option<f32>> {
        match self.number(key)? {
            Some(number) if number <= 0.0 => {
                Err(unsupported(self.name(key), format!("is {number}; must be a number over 0")))
            }
            number => Ok(number),
        }
    }

    /// Returns a number over 0.
    ///
    /// # Errors
    /// UNSUPPORTED_BASE where it is missing or something else.
    pub fn required(&self, key: Key) -> Result<f32> {
        self.positive(key)?.ok_or_else(|| self.missing(key))
    }
}

macro_rules! keys {
    ($($(#[doc = $doc:literal])+ $name:ident: $gguf:literal, $hf:literal;)*) => {
        $($(#[doc = $doc])+ pub const $name: Key = Key { gguf: $gguf, hf: $hf };)*
    };
}

keys! {
    /// Transformer blocks.
    NUM_LAYERS: "block_count", "num_hidden_layers";
    /// Width of the residual stream.
    HIDDEN_SIZE: "embedding_length", "hidden_size";
    /// Width of the feed-forward network.
    INTERMEDIATE_SIZE: "feed_forward_length", "intermediate_size";
    /// Heads of queries.
    NUM_HEADS: "attention.head_count", "num_attention_heads";
    /// Heads of keys and values.
    NUM_KV_HEADS: "attention.head_count_kv", "num_key_value_heads";
    /// Values of a head.
    HEAD_DIM: "attention.key_length", "head_dim";
    /// Values of a head of values.
    VALUE_DIM: "attention.value_length", "";
    /// What the products of queries and keys are multiplied with.
    ATTENTION_SCALE: "attention.scale", "attention_multiplier";
    /// What scores are divided by the root of.
    ATTENTION_SCALAR: "", "query_pre_attn_scalar";
    /// The cap of attention's scores.
    ATTENTION_SOFTCAP: "attn_logit_softcapping", "attn_logit_softcapping";
    /// How much queries grow with their position.
    ATTENTION_TEMPERATURE: "attention.temperature_scale", "rope.llama_4_scaling_beta";
    /// Positions that a windowed block's queries see.
    SLIDING_WINDOW: "attention.sliding_window", "sliding_window";
    /// Which blocks have a window.
    SLIDING_WINDOW_PATTERN: "attention.sliding_window_pattern", "layer_types";
    /// What embeddings are multiplied with.
    EMBEDDING_SCALE: "embedding_scale", "embedding_multiplier";
    /// What is added to the residual stream is multiplied with.
    RESIDUAL_SCALE: "residual_scale", "residual_multiplier";
    /// What logits are divided by.
    LOGIT_SCALE: "logit_scale", "logits_scaling";
    /// The cap of logits.
    LOGIT_SOFTCAP: "final_logit_softcapping", "final_logit_softcapping";
    /// Tokens.
    CONTEXT_LENGTH: "context_length", "max_position_embeddings";
    /// What the norms add to the mean square.
    NORM_EPS: "attention.layer_norm_rms_epsilon", "rms_norm_eps";
    /// Which blocks turn.
    TURNED_BLOCKS: "", "no_rope_layers";
    /// The base of the rotation's frequencies.
    ROPE_BASE: "rope.freq_base", "rope.rope_theta";
    /// Values of a head that turn.
    ROPE_DIMS: "rope.dimension_count", "rope.partial_rotary_factor";
    /// The base of the frequencies in blocks with a window.
    ROPE_BASE_WINDOWED: "rope.freq_base_swa", "rope_local_base_freq";
    /// `none`, `linear`, `yarn` or `longrope`.
    ROPE_SCALING: "rope.scaling.type", "";
    /// What frequencies are divided by.
    ROPE_FACTOR: "rope.scaling.factor", "rope.factor";
    /// What cosines and sines are multiplied with.
    ROPE_ATTENTION_FACTOR: "rope.scaling.attn_factor", "";
    /// Tokens that the base was trained on before its context was made longer.
    ROPE_ORIGINAL_CONTEXT: "rope.scaling.original_context_length", "rope.original_max_position_embeddings";
    /// Turns above which YaRN keeps a frequency.
    YARN_BETA_FAST: "rope.scaling.yarn_beta_fast", "rope.beta_fast";
    /// Turns below which YaRN divides a frequency.
    YARN_BETA_SLOW: "rope.scaling.yarn_beta_slow", "rope.beta_slow";
    /// How much of YaRN's temperature is taken out again.
    YARN_LOG_MULTIPLIER: "rope.scaling.yarn_log_multiplier", "";
}
