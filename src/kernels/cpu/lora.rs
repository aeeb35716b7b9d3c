//! Adapters of a mixed batch (Punica's SGMV, Chen et al. 2023): rows are grouped by adapter, each group is shrunk by its own A when its
//! input is made, and expanded by its own B when a strip of the frozen layer's output lies in the cache. Ranks mix without padding, and
//! a row without an adapter costs nothing. A row's bits do not depend on its group.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Shared;
use super::simd::{LANES, Level, Simd, dispatch, sum_pairwise};
use crate::kernels::packed::TILE_ROWS;

/// Most rows of a group.
pub const GROUP_ROWS: usize = 4;

/// One adapter at one layer: y += scale * B (A x), in bfloat16.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraPair<'a> {
    pub rank: usize,
    pub scale: f32,
    /// `[rank, in]`.
    pub a: &'a [u16],
    /// `[out / 16 rounded up, rank, 16]`: 16 outputs lie together, the last ones padded with zeros.
    pub b: &'a [u16],
}

/// Rows in a row of the batch with the same adapter, [`GROUP_ROWS`] at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowGroup {
    pub first: usize,
    pub count: usize,
    /// The adapter's number in the batch; `None` is the base.
    pub adapter: Option<usize>,
}

impl RowGroup {
    pub fn rows(&self) -> Range<usize> {
        self.first..self.first + self.count
    }
}

/// The adapters of a batch at the layers that share an input.
#[derive(Clone, Copy)]
pub struct Adapters<'a> {
    /// All rows of the batch, in order.
    pub groups: &'a [RowGroup],
    /// The layers that share the input.
    pub layers: usize,
    /// What the adapter of a number in the batch has at one of the layers.
    pub pair: &'a (dyn Fn(usize, usize) -> Option<LoraPair<'a>> + Sync),
    /// The largest rank.
    pub rank: usize,
}

impl Adapters<'_> {
    /// Length of the shrunk rows of a batch: `[layers, rows, rank]`.
    pub(super) fn shrunk_len(&self, rows: usize) -> usize {
        self.layers * rows * self.rank
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
            $(while k + $n <= pair.rank {
                let mut row = 0;
                while row + 4 <= count {
                    shrink_tile::<S, 4, $n>(s, pair, width, (row, k), x, out, stride);
                    row += 4;
                }
                while row < count {
                    shrink_tile::<S, 1, $n>(s, pair, width, (row, k), x, out, stride);
                    row += 1;
                }
                k += $n;
            })*
        };
    }
    ranks!(4 1);
}

/// R rows against K rows of A. Each product is summed in 16 lanes, then pairwise; several at a time so that none waits for its own sum.
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
            brains[j] = s.brains(&a[j][i]);
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

/// Adds `B h`, h the shrunk rows `[rows, rank]` of this layer, to the 16 outputs of a strip, for those of the rows that have an adapter.
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
    let first = adapters.groups.partition_point(|group| group.first + group.count <= rows.start);
    for group in adapters.groups[first..].iter().take_while(|group| group.first < rows.end) {
        let Some(pair) = group.adapter.and_then(|adapter| (adapters.pair)(adapter, layer)) else { continue };
        let b = pair.b[strip * pair.rank * TILE_ROWS..][..pair.rank * TILE_ROWS].as_chunks().0;
        for row in group.first.max(rows.start)..(group.first + group.count).min(rows.end) {
            let column = strip * TILE_ROWS;
            // SAFETY: the caller vouches for it.
            let y = unsafe { y.part(row * width + column, TILE_ROWS.min(width - column)) };
            let shrunk = &shrunk[row * adapters.rank..][..pair.rank];
            dispatch!(level, expand_row, b: &[[u16; LANES]], shrunk: &[f32], y: &mut [f32]);
        }
    }
}

#[inline(always)]
fn expand_row<S: Simd>(s: S, b: &[[u16; LANES]], shrunk: &[f32], y: &mut [f32]) {
    let mut values = [0.0; LANES];
    values[..y.len()].copy_from_slice(y);
    let mut sum = s.load(&values);
    for (b, h) in b.iter().zip(shrunk) {
        sum = s.mul_add(s.brains(b), s.splat(*h), sum);
    }
    s.store(sum, &mut values);
    y.copy_from_slice(&values[..y.len()]);
}
