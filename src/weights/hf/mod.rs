//! A Hugging Face folder as a base: `config.json`, a tokenizer, and safetensors in one file or in shards with an index.

pub mod folder;
mod rope;
mod safetensors;
mod settings;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, Read as _};
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::Weights;
use super::gguf::{name_of, naming};
use super::header::TensorInfo;
use super::plan::{Form, Plan, Sought};
use super::quantise::Quantiser;
use super::stream::{self, Progress};
use crate::arch::config::ModelConfig;
use crate::arch::decoder::{Decoder, NormKind, NormSpec, Site, Slot};
use crate::arch::unsupported;
use crate::error::{Error, Result};
use crate::ids::Digest;
use crate::kernels::format::QType;
use crate::text::Vocabulary;
use crate::text::hf::TokenizerFiles;
use safetensors::{broken, read_header};
pub(super) use settings::HfConfig;
use settings::object;

/// The names of the files.
pub(super) const CONFIG: &str = "config.json";
/// The file of a folder's tensors, where there is one.
pub const TENSORS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What is said of the text; those that are there are part of the digest.
const TEXT: [&str; 4] = [TOKENIZER, "tokenizer_config.json", "chat_template.jinja", "generation_config.json"];
const TOKENIZER: &str = "tokenizer.json";

/// Most bytes of a file of JSON.
const MAX_JSON_BYTES: u64 = 128 << 20;

/// Most files of tensors.
const MAX_SHARDS: usize = 1024;

/// The files that are read whole, by their names.
pub(super) type Texts = BTreeMap<&'static str, Vec<u8>>;

/// A folder whose settings and headers have been read.
pub(super) struct Folder {
    path: PathBuf,
    config: HfConfig,
    tensors: BTreeMap<String, TensorInfo>,
    /// Name, file, bytes.
    shards: Vec<(String, File, u64)>,
    texts: Texts,
    /// Name and digest of all that has been read whole.
    read: BTreeMap<String, Digest>,
}

pub(super) fn load(
    path: &Path,
    quantiser: Option<&Quantiser>,
    progress: &mut Progress<'_>,
) -> Result<(Weights, Vocabulary)> {
    let mut read = || {
        let mut folder = Folder::open(path)?;
        let vocabulary = folder.vocabulary()?;
        folder.texts.clear();
        Ok((folder.read(quantiser, progress)?, vocabulary))
    };
    read().map_err(naming(path))
}

impl Folder {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let texts = read_texts(path)?;
        let read = texts.iter().map(|(name, bytes)| ((*name).to_owned(), Digest::of(bytes))).collect();
        let json = texts.get(CONFIG).ok_or_else(|| unreadable(CONFIG, "is missing from the folder"))?;
        let config = HfConfig::read(json)?;
        let (index, names) = shard_names(path)?;
        let (mut tensors, mut shards) = (BTreeMap::new(), Vec::new());
        for (number, name) in names.into_iter().enumerate() {
            let missing =
                |e: std::io::Error| unreadable(&name, format!("cannot be opened ({e}); fetch the folder again"));
            let mut file = File::open(path.join(&name)).map_err(missing)?;
            let (found, bytes) = read_header(&mut BufReader::new(&mut file), number, &name)?;
            for (tensor, info) in found {
                if tensors.insert(tensor.clone(), info).is_some() {
                    return Err(broken(&name, format!("has the tensor {tensor}, which another shard has too")));
                }
            }
            shards.push((name, file, bytes));
        }
        check_index(index.as_ref(), &tensors, &shards)?;
        // Buffers that old files have; they are computed.
        tensors.retain(|name, _| !name.ends_with("rotary_emb.inv_freq"));
        Ok(Self { path: path.to_owned(), config, tensors, shards, texts, read })
    }

    /// What the folder says of its text, which must fit the embedding.
    pub(super) fn vocabulary(&self) -> Result<Vocabulary> {
        // The rows that are there: what config.json says has not been looked at yet.
        let rows = ROOTS.iter().find_map(|(root, _)| self.tensors.get(&embedding_name(root))?.dims.get(1).copied());
        let rows = rows.ok_or_else(|| unsupported(embedding_name(ROOTS[0].0), "is missing"))?;
        vocabulary(|name| self.texts.get(name).map(Vec::as_slice), rows)
    }

    /// What the folder calls the model.
    pub(super) fn called(&self) -> Result<Vec<String>> {
        self.config.called()
    }

    /// Of all files of tensors.
    pub(super) fn bytes(&self) -> u64 {
        self.shards.iter().map(|(.., bytes)| bytes).sum()
    }

    pub(super) fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// The numbers of the base.
    pub(super) fn model_config(&self) -> Result<ModelConfig> {
        self.config.model_config(name_of(&self.path))
    }

    /// Looks for the folder's tensors.
    pub(super) fn plan(&self, config: &ModelConfig, decoder: &Decoder) -> Result<Plan> {
        let form = HuggingFace::new(&self.tensors, config, self.config.flag("tie_word_embeddings")?);
        let (architecture, tensors) = (self.config.architecture, &self.tensors);
        Ok(Sought { architecture, config, decoder, form: &form, tensors }.plan())
    }

    /// Reads the tensors.
    pub(super) fn read(&mut self, quantiser: Option<&Quantiser>, progress: &mut Progress<'_>) -> Result<Weights> {
        let config = self.model_config()?;
        let decoder = Decoder::new(&config);
        let plan = self.plan(&config, &decoder)?;
        if let Some(problem) = plan.problems.into_iter().next() {
            return Err(problem);
        }
        let mut files: Vec<_> = self.shards.iter().map(|(_, file, bytes)| (file, *bytes)).collect();
        let (mut parts, digests) = stream::read(&mut files, &plan.tensors, quantiser, progress)?;
        if self.config.architecture.adds_one_to_norms {
            parts.norms.iter_mut().flatten().flatten().for_each(|weight| *weight += 1.0);
        }
        let shards = self.shards.iter().map(|(name, ..)| name.clone()).zip(digests);
        let digest = digest_of(self.read.clone().into_iter().chain(shards).collect());
        let digest = quantiser.map_or(digest, |quantiser| quantiser.end(digest));
        parts.into_weights(config, decoder, self.called()?, digest)
    }
}

/// Reads the files that say what the base is; some may be missing.
pub(super) fn read_texts(path: &Path) -> Result<Texts> {
    let read = |name| Ok(read_file(path, name)?.map(|bytes| (name, bytes)));
    [CONFIG].into_iter().chain(TEXT).filter_map(|name| read(name).transpose()).collect()
}

/// The text of files that are found by their names, for an embedding of so many rows.
pub(super) fn vocabulary<'f>(file: impl Fn(&str) -> Option<&'f [u8]>, rows: u64) -> Result<Vocabulary> {
    let [tokenizer, config, template, generation] = TEXT.map(file);
    let tokenizer = tokenizer.ok_or_else(|| unreadable(TOKENIZER, "is missing from the folder"))?;
    let text = |bytes| std::str::from_utf8(bytes).map_err(|_| unreadable(TEXT[2], "is no UTF-8"));
    let template = template.map(text).transpose()?;
    let files = TokenizerFiles { tokenizer, config, generation, template };
    Vocabulary::of_hugging_face(&files, usize::try_from(rows).map_err(Error::internal)?)
}

impl HfConfig {
    /// What the files call the model.
    pub(super) fn called(&self) -> Result<Vec<String>> {
        Ok(self.word("_name_or_path")?.map(str::to_owned).into_iter().collect())
    }

    /// The numbers of a base of this name.
    pub(super) fn model_config(&self, name: String) -> Result<ModelConfig> {
        let mut config = ModelConfig::read(self.architecture, self, name, self.count_of("vocab_size")?)?;
        self.check(config.activation)?;
        rope::scale(&mut config, self)?;
        Ok(config)
    }
}

/// Of a folder: over its files' names and digests, in the order of the names.
fn digest_of(files: BTreeMap<String, Digest>) -> Digest {
    let mut hasher = Sha256::new();
    hasher.update(b"tenora folder 1");
    for (name, digest) in files {
        hasher.update((name.len() as u64).to_le_bytes());
        hasher.update(name);
        hasher.update(digest);
    }
    hasher.into()
}

fn unreadable(file: &str, why: impl Into<String>) -> Error {
    Error::invalid_because("BASE_UNREADABLE", file, why)
}

/// A small file of the folder; `None` where there is none.
fn read_file(folder: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    match File::open(folder.join(name)).and_then(|file| file.take(MAX_JSON_BYTES + 1).read_to_end(&mut bytes)) {
        Ok(len) if len as u64 > MAX_JSON_BYTES => {
            Err(unreadable(name, format!("has more than {MAX_JSON_BYTES} bytes, which is no file of its kind")))
        }
        Ok(_) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(unreadable(name, e.to_string())),
    }
}

type Index = BTreeMap<String, String>;

/// The files of tensors, in the order of their names, and which tensor the index says is in which.
fn shard_names(folder: &Path) -> Result<(Option<Index>, BTreeSet<String>)> {
    let Some(json) = read_file(folder, INDEX)? else {
        return Ok((None, [TENSORS.to_owned()].into()));
    };
    let wrong = |why: String| unreadable(INDEX, format!("{why}: the file is damaged; fetch it again"));
    let mut index = object(INDEX, &json)?;
    let Some(Value::Object(map)) = index.remove("weight_map") else {
        return Err(wrong("has no weight_map".to_owned()));
    };
    let mut places = Index::new();
    for (tensor, file) in map {
        let plain = |file: &&str| file.ends_with(".safetensors") && !file.contains(['/', '\\']);
        let Some(file) = file.as_str().filter(plain) else {
            return Err(wrong(format!("says that {tensor} is in {file}, which is no safetensors file of the folder")));
        };
        places.insert(tensor, file.to_owned());
    }
    let names: BTreeSet<_> = places.values().cloned().collect();
    match names.len() {
        1..=MAX_SHARDS => Ok((Some(places), names)),
        count => Err(wrong(format!("names {count} files; from 1 to {MAX_SHARDS} can be read"))),
    }
}

/// Refuses shards that hold other tensors than the index says.
fn check_index(
    index: Option<&Index>,
    tensors: &BTreeMap<String, TensorInfo>,
    shards: &[(String, File, u64)],
) -> Result<()> {
    let Some(index) = index else { return Ok(()) };
    for (tensor, file) in index {
        if tensors.get(tensor).is_none_or(|info| shards[info.file].0 != *file) {
            return Err(broken(file, format!("does not have the tensor {tensor}, which {INDEX} says it has")));
        }
    }
    match tensors.keys().find(|tensor| !index.contains_key(*tensor)) {
        Some(tensor) => {
            let file = &shards[tensors[tensor].file].0;
            Err(broken(file, format!("has the tensor {tensor}, which {INDEX} does not name")))
        }
        None => Ok(()),
    }
}

/// Where the decoder's tensors are named from, and the head beside it: of a model for text, of one saved without its head, of the text's part of
/// a larger one as it was and is saved.
const ROOTS: [(&str, &str); 4] = [
    ("model.", "lm_head.weight"),
    ("", "lm_head.weight"),
    ("language_model.model.", "language_model.lm_head.weight"),
    ("model.language_model.", "lm_head.weight"),
];

fn embedding_name(root: &str) -> String {
    format!("{root}embed_tokens.weight")
}

/// Hugging Face's names.
struct HuggingFace {
    root: &'static str,
    head: &'static str,
    post_norms: bool,
    ties_head: bool,
}

impl HuggingFace {
    fn new(tensors: &BTreeMap<String, TensorInfo>, config: &ModelConfig, tied: Option<bool>) -> Self {
        let there = |(root, _): &&(&str, &str)| tensors.contains_key(&embedding_name(root));
        let (root, head) = ROOTS.iter().find(there).copied().unwrap_or(ROOTS[0]);
        let ties_head = tied.unwrap_or(!tensors.contains_key(head));
        Self { root, head, post_norms: config.post_norms, ties_head }
    }

    fn norm_name(&self, norm: &NormSpec) -> String {
        let kind = match norm.kind {
            NormKind::Attention => "input_layernorm",
            NormKind::Query => "self_attn.q_norm",
            NormKind::Key => "self_attn.k_norm",
            NormKind::PostAttention => "post_attention_layernorm",
            // Named by what is before it, where nothing but attention is.
            NormKind::FeedForward if !self.post_norms => "post_attention_layernorm",
            NormKind::FeedForward => "pre_feedforward_layernorm",
            NormKind::PostFeedForward => "post_feedforward_layernorm",
            NormKind::Final => "norm",
        };
        match norm.layer {
            Some(layer) => format!("{}layers.{layer}.{kind}.weight", self.root),
            None => format!("{}{kind}.weight", self.root),
        }
    }
}

impl Form for HuggingFace {
    fn tensor_name(&self, slot: Slot, decoder: &Decoder) -> Option<String> {
        let of_site = |id: usize, what: &str| {
            let Site { layer, target } = decoder.sites[id].site;
            format!("{}layers.{layer}.{}.{}.{what}", self.root, target.block_part(), target.name())
        };
        match slot {
            Slot::Embedding => Some(embedding_name(self.root)),
            Slot::Head => Some(self.head.to_owned()),
            Slot::Matrix(id) => Some(of_site(id, "weight")),
            Slot::Bias(id) => Some(of_site(id, "bias")),
            Slot::Norm(id) => Some(self.norm_name(&decoder.norms[id])),
            Slot::Factors(_) => None,
        }
    }

    fn interleaves(&self) -> bool {
        false
    }

    fn vector_formats(&self) -> &'static [QType] {
        &[QType::F32, QType::F16, QType::BF16]
    }

    fn ties_head(&self) -> Option<bool> {
        Some(self.ties_head)
    }
}
