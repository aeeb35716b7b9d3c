//! What an operator sets: where to listen, where data lies, which base, and every limit by its name.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::device::DeviceSpec;
use crate::error::{Error, Result};

/// The configuration of one server process.
#[derive(Debug, Clone)]
pub struct Config {
    /// Catalogue, blobs and uploads live below it.
    pub data_dir: PathBuf,
    /// The GGUF file of the base, already on disk.
    pub base: PathBuf,
    /// What exports call the base, in a name that PEFT's tools can load; `None`: the file's.
    pub base_name: Option<String>,
    /// The format to which a base's matrices of floats are quantised, by GGUF's name; `None`: they are served as they are.
    pub quantize: Option<String>,
    /// Refuses imported adapters whose files name another base.
    pub strict_base: bool,
    /// Tokens; `None` is what the base was trained for.
    pub context: Option<usize>,
    /// Where the base is served.
    pub device: DeviceSpec,
    /// Worker threads of the compute pool.
    pub threads: usize,
    /// How the KV cache holds keys and values.
    pub kv_cache: KvCacheType,
    /// Prometheus text format; `None` is off.
    pub metrics_listen: Option<SocketAddr>,
    /// OpenTelemetry collector that gets spans of calls, `http://HOST:4318`; `None` is off.
    pub otlp_endpoint: Option<String>,
    /// Everyone is the operator and every tenant. Refused beyond loopback.
    pub insecure_no_auth: bool,
    /// Revokes all operator keys at the start and makes a new one.
    pub rotate_operator_key: bool,
    /// The server's certificate; without one, connections are in clear text.
    pub tls: Option<TlsFiles>,
    /// Plaintext beyond loopback is refused unless this is set.
    pub allow_plaintext: bool,
    /// Starts over blobs that the catalogue does not know, and moves them to the trash.
    pub adopt_orphans: bool,
    /// Lets tenants train copies of the base's own tensors.
    pub allow_full_fine_tuning: bool,
    /// Every limit.
    pub limits: Limits,
}

/// PEM files.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// The certificate chain, in PEM.
    pub cert: PathBuf,
    /// The certificate's private key, in PEM.
    pub key: PathBuf,
}

/// How the KV cache holds keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvCacheType {
    /// In half precision.
    #[default]
    F16,
    /// In bytes, with a half-precision scale for each 32 dimensions: about half of the memory, on the CPU only.
    Q8_0,
}

impl FromStr for KvCacheType {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "f16" => Ok(Self::F16),
            "q8_0" => Ok(Self::Q8_0),
            _ => Err(Error::invalid("kv_cache_dtype", format!("{name:?} is neither f16 nor q8_0"))),
        }
    }
}

/// A limit, for people.
#[derive(Debug, Clone, Copy)]
pub struct LimitInfo {
    /// As `--limit` takes it.
    pub name: &'static str,
    /// Its value unless it is set.
    pub default: u64,
    /// What the value counts.
    pub unit: &'static str,
    /// What is limited, and what 0 means where it means something of its own.
    pub meaning: &'static str,
}

macro_rules! limits {
    ($($(#[doc = $doc:literal])+ $name:ident = $default:expr, $unit:literal;)*) => {
        /// Every limit, with its name, default and unit. Set with `--limit name=value`.
        ///
        /// ```
        /// use tenora::config::Limits;
        ///
        /// let mut limits = Limits::default();
        /// limits.set("max_rank", 64)?;
        /// assert_eq!(limits.max_rank, 64);
        /// assert!(limits.set("max_ranks", 64).is_err(), "an unknown name is an error that lists the known ones");
        /// # Ok::<(), tenora::error::Error>(())
        /// ```
        #[derive(Debug, Clone)]
        pub struct Limits { $($(#[doc = $doc])+ pub $name: u64,)* }

        impl Default for Limits {
            fn default() -> Self { Self { $($name: $default,)* } }
        }

        impl Limits {
            /// What is known of each, in the order of the definition.
            pub const TABLE: &'static [LimitInfo] = &[$(LimitInfo {
                name: stringify!($name),
                default: $default,
                unit: $unit,
                meaning: concat!($($doc),+),
            },)*];

            /// Returns (name, value, unit) of each, as they are set here.
            pub fn values(&self) -> Vec<(&'static str, u64, &'static str)> {
                vec![$((stringify!($name), self.$name, $unit),)*]
            }

            /// Sets one by name.
            pub fn set(&mut self, name: &str, value: u64) -> Result<()> {
                if let Some((_, range)) = RANGES.iter().find(|(known, range)| *known == name && !range.contains(&value)) {
                    let message = format!("{name} is {value}; it must be in {}..={}", range.start(), range.end());
                    return Err(Error::invalid("limit", message));
                }
                match name {
                    $(stringify!($name) => self.$name = value,)*
                    _ => {
                        let names: Vec<_> = Self::TABLE.iter().map(|limit| limit.name).collect();
                        return Err(Error::invalid("limit", format!("no limit is called {name:?}; there are {}", names.join(", "))));
                    }
                }
                Ok(())
            }
        }
    };
}

const MIB: u64 = 1 << 20;

limits! {
    /// One gRPC message of an upload, and of an answer. Larger ones are OUT_OF_RANGE.
    max_message_bytes = 4 * MIB, "bytes";
    /// The message of a call that is no upload. Larger ones are OUT_OF_RANGE.
    max_request_bytes = 4 * MIB, "bytes";
    /// Time in which the message of a call that is no upload must have come.
    request_seconds = 60, "seconds";
    /// One uploaded dataset.
    max_dataset_bytes = 256 * MIB, "bytes";
    /// Records of one dataset.
    max_dataset_records = 1_000_000, "records";
    /// One record of a dataset.
    max_record_bytes = MIB, "bytes";
    /// Records that one report on a dataset shows.
    max_shown_records = 100, "records";
    /// All files of one imported adapter.
    max_adapter_bytes = 1024 * MIB, "bytes";
    /// Rank of an adapter.
    max_rank = 256, "rank";
    /// Tokens that an adapter puts before a sequence.
    max_virtual_tokens = 256, "tokens";
    /// Tokens to which an adapter gives rows of its own in the embedding, or in the head.
    max_trained_tokens = 256, "tokens";
    /// Sequences decoded at once.
    max_running = 48, "sequences";
    /// Sequences of one tenant waiting or running: an answer is one, a score one for each input.
    max_queued_per_tenant = 256, "sequences";
    /// Sequences of all tenants waiting or running. A tenant with fewer than another takes the place of that one's newest waiting request.
    max_queued = 1024, "sequences";
    /// Bytes of one answer that may wait to be read; more ends it.
    max_unread_answer_bytes = MIB, "bytes";
    /// Memory of what calls bring and what waits to be read of answers (one half), and of imports, exports and datasets read whole (the other).
    max_request_memory_bytes = 512 * MIB, "bytes";
    /// Rows of one engine step: one for each sequence that decodes, the others for prompts. Must be more than `max_running`.
    max_step_rows = 256, "rows";
    /// Rows of prompts in a step in which other sequences decode: what a long prompt may add to the time between their tokens.
    max_prefill_rows_while_decoding = 64, "rows";
    /// Tokens a KV block holds.
    kv_block_tokens = 16, "tokens";
    /// Memory of the KV cache.
    kv_cache_bytes = 768 * MIB, "bytes";
    /// Part of the KV cache that may keep what has been computed, for requests that begin alike, while nobody uses it. 0 turns the prefix
    /// cache off.
    prefix_cache_percent = 100, "percent";
    /// Memory of adapter versions that are ready to serve.
    adapter_cache_bytes = 2048 * MIB, "bytes";
    /// Part of `adapter_cache_bytes` that the running requests of one tenant may hold. One version it may always hold.
    adapter_cache_percent_per_tenant = 50, "percent";
    /// Host memory for adapter versions that had to leave `adapter_cache_bytes`: they come back without a read. 0: none.
    adapter_host_bytes = 256 * MIB, "bytes";
    /// Time that a request waits for its adapter's version to find room while all others are in use.
    adapter_wait_seconds = 10, "seconds";
    /// Jobs of one tenant that have not ended.
    max_jobs_per_tenant = 32, "jobs";
    /// Tokens of one record in training.
    max_record_tokens = 8192, "tokens";
    /// Memory of a training: its adapter, gradients, optimizer and activations. A job that needs more at its smallest is refused. By default
    /// about as much as all else that the server may take beside the base, so that both together fit a machine of 8 GB.
    max_training_bytes = 4096 * MIB, "bytes";
    /// Optimizer steps of one job.
    max_training_steps = 1_000_000, "steps";
    /// Tokens that all steps of one job see: one job at a time trains.
    max_training_tokens = 100_000_000, "tokens";
    /// Memory of a full fine-tuning's values, gradients, moments and copies of values, 24 bytes for each value that it trains. Only where
    /// `--allow-full-fine-tuning` is set.
    max_full_fine_tuning_bytes = 8192 * MIB, "bytes";
    /// Free space on the disk of the data folder without which no training starts: its result could not be saved.
    min_free_disk_bytes = 256 * MIB, "bytes";
    /// Time that a finished training goes on trying to publish its adapter; then the job is INTERRUPTED, and resuming it publishes.
    publish_retry_seconds = 600, "seconds";
    /// Records of one optimizer step: batch size times accumulation.
    max_batch_records = 4096, "records";
    /// Datasets of one tenant.
    max_datasets_per_tenant = 1000, "datasets";
    /// Adapters of one tenant.
    max_adapters_per_tenant = 10_000, "adapters";
    /// Versions of one adapter.
    max_versions_per_adapter = 10_000, "versions";
    /// Blocked phrases of one tenant.
    max_blocked_phrases = 1000, "phrases";
    /// One blocked phrase.
    max_phrase_bytes = 256, "bytes";
    /// Text that one call checks for blocked phrases.
    max_check_text_bytes = 65_536, "bytes";
    /// Memory of blocked phrases kept compiled.
    policy_cache_bytes = 64 * MIB, "bytes";
    /// Messages of one chat, in a request or in a record of a dataset.
    max_chat_messages = 1000, "messages";
    /// Longest answer a request may ask for.
    max_answer_tokens = 8192, "tokens";
    /// Answers that one request may ask for. Each counts as a request of its own.
    max_sequences_per_request = 16, "sequences";
    /// Entries of one request's `logit_bias`.
    max_logit_biases = 1024, "entries";
    /// Text of one Tokenize.
    max_tokenize_bytes = 256 << 10, "bytes";
    /// Ids of one Detokenize.
    max_detokenize_tokens = 65_536, "tokens";
    /// Tenants whose requests the metrics show under a name of their own, the first that come; all later ones are `other`. 0: no figure
    /// has a tenant. `--metrics-by-tenant` sets it.
    max_metric_tenants = 0, "tenants";
    /// Stop strings of one request.
    max_stop_strings = 16, "strings";
    /// One stop string.
    max_stop_bytes = 256, "bytes";
    /// Most of the compute that training takes while requests are running.
    train_share_percent = 40, "percent";
    /// Streams of one connection.
    max_streams_per_connection = 256, "streams";
    /// Calls of tenants under way on all connections. A tenant may have as many as it leaves to others, and one in any case, so that each
    /// further tenant adds one where there are none left.
    max_calls = 4096, "calls";
    /// Calls of one tenant under way.
    max_calls_per_tenant = 1024, "calls";
    /// Checks of the server's health under way, and as many calls whose key is not known yet and is looked up. Shared among addresses, or
    /// IPv6 /64, as `max_calls` is among tenants.
    max_keyless_calls = 1024, "calls";
    /// Uploads under way, imports to the end of their publication; shared among tenants as `max_calls` is.
    max_uploads = 8, "uploads";
    /// Uploads of one tenant under way.
    max_uploads_per_tenant = 4, "uploads";
    /// Datasets and adapters that are being read whole for inspection, validation or export; shared among tenants as `max_calls` is.
    max_reads = 8, "reads";
    /// The same of one tenant.
    max_reads_per_tenant = 2, "reads";
    /// Open connections. Where there are as many, one is closed for a new one: the oldest over which nobody has called with a valid key, of
    /// the address that has most of them; else the one that has been idle for longest; else one that a tenant has beyond as many as it
    /// leaves to others.
    max_connections = 1024, "connections";
    /// The same from one address, or one IPv6 /64.
    max_connections_per_address = 512, "connections";
    /// Time in which a connection must have ended its TLS handshake, and again in which it must begin to speak HTTP/2.
    handshake_seconds = 10, "seconds";
    /// Watches of the server's health under way, which need no key. One address, or IPv6 /64, may have a quarter of them.
    max_health_watches = 256, "calls";
    /// The message of a question about health, which needs no key. Larger ones are OUT_OF_RANGE.
    max_health_request_bytes = 1024, "bytes";
    /// A connection that is silent for this long is asked for a sign of life, and closed without one.
    keepalive_seconds = 20, "seconds";
    /// Time that answers under way get after SIGTERM.
    drain_timeout_seconds = 30, "seconds";
    /// Uploads that send no data for this long end.
    upload_idle_seconds = 60, "seconds";
    /// Data that an upload must send on average over `upload_idle_seconds`.
    upload_min_bytes_per_second = 1024, "bytes";
    /// Longest time of one upload.
    upload_seconds = 3600, "seconds";
    /// An export whose client takes nothing for this long ends.
    export_idle_seconds = 60, "seconds";
    /// Blobs that a start finds without an owner stay in the data folder's `trash/` for this long.
    trash_days = 30, "days";
    /// How long a training job that has ended is kept, with its events. 0: for ever.
    job_days = 365, "days";
    /// How long a `request_id` is known: as long, the same call under it gives the first one's result. 0: for ever.
    request_id_days = 30, "days";
}

/// Values that a limit may have, where not all make sense.
const RANGES: &[(&str, std::ops::RangeInclusive<u64>)] = &[
    ("max_message_bytes", 1024..=1 << 30),
    ("max_unread_answer_bytes", 4096..=1 << 30),
    ("max_request_memory_bytes", MIB..=1 << 40),
    ("max_prefill_rows_while_decoding", 1..=u64::MAX),
    ("max_shown_records", 0..=10_000),
    ("kv_block_tokens", 1..=4096),
    ("max_sequences_per_request", 1..=256),
    ("max_logit_biases", 0..=1 << 20),
    ("prefix_cache_percent", 0..=100),
    ("adapter_cache_percent_per_tenant", 1..=100),
    ("train_share_percent", 0..=95),
    ("adapter_wait_seconds", 0..=86_400),
    ("publish_retry_seconds", 0..=86_400),
    ("keepalive_seconds", 1..=86_400),
    ("drain_timeout_seconds", 0..=86_400),
    ("upload_idle_seconds", 1..=86_400),
    ("upload_seconds", 1..=604_800),
    ("export_idle_seconds", 1..=86_400),
    ("request_seconds", 1..=86_400),
    ("handshake_seconds", 1..=3600),
    ("max_calls", 1..=u64::MAX),
    ("max_calls_per_tenant", 1..=u64::MAX),
    ("max_keyless_calls", 1..=u64::MAX),
    ("max_uploads", 1..=u64::MAX),
    ("max_uploads_per_tenant", 1..=u64::MAX),
    ("max_reads", 1..=u64::MAX),
    ("max_reads_per_tenant", 1..=u64::MAX),
    ("max_health_watches", 1..=u64::MAX),
    ("max_health_request_bytes", 64..=1 << 16),
    ("max_connections", 1..=1 << 20),
    ("max_connections_per_address", 1..=1 << 20),
    ("max_request_bytes", 1024..=1 << 30),
    ("trash_days", 0..=36_500),
    ("job_days", 0..=36_500),
    ("request_id_days", 0..=36_500),
];

impl Limits {
    /// Returns how long calls under way may take once the server stops.
    pub fn drain_timeout(&self) -> Duration {
        Duration::from_secs(self.drain_timeout_seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_set_by_name_within_their_range() {
        let mut limits = Limits::default();
        limits.set("max_rank", 7).unwrap();
        assert_eq!(limits.max_rank, 7);
        assert!(limits.set("no_such", 1).unwrap_err().to_string().contains("max_rank"));
        for name in ["max_calls", "max_uploads", "max_reads", "max_uploads_per_tenant", "max_health_watches"] {
            limits.set(name, 0).expect_err("one is always given");
        }
        assert!(limits.set("keepalive_seconds", 0).unwrap_err().to_string().contains("1..="));
        for LimitInfo { name, default, .. } in Limits::TABLE {
            limits.set(name, *default).unwrap();
        }
        assert!(RANGES.iter().all(|(name, _)| Limits::TABLE.iter().any(|limit| limit.name == *name)));
    }
}
