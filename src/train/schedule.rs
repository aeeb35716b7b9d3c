//! The learning rate of each step, and how many steps there are.

use std::f64::consts::PI;

use crate::request::{Hyperparameters, LrSchedule};

/// Share of all steps that warm up where the recipe does not say.
const WARMUP_SHARE: f64 = 0.05;

/// The steps of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    pub total_steps: u32,
    pub warmup_steps: u32,
    /// Records of all steps; the last step takes what is left.
    pub positions: u64,
    /// Records a step: batch size times accumulation.
    pub batch: u64,
    peak: f64,
    decay: LrSchedule,
}

impl Schedule {
    /// For training on `records` records. Every one is seen `epochs` times, unless `max_steps` says how many batches there are.
    pub fn new(recipe: &Hyperparameters, records: usize) -> Self {
        let batch = u64::from(recipe.batch_size.max(1)) * u64::from(recipe.gradient_accumulation_steps.max(1));
        let positions = match recipe.max_steps {
            Some(steps) => u64::from(steps) * batch,
            None => u64::from(recipe.epochs) * records as u64,
        };
        let total_steps = u32::try_from(positions.div_ceil(batch)).unwrap_or(u32::MAX);
        let warmup_steps = recipe.warmup_steps.unwrap_or((f64::from(total_steps) * WARMUP_SHARE) as u32);
        Self { total_steps, warmup_steps, positions, batch, peak: recipe.learning_rate, decay: recipe.schedule }
    }

    /// The learning rate of the step `step`, counted from 0: a line from 0 over the warm-up, then the decay, which would reach 0
    /// one step after the last.
    pub fn learning_rate(&self, step: u32) -> f64 {
        if step < self.warmup_steps {
            return self.peak * f64::from(step) / f64::from(self.warmup_steps);
        }
        let left = f64::from(self.total_steps.saturating_sub(self.warmup_steps).max(1));
        let progress = (f64::from(step - self.warmup_steps) / left).min(1.0);
        self.peak
            * match self.decay {
                LrSchedule::Constant => 1.0,
                LrSchedule::Linear => 1.0 - progress,
                LrSchedule::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::tests::recipe;

    fn rates(decay: LrSchedule, warmup_steps: Option<u32>, steps: u32) -> Vec<f64> {
        let recipe =
            Hyperparameters { schedule: decay, warmup_steps, max_steps: Some(steps), learning_rate: 1.0, ..recipe() };
        let schedule = Schedule::new(&recipe, 10);
        (0..schedule.total_steps).map(|step| (schedule.learning_rate(step) * 1e4).round() / 1e4).collect()
    }

    #[test]
    fn rates_follow_transformers() {
        assert_eq!(rates(LrSchedule::Constant, Some(0), 3), [1.0, 1.0, 1.0]);
        assert_eq!(rates(LrSchedule::Constant, Some(2), 4), [0.0, 0.5, 1.0, 1.0]);
        assert_eq!(rates(LrSchedule::Linear, Some(2), 6), [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]);
        assert_eq!(rates(LrSchedule::Cosine, Some(0), 4), [1.0, 0.8536, 0.5, 0.1464]);
        assert_eq!(rates(LrSchedule::Cosine, None, 40)[..3], [0.0, 0.5, 1.0]);
        assert_eq!(rates(LrSchedule::Linear, None, 2), [1.0, 0.5]);
    }

    #[test]
    fn epochs_see_every_record() {
        let recipe =
            Hyperparameters { epochs: 3, batch_size: 2, gradient_accumulation_steps: 2, max_steps: None, ..recipe() };
        let schedule = Schedule::new(&recipe, 7);
        assert_eq!((schedule.positions, schedule.total_steps, schedule.batch), (21, 6, 4));
    }
}
