//! What tenants use, counted in memory and written about once a second: a commit for every call would make each wait for the disk.
//!
//! [`Store::flush_usage`] writes what is counted; an orderly stop ends with it. A process that is killed, or a machine that loses power,
//! loses the counts of the last second or so, and nothing else.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, Weak};
use std::time::Duration;

use sqlx::SqliteConnection;

use crate::error::{Error, Result};
use crate::ids::TenantId;
use crate::store::rows::{count, int};
use crate::store::{Inner, Store};
use crate::sync::lock;

/// How often counts are written.
const FLUSH_INTERVAL: Duration = Duration::from_secs(1);

/// What a tenant has used, in calls and tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct UsageRow {
    /// Calls that reached the engine.
    pub requests: u64,
    /// Tokens that came in.
    pub prompt_tokens: u64,
    /// Tokens that were generated.
    pub completion_tokens: u64,
    /// Tokens that were trained on.
    pub training_tokens: u64,
}

/// What is added to a [`UsageRow`].
pub type UsageDelta = UsageRow;

impl UsageRow {
    fn each(self, other: Self, op: impl Fn(u64, u64) -> u64) -> Self {
        let Self { requests, prompt_tokens, completion_tokens, training_tokens } = self;
        Self {
            requests: op(requests, other.requests),
            prompt_tokens: op(prompt_tokens, other.prompt_tokens),
            completion_tokens: op(completion_tokens, other.completion_tokens),
            training_tokens: op(training_tokens, other.training_tokens),
        }
    }
}

/// What is counted and not written yet.
#[derive(Debug, Default)]
pub(super) struct UsageBook {
    pending: Mutex<HashMap<TenantId, UsageRow>>,
    /// Held from the look at `pending` to the moment when what was written has left it, so that nobody sees a count twice or not at all.
    flushing: tokio::sync::Mutex<()>,
}

impl UsageBook {
    fn pending(&self) -> MutexGuard<'_, HashMap<TenantId, UsageRow>> {
        lock(&self.pending)
    }

    /// Takes away what has been written; more may have come meanwhile.
    fn settle(&self, written: &HashMap<TenantId, UsageRow>) {
        let mut pending = self.pending();
        for (tenant, used) in written {
            let left = pending.get(tenant).copied().unwrap_or_default().each(*used, u64::saturating_sub);
            if left == UsageRow::default() {
                pending.remove(tenant);
            } else {
                pending.insert(tenant.clone(), left);
            }
        }
    }
}

impl Store {
    /// Adds to a tenant's counters. A tenant deleted meanwhile is no error: its counters went with it.
    pub fn add_usage(&self, id: &TenantId, used: UsageDelta) {
        let mut pending = self.inner.usage.pending();
        let entry = pending.entry(id.clone()).or_default();
        *entry = entry.each(used, u64::saturating_add);
    }

    /// Writes what has been counted; after it nothing counted before is lost.
    ///
    /// # Errors
    /// Where the catalogue cannot be written; the counts are kept for the next time.
    pub async fn flush_usage(&self) -> Result<()> {
        let book = &self.inner.usage;
        if book.pending().is_empty() {
            return Ok(());
        }
        // First the right to write, which may take long: who only reads waits for no more than the commit.
        let mut tx = self.write().await?;
        let _alone = book.flushing.lock().await;
        let counted = book.pending().clone();
        for (tenant, used) in &counted {
            add(&mut tx, tenant, *used).await?;
        }
        tx.commit().await?;
        book.settle(&counted);
        Ok(())
    }

    /// Returns what a tenant has used up to now, written or not.
    pub async fn get_usage(&self, id: &TenantId) -> Result<UsageRow> {
        let book = &self.inner.usage;
        let _still = book.flushing.lock().await;
        let row =
            sqlx::query("SELECT * FROM tenants WHERE tenant = ?").bind(id.as_str()).fetch_optional(self.pool()).await?;
        let row = row.ok_or_else(|| Error::not_found(id))?;
        let written = UsageRow {
            requests: count(&row, "requests")?,
            prompt_tokens: count(&row, "prompt_tokens")?,
            completion_tokens: count(&row, "completion_tokens")?,
            training_tokens: count(&row, "training_tokens")?,
        };
        let pending = book.pending().get(id).copied().unwrap_or_default();
        Ok(written.each(pending, u64::saturating_add))
    }
}

async fn add(db: &mut SqliteConnection, tenant: &TenantId, used: UsageRow) -> Result<()> {
    let UsageRow { requests, prompt_tokens, completion_tokens, training_tokens } = used;
    sqlx::query(
        "UPDATE tenants SET requests = requests + ?, prompt_tokens = prompt_tokens + ?,
         completion_tokens = completion_tokens + ?, training_tokens = training_tokens + ? WHERE tenant = ?",
    )
    .bind(int(requests))
    .bind(int(prompt_tokens))
    .bind(int(completion_tokens))
    .bind(int(training_tokens))
    .bind(tenant.as_str())
    .execute(db)
    .await?;
    Ok(())
}

/// Writes the counts again and again, until the store is gone.
pub(super) async fn keep_flushing(store: Weak<Inner>) {
    loop {
        tokio::time::sleep(FLUSH_INTERVAL).await;
        let Some(inner) = store.upgrade() else { return };
        if let Err(error) = (Store { inner }).flush_usage().await {
            tracing::warn!(%error, "usage could not be written and is kept in memory");
        }
    }
}
