//! The catalogue's connections: one that writes, some that read, and some for the look-ups that every call waits for.
//!
//! SQLite has one writer at a time, so there is one connection for it, and who wants to write waits for that in the order of asking.
//! Readers do not wait for the writer (WAL mode), but for each other where there are more of them than connections; the look-ups of
//! keys and tenants have connections of their own, so that no tenant's reads keep anyone from being let in.

use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{Connection as _, SqlSafeStr, Sqlite, Transaction};

use crate::error::{Error, Result};
use crate::store::watch::{DiskWrite, Watch, When, reach};
use crate::store::{Store, unusable};

/// Connections that read.
const READERS: u32 = 4;
/// Connections for the look-ups of keys and tenants.
const LOOKUPS: u32 = 2;
/// Longest wait at the end for those who still use a connection.
const CLOSE_WAIT: Duration = Duration::from_secs(10);

/// The catalogue's file in a data folder.
pub(super) const FILE: &str = "tenora.db";

/// The schema, in the order it grew. Applied ones never change; a change is a new file at the end.
const MIGRATIONS: &[(i64, &str, &str)] = &[
    (1, "init", include_str!("migrations/0001_init.sql")),
    (2, "deleted tenants", include_str!("migrations/0002_deleted_tenants.sql")),
    (3, "tenant weights", include_str!("migrations/0003_tenant_weights.sql")),
    (4, "requests and turns", include_str!("migrations/0004_requests_and_turns.sql")),
    (5, "training results", include_str!("migrations/0005_training_results.sql")),
    (6, "version notes", include_str!("migrations/0006_version_notes.sql")),
    (7, "unpacked sizes", include_str!("migrations/0007_unpacked_sizes.sql")),
    (8, "adapter kinds", include_str!("migrations/0008_adapter_kinds.sql")),
    (9, "virtual tokens", include_str!("migrations/0009_virtual_tokens.sql")),
];

#[derive(Debug)]
pub(super) struct Catalogue {
    writer: SqlitePool,
    readers: SqlitePool,
    lookups: SqlitePool,
    watch: Option<Arc<dyn Watch>>,
}

impl Catalogue {
    /// Opens or makes the file and brings its schema up to date. `busy_timeout`: the longest wait for the right to write.
    pub(super) async fn open(data_dir: &Path, busy_timeout: Duration, watch: Option<Arc<dyn Watch>>) -> Result<Self> {
        // FULL in WAL mode: a commit is on the disk before it is acknowledged, also for a machine that loses power in the next moment.
        // That is why there is no checkpoint anywhere: a row that is gone stays gone, and its blob can go too.
        let options = SqliteConnectOptions::new()
            .filename(data_dir.join(FILE))
            .create_if_missing(true)
            .foreign_keys(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(busy_timeout);
        let pool = |connections| SqlitePoolOptions::new().max_connections(connections);
        let writer = pool(1).acquire_timeout(busy_timeout).after_release(|db, _| Box::pin(is_sound(db)));
        let file = data_dir.join(FILE);
        let writer = writer.connect_with(options.clone()).await.map_err(|e| unusable(&file, e))?;
        migrator().run(&writer).await.map_err(|e| unusable(&file, e))?;
        let reading = options.create_if_missing(false).pragma("query_only", "ON");
        let readers = pool(READERS).connect_with(reading.clone()).await?;
        let lookups = pool(LOOKUPS).connect_with(reading).await?;
        Ok(Self { writer, readers, lookups, watch })
    }

    /// Closes all connections, once who holds one has given it back. The one that writes is the last: it takes what stands in the `-wal` file
    /// into the catalogue's own, and removes it.
    async fn close(&self) {
        self.lookups.close().await;
        self.readers.close().await;
        self.writer.close().await;
    }
}

/// Whether a connection that comes back can be used again. SQLite ends a transaction by itself where the disk is full, and sqlx then takes the
/// connection for one that is in it for ever.
async fn is_sound(db: &mut SqliteConnection) -> sqlx::Result<bool> {
    // The ping comes back after the rollback of a transaction that was dropped.
    db.ping().await?;
    Ok(!db.is_in_transaction())
}

impl Store {
    /// Closes the catalogue, so that its folder can be copied or opened by others. What is asked of it afterwards is UNAVAILABLE.
    pub async fn close(&self) {
        if tokio::time::timeout(CLOSE_WAIT, self.inner.catalogue.close()).await.is_err() {
            tracing::warn!(wait = ?CLOSE_WAIT, "the catalogue is still in use; its -wal file stays until the next start");
        }
    }

    /// Where tenants' reads go.
    pub(super) fn pool(&self) -> &SqlitePool {
        &self.inner.catalogue.readers
    }

    /// Where the look-ups go that a call needs before it is let in: one row by its key, nothing else.
    pub(super) fn lookups(&self) -> &SqlitePool {
        &self.inner.catalogue.lookups
    }

    /// The connection that writes, for tests that write what the store would not.
    #[cfg(test)]
    pub(super) fn writer(&self) -> &SqlitePool {
        &self.inner.catalogue.writer
    }

    /// Begins a transaction that writes. It takes the write lock at once, so that it never fails half way for another writer; dropped
    /// without a commit it leaves nothing.
    pub(super) async fn write(&self) -> Result<Write> {
        let catalogue = &self.inner.catalogue;
        let tx = catalogue.writer.begin_with("BEGIN IMMEDIATE").await?;
        Ok(Write { tx, watch: catalogue.watch.clone() })
    }
}

/// A transaction that writes.
#[derive(Debug)]
pub(super) struct Write {
    tx: Transaction<'static, Sqlite>,
    watch: Option<Arc<dyn Watch>>,
}

impl Write {
    /// Makes it last.
    pub(super) async fn commit(self) -> Result<()> {
        reach(self.watch.as_ref(), DiskWrite::Commit, When::Before).await?;
        self.tx.commit().await?;
        reach(self.watch.as_ref(), DiskWrite::Commit, When::After).await
    }
}

impl Deref for Write {
    type Target = SqliteConnection;
    fn deref(&self) -> &SqliteConnection {
        &self.tx
    }
}

impl DerefMut for Write {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        &mut self.tx
    }
}

fn migrator() -> Migrator {
    let migration = |&(version, name, sql): &(i64, &'static str, &'static str)| {
        Migration::new(version, name.into(), MigrationType::Simple, sql.into_sql_str(), false)
    };
    Migrator::with_migrations(MIGRATIONS.iter().map(migration).collect())
}

/// SQLite's primary result codes that are nobody's mistake.
const SQLITE_BUSY: u32 = 5;
const SQLITE_LOCKED: u32 = 6;
const SQLITE_FULL: u32 = 13;

/// The primary code is the low byte of an extended one.
fn code(error: &sqlx::Error) -> Option<u32> {
    error.as_database_error()?.code()?.parse::<u32>().ok().map(|code| code & 0xff)
}

impl From<sqlx::Error> for Error {
    fn from(e: sqlx::Error) -> Self {
        // Its tenant, or what else a row needs, went while the call was under way.
        if e.as_database_error().is_some_and(|error| error.is_foreign_key_violation()) {
            return Self::not_found("what this belongs to");
        }
        match (code(&e), &e) {
            (Some(SQLITE_FULL), _) => Self::DiskFull { path: FILE.into() },
            (Some(SQLITE_BUSY | SQLITE_LOCKED), _) | (None, sqlx::Error::PoolTimedOut) => Self::Unavailable {
                message: "the catalogue is busy; retry".into(),
                retry_after: Some(Duration::from_secs(1)),
            },
            (None, sqlx::Error::PoolClosed) => Self::Unavailable {
                message: "the server has stopped".into(),
                retry_after: Some(Duration::from_secs(1)),
            },
            _ => Self::Internal(format!("catalogue: {e}")),
        }
    }
}

#[cfg(test)]
mod tests;
