//! Gemma 2 (Gemma Team 2024) and 3 (2025): four norms a block, GeGLU, scaled embeddings, windows.

use crate::arch::Architecture;
use crate::arch::config::{LayerConfig, ModelConfig};
use crate::arch::rope::{RopeConfig, RopeScaling};
use crate::arch::settings::{self as keys, Pattern, Settings};
use crate::error::Result;
use crate::kernels::spec::Activation;

/// Caps on scores and logits, and a window in every other block.
pub const GEMMA2: Architecture = Architecture {
    name: "gemma2",
    model_types: &["gemma2"],
    adds_one_to_norms: true,
    interleaved: false,
    biased: &[],
    configure: |config, settings| {
        common(config, settings, LAYERS_OF_GEMMA2_27B)?;
        config.attention.softcap = settings.positive(keys::ATTENTION_SOFTCAP)?;
        windows(config, settings, Some(4096), 2).map(drop)
    },
};

/// Norms of the heads of queries and keys, and a window in five of six blocks, which turn by frequencies of their own.
pub const GEMMA3: Architecture = Architecture {
    name: "gemma3",
    model_types: &["gemma3_text", "gemma3"],
    adds_one_to_norms: true,
    interleaved: false,
    biased: &[],
    configure: |config, settings| {
        common(config, settings, LAYERS_OF_GEMMA3_27B)?;
        config.attention.qk_norm = true;
        if windows(config, settings, None, 6)? {
            let base = settings.positive(keys::ROPE_BASE_WINDOWED)?.unwrap_or(10_000.0);
            let windowed =
                RopeConfig { base, scaling: RopeScaling::None, attention_factor: 1.0, ..config.ropes[0].clone() };
            config.ropes.push(windowed);
            let of = |layer: &LayerConfig| Some(usize::from(layer.window.is_some()));
            config.layers.iter_mut().for_each(|layer| layer.rope = of(layer));
        }
        Ok(())
    },
};

/// The largest ones, which no other setting tells from the others, scale scores by the width of a head of all and not by its own.
const LAYERS_OF_GEMMA2_27B: usize = 46;
const LAYERS_OF_GEMMA3_27B: usize = 62;

fn common(config: &mut ModelConfig, settings: &dyn Settings, layers_of_largest: usize) -> Result<()> {
    config.activation = Activation::GeluTanh;
    config.post_norms = true;
    config.embedding_scale = (config.hidden_size as f32).sqrt();
    config.logits.softcap = settings.positive(keys::LOGIT_SOFTCAP)?;
    if let Some(scalar) = settings.positive(keys::ATTENTION_SCALAR)? {
        config.attention.scale = 1.0 / scalar.sqrt();
    } else if config.layers.len() == layers_of_largest {
        config.attention.scale = 1.0 / ((config.hidden_size / config.attention.heads) as f32).sqrt();
    }
    Ok(())
}

/// Gives windows to the blocks that have them: all but every `period`th where the settings do not say. Whether there are any.
fn windows(config: &mut ModelConfig, settings: &dyn Settings, default: Option<usize>, period: usize) -> Result<bool> {
    let window = settings.integer(keys::SLIDING_WINDOW)?.or(default).unwrap_or(0);
    let pattern = settings.pattern(keys::SLIDING_WINDOW_PATTERN)?.unwrap_or(Pattern::Period(period));
    config.set_windows(window, |layer| pattern.has(layer));
    Ok(window > 0)
}
