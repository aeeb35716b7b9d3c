//! The decoder's steps, forward and backward. The forward hands on what steps hand on in [`crate::arch::decoder`]: the residual stream x, the
//! projections, and the input y of the next output layer; the backward takes the steps from the last to the first and hands on their gradients.

use std::ops::Range;
use std::sync::Arc;

use super::adapted::add_products;
use super::buffers::Buffer;
use super::head::Slopes;
use super::{Batch, Scope, TokenScores, add};
use crate::adapter::{Adapter, VirtualForm};
use crate::arch::decoder::{Merge, NormId, Part, Slot, Step, StepExecutor};
use crate::error::{Error, Result};
use crate::kernels::cpu;
use crate::model::batch::VIRTUAL_TOKEN;

/// What the backward needs of a step.
enum Saved {
    Nothing,
    /// The residual stream that is normed.
    Normed {
        x: Arc<Buffer>,
    },
    /// q, k and v as they are projected.
    Attend {
        qkv: [Buffer; 3],
    },
    Gate {
        gate: Buffer,
        up: Buffer,
    },
    /// The layer's input where its adapter needs it (behind a gate it is computed again), and what came out where that is normed.
    Output {
        y: Option<Buffer>,
        branch: Option<Buffer>,
    },
}

/// Computes the head's input of the selected rows, `[selected, hidden_size]`, and keeps nothing else.
pub(super) fn hidden(scope: &Scope<'_>, batch: &Batch) -> Result<Buffer> {
    let mut forward = Forward::new(scope, batch, None);
    forward.run(&scope.model.decoder().steps)?;
    forward.into_hidden()
}

/// Hands on the keys, as attention reads them, and the values of each layer, `[rows, kv_width]`.
pub(super) fn keys_and_values(
    scope: &Scope<'_>,
    batch: &Batch,
    mut take: impl FnMut(usize, &[f32], &[f32]),
) -> Result<()> {
    let mut forward = Forward::new(scope, batch, None);
    for step in &scope.model.decoder().steps {
        if let (Step::Attend(attend), [_, k, v]) = (step, &forward.projected[..]) {
            take(attend.layer, &scope.keys(batch, attend, k), v);
        }
        forward.take(step, &[])?;
    }
    Ok(())
}

/// A pass forward, whose gradients can be had.
pub struct Trace<'a> {
    scope: Scope<'a>,
    batch: Batch,
    segments: Vec<Segment>,
    scores: TokenScores,
    /// The head's input of the wanted rows, where a copy of the output matrix is trained, or rows of some tokens.
    hidden: Option<Buffer>,
    /// The gradient of each log-probability to the head's input of its row, `[selected, hidden_size]`.
    slopes: Buffer,
    /// That to the logits of the tokens that have rows of their own, `[selected, tokens]`.
    token_slopes: Buffer,
}

/// Some steps, and what is kept of them.
struct Segment {
    steps: Range<usize>,
    /// The residual stream before them.
    x: Option<Arc<Buffer>>,
    /// By step; `None` where they are taken again.
    saved: Option<Vec<Saved>>,
}

impl<'a> Trace<'a> {
    pub(super) fn new(scope: Scope<'a>, batch: Batch) -> Result<Self> {
        let steps = &scope.model.decoder().steps;
        let (segments, hidden) = forward(&scope, &batch, 0..steps.len(), None, scope.options.recompute_layers)?;
        let mut hidden = hidden.into_hidden()?;
        let mut slopes = scope.take(hidden.len());
        let tokens = scope.tokens_of(scope.model.head_slot()).map_or(0, |tokens| tokens.ids.len());
        let mut token_slopes = scope.take(batch.targets.len() * tokens);
        let of = Slopes { x: &mut slopes, tokens: &mut token_slopes };
        let scores = scope.score(&mut hidden, &batch.targets, Some(of));
        let is_trained = tokens > 0 || scope.copy_of(scope.model.head_slot()).is_some();
        let hidden = is_trained.then_some(hidden);
        Ok(Self { scope, batch, segments, scores, hidden, slopes, token_slopes })
    }

    /// Returns the wanted tokens' scores, in their order.
    pub fn scores(&self) -> &TokenScores {
        &self.scores
    }

    /// Adds to `gradients`, an adapter of the same shape, those of a loss whose derivatives by the log-probabilities are these, in their
    /// order.
    ///
    /// # Errors
    /// An internal one where the pass had no adapter.
    pub fn backward(self, derivatives: &[f32], gradients: &mut Adapter) -> Result<()> {
        let Self { scope, batch, segments, mut hidden, slopes: mut d, mut token_slopes, .. } = self;
        let head = scope.model.head_slot();
        if let (Some(x), Some(dw)) = (&mut hidden, gradients.copies.get_mut(&head)) {
            scope.head_backward(x, &batch.targets, derivatives, dw);
        }
        if let (Some(x), Some(gradient)) = (&hidden, gradients.tokens.get_mut(&head)) {
            scope.head_tokens_backward(x, &mut token_slopes, derivatives, gradient);
        }
        drop((hidden, token_slopes));
        let width = scope.model.config().hidden_size;
        for (row, derivative) in d.chunks_exact_mut(width).zip(derivatives) {
            row.iter_mut().for_each(|d| *d *= derivative);
        }
        let form = scope.virtual_tokens.as_ref().map(|(form, _)| *form);
        let trained = |step: &Step| match step {
            Step::Embed { .. } => {
                let is_trained = scope.copy_of(Slot::Embedding).is_some() || scope.tokens_of(Slot::Embedding).is_some();
                is_trained || form == Some(VirtualForm::Embeddings)
            }
            Step::Attend(_) => form == Some(VirtualForm::KeysAndValues),
            step => step.sites().any(|site| scope.trains(site)),
        };
        let first = scope.model.decoder().steps.iter().position(trained).ok_or_else(absent)?;
        let d_virtual = vec![0.0; scope.virtual_tokens.as_ref().map_or(0, |(_, values)| values.len())];
        let (dy, projected) = (None, Vec::new());
        let mut backward = Backward { scope: &scope, batch: &batch, first, dx: d, dy, projected, d_virtual, gradients };
        backward.segments(segments)?;
        let Backward { d_virtual, gradients, .. } = backward;
        let tokens = scope.options.adapter.and_then(|adapter| adapter.virtual_tokens.as_ref());
        if let (Some(tokens), Some(gradient)) = (tokens, &mut gradients.virtual_tokens) {
            tokens.backward(&d_virtual, gradient);
        }
        Ok(())
    }
}

/// Takes some steps forward from a residual stream, and keeps what the backward needs: of all, or where layers are recomputed of the last at most.
fn forward<'a>(
    scope: &'a Scope<'_>,
    batch: &'a Batch,
    steps: Range<usize>,
    x: Option<Arc<Buffer>>,
    recompute_layers: Option<usize>,
) -> Result<(Vec<Segment>, Forward<'a>)> {
    let all = &scope.model.decoder().steps;
    let mut forward = Forward::new(scope, batch, x);
    let mut segments = Vec::new();
    let mut parts = parts(all, steps, recompute_layers).into_iter().peekable();
    while let Some(steps) = parts.next() {
        let x = forward.x.clone();
        let keeps = keeps(recompute_layers, parts.peek().is_none());
        forward.saved = keeps.then(Vec::new);
        forward.run(&all[steps.clone()])?;
        segments.push(Segment { steps, x, saved: forward.saved.take() });
    }
    Ok((segments, forward))
}

/// Whether all that the backward needs is kept of a part of the steps.
pub(super) fn keeps(recompute_layers: Option<usize>, is_last: bool) -> bool {
    match recompute_layers {
        None => true,
        // The backward begins with the last one.
        Some(1) => is_last,
        // Several layers at once are what there is no room for.
        Some(_) => false,
    }
}

/// Cuts steps into parts of so many layers, one fewer, and so on, at least one each: when a part's layers are computed again, the parts before it
/// are what is still held, so that all parts come to hold the same.
pub(super) fn parts(all: &[Step], steps: Range<usize>, layers: Option<usize>) -> Vec<Range<usize>> {
    let Some(layers) = layers else { return vec![steps] };
    let begins = |step: &usize| matches!(all[*step], Step::Project { part: Part::Attention, .. });
    let (mut cuts, mut lengths) = (Vec::new(), (1..=layers.max(1)).rev());
    let mut begin = steps.clone().filter(begins);
    while let Some(cut) = begin.next() {
        cuts.push(cut);
        let length = lengths.next().unwrap_or(1);
        begin.by_ref().take(length - 1).for_each(drop);
    }
    if cuts.first() != Some(&steps.start) {
        cuts.insert(0, steps.start);
    }
    let ends = cuts.iter().skip(1).copied().chain([steps.end]);
    cuts.iter().copied().zip(ends).map(|(start, end)| start..end).collect()
}

fn absent() -> Error {
    Error::internal("a step comes before what it needs")
}

/// The forward between two steps.
struct Forward<'a> {
    scope: &'a Scope<'a>,
    batch: &'a Batch,
    /// The residual stream, `[rows, hidden_size]`; at the end the head's input.
    x: Option<Arc<Buffer>>,
    /// The input of the next output layer.
    y: Option<Buffer>,
    /// q, k, v or gate, up.
    projected: Vec<Buffer>,
    /// Where anything is kept.
    saved: Option<Vec<Saved>>,
}

impl<'a> Forward<'a> {
    fn new(scope: &'a Scope<'_>, batch: &'a Batch, x: Option<Arc<Buffer>>) -> Self {
        Self { scope, batch, x, y: None, projected: Vec::new(), saved: None }
    }

    fn x(&self) -> Result<Arc<Buffer>> {
        self.x.clone().ok_or_else(absent)
    }

    fn projected<const N: usize>(&mut self) -> Result<[Buffer; N]> {
        std::mem::take(&mut self.projected).try_into().map_err(|_| absent())
    }

    fn save(&mut self, saved: impl FnOnce() -> Saved) {
        if let Some(all) = &mut self.saved {
            all.push(saved());
        }
    }

    fn into_hidden(self) -> Result<Buffer> {
        self.x.and_then(Arc::into_inner).ok_or_else(absent)
    }

    fn embed(&self, scale: f32) -> Buffer {
        let width = self.scope.model.config().hidden_size;
        let (copy, own) = (self.scope.copy_of(Slot::Embedding), self.scope.tokens_of(Slot::Embedding));
        let mut x = self.scope.take(self.batch.len() * width);
        for (out, id) in x.chunks_exact_mut(width).zip(&self.batch.ids).filter(|(_, id)| **id != VIRTUAL_TOKEN) {
            let own = own.and_then(|own| own.row(*id)).or(copy.map(|copy| &copy[*id as usize * width..]));
            match own {
                Some(own) => out.iter_mut().zip(own).for_each(|(out, x)| *out = scale * x),
                None => self.scope.model.embed(*id, scale, out),
            }
        }
        self.scope.embed_virtual(self.batch, &mut x);
        x
    }

    /// The residual stream after what an output layer gives has been merged into it; and that, where the merge's backward needs it.
    fn merged(&self, x: &[f32], mut branch: Buffer, merge: Merge) -> (Buffer, Option<Buffer>) {
        match merge {
            Merge::Add => add(&mut branch, x),
            Merge::Scaled(scale) => {
                branch.iter_mut().for_each(|y| *y *= scale);
                add(&mut branch, x);
            }
            Merge::Normed(norm) => {
                let mut merged = self.scope.normed(&branch, norm);
                add(&mut merged, x);
                return (merged, Some(branch));
            }
        }
        (branch, None)
    }
}

impl Scope<'_> {
    fn normed(&self, x: &[f32], norm: NormId) -> Buffer {
        let mut normed = self.take(x.len());
        cpu::rms_norm(x, self.norm(norm), self.model.config().norm_eps, &mut normed);
        normed
    }

    /// Adds the gradient of what is normed to `dx`, and that of the norm's own weights where they are trained.
    pub(super) fn norm_backward(&self, x: &[f32], norm: NormId, d: &[f32], dx: &mut [f32], gradients: &mut Adapter) {
        let eps = self.model.config().norm_eps;
        cpu::rms_norm_backward(x, self.norm(norm), eps, d, dx);
        if let Some(dw) = gradients.copies.get_mut(&Slot::Norm(norm)) {
            let mut unit = self.take(x.len());
            cpu::rms_norm(x, &vec![1.0; dw.len()], eps, &mut unit);
            add_products(dw, d, &unit);
        }
    }

    fn gated(&self, step: &Step, gate: &[f32], up: &[f32]) -> Result<Buffer> {
        let Step::Gate { activation } = step else { return Err(absent()) };
        let mut y = self.take(gate.len());
        y.copy_from_slice(gate);
        cpu::gated(*activation, &mut y, up);
        Ok(y)
    }
}

impl StepExecutor for Forward<'_> {
    type Error = Error;

    fn take(&mut self, step: &Step, _next: &[Step]) -> Result<()> {
        let scope = self.scope;
        match step {
            Step::Embed { scale } => {
                self.x = Some(Arc::new(self.embed(*scale)));
                self.save(|| Saved::Nothing);
            }
            Step::Project { norm, sites, part } => {
                let x = self.x()?;
                let outputs = scope.linear(&mut scope.normed(&x, *norm), sites.clone());
                self.projected = match &outputs[..] {
                    [fused] => split(scope, fused, &scope.model.config().widths(*part)),
                    _ => outputs,
                };
                self.save(|| Saved::Normed { x });
            }
            Step::Attend(attend) => {
                let qkv: [Buffer; 3] = self.projected()?;
                self.y = Some(scope.attend(self.batch, attend, qkv.each_ref().map(|values| &values[..])));
                self.save(|| Saved::Attend { qkv });
            }
            Step::Gate { .. } => {
                let [gate, up] = self.projected()?;
                self.y = Some(scope.gated(step, &gate, &up)?);
                self.save(|| Saved::Gate { gate, up });
            }
            Step::Output { site, merge } => {
                let mut y = self.y.take().ok_or_else(absent)?;
                let branch = scope.linear(&mut y, *site..*site + 1).pop().ok_or_else(absent)?;
                let (x, branch) = self.merged(&self.x()?, branch, *merge);
                self.x = Some(Arc::new(x));
                let gate_is_kept = matches!(self.saved.as_deref(), Some([.., Saved::Gate { .. }]));
                let y = (scope.changes(*site) && !gate_is_kept).then_some(y);
                self.save(|| Saved::Output { y, branch });
            }
            Step::Select => {
                let (x, width) = (self.x()?, scope.model.config().hidden_size);
                let mut selected = scope.take(self.batch.selected.len() * width);
                for (to, row) in selected.chunks_exact_mut(width).zip(&self.batch.selected) {
                    to.copy_from_slice(&x[row * width..][..width]);
                }
                self.x = Some(Arc::new(selected));
                self.save(|| Saved::Nothing);
            }
            Step::Finish { norm } => {
                let x = self.x()?;
                self.x = Some(Arc::new(scope.normed(&x, *norm)));
                self.save(|| Saved::Normed { x });
            }
        }
        Ok(())
    }
}

/// The backward between two steps.
struct Backward<'a> {
    scope: &'a Scope<'a>,
    batch: &'a Batch,
    /// The first step with something that is trained; what comes before needs no gradients.
    first: usize,
    /// The gradient of the residual stream.
    dx: Buffer,
    /// That of an output layer's input.
    dy: Option<Buffer>,
    /// Those of q, k, v or of gate, up.
    projected: Vec<Buffer>,
    /// That of the virtual tokens, `[count, width]`.
    d_virtual: Vec<f32>,
    gradients: &'a mut Adapter,
}

impl Backward<'_> {
    fn segments(&mut self, segments: Vec<Segment>) -> Result<()> {
        for Segment { steps, x, saved } in segments.into_iter().rev() {
            if steps.end <= self.first {
                break;
            }
            match saved {
                Some(saved) => self.steps(steps, saved)?,
                None => {
                    let (segments, _) = forward(self.scope, self.batch, steps, x, Some(1))?;
                    self.segments(segments)?;
                }
            }
        }
        Ok(())
    }

    fn steps(&mut self, steps: Range<usize>, mut saved: Vec<Saved>) -> Result<()> {
        let all = &self.scope.model.decoder().steps;
        for step in (steps.start.max(self.first)..steps.end).rev() {
            let kept = saved.pop().ok_or_else(absent)?;
            match (&all[step], kept) {
                (Step::Finish { norm }, Saved::Normed { x }) => {
                    let mut dx = self.scope.zeros(x.len());
                    self.scope.norm_backward(&x, *norm, &self.dx, &mut dx, self.gradients);
                    self.dx = dx;
                }
                (Step::Select, Saved::Nothing) => self.select(),
                (Step::Output { site, merge }, Saved::Output { y, branch }) => {
                    let y = match (y, saved.last()) {
                        (None, Some(Saved::Gate { gate, up })) if self.scope.changes(*site) => {
                            Some(self.scope.gated(&all[step - 1], gate, up)?)
                        }
                        (y, _) => y,
                    };
                    self.output(step, *site, *merge, (y, branch))?;
                }
                (Step::Gate { activation }, Saved::Gate { mut gate, mut up }) => {
                    let dy = self.dy.take().ok_or_else(absent)?;
                    cpu::gated_backward(*activation, &mut gate, &mut up, &dy);
                    self.projected = vec![gate, up];
                }
                (Step::Attend(attend), Saved::Attend { qkv }) => {
                    let dy = self.dy.take().ok_or_else(absent)?;
                    let qkv = qkv.each_ref().map(|values| &values[..]);
                    let (d_prefix, gradients) = (&mut *self.d_virtual, &mut *self.gradients);
                    self.projected =
                        self.scope.attend_backward(self.batch, attend, qkv, &dy, d_prefix, gradients).into();
                }
                (Step::Project { norm, sites, .. }, Saved::Normed { x }) => {
                    self.project(step, *norm, sites.clone(), &x)
                }
                (Step::Embed { scale }, Saved::Nothing) => {
                    self.scope.embed_virtual_backward(self.batch, &self.dx, &mut self.d_virtual);
                    self.embed(*scale);
                }
                _ => return Err(absent()),
            }
        }
        Ok(())
    }

    /// Adds the gradient of a copy of the embedding, or of the rows of some tokens.
    fn embed(&mut self, scale: f32) {
        let Adapter { copies, tokens, .. } = &mut *self.gradients;
        let (mut copy, mut tokens) = (copies.get_mut(&Slot::Embedding), tokens.get_mut(&Slot::Embedding));
        let width = self.scope.model.config().hidden_size;
        for (dx, id) in self.dx.chunks_exact(width).zip(&self.batch.ids) {
            let of_copy = copy.as_mut().map(|copy| &mut copy[*id as usize * width..]);
            let of_token = tokens.as_mut().and_then(|tokens| tokens.row_mut(*id));
            for d in of_copy.into_iter().chain(of_token) {
                d.iter_mut().zip(dx).for_each(|(d, dx)| *d += scale * dx);
            }
        }
    }

    fn select(&mut self) {
        let width = self.scope.model.config().hidden_size;
        let mut dx = self.scope.zeros(self.batch.len() * width);
        for (from, row) in self.dx.chunks_exact(width).zip(&self.batch.selected) {
            dx[row * width..][..width].iter_mut().zip(from).for_each(|(to, from)| *to += from);
        }
        self.dx = dx;
    }

    fn output(
        &mut self,
        step: usize,
        site: usize,
        merge: Merge,
        (y, branch): (Option<Buffer>, Option<Buffer>),
    ) -> Result<()> {
        let scope = self.scope;
        let own;
        let d: &[f32] = match merge {
            Merge::Add => &self.dx,
            Merge::Scaled(scale) => {
                let mut d = scope.take(self.dx.len());
                d.iter_mut().zip(&*self.dx).for_each(|(d, dx)| *d = scale * dx);
                own = d;
                &own
            }
            Merge::Normed(norm) => {
                let branch = branch.ok_or_else(absent)?;
                let mut d = scope.zeros(branch.len());
                scope.norm_backward(&branch, norm, &self.dx, &mut d, self.gradients);
                own = d;
                &own
            }
        };
        let onward = scope.delta_backward(site, y.as_deref().unwrap_or_default(), d, self.gradients);
        if step > self.first {
            // In the memory of the input, the largest there is.
            let mut dy = y.unwrap_or_else(|| scope.take(self.batch.len() * scope.model.matrix(site).cols()));
            dy.fill(0.0);
            scope.input_backward(site, d, onward, &mut dy);
            self.dy = Some(dy);
        }
        scope.yield_to_serving();
        Ok(())
    }

    fn project(&mut self, step: usize, norm: NormId, sites: Range<usize>, x: &[f32]) {
        let scope = self.scope;
        let projected = std::mem::take(&mut self.projected);
        let outputs = if sites.len() == 1 { vec![joined(scope, &projected, self.batch.len())] } else { projected };
        let changed = sites.clone().any(|site| scope.changes(site));
        let normed = changed.then(|| scope.normed(x, norm));
        let mut d = (step > self.first).then(|| scope.zeros(x.len()));
        for (site, dy) in sites.zip(&outputs) {
            scope.linear_backward(site, normed.as_deref().unwrap_or_default(), dy, d.as_deref_mut(), self.gradients);
        }
        if let Some(d) = d {
            let mut dx = std::mem::replace(&mut self.dx, scope.take(0));
            scope.norm_backward(x, norm, &d, &mut dx, self.gradients);
            self.dx = dx;
        }
    }
}

/// Columns that lie side by side, each of these widths by itself.
fn split(scope: &Scope<'_>, all: &[f32], widths: &[usize]) -> Vec<Buffer> {
    let width: usize = widths.iter().sum();
    let mut from = 0;
    let part = |part: &usize| {
        let mut values = scope.take(all.len() / width * part);
        for (to, row) in values.chunks_exact_mut(*part).zip(all.chunks_exact(width)) {
            to.copy_from_slice(&row[from..from + part]);
        }
        from += part;
        values
    };
    widths.iter().map(part).collect()
}

/// The inverse of [`split`].
fn joined(scope: &Scope<'_>, parts: &[Buffer], rows: usize) -> Buffer {
    let width = parts.iter().map(|part| part.len() / rows).sum();
    let mut all = scope.take(rows * width);
    let mut from = 0;
    for values in parts {
        let part = values.len() / rows;
        for (row, values) in all.chunks_exact_mut(width).zip(values.chunks_exact(part)) {
            row[from..from + part].copy_from_slice(values);
        }
        from += part;
    }
    all
}
