//! The rotation of queries and keys (RoPE, Su et al. 2021), and the ways in which it is stretched to longer contexts.

use crate::arch::decoder::FactorKind;
use crate::arch::settings::{self as keys, Settings};
use crate::arch::unsupported;
use crate::error::Result;

/// A rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// The base of the frequencies.
    pub base: f32,
    /// Values of a head that turn, the first ones.
    pub dims: usize,
    /// What becomes of the frequencies.
    pub scaling: RopeScaling,
    /// What cosines and sines are multiplied with.
    pub attention_factor: f32,
}

/// How frequencies are made lower, so that longer contexts turn no further than what the base was trained on.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All by one factor (Chen et al. 2023).
    Linear {
        /// What they are divided by.
        factor: f32,
    },
    /// The low ones by a factor, the high ones not, with a ramp between (YaRN; Peng et al. 2023).
    Yarn {
        /// What the low ones are divided by.
        factor: f32,
        /// Tokens that the base was trained on before.
        original_context: usize,
        /// Turns within that context above which a frequency stays.
        beta_fast: f32,
        /// Turns within that context below which a frequency is divided.
        beta_slow: f32,
    },
    /// Each by a factor of its own, `[dims / 2]`: Llama 3's rule as its files have it.
    Factors(Vec<f32>),
    /// Each by a factor of its own, `[dims / 2]`, others for contexts beyond the original one (LongRoPE; Ding et al. 2024).
    LongRope {
        /// Up to the original context.
        short: Vec<f32>,
        /// Beyond it.
        long: Vec<f32>,
        /// Tokens.
        original_context: usize,
    },
}

impl RopeScaling {
    /// Returns how many factors of frequencies there are.
    pub fn factors(&self) -> usize {
        match self {
            Self::Factors(factors) => factors.len(),
            Self::LongRope { short, long, .. } => short.len() + long.len(),
            Self::None | Self::Linear { .. } | Self::Yarn { .. } => 0,
        }
    }

    /// Returns the factors of frequencies, by what they are for.
    pub fn named_factors(&self) -> Vec<(FactorKind, &[f32])> {
        match self {
            Self::Factors(all) => vec![(FactorKind::All, all)],
            Self::LongRope { short, long, .. } => vec![(FactorKind::Short, short), (FactorKind::Long, long)],
            Self::None | Self::Linear { .. } | Self::Yarn { .. } => Vec::new(),
        }
    }

    /// Returns up to which context, in tokens, the first of two sets of frequencies is for; `None` where there is one.
    pub fn short_context(&self) -> Option<usize> {
        match self {
            Self::LongRope { original_context, .. } => Some(*original_context),
            _ => None,
        }
    }
}

/// YaRN's turns where the settings say none.
const BETAS: (f32, f32) = (32.0, 1.0);

impl RopeConfig {
    /// Reads what all architectures say alike.
    ///
    /// # Errors
    /// UNSUPPORTED_BASE where a setting is no sane number, or the scaling is not known.
    pub fn read(settings: &dyn Settings, head_dim: usize) -> Result<Self> {
        let mut rope = Self {
            base: settings.positive(keys::ROPE_BASE)?.unwrap_or(10_000.0),
            dims: settings.integer(keys::ROPE_DIMS)?.unwrap_or(head_dim),
            scaling: RopeScaling::None,
            attention_factor: settings.positive(keys::ROPE_ATTENTION_FACTOR)?.unwrap_or(1.0),
        };
        // A file with factors for each frequency need not name the kind; where it does, the factors say the rest.
        match settings.text(keys::ROPE_SCALING)?.as_deref() {
            None | Some("none" | "longrope") => {}
            Some("linear") => rope.scaling = RopeScaling::Linear { factor: settings.required(keys::ROPE_FACTOR)? },
            Some("yarn") => rope.read_yarn(settings)?,
            Some(kind) => {
                let message = format!("is {kind:?}; none, linear, yarn and longrope are served");
                return Err(unsupported(settings.name(keys::ROPE_SCALING), message));
            }
        }
        Ok(rope)
    }

    fn read_yarn(&mut self, settings: &dyn Settings) -> Result<()> {
        let factor = settings.required(keys::ROPE_FACTOR)?;
        let original_context = match settings.integer(keys::ROPE_ORIGINAL_CONTEXT)? {
            Some(context) => context,
            None => settings.count(keys::CONTEXT_LENGTH)?,
        };
        let beta_fast = settings.positive(keys::YARN_BETA_FAST)?.unwrap_or(BETAS.0);
        let beta_slow = settings.positive(keys::YARN_BETA_SLOW)?.unwrap_or(BETAS.1);
        // YaRN's temperature, as a factor of cosines and sines; some bases take it out again in all of their dimensions.
        let temperature = |by: f32| if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
        let all_dims = settings.number(keys::YARN_LOG_MULTIPLIER)?.filter(|by| *by != 0.0).map_or(1.0, temperature);
        self.attention_factor *= temperature(1.0) / all_dims;
        self.scaling = RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow };
        Ok(())
    }

    pub(super) fn check(&self, settings: &dyn Settings, head_dim: usize) -> Result<()> {
        if self.dims == 0 || !self.dims.is_multiple_of(2) || self.dims > head_dim {
            let message =
                format!("is {}; an even number of up to {head_dim}, the values of a head, must turn", self.dims);
            return Err(unsupported(settings.name(keys::ROPE_DIMS), message));
        }
        if matches!(self.scaling, RopeScaling::Yarn { original_context: 0, .. }) {
            return Err(unsupported(settings.name(keys::ROPE_ORIGINAL_CONTEXT), "is 0; must be over 0"));
        }
        Ok(())
    }

    /// Returns the frequencies by which positions are multiplied, `[dims / 2]`, for contexts of up to `context` tokens.
    pub fn frequencies(&self, context: usize) -> Vec<f32> {
        let plain = |i: usize| 1.0 / self.base.powf(2.0 * i as f32 / self.dims as f32);
        let all = 0..self.dims / 2;
        match &self.scaling {
            RopeScaling::None => all.map(plain).collect(),
            RopeScaling::Linear { factor } => all.map(|i| plain(i) / factor).collect(),
            RopeScaling::Factors(factors) => divided(all.map(plain), factors),
            RopeScaling::LongRope { short, long, original_context } => {
                divided(all.map(plain), if context > *original_context { long } else { short })
            }
            RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow } => {
                let [low, high] = self.ramp(*original_context as f32, *beta_fast, *beta_slow);
                let of = |i: usize| {
                    let kept = 1.0 - ((i as f32 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                    plain(i) / factor * (1.0 - kept) + plain(i) * kept
                };
                all.map(of).collect()
            }
        }
    }

    /// The frequencies between which YaRN's ramp lies, by their numbers.
    fn ramp(&self, context: f32, beta_fast: f32, beta_slow: f32) -> [f32; 2] {
        let number = |turns: f32| {
            let dims = self.dims as f32;
            dims * (context / (turns * 2.0 * std::f32::consts::PI)).ln() / (2.0 * self.base.ln())
        };
        [number(beta_fast).floor().max(0.0), number(beta_slow).ceil().min(self.dims as f32 - 1.0)]
    }
}

fn divided(frequencies: impl Iterator<Item = f32>, factors: &[f32]) -> Vec<f32> {
    frequencies.zip(factors).map(|(frequency, factor)| frequency / factor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> RopeConfig {
        RopeConfig { base: 10_000.0, dims: 64, scaling, attention_factor: 1.0 }
    }

    #[test]
    fn scaling_keeps_the_high_frequencies_where_it_should() {
        let plain = rope(RopeScaling::None).frequencies(100);
        assert_eq!((plain.len(), plain[0]), (32, 1.0));
        let linear = rope(RopeScaling::Linear { factor: 4.0 }).frequencies(100);
        assert!(plain.iter().zip(&linear).all(|(plain, linear)| *linear == plain / 4.0));
        let yarn = RopeScaling::Yarn { factor: 8.0, original_context: 2048, beta_fast: 32.0, beta_slow: 1.0 };
        let yarn = rope(yarn).frequencies(100);
        assert_eq!((yarn[0], yarn[31]), (plain[0], plain[31] / 8.0));
        assert!(yarn.iter().zip(&plain).all(|(yarn, plain)| (plain / 8.0..=*plain).contains(yarn)));
    }

    #[test]
    fn long_factors_are_for_contexts_beyond_the_original_one() {
        let long = RopeScaling::LongRope { short: vec![1.0; 32], long: vec![2.0; 32], original_context: 100 };
        let long = rope(long);
        assert_eq!((long.frequencies(100)[0], long.frequencies(101)[0]), (1.0, 0.5));
    }
}
