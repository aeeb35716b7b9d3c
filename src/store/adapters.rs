//! Adapters and their versions: a name is mutable and has one live version; a version never changes and its number never comes again.

use std::collections::BTreeMap;
use std::time::SystemTime;

use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};

use crate::config::Limits;
use crate::error::{Error, Result};
use crate::ids::{AdapterName, AdapterRef, Digest, JobName, TenantId, VersionName};
use crate::request::{AdapterKind, ParityReport, Publish};
use crate::store::requests::Claim;
use crate::store::rows::{count, ended, from_json, from_millis, int, now, require_tenant, to_json};
use crate::store::{Listed, Page, Store, documents, jobs, random_id};

/// An adapter in the catalogue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterRow {
    /// Its name.
    pub name: AdapterName,
    /// What requests for the name get.
    pub live: Option<VersionName>,
    /// How the live version is known in memory.
    pub live_memory: Option<LiveMemory>,
    /// Changes with the adapter.
    pub etag: String,
    /// When its first version came.
    pub create_time: SystemTime,
    /// When `live` last changed.
    pub update_time: SystemTime,
}

/// What a live version's row says of it in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveMemory {
    /// The live version's uid.
    pub uid: String,
    /// What it takes in memory where it serves.
    pub memory_bytes: u64,
}

/// Reads adapters, each beside its live version.
macro_rules! select_adapters {
    ($which:literal) => {
        concat!(
            "SELECT a.*, v.uid, v.memory_bytes FROM adapters a LEFT JOIN versions v ON v.tenant = a.tenant
             AND v.adapter = a.adapter AND v.version = a.live_version ",
            $which
        )
    };
}

/// A version, and all that is known of it.
#[derive(Debug, Clone, PartialEq)]
pub struct VersionRow {
    /// Its name.
    pub name: VersionName,
    /// Of its content.
    pub digest: Digest,
    /// Of the base that it was made for.
    pub base_digest: Digest,
    /// Of the chat template that it was made with.
    pub template_digest: Digest,
    /// Bytes of the tensors as stored.
    pub size_bytes: u64,
    /// What it does to the base.
    pub kind: AdapterKind,
    /// The largest of its sites; 0 where it has none.
    pub rank: u32,
    /// Tokens that it puts before a sequence.
    pub virtual_tokens: u32,
    /// PEFT's words, sorted.
    pub targets: Vec<String>,
    /// What the gate measured.
    pub parity: ParityReport,
    /// What trained it; `None` for an import.
    pub job: Option<JobName>,
    /// Final measurements, finite numbers.
    pub metrics: BTreeMap<String, f64>,
    /// When it was published.
    pub create_time: SystemTime,
    /// Random, never given twice: what caches are keyed by.
    pub uid: String,
    /// Bytes of the tensors in memory.
    pub memory_bytes: u64,
    /// The folder of its files.
    pub blob: String,
    /// Why its job kept it from going live: the training went wrong.
    pub held_reason: Option<String>,
    /// What was done to its files when it was imported, where their owner must know it.
    pub note: Option<String>,
    /// Whether requests for its adapter get it.
    pub live: bool,
}

/// Reads versions as `v`, each with whether it is live.
macro_rules! select_versions {
    ($which:literal) => {
        concat!(
            "SELECT v.*, COALESCE((SELECT live_version FROM adapters WHERE tenant = v.tenant AND adapter = v.adapter) = v.version, 0)
             AS live FROM versions v ",
            $which
        )
    };
}

/// A version to insert.
#[derive(Debug, Clone, PartialEq)]
pub struct NewVersionRow {
    /// Complete but for its number and its time, which the catalogue gives.
    pub draft: VersionRow,
    /// Whether it becomes the live one.
    pub publish: Publish,
    /// Empty: none.
    pub request_id: String,
    /// Does everything and undoes it.
    pub validate_only: bool,
}

/// An import as its caller asked for it.
fn claim<'a>(adapter: &'a AdapterName, request_id: &'a str, digest: Digest, publish: Publish) -> Claim<'a> {
    let method = "ImportAdapter";
    let goes_live = match publish {
        Publish::Auto => "auto",
        Publish::Live => "live",
        Publish::VersionOnly => "version only",
    };
    let content = Some(format!("{goes_live}, {digest}"));
    Claim { tenant: &adapter.tenant, method, request_id, target: adapter.to_string(), content }
}

impl Store {
    /// Returns an adapter.
    pub async fn get_adapter(&self, name: &AdapterName) -> Result<AdapterRow> {
        read_adapter(&mut *self.pool().acquire().await?, name).await
    }

    /// A tenant's adapters by id.
    pub async fn list_adapters(&self, tenant: &TenantId, page: &Page) -> Result<Listed<AdapterRow>> {
        let mut db = self.pool().acquire().await?;
        require_tenant(&mut db, tenant).await?;
        let select = select_adapters!("WHERE a.tenant = ? AND a.adapter > ? ORDER BY a.adapter LIMIT ?");
        let rows =
            sqlx::query(select).bind(tenant.as_str()).bind(&page.token).bind(page.rows()).fetch_all(&mut *db).await?;
        Listed::read(rows, page, adapter_row, |row| Ok(row.try_get("adapter")?))
    }

    /// Returns a version.
    pub async fn get_version(&self, name: &VersionName) -> Result<VersionRow> {
        read_version(&mut *self.pool().acquire().await?, name).await
    }

    /// An adapter's versions, newest first.
    pub async fn list_versions(&self, adapter: &AdapterName, page: &Page) -> Result<Listed<VersionRow>> {
        let mut db = self.pool().acquire().await?;
        read_adapter(&mut db, adapter).await?;
        let rows = sqlx::query(select_versions!(
            "WHERE v.tenant = ? AND v.adapter = ? AND v.version < ? ORDER BY v.version DESC LIMIT ?"
        ))
        .bind(adapter.tenant.as_str())
        .bind(&adapter.adapter)
        .bind(page.number(i64::MAX)?)
        .bind(page.rows())
        .fetch_all(&mut *db)
        .await?;
        Listed::read(rows, page, version_row, |row| Ok(row.try_get::<u32, _>("version")?.to_string()))
    }

    /// The version that a name means now: one read, so it is one version even while names move. NOT_FOUND for what does not
    /// exist, NO_LIVE_VERSION for an adapter that has none.
    pub async fn resolve(&self, name: &AdapterRef) -> Result<VersionRow> {
        let adapter = match name {
            AdapterRef::Version(version) => return self.get_version(version).await,
            AdapterRef::Live(adapter) => adapter,
        };
        let row = sqlx::query(
            "SELECT v.*, 1 AS live FROM adapters a JOIN versions v ON v.tenant = a.tenant AND v.adapter = a.adapter
             AND v.version = a.live_version WHERE a.tenant = ? AND a.adapter = ?",
        )
        .bind(adapter.tenant.as_str())
        .bind(&adapter.adapter)
        .fetch_optional(self.pool())
        .await?;
        if let Some(row) = row {
            return version_row(&row);
        }
        self.get_adapter(adapter).await?;
        let message = "has no live version; name one of its versions or set one live";
        Err(Error::precondition("NO_LIVE_VERSION", adapter, message))
    }

    /// Whether the version of this uid is still in the catalogue.
    pub async fn has_version(&self, uid: &str) -> Result<bool> {
        let found = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM versions WHERE uid = ?)").bind(uid);
        Ok(found.fetch_one(self.pool()).await?)
    }

    /// What the same publish made before, known by its request id. NOT_FOUND where that has been deleted since; REQUEST_ID_REUSED where
    /// it was another publish.
    pub async fn published_before(
        &self,
        adapter: &AdapterName,
        request_id: &str,
        digest: Digest,
        publish: Publish,
    ) -> Result<Option<VersionRow>> {
        let mut db = self.pool().acquire().await?;
        match claim(adapter, request_id, digest, publish).first_result(&mut db).await? {
            Some(name) => read_version(&mut db, &name.parse()?).await.map(Some),
            None => Ok(None),
        }
    }

    /// Fails where another version of the adapter would be refused. Limits `max_adapters_per_tenant` and `max_versions_per_adapter`.
    pub async fn check_room(&self, name: &AdapterName, limits: &Limits) -> Result<()> {
        has_room(&mut *self.pool().acquire().await?, name, limits).await
    }

    /// One transaction: makes the adapter where it is new, numbers the version, moves the live name as asked. An earlier result of
    /// the same publish, known by its request id, or of the same job, is given again. CANCELLED where the version's job is being cancelled. Limits `max_adapters_per_tenant` and `max_versions_per_adapter`.
    pub async fn insert_version(&self, new: NewVersionRow, limits: &Limits) -> Result<VersionRow> {
        let mut tx = self.write().await?;
        let adapter = new.draft.name.adapter.clone();
        let claim = claim(&new.draft.name.adapter, &new.request_id, new.draft.digest, new.publish);
        if let Some(name) = claim.first_result(&mut tx).await? {
            return read_version(&mut tx, &name.parse()?).await;
        }
        require_tenant(&mut tx, &adapter.tenant).await?;
        if let Some(job) = &new.draft.job {
            if let Some(made) = jobs::made_version(&mut tx, job).await? {
                return read_version(&mut tx, &made).await;
            }
            check_job(&mut tx, job).await?;
        }
        has_room(&mut tx, &adapter, limits).await?;
        make_adapter(&mut tx, &adapter).await?;
        let name = VersionName { version: next_number(&mut tx, &adapter).await?, adapter };
        insert_row(&mut tx, &name, &new.draft).await?;
        if moves_live(&mut tx, &name, new.publish).await? {
            move_live(&mut tx, &name).await?;
        } else {
            change_etag(&mut tx, &name.adapter).await?;
        }
        claim.record(&mut tx, &name.to_string()).await?;
        let row = read_version(&mut tx, &name).await?;
        if !new.validate_only {
            tx.commit().await?;
        }
        Ok(row)
    }

    /// Makes a version the live one. CONFLICT where `etag` (empty: none) is not the current one.
    pub async fn set_live(&self, version: &VersionName, etag: &str) -> Result<AdapterRow> {
        let mut tx = self.write().await?;
        let adapter = read_adapter(&mut tx, &version.adapter).await?;
        check_etag(&adapter, etag)?;
        read_version(&mut tx, version).await?;
        if adapter.live.as_ref() != Some(version) {
            move_live(&mut tx, version).await?;
        }
        let adapter = read_adapter(&mut tx, &version.adapter).await?;
        tx.commit().await?;
        Ok(adapter)
    }

    /// Deletes an adapter with its versions; gives the versions' uids and blobs, for the caller to collect. Refused (ADAPTER_IN_USE)
    /// while a job that has not ended starts from it or trains into it; CONFLICT where `etag` (empty: none) is not the current one.
    pub async fn delete_adapter(&self, name: &AdapterName, etag: &str) -> Result<(Vec<String>, Vec<String>)> {
        let mut tx = self.write().await?;
        check_etag(&read_adapter(&mut tx, name).await?, etag)?;
        check_unused(&mut tx, name).await?;
        let owned: Vec<(String, String)> =
            sqlx::query_as("SELECT uid, blob FROM versions WHERE tenant = ? AND adapter = ?")
                .bind(name.tenant.as_str())
                .bind(&name.adapter)
                .fetch_all(&mut *tx)
                .await?;
        sqlx::query("DELETE FROM adapters WHERE tenant = ? AND adapter = ?")
            .bind(name.tenant.as_str())
            .bind(&name.adapter)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(owned.into_iter().unzip())
    }
}

async fn read_adapter(db: &mut SqliteConnection, name: &AdapterName) -> Result<AdapterRow> {
    let row = sqlx::query(select_adapters!("WHERE a.tenant = ? AND a.adapter = ?"))
        .bind(name.tenant.as_str())
        .bind(&name.adapter)
        .fetch_optional(db)
        .await?;
    adapter_row(&row.ok_or_else(|| Error::not_found(name))?)
}

async fn read_version(db: &mut SqliteConnection, name: &VersionName) -> Result<VersionRow> {
    let row = sqlx::query(select_versions!("WHERE v.tenant = ? AND v.adapter = ? AND v.version = ?"))
        .bind(name.tenant().as_str())
        .bind(&name.adapter.adapter)
        .bind(name.version)
        .fetch_optional(db)
        .await?;
    version_row(&row.ok_or_else(|| Error::not_found(name))?)
}

fn check_etag(adapter: &AdapterRow, etag: &str) -> Result<()> {
    if etag.is_empty() || etag == adapter.etag {
        Ok(())
    } else {
        Err(Error::Conflict { name: adapter.name.to_string() })
    }
}

async fn check_unused(db: &mut SqliteConnection, name: &AdapterName) -> Result<()> {
    let job: Option<String> = sqlx::query_scalar(concat!(
        "SELECT job FROM jobs WHERE tenant = ? AND (adapter = ? OR from_adapter = ?) AND state NOT IN ",
        ended!(),
        " LIMIT 1",
    ))
    .bind(name.tenant.as_str())
    .bind(&name.adapter)
    .bind(&name.adapter)
    .fetch_optional(db)
    .await?;
    let Some(job) = job else { return Ok(()) };
    let message = format!("training job {job} starts from it or trains into it; wait for its end or cancel it");
    Err(Error::precondition("ADAPTER_IN_USE", name, message))
}

/// Fails where the tenant may have no further adapter, or the adapter no further version.
async fn has_room(db: &mut SqliteConnection, name: &AdapterName, limits: &Limits) -> Result<()> {
    let row = sqlx::query(
        "SELECT (SELECT COUNT(*) FROM adapters WHERE tenant = ?1 AND adapter <> ?2) AS others,
                (SELECT COUNT(*) FROM versions WHERE tenant = ?1 AND adapter = ?2) AS versions,
                EXISTS (SELECT 1 FROM adapters WHERE tenant = ?1 AND adapter = ?2) AS known",
    )
    .bind(name.tenant.as_str())
    .bind(&name.adapter)
    .fetch_one(db)
    .await?;
    let known: bool = row.try_get("known")?;
    let (adapters, versions) = (limits.max_adapters_per_tenant, limits.max_versions_per_adapter);
    if !known && count(&row, "others")? >= adapters {
        return Err(too_many("max_adapters_per_tenant", format!("{} has {adapters} adapters", name.tenant)));
    }
    if count(&row, "versions")? >= versions {
        return Err(too_many("max_versions_per_adapter", format!("{name} has {versions} versions")));
    }
    Ok(())
}

/// Makes the adapter where it is new.
async fn make_adapter(db: &mut SqliteConnection, name: &AdapterName) -> Result<()> {
    let now = now();
    sqlx::query(
        "INSERT INTO adapters (tenant, adapter, etag, create_time, update_time) VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
    )
    .bind(name.tenant.as_str())
    .bind(&name.adapter)
    .bind(random_id())
    .bind(now)
    .bind(now)
    .execute(db)
    .await?;
    Ok(())
}

/// The next number under a name, also where all versions before it are gone.
async fn next_number(db: &mut SqliteConnection, name: &AdapterName) -> Result<u32> {
    let number = sqlx::query_scalar(
        "INSERT INTO version_numbers (tenant, adapter, last) VALUES (?, ?, 1)
         ON CONFLICT DO UPDATE SET last = last + 1 RETURNING last",
    );
    Ok(number.bind(name.tenant.as_str()).bind(&name.adapter).fetch_one(db).await?)
}

fn too_many(limit: &'static str, what: String) -> Error {
    Error::Exhausted { limit, message: format!("{what}; delete an adapter that is not needed"), retry_after: None }
}

async fn insert_row(db: &mut SqliteConnection, name: &VersionName, draft: &VersionRow) -> Result<()> {
    sqlx::query(
        "INSERT INTO versions (uid, tenant, adapter, version, digest, base_digest, template_digest, size_bytes, memory_bytes,
         rank, targets, parity, job, metrics, blob, create_time, held_reason, note, kind, virtual_tokens)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(&draft.uid)
    .bind(name.tenant().as_str())
    .bind(&name.adapter.adapter)
    .bind(name.version)
    .bind(draft.digest.to_string())
    .bind(draft.base_digest.to_string())
    .bind(draft.template_digest.to_string())
    .bind(int(draft.size_bytes))
    .bind(int(draft.memory_bytes))
    .bind(draft.rank)
    .bind(to_json(&draft.targets)?)
    .bind(documents::write_parity(&draft.parity)?)
    .bind(draft.job.as_ref().map(JobName::to_string))
    .bind(to_json(&draft.metrics)?)
    .bind(&draft.blob)
    .bind(now())
    .bind(&draft.held_reason)
    .bind(&draft.note)
    .bind(draft.kind.name())
    .bind(draft.virtual_tokens)
    .execute(db)
    .await?;
    Ok(())
}

async fn moves_live(db: &mut SqliteConnection, version: &VersionName, publish: Publish) -> Result<bool> {
    match publish {
        Publish::Live => Ok(true),
        Publish::VersionOnly => Ok(false),
        Publish::Auto => Ok(read_adapter(db, &version.adapter).await?.live.is_none()),
    }
}

async fn move_live(db: &mut SqliteConnection, version: &VersionName) -> Result<()> {
    sqlx::query("UPDATE adapters SET live_version = ?, etag = ?, update_time = ? WHERE tenant = ? AND adapter = ?")
        .bind(version.version)
        .bind(random_id())
        .bind(now())
        .bind(version.tenant().as_str())
        .bind(&version.adapter.adapter)
        .execute(db)
        .await?;
    Ok(())
}

async fn change_etag(db: &mut SqliteConnection, adapter: &AdapterName) -> Result<()> {
    sqlx::query("UPDATE adapters SET etag = ? WHERE tenant = ? AND adapter = ?")
        .bind(random_id())
        .bind(adapter.tenant.as_str())
        .bind(&adapter.adapter)
        .execute(db)
        .await?;
    Ok(())
}

/// A job that is being cancelled publishes nothing.
async fn check_job(db: &mut SqliteConnection, job: &JobName) -> Result<()> {
    let state: Option<String> = sqlx::query_scalar("SELECT state FROM jobs WHERE tenant = ? AND job = ?")
        .bind(job.tenant.as_str())
        .bind(&job.job)
        .fetch_optional(db)
        .await?;
    if state.as_deref() == Some("CANCELLING") { Err(Error::Cancelled) } else { Ok(()) }
}

fn adapter_row(row: &SqliteRow) -> Result<AdapterRow> {
    let tenant = TenantId::new(row.try_get("tenant")?)?;
    let name = AdapterName::new(&tenant, row.try_get("adapter")?)?;
    let (live, uid): (Option<u32>, Option<String>) = (row.try_get("live_version")?, row.try_get("uid")?);
    Ok(AdapterRow {
        live: live.map(|version| VersionName { adapter: name.clone(), version }),
        live_memory: uid
            .map(|uid| Ok::<_, Error>(LiveMemory { uid, memory_bytes: count(row, "memory_bytes")? }))
            .transpose()?,
        name,
        etag: row.try_get("etag")?,
        create_time: from_millis(row.try_get("create_time")?),
        update_time: from_millis(row.try_get("update_time")?),
    })
}

fn version_row(row: &SqliteRow) -> Result<VersionRow> {
    let tenant = TenantId::new(row.try_get("tenant")?)?;
    let adapter = AdapterName::new(&tenant, row.try_get("adapter")?)?;
    let digest = |column: &str| -> Result<Digest> { row.try_get::<&str, _>(column)?.parse() };
    let job: Option<&str> = row.try_get("job")?;
    Ok(VersionRow {
        name: VersionName { adapter, version: row.try_get("version")? },
        digest: digest("digest")?,
        base_digest: digest("base_digest")?,
        template_digest: digest("template_digest")?,
        size_bytes: count(row, "size_bytes")?,
        kind: adapter_kind(row.try_get("kind")?)?,
        rank: row.try_get("rank")?,
        virtual_tokens: row.try_get("virtual_tokens")?,
        targets: from_json(row.try_get("targets")?)?,
        parity: documents::read_parity(row.try_get("parity")?)?,
        job: job.map(str::parse).transpose()?,
        metrics: documents::read_metrics(row.try_get("metrics")?)?,
        create_time: from_millis(row.try_get("create_time")?),
        uid: row.try_get("uid")?,
        memory_bytes: count(row, "memory_bytes")?,
        blob: row.try_get("blob")?,
        held_reason: row.try_get("held_reason")?,
        note: row.try_get("note")?,
        live: row.try_get("live")?,
    })
}

fn adapter_kind(name: &str) -> Result<AdapterKind> {
    let unknown = || Error::internal(format!("catalogue: a version is of kind {name:?}, which a newer build wrote"));
    AdapterKind::from_name(name).ok_or_else(unknown)
}
