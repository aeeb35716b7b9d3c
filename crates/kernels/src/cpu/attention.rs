//! Causal grouped-query attention with online softmax (Milakov & Gimelshein 2018; FlashAttention's order of work, Dao
//! et al. 2022) over paged keys and values in half precision.
//!
//! Positions are taken in spans of [`SPAN`] aligned to the absolute position, within a span in order, and every score
//! is summed over the head's dimensions in order: a row's bits do not depend on the blocks it lies in, the chunk it
//! came with, or the rows beside it.

use std::ops::Range;

use super::Shared;
use super::kv::{KvView, RowTile};
use super::lora::GROUP_ROWS;
use super::simd::{LANES, Level, Simd, dispatch, exp, larger, max_pairwise, sum_pairwise, tanh, unrolled};
use super::team::Team;
use crate::spec::AttentionSpec;

/// Widest head the kernel's buffers hold.
pub const MAX_HEAD_DIM: usize = 256;

/// Heads have a multiple of so many dimensions.
pub const HEAD_DIM_STEP: usize = LANES;

/// Most heads that share a KV head.
pub const MAX_GROUP: usize = 16;

/// Positions between two looks at the running maximum.
const SPAN: usize = 64;

/// out = softmax(scores) V for each row, with the scores and over the positions that `spec` says. `q`, `out`: `[rows,
/// heads * head_dim]`. What lies before the first position that a tile's first row sees is never read.
pub fn attention<'t>(
    team: &Team,
    tiles: usize,
    tile: impl Fn(usize) -> RowTile<'t> + Sync,
    q: &[f32],
    kv: KvView<'_>,
    spec: AttentionSpec,
    out: &mut [f32],
) {
    attention_at(Level::best(), team, tiles, tile, q, kv, spec, out);
}

#[expect(clippy::too_many_arguments, reason = "the level is for tests")]
fn attention_at<'t>(
    level: Level,
    team: &Team,
    tiles: usize,
    tile: impl Fn(usize) -> RowTile<'t> + Sync,
    q: &[f32],
    kv: KvView<'_>,
    spec: AttentionSpec,
    out: &mut [f32],
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
    let shared = Shared(out.as_mut_ptr());
    // The last rows of a sequence see the most: they go first, so that no thread is left with one at the end.
    team.each(tiles * shape.kv_heads, |task| {
        let (tile, kv_head) = (tile(tiles - 1 - task / shape.kv_heads), task % shape.kv_heads);
        let task = &Task { tile, kv, kv_head, spec, group, out: shared, rows: q.len() / (heads * shape.head_dim) };
        dispatch!(level, attend, task: &Task<'_>, q: &[f32]);
    });
}

/// The queries of a tile's rows that share a KV head.
struct Task<'a> {
    tile: RowTile<'a>,
    kv: KvView<'a>,
    kv_head: usize,
    spec: AttentionSpec,
    group: usize,
    out: Shared,
    rows: usize,
}

impl Task<'_> {
    /// Where query i's head begins in q and in out: rows first, then heads.
    #[inline(always)]
    fn at(&self, i: usize) -> usize {
        let (row, head) = (self.tile.first + i / self.group, self.kv_head * self.group + i % self.group);
        (row * self.spec.heads + head) * self.kv.shape.head_dim
    }
}

/// What an online softmax knows of one query.
#[derive(Clone, Copy)]
struct OnlineSoftmax {
    largest: f32,
    /// Of e^(score - largest).
    sum: f32,
}

/// Queries that go through the positions together, of at most D dimensions.
struct Run<const N: usize, const D: usize> {
    /// Scaled.
    q: [[f32; D]; N],
    /// Of a span's positions; then what they weigh.
    scores: [[f32; SPAN]; N],
    running: [OnlineSoftmax; N],
    /// Of the weighed values, relative to the running maximum.
    sums: [[f32; D]; N],
}

#[inline(always)]
fn attend<S: Simd>(s: S, task: &Task<'_>, q: &[f32]) {
    let queries = task.tile.count * task.group;
    assert!(task.tile.count <= GROUP_ROWS && task.tile.first + task.tile.count <= task.rows, "a tile fits");
    // Small buffers for small heads: to clear them costs time.
    match task.kv.shape.head_dim {
        0..=64 => attend_all::<S, 64>(s, task, q, queries),
        65..=128 => attend_all::<S, 128>(s, task, q, queries),
        _ => attend_all::<S, MAX_HEAD_DIM>(s, task, q, queries),
    }
}

#[inline(always)]
fn attend_all<S: Simd, const D: usize>(s: S, task: &Task<'_>, q: &[f32], queries: usize) {
    let mut i = 0;
    macro_rules! runs {
        ($($n:literal by $units:literal)*) => {
            $(while $n * $units <= S::SUMS && queries - i >= $n {
                attend_run::<S, $n, $units, D>(s, task, q, i);
                i += $n;
            })*
        };
    }
    // As many sums side by side as the registers hold.
    runs!(12 by 1 6 by 2 6 by 1 3 by 4 3 by 2 1 by 4);
}

/// Queries `i..i + N` over all their positions, scores of `U * 16` positions at a time.
#[inline(always)]
fn attend_run<S: Simd, const N: usize, const U: usize, const D: usize>(s: S, task: &Task<'_>, q: &[f32], i: usize) {
    let dim = task.kv.shape.head_dim;
    let mut run = Run {
        q: [[0.0; D]; N],
        scores: [[0.0; SPAN]; N],
        running: [OnlineSoftmax { largest: f32::NEG_INFINITY, sum: 0.0 }; N],
        sums: [[0.0; D]; N],
    };
    let scale = task.spec.scale;
    for (j, to) in run.q.iter_mut().enumerate() {
        for (to, from) in to.iter_mut().zip(&q[task.at(i + j)..][..dim]) {
            *to = scale * from;
        }
    }
    // The last of these queries sees the latest position, the first one the earliest.
    let position = |j: usize| task.tile.position + (i + j) / task.group;
    let (first, end) = (task.spec.first_seen(position(0)), position(N - 1) + 1);
    for start in (first / SPAN * SPAN..end).step_by(SPAN) {
        let here = SPAN.min(end - start);
        let units = here.div_ceil(LANES);
        // What nobody sees is not read: it may be another sequence's by now.
        let unseen = first.saturating_sub(start);
        let mut unit = unseen / LANES;
        if task.kv.shape.block_tokens.is_multiple_of(LANES) {
            let keys = |unit: usize| keys_of(task, start + unit * LANES);
            while unit + U <= units {
                score::<S, N, U, D>(s, dim, std::array::from_fn(|u| keys(unit + u)), unit, &mut run);
                unit += U;
            }
            while unit < units {
                score(s, dim, [keys(unit)], unit, &mut run);
                unit += 1;
            }
        } else {
            let mut gathered = [0; MAX_HEAD_DIM * LANES];
            while unit < units {
                score(s, dim, [gather_keys(task, start + unit * LANES, first..end, &mut gathered)], unit, &mut run);
                unit += 1;
            }
        }
        for j in 0..N {
            let within = |position: usize| position.saturating_sub(start).min(here);
            let seen = within(task.spec.first_seen(position(j)))..within(position(j) + 1);
            softmax_update(
                &mut run.scores[j].as_chunks_mut().0[..units],
                seen,
                task.spec.softcap,
                &mut run.running[j],
                &mut run.sums[j][..dim],
            );
        }
        // What a query does not see has no weight, and what a later row of its tile wrote reaches it only where that is
        // not a number: then the sequence fails as a whole.
        let mut part = 0;
        while part + U * LANES <= dim {
            add_values::<S, N, U, D>(s, task, start + unseen..start + here, start, part, &mut run);
            part += U * LANES;
        }
        while part < dim {
            add_values::<S, N, 1, D>(s, task, start + unseen..start + here, start, part, &mut run);
            part += LANES;
        }
    }
    for j in 0..N {
        let inverse = 1.0 / run.running[j].sum;
        // SAFETY: this task alone writes these heads of these rows, which lie in out.
        let out = unsafe { task.out.part(task.at(i + j), dim) };
        for (out, sum) in out.iter_mut().zip(&run.sums[j]) {
            *out = sum * inverse;
        }
    }
}

/// The keys of 16 positions: `head_dim` vectors `stride` apart.
#[derive(Clone, Copy, Default)]
struct Keys<'a> {
    bits: &'a [u16],
    stride: usize,
}

/// The keys of the positions from `position` on, where a block holds a multiple of 16.
#[inline(always)]
fn keys_of<'a>(task: &Task<'a>, position: usize) -> Keys<'a> {
    let shape = task.kv.shape;
    let tokens = shape.block_tokens;
    let at = shape.head(task.tile.blocks[position / tokens], task.kv_head) + position % tokens;
    Keys { bits: &task.kv.keys[at..][..(shape.head_dim - 1) * tokens + LANES], stride: tokens }
}

/// The same, put together from any blocks; what lies outside `seen` is anything.
#[inline(always)]
fn gather_keys<'a>(task: &Task<'_>, position: usize, seen: Range<usize>, gathered: &'a mut [u16]) -> Keys<'a> {
    let shape = task.kv.shape;
    let tokens = shape.block_tokens;
    for lane in seen.start.saturating_sub(position)..LANES.min(seen.end - position) {
        let (block, within) = (task.tile.blocks[(position + lane) / tokens], (position + lane) % tokens);
        let from = &task.kv.keys[shape.head(block, task.kv_head) + within..];
        for d in 0..shape.head_dim {
            gathered[d * LANES + lane] = from[d * tokens];
        }
    }
    Keys { bits: &gathered[..shape.head_dim * LANES], stride: LANES }
}

/// The products of all queries with U times 16 keys, into the units from `unit` on of their scores.
#[inline(always)]
fn score<S: Simd, const N: usize, const U: usize, const D: usize>(
    s: S,
    dim: usize,
    keys: [Keys<'_>; U],
    unit: usize,
    run: &mut Run<N, D>,
) {
    let mut sums = [[s.splat(0.0); U]; N];
    for d in 0..dim.min(D) {
        let mut key = [s.splat(0.0); U];
        unrolled!(u in U => {
            let Some(bits) = keys[u].bits[d * keys[u].stride..].first_chunk() else { break };
            key[u] = s.load_f16(bits);
        });
        unrolled!(j in N => {
            let q = s.splat(run.q[j][d]);
            unrolled!(u in U => {
                sums[j][u] = s.mul_add(key[u], q, sums[j][u]);
            });
        });
    }
    unrolled!(j in N => {
        unrolled!(u in U => {
            s.store(sums[j][u], &mut run.scores[j].as_chunks_mut().0[unit + u]);
        });
    });
}

/// Caps the scores, turns those that are `seen` into weights relative to the running maximum, the others into zeros, and scales what
/// has been summed with an earlier maximum.
#[inline(always)]
fn softmax_update(
    scores: &mut [[f32; LANES]],
    seen: Range<usize>,
    cap: Option<f32>,
    running: &mut OnlineSoftmax,
    sums: &mut [f32],
) {
    if seen.is_empty() {
        return scores.as_flattened_mut().fill(0.0);
    }
    if let Some(cap) = cap {
        let inverse = 1.0 / cap;
        for score in scores.as_flattened_mut() {
            *score = cap * tanh(*score * inverse);
        }
    }
    scores.as_flattened_mut()[..seen.start].fill(f32::NEG_INFINITY);
    scores.as_flattened_mut()[seen.end..].fill(f32::NEG_INFINITY);
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in &*scores {
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], chunk[i]);
        }
    }
    let largest = larger(running.largest, max_pairwise(lanes));
    let mut total = [0.0f32; LANES];
    for chunk in scores {
        for i in 0..LANES {
            chunk[i] = exp(chunk[i] - largest);
            total[i] += chunk[i];
        }
    }
    if largest > running.largest {
        let shrink = exp(running.largest - largest);
        sums.iter_mut().for_each(|x| *x *= shrink);
        running.sum *= shrink;
        running.largest = largest;
    }
    // What is not a number stays so.
    running.sum += sum_pairwise(total);
}

/// sums += weights * V over `positions` of the span that begins at `start`, in U times 16 dimensions from `part` on.
#[inline(always)]
fn add_values<S: Simd, const N: usize, const U: usize, const D: usize>(
    s: S,
    task: &Task<'_>,
    positions: Range<usize>,
    start: usize,
    part: usize,
    run: &mut Run<N, D>,
) {
    let shape = task.kv.shape;
    let (dim, tokens) = (shape.head_dim, shape.block_tokens);
    let mut sums = [[s.splat(0.0); U]; N];
    unrolled!(j in N => {
        unrolled!(u in U => {
            sums[j][u] = s.load(&run.sums[j].as_chunks().0[part / LANES + u]);
        });
    });
    let mut position = positions.start;
    while position < positions.end {
        let (block, within) = (task.tile.blocks[position / tokens], position % tokens);
        let count = (tokens - within).min(positions.end - position);
        let values = &task.kv.values[shape.head(block, task.kv_head) + within * dim..][..count * dim];
        for (r, values) in values.chunks_exact(dim).enumerate() {
            let mut value = [s.splat(0.0); U];
            unrolled!(u in U => {
                let Some(bits) = values[part + u * LANES..].first_chunk() else { break };
                value[u] = s.load_f16(bits);
            });
            unrolled!(j in N => {
                let weight = s.splat(run.scores[j][(position - start + r) % SPAN]);
                unrolled!(u in U => {
                    sums[j][u] = s.mul_add(value[u], weight, sums[j][u]);
                });
            });
        }
        position += count;
    }
    unrolled!(j in N => {
        unrolled!(u in U => {
            s.store(sums[j][u], &mut run.sums[j].as_chunks_mut().0[part / LANES + u]);
        });
    });
}

#[cfg(test)]
mod tests {
    use super::super::kv::{HeadPrep, KvShape, KvViewMut, rope_and_store};
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
            attention_at(level, Team::get(), rows.div_ceil(tile), tiles, q, kv, self.spec, &mut out);
            out
        }

        /// What other sequences may have written by now where no row from `from` on looks is not a number.
        fn forget_before(mut self, from: usize) -> Self {
            let KvShape { block_tokens, kv_heads, head_dim } = self.shape;
            for t in 0..self.spec.first_seen(from) {
                for head in 0..kv_heads {
                    let (place, at) = (self.shape.head(self.blocks[t / block_tokens], head), t % block_tokens);
                    (0..head_dim).for_each(|d| self.keys[place + d * block_tokens + at] = 0x7E00);
                    self.values[place + at * head_dim..][..head_dim].fill(0x7E00);
                }
            }
            self
        }

        /// One head of one row in double precision, straight from the definition.
        fn expected(&self, row: usize, head: usize) -> Vec<f64> {
            let KvShape { block_tokens, kv_heads, head_dim } = self.shape;
            let group = self.spec.heads / kv_heads;
            let place = |t: usize| self.shape.head(self.blocks[t / block_tokens], head / group);
            let value = |bits: u16| f64::from(f16_value(bits));
            let q = &self.q[(row * self.spec.heads + head) * head_dim..][..head_dim];
            let score = |t: usize| {
                let key = |d: usize| value(self.keys[place(t) + d * block_tokens + t % block_tokens]);
                let product = (0..head_dim).map(|d| f64::from(q[d]) * key(d)).sum::<f64>();
                let scaled = product * f64::from(self.spec.scale);
                self.spec.softcap.map_or(scaled, |cap| f64::from(cap) * (scaled / f64::from(cap)).tanh())
            };
            let first = self.spec.window.map_or(0, |window| (row + 1).saturating_sub(window));
            let scores: Vec<f64> = (first..=row).map(score).collect();
            let largest = scores.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
            let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
            let of = |d: usize| {
                let v = |t: usize| value(self.values[place(t) + t % block_tokens * head_dim + d]);
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
        let forms = (prop::option::of(2.0f32..20.0), prop::option::of(1usize..100), 0.4f32..4.0);
        (shapes, forms).prop_map(|((block_tokens, kv_heads, head_dim, group), (softcap, window, scale))| {
            let spec = AttentionSpec::causal(kv_heads * group, head_dim);
            let spec = AttentionSpec { scale: scale / head_dim as f32, softcap, window, ..spec };
            (KvShape { block_tokens, kv_heads, head_dim }, spec)
        })
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
