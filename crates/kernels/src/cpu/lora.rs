//! Adapters of a mixed batch (Punica's SGMV, Chen et al. 2023): rows are grouped by adapter, each group is shrunk by
//! its own A when its input is made, and expanded by its own B when a strip of the frozen layer's output lies in the
//! cache. Ranks mix without padding, and a row without an adapter costs nothing. A row's bits do not depend on its
//! group.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Shared;
use super::ahead::Prefetcher;
use super::simd::{LANES, Level, Simd, dispatch, sum_pairwise};
use crate::packed::TILE_ROWS;

/// Most rows of a group.
pub const GROUP_ROWS: usize = 4;

/// One adapter at one layer: y += scale * B (A x), in bfloat16.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraPair<'a> {
    /// The inner dimension.
    pub rank: usize,
    /// What B A x is multiplied by.
    pub scale: f32,
    /// `[rank, in]`.
    pub a: &'a [u16],
    /// `[out / 16 rounded up, rank, 16]`: 16 outputs lie together, the last ones padded with zeros.
    pub b: &'a [u16],
}

/// Rows in a row of the batch with the same adapter, [`GROUP_ROWS`] at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowGroup {
    /// The first row.
    pub first: usize,
    /// Rows, one after the other.
    pub count: usize,
    /// The adapter's number in the batch; `None` is the base.
    pub adapter: Option<usize>,
}

impl RowGroup {
    /// Returns the rows' numbers.
    pub fn rows(&self) -> Range<usize> {
        self.first..self.first + self.count
    }
}

/// The adapters of a batch at the layers that share an input.
#[derive(Debug, Clone, Copy)]
pub struct Adapters<'a> {
    /// All rows of the batch, in order.
    pub groups: &'a [RowGroup],
    /// What each adapter has at each of the layers, `[layers, adapters]`.
    pub pairs: &'a [Option<LoraPair<'a>>],
    /// Adapters of the batch.
    pub count: usize,
    /// The largest rank.
    pub rank: usize,
}

impl<'a> Adapters<'a> {
    pub(super) fn layers(&self) -> usize {
        self.pairs.len() / self.count
    }

    #[inline(always)]
    pub(super) fn pair(&self, adapter: usize, layer: usize) -> Option<LoraPair<'a>> {
        self.pairs[layer * self.count + adapter]
    }

    /// Length of the shrunk rows of a batch: `[layers, rows, rank]`.
    pub(super) fn shrunk_len(&self, rows: usize) -> usize {
        self.layers() * rows * self.rank
    }
}

/// How often a group of rows was shrunk in this process. Rows of the base leave it as it is.
pub fn shrinks() -> u64 {
    SHRINKS.load(Ordering::Relaxed)
}

static SHRINKS: AtomicU64 = AtomicU64::new(0);

/// `out[r, ..rank] = scale * A x_r` for the rows of a group. `x`: `[count, in]`, `out`: `[count, stride]`.
pub(super) fn shrink(level: Level, pair: LoraPair<'_>, x: &[f32], out: &mut [f32], stride: usize) {
    SHRINKS.fetch_add(1, Ordering::Relaxed);
    dispatch!(level, shrink_group, pair: LoraPair<'_>, x: &[f32], out: &mut [f32], stride: usize);
}

#[inline(always)]
fn shrink_group<S: Simd>(s: S, pair: LoraPair<'_>, x: &[f32], out: &mut [f32], stride: usize) {
    let width = pair.a.len() / pair.rank;
    let count = x.len() / width;
    let mut k = 0;
    macro_rules! ranks {
        ($($n:literal)*) => {
            $({
                const N: usize = $n;
                while k + N <= pair.rank {
                    let mut row = 0;
                    while row + 4 <= count {
                        shrink_tile::<S, 4, N>(s, pair, width, (row, k), x, out, stride);
                        row += 4;
                    }
                    while row < count {
                        shrink_tile::<S, 1, N>(s, pair, width, (row, k), x, out, stride);
                        row += 1;
                    }
                    k += N;
                }
            })*
        };
    }
    ranks!(4 1);
}

/// R rows against K rows of A. Each product is summed in 16 lanes, then pairwise; several at a time so that none waits
/// for its own sum.
#[inline(always)]
fn shrink_tile<S: Simd, const R: usize, const K: usize>(
    s: S,
    pair: LoraPair<'_>,
    width: usize,
    (row, k): (usize, usize),
    x: &[f32],
    out: &mut [f32],
    stride: usize,
) {
    let chunks = width / LANES;
    let a: [&[[u16; LANES]]; K] = std::array::from_fn(|j| &pair.a[(k + j) * width..][..width].as_chunks().0[..chunks]);
    let x: [&[[f32; LANES]]; R] = std::array::from_fn(|r| &x[(row + r) * width..][..width].as_chunks().0[..chunks]);
    let mut sums = [[s.splat(0.0); K]; R];
    for i in 0..chunks {
        let mut brains = [s.splat(0.0); K];
        for j in 0..K {
            brains[j] = s.load_bf16(&a[j][i]);
        }
        for r in 0..R {
            let x = s.load(&x[r][i]);
            for j in 0..K {
                sums[r][j] = s.mul_add(brains[j], x, sums[r][j]);
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        for (j, sum) in sums.into_iter().enumerate() {
            let mut lanes = [0.0; LANES];
            s.store(sum, &mut lanes);
            out[(row + r) * stride + k + j] = pair.scale * sum_pairwise(lanes);
        }
    }
}

/// The groups that have some of the rows.
#[inline(always)]
fn groups_of<'a>(adapters: &Adapters<'a>, rows: &Range<usize>) -> &'a [RowGroup] {
    let first = adapters.groups.partition_point(|group| group.rows().end <= rows.start);
    let groups = &adapters.groups[first..];
    &groups[..groups.partition_point(|group| group.first < rows.end)]
}

/// What [`expand`] will read at a strip.
pub(super) fn expand_reads(
    adapters: &Adapters<'_>,
    layer: usize,
    strip: usize,
    rows: &Range<usize>,
    ahead: &mut Prefetcher,
) {
    let mut last = None;
    for group in groups_of(adapters, rows) {
        if let Some(adapter) = group.adapter.filter(|_| group.adapter != last)
            && let Some(pair) = adapters.pair(adapter, layer)
        {
            ahead.push(&pair.b[strip * pair.rank * TILE_ROWS..][..pair.rank * TILE_ROWS]);
        }
        last = group.adapter;
    }
}

/// Part `i` of `n` of what [`shrink`] will read.
pub(super) fn shrink_reads(adapters: &Adapters<'_>, i: usize, n: usize, ahead: &mut Prefetcher) {
    // Pair u is u * n..(u + 1) * n of all, and the part i * pairs..(i + 1) * pairs.
    let (from, to) = (i * adapters.pairs.len(), (i + 1) * adapters.pairs.len());
    let first = from / n;
    for (u, pair) in (first..).zip(&adapters.pairs[first..to.div_ceil(n)]) {
        if let Some(pair) = pair {
            let within = |at: usize| at.saturating_sub(u * n).min(n) * pair.a.len() / n;
            ahead.push(&pair.a[within(from)..within(to)]);
        }
    }
}

/// Adds `B h`, h the shrunk rows `[rows, rank]` of this layer, to the 16 outputs of a strip, for those of the rows that
/// have an adapter.
///
/// # Safety
/// `y` is `[rows, width]` and covers all rows of the groups; nobody else touches the strip's columns of these rows.
pub(super) unsafe fn expand(
    level: Level,
    adapters: &Adapters<'_>,
    (layer, shrunk): (usize, &[f32]),
    strip: usize,
    rows: Range<usize>,
    (y, width): (Shared, usize),
) {
    let to = Outputs { y, width, strip };
    // SAFETY of what it writes: the caller vouches for it.
    dispatch!(level, expand_strip, adapters: &Adapters<'_>, layer: usize, shrunk: &[f32], rows: Range<usize>, to: Outputs);
}

/// Where a strip's outputs go: they are the holder's alone.
#[derive(Clone, Copy)]
struct Outputs {
    y: Shared,
    width: usize,
    strip: usize,
}

#[inline(always)]
fn expand_strip<S: Simd>(s: S, adapters: &Adapters<'_>, layer: usize, shrunk: &[f32], rows: Range<usize>, to: Outputs) {
    let column = to.strip * TILE_ROWS;
    for group in groups_of(adapters, &rows) {
        let Some(pair) = group.adapter.and_then(|adapter| adapters.pair(adapter, layer)) else { continue };
        let b = pair.b[to.strip * pair.rank * TILE_ROWS..][..pair.rank * TILE_ROWS].as_chunks().0;
        for row in group.first.max(rows.start)..group.rows().end.min(rows.end) {
            // SAFETY: the holder has the strip's outputs of all rows.
            let y = unsafe { to.y.part(row * to.width + column, TILE_ROWS.min(to.width - column)) };
            let shrunk = &shrunk[row * adapters.rank..][..pair.rank];
            add_expanded(s, b, shrunk, y);
        }
    }
}

/// Outputs of B for so many of the layer: whole tiles.
pub(super) fn padded(outputs: usize) -> usize {
    outputs.next_multiple_of(TILE_ROWS)
}

/// Adds `B h` to a row of all outputs.
pub(super) fn expand_row(level: Level, pair: LoraPair<'_>, shrunk: &[f32], y: &mut [f32]) {
    dispatch!(level, expand_tiles, pair: LoraPair<'_>, shrunk: &[f32], y: &mut [f32]);
}

#[inline(always)]
fn expand_tiles<S: Simd>(s: S, pair: LoraPair<'_>, shrunk: &[f32], y: &mut [f32]) {
    for (y, b) in y.chunks_mut(TILE_ROWS).zip(pair.b.chunks_exact(pair.rank * TILE_ROWS)) {
        add_expanded(s, b.as_chunks().0, shrunk, y);
    }
}

/// Adds to the outputs of a tile, which of the last one may be fewer.
#[inline(always)]
fn add_expanded<S: Simd>(s: S, b: &[[u16; LANES]], shrunk: &[f32], y: &mut [f32]) {
    if let Ok(y) = <&mut [f32; LANES]>::try_from(&mut *y) {
        s.store(expanded(s, b, shrunk, s.load(y)), y);
    } else {
        let mut values = [0.0; LANES];
        values[..y.len()].copy_from_slice(y);
        s.store(expanded(s, b, shrunk, s.load(&values)), &mut values);
        y.copy_from_slice(&values[..y.len()]);
    }
}

#[inline(always)]
fn expanded<S: Simd>(s: S, b: &[[u16; LANES]], shrunk: &[f32], mut sum: S::F) -> S::F {
    for (b, h) in b.iter().zip(shrunk) {
        sum = s.mul_add(s.load_bf16(b), s.splat(*h), sum);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::sinusoid;
    use half::bf16;
    use proptest::prelude::*;

    fn load_bf16(values: &[f32]) -> Vec<u16> {
        values.iter().map(|x| bf16::from_f32(*x).to_bits()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Close to scale * B (A x) in double precision, in all forms the same bits, and a row the same alone as in its
        /// group.
        #[test]
        fn agrees_with_the_definition(
            rank in 1usize..20, chunks in 1usize..5, out in 1usize..50, count in 1usize..=GROUP_ROWS, seed in 0u64..100,
        ) {
            let (width, strips, scale) = (chunks * 32, out.div_ceil(TILE_ROWS), 0.3);
            let (a, x) = (load_bf16(&sinusoid(rank * width, seed)), sinusoid(count * width, seed + 1));
            let tiles = load_bf16(&sinusoid(strips * rank * TILE_ROWS, seed + 2));
            let pair = LoraPair { rank, scale, a: &a, b: &tiles };
            let groups = [RowGroup { first: 0, count, adapter: Some(0) }];
            let adapters = Adapters { groups: &groups, pairs: &[Some(pair)], count: 1, rank: rank + 1 };
            let all = |level: Level| {
                let mut shrunk = vec![0.0; count * (rank + 1)];
                shrink(level, pair, &x, &mut shrunk, rank + 1);
                let mut y = vec![1.0; count * out];
                let shared = Shared(y.as_mut_ptr());
                for strip in 0..strips {
                    // SAFETY: y has all rows, and nobody else touches it.
                    unsafe { expand(level, &adapters, (0, &shrunk), strip, 0..count, (shared, out)) };
                }
                y
            };
            let portable = all(Level::Portable);
            for level in Level::all() {
                prop_assert_eq!(&all(level), &portable, "{:?}", level);
            }
            let value = |bits: u16| f64::from(bf16::from_bits(bits).to_f32());
            for row in 0..count {
                let x = &x[row * width..][..width];
                let h = |k: usize| (0..width).map(|i| value(a[k * width + i]) * f64::from(x[i])).sum::<f64>();
                for o in 0..out {
                    let b = |k: usize| value(tiles[(o / TILE_ROWS * rank + k) * TILE_ROWS + o % TILE_ROWS]);
                    let terms = (0..rank).map(|k| b(k) * h(k) * f64::from(scale));
                    let (want, size) = terms.fold((1.0, 1.0), |(sum, size), t| (sum + t, size + t.abs()));
                    prop_assert!((f64::from(portable[row * out + o]) - want).abs() <= 1e-4 * size);
                }
                let mut alone = vec![0.0; rank];
                shrink(Level::best(), pair, x, &mut alone, rank);
                let mut together = vec![0.0; count * rank];
                shrink(Level::best(), pair, &sinusoid(count * width, seed + 1), &mut together, rank);
                prop_assert_eq!(&together[row * rank..][..rank], &alone[..]);
            }
        }
    }
}
