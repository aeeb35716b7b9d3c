//! Jobs from submission to their end, on the tiny model with a gate that lets everything pass.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{Connection, SqliteConnection};

use crate::adapter::{Adapter, Initialisation, PackedAdapter};
use crate::config::Limits;
use crate::data::Upload;
use crate::device::Arbiter;
use crate::error::{Error, Result};
use crate::hub::{Hub, NewVersion, Package, PublishGate};
use crate::ids::{AdapterName, AdapterRef, DatasetName, JobName, Tenant};
use crate::memory::Memory;
use crate::model::Model;
use crate::request::{
    AdapterKind, FullSpec, Hyperparameters, JobEvent, JobSpec, JobState, LinearLayers, LoraInit, LoraSpec, ModelFormat,
    Objective, ParityReport, Publish, Start, TooLong, TrainingData,
};
use crate::store::{DatasetKind, JobRow, NewJob, Options, Page, RESULT_MANIFEST, RequestKey, Store, StoredEvent};
use crate::train::tests::{lora, recipe};
use crate::train::{Trainer, TrainingContext};

/// Longest that a test waits for a job.
const PATIENCE: Duration = Duration::from_secs(120);

struct PassingGate;

impl PublishGate for PassingGate {
    fn check(
        &self,
        _packed: &Arc<PackedAdapter>,
        adapter: &Arc<Adapter>,
        _probes: &[Vec<u32>],
    ) -> Result<ParityReport> {
        let no_effect = adapter.pairs().all(|(_, pair)| pair.b.iter().all(|x| *x == 0.0));
        Ok(ParityReport { tokens: 256, mean_abs_difference: 0.0, mean_abs_effect: 1.0, threshold: 0.1, no_effect })
    }

    fn plain_form(&self, _lora: &Adapter, _initialisation: Initialisation) -> Result<Option<Adapter>> {
        Ok(None)
    }
}

struct Bench {
    folder: tempfile::TempDir,
    parts: TrainingContext,
    trainer: Trainer,
    tenant: Tenant,
}

impl Bench {
    async fn new() -> Self {
        Self::with(Limits::default()).await
    }

    async fn with(limits: Limits) -> Self {
        let bench = Self::open(tempfile::tempdir().unwrap(), limits).await;
        let Self { parts: TrainingContext { store, .. }, tenant, .. } = &bench;
        store.create_tenant(tenant.id(), "", 1, "").await.unwrap();
        let chat = r#"{"prompt":"hello","completion":"good day"}"#;
        bench.upload("chats", DatasetKind::Sft, &format!("{chat}\n").repeat(8)).await;
        let pair = r#"{"prompt":"hello","chosen":"good day","rejected":"go away"}"#;
        bench.upload("pairs", DatasetKind::Preferences, &format!("{pair}\n").repeat(6)).await;
        bench
    }

    /// A server over a folder, which may have been another's before.
    async fn open(folder: tempfile::TempDir, limits: Limits) -> Self {
        Self::open_with(folder, limits, Options::default()).await
    }

    async fn open_with(folder: tempfile::TempDir, limits: Limits, options: Options) -> Self {
        let store = Store::open_with(folder.path(), options).await.unwrap();
        let tenant = Tenant::proven("tenants/one".parse().unwrap());
        let (model, text) = Model::tiny(1);
        let hub =
            Hub::new(store.clone(), model.shape().clone(), text.template_digest(), Arc::new(PassingGate), &limits);
        let memory = Memory::new(limits.max_request_memory_bytes);
        let parts = TrainingContext {
            store,
            hub,
            model,
            text,
            memory,
            arbiter: Arbiter::new(0.5),
            base: "tiny.gguf".into(),
            allow_full_fine_tuning: true,
            limits,
        };
        let trainer = Trainer::start(parts.clone()).await.unwrap();
        Self { folder, parts, trainer, tenant }
    }

    /// The server that comes after one that died: what `sql` says is what it had last written.
    async fn after_a_crash(self, sql: &'static str) -> Self {
        let limits = self.parts.limits.clone();
        self.after_a_crash_with(sql, limits).await
    }

    async fn after_a_crash_with(self, sql: &'static str, limits: Limits) -> Self {
        self.trainer.shutdown().await;
        self.parts.store.execute(sql).await;
        let Self { folder, parts, trainer, .. } = self;
        drop((parts, trainer));
        Self::open(folder, limits).await
    }

    /// Makes the catalogue refuse to take versions, as a full disk does.
    async fn refuse_versions(&self) {
        let sql = "CREATE TRIGGER refuse BEFORE INSERT ON versions BEGIN SELECT RAISE(ABORT, 'disk is full'); END";
        self.parts.store.execute(sql).await;
    }

    async fn accept_versions(&self) {
        self.parts.store.execute("DROP TRIGGER refuse").await;
    }

    /// Returns once an event says so.
    async fn message(&self, job: &JobName, part: &str) {
        let mut stream = self.trainer.watch(&self.tenant, job, 0).await.unwrap();
        let said = async {
            while let Some(event) = stream.next().await {
                if matches!(&event.unwrap().event, JobEvent::Message(text) if text.contains(part)) {
                    return true;
                }
            }
            false
        };
        assert!(tokio::time::timeout(PATIENCE, said).await.unwrap(), "{job} ended without saying {part:?}");
    }

    /// Waits for an interruption, which ends no stream of events.
    async fn interrupted(&self, job: &JobName) -> JobRow {
        let wait = async {
            loop {
                let row = self.parts.store.get_job(job).await.unwrap();
                assert!(!row.state.is_final(), "{row:?}");
                if row.state == JobState::Interrupted {
                    return row;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap()
    }

    /// What has ended keeps nothing; it goes soon after.
    async fn nothing_saved(&self) {
        let wait = async {
            while !self.saved().await.is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap();
    }

    /// Blobs that jobs keep.
    async fn saved(&self) -> Vec<String> {
        self.parts.store.blobs().list(&format!("{}/jobs", self.tenant.id().as_str())).await.unwrap()
    }

    async fn upload(&self, id: &str, kind: DatasetKind, lines: &str) {
        let name = DatasetName::new(self.tenant.id(), id).unwrap();
        let Self { parts: TrainingContext { store, text, limits, .. }, tenant, .. } = self;
        let mut upload = Upload::begin(store, text, limits, tenant, name, kind, "", false).await.unwrap();
        upload.write(lines.into()).await.unwrap();
        upload.finish().await.unwrap();
    }

    fn spec(&self, dataset: &str, objective: Objective, steps: u32) -> JobSpec {
        JobSpec {
            adapter: AdapterName::new(self.tenant.id(), "a").unwrap(),
            dataset: DatasetName::new(self.tenant.id(), dataset).unwrap(),
            objective,
            start: Start::Fresh(lora().into()),
            hyperparameters: Hyperparameters { max_steps: Some(steps), validation_split: 0.25, ..recipe() },
            publish: Publish::Auto,
            too_long: TooLong::Refuse,
        }
    }

    async fn submit(&self, spec: JobSpec) -> JobName {
        self.trainer.submit(&self.tenant, spec, &RequestKey::default()).await.unwrap().name
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

/// Steps that were ever taken.
fn steps(events: &[StoredEvent]) -> usize {
    events.iter().filter(|event| matches!(event.event, JobEvent::Step { .. })).count()
}

/// What preferences say of the adapter before anything is learnt.
fn first_margin(events: &[StoredEvent]) -> f64 {
    let of_first = |event: &StoredEvent| match event.event {
        JobEvent::Step { step: 1, ref metrics, .. } => metrics.get("rewards/margins").copied(),
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

/// Its start is computed when it runs, and not when it is validated; its version is a plain LoRA, which is continued as one.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_starts_as_a_part_of_the_base_ends_as_a_plain_version() {
    let bench = Bench::new().await;
    let mut spec = bench.spec("chats", Objective::Sft, 2);
    spec.start = Start::Fresh(LoraSpec { init: LoraInit::Pissa, ..lora() }.into());
    bench.trainer.validate(&bench.tenant, &spec, Arc::default()).await.unwrap();
    let job = bench.submit(spec.clone()).await;
    let events = bench.events(&job, 0).await;
    assert_eq!((last_state(&events), steps(&events)), (JobState::Succeeded, 2), "{events:?}");
    bench.message(&job, "the part of the base that the adapter starts as").await;
    let version = bench.parts.store.get_job(&job).await.unwrap().version.unwrap();
    let row = bench.parts.store.get_version(&version).await.unwrap();
    assert_eq!(row.rank, 2 * lora().rank);
    let Start::Fresh(tuner) = &spec.start else { unreachable!() };
    assert_eq!(row.memory_bytes, tuner.memory_bytes(bench.parts.model.shape()).unwrap());
    spec.start = Start::From(version);
    let job = bench.submit(spec).await;
    assert_eq!(last_state(&bench.events(&job, 0).await), JobState::Succeeded);
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
    let none = RequestKey::default();
    let submit = |spec: JobSpec| bench.trainer.submit(&bench.tenant, spec, &none);
    let sft = || bench.spec("chats", Objective::Sft, 1);
    let wrong = submit(bench.spec("pairs", Objective::Sft, 1)).await;
    assert!(matches!(wrong, Err(Error::Invalid { reason: "WRONG_DATASET_KIND", .. })));
    let mut foreign = sft();
    foreign.dataset.tenant = "tenants/two".parse().unwrap();
    assert!(matches!(submit(foreign).await, Err(Error::PermissionDenied)));
    assert!(matches!(submit(bench.spec("none", Objective::Sft, 1)).await, Err(Error::NotFound { .. })));
    let mut wide = sft();
    wide.start = Start::Fresh(LoraSpec { rank: 100_000, ..lora() }.into());
    assert!(matches!(submit(wide).await, Err(Error::Invalid { .. })));
    let mut twice = sft();
    let rank = bench.parts.limits.max_rank as u32;
    twice.start = Start::Fresh(LoraSpec { rank, init: LoraInit::Olora, ..lora() }.into());
    let refused = submit(twice).await.unwrap_err().to_string();
    assert!(refused.contains("lora.rank") && refused.contains("half the limit max_rank"), "{refused}");

    let mut short = sft();
    short.hyperparameters.max_length = Some(4);
    let refused = bench.trainer.validate(&bench.tenant, &short, Arc::default()).await.unwrap_err().to_string();
    assert!(refused.contains("8 of 8 records are longer than 4 tokens (max_length): line 1 ("), "{refused}");
    assert!(refused.contains(", line 8 ("), "{refused}");
    let valid = bench.trainer.validate(&bench.tenant, &sft(), Arc::default()).await.unwrap();
    let length = valid.data.tokens / 4;
    assert_eq!((valid.total_steps, valid.data.tokens), (1, 4 * length));
    assert_eq!((valid.data.records, valid.data.validation_records), (6, 2));
    assert!(bench.parts.store.list_jobs(bench.tenant.id(), &Page::default()).await.unwrap().items.is_empty());

    let job = bench.submit(short).await;
    let events = bench.events(&job, 0).await;
    assert_eq!(last_state(&events), JobState::Failed);
    assert!(bench.parts.store.get_job(&job).await.unwrap().error.unwrap().contains("records are longer than 4 tokens"));
    bench.trainer.shutdown().await;
}

/// No event but those of states can be stored, as on a disk that is full now and then.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_goes_on_though_nobody_can_be_told() {
    let bench = Bench::new().await;
    let sql = "CREATE TRIGGER silent BEFORE INSERT ON job_events WHEN NEW.event NOT LIKE '%\"State\"%'
               BEGIN SELECT RAISE(ABORT, 'disk is full'); END";
    bench.parts.store.execute(sql).await;
    let job = bench.submit(bench.spec("chats", Objective::Sft, 4)).await;
    let events = bench.events(&job, 0).await;
    assert_eq!((last_state(&events), steps(&events)), (JobState::Succeeded, 0), "{events:?}");
    let row = bench.parts.store.get_job(&job).await.unwrap();
    assert!(bench.parts.store.get_version(&row.version.unwrap()).await.unwrap().metrics["train_loss"].is_finite());
    bench.trainer.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_hinders_a_publication_is_waited_for() {
    let bench = Bench::new().await;
    bench.refuse_versions().await;
    let job = bench.submit(bench.spec("chats", Objective::Sft, 3)).await;
    bench.message(&job, "not published yet").await;
    assert!(!bench.saved().await.is_empty(), "the adapter is on disk before it is published");
    bench.accept_versions().await;
    let events = bench.events(&job, 0).await;
    assert_eq!((last_state(&events), steps(&events)), (JobState::Succeeded, 3), "{events:?}");
    assert_eq!(bench.versions().await, 1);
    bench.nothing_saved().await;
    bench.trainer.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_to_publish_can_be_cancelled() {
    let bench = Bench::new().await;
    bench.refuse_versions().await;
    let job = bench.submit(bench.spec("chats", Objective::Sft, 3)).await;
    bench.message(&job, "not published yet").await;
    bench.trainer.cancel(&bench.tenant, &job).await.unwrap();
    assert_eq!(last_state(&bench.events(&job, 0).await), JobState::Cancelled);
    assert_eq!(bench.versions().await, 0);
    bench.nothing_saved().await;
    bench.trainer.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_waits_no_longer_is_resumed_without_training() {
    let bench = Bench::with(Limits { publish_retry_seconds: 0, ..Limits::default() }).await;
    bench.refuse_versions().await;
    let jobs = [
        bench.submit(bench.spec("chats", Objective::Sft, 3)).await,
        bench.submit(bench.spec("chats", Objective::Sft, 2)).await,
    ];
    for job in &jobs {
        let row = bench.interrupted(job).await;
        assert!(row.error.as_ref().unwrap().contains("resume the job to publish it"), "{row:?}");
    }
    assert_eq!(bench.versions().await, 0);
    // The server's next start neither sweeps what is saved nor forgets it.
    let bench = bench.after_a_crash("DROP TRIGGER refuse").await;
    let [published, cancelled] = &jobs;
    bench.trainer.cancel(&bench.tenant, cancelled).await.unwrap();
    bench.trainer.resume(&bench.tenant, published).await.unwrap();
    let events = bench.events(published, 0).await;
    assert_eq!((last_state(&events), steps(&events)), (JobState::Succeeded, 3), "{events:?}");
    let row = bench.parts.store.get_job(published).await.unwrap();
    assert!(row.live && row.step == 3 && row.data.records == 6, "{row:?}");
    let made = bench.parts.store.get_version(&row.version.unwrap()).await.unwrap();
    assert!(made.live && made.metrics["train_loss"].is_finite() && made.metrics["eval_loss"].is_finite());
    assert_eq!(bench.versions().await, 1);
    bench.nothing_saved().await;
    bench.trainer.shutdown().await;
}

/// A process that dies between the last step and the publication, and one that dies between the publication and the end of the job.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_after_the_training_loses_nothing() {
    let bench = Bench::with(Limits { publish_retry_seconds: 0, ..Limits::default() }).await;
    bench.refuse_versions().await;
    let job = bench.submit(bench.spec("chats", Objective::Sft, 3)).await;
    bench.interrupted(&job).await;
    bench.accept_versions().await;
    let bench = bench.after_a_crash("UPDATE jobs SET state = 'RUNNING', error = NULL").await;
    let row = bench.interrupted(&job).await;
    assert!(row.error.unwrap().contains("after the training; resume the job to publish"));
    bench.trainer.resume(&bench.tenant, &job).await.unwrap();
    let events = bench.events(&job, 0).await;
    assert_eq!((last_state(&events), steps(&events)), (JobState::Succeeded, 3), "{events:?}");

    let bench = bench.after_a_crash("UPDATE jobs SET state = 'RUNNING', version_adapter = NULL, version = NULL").await;
    let row = bench.parts.store.get_job(&job).await.unwrap();
    assert_eq!(
        (row.state, row.version.map(|version| version.version), bench.versions().await),
        (JobState::Succeeded, Some(1), 1)
    );
    bench.trainer.shutdown().await;
}

/// An interrupted job has not ended for who watches it, until it is gone.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_watches_a_job_that_is_deleted_is_told() {
    let bench = Bench::with(Limits { publish_retry_seconds: 0, ..Limits::default() }).await;
    bench.refuse_versions().await;
    let job = bench.submit(bench.spec("chats", Objective::Sft, 1)).await;
    bench.interrupted(&job).await;
    let watched = bench.trainer.watch(&bench.tenant, &job, 0).await.unwrap();
    bench.trainer.delete(&bench.tenant, &job).await.unwrap();
    let last = tokio::time::timeout(PATIENCE, watched.collect::<Vec<_>>()).await.unwrap().pop().unwrap();
    assert!(matches!(last, Err(Error::NotFound { .. })), "{last:?}");
    assert!(bench.saved().await.is_empty(), "what it had saved goes with it");
    bench.trainer.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_result_is_trained_again() {
    let bench = Bench::with(Limits { publish_retry_seconds: 0, ..Limits::default() }).await;
    for (damaged, missing) in [("safetensors", false), ("safetensors", true), ("result.json", false)] {
        bench.refuse_versions().await;
        let job = bench.submit(bench.spec("chats", Objective::Sft, 3)).await;
        bench.interrupted(&job).await;
        bench.accept_versions().await;
        for file in bench.saved().await.iter().filter(|file| file.ends_with(damaged)) {
            match missing {
                true => bench.parts.store.blobs().delete(file).await.unwrap(),
                false => bench.parts.store.blobs().replace(file, b"damaged".to_vec()).await.unwrap(),
            }
        }
        bench.trainer.resume(&bench.tenant, &job).await.unwrap();
        let events = bench.events(&job, 0).await;
        assert_eq!((last_state(&events), steps(&events)), (JobState::Succeeded, 6), "{damaged}: {events:?}");
    }
    bench.trainer.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_nearly_full_starts_no_training() {
    let bench = Bench::with(Limits { min_free_disk_bytes: u64::MAX, ..Limits::default() }).await;
    let spec = bench.spec("chats", Objective::Sft, 1);
    let refused = bench.trainer.submit(&bench.tenant, spec.clone(), &RequestKey::default()).await.unwrap_err();
    assert!(matches!(refused, Error::Exhausted { limit: "min_free_disk_bytes", .. }), "{refused:?}");
    assert!(refused.to_string().contains(bench.folder.path().to_str().unwrap()), "{refused}");
    // One that was queued while there was room.
    let name = JobName::new(bench.tenant.id(), "queued").unwrap();
    bench
        .parts
        .store
        .insert_job(&NewJob { name: name.clone(), spec, total_steps: 1 }, &RequestKey::default(), 9)
        .await
        .unwrap();
    bench.trainer.inner.queued.notify_one();
    let row = bench.interrupted(&name).await;
    assert!(row.error.unwrap().contains("bytes free"));
    bench.trainer.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_diverged_keeps_its_version_from_going_live() {
    let bench = Bench::new().await;
    let taught =
        bench.submit(JobSpec { publish: Publish::VersionOnly, ..bench.spec("chats", Objective::Sft, 60) }).await;
    bench.events(&taught, 0).await;
    let taught = bench.parts.store.get_job(&taught).await.unwrap().version.unwrap();
    let mut spec = JobSpec { start: Start::From(taught), ..bench.spec("chats", Objective::Sft, 4) };
    (spec.hyperparameters.learning_rate, spec.publish) = (1.0, Publish::Live);
    let job = bench.submit(spec).await;
    let events = bench.events(&job, 0).await;
    let last = events.last().map(|event| event.event.clone());
    let Some(JobEvent::State { state: JobState::Failed, error, version, live }) = last else { panic!("{events:?}") };
    assert!(error.as_ref().unwrap().starts_with("TRAINING_DIVERGED: "), "{error:?}");
    assert_eq!(live, Some(false));
    let row = bench.parts.store.get_job(&job).await.unwrap();
    assert_eq!((&row.version, &row.error, row.live), (&version, &error, false));
    let version = version.unwrap();
    let made = bench.parts.store.get_version(&version).await.unwrap();
    assert!(made.held_reason.unwrap().contains("lower the learning rate") && !made.live);
    let name = AdapterRef::Live(version.adapter.clone());
    assert!(matches!(
        bench.parts.store.resolve(&name).await,
        Err(Error::Precondition { reason: "NO_LIVE_VERSION", .. })
    ));

    // A crash right after the version was made changes nothing about that.
    let bench = bench
        .after_a_crash("UPDATE jobs SET state = 'RUNNING', error = NULL, version_adapter = NULL WHERE state = 'FAILED'")
        .await;
    let again = bench.parts.store.get_job(&job).await.unwrap();
    assert_eq!((again.state, &again.version, &again.error), (JobState::Failed, &Some(version.clone()), &error));
    // It is the tenant's all the same.
    bench.parts.hub.set_live(&bench.tenant, &version, "").await.unwrap();
    assert!(bench.parts.store.get_job(&job).await.unwrap().live);
    bench.trainer.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_has_a_limit_on_its_tokens() {
    let bench = Bench::with(Limits { max_training_tokens: 100, ..Limits::default() }).await;
    let long = JobSpec {
        hyperparameters: Hyperparameters { epochs: 50, max_steps: None, ..recipe() },
        ..bench.spec("chats", Objective::Sft, 1)
    };
    let refused = bench.trainer.validate(&bench.tenant, &long, Arc::default()).await.unwrap_err();
    assert!(matches!(refused, Error::Exhausted { limit: "max_training_tokens", .. }), "{refused:?}");
    let job = bench.submit(long).await;
    assert_eq!(last_state(&bench.events(&job, 0).await), JobState::Failed);
    assert!(bench.parts.store.get_job(&job).await.unwrap().error.unwrap().contains("max_training_tokens"));
    bench.trainer.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn records_too_long_are_refused_dropped_or_cut() {
    let bench = Bench::new().await;
    let answers = ["yes", "yes", "a much longer answer than the others are", "yes"];
    let lines: String =
        answers.iter().map(|answer| format!("{{\"prompt\":\"q\",\"completion\":\"{answer}\"}}\n")).collect();
    bench.upload("mixed", DatasetKind::Sft, &lines).await;
    let base = bench.spec("mixed", Objective::Sft, 1);
    let whole = JobSpec { hyperparameters: Hyperparameters { batch_size: 4, epochs: 1, ..recipe() }, ..base };
    let short = JobSpec {
        hyperparameters: Hyperparameters { batch_size: 3, epochs: 2, ..recipe() },
        too_long: TooLong::Drop,
        ..whole.clone()
    };
    let with = |too_long, max_length| {
        let mut spec = JobSpec { too_long, ..short.clone() };
        spec.hyperparameters.max_length = Some(max_length);
        spec
    };
    // Three short records of the same length, which is found by dropping ever more, and one that is longer.
    let mut length = bench.parts.model.context_length().min(2048) as u32 + 1;
    let mut only_short = 0;
    while only_short == 0 {
        length -= 1;
        let valid =
            bench.trainer.validate(&bench.tenant, &with(TooLong::Drop, length), Arc::default()).await.unwrap().data;
        if valid.dropped == 1 {
            only_short = valid.tokens / 2;
        }
    }
    let length = (only_short / 3) as u32;
    let refused =
        bench.trainer.validate(&bench.tenant, &with(TooLong::Refuse, length), Arc::default()).await.unwrap_err();
    assert!(matches!(refused, Error::Invalid { reason: "RECORD_TOO_LONG", .. }), "{refused}");
    assert!(refused.to_string().contains("line 3 ("), "{refused}");

    let job = bench.submit(with(TooLong::Truncate, length + 4)).await;
    let events = bench.events(&job, 0).await;
    assert_eq!(last_state(&events), JobState::Succeeded, "{events:?}");
    let row = bench.parts.store.get_job(&job).await.unwrap();
    let tokens = 2 * (only_short + u64::from(length) + 4);
    let truncated = TrainingData { records: 4, validation_records: 0, tokens, dropped: 0, truncated: 1 };
    assert_eq!((row.data, row.total_steps, row.step), (truncated, 4, 4));

    let job = bench.submit(with(TooLong::Drop, length)).await;
    let events = bench.events(&job, 0).await;
    assert_eq!(last_state(&events), JobState::Succeeded, "{events:?}");
    let row = bench.parts.store.get_job(&job).await.unwrap();
    let dropped = TrainingData { records: 3, validation_records: 0, tokens: 2 * only_short, dropped: 1, truncated: 0 };
    assert_eq!((row.data, row.total_steps, row.step), (dropped, 2, 2), "what is left fits one step an epoch");
    assert!(events.iter().any(|event| matches!(&event.event, JobEvent::Message(text) if text.contains("1 dropped"))));
    bench.trainer.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_after_the_last_step_keeps_what_was_trained() {
    let bench = Bench::new().await;
    bench.refuse_versions().await;
    let job = bench.submit(bench.spec("chats", Objective::Sft, 3)).await;
    let mut stream = bench.trainer.watch(&bench.tenant, &job, 0).await.unwrap();
    while !matches!(stream.next().await.unwrap().unwrap().event, JobEvent::Step { step: 3, .. }) {}
    drop(stream);
    let bench = bench.after_a_crash("DROP TRIGGER refuse").await;
    let row = bench.interrupted(&job).await;
    assert!(row.error.as_ref().unwrap().contains("resume the job to publish"), "{row:?}");
    bench.trainer.resume(&bench.tenant, &job).await.unwrap();
    let events = bench.events(&job, 0).await;
    assert_eq!((last_state(&events), steps(&events)), (JobState::Succeeded, 3), "{events:?}");
    bench.trainer.shutdown().await;
}

/// Another process has the lock from before the last step until after the stop: what was trained is on disk all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_locked_catalogue_loses_no_finished_run_at_a_stop() {
    let Bench { folder, parts, trainer, .. } = Bench::new().await;
    trainer.shutdown().await;
    drop((parts, trainer));
    let options = Options { busy_timeout: Duration::from_millis(50), ..Options::default() };
    let bench = Bench::open_with(folder, Limits::default(), options).await;
    let job = bench.submit(bench.spec("chats", Objective::Sft, 40)).await;
    bench.first_step(&job).await;
    let file = SqliteConnectOptions::new().filename(bench.folder.path().join("tenora.db"));
    let mut other = SqliteConnection::connect_with(&file.busy_timeout(PATIENCE)).await.unwrap();
    sqlx::query("BEGIN IMMEDIATE").execute(&mut other).await.unwrap();
    while !bench.saved().await.iter().any(|file| file.ends_with(RESULT_MANIFEST)) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bench.trainer.shutdown().await;
    sqlx::query("ROLLBACK").execute(&mut other).await.unwrap();
    let bench = bench.after_a_crash("SELECT 1").await;
    let row = bench.interrupted(&job).await;
    assert!(row.error.as_ref().unwrap().contains("after the training; resume the job to publish"), "{row:?}");
    bench.trainer.resume(&bench.tenant, &job).await.unwrap();
    let events = bench.events(&job, 0).await;
    let resumed =
        events.iter().rposition(|event| matches!(event.event, JobEvent::State { state: JobState::Running, .. }));
    assert_eq!((last_state(&events), steps(&events[resumed.unwrap()..])), (JobState::Succeeded, 0), "{events:?}");
    bench.trainer.shutdown().await;
}

/// Another version has taken the last place while the job ran: nobody but its owner can help, and waiting would not.
#[tokio::test(flavor = "multi_thread")]
async fn a_publication_without_room_waits_for_its_owner() {
    let bench = Bench::with(Limits { max_versions_per_adapter: 1, ..Limits::default() }).await;
    let mut spec = bench.spec("chats", Objective::Sft, 200);
    spec.hyperparameters.learning_rate = 1e-3;
    let job = bench.submit(spec).await;
    bench.first_step(&job).await;
    let shape = bench.parts.model.shape();
    let other = NewVersion {
        adapter: AdapterName::new(bench.tenant.id(), "a").unwrap(),
        package: Package::from_adapter(&Adapter::fresh(&lora(), shape, 3).unwrap(), shape).unwrap(),
        probes: Vec::new(),
        publish: Publish::Auto,
        job: None,
        metrics: Default::default(),
        request_id: String::new(),
        validate_only: false,
        held_reason: None,
        note: None,
    };
    bench.parts.hub.publish(&bench.tenant, other).await.unwrap();
    let error = bench.interrupted(&job).await.error.unwrap();
    assert!(error.contains("max_versions_per_adapter") && error.contains("resume the job to publish it"), "{error}");
    let bench = bench.after_a_crash_with("SELECT 1", Limits::default()).await;
    bench.trainer.resume(&bench.tenant, &job).await.unwrap();
    let events = bench.events(&job, 0).await;
    assert_eq!((last_state(&events), steps(&events)), (JobState::Succeeded, 200));
    let row = bench.parts.store.get_job(&job).await.unwrap();
    assert_eq!((row.version.unwrap().version, row.live, bench.versions().await), (2, false, 2));
    bench.trainer.shutdown().await;
}

/// A job says what memory it will take before its first step, and after the last what it has taken.
#[tokio::test]
async fn a_job_tells_the_memory_that_it_plans_and_takes() {
    let bench = Bench::new().await;
    let spec = bench.spec("chats", Objective::Sft, 2);
    let validated = bench.trainer.validate(&bench.tenant, &spec, Arc::default()).await.unwrap();
    let job = bench.submit(spec).await;
    let events = bench.events(&job, 0).await.into_iter().map(|event| event.event);
    let told: Vec<JobEvent> = events
        .filter(|event| matches!(event, JobEvent::MemoryPlan(_) | JobEvent::Step { .. } | JobEvent::MemoryPeak(_)))
        .collect();
    let [JobEvent::MemoryPlan(plan), JobEvent::Step { .. }, JobEvent::Step { .. }, JobEvent::MemoryPeak(peak)] =
        &told[..]
    else {
        panic!("{told:?}");
    };
    assert_eq!(*plan, validated.plan);
    assert_eq!(peak.adapter + peak.gradients, plan.memory.adapter + plan.memory.gradients);
}

/// What cannot fit is refused at once where the adapter alone shows it, else once the records are known.
#[tokio::test]
async fn a_job_that_does_not_fit_the_memory_is_refused() {
    let with = async |max_training_bytes| Bench::with(Limits { max_training_bytes, ..Limits::default() }).await;
    let refused = |result: Result<()>, advice: &str| match result {
        Err(Error::Exhausted { limit: "max_training_bytes", message, retry_after: None }) => {
            assert!(message.contains(advice), "{message}");
        }
        other => panic!("{other:?}"),
    };
    let bench = with(20_000).await;
    let (spec, request) = (bench.spec("chats", Objective::Sft, 1), RequestKey::default());
    refused(bench.trainer.submit(&bench.tenant, spec, &request).await.map(drop), "rank");
    let bench = with(190_000).await;
    let spec = bench.spec("chats", Objective::Sft, 1);
    let validated = bench.trainer.validate(&bench.tenant, &spec, Arc::default());
    refused(validated.await.map(drop), "max_length");
    let job = bench.submit(spec).await;
    bench.events(&job, 0).await;
    let row = bench.parts.store.get_job(&job).await.unwrap();
    assert_eq!(row.state, JobState::Failed);
    assert!(row.error.is_some_and(|error| error.contains("max_training_bytes")));
}

fn full(mut spec: JobSpec, full: FullSpec) -> JobSpec {
    spec.hyperparameters.learning_rate = 1e-3;
    JobSpec { start: Start::Fresh(full.into()), ..spec }
}

#[tokio::test(flavor = "multi_thread")]
async fn full_fine_tuning_is_refused_by_name_before_it_starts() {
    let bench = Bench::new().await;
    let all = full(bench.spec("chats", Objective::Sft, 1), FullSpec::default());
    let forbidden = TrainingContext { allow_full_fine_tuning: false, ..bench.parts.clone() };
    let refused = forbidden.check(&bench.tenant, &all).await;
    assert!(matches!(refused, Err(Error::Precondition { reason: "FULL_FINE_TUNING_NOT_ALLOWED", .. })), "{refused:?}");
    let values = bench.parts.model.trained_values(&FullSpec::default()).unwrap();
    let mut small = bench.parts.clone();
    let bytes = |of_value: usize| of_value * values;
    small.limits.max_full_fine_tuning_bytes = bytes(24) as u64 - 1;
    let refused = small.check(&bench.tenant, &all).await.unwrap_err();
    assert!(matches!(&refused, Error::Exhausted { limit: "max_full_fine_tuning_bytes", .. }), "{refused:?}");
    let (taken, of_values, gradients, moments) = (bytes(24), bytes(12), bytes(4), bytes(8));
    let says = format!(
        "full fine-tuning of {values} values takes {taken} bytes of memory: {of_values} of the values, as they are and as they were, \
         {gradients} of gradients, {moments} of two moments"
    );
    assert!(refused.to_string().contains(&says), "{refused}");
    let linear = LinearLayers { layers: Some(vec![0]), ..LinearLayers::default() };
    small
        .check(&bench.tenant, &full(all.clone(), FullSpec { linear: Some(linear), extract_rank: None }))
        .await
        .unwrap();

    let field = async |spec: JobSpec| match bench.parts.check(&bench.tenant, &spec).await {
        Err(Error::Invalid { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    let no_such = LinearLayers { layers: Some(vec![9]), ..LinearLayers::default() };
    let no_such = FullSpec { linear: Some(no_such), extract_rank: None };
    assert_eq!(field(full(all.clone(), no_such)).await, "full.layers_to_transform");
    let wide = FullSpec { linear: None, extract_rank: Some(100_000) };
    assert_eq!(field(full(all.clone(), wide)).await, "full.extract_rank");
    assert_eq!(field(JobSpec { publish: Publish::Live, ..all }).await, "publish");
    bench.trainer.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trained_model_stays_with_its_job_over_a_crash_and_goes_with_it() {
    let bench = Bench::new().await;
    let job = bench.submit(full(bench.spec("chats", Objective::Sft, 2), FullSpec::default())).await;
    let events = bench.events(&job, 0).await;
    assert_eq!(last_state(&events), JobState::Succeeded, "{events:?}");
    let says =
        |part: &str| events.iter().any(|event| matches!(&event.event, JobEvent::Message(text) if text.contains(part)));
    assert!(says("can be exported"), "{events:?}");
    let row = bench.parts.store.get_job(&job).await.unwrap();
    assert!(row.has_model() && row.version.is_none());
    assert_eq!(bench.versions().await, 0);

    // Before the job's end was written: it is interrupted, and resuming trains nothing again.
    let bench = bench.after_a_crash("UPDATE jobs SET state = 'RUNNING', result = tenant || '/jobs/' || job").await;
    bench.interrupted(&job).await;
    let (none, before) =
        (bench.trainer.model_files(&bench.tenant, &job, ModelFormat::HuggingFace).await, events.len() as u64);
    assert!(matches!(none, Err(Error::Precondition { reason: "NO_MODEL", .. })), "{none:?}");
    bench.trainer.resume(&bench.tenant, &job).await.unwrap();
    let events = bench.events(&job, before).await;
    assert_eq!((last_state(&events), steps(&events)), (JobState::Succeeded, 0), "{events:?}");

    let (row, files) = bench.trainer.model_files(&bench.tenant, &job, ModelFormat::HuggingFace).await.unwrap();
    assert!(row.has_model());
    let folder = tempfile::tempdir().unwrap();
    for mut file in files {
        let mut copy = std::fs::File::create(folder.path().join(file.name)).unwrap();
        std::io::copy(&mut file.file, &mut copy).unwrap();
    }
    assert!(folder.path().join("README.md").is_file(), "a GGUF file's tokenizer is not written");
    let read = crate::weights::Weights::from_folder(folder.path()).unwrap();
    assert!(read.slots().count() == 20 && read.config.layers.len() == 2);
    // Another start owns it still, and the job's deletion takes it along.
    let bench = bench.after_a_crash("SELECT 1").await;
    assert!(!bench.saved().await.is_empty());
    bench.trainer.delete(&bench.tenant, &job).await.unwrap();
    bench.nothing_saved().await;
    bench.trainer.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_published_as_a_lora_of_the_rank_that_is_asked_for() {
    let bench = Bench::new().await;
    let spec = FullSpec { linear: Some(LinearLayers::default()), extract_rank: Some(4) };
    let job = bench.submit(full(bench.spec("chats", Objective::Sft, 3), spec)).await;
    let events = bench.events(&job, 0).await;
    assert_eq!(last_state(&events), JobState::Succeeded, "{events:?}");
    let row = bench.parts.store.get_job(&job).await.unwrap();
    let made = bench.parts.store.get_version(&row.version.clone().unwrap()).await.unwrap();
    assert_eq!((made.kind, made.rank), (AdapterKind::Lora, 4));
    let share = made.metrics["extracted_share"];
    assert!(share > 0.2 && share < 1.0, "{share}");
    assert!(!row.has_model());
    bench.nothing_saved().await;
    bench.trainer.shutdown().await;
}
