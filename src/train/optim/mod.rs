//! AdamW with decoupled weight decay (Loshchilov & Hutter 2019) over an adapter's tensors, and the gradient's global norm. What it
//! remembers is cut into pieces ([`moments`]), which lie in memory or in a file ([`state`]); neither changes a bit of what it does.

mod moments;
mod state;

use std::fs::File;

use crate::error::Result;
use crate::request::{Hyperparameters, Optimizer};
use crate::train::optim::moments::Update;
use crate::train::optim::state::{Layout, State};

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
    /// How it remembers both means.
    pub optimizer: Optimizer,
}

impl From<&Hyperparameters> for AdamWConfig {
    fn from(recipe: &Hyperparameters) -> Self {
        let Hyperparameters { beta1, beta2, epsilon, weight_decay, optimizer, .. } = *recipe;
        Self { beta1, beta2, epsilon, weight_decay, optimizer }
    }
}

/// The optimizer's state, in the order of the tensors.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    state: State,
    steps: i32,
}

/// The bytes of an optimizer's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateBytes {
    /// All of it.
    pub all: u64,
    /// What is in memory at once where it lies in a file.
    pub paged: u64,
}

/// Returns the bytes that the state for tensors of these lengths takes.
pub fn state_bytes(optimizer: Optimizer, lengths: impl IntoIterator<Item = usize>) -> StateBytes {
    let layout = Layout::new(optimizer, lengths);
    StateBytes { all: layout.bytes(), paged: layout.largest_piece() }
}

impl AdamW {
    /// Returns an optimizer of tensors of these lengths, with its moments at zero: in a file where there is one, which holds nothing but zeros
    /// and is as long as the state, else in memory.
    pub fn new(config: AdamWConfig, lengths: impl IntoIterator<Item = usize>, file: Option<File>) -> Self {
        Self { config, state: State::new(Layout::new(config.optimizer, lengths), file), steps: 0 }
    }

    /// Returns the bytes of its state that are in memory.
    pub fn bytes(&self) -> u64 {
        self.state.memory_bytes()
    }

    /// Updates the tensors, each with its gradient. Calls `between` between two pieces.
    ///
    /// # Errors
    /// Those of the file that the state is in. The tensors are then of no use.
    pub fn step<'t>(
        &mut self,
        tensors: impl Iterator<Item = (&'t mut [f32], &'t [f32])>,
        learning_rate: f64,
        between: &dyn Fn(),
    ) -> Result<()> {
        self.steps += 1;
        let update = Update::new(&self.config, learning_rate, self.steps);
        let pieces = tensors.flat_map(|(tensor, gradient)| state::pieces_of(tensor, gradient));
        self.state.for_each(pieces, |moments, (values, gradients)| {
            moments.update(values, gradients, &update);
            between();
        })
    }
}

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
mod tests;
