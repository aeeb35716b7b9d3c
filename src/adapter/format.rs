//! PEFT folders: `adapter_config.json` and `adapter_model.safetensors`. Import is fail-closed: every tensor is consumed, every
//! setting that changes the meaning is supported or refused by name, and shapes are checked before anything is allocated. Every refusal
//! ends with what to do.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, View};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use crate::adapter::packed::adapter_bytes;
use crate::adapter::selection::module_name;
use crate::adapter::settings::{Initialisation, Selected, Settings};
use crate::adapter::tensors::{self, Tensors, tensor_name, values};
use crate::adapter::{BaseShape, Lora, LoraLayer, Site};
use crate::error::{Error, Result};
use crate::ids::Digest;
use crate::request::Target;

pub use crate::adapter::tensors::{check_beginning, most_file_bytes};

/// The name of the file of an adapter's settings, as PEFT writes it.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The name of the file of an adapter's tensors, as PEFT writes it.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";

/// Most bytes of `adapter_config.json`.
pub const MAX_CONFIG_BYTES: usize = 1 << 20;

/// An adapter as files. What is stored, exported and hashed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Package {
    /// `adapter_config.json`.
    pub config: Vec<u8>,
    /// `adapter_model.safetensors`; float32 as trained, or the dtype that was imported.
    pub tensors: Vec<u8>,
}

/// What is known of files that fit the base, before their values are looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckedPackage {
    /// Bytes that the adapter takes where it serves.
    pub memory_bytes: u64,
    /// The largest of its sites.
    pub rank: u32,
    /// How the adapter began, where that took a part out of the base.
    pub initialisation: Option<Initialisation>,
    /// What its files call the base.
    pub base: Option<String>,
    /// See [`Package::digest`].
    pub digest: Digest,
}

/// A refusal that names the tensor or field.
pub(super) fn refuse(reason: &'static str, field: impl Into<String>, message: impl Into<String>) -> Error {
    Error::invalid_because(reason, field, message)
}

/// An adapter whose files fit the base: checked but for the values, which are in the files still.
struct Fitted<'a> {
    settings: Settings,
    selected: Vec<Selected>,
    /// A and B of each that is selected, with their names.
    pairs: Vec<[(String, TensorView<'a>); 2]>,
}

impl<'a> Fitted<'a> {
    /// Checks that the files hold A and B of every site that the settings select, each of its shape, and no tensor beside them.
    fn new(package: &'a Package, shape: &BaseShape, max_rank: u64) -> Result<Self> {
        let settings = Settings::read(&package.config)?;
        settings.check_ranks(max_rank)?;
        let mut found = Tensors::read(&package.tensors, shape)?;
        let selected = selected(&settings, &found, shape)?;
        if selected.is_empty() {
            let message = format!(
                "selects no module of this base; its linear layers are {}: import the adapter on a server that runs the base it was \
                 trained on",
                shape.target_names()
            );
            return Err(refuse("UNSUPPORTED_SETTING", "target_modules", message));
        }
        let pairs = selected.iter().map(|selected| match found.by_site.remove(&selected.site) {
            Some([Some(a), Some(b)]) => pair(*selected, a, b, shape),
            Some([a, _]) => Err(missing(selected.site, if a.is_some() { "lora_B" } else { "lora_A" })),
            None => Err(missing(selected.site, "lora_A")),
        });
        let pairs = pairs.collect::<Result<_>>()?;
        match found.by_site.values().flatten().flatten().next() {
            Some((name, _)) => {
                let message = "is not selected by target_modules and what restricts it in the config: the config is of another adapter; \
                               send the one that was saved with these tensors";
                Err(refuse("EXTRA_TENSOR", name, message))
            }
            None => Ok(Self { settings, selected, pairs }),
        }
    }
}

/// What the config selects under the names that the file's tensors have; where that is nothing, under the base's names with its head or
/// without.
fn selected(settings: &Settings, found: &Tensors<'_>, shape: &BaseShape) -> Result<Vec<Selected>> {
    let selected = settings.selected(found.root, shape)?;
    if !selected.is_empty() {
        return Ok(selected);
    }
    settings.selected(if found.root.is_empty() { "model." } else { "" }, shape)
}

/// A and B of a site, of the shapes they must have.
fn pair<'a>(
    Selected { site, rank, .. }: Selected,
    a: (String, TensorView<'a>),
    b: (String, TensorView<'a>),
    shape: &BaseShape,
) -> Result<[(String, TensorView<'a>); 2]> {
    let (inputs, outputs) = shape.dims(site.target).unwrap_or_default();
    let rank = rank as usize;
    for ((name, view), want) in [(&a, [rank, inputs]), (&b, [outputs, rank])] {
        if view.shape().contains(&0) {
            let message = "is empty: its values were on other devices when it was saved (ZeRO-3, FSDP); gather the parameters before \
                           save_pretrained, and save it again";
            return Err(refuse("SHAPE_MISMATCH", name, message));
        }
        if view.shape() != want {
            let message = format!(
                "has shape {:?}; for this base and the config's rank it must be {want:?}: import it on a server that runs the base it was \
                 trained on, with the config that was saved with it",
                view.shape()
            );
            return Err(refuse("SHAPE_MISMATCH", name, message));
        }
    }
    Ok([a, b])
}

/// A tensor that becomes bytes when it is written, one after the other.
struct Floats<'a> {
    shape: Vec<usize>,
    values: &'a [f32],
}

impl View for Floats<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    fn data_len(&self) -> usize {
        size_of_val(self.values)
    }
}

impl Package {
    /// The files of an adapter trained here, float32.
    pub fn from_lora(lora: &Lora, shape: &BaseShape) -> Result<Self> {
        let mut views = BTreeMap::new();
        for (site, layer) in &lora.layers {
            let (inputs, outputs) = (layer.a.len() / layer.rank, layer.b.len() / layer.rank);
            views.insert(tensor_name(*site, "lora_A"), Floats { shape: vec![layer.rank, inputs], values: &layer.a });
            views.insert(tensor_name(*site, "lora_B"), Floats { shape: vec![outputs, layer.rank], values: &layer.b });
        }
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        let tensors = safetensors::serialize(views, Some(metadata)).map_err(Error::internal)?;
        let config = serde_json::to_vec_pretty(&config_json(lora, shape)).map_err(Error::internal)?;
        Ok(Self { config, tensors })
    }

    /// Checks everything and gives the adapter in float32. `max_rank` is the limit of that name.
    pub fn read(&self, shape: &BaseShape, max_rank: u64) -> Result<Lora> {
        let Fitted { settings, selected, pairs } = Fitted::new(self, shape, max_rank)?;
        let spec = settings.spec(&selected, shape);
        let layers =
            selected.iter().zip(&pairs).map(|(&Selected { site, rank, alpha }, [(a_name, a), (b_name, b)])| {
                let (a, b) = (values(a_name, a)?, values(b_name, b)?);
                Ok((site, LoraLayer { rank: rank as usize, alpha, scale: spec.scale(alpha, rank), a, b }))
            });
        Ok(Lora { layers: layers.collect::<Result<_>>()?, spec })
    }

    /// Checks everything but the values. `max_rank` is the limit of that name.
    pub fn check(&self, shape: &BaseShape, max_rank: u64) -> Result<CheckedPackage> {
        let Fitted { settings, selected, .. } = Fitted::new(self, shape, max_rank)?;
        Ok(CheckedPackage {
            memory_bytes: adapter_bytes(selected.iter().map(|of| (of.site, of.rank as usize)), shape),
            rank: selected.iter().map(|of| of.rank).max().unwrap_or_default(),
            initialisation: settings.initialisation,
            base: settings.base.clone(),
            digest: self.digest_of(&settings)?,
        })
    }

    /// Says in the config what the base is called, by which other tools load it. That is no part of what the adapter is.
    pub fn name_base(&mut self, name: &str) -> Result<()> {
        let mut config: Map<String, Value> = serde_json::from_slice(&self.config).map_err(Error::internal)?;
        config.insert("base_model_name_or_path".to_owned(), name.into());
        self.config = serde_json::to_vec_pretty(&config).map_err(Error::internal)?;
        Ok(())
    }

    /// Over the sorted (name, dtype, shape, bytes) and the settings that change their meaning; not over JSON text.
    pub fn digest(&self) -> Result<Digest> {
        self.digest_of(&Settings::read(&self.config)?)
    }

    fn digest_of(&self, settings: &Settings) -> Result<Digest> {
        let mut hasher = Sha256::new();
        let mut field = |bytes: &[u8]| {
            hasher.update((bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        field(b"tenora lora 2");
        field(settings.canonical().as_bytes());
        let sorted: BTreeMap<_, _> = tensors::open(&self.tensors)?.tensors().into_iter().collect();
        for (name, view) in sorted {
            field(name.as_bytes());
            field(format!("{:?} {:?}", view.dtype(), view.shape()).as_bytes());
            field(view.data());
        }
        Ok(hasher.into())
    }
}

fn missing(site: Site, which: &str) -> Error {
    let message = "is missing from adapter_model.safetensors, though the config selects its module; send the tensors and the config that were \
                   saved together";
    refuse("MISSING_TENSOR", tensor_name(site, which), message)
}

/// What selects exactly the adapter's sites, in PEFT's words: the names of the layers and their numbers where that can say it, else the
/// modules' whole names.
fn selecting(lora: &Lora, shape: &BaseShape) -> (Vec<String>, Option<Vec<u32>>) {
    let targets: BTreeSet<Target> = lora.layers.keys().map(|site| site.target).collect();
    let layers: BTreeSet<u32> = lora.layers.keys().map(|site| site.layer).collect();
    if lora.layers.len() == targets.len() * layers.len() {
        let all = layers.len() == shape.layers as usize;
        let named = lora.spec.layers.is_some();
        let names = targets.iter().map(|target| target.name().to_owned()).collect();
        (names, (!all || named).then(|| layers.into_iter().collect()))
    } else {
        (lora.layers.keys().map(|site| module_name("model.", *site)).collect(), None)
    }
}

/// The config of an adapter trained here, in PEFT's words. Layers with a rank or alpha of their own keep it: a continued adapter is
/// published as it was trained.
fn config_json(lora: &Lora, shape: &BaseShape) -> Value {
    let spec = &lora.spec;
    let (targets, layers) = selecting(lora, shape);
    let own = |value: &dyn Fn(&LoraLayer) -> Option<Value>| -> Map<String, Value> {
        lora.layers.iter().filter_map(|(site, layer)| Some((module_name("model.", *site), value(layer)?))).collect()
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
        "layers_to_transform": layers,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": ranks,
        "revision": null,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": spec.use_rslora,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::LoraSpec;

    fn shape() -> BaseShape {
        let dims = [(8, 8), (8, 4), (8, 4), (8, 8), (8, 16), (8, 16), (16, 8)];
        BaseShape::llama("base", Digest::of(b""), 2, dims)
    }

    /// What a job continues from is what it publishes, ranks and scales of single layers included.
    #[test]
    fn files_give_back_the_adapter_they_were_made_from() {
        let shape = shape();
        let spec = LoraSpec { rank: 4, targets: vec![Target::QProj, Target::DownProj], ..LoraSpec::default() };
        let mut lora = Lora::fresh(&spec, &shape, 1).unwrap();
        for (i, (site, layer)) in lora.layers.iter_mut().enumerate().skip(1) {
            let (inputs, outputs) = shape.dims(site.target).unwrap();
            layer.rank = 2 + i;
            layer.alpha = 0.1 + i as f32;
            layer.scale = spec.scale(layer.alpha, layer.rank as u32);
            (layer.a, layer.b) = (vec![0.5; layer.rank * inputs], vec![i as f32; layer.rank * outputs]);
        }
        let package = Package::from_lora(&lora, &shape).unwrap();
        assert_eq!(package.read(&shape, 8).unwrap(), lora);
        let mut again = Package::from_lora(&package.read(&shape, 8).unwrap(), &shape).unwrap();
        assert_eq!(again.digest().unwrap(), package.digest().unwrap());
        again.name_base("owner/model").unwrap();
        let config: Value = serde_json::from_slice(&again.config).unwrap();
        assert_eq!(
            (&config["base_model_name_or_path"], &config["task_type"]),
            (&json!("owner/model"), &json!("CAUSAL_LM"))
        );
        assert_eq!(again.digest().unwrap(), package.digest().unwrap(), "what the base is called is no part of it");
    }

    /// An adapter of sites that no list of targets and layers selects is published as what it is.
    #[test]
    fn sites_that_are_no_grid_are_named_one_by_one() {
        let shape = shape();
        let mut lora = Lora::fresh(&LoraSpec { rank: 2, ..LoraSpec::default() }, &shape, 1).unwrap();
        lora.layers.retain(|site, _| (site.layer == 0) == (site.target == Target::VProj));
        let read = Package::from_lora(&lora, &shape).unwrap().read(&shape, 8).unwrap();
        assert_eq!(read.layers, lora.layers);
        let again = Package::from_lora(&read, &shape).unwrap();
        assert_eq!(again.read(&shape, 8).unwrap().layers, lora.layers);
    }

    /// Digests name what is stored, so what they are made of must stay as it was.
    #[test]
    fn what_digests_are_made_of_stays_as_it_was() {
        let lora = Lora::fresh(&LoraSpec { rank: 2, ..LoraSpec::default() }, &shape(), 1).unwrap();
        let package = Package::from_lora(&lora, &shape()).unwrap();
        let canonical = |extra: Value| {
            let mut config: Value = serde_json::from_slice(&package.config).unwrap();
            extra.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
            Settings::read(&serde_json::to_vec(&config).unwrap()).unwrap().canonical()
        };
        let all = r#"["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj","down_proj"]"#;
        let plain = format!("[2,16.0,0.0,{all},null,false,{{}},{{}}]");
        assert_eq!(canonical(json!({})), plain);
        assert_eq!(canonical(json!({"target_modules": "all-linear", "layers_to_transform": []})), plain);
        let some = json!({"target_modules": ["v_proj", "q_proj", "q_proj"], "layers_to_transform": [1, 0], "rank_pattern": {"v_proj": 4}});
        assert_eq!(canonical(some), r#"[2,16.0,0.0,["q_proj","v_proj"],[0,1],false,{"v_proj":4.0},{}]"#);
        let excluded = json!({"exclude_modules": ["o_proj"]});
        assert_ne!(canonical(excluded), plain, "what else selects is in it too");
    }
}
