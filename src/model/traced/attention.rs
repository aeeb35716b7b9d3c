//! Attention of whole sequences, forward and backward, and what its queries and keys go through before: norms of heads, rotations,
//! factors of positions. The backward computes the probabilities again. Between pieces of work, training gives way to serving.

use std::ops::Range;

use rayon::prelude::*;

use super::buffers::Buffer;
use super::{Batch, PIECE_MACS, PassSize, Scope};
use crate::adapter::Adapter;
use crate::arch::config::{AttentionConfig, Temperature};
use crate::arch::decoder::{Attend, NormId};
use crate::kernels::cpu;
use crate::kernels::gemm::{Mat, Out, mul, mul_nt, mul_tn};
use crate::kernels::spec::AttentionSpec;

/// What the heads of q or of k go through.
#[derive(Debug, Clone, Copy)]
struct Preparation {
    norm: Option<NormId>,
    /// Which of the base's rotations.
    rope: Option<usize>,
    /// Of queries alone.
    temperature: Option<Temperature>,
}

impl Preparation {
    fn of_queries(attend: &Attend) -> Self {
        Self { norm: attend.norms.map(|[q, _]| q), rope: attend.rope, temperature: attend.temperature }
    }

    fn of_keys(attend: &Attend) -> Self {
        Self { norm: attend.norms.map(|[_, k]| k), rope: attend.rope, temperature: None }
    }
}

impl Scope<'_> {
    /// Computes attention's answers, `[rows, heads * head_dim]`, from q of that size, and k and v `[rows, kv_heads * head_dim]`, all as they
    /// are projected.
    pub(super) fn attend(&self, batch: &Batch, attend: &Attend, [q, k, v]: [&[f32]; 3]) -> Buffer {
        let q = self.prepared(batch, q, Preparation::of_queries(attend));
        let mut k = self.keys(batch, attend, k);
        let own = self.with_prefix(batch, attend.layer, &mut k, v);
        let mut y = self.zeros(q.len());
        Attention::new(self, batch, attend).forward([&q, &k, own.as_deref().unwrap_or(v)], &mut y);
        y
    }

    /// The keys as queries meet them, from what is projected.
    pub(super) fn keys(&self, batch: &Batch, attend: &Attend, k: &[f32]) -> Buffer {
        self.prepared(batch, k, Preparation::of_keys(attend))
    }

    /// Computes the gradients of q, k and v, as they are projected, from that of the answers; that of a prefix is added to `d_prefix`, and
    /// those of the norms of heads that are trained to `gradients`.
    pub(super) fn attend_backward(
        &self,
        batch: &Batch,
        attend: &Attend,
        [q, k, v]: [&[f32]; 3],
        dy: &[f32],
        d_prefix: &mut [f32],
        gradients: &mut Adapter,
    ) -> [Buffer; 3] {
        let (of_q, of_k) = (Preparation::of_queries(attend), Preparation::of_keys(attend));
        let (turned_q, mut turned_k) = (self.prepared(batch, q, of_q), self.prepared(batch, k, of_k));
        let own = self.with_prefix(batch, attend.layer, &mut turned_k, v);
        let [mut dq, mut dk, mut dv] = [q, k, v].map(|values| self.zeros(values.len()));
        let qkv = [&turned_q, &turned_k, own.as_deref().unwrap_or(v)];
        Attention::new(self, batch, attend).backward(qkv, dy, [&mut dq, &mut dk, &mut dv]);
        drop((turned_q, turned_k));
        if own.is_some() {
            self.prefix_backward(batch, attend.layer, [&mut dk, &mut dv], d_prefix);
        }
        let dq = self.prepare_backward(batch, q, dq, of_q, gradients);
        [dq, self.prepare_backward(batch, k, dk, of_k, gradients), dv]
    }

    /// Norms, rotates and scales heads, `[rows, heads * head_dim]`.
    fn prepared(&self, batch: &Batch, x: &[f32], by: Preparation) -> Buffer {
        let (mut y, head_dim) = (self.take(x.len()), self.model.config().attention.head_dim);
        let width = x.len() / batch.len();
        match by.norm {
            Some(norm) => cpu::rms_norm(x, self.norm(norm), self.model.config().norm_eps, &mut y),
            None => y.copy_from_slice(x),
        }
        if let Some(table) = by.rope.map(|rope| &self.model.ropes[rope]) {
            cpu::rope(&mut y, width, head_dim, |row| table.at(batch.positions[row]));
        }
        scale(batch, &mut y, by.temperature);
        y
    }

    /// The gradient of what [`Scope::prepared`] has made of x becomes that of x.
    fn prepare_backward(
        &self,
        batch: &Batch,
        x: &[f32],
        mut d: Buffer,
        by: Preparation,
        gradients: &mut Adapter,
    ) -> Buffer {
        let (width, head_dim) = (x.len() / batch.len(), self.model.config().attention.head_dim);
        scale(batch, &mut d, by.temperature);
        if let Some(table) = by.rope.map(|rope| &self.model.ropes[rope]) {
            cpu::rope_backward(&mut d, width, head_dim, |row| table.at(batch.positions[row]));
        }
        let Some(norm) = by.norm else { return d };
        let mut dx = self.zeros(x.len());
        self.norm_backward(x, norm, &d, &mut dx, gradients);
        dx
    }
}

/// Multiplies each row by the factor of its position.
fn scale(batch: &Batch, x: &mut [f32], temperature: Option<Temperature>) {
    let Some(by) = temperature else { return };
    let width = x.len() / batch.len();
    for (row, position) in x.chunks_exact_mut(width).zip(&batch.positions) {
        let factor = by.at(*position);
        row.iter_mut().for_each(|x| *x *= factor);
    }
}

/// Causal grouped-query attention within each sequence. q: `[rows, heads * head_dim]`, k and v: `[rows, kv_heads * head_dim]`.
pub(super) struct Attention<'a> {
    spec: AttentionSpec,
    kv_heads: usize,
    head_dim: usize,
    /// The rows of each sequence.
    sequences: &'a [Range<usize>],
    scope: &'a Scope<'a>,
}

/// Some queries of a sequence, and a KV head: a part of [`PIECE_MACS`].
struct Task<'a> {
    op: &'a Attention<'a>,
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
    fn probabilities(&self, q: Mat<'_>, k: Mat<'_>) -> (Buffer, Option<Buffer>) {
        let (seen, AttentionSpec { mut scale, softcap, .. }) = (self.seen(), self.op.spec);
        let scope = self.op.scope;
        let mut p = scope.take(self.queries.len() * seen.len());
        mul_nt(Out { data: &mut p, stride: seen.len(), accumulate: false }, q, k, false);
        let capped = softcap.map(|cap| {
            p.iter_mut().for_each(|x| *x *= scale);
            cpu::softcap(&mut p, cap);
            scale = 1.0;
            scope.copied(&p)
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
    fn forward(&self, q: Mat<'_>, k: Mat<'_>, v: Mat<'_>) -> Buffer {
        let dim = self.op.head_dim;
        let mut out = self.op.scope.take(self.queries.len() * dim);
        let (p, _) = self.probabilities(q, k);
        mul(Out { data: &mut out, stride: dim, accumulate: false }, Mat::dense(&p, self.seen().len()), v, false);
        out
    }

    /// The gradient of one query head, `[queries, head_dim]`; those of K and V, `[seen, head_dim]`, are added.
    fn backward(&self, q: Mat<'_>, k: Mat<'_>, v: Mat<'_>, d: Mat<'_>, dk: &mut [f32], dv: &mut [f32]) -> Buffer {
        let (seen, dim) = (self.seen().len(), self.op.head_dim);
        let (p, capped) = self.probabilities(q, k);
        mul_tn(Out { data: dv, stride: dim, accumulate: true }, Mat::dense(&p, seen), d, false);
        let mut ds = self.op.scope.take(p.len());
        mul_nt(Out { data: &mut ds, stride: seen, accumulate: false }, d, v, false);
        for (ds, p) in ds.chunks_exact_mut(seen).zip(p.chunks_exact(seen)) {
            cpu::softmax_backward(p, ds, self.op.spec.scale);
        }
        if let (Some(capped), Some(cap)) = (capped, self.op.spec.softcap) {
            cpu::softcap_backward(&capped, &mut ds, cap);
        }
        let mut dq = self.op.scope.take(self.queries.len() * dim);
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

    fn add_queries(&self, parts: &[Buffer], values: &mut [f32]) {
        for (head, part) in self.query_heads().zip(parts) {
            self.add(part, self.queries.clone(), values, self.op.spec.heads, head);
        }
    }

    fn add_keys(&self, part: &[f32], values: &mut [f32]) {
        self.add(part, self.seen(), values, self.op.kv_heads, self.kv_head);
    }
}

/// Gradients of a task: of each query head, of K, of V.
type TaskGradients = (Vec<Buffer>, Buffer, Buffer);

/// Values that attention takes beside what goes in and what comes out.
pub(super) struct Transients {
    pub forward: usize,
    pub backward: usize,
}

/// Multiply-adds of a task: the backward has five products.
fn macs(heads: usize, queries: usize, seen: usize, head_dim: usize) -> usize {
    5 * heads * queries * seen * head_dim
}

/// Fewest queries of a task in a long sequence: products of fewer rows are half as fast, and each task has gradients of all keys and values.
const MIN_QUERIES: usize = 32;

/// Queries of a task in a sequence of so many ids.
fn queries_of_a_task(heads: usize, len: usize, head_dim: usize) -> usize {
    (PIECE_MACS / 4 / macs(heads, 1, len, head_dim).max(1)).max(MIN_QUERIES)
}

impl Attention<'_> {
    /// Returns what a pass takes at the most, which is at the end of its longest sequence.
    pub(super) fn transients(spec: AttentionSpec, config: AttentionConfig, size: PassSize) -> Transients {
        let (group, head_dim, longest) = (spec.heads / config.kv_heads, config.head_dim, size.longest.max(1));
        let most = queries_of_a_task(group, longest, head_dim);
        let queries = most.min(longest);
        let seen = longest - spec.first_seen(longest - queries);
        let all = config.kv_heads * longest.div_ceil(most) * size.tokens.div_ceil(longest);
        let at_once = all.min(PIECE_MACS / macs(group, queries, seen, head_dim) + 1);
        let scores = all.min(rayon::current_num_threads()) * queries * seen;
        let capped = usize::from(spec.softcap.is_some());
        let of_queries = at_once * group * queries * head_dim;
        Transients {
            forward: of_queries + (1 + capped) * scores,
            backward: of_queries + at_once * 2 * seen * head_dim + (2 + capped) * scores,
        }
    }
}

impl<'a> Attention<'a> {
    fn new(scope: &'a Scope<'a>, batch: &'a Batch, attend: &Attend) -> Self {
        let AttentionConfig { kv_heads, head_dim, .. } = scope.model.config().attention;
        Self { spec: attend.spec, kv_heads, head_dim, sequences: &batch.sequences, scope }
    }

    fn tasks(&self) -> Vec<Task<'_>> {
        let of_sequence = |rows: &Range<usize>| {
            let most = queries_of_a_task(self.spec.heads / self.kv_heads, rows.len(), self.head_dim);
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
            |task: &Task<'_>| macs(task.query_heads().len(), task.queries.len(), task.seen().len(), self.head_dim);
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
            self.scope.yield_to_serving();
        }
    }

    /// Adds each query's answer to `y`.
    fn forward(&self, [q, k, v]: [&[f32]; 3], y: &mut [f32]) {
        let work = |task: &Task<'_>| -> Vec<Buffer> {
            let head = |head| task.forward(task.query(q, head), task.key(k), task.key(v));
            task.query_heads().map(head).collect()
        };
        self.run(work, |task, parts| task.add_queries(&parts, y));
    }

    /// Adds the gradients of q, k and v to the last three, from that of the answers.
    fn backward(&self, [q, k, v]: [&[f32]; 3], d: &[f32], [dq, dk, dv]: [&mut [f32]; 3]) {
        let work = |task: &Task<'_>| -> TaskGradients {
            let [mut dk, mut dv] = [0; 2].map(|_| self.scope.zeros(task.seen().len() * self.head_dim));
            let head = |head| {
                let (q, d) = (task.query(q, head), task.query(d, head));
                task.backward(q, task.key(k), task.key(v), d, &mut dk, &mut dv)
            };
            (task.query_heads().map(head).collect(), dk, dv)
        };
        self.run(work, |task, (part_q, part_k, part_v)| {
            task.add_queries(&part_q, dq);
            task.add_keys(&part_k, dk);
            task.add_keys(&part_v, dv);
        });
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{D, Device, Result, Tensor};

    use super::*;
    use crate::model::Model;
    use crate::model::traced::testing::{assert_close, gradients, sinusoid, tensor, values};
    use crate::model::traced::{ForwardOptions, Workspace};

    /// The same by candle's operations: a head at a time.
    fn by_candle(q: &Tensor, k: &Tensor, v: &Tensor, rows: &Range<usize>, op: &Attention<'_>) -> Result<Tensor> {
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

    /// Two sequences, one so long that its queries are cut into several tasks; with and without a cap and a window.
    #[test]
    fn attention_and_its_gradients_are_those_of_the_plain_form() {
        let (model, workspace) = (Model::tiny(1).0, Workspace::default());
        let scope = Scope::new(&model, &workspace, ForwardOptions::default());
        let (dim, sequences) = (8, vec![0..2000, 2000..2007]);
        let plain = AttentionSpec::causal(2, dim);
        let capped = AttentionSpec { scale: 0.6, softcap: Some(1.5), window: Some(300), ..plain };
        for spec in [plain, AttentionSpec { window: Some(5), ..plain }, capped] {
            let op = Attention { spec, kv_heads: 1, head_dim: dim, sequences: &sequences, scope: &scope };
            assert!(op.tasks().len() > sequences.len());
            let vars = [sinusoid(2007, 2 * dim, 0.37), sinusoid(2007, dim, 0.61), sinusoid(2007, dim, 1.3)];
            let [q, k, v] = vars.each_ref().map(|var| values(var));
            let mut y = vec![0.0; q.len()];
            op.forward([&q, &k, &v], &mut y);
            let [var_q, var_k, var_v] = vars.each_ref();
            let parts: Vec<_> =
                sequences.iter().map(|rows| by_candle(var_q, var_k, var_v, rows, &op).unwrap()).collect();
            let plain = Tensor::cat(&parts, 0).unwrap();
            assert_close(&y, &plain);
            let d = values(&sinusoid(2007, 2 * dim, 0.11));
            let [mut dq, mut dk, mut dv] = [&q, &k, &v].map(|values| vec![0.0; values.len()]);
            op.backward([&q, &k, &v], &d, [&mut dq, &mut dk, &mut dv]);
            for (ours, plain) in [dq, dk, dv].iter().zip(gradients(&plain, &d, &vars)) {
                assert_close(ours, &plain);
            }
        }
    }

    /// Heads wider than what turns, normed and with a factor for each row.
    #[test]
    fn what_heads_go_through_and_its_gradient_are_those_of_the_plain_form() {
        let (model, workspace) = (Model::tiny(1).0, Workspace::default());
        let scope = Scope::new(&model, &workspace, ForwardOptions::default());
        let head_dim = model.config().attention.head_dim;
        let half = model.ropes[0].half();
        let sequence: Vec<u32> = (0..30).collect();
        let mut batch = Batch::of_rows(&scope, &[&sequence], &[]).unwrap();
        batch.positions.iter_mut().for_each(|position| *position *= 7);
        let temperature = Temperature { beta: 0.4, original_context: 16 };
        let by = Preparation { norm: None, rope: Some(0), temperature: Some(temperature) };
        let x = sinusoid(30, 2 * head_dim, 0.37);
        let table = |part: usize| {
            let row = |position: &usize| [model.ropes[0].at(*position).0, model.ropes[0].at(*position).1][part];
            tensor(&batch.positions.iter().flat_map(row).copied().collect::<Vec<_>>(), (30, half))
                .reshape((30, 1, half))
                .unwrap()
        };
        let plain = || -> Result<Tensor> {
            let heads = x.reshape((30, 2, head_dim))?;
            let (low, high) = (heads.narrow(2, 0, half)?, heads.narrow(2, half, half)?);
            let (cos, sin) = (table(0), table(1));
            let turned_low = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
            let turned_high = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
            let turned = Tensor::cat(&[turned_low, turned_high], 2)?.reshape((30, 2 * head_dim))?;
            let factors: Vec<f32> = batch.positions.iter().map(|position| temperature.at(*position)).collect();
            turned.broadcast_mul(&Tensor::from_vec(factors, (30, 1), &Device::Cpu)?)
        };
        let plain = plain().unwrap();
        assert_close(&scope.prepared(&batch, &values(&x), by), &plain);
        let d = values(&sinusoid(30, 2 * head_dim, 0.11));
        let mut gradient = scope.take(d.len());
        gradient.copy_from_slice(&d);
        let mut none = Adapter::lora(Default::default(), []);
        let ours = scope.prepare_backward(&batch, &values(&x), gradient, by, &mut none);
        assert_close(&ours, &gradients(&plain, &d, &[x])[0]);
    }
}
