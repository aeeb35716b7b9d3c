//! The tonic server: services, limits, TLS, health, reflection, and the drain.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::codec::CompressionEncoding;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::adapters::Adapters;
use super::auth::Auth;
use super::base::Base;
use super::connections::accept;
use super::datasets::Datasets;
use super::edge::{AdmissionLayer, Calls};
use super::generation::Generation;
use super::health::Health;
use super::methods::services;
use super::proto::{
    DESCRIPTORS, adapter_service_server as adapter, base_service_server as base, dataset_service_server as dataset,
    generation_service_server as generation, safety_service_server as safety, tenant_service_server as tenant,
    training_service_server as training,
};
use super::safety::Safety;
use super::shared::{Parts, Shared};
use super::tenants::Tenants;
use super::tls::Certificate;
use super::training::Training;
use super::uploads::Uploads;
use crate::config::{Config, Limits};
use crate::error::{Error, Result};
use crate::store::Store;
use crate::telemetry::Serving;

/// Bytes that a client may send before they are taken, on one stream and on one connection: all connections together hold no more than a
/// quarter of a gigabyte of data that nobody has asked for. Headers are beside it; how many calls hold some is limited for those without
/// a key that is known (`max_keyless_calls`) and for each tenant (`max_calls_per_tenant`).
const STREAM_WINDOW: u32 = 128 << 10;
const CONNECTION_WINDOW: u32 = 256 << 10;
/// Bytes of a call's headers: a key, a trace and what clients say of themselves take one or two thousand, a proxy's cookies or baggage eight.
const HEADER_BYTES: u32 = 16 << 10;

/// Time that clients get to close their connections once everything is answered.
const CLOSE_GRACE: Duration = Duration::from_millis(500);

/// Answers from the first moment on, and serves once `parts` are there, which it tells `ready`: until then health says NOT_SERVING
/// and calls get UNAVAILABLE. Drains at `shutdown`: health says NOT_SERVING, new calls get UNAVAILABLE, those under way have
/// `drain_timeout_seconds`.
pub async fn serve(
    config: &Config,
    store: Store,
    parts: impl Future<Output = Result<Parts>>,
    ready: impl FnOnce(),
    serving: &Serving,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let auth = Auth::new(store, config.insecure_no_auth, &config.limits);
    let calls = Calls::new(&config.limits);
    let server = configured(&config.limits);
    super::choose_tls_library();
    let tls = config.tls.as_ref().map(Certificate::read).transpose()?.map(Arc::new);
    let (health, health_service) = tonic_health::server::health_reporter();
    report(&health, serving, ServingStatus::NotServing).await;
    let health_service = health_service.accept_compressed(CompressionEncoding::Gzip);
    let health_routes = Health::new(Routes::new(health_service).prepare(), &config.limits);
    let edge = AdmissionLayer::new(health_routes, auth.clone(), calls.clone(), &config.limits);
    let services = edge.services();

    let stop = CancellationToken::new();
    let incoming = accept(listener, tls, &config.limits);
    let transport = server.serve_with_incoming_shutdown(edge, incoming, stop.clone().cancelled_owned());
    tokio::pin!(transport, shutdown);
    let parts = tokio::select! {
        ended = &mut transport => return ended.map_err(Error::internal),
        parts = parts => parts?,
        () = &mut shutdown => return Ok(()),
    };
    let (guard, trainer, memory) = (parts.guard.clone(), parts.trainer.clone(), parts.memory.clone());
    services.open(routes(parts, auth, calls.clone())?, memory);
    report(&health, serving, ServingStatus::Serving).await;
    ready();
    tokio::select! {
        ended = &mut transport => return ended.map_err(Error::internal),
        () = &mut shutdown => {}
    }
    tracing::info!("draining");
    report(&health, serving, ServingStatus::NotServing).await;
    calls.close();
    let drained = async {
        // Answers still running at the end of the time are cut short by the guard, and then only have to be read.
        let time = config.limits.drain_timeout();
        let finished = tokio::time::timeout(time + CLOSE_GRACE, calls.finished());
        let (_, (), ()) = tokio::join!(finished, guard.drain(time), trainer.shutdown());
    };
    tokio::select! {
        ended = &mut transport => return ended.map_err(Error::internal),
        () = drained => {}
    }
    stop.cancel();
    // A client that keeps its connection open, say to watch health, does not keep the server.
    match tokio::time::timeout(CLOSE_GRACE, transport).await {
        Ok(ended) => ended.map_err(Error::internal),
        Err(_) => Ok(()),
    }
}

fn configured(limits: &Limits) -> Server {
    let keepalive = Duration::from_secs(limits.keepalive_seconds);
    Server::builder()
        .max_concurrent_streams(u32::try_from(limits.max_streams_per_connection).unwrap_or(u32::MAX))
        .http2_max_header_list_size(HEADER_BYTES)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keepalive_interval(Some(keepalive))
        .http2_keepalive_timeout(Some(keepalive / 2))
}

/// Sets what health says of every service, here and on the metrics port.
async fn report(health: &HealthReporter, serving: &Serving, status: ServingStatus) {
    serving.set(matches!(status, ServingStatus::Serving));
    // The empty name is the server as a whole.
    for service in services().into_iter().chain([""]) {
        health.set_service_status(service, status).await;
    }
}

/// What the two versions of reflection tell, each of the other too.
fn reflection() -> tonic_reflection::server::Builder<'static> {
    use tonic_reflection::pb::{v1, v1alpha};
    tonic_reflection::server::Builder::configure()
        .include_reflection_service(false)
        .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(v1alpha::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

fn routes(parts: Parts, auth: Auth, calls: Calls) -> Result<Routes> {
    let size = usize::try_from(parts.limits.max_message_bytes).unwrap_or(usize::MAX);
    let (uploads, reads) = (Uploads::new(parts.places.uploads.clone(), &parts.limits), parts.places.reads.clone());
    let shared = Arc::new(Shared { parts, auth, calls, uploads, reads });
    macro_rules! sized {
        ($service:expr) => {
            // What a message unpacks to is held to the same size.
            $service
                .accept_compressed(CompressionEncoding::Gzip)
                .send_compressed(CompressionEncoding::Gzip)
                .max_decoding_message_size(size)
                .max_encoding_message_size(size)
        };
    }
    let (v1, v1alpha) = (reflection().build_v1(), reflection().build_v1alpha());
    let gzip = CompressionEncoding::Gzip;
    Ok(Routes::new(v1.map_err(Error::internal)?.accept_compressed(gzip))
        .add_service(v1alpha.map_err(Error::internal)?.accept_compressed(gzip))
        .add_service(sized!(adapter::AdapterServiceServer::new(Adapters(shared.clone()))))
        .add_service(sized!(base::BaseServiceServer::new(Base(shared.clone()))))
        .add_service(sized!(dataset::DatasetServiceServer::new(Datasets(shared.clone()))))
        .add_service(sized!(generation::GenerationServiceServer::new(Generation(shared.clone()))))
        .add_service(sized!(safety::SafetyServiceServer::new(Safety(shared.clone()))))
        .add_service(sized!(tenant::TenantServiceServer::new(Tenants(shared.clone()))))
        .add_service(sized!(training::TrainingServiceServer::new(Training(shared))))
        .prepare())
}
