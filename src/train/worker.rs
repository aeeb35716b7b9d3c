//! Runs queued jobs one after another: claims one, trains it while it is not cancelled, publishes the result, writes how it ended.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use crate::adapter::peft::Package;
use crate::error::{Error, Result};
use crate::ids::{JobName, Tenant, TenantId};
use crate::request::{FullSpec, JobEvent, JobState, TunerSpec, metric};
use crate::store::{JobEnd, JobRow, UsageDelta, VersionRow, held_error};
use crate::train::fit::{CancelToken, DIVERGED, FitInputs, FitOutcome, fit};
use crate::train::job::{Prepared, keeps_model};
use crate::train::publishing::{Publication, save_and_publish, shown};
use crate::train::result::TrainingResult;
use crate::train::{Inner, Running, TrainingContext, model};

/// How often a run's tokens are counted, and its state looked at.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How often an idle worker looks for jobs unasked.
const LOOK: Duration = Duration::from_secs(15);
/// Pause after the catalogue could not be read or written.
const RETRY: Duration = Duration::from_secs(1);
/// Pause after a model could not be saved.
const SAVE_AGAIN: Duration = Duration::from_secs(30);

/// Takes jobs until the trainer shuts down.
pub(super) async fn run(inner: Arc<Inner>) {
    while !inner.shutdown.is_cancelled() {
        match inner.context.store.claim_next_job().await {
            Ok(Some((tenant, job))) => run_job(&inner, &tenant, &job).await,
            Ok(None) => {
                tokio::select! {
                    () = inner.queued.notified() => {}
                    // A caller that goes away between the commit of its job and its notice leaves none.
                    () = tokio::time::sleep(LOOK) => {}
                    () = inner.shutdown.cancelled() => return,
                }
            }
            Err(error) => {
                tracing::error!(%error, "could not claim a training job");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

async fn run_job(inner: &Arc<Inner>, tenant: &Tenant, job: &JobRow) {
    inner.announce(&job.name);
    let control = Arc::new(CancelToken::default());
    inner.set_running(Some(Running { job: job.name.clone(), control: control.clone() }));
    let outcome = tokio::select! {
        outcome = train_and_publish(inner, tenant, job, &control) => outcome,
        never = heartbeat(inner, &job.name, &control) => match never {},
    };
    inner.set_running(None);
    count_tokens(inner, tenant.id(), &control);
    let end = End::of(&job.name, outcome, control.is_saved());
    // Until it is written the job is RUNNING to everyone, and nothing it uses can be deleted.
    while let Err(error) = end.write(inner, &job.name).await {
        tracing::error!(job = %job.name, %error, "could not record how the job ended");
        if inner.shutdown.is_cancelled() || matches!(error, Error::NotFound { .. }) {
            return;
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Counts what the run has trained on, and stops it when the catalogue says that it is to be cancelled, or the server shuts down.
async fn heartbeat(inner: &Inner, job: &JobName, control: &CancelToken) -> std::convert::Infallible {
    loop {
        count_tokens(inner, &job.tenant, control);
        match inner.context.store.job_state(job).await {
            Ok(JobState::Running) => {}
            Ok(_) => control.stop(),
            Err(error) => tracing::warn!(%job, %error, "could not read a running job's state"),
        }
        tokio::select! {
            () = tokio::time::sleep(HEARTBEAT) => {}
            () = inner.shutdown.cancelled() => {
                control.stop();
                std::future::pending::<()>().await;
            }
        }
    }
}

fn count_tokens(inner: &Inner, tenant: &TenantId, control: &CancelToken) {
    let usage = UsageDelta { training_tokens: control.take_tokens(), ..UsageDelta::default() };
    inner.context.store.add_usage(tenant, usage);
}

async fn train_and_publish(
    inner: &Arc<Inner>,
    tenant: &Tenant,
    job: &JobRow,
    control: &Arc<CancelToken>,
) -> Result<Publication> {
    if keeps_model(&job.spec) {
        return train_and_keep(inner, tenant, job, control).await;
    }
    let result = match saved_result(inner, job, control).await {
        Ok(Some(result)) => result,
        Ok(None) => match prepare(inner, tenant, job, control).await {
            Ok(ready) => train(inner, job, ready, control.clone(), adapter_of).await?,
            Err(error) if error.passes_by_itself() => return Ok(not_begun(&job.name, &error)),
            Err(error) => return Err(error),
        },
        Err(error) => return Ok(not_begun(&job.name, &error)),
    };
    let line = "checking that serving gives what training gave";
    inner.report(&job.name, JobEvent::Message(line.into())).await;
    let publication = save_and_publish(inner, tenant, job, &result, control).await?;
    if let Publication::Done(row) = &publication {
        let parity = row.parity;
        let line = format!(
            "parity gate: mean difference {:.4} nats over {} tokens, at most {:.4} allowed; mean effect {:.4}",
            parity.mean_abs_difference, parity.tokens, parity.threshold, parity.mean_abs_effect
        );
        inner.report(&job.name, JobEvent::Message(line)).await;
    }
    Ok(publication)
}

/// Trains a model and keeps it with the job; nothing is published.
async fn train_and_keep(
    inner: &Arc<Inner>,
    tenant: &Tenant,
    job: &JobRow,
    control: &Arc<CancelToken>,
) -> Result<Publication> {
    match model::is_saved(&inner.context.store, job).await {
        Ok(true) => return Ok(Publication::Kept),
        Ok(false) => {}
        Err(error) => return Ok(not_begun(&job.name, &error)),
    }
    let ready = match prepare(inner, tenant, job, control).await {
        Ok(ready) => ready,
        Err(error) if error.passes_by_itself() => return Ok(not_begun(&job.name, &error)),
        Err(error) => return Err(error),
    };
    let outcome = train(inner, job, ready, control.clone(), |_, _, outcome| Ok(outcome)).await?;
    if let Some(why) = outcome.diverged {
        return Err(Error::precondition(DIVERGED, "the training run", format!("{why}; its model was not kept")));
    }
    let trained = Arc::new(outcome);
    while let Err(error) = model::save(&inner.context, job, &trained).await {
        tracing::warn!(job = %job.name, %error, "a trained model could not be saved; trying again");
        let text = format!("not saved yet: {}; trying again", shown(&job.name, &error));
        inner.report(&job.name, JobEvent::Message(text)).await;
        control.pause(SAVE_AGAIN).await;
        control.check()?;
    }
    control.saved();
    inner.report(&job.name, JobEvent::Message("the trained model is saved; it can be exported".into())).await;
    control.check()?;
    Ok(Publication::Kept)
}

/// A job at its first step.
struct Ready {
    prepared: Prepared,
    optimizer_file: Option<File>,
}

async fn prepare(inner: &Inner, tenant: &Tenant, job: &JobRow, control: &Arc<CancelToken>) -> Result<Ready> {
    inner.context.check_disk(&job.spec)?;
    let prepared = inner.context.prepare(tenant, &job.spec, control.clone()).await?;
    let file = optimizer_file(inner, prepared.plan.paged_optimizer)?;
    inner.report_data(&job.name, prepared.data, prepared.total_steps).await;
    inner.report(&job.name, JobEvent::MemoryPlan(prepared.plan)).await;
    Ok(Ready { prepared, optimizer_file: file })
}

/// A file without a name for what the plan does not keep in memory, so that nothing is left of it however the process ends; none for 0 bytes.
fn optimizer_file(inner: &Inner, bytes: u64) -> Result<Option<File>> {
    if bytes == 0 {
        return Ok(None);
    }
    let TrainingContext { store, limits, .. } = &inner.context;
    store.blobs().check_free(limits.min_free_disk_bytes.saturating_add(bytes))?;
    store.blobs().scratch_of(bytes).map(Some)
}

/// Nothing is wrong with the job, and nothing has been trained.
fn not_begun(job: &JobName, error: &Error) -> Publication {
    Publication::Postponed(format!("the job could not begin: {}; then resume it", shown(job, error)))
}

/// What an earlier run of the job has left: it only has to be published.
async fn saved_result(inner: &Inner, job: &JobRow, control: &CancelToken) -> Result<Option<TrainingResult>> {
    let result = TrainingResult::load(&inner.context.store, job).await?;
    if result.is_some() {
        control.saved();
        let line = "the training had ended before; publishing the adapter that it saved";
        inner.report(&job.name, JobEvent::Message(line.into())).await;
    }
    Ok(result)
}

/// `fit` on a thread of its own, its events recorded as they come; and what is made of what it gives.
async fn train<T: Send + 'static>(
    inner: &Arc<Inner>,
    job: &JobRow,
    Ready { mut prepared, optimizer_file }: Ready,
    control: Arc<CancelToken>,
    make: impl FnOnce(&Inner, &Prepared, FitOutcome) -> Result<T> + Send + 'static,
) -> Result<T> {
    let (inner, name, spec) = (inner.clone(), job.name.clone(), job.spec.clone());
    let runtime = tokio::runtime::Handle::current();
    let run = move || {
        let observe = |event| runtime.block_on(inner.report(&name, event));
        let context = &inner.context;
        if prepared.start.is_of_base() {
            observe(JobEvent::Message("computing the part of the base that the adapter starts as".into()));
            context.model.start_as_part(&mut prepared.start, &context.arbiter.train(), || control.check())?;
        }
        let inputs = FitInputs {
            model: &context.model,
            start: &prepared.start,
            reference: prepared.continued.then_some(&prepared.start),
            train: &prepared.train,
            validation: &prepared.validation,
            objective: spec.objective,
            recipe: &spec.hyperparameters,
            plan: prepared.plan,
            optimizer_file: optimizer_file.as_ref(),
            arbiter: &context.arbiter,
            control: &control,
        };
        let outcome = fit(inputs, &mut |event| observe(event))?;
        make(&inner, &prepared, outcome)
    };
    tokio::task::spawn_blocking(run).await.map_err(|panic| Error::internal(format!("training: {panic}")))?
}

/// What a run has made, as it is published: of copies of the base's tensors the LoRA that comes nearest to their change.
fn adapter_of(inner: &Inner, prepared: &Prepared, outcome: FitOutcome) -> Result<TrainingResult> {
    let FitOutcome { mut adapter, mut metrics, diverged } = outcome;
    let TrainingContext { model, arbiter, .. } = &inner.context;
    if let TunerSpec::Full(FullSpec { extract_rank: Some(rank), .. }) = adapter.spec {
        let (lora, share) = model.nearest_lora(&adapter, rank, &arbiter.train())?;
        metrics.insert(metric::EXTRACTED_SHARE.to_owned(), share);
        adapter = lora;
    }
    Ok(TrainingResult {
        package: Package::from_adapter(&adapter, model.shape())?,
        // JSON has no infinities.
        metrics: metrics.into_iter().filter(|(_, value)| value.is_finite()).collect(),
        probes: prepared.probes(),
        diverged,
    })
}

/// How a job ends.
enum End {
    Succeeded(Box<VersionRow>),
    /// With a model, which the job keeps.
    Kept,
    /// Its version, where there is one, is not live.
    Failed {
        version: Option<Box<VersionRow>>,
        error: String,
    },
    /// Cancelled where someone asked for it, else to be resumed.
    Stopped(String),
}

impl End {
    fn of(job: &JobName, outcome: Result<Publication>, saved: bool) -> Self {
        match outcome {
            Ok(Publication::Done(version)) => match &version.held_reason {
                None => Self::Succeeded(version),
                Some(why) => {
                    let error = held_error(&version.name, why);
                    Self::Failed { version: Some(version), error }
                }
            },
            Ok(Publication::Kept) => Self::Kept,
            Ok(Publication::Postponed(why)) => Self::Stopped(why),
            Err(Error::Cancelled) if saved => Self::Stopped(
                "the server stopped after the training; resume the job to publish what it has saved".to_owned(),
            ),
            Err(Error::Cancelled) => Self::Stopped("the server stopped; resume the job to run it again".to_owned()),
            Err(error) => Self::Failed { version: None, error: shown(job, &error) },
        }
    }

    /// What becomes of the job, by the state that it is in: it may have been cancelled until now.
    fn decide(&self, state: JobState) -> Option<(JobState, JobEnd)> {
        if !matches!(state, JobState::Running | JobState::Cancelling) {
            return None;
        }
        Some(match self {
            Self::Succeeded(version) => {
                (JobState::Succeeded, JobEnd { version: Some(version.name.clone()), ..JobEnd::default() })
            }
            Self::Kept => (JobState::Succeeded, JobEnd { keeps_result: true, ..JobEnd::default() }),
            Self::Failed { version, error } => {
                let version = version.as_ref().map(|version| version.name.clone());
                (JobState::Failed, JobEnd { version, error: Some(error.clone()), keeps_result: false })
            }
            Self::Stopped(_) if state == JobState::Cancelling => (JobState::Cancelled, JobEnd::default()),
            Self::Stopped(why) => (JobState::Interrupted, JobEnd { error: Some(why.clone()), ..JobEnd::default() }),
        })
    }

    async fn write(&self, inner: &Inner, job: &JobName) -> Result<()> {
        inner.context.store.move_job(job, |state| self.decide(state)).await?;
        inner.announce(job);
        Ok(())
    }
}
