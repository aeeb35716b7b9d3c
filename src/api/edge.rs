//! What every call passes before its handler: authentication, the drain, the limit on calls, the deadline, and its measurement.
//!
//! It stands before the router, so that a method cannot be added without it.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, LazyLock, Mutex, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use http_body::{Frame, SizeHint};
use http_body_util::BodyExt as _;
use prost::Message as _;
use prost_types::{FileDescriptorSet, MethodDescriptorProto};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tonic::body::Body;
use tonic::codegen::http::{self, HeaderMap};
use tonic::codegen::{BoxFuture, Bytes, Service};
use tonic::service::Routes;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::auth::{Auth, Caller, Entered, OPERATOR_TENANT};
use super::bodies::{Measured, PACKED, PLAIN, Rules, SharedAccount, settle};
use super::connections::{Busy, Known};
use super::live::{Live, LiveCall};
use super::places::{Place, Places};
use super::{Deadline, proto, status};
use crate::config::Limits;
use crate::error::{Error, Result};
use crate::ids::TenantId;
use crate::memory::Memory;
use crate::sync::lock;
use crate::telemetry::traces;

/// Which sides of a method send a stream of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Streams {
    client: bool,
    server: bool,
}

/// The paths of all methods that can be called with a key.
static METHODS: LazyLock<HashMap<String, Streams>> = LazyLock::new(|| {
    use tonic_reflection::pb::{v1, v1alpha};
    let sets = [proto::DESCRIPTORS, v1::FILE_DESCRIPTOR_SET, v1alpha::FILE_DESCRIPTOR_SET];
    let sets = sets.map(|bytes| FileDescriptorSet::decode(bytes).unwrap_or_default());
    let mut methods = HashMap::new();
    for file in sets.iter().flat_map(|set| &set.file) {
        for service in &file.service {
            let name = |method: &str| format!("/{}.{}/{method}", file.package(), service.name());
            let streams = |method: &MethodDescriptorProto| Streams {
                client: method.client_streaming(),
                server: method.server_streaming(),
            };
            methods.extend(service.method.iter().map(|method| (name(method.name()), streams(method))));
        }
    }
    methods
});

/// Bytes of an answer that is given whatever else is held.
const SMALL_ANSWER_BYTES: u64 = 64 << 10;

/// Open to everyone, at all times.
const HEALTH: &str = "/grpc.health.v1.Health/";
/// The one of its methods whose calls last.
const HEALTH_WATCH: &str = "/grpc.health.v1.Health/Watch";
/// Bytes and time of a question about health.
const HEALTH_RULES: Rules =
    Rules { most: ("max_request_bytes", 1 << 10), whole_within: Some(Duration::from_secs(10)), factor: PLAIN };
/// What the services of this server are called.
const OURS: &str = "/tenora.v1.";

/// How much earlier than its deadline a call that has not been answered ends.
const HEADWAY: Duration = Duration::from_millis(2);

/// Answers in messages of a few bytes each, which no compression makes smaller.
const NEVER_COMPRESSED: &str = "/tenora.v1.GenerationService/Generate";

/// The calls under way. Clones share the state.
#[derive(Debug, Clone)]
pub struct Calls {
    closing: CancellationToken,
    under_way: TaskTracker,
    places: Places,
    pub live: Live,
}

impl Calls {
    pub fn new(limits: &Limits) -> Self {
        let all = ("max_calls", limits.max_calls);
        let per_tenant = ("max_calls_per_tenant", limits.max_calls_per_tenant);
        Self {
            closing: CancellationToken::new(),
            under_way: TaskTracker::new(),
            live: Live::default(),
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
pub struct Services(Arc<OnceLock<(Routes, Arc<Memory>)>>);

impl Services {
    /// Lets calls through to these services. Once. What calls bring is taken from `memory`.
    pub fn open(&self, routes: Routes, memory: Arc<Memory>) {
        // A second set would be a mistake of ours, and the first one goes on.
        let _ = self.0.set((routes, memory));
    }
}

/// The service around the router.
#[derive(Debug, Clone)]
pub struct AdmissionLayer {
    health: Routes,
    services: Services,
    auth: Auth,
    calls: Calls,
    rules: CallRules,
    watches: Arc<Semaphore>,
}

/// How messages are taken, by the kind of method.
#[derive(Debug, Clone, Copy)]
struct CallRules {
    one_message: Rules,
    upload: Rules,
    other_stream: Rules,
}

impl CallRules {
    fn new(limits: &Limits) -> Self {
        let most = ("max_request_bytes", limits.max_request_bytes.min(limits.max_message_bytes));
        let whole_within = Some(Duration::from_secs(limits.request_seconds));
        Self {
            one_message: Rules { most, whole_within, factor: PACKED },
            upload: Rules { most: ("max_message_bytes", limits.max_message_bytes), whole_within: None, factor: PLAIN },
            other_stream: Rules { most, whole_within: None, factor: PACKED },
        }
    }

    fn of(&self, path: &str) -> Rules {
        match METHODS.get(path) {
            Some(Streams { client: true, .. }) if path.starts_with(OURS) => self.upload,
            Some(Streams { client: true, .. }) => self.other_stream,
            _ => self.one_message,
        }
    }
}

impl AdmissionLayer {
    /// `health` is open to everyone from the start.
    pub fn new(health: Routes, auth: Auth, calls: Calls, limits: &Limits) -> Self {
        let watches = usize::try_from(limits.max_health_watches).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        let (rules, watches) = (CallRules::new(limits), Arc::new(Semaphore::new(watches)));
        Self { health, services: Services::default(), auth, calls, rules, watches }
    }

    /// Answers a question about health, from anyone: little is taken, and few may watch at once.
    fn answer_health(&mut self, request: http::Request<Body>) -> BoxFuture<http::Response<Body>, Infallible> {
        let watch = match request.uri().path() {
            HEALTH_WATCH => match self.watches.clone().try_acquire_owned() {
                Ok(place) => Some(place),
                Err(_) => return Box::pin(std::future::ready(Ok(Status::from(too_many_watches()).into_http()))),
            },
            _ => None,
        };
        let account: SharedAccount = Arc::new(Mutex::new(Memory::new(1 << 20).account(None)));
        let answer = self.health.call(request.map(|body| Body::new(Measured::new(body, HEALTH_RULES, account))));
        Box::pin(async move {
            let response = answer.await?;
            match Status::from_header_map(response.headers()) {
                Some(status) if status.code() != Code::Ok => Ok(status::with_details(status).into_http()),
                _ => Ok(response.map(|body| Body::new(Watched { body, _place: watch }))),
            }
        })
    }

    pub fn services(&self) -> Services {
        self.services.clone()
    }
}

impl Service<http::Request<Body>> for AdmissionLayer {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // A router is always ready.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let since = Instant::now();
        let deadline = match timeout_of(request.headers()) {
            Ok(time) => time.and_then(|time| since.checked_add(time)),
            Err(error) => {
                let record = Record::new(request.uri().path(), since, &self.calls);
                return Box::pin(std::future::ready(Ok(record.refused(error.into()))));
            }
        };
        if request.uri().path().starts_with(HEALTH) {
            let answer = self.answer_health(request);
            let late = || Ok(Status::from(Error::DeadlineExceeded).into_http());
            return Box::pin(async move { within(deadline, answer).await.unwrap_or_else(late) });
        }
        let Self { services, auth, calls, rules, .. } = self.clone();
        let mut record = Record::new(request.uri().path(), since, &calls);
        if let Some(deadline) = deadline {
            request.extensions_mut().insert(Deadline(deadline));
        }
        let traceparent = request.headers().get("traceparent").and_then(|value| value.to_str().ok());
        record.trace = traces::Call::begin(traceparent);
        if let Some(trace) = &record.trace {
            request.extensions_mut().insert(trace.context());
        }
        if request.uri().path() == NEVER_COMPRESSED {
            request.headers_mut().remove("grpc-accept-encoding");
        }
        let answer = async move {
            let Record { caller, busy, .. } = &mut record;
            let work = async {
                let (place, live) = admit(&auth, &calls, &mut request, caller, busy).await?;
                let (mut routes, memory) = services.0.get().cloned().ok_or_else(loading)?;
                let rules = rules.of(request.uri().path());
                let is_unary = METHODS.get(request.uri().path()).is_some_and(|streams| !streams.server);
                let account: SharedAccount = Arc::new(Mutex::new(memory.account(tenant_of(&request))));
                let held = account.clone();
                let request = request.map(|body| Body::new(Measured::new(body, rules, held)));
                let cut = live.cut.clone();
                let response = tokio::select! {
                    biased;
                    Ok(response) = routes.call(request) => response,
                    why = cut.wait() => return Err(why),
                };
                if rules.whole_within.is_some() {
                    // The handler has used up what came.
                    settle(&account);
                }
                let response = if is_unary { counted(response, &account).await? } else { response };
                Ok::<_, Error>((response, place, live))
            };
            let done = within(deadline, work).await.unwrap_or(Err(Error::DeadlineExceeded));
            Ok(match done {
                Ok((response, place, live)) => {
                    record.place = Some(place);
                    record.answered(response, live)
                }
                Err(error) => record.refused(Status::from(error)),
            })
        };
        Box::pin(answer)
    }
}

/// An answer of one message, encoded now and counted until it is sent: a client may leave it unread for long. What is small is never refused,
/// since its call may have changed something.
async fn counted(response: http::Response<Body>, account: &SharedAccount) -> Result<http::Response<Body>> {
    let (head, mut body) = response.into_parts();
    let mut frames = VecDeque::new();
    let mut bytes = 0;
    while let Some(frame) = body.frame().await {
        bytes += frame.as_ref().ok().and_then(Frame::data_ref).map_or(0, Bytes::len) as u64;
        frames.push_back(frame);
    }
    let counted = lock(account).grow(bytes);
    if bytes > SMALL_ANSWER_BYTES {
        counted?;
    }
    Ok(http::Response::from_parts(head, Body::new(Whole { frames, _account: account.clone() })))
}

/// The frames of a whole answer, and the account that it is counted in.
struct Whole {
    frames: VecDeque<Result<Frame<Bytes>, Status>>,
    _account: SharedAccount,
}

impl http_body::Body for Whole {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Poll::Ready(self.frames.pop_front())
    }

    fn is_end_stream(&self) -> bool {
        self.frames.is_empty()
    }
}

/// What the work gives, or `None` where the deadline comes first.
///
/// tonic has a timer of its own for the same header and asks it right after this future; its status would be CANCELLED and without
/// details. So this one ends a little earlier, and looks at the clock after every piece of work.
async fn within<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Option<T> {
    let Some(deadline) = deadline else { return Some(work.await) };
    let end = deadline.checked_sub(HEADWAY).unwrap_or(deadline);
    let mut timer = std::pin::pin!(tokio::time::sleep_until(end.into()));
    let mut work = std::pin::pin!(work);
    std::future::poll_fn(|cx| {
        if Instant::now() < end
            && let Poll::Ready(done) = work.as_mut().poll(cx)
        {
            return Poll::Ready(Some(done));
        }
        if Instant::now() >= end { Poll::Ready(None) } else { timer.as_mut().poll(cx).map(|()| None) }
    })
    .await
}

/// Finds out who calls, first of all: a stranger learns nothing about the server's state.
async fn admit(
    auth: &Auth,
    calls: &Calls,
    request: &mut http::Request<Body>,
    name: &mut String,
    busy: &mut Option<Busy>,
) -> Result<(Place, LiveCall)> {
    let since = auth.forgotten();
    let who = auth.caller(request.headers()).await?;
    *name = match &who.caller {
        Caller::Tenant(tenant) => tenant.id().to_string(),
        Caller::Operator => format!("tenants/{OPERATOR_TENANT}"),
    };
    *busy = request.extensions().get::<Known>().map(Known::set);
    let place = calls.enter(&who.caller)?;
    let live = calls.live.enter(&who);
    // A key that was revoked while it was looked up ends no call that was not in the table yet.
    if auth.forgotten() != since {
        auth.caller(request.headers()).await?;
    }
    let Entered { caller, .. } = who;
    request.extensions_mut().insert(caller);
    Ok((place, live))
}

/// The tenant whose call it is; none for an operator's.
fn tenant_of(request: &http::Request<Body>) -> Option<&TenantId> {
    match request.extensions().get::<Caller>()? {
        Caller::Tenant(tenant) => Some(tenant.id()),
        Caller::Operator => None,
    }
}

fn too_many_watches() -> Error {
    Error::Exhausted {
        limit: "max_health_watches",
        message: "as many watch the server's health as may; ask with Check".into(),
        retry_after: Some(Duration::from_secs(5)),
    }
}

/// An answer about health, and its place among the watches.
struct Watched {
    body: Body,
    _place: Option<OwnedSemaphorePermit>,
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// One call, measured when it is dropped: at the end of its answer, or when its client has gone.
#[derive(Debug)]
struct Record {
    path: String,
    since: Instant,
    code: Code,
    /// Why the call failed, for the log.
    failure: Option<Status>,
    /// Whose key came with it; empty until that is known.
    caller: String,
    trace: Option<traces::Call>,
    place: Option<Place>,
    /// Keeps the connection from making room.
    busy: Option<Busy>,
    _under_way: TaskTrackerToken,
}

impl Record {
    fn new(path: &str, since: Instant, calls: &Calls) -> Self {
        Self {
            path: path.to_owned(),
            since,
            code: Code::Cancelled,
            failure: None,
            caller: String::new(),
            trace: None,
            place: None,
            busy: None,
            _under_way: calls.under_way.token(),
        }
    }

    fn refused(mut self, status: Status) -> http::Response<Body> {
        self.failed(status.clone());
        status.into_http()
    }

    fn failed(&mut self, status: Status) {
        self.code = status.code();
        self.failure = (status.code() != Code::Ok).then_some(status);
    }

    /// Follows the answer to its end.
    fn answered(mut self, response: http::Response<Body>, live: LiveCall) -> http::Response<Body> {
        match Status::from_header_map(response.headers()) {
            Some(status) if status.code() != Code::Ok => self.refused(status::with_details(status)),
            Some(_) => {
                self.code = Code::Ok;
                response
            }
            None => response.map(|body| Body::new(TrackedBody::new(body, self, live))),
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        // A path that no service has is the caller's invention and must not become a label.
        let method = if METHODS.contains_key(&self.path) { self.path.as_str() } else { "unknown" }.to_owned();
        let code = format!("{:?}", self.code);
        if let Some(status) = &self.failure {
            let details = status.get_error_details();
            let reason = details.error_info().map_or("", |info| info.reason.as_str());
            // One line, also where the message lists many.
            let (tenant, error) = (&self.caller, status.message().replace('\n', "; "));
            tracing::info!(%tenant, %method, %code, %reason, %error, "call refused");
        }
        if let Some(trace) = self.trace.take() {
            let attributes = vec![("rpc.grpc.status", code.clone()), ("tenora.tenant", self.caller.clone())];
            trace.end(&method, attributes, self.failure.as_ref().map(|status| status.message().to_owned()));
        }
        metrics::counter!("tenora_calls_total", "method" => method.clone(), "code" => code).increment(1);
        metrics::histogram!("tenora_call_seconds", "method" => method).record(self.since.elapsed().as_secs_f64());
    }
}

/// An answer's body that keeps the call's record until it ends, and ends early where the call is cut.
struct TrackedBody {
    record: Record,
    live: LiveCall,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    ended: bool,
}

impl TrackedBody {
    fn new(body: Body, record: Record, live: LiveCall) -> Self {
        *live.cut.body() = Some(body);
        let cut = Box::pin(live.cut.token().cancelled_owned());
        Self { record, live, cut, ended: false }
    }

    /// The last frame of a call that was cut.
    fn cut_off(&mut self) -> Frame<Bytes> {
        let status = Status::from(self.live.cut.why());
        self.ended = true;
        let mut trailers = HeaderMap::new();
        // A status of ours is always a header.
        let _ = status.add_header(&mut trailers);
        self.record.failed(status);
        Frame::trailers(trailers)
    }
}

impl Drop for TrackedBody {
    fn drop(&mut self) {
        // What is behind the answer ends with it, before its place is given back.
        let body = self.live.cut.body().take();
        drop(body);
    }
}

impl http_body::Body for TrackedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if self.cut.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Some(Ok(self.cut_off())));
        }
        let polled = self.live.cut.body().as_mut().map(|body| Pin::new(body).poll_frame(cx));
        let Some(polled) = polled else { return Poll::Ready(Some(Ok(self.cut_off()))) };
        let frame = ready!(polled);
        let trailers = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.trailers_ref());
        if let Some(status) = trailers.and_then(Status::from_header_map) {
            self.record.failed(status);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.live.cut.body().as_ref().is_some_and(http_body::Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.live.cut.body().as_ref().map(http_body::Body::size_hint).unwrap_or_default()
    }
}

/// The time that the client gives the call: at most eight digits and a unit.
fn timeout_of(headers: &HeaderMap) -> Result<Option<Duration>> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    let wrong = || {
        let message = "must be one to eight digits and a unit of H, M, S, m, u and n, such as 250m";
        Error::invalid_because("INVALID_TIMEOUT", "grpc-timeout", message)
    };
    let value = value.to_str().map_err(|_| wrong())?;
    let (digits, unit) = value.len().checked_sub(1).and_then(|at| value.split_at_checked(at)).ok_or_else(wrong)?;
    if digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    let n: u64 = digits.parse().map_err(|_| wrong())?;
    Ok(Some(match unit {
        "H" => Duration::from_secs(n * 3600),
        "M" => Duration::from_secs(n * 60),
        "S" => Duration::from_secs(n),
        "m" => Duration::from_millis(n),
        "u" => Duration::from_micros(n),
        "n" => Duration::from_nanos(n),
        _ => return Err(wrong()),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read() {
        let read = |value: &str| {
            let value = http::HeaderValue::from_bytes(value.as_bytes()).unwrap();
            timeout_of(&HeaderMap::from_iter([("grpc-timeout".parse().unwrap(), value)]))
        };
        assert_eq!(timeout_of(&HeaderMap::new()).unwrap(), None);
        assert_eq!(read("250m").unwrap(), Some(Duration::from_millis(250)));
        assert_eq!(read("0n").unwrap(), Some(Duration::ZERO));
        assert_eq!(read("99999999H").unwrap(), Some(Duration::from_secs(99_999_999 * 3600)));
        for wrong in ["", "m", "1", "1x", "123456789S", "-1S", "1é", "1 S"] {
            assert!(matches!(read(wrong), Err(Error::Invalid { reason: "INVALID_TIMEOUT", .. })), "{wrong:?}");
        }
    }

    #[test]
    fn only_methods_that_exist_become_labels() {
        assert_eq!(
            METHODS.get("/tenora.v1.GenerationService/Generate"),
            Some(&Streams { client: false, server: true })
        );
        assert_eq!(
            METHODS.get("/tenora.v1.DatasetService/UploadDataset"),
            Some(&Streams { client: true, server: false })
        );
        let reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
        assert_eq!(METHODS.get(reflection), Some(&Streams { client: true, server: true }));
        assert!(METHODS.contains_key("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"));
        assert_eq!(METHODS.get("/tenora.v1.GenerationService/Other"), None);
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
