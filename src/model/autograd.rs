//! The architecture's other operations under autograd, on float32 slices: norm, rotary embedding, gated activation, attention.
//! One node each, so that the backward keeps little and recomputes the rest. Between pieces of work, training gives way to serving.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Storage, Tensor};
use rayon::prelude::*;

use super::Model;
use crate::arch::decoder::NormId;
use crate::device::YieldPoint;
use crate::kernels::cpu;
use crate::kernels::gemm::{Mat, Out, mul, mul_nt, mul_tn};

/// Multiply-adds between two offers to give way: a few milliseconds on a core.
pub(super) const PIECE_MACS: usize = 1 << 28;

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
    pub norm: NormId,
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, layout)?;
        let mut y = vec![0.0; x.len()];
        cpu::rms_norm(x, self.model.norm(self.norm), self.model.config().norm_eps, &mut y);
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let weight = self.model.norm(self.norm);
        let eps = self.model.config().norm_eps;
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
        cpu::swiglu_backward(&mut g, &mut u, &d);
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
    pub compute: YieldPoint,
}

/// Some queries of a sequence, and a KV head: a part of [`PIECE_MACS`].
struct Task<'a> {
    op: &'a Attention,
    /// The first row of the sequence.
    start: usize,
    /// Counted within the sequence. They see the positions before `queries.end`.
    queries: Range<usize>,
    kv_head: usize,
}

impl Task<'_> {
    /// Positions that the last query sees.
    fn seen(&self) -> usize {
        self.queries.end
    }

    /// Query heads of this task's KV head.
    fn query_heads(&self) -> Range<usize> {
        let group = self.op.heads / self.op.kv_heads;
        self.kv_head * group..(self.kv_head + 1) * group
    }

    /// A head's rows, counted within the sequence, in `[rows, heads * head_dim]`.
    fn head<'v>(&self, values: &'v [f32], rows: Range<usize>, heads: usize, head: usize) -> Mat<'v> {
        let (stride, dim) = (heads * self.op.head_dim, self.op.head_dim);
        Mat::new(&values[(self.start + rows.start) * stride + head * dim..], rows.len(), dim, stride)
    }

    fn query<'v>(&self, values: &'v [f32], head: usize) -> Mat<'v> {
        self.head(values, self.queries.clone(), self.op.heads, head)
    }

    fn key<'v>(&self, values: &'v [f32]) -> Mat<'v> {
        self.head(values, 0..self.seen(), self.op.kv_heads, self.kv_head)
    }

    /// softmax(q K^T / sqrt(head_dim)) under the causal mask, `[queries, seen]`.
    fn probabilities(&self, q: Mat<'_>, k: Mat<'_>) -> Vec<f32> {
        let seen = self.seen();
        let mut p = vec![0.0; self.queries.len() * seen];
        mul_nt(Out { data: &mut p, stride: seen, accumulate: false }, q, k, false);
        let scale = 1.0 / (self.op.head_dim as f32).sqrt();
        for (query, row) in self.queries.clone().zip(p.chunks_exact_mut(seen)) {
            let (seen, unseen) = row.split_at_mut(query + 1);
            cpu::softmax(seen, scale);
            unseen.fill(0.0);
        }
        p
    }

    /// One query head's answers, `[queries, head_dim]`.
    fn forward(&self, q: Mat<'_>, k: Mat<'_>, v: Mat<'_>) -> Vec<f32> {
        let dim = self.op.head_dim;
        let mut out = vec![0.0; self.queries.len() * dim];
        let p = self.probabilities(q, k);
        mul(Out { data: &mut out, stride: dim, accumulate: false }, Mat::dense(&p, self.seen()), v, false);
        out
    }

    /// The gradient of one query head, `[queries, head_dim]`; those of K and V, `[seen, head_dim]`, are added.
    fn backward(&self, q: Mat<'_>, k: Mat<'_>, v: Mat<'_>, d: Mat<'_>, dk: &mut [f32], dv: &mut [f32]) -> Vec<f32> {
        let (seen, dim) = (self.seen(), self.op.head_dim);
        let p = self.probabilities(q, k);
        mul_tn(Out { data: dv, stride: dim, accumulate: true }, Mat::dense(&p, seen), d, false);
        let mut ds = vec![0.0; p.len()];
        mul_nt(Out { data: &mut ds, stride: seen, accumulate: false }, d, v, false);
        let scale = 1.0 / (dim as f32).sqrt();
        for (ds, p) in ds.chunks_exact_mut(seen).zip(p.chunks_exact(seen)) {
            cpu::softmax_backward(p, ds, scale);
        }
        let mut dq = vec![0.0; self.queries.len() * dim];
        mul(Out { data: &mut dq, stride: dim, accumulate: false }, Mat::dense(&ds, seen), k, false);
        mul_tn(Out { data: dk, stride: dim, accumulate: true }, Mat::dense(&ds, seen), q, false);
        dq
    }

    /// Adds a head's rows, counted within the sequence, in their places in `[rows, heads * head_dim]`.
    fn add(&self, part: &[f32], rows: Range<usize>, values: &mut [f32], heads: usize, head: usize) {
        let dim = self.op.head_dim;
        for (row, part) in rows.zip(part.chunks_exact(dim)) {
            let at = ((self.start + row) * heads + head) * dim;
            values[at..at + dim].iter_mut().zip(part).for_each(|(value, part)| *value += part);
        }
    }

    fn add_queries(&self, parts: &[Vec<f32>], values: &mut [f32]) {
        for (head, part) in self.query_heads().zip(parts) {
            self.add(part, self.queries.clone(), values, self.op.heads, head);
        }
    }

    fn add_keys(&self, part: &[f32], values: &mut [f32]) {
        self.add(part, 0..self.seen(), values, self.op.kv_heads, self.kv_head);
    }
}

/// Gradients of a task: of each query head, of K, of V.
type TaskGradients = (Vec<Vec<f32>>, Vec<f32>, Vec<f32>);

impl Attention {
    fn tasks(&self) -> Vec<Task<'_>> {
        let of_sequence = |rows: &Range<usize>| {
            // The backward has five products.
            let macs_a_query = 5 * self.heads / self.kv_heads * rows.len() * self.head_dim;
            let most = (PIECE_MACS / 4 / macs_a_query.max(1)).max(1);
            let (start, len) = (rows.start, rows.len());
            let of_head = move |kv_head| {
                (0..len).step_by(most).map(move |first| Task {
                    op: self,
                    start,
                    queries: first..len.min(first + most),
                    kv_head,
                })
            };
            (0..self.kv_heads).flat_map(of_head)
        };
        self.sequences.iter().flat_map(of_sequence).collect()
    }

    /// Runs the tasks, about [`PIECE_MACS`] at a time, and takes their results in order.
    fn run<R: Send>(&self, work: impl Fn(&Task<'_>) -> R + Sync, mut take: impl FnMut(&Task<'_>, R)) {
        let macs = |task: &Task<'_>| 5 * task.query_heads().len() * task.queries.len() * task.seen() * self.head_dim;
        let tasks = self.tasks();
        let mut rest = &tasks[..];
        while !rest.is_empty() {
            let mut left = PIECE_MACS as isize;
            let mut fits = |task: &Task<'_>| {
                let fits = left > 0;
                left -= macs(task) as isize;
                fits
            };
            let piece = rest.iter().position(|task| !fits(task)).unwrap_or(rest.len());
            let (now, later) = rest.split_at(piece);
            let results: Vec<R> = now.par_iter().map(&work).collect();
            now.iter().zip(results).for_each(|(task, result)| take(task, result));
            rest = later;
            self.compute.yield_to_serving();
        }
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
        let mut y = vec![0.0; q.len()];
        let work = |task: &Task<'_>| -> Vec<Vec<f32>> {
            let head = |head| task.forward(task.query(q, head), task.key(k), task.key(v));
            task.query_heads().map(head).collect()
        };
        self.run(work, |task, parts| task.add_queries(&parts, &mut y));
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
        let work = |task: &Task<'_>| -> TaskGradients {
            let mut dk = vec![0.0; task.seen() * self.head_dim];
            let mut dv = dk.clone();
            let head = |head| {
                let (q, d) = (task.query(&qs, head), task.query(&d, head));
                task.backward(q, task.key(&ks), task.key(&vs), d, &mut dk, &mut dv)
            };
            (task.query_heads().map(head).collect(), dk, dv)
        };
        let (mut dq, mut dk, mut dv) = (vec![0.0; qs.len()], vec![0.0; ks.len()], vec![0.0; vs.len()]);
        self.run(work, |task, (part_q, part_k, part_v)| {
            task.add_queries(&part_q, &mut dq);
            task.add_keys(&part_k, &mut dk);
            task.add_keys(&part_v, &mut dv);
        });
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device()).map(Some);
        Ok((tensor(dq, q)?, tensor(dk, k)?, tensor(dv, v)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{D, Device, Var};

    /// The same by candle's operations: a head at a time.
    fn by_candle(q: &Tensor, k: &Tensor, v: &Tensor, rows: &Range<usize>, dim: usize) -> Result<Tensor> {
        let n = rows.len();
        let mask = (0..n).flat_map(|i| (0..n).map(move |j| if j > i { f32::NEG_INFINITY } else { 0.0 })).collect();
        let mask = Tensor::from_vec(mask, (n, n), &Device::Cpu)?;
        let (heads, kv_heads) = (q.dims()[1] / dim, k.dims()[1] / dim);
        let of_head = |x: &Tensor, head: usize| x.narrow(0, rows.start, n)?.narrow(1, head * dim, dim)?.contiguous();
        let head = |head: usize| {
            let kv_head = head / (heads / kv_heads);
            let scores = (of_head(q, head)?.matmul(&of_head(k, kv_head)?.t()?)? / (dim as f64).sqrt())?;
            let p = (scores + &mask)?.exp()?;
            p.broadcast_div(&p.sum_keepdim(D::Minus1)?)?.matmul(&of_head(v, kv_head)?)
        };
        Tensor::cat(&(0..heads).map(head).collect::<Result<Vec<_>>>()?, 1)
    }

    /// Two sequences, one so long that its queries are cut into several tasks.
    #[test]
    fn attention_and_its_gradients_are_those_of_the_plain_form() {
        let (dim, sequences) = (8, vec![0..2000, 2000..2007]);
        let op = Attention {
            heads: 2,
            kv_heads: 1,
            head_dim: dim,
            sequences: Arc::new(sequences.clone()),
            compute: YieldPoint::default(),
        };
        assert!(op.tasks().len() > sequences.len());
        let sinusoid = |width: usize, step: f32| {
            let values: Vec<f32> = (0..2007 * width).map(|i| (i as f32 * step).sin()).collect();
            Var::from_vec(values, (2007, width), &Device::Cpu).unwrap()
        };
        let (q, k, v) = (sinusoid(2 * dim, 0.37), sinusoid(dim, 0.61), sinusoid(dim, 1.3));
        let weights = sinusoid(2 * dim, 0.11);
        let ours = q.apply_op3(&k, &v, op).unwrap();
        let parts: Vec<_> = sequences.iter().map(|rows| by_candle(&q, &k, &v, rows, dim).unwrap()).collect();
        let plain = Tensor::cat(&parts, 0).unwrap();
        let close = |a: &Tensor, b: &Tensor| {
            let difference = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(difference < 2e-4, "{difference}");
        };
        close(&ours, &plain);
        let gradients = |y: &Tensor| (y * weights.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
        let (ours, plain) = (gradients(&ours), gradients(&plain));
        for var in [&q, &k, &v] {
            close(ours.get(var).unwrap(), plain.get(var).unwrap());
        }
    }
}
