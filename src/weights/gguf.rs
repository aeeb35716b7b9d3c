//! Reads a GGUF file of the llama architecture, fail-closed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use half::f16;

use super::header::{Header, TensorInfo, Value};
use super::vocabulary::vocabulary;
use super::{Block, LlamaConfig, Weights};
use crate::error::{Error, Result};
use crate::ids::Digest;
use crate::kernels::blocks::{BLOCK, QType};
use crate::kernels::packed::PackedMatrix;
use crate::request::Target;
use crate::text::Vocabulary;

/// Most tokens of a context: the angles of all positions are held in memory.
const MAX_CONTEXT: usize = 1 << 20;

fn unsupported(field: impl Into<String>, message: impl Into<String>) -> Error {
    Error::invalid_because("UNSUPPORTED_BASE", field, message)
}

/// What cannot be read of a base's file; [`load`] adds the path.
pub(super) fn unreadable(error: std::io::Error) -> Error {
    Error::invalid_because("BASE_UNREADABLE", "base", error.to_string())
}

pub(super) fn load(path: &Path) -> Result<(Weights, Vocabulary)> {
    let shown = path.display();
    let open = |e: std::io::Error| Error::invalid_because("BASE_UNREADABLE", "base", format!("{shown}: {e}"));
    let digest = File::open(path).and_then(Digest::of_reader).map_err(open)?;
    let file = BufReader::new(File::open(path).map_err(open)?);
    let name = path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
    read(file, name, digest).map_err(|error| match error {
        Error::Invalid { reason, field, message } => {
            Error::Invalid { reason, field, message: format!("{message} ({shown})") }
        }
        other => other,
    })
}

/// Reads a base of this name and digest.
pub(super) fn read(mut file: impl Read + Seek, name: String, digest: Digest) -> Result<(Weights, Vocabulary)> {
    let header = Header::read(&mut file)?;
    let metadata = Metadata(&header.metadata);
    let config = config(&metadata, name)?;
    let vocabulary = vocabulary(&header.metadata)?;
    let mut tensors = Tensors { names: header.tensors.keys().cloned().collect(), infos: &header.tensors, file };
    let embedding = tensors.matrix("token_embd.weight", config.vocab, config.width)?;
    let mut blocks = Vec::new();
    for layer in 0..config.layers {
        blocks.push(block(&mut tensors, &config, layer)?);
    }
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

fn block(tensors: &mut Tensors<'_, impl Read + Seek>, config: &LlamaConfig, layer: usize) -> Result<Block> {
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
struct Tensors<'a, R> {
    infos: &'a BTreeMap<String, TensorInfo>,
    file: R,
    /// Not yet taken.
    names: BTreeSet<String>,
}

impl<R: Read + Seek> Tensors<'_, R> {
    /// The bytes of a tensor of this shape, `cols` innermost, which the header has found to be in the file.
    fn take(&mut self, name: &str, (rows, cols): (usize, usize)) -> Result<(&'static str, Vec<u8>)> {
        let info = self.infos.get(name).ok_or_else(|| unsupported(name, "is missing"))?;
        self.names.remove(name);
        let values = info.dims.iter().product::<u64>();
        if info.dims.first() != Some(&(cols as u64)) || Some(values) != (rows as u64).checked_mul(cols as u64) {
            let message = format!(
                "has rows of {} values, {values} in all, where the metadata and the list of tokens say {rows} rows of {cols}",
                info.dims.first().unwrap_or(&0)
            );
            return Err(unsupported(name, message));
        }
        self.file.seek(SeekFrom::Start(info.start)).map_err(unreadable)?;
        let mut data = vec![0; usize::try_from(info.bytes).map_err(Error::internal)?];
        self.file.read_exact(&mut data).map_err(unreadable)?;
        Ok((info.storage.name, data))
    }

    fn matrix_bytes(&mut self, name: &str, rows: usize, cols: usize) -> Result<Tensor> {
        let (storage, data) = self.take(name, (rows, cols))?;
        let qtype = match storage {
            "Q4_0" => QType::Q4_0,
            "Q4_1" => QType::Q4_1,
            "Q8_0" => QType::Q8_0,
            other => {
                return Err(unsupported(
                    name,
                    format!("is stored as {other}; Q4_0, Q4_1 and Q8_0 matrices are served"),
                ));
            }
        };
        if let Some(block) = broken_block(qtype, &data) {
            let row = block * BLOCK / cols;
            return Err(unsupported(
                name,
                format!("has a scale that is not a number, in row {row}: the file is damaged"),
            ));
        }
        Ok(Tensor { qtype, data })
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<PackedMatrix> {
        let tensor = self.matrix_bytes(name, rows, cols)?;
        Ok(PackedMatrix::pack(tensor.qtype, rows, cols, &tensor.data))
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        let values: Vec<f32> = match self.take(name, (1, len))? {
            ("F32", data) => data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            (other, _) => return Err(unsupported(name, format!("is stored as {other}; F32 was expected"))),
        };
        match values.iter().position(|x| !x.is_finite()) {
            Some(at) => Err(unsupported(name, format!("holds {} at element {at}: the file is damaged", values[at]))),
            None => Ok(values),
        }
    }
}

/// The first block whose scale or minimum is not a finite number.
fn broken_block(qtype: QType, data: &[u8]) -> Option<usize> {
    let halves = if qtype == QType::Q4_1 { 2 } else { 1 };
    let finite = |bytes: &[u8]| f16::from_le_bytes([bytes[0], bytes[1]]).is_finite();
    data.chunks_exact(qtype.row_bytes(BLOCK)).position(|block| !block[..2 * halves].chunks_exact(2).all(finite))
}

/// Metadata with its keys in the errors.
struct Metadata<'a>(&'a BTreeMap<String, Value>);

impl Metadata<'_> {
    fn get(&self, key: &str) -> Result<&Value> {
        self.0.get(key).ok_or_else(|| unsupported(key, "is missing from the file's metadata"))
    }

    fn integer(&self, key: &str) -> Result<usize> {
        let value = match self.get(key)? {
            Value::Integer(value) => usize::try_from(*value).ok(),
            _ => None,
        };
        value.filter(|v| *v < 1 << 31).ok_or_else(|| unsupported(key, "is not a sane number"))
    }

    /// A number over 0.
    fn positive(&self, key: &str) -> Result<f32> {
        match self.get(key)? {
            Value::Float(value) if (*value as f32).is_finite() && *value as f32 > 0.0 => Ok(*value as f32),
            other => Err(unsupported(key, format!("is {other:?}; must be a number over 0"))),
        }
    }

    fn text(&self, key: &str) -> Result<&str> {
        match self.get(key)? {
            Value::Text(text) => std::str::from_utf8(text).map_err(|_| unsupported(key, "is no UTF-8")),
            _ => Err(unsupported(key, "is not a text")),
        }
    }

    fn texts(&self, key: &str) -> Result<Vec<String>> {
        self.get(key)?.texts().ok_or_else(|| unsupported(key, "is not a list of texts in UTF-8"))
    }
}

fn config(metadata: &Metadata<'_>, name: String) -> Result<LlamaConfig> {
    let architecture = metadata.text("general.architecture")?;
    if architecture != "llama" {
        return Err(unsupported("general.architecture", format!("is {architecture:?}; this version runs \"llama\"")));
    }
    if metadata.0.contains_key("llama.rope.scaling.type") {
        match metadata.text("llama.rope.scaling.type")? {
            "none" => {}
            kind => {
                let message = format!("is {kind:?}; scaled RoPE is not supported");
                return Err(unsupported("llama.rope.scaling.type", message));
            }
        }
    }
    let heads = metadata.integer("llama.attention.head_count")?;
    let width = metadata.integer("llama.embedding_length")?;
    let config = LlamaConfig {
        name,
        layers: metadata.integer("llama.block_count")?,
        width,
        heads,
        kv_heads: metadata.integer("llama.attention.head_count_kv")?,
        head_dim: metadata.integer("llama.rope.dimension_count")?,
        ffn: metadata.integer("llama.feed_forward_length")?,
        vocab: metadata.texts("tokenizer.ggml.tokens")?.len(),
        context: metadata.integer("llama.context_length")?,
        rope_base: metadata.positive("llama.rope.freq_base")?,
        rms_eps: metadata.positive("llama.attention.layer_norm_rms_epsilon")?,
    };
    let sane =
        [config.layers, width, heads, config.kv_heads, config.ffn, config.vocab, config.context].iter().all(|n| *n > 0)
            && heads.is_multiple_of(config.kv_heads)
            && config.head_dim.is_multiple_of(8)
            && config.head_dim > 0;
    if !sane {
        return Err(unsupported("llama.*", format!("the numbers do not fit together: {config:?}")));
    }
    if config.context > MAX_CONTEXT {
        let message = format!("is {}; contexts of up to {MAX_CONTEXT} tokens are served", config.context);
        return Err(unsupported("llama.context_length", message));
    }
    Ok(config)
}
