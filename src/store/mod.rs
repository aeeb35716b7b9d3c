//! The catalogue (SQLite) and the blobs (files). All SQL of the crate is here.
//!
//! A blob is written before the row that owns it and deleted after that row is gone, so a process that is killed at any point leaves
//! at worst blobs without an owner; [`Store::open`] collects those and half-written files. Catalogue and blobs are one process's
//! at a time: a second one on the same folder is refused.

mod adapters;
mod blobs;
mod datasets;
mod documents;
mod jobs;
mod keys;
mod locks;
mod rows;
mod tenants;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{SqlSafeStr, Sqlite, Transaction};

pub use adapters::{AdapterRow, LiveMemory, NewVersionRow, VersionRow};
pub use blobs::{BlobUpload, Blobs};
pub use datasets::{DatasetKind, DatasetRow, NewDataset};
pub use jobs::{JobEnd, JobRow, NewJob, StoredEvent, held_error};
pub use keys::{KeyOwner, KeyRow, NewKey};
pub use locks::Custody;
pub use rows::{Listed, Page, fresh_token};
pub use tenants::{PolicyRow, TenantChange, TenantCounts, TenantRow, UsageDelta, UsageRow};

use crate::error::{Error, Result};

/// Longest wait for SQLite's write lock.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a process that starts waits for one that is ending to let go of the data folder.
const FOLDER_WAIT: Duration = Duration::from_secs(5);
/// Connections: readers do not block each other in WAL mode.
const CONNECTIONS: u32 = 4;

/// The schema, in the order it grew. Applied ones never change; a change is a new file at the end.
const MIGRATIONS: &[(i64, &str, &str)] = &[
    (1, "init", include_str!("migrations/0001_init.sql")),
    (2, "deleted tenants", include_str!("migrations/0002_deleted_tenants.sql")),
    (3, "tenant weights", include_str!("migrations/0003_tenant_weights.sql")),
    (5, "training results", include_str!("migrations/0005_training_results.sql")),
];

/// The catalogue and the blobs of one data folder. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    pool: SqlitePool,
    blobs: Blobs,
    locks: locks::Locks,
    /// Held while the store lives; the system releases it when the process dies.
    _folder: File,
}

impl Store {
    /// Opens or makes the catalogue and the blobs below `data_dir`, migrates, and collects half uploads and blobs without an owner.
    /// DATA_DIR_IN_USE where another process has it.
    pub async fn open(data_dir: &Path) -> Result<Self> {
        tokio::fs::create_dir_all(data_dir).await.map_err(|e| unusable(data_dir, e))?;
        let folder = lock_folder(data_dir, FOLDER_WAIT).await?;
        // NORMAL in WAL mode: a commit survives the death of the process (it is in the system's page cache); power loss may undo the
        // last commits but never tears one. Blobs are synced before their rows, and a deletion's commit before its blobs go.
        let catalogue = data_dir.join("tenora.db");
        let options = SqliteConnectOptions::new()
            .filename(&catalogue)
            .create_if_missing(true)
            .foreign_keys(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .busy_timeout(BUSY_TIMEOUT);
        let pool = SqlitePoolOptions::new().max_connections(CONNECTIONS).connect_with(options).await;
        let pool = pool.map_err(|e| unusable(&catalogue, e))?;
        migrator().run(&pool).await.map_err(|e| unusable(&catalogue, e))?;
        let blobs = Blobs::open(&data_dir.join("blobs"))?;
        let store = Self { inner: Arc::new(Inner { pool, blobs, locks: locks::Locks::default(), _folder: folder }) };
        store.blobs().sweep(&store.owned_blobs().await?).await?;
        Ok(store)
    }

    /// The files beside the catalogue.
    pub fn blobs(&self) -> &Blobs {
        &self.inner.blobs
    }

    /// Runs SQL, for tests that break something.
    #[cfg(test)]
    pub(crate) async fn execute(&self, sql: &'static str) {
        sqlx::raw_sql(sql).execute(self.pool()).await.unwrap();
    }

    fn pool(&self) -> &SqlitePool {
        &self.inner.pool
    }

    /// A transaction that writes. It takes the write lock at once, so that it never fails half way for another writer; dropped
    /// without a commit it leaves nothing.
    async fn write(&self) -> Result<Transaction<'static, Sqlite>> {
        Ok(self.pool().begin_with("BEGIN IMMEDIATE").await?)
    }

    /// Every blob that a row owns.
    async fn owned_blobs(&self) -> Result<HashSet<String>> {
        let rows = sqlx::query_scalar("SELECT blob FROM versions UNION SELECT blob FROM datasets UNION SELECT result FROM jobs WHERE result IS NOT NULL")
            .fetch_all(self.pool())
            .await?;
        Ok(rows.into_iter().collect())
    }

    /// Deletes those blobs that no row owns and of which no [`Custody`] is held, whose holder then answers for it. What cannot be deleted
    /// now stays until the next start.
    pub async fn collect_blobs(&self, blobs: &[String]) {
        let collect = async {
            self.sync().await?;
            for blob in blobs {
                self.collect(blob).await?;
            }
            Ok::<_, Error>(())
        };
        if let Err(error) = collect.await {
            tracing::warn!(%error, ?blobs, "blobs that may have no owner stay until the next start");
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

    /// Rows that are gone are gone on the disk too, lest a power loss bring one back without its blob.
    async fn sync(&self) -> Result<()> {
        sqlx::query("PRAGMA wal_checkpoint(FULL)").execute(self.pool()).await?;
        Ok(())
    }
}

/// Runs work to its end even where the caller goes away in the middle.
pub async fn uninterrupted<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    tokio::spawn(work).await.map_err(Error::internal)?
}

fn migrator() -> Migrator {
    let migration = |&(version, name, sql): &(i64, &'static str, &'static str)| {
        Migration::new(version, name.into(), MigrationType::Simple, sql.into_sql_str(), false)
    };
    Migrator::with_migrations(MIGRATIONS.iter().map(migration).collect())
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

impl From<sqlx::Error> for Error {
    fn from(e: sqlx::Error) -> Self {
        match e {
            sqlx::Error::PoolTimedOut => Self::Unavailable {
                message: "the catalogue is busy; retry".into(),
                retry_after: Some(Duration::from_secs(1)),
            },
            e => Self::Internal(format!("catalogue: {e}")),
        }
    }
}
