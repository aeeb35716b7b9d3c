//! The rotation's scaling, as transformers computes it from `config.json`.

use super::settings::HfConfig;
use crate::arch::config::ModelConfig;
use crate::arch::rope::{RopeConfig, RopeScaling};
use crate::arch::settings::{self as keys, Settings};
use crate::arch::unsupported;
use crate::error::{Error, Result};

/// Scales the first rotation, the one of blocks without a window.
pub(super) fn scale(config: &mut ModelConfig, from: &HfConfig) -> Result<()> {
    let context = config.context_length;
    let Some(rope) = config.ropes.first_mut() else { return Ok(()) };
    let kind = match from.word("rope.rope_type")? {
        Some(kind) => Some(kind),
        None => from.word("rope.type")?,
    };
    match kind {
        None | Some("default") => Ok(()),
        Some("linear") => {
            rope.scaling = RopeScaling::Linear { factor: required(from, "rope.factor")? };
            Ok(())
        }
        Some("llama3") => llama3(rope, from),
        Some("yarn") => yarn(rope, from, context),
        Some("longrope" | "su") => long_rope(rope, from, context),
        Some(other) => {
            let message = format!("is {other:?}; default, linear, llama3, yarn and longrope are served");
            Err(unsupported("rope_parameters.rope_type", message))
        }
    }
}

fn positive(from: &HfConfig, key: &str) -> Result<Option<f32>> {
    match from.float(key)? {
        Some(number) if number <= 0.0 => Err(unsupported(named(key), format!("is {number}; must be a number over 0"))),
        number => Ok(number.map(|number| number as f32)),
    }
}

fn required(from: &HfConfig, key: &str) -> Result<f32> {
    positive(from, key)?.ok_or_else(|| missing(key))
}

fn named(key: &str) -> String {
    key.replace("rope.", "rope_parameters.")
}

fn missing(key: &str) -> Error {
    unsupported(named(key), "is missing from config.json")
}

/// Tokens that the base was trained on before its context was made longer.
fn original_context(from: &HfConfig) -> Result<Option<usize>> {
    match from.integer(keys::ROPE_ORIGINAL_CONTEXT)? {
        Some(0) => Err(unsupported(from.name(keys::ROPE_ORIGINAL_CONTEXT), "is 0; must be over 0")),
        context => Ok(context),
    }
}

/// Low frequencies by a factor, high ones not, those between by a mean of both.
fn llama3(rope: &mut RopeConfig, from: &HfConfig) -> Result<()> {
    let factor = required(from, "rope.factor")?;
    let (low, high) = (required(from, "rope.low_freq_factor")?, required(from, "rope.high_freq_factor")?);
    if low >= high {
        return Err(unsupported(
            named("rope.low_freq_factor"),
            format!("is {low}; must be below high_freq_factor, {high}"),
        ));
    }
    let context = original_context(from)?.ok_or_else(|| missing(keys::ROPE_ORIGINAL_CONTEXT.hf))? as f32;
    let of = |frequency: f32| {
        let length = 2.0 * std::f32::consts::PI / frequency;
        let smooth = (context / length - low) / (high - low);
        match length {
            long if long > context / low => factor,
            short if short < context / high => 1.0,
            _ => 1.0 / ((1.0 - smooth) / factor + smooth),
        }
    };
    rope.scaling = RopeScaling::Factors(rope.frequencies(1).into_iter().map(of).collect());
    Ok(())
}

fn yarn(rope: &mut RopeConfig, from: &HfConfig, context: usize) -> Result<()> {
    let factor = required(from, "rope.factor")?;
    if from.flag("rope.truncate")? == Some(false) {
        return Err(unsupported(named("rope.truncate"), "is false; only whole borders of the ramp are served"));
    }
    let temperature = |by: f32| if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
    rope.attention_factor = match positive(from, "rope.attention_factor")? {
        Some(given) => given,
        None => match (from.float("rope.mscale")?, from.float("rope.mscale_all_dim")?) {
            (Some(one), Some(all)) if one != 0.0 && all != 0.0 => temperature(one as f32) / temperature(all as f32),
            _ => temperature(1.0),
        },
    };
    rope.scaling = RopeScaling::Yarn {
        factor,
        original_context: original_context(from)?.unwrap_or(context),
        beta_fast: positive(from, keys::YARN_BETA_FAST.hf)?.unwrap_or(32.0),
        beta_slow: positive(from, keys::YARN_BETA_SLOW.hf)?.unwrap_or(1.0),
    };
    Ok(())
}

fn long_rope(rope: &mut RopeConfig, from: &HfConfig, context: usize) -> Result<()> {
    let original_context = original_context(from)?.ok_or_else(|| missing(keys::ROPE_ORIGINAL_CONTEXT.hf))?;
    let factors = |key: &str| {
        let factors = from.floats(key)?.ok_or_else(|| missing(key))?;
        match factors.len() == rope.dims / 2 && factors.iter().all(|factor| *factor > 0.0) {
            true => Ok(factors),
            false => Err(unsupported(named(key), format!("must be {} numbers over 0", rope.dims / 2))),
        }
    };
    let (short, long) = (factors("rope.short_factor")?, factors("rope.long_factor")?);
    let factor = positive(from, "rope.factor")?.unwrap_or(context as f32 / original_context as f32);
    rope.attention_factor = match positive(from, "rope.attention_factor")? {
        Some(given) => given,
        None if factor <= 1.0 => 1.0,
        None => (1.0 + factor.ln() / (original_context as f32).ln()).sqrt(),
    };
    rope.scaling = RopeScaling::LongRope { short, long, original_context };
    Ok(())
}
