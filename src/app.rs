//! The composition root: puts a server together and runs it until told to stop.
//!
//! What the program and the tests call here gives a boxed future: the code of a plain one is compiled in every crate that awaits it, and this one
//! holds the whole server.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

use crate::adapter::{Adapter, Initialisation, PackedAdapter, RowNorms};
use crate::api::{self, auth::OPERATOR_TENANT};
use crate::config::{Config, Limits};
use crate::device::{self, Compute};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::hub::{Hub, PublishGate};
use crate::ids::TenantId;
use crate::memory::Memory;
use crate::model::parity::Parity;
use crate::model::{LoadOptions, Model};
use crate::request::ParityReport;
use crate::safety::Guard;
use crate::store::{self, NewKey, Store};
use crate::sync::lock;
use crate::telemetry::{self, Serving, traces};
use crate::text::Text;
use crate::train::{Trainer, TrainingContext};
use crate::work::blocking;

/// Time that the last spans have to reach their collector.
const FLUSH: Duration = Duration::from_secs(2);

/// How often figures are read that do not report themselves.
const OBSERVE_INTERVAL: Duration = Duration::from_secs(5);

/// The base and its tokenizer.
pub type Base = (Arc<Model>, Arc<Text>);

/// What a server that starts has to say.
#[derive(Debug)]
pub enum Announcement {
    /// The first start has made it. Show it: nobody can read it again.
    OperatorKey(String),
    /// The base is being read.
    Loading {
        /// Bytes that have been read.
        done: u64,
        /// Bytes that there are.
        total: u64,
    },
    /// Nothing that could fail at the start is left to do.
    Serving,
}

/// Loads the base and serves it until `shutdown`, then drains. Health and errors are answered while it loads.
pub fn run(
    config: Config,
    listener: TcpListener,
    announce: Box<dyn FnMut(Announcement) + Send>,
    shutdown: BoxFuture<'static, ()>,
) -> BoxFuture<'static, Result<()>> {
    Box::pin(load_and_serve(config, listener, announce, shutdown))
}

async fn load_and_serve(
    config: Config,
    listener: TcpListener,
    announce: Box<dyn FnMut(Announcement) + Send>,
    shutdown: BoxFuture<'static, ()>,
) -> Result<()> {
    check_listener(&config, listener.local_addr().map_err(Error::internal)?)?;
    let device = config.device.open()?;
    let location = device.location();
    let store = Store::open_with(&config.data_dir, store_options(&config)).await?;
    // Shared with the thread that reads the base.
    let announce = Arc::new(Mutex::new(announce));
    let say = |what| lock(&announce)(what);
    let show = |key| say(Announcement::OperatorKey(key));
    bootstrap_operator_key(&store, config.rotate_operator_key, show).await?;
    let path = config.base.clone();
    let loading = announce.clone();
    let parts = async {
        let (context, quantize) = (config.context, config.quantize.clone());
        let mut progress = move |done, total| lock(&loading)(Announcement::Loading { done, total });
        let load = move || {
            let options = LoadOptions { context, quantize: quantize.as_deref() };
            Model::load_watched(&path, &device, options, &mut progress)
        };
        let base = blocking(load).await?;
        assemble(base, store.clone(), &config).await
    };
    let ready = || {
        tracing::info!(base = %config.base.display(), ?location, "serving");
        say(Announcement::Serving);
    };
    serve(&config, store.clone(), Box::pin(parts), Box::new(ready), listener, shutdown).await
}

/// Puts the parts of a server together; nothing listens yet.
pub fn assemble(base: Base, store: Store, config: &Config) -> BoxFuture<'_, Result<api::Parts>> {
    Box::pin(parts_of(base, store, config))
}

async fn parts_of((model, text): Base, store: Store, config: &Config) -> Result<api::Parts> {
    device::init_pool(config.threads);
    let limits = config.limits.clone();
    make_operator_tenant(&store).await?;
    let compute = Compute::new(model.serves_on_cpu(), limits.train_share_percent as f64 / 100.0);
    let gate = Arc::new(ParityGate(Parity::new(model.clone(), &text, compute.clone())?));
    let mut shape = model.shape().clone();
    shape.names.strict = config.strict_base;
    if let Some(name) = &config.base_name {
        name.clone_into(&mut shape.name);
        shape.names.names.insert(0, name.clone());
    }
    let hub = Hub::new(store.clone(), shape, text.template_digest(), gate, &limits);
    let memory = Memory::new(limits.max_request_memory_bytes);
    let engine = Engine::start(
        model.clone(),
        text.clone(),
        hub.clone(),
        compute.serving,
        memory.clone(),
        config.kv_cache,
        &limits,
    )?;
    let guard = Guard::new(engine, store.clone(), &limits);
    let context_length = model.context_length();
    let (base_name, base_digest) = (model.shape().name.clone(), model.shape().digest);
    let architecture = model.config().architecture;
    let trainer = Trainer::start(TrainingContext {
        store: store.clone(),
        hub: hub.clone(),
        model,
        text: text.clone(),
        memory: memory.clone(),
        arbiter: compute.training,
        base: config.base.clone(),
        allow_full_fine_tuning: config.allow_full_fine_tuning,
        limits: limits.clone(),
    })
    .await?;
    let places = api::WorkPlaces::new(&limits);
    Ok(api::Parts {
        store,
        hub,
        guard,
        trainer,
        text,
        memory,
        places,
        base_name,
        base_digest,
        architecture,
        context_length,
        limits,
    })
}

/// Serves parts, once they are there, until `shutdown`, then drains.
pub fn serve<'a>(
    config: &'a Config,
    store: Store,
    parts: BoxFuture<'a, Result<api::Parts>>,
    ready: Box<dyn FnOnce() + Send + 'a>,
    listener: TcpListener,
    shutdown: BoxFuture<'a, ()>,
) -> BoxFuture<'a, Result<()>> {
    Box::pin(serve_and_close(config, store, parts, ready, listener, shutdown))
}

async fn serve_and_close(
    config: &Config,
    store: Store,
    parts: BoxFuture<'_, Result<api::Parts>>,
    ready: Box<dyn FnOnce() + Send + '_>,
    listener: TcpListener,
    shutdown: BoxFuture<'_, ()>,
) -> Result<()> {
    check_listener(config, listener.local_addr().map_err(Error::internal)?)?;
    if let Some(endpoint) = &config.otlp_endpoint {
        traces::start(endpoint)?;
    }
    let serving = Serving::default();
    let metrics = config.metrics_listen.map(|addr| telemetry::serve_metrics(addr, serving.clone())).transpose()?;
    let mut _observer = None;
    let parts = async {
        let parts = parts.await?;
        _observer = metrics.is_some().then(|| observe(parts.clone()));
        Ok(parts)
    };
    let served = api::serve(config, store.clone(), parts, ready, &serving, listener, shutdown).await;
    traces::flush(FLUSH).await;
    // Counted, and perhaps not written yet.
    let flushed = store.flush_usage().await;
    store.close().await;
    served.and(flushed)
}

/// How the data folder is to be opened.
fn store_options(config: &Config) -> store::Options {
    let days = |days: u64| Duration::from_secs(days * 86_400);
    let kept = |limit: u64| (limit > 0).then(|| days(limit));
    let Limits { trash_days, job_days, request_id_days, .. } = config.limits;
    let retention = store::Retention { jobs: kept(job_days), request_ids: kept(request_id_days) };
    store::Options {
        adopt_orphans: config.adopt_orphans,
        trash: days(trash_days),
        retention,
        ..store::Options::default()
    }
}

/// The model's parity, as the hub asks for it.
struct ParityGate(Parity);

impl PublishGate for ParityGate {
    fn check(&self, packed: &Arc<PackedAdapter>, adapter: &Arc<Adapter>, probes: &[Vec<u32>]) -> Result<ParityReport> {
        self.0.measure(packed, adapter, probes)
    }

    fn plain_form(&self, adapter: &Adapter, initialisation: Initialisation) -> Result<Option<Adapter>> {
        self.0.plain_form(adapter, initialisation)
    }

    fn row_norms(&self, adapter: &Adapter) -> Result<RowNorms> {
        Ok(self.0.row_norms(adapter))
    }
}

/// Makes an operator key where there is none, or a new one in place of all others; shows it, then keeps its hash, so that a process that
/// dies in between leaves no key that nobody has seen.
pub async fn bootstrap_operator_key(store: &Store, rotate: bool, show: impl FnOnce(String)) -> Result<()> {
    if !rotate && store.has_operator_key().await? {
        return Ok(());
    }
    let key = NewKey::new();
    show(key.secret.clone());
    store.revoke_operator_keys().await?;
    store.insert_operator_key(&key, if rotate { "rotated operator key" } else { "first operator key" }).await?;
    tracing::info!(key = %key.id, rotate, "operator key created");
    Ok(())
}

/// The tenant that operators' calls of the base are made for.
async fn make_operator_tenant(store: &Store) -> Result<()> {
    let id = TenantId::new(OPERATOR_TENANT)?;
    match store.create_tenant(&id, "Operators' own calls", 1, "").await {
        Ok(_) | Err(Error::AlreadyExists { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Reads the figures of the hub, the memory and the work of requests until the handle is dropped; all others report for themselves.
fn observe(parts: api::Parts) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            parts.hub.stats().show();
            metrics::gauge!("tenora_request_memory_bytes").set(parts.memory.used() as f64);
            metrics::gauge!("tenora_uploads_under_way").set(parts.places.uploads.held() as f64);
            metrics::gauge!("tenora_reads_under_way").set(parts.places.reads.held() as f64);
            tokio::time::sleep(OBSERVE_INTERVAL).await;
        }
    }))
}

/// Refuses what would let strangers in or show keys on the network.
fn check_listener(config: &Config, addr: SocketAddr) -> Result<()> {
    let refuse = |message: &str| Err(Error::precondition("INSECURE_LISTENER", addr, message));
    if addr.ip().is_loopback() {
        Ok(())
    } else if config.insecure_no_auth {
        refuse(
            "--insecure-no-auth makes everyone the operator and is accepted on a loopback address only; leave it out or listen on 127.0.0.1",
        )
    } else if config.tls.is_none() && !config.allow_plaintext {
        refuse(
            "keys would travel in plain text; give --tls-cert and --tls-key, or --allow-plaintext where something in front ends TLS",
        )
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{KvCacheType, TlsFiles};
    use crate::device::DeviceSpec;

    fn config() -> Config {
        Config {
            data_dir: "data".into(),
            base: "base.gguf".into(),
            base_name: None,
            quantize: None,
            strict_base: false,
            context: None,
            device: DeviceSpec::Cpu,
            threads: 1,
            kv_cache: KvCacheType::default(),
            metrics_listen: None,
            otlp_endpoint: None,
            insecure_no_auth: false,
            rotate_operator_key: false,
            tls: None,
            allow_plaintext: false,
            adopt_orphans: false,
            allow_full_fine_tuning: false,
            limits: Limits::default(),
        }
    }

    #[test]
    fn only_safe_listeners_are_accepted() {
        let text = |config: &Config, addr: &str| match check_listener(config, addr.parse().unwrap()) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        };
        let tls = Some(TlsFiles { cert: "c".into(), key: "k".into() });
        let open = Config { insecure_no_auth: true, ..config() };
        assert_eq!(text(&open, "127.0.0.1:1"), "");
        assert_eq!(text(&open, "[::1]:1"), "");
        assert!(text(&open, "0.0.0.0:1").contains("--insecure-no-auth"));
        assert!(text(&Config { tls: tls.clone(), ..open.clone() }, "10.0.0.1:1").contains("--insecure-no-auth"));
        assert!(text(&config(), "0.0.0.0:1").contains("--allow-plaintext"));
        assert_eq!(text(&config(), "127.0.0.1:1"), "");
        assert_eq!(text(&Config { tls, ..config() }, "0.0.0.0:1"), "");
        assert_eq!(text(&Config { allow_plaintext: true, ..config() }, "0.0.0.0:1"), "");
    }
}
