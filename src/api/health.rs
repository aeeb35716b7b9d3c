//! Questions about the server's health, which everyone may ask at all times: little is taken for them, and few may last.

use std::convert::Infallible;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http_body::{Frame, SizeHint};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Bytes, Service as _, http};
use tonic::service::Routes;

use super::bodies::HEAD;
use super::connections::address_of;
use super::deadline::within;
use super::live::CutBody;
use super::places::{Limit, Place, Places};
use super::status;
use crate::config::Limits;
use crate::error::Error;

/// Where such questions go.
pub const PREFIX: &str = "/grpc.health.v1.Health/";
/// The one of the methods whose calls last.
const WATCH: &str = "/grpc.health.v1.Health/Watch";
/// In which a question must have come: those who probe ask in one piece.
const QUESTION_TIME: Duration = Duration::from_secs(5);
/// When a refused client may ask again.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// The service, and how much of it may be asked. Clones share it.
#[derive(Debug, Clone)]
pub struct Health {
    routes: Routes,
    checks: Places<IpAddr>,
    watches: Places<IpAddr>,
    /// Bytes of one question.
    most: Limit,
}

impl Health {
    pub fn new(routes: Routes, limits: &Limits) -> Self {
        let checks = ("max_keyless_calls", limits.max_keyless_calls);
        let watches = ("max_health_watches", limits.max_health_watches);
        let each = (watches.0, (watches.1 / 4).max(1));
        Self {
            routes,
            checks: Places::new("health checks", checks, checks, RETRY_AFTER),
            watches: Places::new("health watches", watches, each, RETRY_AFTER),
            most: ("max_health_request_bytes", limits.max_health_request_bytes),
        }
    }

    /// Answers one question. It holds its place until its answer has been sent.
    pub fn answer(
        &self,
        request: http::Request<Body>,
        deadline: Option<Instant>,
    ) -> BoxFuture<http::Response<Body>, Infallible> {
        let lasts = request.uri().path() == WATCH;
        let places = if lasts { &self.watches } else { &self.checks };
        let place = match places.take_for(&address_of(request.extensions())) {
            Ok(place) => place,
            Err(full) => return Box::pin(std::future::ready(Ok(Status::from(full).into_http()))),
        };
        let (most, mut routes) = (self.most, self.routes.clone());
        Box::pin(async move {
            let work = async {
                let (head, body) = request.into_parts();
                let question = tokio::time::timeout(QUESTION_TIME, whole(body, most)).await;
                let question = question.map_err(|_| Error::DeadlineExceeded)??;
                let Ok(response) = routes.call(http::Request::from_parts(head, question)).await;
                Ok(response)
            };
            let late = || Err(Error::DeadlineExceeded.into());
            let response = match within(deadline, work).await.unwrap_or_else(late) {
                Ok(response) => response,
                Err(status) => return Ok(Status::into_http(status)),
            };
            Ok(match status::refusal(response.headers()) {
                Some(refusal) => refusal.into_http(),
                None => response.map(|body| {
                    // An answer that is not taken keeps its place no longer than a question that does not come.
                    let end = Instant::now() + QUESTION_TIME;
                    let end = if lasts { deadline } else { Some(deadline.map_or(end, |deadline| deadline.min(end))) };
                    Body::new(HealthBody { body: CutBody::new(body, Arc::default(), end), _place: place })
                }),
            })
        })
    }
}

/// A question's bytes, once all of them are there.
async fn whole(body: Body, most: Limit) -> Result<Body, Status> {
    let bytes = usize::try_from(most.1).unwrap_or(usize::MAX).saturating_add(HEAD);
    match Limited::new(body, bytes).collect().await {
        Ok(question) => Ok(Body::new(Full::new(question.to_bytes()))),
        Err(error) if error.is::<LengthLimitError>() => Err(status::over(most)),
        Err(error) => Err(status::malformed(&error.to_string())),
    }
}

/// An answer about health, with its place.
struct HealthBody {
    body: CutBody,
    _place: Place<IpAddr>,
}

impl http_body::Body for HealthBody {
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
