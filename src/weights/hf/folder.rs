//! A base as a Hugging Face folder, some of its tensors replaced: what transformers opens, and the reader beside this reads. All tensors are in
//! float32 in one file, so that no trained value is rounded; a quantised tensor is written as the values that it stands for.
//!
//! `config.json` and the tokenizer's files are those of the folder that the base was read from. Of a GGUF file they are written from what it says;
//! what is written is read back, and must say the same: settings that have no words here are refused.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::safetensors::read_header;
use super::settings::{HfConfig, object};
use super::{CONFIG, HuggingFace, TEXT, TOKENIZER, Weights, read_file, rope};
use crate::arch::Architecture;
use crate::arch::config::ModelConfig;
use crate::arch::decoder::Slot;
use crate::arch::rope::{RopeConfig, RopeScaling};
use crate::error::{Error, Result};
use crate::kernels::spec::Activation;
use crate::request::Target;
use crate::weights::gguf::unreadable;
use crate::weights::header::TensorInfo;
use crate::weights::plan::Form as _;

pub use super::TENSORS;

/// Takes a file's name and more of its bytes. The pieces of a file come one after the other.
pub type Put<'a> = dyn FnMut(&str, Vec<u8>) -> Result<()> + 'a;

/// What says in a folder without a tokenizer where to get one.
const NOTE: &str = "README.md";

/// Values of a piece.
const PIECE: usize = 1 << 20;

/// What transformers calls the architectures whose settings can be written: as GGUF does, `model_type`, the class.
const CLASSES: [(&str, &str, &str); 7] = [
    ("llama", "llama", "LlamaForCausalLM"),
    ("qwen2", "qwen2", "Qwen2ForCausalLM"),
    ("qwen3", "qwen3", "Qwen3ForCausalLM"),
    ("gemma2", "gemma2", "Gemma2ForCausalLM"),
    ("gemma3", "gemma3_text", "Gemma3ForCausalLM"),
    ("smollm3", "smollm3", "SmolLM3ForCausalLM"),
    ("granite", "granite", "GraniteForCausalLM"),
];

/// Returns the bytes of the file of tensors, but for its header.
pub fn tensor_bytes(weights: &Weights) -> u64 {
    let len = |slot| weights.dims(slot).into_iter().product::<usize>() as u64;
    weights.slots().map(len).sum::<u64>() * size_of::<f32>() as u64
}

/// Writes the folder. `copies` take the place of tensors; `base` is the file or folder that the base was read from.
///
/// # Errors
/// NO_FOLDER_FORM where the base's settings cannot be written, and those of `put`.
pub fn write(weights: &Weights, copies: &BTreeMap<Slot, Vec<f32>>, base: &Path, put: &mut Put<'_>) -> Result<()> {
    put(CONFIG, config(weights, base)?)?;
    let mut has_tokenizer = false;
    for name in TEXT {
        if let Some(text) = base.is_dir().then(|| read_file(base, name)).transpose()?.flatten() {
            has_tokenizer |= name == TOKENIZER;
            put(name, text)?;
        }
    }
    if !has_tokenizer {
        put(NOTE, note(weights).into_bytes())?;
    }
    let slots: Vec<(Slot, String)> = named(weights).collect();
    put(TENSORS, header(weights, &slots)?)?;
    for (slot, _) in &slots {
        let own;
        let values = match copies.get(slot) {
            Some(values) => values,
            None => {
                own = weights.values(*slot);
                &own
            }
        };
        let less = added_to_norms(weights, *slot)?;
        for piece in values.chunks(PIECE) {
            put(TENSORS, piece.iter().flat_map(|x| (x - less).to_le_bytes()).collect())?;
        }
    }
    Ok(())
}

/// A folder's file of tensors, to be read again.
#[derive(Debug)]
pub struct Written {
    file: File,
    tensors: BTreeMap<String, TensorInfo>,
}

impl Written {
    /// Reads which tensors there are.
    ///
    /// # Errors
    /// BASE_UNREADABLE where the file is damaged.
    pub fn open(mut file: File) -> Result<Self> {
        let (tensors, _) = read_header(&mut file, 0, TENSORS)?;
        Ok(Self { file, tensors })
    }

    /// Reads a tensor's values, as [`Weights::values`] gives them.
    ///
    /// # Errors
    /// Those of the file; an internal one where it is another base's.
    pub fn values(&mut self, weights: &Weights, slot: Slot) -> Result<Vec<f32>> {
        let name = names(weights).tensor_name(slot, &weights.decoder);
        let info = name.and_then(|name| self.tensors.get(&name));
        let fits =
            |info: &&TensorInfo| info.bytes as usize == weights.dims(slot).iter().product::<usize>() * size_of::<f32>();
        let info =
            info.filter(fits).ok_or_else(|| Error::internal(format!("{TENSORS} has not the tensor {slot:?}")))?;
        let mut bytes = vec![0; info.bytes as usize];
        self.file
            .seek(SeekFrom::Start(info.start))
            .and_then(|_| self.file.read_exact(&mut bytes))
            .map_err(unreadable)?;
        let more = added_to_norms(weights, slot)?;
        Ok(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes) + more).collect())
    }
}

/// What the values of a norm are above those in the folder.
fn added_to_norms(weights: &Weights, slot: Slot) -> Result<f32> {
    let norm = matches!(slot, Slot::Norm(_)) && architecture(weights)?.adds_one_to_norms;
    Ok(if norm { 1.0 } else { 0.0 })
}

/// Returns `config.json`.
///
/// # Errors
/// NO_FOLDER_FORM where it would not say what the base is.
pub fn config(weights: &Weights, base: &Path) -> Result<Vec<u8>> {
    if let Some(own) = base.is_dir().then(|| read_file(base, CONFIG)).transpose()?.flatten() {
        let mut own = object(CONFIG, &own)?;
        // Of a model with several parts the text's alone is here.
        if !own.contains_key("text_config") {
            own.insert("torch_dtype".to_owned(), "float32".into());
            own.remove("dtype");
            return json_bytes(&own.into());
        }
    }
    let written = json_bytes(&Value::Object(settings(weights)?))?;
    if means(read_back(&written)?, &weights.config) { Ok(written) } else { Err(no_form(weights, "its settings")) }
}

/// Whether numbers that were read back are those of the base, but for the rounding of what is written as its inverse or its root.
fn means(mut read: ModelConfig, base: &ModelConfig) -> bool {
    read.name.clone_from(&base.name);
    let take = |read: &mut f32, base: f32| {
        if (*read - base).abs() <= 1e-6 * base.abs() {
            *read = base;
        }
    };
    take(&mut read.attention.scale, base.attention.scale);
    take(&mut read.logits.scale, base.logits.scale);
    for (read, base) in read.ropes.iter_mut().zip(&base.ropes) {
        take(&mut read.attention_factor, base.attention_factor);
    }
    read == *base
}

fn json_bytes(value: &Value) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(value).map_err(Error::internal)
}

fn no_form(weights: &Weights, what: &str) -> Error {
    let message = format!(
        "{what} cannot be written as a config.json of Hugging Face's; serve the model from its own folder (config.json, safetensors), whose \
         config.json is then used, or set extract_rank, which makes a LoRA"
    );
    Error::precondition("NO_FOLDER_FORM", &weights.config.name, message)
}

fn architecture(weights: &Weights) -> Result<&'static Architecture> {
    Architecture::named(weights.config.architecture)
}

/// What the reader makes of a configuration.
fn read_back(json: &[u8]) -> Result<ModelConfig> {
    let config = HfConfig::read(json)?;
    let vocab_size = config.count_of("vocab_size")?;
    let mut read = ModelConfig::read(config.architecture, &config, String::new(), vocab_size)?;
    config.check(read.activation)?;
    rope::scale(&mut read, &config)?;
    Ok(read)
}

/// The settings in transformers' words.
fn settings(weights: &Weights) -> Result<Map<String, Value>> {
    let c = &weights.config;
    let known = CLASSES.iter().find(|(name, ..)| *name == c.architecture);
    let Some((_, mut model_type, mut class)) = known.copied() else { return Err(no_form(weights, "its architecture")) };
    let window = c.layers.iter().find_map(|layer| layer.window);
    if model_type == "llama" && window.is_some() {
        (model_type, class) = ("mistral", "MistralForCausalLM");
    }
    let biased = |targets: &[Target]| {
        let of = |site: usize| targets.contains(&weights.decoder.sites[site].site.target);
        let linears = weights.linears.iter().enumerate();
        linears.filter(|(site, _)| of(*site)).map(|(_, linear)| linear.bias.is_some()).collect::<Vec<_>>()
    };
    let attention = biased(&[Target::QProj, Target::KProj, Target::VProj, Target::OProj]);
    let mlp = biased(&[Target::GateProj, Target::UpProj, Target::DownProj]);
    let some = |flags: &[bool]| flags.contains(&true);
    // Qwen 2 has biases of q, k and v without saying so; elsewhere all have one or none has.
    let uneven = |flags: &[bool]| some(flags) && flags.contains(&false);
    if c.architecture != "qwen2" && uneven(&attention) || uneven(&mlp) || c.architecture == "qwen2" && some(&mlp) {
        return Err(no_form(weights, "which of its layers have a bias"));
    }
    let activation = match c.activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
    };
    let mut all = Map::new();
    let mut say = |key: &str, value: Value| drop(all.insert(key.to_owned(), value));
    say("architectures", json!([class]));
    say("model_type", json!(model_type));
    say("torch_dtype", json!("float32"));
    say("hidden_size", json!(c.hidden_size));
    say("intermediate_size", json!(c.intermediate_size));
    say("vocab_size", json!(c.vocab_size));
    say("max_position_embeddings", json!(c.context_length));
    say("num_hidden_layers", json!(c.layers.len()));
    say("num_attention_heads", json!(c.attention.heads));
    say("num_key_value_heads", json!(c.attention.kv_heads));
    say("head_dim", json!(c.attention.head_dim));
    say("rms_norm_eps", number(c.norm_eps));
    say("hidden_act", json!(activation));
    say("tie_word_embeddings", json!(weights.head.is_none()));
    say("use_cache", json!(true));
    if c.architecture != "qwen2" {
        say("attention_bias", json!(some(&attention)));
        say("mlp_bias", json!(some(&mlp)));
    }
    say_rotation(c, &mut say);
    if let Some(window) = window {
        let kind = |window: Option<usize>| if window.is_some() { "sliding_attention" } else { "full_attention" };
        say("sliding_window", json!(window));
        say("use_sliding_window", json!(true));
        say("layer_types", c.layers.iter().map(|layer| kind(layer.window)).collect());
    }
    if c.architecture == "smollm3" {
        say("no_rope_layers", c.layers.iter().map(|layer| u8::from(layer.rope.is_some())).collect());
    }
    if c.architecture.starts_with("gemma") {
        say("hidden_activation", json!(activation));
        say("query_pre_attn_scalar", number((1.0 / (c.attention.scale * c.attention.scale)).round()));
        say("attn_logit_softcapping", c.attention.softcap.map(number).into());
        say("final_logit_softcapping", c.logits.softcap.map(number).into());
    }
    if c.architecture == "granite" {
        say("embedding_multiplier", number(c.embedding_scale));
        say("residual_multiplier", number(c.residual_scale));
        say("attention_multiplier", number(c.attention.scale));
        say("logits_scaling", number(1.0 / c.logits.scale));
    }
    Ok(all)
}

/// A number as people write it: 0.00001 and not what that is in 24 bits.
fn number(x: f32) -> Value {
    x.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

/// Says by which rotations q and k turn.
fn say_rotation(c: &ModelConfig, say: &mut impl FnMut(&str, Value)) {
    let Some(RopeConfig { base, dims, scaling, .. }) = c.ropes.first() else { return };
    say("rope_theta", number(*base));
    if *dims != c.attention.head_dim {
        say("partial_rotary_factor", json!(*dims as f64 / c.attention.head_dim as f64));
    }
    if let Some(windowed) = c.ropes.get(1) {
        say("rope_local_base_freq", number(windowed.base));
    }
    match scaling {
        RopeScaling::Linear { factor } => {
            say("rope_scaling", json!({"rope_type": "linear", "factor": number(*factor)}));
        }
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow } => {
            let yarn = json!({
                "rope_type": "yarn", "factor": number(*factor), "original_max_position_embeddings": original_context,
                "beta_fast": number(*beta_fast), "beta_slow": number(*beta_slow),
            });
            say("rope_scaling", yarn);
        }
        // What factors were made by is not known any more; that they are missing is seen where the settings are read back.
        RopeScaling::None | RopeScaling::Factors(_) | RopeScaling::LongRope { .. } => {}
    }
}

/// Transformers' names.
fn names(weights: &Weights) -> HuggingFace {
    HuggingFace {
        root: "model.",
        head: "lm_head.weight",
        post_norms: weights.config.post_norms,
        ties_head: weights.head.is_none(),
    }
}

/// The tensors by transformers' names.
fn named(weights: &Weights) -> impl Iterator<Item = (Slot, String)> + '_ {
    let form = names(weights);
    weights.slots().filter_map(move |slot| Some((slot, form.tensor_name(slot, &weights.decoder)?)))
}

/// What a file of these tensors begins with.
fn header(weights: &Weights, slots: &[(Slot, String)]) -> Result<Vec<u8>> {
    let (mut header, mut end) = (Map::new(), 0);
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    for (slot, name) in slots {
        let (start, shape) = (end, weights.dims(*slot));
        end += shape.iter().product::<usize>() * size_of::<f32>();
        header.insert(name.clone(), json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]}));
    }
    let mut json = serde_json::to_vec(&header).map_err(Error::internal)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok([&(json.len() as u64).to_le_bytes()[..], &json].concat())
}

fn note(weights: &Weights) -> String {
    let name = &weights.config.name;
    format!(
        "# {name}, fine-tuned\n\nconfig.json and model.safetensors are whole. The base was a GGUF file, whose tokenizer is not written: copy \
         tokenizer.json, tokenizer_config.json and what else there is of special_tokens_map.json, chat_template.jinja and generation_config.json \
         from the model's own repository into this folder.\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::testing::File as Tiny;

    /// Writes a base to a folder.
    fn written(weights: &Weights, copies: &BTreeMap<Slot, Vec<f32>>, base: &Path) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let mut put = |name: &str, bytes: Vec<u8>| {
            files.entry(name.to_owned()).or_default().extend(bytes);
            Ok(())
        };
        write(weights, copies, base, &mut put).unwrap();
        files.iter().for_each(|(name, bytes)| std::fs::write(dir.path().join(name), bytes).unwrap());
        dir
    }

    #[test]
    fn what_is_written_is_read_as_it_was_with_the_copies_in_place() {
        let (weights, _) = Weights::from_bytes(&Tiny::tiny().bytes()).unwrap();
        let moved = |slot: Slot| (slot, weights.values(slot).iter().map(|x| x + 0.25).collect::<Vec<f32>>());
        let copies: BTreeMap<_, _> = [Slot::Embedding, Slot::Matrix(1), Slot::Norm(0)].map(moved).into();
        let dir = written(&weights, &copies, Path::new("base.gguf"));
        assert!(dir.path().join(NOTE).is_file());
        let read = Weights::from_folder(dir.path()).unwrap();
        assert_eq!(ModelConfig { name: weights.config.name.clone(), ..read.config.clone() }, weights.config);
        assert!(read.slots().eq(weights.slots()));
        for slot in weights.slots() {
            let expected = copies.get(&slot).cloned().unwrap_or_else(|| weights.values(slot));
            assert_eq!(read.values(slot), expected, "{slot:?}");
        }
        // Again from that folder, whose own config.json and tokenizer are taken.
        std::fs::write(dir.path().join(TOKENIZER), b"{}").unwrap();
        let again = written(&read, &BTreeMap::new(), dir.path());
        assert!(again.path().join(TOKENIZER).is_file() && !again.path().join(NOTE).exists());
        assert!(Weights::from_folder(again.path()).unwrap().values(Slot::Embedding) == read.values(Slot::Embedding));
    }

    #[test]
    fn settings_without_words_are_refused() {
        let (mut weights, _) = Weights::from_bytes(&Tiny::tiny().bytes()).unwrap();
        weights.config.embedding_scale = 3.0;
        let refused = config(&weights, Path::new("base.gguf")).unwrap_err().to_string();
        assert!(refused.contains("extract_rank"), "{refused}");
        weights.config.architecture = "phi3";
        assert!(config(&weights, Path::new("base.gguf")).is_err());
    }
}
