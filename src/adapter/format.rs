//! PEFT folders: `adapter_config.json` and `adapter_model.safetensors`. Import is fail-closed: every tensor is consumed, every
//! setting that changes the meaning is supported or refused by name, and shapes are checked before anything is allocated.

use crate::adapter::{BaseShape, Lora};
use crate::error::Result;
use crate::ids::Digest;

pub const CONFIG_FILE: &str = "adapter_config.json";
pub const TENSORS_FILE: &str = "adapter_model.safetensors";

/// An adapter as files. What is stored, exported and hashed.
#[derive(Debug, Clone, PartialEq)]
pub struct Package {
    /// `adapter_config.json`.
    pub config: Vec<u8>,
    /// `adapter_model.safetensors`; float32 as trained, or the dtype that was imported.
    pub tensors: Vec<u8>,
}

impl Package {
    /// The files of an adapter trained here, float32.
    pub fn from_lora(_lora: &Lora, _shape: &BaseShape) -> Result<Self> {
        todo!()
    }

    /// Checks everything and gives the adapter in float32. `max_rank` is the limit of that name.
    pub fn read(&self, _shape: &BaseShape, _max_rank: u64) -> Result<Lora> {
        todo!()
    }

    /// Over the sorted (name, dtype, shape, bytes) and the settings that change their meaning; not over JSON text.
    pub fn digest(&self) -> Result<Digest> {
        todo!()
    }
}
