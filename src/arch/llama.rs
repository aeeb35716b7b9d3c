//! Llama (Touvron et al. 2023) and what follows it: Mistral, SmolLM 2, and others whose files say `llama`.

use crate::arch::Architecture;

/// As all architectures, with nothing of its own but Mistral's windows.
pub const LLAMA: Architecture = Architecture {
    name: "llama",
    model_types: &["llama", "mistral"],
    adds_one_to_norms: false,
    interleaved: true,
    biased: &[],
    configure: |config, settings| config.read_windows(settings),
};
