//! The memory of a training, known before its first step: what it will hold at the most, which of its passes compute layers again in
//! place of keeping them, and whether the optimizer's state lies in a file, so that it stays within the limit `max_training_bytes`.

use std::collections::BTreeSet;

use crate::adapter::Adapter;
use crate::data::Examples;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::traced::{Dropout, ForwardOptions, PassSize};
use crate::request::{self, GradientCheckpointing, Hyperparameters, MemoryPlan, TrainingMemory};
use crate::train::objective::{Objective, objective};
use crate::train::optim::{StateBytes, state_bytes};
use crate::train::passes::{pass_size, passes, products};
use crate::train::schedule::Schedule;

/// Copies of an adapter that a run has: as it begins, as it is, and as it last gave a loss that was a number.
const COPIES: u64 = 3;

/// Plans a run over examples that are trained on and examples that are held out.
///
/// # Errors
/// EXHAUSTED where it does not fit `max_bytes` in any way that the recipe allows.
pub fn plan(
    model: &Model,
    start: &Adapter,
    (train, validation): (&Examples, &Examples),
    of: request::Objective,
    recipe: &Hyperparameters,
    max_bytes: u64,
) -> Result<MemoryPlan> {
    let StateBytes { all, paged } = state_bytes(recipe.optimizer, start.tensors().map(<[f32]>::len));
    let run = Run::new(&*objective(of, train)?, &*objective(of, validation)?, recipe, start.virtual_count());
    let setting = recipe.gradient_checkpointing;
    // A file takes time at each step, and so comes last.
    let in_memory = plan_passes(model, start, &run, setting, without_passes(start.parameters(), all), max_bytes);
    if in_memory.fits || paged >= all {
        return in_memory.plan_or_refuse(setting, max_bytes);
    }
    let in_file = plan_passes(model, start, &run, setting, without_passes(start.parameters(), paged), max_bytes);
    let plan = in_file.plan_or_refuse(setting, max_bytes)?;
    Ok(MemoryPlan { paged_optimizer: all, ..plan })
}

/// What a run's passes add to what it holds anyway.
struct PlannedPasses {
    memory: TrainingMemory,
    gradient_checkpointing: bool,
    /// Tokens of the largest pass.
    tokens: usize,
    fits: bool,
}

impl PlannedPasses {
    fn plan_or_refuse(self, setting: GradientCheckpointing, max_bytes: u64) -> Result<MemoryPlan> {
        let Self { memory, gradient_checkpointing, tokens, fits } = self;
        if !fits {
            return Err(too_large(memory, tokens, setting, max_bytes));
        }
        Ok(MemoryPlan { memory, gradient_checkpointing, paged_optimizer: 0 })
    }
}

fn plan_passes(
    model: &Model,
    start: &Adapter,
    run: &Run,
    setting: GradientCheckpointing,
    mut memory: TrainingMemory,
    max_bytes: u64,
) -> PlannedPasses {
    let room = max_bytes.saturating_sub(memory.total());
    let (adapter, products) = (Some(start), products(start));
    let options = ForwardOptions { adapter, products, dropout: dropout(start), ..ForwardOptions::default() };
    let mut gradient_checkpointing = false;
    let mut tokens = 0;
    for size in &run.scored {
        memory.activations = memory.activations.max(model.score_bytes(*size, options));
    }
    for size in &run.trained {
        let recompute_layers = recompute_layers(model, *size, options, setting, room);
        let bytes = model.trace_bytes(*size, ForwardOptions { recompute_layers, ..options });
        gradient_checkpointing |= recompute_layers.is_some();
        if bytes > memory.activations {
            (memory.activations, tokens) = (bytes, size.tokens);
        }
    }
    // Also where nothing is left for passes that take nothing.
    let fits = memory.total() <= max_bytes;
    PlannedPasses { memory, gradient_checkpointing, tokens, fits }
}

/// Fails where an adapter of so many values cannot be trained within `max_bytes`, whatever it is trained on.
///
/// # Errors
/// EXHAUSTED.
pub fn check_adapter(parameters: usize, max_bytes: u64) -> Result<()> {
    // The optimizer's state may lie in a file.
    let memory = without_passes(parameters, 0);
    if memory.total() <= max_bytes {
        return Ok(());
    }
    Err(too_large(memory, 0, GradientCheckpointing::Auto, max_bytes))
}

/// Returns what there is of so many values that are trained, with so many bytes of the optimizer's, whatever the passes are.
pub(super) fn without_passes(parameters: usize, optimizer: u64) -> TrainingMemory {
    let values = (parameters * size_of::<f32>()) as u64;
    TrainingMemory { adapter: COPIES * values, gradients: values, optimizer, activations: 0 }
}

/// The layers of which a pass keeps one input and computes the rest again, by the recipe's setting: of the ways that it leaves open the first
/// that fits `room` bytes, else the last.
pub(super) fn recompute_layers(
    model: &Model,
    size: PassSize,
    options: ForwardOptions<'_>,
    setting: GradientCheckpointing,
    room: u64,
) -> Option<usize> {
    // Parts of so many layers, one fewer, and so on: the least that is enough, so that what is held is least (Chen et al. 2016, whose parts are equal).
    let layers = model.config().layers.len();
    let fewest = (1..=layers).find(|most| most * (most + 1) / 2 >= layers);
    let ways: &[Option<usize>] = match setting {
        GradientCheckpointing::Auto => &[None, Some(1), fewest],
        GradientCheckpointing::On => &[fewest],
        GradientCheckpointing::Off => &[None],
    };
    let bytes = |recompute_layers| model.trace_bytes(size, ForwardOptions { recompute_layers, ..options });
    let (last, others) = ways.split_last()?;
    others.iter().copied().find(|way| bytes(*way) <= room).unwrap_or(*last)
}

/// Some dropout where the adapter has any; how much and of what does not matter here.
fn dropout(adapter: &Adapter) -> Option<Dropout> {
    let rate = adapter.spec.dropout();
    (rate > 0.0).then_some(Dropout { rate, seed: 0, step: 0 })
}

/// The sizes of a run's passes, each once.
struct Run {
    trained: BTreeSet<PassSize>,
    /// Forward alone.
    scored: BTreeSet<PassSize>,
}

impl Run {
    fn new(train: &dyn Objective, validation: &dyn Objective, recipe: &Hyperparameters, virtual_tokens: usize) -> Self {
        let schedule = Schedule::new(recipe, train.count());
        let mut batches = schedule.batches(recipe, train.count());
        let most = recipe.batch_size as usize;
        let sizes = |objective: &dyn Objective, examples: &[usize]| -> Vec<PassSize> {
            passes(objective, examples, most)
                .into_iter()
                .map(|pass| pass_size(objective, pass, virtual_tokens))
                .collect()
        };
        let steps = 0..u64::from(schedule.total_steps);
        let trained = steps.flat_map(|step| sizes(train, &batches.of_step(step))).collect();
        let all: Vec<usize> = (0..validation.count()).collect();
        let mut scored: BTreeSet<PassSize> = sizes(validation, &all).into_iter().collect();
        if train.needs_reference() {
            scored.extend(sizes(train, &batches.seen_in(schedule.total_steps.into())));
        }
        Self { trained, scored }
    }
}

/// `tokens`: of the largest pass; 0 where no pass is known yet.
fn too_large(memory: TrainingMemory, tokens: usize, setting: GradientCheckpointing, max_bytes: u64) -> Error {
    let TrainingMemory { adapter, gradients, optimizer, activations } = memory;
    let (of_passes, advice) = match (tokens, setting) {
        (0, _) => (String::new(), "lower the rank of the adapter, or train fewer layers"),
        (_, GradientCheckpointing::Off) => (
            format!(", {activations} of activations in a pass of {tokens} tokens"),
            "leave gradient_checkpointing to AUTO, or lower max_length, batch_size or the rank of the adapter",
        ),
        _ => (
            format!(", {activations} of activations in a pass of {tokens} tokens"),
            "lower max_length, batch_size or the rank of the adapter",
        ),
    };
    let message = format!(
        "the training would take {} bytes of memory: {adapter} of the adapter, {gradients} of its gradients, {optimizer} of the \
         optimizer{of_passes}; the server allows {max_bytes}: {advice}",
        memory.total()
    );
    Error::Exhausted { limit: "max_training_bytes", message, retry_after: None }
}
