//! Serving on a GPU: the same batch as [`super::exec`] takes, over the kernels of [`crate::kernels::tensors`]. On candle's CPU device the
//! reference form of the kernels runs here, which is how the tests compare the two executors.

use std::sync::{Arc, Weak};

use candle_core::{Device, Tensor};

use super::RopeTable;
use super::batch::{Best, Executor, KvDtype, KvLayout, SequenceChunk};
use super::llama::{self, Norm, Ops};
use crate::adapter::{PackedLora, Site};
use crate::error::{Error, Result};
use crate::kernels::spec::{Activation, AttentionSpec};
use crate::kernels::tensors::{
    self, DeviceLora, DeviceMatrix, HeadPrep, HeadShape, KvLayer, Plan, Rope, Rows, TensorKernels,
};
use crate::model::Model;
use crate::request::Target;
use crate::weights::{LlamaConfig, Weights};

/// The frozen base on a device: its quantised bytes as they are, norms and angles beside them.
#[derive(Debug)]
pub(super) struct DeviceWeights {
    device: Device,
    embedding: DeviceMatrix,
    blocks: Vec<DeviceBlock>,
    final_norm: Tensor,
    head: DeviceMatrix,
    rope: Rope,
}

#[derive(Debug)]
struct DeviceBlock {
    attn_norm: Tensor,
    ffn_norm: Tensor,
    /// In the order of `Target::ALL`.
    linears: Vec<DeviceMatrix>,
}

impl DeviceWeights {
    pub fn new(weights: &Weights, rope: &RopeTable, device: &Device) -> Result<Arc<Self>> {
        // A base or a GPU that the kernels do not fit fails now, not with the first request.
        tensors::open(
            device,
            head_shape(&weights.config, KvLayout { block_tokens: 1, blocks: 1, dtype: KvDtype::F16 }),
        )?;
        let vector = |values: &[f32]| Tensor::from_slice(values, values.len(), device);
        let table = |values: &[f32]| Tensor::from_slice(values, (values.len() / rope.half, rope.half), device);
        let blocks = weights.blocks.iter().map(|block| {
            Ok(DeviceBlock {
                attn_norm: vector(&block.attn_norm)?,
                ffn_norm: vector(&block.ffn_norm)?,
                linears: block
                    .linears
                    .iter()
                    .map(|matrix| Ok(DeviceMatrix::new(matrix, device)?))
                    .collect::<Result<_>>()?,
            })
        });
        let head = DeviceMatrix::new(weights.head(), device)?;
        let embedding = match weights.head {
            None => head.clone(),
            Some(_) => DeviceMatrix::new(&weights.embedding, device)?,
        };
        Ok(Arc::new(Self {
            blocks: blocks.collect::<Result<_>>()?,
            final_norm: vector(&weights.final_norm)?,
            rope: Rope { cos: table(&rope.cos)?, sin: table(&rope.sin)? },
            device: device.clone(),
            embedding,
            head,
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

fn head_shape(config: &LlamaConfig, layout: KvLayout) -> HeadShape {
    let LlamaConfig { heads, kv_heads, head_dim, .. } = *config;
    HeadShape { heads, kv_heads, head_dim, block_tokens: layout.block_tokens }
}

/// The executor of a device: its kernels, its KV cache and the adapters in its memory.
#[derive(Debug)]
pub(super) struct TensorExec {
    model: Arc<Model>,
    weights: Arc<DeviceWeights>,
    kernels: Box<dyn TensorKernels>,
    layout: KvLayout,
    shape: HeadShape,
    /// By layer.
    kv: Vec<KvLayer>,
    adapters: Adapters,
    plan: Plan,
    logits: Vec<f32>,
}

impl TensorExec {
    pub fn new(model: Arc<Model>, weights: Arc<DeviceWeights>, layout: KvLayout) -> Result<Self> {
        layout.check()?;
        if layout.dtype != KvDtype::F16 {
            let message = "q8_0 is served on the CPU only; take f16, or --device cpu";
            return Err(Error::invalid("kv_cache_dtype", message));
        }
        let shape = head_shape(model.config(), layout);
        let layers = 0..model.config().layers;
        Ok(Self {
            kernels: tensors::open(&weights.device, shape)?,
            kv: layers.map(|_| Ok(KvLayer::new(shape, layout.blocks, &weights.device)?)).collect::<Result<_>>()?,
            adapters: Adapters::default(),
            plan: Plan::default(),
            logits: Vec::new(),
            model,
            weights,
            layout,
            shape,
        })
    }

    /// Runs the spans; the logits of the rows that asked for them stay on the device. `None` where no row asked.
    fn run(&mut self, spans: &[SequenceChunk<'_>]) -> Result<Option<Tensor>> {
        self.layout.check_spans(&self.model, spans)?;
        let held = |span: &SequenceChunk<'_>| {
            span.lora.map(|lora| self.adapters.get(lora, &*self.kernels, &self.model)).transpose()
        };
        let loras: Vec<Option<Arc<DeviceLora>>> = spans.iter().map(held).collect::<Result<_>>()?;
        let rows = spans.iter().zip(&loras).map(|(span, lora)| Rows {
            ids: span.ids,
            start: span.start,
            blocks: span.blocks,
            lora: lora.as_ref(),
            wanted: span.logits.count(span.ids.len()),
        });
        self.plan.fill(rows, self.shape);
        self.kernels.upload(&self.plan)?;
        let Self { model, weights, kernels, kv, plan, .. } = self;
        let mut pass = TensorPass { model, weights, kernels: &**kernels, kv, plan };
        let hidden = llama::hidden(model, &mut pass)?;
        if plan.wanted() == 0 {
            return Ok(None);
        }
        Ok(Some(kernels.matmul(&hidden, &weights.head)?))
    }
}

impl Executor for TensorExec {
    fn forward(&mut self, spans: &[SequenceChunk<'_>]) -> Result<&[f32]> {
        match self.run(spans)? {
            Some(logits) => self.logits = logits.flatten_all()?.to_vec1()?,
            None => self.logits.clear(),
        }
        // Whoever computes next may be another thread.
        self.weights.device.synchronize()?;
        Ok(&self.logits)
    }

    fn forward_best(&mut self, spans: &[SequenceChunk<'_>]) -> Result<Option<Vec<Best>>> {
        let logits = self.run(spans)?;
        let best = logits.map(|logits| self.kernels.best(&logits)).transpose()?.unwrap_or_default();
        self.weights.device.synchronize()?;
        Ok(Some(best))
    }
}

/// The adapters on the device, for as long as someone holds them on the host.
#[derive(Debug, Default)]
struct Adapters(Vec<(Weak<PackedLora>, Arc<DeviceLora>)>);

impl Adapters {
    fn get(&mut self, lora: &Arc<PackedLora>, kernels: &dyn TensorKernels, model: &Model) -> Result<Arc<DeviceLora>> {
        self.0.retain(|(held, _)| held.strong_count() > 0);
        if let Some((_, found)) = self.0.iter().find(|(held, _)| std::ptr::eq(held.as_ptr(), Arc::as_ptr(lora))) {
            return Ok(found.clone());
        }
        let uploaded = Arc::new(upload(lora, kernels, model)?);
        self.0.push((Arc::downgrade(lora), uploaded.clone()));
        Ok(uploaded)
    }
}

/// Brings an adapter to the device as it is served.
fn upload(lora: &PackedLora, kernels: &dyn TensorKernels, model: &Model) -> Result<DeviceLora> {
    let layers = 0..model.shape().layers;
    let sites = layers.flat_map(|layer| Target::ALL.map(|target| lora.layer(Site { layer, target })));
    Ok(kernels.adapter(&sites.collect::<Vec<_>>())?)
}

/// One batch going through the model.
struct TensorPass<'a> {
    model: &'a Model,
    weights: &'a DeviceWeights,
    kernels: &'a dyn TensorKernels,
    kv: &'a [KvLayer],
    plan: &'a Plan,
}

impl TensorPass<'_> {
    /// The frozen layer, and on top each row's adapter.
    fn linear(&self, x: &Tensor, site: Site) -> Result<Tensor> {
        let (layer, target) = (site.layer as usize, site.target as usize);
        let y = self.kernels.matmul(x, &self.weights.blocks[layer].linears[target])?;
        Ok(self.kernels.lora(x, y, layer * Target::ALL.len() + target, self.plan)?)
    }
}

impl Ops for TensorPass<'_> {
    type Rows = Tensor;

    fn embed(&mut self) -> Result<Tensor> {
        Ok(self.kernels.embed(&self.weights.embedding, self.plan)?)
    }

    fn norm(&mut self, x: &Tensor, norm: Norm) -> Result<Tensor> {
        Ok(self.kernels.rms_norm(x, self.weights.norm(norm), self.model.config().rms_eps)?)
    }

    fn qkv(&mut self, x: &Tensor, layer: usize) -> Result<[Tensor; 3]> {
        let linear = |target| self.linear(x, Site { layer: layer as u32, target });
        Ok([linear(Target::QProj)?, linear(Target::KProj)?, linear(Target::VProj)?])
    }

    fn attention(&mut self, layer: usize, [q, k, v]: [Tensor; 3]) -> Result<Tensor> {
        let (kv, config) = (&self.kv[layer], self.model.config());
        let prep = HeadPrep { rope: Some(&self.weights.rope), ..HeadPrep::default() };
        let q = self.kernels.rotate_and_store((q, &k, &v), prep, kv, self.plan)?;
        let spec = AttentionSpec::causal(config.heads, config.head_dim);
        Ok(self.kernels.attention(&q, &spec, kv, self.plan)?)
    }

    fn gate_up(&mut self, x: &Tensor, layer: usize) -> Result<[Tensor; 2]> {
        let linear = |target| self.linear(x, Site { layer: layer as u32, target });
        Ok([linear(Target::GateProj)?, linear(Target::UpProj)?])
    }

    fn swiglu(&mut self, _layer: usize, [gate, up]: [Tensor; 2]) -> Result<Tensor> {
        Ok(self.kernels.gated(Activation::Silu, gate, &up)?)
    }

    fn residual_linear(&mut self, x: Tensor, y: Tensor, site: Site) -> Result<Tensor> {
        Ok(self.kernels.add(x, &self.linear(&y, site)?)?)
    }

    fn select(&mut self, x: Tensor) -> Result<Tensor> {
        if self.plan.wanted() == 0 {
            // No device launches a kernel on nothing; nobody reads this row.
            return Ok(x.narrow(0, 0, 1)?);
        }
        Ok(self.kernels.select(&x, self.plan)?)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::kernels::log_sum_exp;
    use crate::model::batch::Readout;
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
        let layout = KvLayout { block_tokens: 4, blocks: 24, dtype: KvDtype::F16 };
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
        let span = |sequence: usize, range: Range<usize>, logits, lora| SequenceChunk {
            ids: &ids[sequence * 3..][range.clone()],
            start: range.start,
            blocks: &blocks[sequence],
            lora,
            logits,
        };
        let steps = [
            vec![span(0, 0..5, Readout::None, Some(&full))],
            vec![span(0, 5..14, Readout::All, Some(&full)), span(1, 0..9, Readout::Last, None)],
            vec![
                span(2, 0..6, Readout::All, Some(&narrow)),
                span(0, 14..15, Readout::Last, Some(&full)),
                span(1, 9..10, Readout::Last, None),
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
            let logits = both[0].forward(&[span(0, 0..5, Readout::All, lora)]);
            logprobs(logits.unwrap(), vocab)
        };
        let effect = mean_difference(&first(None), &first(Some(&full)));
        assert!(effect > 0.3, "{effect}");
    }

    /// What the device picks is what the logits say, and where none were asked for there is nothing to pick.
    #[test]
    fn the_best_ids_are_those_of_the_logits() {
        let (model, _) = Model::tiny(1);
        let mut exec = on_the_cpu(&model, KvLayout { block_tokens: 4, blocks: 4, dtype: KvDtype::F16 });
        let span = |logits| SequenceChunk { ids: &[1, 2, 3], start: 0, blocks: &[2, 0], lora: None, logits };
        let logits = exec.forward(&[span(Readout::All)]).unwrap().to_vec();
        let best = exec.forward_best(&[span(Readout::All)]).unwrap().unwrap();
        assert_eq!(best.len(), 3);
        for (row, best) in logits.chunks_exact(model.vocab_size()).zip(best) {
            let top = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            assert_eq!(best.id, row.iter().position(|x| *x == top).map(|id| id as u32));
            assert_eq!(best.logprob, (f64::from(top) - log_sum_exp(row)) as f32);
        }
        assert_eq!(exec.forward_best(&[span(Readout::None)]).unwrap(), Some(vec![]));
    }

    #[test]
    fn an_adapter_leaves_the_device_with_its_last_holder() {
        let (model, _) = Model::tiny(1);
        let mut adapters = Adapters::default();
        let kernels = tensors::reference::Reference::new(&Device::Cpu);
        let [a, b] = [3, 4].map(|rank| adapter(&model, &LoraSpec { rank, ..LoraSpec::default() }));
        let first = adapters.get(&a, &kernels, &model).unwrap();
        assert!(Arc::ptr_eq(&first, &adapters.get(&a, &kernels, &model).unwrap()), "uploaded once");
        drop(a);
        adapters.get(&b, &kernels, &model).unwrap();
        assert_eq!((adapters.0.len(), Arc::strong_count(&first)), (1, 1));
    }
}
