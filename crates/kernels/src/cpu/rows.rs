//! Row-wise arithmetic in float32: norm, rotary embedding, gated activation, softmax, and what is read of a row of
//! logits.

use rayon::prelude::*;

use super::Shared;
use super::simd::{LANES, dot, dot3, exp, larger, max_pairwise, multiversion, tanh};
use super::team::Team;
use crate::spec::Activation;

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

/// Adds to `dx` the gradient of [`rms_norm`]'s input, from that of its result, `d`. All: `[rows, weight.len()]`.
pub fn rms_norm_backward(x: &[f32], weight: &[f32], eps: f32, d: &[f32], dx: &mut [f32]) {
    let width = weight.len();
    let rows = x.par_chunks_exact(width).zip(d.par_chunks_exact(width)).zip(dx.par_chunks_exact_mut(width));
    rows.with_min_len(MIN_ROWS).for_each(|((x, d), dx)| rms_norm_backward_row(x, weight, eps, d, dx));
}

multiversion! {
    fn rms_norm_backward_row(x: &[f32], weight: &[f32], eps: f32, d: &[f32], dx: &mut [f32]) {
        let scale = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
        let weighted = dot3(d, x, weight) / x.len() as f32 * scale * scale;
        for (((dx, d), x), weight) in dx.iter_mut().zip(d).zip(x).zip(weight) {
            *dx += scale * (*d * *weight - *x * weighted);
        }
    }
}

multiversion! {
    /// x += y / rms(y) * weight: a residual that takes what has been normed after its layer.
    pub fn add_rms_norm_row(x: &mut [f32], y: &[f32], weight: &[f32], eps: f32) {
        let scale = 1.0 / (dot(y, y) / y.len() as f32 + eps).sqrt();
        for ((x, y), weight) in x.iter_mut().zip(y).zip(weight) {
            *x += *y * scale * *weight;
        }
    }
}

/// As [`add_rms_norm_row`] for each row. `x`, `y`: `[rows, weight.len()]`.
pub fn add_rms_norm(team: &Team, x: &mut [f32], y: &[f32], weight: &[f32], eps: f32) {
    let width = weight.len();
    assert!(x.len() == y.len(), "both have the same rows");
    let to = Shared(x.as_mut_ptr());
    team.each(y.len().div_ceil(MIN_ROWS * width), |i| {
        let rows = i * MIN_ROWS * width..y.len().min((i + 1) * MIN_ROWS * width);
        // SAFETY: these rows lie in x, and are this piece's alone.
        let x = unsafe { to.part(rows.start, rows.len()) };
        for (x, y) in x.chunks_exact_mut(width).zip(y[rows].chunks_exact(width)) {
            add_rms_norm_row(x, y, weight, eps);
        }
    });
}

multiversion! {
    /// Each head, `weight.len()` wide, becomes head / rms(head) * weight.
    pub(super) fn norm_heads(x: &mut [f32], weight: &[f32], eps: f32) {
        for head in x.chunks_exact_mut(weight.len()) {
            let scale = 1.0 / (dot(head, head) / weight.len() as f32 + eps).sqrt();
            for (x, weight) in head.iter_mut().zip(weight) {
                *x = *x * scale * *weight;
            }
        }
    }
}

/// Rotates the first values of each head by the row's angles (RoPE, Su et al. 2021; Hugging Face's half-split order:
/// value i turns with value i + half), the others stay. `x`: `[rows, width]` of heads of `head_dim`; `cos_sin(row)`: the
/// row's `[half]` cosines and sines, 2 * half at most `head_dim`.
pub fn rope<'t>(
    x: &mut [f32],
    width: usize,
    head_dim: usize,
    cos_sin: impl Fn(usize) -> (&'t [f32], &'t [f32]) + Sync,
) {
    x.par_chunks_exact_mut(width).enumerate().with_min_len(MIN_ROWS).for_each(|(i, x)| {
        let (cos, sin) = cos_sin(i);
        rotate(x, head_dim, cos, sin);
    });
}

/// The gradient of [`rope`]'s result becomes that of its input: the inverse of a rotation turns the other way.
pub fn rope_backward<'t>(
    d: &mut [f32],
    width: usize,
    head_dim: usize,
    cos_sin: impl Fn(usize) -> (&'t [f32], &'t [f32]) + Sync,
) {
    d.par_chunks_exact_mut(width).enumerate().with_min_len(MIN_ROWS).for_each(|(i, d)| {
        let (cos, sin) = cos_sin(i);
        rotate_back(d, head_dim, cos, sin);
    });
}

multiversion! {
    /// One row of [`rope`].
    pub(super) fn rotate(x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
        for head in x.chunks_exact_mut(head_dim) {
            let (low, high) = head.split_at_mut(cos.len());
            for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                let (a, b) = (*low, *high);
                *low = a * cos - b * sin;
                *high = b * cos + a * sin;
            }
        }
    }
}

multiversion! {
    /// One row of [`rope_backward`].
    fn rotate_back(d: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
        for head in d.chunks_exact_mut(head_dim) {
            let (low, high) = head.split_at_mut(cos.len());
            for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                let (a, b) = (*low, *high);
                *low = a * cos + b * sin;
                *high = b * cos - a * sin;
            }
        }
    }
}

/// Values that a task of an element-wise operation takes.
const PIECE: usize = 8192;

/// gate = activation(gate) * up, element by element.
pub fn gated(activation: Activation, gate: &mut [f32], up: &[f32]) {
    let parts = gate.par_chunks_mut(PIECE).zip(up.par_chunks(PIECE));
    parts.for_each(|(gate, up)| gated_row(activation, gate, up));
}

/// As [`gated`], on this thread.
pub fn gated_row(activation: Activation, gate: &mut [f32], up: &[f32]) {
    match activation {
        Activation::Silu => swiglu_row(gate, up),
        Activation::GeluTanh => geglu_row(gate, up),
    }
}

multiversion! {
    fn swiglu_row(gate: &mut [f32], up: &[f32]) {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = *gate / (1.0 + exp(-*gate)) * *up;
        }
    }
}

multiversion! {
    fn geglu_row(gate: &mut [f32], up: &[f32]) {
        for (gate, up) in gate.iter_mut().zip(up) {
            // (1 + tanh(u)) / 2 is the sigmoid of 2 u.
            *gate = *gate / (1.0 + exp(-gelu_argument(*gate))) * *up;
        }
    }
}

/// 2 sqrt(2 / pi) and what x cubed counts for beside x in [`Activation::GeluTanh`].
const GELU: (f32, f32) = (1.595_769_2, 0.044_715);

/// Twice the argument of the tanh in [`Activation::GeluTanh`].
#[inline(always)]
fn gelu_argument(x: f32) -> f32 {
    GELU.0 * (x * (x * x).mul_add(GELU.1, 1.0))
}

/// The gradient of [`gated`]'s result, d, becomes that of gate and of up, in their places.
pub fn gated_backward(activation: Activation, gate: &mut [f32], up: &mut [f32], d: &[f32]) {
    let part: fn(&mut [f32], &mut [f32], &[f32]) = match activation {
        Activation::Silu => swiglu_backward,
        Activation::GeluTanh => geglu_backward,
    };
    let parts = gate.par_chunks_mut(PIECE).zip(up.par_chunks_mut(PIECE)).zip(d.par_chunks(PIECE));
    parts.for_each(|((gate, up), d)| part(gate, up, d));
}

multiversion! {
    fn swiglu_backward(gate: &mut [f32], up: &mut [f32], d: &[f32]) {
        for ((gate, up), d) in gate.iter_mut().zip(up).zip(d) {
            let sigmoid = 1.0 / (1.0 + exp(-*gate));
            let silu = *gate * sigmoid;
            *gate = d * *up * sigmoid * (1.0 + *gate * (1.0 - sigmoid));
            *up = d * silu;
        }
    }
}

multiversion! {
    fn geglu_backward(gate: &mut [f32], up: &mut [f32], d: &[f32]) {
        for ((gate, up), d) in gate.iter_mut().zip(up).zip(d) {
            let sigmoid = 1.0 / (1.0 + exp(-gelu_argument(*gate)));
            let gelu = *gate * sigmoid;
            let slope = GELU.0 * (*gate * *gate).mul_add(3.0 * GELU.1, 1.0);
            *gate = d * *up * sigmoid * (1.0 + *gate * slope * (1.0 - sigmoid));
            *up = d * gelu;
        }
    }
}

multiversion! {
    /// x = cap * tanh(x / cap), element by element (Gemma 2's soft cap, of logits and of attention's scores).
    pub fn softcap(x: &mut [f32], cap: f32) {
        let inverse = 1.0 / cap;
        for x in x {
            *x = cap * tanh(*x * inverse);
        }
    }
}

multiversion! {
    /// The gradient of [`softcap`]'s result y becomes that of its input: d * (1 - (y / cap)^2).
    pub fn softcap_backward(y: &[f32], d: &mut [f32], cap: f32) {
        let inverse = 1.0 / cap;
        for (d, y) in d.iter_mut().zip(y) {
            let tanh = *y * inverse;
            *d *= 1.0 - tanh * tanh;
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::sinusoid;

    fn activated(activation: Activation, x: f64) -> f64 {
        match activation {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::GeluTanh => {
                let argument = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                0.5 * x * (1.0 + argument.tanh())
            }
        }
    }

    fn assert_close(got: f32, want: f64, most: f64) {
        assert!((f64::from(got) - want).abs() <= most * want.abs().max(1.0), "{got} {want}");
    }

    /// Against the definition in double precision, and its slope by differences; large gates too.
    #[test]
    fn gates_and_their_gradients() {
        let gates: Vec<f32> = (-400..400).map(|i| i as f32 * 0.05).chain([-1e20, -90.0, 90.0, 1e4]).collect();
        let (up, d) = (sinusoid(gates.len(), 1), sinusoid(gates.len(), 2));
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let mut y = gates.clone();
            gated(activation, &mut y, &up);
            let (mut dg, mut du) = (gates.clone(), up.clone());
            gated_backward(activation, &mut dg, &mut du, &d);
            for (i, gate) in gates.iter().map(|x| f64::from(*x)).enumerate() {
                let (up, d) = (f64::from(up[i]), f64::from(d[i]));
                assert_close(y[i], activated(activation, gate) * up, 1e-6);
                assert_close(du[i], activated(activation, gate) * d, 1e-6);
                if gate.abs() < 100.0 {
                    let slope = (activated(activation, gate + 1e-5) - activated(activation, gate - 1e-5)) / 2e-5;
                    assert_close(dg[i], d * up * slope, 1e-5);
                }
            }
        }
        let mut broken = [f32::NAN];
        gated(Activation::GeluTanh, &mut broken, &[1.0]);
        assert!(broken[0].is_nan(), "what is not a number stays so");
    }

    #[test]
    fn soft_caps_and_their_gradients() {
        let x = sinusoid(1000, 3);
        let mut y: Vec<f32> = x.iter().map(|x| x * 40.0).collect();
        softcap(&mut y, 30.0);
        let mut d = vec![1.0; x.len()];
        softcap_backward(&y, &mut d, 30.0);
        for ((x, y), d) in x.iter().zip(y).zip(d) {
            let tanh = (f64::from(*x) * 40.0 / 30.0).tanh();
            assert_close(y, 30.0 * tanh, 3e-6);
            assert_close(d, 1.0 - tanh * tanh, 1e-5);
        }
    }

    /// Against differences in double precision.
    #[test]
    fn the_gradient_of_a_norm() {
        let (weight, eps) = (sinusoid(40, 1), 1e-5);
        let (x, d) = (sinusoid(3 * 40, 2), sinusoid(3 * 40, 3));
        let mut dx = vec![1.0; x.len()];
        rms_norm_backward(&x, &weight, eps, &d, &mut dx);
        let loss = |x: &[f64]| -> f64 {
            let row = |(x, d): (&[f64], &[f32])| -> f64 {
                let rms = (x.iter().map(|x| x * x).sum::<f64>() / 40.0 + f64::from(eps)).sqrt();
                x.iter().zip(d).zip(&weight).map(|((x, d), w)| x / rms * f64::from(*w) * f64::from(*d)).sum()
            };
            x.chunks_exact(40).zip(d.chunks_exact(40)).map(row).sum()
        };
        let exact: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        for (i, got) in dx.iter().enumerate() {
            let at = |by: f64| {
                let mut x = exact.clone();
                x[i] += by;
                loss(&x)
            };
            assert_close(*got, 1.0 + (at(1e-5) - at(-1e-5)) / 2e-5, 1e-5);
        }
    }

    /// As the norm and the sum one after the other, for any number of rows.
    #[test]
    fn a_norm_that_is_added() {
        let weight = sinusoid(48, 1);
        for rows in [1, 3, 30] {
            let (x, y) = (sinusoid(rows * 48, 2), sinusoid(rows * 48, 3));
            let (mut got, mut normed) = (x.clone(), vec![0.0; y.len()]);
            add_rms_norm(Team::get(), &mut got, &y, &weight, 1e-6);
            rms_norm(&y, &weight, 1e-6, &mut normed);
            let want: Vec<f32> = x.iter().zip(&normed).map(|(x, y)| x + y).collect();
            assert_eq!(got, want);
        }
    }

    /// Turning back what has been turned gives what there was, and values beyond the angles stay.
    #[test]
    fn a_rotation_has_an_inverse() {
        let (cos, sin): (Vec<f32>, Vec<f32>) = (1..9).map(|i| ((i as f32).cos(), (i as f32).sin())).unzip();
        let x = sinusoid(3 * 96, 1);
        let mut y = x.clone();
        rope(&mut y, 96, 32, |_| (&cos, &sin));
        assert_eq!(y[16..32], x[16..32]);
        assert!(y[..16].iter().zip(&x[..16]).all(|(y, x)| y != x));
        rope_backward(&mut y, 96, 32, |_| (&cos, &sin));
        x.iter().zip(y).for_each(|(x, y)| assert!((x - y).abs() < 1e-5));
    }
}
