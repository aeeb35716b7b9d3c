//! Serving on the CPU: a flat batch of rows of different lengths, paged KV, each span its own adapter. A row's bits depend on nothing but
//! its own sequence and adapter: not on the batch, the chunking, or the blocks it lies in.
//!
//! A step reuses all that earlier steps allocated. Each of its operations is one region of the team: the input of a frozen layer is made,
//! quantised and shrunk in one pass over its rows, and its output is computed, expanded and added in one pass over the weights.

use std::sync::Arc;

use crate::adapter::{PackedLora, Site, packed};
use crate::error::Result;
use crate::kernels::cpu::{
    self, Adapters, AttentionScratch, GROUP_ROWS, HeadPrep, Linear, LoraPair, Next, QuantizedRows, RowGroup, RowTile,
    Team,
};
use crate::kernels::spec::{Activation, AttentionSpec};
use crate::model::Model;
use crate::model::batch::{Executor, KvLayout, SequenceChunk, reused};
use crate::model::kv::KvCache;
use crate::model::llama::{self, Norm, Ops};
use crate::request::Target;

/// Rows of logits whose memory is kept between steps.
const KEPT_LOGITS: usize = 64;

/// The serving executor: its buffers and its KV cache.
#[derive(Debug)]
pub(super) struct Exec {
    model: Arc<Model>,
    kv: KvCache,
    rows: Rows,
    /// The memory of all steps' pairs.
    pairs: Vec<Option<LoraPair<'static>>>,
    buffers: Buffers,
    logits: Vec<f32>,
}

impl Exec {
    pub fn new(model: Arc<Model>, kv: KvLayout) -> Result<Self> {
        kv.check()?;
        // As many as the cache has, so that growing sequences take no memory.
        let rows = Rows { tables: Vec::with_capacity(kv.blocks), ..Rows::default() };
        let kv = KvCache::new(model.config(), kv);
        Ok(Self { model, kv, rows, pairs: Vec::new(), buffers: Buffers::default(), logits: Vec::new() })
    }
}

impl Executor for Exec {
    fn forward(&mut self, spans: &[SequenceChunk<'_>]) -> Result<&[f32]> {
        self.kv.layout().check_spans(&self.model, spans)?;
        self.rows.fill(spans);
        let mut pairs = reused(std::mem::take(&mut self.pairs));
        self.rows.pairs(self.model.config().layers, &mut pairs);
        let mut pass = ExecPass {
            model: &self.model,
            team: Team::get(),
            rows: &self.rows,
            adapted: Adapted { rows: &self.rows, pairs: &pairs },
            kv: &mut self.kv,
            buffers: &mut self.buffers,
        };
        let done = llama::hidden(&self.model, &mut pass);
        self.pairs = reused(pairs);
        self.rows.adapters.clear();
        done?;
        let (head, rows) = (self.model.head(), self.rows.kept.len());
        if self.logits.capacity() > KEPT_LOGITS * head.rows() && rows <= KEPT_LOGITS {
            self.logits = Vec::new();
        }
        self.logits.resize(rows * head.rows(), 0.0);
        let layer = Linear { matrix: head, y: &mut self.logits, accumulate: false };
        // The next step begins anew.
        let [first, ..] = qkv_sites(0);
        let next = Next { matrices: [Some(self.model.matrix(first)), None, None, None], adapters: None };
        cpu::linear(Team::get(), &self.buffers.quantized, &mut [layer], None, next);
        Ok(&self.logits)
    }
}

/// The rows of a batch.
#[derive(Debug, Default)]
struct Rows {
    ids: Vec<u32>,
    /// All rows, in tiles of one sequence.
    tiles: Vec<Tile>,
    /// The sequences' KV blocks, one after another.
    tables: Vec<u32>,
    /// All rows, in groups of one adapter.
    groups: Vec<RowGroup>,
    adapters: Vec<Arc<PackedLora>>,
    /// The largest rank of the adapters.
    rank: usize,
    /// The rows that are wanted beyond the last layer, ascending; and one base group for each.
    kept: Vec<usize>,
    kept_groups: Vec<RowGroup>,
}

/// As [`RowTile`], its blocks being `tables[table..table + blocks]`.
#[derive(Debug, Clone, Copy)]
struct Tile {
    first: usize,
    count: usize,
    position: usize,
    table: usize,
    blocks: usize,
}

impl Rows {
    fn fill(&mut self, spans: &[SequenceChunk<'_>]) {
        self.ids.clear();
        self.tiles.clear();
        self.tables.clear();
        self.groups.clear();
        self.adapters.clear();
        self.kept.clear();
        self.kept_groups.clear();
        for span in spans {
            let (first, table) = (self.ids.len(), self.tables.len());
            self.ids.extend_from_slice(span.ids);
            self.tables.extend_from_slice(span.blocks);
            for at in (0..span.ids.len()).step_by(GROUP_ROWS) {
                let count = GROUP_ROWS.min(span.ids.len() - at);
                let (position, blocks) = (span.start + at, span.blocks.len());
                self.tiles.push(Tile { first: first + at, count, position, table, blocks });
            }
            let adapter = span.lora.map(|lora| self.number(lora));
            self.group(first..self.ids.len(), adapter);
            self.kept.extend(self.ids.len() - span.logits.count(span.ids.len())..self.ids.len());
        }
        self.kept_groups.extend((0..self.kept.len()).map(|first| RowGroup { first, count: 1, adapter: None }));
        self.rank = self.adapters.iter().map(|lora| lora.rank()).max().unwrap_or(0);
    }

    /// The adapter's number in this batch.
    fn number(&mut self, lora: &Arc<PackedLora>) -> usize {
        if let Some(at) = self.adapters.iter().rposition(|known| Arc::ptr_eq(known, lora)) {
            return at;
        }
        self.adapters.push(lora.clone());
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

    fn tile(&self, i: usize) -> RowTile<'_> {
        let Tile { first, count, position, table, blocks } = self.tiles[i];
        RowTile { first, count, position, blocks: &self.tables[table..table + blocks] }
    }
}

/// Activations, `[rows, width]` each.
#[derive(Debug, Default)]
struct Buffers {
    outs: Outs,
    /// What was normed, or what attention gave.
    input: Vec<f32>,
    /// The input of the next frozen layers, quantised; and shrunk by the adapters.
    quantized: QuantizedRows,
    shrunk: Vec<f32>,
    attention: AttentionScratch,
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
}

/// One batch going through the model.
struct ExecPass<'a> {
    model: &'a Model,
    team: &'static Team,
    rows: &'a Rows,
    adapted: Adapted<'a>,
    kv: &'a mut KvCache,
    buffers: &'a mut Buffers,
}

fn sites<const N: usize>(layer: usize, targets: [Target; N]) -> [Site; N] {
    targets.map(|target| Site { layer: layer as u32, target })
}

fn qkv_sites(layer: usize) -> [Site; 3] {
    sites(layer, [Target::QProj, Target::KProj, Target::VProj])
}

fn gate_up_sites(layer: usize) -> [Site; 2] {
    sites(layer, [Target::GateProj, Target::UpProj])
}

impl Rows {
    fn count(&self) -> usize {
        self.ids.len()
    }

    /// What each adapter has at each site of the model, `[layers, targets, adapters]`.
    fn pairs<'a>(&'a self, layers: usize, pairs: &mut Vec<Option<LoraPair<'a>>>) {
        let sites = (0..layers).flat_map(|layer| sites(layer, Target::ALL));
        pairs.extend(sites.flat_map(|site| self.adapters.iter().map(move |lora| lora.layer(site))));
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
    fn at(self, sites: &[Site]) -> Option<Adapters<'a>> {
        let (first, count) = (sites.first()?, self.rows.adapters.len());
        let at = packed::index(*first) * count;
        let pairs = self.pairs.get(at..at + sites.len() * count).filter(|pairs| !pairs.is_empty())?;
        Some(Adapters { groups: &self.rows.groups, pairs, count, rank: self.rows.rank })
    }
}

impl ExecPass<'_> {
    /// The frozen layers at `sites` and their adapters, on the input that was prepared last; `next` are the sites whose input is prepared
    /// next, none before the head.
    fn linear<const N: usize>(
        &mut self,
        sites: [Site; N],
        next: &[Site],
        accumulate: bool,
        outs: impl FnOnce(&mut Outs) -> [&mut Vec<f32>; N],
    ) {
        let (model, rows) = (self.model, self.rows);
        let Buffers { outs: buffers, quantized, shrunk, .. } = &mut *self.buffers;
        let mut outs = outs(buffers).into_iter();
        let mut layers = sites.map(|site| {
            let matrix = model.matrix(site);
            let y = outs.next().map_or(&mut [][..], |y| resized(y, rows.count(), matrix.rows()));
            Linear { matrix, y, accumulate }
        });
        let (adapters, next_adapters) = (self.adapted.at(&sites), self.adapted.at(next));
        let adapters = adapters.as_ref().map(|adapters| (adapters, &shrunk[..]));
        let mut matrices = [Some(model.head()), None, None, None];
        for (i, site) in next.iter().enumerate() {
            matrices[i] = Some(model.matrix(*site));
        }
        let next = Next { matrices, adapters: next_adapters.as_ref() };
        cpu::linear(self.team, quantized, &mut layers, adapters, next);
    }
}

/// A buffer as `[rows, width]`.
fn resized(buffer: &mut Vec<f32>, rows: usize, width: usize) -> &mut [f32] {
    buffer.resize(rows * width, 0.0);
    buffer
}

impl Ops for ExecPass<'_> {
    /// The buffers are the executor's, and each operation knows its own: what [`Ops::norm`], [`Ops::attention`] or [`Ops::swiglu`] made
    /// last is prepared for the frozen layers that follow it.
    type Rows = ();

    fn embed(&mut self) -> Result<()> {
        let width = self.model.config().width;
        let x = resized(&mut self.buffers.outs.x, self.rows.count(), width);
        for (x, id) in x.chunks_exact_mut(width).zip(&self.rows.ids) {
            self.model.embed(*id, x);
        }
        Ok(())
    }

    fn norm(&mut self, (): &(), norm: Norm) -> Result<()> {
        let (width, eps, weight) = (self.model.config().width, self.model.config().rms_eps, self.model.norm(norm));
        let (qkv, gate_up);
        let (sites, groups) = match norm {
            Norm::Attention(layer) => {
                qkv = qkv_sites(layer);
                (&qkv[..], &self.rows.groups)
            }
            Norm::Ffn(layer) => {
                gate_up = gate_up_sites(layer);
                (&gate_up[..], &self.rows.groups)
            }
            Norm::Final => (&[][..], &self.rows.kept_groups),
        };
        let Buffers { outs: Outs { x, .. }, input, quantized, shrunk, .. } = &mut *self.buffers;
        let input = resized(input, x.len() / width, width);
        let normed = |row: usize, out: &mut [f32]| cpu::rms_norm_row(&x[row * width..][..width], weight, eps, out);
        let adapters = self.adapted.at(sites);
        let adapters = adapters.as_ref().map(|adapters| (adapters, shrunk));
        cpu::prepare(self.team, groups, (input, width), quantized, adapters, normed);
        Ok(())
    }

    fn qkv(&mut self, (): &(), layer: usize) -> Result<[(); 3]> {
        self.linear(qkv_sites(layer), &sites(layer, [Target::OProj]), false, |outs| {
            [&mut outs.q, &mut outs.k, &mut outs.v]
        });
        Ok([(); 3])
    }

    fn attention(&mut self, layer: usize, _: [(); 3]) -> Result<()> {
        // Everything is read back after rounding, this chunk's rows included: so a chunk's borders change no bit.
        let (config, rows, rope) = (self.model.config(), self.rows, &self.model.rope);
        let (width, tile) = (config.heads * config.head_dim, |i| rows.tile(i));
        let Buffers { outs: Outs { q, k, v, .. }, input, quantized, shrunk, attention } = &mut *self.buffers;
        let kv = self.kv.layer_mut(layer);
        let prep = HeadPrep { angles: Some(&|position| rope.at(position)), ..HeadPrep::default() };
        cpu::rope_and_store(self.team, rows.tiles.len(), tile, (q, k, v), kv, prep);
        let spec = AttentionSpec::causal(config.heads, config.head_dim);
        let input = resized(input, rows.count(), width);
        cpu::attention(self.team, rows.tiles.len(), tile, q, self.kv.layer(layer), spec, (attention, input));
        let adapters = self.adapted.at(&sites(layer, [Target::OProj]));
        let adapters = adapters.as_ref().map(|adapters| (adapters, shrunk));
        cpu::prepare(self.team, &rows.groups, (input, width), quantized, adapters, |_, _| {});
        Ok(())
    }

    fn gate_up(&mut self, (): &(), layer: usize) -> Result<[(); 2]> {
        self.linear(gate_up_sites(layer), &sites(layer, [Target::DownProj]), false, |outs| {
            [&mut outs.gate, &mut outs.up]
        });
        Ok([(); 2])
    }

    fn swiglu(&mut self, layer: usize, _: [(); 2]) -> Result<()> {
        let width = self.model.config().ffn;
        let Buffers { outs: Outs { gate, up, .. }, quantized, shrunk, .. } = &mut *self.buffers;
        let gated = |row: usize, gate: &mut [f32]| cpu::gated_row(Activation::Silu, gate, &up[row * width..][..width]);
        let adapters = self.adapted.at(&sites(layer, [Target::DownProj]));
        let adapters = adapters.as_ref().map(|adapters| (adapters, shrunk));
        cpu::prepare(self.team, &self.rows.groups, (gate, width), quantized, adapters, gated);
        Ok(())
    }

    fn residual_linear(&mut self, (): (), (): (), site: Site) -> Result<()> {
        let layer = site.layer as usize;
        let (gate_up, qkv) = (gate_up_sites(layer), qkv_sites(layer + 1));
        let next = match site.target {
            Target::DownProj if layer + 1 < self.model.config().layers => &qkv[..],
            Target::DownProj => &[],
            _ => &gate_up[..],
        };
        self.linear([site], next, true, |outs| [&mut outs.x]);
        Ok(())
    }

    fn select(&mut self, (): ()) -> Result<()> {
        let (width, kept, x) = (self.model.config().width, &self.rows.kept, &mut self.buffers.outs.x);
        for (to, from) in kept.iter().enumerate() {
            x.copy_within(from * width..(from + 1) * width, to * width);
        }
        x.truncate(kept.len() * width);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::Lora;
    use crate::model::batch::{KvDtype, Readout};
    use crate::request::LoraSpec;

    /// Logits that look like some answer would be sent as one.
    #[test]
    fn an_overflow_is_never_taken_for_zeros() {
        let (model, _) = Model::tiny(1);
        let mut lora = Lora::fresh(&LoraSpec::default(), model.shape(), 5).unwrap();
        lora.layers.values_mut().for_each(|layer| layer.b.fill(1e38));
        let lora = Arc::new(PackedLora::new(&lora, model.shape()).unwrap());
        let mut exec = Exec::new(model, KvLayout { block_tokens: 4, blocks: 4, dtype: KvDtype::F16 }).unwrap();
        let span = |ids, start, lora| SequenceChunk { ids, start, blocks: &[2, 0], lora, logits: Readout::All };
        assert!(exec.forward(&[span(&[1, 2, 3], 0, Some(&lora))]).unwrap().iter().all(|x| x.is_nan()));
        assert!(exec.forward(&[span(&[4], 3, None)]).unwrap().iter().all(|x| x.is_nan()), "nor by a later row");
        assert!(exec.forward(&[span(&[1, 2, 3], 0, None)]).unwrap().iter().all(|x| x.is_finite()));
    }

    /// The log-probabilities of a sequence's next ids, read in chunks, or decoded one by one.
    fn logprobs(model: &Arc<Model>, dtype: KvDtype, ids: &[u32], chunk: usize) -> Vec<f64> {
        let layout = KvLayout { block_tokens: 16, blocks: ids.len().div_ceil(16), dtype };
        let blocks: Vec<u32> = (0..layout.blocks as u32).rev().collect();
        let mut exec = Exec::new(model.clone(), layout).unwrap();
        let mut all = Vec::new();
        for (at, ids) in ids.chunks(chunk).enumerate() {
            let span = SequenceChunk { ids, start: at * chunk, blocks: &blocks, lora: None, logits: Readout::All };
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
