//! Which rows the next step computes. Policy on integers: sequences, tenants and blocks are numbers here.
//!
//! Every running sequence that waits for one token gets its row; what is left of the step goes to prompts, the least-served tenant's
//! first, but no more than a budget while others decode: a long prompt must not make every step long. A sequence starts only where
//! there are pages for all the tokens it has ([`table`]) and one block's more for each that runs, so that hardly any has to start over. One that finds no
//! block all the same takes those of the newest running one, which starts over later (its tokens are kept, its KV is computed again,
//! unless it is found again). A tenant with nothing running takes a place from the tenant that runs most for its weight.
//!
//! Fairness between tenants is a virtual token counter (Sheng et al. 2024): the tenant that has had the fewest tokens for its weight
//! comes first, and one that comes back after a pause is lifted to the least-served active one, so that idling earns no credit. What is
//! not computed is not counted: tokens found in the cache, and tokens computed again. Priorities order the sequences of one tenant and
//! never come before the counters.
//!
//! A sequence whose adapter version is not in memory yet is set aside while it is loaded, and the others go on. Every operation on one
//! sequence takes time logarithmic in those that wait ([`waiting`]), so that a long queue costs nobody's steps.

mod table;
mod waiting;

use std::cmp::Reverse;
use std::collections::HashMap;

use crate::engine::blocks::Blocks;
use crate::engine::paging::Paging;
use crate::engine::prefix::PrefixHashes;
use table::Table;
use waiting::{Rank, TenantRank, Waiting};

/// What a token counts for a tenant of weight 1.
const TOKEN: u64 = 1 << 20;

/// Tenants whose next sequence has to wait for its adapter that are looked at in one step while others run; the next step goes on behind
/// them. Else the steps of those that run would take longer with each tenant that waits.
const MOST_LATER: usize = 16;

/// Running sequences that there is room for at once in the list; it grows beyond.
const MOST_PREALLOCATED: usize = 4096;

/// A sequence as the scheduler gets it.
#[derive(Debug)]
pub struct SequenceRequest {
    pub tenant: u32,
    /// The tenant's.
    pub weight: u32,
    /// Higher goes first among the same tenant's.
    pub priority: i32,
    /// Tokens that it has.
    pub length: usize,
    /// Most tokens whose KV it may need. They must fit the whole pool.
    pub longest: usize,
    /// `None`: it takes no blocks of others, and its own are not found again.
    pub hashes: Option<PrefixHashes>,
}

/// Whether a sequence whose turn it is can start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// It starts now.
    Ready,
    /// Its adapter is being loaded: it is set aside until [`Scheduler::resume`].
    Loading,
    /// Not now, and of its tenant's only those whose turn had come before: what they hold is what it waits for.
    Later,
    /// It is no more.
    Gone,
}

/// What became of a waiting sequence that was to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Admission {
    /// It waits in the queue no more.
    Done,
    /// It has to wait for its adapter.
    Later,
    /// There is no room for it.
    NoRoom,
}

/// What the scheduler knows of a sequence.
#[derive(Debug)]
struct Entry {
    id: u64,
    tenant: u32,
    /// Its place among its tenant's.
    rank: Rank,
    /// Tokens whose KV the next token needs.
    length: usize,
    /// Most tokens whose KV it may need.
    longest: usize,
    /// Tokens whose KV is in `table`, or was while rows could read it.
    computed: usize,
    /// Tokens that its tenant has been charged for, or has been spared.
    charged: usize,
    table: Table,
    hashes: Option<PrefixHashes>,
    /// Its turn had come before: it was set aside for its adapter, or has started already. Its adapter is there, or was a moment ago.
    begun: bool,
}

impl Entry {
    fn pending(&self) -> usize {
        self.length - self.computed
    }

    fn is_decoding(&self) -> bool {
        self.computed > 0 && self.pending() == 1
    }
}

/// What a tenant has had, and how many sequences it has.
#[derive(Debug, Default)]
struct Account {
    weight: u64,
    /// [`TOKEN`] over the weight for each token served.
    served: u64,
    running: usize,
    /// Running ones, those set aside, and those that wait.
    all: usize,
}

/// Rows of one sequence in a step: positions `start..start + count`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScheduledChunk {
    pub id: u64,
    pub start: usize,
    pub count: usize,
    /// The step computes all that the sequence has: its last row gives the next token.
    pub completes: bool,
    /// Its place among the running, until one of them goes.
    at: usize,
}

/// What bounds a step, and the pool.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    pub paging: Paging,
    /// Pages in all.
    pub blocks: usize,
    /// Pages that stay findable while nobody holds them; 0: nothing is kept.
    pub max_idle_blocks: usize,
    /// Sequences decoded at once.
    pub max_running: usize,
    /// More than `max_running`, so that prompts go on however many sequences are decoding.
    pub max_step_rows: usize,
    /// Rows of prompts in a step in which others decode; 1 at least.
    pub max_prefill_rows: usize,
}

#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    blocks: Blocks,
    waiting: Waiting,
    /// In the order of admission.
    running: Vec<Entry>,
    /// Of the tenants since the scheduler was last idle.
    accounts: HashMap<u32, Account>,
    /// The sequences that have been sent back since [`Scheduler::take_preempted`], each as often as it was.
    preempted: Vec<u64>,
    /// The tenant behind which the next step goes on, where there were too many to look at.
    look_after: Option<TenantRank>,
}

impl Scheduler {
    pub fn new(config: SchedulerConfig) -> Self {
        Self {
            blocks: Blocks::new(config.blocks, config.max_idle_blocks),
            waiting: Waiting::default(),
            running: Vec::with_capacity(config.max_running.min(MOST_PREALLOCATED)),
            accounts: HashMap::new(),
            preempted: Vec::with_capacity(config.max_running.min(MOST_PREALLOCATED)),
            look_after: None,
            config,
        }
    }

    /// Forgets every sequence, what can be found, and what tenants have had.
    pub fn reset(&mut self) {
        *self = Self::new(self.config.clone());
    }

    /// Queues a sequence.
    pub fn add(&mut self, id: u64, request: SequenceRequest) {
        let entry = self.enter(id, request);
        self.waiting.push(self.served(entry.tenant), entry);
    }

    /// Sets a new sequence aside until [`Scheduler::resume`], when it gets the place that it has come to now.
    pub fn add_aside(&mut self, id: u64, request: SequenceRequest) {
        let entry = self.enter(id, request);
        self.waiting.push_aside(entry);
    }

    /// Counts a new sequence to its tenant's, and gives it its rank.
    fn enter(&mut self, id: u64, request: SequenceRequest) -> Entry {
        let SequenceRequest { tenant, weight, priority, length, longest, hashes } = request;
        let active = self.accounts.get(&tenant).is_some_and(|account| account.all > 0);
        let others = || self.accounts.values().filter(|account| account.all > 0).map(|account| account.served);
        let least = if active { 0 } else { others().min().unwrap_or(0) };
        let account = self.accounts.entry(tenant).or_default();
        account.weight = u64::from(weight).max(1);
        account.served = account.served.max(least);
        account.all += 1;
        let rank = self.waiting.last_rank(priority);
        let (table, computed, charged, begun) = (Table::default(), 0, 0, false);
        Entry { id, tenant, rank, length, longest, computed, charged, table, hashes, begun }
    }

    /// Forgets a sequence and gives back its blocks.
    pub fn remove(&mut self, id: u64) {
        let entry = match self.waiting.remove(id) {
            Some(entry) => Some(entry),
            None => self.running.iter().position(|entry| entry.id == id).map(|at| self.stop(at)),
        };
        let Some(mut entry) = entry else { return };
        entry.table.release(&mut self.blocks);
        self.forget(entry.tenant);
    }

    /// One sequence of a tenant is no more.
    fn forget(&mut self, tenant: u32) {
        if let Some(account) = self.accounts.get_mut(&tenant) {
            account.all -= 1;
        }
        if self.waiting.is_empty() && self.running.is_empty() {
            // Nobody is ahead of anybody.
            self.accounts.clear();
        }
    }

    /// Takes a sequence out of the running.
    fn stop(&mut self, at: usize) -> Entry {
        let entry = self.running.remove(at);
        if let Some(account) = self.accounts.get_mut(&entry.tenant) {
            account.running -= 1;
        }
        entry
    }

    /// A sequence that was set aside waits in its old place again.
    pub fn resume(&mut self, id: u64) {
        let served = |tenant| self.accounts.get(&tenant).map_or(0, |account| account.served);
        self.waiting.resume(id, served);
    }

    /// The first waiting sequences of the tenants whose turn comes next.
    pub fn next_in_line(&self, tenants: usize) -> impl Iterator<Item = u64> + '_ {
        self.waiting.first_of_tenants().take(tenants)
    }

    /// What a sequence with these ids has computed has proved sound: from now on others find its whole blocks, and itself where it starts
    /// over.
    pub fn publish(&mut self, id: u64, ids: &[u32]) {
        let Some(entry) = self.running.iter_mut().find(|entry| entry.id == id) else { return };
        let whole = entry.computed / self.config.paging.block_tokens();
        let Some(hashes) = entry.hashes.as_mut().filter(|_| whole > entry.table.published()) else { return };
        hashes.extend(ids);
        entry.table.publish(whole, hashes.keys(), &mut self.blocks, &self.config.paging);
    }

    /// The sequence has one more token, to be computed in a later step.
    pub fn extend(&mut self, id: u64) {
        if let Some(entry) = self.running.iter_mut().find(|entry| entry.id == id) {
            entry.length += 1;
        }
    }

    /// Chooses the rows of the next step and takes their blocks; the rows count as computed. None only where nothing is queued, or
    /// nothing of it is ready. `ready` is asked of a sequence for which there is room; one that it calls ready has started.
    pub fn plan(&mut self, planned: &mut Vec<ScheduledChunk>, ready: &mut dyn FnMut(u64) -> Readiness) {
        planned.clear();
        self.admit(ready);
        self.plan_decoding(planned);
        self.plan_prefill(planned);
    }

    /// The pages of a planned sequence: block by block, of each block the page of every group.
    pub fn blocks_of(&self, planned: &ScheduledChunk) -> Option<&[u32]> {
        self.running.get(planned.at).filter(|entry| entry.id == planned.id).map(|entry| entry.table.pages())
    }

    /// Starts waiting sequences, the least-served tenant's first: as many as keep the next step busy, and one of a tenant that has
    /// nothing running.
    fn admit(&mut self, ready: &mut dyn FnMut(u64) -> Readiness) {
        // The last tenant that has to wait, of those looked at: so many in a step, those behind them in the next. Where nothing runs, all are
        // looked at.
        let mut passed = self.look_after.take().filter(|_| !self.running.is_empty());
        let mut later = 0;
        while let Some((turn, first)) = self.waiting.next_after(passed) {
            let (id, length) = (first.id, first.length);
            let mut admission = self.try_to_start(id, turn.1, length, ready);
            if admission == Admission::Later
                && let Some(begun) = self.waiting.first_begun(turn.1)
            {
                let (id, length) = (begun.id, begun.length);
                admission = self.try_to_start(id, turn.1, length, ready);
            }
            match admission {
                Admission::Done => {}
                Admission::Later => {
                    passed = Some(turn);
                    later += 1;
                    if later >= MOST_LATER && !self.running.is_empty() {
                        self.look_after = passed;
                        break;
                    }
                }
                Admission::NoRoom => break,
            }
        }
    }

    /// Starts a waiting sequence of `length` tokens where there is room for it and it is ready.
    fn try_to_start(
        &mut self,
        id: u64,
        tenant: u32,
        length: usize,
        ready: &mut dyn FnMut(u64) -> Readiness,
    ) -> Admission {
        if self.is_busy() && self.runs(tenant) {
            return Admission::NoRoom;
        }
        let needed = self.config.paging.most(length);
        let Some(preemption_candidates) = self.ensure_capacity(tenant, needed) else { return Admission::NoRoom };
        match ready(id) {
            Readiness::Ready => {}
            Readiness::Loading => {
                self.waiting.set_aside(id);
                return Admission::Done;
            }
            Readiness::Later => return Admission::Later,
            Readiness::Gone => {
                self.remove(id);
                return Admission::Done;
            }
        }
        // The last first: so the others keep their places in the list, and their order in the queue.
        preemption_candidates.into_iter().rev().for_each(|victim| self.preempt(victim));
        if self.start(id) { Admission::Done } else { Admission::NoRoom }
    }

    /// Makes a waiting sequence a running one; false, and it waits on, where its blocks are not there.
    fn start(&mut self, id: u64) -> bool {
        let Some(mut entry) = self.waiting.remove(id) else { return false };
        entry.begun = true;
        entry.table.reserve(entry.longest.max(entry.length), &self.config.paging);
        if !self.take_first_blocks(&mut entry) {
            self.waiting.push(self.served(entry.tenant), entry);
            return false;
        }
        if let Some(account) = self.accounts.get_mut(&entry.tenant) {
            account.running += 1;
        }
        self.running.push(entry);
        true
    }

    /// Whether the next step has as many rows as it may have.
    fn is_busy(&self) -> bool {
        let decoding = self.running.iter().filter(|entry| entry.is_decoding()).count();
        let pending: usize = self.running.iter().map(Entry::pending).sum();
        pending >= decoding + self.prefill_rows(decoding)
    }

    /// Most rows of prompts beside so many rows of sequences that decode.
    fn prefill_rows(&self, decoding: usize) -> usize {
        let left = self.config.max_step_rows.saturating_sub(decoding);
        if decoding == 0 { left } else { left.min(self.config.max_prefill_rows) }
    }

    /// Gives a sequence that starts the pages that it has in common with others, and its own for the rest; false, and none, where there
    /// are too few. Its last token is always computed: the next one is drawn from its logits.
    fn take_first_blocks(&mut self, entry: &mut Entry) -> bool {
        let paging = &self.config.paging;
        let keys = entry.hashes.as_ref().map_or(&[][..], PrefixHashes::keys);
        let keys = &keys[..keys.len().min(entry.length.saturating_sub(1) / paging.block_tokens())];
        let Some(found) = entry.table.start(entry.length, keys, &mut self.blocks, paging) else { return false };
        entry.computed = found;
        entry.charged = entry.charged.max(found);
        true
    }

    /// Gives back what a sequence holds: it starts over.
    fn clear(&mut self, entry: &mut Entry) {
        entry.table.release(&mut self.blocks);
        entry.computed = 0;
    }

    /// The running sequences, in order, that go back to the queue for a sequence of this tenant that starts with `needed` pages; `None`
    /// where it cannot start. Only a tenant with nothing running sends others back, and none is sent back where that would not make room
    /// enough.
    fn ensure_capacity(&self, tenant: u32, needed: usize) -> Option<Vec<usize>> {
        let running = self.running.len();
        let places = running < self.config.max_running;
        let spare = running * self.config.paging.groups();
        if running == 0 || places && needed + spare <= self.blocks.available() {
            return Some(Vec::new());
        }
        if self.runs(tenant) {
            return None;
        }
        let mut preemption_candidates = self.preemption_candidates(needed)?;
        preemption_candidates.sort_unstable();
        Some(preemption_candidates)
    }

    /// The running sequences whose places and pages let one start that needs so many pages; `None` where too few can go. A page that
    /// two hold is not counted for either.
    fn preemption_candidates(&self, needed: usize) -> Option<Vec<usize>> {
        let mut staying: Vec<usize> = (0..self.running.len()).collect();
        let mut available = self.blocks.available();
        let mut preemption_candidates = Vec::new();
        let spare = |staying: &[usize]| staying.len() * self.config.paging.groups();
        while !staying.is_empty() && (staying.len() >= self.config.max_running || needed + spare(&staying) > available)
        {
            let victim = self.cheapest_candidate(&staying)?;
            staying.retain(|at| *at != victim);
            available += self.blocks.held_alone(self.running[victim].table.pages());
            preemption_candidates.push(victim);
        }
        Some(preemption_candidates)
    }

    fn runs(&self, tenant: u32) -> bool {
        self.accounts.get(&tenant).is_some_and(|account| account.running > 0)
    }

    /// Of these running sequences, of the tenant that has most of them for its weight, two at least: the one of the lowest priority with
    /// the least to compute again.
    fn cheapest_candidate(&self, among: &[usize]) -> Option<usize> {
        let tenant = |at: &usize| self.running[*at].tenant;
        let beside = |at: &usize| among.iter().filter(|other| tenant(other) == tenant(at)).count();
        let busy = |at: &usize| self.counts_for(tenant(at), beside(at));
        let several = || among.iter().rev().filter(|at| beside(at) > 1);
        let most = several().map(busy).max()?;
        several()
            .filter(|at| busy(at) == most)
            .min_by_key(|at| (self.running[**at].rank.priority(), self.running[**at].computed))
            .copied()
    }

    /// One row for each sequence that waits for one, oldest first: it takes blocks only from younger ones, which are not planned yet.
    fn plan_decoding(&mut self, planned: &mut Vec<ScheduledChunk>) {
        let mut at = 0;
        while at < self.running.len() {
            if self.running[at].is_decoding() {
                if !self.reserve(at) {
                    // It was the youngest itself, and has gone back to the queue.
                    break;
                }
                planned.push(self.schedule_tokens(at, 1));
            }
            at += 1;
        }
    }

    /// Gives prompts what is left of the step. They have their pages.
    fn plan_prefill(&mut self, planned: &mut Vec<ScheduledChunk>) {
        let mut left = self.prefill_rows(planned.len());
        let mut turn: Vec<usize> = (0..self.running.len()).filter(|at| self.running[*at].pending() > 0).collect();
        turn.sort_by_key(|at| (self.turn(&self.running[*at]), *at));
        for at in turn {
            let rows = self.running[at].pending().min(left);
            if rows == 0 {
                break;
            }
            let Entry { table, computed, .. } = &mut self.running[at];
            if table.slide(*computed, &mut self.blocks, &self.config.paging) {
                left -= rows;
                planned.push(self.schedule_tokens(at, rows));
            }
        }
    }

    /// Sees that running sequence `at` has pages for one more token, sending younger ones back to the queue; false where it had to go
    /// itself.
    fn reserve(&mut self, at: usize) -> bool {
        loop {
            let Entry { table, computed, .. } = &mut self.running[at];
            let paging = &self.config.paging;
            if table.slide(*computed, &mut self.blocks, paging) && table.grow(*computed + 1, &mut self.blocks, paging) {
                return true;
            }
            let youngest = self.running.len() - 1;
            self.preempt(youngest);
            if youngest == at {
                return false;
            }
        }
    }

    /// Takes the blocks of a running sequence, which starts over later.
    fn preempt(&mut self, at: usize) {
        let mut entry = self.stop(at);
        self.preempted.push(entry.id);
        self.clear(&mut entry);
        entry.rank = self.waiting.first_rank(entry.rank.priority());
        self.waiting.push(self.served(entry.tenant), entry);
    }

    fn schedule_tokens(&mut self, at: usize, rows: usize) -> ScheduledChunk {
        let entry = &mut self.running[at];
        let start = entry.computed;
        entry.computed += rows;
        let (id, tenant, completes) = (entry.id, entry.tenant, entry.pending() == 0);
        let new = entry.computed.saturating_sub(entry.charged);
        entry.charged += new;
        let counts = self.counts_for(tenant, new);
        if let Some(account) = self.accounts.get_mut(&tenant) {
            account.served = account.served.saturating_add(counts);
            self.waiting.serve(tenant, account.served);
        }
        ScheduledChunk { id, start, count: rows, completes, at }
    }

    /// What so many of anything count for a tenant's weight.
    fn counts_for(&self, tenant: u32, count: usize) -> u64 {
        let weight = self.accounts.get(&tenant).map_or(1, |account| account.weight.max(1));
        (count as u64).saturating_mul(TOKEN) / weight
    }

    fn served(&self, tenant: u32) -> u64 {
        self.accounts.get(&tenant).map_or(0, |account| account.served)
    }

    /// The least comes first. Tenants that have had as much go by their numbers, so that no priority decides between them.
    fn turn(&self, entry: &Entry) -> (u64, u32, Reverse<i32>) {
        (self.served(entry.tenant), entry.tenant, Reverse(entry.rank.priority()))
    }

    /// Gives the sequences that have lost their blocks to others since the last call; they start over later.
    pub fn take_preempted(&mut self) -> std::vec::Drain<'_, u64> {
        self.preempted.drain(..)
    }

    /// Sequences that do not run, those set aside included.
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
mod tests;
