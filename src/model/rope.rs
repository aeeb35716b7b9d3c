//! The angles by which queries and keys turn.

use crate::arch::config::RopeConfig;

/// Cosines and sines of every position's angles, as Hugging Face computes them in float32.
#[derive(Debug)]
pub(super) struct RopeTable {
    pub(super) half: usize,
    /// `[context, half]` each.
    pub(super) cos: Vec<f32>,
    pub(super) sin: Vec<f32>,
}

impl RopeTable {
    pub fn new(config: &RopeConfig, context: usize) -> Self {
        let half = config.dims / 2;
        let frequency = |i: usize| 1.0 / config.base.powf(2.0 * i as f32 / config.dims as f32);
        let frequencies: Vec<f32> = (0..half).map(frequency).collect();
        let angles = (0..context).flat_map(|position| frequencies.iter().map(move |f| position as f32 * f));
        let (cos, sin) = angles.map(|angle| (angle.cos(), angle.sin())).unzip();
        Self { half, cos, sin }
    }

    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}
