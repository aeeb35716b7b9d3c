//! PEFT's `LoraConfig`: LoRA, rank-stabilised LoRA, DoRA.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use crate::adapter::peft::config::{Known, setting};
use crate::adapter::peft::selection::{Pattern, Selection, module_name};
use crate::adapter::peft::tensors::token_module;
use crate::adapter::peft::{Selected, SiteTensors, refuse};
use crate::adapter::{BaseShape, Site};
use crate::arch::decoder::Slot;
use crate::error::Result;
use crate::request::{LoraInit, LoraSpec, Target};

/// The settings of a LoRA.
const KNOWN: Known = Known {
    read: &[
        "init_lora_weights",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "lora_bias",
        "trainable_token_indices",
    ],
    without_meaning: &[
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "velora_config",
    ],
    refused: &[
        ("use_qalora", "QALoRA is not served: train again without use_qalora"),
        ("use_bdlora", "BD-LoRA is not served: train again without use_bdlora"),
        ("alora_invocation_tokens", "activated LoRA is not served: train again without alora_invocation_tokens"),
        ("arrow_config", "Arrow routing is not served: import its adapters one by one"),
        ("kasa_config", "KaSA changes the base: train again without kasa_config"),
        ("monteclora_config", "MonteCLoRA is not served: train again without monteclora_config"),
        ("layer_replication", "the base's layers are served as they are: train again without layer_replication"),
        ("target_parameters", "only linear layers are adapted: train again with target_modules"),
        ("megatron_config", "train again without Megatron's layers"),
        (
            "modules_to_save",
            "all adapters share the base's embedding and head: train again with trainable_token_indices for the tokens that need rows of their \
             own, or make another base by full fine-tuning",
        ),
    ],
};

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

/// Biases of the base's layers that are trained beside the pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bias {
    None,
    /// Those of the layers that have a pair.
    Adapted,
    All,
}

impl Bias {
    const ALL: [Self; 3] = [Self::None, Self::Adapted, Self::All];

    /// PEFT's word.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Adapted => "lora_only",
            Self::All => "all",
        }
    }

    fn read(config: &Map<String, Value>) -> Result<Self> {
        let read = |value: &Value| Self::ALL.into_iter().find(|bias| value.as_str() == Some(bias.name()));
        Ok(setting(config, "bias", "\"none\", \"lora_only\" or \"all\"", read)?.unwrap_or(Self::None))
    }
}

/// A config that is read.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) rank: u32,
    alpha: f32,
    dropout: f32,
    use_rslora: bool,
    use_dora: bool,
    lora_bias: bool,
    /// Which of the base's own biases the files have values for.
    pub(super) bias: Bias,
    /// The tokens of which the files have rows, in their order.
    tokens: BTreeMap<Slot, Vec<u32>>,
    /// `None` where the base stayed as it was.
    pub(super) initialisation: Option<Initialisation>,
    selection: Selection,
    rank_pattern: Pattern,
    alpha_pattern: Pattern,
    /// The settings that select modules, as the file has them.
    selecting: Value,
}

impl Settings {
    pub(super) fn read(config: &Map<String, Value>) -> Result<Self> {
        KNOWN.check(config)?;
        let initialisation = initialisation(config.get("init_lora_weights"))?;
        let number = |value: &Value| value.as_f64().filter(|x| x.is_finite());
        let whole = |value: &Value| value.as_u64().and_then(|r| u32::try_from(r).ok()).filter(|r| *r > 0);
        let missing = |key: &str| refuse("INVALID_SETTING", key, "is missing; it is in every config that PEFT writes");
        let rank = setting(config, "r", "a whole number of at least 1", whole)?;
        let alpha = setting(config, "lora_alpha", "a number", number)?;
        let dropout = |value: &Value| number(value).filter(|x| (0.0..1.0).contains(x));
        let selecting = ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"];
        Ok(Self {
            rank: rank.ok_or_else(|| missing("r"))?,
            alpha: alpha.ok_or_else(|| missing("lora_alpha"))? as f32,
            dropout: setting(config, "lora_dropout", "a number in [0, 1)", dropout)?.unwrap_or(0.0) as f32,
            use_rslora: setting(config, "use_rslora", "true or false", Value::as_bool)?.unwrap_or(false),
            use_dora: setting(config, "use_dora", "true or false", Value::as_bool)?.unwrap_or(false),
            lora_bias: lora_bias(config)?,
            bias: Bias::read(config)?,
            tokens: tokens(config)?,
            initialisation,
            selection: Selection::read(config)?,
            rank_pattern: Pattern::read("rank_pattern", config)?,
            alpha_pattern: Pattern::read("alpha_pattern", config)?,
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

    /// Refuses more tokens than the limit of the name.
    pub(super) fn check_tokens(&self, most: u64) -> Result<()> {
        match self.tokens.values().map(Vec::len).find(|count| *count as u64 > most) {
            Some(count) => {
                let message = format!(
                    "has {count} tokens, over the limit max_trained_tokens of {most}; train fewer, or ask the operator for a higher limit"
                );
                Err(refuse("TOO_MANY_TRAINED_TOKENS", TOKENS, message))
            }
            None => Ok(()),
        }
    }

    /// The tokens that there are rows of, each once and in the vocabulary. Of a head that is the embedding there are none by themselves.
    pub(super) fn tokens(&self, shape: &BaseShape) -> Result<BTreeMap<Slot, &[u32]>> {
        let mut all: BTreeMap<Slot, &[u32]> = self.tokens.iter().map(|(slot, ids)| (*slot, &ids[..])).collect();
        for ids in all.values() {
            if let Some(id) = ids.iter().find(|id| **id as usize >= shape.vocab_size) {
                let message = format!(
                    "has token {id}; this base has {}, counted from 0: import the adapter on a server that runs the base it was trained on",
                    shape.vocab_size
                );
                return Err(refuse("INVALID_SETTING", TOKENS, message));
            }
        }
        if !shape.own_head
            && let Some(of_head) = all.remove(&Slot::Head)
            && all.get(&Slot::Embedding) != Some(&of_head)
        {
            let message = "names tokens of lm_head, which is the embedding in this base: name them under embed_tokens, and train again";
            return Err(refuse("UNSUPPORTED_SETTING", TOKENS, message));
        }
        Ok(all)
    }

    /// The sites that the config selects, where the names of the base's modules begin with `root`.
    pub(super) fn selected(&self, root: &str, shape: &BaseShape) -> Result<Vec<Selected>> {
        let own = |site: Site| {
            let name = module_name(root, site);
            let rank = self.rank_pattern.get(&name)?.map_or(self.rank, |rank| rank as u32);
            let alpha = self.alpha_pattern.get(&name)?.map_or(self.alpha, |alpha| alpha as f32);
            let scale = self.scale(alpha, rank);
            Ok(Selected {
                site,
                tensors: SiteTensors::Pair {
                    rank: rank as usize,
                    alpha,
                    scale,
                    magnitude: self.use_dora,
                    bias: self.lora_bias,
                },
            })
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
            use_dora: self.use_dora,
            lora_bias: self.lora_bias,
            trainable_token_indices: self.tokens.get(&Slot::Embedding).cloned().unwrap_or_default(),
            init: LoraInit::Default,
        }
    }

    fn scale(&self, alpha: f32, rank: u32) -> f32 {
        LoraSpec { use_rslora: self.use_rslora, ..LoraSpec::default() }.scale(alpha, rank)
    }

    /// Gives a text that is equal for equal settings. What selects modules is in it as targets and layers where it says no more than that.
    pub(super) fn canonical(&self) -> String {
        let object = |pattern: &Pattern| pattern.entries().map(|(key, value)| (key.to_owned(), json!(value))).collect();
        let (ranks, alphas): (Map<_, _>, Map<_, _>) = (object(&self.rank_pattern), object(&self.alpha_pattern));
        // Dropout means something to a job that continues from it.
        let of = |targets: Value, layers: Value| {
            let mut all = json!([self.rank, self.alpha, self.dropout, targets, layers, self.use_rslora, ranks, alphas]);
            // Digests of LoRAs are older than DoRA, biases and tokens. Which of the base's biases are trained the tensors' names say.
            if let Some(all) = all.as_array_mut() {
                all.extend((!self.tokens.is_empty()).then(|| tokens_json(self.tokens.iter())));
                let said = [(self.use_dora, "dora"), (self.lora_bias, "lora_bias")];
                all.extend(said.into_iter().filter(|(is_set, _)| *is_set).map(|(_, name)| name.into()));
            }
            all.to_string()
        };
        match self.selection.plain() {
            Some((targets, layers)) => of(targets.iter().map(|t| t.name()).collect(), json!(layers)),
            None => of(self.selecting.clone(), Value::Null),
        }
    }
}

/// The setting that names tokens.
const TOKENS: &str = "trainable_token_indices";

/// Reads the tokens of which there are rows: of the embedding, or of what a key names.
fn tokens(config: &Map<String, Value>) -> Result<BTreeMap<Slot, Vec<u32>>> {
    let wrong = |value: &Value| {
        let shown: String = value.to_string().chars().take(100).collect();
        let message = format!("is {shown}; must be a list of token ids, each once, or such lists by module");
        refuse("INVALID_SETTING", TOKENS, message)
    };
    let ids = |value: &Value| {
        let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids: Option<Vec<u32>> = value.as_array().and_then(|ids| ids.iter().map(id).collect());
        let ids = ids.filter(|ids| ids.iter().collect::<BTreeSet<_>>().len() == ids.len());
        ids.ok_or_else(|| wrong(value))
    };
    let slot = |name: &String| {
        let module = name.rsplit('.').next().unwrap_or_default();
        let slot = [Slot::Embedding, Slot::Head].into_iter().find(|slot| token_module(*slot) == module);
        slot.ok_or_else(|| {
            let name: String = name.chars().take(100).collect();
            let message = format!("names {name}; rows of embed_tokens and lm_head are served: train again with these");
            refuse("UNSUPPORTED_SETTING", TOKENS, message)
        })
    };
    let mut all = BTreeMap::new();
    match config.get(TOKENS) {
        None | Some(Value::Null) => {}
        Some(Value::Object(by_module)) => {
            for (name, value) in by_module {
                if all.insert(slot(name)?, ids(value)?).is_some() {
                    return Err(wrong(&config[TOKENS]));
                }
            }
        }
        Some(value) => drop(all.insert(Slot::Embedding, ids(value)?)),
    }
    all.retain(|_, ids| !ids.is_empty());
    Ok(all)
}

/// The setting that names these tokens, in PEFT's words.
pub(super) fn tokens_json<'t>(tokens: impl Iterator<Item = (&'t Slot, &'t Vec<u32>)>) -> Value {
    let all: BTreeMap<Slot, &Vec<u32>> = tokens.map(|(slot, ids)| (*slot, ids)).collect();
    match all.get(&Slot::Embedding) {
        _ if all.is_empty() => Value::Null,
        Some(ids) if all.len() == 1 => json!(ids),
        _ => all.iter().map(|(slot, ids)| (token_module(*slot).to_owned(), json!(ids))).collect::<Map<_, _>>().into(),
    }
}

/// Reads whether pairs have a bias. PEFT opens such an adapter where it is no DoRA and has no initialisation of a name.
fn lora_bias(config: &Map<String, Value>) -> Result<bool> {
    let has = setting(config, "lora_bias", "true or false", Value::as_bool)?.unwrap_or(false);
    let is_named = matches!(config.get("init_lora_weights"), Some(Value::String(_)));
    if has && (is_named || config.get("use_dora") == Some(&Value::Bool(true))) {
        let message = "cannot be true beside use_dora, nor beside an init_lora_weights but true or false (PEFT refuses it too); train again \
                       without one of them";
        return Err(refuse("INVALID_SETTING", "lora_bias", message));
    }
    Ok(has)
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
