//! Training jobs and their events. A change of state and its event are one transaction.

use std::time::SystemTime;

use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};

use crate::error::{Error, Result};
use crate::ids::{AdapterName, JobName, Tenant, TenantId, VersionName};
use crate::request::{JobEvent, JobSpec, JobState, Start, TrainingData};
use crate::store::requests::{Claim, RequestKey};
use crate::store::rows::{bad_token, count, ended, from_millis, held_by_worker, int, now, readable, require_tenant};
use crate::store::{Listed, Page, Store, documents};

/// A training job.
#[derive(Debug, Clone, PartialEq)]
pub struct JobRow {
    /// Its name.
    pub name: JobName,
    /// What was asked for.
    pub spec: JobSpec,
    /// Where it is.
    pub state: JobState,
    /// Optimizer steps taken.
    pub step: u32,
    /// Updates in all.
    pub total_steps: u32,
    /// Once SUCCEEDED, or FAILED with a version that was kept.
    pub version: Option<VersionName>,
    /// Whether `version` is its adapter's live one.
    pub live: bool,
    /// Once FAILED or INTERRUPTED.
    pub error: Option<String>,
    /// Zeros until its records have been read.
    pub data: TrainingData,
    /// The folder of blobs that is its own from when it is first claimed until it has ended, for the adapter that it trains; whole once it
    /// has the file [`RESULT_MANIFEST`]. One that has made a model keeps it.
    pub result: Option<String>,
    /// When it was submitted.
    pub create_time: SystemTime,
    /// When it was last begun.
    pub start_time: Option<SystemTime>,
    /// When it ended.
    pub end_time: Option<SystemTime>,
}

impl JobRow {
    /// Returns whether it has made a model, which is in its folder.
    pub fn has_model(&self) -> bool {
        self.state == JobState::Succeeded && self.result.is_some()
    }
}

/// The columns of a job, and whether its version is live.
macro_rules! job_columns {
    () => {
        "*, COALESCE((SELECT live_version FROM adapters WHERE tenant = jobs.tenant AND adapter = jobs.version_adapter) = version, 0) AS live"
    };
}

/// A job to queue.
#[derive(Debug, Clone, PartialEq)]
pub struct NewJob {
    /// Its name.
    pub name: JobName,
    /// What is asked for.
    pub spec: JobSpec,
    /// Updates in all.
    pub total_steps: u32,
}

/// What a change of state leaves in the row.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct JobEnd {
    /// What it made.
    pub version: Option<VersionName>,
    /// Why it failed.
    pub error: Option<String>,
    /// What it has saved is a model, which it keeps.
    pub keeps_result: bool,
}

/// An event as stored. `sequence` counts from 1 within its job.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredEvent {
    /// Its number within the job, from 1.
    pub sequence: u64,
    /// When it was written.
    pub time: SystemTime,
    /// What happened.
    pub event: JobEvent,
}

/// The file of a job's result that is written after all others.
pub const RESULT_MANIFEST: &str = "result.json";

const TRAIN_METHOD: &str = "Train";

const STATES: [JobState; 9] = [
    JobState::Queued,
    JobState::Running,
    JobState::Pausing,
    JobState::Paused,
    JobState::Interrupted,
    JobState::Succeeded,
    JobState::Failed,
    JobState::Cancelling,
    JobState::Cancelled,
];

fn state_name(state: JobState) -> &'static str {
    match state {
        JobState::Queued => "QUEUED",
        JobState::Running => "RUNNING",
        JobState::Pausing => "PAUSING",
        JobState::Paused => "PAUSED",
        JobState::Interrupted => "INTERRUPTED",
        JobState::Succeeded => "SUCCEEDED",
        JobState::Failed => "FAILED",
        JobState::Cancelling => "CANCELLING",
        JobState::Cancelled => "CANCELLED",
    }
}

fn state_from_name(name: &str) -> Result<JobState> {
    let found = STATES.into_iter().find(|state| state_name(*state) == name);
    found.ok_or_else(|| Error::internal(format!("catalogue: no job state is called {name:?}")))
}

impl Store {
    /// Queues a job; QUEUED is its first event. The same request again, known by its id, gives the job it made. `most_open`: jobs of the
    /// tenant that have not ended (limit `max_jobs_per_tenant`).
    ///
    /// # Errors
    /// REQUEST_ID_REUSED; EXHAUSTED; NOT_FOUND where the dataset or the starting version is gone.
    pub async fn insert_job(&self, job: &NewJob, request: &RequestKey, most_open: u64) -> Result<JobRow> {
        let tenant = &job.name.tenant;
        let mut tx = self.write().await?;
        require_tenant(&mut tx, tenant).await?;
        let claim = claim_of(&job.spec.adapter, request);
        if let Some(made) = made_by(&mut tx, &claim).await? {
            return Ok(made);
        }
        let open: i64 =
            sqlx::query_scalar(concat!("SELECT COUNT(*) FROM jobs WHERE tenant = ? AND state NOT IN ", ended!()))
                .bind(tenant.as_str())
                .fetch_one(&mut *tx)
                .await?;
        if open >= int(most_open) {
            let message = format!("{tenant} has {open} jobs that have not ended; wait for one or cancel one");
            return Err(Error::Exhausted { limit: "max_jobs_per_tenant", message, retry_after: None });
        }
        require_inputs(&mut tx, &job.spec).await?;
        let row = insert(&mut tx, job).await?;
        append(&mut tx, &row.name, &state_event(row.state, &JobEnd::default(), false)).await?;
        claim.record(&mut tx, &row.name.to_string()).await?;
        tx.commit().await?;
        log_state(&row.name, row.state, &JobEnd::default());
        Ok(row)
    }

    /// The job that the same request made before, known by its id. REQUEST_ID_REUSED where it was another request.
    pub async fn job_of_request(&self, adapter: &AdapterName, request: &RequestKey) -> Result<Option<JobRow>> {
        made_by(&mut *self.pool().acquire().await?, &claim_of(adapter, request)).await
    }

    /// Returns a job.
    pub async fn get_job(&self, name: &JobName) -> Result<JobRow> {
        find(&mut *self.pool().acquire().await?, name).await?.ok_or_else(|| Error::not_found(name))
    }

    /// A tenant's jobs, newest first.
    pub async fn list_jobs(&self, tenant: &TenantId, page: &Page) -> Result<Listed<JobRow>> {
        let (before, job) = match page.token.split_once('.') {
            Some((millis, job)) => (millis.parse().map_err(|_| bad_token())?, job),
            None if page.token.is_empty() => (i64::MAX, ""),
            None => return Err(bad_token()),
        };
        let rows = sqlx::query(concat!(
            "SELECT ",
            job_columns!(),
            " FROM jobs WHERE tenant = ? AND (create_time, job) < (?, ?) ORDER BY create_time DESC, job DESC LIMIT ?",
        ))
        .bind(tenant.as_str())
        .bind(before)
        .bind(job)
        .bind(page.rows())
        .fetch_all(self.pool())
        .await?;
        let token = |row: &SqliteRow| {
            Ok(format!("{}.{}", row.try_get::<i64, _>("create_time")?, row.try_get::<&str, _>("job")?))
        };
        Listed::read(rows, page, job_row, token)
    }

    /// Takes the next queued job: of the tenant whose last job started longest ago, the oldest. It is RUNNING from then on. One that cannot
    /// be read is INTERRUPTED, lest it be the next one for ever; the build that wrote it can resume it.
    pub async fn claim_next_job(&self) -> Result<Option<(Tenant, JobRow)>> {
        let mut tx = self.write().await?;
        while let Some(row) = claim(&mut tx).await? {
            let name = job_name(&row)?;
            match job_row(&row) {
                Ok(job) => {
                    append(&mut tx, &name, &state_event(job.state, &JobEnd::default(), false)).await?;
                    tx.commit().await?;
                    log_state(&name, job.state, &JobEnd::default());
                    return Ok(Some((Tenant::proven(name.tenant), job)));
                }
                Err(_) => {
                    let why = "its stored spec cannot be read by this build of the server; run the build that wrote it, and resume the job";
                    let end = JobEnd { error: Some(why.to_owned()), ..JobEnd::default() };
                    set_state(&mut tx, &name, JobState::Interrupted, &end).await?;
                }
            }
        }
        tx.commit().await?;
        Ok(None)
    }

    /// Returns a job's state, also where nothing else of it can be read.
    pub async fn job_state(&self, name: &JobName) -> Result<JobState> {
        let state: Option<String> = sqlx::query_scalar("SELECT state FROM jobs WHERE tenant = ? AND job = ?")
            .bind(name.tenant.as_str())
            .bind(&name.job)
            .fetch_optional(self.pool())
            .await?;
        state_from_name(&state.ok_or_else(|| Error::not_found(name))?)
    }

    /// Moves a job from one of the states `from` to `to`; see [`Store::move_job`].
    pub async fn transition(
        &self,
        name: &JobName,
        from: &[JobState],
        to: JobState,
        end: JobEnd,
    ) -> Result<Option<JobState>> {
        self.move_job(name, |state| from.contains(&state).then_some((to, end))).await
    }

    /// Moves a job to what `decide` says of the state that it is in, with its event, and gives the new state. `None` where `decide` leaves it.
    /// A job whose spec cannot be read moves too: it must be possible to cancel it.
    pub async fn move_job(
        &self,
        name: &JobName,
        decide: impl FnOnce(JobState) -> Option<(JobState, JobEnd)>,
    ) -> Result<Option<JobState>> {
        let mut tx = self.write().await?;
        let found: Option<(String, Option<String>)> =
            sqlx::query_as("SELECT state, result FROM jobs WHERE tenant = ? AND job = ?")
                .bind(name.tenant.as_str())
                .bind(&name.job)
                .fetch_optional(&mut *tx)
                .await?;
        let (state, result) = found.ok_or_else(|| Error::not_found(name))?;
        let Some((to, end)) = decide(state_from_name(&state)?) else { return Ok(None) };
        set_state(&mut tx, name, to, &end).await?;
        tx.commit().await?;
        log_state(name, to, &end);
        if let Some(result) = result.filter(|_| to.is_final() && !end.keeps_result) {
            self.collect_blobs(&[result]).await;
        }
        Ok(Some(to))
    }

    /// Deletes a job that has ended or is interrupted, with its events and its saved result or model.
    ///
    /// # Errors
    /// JOB_NOT_ENDED; NOT_FOUND.
    pub async fn delete_job(&self, name: &JobName) -> Result<()> {
        let mut tx = self.write().await?;
        let found: Option<(String, Option<String>)> = sqlx::query_as(concat!(
            "DELETE FROM jobs WHERE tenant = ? AND job = ? AND (state = 'INTERRUPTED' OR state IN ",
            ended!(),
            ") RETURNING state, result",
        ))
        .bind(name.tenant.as_str())
        .bind(&name.job)
        .fetch_optional(&mut *tx)
        .await?;
        let Some((state, result)) = found else {
            let exists: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM jobs WHERE tenant = ? AND job = ?)")
                .bind(name.tenant.as_str())
                .bind(&name.job)
                .fetch_one(&mut *tx)
                .await?;
            let message = "the job has not ended; cancel it first, or wait for its end";
            return Err(if exists {
                Error::precondition("JOB_NOT_ENDED", name, message)
            } else {
                Error::not_found(name)
            });
        };
        tx.commit().await?;
        tracing::info!(tenant = %name.tenant, job = %name, state, "job deleted");
        if let Some(result) = result {
            self.collect_blobs(&[result]).await;
        }
        Ok(())
    }

    /// Stores what a job trains on, and that it has taken no step yet.
    pub async fn set_job_data(&self, name: &JobName, data: TrainingData, total_steps: u32) -> Result<()> {
        let mut tx = self.write().await?;
        sqlx::query("UPDATE jobs SET data = ?, total_steps = ?, step = 0 WHERE tenant = ? AND job = ?")
            .bind(documents::write_data(&data)?)
            .bind(total_steps)
            .bind(name.tenant.as_str())
            .bind(&name.job)
            .execute(&mut *tx)
            .await?;
        tx.commit().await
    }

    /// Stores an event and gives its sequence number; a step moves the job's count of steps too.
    pub async fn append_event(&self, name: &JobName, event: &JobEvent) -> Result<u64> {
        let mut tx = self.write().await?;
        if let JobEvent::Step { step, .. } = event {
            sqlx::query("UPDATE jobs SET step = ? WHERE tenant = ? AND job = ?")
                .bind(step)
                .bind(name.tenant.as_str())
                .bind(&name.job)
                .execute(&mut *tx)
                .await?;
        }
        let sequence = append(&mut tx, name, event).await?;
        tx.commit().await?;
        Ok(sequence)
    }

    /// At most `limit` events with a sequence number above `after`, in order.
    pub async fn events_after(&self, name: &JobName, after: u64, limit: u32) -> Result<Vec<StoredEvent>> {
        let rows = sqlx::query(
            "SELECT sequence, time, event FROM job_events WHERE tenant = ? AND job = ? AND sequence > ? ORDER BY sequence LIMIT ?",
        )
        .bind(name.tenant.as_str())
        .bind(&name.job)
        .bind(int(after))
        .bind(limit)
        .fetch_all(self.pool())
        .await?;
        let event = |row: &SqliteRow| -> Result<StoredEvent> {
            Ok(StoredEvent {
                sequence: count(row, "sequence")?,
                time: from_millis(row.try_get("time")?),
                event: documents::read_event(row.try_get("event")?)
                    .unwrap_or_else(|error| unreadable_event(name, &error)),
            })
        };
        rows.iter().map(event).collect()
    }

    /// At start, for what a dead process was running: a job whose version is in the catalogue has SUCCEEDED, one that was being
    /// cancelled is CANCELLED, any other is INTERRUPTED. A version that its job kept from going live makes it FAILED. Needs nothing of a row but its name and state.
    pub async fn interrupt_stale_jobs(&self) -> Result<()> {
        let mut tx = self.write().await?;
        let rows =
            sqlx::query(concat!("SELECT * FROM jobs WHERE state IN ", held_by_worker!())).fetch_all(&mut *tx).await?;
        let mut unowned = Vec::new();
        let mut ended = Vec::new();
        for row in rows {
            let name_and_state = || Ok((job_name(&row)?, state_from_name(row.try_get("state")?)?));
            let Some((name, state)) = readable(name_and_state()) else { continue };
            let result: Option<String> = row.try_get("result")?;
            let (to, end) = match (made_version(&mut tx, &name).await?, state) {
                (Some(version), _) => made_end(&mut tx, version).await?,
                (None, JobState::Cancelling) => (JobState::Cancelled, JobEnd::default()),
                (None, _) => {
                    let why = if self.is_saved(result.as_deref()).await {
                        "the process that ran it ended after the training; resume the job to publish what it has saved"
                    } else {
                        "the process that ran it ended; resume the job to run it again"
                    };
                    (JobState::Interrupted, JobEnd { error: Some(why.to_owned()), ..JobEnd::default() })
                }
            };
            set_state(&mut tx, &name, to, &end).await?;
            unowned.extend(result.filter(|_| to.is_final()));
            ended.push((name, to, end));
        }
        tx.commit().await?;
        ended.iter().for_each(|(name, to, end)| log_state(name, *to, end));
        if !unowned.is_empty() {
            self.collect_blobs(&unowned).await;
        }
        Ok(())
    }

    /// Whether a job's result is there as a whole.
    async fn is_saved(&self, result: Option<&str>) -> bool {
        let Some(folder) = result else { return false };
        matches!(self.blobs().size(&format!("{folder}/{RESULT_MANIFEST}")).await, Ok(Some(_)))
    }
}

/// A job as its caller asked for it, by the adapter that it trains.
fn claim_of<'a>(adapter: &'a AdapterName, request: &'a RequestKey) -> Claim<'a> {
    let (target, content) = (adapter.to_string(), Some(request.content.clone()));
    Claim { tenant: &adapter.tenant, method: TRAIN_METHOD, request_id: &request.id, target, content }
}

async fn made_by(db: &mut SqliteConnection, claim: &Claim<'_>) -> Result<Option<JobRow>> {
    let Some(name) = claim.first_result(db).await? else { return Ok(None) };
    let name: JobName = name.parse()?;
    find(db, &name).await?.ok_or_else(|| Error::not_found(name)).map(Some)
}

async fn find(db: &mut SqliteConnection, name: &JobName) -> Result<Option<JobRow>> {
    let row = sqlx::query(concat!("SELECT ", job_columns!(), " FROM jobs WHERE tenant = ? AND job = ?"))
        .bind(name.tenant.as_str())
        .bind(&name.job)
        .fetch_optional(db)
        .await?;
    row.as_ref().map(job_row).transpose()
}

/// The dataset and the starting version are there at the moment the job is queued; from then on they cannot be deleted.
async fn require_inputs(db: &mut SqliteConnection, spec: &JobSpec) -> Result<()> {
    let dataset = sqlx::query("SELECT 1 FROM datasets WHERE tenant = ? AND dataset = ?")
        .bind(spec.dataset.tenant.as_str())
        .bind(&spec.dataset.dataset)
        .fetch_optional(&mut *db)
        .await?;
    dataset.ok_or_else(|| Error::not_found(&spec.dataset))?;
    let Start::From(version) = &spec.start else { return Ok(()) };
    let found = sqlx::query("SELECT 1 FROM versions WHERE tenant = ? AND adapter = ? AND version = ?")
        .bind(version.tenant().as_str())
        .bind(&version.adapter.adapter)
        .bind(version.version)
        .fetch_optional(db)
        .await?;
    found.map(|_| ()).ok_or_else(|| Error::not_found(version))
}

async fn insert(db: &mut SqliteConnection, job: &NewJob) -> Result<JobRow> {
    let NewJob { name, spec, total_steps } = job;
    let from = match &spec.start {
        Start::From(version) => Some(version),
        Start::Fresh(_) => None,
    };
    let row = sqlx::query(
        "INSERT INTO jobs (tenant, job, adapter, from_adapter, from_version, dataset, state, spec, total_steps, create_time)
         VALUES (?, ?, ?, ?, ?, ?, 'QUEUED', ?, ?, ?) RETURNING *, 0 AS live",
    )
    .bind(name.tenant.as_str())
    .bind(&name.job)
    .bind(&spec.adapter.adapter)
    .bind(from.map(|version| version.adapter.adapter.as_str()))
    .bind(from.map(|version| version.version))
    .bind(&spec.dataset.dataset)
    .bind(documents::write_spec(spec)?)
    .bind(total_steps)
    .bind(now())
    .fetch_one(db)
    .await?;
    job_row(&row)
}

/// Marks the job that is to run next as running.
async fn claim(db: &mut SqliteConnection) -> Result<Option<SqliteRow>> {
    let row = sqlx::query(
        "UPDATE jobs SET state = 'RUNNING', start_time = ?, end_time = NULL, error = NULL,
         result = tenant || '/jobs/' || job
         WHERE rowid = (
            SELECT rowid FROM jobs AS waiting WHERE state = 'QUEUED'
            ORDER BY (SELECT last_start FROM tenants WHERE tenant = waiting.tenant), create_time, rowid
            LIMIT 1
         ) RETURNING *, 0 AS live",
    )
    .bind(now())
    .fetch_optional(&mut *db)
    .await?;
    let Some(row) = row else { return Ok(None) };
    // Later than any other's, also where the clock stands still.
    sqlx::query("UPDATE tenants SET last_start = MAX(?, 1 + (SELECT MAX(last_start) FROM tenants)) WHERE tenant = ?")
        .bind(now())
        .bind(row.try_get::<&str, _>("tenant")?)
        .execute(db)
        .await?;
    Ok(Some(row))
}

/// Sets the state and what goes with it, and appends the event.
async fn set_state(db: &mut SqliteConnection, name: &JobName, to: JobState, end: &JobEnd) -> Result<()> {
    let ended = to.is_final() || to == JobState::Interrupted;
    let row = sqlx::query(concat!(
        "UPDATE jobs SET state = ?1, version_adapter = ?2, version = ?3, error = ?4, end_time = ?5, ",
        "result = CASE WHEN ?6 THEN NULL ELSE result END WHERE tenant = ?7 AND job = ?8 RETURNING ",
        job_columns!(),
    ))
    .bind(state_name(to))
    .bind(end.version.as_ref().map(|version| version.adapter.adapter.as_str()))
    .bind(end.version.as_ref().map(|version| version.version))
    .bind(&end.error)
    .bind(ended.then(now))
    .bind(to.is_final() && !end.keeps_result)
    .bind(name.tenant.as_str())
    .bind(&name.job)
    .fetch_one(&mut *db)
    .await?;
    append(db, name, &state_event(to, end, row.try_get("live")?)).await?;
    Ok(())
}

/// Says in the log that a job has come to a state.
fn log_state(name: &JobName, state: JobState, end: &JobEnd) {
    let (tenant, state) = (&name.tenant, state_name(state));
    let version = end.version.as_ref().map(ToString::to_string);
    tracing::info!(%tenant, job = %name, %state, version, error = end.error, "job state");
}

fn state_event(state: JobState, end: &JobEnd, live: bool) -> JobEvent {
    let JobEnd { version, error, .. } = end.clone();
    JobEvent::State { state, error, live: version.is_some().then_some(live), version }
}

async fn append(db: &mut SqliteConnection, name: &JobName, event: &JobEvent) -> Result<u64> {
    let sequence: i64 = sqlx::query_scalar(
        "INSERT INTO job_events (tenant, job, sequence, time, event)
         SELECT ?1, ?2, 1 + COALESCE(MAX(sequence), 0), ?3, ?4 FROM job_events WHERE tenant = ?1 AND job = ?2
         RETURNING sequence",
    )
    .bind(name.tenant.as_str())
    .bind(&name.job)
    .bind(now())
    .bind(documents::write_event(event)?)
    .fetch_one(db)
    .await?;
    Ok(sequence.max(0) as u64)
}

/// How a job ended that has made a version.
async fn made_end(db: &mut SqliteConnection, version: VersionName) -> Result<(JobState, JobEnd)> {
    let held: Option<String> =
        sqlx::query_scalar("SELECT held_reason FROM versions WHERE tenant = ? AND adapter = ? AND version = ?")
            .bind(version.tenant().as_str())
            .bind(&version.adapter.adapter)
            .bind(version.version)
            .fetch_one(db)
            .await?;
    let error = held.map(|reason| held_error(&version, &reason));
    let state = if error.is_some() { JobState::Failed } else { JobState::Succeeded };
    Ok((state, JobEnd { version: Some(version), error, keeps_result: false }))
}

/// What a job says that has kept its version from going live.
pub fn held_error(version: &VersionName, reason: &str) -> String {
    format!("{reason}; {version} is kept and was not made live")
}

/// The version that a job has made.
pub(super) async fn made_version(db: &mut SqliteConnection, name: &JobName) -> Result<Option<VersionName>> {
    let row = sqlx::query("SELECT adapter, version FROM versions WHERE tenant = ? AND job = ?")
        .bind(name.tenant.as_str())
        .bind(name.to_string())
        .fetch_optional(db)
        .await?;
    row.map(|row| version_name(&name.tenant, row.try_get("adapter")?, row.try_get("version")?)).transpose()
}

fn version_name(tenant: &TenantId, adapter: &str, version: u32) -> Result<VersionName> {
    Ok(VersionName { adapter: AdapterName::new(tenant, adapter)?, version })
}

fn job_name(row: &SqliteRow) -> Result<JobName> {
    JobName::new(&TenantId::new(row.try_get("tenant")?)?, row.try_get("job")?)
}

/// A job whose spec is damaged or of a later build.
fn unreadable(name: &JobName, state: JobState, why: &Error) -> Error {
    tracing::error!(job = %name, error = %why, "a job's spec cannot be read");
    let advice = if state.is_final() { "delete it" } else { "cancel it" };
    let state = state_name(state);
    let message = format!(
        "it is {state}, and its stored spec cannot be read by this build of the server; {advice}, or run the build that wrote it"
    );
    Error::precondition("JOB_UNREADABLE", name, message)
}

/// Stands in the place of an event that cannot be read, so that the numbers of those after it stay.
fn unreadable_event(name: &JobName, why: &Error) -> JobEvent {
    tracing::error!(job = %name, error = %why, "a job's event cannot be read");
    JobEvent::Message("an event that this build of the server cannot read".to_owned())
}

fn job_row(row: &SqliteRow) -> Result<JobRow> {
    let tenant = TenantId::new(row.try_get("tenant")?)?;
    let time = |column: &str| row.try_get::<Option<i64>, _>(column).map(|millis| millis.map(from_millis));
    let version = match (row.try_get::<Option<&str>, _>("version_adapter")?, row.try_get("version")?) {
        (Some(adapter), Some(version)) => Some(version_name(&tenant, adapter, version)?),
        _ => None,
    };
    let (name, state) = (job_name(row)?, state_from_name(row.try_get("state")?)?);
    let spec = documents::read_spec(row.try_get("spec")?).map_err(|why| unreadable(&name, state, &why))?;
    Ok(JobRow {
        name,
        spec,
        state,
        step: row.try_get("step")?,
        total_steps: row.try_get("total_steps")?,
        version,
        live: row.try_get("live")?,
        data: documents::read_data(row.try_get("data")?)?,
        result: row.try_get("result")?,
        error: row.try_get("error")?,
        create_time: from_millis(row.try_get("create_time")?),
        start_time: time("start_time")?,
        end_time: time("end_time")?,
    })
}

#[cfg(test)]
mod tests;
