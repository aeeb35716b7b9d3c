//! All metrics, with what each means: the HELP lines of `/metrics`.

use metrics::{describe_counter, describe_gauge, describe_histogram};

/// Every metric and its meaning. `_total` are counters, `_seconds` histograms, all others gauges.
pub const METRICS: [(&str, &str); 32] = [
    ("tenora_calls_total", "Calls that have ended, by method and gRPC code."),
    ("tenora_call_seconds", "Time from a call's beginning to the end of its answer, by method."),
    ("tenora_calls_under_way", "Calls whose answer has not ended."),
    ("tenora_uploads_under_way", "Uploads and imports under way (limit max_uploads)."),
    ("tenora_reads_under_way", "Reads of whole datasets and adapters under way (limit max_reads)."),
    ("tenora_request_memory_bytes", "Bytes that calls hold of limit max_request_memory_bytes."),
    ("tenora_spans_dropped_total", "Spans that could not be sent to the collector."),
    ("tenora_connections_refused_total", "Connections that found no room (limit max_connections)."),
    (
        "tenora_queue_seconds",
        "Time from a request's coming to the first step of its sequence; by tenant where that is asked for.",
    ),
    (
        "tenora_time_to_first_token_seconds",
        "Time from a request's coming to the first token of its answer; by tenant where that is asked for.",
    ),
    ("tenora_time_between_tokens_seconds", "Time between two tokens of an answer; by tenant where that is asked for."),
    ("tenora_generated_tokens_total", "Tokens generated; by tenant where that is asked for."),
    ("tenora_prompt_tokens_total", "Tokens of prompts whose computation has ended; by tenant where that is asked for."),
    (
        "tenora_preemptions_total",
        "Sequences that gave their KV blocks to others and wait again; by tenant where that is asked for.",
    ),
    ("tenora_engine_sequences", "Sequences that the engine has, whatever they do."),
    ("tenora_engine_waiting", "Sequences that wait to start."),
    ("tenora_engine_running", "Sequences that run."),
    ("tenora_kv_blocks_used", "KV blocks that sequences hold."),
    ("tenora_kv_blocks_cached", "KV blocks that nobody holds and that can be found again."),
    ("tenora_kv_blocks_total", "KV blocks in all (limit kv_cache_bytes)."),
    ("tenora_engine_steps_total", "Steps of the engine."),
    ("tenora_engine_rows_total", "Rows that the engine has computed: tokens of prompts and of answers."),
    ("tenora_prefix_cache_asked_tokens_total", "Tokens of prompts that were looked for in the prefix cache."),
    ("tenora_prefix_cache_hit_tokens_total", "Those that were found there and not computed."),
    ("tenora_adapter_kernel_runs_total", "Products with adapters' matrices."),
    ("tenora_adapters_resident", "Adapter versions on the device."),
    ("tenora_adapters_resident_bytes", "Their bytes (limit adapter_cache_bytes)."),
    ("tenora_adapters_host_bytes", "Bytes of adapter versions kept in host memory (limit adapter_host_bytes)."),
    ("tenora_adapter_leases", "Leases of adapter versions that are held."),
    ("tenora_adapter_loads_total", "Adapter versions brought to the device, by the tier they came from."),
    ("tenora_adapter_load_seconds", "Time that took, without the wait for room."),
    ("tenora_adapter_evictions_total", "Adapter versions that left a tier for others, by tier."),
];

/// Tells the recorder what its metrics mean.
pub(super) fn describe() {
    for (name, meaning) in METRICS {
        if name.ends_with("_total") {
            describe_counter!(name, meaning);
        } else if name.ends_with("_seconds") {
            describe_histogram!(name, meaning);
        } else {
            describe_gauge!(name, meaning);
        }
    }
}
