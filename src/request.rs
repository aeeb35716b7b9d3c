//! What travels between the modules: generation and training requests, their events, finish reasons. Plain data, checked at the door.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::ids::{AdapterName, AdapterRef, DatasetName, VersionName};
use crate::telemetry::traces;

/// A message of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text; nothing in it is a control token.
    pub content: String,
    /// Who speaks, for templates that show it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl ChatMessage {
    /// A message without a name.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), name: None }
    }
}

/// What a generation continues, or what is scored.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// Control tokens are recognised.
    Text(String),
    /// Rendered by the base's chat template; content is always plain text.
    Chat(Vec<ChatMessage>),
    /// The same; the last message, the assistant's, is continued.
    ContinuedChat(Vec<ChatMessage>),
    /// Ids as they are; each must be in the vocabulary.
    TokenIds(Vec<u32>),
}

/// How the next token is drawn. `temperature` 0 is greedy.
///
/// ```
/// use tenora::request::Sampling;
///
/// let sampling = Sampling { temperature: 0.8, top_p: 0.9, seed: 7, ..Sampling::default() };
/// assert!(sampling.check().is_ok());
/// let wrong = Sampling { top_p: 1.5, ..sampling };
/// assert!(wrong.check().unwrap_err().to_string().starts_with("sampling.top_p"));
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// What logits are divided by; 0 takes the likeliest.
    pub temperature: f32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 0 is off.
    pub min_p: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
    /// Taken once from the logits of the answer's tokens; 0 is off.
    pub presence_penalty: f32,
    /// Taken from a logit for each time that the answer has the token; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of these ids; each id once. [`BAN`] bans one.
    pub logit_bias: Vec<(u32, f32)>,
    /// Tokens before which no end token is drawn and no stop string is looked for.
    pub min_tokens: u32,
    /// Answers to one prompt; answer i is drawn with `seed + i`.
    pub n: u32,
    /// The same seed draws the same tokens.
    pub seed: u64,
}

/// The bias that makes a token impossible.
pub const BAN: f32 = -100.0;

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            min_tokens: 0,
            n: 1,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Checks each value by itself.
    ///
    /// # Errors
    /// INVALID_ARGUMENT for the first that is out of its range.
    pub fn check(&self) -> Result<()> {
        let range = |field: &str, ok: bool, rule: &str| {
            if ok { Ok(()) } else { Err(Error::invalid(format!("sampling.{field}"), format!("must be {rule}"))) }
        };
        range("temperature", (0.0..=10.0).contains(&self.temperature), "in [0, 10]")?;
        range("top_p", self.top_p > 0.0 && self.top_p <= 1.0, "in (0, 1]")?;
        range("min_p", (0.0..=1.0).contains(&self.min_p), "in [0, 1]")?;
        range("repetition_penalty", (0.01..=10.0).contains(&self.repetition_penalty), "in [0.01, 10]")?;
        range("presence_penalty", (-2.0..=2.0).contains(&self.presence_penalty), "in [-2, 2]")?;
        range("frequency_penalty", (-2.0..=2.0).contains(&self.frequency_penalty), "in [-2, 2]")?;
        let biased = self.logit_bias.iter().find(|(_, bias)| !(BAN..=-BAN).contains(bias));
        match biased {
            Some((id, _)) => Err(Error::invalid(format!("sampling.logit_bias[{id}]"), "must be in [-100, 100]")),
            None => Ok(()),
        }
    }
}

/// When an answer ends.
#[derive(Debug, Clone, PartialEq)]
pub struct Stopping {
    /// Tokens at most.
    pub max_tokens: u32,
    /// Texts that end the answer; the answer ends before them.
    pub stop: Vec<String>,
    /// Goes on over tokens that end an answer.
    pub ignore_eos: bool,
}

/// One call of Generate.
#[derive(Debug, Clone)]
pub struct GenerateSpec {
    /// `None` is the base.
    pub adapter: Option<AdapterRef>,
    /// What is continued.
    pub prompt: Prompt,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// When the answer ends.
    pub stopping: Stopping,
    /// `Some(n)`: log-probabilities, with the n most likely tokens beside each.
    pub logprobs: Option<u32>,
    /// Higher goes first among the requests of one tenant.
    pub priority: i32,
    /// When the caller stops waiting.
    pub deadline: Option<Instant>,
    /// What its spans belong to.
    pub trace: Option<traces::Context>,
}

/// One call of Score.
#[derive(Debug, Clone)]
pub struct ScoreSpec {
    /// The adapter; `None` is the base.
    pub adapter: Option<AdapterRef>,
    /// The sequences.
    pub inputs: Vec<Prompt>,
    /// The likeliest tokens that are told at each position.
    pub top_logprobs: u32,
    /// Higher goes first among the requests of one tenant.
    pub priority: i32,
    /// When the caller stops waiting.
    pub deadline: Option<Instant>,
    /// What its spans belong to.
    pub trace: Option<traces::Context>,
}

/// The log-probability of a token and of the most likely ones at its position, best first. Nats.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub id: u32,
    /// Its natural log-probability.
    pub logprob: f32,
    /// The likeliest tokens there, with theirs.
    pub top: Vec<(u32, f32)>,
}

/// A generated token; `logprob` where asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenOut {
    /// The token.
    pub id: u32,
    /// Where it was asked for.
    pub logprob: Option<TokenLogprob>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// By a token that ends answers, or a stop string.
    Stop,
    /// By the most tokens that were asked for, or the end of the context.
    Length,
    /// Before a phrase of the tenant's policy.
    ContentFiltered,
    /// The caller has gone.
    Cancelled,
}

/// What ended an answer that ended with [`FinishReason::Stop`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopCause {
    /// This stop string.
    Text(String),
    /// This end token.
    Token(u32),
}

/// What a request is charged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens that came in.
    pub prompt_tokens: u32,
    /// Tokens that were generated.
    pub completion_tokens: u32,
    /// Of the prompt's, those found in the prefix cache, where it is known.
    pub cached_tokens: Option<u32>,
    /// Tokens that the adapter put before the prompt; they are not among the prompt's.
    pub virtual_tokens: u32,
}

/// What a generation stream yields: `Started`, then deltas, then `Finished`. An `Err` ends the stream too.
#[derive(Debug, Clone, PartialEq)]
pub enum GenerateEvent {
    /// The version leased; `None` is the base.
    Started {
        /// The adapter's version; `None` is the base.
        version: Option<VersionName>,
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Tokens that the adapter put before it.
        virtual_tokens: u32,
        /// What its tokens are drawn with; `None` where they are not drawn.
        seed: Option<u64>,
    },
    /// More of the answer.
    Delta {
        /// Whole characters.
        text: String,
        /// The tokens that it was made of.
        tokens: Vec<TokenOut>,
    },
    /// The last event.
    Finished {
        /// Why it ended.
        reason: FinishReason,
        /// Of [`FinishReason::Stop`].
        stop: Option<StopCause>,
        /// What it is charged.
        usage: Usage,
    },
}

/// The scores of one sequence of n ids: n - 1 log-probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoreOut {
    /// The sequence as ids.
    pub ids: Vec<u32>,
    /// Of each id but the first, given those before it.
    pub logprobs: Vec<TokenLogprob>,
    /// The likeliest ids after the sequence.
    pub next: Vec<(u32, f32)>,
}

/// What scoring gives.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoreAnswer {
    /// The adapter's version; `None` is the base.
    pub version: Option<VersionName>,
    /// One for each input, in their order.
    pub results: Vec<ScoreOut>,
    /// What it is charged.
    pub usage: Usage,
}

/// Whether a new version goes live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Publish {
    /// Live where the adapter has no live version, else version only.
    Auto,
    /// It becomes the adapter's live version.
    Live,
    /// The live version stays as it is.
    VersionOnly,
}

/// A linear layer of a block, in PEFT's words. The order is that of the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// The queries of attention.
    QProj,
    /// The keys of attention.
    KProj,
    /// The values of attention.
    VProj,
    /// The output of attention.
    OProj,
    /// The gate of the feed-forward network.
    GateProj,
    /// The other half of the feed-forward network's inner layer.
    UpProj,
    /// The output of the feed-forward network.
    DownProj,
    /// Queries, keys and values in one.
    QkvProj,
    /// Gate and up in one.
    GateUpProj,
}

impl Target {
    /// All that some architecture has. Which ones a base has, its shape says.
    pub const ALL: [Self; 9] = [
        Self::QProj,
        Self::KProj,
        Self::VProj,
        Self::OProj,
        Self::GateProj,
        Self::UpProj,
        Self::DownProj,
        Self::QkvProj,
        Self::GateUpProj,
    ];

    /// Returns the part of a transformer block that it is in, by PEFT's name.
    pub fn block_part(self) -> &'static str {
        match self {
            Self::QProj | Self::KProj | Self::VProj | Self::OProj | Self::QkvProj => "self_attn",
            Self::GateProj | Self::UpProj | Self::DownProj | Self::GateUpProj => "mlp",
        }
    }

    /// `q_proj` and so on.
    pub fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
            Self::QkvProj => "qkv_proj",
            Self::GateUpProj => "gate_up_proj",
        }
    }

    /// Returns the target of PEFT's name for it.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.name() == name)
    }
}

/// What an adapter does to the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterKind {
    /// Adds a product of two small matrices to linear layers.
    Lora,
    /// As LoRA, and gives each row of the sum a norm of its own.
    Dora,
    /// Multiplies what goes into linear layers, or comes out of them.
    Ia3,
    /// Puts trained embeddings before the sequence.
    Prompt,
    /// Puts trained keys and values before the sequence, in every layer.
    Prefix,
    /// Puts small networks behind attention and the feed-forward network.
    Bottleneck,
    /// Takes trained copies of the base's own tensors in their place, which makes another model of it: no version is of this kind.
    Full,
}

impl AdapterKind {
    /// All kinds.
    pub const ALL: [Self; 7] =
        [Self::Lora, Self::Dora, Self::Ia3, Self::Prompt, Self::Prefix, Self::Bottleneck, Self::Full];

    /// Returns its name: `lora` and so on.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lora => "lora",
            Self::Dora => "dora",
            Self::Ia3 => "ia3",
            Self::Prompt => "prompt",
            Self::Prefix => "prefix",
            Self::Bottleneck => "bottleneck",
            Self::Full => "full",
        }
    }

    /// Returns the kind of a name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// How a fresh adapter is shaped.
#[derive(Debug, Clone, PartialEq)]
pub enum TunerSpec {
    /// LoRA, and DoRA.
    Lora(LoraSpec),
    /// (IA)3.
    Ia3(Ia3Spec),
    /// Prompt tuning.
    Prompt(PromptSpec),
    /// Prefix tuning.
    Prefix(PrefixSpec),
    /// Bottleneck adapters.
    Bottleneck(BottleneckSpec),
    /// Full fine-tuning.
    Full(FullSpec),
}

impl Default for TunerSpec {
    fn default() -> Self {
        Self::Lora(LoraSpec::default())
    }
}

impl From<LoraSpec> for TunerSpec {
    fn from(spec: LoraSpec) -> Self {
        Self::Lora(spec)
    }
}

impl From<Ia3Spec> for TunerSpec {
    fn from(spec: Ia3Spec) -> Self {
        Self::Ia3(spec)
    }
}

impl From<FullSpec> for TunerSpec {
    fn from(spec: FullSpec) -> Self {
        Self::Full(spec)
    }
}

/// What of the base full fine-tuning trains, and what becomes of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FullSpec {
    /// These linear layers alone; `None`: every tensor, the embedding, the head, norms and biases too.
    pub linear: Option<LinearLayers>,
    /// The rank of the LoRA that is made of the change and published; `None`: the trained model is kept, to be exported.
    pub extract_rank: Option<u32>,
}

/// Linear layers of the base's blocks.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LinearLayers {
    /// Sorted; empty is every linear layer that the base has.
    pub targets: Vec<Target>,
    /// Sorted; `None` is all.
    pub layers: Option<Vec<u32>>,
}

impl From<PromptSpec> for TunerSpec {
    fn from(spec: PromptSpec) -> Self {
        Self::Prompt(spec)
    }
}

impl From<PrefixSpec> for TunerSpec {
    fn from(spec: PrefixSpec) -> Self {
        Self::Prefix(spec)
    }
}

impl From<BottleneckSpec> for TunerSpec {
    fn from(spec: BottleneckSpec) -> Self {
        Self::Bottleneck(spec)
    }
}

/// How fresh bottleneck adapters are shaped: what a layer gives, plus `up act(down y + down_bias) + up_bias` of it.
#[derive(Debug, Clone, PartialEq)]
pub struct BottleneckSpec {
    /// Values between down and up.
    pub size: u32,
    /// Where in a block.
    pub placement: Placement,
    /// The non-linearity between down and up.
    pub non_linearity: NonLinearity,
    /// Sorted; `None` is all.
    pub layers: Option<Vec<u32>>,
}

impl Default for BottleneckSpec {
    fn default() -> Self {
        Self { size: 32, placement: Placement::FeedForward, non_linearity: NonLinearity::Silu, layers: None }
    }
}

/// Where bottleneck adapters are in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// Behind the feed-forward network (Pfeiffer et al. 2021).
    FeedForward,
    /// Behind attention, and behind the feed-forward network (Houlsby et al. 2019).
    Both,
}

/// What a bottleneck adapter's inner values go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NonLinearity {
    /// x * sigmoid(x).
    Silu,
    /// x * Phi(x), by its approximation with tanh.
    Gelu,
}

impl NonLinearity {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Silu, Self::Gelu];

    /// Returns its name: `silu` and so on.
    pub fn name(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::Gelu => "gelu",
        }
    }

    /// Returns the one of a name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|of| of.name() == name)
    }
}

/// How a fresh prompt of virtual tokens is shaped (Lester et al. 2021).
#[derive(Debug, Clone, PartialEq)]
pub struct PromptSpec {
    /// Tokens before the sequence.
    pub virtual_tokens: u32,
    /// What they begin as.
    pub init: VirtualInit,
}

/// How a fresh prefix of virtual tokens is shaped (Li & Liang 2021).
#[derive(Debug, Clone, PartialEq)]
pub struct PrefixSpec {
    /// Tokens before the sequence.
    pub virtual_tokens: u32,
    /// What they begin as; where they are reparametrised, random.
    pub init: VirtualInit,
    /// The inner width of the two layers through which the keys and values are trained; `None` trains them as they are.
    pub projection: Option<u32>,
}

/// Virtual tokens of a fresh adapter, unless it says how many.
const VIRTUAL_TOKENS: u32 = 16;

impl Default for PromptSpec {
    fn default() -> Self {
        Self { virtual_tokens: VIRTUAL_TOKENS, init: VirtualInit::Random }
    }
}

impl Default for PrefixSpec {
    fn default() -> Self {
        Self { virtual_tokens: VIRTUAL_TOKENS, init: VirtualInit::Random, projection: None }
    }
}

/// What virtual tokens begin as: what the base makes of real ones, repeated or cut to their number.
#[derive(Debug, Clone, PartialEq)]
pub enum VirtualInit {
    /// Tokens that the seed draws from the vocabulary.
    Random,
    /// The tokens of a text.
    Text(String),
    /// These tokens.
    Ids(Vec<u32>),
}

/// How a fresh (IA)3 is shaped.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ia3Spec {
    /// Sorted; empty is PEFT's choice, which is that of the paper: keys, values and `down_proj`, the last one's input.
    pub targets: Vec<Target>,
    /// Those of the targets of which the input is scaled and not the output; sorted.
    pub feedforward: Vec<Target>,
}

/// How a fresh LoRA is shaped.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraSpec {
    /// The inner dimension of B A.
    pub rank: u32,
    /// The scale is alpha / rank (or alpha / sqrt(rank)).
    pub alpha: f32,
    /// The share of the inputs that are dropped in training.
    pub dropout: f32,
    /// Sorted; empty is every linear layer that the base has.
    pub targets: Vec<Target>,
    /// Sorted; `None` is all.
    pub layers: Option<Vec<u32>>,
    /// Divides by the square root of the rank.
    pub use_rslora: bool,
    /// Gives each row a magnitude of its own (DoRA).
    pub use_dora: bool,
    /// Gives each pair a bias, which is added to B A x.
    pub lora_bias: bool,
    /// The tokens whose rows of the embedding, and of the head where that is the embedding, are trained; each once.
    pub trainable_token_indices: Vec<u32>,
    /// What a fresh pair is; of one that is there already, nothing.
    pub init: LoraInit,
}

/// How the pairs of a fresh LoRA start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LoraInit {
    /// A uniform in +-1/sqrt(in) (Kaiming with a = sqrt(5)), B zero.
    #[default]
    Default,
    /// A normal with standard deviation 1/rank, B zero.
    Gaussian,
    /// As the largest singular values of the base's weights (Meng et al. 2024).
    Pissa,
    /// As the beginning of the QR decomposition of the base's weights (Büyükakyüz 2024).
    Olora,
}

impl LoraInit {
    /// Whether the pair starts as a part of the base, which is taken out of the base while it is trained.
    pub fn is_of_base(self) -> bool {
        matches!(self, Self::Pissa | Self::Olora)
    }
}

impl Default for LoraSpec {
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 16.0,
            dropout: 0.0,
            targets: Vec::new(),
            layers: None,
            use_rslora: false,
            use_dora: false,
            lora_bias: false,
            trainable_token_indices: Vec::new(),
            init: LoraInit::Default,
        }
    }
}

/// Where a training begins.
#[derive(Debug, Clone, PartialEq)]
pub enum Start {
    /// With a new adapter that changes nothing yet.
    Fresh(TunerSpec),
    /// Resolved when the job was accepted.
    From(VersionName),
}

/// What a training minimises.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Objective {
    /// The mean negative log-probability of the tokens that are to be learnt.
    Sft,
    /// Sigmoid DPO.
    Dpo {
        /// How much a preference counts against moving away from the reference.
        beta: f32,
        /// The share of pairs that are taken to be labelled the wrong way round.
        label_smoothing: f32,
    },
}

/// How the learning rate changes after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LrSchedule {
    /// Falls to zero by half a cosine.
    Cosine,
    /// Falls to zero by a straight line.
    Linear,
    /// Stays.
    Constant,
}

/// AdamW and the batches it sees; all defaults filled in.
#[derive(Debug, Clone, PartialEq)]
pub struct Hyperparameters {
    /// The largest learning rate.
    pub learning_rate: f64,
    /// Passes over the records.
    pub epochs: u32,
    /// Over `epochs` where given.
    pub max_steps: Option<u32>,
    /// Records of a forward pass.
    pub batch_size: u32,
    /// Forward passes of an update.
    pub gradient_accumulation_steps: u32,
    /// `None`: 5 % of all steps.
    pub warmup_steps: Option<u32>,
    /// How the learning rate changes.
    pub schedule: LrSchedule,
    /// AdamW's decoupled decay.
    pub weight_decay: f64,
    /// AdamW's decay of the gradients' mean.
    pub beta1: f64,
    /// AdamW's decay of the squared gradients' mean.
    pub beta2: f64,
    /// AdamW's term against division by zero.
    pub epsilon: f64,
    /// 0 is off.
    pub max_grad_norm: f64,
    /// Of the adapter's first values, the order, the split and dropout.
    pub seed: u64,
    /// Takes the records in the dataset's order.
    pub sequential: bool,
    /// The share of the records that is held out.
    pub validation_split: f32,
    /// `None`: once an epoch.
    pub eval_steps: Option<u32>,
    /// Tokens. `None`: the least of the limit `max_record_tokens` and the base's context.
    pub max_length: Option<u32>,
    /// Which passes compute layers again in place of keeping what their backward needs.
    pub gradient_checkpointing: GradientCheckpointing,
    /// How AdamW remembers its moments.
    pub optimizer: Optimizer,
}

/// How AdamW keeps the two moments of each value.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Optimizer {
    /// In float32.
    #[default]
    AdamW,
    /// In eight bits, blockwise, as bitsandbytes does: a fourth of the memory.
    AdamW8Bit,
}

/// Which passes keep the inputs of some layers alone, and compute the rest again for the backward. No value changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum GradientCheckpointing {
    /// Those that would not fit the memory of a training.
    #[default]
    Auto,
    /// All.
    On,
    /// None.
    Off,
}

/// A training job as asked for, defaults filled in.
#[derive(Debug, Clone, PartialEq)]
pub struct JobSpec {
    /// Gets the new version.
    pub adapter: AdapterName,
    /// What it learns from.
    pub dataset: DatasetName,
    /// What it minimises.
    pub objective: Objective,
    /// Where it begins.
    pub start: Start,
    /// The recipe.
    pub hyperparameters: Hyperparameters,
    /// Whether its version becomes the live one.
    pub publish: Publish,
    /// What becomes of records that are too long.
    pub too_long: TooLong,
}

/// What becomes of records with more tokens than `max_length`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TooLong {
    /// The job is refused.
    #[default]
    Refuse,
    /// They are left out.
    Drop,
    /// They are cut at their end.
    Truncate,
}

/// Where a training job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum JobState {
    /// Waits for its turn.
    Queued,
    /// Is trained.
    Running,
    /// Was asked to pause.
    Pausing,
    /// Waits to be resumed.
    Paused,
    /// The server stopped meanwhile; it can be resumed.
    Interrupted,
    /// Its version is there.
    Succeeded,
    /// Ended with an error.
    Failed,
    /// Was asked to end.
    Cancelling,
    /// Ended because it was asked to.
    Cancelled,
}

impl JobState {
    /// The job will never take another step.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// As what a trained model is exported.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ModelFormat {
    /// A folder of `config.json` and safetensors.
    #[default]
    HuggingFace,
    /// One GGUF file.
    Gguf,
}

/// What a job trains on, known once its records have been read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TrainingData {
    /// Records that are trained on.
    pub records: u64,
    /// Records that are held out.
    pub validation_records: u64,
    /// Ids that all steps together see.
    pub tokens: u64,
    /// Records left out because they are too long.
    pub dropped: u64,
    /// Records cut to the longest length.
    pub truncated: u64,
}

/// What a training holds in memory, bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TrainingMemory {
    /// The adapter's values: as they begin, as they are, and as they last gave a loss that was a number.
    pub adapter: u64,
    /// Their gradients.
    pub gradients: u64,
    /// What the optimizer remembers of them, as far as it is in memory.
    pub optimizer: u64,
    /// What passes compute and keep.
    pub activations: u64,
}

impl TrainingMemory {
    /// Returns the sum.
    pub fn total(&self) -> u64 {
        let Self { adapter, gradients, optimizer, activations } = *self;
        adapter.saturating_add(gradients).saturating_add(optimizer).saturating_add(activations)
    }
}

/// How a training stays within the memory that it may take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryPlan {
    /// What it will hold at the most.
    pub memory: TrainingMemory,
    /// Whether some pass computes layers again.
    pub gradient_checkpointing: bool,
    /// Of the optimizer's state what lies in a file beside this memory; 0 where all is in memory.
    pub paged_optimizer: u64,
}

/// Names of what is measured beside the loss: those that TRL gives it.
pub mod metric {
    /// SFT: share of the tokens in the loss that are the most likely one in their place.
    pub const TOKEN_ACCURACY: &str = "mean_token_accuracy";
    /// DPO: mean of beta * (ln p(chosen) - ln p_ref(chosen)).
    pub const CHOSEN_REWARDS: &str = "rewards/chosen";
    /// DPO: the same of the rejected answers.
    pub const REJECTED_REWARDS: &str = "rewards/rejected";
    /// DPO: mean of the chosen answer's reward minus the rejected one's.
    pub const MARGINS: &str = "rewards/margins";
    /// DPO: share of the pairs with a positive margin.
    pub const ACCURACIES: &str = "rewards/accuracies";
    /// DPO: mean of ln p(chosen), summed over the answer's tokens.
    pub const CHOSEN_LOGPS: &str = "logps/chosen";
    /// Of a LoRA that was made of a full fine-tuning: the share of the change that it holds, as Frobenius norms. TRL has no name for it.
    pub const EXTRACTED_SHARE: &str = "extracted_share";
    /// DPO: the same of the rejected answers.
    pub const REJECTED_LOGPS: &str = "logps/rejected";
}

/// Something that happened to a job.
#[derive(Debug, Clone, PartialEq)]
pub enum JobEvent {
    /// The job is in another state.
    State {
        /// The new state.
        state: JobState,
        /// Why, where it failed.
        error: Option<String>,
        /// What it made, where it succeeded.
        version: Option<VersionName>,
        /// Whether that version is its adapter's live one.
        live: Option<bool>,
    },
    /// An update was made.
    Step {
        /// Its number, from 1.
        step: u32,
        /// Updates in all.
        total_steps: u32,
        /// The mean loss of the update's records.
        loss: f64,
        /// The learning rate of the update.
        learning_rate: f64,
        /// The gradients' norm before clipping.
        grad_norm: f64,
        /// Tokens of the update by its time.
        tokens_per_second: f64,
        /// What is left, at the pace so far.
        eta_seconds: f64,
        /// What is measured beside the loss, by TRL's names: `mean_token_accuracy`, or `rewards/margins` and so on.
        metrics: BTreeMap<String, f64>,
    },
    /// The records that are held out were evaluated.
    Evaluated {
        /// After this update.
        step: u32,
        /// Their mean loss.
        loss: f64,
        /// What else the objective measures, by name.
        metrics: BTreeMap<String, f64>,
    },
    /// The memory was planned, before the first update.
    MemoryPlan(MemoryPlan),
    /// What it has held at the most, after the last update.
    MemoryPeak(TrainingMemory),
    /// A line for people.
    Message(String),
}

/// What the parity gate measured; D is logp(adapter) - logp(base), nats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ParityReport {
    /// Tokens that were compared.
    pub tokens: u32,
    /// Mean |D_serve - D_train|.
    pub mean_abs_difference: f32,
    /// Mean |D_train|.
    pub mean_abs_effect: f32,
    /// The largest mean difference that passes. Nats.
    pub threshold: f32,
    /// Every effective delta is zero.
    pub no_effect: bool,
}
