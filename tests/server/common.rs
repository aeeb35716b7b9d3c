//! A server to test against, its clients, and adapters for the tiny model.

use std::net::SocketAddr;
use std::sync::Arc;

use futures::StreamExt as _;
use tempfile::TempDir;
use tenora::adapter::Adapter;
use tenora::api::Parts;
use tenora::api::proto::adapter_service_client::AdapterServiceClient;
use tenora::api::proto::base_service_client::BaseServiceClient;
use tenora::api::proto::dataset_service_client::DatasetServiceClient;
use tenora::api::proto::generation_service_client::GenerationServiceClient;
use tenora::api::proto::safety_service_client::SafetyServiceClient;
use tenora::api::proto::tenant_service_client::TenantServiceClient;
use tenora::api::proto::training_service_client::TrainingServiceClient;
use tenora::api::proto::*;
use tenora::app;
use tenora::config::{Config, Limits};
use tenora::device::DeviceSpec;
use tenora::hub::{CONFIG_FILE, Package, TENSORS_FILE};
use tenora::model::Model;
use tenora::request::LoraSpec;
use tenora::store::Store;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::codegen::InterceptedService;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tonic_types::StatusExt as _;

/// Puts a bearer key on every call; an empty one puts nothing.
#[derive(Clone)]
pub struct Keyed(Option<MetadataValue<Ascii>>);

impl Interceptor for Keyed {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

pub type Transport = InterceptedService<Channel, Keyed>;

pub struct TestServer {
    pub addr: SocketAddr,
    /// The inside, to look at from the test.
    pub parts: Parts,
    pub model: Arc<Model>,
    pub operator: String,
    pub data: TempDir,
    stop: Option<oneshot::Sender<()>>,
    /// Told once it serves.
    ready: Option<oneshot::Receiver<()>>,
    done: JoinHandle<tenora::error::Result<()>>,
}

impl TestServer {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// A server whose configuration differs from the tests' usual one.
    pub async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        Self::start_on(Model::tiny(1), change).await
    }

    /// The same over another base.
    pub async fn start_on(base: app::Base, change: impl FnOnce(&mut Config)) -> Self {
        let mut server = Self::start_after(std::future::ready(Ok(())), base, change).await;
        server.ready().await;
        server
    }

    /// Waits until it serves.
    pub async fn ready(&mut self) {
        if let Some(ready) = self.ready.take() {
            ready.await.expect("the server serves");
        }
    }

    /// A server that still loads its base until `loaded`.
    pub async fn start_after(
        loaded: impl Future<Output = tenora::error::Result<()>> + Send + 'static,
        base: app::Base,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        Self::start_in(TempDir::new().unwrap(), loaded, base, change).await
    }

    /// A server over a data folder that is there already; `operator` is empty where the folder has an operator's key.
    pub async fn start_in(
        data: TempDir,
        loaded: impl Future<Output = tenora::error::Result<()>> + Send + 'static,
        base: app::Base,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let store = Store::open(data.path()).await.unwrap();
        Self::start_over(data, store, loaded, base, change).await
    }

    /// The same over a store that has been opened.
    pub async fn start_over(
        data: TempDir,
        store: Store,
        loaded: impl Future<Output = tenora::error::Result<()>> + Send + 'static,
        base: app::Base,
        change: impl FnOnce(&mut Config),
    ) -> Self {
        let mut config = config(data.path());
        change(&mut config);
        let model = base.0.clone();
        let parts = app::assemble(base, store.clone(), &config).await.unwrap();
        let mut operator = String::new();
        app::bootstrap_operator_key(&store, false, |key| operator = key).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let shutdown = async move { drop(stopped.await) };
        let inside = parts.clone();
        let loaded = async { loaded.await.map(|()| inside) };
        let (serving, ready) = oneshot::channel();
        let tell = || {
            // A test that does not wait has dropped the other end.
            let _ = serving.send(());
        };
        let (loaded, tell, shutdown) = (Box::pin(loaded), Box::new(tell), Box::pin(shutdown));
        let done = tokio::spawn(async move { app::serve(&config, store, loaded, tell, listener, shutdown).await });
        Self { addr, parts, model, operator, data, stop: Some(stop), ready: Some(ready), done }
    }

    /// Begins the drain.
    pub fn begin_stop(&mut self) {
        drop(self.stop.take());
    }

    /// Waits for the end of the drain.
    pub async fn stopped(mut self) {
        self.begin_stop();
        self.ended().await.unwrap();
    }

    /// Waits for the end, whatever brings it.
    pub async fn ended(self) -> tenora::error::Result<()> {
        self.done.await.unwrap()
    }

    /// A connection of its own.
    pub async fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.addr)).unwrap().connect().await.unwrap()
    }

    pub async fn transport(&self, key: &str) -> Transport {
        let value = (!key.is_empty()).then(|| format!("Bearer {key}").parse().unwrap());
        InterceptedService::new(self.channel().await, Keyed(value))
    }

    pub async fn adapters(&self, key: &str) -> AdapterServiceClient<Transport> {
        AdapterServiceClient::new(self.transport(key).await)
    }

    pub async fn base(&self, key: &str) -> BaseServiceClient<Transport> {
        BaseServiceClient::new(self.transport(key).await)
    }

    pub async fn datasets(&self, key: &str) -> DatasetServiceClient<Transport> {
        DatasetServiceClient::new(self.transport(key).await)
    }

    pub async fn generation(&self, key: &str) -> GenerationServiceClient<Transport> {
        GenerationServiceClient::new(self.transport(key).await)
    }

    pub async fn safety(&self, key: &str) -> SafetyServiceClient<Transport> {
        SafetyServiceClient::new(self.transport(key).await)
    }

    pub async fn tenants(&self, key: &str) -> TenantServiceClient<Transport> {
        TenantServiceClient::new(self.transport(key).await)
    }

    pub async fn training(&self, key: &str) -> TrainingServiceClient<Transport> {
        TrainingServiceClient::new(self.transport(key).await)
    }

    /// Makes a tenant and gives a key of it.
    pub async fn tenant(&self, id: &str) -> String {
        let mut tenants = self.tenants(&self.operator).await;
        tenants.create_tenant(CreateTenantRequest { tenant_id: id.into(), ..Default::default() }).await.unwrap();
        let request = CreateApiKeyRequest { parent: format!("tenants/{id}"), ..Default::default() };
        tenants.create_api_key(request).await.unwrap().into_inner().secret
    }

    /// An adapter that does something, a function of the seed.
    pub fn package(&self, seed: u64) -> Package {
        package(self.model.shape(), seed)
    }

    /// Imports an adapter of `tenants/{tenant}`.
    pub async fn import(&self, key: &str, tenant: &str, id: &str, package: &Package) -> Result<AdapterVersion, Status> {
        let files = [(CONFIG_FILE, package.config.as_slice()), (TENSORS_FILE, package.tensors.as_slice())];
        self.import_files(key, tenant, id, &files).await
    }

    pub async fn import_files(
        &self,
        key: &str,
        tenant: &str,
        id: &str,
        files: &[(&str, &[u8])],
    ) -> Result<AdapterVersion, Status> {
        let header =
            ImportAdapterHeader { parent: format!("tenants/{tenant}"), adapter_id: id.into(), ..Default::default() };
        let mut messages = vec![import_adapter_request::Part::Header(header)];
        for (name, bytes) in files {
            messages.extend(bytes.chunks(64 << 10).map(|data| {
                import_adapter_request::Part::Chunk(FileChunk { filename: (*name).into(), data: data.to_vec() })
            }));
        }
        let messages = messages.into_iter().map(|part| ImportAdapterRequest { part: Some(part) });
        let answer = self.adapters(key).await.import_adapter(futures::stream::iter(messages)).await?;
        Ok(answer.into_inner())
    }

    /// Uploads a small dataset for SFT.
    pub async fn upload(&self, key: &str, tenant: &str, id: &str) -> Result<Dataset, Status> {
        let header = UploadHeader { parent: format!("tenants/{tenant}"), dataset_id: id.into(), ..Default::default() };
        let line = "{\"prompt\":\"a\",\"completion\":\"b\"}\n".repeat(4);
        let parts = [upload_dataset_request::Part::Header(header), upload_dataset_request::Part::Data(line.into())];
        let messages = parts.map(|part| UploadDatasetRequest { part: Some(part) });
        Ok(self.datasets(key).await.upload_dataset(futures::stream::iter(messages)).await?.into_inner())
    }

    /// Files below the blobs' folder.
    pub fn blobs(&self) -> Vec<std::path::PathBuf> {
        files_below(&self.data.path().join("blobs"))
    }

    /// A broken upload's file is removed soon after the call has ended, off the runtime's threads.
    pub async fn wait_for_no_blobs(&self) {
        for _ in 0..200 {
            if self.blobs().is_empty() {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        panic!("left behind: {:?}", self.blobs());
    }

    /// Waits until nothing is under way, and holds the engine's books to account.
    pub async fn idle(&self) {
        let mut last = Ok(());
        for _ in 0..200 {
            last = self.parts.guard.check_integrity().await;
            if last.is_ok() && self.parts.hub.stats().leases == 0 {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        panic!("not idle: {last:?}, {:?}", self.parts.hub.stats());
    }
}

/// The tests' usual configuration.
pub fn config(data_dir: &std::path::Path) -> Config {
    Config {
        data_dir: data_dir.to_owned(),
        base: "unused.gguf".into(),
        base_name: None,
        quantize: None,
        strict_base: false,
        allow_full_fine_tuning: true,
        context: None,
        device: DeviceSpec::Cpu,
        threads: 2,
        kv_cache: tenora::config::KvCacheType::F16,
        metrics_listen: None,
        otlp_endpoint: None,
        insecure_no_auth: false,
        rotate_operator_key: false,
        tls: None,
        allow_plaintext: false,
        adopt_orphans: false,
        limits: Limits { kv_cache_bytes: 8 << 20, ..Limits::default() },
    }
}

/// An adapter that does something, a function of the seed.
pub fn package(shape: &tenora::adapter::BaseShape, seed: u64) -> Package {
    let mut lora = Adapter::fresh(&LoraSpec { rank: 4, ..LoraSpec::default() }, shape, seed).unwrap();
    for (i, layer) in lora.pairs_mut().map(|(_, pair)| pair).enumerate() {
        for (j, b) in layer.b.iter_mut().enumerate() {
            let x = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_mul((1000 * i + j + 1) as u64);
            *b = 0.1 * ((x >> 40) as f32 / (1 << 24) as f32 - 0.5);
        }
    }
    Package::from_adapter(&lora, shape).unwrap()
}

fn files_below(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

/// A greedy request for exactly `max_tokens` tokens.
pub fn generate(adapter: &str, prompt: &str, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        adapter: adapter.into(),
        prompt: Some(generate_request::Prompt::Text(prompt.into())),
        stopping: Some(Stopping { max_tokens: Some(max_tokens), ignore_eos: true, ..Default::default() }),
        ..Default::default()
    }
}

/// A whole answer: the version named first, the ids, the last message.
#[derive(Debug, Clone, PartialEq)]
pub struct Answered {
    pub version: String,
    pub ids: Vec<u32>,
    pub reason: FinishReason,
    pub usage: Usage,
}

pub async fn answer(
    client: &mut GenerationServiceClient<Transport>,
    request: GenerateRequest,
) -> Result<Answered, Status> {
    let mut messages = client.generate(request).await?.into_inner();
    let first = messages.next().await.expect("a first message")?;
    let mut ids = first.token_ids;
    while let Some(message) = messages.next().await {
        let message = message?;
        ids.extend(&message.token_ids);
        if let Some(usage) = message.usage {
            let reason = FinishReason::try_from(message.finish_reason).unwrap();
            return Ok(Answered { version: first.adapter_version, ids, reason, usage });
        }
    }
    panic!("the stream ended without usage");
}

/// The stable reason of an error; panics where the details are not as promised.
pub fn reason(status: &Status) -> String {
    let details = status.get_error_details();
    let info = details.error_info().unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!(info.domain, "tenora");
    info.reason.clone()
}
