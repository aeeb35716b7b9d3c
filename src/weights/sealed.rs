//! A base that was quantised once and for all (`tenora models quantize`): a GGUF file with a seal, which stands for itself.
//!
//! It is a GGUF file of version 3 (`header.rs` says how one lies) with GGUF's names of the tensors, and besides:
//!
//! - **Text and settings** are the source's own. Of a GGUF file they are its metadata; of a Hugging Face folder its files of JSON and its
//!   template, each as a text under `tenora.folder.NAME`.
//! - **Tensors** lie as they are served: rows of q and k in Hugging Face's order, norms and biases as float32. A tensor of the type `TNF4`
//!   (NF4, see `kernels::format`) is, for a matrix of n blocks of 64 values: a float32 offset; n / 256 float32 nested scales, rounded up; then
//!   block by block a byte that is the scale's code and 32 bytes of codes, the first of two in the high nibble.
//! - `tenora.quantized.format` names the format that was asked for. `tenora.quantized.digest` is the base's: that of the source as
//!   `serve --quantize` names it, so that what was trained on one serves on the other.
//! - **The last 32 bytes** are the SHA-256 of all before them. A file that is cut or damaged is refused.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::gguf::{Gguf, naming, unreadable};
use super::header::{ALIGNMENT_KEY, Header, TensorInfo, Value, padding, write_header};
use super::plan::Form;
use super::stream::Progress;
use super::{Weights, hf};
use crate::arch::decoder::Slot;
use crate::error::{Error, Result};
use crate::ids::Digest;
use crate::kernels::format::QType;
use crate::kernels::packed::PackedMatrix;

/// What a file with a seal says of itself.
const FORMAT: &str = "tenora.quantized.format";
const DIGEST: &str = "tenora.quantized.digest";

/// What the names of a folder's files have before them.
const FOLDER: &str = "tenora.folder.";

/// Bytes of the checksum that ends the file.
const CHECKSUM_BYTES: u64 = 32;

const DAMAGED: &str = "the file is damaged or truncated; copy it again, or make it again with `tenora models quantize`";

/// What a file says of its own soundness.
#[derive(Debug)]
pub(super) struct Seal {
    /// Bytes before the checksum.
    pub(super) bytes: u64,
    checksum: [u8; CHECKSUM_BYTES as usize],
    base: Digest,
}

impl Seal {
    /// Reads a file's seal; `None` where the file is none of ours.
    pub(super) fn read(header: &Header, file: &mut (impl Read + Seek)) -> Result<Option<Self>> {
        let damaged = |what: &str| Error::invalid_because("BASE_UNREADABLE", DIGEST, format!("{what}: {DAMAGED}"));
        let base = match header.metadata.get(DIGEST) {
            None => return Ok(None),
            Some(Value::Text(text)) => std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()),
            Some(_) => None,
        };
        let base = base.ok_or_else(|| damaged("is no digest"))?;
        let file_bytes = file.seek(SeekFrom::End(0)).map_err(unreadable)?;
        let end = |tensor: &TensorInfo| tensor.start + tensor.bytes;
        let tensors_end = header.tensors.values().map(end).max().unwrap_or_default();
        let bytes = file_bytes.checked_sub(CHECKSUM_BYTES).filter(|bytes| tensors_end <= *bytes);
        let bytes = bytes.ok_or_else(|| damaged("stands in a file without its checksum"))?;
        file.seek(SeekFrom::Start(bytes)).map_err(unreadable)?;
        let mut checksum = [0; CHECKSUM_BYTES as usize];
        file.read_exact(&mut checksum).map_err(unreadable)?;
        Ok(Some(Self { bytes, checksum, base }))
    }

    /// Gives the base's digest where that of the bytes before the checksum is `found`.
    pub(super) fn check(&self, found: Digest) -> Result<Digest> {
        if found.as_ref() == self.checksum {
            return Ok(self.base);
        }
        Err(Error::invalid_because("BASE_UNREADABLE", "checksum", format!("does not fit the file: {DAMAGED}")))
    }
}

/// One of a folder's files of JSON, or its template, of a file with a seal that was made of a folder.
pub(super) fn folder_file<'m>(metadata: &'m BTreeMap<String, Value>, name: &str) -> Option<&'m [u8]> {
    match metadata.get(&format!("{FOLDER}{name}")) {
        Some(Value::Text(text)) if metadata.contains_key(DIGEST) => Some(text),
        _ => None,
    }
}

/// Returns what a file says in GGUF's keys, without what belongs to its tensors' places or to a seal; `None` where it says it otherwise.
pub(super) fn plain_metadata(header: Header) -> Option<BTreeMap<String, Value>> {
    let Header { mut metadata, .. } = header;
    if folder_file(&metadata, hf::CONFIG).is_some() {
        return None;
    }
    [ALIGNMENT_KEY, FORMAT, DIGEST].iter().for_each(|key| drop(metadata.remove(*key)));
    Some(metadata)
}

/// What a base's own files say of it, as entries of a file with a seal, and whether they are a folder's.
fn entries(path: &Path) -> Result<(BTreeMap<String, Value>, bool)> {
    if path.is_dir() {
        let files = hf::read_texts(path)?.into_iter();
        return Ok((files.map(|(name, text)| (format!("{FOLDER}{name}"), Value::Text(text))).collect(), true));
    }
    let mut metadata = Header::read(&mut BufReader::new(File::open(path).map_err(unreadable)?))?.metadata;
    metadata.remove(ALIGNMENT_KEY);
    Ok((metadata, false))
}

/// A base that has been quantised, to be written into a file of ours.
#[derive(Debug)]
pub struct Quantised {
    metadata: BTreeMap<String, Value>,
    weights: Weights,
    of_folder: bool,
}

impl Quantised {
    /// Reads a base and quantises it as `serve --quantize` does. `format`: GGUF's name of one, or nf4; `progress` hears how much has been read.
    ///
    /// # Errors
    /// As of [`Weights::load`].
    pub fn read(source: &Path, format: &str, progress: &mut Progress<'_>) -> Result<Self> {
        let (mut metadata, of_folder) = entries(source).map_err(naming(source))?;
        let (weights, _) = Weights::load(source, Some(format), progress)?;
        metadata.insert(FORMAT.to_owned(), Value::Text(format.to_lowercase().into_bytes()));
        metadata.insert(DIGEST.to_owned(), Value::Text(weights.digest.to_string().into_bytes()));
        Ok(Self { metadata, weights, of_folder })
    }

    /// Writes the file. A tensor at a time is in memory beside the base.
    ///
    /// # Errors
    /// The file's.
    pub fn write(&self, file: &mut impl Write) -> std::io::Result<()> {
        let mut file = Sealing { inner: file, hasher: Sha256::new(), at: 0 };
        let tensors = self.tensors();
        let described = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.dims(), tensor.qtype()));
        file.write_all(&write_header(&self.metadata, described))?;
        for (_, tensor) in &tensors {
            file.write_all(padding(file.at))?;
            file.write_all(&tensor.bytes())?;
        }
        let Sealing { inner, hasher, .. } = file;
        inner.write_all(&hasher.finalize())?;
        inner.flush()
    }

    /// All tensors with their names.
    fn tensors(&self) -> Vec<(String, Tensor<'_>)> {
        let Weights { config, decoder, embedding, linears, norms, head, .. } = &self.weights;
        let linears = linears.iter().enumerate().flat_map(|(id, linear)| {
            let bias = linear.bias.as_ref().map(|bias| (Slot::Bias(id), Tensor::Floats(bias)));
            [(Slot::Matrix(id), Tensor::Matrix(&linear.matrix))].into_iter().chain(bias)
        });
        let norms = norms.iter().enumerate().map(|(id, norm)| (Slot::Norm(id), Tensor::Floats(norm)));
        let head = head.iter().map(|head| (Slot::Head, Tensor::Matrix(head)));
        let factors = config.ropes.first().map(|rope| rope.scaling.named_factors()).unwrap_or_default();
        let factors = factors.into_iter().map(|(kind, factors)| (Slot::Factors(kind), Tensor::Floats(factors)));
        let all = [(Slot::Embedding, Tensor::Matrix(embedding))].into_iter().chain(head).chain(linears);
        let form = Gguf::Sealed { of_folder: self.of_folder };
        let named = |(slot, tensor)| Some((form.tensor_name(slot, decoder)?, tensor));
        all.chain(norms).chain(factors).filter_map(named).collect()
    }
}

/// A tensor to be written.
enum Tensor<'a> {
    Matrix(&'a PackedMatrix),
    Floats(&'a [f32]),
}

impl Tensor<'_> {
    fn qtype(&self) -> QType {
        match self {
            Self::Matrix(matrix) => matrix.qtype(),
            Self::Floats(_) => QType::F32,
        }
    }

    /// The innermost first.
    fn dims(&self) -> Vec<u64> {
        match self {
            Self::Matrix(matrix) => vec![matrix.cols() as u64, matrix.rows() as u64],
            Self::Floats(values) => vec![values.len() as u64],
        }
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Matrix(matrix) => matrix.unpack(),
            Self::Floats(values) => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    }
}

/// Hashes what it writes.
struct Sealing<'a, W> {
    inner: &'a mut W,
    hasher: Sha256,
    at: u64,
}

impl<W: Write> Write for Sealing<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let len = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..len]);
        self.at += len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
pub(super) mod tests;
