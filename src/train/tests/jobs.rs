//! Jobs from submission to their end, on the tiny model with a gate that lets everything pass.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;

use crate::adapter::{Lora, PackedLora};
use crate::config::Limits;
use crate::data::Upload;
use crate::device::Arbiter;
use crate::error::{Error, Result};
use crate::hub::{Hub, PublishGate};
use crate::ids::{AdapterName, DatasetName, JobName, Tenant};
use crate::model::Model;
use crate::request::{Hyperparameters, JobEvent, JobSpec, JobState, Objective, ParityReport, Publish, Start};
use crate::store::{DatasetKind, Page, Store, StoredEvent};
use crate::train::tests::{lora, recipe};
use crate::train::{Trainer, TrainerParts};

/// Longest that a test waits for a job.
const PATIENCE: Duration = Duration::from_secs(120);

struct Pass;

impl PublishGate for Pass {
    fn check(&self, _packed: &Arc<PackedLora>, lora: &Arc<Lora>, _probes: &[Vec<u32>]) -> Result<ParityReport> {
        let no_effect = lora.is_zero();
        Ok(ParityReport { tokens: 256, mean_abs_difference: 0.0, mean_abs_effect: 1.0, threshold: 0.1, no_effect })
    }
}

struct Bench {
    _folder: tempfile::TempDir,
    parts: TrainerParts,
    trainer: Trainer,
    tenant: Tenant,
}

impl Bench {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).await.unwrap();
        let tenant = Tenant::proven("tenants/one".parse().unwrap());
        store.create_tenant(tenant.id(), "", 1, "").await.unwrap();
        let (model, text) = Model::tiny(1);
        let limits = Limits::default();
        let hub = Hub::new(store.clone(), model.shape().clone(), text.template_digest(), Arc::new(Pass), &limits);
        let parts = TrainerParts { store, hub, model, text, arbiter: Arbiter::new(0.5), limits };
        let trainer = Trainer::start(parts.clone()).await.unwrap();
        let bench = Self { _folder: folder, parts, trainer, tenant };
        let chat = r#"{"prompt":"hello","completion":"good day"}"#;
        bench.upload("chats", DatasetKind::Sft, &format!("{chat}\n").repeat(8)).await;
        let pair = r#"{"prompt":"hello","chosen":"good day","rejected":"go away"}"#;
        bench.upload("pairs", DatasetKind::Preferences, &format!("{pair}\n").repeat(6)).await;
        bench
    }

    async fn upload(&self, id: &str, kind: DatasetKind, lines: &str) {
        let name = DatasetName::new(self.tenant.id(), id).unwrap();
        let Self { parts: TrainerParts { store, limits, .. }, tenant, .. } = self;
        let mut upload = Upload::begin(store, limits, tenant, name, kind, "", false).await.unwrap();
        upload.write(lines.as_bytes()).await.unwrap();
        upload.finish().await.unwrap();
    }

    fn spec(&self, dataset: &str, objective: Objective, steps: u32) -> JobSpec {
        JobSpec {
            adapter: AdapterName::new(self.tenant.id(), "a").unwrap(),
            dataset: DatasetName::new(self.tenant.id(), dataset).unwrap(),
            objective,
            start: Start::Fresh(lora()),
            hyperparameters: Hyperparameters { max_steps: Some(steps), validation_split: 0.25, ..recipe() },
            publish: Publish::Auto,
        }
    }

    async fn submit(&self, spec: JobSpec) -> JobName {
        self.trainer.submit(&self.tenant, spec, "", false).await.unwrap().name
    }

    /// All events up to the job's end.
    async fn events(&self, job: &JobName, after: u64) -> Vec<StoredEvent> {
        let stream = self.trainer.watch(&self.tenant, job, after).await.unwrap();
        let collected = stream.map(|event| event.unwrap()).collect();
        tokio::time::timeout(PATIENCE, collected).await.unwrap()
    }

    /// Returns once the job has taken a step.
    async fn first_step(&self, job: &JobName) {
        let mut stream = self.trainer.watch(&self.tenant, job, 0).await.unwrap();
        while let Some(event) = stream.next().await {
            if matches!(event.unwrap().event, JobEvent::Step { .. }) {
                return;
            }
        }
        panic!("{job} ended without a step");
    }

    async fn versions(&self) -> usize {
        let adapter = AdapterName::new(self.tenant.id(), "a").unwrap();
        match self.parts.store.list_versions(&adapter, &Page::default()).await {
            Ok(listed) => listed.items.len(),
            Err(Error::NotFound { .. }) => 0,
            Err(other) => panic!("{other}"),
        }
    }
}

fn last_state(events: &[StoredEvent]) -> JobState {
    match events.last().map(|event| &event.event) {
        Some(JobEvent::State { state, .. }) => *state,
        other => panic!("{other:?}"),
    }
}

/// What preferences say of the adapter before anything is learnt.
fn first_margin(events: &[StoredEvent]) -> f64 {
    let of_first = |event: &StoredEvent| match event.event {
        JobEvent::Step { step: 1, margin, .. } => margin,
        _ => None,
    };
    events.iter().find_map(of_first).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_ends_as_a_version_and_a_continued_one_as_the_next() {
    let bench = Bench::new().await;
    let job = bench.submit(bench.spec("chats", Objective::Sft, 4)).await;
    let events = bench.events(&job, 0).await;
    assert_eq!(last_state(&events), JobState::Succeeded, "{events:?}");
    assert!(events.iter().map(|event| event.sequence).eq(1..=events.len() as u64));
    let steps = events.iter().filter(|event| matches!(event.event, JobEvent::Step { .. })).count();
    assert_eq!(steps, 4);
    assert_eq!(bench.events(&job, 3).await, events[3..]);
    let row = bench.parts.store.get_job(&job).await.unwrap();
    let version = row.version.unwrap();
    assert_eq!((row.step, row.total_steps, version.version), (4, 4, 1));
    let made = bench.parts.store.get_version(&version).await.unwrap();
    assert_eq!(made.job, Some(job));
    assert!(made.metrics["train_loss"].is_finite() && made.metrics["eval_loss"].is_finite());
    assert!(bench.parts.store.get_usage(bench.tenant.id()).await.unwrap().training_tokens > 0);

    let dpo = Objective::Dpo { beta: 0.1, label_smoothing: 0.0 };
    let continued = JobSpec { start: Start::From(version), ..bench.spec("pairs", dpo, 2) };
    let job = bench.submit(continued).await;
    let events = bench.events(&job, 0).await;
    assert_eq!(last_state(&events), JobState::Succeeded, "{events:?}");
    assert!(first_margin(&events).abs() < 1e-3, "the version it continues is its reference: {events:?}");
    assert_eq!(bench.versions().await, 2);
    bench.trainer.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_publishes_nothing() {
    let bench = Bench::new().await;
    let running = bench.submit(bench.spec("chats", Objective::Sft, 100_000)).await;
    let waiting = bench.submit(bench.spec("chats", Objective::Sft, 1)).await;
    bench.first_step(&running).await;
    let row = bench.trainer.cancel(&bench.tenant, &waiting).await.unwrap();
    assert_eq!(row.state, JobState::Cancelled);
    bench.trainer.cancel(&bench.tenant, &running).await.unwrap();
    assert_eq!(last_state(&bench.events(&running, 0).await), JobState::Cancelled);
    assert_eq!(bench.versions().await, 0);
    assert_eq!(bench.trainer.cancel(&bench.tenant, &running).await.unwrap().state, JobState::Cancelled);
    let resumed = bench.trainer.resume(&bench.tenant, &running).await;
    assert!(matches!(resumed, Err(Error::Precondition { reason: "JOB_NOT_INTERRUPTED", .. })));
    bench.trainer.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_interrupts_and_resuming_starts_over() {
    let bench = Bench::new().await;
    let mut spec = bench.spec("chats", Objective::Sft, 200);
    spec.hyperparameters.learning_rate = 1e-3;
    let job = bench.submit(spec).await;
    bench.first_step(&job).await;
    let watching = bench.trainer.watch(&bench.tenant, &job, 0).await.unwrap();
    bench.trainer.shutdown().await;
    let ended: Vec<_> = tokio::time::timeout(PATIENCE, watching.collect()).await.unwrap();
    assert!(matches!(ended.last(), Some(Err(Error::Unavailable { .. }))));
    let row = bench.parts.store.get_job(&job).await.unwrap();
    assert_eq!(row.state, JobState::Interrupted);
    let before = row.step;

    let trainer = Trainer::start(bench.parts.clone()).await.unwrap();
    let bench = Bench { trainer, ..bench };
    assert_eq!(bench.trainer.resume(&bench.tenant, &job).await.unwrap().state, JobState::Queued);
    let events = bench.events(&job, 0).await;
    assert_eq!(last_state(&events), JobState::Succeeded);
    let steps = events.iter().filter(|event| matches!(event.event, JobEvent::Step { .. })).count();
    assert_eq!(steps as u32, before + 200);
    bench.trainer.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_trained_is_refused_or_fails_before_the_first_step() {
    let bench = Bench::new().await;
    let submit = |spec: JobSpec, validate_only| bench.trainer.submit(&bench.tenant, spec, "", validate_only);
    let sft = || bench.spec("chats", Objective::Sft, 1);
    let wrong = submit(bench.spec("pairs", Objective::Sft, 1), false).await;
    assert!(matches!(wrong, Err(Error::Invalid { reason: "WRONG_DATASET_KIND", .. })));
    let mut foreign = sft();
    foreign.dataset.tenant = "tenants/two".parse().unwrap();
    assert!(matches!(submit(foreign, false).await, Err(Error::PermissionDenied)));
    assert!(matches!(submit(bench.spec("none", Objective::Sft, 1), false).await, Err(Error::NotFound { .. })));
    let mut wide = sft();
    wide.start = Start::Fresh(crate::request::LoraSpec { rank: 100_000, ..lora() });
    assert!(matches!(submit(wide, false).await, Err(Error::Invalid { .. })));

    let mut short = sft();
    short.hyperparameters.max_length = Some(4);
    let refused = submit(short.clone(), true).await.unwrap_err().to_string();
    assert!(refused.contains("record 1 has"), "{refused}");
    assert_eq!(submit(sft(), true).await.unwrap().state, JobState::Queued);
    assert!(bench.parts.store.list_jobs(bench.tenant.id(), &Page::default()).await.unwrap().items.is_empty());

    let job = bench.submit(short).await;
    let events = bench.events(&job, 0).await;
    assert_eq!(last_state(&events), JobState::Failed);
    assert!(bench.parts.store.get_job(&job).await.unwrap().error.unwrap().contains("record 1 has"));
    bench.trainer.shutdown().await;
}
