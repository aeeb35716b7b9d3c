//! From a job's spec to what `fit` needs: who owns what, which settings make sense, and every record as ids.

use std::path::PathBuf;
use std::sync::Arc;

use crate::adapter::peft::SizeLimits;
use crate::adapter::{Adapter, VirtualForm};
use crate::config::Limits;
use crate::data::{self, Encoded, Examples, Length, Split};
use crate::device::Arbiter;
use crate::error::{Error, Result};
use crate::hub::Hub;
use crate::ids::{AdapterRef, Tenant};
use crate::memory::Memory;
use crate::model::{Model, parity};
use crate::random::{Purpose, Stream};
use crate::request::{
    AdapterKind, FullSpec, Hyperparameters, JobSpec, LoraSpec, MemoryPlan, Objective, Publish, Start, TrainingData,
    TrainingMemory, TunerSpec, VirtualInit,
};
use crate::store::{DatasetKind, DatasetRow, Store};
use crate::text::Text;
use crate::train::fit::CancelToken;
use crate::train::optim::state_bytes;
use crate::train::plan::{check_adapter, plan, without_passes};
use crate::train::schedule::Schedule;
use crate::work::{block_holding, blocking};

/// What a trainer works with.
#[derive(Debug, Clone)]
pub struct TrainingContext {
    /// Where jobs and datasets are.
    pub store: Store,
    /// Where versions are published.
    pub hub: Arc<Hub>,
    /// The frozen base.
    pub model: Arc<Model>,
    /// The base's tokenizer and template.
    pub text: Arc<Text>,
    /// What it takes memory from while it reads a dataset.
    pub memory: Arc<Memory>,
    /// Whom training asks for compute.
    pub arbiter: Arc<Arbiter>,
    /// The file or folder that the base was read from.
    pub base: PathBuf,
    /// Lets tenants train copies of the base's own tensors.
    pub allow_full_fine_tuning: bool,
    /// The limits that this server was started with.
    pub limits: Limits,
}

/// A job whose settings, names and dataset have been checked, but not yet its records.
#[derive(Debug, Clone)]
pub struct Checked {
    pub dataset: DatasetRow,
    pub total_steps: u32,
}

/// A job ready to run.
#[derive(Debug)]
pub struct Prepared {
    /// One that starts as a part of the base ([`Adapter::is_of_base`]) is still to be given that part.
    pub start: Adapter,
    /// Continues from a version, which is also what preferences are measured against.
    pub continued: bool,
    pub train: Examples,
    pub validation: Examples,
    pub data: TrainingData,
    pub total_steps: u32,
    pub plan: MemoryPlan,
}

impl Prepared {
    /// What the parity gate scores: validation records, as many as it uses, of pairs the chosen answers.
    pub fn probes(&self) -> Vec<Vec<u32>> {
        let ids: Vec<&[u32]> = match &self.validation {
            Examples::Sft(examples) => examples.iter().map(|example| example.ids.as_slice()).collect(),
            Examples::Dpo(pairs) => pairs.iter().map(|pair| pair.chosen.ids.as_slice()).collect(),
        };
        parity::own_probes(&ids)
    }
}

impl TrainingContext {
    /// Everything that is quick to know.
    pub async fn check(&self, tenant: &Tenant, spec: &JobSpec) -> Result<Checked> {
        tenant.check_owns(&spec.adapter.tenant)?;
        tenant.check_owns(&spec.dataset.tenant)?;
        check_objective(spec.objective)?;
        let shape = self.model.shape();
        let (bytes, virtual_tokens) = match &spec.start {
            Start::Fresh(tuner) => {
                self.check_tuner(tuner, spec)?;
                check_adapter(self.parameters(tuner)?, self.limits.max_training_bytes)?;
                (tuner.memory_bytes(shape)?, VirtualForm::of(tuner).map_or(0, |(_, count)| count))
            }
            Start::From(version) => {
                tenant.check_owns(version.tenant())?;
                let row = self.store.get_version(version).await?;
                if row.base_digest != shape.digest {
                    let message = "was made for another base; start from a version of this one or from a fresh adapter";
                    return Err(Error::precondition("BASE_MISMATCH", version, message));
                }
                (row.memory_bytes, row.virtual_tokens as usize)
            }
        };
        check_recipe(&spec.hyperparameters, &self.limits, self.room(virtual_tokens))?;
        // What would refuse the version in the end refuses the job now.
        self.hub.check_size(bytes)?;
        self.store.check_room(&spec.adapter, &self.limits).await?;
        let dataset = self.store.get_dataset(&spec.dataset).await?;
        check_kind(spec.objective, &dataset)?;
        let recipe = &spec.hyperparameters;
        let records = usize::try_from(dataset.records).unwrap_or(usize::MAX);
        let schedule = Schedule::new(recipe, records - Split::held_out(records, recipe.validation_split));
        check_schedule(&schedule, &self.limits)?;
        Ok(Checked { dataset, total_steps: schedule.total_steps })
    }

    fn check_tuner(&self, tuner: &TunerSpec, spec: &JobSpec) -> Result<()> {
        let (limits, context) = (&self.limits, self.model.context_length());
        match tuner {
            TunerSpec::Lora(lora) => check_lora(lora, limits),
            TunerSpec::Ia3(_) => Ok(()),
            TunerSpec::Full(full) => self.check_full(full, spec.publish, &spec.hyperparameters),
            TunerSpec::Bottleneck(bottleneck) => {
                let in_range = (1..=limits.max_rank).contains(&u64::from(bottleneck.size));
                let text = format!("in 1..={} (limit max_rank)", limits.max_rank);
                rule(in_range, "bottleneck.bottleneck_size", text)
            }
            TunerSpec::Prompt(prompt) => {
                check_virtual_tokens("prompt_tuning", prompt.virtual_tokens, limits, context)?;
                self.first_ids(tuner, 0).map(drop)
            }
            TunerSpec::Prefix(prefix) => {
                check_virtual_tokens("prefix_tuning", prefix.virtual_tokens, limits, context)?;
                let size = prefix.projection.is_none_or(|size| (1..=MAX_PROJECTION).contains(&size));
                rule(size, "prefix_tuning.projection_size", format!("at most {MAX_PROJECTION}"))?;
                let random = prefix.projection.is_none() || prefix.init == VirtualInit::Random;
                rule(
                    random,
                    "prefix_tuning.init",
                    "unset with a projection_size: what is reparametrised begins at random",
                )?;
                self.first_ids(tuner, 0).map(drop)
            }
        }
    }

    /// The real tokens that a tuner's virtual tokens begin as, one for each; none where it has none.
    fn first_ids(&self, tuner: &TunerSpec, seed: u64) -> Result<Vec<u32>> {
        let (field, count, init) = match tuner {
            TunerSpec::Prompt(spec) => ("prompt_tuning", spec.virtual_tokens, &spec.init),
            TunerSpec::Prefix(spec) => ("prefix_tuning", spec.virtual_tokens, &spec.init),
            TunerSpec::Lora(_) | TunerSpec::Ia3(_) | TunerSpec::Bottleneck(_) | TunerSpec::Full(_) => {
                return Ok(Vec::new());
            }
        };
        let (vocab, count) = (self.model.vocab_size() as u64, count as usize);
        let ids = match init {
            VirtualInit::Random => {
                let stream = Stream::new(seed, Purpose::Initialisation);
                let draw = |i| ((u64::from(stream.bits(u64::MAX, i)) * vocab) >> 32) as u32;
                (0..count as u32).map(draw).collect()
            }
            VirtualInit::Text(text) => {
                // More would be cut off.
                let most = count.saturating_mul(MAX_TOKEN_BYTES);
                rule(text.len() <= most, &format!("{field}.init.text"), format!("at most {most} bytes long"))?;
                self.text.encode_plain(text)?
            }
            VirtualInit::Ids(ids) => ids.clone(),
        };
        let known = ids.iter().all(|id| u64::from(*id) < vocab);
        rule(known, &format!("{field}.init.token_ids"), format!("less than {vocab}, the size of the vocabulary"))?;
        rule(!ids.is_empty(), &format!("{field}.init"), "given with at least one token, or left out")?;
        Ok(ids.into_iter().cycle().take(count).collect())
    }

    /// Positions of the context behind so many virtual tokens.
    fn room(&self, virtual_tokens: usize) -> usize {
        self.model.context_length().saturating_sub(virtual_tokens)
    }

    /// How many values of a fresh adapter are trained.
    fn parameters(&self, tuner: &TunerSpec) -> Result<usize> {
        match tuner {
            TunerSpec::Full(full) => self.model.trained_values(full),
            tuner => tuner.parameters(self.model.shape()),
        }
    }

    /// Fails where a full fine-tuning is not allowed, takes more memory than it may, or would end in nothing.
    fn check_full(&self, full: &FullSpec, publish: Publish, recipe: &Hyperparameters) -> Result<()> {
        if !self.allow_full_fine_tuning {
            let message = "full fine-tuning makes another model and takes memory for all of it; ask the operator to start the server with \
                           --allow-full-fine-tuning, or train an adapter";
            return Err(Error::precondition("FULL_FINE_TUNING_NOT_ALLOWED", "full", message));
        }
        let (values, most) = (self.model.trained_values(full)?, self.limits.max_full_fine_tuning_bytes);
        let memory = without_passes(values, state_bytes(recipe.optimizer, [values]).all);
        if memory.total() > most {
            let TrainingMemory { adapter, gradients, optimizer, .. } = memory;
            let message = format!(
                "full fine-tuning of {values} values takes {} bytes of memory: {adapter} of the values, as they are and as they were, \
                 {gradients} of gradients, {optimizer} of two moments; the server allows {most}: train fewer layers (target_modules, \
                 layers_to_transform), or ask the operator for a higher limit",
                memory.total()
            );
            return Err(Error::Exhausted { limit: "max_full_fine_tuning_bytes", message, retry_after: None });
        }
        let max_rank = self.limits.max_rank;
        match full.extract_rank {
            Some(rank) => {
                let range = format!("in 1..={max_rank} (limit max_rank)");
                rule((1..=max_rank).contains(&u64::from(rank)), "full.extract_rank", range)
            }
            None => {
                rule(publish == Publish::Auto, "publish", "left out where no extract_rank makes a version")?;
                self.model.check_folder(&self.base)
            }
        }
    }

    /// Fails where the disk is nearly full: a result that cannot be saved is hours lost. Limit `min_free_disk_bytes`, beside which there must be
    /// room for a model that is kept.
    pub fn check_disk(&self, spec: &JobSpec) -> Result<()> {
        let model = if keeps_model(spec) { self.model.folder_bytes() } else { 0 };
        self.store.blobs().check_free(self.limits.min_free_disk_bytes.saturating_add(model))
    }

    /// Loads the starting adapter and turns every record into ids, so that nothing about the data can fail once training runs. CANCELLED
    /// soon after `control` has been told to stop.
    pub async fn prepare(&self, tenant: &Tenant, spec: &JobSpec, control: Arc<CancelToken>) -> Result<Prepared> {
        let Checked { dataset, .. } = self.check(tenant, spec).await?;
        let shape = self.model.shape();
        let (start, continued) = match &spec.start {
            Start::Fresh(tuner) => {
                let (context, tuner, seed) = (self.clone(), tuner.clone(), spec.hyperparameters.seed);
                // Random numbers for a large rank take long, and so do norms.
                let fresh = move || {
                    if let TunerSpec::Full(full) = &tuner {
                        return context.model.copies(full, &context.arbiter.train());
                    }
                    let mut adapter = Adapter::fresh(&tuner, context.model.shape(), seed)?;
                    let ids = context.first_ids(&tuner, seed)?;
                    // Others have nothing from the base, and wait for no compute.
                    if adapter.kind() == AdapterKind::Dora || !ids.is_empty() || !adapter.tokens.is_empty() {
                        context.model.begin(&mut adapter, &ids, Some(&context.arbiter.train()))?;
                    }
                    Ok(adapter)
                };
                (blocking(fresh).await?, false)
            }
            Start::From(version) => {
                let (_, package) = self.hub.package(tenant, &AdapterRef::Version(version.clone())).await?;
                let shape = shape.clone();
                // The limit on ranks is for what comes in: a version that exists can be continued whatever the limit is now.
                (blocking(move || package.read(&shape, SizeLimits::NONE)).await?, true)
            }
        };
        // Until its records are ids; those of the one job that runs are not counted any more.
        let bytes = data::memory_bytes(&self.store, &dataset).await?;
        let memory = tokio::select! {
            memory = self.memory.bulk(bytes) => memory?,
            () = control.stopped() => return Err(Error::Cancelled),
        };
        let file = data::open(&self.store, &dataset).await?;
        let recipe = spec.hyperparameters.clone();
        let max = max_length(&recipe, &self.limits, self.room(start.virtual_count()));
        let length = Length { max, too_long: spec.too_long };
        let (text, limits, model, objective) =
            (self.text.clone(), self.limits.clone(), self.model.clone(), spec.objective);
        let encode = move || {
            let encoded = data::encode(file, &dataset, &text, length, || control.check())?;
            let Encoded { examples, dropped, truncated } = encoded;
            let (train, validation) = examples.split(recipe.validation_split, recipe.seed);
            let schedule = Schedule::new(&recipe, train.len());
            check_schedule(&schedule, &limits)?;
            let tokens = tokens_of_all_steps(&train, &recipe, &schedule);
            let evaluated = evaluated_tokens(&train, &validation, &recipe, &schedule);
            check_tokens(tokens.saturating_add(evaluated), &limits)?;
            let (records, validation_records) = (train.len() as u64, validation.len() as u64);
            let data = TrainingData { records, validation_records, tokens, dropped, truncated };
            let plan = plan(&model, &start, (&train, &validation), objective, &recipe, limits.max_training_bytes)?;
            let total_steps = schedule.total_steps;
            Ok::<_, Error>(Prepared { start, continued, train, validation, data, total_steps, plan })
        };
        Ok(block_holding(memory, encode).await?.0)
    }
}

/// Most values between the two layers of a reparametrised prefix.
const MAX_PROJECTION: u32 = 4096;

/// Most bytes of a text for each virtual token that begins as one of its tokens.
const MAX_TOKEN_BYTES: usize = 256;

/// Returns whether a job's result is a model, which it keeps.
pub fn keeps_model(spec: &JobSpec) -> bool {
    matches!(&spec.start, Start::Fresh(TunerSpec::Full(FullSpec { extract_rank: None, .. })))
}

/// The longest record, in tokens.
fn max_length(recipe: &Hyperparameters, limits: &Limits, context: usize) -> usize {
    let most = usize::try_from(limits.max_record_tokens).unwrap_or(usize::MAX).min(context);
    recipe.max_length.map_or(most, |length| length as usize)
}

fn check_kind(objective: Objective, dataset: &DatasetRow) -> Result<()> {
    let (needed, word, upload) = match objective {
        Objective::Sft => (DatasetKind::Sft, "chats", "UploadDataset"),
        Objective::Dpo { .. } => (DatasetKind::Preferences, "preference pairs", "UploadPreferences"),
    };
    if dataset.kind == needed {
        return Ok(());
    }
    let message = format!("{} does not hold {word}; use one made with {upload}", dataset.name);
    Err(Error::invalid_because("WRONG_DATASET_KIND", "dataset", message))
}

/// Fails with the field's path and the rule it breaks.
fn rule(ok: bool, field: &str, rule: impl std::fmt::Display) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::invalid(field, format!("must be {rule}"))) }
}

fn check_objective(objective: Objective) -> Result<()> {
    let Objective::Dpo { beta, label_smoothing } = objective else { return Ok(()) };
    rule(beta > 0.0 && beta.is_finite(), "dpo.beta", "positive")?;
    rule((0.0..0.5).contains(&label_smoothing), "dpo.label_smoothing", "in [0, 0.5)")
}

fn check_virtual_tokens(field: &str, count: u32, limits: &Limits, context: usize) -> Result<()> {
    let most = limits.max_virtual_tokens;
    let in_range = (1..=most).contains(&u64::from(count));
    let field = format!("{field}.num_virtual_tokens");
    rule(in_range, &field, format!("in 1..={most} (limit max_virtual_tokens)"))?;
    // A record has two tokens at least.
    rule(
        count as usize + 2 <= context,
        &field,
        format!("at most {}, which leaves room in the base's context", context.saturating_sub(2)),
    )
}

fn check_lora(lora: &LoraSpec, limits: &Limits) -> Result<()> {
    let (max_rank, max_tokens) = (limits.max_rank, limits.max_trained_tokens);
    let few = lora.trainable_token_indices.len() as u64 <= max_tokens;
    rule(few, "lora.trainable_token_indices", format!("of at most {max_tokens} tokens (limit max_trained_tokens)"))?;
    let (most, why) = match lora.init.is_of_base() {
        true => (max_rank / 2, "half the limit max_rank: the version has twice the rank"),
        false => (max_rank, "limit max_rank"),
    };
    rule((1..=most).contains(&u64::from(lora.rank)), "lora.rank", format!("in 1..={most} ({why})"))?;
    rule(lora.alpha > 0.0, "lora.alpha", "positive")
}

fn check_recipe(recipe: &Hyperparameters, limits: &Limits, context: usize) -> Result<()> {
    let check = |ok, field: &str, text: &str| rule(ok, &format!("hyperparameters.{field}"), text);
    let r = recipe;
    check(r.learning_rate > 0.0 && r.learning_rate <= 1.0, "learning_rate", "in (0, 1]")?;
    check(r.epochs > 0 || r.max_steps.is_some(), "epochs", "at least 1")?;
    check(r.max_steps != Some(0), "max_steps", "at least 1")?;
    check(r.batch_size > 0, "batch_size", "at least 1")?;
    check(r.gradient_accumulation_steps > 0, "gradient_accumulation_steps", "at least 1")?;
    check(r.weight_decay >= 0.0 && r.weight_decay.is_finite(), "weight_decay", "0 or more")?;
    check((0.0..1.0).contains(&r.beta1), "beta1", "in [0, 1)")?;
    check((0.0..1.0).contains(&r.beta2), "beta2", "in [0, 1)")?;
    check(r.epsilon > 0.0 && r.epsilon.is_finite(), "epsilon", "positive")?;
    check(r.max_grad_norm >= 0.0 && r.max_grad_norm.is_finite(), "max_grad_norm", "0 (off) or more")?;
    check((0.0..=0.5).contains(&r.validation_split), "validation_split", "in [0, 0.5]")?;
    check(r.eval_steps != Some(0), "eval_steps", "at least 1")?;
    let validates = r.eval_steps.is_none() || r.validation_split > 0.0;
    check(validates, "eval_steps", "given with a validation_split, without which there is nothing to evaluate")?;
    let longest = limits.max_record_tokens.min(context as u64);
    let lengths = r.max_length.is_none_or(|length| (2..=longest).contains(&u64::from(length)));
    check(lengths, "max_length", &format!("in 2..={longest} (limit max_record_tokens, and the base's context)"))?;
    let batch = u64::from(r.batch_size) * u64::from(r.gradient_accumulation_steps);
    if batch > limits.max_batch_records {
        let message =
            format!("a step of {batch} records is too large; lower batch_size or gradient_accumulation_steps");
        return Err(Error::Exhausted { limit: "max_batch_records", message, retry_after: None });
    }
    Ok(())
}

/// Ids of each example.
fn lengths(examples: &Examples) -> Vec<u64> {
    match examples {
        Examples::Sft(examples) => examples.iter().map(|example| example.ids.len() as u64).collect(),
        Examples::Dpo(pairs) => pairs.iter().map(|pair| pair.tokens() as u64).collect(),
    }
}

/// Ids that a run scores beside its steps: the validation examples at every evaluation, and once for the reference those and the pairs
/// that its steps see.
fn evaluated_tokens(train: &Examples, validation: &Examples, recipe: &Hyperparameters, schedule: &Schedule) -> u64 {
    let validation: u64 = lengths(validation).iter().sum();
    let evaluations = u64::from(schedule.total_steps.div_ceil(schedule.eval_every));
    let reference = match train {
        Examples::Sft(_) => 0,
        Examples::Dpo(_) => {
            let lengths = lengths(train);
            let seen = schedule.batches(recipe, lengths.len()).seen_in(schedule.total_steps.into());
            seen.into_iter().map(|pair| lengths[pair]).sum::<u64>() + validation
        }
    };
    validation.saturating_mul(evaluations).saturating_add(reference)
}

/// Ids that a run sees, counted each time that it does.
fn tokens_of_all_steps(train: &Examples, recipe: &Hyperparameters, schedule: &Schedule) -> u64 {
    let lengths = lengths(train);
    let (epochs, rest) =
        (schedule.total_steps / schedule.steps_per_epoch, schedule.total_steps % schedule.steps_per_epoch);
    let mut batches = schedule.batches(recipe, lengths.len());
    let first = u64::from(epochs) * u64::from(schedule.steps_per_epoch);
    let last_epoch = (first..first + u64::from(rest)).flat_map(|step| batches.of_step(step));
    let of_last_epoch: u64 = last_epoch.map(|record| lengths[record]).sum();
    lengths.iter().sum::<u64>().saturating_mul(epochs.into()).saturating_add(of_last_epoch)
}

fn check_tokens(tokens: u64, limits: &Limits) -> Result<()> {
    if tokens <= limits.max_training_tokens {
        return Ok(());
    }
    let message = format!(
        "the run would see {tokens} tokens, evaluations included, more than {}: one job at a time trains; lower epochs or max_steps, or evaluate \
         less often",
        limits.max_training_tokens
    );
    Err(Error::Exhausted { limit: "max_training_tokens", message, retry_after: None })
}

fn check_schedule(schedule: &Schedule, limits: &Limits) -> Result<()> {
    let Schedule { total_steps, warmup_steps, .. } = *schedule;
    if u64::from(total_steps) > limits.max_training_steps {
        let message = format!("{total_steps} steps are too many; lower epochs or max_steps");
        return Err(Error::Exhausted { limit: "max_training_steps", message, retry_after: None });
    }
    let text = format!("less than the {total_steps} steps of the run");
    rule(warmup_steps < total_steps, "hyperparameters.warmup_steps", text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::tests::recipe;

    fn field(result: Result<()>) -> String {
        match result {
            Err(Error::Invalid { field, .. }) => field,
            Err(Error::Exhausted { limit, .. }) => limit.to_owned(),
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn recipes_out_of_range_are_refused_by_field() {
        let check = |change: fn(&mut Hyperparameters)| {
            let mut recipe = recipe();
            change(&mut recipe);
            field(check_recipe(&recipe, &Limits::default(), 100))
        };
        assert_eq!(check(|_| {}), "Ok(())");
        assert_eq!(check(|r| r.learning_rate = f64::NAN), "hyperparameters.learning_rate");
        assert_eq!(check(|r| r.batch_size = 0), "hyperparameters.batch_size");
        assert_eq!(check(|r| r.beta2 = 1.0), "hyperparameters.beta2");
        assert_eq!(check(|r| r.max_grad_norm = f64::INFINITY), "hyperparameters.max_grad_norm");
        assert_eq!(check(|r| r.validation_split = 0.6), "hyperparameters.validation_split");
        assert_eq!(check(|r| r.max_length = Some(101)), "hyperparameters.max_length");
        assert_eq!(check(|r| (r.batch_size, r.gradient_accumulation_steps) = (1 << 20, 1 << 20)), "max_batch_records");
    }

    #[test]
    fn a_warm_up_as_long_as_the_run_would_learn_nothing() {
        let recipe = Hyperparameters { max_steps: Some(5), warmup_steps: Some(5), ..recipe() };
        assert_eq!(
            field(check_schedule(&Schedule::new(&recipe, 8), &Limits::default())),
            "hyperparameters.warmup_steps"
        );
        let endless = Hyperparameters { max_steps: Some(u32::MAX), ..recipe };
        assert_eq!(field(check_schedule(&Schedule::new(&endless, 8), &Limits::default())), "max_training_steps");
    }
}
