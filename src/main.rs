//! The `tenora` binary: reads the command line and puts the server together where one is asked for.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

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
        // SAFETY: this is the only thread so far, so nobody reads the environment meanwhile.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", threads.to_string()) };
        device::init_pool(threads);
    }
    give_memory_back();
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

/// How often it is looked whether memory can go back to the system, and how much must have come since.
const MEMORY_INTERVAL: Duration = Duration::from_secs(5);
const MEMORY_STEP: u64 = 32 << 20;

/// Gives memory that was freed back to the system, from a thread of its own. The C library keeps what many threads have freed, each in an
/// arena of its own, and would keep the most that the process has ever used.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn give_memory_back() {
    let look = || {
        let mut kept = 0;
        loop {
            std::thread::sleep(MEMORY_INTERVAL);
            let resident = resident_bytes().unwrap_or(0);
            if resident > kept + MEMORY_STEP {
                // SAFETY: it may be called at any time from any thread, and takes the allocator's own locks.
                unsafe { libc::malloc_trim(0) };
                kept = resident_bytes().unwrap_or(resident);
            }
            kept = kept.min(resident);
        }
    };
    // Without the thread the server works as well, and keeps more.
    let _ = std::thread::Builder::new().name("memory".into()).spawn(look);
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn give_memory_back() {}

/// Bytes of this process that are in memory.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn resident_bytes() -> Option<u64> {
    let pages: u64 = std::fs::read_to_string("/proc/self/statm").ok()?.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * 4096)
}

/// Serves until SIGTERM or ctrl-c. Prints the operator key, once in the life of a data folder, and one line when it listens.
async fn serve(config: Config, listen: SocketAddr) -> Result<()> {
    telemetry::init_logs();
    let stop = cli::stop_signal();
    let unusable = |e| Error::precondition("ADDRESS_UNUSABLE", listen, format!("{e}; give another one with --listen"));
    let listener = TcpListener::bind(listen).await.map_err(unusable)?;
    let scheme = if config.tls.is_some() { "https" } else { "http" };
    let address = listener.local_addr().map_err(Error::internal)?;
    let announce = move |what| match what {
        Announcement::OperatorKey(key) => println!("operator key (shown this once, keep it): {key}"),
        Announcement::Serving => println!("listening on {scheme}://{address}"),
    };
    app::run(config, listener, Box::new(announce), Box::pin(stop)).await
}
