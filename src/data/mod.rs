//! Datasets: upload ([`ingest`]), the shapes of records ([`records`]), which records a step sees ([`batching`]), and a quality
//! report ([`report`]).

mod batching;
mod ingest;
mod records;
mod report;

pub use batching::{Batches, Split};
pub use ingest::Upload;
pub use records::{Chat, Examples, Pair, Preference, Record};
pub use report::{Report, inspect};

use crate::error::{Error, Result};
use crate::ids::{DatasetName, Tenant};
use crate::store::{DatasetRow, Store, uninterrupted};

/// All records of a dataset, in order.
pub async fn read(store: &Store, dataset: &DatasetRow) -> Result<Vec<Record>> {
    let bytes = store.blobs().get(&dataset.blob).await?;
    let (kind, name) = (dataset.kind, dataset.name.clone());
    let parse =
        move |line: &[u8]| Record::parse(kind, line).map_err(|e| Error::internal(format!("{name} as stored: {e}")));
    tokio::task::spawn_blocking(move || lines(&bytes).map(parse).collect()).await.map_err(Error::internal)?
}

/// Deletes a dataset and its content. Refused (`DATASET_IN_USE`) while a job that has not ended uses it.
pub async fn delete_dataset(store: &Store, tenant: &Tenant, name: &DatasetName) -> Result<()> {
    tenant.check_owns(&name.tenant)?;
    let (store, name) = (store.clone(), name.clone());
    let delete = async move {
        let blob = store.delete_dataset(&name).await?;
        store.collect_blobs(&[blob]).await;
        Ok(())
    };
    uninterrupted(delete).await
}

/// The lines that hold a record; blank ones do not.
fn lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split(|byte| *byte == b'\n').filter(|line| !is_blank(line))
}

fn is_blank(line: &[u8]) -> bool {
    line.iter().all(u8::is_ascii_whitespace)
}
