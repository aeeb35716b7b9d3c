//! A serving batch: new tokens of several sequences, each with its own length, KV blocks and adapter; and what runs it.

use std::sync::Arc;

use crate::adapter::PackedAdapter;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::groups::first_read;

pub use crate::kernels::cpu::KvDtype;
pub use crate::kernels::tensors::Best;

/// Runs batches over a KV cache of its own.
pub trait Executor: Send {
    /// Runs the spans and gives the logits of the rows that asked for them, in order, `[rows, vocab]` row-major. Spans of the same
    /// sequence must not share a batch.
    fn forward(&mut self, spans: &[SequenceChunk<'_>]) -> Result<&[f32]>;

    /// As [`Executor::forward`], where nobody needs more of those rows than the best id, so that logits need not leave a device. `None`,
    /// with nothing computed, where the logits are at hand anyway.
    fn forward_best(&mut self, _spans: &[SequenceChunk<'_>]) -> Result<Option<Vec<Best>>> {
        Ok(None)
    }
}

/// Stands in a table where a sequence holds no page.
pub const NO_PAGE: u32 = u32::MAX;

/// Stands for an id at the positions that an adapter's virtual tokens take.
pub const VIRTUAL_TOKEN: u32 = u32::MAX;

/// The KV cache's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Positions that a block holds.
    pub block_tokens: usize,
    /// Pages in all. Where all layers are one group, a block is a page.
    pub blocks: usize,
    /// How keys and values are held.
    pub dtype: KvDtype,
}

/// Which rows of a span get logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readout {
    /// No row's.
    None,
    /// The last row's.
    Last,
    /// Every row's.
    All,
}

impl Readout {
    /// Rows of logits that a span of `rows` gives.
    pub fn count(self, rows: usize) -> usize {
        match self {
            Self::None => 0,
            Self::Last => rows.min(1),
            Self::All => rows,
        }
    }
}

/// New tokens of one sequence.
#[derive(Debug, Clone)]
pub struct SequenceChunk<'a> {
    /// The new ids, at positions `start..start + ids.len()`; [`VIRTUAL_TOKEN`] at the first positions, where the adapter has virtual tokens.
    pub ids: &'a [u32],
    /// The position of the first id.
    pub start: usize,
    /// The sequence's KV pages: block by block, of each block the page of every group ([`crate::model::groups`]); they cover
    /// `start + ids.len()` positions. Positions below `start` hold KV already. What no row of these can read may be [`NO_PAGE`].
    pub blocks: &'a [u32],
    /// `None` is the base.
    pub adapter: Option<&'a Arc<PackedAdapter>>,
    /// The rows whose logits are wanted.
    pub logits: Readout,
}

impl SequenceChunk<'_> {
    /// Positions that its sequence has after it.
    pub fn end(&self) -> usize {
        self.start + self.ids.len()
    }

    /// How many of the new ids stand for virtual tokens of its adapter.
    pub fn virtual_rows(&self) -> usize {
        let count = self.adapter.map_or(0, |adapter| adapter.virtual_count());
        count.saturating_sub(self.start).min(self.ids.len())
    }

    /// Whether the adapter's virtual tokens are where they must be, and nowhere else, and all other ids in the vocabulary.
    fn has_known_ids(&self, vocab_size: usize) -> bool {
        let (before, own) = self.ids.split_at(self.virtual_rows());
        before.iter().all(|id| *id == VIRTUAL_TOKEN) && own.iter().all(|id| (*id as usize) < vocab_size)
    }
}

impl KvLayout {
    /// Fails where there is no room for a single token.
    pub(super) fn check(&self) -> Result<()> {
        if self.blocks == 0 || self.block_tokens == 0 {
            return Err(Error::invalid("kv_cache_bytes", "is too small for one block; raise the limit"));
        }
        Ok(())
    }

    /// Fails where a span does not fit the model or this cache, whose groups have these windows.
    pub(super) fn check_spans(
        &self,
        model: &Model,
        windows: &[Option<usize>],
        spans: &[SequenceChunk<'_>],
    ) -> Result<()> {
        let is_there = |span: &SequenceChunk<'_>, group: usize, window: &Option<usize>| {
            let first = first_read(*window, span.start) / self.block_tokens;
            let pages = span.blocks.iter().skip(group).step_by(windows.len());
            pages
                .skip(first)
                .take(span.end().div_ceil(self.block_tokens) - first)
                .all(|page| (*page as usize) < self.blocks)
        };
        for span in spans {
            let fits = !span.ids.is_empty()
                && span.end() <= model.context_length()
                && span.blocks.len().is_multiple_of(windows.len())
                && span.end() <= span.blocks.len() / windows.len() * self.block_tokens
                && windows.iter().enumerate().all(|(group, window)| is_there(span, group, window))
                && span.has_known_ids(model.vocab_size());
            if !fits {
                return Err(Error::internal("a span does not fit the context, its blocks or the vocabulary"));
            }
        }
        Ok(())
    }
}
/// The memory of a list, for elements that differ in what they borrow from. (Collecting an emptied list in place keeps its memory.)
pub fn reused<A, B>(mut list: Vec<A>) -> Vec<B> {
    list.clear();
    list.into_iter().map_while(|_| None).collect()
}
