//! Phi 3, 3.5 and 4 (Abdin et al. 2024): q, k and v in one matrix, gate and up in another, of whose heads a part may turn.

use crate::arch::Architecture;
use crate::arch::settings as keys;

/// As Llama, with fused projections.
pub const PHI3: Architecture = Architecture {
    name: "phi3",
    interleaved: false,
    biased: &[],
    configure: |config, settings| {
        config.fused_projections = true;
        let window = settings.integer(keys::SLIDING_WINDOW)?.unwrap_or(0);
        config.set_windows(window, |_| true);
        Ok(())
    },
};
