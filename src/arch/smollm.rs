//! SmolLM 3 (Hugging Face 2025): every fourth block turns nothing.

use crate::arch::Architecture;

/// Of so many blocks the last does without a rotation.
const UNTURNED: usize = 4;

/// As Llama, with blocks that do not turn.
pub const SMOLLM3: Architecture = Architecture {
    name: "smollm3",
    interleaved: true,
    biased: &[],
    configure: |config, _| {
        for layer in config.layers.iter_mut().skip(UNTURNED - 1).step_by(UNTURNED) {
            layer.rope = None;
        }
        Ok(())
    },
};
