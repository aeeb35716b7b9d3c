//! Training and reference: whole sequences through the decoder's steps, forward and backward, in float32, with gradients for the adapter's
//! tensors only; copies of the base's tensors are such.
//!
//! A pass is an ordinary function over slices: what its backward needs of a step is kept by the step ([`pass`]), the inputs of linear layers
//! and of attention; norms, gates and softmax are computed again. Where layers are recomputed (`recompute_layers`), a layer's input alone is
//! kept. Nothing outlives a pass but the memory of its buffers, which the next one uses.

mod adapted;
mod attention;
mod buffers;
mod footprint;
mod frozen;
mod head;
mod pass;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod virtual_tokens;

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Mutex;

use rayon::prelude::*;

use crate::adapter::{Adapter, RowNorms, TokenRows, VirtualForm};
use crate::arch::decoder::{NormId, Slot};
use crate::device::TrainPermit;
use crate::error::{Error, Result};
use crate::kernels::cpu::QuantizedRows;
use crate::model::Model;
use crate::model::batch::VIRTUAL_TOKEN;
use crate::sync::lock;
pub use adapted::Dropout;
use buffers::{Buffer, Buffers};
pub use footprint::PassSize;
pub use pass::Trace;

/// Multiply-adds in float32 between two offers to give way: a few milliseconds on a core.
const PIECE_MACS: usize = 1 << 28;

/// How the frozen layers are multiplied forward.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Products {
    /// By the kernels that serve, whose bits then are what is served.
    #[default]
    Served,
    /// In float32 from the exact values of the weights: the reference.
    Exact,
}

/// One pass over whole sequences without a KV cache.
#[derive(Debug, Clone, Copy, Default)]
pub struct ForwardOptions<'a> {
    /// `None` is the base.
    pub adapter: Option<&'a Adapter>,
    /// What is taken out of the base: the adapter as it began, of one that began as a part of the base.
    pub without: Option<&'a Adapter>,
    /// Dropped inputs of the adapter; none where it is evaluated.
    pub dropout: Option<Dropout>,
    /// By which it gives way to serving, at least every few milliseconds.
    pub permit: Option<&'a TrainPermit>,
    /// How the frozen layers are multiplied.
    pub products: Products,
    /// Keeps of so many layers the input of the first alone and computes the rest again; `None` keeps what each layer's backward needs.
    pub recompute_layers: Option<usize>,
}

/// How a model sees the tokens that follow.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenScores {
    /// Their log-probabilities, nats.
    pub logprobs: Vec<f32>,
    /// Whether each is the most likely one in its place.
    pub is_greedy: Vec<bool>,
}

/// The memory of passes over one model, which each leaves to the next.
#[derive(Debug)]
pub struct Workspace {
    buffers: Buffers,
    /// Made by the first pass that needs it.
    quantized: Mutex<Option<QuantizedRows>>,
}

impl Default for Workspace {
    fn default() -> Self {
        Self::with_room(u64::MAX)
    }
}

impl Workspace {
    /// Returns one that keeps no memory from pass to pass that would make more than so many bytes. A pass that needs more takes it.
    pub fn with_room(bytes: u64) -> Self {
        Self { buffers: Buffers::new(bytes), quantized: Mutex::default() }
    }

    /// Returns the most bytes of activations that it has held at a time.
    pub fn peak_bytes(&self) -> u64 {
        self.buffers.peak() + lock(&self.quantized).as_ref().map_or(0, QuantizedRows::bytes)
    }
}

impl Model {
    /// Computes ln p(ids[i+1] given ids[..=i]) of each sequence, for every (sequence, i) in `wanted`, in that order. Rows not wanted never
    /// reach the head.
    ///
    /// # Errors
    /// A sequence that does not fit the context or the vocabulary, and what is wanted outside of one.
    pub fn score_tokens(
        &self,
        sequences: &[&[u32]],
        wanted: &[(usize, usize)],
        options: ForwardOptions<'_>,
        workspace: &Workspace,
    ) -> Result<TokenScores> {
        let scope = Scope::new(self, workspace, options);
        let batch = Batch::new(&scope, sequences, wanted)?;
        Ok(scope.score(&mut pass::hidden(&scope, &batch)?, &batch.targets, None))
    }

    /// As [`Model::score_tokens`], the log-probabilities alone.
    pub fn token_logprobs(
        &self,
        sequences: &[&[u32]],
        wanted: &[(usize, usize)],
        options: ForwardOptions<'_>,
    ) -> Result<Vec<f32>> {
        Ok(self.score_tokens(sequences, wanted, options, &Workspace::default())?.logprobs)
    }

    /// As [`Model::score_tokens`], and keeps what the gradients of the log-probabilities need.
    pub fn trace<'a>(
        &'a self,
        sequences: &[&[u32]],
        wanted: &[(usize, usize)],
        options: ForwardOptions<'a>,
        workspace: &'a Workspace,
    ) -> Result<Trace<'a>> {
        let scope = Scope::new(self, workspace, options);
        let batch = Batch::new(&scope, sequences, wanted)?;
        Trace::new(scope, batch)
    }

    /// Computes the norms of the rows of W + scale * B A, by which a DoRA's magnitudes are divided. Empty for other adapters. Gives way to
    /// serving.
    pub fn row_norms(&self, adapter: &Adapter, permit: Option<&TrainPermit>) -> RowNorms {
        let options = ForwardOptions { permit, ..ForwardOptions::default() };
        Scope::new(self, &Workspace::default(), options).row_norms(adapter)
    }

    /// Computes all logits after position i, for every (sequence, i) in `wanted`: `[wanted.len(), vocab_size]`.
    ///
    /// # Errors
    /// As of [`Model::score_tokens`].
    pub fn logits(
        &self,
        sequences: &[&[u32]],
        wanted: &[(usize, usize)],
        options: ForwardOptions<'_>,
    ) -> Result<Vec<f32>> {
        let workspace = Workspace::default();
        let scope = Scope::new(self, &workspace, options);
        let batch = Batch::of_rows(&scope, sequences, wanted)?;
        Ok(scope.logits(&mut pass::hidden(&scope, &batch)?).to_vec())
    }
}

/// What the operations of a pass work with.
struct Scope<'a> {
    model: &'a Model,
    workspace: &'a Workspace,
    options: ForwardOptions<'a>,
    /// Of the adapter's magnitudes.
    norms: RowNorms,
    /// The adapter's virtual tokens, `[count, width]`.
    virtual_tokens: Option<(VirtualForm, Cow<'a, [f32]>)>,
}

impl<'a> Scope<'a> {
    fn new(model: &'a Model, workspace: &'a Workspace, options: ForwardOptions<'a>) -> Self {
        let tokens = options.adapter.and_then(|adapter| adapter.virtual_tokens.as_ref());
        let virtual_tokens = tokens.map(|tokens| (tokens.form(), tokens.folded()));
        let mut scope = Self { model, workspace, options, norms: RowNorms::new(), virtual_tokens };
        if let Some(adapter) = options.adapter {
            scope.norms = scope.row_norms(adapter);
        }
        scope
    }

    /// Returns `len` values, whatever they are.
    fn take(&self, len: usize) -> Buffer {
        self.workspace.buffers.take(len)
    }

    fn zeros(&self, len: usize) -> Buffer {
        self.workspace.buffers.zeros(len)
    }

    /// What takes the place of a tensor of the base.
    fn copy_of(&self, slot: Slot) -> Option<&[f32]> {
        self.options.adapter?.copies.get(&slot).map(Vec::as_slice)
    }

    /// The rows that some tokens have in the place of a table's.
    fn tokens_of(&self, slot: Slot) -> Option<&TokenRows> {
        self.options.adapter?.tokens.get(&slot)
    }

    /// The weights of a norm.
    fn norm(&self, norm: NormId) -> &[f32] {
        self.copy_of(Slot::Norm(norm)).unwrap_or(self.model.norm(norm))
    }

    fn yield_to_serving(&self) {
        if let Some(permit) = self.options.permit {
            permit.yield_to_serving();
        }
    }
}

/// Whole sequences, end to end in one list of rows; each behind the adapter's virtual tokens.
struct Batch {
    /// [`VIRTUAL_TOKEN`] where one stands.
    ids: Vec<u32>,
    positions: Vec<usize>,
    /// The rows of each sequence.
    sequences: Vec<Range<usize>>,
    /// The rows that reach the head, and what follows each, where that is wanted.
    selected: Vec<usize>,
    targets: Vec<u32>,
}

impl Batch {
    /// The rows of the sequences, of which those before the wanted tokens reach the head.
    fn new(scope: &Scope<'_>, sequences: &[&[u32]], wanted: &[(usize, usize)]) -> Result<Self> {
        let target = |&(sequence, i): &(usize, usize)| sequences.get(sequence).and_then(|ids| ids.get(i + 1)).copied();
        let targets: Option<Vec<u32>> = wanted.iter().map(target).collect();
        let targets = targets.ok_or_else(|| Error::internal("a wanted log-probability lies outside its sequence"))?;
        Ok(Self { targets, ..Self::of_rows(scope, sequences, wanted)? })
    }

    /// As [`Batch::new`], without targets.
    fn of_rows(scope: &Scope<'_>, sequences: &[&[u32]], wanted: &[(usize, usize)]) -> Result<Self> {
        let (model, before) = (scope.model, scope.options.adapter.map_or(0, Adapter::virtual_count));
        let fits = |ids: &&[u32]| {
            before + ids.len() <= model.context_length() && ids.iter().all(|id| (*id as usize) < model.vocab_size())
        };
        if !sequences.iter().all(fits) {
            return Err(Error::internal("a sequence does not fit the context or the vocabulary"));
        }
        let mut rows = Vec::with_capacity(sequences.len());
        let mut next = 0;
        for ids in sequences {
            let len = before + ids.len();
            rows.push(next..next + len);
            next += len;
        }
        let behind = |ids: &&[u32]| [&vec![VIRTUAL_TOKEN; before], *ids].concat();
        Ok(Self {
            ids: sequences.iter().flat_map(behind).collect(),
            positions: rows.iter().flat_map(|rows| 0..rows.len()).collect(),
            selected: wanted.iter().map(|&(sequence, i)| rows[sequence].start + before + i).collect(),
            sequences: rows,
            targets: Vec::new(),
        })
    }

    fn len(&self) -> usize {
        self.ids.len()
    }
}

/// Values that a task of an element-wise operation takes.
const PIECE: usize = 8192;

/// Adds values element by element.
fn add(to: &mut [f32], from: &[f32]) {
    let add = |(to, from): (&mut [f32], &[f32])| to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
    to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).for_each(add);
}
