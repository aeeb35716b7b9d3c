//! Which rows the next step computes. Policy on integers: sequences, tenants and blocks are numbers here.
//!
//! Every running sequence that waits for one token gets its row; what is left of the step goes to prompts, the least-served tenant's
//! first. A sequence that finds no block takes those of the newest running one, which starts over later (its tokens are kept, its KV is
//! computed again). Fairness between tenants is a virtual token counter (Sheng et al. 2024): a tenant that comes back after a pause is
//! lifted to the least-served active one, so that idling earns no credit.

use std::collections::{HashMap, VecDeque};

use crate::engine::blocks::Blocks;

/// Rows that prompts get in every step, however many sequences are decoding.
const MIN_PREFILL_ROWS: usize = 16;

/// What the scheduler knows of a sequence.
#[derive(Debug)]
struct Entry {
    id: u64,
    tenant: u32,
    /// Tokens whose KV the next token needs.
    length: usize,
    /// Tokens whose KV is in `blocks`.
    computed: usize,
    blocks: Vec<u32>,
}

impl Entry {
    fn pending(&self) -> usize {
        self.length - self.computed
    }

    fn is_decoding(&self) -> bool {
        self.computed > 0 && self.pending() == 1
    }
}

/// Rows of one sequence in a step: positions `start..start + count`, in these blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    pub id: u64,
    pub start: usize,
    pub count: usize,
    pub blocks: Vec<u32>,
    /// The step computes all that the sequence has: its last row gives the next token.
    pub completes: bool,
}

/// What bounds a step.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    pub block_tokens: usize,
    /// Sequences decoded at once.
    pub max_running: usize,
    pub max_step_rows: usize,
}

#[derive(Debug)]
pub struct Scheduler {
    bounds: Bounds,
    blocks: Blocks,
    waiting: VecDeque<Entry>,
    /// In the order of admission.
    running: Vec<Entry>,
    /// Tokens served to each tenant.
    served: HashMap<u32, u64>,
}

impl Scheduler {
    pub fn new(bounds: Bounds, blocks: usize) -> Self {
        Self {
            bounds,
            blocks: Blocks::new(blocks),
            waiting: VecDeque::new(),
            running: Vec::new(),
            served: HashMap::new(),
        }
    }

    /// Queues a sequence of `length` tokens. It must fit the whole pool at its longest.
    pub fn add(&mut self, id: u64, tenant: u32, length: usize) {
        let entries = || self.waiting.iter().chain(&self.running);
        if entries().all(|entry| entry.tenant != tenant) {
            let least = entries().map(|entry| self.served.get(&entry.tenant).copied().unwrap_or(0)).min();
            let served = self.served.entry(tenant).or_default();
            *served = (*served).max(least.unwrap_or(0));
        }
        self.waiting.push_back(Entry { id, tenant, length, computed: 0, blocks: Vec::new() });
    }

    /// Forgets a sequence and frees its blocks.
    pub fn remove(&mut self, id: u64) {
        self.waiting.retain(|entry| entry.id != id);
        if let Some(at) = self.running.iter().position(|entry| entry.id == id) {
            self.blocks.release(&mut self.running.remove(at).blocks);
        }
    }

    /// The sequence has one more token, to be computed in a later step.
    pub fn extend(&mut self, id: u64) {
        if let Some(entry) = self.running.iter_mut().find(|entry| entry.id == id) {
            entry.length += 1;
        }
    }

    /// Chooses the rows of the next step and takes their blocks; the rows count as computed. Empty only where nothing is queued.
    pub fn plan(&mut self) -> Vec<Planned> {
        let decoding = self.running.iter().filter(|entry| entry.is_decoding()).count();
        let mut prefill = self.bounds.max_step_rows.saturating_sub(decoding).max(MIN_PREFILL_ROWS);
        let mut planned = Vec::new();
        // Oldest first, so that a sequence only ever takes blocks from younger ones that are not planned yet.
        let mut at = 0;
        while at < self.running.len() {
            let entry = &self.running[at];
            let rows = if entry.is_decoding() { 1 } else { entry.pending().min(prefill) };
            if rows > 0 && !self.reserve(at, rows) {
                // It was the youngest itself, and has gone back to the queue.
                break;
            }
            if rows > 0 {
                prefill -= if self.running[at].is_decoding() { 0 } else { rows };
                planned.push(self.take_rows(at, rows));
            }
            at += 1;
        }
        while prefill > 0 && self.running.len() < self.bounds.max_running {
            let Some(next) = self.next_waiting() else { break };
            let rows = self.waiting[next].pending().min(prefill);
            let needed = rows.div_ceil(self.bounds.block_tokens);
            let Some(mut entry) = self.waiting.remove(next) else { break };
            if !self.blocks.take(needed, &mut entry.blocks) {
                self.waiting.insert(next, entry);
                break;
            }
            self.running.push(entry);
            prefill -= rows;
            planned.push(self.take_rows(self.running.len() - 1, rows));
        }
        planned
    }

    /// Sees that running sequence `at` has blocks for `rows` more, sending younger ones back to the queue; false where it had to go
    /// itself.
    fn reserve(&mut self, at: usize, rows: usize) -> bool {
        loop {
            let entry = &mut self.running[at];
            let needed = (entry.computed + rows).div_ceil(self.bounds.block_tokens) - entry.blocks.len();
            if self.blocks.take(needed, &mut entry.blocks) {
                return true;
            }
            let youngest = self.running.len() - 1;
            let mut victim = self.running.remove(youngest);
            self.blocks.release(&mut victim.blocks);
            victim.computed = 0;
            self.waiting.push_front(victim);
            if youngest == at {
                return false;
            }
        }
    }

    fn take_rows(&mut self, at: usize, rows: usize) -> Planned {
        let entry = &mut self.running[at];
        let start = entry.computed;
        entry.computed += rows;
        *self.served.entry(entry.tenant).or_default() += rows as u64;
        let completes = entry.pending() == 0;
        Planned { id: entry.id, start, count: rows, blocks: entry.blocks.clone(), completes }
    }

    /// The oldest waiting sequence of the least-served tenant.
    fn next_waiting(&self) -> Option<usize> {
        let served = |entry: &Entry| self.served.get(&entry.tenant).copied().unwrap_or(0);
        (0..self.waiting.len()).min_by_key(|at| (served(&self.waiting[*at]), *at))
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn running(&self) -> usize {
        self.running.len()
    }

    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn scheduler(blocks: usize) -> Scheduler {
        Scheduler::new(Bounds { block_tokens: 4, max_running: 4, max_step_rows: 24 }, blocks)
    }

    #[test]
    fn a_long_prompt_is_cut_and_does_not_stop_decoding() {
        let mut s = scheduler(100);
        s.add(1, 0, 4);
        assert_eq!(s.plan()[0].count, 4);
        s.extend(1);
        s.add(2, 0, 100);
        let plan = s.plan();
        assert_eq!((plan[0].id, plan[0].count, plan[0].completes), (1, 1, true));
        assert_eq!((plan[1].id, plan[1].count, plan[1].completes), (2, 23, false));
    }

    #[test]
    fn the_least_served_tenant_comes_first() {
        let mut s = Scheduler::new(Bounds { block_tokens: 4, max_running: 1, max_step_rows: 64 }, 100);
        s.add(1, 0, 40);
        s.plan();
        s.add(2, 0, 4);
        s.add(3, 0, 4);
        s.add(4, 1, 4);
        s.remove(1);
        let mut order = Vec::new();
        while let [planned] = &s.plan()[..] {
            order.push(planned.id);
            s.remove(planned.id);
        }
        assert_eq!(order, [2, 4, 3], "tenant 1 was lifted to tenant 0's 40 tokens, no more and no less");
    }

    proptest! {
        /// Sequences of given lengths and tenants all get every one of their tokens, in order, whatever the pool's size; in the end no
        /// block is held.
        #[test]
        fn all_sequences_finish(
            sequences in prop::collection::vec((1usize..30, 1usize..12, 0u32..3), 1..12),
            pool in 11usize..30,
        ) {
            let mut s = scheduler(pool);
            let mut left = BTreeMap::new();
            let mut computed: BTreeMap<u64, usize> = BTreeMap::new();
            for (id, (prompt, tokens, tenant)) in sequences.into_iter().enumerate() {
                s.add(id as u64, tenant, prompt);
                left.insert(id as u64, (prompt, tokens));
            }
            for _ in 0..10_000 {
                let plan = s.plan();
                if left.is_empty() {
                    break;
                }
                prop_assert!(!plan.is_empty(), "progress");
                for p in plan {
                    let done = computed.entry(p.id).or_default();
                    prop_assert!(p.start == *done || p.start == 0, "in order, or over again");
                    *done = p.start + p.count;
                    prop_assert!(p.blocks.len() * 4 >= *done);
                    let (length, tokens) = left.get_mut(&p.id).unwrap();
                    prop_assert_eq!(p.completes, *done == *length);
                    if p.completes {
                        *tokens -= 1;
                        *length += 1;
                        if *tokens == 0 {
                            left.remove(&p.id);
                            s.remove(p.id);
                        } else {
                            s.extend(p.id);
                        }
                    }
                }
            }
            prop_assert!(left.is_empty());
            prop_assert_eq!(s.blocks().used(), 0);
        }
    }
}
