//! The whole server on the default base, over gRPC: batch invariance, and an adapter's way from training through export and import.

#[path = "server/common.rs"]
#[expect(dead_code, reason = "the server's own tests use the rest")]
mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use common::{TestServer, Transport};
use futures::StreamExt as _;
use tenora::adapter::Lora;
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
        Model::load(&path, &device).expect("the default base loads")
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
    let mut lora = Lora::fresh(&spec, model.shape(), seed).expect("an adapter");
    for (i, layer) in lora.layers.values_mut().enumerate() {
        for (j, b) in layer.b.iter_mut().enumerate() {
            *b = (((seed as usize + i) * 7919 + j * 104_729) as f32).sin() * 0.01;
        }
    }
    Package::from_lora(&lora, model.shape()).expect("files")
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
        let message =
            ChatMessage { role: "user".into(), content: format!("Tell me {} things about number {i}.", i % 5 + 2) };
        let temperature = if i.is_multiple_of(2) { 0.0 } else { 0.8 };
        GenerateRequest {
            adapter: adapters[i % 4].into(),
            prompt: Some(generate_request::Prompt::Chat(Chat { messages: vec![message] })),
            sampling: Some(Sampling { temperature: Some(temperature), seed: Some(i as u64), ..Default::default() }),
            stopping: Some(Stopping { max_tokens: Some(8 + i as u32 % 3 * 4), ignore_eos: true, ..Default::default() }),
            logprobs: Some(0),
            priority: None,
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

/// Trained here, exported, and imported again: PEFT's files, the same digest, the same scores to the bit.
#[tokio::test(flavor = "multi_thread")]
async fn a_trained_adapter_survives_export_and_import() {
    let (server, key) = serve().await;
    server.upload(&key, "t", "d").await.expect("uploaded");
    let request = TrainRequest {
        parent: "tenants/t".into(),
        adapter_id: "a".into(),
        dataset: "tenants/t/datasets/d".into(),
        objective: Some(train_request::Objective::Sft(SftSpec {})),
        start: Some(train_request::Start::Lora(LoraSpec {
            rank: Some(3),
            target_modules: vec!["q_proj".into(), "down_proj".into()],
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
    let mut training = server.training(&key).await;
    let job = training.train(request).await.expect("a job").into_inner();
    let watch = WatchTrainingJobRequest { name: job.name.clone(), after_sequence: 0 };
    let events: Vec<_> = training.watch_training_job(watch).await.expect("events").into_inner().collect().await;
    assert!(events.len() > 3 && events.iter().all(Result::is_ok), "{events:?}");
    let job = training.get_training_job(GetTrainingJobRequest { name: job.name }).await.expect("the job").into_inner();
    assert_eq!(job.state(), JobState::Succeeded, "{}", job.error);

    let mut adapters = server.adapters(&key).await;
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
    assert_eq!((&settings["peft_type"], &settings["r"]), (&"LORA".into(), &3.into()));
    let names = safetensors::SafeTensors::deserialize(&tensors).expect("safetensors");
    let mut names: Vec<_> = names.names().into_iter().map(String::from).collect();
    names.sort();
    assert_eq!(names.len(), 30 * 2 * 2);
    assert_eq!(names[0], "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight");

    let package = Package { config, tensors };
    let again = server.import(&key, "t", "b", &package).await.expect("imported");
    assert_eq!(again.digest, version.digest);
    let trained = scores(&server, &key, &job.adapter_version).await;
    assert_eq!(trained, scores(&server, &key, &again.name).await);
    assert_ne!(trained, scores(&server, &key, "").await, "and they are not the base's");
}

/// Requests for a warm adapter and for a cold one, in turn.
const ATTACHES: usize = 40;

/// The time that a share of them is below, in milliseconds.
fn quantile(times: &mut [Duration], share: f64) -> f64 {
    times.sort();
    times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3
}

/// A request for one token: the time to it.
async fn first_token(client: &mut GenerationServiceClient<Transport>, adapter: &str) -> Duration {
    let begun = Instant::now();
    let mut messages = client.generate(common::generate(adapter, "Hello", 1)).await.expect("a stream").into_inner();
    while messages.next().await.expect("a token").expect("a message").token_ids.is_empty() {}
    let took = begun.elapsed();
    while messages.next().await.is_some() {}
    took
}

/// There is room for one of two adapters of rank 16 on all layers. While another stream keeps the cores busy, requests take up the one that is there
/// or the one that is not.
#[tokio::test(flavor = "multi_thread")]
async fn a_cold_adapter_attaches_in_its_time() {
    let limits = Limits { adapter_cache_bytes: 10 << 20, adapter_host_bytes: 0, ..Limits::default() };
    let server = TestServer::start_on(base(), |config| config.limits = limits).await;
    let key = server.tenant("t").await;
    for seed in [1, 2] {
        server.import(&key, "t", &format!("r{seed}"), &random_package(seed)).await.expect("imported");
    }
    let done = Arc::new(AtomicBool::new(false));
    let stream = tokio::spawn({
        let (mut client, request) = (server.generation(&key).await, common::generate("", "Once", 8000));
        let done = done.clone();
        async move {
            let mut messages = client.generate(request).await.expect("a stream").into_inner();
            let mut tokens = vec![Instant::now()];
            while !done.load(Ordering::Relaxed)
                && let Some(message) = messages.next().await
            {
                tokens.extend((!message.expect("a message").token_ids.is_empty()).then(Instant::now));
            }
            tokens
        }
    });
    let mut client = server.generation(&key).await;
    let (mut spans, mut adapter) = (Vec::new(), 1);
    for i in 0..2 * ATTACHES {
        let cold = i % 2 == 1;
        adapter = if cold { 3 - adapter } else { adapter };
        let begun = Instant::now();
        let took = first_token(&mut client, &format!("tenants/t/adapters/r{adapter}")).await;
        spans.push((cold, took, begun..Instant::now()));
    }
    done.store(true, Ordering::Relaxed);
    let tokens = stream.await.expect("the stream ends");
    let [mut warm, mut cold] = [false, true].map(|kind| {
        let of_kind = spans.iter().filter(|(cold, ..)| *cold == kind);
        let first: Vec<Duration> = of_kind.clone().map(|(_, took, _)| *took).collect();
        let during =
            |pair: &&[Instant]| of_kind.clone().any(|(_, _, span)| span.start <= pair[1] && pair[0] <= span.end);
        let gaps: Vec<Duration> = tokens.windows(2).filter(during).map(|pair| pair[1] - pair[0]).collect();
        (first, gaps)
    });
    for (name, (first, gaps)) in [("warm", &mut warm), ("cold", &mut cold)] {
        let [p50, p99] = [0.5, 0.99].map(|share| quantile(first, share));
        print!("{name}: first token p50 {p50:.1} ms, p99 {p99:.1} ms");
        let [p50, p99] = [0.5, 0.99].map(|share| quantile(gaps, share));
        println!("; the other stream's tokens p50 {p50:.1} ms, p99 {p99:.1} ms of {}", gaps.len());
    }
    let added = quantile(&mut cold.0, 0.5) - quantile(&mut warm.0, 0.5);
    println!("a load adds {added:.1} ms");
    server.stopped().await;
}
