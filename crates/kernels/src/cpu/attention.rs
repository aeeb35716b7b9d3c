//! Causal grouped-query attention with online softmax (Milakov & Gimelshein 2018; FlashAttention's order of work, Dao
//! et al. 2022) over paged keys and values.
//!
//! A query takes its positions in partitions of [`PARTITION`] and these in spans of [`SPAN`], both aligned to the absolute
//! position, within a span in order; partitions are merged in their order, and every score is summed over the head's
//! dimensions in order. So a row's bits do not depend on the blocks it lies in, the chunk it came with, the rows beside
//! it, or the threads: few queries have their partitions computed side by side, many take them one after the other, by
//! the same operations.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use super::Shared;
use super::attend::{Partial, Space, attend_bytes, attend_halves, merge};
use super::cells::Ahead;
use super::kv::{KvDtype, KvView, RowTile};
use super::lora::GROUP_ROWS;
use super::simd::{LANES, Level, dispatch};
use super::team::Team;
use crate::spec::AttentionSpec;

/// Widest head the kernel's buffers hold.
pub const MAX_HEAD_DIM: usize = 256;

/// Heads have a multiple of so many dimensions.
pub const HEAD_DIM_STEP: usize = LANES;

/// Most heads that share a KV head.
pub const MAX_GROUP: usize = 16;

/// Positions whose softmax is computed by itself, then merged with those before.
pub(super) const PARTITION: usize = 512;

/// Positions between two looks at the running maximum.
pub(super) const SPAN: usize = 64;

/// Tasks a thread, where there are no more the partitions of all rows are computed side by side.
const FEW_TASKS: usize = 8;

/// What attention needs beside its result. It keeps its memory from step to step.
#[derive(Debug, Default)]
pub struct AttentionScratch {
    pieces: Vec<Piece>,
    /// Partial results, `[query of a split tile, partition]`, see [`Partial`].
    partials: Vec<f32>,
    /// How many partitions of a split tile's KV head are yet to be computed.
    left: Vec<AtomicU32>,
}

/// What a thread takes at a time: a tile's queries of one KV head, over all their positions or over one partition.
#[derive(Debug, Clone, Copy)]
struct Piece {
    tile: u32,
    kv_head: u32,
    /// Of a split tile.
    split: Option<Split>,
}

impl Piece {
    /// The first span that it reads.
    fn begins<'t>(&self, tile: impl Fn(usize) -> RowTile<'t>, kv: KvView<'_>, spec: &AttentionSpec) -> Ahead {
        let tile = tile(self.tile as usize);
        let first =
            self.split.map_or(0, |split| split.partition as usize * PARTITION).max(spec.first_seen(tile.position));
        let (start, end) = (first / SPAN * SPAN, tile.position + tile.count);
        // Where a window begins within a span its first blocks may be gone; a span later is soon enough.
        let start = if start < first { start + SPAN } else { start };
        Ahead::new(kv, (tile.blocks, self.kv_head as usize), start, end)
    }
}

/// One partition of a split tile.
#[derive(Debug, Clone, Copy)]
struct Split {
    partition: u32,
    /// Which of [`AttentionScratch::left`] counts it.
    counter: u32,
    /// Where the tile's partial results of this KV head begin.
    partials: usize,
}

/// out = softmax(scores) V for each row, with the scores and over the positions that `spec` says. `q`, `out`: `[rows,
/// heads * head_dim]`. What lies before the first position that a tile's first row sees is never read.
pub fn attention<'t>(
    team: &Team,
    tiles: usize,
    tile: impl Fn(usize) -> RowTile<'t> + Sync,
    q: &[f32],
    kv: KvView<'_>,
    spec: AttentionSpec,
    out: (&mut AttentionScratch, &mut [f32]),
) {
    attention_at(Level::best(), team, tiles, tile, q, kv, spec, out);
}

#[expect(clippy::too_many_arguments, reason = "the level is for tests")]
fn attention_at<'t>(
    level: Level,
    team: &Team,
    tiles: usize,
    tiles_of: impl Fn(usize) -> RowTile<'t> + Sync,
    q: &[f32],
    kv: KvView<'_>,
    spec: AttentionSpec,
    (scratch, out): (&mut AttentionScratch, &mut [f32]),
) {
    let (shape, heads) = (kv.shape, spec.heads);
    let group = heads / shape.kv_heads;
    assert!(
        q.len() == out.len()
            && shape.head_dim.is_multiple_of(LANES)
            && shape.head_dim <= MAX_HEAD_DIM
            && heads.is_multiple_of(shape.kv_heads)
            && group <= MAX_GROUP
            && spec.window != Some(0),
        "the model was checked for what the kernel can do"
    );
    let few = tiles * shape.kv_heads <= FEW_TASKS * team.threads();
    scratch.plan((0..tiles).map(&tiles_of), few, group, &spec, kv);
    let AttentionScratch { pieces, partials, left } = scratch;
    let (out, partials, left) = (Shared(out.as_mut_ptr()), Shared(partials.as_mut_ptr()), &*left);
    let rows = q.len() / (heads * shape.head_dim);
    team.each(pieces.len(), |i| {
        let Piece { tile: number, kv_head, split } = pieces[i];
        let tile = tiles_of(number as usize);
        assert!(tile.count <= GROUP_ROWS && tile.first + tile.count <= rows, "a tile fits");
        let following = pieces.get(i + 1).map_or(Ahead::NONE, |next| next.begins(&tiles_of, kv, &spec));
        let task = &Task { tile, kv, kv_head: kv_head as usize, spec, group, following };
        let to = match split {
            None => Output::Rows(out),
            Some(split) => Output::Partials { partition: split.partition as usize, at: split.partials, to: partials },
        };
        SPACE.with_borrow_mut(|space| match shape.dtype {
            KvDtype::F16 => {
                dispatch!(level, attend_halves, task: &Task<'_>, q: &[f32], to: Output, space: &mut Space)
            }
            KvDtype::Int8 => {
                dispatch!(level, attend_bytes, task: &Task<'_>, q: &[f32], to: Output, space: &mut Space)
            }
        });
        let Some(split) = split else { return };
        // Who computes the last partition merges all of them: it sees what the others wrote before they counted.
        if left[split.counter as usize].fetch_sub(1, Ordering::AcqRel) == 1 {
            let at = split.partials;
            dispatch!(level, merge, task: &Task<'_>, partials: Shared, at: usize, out: Shared);
        }
    });
}

thread_local! {
    static SPACE: RefCell<Space> = const { RefCell::new(Space::EMPTY) };
}

impl AttentionScratch {
    /// Cuts the tiles into pieces. The last rows of a sequence see the most: they go first, so that no thread is left with
    /// one at the end.
    fn plan<'t>(
        &mut self,
        tiles: impl DoubleEndedIterator<Item = RowTile<'t>> + ExactSizeIterator,
        few: bool,
        group: usize,
        spec: &AttentionSpec,
        kv: KvView<'_>,
    ) {
        self.pieces.clear();
        let (kv_heads, mut counters, mut partials) = (kv.shape.kv_heads as u32, 0, 0);
        for (tile, of) in tiles.enumerate().rev() {
            let tile = tile as u32;
            let partitions = of.partitions(spec);
            // What goes through its positions once is better cut than left to one thread.
            if partitions.len() == 1 || !(few || of.count * group <= MAX_GROUP) {
                self.pieces.extend((0..kv_heads).map(|kv_head| Piece { tile, kv_head, split: None }));
                continue;
            }
            let len = of.count * group * partitions.len() * Partial::len(kv.shape.head_dim);
            for partition in partitions.clone() {
                self.pieces.extend((0..kv_heads).map(|kv_head| {
                    let counter = counters as u32 + kv_head;
                    let split =
                        Split { partition: partition as u32, counter, partials: partials + len * kv_head as usize };
                    Piece { tile, kv_head, split: Some(split) }
                }));
            }
            counters += kv_heads as usize;
            partials += len * kv_heads as usize;
            if self.left.len() < counters {
                self.left.resize_with(counters, AtomicU32::default);
            }
            let left = &mut self.left[counters - kv_heads as usize..counters];
            left.iter_mut().for_each(|left| *left.get_mut() = partitions.len() as u32);
        }
        if self.partials.len() < partials {
            self.partials.resize(partials, 0.0);
        }
    }
}

/// The queries of a tile's rows that share a KV head.
pub(super) struct Task<'a> {
    pub tile: RowTile<'a>,
    pub kv: KvView<'a>,
    pub kv_head: usize,
    pub spec: AttentionSpec,
    pub group: usize,
    /// What the thread most likely reads next.
    pub following: Ahead,
}

/// Where a task's results go.
#[derive(Clone, Copy)]
pub(super) enum Output {
    /// To the queries' heads of their rows: the task has all their positions.
    Rows(Shared),
    /// To the partial results of the task's queries, which begin at `at`: the task has one partition.
    Partials { partition: usize, at: usize, to: Shared },
}

impl Task<'_> {
    /// Queries of the task: rows first, then heads.
    #[inline(always)]
    pub fn queries(&self) -> usize {
        self.tile.count * self.group
    }

    /// Where query i's head begins in q and in out.
    #[inline(always)]
    pub fn at(&self, i: usize) -> usize {
        let (row, head) = (self.tile.first + i / self.group, self.kv_head * self.group + i % self.group);
        (row * self.spec.heads + head) * self.kv.shape.head_dim
    }

    /// The positions that query i sees.
    #[inline(always)]
    pub fn seen(&self, i: usize) -> Range<usize> {
        let position = self.tile.position + i / self.group;
        self.spec.first_seen(position)..position + 1
    }

    /// The values of query i's partial result of a partition.
    #[inline(always)]
    pub fn partial(&self, i: usize, partition: usize) -> usize {
        let partitions = self.tile.partitions(&self.spec);
        (i * partitions.len() + partition - partitions.start) * Partial::len(self.kv.shape.head_dim)
    }
}

/// The partitions that have some of these positions.
#[inline(always)]
pub(super) fn partitions(positions: &Range<usize>) -> Range<usize> {
    positions.start / PARTITION..positions.end.div_ceil(PARTITION)
}

impl RowTile<'_> {
    /// The partitions that some of its rows see.
    fn partitions(&self, spec: &AttentionSpec) -> Range<usize> {
        partitions(&(spec.first_seen(self.position)..self.position + self.count))
    }
}

#[cfg(test)]
mod tests {
    use super::super::kv::{HeadPrep, KvShape, KvViewMut, SCALE_BLOCK, rope_and_store};
    use super::super::simd::f16_value;
    use super::*;
    use crate::testing::sinusoid;
    use proptest::prelude::*;

    /// A sequence in a cache of its own, its blocks in an order of their own.
    struct Sequence {
        shape: KvShape,
        spec: AttentionSpec,
        blocks: Vec<u32>,
        keys: Vec<u16>,
        values: Vec<u16>,
        /// `[length, heads * head_dim]`, already turned.
        q: Vec<f32>,
    }

    fn sequence(shape: KvShape, spec: AttentionSpec, length: usize, reversed: bool, seed: u64) -> Sequence {
        let count = length.div_ceil(shape.block_tokens);
        let mut blocks: Vec<u32> = (0..count as u32).collect();
        if reversed {
            blocks.reverse();
        }
        // What nobody has written is not a number: no kernel may read it.
        let cache = || vec![0x7E00; count * shape.block_len()];
        let (mut keys, mut values) = (cache(), cache());
        let width = shape.kv_heads * shape.head_dim;
        let mut q = sinusoid(length * spec.heads * shape.head_dim, seed);
        let (mut k, v) = (sinusoid(length * width, seed + 1), sinusoid(length * width, seed + 2));
        let angles: Vec<f32> = (0..length * shape.head_dim / 2).map(|i| (i as f32 * 0.37).sin()).collect();
        let half = shape.head_dim / 2;
        let at = |position: usize| (&angles[position * half..][..half], &angles[position * half..][..half]);
        let kv = KvViewMut { shape, keys: &mut keys, values: &mut values };
        let tile = |i: usize| RowTile { first: i, count: 1, position: i, blocks: &blocks };
        let prep = HeadPrep { angles: Some(&at), ..HeadPrep::default() };
        rope_and_store(Team::get(), length, tile, (&mut q, &mut k, &v), kv, prep);
        Sequence { shape, spec, blocks, keys, values, q }
    }

    impl Sequence {
        /// The rows from `from` on, in tiles of at most `tile` rows.
        fn attend(&self, level: Level, from: usize, tile: usize) -> Vec<f32> {
            let width = self.spec.heads * self.shape.head_dim;
            let rows = self.q.len() / width - from;
            let mut out = vec![0.0; rows * width];
            let tiles = |i: usize| RowTile {
                first: i * tile,
                count: tile.min(rows - i * tile),
                position: from + i * tile,
                blocks: &self.blocks,
            };
            let kv = KvView { shape: self.shape, keys: &self.keys, values: &self.values };
            let q = &self.q[from * width..];
            let out_and_scratch = (&mut AttentionScratch::default(), &mut out[..]);
            attention_at(level, Team::get(), rows.div_ceil(tile), tiles, q, kv, self.spec, out_and_scratch);
            out
        }

        /// What other sequences may have written by now where no row from `from` on looks is not a number.
        fn forget_before(mut self, from: usize) -> Self {
            let KvShape { block_tokens, kv_heads, head_dim, dtype } = self.shape;
            for t in 0..self.spec.first_seen(from) {
                for head in 0..kv_heads {
                    let (place, at) = (self.shape.head(self.blocks[t / block_tokens], head), t % block_tokens);
                    if dtype == KvDtype::Int8 {
                        let scales = (0..head_dim.div_ceil(SCALE_BLOCK)).map(|block| block * block_tokens + at);
                        for scale in scales.map(|scale| place + self.shape.scales() + scale) {
                            (self.keys[scale], self.values[scale]) = (0x7E00, 0x7E00);
                        }
                        continue;
                    }
                    (0..head_dim).for_each(|d| self.keys[place + d * block_tokens + at] = 0x7E00);
                    self.values[place + at * head_dim..][..head_dim].fill(0x7E00);
                }
            }
            self
        }

        /// One head of one row in double precision, straight from the definition.
        fn expected(&self, row: usize, head: usize) -> Vec<f64> {
            let KvShape { block_tokens, kv_heads, head_dim, .. } = self.shape;
            let group = self.spec.heads / kv_heads;
            let head_at = |t: usize| self.shape.head(self.blocks[t / block_tokens], head / group);
            // Number i of a head, of dimension d, at position t.
            let number = |cells: &[u16], t: usize, i: usize, d: usize| match self.shape.dtype {
                KvDtype::F16 => f64::from(f16_value(cells[head_at(t) + i])),
                KvDtype::Int8 => {
                    let byte = cells[head_at(t) + i / 2].to_ne_bytes()[i % 2] as i8;
                    let scale = self.shape.scales() + d / SCALE_BLOCK * block_tokens + t % block_tokens;
                    f64::from(byte) * f64::from(f16_value(cells[head_at(t) + scale]))
                }
            };
            let q = &self.q[(row * self.spec.heads + head) * head_dim..][..head_dim];
            let score = |t: usize| {
                let key = |d: usize| number(&self.keys, t, d * block_tokens + t % block_tokens, d);
                let product = (0..head_dim).map(|d| f64::from(q[d]) * key(d)).sum::<f64>();
                let scaled = product * f64::from(self.spec.scale);
                self.spec.softcap.map_or(scaled, |cap| f64::from(cap) * (scaled / f64::from(cap)).tanh())
            };
            let first = self.spec.window.map_or(0, |window| (row + 1).saturating_sub(window));
            let scores: Vec<f64> = (first..=row).map(score).collect();
            let largest = scores.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
            let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
            let of = |d: usize| {
                let v = |t: usize| number(&self.values, t, t % block_tokens * head_dim + d, d);
                let sum = weights.iter().zip(first..).map(|(w, t)| w * v(t)).sum::<f64>();
                sum / weights.iter().sum::<f64>()
            };
            (0..head_dim).map(of).collect()
        }
    }

    /// Every width and group that a base of ours has, with and without caps and windows.
    fn specs() -> impl Strategy<Value = (KvShape, AttentionSpec)> {
        let shapes = (
            prop::sample::select(vec![1usize, 3, 4, 16, 24, 32]),
            1usize..3,
            prop::sample::select(vec![16usize, 32, 48, 64, 80, 96, 128, 256]),
            prop::sample::select(vec![1usize, 2, 3, 4, 5, 7, 8, 16]),
        );
        let dtypes = prop::sample::select(vec![KvDtype::F16, KvDtype::Int8]);
        let forms = (prop::option::of(2.0f32..20.0), prop::option::of(1usize..100), 0.4f32..4.0, dtypes);
        (shapes, forms).prop_map(|((block_tokens, kv_heads, head_dim, group), (softcap, window, scale, dtype))| {
            let spec = AttentionSpec::causal(kv_heads * group, head_dim);
            let spec = AttentionSpec { scale: scale / head_dim as f32, softcap, window, ..spec };
            (KvShape { block_tokens, kv_heads, head_dim, dtype }, spec)
        })
    }

    /// A row deep in a sequence has the same bits decoded alone, its partitions side by side, as within a long prompt and
    /// beside others; with a window that begins within a partition too. And they are close to the definition.
    #[test]
    fn partitions_do_not_depend_on_who_computes_them() {
        let length = 2 * PARTITION + 300;
        for (group, window, dtype) in
            [(3, None, KvDtype::F16), (7, Some(PARTITION + 100), KvDtype::Int8), (16, Some(70), KvDtype::F16)]
        {
            let shape = KvShape { block_tokens: 16, kv_heads: 2, head_dim: 32, dtype };
            let spec = AttentionSpec { window, ..AttentionSpec::causal(2 * group, 32) };
            let own = sequence(shape, spec, length, true, 3);
            let width = spec.heads * shape.head_dim;
            let of_prompt = own.attend(Level::best(), 0, GROUP_ROWS);
            for row in [length - 1, 2 * PARTITION, 2 * PARTITION - 1, PARTITION + 1] {
                let whole = &of_prompt[row * width..][..width];
                let (mut q, mut out) = (own.q[row * width..][..width].to_vec(), vec![0.0; width]);
                let blocks = &own.blocks;
                let kv = KvView { shape, keys: &own.keys, values: &own.values };
                let mut scratch = AttentionScratch::default();
                let tile = |_| RowTile { first: 0, count: 1, position: row, blocks };
                attention(Team::get(), 1, tile, &q, kv, spec, (&mut scratch, &mut out));
                assert_eq!(out, whole, "{group} {window:?} {row}");
                assert!(scratch.pieces.len() >= 2 * window.map_or(row / PARTITION + 1, |w| w.div_ceil(PARTITION)));
                // Beside a row at the beginning, again from the same memory.
                q.splice(0..0, own.q[5 * width..][..width].iter().copied());
                let mut both = vec![0.0; 2 * width];
                let tile = |i: usize| RowTile { first: i, count: 1, position: [5, row][i], blocks };
                attention(Team::get(), 2, tile, &q, kv, spec, (&mut scratch, &mut both));
                assert_eq!(&both[width..], whole);
                assert_eq!(both[..width], of_prompt[5 * width..][..width]);
                for (head, got) in whole.chunks_exact(32).enumerate() {
                    for (got, want) in got.iter().zip(own.expected(row, head)) {
                        assert!((f64::from(*got) - want).abs() <= 1e-4 * want.abs().max(1.0), "{got} {want}");
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Close to the definition; and the same bits in every form, chunk, tile and order of blocks.
        #[test]
        fn agrees_with_the_definition(
            (shape, spec) in specs(),
            length in 1usize..150, from in 0usize..150, tile in 1usize..=GROUP_ROWS, seed in 0u64..100,
        ) {
            let own = sequence(shape, spec, length, false, seed);
            let all = own.attend(Level::Portable, 0, 1);
            for (row, out) in all.chunks_exact(spec.heads * shape.head_dim).enumerate() {
                for (head, out) in out.chunks_exact(shape.head_dim).enumerate() {
                    for (got, want) in out.iter().zip(own.expected(row, head)) {
                        prop_assert!((f64::from(*got) - want).abs() <= 1e-4 * want.abs().max(1.0), "{} {}", got, want);
                    }
                }
            }
            let from = from % length;
            let part = &all[from * spec.heads * shape.head_dim..];
            let own = own.forget_before(from);
            let other = KvShape { block_tokens: 16, ..shape };
            let other = sequence(other, spec, length, true, seed).forget_before(from);
            for level in Level::all() {
                prop_assert_eq!(&own.attend(level, from, tile)[..], part, "{:?}", level);
                prop_assert_eq!(&other.attend(level, from, tile)[..], part);
            }
        }
    }
}
