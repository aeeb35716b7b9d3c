//! Virtual tokens in a pass: the rows that stand before each sequence, forward and backward.

use std::ops::Range;

use super::buffers::Buffer;
use super::{Batch, ForwardOptions, Scope, Workspace, pass};
use crate::adapter::{Adapter, TokenRows, VirtualForm};
use crate::device::TrainPermit;
use crate::error::Result;
use crate::model::Model;

impl Model {
    /// Gives a fresh adapter what it has from the base: a DoRA its magnitudes and tokens their rows, so that they change nothing, and virtual
    /// tokens what the base makes of these ids, as many as there are tokens. Gives way to serving.
    ///
    /// # Errors
    /// An internal one where the ids do not fit the vocabulary or the context.
    pub fn begin(&self, adapter: &mut Adapter, ids: &[u32], permit: Option<&TrainPermit>) -> Result<()> {
        adapter.set_magnitudes(&self.row_norms(adapter, permit));
        for (slot, TokenRows { ids, rows }) in &mut adapter.tokens {
            let table = if *slot == self.head_slot() { self.head() } else { &self.weights.embedding };
            let rows = rows.chunks_exact_mut(self.config().hidden_size);
            rows.zip(ids).for_each(|(row, id)| table.dequantize(*id as usize, row));
        }
        let Some(tokens) = &mut adapter.virtual_tokens else { return Ok(()) };
        let form = tokens.form();
        let Some(values) = tokens.to_begin() else { return Ok(()) };
        match form {
            VirtualForm::Embeddings => {
                // What the model multiplies embeddings with is theirs, unless it multiplies whatever it is given.
                let scale = self.config().embedding_scale / self.config().virtual_scale;
                let rows = values.chunks_exact_mut(self.config().hidden_size);
                rows.zip(ids).for_each(|(row, id)| self.embed(*id, scale, row));
            }
            VirtualForm::KeysAndValues => {
                let workspace = Workspace::default();
                let scope = Scope::new(self, &workspace, ForwardOptions { permit, ..ForwardOptions::default() });
                let batch = Batch::of_rows(&scope, &[ids], &[])?;
                let (width, layers) = (self.shape().kv_width(), self.config().layers.len());
                pass::keys_and_values(&scope, &batch, |layer, k, v| {
                    let of_tokens = values.chunks_exact_mut(layers * 2 * width);
                    for (token, (k, v)) in of_tokens.zip(k.chunks_exact(width).zip(v.chunks_exact(width))) {
                        let (to_k, to_v) = token[layer * 2 * width..][..2 * width].split_at_mut(width);
                        to_k.copy_from_slice(k);
                        to_v.copy_from_slice(v);
                    }
                })?;
            }
        }
        Ok(())
    }
}

impl Scope<'_> {
    /// The rows of each sequence's virtual tokens.
    fn virtual_rows<'b>(&self, batch: &'b Batch) -> impl Iterator<Item = Range<usize>> + use<'b> {
        let count = self.options.adapter.map_or(0, Adapter::virtual_count);
        batch.sequences.iter().map(move |rows| rows.start..rows.start + count)
    }

    /// The virtual tokens of a form, `[count, width]`.
    fn virtual_values(&self, form: VirtualForm) -> Option<&[f32]> {
        self.virtual_tokens.as_ref().filter(|(of, _)| *of == form).map(|(_, values)| &**values)
    }

    /// Writes the virtual tokens' rows of the residual stream, `[rows, hidden_size]`.
    pub(super) fn embed_virtual(&self, batch: &Batch, x: &mut [f32]) {
        let (width, embeddings) = (self.model.config().hidden_size, self.virtual_values(VirtualForm::Embeddings));
        for rows in self.virtual_rows(batch) {
            for (token, x) in x[rows.start * width..rows.end * width].chunks_exact_mut(width).enumerate() {
                self.model.embed_virtual(embeddings.map(|all| &all[token * width..][..width]), x);
            }
        }
    }

    /// Adds the gradient of the embeddings, from that of the residual stream.
    pub(super) fn embed_virtual_backward(&self, batch: &Batch, dx: &[f32], gradient: &mut [f32]) {
        let (width, scale) = (self.model.config().hidden_size, self.model.config().virtual_scale);
        for rows in self.virtual_rows(batch) {
            let dx = &dx[rows.start * width..rows.end * width];
            gradient.iter_mut().zip(dx).for_each(|(to, d)| *to += scale * d);
        }
    }

    /// Keys behind norms and rotation, and values, `[rows, kv_width]` each, with a prefix's in the virtual tokens' places; `None` where there is
    /// no prefix.
    pub(super) fn with_prefix(&self, batch: &Batch, layer: usize, k: &mut [f32], v: &[f32]) -> Option<Buffer> {
        let prefix = self.virtual_values(VirtualForm::KeysAndValues)?;
        let mut own = self.take(v.len());
        own.copy_from_slice(v);
        self.each_prefix(batch, layer, |at, row, width| {
            k[row..row + width].copy_from_slice(&prefix[at..at + width]);
            own[row..row + width].copy_from_slice(&prefix[at + width..at + 2 * width]);
        });
        Some(own)
    }

    /// Moves the gradients of a prefix's keys and values to `gradient`; what their rows would have put there has none.
    pub(super) fn prefix_backward(&self, batch: &Batch, layer: usize, [dk, dv]: [&mut [f32]; 2], gradient: &mut [f32]) {
        self.each_prefix(batch, layer, |at, row, width| {
            for (d, at) in [(&mut *dk, at), (&mut *dv, at + width)] {
                let d = &mut d[row..row + width];
                gradient[at..at + width].iter_mut().zip(&*d).for_each(|(to, d)| *to += d);
                d.fill(0.0);
            }
        });
    }

    /// Calls `f` for each virtual token of each sequence: where its keys begin in the prefix, and in `[rows, kv_width]`, and the width.
    fn each_prefix(&self, batch: &Batch, layer: usize, mut f: impl FnMut(usize, usize, usize)) {
        let (width, layers) = (self.model.shape().kv_width(), self.model.config().layers.len());
        for rows in self.virtual_rows(batch) {
            rows.enumerate().for_each(|(token, row)| f((token * layers + layer) * 2 * width, row * width, width));
        }
    }
}
