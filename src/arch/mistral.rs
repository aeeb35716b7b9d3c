//! Mistral 3 (Mistral AI 2025), whose queries grow with their position.

use crate::arch::config::Temperature;
use crate::arch::settings as keys;
use crate::arch::{Architecture, unsupported};

/// As Llama, with YaRN and a temperature by position.
pub const MISTRAL3: Architecture = Architecture {
    name: "mistral3",
    model_types: &["ministral3", "mistral3"],
    adds_one_to_norms: false,
    interleaved: true,
    biased: &[],
    configure: |config, settings| {
        let Some(beta) = settings.number(keys::ATTENTION_TEMPERATURE)?.filter(|beta| *beta != 0.0) else {
            return Ok(());
        };
        let original_context = match settings.integer(keys::ROPE_ORIGINAL_CONTEXT)? {
            Some(0) => return Err(unsupported(settings.name(keys::ROPE_ORIGINAL_CONTEXT), "is 0; must be over 0")),
            Some(context) => context,
            None => config.context_length,
        };
        config.attention.temperature = Some(Temperature { beta, original_context });
        Ok(())
    },
};
