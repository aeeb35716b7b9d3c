use std::time::Duration;

use super::*;
use crate::ids::{DatasetName, Digest};
use crate::request::{
    GradientCheckpointing, Hyperparameters, LrSchedule, Objective, Optimizer, Publish, TooLong, TunerSpec,
};
use crate::store::{DatasetKind, NewDataset, Retention};

fn tenant(id: &str) -> TenantId {
    TenantId::new(id).unwrap()
}

fn job(tenant: &TenantId, id: &str) -> NewJob {
    let hyperparameters = Hyperparameters {
        learning_rate: 1e-3,
        epochs: 1,
        max_steps: None,
        batch_size: 1,
        gradient_accumulation_steps: 1,
        warmup_steps: None,
        schedule: LrSchedule::Cosine,
        weight_decay: 0.0,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        max_grad_norm: 1.0,
        seed: u64::MAX,
        sequential: false,
        validation_split: 0.0,
        eval_steps: None,
        max_length: None,
        gradient_checkpointing: GradientCheckpointing::Auto,
        optimizer: Optimizer::AdamW,
    };
    let spec = JobSpec {
        adapter: AdapterName::new(tenant, "a").unwrap(),
        dataset: DatasetName::new(tenant, "d").unwrap(),
        objective: Objective::Sft,
        start: Start::Fresh(TunerSpec::default()),
        hyperparameters,
        publish: Publish::Auto,
        too_long: TooLong::Refuse,
    };
    NewJob { name: JobName::new(tenant, id).unwrap(), spec, total_steps: 3 }
}

/// A store with two tenants, each with a dataset `d`.
async fn store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).await.unwrap();
    for id in ["one", "two"] {
        store.create_tenant(&tenant(id), "", 1, "").await.unwrap();
        let name = DatasetName::new(&tenant(id), "d").unwrap();
        let (kind, digest) = (DatasetKind::Sft, Digest::of(b""));
        let blob = format!("{id}/datasets/x");
        let dataset = NewDataset { name, kind, records: 3, size_bytes: 0, unpacked_bytes: 0, digest, blob };
        store.insert_dataset(&dataset, "", 10).await.unwrap();
    }
    (folder, store)
}

/// A request id with some content; an empty one is none.
fn key(id: &str, content: &str) -> RequestKey {
    RequestKey { id: id.into(), content: content.into() }
}

async fn insert(store: &Store, tenant_id: &str, id: &str) -> JobName {
    store.insert_job(&job(&tenant(tenant_id), id), &key("", ""), 10).await.unwrap().name
}

async fn claim(store: &Store) -> Option<String> {
    store.claim_next_job().await.unwrap().map(|(_, job)| job.name.job)
}

async fn states(store: &Store, job: &JobName) -> Vec<JobState> {
    let events = store.events_after(job, 0, 100).await.unwrap();
    let state = |event: &StoredEvent| match event.event {
        JobEvent::State { state, .. } => Some(state),
        _ => None,
    };
    events.iter().filter_map(state).collect()
}

#[tokio::test]
async fn a_request_id_makes_one_job() {
    let (_folder, store) = store().await;
    let (same, other) = (key("r", "1"), key("r", "2"));
    let first = store.insert_job(&job(&tenant("one"), "j1"), &same, 10).await.unwrap();
    let again = store.insert_job(&job(&tenant("one"), "j2"), &same, 10).await.unwrap();
    assert_eq!(first, again);
    let refused = store.insert_job(&job(&tenant("one"), "j2"), &other, 10).await.unwrap_err();
    assert!(matches!(&refused, Error::Invalid { reason: "REQUEST_ID_REUSED", .. }), "{refused:?}");
    assert!(refused.to_string().contains(&first.name.to_string()), "{refused}");
    let adapter = |tenant_id: &str| AdapterName::new(&tenant(tenant_id), "a").unwrap();
    assert_eq!(store.job_of_request(&adapter("one"), &same).await.unwrap(), Some(first));
    assert!(store.job_of_request(&adapter("one"), &other).await.is_err());
    assert_eq!(store.job_of_request(&adapter("two"), &same).await.unwrap(), None);
    let without = store.insert_job(&job(&tenant("one"), "j2"), &key("", ""), 10).await.unwrap();
    assert_eq!(without.name.job, "j2");
    assert_eq!(without.spec, job(&tenant("one"), "j2").spec);
}

#[tokio::test]
async fn open_jobs_are_limited_and_need_their_dataset() {
    let (_folder, store) = store().await;
    let first = insert(&store, "one", "j1").await;
    let full = store.insert_job(&job(&tenant("one"), "j2"), &key("", ""), 1).await;
    assert!(matches!(full, Err(Error::Exhausted { limit: "max_jobs_per_tenant", .. })));
    store.transition(&first, &[JobState::Queued], JobState::Cancelled, JobEnd::default()).await.unwrap().unwrap();
    store.insert_job(&job(&tenant("one"), "j2"), &key("", ""), 1).await.unwrap();
    let mut lost = job(&tenant("two"), "j3");
    lost.spec.dataset.dataset = "gone".into();
    assert!(matches!(store.insert_job(&lost, &key("", ""), 1).await, Err(Error::NotFound { .. })));
}

#[tokio::test]
async fn a_dataset_stays_while_a_job_may_need_it() {
    let (_folder, store) = store().await;
    let name = insert(&store, "one", "j").await;
    claim(&store).await.unwrap();
    store.interrupt_stale_jobs().await.unwrap();
    let dataset = DatasetName::new(&tenant("one"), "d").unwrap();
    let refused = store.delete_dataset(&dataset).await;
    assert!(matches!(refused, Err(Error::Precondition { reason: "DATASET_IN_USE", .. })));
    store.delete_dataset(&DatasetName::new(&tenant("two"), "d").unwrap()).await.unwrap();
    store.transition(&name, &[JobState::Interrupted], JobState::Cancelled, JobEnd::default()).await.unwrap().unwrap();
    store.delete_dataset(&dataset).await.unwrap();
    assert!(matches!(store.delete_dataset(&dataset).await, Err(Error::NotFound { .. })));
}

#[tokio::test]
async fn tenants_take_turns() {
    let (_folder, store) = store().await;
    for (tenant, id) in [("one", "a1"), ("one", "a2"), ("one", "a3"), ("two", "b1"), ("two", "b2")] {
        insert(&store, tenant, id).await;
    }
    let mut order = Vec::new();
    while let Some(id) = claim(&store).await {
        order.push(id);
    }
    assert_eq!(order, ["a1", "b1", "a2", "b2", "a3"]);
}

#[tokio::test]
async fn a_transition_happens_once_and_has_one_event() {
    let (_folder, store) = store().await;
    let name = insert(&store, "one", "j").await;
    claim(&store).await.unwrap();
    let cancel = || store.transition(&name, &[JobState::Running], JobState::Cancelling, JobEnd::default());
    let (a, b) = tokio::join!(cancel(), cancel());
    assert_eq!([a.unwrap(), b.unwrap()].iter().flatten().count(), 1);
    assert_eq!(states(&store, &name).await, [JobState::Queued, JobState::Running, JobState::Cancelling]);
    assert_eq!(store.job_state(&name).await.unwrap(), JobState::Cancelling);
    assert!(STATES.iter().all(|state| state_from_name(state_name(*state)).unwrap() == *state));
    let ended = STATES.iter().filter(|state| ended!().contains(&format!("'{}'", state_name(**state))));
    assert!(ended.eq(STATES.iter().filter(|state| state.is_final())));
}

/// Its state and its result stay for the build that wrote it, and it can be cancelled.
#[tokio::test]
async fn a_job_that_cannot_be_read_is_interrupted_and_can_be_cancelled() {
    let (_folder, store) = store().await;
    let (unreadable, next) = (insert(&store, "one", "a").await, insert(&store, "two", "b").await);
    claim(&store).await;
    store.transition(&unreadable, &[JobState::Running], JobState::Queued, JobEnd::default()).await.unwrap();
    let blob = store.get_job(&unreadable).await.unwrap().result.unwrap();
    store.blobs().put(&format!("{blob}/x"), vec![1]).await.unwrap();
    store.execute("UPDATE jobs SET spec = '{}' WHERE job = 'a'").await;
    store.execute("UPDATE jobs SET state = 'RUNNING' WHERE job = 'b'").await;
    assert_eq!(claim(&store).await, None, "nothing else waits");
    assert_eq!(store.job_state(&unreadable).await.unwrap(), JobState::Interrupted);
    assert!(store.blobs().get(&format!("{blob}/x")).await.unwrap().is_some());
    assert_eq!(store.job_state(&next).await.unwrap(), JobState::Running);

    let cancelled = store.move_job(&unreadable, |_| Some((JobState::Cancelled, JobEnd::default()))).await.unwrap();
    assert_eq!(cancelled, Some(JobState::Cancelled));
    let error = store.get_job(&unreadable).await.unwrap_err().to_string();
    assert!(error.contains("is CANCELLED") && error.contains("delete it"), "{error}");
    assert_eq!(store.blobs().get(&format!("{blob}/x")).await.unwrap(), None);
    store.delete_job(&unreadable).await.unwrap();
}

#[tokio::test]
async fn events_count_from_one_and_steps_move_the_job() {
    let (_folder, store) = store().await;
    let (name, other) = (insert(&store, "one", "j").await, insert(&store, "two", "j").await);
    let step = JobEvent::Step {
        step: 2,
        total_steps: 3,
        loss: 0.1,
        learning_rate: 1e-3,
        grad_norm: 0.7,
        tokens_per_second: 12.5,
        eta_seconds: 1.0,
        metrics: [("rewards/accuracies".to_owned(), 0.5)].into(),
    };
    assert_eq!(store.append_event(&name, &step).await.unwrap(), 2);
    assert_eq!(store.append_event(&other, &JobEvent::Message("m".into())).await.unwrap(), 2);
    assert_eq!(store.append_event(&name, &JobEvent::Message("m".into())).await.unwrap(), 3);
    let events = store.events_after(&name, 1, 1).await.unwrap();
    assert_eq!(events.len(), 1);
    assert_eq!((events[0].sequence, &events[0].event), (2, &step));
    assert_eq!(store.get_job(&name).await.unwrap().step, 2);
}

#[tokio::test]
async fn a_dead_process_leaves_interrupted_cancelled_and_succeeded_jobs() {
    let (_folder, store) = store().await;
    let names = [insert(&store, "one", "a").await, insert(&store, "one", "b").await, insert(&store, "one", "c").await];
    let queued = insert(&store, "two", "d").await;
    for _ in 0..4 {
        claim(&store).await.unwrap();
    }
    let back = JobEnd::default();
    store.transition(&queued, &[JobState::Running], JobState::Queued, back.clone()).await.unwrap().unwrap();
    store.transition(&names[1], &[JobState::Running], JobState::Cancelling, back).await.unwrap().unwrap();
    for sql in [
        "INSERT INTO adapters VALUES ('one', 'a', 4, 'e', 0, 0)",
        "INSERT INTO versions (uid, tenant, adapter, version, digest, base_digest, template_digest, size_bytes, memory_bytes,
         rank, targets, parity, job, metrics, blob, create_time)
         VALUES ('u', 'one', 'a', 4, '', '', '', 0, 0, 1, '[]', '', 'tenants/one/trainingJobs/c', '{}', 'x', 0)",
    ] {
        sqlx::query(sql).execute(store.writer()).await.unwrap();
    }
    store.interrupt_stale_jobs().await.unwrap();
    let mut after = Vec::new();
    for name in names.iter().chain([&queued]) {
        after.push(store.get_job(name).await.unwrap());
    }
    let expected = [JobState::Interrupted, JobState::Cancelled, JobState::Succeeded, JobState::Queued];
    assert_eq!(after.iter().map(|job| job.state).collect::<Vec<_>>(), expected);
    assert_eq!(after[2].version.as_ref().map(|version| version.version), Some(4));
    assert!(after[0].error.is_some() && after[0].end_time.is_some());
    assert_eq!(states(&store, &names[0]).await.last(), Some(&JobState::Interrupted));
}

#[tokio::test]
async fn lists_are_newest_first_and_page() {
    let (_folder, store) = store().await;
    for id in ["a", "b", "c", "d", "e"] {
        insert(&store, "one", id).await;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    insert(&store, "two", "other").await;
    let mut page = Page { size: 2, token: String::new() };
    let mut seen = Vec::new();
    loop {
        let listed = store.list_jobs(&tenant("one"), &page).await.unwrap();
        seen.extend(listed.items.into_iter().map(|job| job.name.job));
        page.token = listed.next;
        if page.token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, ["e", "d", "c", "b", "a"]);
    let bad = Page { size: 2, token: "x".into() };
    assert!(matches!(store.list_jobs(&tenant("one"), &bad).await, Err(Error::Invalid { .. })));
}

#[tokio::test]
async fn only_a_job_that_has_ended_can_be_deleted_and_its_events_go_with_it() {
    let (_folder, store) = store().await;
    let name = insert(&store, "one", "j").await;
    let error = store.delete_job(&name).await.unwrap_err().to_string();
    assert!(error.contains("has not ended"), "{error}");
    claim(&store).await;
    assert!(store.delete_job(&name).await.is_err(), "it runs");
    let blob = store.get_job(&name).await.unwrap().result.unwrap();
    store.blobs().put(&format!("{blob}/x"), vec![1]).await.unwrap();
    let end = JobEnd { error: Some("stopped".into()), ..JobEnd::default() };
    store.transition(&name, &[JobState::Running], JobState::Interrupted, end).await.unwrap().unwrap();
    store.delete_job(&name).await.unwrap();
    assert!(store.get_job(&name).await.is_err());
    assert_eq!(store.events_after(&name, 0, 10).await.unwrap(), []);
    assert_eq!(store.blobs().get(&format!("{blob}/x")).await.unwrap(), None, "what it had saved goes too");
    assert!(matches!(store.delete_job(&name).await, Err(Error::NotFound { .. })));
    store.execute("DELETE FROM datasets").await;
}

#[tokio::test]
async fn old_ended_jobs_and_request_ids_go_and_all_others_stay() {
    let (_folder, store) = store().await;
    let known =
        || async { store.job_of_request(&AdapterName::new(&tenant("one"), "a").unwrap(), &key("r", "x")).await };
    store.insert_job(&job(&tenant("one"), "ended"), &key("r", "x"), 10).await.unwrap();
    insert(&store, "one", "waits").await;
    insert(&store, "two", "stopped").await;
    store.execute("UPDATE jobs SET state = 'CANCELLED', end_time = 1000 WHERE job = 'ended'").await;
    store.execute("UPDATE jobs SET state = 'INTERRUPTED', end_time = 1000 WHERE job = 'stopped'").await;
    let none = Retention::default();
    assert_eq!(store.forget_old(none).await.unwrap(), (0, 0));
    let young =
        Retention { jobs: Some(Duration::from_millis(now() as u64)), request_ids: Some(Duration::from_secs(3600)) };
    assert_eq!(store.forget_old(young).await.unwrap(), (0, 0));
    assert!(known().await.unwrap().is_some());

    let jobs = Retention { jobs: Some(Duration::from_secs(3600)), request_ids: None };
    assert_eq!(store.forget_old(jobs).await.unwrap(), (1, 0));
    let left = |tenant_id: &str| {
        let (store, id) = (store.clone(), tenant(tenant_id));
        async move { store.list_jobs(&id, &Page::default()).await.unwrap().items.len() }
    };
    assert_eq!((left("one").await, left("two").await), (1, 1));
    store.execute("UPDATE requests SET create_time = 1000").await;
    let ids = Retention { jobs: None, request_ids: Some(Duration::from_secs(3600)) };
    assert_eq!(store.forget_old(ids).await.unwrap(), (0, 1));
    assert!(known().await.unwrap().is_none(), "the id means nothing any more");
}
