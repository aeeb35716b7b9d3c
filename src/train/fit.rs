//! The loop that trains: batch, loss, backward, step, evaluate, event. A synchronous function of its inputs alone; nothing here
//! knows of jobs, stores or text, and the same inputs give the same adapter to the bit.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio_util::sync::{CancellationToken, DropGuard};

use crate::adapter::Adapter;
use crate::data::{Batches, Examples};
use crate::device::{Arbiter, TrainPermit};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::traced::{Dropout, ForwardOptions, TokenScores, Workspace};
use crate::request::{self, Hyperparameters, JobEvent, MemoryPlan, TrainingMemory, metric};
use crate::train::objective::{LossSum, Measures, Objective, objective, wanted};
use crate::train::optim::{AdamW, clip, global_norm};
use crate::train::passes::{pass_size, passes, products};
use crate::train::plan::recompute_layers;
use crate::train::schedule::Schedule;

/// What a run is a function of.
#[derive(Debug, Clone, Copy)]
pub struct FitInputs<'a> {
    /// The frozen base.
    pub model: &'a Arc<Model>,
    /// The adapter's values before the first step; its spec holds the dropout. One that is a part of the base ([`Adapter::is_of_base`]) is taken
    /// out of it for as long as the run goes on.
    pub start: &'a Adapter,
    /// What preferences are measured against: `None` is the base.
    pub reference: Option<&'a Adapter>,
    /// Not empty.
    pub train: &'a Examples,
    /// Of the same kind; may be empty.
    pub validation: &'a Examples,
    /// What is minimised.
    pub objective: request::Objective,
    /// The hyperparameters.
    pub recipe: &'a Hyperparameters,
    /// What it may hold, as [`plan`](crate::train::plan::plan) has found for these examples.
    pub plan: MemoryPlan,
    /// As long as the plan's `paged_optimizer`, and nothing but zeros; unused where that is 0.
    pub optimizer_file: Option<&'a File>,
    /// Whom it asks for compute.
    pub arbiter: &'a Arc<Arbiter>,
    /// By which it is told to end.
    pub control: &'a CancelToken,
}

/// What the outside sees and does while a run goes on.
#[derive(Debug, Default)]
pub struct CancelToken {
    stop: CancellationToken,
    saved: AtomicBool,
    tokens: AtomicU64,
}

impl CancelToken {
    /// Ends the run before its next pass with [`Error::Cancelled`].
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Ends the run in the same way when what this gives is dropped.
    pub fn stop_on_drop(&self) -> DropGuard {
        self.stop.clone().drop_guard()
    }

    /// Waits until the run is to end.
    pub async fn stopped(&self) {
        self.stop.cancelled().await;
    }

    /// Notes that what the run has made is on disk.
    pub fn saved(&self) {
        self.saved.store(true, Ordering::Relaxed);
    }

    /// Returns whether what the run has made is on disk.
    pub fn is_saved(&self) -> bool {
        self.saved.load(Ordering::Relaxed)
    }

    /// Waits for so long, or until the run is told to stop.
    pub async fn pause(&self, pause: Duration) {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = self.stop.cancelled() => {}
        }
    }

    /// Returns how many ids have been trained on since it was asked last, each time that they were.
    pub fn take_tokens(&self) -> u64 {
        self.tokens.swap(0, Ordering::Relaxed)
    }

    /// Fails once the run has been told to stop.
    pub fn check(&self) -> Result<()> {
        if self.stop.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }
}

/// A finished run.
#[derive(Debug, Clone, PartialEq)]
pub struct FitOutcome {
    /// The trained adapter, on the base as it is.
    pub adapter: Adapter,
    /// `train_loss` of the last step, `eval_loss` of the last evaluation, and so on.
    pub metrics: BTreeMap<String, f64>,
    /// Why the result must not serve, where the training has gone wrong.
    pub diverged: Option<String>,
}

/// The reason of a run that has gone wrong.
pub const DIVERGED: &str = "TRAINING_DIVERGED";

/// How far above the first step's loss the last ones may be. Nats a token (SFT) or a pair (DPO). Where the mean over the last tenth of the
/// steps is farther above, the first step's records are scored once more: only if theirs has risen that far too has the run diverged, and
/// not merely come to harder records. A run of fewer than ten steps has no last tenth, and its first records are always scored again.
pub const DIVERGED_ABOVE: f64 = 1.0;

/// Part of the steps that are the last ones.
const LAST_PART: usize = 10;

/// Trains an adapter. `observe` is told what happens, while no compute is held.
///
/// # Errors
///
/// CANCELLED once `control` says so. A run that diverges ends early and gives what it has, with the reason: where a loss is not a number,
/// the weights that gave the last one that was. Only where there are none it is an error ([`DIVERGED`]).
pub fn fit(inputs: FitInputs<'_>, observe: &mut dyn FnMut(JobEvent)) -> Result<FitOutcome> {
    let mut run = Run::new(inputs)?;
    let diverged = match run.take_all_steps(observe) {
        Ok(()) => None,
        Err(Error::Precondition { reason: DIVERGED, message, .. }) => Some(message),
        Err(error) => return Err(error),
    };
    observe(JobEvent::MemoryPeak(run.memory()));
    let adapter = match run.without() {
        Some(start) => run.adapter.without(start),
        None => run.adapter,
    };
    match diverged {
        Some(why) if !adapter.is_finite() => Err(diverged_because(format!("{why}; its weights are not numbers"))),
        diverged => Ok(FitOutcome { adapter, metrics: run.metrics, diverged }),
    }
}

/// A run under way.
struct Run<'a> {
    inputs: FitInputs<'a>,
    schedule: Schedule,
    batches: Batches,
    train: Box<dyn Objective + 'a>,
    validation: Box<dyn Objective + 'a>,
    workspace: Workspace,
    adapter: Adapter,
    /// Of the mean loss over a step, in the adapter's shape.
    gradients: Adapter,
    optimizer: AdamW,
    /// Passes taken: the counter of the dropout masks.
    passes: u64,
    started: Instant,
    metrics: BTreeMap<String, f64>,
    /// The first step's records, and their loss before it.
    first: Option<(Vec<usize>, f64)>,
    /// Of each step.
    losses: Vec<f64>,
    /// The weights that gave the last of them.
    sound: Option<Adapter>,
}

/// Loss and what goes with it, summed over pieces.
#[derive(Debug, Default)]
struct Sums {
    loss: f64,
    weight: f64,
    measures: Measures,
}

/// The names that the metrics of versions had before they had TRL's; clients read them.
const OLD_NAMES: [(&str, &str); 2] = [(metric::MARGINS, "margin"), (metric::ACCURACIES, "accuracy")];

impl Sums {
    fn add(&mut self, part: &LossSum) {
        self.loss += part.loss;
        self.measures.merge(&part.measures);
    }

    fn loss(&self) -> f64 {
        self.loss / self.weight
    }

    /// Keeps the means as `train_...` or `eval_...`.
    fn record(&self, prefix: &str, metrics: &mut BTreeMap<String, f64>) {
        metrics.insert(format!("{prefix}_loss"), self.loss());
        for (name, mean) in self.measures.means() {
            if let Some((_, old)) = OLD_NAMES.iter().find(|(new, _)| *new == name) {
                metrics.insert(format!("{prefix}_{old}"), mean);
            }
            metrics.insert(format!("{prefix}_{name}"), mean);
        }
    }
}

impl<'a> Run<'a> {
    fn new(inputs: FitInputs<'a>) -> Result<Self> {
        let recipe = inputs.recipe;
        let schedule = Schedule::new(recipe, inputs.train.len());
        let file = match (inputs.plan.paged_optimizer, inputs.optimizer_file) {
            (0, _) => None,
            (_, Some(file)) => Some(file.try_clone().map_err(Error::internal)?),
            (_, None) => {
                return Err(Error::internal("the plan has the optimizer's state in a file, and there is none"));
            }
        };
        Ok(Self {
            inputs,
            schedule,
            batches: schedule.batches(recipe, inputs.train.len()),
            train: objective(inputs.objective, inputs.train)?,
            validation: objective(inputs.objective, inputs.validation)?,
            optimizer: AdamW::new(recipe.into(), inputs.start.tensors().map(<[f32]>::len), file),
            workspace: Workspace::with_room(inputs.plan.memory.activations),
            adapter: inputs.start.clone(),
            gradients: inputs.start.zeros_like(),
            passes: 0,
            started: Instant::now(),
            metrics: BTreeMap::new(),
            first: None,
            losses: Vec::new(),
            sound: None,
        })
    }

    /// What it has held at the most.
    fn memory(&self) -> TrainingMemory {
        let values = (self.adapter.parameters() * size_of::<f32>()) as u64;
        // Its beginning, itself, and what gave the last loss.
        let copies = if self.losses.is_empty() { 2 } else { 3 };
        TrainingMemory {
            adapter: copies * values,
            gradients: values,
            optimizer: self.optimizer.bytes(),
            activations: self.workspace.peak_bytes(),
        }
    }

    /// What is taken out of the base.
    fn without(&self) -> Option<&'a Adapter> {
        Some(self.inputs.start).filter(|start| start.is_of_base())
    }

    /// The compute for one pass.
    fn permit(&self) -> TrainPermit {
        self.inputs.arbiter.train()
    }

    fn take_all_steps(&mut self, observe: &mut dyn FnMut(JobEvent)) -> Result<()> {
        if self.train.needs_reference() {
            // Few steps may see few of the records.
            let seen = self.batches.seen_in(self.schedule.total_steps.into());
            let pairs = seen.len() + self.validation.count();
            observe(JobEvent::Message(format!("computing the reference's log-probabilities of {pairs} pairs")));
            self.score_reference(&seen)?;
            self.started = Instant::now();
        }
        for step in 1..=self.schedule.total_steps {
            observe(self.step(step)?);
            if self.evaluates_after(step) {
                observe(self.evaluate(step)?);
            }
        }
        self.compare_with_the_start()
    }

    fn score_reference(&mut self, train: &[usize]) -> Result<()> {
        let most = self.inputs.recipe.batch_size as usize;
        let validation: Vec<usize> = (0..self.validation.count()).collect();
        for (objective, examples) in [(&mut self.train, train), (&mut self.validation, validation.as_slice())] {
            for piece in passes(&**objective, examples, most) {
                self.inputs.control.check()?;
                let permit = self.inputs.arbiter.train();
                let options = ForwardOptions {
                    adapter: self.inputs.reference,
                    permit: Some(&permit),
                    products: products(self.inputs.start),
                    ..ForwardOptions::default()
                };
                let scores = score_examples(self.inputs.model, &**objective, piece, options, &self.workspace)?;
                objective.take_reference(piece, &scores);
            }
        }
        Ok(())
    }

    /// Goes back to the weights that gave the last loss that was a number, if any has.
    fn restore_sound_weights(&mut self) {
        if let Some(sound) = self.sound.take() {
            self.adapter = sound;
        }
    }

    /// Fails where the training has made the loss of its first records far worse.
    fn compare_with_the_start(&mut self) -> Result<()> {
        let (Some((batch, before)), steps) = (self.first.clone(), self.losses.len()) else { return Ok(()) };
        let last = &self.losses[steps - steps / LAST_PART..];
        let mean = last.iter().sum::<f64>() / last.len().max(1) as f64;
        let sound = |loss: f64| loss <= before + DIVERGED_ABOVE;
        if !last.is_empty() && sound(mean) && self.losses.last().copied().is_some_and(sound) {
            return Ok(());
        }
        // Not to be stopped: all steps have been taken.
        let after = self.score(&*self.train, &batch, || Ok(()))?.loss();
        if sound(after) {
            return Ok(());
        }
        if !after.is_finite() {
            self.restore_sound_weights();
        }
        let message = format!(
            "the first step's records had a loss of {before:.3} before the training and have {after:.3} after it; lower the learning rate"
        );
        Err(diverged_because(message))
    }

    fn step(&mut self, step: u32) -> Result<JobEvent> {
        let began = Instant::now();
        let batch = self.batches.of_step(u64::from(step - 1));
        let sums = self.compute_gradients(&batch)?;
        let (loss, grad_norm) = (sums.loss(), global_norm(self.gradients.tensors()));
        if !loss.is_finite() {
            self.restore_sound_weights();
        }
        if !loss.is_finite() || !grad_norm.is_finite() {
            let message =
                format!("step {step} gave loss {loss} and gradient norm {grad_norm}; lower the learning rate");
            return Err(diverged_because(message));
        }
        self.first.get_or_insert_with(|| (batch.clone(), loss));
        self.losses.push(loss);
        self.keep_sound_weights();
        let learning_rate = self.schedule.learning_rate(step - 1);
        clip(self.gradients.tensors_mut(), grad_norm, self.inputs.recipe.max_grad_norm);
        let permit = self.permit();
        let tensors = self.adapter.tensors_mut().zip(self.gradients.tensors());
        self.optimizer.step(tensors, learning_rate, &|| permit.yield_to_serving())?;
        drop(permit);

        let tokens: usize = batch.iter().map(|example| self.train.tokens(*example)).sum();
        self.inputs.control.tokens.fetch_add(tokens as u64, Ordering::Relaxed);
        sums.record("train", &mut self.metrics);
        let total_steps = self.schedule.total_steps;
        Ok(JobEvent::Step {
            step,
            total_steps,
            loss,
            learning_rate,
            grad_norm,
            tokens_per_second: tokens as f64 / began.elapsed().as_secs_f64().max(1e-9),
            eta_seconds: self.started.elapsed().as_secs_f64() / f64::from(step) * f64::from(total_steps - step),
            metrics: sums.measures.means(),
        })
    }

    /// Keeps the weights as they are now.
    fn keep_sound_weights(&mut self) {
        match &mut self.sound {
            Some(sound) => {
                sound.tensors_mut().zip(self.adapter.tensors()).for_each(|(to, from)| to.copy_from_slice(from))
            }
            None => self.sound = Some(self.adapter.clone()),
        }
    }

    /// Computes the gradient of the mean loss over the whole batch.
    fn compute_gradients(&mut self, batch: &[usize]) -> Result<Sums> {
        let weight = batch.iter().map(|example| self.train.weight(*example)).sum();
        let mut sums = Sums { weight, ..Sums::default() };
        self.gradients.tensors_mut().for_each(|gradient| gradient.fill(0.0));
        for piece in passes(&*self.train, batch, self.inputs.recipe.batch_size as usize) {
            self.inputs.control.check()?;
            let permit = self.permit();
            self.backward(piece, &permit, &mut sums)?;
        }
        Ok(sums)
    }

    /// One pass: adds to the sums and to the gradient. Its activations end here.
    fn backward(&mut self, piece: &[usize], permit: &TrainPermit, sums: &mut Sums) -> Result<()> {
        let rate = self.inputs.start.spec.dropout();
        let dropout = Dropout { rate, seed: self.inputs.recipe.seed, step: self.passes };
        self.passes += 1;
        let options = ForwardOptions {
            adapter: Some(&self.adapter),
            without: self.without(),
            dropout: (rate > 0.0).then_some(dropout),
            permit: Some(permit),
            products: products(self.inputs.start),
            ..ForwardOptions::default()
        };
        let (model, room) = (self.inputs.model, self.inputs.plan.memory.activations);
        let setting = self.inputs.recipe.gradient_checkpointing;
        let recompute_layers = recompute_layers(
            model,
            pass_size(&*self.train, piece, self.adapter.virtual_count()),
            options,
            setting,
            room,
        );
        let options = ForwardOptions { recompute_layers, ..options };
        let sequences = self.train.sequences(piece);
        let ids: Vec<&[u32]> = sequences.iter().map(|conversation| conversation.ids.as_slice()).collect();
        let trace = model.trace(&ids, &wanted(&sequences), options, &self.workspace)?;
        let mut part = self.train.loss(piece, trace.scores())?;
        sums.add(&part);
        part.derivatives.iter_mut().for_each(|slope| *slope = (f64::from(*slope) / sums.weight) as f32);
        trace.backward(&part.derivatives, &mut self.gradients)
    }

    fn evaluates_after(&self, step: u32) -> bool {
        let every = self.schedule.eval_every;
        self.validation.count() > 0 && (step.is_multiple_of(every) || step == self.schedule.total_steps)
    }

    fn evaluate(&mut self, step: u32) -> Result<JobEvent> {
        let all: Vec<usize> = (0..self.validation.count()).collect();
        let sums = match self.score(&*self.validation, &all, || self.inputs.control.check()) {
            // Once all steps have been taken nothing may lose them, and what is still to be measured keeps no server from ending.
            Err(Error::Cancelled) if step == self.schedule.total_steps => {
                return Ok(JobEvent::Message("the evaluation after the last step was stopped and is left out".into()));
            }
            sums => sums?,
        };
        let loss = sums.loss();
        if !loss.is_finite() {
            self.restore_sound_weights();
            let message = format!("the validation after step {step} gave loss {loss}; lower the learning rate");
            return Err(diverged_because(message));
        }
        sums.record("eval", &mut self.metrics);
        Ok(JobEvent::Evaluated { step, loss, metrics: sums.measures.means() })
    }

    /// The loss of examples as the adapter is now; `go_on` is asked before each pass.
    fn score(&self, objective: &dyn Objective, examples: &[usize], go_on: impl Fn() -> Result<()>) -> Result<Sums> {
        let weight = examples.iter().map(|example| objective.weight(*example)).sum();
        let mut sums = Sums { weight, ..Sums::default() };
        for piece in passes(objective, examples, self.inputs.recipe.batch_size as usize) {
            go_on()?;
            let permit = self.permit();
            let options = ForwardOptions {
                adapter: Some(&self.adapter),
                without: self.without(),
                permit: Some(&permit),
                products: products(self.inputs.start),
                ..ForwardOptions::default()
            };
            let scores = score_examples(self.inputs.model, objective, piece, options, &self.workspace)?;
            sums.add(&objective.loss(piece, &scores)?);
        }
        Ok(sums)
    }
}

/// Scores the tokens in the loss of some examples.
fn score_examples(
    model: &Model,
    objective: &dyn Objective,
    examples: &[usize],
    options: ForwardOptions<'_>,
    workspace: &Workspace,
) -> Result<TokenScores> {
    let sequences = objective.sequences(examples);
    let ids: Vec<&[u32]> = sequences.iter().map(|conversation| conversation.ids.as_slice()).collect();
    model.score_tokens(&ids, &wanted(&sequences), options, workspace)
}

fn diverged_because(message: String) -> Error {
    Error::precondition(DIVERGED, "the training run", message)
}
