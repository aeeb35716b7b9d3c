//! Reads a GGUF file, fail-closed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use super::header::{Header, TensorInfo};
use super::metadata::Metadata;
use super::vocabulary::vocabulary;
use super::{LinearWeights, Weights};
use crate::arch::config::ModelConfig;
use crate::arch::decoder::{Decoder, NormKind, NormSpec, Site, SiteSpec};
use crate::arch::rope::{RopeConfig, RopeScaling};
use crate::arch::settings::{ROPE_ORIGINAL_CONTEXT, Settings};
use crate::arch::{Architecture, unsupported};
use crate::error::{Error, Result};
use crate::ids::Digest;
use crate::kernels::format::QType;
use crate::kernels::packed::PackedMatrix;
use crate::request::Target;
use crate::text::Vocabulary;

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
    let metadata = Metadata::new(&header.metadata)?;
    let vocabulary = vocabulary(&header.metadata)?;
    let mut config = ModelConfig::read(metadata.architecture, &metadata, name, vocabulary.tokens.len())?;
    let decoder = Decoder::new(&config);
    let mut tensors = Tensors { names: header.tensors.keys().cloned().collect(), infos: &header.tensors, file };
    let original_context = Settings::integer(&metadata, ROPE_ORIGINAL_CONTEXT)?.unwrap_or(config.context_length);
    for rope in &mut config.ropes {
        tensors.rope_factors(rope, original_context)?;
    }
    let (vocab, hidden) = (config.vocab_size, config.hidden_size);
    let embedding = tensors.matrix("token_embd.weight", vocab, hidden)?;
    let linears = decoder.sites.iter().map(|site| tensors.linear(site, &config, metadata.architecture));
    let linears = linears.collect::<Result<_>>()?;
    let norms = decoder.norms.iter().map(|norm| tensors.vector(&norm_name(norm), norm.width));
    let norms = norms.collect::<Result<_>>()?;
    let head = match tensors.names.contains("output.weight") {
        true => Some(tensors.matrix("output.weight", vocab, hidden)?),
        false => None,
    };
    if let Some(name) = tensors.names.first() {
        return Err(unsupported(name, "is a tensor that this architecture does not have"));
    }
    Ok((Weights { config, decoder, digest, embedding, linears, norms, head }, vocabulary))
}

/// What GGUF calls a linear layer of a block.
fn linear_name(target: Target) -> &'static str {
    match target {
        Target::QProj => "attn_q",
        Target::KProj => "attn_k",
        Target::VProj => "attn_v",
        Target::QkvProj => "attn_qkv",
        Target::OProj => "attn_output",
        Target::GateProj => "ffn_gate",
        // One that is gate and up in one has up's name.
        Target::UpProj | Target::GateUpProj => "ffn_up",
        Target::DownProj => "ffn_down",
    }
}

/// What GGUF calls a norm's weights.
fn norm_name(norm: &NormSpec) -> String {
    let kind = match norm.kind {
        NormKind::Attention => "attn_norm",
        NormKind::Query => "attn_q_norm",
        NormKind::Key => "attn_k_norm",
        NormKind::PostAttention => "post_attention_norm",
        NormKind::FeedForward => "ffn_norm",
        NormKind::PostFeedForward => "post_ffw_norm",
        NormKind::Final => "output_norm",
    };
    match norm.layer {
        Some(layer) => format!("blk.{layer}.{kind}.weight"),
        None => format!("{kind}.weight"),
    }
}

/// GGUF holds the rows of q and k for interleaved RoPE: row 2j + p of a head is Hugging Face's row p * half + j. Gives the file's rows in
/// Hugging Face's order. Whole rows move, so no value changes, and adapters need no inverse.
fn hf_rows(rows: usize, heads: usize) -> impl Iterator<Item = usize> {
    let head_rows = rows / heads;
    let half = head_rows / 2;
    (0..rows).map(move |row| row / head_rows * head_rows + 2 * (row % head_rows % half) + row % head_rows / half)
}

fn restored_row_order(tensor: &Tensor, rows: usize, cols: usize, heads: usize) -> Vec<u8> {
    let bytes = tensor.qtype.row_bytes(cols);
    hf_rows(rows, heads).flat_map(|row| &tensor.data[row * bytes..][..bytes]).copied().collect()
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
        let Some(qtype) = QType::ALL.iter().copied().find(|qtype| qtype.name() == storage) else {
            return Err(unsupported(name, format!("is stored as {storage}; {} are served", served())));
        };
        if !qtype.fits(cols) {
            let message =
                format!("has rows of {cols} values; as {storage} it must be a multiple of {}", qtype.block_values());
            return Err(unsupported(name, message));
        }
        if let Some(block) = qtype.broken_block(&data) {
            let row = block * qtype.block_values() / cols;
            return Err(unsupported(
                name,
                format!("has a scale or a value that is not a number, in row {row}: the file is damaged"),
            ));
        }
        Ok(Tensor { qtype, data })
    }

    /// The tensors of a linear layer, in Hugging Face's order of rows.
    fn linear(&mut self, spec: &SiteSpec, config: &ModelConfig, architecture: &Architecture) -> Result<LinearWeights> {
        let Site { layer, target } = spec.site;
        let name = |what: &str| format!("blk.{layer}.{}.{what}", linear_name(target));
        let mut tensor = self.matrix_bytes(&name("weight"), spec.outputs, spec.inputs)?;
        let mut bias = None;
        if architecture.biased.contains(&target) || self.names.contains(&name("bias")) {
            bias = Some(self.vector(&name("bias"), spec.outputs)?);
        }
        let heads = match target {
            Target::QProj if architecture.interleaved => config.attention.heads,
            Target::KProj if architecture.interleaved => config.attention.kv_heads,
            _ => 0,
        };
        if heads > 0 {
            tensor.data = restored_row_order(&tensor, spec.outputs, spec.inputs, heads);
            bias = bias.map(|bias| hf_rows(spec.outputs, heads).map(|row| bias[row]).collect());
        }
        let matrix = PackedMatrix::pack(tensor.qtype, spec.outputs, spec.inputs, &tensor.data);
        Ok(LinearWeights { matrix, bias })
    }

    /// Reads the factors of frequencies, where the file has some.
    fn rope_factors(&mut self, rope: &mut RopeConfig, context: usize) -> Result<()> {
        let half = rope.dims / 2;
        let mut factors = |name: &str| -> Result<Option<Vec<f32>>> {
            let read = self.names.contains(name).then(|| self.vector(name, half)).transpose()?;
            match read.as_ref().is_some_and(|factors| factors.iter().any(|factor| *factor <= 0.0)) {
                true => Err(unsupported(name, "holds a factor that is not over 0: the file is damaged")),
                false => Ok(read),
            }
        };
        let all = factors("rope_freqs.weight")?;
        match (factors("rope_factors_short.weight")?, factors("rope_factors_long.weight")?) {
            (Some(short), Some(long)) => {
                rope.scaling = RopeScaling::LongRope { short, long, original_context: context };
            }
            (None, None) => rope.scaling = all.map_or(rope.scaling.clone(), RopeScaling::Factors),
            _ => return Err(unsupported("rope_factors", "has only one of short and long: the file is damaged")),
        }
        Ok(())
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

/// The formats of matrices that are served, by name.
fn served() -> String {
    QType::ALL.iter().map(|qtype| qtype.name()).collect::<Vec<_>>().join(", ")
}
