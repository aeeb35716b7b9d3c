//! Training and reference: candle tensors with autograd, gradients for adapter tensors only, float32 throughout.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};

use crate::adapter::{Lora, LoraLayer, Site};
use crate::arch::config::AttentionConfig;
use crate::arch::decoder::{Attend, NormId, SiteId};
use crate::device::{TrainPermit, YieldPoint};
use crate::error::{Error, Result};
use crate::kernels::spec::Activation;
use crate::model::Model;
use crate::model::autograd::{Attention, Gated, RmsNorm, Rope, to_vec};
use crate::model::interpret::{self, TensorOps};
pub use crate::model::linear::Dropout;
use crate::model::linear::{AdaptedLinear, FrozenLinear, TokenLogprobs};
use crate::request::LoraSpec;
use crate::sync::lock;

/// A LoRA as candle tensors: `Var`s where it is trained.
#[derive(Debug)]
pub struct TracedLora {
    spec: LoraSpec,
    layers: BTreeMap<Site, TracedLayer>,
    vars: Vec<(Site, &'static str, Var)>,
}

#[derive(Debug)]
struct TracedLayer {
    a: Tensor,
    b: Tensor,
    alpha: f32,
    scale: f32,
}

impl TracedLora {
    /// Tensors without gradients.
    pub fn frozen(lora: &Lora) -> Result<Self> {
        Self::new(lora, false)
    }

    /// `Var`s.
    pub fn trainable(lora: &Lora) -> Result<Self> {
        Self::new(lora, true)
    }

    fn new(lora: &Lora, trainable: bool) -> Result<Self> {
        let mut vars = Vec::new();
        let mut layers = BTreeMap::new();
        for (&site, layer) in &lora.layers {
            let mut tensor = |name: &'static str, values: &[f32], shape: (usize, usize)| -> Result<Tensor> {
                let tensor = Tensor::from_slice(values, shape, &Device::Cpu)?;
                if !trainable {
                    return Ok(tensor);
                }
                let var = Var::from_tensor(&tensor)?;
                let tensor = var.as_tensor().clone();
                vars.push((site, name, var));
                Ok(tensor)
            };
            let (inputs, outputs) = (layer.a.len() / layer.rank, layer.b.len() / layer.rank);
            let a = tensor("lora_A", &layer.a, (layer.rank, inputs))?;
            let b = tensor("lora_B", &layer.b, (outputs, layer.rank))?;
            layers.insert(site, TracedLayer { a, b, alpha: layer.alpha, scale: layer.scale });
        }
        Ok(Self { spec: lora.spec.clone(), layers, vars })
    }

    /// The `Var`s in a fixed order: by site, A before B. Empty for a frozen one.
    pub fn vars(&self) -> &[(Site, &'static str, Var)] {
        &self.vars
    }

    /// The present values.
    pub fn to_lora(&self) -> Result<Lora> {
        let layers = self.layers.iter().map(|(&site, layer)| {
            let (rank, a, b) = (layer.a.dims()[0], to_vec(&layer.a)?, to_vec(&layer.b)?);
            Ok((site, LoraLayer { rank, alpha: layer.alpha, scale: layer.scale, a, b }))
        });
        Ok(Lora { spec: self.spec.clone(), layers: layers.collect::<Result<_>>()? })
    }
}

/// One forward of whole sequences without a KV cache.
#[derive(Debug, Clone, Copy, Default)]
pub struct ForwardOptions<'a> {
    /// `None` is the base.
    pub lora: Option<&'a TracedLora>,
    /// Dropped inputs of the adapter; none where it is evaluated.
    pub dropout: Option<Dropout>,
    /// Gives way to serving at every frozen layer, forward and backward.
    pub permit: Option<&'a TrainPermit>,
}

impl ForwardOptions<'_> {
    /// Returns what the operations of the graph give way by. They hold no compute: a tensor may outlive the pass.
    fn compute(&self) -> YieldPoint {
        self.permit.map(TrainPermit::yield_point).unwrap_or_default()
    }
}

/// How a model sees the tokens that follow.
#[derive(Debug)]
pub struct TokenScores {
    /// Their log-probabilities, float32, with gradients to the `Var`s of the pass.
    pub logprobs: Tensor,
    /// Whether each is the most likely one in its place.
    pub is_greedy: Vec<bool>,
}

impl Model {
    /// ln p(ids[i+1] given ids[..=i]) of each sequence, for every (sequence, i) in `wanted`, in that order: a float32 tensor `[wanted.len()]`
    /// that carries gradients to the `Var`s of `pass.lora`. Rows not wanted never reach the head.
    pub fn token_logprobs(
        self: &Arc<Self>,
        sequences: &[&[u32]],
        wanted: &[(usize, usize)],
        pass: ForwardOptions<'_>,
    ) -> Result<Tensor> {
        Ok(self.score_tokens(sequences, wanted, pass)?.logprobs)
    }

    /// As [`Model::token_logprobs`], and whether each token is the most likely one.
    pub fn score_tokens(
        self: &Arc<Self>,
        sequences: &[&[u32]],
        wanted: &[(usize, usize)],
        pass: ForwardOptions<'_>,
    ) -> Result<TokenScores> {
        let target = |&(sequence, i): &(usize, usize)| sequences.get(sequence).and_then(|ids| ids.get(i + 1)).copied();
        let targets: Option<Vec<u32>> = wanted.iter().map(target).collect();
        let targets = targets.ok_or_else(|| Error::internal("a wanted log-probability lies outside its sequence"))?;
        let hidden = self.traced_hidden(sequences, wanted, pass)?;
        let (head, is_greedy) = TokenLogprobs::new(self.clone(), targets, pass.compute());
        let logprobs = hidden.apply_op1(head)?;
        let is_greedy = std::mem::take(&mut *lock(&is_greedy));
        Ok(TokenScores { logprobs, is_greedy })
    }

    /// All logits after position i, for every (sequence, i) in `wanted`: `[wanted.len(), vocab]`. The float32 reference; no gradients.
    pub fn reference_logits(
        self: &Arc<Self>,
        sequences: &[&[u32]],
        wanted: &[(usize, usize)],
        lora: Option<&TracedLora>,
    ) -> Result<Tensor> {
        let hidden =
            self.traced_hidden(sequences, wanted, ForwardOptions { lora, ..ForwardOptions::default() })?.detach();
        let head = self.head();
        let mut dense = vec![0.0; head.rows() * head.cols()];
        head.dequantize(0, &mut dense);
        let products = hidden.matmul(&Tensor::from_vec(dense, (head.rows(), head.cols()), &Device::Cpu)?.t()?)?;
        let mut logits = to_vec(&products)?;
        self.config().logits.apply(&mut logits);
        Ok(Tensor::from_vec(logits, products.shape(), &Device::Cpu)?)
    }

    fn traced_hidden(
        self: &Arc<Self>,
        sequences: &[&[u32]],
        wanted: &[(usize, usize)],
        pass: ForwardOptions<'_>,
    ) -> Result<Tensor> {
        let fits = |ids: &&[u32]| {
            ids.len() <= self.context_length() && ids.iter().all(|id| (*id as usize) < self.vocab_size())
        };
        if !sequences.iter().all(fits) {
            return Err(Error::internal("a sequence does not fit the context or the vocabulary"));
        }
        let mut rows = Vec::with_capacity(sequences.len());
        let mut next = 0;
        for ids in sequences {
            rows.push(next..next + ids.len());
            next += ids.len();
        }
        let selected: Vec<u32> = wanted.iter().map(|&(sequence, i)| (rows[sequence].start + i) as u32).collect();
        let positions = sequences.iter().flat_map(|ids| 0..ids.len()).collect();
        let ids = sequences.concat();
        let (positions, sequences) = (Arc::new(positions), Arc::new(rows));
        interpret::hidden(self, TracedPass { model: self, pass, ids, positions, sequences, selected })
    }
}

/// One batch of whole sequences, end to end in one list of rows.
struct TracedPass<'a> {
    model: &'a Arc<Model>,
    pass: ForwardOptions<'a>,
    ids: Vec<u32>,
    positions: Arc<Vec<usize>>,
    sequences: Arc<Vec<Range<usize>>>,
    selected: Vec<u32>,
}

impl TracedPass<'_> {
    /// Prepares heads of q or k; `factors` are of rows.
    fn prepare(
        &self,
        x: Tensor,
        norm: Option<NormId>,
        rope: Option<usize>,
        factors: Option<Vec<f32>>,
    ) -> Result<Tensor> {
        let x = match norm {
            Some(norm) => self.norm(&x, norm)?,
            None => x,
        };
        if rope.is_none() && factors.is_none() {
            return Ok(x);
        }
        let (model, positions) = (self.model.clone(), self.positions.clone());
        let head_dim = model.config().attention.head_dim;
        Ok(x.apply_op1(Rope { model, rope, head_dim, positions, factors: factors.map(Arc::new) })?)
    }
}

impl TensorOps for TracedPass<'_> {
    fn linear(&self, x: &Tensor, id: SiteId) -> Result<Tensor> {
        let frozen = FrozenLinear { model: self.model.clone(), site: id, compute: self.pass.compute() };
        let Some(layer) = self.pass.lora.and_then(|lora| lora.layers.get(&self.model.site(id))) else {
            return Ok(x.apply_op1(frozen)?);
        };
        let dropout = self.pass.dropout.filter(|dropout| dropout.rate > 0.0);
        Ok(x.apply_op3(&layer.a, &layer.b, AdaptedLinear { frozen, scale: layer.scale, dropout })?)
    }

    fn embed(&self, scale: f32) -> Result<Tensor> {
        let width = self.model.config().hidden_size;
        let mut x = vec![0.0; self.ids.len() * width];
        for (out, id) in x.chunks_exact_mut(width).zip(&self.ids) {
            self.model.embed(*id, scale, out);
        }
        Ok(Tensor::from_vec(x, (self.ids.len(), width), &Device::Cpu)?)
    }

    fn norm(&self, x: &Tensor, norm: NormId) -> Result<Tensor> {
        Ok(x.apply_op1(RmsNorm { model: self.model.clone(), norm })?)
    }

    fn attend(&self, attend: &Attend, [q, k, v]: [Tensor; 3]) -> Result<Tensor> {
        let AttentionConfig { kv_heads, head_dim, .. } = self.model.config().attention;
        let [q_norm, k_norm] = attend.norms.map_or([None; 2], |norms| norms.map(Some));
        let factors = attend.temperature.map(|by| self.positions.iter().map(|position| by.at(*position)).collect());
        let (q, k) = (self.prepare(q, q_norm, attend.rope, factors)?, self.prepare(k, k_norm, attend.rope, None)?);
        let (sequences, compute) = (self.sequences.clone(), self.pass.compute());
        Ok(q.apply_op3(&k, &v, Attention { spec: attend.spec, kv_heads, head_dim, sequences, compute })?)
    }

    fn gated(&self, activation: Activation, gate: Tensor, up: &Tensor) -> Result<Tensor> {
        Ok(gate.apply_op2(up, Gated(activation))?)
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        Ok((x + y)?)
    }

    fn select(&self, x: &Tensor) -> Result<Tensor> {
        let rows = Tensor::from_slice(&self.selected, self.selected.len(), &Device::Cpu)?;
        Ok(x.index_select(&rows, 0)?)
    }
}
