//! Runs queued jobs one after another: claims one, keeps its lease alive while it trains, publishes the result, writes how it ended.

use std::sync::Arc;
use std::time::Duration;

use crate::adapter::format::Package;
use crate::error::{Error, Result};
use crate::hub::NewVersion;
use crate::ids::{JobName, Tenant, VersionName};
use crate::request::{JobEvent, JobState};
use crate::store::{JobEnd, JobRow, UsageDelta, VersionRow};
use crate::train::fit::{Control, FitInputs, FitOutcome, fit};
use crate::train::job::Prepared;
use crate::train::{Inner, Running};

/// How long a claim holds without a heartbeat.
const LEASE: Duration = Duration::from_secs(30);
const HEARTBEAT: Duration = Duration::from_secs(5);
/// How often an idle worker looks for jobs unasked.
const LOOK: Duration = Duration::from_secs(15);
/// Pause after the catalogue could not be read or written.
const RETRY: Duration = Duration::from_secs(1);

/// Takes jobs until the trainer shuts down.
pub(super) async fn run(inner: Arc<Inner>) {
    while !inner.shutdown.is_cancelled() {
        match inner.sources.store.claim_next_job(&inner.worker, LEASE).await {
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
    tracing::info!(job = %job.name, "training");
    let control = Arc::new(Control::default());
    inner.set_running(Some(Running { job: job.name.clone(), control: control.clone() }));
    let outcome = tokio::select! {
        outcome = train_and_publish(inner, tenant, job, &control) => outcome,
        never = heartbeat(inner, &job.name, &control) => match never {},
    };
    inner.set_running(None);
    let usage = UsageDelta { training_tokens: control.tokens(), ..UsageDelta::default() };
    if let Err(error) = inner.sources.store.add_usage(tenant.id(), usage).await {
        tracing::error!(job = %job.name, %error, "could not record the usage");
    }
    // Until it is written the job is RUNNING to everyone, and nothing it uses can be deleted.
    while let Err(error) = finish(inner, &job.name, outcome.clone()).await {
        tracing::error!(job = %job.name, %error, "could not record how the job ended");
        if inner.shutdown.is_cancelled() {
            return;
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Keeps the claim, and stops the run when the catalogue says that it is to be cancelled or the server shuts down.
async fn heartbeat(inner: &Inner, job: &JobName, control: &Control) -> std::convert::Infallible {
    loop {
        match inner.sources.store.heartbeat(job, &inner.worker, LEASE).await {
            Ok(JobState::Running) => {}
            Ok(_) => control.stop(),
            Err(error) => tracing::warn!(%job, %error, "could not renew the claim"),
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

async fn train_and_publish(
    inner: &Arc<Inner>,
    tenant: &Tenant,
    job: &JobRow,
    control: &Arc<Control>,
) -> Result<VersionName> {
    let sources = &inner.sources;
    let prepared = Arc::new(sources.prepare(tenant, &job.spec, control.clone()).await?);
    let outcome = train(inner, job, prepared.clone(), control.clone()).await?;
    control.check()?;
    let version = NewVersion {
        adapter: job.spec.adapter.clone(),
        package: Package::from_lora(&outcome.lora, sources.model.shape())?,
        probes: prepared.probes(),
        publish: job.spec.publish,
        job: Some(job.name.clone()),
        metrics: outcome.metrics,
        request_id: String::new(),
        validate_only: false,
    };
    inner.record(&job.name, JobEvent::Message("checking that serving gives what training gave".into())).await?;
    let row = publish(inner, tenant, version, control).await?;
    let parity = row.parity;
    let line = format!(
        "parity gate: mean difference {:.4} nats over {} tokens, at most {:.4} allowed; mean effect {:.4}",
        parity.mean_abs_difference, parity.tokens, parity.threshold, parity.mean_abs_effect
    );
    // The version is there: nothing that fails now may say otherwise.
    if let Err(error) = inner.record(&job.name, JobEvent::Message(line)).await {
        tracing::warn!(job = %job.name, %error, "could not record what the gate measured");
    }
    Ok(row.name)
}

/// Publishes, again and again where there is no room for the moment: the training must not be lost for that.
async fn publish(inner: &Inner, tenant: &Tenant, new: NewVersion, control: &Control) -> Result<VersionRow> {
    loop {
        match inner.sources.hub.publish(tenant, new.clone()).await {
            Err(Error::Exhausted { retry_after: Some(pause), .. }) => {
                control.check()?;
                tokio::time::sleep(pause).await;
            }
            outcome => return outcome,
        }
    }
}

/// `fit` on a thread of its own, its events recorded as they come.
async fn train(inner: &Arc<Inner>, job: &JobRow, prepared: Arc<Prepared>, control: Arc<Control>) -> Result<FitOutcome> {
    let (inner, name, spec) = (inner.clone(), job.name.clone(), job.spec.clone());
    let runtime = tokio::runtime::Handle::current();
    let run = move || {
        let inputs = FitInputs {
            model: &inner.sources.model,
            start: &prepared.start,
            reference: prepared.continued.then_some(&prepared.start),
            train: &prepared.train,
            validation: &prepared.validation,
            objective: spec.objective,
            recipe: &spec.hyperparameters,
            arbiter: &inner.arbiter,
            control: &control,
        };
        fit(inputs, &mut |event| runtime.block_on(inner.record(&name, event)))
    };
    tokio::task::spawn_blocking(run).await.map_err(|panic| Error::internal(format!("training: {panic}")))?
}

/// Writes the final state. A stopped run was cancelled if someone asked for it, else interrupted by the shutdown.
async fn finish(inner: &Inner, job: &JobName, outcome: Result<VersionName>) -> Result<()> {
    let store = &inner.sources.store;
    let running = [JobState::Running, JobState::Cancelling];
    match outcome {
        Ok(version) => {
            store.transition(job, &running, JobState::Succeeded, JobEnd { version: Some(version), error: None }).await?
        }
        Err(Error::Cancelled) => {
            let cancelled = store.transition(job, &running[1..], JobState::Cancelled, JobEnd::default()).await?;
            match cancelled {
                Some(row) => Some(row),
                None => {
                    let why = "the server stopped; resume the job to run it again".to_owned();
                    let end = JobEnd { version: None, error: Some(why) };
                    store.transition(job, &running[..1], JobState::Interrupted, end).await?
                }
            }
        }
        Err(error) => {
            let error = shown(job, &error);
            store.transition(job, &running, JobState::Failed, JobEnd { version: None, error: Some(error) }).await?
        }
    };
    inner.announce(job);
    Ok(())
}

/// What the tenant reads: our own faults go to the log.
fn shown(job: &JobName, error: &Error) -> String {
    match error {
        Error::Internal(message) => {
            tracing::error!(%job, message, "training failed");
            "an internal error; the server's log has it under this job's name".to_owned()
        }
        other => other.to_string(),
    }
}
