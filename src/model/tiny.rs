//! The weights of the tests' model: random blocks of two formats.

use crate::ids::Digest;
use crate::kernels::format::QType;
use crate::kernels::packed::PackedMatrix;
use crate::random::philox4x32;
use crate::request::Target;
use crate::weights::{Block, LlamaConfig, Weights};

pub(super) fn weights(seed: u64, vocab: usize) -> Weights {
    let config = LlamaConfig {
        name: "tiny".into(),
        layers: 2,
        width: 64,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        ffn: 96,
        vocab,
        context: 256,
        rope_base: 10_000.0,
        rms_eps: 1e-5,
    };
    let mut random = Random { seed, counter: 0 };
    let embedding = random.matrix(QType::Q8_0, vocab, config.width, |unit| vec![0.0136 * unit]);
    let blocks = (0..config.layers)
        .map(|_| Block {
            attn_norm: random.near_one(config.width),
            ffn_norm: random.near_one(config.width),
            linears: Target::ALL.map(|target| {
                let (cols, rows) = config.dims(target);
                random.matrix(QType::Q4_1, rows, cols, |unit| vec![0.22 * unit, -7.5 * (0.22 * unit)])
            }),
        })
        .collect();
    let final_norm = random.near_one(config.width);
    Weights { digest: Digest::of(&seed.to_le_bytes()), embedding, blocks, final_norm, head: None, config }
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
