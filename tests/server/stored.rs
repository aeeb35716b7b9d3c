//! Data folders that earlier builds have left behind open, list, serve and are trained from with this one.

use std::collections::BTreeMap;
use std::path::Path;

use sqlx::Connection as _;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use tempfile::TempDir;
use tenora::api::proto::train_request::{Objective, Start};
use tenora::api::proto::training_event::Event;
use tenora::api::proto::*;
use tenora::model::Model;

use super::common::{TestServer, answer, generate, reason};

/// A folder that a build has left, and the keys that open it.
struct Left {
    folder: &'static str,
    operator: &'static str,
    acme: &'static str,
    revoked: &'static str,
}

/// Of the last build whose stored documents had no versions.
const BEFORE_VERSIONS: Left = Left {
    folder: "tests/fixtures/data-0.1.0",
    operator: "tnr_d1500d9dad0135c3_4a0b156fbac8077df8d7264446bc80ddfd3eee88c4711f42712257d9309237a0",
    acme: "tnr_7574c1c38cb1a845_63ca19548d1b8040248f42171a865bd49ba85b8809aab7fe81f67e83202a96ec",
    revoked: "tnr_21d8673214aa2a98_2b01f8f28f34e10a4abca825d5f3fa620ba119d025410482a392b171c880fbf4",
};

/// Of the last build to which every adapter was a LoRA.
const BEFORE_KINDS: Left = Left {
    folder: "tests/fixtures/data-2026-11-29",
    operator: "tnr_181b18441c48d8fd_ed80c2133840074ed5ae96bfc9bd7ddb3c33a508b20749d143ca472429e9185a",
    acme: "tnr_0df45598e6815c62_ee08d89c2b21b20bd18003b145462041cf5c1f605a2c03a5312b9e63357b76d8",
    revoked: "tnr_d76d0ecb6841ba94_5b4c19b043f3fc7d44b11db44d402ed0e759ff5f0044eff814ea311a9eb60fff",
};

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

async fn open(data: &TempDir) -> SqliteConnection {
    let options = SqliteConnectOptions::new().filename(data.path().join("tenora.db")).create_if_missing(true);
    SqliteConnection::connect_with(&options).await.unwrap()
}

impl Left {
    /// The folder as the build left it, and `sql` done to it.
    async fn copy(&self, sql: &'static str) -> TempDir {
        let data = TempDir::new().unwrap();
        copy(&Path::new(self.folder).join("blobs"), &data.path().join("blobs"));
        let mut db = open(&data).await;
        let catalogue = std::fs::read_to_string(Path::new(self.folder).join("catalogue.sql")).unwrap();
        sqlx::raw_sql(sqlx::AssertSqlSafe(catalogue)).execute(&mut db).await.unwrap();
        sqlx::raw_sql(sql).execute(&mut db).await.unwrap();
        db.close().await.unwrap();
        data
    }

    async fn start(&self, data: TempDir) -> TestServer {
        let mut server = TestServer::start_in(data, std::future::ready(Ok(())), Model::tiny(1), |_| {}).await;
        assert_eq!(server.operator, "", "it has an operator's key");
        server.operator = self.operator.into();
        server.ready().await;
        server
    }

    /// All jobs of `tenants/acme`, newest first.
    async fn jobs(&self, server: &TestServer) -> Vec<TrainingJob> {
        let request = ListTrainingJobsRequest { parent: "tenants/acme".into(), ..Default::default() };
        server.training(self.acme).await.list_training_jobs(request).await.unwrap().into_inner().training_jobs
    }

    /// All events of a job, until it ends.
    async fn watch(&self, server: &TestServer, job: &str) -> Vec<TrainingEvent> {
        let request = WatchTrainingJobRequest { name: job.into(), after_sequence: 0 };
        let mut stream = server.training(self.acme).await.watch_training_job(request).await.unwrap().into_inner();
        let mut events = Vec::new();
        while let Some(event) = stream.message().await.unwrap() {
            events.push(event);
        }
        events
    }

    /// The version that a job makes, which must succeed.
    async fn made(&self, server: &TestServer, job: &str) -> AdapterVersion {
        let events = self.watch(server, job).await;
        let Some(Event::State(end)) = &events.last().unwrap().event else { panic!("{events:?}") };
        assert_eq!(end.state(), JobState::Succeeded, "{events:?}");
        let adapter = end.adapter_version.rsplit_once("/versions/").unwrap().0;
        let versions = self.versions(server, adapter).await;
        versions.into_iter().find(|version| version.name == end.adapter_version).unwrap()
    }

    /// All versions of an adapter, newest first.
    async fn versions(&self, server: &TestServer, adapter: &str) -> Vec<AdapterVersion> {
        let request = ListAdapterVersionsRequest { parent: adapter.into(), ..Default::default() };
        server.adapters(self.acme).await.list_adapter_versions(request).await.unwrap().into_inner().versions
    }
}

/// The steps that a job's events tell of.
fn steps(events: &[TrainingEvent]) -> Vec<u32> {
    let taken = |e: &TrainingEvent| if let Some(Event::Step(step)) = &e.event { Some(step.step) } else { None };
    events.iter().filter_map(taken).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_of_the_build_before_opens_and_lists() {
    let left = BEFORE_VERSIONS;
    let server = left.start(left.copy("").await).await;
    let mut tenants = server.tenants(left.operator).await;
    let listed = tenants.list_tenants(ListTenantsRequest::default()).await.unwrap().into_inner().tenants;
    let weights: Vec<_> = listed.iter().map(|t| (t.name.as_str(), t.weight)).collect();
    assert_eq!(weights, [("tenants/acme", 3), ("tenants/beta", 1), ("tenants/operator", 1)]);
    let deleted = CreateTenantRequest { tenant_id: "gone".into(), ..Default::default() };
    assert_eq!(tenants.create_tenant(deleted).await.unwrap_err().code(), tonic::Code::AlreadyExists);
    let policy = GetSafetyPolicyRequest { name: "tenants/acme/safetyPolicy".into() };
    let policy = server.safety(left.acme).await.get_safety_policy(policy).await.unwrap().into_inner();
    assert_eq!(policy.blocked_phrases, ["ACME secret", "\u{fc}ber"]);
    let parent = "tenants/acme".to_owned();
    let request = ListAdaptersRequest { parent: parent.clone(), ..Default::default() };
    let refused = server.adapters(left.revoked).await.list_adapters(request.clone()).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated);
    let adapters = server.adapters(left.acme).await.list_adapters(request).await.unwrap().into_inner().adapters;
    let live: Vec<_> = adapters.iter().map(|a| a.live_version.rsplit_once('/').unwrap().1).collect();
    assert_eq!((live, adapters.len()), (vec!["1", "1"], 2));
    let request = ListAdapterVersionsRequest { parent: "tenants/acme/adapters/tone".into(), ..Default::default() };
    let versions = server.adapters(left.acme).await.list_adapter_versions(request).await.unwrap().into_inner().versions;
    assert_eq!(versions.len(), 2);
    assert!(versions.iter().all(|v| v.parity.as_ref().unwrap().mean_abs_effect > 0.0 && !v.metrics.is_empty()));
    let request = ListDatasetsRequest { parent, ..Default::default() };
    let datasets = server.datasets(left.acme).await.list_datasets(request).await.unwrap().into_inner().datasets;
    let kinds: Vec<_> = datasets.iter().map(|d| (d.kind(), d.records)).collect();
    assert_eq!(kinds, [(DatasetKind::Sft, 4), (DatasetKind::Preferences, 4)]);
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_jobs_of_the_build_before_keep_their_recipe_and_run() {
    let left = BEFORE_VERSIONS;
    let server = left.start(left.copy("").await).await;
    // Newest first; what the dead process was running has ended, and what waits runs.
    let listed = left.jobs(&server).await;
    let ended: Vec<_> = listed[1..].iter().map(TrainingJob::state).collect();
    use JobState::{Cancelled, Failed, Interrupted, Succeeded};
    assert_eq!(ended, [Cancelled, Interrupted, Interrupted, Cancelled, Failed, Succeeded, Succeeded]);
    let (dpo, sft) = (listed[6].spec.clone().unwrap(), listed[7].spec.clone().unwrap());
    assert_eq!(dpo.objective, Some(Objective::Dpo(DpoSpec { beta: Some(0.2), label_smoothing: Some(0.125) })));
    assert_eq!(dpo.start, Some(Start::FromVersion("tenants/acme/adapters/tone/versions/1".into())));
    let Some(Start::Lora(lora)) = sft.start else { panic!("{sft:?}") };
    assert_eq!((lora.rank, lora.target_modules.len(), lora.layers_to_transform), (Some(2), 2, vec![1]));
    let recipe = sft.hyperparameters.unwrap();
    assert_eq!((recipe.seed, recipe.max_length, recipe.schedule()), (Some(u64::MAX), Some(64), LrSchedule::Linear));

    let events = left.watch(&server, &listed[7].name).await;
    let sequences: Vec<_> = events.iter().map(|e| e.sequence).collect();
    assert_eq!(sequences, (1..=11).collect::<Vec<_>>());
    let waited = left.watch(&server, &listed[0].name).await;
    let Some(Event::State(end)) = &waited.last().unwrap().event else { panic!("{waited:?}") };
    assert_eq!((end.state(), end.adapter_version.as_str()), (Succeeded, "tenants/acme/adapters/tone/versions/3"));

    let prompt = generate("tenants/acme/adapters/brought", "a", 8);
    let answered = answer(&mut server.generation(left.acme).await, prompt).await.unwrap();
    assert_eq!((answered.version.as_str(), answered.ids), ("tenants/acme/adapters/brought/versions/1", vec![62; 8]));
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_cannot_be_read_stop_neither_the_start_nor_the_rest() {
    let left = BEFORE_VERSIONS;
    let damage = "UPDATE jobs SET spec = '{\"v\":99}' WHERE job IN ('f008e332ac2b671c', '77c7cc6a82d41c7c');
         UPDATE jobs SET spec = 'damaged' WHERE job = '9addc04bb5c9a459';
         UPDATE jobs SET spec = json_set(spec, '$.later', 1, '$.hyperparameters.later', json('[1]')) WHERE job = 'd4f92dc942a41ee6';
         UPDATE versions SET parity = '{}' WHERE adapter = 'tone' AND version = 2;
         UPDATE job_events SET event = '{\"Later\":{}}' WHERE job = 'd4f92dc942a41ee6' AND sequence = 3;";
    let server = left.start(left.copy(damage).await).await;
    let listed = left.jobs(&server).await;
    assert_eq!(listed.len(), 5, "{listed:?}");
    let sft = listed.last().unwrap();
    assert_eq!(sft.spec.as_ref().unwrap().hyperparameters.as_ref().unwrap().max_length, Some(64));
    let events = left.watch(&server, &sft.name).await;
    assert_eq!(events.len(), 11);
    assert!(matches!(&events[2].event, Some(Event::Message(_))), "{:?}", events[2]);

    let name = "tenants/acme/trainingJobs/9addc04bb5c9a459".to_owned();
    let mut training = server.training(left.acme).await;
    let refused = training.get_training_job(GetTrainingJobRequest { name: name.clone() }).await.unwrap_err();
    assert_eq!(reason(&refused), "JOB_UNREADABLE");
    let request = ListAdapterVersionsRequest { parent: "tenants/acme/adapters/tone".into(), ..Default::default() };
    let versions = server.adapters(left.acme).await.list_adapter_versions(request).await.unwrap().into_inner().versions;
    assert_eq!(versions.iter().map(|v| v.name.as_str()).collect::<Vec<_>>(), ["tenants/acme/adapters/tone/versions/1"]);

    // The one that was queued and cannot be read does not hold up one that can.
    let again = TrainRequest { request_id: "after".into(), ..sft.spec.clone().unwrap() };
    let job = training.train(again).await.unwrap().into_inner().name;
    let events = left.watch(&server, &job).await;
    let Some(Event::State(end)) = &events.last().unwrap().event else { panic!("{events:?}") };
    assert_eq!(end.state(), JobState::Succeeded);
    server.stopped().await;
}

/// What the build that made them got of the base and of its versions: the answer to "question 1", and that text's log-probability.
const ANSWERS: [(&str, [u32; 8], f32); 5] = [
    ("", [172; 8], -58.3798),
    ("tenants/acme/adapters/brought/versions/1", [172, 172, 172, 172, 172, 177, 177, 177], -59.4528),
    ("tenants/acme/adapters/tone/versions/1", [172; 8], -58.2507),
    ("tenants/acme/adapters/tone/versions/2", [172; 8], -58.3070),
    ("tenants/acme/adapters/terse/versions/1", [257, 257, 116, 116, 116, 116, 116, 116], -41.5844),
];

/// A text's log-probability.
async fn score(server: &TestServer, key: &str, adapter: &str, text: &str) -> f32 {
    let inputs = vec![ScoreInput { sequence: Some(score_input::Sequence::Text(text.into())) }];
    let request = ScoreRequest { adapter: adapter.into(), inputs, ..Default::default() };
    let scored = server.generation(key).await.score(request).await.unwrap().into_inner();
    scored.results[0].logprobs.iter().map(|token| token.logprob).sum()
}

/// The files of a version.
async fn export(server: &TestServer, key: &str, version: &str) -> BTreeMap<String, Vec<u8>> {
    let request = ExportAdapterRequest { name: version.into() };
    let mut messages = server.adapters(key).await.export_adapter(request).await.unwrap().into_inner();
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    while let Some(message) = messages.message().await.unwrap() {
        if let Some(export_adapter_response::Part::Chunk(chunk)) = message.part {
            files.entry(chunk.filename).or_default().extend(chunk.data);
        }
    }
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_from_before_adapters_had_kinds_opens_and_lists() {
    let left = BEFORE_KINDS;
    let server = left.start(left.copy("").await).await;
    let mut tenants = server.tenants(left.operator).await;
    let listed = tenants.list_tenants(ListTenantsRequest::default()).await.unwrap().into_inner().tenants;
    let weights: Vec<_> = listed.iter().map(|t| (t.name.as_str(), t.display_name.as_str(), t.weight)).collect();
    let operators = ("tenants/operator", "Operators' own calls", 1);
    assert_eq!(weights, [("tenants/acme", "Acme", 3), ("tenants/beta", "", 1), operators]);
    let deleted = CreateTenantRequest { tenant_id: "gone".into(), ..Default::default() };
    assert_eq!(tenants.create_tenant(deleted).await.unwrap_err().code(), tonic::Code::AlreadyExists);
    let request = ListApiKeysRequest { parent: "tenants/acme".into(), ..Default::default() };
    let keys = tenants.list_api_keys(request).await.unwrap().into_inner().api_keys;
    let mut keys: Vec<_> = keys.iter().map(|key| (key.display_name.as_str(), key.revoke_time.is_some())).collect();
    keys.sort_unstable();
    assert_eq!(keys, [("", false), ("laptop", true)]);
    let request = GetUsageRequest { name: "tenants/acme".into() };
    let usage = tenants.get_usage(request).await.unwrap().into_inner();
    assert_eq!((usage.requests, usage.prompt_tokens, usage.completion_tokens), (35, 210, 240));

    let policy = GetSafetyPolicyRequest { name: "tenants/acme/safetyPolicy".into() };
    let policy = server.safety(left.acme).await.get_safety_policy(policy).await.unwrap().into_inner();
    assert_eq!(policy.blocked_phrases, ["ACME secret", "\u{fc}ber"]);
    let request = ListDatasetsRequest { parent: "tenants/acme".into(), ..Default::default() };
    let refused = server.datasets(left.revoked).await.list_datasets(request.clone()).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated);
    let mut datasets = server.datasets(left.acme).await;
    let listed = datasets.list_datasets(request).await.unwrap().into_inner().datasets;
    let kinds: Vec<_> = listed.iter().map(|d| (d.name.as_str(), d.kind(), d.records)).collect();
    let (chats, long) = ("tenants/acme/datasets/chats", "tenants/acme/datasets/long");
    let pairs = ("tenants/acme/datasets/pairs", DatasetKind::Preferences, 6);
    assert_eq!(kinds, [(chats, DatasetKind::Sft, 8), (long, DatasetKind::Sft, 4), pairs]);
    for dataset in listed {
        let request = InspectDatasetRequest { name: dataset.name.clone(), ..Default::default() };
        let report = datasets.inspect_dataset(request).await.unwrap().into_inner();
        assert!(report.loss_tokens > 0, "{report:?}");
    }
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_from_before_adapters_had_kinds_are_loras_and_answer_as_they_did() {
    let left = BEFORE_KINDS;
    let server = left.start(left.copy("").await).await;
    let request = ListAdaptersRequest { parent: "tenants/acme".into(), ..Default::default() };
    let adapters = server.adapters(left.acme).await.list_adapters(request).await.unwrap().into_inner().adapters;
    let live: BTreeMap<_, _> = adapters.iter().map(|a| (a.name.as_str(), a.live_version.as_str())).collect();
    assert_eq!(live["tenants/acme/adapters/tone"], "tenants/acme/adapters/tone/versions/1");
    let mut versions = Vec::new();
    for adapter in ["brought", "tone", "terse"] {
        versions.extend(left.versions(&server, &format!("tenants/acme/adapters/{adapter}")).await);
    }
    let shapes: Vec<_> = versions
        .iter()
        .map(|v| (v.name.strip_prefix("tenants/acme/adapters/").unwrap(), v.rank, v.target_modules.len()))
        .collect();
    let terse = [("terse/versions/2", 1, 7), ("terse/versions/1", 1, 7)];
    let tone = [("tone/versions/2", 2, 2), ("tone/versions/1", 2, 2)];
    assert_eq!(shapes, [&[("brought/versions/1", 4, 7)], &tone[..], &terse[..]].concat());
    assert!(versions.iter().all(|v| (v.kind.as_str(), v.virtual_tokens, v.no_effect) == ("lora", 0, false)));
    assert!(versions.iter().all(|v| v.parity.as_ref().unwrap().mean_abs_effect > 0.0));
    assert!(versions[0].note.contains("someone/Other-7B") && versions[0].training_job.is_empty(), "{:?}", versions[0]);
    assert!(versions[1..].iter().all(|v| !v.training_job.is_empty() && v.metrics.contains_key("train_loss")));
    assert!(versions[3].held_reason.starts_with("TRAINING_DIVERGED: ") && !versions[3].live, "{:?}", versions[3]);

    for (version, ids, logprob) in ANSWERS {
        let answered = answer(&mut server.generation(left.acme).await, generate(version, "question 1", 8)).await;
        let answered = answered.unwrap();
        assert_eq!(
            (answered.version.as_str(), answered.ids, answered.usage.virtual_tokens),
            (version, ids.to_vec(), 0)
        );
        // Far less than what lies between any two of them.
        let scored = score(&server, left.acme, version, "question 1").await;
        assert!((scored - logprob).abs() < 0.02, "{version}: {scored}, not {logprob}");
    }
    // The same files have the same digest.
    for version in &versions {
        let files = export(&server, left.acme, &version.name).await;
        let files: Vec<_> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
        let again = server.import_files(left.acme, "acme", "again", &files).await.unwrap();
        assert_eq!((again.digest.as_str(), again.kind.as_str()), (version.digest.as_str(), "lora"));
    }
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_from_before_adapters_had_kinds_keep_their_recipe_and_events_and_go_on() {
    let left = BEFORE_KINDS;
    let server = left.start(left.copy("").await).await;
    let mut training = server.training(left.acme).await;
    let mut listed = left.jobs(&server).await;
    listed.reverse();
    let [sft, dpo, .., stopped, saved, killed, waited] = listed.as_slice() else { panic!("{listed:?}") };
    let ended: Vec<_> = listed[..10].iter().map(TrainingJob::state).collect();
    use JobState::{Cancelled, Failed, Interrupted, Succeeded};
    let before = [Succeeded, Succeeded, Succeeded, Failed, Failed, Cancelled, Cancelled];
    assert_eq!(ended, [&before[..], &[Interrupted; 3]].concat());
    assert!(listed[3].error.starts_with("TRAINING_DIVERGED: "), "{:?}", listed[3]);

    let (first, second) = (sft.spec.clone().unwrap(), dpo.spec.clone().unwrap());
    assert_eq!(second.objective, Some(Objective::Dpo(DpoSpec { beta: Some(0.2), label_smoothing: Some(0.125) })));
    assert_eq!(second.start, Some(Start::FromVersion("tenants/acme/adapters/tone/versions/1".into())));
    assert_eq!((second.publish(), first.too_long()), (Publish::VersionOnly, TooLong::Truncate));
    let lora = LoraSpec {
        rank: Some(2),
        alpha: Some(4.0),
        dropout: Some(0.125),
        target_modules: vec!["q_proj".into(), "down_proj".into()],
        layers_to_transform: vec![1],
        use_rslora: true,
        use_dora: false,
        lora_bias: false,
        trainable_token_indices: Vec::new(),
        init: LoraInit::Unspecified.into(),
    };
    assert_eq!(first.start, Some(Start::Lora(lora)));
    let recipe = Hyperparameters {
        learning_rate: Some(1e-2),
        epochs: Some(2),
        max_steps: Some(3),
        batch_size: Some(2),
        gradient_accumulation_steps: Some(2),
        warmup_steps: Some(1),
        schedule: LrSchedule::Linear.into(),
        weight_decay: Some(0.01),
        beta1: Some(0.8),
        beta2: Some(0.99),
        epsilon: Some(1e-7),
        max_grad_norm: Some(0.5),
        seed: Some(u64::MAX),
        sequential: true,
        validation_split: Some(0.25),
        eval_steps: Some(2),
        max_length: Some(64),
        gradient_checkpointing: GradientCheckpointing::Unspecified.into(),
        optimizer: Optimizer::Unspecified.into(),
    };
    assert_eq!(first.hyperparameters, Some(recipe));
    assert_eq!((sft.records, sft.validation_records, sft.step, sft.live), (6, 2, 3, true));
    // A retry of the call that another build answered gets what that one gave.
    let retried = TrainRequest { request_id: "train-1".into(), ..first };
    assert_eq!(training.train(retried).await.unwrap().into_inner().name, sft.name);

    let events = left.watch(&server, &sft.name).await;
    let sequences: Vec<_> = events.iter().map(|e| e.sequence).collect();
    assert_eq!(sequences, (1..=events.len() as u64).collect::<Vec<_>>());
    assert_eq!(steps(&events), [1, 2, 3]);
    let scored = |e: &&TrainingEvent| matches!(&e.event, Some(Event::Evaluated(scored)) if scored.loss > 0.0);
    assert_eq!(events.iter().filter(scored).count(), 2);

    // What waits runs; what was stopped begins again; what had been trained is published as it is.
    assert_eq!(left.made(&server, &waited.name).await.name, "tenants/acme/adapters/waited/versions/1");
    for job in [stopped, saved] {
        training.resume_training_job(ResumeTrainingJobRequest { name: job.name.clone() }).await.unwrap();
    }
    assert_eq!(left.made(&server, &stopped.name).await.name, "tenants/acme/adapters/stopped/versions/1");
    assert_eq!(left.made(&server, &saved.name).await.name, "tenants/acme/adapters/late/versions/2");
    assert_eq!(steps(&left.watch(&server, &saved.name).await), [1, 2, 3, 4, 5, 6], "none is taken again");
    training.delete_training_job(DeleteTrainingJobRequest { name: killed.name.clone() }).await.unwrap();
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn training_goes_on_from_what_was_stored_before_adapters_had_kinds() {
    let left = BEFORE_KINDS;
    let server = left.start(left.copy("").await).await;
    let sft = left.jobs(&server).await.pop().unwrap().spec.unwrap();
    let few = Hyperparameters { max_steps: Some(3), learning_rate: Some(1e-2), ..Default::default() };
    let dpo = Some(Objective::Dpo(DpoSpec::default()));
    let jobs = [
        ("tone", Start::FromVersion("tenants/acme/adapters/tone/versions/2".into()), sft.objective, "chats", "lora"),
        ("late", Start::FromVersion("tenants/acme/adapters/brought".into()), dpo, "pairs", "lora"),
        ("scaled", Start::Ia3(Ia3Spec::default()), sft.objective, "chats", "ia3"),
    ];
    for (adapter, start, objective, dataset, kind) in jobs {
        let request = TrainRequest {
            parent: "tenants/acme".into(),
            adapter_id: adapter.into(),
            dataset: format!("tenants/acme/datasets/{dataset}"),
            objective,
            start: Some(start),
            hyperparameters: Some(few),
            ..Default::default()
        };
        let job = server.training(left.acme).await.train(request).await.unwrap().into_inner().name;
        let version = left.made(&server, &job).await;
        assert_eq!((version.kind.as_str(), version.training_job.as_str()), (kind, job.as_str()));
        assert!(version.parity.as_ref().unwrap().mean_abs_effect > 0.0, "{version:?}");
        answer(&mut server.generation(left.acme).await, generate(&version.name, "question 1", 2)).await.unwrap();
    }
    server.stopped().await;
}
