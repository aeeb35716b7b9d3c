//! The search for the scale (and the least value) of a block that is quantised: of some candidates that with the least
//! error once it has been fitted by least squares, each value weighted by its size. Values are finite.

use half::f16;

/// Parts of a step between the candidates around the range of the quants.
const PART: f32 = 0.1;

/// Candidates on either side of the range.
const AROUND: i32 = 9;

/// The nearest integer, ties to even, of numbers below 2^22: what a sum's rounding leaves.
#[inline(always)]
fn nearest(x: f32) -> f32 {
    const ROUNDS: f32 = (3 << 22) as f32;
    x + ROUNDS - ROUNDS
}

/// The half-precision number next to x, the largest where x is beyond them.
pub fn half(x: f32) -> f16 {
    f16::from_f32(x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
}

/// 1 / x, or zero where that is no number.
fn inverse(x: f32) -> f32 {
    let inverse = 1.0 / x;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// The ranges to be tried: around `most` and all whole ones below it.
fn ranges(most: f32) -> impl Iterator<Item = f32> {
    let around = (-AROUND..=AROUND).map(move |part| most + PART * part as f32);
    around.chain((1..most as i32).map(|range| range as f32))
}

/// What a value counts in the fit beside others of its block.
fn weigher(x: &[f32]) -> impl Fn(f32) -> f32 {
    let squares: f32 = x.iter().map(|x| x * x).sum();
    let usual = (squares / x.len() as f32).sqrt();
    move |x: f32| usual + x.abs()
}

/// The value of the largest magnitude.
pub fn extreme(x: &[f32]) -> f32 {
    x.iter().fold(0.0f32, |extreme, x| if x.abs() > extreme.abs() { *x } else { extreme })
}

/// d, of either sign, such that d * q comes close to x for q from -range to range - 1.
pub fn scale(x: &[f32], range: f32) -> f32 {
    let (extreme, weight) = (extreme(x), weigher(x));
    let (mut best, mut scale) = (0.0, 0.0);
    for range_tried in ranges(range) {
        let by = -range_tried * inverse(extreme);
        let (mut products, mut squares) = (0.0, 0.0);
        for x in x {
            let (q, weight) = (nearest(x * by).clamp(-range, range - 1.0), weight(*x));
            products += weight * x * q;
            squares += weight * q * q;
        }
        // The error's part that the choice decides is -products^2 / squares.
        if products * products > best * squares && squares > 0.0 {
            (best, scale) = (products * products / squares, products / squares);
        }
    }
    scale
}

/// d and m such that d * q + m comes close to x for q from 0 to `most`; `below`: m is to be at most 0.
pub fn scale_and_least(x: &[f32], most: f32, below: bool) -> (f32, f32) {
    let largest = x.iter().fold(f32::MIN, |a, b| a.max(*b));
    let least = x.iter().fold(if below { 0.0 } else { f32::MAX }, |a: f32, b| a.min(*b));
    if largest <= least {
        return (0.0, least);
    }
    let weight = weigher(x);
    let error = |d: f32, m: f32| error(x, (d, m), most, &weight);
    let mut fit = ((largest - least) / most, least);
    let mut best = error(fit.0, fit.1);
    for range in ranges(most) {
        let by = range * inverse(largest - least);
        let [mut w, mut wx, mut wq, mut wqq, mut wxq] = [0.0; 5];
        for x in x {
            let (q, weight) = (nearest((x - least) * by).clamp(0.0, most), weight(*x));
            w += weight;
            wx += weight * x;
            wq += weight * q;
            wqq += weight * q * q;
            wxq += weight * x * q;
        }
        let by = inverse(w * wqq - wq * wq);
        let (mut d, mut m) = ((w * wxq - wx * wq) * by, (wqq * wx - wq * wxq) * by);
        if below && m > 0.0 {
            (d, m) = (wxq * inverse(wqq), 0.0);
        }
        let own = error(d, m);
        if own < best && d > 0.0 {
            (best, fit) = (own, (d, m));
        }
    }
    fit
}

/// The weighted squared error of d * q + m with the best q from 0 to `most`.
fn error(x: &[f32], (d, m): (f32, f32), most: f32, weight: impl Fn(f32) -> f32) -> f32 {
    let by = inverse(d);
    let of = |x: &f32| {
        let error = d * nearest((x - m) * by).clamp(0.0, most) + m - x;
        weight(*x) * error * error
    };
    x.iter().map(of).sum()
}

/// The best q from 0 to `most` of d * q + m.
pub fn quants<const N: usize>(x: &[f32], (d, m): (f32, f32), most: u8) -> [u8; N] {
    let by = inverse(d);
    let mut quants = [0; N];
    for (q, x) in quants.iter_mut().zip(x) {
        *q = nearest((x - m) * by).clamp(0.0, most.into()) as u8;
    }
    quants
}

/// Of whole multiples `a d` and `b m` next to the ones given, those with the least error of a d q + b m; each from its
/// range.
pub fn multiples(x: &[f32], units: (f32, f32), (a, b): (i32, i32), ranges: [(i32, i32); 2], most: f32) -> (i32, i32) {
    let weight = weigher(x);
    let [a_range, b_range] = ranges;
    let (mut best, mut found) = (f32::INFINITY, (a, b));
    for a in (a - 1).max(a_range.0)..=(a + 1).min(a_range.1) {
        for b in (b - 1).max(b_range.0)..=(b + 1).min(b_range.1) {
            let own = error(x, (units.0 * a as f32, units.1 * b as f32), most, &weight);
            if own < best {
                (best, found) = (own, (a, b));
            }
        }
    }
    found
}
