//! Row-wise arithmetic in float32: norm, rotary embedding, gated activation, sum, LoRA.

use rayon::prelude::*;

use super::simd::{dot, exp, multiversion};

/// Rows a task takes at least, so that small batches stay on one core.
const MIN_ROWS: usize = 8;

/// out = x / rms(x) * weight, row by row (Zhang & Sennrich 2019). `x`, `out`: `[rows, weight.len()]`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    out.par_chunks_exact_mut(width)
        .zip(x.par_chunks_exact(width))
        .with_min_len(MIN_ROWS)
        .for_each(|(out, x)| rms_norm_row(x, weight, eps, out));
}

multiversion! {
    /// One row of [`rms_norm`].
    pub fn rms_norm_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let scale = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = *x * scale * *weight;
        }
    }
}

/// Rotates each head's halves by the row's angles (RoPE, Su et al. 2021; Hugging Face's half-split order). `x`: `[rows, width]` of
/// heads of `2 * half`; `cos_sin(row)`: the row's `[half]` cosines and sines.
pub fn rope<'t>(x: &mut [f32], width: usize, half: usize, cos_sin: impl Fn(usize) -> (&'t [f32], &'t [f32]) + Sync) {
    multiversion! {
        fn row(x: &mut [f32], half: usize, cos: &[f32], sin: &[f32]) {
            for head in x.chunks_exact_mut(2 * half) {
                let (low, high) = head.split_at_mut(half);
                for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                    let (a, b) = (*low, *high);
                    *low = a * cos - b * sin;
                    *high = b * cos + a * sin;
                }
            }
        }
    }
    x.par_chunks_exact_mut(width).enumerate().with_min_len(MIN_ROWS).for_each(|(i, x)| {
        let (cos, sin) = cos_sin(i);
        row(x, half, cos, sin);
    });
}

/// gate = silu(gate) * up (Shazeer 2020), element by element.
pub fn swiglu(gate: &mut [f32], up: &[f32]) {
    gate.par_chunks_mut(8192).zip(up.par_chunks(8192)).for_each(|(gate, up)| swiglu_row(gate, up));
}

multiversion! {
    /// As [`swiglu`], on this thread.
    pub fn swiglu_row(gate: &mut [f32], up: &[f32]) {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = *gate / (1.0 + exp(-*gate)) * *up;
        }
    }
}

/// The gradient of [`swiglu`]'s result, d, becomes that of gate and of up, in their places.
pub fn swiglu_backward(gate: &mut [f32], up: &mut [f32], d: &[f32]) {
    multiversion! {
        fn part(gate: &mut [f32], up: &mut [f32], d: &[f32]) {
            for ((gate, up), d) in gate.iter_mut().zip(up).zip(d) {
                let sigmoid = 1.0 / (1.0 + exp(-*gate));
                let silu = *gate * sigmoid;
                *gate = d * *up * sigmoid * (1.0 + *gate * (1.0 - sigmoid));
                *up = d * silu;
            }
        }
    }
    let parts = gate.par_chunks_mut(8192).zip(up.par_chunks_mut(8192)).zip(d.par_chunks(8192));
    parts.for_each(|((gate, up), d)| part(gate, up, d));
}

multiversion! {
    /// x = softmax(scale * x).
    pub fn softmax(x: &mut [f32], scale: f32) {
        super::simd::softmax(x, scale);
    }
}

multiversion! {
    /// The gradient of a softmax with result p, times `scale`: d = scale * p * (d - p . d).
    pub fn softmax_backward(p: &[f32], d: &mut [f32], scale: f32) {
        let mean = dot(p, d);
        for (d, p) in d.iter_mut().zip(p) {
            *d = p * (*d - mean) * scale;
        }
    }
}
