//! The sequences that do not run: each tenant's in their order, the tenants in theirs, and those set aside while their adapter is loaded.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;

use super::Entry;

/// A sequence's place among its tenant's: higher priorities first, then in order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank(Reverse<i32>, i64);

impl Rank {
    pub fn priority(self) -> i32 {
        self.0.0
    }
}

/// A tenant's place among the tenants: what it has been served, then its number.
pub type TenantRank = (u64, u32);

/// One tenant's sequences.
#[derive(Debug, Default)]
struct Queue {
    /// What the tenant has had: its place in the order.
    served: u64,
    entries: BTreeMap<Rank, Entry>,
    /// Of `entries`, those whose turn had come before.
    begun: BTreeSet<Rank>,
}

/// The sequences that wait. Operations on one take time logarithmic in all.
#[derive(Debug, Default)]
pub struct Waiting {
    /// The tenants with a queue, the least-served first.
    order: BTreeSet<TenantRank>,
    queues: HashMap<u32, Queue>,
    /// Where each queued sequence is.
    queued: HashMap<u64, (u32, Rank)>,
    aside: HashMap<u64, Entry>,
    /// Next rank behind all others, and the last one given before all others.
    last: i64,
    first: i64,
}

impl Waiting {
    /// Returns a rank behind all that were given for this priority.
    pub fn last_rank(&mut self, priority: i32) -> Rank {
        self.last += 1;
        Rank(Reverse(priority), self.last)
    }

    /// Returns a rank before all that were given for this priority.
    pub fn first_rank(&mut self, priority: i32) -> Rank {
        self.first -= 1;
        Rank(Reverse(priority), self.first)
    }

    /// Queues a sequence by its rank. `served`: what its tenant has had.
    pub fn push(&mut self, served: u64, entry: Entry) {
        self.queued.insert(entry.id, (entry.tenant, entry.rank));
        self.order.insert((served, entry.tenant));
        let queue = self.queues.entry(entry.tenant).or_default();
        queue.served = served;
        if entry.begun {
            queue.begun.insert(entry.rank);
        }
        queue.entries.insert(entry.rank, entry);
    }

    /// Takes a sequence out, wherever it is.
    pub fn remove(&mut self, id: u64) -> Option<Entry> {
        let Some((tenant, rank)) = self.queued.remove(&id) else { return self.aside.remove(&id) };
        let queue = self.queues.get_mut(&tenant)?;
        let entry = queue.entries.remove(&rank);
        queue.begun.remove(&rank);
        if queue.entries.is_empty() {
            self.order.remove(&(queue.served, tenant));
            self.queues.remove(&tenant);
        }
        entry
    }

    /// Sets a queued sequence aside whose turn has come; it keeps its rank.
    pub fn set_aside(&mut self, id: u64) {
        if let Some(entry) = self.remove(id) {
            self.push_aside(Entry { begun: true, ..entry });
        }
    }

    /// Adds a sequence to those set aside.
    pub fn push_aside(&mut self, entry: Entry) {
        self.aside.insert(entry.id, entry);
    }

    /// Queues a sequence again that was set aside.
    pub fn resume(&mut self, id: u64, served: impl Fn(u32) -> u64) {
        if let Some(entry) = self.aside.remove(&id) {
            self.push(served(entry.tenant), entry);
        }
    }

    /// Moves a tenant whose counter has grown.
    pub fn serve(&mut self, tenant: u32, served: u64) {
        if let Some(queue) = self.queues.get_mut(&tenant) {
            self.order.remove(&(queue.served, tenant));
            self.order.insert((served, tenant));
            queue.served = served;
        }
    }

    /// The first sequence of the least-served tenant behind this place, and the tenant's own place.
    pub fn next_after(&self, place: Option<TenantRank>) -> Option<(TenantRank, &Entry)> {
        let from = place.map_or(Bound::Unbounded, Bound::Excluded);
        let next = *self.order.range((from, Bound::Unbounded)).next()?;
        Some((next, self.first_of(next.1)?))
    }

    /// The first sequence of each tenant, the least-served tenant's first.
    pub fn first_of_tenants(&self) -> impl Iterator<Item = u64> + '_ {
        self.order.iter().filter_map(|(_, tenant)| Some(self.first_of(*tenant)?.id))
    }

    fn first_of(&self, tenant: u32) -> Option<&Entry> {
        self.queues.get(&tenant)?.entries.first_key_value().map(|(_, entry)| entry)
    }

    /// The first of a tenant's sequences whose turn had come before.
    pub fn first_begun(&self, tenant: u32) -> Option<&Entry> {
        let queue = self.queues.get(&tenant)?;
        queue.entries.get(queue.begun.first()?)
    }

    pub fn len(&self) -> usize {
        self.queued.len() + self.aside.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
