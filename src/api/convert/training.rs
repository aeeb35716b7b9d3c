//! Training jobs: the recipe with its defaults, the job, its events.

use std::collections::BTreeSet;

use prost::Message as _;

use super::{at, known, name, or_empty, publish, request_id, timestamp};
use crate::api::proto as pb;
use crate::error::{Error, Result};
use crate::ids::{AdapterName, Digest, TenantId, VersionName};
use crate::request::metric::{ACCURACIES, MARGINS};
use crate::request::{
    BottleneckSpec, FullSpec, GradientCheckpointing, Hyperparameters, Ia3Spec, JobEvent, JobSpec, JobState,
    LinearLayers, LoraInit, LoraSpec, LrSchedule, MemoryPlan, ModelFormat, NonLinearity, Objective, Optimizer,
    Placement, PrefixSpec, PromptSpec, Publish, Start, Target, TooLong, TrainingData, TrainingMemory, TunerSpec,
    VirtualInit,
};
use crate::store::{JobRow, RequestKey, StoredEvent};
use crate::train::Validated;

/// What stands for every linear layer.
const ALL_LINEAR: &str = "all-linear";

/// The recipe of a request. `from` is the version that `from_version` means.
pub fn job_spec(request: &pb::TrainRequest, from: Option<VersionName>) -> Result<JobSpec> {
    let tenant: TenantId = name("parent", &request.parent)?;
    let objective = objective(request)?;
    let start = match (&request.start, from) {
        (_, Some(version)) => Start::From(version),
        (Some(pb::train_request::Start::Lora(lora)), None) => Start::Fresh(lora_spec(lora)?.into()),
        (Some(pb::train_request::Start::Ia3(ia3)), None) => Start::Fresh(ia3_spec(ia3)?.into()),
        (Some(pb::train_request::Start::PromptTuning(prompt)), None) => Start::Fresh(prompt_spec(prompt).into()),
        (Some(pb::train_request::Start::PrefixTuning(prefix)), None) => Start::Fresh(prefix_spec(prefix).into()),
        (Some(pb::train_request::Start::Bottleneck(bottleneck)), None) => {
            Start::Fresh(bottleneck_spec(bottleneck)?.into())
        }
        (Some(pb::train_request::Start::Full(full)), None) => Start::Fresh(full_spec(full)?.into()),
        (_, None) => Start::Fresh(TunerSpec::default()),
    };
    let learning_rate = default_learning_rate(objective, &start);
    Ok(JobSpec {
        adapter: AdapterName::new(&tenant, &request.adapter_id)?,
        dataset: name("dataset", &request.dataset)?,
        objective,
        start,
        hyperparameters: hyperparameters(request.hyperparameters.unwrap_or_default(), learning_rate)?,
        publish: publish(request.publish)?,
        too_long: match known("too_long", request.too_long)? {
            pb::TooLong::Unspecified | pb::TooLong::Refuse => TooLong::Refuse,
            pb::TooLong::Drop => TooLong::Drop,
            pb::TooLong::Truncate => TooLong::Truncate,
        },
    })
}

/// The request's id, and the digest of what it asks for with defaults filled in: one that spells them out is the same. The names are as
/// they were given, not what they mean now.
pub fn train_key(request: &pb::TrainRequest) -> Result<RequestKey> {
    let id = request_id(request.request_id.clone())?;
    let Some(pb::train_request::Start::FromVersion(_)) = &request.start else {
        return Ok(RequestKey { id, content: content(&recipe(&job_spec(request, None)?)) });
    };
    let fresh = pb::TrainRequest { start: None, ..request.clone() };
    let asked = pb::TrainRequest { start: request.start.clone(), ..recipe(&job_spec(&fresh, None)?) };
    Ok(RequestKey { id, content: content(&asked) })
}

fn content(request: &pb::TrainRequest) -> String {
    Digest::of(&request.encode_to_vec()).to_string()
}

fn objective(request: &pb::TrainRequest) -> Result<Objective> {
    match request.objective {
        Some(pb::train_request::Objective::Sft(pb::SftSpec {})) => Ok(Objective::Sft),
        Some(pb::train_request::Objective::Dpo(dpo)) => {
            Ok(Objective::Dpo { beta: dpo.beta.unwrap_or(0.1), label_smoothing: dpo.label_smoothing.unwrap_or(0.0) })
        }
        None => Err(Error::invalid("objective", "give one of sft and dpo")),
    }
}

fn lora_spec(message: &pb::LoraSpec) -> Result<LoraSpec> {
    let default = LoraSpec::default();
    let layers: BTreeSet<u32> = message.layers_to_transform.iter().copied().collect();
    let tokens: BTreeSet<u32> = message.trainable_token_indices.iter().copied().collect();
    Ok(LoraSpec {
        rank: message.rank.unwrap_or(default.rank),
        alpha: message.alpha.unwrap_or(default.alpha),
        dropout: message.dropout.unwrap_or(default.dropout),
        targets: targets("lora.target_modules", &message.target_modules)?,
        layers: (!layers.is_empty()).then(|| layers.into_iter().collect()),
        use_rslora: message.use_rslora,
        use_dora: message.use_dora,
        lora_bias: message.lora_bias,
        trainable_token_indices: tokens.into_iter().collect(),
        init: match known("lora.init", message.init)? {
            pb::LoraInit::Unspecified | pb::LoraInit::Default => LoraInit::Default,
            pb::LoraInit::Gaussian => LoraInit::Gaussian,
            pb::LoraInit::Pissa => LoraInit::Pissa,
            pb::LoraInit::Olora => LoraInit::Olora,
        },
    })
}

fn ia3_spec(message: &pb::Ia3Spec) -> Result<Ia3Spec> {
    Ok(Ia3Spec {
        targets: targets("ia3.target_modules", &message.target_modules)?,
        feedforward: targets("ia3.feedforward_modules", &message.feedforward_modules)?,
    })
}

fn prompt_spec(message: &pb::PromptTuningSpec) -> PromptSpec {
    let default = PromptSpec::default();
    PromptSpec {
        virtual_tokens: message.num_virtual_tokens.unwrap_or(default.virtual_tokens),
        init: virtual_init(message.init.as_ref()),
    }
}

fn prefix_spec(message: &pb::PrefixTuningSpec) -> PrefixSpec {
    let default = PrefixSpec::default();
    PrefixSpec {
        virtual_tokens: message.num_virtual_tokens.unwrap_or(default.virtual_tokens),
        init: virtual_init(message.init.as_ref()),
        projection: (message.projection_size > 0).then_some(message.projection_size),
    }
}

fn bottleneck_spec(message: &pb::BottleneckSpec) -> Result<BottleneckSpec> {
    let default = BottleneckSpec::default();
    let layers: BTreeSet<u32> = message.layers_to_transform.iter().copied().collect();
    let known_in = |e| at("bottleneck", e);
    Ok(BottleneckSpec {
        size: message.bottleneck_size.unwrap_or(default.size),
        placement: match known("placement", message.placement).map_err(known_in)? {
            pb::BottleneckPlacement::Unspecified | pb::BottleneckPlacement::Pfeiffer => Placement::FeedForward,
            pb::BottleneckPlacement::Houlsby => Placement::Both,
        },
        non_linearity: match known("non_linearity", message.non_linearity).map_err(known_in)? {
            pb::NonLinearity::Unspecified | pb::NonLinearity::Silu => NonLinearity::Silu,
            pb::NonLinearity::Gelu => NonLinearity::Gelu,
        },
        layers: (!layers.is_empty()).then(|| layers.into_iter().collect()),
    })
}

fn bottleneck_message(spec: &BottleneckSpec) -> pb::BottleneckSpec {
    let placement = match spec.placement {
        Placement::FeedForward => pb::BottleneckPlacement::Pfeiffer,
        Placement::Both => pb::BottleneckPlacement::Houlsby,
    };
    let non_linearity = match spec.non_linearity {
        NonLinearity::Silu => pb::NonLinearity::Silu,
        NonLinearity::Gelu => pb::NonLinearity::Gelu,
    };
    pb::BottleneckSpec {
        bottleneck_size: Some(spec.size),
        placement: placement.into(),
        non_linearity: non_linearity.into(),
        layers_to_transform: spec.layers.clone().unwrap_or_default(),
    }
}

fn virtual_init(message: Option<&pb::VirtualTokensInit>) -> VirtualInit {
    use pb::virtual_tokens_init::Tokens;
    match message.and_then(|message| message.tokens.as_ref()) {
        None => VirtualInit::Random,
        Some(Tokens::Text(text)) => VirtualInit::Text(text.clone()),
        Some(Tokens::TokenIds(ids)) => VirtualInit::Ids(ids.ids.clone()),
    }
}

fn virtual_init_message(init: &VirtualInit) -> Option<pb::VirtualTokensInit> {
    use pb::virtual_tokens_init::Tokens;
    let tokens = match init {
        VirtualInit::Random => return None,
        VirtualInit::Text(text) => Tokens::Text(text.clone()),
        VirtualInit::Ids(ids) => Tokens::TokenIds(pb::TokenIds { ids: ids.clone() }),
    };
    Some(pb::VirtualTokensInit { tokens: Some(tokens) })
}

fn full_spec(message: &pb::FullSpec) -> Result<FullSpec> {
    let layers: BTreeSet<u32> = message.layers_to_transform.iter().copied().collect();
    let everything = message.target_modules.is_empty() && layers.is_empty();
    let linear = LinearLayers {
        targets: targets("full.target_modules", &message.target_modules)?,
        layers: (!layers.is_empty()).then(|| layers.into_iter().collect()),
    };
    Ok(FullSpec { linear: (!everything).then_some(linear), extract_rank: message.extract_rank })
}

/// Empty where every linear layer of the base is meant.
fn targets(field: &str, names: &[String]) -> Result<Vec<Target>> {
    let mut targets = BTreeSet::new();
    let mut all = false;
    for (i, name) in names.iter().enumerate() {
        match (name.as_str(), Target::from_name(name)) {
            (ALL_LINEAR, _) => all = true,
            (_, Some(target)) => drop(targets.insert(target)),
            (_, None) => {
                let names = Target::ALL.map(Target::name).join(", ");
                let field = format!("{field}[{i}]");
                return Err(Error::invalid(field, format!("must be one of {names}, {ALL_LINEAR}")));
            }
        }
    }
    Ok(if all { Vec::new() } else { targets.into_iter().collect() })
}

/// The peak rate where none is given.
fn default_learning_rate(objective: Objective, start: &Start) -> f64 {
    match (objective, start) {
        // A factor for each value, or a token that is free, has to move much farther than a product of matrices.
        (Objective::Sft, Start::Fresh(TunerSpec::Ia3(_) | TunerSpec::Prompt(_) | TunerSpec::Prefix(_))) => 5e-3,
        (Objective::Dpo { .. }, Start::Fresh(TunerSpec::Ia3(_) | TunerSpec::Prompt(_) | TunerSpec::Prefix(_))) => 5e-4,
        // Every value of the base moves by itself, each about as far as the rate.
        (Objective::Sft, Start::Fresh(TunerSpec::Full(_))) => 2e-5,
        (Objective::Dpo { .. }, Start::Fresh(TunerSpec::Full(_))) => 5e-6,
        (Objective::Sft, _) => 2e-4,
        (Objective::Dpo { .. }, _) => 5e-5,
    }
}

fn hyperparameters(message: pb::Hyperparameters, learning_rate: f64) -> Result<Hyperparameters> {
    let schedule = match known("schedule", message.schedule).map_err(|e| at("hyperparameters.schedule", e))? {
        pb::LrSchedule::Unspecified | pb::LrSchedule::Cosine => LrSchedule::Cosine,
        pb::LrSchedule::Linear => LrSchedule::Linear,
        pb::LrSchedule::Constant => LrSchedule::Constant,
    };
    let checkpointing = known("gradient_checkpointing", message.gradient_checkpointing)
        .map_err(|e| at("hyperparameters.gradient_checkpointing", e))?;
    let optimizer = match known("optimizer", message.optimizer).map_err(|e| at("hyperparameters.optimizer", e))? {
        pb::Optimizer::Unspecified | pb::Optimizer::Adamw => Optimizer::AdamW,
        pb::Optimizer::Adamw8bit => Optimizer::AdamW8Bit,
    };
    Ok(Hyperparameters {
        learning_rate: message.learning_rate.unwrap_or(learning_rate),
        epochs: message.epochs.unwrap_or(3),
        max_steps: message.max_steps,
        batch_size: message.batch_size.unwrap_or(4),
        gradient_accumulation_steps: message.gradient_accumulation_steps.unwrap_or(1),
        warmup_steps: message.warmup_steps,
        schedule,
        weight_decay: message.weight_decay.unwrap_or(0.0),
        beta1: message.beta1.unwrap_or(0.9),
        beta2: message.beta2.unwrap_or(0.999),
        epsilon: message.epsilon.unwrap_or(1e-8),
        max_grad_norm: message.max_grad_norm.unwrap_or(1.0),
        seed: message.seed.unwrap_or(0),
        sequential: message.sequential,
        validation_split: message.validation_split.unwrap_or(0.0),
        eval_steps: message.eval_steps,
        max_length: message.max_length,
        gradient_checkpointing: match checkpointing {
            pb::GradientCheckpointing::Unspecified | pb::GradientCheckpointing::Auto => GradientCheckpointing::Auto,
            pb::GradientCheckpointing::On => GradientCheckpointing::On,
            pb::GradientCheckpointing::Off => GradientCheckpointing::Off,
        },
        optimizer,
    })
}

pub fn job(row: JobRow) -> pb::TrainingJob {
    pb::TrainingJob {
        live: row.live,
        has_model: row.has_model(),
        name: row.name.to_string(),
        state: state(row.state).into(),
        spec: Some(recipe(&row.spec)),
        step: row.step,
        total_steps: row.total_steps,
        adapter_version: or_empty(row.version),
        error: row.error.unwrap_or_default(),
        create_time: timestamp(row.create_time),
        start_time: row.start_time.and_then(timestamp),
        end_time: row.end_time.and_then(timestamp),
        ..trains_on(row.data)
    }
}

/// What `validate_only` answers: no job.
pub fn validated(spec: &JobSpec, Validated { total_steps, data, plan }: Validated) -> pb::TrainingJob {
    let memory_plan = Some(memory_plan(plan));
    pb::TrainingJob { spec: Some(recipe(spec)), total_steps, memory_plan, ..trains_on(data) }
}

fn memory_plan(plan: MemoryPlan) -> pb::MemoryPlan {
    let MemoryPlan { memory, gradient_checkpointing, paged_optimizer } = plan;
    let TrainingMemory { adapter, gradients, optimizer, activations } = memory;
    pb::MemoryPlan {
        adapter_bytes: adapter,
        gradient_bytes: gradients,
        optimizer_bytes: optimizer,
        activation_bytes: activations,
        total_bytes: memory.total(),
        gradient_checkpointing,
        paged_optimizer_bytes: paged_optimizer,
    }
}

fn memory_peak(memory: TrainingMemory) -> pb::MemoryPeak {
    let TrainingMemory { adapter, gradients, optimizer, activations } = memory;
    pb::MemoryPeak {
        adapter_bytes: adapter,
        gradient_bytes: gradients,
        optimizer_bytes: optimizer,
        activation_bytes: activations,
        total_bytes: memory.total(),
    }
}

fn trains_on(data: TrainingData) -> pb::TrainingJob {
    let TrainingData { records, validation_records, tokens, dropped, truncated } = data;
    pb::TrainingJob {
        records,
        validation_records,
        tokens,
        dropped_records: dropped,
        truncated_records: truncated,
        ..Default::default()
    }
}

fn names(targets: &[Target]) -> Vec<String> {
    targets.iter().map(|target| target.name().to_owned()).collect()
}

/// With all of them named as one: without a name every tensor is meant.
fn linear_names(linear: &LinearLayers) -> Vec<String> {
    if linear.targets.is_empty() { vec![ALL_LINEAR.to_owned()] } else { names(&linear.targets) }
}

/// The request that asks for this, with nothing left to default but enums that came later: what a retry is known by must not change with them.
fn recipe(spec: &JobSpec) -> pb::TrainRequest {
    let objective = match spec.objective {
        Objective::Sft => pb::train_request::Objective::Sft(pb::SftSpec {}),
        Objective::Dpo { beta, label_smoothing } => {
            pb::train_request::Objective::Dpo(pb::DpoSpec { beta: Some(beta), label_smoothing: Some(label_smoothing) })
        }
    };
    let start = match &spec.start {
        Start::From(version) => pb::train_request::Start::FromVersion(version.to_string()),
        Start::Fresh(TunerSpec::Bottleneck(spec)) => pb::train_request::Start::Bottleneck(bottleneck_message(spec)),
        Start::Fresh(TunerSpec::Prompt(prompt)) => pb::train_request::Start::PromptTuning(pb::PromptTuningSpec {
            num_virtual_tokens: Some(prompt.virtual_tokens),
            init: virtual_init_message(&prompt.init),
        }),
        Start::Fresh(TunerSpec::Prefix(prefix)) => pb::train_request::Start::PrefixTuning(pb::PrefixTuningSpec {
            num_virtual_tokens: Some(prefix.virtual_tokens),
            init: virtual_init_message(&prefix.init),
            projection_size: prefix.projection.unwrap_or_default(),
        }),
        Start::Fresh(TunerSpec::Ia3(ia3)) => pb::train_request::Start::Ia3(pb::Ia3Spec {
            target_modules: names(&ia3.targets),
            feedforward_modules: names(&ia3.feedforward),
        }),
        Start::Fresh(TunerSpec::Full(full)) => pb::train_request::Start::Full(pb::FullSpec {
            target_modules: full.linear.as_ref().map(linear_names).unwrap_or_default(),
            layers_to_transform: full.linear.as_ref().and_then(|linear| linear.layers.clone()).unwrap_or_default(),
            extract_rank: full.extract_rank,
        }),
        Start::Fresh(TunerSpec::Lora(lora)) => pb::train_request::Start::Lora(pb::LoraSpec {
            rank: Some(lora.rank),
            alpha: Some(lora.alpha),
            dropout: Some(lora.dropout),
            target_modules: names(&lora.targets),
            layers_to_transform: lora.layers.clone().unwrap_or_default(),
            use_rslora: lora.use_rslora,
            use_dora: lora.use_dora,
            lora_bias: lora.lora_bias,
            trainable_token_indices: lora.trainable_token_indices.clone(),
            init: match lora.init {
                // A request's digest, by which a retry is known, is older than the choice.
                LoraInit::Default => pb::LoraInit::Unspecified,
                LoraInit::Gaussian => pb::LoraInit::Gaussian,
                LoraInit::Pissa => pb::LoraInit::Pissa,
                LoraInit::Olora => pb::LoraInit::Olora,
            }
            .into(),
        }),
    };
    let publish = match spec.publish {
        Publish::Auto => pb::Publish::Unspecified,
        Publish::Live => pb::Publish::Live,
        Publish::VersionOnly => pb::Publish::VersionOnly,
    };
    let too_long = match spec.too_long {
        TooLong::Refuse => pb::TooLong::Unspecified,
        TooLong::Drop => pb::TooLong::Drop,
        TooLong::Truncate => pb::TooLong::Truncate,
    };
    pb::TrainRequest {
        too_long: too_long.into(),
        parent: spec.adapter.tenant.to_string(),
        adapter_id: spec.adapter.adapter.clone(),
        dataset: spec.dataset.to_string(),
        objective: Some(objective),
        start: Some(start),
        hyperparameters: Some(hyperparameter_message(&spec.hyperparameters)),
        publish: publish.into(),
        ..Default::default()
    }
}

fn hyperparameter_message(values: &Hyperparameters) -> pb::Hyperparameters {
    let schedule = match values.schedule {
        LrSchedule::Cosine => pb::LrSchedule::Cosine,
        LrSchedule::Linear => pb::LrSchedule::Linear,
        LrSchedule::Constant => pb::LrSchedule::Constant,
    };
    let checkpointing = match values.gradient_checkpointing {
        // As above: older than the choice.
        GradientCheckpointing::Auto => pb::GradientCheckpointing::Unspecified,
        GradientCheckpointing::On => pb::GradientCheckpointing::On,
        GradientCheckpointing::Off => pb::GradientCheckpointing::Off,
    };
    let optimizer = match values.optimizer {
        // As above.
        Optimizer::AdamW => pb::Optimizer::Unspecified,
        Optimizer::AdamW8Bit => pb::Optimizer::Adamw8bit,
    };
    pb::Hyperparameters {
        learning_rate: Some(values.learning_rate),
        epochs: Some(values.epochs),
        max_steps: values.max_steps,
        batch_size: Some(values.batch_size),
        gradient_accumulation_steps: Some(values.gradient_accumulation_steps),
        warmup_steps: values.warmup_steps,
        schedule: schedule.into(),
        weight_decay: Some(values.weight_decay),
        beta1: Some(values.beta1),
        beta2: Some(values.beta2),
        epsilon: Some(values.epsilon),
        max_grad_norm: Some(values.max_grad_norm),
        seed: Some(values.seed),
        sequential: values.sequential,
        validation_split: Some(values.validation_split),
        eval_steps: values.eval_steps,
        max_length: values.max_length,
        gradient_checkpointing: checkpointing.into(),
        optimizer: optimizer.into(),
    }
}

/// As what a model is exported.
pub fn model_format(format: i32) -> Result<ModelFormat> {
    Ok(match known("format", format)? {
        pb::ModelFormat::Unspecified | pb::ModelFormat::HuggingFace => ModelFormat::HuggingFace,
        pb::ModelFormat::Gguf => ModelFormat::Gguf,
    })
}

fn state(state: JobState) -> pb::JobState {
    match state {
        JobState::Queued => pb::JobState::Queued,
        JobState::Running => pb::JobState::Running,
        JobState::Pausing => pb::JobState::Pausing,
        JobState::Paused => pb::JobState::Paused,
        JobState::Interrupted => pb::JobState::Interrupted,
        JobState::Succeeded => pb::JobState::Succeeded,
        JobState::Failed => pb::JobState::Failed,
        JobState::Cancelling => pb::JobState::Cancelling,
        JobState::Cancelled => pb::JobState::Cancelled,
    }
}

pub fn event(StoredEvent { sequence, time, event }: StoredEvent) -> pb::TrainingEvent {
    use pb::training_event::Event;
    let event = match event {
        JobEvent::State { state: to, error, version, live } => Event::State(pb::StateChanged {
            live,
            state: state(to).into(),
            error: error.unwrap_or_default(),
            adapter_version: or_empty(version),
        }),
        JobEvent::Step {
            step,
            total_steps,
            loss,
            learning_rate,
            grad_norm,
            tokens_per_second,
            eta_seconds,
            metrics,
        } => Event::Step(pb::StepTaken {
            step,
            total_steps,
            loss,
            learning_rate,
            grad_norm,
            tokens_per_second,
            eta_seconds,
            margin: metrics.get(MARGINS).copied(),
            accuracy: metrics.get(ACCURACIES).copied(),
            metrics: metrics.into_iter().collect(),
        }),
        JobEvent::Evaluated { step, loss, metrics } => Event::Evaluated(pb::Evaluated {
            step,
            loss,
            margin: metrics.get(MARGINS).copied(),
            accuracy: metrics.get(ACCURACIES).copied(),
            metrics: metrics.into_iter().collect(),
        }),
        JobEvent::MemoryPlan(plan) => Event::MemoryPlan(memory_plan(plan)),
        JobEvent::MemoryPeak(memory) => Event::MemoryPeak(memory_peak(memory)),
        JobEvent::Message(text) => Event::Message(text),
    };
    pb::TrainingEvent { sequence, time: timestamp(time), event: Some(event) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> pb::TrainRequest {
        pb::TrainRequest {
            parent: "tenants/a".into(),
            adapter_id: "tone".into(),
            dataset: "tenants/a/datasets/d".into(),
            objective: Some(pb::train_request::Objective::Sft(pb::SftSpec {})),
            ..Default::default()
        }
    }

    #[test]
    fn defaults_are_those_of_the_proto() {
        let spec = job_spec(&request(), None).unwrap();
        assert_eq!(spec.start, Start::Fresh(TunerSpec::default()));
        assert_eq!(spec.hyperparameters.learning_rate, 2e-4);
        assert_eq!((spec.hyperparameters.epochs, spec.hyperparameters.batch_size), (3, 4));
        assert_eq!(spec.hyperparameters.max_grad_norm, 1.0);
        assert_eq!(spec.hyperparameters.gradient_checkpointing, GradientCheckpointing::Auto);
        let dpo = pb::train_request::Objective::Dpo(pb::DpoSpec::default());
        let spec = job_spec(&pb::TrainRequest { objective: Some(dpo), ..request() }, None).unwrap();
        assert_eq!(spec.objective, Objective::Dpo { beta: 0.1, label_smoothing: 0.0 });
        assert_eq!(spec.hyperparameters.learning_rate, 5e-5);
    }

    /// What a job says it was asked for asks for the same job.
    #[test]
    fn recipes_round_trip() {
        let lora = pb::LoraSpec {
            rank: Some(3),
            target_modules: vec!["v_proj".into(), "q_proj".into()],
            layers_to_transform: vec![2, 0, 2],
            use_rslora: true,
            trainable_token_indices: vec![9, 3, 9],
            init: pb::LoraInit::Olora.into(),
            ..Default::default()
        };
        let start = Some(pb::train_request::Start::Lora(lora));
        let too_long = pb::TooLong::Truncate.into();
        let gradient_checkpointing = pb::GradientCheckpointing::On.into();
        let optimizer = pb::Optimizer::Adamw8bit.into();
        let hyperparameters = Some(pb::Hyperparameters { gradient_checkpointing, optimizer, ..Default::default() });
        let request = pb::TrainRequest { start, too_long, hyperparameters, ..request() };
        let spec = job_spec(&request, None).unwrap();
        assert!(matches!(&spec.start, Start::Fresh(TunerSpec::Lora(lora)) if lora.layers == Some(vec![0, 2])
            && lora.targets == [Target::QProj, Target::VProj]));
        assert_eq!(job_spec(&recipe(&spec), None).unwrap(), spec);
        let full = |target_modules: &[&str], layers: &[u32]| {
            let target_modules = target_modules.iter().map(|name| (*name).to_owned()).collect();
            let full = pb::FullSpec { target_modules, layers_to_transform: layers.into(), extract_rank: Some(4) };
            let start = Some(pb::train_request::Start::Full(full));
            let spec = job_spec(&pb::TrainRequest { start, ..self::request() }, None).unwrap();
            assert_eq!(job_spec(&recipe(&spec), None).unwrap(), spec);
            let Start::Fresh(TunerSpec::Full(full)) = spec.start else { panic!("{:?}", spec.start) };
            full.linear
        };
        assert_eq!(full(&[], &[]), None);
        assert_eq!(full(&["all-linear"], &[]), Some(LinearLayers::default()));
        assert_eq!(full(&[], &[1]), Some(LinearLayers { layers: Some(vec![1]), ..LinearLayers::default() }));
        assert_eq!(full(&["q_proj"], &[]).unwrap().targets, [Target::QProj]);
    }

    #[test]
    fn all_linear_is_all_seven() {
        assert_eq!(targets("t", &["all-linear".into(), "q_proj".into()]).unwrap(), []);
        assert_eq!(targets("t", &[]).unwrap(), []);
        let error = targets("lora.target_modules", &["q_proj".into(), "lm_head".into()]).unwrap_err();
        assert!(matches!(error, Error::Invalid { field, .. } if field == "lora.target_modules[1]"));
    }
}
