//! What lies before attention: heads of q and k are normed and turned, k and v are put in the paged cache.

use std::fmt;

use super::Shared;
use super::rows::{norm_heads, rotate};
use super::simd::{LANES, Level, Simd, dispatch};
use super::team::Team;

/// The shape of one layer's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Positions that a block holds.
    pub block_tokens: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// A multiple of 16, at most [`super::MAX_HEAD_DIM`].
    pub head_dim: usize,
}

impl KvShape {
    /// Values of one block, keys or values.
    pub fn block_len(&self) -> usize {
        self.block_tokens * self.kv_heads * self.head_dim
    }

    /// Where a block's keys `[head_dim, block_tokens]` or values `[block_tokens, head_dim]` of a KV head begin.
    #[inline(always)]
    pub(super) fn head(&self, block: u32, kv_head: usize) -> usize {
        (block as usize * self.kv_heads + kv_head) * self.head_dim * self.block_tokens
    }
}

/// One layer's cache: keys `[blocks, kv_heads, head_dim, block_tokens]`, values `[blocks, kv_heads, block_tokens,
/// head_dim]`, bits of half-precision numbers.
#[derive(Debug, Clone, Copy)]
pub struct KvView<'a> {
    /// How the blocks are laid out.
    pub shape: KvShape,
    /// All blocks' keys, in half precision.
    pub keys: &'a [u16],
    /// All blocks' values, in half precision.
    pub values: &'a [u16],
}

/// As [`KvView`], to be written.
#[derive(Debug)]
pub struct KvViewMut<'a> {
    /// How the blocks are laid out.
    pub shape: KvShape,
    /// All blocks' keys, in half precision.
    pub keys: &'a mut [u16],
    /// All blocks' values, in half precision.
    pub values: &'a mut [u16],
}

/// Rows in a row of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct RowTile<'a> {
    /// Of the batch.
    pub first: usize,
    /// [`super::GROUP_ROWS`] at most.
    pub count: usize,
    /// Of the first row.
    pub position: usize,
    /// The sequence's KV blocks, in order.
    pub blocks: &'a [u32],
}

/// What is done to the heads of q and k before they meet, in this order. Each may be left out.
#[derive(Clone, Copy, Default)]
pub struct HeadPrep<'a> {
    /// Norms of each head of q and of k.
    pub norms: Option<HeadNorms<'a>>,
    /// A position's cosines and sines, `[rotary_dim / 2]` each, by which the first `rotary_dim` values of each head turn
    /// (RoPE, Su et al. 2021, in Hugging Face's half-split order).
    pub angles: Option<&'a (dyn Fn(usize) -> (&'a [f32], &'a [f32]) + Sync)>,
    /// What q is multiplied with at a position.
    pub q_factor: Option<&'a (dyn Fn(usize) -> f32 + Sync)>,
}

impl fmt::Debug for HeadPrep<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { norms, angles, q_factor } = self;
        write!(f, "HeadPrep({norms:?}, turns: {}, scales q: {})", angles.is_some(), q_factor.is_some())
    }
}

/// RMS norms of heads: head / rms(head) * weight.
#[derive(Debug, Clone, Copy)]
pub struct HeadNorms<'a> {
    /// Of q's heads, `[head_dim]`.
    pub q: &'a [f32],
    /// Of k's heads, `[head_dim]`.
    pub k: &'a [f32],
    /// Added to the mean of squares.
    pub eps: f32,
}

impl HeadPrep<'_> {
    /// Prepares one row, in place.
    fn row(&self, q: &mut [f32], k: &mut [f32], head_dim: usize, position: usize) {
        if let Some(norms) = &self.norms {
            norm_heads(q, norms.q, norms.eps);
            norm_heads(k, norms.k, norms.eps);
        }
        if let Some(angles) = self.angles {
            let (cos, sin) = angles(position);
            rotate(q, head_dim, cos, sin);
            rotate(k, head_dim, cos, sin);
        }
        if let Some(factor) = self.q_factor {
            let factor = factor(position);
            q.iter_mut().for_each(|q| *q *= factor);
        }
    }

    fn check(&self, head_dim: usize) {
        let fits = |norms: &HeadNorms<'_>| norms.q.len() == head_dim && norms.k.len() == head_dim;
        assert!(self.norms.as_ref().is_none_or(fits), "norms of heads are as wide as heads");
    }
}

/// Prepares the heads of q and k, in place, and puts k and v, rounded, in the cache. `q`: `[rows, heads * head_dim]`,
/// `k`, `v`: `[rows, kv_heads * head_dim]`.
pub fn rope_and_store<'t>(
    team: &Team,
    tiles: usize,
    tile: impl Fn(usize) -> RowTile<'t> + Sync,
    (q, k, v): (&mut [f32], &mut [f32], &[f32]),
    kv: KvViewMut<'_>,
    prep: HeadPrep<'_>,
) {
    let shape = kv.shape;
    let k_width = shape.kv_heads * shape.head_dim;
    let q_width = q.len() / (k.len() / k_width).max(1);
    assert!(kv.keys.len() == kv.values.len() && k.len() == v.len(), "shapes fit");
    prep.check(shape.head_dim);
    let (q, k, len) = (Shared(q.as_mut_ptr()), Shared(k.as_mut_ptr()), kv.keys.len());
    let (keys, values) = (SharedHalves(kv.keys.as_mut_ptr()), SharedHalves(kv.values.as_mut_ptr()));
    let level = Level::best();
    team.each(tiles, |i| {
        let tile = tile(i);
        for r in 0..tile.count {
            let (row, position) = (tile.first + r, tile.position + r);
            // SAFETY: the row is this tile's alone.
            let (q, k) = unsafe { (q.part(row * q_width, q_width), k.part(row * k_width, k_width)) };
            prep.row(q, k, shape.head_dim, position);
            let (block, at) = (tile.blocks[position / shape.block_tokens], position % shape.block_tokens);
            assert!((block as usize + 1) * shape.block_len() <= len, "the cache has the block");
            let (k, v) = (&*k, &v[row * k_width..][..k_width]);
            let place = Place { shape, block, at, keys: keys.get(), values: values.get() };
            dispatch!(level, store, k: &[f32], v: &[f32], place: Place);
        }
    });
}

/// A position in the cache, which is the holder's alone.
#[derive(Clone, Copy)]
struct Place {
    shape: KvShape,
    block: u32,
    at: usize,
    keys: *mut u16,
    values: *mut u16,
}

#[inline(always)]
fn store<S: Simd>(s: S, k: &[f32], v: &[f32], to: Place) {
    let KvShape { head_dim, block_tokens, .. } = to.shape;
    let width = head_dim / LANES;
    let parts = k.as_chunks::<LANES>().0.iter().zip(v.as_chunks::<LANES>().0);
    for (i, (k, v)) in parts.enumerate() {
        let (head, d) = (to.shape.head(to.block, i / width), i % width * LANES);
        let (k, v) = (s.to_f16(s.load(k)), s.to_f16(s.load(v)));
        // SAFETY: the places lie within the block, and are the holder's alone.
        unsafe {
            let (keys, values) =
                (to.keys.add(head + d * block_tokens + to.at), to.values.add(head + to.at * head_dim + d));
            for (j, k) in k.into_iter().enumerate() {
                keys.add(j * block_tokens).write(k);
            }
            values.cast::<[u16; LANES]>().write_unaligned(v);
        }
    }
}

/// As [`Shared`], of half-precision bits.
#[derive(Clone, Copy)]
struct SharedHalves(*mut u16);

// SAFETY: as of `Shared`.
unsafe impl Send for SharedHalves {}
// SAFETY: as of `Shared`.
unsafe impl Sync for SharedHalves {}

impl SharedHalves {
    fn get(&self) -> *mut u16 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::f16_value;
    use super::*;
    use crate::testing::sinusoid;

    /// Norms first, then the rotation of a part of each head, then the factor; k and v lie where their position does.
    #[test]
    fn heads_are_normed_then_turned_then_scaled() {
        let shape = KvShape { block_tokens: 4, kv_heads: 2, head_dim: 32 };
        let (heads, rotary, rows) = (6, 16, 3);
        let (q, k, v) = (sinusoid(rows * heads * 32, 1), sinusoid(rows * 64, 2), sinusoid(rows * 64, 3));
        let (q_weight, k_weight) = (sinusoid(32, 4), sinusoid(32, 5));
        let table: Vec<f32> = (0..16 * rotary).map(|i| (i as f32 * 0.7).cos()).collect();
        let angles = |position: usize| table[position * rotary..][..rotary].split_at(rotary / 2);
        let factor = |position: usize| 1.0 + position as f32;
        let norms = HeadNorms { q: &q_weight, k: &k_weight, eps: 1e-5 };
        let want = |x: &[f32], weight: &[f32], position: usize, factor: f32| -> Vec<f64> {
            let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / 32.0;
            let normed: Vec<f64> =
                x.iter().zip(weight).map(|(x, w)| f64::from(*x) / (mean + 1e-5).sqrt() * f64::from(*w)).collect();
            let (cos, sin) = angles(position);
            let turned = |i: usize| match i {
                0..8 => normed[i] * f64::from(cos[i]) - normed[i + 8] * f64::from(sin[i]),
                8..16 => normed[i] * f64::from(cos[i - 8]) + normed[i - 8] * f64::from(sin[i - 8]),
                _ => normed[i],
            };
            (0..32).map(|i| turned(i) * f64::from(factor)).collect()
        };
        let close = |got: &[f32], want: Vec<f64>, most: f64| {
            assert!(got.iter().zip(want).all(|(x, y)| (f64::from(*x) - y).abs() <= most * y.abs().max(1.0)), "{got:?}");
        };
        let blocks = [2, 0];
        let (mut keys, mut values) = (vec![0; 3 * shape.block_len()], vec![0; 3 * shape.block_len()]);
        let (mut turned, mut k_turned) = (q.clone(), k.clone());
        let kv = KvViewMut { shape, keys: &mut keys, values: &mut values };
        let tile = |_| RowTile { first: 0, count: rows, position: 3, blocks: &blocks };
        let prep = HeadPrep { norms: Some(norms), angles: Some(&angles), q_factor: Some(&factor) };
        rope_and_store(Team::get(), 1, tile, (&mut turned, &mut k_turned, &v), kv, prep);
        for (i, (got, q)) in turned.chunks_exact(32).zip(q.chunks_exact(32)).enumerate() {
            let position = 3 + i / heads;
            close(got, want(q, &q_weight, position, factor(position)), 1e-5);
        }
        for (i, (k, v)) in k.chunks_exact(32).zip(v.chunks_exact(32)).enumerate() {
            let (position, head) = (3 + i / 2, i % 2);
            let at = shape.head(blocks[position / 4], head);
            let key: Vec<f32> = (0..32).map(|d| f16_value(keys[at + d * 4 + position % 4])).collect();
            close(&key, want(k, &k_weight, position, 1.0), 1e-3);
            let value: Vec<f32> = (0..32).map(|d| f16_value(values[at + position % 4 * 32 + d])).collect();
            close(&value, v.iter().map(|x| f64::from(*x)).collect(), 1e-3);
        }
        let (mut q, mut k) = (q, k);
        let (before, k_before) = (q.clone(), k.clone());
        let kv = KvViewMut { shape, keys: &mut keys, values: &mut values };
        rope_and_store(Team::get(), 1, tile, (&mut q, &mut k, &v), kv, HeadPrep::default());
        assert_eq!((q, k), (before, k_before), "a layer that neither norms nor turns");
    }
}
