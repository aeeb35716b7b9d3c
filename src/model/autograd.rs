//! The architecture's other operations under autograd, on float32 slices: norm, rotary embedding, gated activation, attention.
//! One node each, so that the backward keeps little and recomputes the rest.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Storage, Tensor};
use rayon::prelude::*;

use super::Model;
use super::llama::Norm;
use crate::kernels::cpu;
use crate::kernels::gemm::{Mat, Out, mul, mul_nt, mul_tn};

/// The values of a contiguous float32 operand.
pub(super) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((from, to))) => Ok(&values[from..to]),
        _ => candle_core::bail!("a contiguous float32 tensor was expected"),
    }
}

/// The values of a gradient or an argument.
pub(super) fn to_vec(tensor: &Tensor) -> Result<Vec<f32>> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => Ok(slice(storage, layout)?.to_vec()),
        _ => candle_core::bail!("a tensor on the CPU was expected"),
    }
}

/// x / rms(x) * weight. x: `[rows, width]`.
pub(super) struct RmsNorm {
    pub model: Arc<Model>,
    pub norm: Norm,
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, layout)?;
        let mut y = vec![0.0; x.len()];
        cpu::rms_norm(x, self.model.norm(self.norm), self.model.config().rms_eps, &mut y);
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let weight = self.model.norm(self.norm);
        let eps = self.model.config().rms_eps;
        let (values, mut d) = (to_vec(x)?, to_vec(dy)?);
        d.par_chunks_exact_mut(weight.len()).zip(values.par_chunks_exact(weight.len())).for_each(|(d, x)| {
            let mean = |sum: f32| sum / x.len() as f32;
            let s = 1.0 / (mean(x.iter().map(|x| x * x).sum()) + eps).sqrt();
            let dot = mean(d.iter().zip(x).zip(weight).map(|((d, x), w)| d * w * x).sum());
            for ((d, x), w) in d.iter_mut().zip(x).zip(weight) {
                *d = s * (*d * w - x * s * s * dot);
            }
        });
        Tensor::from_vec(d, x.shape(), x.device()).map(Some)
    }
}

/// Rotates each row by its position's angles. x: `[rows, heads * head_dim]`.
pub(super) struct Rope {
    pub model: Arc<Model>,
    pub positions: Arc<Vec<usize>>,
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut y = slice(x, layout)?.to_vec();
        let table = &self.model.rope;
        cpu::rope(&mut y, layout.dims()[1], table.half, |row| table.at(self.positions[row]));
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let mut d = to_vec(dy)?;
        let (width, half) = (x.dims()[1], self.model.rope.half);
        // The inverse of a rotation turns the other way.
        d.par_chunks_exact_mut(width).zip(&*self.positions).for_each(|(row, position)| {
            let (cos, sin) = self.model.rope.at(*position);
            for head in row.chunks_exact_mut(2 * half) {
                let (low, high) = head.split_at_mut(half);
                for i in 0..half {
                    let (a, b) = (low[i], high[i]);
                    low[i] = a * cos[i] + b * sin[i];
                    high[i] = b * cos[i] - a * sin[i];
                }
            }
        });
        Tensor::from_vec(d, x.shape(), x.device()).map(Some)
    }
}

/// silu(gate) * up.
pub(super) struct SwiGlu;

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, gate: &CpuStorage, l1: &Layout, up: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut y = slice(gate, l1)?.to_vec();
        cpu::swiglu(&mut y, slice(up, l2)?);
        Ok((CpuStorage::F32(y), l1.shape().clone()))
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (mut g, mut u, d) = (to_vec(gate)?, to_vec(up)?, to_vec(dy)?);
        g.par_chunks_mut(8192).zip(u.par_chunks_mut(8192)).zip(d.par_chunks(8192)).for_each(|((g, u), d)| {
            for ((g, u), d) in g.iter_mut().zip(u).zip(d) {
                let sigmoid = 1.0 / (1.0 + (-*g).exp());
                let silu = *g * sigmoid;
                *g = d * *u * sigmoid * (1.0 + *g * (1.0 - sigmoid));
                *u = d * silu;
            }
        });
        let tensor = |values| Tensor::from_vec(values, gate.shape(), gate.device()).map(Some);
        Ok((tensor(g)?, tensor(u)?))
    }
}

/// Causal grouped-query attention within each sequence. q: `[rows, heads * head_dim]`, k and v: `[rows, kv_heads * head_dim]`.
/// The backward recomputes the probabilities.
pub(super) struct Attention {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// The rows of each sequence.
    pub sequences: Arc<Vec<Range<usize>>>,
}

/// The rows of a sequence and a KV head: one task.
struct Task<'a> {
    op: &'a Attention,
    rows: Range<usize>,
    kv_head: usize,
}

impl Task<'_> {
    fn len(&self) -> usize {
        self.rows.len()
    }

    /// Query heads of this task's KV head.
    fn query_heads(&self) -> Range<usize> {
        let group = self.op.heads / self.op.kv_heads;
        self.kv_head * group..(self.kv_head + 1) * group
    }

    /// A head's rows in `[rows, heads * head_dim]`.
    fn head<'v>(&self, values: &'v [f32], heads: usize, head: usize) -> Mat<'v> {
        let stride = heads * self.op.head_dim;
        Mat::new(&values[self.rows.start * stride + head * self.op.head_dim..], self.len(), self.op.head_dim, stride)
    }

    fn query<'v>(&self, values: &'v [f32], head: usize) -> Mat<'v> {
        self.head(values, self.op.heads, head)
    }

    fn key<'v>(&self, values: &'v [f32]) -> Mat<'v> {
        self.head(values, self.op.kv_heads, self.kv_head)
    }

    /// softmax(q K^T / sqrt(head_dim)) under the causal mask, `[len, len]`.
    fn probabilities(&self, q: Mat<'_>, k: Mat<'_>) -> Vec<f32> {
        let n = self.len();
        let mut p = vec![0.0; n * n];
        mul_nt(Out { data: &mut p, stride: n, accumulate: false }, q, k, false);
        let scale = 1.0 / (self.op.head_dim as f32).sqrt();
        for (i, row) in p.chunks_exact_mut(n).enumerate() {
            let (seen, unseen) = row.split_at_mut(i + 1);
            unseen.fill(0.0);
            let largest = seen.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            let mut sum = 0.0;
            for x in seen.iter_mut() {
                *x = ((*x - largest) * scale).exp();
                sum += *x;
            }
            seen.iter_mut().for_each(|x| *x /= sum);
        }
        p
    }

    /// The gradients of one query head, `[len, head_dim]` each; those of K and V are added.
    fn backward(&self, q: Mat<'_>, k: Mat<'_>, v: Mat<'_>, d: Mat<'_>, dk: &mut [f32], dv: &mut [f32]) -> Vec<f32> {
        let (n, dim) = (self.len(), self.op.head_dim);
        let p = self.probabilities(q, k);
        mul_tn(Out { data: dv, stride: dim, accumulate: true }, Mat::dense(&p, n), d, false);
        let mut ds = vec![0.0; n * n];
        mul_nt(Out { data: &mut ds, stride: n, accumulate: false }, d, v, false);
        let scale = 1.0 / (dim as f32).sqrt();
        for (ds, p) in ds.chunks_exact_mut(n).zip(p.chunks_exact(n)) {
            let dot: f32 = ds.iter().zip(p).map(|(ds, p)| ds * p).sum();
            ds.iter_mut().zip(p).for_each(|(ds, p)| *ds = p * (*ds - dot) * scale);
        }
        let mut dq = vec![0.0; n * dim];
        mul(Out { data: &mut dq, stride: dim, accumulate: false }, Mat::dense(&ds, n), k, false);
        mul_tn(Out { data: dk, stride: dim, accumulate: true }, Mat::dense(&ds, n), q, false);
        dq
    }

    /// Puts a head's `[len, head_dim]` in its place in `[rows, heads * head_dim]`.
    fn scatter(&self, part: &[f32], values: &mut [f32], heads: usize, head: usize) {
        let dim = self.op.head_dim;
        for (row, part) in self.rows.clone().zip(part.chunks_exact(dim)) {
            values[(row * heads + head) * dim..][..dim].copy_from_slice(part);
        }
    }
}

/// Gradients of a task: of each query head, of K, of V; `[len, head_dim]` each.
type TaskGradients = (Vec<Vec<f32>>, Vec<f32>, Vec<f32>);

impl Attention {
    fn tasks(&self) -> Vec<Task<'_>> {
        let sequences = self.sequences.iter();
        sequences
            .flat_map(|rows| (0..self.kv_heads).map(|kv_head| Task { op: self, rows: rows.clone(), kv_head }))
            .collect()
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "causal-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        l1: &Layout,
        k: &CpuStorage,
        l2: &Layout,
        v: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (q, k, v) = (slice(q, l1)?, slice(k, l2)?, slice(v, l3)?);
        let tasks = self.tasks();
        let parts: Vec<Vec<Vec<f32>>> = tasks
            .par_iter()
            .map(|task| {
                let head = |head| {
                    let p = task.probabilities(task.query(q, head), task.key(k));
                    let mut out = vec![0.0; task.len() * self.head_dim];
                    let into = Out { data: &mut out, stride: self.head_dim, accumulate: false };
                    mul(into, Mat::dense(&p, task.len()), task.key(v), false);
                    out
                };
                task.query_heads().map(head).collect()
            })
            .collect();
        let mut y = vec![0.0; q.len()];
        for (task, parts) in tasks.iter().zip(parts) {
            task.query_heads().zip(parts).for_each(|(head, part)| task.scatter(&part, &mut y, self.heads, head));
        }
        Ok((CpuStorage::F32(y), l1.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (qs, ks, vs, d) = (to_vec(q)?, to_vec(k)?, to_vec(v)?, to_vec(dy)?);
        let tasks = self.tasks();
        let parts: Vec<TaskGradients> = tasks
            .par_iter()
            .map(|task| {
                let mut dk = vec![0.0; task.len() * self.head_dim];
                let mut dv = dk.clone();
                let head = |head| {
                    let (q, d) = (task.query(&qs, head), task.query(&d, head));
                    task.backward(q, task.key(&ks), task.key(&vs), d, &mut dk, &mut dv)
                };
                let dq = task.query_heads().map(head).collect();
                (dq, dk, dv)
            })
            .collect();
        let (mut dq, mut dk, mut dv) = (vec![0.0; qs.len()], vec![0.0; ks.len()], vec![0.0; vs.len()]);
        for (task, (part_q, part_k, part_v)) in tasks.iter().zip(parts) {
            task.query_heads().zip(part_q).for_each(|(head, part)| task.scatter(&part, &mut dq, self.heads, head));
            task.scatter(&part_k, &mut dk, self.kv_heads, task.kv_head);
            task.scatter(&part_v, &mut dv, self.kv_heads, task.kv_head);
        }
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device()).map(Some);
        Ok((tensor(dq, q)?, tensor(dk, k)?, tensor(dv, v)?))
    }
}
