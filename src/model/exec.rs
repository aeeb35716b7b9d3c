//! Serving on the CPU: a flat batch of rows of different lengths, paged KV, each span its own adapter. A row's bits depend on nothing but
//! its own sequence and adapter: not on the batch, the chunking, or the blocks it lies in.
//!
//! A step reuses all that earlier steps allocated. Each of its operations is one region of the team: the input of a frozen layer is made,
//! quantised and shrunk in one pass over its rows, and its output is computed, expanded and added in one pass over the weights.

use std::ops::Range;
use std::sync::Arc;

use crate::adapter::PackedAdapter;
use crate::adapter::packed::{Bias, Scales};
use crate::arch::decoder::{Attend, Merge, NormId, Part, SiteId, Step, StepExecutor, next_sites};
use crate::error::{Error, Result};
use crate::kernels::cpu::{
    self, Adapters, AttentionScratch, GROUP_ROWS, HeadNorms, HeadPrep, Linear, LoraPair, Next, QuantizedRows, RowGroup,
    RowTile, Team,
};
use crate::kernels::spec::Activation;
use crate::model::Model;
use crate::model::batch::{Executor, KvLayout, SequenceChunk, VIRTUAL_TOKEN, reused};
use crate::model::groups::{KvGroups, KvPlace};
use crate::model::kv::KvCache;

/// Rows of logits whose memory is kept between steps.
const KEPT_LOGITS: usize = 64;

/// The serving executor: its buffers and its KV cache.
#[derive(Debug)]
pub(super) struct Exec {
    model: Arc<Model>,
    groups: KvGroups,
    kv: KvCache,
    rows: Rows,
    /// The memory of all steps' pairs.
    pairs: Vec<Option<LoraPair<'static>>>,
    buffers: Buffers,
    logits: Vec<f32>,
}

impl Exec {
    pub fn new(model: Arc<Model>, kv: KvLayout, groups: KvGroups) -> Result<Self> {
        kv.check()?;
        // As many as the cache has, so that growing sequences take no memory.
        let rows = Rows { tables: Vec::with_capacity(kv.blocks * groups.count()), ..Rows::default() };
        let kv = KvCache::new(model.config(), kv, groups.layers_per_page);
        let buffers = Buffers::new(&model);
        Ok(Self { model, groups, kv, rows, pairs: Vec::new(), buffers, logits: Vec::new() })
    }
}

impl Executor for Exec {
    fn forward(&mut self, spans: &[SequenceChunk<'_>]) -> Result<&[f32]> {
        self.kv.layout().check_spans(&self.model, &self.groups.windows, spans)?;
        self.rows.fill(spans, self.groups.count());
        let mut pairs = reused(std::mem::take(&mut self.pairs));
        self.rows.pairs(self.model.decoder().sites.len(), &mut pairs);
        let mut pass = ExecPass {
            model: &self.model,
            team: Team::get(),
            rows: &self.rows,
            adapted: Adapted { rows: &self.rows, pairs: &pairs },
            groups: &self.groups,
            kv: &mut self.kv,
            buffers: &mut self.buffers,
        };
        let done = pass.run(&self.model.decoder().steps);
        self.pairs = reused(pairs);
        if let Err(e) = done {
            self.rows.adapters.clear();
            return Err(e);
        }
        let (head, rows) = (self.model.head(), self.rows.kept.len());
        if self.logits.capacity() > KEPT_LOGITS * head.rows() && rows <= KEPT_LOGITS {
            self.logits = Vec::new();
        }
        self.logits.resize(rows * head.rows(), 0.0);
        let layer = Linear { matrix: head, bias: None, y: &mut self.logits, accumulate: false };
        // The next step begins anew.
        let first = next_sites(&self.model.decoder().steps).start;
        let next = Next { matrices: [Some(self.model.matrix(first)), None, None, None], adapters: None };
        cpu::linear(Team::get(), &self.buffers.quantized, &mut [layer], None, next);
        self.rows.change_logits(&self.buffers.input, &mut self.logits);
        self.rows.adapters.clear();
        self.model.config().logits.apply(&mut self.logits);
        Ok(&self.logits)
    }
}

/// The rows of a batch.
#[derive(Debug, Default)]
struct Rows {
    ids: Vec<u32>,
    /// All rows, in tiles of one sequence.
    tiles: Vec<Tile>,
    /// The sequences' KV pages: sequence by sequence, of each sequence group by group.
    tables: Vec<u32>,
    /// All rows, in groups of one adapter.
    groups: Vec<RowGroup>,
    adapters: Vec<Arc<PackedAdapter>>,
    /// The largest rank of the adapters.
    rank: usize,
    /// Each row's adapter; empty where none of the batch does anything but to add products.
    changed: Vec<Option<usize>>,
    /// Rows of virtual tokens, their adapter's number with them.
    virtual_rows: Vec<(Tile, usize)>,
    /// The rows that are wanted beyond the last layer, ascending; and one base group for each.
    kept: Vec<usize>,
    kept_groups: Vec<RowGroup>,
}

/// As [`RowTile`], its blocks being the first `blocks` of `tables[table..]` for the first group, those behind them for the second, and so on.
#[derive(Debug, Clone, Copy)]
struct Tile {
    first: usize,
    count: usize,
    position: usize,
    table: usize,
    blocks: usize,
}

impl Rows {
    fn fill(&mut self, spans: &[SequenceChunk<'_>], groups: usize) {
        self.ids.clear();
        self.tiles.clear();
        self.tables.clear();
        self.groups.clear();
        self.adapters.clear();
        self.virtual_rows.clear();
        self.kept.clear();
        self.kept_groups.clear();
        for span in spans {
            let (first, table) = (self.ids.len(), self.tables.len());
            self.ids.extend_from_slice(span.ids);
            match groups {
                1 => self.tables.extend_from_slice(span.blocks),
                _ => (0..groups).for_each(|group| self.tables.extend(span.blocks.iter().skip(group).step_by(groups))),
            }
            for at in (0..span.ids.len()).step_by(GROUP_ROWS) {
                let count = GROUP_ROWS.min(span.ids.len() - at);
                let (position, blocks) = (span.start + at, span.blocks.len() / groups);
                self.tiles.push(Tile { first: first + at, count, position, table, blocks });
            }
            let adapter = span.adapter.map(|adapter| self.number(adapter));
            if let (count @ 1.., Some(adapter)) = (span.virtual_rows(), adapter) {
                let (position, blocks) = (span.start, span.blocks.len() / groups);
                self.virtual_rows.push((Tile { first, count, position, table, blocks }, adapter));
            }
            self.group(first..self.ids.len(), adapter);
            self.kept.extend(self.ids.len() - span.logits.count(span.ids.len())..self.ids.len());
        }
        self.kept_groups.extend((0..self.kept.len()).map(|first| RowGroup { first, count: 1, adapter: None }));
        self.rank = self.adapters.iter().map(|adapter| adapter.rank()).max().unwrap_or(0);
        self.changed.clear();
        if self.adapters.iter().any(|adapter| adapter.changes_rows()) {
            self.changed.extend(self.groups.iter().flat_map(|group| std::iter::repeat_n(group.adapter, group.count)));
        }
    }

    /// A row's adapter, where any of the batch does anything but to add products.
    fn adapter(&self, row: usize) -> Option<&PackedAdapter> {
        Some(&self.adapters[(*self.changed.get(row)?)?])
    }

    /// What is multiplied in a row at a site.
    fn scales(&self, row: usize, site: SiteId) -> Option<Scales<'_>> {
        self.adapter(row)?.scales(site)
    }

    /// Puts the products with the rows that adapters have of the head in the place of the head's own. `x`: `[kept, hidden_size]`, normed,
    /// `logits`: `[kept, vocab_size]`.
    fn change_logits(&self, x: &[f32], logits: &mut [f32]) {
        if self.changed.is_empty() || self.kept.is_empty() {
            return;
        }
        let [width, vocab] = [x.len(), logits.len()].map(|len| len / self.kept.len());
        for ((row, x), logits) in self.kept.iter().zip(x.chunks_exact(width)).zip(logits.chunks_exact_mut(vocab)) {
            for (id, own) in self.adapter(*row).into_iter().flat_map(PackedAdapter::head_rows) {
                logits[id as usize] = dot(x, own);
            }
        }
    }

    /// Multiplies a row of what goes into the layers at these sites.
    fn scale_input(&self, row: usize, sites: &Range<SiteId>, x: &mut [f32]) {
        // Only a layer that shares its input with no other has such scales.
        if let Some(Scales::Input(scales)) = self.scales(row, sites.start) {
            x.iter_mut().zip(scales).for_each(|(x, scale)| *x *= scale);
        }
    }

    /// What is added in a row to what comes out of a site.
    fn bias(&self, row: usize, site: SiteId) -> Option<Bias<'_>> {
        self.adapter(row)?.bias(site)
    }

    /// Multiplies the rows of what has come out of the layer at a site, `[rows, out]`, and adds the adapters' biases.
    fn change_output(&self, site: SiteId, bias: Option<&[f32]>, y: &mut [f32]) {
        let Some(width) = y.len().checked_div(self.changed.len()) else { return };
        for (row, y) in y.chunks_exact_mut(width).enumerate() {
            match (self.scales(row, site), bias) {
                (Some(Scales::Output(scales)), _) | (Some(Scales::Product(scales)), None) => {
                    y.iter_mut().zip(scales).for_each(|(y, scale)| *y *= scale);
                }
                (Some(Scales::Product(scales)), Some(bias)) => {
                    let values = y.iter_mut().zip(scales).zip(bias);
                    values.for_each(|((y, scale), bias)| *y = scale * (*y - bias) + bias);
                }
                (Some(Scales::Input(_)) | None, _) => {}
            }
            match (self.bias(row, site), bias) {
                (Some(Bias::Beside(own) | Bias::Instead(own)), None) | (Some(Bias::Beside(own)), _) => {
                    y.iter_mut().zip(own).for_each(|(y, own)| *y += own);
                }
                (Some(Bias::Instead(own)), Some(bias)) => {
                    y.iter_mut().zip(own).zip(bias).for_each(|((y, own), bias)| *y += own - bias);
                }
                (None, _) => {}
            }
        }
    }

    /// What a row of what has come out of a site goes through.
    fn bottleneck(&self, row: usize, site: SiteId) -> Option<cpu::Bottleneck<'_>> {
        self.adapter(row)?.bottleneck(site)
    }

    /// Whether more becomes of what comes out of a site in a row than that a product is added.
    fn changes_output(&self, row: usize, site: SiteId) -> bool {
        matches!(self.scales(row, site), Some(Scales::Output(_) | Scales::Product(_)))
            || self.bias(row, site).is_some()
            || self.bottleneck(row, site).is_some()
    }

    /// The adapter's number in this batch.
    fn number(&mut self, adapter: &Arc<PackedAdapter>) -> usize {
        if let Some(at) = self.adapters.iter().rposition(|known| Arc::ptr_eq(known, adapter)) {
            return at;
        }
        self.adapters.push(adapter.clone());
        self.adapters.len() - 1
    }

    /// Puts rows into groups; the last group of the same adapter takes more while it has room.
    fn group(&mut self, rows: std::ops::Range<usize>, adapter: Option<usize>) {
        for row in rows {
            match self.groups.last_mut() {
                Some(group) if group.adapter == adapter && group.count < GROUP_ROWS => group.count += 1,
                _ => self.groups.push(RowGroup { first: row, count: 1, adapter }),
            }
        }
    }

    /// As a layer of this group sees it.
    fn tile(&self, tile: Tile, group: usize) -> RowTile<'_> {
        let Tile { first, count, position, table, blocks } = tile;
        RowTile { first, count, position, blocks: &self.tables[table + group * blocks..][..blocks] }
    }
}

/// Activations, `[rows, width]` each.
#[derive(Debug)]
struct Buffers {
    outs: Outs,
    /// What was normed, or what attention gave.
    input: Vec<f32>,
    /// The input of the next frozen layers, quantised; and shrunk by the adapters.
    quantized: QuantizedRows,
    shrunk: Vec<f32>,
    /// Rows of the residual stream that wait for what is added to them to be multiplied.
    aside: Vec<f32>,
    /// Of bottleneck adapters.
    inner: Vec<f32>,
    attention: AttentionScratch,
}

impl Buffers {
    fn new(model: &Model) -> Self {
        Self {
            outs: Outs::default(),
            input: Vec::new(),
            quantized: QuantizedRows::new(model.formats()),
            shrunk: Vec::new(),
            aside: Vec::new(),
            inner: Vec::new(),
            attention: AttentionScratch::default(),
        }
    }
}

/// What the frozen layers give.
#[derive(Debug, Default)]
struct Outs {
    /// The residual stream.
    x: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// What comes out of one layer and stands for several of the above, side by side.
    fused: Vec<f32>,
    /// What is not added to x as it is.
    branch: Vec<f32>,
}

/// One batch going through the model.
struct ExecPass<'a> {
    model: &'a Model,
    team: &'static Team,
    rows: &'a Rows,
    adapted: Adapted<'a>,
    groups: &'a KvGroups,
    kv: &'a mut KvCache,
    buffers: &'a mut Buffers,
}

impl Rows {
    fn count(&self) -> usize {
        self.ids.len()
    }

    /// What each adapter has at each site of the model, `[sites, adapters]`.
    fn pairs<'a>(&'a self, sites: usize, pairs: &mut Vec<Option<LoraPair<'a>>>) {
        pairs.extend((0..sites).flat_map(|site| self.adapters.iter().map(move |adapter| adapter.pair(site))));
    }
}

/// The adapters of a batch.
#[derive(Debug, Clone, Copy)]
struct Adapted<'a> {
    rows: &'a Rows,
    /// See [`Rows::pairs`].
    pairs: &'a [Option<LoraPair<'a>>],
}

impl<'a> Adapted<'a> {
    /// What there is at sites in a row, if anything.
    fn at(self, sites: Range<SiteId>) -> Option<Adapters<'a>> {
        let count = self.rows.adapters.len();
        let pairs = self.pairs.get(sites.start * count..sites.end * count).filter(|pairs| !pairs.is_empty())?;
        Some(Adapters { groups: &self.rows.groups, pairs, count, rank: self.rows.rank })
    }
}

impl ExecPass<'_> {
    /// The frozen layers at `sites` and their adapters, on the input that was prepared last; `next` are the sites whose input is prepared
    /// next, none before the head.
    fn linear<const N: usize>(
        &mut self,
        sites: Range<SiteId>,
        next: Range<SiteId>,
        accumulate: bool,
        outs: impl FnOnce(&mut Outs) -> [&mut Vec<f32>; N],
    ) {
        let (model, rows) = (self.model, self.rows);
        let Buffers { outs: buffers, quantized, shrunk, inner, .. } = &mut *self.buffers;
        let (mut of_sites, first) = (sites.clone(), sites.start);
        let mut layers = outs(buffers).map(|y| {
            let site = of_sites.next().unwrap_or(sites.start);
            let matrix = model.matrix(site);
            Linear { matrix, bias: model.bias(site), y: resized(y, rows.count(), matrix.rows()), accumulate }
        });
        let (adapters, next_adapters) = (self.adapted.at(sites), self.adapted.at(next.clone()));
        let adapters = adapters.as_ref().map(|adapters| (adapters, &shrunk[..]));
        let mut matrices = [Some(model.head()), None, None, None];
        for (i, site) in next.enumerate() {
            matrices[i] = Some(model.matrix(site));
        }
        let next = Next { matrices, adapters: next_adapters.as_ref() };
        cpu::linear(self.team, quantized, &mut layers, adapters, next);
        if !accumulate && !rows.changed.is_empty() {
            for (layer, site) in layers.iter_mut().zip(first..) {
                rows.change_output(site, layer.bias, layer.y);
                let width = layer.matrix.rows();
                cpu::bottleneck(self.team, |row| rows.bottleneck(row, site), (layer.y, width), inner);
            }
        }
    }

    /// Adds a layer to the residual stream where its output is changed in some rows: theirs wait aside, and start from zero.
    fn add_changed(&mut self, site: SiteId, next: Range<SiteId>) {
        let (model, rows, width) = (self.model, self.rows, self.model.config().hidden_size);
        let Buffers { outs: Outs { x, .. }, aside, .. } = &mut *self.buffers;
        let is_changed = |row: &usize| rows.changes_output(*row, site);
        aside.clear();
        for row in (0..rows.count()).filter(is_changed) {
            let x = &mut x[row * width..][..width];
            aside.extend_from_slice(x);
            x.fill(0.0);
        }
        self.linear(site..site + 1, next, true, |outs| [&mut outs.x]);
        let Buffers { outs: Outs { x, .. }, aside, inner, .. } = &mut *self.buffers;
        rows.change_output(site, model.bias(site), x);
        cpu::bottleneck(self.team, |row| rows.bottleneck(row, site), (x, width), inner);
        for (row, aside) in (0..rows.count()).filter(is_changed).zip(aside.chunks_exact(width)) {
            x[row * width..][..width].iter_mut().zip(aside).for_each(|(x, aside)| *x += aside);
        }
    }

    fn embed(&mut self, scale: f32) {
        let width = self.model.config().hidden_size;
        let x = resized(&mut self.buffers.outs.x, self.rows.count(), width);
        let rows = x.chunks_exact_mut(width).zip(&self.rows.ids).enumerate();
        for (row, (x, id)) in rows.filter(|(_, (_, id))| **id != VIRTUAL_TOKEN) {
            match self.rows.adapter(row).and_then(|adapter| adapter.embedding(*id)) {
                Some(own) => x.iter_mut().zip(own).for_each(|(x, own)| *x = scale * own),
                None => self.model.embed(*id, scale, x),
            }
        }
        for (tile, adapter) in &self.rows.virtual_rows {
            let rows = x[tile.first * width..].chunks_exact_mut(width).take(tile.count);
            for (x, token) in rows.zip(tile.position..) {
                self.model.embed_virtual(self.rows.adapters[*adapter].virtual_embedding(token), x);
            }
        }
    }

    /// Puts the keys and values of a prefix in the cache, in the place of what its rows have put there.
    fn store_prefixes(&mut self, layer: usize) {
        let (model, rows) = (self.model, self.rows);
        let KvPlace { group, slot } = self.groups.place(layer);
        let width = model.shape().kv_width();
        let Outs { q, k, v, .. } = &mut self.buffers.outs;
        for (tile, adapter) in &rows.virtual_rows {
            let prefix = |token| rows.adapters[*adapter].virtual_kv(token, layer, width);
            if prefix(tile.position).is_none() {
                continue;
            }
            let places = k.chunks_exact_mut(width).zip(v.chunks_exact_mut(width)).skip(tile.first);
            for ((k, v), prefix) in places.zip((tile.position..tile.position + tile.count).filter_map(prefix)) {
                k.copy_from_slice(prefix.0);
                v.copy_from_slice(prefix.1);
            }
            let tile = |_| rows.tile(*tile, group);
            cpu::rope_and_store(self.team, 1, tile, (q, k, v), self.kv.slot_mut(slot), HeadPrep::default());
        }
    }

    /// Norms x and prepares it for frozen layers.
    fn norm(&mut self, norm: NormId, groups: &[RowGroup], sites: Range<SiteId>) {
        let (width, eps) = (self.model.config().hidden_size, self.model.config().norm_eps);
        let weight = self.model.norm(norm);
        let Buffers { outs: Outs { x, .. }, input, quantized, shrunk, .. } = &mut *self.buffers;
        let input = resized(input, x.len() / width, width);
        let normed = |row: usize, out: &mut [f32]| cpu::rms_norm_row(&x[row * width..][..width], weight, eps, out);
        let adapters = self.adapted.at(sites);
        let adapters = adapters.as_ref().map(|adapters| (adapters, shrunk));
        cpu::prepare(self.team, groups, (input, width), quantized, adapters, normed);
    }

    /// Projects x, normed, to q, k and v or to gate and up.
    fn project(&mut self, norm: NormId, sites: Range<SiteId>, part: Part, next: Range<SiteId>) {
        self.norm(norm, &self.rows.groups, sites.clone());
        match (sites.len(), part) {
            (1, _) => {
                self.linear(sites, next, false, |outs| [&mut outs.fused]);
                let Outs { q, k, v, gate, up, fused, .. } = &mut self.buffers.outs;
                let widths = self.model.config().widths(part);
                match part {
                    Part::Attention => split(fused, &widths, &mut [q, k, v]),
                    Part::FeedForward => split(fused, &widths, &mut [gate, up]),
                }
            }
            (_, Part::Attention) => self.linear(sites, next, false, |o| [&mut o.q, &mut o.k, &mut o.v]),
            (_, Part::FeedForward) => self.linear(sites, next, false, |o| [&mut o.gate, &mut o.up]),
        }
    }

    /// Gives y, prepared for the next sites.
    fn attend(&mut self, attend: &Attend, next: Range<SiteId>) {
        // Everything is read back after rounding, this chunk's rows included: so a chunk's borders change no bit.
        let (model, rows) = (self.model, self.rows);
        let KvPlace { group, slot } = self.groups.place(attend.layer);
        let (width, tile) = (model.config().qkv_widths()[0], |i: usize| rows.tile(rows.tiles[i], group));
        let Outs { q, k, v, .. } = &mut self.buffers.outs;
        let eps = model.config().norm_eps;
        let angles = attend.rope.map(|rope| move |position| model.ropes[rope].at(position));
        let factor = attend.temperature.map(|by| move |position| by.at(position));
        let prep = HeadPrep {
            norms: attend.norms.map(|[q, k]| HeadNorms { q: model.norm(q), k: model.norm(k), eps }),
            angles: angles.as_ref().map(|angles| angles as _),
            q_factor: factor.as_ref().map(|factor| factor as _),
        };
        cpu::rope_and_store(self.team, rows.tiles.len(), tile, (q, k, v), self.kv.slot_mut(slot), prep);
        if !rows.virtual_rows.is_empty() {
            self.store_prefixes(attend.layer);
        }
        let Buffers { outs: Outs { q, .. }, input, quantized, shrunk, attention, .. } = &mut *self.buffers;
        let input = resized(input, rows.count(), width);
        let kv = self.kv.slot(slot);
        cpu::attention(self.team, rows.tiles.len(), tile, q, kv, attend.spec, (attention, input));
        let adapters = self.adapted.at(next.clone());
        let adapters = adapters.as_ref().map(|adapters| (adapters, shrunk));
        let scaled = |row: usize, x: &mut [f32]| rows.scale_input(row, &next, x);
        cpu::prepare(self.team, &rows.groups, (input, width), quantized, adapters, scaled);
    }

    /// Gives y, prepared for the next sites.
    fn gate(&mut self, activation: Activation, next: Range<SiteId>) {
        let width = self.model.config().intermediate_size;
        let Buffers { outs: Outs { gate, up, .. }, quantized, shrunk, .. } = &mut *self.buffers;
        let rows = self.rows;
        let gated = |row: usize, gate: &mut [f32]| {
            cpu::gated_row(activation, gate, &up[row * width..][..width]);
            rows.scale_input(row, &next, gate);
        };
        let adapters = self.adapted.at(next.clone());
        let adapters = adapters.as_ref().map(|adapters| (adapters, shrunk));
        cpu::prepare(self.team, &rows.groups, (gate, width), quantized, adapters, gated);
    }

    /// Adds the output layer of y to x.
    fn output(&mut self, site: SiteId, merge: Merge, next: Range<SiteId>) {
        let sites = site..site + 1;
        if merge == Merge::Add && (0..self.rows.changed.len()).any(|row| self.rows.changes_output(row, site)) {
            return self.add_changed(site, next);
        }
        if merge == Merge::Add {
            return self.linear(sites, next, true, |outs| [&mut outs.x]);
        }
        self.linear(sites, next, false, |outs| [&mut outs.branch]);
        let Outs { x, branch, .. } = &mut self.buffers.outs;
        match merge {
            Merge::Add => {}
            Merge::Scaled(scale) => x.iter_mut().zip(branch).for_each(|(x, y)| *x += scale * *y),
            Merge::Normed(norm) => {
                cpu::add_rms_norm(self.team, x, branch, self.model.norm(norm), self.model.config().norm_eps);
            }
        }
    }

    fn select(&mut self) {
        let (width, kept, x) = (self.model.config().hidden_size, &self.rows.kept, &mut self.buffers.outs.x);
        for (to, from) in kept.iter().enumerate() {
            x.copy_within(from * width..(from + 1) * width, to * width);
        }
        x.truncate(kept.len() * width);
    }
}

/// x y, summed in 16 lanes in a fixed order.
fn dot(x: &[f32], y: &[f32]) -> f32 {
    let (x, x_rest) = x.as_chunks::<16>();
    let (y, y_rest) = y.as_chunks::<16>();
    let mut sums = [0.0; 16];
    for (x, y) in x.iter().zip(y) {
        sums.iter_mut().zip(x).zip(y).for_each(|((sum, x), y)| *sum += x * y);
    }
    let rest = x_rest.iter().zip(y_rest).map(|(x, y)| x * y);
    sums.into_iter().chain(rest).sum()
}

/// Puts columns that lie side by side each into a buffer of its own.
fn split(from: &[f32], widths: &[usize], to: &mut [&mut Vec<f32>]) {
    let all: usize = widths.iter().sum();
    to.iter_mut().for_each(|to| to.clear());
    for mut row in from.chunks_exact(all) {
        for (to, width) in to.iter_mut().zip(widths) {
            let (part, rest) = row.split_at(*width);
            to.extend_from_slice(part);
            row = rest;
        }
    }
}

/// A buffer as `[rows, width]`.
fn resized(buffer: &mut Vec<f32>, rows: usize, width: usize) -> &mut [f32] {
    buffer.resize(rows * width, 0.0);
    buffer
}

/// A step's input is what the step before it has prepared: normed, attended or gated, quantised, and shrunk by the adapters.
impl StepExecutor for ExecPass<'_> {
    type Error = Error;

    fn take(&mut self, step: &Step, next: &[Step]) -> Result<()> {
        let rows = self.rows;
        let next = next_sites(next);
        match step {
            Step::Embed { scale } => self.embed(*scale),
            Step::Project { norm, sites, part } => self.project(*norm, sites.clone(), *part, next),
            Step::Attend(attend) => self.attend(attend, next),
            Step::Gate { activation } => self.gate(*activation, next),
            Step::Output { site, merge } => self.output(*site, *merge, next),
            Step::Select => self.select(),
            Step::Finish { norm } => self.norm(*norm, &rows.kept_groups, 0..0),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::{Adapter, RowNorms};
    use crate::model::batch::{KvDtype, Readout};
    use crate::request::LoraSpec;

    /// Logits that look like some answer would be sent as one.
    #[test]
    fn an_overflow_is_never_taken_for_zeros() {
        let (model, _) = Model::tiny(1);
        let mut adapter = Adapter::fresh(&LoraSpec::default(), model.shape(), 5).unwrap();
        adapter.pairs_mut().map(|(_, pair)| pair).for_each(|layer| layer.b.fill(1e38));
        let adapter = Arc::new(PackedAdapter::new(&adapter, model.shape(), &RowNorms::new()).unwrap());
        let (groups, layout) = (model.kv_groups(), KvLayout { block_tokens: 4, blocks: 4, dtype: KvDtype::F16 });
        let mut exec = Exec::new(model, layout, groups).unwrap();
        let span = |ids, start, adapter| SequenceChunk { ids, start, blocks: &[2, 0], adapter, logits: Readout::All };
        assert!(exec.forward(&[span(&[1, 2, 3], 0, Some(&adapter))]).unwrap().iter().all(|x| x.is_nan()));
        assert!(exec.forward(&[span(&[4], 3, None)]).unwrap().iter().all(|x| x.is_nan()), "nor by a later row");
        assert!(exec.forward(&[span(&[1, 2, 3], 0, None)]).unwrap().iter().all(|x| x.is_finite()));
    }

    /// The log-probabilities of a sequence's next ids, read in chunks, or decoded one by one.
    fn logprobs(model: &Arc<Model>, dtype: KvDtype, ids: &[u32], chunk: usize) -> Vec<f64> {
        let layout = KvLayout { block_tokens: 16, blocks: ids.len().div_ceil(16), dtype };
        let blocks: Vec<u32> = (0..layout.blocks as u32).rev().collect();
        let mut exec = Exec::new(model.clone(), layout, model.kv_groups()).unwrap();
        let mut all = Vec::new();
        for (at, ids) in ids.chunks(chunk).enumerate() {
            let span = SequenceChunk { ids, start: at * chunk, blocks: &blocks, adapter: None, logits: Readout::All };
            all.extend_from_slice(exec.forward(&[span]).unwrap());
        }
        let of_row = |(row, id): (&[f32], &u32)| f64::from(row[*id as usize]) - crate::kernels::log_sum_exp(row);
        all.chunks_exact(model.vocab_size()).zip(&ids[1..]).map(of_row).collect()
    }

    /// A cache in bytes moves log-probabilities a little, and no more; and a chunk's borders change no bit of it.
    #[test]
    fn a_cache_in_bytes_moves_log_probabilities_little() {
        let (model, _) = Model::tiny(1);
        let ids: Vec<u32> = (0..200).map(|i| (i * 37 + 11) % 258).collect();
        let halves = logprobs(&model, KvDtype::F16, &ids, 200);
        let bytes = logprobs(&model, KvDtype::Int8, &ids, 200);
        assert_eq!(bytes, logprobs(&model, KvDtype::Int8, &ids, 7));
        let apart = halves.iter().zip(&bytes).map(|(a, b)| (a - b).abs());
        let (mean, most) = (apart.clone().sum::<f64>() / halves.len() as f64, apart.fold(0.0, f64::max));
        assert!(mean > 0.0 && mean < 0.01 && most < 0.05, "{mean} {most}");
        assert_eq!(model.kv_bytes_per_token(KvDtype::F16), 2 * 2 * 2 * 16 * 2);
        assert_eq!(model.kv_bytes_per_token(KvDtype::Int8), 2 * 2 * 2 * (16 + 2));
    }
}
