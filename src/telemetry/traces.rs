//! Spans for an OpenTelemetry collector, by OTLP over HTTP as JSON. Off unless [`start`] is called; then a span costs a message to a task
//! of its own, and where the collector does not keep up spans are dropped, never calls.

use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hyper::header::CONTENT_TYPE;
use hyper::{Request, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use crate::error::{Error, Result};

/// Spans that wait for the collector; more are dropped.
const WAITING: usize = 8192;
/// Spans of one message.
const BATCH: usize = 512;
/// How long a span waits for others to be sent with.
const INTERVAL: Duration = Duration::from_secs(1);
/// Time that the collector has for a message.
const PATIENCE: Duration = Duration::from_secs(5);

static SPANS: OnceLock<mpsc::Sender<Message>> = OnceLock::new();

#[derive(Debug)]
enum Message {
    Span(Box<Span>),
    /// Answered when all spans before it are sent or given up.
    Flush(oneshot::Sender<()>),
}

/// What the spans of one call belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Context {
    trace: u128,
    /// Their parent.
    span: u64,
}

/// A piece of work that is over.
#[derive(Debug)]
pub struct Span {
    context: Context,
    parent: Option<u64>,
    name: String,
    /// A call, not a part of one.
    is_call: bool,
    start: SystemTime,
    end: SystemTime,
    attributes: Vec<(&'static str, String)>,
    error: Option<String>,
}

/// A call under way, whose span is sent by [`Call::end`].
#[derive(Debug)]
pub struct Call {
    context: Context,
    parent: Option<u64>,
    start: Instant,
}

/// Sends spans to the collector at `endpoint` from now on, for the life of the process.
///
/// # Errors
/// INVALID_ARGUMENT where the endpoint is no `http://` address.
pub fn start(endpoint: &str) -> Result<()> {
    let url = format!("{}/v1/traces", endpoint.trim_end_matches('/'));
    let uri: Uri = url.parse().map_err(|e| Error::invalid("--otlp-endpoint", format!("{endpoint:?}: {e}")))?;
    if uri.scheme_str() != Some("http") || uri.host().is_none() {
        let message = format!("{endpoint:?} is no http:// address; a collector's is http://127.0.0.1:4318");
        return Err(Error::invalid("--otlp-endpoint", message));
    }
    let (sender, spans) = mpsc::channel(WAITING);
    if SPANS.set(sender).is_ok() {
        tokio::spawn(export(uri, spans));
    }
    Ok(())
}

/// Waits until what has been recorded is with the collector, at most so long.
pub async fn flush(patience: Duration) {
    let Some(spans) = SPANS.get() else { return };
    let (sender, done) = oneshot::channel();
    let flushed = async {
        // Where the task is gone there is nothing to wait for.
        if spans.send(Message::Flush(sender)).await.is_ok() {
            let _ = done.await;
        }
    };
    let _ = tokio::time::timeout(patience, flushed).await;
}

impl Call {
    /// Begins a call's span, below the caller's own where a W3C `traceparent` names one; `None` where nothing is recorded, or where the
    /// caller does not want its trace recorded.
    pub fn begin(traceparent: Option<&str>) -> Option<Self> {
        SPANS.get()?;
        let (trace, parent) = match traceparent.and_then(parse_traceparent) {
            Some((_, _, false)) => return None,
            Some((trace, parent, true)) => (trace, Some(parent)),
            None => (rand::random(), None),
        };
        Some(Self { context: Context { trace, span: rand::random() }, parent, start: Instant::now() })
    }

    /// Returns what the parts of the call belong to.
    pub fn context(&self) -> Context {
        self.context
    }

    /// Ends the span and sends it.
    pub fn end(self, method: &str, attributes: Vec<(&'static str, String)>, error: Option<String>) {
        let Self { context, parent, start } = self;
        let (start, end) = (wall_clock(start), SystemTime::now());
        let name = method.trim_start_matches('/').to_owned();
        send(Span { context, parent, name, is_call: true, start, end, attributes, error });
    }
}

impl Context {
    /// Sends the span of a part of the call.
    pub fn part(&self, name: &str, start: Instant, end: Instant, attributes: Vec<(&'static str, String)>) {
        let context = Self { trace: self.trace, span: rand::random() };
        let (parent, name, start, end) = (Some(self.span), name.to_owned(), wall_clock(start), wall_clock(end));
        send(Span { context, parent, name, is_call: false, start, end, attributes, error: None });
    }
}

fn send(span: Span) {
    if let Some(spans) = SPANS.get()
        && spans.try_send(Message::Span(Box::new(span))).is_err()
    {
        metrics::counter!("tenora_spans_dropped_total").increment(1);
    }
}

/// The time of day at an instant that has passed.
fn wall_clock(at: Instant) -> SystemTime {
    SystemTime::now().checked_sub(at.elapsed()).unwrap_or(UNIX_EPOCH)
}

/// Trace, parent and whether it is recorded, from `00-{32 hex}-{16 hex}-{2 hex}`.
fn parse_traceparent(text: &str) -> Option<(u128, u64, bool)> {
    let parts: Vec<&str> = text.split('-').collect();
    let [version, trace, parent, flags, ..] = parts[..] else { return None };
    let lengths = (version.len(), trace.len(), parent.len(), flags.len());
    let is_hex = parts[..4].iter().all(|part| part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)));
    if lengths != (2, 32, 16, 2) || !is_hex || version == "ff" || (version == "00" && parts.len() != 4) {
        return None;
    }
    let trace = u128::from_str_radix(trace, 16).ok().filter(|trace| *trace != 0)?;
    let parent = u64::from_str_radix(parent, 16).ok().filter(|parent| *parent != 0)?;
    Some((trace, parent, u8::from_str_radix(flags, 16).ok()? & 1 == 1))
}

/// Sends what comes in batches until the process ends.
async fn export(uri: Uri, mut spans: mpsc::Receiver<Message>) {
    let client = Client::builder(TokioExecutor::new()).build(HttpConnector::new());
    while let Some(first) = spans.recv().await {
        let (batch, flushed) = collect(first, &mut spans).await;
        if !batch.is_empty() {
            let count = batch.len();
            match tokio::time::timeout(PATIENCE, post(&client, &uri, &batch)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(collector = %uri, %error, count, "spans were not taken"),
                Err(_) => tracing::warn!(collector = %uri, error = "no answer in time", count, "spans were not taken"),
            }
        }
        // Who waited may have lost patience.
        let _ = flushed.map(|done| done.send(()));
    }
}

/// The spans that come with a first one within [`INTERVAL`], at most [`BATCH`], and who waits for them to be sent.
async fn collect(first: Message, spans: &mut mpsc::Receiver<Message>) -> (Vec<Span>, Option<oneshot::Sender<()>>) {
    let mut batch = Vec::new();
    let end = tokio::time::Instant::now() + INTERVAL;
    let mut next = Some(first);
    while let Some(message) = next {
        match message {
            Message::Span(span) => batch.push(*span),
            Message::Flush(done) => return (batch, Some(done)),
        }
        next = match batch.len() < BATCH {
            true => tokio::time::timeout_at(end, spans.recv()).await.ok().flatten(),
            false => None,
        };
    }
    (batch, None)
}

async fn post(client: &Client<HttpConnector, String>, uri: &Uri, batch: &[Span]) -> Result<(), String> {
    let request = Request::post(uri.clone()).header(CONTENT_TYPE, "application/json").body(message(batch).to_string());
    let answer = client.request(request.map_err(|e| e.to_string())?).await.map_err(|e| e.to_string())?;
    if answer.status().is_success() { Ok(()) } else { Err(format!("HTTP {}", answer.status())) }
}

/// OTLP's ExportTraceServiceRequest.
fn message(batch: &[Span]) -> Value {
    let resource =
        attributes(&[("service.name", "tenora".into()), ("service.version", env!("CARGO_PKG_VERSION").into())]);
    let spans: Vec<Value> = batch.iter().map(Span::json).collect();
    let scope = json!({ "name": "tenora" });
    json!({ "resourceSpans": [{ "resource": { "attributes": resource }, "scopeSpans": [{ "scope": scope, "spans": spans }] }] })
}

fn attributes(of: &[(&'static str, String)]) -> Vec<Value> {
    of.iter().map(|(key, value)| json!({ "key": key, "value": { "stringValue": value } })).collect()
}

impl Span {
    fn json(&self) -> Value {
        let nanos = |at: SystemTime| at.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos().to_string();
        // SPAN_KIND_SERVER and SPAN_KIND_INTERNAL; STATUS_CODE_ERROR and STATUS_CODE_UNSET.
        let mut span = json!({
            "traceId": format!("{:032x}", self.context.trace), "spanId": format!("{:016x}", self.context.span),
            "name": self.name, "kind": if self.is_call { 2 } else { 1 },
            "startTimeUnixNano": nanos(self.start), "endTimeUnixNano": nanos(self.end),
            "attributes": attributes(&self.attributes),
            "status": match &self.error {
                Some(error) => json!({ "code": 2, "message": error }),
                None => json!({ "code": 0 }),
            },
        });
        if let Some(parent) = self.parent {
            span["parentSpanId"] = json!(format!("{parent:016x}"));
        }
        span
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traceparents_are_read() {
        let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
        let expected = Some((0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736, 0x00f0_67aa_0ba9_02b7));
        let read = |text: &str| parse_traceparent(text);
        assert_eq!(read(&format!("00-{trace}-{parent}-01")), expected.map(|(t, p)| (t, p, true)));
        assert_eq!(read(&format!("00-{trace}-{parent}-00")), expected.map(|(t, p)| (t, p, false)));
        assert_eq!(
            read(&format!("01-{trace}-{parent}-01-more")),
            expected.map(|(t, p)| (t, p, true)),
            "a later version"
        );
        for wrong in [
            String::new(),
            "00-x-y-01".into(),
            format!("00-{trace}-{parent}"),
            format!("00-{trace}-{parent}-01-more"),
            format!("ff-{trace}-{parent}-01"),
            format!("00-{}-{parent}-01", "0".repeat(32)),
            format!("00-{trace}-{}-01", "0".repeat(16)),
            format!("00-{}-{parent}-01", trace.to_uppercase()),
            format!("00-+{}-{parent}-01", &trace[1..]),
        ] {
            assert_eq!(read(&wrong), None, "{wrong}");
        }
    }

    #[test]
    fn an_endpoint_is_an_http_address() {
        for wrong in ["", "127.0.0.1:4318", "https://x:4318", "grpc://x", "http://"] {
            assert!(start(wrong).unwrap_err().to_string().contains("--otlp-endpoint"), "{wrong:?}");
        }
        assert!(SPANS.get().is_none());
    }
}
