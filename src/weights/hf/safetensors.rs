//! The header of a safetensors file, read within bounds: eight bytes of length, JSON (name, dtype, shape, place), and the tensors' bytes end to
//! end up to the end of the file.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::arch::unsupported;
use crate::error::{Error, Result};
use crate::weights::gguf::unreadable;
use crate::weights::header::{Storage, TensorInfo};

/// Most bytes of a header.
const MAX_HEADER_BYTES: u64 = 64 << 20;

/// What the header says of a tensor.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// A refusal of a broken file.
pub(super) fn broken(file: &str, what: impl std::fmt::Display) -> Error {
    let message = format!("{what}: the file is damaged or truncated; fetch it again");
    Error::invalid_because("BASE_UNREADABLE", file, message)
}

/// Reads which tensors a file has; it is the base's `number`th.
///
/// # Errors
/// BASE_UNREADABLE where it is truncated or damaged, UNSUPPORTED_BASE for a dtype that is not known.
pub(super) fn read_header(
    file: &mut (impl Read + Seek),
    number: usize,
    name: &str,
) -> Result<(BTreeMap<String, TensorInfo>, u64)> {
    let file_bytes = file.seek(SeekFrom::End(0)).map_err(unreadable)?;
    file.seek(SeekFrom::Start(0)).map_err(unreadable)?;
    let mut len = [0; 8];
    file.read_exact(&mut len).map_err(|_| broken(name, "ends before its header"))?;
    let len = u64::from_le_bytes(len);
    if len > MAX_HEADER_BYTES || len > file_bytes - 8 {
        return Err(broken(name, format!("says that its header has {len} bytes, and {} follow", file_bytes - 8)));
    }
    let mut header = vec![0; len as usize];
    file.read_exact(&mut header).map_err(unreadable)?;
    let entries: Map<String, Value> =
        serde_json::from_slice(&header).map_err(|e| broken(name, format!("has a header that is no JSON ({e})")))?;
    let mut tensors = BTreeMap::new();
    for (tensor, entry) in entries.into_iter().filter(|(key, _)| key != "__metadata__") {
        let entry = Entry::deserialize(entry)
            .map_err(|e| broken(name, format!("says nothing sound of the tensor {tensor} ({e})")))?;
        let info = info(name, &tensor, &entry, number, 8 + len)?;
        tensors.insert(tensor, info);
    }
    check_places(name, &tensors, 8 + len, file_bytes)?;
    Ok((tensors, file_bytes))
}

fn info(file: &str, tensor: &str, entry: &Entry, number: usize, start: u64) -> Result<TensorInfo> {
    let kind = match entry.dtype.as_str() {
        "F32" => Storage::of(0),
        "F16" => Storage::of(1),
        "BF16" => Storage::of(30),
        _ => None,
    };
    let storage = kind.ok_or_else(|| {
        let dtype: String = entry.dtype.chars().take(40).collect();
        unsupported(tensor, format!("is stored as {dtype}; F32, F16 and BF16 can be read"))
    })?;
    let values = entry.shape.iter().try_fold(1_u64, |values, dim| values.checked_mul(*dim));
    let bytes = values.and_then(|values| values.checked_mul(storage.value_bytes()));
    let [from, to] = entry.data_offsets;
    if bytes.is_none_or(|bytes| bytes == 0 || from.checked_add(bytes) != Some(to)) {
        let what = format!("gives the tensor {tensor} of shape {:?} the bytes {from} to {to}", entry.shape);
        return Err(broken(file, what));
    }
    let start = start.checked_add(from).ok_or_else(|| broken(file, format!("has {tensor} beyond its end")))?;
    let dims = entry.shape.iter().rev().copied().collect();
    Ok(TensorInfo { dims, storage, file: number, start, bytes: to - from })
}

/// Refuses tensors that overlap, leave holes or end elsewhere than the file.
fn check_places(file: &str, tensors: &BTreeMap<String, TensorInfo>, start: u64, file_bytes: u64) -> Result<()> {
    let mut by_place: Vec<_> = tensors.iter().collect();
    by_place.sort_by_key(|(_, info)| info.start);
    let mut end = start;
    for (tensor, info) in by_place {
        if info.start != end {
            return Err(broken(file, format!("has the tensor {tensor} at byte {}, and not at {end}", info.start)));
        }
        end = info.start.saturating_add(info.bytes);
    }
    if end == file_bytes {
        return Ok(());
    }
    Err(broken(file, format!("has {file_bytes} bytes, and its tensors end at byte {end}")))
}
