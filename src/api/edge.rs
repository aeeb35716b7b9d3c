//! What every call passes before its handler: authentication, the drain, the limit on calls, the deadline, and its measurement.
//!
//! It stands before the router, so that a method cannot be added without it.

use std::collections::HashSet;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, LazyLock, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use http_body::{Frame, SizeHint};
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tonic::body::Body;
use tonic::codegen::http::{self, HeaderMap};
use tonic::codegen::{BoxFuture, Bytes, Service};
use tonic::service::Routes;
use tonic::{Code, Status};

use super::auth::{Auth, Caller};
use super::places::{Place, Places};
use super::{Deadline, proto, status};
use crate::config::Limits;
use crate::error::{Error, Result};
use crate::ids::TenantId;

/// The paths of all methods that can be called with a key.
static METHODS: LazyLock<HashSet<String>> = LazyLock::new(|| {
    let reflection = tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET;
    let sets = [proto::DESCRIPTORS, reflection].map(|bytes| FileDescriptorSet::decode(bytes).unwrap_or_default());
    let mut methods = HashSet::new();
    for file in sets.iter().flat_map(|set| &set.file) {
        for service in &file.service {
            let name = |method: &str| format!("/{}.{}/{method}", file.package(), service.name());
            methods.extend(service.method.iter().map(|method| name(method.name())));
        }
    }
    methods
});

/// Open to everyone, at all times.
const HEALTH: &str = "/grpc.health.v1.Health/";

/// The calls under way. Clones share the state.
#[derive(Debug, Clone)]
pub struct Calls {
    closing: CancellationToken,
    under_way: TaskTracker,
    places: Places,
}

impl Calls {
    pub fn new(limits: &Limits) -> Self {
        let all = ("max_calls", limits.max_calls);
        let per_tenant = ("max_calls_per_tenant", limits.max_calls_per_tenant);
        Self {
            closing: CancellationToken::new(),
            under_way: TaskTracker::new(),
            places: Places::new("calls", all, per_tenant, Duration::from_secs(1)),
        }
    }

    /// Returns how many calls of a tenant are under way.
    pub fn held_by(&self, tenant: &TenantId) -> u64 {
        self.places.held_by(tenant)
    }

    /// From now on new calls are refused.
    pub fn close(&self) {
        self.closing.cancel();
        self.under_way.close();
    }

    /// Waits for [`Calls::close`].
    pub async fn closing(&self) {
        self.closing.cancelled().await;
    }

    /// Waits until nothing is under way, after [`Calls::close`].
    pub async fn finished(&self) {
        self.under_way.wait().await;
    }

    /// Runs something that outlives its call, such as counting what a vanished client has used; the drain waits for it.
    pub fn afterwards(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.under_way.spawn(work);
    }

    fn enter(&self, caller: &Caller) -> Result<Place> {
        if self.closing.is_cancelled() {
            return Err(draining());
        }
        self.places.take(caller)
    }
}

/// What calls get while the server is going away.
pub fn draining() -> Error {
    Error::Unavailable {
        message: "the server is shutting down; try again in a moment or on another server".into(),
        retry_after: Some(Duration::from_secs(5)),
    }
}

/// What calls get before the services are there.
fn loading() -> Error {
    Error::Unavailable {
        message: "the server is loading its base; try again in a moment".into(),
        retry_after: Some(Duration::from_secs(1)),
    }
}

/// The services behind the edge; none until they are opened. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Services(Arc<OnceLock<Routes>>);

impl Services {
    /// Lets calls through to these services. Once.
    pub fn open(&self, routes: Routes) {
        // A second set would be a mistake of ours, and the first one goes on.
        let _ = self.0.set(routes);
    }
}

/// The service around the router.
#[derive(Debug, Clone)]
pub struct Edge {
    health: Routes,
    services: Services,
    auth: Auth,
    calls: Calls,
}

impl Edge {
    /// `health` is open to everyone from the start.
    pub fn new(health: Routes, auth: Auth, calls: Calls) -> Self {
        Self { health, services: Services::default(), auth, calls }
    }

    pub fn services(&self) -> Services {
        self.services.clone()
    }
}

impl Service<http::Request<Body>> for Edge {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // A router is always ready.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        if request.uri().path().starts_with(HEALTH) {
            return Box::pin(self.health.call(request));
        }
        let Self { services, auth, calls, .. } = self.clone();
        let mut record = Record::new(request.uri().path(), &calls);
        let time = timeout_of(request.headers());
        if let Some(deadline) = time.and_then(|time| record.since.checked_add(time)) {
            request.extensions_mut().insert(Deadline(deadline));
        }
        // Started here, before tonic starts its own timer for the same header, so that ours ends first and the status has details.
        let timer = time.map(tokio::time::sleep);
        let answer = async move {
            match admit(&auth, &calls, &mut request).await {
                Ok(place) => record.place = Some(place),
                Err(error) => return Ok(record.refused(error.into())),
            }
            let Some(mut routes) = services.0.get().cloned() else { return Ok(record.refused(loading().into())) };
            let expired = async move {
                match timer {
                    Some(timer) => timer.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                response = routes.call(request) => response.map(|response| record.answered(response)),
                () = expired => Ok(record.refused(Error::DeadlineExceeded.into())),
            }
        };
        Box::pin(answer)
    }
}

/// Finds out who calls, first of all: a stranger learns nothing about the server's state.
async fn admit(auth: &Auth, calls: &Calls, request: &mut http::Request<Body>) -> Result<Place> {
    let caller = auth.caller(request.headers()).await?;
    let place = calls.enter(&caller)?;
    request.extensions_mut().insert(caller);
    Ok(place)
}

/// One call, measured when it is dropped: at the end of its answer, or when its client has gone.
#[derive(Debug)]
struct Record {
    path: String,
    since: Instant,
    code: Code,
    place: Option<Place>,
    _under_way: TaskTrackerToken,
}

impl Record {
    fn new(path: &str, calls: &Calls) -> Self {
        Self {
            path: path.to_owned(),
            since: Instant::now(),
            code: Code::Cancelled,
            place: None,
            _under_way: calls.under_way.token(),
        }
    }

    fn refused(mut self, status: Status) -> http::Response<Body> {
        self.code = status.code();
        status.into_http()
    }

    /// Follows the answer to its end.
    fn answered(mut self, response: http::Response<Body>) -> http::Response<Body> {
        match Status::from_header_map(response.headers()) {
            Some(status) if status.code() != Code::Ok => self.refused(status::with_details(status)),
            Some(_) => {
                self.code = Code::Ok;
                response
            }
            None => response.map(|body| Body::new(Followed { body, record: self })),
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        // A path that no service has is the caller's invention and must not become a label.
        let method = if METHODS.contains(&self.path) { self.path.as_str() } else { "unknown" }.to_owned();
        let code = format!("{:?}", self.code);
        metrics::counter!("tenora_calls_total", "method" => method.clone(), "code" => code).increment(1);
        metrics::histogram!("tenora_call_seconds", "method" => method).record(self.since.elapsed().as_secs_f64());
    }
}

/// An answer's body that keeps the call's record until it ends.
struct Followed {
    body: Body,
    record: Record,
}

impl http_body::Body for Followed {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        let trailers = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.trailers_ref());
        if let Some(status) = trailers.and_then(Status::from_header_map) {
            self.record.code = status.code();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The time that the client gives the call: at most eight digits and a unit.
fn timeout_of(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(n * 3600)),
        "M" => Some(Duration::from_secs(n * 60)),
        "S" => Some(Duration::from_secs(n)),
        "m" => Some(Duration::from_millis(n)),
        "u" => Some(Duration::from_micros(n)),
        "n" => Some(Duration::from_nanos(n)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read() {
        let read = |value: &str| {
            timeout_of(&HeaderMap::from_iter([("grpc-timeout".parse().unwrap(), value.parse().unwrap())]))
        };
        assert_eq!(read("250m"), Some(Duration::from_millis(250)));
        assert_eq!(read("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for wrong in ["", "m", "1", "1x", "123456789S", "-1S"] {
            assert_eq!(read(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn only_methods_that_exist_become_labels() {
        assert!(METHODS.contains("/tenora.v1.GenerationService/Generate"));
        assert!(METHODS.contains("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"));
        assert!(!METHODS.contains("/tenora.v1.GenerationService/Other"));
    }

    #[tokio::test]
    async fn a_full_server_refuses_and_a_closed_one_says_so() {
        let calls = Calls::new(&Limits { max_calls: 1, ..Limits::default() });
        let caller = Caller::Tenant(crate::ids::Tenant::proven("tenants/a".parse().unwrap()));
        let place = calls.enter(&caller).unwrap();
        assert!(matches!(calls.enter(&caller), Err(Error::Exhausted { limit: "max_calls", .. })));
        drop(place);
        assert!(calls.enter(&caller).is_ok());
        calls.close();
        assert!(matches!(calls.enter(&caller), Err(Error::Unavailable { .. })));
        calls.finished().await;
    }
}
