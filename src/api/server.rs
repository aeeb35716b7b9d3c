//! The tonic server: services, limits, TLS, health, reflection, and the drain.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::adapters::Adapters;
use super::auth::Auth;
use super::datasets::Datasets;
use super::edge::{Calls, Edge};
use super::generation::Generation;
use super::proto::{
    DESCRIPTORS, adapter_service_server as adapter, dataset_service_server as dataset,
    generation_service_server as generation, safety_service_server as safety, tenant_service_server as tenant,
    training_service_server as training,
};
use super::safety::Safety;
use super::tenants::Tenants;
use super::training::Training;
use super::uploads::Uploads;
use crate::config::{Limits, TlsFiles};
use crate::error::{Error, Result};
use crate::hub::Hub;
use crate::safety::Guard;
use crate::store::Store;
use crate::text::Text;
use crate::train::Trainer;

/// The services that health reports on, beside the server as a whole (the empty name).
const SERVICES: [&str; 7] = [
    "",
    adapter::SERVICE_NAME,
    dataset::SERVICE_NAME,
    generation::SERVICE_NAME,
    safety::SERVICE_NAME,
    tenant::SERVICE_NAME,
    training::SERVICE_NAME,
];

/// Time that clients get to close their connections once everything is answered.
const GOODBYE: Duration = Duration::from_millis(500);

/// What the services stand on.
#[derive(Debug, Clone)]
pub struct Parts {
    pub store: Store,
    pub hub: Arc<Hub>,
    pub guard: Guard,
    pub trainer: Trainer,
    pub text: Arc<Text>,
    /// The base's, in tokens.
    pub context_length: usize,
    pub limits: Limits,
}

/// What the handlers share.
pub struct Shared {
    pub store: Store,
    pub hub: Arc<Hub>,
    pub guard: Guard,
    pub trainer: Trainer,
    pub text: Arc<Text>,
    pub context_length: usize,
    pub limits: Limits,
    pub auth: Auth,
    pub calls: Calls,
    pub uploads: Uploads,
}

/// Serves until `shutdown`, then drains: health says NOT_SERVING, new calls get UNAVAILABLE, those under way have
/// `drain_timeout_seconds`. `insecure`: everyone is the operator.
pub async fn serve(
    parts: Parts,
    listener: TcpListener,
    tls: Option<&TlsFiles>,
    insecure: bool,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let limits = parts.limits.clone();
    let (guard, trainer) = (parts.guard.clone(), parts.trainer.clone());
    let auth = Auth::new(parts.store.clone(), insecure);
    let calls = Calls::new(&limits);
    let mut server = configured(&limits);
    if let Some(files) = tls {
        super::choose_tls_library();
        server = server.tls_config(identity(files)?).map_err(|e| bad_tls(files, e))?;
    }
    let (health, health_service) = tonic_health::server::health_reporter();
    let routes = routes(parts, auth.clone(), calls.clone())?.add_service(health_service).prepare();
    let edge = Edge::new(routes, auth, calls.clone());

    let stop = CancellationToken::new();
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let transport = server.serve_with_incoming_shutdown(edge, incoming, stop.clone().cancelled_owned());
    tokio::pin!(transport);
    report(&health, ServingStatus::Serving).await;
    tokio::select! {
        ended = &mut transport => return ended.map_err(Error::internal),
        () = shutdown => {}
    }
    tracing::info!("draining");
    report(&health, ServingStatus::NotServing).await;
    calls.close();
    let drained = async {
        // Answers still running at the end of the time are cut short by the guard, and then only have to be read.
        let time = limits.drain_timeout();
        let finished = tokio::time::timeout(time + GOODBYE, calls.finished());
        let (_, (), ()) = tokio::join!(finished, guard.drain(time), trainer.shutdown());
    };
    tokio::select! {
        _ = &mut transport => {}
        () = drained => {}
    }
    stop.cancel();
    // A client that keeps its connection open, say to watch health, does not keep the server.
    match tokio::time::timeout(GOODBYE, transport).await {
        Ok(ended) => ended.map_err(Error::internal),
        Err(_) => Ok(()),
    }
}

fn configured(limits: &Limits) -> Server {
    let keepalive = Duration::from_secs(limits.keepalive_seconds);
    Server::builder()
        .max_concurrent_streams(u32::try_from(limits.max_streams_per_connection).unwrap_or(u32::MAX))
        .http2_max_header_list_size(16 << 10)
        .http2_keepalive_interval(Some(keepalive))
        .http2_keepalive_timeout(Some(keepalive / 2))
}

fn identity(files: &TlsFiles) -> Result<ServerTlsConfig> {
    let read = |flag: &str, path: &std::path::Path| {
        std::fs::read(path).map_err(|e| Error::invalid(flag, format!("{} cannot be read: {e}", path.display())))
    };
    let identity = Identity::from_pem(read("--tls-cert", &files.cert)?, read("--tls-key", &files.key)?);
    Ok(ServerTlsConfig::new().identity(identity))
}

fn bad_tls(files: &TlsFiles, error: tonic::transport::Error) -> Error {
    use std::error::Error as _;
    let why = error.source().map(|source| source.to_string()).unwrap_or_else(|| error.to_string());
    let (cert, key) = (files.cert.display(), files.key.display());
    Error::invalid("--tls-cert", format!("{cert} and {key} are not a PEM certificate and its private key: {why}"))
}

/// Sets what health says of every service.
async fn report(health: &HealthReporter, status: ServingStatus) {
    for service in SERVICES {
        health.set_service_status(service, status).await;
    }
}

fn routes(parts: Parts, auth: Auth, calls: Calls) -> Result<Routes> {
    let Parts { store, hub, guard, trainer, text, context_length, limits } = parts;
    let size = usize::try_from(limits.max_message_bytes).unwrap_or(usize::MAX);
    let uploads = Uploads::new(&limits);
    let shared = Arc::new(Shared { store, hub, guard, trainer, text, context_length, limits, auth, calls, uploads });
    macro_rules! sized {
        ($service:expr) => {
            $service.max_decoding_message_size(size).max_encoding_message_size(size)
        };
    }
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(Error::internal)?;
    Ok(Routes::new(reflection)
        .add_service(sized!(adapter::AdapterServiceServer::new(Adapters(shared.clone()))))
        .add_service(sized!(dataset::DatasetServiceServer::new(Datasets(shared.clone()))))
        .add_service(sized!(generation::GenerationServiceServer::new(Generation(shared.clone()))))
        .add_service(sized!(safety::SafetyServiceServer::new(Safety(shared.clone()))))
        .add_service(sized!(tenant::TenantServiceServer::new(Tenants(shared.clone()))))
        .add_service(sized!(training::TrainingServiceServer::new(Training(shared)))))
}
