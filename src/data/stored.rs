//! Datasets that have been uploaded: their files are read against their digest and their number of records, piece by piece, so that only
//! what is made of the records is ever in memory.

use std::fs::File;
use std::io::{self, Read as _};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::container;
use super::reader::{Findings, Reader, Sink};
use crate::error::{Error, Result};
use crate::ids::{DatasetName, Digest, Tenant};
use crate::store::{DatasetKind, DatasetRow, Store};
use crate::text::Text;
use crate::work::{blocking, spawn_uncancellable};

/// Bytes that are read at once.
const PIECE: u64 = 256 << 10;
/// Memory of a token: its id, and whether it is learnt.
const TOKEN_BYTES: u64 = 5;
/// Memory of a sequence beside the tokens of its text: those that the template adds, and where it stands in its list and the list's parts.
/// A million of the shortest records took 440 bytes each in all, with the system message of the default base's template.
const SEQUENCE_BYTES: u64 = 512;
/// What a record becomes while it is parsed, for each of its bytes, at most: a list of empty lists takes most.
const PARSED_FACTOR: u64 = 64;
/// Bytes of the longest record that is parsed so: what limit `max_record_bytes` is unless set otherwise.
const RECORD_BYTES: u64 = 1 << 20;

/// Returns the bytes of memory that inspecting a dataset, or turning it into ids, takes at most.
///
/// # Errors
/// DATASET_DAMAGED where its size is not known and its file is missing.
pub async fn memory_bytes(store: &Store, dataset: &DatasetRow) -> Result<u64> {
    let unpacked = unpacked_bytes(store, dataset).await?;
    // A preference's prompt is in both of its sequences.
    let sequences = match dataset.kind {
        DatasetKind::Sft => 1,
        DatasetKind::Preferences => 2,
    };
    // No token stands for less than a byte.
    let kept = TOKEN_BYTES.saturating_mul(unpacked).saturating_add(SEQUENCE_BYTES.saturating_mul(dataset.records));
    let parsed = PARSED_FACTOR * unpacked.min(RECORD_BYTES);
    Ok(kept.saturating_mul(sequences).saturating_add(parsed))
}

/// How large a file is unpacked; one that an earlier build stored is unpacked to know.
async fn unpacked_bytes(store: &Store, dataset: &DatasetRow) -> Result<u64> {
    if let Some(bytes) = dataset.unpacked_bytes {
        return Ok(bytes);
    }
    let file = open(store, dataset).await?;
    let packed = dataset.size_bytes;
    // Whoever reads a damaged file finds that out, and keeps nothing of it.
    blocking(move || Ok(container::unpacked_bytes(file).unwrap_or(packed))).await
}

/// Opens a dataset's file.
///
/// # Errors
/// DATASET_DAMAGED where there is none.
pub async fn open(store: &Store, dataset: &DatasetRow) -> Result<File> {
    match store.blobs().size(&dataset.blob).await? {
        Some(_) => store.blobs().open_file(&dataset.blob),
        None => Err(damaged(dataset, "it is missing")),
    }
}

/// Gives all records of a dataset's file to `sink`, in order, which must keep its counsel until the end: only then is it known that the
/// file is what was uploaded. Blocks.
///
/// # Errors
/// DATASET_DAMAGED where it is not: nothing else may ever be trained on under its name. Those of `sink`. Those of the reader: an earlier
/// build may have accepted what this one refuses, and the base may be another one since.
pub fn read(mut file: impl io::Read, dataset: &DatasetRow, text: &Arc<Text>, sink: Sink<'_>) -> Result<Findings> {
    let (mut hash, mut piece) = (Sha256::new(), Vec::new());
    let mut reader = Ok(Reader::of_stored(dataset.kind, text.clone()));
    loop {
        piece.clear();
        file.by_ref().take(PIECE).read_to_end(&mut piece).map_err(Error::at(&dataset.blob))?;
        if piece.is_empty() {
            break;
        }
        hash.update(&piece);
        reader = match reader {
            Ok(mut reader) => reader.push(&piece, sink).map(|()| reader),
            Err(Error::Cancelled) => return Err(Error::Cancelled),
            // It may be damage, as the digest will tell.
            failed => failed,
        };
    }
    let digest = Digest::from(hash);
    if digest != dataset.digest {
        return Err(damaged(dataset, &format!("its digest is {digest}, not {}", dataset.digest)));
    }
    let finished = reader.and_then(|reader| reader.finish(sink));
    let (records, findings) = finished.map_err(|error| in_dataset(&dataset.name, error))?;
    // The same content may read as other records in another build: then they are not those that were accepted.
    if records != dataset.records {
        return Err(damaged(dataset, &format!("it holds {records} records, not {}", dataset.records)));
    }
    Ok(findings)
}

/// Says of which dataset an error is.
pub fn in_dataset(name: &DatasetName, error: Error) -> Error {
    match error {
        Error::Invalid { reason, field, message } => {
            Error::Invalid { reason, field: "dataset".into(), message: format!("{name}: {field}: {message}") }
        }
        other => other,
    }
}

/// Whether a dataset's file is what was uploaded.
pub async fn is_sound(store: &Store, dataset: &DatasetRow) -> Result<bool> {
    let (blobs, dataset) = (store.blobs().clone(), dataset.clone());
    let hash = move || {
        let file = blobs.open_file(&dataset.blob)?;
        Ok::<_, Error>(Digest::of_reader(file).map_err(Error::at(&dataset.blob))? == dataset.digest)
    };
    Ok(blocking(hash).await.unwrap_or(false))
}

fn damaged(dataset: &DatasetRow, why: &str) -> Error {
    tracing::error!(dataset = %dataset.name, blob = dataset.blob, why, "a dataset's file is damaged");
    let message = "its stored file is damaged or missing; upload the same content under the same name to repair it, delete the dataset, or \
                   restore the file from a backup";
    Error::precondition("DATASET_DAMAGED", &dataset.name, message)
}

/// Deletes a dataset and its content. Refused (`DATASET_IN_USE`) while a job that has not ended uses it.
pub async fn delete_dataset(store: &Store, tenant: &Tenant, name: &DatasetName) -> Result<()> {
    tenant.check_owns(&name.tenant)?;
    let (store, name) = (store.clone(), name.clone());
    let delete = async move {
        let blob = store.delete_dataset(&name).await?;
        store.collect_blobs(&[blob]).await;
        tracing::info!(tenant = %name.tenant, dataset = %name, "dataset deleted");
        Ok(())
    };
    spawn_uncancellable(delete).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Limits;
    use crate::data::tests::{gzip, store};
    use crate::data::{Length, Upload, encode};
    use crate::request::TooLong;

    async fn uploaded(store: &Store, tenant: &Tenant, id: &str, file: Vec<u8>) -> DatasetRow {
        let (name, limits) = (DatasetName::new(tenant.id(), id).unwrap(), Limits::default());
        let kind = DatasetKind::Sft;
        let mut upload = Upload::begin(store, &Text::tiny(), &limits, tenant, name, kind, "", false).await.unwrap();
        upload.write(file).await.unwrap();
        upload.finish().await.unwrap().0
    }

    #[tokio::test]
    async fn memory_is_counted_by_what_a_file_is_unpacked() {
        let (_folder, store, tenant) = store().await;
        let lines = "{\"prompt\":\"a\",\"completion\":\"b\"}\n".repeat(5000);
        let plain = uploaded(&store, &tenant, "plain", lines.clone().into()).await;
        let packed = uploaded(&store, &tenant, "packed", gzip(&lines)).await;
        assert!(packed.size_bytes * 100 < plain.size_bytes);
        let bytes = memory_bytes(&store, &plain).await.unwrap();
        assert_eq!(memory_bytes(&store, &packed).await.unwrap(), bytes);
        // What is kept of such records, list and list's part included, fits.
        let file = open(&store, &packed).await.unwrap();
        let length = Length { max: 100, too_long: TooLong::Refuse };
        let encoded = encode(file, &packed, &Text::tiny(), length, || Ok(())).unwrap();
        let crate::data::Examples::Sft(chats) = encoded.examples else { panic!() };
        let held =
            |chat: &crate::text::Conversation| 5 * chat.ids.capacity() + 2 * size_of_val(chat) + 4 * size_of::<usize>();
        assert!(chats.iter().map(held).sum::<usize>() as u64 <= bytes);

        // As an earlier build left them.
        store.execute("UPDATE datasets SET unpacked_bytes = NULL").await;
        for name in [&plain.name, &packed.name] {
            let row = store.get_dataset(name).await.unwrap();
            assert_eq!((row.unpacked_bytes, memory_bytes(&store, &row).await.unwrap()), (None, bytes));
        }
    }

    #[tokio::test]
    async fn reading_ends_where_it_is_told_to() {
        let (_folder, store, tenant) = store().await;
        let row = uploaded(&store, &tenant, "d", "{\"prompt\":\"a\",\"completion\":\"b\"}\n".repeat(9).into()).await;
        let asked = std::cell::Cell::new(0);
        let go_on = || {
            asked.set(asked.get() + 1);
            if asked.get() == 3 { Err(Error::Cancelled) } else { Ok(()) }
        };
        let length = Length { max: 100, too_long: TooLong::Refuse };
        let encoded = encode(open(&store, &row).await.unwrap(), &row, &Text::tiny(), length, go_on);
        assert!(matches!(encoded, Err(Error::Cancelled)), "{encoded:?}");
        assert_eq!(asked.get(), 3);
    }
}
