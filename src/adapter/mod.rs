//! LoRA adapters: their tensors as they are trained ([`Lora`]), as they are served ([`packed`], also as a file), and as PEFT files ([`mod@format`]).

mod base_name;
pub mod format;
mod lora;
pub mod packed;
mod packed_file;
mod selection;
mod settings;
mod tensors;

pub use crate::arch::decoder::Site;
pub use base_name::BaseNames;
pub use lora::{BaseShape, LinearShape, Lora, LoraLayer};
pub use packed::PackedLora;
pub use settings::{CONVERSION, Initialisation};
