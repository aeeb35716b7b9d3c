//! What `adapter_config.json` says that changes the meaning of the tensors. Every setting is one of four: it is read, it says nothing about
//! the tensors, it has the value that turns it off, or it is refused by name.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::adapter::format::{CONFIG_FILE, MAX_CONFIG_BYTES, refuse};
use crate::adapter::selection::{Pattern, Selection, module_name};
use crate::adapter::tensors::check_no_pointer;
use crate::adapter::{BaseShape, Site};
use crate::error::Result;
use crate::request::{LoraSpec, Target};

/// Settings that are about the training, or about where the adapter comes from.
const WITHOUT_MEANING: [&str; 16] = [
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    // Of a layer that stores its weight transposed; PEFT takes it for false at the base's layers.
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
    "velora_config",
];

/// Settings that are read.
const READ: [&str; 13] = [
    "peft_type",
    "init_lora_weights",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "bias",
];

/// Settings that change what the tensors mean, and what helps.
const REFUSED: [(&str, &str); 13] = [
    ("use_dora", "DoRA is not served: merge the adapter into its base, or train it again without use_dora"),
    ("use_qalora", "QALoRA is not served: train again without use_qalora"),
    ("use_bdlora", "BD-LoRA is not served: train again without use_bdlora"),
    ("lora_bias", "biases are not served: train again with lora_bias false"),
    ("alora_invocation_tokens", "activated LoRA is not served: train again without alora_invocation_tokens"),
    ("arrow_config", "Arrow routing is not served: import its adapters one by one"),
    ("kasa_config", "KaSA changes the base: train again without kasa_config"),
    ("monteclora_config", "MonteCLoRA is not served: train again without monteclora_config"),
    ("layer_replication", "the base's layers are served as they are: train again without layer_replication"),
    ("target_parameters", "only linear layers are adapted: train again with target_modules"),
    (
        "trainable_token_indices",
        "the embedding is served as the base has it: train again without trainable_token_indices",
    ),
    ("megatron_config", "train again without Megatron's layers"),
    ("modules_to_save", "whole layers are served as the base has them: train again with modules_to_save empty"),
];

/// PEFT's initialisations that leave the base as it is where PEFT loads the adapter. LoftQ's base is the same base in fewer bits, as every base
/// here is; what its adapter makes up for is a part of what was trained.
const OF_NO_BASE: [&str; 5] = ["gaussian", "eva", "orthogonal", "loftq", "mica"];

/// What makes an adapter a plain one that began as a part of its base.
pub const CONVERSION: &str = "save the adapter again with PEFT's save_pretrained and path_initial_model_for_weight_conversion, which makes it a plain one";

/// Initialisations that take a part out of the base, which PEFT takes out again where it loads the adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Initialisation {
    /// The adapter began as the largest singular values of the base.
    Pissa,
    /// The adapter began as what a search that draws random numbers found instead of them (`pissa_niter_N`): another part each time.
    PissaSearched,
    /// The adapter began as the first columns of the base's QR decomposition.
    Olora,
    /// The adapter began as directions of the base that data chose.
    Corda,
}

/// A config that is read.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) rank: u32,
    alpha: f32,
    dropout: f32,
    use_rslora: bool,
    /// `None` where the base stayed as it was.
    pub(super) initialisation: Option<Initialisation>,
    /// What the base is called; it is no part of what the adapter is.
    pub(super) base: Option<String>,
    selection: Selection,
    rank_pattern: Pattern,
    alpha_pattern: Pattern,
    /// The settings that select modules, as the file has them.
    selecting: Value,
}

/// A site with its own rank and alpha.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Selected {
    pub(super) site: Site,
    pub(super) rank: u32,
    pub(super) alpha: f32,
}

impl Settings {
    pub(super) fn read(config: &[u8]) -> Result<Self> {
        let config = object(config)?;
        check_kind(&config)?;
        check_known(&config)?;
        let initialisation = initialisation(config.get("init_lora_weights"))?;
        let number = |value: &Value| value.as_f64().filter(|x| x.is_finite());
        let whole = |value: &Value| value.as_u64().and_then(|r| u32::try_from(r).ok()).filter(|r| *r > 0);
        let missing = |key: &str| refuse("INVALID_SETTING", key, "is missing; it is in every config that PEFT writes");
        let rank = setting(&config, "r", "a whole number of at least 1", whole)?;
        let alpha = setting(&config, "lora_alpha", "a number", number)?;
        let dropout = |value: &Value| number(value).filter(|x| (0.0..1.0).contains(x));
        let selecting = ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"];
        Ok(Self {
            rank: rank.ok_or_else(|| missing("r"))?,
            alpha: alpha.ok_or_else(|| missing("lora_alpha"))? as f32,
            dropout: setting(&config, "lora_dropout", "a number in [0, 1)", dropout)?.unwrap_or(0.0) as f32,
            use_rslora: setting(&config, "use_rslora", "true or false", Value::as_bool)?.unwrap_or(false),
            initialisation,
            base: config.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned),
            selection: Selection::read(&config)?,
            rank_pattern: Pattern::read("rank_pattern", &config)?,
            alpha_pattern: Pattern::read("alpha_pattern", &config)?,
            selecting: selecting.iter().map(|key| config.get(*key).cloned().unwrap_or_default()).collect(),
        })
    }

    /// Refuses ranks that are none, and those over the limit of the name.
    pub(super) fn check_ranks(&self, max_rank: u64) -> Result<()> {
        let patterned = self.rank_pattern.entries().map(|(key, rank)| (format!("rank_pattern.{key}"), rank));
        for (field, rank) in patterned.chain([("r".to_owned(), f64::from(self.rank))]) {
            if rank < 1.0 || rank.fract() != 0.0 || rank > f64::from(u32::MAX) {
                return Err(refuse(
                    "INVALID_SETTING",
                    field,
                    format!("is {rank}; must be a whole number of at least 1"),
                ));
            }
            if rank > max_rank as f64 {
                let message = format!(
                    "is {rank}, over the limit max_rank of {max_rank}; train with a lower rank, or ask the operator for a higher limit"
                );
                return Err(refuse("RANK_TOO_LARGE", field, message));
            }
        }
        Ok(())
    }

    /// The sites that the config selects, where the names of the base's modules begin with `root`.
    pub(super) fn selected(&self, root: &str, shape: &BaseShape) -> Result<Vec<Selected>> {
        let own = |site: Site| {
            let name = module_name(root, site);
            let rank = self.rank_pattern.get(&name)?.map_or(self.rank, |rank| rank as u32);
            let alpha = self.alpha_pattern.get(&name)?.map_or(self.alpha, |alpha| alpha as f32);
            Ok(Selected { site, rank, alpha })
        };
        self.selection.sites(root, shape)?.into_iter().map(own).collect()
    }

    /// How a fresh adapter would be shaped to have these sites; of what no such shape has, the targets and the layers that occur.
    pub(super) fn spec(&self, sites: &[Selected], shape: &BaseShape) -> LoraSpec {
        let targets: BTreeSet<Target> = sites.iter().map(|selected| selected.site.target).collect();
        let layers = match self.selection.plain() {
            Some((_, layers)) => layers.clone(),
            None => {
                let layers: BTreeSet<u32> = sites.iter().map(|selected| selected.site.layer).collect();
                (layers.len() < shape.layers as usize).then(|| layers.into_iter().collect())
            }
        };
        LoraSpec {
            rank: self.rank,
            alpha: self.alpha,
            dropout: self.dropout,
            targets: targets.into_iter().collect(),
            layers,
            use_rslora: self.use_rslora,
        }
    }

    /// Gives a text that is equal for equal settings. What selects modules is in it as targets and layers where it says no more than that.
    pub(super) fn canonical(&self) -> String {
        let object = |pattern: &Pattern| pattern.entries().map(|(key, value)| (key.to_owned(), json!(value))).collect();
        let (ranks, alphas): (Map<_, _>, Map<_, _>) = (object(&self.rank_pattern), object(&self.alpha_pattern));
        // Dropout means something to a job that continues from it.
        let of = |targets: Value, layers: Value| {
            json!([self.rank, self.alpha, self.dropout, targets, layers, self.use_rslora, ranks, alphas]).to_string()
        };
        match self.selection.plain() {
            Some((targets, layers)) => of(targets.iter().map(|t| t.name()).collect(), json!(layers)),
            None => of(self.selecting.clone(), Value::Null),
        }
    }
}

fn object(config: &[u8]) -> Result<Map<String, Value>> {
    check_no_pointer(CONFIG_FILE, config)?;
    if config.len() > MAX_CONFIG_BYTES {
        let message = format!("is over {MAX_CONFIG_BYTES} bytes; send the config that PEFT wrote beside the tensors");
        return Err(refuse("MALFORMED_CONFIG", CONFIG_FILE, message));
    }
    // Some editors begin a file with it.
    let config = config.strip_prefix(b"\xef\xbb\xbf").unwrap_or(config);
    serde_json::from_slice(config).map_err(|e| {
        let message = format!("is not a JSON object ({e}); send the config that PEFT wrote beside the tensors");
        refuse("MALFORMED_CONFIG", CONFIG_FILE, message)
    })
}

/// Refuses what is no LoRA adapter, whatever else its config says: another kind's settings mean nothing here.
fn check_kind(config: &Map<String, Value>) -> Result<()> {
    let kind = match config.get("peft_type") {
        Some(Value::String(kind)) if kind == "LORA" => return Ok(()),
        Some(Value::String(kind)) => kind,
        Some(Value::Null) | None => {
            let message =
                "is missing: this is not the config of an adapter; send the adapter_config.json that PEFT wrote";
            return Err(refuse("UNSUPPORTED_SETTING", "peft_type", message));
        }
        Some(other) => {
            let message = format!("is {other}; must be \"LORA\": send the adapter_config.json that PEFT wrote");
            return Err(refuse("UNSUPPORTED_SETTING", "peft_type", message));
        }
    };
    let kind: String = kind.chars().take(64).collect();
    let message = format!(
        "is {kind:?}; adapters of kind \"LORA\" are served: train it again with LoraConfig, or merge it into its base where its kind can be merged"
    );
    Err(refuse("UNSUPPORTED_SETTING", "peft_type", message))
}

fn check_known(config: &Map<String, Value>) -> Result<()> {
    for (key, value) in config {
        let known = READ.contains(&key.as_str()) || WITHOUT_MEANING.contains(&key.as_str());
        if known || is_off(value) {
            continue;
        }
        let value: String = value.to_string().chars().take(100).collect();
        let unknown = "this setting is not known, and could change what the tensors mean: remove it from the config if it does not";
        let advice = REFUSED.iter().find(|(name, _)| name == key).map_or(unknown, |(_, advice)| advice);
        return Err(refuse(
            "UNSUPPORTED_SETTING",
            key.chars().take(100).collect::<String>(),
            format!("is {value}; {advice}"),
        ));
    }
    match setting(config, "bias", "a text", Value::as_str)? {
        None | Some("none") => Ok(()),
        Some(other) => {
            let message = format!("is {other:?}; biases are not served: train again with bias \"none\"");
            Err(refuse("UNSUPPORTED_SETTING", "bias", message))
        }
    }
}

/// Reads the initialisation. One that PEFT does not have is refused: it could change what the tensors mean.
fn initialisation(value: Option<&Value>) -> Result<Option<Initialisation>> {
    let name = match value {
        None | Some(Value::Null | Value::Bool(_)) => return Ok(None),
        Some(Value::String(name)) => name.to_ascii_lowercase(),
        Some(other) => other.to_string(),
    };
    let refused = |why: &str| {
        let name: String = name.chars().take(100).collect();
        Err(refuse("UNSUPPORTED_SETTING", "init_lora_weights", format!("is {name}, {why}")))
    };
    let rounds = |rounds: &str| !rounds.is_empty() && rounds.bytes().all(|b| b.is_ascii_digit());
    match name.as_str() {
        "pissa" => Ok(Some(Initialisation::Pissa)),
        "olora" => Ok(Some(Initialisation::Olora)),
        "corda" => Ok(Some(Initialisation::Corda)),
        name if name.strip_prefix("pissa_niter_").is_some_and(rounds) => Ok(Some(Initialisation::PissaSearched)),
        name if OF_NO_BASE.contains(&name) => Ok(None),
        "lora_ga" => refused(&format!("which changes the base by gradients that are not in the files; {CONVERSION}")),
        _ => refused(
            "which is no initialisation that is known; set it to true if the tensors are those of a plain LoRA adapter",
        ),
    }
}

/// Gives what a setting says, `None` where it says nothing; a value of another type is refused, never taken for the default.
fn setting<'v, T>(
    config: &'v Map<String, Value>,
    key: &str,
    want: &str,
    read: impl Fn(&'v Value) -> Option<T>,
) -> Result<Option<T>> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            let shown: String = value.to_string().chars().take(100).collect();
            read(value).map(Some).ok_or_else(|| refuse("INVALID_SETTING", key, format!("is {shown}; must be {want}")))
        }
    }
}

/// Whether a setting has the value that turns it off.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}
