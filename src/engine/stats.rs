//! Figures of the loop, for Prometheus.

use crate::engine::scheduler::Scheduler;
use crate::kernels::cpu::shrinks;

/// A step over so many rows, tokens of prompts and answers.
pub fn count_step(rows: usize) {
    metrics::counter!("tenora_engine_steps_total").increment(1);
    metrics::counter!("tenora_engine_rows_total").increment(rows as u64);
}

/// A prompt that starts, and how many of its tokens were found in the prefix cache.
pub fn count_prompt(tokens: usize, found: usize) {
    metrics::counter!("tenora_prefix_cache_asked_tokens_total").increment(tokens as u64);
    metrics::counter!("tenora_prefix_cache_hit_tokens_total").increment(found as u64);
}

/// How things stand after a step.
pub fn observe(scheduler: &Scheduler, sequences: usize) {
    // Of the whole process, the parity gate's included: what serves the base alone leaves it as it is.
    metrics::counter!("tenora_adapter_kernel_runs_total").absolute(shrinks());
    let blocks = scheduler.blocks();
    for (name, value) in [
        ("tenora_engine_sequences", sequences),
        ("tenora_engine_waiting", scheduler.waiting()),
        ("tenora_engine_running", scheduler.running()),
        ("tenora_kv_blocks_used", blocks.used()),
        ("tenora_kv_blocks_cached", blocks.idle()),
        ("tenora_kv_blocks_total", blocks.total()),
    ] {
        metrics::gauge!(name).set(value as f64);
    }
}
