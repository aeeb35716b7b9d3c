//! Row-wise arithmetic in float32: norm, rotary embedding, gated activation, softmax, and what is read of a row of
//! logits.

use rayon::prelude::*;

use super::simd::{LANES, dot, exp, larger, max_pairwise, multiversion};

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

/// Rotates each head's halves by the row's angles (RoPE, Su et al. 2021; Hugging Face's half-split order). `x`: `[rows,
/// width]` of heads of `2 * half`; `cos_sin(row)`: the row's `[half]` cosines and sines.
pub fn rope<'t>(x: &mut [f32], width: usize, half: usize, cos_sin: impl Fn(usize) -> (&'t [f32], &'t [f32]) + Sync) {
    x.par_chunks_exact_mut(width).enumerate().with_min_len(MIN_ROWS).for_each(|(i, x)| {
        let (cos, sin) = cos_sin(i);
        rotate(x, &cos[..half], &sin[..half]);
    });
}

multiversion! {
    /// One row of [`rope`].
    pub(super) fn rotate(x: &mut [f32], cos: &[f32], sin: &[f32]) {
        for head in x.chunks_exact_mut(2 * cos.len()) {
            let (low, high) = head.split_at_mut(cos.len());
            for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                let (a, b) = (*low, *high);
                *low = a * cos - b * sin;
                *high = b * cos + a * sin;
            }
        }
    }
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

multiversion! {
    /// ln of the sum of e^x over a row, in 16 lanes of double precision: what every log-probability of the serving path
    /// rests on.
    pub fn log_sum_exp(row: &[f32]) -> f64 {
        let mut tops = [f32::NEG_INFINITY; LANES];
        let (whole, rest) = row.as_chunks::<LANES>();
        for chunk in whole {
            for i in 0..LANES {
                tops[i] = larger(tops[i], chunk[i]);
            }
        }
        let largest = rest.iter().fold(max_pairwise(tops), |a, &b| larger(a, b));
        let mut sums = [0.0f64; LANES];
        for chunk in whole {
            for i in 0..LANES {
                sums[i] += f64::from(exp(chunk[i] - largest));
            }
        }
        let rest: f64 = rest.iter().map(|x| f64::from(exp(x - largest))).sum();
        f64::from(largest) + (sums.iter().sum::<f64>() + rest).ln()
    }
}

multiversion! {
    /// The lowest place of the largest value; `None` where one is not a number or the largest is not finite.
    pub fn argmax(row: &[f32]) -> Option<usize> {
        let mut tops = [f32::NEG_INFINITY; LANES];
        let mut broken = [false; LANES];
        let (whole, rest) = row.as_chunks::<LANES>();
        for chunk in whole {
            for i in 0..LANES {
                tops[i] = larger(tops[i], chunk[i]);
                broken[i] |= chunk[i].is_nan();
            }
        }
        let largest = rest.iter().fold(max_pairwise(tops), |a, &b| larger(a, b));
        if broken.contains(&true) || rest.iter().any(|x| x.is_nan()) || !largest.is_finite() {
            return None;
        }
        row.iter().position(|x| *x == largest)
    }
}
