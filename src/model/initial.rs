//! Adapters that began as a part of the base. PiSSA (Meng et al. 2024) takes the largest singular values of a layer out of the base and starts
//! the adapter as them, OLoRA (Büyükakyüz 2024) the first columns of its QR decomposition, CorDA (Yang et al. 2024) directions that its data
//! choose. Such an adapter means something on the base without that part, B A on W - B0 A0: PEFT takes the part out again when it loads one.
//!
//! Here the base stays as it is, so the part goes into the adapter: [B, -B0] [A; A0], of twice the rank, which is what PEFT's own conversion
//! gives (`path_initial_model_for_weight_conversion`). A config may also keep the initialisation's name when its tensors are converted or
//! others, so they are looked at: where taking the part out makes the sum of all changes smaller, they hold it still.
//!
//! What is trained here starts in the same way ([`Model::start_as_part`]) and becomes a plain adapter when its training ends.

use crate::adapter::{Adapter, CONVERSION, Initialisation, LowRank, Site};
use crate::arch::decoder::SiteId;
use crate::device::TrainPermit;
use crate::error::{Error, Result};
use crate::kernels::gemm::{self, Mat, Out};
use crate::model::Model;
use crate::request::{LoraInit, LoraSpec, TunerSpec};

/// Rounds of the search for singular vectors before it is looked whether it has ended, and how often that is looked at most.
const ROUNDS: usize = 4;
const LOOKS: usize = 15;

/// The share by which the values that were found may still grow when the search ends.
const FOUND: f64 = 1e-7;

/// QL steps for one eigenvalue; two or three are usual.
const MOST_STEPS: usize = 60;

/// Vectors that are searched beside twice those that are wanted: the more, the faster it ends.
const SPARE: usize = 16;

/// What a layer's initialisation took out of the base, without the adapter's scale: the columns `u` `[out, rank]`, orthonormal, times `a`
/// `[rank, in]`.
pub(super) struct Part {
    pub(super) rank: usize,
    pub(super) u: Vec<f32>,
    pub(super) a: Vec<f32>,
}

impl Model {
    /// Starts a fresh adapter, of which [`Adapter::is_of_base`] is true, as a part of the base: scale * B A is that part. Gives way to serving at
    /// every layer, and asks `go_on` before.
    ///
    /// # Errors
    /// Those of `go_on`; internal ones for an adapter of another base or start.
    pub fn start_as_part(
        &self,
        adapter: &mut Adapter,
        permit: &TrainPermit,
        go_on: impl Fn() -> Result<()>,
    ) -> Result<()> {
        let initialisation = match &adapter.spec {
            TunerSpec::Lora(LoraSpec { init: LoraInit::Pissa, .. }) => Initialisation::Pissa,
            TunerSpec::Lora(LoraSpec { init: LoraInit::Olora, .. }) => Initialisation::Olora,
            _ => return Err(Error::internal("the adapter starts as no part of the base")),
        };
        for (site, pair) in adapter.pairs_mut() {
            go_on()?;
            let id = self.shape().index(site).ok_or_else(|| misfit(site))?;
            let part = part(self, id, pair, initialisation, &|| permit.yield_to_serving());
            let factors = match initialisation {
                // Both matrices take the root of the singular value.
                Initialisation::Pissa => part.lengths().map(|length| (length / pair.scale).sqrt()).collect(),
                _ => vec![1.0; part.rank],
            };
            let start = part.pair(pair, weight(pair, initialisation), &factors);
            (pair.a, pair.b) = (start.a, start.b);
        }
        Ok(())
    }
}

fn misfit(site: Site) -> Error {
    Error::internal(format!("an adapter does not fit the base at {site:?}"))
}

/// Gives the adapter for the base as it is; `None` where it is that already.
///
/// # Errors
/// UNSUPPORTED_SETTING where the part that was taken out cannot be found again from the files: CorDA's data chose it, or the random numbers of
/// PiSSA's fast search, whose result PEFT itself does not find again.
pub(super) fn plain_form(
    model: &Model,
    lora: &Adapter,
    initialisation: Initialisation,
    yield_to_serving: &dyn Fn(),
) -> Result<Option<Adapter>> {
    let TunerSpec::Lora(spec) = &lora.spec else { return Ok(None) };
    let part_of = |(site, layer)| {
        yield_to_serving();
        let id = model.shape().index(site).ok_or_else(|| misfit(site))?;
        Ok((site, layer, part(model, id, layer, initialisation, yield_to_serving)))
    };
    let parts: Vec<(Site, &LowRank, Part)> = lora.pairs().map(part_of).collect::<Result<_>>()?;
    // (The changes' product with the parts, the parts' square): |change - part|^2 < |change|^2 where the product is over half the square.
    let mut held = (0.0, 0.0);
    for (_, layer, part) in &parts {
        let (product, square) = overlap(layer, part, weight(layer, initialisation));
        held = (held.0 + product, held.1 + square);
    }
    if held.0 <= 0.5 * held.1 {
        return Ok(None);
    }
    let lost = match initialisation {
        Initialisation::Corda => Some("data"),
        Initialisation::PissaSearched => Some("random numbers"),
        Initialisation::Pissa | Initialisation::Olora => None,
    };
    if let Some(lost) = lost {
        let message = format!(
            "says that the tensors belong to a base that was changed by {lost} that are not in the files; {CONVERSION}"
        );
        return Err(Error::invalid_because("UNSUPPORTED_SETTING", "init_lora_weights", message));
    }
    let starts = parts.into_iter().map(|(site, layer, part)| {
        let factors = vec![1.0; part.rank];
        (site, part.pair(layer, weight(layer, initialisation), &factors))
    });
    Ok(Some(lora.without(&Adapter::lora(spec.clone(), starts))))
}

/// What the part is multiplied by: PiSSA takes the adapter's scale out of it, OLoRA leaves it in.
fn weight(layer: &LowRank, initialisation: Initialisation) -> f32 {
    if initialisation == Initialisation::Olora { layer.scale } else { 1.0 }
}

impl Part {
    /// The norms of the rows of `a`: singular values, where the part is made of those.
    fn lengths(&self) -> impl Iterator<Item = f32> {
        let length = |row: &[f32]| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() as f32;
        self.a.chunks_exact(self.a.len() / self.rank).map(length)
    }

    /// The part times `weight` as a pair of a layer's scale and shape, whose columns of B are `u` times `factors`. Of a layer narrower than its
    /// rank there are fewer columns; the rest are zeros.
    fn pair(&self, layer: &LowRank, weight: f32, factors: &[f32]) -> LowRank {
        let by = |factor: f32| if layer.scale * factor == 0.0 { 0.0 } else { weight / (layer.scale * factor) };
        let rows = self.a.chunks_exact(self.a.len() / self.rank).zip(factors);
        let mut a: Vec<f32> = rows.flat_map(|(row, factor)| row.iter().map(|x| x * by(*factor))).collect();
        a.resize(layer.a.len(), 0.0);
        let row = |u: &[f32]| -> Vec<f32> {
            let values = u.iter().zip(factors).map(|(x, factor)| x * factor);
            values.chain(std::iter::repeat_n(0.0, layer.rank - self.rank)).collect()
        };
        let b = self.u.chunks_exact(self.rank).flat_map(row).collect();
        LowRank { a, b, magnitude: layer.magnitude.clone(), bias: None, ..*layer }
    }
}

/// (The product of scale B A and the part, the part's square), both summed over all elements.
fn overlap(layer: &LowRank, part: &Part, weight: f32) -> (f64, f64) {
    let inputs = layer.a.len() / layer.rank;
    let mut bu = vec![0.0; layer.rank * part.rank];
    gemm::mul_tn(out(&mut bu, part.rank), Mat::dense(&layer.b, layer.rank), Mat::dense(&part.u, part.rank), false);
    let mut aa = vec![0.0; layer.rank * part.rank];
    gemm::mul_nt(out(&mut aa, part.rank), Mat::dense(&layer.a, inputs), Mat::dense(&part.a, inputs), false);
    let product: f64 = bu.iter().zip(&aa).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
    let square: f64 = part.a.iter().map(|x| f64::from(*x).powi(2)).sum();
    let (scale, weight) = (f64::from(layer.scale), f64::from(weight));
    (scale * weight * product, weight * weight * square)
}

fn out(data: &mut [f32], stride: usize) -> Out<'_> {
    Out { data, stride, accumulate: false }
}

/// What the initialisation took out of a layer.
fn part(
    model: &Model,
    site: SiteId,
    layer: &LowRank,
    initialisation: Initialisation,
    yield_to_serving: &dyn Fn(),
) -> Part {
    let matrix = model.matrix(site);
    let (outputs, inputs) = (matrix.rows(), matrix.cols());
    let mut w = vec![0.0; outputs * inputs];
    for (row, values) in w.chunks_exact_mut(inputs).enumerate() {
        matrix.dequantize(row, values);
    }
    let rank = layer.rank.min(outputs).min(inputs);
    let columns = |from: &[f32], stride: usize| -> Vec<f32> {
        from.chunks_exact(stride).flat_map(|row| row[..rank].iter().copied()).collect()
    };
    let mut u = match initialisation {
        Initialisation::Olora => columns(&w, inputs),
        // Those of B, which training has moved a little.
        Initialisation::Corda => columns(&layer.b, layer.rank),
        Initialisation::Pissa | Initialisation::PissaSearched => {
            return singular(&w, (outputs, inputs), rank, &layer.b, yield_to_serving);
        }
    };
    orthonormalise(&mut u, rank);
    let mut a = vec![0.0; rank * inputs];
    gemm::mul_tn(out(&mut a, inputs), Mat::dense(&u, rank), Mat::dense(&w, inputs), true);
    Part { rank, u, a }
}

/// The largest `rank` singular values of W with their vectors, by subspace iteration; it starts from `start` `[out, any]`, columns that are
/// near the vectors, or from nothing.
pub(super) fn singular(
    w: &[f32],
    (outputs, inputs): (usize, usize),
    rank: usize,
    start: &[f32],
    yield_to_serving: &dyn Fn(),
) -> Part {
    let start_rank = start.len() / outputs;
    let width = (2 * rank + SPARE).min(outputs).min(inputs);
    // A fresh B is zero.
    let known = if start.iter().any(|x| *x != 0.0) { start_rank.min(width) } else { 0 };
    let mut q = vec![0.0; outputs * width];
    for (row, to) in q.chunks_exact_mut(width).enumerate() {
        to[..known].copy_from_slice(&start[row * start_rank..][..known]);
        for (k, x) in to.iter_mut().enumerate().skip(known) {
            *x = ((row * 31 + k * 7919 + 1) as f32 * 0.618_034).fract() - 0.5;
        }
    }
    orthonormalise(&mut q, width);
    let (w, mut z) = (Mat::dense(w, inputs), vec![0.0; inputs * width]);
    gemm::mul_tn(out(&mut z, width), w, Mat::dense(&q, width), true);
    let (mut values, mut vectors) = eigen(gram(&z, width), width, yield_to_serving);
    for _ in 0..LOOKS {
        for _ in 0..ROUNDS {
            yield_to_serving();
            gemm::mul(out(&mut q, width), w, Mat::dense(&z, width), true);
            orthonormalise(&mut q, width);
            gemm::mul_tn(out(&mut z, width), w, Mat::dense(&q, width), true);
        }
        let before: f64 = values[..rank].iter().sum();
        (values, vectors) = eigen(gram(&z, width), width, yield_to_serving);
        if values[..rank].iter().sum::<f64>() <= before * (1.0 + FOUND) {
            break;
        }
    }
    let u = project(&q, width, &vectors, rank);
    Part { rank, u, a: transposed(&project(&z, width, &vectors, rank), rank) }
}

/// Makes the columns of a matrix orthonormal.
fn orthonormalise(q: &mut [f32], width: usize) {
    // Twice: the first time removes all but what rounding leaves.
    if !(by_products(q, width) && by_products(q, width)) {
        one_by_one(q, width);
    }
}

/// Multiplies by the inverse of the Cholesky factor of Q^T Q. Fast, and no help where columns nearly depend on each other: then false, with
/// the matrix as it was.
fn by_products(q: &mut [f32], width: usize) -> bool {
    let mut r = gram(q, width);
    let largest = (0..width).map(|i| r[i * width + i]).fold(0.0, f64::max);
    for k in 0..width {
        let left = r[k * width + k] - (0..k).map(|j| r[k * width + j].powi(2)).sum::<f64>();
        if left.is_nan() || left <= 1e-5 * largest {
            return false;
        }
        r[k * width + k] = left.sqrt();
        for i in k + 1..width {
            let along: f64 = (0..k).map(|j| r[i * width + j] * r[k * width + j]).sum();
            r[i * width + k] = (r[i * width + k] - along) / r[k * width + k];
        }
    }
    let mut inverse = vec![0.0; width * width];
    for k in 0..width {
        inverse[k * width + k] = 1.0 / r[k * width + k];
        for i in k + 1..width {
            let along: f64 = (k..i).map(|j| r[i * width + j] * inverse[k * width + j]).sum();
            inverse[k * width + i] = -along / r[i * width + i];
        }
    }
    q.copy_from_slice(&project(q, width, &inverse, width));
    true
}

/// Takes the columns one after the other, each twice; one that is none of its own becomes zero.
fn one_by_one(q: &mut [f32], width: usize) {
    let rows = q.len() / width;
    let mut columns = transposed(q, width);
    for k in 0..width {
        let (done, rest) = columns.split_at_mut(k * rows);
        let column = &mut rest[..rows];
        let length = |column: &[f32]| column.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let before = length(column);
        for other in done.chunks_exact(rows).chain(done.chunks_exact(rows)) {
            let along: f64 = other.iter().zip(&*column).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
            column.iter_mut().zip(other).for_each(|(x, y)| *x -= along as f32 * y);
        }
        let after = length(column);
        let by = if after > 1e-5 * before { (1.0 / after) as f32 } else { 0.0 };
        column.iter_mut().for_each(|x| *x *= by);
    }
    q.copy_from_slice(&transposed(&columns, rows));
}

fn transposed(values: &[f32], cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|col| values.iter().skip(col).step_by(cols).copied()).collect()
}

/// Z^T Z.
fn gram(z: &[f32], width: usize) -> Vec<f64> {
    let mut products = vec![0.0; width * width];
    gemm::mul_tn(out(&mut products, width), Mat::dense(z, width), Mat::dense(z, width), false);
    products.into_iter().map(f64::from).collect()
}

/// The first `rank` columns of Q V.
fn project(q: &[f32], width: usize, vectors: &[f64], rank: usize) -> Vec<f32> {
    let v: Vec<f32> = vectors.chunks_exact(width).flat_map(|row| row[..rank].iter().map(|x| *x as f32)).collect();
    let mut projected = vec![0.0; q.len() / width * rank];
    gemm::mul(out(&mut projected, rank), Mat::dense(q, width), Mat::dense(&v, rank), false);
    projected
}

/// Eigenvalues of a symmetric matrix, the largest first, and their vectors as columns: Householder's reduction to three diagonals (Martin,
/// Reinsch & Wilkinson 1968), then QL steps with implicit shifts (Dubrulle, Martin & Wilkinson 1968).
fn eigen(matrix: Vec<f64>, n: usize, yield_to_serving: &dyn Fn()) -> (Vec<f64>, Vec<f64>) {
    let (mut diagonal, mut beside, mut vectors) = three_diagonals(matrix, n, yield_to_serving);
    for low in 0..n {
        yield_to_serving();
        for _ in 0..MOST_STEPS {
            let small = |m: usize| beside[m].abs() <= f64::EPSILON * (diagonal[m].abs() + diagonal[m + 1].abs());
            let high = (low..n - 1).find(|m| small(*m)).unwrap_or(n - 1);
            if high == low {
                break;
            }
            ql_step(&mut diagonal, &mut beside, &mut vectors, (low, high));
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|i, j| diagonal[*j].total_cmp(&diagonal[*i]));
    let values = order.iter().map(|i| diagonal[*i]).collect();
    let columns = (0..n).flat_map(|row| order.iter().map(|of| vectors[of * n + row]).collect::<Vec<_>>()).collect();
    (values, columns)
}

/// Turns a symmetric matrix so that only its diagonal and what lies beside that is left; gives both, and the turn as rows.
fn three_diagonals(mut a: Vec<f64>, n: usize, yield_to_serving: &dyn Fn()) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let mut turn = vec![0.0; n * n];
    (0..n).for_each(|i| turn[i * n + i] = 1.0);
    for k in 0..n.saturating_sub(2) {
        yield_to_serving();
        let from = k + 1;
        let mut u: Vec<f64> = (from..n).map(|i| a[i * n + k]).collect();
        let length = dot(&u, &u).sqrt();
        if length == 0.0 {
            continue;
        }
        let beside = -length.copysign(u[0]);
        u[0] -= beside;
        let half = dot(&u, &u) / 2.0;
        let mut p: Vec<f64> = (from..n).map(|i| dot(&a[i * n + from..][..n - from], &u) / half).collect();
        let along = dot(&u, &p) / (2.0 * half);
        p.iter_mut().zip(&u).for_each(|(p, u)| *p -= along * u);
        for (i, (ui, pi)) in u.iter().zip(&p).enumerate() {
            let row = &mut a[(from + i) * n + from..][..n - from];
            row.iter_mut().zip(u.iter().zip(&p)).for_each(|(x, (u, p))| *x -= ui * p + pi * u);
        }
        a[from * n + k] = beside;
        let mut turned = vec![0.0; n];
        for (i, ui) in u.iter().enumerate() {
            turned.iter_mut().zip(&turn[(from + i) * n..][..n]).for_each(|(x, row)| *x += ui / half * row);
        }
        for (i, ui) in u.iter().enumerate() {
            turn[(from + i) * n..][..n].iter_mut().zip(&turned).for_each(|(row, x)| *row -= ui * x);
        }
    }
    let diagonal = (0..n).map(|i| a[i * n + i]).collect();
    let beside = (0..n).map(|i| if i + 1 < n { a[(i + 1) * n + i] } else { 0.0 }).collect();
    (diagonal, beside, turn)
}

/// Makes what lies beside the diagonal smaller between two rows, at `low` the most. The rows of `vectors` turn with it.
fn ql_step(diagonal: &mut [f64], beside: &mut [f64], vectors: &mut [f64], (low, high): (usize, usize)) {
    let n = diagonal.len();
    let ratio = (diagonal[low + 1] - diagonal[low]) / (2.0 * beside[low]);
    let mut g = diagonal[high] - diagonal[low] + beside[low] / (ratio + ratio.hypot(1.0).copysign(ratio));
    let (mut sin, mut cos, mut moved) = (1.0, 1.0, 0.0);
    for i in (low..high).rev() {
        let (f, b) = (sin * beside[i], cos * beside[i]);
        let r = f.hypot(g);
        beside[i + 1] = r;
        if r == 0.0 {
            diagonal[i + 1] -= moved;
            beside[high] = 0.0;
            return;
        }
        (sin, cos) = (f / r, g / r);
        g = diagonal[i + 1] - moved;
        let r = (diagonal[i] - g) * sin + 2.0 * cos * b;
        moved = sin * r;
        diagonal[i + 1] = g + moved;
        g = cos * r - b;
        let (lower, upper) = vectors[i * n..(i + 2) * n].split_at_mut(n);
        for (x, y) in lower.iter_mut().zip(upper) {
            (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
        }
    }
    diagonal[low] -= moved;
    beside[low] = g;
    beside[high] = 0.0;
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::LoraSpec;

    fn dense(model: &Model, site: Site) -> (Vec<f32>, usize) {
        let matrix = model.matrix(model.shape().index(site).unwrap());
        let mut w = vec![0.0; matrix.rows() * matrix.cols()];
        w.chunks_exact_mut(matrix.cols()).enumerate().for_each(|(row, to)| matrix.dequantize(row, to));
        (w, matrix.cols())
    }

    /// scale B A, in full.
    fn change(layer: &LowRank) -> Vec<f64> {
        let inputs = layer.a.len() / layer.rank;
        let at =
            |o: usize, i: usize, k: usize| f64::from(layer.b[o * layer.rank + k]) * f64::from(layer.a[k * inputs + i]);
        let outputs = layer.b.len() / layer.rank;
        let cell = |cell: usize| {
            (0..layer.rank).map(|k| at(cell / inputs, cell % inputs, k)).sum::<f64>() * f64::from(layer.scale)
        };
        (0..outputs * inputs).map(cell).collect()
    }

    /// The part that PiSSA takes out of a layer, from all eigenvectors of W W^T.
    fn largest(w: &[f32], inputs: usize, rank: usize) -> Vec<f64> {
        let outputs = w.len() / inputs;
        let row = |o: usize| &w[o * inputs..][..inputs];
        let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
        let squares: Vec<f64> = (0..outputs * outputs).map(|i| dot(row(i / outputs), row(i % outputs))).collect();
        let (_, vectors) = eigen(squares, outputs, &|| {});
        let mut part = vec![0.0; w.len()];
        for k in 0..rank {
            let u = |o: usize| vectors[o * outputs + k];
            for i in 0..inputs {
                let along: f64 = (0..outputs).map(|o| u(o) * f64::from(w[o * inputs + i])).sum();
                (0..outputs).for_each(|o| part[o * inputs + i] += u(o) * along);
            }
        }
        part
    }

    /// An adapter as PiSSA or OLoRA starts it, moved a little: what it means on the base as it is is the move alone.
    #[test]
    fn the_part_of_the_base_is_taken_out_again() {
        let (model, _) = Model::tiny(1);
        for (initialisation, use_rslora) in
            [(Initialisation::Pissa, false), (Initialisation::Olora, false), (Initialisation::Pissa, true)]
        {
            let spec = LoraSpec { rank: 4, alpha: 12.0, use_rslora, ..LoraSpec::default() };
            let mut lora = Adapter::fresh(&spec, model.shape(), 3).unwrap();
            let mut expected = Vec::new();
            for (site, layer) in lora.pairs_mut() {
                let start = LowRank { b: vec![1.0; layer.b.len()], ..layer.clone() };
                let Part { u, a, .. } =
                    part(&model, model.shape().index(site).unwrap(), &start, initialisation, &|| {});
                let by = weight(layer, initialisation) / layer.scale;
                let wave = |i: usize| 0.01 * (i as f32 * 0.37).sin();
                let taken = LowRank { a: a.iter().map(|x| x * by).collect(), b: u.clone(), ..layer.clone() };
                let (w, inputs) = dense(&model, site);
                if initialisation == Initialisation::Pissa {
                    let exact = largest(&w, inputs, 4);
                    let error = change(&taken).iter().zip(&exact).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
                    assert!(error < 1e-3, "{site:?}: {error}");
                }
                layer.a = taken.a.iter().enumerate().map(|(i, x)| x + wave(i)).collect();
                layer.b = taken.b.iter().enumerate().map(|(i, x)| x + wave(i + 5)).collect();
                let moved = change(layer).iter().zip(change(&taken)).map(|(x, y)| x - y).collect::<Vec<_>>();
                expected.push((site, moved));
            }
            let plain =
                plain_form(&model, &lora, initialisation, &|| {}).unwrap().expect("it holds a part of the base");
            for (site, moved) in expected {
                let layer = plain.pair(site).unwrap();
                let TunerSpec::Lora(spec) = &plain.spec else { panic!() };
                assert_eq!((layer.rank, spec.rank), (8, 8));
                assert!((spec.scale(layer.alpha, 8) / layer.scale - 1.0).abs() < 1e-6);
                let error = change(layer).iter().zip(&moved).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
                assert!(error < 1e-3, "{initialisation:?} {site:?}: {error}");
            }
            assert!(
                plain_form(&model, &plain, initialisation, &|| {}).unwrap().is_none(),
                "converted, it stays as it is"
            );
        }
    }

    #[test]
    fn eigenvectors_are_turned_by_their_values() {
        for n in [1, 2, 3, 40] {
            let wave = |i: usize| (i as f64 * 0.7).sin();
            let mut a = vec![0.0; n * n];
            for i in 0..n {
                (0..n).for_each(|j| a[i * n + j] = wave(i * j + i + j) + if i == j { wave(i) } else { 0.0 });
            }
            let (values, vectors) = eigen(a.clone(), n, &|| {});
            assert!(values.is_sorted_by(|x, y| x >= y), "{values:?}");
            for (k, value) in values.iter().enumerate() {
                let v: Vec<f64> = (0..n).map(|row| vectors[row * n + k]).collect();
                assert!((dot(&v, &v) - 1.0).abs() < 1e-12);
                for i in 0..n {
                    assert!((dot(&a[i * n..][..n], &v) - value * v[i]).abs() < 1e-11, "{n}: value {k}, row {i}");
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_found_again_is_told_from_what_only_bears_its_name() {
        for initialisation in [Initialisation::Corda, Initialisation::PissaSearched] {
            cannot_be_found_again(initialisation);
        }
    }

    fn cannot_be_found_again(initialisation: Initialisation) {
        let (model, _) = Model::tiny(1);
        let mut lora =
            Adapter::fresh(&LoraSpec { rank: 4, alpha: 4.0, ..LoraSpec::default() }, model.shape(), 3).unwrap();
        lora.pairs_mut()
            .for_each(|(_, l)| l.b.iter_mut().enumerate().for_each(|(i, b)| *b = 0.1 * (i as f32 * 0.7).sin()));
        assert!(plain_form(&model, &lora, initialisation, &|| {}).unwrap().is_none());
        for (site, layer) in lora.pairs_mut() {
            let Part { u, a, .. } =
                part(&model, model.shape().index(site).unwrap(), layer, Initialisation::Pissa, &|| {});
            (layer.a, layer.b) = (a, u);
        }
        let refused = plain_form(&model, &lora, initialisation, &|| {}).unwrap_err().to_string();
        assert!(refused.contains("path_initial_model_for_weight_conversion"), "{refused}");
    }
}
