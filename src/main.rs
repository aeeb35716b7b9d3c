//! The `tenora` binary: reads the command line and puts the server together where one is asked for.

#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[path = "main/trim.rs"]
mod trim;

use std::net::SocketAddr;
use std::process::ExitCode;

use clap::Parser as _;
use tenora::app::{self, Announcement};
use tenora::config::Config;
use tenora::error::{Error, Result};
use tenora::{cli, device, telemetry};
use tokio::net::TcpListener;

fn main() -> ExitCode {
    let command_line = cli::CommandLine::parse();
    if let Some(threads) = command_line.compute_threads() {
        // candle asks this variable, not the pool, how many pieces to cut its work into.
        #[expect(unsafe_code, reason = "the environment is the C library's")]
        // SAFETY: this is the only thread so far, so nobody reads the environment meanwhile.
        unsafe {
            std::env::set_var("RAYON_NUM_THREADS", threads.to_string())
        };
        device::init_pool(threads);
    }
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("error: cannot start the runtime: {e}");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(command_line.run(|config, listen| Box::pin(serve(config, listen))));
    // A thread may still be waiting for a line of stdin that never comes.
    runtime.shutdown_background();
    code
}

/// Serves until SIGTERM or ctrl-c. Prints the operator key, once in the life of a data folder, and one line when it listens.
async fn serve(config: Config, listen: SocketAddr) -> Result<()> {
    telemetry::init_logs();
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    trim::give_memory_back();
    let stop = cli::stop_signal();
    let unusable = |e| Error::precondition("ADDRESS_UNUSABLE", listen, format!("{e}; give another one with --listen"));
    let listener = TcpListener::bind(listen).await.map_err(unusable)?;
    let scheme = if config.tls.is_some() { "https" } else { "http" };
    let address = listener.local_addr().map_err(Error::internal)?;
    let mut loading = cli::Loading::default();
    let announce = move |what| match what {
        Announcement::Loading { done, total } => loading.show(done, total),
        Announcement::OperatorKey(key) => println!("operator key (shown this once, keep it): {key}"),
        Announcement::Serving => println!("listening on {scheme}://{address}"),
    };
    app::run(config, listener, Box::new(announce), Box::pin(stop)).await
}
