//! The base model: one architecture ([`llama`]) over two executors, [`traced`] for training and reference, [`exec`] for serving.

pub mod exec;
pub mod traced;

use std::path::Path;
use std::sync::Arc;

use crate::adapter::BaseShape;
use crate::error::Result;
use crate::text::Text;

/// The frozen base. Shared as `Arc<Model>`; training and serving read the same bytes.
#[derive(Debug)]
pub struct Model {}

impl Model {
    /// Loads a GGUF file of the llama architecture and its tokenizer.
    pub fn load(_path: &Path) -> Result<(Arc<Self>, Arc<Text>)> {
        todo!()
    }

    /// A small random model over `Text::tiny`'s vocabulary, the same for the same seed: 2 layers, width 64, 4 heads, 2 KV heads,
    /// context 256. For tests.
    pub fn tiny(_seed: u64) -> (Arc<Self>, Arc<Text>) {
        todo!()
    }

    pub fn shape(&self) -> &BaseShape {
        todo!()
    }

    pub fn vocab_size(&self) -> usize {
        todo!()
    }

    /// Tokens.
    pub fn context_length(&self) -> usize {
        todo!()
    }

    /// Bytes of the KV cache for one token.
    pub fn kv_bytes_per_token(&self) -> u64 {
        todo!()
    }
}
