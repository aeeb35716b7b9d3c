//! Llama (Touvron et al. 2023) and what follows it: Mistral, SmolLM 2, and others whose files say `llama`.

use crate::arch::Architecture;

/// As all architectures, with nothing of its own.
pub const LLAMA: Architecture =
    Architecture { name: "llama", interleaved: true, biased: &[], configure: |_, _| Ok(()) };
