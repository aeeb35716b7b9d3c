//! `kill -9` of the real program on the real base, in the middle of training, an upload and a publish.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test fails by them")]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use futures::StreamExt as _;
use serde_json::Value;
use tempfile::TempDir;
use tenora::api::client::{Client, Target};
use tenora::api::proto::*;
use tenora::hub::{CONFIG_FILE, TENSORS_FILE};

/// The `lora_alpha` of `kept` and of the import that the first kill cuts; each later one has the next.
const KEPT_ALPHA: u64 = 8;
const CUT_ALPHA: u64 = KEPT_ALPHA + 1;

/// The program, killed when dropped.
struct Server {
    process: Child,
    address: String,
    /// Shown by a first start only.
    operator: Option<String>,
}

impl Server {
    fn start(data: &Path, base: &Path, limit: Option<&str>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tenora"));
        command.args(["serve", "--listen", "127.0.0.1:0", "--threads", "2", "--data-dir"]).arg(data);
        command.args(limit).arg("--base").arg(base).stdout(Stdio::piped()).stderr(Stdio::null());
        let process = command.spawn().expect("the program starts");
        let mut server = Self { process, address: String::new(), operator: None };
        for line in BufReader::new(server.process.stdout.take().expect("its output")).lines() {
            let line = line.expect("a line");
            if let Some(address) = line.strip_prefix("listening on ") {
                server.address = address.to_owned();
                return server;
            }
            let key = line.split_whitespace().find(|word| word.starts_with("tnr_"));
            server.operator = key.map(String::from).or(server.operator.take());
        }
        panic!("the server ended before it listened");
    }

    async fn client(&self, key: &str) -> Client {
        let target = Target { server: self.address.clone(), key: Some(key.to_owned()), tls_ca: None };
        Client::connect(&target).await.expect("a connection")
    }

    /// SIGKILL, and gone.
    fn kill(mut self) {
        self.process.kill().expect("killed");
        self.process.wait().expect("gone");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn base() -> PathBuf {
    // On a thread of its own: it blocks, which a thread of the runtime must not.
    let fetch = || tenora::bases::resolve(tenora::bases::DEFAULT, |_| {}).expect("the default base can be fetched");
    std::thread::spawn(fetch).join().expect("fetched")
}

async fn make_tenant(server: &Server) -> String {
    let operator = server.client(server.operator.as_deref().expect("the first start shows the key")).await;
    operator
        .create_tenant(CreateTenantRequest { tenant_id: "t".into(), ..Default::default() })
        .await
        .expect("a tenant");
    let request = CreateApiKeyRequest { parent: "tenants/t".into(), ..Default::default() };
    operator.create_api_key(request).await.expect("a key").secret
}

fn upload(id: &str) -> Vec<UploadDatasetRequest> {
    let header = UploadHeader { parent: "tenants/t".into(), dataset_id: id.into(), ..Default::default() };
    let line = "{\"prompt\":\"How are you?\",\"completion\":\"Fine, thank you.\"}\n".repeat(8);
    let parts = [upload_dataset_request::Part::Header(header), upload_dataset_request::Part::Data(line.into())];
    parts.map(|part| UploadDatasetRequest { part: Some(part) }).into()
}

/// The golden adapter with another `lora_alpha`, which is another content: its files are no other version's.
fn import(id: &str, alpha: u64) -> Vec<ImportAdapterRequest> {
    let header = ImportAdapterHeader { parent: "tenants/t".into(), adapter_id: id.into(), ..Default::default() };
    let read = |name: &str| std::fs::read(format!("tests/golden/adapters/random/{name}")).expect("a file");
    let mut config: Value = serde_json::from_slice(&read(CONFIG_FILE)).expect("its settings");
    config["lora_alpha"] = alpha.into();
    let file =
        |(name, data): (&str, Vec<u8>)| import_adapter_request::Part::Chunk(FileChunk { filename: name.into(), data });
    let files = [(CONFIG_FILE, config.to_string().into_bytes()), (TENSORS_FILE, read(TENSORS_FILE))].map(file);
    let parts = std::iter::once(import_adapter_request::Part::Header(header)).chain(files);
    parts.map(|part| ImportAdapterRequest { part: Some(part) }).collect()
}

/// A job of many steps.
fn job() -> TrainRequest {
    TrainRequest {
        parent: "tenants/t".into(),
        adapter_id: "trained".into(),
        dataset: "tenants/t/datasets/kept".into(),
        objective: Some(train_request::Objective::Sft(SftSpec {})),
        hyperparameters: Some(Hyperparameters {
            max_steps: Some(10_000),
            batch_size: Some(1),
            gradient_checkpointing: GradientCheckpointing::On.into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The limit that leaves one byte less than the job takes, so that its optimizer's state comes to lie in a file.
async fn too_little_memory(client: &Client) -> String {
    let planned = client.train(TrainRequest { validate_only: true, ..job() }).await.expect("a valid job");
    let plan = planned.memory_plan.expect("its plan");
    assert_eq!(plan.paged_optimizer_bytes, 0);
    format!("--limit=max_training_bytes={}", plan.total_bytes - 1)
}

/// Waits until the job has taken a step after `seen` events.
async fn wait_for_step(client: &Client, job: &str, seen: u64) -> u64 {
    let request = WatchTrainingJobRequest { name: job.into(), after_sequence: seen };
    let mut events = client.watch_training_job(request).await.expect("events");
    while let Some(event) = events.next().await {
        let event = event.expect("an event");
        if matches!(event.event, Some(training_event::Event::Step(_))) {
            return event.sequence;
        }
    }
    panic!("the job ended without a step");
}

async fn state(client: &Client, job: &str) -> JobState {
    client.get_training_job(GetTrainingJobRequest { name: job.into() }).await.expect("the job").state()
}

/// Every version of every adapter answers; gives each adapter's number of versions.
async fn assert_versions_serve(client: &Client) -> BTreeMap<String, usize> {
    let request = ListAdaptersRequest { parent: "tenants/t".into(), ..Default::default() };
    let mut found = BTreeMap::new();
    for adapter in client.list_adapters(request).await.expect("a list").adapters {
        let request = ListAdapterVersionsRequest { parent: adapter.name.clone(), ..Default::default() };
        let versions = client.list_adapter_versions(request).await.expect("a list").versions;
        assert!(!versions.is_empty(), "{} has a version", adapter.name);
        for version in &versions {
            let sequence = Some(score_input::Sequence::Text("All is well.".into()));
            let inputs = vec![ScoreInput { sequence }];
            let request = ScoreRequest { adapter: version.name.clone(), inputs, top_logprobs: 0, ..Default::default() };
            let answer = client.score(request).await.expect("the version serves");
            assert_eq!(answer.adapter_version, version.name);
        }
        found.insert(adapter.name, versions.len());
    }
    found
}

/// The dataset and the adapter that no kill caught are there, every version answers, and the only files are those
/// of what the catalogue lists: three a version, one a dataset.
async fn assert_whole(client: &Client, data: &Path) {
    let request = ListDatasetsRequest { parent: "tenants/t".into(), ..Default::default() };
    let datasets = client.list_datasets(request).await.expect("a list").datasets;
    assert_eq!(datasets.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(), ["tenants/t/datasets/kept"]);
    let adapters = assert_versions_serve(client).await;
    assert_eq!(adapters.get("tenants/t/adapters/kept"), Some(&1));
    let versions: usize = adapters.values().sum();
    let found = files(&data.join("blobs"));
    assert_eq!(found.len(), 3 * versions + datasets.len(), "{adapters:?}: {found:?}");
}

/// Files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.map(|entry| entry.expect("an entry").path());
    paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_comes_back_whole() {
    let (data, base) = (TempDir::new().expect("a folder"), base());
    let server = Server::start(data.path(), &base, None);
    let key = make_tenant(&server).await;
    let client = server.client(&key).await;
    client.upload_dataset(futures::stream::iter(upload("kept"))).await.expect("uploaded");
    client.import_adapter(futures::stream::iter(import("kept", KEPT_ALPHA))).await.expect("imported");
    let limit = too_little_memory(&client).await;
    server.kill();
    let server = Server::start(data.path(), &base, Some(&limit));
    let client = server.client(&key).await;
    assert_whole(&client, data.path()).await;
    let job = client.train(job()).await.expect("a job").name;
    let mut seen = wait_for_step(&client, &job, 0).await;

    // An upload that never ends, and a publish that the kill catches at another point each time.
    let half = futures::stream::iter(upload("half")).chain(futures::stream::pending());
    let uploading = tokio::spawn({
        let client = client.clone();
        async move { client.upload_dataset(half).await }
    });
    let importing = tokio::spawn({
        let client = client.clone();
        async move { client.import_adapter(futures::stream::iter(import("cut-0", CUT_ALPHA))).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    server.kill();
    assert!(uploading.await.expect("the call ends").is_err());
    drop(importing.await);

    for round in 1..4 {
        let server = Server::start(data.path(), &base, Some(&limit));
        assert!(server.operator.is_none(), "the key was made once");
        let client = server.client(&key).await;
        assert_eq!(state(&client, &job).await, JobState::Interrupted);
        assert_whole(&client, data.path()).await;

        let resumed =
            client.resume_training_job(ResumeTrainingJobRequest { name: job.clone() }).await.expect("resumed");
        assert!([JobState::Queued, JobState::Running].contains(&resumed.state()));
        seen = wait_for_step(&client, &job, seen).await;
        let cut = import(&format!("cut-{round}"), CUT_ALPHA + round);
        let importing = tokio::spawn({
            let client = client.clone();
            async move { client.import_adapter(futures::stream::iter(cut)).await }
        });
        tokio::time::sleep(Duration::from_millis(700 * round)).await;
        server.kill();
        drop(importing.await);
    }

    let server = Server::start(data.path(), &base, Some(&limit));
    let client = server.client(&key).await;
    assert_whole(&client, data.path()).await;
    client.resume_training_job(ResumeTrainingJobRequest { name: job.clone() }).await.expect("resumed");
    wait_for_step(&client, &job, seen).await;
    client.cancel_training_job(CancelTrainingJobRequest { name: job.clone() }).await.expect("cancelled");
    let request = WatchTrainingJobRequest { name: job.clone(), after_sequence: 0 };
    let events: Vec<_> = client.watch_training_job(request).await.expect("events").collect().await;
    let events: Vec<TrainingEvent> =
        events.into_iter().collect::<Result<_, _>>().expect("the events of all its lives, in one list");
    let paged = |event: &TrainingEvent| match &event.event {
        Some(training_event::Event::MemoryPlan(plan)) => Some(plan.paged_optimizer_bytes > 0),
        _ => None,
    };
    let plans: Vec<bool> = events.iter().filter_map(paged).collect();
    assert!(plans.len() == 5 && plans.iter().all(|paged| *paged), "every life had the state in a file: {plans:?}");
    assert_eq!(state(&client, &job).await, JobState::Cancelled);
}
