//! AdamW with decoupled weight decay (Loshchilov & Hutter 2019) over an adapter's tensors, and the gradient's global norm.

use rayon::prelude::*;

use crate::request::Hyperparameters;

/// The constants of AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// The decay of the gradients' mean.
    pub beta1: f64,
    /// The decay of the squared gradients' mean.
    pub beta2: f64,
    /// The term against division by zero.
    pub epsilon: f64,
    /// The decoupled decay of the weights.
    pub weight_decay: f64,
}

impl From<&Hyperparameters> for AdamWConfig {
    fn from(recipe: &Hyperparameters) -> Self {
        let Hyperparameters { beta1, beta2, epsilon, weight_decay, .. } = *recipe;
        Self { beta1, beta2, epsilon, weight_decay }
    }
}

/// What AdamW remembers of one tensor, in its order.
#[derive(Debug, Clone)]
struct Moments {
    /// Running mean of the gradient.
    first: Vec<f32>,
    /// Running mean of its square.
    second: Vec<f32>,
}

/// The optimizer's state, in the order of the tensors.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    moments: Vec<Moments>,
    steps: i32,
}

impl AdamW {
    /// Returns an optimizer of tensors of these lengths, with its moments at zero.
    pub fn new(config: AdamWConfig, lengths: impl IntoIterator<Item = usize>) -> Self {
        let zeros = |len| Moments { first: vec![0.0; len], second: vec![0.0; len] };
        Self { config, moments: lengths.into_iter().map(zeros).collect(), steps: 0 }
    }

    /// Returns the bytes that the state of so many values takes.
    pub fn bytes_of(values: usize) -> u64 {
        (2 * values * size_of::<f32>()) as u64
    }

    /// Returns the bytes of its state.
    pub fn bytes(&self) -> u64 {
        Self::bytes_of(self.moments.iter().map(|moments| moments.first.len()).sum())
    }

    /// Updates the tensors, each with its gradient. Calls `between` between two tensors.
    pub fn step<'t>(
        &mut self,
        tensors: impl Iterator<Item = (&'t mut [f32], &'t [f32])>,
        learning_rate: f64,
        between: &dyn Fn(),
    ) {
        let AdamWConfig { beta1, beta2, epsilon, weight_decay } = self.config;
        self.steps += 1;
        let rate = (learning_rate / (1.0 - beta1.powi(self.steps))) as f32;
        let correction = (1.0 / (1.0 - beta2.powi(self.steps)).sqrt()) as f32;
        let decay = (1.0 - learning_rate * weight_decay) as f32;
        let [beta1, beta2, rest1, rest2] = [beta1, beta2, 1.0 - beta1, 1.0 - beta2].map(|x| x as f32);
        let epsilon = epsilon as f32;
        for ((tensor, gradient), Moments { first, second }) in tensors.zip(&mut self.moments) {
            let values = tensor.par_iter_mut().zip(gradient).zip(first.par_iter_mut().zip(second));
            values.with_min_len(MIN_VALUES).for_each(|((x, gradient), (first, second))| {
                *first = beta1 * *first + rest1 * gradient;
                *second = beta2 * *second + rest2 * gradient * gradient;
                *x = decay * *x - rate * (*first / (second.sqrt() * correction + epsilon));
            });
            between();
        }
    }
}

/// Values that a task updates at least.
const MIN_VALUES: usize = 1 << 14;

/// The norm of all gradients as one vector.
pub fn global_norm<'t>(gradients: impl Iterator<Item = &'t [f32]>) -> f64 {
    gradients.flatten().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt()
}

/// Scales the gradients so that their global norm, which is `norm`, is at most `max_norm`; 0 is off.
pub fn clip<'t>(gradients: impl Iterator<Item = &'t mut [f32]>, norm: f64, max_norm: f64) {
    // The small number is torch's.
    let scale = max_norm / (norm + 1e-6);
    if max_norm > 0.0 && scale < 1.0 {
        gradients.flatten().for_each(|x| *x *= scale as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One tensor and its gradient.
    fn one<'t>(tensor: &'t mut [f32], gradient: &'t [f32]) -> std::iter::Once<(&'t mut [f32], &'t [f32])> {
        std::iter::once((tensor, gradient))
    }

    /// The update written out in float64, as torch documents it.
    fn by_hand(config: AdamWConfig, learning_rate: f64, start: f64, gradients: &[f64]) -> f64 {
        let (mut p, mut m, mut v) = (start, 0.0, 0.0);
        for (i, g) in gradients.iter().enumerate() {
            let t = i as i32 + 1;
            p *= 1.0 - learning_rate * config.weight_decay;
            m = config.beta1 * m + (1.0 - config.beta1) * g;
            v = config.beta2 * v + (1.0 - config.beta2) * g * g;
            let (m_hat, v_hat) = (m / (1.0 - config.beta1.powi(t)), v / (1.0 - config.beta2.powi(t)));
            p -= learning_rate * m_hat / (v_hat.sqrt() + config.epsilon);
        }
        p
    }

    #[test]
    fn steps_agree_with_the_formula() {
        let config = AdamWConfig { beta1: 0.9, beta2: 0.99, epsilon: 1e-3, weight_decay: 0.1 };
        let (mut values, mut optimizer) = ([1.0, -2.0], AdamW::new(config, [2]));
        for gradient in [[0.5, -0.1], [0.25, 0.3], [-1.0, 0.0]] {
            optimizer.step(one(&mut values, &gradient), 0.05, &|| {});
        }
        let expected = [by_hand(config, 0.05, 1.0, &[0.5, 0.25, -1.0]), by_hand(config, 0.05, -2.0, &[-0.1, 0.3, 0.0])];
        for (value, expected) in values.iter().zip(expected) {
            assert!((f64::from(*value) - expected).abs() < 1e-6, "{value} {expected}");
        }
        assert_eq!(optimizer.steps, 3);
    }

    #[test]
    fn the_first_step_moves_by_the_learning_rate() {
        let config = AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 0.0, weight_decay: 0.0 };
        let mut moved = [0.0, 0.0];
        AdamW::new(config, [2]).step(one(&mut moved, &[3.0, -7.0]), 0.01, &|| {});
        assert!((moved[0] + 0.01).abs() < 1e-7 && (moved[1] - 0.01).abs() < 1e-7, "{moved:?}");
    }

    #[test]
    fn clipping_scales_only_what_is_too_long() {
        let mut gradients = [vec![3.0], vec![0.0, 4.0]];
        let norm = |gradients: &[Vec<f32>]| global_norm(gradients.iter().map(Vec::as_slice));
        let before = norm(&gradients);
        assert!((before - 5.0).abs() < 1e-9);
        let mut clipped = |max_norm| {
            clip(gradients.iter_mut().map(Vec::as_mut_slice), before, max_norm);
            norm(&gradients)
        };
        assert_eq!([clipped(10.0), clipped(0.0)], [before, before]);
        assert!((clipped(1.0) - 1.0).abs() < 1e-5);
    }
}
