//! How resources are printed: as JSON, one object per line, or for people: one as lines of `field  value`, many as a table.

use std::io::{Write as _, stdout};

use serde_json::{Value, json};

use super::Result;
use crate::api::client::proto;

/// Something a server answers with.
pub(super) trait Show {
    /// Its fields, in the order to print them.
    fn json(&self) -> Value;
}

/// Something of which there are lists.
pub(super) trait Listed: Show {
    /// The columns of a table of many, each a field.
    const COLUMNS: &'static [&'static str];
}

pub(super) fn one(json: bool, item: &impl Show) -> Result<()> {
    let value = item.json();
    let text = if json { format!("{value}\n") } else { fields(&value) };
    Ok(stdout().lock().write_all(text.as_bytes())?)
}

pub(super) fn many<T: Listed>(json: bool, items: &[T]) -> Result<()> {
    let values: Vec<Value> = items.iter().map(Show::json).collect();
    let text = match json {
        true => values.iter().map(|value| format!("{value}\n")).collect(),
        false => table(T::COLUMNS, &values),
    };
    Ok(stdout().lock().write_all(text.as_bytes())?)
}

/// Says that something was done to a name.
pub(super) fn done(json: bool, what: &str, name: &str) -> Result<()> {
    let text = if json { format!("{}\n", json!({ what: name })) } else { format!("{what} {name}\n") };
    Ok(stdout().lock().write_all(text.as_bytes())?)
}

/// A text of a model or a server without what would steer the terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

fn plain(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) if text.is_empty() => "-".into(),
        Value::String(text) => printable(text),
        Value::Array(items) if items.is_empty() => "-".into(),
        Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(", "),
        Value::Object(map) => {
            map.iter().map(|(key, value)| format!("{key}={}", plain(value))).collect::<Vec<_>>().join(" ")
        }
        other => other.to_string(),
    }
}

fn fields(value: &Value) -> String {
    let Some(map) = value.as_object() else { return format!("{}\n", plain(value)) };
    let width = map.keys().map(String::len).max().unwrap_or(0);
    map.iter().map(|(key, value)| format!("{key:width$}  {}\n", plain(value))).collect()
}

fn table(columns: &[&str], rows: &[Value]) -> String {
    if rows.is_empty() {
        return "none\n".into();
    }
    let header: Vec<String> = columns.iter().map(|column| column.to_uppercase()).collect();
    let body = rows.iter().map(|row| columns.iter().map(|&column| plain(&row[column])).collect());
    let lines: Vec<Vec<String>> = std::iter::once(header).chain(body).collect();
    let width = |i: usize| lines.iter().map(|line| line[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let join = |line: &Vec<String>| {
        let cells: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    lines.iter().map(join).collect()
}

/// A line a token: id, log-probability, text, and the most likely ones in its place.
pub(super) fn print_tokens(ids: &[u32], logprobs: &[proto::TokenLogprob]) -> Result<()> {
    for (id, token) in ids.iter().zip(logprobs) {
        let top: Vec<String> = token.top.iter().map(top_text).collect();
        let line = format!("{id:>8}  {:>9.4}  {}  {}", token.logprob, quoted(&token.text), top.join(" "));
        writeln!(stdout(), "{}", line.trim_end())?;
    }
    Ok(())
}

/// A token's text on one line, in quotes; nothing where the server left it out.
fn quoted(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("{text:?}") }
}

pub(super) fn top_text(top: &proto::TopLogprob) -> String {
    format!("{}{}:{:.3}", top.token_id, quoted(&top.text), top.logprob)
}

pub(super) fn token_json(token: &proto::TokenLogprob) -> Value {
    json!({
        "token_id": token.token_id, "text": token.text, "bytes": token.bytes, "logprob": token.logprob,
        "top": top_json(&token.top),
    })
}

pub(super) fn top_json(top: &[proto::TopLogprob]) -> Vec<Value> {
    let one = |top: &proto::TopLogprob| json!({ "token_id": top.token_id, "text": top.text, "bytes": top.bytes, "logprob": top.logprob });
    top.iter().map(one).collect()
}

/// RFC 3339.
fn time(stamp: &Option<impl ToString>) -> Option<String> {
    stamp.as_ref().map(ToString::to_string)
}

/// A version's name, whether requests for its adapter get it, and the command that makes it so where they do not.
pub(super) fn whether_live(version: &str, live: bool) -> String {
    match live {
        true => format!("{version}, which is live"),
        false => format!("{version}, which is not live; `{}` makes it so", set_live_command(version)),
    }
}

fn set_live_command(version: &str) -> String {
    format!("tenora adapters set-live {}", version.replacen("/versions/", " ", 1))
}

/// A float32 with the digits that it was given.
fn short(value: Option<f32>) -> Option<f64> {
    value.and_then(|value| value.to_string().parse().ok())
}

/// `PREFIX_SOME_WORD` as `some_word`, an unset one as `default`.
fn word(name: &str, prefix: &str, default: &str) -> String {
    match name.trim_start_matches(prefix) {
        "UNSPECIFIED" => default.to_owned(),
        word => word.to_lowercase(),
    }
}

/// `JOB_STATE_RUNNING` as `RUNNING`.
pub(super) fn state(job: proto::JobState) -> &'static str {
    job.as_str_name().trim_start_matches("JOB_STATE_")
}

impl Listed for proto::Adapter {
    const COLUMNS: &'static [&'static str] = &["name", "live_version", "tier", "last_use_time", "update_time"];
}

impl Show for proto::Adapter {
    fn json(&self) -> Value {
        let value = json!({
            "name": self.name, "live_version": self.live_version, "etag": self.etag,
            "create_time": time(&self.create_time), "update_time": time(&self.update_time),
        });
        with_residency(value, &self.residency)
    }
}

impl Listed for proto::AdapterVersion {
    const COLUMNS: &'static [&'static str] =
        &["name", "live", "rank", "target_modules", "size_bytes", "tier", "last_use_time", "create_time"];
}

impl Show for proto::AdapterVersion {
    fn json(&self) -> Value {
        let parity = self.parity.as_ref().map(|parity| {
            json!({
                "tokens": parity.tokens, "mean_abs_difference": parity.mean_abs_difference,
                "mean_abs_effect": parity.mean_abs_effect, "threshold": parity.threshold,
            })
        });
        let mut metrics: Vec<_> = self.metrics.iter().collect();
        metrics.sort_by_key(|(name, _)| *name);
        let metrics: serde_json::Map<_, _> = metrics.into_iter().map(|(k, v)| (k.clone(), json!(v))).collect();
        let mut value = json!({
            "name": self.name, "digest": self.digest, "base_digest": self.base_digest,
            "template_digest": self.template_digest, "size_bytes": self.size_bytes, "kind": self.kind, "rank": self.rank, "virtual_tokens": self.virtual_tokens,
            "target_modules": self.target_modules, "no_effect": self.no_effect, "parity": parity,
            "training_job": self.training_job, "create_time": time(&self.create_time), "metrics": metrics,
            "live": self.live,
        });
        if !self.live {
            value["set_live"] = json!(set_live_command(&self.name));
        }
        if !self.held_reason.is_empty() {
            value["held_reason"] = json!(self.held_reason);
        }
        if !self.note.is_empty() {
            value["note"] = json!(self.note);
        }
        with_residency(value, &self.residency)
    }
}

/// Adds where a version is; nothing for an adapter without a live one.
fn with_residency(mut value: Value, residency: &Option<proto::Residency>) -> Value {
    if let Some(residency) = residency {
        let seconds = residency.last_load_duration.map(|took| took.seconds as f64 + f64::from(took.nanos) * 1e-9);
        value["tier"] = json!(residency.tier().as_str_name().trim_start_matches("TIER_"));
        value["memory_bytes"] = json!(residency.memory_bytes);
        value["last_use_time"] = json!(time(&residency.last_use_time));
        value["last_load_seconds"] = json!(seconds);
    }
    value
}

impl Listed for proto::Dataset {
    const COLUMNS: &'static [&'static str] = &["name", "kind", "records", "size_bytes", "create_time"];
}

impl Show for proto::Dataset {
    fn json(&self) -> Value {
        let value = json!({
            "name": self.name, "kind": self.kind().as_str_name().trim_start_matches("DATASET_KIND_"),
            "records": self.records, "size_bytes": self.size_bytes, "digest": self.digest,
            "create_time": time(&self.create_time),
        });
        with_content(value, &self.content)
    }
}

/// Adds what a file was taken for.
fn with_content(mut value: Value, content: &Option<proto::DatasetContent>) -> Value {
    let counts = |list: &[proto::NamedCount]| -> Value {
        Value::Object(list.iter().map(|count| (count.name.clone(), json!(count.count))).collect())
    };
    if let Some(content) = content {
        value["format"] = json!(content.format);
        value["shapes"] = counts(&content.shapes);
        value["ignored_fields"] = counts(&content.ignored_fields);
        value["more_ignored_fields"] = json!(content.more_ignored_fields);
        value["control_token_mentions"] = json!(content.control_token_mentions);
        value["empty_answers"] = json!(content.empty_answers);
    }
    value
}

fn rendered_json(sequence: &proto::RenderedSequence) -> Value {
    let span =
        |span: &proto::RenderedSpan| json!({ "text": span.text, "token_ids": span.token_ids, "in_loss": span.in_loss });
    json!({
        "record": sequence.record, "line": sequence.line, "answer": sequence.answer,
        "spans": sequence.spans.iter().map(span).collect::<Vec<_>>(),
    })
}

impl Show for proto::DatasetReport {
    fn json(&self) -> Value {
        let dataset = self.dataset.clone().unwrap_or_default();
        let mut value = json!({
            "name": dataset.name, "records": dataset.records, "tokens": self.tokens, "loss_tokens": self.loss_tokens,
            "longest": self.longest, "duplicates": self.duplicates, "max_length": self.max_length, "too_long": self.too_long,
        });
        if !self.too_long_records.is_empty() {
            let record = |record: &proto::RecordLength| json!({ "line": record.line, "tokens": record.tokens });
            value["too_long_records"] = self.too_long_records.iter().map(record).collect();
        }
        if !self.rendered.is_empty() {
            value["rendered"] = self.rendered.iter().map(rendered_json).collect();
        }
        with_content(value, &self.content)
    }
}

impl Listed for proto::TrainingJob {
    const COLUMNS: &'static [&'static str] =
        &["name", "state", "step", "total_steps", "adapter_version", "create_time"];
}

impl Show for proto::TrainingJob {
    fn json(&self) -> Value {
        let spec = self.spec.clone().unwrap_or_default();
        let mut value = json!({
            "name": self.name, "state": state(self.state()), "objective": objective(&spec), "adapter_id": spec.adapter_id,
            "dataset": spec.dataset, "step": self.step, "total_steps": self.total_steps,
            "adapter_version": self.adapter_version, "live": self.live, "has_model": self.has_model, "error": self.error,
            "create_time": time(&self.create_time), "start_time": time(&self.start_time), "end_time": time(&self.end_time),
            "records": self.records, "validation_records": self.validation_records, "tokens": self.tokens,
            "dropped_records": self.dropped_records, "truncated_records": self.truncated_records,
        });
        value["recipe"] = recipe(&spec);
        if !self.live && !self.adapter_version.is_empty() {
            value["set_live"] = json!(set_live_command(&self.adapter_version));
        }
        value
    }
}

fn objective(spec: &proto::TrainRequest) -> Option<&'static str> {
    use proto::train_request::Objective;
    spec.objective.as_ref().map(|objective| match objective {
        Objective::Sft(_) => "SFT",
        Objective::Dpo(_) => "DPO",
    })
}

/// What virtual tokens begin as.
fn virtual_init(init: Option<&proto::VirtualTokensInit>) -> Value {
    use proto::virtual_tokens_init::Tokens;
    match init.and_then(|init| init.tokens.as_ref()) {
        None => json!("random"),
        Some(Tokens::Text(text)) => json!({ "text": text }),
        Some(Tokens::TokenIds(ids)) => json!({ "token_ids": ids.ids }),
    }
}

/// All that a training is a function of but its data.
fn recipe(spec: &proto::TrainRequest) -> Value {
    use proto::train_request::{Objective, Start};
    let mut value = json!({});
    if let Some(Objective::Dpo(dpo)) = &spec.objective {
        value["beta"] = json!(short(dpo.beta));
        value["label_smoothing"] = json!(short(dpo.label_smoothing));
    }
    match &spec.start {
        Some(Start::FromVersion(version)) => value["from_version"] = json!(version),
        Some(Start::Lora(lora)) => {
            value["rank"] = json!(lora.rank);
            value["alpha"] = json!(short(lora.alpha));
            value["dropout"] = json!(short(lora.dropout));
            value["target_modules"] = json!(lora.target_modules);
            value["layers_to_transform"] = json!(lora.layers_to_transform);
            value["use_rslora"] = json!(lora.use_rslora);
            value["use_dora"] = json!(lora.use_dora);
            value["lora_bias"] = json!(lora.lora_bias);
            value["trainable_token_indices"] = json!(lora.trainable_token_indices);
            value["init"] = json!(lora.init().as_str_name().trim_start_matches("LORA_INIT_").to_lowercase());
        }
        Some(Start::Ia3(ia3)) => {
            value["tuner"] = json!("ia3");
            value["target_modules"] = json!(ia3.target_modules);
            value["feedforward_modules"] = json!(ia3.feedforward_modules);
        }
        Some(Start::Bottleneck(bottleneck)) => {
            value["tuner"] = json!("bottleneck");
            value["bottleneck_size"] = json!(bottleneck.bottleneck_size);
            value["placement"] = json!(word(bottleneck.placement().as_str_name(), "BOTTLENECK_PLACEMENT_", "pfeiffer"));
            value["non_linearity"] = json!(word(bottleneck.non_linearity().as_str_name(), "NON_LINEARITY_", "silu"));
            value["layers_to_transform"] = json!(bottleneck.layers_to_transform);
        }
        Some(Start::PromptTuning(prompt)) => {
            value["tuner"] = json!("prompt");
            value["virtual_tokens"] = json!(prompt.num_virtual_tokens);
            value["init"] = virtual_init(prompt.init.as_ref());
        }
        Some(Start::PrefixTuning(prefix)) => {
            value["tuner"] = json!("prefix");
            value["virtual_tokens"] = json!(prefix.num_virtual_tokens);
            value["init"] = virtual_init(prefix.init.as_ref());
            value["projection_size"] = json!(prefix.projection_size);
        }
        Some(Start::Full(full)) => {
            value["tuner"] = json!("full");
            value["target_modules"] = json!(full.target_modules);
            value["layers_to_transform"] = json!(full.layers_to_transform);
            value["extract_rank"] = json!(full.extract_rank);
        }
        None => {}
    }
    let all = spec.hyperparameters.unwrap_or_default();
    let hyperparameters = json!({
        "learning_rate": all.learning_rate, "epochs": all.epochs, "max_steps": all.max_steps,
        "batch_size": all.batch_size, "gradient_accumulation_steps": all.gradient_accumulation_steps,
        "warmup_steps": all.warmup_steps, "schedule": word(all.schedule().as_str_name(), "LR_SCHEDULE_", "cosine"),
        "weight_decay": all.weight_decay, "beta1": all.beta1, "beta2": all.beta2, "epsilon": all.epsilon,
        "max_grad_norm": all.max_grad_norm, "seed": all.seed, "sequential": all.sequential,
        "validation_split": short(all.validation_split), "eval_steps": all.eval_steps, "max_length": all.max_length,
        "gradient_checkpointing": word(all.gradient_checkpointing().as_str_name(), "GRADIENT_CHECKPOINTING_", "auto"),
        "optimizer": word(all.optimizer().as_str_name(), "OPTIMIZER_", "adamw"),
    });
    for (name, given) in hyperparameters.as_object().into_iter().flatten() {
        value[name] = given.clone();
    }
    value["too_long"] = json!(word(spec.too_long().as_str_name(), "TOO_LONG_", "refuse"));
    value["publish"] = json!(word(spec.publish().as_str_name(), "PUBLISH_", "auto"));
    value
}

impl Listed for proto::Tenant {
    const COLUMNS: &'static [&'static str] = &["name", "display_name", "weight", "create_time"];
}

impl Show for proto::Tenant {
    fn json(&self) -> Value {
        json!({
            "name": self.name, "display_name": self.display_name, "weight": self.weight, "etag": self.etag,
            "create_time": time(&self.create_time),
        })
    }
}

impl Show for proto::GetTenantResponse {
    fn json(&self) -> Value {
        let mut value = self.tenant.clone().unwrap_or_default().json();
        value["is_operator"] = json!(self.is_operator);
        let usage = self.usage.clone().unwrap_or_default().json();
        for name in ["requests", "prompt_tokens", "completion_tokens", "training_tokens"] {
            value[name] = usage[name].clone();
        }
        let limit = |limit: &proto::LimitUsage| (limit.name.clone(), json!(format!("{}/{}", limit.used, limit.limit)));
        value["limits"] = Value::Object(self.limits.iter().map(limit).collect());
        value
    }
}

impl Show for proto::Base {
    fn json(&self) -> Value {
        let special = |token: &proto::Token| json!({ "id": token.id, "text": token.text });
        let limits = self.limits.iter().map(|limit| (limit.name.clone(), json!(limit.value)));
        json!({
            "name": self.name, "digest": self.digest, "server_version": self.server_version,
            "context_length": self.context_length, "vocabulary_size": self.vocabulary_size,
            "end_token_ids": self.end_token_ids, "end_of_turn_token_id": self.end_of_turn_token_id,
            "special_tokens": self.special_tokens.iter().map(special).collect::<Vec<_>>(),
            "template_digest": self.template_digest, "chat_template": self.chat_template,
            "limits": Value::Object(limits.collect()),
        })
    }
}

impl Show for proto::TenantUsage {
    fn json(&self) -> Value {
        json!({
            "name": self.name, "requests": self.requests, "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens, "training_tokens": self.training_tokens,
        })
    }
}

impl Listed for proto::ApiKey {
    const COLUMNS: &'static [&'static str] = &["name", "display_name", "create_time", "revoke_time"];
}

impl Show for proto::ApiKey {
    fn json(&self) -> Value {
        json!({
            "name": self.name, "display_name": self.display_name, "create_time": time(&self.create_time),
            "revoke_time": time(&self.revoke_time),
        })
    }
}

impl Show for proto::CreateApiKeyResponse {
    fn json(&self) -> Value {
        let mut key = self.api_key.clone().unwrap_or_default().json();
        key["secret"] = json!(self.secret);
        key
    }
}

impl Show for proto::SafetyPolicy {
    fn json(&self) -> Value {
        json!({ "name": self.name, "blocked_phrases": self.blocked_phrases, "etag": self.etag })
    }
}

impl Show for proto::CheckTextResponse {
    fn json(&self) -> Value {
        let found = |m: &proto::PhraseMatch| json!({ "phrase": m.phrase, "start": m.start, "end": m.end });
        json!({ "allowed": self.allowed, "matches": self.matches.iter().map(found).collect::<Vec<_>>() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_lines_and_many_a_table() {
        let tenant = proto::TenantUsage { name: "tenants/a".into(), requests: 2, ..Default::default() };
        let lines = fields(&tenant.json());
        assert!(lines.starts_with("name               tenants/a\nrequests           2\n"), "{lines}");
        let tenant =
            proto::Tenant { name: "tenants/a".into(), display_name: "A".into(), weight: 1, ..Default::default() };
        let table = table(proto::Tenant::COLUMNS, &[tenant.json()]);
        assert_eq!(table, "NAME       DISPLAY_NAME  WEIGHT  CREATE_TIME\ntenants/a  A             1       -\n");
    }

    #[test]
    fn a_job_shows_its_whole_recipe() {
        use proto::train_request::{Objective, Start};
        let dpo = proto::DpoSpec { beta: Some(0.1), label_smoothing: Some(0.0) };
        let lora = proto::LoraSpec {
            rank: Some(8),
            alpha: Some(16.0),
            target_modules: vec!["q_proj".into()],
            ..Default::default()
        };
        let hyperparameters =
            proto::Hyperparameters { learning_rate: Some(5e-5), beta2: Some(0.999), ..Default::default() };
        let spec = proto::TrainRequest {
            dataset: "tenants/a/datasets/d".into(),
            objective: Some(Objective::Dpo(dpo)),
            start: Some(Start::Lora(lora)),
            hyperparameters: Some(hyperparameters),
            too_long: proto::TooLong::Drop.into(),
            ..Default::default()
        };
        let version = "tenants/a/adapters/x/versions/3".to_owned();
        let job = proto::TrainingJob { spec: Some(spec), adapter_version: version, ..Default::default() };
        let text = fields(&job.json());
        let shown = [
            "objective           DPO\n",
            "dataset             tenants/a/datasets/d\n",
            "beta=0.1 ",
            "rank=8 ",
            "alpha=16.0 ",
            "target_modules=q_proj ",
            "learning_rate=0.00005 ",
            "beta2=0.999 ",
            "schedule=cosine ",
            "gradient_checkpointing=auto ",
            "optimizer=adamw ",
            "too_long=drop ",
            "publish=auto\n",
            "set_live            tenora adapters set-live tenants/a/adapters/x 3\n",
        ];
        for part in shown {
            assert!(text.contains(part), "{part:?} in {text}");
        }
    }

    #[test]
    fn nothing_steers_the_terminal() {
        assert_eq!(printable("a\u{1b}[31mb\tc\n"), "a[31mb\tc\n");
    }
}
