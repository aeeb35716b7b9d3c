//! LoRA adapters: their tensors as they are trained ([`Lora`]), as they are served ([`packed`]), and as PEFT files ([`format`]).

pub mod format;
mod lora;
pub mod packed;

pub use lora::{BaseShape, Lora, LoraLayer, Site};
pub use packed::{PackedLayer, PackedLora};
