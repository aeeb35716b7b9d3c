//! Bottleneck adapters (Houlsby et al. 2019) of a mixed batch: what a layer gives goes down to a few values, through a non-linearity, and up
//! again. Each row by itself, with its own adapter.

use super::Shared;
use super::lora::{LoraPair, expand_row, padded, shrink};
use super::rows::gated_row;
use super::simd::Level;
use super::team::Team;
use crate::spec::Activation;

/// A bottleneck adapter at one layer: y += up act(down y + down_bias) + up_bias.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bottleneck<'a> {
    /// Down as A, up as B; with a scale of 1.
    pub pair: LoraPair<'a>,
    /// `[rank]`.
    pub down_bias: &'a [f32],
    /// `[width]`.
    pub up_bias: &'a [f32],
    /// The non-linearity.
    pub activation: Activation,
}

/// Applies its adapter to each row of `y`, `[rows, width]`, that has one. `inner` is memory that calls hand on.
pub fn bottleneck<'a>(
    team: &Team,
    of_row: impl Fn(usize) -> Option<Bottleneck<'a>> + Sync,
    (y, width): (&mut [f32], usize),
    inner: &mut Vec<f32>,
) {
    let rows = y.len() / width;
    let most = (0..rows).filter_map(&of_row).map(|own| own.pair.rank).max().unwrap_or(0);
    inner.resize(2 * rows * most, 0.0);
    let (y, inner, level) = (Shared(y.as_mut_ptr()), Shared(inner.as_mut_ptr()), Level::best());
    team.each(rows, |row| {
        let Some(Bottleneck { pair, down_bias, up_bias, activation }) = of_row(row) else { return };
        let rank = pair.rank;
        assert!(rank <= most && pair.a.len() == rank * width && pair.b.len() == padded(width) * rank, "it fits");
        // SAFETY: a task for each row, whose places these are.
        let (y, both) = unsafe { (y.part(row * width, width), inner.part(2 * row * most, 2 * most)) };
        let (h, ones) = both.split_at_mut(most);
        let (h, ones) = (&mut h[..rank], &mut ones[..rank]);
        ones.fill(1.0);
        shrink(level, pair, y, h, rank);
        h.iter_mut().zip(down_bias).for_each(|(h, bias)| *h += bias);
        gated_row(activation, h, ones);
        expand_row(level, pair, h, y);
        y.iter_mut().zip(up_bias).for_each(|(y, bias)| *y += bias);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the definition, of two adapters and a row without one; the same bits alone.
    #[test]
    fn rows_are_as_the_definition_says_whatever_is_beside_them() {
        let (width, team) = (48, Team::get());
        let value = |i: usize, step: f32| (i as f32 * step).sin();
        let exact = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
        let adapter = |rank: usize, step: f32| {
            let down: Vec<f32> = (0..rank * width).map(|i| exact(0.3 * value(i, step))).collect();
            let up: Vec<f32> = (0..width * rank).map(|i| exact(0.2 * value(i, 1.7 * step))).collect();
            let biases = [rank, width].map(|len| (0..len).map(|i| value(i, 2.3 * step)).collect::<Vec<f32>>());
            (rank, down, up, biases)
        };
        let adapters = [adapter(3, 0.37), adapter(16, 0.53)];
        let bits = |x: &f32| (x.to_bits() >> 16) as u16;
        let packed = adapters.each_ref().map(|(rank, down, up, _)| {
            let tile = |t: usize| {
                (0..*rank).flat_map(move |k| (t * 16..(t + 1) * 16).map(move |out| bits(&up[out * rank + k])))
            };
            let b: Vec<u16> = (0..width / 16).flat_map(tile).collect();
            (down.iter().map(bits).collect::<Vec<u16>>(), b)
        });
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let own = |i: usize| {
                let ((rank, _, _, [down_bias, up_bias]), (a, b)) = (&adapters[i], &packed[i]);
                let pair = LoraPair { rank: *rank, scale: 1.0, a, b };
                Bottleneck { pair, down_bias, up_bias, activation }
            };
            let which = [Some(0), None, Some(1), Some(0)];
            let start: Vec<f32> = (0..4 * width).map(|i| value(i, 0.11)).collect();
            let mut y = start.clone();
            bottleneck(team, |row| which[row].map(own), (&mut y, width), &mut Vec::new());
            for (row, which) in which.into_iter().enumerate() {
                let (before, after) = (&start[row * width..][..width], &y[row * width..][..width]);
                let Some(i) = which else {
                    assert_eq!(before, after);
                    continue;
                };
                let mut alone = before.to_vec();
                bottleneck(team, |_| Some(own(i)), (&mut alone, width), &mut Vec::new());
                assert_eq!(alone, after);
                let (rank, down, up, [down_bias, up_bias]) = &adapters[i];
                let act = |x: f64| match activation {
                    Activation::Silu => x / (1.0 + (-x).exp()),
                    Activation::GeluTanh => 0.5 * x * (1.0 + (0.797_884_560_8 * (x + 0.044_715 * x.powi(3))).tanh()),
                };
                let dot = |a: &[f32], b: &[f64]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * b).sum::<f64>();
                let x: Vec<f64> = before.iter().map(|x| f64::from(*x)).collect();
                let inner = |k: usize| act(dot(&down[k * width..][..width], &x) + f64::from(down_bias[k]));
                let h: Vec<f64> = (0..*rank).map(inner).collect();
                for (j, got) in after.iter().enumerate() {
                    let want = x[j] + dot(&up[j * rank..][..*rank], &h) + f64::from(up_bias[j]);
                    assert!((f64::from(*got) - want).abs() < 1e-5, "{activation:?} {row} {j}: {got} {want}");
                }
            }
        }
    }
}
