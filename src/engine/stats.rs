//! Figures of the loop, for health, metrics and tests.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use crate::engine::scheduler::Scheduler;

/// Written by the loop, read by anyone.
#[derive(Debug, Default)]
pub struct Stats {
    steps: AtomicU64,
    rows: AtomicU64,
    sequences: AtomicUsize,
    waiting: AtomicUsize,
    running: AtomicUsize,
    kv_blocks_used: AtomicUsize,
    kv_blocks_total: AtomicUsize,
}

/// A reading of the engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStats {
    pub steps: u64,
    /// Rows computed in all: tokens of prompts and answers.
    pub rows: u64,
    /// Requests under way.
    pub sequences: usize,
    pub waiting: usize,
    pub running: usize,
    pub kv_blocks_used: usize,
    pub kv_blocks_total: usize,
}

impl Stats {
    pub(super) fn count_step(&self, rows: usize) {
        self.steps.fetch_add(1, Relaxed);
        self.rows.fetch_add(rows as u64, Relaxed);
        metrics::counter!("tenora_engine_steps_total").increment(1);
        metrics::counter!("tenora_engine_rows_total").increment(rows as u64);
    }

    pub(super) fn observe(&self, scheduler: &Scheduler, sequences: usize) {
        let blocks = scheduler.blocks();
        for (value, at, name) in [
            (sequences, &self.sequences, "tenora_engine_sequences"),
            (scheduler.waiting(), &self.waiting, "tenora_engine_waiting"),
            (scheduler.running(), &self.running, "tenora_engine_running"),
            (blocks.used(), &self.kv_blocks_used, "tenora_kv_blocks_used"),
            (blocks.total(), &self.kv_blocks_total, "tenora_kv_blocks_total"),
        ] {
            at.store(value, Relaxed);
            metrics::gauge!(name).set(value as f64);
        }
    }

    pub(super) fn read(&self) -> EngineStats {
        EngineStats {
            steps: self.steps.load(Relaxed),
            rows: self.rows.load(Relaxed),
            sequences: self.sequences.load(Relaxed),
            waiting: self.waiting.load(Relaxed),
            running: self.running.load(Relaxed),
            kv_blocks_used: self.kv_blocks_used.load(Relaxed),
            kv_blocks_total: self.kv_blocks_total.load(Relaxed),
        }
    }
}
