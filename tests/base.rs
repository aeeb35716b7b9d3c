//! The whole server on the default base, over gRPC: batch invariance, and an adapter's way from training through export and import.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test fails by them")]

#[path = "server/common.rs"]
#[expect(dead_code, reason = "the server's own tests use the rest")]
mod common;

use std::sync::OnceLock;
use std::time::Duration;

use common::{TestServer, Transport};
use futures::StreamExt as _;
use tenora::adapter::Adapter;
use tenora::api::proto::generation_service_client::GenerationServiceClient;
use tenora::api::proto::*;
use tenora::app::Base;
use tenora::config::Limits;
use tenora::hub::{CONFIG_FILE, Package, TENSORS_FILE};
use tenora::model::Model;
use tenora::request::LoraSpec as Spec;

fn base() -> Base {
    static BASE: OnceLock<Base> = OnceLock::new();
    let load = || {
        let path = tenora::bases::resolve(tenora::bases::DEFAULT, |_| {}).expect("the default base can be fetched");
        // Where there is a GPU, scripts/gpu-check says so.
        let device = std::env::var("TENORA_TEST_DEVICE").unwrap_or_else(|_| "cpu".into());
        let device = device.parse::<tenora::device::DeviceSpec>().expect("a device").open().expect("the device");
        Model::load(&path, &device, None).expect("the default base loads")
    };
    // On a thread of its own: it blocks, which a thread of the runtime must not.
    BASE.get_or_init(|| std::thread::spawn(load).join().expect("loaded")).clone()
}

async fn serve() -> (TestServer, String) {
    let server = TestServer::start_on(base(), |config| config.limits = Limits::default()).await;
    let key = server.tenant("t").await;
    (server, key)
}

/// An adapter of rank 16 on all linear layers, a function of the seed.
fn random_package(seed: u64) -> Package {
    let (model, _) = base();
    let spec = Spec { rank: 16, alpha: 16.0, ..Spec::default() };
    let mut lora = Adapter::fresh(&spec, model.shape(), seed).expect("an adapter");
    for (i, layer) in lora.pairs_mut().map(|(_, pair)| pair).enumerate() {
        for (j, b) in layer.b.iter_mut().enumerate() {
            *b = (((seed as usize + i) * 7919 + j * 104_729) as f32).sin() * 0.01;
        }
    }
    Package::from_adapter(&lora, model.shape()).expect("files")
}

/// The ids of an answer and the bits of their log-probabilities.
async fn bits(client: &mut GenerationServiceClient<Transport>, request: GenerateRequest) -> Vec<(u32, u32)> {
    let mut messages = client.generate(request).await.expect("a stream").into_inner();
    let mut bits = Vec::new();
    while let Some(message) = messages.next().await {
        bits.extend(message.expect("a message").logprobs.iter().map(|l| (l.token_id, l.logprob.to_bits())));
    }
    bits
}

/// 16 requests at once over the base, the golden adapter and two of rank 16 on all linear layers, greedy and seeded: the same bits as
/// each alone.
#[tokio::test(flavor = "multi_thread")]
async fn sixteen_requests_give_the_bits_of_each_alone() {
    let (server, key) = serve().await;
    let read = |file| std::fs::read(format!("tests/golden/adapters/random/{file}")).expect("a file");
    let golden = Package { config: read(CONFIG_FILE), tensors: read(TENSORS_FILE) };
    server.import(&key, "t", "random", &golden).await.expect("imported");
    for seed in [1, 2] {
        server.import(&key, "t", &format!("r{seed}"), &random_package(seed)).await.expect("imported");
    }
    let adapters = ["", "tenants/t/adapters/random", "tenants/t/adapters/r1", "tenants/t/adapters/r2"];
    let request = |i: usize| {
        let content = format!("Tell me {} things about number {i}.", i % 5 + 2);
        let message = ChatMessage { role: "user".into(), content, ..Default::default() };
        let temperature = if i.is_multiple_of(2) { 0.0 } else { 0.8 };
        GenerateRequest {
            adapter: adapters[i % 4].into(),
            prompt: Some(generate_request::Prompt::Chat(Chat { messages: vec![message] })),
            sampling: Some(Sampling { temperature: Some(temperature), seed: Some(i as u64), ..Default::default() }),
            stopping: Some(Stopping { max_tokens: Some(8 + i as u32 % 3 * 4), ignore_eos: true, ..Default::default() }),
            logprobs: Some(0),
            ..Default::default()
        }
    };
    let client = server.generation(&key).await;
    let together = futures::future::join_all((0..16).map(|i| {
        let mut client = client.clone();
        async move { bits(&mut client, request(i)).await }
    }))
    .await;
    for (i, together) in together.into_iter().enumerate() {
        let alone = bits(&mut client.clone(), request(i)).await;
        assert!(together.len() >= 8, "request {i} was answered");
        assert_eq!(together, alone, "request {i}");
    }
    server.idle().await;
}

async fn scores(server: &TestServer, key: &str, adapter: &str) -> Vec<u32> {
    let text = "The ferry leaves at nine. Bring a warm coat and a ticket.";
    let input = ScoreInput { sequence: Some(score_input::Sequence::Text(text.into())) };
    let request = ScoreRequest { adapter: adapter.into(), inputs: vec![input], top_logprobs: 0, ..Default::default() };
    let answer = server.generation(key).await.score(request).await.expect("scores").into_inner();
    answer.results[0].logprobs.iter().map(|l| l.logprob.to_bits()).collect()
}

/// Trained here, exported, and imported again: PEFT's files, the same digest, the same scores to the bit. What began as a part of the base is
/// a plain adapter of twice the rank.
#[tokio::test(flavor = "multi_thread")]
async fn a_trained_adapter_survives_export_and_import() {
    let (server, key) = serve().await;
    server.upload(&key, "t", "d").await.expect("uploaded");
    for (init, rank) in [(LoraInit::Unspecified, 3), (LoraInit::Pissa, 6)] {
        survives_export_and_import(&server, &key, init, rank).await;
    }
}

async fn survives_export_and_import(server: &TestServer, key: &str, init: LoraInit, rank: u32) {
    let request = TrainRequest {
        parent: "tenants/t".into(),
        adapter_id: "a".into(),
        dataset: "tenants/t/datasets/d".into(),
        objective: Some(train_request::Objective::Sft(SftSpec {})),
        start: Some(train_request::Start::Lora(LoraSpec {
            rank: Some(3),
            target_modules: vec!["q_proj".into(), "down_proj".into()],
            init: init.into(),
            ..Default::default()
        })),
        hyperparameters: Some(Hyperparameters {
            max_steps: Some(3),
            batch_size: Some(2),
            learning_rate: Some(5e-3),
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut training = server.training(key).await;
    let job = training.train(request).await.expect("a job").into_inner();
    let watch = WatchTrainingJobRequest { name: job.name.clone(), after_sequence: 0 };
    let events: Vec<_> = training.watch_training_job(watch).await.expect("events").into_inner().collect().await;
    assert!(events.len() > 3 && events.iter().all(Result::is_ok), "{events:?}");
    let job = training.get_training_job(GetTrainingJobRequest { name: job.name }).await.expect("the job").into_inner();
    assert_eq!(job.state(), JobState::Succeeded, "{}", job.error);

    let mut adapters = server.adapters(key).await;
    let request = ExportAdapterRequest { name: job.adapter_version.clone() };
    let mut parts = adapters.export_adapter(request).await.expect("an export").into_inner();
    let (mut version, mut config, mut tensors) = (None, Vec::new(), Vec::new());
    while let Some(part) = parts.next().await {
        match part.expect("a part").part.expect("a part") {
            export_adapter_response::Part::Version(v) => version = Some(v),
            export_adapter_response::Part::Chunk(chunk) if chunk.filename == CONFIG_FILE => config.extend(chunk.data),
            export_adapter_response::Part::Chunk(chunk) => {
                assert_eq!(chunk.filename, TENSORS_FILE);
                tensors.extend(chunk.data);
            }
        }
    }
    let version = version.expect("the version comes first");
    let settings: serde_json::Value = serde_json::from_slice(&config).expect("JSON");
    assert_eq!((&settings["peft_type"], &settings["r"]), (&"LORA".into(), &rank.into()));
    let names = safetensors::SafeTensors::deserialize(&tensors).expect("safetensors");
    let mut names: Vec<_> = names.names().into_iter().map(String::from).collect();
    names.sort();
    assert_eq!(names.len(), 30 * 2 * 2);
    assert_eq!(names[0], "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight");

    let package = Package { config, tensors };
    let again = server.import(key, "t", "b", &package).await.expect("imported");
    assert_eq!(again.digest, version.digest);
    let trained = scores(server, key, &job.adapter_version).await;
    assert_eq!(trained, scores(server, key, &again.name).await);
    assert_ne!(trained, scores(server, key, "").await, "and they are not the base's");
}

/// A request for one token: its id and the bits of its log-probability.
async fn first_token(client: &mut GenerationServiceClient<Transport>, adapter: &str) -> (u32, u32) {
    let request = GenerateRequest { logprobs: Some(0), ..common::generate(adapter, "Hello", 1) };
    bits(client, request).await[0]
}

/// Where the live version of an adapter is.
async fn tier(server: &TestServer, key: &str, adapter: &str) -> Tier {
    let request = GetAdapterRequest { name: adapter.into() };
    let adapter = server.adapters(key).await.get_adapter(request).await.expect("an adapter").into_inner();
    adapter.residency.expect("a residency").tier()
}

/// There is room for one of two adapters of rank 16 on all layers, and a stream runs beside them: a request for the one that is not there
/// brings it in and the other out, its answer has the same bits each time, and the stream goes on. How long it takes is measured by
/// `scripts/compare --only attach`.
#[tokio::test(flavor = "multi_thread")]
async fn a_cold_adapter_attaches_beside_a_running_stream() {
    let limits = Limits { adapter_cache_bytes: 10 << 20, adapter_host_bytes: 0, ..Limits::default() };
    let server = TestServer::start_on(base(), |config| config.limits = limits).await;
    let key = server.tenant("t").await;
    for seed in [1, 2] {
        server.import(&key, "t", &format!("r{seed}"), &random_package(seed)).await.expect("imported");
    }
    let (sender, mut tokens) = tokio::sync::watch::channel(0usize);
    let mut beside = server
        .generation(&key)
        .await
        .generate(common::generate("", "Once", 8000))
        .await
        .expect("a stream")
        .into_inner();
    let stream = tokio::spawn(async move {
        while let Some(message) = beside.next().await {
            let count = message.expect("a message").token_ids.len();
            sender.send_modify(|tokens| *tokens += count);
        }
    });
    let mut client = server.generation(&key).await;
    let mut answers = [None; 2];
    for i in 0..8 {
        let (at, other) = (i % 2, 1 - i % 2);
        let [adapter, left] = [at, other].map(|at| format!("tenants/t/adapters/r{}", at + 1));
        let answer = first_token(&mut client, &adapter).await;
        assert_eq!(*answers[at].get_or_insert(answer), answer, "load {i} of {adapter} answers as before");
        assert_eq!(first_token(&mut client, &adapter).await, answer, "and so it does once it is there");
        assert_eq!(tier(&server, &key, &adapter).await, Tier::Device);
        assert_eq!(tier(&server, &key, &left).await, Tier::Disk, "{left} had to leave");
        let before = *tokens.borrow_and_update();
        let goes_on = tokens.wait_for(|now| *now > before);
        tokio::time::timeout(Duration::from_secs(60), goes_on).await.expect("in time").expect("the stream goes on");
    }
    assert_ne!(answers[0], answers[1], "the adapters differ");
    stream.abort();
    server.stopped().await;
}
