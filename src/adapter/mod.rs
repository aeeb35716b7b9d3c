//! LoRA adapters: their tensors in memory ([`Lora`]) and as PEFT files ([`format`]).

pub mod format;
mod lora;

pub use lora::{BaseShape, Lora, LoraLayer, Site};
