//! The paged KV cache of the CPU: blocks of positions in half precision, for every layer.

use crate::arch::config::{AttentionConfig, ModelConfig};
use crate::kernels::cpu::{KvShape, KvView, KvViewMut};
use crate::model::batch::KvLayout;

/// Keys (rotated) and values of all layers.
#[derive(Debug)]
pub(super) struct KvCache {
    layout: KvLayout,
    shape: KvShape,
    /// Of each layer, bits in the order of [`KvView`].
    keys: Vec<Vec<u16>>,
    values: Vec<Vec<u16>>,
}

impl KvCache {
    pub fn new(config: &ModelConfig, layout: KvLayout) -> Self {
        let AttentionConfig { kv_heads, head_dim, .. } = config.attention;
        let shape = KvShape { block_tokens: layout.block_tokens, kv_heads, head_dim };
        // The system hands out zeroed pages as they are first touched.
        let layers = || (0..config.layers.len()).map(|_| vec![0; layout.blocks * shape.block_len()]).collect();
        Self { layout, shape, keys: layers(), values: layers() }
    }

    pub fn layer(&self, layer: usize) -> KvView<'_> {
        KvView { shape: self.shape, keys: &self.keys[layer], values: &self.values[layer] }
    }

    pub fn layer_mut(&mut self, layer: usize) -> KvViewMut<'_> {
        KvViewMut { shape: self.shape, keys: &mut self.keys[layer], values: &mut self.values[layer] }
    }

    pub fn layout(&self) -> KvLayout {
        self.layout
    }
}
