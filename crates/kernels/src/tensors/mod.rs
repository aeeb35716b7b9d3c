//! What serves on a device of candle's: the operations of a forward pass over tensors, in two forms that give the same
//! numbers but for rounding. [`mod@reference`] is plain candle, on any device, and says what each operation means;
//! `cuda` has a kernel of its own for each. One contract test holds the second to the first wherever there is
//! a GPU.
//!
//! A batch goes to the device as one [`Plan`]: positions, places in the cache, sequences, adapters. Nothing else of it
//! travels.

mod plan;
pub mod reference;
#[cfg(test)]
mod tests;

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, Module as _, Tensor};
use half::bf16;

use super::cpu::LoraPair;
use super::format::QType;
use super::packed::PackedMatrix;
use super::spec::{Activation, AttentionSpec};
use crate::error::{Error, Result};

pub use plan::{AttentionTask, LoraTask, Places, Plan, Rows, Sequence};

/// Rows of one adapter that a kernel takes at a time.
pub const LORA_ROWS: usize = 8;

/// Outputs in a tile of an adapter's B.
pub const OUT_TILE: usize = 16;

/// Activations are float32 `[rows, width]`, contiguous. What comes by value may be written over.
pub trait TensorKernels: Debug + Send + Sync {
    /// Returns the device that it computes on.
    fn device(&self) -> &Device;

    /// Brings the batch to the device; every operation until the next call is of this batch.
    fn upload(&mut self, plan: &Plan) -> Result<()>;

    /// The exact embeddings of the batch's ids.
    fn embed(&self, embedding: &DeviceMatrix, plan: &Plan) -> Result<Tensor>;

    /// x W^T.
    fn matmul(&self, x: &Tensor, matrix: &DeviceMatrix) -> Result<Tensor>;

    /// x / rms(x) * weight.
    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor>;

    /// activation(gate) * up.
    fn gated(&self, activation: Activation, gate: Tensor, up: &Tensor) -> Result<Tensor>;

    /// x + y.
    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor>;

    /// The heads of q and k prepared for the rows' positions; k and v written to the rows' places in the cache, in half
    /// precision. Gives the prepared q.
    fn rotate_and_store(
        &self,
        qkv: (Tensor, &Tensor, &Tensor),
        prep: HeadPrep<'_>,
        kv: &KvLayer,
        plan: &Plan,
    ) -> Result<Tensor>;

    /// softmax(scores) V of every row, with the scores and over the positions of its sequence that `spec` says, read
    /// from the cache.
    fn attention(&self, q: &Tensor, spec: &AttentionSpec, kv: &KvLayer, plan: &Plan) -> Result<Tensor>;

    /// y + scale * B (A x) for the rows whose adapter has the site.
    fn lora(&self, x: &Tensor, y: Tensor, site: usize, plan: &Plan) -> Result<Tensor>;

    /// The rows that are wanted, in order.
    fn select(&self, x: &Tensor, plan: &Plan) -> Result<Tensor>;

    /// The best id of each row of logits; nothing else of them leaves the device.
    fn best(&self, logits: &Tensor) -> Result<Vec<Best>>;

    /// An adapter's tensors, brought to the device.
    fn adapter(&self, sites: &[Option<LoraPair<'_>>]) -> Result<DeviceLora>;
}

/// The most likely id of a row (the lowest among equals) and the logarithm of its probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Best {
    /// `None` where a logit is not a number or the largest is not finite.
    pub id: Option<u32>,
    /// The log-probability of that id.
    pub logprob: f32,
}

/// A frozen matrix `[rows, cols]` on a device: the file's bytes as they are, or float32 where candle lacks the format.
#[derive(Debug, Clone)]
pub struct DeviceMatrix {
    /// The format of its blocks.
    pub qtype: QType,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    tensor: Arc<QTensor>,
}

impl DeviceMatrix {
    /// In the file's order. Not through `QTensor::quantize`, which on CUDA leaves what follows a last row that is no
    /// multiple of 256 uninitialised.
    ///
    /// # Errors
    /// [`Error::UnsupportedBase`] where the device has no kernels for the matrix's format.
    pub fn new(matrix: &PackedMatrix, device: &Device) -> Result<Self> {
        if device.is_cuda() && !matrix.qtype().has_cuda_kernels() {
            let served: Vec<_> = QType::ALL.iter().filter(|q| q.has_cuda_kernels()).map(|q| q.name()).collect();
            return Err(Error::UnsupportedBase(format!(
                "has matrices in {}; a GPU serves {}; take --device cpu",
                matrix.qtype().name(),
                served.join(", ")
            )));
        }
        let (data, dtype) = match matrix.qtype().candle() {
            Some(dtype) => (matrix.unpack(), dtype),
            None => {
                let mut values = vec![0.0; matrix.rows() * matrix.cols()];
                matrix.dequantize(0, &mut values);
                (values.iter().flat_map(|x| x.to_le_bytes()).collect(), GgmlDType::F32)
            }
        };
        let storage = QStorage::from_data(data.into(), device, dtype)?;
        let tensor = Arc::new(QTensor::new(storage, (matrix.rows(), matrix.cols()))?);
        Ok(Self { qtype: matrix.qtype(), rows: matrix.rows(), cols: matrix.cols(), tensor })
    }

    /// Returns the blocks on the device.
    pub fn tensor(&self) -> &QTensor {
        &self.tensor
    }

    /// x W^T by candle.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(QMatMul::from_arc(self.tensor.clone())?.forward(x)?)
    }
}

/// Cosines and sines of every position's angles, by which the first `rotary_dim` values of each head turn.
#[derive(Debug)]
pub struct Rope {
    /// The cosines, `[positions, rotary_dim / 2]`.
    pub cos: Tensor,
    /// The sines, `[positions, rotary_dim / 2]`.
    pub sin: Tensor,
}

/// What is done to the heads of q and k before they meet, in this order. Each may be left out.
#[derive(Debug, Clone, Copy, Default)]
pub struct HeadPrep<'a> {
    /// Norms of each head of q and of k.
    pub norms: Option<HeadNorms<'a>>,
    /// The angles by which both turn.
    pub rope: Option<&'a Rope>,
    /// What q is multiplied with at each position, `[positions]`.
    pub q_factors: Option<&'a Tensor>,
}

/// RMS norms of heads: head / rms(head) * weight.
#[derive(Debug, Clone, Copy)]
pub struct HeadNorms<'a> {
    /// Of q's heads, `[head_dim]`.
    pub q: &'a Tensor,
    /// Of k's heads, `[head_dim]`.
    pub k: &'a Tensor,
    /// Added to the mean of squares.
    pub eps: f32,
}

/// One layer's cache: keys (turned) and values, `[blocks * block_tokens, kv_heads * head_dim]` in half precision.
#[derive(Debug)]
pub struct KvLayer {
    /// The keys of all blocks.
    pub keys: Tensor,
    /// The values of all blocks.
    pub values: Tensor,
    /// How they are laid out.
    pub shape: HeadShape,
}

/// How the width of q, k and v is cut into heads, and the cache into blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadShape {
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Values of a head.
    pub head_dim: usize,
    /// Positions that a block holds.
    pub block_tokens: usize,
}

impl HeadShape {
    /// Query heads that share a KV head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

impl KvLayer {
    /// An empty cache of `blocks` blocks.
    pub fn new(shape: HeadShape, blocks: usize, device: &Device) -> Result<Self> {
        let pool = || Tensor::zeros((blocks * shape.block_tokens, shape.kv_heads * shape.head_dim), DType::F16, device);
        Ok(Self { keys: pool()?, values: pool()?, shape })
    }
}

/// An adapter on a device.
#[derive(Debug)]
pub struct DeviceLora {
    /// All tensors, bf16, each from a multiple of [`ALIGN`] values on.
    values: Tensor,
    /// By site, layer * 7 + target; `None` where the base stays as it is.
    sites: Vec<Option<SitePlace>>,
    /// Of the sites' descriptors on the device; 0 for the reference, which needs none.
    address: u64,
    /// Keeps the descriptors.
    _descriptors: Tensor,
}

/// Where the tensors of a site lie among an adapter's values.
#[derive(Debug, Clone, Copy)]
struct SitePlace {
    rank: usize,
    scale: f32,
    a: (usize, usize),
    b: (usize, usize),
}

impl SitePlace {
    fn fits(&self, inputs: usize, outputs: usize) -> bool {
        (self.a.1, self.b.1) == (inputs * self.rank, outputs.next_multiple_of(OUT_TILE) * self.rank)
    }
}

/// Values, 64 bytes.
const ALIGN: usize = 32;

impl DeviceLora {
    /// What the reference needs: no descriptors.
    pub fn new(sites: &[Option<LoraPair<'_>>], device: &Device) -> Result<Self> {
        let mut values: Vec<bf16> = Vec::new();
        let mut add = |from: &[u16]| {
            let at = values.len();
            values.extend(from.iter().map(|bits| bf16::from_bits(*bits)));
            values.resize(values.len().next_multiple_of(ALIGN), bf16::ZERO);
            (at, from.len())
        };
        let mut place =
            |site: &LoraPair<'_>| SitePlace { rank: site.rank, scale: site.scale, a: add(site.a), b: add(site.b) };
        let sites: Vec<_> = sites.iter().map(|site| site.as_ref().map(&mut place)).collect();
        if sites.iter().flatten().any(|site| site.rank == 0) {
            return Err(Error::internal("an adapter has a layer of rank 0"));
        }
        let len = values.len();
        let none = Tensor::zeros(1, DType::U32, device)?;
        Ok(Self { values: Tensor::from_vec(values, len, device)?, sites, address: 0, _descriptors: none })
    }

    /// With the descriptors that kernels read, at `address`.
    pub fn described(self, address: u64, descriptors: Tensor) -> Self {
        Self { address, _descriptors: descriptors, ..self }
    }

    /// Returns the tensors of all layers, as one array.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// What kernels read of each site, six words: addresses of A and B, rank, scale. `start`: where the values lie.
    pub fn descriptors(&self, start: u64) -> Vec<u32> {
        let words = |site: &Option<SitePlace>| {
            let Some(site) = site else { return [0; 6] };
            let at = |(at, _): (usize, usize)| start + (at * size_of::<bf16>()) as u64;
            let [a, b] = [at(site.a), at(site.b)];
            [a as u32, (a >> 32) as u32, b as u32, (b >> 32) as u32, site.rank as u32, site.scale.to_bits()]
        };
        self.sites.iter().flat_map(words).collect()
    }

    fn has(&self, site: usize) -> bool {
        self.sites.get(site).is_some_and(Option::is_some)
    }

    /// Whether it knows the site, and what it has there fits a layer of this shape.
    fn fits(&self, site: usize, inputs: usize, outputs: usize) -> bool {
        self.sites.get(site).is_some_and(|place| place.as_ref().is_none_or(|place| place.fits(inputs, outputs)))
    }

    /// The largest of its layers.
    fn rank(&self) -> usize {
        self.sites.iter().flatten().map(|site| site.rank).max().unwrap_or_default()
    }
}

/// The kernels of a device.
pub fn open(device: &Device, shape: HeadShape) -> Result<Box<dyn TensorKernels>> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(cuda) = device {
        return Ok(Box::new(super::cuda::Kernels::new(cuda, shape)?));
    }
    let _ = shape;
    Ok(Box::new(reference::Reference::new(device)))
}
