//! What lies before attention: heads of q and k are normed and turned, k and v are put in the paged cache.

use std::fmt;

use super::Shared;
use super::rows::{norm_heads, rotate};
use super::simd::{LANES, Level, Simd, dispatch, f16_bits, f16_value};
use super::team::Team;

/// How a cache holds its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum KvDtype {
    /// Half precision.
    #[default]
    F16,
    /// Bytes, with one half-precision scale for each [`SCALE_BLOCK`] dimensions of a head's position.
    Int8,
}

/// Dimensions of a head that share a scale in [`KvDtype::Int8`]; the last of a head may be fewer.
pub(super) const SCALE_BLOCK: usize = 32;

/// The shape of one layer's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Positions that a block holds.
    pub block_tokens: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// A multiple of 16, at most [`super::MAX_HEAD_DIM`].
    pub head_dim: usize,
    /// How its numbers are held.
    pub dtype: KvDtype,
}

impl KvShape {
    /// Words of 16 bits of one block, keys or values.
    pub fn block_len(&self) -> usize {
        self.kv_heads * self.head_len()
    }

    /// Words of one KV head of a block, keys or values.
    #[inline(always)]
    fn head_len(&self) -> usize {
        let scales = self.head_dim.div_ceil(SCALE_BLOCK);
        match self.dtype {
            KvDtype::F16 => self.head_dim * self.block_tokens,
            KvDtype::Int8 => (self.head_dim / 2 + scales) * self.block_tokens,
        }
    }

    /// Where a block's keys `[head_dim, block_tokens]` or values `[block_tokens, head_dim]` of a KV head begin.
    #[inline(always)]
    pub(super) fn head(&self, block: u32, kv_head: usize) -> usize {
        (block as usize * self.kv_heads + kv_head) * self.head_len()
    }

    /// Where the scales of a head's keys or values, `[head_dim / 32, block_tokens]`, begin after the head.
    #[inline(always)]
    pub(super) fn scales(&self) -> usize {
        self.head_dim / 2 * self.block_tokens
    }
}

/// One layer's cache: of each block and KV head keys `[head_dim, block_tokens]` and values `[block_tokens, head_dim]`,
/// bits of half-precision numbers; or bytes, two in a word, and after these the bits of their scales, `[head_dim / 32,
/// block_tokens]`.
#[derive(Debug, Clone, Copy)]
pub struct KvView<'a> {
    /// How the blocks are laid out.
    pub shape: KvShape,
    /// All blocks' keys.
    pub keys: &'a [u16],
    /// All blocks' values.
    pub values: &'a [u16],
}

/// As [`KvView`], to be written.
#[derive(Debug)]
pub struct KvViewMut<'a> {
    /// How the blocks are laid out.
    pub shape: KvShape,
    /// All blocks' keys.
    pub keys: &'a mut [u16],
    /// All blocks' values.
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

/// A position's cosines and sines, `[rotary_dim / 2]` each.
pub type Angles<'a> = dyn Fn(usize) -> (&'a [f32], &'a [f32]) + Sync + 'a;

/// What is done to the heads of q and k before they meet, in this order. Each may be left out.
#[derive(Clone, Copy, Default)]
pub struct HeadPrep<'a> {
    /// Norms of each head of q and of k.
    pub norms: Option<HeadNorms<'a>>,
    /// A position's cosines and sines, `[rotary_dim / 2]` each, by which the first `rotary_dim` values of each head turn
    /// (RoPE, Su et al. 2021, in Hugging Face's half-split order).
    pub angles: Option<&'a Angles<'a>>,
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
            match shape.dtype {
                KvDtype::F16 => dispatch!(level, store, k: &[f32], v: &[f32], place: Place),
                KvDtype::Int8 => store_bytes(k, v, place),
            }
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

/// As [`store`], in bytes.
fn store_bytes(k: &[f32], v: &[f32], to: Place) {
    let KvShape { head_dim, block_tokens, .. } = to.shape;
    for (kv_head, (k, v)) in k.chunks_exact(head_dim).zip(v.chunks_exact(head_dim)).enumerate() {
        let head = to.shape.head(to.block, kv_head);
        for (block, (k, v)) in k.chunks(SCALE_BLOCK).zip(v.chunks(SCALE_BLOCK)).enumerate() {
            let ([k_bytes, v_bytes], [k_scale, v_scale]) = {
                let ((k, k_scale), (v, v_scale)) = (quantized(k), quantized(v));
                ([k, v], [k_scale, v_scale])
            };
            let scale = head + to.shape.scales() + block * block_tokens + to.at;
            // SAFETY: the places lie within the block, and are the holder's alone.
            unsafe {
                to.keys.add(scale).write(k_scale);
                to.values.add(scale).write(v_scale);
                let (keys, values) = (to.keys.add(head).cast::<i8>(), to.values.add(head).cast::<i8>());
                for (j, d) in (block * SCALE_BLOCK..block * SCALE_BLOCK + k.len()).enumerate() {
                    keys.add(d * block_tokens + to.at).write(k_bytes[j]);
                    values.add(to.at * head_dim + d).write(v_bytes[j]);
                }
            }
        }
    }
}

/// Values as bytes q and the bits of their half-precision scale: q times the scale is nearest to the value. The scale is
/// not a number where a value is not finite.
fn quantized(x: &[f32]) -> ([i8; SCALE_BLOCK], u16) {
    // As integers what is not a number is larger than infinity, and infinity than all numbers.
    let largest = f32::from_bits(x.iter().fold(0, |largest, x| largest.max(x.abs().to_bits())));
    let scale = if largest.is_finite() { f16_bits(largest / 127.0) } else { f16_bits(f32::NAN) };
    let (unit, mut bytes) = (f16_value(scale), [0; SCALE_BLOCK]);
    if unit > 0.0 {
        for (byte, x) in bytes.iter_mut().zip(x) {
            *byte = (x / unit).round_ties_even().clamp(-127.0, 127.0) as i8;
        }
    }
    (bytes, scale)
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
    use super::*;
    use crate::testing::sinusoid;

    /// Norms first, then the rotation of a part of each head, then the factor; k and v lie where their position does.
    #[test]
    fn heads_are_normed_then_turned_then_scaled() {
        let shape = KvShape { block_tokens: 4, kv_heads: 2, head_dim: 32, dtype: KvDtype::F16 };
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

    /// Within half a unit of what was stored, which is a 127th of the largest beside it; what is broken stays broken.
    #[test]
    fn bytes_are_near_what_they_stand_for() {
        let mut x = sinusoid(SCALE_BLOCK, 3);
        x[5] = 80.0;
        let (bytes, scale) = quantized(&x);
        assert_eq!(bytes[5], 127);
        for (byte, x) in bytes.iter().zip(&x) {
            let unit = f16_value(scale);
            assert!((f32::from(*byte) * unit - x).abs() <= 0.5001 * unit + 0.001 * x.abs(), "{byte} {x}");
        }
        assert_eq!(quantized(&[0.0; 16]), ([0; SCALE_BLOCK], 0));
        assert_eq!(quantized(&[1e-12; 16]), ([0; SCALE_BLOCK], 0), "what is less than any half is nothing");
        let tiny = quantized(&[1e-5, -1e-5]);
        assert!(tiny.0[0] > 0 && tiny.0[1] == -tiny.0[0]);
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(f16_value(quantized(&[1.0, broken]).1).is_nan());
        }
    }
}
