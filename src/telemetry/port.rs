//! The port for Prometheus: `/metrics`, and `/health` that says what gRPC's health says.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

use crate::error::{Error, Result};
use crate::sync::lock;
use crate::telemetry::described::describe;

/// Upper bounds of the histograms of whole calls. Seconds.
const CALL_SECONDS: [f64; 9] = [0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0];
/// Upper bounds of the histogram of the time between two tokens. Seconds.
const TOKEN_SECONDS: [f64; 11] = [0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0];

/// Connections answered at once; others wait.
const CONNECTIONS: usize = 32;
/// Time to ask and to take the answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest question. Bytes.
const MAX_QUESTION: usize = 8 << 10;
/// How often the samples of the histograms are put into their buckets where nobody asks.
const UPKEEP: Duration = Duration::from_secs(5);
/// Pause after a connection could not be taken, as where there are no file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Whether the server serves: neither loads its base nor drains. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Serving(Arc<AtomicBool>);

impl Serving {
    /// Sets it for all clones.
    pub fn set(&self, serving: bool) {
        self.0.store(serving, Ordering::Release);
    }

    /// Returns what was set last; false at first.
    pub fn get(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Answers HTTP on `addr` until the handle is dropped.
///
/// # Errors
/// INVALID_ARGUMENT where nothing can listen there.
pub fn serve_metrics(addr: SocketAddr, serving: Serving) -> Result<AbortOnDropHandle<()>> {
    let refused = |e: &dyn std::fmt::Display| Error::invalid("--metrics-listen", format!("{addr}: {e}"));
    let recorder = recorder().map_err(|e| refused(&e))?;
    let listener = std::net::TcpListener::bind(addr).map_err(|e| refused(&e))?;
    listener.set_nonblocking(true).map_err(|e| refused(&e))?;
    let listener = TcpListener::from_std(listener).map_err(|e| refused(&e))?;
    if !addr.ip().is_loopback() {
        tracing::warn!(address = %addr, "metrics are shown without a key to everyone who reaches this address");
    }
    Ok(AbortOnDropHandle::new(tokio::spawn(async move {
        let upkeep = async {
            loop {
                tokio::time::sleep(UPKEEP).await;
                recorder.run_upkeep();
            }
        };
        tokio::join!(upkeep, accept(&listener, &recorder, &serving));
    })))
}

/// The process's recorder: one, however many servers there are.
fn recorder() -> Result<PrometheusHandle, metrics_exporter_prometheus::BuildError> {
    static RECORDER: Mutex<Option<PrometheusHandle>> = Mutex::new(None);
    let mut made = lock(&RECORDER);
    if let Some(handle) = &*made {
        return Ok(handle.clone());
    }
    let between_tokens = Matcher::Full("tenora_time_between_tokens_seconds".into());
    let builder = PrometheusBuilder::new().set_buckets(&CALL_SECONDS)?;
    let handle = builder.set_buckets_for_metric(between_tokens, &TOKEN_SECONDS)?.install_recorder()?;
    describe();
    Ok(made.insert(handle).clone())
}

async fn accept(listener: &TcpListener, recorder: &PrometheusHandle, serving: &Serving) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // Never closed.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (recorder, serving) = (recorder.clone(), serving.clone());
                tokio::spawn(async move {
                    // Who is too slow, or goes away, gets nothing.
                    let _ = tokio::time::timeout(PATIENCE, answer(stream, recorder, serving)).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection to the metrics port was not taken");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Reads one HTTP/1 question, answers and closes.
async fn answer(mut stream: TcpStream, recorder: PrometheusHandle, serving: Serving) -> std::io::Result<()> {
    let question = read_question(&mut stream).await?;
    let mut words = question.split(|byte| byte.is_ascii_whitespace());
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.split(|byte| *byte == b'?').next().unwrap_or_default();
    let (status, body) = match (method, path) {
        (b"GET" | b"HEAD", b"/health") if serving.get() => ("200 OK", "SERVING\n".to_owned()),
        (b"GET" | b"HEAD", b"/health") => ("503 Service Unavailable", "NOT_SERVING\n".to_owned()),
        (b"GET" | b"HEAD", b"/metrics" | b"/") => {
            let text = tokio::task::spawn_blocking(move || recorder.render()).await.map_err(std::io::Error::other)?;
            ("200 OK", text)
        }
        (b"GET" | b"HEAD", _) => ("404 Not Found", "there are /metrics and /health\n".to_owned()),
        _ => ("405 Method Not Allowed", "ask with GET\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    if method != b"HEAD" {
        stream.write_all(body.as_bytes()).await?;
    }
    stream.shutdown().await
}

/// The first line and the headers.
async fn read_question(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Vec<u8>> {
    let mut question = Vec::new();
    let mut piece = [0; 1024];
    while !question.windows(4).any(|end| end == b"\r\n\r\n") && question.len() < MAX_QUESTION {
        match stream.read(&mut piece).await? {
            0 => break,
            n => question.extend_from_slice(&piece[..n]),
        }
    }
    Ok(question)
}
