//! What an operator reads in the log: one line for each act, with the tenant and the names, and no secret.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tenora::api::proto::*;

use super::common::{TestServer, generate};

/// Lines of the whole process; a test looks for those of its own tenant.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Lines {
    fn all(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    /// Whether one line has all of these.
    fn has(&self, parts: &[&str]) -> bool {
        self.all().lines().any(|line| parts.iter().all(|part| line.contains(part)))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_act_leaves_one_line() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone());
    subscriber.with_max_level(tracing_subscriber::filter::LevelFilter::INFO).try_init().expect("the only subscriber");
    let server = TestServer::start().await;
    let key = server.tenant("logged").await;
    let mut tenants = server.tenants(&server.operator).await;
    server.import(&key, "logged", "x", &server.package(1)).await.unwrap();
    server.import(&key, "logged", "x", &server.package(2)).await.unwrap();
    let swap = SetLiveVersionRequest {
        name: "tenants/logged/adapters/x".into(),
        version: "tenants/logged/adapters/x/versions/2".into(),
        ..Default::default()
    };
    server.adapters(&key).await.set_live_version(swap).await.unwrap();
    server.upload(&key, "logged", "d").await.unwrap();
    let train = TrainRequest {
        parent: "tenants/logged".into(),
        adapter_id: "y".into(),
        dataset: "tenants/logged/datasets/d".into(),
        objective: Some(train_request::Objective::Sft(SftSpec {})),
        hyperparameters: Some(Hyperparameters { max_steps: Some(4), ..Default::default() }),
        ..Default::default()
    };
    let job = server.training(&key).await.train(train).await.unwrap().into_inner().name;
    let watch = WatchTrainingJobRequest { name: job.clone(), after_sequence: 0 };
    let mut events = server.training(&key).await.watch_training_job(watch).await.unwrap().into_inner();
    while events.message().await.unwrap().is_some() {}
    let delete = DeleteAdapterRequest { name: "tenants/logged/adapters/x".into(), ..Default::default() };
    server.adapters(&key).await.delete_adapter(delete).await.unwrap();
    let delete = DeleteDatasetRequest { name: "tenants/logged/datasets/d".into() };
    server.datasets(&key).await.delete_dataset(delete).await.unwrap();
    server.generation(&key).await.generate(generate("tenants/logged/adapters/no", "x", 1)).await.unwrap_err();
    // One line a second is written of all strangers' calls in this process, those of other tests included.
    let refused =
        || lines.all().lines().filter(|line| line.contains("call refused") && line.contains("UNAUTHENTICATED")).count();
    let mut strangers = 0;
    let told = async {
        while strangers < 50 || refused() == 0 {
            server.generation("").await.generate(generate("", "x", 1)).await.unwrap_err();
            strangers += 1;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), told).await.expect("one of them leaves a line");
    let listed = tenants.list_api_keys(ListApiKeysRequest { parent: "tenants/logged".into(), ..Default::default() });
    let name = listed.await.unwrap().into_inner().api_keys.remove(0).name;
    tenants.revoke_api_key(RevokeApiKeyRequest { name: name.clone() }).await.unwrap();
    tenants.delete_tenant(DeleteTenantRequest { name: "tenants/logged".into() }).await.unwrap();
    let id = name.rsplit('/').next().unwrap().to_owned();
    server.stopped().await;

    let (operator, job) = ("tenant=tenants/logged", job.as_str());
    for parts in [
        &[operator, "tenant created"][..],
        &[operator, "key created", &id],
        &[operator, "version published", "version=tenants/logged/adapters/x/versions/1", "import", "live=true"],
        &[operator, "version published", "version=tenants/logged/adapters/x/versions/2", "import", "live=false"],
        &[operator, "live version set", "version=tenants/logged/adapters/x/versions/2"],
        &[operator, "dataset uploaded", "dataset=tenants/logged/datasets/d", "records=4"],
        &[operator, "job state", job, "QUEUED"],
        &[operator, "job state", job, "RUNNING"],
        &[operator, "job state", job, "SUCCEEDED", "tenants/logged/adapters/y/versions/1"],
        &[operator, "version published", "version=tenants/logged/adapters/y/versions/1", job],
        &[operator, "adapter deleted", "adapter=tenants/logged/adapters/x", "versions=2"],
        &[operator, "dataset deleted", "dataset=tenants/logged/datasets/d"],
        &["tenants/logged", "call refused", "GenerationService/Generate", "NOT_FOUND", "NotFound"],
        &[operator, "key revoked", &id],
        &[operator, "tenant deleted"],
    ] {
        assert!(lines.has(parts), "{parts:?} is not in one line of\n{}", lines.all());
    }
    assert!(refused() < strangers, "{strangers} strangers have {} lines", refused());
    let secret = key.rsplit('_').next().unwrap();
    assert!(!lines.all().contains(secret), "a key's secret is in the log");
}
