//! Training jobs: durable, one at a time, in the slack of serving. [`Trainer`] is the handle; the worker behind it claims jobs,
//! runs [`fit::fit`] and publishes through the hub.

pub mod fit;
mod job;
mod model;
pub mod objective;
pub mod optim;
mod passes;
pub mod plan;
mod publishing;
mod result;
pub mod schedule;
mod worker;

pub use job::TrainingContext;
pub use model::ModelFile;

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::Stream;
use tokio::sync::{Notify, broadcast};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Result};
use crate::ids::{JobName, Tenant};
use crate::request::{JobEvent, JobSpec, JobState, MemoryPlan, ModelFormat, Start, TrainingData};
use crate::store::{JobEnd, JobRow, NewJob, RequestKey, StoredEvent};
use crate::sync::lock;
use crate::train::fit::CancelToken;
use crate::train::job::Prepared;
use crate::work::spawn_uncancellable;

/// Stored events read at once by a watcher.
const EVENT_PAGE: u32 = 256;

/// Events that a watcher may be behind before it looks at the store unasked.
const EVENTS_BEHIND: usize = 256;

/// How often storing an event is tried, and the pause between two attempts.
const REPORT_ATTEMPTS: u32 = 3;
const REPORT_PAUSE: Duration = Duration::from_millis(200);

/// A job that would run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Validated {
    /// Updates in all.
    pub total_steps: u32,
    /// What it would train on.
    pub data: TrainingData,
    /// The memory that it would take.
    pub plan: MemoryPlan,
}

/// The handle to the trainer of a server. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Trainer {
    inner: Arc<Inner>,
    worker: Arc<Mutex<Option<JoinHandle<()>>>>,
}

/// A job's events, stored ones first. It ends after the event of the job's final state.
pub type EventStream = Pin<Box<dyn Stream<Item = Result<StoredEvent>> + Send>>;

#[derive(Debug)]
struct Inner {
    context: TrainingContext,
    /// A job may be waiting.
    queued: Notify,
    /// Says whenever an event of a job has been stored.
    events: broadcast::Sender<JobName>,
    running: Mutex<Option<Running>>,
    /// The last event could not be stored.
    reports_fail: AtomicBool,
    shutdown: CancellationToken,
}

#[derive(Debug)]
struct Running {
    job: JobName,
    control: Arc<CancelToken>,
}

impl Inner {
    /// Stores an event, then wakes the watchers. A run is worth more than a report of it: what cannot be stored after a few attempts is left
    /// out, and after that there is one attempt for each event until one succeeds.
    async fn report(&self, job: &JobName, event: JobEvent) {
        let attempts = if self.reports_fail.load(Ordering::Relaxed) { 1 } else { REPORT_ATTEMPTS };
        for attempt in 1..=attempts {
            match self.context.store.append_event(job, &event).await {
                Ok(_) => {
                    self.reports_fail.store(false, Ordering::Relaxed);
                    self.announce(job);
                    return;
                }
                Err(error) if attempt == attempts => {
                    self.reports_fail.store(true, Ordering::Relaxed);
                    tracing::warn!(%job, %error, ?event, "an event of a training job is left out");
                }
                Err(_) => tokio::time::sleep(REPORT_PAUSE).await,
            }
        }
    }

    /// Stores what a job trains on, as far as that is possible.
    async fn report_data(&self, job: &JobName, data: TrainingData, total_steps: u32) {
        if let Err(error) = self.context.store.set_job_data(job, data, total_steps).await {
            tracing::warn!(%job, %error, "could not record what a training job trains on");
        }
        if data.dropped + data.truncated > 0 {
            let TrainingData { dropped, truncated, .. } = data;
            let text = format!("records too long: {dropped} dropped, {truncated} truncated");
            self.report(job, JobEvent::Message(text)).await;
        }
    }

    fn announce(&self, job: &JobName) {
        // Nobody may be watching.
        let _ = self.events.send(job.clone());
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        lock(&self.running)
    }

    fn set_running(&self, running: Option<Running>) {
        *self.running() = running;
    }
}

impl Trainer {
    /// Marks the jobs that an earlier process left running as interrupted, and begins to take queued ones.
    pub async fn start(context: TrainingContext) -> Result<Self> {
        context.store.interrupt_stale_jobs().await?;
        let inner = Arc::new(Inner {
            context,
            queued: Notify::new(),
            events: broadcast::Sender::new(EVENTS_BEHIND),
            running: Mutex::default(),
            reports_fail: AtomicBool::default(),
            shutdown: CancellationToken::new(),
        });
        let worker = tokio::spawn(worker::run(inner.clone()));
        Ok(Self { inner, worker: Arc::new(Mutex::new(Some(worker))) })
    }

    /// Checks a job, its records too, and stores nothing. `control` ends it early.
    ///
    /// # Errors
    ///
    /// Those that the job would end with before its first step; CANCELLED.
    pub async fn validate(&self, tenant: &Tenant, spec: &JobSpec, control: Arc<CancelToken>) -> Result<Validated> {
        let Prepared { total_steps, data, plan, .. } = self.inner.context.prepare(tenant, spec, control).await?;
        Ok(Validated { total_steps, data, plan })
    }

    /// Queues a job. The same request again, known by its id, gives the job it made; another one under the id is REQUEST_ID_REUSED.
    pub async fn submit(&self, tenant: &Tenant, mut spec: JobSpec, request: &RequestKey) -> Result<JobRow> {
        let context = &self.inner.context;
        tenant.check_owns(&spec.adapter.tenant)?;
        if let Some(row) = context.store.job_of_request(&spec.adapter, request).await? {
            return Ok(row);
        }
        let checked = context.check(tenant, &spec).await?;
        // What was left to the base is said in the job.
        if let Start::Fresh(tuner) = &mut spec.start {
            tuner.fill_in(context.hub.shape())?;
        }
        let name = JobName::new(tenant.id(), &new_id())?;
        context.check_disk(&spec)?;
        let job = NewJob { name, spec, total_steps: checked.total_steps };
        let row = context.store.insert_job(&job, request, context.limits.max_jobs_per_tenant).await?;
        self.inner.announce(&row.name);
        self.inner.queued.notify_one();
        Ok(row)
    }

    /// Ends a job that waits, or makes a running one end before its next pass. Nothing is published.
    pub async fn cancel(&self, tenant: &Tenant, job: &JobName) -> Result<JobRow> {
        tenant.check_owns(&job.tenant)?;
        // To the end, also where the caller goes away: what a cancelled job has saved goes with it.
        let (trainer, job) = (self.clone(), job.clone());
        spawn_uncancellable(async move { trainer.run_cancel(&job).await }).await
    }

    /// Deletes a job that has ended or is interrupted; see [`crate::store::Store::delete_job`]. Whoever watches it is told that it is gone.
    pub async fn delete(&self, tenant: &Tenant, job: &JobName) -> Result<()> {
        tenant.check_owns(&job.tenant)?;
        let (inner, job) = (self.inner.clone(), job.clone());
        spawn_uncancellable(async move {
            inner.context.store.delete_job(&job).await?;
            inner.announce(&job);
            Ok(())
        })
        .await
    }

    /// Opens the files of the model that a job has made, in the order in which they are exported.
    ///
    /// # Errors
    /// NO_MODEL where it has made none, NO_GGUF_FORM, `min_free_disk_bytes`.
    pub async fn model_files(
        &self,
        tenant: &Tenant,
        job: &JobName,
        format: ModelFormat,
    ) -> Result<(JobRow, Vec<ModelFile>)> {
        tenant.check_owns(&job.tenant)?;
        let row = self.inner.context.store.get_job(job).await?;
        let files = match format {
            ModelFormat::HuggingFace => model::files(&self.inner.context.store, &row).await?,
            ModelFormat::Gguf => vec![model::gguf(&self.inner.context, &row).await?],
        };
        Ok((row, files))
    }

    async fn run_cancel(&self, job: &JobName) -> Result<JobRow> {
        let store = &self.inner.context.store;
        let decide = |state| match state {
            JobState::Queued | JobState::Paused | JobState::Interrupted => Some(JobState::Cancelled),
            JobState::Running | JobState::Pausing => Some(JobState::Cancelling),
            _ => None,
        };
        let moved = store.move_job(job, |state| Some((decide(state)?, JobEnd::default()))).await?;
        self.inner.announce(job);
        if moved == Some(JobState::Cancelling)
            && let Some(running) = self.inner.running().as_ref().filter(|running| running.job == *job)
        {
            running.control.stop();
        }
        let row = store.get_job(job).await?;
        match row.state {
            _ if moved.is_some() => Ok(row),
            JobState::Cancelling | JobState::Cancelled => Ok(row),
            _ => Err(Error::precondition("JOB_ENDED", job, "has ended; there is nothing to cancel")),
        }
    }

    /// Queues an interrupted job again. It publishes what its training has saved; where there is nothing, it starts over.
    pub async fn resume(&self, tenant: &Tenant, job: &JobName) -> Result<JobRow> {
        tenant.check_owns(&job.tenant)?;
        let store = &self.inner.context.store;
        let queued = store.transition(job, &[JobState::Interrupted], JobState::Queued, JobEnd::default()).await?;
        if queued.is_none() {
            let state = store.job_state(job).await?;
            let message = format!("is {state:?}; only an interrupted job can be resumed");
            return Err(Error::precondition("JOB_NOT_INTERRUPTED", job, message));
        }
        self.inner.announce(job);
        self.inner.queued.notify_one();
        store.get_job(job).await
    }

    /// The job's events after the sequence number `after`: stored ones, then live ones, without gap or repetition.
    pub async fn watch(&self, tenant: &Tenant, job: &JobName, after: u64) -> Result<EventStream> {
        tenant.check_owns(&job.tenant)?;
        let (inner, job) = (self.inner.clone(), job.clone());
        inner.context.store.get_job(&job).await?;
        Ok(Box::pin(async_stream::try_stream! {
            let mut after = after;
            let mut changed = inner.events.subscribe();
            loop {
                // Read before the events, so that a final state's own event is among them.
                let ended = inner.context.store.get_job(&job).await?.state.is_final();
                let events = inner.context.store.events_after(&job, after, EVENT_PAGE).await?;
                if events.is_empty() {
                    if ended {
                        return;
                    }
                    let going_down = tokio::select! {
                        () = changed_for(&mut changed, &job) => false,
                        () = inner.shutdown.cancelled() => true,
                    };
                    if going_down {
                        Err(going_away())?;
                    }
                }
                for event in events {
                    after = event.sequence;
                    yield event;
                }
            }
        }))
    }

    /// Stops taking jobs; a running one becomes INTERRUPTED. Returns once nothing runs.
    pub async fn shutdown(&self) {
        self.inner.shutdown.cancel();
        let worker = lock(&self.worker).take();
        if let Some(worker) = worker
            && let Err(error) = worker.await
        {
            tracing::error!(%error, "the training worker ended badly");
        }
    }
}

/// Waits for an event of this job, or until so many of others have passed that one may have been missed.
async fn changed_for(events: &mut broadcast::Receiver<JobName>, job: &JobName) {
    while matches!(events.recv().await, Ok(other) if other != *job) {}
}

fn going_away() -> Error {
    Error::Unavailable {
        message: "the server is shutting down; watch again from the last sequence".into(),
        retry_after: None,
    }
}

/// 16 hex digits.
fn new_id() -> String {
    format!("{:016x}", rand::random::<u64>())
}

#[cfg(test)]
pub(crate) mod tests;
