//! What the tests over golden values share: how the files say things.

use std::path::Path;

use serde_json::Value;
use tenora::adapter::peft::{CONFIG_FILE, Package, TENSORS_FILE};
use tenora::request::{GradientCheckpointing, Hyperparameters, LrSchedule, Optimizer};

/// An adapter's folder.
pub fn package(folder: &Path) -> Package {
    let read = |file| std::fs::read(folder.join(file)).expect("the adapter's file");
    Package { config: read(CONFIG_FILE), tensors: read(TENSORS_FILE) }
}

pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

pub fn floats(value: &Value) -> Vec<f64> {
    value.as_array().expect("numbers").iter().map(|x| x.as_f64().expect("a number")).collect()
}

/// The recipe of a golden run: a constant rate, and AdamW's usual numbers where the file says none.
pub fn recipe(recipe: &Value, steps: usize, batch: usize) -> Hyperparameters {
    let number = |key: &str| recipe[key].as_f64();
    Hyperparameters {
        learning_rate: number("lr").expect("lr"),
        epochs: 1,
        max_steps: Some(steps as u32),
        batch_size: batch as u32,
        gradient_accumulation_steps: 1,
        warmup_steps: Some(0),
        schedule: LrSchedule::Constant,
        weight_decay: number("weight_decay").unwrap_or(0.0),
        beta1: recipe["betas"][0].as_f64().unwrap_or(0.9),
        beta2: recipe["betas"][1].as_f64().unwrap_or(0.999),
        epsilon: number("eps").unwrap_or(1e-8),
        max_grad_norm: number("clip_grad_norm").expect("clip_grad_norm"),
        seed: 0,
        sequential: true,
        validation_split: 0.0,
        eval_steps: None,
        max_length: None,
        gradient_checkpointing: GradientCheckpointing::Auto,
        optimizer: Optimizer::AdamW,
    }
}
