//! What the tests of this module share.

mod fitting;
mod jobs;

use crate::request::{GradientCheckpointing, Hyperparameters, LoraSpec, LrSchedule, Optimizer};

/// A plain recipe: sequential, no warm-up, constant rate.
pub fn recipe() -> Hyperparameters {
    Hyperparameters {
        learning_rate: 1e-2,
        epochs: 1,
        max_steps: None,
        batch_size: 4,
        gradient_accumulation_steps: 1,
        warmup_steps: Some(0),
        schedule: LrSchedule::Constant,
        weight_decay: 0.0,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        max_grad_norm: 1.0,
        seed: 7,
        sequential: true,
        validation_split: 0.0,
        eval_steps: None,
        max_length: None,
        gradient_checkpointing: GradientCheckpointing::Auto,
        optimizer: Optimizer::AdamW,
    }
}

fn lora() -> LoraSpec {
    LoraSpec { rank: 4, alpha: 8.0, ..LoraSpec::default() }
}
