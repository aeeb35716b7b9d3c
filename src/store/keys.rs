//! API keys. A secret is shown once, when its key is made; only its SHA-256 is kept.

use std::time::SystemTime;

use sha2::{Digest as _, Sha256};
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};

use crate::error::{Error, Result};
use crate::ids::{KeyName, TenantId};
use crate::store::requests::Claim;
use crate::store::rows::{from_millis, now, random, require_tenant};
use crate::store::{Listed, Page, Store, random_id};

/// Whom a key speaks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyOwner {
    /// An operator's.
    Operator,
    /// A tenant and its weight.
    Tenant(TenantId, u32),
}

/// A key in the catalogue, without what it proves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRow {
    /// What names it in a call that revokes it.
    pub id: String,
    /// SHA-256 of the whole secret.
    pub hash: [u8; 32],
    /// Whose it is.
    pub owner: KeyOwner,
    /// A name for people.
    pub display_name: String,
    /// When it was made.
    pub created: SystemTime,
    /// Worthless since then.
    pub revoked: Option<SystemTime>,
}

/// A key that is not kept yet.
#[derive(Debug, Clone)]
pub struct NewKey {
    /// What names it in a call that revokes it.
    pub id: String,
    /// `tnr_{key id}_{64 hex digits}`.
    pub secret: String,
}

impl NewKey {
    /// Draws a key at random.
    #[expect(clippy::new_without_default, reason = "every one is another")]
    pub fn new() -> Self {
        let id = format!("{:016x}", u64::from_le_bytes(random()));
        Self { secret: format!("tnr_{id}_{}{}", random_id(), random_id()), id }
    }
}

const CREATE_METHOD: &str = "CreateApiKey";

impl Store {
    /// Makes a tenant's key, and its secret, which nobody can read again. ALREADY_EXISTS for a `request_id` (empty: none) that has made one,
    /// REQUEST_ID_REUSED where it was another.
    pub async fn create_key(&self, owner: &TenantId, display_name: &str, request_id: &str) -> Result<(KeyRow, String)> {
        let key = NewKey::new();
        let content = Some(display_name.to_owned());
        let claim = Claim { tenant: owner, method: CREATE_METHOD, request_id, target: owner.to_string(), content };
        let mut tx = self.write().await?;
        require_tenant(&mut tx, owner).await?;
        if let Some(name) = claim.first_result_anywhere(&mut tx).await? {
            let message = "its secret went with the first answer; revoke it and make another".to_owned();
            return Err(Error::AlreadyExists { name, message });
        }
        insert(&mut tx, &key, Some(owner), display_name).await?;
        let name = KeyName { tenant: owner.clone(), key: key.id.clone() };
        claim.record(&mut tx, &name.to_string()).await?;
        tx.commit().await?;
        let row = self.find_key(&key.id).await?.ok_or_else(|| Error::not_found(&key.id))?;
        Ok((row, key.secret))
    }

    /// Keeps an operator key that has been shown.
    pub async fn insert_operator_key(&self, key: &NewKey, display_name: &str) -> Result<()> {
        let mut tx = self.write().await?;
        insert(&mut tx, key, None, display_name).await?;
        tx.commit().await
    }

    /// Makes all operator keys worthless.
    pub async fn revoke_operator_keys(&self) -> Result<()> {
        let mut tx = self.write().await?;
        sqlx::query("UPDATE api_keys SET revoke_time = ? WHERE tenant IS NULL AND revoke_time IS NULL")
            .bind(now())
            .execute(&mut *tx)
            .await?;
        tx.commit().await
    }

    /// The key of an id, revoked or not.
    pub async fn find_key(&self, id: &str) -> Result<Option<KeyRow>> {
        let row = sqlx::query(
            "SELECT api_keys.*, tenants.weight FROM api_keys LEFT JOIN tenants ON tenants.tenant = api_keys.tenant WHERE key = ?",
        )
        .bind(id)
        .fetch_optional(self.lookups())
        .await?;
        row.as_ref().map(key_row).transpose()
    }

    /// A tenant's keys by id, the revoked ones too.
    pub async fn list_keys(&self, tenant: &TenantId, page: &Page) -> Result<Listed<KeyRow>> {
        require_tenant(&mut *self.pool().acquire().await?, tenant).await?;
        let rows = sqlx::query(
            "SELECT api_keys.*, tenants.weight FROM api_keys LEFT JOIN tenants ON tenants.tenant = api_keys.tenant
             WHERE api_keys.tenant = ? AND key > ? ORDER BY key LIMIT ?",
        )
        .bind(tenant.as_str())
        .bind(&page.token)
        .bind(page.rows())
        .fetch_all(self.pool())
        .await?;
        Listed::read(rows, page, key_row, |row| Ok(row.try_get("key")?))
    }

    /// Makes a key worthless; revoking it again changes nothing.
    pub async fn revoke_key(&self, name: &KeyName) -> Result<()> {
        let mut tx = self.write().await?;
        let done =
            sqlx::query("UPDATE api_keys SET revoke_time = COALESCE(revoke_time, ?) WHERE tenant = ? AND key = ?")
                .bind(now())
                .bind(name.tenant.as_str())
                .bind(&name.key)
                .execute(&mut *tx)
                .await?;
        tx.commit().await?;
        if done.rows_affected() == 0 { Err(Error::not_found(name)) } else { Ok(()) }
    }

    /// Whether an operator can still get in.
    pub async fn has_operator_key(&self) -> Result<bool> {
        let found =
            sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM api_keys WHERE tenant IS NULL AND revoke_time IS NULL)");
        Ok(found.fetch_one(self.pool()).await?)
    }
}

async fn insert(db: &mut SqliteConnection, key: &NewKey, tenant: Option<&TenantId>, display_name: &str) -> Result<()> {
    let hash: [u8; 32] = Sha256::digest(key.secret.as_bytes()).into();
    sqlx::query("INSERT INTO api_keys (key, tenant, hash, display_name, create_time) VALUES (?, ?, ?, ?, ?)")
        .bind(&key.id)
        .bind(tenant.map(TenantId::as_str))
        .bind(hash.as_slice())
        .bind(display_name)
        .bind(now())
        .execute(db)
        .await?;
    Ok(())
}

fn key_row(row: &SqliteRow) -> Result<KeyRow> {
    let hash: &[u8] = row.try_get("hash")?;
    let owner = match row.try_get::<Option<&str>, _>("tenant")? {
        Some(tenant) => KeyOwner::Tenant(TenantId::new(tenant)?, row.try_get("weight")?),
        None => KeyOwner::Operator,
    };
    Ok(KeyRow {
        id: row.try_get("key")?,
        hash: hash.try_into().map_err(|_| Error::internal("catalogue: a key's hash is damaged"))?,
        owner,
        display_name: row.try_get("display_name")?,
        created: from_millis(row.try_get("create_time")?),
        revoked: row.try_get::<Option<i64>, _>("revoke_time")?.map(from_millis),
    })
}
