//! The weights of the tests' model: random blocks of two formats.

use crate::arch::ARCHITECTURES;
use crate::arch::config::{AttentionConfig, LayerConfig, LogitConfig, ModelConfig};
use crate::arch::decoder::{Decoder, SiteSpec};
use crate::arch::rope::{RopeConfig, RopeScaling};
use crate::ids::Digest;
use crate::kernels::format::QType;
use crate::kernels::packed::PackedMatrix;
use crate::kernels::spec::Activation;
use crate::random::philox4x32;
use crate::weights::{LinearWeights, Weights};

/// Layers whose rows see all that comes before them.
pub(super) fn weights(seed: u64, vocab_size: usize) -> Weights {
    of_layers(seed, vocab_size, vec![LayerConfig { rope: Some(0), window: None }; 2])
}

/// Layers of which every other one sees 32 positions.
pub(super) fn windowed(seed: u64, vocab_size: usize) -> Weights {
    let layer = |i: usize| LayerConfig { rope: Some(0), window: i.is_multiple_of(2).then_some(32) };
    of_layers(seed, vocab_size, (0..4).map(layer).collect())
}

fn of_layers(seed: u64, vocab_size: usize, layers: Vec<LayerConfig>) -> Weights {
    let config = ModelConfig {
        name: "tiny".into(),
        architecture: ARCHITECTURES[0].name,
        hidden_size: 64,
        intermediate_size: 96,
        vocab_size,
        context_length: 256,
        norm_eps: 1e-5,
        activation: Activation::Silu,
        attention: AttentionConfig {
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            scale: 0.25,
            softcap: None,
            qk_norm: false,
            temperature: None,
        },
        post_norms: false,
        fused_projections: false,
        embedding_scale: 1.0,
        virtual_scale: 1.0,
        residual_scale: 1.0,
        logits: LogitConfig { scale: 1.0, softcap: None },
        ropes: vec![RopeConfig { base: 10_000.0, dims: 16, scaling: RopeScaling::None, attention_factor: 1.0 }],
        layers,
    };
    let decoder = Decoder::new(&config);
    let mut random = Random { seed, counter: 0 };
    let embedding = random.matrix(QType::Q8_0, vocab_size, config.hidden_size, |unit| vec![0.0136 * unit]);
    let mut weights = Weights {
        called: vec!["Tiny-1M".into()],
        digest: Digest::of(&seed.to_le_bytes()),
        embedding,
        linears: Vec::new(),
        norms: Vec::new(),
        head: None,
        decoder,
        config,
    };
    for layer in 0..weights.config.layers.len() {
        // A block's norms before its matrices, so that a seed stands for the same model in all versions.
        let norms = weights.decoder.norms.iter().filter(|norm| norm.layer == Some(layer));
        weights.norms.extend(norms.map(|norm| random.near_one(norm.width)));
        let sites = weights.decoder.sites.iter().filter(|site| site.site.layer as usize == layer);
        let matrix = |site: &SiteSpec| {
            let scales = |unit: f32| vec![0.22 * unit, -7.5 * (0.22 * unit)];
            random.matrix(QType::Q4_1, site.outputs, site.inputs, scales)
        };
        let linears = sites.map(matrix).map(|matrix| LinearWeights { matrix, bias: None });
        weights.linears.extend(linears);
    }
    weights.norms.push(random.near_one(weights.config.hidden_size));
    weights
}

struct Random {
    seed: u64,
    counter: u32,
}

impl Random {
    fn next(&mut self) -> u32 {
        self.counter += 1;
        philox4x32([self.seed as u32, (self.seed >> 32) as u32], [self.counter, 0, 0, 0])[0]
    }

    fn near_one(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| 0.75 + (self.next() % 512) as f32 / 1024.0).collect()
    }

    /// Values of about `unit`, which varies a little around one over the square root of `cols`: `scales(unit)` are the numbers
    /// that a block begins with.
    fn matrix(&mut self, qtype: QType, rows: usize, cols: usize, scales: impl Fn(f32) -> Vec<f32>) -> PackedMatrix {
        let spread = 1.0 / (cols as f32).sqrt();
        let mut data = Vec::with_capacity(rows * qtype.row_bytes(cols));
        for _ in 0..rows * cols / qtype.block_values() {
            let jitter = 0.75 + (self.next() % 512) as f32 / 1024.0;
            let end = data.len() + qtype.block_bytes();
            data.extend(scales(spread * jitter).iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()));
            data.extend((data.len()..end).map(|_| self.next() as u8));
        }
        PackedMatrix::pack(qtype, rows, cols, &data)
    }
}
