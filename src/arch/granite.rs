//! Granite 3 and 4, the dense ones (IBM 2024): Llama with four multipliers.

use crate::arch::Architecture;
use crate::arch::settings as keys;

/// As Llama, with multipliers of embeddings, residuals, attention and logits.
pub const GRANITE: Architecture = Architecture {
    name: "granite",
    model_types: &["granite"],
    adds_one_to_norms: false,
    interleaved: true,
    biased: &[],
    configure: |config, settings| {
        config.embedding_scale = settings.positive(keys::EMBEDDING_SCALE)?.unwrap_or(1.0);
        config.virtual_scale = config.embedding_scale;
        config.residual_scale = settings.positive(keys::RESIDUAL_SCALE)?.unwrap_or(1.0);
        if let Some(scale) = settings.positive(keys::ATTENTION_SCALE)? {
            config.attention.scale = scale;
        }
        config.logits.scale = 1.0 / settings.required(keys::LOGIT_SCALE)?;
        Ok(())
    },
};
