//! A data folder that an earlier build has left behind opens, lists and serves with this one.

use std::path::Path;

use sqlx::Connection as _;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use tempfile::TempDir;
use tenora::api::proto::train_request::{Objective, Start};
use tenora::api::proto::*;
use tenora::model::Model;

use super::common::{TestServer, answer, generate, reason};

const FOLDER: &str = "tests/fixtures/data-0.1.0";
const OPERATOR: &str = "tnr_d1500d9dad0135c3_4a0b156fbac8077df8d7264446bc80ddfd3eee88c4711f42712257d9309237a0";
const ACME: &str = "tnr_7574c1c38cb1a845_63ca19548d1b8040248f42171a865bd49ba85b8809aab7fe81f67e83202a96ec";
const REVOKED: &str = "tnr_21d8673214aa2a98_2b01f8f28f34e10a4abca825d5f3fa620ba119d025410482a392b171c880fbf4";

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

/// The folder as the earlier build left it, and `sql` done to it.
async fn folder(sql: &'static str) -> TempDir {
    let data = TempDir::new().unwrap();
    copy(&Path::new(FOLDER).join("blobs"), &data.path().join("blobs"));
    let mut db = open(&data).await;
    let catalogue = std::fs::read_to_string(Path::new(FOLDER).join("catalogue.sql")).unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(catalogue)).execute(&mut db).await.unwrap();
    sqlx::raw_sql(sql).execute(&mut db).await.unwrap();
    db.close().await.unwrap();
    data
}

async fn start(data: TempDir) -> TestServer {
    let mut server = TestServer::start_in(data, std::future::ready(Ok(())), Model::tiny(1), |_| {}).await;
    assert_eq!(server.operator, "", "it has an operator's key");
    server.operator = OPERATOR.into();
    server.ready().await;
    server
}

async fn jobs(server: &TestServer) -> Vec<TrainingJob> {
    let request = ListTrainingJobsRequest { parent: "tenants/acme".into(), ..Default::default() };
    server.training(ACME).await.list_training_jobs(request).await.unwrap().into_inner().training_jobs
}

async fn watch(server: &TestServer, job: &str) -> Vec<TrainingEvent> {
    let request = WatchTrainingJobRequest { name: job.into(), after_sequence: 0 };
    let mut stream = server.training(ACME).await.watch_training_job(request).await.unwrap().into_inner();
    let mut events = Vec::new();
    while let Some(event) = stream.message().await.unwrap() {
        events.push(event);
    }
    events
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_of_the_build_before_opens_and_lists() {
    let server = start(folder("").await).await;
    let mut tenants = server.tenants(OPERATOR).await;
    let listed = tenants.list_tenants(ListTenantsRequest::default()).await.unwrap().into_inner().tenants;
    let weights: Vec<_> = listed.iter().map(|t| (t.name.as_str(), t.weight)).collect();
    assert_eq!(weights, [("tenants/acme", 3), ("tenants/beta", 1), ("tenants/operator", 1)]);
    let deleted = CreateTenantRequest { tenant_id: "gone".into(), ..Default::default() };
    assert_eq!(tenants.create_tenant(deleted).await.unwrap_err().code(), tonic::Code::AlreadyExists);
    let policy = GetSafetyPolicyRequest { name: "tenants/acme/safetyPolicy".into() };
    let policy = server.safety(ACME).await.get_safety_policy(policy).await.unwrap().into_inner();
    assert_eq!(policy.blocked_phrases, ["ACME secret", "\u{fc}ber"]);
    let parent = "tenants/acme".to_owned();
    let request = ListAdaptersRequest { parent: parent.clone(), ..Default::default() };
    let refused = server.adapters(REVOKED).await.list_adapters(request.clone()).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated);
    let adapters = server.adapters(ACME).await.list_adapters(request).await.unwrap().into_inner().adapters;
    let live: Vec<_> = adapters.iter().map(|a| a.live_version.rsplit_once('/').unwrap().1).collect();
    assert_eq!((live, adapters.len()), (vec!["1", "1"], 2));
    let request = ListAdapterVersionsRequest { parent: "tenants/acme/adapters/tone".into(), ..Default::default() };
    let versions = server.adapters(ACME).await.list_adapter_versions(request).await.unwrap().into_inner().versions;
    assert_eq!(versions.len(), 2);
    assert!(versions.iter().all(|v| v.parity.as_ref().unwrap().mean_abs_effect > 0.0 && !v.metrics.is_empty()));
    let request = ListDatasetsRequest { parent, ..Default::default() };
    let datasets = server.datasets(ACME).await.list_datasets(request).await.unwrap().into_inner().datasets;
    let kinds: Vec<_> = datasets.iter().map(|d| (d.kind(), d.records)).collect();
    assert_eq!(kinds, [(DatasetKind::Sft, 4), (DatasetKind::Preferences, 4)]);
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_jobs_of_the_build_before_keep_their_recipe_and_run() {
    let server = start(folder("").await).await;
    // Newest first; what the dead process was running has ended, and what waits runs.
    let listed = jobs(&server).await;
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

    let events = watch(&server, &listed[7].name).await;
    let sequences: Vec<_> = events.iter().map(|e| e.sequence).collect();
    assert_eq!(sequences, (1..=11).collect::<Vec<_>>());
    let waited = watch(&server, &listed[0].name).await;
    let Some(training_event::Event::State(end)) = &waited.last().unwrap().event else { panic!("{waited:?}") };
    assert_eq!((end.state(), end.adapter_version.as_str()), (Succeeded, "tenants/acme/adapters/tone/versions/3"));

    let prompt = generate("tenants/acme/adapters/brought", "a", 8);
    let answered = answer(&mut server.generation(ACME).await, prompt).await.unwrap();
    assert_eq!((answered.version.as_str(), answered.ids), ("tenants/acme/adapters/brought/versions/1", vec![62; 8]));
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_cannot_be_read_stop_neither_the_start_nor_the_rest() {
    let data = folder(
        "UPDATE jobs SET spec = '{\"v\":99}' WHERE job IN ('f008e332ac2b671c', '77c7cc6a82d41c7c');
         UPDATE jobs SET spec = 'damaged' WHERE job = '9addc04bb5c9a459';
         UPDATE jobs SET spec = json_set(spec, '$.later', 1, '$.hyperparameters.later', json('[1]')) WHERE job = 'd4f92dc942a41ee6';
         UPDATE versions SET parity = '{}' WHERE adapter = 'tone' AND version = 2;
         UPDATE job_events SET event = '{\"Later\":{}}' WHERE job = 'd4f92dc942a41ee6' AND sequence = 3;",
    )
    .await;
    let server = start(data).await;
    let listed = jobs(&server).await;
    assert_eq!(listed.len(), 5, "{listed:?}");
    let sft = listed.last().unwrap();
    assert_eq!(sft.spec.as_ref().unwrap().hyperparameters.as_ref().unwrap().max_length, Some(64));
    let events = watch(&server, &sft.name).await;
    assert_eq!(events.len(), 11);
    assert!(matches!(&events[2].event, Some(training_event::Event::Message(_))), "{:?}", events[2]);

    let name = "tenants/acme/trainingJobs/9addc04bb5c9a459".to_owned();
    let mut training = server.training(ACME).await;
    let refused = training.get_training_job(GetTrainingJobRequest { name: name.clone() }).await.unwrap_err();
    assert_eq!(reason(&refused), "JOB_UNREADABLE");
    let request = ListAdapterVersionsRequest { parent: "tenants/acme/adapters/tone".into(), ..Default::default() };
    let versions = server.adapters(ACME).await.list_adapter_versions(request).await.unwrap().into_inner().versions;
    assert_eq!(versions.iter().map(|v| v.name.as_str()).collect::<Vec<_>>(), ["tenants/acme/adapters/tone/versions/1"]);

    // The one that was queued and cannot be read does not hold up one that can.
    let again = TrainRequest { request_id: "after".into(), ..sft.spec.clone().unwrap() };
    let job = training.train(again).await.unwrap().into_inner().name;
    let events = watch(&server, &job).await;
    let Some(training_event::Event::State(end)) = &events.last().unwrap().event else { panic!("{events:?}") };
    assert_eq!(end.state(), JobState::Succeeded);
    server.stopped().await;
}
