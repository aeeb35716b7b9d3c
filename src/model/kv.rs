//! The paged KV cache of the CPU: blocks of positions in half precision, for every layer of a group.

use crate::arch::config::{AttentionConfig, ModelConfig};
use crate::kernels::cpu::{KvShape, KvView, KvViewMut};
use crate::model::batch::KvLayout;

/// Keys (rotated) and values of all pages.
#[derive(Debug)]
pub(super) struct KvCache {
    layout: KvLayout,
    shape: KvShape,
    /// Of each layer that a page has room for, bits in the order of [`KvView`].
    keys: Vec<Vec<u16>>,
    values: Vec<Vec<u16>>,
}

impl KvCache {
    pub fn new(config: &ModelConfig, layout: KvLayout, layers_per_page: usize) -> Self {
        let AttentionConfig { kv_heads, head_dim, .. } = config.attention;
        let shape = KvShape { block_tokens: layout.block_tokens, kv_heads, head_dim };
        // The system hands out zeroed pages as they are first touched.
        let slots = || (0..layers_per_page).map(|_| vec![0; layout.blocks * shape.block_len()]).collect();
        Self { layout, shape, keys: slots(), values: slots() }
    }

    /// The layers that have this place in their groups' pages.
    pub fn slot(&self, slot: usize) -> KvView<'_> {
        KvView { shape: self.shape, keys: &self.keys[slot], values: &self.values[slot] }
    }

    pub fn slot_mut(&mut self, slot: usize) -> KvViewMut<'_> {
        KvViewMut { shape: self.shape, keys: &mut self.keys[slot], values: &mut self.values[slot] }
    }

    pub fn layout(&self) -> KvLayout {
        self.layout
    }
}
