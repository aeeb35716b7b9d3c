//! `tenora train`: upload, start, watch.

use std::io::{Write as _, stdout};
use std::path::{Path, PathBuf};

use super::adapters::PublishArg;
use super::connection::Connection;
use super::{Failure, Result, datasets, request_id, show, watch};
use crate::api::client::{Client, proto};
use crate::ids::Digest;

/// What shapes a fresh adapter, which one that is continued has already.
const SHAPE: [&str; 17] = [
    "tuner",
    "rank",
    "alpha",
    "dropout",
    "targets",
    "layers",
    "rslora",
    "init",
    "feedforward",
    "virtual_tokens",
    "init_text",
    "init_ids",
    "projection_size",
    "bottleneck_size",
    "placement",
    "non_linearity",
    "extract_rank",
];

/// Train an adapter and watch it.
///
/// DATA is a file of records (JSON Lines, a JSON array; gzip too), uploaded first, or the name of a dataset. With --dpo its records are preference pairs. The new
/// version goes through the parity gate; it is live at once where the adapter has no live version yet, or with --publish live.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  tenora train support.jsonl --adapter tone --tenant acme
  tenora train support.jsonl --adapter tone --rank 16 --learning-rate 1e-3 --epochs 3 --validation-split 0.1
  tenora train pairs.jsonl --adapter tone --dpo --from tone --publish live")]
pub(super) struct Args {
    /// A file of records, or a dataset.
    data: String,
    /// The adapter that gets the new version; made if there is none.
    #[arg(long, short)]
    adapter: String,
    /// Continue from this adapter's live version, or ADAPTER/versions/N; its shape is kept [default: a fresh adapter]
    #[arg(long, value_name = "VERSION", conflicts_with_all = SHAPE)]
    from: Option<String>,
    #[command(flatten)]
    objective: Objective,
    #[command(flatten)]
    tuner: Tuner,
    #[command(flatten)]
    hyperparameters: Hyperparameters,
    /// What becomes of records that are longer than --max-length.
    #[arg(long, value_enum, default_value = "refuse")]
    too_long: TooLong,
    #[command(flatten)]
    publish: PublishArg,
    /// Start the job and leave it to the server; follow it with `tenora jobs watch`.
    #[arg(long, conflicts_with = "validate_only")]
    detach: bool,
    /// Check everything and start nothing. A file is uploaded nevertheless.
    #[arg(long)]
    validate_only: bool,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Objective")]
struct Objective {
    /// Direct preference optimisation instead of supervised fine-tuning.
    #[arg(long)]
    dpo: bool,
    /// Strength of the reference [default: 0.1]
    #[arg(long, requires = "dpo")]
    beta: Option<f32>,
    /// Share of labels taken as flipped [default: 0]
    #[arg(long, requires = "dpo", value_name = "SHARE")]
    label_smoothing: Option<f32>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Adapter")]
struct Tuner {
    /// What a fresh adapter is.
    #[arg(long, value_enum, default_value = "lora")]
    tuner: TunerKind,
    /// Rank of the adapter's matrices [default: 8]
    #[arg(long)]
    rank: Option<u32>,
    /// The scale is alpha / rank [default: 16]
    #[arg(long)]
    alpha: Option<f32>,
    /// Of the adapter's input, in [0, 1) [default: 0]
    #[arg(long)]
    dropout: Option<f32>,
    /// q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, or all-linear [default: all-linear, of ia3 k_proj, v_proj and down_proj, of
    /// full every tensor, the embedding and the norms too, where --layers is left out as well]
    #[arg(long, value_delimiter = ',', value_name = "MODULE,...")]
    targets: Vec<String>,
    /// Layers that get an adapter, counted from 0 [default: all]
    #[arg(long, value_delimiter = ',', value_name = "N,...")]
    layers: Vec<u32>,
    /// Scale by alpha / sqrt(rank).
    #[arg(long)]
    rslora: bool,
    /// Of lora: train a bias beside each pair of matrices.
    #[arg(long)]
    lora_bias: bool,
    /// Of lora and dora: ids of tokens whose embeddings are trained too, and their rows of the head where that is the embedding.
    #[arg(long, value_delimiter = ',', value_name = "ID,...")]
    trainable_token_indices: Vec<u32>,
    /// What the matrices of a fresh lora or dora start as [default: default]
    #[arg(long, value_enum)]
    init: Option<Init>,
    /// Of full: make a LoRA of this rank of the change and publish that [default: keep the model, to be exported]
    #[arg(long, value_name = "RANK")]
    extract_rank: Option<u32>,
    /// Of ia3: those of --targets of which the input is scaled, and not the output [default: down_proj, where --targets is left out]
    #[arg(long, value_delimiter = ',', value_name = "MODULE,...", requires = "targets")]
    feedforward: Vec<String>,
    /// Of prompt and prefix: tokens before the sequence [default: 16]
    #[arg(long, value_name = "N")]
    virtual_tokens: Option<u32>,
    /// Of prompt and prefix: a text as whose tokens they begin [default: tokens drawn from the vocabulary]
    #[arg(long, value_name = "TEXT")]
    init_text: Option<String>,
    /// Of prompt and prefix: ids of tokens as which they begin.
    #[arg(long, value_delimiter = ',', value_name = "ID,...", conflicts_with = "init_text")]
    init_ids: Vec<u32>,
    /// Of prefix: train through two layers with so many values between them [default: train keys and values as they are]
    #[arg(long, value_name = "SIZE")]
    projection_size: Option<u32>,
    /// Of bottleneck: values between down and up [default: 32]
    #[arg(long, value_name = "SIZE")]
    bottleneck_size: Option<u32>,
    /// Of bottleneck: behind the feed-forward network (pfeiffer), or behind attention too (houlsby) [default: pfeiffer]
    #[arg(long, value_enum)]
    placement: Option<Placement>,
    /// Of bottleneck: what is between down and up [default: silu]
    #[arg(long, value_enum)]
    non_linearity: Option<NonLinearity>,
}

/// The kinds of adapters that can be trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum TunerKind {
    /// A product of two small matrices is added to linear layers.
    Lora,
    /// As lora, with a magnitude for each row of the layer.
    Dora,
    /// What comes out of linear layers, or goes into them, is scaled.
    Ia3,
    /// Trained embeddings stand before the sequence.
    Prompt,
    /// Trained keys and values stand before the sequence, in every layer.
    Prefix,
    /// Small networks stand behind the feed-forward network, or behind attention too.
    Bottleneck,
    /// No adapter: copies of the base's own tensors, which make another model; the server must allow it. It is exported (tenora jobs export),
    /// or becomes a LoRA by --extract-rank.
    Full,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Placement {
    Pfeiffer,
    Houlsby,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum NonLinearity {
    Silu,
    Gelu,
}

/// How the matrices of a fresh adapter start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Init {
    /// A uniform, B zero.
    Default,
    /// A normal with standard deviation 1 / rank, B zero.
    Gaussian,
    /// As the largest singular values of the layer's weights; the version has twice the rank.
    Pissa,
    /// As the beginning of the QR decomposition of the layer's weights; the version has twice the rank.
    Olora,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Hyperparameters")]
struct Hyperparameters {
    /// Peak learning rate [default: 2e-4, with --dpo 5e-5; of ia3, prompt and prefix 5e-3 and 5e-4, of full 2e-5 and 5e-6]
    #[arg(long, visible_alias = "lr")]
    learning_rate: Option<f64>,
    /// Passes over the records [default: 3]
    #[arg(long)]
    epochs: Option<u32>,
    /// Optimizer steps, instead of epochs.
    #[arg(long, conflicts_with = "epochs")]
    max_steps: Option<u32>,
    /// Records per micro-batch [default: 4]
    #[arg(long)]
    batch_size: Option<u32>,
    /// Micro-batches per optimizer step [default: 1]
    #[arg(long, value_name = "N")]
    gradient_accumulation_steps: Option<u32>,
    /// Steps of linear warm-up [default: 5 % of all steps]
    #[arg(long)]
    warmup_steps: Option<u32>,
    /// How the learning rate falls after the warm-up.
    #[arg(long, value_enum, default_value = "cosine")]
    schedule: Schedule,
    /// Weight decay of AdamW [default: 0]
    #[arg(long)]
    weight_decay: Option<f64>,
    /// Decay of AdamW's mean of the gradients [default: 0.9]
    #[arg(long)]
    beta1: Option<f64>,
    /// Decay of AdamW's mean of their squares [default: 0.999]
    #[arg(long)]
    beta2: Option<f64>,
    /// What AdamW adds to its denominator [default: 1e-8]
    #[arg(long)]
    epsilon: Option<f64>,
    /// Clips the gradient; 0 is off [default: 1]
    #[arg(long)]
    max_grad_norm: Option<f64>,
    /// Of initialisation, dropout, order and split [default: 0]
    #[arg(long)]
    seed: Option<u64>,
    /// Records in their order, not shuffled.
    #[arg(long)]
    sequential: bool,
    /// Share of the records held out for validation [default: 0]
    #[arg(long, value_name = "SHARE")]
    validation_split: Option<f32>,
    /// Steps between validations [default: once an epoch]
    #[arg(long)]
    eval_steps: Option<u32>,
    /// Longest record, in tokens [default: the server's limit max_record_tokens, 8192 unless set, or the base's context]
    #[arg(long)]
    max_length: Option<u32>,
    /// Which passes compute layers again in place of keeping them: less memory, more time, the same result.
    #[arg(long, value_enum, default_value = "auto")]
    gradient_checkpointing: Checkpointing,
    /// In what AdamW keeps its two moments.
    #[arg(long, value_enum, default_value = "adamw")]
    optimizer: Optimizer,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Optimizer {
    /// float32.
    #[value(name = "adamw")]
    AdamW,
    /// Eight bits, blockwise, as bitsandbytes: a fourth of the memory, and steps that differ a little.
    #[value(name = "adamw-8bit")]
    AdamW8Bit,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Checkpointing {
    /// Those that would not fit the server's limit max_training_bytes.
    Auto,
    /// All.
    On,
    /// None.
    Off,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum TooLong {
    Refuse,
    Drop,
    Truncate,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Schedule {
    Cosine,
    Linear,
    Constant,
}

pub(super) async fn run(args: Args) -> Result<()> {
    let connection = &args.connection;
    let json = connection.json;
    let (parent, adapter_id) = connection.split("adapters", &args.adapter)?;
    let client = connection.client().await?;
    let dataset = dataset(&client, &args, &parent).await?;
    let request = proto::TrainRequest {
        adapter_id,
        dataset,
        objective: Some(args.objective.proto()),
        start: Some(match &args.from {
            Some(from) => proto::train_request::Start::FromVersion(connection.name("adapters", from)?),
            None => args.tuner.proto()?,
        }),
        hyperparameters: Some(args.hyperparameters.proto()),
        publish: args.publish.proto() as i32,
        request_id: request_id(),
        validate_only: args.validate_only,
        too_long: match args.too_long {
            TooLong::Refuse => proto::TooLong::Refuse.into(),
            TooLong::Drop => proto::TooLong::Drop.into(),
            TooLong::Truncate => proto::TooLong::Truncate.into(),
        },
        parent,
    };
    if !args.validate_only {
        // Every record, before anything is queued: a job that waits for hours must not fail for its data.
        client.train(proto::TrainRequest { validate_only: true, request_id: String::new(), ..request.clone() }).await?;
    }
    let job = client.train(request).await?;
    if args.validate_only {
        return Ok(writeln!(stdout(), "{}", validated(&job, json))?);
    }
    if args.detach {
        return show::one(json, &job);
    }
    if !json {
        writeln!(stdout(), "{}", job.name)?;
    }
    watch::to_the_end(&client, &job.name, json).await
}

/// What `--validate-only` says of a job that would run.
fn validated(job: &proto::TrainingJob, json: bool) -> String {
    let proto::TrainingJob { total_steps, records, validation_records, tokens, .. } = *job;
    let (dropped, truncated) = (job.dropped_records, job.truncated_records);
    if json {
        let mut value = serde_json::json!({
            "valid": true, "total_steps": total_steps, "records": records, "validation_records": validation_records,
            "tokens": tokens, "dropped_records": dropped, "truncated_records": truncated,
        });
        if let Some(plan) = &job.memory_plan {
            value["memory_plan"] = watch::plan_json(plan);
        }
        return value.to_string();
    }
    let mut text = format!("valid: {total_steps} steps over {records} records");
    if validation_records > 0 {
        text += &format!(" ({validation_records} more for validation)");
    }
    text += &format!(", {tokens} tokens in all");
    for (count, word) in [(dropped, "dropped"), (truncated, "truncated")] {
        if count > 0 {
            text += &format!("; {count} records too long, {word}");
        }
    }
    if let Some(plan) = &job.memory_plan {
        text += &format!("\n{}", watch::plan_text(plan));
    }
    text
}

/// The dataset's name. A file is uploaded under a name that says its content, so that the same file goes up once.
async fn dataset(client: &Client, args: &Args, parent: &str) -> Result<String> {
    let path = PathBuf::from(&args.data);
    if !path.is_file() {
        if args.data.ends_with(".jsonl") {
            return Err(Failure::other(format!("{} is not a file", path.display())));
        }
        return args.connection.name("datasets", &args.data);
    }
    let kind = if args.objective.dpo { proto::DatasetKind::Preferences } else { proto::DatasetKind::Sft };
    let content = std::fs::read(&path).map_err(Failure::at(&path))?;
    let dataset_id = id_for(&path, &Digest::of(&content));
    let name = format!("{parent}/datasets/{dataset_id}");
    match client.get_dataset(proto::GetDatasetRequest { name: name.clone() }).await {
        Ok(dataset) if dataset.kind() == kind => return Ok(name),
        Ok(_) => {
            let other = format!("{name} was uploaded for the other objective; delete it or change the file");
            return Err(Failure::other(other));
        }
        Err(e) if e.is_not_found() => {}
        Err(e) => return Err(e.into()),
    }
    let header =
        proto::UploadHeader { parent: parent.to_owned(), dataset_id, request_id: request_id(), validate_only: false };
    let dataset = datasets::upload(client, header, kind, content).await.map_err(|failure| failure.in_file(&path))?;
    if !args.connection.json {
        writeln!(stdout(), "uploaded {} records as {}", dataset.records, dataset.name)?;
        datasets::print_content(dataset.content.as_ref())?;
    }
    Ok(dataset.name)
}

/// An id of the file's name and the beginning of its digest.
fn id_for(path: &Path, digest: &Digest) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().to_lowercase();
    let stem: String = stem.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(40).collect();
    let stem = stem.trim_matches(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit());
    let stem =
        if stem.starts_with(|c: char| c.is_ascii_lowercase()) { stem.to_owned() } else { format!("data-{stem}") };
    format!("{}-{}", stem.trim_end_matches('-'), &digest.hex()[..12])
}

impl Objective {
    fn proto(&self) -> proto::train_request::Objective {
        use proto::train_request::Objective;
        match self.dpo {
            true => Objective::Dpo(proto::DpoSpec { beta: self.beta, label_smoothing: self.label_smoothing }),
            false => Objective::Sft(proto::SftSpec {}),
        }
    }
}

impl Tuner {
    fn proto(&self) -> Result<proto::train_request::Start> {
        use proto::train_request::Start;
        self.check()?;
        let (num_virtual_tokens, init) = (self.virtual_tokens, self.virtual_init());
        Ok(match self.tuner {
            TunerKind::Lora | TunerKind::Dora => Start::Lora(proto::LoraSpec {
                rank: self.rank,
                alpha: self.alpha,
                dropout: self.dropout,
                target_modules: self.targets.clone(),
                layers_to_transform: self.layers.clone(),
                use_rslora: self.rslora,
                use_dora: self.tuner == TunerKind::Dora,
                lora_bias: self.lora_bias,
                trainable_token_indices: self.trainable_token_indices.clone(),
                init: match self.init {
                    None | Some(Init::Default) => proto::LoraInit::Default,
                    Some(Init::Gaussian) => proto::LoraInit::Gaussian,
                    Some(Init::Pissa) => proto::LoraInit::Pissa,
                    Some(Init::Olora) => proto::LoraInit::Olora,
                }
                .into(),
            }),
            TunerKind::Ia3 => Start::Ia3(proto::Ia3Spec {
                target_modules: self.targets.clone(),
                feedforward_modules: self.feedforward.clone(),
            }),
            TunerKind::Prompt => Start::PromptTuning(proto::PromptTuningSpec { num_virtual_tokens, init }),
            TunerKind::Prefix => Start::PrefixTuning(proto::PrefixTuningSpec {
                num_virtual_tokens,
                init,
                projection_size: self.projection_size.unwrap_or_default(),
            }),
            TunerKind::Bottleneck => Start::Bottleneck(proto::BottleneckSpec {
                bottleneck_size: self.bottleneck_size,
                placement: match self.placement {
                    None => proto::BottleneckPlacement::Unspecified,
                    Some(Placement::Pfeiffer) => proto::BottleneckPlacement::Pfeiffer,
                    Some(Placement::Houlsby) => proto::BottleneckPlacement::Houlsby,
                }
                .into(),
                non_linearity: match self.non_linearity {
                    None => proto::NonLinearity::Unspecified,
                    Some(NonLinearity::Silu) => proto::NonLinearity::Silu,
                    Some(NonLinearity::Gelu) => proto::NonLinearity::Gelu,
                }
                .into(),
                layers_to_transform: self.layers.clone(),
            }),
            TunerKind::Full => Start::Full(proto::FullSpec {
                target_modules: self.targets.clone(),
                layers_to_transform: self.layers.clone(),
                extract_rank: self.extract_rank,
            }),
        })
    }

    fn virtual_init(&self) -> Option<proto::VirtualTokensInit> {
        use proto::virtual_tokens_init::Tokens;
        let tokens = match (&self.init_text, &self.init_ids[..]) {
            (None, []) => return None,
            (Some(text), _) => Tokens::Text(text.clone()),
            (None, ids) => Tokens::TokenIds(proto::TokenIds { ids: ids.to_vec() }),
        };
        Some(proto::VirtualTokensInit { tokens: Some(tokens) })
    }

    /// Refuses what the kind has not, in place of passing it over.
    fn check(&self) -> Result<()> {
        use TunerKind::{Bottleneck, Dora, Full, Ia3, Lora, Prefix, Prompt};
        let settings: [(&str, bool, &[TunerKind]); 17] = [
            ("--rank", self.rank.is_some(), &[Lora, Dora]),
            ("--alpha", self.alpha.is_some(), &[Lora, Dora]),
            ("--dropout", self.dropout.is_some(), &[Lora, Dora]),
            ("--layers", !self.layers.is_empty(), &[Lora, Dora, Bottleneck, Full]),
            ("--rslora", self.rslora, &[Lora, Dora]),
            ("--lora-bias", self.lora_bias, &[Lora]),
            ("--trainable-token-indices", !self.trainable_token_indices.is_empty(), &[Lora, Dora]),
            ("--init", self.init.is_some(), &[Lora, Dora]),
            ("--targets", !self.targets.is_empty(), &[Lora, Dora, Ia3, Full]),
            ("--feedforward", !self.feedforward.is_empty(), &[Ia3]),
            ("--virtual-tokens", self.virtual_tokens.is_some(), &[Prompt, Prefix]),
            ("--init-text or --init-ids", self.virtual_init().is_some(), &[Prompt, Prefix]),
            ("--projection-size", self.projection_size.is_some(), &[Prefix]),
            ("--bottleneck-size", self.bottleneck_size.is_some(), &[Bottleneck]),
            ("--placement", self.placement.is_some(), &[Bottleneck]),
            ("--extract-rank", self.extract_rank.is_some(), &[Full]),
            ("--non-linearity", self.non_linearity.is_some(), &[Bottleneck]),
        ];
        match settings.iter().find(|(_, given, kinds)| *given && !kinds.contains(&self.tuner)) {
            Some((name, _, kinds)) => {
                let kinds: Vec<_> = kinds.iter().map(|kind| format!("{kind:?}").to_lowercase()).collect();
                Err(Failure::other(format!("{name} is a setting of --tuner {}", kinds.join(" and "))))
            }
            None => Ok(()),
        }
    }
}

impl Hyperparameters {
    fn proto(&self) -> proto::Hyperparameters {
        let schedule = match self.schedule {
            Schedule::Cosine => proto::LrSchedule::Cosine,
            Schedule::Linear => proto::LrSchedule::Linear,
            Schedule::Constant => proto::LrSchedule::Constant,
        };
        let gradient_checkpointing = match self.gradient_checkpointing {
            Checkpointing::Auto => proto::GradientCheckpointing::Auto,
            Checkpointing::On => proto::GradientCheckpointing::On,
            Checkpointing::Off => proto::GradientCheckpointing::Off,
        };
        let optimizer = match self.optimizer {
            Optimizer::AdamW => proto::Optimizer::Adamw,
            Optimizer::AdamW8Bit => proto::Optimizer::Adamw8bit,
        };
        proto::Hyperparameters {
            learning_rate: self.learning_rate,
            epochs: self.epochs,
            max_steps: self.max_steps,
            batch_size: self.batch_size,
            gradient_accumulation_steps: self.gradient_accumulation_steps,
            warmup_steps: self.warmup_steps,
            schedule: schedule as i32,
            weight_decay: self.weight_decay,
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
            max_grad_norm: self.max_grad_norm,
            seed: self.seed,
            sequential: self.sequential,
            validation_split: self.validation_split,
            eval_steps: self.eval_steps,
            max_length: self.max_length,
            gradient_checkpointing: gradient_checkpointing.into(),
            optimizer: optimizer.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::check_id;

    #[test]
    fn what_is_valid_says_how_much_it_is() {
        let job = proto::TrainingJob { total_steps: 6, records: 9, tokens: 1234, ..Default::default() };
        assert_eq!(validated(&job, false), "valid: 6 steps over 9 records, 1234 tokens in all");
        let job = proto::TrainingJob { validation_records: 1, dropped_records: 2, ..job };
        let text =
            "valid: 6 steps over 9 records (1 more for validation), 1234 tokens in all; 2 records too long, dropped";
        assert_eq!(validated(&job, false), text);
        assert!(validated(&job, true).starts_with(r#"{"valid":true,"total_steps":6,"records":9"#));
        let plan = proto::MemoryPlan { total_bytes: 7_000_000, gradient_checkpointing: true, ..Default::default() };
        let job = proto::TrainingJob { memory_plan: Some(plan), ..job };
        assert!(validated(&job, false).contains("\nmemory: 7 MB planned"), "{}", validated(&job, false));
        assert!(validated(&job, true).contains(r#""total_bytes":7000000,"gradient_checkpointing":true"#));
    }

    #[test]
    fn files_get_valid_names_that_follow_their_content() {
        for file in ["support.jsonl", "/tmp/My Data (v2).jsonl", "2024.jsonl", ".jsonl", "é.jsonl", "___.jsonl"] {
            let id = id_for(Path::new(file), &Digest::of(b"x"));
            check_id("dataset_id", &id).unwrap_or_else(|e| panic!("{file}: {id}: {e}"));
            assert!(id.starts_with(|c: char| c.is_ascii_lowercase()), "{id}");
            assert_ne!(id, id_for(Path::new(file), &Digest::of(b"y")));
        }
    }
}
