//! Serving by candle's own operations, on any device that candle knows: how a GPU serves.
//!
//! The same batch, the same reading of keys and values back after rounding as [`super::exec`], but without its promise on bits: candle
//! multiplies few rows by another kernel than many. The tests compare the two on the CPU.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Weak};

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{D, DType, Device, Module as _, Tensor};

use super::RopeTable;
use super::batch::{Executor, KvLayout, LogitRows, Span};
use super::llama::{self, Norm, Ops};
use crate::adapter::{PackedLora, Site};
use crate::error::Result;
use crate::kernels::blocks::QType;
use crate::kernels::packed::PackedMatrix;
use crate::model::Model;
use crate::request::Target;
use crate::weights::Weights;

/// The largest finite half-precision number.
const LARGEST_HALF: f32 = 65504.0;

/// The frozen base on a device: its quantised bytes as they are, norms and angles beside them. The embedding stays on the host.
#[derive(Debug)]
pub(super) struct DeviceWeights {
    device: Device,
    blocks: Vec<DeviceBlock>,
    final_norm: Tensor,
    head: QMatMul,
    /// Of every position's angles, `[context, head_dim / 2]`.
    cos: Tensor,
    sin: Tensor,
}

#[derive(Debug)]
struct DeviceBlock {
    attn_norm: Tensor,
    ffn_norm: Tensor,
    /// In the order of `Target::ALL`.
    linears: Vec<QMatMul>,
}

impl DeviceWeights {
    pub fn new(weights: &Weights, rope: &RopeTable, device: &Device) -> Result<Arc<Self>> {
        let vector = |values: &[f32]| Tensor::from_slice(values, values.len(), device);
        let table = |values: &[f32]| Tensor::from_slice(values, (values.len() / rope.half, rope.half), device);
        let blocks = weights.blocks.iter().map(|block| {
            Ok(DeviceBlock {
                attn_norm: vector(&block.attn_norm)?,
                ffn_norm: vector(&block.ffn_norm)?,
                linears: block.linears.iter().map(|matrix| upload(matrix, device)).collect::<Result<_>>()?,
            })
        });
        Ok(Arc::new(Self {
            blocks: blocks.collect::<Result<_>>()?,
            final_norm: vector(&weights.final_norm)?,
            head: upload(weights.head(), device)?,
            cos: table(&rope.cos)?,
            sin: table(&rope.sin)?,
            device: device.clone(),
        }))
    }

    fn norm(&self, norm: Norm) -> &Tensor {
        match norm {
            Norm::Attention(layer) => &self.blocks[layer].attn_norm,
            Norm::Ffn(layer) => &self.blocks[layer].ffn_norm,
            Norm::Final => &self.final_norm,
        }
    }
}

/// The bytes as they are. Not through `QTensor::quantize`, which on CUDA leaves the padding of rows that are no multiple of 256
/// uninitialised.
fn upload(matrix: &PackedMatrix, device: &Device) -> Result<QMatMul> {
    let dtype = match matrix.qtype() {
        QType::Q4_0 => GgmlDType::Q4_0,
        QType::Q4_1 => GgmlDType::Q4_1,
        QType::Q8_0 => GgmlDType::Q8_0,
    };
    let storage = QStorage::from_data(matrix.unpack().into(), device, dtype)?;
    Ok(QMatMul::from_qtensor(QTensor::new(storage, (matrix.rows(), matrix.cols()))?)?)
}

/// The executor of a device: its KV cache and the adapters in its memory.
#[derive(Debug)]
pub(super) struct TensorExec {
    model: Arc<Model>,
    weights: Arc<DeviceWeights>,
    layout: KvLayout,
    /// Of each layer, rotated keys and values: `[blocks * block_tokens, kv_heads * head_dim]` in half precision.
    kv: Vec<(Tensor, Tensor)>,
    adapters: Adapters,
    logits: Vec<f32>,
}

impl TensorExec {
    pub fn new(model: Arc<Model>, weights: Arc<DeviceWeights>, layout: KvLayout) -> Result<Self> {
        layout.check()?;
        let config = model.config();
        let shape = (layout.blocks * layout.block_tokens, config.kv_heads * config.head_dim);
        let pool = || Tensor::zeros(shape, DType::F16, &weights.device);
        let kv = (0..config.layers).map(|_| Ok((pool()?, pool()?))).collect::<Result<_>>()?;
        Ok(Self { model, weights, layout, kv, adapters: Adapters::default(), logits: Vec::new() })
    }
}

impl Executor for TensorExec {
    fn forward(&mut self, spans: &[Span<'_>]) -> Result<&[f32]> {
        self.layout.check_spans(&self.model, spans)?;
        let device = &self.weights.device;
        let mut rows = 0;
        let mut places = Vec::with_capacity(spans.len());
        for span in spans {
            let lora = span.lora.map(|lora| self.adapters.get(lora, device)).transpose()?;
            places.push(Place::new(span, rows, lora, self.layout, device)?);
            rows += span.ids.len();
        }
        let positions: Vec<u32> = spans.iter().flat_map(|span| span.start as u32..span.end() as u32).collect();
        let positions = Tensor::from_vec(positions, rows, device)?;
        let (cos, sin) = (self.weights.cos.index_select(&positions, 0)?, self.weights.sin.index_select(&positions, 0)?);
        let mut pass = TensorPass { model: &self.model, weights: &self.weights, kv: &self.kv, spans, places, cos, sin };
        let hidden = llama::hidden(&self.model, &mut pass)?;
        if spans.iter().all(|span| span.logits == LogitRows::None) {
            self.logits.clear();
        } else {
            self.logits = self.weights.head.forward(&hidden)?.flatten_all()?.to_vec1()?;
        }
        // Whoever computes next may be another thread.
        device.synchronize()?;
        Ok(&self.logits)
    }
}

/// An adapter on the device: A^T `[in, rank]`, B^T `[rank, out]` and the scale of each site.
type DeviceLora = BTreeMap<Site, (Tensor, Tensor, f64)>;

/// The adapters on the device, for as long as someone holds them on the host.
#[derive(Debug, Default)]
struct Adapters(Vec<(Weak<PackedLora>, Arc<DeviceLora>)>);

impl Adapters {
    fn get(&mut self, lora: &Arc<PackedLora>, device: &Device) -> Result<Arc<DeviceLora>> {
        self.0.retain(|(held, _)| held.strong_count() > 0);
        if let Some((_, found)) = self.0.iter().find(|(held, _)| std::ptr::eq(held.as_ptr(), Arc::as_ptr(lora))) {
            return Ok(found.clone());
        }
        let unpacked = lora.to_lora();
        let layers = unpacked.layers.iter().map(|(&site, layer)| {
            let (inputs, outputs) = (layer.a.len() / layer.rank, layer.b.len() / layer.rank);
            let a = Tensor::from_slice(&layer.a, (layer.rank, inputs), device)?.t()?.contiguous()?;
            let b = Tensor::from_slice(&layer.b, (outputs, layer.rank), device)?.t()?.contiguous()?;
            Ok((site, (a, b, f64::from(layer.scale))))
        });
        let uploaded: Arc<DeviceLora> = Arc::new(layers.collect::<Result<_>>()?);
        self.0.push((Arc::downgrade(lora), uploaded.clone()));
        Ok(uploaded)
    }
}

/// Where a span's rows lie in the batch, and its sequence in the cache.
struct Place {
    rows: Range<usize>,
    /// Runs of new rows that lie together in the cache: first row of the batch, how many, where in the cache.
    runs: Vec<(usize, usize, usize)>,
    /// Where every position of the sequence lies in the cache, `[end]`.
    slots: Tensor,
    /// 0 where a row sees a position, else minus infinity, `[rows, end]`; none where there is one row, which sees all.
    mask: Option<Tensor>,
    lora: Option<Arc<DeviceLora>>,
}

impl Place {
    fn new(
        span: &Span<'_>,
        first: usize,
        lora: Option<Arc<DeviceLora>>,
        layout: KvLayout,
        device: &Device,
    ) -> Result<Self> {
        let (count, end) = (span.ids.len(), span.end());
        let mut runs = Vec::new();
        let mut position = span.start;
        while position < end {
            let len = (layout.block_tokens - position % layout.block_tokens).min(end - position);
            runs.push((first + position - span.start, len, layout.slot(span.blocks, position)));
            position += len;
        }
        let slots: Vec<u32> = (0..end).map(|position| layout.slot(span.blocks, position) as u32).collect();
        let slots = Tensor::from_vec(slots, end, device)?;
        let unseen = |row: usize, position: usize| if position > span.start + row { f32::NEG_INFINITY } else { 0.0 };
        let mask = (count > 1).then(|| {
            let mask = (0..count).flat_map(|row| (0..end).map(move |position| unseen(row, position)));
            Tensor::from_vec(mask.collect(), (count, end), device)
        });
        Ok(Self { rows: first..first + count, runs, slots, mask: mask.transpose()?, lora })
    }
}

/// One batch going through the model.
struct TensorPass<'a> {
    model: &'a Model,
    weights: &'a DeviceWeights,
    kv: &'a [(Tensor, Tensor)],
    spans: &'a [Span<'a>],
    places: Vec<Place>,
    /// Of the rows' angles, `[rows, head_dim / 2]`.
    cos: Tensor,
    sin: Tensor,
}

impl TensorPass<'_> {
    /// softmax(q K^T / sqrt(head_dim)) V of one span, `[rows, heads * head_dim]`.
    fn attend(&self, place: &Place, layer: usize, q: &Tensor) -> Result<Tensor> {
        let config = self.model.config();
        let (heads, kv_heads, dim) = (config.heads, config.kv_heads, config.head_dim);
        let (group, n, end) = (heads / kv_heads, place.rows.len(), place.slots.dims()[0]);
        let (keys, values) = &self.kv[layer];
        // [kv_heads, end, dim]
        let gather = |pool: &Tensor| -> Result<Tensor> {
            let rows = pool.index_select(&place.slots, 0)?.to_dtype(DType::F32)?;
            Ok(rows.reshape((end, kv_heads, dim))?.transpose(0, 1)?.contiguous()?)
        };
        let (keys, values) = (gather(keys)?, gather(values)?);
        let q = q.narrow(0, place.rows.start, n)?.reshape((n, kv_heads, group, dim))?.permute((1, 2, 0, 3))?;
        let q = q.contiguous()?.reshape((kv_heads, group * n, dim))?;
        let mut scores = (q.matmul(&keys.transpose(1, 2)?)? * (1.0 / (dim as f64).sqrt()))?;
        if let Some(mask) = &place.mask {
            scores = scores.reshape((kv_heads, group, n, end))?.broadcast_add(mask)?;
            scores = scores.reshape((kv_heads, group * n, end))?;
        }
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let out = weights.matmul(&values)?.reshape((kv_heads, group, n, dim))?.permute((2, 0, 1, 3))?;
        Ok(out.contiguous()?.reshape((n, heads * dim))?)
    }
}

impl TensorPass<'_> {
    fn linear(&self, x: &Tensor, site: Site) -> Result<Tensor> {
        let y = self.weights.blocks[site.layer as usize].linears[site.target as usize].forward(x)?;
        let adapted = |place: &Place| place.lora.as_ref().is_some_and(|lora| lora.contains_key(&site));
        if !self.places.iter().any(adapted) {
            return Ok(y);
        }
        let part = |place: &Place| -> Result<Tensor> {
            let (start, count) = (place.rows.start, place.rows.len());
            let y = y.narrow(0, start, count)?;
            let Some((a, b, scale)) = place.lora.as_ref().and_then(|lora| lora.get(&site)) else { return Ok(y) };
            let shrunk = (x.narrow(0, start, count)?.matmul(a)? * *scale)?;
            Ok((y + shrunk.matmul(b)?)?)
        };
        Ok(Tensor::cat(&self.places.iter().map(part).collect::<Result<Vec<_>>>()?, 0)?)
    }

    fn rope(&self, x: Tensor) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let half = self.model.rope.half;
        let x = x.reshape((rows, width / (2 * half), 2 * half))?;
        let (low, high) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
        let (cos, sin) = (self.cos.unsqueeze(1)?, self.sin.unsqueeze(1)?);
        let turned_low = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
        let turned_high = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
        Ok(Tensor::cat(&[turned_low, turned_high], 2)?.reshape((rows, width))?)
    }
}

impl Ops for TensorPass<'_> {
    type Rows = Tensor;

    fn embed(&mut self) -> Result<Tensor> {
        let width = self.model.config().width;
        let ids: Vec<u32> = self.spans.iter().flat_map(|span| span.ids).copied().collect();
        let mut x = vec![0.0; ids.len() * width];
        for (out, id) in x.chunks_exact_mut(width).zip(&ids) {
            self.model.embed(*id, out);
        }
        Ok(Tensor::from_vec(x, (ids.len(), width), &self.weights.device)?)
    }

    fn norm(&mut self, x: &Tensor, norm: Norm) -> Result<Tensor> {
        let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(self.model.config().rms_eps))?.sqrt()?;
        Ok(x.broadcast_div(&scale)?.broadcast_mul(self.weights.norm(norm))?)
    }

    fn qkv(&mut self, x: &Tensor, layer: usize) -> Result<[Tensor; 3]> {
        let linear = |target| self.linear(x, Site { layer: layer as u32, target });
        Ok([linear(Target::QProj)?, linear(Target::KProj)?, linear(Target::VProj)?])
    }

    fn attention(&mut self, layer: usize, [q, k, v]: [Tensor; 3]) -> Result<Tensor> {
        let (q, k) = (self.rope(q)?, self.rope(k)?);
        let (keys, values) = &self.kv[layer];
        for (pool, x) in [(keys, k), (values, v)] {
            let halves = x.clamp(-LARGEST_HALF, LARGEST_HALF)?.to_dtype(DType::F16)?;
            for (row, len, slot) in self.places.iter().flat_map(|place| &place.runs) {
                pool.slice_set(&halves.narrow(0, *row, *len)?, 0, *slot)?;
            }
        }
        let parts = self.places.iter().map(|place| self.attend(place, layer, &q)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&parts, 0)?)
    }

    fn gate_up(&mut self, x: &Tensor, layer: usize) -> Result<[Tensor; 2]> {
        let linear = |target| self.linear(x, Site { layer: layer as u32, target });
        Ok([linear(Target::GateProj)?, linear(Target::UpProj)?])
    }

    fn swiglu(&mut self, _layer: usize, [gate, up]: [Tensor; 2]) -> Result<Tensor> {
        Ok((gate.silu()? * up)?)
    }

    fn add_linear(&mut self, x: Tensor, y: Tensor, site: Site) -> Result<Tensor> {
        Ok((x + self.linear(&y, site)?)?)
    }

    fn select(&mut self, x: Tensor) -> Result<Tensor> {
        let last = |(place, span): (&Place, &Span<'_>)| {
            let end = place.rows.end as u32;
            end - span.logits.count(span.ids.len()) as u32..end
        };
        let mut wanted: Vec<u32> = self.places.iter().zip(self.spans).flat_map(last).collect();
        if wanted.is_empty() {
            // No device launches a kernel on nothing; nobody reads this row.
            wanted.push(0);
        }
        let count = wanted.len();
        Ok(x.index_select(&Tensor::from_vec(wanted, count, &self.weights.device)?, 0)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::log_sum_exp;
    use crate::request::LoraSpec;

    fn on_the_cpu(model: &Arc<Model>, layout: KvLayout) -> TensorExec {
        let weights = DeviceWeights::new(&model.weights, &model.rope, &Device::Cpu).unwrap();
        TensorExec::new(model.clone(), weights, layout).unwrap()
    }

    fn adapter(model: &Model, spec: &LoraSpec) -> Arc<PackedLora> {
        let mut lora = crate::adapter::Lora::fresh(spec, model.shape(), 5).unwrap();
        for (i, layer) in lora.layers.values_mut().enumerate() {
            layer.b.iter_mut().enumerate().for_each(|(j, b)| *b = ((i * 31 + j) as f32).sin() * 0.1);
        }
        Arc::new(PackedLora::new(&lora, model.shape()).unwrap())
    }

    fn logprobs(logits: &[f32], vocab: usize) -> Vec<f32> {
        let of_row = |row: &[f32]| {
            let sum = log_sum_exp(row);
            row.iter().map(|x| (f64::from(*x) - sum) as f32).collect::<Vec<_>>()
        };
        logits.chunks_exact(vocab).flat_map(of_row).collect()
    }

    fn mean_difference(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f32>() / a.len().max(1) as f32
    }

    /// Chunks of a prompt, decoding beside it, adapters on some sites of some sequences, scattered blocks: both executors agree but for
    /// the rounding of activations, which an adapter's effect exceeds by far.
    #[test]
    fn agrees_with_the_kernels() {
        let (model, _) = Model::tiny(1);
        let layout = KvLayout { block_tokens: 4, blocks: 24 };
        let mut both: [Box<dyn Executor>; 2] = [Box::new(on_the_cpu(&model, layout)), model.executor(layout).unwrap()];
        let full = adapter(&model, &LoraSpec { rank: 6, ..LoraSpec::default() });
        let narrow = LoraSpec {
            rank: 3,
            targets: vec![crate::request::Target::VProj],
            layers: Some(vec![1]),
            ..LoraSpec::default()
        };
        let narrow = adapter(&model, &narrow);
        let ids: Vec<u32> = (0..40).map(|i| (i * 37 + 11) % 258).collect();
        let blocks: [Vec<u32>; 3] = [vec![7, 2, 20, 5], vec![0, 9, 3], vec![11, 23, 1]];
        let span = |sequence: usize, range: Range<usize>, logits, lora| Span {
            ids: &ids[sequence * 3..][range.clone()],
            start: range.start,
            blocks: &blocks[sequence],
            lora,
            logits,
        };
        let steps = [
            vec![span(0, 0..5, LogitRows::None, Some(&full))],
            vec![span(0, 5..14, LogitRows::All, Some(&full)), span(1, 0..9, LogitRows::Last, None)],
            vec![
                span(2, 0..6, LogitRows::All, Some(&narrow)),
                span(0, 14..15, LogitRows::Last, Some(&full)),
                span(1, 9..10, LogitRows::Last, None),
            ],
        ];
        let vocab = model.vocab_size();
        for spans in &steps {
            let [tensors, kernels] = both.each_mut().map(|executor| logprobs(executor.forward(spans).unwrap(), vocab));
            let rows: usize = spans.iter().map(|span| span.logits.count(span.ids.len())).sum();
            assert_eq!((tensors.len(), kernels.len()), (rows * vocab, rows * vocab));
            let difference = mean_difference(&tensors, &kernels);
            assert!(difference < 0.03, "{difference}");
        }
        let mut first = |lora| {
            let logits = both[0].forward(&[span(0, 0..5, LogitRows::All, lora)]);
            logprobs(logits.unwrap(), vocab)
        };
        let effect = mean_difference(&first(None), &first(Some(&full)));
        assert!(effect > 0.3, "{effect}");
    }

    #[test]
    fn an_adapter_leaves_the_device_with_its_last_holder() {
        let (model, _) = Model::tiny(1);
        let mut adapters = Adapters::default();
        let [a, b] = [3, 4].map(|rank| adapter(&model, &LoraSpec { rank, ..LoraSpec::default() }));
        let first = adapters.get(&a, &Device::Cpu).unwrap();
        assert!(Arc::ptr_eq(&first, &adapters.get(&a, &Device::Cpu).unwrap()), "uploaded once");
        drop(a);
        adapters.get(&b, &Device::Cpu).unwrap();
        assert_eq!((adapters.0.len(), Arc::strong_count(&first)), (1, 1));
    }
}
