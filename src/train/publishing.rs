//! How a finished run becomes a version: saved first, then published, again and again while what hinders it may pass.

use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::hub::NewVersion;
use crate::ids::{JobName, Tenant};
use crate::request::{JobEvent, Publish};
use crate::store::{JobRow, VersionRow};
use crate::train::Inner;
use crate::train::fit::{CancelToken, DIVERGED};
use crate::train::result::TrainingResult;

/// The first pause before another attempt; each is twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What has become of a finished run.
#[derive(Debug)]
pub(super) enum Publication {
    Done(Box<VersionRow>),
    /// A model, which is with the job.
    Kept,
    /// The job waits for someone to resume it, for this reason.
    Postponed(String),
}

/// Saves a result, unless `saved`, and publishes it.
///
/// # Errors
///
/// CANCELLED once `control` says so; what no other attempt would change, such as PARITY_FAILED.
pub(super) async fn save_and_publish(
    inner: &Inner,
    tenant: &Tenant,
    job: &JobRow,
    result: &TrainingResult,
    control: &CancelToken,
) -> Result<Publication> {
    let began = Instant::now();
    let patience = Duration::from_secs(inner.context.limits.publish_retry_seconds);
    let mut pause = FIRST_PAUSE;
    loop {
        // Before anything else: a server that is told to stop now must not lose what took hours.
        let saved = save(inner, job, result, control).await;
        control.check()?;
        let error = match inner.context.hub.publish(tenant, new_version(job, result)).await {
            Ok(row) => return Ok(Publication::Done(Box::new(row))),
            Err(error) => error,
        };
        if !error.may_pass() {
            return Err(for_good(error, result));
        }
        // Nothing else has what is not saved.
        if saved && (began.elapsed() >= patience || !error.passes_by_itself()) {
            let why = shown(&job.name, &error);
            let advice = "the training is done and its adapter is saved, but not published";
            return Ok(Publication::Postponed(format!("{advice}: {why}; then resume the job to publish it")));
        }
        tracing::warn!(job = %job.name, %error, saved, ?pause, "a trained adapter could not be published; trying again");
        let text = format!("not published yet: {}; trying again", shown(&job.name, &error));
        inner.report(&job.name, JobEvent::Message(text)).await;
        control.pause(pause).await;
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
}

/// Returns whether the result is on disk.
async fn save(inner: &Inner, job: &JobRow, result: &TrainingResult, control: &CancelToken) -> bool {
    if control.is_saved() {
        return true;
    }
    match result.save(&inner.context.store, job).await {
        Ok(()) => control.saved(),
        Err(error) => {
            tracing::warn!(job = %job.name, %error, "a trained adapter could not be saved before it is published")
        }
    }
    control.is_saved()
}

fn new_version(job: &JobRow, result: &TrainingResult) -> NewVersion {
    NewVersion {
        adapter: job.spec.adapter.clone(),
        package: result.package.clone(),
        probes: result.probes.clone(),
        publish: if result.diverged.is_some() { Publish::VersionOnly } else { job.spec.publish },
        job: Some(job.name.clone()),
        metrics: result.metrics.clone(),
        request_id: String::new(),
        validate_only: false,
        held_reason: result.diverged.as_ref().map(|why| format!("{DIVERGED}: {why}")),
        note: None,
    }
}

/// A run that diverged has failed for that, also where its version cannot be kept.
fn for_good(error: Error, result: &TrainingResult) -> Error {
    match &result.diverged {
        Some(why) if !matches!(error, Error::Cancelled) => {
            Error::precondition(DIVERGED, "the training run", format!("{why}; its version was not kept: {error}"))
        }
        _ => error,
    }
}

/// What the tenant reads: our own faults go to the log.
pub(super) fn shown(job: &JobName, error: &Error) -> String {
    match error {
        Error::Internal(message) => {
            tracing::error!(%job, message, "a training job failed");
            "an internal error; the server's log has it under this job's name".to_owned()
        }
        Error::Precondition { reason, message, .. } => format!("{reason}: {message}"),
        other => other.to_string(),
    }
}
