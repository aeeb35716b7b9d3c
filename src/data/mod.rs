//! Datasets: upload ([`ingest`]); from bytes to records ([`reader`], over [`container`] and [`records`]); records as ids ([`mod@encode`]); which
//! records a step sees ([`batching`]); and a quality report ([`report`]).

mod batching;
mod container;
mod encode;
mod ingest;
mod json;
mod problems;
mod reader;
mod records;
mod report;

pub use batching::{Batches, Split};
pub use encode::{Encoded, Examples, Length, encode};
pub use ingest::Upload;
pub use reader::{Findings, Numbered, Reader};
pub use records::{Chat, Pair, Preference, Record, Shape};
pub use report::{Question, Report, Shown, inspect};

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::ids::{DatasetName, Digest, Tenant};
use crate::store::{DatasetRow, Store};
use crate::text::Text;
use crate::work::{blocking, spawn_uncancellable};

/// What a dataset that is read whole takes in memory for each byte: its bytes, its records, and what is made of them.
const MEMORY_FACTOR: u64 = 4;

/// Returns the bytes of memory that reading a dataset whole takes.
pub fn memory_bytes(dataset: &DatasetRow) -> u64 {
    MEMORY_FACTOR.saturating_mul(dataset.size_bytes)
}

/// Returns all records of a dataset, in order.
///
/// # Errors
/// DATASET_DAMAGED where its file is not what was uploaded. Those of the reader: an earlier build may have accepted what this one refuses, and the base may be another one since.
pub async fn read(store: &Store, text: &Arc<Text>, dataset: &DatasetRow) -> Result<Vec<Numbered>> {
    let bytes = content(store, dataset).await?;
    let (reader, row) = (Reader::of_stored(dataset.kind, text.clone()), dataset.clone());
    let read = move || {
        let mut records = Vec::new();
        read_all(reader, &bytes, &mut |numbered| records.push(numbered))
            .map_err(|error| in_dataset(&row.name, error))?;
        check_count(&row, records.len() as u64)?;
        Ok(records)
    };
    blocking(read).await
}

/// Reads a whole file.
fn read_all(mut reader: Reader, bytes: &[u8], sink: &mut dyn FnMut(Numbered)) -> Result<Findings> {
    reader.push(bytes, sink)?;
    Ok(reader.finish(sink)?.1)
}

/// Says of which dataset an error is.
fn in_dataset(name: &DatasetName, error: Error) -> Error {
    match error {
        Error::Invalid { reason, field, message } => {
            Error::Invalid { reason, field: "dataset".into(), message: format!("{name}: {field}: {message}") }
        }
        other => other,
    }
}

/// The bytes of a dataset, as they were hashed when it was uploaded.
///
/// # Errors
/// DATASET_DAMAGED where its file is another or gone: nothing else may ever be trained on under its name.
async fn content(store: &Store, dataset: &DatasetRow) -> Result<Vec<u8>> {
    let Some(bytes) = store.blobs().get(&dataset.blob).await? else {
        return Err(damaged(dataset, "it is missing"));
    };
    let (digest, bytes) = blocking(move || Ok((Digest::of(&bytes), bytes))).await?;
    if digest == dataset.digest {
        return Ok(bytes);
    }
    Err(damaged(dataset, &format!("its digest is {digest}, not {}", dataset.digest)))
}

/// Whether a dataset's file is what was uploaded. Reads it in pieces.
async fn is_sound(store: &Store, dataset: &DatasetRow) -> Result<bool> {
    let (blobs, dataset) = (store.blobs().clone(), dataset.clone());
    let hash = move || {
        let file = blobs.open_file(&dataset.blob)?;
        Ok::<_, Error>(Digest::of_reader(file).map_err(Error::at(&dataset.blob))? == dataset.digest)
    };
    Ok(blocking(hash).await.unwrap_or(false))
}

/// The same content may read as other records in another build: then they are not those that were accepted.
fn check_count(dataset: &DatasetRow, records: u64) -> Result<()> {
    if records == dataset.records {
        return Ok(());
    }
    Err(damaged(dataset, &format!("it holds {records} records, not {}", dataset.records)))
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
mod tests;
