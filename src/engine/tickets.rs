//! Admission: how many sequences wait or run, in all and for each tenant, and when one that is refused may try again.
//!
//! No tenant can fill the queue for the others: where it is full, a tenant that has fewer sequences than another takes the place of the
//! newest request of the one that has most, if that request still waits.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::config::Limits;
use crate::error::{Error, Result};
use crate::ids::TenantId;
use crate::sync::lock;

/// When a client may try again that is refused before any request has ended, or by a server that is going away.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Least and longest of the estimates.
const ESTIMATES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(60));
/// What the last request's time counts for in the mean.
const RECENT: f64 = 0.1;

/// Hands out [`Ticket`]s within `max_queued` and `max_queued_per_tenant`, which count sequences.
#[derive(Debug, Clone)]
pub struct Tickets {
    counts: Arc<Mutex<Counts>>,
    max_queued: u64,
    max_queued_per_tenant: u64,
}

/// The sequences of a request that has lost its place.
pub type Displaced = Range<u64>;

#[derive(Debug, Default)]
struct Counts {
    /// Places taken, and not to be given back by a displaced request.
    held: u64,
    /// Tenants since the engine was last idle. Their numbers stay the same while others are served, so that a tenant who comes back comes
    /// back with what it has had.
    tenants: HashMap<TenantId, Queue>,
    next_number: u32,
    next_id: u64,
    closed: bool,
    /// How long a ticket is out in the mean over all tenants, lately; `None` before the first came back. Seconds.
    mean: Option<f64>,
}

/// A tenant's tickets that are out, and those who wait outside.
#[derive(Debug, Default)]
struct Queue {
    /// The number that the scheduler knows the tenant by.
    number: u32,
    held: u64,
    /// Sequences refused, less the places given back since: about as many will come again.
    refused: u64,
    /// How long the tenant's tickets are out in the mean, lately. Seconds.
    mean: Option<f64>,
    /// Requests of which no sequence has started, by their first id: the newest last.
    waiting: BTreeMap<u64, Arc<Place>>,
}

/// What a ticket stands for.
#[derive(Debug)]
struct Place {
    count: u64,
    /// Changed under the lock of the counts.
    state: AtomicU8,
}

const WAITING: u8 = 0;
const STARTED: u8 = 1;
const DISPLACED: u8 = 2;

impl Place {
    fn is(&self, state: u8) -> bool {
        self.state.load(Ordering::Acquire) == state
    }

    fn set(&self, state: u8) {
        self.state.store(state, Ordering::Release);
    }
}

impl Queue {
    /// Notes sequences that are refused, and says when it may be their turn: places are given back `held` in the time that one is held,
    /// and each of those refused before waits for one too. The tenant's own queue alone decides.
    fn refuse(&mut self, count: u64, mean: Option<f64>) -> Duration {
        self.refused += count;
        let Some(mean) = self.mean.or(mean) else { return RETRY_AFTER };
        let seconds = mean * self.refused as f64 / self.held.max(1) as f64;
        let (least, longest) = ESTIMATES;
        Duration::from_secs_f64(seconds.clamp(least.as_secs_f64(), longest.as_secs_f64()))
    }

    fn give_back(&mut self, count: u64) {
        self.held -= count;
        self.refused = self.refused.saturating_sub(count);
    }
}

impl Counts {
    /// Takes places from the newest waiting requests of the tenants that have most, until `count` fit: none, where that would leave one of
    /// them with fewer places than this tenant gets.
    fn displace(&mut self, tenant: &TenantId, count: u64, most: u64) -> Option<Vec<Displaced>> {
        let gets = self.tenants.get(tenant).map_or(0, |own| own.held) + count;
        let mut taken: Vec<(TenantId, u64, Arc<Place>)> = Vec::new();
        while self.held + count > most {
            let others = self.tenants.iter().filter(|(id, queue)| *id != tenant && !queue.waiting.is_empty());
            let richest = others.max_by_key(|(_, queue)| (queue.held, queue.number)).map(|(id, _)| id.clone());
            let victim = richest.and_then(|id| {
                let queue = self.tenants.get_mut(&id)?;
                let (first, place) = queue.waiting.pop_last()?;
                Some((id, first, place))
            });
            let Some((id, first, place)) = victim else { break };
            let left = self.tenants.get(&id).map_or(0, |queue| queue.held.saturating_sub(place.count));
            self.held -= place.count;
            if let Some(queue) = self.tenants.get_mut(&id) {
                queue.held = left;
            }
            taken.push((id, first, place));
            if left < gets {
                break;
            }
        }
        let fair = taken.iter().all(|(id, ..)| self.tenants.get(id).is_some_and(|queue| queue.held >= gets));
        if fair && self.held + count <= most {
            taken.iter().for_each(|(_, _, place)| place.set(DISPLACED));
            return Some(taken.into_iter().map(|(_, first, place)| first..first + place.count).collect());
        }
        for (id, first, place) in taken {
            self.held += place.count;
            if let Some(queue) = self.tenants.get_mut(&id) {
                queue.held += place.count;
                queue.waiting.insert(first, place);
            }
        }
        None
    }
}

/// One request's places, one for each of its sequences; given back when dropped.
#[derive(Debug)]
pub struct Ticket {
    counts: Arc<Mutex<Counts>>,
    tenant: TenantId,
    place: Arc<Place>,
    /// The ids of the request's sequences.
    pub ids: Range<u64>,
    /// The tenant as the scheduler's number.
    pub number: u32,
    since: Instant,
}

impl Tickets {
    pub fn new(limits: &Limits) -> Self {
        let (max_queued, max_queued_per_tenant) = (limits.max_queued, limits.max_queued_per_tenant);
        Self { counts: Arc::default(), max_queued, max_queued_per_tenant }
    }

    /// Takes places for a request of so many sequences. Other requests may have lost theirs for it: they are named, to be ended.
    ///
    /// # Errors
    /// EXHAUSTED with the limit's name and when to try again; UNAVAILABLE once closed.
    pub fn take(&self, tenant: &TenantId, count: u64) -> Result<(Ticket, Vec<Displaced>)> {
        let mut counts = lock(&self.counts);
        if counts.closed {
            let message = "the server is shutting down; send the call again".to_owned();
            return Err(Error::Unavailable { message, retry_after: Some(RETRY_AFTER) });
        }
        if !counts.tenants.contains_key(tenant) {
            counts.next_number = counts.next_number.wrapping_add(1);
            let number = counts.next_number;
            counts.tenants.insert(tenant.clone(), Queue { number, ..Queue::default() });
        }
        let held = counts.tenants.get(tenant).map_or(0, |own| own.held);
        if held + count > self.max_queued_per_tenant {
            let message = format!("{tenant} has {held} sequences waiting or running and asks for {count} more");
            return Err(counts.refuse(tenant, count, "max_queued_per_tenant", message));
        }
        let Some(displaced) = counts.displace(tenant, count, self.max_queued) else {
            let (all, own) = (counts.held, held);
            let message = format!("the server has {all} sequences waiting or running, {own} of them {tenant}'s");
            return Err(counts.refuse(tenant, count, "max_queued", message));
        };
        let first = counts.next_id;
        counts.next_id += count;
        counts.held += count;
        let place = Arc::new(Place { count, state: AtomicU8::new(WAITING) });
        let mut number = 0;
        if let Some(own) = counts.tenants.get_mut(tenant) {
            own.held += count;
            own.waiting.insert(first, place.clone());
            number = own.number;
        }
        let (counts, tenant, ids) = (self.counts.clone(), tenant.clone(), first..first + count);
        Ok((Ticket { counts, tenant, place, ids, number, since: Instant::now() }, displaced))
    }

    /// Places that are taken.
    pub fn held(&self) -> u64 {
        lock(&self.counts).held
    }

    /// Tickets of a tenant that are out.
    pub fn held_by(&self, tenant: &TenantId) -> u64 {
        lock(&self.counts).tenants.get(tenant).map_or(0, |own| own.held)
    }

    /// Refuses all from now on.
    pub fn close(&self) {
        lock(&self.counts).closed = true;
    }
}

impl Counts {
    fn refuse(&mut self, tenant: &TenantId, count: u64, limit: &'static str, message: String) -> Error {
        let mean = self.mean;
        let after = self.tenants.get_mut(tenant).map_or(RETRY_AFTER, |own| own.refuse(count, mean));
        Error::Exhausted { limit, message, retry_after: Some(after) }
    }
}

impl Ticket {
    /// Notes that a sequence of the request starts: its place can't be taken any more. False where it has been.
    pub fn start(&self) -> bool {
        // Most have started, and that never changes.
        if self.place.is(STARTED) {
            return true;
        }
        let mut counts = lock(&self.counts);
        if self.place.is(DISPLACED) {
            return false;
        }
        self.place.set(STARTED);
        if let Some(own) = counts.tenants.get_mut(&self.tenant) {
            own.waiting.remove(&self.ids.start);
        }
        true
    }

    /// What a request is told whose place was taken; `None` where it still has it.
    pub fn displaced(&self) -> Option<Error> {
        if !self.place.is(DISPLACED) {
            return None;
        }
        let message = format!(
            "the queue is full, and the newest waiting request of {} gave its place to a tenant with fewer",
            self.tenant
        );
        Some(lock(&self.counts).refuse(&self.tenant, self.place.count, "max_queued", message))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut counts = lock(&self.counts);
        let seconds = self.since.elapsed().as_secs_f64();
        let recent = |mean: Option<f64>| Some(mean.map_or(seconds, |mean| mean + RECENT * (seconds - mean)));
        let displaced = self.place.is(DISPLACED);
        if !displaced {
            counts.mean = recent(counts.mean);
            counts.held -= self.place.count;
        }
        if counts.held == 0 {
            counts.tenants.clear();
        } else if let Some(own) = counts.tenants.get_mut(&self.tenant) {
            own.waiting.remove(&self.ids.start);
            if !displaced {
                own.mean = recent(own.mean);
                own.give_back(self.place.count);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids() -> (TenantId, TenantId) {
        (TenantId::new("a").unwrap(), TenantId::new("b").unwrap())
    }

    fn tickets(max_queued: u64, max_queued_per_tenant: u64) -> Tickets {
        Tickets::new(&Limits { max_queued, max_queued_per_tenant, ..Limits::default() })
    }

    fn take(tickets: &Tickets, tenant: &TenantId, count: u64) -> Ticket {
        let (ticket, displaced) = tickets.take(tenant, count).unwrap();
        assert_eq!(displaced, []);
        ticket
    }

    fn limit_of(result: Result<(Ticket, Vec<Displaced>)>) -> &'static str {
        match result {
            Err(Error::Exhausted { limit, retry_after: Some(_), .. }) => limit,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn limits_count_sequences_and_tickets_come_back() {
        let tickets = tickets(6, 4);
        let (a, b) = ids();
        let held = [take(&tickets, &a, 3), take(&tickets, &a, 1)];
        assert_eq!((held[0].ids.clone(), held[1].ids.clone()), (0..3, 3..4));
        assert_eq!(limit_of(tickets.take(&a, 1)), "max_queued_per_tenant");
        let other = take(&tickets, &b, 2);
        assert_ne!(other.number, held[0].number);
        assert!(held.iter().all(Ticket::start));
        assert_eq!(limit_of(tickets.take(&b, 1)), "max_queued", "what has started keeps its place");
        assert_eq!(limit_of(tickets.take(&b, 64)), "max_queued_per_tenant", "64 sequences are 64");
        let number = other.number;
        drop(other);
        assert_eq!(take(&tickets, &b, 1).number, number, "what it has had is not forgotten while others wait");
        drop(held);
        assert_eq!((tickets.held(), lock(&tickets.counts).tenants.len()), (0, 0));
        tickets.close();
        assert!(matches!(tickets.take(&a, 1), Err(Error::Unavailable { .. })));
    }

    #[test]
    fn a_tenant_below_its_share_takes_the_place_of_the_newest_of_the_one_with_most() {
        let tickets = tickets(8, 6);
        let (a, b) = ids();
        let c = TenantId::new("c").unwrap();
        let of_a: Vec<_> = (0..5).map(|_| take(&tickets, &a, 1)).collect();
        let of_b: Vec<_> = (0..3).map(|_| take(&tickets, &b, 1)).collect();
        assert!(of_a[0].start() && of_a[4].start());
        let (first, displaced) = tickets.take(&c, 1).unwrap();
        assert_eq!(displaced.as_slice(), std::slice::from_ref(&(3..4)), "a's newest that has not started");
        assert!(!of_a[3].start());
        let told = of_a[3].displaced().unwrap();
        assert!(matches!(&told, Error::Exhausted { limit: "max_queued", retry_after: Some(_), .. }), "{told:?}");
        assert!(of_a[0].displaced().is_none());
        assert_eq!(tickets.held(), 8, "the place has gone to c at once");
        let (second, displaced) = tickets.take(&c, 1).unwrap();
        assert_eq!(displaced.as_slice(), std::slice::from_ref(&(2..3)));
        assert_eq!(limit_of(tickets.take(&c, 1)), "max_queued", "a third would leave the others with fewer");
        assert_eq!(limit_of(tickets.take(&c, 2)), "max_queued");
        assert_eq!(lock(&tickets.counts).tenants[&b].waiting.len(), 3, "a refusal has taken nothing");
        drop(of_a);
        assert_eq!(tickets.held(), 5, "a displaced ticket gives nothing back");
        drop((of_b, first, second));
        assert_eq!((tickets.held(), lock(&tickets.counts).tenants.len()), (0, 0));
    }

    #[test]
    fn four_full_tenants_leave_room_for_a_fifth() {
        let tickets = tickets(1024, 256);
        let full: Vec<TenantId> = (0..4).map(|i| TenantId::new(&format!("t{i}")).unwrap()).collect();
        let held: Vec<_> = full.iter().flat_map(|tenant| (0..256).map(|_| take(&tickets, tenant, 1))).collect();
        held.iter().step_by(22).for_each(|ticket| assert!(ticket.start()));
        let fifth = TenantId::new("fifth").unwrap();
        let mut got = Vec::new();
        while let Ok((ticket, displaced)) = tickets.take(&fifth, 1) {
            assert_eq!(displaced.len(), 1);
            got.push(ticket);
        }
        assert_eq!((got.len(), tickets.held()), (204, 1024), "a fifth of all");
        let big = tickets.take(&TenantId::new("sixth").unwrap(), 64).unwrap();
        assert_eq!((big.1.len(), tickets.held()), (64, 1024));
    }

    #[test]
    fn the_refused_are_told_when_a_place_may_be_theirs() {
        let tickets = tickets(4, 2);
        let after = |tenant| match tickets.take(tenant, 1) {
            Err(Error::Exhausted { retry_after: Some(after), .. }) => after.as_secs_f64(),
            other => panic!("{other:?}"),
        };
        let (a, b) = ids();
        let held = [take(&tickets, &a, 1), take(&tickets, &a, 1)];
        assert_eq!(after(&a), 1.0, "nothing is known yet");
        lock(&tickets.counts).mean = Some(8.0);
        assert_eq!([after(&a), after(&a)], [8.0, 12.0], "two places in 8 seconds, and others wait too");
        let others = [take(&tickets, &b, 1), take(&tickets, &b, 1)];
        let own = |tenant: &TenantId, mean| lock(&tickets.counts).tenants.get_mut(tenant).unwrap().mean = Some(mean);
        own(&b, 3.0);
        assert_eq!(after(&b), 1.5, "by its own queue, however slow others are");
        own(&b, 1e6);
        assert_eq!(after(&b), 60.0);
        drop(others);
        own(&a, 0.0);
        assert_eq!(after(&a), 0.1);
        drop(held);
    }
}
