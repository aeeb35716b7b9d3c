//! Architectures as data: what a base's settings say ([`config`]), which steps its decoder takes over which linear layers and norms
//! ([`decoder`]), and one file for each architecture that says in what it differs from the others. Nothing here computes.

pub mod config;
pub mod decoder;
mod gemma;
mod granite;
mod llama;
mod mistral;
mod phi;
mod qwen;
pub mod rope;
pub mod settings;
mod smollm;

use crate::error::{Error, Result};
use crate::request::Target;
use config::ModelConfig;
use settings::Settings;

/// One architecture.
#[derive(Debug)]
pub struct Architecture {
    /// What a GGUF file calls it, in `general.architecture`; its other keys begin with it.
    pub name: &'static str,
    /// What Hugging Face's `config.json` calls it, in `model_type`.
    pub model_types: &'static [&'static str],
    /// Whether a GGUF file holds the rows of q and k for a rotation of neighbours: row 2 j + p of a head is Hugging Face's row p * half + j.
    pub interleaved: bool,
    /// Whether Hugging Face's tensors of norms are what is added to 1. GGUF's are the factors themselves.
    pub adds_one_to_norms: bool,
    /// Linear layers that must have a bias. Any other may.
    pub biased: &'static [Target],
    /// Says what is its own, over what all architectures say alike.
    pub configure: fn(&mut ModelConfig, &dyn Settings) -> Result<()>,
}

/// All that are served and trained.
pub const ARCHITECTURES: [&Architecture; 9] = [
    &llama::LLAMA,
    &qwen::QWEN2,
    &qwen::QWEN3,
    &gemma::GEMMA2,
    &gemma::GEMMA3,
    &phi::PHI3,
    &smollm::SMOLLM3,
    &granite::GRANITE,
    &mistral::MISTRAL3,
];

impl Architecture {
    /// Returns the architecture of a GGUF file's name for it.
    ///
    /// # Errors
    /// UNSUPPORTED_BASE, which lists those that are served.
    pub fn named(name: &str) -> Result<&'static Self> {
        ARCHITECTURES.into_iter().find(|known| known.name == name).ok_or_else(|| {
            let known = ARCHITECTURES.map(|known| known.name).join(", ");
            unsupported("general.architecture", format!("is {name:?}; this version runs {known}"))
        })
    }

    /// Returns the architecture of a `model_type` of Hugging Face's.
    ///
    /// # Errors
    /// UNSUPPORTED_BASE, which lists those that are served.
    pub fn of_model_type(name: &str) -> Result<&'static Self> {
        ARCHITECTURES.into_iter().find(|known| known.model_types.contains(&name)).ok_or_else(|| {
            let known = ARCHITECTURES.map(|known| known.model_types.join(", ")).join(", ");
            unsupported("model_type", format!("is {name:?}; this version runs {known}"))
        })
    }
}

/// A refusal of a base that names the setting or tensor.
pub fn unsupported(field: impl Into<String>, message: impl Into<String>) -> Error {
    Error::invalid_because("UNSUPPORTED_BASE", field, message)
}
