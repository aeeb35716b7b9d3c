//! What every call passes before its handler: authentication, the drain, the limit on calls, the deadline, and what its messages take.
//!
//! It stands before the router, so that a method cannot be added without it.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http_body::Frame;
use http_body_util::BodyExt as _;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http;
use tonic::codegen::{BoxFuture, Bytes, Service};
use tonic::service::Routes;

use super::auth::{Auth, Caller, Entered, OPERATOR_TENANT};
use super::bodies::{Measured, PACKED, PLAIN, Rules, SharedAccount, settle};
use super::connections::{Busy, Peer, address_of};
use super::deadline::{Deadline, timeout_of, within};
use super::health::{self, Health};
use super::live::{Live, LiveCall};
use super::methods::{METHODS, OURS, Streams, only_reads};
use super::places::{Place, Places};
use super::record::Record;
use crate::config::Limits;
use crate::error::{Error, Result};
use crate::ids::TenantId;
use crate::memory::Memory;
use crate::sync::lock;
use crate::telemetry::traces;

/// Bytes of an answer that is given whatever else is held.
const SMALL_ANSWER_BYTES: u64 = 64 << 10;

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
    health: Health,
    services: Services,
    auth: Auth,
    calls: Calls,
    rules: CallRules,
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
    pub fn new(health: Health, auth: Auth, calls: Calls, limits: &Limits) -> Self {
        Self { health, services: Services::default(), auth, calls, rules: CallRules::new(limits) }
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
                let record = Record::new(request.uri().path(), since, self.calls.under_way.token());
                return Box::pin(std::future::ready(Ok(record.refused(error.into()))));
            }
        };
        if request.uri().path().starts_with(health::PREFIX) {
            return self.health.answer(request, deadline);
        }
        let Self { services, auth, calls, rules, .. } = self.clone();
        let mut record = Record::new(request.uri().path(), since, calls.under_way.token());
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
                let (head, body) = request.into_parts();
                let may_refuse = only_reads(head.uri.path());
                let body = Measured::new(body, rules, account.clone());
                let fault = body.fault();
                let request = http::Request::from_parts(head, Body::new(body));
                let cut = live.cut.clone();
                let response = tokio::select! {
                    biased;
                    // First: what fails because its tenant is gone has this error and no other.
                    why = cut.wait() => return Err(why),
                    Ok(response) = routes.call(request) => response,
                };
                if rules.whole_within.is_some() {
                    // The handler has used up what came.
                    settle(&account);
                }
                let response = if is_unary { counted(response, &account, may_refuse).await? } else { response };
                Ok::<_, Error>((response, place, live, fault))
            };
            let done = within(deadline, work).await.unwrap_or(Err(Error::DeadlineExceeded));
            Ok(match done {
                Ok((response, place, live, fault)) => {
                    record.place = Some(place);
                    record.answered(response, live, fault, deadline)
                }
                Err(error) => record.refused(Status::from(error)),
            })
        };
        Box::pin(answer)
    }
}

/// An answer of one message, encoded now and counted until it is sent: a client may leave it unread for long. What is small is never
/// refused, nor is any answer of a call that may have changed something.
async fn counted(
    response: http::Response<Body>,
    account: &SharedAccount,
    may_refuse: bool,
) -> Result<http::Response<Body>> {
    let (head, mut body) = response.into_parts();
    let mut frames = VecDeque::new();
    let mut bytes = 0;
    while let Some(frame) = body.frame().await {
        bytes += frame.as_ref().ok().and_then(Frame::data_ref).map_or(0, Bytes::len) as u64;
        frames.push_back(frame);
    }
    let counted = lock(account).grow(bytes);
    if may_refuse && bytes > SMALL_ANSWER_BYTES {
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

/// Finds out who calls, first of all: a stranger learns nothing about the server's state.
async fn admit(
    auth: &Auth,
    calls: &Calls,
    request: &mut http::Request<Body>,
    name: &mut String,
    busy: &mut Option<Busy>,
) -> Result<(Place, LiveCall)> {
    let (since, address) = (auth.forgotten(), address_of(request.extensions()));
    let who = auth.caller(request.headers(), address).await?;
    *name = match &who.caller {
        Caller::Tenant(tenant) => tenant.id().to_string(),
        Caller::Operator => format!("tenants/{OPERATOR_TENANT}"),
    };
    let place = calls.enter(&who.caller)?;
    *busy = request.extensions().get::<Peer>().map(|peer| peer.begin(&who.caller));
    let live = calls.live.enter(&who);
    // A key that was revoked while it was looked up ends no call that was not in the table yet.
    if auth.forgotten() != since {
        auth.caller(request.headers(), address).await?;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What has been done is said, also where the tenant's memory is full.
    #[tokio::test]
    async fn no_answer_of_a_call_that_changes_something_is_refused() {
        let memory = Memory::new(2 * 1000);
        let tenant = TenantId::new("a").unwrap();
        for (path, refused) in
            [("/tenora.v1.SafetyService/UpdateSafetyPolicy", false), ("/tenora.v1.SafetyService/GetSafetyPolicy", true)]
        {
            let account: SharedAccount = Arc::new(Mutex::new(memory.account(Some(&tenant))));
            let large = Bytes::from(vec![0; SMALL_ANSWER_BYTES as usize + 1]);
            let answer = http::Response::new(Body::new(http_body_util::Full::new(large)));
            assert_eq!(counted(answer, &account, only_reads(path)).await.is_err(), refused, "{path}");
        }
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
