//! Datasets: rows of the catalogue; the content is a blob.

use std::time::SystemTime;

use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};

use crate::error::{Error, Result};
use crate::ids::{DatasetName, Digest, TenantId};
use crate::store::requests::Claim;
use crate::store::rows::{count, ended, from_millis, int, now, require_tenant};
use crate::store::{Listed, Page, Store};

/// What the records of a dataset are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DatasetKind {
    /// Chats, or prompts with completions.
    Sft,
    /// Prompts with a chosen and a rejected answer.
    Preferences,
}

/// A dataset.
#[derive(Debug, Clone, PartialEq)]
pub struct DatasetRow {
    /// Its name.
    pub name: DatasetName,
    /// What its records are.
    pub kind: DatasetKind,
    /// How many there are.
    pub records: u64,
    /// Bytes as uploaded.
    pub size_bytes: u64,
    /// Bytes unpacked, where that is known: earlier builds did not count them.
    pub unpacked_bytes: Option<u64>,
    /// Of the bytes as uploaded.
    pub digest: Digest,
    /// When the upload ended.
    pub create_time: SystemTime,
    /// The key of the content; empty for one that was only validated.
    pub blob: String,
}

/// A dataset to insert.
#[derive(Debug, Clone, PartialEq)]
pub struct NewDataset {
    /// Its name.
    pub name: DatasetName,
    /// What its records are.
    pub kind: DatasetKind,
    /// How many there are.
    pub records: u64,
    /// Bytes of the blob.
    pub size_bytes: u64,
    /// Bytes of its content unpacked.
    pub unpacked_bytes: u64,
    /// Of the blob.
    pub digest: Digest,
    /// Where its content lies.
    pub blob: String,
}

/// What there is under a name that an upload asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum DatasetBefore {
    /// Nothing.
    Free,
    /// What the first call with this request id made.
    Made(DatasetRow),
    /// Another call's.
    Taken(DatasetRow),
}

impl NewDataset {
    /// The row it would be, were it made now.
    pub fn into_row(self) -> DatasetRow {
        let Self { name, kind, records, size_bytes, unpacked_bytes, digest, blob } = self;
        let (unpacked_bytes, create_time) = (Some(unpacked_bytes), SystemTime::now());
        DatasetRow { name, kind, records, size_bytes, unpacked_bytes, digest, create_time, blob }
    }
}

impl DatasetKind {
    fn name(self) -> &'static str {
        match self {
            Self::Sft => "SFT",
            Self::Preferences => "PREFERENCES",
        }
    }

    /// The method that makes one, whose request ids are its own.
    fn method(self) -> &'static str {
        match self {
            Self::Sft => "UploadDataset",
            Self::Preferences => "UploadPreferences",
        }
    }

    fn from_name(name: &str) -> Result<Self> {
        [Self::Sft, Self::Preferences]
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| Error::internal(format!("catalogue: no kind of dataset is called {name:?}")))
    }
}

impl Store {
    /// Makes a dataset whose blob is there already. The same again with its request id gives the dataset that it made, with another blob.
    /// `most`: datasets of the tenant (limit `max_datasets_per_tenant`).
    ///
    /// # Errors
    /// REQUEST_ID_REUSED, ALREADY_EXISTS, EXHAUSTED; NOT_FOUND where the tenant, or what the request id has made, is gone.
    pub async fn insert_dataset(&self, dataset: &NewDataset, request_id: &str, most: u64) -> Result<DatasetRow> {
        let NewDataset { name, kind, records, size_bytes, unpacked_bytes, digest, blob } = dataset;
        let mut tx = self.write().await?;
        require_tenant(&mut tx, &name.tenant).await?;
        let claim = claim(name, *kind, request_id, Some(*digest));
        if let Some(made) = made_by(&mut tx, &claim).await? {
            return Ok(made);
        }
        let count: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM datasets WHERE tenant = ?")
            .bind(name.tenant.as_str())
            .fetch_one(&mut *tx)
            .await?;
        if count >= int(most) {
            let message = format!("{} has {count} datasets; delete one first", name.tenant);
            return Err(Error::Exhausted { limit: "max_datasets_per_tenant", message, retry_after: None });
        }
        let made = sqlx::query(
            "INSERT INTO datasets (tenant, dataset, kind, records, size_bytes, unpacked_bytes, digest, blob, create_time)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING RETURNING *",
        )
        .bind(name.tenant.as_str())
        .bind(&name.dataset)
        .bind(kind.name())
        .bind(int(*records))
        .bind(int(*size_bytes))
        .bind(int(*unpacked_bytes))
        .bind(digest.to_string())
        .bind(blob)
        .bind(now())
        .fetch_optional(&mut *tx)
        .await?;
        let row = dataset_row(&made.ok_or_else(|| taken(name))?)?;
        claim.record(&mut tx, blob).await?;
        tx.commit().await?;
        Ok(row)
    }

    /// What an upload asks before it begins. `digest` is `None` while it is not known.
    ///
    /// # Errors
    /// NOT_FOUND where there is no such tenant; REQUEST_ID_REUSED.
    pub async fn dataset_before(
        &self,
        name: &DatasetName,
        kind: DatasetKind,
        request_id: &str,
        digest: Option<Digest>,
    ) -> Result<DatasetBefore> {
        // One snapshot: between two the first call of a retried upload might commit.
        let mut tx = self.pool().begin().await?;
        require_tenant(&mut tx, &name.tenant).await?;
        Ok(match made_by(&mut tx, &claim(name, kind, request_id, digest)).await? {
            Some(made) => DatasetBefore::Made(made),
            None => find(&mut tx, name).await?.map_or(DatasetBefore::Free, DatasetBefore::Taken),
        })
    }

    /// Returns a dataset.
    pub async fn get_dataset(&self, name: &DatasetName) -> Result<DatasetRow> {
        find(&mut *self.pool().acquire().await?, name).await?.ok_or_else(|| Error::not_found(name))
    }

    /// A tenant's datasets by id.
    pub async fn list_datasets(&self, tenant: &TenantId, page: &Page) -> Result<Listed<DatasetRow>> {
        let rows = sqlx::query("SELECT * FROM datasets WHERE tenant = ? AND dataset > ? ORDER BY dataset LIMIT ?")
            .bind(tenant.as_str())
            .bind(&page.token)
            .bind(page.rows())
            .fetch_all(self.pool())
            .await?;
        Listed::read(rows, page, dataset_row, |row| Ok(row.try_get("dataset")?))
    }

    /// Deletes a dataset; gives its blob, for the caller to collect. Refused (DATASET_IN_USE) while a job that has not ended uses it.
    pub async fn delete_dataset(&self, name: &DatasetName) -> Result<String> {
        let mut tx = self.write().await?;
        let user: Option<String> = sqlx::query_scalar(concat!(
            "SELECT job FROM jobs WHERE tenant = ? AND dataset = ? AND state NOT IN ",
            ended!(),
            " LIMIT 1",
        ))
        .bind(name.tenant.as_str())
        .bind(&name.dataset)
        .fetch_optional(&mut *tx)
        .await?;
        if let Some(job) = user {
            let message = format!("trainingJobs/{job} uses it and has not ended; cancel the job and retry");
            return Err(Error::precondition("DATASET_IN_USE", name, message));
        }
        let blob: Option<String> =
            sqlx::query_scalar("DELETE FROM datasets WHERE tenant = ? AND dataset = ? RETURNING blob")
                .bind(name.tenant.as_str())
                .bind(&name.dataset)
                .fetch_optional(&mut *tx)
                .await?;
        let blob = blob.ok_or_else(|| Error::not_found(name))?;
        tx.commit().await?;
        Ok(blob)
    }
}

/// The name is another dataset's.
pub fn taken(name: &DatasetName) -> Error {
    Error::AlreadyExists { name: name.to_string(), message: "delete it first, or upload under another name".into() }
}

fn claim<'a>(name: &'a DatasetName, kind: DatasetKind, request_id: &'a str, digest: Option<Digest>) -> Claim<'a> {
    let (method, content) = (kind.method(), digest.map(|digest| digest.to_string()));
    Claim { tenant: &name.tenant, method, request_id, target: name.to_string(), content }
}

/// What the first call with this request id made, known by its blob: the name may mean another dataset by now. NOT_FOUND where it has been
/// deleted since.
async fn made_by(db: &mut SqliteConnection, claim: &Claim<'_>) -> Result<Option<DatasetRow>> {
    let Some(blob) = claim.first_result(db).await? else { return Ok(None) };
    let row = sqlx::query("SELECT * FROM datasets WHERE tenant = ? AND blob = ?")
        .bind(claim.tenant.as_str())
        .bind(&blob)
        .fetch_optional(db)
        .await?;
    let gone = || Error::not_found(format!("what the first call with request_id {:?} has made", claim.request_id));
    dataset_row(&row.ok_or_else(gone)?).map(Some)
}

async fn find(db: &mut SqliteConnection, name: &DatasetName) -> Result<Option<DatasetRow>> {
    let row = sqlx::query("SELECT * FROM datasets WHERE tenant = ? AND dataset = ?")
        .bind(name.tenant.as_str())
        .bind(&name.dataset)
        .fetch_optional(db)
        .await?;
    row.as_ref().map(dataset_row).transpose()
}

fn dataset_row(row: &SqliteRow) -> Result<DatasetRow> {
    Ok(DatasetRow {
        name: DatasetName::new(&TenantId::new(row.try_get("tenant")?)?, row.try_get("dataset")?)?,
        kind: DatasetKind::from_name(row.try_get("kind")?)?,
        records: count(row, "records")?,
        size_bytes: count(row, "size_bytes")?,
        unpacked_bytes: row.try_get::<Option<i64>, _>("unpacked_bytes")?.map(|bytes| bytes.max(0).unsigned_abs()),
        digest: row.try_get::<&str, _>("digest")?.parse()?,
        create_time: from_millis(row.try_get("create_time")?),
        blob: row.try_get("blob")?,
    })
}
