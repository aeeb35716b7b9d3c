//! Every method, dropped at any point: what it has taken is given back.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _};
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tenora::api::proto::*;
use tenora::hub::{CONFIG_FILE, HubStats, TENSORS_FILE};

use super::common::{TestServer, generate};

/// Times that each method is dropped.
const DROPS: u64 = 24;
/// Longest time before a drop; a call of the tiny model takes a few milliseconds.
const LONGEST_MICROS: u64 = 12_000;

/// A server, a tenant's key, and a number of its own for each call.
#[derive(Clone)]
struct Caller {
    server: Arc<TestServer>,
    key: String,
    n: u64,
}

type Call = (&'static str, Box<dyn Fn(Caller) -> BoxFuture<'static, ()> + Send + Sync>);

fn name(kind: &str, id: impl std::fmt::Display) -> String {
    format!("tenants/a/{kind}/{id}")
}

fn imported(caller: &Caller) -> Vec<ImportAdapterRequest> {
    use import_adapter_request::Part;
    let package = caller.server.package(caller.n % 3);
    let adapter_id = format!("y{}", caller.n % 3);
    let header = ImportAdapterHeader { parent: "tenants/a".into(), adapter_id, ..Default::default() };
    let chunk = |filename: &str, data: &[u8]| Part::Chunk(FileChunk { filename: filename.into(), data: data.into() });
    let mut parts = vec![Part::Header(header), chunk(CONFIG_FILE, &package.config)];
    parts.extend(package.tensors.chunks(16 << 10).map(|data| chunk(TENSORS_FILE, data)));
    parts.into_iter().map(|part| ImportAdapterRequest { part: Some(part) }).collect()
}

fn uploaded(n: u64) -> Vec<UploadDatasetRequest> {
    use upload_dataset_request::Part;
    let header = UploadHeader { parent: "tenants/a".into(), dataset_id: format!("u{n}"), ..Default::default() };
    let data = "{\"prompt\":\"a\",\"completion\":\"b\"}\n".repeat(200).into_bytes();
    let parts = [Part::Header(header)].into_iter().chain(data.chunks(1000).map(|data| Part::Data(data.into())));
    parts.map(|part| UploadDatasetRequest { part: Some(part) }).collect()
}

fn preferences(n: u64) -> Vec<UploadPreferencesRequest> {
    use upload_preferences_request::Part;
    let header = UploadHeader { parent: "tenants/a".into(), dataset_id: format!("p{n}"), ..Default::default() };
    let line = "{\"prompt\":\"a\",\"chosen\":\"b\",\"rejected\":\"c\"}\n";
    let parts = [Part::Header(header), Part::Data(line.repeat(50).into()), Part::Data(line.repeat(50).into())];
    parts.into_iter().map(|part| UploadPreferencesRequest { part: Some(part) }).collect()
}

fn train(n: u64, validate_only: bool) -> TrainRequest {
    TrainRequest {
        parent: "tenants/a".into(),
        adapter_id: format!("t{n}"),
        dataset: name("datasets", "d"),
        objective: Some(train_request::Objective::Sft(SftSpec::default())),
        hyperparameters: Some(Hyperparameters { max_steps: Some(1), ..Default::default() }),
        validate_only,
        ..Default::default()
    }
}

/// A call of every method, streams read to their end.
fn calls() -> Vec<Call> {
    let mut calls: Vec<Call> = Vec::new();
    macro_rules! call {
        ($service:ident, $method:ident, $request:expr) => {
            calls.push((
                stringify!($method),
                Box::new(|caller: Caller| {
                    async move {
                        let request = ($request)(&caller);
                        let _ = caller.server.$service(&caller.key).await.$method(request).await;
                    }
                    .boxed()
                }),
            ));
        };
        (stream $service:ident, $method:ident, $request:expr) => {
            calls.push((
                stringify!($method),
                Box::new(|caller: Caller| {
                    async move {
                        let request = ($request)(&caller);
                        if let Ok(answer) = caller.server.$service(&caller.key).await.$method(request).await {
                            let mut messages = answer.into_inner();
                            while let Some(Ok(_)) = messages.next().await {}
                        }
                    }
                    .boxed()
                }),
            ));
        };
        (operator $method:ident, $request:expr) => {
            calls.push((
                stringify!($method),
                Box::new(|caller: Caller| {
                    async move {
                        let request = ($request)(&caller);
                        let _ = caller.server.tenants(&caller.server.operator).await.$method(request).await;
                    }
                    .boxed()
                }),
            ));
        };
    }
    call!(adapters, import_adapter, |c: &Caller| futures::stream::iter(imported(c)));
    call!(stream adapters, export_adapter, |_: &Caller| ExportAdapterRequest { name: name("adapters", "x") });
    call!(adapters, get_adapter, |_: &Caller| GetAdapterRequest { name: name("adapters", "x") });
    call!(adapters, list_adapters, |_: &Caller| ListAdaptersRequest {
        parent: "tenants/a".into(),
        ..Default::default()
    });
    call!(adapters, list_adapter_versions, |_: &Caller| ListAdapterVersionsRequest {
        parent: name("adapters", "x"),
        ..Default::default()
    });
    call!(adapters, set_live_version, |c: &Caller| SetLiveVersionRequest {
        name: name("adapters", "x"),
        version: name("adapters/x/versions", 1 + c.n % 2),
        ..Default::default()
    });
    call!(adapters, delete_adapter, |c: &Caller| DeleteAdapterRequest {
        name: name("adapters", format!("y{}", c.n % 3)),
        ..Default::default()
    });
    call!(tenants, get_tenant, |_: &Caller| GetTenantRequest { name: "tenants/a".into() });
    call!(base, get_base, |_: &Caller| GetBaseRequest::default());
    call!(base, tokenize, |c: &Caller| TokenizeRequest {
        input: Some(tokenize_request::Input::Text("word ".repeat(c.n as usize % 9))),
        ..Default::default()
    });
    call!(base, detokenize, |_: &Caller| DetokenizeRequest { token_ids: vec![65; 9], ..Default::default() });
    call!(datasets, upload_dataset, |c: &Caller| futures::stream::iter(uploaded(c.n)));
    call!(datasets, upload_preferences, |c: &Caller| futures::stream::iter(preferences(c.n)));
    call!(datasets, get_dataset, |_: &Caller| GetDatasetRequest { name: name("datasets", "d") });
    call!(datasets, list_datasets, |_: &Caller| ListDatasetsRequest {
        parent: "tenants/a".into(),
        ..Default::default()
    });
    call!(datasets, inspect_dataset, |_: &Caller| InspectDatasetRequest {
        name: name("datasets", "d"),
        ..Default::default()
    });
    call!(datasets, delete_dataset, |c: &Caller| DeleteDatasetRequest {
        name: name("datasets", format!("u{}", c.n / 2)),
    });
    call!(stream generation, generate, |c: &Caller| {
        let adapter = ["", "tenants/a/adapters/x", "tenants/a/adapters/x/versions/1"][(c.n % 3) as usize];
        let sampling = Sampling { n: Some(1 + (c.n % 3) as u32), temperature: Some(1.0), ..Default::default() };
        GenerateRequest { sampling: Some(sampling), ..generate(adapter, "hello", 1 + (c.n % 50) as u32) }
    });
    call!(base, get_base, |_: &Caller| GetBaseRequest {});
    call!(base, tokenize, |c: &Caller| TokenizeRequest {
        input: Some(tokenize_request::Input::Text("some text".repeat(1 + (c.n as usize % 3) * 4000))),
        ..Default::default()
    });
    call!(base, detokenize, |_: &Caller| DetokenizeRequest { token_ids: vec![97; 9], ..Default::default() });
    call!(generation, score, |c: &Caller| {
        let input = |_| ScoreInput { sequence: Some(score_input::Sequence::Text("some text".into())) };
        ScoreRequest {
            adapter: name("adapters", "x"),
            inputs: (0..1 + c.n % 8).map(input).collect(),
            ..Default::default()
        }
    });
    call!(safety, get_safety_policy, |_: &Caller| GetSafetyPolicyRequest { name: "tenants/a/safetyPolicy".into() });
    call!(safety, update_safety_policy, |c: &Caller| {
        let policy = SafetyPolicy {
            name: "tenants/a/safetyPolicy".into(),
            blocked_phrases: vec![format!("never {}", c.n)],
            ..Default::default()
        };
        UpdateSafetyPolicyRequest { safety_policy: Some(policy) }
    });
    call!(safety, check_text, |_: &Caller| CheckTextRequest { parent: "tenants/a".into(), text: "some text".into() });
    call!(operator create_tenant, |c: &Caller| CreateTenantRequest { tenant_id: format!("n{}", c.n), ..Default::default() });
    call!(operator update_tenant, |c: &Caller| UpdateTenantRequest {
        tenant: Some(Tenant { name: "tenants/a".into(), weight: 1 + (c.n % 3) as u32, ..Default::default() }),
        update_mask: Some(prost_types::FieldMask { paths: vec!["weight".into()] }),
    });
    call!(operator get_tenant, |_: &Caller| GetTenantRequest { name: "tenants/a".into() });
    call!(operator list_tenants, |_: &Caller| ListTenantsRequest::default());
    call!(operator delete_tenant, |c: &Caller| DeleteTenantRequest { name: format!("tenants/n{}", c.n / 2) });
    call!(operator create_api_key, |_: &Caller| CreateApiKeyRequest { parent: "tenants/a".into(), ..Default::default() });
    call!(operator list_api_keys, |_: &Caller| ListApiKeysRequest { parent: "tenants/a".into(), ..Default::default() });
    call!(operator revoke_api_key, |_: &Caller| RevokeApiKeyRequest { name: name("apiKeys", "none") });
    call!(operator get_usage, |_: &Caller| GetUsageRequest { name: "tenants/a".into() });
    call!(training, train, |c: &Caller| train(c.n, c.n.is_multiple_of(2)));
    call!(training, get_training_job, |_: &Caller| GetTrainingJobRequest { name: name("trainingJobs", "none") });
    call!(training, list_training_jobs, |_: &Caller| ListTrainingJobsRequest {
        parent: "tenants/a".into(),
        ..Default::default()
    });
    let of_jobs = [
        "watch_training_job",
        "cancel_training_job",
        "resume_training_job",
        "export_trained_model",
        "delete_training_job",
    ];
    for (method, cancel) in of_jobs.into_iter().zip(0..) {
        calls.push((method, Box::new(move |caller: Caller| of_a_job(caller, cancel).boxed())));
    }
    calls
}

/// Watches, cancels, resumes, exports or deletes a job of the tenant.
async fn of_a_job(caller: Caller, what: u8) {
    let mut client = caller.server.training(&caller.key).await;
    let list = ListTrainingJobsRequest { parent: "tenants/a".into(), ..Default::default() };
    let jobs = client.list_training_jobs(list).await.map(|jobs| jobs.into_inner().training_jobs).unwrap_or_default();
    let Some(job) = jobs.get(caller.n as usize % jobs.len().max(1)) else { return };
    let name = job.name.clone();
    match what {
        0 => {
            let request = WatchTrainingJobRequest { name, after_sequence: 0 };
            if let Ok(answer) = client.watch_training_job(request).await {
                let mut events = answer.into_inner();
                while let Some(Ok(_)) = events.next().await {}
            }
        }
        1 => drop(client.cancel_training_job(CancelTrainingJobRequest { name }).await),
        2 => drop(client.resume_training_job(ResumeTrainingJobRequest { name }).await),
        3 => drop(client.export_trained_model(ExportTrainedModelRequest { name, ..Default::default() }).await),
        _ => drop(client.delete_training_job(DeleteTrainingJobRequest { name }).await),
    }
}

#[test]
fn every_method_has_a_call() {
    let set = FileDescriptorSet::decode(DESCRIPTORS).unwrap();
    let files = set.file.iter().filter(|file| file.package() == "tenora.v1");
    let methods = files.flat_map(|file| &file.service).flat_map(|service| &service.method);
    let snake = |name: &str| {
        let mut out = String::new();
        for c in name.chars() {
            if c.is_uppercase() && !out.is_empty() {
                out.push('_');
            }
            out.extend(c.to_lowercase());
        }
        out
    };
    let all: BTreeSet<String> = methods.map(|method| snake(method.name())).collect();
    let called: BTreeSet<String> = calls().iter().map(|(method, _)| (*method).to_owned()).collect();
    assert_eq!(called, all);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_dropped_anywhere_gives_back_what_it_has_taken() {
    let server = TestServer::start_with(|config| {
        // Cold loads and evictions all the time.
        config.limits.adapter_host_bytes = 0;
    })
    .await;
    let key = server.tenant("a").await;
    for seed in [1, 2] {
        server.import(&key, "a", "x", &server.package(seed)).await.unwrap();
    }
    server.upload(&key, "a", "d").await.unwrap();
    let server = Arc::new(server);
    let numbers = std::sync::atomic::AtomicU64::new(0);
    let calls = calls();
    futures::stream::iter(&calls)
        .for_each_concurrent(6, |(_, call)| {
            let (server, key, numbers) = (server.clone(), key.clone(), &numbers);
            async move {
                for _ in 0..DROPS {
                    let n = numbers.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    let micros = (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
                    let wait = Duration::from_micros(micros % LONGEST_MICROS);
                    let caller = Caller { server: server.clone(), key: key.clone(), n };
                    // A task of its own, so that a drop is a drop of the whole call.
                    let mut task = tokio::spawn(call(caller));
                    if tokio::time::timeout(wait, &mut task).await.is_err() {
                        task.abort();
                    }
                }
            }
        })
        .await;
    server.idle().await;
    let places = || (server.parts.places.uploads.held(), server.parts.places.reads.held(), server.parts.memory.used());
    for _ in 0..400 {
        if places() == (0, 0, 0) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    assert_eq!(places(), (0, 0, 0), "uploads, reads, and bytes of memory");
    // All is as usable as before.
    let mut client = server.generation(&key).await;
    let answered = super::common::answer(&mut client, generate("tenants/a/adapters/x", "hello", 3)).await.unwrap();
    assert_eq!(answered.ids.len(), 3);
    server.idle().await;
    // With the tenant everything goes that a dropped call may have left in memory.
    let mut tenants = server.tenants(&server.operator).await;
    let mut deleted = tenants.delete_tenant(DeleteTenantRequest { name: "tenants/a".into() }).await;
    for _ in 0..400 {
        if deleted.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
        deleted = tenants.delete_tenant(DeleteTenantRequest { name: "tenants/a".into() }).await;
    }
    deleted.unwrap();
    for _ in 0..400 {
        if server.parts.hub.stats() == HubStats::default() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    assert_eq!(server.parts.hub.stats(), HubStats::default());
    drop(tenants);
    drop(client);
    // Nobody holds a clone any more once the aborted calls are gone.
    let mut server = Some(server);
    for _ in 0..400 {
        match Arc::try_unwrap(server.take().unwrap()) {
            Ok(server) => return server.stopped().await,
            Err(shared) => server = Some(shared),
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("a call goes on");
}
