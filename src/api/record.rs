//! What is known of a call at its end: for the log, the metrics and its trace.

use std::pin::Pin;
use std::sync::Mutex;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use http_body::{Frame, SizeHint};
use tokio_util::task::task_tracker::TaskTrackerToken;
use tonic::body::Body;
use tonic::codegen::{Bytes, http};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::bodies::Fault;
use super::connections::Busy;
use super::live::{CutBody, LiveCall};
use super::methods::METHODS;
use super::places::Place;
use super::status;
use crate::sync::lock;
use crate::telemetry::traces;

/// How often a refusal is logged of callers whom nobody knows: they could fill the log otherwise.
const STRANGERS_EVERY: Duration = Duration::from_secs(1);

/// The refusals of strangers, of all servers in the process, as is the log.
static STRANGERS: Mutex<Sparse> = Mutex::new(Sparse { last: None, left_out: 0 });

/// Lets through one line in [`STRANGERS_EVERY`], and counts the others.
#[derive(Debug)]
struct Sparse {
    last: Option<Instant>,
    left_out: u64,
}

impl Sparse {
    /// How many were left out since the last one, where it is time for another.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) < STRANGERS_EVERY) {
            self.left_out += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.left_out))
    }
}

/// One call, measured when it is dropped: at the end of its answer, or when its client has gone.
#[derive(Debug)]
pub struct Record {
    path: String,
    since: Instant,
    code: Code,
    /// Why the call failed, for the log.
    failure: Option<Status>,
    /// Whose key came with it; empty until that is known.
    pub caller: String,
    pub trace: Option<traces::Call>,
    pub place: Option<Place>,
    /// Keeps the connection from making room.
    pub busy: Option<Busy>,
    _under_way: TaskTrackerToken,
}

impl Record {
    pub fn new(path: &str, since: Instant, under_way: TaskTrackerToken) -> Self {
        metrics::gauge!("tenora_calls_under_way").increment(1);
        Self {
            path: path.to_owned(),
            since,
            code: Code::Cancelled,
            failure: None,
            caller: String::new(),
            trace: None,
            place: None,
            busy: None,
            _under_way: under_way,
        }
    }

    pub fn refused(mut self, status: Status) -> http::Response<Body> {
        self.failed(status.clone());
        status.into_http()
    }

    fn failed(&mut self, status: Status) {
        self.code = status.code();
        self.failure = (status.code() != Code::Ok).then_some(status);
    }

    /// Follows the answer to its end, or to the deadline. `fault`: why the request's body could not be read on, where that is known.
    pub fn answered(
        mut self,
        response: http::Response<Body>,
        live: LiveCall,
        fault: Fault,
        deadline: Option<Instant>,
    ) -> http::Response<Body> {
        if let Some(refusal) = status::refusal(response.headers()) {
            return self.refused(refusal);
        }
        match Status::from_header_map(response.headers()) {
            Some(_) => {
                self.code = Code::Ok;
                response
            }
            None => response.map(|body| {
                let body = CutBody::new(body, live.cut.clone(), deadline);
                Body::new(TrackedBody { body, record: self, _live: live, fault })
            }),
        }
    }

    fn log_refusal(&self, status: &Status, method: &str, code: &str) {
        let left_out = match self.caller.as_str() {
            "" => match lock(&STRANGERS).admit(Instant::now()) {
                Some(left_out) => (left_out > 0).then_some(left_out),
                None => return,
            },
            _ => None,
        };
        let details = status.get_error_details();
        let reason = details.error_info().map_or("", |info| info.reason.as_str());
        // One line, also where the message lists many.
        let (tenant, error) = (&self.caller, status.message().replace('\n', "; "));
        tracing::info!(%tenant, %method, %code, %reason, %error, left_out, "call refused");
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        // A path that no service has is the caller's invention and must not become a label.
        let method = if METHODS.contains_key(&self.path) { self.path.as_str() } else { "unknown" }.to_owned();
        let code = format!("{:?}", self.code);
        if let Some(status) = &self.failure {
            self.log_refusal(status, &method, &code);
        }
        if let Some(trace) = self.trace.take() {
            let attributes = vec![("rpc.grpc.status", code.clone()), ("tenora.tenant", self.caller.clone())];
            trace.end(&method, attributes, self.failure.as_ref().map(|status| status.message().to_owned()));
        }
        metrics::gauge!("tenora_calls_under_way").decrement(1);
        metrics::counter!("tenora_calls_total", "method" => method.clone(), "code" => code).increment(1);
        metrics::histogram!("tenora_call_seconds", "method" => method).record(self.since.elapsed().as_secs_f64());
    }
}

/// An answer's body that keeps the call's record until it ends.
struct TrackedBody {
    // What is behind the answer ends before the record gives its place back.
    body: CutBody,
    record: Record,
    _live: LiveCall,
    fault: Fault,
}

impl TrackedBody {
    /// How the answer ends, where that is not as its handler said: what is missing in tonic's own statuses is added, and a handler that
    /// has passed over an error of the request's body does not hide it.
    fn corrected(&self, ended: &Status) -> Option<Status> {
        match ended.code() {
            Code::Ok => self.fault.get().cloned(),
            _ if ended.details().is_empty() => Some(status::with_details(ended.clone())),
            _ => None,
        }
    }
}

impl http_body::Body for TrackedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        let trailers = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.trailers_ref());
        let Some(ended) = trailers.and_then(Status::from_header_map) else { return Poll::Ready(frame) };
        let Some(corrected) = this.corrected(&ended) else {
            this.record.failed(ended);
            return Poll::Ready(frame);
        };
        let trailers = status::trailers(&corrected);
        this.record.failed(corrected);
        Poll::Ready(Some(Ok(trailers)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_get_one_line_a_second_and_the_others_are_counted() {
        let mut sparse = Sparse { last: None, left_out: 0 };
        let begin = Instant::now();
        let at = |millis| begin + Duration::from_millis(millis);
        assert_eq!(sparse.admit(at(0)), Some(0));
        assert_eq!((sparse.admit(at(1)), sparse.admit(at(999))), (None, None));
        assert_eq!(sparse.admit(at(1000)), Some(2));
        assert_eq!(sparse.admit(at(1001)), None);
        assert_eq!(sparse.admit(at(9000)), Some(1));
    }
}
