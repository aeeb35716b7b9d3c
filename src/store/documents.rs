//! What the JSON columns hold: documents of their own, apart from the types that the program works with.
//!
//! A data folder outlives the build that wrote it, so a column must be readable whatever those types become. A document has a version `v`;
//! one without it was written before there were versions and reads as version 1. Within a version fields only come, each with
//! `#[serde(default)]` and the meaning that its absence had; a field that this build does not know is passed over. [`VERSION`] rises only
//! where an older build would misread what is written, and a document above it is refused.
//!
//! Both directions take their values apart by name, without `..`: a field or a variant that is added to a domain type does not compile
//! until its document has it too.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Error, Result};
use crate::ids::{AdapterName, DatasetName, TenantId, VersionName};
use crate::request::{
    BottleneckSpec, FullSpec, GradientCheckpointing, Hyperparameters, Ia3Spec, JobEvent, JobSpec, JobState,
    LinearLayers, LoraInit, LoraSpec, LrSchedule, MemoryPlan, NonLinearity, Objective, Optimizer, ParityReport,
    Placement, PrefixSpec, PromptSpec, Publish, Start, Target, TooLong, TrainingData, TrainingMemory, TunerSpec,
    VirtualInit, metric,
};
use crate::store::rows::{from_json, to_json};

/// The newest version that this build writes and reads.
const VERSION: u32 = 1;

/// Documents from before there were versions.
fn first_version() -> u32 {
    1
}

fn check_version(v: u32) -> Result<()> {
    if v <= VERSION {
        return Ok(());
    }
    Err(Error::internal(format!(
        "catalogue: a column is of version {v}, and this build reads versions up to {VERSION}; run the build that wrote it, or a newer one"
    )))
}

/// A training job's spec as `jobs.spec` holds it.
pub(super) fn write_spec(spec: &JobSpec) -> Result<String> {
    to_json(&SpecDocument::from(spec))
}

/// Reads `jobs.spec`.
pub(super) fn read_spec(text: &str) -> Result<JobSpec> {
    from_json::<SpecDocument>(text)?.try_into()
}

/// An event as `job_events.event` holds it.
pub(super) fn write_event(event: &JobEvent) -> Result<String> {
    to_json(&EventDocument { v: VERSION, event: event.into() })
}

/// Reads `job_events.event`.
pub(super) fn read_event(text: &str) -> Result<JobEvent> {
    let EventDocument { v, event } = from_json(text)?;
    check_version(v)?;
    event.try_into()
}

/// What a job trains on as `jobs.data` holds it.
pub(super) fn write_data(data: &TrainingData) -> Result<String> {
    to_json(&DataDocument::from(data))
}

/// Reads `jobs.data`; zeros where nothing is known.
pub(super) fn read_data(text: Option<&str>) -> Result<TrainingData> {
    match text {
        Some(text) => from_json::<DataDocument>(text)?.try_into(),
        None => Ok(TrainingData::default()),
    }
}

/// What the parity gate measured as `versions.parity` holds it.
pub(super) fn write_parity(report: &ParityReport) -> Result<String> {
    to_json(&ParityDocument::from(report))
}

/// Reads `versions.parity`.
pub(super) fn read_parity(text: &str) -> Result<ParityReport> {
    from_json::<ParityDocument>(text)?.try_into()
}

/// Reads `versions.metrics`: an object of numbers, without a version. What is no finite number is left out.
pub(super) fn read_metrics(text: &str) -> Result<BTreeMap<String, f64>> {
    let all: BTreeMap<String, Option<f64>> = from_json(text)?;
    Ok(all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect())
}

/// JSON has no NaN and no infinities: they are written as null.
fn number<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

/// The same in 32 bits.
fn small_number<'de, D: Deserializer<'de>>(from: D) -> Result<f32, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f32::NAN))
}

/// An enumeration without values, under the names that its variants had when they were first stored.
macro_rules! words {
    ($document:ident, $domain:ident, $($variant:ident)*) => {
        #[derive(Debug, Clone, Copy, Serialize, Deserialize)]
        #[allow(clippy::enum_variant_names, reason = "the names are stored")]
        enum $document { $($variant,)* }

        impl From<$domain> for $document {
            fn from(value: $domain) -> Self {
                match value { $($domain::$variant => Self::$variant,)* }
            }
        }

        impl From<$document> for $domain {
            fn from(value: $document) -> Self {
                match value { $($document::$variant => Self::$variant,)* }
            }
        }
    };
}

words!(PublishWord, Publish, Auto Live VersionOnly);
words!(TooLongWord, TooLong, Refuse Drop Truncate);
words!(TargetWord, Target, QProj KProj VProj OProj GateProj UpProj DownProj QkvProj GateUpProj);
words!(PlacementWord, Placement, FeedForward Both);
words!(NonLinearityWord, NonLinearity, Silu Gelu);
words!(ScheduleWord, LrSchedule, Cosine Linear Constant);
words!(CheckpointingWord, GradientCheckpointing, Auto On Off);
words!(OptimizerWord, Optimizer, AdamW AdamW8Bit);
words!(InitWord, LoraInit, Default Gaussian Pissa Olora);
words!(StateWord, JobState, Queued Running Pausing Paused Interrupted Succeeded Failed Cancelling Cancelled);

/// What there was before there was a choice.
impl Default for TooLongWord {
    fn default() -> Self {
        Self::Refuse
    }
}

/// What there was before there was a choice.
impl Default for CheckpointingWord {
    fn default() -> Self {
        Self::Auto
    }
}

/// What there was before there was a choice.
impl Default for OptimizerWord {
    fn default() -> Self {
        Self::AdamW
    }
}

impl Default for InitWord {
    fn default() -> Self {
        LoraInit::Default.into()
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct AdapterDocument {
    tenant: String,
    adapter: String,
}

impl From<&AdapterName> for AdapterDocument {
    fn from(name: &AdapterName) -> Self {
        let AdapterName { tenant, adapter } = name;
        Self { tenant: tenant.as_str().to_owned(), adapter: adapter.clone() }
    }
}

impl TryFrom<AdapterDocument> for AdapterName {
    type Error = Error;
    fn try_from(document: AdapterDocument) -> Result<Self> {
        let AdapterDocument { tenant, adapter } = document;
        Self::new(&TenantId::new(&tenant)?, &adapter)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct DatasetDocument {
    tenant: String,
    dataset: String,
}

impl From<&DatasetName> for DatasetDocument {
    fn from(name: &DatasetName) -> Self {
        let DatasetName { tenant, dataset } = name;
        Self { tenant: tenant.as_str().to_owned(), dataset: dataset.clone() }
    }
}

impl TryFrom<DatasetDocument> for DatasetName {
    type Error = Error;
    fn try_from(document: DatasetDocument) -> Result<Self> {
        let DatasetDocument { tenant, dataset } = document;
        Self::new(&TenantId::new(&tenant)?, &dataset)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct VersionDocument {
    adapter: AdapterDocument,
    version: u32,
}

impl From<&VersionName> for VersionDocument {
    fn from(name: &VersionName) -> Self {
        let VersionName { adapter, version } = name;
        Self { adapter: adapter.into(), version: *version }
    }
}

impl TryFrom<VersionDocument> for VersionName {
    type Error = Error;
    fn try_from(document: VersionDocument) -> Result<Self> {
        let VersionDocument { adapter, version } = document;
        Ok(Self { adapter: adapter.try_into()?, version })
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct SpecDocument {
    #[serde(default = "first_version")]
    v: u32,
    adapter: AdapterDocument,
    dataset: DatasetDocument,
    objective: ObjectiveDocument,
    start: StartDocument,
    hyperparameters: RecipeDocument,
    publish: PublishWord,
    #[serde(default)]
    too_long: TooLongWord,
}

impl From<&JobSpec> for SpecDocument {
    fn from(spec: &JobSpec) -> Self {
        let JobSpec { adapter, dataset, objective, start, hyperparameters, publish, too_long } = spec;
        Self {
            v: VERSION,
            adapter: adapter.into(),
            dataset: dataset.into(),
            objective: (*objective).into(),
            start: start.into(),
            hyperparameters: hyperparameters.into(),
            publish: (*publish).into(),
            too_long: (*too_long).into(),
        }
    }
}

impl TryFrom<SpecDocument> for JobSpec {
    type Error = Error;
    fn try_from(document: SpecDocument) -> Result<Self> {
        let SpecDocument { v, adapter, dataset, objective, start, hyperparameters, publish, too_long } = document;
        check_version(v)?;
        Ok(Self {
            adapter: adapter.try_into()?,
            dataset: dataset.try_into()?,
            objective: objective.into(),
            start: start.try_into()?,
            hyperparameters: hyperparameters.into(),
            publish: publish.into(),
            too_long: too_long.into(),
        })
    }
}

#[derive(Debug, Serialize, Deserialize)]
enum ObjectiveDocument {
    Sft,
    Dpo { beta: f32, label_smoothing: f32 },
}

impl From<Objective> for ObjectiveDocument {
    fn from(objective: Objective) -> Self {
        match objective {
            Objective::Sft => Self::Sft,
            Objective::Dpo { beta, label_smoothing } => Self::Dpo { beta, label_smoothing },
        }
    }
}

impl From<ObjectiveDocument> for Objective {
    fn from(document: ObjectiveDocument) -> Self {
        match document {
            ObjectiveDocument::Sft => Self::Sft,
            ObjectiveDocument::Dpo { beta, label_smoothing } => Self::Dpo { beta, label_smoothing },
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
enum StartDocument {
    /// A LoRA, which was once the only kind.
    Fresh(LoraDocument),
    Ia3(Ia3Document),
    Prompt(PromptDocument),
    Prefix(PrefixDocument),
    Bottleneck(BottleneckDocument),
    Full(FullDocument),
    From(VersionDocument),
}

impl From<&Start> for StartDocument {
    fn from(start: &Start) -> Self {
        match start {
            Start::Fresh(TunerSpec::Lora(lora)) => Self::Fresh(lora.into()),
            Start::Fresh(TunerSpec::Ia3(ia3)) => Self::Ia3(ia3.into()),
            Start::Fresh(TunerSpec::Prompt(prompt)) => Self::Prompt(prompt.into()),
            Start::Fresh(TunerSpec::Prefix(prefix)) => Self::Prefix(prefix.into()),
            Start::Fresh(TunerSpec::Bottleneck(bottleneck)) => Self::Bottleneck(bottleneck.into()),
            Start::Fresh(TunerSpec::Full(full)) => Self::Full(full.into()),
            Start::From(version) => Self::From(version.into()),
        }
    }
}

impl TryFrom<StartDocument> for Start {
    type Error = Error;
    fn try_from(document: StartDocument) -> Result<Self> {
        Ok(match document {
            StartDocument::Fresh(lora) => Self::Fresh(TunerSpec::Lora(lora.into())),
            StartDocument::Ia3(ia3) => Self::Fresh(TunerSpec::Ia3(ia3.into())),
            StartDocument::Prompt(prompt) => Self::Fresh(TunerSpec::Prompt(prompt.into())),
            StartDocument::Prefix(prefix) => Self::Fresh(TunerSpec::Prefix(prefix.into())),
            StartDocument::Bottleneck(bottleneck) => Self::Fresh(TunerSpec::Bottleneck(bottleneck.into())),
            StartDocument::Full(full) => Self::Fresh(TunerSpec::Full(full.into())),
            StartDocument::From(version) => Self::From(version.try_into()?),
        })
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct LoraDocument {
    rank: u32,
    alpha: f32,
    dropout: f32,
    targets: Vec<TargetWord>,
    layers: Option<Vec<u32>>,
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    lora_bias: bool,
    #[serde(default)]
    trainable_token_indices: Vec<u32>,
    #[serde(default)]
    init: InitWord,
}

impl From<&LoraSpec> for LoraDocument {
    fn from(lora: &LoraSpec) -> Self {
        let LoraSpec {
            rank,
            alpha,
            dropout,
            targets,
            layers,
            use_rslora,
            use_dora,
            lora_bias,
            trainable_token_indices,
            init,
        } = lora;
        Self {
            rank: *rank,
            alpha: *alpha,
            dropout: *dropout,
            targets: targets.iter().map(|target| (*target).into()).collect(),
            layers: layers.clone(),
            use_rslora: *use_rslora,
            use_dora: *use_dora,
            lora_bias: *lora_bias,
            trainable_token_indices: trainable_token_indices.clone(),
            init: (*init).into(),
        }
    }
}

impl From<LoraDocument> for LoraSpec {
    fn from(document: LoraDocument) -> Self {
        let LoraDocument {
            rank,
            alpha,
            dropout,
            targets,
            layers,
            use_rslora,
            use_dora,
            lora_bias,
            trainable_token_indices,
            init,
        } = document;
        Self {
            rank,
            alpha,
            dropout,
            targets: targets.into_iter().map(Target::from).collect(),
            layers,
            use_rslora,
            use_dora,
            lora_bias,
            trainable_token_indices,
            init: init.into(),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Ia3Document {
    targets: Vec<TargetWord>,
    feedforward: Vec<TargetWord>,
}

impl From<&Ia3Spec> for Ia3Document {
    fn from(ia3: &Ia3Spec) -> Self {
        let Ia3Spec { targets, feedforward } = ia3;
        let words = |targets: &[Target]| targets.iter().map(|target| (*target).into()).collect();
        Self { targets: words(targets), feedforward: words(feedforward) }
    }
}

impl From<Ia3Document> for Ia3Spec {
    fn from(document: Ia3Document) -> Self {
        let Ia3Document { targets, feedforward } = document;
        let targets_of = |words: Vec<TargetWord>| words.into_iter().map(Target::from).collect();
        Self { targets: targets_of(targets), feedforward: targets_of(feedforward) }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct PromptDocument {
    virtual_tokens: u32,
    init: VirtualInitDocument,
}

impl From<&PromptSpec> for PromptDocument {
    fn from(PromptSpec { virtual_tokens, init }: &PromptSpec) -> Self {
        Self { virtual_tokens: *virtual_tokens, init: init.into() }
    }
}

impl From<PromptDocument> for PromptSpec {
    fn from(PromptDocument { virtual_tokens, init }: PromptDocument) -> Self {
        Self { virtual_tokens, init: init.into() }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct PrefixDocument {
    virtual_tokens: u32,
    init: VirtualInitDocument,
    projection: Option<u32>,
}

impl From<&PrefixSpec> for PrefixDocument {
    fn from(PrefixSpec { virtual_tokens, init, projection }: &PrefixSpec) -> Self {
        Self { virtual_tokens: *virtual_tokens, init: init.into(), projection: *projection }
    }
}

impl From<PrefixDocument> for PrefixSpec {
    fn from(PrefixDocument { virtual_tokens, init, projection }: PrefixDocument) -> Self {
        Self { virtual_tokens, init: init.into(), projection }
    }
}

#[derive(Debug, Serialize, Deserialize)]
enum VirtualInitDocument {
    Random,
    Text(String),
    Ids(Vec<u32>),
}

impl From<&VirtualInit> for VirtualInitDocument {
    fn from(init: &VirtualInit) -> Self {
        match init {
            VirtualInit::Random => Self::Random,
            VirtualInit::Text(text) => Self::Text(text.clone()),
            VirtualInit::Ids(ids) => Self::Ids(ids.clone()),
        }
    }
}

impl From<VirtualInitDocument> for VirtualInit {
    fn from(document: VirtualInitDocument) -> Self {
        match document {
            VirtualInitDocument::Random => Self::Random,
            VirtualInitDocument::Text(text) => Self::Text(text),
            VirtualInitDocument::Ids(ids) => Self::Ids(ids),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct BottleneckDocument {
    size: u32,
    placement: PlacementWord,
    non_linearity: NonLinearityWord,
    layers: Option<Vec<u32>>,
}

impl From<&BottleneckSpec> for BottleneckDocument {
    fn from(BottleneckSpec { size, placement, non_linearity, layers }: &BottleneckSpec) -> Self {
        Self {
            size: *size,
            placement: (*placement).into(),
            non_linearity: (*non_linearity).into(),
            layers: layers.clone(),
        }
    }
}

impl From<BottleneckDocument> for BottleneckSpec {
    fn from(BottleneckDocument { size, placement, non_linearity, layers }: BottleneckDocument) -> Self {
        Self { size, placement: placement.into(), non_linearity: non_linearity.into(), layers }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct FullDocument {
    linear: Option<LinearDocument>,
    extract_rank: Option<u32>,
}

#[derive(Debug, Serialize, Deserialize)]
struct LinearDocument {
    targets: Vec<TargetWord>,
    layers: Option<Vec<u32>>,
}

impl From<&FullSpec> for FullDocument {
    fn from(full: &FullSpec) -> Self {
        let FullSpec { linear, extract_rank } = full;
        let document = |LinearLayers { targets, layers }: &LinearLayers| LinearDocument {
            targets: targets.iter().map(|target| (*target).into()).collect(),
            layers: layers.clone(),
        };
        Self { linear: linear.as_ref().map(document), extract_rank: *extract_rank }
    }
}

impl From<FullDocument> for FullSpec {
    fn from(document: FullDocument) -> Self {
        let FullDocument { linear, extract_rank } = document;
        let layers = |LinearDocument { targets, layers }| LinearLayers {
            targets: targets.into_iter().map(Target::from).collect(),
            layers,
        };
        Self { linear: linear.map(layers), extract_rank }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct RecipeDocument {
    learning_rate: f64,
    epochs: u32,
    max_steps: Option<u32>,
    batch_size: u32,
    gradient_accumulation_steps: u32,
    warmup_steps: Option<u32>,
    schedule: ScheduleWord,
    weight_decay: f64,
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    max_grad_norm: f64,
    seed: u64,
    sequential: bool,
    validation_split: f32,
    eval_steps: Option<u32>,
    max_length: Option<u32>,
    #[serde(default)]
    gradient_checkpointing: CheckpointingWord,
    #[serde(default)]
    optimizer: OptimizerWord,
}

impl From<&Hyperparameters> for RecipeDocument {
    fn from(recipe: &Hyperparameters) -> Self {
        let Hyperparameters {
            learning_rate,
            epochs,
            max_steps,
            batch_size,
            gradient_accumulation_steps,
            warmup_steps,
            schedule,
            weight_decay,
            beta1,
            beta2,
            epsilon,
            max_grad_norm,
            seed,
            sequential,
            validation_split,
            eval_steps,
            max_length,
            gradient_checkpointing,
            optimizer,
        } = recipe.clone();
        let (schedule, gradient_checkpointing, optimizer) =
            (schedule.into(), gradient_checkpointing.into(), optimizer.into());
        Self {
            learning_rate,
            epochs,
            max_steps,
            batch_size,
            gradient_accumulation_steps,
            warmup_steps,
            schedule,
            weight_decay,
            beta1,
            beta2,
            epsilon,
            max_grad_norm,
            seed,
            sequential,
            validation_split,
            eval_steps,
            max_length,
            gradient_checkpointing,
            optimizer,
        }
    }
}

impl From<RecipeDocument> for Hyperparameters {
    fn from(document: RecipeDocument) -> Self {
        let RecipeDocument {
            learning_rate,
            epochs,
            max_steps,
            batch_size,
            gradient_accumulation_steps,
            warmup_steps,
            schedule,
            weight_decay,
            beta1,
            beta2,
            epsilon,
            max_grad_norm,
            seed,
            sequential,
            validation_split,
            eval_steps,
            max_length,
            gradient_checkpointing,
            optimizer,
        } = document;
        let (schedule, gradient_checkpointing, optimizer) =
            (schedule.into(), gradient_checkpointing.into(), optimizer.into());
        Self {
            learning_rate,
            epochs,
            max_steps,
            batch_size,
            gradient_accumulation_steps,
            warmup_steps,
            schedule,
            weight_decay,
            beta1,
            beta2,
            epsilon,
            max_grad_norm,
            seed,
            sequential,
            validation_split,
            eval_steps,
            max_length,
            gradient_checkpointing,
            optimizer,
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct EventDocument {
    #[serde(default = "first_version")]
    v: u32,
    #[serde(flatten)]
    event: EventBody,
}

#[derive(Debug, Serialize, Deserialize)]
enum EventBody {
    State {
        state: StateWord,
        error: Option<String>,
        version: Option<VersionDocument>,
        #[serde(default)]
        live: Option<bool>,
    },
    Step {
        step: u32,
        total_steps: u32,
        #[serde(deserialize_with = "number")]
        loss: f64,
        #[serde(deserialize_with = "number")]
        learning_rate: f64,
        #[serde(deserialize_with = "number")]
        grad_norm: f64,
        #[serde(deserialize_with = "number")]
        tokens_per_second: f64,
        #[serde(deserialize_with = "number")]
        eta_seconds: f64,
        #[serde(flatten)]
        measured: MeasuredDocument,
    },
    Evaluated {
        step: u32,
        #[serde(deserialize_with = "number")]
        loss: f64,
        #[serde(flatten)]
        measured: MeasuredDocument,
    },
    MemoryPlan {
        #[serde(flatten)]
        memory: MemoryDocument,
        gradient_checkpointing: bool,
        #[serde(default)]
        paged_optimizer: u64,
    },
    MemoryPeak(MemoryDocument),
    Message(String),
}

#[derive(Debug, Serialize, Deserialize)]
struct MemoryDocument {
    adapter: u64,
    gradients: u64,
    optimizer: u64,
    activations: u64,
}

impl From<TrainingMemory> for MemoryDocument {
    fn from(memory: TrainingMemory) -> Self {
        let TrainingMemory { adapter, gradients, optimizer, activations } = memory;
        Self { adapter, gradients, optimizer, activations }
    }
}

impl From<MemoryDocument> for TrainingMemory {
    fn from(document: MemoryDocument) -> Self {
        let MemoryDocument { adapter, gradients, optimizer, activations } = document;
        Self { adapter, gradients, optimizer, activations }
    }
}

/// What is measured beside the loss. What 0.1.0 wrote has two of the measurements, by names of its own; it cannot read what this build writes.
#[derive(Debug, Default, Serialize, Deserialize)]
struct MeasuredDocument {
    #[serde(default, skip_serializing)]
    margin: Option<f64>,
    #[serde(default, skip_serializing)]
    accuracy: Option<f64>,
    #[serde(default)]
    metrics: BTreeMap<String, Option<f64>>,
}

impl From<BTreeMap<String, f64>> for MeasuredDocument {
    fn from(metrics: BTreeMap<String, f64>) -> Self {
        let metrics = metrics.into_iter().map(|(name, value)| (name, Some(value))).collect();
        Self { margin: None, accuracy: None, metrics }
    }
}

impl From<MeasuredDocument> for BTreeMap<String, f64> {
    fn from(document: MeasuredDocument) -> Self {
        let MeasuredDocument { margin, accuracy, metrics } = document;
        let old = [(metric::MARGINS, margin), (metric::ACCURACIES, accuracy)];
        let old = old.into_iter().map(|(name, value)| (name.to_owned(), value));
        old.chain(metrics).filter_map(|(name, value)| Some((name, value?))).collect()
    }
}

impl From<&JobEvent> for EventBody {
    fn from(event: &JobEvent) -> Self {
        match event.clone() {
            JobEvent::State { state, error, version, live } => {
                Self::State { state: state.into(), error, version: version.as_ref().map(VersionDocument::from), live }
            }
            JobEvent::Step {
                step,
                total_steps,
                loss,
                learning_rate,
                grad_norm,
                tokens_per_second,
                eta_seconds,
                metrics,
            } => Self::Step {
                step,
                total_steps,
                loss,
                learning_rate,
                grad_norm,
                tokens_per_second,
                eta_seconds,
                measured: metrics.into(),
            },
            JobEvent::Evaluated { step, loss, metrics } => Self::Evaluated { step, loss, measured: metrics.into() },
            JobEvent::MemoryPlan(MemoryPlan { memory, gradient_checkpointing, paged_optimizer }) => {
                Self::MemoryPlan { memory: memory.into(), gradient_checkpointing, paged_optimizer }
            }
            JobEvent::MemoryPeak(memory) => Self::MemoryPeak(memory.into()),
            JobEvent::Message(text) => Self::Message(text),
        }
    }
}

impl TryFrom<EventBody> for JobEvent {
    type Error = Error;
    fn try_from(body: EventBody) -> Result<Self> {
        Ok(match body {
            EventBody::State { state, error, version, live } => {
                let version = version.map(VersionName::try_from).transpose()?;
                Self::State { state: state.into(), error, version, live }
            }
            EventBody::Step {
                step,
                total_steps,
                loss,
                learning_rate,
                grad_norm,
                tokens_per_second,
                eta_seconds,
                measured,
            } => Self::Step {
                step,
                total_steps,
                loss,
                learning_rate,
                grad_norm,
                tokens_per_second,
                eta_seconds,
                metrics: measured.into(),
            },
            EventBody::Evaluated { step, loss, measured } => Self::Evaluated { step, loss, metrics: measured.into() },
            EventBody::MemoryPlan { memory, gradient_checkpointing, paged_optimizer } => {
                Self::MemoryPlan(MemoryPlan { memory: memory.into(), gradient_checkpointing, paged_optimizer })
            }
            EventBody::MemoryPeak(memory) => Self::MemoryPeak(memory.into()),
            EventBody::Message(text) => Self::Message(text),
        })
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct DataDocument {
    #[serde(default = "first_version")]
    v: u32,
    records: u64,
    validation_records: u64,
    tokens: u64,
    dropped: u64,
    truncated: u64,
}

impl From<&TrainingData> for DataDocument {
    fn from(data: &TrainingData) -> Self {
        let TrainingData { records, validation_records, tokens, dropped, truncated } = *data;
        Self { v: VERSION, records, validation_records, tokens, dropped, truncated }
    }
}

impl TryFrom<DataDocument> for TrainingData {
    type Error = Error;
    fn try_from(document: DataDocument) -> Result<Self> {
        let DataDocument { v, records, validation_records, tokens, dropped, truncated } = document;
        check_version(v)?;
        Ok(Self { records, validation_records, tokens, dropped, truncated })
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct ParityDocument {
    #[serde(default = "first_version")]
    v: u32,
    tokens: u32,
    #[serde(deserialize_with = "small_number")]
    mean_abs_difference: f32,
    #[serde(deserialize_with = "small_number")]
    mean_abs_effect: f32,
    #[serde(deserialize_with = "small_number")]
    threshold: f32,
    no_effect: bool,
}

impl From<&ParityReport> for ParityDocument {
    fn from(report: &ParityReport) -> Self {
        let ParityReport { tokens, mean_abs_difference, mean_abs_effect, threshold, no_effect } = *report;
        Self { v: VERSION, tokens, mean_abs_difference, mean_abs_effect, threshold, no_effect }
    }
}

impl TryFrom<ParityDocument> for ParityReport {
    type Error = Error;
    fn try_from(document: ParityDocument) -> Result<Self> {
        let ParityDocument { v, tokens, mean_abs_difference, mean_abs_effect, threshold, no_effect } = document;
        check_version(v)?;
        Ok(Self { tokens, mean_abs_difference, mean_abs_effect, threshold, no_effect })
    }
}

#[cfg(test)]
mod tests;
