//! Phi 3, 3.5 and 4 (Abdin et al. 2024): q, k and v in one matrix, gate and up in another, of whose heads a part may turn.

use crate::arch::Architecture;

/// As Llama, with fused projections.
pub const PHI3: Architecture = Architecture {
    name: "phi3",
    model_types: &["phi3"],
    adds_one_to_norms: false,
    interleaved: false,
    biased: &[],
    configure: |config, settings| {
        config.fused_projections = true;
        config.read_windows(settings)
    },
};
