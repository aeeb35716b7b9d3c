//! The architecture's other operations under autograd, on float32 slices: norm, rotary embedding, gated activation, attention.
//! One node each, so that the backward keeps little and recomputes the rest. Between pieces of work, training gives way to serving.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Storage, Tensor};
use rayon::prelude::*;

use super::Model;
use super::rope::RopeTable;
use crate::arch::decoder::NormId;
use crate::device::YieldPoint;
use crate::kernels::cpu;
use crate::kernels::gemm::{Mat, Out, mul, mul_nt, mul_tn};
use crate::kernels::spec::{Activation, AttentionSpec};

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

/// Rotates the first values of each head by its row's position's angles, and multiplies each row by a factor of its own, if there are
/// any. x: `[rows, heads * head_dim]`.
pub(super) struct Rope {
    pub model: Arc<Model>,
    /// Which of the base's rotations; `None` where nothing turns.
    pub rope: Option<usize>,
    pub head_dim: usize,
    pub positions: Arc<Vec<usize>>,
    pub factors: Option<Arc<Vec<f32>>>,
}

impl Rope {
    fn table(&self) -> Option<&RopeTable> {
        Some(&self.model.ropes[self.rope?])
    }

    fn scale(&self, x: &mut [f32], width: usize) {
        for (row, factor) in x.chunks_exact_mut(width).zip(self.factors.iter().flat_map(|factors| factors.iter())) {
            row.iter_mut().for_each(|x| *x *= factor);
        }
    }
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (mut y, width) = (slice(x, layout)?.to_vec(), layout.dims()[1]);
        if let Some(table) = self.table() {
            cpu::rope(&mut y, width, self.head_dim, |row| table.at(self.positions[row]));
        }
        self.scale(&mut y, width);
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (mut d, width) = (to_vec(dy)?, x.dims()[1]);
        if let Some(table) = self.table() {
            cpu::rope_backward(&mut d, width, self.head_dim, |row| table.at(self.positions[row]));
        }
        self.scale(&mut d, width);
        Tensor::from_vec(d, x.shape(), x.device()).map(Some)
    }
}

/// activation(gate) * up.
pub(super) struct Gated(pub Activation);

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(&self, gate: &CpuStorage, l1: &Layout, up: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut y = slice(gate, l1)?.to_vec();
        cpu::gated(self.0, &mut y, slice(up, l2)?);
        Ok((CpuStorage::F32(y), l1.shape().clone()))
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (mut g, mut u, d) = (to_vec(gate)?, to_vec(up)?, to_vec(dy)?);
        cpu::gated_backward(self.0, &mut g, &mut u, &d);
        let tensor = |values| Tensor::from_vec(values, gate.shape(), gate.device()).map(Some);
        Ok((tensor(g)?, tensor(u)?))
    }
}

/// Causal grouped-query attention within each sequence. q: `[rows, heads * head_dim]`, k and v: `[rows, kv_heads * head_dim]`.
/// The backward recomputes the probabilities.
pub(super) struct Attention {
    pub spec: AttentionSpec,
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
    /// Counted within the sequence. They see nothing from `queries.end` on.
    queries: Range<usize>,
    kv_head: usize,
}

impl Task<'_> {
    /// The positions that some query sees.
    fn seen(&self) -> Range<usize> {
        self.op.spec.first_seen(self.queries.start)..self.queries.end
    }

    /// Query heads of this task's KV head.
    fn query_heads(&self) -> Range<usize> {
        let group = self.op.spec.heads / self.op.kv_heads;
        self.kv_head * group..(self.kv_head + 1) * group
    }

    /// A head's rows, counted within the sequence, in `[rows, heads * head_dim]`.
    fn head<'v>(&self, values: &'v [f32], rows: Range<usize>, heads: usize, head: usize) -> Mat<'v> {
        let (stride, dim) = (heads * self.op.head_dim, self.op.head_dim);
        Mat::new(&values[(self.start + rows.start) * stride + head * dim..], rows.len(), dim, stride)
    }

    fn query<'v>(&self, values: &'v [f32], head: usize) -> Mat<'v> {
        self.head(values, self.queries.clone(), self.op.spec.heads, head)
    }

    fn key<'v>(&self, values: &'v [f32]) -> Mat<'v> {
        self.head(values, self.seen(), self.op.kv_heads, self.kv_head)
    }

    /// softmax(scores) under the causal mask and the window, `[queries, seen]`; and the capped scores, where there is a cap.
    fn probabilities(&self, q: Mat<'_>, k: Mat<'_>) -> (Vec<f32>, Option<Vec<f32>>) {
        let (seen, AttentionSpec { mut scale, softcap, .. }) = (self.seen(), self.op.spec);
        let mut p = vec![0.0; self.queries.len() * seen.len()];
        mul_nt(Out { data: &mut p, stride: seen.len(), accumulate: false }, q, k, false);
        let capped = softcap.map(|cap| {
            p.iter_mut().for_each(|x| *x *= scale);
            cpu::softcap(&mut p, cap);
            scale = 1.0;
            p.clone()
        });
        for (query, row) in self.queries.clone().zip(p.chunks_exact_mut(seen.len())) {
            let (row, after) = row.split_at_mut(query + 1 - seen.start);
            let (before, row) = row.split_at_mut(self.op.spec.first_seen(query) - seen.start);
            cpu::softmax(row, scale);
            [before, after].into_iter().for_each(|unseen| unseen.fill(0.0));
        }
        (p, capped)
    }

    /// One query head's answers, `[queries, head_dim]`.
    fn forward(&self, q: Mat<'_>, k: Mat<'_>, v: Mat<'_>) -> Vec<f32> {
        let dim = self.op.head_dim;
        let mut out = vec![0.0; self.queries.len() * dim];
        let (p, _) = self.probabilities(q, k);
        mul(Out { data: &mut out, stride: dim, accumulate: false }, Mat::dense(&p, self.seen().len()), v, false);
        out
    }

    /// The gradient of one query head, `[queries, head_dim]`; those of K and V, `[seen, head_dim]`, are added.
    fn backward(&self, q: Mat<'_>, k: Mat<'_>, v: Mat<'_>, d: Mat<'_>, dk: &mut [f32], dv: &mut [f32]) -> Vec<f32> {
        let (seen, dim) = (self.seen().len(), self.op.head_dim);
        let (p, capped) = self.probabilities(q, k);
        mul_tn(Out { data: dv, stride: dim, accumulate: true }, Mat::dense(&p, seen), d, false);
        let mut ds = vec![0.0; p.len()];
        mul_nt(Out { data: &mut ds, stride: seen, accumulate: false }, d, v, false);
        for (ds, p) in ds.chunks_exact_mut(seen).zip(p.chunks_exact(seen)) {
            cpu::softmax_backward(p, ds, self.op.spec.scale);
        }
        if let (Some(capped), Some(cap)) = (capped, self.op.spec.softcap) {
            cpu::softcap_backward(&capped, &mut ds, cap);
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
            self.add(part, self.queries.clone(), values, self.op.spec.heads, head);
        }
    }

    fn add_keys(&self, part: &[f32], values: &mut [f32]) {
        self.add(part, self.seen(), values, self.op.kv_heads, self.kv_head);
    }
}

/// Gradients of a task: of each query head, of K, of V.
type TaskGradients = (Vec<Vec<f32>>, Vec<f32>, Vec<f32>);

impl Attention {
    fn tasks(&self) -> Vec<Task<'_>> {
        let of_sequence = |rows: &Range<usize>| {
            // The backward has five products.
            let macs_a_query = 5 * self.spec.heads / self.kv_heads * rows.len() * self.head_dim;
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
        let macs =
            |task: &Task<'_>| 5 * task.query_heads().len() * task.queries.len() * task.seen().len() * self.head_dim;
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
            let mut dk = vec![0.0; task.seen().len() * self.head_dim];
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
    fn by_candle(q: &Tensor, k: &Tensor, v: &Tensor, rows: &Range<usize>, op: &Attention) -> Result<Tensor> {
        let (n, dim, spec) = (rows.len(), op.head_dim, op.spec);
        let sees = |i: usize, j: usize| j <= i && spec.window.is_none_or(|window| j + window > i);
        let mask = (0..n).flat_map(|i| (0..n).map(move |j| if sees(i, j) { 0.0 } else { f32::NEG_INFINITY })).collect();
        let mask = Tensor::from_vec(mask, (n, n), &Device::Cpu)?;
        let of_head = |x: &Tensor, head: usize| x.narrow(0, rows.start, n)?.narrow(1, head * dim, dim)?.contiguous();
        let head = |head: usize| {
            let kv_head = head / (spec.heads / op.kv_heads);
            let scores = (of_head(q, head)?.matmul(&of_head(k, kv_head)?.t()?)? * f64::from(spec.scale))?;
            let scores = match spec.softcap.map(f64::from) {
                Some(cap) => ((scores / cap)?.tanh()? * cap)?,
                None => scores,
            };
            let p = (scores + &mask)?.exp()?;
            p.broadcast_div(&p.sum_keepdim(D::Minus1)?)?.matmul(&of_head(v, kv_head)?)
        };
        Tensor::cat(&(0..spec.heads).map(head).collect::<Result<Vec<_>>>()?, 1)
    }

    fn sinusoid(rows: usize, width: usize, step: f32) -> Var {
        let values: Vec<f32> = (0..rows * width).map(|i| (i as f32 * step).sin()).collect();
        Var::from_vec(values, (rows, width), &Device::Cpu).unwrap()
    }

    fn assert_close(a: &Tensor, b: &Tensor) {
        let difference = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(difference < 2e-4, "{difference}");
    }

    /// The same values, and the same gradients to every variable.
    fn assert_same(ours: &Tensor, plain: &Tensor, vars: &[&Var]) {
        assert_close(ours, plain);
        let (rows, width) = ours.dims2().unwrap();
        let weights = sinusoid(rows, width, 0.11);
        let gradients = |y: &Tensor| (y * weights.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
        let (ours, plain) = (gradients(ours), gradients(plain));
        for var in vars {
            assert_close(ours.get(var).unwrap(), plain.get(var).unwrap());
        }
    }

    /// Two sequences, one so long that its queries are cut into several tasks; with and without a cap and a window.
    #[test]
    fn attention_and_its_gradients_are_those_of_the_plain_form() {
        let (dim, sequences) = (8, vec![0..2000, 2000..2007]);
        let plain = AttentionSpec::causal(2, dim);
        let capped = AttentionSpec { scale: 0.6, softcap: Some(1.5), window: Some(300), ..plain };
        for spec in [plain, AttentionSpec { window: Some(5), ..plain }, capped] {
            let op = || Attention {
                spec,
                kv_heads: 1,
                head_dim: dim,
                sequences: Arc::new(sequences.clone()),
                compute: YieldPoint::default(),
            };
            assert!(op().tasks().len() > sequences.len());
            let (q, k, v) = (sinusoid(2007, 2 * dim, 0.37), sinusoid(2007, dim, 0.61), sinusoid(2007, dim, 1.3));
            let ours = q.apply_op3(&k, &v, op()).unwrap();
            let parts: Vec<_> = sequences.iter().map(|rows| by_candle(&q, &k, &v, rows, &op()).unwrap()).collect();
            assert_same(&ours, &Tensor::cat(&parts, 0).unwrap(), &[&q, &k, &v]);
        }
    }

    #[test]
    fn gates_and_their_gradients_are_those_of_the_plain_form() {
        let (gate, up) = (sinusoid(30, 64, 0.37), sinusoid(30, 64, 0.61));
        let wide = (gate.as_tensor() * 4.0).unwrap();
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let plain = match activation {
                Activation::Silu => wide.silu(),
                Activation::GeluTanh => wide.gelu(),
            };
            let plain = (plain.unwrap() * up.as_tensor()).unwrap();
            assert_same(&wide.apply_op2(&up, Gated(activation)).unwrap(), &plain, &[&gate, &up]);
        }
    }

    /// Heads wider than what turns, and a factor for each row.
    #[test]
    fn rotation_in_part_and_factors_and_their_gradients_are_those_of_the_plain_form() {
        let (model, _) = Model::tiny(1);
        let (half, head_dim) = (model.ropes[0].half(), 2 * model.ropes[0].half() + 8);
        let positions = Arc::new((0..30).map(|i| i * 7).collect::<Vec<_>>());
        let factors = Arc::new((0..30).map(|i| 0.5 + i as f32 * 0.1).collect::<Vec<_>>());
        let x = sinusoid(30, 2 * head_dim, 0.37);
        let table = |part: usize| {
            let row = |position: &usize| [model.ropes[0].at(*position).0, model.ropes[0].at(*position).1][part];
            Tensor::from_vec(positions.iter().flat_map(row).copied().collect(), (30, 1, half), &Device::Cpu).unwrap()
        };
        let plain = || -> Result<Tensor> {
            let heads = x.reshape((30, 2, head_dim))?;
            let (low, high) = (heads.narrow(2, 0, half)?, heads.narrow(2, half, half)?);
            let (cos, sin) = (table(0), table(1));
            let turned_low = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
            let turned_high = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
            let rest = heads.narrow(2, 2 * half, head_dim - 2 * half)?;
            let turned = Tensor::cat(&[turned_low, turned_high, rest], 2)?.reshape((30, 2 * head_dim))?;
            turned.broadcast_mul(&Tensor::from_vec(factors.to_vec(), (30, 1), &Device::Cpu)?)
        };
        let (model, positions, factors) = (model.clone(), positions.clone(), Some(factors.clone()));
        let ours = x.apply_op1(Rope { model, rope: Some(0), head_dim, positions, factors }).unwrap();
        assert_same(&ours, &plain().unwrap(), &[&x]);
    }
}
