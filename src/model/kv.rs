//! The paged KV cache of the CPU: blocks of positions for every layer.

use std::ops::Range;

use crate::arch::config::{AttentionConfig, ModelConfig};
use crate::kernels::cpu::{KvShape, KvView, KvViewMut};
use crate::model::batch::KvLayout;

/// Keys (rotated) and values of all layers.
#[derive(Debug)]
pub(super) struct KvCache {
    layout: KvLayout,
    shape: KvShape,
    /// Of each layer, words in the order of [`KvView`].
    keys: Vec<Words>,
    values: Vec<Words>,
}

/// Words that begin with a cache line, so that no vector lies in two.
#[derive(Debug)]
struct Words {
    /// With room before the first.
    all: Vec<u16>,
    range: Range<usize>,
}

/// Bytes of a cache line.
const LINE: usize = 64;

impl Words {
    fn zeros(len: usize) -> Self {
        let all = vec![0; len + LINE / size_of::<u16>()];
        // Where the machine cannot say, the words begin anywhere.
        let start = all.as_ptr().align_offset(LINE).min(all.len() - len);
        Self { all, range: start..start + len }
    }
}

impl KvCache {
    pub fn new(config: &ModelConfig, layout: KvLayout) -> Self {
        let AttentionConfig { kv_heads, head_dim, .. } = config.attention;
        let shape = KvShape { block_tokens: layout.block_tokens, kv_heads, head_dim, dtype: layout.dtype };
        // The system hands out zeroed pages as they are first touched.
        let layers = || (0..config.layers.len()).map(|_| Words::zeros(layout.blocks * shape.block_len())).collect();
        Self { layout, shape, keys: layers(), values: layers() }
    }

    pub fn layer(&self, layer: usize) -> KvView<'_> {
        let [keys, values] = [&self.keys[layer], &self.values[layer]].map(|words| &words.all[words.range.clone()]);
        KvView { shape: self.shape, keys, values }
    }

    pub fn layer_mut(&mut self, layer: usize) -> KvViewMut<'_> {
        let both = [&mut self.keys[layer], &mut self.values[layer]];
        let [keys, values] = both.map(|words| &mut words.all[words.range.clone()]);
        KvViewMut { shape: self.shape, keys, values }
    }

    pub fn layout(&self) -> KvLayout {
        self.layout
    }
}
