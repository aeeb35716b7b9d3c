//! Admission: how many sequences wait or run, in all and for each tenant, and when one that is refused may try again.
//!
//! No tenant can fill the queue for the others: where it is full, a tenant that has fewer sequences than another takes the place of the
//! newest request of the one that has most, if that request still waits. It does so when its own request is submitted, so that nothing is
//! ended for a request that turns out to be none.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
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
    max_queued_per_tenant: u64,
}

/// The sequences of a request that has lost its place.
pub type Displaced = Range<u64>;

#[derive(Debug, Default)]
struct Counts {
    max_queued: u64,
    /// Places taken, and not to be given back by a displaced request. Over `max_queued` by what [`Ticket::claim`] has still to take
    /// from others.
    held: u64,
    /// Tenants since the engine was last idle. Their numbers stay the same while others are served, so that a tenant who comes back comes
    /// back with what it has had.
    tenants: HashMap<TenantId, Queue>,
    next_number: u32,
    next_id: u64,
    closed: bool,
    /// How long an answered request's ticket is out in the mean over all tenants, lately; `None` before the first came back. Seconds.
    mean: Option<f64>,
}

/// A tenant's places that are taken, and those who wait outside.
#[derive(Debug, Default)]
struct Queue {
    /// The number that the scheduler knows the tenant by.
    number: u32,
    held: u64,
    /// Sequences refused, less the places given back since: about as many will come again.
    refused: u64,
    /// How long the tickets of the tenant's answered requests are out in the mean, lately. Seconds.
    mean: Option<f64>,
    /// Requests of which no sequence has started, by their first id: the newest last.
    waiting: BTreeMap<u64, Waiting>,
}

/// A request that can lose its places.
#[derive(Debug)]
struct Waiting {
    count: u64,
    /// The ticket's.
    displaced: Arc<AtomicBool>,
}

impl Queue {
    /// Notes sequences that are refused. Of a tenant that holds nothing, those refused before may never come again.
    fn refuse(&mut self, count: u64) {
        if self.held == 0 {
            self.refused = 0;
        }
        self.refused += count;
    }

    /// Returns when it may be the turn of those refused: places are given back `held` in the time that one is held, and each of those
    /// refused before waits for one too. The tenant's own queue alone decides.
    fn retry_after(&self, mean: Option<f64>) -> Duration {
        let Some(mean) = self.mean.or(mean) else { return RETRY_AFTER };
        let seconds = mean * self.refused as f64 / self.held.max(1) as f64;
        let (least, longest) = ESTIMATES;
        Duration::from_secs_f64(seconds.clamp(least.as_secs_f64(), longest.as_secs_f64()))
    }

    fn give_back(&mut self, count: u64) {
        self.held -= count;
        self.refused = if self.held == 0 { 0 } else { self.refused.saturating_sub(count) };
    }
}

impl Counts {
    /// Returns the newest waiting requests of the tenants that have most, of so many places or more: a tenant and a first id each. `None`
    /// where that would leave one of them with fewer than `gets`, what this tenant has then.
    fn victims(&self, tenant: &TenantId, gets: u64, places: u64) -> Option<Vec<(TenantId, u64)>> {
        let mut victims = Vec::new();
        if places == 0 {
            return Some(victims);
        }
        let others = self.tenants.iter().filter(|(id, _)| *id != tenant);
        let mut left: Vec<_> =
            others.map(|(id, queue)| (queue.held, queue.number, id, queue.waiting.iter().rev().peekable())).collect();
        let mut freed = 0;
        while freed < places {
            left.retain_mut(|(.., waiting)| waiting.peek().is_some());
            let (held, _, id, waiting) = left.iter_mut().max_by_key(|(held, number, ..)| (*held, *number))?;
            let (first, request) = waiting.next()?;
            *held = held.saturating_sub(request.count);
            if *held < gets {
                return None;
            }
            freed += request.count;
            victims.push((id.clone(), *first));
        }
        Some(victims)
    }

    /// Takes the places of these requests, which are refused by that.
    fn displace(&mut self, victims: Vec<(TenantId, u64)>) -> Vec<Displaced> {
        let mut displaced = Vec::with_capacity(victims.len());
        for (id, first) in victims {
            let Some(queue) = self.tenants.get_mut(&id) else { continue };
            let Some(request) = queue.waiting.remove(&first) else { continue };
            request.displaced.store(true, Ordering::Release);
            self.held -= request.count;
            queue.held -= request.count;
            queue.refuse(request.count);
            displaced.push(first..first + request.count);
        }
        displaced
    }

    fn retry_after(&self, tenant: &TenantId) -> Duration {
        self.tenants.get(tenant).map_or(RETRY_AFTER, |own| own.retry_after(self.mean))
    }

    fn refuse(&mut self, tenant: &TenantId, count: u64, limit: &'static str, message: String) -> Error {
        if let Some(own) = self.tenants.get_mut(tenant) {
            own.refuse(count);
        }
        Error::Exhausted { limit, message, retry_after: Some(self.retry_after(tenant)) }
    }

    fn refuse_full(&mut self, tenant: &TenantId, count: u64, held: u64) -> Error {
        let all = self.held;
        let message = format!("the server has {all} sequences waiting or running, {held} of them {tenant}'s");
        self.refuse(tenant, count, "max_queued", message)
    }
}

/// One request's places, one for each of its sequences; given back when dropped.
#[derive(Debug)]
pub struct Ticket {
    counts: Arc<Mutex<Counts>>,
    tenant: TenantId,
    /// The ids of the request's sequences.
    pub ids: Range<u64>,
    /// The tenant as the scheduler's number.
    pub number: u32,
    /// Places that others have to give for it.
    over: u64,
    since: Instant,
    /// Whether it has lost its places. Changed under the lock of the counts.
    displaced: Arc<AtomicBool>,
    answered: AtomicBool,
}

impl Tickets {
    pub fn new(limits: &Limits) -> Self {
        let counts = Counts { max_queued: limits.max_queued, ..Counts::default() };
        Self { counts: Arc::new(Mutex::new(counts)), max_queued_per_tenant: limits.max_queued_per_tenant }
    }

    /// Takes places for a request of so many sequences. Where the queue is full and others could be displaced, they are by
    /// [`Ticket::claim`].
    ///
    /// # Errors
    /// EXHAUSTED with the limit's name and when to try again; UNAVAILABLE once closed.
    pub fn take(&self, tenant: &TenantId, count: u64) -> Result<Ticket> {
        self.issue(tenant, count, true)
    }

    /// Takes places for what does not wait in the queue: it can displace nobody, and nobody can displace it.
    ///
    /// # Errors
    /// As [`Tickets::take`].
    pub fn take_unqueued(&self, tenant: &TenantId, count: u64) -> Result<Ticket> {
        self.issue(tenant, count, false)
    }

    fn issue(&self, tenant: &TenantId, count: u64, queues: bool) -> Result<Ticket> {
        let mut guard = lock(&self.counts);
        let counts = &mut *guard;
        if counts.closed {
            let message = "the server is shutting down; send the call again".to_owned();
            return Err(Error::Unavailable { message, retry_after: Some(RETRY_AFTER) });
        }
        let own = counts.tenants.entry(tenant.clone()).or_insert_with(|| {
            counts.next_number = counts.next_number.wrapping_add(1);
            Queue { number: counts.next_number, ..Queue::default() }
        });
        let (held, number) = (own.held, own.number);
        if held + count > self.max_queued_per_tenant {
            let message = format!("{tenant} has {held} sequences waiting or running and asks for {count} more");
            return Err(counts.refuse(tenant, count, "max_queued_per_tenant", message));
        }
        // With what others have still to take, so that no two count on the same victims.
        let excess = (counts.held + count).saturating_sub(counts.max_queued);
        if excess > 0 && !(queues && counts.victims(tenant, held + count, excess).is_some()) {
            return Err(counts.refuse_full(tenant, count, held));
        }
        let over = excess.min(count);
        let ids = counts.next_id..counts.next_id + count;
        counts.next_id = ids.end;
        counts.held += count;
        let displaced = Arc::<AtomicBool>::default();
        if let Some(own) = counts.tenants.get_mut(tenant) {
            own.held += count;
            if queues {
                own.waiting.insert(ids.start, Waiting { count, displaced: displaced.clone() });
            }
        }
        let (counts, tenant, since) = (self.counts.clone(), tenant.clone(), Instant::now());
        Ok(Ticket { counts, tenant, ids, number, over, since, displaced, answered: AtomicBool::new(false) })
    }

    /// Places that are taken.
    pub fn held(&self) -> u64 {
        lock(&self.counts).held
    }

    /// Places of a tenant that are taken.
    pub fn held_by(&self, tenant: &TenantId) -> u64 {
        lock(&self.counts).tenants.get(tenant).map_or(0, |own| own.held)
    }

    /// Refuses all from now on.
    pub fn close(&self) {
        lock(&self.counts).closed = true;
    }
}

impl Ticket {
    fn count(&self) -> u64 {
        self.ids.end - self.ids.start
    }

    fn is_displaced(&self) -> bool {
        self.displaced.load(Ordering::Acquire)
    }

    /// Takes the places from others that the request needs, as it is submitted, once. They are named, to be ended.
    ///
    /// # Errors
    /// EXHAUSTED where the request has lost its own places meanwhile, or nobody is left who could give theirs.
    pub fn claim(&self) -> Result<Vec<Displaced>> {
        let mut counts = lock(&self.counts);
        if self.is_displaced() {
            return Err(self.displaced_error(&counts));
        }
        // Others may have gone by themselves.
        let over = counts.held.saturating_sub(counts.max_queued).min(self.over);
        let gets = counts.tenants.get(&self.tenant).map_or(0, |own| own.held);
        match counts.victims(&self.tenant, gets, over) {
            Some(victims) => Ok(counts.displace(victims)),
            None => Err(counts.refuse_full(&self.tenant, self.count(), gets)),
        }
    }

    /// Notes that a sequence of the request starts: its place can't be taken any more. False where it has been.
    pub fn start(&self) -> bool {
        let mut counts = lock(&self.counts);
        if self.is_displaced() {
            return false;
        }
        if let Some(own) = counts.tenants.get_mut(&self.tenant) {
            own.waiting.remove(&self.ids.start);
        }
        true
    }

    /// Notes that a sequence of the request came to its end: the time that its places were held says how long others will be.
    pub fn set_answered(&self) {
        self.answered.store(true, Ordering::Relaxed);
    }

    /// Returns what a request is told whose place was taken; `None` where it still has it.
    pub fn displaced(&self) -> Option<Error> {
        self.is_displaced().then(|| self.displaced_error(&lock(&self.counts)))
    }

    fn displaced_error(&self, counts: &Counts) -> Error {
        let message = format!(
            "the queue is full, and the newest waiting request of {} gave its place to a tenant with fewer",
            self.tenant
        );
        let retry_after = Some(counts.retry_after(&self.tenant));
        Error::Exhausted { limit: "max_queued", message, retry_after }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut guard = lock(&self.counts);
        let counts = &mut *guard;
        if self.is_displaced() {
            return;
        }
        let answered = self.answered.load(Ordering::Relaxed).then(|| self.since.elapsed().as_secs_f64());
        let count_time = |mean: &mut Option<f64>| {
            if let Some(seconds) = answered {
                *mean = Some(mean.map_or(seconds, |mean| mean + RECENT * (seconds - mean)));
            }
        };
        count_time(&mut counts.mean);
        counts.held -= self.count();
        if counts.held == 0 {
            counts.tenants.clear();
        } else if let Some(own) = counts.tenants.get_mut(&self.tenant) {
            own.waiting.remove(&self.ids.start);
            count_time(&mut own.mean);
            own.give_back(self.count());
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
        let (ticket, displaced) = submitted(tickets, tenant, count).unwrap();
        assert_eq!(displaced, []);
        ticket
    }

    /// Takes places for a request that is submitted at once.
    fn submitted(tickets: &Tickets, tenant: &TenantId, count: u64) -> Result<(Ticket, Vec<Displaced>)> {
        let ticket = tickets.take(tenant, count)?;
        let displaced = ticket.claim()?;
        Ok((ticket, displaced))
    }

    fn limit_of<T: std::fmt::Debug>(result: Result<T>) -> &'static str {
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
        let (first, displaced) = submitted(&tickets, &c, 1).unwrap();
        assert_eq!(displaced.as_slice(), std::slice::from_ref(&(3..4)), "a's newest that has not started");
        assert!(!of_a[3].start());
        let told = of_a[3].displaced().unwrap();
        assert!(matches!(&told, Error::Exhausted { limit: "max_queued", retry_after: Some(_), .. }), "{told:?}");
        assert!(of_a[0].displaced().is_none());
        assert_eq!(tickets.held(), 8, "the place has gone to c at once");
        let (second, displaced) = submitted(&tickets, &c, 1).unwrap();
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
        while let Ok((ticket, displaced)) = submitted(&tickets, &fifth, 1) {
            assert_eq!(displaced.len(), 1);
            got.push(ticket);
        }
        assert_eq!((got.len(), tickets.held()), (204, 1024), "a fifth of all");
        let big = submitted(&tickets, &TenantId::new("sixth").unwrap(), 64).unwrap();
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

    /// A request that fails before it is submitted has ended nobody, and one whose places go meanwhile is told.
    #[test]
    fn places_are_taken_from_others_when_a_request_is_submitted() {
        let tickets = tickets(4, 4);
        let (a, b) = ids();
        let of_a: Vec<_> = (0..4).map(|_| take(&tickets, &a, 1)).collect();
        assert_eq!(limit_of(tickets.take_unqueued(&b, 1)), "max_queued", "what does not wait displaces nobody");
        let fails = tickets.take(&b, 2).unwrap();
        assert!(of_a.iter().all(|ticket| ticket.displaced().is_none()));
        drop(fails);
        assert!(of_a.iter().all(|ticket| ticket.displaced().is_none()));
        assert_eq!((tickets.held(), tickets.held_by(&a)), (4, 4));

        let [first, second] = [(); 2].map(|()| tickets.take(&b, 1).unwrap());
        assert_eq!(tickets.held(), 6);
        assert_eq!(first.claim().unwrap().as_slice(), std::slice::from_ref(&(3..4)));
        // Another one that goes by itself leaves its place to the second.
        drop(of_a);
        assert_eq!(second.claim().unwrap(), []);
        assert_eq!(tickets.held(), 2);
        drop((first, second));

        let of_a: Vec<_> = (0..4).map(|_| take(&tickets, &a, 1)).collect();
        let late = tickets.take(&b, 2).unwrap();
        assert!(of_a.iter().all(Ticket::start));
        assert_eq!(limit_of(late.claim()), "max_queued", "all have started meanwhile");
    }

    /// Each refusal counts once, however often it is told, and none for longer than the tenant has something under way.
    #[test]
    fn refusals_are_counted_once_and_forgotten() {
        let tickets = tickets(64, 64);
        let (a, b) = ids();
        let refused = |tenant: &TenantId| lock(&tickets.counts).tenants[tenant].refused;
        let runs = take(&tickets, &a, 2);
        assert!(runs.start());
        let waits = take(&tickets, &a, 62);
        let (taker, displaced) = submitted(&tickets, &b, 2).unwrap();
        assert_eq!(displaced.as_slice(), std::slice::from_ref(&(2..64)));
        assert_eq!(refused(&a), 62);
        (0..62).for_each(|_| assert!(waits.displaced().is_some()));
        drop(waits);
        assert_eq!(refused(&a), 62, "each of its sequences has been told");
        drop(runs);
        assert_eq!(refused(&a), 0, "nothing of it is under way");
        let others = take(&tickets, &b, 62);
        assert!(taker.start() && others.start());
        (0..9).for_each(|_| assert_eq!(limit_of(tickets.take(&a, 1)), "max_queued"));
        assert_eq!(refused(&a), 1, "who has nothing and is refused again is the one who comes again");
    }

    #[test]
    fn the_mean_is_of_answered_requests() {
        let tickets = tickets(4, 4);
        let (a, _) = ids();
        let stays = take(&tickets, &a, 1);
        let means = || {
            let counts = lock(&tickets.counts);
            (counts.mean.is_some(), counts.tenants[&a].mean.is_some())
        };
        drop(take(&tickets, &a, 1));
        drop(tickets.take_unqueued(&a, 1).unwrap());
        assert_eq!(means(), (false, false), "neither failed requests nor encoding say how long an answer takes");
        let answered = take(&tickets, &a, 1);
        answered.set_answered();
        drop(answered);
        assert_eq!(means(), (true, true));
        drop(stays);
    }
}
