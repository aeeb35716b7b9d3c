//! The loop that trains: batch, loss, backward, step, evaluate, event. A synchronous function of its inputs alone; nothing here
//! knows of jobs, stores or text, and the same inputs give the same adapter to the bit.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use candle_core::{Tensor, Var};

use crate::adapter::Lora;
use crate::data::{Batches, Examples};
use crate::device::{Arbiter, TrainPermit};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::traced::{Dropout, Pass, TracedLora};
use crate::request::{self, Hyperparameters, JobEvent};
use crate::train::objective::{Dpo, DpoLoss, Objective, PreferenceSum, Sft};
use crate::train::optim::{AdamW, clip, global_norm};
use crate::train::schedule::Schedule;

/// Most ids of one forward and backward pass, unless one example alone has more: bounds the memory of the activations. The loss is
/// a sum over examples, so that cutting a batch into such pieces changes nothing but the rounding.
const PIECE_TOKENS: usize = 512;

/// What a run is a function of.
#[derive(Debug, Clone, Copy)]
pub struct FitInputs<'a> {
    pub model: &'a Arc<Model>,
    /// The adapter's values before the first step; its spec holds the dropout.
    pub start: &'a Lora,
    /// What preferences are measured against: `None` is the base.
    pub reference: Option<&'a Lora>,
    /// Not empty.
    pub train: &'a Examples,
    /// Of the same kind; may be empty.
    pub validation: &'a Examples,
    pub objective: request::Objective,
    pub recipe: &'a Hyperparameters,
    pub arbiter: &'a Arc<Arbiter>,
    pub control: &'a Control,
}

/// What the outside sees and does while a run goes on.
#[derive(Debug, Default)]
pub struct Control {
    stop: AtomicBool,
    tokens: AtomicU64,
}

impl Control {
    /// Ends the run before its next pass with [`Error::Cancelled`].
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Ids trained on so far, each time that they were.
    pub fn tokens(&self) -> u64 {
        self.tokens.load(Ordering::Relaxed)
    }

    /// Fails once the run has been told to stop.
    pub fn check(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }
}

/// Tells the work to stop when it is dropped.
#[derive(Debug)]
pub struct StopOnDrop(pub Arc<Control>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// A finished run.
#[derive(Debug, Clone, PartialEq)]
pub struct FitOutcome {
    pub lora: Lora,
    /// `train_loss` of the last step, `eval_loss` of the last evaluation, and so on.
    pub metrics: BTreeMap<String, f64>,
}

/// Trains an adapter. `observe` is told what happens, while no compute is held; an error of its own ends the run.
pub fn fit(inputs: FitInputs<'_>, observe: &mut dyn FnMut(JobEvent) -> Result<()>) -> Result<FitOutcome> {
    let mut run = Run::new(inputs)?;
    if run.train.needs_reference() {
        let pairs = run.train.count() + run.validation.count();
        observe(JobEvent::Message(format!("computing the reference's log-probabilities of {pairs} pairs")))?;
        run.score_reference()?;
        run.started = Instant::now();
    }
    for step in 1..=run.schedule.total_steps {
        observe(run.step(step)?)?;
        if run.evaluates_after(step) {
            observe(run.evaluate(step)?)?;
        }
    }
    Ok(FitOutcome { lora: run.lora.to_lora()?, metrics: run.metrics })
}

/// A run under way.
struct Run<'a> {
    inputs: FitInputs<'a>,
    schedule: Schedule,
    batches: Batches,
    train: Box<dyn Objective + 'a>,
    validation: Box<dyn Objective + 'a>,
    lora: TracedLora,
    vars: Vec<Var>,
    optimizer: AdamW,
    /// Passes taken: the counter of the dropout masks.
    passes: u64,
    started: Instant,
    metrics: BTreeMap<String, f64>,
}

/// Loss and what goes with it, summed over pieces.
#[derive(Debug, Default)]
struct Sums {
    loss: f64,
    weight: f64,
    examples: usize,
    preference: Option<PreferenceSum>,
}

impl Sums {
    fn add(&mut self, loss: f32, examples: usize, preference: Option<PreferenceSum>) {
        self.loss += f64::from(loss);
        self.examples += examples;
        if let Some(preference) = preference {
            *self.preference.get_or_insert_default() += preference;
        }
    }

    fn loss(&self) -> f64 {
        self.loss / self.weight
    }

    fn margin(&self) -> Option<f64> {
        self.preference.map(|sums| sums.margin / self.examples as f64)
    }

    fn accuracy(&self) -> Option<f64> {
        self.preference.map(|sums| sums.correct / self.examples as f64)
    }

    fn record(&self, prefix: &str, metrics: &mut BTreeMap<String, f64>) {
        let values = [("loss", Some(self.loss())), ("margin", self.margin()), ("accuracy", self.accuracy())];
        metrics.extend(values.into_iter().filter_map(|(name, value)| Some((format!("{prefix}_{name}"), value?))));
    }
}

impl<'a> Run<'a> {
    fn new(inputs: FitInputs<'a>) -> Result<Self> {
        let recipe = inputs.recipe;
        let lora = TracedLora::trainable(inputs.start)?;
        let vars: Vec<Var> = lora.vars().iter().map(|(_, _, var)| var.clone()).collect();
        let schedule = Schedule::new(recipe, inputs.train.len());
        let seed = (!recipe.sequential).then_some(recipe.seed);
        Ok(Self {
            inputs,
            schedule,
            batches: Batches::new(inputs.train.len(), schedule.batch, seed),
            train: objective(inputs.objective, inputs.train)?,
            validation: objective(inputs.objective, inputs.validation)?,
            optimizer: AdamW::new(recipe.into(), vars.clone())?,
            lora,
            vars,
            passes: 0,
            started: Instant::now(),
            metrics: BTreeMap::new(),
        })
    }

    /// The compute for one pass.
    fn permit(&self) -> TrainPermit {
        self.inputs.arbiter.train()
    }

    fn score_reference(&mut self) -> Result<()> {
        let lora = self.inputs.reference.map(TracedLora::frozen).transpose()?;
        let lora = lora.as_ref();
        let most = self.inputs.recipe.batch_size as usize;
        for objective in [&mut self.train, &mut self.validation] {
            let all: Vec<usize> = (0..objective.count()).collect();
            for piece in pieces(&**objective, &all, most) {
                self.inputs.control.check()?;
                let permit = self.inputs.arbiter.train();
                let pass = Pass { lora, permit: Some(&permit), ..Pass::default() };
                objective.score_reference(self.inputs.model, piece, pass)?;
            }
        }
        Ok(())
    }

    fn step(&mut self, step: u32) -> Result<JobEvent> {
        let began = Instant::now();
        let batch = self.batches.of_step(u64::from(step - 1));
        let (sums, mut gradients) = self.gradients(&batch)?;
        let (loss, grad_norm) = (sums.loss(), global_norm(&gradients)?);
        if !loss.is_finite() || !grad_norm.is_finite() {
            let message =
                format!("step {step} gave loss {loss} and gradient norm {grad_norm}; lower the learning rate");
            return Err(diverged(message));
        }
        let learning_rate = self.schedule.learning_rate(step - 1);
        clip(&mut gradients, grad_norm, self.inputs.recipe.max_grad_norm)?;
        let permit = self.permit();
        self.optimizer.step(&gradients, learning_rate, &|| permit.give_way())?;
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
            margin: sums.margin(),
            accuracy: sums.accuracy(),
        })
    }

    /// The gradient of the mean loss over the whole batch, in the order of the variables.
    fn gradients(&mut self, batch: &[usize]) -> Result<(Sums, Vec<Tensor>)> {
        let weight = batch.iter().map(|example| self.train.weight(*example)).sum();
        let mut sums = Sums { weight, ..Sums::default() };
        let mut gradients: Vec<Tensor> = Vec::new();
        for piece in pieces(&*self.train, batch, self.inputs.recipe.batch_size as usize) {
            self.inputs.control.check()?;
            let permit = self.permit();
            let part = self.backward(piece, &permit, &mut sums)?;
            gradients = if gradients.is_empty() {
                part
            } else {
                gradients.iter().zip(&part).map(|(sum, g)| sum + g).collect::<candle_core::Result<_>>()?
            };
        }
        Ok((sums, gradients))
    }

    /// One pass: adds to the sums and gives this piece's share of the gradient. Its activations end here.
    fn backward(&mut self, piece: &[usize], permit: &TrainPermit, sums: &mut Sums) -> Result<Vec<Tensor>> {
        let rate = self.inputs.start.spec.dropout;
        let dropout = Dropout { rate, seed: self.inputs.recipe.seed, step: self.passes };
        self.passes += 1;
        let pass = Pass { lora: Some(&self.lora), dropout: (rate > 0.0).then_some(dropout), permit: Some(permit) };
        let part = self.train.loss(self.inputs.model, piece, pass)?;
        sums.add(part.loss.to_scalar::<f32>()?, piece.len(), part.preference);
        let gradients = (part.loss / sums.weight)?.backward()?;
        let of_var = |var: &Var| gradients.get(var).map(Tensor::detach);
        let all: Option<Vec<Tensor>> = self.vars.iter().map(of_var).collect();
        all.ok_or_else(|| Error::internal("a tensor of the adapter got no gradient"))
    }

    fn evaluates_after(&self, step: u32) -> bool {
        let every = self.inputs.recipe.eval_steps.unwrap_or(self.schedule.steps_per_epoch).max(1);
        self.validation.count() > 0 && (step.is_multiple_of(every) || step == self.schedule.total_steps)
    }

    fn evaluate(&mut self, step: u32) -> Result<JobEvent> {
        // A frozen copy: no graph is built, so no activation is kept.
        let lora = TracedLora::frozen(&self.lora.to_lora()?)?;
        let all: Vec<usize> = (0..self.validation.count()).collect();
        let weight = all.iter().map(|example| self.validation.weight(*example)).sum();
        let mut sums = Sums { weight, ..Sums::default() };
        for piece in pieces(&*self.validation, &all, self.inputs.recipe.batch_size as usize) {
            self.inputs.control.check()?;
            let permit = self.permit();
            let pass = Pass { lora: Some(&lora), dropout: None, permit: Some(&permit) };
            let part = self.validation.loss(self.inputs.model, piece, pass)?;
            sums.add(part.loss.to_scalar::<f32>()?, piece.len(), part.preference);
        }
        let loss = sums.loss();
        if !loss.is_finite() {
            let message = format!("the validation after step {step} gave loss {loss}; lower the learning rate");
            return Err(diverged(message));
        }
        sums.record("eval", &mut self.metrics);
        Ok(JobEvent::Evaluated { step, loss, margin: sums.margin(), accuracy: sums.accuracy() })
    }
}

fn objective<'a>(spec: request::Objective, examples: &'a Examples) -> Result<Box<dyn Objective + 'a>> {
    match (spec, examples) {
        (request::Objective::Sft, Examples::Sft(examples)) => Ok(Box::new(Sft::new(examples))),
        (request::Objective::Dpo { beta, label_smoothing }, Examples::Dpo(pairs)) => {
            let loss = DpoLoss { beta: beta.into(), label_smoothing: label_smoothing.into() };
            Ok(Box::new(Dpo::new(pairs, loss)))
        }
        _ => Err(Error::internal("the examples are not of the kind the objective needs")),
    }
}

/// Cuts a batch into passes of at most `most` examples and [`PIECE_TOKENS`] ids, at least one example each.
fn pieces<'b>(objective: &dyn Objective, batch: &'b [usize], most: usize) -> Vec<&'b [usize]> {
    let mut pieces = Vec::new();
    let (mut start, mut tokens) = (0, 0);
    for (end, example) in batch.iter().enumerate() {
        let more = objective.tokens(*example);
        if end > start && (tokens + more > PIECE_TOKENS || end - start >= most) {
            pieces.push(&batch[start..end]);
            (start, tokens) = (end, 0);
        }
        tokens += more;
    }
    if start < batch.len() {
        pieces.push(&batch[start..]);
    }
    pieces
}

fn diverged(message: String) -> Error {
    Error::precondition("TRAINING_DIVERGED", "the training run", message)
}
