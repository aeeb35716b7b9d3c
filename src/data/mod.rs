//! Datasets: upload ([`ingest`]); from bytes to records ([`reader`], over [`container`] and [`records`]); records as ids ([`encode`]); which
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
use crate::ids::{DatasetName, Tenant};
use crate::store::{DatasetRow, Store, uninterrupted};
use crate::text::Text;

/// Returns all records of a dataset, in order.
///
/// # Errors
/// Those of the reader: an earlier build may have accepted what this one refuses, and the base may be another one since.
pub async fn read(store: &Store, text: &Arc<Text>, dataset: &DatasetRow) -> Result<Vec<Numbered>> {
    let bytes = store.blobs().get(&dataset.blob).await?;
    let (reader, name) = (Reader::of_stored(dataset.kind, text.clone()), dataset.name.clone());
    let read = move || {
        let mut records = Vec::new();
        read_all(reader, &bytes, &mut |numbered| records.push(numbered)).map_err(|error| in_dataset(&name, error))?;
        Ok(records)
    };
    tokio::task::spawn_blocking(read).await.map_err(Error::internal)?
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
    uninterrupted(delete).await
}

#[cfg(test)]
mod tests;
