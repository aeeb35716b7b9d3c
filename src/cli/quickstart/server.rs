//! A server for as long as the quickstart runs: a child process of this binary, on a free port.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{ChildStdout, Command};

use crate::api::client::{Client, Target};
use crate::cli::{Failure, Result, models};
use crate::process::Owned;

/// Dropping it kills the process and removes the temporary folder.
pub(super) struct Server {
    pub url: String,
    pub operator_key: String,
    /// From the start of the process to the loaded base.
    pub load_time: Duration,
    _process: Owned,
    /// Kept open, so that the process never writes into a closed pipe.
    _stdout: Lines<BufReader<ChildStdout>>,
    _folder: TempDir,
}

impl Server {
    /// Starts it on a base that is on disk; `data_dir`, or a temporary folder.
    pub(super) async fn start(base: &Path, data_dir: Option<&Path>) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("tenora-quickstart-").tempdir()?;
        let log = folder.path().join("server.log");
        let data_dir = data_dir.map_or_else(|| folder.path().join("data"), Path::to_owned);
        let start = Instant::now();
        let mut process = spawn(base, &data_dir, &log)?;
        let stdout = process.take_stdout().ok_or_else(|| Failure::other("the server has no output"))?;
        let mut server = Self {
            url: String::new(),
            operator_key: String::new(),
            load_time: Duration::ZERO,
            _process: process,
            _stdout: BufReader::new(stdout).lines(),
            _folder: folder,
        };
        let ready = async {
            server.read_ready_lines().await?;
            let client = server.client(&server.operator_key).await?;
            Ok(client.wait_until_serving().await?)
        };
        let bar = models::waiting(format!("the server reads {}", base.display()));
        let ready = ready.await.map_err(|failure| with_log(failure, &log));
        bar.finish_and_clear();
        ready?;
        server.load_time = start.elapsed();
        Ok(server)
    }

    /// The key, which a fresh data folder's server prints, then the address.
    async fn read_ready_lines(&mut self) -> Result<()> {
        while let Some(line) = self._stdout.next_line().await? {
            if let Some(url) = line.strip_prefix("listening on ") {
                self.url = url.to_owned();
                return match self.operator_key.is_empty() {
                    true => Err(Failure::other("the data folder has been used before; give an empty one")),
                    false => Ok(()),
                };
            }
            if let Some((_, key)) = line.split_once("operator key").and_then(|(_, rest)| rest.rsplit_once(": ")) {
                self.operator_key = key.to_owned();
            }
        }
        Err(Failure::other("the server ended before it was ready"))
    }

    pub(super) async fn client(&self, key: &str) -> Result<Client> {
        let target = Target { server: self.url.clone(), key: Some(key.to_owned()), tls_ca: None };
        Ok(Client::connect(&target).await?)
    }
}

fn spawn(base: &Path, data_dir: &Path, log: &Path) -> Result<Owned> {
    let binary: PathBuf = std::env::current_exe()?;
    let log = std::fs::File::create(log).map_err(Failure::at(log))?;
    let mut command = Command::new(&binary);
    command.args(["serve", "--listen", "127.0.0.1:0", "--data-dir"]).arg(data_dir).arg("--base").arg(base);
    Owned::spawn(command.stderr(log)).map_err(Failure::at(binary))
}

/// The last lines of the server's log say why.
fn with_log(failure: Failure, log: &Path) -> Failure {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(10)..].join("\n  ");
    Failure::other(format!("{failure}\nthe server's log ends with:\n  {tail}"))
}
