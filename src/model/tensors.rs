//! Serving on a GPU: the same batch as [`super::exec`] takes, over the kernels of [`crate::kernels::tensors`]. On candle's CPU device the
//! reference form of the kernels runs here, which is how the tests compare the two executors.

use std::sync::{Arc, Weak};

use candle_core::{Device, Tensor};

use super::batch::{Best, Executor, KvDtype, KvLayout, SequenceChunk};
use super::rope::RopeTable;
use crate::adapter::PackedAdapter;
use crate::arch::config::{AttentionConfig, LogitConfig, ModelConfig, Temperature};
use crate::arch::decoder::{Attend, Merge, NormId, SiteId, Step, StepExecutor};
use crate::error::{Error, Result};
use crate::kernels::spec::Activation;
use crate::kernels::tensors::{
    self, DeviceLora, DeviceMatrix, HeadNorms, HeadPrep, HeadShape, KvLayer, Plan, Rope, Rows, TensorKernels,
};
use crate::model::Model;
use crate::weights::Weights;

/// The frozen base on a device: its quantised bytes as they are, norms and angles beside them.
#[derive(Debug)]
pub(super) struct DeviceWeights {
    device: Device,
    embedding: DeviceMatrix,
    /// By the decoder's numbers.
    linears: Vec<(DeviceMatrix, Option<Tensor>)>,
    norms: Vec<Tensor>,
    head: DeviceMatrix,
    /// By the base's numbers.
    ropes: Vec<Rope>,
    /// What queries are multiplied with at each position.
    q_factors: Option<Tensor>,
}

impl DeviceWeights {
    pub fn new(weights: &Weights, ropes: &[RopeTable], device: &Device) -> Result<Arc<Self>> {
        // A base or a GPU that the kernels do not fit fails now, not with the first request.
        tensors::open(
            device,
            head_shape(&weights.config, KvLayout { block_tokens: 1, blocks: 1, dtype: KvDtype::F16 }),
        )?;
        let vector = |values: &[f32]| Tensor::from_slice(values, values.len(), device);
        let context = weights.config.context_length;
        let rope = |rope: &RopeTable| -> Result<Rope> {
            let angles = rope.angles(0..context);
            let table = |values: Vec<f32>| Tensor::from_vec(values, (context, rope.half()), device);
            Ok(Rope { cos: table(angles.cos)?, sin: table(angles.sin)? })
        };
        let factors = |by: Temperature| vector(&(0..context).map(|position| by.at(position)).collect::<Vec<_>>());
        let linears = weights.linears.iter().map(|linear| {
            let bias = linear.bias.as_deref().map(vector).transpose()?;
            Ok((DeviceMatrix::new(&linear.matrix, device)?, bias))
        });
        let norms = weights.norms.iter().map(|norm| Ok(vector(norm)?));
        let head = DeviceMatrix::new(weights.head(), device)?;
        let embedding = match weights.head {
            None => head.clone(),
            Some(_) => DeviceMatrix::new(&weights.embedding, device)?,
        };
        Ok(Arc::new(Self {
            linears: linears.collect::<Result<_>>()?,
            norms: norms.collect::<Result<_>>()?,
            ropes: ropes.iter().map(rope).collect::<Result<_>>()?,
            q_factors: weights.config.attention.temperature.map(factors).transpose()?,
            device: device.clone(),
            embedding,
            head,
        }))
    }
}

fn head_shape(config: &ModelConfig, layout: KvLayout) -> HeadShape {
    let AttentionConfig { heads, kv_heads, head_dim, .. } = config.attention;
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
        let layers = 0..model.config().layers.len();
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
        // All layers are one group, of which nothing is given back.
        self.layout.check_spans(&self.model, &[None], spans)?;
        let held = |span: &SequenceChunk<'_>| {
            span.adapter.map(|lora| self.adapters.get(lora, &*self.kernels, &self.model)).transpose()
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
        let hidden = TensorPass { model, weights, kernels: &**kernels, kv, plan }.hidden()?;
        if plan.wanted() == 0 {
            return Ok(None);
        }
        let products = kernels.matmul(&hidden, &weights.head)?;
        let LogitConfig { scale, softcap } = model.config().logits;
        let logits = if scale == 1.0 { products } else { (products * f64::from(scale))? };
        Ok(Some(match softcap {
            None => logits,
            Some(cap) => ((logits / f64::from(cap))?.tanh()? * f64::from(cap))?,
        }))
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
struct Adapters(Vec<(Weak<PackedAdapter>, Arc<DeviceLora>)>);

impl Adapters {
    fn get(
        &mut self,
        lora: &Arc<PackedAdapter>,
        kernels: &dyn TensorKernels,
        model: &Model,
    ) -> Result<Arc<DeviceLora>> {
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
fn upload(lora: &PackedAdapter, kernels: &dyn TensorKernels, model: &Model) -> Result<DeviceLora> {
    if lora.changes_rows() || lora.virtual_count() > 0 {
        let message = "is of a kind that a GPU does not serve yet: serve it with --device cpu, or train a LoRA";
        return Err(Error::invalid_because("UNSUPPORTED_KIND", "adapter", message));
    }
    let sites = (0..model.decoder().sites.len()).map(|site| lora.pair(site));
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
    /// Takes all steps, and gives the head's input of the wanted rows, `[wanted, hidden_size]`.
    fn hidden(&self) -> Result<Tensor> {
        let mut steps = Interpreter { pass: self, x: None, y: None, projected: Vec::new() };
        steps.run(&self.model.decoder().steps)?;
        taken(&mut steps.x)
    }

    fn embed(&self, scale: f32) -> Result<Tensor> {
        let x = self.kernels.embed(&self.weights.embedding, self.plan)?;
        Ok(if scale == 1.0 { x } else { (x * f64::from(scale))? })
    }

    fn linear(&self, x: &Tensor, site: SiteId) -> Result<Tensor> {
        let (matrix, bias) = &self.weights.linears[site];
        let mut y = self.kernels.matmul(x, matrix)?;
        if let Some(bias) = bias {
            y = y.broadcast_add(bias)?;
        }
        Ok(self.kernels.lora(x, y, site, self.plan)?)
    }

    fn norm(&self, x: &Tensor, norm: NormId) -> Result<Tensor> {
        Ok(self.kernels.rms_norm(x, &self.weights.norms[norm], self.model.config().norm_eps)?)
    }

    fn attend(&self, attend: &Attend, [q, k, v]: [Tensor; 3]) -> Result<Tensor> {
        let (kv, weights, eps) = (&self.kv[attend.layer], self.weights, self.model.config().norm_eps);
        let prep = HeadPrep {
            norms: attend.norms.map(|[q, k]| HeadNorms { q: &weights.norms[q], k: &weights.norms[k], eps }),
            rope: attend.rope.map(|rope| &weights.ropes[rope]),
            q_factors: attend.temperature.and(weights.q_factors.as_ref()),
        };
        let q = self.kernels.rotate_and_store((q, &k, &v), prep, kv, self.plan)?;
        Ok(self.kernels.attention(&q, &attend.spec, kv, self.plan)?)
    }

    fn gated(&self, activation: Activation, gate: Tensor, up: &Tensor) -> Result<Tensor> {
        Ok(self.kernels.gated(activation, gate, up)?)
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        Ok(self.kernels.add(x, y)?)
    }

    fn select(&self, x: &Tensor) -> Result<Tensor> {
        if self.plan.wanted() == 0 {
            // No device launches a kernel on nothing; nobody reads this row.
            return Ok(x.narrow(0, 0, 1)?);
        }
        Ok(self.kernels.select(x, self.plan)?)
    }
}

/// A pass, and what its steps hand on.
struct Interpreter<'a> {
    pass: &'a TensorPass<'a>,
    /// The residual stream, `[rows, hidden_size]`; at the end the head's input.
    x: Option<Tensor>,
    /// The input of the next output layer.
    y: Option<Tensor>,
    /// q, k, v or gate, up.
    projected: Vec<Tensor>,
}

fn absent() -> Error {
    Error::internal("a step comes before what it needs")
}

fn taken(value: &mut Option<Tensor>) -> Result<Tensor> {
    value.take().ok_or_else(absent)
}

impl Interpreter<'_> {
    fn projected<const N: usize>(&mut self) -> Result<[Tensor; N]> {
        std::mem::take(&mut self.projected).try_into().map_err(|_| absent())
    }

    fn merge(&self, x: Tensor, y: Tensor, merge: Merge) -> Result<Tensor> {
        let y = match merge {
            Merge::Add => y,
            Merge::Scaled(scale) => (y * f64::from(scale))?,
            Merge::Normed(norm) => self.pass.norm(&y, norm)?,
        };
        self.pass.add(x, &y)
    }
}

impl StepExecutor for Interpreter<'_> {
    type Error = Error;

    fn take(&mut self, step: &Step, _next: &[Step]) -> Result<()> {
        match step {
            Step::Embed { scale } => self.x = Some(self.pass.embed(*scale)?),
            Step::Project { norm, sites, part } => {
                let input = self.pass.norm(self.x.as_ref().ok_or_else(absent)?, *norm)?;
                let outputs = sites.clone().map(|site| self.pass.linear(&input, site)).collect::<Result<Vec<_>>>()?;
                self.projected = match &outputs[..] {
                    [fused] => split(fused, &self.pass.model.config().widths(*part))?,
                    _ => outputs,
                };
            }
            Step::Attend(attend) => {
                let qkv = self.projected()?;
                self.y = Some(self.pass.attend(attend, qkv)?);
            }
            Step::Gate { activation } => {
                let [gate, up] = self.projected()?;
                self.y = Some(self.pass.gated(*activation, gate, &up)?);
            }
            Step::Output { site, merge } => {
                let y = self.pass.linear(&taken(&mut self.y)?, *site)?;
                let x = taken(&mut self.x)?;
                self.x = Some(self.merge(x, y, *merge)?);
            }
            Step::Select => self.x = Some(self.pass.select(&taken(&mut self.x)?)?),
            Step::Finish { norm } => self.x = Some(self.pass.norm(&taken(&mut self.x)?, *norm)?),
        }
        Ok(())
    }
}

/// Columns that lie side by side, each of these widths as a tensor of its own.
fn split(all: &Tensor, widths: &[usize]) -> Result<Vec<Tensor>> {
    let mut from = 0;
    let part = |width: &usize| {
        let part = all.narrow(1, from, *width)?.contiguous()?;
        from += width;
        Ok(part)
    };
    widths.iter().map(part).collect()
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::adapter::RowNorms;
    use crate::kernels::log_sum_exp;
    use crate::model::batch::Readout;
    use crate::request::LoraSpec;

    fn on_the_cpu(model: &Arc<Model>, layout: KvLayout) -> TensorExec {
        let weights = DeviceWeights::new(&model.weights, &model.ropes, &Device::Cpu).unwrap();
        TensorExec::new(model.clone(), weights, layout).unwrap()
    }

    fn adapter(model: &Model, spec: &LoraSpec) -> Arc<PackedAdapter> {
        let mut lora = crate::adapter::Adapter::fresh(spec, model.shape(), 5).unwrap();
        for (i, layer) in lora.pairs_mut().map(|(_, pair)| pair).enumerate() {
            layer.b.iter_mut().enumerate().for_each(|(j, b)| *b = ((i * 31 + j) as f32).sin() * 0.1);
        }
        Arc::new(PackedAdapter::new(&lora, model.shape(), &RowNorms::new()).unwrap())
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
        let span = |sequence: usize, range: Range<usize>, logits, adapter| SequenceChunk {
            ids: &ids[sequence * 3..][range.clone()],
            start: range.start,
            blocks: &blocks[sequence],
            adapter,
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
        let span = |logits| SequenceChunk { ids: &[1, 2, 3], start: 0, blocks: &[2, 0], adapter: None, logits };
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
