//! Frozen tensors of the base, from a GGUF file or a Hugging Face folder: the values as they are, in the kernels' order and Hugging Face's order
//! of rows.

pub mod floats;
mod gguf;
mod header;
mod hf;
mod metadata;
mod outline;
mod plan;
mod quantise;
mod sealed;
mod stream;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod vocabulary;

use std::io::{Read, Seek};
use std::path::Path;

use rayon::prelude::*;

use crate::arch::config::ModelConfig;
use crate::arch::decoder::{Decoder, Slot};
use crate::error::Result;
use crate::ids::Digest;
use crate::kernels::packed::PackedMatrix;
use crate::text::Vocabulary;
pub use hf::folder::{self, Put};
pub use outline::{FormatCount, Outline};
use quantise::Quantiser;
pub use sealed::Quantised;
pub use stream::Progress;

/// Reads the vocabulary of a GGUF file from its header, whatever tensors there are.
///
/// # Errors
/// BASE_UNREADABLE, UNSUPPORTED_BASE or UNSUPPORTED_TOKENIZER where it cannot be read or is not known.
pub fn read_vocabulary(file: &mut (impl Read + Seek)) -> Result<Vocabulary> {
    gguf::vocabulary_of(&header::Header::read(file)?)
}

/// Rows that a task brings to float32.
const ROWS_OF_A_TASK: usize = 16;

/// A linear layer's tensors.
#[derive(Debug)]
pub struct LinearWeights {
    /// `[out, in]`.
    pub matrix: PackedMatrix,
    /// `[out]`.
    pub bias: Option<Vec<f32>>,
}

/// All of a base's tensors.
#[derive(Debug)]
pub struct Weights {
    /// The dimensions and constants.
    pub config: ModelConfig,
    /// The steps, and what the linear layers and norms are.
    pub decoder: Decoder,
    /// What its files call the model, and its file's name.
    pub called: Vec<String>,
    /// Of the file, or of a folder's files.
    pub digest: Digest,
    /// `[vocab_size, hidden_size]`.
    pub embedding: PackedMatrix,
    /// Of each of the decoder's sites.
    pub linears: Vec<LinearWeights>,
    /// The weights of each of the decoder's norms.
    pub norms: Vec<Vec<f32>>,
    /// `[vocab_size, hidden_size]`; `None` where the head is the embedding.
    pub head: Option<PackedMatrix>,
}

impl Weights {
    /// Reads a GGUF file or a Hugging Face folder, once; `progress` hears how far it is. In memory are at most the packed matrices and a few pieces of the file.
    /// `quantize`: the format to which matrices of floats are brought; `None`: they are served as they are.
    ///
    /// # Errors
    /// BASE_UNREADABLE, UNSUPPORTED_BASE or UNSUPPORTED_TOKENIZER for anything that is not known: an architecture, a tensor, a block format, a
    /// RoPE scaling.
    pub fn load(path: &Path, quantize: Option<&str>, progress: &mut Progress<'_>) -> Result<(Self, Vocabulary)> {
        let quantiser = quantize.map(Quantiser::named).transpose()?;
        let load = if path.is_dir() { hf::load } else { gguf::load };
        load(path, quantiser.as_ref(), progress)
    }

    /// Reads a GGUF file from memory, as [`Weights::load`] does; for tests and fuzzing.
    ///
    /// # Errors
    /// BASE_UNREADABLE or UNSUPPORTED_BASE, for whatever bytes there are.
    pub fn from_bytes(file: &[u8]) -> Result<(Self, Vocabulary)> {
        gguf::read(std::io::Cursor::new(file), "base".to_owned(), None, &mut |_, _| {})
    }

    /// Reads the tensors of a Hugging Face folder, and not its tokenizer; for tests and fuzzing.
    ///
    /// # Errors
    /// BASE_UNREADABLE or UNSUPPORTED_BASE, for whatever files there are.
    pub fn from_folder(path: &Path) -> Result<Self> {
        hf::Folder::open(path)?.read(None, &mut |_, _| {})
    }

    /// Returns the bytes that the tensors take in memory.
    pub fn held_bytes(&self) -> u64 {
        let linears = self.linears.iter().map(|linear| &linear.matrix);
        let matrices = linears
            .chain([&self.embedding])
            .chain(&self.head)
            .map(|matrix| PackedMatrix::bytes_of(matrix.qtype(), matrix.rows(), matrix.cols()));
        let biases = self.linears.iter().filter_map(|linear| linear.bias.as_ref());
        let factors = self.config.ropes.iter().map(|rope| rope.scaling.factors());
        let floats = self.norms.iter().chain(biases).map(Vec::len).chain(factors).sum::<usize>();
        (matrices.sum::<usize>() + floats * size_of::<f32>()) as u64
    }

    /// Returns the tensors that there are but RoPE's factors, in a fixed order.
    pub fn slots(&self) -> impl Iterator<Item = Slot> + '_ {
        let linears = self.linears.iter().enumerate();
        let linears = linears.flat_map(|(id, linear)| {
            [Some(Slot::Matrix(id)), linear.bias.is_some().then_some(Slot::Bias(id))].into_iter().flatten()
        });
        let norms = (0..self.norms.len()).map(Slot::Norm);
        [Slot::Embedding].into_iter().chain(linears).chain(norms).chain(self.head.is_some().then_some(Slot::Head))
    }

    /// Returns a tensor's shape: rows and columns, or a length. Empty where there is none.
    pub fn dims(&self, slot: Slot) -> Vec<usize> {
        match (self.matrix(slot), self.vector(slot)) {
            (Some(matrix), _) => vec![matrix.rows(), matrix.cols()],
            (None, Some(vector)) => vec![vector.len()],
            (None, None) => Vec::new(),
        }
    }

    /// Returns a tensor's values in float32, row by row. Empty where there is none.
    pub fn values(&self, slot: Slot) -> Vec<f32> {
        let Some(matrix) = self.matrix(slot) else { return self.vector(slot).unwrap_or_default().to_vec() };
        let mut values = vec![0.0; matrix.rows() * matrix.cols()];
        let rows = ROWS_OF_A_TASK * matrix.cols();
        let part = |(i, part): (usize, &mut [f32])| matrix.dequantize(i * ROWS_OF_A_TASK, part);
        values.par_chunks_mut(rows).enumerate().for_each(part);
        values
    }

    fn matrix(&self, slot: Slot) -> Option<&PackedMatrix> {
        match slot {
            Slot::Embedding => Some(&self.embedding),
            Slot::Head => self.head.as_ref(),
            Slot::Matrix(id) => Some(&self.linears.get(id)?.matrix),
            Slot::Bias(_) | Slot::Norm(_) | Slot::Factors(_) => None,
        }
    }

    fn vector(&self, slot: Slot) -> Option<&[f32]> {
        match slot {
            Slot::Bias(id) => self.linears.get(id)?.bias.as_deref(),
            Slot::Norm(id) => self.norms.get(id).map(Vec::as_slice),
            Slot::Embedding | Slot::Head | Slot::Matrix(_) | Slot::Factors(_) => None,
        }
    }

    /// Returns the output matrix: the file's own, or the embedding where it has none.
    pub fn head(&self) -> &PackedMatrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}
