//! PEFT folders: `adapter_config.json` and `adapter_model.safetensors`. Import is fail-closed: every tensor is consumed, every
//! setting that changes the meaning is supported or refused by name, and shapes are checked before anything is allocated.

use std::collections::BTreeMap;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use crate::adapter::packed::layer_bytes;
use crate::adapter::{BaseShape, Lora, LoraLayer, Site};
use crate::error::{Error, Result};
use crate::ids::Digest;
use crate::request::{LoraSpec, Target};

pub const CONFIG_FILE: &str = "adapter_config.json";
pub const TENSORS_FILE: &str = "adapter_model.safetensors";

/// Most bytes of `adapter_config.json`.
pub const MAX_CONFIG_BYTES: usize = 1 << 20;

/// An adapter as files. What is stored, exported and hashed.
#[derive(Debug, Clone, PartialEq)]
pub struct Package {
    /// `adapter_config.json`.
    pub config: Vec<u8>,
    /// `adapter_model.safetensors`; float32 as trained, or the dtype that was imported.
    pub tensors: Vec<u8>,
}

/// A refusal that names the tensor or field.
fn refuse(reason: &'static str, field: impl Into<String>, message: impl Into<String>) -> Error {
    Error::invalid_because(reason, field, message)
}

impl Package {
    /// The files of an adapter trained here, float32.
    pub fn from_lora(lora: &Lora, shape: &BaseShape) -> Result<Self> {
        let mut bytes = BTreeMap::new();
        for (site, layer) in &lora.layers {
            let (inputs, outputs) = shape.dims(site.target);
            let le = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
            bytes.insert(tensor_name(*site, "lora_A"), (vec![layer.rank, inputs], le(&layer.a)));
            bytes.insert(tensor_name(*site, "lora_B"), (vec![outputs, layer.rank], le(&layer.b)));
        }
        let views = bytes
            .iter()
            .map(|(name, (shape, bytes))| {
                Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(Error::internal)?))
            })
            .collect::<Result<Vec<_>>>()?;
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        let tensors = safetensors::serialize(views, Some(metadata)).map_err(Error::internal)?;
        let config = serde_json::to_vec_pretty(&config_json(lora, shape)).map_err(Error::internal)?;
        Ok(Self { config, tensors })
    }

    /// Checks everything and gives the adapter in float32. `max_rank` is the limit of that name.
    pub fn read(&self, shape: &BaseShape, max_rank: u64) -> Result<Lora> {
        let settings = Settings::read(&self.config)?;
        let spec = settings.spec();
        let layers = self.pairs(&settings, shape, max_rank)?.into_iter().map(|(site, [a, b])| {
            let (rank, alpha) = (settings.rank(site), settings.alpha(site));
            let a = values(&tensor_name(site, "lora_A"), &a)?;
            let b = values(&tensor_name(site, "lora_B"), &b)?;
            Ok((site, LoraLayer { rank: rank as usize, alpha, scale: spec.scale(alpha, rank), a, b }))
        });
        Ok(Lora { layers: layers.collect::<Result<_>>()?, spec })
    }

    /// Checks everything but the values; gives the bytes that the adapter takes where it serves.
    pub fn memory_bytes(&self, shape: &BaseShape, max_rank: u64) -> Result<u64> {
        let settings = Settings::read(&self.config)?;
        let sites = self.pairs(&settings, shape, max_rank)?.into_keys();
        Ok(sites.map(|site| layer_bytes(settings.rank(site) as usize, shape.dims(site.target))).sum())
    }

    /// A and B of every site that the settings select, each of its shape, and no tensor beside them.
    fn pairs(
        &self,
        settings: &Settings,
        shape: &BaseShape,
        max_rank: u64,
    ) -> Result<BTreeMap<Site, [TensorView<'_>; 2]>> {
        settings.check_ranks(max_rank)?;
        let mut found: BTreeMap<Site, [Option<TensorView<'_>>; 2]> = BTreeMap::new();
        for (name, view) in self.sorted_tensors()? {
            let (site, which) = parse_name(&name, shape)?;
            let (inputs, outputs) = shape.dims(site.target);
            let rank = settings.rank(site) as usize;
            let want = if which == 0 { [rank, inputs] } else { [outputs, rank] };
            if view.shape() != want {
                let message =
                    format!("has shape {:?}; for this base and the config's rank it must be {want:?}", view.shape());
                return Err(refuse("SHAPE_MISMATCH", name, message));
            }
            found.entry(site).or_default()[which] = Some(view);
        }
        let pairs = settings.spec().sites(shape)?.into_iter().map(|site| match found.remove(&site) {
            Some([Some(a), Some(b)]) => Ok((site, [a, b])),
            Some([a, _]) => Err(missing(site, if a.is_some() { "lora_B" } else { "lora_A" })),
            None => Err(missing(site, "lora_A")),
        });
        let pairs = pairs.collect::<Result<_>>()?;
        match found.keys().next() {
            Some(site) => {
                let message = "is not selected by target_modules and layers_to_transform of the config";
                Err(refuse("EXTRA_TENSOR", tensor_name(*site, "lora_A"), message))
            }
            None => Ok(pairs),
        }
    }

    /// By name, so that of several faults it is always the same one that is named.
    fn sorted_tensors(&self) -> Result<BTreeMap<String, TensorView<'_>>> {
        let tensors = SafeTensors::deserialize(&self.tensors).map_err(|e| {
            refuse("MALFORMED_SAFETENSORS", TENSORS_FILE, format!("is truncated or not a safetensors file: {e}"))
        })?;
        Ok(tensors.tensors().into_iter().collect())
    }

    /// Over the sorted (name, dtype, shape, bytes) and the settings that change their meaning; not over JSON text.
    pub fn digest(&self) -> Result<Digest> {
        let mut hasher = Sha256::new();
        let mut field = |bytes: &[u8]| {
            hasher.update((bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        field(b"tenora lora 2");
        field(Settings::read(&self.config)?.canonical().as_bytes());
        for (name, view) in self.sorted_tensors()? {
            field(name.as_bytes());
            field(format!("{:?} {:?}", view.dtype(), view.shape()).as_bytes());
            field(view.data());
        }
        Ok(hasher.into())
    }
}

fn missing(site: Site, which: &str) -> Error {
    refuse("MISSING_TENSOR", tensor_name(site, which), "is missing from adapter_model.safetensors")
}

/// PEFT's name of a tensor.
fn tensor_name(site: Site, which: &str) -> String {
    format!("base_model.model.{}.{which}.weight", module_name(site))
}

fn module_name(site: Site) -> String {
    let part = match site.target {
        Target::QProj | Target::KProj | Target::VProj | Target::OProj => "self_attn",
        Target::GateProj | Target::UpProj | Target::DownProj => "mlp",
    };
    format!("model.layers.{}.{part}.{}", site.layer, site.target.name())
}

/// The site of a tensor, and 0 for A or 1 for B.
fn parse_name(name: &str, shape: &BaseShape) -> Result<(Site, usize)> {
    let unknown = || {
        let shown: String = name.chars().take(200).collect();
        refuse(
            "EXTRA_TENSOR",
            shown,
            "is no lora_A or lora_B of a linear layer of this base; nothing may be left unapplied",
        )
    };
    let parts: Vec<&str> = name.split('.').collect();
    let ["base_model", "model", "model", "layers", layer, _, target, which, "weight"] = parts[..] else {
        return Err(unknown());
    };
    let which = ["lora_A", "lora_B"].iter().position(|w| *w == which).ok_or_else(unknown)?;
    let target = Target::from_name(target).ok_or_else(unknown)?;
    let site = Site { layer: layer.parse().map_err(|_| unknown())?, target };
    if site.layer >= shape.layers || tensor_name(site, parts[7]) != name {
        return Err(unknown());
    }
    Ok((site, which))
}

/// Float32 values of a tensor; NaN and infinity are refused.
fn values(name: &str, view: &TensorView<'_>) -> Result<Vec<f32>> {
    let data = view.data();
    let values: Vec<f32> = match view.dtype() {
        Dtype::F32 => data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => data.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => data.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
        other => return Err(refuse("UNSUPPORTED_DTYPE", name, format!("is {other:?}; F32, F16 and BF16 can be read"))),
    };
    match values.iter().position(|x| !x.is_finite()) {
        Some(at) => Err(refuse("NOT_FINITE", name, format!("holds {} at element {at}", values[at]))),
        None => Ok(values),
    }
}

/// What `adapter_config.json` says that changes the meaning of the tensors.
#[derive(Debug)]
struct Settings {
    rank: u32,
    alpha: f32,
    dropout: f32,
    targets: Vec<Target>,
    layers: Option<Vec<u32>>,
    use_rslora: bool,
    rank_pattern: Pattern,
    alpha_pattern: Pattern,
}

/// Values by module name, in the order of the file: the first that matches counts.
type Pattern = Vec<(String, f64)>;

/// Settings that matter only while training or describe where the adapter comes from.
const WITHOUT_MEANING: [&str; 8] = [
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
];

/// Initialisations that leave the base as it is. Others (PiSSA, OLoRA, CorDA, LoftQ) change it: their files mean something only on the
/// changed base.
const INITIALISATIONS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// Settings that the fields of [`Settings`] are read from, or that are checked beside them.
const READ: [&str; 11] = [
    "peft_type",
    "init_lora_weights",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "layers_to_transform",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "bias",
];

impl Settings {
    fn read(config: &[u8]) -> Result<Self> {
        let malformed =
            |e: &dyn std::fmt::Display| refuse("MALFORMED_CONFIG", CONFIG_FILE, format!("is not a JSON object: {e}"));
        if config.len() > MAX_CONFIG_BYTES {
            return Err(refuse("MALFORMED_CONFIG", CONFIG_FILE, format!("is over {MAX_CONFIG_BYTES} bytes")));
        }
        let config: Map<String, Value> = serde_json::from_slice(config).map_err(|e| malformed(&e))?;
        for (key, value) in &config {
            let known = READ.contains(&key.as_str()) || WITHOUT_MEANING.contains(&key.as_str());
            if !known && !is_off(value) {
                let shown: String = value.to_string().chars().take(100).collect();
                return Err(refuse("UNSUPPORTED_SETTING", key, format!("is {shown}; this setting is not supported")));
            }
        }
        let number = |value: &Value| value.as_f64().filter(|x| x.is_finite());
        let bias = setting(&config, "bias", "a string", Value::as_str)?.unwrap_or("none");
        if bias != "none" {
            return Err(refuse("UNSUPPORTED_SETTING", "bias", format!("is {bias:?}; only \"none\" is supported")));
        }
        match config.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            other => {
                let message = format!("is {other:?}; \"LORA\" adapters can be imported");
                return Err(refuse("UNSUPPORTED_SETTING", "peft_type", message));
            }
        }
        if let Some(Value::String(init)) = config.get("init_lora_weights")
            && !INITIALISATIONS.contains(&init.as_str())
        {
            let message =
                format!("is {init:?}, which changes the base; convert the adapter to plain LoRA when saving it");
            return Err(refuse("UNSUPPORTED_SETTING", "init_lora_weights", message));
        }
        let whole = |value: &Value| value.as_u64().and_then(|r| u32::try_from(r).ok()).filter(|r| *r > 0);
        let missing = |key: &str| refuse("INVALID_SETTING", key, "is missing");
        let rank = setting(&config, "r", "a whole number of at least 1", whole)?;
        let alpha = setting(&config, "lora_alpha", "a number", number)?;
        Ok(Self {
            rank: rank.ok_or_else(|| missing("r"))?,
            alpha: alpha.ok_or_else(|| missing("lora_alpha"))? as f32,
            dropout: setting(&config, "lora_dropout", "a number", number)?.unwrap_or(0.0) as f32,
            targets: targets(config.get("target_modules"))?,
            layers: layers(config.get("layers_to_transform"))?,
            use_rslora: setting(&config, "use_rslora", "true or false", Value::as_bool)?.unwrap_or(false),
            rank_pattern: pattern("rank_pattern", config.get("rank_pattern"))?,
            alpha_pattern: pattern("alpha_pattern", config.get("alpha_pattern"))?,
        })
    }

    fn spec(&self) -> LoraSpec {
        LoraSpec {
            rank: self.rank,
            alpha: self.alpha,
            dropout: self.dropout,
            targets: self.targets.clone(),
            layers: self.layers.clone(),
            use_rslora: self.use_rslora,
        }
    }

    fn check_ranks(&self, max_rank: u64) -> Result<()> {
        let patterned = self.rank_pattern.iter().map(|(key, rank)| (format!("rank_pattern.{key}"), *rank));
        for (field, rank) in patterned.chain([("r".to_owned(), f64::from(self.rank))]) {
            if rank < 1.0 || rank.fract() != 0.0 {
                return Err(refuse("INVALID_SETTING", field, "must be a whole number of at least 1"));
            }
            if rank > max_rank as f64 {
                return Err(refuse(
                    "RANK_TOO_LARGE",
                    field,
                    format!("is {rank}, over the limit max_rank of {max_rank}"),
                ));
            }
        }
        Ok(())
    }

    fn rank(&self, site: Site) -> u32 {
        lookup(&self.rank_pattern, site).map_or(self.rank, |rank| rank as u32)
    }

    fn alpha(&self, site: Site) -> f32 {
        lookup(&self.alpha_pattern, site).map_or(self.alpha, |alpha| alpha as f32)
    }

    /// A text that is equal for equal meanings.
    fn canonical(&self) -> String {
        let names: Vec<_> = self.targets.iter().map(|t| t.name()).collect();
        let object = |pattern: &Pattern| pattern.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
        let (ranks, alphas): (Map<_, _>, Map<_, _>) = (object(&self.rank_pattern), object(&self.alpha_pattern));
        // Dropout means something to a job that continues from it.
        json!([self.rank, self.alpha, self.dropout, names, self.layers, self.use_rslora, ranks, alphas]).to_string()
    }
}

/// What a setting says, `None` where it says nothing; a value of another type is refused, never taken for the default.
fn setting<'v, T>(
    config: &'v Map<String, Value>,
    key: &str,
    want: &str,
    read: impl Fn(&'v Value) -> Option<T>,
) -> Result<Option<T>> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            read(value).map(Some).ok_or_else(|| refuse("INVALID_SETTING", key, format!("is {value}; must be {want}")))
        }
    }
}

/// PEFT's matching for patterns that are plain module names: the first one that is the whole name, or its end after a dot. A dot in
/// one stands for any character, as it does in the regular expression that PEFT makes of it.
fn lookup(pattern: &Pattern, site: Site) -> Option<f64> {
    let name = module_name(site);
    let matches = |key: &str| {
        let Some((head, tail)) = name.len().checked_sub(key.len()).map(|at| name.split_at(at)) else { return false };
        let is_end = tail.bytes().zip(key.bytes()).all(|(c, k)| k == b'.' || k == c);
        is_end && (head.is_empty() || head.ends_with('.'))
    };
    pattern.iter().find(|(key, _)| matches(key)).map(|(_, value)| *value)
}

/// Whether an unread setting has the value that turns it off.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

fn targets(value: Option<&Value>) -> Result<Vec<Target>> {
    let field = "target_modules";
    let mut targets = match value {
        Some(Value::String(all)) if all == "all-linear" => Target::ALL.to_vec(),
        Some(Value::Array(names)) => {
            let target = |name: &Value| {
                name.as_str().and_then(Target::from_name).ok_or_else(|| {
                    let known = Target::ALL.map(Target::name).join(", ");
                    refuse("UNSUPPORTED_SETTING", field, format!("holds {name}; the linear layers are {known}"))
                })
            };
            names.iter().map(target).collect::<Result<Vec<_>>>()?
        }
        _ => return Err(refuse("UNSUPPORTED_SETTING", field, "must be a list of module names or \"all-linear\"")),
    };
    targets.sort_unstable();
    targets.dedup();
    Ok(targets)
}

fn layers(value: Option<&Value>) -> Result<Option<Vec<u32>>> {
    let wrong = || refuse("INVALID_SETTING", "layers_to_transform", "must be a list of layer numbers");
    let number = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok()).ok_or_else(wrong);
    let mut layers = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(list)) => list.iter().map(number).collect::<Result<Vec<_>>>()?,
        Some(one) => vec![number(one)?],
    };
    layers.sort_unstable();
    layers.dedup();
    Ok(Some(layers))
}

/// Keys are regular expressions in PEFT; those that are plain names can be read.
fn pattern(field: &str, value: Option<&Value>) -> Result<Pattern> {
    let Some(Value::Object(map)) = value else {
        return match value {
            None | Some(Value::Null) => Ok(Pattern::new()),
            Some(_) => Err(refuse("INVALID_SETTING", field, "must be an object")),
        };
    };
    let entry = |(key, value): (&String, &Value)| {
        let field = format!("{field}.{key}");
        if !key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.') || key.is_empty() {
            return Err(refuse(
                "UNSUPPORTED_SETTING",
                field,
                "is a regular expression; plain module names are supported",
            ));
        }
        match value.as_f64().filter(|x| x.is_finite()) {
            Some(number) => Ok((key.clone(), number)),
            None => Err(refuse("INVALID_SETTING", field, "must be a number")),
        }
    };
    map.iter().map(entry).collect()
}

/// The config of an adapter trained here, in PEFT's words. Layers with a rank or alpha of their own keep it: a continued adapter is
/// published as it was trained.
fn config_json(lora: &Lora, shape: &BaseShape) -> Value {
    let spec = &lora.spec;
    let own = |value: &dyn Fn(&LoraLayer) -> Option<Value>| -> Map<String, Value> {
        lora.layers.iter().filter_map(|(site, layer)| Some((module_name(*site), value(layer)?))).collect()
    };
    let ranks = own(&|layer| (layer.rank != spec.rank as usize).then(|| json!(layer.rank)));
    let alphas = own(&|layer| (layer.alpha != spec.alpha).then(|| json!(layer.alpha)));
    json!({
        "alpha_pattern": alphas,
        "auto_mapping": null,
        "base_model_name_or_path": shape.name,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": spec.layers,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": ranks,
        "revision": null,
        "target_modules": spec.targets.iter().map(|t| t.name()).collect::<Vec<_>>(),
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": spec.use_rslora,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(extra: Value) -> Result<Settings> {
        let mut config = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]});
        for (key, value) in extra.as_object().unwrap() {
            config[key] = value.clone();
        }
        Settings::read(config.to_string().as_bytes())
    }

    #[test]
    fn a_setting_of_another_type_is_never_taken_for_its_default() {
        for (key, value) in [
            ("use_rslora", json!("yes")),
            ("use_rslora", json!(1)),
            ("bias", json!(true)),
            ("lora_dropout", json!("0.1")),
            ("lora_alpha", json!("8")),
            ("r", json!(4.5)),
            ("r", json!(0)),
            ("rank_pattern", json!([1])),
        ] {
            match settings(json!({ key: value })) {
                Err(Error::Invalid { field, .. }) => assert_eq!(field, key),
                other => panic!("{key} {value}: {other:?}"),
            }
        }
        assert!(!settings(json!({"use_rslora": null, "bias": "none"})).unwrap().use_rslora);
    }

    #[test]
    fn initialisations_that_change_the_base_are_refused() {
        for plain in [json!(true), json!(false), json!(null), json!("gaussian"), json!("eva")] {
            assert!(settings(json!({ "init_lora_weights": plain })).is_ok(), "{plain}");
        }
        for changing in ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "something_new"] {
            let refused = settings(json!({ "init_lora_weights": changing }));
            assert!(matches!(refused, Err(Error::Invalid { field, .. }) if field == "init_lora_weights"), "{changing}");
        }
    }

    /// What a job continues from is what it publishes, ranks and scales of single layers included.
    #[test]
    fn files_give_back_the_adapter_they_were_made_from() {
        let dims = [(8, 8), (8, 4), (8, 4), (8, 8), (8, 16), (8, 16), (16, 8)];
        let shape = BaseShape { name: "base".into(), digest: Digest::of(b""), layers: 2, dims };
        let spec = LoraSpec { rank: 4, targets: vec![Target::QProj, Target::DownProj], ..LoraSpec::default() };
        let mut lora = Lora::fresh(&spec, &shape, 1).unwrap();
        for (i, (site, layer)) in lora.layers.iter_mut().enumerate().skip(1) {
            let (inputs, outputs) = shape.dims(site.target);
            layer.rank = 2 + i;
            layer.alpha = 0.1 + i as f32;
            layer.scale = spec.scale(layer.alpha, layer.rank as u32);
            (layer.a, layer.b) = (vec![0.5; layer.rank * inputs], vec![i as f32; layer.rank * outputs]);
        }
        let package = Package::from_lora(&lora, &shape).unwrap();
        assert_eq!(package.read(&shape, 8).unwrap(), lora);
        let again = Package::from_lora(&package.read(&shape, 8).unwrap(), &shape).unwrap();
        assert_eq!(again.digest().unwrap(), package.digest().unwrap());
    }

    #[test]
    fn patterns_match_as_in_peft() {
        let site = |layer, target| Site { layer, target };
        let read = settings(json!({
            "alpha_pattern": {"v_proj": 1, "layers.0.self_attn.v_proj": 2, "1.self_attn.q.proj": 3, "proj": 4},
            "rank_pattern": {"model.layers.1.self_attn.q_proj": 16},
        }))
        .unwrap();
        assert_eq!(read.alpha(site(0, Target::VProj)), 1.0, "the first in the file counts");
        assert_eq!(read.alpha(site(1, Target::QProj)), 3.0, "a dot is any character");
        assert_eq!(read.alpha(site(11, Target::QProj)), 8.0, "a name begins after a dot");
        assert_eq!((read.rank(site(1, Target::QProj)), read.rank(site(0, Target::QProj))), (16, 4));
        assert!(settings(json!({"rank_pattern": {".*q_proj": 2}})).is_err());
    }
}
