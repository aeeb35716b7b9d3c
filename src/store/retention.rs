//! What goes by itself once it is old: jobs that have ended, with their events, request ids, and what is in the trash.
//!
//! Everything else stays until a caller deletes it. One job, or so many request ids, are one transaction, so that no other writer waits
//! for long.

use std::path::PathBuf;
use std::sync::Weak;
use std::time::Duration;

use crate::error::Result;
use crate::store::rows::{ended, int, now};
use crate::store::sweep::empty_trash;
use crate::store::{Inner, Options, Store};
use crate::work::blocking;

/// How often it is looked for what is old; the first time at the start.
const INTERVAL: Duration = Duration::from_secs(3600);
/// Rows of one transaction.
const BATCH: u32 = 1000;

/// How long what nothing needs any more is kept. `None`: for ever.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retention {
    /// A job that SUCCEEDED, FAILED or was CANCELLED, after its end.
    pub jobs: Option<Duration>,
    /// A request id, after its first call.
    pub request_ids: Option<Duration>,
}

impl Store {
    /// Deletes what is older than it is to be kept; gives how many jobs and request ids that were.
    ///
    /// # Errors
    /// The catalogue's; what has been deleted until then stays deleted.
    pub async fn forget_old(&self, retention: Retention) -> Result<(u64, u64)> {
        let before = |age: Duration| now() - int(age.as_millis() as u64);
        let (mut jobs, mut request_ids) = (0, 0);
        if let Some(age) = retention.jobs {
            let sql = concat!(
                "DELETE FROM jobs WHERE rowid IN (SELECT rowid FROM jobs WHERE state IN ",
                ended!(),
                " AND end_time < ? LIMIT ?) RETURNING result",
            );
            jobs = self.delete_batches(sql, before(age), 1).await?;
        }
        if let Some(age) = retention.request_ids {
            let sql = "DELETE FROM requests WHERE rowid IN (SELECT rowid FROM requests WHERE create_time < ? LIMIT ?) \
                       RETURNING NULL";
            request_ids = self.delete_batches(sql, before(age), BATCH).await?;
        }
        if jobs + request_ids > 0 {
            tracing::info!(jobs, request_ids, "old rows deleted");
        }
        Ok((jobs, request_ids))
    }

    /// Runs a deletion of at most `batch` rows, with a time and that number, until there are none left. It returns the blobs that they owned.
    async fn delete_batches(&self, sql: &'static str, before: i64, batch: u32) -> Result<u64> {
        let mut deleted = 0;
        loop {
            let mut tx = self.write().await?;
            let done: Vec<Option<String>> =
                sqlx::query_scalar(sql).bind(before).bind(batch).fetch_all(&mut *tx).await?;
            tx.commit().await?;
            deleted += done.len() as u64;
            if done.is_empty() {
                return Ok(deleted);
            }
            self.collect_blobs(&done.into_iter().flatten().collect::<Vec<_>>()).await;
        }
    }
}

/// Deletes what is old again and again, until the store is gone.
pub(super) async fn keep_forgetting(store: Weak<Inner>, data_dir: PathBuf, options: Options) {
    while let Some(inner) = store.upgrade() {
        if let Err(error) = (Store { inner }).forget_old(options.retention).await {
            tracing::warn!(%error, "old jobs and request ids could not be deleted and stay until the next time");
        }
        let (data_dir, kept) = (data_dir.clone(), options.trash);
        let emptied = blocking(move || {
            empty_trash(&data_dir, kept);
            Ok(())
        });
        // What cannot be deleted is in the log.
        let _ = emptied.await;
        tokio::time::sleep(INTERVAL).await;
    }
}
