//! What the kernels' tests share.

use super::blocks::{BLOCK, QType};

/// The bytes of a matrix of random blocks whose scales are small normal numbers.
pub fn random_matrix(qtype: QType, rows: usize, cols: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u8
    };
    let bytes = qtype.row_bytes(cols) / (cols / BLOCK);
    let mut data: Vec<u8> = (0..rows * qtype.row_bytes(cols)).map(|_| next()).collect();
    for block in data.chunks_exact_mut(bytes) {
        block[1] = block[1] & 0x83 | 0x24;
        if qtype == QType::Q4_1 {
            block[3] = block[3] & 0x83 | 0x24;
        }
    }
    data
}

/// Smooth values in [-3, 3].
pub fn wave(len: usize, seed: u64) -> Vec<f32> {
    (0..len).map(|i| ((i as f32 + (seed % 100) as f32) * 0.7).sin() * 3.0).collect()
}
