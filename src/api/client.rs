//! A thin typed client: one method a call, bearer key, TLS, and errors a person can act on. No caller needs to know tonic.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use tokio_stream::{Stream, StreamExt as _};
use tonic::codegen::InterceptedService;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::{ErrorDetails, StatusExt as _};

pub use super::proto;
pub use prost_types::FieldMask;
use proto::adapter_service_client::AdapterServiceClient;
use proto::base_service_client::BaseServiceClient;
use proto::dataset_service_client::DatasetServiceClient;
use proto::generation_service_client::GenerationServiceClient;
use proto::safety_service_client::SafetyServiceClient;
use proto::tenant_service_client::TenantServiceClient;
use proto::training_service_client::TrainingServiceClient;

/// What a call gives.
pub type Result<T, E = ClientError> = std::result::Result<T, E>;

/// What a server streams: an error ends it.
pub type Answers<T> = Pin<Box<dyn Stream<Item = Result<T>> + Send>>;

/// Largest answer that is taken. Bytes.
const MAX_ANSWER_BYTES: usize = 64 << 20;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a call failed: what, which field, what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientError {
    /// gRPC's word for it, e.g. `INVALID_ARGUMENT`.
    pub code: &'static str,
    /// The server's stable reason, e.g. `UNKNOWN_TARGET`; empty where it gave none.
    pub reason: String,
    /// What the server says, or why it could not be reached.
    pub message: String,
    /// What the error's details add to the message, a line each.
    pub details: Vec<String>,
}

impl ClientError {
    fn local(message: impl Into<String>) -> Self {
        Self { code: "UNAVAILABLE", reason: String::new(), message: message.into(), details: Vec::new() }
    }

    /// The named thing does not exist.
    pub fn is_not_found(&self) -> bool {
        self.code == "NOT_FOUND"
    }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}", self.message, self.code)?;
        if !self.reason.is_empty() && self.reason != self.code {
            write!(f, ", {}", self.reason)?;
        }
        write!(f, ")")?;
        self.details.iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}

impl std::error::Error for ClientError {}

impl From<Status> for ClientError {
    fn from(status: Status) -> Self {
        let details = status.get_error_details();
        let mut lines = lines_of(&details);
        // The message often says it already.
        lines.retain(|line| !status.message().contains(line.as_str()));
        lines.extend(advice(&status).map(str::to_owned));
        let reason = details.error_info().map(|info| info.reason.clone()).unwrap_or_default();
        Self { code: name_of(status.code()), reason, message: status.message().to_owned(), details: lines }
    }
}

/// One line for each thing that the standard details name.
fn lines_of(details: &ErrorDetails) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(bad) = details.bad_request() {
        lines.extend(bad.field_violations.iter().map(|v| format!("{}: {}", v.field, v.description)));
    }
    if let Some(failure) = details.precondition_failure() {
        lines.extend(failure.violations.iter().map(|v| format!("{}: {}", v.subject, v.description)));
    }
    if let Some(quota) = details.quota_failure() {
        lines.extend(quota.violations.iter().map(|v| format!("{}: {}", v.subject, v.description)));
    }
    if let Some(resource) = details.resource_info() {
        lines.push(resource.resource_name.clone());
    }
    if let Some(delay) = details.retry_info().and_then(|retry| retry.retry_delay) {
        lines.push(format!("try again in {:.1} s", delay.as_secs_f64()));
    }
    lines
}

/// What only the client's user can do about it.
fn advice(status: &Status) -> Option<&'static str> {
    match status.code() {
        Code::Unauthenticated => Some("give a key with --key or TENORA_KEY"),
        Code::Unimplemented => Some("the server does not know this call: is it a Tenora server of this version?"),
        _ if std::error::Error::source(status).is_some() => {
            Some("the connection failed: is the server still running, and does it speak TLS (https:// with --tls-ca)?")
        }
        _ => None,
    }
}

fn name_of(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// Where a server is and how to be let in.
#[derive(Debug, Clone, Default)]
pub struct Target {
    /// `http://HOST:PORT` or `https://HOST:PORT`, no other scheme; without one it is http, on this machine only.
    pub server: String,
    /// The bearer key; none is sent where there is none.
    pub key: Option<String>,
    /// PEM file of the authority that signed the server's certificate; without one, the system's authorities are trusted.
    pub tls_ca: Option<PathBuf>,
}

/// Puts the key on every call.
#[derive(Debug, Clone)]
struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> std::result::Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// A connection to one server with one key. Cheap to clone; clones share the connection.
#[derive(Debug, Clone)]
pub struct Client {
    channel: Channel,
    bearer: Bearer,
}

macro_rules! calls {
    ($($client:ident { $($(#[$doc:meta])* $kind:ident $method:ident($request:ty) -> $response:ty;)* })*) => {
        impl Client {
            $($(calls!(@$kind $client, $(#[$doc])* $method, $request, $response);)*)*
        }
    };
    (@unary $client:ident, $(#[$doc:meta])* $method:ident, $request:ty, $response:ty) => {
        $(#[$doc])*
        pub async fn $method(&self, request: $request) -> Result<$response> {
            Ok(service!(self, $client).$method(request).await?.into_inner())
        }
    };
    (@download $client:ident, $(#[$doc:meta])* $method:ident, $request:ty, $response:ty) => {
        $(#[$doc])*
        pub async fn $method(&self, request: $request) -> Result<Answers<$response>> {
            let answers = service!(self, $client).$method(request).await?.into_inner();
            Ok(Box::pin(answers.map(|answer| answer.map_err(ClientError::from))))
        }
    };
    (@upload $client:ident, $(#[$doc:meta])* $method:ident, $request:ty, $response:ty) => {
        $(#[$doc])*
        pub async fn $method(&self, parts: impl Stream<Item = $request> + Send + 'static) -> Result<$response> {
            Ok(service!(self, $client).$method(parts).await?.into_inner())
        }
    };
}

macro_rules! service {
    ($self:ident, $client:ident) => {
        $client::new(InterceptedService::new($self.channel.clone(), $self.bearer.clone()))
            .max_decoding_message_size(MAX_ANSWER_BYTES)
    };
}

calls! {
    GenerationServiceClient {
        /// Streams an answer.
        download generate(proto::GenerateRequest) -> proto::GenerateResponse;
        /// Log-probabilities of given sequences.
        unary score(proto::ScoreRequest) -> proto::ScoreResponse;
    }
    BaseServiceClient {
        /// The base, its tokens and the server's limits.
        unary get_base(proto::GetBaseRequest) -> proto::Base;
        /// The ids of a text or a chat.
        unary tokenize(proto::TokenizeRequest) -> proto::TokenizeResponse;
        /// The text of ids.
        unary detokenize(proto::DetokenizeRequest) -> proto::DetokenizeResponse;
    }
    AdapterServiceClient {
        /// Uploads a PEFT folder.
        upload import_adapter(proto::ImportAdapterRequest) -> proto::AdapterVersion;
        /// Streams a version as a PEFT folder.
        download export_adapter(proto::ExportAdapterRequest) -> proto::ExportAdapterResponse;
        /// One adapter.
        unary get_adapter(proto::GetAdapterRequest) -> proto::Adapter;
        /// One page of adapters.
        unary list_adapters(proto::ListAdaptersRequest) -> proto::ListAdaptersResponse;
        /// One page of versions.
        unary list_adapter_versions(proto::ListAdapterVersionsRequest) -> proto::ListAdapterVersionsResponse;
        /// The swap and the rollback.
        unary set_live_version(proto::SetLiveVersionRequest) -> proto::Adapter;
        /// Deletes an adapter and its versions.
        unary delete_adapter(proto::DeleteAdapterRequest) -> proto::DeleteAdapterResponse;
    }
    DatasetServiceClient {
        /// Uploads records for SFT.
        upload upload_dataset(proto::UploadDatasetRequest) -> proto::Dataset;
        /// Uploads preference pairs.
        upload upload_preferences(proto::UploadPreferencesRequest) -> proto::Dataset;
        /// One dataset.
        unary get_dataset(proto::GetDatasetRequest) -> proto::Dataset;
        /// One page of datasets.
        unary list_datasets(proto::ListDatasetsRequest) -> proto::ListDatasetsResponse;
        /// The quality report.
        unary inspect_dataset(proto::InspectDatasetRequest) -> proto::DatasetReport;
        /// Deletes a dataset.
        unary delete_dataset(proto::DeleteDatasetRequest) -> proto::DeleteDatasetResponse;
    }
    TrainingServiceClient {
        /// Starts a job.
        unary train(proto::TrainRequest) -> proto::TrainingJob;
        /// One job.
        unary get_training_job(proto::GetTrainingJobRequest) -> proto::TrainingJob;
        /// One page of jobs.
        unary list_training_jobs(proto::ListTrainingJobsRequest) -> proto::ListTrainingJobsResponse;
        /// A job's events until it ends.
        download watch_training_job(proto::WatchTrainingJobRequest) -> proto::TrainingEvent;
        /// Cancels a job.
        unary cancel_training_job(proto::CancelTrainingJobRequest) -> proto::TrainingJob;
        /// Queues an interrupted job again.
        unary resume_training_job(proto::ResumeTrainingJobRequest) -> proto::TrainingJob;
        /// Streams the model that a job has made as a Hugging Face folder.
        download export_trained_model(proto::ExportTrainedModelRequest) -> proto::ExportTrainedModelResponse;
        /// Deletes a job that has ended.
        unary delete_training_job(proto::DeleteTrainingJobRequest) -> proto::DeleteTrainingJobResponse;
    }
    SafetyServiceClient {
        /// The tenant's policy.
        unary get_safety_policy(proto::GetSafetyPolicyRequest) -> proto::SafetyPolicy;
        /// Replaces the tenant's policy.
        unary update_safety_policy(proto::UpdateSafetyPolicyRequest) -> proto::SafetyPolicy;
        /// What the policy finds in a text.
        unary check_text(proto::CheckTextRequest) -> proto::CheckTextResponse;
    }
    TenantServiceClient {
        /// Makes a tenant.
        unary create_tenant(proto::CreateTenantRequest) -> proto::Tenant;
        /// Changes a tenant.
        unary update_tenant(proto::UpdateTenantRequest) -> proto::Tenant;
        /// A tenant and how it stands; without a name, the caller's own.
        unary get_tenant(proto::GetTenantRequest) -> proto::GetTenantResponse;
        /// One page of tenants.
        unary list_tenants(proto::ListTenantsRequest) -> proto::ListTenantsResponse;
        /// Deletes a tenant and all of its own.
        unary delete_tenant(proto::DeleteTenantRequest) -> proto::DeleteTenantResponse;
        /// Makes a key.
        unary create_api_key(proto::CreateApiKeyRequest) -> proto::CreateApiKeyResponse;
        /// One page of keys.
        unary list_api_keys(proto::ListApiKeysRequest) -> proto::ListApiKeysResponse;
        /// Makes a key worthless.
        unary revoke_api_key(proto::RevokeApiKeyRequest) -> proto::RevokeApiKeyResponse;
        /// What a tenant has used.
        unary get_usage(proto::GetUsageRequest) -> proto::TenantUsage;
    }
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// UNAVAILABLE where nothing listens, where the address makes no sense, and where the server's certificate is not trusted.
    pub async fn connect(target: &Target) -> Result<Self> {
        let server = &with_scheme(&target.server)?;
        let invalid =
            |why: &dyn fmt::Display| ClientError::local(format!("the server address {server:?} is unusable: {why}"));
        let mut endpoint =
            Endpoint::from_shared(server.clone()).map_err(|e| invalid(&e))?.connect_timeout(CONNECT_TIMEOUT);
        if let Some(tls) = tls_config(server, target.tls_ca.as_deref())? {
            super::choose_tls_library();
            endpoint = endpoint.tls_config(tls).map_err(|e| invalid(&root_cause(&e)))?;
        }
        let bearer = bearer(target.key.as_deref())?;
        let channel = endpoint.connect().await.map_err(|e| unreachable(server, &root_cause(&e)))?;
        Ok(Self { channel, bearer })
    }

    /// Waits until the server says that it serves: its base is loaded.
    pub async fn wait_until_serving(&self) -> Result<()> {
        let mut health = HealthClient::new(self.channel.clone());
        let mut states = health.watch(HealthCheckRequest::default()).await?.into_inner();
        while let Some(state) = states.next().await {
            if state?.status() == ServingStatus::Serving {
                return Ok(());
            }
        }
        Err(ClientError::local("the server went away before it was ready; its log says why"))
    }
}

/// The address with its scheme in lower case. Without one it is http where no key can leave this machine.
fn with_scheme(server: &str) -> Result<String> {
    if let Some((scheme, rest)) = server.split_once("://") {
        let scheme = scheme.to_ascii_lowercase();
        if scheme == "http" || scheme == "https" {
            return Ok(format!("{scheme}://{rest}"));
        }
        return Err(ClientError::local(format!(
            "the server address {server:?} is unusable: its scheme must be https, or http where your key may cross the network readable"
        )));
    }
    let host = match server.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => server.split(':').next().unwrap_or_default(),
    };
    let loopback = host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    // What stands before an @ is a user's name, not the host.
    if loopback && !server.contains('@') {
        return Ok(format!("http://{server}"));
    }
    Err(ClientError::local(format!(
        "the server address {server:?} has no scheme: write https://{server}, or http://{server} where your key may cross the network \
         readable"
    )))
}

fn tls_config(server: &str, ca: Option<&Path>) -> Result<Option<ClientTlsConfig>> {
    let tls = ClientTlsConfig::new();
    match (ca, server.starts_with("https://")) {
        (Some(ca), true) => Ok(Some(tls.ca_certificate(Certificate::from_pem(read(ca)?)))),
        (None, true) => Ok(Some(tls.with_native_roots())),
        (None, false) => Ok(None),
        (Some(_), false) => Err(ClientError::local("--tls-ca is of use with an https:// server only")),
    }
}

/// Why no connection came about, in words that say what to do.
fn unreachable(server: &str, cause: &str) -> ClientError {
    let trust = "name the PEM file of the authority that signed it with --tls-ca FILE";
    let advice = if cause.contains("UnknownIssuer") {
        format!("its certificate is signed by itself or by an authority that this machine does not know; {trust}")
    } else if cause.contains("CaUsedAsEndEntity") {
        "its certificate is an authority's own, made without basicConstraints=CA:FALSE; give the server one that an authority signed \
         for it (`openssl req -x509 -addext basicConstraints=critical,CA:FALSE ...` makes one that signs itself)"
            .to_owned()
    } else if cause.contains("NotValidForName") || cause.contains("not valid for name") {
        "its certificate is for other names; name the server as its certificate does".to_owned()
    } else if cause.contains("Expired") || cause.contains("expired") {
        "its certificate has expired, or this machine's clock is wrong".to_owned()
    } else if cause.contains("InvalidContentType") || cause.contains("corrupt message") {
        "it does not speak TLS; is it http:// ?".to_owned()
    } else if cause.contains("invalid peer certificate") {
        format!("its certificate is not trusted; {trust}")
    } else {
        let start = "start one with `tenora serve`, or name another with --server";
        return ClientError::local(format!("no server answers at {server}: {cause}; {start}"));
    };
    ClientError::local(format!("no connection to {server}: {cause}: {advice}"))
}

fn bearer(key: Option<&str>) -> Result<Bearer> {
    let Some(key) = key.map(str::trim).filter(|key| !key.is_empty()) else { return Ok(Bearer(None)) };
    let mut value: MetadataValue<Ascii> = format!("Bearer {key}")
        .parse()
        .map_err(|_| ClientError::local("the key has characters that no key has; copy it again"))?;
    value.set_sensitive(true);
    Ok(Bearer(Some(value)))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| ClientError::local(format!("cannot read {}: {e}", path.display())))
}

/// The innermost error says what the outer ones wrap.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn render(code: Code, message: &str, details: ErrorDetails) -> String {
        ClientError::from(Status::with_error_details(code, message, details)).to_string()
    }

    #[test]
    fn details_become_lines() {
        let mut details = ErrorDetails::with_bad_request_violation("sampling.top_p", "must be in (0, 1]");
        details.set_error_info("INVALID_ARGUMENT", "tenora", HashMap::new());
        assert_eq!(
            render(Code::InvalidArgument, "bad request", details.clone()),
            "bad request (INVALID_ARGUMENT)\n  sampling.top_p: must be in (0, 1]"
        );
        let said = "sampling.top_p: must be in (0, 1]";
        assert_eq!(render(Code::InvalidArgument, said, details), format!("{said} (INVALID_ARGUMENT)"));
    }

    #[test]
    fn retry_and_reason_are_shown() {
        let mut details = ErrorDetails::with_retry_info(Some(Duration::from_millis(1500)));
        details.set_error_info("QUEUE_FULL", "tenora", HashMap::new());
        assert_eq!(
            render(Code::ResourceExhausted, "too many", details),
            "too many (RESOURCE_EXHAUSTED, QUEUE_FULL)\n  try again in 1.5 s"
        );
    }

    #[test]
    fn a_missing_key_is_told_what_to_do() {
        assert!(
            render(Code::Unauthenticated, "no key", ErrorDetails::new())
                .ends_with("give a key with --key or TENORA_KEY")
        );
    }

    #[test]
    fn loopback_needs_no_scheme() {
        for local in ["localhost:50051", "LOCALHOST:50051", "127.0.0.1:1", "127.9.9.9:1", "[::1]:50051"] {
            assert_eq!(with_scheme(local).unwrap(), format!("http://{local}"));
        }
        assert_eq!(with_scheme("https://example.org").unwrap(), "https://example.org");
        for remote in ["example.org:443", "10.0.0.1:1", "[2001:db8::1]:1", "localhost.example.org:1", "localhost@a:1"] {
            assert!(with_scheme(remote).unwrap_err().message.contains(&format!("https://{remote}")), "{remote}");
        }
    }

    #[test]
    fn only_http_and_https_are_schemes() {
        for (given, taken) in [
            ("HTTPS://Example.org:1", "https://Example.org:1"),
            ("Http://localhost:1", "http://localhost:1"),
            ("http://10.0.0.1:1", "http://10.0.0.1:1"),
        ] {
            assert_eq!(with_scheme(given).unwrap(), taken);
        }
        for other in ["grpcs://a:1", "htps://a:1", "ftp://a:1", "grpc://localhost:1", "://a:1"] {
            let message = with_scheme(other).unwrap_err().message;
            assert!(message.contains(other) && message.contains("must be https, or http"), "{message}");
        }
    }

    #[tokio::test]
    async fn targets_that_cannot_work_are_refused() {
        let connect = async |server: &str, key: Option<&str>| {
            let target = Target { server: server.into(), key: key.map(str::to_owned), tls_ca: None };
            Client::connect(&target).await.unwrap_err().message
        };
        assert!(connect("https://127.0.0.1:1", None).await.contains("tenora serve"));
        assert!(connect("127.0.0.1:1", None).await.contains("http://127.0.0.1:1"));
        assert!(connect("10.0.0.1:50051", None).await.contains("write https://10.0.0.1:50051"));
        assert!(connect("http://127.0.0.1:1", None).await.contains("tenora serve"));
        assert!(connect("http://127.0.0.1:1", Some("a\nb")).await.contains("copy it again"));
        assert!(connect("http://not a url", None).await.contains("unusable"));
        assert!(connect("not a url", None).await.contains("no scheme"));
        assert!(connect("grpcs://127.0.0.1:1", Some("key")).await.contains("its scheme must be https"));
        assert!(connect("HTTPS://127.0.0.1:1", None).await.contains("no server answers at https://127.0.0.1:1"));
    }
}
