//! Qwen 2, 2.5 (Qwen Team 2024) and 3 (2025).

use crate::arch::Architecture;
use crate::request::Target;

/// Queries, keys and values have biases.
pub const QWEN2: Architecture = Architecture {
    name: "qwen2",
    model_types: &["qwen2"],
    adds_one_to_norms: false,
    interleaved: false,
    biased: &[Target::QProj, Target::KProj, Target::VProj],
    configure: |config, settings| config.read_windows(settings),
};

/// The heads of queries and keys are normed.
pub const QWEN3: Architecture = Architecture {
    name: "qwen3",
    model_types: &["qwen3"],
    adds_one_to_norms: false,
    interleaved: false,
    biased: &[],
    configure: |config, settings| {
        config.attention.qk_norm = true;
        config.read_windows(settings)
    },
};
