//! What AdamW remembers of a piece of a tensor: two running means, in float32 or in eight bits a value.
//!
//! Eight bits are those of bitsandbytes (Dettmers et al. 2022): blocks of 256 values with one float32 scale, their largest magnitude, and
//! codes of a table that has a sign (the gradient's mean) or none (its square's), a decimal exponent and a fraction. A step computes in
//! float32 and rounds what it keeps to the nearest code. One rule is ours: what is not zero is never rounded to zero, in the second
//! moment as in the first, since a mean over a square of zero is a step without bounds.

use std::sync::LazyLock;

use rayon::prelude::*;

use crate::train::optim::AdamWConfig;

/// Values that a task updates at least.
const MIN_VALUES: usize = 1 << 14;

/// Values that share a scale.
const BLOCK: usize = 256;

/// How the moments of a piece are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// In float32.
    Float,
    /// In eight bits a value, and a scale for each [`BLOCK`].
    EightBit,
}

impl Form {
    /// Returns the bytes that both moments of so many values take.
    pub fn bytes(self, len: usize) -> u64 {
        let one = match self {
            Self::Float => len * size_of::<f32>(),
            Self::EightBit => len + len.div_ceil(BLOCK) * size_of::<f32>(),
        };
        2 * one as u64
    }
}

/// The moments of a piece. All bytes zero are moments that are zero.
#[derive(Debug)]
pub enum Moments {
    Float { first: Vec<f32>, second: Vec<f32> },
    EightBit { first: Blocks, second: Blocks },
}

/// Values in blocks: a code each, and a scale for each block.
#[derive(Debug, Default)]
pub struct Blocks {
    codes: Vec<u8>,
    scales: Vec<f32>,
}

impl Blocks {
    /// Returns each block's codes and scale.
    fn blocks_mut(&mut self) -> impl IndexedParallelIterator<Item = (&mut [u8], &mut f32)> {
        self.codes.par_chunks_mut(BLOCK).zip(&mut self.scales)
    }

    fn resize(&mut self, len: usize) {
        self.codes.resize(len, 0);
        self.scales.resize(len.div_ceil(BLOCK), 0.0);
    }
}

/// The constants of one step.
#[derive(Debug, Clone, Copy)]
pub struct Update {
    betas: [f32; 2],
    rests: [f32; 2],
    rate: f32,
    /// Of the second moment's root.
    correction: f32,
    decay: f32,
    epsilon: f32,
}

impl Update {
    /// Returns those of the step of this number, from 1.
    pub fn new(config: &AdamWConfig, learning_rate: f64, step: i32) -> Self {
        let AdamWConfig { beta1, beta2, epsilon, weight_decay, .. } = *config;
        Self {
            betas: [beta1, beta2].map(|beta| beta as f32),
            rests: [beta1, beta2].map(|beta| (1.0 - beta) as f32),
            rate: (learning_rate / (1.0 - beta1.powi(step))) as f32,
            correction: (1.0 / (1.0 - beta2.powi(step)).sqrt()) as f32,
            decay: (1.0 - learning_rate * weight_decay) as f32,
            epsilon: epsilon as f32,
        }
    }

    #[inline]
    fn apply(&self, x: &mut f32, gradient: f32, first: &mut f32, second: &mut f32) {
        let ([beta1, beta2], [rest1, rest2]) = (self.betas, self.rests);
        *first = beta1 * *first + rest1 * gradient;
        *second = beta2 * *second + rest2 * gradient * gradient;
        *x = self.decay * *x - self.rate * (*first / (second.sqrt() * self.correction + self.epsilon));
    }
}

impl Moments {
    /// Returns none, of a form.
    pub fn empty(form: Form) -> Self {
        match form {
            Form::Float => Self::Float { first: Vec::new(), second: Vec::new() },
            Form::EightBit => Self::EightBit { first: Blocks::default(), second: Blocks::default() },
        }
    }

    /// Makes them those of so many values. What comes is zero.
    pub fn resize(&mut self, len: usize) {
        match self {
            Self::Float { first, second } => [first, second].into_iter().for_each(|moment| moment.resize(len, 0.0)),
            Self::EightBit { first, second } => [first, second].into_iter().for_each(|moment| moment.resize(len)),
        }
    }

    /// Returns the bytes that they consist of, in the machine's order, part by part.
    pub fn bytes_mut(&mut self) -> Vec<&mut [u8]> {
        match self {
            Self::Float { first, second } => vec![bytemuck::cast_slice_mut(first), bytemuck::cast_slice_mut(second)],
            Self::EightBit { first, second } => {
                let of_both = [first, second].into_iter();
                of_both.flat_map(|of| [bytemuck::cast_slice_mut(&mut of.scales), of.codes.as_mut_slice()]).collect()
            }
        }
    }

    /// Takes a step: as many values, and a gradient for each.
    pub fn update(&mut self, values: &mut [f32], gradients: &[f32], update: &Update) {
        match self {
            Self::Float { first, second } => {
                let values = values.par_iter_mut().zip(gradients).zip(first.par_iter_mut().zip(second));
                values
                    .with_min_len(MIN_VALUES)
                    .for_each(|((x, gradient), (first, second))| update.apply(x, *gradient, first, second));
            }
            Self::EightBit { first, second } => {
                let values = values.par_chunks_mut(BLOCK).zip(gradients.par_chunks(BLOCK));
                let moments = first.blocks_mut().zip(second.blocks_mut());
                values.zip(moments).with_min_len(MIN_VALUES / BLOCK).for_each(
                    |((values, gradients), ((first, first_scale), (second, second_scale)))| {
                        let (mut means, mut squares) = ([0.0; BLOCK], [0.0; BLOCK]);
                        SIGNED.read(first, *first_scale, &mut means);
                        UNSIGNED.read(second, *second_scale, &mut squares);
                        for (i, (x, gradient)) in values.iter_mut().zip(gradients).enumerate() {
                            update.apply(x, *gradient, &mut means[i], &mut squares[i]);
                        }
                        *first_scale = SIGNED.write(&means, first);
                        *second_scale = UNSIGNED.write(&squares, second);
                    },
                );
            }
        }
    }
}

/// The values of the codes, which rise from one to the next.
#[derive(Debug)]
pub struct Table {
    values: [f32; 256],
    /// The code of zero.
    zero: usize,
}

/// Of what has a sign.
pub static SIGNED: LazyLock<Table> = LazyLock::new(|| Table::new(true));

/// Of what has none.
pub static UNSIGNED: LazyLock<Table> = LazyLock::new(|| Table::new(false));

impl Table {
    /// Makes the table of bitsandbytes: for each of seven decimal exponents the middles of equal parts of 0.1 to 1, twice as many as for
    /// the one before; zero; and one.
    fn new(signed: bool) -> Self {
        let mut values = vec![0.0, 1.0];
        for exponent in 0..7 {
            let parts = 1 << (exponent + usize::from(!signed));
            let border = |i: usize| 0.1 + 0.9 * i as f64 / parts as f64;
            let middles = (0..parts).map(|i| 10_f64.powi(exponent as i32 - 6) * (border(i) + border(i + 1)) / 2.0);
            for middle in middles {
                values.push(middle as f32);
                if signed {
                    values.push(-middle as f32);
                }
            }
        }
        values.sort_by(f32::total_cmp);
        let zero = values.iter().position(|value| *value == 0.0).unwrap_or(0);
        let mut table = Self { values: [0.0; 256], zero };
        table.values.copy_from_slice(&values);
        table
    }

    /// Returns the values of all codes.
    #[cfg(test)]
    pub fn values(&self) -> &[f32; 256] {
        &self.values
    }

    /// Reads a block into as many values; the rest stays as it is.
    fn read(&self, codes: &[u8], scale: f32, values: &mut [f32; BLOCK]) {
        for (value, code) in values.iter_mut().zip(codes) {
            *value = self.values[usize::from(*code)] * scale;
        }
    }

    /// Rounds as many values as there are codes; returns their scale.
    fn write(&self, values: &[f32; BLOCK], codes: &mut [u8]) -> f32 {
        let values = &values[..codes.len()];
        let scale = values.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
        for (code, value) in codes.iter_mut().zip(values) {
            *code = self.nearest(if scale > 0.0 { value / scale } else { 0.0 });
        }
        scale
    }

    /// Returns the code that is nearest, of the two that are not zero where the value is not.
    pub fn nearest(&self, value: f32) -> u8 {
        let above = self.values.partition_point(|code| *code < value).min(255);
        let below = above.saturating_sub(1);
        let code = if value - self.values[below] < self.values[above] - value { below } else { above };
        let code = match code == self.zero {
            true if value > 0.0 => code + 1,
            true if value < 0.0 => code - 1,
            _ => code,
        };
        code as u8
    }
}
