//! SmolLM 3 (Hugging Face 2025): every fourth block turns nothing.

use crate::arch::Architecture;
use crate::arch::settings::{self as keys, Pattern};

/// Of so many blocks the last does without a rotation, where the settings do not say which.
const UNTURNED: usize = 4;

/// As Llama, with blocks that do not turn.
pub const SMOLLM3: Architecture = Architecture {
    name: "smollm3",
    model_types: &["smollm3"],
    adds_one_to_norms: false,
    interleaved: true,
    biased: &[],
    configure: |config, settings| {
        let turned = settings.pattern(keys::TURNED_BLOCKS)?.unwrap_or(Pattern::Period(UNTURNED));
        for (_, layer) in config.layers.iter_mut().enumerate().filter(|(i, _)| !turned.has(*i)) {
            layer.rope = None;
        }
        config.read_windows(settings)
    },
};
