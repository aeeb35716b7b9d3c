//! What each operation means, in plain candle: the form that the kernels are compared with, and what serves where there
//! are none.

use candle_core::{D, DType, Device, Tensor};

use super::{Best, DeviceLora, DeviceMatrix, HeadPrep, KvLayer, OUT_TILE, Plan, Rope, SitePlace, TensorKernels};
use crate::cpu::LoraPair;
use crate::error::{Error, Result};
use crate::log_sum_exp;
use crate::spec::{Activation, AttentionSpec};

/// The largest finite half-precision number.
const LARGEST_HALF: f32 = 65504.0;

/// The reference on a device.
#[derive(Debug)]
pub struct Reference {
    device: Device,
}

impl Reference {
    /// Returns the reference kernels on a device.
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone() }
    }

    fn integers(&self, values: &[u32]) -> Result<Tensor> {
        Ok(Tensor::from_slice(values, values.len(), &self.device)?)
    }
}

impl TensorKernels for Reference {
    fn device(&self) -> &Device {
        &self.device
    }

    fn upload(&mut self, _plan: &Plan) -> Result<()> {
        Ok(())
    }

    fn embed(&self, embedding: &DeviceMatrix, plan: &Plan) -> Result<Tensor> {
        Ok(embedding.tensor().embedding(&self.integers(&plan.ids)?)?)
    }

    fn matmul(&self, x: &Tensor, matrix: &DeviceMatrix) -> Result<Tensor> {
        matrix.forward(x)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(eps))?.sqrt()?;
        Ok(x.broadcast_div(&scale)?.broadcast_mul(weight)?)
    }

    fn gated(&self, activation: Activation, gate: Tensor, up: &Tensor) -> Result<Tensor> {
        let gate = match activation {
            Activation::Silu => gate.silu()?,
            Activation::GeluTanh => gate.gelu()?,
        };
        Ok((gate * up)?)
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        Ok((x + y)?)
    }

    fn rotate_and_store(
        &self,
        (q, k, v): (Tensor, &Tensor, &Tensor),
        prep: HeadPrep<'_>,
        kv: &KvLayer,
        plan: &Plan,
    ) -> Result<Tensor> {
        let positions = self.integers(&plan.positions)?;
        let (mut q, mut k) = (q, k.clone());
        if let Some(norms) = prep.norms {
            q = normed_heads(self, &q, norms.q, norms.eps)?;
            k = normed_heads(self, &k, norms.k, norms.eps)?;
        }
        if let Some(rope) = prep.rope {
            (q, k) = (turned(&q, rope, &positions, kv)?, turned(&k, rope, &positions, kv)?);
        }
        if let Some(factors) = prep.q_factors {
            q = q.broadcast_mul(&factors.index_select(&positions, 0)?.unsqueeze(1)?)?;
        }
        for (pool, x) in [(&kv.keys, &k), (&kv.values, v)] {
            let halves = x.clamp(-LARGEST_HALF, LARGEST_HALF)?.to_dtype(DType::F16)?;
            for (row, slot) in plan.slots.iter().enumerate() {
                pool.slice_set(&halves.narrow(0, row, 1)?, 0, *slot as usize)?;
            }
        }
        Ok(q)
    }

    fn attention(&self, q: &Tensor, spec: &AttentionSpec, kv: &KvLayer, plan: &Plan) -> Result<Tensor> {
        let (block_tokens, mut parts) = (kv.shape.block_tokens as u32, Vec::new());
        for of in &plan.sequences {
            let blocks = &plan.blocks[of.table as usize..];
            let slots = (0..of.start + of.rows)
                .map(|position| blocks[(position / block_tokens) as usize] * block_tokens + position % block_tokens);
            let slots = self.integers(&slots.collect::<Vec<_>>())?;
            let q = q.narrow(0, of.first_row as usize, of.rows as usize)?;
            parts.push(attend(&q, spec, kv, &slots, of.start as usize)?);
        }
        Ok(Tensor::cat(&parts, 0)?)
    }

    fn lora(&self, x: &Tensor, y: Tensor, site: usize, plan: &Plan) -> Result<Tensor> {
        let mut y = y;
        for (lora, range) in &plan.adapters {
            let Some(Some(place)) = lora.sites.get(site) else { continue };
            let rows = self.integers(&plan.adapted[range.clone()])?;
            let (a, b) = tensors(lora, place, x.dim(1)?, y.dim(1)?)?;
            let shrunk = (x.index_select(&rows, 0)?.matmul(&a)? * f64::from(place.scale))?;
            y = y.index_add(&rows, &shrunk.matmul(&b)?, 0)?;
        }
        Ok(y)
    }

    fn select(&self, x: &Tensor, plan: &Plan) -> Result<Tensor> {
        Ok(x.index_select(&self.integers(&plan.wanted)?, 0)?)
    }

    fn best(&self, logits: &Tensor) -> Result<Vec<Best>> {
        let of_row = |row: &Vec<f32>| {
            let top = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            if !top.is_finite() || row.iter().any(|x| x.is_nan()) {
                return Best { id: None, logprob: f32::NAN };
            }
            let id = row.iter().position(|x| *x == top).map(|id| id as u32);
            Best { id, logprob: (f64::from(top) - log_sum_exp(row)) as f32 }
        };
        Ok(logits.to_vec2()?.iter().map(of_row).collect())
    }

    fn adapter(&self, sites: &[Option<LoraPair<'_>>]) -> Result<DeviceLora> {
        DeviceLora::new(sites, &self.device)
    }
}

/// Each head, as wide as the weight, through the norm.
fn normed_heads(of: &Reference, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let dim = weight.dim(0)?;
    Ok(of.rms_norm(&x.reshape((rows * width / dim, dim))?, weight, eps)?.reshape((rows, width))?)
}

/// The first values of each head, turned by the rows' angles (Hugging Face's order).
fn turned(x: &Tensor, rope: &Rope, positions: &Tensor, kv: &KvLayer) -> Result<Tensor> {
    let (cos, sin) = (rope.cos.index_select(positions, 0)?, rope.sin.index_select(positions, 0)?);
    let ((rows, width), half, dim) = (x.dims2()?, cos.dim(1)?, kv.shape.head_dim);
    let x = x.reshape((rows, width / dim, dim))?;
    let (low, high, rest) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?, x.narrow(2, 2 * half, dim - 2 * half)?);
    let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?);
    let turned_low = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
    let turned_high = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
    Ok(Tensor::cat(&[turned_low, turned_high, rest], 2)?.reshape((rows, width))?)
}

/// The attention of one sequence's new rows, the first at `start`; `slots`: where all its positions lie.
fn attend(q: &Tensor, spec: &AttentionSpec, kv: &KvLayer, slots: &Tensor, start: usize) -> Result<Tensor> {
    let (shape, n, end) = (kv.shape, q.dim(0)?, slots.dim(0)?);
    let (kv_heads, group, dim) = (shape.kv_heads, shape.group(), shape.head_dim);
    // [kv_heads, end, dim]
    let gather = |pool: &Tensor| -> Result<Tensor> {
        let rows = pool.index_select(slots, 0)?.to_dtype(DType::F32)?;
        Ok(rows.reshape((end, kv_heads, dim))?.transpose(0, 1)?.contiguous()?)
    };
    let (keys, values) = (gather(&kv.keys)?, gather(&kv.values)?);
    let q = q.reshape((n, kv_heads, group, dim))?.permute((1, 2, 0, 3))?.contiguous()?;
    let q = q.reshape((kv_heads, group * n, dim))?;
    let scores = (q.matmul(&keys.transpose(1, 2)?.contiguous()?)? * f64::from(spec.scale))?;
    let scores = match spec.softcap.map(f64::from) {
        Some(cap) => ((scores / cap)?.tanh()? * cap)?,
        None => scores,
    };
    let sees = |position: usize, at: usize| (spec.first_seen(position)..=position).contains(&at);
    let term = |row: usize, at: usize| if sees(start + row, at) { 0.0 } else { f32::NEG_INFINITY };
    let mask: Vec<f32> = (0..n).flat_map(|row| (0..end).map(move |at| term(row, at))).collect();
    let mask = Tensor::from_vec(mask, (n, end), q.device())?;
    let scores = scores.reshape((kv_heads, group, n, end))?.broadcast_add(&mask)?;
    let scores = scores.reshape((kv_heads, group * n, end))?;
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    let out = weights.matmul(&values)?.reshape((kv_heads, group, n, dim))?.permute((2, 0, 1, 3))?;
    Ok(out.contiguous()?.reshape((n, shape.heads * dim))?)
}

/// A^T `[in, rank]` and B^T `[rank, out]` of a site.
fn tensors(lora: &DeviceLora, place: &SitePlace, inputs: usize, outputs: usize) -> Result<(Tensor, Tensor)> {
    let tiles = outputs.div_ceil(OUT_TILE);
    if !place.fits(inputs, outputs) {
        return Err(Error::internal("an adapter does not fit the base"));
    }
    let part = |(at, len): (usize, usize)| lora.values.narrow(0, at, len)?.to_dtype(DType::F32);
    let a = part(place.a)?.reshape((place.rank, inputs))?.t()?.contiguous()?;
    let b = part(place.b)?.reshape((tiles, place.rank, OUT_TILE))?.transpose(0, 1)?.contiguous()?;
    let b = b.reshape((place.rank, tiles * OUT_TILE))?.narrow(1, 0, outputs)?.contiguous()?;
    Ok((a, b))
}
