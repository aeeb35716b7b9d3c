//! Tenants: their rows, and what their answers may say.

use std::time::SystemTime;

use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use crate::error::{Error, Result};
use crate::ids::TenantId;
use crate::store::requests::Claim;
use crate::store::rows::{count, ended, from_json, from_millis, held_by_worker, now, to_json};
use crate::store::{Listed, Page, Store, random_id};

const CREATE_METHOD: &str = "CreateTenant";

/// A tenant in the catalogue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TenantRow {
    /// Its id.
    pub id: TenantId,
    /// A name for people.
    pub display_name: String,
    /// Its share of the engine beside other tenants'.
    pub weight: u32,
    /// Changes with the tenant.
    pub etag: String,
    /// When it was made.
    pub create_time: SystemTime,
}

/// New values of a tenant; `None` leaves one as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TenantChange {
    /// The new name for people.
    pub display_name: Option<String>,
    /// The new weight.
    pub weight: Option<u32>,
}

/// How many of each a tenant has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TenantCounts {
    /// Adapters it has.
    pub adapters: u64,
    /// Datasets it has.
    pub datasets: u64,
    /// Those that have not ended.
    pub jobs: u64,
}

/// A tenant's safety policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyRow {
    /// What no answer may hold.
    pub phrases: Vec<String>,
    /// Changes with the policy.
    pub etag: String,
}

impl Store {
    /// Makes a tenant. The same again with its `request_id` (empty: none) gives it again.
    ///
    /// # Errors
    /// ALREADY_EXISTS, also for the id of a deleted one; REQUEST_ID_REUSED.
    pub async fn create_tenant(
        &self,
        id: &TenantId,
        display_name: &str,
        weight: u32,
        request_id: &str,
    ) -> Result<TenantRow> {
        let content = Some(format!("weight {weight}, {display_name}"));
        let claim = Claim { tenant: id, method: CREATE_METHOD, request_id, target: id.to_string(), content };
        let mut tx = self.write().await?;
        if claim.first_result_anywhere(&mut tx).await?.is_some() {
            drop(tx);
            return self.get_tenant(id).await;
        }
        let gone: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM deleted_tenants WHERE tenant = ?)")
            .bind(id.as_str())
            .fetch_one(&mut *tx)
            .await?;
        if gone {
            let message = "it was deleted, and its id is never given again; choose another".to_owned();
            return Err(Error::AlreadyExists { name: id.to_string(), message });
        }
        let made = sqlx::query(
            "INSERT INTO tenants (tenant, display_name, weight, etag, policy_etag, create_time) VALUES (?, ?, ?, ?, ?, ?)
             ON CONFLICT DO NOTHING",
        )
        .bind(id.as_str())
        .bind(display_name)
        .bind(weight)
        .bind(random_id())
        .bind(random_id())
        .bind(now())
        .execute(&mut *tx)
        .await?;
        if made.rows_affected() == 0 {
            return Err(Error::AlreadyExists { name: id.to_string(), message: String::new() });
        }
        claim.record(&mut tx, &id.to_string()).await?;
        tx.commit().await?;
        self.get_tenant(id).await
    }

    /// Returns a tenant.
    pub async fn get_tenant(&self, id: &TenantId) -> Result<TenantRow> {
        let row = sqlx::query("SELECT * FROM tenants WHERE tenant = ?")
            .bind(id.as_str())
            .fetch_optional(self.lookups())
            .await?;
        tenant_row(&row.ok_or_else(|| Error::not_found(id))?)
    }

    /// Changes a tenant; calls that come after have its new weight. `etag`: CONFLICT where it is not empty and not the current one.
    pub async fn update_tenant(&self, id: &TenantId, change: &TenantChange, etag: &str) -> Result<TenantRow> {
        let mut tx = self.write().await?;
        let done = sqlx::query(
            "UPDATE tenants SET display_name = COALESCE(?, display_name), weight = COALESCE(?, weight), etag = ?
             WHERE tenant = ? AND etag = COALESCE(?, etag)",
        )
        .bind(&change.display_name)
        .bind(change.weight)
        .bind(random_id())
        .bind(id.as_str())
        .bind((!etag.is_empty()).then_some(etag))
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        let row = self.get_tenant(id).await?;
        if done.rows_affected() == 1 { Ok(row) } else { Err(Error::Conflict { name: id.to_string() }) }
    }

    /// All tenants by id.
    pub async fn list_tenants(&self, page: &Page) -> Result<Listed<TenantRow>> {
        let rows = sqlx::query("SELECT * FROM tenants WHERE tenant > ? ORDER BY tenant LIMIT ?")
            .bind(&page.token)
            .bind(page.rows())
            .fetch_all(self.pool())
            .await?;
        Listed::read(rows, page, tenant_row, |row| Ok(row.try_get("tenant")?))
    }

    /// Deletes a tenant with all its rows and blobs, and nothing of anyone else's. Waits for its publishes under way; refused
    /// (TENANT_IN_USE) while a worker holds one of its jobs.
    pub async fn delete_tenant(&self, id: &TenantId) -> Result<()> {
        let _alone = self.inner.locks.exclusive(&id.to_string()).await;
        let mut tx = self.write().await?;
        let running: i64 =
            sqlx::query_scalar(concat!("SELECT COUNT(*) FROM jobs WHERE tenant = ? AND state IN ", held_by_worker!()))
                .bind(id.as_str())
                .fetch_one(&mut *tx)
                .await?;
        if running > 0 {
            let message = "a training job is running; cancel it, wait for its end and retry";
            return Err(Error::precondition("TENANT_IN_USE", id, message));
        }
        let gone = sqlx::query("DELETE FROM tenants WHERE tenant = ?").bind(id.as_str()).execute(&mut *tx).await?;
        if gone.rows_affected() == 0 {
            return Err(Error::not_found(id));
        }
        sqlx::query("INSERT INTO deleted_tenants (tenant, delete_time) VALUES (?, ?)")
            .bind(id.as_str())
            .bind(now())
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        // It is gone. Files that stay belong to nobody, and go to the trash at the next start.
        if let Err(error) = self.blobs().delete(id.as_str()).await {
            tracing::warn!(tenant = %id, %error, "some files of a deleted tenant stay until the next start");
        }
        Ok(())
    }

    /// Counts what a tenant has.
    pub async fn count_of(&self, id: &TenantId) -> Result<TenantCounts> {
        let row = sqlx::query(concat!(
            "SELECT (SELECT COUNT(*) FROM adapters WHERE tenant = ?1) AS adapters,
                    (SELECT COUNT(*) FROM datasets WHERE tenant = ?1) AS datasets,
                    (SELECT COUNT(*) FROM jobs WHERE tenant = ?1 AND state NOT IN ",
            ended!(),
            ") AS jobs",
        ))
        .bind(id.as_str())
        .fetch_one(self.pool())
        .await?;
        let of = |column| count(&row, column);
        Ok(TenantCounts { adapters: of("adapters")?, datasets: of("datasets")?, jobs: of("jobs")? })
    }

    /// Returns a tenant's policy; an empty one where none was set.
    pub async fn get_policy(&self, id: &TenantId) -> Result<PolicyRow> {
        let row = sqlx::query("SELECT policy_phrases, policy_etag FROM tenants WHERE tenant = ?")
            .bind(id.as_str())
            .fetch_optional(self.pool())
            .await?;
        let row = row.ok_or_else(|| Error::not_found(id))?;
        Ok(PolicyRow { phrases: from_json(row.try_get("policy_phrases")?)?, etag: row.try_get("policy_etag")? })
    }

    /// Replaces the policy. `etag`: CONFLICT where it is given and not the current one.
    pub async fn set_policy(&self, id: &TenantId, phrases: &[String], etag: Option<&str>) -> Result<PolicyRow> {
        let fresh = PolicyRow { phrases: phrases.to_vec(), etag: random_id() };
        let mut tx = self.write().await?;
        let done = sqlx::query(
            "UPDATE tenants SET policy_phrases = ?, policy_etag = ? WHERE tenant = ? AND policy_etag = COALESCE(?, policy_etag)",
        )
        .bind(to_json(&fresh.phrases)?)
        .bind(&fresh.etag)
        .bind(id.as_str())
        .bind(etag.filter(|e| !e.is_empty()))
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        if done.rows_affected() == 1 {
            return Ok(fresh);
        }
        self.get_tenant(id).await?;
        Err(Error::Conflict { name: format!("{id}/safetyPolicy") })
    }
}

fn tenant_row(row: &SqliteRow) -> Result<TenantRow> {
    Ok(TenantRow {
        id: TenantId::new(row.try_get("tenant")?)?,
        display_name: row.try_get("display_name")?,
        weight: row.try_get("weight")?,
        etag: row.try_get("etag")?,
        create_time: from_millis(row.try_get("create_time")?),
    })
}
