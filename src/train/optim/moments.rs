//! What AdamW remembers of some values: the running means of their gradient and of its square, in float32, or in 8 bits as bitsandbytes has
//! them (Dettmers et al. 2022): blocks of 256 values with a scale each, and codes for what is left, signed and unsigned.

use rayon::prelude::*;

use super::AdamWConfig;
use crate::kernels::format::DynamicMap;
use crate::request::Optimizer;

/// Values that share a scale.
const BLOCK: usize = 256;

/// Tensors with fewer values stay in float32.
const FEWEST_IN_8_BITS: usize = 4096;

/// Values that a task updates at least.
const MIN_VALUES: usize = 1 << 14;

/// How the moments of so many values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Float(usize),
    EightBit(usize),
}

impl Form {
    /// The form of `len` values of a tensor of `of` values.
    pub fn new(optimizer: Optimizer, of: usize, len: usize) -> Self {
        match optimizer {
            Optimizer::AdamW8Bit if of >= FEWEST_IN_8_BITS => Self::EightBit(len),
            Optimizer::AdamW | Optimizer::AdamW8Bit => Self::Float(len),
        }
    }

    pub fn bytes(self) -> u64 {
        let bytes = match self {
            Self::Float(len) => 2 * len * size_of::<f32>(),
            Self::EightBit(len) => 2 * (len + len.div_ceil(BLOCK) * size_of::<f32>()),
        };
        bytes as u64
    }
}

/// One step's numbers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Update {
    betas: [f32; 2],
    rests: [f32; 2],
    rate: f32,
    correction: f32,
    decay: f32,
    epsilon: f32,
}

impl Update {
    /// Of the step `step`, counted from 1.
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

    fn apply(&self, x: &mut f32, gradient: f32, first: &mut f32, second: &mut f32) {
        let ([beta1, beta2], [rest1, rest2]) = (self.betas, self.rests);
        *first = beta1 * *first + rest1 * gradient;
        *second = beta2 * *second + rest2 * gradient * gradient;
        *x = self.decay * *x - self.rate * (*first / (second.sqrt() * self.correction + self.epsilon));
    }
}

/// A mean in 8 bits.
#[derive(Debug, Clone, Default)]
pub(super) struct Codes {
    codes: Vec<u8>,
    /// The largest magnitude of each block.
    scales: Vec<f32>,
}

/// The means of the gradient and of its square. Bytes of zeros are moments of zero.
#[derive(Debug, Clone)]
pub(super) enum Moments {
    Float([Vec<f32>; 2]),
    EightBit([Codes; 2]),
}

impl Moments {
    pub fn zeros(form: Form) -> Self {
        let mut moments = match form {
            Form::Float(_) => Self::Float(Default::default()),
            Form::EightBit(_) => Self::EightBit(Default::default()),
        };
        moments.resize(form);
        moments
    }

    /// Makes these of the size of others, whose values they do not have yet.
    pub fn resize(&mut self, form: Form) {
        match (&mut *self, form) {
            (Self::Float(means), Form::Float(len)) => means.iter_mut().for_each(|mean| mean.resize(len, 0.0)),
            (Self::EightBit(means), Form::EightBit(len)) => {
                for Codes { codes, scales } in means {
                    codes.resize(len, 0);
                    scales.resize(len.div_ceil(BLOCK), 0.0);
                }
            }
            _ => *self = Self::zeros(form),
        }
    }

    /// All of it, in a fixed order.
    pub fn parts(&mut self) -> [&mut [u8]; 4] {
        match self {
            Self::Float([first, second]) => {
                [bytemuck::cast_slice_mut(first), bytemuck::cast_slice_mut(second), &mut [], &mut []]
            }
            Self::EightBit([first, second]) => [
                &mut first.codes,
                bytemuck::cast_slice_mut(&mut first.scales),
                &mut second.codes,
                bytemuck::cast_slice_mut(&mut second.scales),
            ],
        }
    }

    pub fn bytes(&self) -> u64 {
        let bytes = match self {
            Self::Float(means) => means.iter().map(|mean| mean.capacity() * size_of::<f32>()).sum::<usize>(),
            Self::EightBit(means) => {
                means.iter().map(|mean| mean.codes.capacity() + mean.scales.capacity() * size_of::<f32>()).sum()
            }
        };
        bytes as u64
    }

    /// Takes the gradients of values into the moments, and moves the values by them.
    pub fn update(&mut self, values: &mut [f32], gradient: &[f32], update: &Update) {
        match self {
            Self::Float([first, second]) => {
                let values = values.par_iter_mut().zip(gradient).zip(first.par_iter_mut().zip(second));
                values
                    .with_min_len(MIN_VALUES)
                    .for_each(|((x, gradient), (first, second))| update.apply(x, *gradient, first, second));
            }
            Self::EightBit([first, second]) => {
                let values = values.par_chunks_mut(BLOCK).zip(gradient.par_chunks(BLOCK));
                let blocks = values.zip(first.blocks().zip(second.blocks())).with_min_len(MIN_VALUES / BLOCK);
                blocks.for_each(|((values, gradient), (mut first, mut second))| {
                    let (mut means, mut squares) = (first.values(&SIGNED), second.values(&UNSIGNED));
                    let moments = means.iter_mut().zip(&mut squares);
                    for ((x, gradient), (mean, square)) in values.iter_mut().zip(gradient).zip(moments) {
                        update.apply(x, *gradient, mean, square);
                    }
                    first.set(&SIGNED, &means);
                    second.set(&UNSIGNED, &squares);
                });
            }
        }
    }
}

static SIGNED: DynamicMap = DynamicMap::SIGNED;
static UNSIGNED: DynamicMap = DynamicMap::UNSIGNED;

/// A block's codes and its scale.
struct Block<'m> {
    codes: &'m mut [u8],
    scale: &'m mut f32,
}

impl Codes {
    fn blocks(&mut self) -> impl IndexedParallelIterator<Item = Block<'_>> {
        self.codes.par_chunks_mut(BLOCK).zip(&mut self.scales).map(|(codes, scale)| Block { codes, scale })
    }
}

impl Block<'_> {
    /// Its values; what lies behind its end is zero.
    fn values(&self, map: &DynamicMap) -> [f32; BLOCK] {
        let mut values = [0.0; BLOCK];
        values.iter_mut().zip(&*self.codes).for_each(|(value, code)| *value = map.value(*code) * *self.scale);
        values
    }

    fn set(&mut self, map: &DynamicMap, values: &[f32; BLOCK]) {
        let values = &values[..self.codes.len()];
        *self.scale = values.iter().fold(0.0, |largest, x| x.abs().max(largest));
        let inverse = if *self.scale > 0.0 { 1.0 / *self.scale } else { 0.0 };
        for (code, x) in self.codes.iter_mut().zip(values) {
            *code = map.nearest(x * inverse);
            // A mean keeps its sign: what it moves must not turn round.
            if map.value(*code).is_sign_negative() != x.is_sign_negative() {
                *code = if *x > 0.0 { code.saturating_add(1) } else { code.saturating_sub(1) };
            }
        }
    }
}
