//! A base's GGUF file once more, its tensors in float32 and some of them trained: what llama.cpp opens, and the reader beside this reads. Settings
//! and text are the file's own, so nothing has to be found words for.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Write};
use std::path::Path;

use super::Weights;
use super::folder::Written;
use super::gguf::{Gguf, unreadable};
use super::header::{Header, Value, padding, write_header};
use super::plan::{Form as _, interleaved_heads, restored_order};
use super::sealed::plain_metadata;
use crate::arch::Architecture;
use crate::arch::decoder::Slot;
use crate::error::{Error, Result};
use crate::kernels::format::QType;

/// What a file says of the format that most of its tensors have; 0 is float32.
const FILE_TYPE: &str = "general.file_type";

/// Writes the file: `base` with the values of `trained`, a folder of the same base. A tensor at a time is in memory.
///
/// # Errors
/// NO_GGUF_FORM where the base is no GGUF file, or is gone; DISK_FULL.
pub fn write(weights: &Weights, mut trained: Written, base: &Path, to: &mut impl Write) -> Result<()> {
    let failed = |e| Error::at("model.gguf")(e);
    let mut metadata = metadata(weights, base)?;
    metadata.insert(FILE_TYPE.to_owned(), Value::Integer(0));
    let named = |slot| Some((slot, Gguf::Plain.tensor_name(slot, &weights.decoder)?));
    let factors = weights.config.ropes.first().map(|rope| rope.scaling.named_factors()).unwrap_or_default();
    let slots = weights.slots().chain(factors.iter().map(|(kind, _)| Slot::Factors(*kind)));
    let tensors: Vec<(Slot, String)> = slots.filter_map(named).collect();
    let described = tensors.iter().map(|(slot, name)| {
        let dims = match slot {
            Slot::Factors(kind) => {
                factors.iter().filter(|(of, _)| of == kind).map(|(_, values)| values.len()).collect()
            }
            slot => weights.dims(*slot),
        };
        // GGUF names the innermost first.
        (name.as_str(), dims.into_iter().rev().map(|dim| dim as u64).collect(), QType::F32)
    });
    let header = write_header(&metadata, described.collect::<Vec<_>>().into_iter());
    let mut at = header.len() as u64;
    to.write_all(&header).map_err(failed)?;
    for (slot, _) in &tensors {
        let values = match slot {
            Slot::Factors(kind) => factors.iter().find(|(of, _)| of == kind).map(|(_, values)| values.to_vec()),
            slot => Some(as_in_gguf(weights, *slot, trained.values(weights, *slot)?)?),
        };
        let bytes: Vec<u8> = values.unwrap_or_default().iter().flat_map(|x| x.to_le_bytes()).collect();
        for part in [padding(at), &bytes] {
            to.write_all(part).map_err(failed)?;
            at += part.len() as u64;
        }
    }
    to.write_all(padding(at)).and_then(|()| to.flush()).map_err(failed)
}

/// What the base's file says of itself, in GGUF's keys.
fn metadata(weights: &Weights, base: &Path) -> Result<BTreeMap<String, Value>> {
    let no_form = |why: String| {
        let message = format!("{why}; export the Hugging Face folder and convert that");
        Error::precondition("NO_GGUF_FORM", &weights.config.name, message)
    };
    let none =
        || no_form("was not read from a GGUF file, whose settings and tokenizer such a file would have".to_owned());
    if base.is_dir() {
        return Err(none());
    }
    let read = || Header::read(&mut BufReader::new(File::open(base).map_err(unreadable)?));
    // The file may have gone since.
    let header = read().map_err(|e| no_form(format!("was read from a file that cannot be read again ({e})")))?;
    plain_metadata(header).ok_or_else(none)
}

/// Puts the rows of q and k in GGUF's order.
fn as_in_gguf(weights: &Weights, slot: Slot, values: Vec<f32>) -> Result<Vec<f32>> {
    let architecture = Architecture::named(weights.config.architecture)?;
    let heads = interleaved_heads(architecture, &weights.config, &weights.decoder, slot);
    let dims = weights.dims(slot);
    let (rows, cols) = (dims.first().copied().unwrap_or(0), dims.get(1).copied().unwrap_or(1));
    if heads == 0 {
        return Ok(values);
    }
    let (head_rows, mut moved) = (rows / heads, vec![0.0; values.len()]);
    for (to, from) in moved.chunks_exact_mut(head_rows * cols).zip(values.chunks_exact(head_rows * cols)) {
        for (row, place) in restored_order(head_rows).enumerate() {
            to[place * cols..][..cols].copy_from_slice(&from[row * cols..][..cols]);
        }
    }
    Ok(moved)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::folder;
    use crate::weights::testing::File as Tiny;

    #[test]
    fn a_file_has_what_the_folder_has_and_the_base_s_own_text() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.gguf");
        std::fs::write(&base, Tiny::tiny().bytes()).unwrap();
        let (weights, vocabulary) = Weights::load(&base, None, &mut |_, _| {}).unwrap();
        let moved = |slot: Slot| (slot, weights.values(slot).iter().map(|x| x + 0.25).collect::<Vec<f32>>());
        let copies: BTreeMap<_, _> =
            [Slot::Embedding, Slot::Matrix(0), Slot::Matrix(1), Slot::Norm(0)].map(moved).into();
        let mut tensors = tempfile::tempfile().unwrap();
        let mut put = |name: &str, bytes: Vec<u8>| match name {
            folder::TENSORS => tensors.write_all(&bytes).map_err(Error::internal),
            _ => Ok(()),
        };
        folder::write(&weights, &copies, &base, &mut put).unwrap();
        let exported = dir.path().join("exported.gguf");
        write(
            &weights,
            Written::open(tensors.try_clone().unwrap()).unwrap(),
            &base,
            &mut File::create(&exported).unwrap(),
        )
        .unwrap();
        let (read, text) = Weights::load(&exported, None, &mut |_, _| {}).unwrap();
        assert_eq!(format!("{text:?}"), format!("{vocabulary:?}"));
        assert!(read.slots().eq(weights.slots()));
        for slot in weights.slots() {
            let expected = copies.get(&slot).cloned().unwrap_or_else(|| weights.values(slot));
            assert_eq!(read.values(slot), expected, "{slot:?}");
        }
        let of_folder = write(&weights, Written::open(tensors).unwrap(), dir.path(), &mut Vec::new()).unwrap_err();
        assert!(of_folder.to_string().contains("Hugging Face"), "{of_folder}");
    }
}
