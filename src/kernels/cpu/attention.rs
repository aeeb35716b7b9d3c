//! Causal grouped-query attention over paged keys and values in half precision.

use rayon::prelude::*;

use super::Shared;
use super::simd::{dot, f16_value, multiversion, softmax};

/// Widest head the kernel's buffer holds.
pub const MAX_HEAD_DIM: usize = 256;

/// One layer's cache: `[blocks, block_tokens, kv_heads * head_dim]` of half-precision bits each for keys and values.
#[derive(Debug, Clone, Copy)]
pub struct KvView<'a> {
    pub keys: &'a [u16],
    pub values: &'a [u16],
    pub block_tokens: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl KvView<'_> {
    /// The place of one head of one position of the sequence whose blocks are given.
    #[inline(always)]
    fn at(&self, blocks: &[u32], position: usize, kv_head: usize) -> usize {
        let token = blocks[position / self.block_tokens] as usize * self.block_tokens + position % self.block_tokens;
        (token * self.kv_heads + kv_head) * self.head_dim
    }
}

/// out = softmax(q K^T / sqrt(head_dim)) V for each row, over the positions up to and including its own. `q`, `out`:
/// `[rows, heads * head_dim]`; `row(i)`: the row's KV blocks and position. Positions are taken in order, so a row's bits do not depend on
/// the blocks it lies in or the chunk it came with.
pub fn attention<'b>(
    q: &[f32],
    kv: KvView<'_>,
    heads: usize,
    row: impl Fn(usize) -> (&'b [u32], usize) + Sync,
    out: &mut [f32],
) {
    let width = heads * kv.head_dim;
    let group = heads / kv.kv_heads * kv.head_dim;
    let shared = Shared(out.as_mut_ptr());
    let rows = q.len() / width;
    (0..rows * kv.kv_heads).into_par_iter().for_each_init(Vec::new, |scores, task| {
        let (i, kv_head) = (task / kv.kv_heads, task % kv.kv_heads);
        let (blocks, position) = row(i);
        let at = i * width + kv_head * group;
        // SAFETY: this task alone writes this row's heads of this group, which lie in out.
        let out = unsafe { shared.part(at, group) };
        group_attention(&q[at..][..group], kv, kv_head, blocks, position, scores, out);
    });
}

multiversion! {
    /// The heads of one row that share a KV head.
    fn group_attention(
        q: &[f32],
        kv: KvView<'_>,
        kv_head: usize,
        blocks: &[u32],
        position: usize,
        scores: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let dim = kv.head_dim;
        let length = position + 1;
        let scale = 1.0 / (dim as f32).sqrt();
        scores.clear();
        scores.resize(q.len() / dim * length, 0.0);
        let mut wide = [0.0f32; MAX_HEAD_DIM];
        let wide = &mut wide[..dim];
        for t in 0..length {
            widen(&kv.keys[kv.at(blocks, t, kv_head)..][..dim], wide);
            for (head, q) in q.chunks_exact(dim).enumerate() {
                scores[head * length + t] = dot(q, wide);
            }
        }
        for scores in scores.chunks_exact_mut(length) {
            softmax(scores, scale);
        }
        out.fill(0.0);
        for t in 0..length {
            widen(&kv.values[kv.at(blocks, t, kv_head)..][..dim], wide);
            for (head, out) in out.chunks_exact_mut(dim).enumerate() {
                let weight = scores[head * length + t];
                for (out, v) in out.iter_mut().zip(wide.iter()) {
                    *out += weight * *v;
                }
            }
        }
    }
}

#[inline(always)]
fn widen(bits: &[u16], out: &mut [f32]) {
    for (out, bits) in out.iter_mut().zip(bits) {
        *out = f16_value(*bits);
    }
}
