//! Serving on the CPU: a flat batch of rows of different lengths, paged KV, each span its own adapter. A row's bits depend on nothing but
//! its own sequence and adapter: not on the batch, the chunking, or the blocks it lies in.

use std::sync::{Arc, Mutex};

use crate::adapter::Site;
use crate::error::Result;
use crate::kernels::cpu::{self, QuantizedRows};
use crate::model::Model;
use crate::model::batch::{Executor, KvLayout, Span};
use crate::model::kv::KvCache;
use crate::model::llama::{self, Norm, Ops};

/// The serving executor: its buffers and its KV cache.
#[derive(Debug)]
pub(super) struct Exec {
    model: Arc<Model>,
    kv: KvCache,
    buffers: Buffers,
    quantized: QuantizedRows,
    logits: Vec<f32>,
}

impl Exec {
    pub fn new(model: Arc<Model>, kv: KvLayout) -> Result<Self> {
        kv.check()?;
        let kv = KvCache::new(model.config(), kv);
        Ok(Self { model, kv, buffers: Buffers::default(), quantized: QuantizedRows::default(), logits: Vec::new() })
    }
}

impl Executor for Exec {
    fn forward(&mut self, spans: &[Span<'_>]) -> Result<&[f32]> {
        self.kv.layout().check_spans(&self.model, spans)?;
        let model = self.model.clone();
        let rows = spans
            .iter()
            .enumerate()
            .flat_map(|(span, s)| (0..s.ids.len()).map(move |i| RowPlace { span, position: s.start + i }))
            .collect();
        let mut pass = ExecPass {
            model: &model,
            spans,
            rows,
            kv: &mut self.kv,
            buffers: &mut self.buffers,
            quantized: &mut self.quantized,
            quantized_of: None,
        };
        let hidden = llama::hidden(&model, &mut pass)?;
        let head = model.head();
        self.quantized.fill(&hidden.data, model.config().width);
        self.logits.resize(hidden.data.len() / model.config().width * head.rows, 0.0);
        cpu::matmul(head, &self.quantized, &mut self.logits);
        Ok(&self.logits)
    }
}

/// Where a row stands.
#[derive(Debug, Clone, Copy)]
struct RowPlace {
    span: usize,
    position: usize,
}

/// Activations `[rows, width]` in a buffer that goes back to the pool when dropped.
#[derive(Debug)]
struct Activations {
    /// Tells one content from another.
    id: u64,
    width: usize,
    data: Vec<f32>,
    pool: Arc<Mutex<Vec<Vec<f32>>>>,
}

impl Drop for Activations {
    fn drop(&mut self) {
        if let Ok(mut free) = self.pool.lock() {
            free.push(std::mem::take(&mut self.data));
        }
    }
}

/// Buffers that are used again: a steady batch allocates none.
#[derive(Debug, Default)]
struct Buffers {
    pool: Arc<Mutex<Vec<Vec<f32>>>>,
    next_id: u64,
}

impl Buffers {
    fn take(&mut self, rows: usize, width: usize) -> Activations {
        let mut data = self.pool.lock().ok().and_then(|mut free| free.pop()).unwrap_or_default();
        data.resize(rows * width, 0.0);
        Activations { id: self.new_id(), width, data, pool: self.pool.clone() }
    }

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}

/// One batch going through the model.
struct ExecPass<'a> {
    model: &'a Model,
    spans: &'a [Span<'a>],
    rows: Vec<RowPlace>,
    kv: &'a mut KvCache,
    buffers: &'a mut Buffers,
    quantized: &'a mut QuantizedRows,
    /// Whose content `quantized` holds: q, k and v share one quantisation, gate and up another.
    quantized_of: Option<u64>,
}

impl Ops for ExecPass<'_> {
    type Rows = Activations;

    fn embed(&mut self) -> Result<Activations> {
        let width = self.model.config().width;
        let mut x = self.buffers.take(self.rows.len(), width);
        let ids = self.spans.iter().flat_map(|span| span.ids);
        for (out, id) in x.data.chunks_exact_mut(width).zip(ids) {
            self.model.embed(*id, out);
        }
        Ok(x)
    }

    fn norm(&mut self, x: &Activations, norm: Norm) -> Result<Activations> {
        let mut out = self.buffers.take(x.data.len() / x.width, x.width);
        cpu::rms_norm(&x.data, self.model.norm(norm), self.model.config().rms_eps, &mut out.data);
        Ok(out)
    }

    fn linear(&mut self, x: &Activations, site: Site) -> Result<Activations> {
        let matrix = self.model.matrix(site);
        if self.quantized_of != Some(x.id) {
            self.quantized.fill(&x.data, x.width);
            self.quantized_of = Some(x.id);
        }
        let mut y = self.buffers.take(self.rows.len(), matrix.rows);
        cpu::matmul(matrix, self.quantized, &mut y.data);
        let mut row = 0;
        for span in self.spans {
            let rows = row..row + span.ids.len();
            row = rows.end;
            if let Some(layer) = span.lora.and_then(|lora| lora.layers.get(&site)) {
                let x = &x.data[rows.start * matrix.cols..rows.end * matrix.cols];
                let y = &mut y.data[rows.start * matrix.rows..rows.end * matrix.rows];
                cpu::lora(x, &layer.a, &layer.b, layer.rank, layer.scale, y);
            }
        }
        Ok(y)
    }

    fn rope(&mut self, mut x: Activations) -> Result<Activations> {
        let table = &self.model.rope;
        let rows = &self.rows;
        cpu::rope(&mut x.data, x.width, table.half, |row| table.at(rows[row].position));
        x.id = self.buffers.new_id();
        Ok(x)
    }

    fn attention(&mut self, layer: usize, q: Activations, k: Activations, v: Activations) -> Result<Activations> {
        // Everything is read back after rounding, this chunk's rows included: so a chunk's borders change no bit.
        let (rows, spans) = (&self.rows, self.spans);
        for (row, (key, value)) in rows.iter().zip(k.data.chunks_exact(k.width).zip(v.data.chunks_exact(v.width))) {
            self.kv.write(layer, spans[row.span].blocks, row.position, key, value);
        }
        let mut out = self.buffers.take(rows.len(), q.width);
        let place = |row: usize| (spans[rows[row].span].blocks, rows[row].position);
        cpu::attention(&q.data, self.kv.view(layer), self.model.config().heads, place, &mut out.data);
        Ok(out)
    }

    fn swiglu(&mut self, mut gate: Activations, up: Activations) -> Result<Activations> {
        cpu::swiglu(&mut gate.data, &up.data);
        gate.id = self.buffers.new_id();
        Ok(gate)
    }

    fn add(&mut self, mut x: Activations, y: Activations) -> Result<Activations> {
        cpu::add(&mut x.data, &y.data);
        x.id = self.buffers.new_id();
        Ok(x)
    }

    fn select(&mut self, x: Activations) -> Result<Activations> {
        let mut kept = self.buffers.take(0, x.width);
        let mut row = 0;
        for span in self.spans {
            let end = row + span.ids.len();
            let from = end - span.logits.count(span.ids.len());
            kept.data.extend_from_slice(&x.data[from * x.width..end * x.width]);
            row = end;
        }
        Ok(kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::Lora;
    use crate::model::batch::LogitRows;
    use crate::request::LoraSpec;

    /// Logits that look like some answer would be sent as one.
    #[test]
    fn an_overflow_is_never_taken_for_zeros() {
        let (model, _) = Model::tiny(1);
        let mut lora = Lora::fresh(&LoraSpec::default(), model.shape(), 5).unwrap();
        lora.layers.values_mut().for_each(|layer| layer.b.fill(1e38));
        let lora = Arc::new(lora);
        let mut exec = Exec::new(model, KvLayout { block_tokens: 4, blocks: 4 }).unwrap();
        let span = |ids, start, lora| Span { ids, start, blocks: &[2, 0], lora, logits: LogitRows::All };
        assert!(exec.forward(&[span(&[1, 2, 3], 0, Some(&lora))]).unwrap().iter().all(|x| x.is_nan()));
        assert!(exec.forward(&[span(&[4], 3, None)]).unwrap().iter().all(|x| x.is_nan()), "nor by a later row");
        assert!(exec.forward(&[span(&[1, 2, 3], 0, None)]).unwrap().iter().all(|x| x.is_finite()));
    }
}
