//! The weights of the tests' model: random blocks of both kernels' formats.

use crate::ids::Digest;
use crate::kernels::blocks::{BLOCK, QType};
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
    let embedding = random.matrix(QType::Q8_0, vocab, config.width);
    let blocks = (0..config.layers)
        .map(|_| Block {
            attn_norm: random.near_one(config.width),
            ffn_norm: random.near_one(config.width),
            linears: Target::ALL.map(|target| {
                let (cols, rows) = config.dims(target);
                random.matrix(QType::Q4_1, rows, cols)
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

    /// Values of about unit variance over the square root of `cols`.
    fn matrix(&mut self, qtype: QType, rows: usize, cols: usize) -> PackedMatrix {
        let spread = 1.0 / (cols as f32).sqrt();
        let mut data = Vec::with_capacity(rows * qtype.row_bytes(cols));
        for _ in 0..rows * cols / BLOCK {
            let jitter = 0.75 + (self.next() % 512) as f32 / 1024.0;
            let half = |x: f32| half::f16::from_f32(x).to_le_bytes();
            let packed = match qtype {
                QType::Q4_1 => {
                    let d = spread * jitter * 0.22;
                    data.extend(half(d));
                    data.extend(half(-7.5 * d));
                    BLOCK / 2
                }
                _ => {
                    data.extend(half(spread * jitter * 0.0136));
                    BLOCK
                }
            };
            data.extend((0..packed).map(|_| self.next() as u8));
        }
        PackedMatrix::pack(qtype, rows, cols, &data)
    }
}
