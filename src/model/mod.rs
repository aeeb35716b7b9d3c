//! The base model: its decoder's steps ([`crate::arch::decoder`]) over its executors: [`traced`] for training and reference, [`exec`] for
//! serving on the CPU, [`tensors`] for serving on a GPU.

pub mod batch;
mod exec;
mod full;
pub mod groups;
mod initial;
mod inspect;
mod kv;
mod logits;
pub mod parity;
mod rope;
mod tensors;
mod tiny;
pub mod traced;

use std::path::Path;
use std::sync::Arc;

use candle_core::Device;

use crate::adapter::{BaseNames, BaseShape, LinearShape, Site};
use crate::arch::config::{AttentionConfig, ModelConfig};
use crate::arch::decoder::{Decoder, NormId, SiteId, Slot};
use crate::arch::unsupported;
use crate::error::{Error, Result};
use crate::kernels::cpu::{HEAD_DIM_STEP, KvShape, MAX_GROUP, MAX_HEAD_DIM};
use crate::kernels::format::QType;
use crate::kernels::packed::PackedMatrix;
use crate::text::{Text, Vocabulary};
use crate::weights::{Progress, Weights};
use batch::{Executor, KvDtype, KvLayout, Readout, SequenceChunk};
use exec::Exec;
use groups::KvGroups;
pub use inspect::{Inspection, inspect};
use rope::RopeTable;
use tensors::{DeviceWeights, TensorExec};

/// The frozen base. Shared as `Arc<Model>`; training and serving read the same bytes, which a GPU has a copy of.
#[derive(Debug)]
pub struct Model {
    weights: Weights,
    shape: BaseShape,
    /// In the order of [`ModelConfig::ropes`].
    ropes: Vec<RopeTable>,
    /// `None` where the CPU serves.
    on_device: Option<Arc<DeviceWeights>>,
}

/// How a base is loaded.
#[derive(Debug, Clone, Copy, Default)]
pub struct LoadOptions<'a> {
    /// Tokens of the context; see [`ModelConfig::take_context`].
    pub context: Option<usize>,
    /// The format to which matrices of floats are brought, by GGUF's name of it; `None`: they are served as they are.
    pub quantize: Option<&'a str>,
}

impl Model {
    /// Loads a GGUF file and its tokenizer, to be served on `device` with a context of so many tokens (see
    /// [`ModelConfig::take_context`]).
    pub fn load(path: &Path, device: &Device, context: Option<usize>) -> Result<(Arc<Self>, Arc<Text>)> {
        Self::load_watched(path, device, LoadOptions { context, quantize: None }, &mut |_, _| {})
    }

    /// As [`Model::load`]; `progress` hears how many bytes have been read, and of how many.
    pub fn load_watched(
        path: &Path,
        device: &Device,
        options: LoadOptions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<(Arc<Self>, Arc<Text>)> {
        let (mut weights, vocabulary) = Weights::load(path, options.quantize, progress)?;
        weights.config.take_context(options.context)?;
        Self::proven((weights, vocabulary), device)
    }

    /// Puts a base together and takes a step with it.
    ///
    /// # Errors
    /// UNSUPPORTED_BASE where it cannot be served, or its logits are not numbers.
    fn proven((weights, vocabulary): (Weights, Vocabulary), device: &Device) -> Result<(Arc<Self>, Arc<Text>)> {
        let base = (Self::new(weights, device)?, Text::new(vocabulary)?);
        base.0.take_a_step()?;
        Ok(base)
    }

    /// Computes the logits of a few tokens, all of which must be numbers: what a damaged file gives is found here, and not by the first
    /// request.
    fn take_a_step(self: &Arc<Self>) -> Result<()> {
        let last = self.vocab_size() as u32 - 1;
        let ids = [0, last / 3, last / 2, last];
        let ids = &ids[..ids.len().min(self.context_length())];
        let mut exec = self.executor(KvLayout { block_tokens: ids.len(), blocks: 1, dtype: KvDtype::F16 })?;
        let span = SequenceChunk { ids, start: 0, blocks: &[0], adapter: None, logits: Readout::All };
        if exec.forward(&[span])?.iter().all(|logit| logit.is_finite()) {
            return Ok(());
        }
        let message =
            "gives logits that are not numbers: the file is damaged or its values are too large; fetch it again";
        Err(Error::invalid_because("UNSUPPORTED_BASE", &self.shape.name, message))
    }

    /// A small random model over `Text::tiny`'s vocabulary, the same for the same seed: 2 layers, width 64, 4 heads, 2 KV heads,
    /// context 256. For tests.
    pub fn tiny(seed: u64) -> (Arc<Self>, Arc<Text>) {
        let text = Text::tiny();
        #[expect(clippy::expect_used, reason = "the weights are made to fit, and a test builds them")]
        let model = Self::new(tiny::weights(seed, text.vocab_size()), &Device::Cpu).expect("the tiny model is valid");
        (model, text)
    }

    /// As [`Model::tiny`], with 4 layers of which every other one sees 32 positions.
    pub fn tiny_windowed(seed: u64) -> (Arc<Self>, Arc<Text>) {
        let text = Text::tiny();
        #[expect(clippy::expect_used, reason = "the weights are made to fit, and a test builds them")]
        let model = Self::new(tiny::windowed(seed, text.vocab_size()), &Device::Cpu).expect("the tiny model is valid");
        (model, text)
    }

    /// Refuses a base whose heads the kernels do not take.
    fn check(config: &ModelConfig) -> Result<()> {
        let AttentionConfig { heads, kv_heads, head_dim, .. } = config.attention;
        if head_dim > MAX_HEAD_DIM || !head_dim.is_multiple_of(HEAD_DIM_STEP) {
            let message = format!(
                "has heads of {head_dim} values; heads of up to {MAX_HEAD_DIM} in steps of {HEAD_DIM_STEP} are served"
            );
            return Err(unsupported(&config.name, message));
        }
        let group = heads / kv_heads;
        if group > MAX_GROUP {
            let message = format!("gives {group} heads to a KV head; up to {MAX_GROUP} are served");
            return Err(unsupported(&config.name, message));
        }
        Ok(())
    }

    fn new(weights: Weights, device: &Device) -> Result<Arc<Self>> {
        let config = &weights.config;
        Self::check(config)?;
        let linears = weights.decoder.sites.iter().zip(&weights.linears);
        let biased = linears.filter(|(_, linear)| linear.bias.is_some());
        let shape = BaseShape {
            name: config.name.clone(),
            names: BaseNames { names: weights.called.clone(), strict: false },
            digest: weights.digest,
            layers: config.layers.len() as u32,
            linears: weights.decoder.block_sites().iter().map(LinearShape::from).collect(),
            biased: biased.map(|(spec, _)| spec.site).collect(),
            vocab_size: config.vocab_size,
            own_head: weights.head.is_some(),
            hidden_size: config.hidden_size,
            heads: config.attention.heads,
            kv_heads: config.attention.kv_heads,
            head_dim: config.attention.head_dim,
        };
        let ropes: Vec<_> = config.ropes.iter().map(|rope| RopeTable::new(rope, config.context_length)).collect();
        let on_device = match device {
            Device::Cpu => None,
            device => Some(DeviceWeights::new(&weights, &ropes, device)?),
        };
        Ok(Arc::new(Self { shape, ropes, on_device, weights }))
    }

    /// Returns whether the model serves on the CPU, where it is trained too.
    pub fn serves_on_cpu(&self) -> bool {
        self.on_device.is_none()
    }

    /// Returns what runs on the model's device, with a KV cache of its own in which all layers are one group.
    ///
    /// # Errors
    /// A cache without room for a single token, and the device's.
    pub fn executor(self: &Arc<Self>, kv: KvLayout) -> Result<Box<dyn Executor>> {
        self.executor_over(kv, KvGroups::whole(self.config().layers.len()))
    }

    /// Returns what serves on the model's device, with a KV cache of its own in the groups of [`Model::kv_groups`].
    ///
    /// # Errors
    /// As of [`Model::executor`].
    pub fn serving_executor(self: &Arc<Self>, kv: KvLayout) -> Result<Box<dyn Executor>> {
        self.executor_over(kv, self.kv_groups())
    }

    /// A GPU's executor knows one group only.
    fn executor_over(self: &Arc<Self>, kv: KvLayout, groups: KvGroups) -> Result<Box<dyn Executor>> {
        Ok(match &self.on_device {
            None => Box::new(Exec::new(self.clone(), kv, groups)?),
            Some(weights) => Box::new(TensorExec::new(self.clone(), weights.clone(), kv)?),
        })
    }

    /// Returns what an adapter has to fit.
    pub fn shape(&self) -> &BaseShape {
        &self.shape
    }

    /// Returns the dimensions and constants of the architecture.
    pub fn config(&self) -> &ModelConfig {
        &self.weights.config
    }

    /// Returns the steps, and what the linear layers and norms are.
    pub fn decoder(&self) -> &Decoder {
        &self.weights.decoder
    }

    /// Returns how many tokens there are.
    pub fn vocab_size(&self) -> usize {
        self.config().vocab_size
    }

    /// Tokens.
    pub fn context_length(&self) -> usize {
        self.config().context_length
    }

    /// Returns the groups of layers that share the KV pages of those who are served.
    pub fn kv_groups(&self) -> KvGroups {
        match self.on_device {
            None => KvGroups::by_window(&self.config().layers, self.context_length()),
            Some(_) => KvGroups::whole(self.config().layers.len()),
        }
    }

    /// Bytes of a page of so many positions, in these groups.
    pub fn kv_page_bytes(&self, groups: &KvGroups, block_tokens: usize, dtype: KvDtype) -> u64 {
        let of_layer = self.kv_bytes_per_token(dtype) / self.config().layers.len() as u64;
        of_layer * (groups.layers_per_page * block_tokens) as u64
    }

    /// Bytes of the KV cache for one token, in all layers.
    pub fn kv_bytes_per_token(&self, dtype: KvDtype) -> u64 {
        kv_bytes_per_token(self.config(), dtype)
    }

    /// Returns the bytes that the base's tensors take in memory.
    pub fn held_bytes(&self) -> u64 {
        self.weights.held_bytes()
    }

    /// `[out, in]`.
    fn matrix(&self, site: SiteId) -> &PackedMatrix {
        &self.weights.linears[site].matrix
    }

    /// The formats of all frozen layers and of the head.
    fn formats(&self) -> impl Iterator<Item = QType> {
        self.weights.linears.iter().map(|linear| linear.matrix.qtype()).chain([self.head().qtype()])
    }

    /// `[out]`.
    fn bias(&self, site: SiteId) -> Option<&[f32]> {
        self.weights.linears[site].bias.as_deref()
    }

    /// The name of a linear layer.
    fn site(&self, site: SiteId) -> Site {
        self.weights.decoder.sites[site].site
    }

    /// `[vocab_size, hidden_size]`.
    fn head(&self) -> &PackedMatrix {
        self.weights.head()
    }

    /// Which tensor the output matrix is.
    fn head_slot(&self) -> Slot {
        if self.weights.head.is_some() { Slot::Head } else { Slot::Embedding }
    }

    /// The exact embedding of an id times `scale`, `[hidden_size]`.
    fn embed(&self, id: u32, scale: f32, out: &mut [f32]) {
        self.weights.embedding.dequantize(id as usize, out);
        if scale != 1.0 {
            out.iter_mut().for_each(|x| *x *= scale);
        }
    }

    /// A virtual token's row of the residual stream, `[hidden_size]`: of its embedding, or zeros where it has keys and values instead.
    fn embed_virtual(&self, embedding: Option<&[f32]>, out: &mut [f32]) {
        match embedding {
            Some(embedding) => {
                let scale = self.config().virtual_scale;
                out.iter_mut().zip(embedding).for_each(|(out, x)| *out = scale * x);
            }
            None => out.fill(0.0),
        }
    }

    fn norm(&self, norm: NormId) -> &[f32] {
        &self.weights.norms[norm]
    }
}

fn kv_bytes_per_token(config: &ModelConfig, dtype: KvDtype) -> u64 {
    let AttentionConfig { kv_heads, head_dim, .. } = config.attention;
    let of_layer = KvShape { block_tokens: 1, kv_heads, head_dim, dtype }.block_len() * size_of::<u16>();
    (2 * config.layers.len() * of_layer) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::testing::File;

    /// Values that are numbers one by one and give none together.
    #[test]
    fn a_base_whose_logits_are_no_numbers_is_refused() {
        let load = |file: File| Model::proven(Weights::from_bytes(&file.bytes()).unwrap(), &Device::Cpu).map(drop);
        load(File::tiny()).unwrap();
        for (norm, value) in [("output_norm.weight", f32::MAX), ("blk.0.ffn_norm.weight", 3e38)] {
            let large = File::tiny().tensor(norm, |tensor| tensor.3 = [value.to_le_bytes(); 32].concat());
            let refused = load(large).unwrap_err().to_string();
            assert!(refused.contains("not numbers"), "{refused}");
        }
    }
}
