//! Figures of the loop and of its requests, for Prometheus.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use metrics::{Counter, Histogram, Label};

use crate::engine::scheduler::Scheduler;
use crate::ids::TenantId;
use crate::kernels::cpu::shrinks;
use crate::sync::lock;
use crate::telemetry::traces;

/// The label of tenants that have none of their own.
const OTHER: &str = "other";

/// Whose requests are shown under their tenant's name: the first that come, up to a number, so that a label never has more values. Clones
/// share it.
#[derive(Debug, Clone)]
pub struct Tenants {
    most: usize,
    named: Arc<Mutex<HashSet<TenantId>>>,
}

impl Tenants {
    /// `most` 0: no request is shown under a tenant.
    pub fn new(most: u64) -> Self {
        Self { most: usize::try_from(most).unwrap_or(usize::MAX), named: Arc::default() }
    }

    fn labels(&self, tenant: &TenantId) -> Vec<Label> {
        if self.most == 0 {
            return Vec::new();
        }
        let mut named = lock(&self.named);
        let known = named.contains(tenant) || (named.len() < self.most && named.insert(tenant.clone()));
        vec![Label::new("tenant", if known { tenant.as_str().to_owned() } else { OTHER.to_owned() })]
    }
}

/// What is measured of one sequence. The handles are made once, so that a step looks up and allocates nothing.
pub struct Figures {
    since: Instant,
    /// When the first step began that computes some of it.
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    tokens: usize,
    trace: Option<traces::Context>,
    queue_seconds: Histogram,
    first_token_seconds: Histogram,
    between_tokens_seconds: Histogram,
    generated_total: Counter,
    prompt_total: Counter,
    preemptions_total: Counter,
}

impl std::fmt::Debug for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Figures").field("since", &self.since).finish_non_exhaustive()
    }
}

impl Figures {
    /// Begins to measure a sequence of a tenant, whose request came at `since`.
    pub fn new(tenants: &Tenants, tenant: &TenantId, since: Instant, trace: Option<traces::Context>) -> Self {
        let labels = tenants.labels(tenant);
        Self {
            since,
            started: None,
            first_token: None,
            last_token: None,
            tokens: 0,
            trace,
            queue_seconds: metrics::histogram!("tenora_queue_seconds", labels.iter()),
            first_token_seconds: metrics::histogram!("tenora_time_to_first_token_seconds", labels.iter()),
            between_tokens_seconds: metrics::histogram!("tenora_time_between_tokens_seconds", labels.iter()),
            generated_total: metrics::counter!("tenora_generated_tokens_total", labels.iter()),
            prompt_total: metrics::counter!("tenora_prompt_tokens_total", labels.iter()),
            preemptions_total: metrics::counter!("tenora_preemptions_total", labels.iter()),
        }
    }

    /// The next step computes some of it.
    pub fn planned(&mut self, now: Instant) {
        if self.started.is_none() {
            self.started = Some(now);
            self.queue_seconds.record(now.duration_since(self.since).as_secs_f64());
        }
    }

    /// All of its prompt is computed, or all of what is to be scored.
    pub fn prompt(&self, tokens: usize) {
        self.prompt_total.increment(tokens as u64);
    }

    /// It has lost its blocks to another and starts over.
    pub fn preempted(&self) {
        self.preemptions_total.increment(1);
    }

    /// It has a token more.
    pub fn token(&mut self, now: Instant) {
        self.tokens += 1;
        self.generated_total.increment(1);
        self.first_token.get_or_insert(now);
        match self.last_token.replace(now) {
            None => self.first_token_seconds.record(now.duration_since(self.since).as_secs_f64()),
            Some(last) => self.between_tokens_seconds.record(now.duration_since(last).as_secs_f64()),
        }
    }
}

impl Drop for Figures {
    /// Sends the spans of what there was: waiting, the prompt, the tokens after the first.
    fn drop(&mut self) {
        let Some(trace) = self.trace else { return };
        let now = Instant::now();
        trace.part("queue", self.since, self.started.unwrap_or(now), Vec::new());
        let Some(started) = self.started else { return };
        trace.part("prefill", started, self.first_token.unwrap_or(now), Vec::new());
        if let (Some(first), Some(last)) = (self.first_token, self.last_token) {
            trace.part("decode", first, last, vec![("tenora.tokens", self.tokens.to_string())]);
        }
    }
}

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
    metrics::gauge!("tenora_engine_sequences").set(sequences as f64);
    metrics::gauge!("tenora_engine_waiting").set(scheduler.waiting() as f64);
    metrics::gauge!("tenora_engine_running").set(scheduler.running() as f64);
    metrics::gauge!("tenora_kv_blocks_used").set(blocks.used() as f64);
    metrics::gauge!("tenora_kv_blocks_cached").set(blocks.idle() as f64);
    metrics::gauge!("tenora_kv_blocks_total").set(blocks.total() as f64);
}
