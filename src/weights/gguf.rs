//! Reads a GGUF file of the llama architecture, fail-closed.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, Value};
use sha2::{Digest as _, Sha256};

use super::{Block, LlamaConfig, Weights};
use crate::error::{Error, Result};
use crate::ids::Digest;
use crate::kernels::blocks::QType;
use crate::kernels::packed::PackedMatrix;
use crate::request::Target;
use crate::text::Vocabulary;

/// GGUF token types that are control tokens or defined by the user.
const CONTROL_TYPES: [i64; 2] = [3, 4];

fn unsupported(field: impl Into<String>, message: impl Into<String>) -> Error {
    Error::invalid_because("UNSUPPORTED_BASE", field, message)
}

pub(super) fn load(path: &Path) -> Result<(Weights, Vocabulary)> {
    let shown = path.display();
    let open = |e: std::io::Error| Error::invalid_because("BASE_UNREADABLE", "base", format!("{shown}: {e}"));
    let digest = digest_of(path).map_err(open)?;
    let mut file = BufReader::new(File::open(path).map_err(open)?);
    let content = Content::read(&mut file)
        .map_err(|e| Error::invalid_because("BASE_UNREADABLE", "base", format!("{shown} is not a GGUF file: {e}")))?;
    let config = config(&Metadata(&content.metadata), path)?;
    let vocabulary = vocabulary(&Metadata(&content.metadata))?;
    if vocabulary.tokens.len() != config.vocab {
        return Err(unsupported("tokenizer.ggml.tokens", "has another length than the embedding"));
    }
    let mut tensors = Tensors { names: content.tensor_infos.keys().cloned().collect(), content: &content, file };
    let embedding = tensors.matrix("token_embd.weight", config.vocab, config.width)?;
    let blocks = (0..config.layers).map(|layer| block(&mut tensors, &config, layer)).collect::<Result<_>>()?;
    let final_norm = tensors.vector("output_norm.weight", config.width)?;
    let head = match tensors.names.contains("output.weight") {
        true => Some(tensors.matrix("output.weight", config.vocab, config.width)?),
        false => None,
    };
    if let Some(name) = tensors.names.first() {
        return Err(unsupported(name, "is a tensor that this architecture does not have"));
    }
    Ok((Weights { config, digest, embedding, blocks, final_norm, head }, vocabulary))
}

fn digest_of(path: &Path) -> std::io::Result<Digest> {
    let mut hasher = Sha256::new();
    std::io::copy(&mut File::open(path)?, &mut hasher)?;
    Ok(hasher.into())
}

fn block(tensors: &mut Tensors<'_>, config: &LlamaConfig, layer: usize) -> Result<Block> {
    let mut linear = |target: Target| -> Result<PackedMatrix> {
        let (cols, rows) = config.dims(target);
        let (name, heads) = match target {
            Target::QProj => ("attn_q", config.heads),
            Target::KProj => ("attn_k", config.kv_heads),
            Target::VProj => ("attn_v", 0),
            Target::OProj => ("attn_output", 0),
            Target::GateProj => ("ffn_gate", 0),
            Target::UpProj => ("ffn_up", 0),
            Target::DownProj => ("ffn_down", 0),
        };
        let mut tensor = tensors.matrix_bytes(&format!("blk.{layer}.{name}.weight"), rows, cols)?;
        if heads > 0 {
            tensor.data = restored_row_order(&tensor, rows, cols, heads);
        }
        Ok(PackedMatrix::pack(tensor.qtype, rows, cols, &tensor.data))
    };
    let [q, k, v, o, gate, up, down] = Target::ALL.map(&mut linear);
    Ok(Block {
        linears: [q?, k?, v?, o?, gate?, up?, down?],
        attn_norm: tensors.vector(&format!("blk.{layer}.attn_norm.weight"), config.width)?,
        ffn_norm: tensors.vector(&format!("blk.{layer}.ffn_norm.weight"), config.width)?,
    })
}

/// GGUF holds the rows of q and k for interleaved RoPE: row 2j + p of a head is Hugging Face's row p * half + j. Whole rows move,
/// so no value changes, and adapters need no inverse.
fn restored_row_order(tensor: &Tensor, rows: usize, cols: usize, heads: usize) -> Vec<u8> {
    let bytes = tensor.qtype.row_bytes(cols);
    let head_rows = rows / heads;
    let half = head_rows / 2;
    let mut restored = Vec::with_capacity(tensor.data.len());
    for head in 0..heads {
        for row in 0..head_rows {
            let from = head * head_rows + 2 * (row % half) + row / half;
            restored.extend_from_slice(&tensor.data[from * bytes..][..bytes]);
        }
    }
    restored
}

/// A tensor's bytes as the file has them.
struct Tensor {
    qtype: QType,
    data: Vec<u8>,
}

/// The tensors of a file; each is taken once.
struct Tensors<'a> {
    content: &'a Content,
    file: BufReader<File>,
    /// Not yet taken.
    names: BTreeSet<String>,
}

impl Tensors<'_> {
    /// The bytes of a tensor of this shape, `cols` innermost; `row_bytes` says how many a row of its type has, or why it cannot be read.
    fn take(
        &mut self,
        name: &str,
        (rows, cols): (usize, usize),
        row_bytes: impl Fn(GgmlDType) -> Result<usize>,
    ) -> Result<(GgmlDType, Vec<u8>)> {
        let info = self.content.tensor_infos.get(name).ok_or_else(|| unsupported(name, "is missing"))?;
        self.names.remove(name);
        let row_bytes = row_bytes(info.ggml_dtype)?;
        if info.shape.elem_count() != rows * cols || info.shape.dims().last() != Some(&cols) {
            return Err(unsupported(
                name,
                format!("has shape {:?} where [{rows}, {cols}] was expected", info.shape.dims()),
            ));
        }
        let start = self.content.tensor_data_offset.saturating_add(info.offset);
        let mut data = Vec::new();
        let wanted = (rows * row_bytes) as u64;
        self.file.seek(SeekFrom::Start(start))?;
        // Reading through `take` allocates as the file gives, not as the header claims.
        if self.file.by_ref().take(wanted).read_to_end(&mut data)? as u64 != wanted {
            return Err(unsupported(name, "ends beyond the file: the file is truncated"));
        }
        Ok((info.ggml_dtype, data))
    }

    fn matrix_bytes(&mut self, name: &str, rows: usize, cols: usize) -> Result<Tensor> {
        let served = |dtype| match dtype {
            GgmlDType::Q4_0 => Ok(QType::Q4_0),
            GgmlDType::Q4_1 => Ok(QType::Q4_1),
            GgmlDType::Q8_0 => Ok(QType::Q8_0),
            other => Err(unsupported(name, format!("is stored as {other:?}; Q4_0, Q4_1 and Q8_0 matrices are served"))),
        };
        let row_bytes = |dtype| match served(dtype)? {
            qtype if qtype.fits(cols) => Ok(qtype.row_bytes(cols)),
            qtype => Err(unsupported(name, format!("has rows of {cols} values, which {qtype:?} cannot hold"))),
        };
        let (dtype, data) = self.take(name, (rows, cols), row_bytes)?;
        Ok(Tensor { qtype: served(dtype)?, data })
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<PackedMatrix> {
        let tensor = self.matrix_bytes(name, rows, cols)?;
        Ok(PackedMatrix::pack(tensor.qtype, rows, cols, &tensor.data))
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let row_bytes = |dtype| match dtype {
            GgmlDType::F32 => Ok(size_of::<f32>() * len),
            other => Err(unsupported(name, format!("is stored as {other:?}; F32 was expected"))),
        };
        let (_, data) = self.take(name, (1, len), row_bytes)?;
        Ok(data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }
}

/// Metadata with its keys in the errors.
struct Metadata<'a>(&'a HashMap<String, Value>);

impl Metadata<'_> {
    fn get(&self, key: &str) -> Result<&Value> {
        self.0.get(key).ok_or_else(|| unsupported(key, "is missing from the file's metadata"))
    }

    fn integer(&self, key: &str) -> Result<usize> {
        let value = integer(self.get(key)?).and_then(|v| usize::try_from(v).ok());
        value.filter(|v| *v < 1 << 31).ok_or_else(|| unsupported(key, "is not a sane number"))
    }

    fn float(&self, key: &str) -> Result<f32> {
        self.get(key)?.to_f32().map_err(|_| unsupported(key, "is not a float"))
    }

    fn text(&self, key: &str) -> Result<&str> {
        self.get(key)?.to_string().map(String::as_str).map_err(|_| unsupported(key, "is not a string"))
    }

    fn list<T>(&self, key: &str, map: impl Fn(&Value) -> Option<T>) -> Result<Vec<T>> {
        let values = self.get(key)?.to_vec().map_err(|_| unsupported(key, "is not a list"))?;
        values.iter().map(map).collect::<Option<_>>().ok_or_else(|| unsupported(key, "holds an entry of a wrong type"))
    }
}

fn integer(value: &Value) -> Option<i64> {
    match value {
        Value::U8(v) => Some((*v).into()),
        Value::I8(v) => Some((*v).into()),
        Value::U16(v) => Some((*v).into()),
        Value::I16(v) => Some((*v).into()),
        Value::U32(v) => Some((*v).into()),
        Value::I32(v) => Some((*v).into()),
        Value::U64(v) => i64::try_from(*v).ok(),
        Value::I64(v) => Some(*v),
        _ => None,
    }
}

fn config(metadata: &Metadata<'_>, path: &Path) -> Result<LlamaConfig> {
    let architecture = metadata.text("general.architecture")?;
    if architecture != "llama" {
        return Err(unsupported("general.architecture", format!("is {architecture:?}; this version runs \"llama\"")));
    }
    if let Some(kind) =
        metadata.0.get("llama.rope.scaling.type").and_then(|v| v.to_string().ok()).filter(|k| *k != "none")
    {
        return Err(unsupported("llama.rope.scaling.type", format!("is {kind:?}; scaled RoPE is not supported")));
    }
    let heads = metadata.integer("llama.attention.head_count")?;
    let width = metadata.integer("llama.embedding_length")?;
    let config = LlamaConfig {
        name: path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned()),
        layers: metadata.integer("llama.block_count")?,
        width,
        heads,
        kv_heads: metadata.integer("llama.attention.head_count_kv")?,
        head_dim: metadata.integer("llama.rope.dimension_count")?,
        ffn: metadata.integer("llama.feed_forward_length")?,
        vocab: metadata.list("tokenizer.ggml.tokens", |_| Some(()))?.len(),
        context: metadata.integer("llama.context_length")?,
        rope_base: metadata.float("llama.rope.freq_base")?,
        rms_eps: metadata.float("llama.attention.layer_norm_rms_epsilon")?,
    };
    let sane =
        [config.layers, width, heads, config.kv_heads, config.ffn, config.vocab, config.context].iter().all(|n| *n > 0)
            && heads.is_multiple_of(config.kv_heads)
            && config.head_dim.is_multiple_of(8)
            && config.head_dim > 0;
    if !sane {
        return Err(unsupported("llama.*", format!("the numbers do not fit together: {config:?}")));
    }
    Ok(config)
}

fn vocabulary(metadata: &Metadata<'_>) -> Result<Vocabulary> {
    let model = metadata.text("tokenizer.ggml.model")?;
    if model != "gpt2" {
        return Err(unsupported(
            "tokenizer.ggml.model",
            format!("is {model:?}; byte-level BPE (\"gpt2\") can be read"),
        ));
    }
    let types = metadata.list("tokenizer.ggml.token_type", integer)?;
    let control = types.iter().enumerate().filter(|(_, kind)| CONTROL_TYPES.contains(kind)).map(|(id, _)| id as u32);
    Ok(Vocabulary {
        control: control.collect(),
        tokens: metadata.list("tokenizer.ggml.tokens", |v| v.to_string().ok().cloned())?,
        merges: metadata.list("tokenizer.ggml.merges", |v| {
            v.to_string().ok()?.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned()))
        })?,
        pre: metadata.text("tokenizer.ggml.pre")?.to_owned(),
        end_of_turn: metadata.integer("tokenizer.ggml.eos_token_id")? as u32,
        bos: metadata.integer("tokenizer.ggml.bos_token_id").ok().map(|id| id as u32),
        chat_template: metadata.text("tokenizer.chat_template")?.to_owned(),
    })
}
