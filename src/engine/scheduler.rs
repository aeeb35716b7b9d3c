//! Which rows the next step computes. Policy on integers: sequences, tenants and blocks are numbers here.
//!
//! Every running sequence that waits for one token gets its row; what is left of the step goes to prompts, the least-served tenant's
//! first. A sequence starts only where there are blocks for all the tokens it has and one more for each that runs, so that hardly any
//! has to start over. One that finds no block all the same takes those of the newest running one, which starts over later (its tokens
//! are kept, its KV is computed again). A tenant with nothing running takes a place from the tenant that runs most.
//!
//! Fairness between tenants is a virtual token counter (Sheng et al. 2024): a tenant that comes back after a pause is lifted to the
//! least-served active one, so that idling earns no credit. Computing a token again is not counted again.

use std::collections::{HashMap, VecDeque};

use crate::engine::blocks::Blocks;

/// What the scheduler knows of a sequence.
#[derive(Debug)]
struct Entry {
    id: u64,
    tenant: u32,
    /// Tokens whose KV the next token needs.
    length: usize,
    /// Tokens whose KV is in `blocks`.
    computed: usize,
    /// Tokens that its tenant has been charged for.
    charged: usize,
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
    /// More than `max_running`, so that prompts go on however many sequences are decoding.
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

    /// Forgets every sequence and what tenants have had.
    pub fn reset(&mut self) {
        *self = Self::new(self.bounds, self.blocks.total());
    }

    /// Queues a sequence of `length` tokens. It must fit the whole pool at its longest.
    pub fn add(&mut self, id: u64, tenant: u32, length: usize) {
        let entries = || self.waiting.iter().chain(&self.running);
        if entries().all(|entry| entry.tenant != tenant) {
            let least = entries().map(|entry| self.served(entry.tenant)).min();
            let served = self.served.entry(tenant).or_default();
            *served = (*served).max(least.unwrap_or(0));
        }
        self.waiting.push_back(Entry { id, tenant, length, computed: 0, charged: 0, blocks: Vec::new() });
    }

    /// Forgets a sequence and frees its blocks.
    pub fn remove(&mut self, id: u64) {
        self.waiting.retain(|entry| entry.id != id);
        if let Some(at) = self.running.iter().position(|entry| entry.id == id) {
            self.blocks.release(&mut self.running.remove(at).blocks);
        }
        if self.waiting.is_empty() && self.running.is_empty() {
            // Nobody is ahead of anybody.
            self.served.clear();
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
        self.admit();
        let mut planned = self.plan_decoding();
        self.plan_prefill(&mut planned);
        planned
    }

    /// Starts waiting sequences, the least-served tenant's first: as many as keep the next step busy, and one of a tenant that has
    /// nothing running.
    fn admit(&mut self) {
        while let Some(next) = self.next_waiting() {
            let entry = &self.waiting[next];
            let pending: usize = self.running.iter().map(Entry::pending).sum();
            let (tenant, needed) = (entry.tenant, entry.length.div_ceil(self.bounds.block_tokens));
            if (pending >= self.bounds.max_step_rows && self.runs(tenant)) || !self.make_room(tenant, needed) {
                break;
            }
            // Where one had to make room, it waits now before the others.
            let Some(next) = self.next_waiting_of(tenant) else { break };
            let Some(mut entry) = self.waiting.remove(next) else { break };
            if !self.blocks.take(needed, &mut entry.blocks) {
                self.waiting.insert(next, entry);
                break;
            }
            self.running.push(entry);
        }
    }

    /// Whether a sequence of this tenant can start with `needed` blocks. Only a tenant with nothing running sends others back to the queue.
    /// None is sent back where that would not make room enough.
    fn make_room(&mut self, tenant: u32, needed: usize) -> bool {
        let mut staying: Vec<usize> = (0..self.running.len()).collect();
        let mut free = self.blocks.free();
        let mut victims = Vec::new();
        loop {
            let places = staying.len() < self.bounds.max_running;
            if staying.is_empty() || places && needed + staying.len() <= free {
                break;
            }
            if self.runs(tenant) {
                return false;
            }
            let Some(victim) = self.cheapest_of_the_busiest(&staying) else { return false };
            staying.retain(|at| *at != victim);
            free += self.running[victim].blocks.len();
            victims.push(victim);
        }
        // The last first: so the others keep their places in the list, and their order in the queue.
        victims.sort_unstable();
        victims.into_iter().rev().for_each(|victim| self.send_back(victim));
        true
    }

    fn runs(&self, tenant: u32) -> bool {
        self.running.iter().any(|entry| entry.tenant == tenant)
    }

    /// Of these running sequences, of the tenant that has most of them, two at least: the one with the least to compute again.
    fn cheapest_of_the_busiest(&self, among: &[usize]) -> Option<usize> {
        let tenant = |at: &usize| self.running[*at].tenant;
        let beside = |at: &usize| among.iter().filter(|other| tenant(other) == tenant(at)).count();
        let most = among.iter().map(beside).max().filter(|most| *most > 1)?;
        let of_busiest = among.iter().rev().filter(|at| beside(at) == most);
        of_busiest.min_by_key(|at| self.running[**at].computed).copied()
    }

    /// One row for each sequence that waits for one, oldest first: it takes blocks only from younger ones, which are not planned yet.
    fn plan_decoding(&mut self) -> Vec<Planned> {
        let mut planned = Vec::new();
        let mut at = 0;
        while at < self.running.len() {
            if self.running[at].is_decoding() {
                if !self.reserve(at) {
                    // It was the youngest itself, and has gone back to the queue.
                    break;
                }
                planned.push(self.take_rows(at, 1));
            }
            at += 1;
        }
        planned
    }

    /// Gives prompts what is left of the step. They have their blocks.
    fn plan_prefill(&mut self, planned: &mut Vec<Planned>) {
        let mut left = self.bounds.max_step_rows - planned.len();
        let mut turn: Vec<usize> = (0..self.running.len()).filter(|at| self.running[*at].pending() > 0).collect();
        turn.sort_by_key(|at| (self.served(self.running[*at].tenant), *at));
        for at in turn {
            let rows = self.running[at].pending().min(left);
            if rows == 0 {
                break;
            }
            left -= rows;
            planned.push(self.take_rows(at, rows));
        }
    }

    /// Sees that running sequence `at` has a block for one more token, sending younger ones back to the queue; false where it had to go
    /// itself.
    fn reserve(&mut self, at: usize) -> bool {
        loop {
            let entry = &mut self.running[at];
            let needed = (entry.computed + 1).div_ceil(self.bounds.block_tokens).saturating_sub(entry.blocks.len());
            if self.blocks.take(needed, &mut entry.blocks) {
                return true;
            }
            let youngest = self.running.len() - 1;
            self.send_back(youngest);
            if youngest == at {
                return false;
            }
        }
    }

    /// Frees the blocks of a running sequence, which starts over later.
    fn send_back(&mut self, at: usize) {
        let mut entry = self.running.remove(at);
        self.blocks.release(&mut entry.blocks);
        entry.computed = 0;
        self.waiting.push_front(entry);
    }

    fn take_rows(&mut self, at: usize, rows: usize) -> Planned {
        let entry = &mut self.running[at];
        let start = entry.computed;
        entry.computed += rows;
        *self.served.entry(entry.tenant).or_default() += entry.computed.saturating_sub(entry.charged) as u64;
        entry.charged = entry.charged.max(entry.computed);
        let completes = entry.pending() == 0;
        Planned { id: entry.id, start, count: rows, blocks: entry.blocks.clone(), completes }
    }

    fn served(&self, tenant: u32) -> u64 {
        self.served.get(&tenant).copied().unwrap_or(0)
    }

    /// The first waiting sequence of the least-served tenant.
    fn next_waiting(&self) -> Option<usize> {
        (0..self.waiting.len()).min_by_key(|at| (self.served(self.waiting[*at].tenant), *at))
    }

    fn next_waiting_of(&self, tenant: u32) -> Option<usize> {
        self.waiting.iter().position(|entry| entry.tenant == tenant)
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

    #[test]
    fn a_prompt_that_does_not_fit_beside_the_others_waits_instead_of_starting_over() {
        let mut s = scheduler(30);
        s.add(1, 0, 40);
        s.plan();
        s.plan();
        s.add(2, 0, 100);
        for _ in 0..20 {
            s.extend(1);
            assert_eq!(s.plan().iter().map(|p| p.id).collect::<Vec<_>>(), [1]);
        }
        s.remove(1);
        assert_eq!(s.plan()[0].id, 2);
    }

    #[test]
    fn a_tenant_with_nothing_running_takes_a_place_from_the_busiest() {
        let mut s = scheduler(100);
        (1..=6).for_each(|id| s.add(id, 0, 4));
        s.plan();
        (1..=4).for_each(|id| s.extend(id));
        s.add(7, 1, 4);
        // Now both have had as much, and the other tenant's next was there before.
        s.plan();
        (1..=4).for_each(|id| s.extend(id));
        let ids: Vec<_> = s.plan().iter().map(|p| p.id).collect();
        assert_eq!(ids, [1, 2, 3, 7], "with all places taken");
        s.add(8, 1, 4);
        [1, 2, 3, 7].iter().for_each(|id| s.extend(*id));
        let ids: Vec<_> = s.plan().iter().map(|p| p.id).collect();
        assert_eq!(ids, [1, 2, 3, 7], "and only one");
    }

    #[test]
    fn nobody_starts_over_for_one_that_does_not_fit_all_the_same() {
        let mut s = scheduler(30);
        (1..=3).for_each(|id| s.add(id, 0, 4));
        s.add(4, 1, 80);
        while s.plan().iter().any(|p| !p.completes) {}
        assert_eq!(s.blocks().free(), 30 - 3 - 20);
        // Two of tenant 0's would give their two blocks, which with the free ones are too few.
        s.add(5, 2, 60);
        (1..=4).for_each(|id| s.extend(id));
        assert_eq!(s.plan().iter().map(|p| p.id).collect::<Vec<_>>(), [1, 2, 3, 4]);
    }

    #[test]
    fn a_short_prompt_does_not_stand_behind_another_tenants_long_one() {
        let mut s = scheduler(100);
        s.add(1, 0, 200);
        s.plan();
        s.add(2, 1, 4);
        // Both tenants have had as much now, and the long one was there before.
        s.plan();
        let plan = s.plan();
        let short = plan.iter().find(|p| p.id == 2).unwrap();
        assert!(short.completes && plan.iter().any(|p| p.id == 1), "the long one goes on with the rest of the step");
    }

    #[test]
    fn an_idle_scheduler_remembers_nobody() {
        let mut s = scheduler(100);
        (0..5).for_each(|tenant| s.add(u64::from(tenant), tenant, 4));
        s.plan();
        (0..5).for_each(|id| s.remove(id));
        assert!(s.served.is_empty());
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
