//! The paged KV cache of the CPU: blocks of positions for every layer of a group.

use std::ops::Range;

use crate::arch::config::{AttentionConfig, ModelConfig};
use crate::kernels::cpu::{KvShape, KvView, KvViewMut};
use crate::model::batch::KvLayout;

/// Keys (rotated) and values of all pages.
#[derive(Debug)]
pub(super) struct KvCache {
    layout: KvLayout,
    shape: KvShape,
    /// Of each layer that a page has room for, words in the order of [`KvView`].
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
    pub fn new(config: &ModelConfig, layout: KvLayout, layers_per_page: usize) -> Self {
        let AttentionConfig { kv_heads, head_dim, .. } = config.attention;
        let shape = KvShape { block_tokens: layout.block_tokens, kv_heads, head_dim, dtype: layout.dtype };
        // The system hands out zeroed pages as they are first touched.
        let slots = || (0..layers_per_page).map(|_| Words::zeros(layout.blocks * shape.block_len())).collect();
        Self { layout, shape, keys: slots(), values: slots() }
    }

    /// The layers that have this place in their groups' pages.
    pub fn slot(&self, slot: usize) -> KvView<'_> {
        let [keys, values] = [&self.keys[slot], &self.values[slot]].map(|words| &words.all[words.range.clone()]);
        KvView { shape: self.shape, keys, values }
    }

    pub fn slot_mut(&mut self, slot: usize) -> KvViewMut<'_> {
        let both = [&mut self.keys[slot], &mut self.values[slot]];
        let [keys, values] = both.map(|words| &mut words.all[words.range.clone()]);
        KvViewMut { shape: self.shape, keys, values }
    }

    pub fn layout(&self) -> KvLayout {
        self.layout
    }
}
