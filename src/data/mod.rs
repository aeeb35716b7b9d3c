//! Datasets: upload ([`ingest`]), the shapes of records ([`records`]), which records a step sees ([`batching`]), and a quality
//! report ([`report`]).

mod batching;
mod ingest;
mod records;
mod report;

pub use batching::{Order, Split};
pub use ingest::Upload;
pub use records::{Chat, Examples, Pair, Preference, Record};
pub use report::{Report, inspect};

use crate::error::{Error, Result};
use crate::ids::{DatasetName, Tenant};
use crate::store::{DatasetRow, Store};

/// All records of a dataset, in order.
pub async fn read(store: &Store, dataset: &DatasetRow) -> Result<Vec<Record>> {
    let bytes = store.blobs().get(&dataset.blob).await?;
    let parse = |line: &[u8]| {
        Record::parse(dataset.kind, line).map_err(|e| Error::internal(format!("{} as stored: {e}", dataset.name)))
    };
    lines(&bytes).map(parse).collect()
}

/// Deletes a dataset and its content. Refused (`DATASET_IN_USE`) while a job that has not ended uses it.
pub async fn delete_dataset(store: &Store, tenant: &Tenant, name: &DatasetName) -> Result<()> {
    tenant.check_owns(&name.tenant)?;
    store.delete_dataset(name).await
}

/// The lines that hold a record; blank ones do not.
fn lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split(|byte| *byte == b'\n').filter(|line| !is_blank(line))
}

fn is_blank(line: &[u8]) -> bool {
    line.iter().all(u8::is_ascii_whitespace)
}
