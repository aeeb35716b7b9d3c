//! From a job's spec to what `fit` needs: who owns what, which settings make sense, and every record as ids.

use std::sync::Arc;

use crate::adapter::{BaseShape, Lora};
use crate::config::Limits;
use crate::data::{self, Chat, Examples, Pair, Preference, Record, Split};
use crate::error::{Error, Result};
use crate::hub::Hub;
use crate::ids::{AdapterRef, Tenant};
use crate::model::Model;
use crate::request::{Hyperparameters, JobSpec, LoraSpec, Objective, Start};
use crate::store::{DatasetKind, DatasetRow, Store};
use crate::text::{Conversation, Text};
use crate::train::fit::Control;
use crate::train::objective::loss_tokens;
use crate::train::schedule::Schedule;

/// Where jobs look things up.
#[derive(Debug, Clone)]
pub struct Sources {
    pub store: Store,
    pub hub: Arc<Hub>,
    pub model: Arc<Model>,
    pub text: Arc<Text>,
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
    pub start: Lora,
    /// Continues from a version, which is also what preferences are measured against.
    pub continued: bool,
    pub train: Examples,
    pub validation: Examples,
}

impl Prepared {
    /// What the parity gate scores: the validation records, of pairs the chosen answers.
    pub fn probes(&self) -> Vec<Vec<u32>> {
        match &self.validation {
            Examples::Sft(examples) => examples.iter().map(|example| example.ids.clone()).collect(),
            Examples::Dpo(pairs) => pairs.iter().map(|pair| pair.chosen.ids.clone()).collect(),
        }
    }
}

impl Sources {
    /// Everything that is quick to know.
    pub async fn check(&self, tenant: &Tenant, spec: &JobSpec) -> Result<Checked> {
        tenant.check_owns(&spec.adapter.tenant)?;
        tenant.check_owns(&spec.dataset.tenant)?;
        check_objective(spec.objective)?;
        check_recipe(&spec.hyperparameters, &self.limits, self.model.context_length())?;
        let shape = self.model.shape();
        let bytes = match &spec.start {
            Start::Fresh(lora) => {
                check_lora(lora, shape, self.limits.max_rank)?;
                lora.memory_bytes(shape)?
            }
            Start::From(version) => {
                tenant.check_owns(version.tenant())?;
                let row = self.store.get_version(version).await?;
                if row.base_digest != shape.digest {
                    let message = "was made for another base; start from a version of this one or from a fresh adapter";
                    return Err(Error::precondition("BASE_MISMATCH", version, message));
                }
                row.memory_bytes
            }
        };
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

    /// Loads the starting adapter and turns every record into ids, so that nothing about the data can fail once training runs. CANCELLED
    /// soon after `control` has been told to stop.
    pub async fn prepare(&self, tenant: &Tenant, spec: &JobSpec, control: Arc<Control>) -> Result<Prepared> {
        let Checked { dataset, .. } = self.check(tenant, spec).await?;
        let shape = self.model.shape();
        let (start, continued) = match &spec.start {
            Start::Fresh(lora) => (Lora::fresh(lora, shape, spec.hyperparameters.seed)?, false),
            Start::From(version) => {
                let (_, package) = self.hub.package(tenant, &AdapterRef::Version(version.clone())).await?;
                let shape = shape.clone();
                // The limit on ranks is for what comes in: a version that exists can be continued whatever the limit is now.
                let read = tokio::task::spawn_blocking(move || package.read(&shape, u64::MAX));
                (read.await.map_err(Error::internal)??, true)
            }
        };
        let records = data::read(&self.store, &dataset).await?;
        let (text, recipe) = (self.text.clone(), spec.hyperparameters.clone());
        let max_length = max_length(&recipe, &self.limits, self.model.context_length());
        let encode = move || encode(&records, dataset.kind, &text, &recipe, max_length, &control);
        let (train, validation) = tokio::task::spawn_blocking(encode).await.map_err(Error::internal)??;
        Ok(Prepared { start, continued, train, validation })
    }
}

/// The longest record, in tokens.
fn max_length(recipe: &Hyperparameters, limits: &Limits, context: usize) -> usize {
    let most = usize::try_from(limits.max_record_tokens).unwrap_or(usize::MAX).min(context);
    recipe.max_length.map_or(most, |length| length as usize)
}

/// All records as ids, split into training and validation.
fn encode(
    records: &[Record],
    kind: DatasetKind,
    text: &Text,
    recipe: &Hyperparameters,
    max_length: usize,
    control: &Control,
) -> Result<(Examples, Examples)> {
    let split = Split::new(records.len(), recipe.validation_split, recipe.seed);
    Ok(match kind {
        DatasetKind::Sft => {
            let (train, validation) =
                encode_parts(records, &split, control, |n, record| encode_chat(n, record, text, max_length))?;
            (Examples::Sft(train), Examples::Sft(validation))
        }
        DatasetKind::Preferences => {
            let (train, validation) =
                encode_parts(records, &split, control, |n, record| encode_pair(n, record, text, max_length))?;
            (Examples::Dpo(train), Examples::Dpo(validation))
        }
    })
}

/// In the order of the records, so that an error names the first bad one. `encode` is given a record's number, from 1.
fn encode_parts<T>(
    records: &[Record],
    split: &Split,
    control: &Control,
    encode: impl Fn(usize, &Record) -> Result<T>,
) -> Result<(Vec<T>, Vec<T>)> {
    let (mut train, mut validation) = (Vec::new(), Vec::new());
    for (index, record) in records.iter().enumerate() {
        control.check()?;
        let held_out = split.validation.binary_search(&index).is_ok();
        let part = if held_out { &mut validation } else { &mut train };
        let number = index + 1;
        part.push(encode(number, record).map_err(|error| in_record(number, error))?);
    }
    Ok((train, validation))
}

/// Says in which record it is wrong, unless it does already.
fn in_record(number: usize, error: Error) -> Error {
    match error {
        Error::Invalid { reason, field, message } if field != "dataset" => Error::Invalid {
            reason,
            field: "dataset".to_owned(),
            message: format!("record {number}: {field}: {message}"),
        },
        other => other,
    }
}

fn encode_chat(number: usize, record: &Record, text: &Text, max_length: usize) -> Result<Conversation> {
    let Record::Chat(chat) = record else { return Err(wrong_record(number)) };
    let conversation = Chat::encode(chat, text)?;
    check_length(number, &conversation, max_length)?;
    Ok(conversation)
}

fn encode_pair(number: usize, record: &Record, text: &Text, max_length: usize) -> Result<Pair> {
    let Record::Preference(preference) = record else { return Err(wrong_record(number)) };
    let pair = Preference::encode(preference, text)?;
    check_length(number, &pair.chosen, max_length)?;
    check_length(number, &pair.rejected, max_length)?;
    Ok(pair)
}

fn wrong_record(number: usize) -> Error {
    Error::internal(format!("record {number} is not of its dataset's kind"))
}

fn check_length(number: usize, conversation: &Conversation, max_length: usize) -> Result<()> {
    let length = conversation.ids.len();
    if length > max_length {
        let message = format!(
            "record {number} has {length} tokens and max_length is {max_length}; shorten the record or raise \
             hyperparameters.max_length"
        );
        return Err(Error::invalid_because("RECORD_TOO_LONG", "dataset", message));
    }
    if loss_tokens(conversation) == 0 {
        return Err(Error::invalid_because(
            "NOTHING_TO_LEARN",
            "dataset",
            format!("record {number} has no token to learn"),
        ));
    }
    Ok(())
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

fn check_lora(lora: &LoraSpec, shape: &BaseShape, max_rank: u64) -> Result<()> {
    rule((1..=max_rank).contains(&u64::from(lora.rank)), "lora.rank", format!("in 1..={max_rank} (limit max_rank)"))?;
    rule(lora.alpha > 0.0, "lora.alpha", "positive")?;
    lora.sites(shape).map(drop)
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
