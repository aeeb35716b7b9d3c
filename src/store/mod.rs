//! The catalogue (SQLite) and the blobs (files). All SQL of the crate is here.
//!
//! A blob is written before the row that owns it and deleted after that row is gone, so a process that is killed at any point leaves
//! at worst blobs without an owner; [`Store::open`] collects those and half-written files. Catalogue and blobs are one process's
//! at a time: a second one on the same folder is refused.

mod adapters;
mod blobs;
mod catalogue;
mod datasets;
mod documents;
mod jobs;
mod keys;
mod locks;
mod requests;
mod retention;
mod rows;
mod sweep;
mod tenants;
#[cfg(test)]
mod tests;
mod usage;
mod watch;

use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub use adapters::{AdapterRow, LiveMemory, NewVersionRow, VersionRow};
pub use blobs::{BlobUpload, Blobs};
pub use datasets::{DatasetBefore, DatasetKind, DatasetRow, NewDataset, taken};
pub use jobs::{JobEnd, JobRow, NewJob, RESULT_MANIFEST, StoredEvent, held_error};
pub use keys::{KeyOwner, KeyRow, NewKey};
pub use locks::BlobGuard;
pub use requests::RequestKey;
pub use retention::Retention;
pub use rows::{Listed, Page, random_id};
pub use tenants::{PolicyRow, TenantChange, TenantCounts, TenantRow};
pub use usage::{UsageDelta, UsageRow};
pub use watch::{DiskWrite, Watch, When};

use futures::future::BoxFuture;

use crate::error::{Error, Result};

/// How long a process that starts waits for one that is ending to let go of the data folder.
const FOLDER_WAIT: Duration = Duration::from_secs(5);

/// How a data folder is opened.
#[derive(Debug, Clone)]
pub struct Options {
    /// Starts over blobs that the catalogue does not know, and moves them to the trash.
    pub adopt_orphans: bool,
    /// How long what was swept stays in the trash.
    pub trash: Duration,
    /// How long rows are kept that nothing needs any more.
    pub retention: Retention,
    /// Longest wait for SQLite's write lock.
    pub busy_timeout: Duration,
    /// For tests.
    pub watch: Option<Arc<dyn Watch>>,
}

impl Default for Options {
    fn default() -> Self {
        let trash = Duration::from_secs(30 * 86_400);
        let (retention, busy_timeout) = (Retention::default(), Duration::from_secs(10));
        Self { adopt_orphans: false, trash, retention, busy_timeout, watch: None }
    }
}

/// The catalogue and the blobs of one data folder. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    catalogue: catalogue::Catalogue,
    blobs: Blobs,
    locks: locks::Locks,
    usage: usage::UsageBook,
    /// Held while the store lives; the system releases it when the process dies.
    _folder: File,
}

impl Store {
    /// Opens a folder as a server does that was told nothing else.
    pub fn open(data_dir: &Path) -> BoxFuture<'_, Result<Self>> {
        Self::open_with(data_dir, Options::default())
    }

    /// Opens or makes the catalogue and the blobs below `data_dir`, migrates, and sweeps half uploads and blobs without an owner.
    ///
    /// # Errors
    /// DATA_DIR_IN_USE where another process has it; UNKNOWN_BLOBS where its blobs are not this catalogue's.
    pub fn open_with(data_dir: &Path, options: Options) -> BoxFuture<'_, Result<Self>> {
        Box::pin(Self::open_and_sweep(data_dir, options))
    }

    async fn open_and_sweep(data_dir: &Path, options: Options) -> Result<Self> {
        tokio::fs::create_dir_all(data_dir).await.map_err(|e| unusable(data_dir, e))?;
        let folder = lock_folder(data_dir, FOLDER_WAIT).await?;
        sweep::check_before_open(data_dir, &options).await?;
        let catalogue = catalogue::Catalogue::open(data_dir, options.busy_timeout, options.watch.clone()).await?;
        let blobs = Blobs::open(&data_dir.join("blobs"), options.watch.clone())?;
        let (locks, usage) = (locks::Locks::default(), usage::UsageBook::default());
        let store = Self { inner: Arc::new(Inner { catalogue, blobs, locks, usage, _folder: folder }) };
        store.sweep(data_dir, &options).await?;
        tokio::spawn(usage::keep_flushing(Arc::downgrade(&store.inner)));
        tokio::spawn(retention::keep_forgetting(Arc::downgrade(&store.inner), data_dir.to_owned(), options));
        Ok(store)
    }

    /// The files beside the catalogue.
    pub fn blobs(&self) -> &Blobs {
        &self.inner.blobs
    }

    /// Runs SQL, for tests that break something.
    #[cfg(test)]
    pub(crate) async fn execute(&self, sql: &'static str) {
        sqlx::raw_sql(sql).execute(self.writer()).await.unwrap();
    }

    /// Deletes those blobs that no row owns and of which no [`BlobGuard`] is held, whose holder then answers for it. What cannot be deleted
    /// now stays until the next start. A row that is gone is gone on the disk: its commit was synced.
    pub async fn collect_blobs(&self, blobs: &[String]) {
        for blob in blobs {
            if let Err(error) = self.collect(blob).await {
                tracing::warn!(%error, blob, "a blob that may have no owner stays until the next start");
            }
        }
    }

    async fn collect(&self, blob: &str) -> Result<()> {
        let Some(_alone) = self.inner.locks.try_exclusive(blob) else { return Ok(()) };
        let owned: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM versions WHERE blob = ?1 UNION ALL SELECT 1 FROM datasets WHERE blob = ?1
             UNION ALL SELECT 1 FROM jobs WHERE result = ?1)",
        )
        .bind(blob)
        .fetch_one(self.pool())
        .await?;
        if owned { Ok(()) } else { self.blobs().delete(blob).await }
    }
}

/// What a start says where the data folder or a file in it cannot be used.
fn unusable(path: &Path, error: impl std::fmt::Display) -> Error {
    let message = format!("{error}; see that this user may write there, or choose another --data-dir");
    Error::precondition("DATA_DIR_UNUSABLE", path.display(), message)
}

/// Takes the folder for this process, waiting for the one before at most so long.
async fn lock_folder(data_dir: &Path, wait: Duration) -> Result<File> {
    let lock = data_dir.join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&lock).map_err(|e| unusable(&lock, e))?;
    let deadline = tokio::time::Instant::now() + wait;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(TryLockError::WouldBlock) => {
                return Err(Error::precondition(
                    "DATA_DIR_IN_USE",
                    data_dir.display(),
                    "another process serves this folder; stop it or choose another --data-dir",
                ));
            }
            Err(TryLockError::Error(e)) => return Err(unusable(&lock, e)),
        }
    }
}
