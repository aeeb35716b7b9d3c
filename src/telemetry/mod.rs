//! What an operator sees of the process: logs on stderr, the port for Prometheus ([`port`]), spans for a collector ([`traces`]).

pub mod described;
mod port;
pub mod traces;

use std::io::IsTerminal as _;

pub use port::{Serving, serve_metrics};

/// Logs at `info` unless `RUST_LOG` says otherwise. The first call wins.
pub fn init_logs() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second call in the same process (tests) keeps the first subscriber.
    let _ = logs.with_ansi(std::io::stderr().is_terminal()).try_init();
}
