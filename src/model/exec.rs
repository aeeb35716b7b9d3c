//! Serving: a flat batch of rows of different lengths, paged KV, each span its own adapter. A row's bits depend on nothing but
//! its own sequence and adapter: not on the batch, the chunking, or the blocks it lies in.

use std::sync::Arc;

use crate::adapter::Lora;
use crate::error::Result;
use crate::model::Model;

/// Which rows of a span get logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitRows {
    None,
    Last,
    All,
}

/// New tokens of one sequence.
#[derive(Debug, Clone)]
pub struct Span<'a> {
    /// The new ids, at positions `start..start + ids.len()`.
    pub ids: &'a [u32],
    pub start: usize,
    /// The sequence's KV blocks in order; they cover `start + ids.len()` positions. Positions below `start` hold KV already.
    pub blocks: &'a [u32],
    /// `None` is the base.
    pub lora: Option<&'a Arc<Lora>>,
    pub logits: LogitRows,
}

/// The KV cache's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    pub block_tokens: usize,
    pub blocks: usize,
}

/// The serving executor: its buffers and its KV cache.
#[derive(Debug)]
pub struct Exec {}

impl Exec {
    pub fn new(_model: Arc<Model>, _kv: KvLayout) -> Result<Self> {
        todo!()
    }

    /// Runs the spans and gives the logits of the rows that asked for them, in order, `[rows, vocab]` row-major. Spans of the same
    /// sequence must not share a batch.
    pub fn forward(&mut self, _spans: &[Span<'_>]) -> Result<&[f32]> {
        todo!()
    }
}
