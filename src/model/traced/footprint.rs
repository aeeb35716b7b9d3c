//! What a pass takes: the decoder's steps with sizes in place of values. It takes and gives back what [`super::pass`] does, in the same
//! order, so that the most it holds is what a pass of that size will hold; `train/plan.rs` is tested to find as much as is measured.

use std::ops::Range;

use super::attention::{Attention, Transients};
use super::frozen::{Weight, piece_of, served_rows};
use super::head::rows_at_a_time;
use super::pass::{keeps, parts};
use super::{ForwardOptions, Products};
use crate::adapter::{LowRank, ScaledSide, SiteDelta, VirtualForm};
use crate::arch::decoder::{Attend, Merge, NormId, SiteId, Slot, Step};
use crate::kernels::cpu::QuantizedRows;
use crate::model::Model;

/// How large a pass is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PassSize {
    /// Rows of all its sequences, those of virtual tokens before them included.
    pub tokens: usize,
    /// Rows of the longest of them.
    pub longest: usize,
    /// Rows that reach the head.
    pub selected: usize,
}

/// Part of a pass that its workspace may have more of: buffers are larger than what is asked of them, by up to a fourth.
const SLACK: u64 = 16;

impl Model {
    /// Returns the bytes that a workspace needs for [`Model::trace`] and its backward.
    pub fn trace_bytes(&self, size: PassSize, options: ForwardOptions<'_>) -> u64 {
        let mut footprint = Footprint::new(self, size, options);
        let segments = footprint.forward(0..self.decoder().steps.len(), options.recompute_layers);
        footprint.score(true);
        footprint.segments(segments);
        footprint.bytes()
    }

    /// Returns the bytes that a workspace needs for [`Model::score_tokens`].
    pub fn score_bytes(&self, size: PassSize, options: ForwardOptions<'_>) -> u64 {
        let mut footprint = Footprint::new(self, size, options);
        for step in 0..self.decoder().steps.len() {
            footprint.step(step, false);
        }
        footprint.score(false);
        footprint.bytes()
    }
}

struct Footprint<'a> {
    model: &'a Model,
    options: ForwardOptions<'a>,
    size: PassSize,
    /// The first step with something that is trained.
    first: usize,
    /// Float32 values that are held now, and the most so far.
    held: usize,
    most: usize,
    /// Holds nothing: it knows what rows would take.
    quantized: QuantizedRows,
    quantized_bytes: u64,
    /// The residual stream's values, and whether someone else holds them too.
    x: usize,
    x_is_kept: bool,
    /// The values of the next output layer's input, or of its gradient.
    y: usize,
    /// Those of q, k and v, or of gate and up, or of their gradients.
    projected: usize,
    /// Those of the residual stream's gradient.
    dx: usize,
}

/// Steps, and the values that are held for their backward.
struct Segment {
    steps: Range<usize>,
    x: usize,
    /// By step; `None` where they are taken again.
    saved: Option<Vec<usize>>,
}

impl<'a> Footprint<'a> {
    fn new(model: &'a Model, size: PassSize, options: ForwardOptions<'a>) -> Self {
        let mut footprint = Self {
            model,
            options,
            size,
            first: 0,
            held: 0,
            most: 0,
            quantized: QuantizedRows::new(model.formats()),
            quantized_bytes: 0,
            x: 0,
            x_is_kept: false,
            y: 0,
            projected: 0,
            dx: 0,
        };
        let steps = &model.decoder().steps;
        let trained = |step: &Step| match step {
            Step::Embed { .. } => {
                let is_trained = footprint.copies(Slot::Embedding) || footprint.tokens(Slot::Embedding) > 0;
                is_trained || footprint.has(VirtualForm::Embeddings)
            }
            Step::Attend(_) => footprint.has(VirtualForm::KeysAndValues),
            step => step.sites().any(|site| footprint.changes(site) || footprint.copies(Slot::Bias(site))),
        };
        footprint.first = steps.iter().position(trained).unwrap_or(steps.len());
        for site in 0..model.decoder().sites.len() {
            footprint.norms(site);
        }
        footprint
    }

    fn bytes(&self) -> u64 {
        let buffers = (self.most * size_of::<f32>()) as u64;
        buffers + buffers / SLACK + self.quantized_bytes
    }

    fn take(&mut self, values: usize) -> usize {
        self.held += values;
        self.most = self.most.max(self.held);
        values
    }

    fn give(&mut self, values: usize) {
        self.held -= values;
    }

    /// Values that are given back before anything else is taken.
    fn pass_by(&mut self, values: usize) {
        self.take(values);
        self.give(values);
    }

    fn rows(&self, width: usize) -> usize {
        self.size.tokens * width
    }

    fn hidden(&self) -> usize {
        self.model.config().hidden_size
    }

    /// Whether the adapter has virtual tokens of a form.
    fn has(&self, form: VirtualForm) -> bool {
        let tokens = self.options.adapter.and_then(|adapter| adapter.virtual_tokens.as_ref());
        tokens.is_some_and(|tokens| tokens.form() == form)
    }

    /// The values of attention's own values, where a prefix stands before them.
    fn prefixed(&self, v: usize) -> usize {
        if self.has(VirtualForm::KeysAndValues) { v } else { 0 }
    }

    fn adapted(&self, site: SiteId) -> Option<&'a SiteDelta> {
        self.options.adapter?.sites.get(&self.model.site(site))
    }

    /// Whether the adapter has a copy that takes the place of a tensor.
    fn copies(&self, slot: Slot) -> bool {
        self.options.adapter.is_some_and(|adapter| adapter.copies.contains_key(&slot))
    }

    /// The tokens that have rows of their own in the place of a table's.
    fn tokens(&self, slot: Slot) -> usize {
        let tokens = self.options.adapter.and_then(|adapter| adapter.tokens.get(&slot));
        tokens.map_or(0, |tokens| tokens.ids.len())
    }

    fn changes(&self, site: SiteId) -> bool {
        self.adapted(site).is_some() || self.copies(Slot::Matrix(site))
    }

    fn weight(&self, site: SiteId) -> Weight<'a> {
        self.copy_or(Slot::Matrix(site), Weight::Frozen(self.model.matrix(site)))
    }

    fn head(&self) -> Weight<'a> {
        self.copy_or(self.model.head_slot(), Weight::Frozen(self.model.head()))
    }

    fn copy_or(&self, slot: Slot, frozen: Weight<'a>) -> Weight<'a> {
        match self.options.adapter.and_then(|adapter| adapter.copies.get(&slot)) {
            Some(values) => Weight::Copy { values, cols: frozen.cols() },
            None => frozen,
        }
    }

    /// Values of the pieces in which a matrix is dequantised.
    fn dense(&self, weight: Weight<'_>, rows: usize) -> usize {
        match weight {
            Weight::Frozen(_) => piece_of(weight, rows) * weight.cols(),
            Weight::Copy { .. } => 0,
        }
    }

    /// The gradient of a norm's weights, of so many values that are normed.
    fn norm_backward(&mut self, norm: NormId, values: usize) {
        if self.copies(Slot::Norm(norm)) {
            self.pass_by(values);
        }
    }

    /// The norms of the rows that magnitudes belong to.
    fn norms(&mut self, site: SiteId) {
        if let Some(SiteDelta::LowRank(LowRank { rank, magnitude: Some(_), .. })) = self.adapted(site) {
            let weight = self.weight(site);
            self.pass_by(piece_of(weight, *rank) * (weight.cols() + rank));
        }
    }

    /// One of some layers of which those that are frozen have so many weights in all, of some rows; its outputs are not counted.
    fn products(&mut self, weight: Weight<'_>, weights: usize, rows: usize) {
        match (weight, self.options.products) {
            (Weight::Frozen(matrix), Products::Served) => {
                let bytes = self.quantized.bytes_for(rows.min(served_rows(weights)), matrix.cols());
                self.quantized_bytes = self.quantized_bytes.max(bytes);
            }
            _ => self.pass_by(self.dense(weight, rows)),
        }
    }

    /// The values of what is dropped of an adapter's input.
    fn dropped(&self, inputs: usize) -> usize {
        if self.options.dropout.is_some() { self.rows(inputs) } else { 0 }
    }

    /// Adapted layers that share their input. Gives the values of their outputs, which are held.
    fn linear(&mut self, sites: Range<SiteId>) -> usize {
        let of_sites: Vec<Weight<'_>> = sites.clone().map(|site| self.weight(site)).collect();
        let outputs = self.take(self.rows(of_sites.iter().map(Weight::rows).sum()));
        let frozen = of_sites.iter().filter(|weight| matches!(weight, Weight::Frozen(_)));
        let weights = frozen.map(|weight| weight.rows() * weight.cols()).sum();
        for (site, matrix) in sites.clone().zip(of_sites) {
            let inputs = self.rows(matrix.cols());
            let scaled = match self.adapted(site) {
                Some(SiteDelta::Scaled { side: ScaledSide::Input, .. }) => self.take(inputs),
                _ => 0,
            };
            self.products(matrix, weights, self.size.tokens);
            self.give(scaled);
            match self.adapted(site) {
                Some(SiteDelta::LowRank(pair)) => self.pass_by(self.dropped(matrix.cols()) + self.rows(pair.rank)),
                Some(SiteDelta::Bottleneck(bottleneck)) => self.pass_by(2 * self.rows(bottleneck.size())),
                Some(SiteDelta::Scaled { .. }) | None => {}
            }
        }
        outputs
    }

    /// The backward of an adapted layer.
    fn linear_backward(&mut self, site: SiteId, wants_dx: bool) {
        let onward = self.delta_backward(site);
        if wants_dx {
            self.input_backward(site);
        }
        self.give(onward);
    }

    /// Its first half. Gives the values that are held for the second.
    fn delta_backward(&mut self, site: SiteId) -> usize {
        let matrix = self.weight(site);
        let (inputs, outputs) = (self.rows(matrix.cols()), self.rows(matrix.rows()));
        match self.adapted(site) {
            Some(SiteDelta::LowRank(pair)) => {
                let (dropped, shrunk) = (self.dropped(matrix.cols()), self.rows(pair.rank));
                let d = match &pair.magnitude {
                    Some(_) => {
                        let sum = self.take(outputs);
                        self.pass_by(inputs);
                        self.pass_by(dropped + shrunk);
                        let d = self.take(outputs);
                        self.give(sum);
                        d
                    }
                    None => 0,
                };
                let of_input = self.take(dropped + shrunk);
                let dshrunk = self.take(shrunk);
                self.give(of_input);
                d + dshrunk
            }
            Some(SiteDelta::Scaled { side: ScaledSide::Output, .. }) => {
                self.pass_by(outputs + inputs);
                self.take(outputs)
            }
            Some(SiteDelta::Scaled { side: ScaledSide::Input, .. }) => {
                let d = self.take(inputs);
                self.pass_by(self.dense(matrix, self.size.tokens));
                d
            }
            Some(SiteDelta::Bottleneck(bottleneck)) => {
                let u = self.take(outputs);
                self.pass_by(inputs);
                self.pass_by(outputs + 3 * self.rows(bottleneck.size()));
                let du = self.take(outputs);
                self.give(u);
                du
            }
            None => 0,
        }
    }

    /// Its second half.
    fn input_backward(&mut self, site: SiteId) {
        let matrix = self.weight(site);
        match self.adapted(site) {
            Some(SiteDelta::Scaled { side: ScaledSide::Input, .. }) => {}
            _ => self.pass_by(self.dense(matrix, self.size.tokens)),
        }
        if let Some(SiteDelta::LowRank(_)) = self.adapted(site) {
            self.pass_by(self.dropped(matrix.cols()));
        }
    }

    fn set_x(&mut self, values: usize) {
        let old = std::mem::replace(&mut self.x, values);
        self.give(if self.x_is_kept { 0 } else { old });
        self.x_is_kept = false;
    }

    /// The values of the residual stream where nobody has kept them yet.
    fn keep_x(&mut self) -> usize {
        if std::mem::replace(&mut self.x_is_kept, true) { 0 } else { self.x }
    }

    fn transients(&self, attend: &Attend) -> Transients {
        Attention::transients(attend.spec, self.model.config().attention, self.size)
    }

    /// Whether the input of an output layer is computed again from what the gate before it has kept.
    fn is_gated(&self, step: usize) -> bool {
        matches!(self.model.decoder().steps[step - 1], Step::Gate { .. })
    }

    fn forward(&mut self, steps: Range<usize>, recompute_layers: Option<usize>) -> Vec<Segment> {
        let mut segments = Vec::new();
        let mut parts = parts(&self.model.decoder().steps, steps, recompute_layers).into_iter().peekable();
        while let Some(steps) = parts.next() {
            let x = self.keep_x();
            let keeps = keeps(recompute_layers, parts.peek().is_none());
            let saved: Vec<usize> = steps.clone().map(|step| self.step(step, keeps)).collect();
            segments.push(Segment { steps, x, saved: keeps.then_some(saved) });
        }
        segments
    }

    /// Takes a step forward, and gives the values that are held for its backward.
    fn step(&mut self, step: usize, keeps: bool) -> usize {
        let model = self.model;
        let [q, k, v] = model.config().qkv_widths().map(|width| self.rows(width));
        match &model.decoder().steps[step] {
            Step::Embed { .. } => {
                let x = self.take(self.rows(self.hidden()));
                self.set_x(x);
                0
            }
            Step::Project { sites, .. } => {
                let normed = self.take(self.rows(self.hidden()));
                self.projected = self.linear(sites.clone());
                self.give(normed);
                if sites.len() == 1 {
                    self.pass_by(self.projected);
                }
                if keeps { self.keep_x() } else { 0 }
            }
            Step::Attend(attend) => {
                let transients = self.transients(attend);
                let prepared = self.take(q + k + self.prefixed(v));
                self.y = self.take(q);
                self.pass_by(transients.forward);
                self.give(prepared);
                self.kept(q + k + v, keeps)
            }
            Step::Gate { .. } => {
                self.y = self.take(self.rows(model.config().intermediate_size));
                self.kept(2 * self.y, keeps)
            }
            Step::Output { site, merge } => {
                let branch = self.linear(*site..*site + 1);
                let (x, branch) = match merge {
                    Merge::Normed(_) => (self.take(branch), branch),
                    Merge::Add | Merge::Scaled(_) => (branch, 0),
                };
                self.set_x(x);
                let keeps_y = keeps && self.changes(*site) && !self.is_gated(step);
                self.kept(branch, keeps) + self.kept(self.y, keeps_y)
            }
            Step::Select => {
                let x = self.take(self.size.selected * self.hidden());
                self.set_x(x);
                0
            }
            Step::Finish { .. } => {
                let kept = if keeps { self.keep_x() } else { 0 };
                let x = self.take(self.x);
                self.set_x(x);
                kept
            }
        }
    }

    /// Values that are kept, or given back.
    fn kept(&mut self, values: usize, keeps: bool) -> usize {
        if keeps {
            return values;
        }
        self.give(values);
        0
    }

    /// The head. With gradients, `dx` is what the backward begins with.
    fn score(&mut self, gradients: bool) {
        let head = self.head();
        let rows = self.size.selected.min(rows_at_a_time(head.rows()));
        self.dx = if gradients { self.take(self.x) } else { 0 };
        let tokens = self.tokens(self.model.head_slot());
        let of_tokens = self.take(if gradients { self.size.selected * tokens } else { 0 });
        let logits = self.take(rows * head.rows());
        self.products(head, head.rows() * head.cols(), rows);
        self.pass_by(rows * tokens);
        self.pass_by(if gradients { self.dense(head, rows) } else { 0 });
        self.give(logits);
        if gradients && self.copies(self.model.head_slot()) {
            // Once more, for the copy's own gradient.
            self.pass_by(logits);
        }
        self.give(of_tokens);
        self.set_x(0);
    }

    fn segments(&mut self, segments: Vec<Segment>) {
        for Segment { steps, x, saved } in segments.into_iter().rev() {
            if steps.end <= self.first {
                break;
            }
            match saved {
                Some(saved) => {
                    self.backward(steps, saved);
                    self.give(x);
                }
                None => {
                    (self.x, self.x_is_kept) = (x, false);
                    let segments = self.forward(steps, Some(1));
                    self.set_x(0);
                    self.segments(segments);
                }
            }
        }
    }

    fn backward(&mut self, steps: Range<usize>, mut saved: Vec<usize>) {
        for step in (steps.start.max(self.first)..steps.end).rev() {
            let kept = saved.pop().unwrap_or_default();
            let kept = self.step_backward(step, kept);
            self.give(kept);
        }
        self.give(saved.into_iter().sum());
    }

    fn set_dx(&mut self, values: usize) {
        let dx = self.take(values);
        let old = std::mem::replace(&mut self.dx, dx);
        self.give(old);
    }

    /// Takes a step backward, and gives what is then to be given back of what was held for it.
    fn step_backward(&mut self, step: usize, kept: usize) -> usize {
        let model = self.model;
        let (hidden, wants_dx) = (self.rows(self.hidden()), step > self.first);
        match &model.decoder().steps[step] {
            Step::Embed { .. } => {}
            Step::Finish { norm } => {
                self.norm_backward(*norm, 2 * self.dx);
                self.set_dx(self.dx);
            }
            Step::Select => self.set_dx(hidden),
            Step::Output { site, merge } => {
                let inputs = self.rows(model.matrix(*site).cols());
                let changes = self.changes(*site);
                let gated = changes && self.is_gated(step);
                let y = self.take(if gated { inputs } else { 0 });
                let d = self.take(if matches!(merge, Merge::Add) { 0 } else { hidden });
                if let Merge::Normed(norm) = merge {
                    self.norm_backward(*norm, hidden);
                }
                let onward = self.delta_backward(*site);
                if wants_dx {
                    self.y = if changes { inputs } else { self.take(inputs) };
                    self.input_backward(*site);
                } else {
                    self.give(y);
                    self.y = 0;
                }
                self.give(onward + d);
                // The input's own memory, where that was kept, holds its gradient now.
                if changes && !gated && wants_dx {
                    return kept - inputs;
                }
            }
            Step::Gate { .. } => {
                self.give(self.y);
                self.projected = kept;
                return 0;
            }
            Step::Attend(attend) => {
                let transients = self.transients(attend);
                let [q, k, v] = model.config().qkv_widths().map(|width| self.rows(width));
                let prepared = self.take(q + k);
                let own = self.take(self.prefixed(v));
                self.projected = self.take(q + k + v);
                self.pass_by(transients.backward);
                self.give(prepared);
                self.pass_by(if attend.norms.is_some() { q } else { 0 });
                if let Some([norm, _]) = attend.norms {
                    self.norm_backward(norm, 2 * q);
                }
                self.give(self.y + own);
            }
            Step::Project { norm, sites, .. } => {
                let joined = self.take(if sites.len() == 1 { self.projected } else { 0 });
                let adapted = sites.clone().any(|site| self.changes(site));
                let normed = self.take(if adapted { hidden } else { 0 });
                let d = self.take(if wants_dx { hidden } else { 0 });
                for site in sites.clone() {
                    self.linear_backward(site, wants_dx);
                }
                if wants_dx {
                    self.norm_backward(*norm, hidden);
                }
                self.give(joined + normed + d + self.projected);
            }
        }
        kept
    }
}
