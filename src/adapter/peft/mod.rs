//! PEFT folders: `adapter_config.json` and `adapter_model.safetensors`. Import is fail-closed: every tensor is consumed, every
//! setting that changes the meaning is supported or refused by name, and shapes are checked before anything is allocated. Every refusal
//! ends with what to do.
//!
//! A kind of file is a file here (`lora.rs`, `ia3.rs`, `virtual_tokens.rs`, `bottleneck.rs`): which settings it has, what they select, and what tensors there must
//! be. The rest is the same for all.

mod bottleneck;
mod config;
mod ia3;
pub(super) mod lora;
mod selection;
mod tensors;
mod virtual_tokens;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use safetensors::{Dtype, View};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use crate::adapter::packed::{Beside, Layout, adapter_bytes, with_biases};
use crate::adapter::{
    Adapter, BaseShape, Bottleneck, Initialisation, LowRank, ScaledSide, Site, SiteDelta, TokenRows, VirtualForm,
    VirtualTokens,
};
use crate::arch::decoder::Slot;
use crate::config::Limits;
use crate::error::{Error, Result};
use crate::ids::Digest;
use crate::request::{LoraSpec, NonLinearity, Target, TunerSpec};
use selection::module_name;
use tensors::{Named, Part, tensor_name, token_tensor_name, values};

pub use tensors::{check_beginning, most_file_bytes};

/// The name of the file of an adapter's settings, as PEFT writes it.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The name of the file of an adapter's tensors, as PEFT writes it.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";

/// Most bytes of `adapter_config.json`.
pub const MAX_CONFIG_BYTES: usize = 1 << 20;

/// The largest adapters that are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SizeLimits {
    /// The largest rank: limit `max_rank`.
    pub rank: u64,
    /// Most virtual tokens: limit `max_virtual_tokens`.
    pub virtual_tokens: u64,
    /// Most tokens with rows of their own: limit `max_trained_tokens`.
    pub trained_tokens: u64,
}

impl SizeLimits {
    /// For adapters that have been taken before.
    pub const NONE: Self = Self { rank: u64::MAX, virtual_tokens: u64::MAX, trained_tokens: u64::MAX };
}

impl From<&Limits> for SizeLimits {
    fn from(limits: &Limits) -> Self {
        let (virtual_tokens, trained_tokens) = (limits.max_virtual_tokens, limits.max_trained_tokens);
        Self { rank: limits.max_rank, virtual_tokens, trained_tokens }
    }
}

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

/// A site that a config selects, and what its tensors are.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Selected {
    site: Site,
    tensors: SiteTensors,
}

/// The tensors of a site.
#[derive(Debug, Clone, Copy, PartialEq)]
enum SiteTensors {
    /// A and B, a magnitude where it is a DoRA, and a bias.
    Pair { rank: usize, alpha: f32, scale: f32, magnitude: bool, bias: bool },
    /// What (IA)3 multiplies with.
    Scales(ScaledSide),
    /// Down, up and their biases.
    Bottleneck { size: usize, non_linearity: NonLinearity },
}

impl SiteTensors {
    /// What there must be, of which shape, at a layer of (in, out).
    fn parts(self, (inputs, outputs): (usize, usize)) -> Vec<(Part, Vec<usize>)> {
        match self {
            Self::Pair { rank, magnitude, bias, .. } => {
                let pair = [(Part::LoraA, vec![rank, inputs]), (Part::LoraB, vec![outputs, rank])];
                let vectors = [(magnitude, Part::Magnitude), (bias, Part::LoraBias)];
                let vectors = vectors.into_iter().filter(|(has, _)| *has).map(|(_, part)| (part, vec![outputs]));
                pair.into_iter().chain(vectors).collect()
            }
            Self::Scales(ScaledSide::Input) => vec![(Part::Ia3, vec![1, inputs])],
            Self::Scales(ScaledSide::Output) => vec![(Part::Ia3, vec![outputs, 1])],
            Self::Bottleneck { size, .. } => vec![
                (Part::Down, vec![size, outputs]),
                (Part::DownBias, vec![size]),
                (Part::Up, vec![outputs, size]),
                (Part::UpBias, vec![outputs]),
            ],
        }
    }

    /// What they do, of their values in the order of the parts.
    fn delta(self, mut values: impl Iterator<Item = Vec<f32>>) -> SiteDelta {
        let mut next = || values.next().unwrap_or_default();
        match self {
            Self::Pair { rank, alpha, scale, magnitude, bias } => {
                let (a, b) = (next(), next());
                let [magnitude, bias] = [magnitude, bias].map(|has| has.then(&mut next));
                SiteDelta::LowRank(LowRank { rank, alpha, scale, a, b, magnitude, bias })
            }
            Self::Scales(side) => SiteDelta::Scaled { side, values: next() },
            Self::Bottleneck { non_linearity, .. } => {
                let (down, down_bias, up, up_bias) = (next(), next(), next(), next());
                SiteDelta::Bottleneck(Bottleneck { non_linearity, down, down_bias, up, up_bias })
            }
        }
    }
}

impl Selected {
    fn layout(&self) -> (Site, Layout) {
        let layout = match self.tensors {
            SiteTensors::Pair { rank, scale, magnitude, bias, .. } => Layout::pair(rank, scale, magnitude, bias),
            SiteTensors::Scales(side) => Layout::scales(side),
            SiteTensors::Bottleneck { size, non_linearity } => Layout::bottleneck(size, non_linearity),
        };
        (self.site, layout)
    }

    /// 0 where there is no A and B.
    fn rank(&self) -> u32 {
        match self.tensors {
            SiteTensors::Pair { rank, .. } => rank as u32,
            SiteTensors::Scales(_) | SiteTensors::Bottleneck { .. } => 0,
        }
    }
}

/// A config of one of the kinds.
#[derive(Debug)]
struct Settings {
    kind: Kind,
    /// What the base is called; it is no part of what the adapter is.
    base: Option<String>,
}

#[derive(Debug)]
enum Kind {
    Lora(lora::Settings),
    Ia3(ia3::Settings),
    Virtual(virtual_tokens::Settings),
    Bottleneck(bottleneck::Settings),
}

/// Values of `peft_type` that are read.
const KINDS: &str = "\"LORA\", \"IA3\", \"PROMPT_TUNING\", \"PREFIX_TUNING\" and \"BOTTLENECK\"";

impl Settings {
    fn read(config: &[u8]) -> Result<Self> {
        let config = config::object(config)?;
        let of_tokens = |form| virtual_tokens::Settings::read(form, &config).map(Kind::Virtual);
        let kind = match config.get("peft_type") {
            Some(Value::String(kind)) if kind == "LORA" => Kind::Lora(lora::Settings::read(&config)?),
            Some(Value::String(kind)) if kind == "IA3" => Kind::Ia3(ia3::Settings::read(&config)?),
            Some(Value::String(kind)) if kind == "PROMPT_TUNING" => of_tokens(VirtualForm::Embeddings)?,
            Some(Value::String(kind)) if kind == "PREFIX_TUNING" => of_tokens(VirtualForm::KeysAndValues)?,
            Some(Value::String(kind)) if kind == "BOTTLENECK" => Kind::Bottleneck(bottleneck::Settings::read(&config)?),
            other => return Err(unserved_kind(other)),
        };
        let base = config.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned);
        Ok(Self { kind, base })
    }

    fn check_size(&self, limits: SizeLimits) -> Result<()> {
        match &self.kind {
            Kind::Lora(settings) => {
                settings.check_ranks(limits.rank)?;
                settings.check_tokens(limits.trained_tokens)
            }
            Kind::Ia3(_) => Ok(()),
            Kind::Virtual(settings) => settings.check_size(limits),
            Kind::Bottleneck(settings) => settings.check_size(limits.rank),
        }
    }

    fn initialisation(&self) -> Option<Initialisation> {
        match &self.kind {
            Kind::Lora(settings) => settings.initialisation,
            Kind::Ia3(_) | Kind::Virtual(_) | Kind::Bottleneck(_) => None,
        }
    }

    /// The sites that the config selects, where the names of the base's modules begin with `root`.
    fn selected(&self, root: &str, shape: &BaseShape) -> Result<Vec<Selected>> {
        match &self.kind {
            Kind::Lora(settings) => settings.selected(root, shape),
            Kind::Ia3(settings) => settings.selected(root, shape),
            Kind::Virtual(_) => Ok(Vec::new()),
            Kind::Bottleneck(settings) => settings.selected(root, shape),
        }
    }

    /// The layers whose own biases the adapter has values for, of those that the config selects or beside them.
    fn biased(&self, selected: &[Selected], shape: &BaseShape) -> Vec<Site> {
        let bias = match &self.kind {
            Kind::Lora(settings) => settings.bias,
            Kind::Ia3(_) | Kind::Virtual(_) | Kind::Bottleneck(_) => lora::Bias::None,
        };
        let is_selected = |site: &Site| selected.iter().any(|selected| selected.site == *site);
        let wanted = |site: &Site| match bias {
            lora::Bias::None => false,
            lora::Bias::Adapted => is_selected(site),
            lora::Bias::All => true,
        };
        shape.biased.iter().copied().filter(wanted).collect()
    }

    /// How a fresh adapter would be shaped to have these sites, about.
    fn spec(&self, selected: &[Selected], shape: &BaseShape) -> TunerSpec {
        match &self.kind {
            Kind::Lora(settings) => settings.spec(selected, shape).into(),
            Kind::Ia3(settings) => settings.spec(selected).into(),
            Kind::Virtual(settings) => settings.spec(),
            Kind::Bottleneck(settings) => settings.spec(selected, shape).into(),
        }
    }

    /// What a digest begins with, and a text that is equal for equal settings.
    fn canonical(&self) -> (&'static [u8], String) {
        match &self.kind {
            Kind::Lora(settings) => (b"tenora lora 2", settings.canonical()),
            Kind::Ia3(settings) => (b"tenora ia3 1", settings.canonical()),
            Kind::Bottleneck(settings) => (b"tenora bottleneck 1", settings.canonical()),
            Kind::Virtual(settings) => match settings.form {
                VirtualForm::Embeddings => (b"tenora prompt 1", settings.canonical()),
                VirtualForm::KeysAndValues => (b"tenora prefix 1", settings.canonical()),
            },
        }
    }
}

/// Refuses what is no kind of adapter that is served, whatever else its config says: another kind's settings mean nothing here.
fn unserved_kind(kind: Option<&Value>) -> Error {
    let message = match kind {
        None | Some(Value::Null) => {
            "is missing: this is not the config of an adapter; send the adapter_config.json that PEFT wrote".to_owned()
        }
        Some(Value::String(kind)) => {
            let kind: String = kind.chars().take(64).collect();
            format!(
                "is {kind:?}; adapters of the kinds {KINDS} are served: train it again with one of these, or merge it into its base where its \
                 kind can be merged"
            )
        }
        Some(other) => format!("is {other}; must be one of {KINDS}: send the adapter_config.json that PEFT wrote"),
    };
    refuse("UNSUPPORTED_SETTING", "peft_type", message)
}

/// An adapter whose files fit the base: checked but for the values, which are in the files still.
struct Fitted<'a> {
    settings: Settings,
    selected: Vec<Selected>,
    /// The tensors of each that is selected, in the order of its parts.
    found: Vec<Vec<Named<'a>>>,
    /// What takes the place of biases of the base.
    biases: Vec<(Site, Named<'a>)>,
    /// Rows of tokens: what they are rows of, the ids, and their tensor.
    tokens: Vec<(Slot, Vec<u32>, Named<'a>)>,
    /// What stands before a sequence: its form, how many, and their tensor.
    virtual_tokens: Option<(VirtualForm, usize, Named<'a>)>,
}

impl<'a> Fitted<'a> {
    /// Checks that the files hold all tensors of every site that the settings select, each of its shape, and no tensor beside them.
    fn new(package: &'a Package, shape: &BaseShape, limits: SizeLimits) -> Result<Self> {
        let settings = Settings::read(&package.config)?;
        settings.check_size(limits)?;
        if let Kind::Virtual(tokens) = &settings.kind {
            let virtual_tokens = Some((tokens.form, tokens.count, tokens.find(&package.tensors, shape)?));
            let (selected, found, biases, tokens) = Default::default();
            return Ok(Self { settings, selected, found, biases, tokens, virtual_tokens });
        }
        let mut found = tensors::Tensors::read(&package.tensors, shape)?;
        let selected = selected(&settings, &found, shape)?;
        if selected.is_empty() {
            let message = format!(
                "selects no module of this base; its linear layers are {}: import the adapter on a server that runs the base it was \
                 trained on",
                shape.target_names()
            );
            return Err(refuse("UNSUPPORTED_SETTING", "target_modules", message));
        }
        let mut take = |site: Site, part, want: &[usize]| {
            let found = found.by_site.get_mut(&site).and_then(|own| own.remove(&part));
            let found = found.ok_or_else(|| missing(&tensor_name(site, part)))?;
            check_shape(&found, want)?;
            Ok(found)
        };
        let mut of_site = |Selected { site, tensors }: &Selected| {
            let parts = tensors.parts(shape.dims(site.target).unwrap_or_default());
            parts.into_iter().map(|(part, want)| take(*site, part, &want)).collect::<Result<Vec<_>>>()
        };
        let of_sites = selected.iter().map(&mut of_site).collect::<Result<Vec<_>>>()?;
        let biases = settings.biased(&selected, shape).into_iter().map(|site| {
            let (_, outputs) = shape.dims(site.target).unwrap_or_default();
            let is_adapted = selected.iter().any(|selected| selected.site == site);
            Ok((site, take(site, bias_part(is_adapted), &[outputs])?))
        });
        let biases = biases.collect::<Result<Vec<_>>>()?;
        let wanted = match &settings.kind {
            Kind::Lora(settings) => settings.tokens(shape)?,
            Kind::Ia3(_) | Kind::Virtual(_) | Kind::Bottleneck(_) => BTreeMap::new(),
        };
        let tokens = wanted.into_iter().map(|(slot, ids)| {
            let rows = found.tokens.remove(&slot).ok_or_else(|| missing(&token_tensor_name(slot)))?;
            check_shape(&rows, &[ids.len(), shape.hidden_size])?;
            Ok((slot, ids.to_vec(), rows))
        });
        let tokens = tokens.collect::<Result<Vec<_>>>()?;
        if let Some((name, _)) = found.tokens.values().next() {
            let message = "has rows of tokens that the config's trainable_token_indices does not name: the config is of another adapter; send the \
                           one that was saved with these tensors";
            return Err(refuse("EXTRA_TENSOR", name, message));
        }
        match found.by_site.values().flatten().next() {
            Some((part, (name, _))) if part.is_of_base() => {
                let message = "is the bias of a layer that has none in this base, or that the config's bias leaves out: import it on a server \
                               that runs the base it was trained on, with the config that was saved with it";
                Err(refuse("EXTRA_TENSOR", name, message))
            }
            Some((_, (name, _))) => {
                let message = "is not selected by the config, or of another kind than it says: the config is of another adapter; send the one \
                               that was saved with these tensors";
                Err(refuse("EXTRA_TENSOR", name, message))
            }
            None => Ok(Self { settings, selected, found: of_sites, biases, tokens, virtual_tokens: None }),
        }
    }
}

/// What the config selects under the names that the file's tensors have; where that is nothing, under the base's names with its head or
/// without.
fn selected(settings: &Settings, found: &tensors::Tensors<'_>, shape: &BaseShape) -> Result<Vec<Selected>> {
    let selected = settings.selected(found.root, shape)?;
    if !selected.is_empty() {
        return Ok(selected);
    }
    settings.selected(if found.root.is_empty() { "model." } else { "" }, shape)
}

/// Refuses a tensor of another shape than it must have.
fn check_shape((name, view): &Named<'_>, want: &[usize]) -> Result<()> {
    if view.shape().contains(&0) {
        let message = "is empty: its values were on other devices when it was saved (ZeRO-3, FSDP); gather the parameters before \
                       save_pretrained, and save it again";
        return Err(refuse("SHAPE_MISMATCH", name, message));
    }
    if view.shape() != want {
        let message = format!(
            "has shape {:?}; for this base and the config it must be {want:?}: import it on a server that runs the base it was trained on, \
             with the config that was saved with it",
            view.shape()
        );
        return Err(refuse("SHAPE_MISMATCH", name, message));
    }
    Ok(())
}

/// A tensor that becomes bytes when it is written, one after the other.
struct Floats<'a> {
    shape: Vec<usize>,
    values: Cow<'a, [f32]>,
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
        size_of_val(&*self.values)
    }
}

impl Package {
    /// The files of an adapter trained here, float32.
    pub fn from_adapter(adapter: &Adapter, shape: &BaseShape) -> Result<Self> {
        let mut views = BTreeMap::new();
        for (site, delta) in &adapter.sites {
            let dims = shape.dims(site.target).unwrap_or_default();
            let parts = tensors_of(delta).parts(dims);
            for ((part, shape), values) in parts.into_iter().zip(delta.tensors()) {
                views.insert(tensor_name(*site, part), Floats { shape, values: values.into() });
            }
        }
        for (site, values) in adapter.biases(shape) {
            let name = tensor_name(site, bias_part(adapter.sites.contains_key(&site)));
            views.insert(name, Floats { shape: vec![values.len()], values: values.into() });
        }
        for (slot, TokenRows { ids, rows }) in &adapter.tokens {
            let shape = vec![ids.len(), shape.hidden_size];
            views.insert(token_tensor_name(*slot), Floats { shape, values: rows.into() });
        }
        if let Some(tokens) = &adapter.virtual_tokens {
            let shape = vec![tokens.count, tokens.form().width(shape)];
            views.insert(virtual_tokens::TENSOR.to_owned(), Floats { shape, values: tokens.folded() });
        }
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        let tensors = safetensors::serialize(views, Some(metadata)).map_err(Error::internal)?;
        let config = serde_json::to_vec_pretty(&config_json(adapter, shape)?).map_err(Error::internal)?;
        Ok(Self { config, tensors })
    }

    /// Checks everything and gives the adapter in float32.
    pub fn read(&self, shape: &BaseShape, limits: SizeLimits) -> Result<Adapter> {
        let Fitted { settings, selected, found, biases, tokens, virtual_tokens } = Fitted::new(self, shape, limits)?;
        let sites = selected.iter().zip(&found).map(|(selected, found)| {
            let values = found.iter().map(|(name, view)| values(name, view)).collect::<Result<Vec<_>>>()?;
            Ok((selected.site, selected.tensors.delta(values.into_iter())))
        });
        let sites = sites.collect::<Result<_>>()?;
        let virtual_tokens = match virtual_tokens {
            Some((form, count, (name, view))) => Some(VirtualTokens::of(form, count, values(&name, &view)?)),
            None => None,
        };
        let copies = biases.iter().map(|(site, (name, view))| {
            let id = shape.index(*site).ok_or_else(|| Error::internal("a bias is of no layer of the base"))?;
            Ok((Slot::Bias(id), values(name, view)?))
        });
        let copies = copies.collect::<Result<_>>()?;
        let tokens = tokens
            .into_iter()
            .map(|(slot, ids, (name, view))| Ok((slot, TokenRows { ids, rows: values(&name, &view)? })));
        let tokens = tokens.collect::<Result<_>>()?;
        let spec = settings.spec(&selected, shape);
        Ok(Adapter { spec, sites, virtual_tokens, copies, tokens })
    }

    /// Checks everything but the values.
    pub fn check(&self, shape: &BaseShape, limits: SizeLimits) -> Result<CheckedPackage> {
        let Fitted { settings, selected, biases, tokens, virtual_tokens, .. } = Fitted::new(self, shape, limits)?;
        let virtual_tokens = virtual_tokens.map(|(form, count, _)| (form, count));
        let count = |slot| tokens.iter().filter(|(of, ..)| *of == slot).map(|(_, ids, _)| ids.len()).sum();
        let beside = Beside { virtual_tokens, tokens: [Slot::Embedding, Slot::Head].map(count) };
        let layouts = with_biases(selected.iter().map(Selected::layout), biases.iter().map(|(site, _)| *site));
        Ok(CheckedPackage {
            memory_bytes: adapter_bytes(layouts, beside, shape),
            rank: selected.iter().map(Selected::rank).max().unwrap_or_default(),
            initialisation: settings.initialisation(),
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
        let (tag, canonical) = settings.canonical();
        field(tag);
        field(canonical.as_bytes());
        let sorted: BTreeMap<_, _> = tensors::open(&self.tensors)?.tensors().into_iter().collect();
        for (name, view) in sorted {
            field(name.as_bytes());
            field(format!("{:?} {:?}", view.dtype(), view.shape()).as_bytes());
            field(view.data());
        }
        Ok(hasher.into())
    }
}

/// What a site's tensors are in a file.
fn tensors_of(delta: &SiteDelta) -> SiteTensors {
    match delta {
        SiteDelta::LowRank(LowRank { rank, alpha, scale, magnitude, bias, .. }) => {
            let (magnitude, bias) = (magnitude.is_some(), bias.is_some());
            SiteTensors::Pair { rank: *rank, alpha: *alpha, scale: *scale, magnitude, bias }
        }
        SiteDelta::Scaled { side, .. } => SiteTensors::Scales(*side),
        SiteDelta::Bottleneck(bottleneck) => {
            SiteTensors::Bottleneck { size: bottleneck.size(), non_linearity: bottleneck.non_linearity }
        }
    }
}

/// What a layer's own bias is in a file.
fn bias_part(is_adapted: bool) -> Part {
    if is_adapted { Part::AdaptedBias } else { Part::OwnBias }
}

fn missing(name: &str) -> Error {
    let message = "is missing from adapter_model.safetensors, though the config selects its module; send the tensors and the config that were \
                   saved together";
    refuse("MISSING_TENSOR", name, message)
}

/// What selects exactly these sites, in PEFT's words: the names of the layers and, where those are not all or `name_layers`, their numbers,
/// where that can say it; else the modules' whole names.
fn selecting(sites: &[Site], name_layers: bool, shape: &BaseShape) -> (Vec<String>, Option<Vec<u32>>) {
    let targets: BTreeSet<Target> = sites.iter().map(|site| site.target).collect();
    let layers: BTreeSet<u32> = sites.iter().map(|site| site.layer).collect();
    if sites.len() == targets.len() * layers.len() {
        let all = layers.len() == shape.layers as usize;
        let names = targets.iter().map(|target| target.name().to_owned()).collect();
        (names, (!all || name_layers).then(|| layers.into_iter().collect()))
    } else {
        (whole_names(sites), None)
    }
}

fn whole_names(sites: &[Site]) -> Vec<String> {
    sites.iter().map(|site| module_name("model.", *site)).collect()
}

/// The config of an adapter trained here, in PEFT's words.
fn config_json(adapter: &Adapter, shape: &BaseShape) -> Result<Value> {
    match &adapter.spec {
        TunerSpec::Lora(spec) => Ok(lora_json(spec, adapter, shape)),
        TunerSpec::Ia3(_) => Ok(ia3_json(adapter, shape)),
        TunerSpec::Bottleneck(spec) => Ok(bottleneck::config_json(spec, adapter, shape)),
        TunerSpec::Prompt(_) | TunerSpec::Prefix(_) => Ok(match &adapter.virtual_tokens {
            Some(tokens) => virtual_tokens::config_json(tokens.form(), tokens.count, shape),
            None => Value::Null,
        }),
        TunerSpec::Full(_) => Err(Error::internal("copies of the base's tensors are no files of an adapter")),
    }
}

/// Layers with a rank or alpha of their own keep it: a continued adapter is published as it was trained.
fn lora_json(spec: &LoraSpec, adapter: &Adapter, shape: &BaseShape) -> Value {
    let sites: Vec<Site> = adapter.sites.keys().copied().collect();
    let (targets, layers) = selecting(&sites, spec.layers.is_some(), shape);
    let own = |value: &dyn Fn(&LowRank) -> Option<Value>| -> Map<String, Value> {
        adapter.pairs().filter_map(|(site, pair)| Some((module_name("model.", site), value(pair)?))).collect()
    };
    let is_adapted = |(site, _)| adapter.sites.contains_key(&site);
    let bias = match adapter.copies.is_empty() {
        true => lora::Bias::None,
        false if adapter.biases(shape).all(is_adapted) => lora::Bias::Adapted,
        false => lora::Bias::All,
    };
    let ranks = own(&|pair| (pair.rank != spec.rank as usize).then(|| json!(pair.rank)));
    let alphas = own(&|pair| (pair.alpha != spec.alpha).then(|| json!(pair.alpha)));
    json!({
        "alpha_pattern": alphas,
        "auto_mapping": null,
        "base_model_name_or_path": shape.name,
        "bias": bias.name(),
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": layers,
        "lora_alpha": spec.alpha,
        "lora_bias": spec.lora_bias,
        "lora_dropout": spec.dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": spec.rank,
        "rank_pattern": ranks,
        "revision": null,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": lora::tokens_json(adapter.tokens.iter().map(|(slot, tokens)| (slot, &tokens.ids))),
        "use_dora": spec.use_dora,
        "use_rslora": spec.use_rslora,
    })
}

/// Modules are named one by one where the adapter has some layers only: this kind has no setting for layers.
fn ia3_json(adapter: &Adapter, shape: &BaseShape) -> Value {
    let names = |wanted: &dyn Fn(&SiteDelta) -> bool| {
        let sites: Vec<Site> = adapter.sites.iter().filter(|(_, delta)| wanted(delta)).map(|(site, _)| *site).collect();
        match selecting(&sites, false, shape) {
            (targets, None) => targets,
            (_, Some(_)) => whole_names(&sites),
        }
    };
    let is_input = |delta: &SiteDelta| matches!(delta, SiteDelta::Scaled { side: ScaledSide::Input, .. });
    json!({
        "auto_mapping": null,
        "base_model_name_or_path": shape.name,
        "fan_in_fan_out": false,
        "feedforward_modules": names(&is_input),
        "inference_mode": true,
        "init_ia3_weights": true,
        "modules_to_save": null,
        "peft_type": "IA3",
        "revision": null,
        "target_modules": names(&|_| true),
        "task_type": "CAUSAL_LM",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{BottleneckSpec, Ia3Spec, LoraSpec, Placement, PrefixSpec, PromptSpec, VirtualInit};

    const LIMITS: SizeLimits = SizeLimits { rank: 8, virtual_tokens: 8, trained_tokens: 8 };

    fn shape() -> BaseShape {
        let dims = [(8, 8), (8, 4), (8, 4), (8, 8), (8, 16), (8, 16), (16, 8)];
        BaseShape::llama("base", Digest::of(b""), 2, dims)
    }

    /// What a job continues from is what it publishes, ranks and scales of single layers included.
    #[test]
    fn files_give_back_the_adapter_they_were_made_from() {
        let shape = shape();
        let spec = LoraSpec { rank: 4, targets: vec![Target::QProj, Target::DownProj], ..LoraSpec::default() };
        let mut lora = Adapter::fresh(&spec, &shape, 1).unwrap();
        for (i, (site, layer)) in lora.pairs_mut().enumerate().skip(1) {
            let (inputs, outputs) = shape.dims(site.target).unwrap();
            layer.rank = 2 + i;
            layer.alpha = 0.1 + i as f32;
            layer.scale = spec.scale(layer.alpha, layer.rank as u32);
            (layer.a, layer.b) = (vec![0.5; layer.rank * inputs], vec![i as f32; layer.rank * outputs]);
        }
        let package = Package::from_adapter(&lora, &shape).unwrap();
        assert_eq!(package.read(&shape, LIMITS).unwrap(), lora);
        let mut again = Package::from_adapter(&package.read(&shape, LIMITS).unwrap(), &shape).unwrap();
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
        let mut lora = Adapter::fresh(&LoraSpec { rank: 2, ..LoraSpec::default() }, &shape, 1).unwrap();
        lora.sites.retain(|site, _| (site.layer == 0) == (site.target == Target::VProj));
        let read = Package::from_adapter(&lora, &shape).unwrap().read(&shape, LIMITS).unwrap();
        assert_eq!(read.sites, lora.sites);
        let again = Package::from_adapter(&read, &shape).unwrap();
        assert_eq!(again.read(&shape, LIMITS).unwrap().sites, lora.sites);
    }

    /// Of every kind, whole and of some sites: what is published is what is read, and has one digest.
    #[test]
    fn files_of_every_kind_give_back_the_adapter_they_were_made_from() {
        let shape = shape();
        let dora = LoraSpec { rank: 2, use_dora: true, ..LoraSpec::default() };
        let ia3 = Ia3Spec { targets: vec![Target::QProj, Target::OProj], feedforward: vec![Target::OProj] };
        let prompt = PromptSpec { virtual_tokens: 3, init: VirtualInit::Random };
        let prefix = PrefixSpec { virtual_tokens: 3, ..PrefixSpec::default() };
        let houlsby = BottleneckSpec { size: 3, placement: Placement::Both, ..BottleneckSpec::default() };
        let pfeiffer = BottleneckSpec { size: 2, layers: Some(vec![1]), ..BottleneckSpec::default() };
        let biased = LoraSpec { rank: 2, lora_bias: true, ..LoraSpec::default() };
        let tokens = LoraSpec { rank: 2, trainable_token_indices: vec![7, 3], ..LoraSpec::default() };
        let tuners: [TunerSpec; 9] = [
            dora.into(),
            tokens.into(),
            biased.into(),
            Ia3Spec::default().into(),
            ia3.into(),
            prompt.into(),
            prefix.into(),
            houlsby.into(),
            pfeiffer.into(),
        ];
        for tuner in tuners {
            let mut adapter = Adapter::fresh(&tuner, &shape, 1).unwrap();
            adapter.spec.fill_in(&shape).unwrap();
            adapter.tensors_mut().flatten().enumerate().for_each(|(i, x)| *x += i as f32);
            let mut part = adapter.clone();
            part.sites.retain(|site, _| (site.layer == 1) != (site.target == Target::OProj));
            for adapter in [adapter, part] {
                let package = Package::from_adapter(&adapter, &shape).unwrap();
                let read = package.read(&shape, LIMITS).unwrap();
                assert_eq!((&read.sites, &read.virtual_tokens), (&adapter.sites, &adapter.virtual_tokens));
                assert_eq!(read.tokens, adapter.tokens);
                let checked = package.check(&shape, LIMITS).unwrap();
                let norms = read.pairs().map(|(site, pair)| (site, vec![1.0; pair.b.len() / pair.rank])).collect();
                let packed = crate::adapter::PackedAdapter::new(&read, &shape, &norms).unwrap();
                assert_eq!(checked.memory_bytes, packed.byte_size());
                let again = Package::from_adapter(&read, &shape).unwrap();
                assert_eq!(again.digest().unwrap(), package.digest().unwrap());
                assert_eq!(checked.digest, package.digest().unwrap());
            }
        }
    }

    /// Biases of the base that are trained are named after their layers, whether those have a pair or not; a base without them has no place for them.
    #[test]
    fn biases_of_the_base_are_published_and_read() {
        let mut shape = shape();
        let plain = shape.clone();
        shape.biased = shape.sites().filter(|site| matches!(site.target, Target::QProj | Target::KProj)).collect();
        for (targets, bias) in [(vec![Target::QProj, Target::KProj], "lora_only"), (vec![Target::QProj], "all")] {
            let spec = LoraSpec { rank: 2, targets, ..LoraSpec::default() };
            let mut adapter = Adapter::fresh(&spec, &shape, 1).unwrap();
            let biases = shape.biased.iter().map(|site| (*site, shape.dims(site.target).unwrap().1));
            adapter.copies =
                biases.map(|(site, outputs)| (Slot::Bias(shape.index(site).unwrap()), vec![0.5; outputs])).collect();
            let mut package = Package::from_adapter(&adapter, &shape).unwrap();
            let config: Value = serde_json::from_slice(&package.config).unwrap();
            assert_eq!(config["bias"], json!(bias));
            let read = package.read(&shape, LIMITS).unwrap();
            assert_eq!((&read.sites, &read.copies), (&adapter.sites, &adapter.copies));
            let checked = package.check(&shape, LIMITS).unwrap();
            let packed = crate::adapter::PackedAdapter::new(&read, &shape, &Default::default()).unwrap();
            assert_eq!(checked.memory_bytes, packed.byte_size());
            assert_eq!(Package::from_adapter(&read, &shape).unwrap().digest().unwrap(), package.digest().unwrap());
            let error = package.check(&plain, LIMITS).unwrap_err().to_string();
            assert!(error.contains("bias") && error.contains("trained on"), "{error}");
            let mut without = config.clone();
            without["bias"] = json!("none");
            package.config = serde_json::to_vec(&without).unwrap();
            assert!(package.check(&shape, LIMITS).unwrap_err().to_string().contains("config's bias"));
        }
        // Of a base that has none there is nothing to train.
        let mut package =
            Package::from_adapter(&Adapter::fresh(&LoraSpec::default(), &plain, 1).unwrap(), &plain).unwrap();
        package.config = String::from_utf8(package.config).unwrap().replace("none", "all").into_bytes();
        assert!(package.check(&plain, LIMITS).is_ok());
    }

    /// Rows of tokens are named by what they are rows of; a head that is the embedding has none of its own.
    #[test]
    fn rows_of_tokens_are_published_and_read() {
        let tied = shape();
        let mut shape = tied.clone();
        shape.own_head = true;
        let spec = LoraSpec { rank: 2, trainable_token_indices: vec![7, 3], ..LoraSpec::default() };
        let mut adapter = Adapter::fresh(&spec, &shape, 1).unwrap();
        adapter.spec.fill_in(&shape).unwrap();
        adapter.tokens.insert(Slot::Head, TokenRows { ids: vec![5], rows: vec![0.5; 8] });
        let package = Package::from_adapter(&adapter, &shape).unwrap();
        let config: Value = serde_json::from_slice(&package.config).unwrap();
        assert_eq!(config["trainable_token_indices"], json!({"embed_tokens": [7, 3], "lm_head": [5]}));
        let read = package.read(&shape, LIMITS).unwrap();
        assert_eq!(read, adapter);
        let packed = crate::adapter::PackedAdapter::new(&read, &shape, &Default::default()).unwrap();
        assert_eq!(package.check(&shape, LIMITS).unwrap().memory_bytes, packed.byte_size());
        let refused = |shape: &BaseShape, ids: Value| {
            let mut config = config.clone();
            config["trainable_token_indices"] = ids;
            let package = Package { config: serde_json::to_vec(&config).unwrap(), ..package.clone() };
            package.check(shape, LIMITS).unwrap_err().to_string()
        };
        for (ids, named) in [
            (json!([7, 3]), "lm_head.token_adapter"),
            (json!({"embed_tokens": [7, 3, 4], "lm_head": [5]}), "shape"),
            (json!({"embed_tokens": [7, 64], "lm_head": [5]}), "64"),
            (json!({"embed_tokens": [7, 7], "lm_head": [5]}), "each once"),
            (json!({"embed_tokens": [7, -1], "lm_head": [5]}), "must be"),
            (json!({"embed_positions": [7]}), "embed_positions"),
            (json!("all"), "must be"),
            (json!([0, 1, 2, 3, 4, 5, 6, 7, 8]), "max_trained_tokens"),
            (json!(null), "embed_tokens.token_adapter"),
        ] {
            let error = refused(&shape, ids.clone());
            assert!(error.contains("token") && error.contains(named), "{ids}: {error}");
        }
        assert!(refused(&tied, config["trainable_token_indices"].clone()).contains("lm_head, which is the embedding"));
    }

    /// What a prefix was trained through is not published with it.
    #[test]
    fn a_reparametrised_prefix_is_published_folded() {
        let shape = shape();
        let spec = PrefixSpec { virtual_tokens: 2, projection: Some(5), ..PrefixSpec::default() };
        let trained = Adapter::fresh(&spec, &shape, 1).unwrap();
        assert_eq!(trained.tensors().count(), 5);
        let read = Package::from_adapter(&trained, &shape).unwrap().read(&shape, LIMITS).unwrap();
        let [folded] = read.tensors().collect::<Vec<_>>()[..] else { panic!() };
        assert_eq!(folded, &*trained.virtual_tokens.unwrap().folded());
        assert_eq!(folded.len(), 2 * 2 * 2 * 4);
    }

    /// What is no prompt of this base is refused by name.
    #[test]
    fn virtual_tokens_that_do_not_fit_are_refused() {
        let shape = shape();
        let spec = PrefixSpec { virtual_tokens: 3, ..PrefixSpec::default() };
        let package = Package::from_adapter(&Adapter::fresh(&spec, &shape, 1).unwrap(), &shape).unwrap();
        let refused = |change: &dyn Fn(&mut Package, &mut Value)| {
            let mut package = package.clone();
            let mut config: Value = serde_json::from_slice(&package.config).unwrap();
            change(&mut package, &mut config);
            package.config = serde_json::to_vec(&config).unwrap();
            package.check(&shape, LIMITS).unwrap_err().to_string()
        };
        for (key, value, named) in [
            ("num_virtual_tokens", json!(9), "max_virtual_tokens"),
            ("num_virtual_tokens", json!(2), "prompt_embeddings"),
            ("num_virtual_tokens", json!(0), "num_virtual_tokens"),
            ("num_virtual_tokens", json!(null), "num_virtual_tokens"),
            ("num_attention_heads", json!(2), "num_attention_heads"),
            ("num_transformer_submodules", json!(2), "num_transformer_submodules"),
            ("modules_to_save", json!(["lm_head"]), "modules_to_save"),
            ("peft_type", json!("PROMPT_TUNING"), "prompt_embeddings"),
        ] {
            let error = refused(&|_, config| config[key] = value.clone());
            assert!(error.contains(named), "{key} {value}: {error}");
        }
        let other = Package::from_adapter(&Adapter::fresh(&LoraSpec::default(), &shape, 1).unwrap(), &shape).unwrap();
        let error = refused(&|package, _| package.tensors = other.tensors.clone());
        assert!(error.contains("prompt_embeddings"), "{error}");
    }

    /// An input that other layers share cannot be scaled for one of them.
    #[test]
    fn scales_of_shared_inputs_are_refused_by_name() {
        let shape = shape();
        let adapter = Adapter::fresh(&TunerSpec::Ia3(Default::default()), &shape, 1).unwrap();
        let mut package = Package::from_adapter(&adapter, &shape).unwrap();
        let mut config: Value = serde_json::from_slice(&package.config).unwrap();
        config["feedforward_modules"] = json!(["k_proj", "down_proj"]);
        package.config = serde_json::to_vec(&config).unwrap();
        let refused = package.check(&shape, LIMITS).unwrap_err().to_string();
        assert!(refused.contains("feedforward_modules") && refused.contains("k_proj"), "{refused}");
    }

    /// Digests name what is stored, so what they are made of must stay as it was.
    #[test]
    fn what_digests_are_made_of_stays_as_it_was() {
        let lora = Adapter::fresh(&LoraSpec { rank: 2, ..LoraSpec::default() }, &shape(), 1).unwrap();
        let package = Package::from_adapter(&lora, &shape()).unwrap();
        let canonical = |extra: Value| {
            let mut config: Value = serde_json::from_slice(&package.config).unwrap();
            extra.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
            Settings::read(&serde_json::to_vec(&config).unwrap()).unwrap().canonical().1
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
