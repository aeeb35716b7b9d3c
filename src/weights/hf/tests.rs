//! Folders against the GGUF files of the same weights, and folders that lie.

use std::path::PathBuf;

use half::{bf16, f16};
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::arch::rope::{RopeConfig, RopeScaling};
use crate::weights::header::Header;
use crate::weights::{gguf, sealed};

/// Name, shape, values.
type Tensor = (String, Vec<usize>, Vec<f32>);

/// A folder in pieces, each of which a test may change.
#[derive(Clone)]
struct Pieces {
    config: Value,
    tensors: Vec<Tensor>,
    dtype: &'static str,
    shards: usize,
}

/// A safetensors file of such tensors.
fn safetensors(tensors: &[Tensor], dtype: &str) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape, values) in tensors {
        let from = data.len();
        for x in values {
            match dtype {
                "F32" => data.extend(x.to_le_bytes()),
                "F16" => data.extend(f16::from_f32(*x).to_le_bytes()),
                _ => data.extend(bf16::from_f32(*x).to_le_bytes()),
            }
        }
        header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [from, data.len()]}));
    }
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let header = serde_json::to_vec(&header).unwrap();
    [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
}

impl Pieces {
    fn write(&self) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
        put(CONFIG, self.config.to_string().as_bytes());
        put("tokenizer.json", b"{}");
        if self.shards == 1 {
            put(TENSORS, &safetensors(&self.tensors, self.dtype));
            return dir;
        }
        let mut places = serde_json::Map::new();
        for (i, tensors) in self.tensors.chunks(self.tensors.len().div_ceil(self.shards)).enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, self.shards);
            tensors.iter().for_each(|(tensor, ..)| drop(places.insert(tensor.clone(), name.as_str().into())));
            put(&name, &safetensors(tensors, self.dtype));
        }
        put(INDEX, json!({"metadata": {}, "weight_map": places}).to_string().as_bytes());
        dir
    }

    fn read(&self) -> Result<Weights> {
        Weights::from_folder(self.write().path())
    }

    /// What is said of a folder that is refused.
    fn refusal(&self) -> String {
        self.read().map(drop).unwrap_err().to_string()
    }

    fn set(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }
}

/// One block of width 32 with two heads, values that no two tensors share.
fn tiny() -> Pieces {
    let config = json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_hidden_layers": 1, "rms_norm_eps": 1e-5, "vocab_size": 24, "max_position_embeddings": 64, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "hidden_act": "silu",
    });
    let of_block = [
        ("self_attn.q_proj", vec![32, 32]),
        ("self_attn.k_proj", vec![16, 32]),
        ("self_attn.v_proj", vec![16, 32]),
        ("self_attn.o_proj", vec![32, 32]),
        ("mlp.gate_proj", vec![64, 32]),
        ("mlp.up_proj", vec![64, 32]),
        ("mlp.down_proj", vec![32, 64]),
        ("input_layernorm", vec![32]),
        ("post_attention_layernorm", vec![32]),
    ];
    let mut named: Vec<_> = of_block.map(|(name, shape)| (format!("model.layers.0.{name}.weight"), shape)).into();
    named.extend([("model.embed_tokens.weight".to_owned(), vec![24, 32]), ("model.norm.weight".to_owned(), vec![32])]);
    let tensor = |(i, (name, shape)): (usize, (String, Vec<usize>))| {
        let values = (0..shape.iter().product()).map(|j: usize| ((i * 97 + j) % 251) as f32 / 64.0).collect();
        (name, shape, values)
    };
    let tensors = named.into_iter().enumerate().map(tensor).collect();
    Pieces { config, tensors, dtype: "F32", shards: 1 }
}

fn values(matrix: &crate::kernels::packed::PackedMatrix) -> Vec<f32> {
    let mut values = vec![0.0; matrix.rows() * matrix.cols()];
    matrix.dequantize(0, &mut values);
    values
}

#[test]
fn a_folder_is_read_whole_or_in_shards_and_its_digest_covers_its_text() {
    for (dtype, qtype) in [("F32", QType::F32), ("F16", QType::F16), ("BF16", QType::BF16)] {
        let pieces = Pieces { dtype, ..tiny() };
        let whole = pieces.read().unwrap();
        assert_eq!((whole.embedding.qtype(), values(&whole.embedding)), (qtype, pieces.tensors[9].2.clone()));
        assert!(whole.head.is_none());
        for (linear, tensor) in whole.linears.iter().zip(&pieces.tensors) {
            assert_eq!(values(&linear.matrix), tensor.2, "{}", tensor.0);
        }
        let sharded = Pieces { shards: 3, ..pieces.clone() }.read().unwrap();
        assert_eq!(values(&sharded.linears[6].matrix), pieces.tensors[6].2);
        assert_eq!(sharded.norms, whole.norms);
    }
    let dir = tiny().write();
    let before = Weights::from_folder(dir.path()).unwrap().digest;
    assert_eq!(Weights::from_folder(dir.path()).unwrap().digest, before);
    std::fs::write(dir.path().join("tokenizer.json"), b"{ }").unwrap();
    let after = Weights::from_folder(dir.path()).unwrap().digest;
    std::fs::write(dir.path().join("chat_template.jinja"), b"").unwrap();
    let templated = Weights::from_folder(dir.path()).unwrap().digest;
    let mut other = tiny();
    other.tensors[0].2[3] += 1.0;
    let other = other.read().unwrap().digest;
    assert!([after, templated, other].iter().all(|digest| *digest != before) && after != templated);
}

/// Gives a folder the tests' tokenizer, with this id for the end.
fn put_tokenizer(dir: &Path, end: u32) {
    let vocabulary = Vocabulary::tiny();
    let vocab: serde_json::Map<_, _> = (0..256).map(|id| (vocabulary.tokens[id].clone(), json!(id))).collect();
    let added = |id: u32, content: &str| json!({"id": id, "content": content, "special": true});
    let tokenizer = json!({
        "added_tokens": [added(256, "<|im_start|>"), added(end, "<|im_end|>")],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    let config = json!({"eos_token": "<|im_end|>", "chat_template": vocabulary.chat_template});
    std::fs::write(dir.join(TOKENIZER), tokenizer.to_string()).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

/// With its tokenizer, as a server loads it.
#[test]
fn a_folder_is_served_with_its_tokenizer() {
    let mut pieces = tiny().set("vocab_size", json!(260));
    let embedding = pieces.tensors.iter_mut().find(|tensor| tensor.0.contains("embed")).unwrap();
    (embedding.1, embedding.2) = (vec![260, 32], (0..260 * 32).map(|i| (i % 29) as f32 / 64.0).collect());
    let dir = pieces.write();
    put_tokenizer(dir.path(), 257);
    let load = || crate::model::Model::load(dir.path(), &candle_core::Device::Cpu, None);
    let (model, text) = load().unwrap();
    assert_eq!((model.vocab_size(), text.vocab_size(), text.eos()), (260, 260, 257));
    assert_eq!(text.encode("a<|im_end|>").unwrap(), [97, 257]);
    let inspected = crate::model::inspect(dir.path(), Some(16)).unwrap();
    assert!(inspected.problems.is_empty(), "{:?}", inspected.problems);
    assert_eq!(inspected.outline.held_bytes, model.held_bytes());
    put_tokenizer(dir.path(), 260);
    let refused = load().map(drop).unwrap_err().to_string();
    assert!(refused.contains("the id 260, and the embedding has 260 rows"), "{refused}");
    std::fs::remove_file(dir.path().join(TOKENIZER)).unwrap();
    let refused = load().map(drop).unwrap_err().to_string();
    assert!(refused.contains("tokenizer.json: is missing from the folder"), "{refused}");
}

/// Near the values, and what that has cost is what is said; vectors stay, and so do rows that are no blocks.
#[test]
fn a_folder_is_quantised_as_it_is_read() {
    let pieces = tiny();
    let (dir, plain) = (pieces.write(), pieces.read().unwrap());
    let read = |name: &str| {
        let quantiser = Quantiser::named(name).unwrap();
        (Folder::open(dir.path()).unwrap().read(Some(&quantiser), &mut |_, _| {}).unwrap(), quantiser.error())
    };
    let (small, error) = read("q8_0");
    let (mut errors, mut squares) = (0.0, 0.0);
    let matrices = |weights: &Weights| {
        let all = weights.linears.iter().map(|linear| &linear.matrix).chain([&weights.embedding]);
        all.flat_map(values).collect::<Vec<f32>>()
    };
    for (got, want) in matrices(&small).into_iter().zip(matrices(&plain)) {
        (errors, squares) = (errors + f64::from(got - want).powi(2), squares + f64::from(want).powi(2));
    }
    assert!(error > 0.0 && error < 0.01 && (error - (errors / squares).sqrt()).abs() < 1e-6, "{error}");
    assert_eq!((small.embedding.qtype(), &small.norms), (QType::Q8_0, &plain.norms));
    // Rows of 32 and 64 are no blocks of 256.
    let (otherwise, _) = read("Q4_K");
    assert_eq!(otherwise.embedding.qtype(), QType::Q8_0);
    let digests = [plain.digest, small.digest, otherwise.digest, read("q4_0").0.digest];
    assert!((0..4).all(|i| !digests[..i].contains(&digests[i])), "another base each");
    let refused = Quantiser::named("q9").unwrap_err().to_string();
    assert!(refused.contains("q8_0") && refused.contains("q4_k"), "{refused}");
}

#[test]
fn settings_that_compute_something_else_are_refused_by_name() {
    let scaling = |value: Value| tiny().set("rope_scaling", value);
    let refused = [
        (tiny().set("model_type", json!("mamba")), "model_type: is \"mamba\"; this version runs llama, mistral, qwen2"),
        (tiny().set("model_type", json!(3)), "model_type: is missing"),
        (tiny().set("hidden_act", json!("relu")), "hidden_act: is \"relu\""),
        (tiny().set("quantization_config", json!({"bits": 4})), "quantization_config"),
        (tiny().set("num_hidden_layers", json!(2)), "model.layers.1.self_attn.q_proj.weight: is missing"),
        (tiny().set("num_hidden_layers", json!(1_u64 << 40)), "num_hidden_layers: is 1099511627776"),
        (tiny().set("num_attention_heads", json!(-1)), "num_attention_heads: is -1"),
        (tiny().set("vocab_size", json!(25)), "model.embed_tokens.weight: has rows of 32 values, 768 in all"),
        (tiny().set("hidden_size", json!(1.5)), "hidden_size: is 1.5"),
        (tiny().set("rms_norm_eps", json!("x")), "rms_norm_eps"),
        (tiny().set("tie_word_embeddings", json!(false)), "lm_head.weight: is missing"),
        (tiny().set("sliding_window", json!(8)).set("layer_types", json!(["linear_attention"])), "layer_types"),
        (scaling(json!({"rope_type": "dynamic", "factor": 2.0})), "rope_parameters.rope_type: is \"dynamic\""),
        (scaling(json!({"rope_type": "linear"})), "rope_parameters.factor: is missing"),
        (scaling(json!({"rope_type": "linear", "factor": 0})), "rope_parameters.factor: is 0"),
        (scaling(json!({"type": "yarn", "factor": 2.0, "truncate": false})), "truncate"),
        (
            scaling(json!({"type": "longrope", "original_max_position_embeddings": 8, "short_factor": [1, 1]})),
            "short_factor",
        ),
        (
            scaling(json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0})),
            "low_freq_factor: is 4",
        ),
    ];
    for (pieces, named) in refused {
        let refusal = pieces.refusal();
        assert!(refusal.contains(named), "{named}: {refusal}");
    }
}

#[test]
fn tensors_that_do_not_fit_are_refused_by_name() {
    let change = |change: fn(&mut Vec<Tensor>)| {
        let mut pieces = tiny();
        change(&mut pieces.tensors);
        pieces.refusal()
    };
    assert!(change(|tensors| drop(tensors.remove(0))).contains("q_proj.weight: is missing"));
    assert!(change(|tensors| tensors[7].1 = vec![8, 4]).contains("input_layernorm.weight: has rows of 4 values"));
    assert!(change(|tensors| tensors[0].1 = vec![1024]).contains("q_proj.weight: has rows of 1024"));
    assert!(change(|tensors| tensors[2].2[5] = f32::NAN).contains("v_proj.weight: has a scale or a value"));
    assert!(change(|tensors| tensors[7].2[5] = f32::INFINITY).contains("input_layernorm.weight: holds inf"));
    let extra = |tensors: &mut Vec<_>| tensors.push(("model.side.weight".to_owned(), vec![1], vec![0.0]));
    assert!(change(extra).contains("model.side.weight: is a tensor that this architecture does not have"));
}

#[test]
fn files_that_lie_are_refused_by_name() {
    let shard = "model-00002-of-00003.safetensors";
    let damaged = |change: &dyn Fn(&Path)| {
        let dir = Pieces { shards: 3, ..tiny() }.write();
        change(dir.path());
        Weights::from_folder(dir.path()).map(drop).unwrap_err().to_string()
    };
    let write = |name: &'static str, bytes: Vec<u8>| move |dir: &Path| std::fs::write(dir.join(name), &bytes).unwrap();
    let said = damaged(&|dir| std::fs::remove_file(dir.join(shard)).unwrap());
    assert!(said.contains(shard) && said.contains("fetch the folder again"), "{said}");
    for keep in [0, 7, 8, 100, 2000, 2047] {
        let said = damaged(&|dir| {
            let bytes = std::fs::read(dir.join(shard)).unwrap();
            assert!(bytes.len() > 2047);
            std::fs::write(dir.join(shard), &bytes[..keep]).unwrap();
        });
        assert!(said.contains(shard) && said.contains("truncated"), "{keep}: {said}");
    }
    let said = damaged(&|dir| drop(std::fs::copy(dir.join("model-00001-of-00003.safetensors"), dir.join(shard))));
    assert!(said.contains("which another shard has too"), "{said}");
    assert!(damaged(&write(INDEX, b"[]".to_vec())).contains("holds no object"));
    assert!(damaged(&write(INDEX, b"{}".to_vec())).contains("no weight_map"));
    let index = |map: Value| json!({ "weight_map": map }).to_string().into_bytes();
    assert!(
        damaged(&write(INDEX, index(json!({"a": "../x.safetensors"})))).contains("no safetensors file of the folder")
    );
    assert!(damaged(&write(INDEX, index(json!({"a": 3})))).contains("no safetensors file of the folder"));
    assert!(damaged(&write(INDEX, index(json!({})))).contains("names 0 files"));
    assert!(damaged(&write(INDEX, index(json!({"side": shard})))).contains("does not have the tensor side"));
    let one = index(json!({"model.layers.0.mlp.gate_proj.weight": shard}));
    assert!(damaged(&write(INDEX, one)).contains("which model.safetensors.index.json does not name"));
    assert!(damaged(&write(CONFIG, b"{".to_vec())).contains("config.json: is no JSON"));
    assert!(damaged(&|dir| std::fs::remove_file(dir.join(CONFIG)).unwrap()).contains("config.json: is missing"));
    for (header, named) in [
        (json!({"t": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}), "F8_E4M3"),
        (json!({"t": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}), "the bytes 0 to 4"),
        (json!({"t": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}), "at byte"),
        (json!({"t": {"dtype": "F32", "shape": [u64::MAX, 2], "data_offsets": [0, 4]}}), "the bytes 0 to 4"),
        (json!({"t": {"dtype": "F32", "shape": [1], "data_offsets": [u64::MAX - 3, u64::MAX]}}), "the bytes"),
        (json!({"t": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), "the bytes 0 to 0"),
        (json!({"t": 3}), "nothing sound of the tensor t"),
        (json!([]), "no JSON"),
    ] {
        let header = header.to_string().into_bytes();
        let file = [&(header.len() as u64).to_le_bytes()[..], &header, &[0; 4]].concat();
        let said = damaged(&write("model-00002-of-00003.safetensors", file));
        assert!(said.contains(named), "{named}: {said}");
    }
    let long = [&u64::MAX.to_le_bytes()[..], b"{}"].concat();
    assert!(damaged(&write("model-00002-of-00003.safetensors", long)).contains("says that its header has"));
}

/// The golden bases that are here.
fn golden() -> Vec<PathBuf> {
    let all = std::env::var_os("TENORA_GOLDEN_BASES").map_or_else(|| "tests/golden/bases".into(), PathBuf::from);
    let folders = std::fs::read_dir(&all).unwrap().map(|entry| entry.unwrap().path().join("base.gguf"));
    let mut files: Vec<_> = folders.filter(|file| file.is_file()).collect();
    files.sort();
    assert!(!files.is_empty(), "{} holds no base.gguf", all.display());
    files
}

/// The name that transformers gives a tensor of a GGUF file, written out anew.
fn hf_name(architecture: &str, name: &str) -> Option<String> {
    let four_norms = architecture.starts_with("gemma");
    let of_block = [
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_qkv", "self_attn.qkv_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("attn_q_norm", "self_attn.q_norm"),
        ("attn_k_norm", "self_attn.k_norm"),
        ("attn_norm", "input_layernorm"),
        ("ffn_norm", if four_norms { "pre_feedforward_layernorm" } else { "post_attention_layernorm" }),
        ("post_attention_norm", "post_attention_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", if architecture == "phi3" { "mlp.gate_up_proj" } else { "mlp.up_proj" }),
        ("ffn_down", "mlp.down_proj"),
    ];
    match name.split('.').collect::<Vec<_>>()[..] {
        ["token_embd", what] => Some(format!("model.embed_tokens.{what}")),
        ["output", what] => Some(format!("lm_head.{what}")),
        ["output_norm", what] => Some(format!("model.norm.{what}")),
        ["blk", layer, of, what] => {
            let (_, name) = of_block.iter().find(|(gguf, _)| *gguf == of).unwrap();
            Some(format!("model.layers.{layer}.{name}.{what}"))
        }
        _ => None,
    }
}

/// What transformers would have for the settings of a base.
fn hf_config(weights: &Weights) -> Value {
    let config = &weights.config;
    let attention = &config.attention;
    let mut json = json!({
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size, "num_hidden_layers": config.layers.len(),
        "num_attention_heads": attention.heads, "num_key_value_heads": attention.kv_heads, "head_dim": attention.head_dim,
        "rms_norm_eps": f64::from(config.norm_eps), "vocab_size": config.vocab_size, "max_position_embeddings": config.context_length,
        "rope_theta": config.ropes[0].base, "tie_word_embeddings": weights.head.is_none(), "hidden_act": "silu",
        "model_type": config.architecture,
    });
    let kinds =
        config.layers.iter().map(|layer| if layer.window.is_some() { "sliding_attention" } else { "full_attention" });
    if let Some(window) = config.layers.iter().find_map(|layer| layer.window) {
        (json["sliding_window"], json["layer_types"]) = (window.into(), kinds.collect());
    }
    match config.architecture {
        "gemma2" | "gemma3" => {
            json["hidden_activation"] = "gelu_pytorch_tanh".into();
            json["query_pre_attn_scalar"] = (1.0 / (attention.scale * attention.scale)).into();
            json["final_logit_softcapping"] = config.logits.softcap.map(f64::from).into();
            json["attn_logit_softcapping"] = attention.softcap.map(f64::from).into();
            if let Some(windowed) = config.ropes.get(1) {
                json["model_type"] = "gemma3_text".into();
                json["rope_local_base_freq"] = windowed.base.into();
            }
        }
        "smollm3" => {
            json["no_rope_layers"] = config.layers.iter().map(|layer| u32::from(layer.rope.is_some())).collect()
        }
        "granite" => {
            json["embedding_multiplier"] = config.embedding_scale.into();
            json["residual_multiplier"] = config.residual_scale.into();
            json["attention_multiplier"] = attention.scale.into();
            json["logits_scaling"] = (1.0 / config.logits.scale).into();
        }
        "phi3" => json["partial_rotary_factor"] = (config.ropes[0].dims as f64 / attention.head_dim as f64).into(),
        _ => {}
    }
    let rope = &config.ropes[0];
    json["rope_scaling"] = match &rope.scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow } => json!({
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original_context, "beta_fast": beta_fast,
            "beta_slow": beta_slow,
        }),
        RopeScaling::LongRope { short, long, original_context } => json!({
            "type": "longrope", "short_factor": short, "long_factor": long, "original_max_position_embeddings": original_context,
        }),
        RopeScaling::Factors(_) => llama3_scaling(rope),
    };
    json
}

/// The settings of Llama 3's rule that give these factors.
fn llama3_scaling(rope: &RopeConfig) -> Value {
    let RopeScaling::Factors(factors) = &rope.scaling else { panic!("{rope:?}") };
    let most = factors.iter().copied().fold(0.0, f32::max);
    let all = [64, 128, 256, 512, 1024, 2048, 4096, 8192].into_iter().map(|context| {
        json!({"rope_type": "llama3", "factor": most, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": context})
    });
    let difference = |scaling: &Value| {
        let plain = RopeConfig { scaling: RopeScaling::None, ..rope.clone() };
        let mut config = tiny_config_with(plain);
        let given = json!({"model_type": "llama", "rope_scaling": scaling}).to_string();
        rope::scale(&mut config, &HfConfig::read(given.as_bytes()).unwrap()).unwrap();
        let RopeScaling::Factors(found) = &config.ropes[0].scaling else { panic!("factors") };
        found.iter().zip(factors).map(|(a, b)| (a - b).abs() / b).fold(0.0, f32::max)
    };
    all.min_by(|a, b| difference(a).total_cmp(&difference(b))).unwrap()
}

fn tiny_config_with(rope: RopeConfig) -> ModelConfig {
    ModelConfig { ropes: vec![rope], ..tiny().read().unwrap().config }
}

/// The values of a GGUF file's tensor, its rows in transformers' order.
fn dequantised(bytes: &[u8], info: &TensorInfo, heads: Option<usize>) -> Vec<f32> {
    let qtype = QType::ALL.iter().copied().find(|qtype| qtype.name() == info.storage.name).unwrap();
    let (cols, start) = (info.dims[0] as usize, info.start as usize);
    let data = &bytes[start..start + info.bytes as usize];
    let mut values = vec![0.0; info.dims.iter().product::<u64>() as usize];
    match qtype.fits(cols) {
        true => {
            for (row, out) in data.chunks_exact(qtype.row_bytes(cols)).zip(values.chunks_exact_mut(cols)) {
                qtype.dequantize_row(row, out);
            }
        }
        false => values = data.chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect(),
    }
    let Some(heads) = heads else { return values };
    // Of a bias a row is a value.
    let width = if info.dims.len() == 1 { 1 } else { cols };
    let rows: Vec<&[f32]> = values.chunks_exact(width).collect();
    let of_head = rows.len() / heads;
    let restored = rows.chunks_exact(of_head).flat_map(|head| {
        let (even, odd) = (head.iter().step_by(2), head.iter().skip(1).step_by(2));
        even.chain(odd).flat_map(|row| row.to_vec()).collect::<Vec<_>>()
    });
    restored.collect()
}

fn folder_of(file: &Path, weights: &Weights) -> Pieces {
    let bytes = std::fs::read(file).unwrap();
    let header = Header::read(&mut std::io::Cursor::new(&bytes)).unwrap();
    let config = &weights.config;
    let interleaved = ["llama", "smollm3", "granite", "mistral3"].contains(&config.architecture);
    let named =
        header.tensors.iter().filter_map(|(name, info)| Some((hf_name(config.architecture, name)?, name, info)));
    let tensors = named.map(|(hf, name, info)| {
        let heads = match name.split('.').nth(2) {
            Some("attn_q") if interleaved => Some(config.attention.heads),
            Some("attn_k") if interleaved => Some(config.attention.kv_heads),
            _ => None,
        };
        let mut values = dequantised(&bytes, info, heads);
        if config.architecture.starts_with("gemma") && name.contains("norm") {
            values.iter_mut().for_each(|weight| *weight -= 1.0);
        }
        (hf, info.dims.iter().rev().map(|dim| *dim as usize).collect(), values)
    });
    Pieces { config: hf_config(weights), tensors: tensors.collect(), dtype: "F32", shards: 2 }
}

fn close(got: &[f32], want: &[f32]) -> bool {
    got.len() == want.len() && got.iter().zip(want).all(|(got, want)| (got - want).abs() <= 1e-6 * want.abs().max(1e-3))
}

/// What is trained of a GGUF file can be kept as a folder, but where its architecture has no words here, or its file has only the factors that a
/// scaling of frequencies has made.
#[test]
fn the_settings_of_a_file_are_written_or_refused() {
    for file in golden() {
        let (weights, _) = gguf::load(&file, None, &mut |_, _| {}).unwrap();
        let unsaid = |rope: &RopeConfig| matches!(rope.scaling, RopeScaling::Factors(_) | RopeScaling::LongRope { .. });
        let refused = weights.config.architecture == "phi3" || weights.config.ropes.iter().any(unsaid);
        let written = folder::config(&weights, &file);
        assert_eq!(written.is_err(), refused, "{}: {:?}", file.display(), written.err());
    }
}

/// The same weights from a folder: every value, and every number of the configuration.
#[test]
fn folders_are_what_the_files_of_the_same_weights_are() {
    let mut seen = BTreeSet::new();
    for file in golden() {
        let (want, _) = gguf::load(&file, None, &mut |_, _| {}).unwrap();
        let name = file.display();
        let got = folder_of(&file, &want).read().unwrap_or_else(|e| panic!("{name}: {e}"));
        seen.insert(want.config.architecture);
        assert!(values(&got.embedding) == values(&want.embedding), "{name}");
        assert!(got.head.as_ref().map(values) == want.head.as_ref().map(values), "{name}");
        assert_eq!((got.linears.len(), got.norms.len()), (want.linears.len(), want.norms.len()), "{name}");
        for ((got, want), site) in got.linears.iter().zip(&want.linears).zip(&want.decoder.sites) {
            assert!(values(&got.matrix) == values(&want.matrix), "{name}: {site:?}");
            assert_eq!(got.bias, want.bias, "{name}: {site:?}");
        }
        assert!(got.norms.iter().zip(&want.norms).all(|(got, want)| close(got, want)), "{name}");
        for (got, want) in got.config.ropes.iter().zip(&want.config.ropes) {
            assert!(close(&[got.attention_factor], &[want.attention_factor]), "{name}: {got:?} {want:?}");
            for context in [1, 1 << 20] {
                assert!(close(&got.frequencies(context), &want.frequencies(context)), "{name}: {got:?} {want:?}");
            }
        }
        assert!(close(&[got.config.attention.scale], &[want.config.attention.scale]), "{name}");
        assert!(close(&[got.config.logits.scale], &[want.config.logits.scale]), "{name}");
        let mut same = want.config.clone();
        same.name.clone_from(&got.config.name);
        same.ropes.clone_from(&got.config.ropes);
        (same.attention.scale, same.logits.scale) = (got.config.attention.scale, got.config.logits.scale);
        assert_eq!(got.config, same, "{name}");
        assert_eq!(got.config.ropes.len(), want.config.ropes.len(), "{name}");
        assert_eq!(got.decoder.steps.len(), want.decoder.steps.len(), "{name}");
    }
    // All but Mistral 3, of which there is no golden base.
    let all = crate::arch::ARCHITECTURES.len() - 1;
    assert!(seen.len() == all || std::env::var_os("TENORA_GOLDEN_BASES").is_some(), "{seen:?}");
}

/// Folders of every architecture: what they say of themselves and their text goes into the file.
#[test]
fn a_file_that_is_quantised_from_a_folder_is_what_the_folder_is() {
    for file in golden() {
        let (weights, _) = gguf::load(&file, None, &mut |_, _| {}).unwrap();
        let dir = folder_of(&file, &weights).write();
        put_tokenizer(dir.path(), 257);
        std::fs::write(dir.path().join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
        assert!(sealed::tests::check_comes_back(dir.path()) <= 4.13);
    }
}
