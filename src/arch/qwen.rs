//! Qwen 2, 2.5 (Qwen Team 2024) and 3 (2025).

use crate::arch::Architecture;
use crate::request::Target;

/// Queries, keys and values have biases.
pub const QWEN2: Architecture = Architecture {
    name: "qwen2",
    interleaved: false,
    biased: &[Target::QProj, Target::KProj, Target::VProj],
    configure: |_, _| Ok(()),
};

/// The heads of queries and keys are normed.
pub const QWEN3: Architecture = Architecture {
    name: "qwen3",
    interleaved: false,
    biased: &[],
    configure: |config, _| {
        config.attention.qk_norm = true;
        Ok(())
    },
};
