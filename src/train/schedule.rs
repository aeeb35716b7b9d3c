//! The learning rate of each step, what it sees, and how many steps there are.

use std::f64::consts::PI;

use crate::data::Batches;
use crate::request::{Hyperparameters, LrSchedule};

/// Share of all steps that warm up where the recipe does not say.
const WARMUP_SHARE: f64 = 0.05;

/// The steps of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Updates in all.
    pub total_steps: u32,
    /// Updates in which the learning rate rises from zero.
    pub warmup_steps: u32,
    /// Records of a full step: batch size times accumulation. The last step of an epoch takes what is left.
    pub batch: usize,
    /// Steps of one pass over all records.
    pub steps_per_epoch: u32,
    /// Steps from one evaluation to the next, at least 1; one more follows the last step.
    pub eval_every: u32,
    peak: f64,
    decay: LrSchedule,
}

impl Schedule {
    /// Plans the training on `records` records: `epochs` passes over all of them, unless `max_steps` says how many steps there are.
    pub fn new(recipe: &Hyperparameters, records: usize) -> Self {
        let batch = u64::from(recipe.batch_size.max(1)) * u64::from(recipe.gradient_accumulation_steps.max(1));
        let batch = usize::try_from(batch).unwrap_or(usize::MAX);
        let per_epoch = records.max(1).div_ceil(batch) as u64;
        let total = recipe.max_steps.map_or(u64::from(recipe.epochs).saturating_mul(per_epoch), u64::from);
        let total_steps = u32::try_from(total).unwrap_or(u32::MAX);
        let steps_per_epoch = u32::try_from(per_epoch).unwrap_or(u32::MAX);
        let warmup_steps = recipe.warmup_steps.unwrap_or((f64::from(total_steps) * WARMUP_SHARE) as u32);
        let eval_every = recipe.eval_steps.unwrap_or(steps_per_epoch).max(1);
        let (peak, decay) = (recipe.learning_rate, recipe.schedule);
        Self { total_steps, warmup_steps, batch, steps_per_epoch, eval_every, peak, decay }
    }

    /// Which of so many records each step sees.
    pub fn batches(&self, recipe: &Hyperparameters, records: usize) -> Batches {
        Batches::new(records, self.batch, (!recipe.sequential).then_some(recipe.seed))
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
    fn epochs_are_passes() {
        let plan = |epochs, batch_size, gradient_accumulation_steps, records| {
            let recipe =
                Hyperparameters { epochs, batch_size, gradient_accumulation_steps, max_steps: None, ..recipe() };
            let schedule = Schedule::new(&recipe, records);
            (schedule.steps_per_epoch, schedule.total_steps)
        };
        assert_eq!(plan(3, 2, 2, 7), (2, 6));
        assert_eq!(plan(3, 2, 2, 8), (2, 6));
        assert_eq!(plan(10, 1, 8, 5), (1, 10), "a batch ends with the epoch");
        assert_eq!(plan(10, 4, 8, 5), (1, 10));
        assert_eq!(plan(u32::MAX, 1, 1, 5), (5, u32::MAX));
        let recipe = Hyperparameters { max_steps: Some(3), batch_size: 4, ..recipe() };
        assert_eq!(Schedule::new(&recipe, 5).total_steps, 3);
    }
}
