//! The paged KV cache of the CPU: blocks of positions in half precision, for every layer.

use crate::kernels::cpu::{KvView, f16_bits};
use crate::model::batch::KvLayout;
use crate::weights::LlamaConfig;

/// Keys (rotated) and values of all layers.
#[derive(Debug)]
pub(super) struct KvCache {
    layout: KvLayout,
    kv_heads: usize,
    head_dim: usize,
    /// `[layers][blocks, block_tokens, kv_heads * head_dim]` of half-precision bits.
    keys: Vec<Vec<u16>>,
    values: Vec<Vec<u16>>,
}

impl KvCache {
    pub fn new(config: &LlamaConfig, layout: KvLayout) -> Self {
        let row = config.kv_heads * config.head_dim;
        // The system hands out zeroed pages as they are first touched.
        let layers = || (0..config.layers).map(|_| vec![0; layout.blocks * layout.block_tokens * row]).collect();
        Self { layout, kv_heads: config.kv_heads, head_dim: config.head_dim, keys: layers(), values: layers() }
    }

    /// Rounds and keeps one row of a sequence whose blocks are given. `key`, `value`: `[kv_heads * head_dim]`.
    pub fn write(&mut self, layer: usize, blocks: &[u32], position: usize, key: &[f32], value: &[f32]) {
        let at = self.layout.slot(blocks, position) * key.len();
        for (cache, row) in [(&mut self.keys[layer], key), (&mut self.values[layer], value)] {
            for (bits, x) in cache[at..at + row.len()].iter_mut().zip(row) {
                *bits = f16_bits(*x);
            }
        }
    }

    pub fn view(&self, layer: usize) -> KvView<'_> {
        KvView {
            keys: &self.keys[layer],
            values: &self.values[layer],
            block_tokens: self.layout.block_tokens,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
        }
    }

    pub fn layout(&self) -> KvLayout {
        self.layout
    }
}
