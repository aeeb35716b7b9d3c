//! Frozen tensors of the base, from GGUF: the quantised values as they are, in the kernels' order and Hugging Face's order of rows.

mod gguf;
mod header;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod vocabulary;

use std::io::{Read, Seek};
use std::path::Path;

use crate::error::Result;
use crate::ids::Digest;
use crate::kernels::packed::PackedMatrix;
use crate::request::Target;
use crate::text::Vocabulary;

/// The numbers of a llama-family architecture.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// The name of the file, without its extension.
    pub name: String,
    /// Transformer blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Values of a head.
    pub head_dim: usize,
    /// Values of the feed-forward network's inner layer.
    pub ffn: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Tokens.
    pub context: usize,
    /// The base of the rotary embedding's frequencies.
    pub rope_base: f32,
    /// What the RMS norms add to the mean square.
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

/// Reads the vocabulary of a GGUF file from its header, whatever tensors there are.
///
/// # Errors
/// BASE_UNREADABLE, UNSUPPORTED_BASE or UNSUPPORTED_TOKENIZER where it cannot be read or is not known.
pub fn read_vocabulary(file: &mut (impl Read + Seek)) -> Result<Vocabulary> {
    vocabulary::vocabulary(&header::Header::read(file)?.metadata)
}

/// One layer's tensors.
#[derive(Debug)]
pub struct Block {
    /// The weights of the norm before attention.
    pub attn_norm: Vec<f32>,
    /// The weights of the norm before the feed-forward network.
    pub ffn_norm: Vec<f32>,
    /// In the order of `Target::ALL`.
    pub linears: [PackedMatrix; 7],
}

/// All of a base's tensors.
#[derive(Debug)]
pub struct Weights {
    /// The dimensions and constants.
    pub config: LlamaConfig,
    /// Of the file.
    pub digest: Digest,
    /// `[vocab, width]`.
    pub embedding: PackedMatrix,
    /// The transformer blocks.
    pub blocks: Vec<Block>,
    /// The weights of the norm before the head.
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

    /// Returns the output matrix: the file's own, or the embedding where it has none.
    pub fn head(&self) -> &PackedMatrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}
