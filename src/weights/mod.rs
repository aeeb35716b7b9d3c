//! Frozen tensors of the base, from GGUF: the quantised values as they are, in the kernels' order and Hugging Face's order of rows.

mod gguf;
mod header;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::path::Path;

use crate::error::Result;
use crate::ids::Digest;
use crate::kernels::packed::PackedMatrix;
use crate::request::Target;
use crate::text::Vocabulary;

/// The numbers of a llama-family architecture.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    pub name: String,
    pub layers: usize,
    /// Width of the residual stream.
    pub width: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub ffn: usize,
    pub vocab: usize,
    /// Tokens.
    pub context: usize,
    pub rope_base: f32,
    pub rms_eps: f32,
}

impl LlamaConfig {
    /// (in, out) features of a linear layer.
    pub fn dims(&self, target: Target) -> (usize, usize) {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match target {
            Target::QProj => (self.width, q),
            Target::KProj | Target::VProj => (self.width, kv),
            Target::OProj => (q, self.width),
            Target::GateProj | Target::UpProj => (self.width, self.ffn),
            Target::DownProj => (self.ffn, self.width),
        }
    }
}

/// One layer's tensors.
#[derive(Debug)]
pub struct Block {
    pub attn_norm: Vec<f32>,
    pub ffn_norm: Vec<f32>,
    /// In the order of `Target::ALL`.
    pub linears: [PackedMatrix; 7],
}

/// All of a base's tensors.
#[derive(Debug)]
pub struct Weights {
    pub config: LlamaConfig,
    /// Of the file.
    pub digest: Digest,
    /// `[vocab, width]`.
    pub embedding: PackedMatrix,
    pub blocks: Vec<Block>,
    pub final_norm: Vec<f32>,
    /// `[vocab, width]`; `None` where the head is the embedding.
    pub head: Option<PackedMatrix>,
}

impl Weights {
    /// Reads a GGUF file. Fails on anything it does not know: an architecture, a tensor, a block format, a RoPE scaling.
    pub fn load(path: &Path) -> Result<(Self, Vocabulary)> {
        gguf::load(path)
    }

    /// Reads a GGUF file from memory, as [`Weights::load`] does; for tests and fuzzing.
    ///
    /// # Errors
    /// BASE_UNREADABLE or UNSUPPORTED_BASE, for whatever bytes there are.
    pub fn from_bytes(file: &[u8]) -> Result<(Self, Vocabulary)> {
        gguf::read(std::io::Cursor::new(file), "base".to_owned(), Digest::of(file))
    }

    pub fn head(&self) -> &PackedMatrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}
