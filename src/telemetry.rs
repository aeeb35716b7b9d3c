//! Logs to stderr and metrics for Prometheus.

/// Logs at `info` unless `RUST_LOG` says otherwise. The first call wins.
pub fn init_logs() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    // A second call in the same process (tests) keeps the first subscriber.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}
