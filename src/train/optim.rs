//! AdamW with decoupled weight decay (Loshchilov & Hutter 2019) over the `Var`s of an adapter, and the gradient's global norm.

use candle_core::{DType, Tensor, Var};

use crate::error::Result;
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

/// What AdamW remembers of one variable.
#[derive(Debug, Clone)]
struct Moments {
    /// Running mean of the gradient, in the variable's shape.
    first: Tensor,
    /// Running mean of its square.
    second: Tensor,
}

/// The optimizer: its variables, and its state beside them in the same order.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    vars: Vec<Var>,
    moments: Vec<Moments>,
    steps: i32,
}

impl AdamW {
    /// Returns an optimizer of these variables, with its moments at zero.
    pub fn new(config: AdamWConfig, vars: Vec<Var>) -> Result<Self> {
        let zeros = |var: &Var| -> Result<Moments> {
            Ok(Moments { first: var.as_tensor().zeros_like()?, second: var.as_tensor().zeros_like()? })
        };
        let moments = vars.iter().map(zeros).collect::<Result<_>>()?;
        Ok(Self { config, vars, moments, steps: 0 })
    }

    /// One update by the gradients, which stand in the order of the variables. Calls `between` between two variables.
    pub fn step(&mut self, gradients: &[Tensor], learning_rate: f64, between: &dyn Fn()) -> Result<()> {
        let AdamWConfig { beta1, beta2, epsilon, weight_decay } = self.config;
        self.steps += 1;
        let correction1 = 1.0 - beta1.powi(self.steps);
        let correction2 = (1.0 - beta2.powi(self.steps)).sqrt();
        for ((var, moments), gradient) in self.vars.iter().zip(&mut self.moments).zip(gradients) {
            moments.first = ((&moments.first * beta1)? + (gradient * (1.0 - beta1))?)?;
            moments.second = ((&moments.second * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
            let denominator = ((moments.second.sqrt()? / correction2)? + epsilon)?;
            let update = (&moments.first / denominator)?;
            let decayed = (var.as_detached_tensor() * (1.0 - learning_rate * weight_decay))?;
            var.set(&(decayed - (update * (learning_rate / correction1))?)?)?;
            between();
        }
        Ok(())
    }
}

/// The norm of all gradients as one vector.
pub fn global_norm(gradients: &[Tensor]) -> Result<f64> {
    let mut sum = 0.0;
    for gradient in gradients {
        sum += gradient.sqr()?.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?;
    }
    Ok(sum.sqrt())
}

/// Scales the gradients so that their global norm, which is `norm`, is at most `max_norm`; 0 is off.
pub fn clip(gradients: &mut [Tensor], norm: f64, max_norm: f64) -> Result<()> {
    // The small number is torch's.
    let scale = max_norm / (norm + 1e-6);
    if max_norm > 0.0 && scale < 1.0 {
        for gradient in gradients {
            *gradient = (&*gradient * scale)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
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
        let var = Var::from_tensor(&tensor(&[1.0, -2.0])).unwrap();
        let mut optimizer = AdamW::new(config, vec![var.clone()]).unwrap();
        for (a, b) in [(0.5, -0.1), (0.25, 0.3), (-1.0, 0.0)] {
            optimizer.step(&[tensor(&[a, b])], 0.05, &|| {}).unwrap();
        }
        let values = var.to_vec1::<f32>().unwrap();
        let expected = [by_hand(config, 0.05, 1.0, &[0.5, 0.25, -1.0]), by_hand(config, 0.05, -2.0, &[-0.1, 0.3, 0.0])];
        for (value, expected) in values.iter().zip(expected) {
            assert!((f64::from(*value) - expected).abs() < 1e-6, "{value} {expected}");
        }
        assert_eq!(optimizer.steps, 3);
    }

    #[test]
    fn the_first_step_moves_by_the_learning_rate() {
        let config = AdamWConfig { beta1: 0.9, beta2: 0.999, epsilon: 0.0, weight_decay: 0.0 };
        let var = Var::from_tensor(&tensor(&[0.0, 0.0])).unwrap();
        AdamW::new(config, vec![var.clone()]).unwrap().step(&[tensor(&[3.0, -7.0])], 0.01, &|| {}).unwrap();
        let moved = var.to_vec1::<f32>().unwrap();
        assert!((moved[0] + 0.01).abs() < 1e-7 && (moved[1] - 0.01).abs() < 1e-7, "{moved:?}");
    }

    #[test]
    fn clipping_scales_only_what_is_too_long() {
        let mut gradients = [tensor(&[3.0]), tensor(&[0.0, 4.0])];
        let norm = global_norm(&gradients).unwrap();
        assert!((norm - 5.0).abs() < 1e-9);
        clip(&mut gradients, norm, 10.0).unwrap();
        clip(&mut gradients, norm, 0.0).unwrap();
        assert!((global_norm(&gradients).unwrap() - 5.0).abs() < 1e-9);
        clip(&mut gradients, norm, 1.0).unwrap();
        assert!((global_norm(&gradients).unwrap() - 1.0).abs() < 1e-5);
    }
}
