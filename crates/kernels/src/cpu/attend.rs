//! The inner loops of attention: some queries that share a KV head over the positions of a partition.

use std::ops::Range;

use super::Shared;
use super::attention::{MAX_HEAD_DIM, Output, PARTITION, SPAN, Task, partitions};
use super::cells::{
    Ahead, Bytes, Cells, Gathered, Halves, Keys, LINE, Stretch, UNITS, Units, gather_keys, keys_of, value_stretches,
};
use super::kv::{KvShape, SCALE_BLOCK};
use super::simd::{LANES, Simd, exp, larger, max_pairwise, prefetch_far, sum_pairwise, tanh, unrolled};

/// Most queries that go through the positions together.
const MOST: usize = 12;

/// A query's row in the buffers: padded, so that rows do not share the places of the cache.
type Row = [f32; MAX_HEAD_DIM + LANES];

/// A thread's buffers, kept between tasks: to clear them would cost time.
pub(super) struct Space {
    /// The queries, scaled.
    q: [Row; MOST],
    /// Of a span's positions; then what they weigh.
    scores: [[f32; SPAN]; MOST],
    /// Of the partition at hand.
    part: Softmax,
    /// Of all partitions so far.
    total: Softmax,
    /// Keys of 16 positions that lie in several blocks.
    gathered: Gathered,
}

/// What online softmaxes know of some queries.
struct Softmax {
    running: [Running; MOST],
    /// Of the weighed values, relative to the running maximum.
    sums: [Row; MOST],
}

/// What an online softmax knows of one query's scores.
#[derive(Clone, Copy)]
struct Running {
    largest: f32,
    /// Of e^(score - largest).
    sum: f32,
}

impl Running {
    const NONE: Self = Self { largest: f32::NEG_INFINITY, sum: 0.0 };
}

impl Softmax {
    const EMPTY: Self = Self { running: [Running::NONE; MOST], sums: [[0.0; MAX_HEAD_DIM + LANES]; MOST] };
}

impl Space {
    pub const EMPTY: Self = Self {
        q: [[0.0; MAX_HEAD_DIM + LANES]; MOST],
        scores: [[0.0; SPAN]; MOST],
        part: Softmax::EMPTY,
        total: Softmax::EMPTY,
        gathered: Gathered::EMPTY,
    };
}

impl Space {
    /// Adds query j's partition at hand to those before, if it is one of the query's `own`.
    #[inline(always)]
    fn take(&mut self, j: usize, partition: usize, own: Range<usize>, dim: usize) {
        let Self { part, total, .. } = self;
        if partition == own.start {
            total.running[j] = part.running[j];
            let (to, from) = (parts(&mut total.sums[j], dim), part.sums[j].as_chunks().0);
            to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        } else if own.contains(&partition) {
            take(&mut total.running[j], &mut total.sums[j][..dim], part.running[j], &part.sums[j][..dim]);
        }
    }
}

/// A query's result over one partition, as it waits for the others: the largest score, the sum, and the weighed values.
pub(super) struct Partial;

impl Partial {
    /// Its values.
    #[inline(always)]
    pub fn len(head_dim: usize) -> usize {
        2 + head_dim
    }
}

/// [`attend`] over half-precision numbers.
#[inline(always)]
pub(super) fn attend_halves<S: Simd>(s: S, task: &Task<'_>, q: &[f32], to: Output, space: &mut Space) {
    attend::<S, Halves>(s, task, q, to, space);
}

/// [`attend`] over bytes.
#[inline(always)]
pub(super) fn attend_bytes<S: Simd>(s: S, task: &Task<'_>, q: &[f32], to: Output, space: &mut Space) {
    attend::<S, Bytes>(s, task, q, to, space);
}

/// All queries of a task, as many side by side as the registers hold.
#[inline(always)]
fn attend<S: Simd, C: Cells>(s: S, task: &Task<'_>, q: &[f32], to: Output, space: &mut Space) {
    let queries = task.queries();
    let mut i = 0;
    macro_rules! runs {
        ($($n:literal by $units:literal)*) => {
            $(while $n * $units <= S::SUMS && queries - i >= $n {
                attend_run::<S, C, $n, $units>(s, task, q, i, to, space);
                i += $n;
            })*
        };
    }
    runs!(12 by 1 8 by 2 7 by 2 6 by 4 5 by 4 4 by 4 6 by 1 3 by 4 3 by 2 2 by 4 2 by 2 1 by 4);
}

/// Queries `i..i + N` over all their positions of the task, scores of `U * 16` positions at a time.
#[inline(always)]
fn attend_run<S: Simd, C: Cells, const N: usize, const U: usize>(
    s: S,
    task: &Task<'_>,
    q: &[f32],
    i: usize,
    to: Output,
    space: &mut Space,
) {
    let dim = task.kv.shape.head_dim;
    for (j, to) in space.q[..N].iter_mut().enumerate() {
        for (to, from) in to.iter_mut().zip(&q[task.at(i + j)..][..dim]) {
            *to = task.spec.scale * from;
        }
    }
    // The first of these queries sees the earliest position, the last one the latest.
    let seen = task.seen(i).start..task.seen(i + N - 1).end;
    let all = match to {
        Output::Rows(_) => partitions(&seen),
        Output::Partials { partition, .. } => partition..partition + 1,
    };
    for partition in all {
        let here = seen.start.max(partition * PARTITION)..seen.end.min((partition + 1) * PARTITION);
        if here.is_empty() {
            continue;
        }
        attend_partition::<S, C, N, U>(s, task, i, here, space);
        if matches!(to, Output::Rows(_)) {
            for j in 0..N {
                space.take(j, partition, partitions(&task.seen(i + j)), dim);
            }
        }
    }
    for j in 0..N {
        match to {
            Output::Rows(out) => {
                // SAFETY: this task alone writes these heads of these rows, which lie in out.
                let out = unsafe { out.part(task.at(i + j), dim) };
                finish(space.total.running[j], &space.total.sums[j][..dim], out);
            }
            Output::Partials { partition, at, to } => {
                if !partitions(&task.seen(i + j)).contains(&partition) {
                    continue;
                }
                // SAFETY: this task alone writes this query's result of this partition, for which there is room.
                let to = unsafe { to.part(at + task.partial(i + j, partition), Partial::len(dim)) };
                (to[0], to[1]) = (space.part.running[j].largest, space.part.running[j].sum);
                to[2..].copy_from_slice(&space.part.sums[j][..dim]);
            }
        }
    }
}

/// Merges the partial results of a task's queries, which begin at `at`, in order, into their heads of their rows.
#[inline(always)]
pub(super) fn merge<S: Simd>(_: S, task: &Task<'_>, partials: Shared, at: usize, out: Shared) {
    let dim = task.kv.shape.head_dim;
    for i in 0..task.queries() {
        // SAFETY: all partitions are done, so nobody else has these results any more; and who merges them alone writes
        // these heads of these rows.
        let (partial, out) = unsafe {
            let partial = |partition| &*partials.part(at + task.partial(i, partition), Partial::len(dim));
            (partial, out.part(task.at(i), dim))
        };
        let own = partitions(&task.seen(i));
        let first = partial(own.start);
        let mut running = Running { largest: first[0], sum: first[1] };
        out.copy_from_slice(&first[2..]);
        for partition in own.skip(1) {
            let next = partial(partition);
            take(&mut running, out, Running { largest: next[0], sum: next[1] }, &next[2..]);
        }
        let inverse = 1.0 / running.sum;
        out.iter_mut().for_each(|out| *out *= inverse);
    }
}

/// Takes what one partition gave after those before it.
#[inline(always)]
fn take(running: &mut Running, sums: &mut [f32], next: Running, next_sums: &[f32]) {
    let largest = larger(running.largest, next.largest);
    let (before, weight) = (exp(running.largest - largest), exp(next.largest - largest));
    // What is not a number stays so.
    running.sum = running.sum * before + next.sum * weight;
    running.largest = largest;
    let parts = sums.as_chunks_mut::<LANES>().0.iter_mut().zip(next_sums.as_chunks::<LANES>().0);
    for (sum, next) in parts {
        for i in 0..LANES {
            sum[i] = sum[i] * before + next[i] * weight;
        }
    }
}

/// A row's values, 16 at a time: so small a loop needs no call.
#[inline(always)]
fn parts(row: &mut Row, dim: usize) -> &mut [[f32; LANES]] {
    &mut row.as_chunks_mut().0[..dim / LANES]
}

#[inline(always)]
fn finish(running: Running, sums: &[f32], out: &mut [f32]) {
    let inverse = 1.0 / running.sum;
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = sum * inverse;
    }
}

/// Queries `i..i + N` over those of the positions, all of one partition, that each of them sees.
#[inline(always)]
fn attend_partition<S: Simd, C: Cells, const N: usize, const U: usize>(
    s: S,
    task: &Task<'_>,
    i: usize,
    seen: Range<usize>,
    space: &mut Space,
) {
    let dim = task.kv.shape.head_dim;
    for j in 0..N {
        space.part.running[j] = Running::NONE;
        parts(&mut space.part.sums[j], dim).iter_mut().for_each(|sum| *sum = [0.0; LANES]);
    }
    let whole_units = task.kv.shape.block_tokens.is_multiple_of(LANES);
    let mut stretches = [Stretch::NONE; SPAN];
    for start in (seen.start / SPAN * SPAN..seen.end).step_by(SPAN) {
        // What nobody sees is not read: it may be another sequence's by now.
        let here = seen.start.max(start)..seen.end.min(start + SPAN);
        let units = (here.end - start).div_ceil(LANES);
        let stretches = value_stretches::<C>(task, start, here.clone(), &mut stretches);
        let Space { q, scores, part: Softmax { running, sums }, gathered, .. } = &mut *space;
        let ahead = match start + SPAN < seen.end {
            // Many queries wait for no memory.
            _ if N == MOST => Ahead::NONE,
            true => Ahead::new(task.kv, (task.tile.blocks, task.kv_head), start + SPAN, seen.end),
            false => task.following,
        };
        let mut unit = (here.start - start) / LANES;
        while whole_units && unit + U <= units {
            let keys = std::array::from_fn(|u| keys_of::<C>(task, start + (unit + u) * LANES));
            score::<S, C, N, U>(s, dim, keys, unit, &ahead.keys, q, scores);
            unit += U;
        }
        while unit < units {
            let position = start + unit * LANES;
            let keys = if whole_units {
                keys_of::<C>(task, position)
            } else {
                gather_keys::<C>(task, position, here.clone(), gathered)
            };
            score::<S, C, N, 1>(s, dim, [keys], unit, &ahead.keys, q, scores);
            unit += 1;
        }
        let within = |positions: Range<usize>| {
            positions.start.clamp(start, here.end) - start..positions.end.clamp(start, here.end) - start
        };
        for j in 0..N {
            softmax_update(
                &mut scores[j].as_chunks_mut().0[..units],
                within(task.seen(i + j)),
                task.spec.softcap,
                &mut running[j],
                &mut sums[j][..dim],
            );
        }
        // What a query does not see has no weight, and what a later row of its tile wrote reaches it only where that is
        // not a number: then the sequence fails as a whole.
        let (first, mut part) = (here.start - start, 0);
        while part + U * LANES <= dim {
            add_values::<S, C, N, U>(s, (stretches, first, task.kv.shape), part, &ahead.values, (scores, sums));
            part += U * LANES;
        }
        while part < dim {
            add_values::<S, C, N, 1>(s, (stretches, first, task.kv.shape), part, &ahead.values, (scores, sums));
            part += LANES;
        }
    }
}

/// The products of N queries with U times 16 keys, into the units from `unit` on of their scores; meanwhile `ahead` is
/// fetched. `dim` is even.
#[inline(always)]
fn score<S: Simd, C: Cells, const N: usize, const U: usize>(
    s: S,
    dim: usize,
    keys: [Keys; U],
    unit: usize,
    ahead: &Units,
    q: &[Row; MOST],
    scores: &mut [[f32; SPAN]; MOST],
) {
    assert!(dim <= MAX_HEAD_DIM && unit + U <= UNITS, "the buffers hold it");
    let mut sums = [[s.splat(0.0); U]; N];
    let mut at = keys.map(|keys| keys.first);
    // Without scales all dimensions are one block.
    let step = if C::BYTES == Halves::BYTES { MAX_HEAD_DIM } else { SCALE_BLOCK };
    for block in (0..dim).step_by(step) {
        let mut scales = [s.splat(0.0); U];
        unrolled!(u in U => {
            // SAFETY: `keys` holds scales for each block of dimensions, where its numbers have any.
            scales[u] = unsafe { C::scales(s, keys[u].scales.wrapping_add(block / SCALE_BLOCK * keys[u].apart)) };
        });
        for d in (block..dim.min(block + step)).step_by(2) {
            for odd in 0..2 {
                let mut key = [s.splat(0.0); U];
                unrolled!(u in U => {
                    // SAFETY: `keys` holds `dim` vectors of 16, as far apart.
                    key[u] = unsafe { C::load(s, at[u], scales[u]) };
                    at[u] = at[u].wrapping_add(keys[u].stride);
                });
                unrolled!(j in N => {
                    let q = s.splat(q[j][(d + odd) % MAX_HEAD_DIM]);
                    unrolled!(u in U => {
                        sums[j][u] = s.mul_add(key[u], q, sums[j][u]);
                    });
                });
            }
            // What is as large as these two dimensions of the unit.
            let fetched = d * LANES * C::BYTES;
            if N < MOST && fetched.is_multiple_of(LINE) {
                unrolled!(u in U => {
                    prefetch_far(ahead[unit + u].wrapping_add(fetched));
                });
            }
        }
    }
    unrolled!(j in N => {
        unrolled!(u in U => {
            s.store(sums[j][u], &mut scores[j].as_chunks_mut().0[unit + u]);
        });
    });
}

/// Caps the scores, turns those that are `seen` into weights relative to the running maximum, the others into zeros, and
/// scales what has been summed with an earlier maximum.
#[inline(always)]
fn softmax_update(
    scores: &mut [[f32; LANES]],
    seen: Range<usize>,
    cap: Option<f32>,
    running: &mut Running,
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

/// sums += weights * V over the positions of a span that are seen, the first of which is `t`, in U times 16 of the `dim`
/// dimensions from `part` on; meanwhile `ahead` is fetched.
#[inline(always)]
fn add_values<S: Simd, C: Cells, const N: usize, const U: usize>(
    s: S,
    (stretches, mut t, shape): (&[Stretch], usize, KvShape),
    part: usize,
    ahead: &Units,
    (weights, all): (&[[f32; SPAN]; MOST], &mut [Row; MOST]),
) {
    let dim = shape.head_dim;
    assert!(part + U * LANES <= dim && dim <= MAX_HEAD_DIM, "the buffers hold it");
    let mut sums = [[s.splat(0.0); U]; N];
    unrolled!(j in N => {
        unrolled!(u in U => {
            sums[j][u] = s.load(&all[j].as_chunks().0[part / LANES + u]);
        });
    });
    for stretch in stretches {
        let mut row = stretch.first.wrapping_add(part * C::BYTES);
        let mut scales = stretch.scales;
        let end = stretch.end.min(SPAN);
        while t < end {
            let mut value = [s.splat(0.0); U];
            unrolled!(u in U => {
                let scale = scales.wrapping_add((part + u * LANES) / SCALE_BLOCK * shape.block_tokens);
                // SAFETY: the stretch holds a row of `dim` values for each of its positions, of which these are some,
                // and their scales, where numbers have any.
                value[u] = unsafe { C::load(s, row.wrapping_add(u * LANES * C::BYTES), C::scale(s, scale)) };
            });
            (row, scales) = (row.wrapping_add(dim * C::BYTES), scales.wrapping_add(1));
            unrolled!(j in N => {
                let weight = s.splat(weights[j][t]);
                unrolled!(u in U => {
                    sums[j][u] = s.mul_add(value[u], weight, sums[j][u]);
                });
            });
            if N < MOST {
                // A part of the unit's values for each row and part of these.
                let next = ahead[t / LANES].wrapping_add((part + t % LANES * U) * LANES * C::BYTES);
                unrolled!(line in U => {
                    if (line * LANES * C::BYTES).is_multiple_of(LINE) {
                        prefetch_far(next.wrapping_add(line * LANES * C::BYTES));
                    }
                });
            }
            t += 1;
        }
    }
    unrolled!(j in N => {
        unrolled!(u in U => {
            s.store(sums[j][u], &mut all[j].as_chunks_mut().0[part / LANES + u]);
        });
    });
}
