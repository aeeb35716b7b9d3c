//! Admission: how many requests wait or run, in all and for each tenant, and when one that is refused may try again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::config::Limits;
use crate::error::{Error, Result};
use crate::ids::TenantId;

/// When a client may try again that is refused before any request has ended, or by a server that is going away.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Least and longest of the estimates.
const ESTIMATES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(60));
/// What the last request's time counts for in the mean.
const RECENT: f64 = 0.1;

/// Hands out [`Ticket`]s within `max_queued` and `max_queued_per_tenant`.
#[derive(Debug, Clone)]
pub struct Tickets {
    counts: Arc<Mutex<Counts>>,
    max_queued: u64,
    max_queued_per_tenant: u64,
}

#[derive(Debug, Default)]
struct Counts {
    all: Queue,
    /// Tenants since the engine was last idle: their tickets, and the number that the scheduler knows each by. It stays the same while
    /// others are served, so that a tenant who comes back comes back with what it has had.
    tenants: HashMap<TenantId, (Queue, u32)>,
    next_number: u32,
    closed: bool,
    /// How long a ticket is out in the mean, lately; `None` before the first came back. Seconds.
    mean: Option<f64>,
}

/// Tickets that are out, and those who wait outside.
#[derive(Debug, Default)]
struct Queue {
    held: u64,
    /// Requests refused, less the places given back since: about as many will come again.
    refused: u64,
}

impl Queue {
    /// Notes one who is refused, and says when it may be its turn: places are given back `held` in the time that one is held, and each of
    /// those refused before waits for one too.
    fn refuse(&mut self, mean: Option<f64>) -> Duration {
        self.refused += 1;
        let Some(mean) = mean else { return RETRY_AFTER };
        let seconds = mean * self.refused as f64 / self.held.max(1) as f64;
        let (least, longest) = ESTIMATES;
        Duration::from_secs_f64(seconds.clamp(least.as_secs_f64(), longest.as_secs_f64()))
    }

    fn give_back(&mut self) {
        self.held -= 1;
        self.refused = self.refused.saturating_sub(1);
    }
}

/// One request's place; given back when dropped.
#[derive(Debug)]
pub struct Ticket {
    counts: Arc<Mutex<Counts>>,
    tenant: TenantId,
    /// The tenant as the scheduler's number.
    pub number: u32,
    since: Instant,
}

fn lock(counts: &Mutex<Counts>) -> MutexGuard<'_, Counts> {
    counts.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Tickets {
    pub fn new(limits: &Limits) -> Self {
        let (max_queued, max_queued_per_tenant) = (limits.max_queued, limits.max_queued_per_tenant);
        Self { counts: Arc::default(), max_queued, max_queued_per_tenant }
    }

    pub fn take(&self, tenant: &TenantId) -> Result<Ticket> {
        let mut counts = lock(&self.counts);
        let Counts { all, tenants, next_number, closed, mean } = &mut *counts;
        if *closed {
            let message = "the server is shutting down; send the call again".to_owned();
            return Err(Error::Unavailable { message, retry_after: Some(RETRY_AFTER) });
        }
        let full = |limit, message, after| Err(Error::Exhausted { limit, message, retry_after: Some(after) });
        if all.held >= self.max_queued {
            let message = format!("the server has {} requests waiting or running", all.held);
            return full("max_queued", message, all.refuse(*mean));
        }
        let (own, number) = tenants.entry(tenant.clone()).or_insert_with(|| {
            *next_number = next_number.wrapping_add(1);
            (Queue::default(), *next_number)
        });
        if own.held >= self.max_queued_per_tenant {
            let message = format!("{tenant} has {} requests waiting or running", own.held);
            return full("max_queued_per_tenant", message, own.refuse(*mean));
        }
        own.held += 1;
        all.held += 1;
        let (tenant, number) = (tenant.clone(), *number);
        Ok(Ticket { counts: self.counts.clone(), tenant, number, since: Instant::now() })
    }

    /// Tickets that are out.
    pub fn held(&self) -> u64 {
        lock(&self.counts).all.held
    }

    /// Tickets of a tenant that are out.
    pub fn held_by(&self, tenant: &TenantId) -> u64 {
        lock(&self.counts).tenants.get(tenant).map_or(0, |(own, _)| own.held)
    }

    /// Refuses all from now on.
    pub fn close(&self) {
        lock(&self.counts).closed = true;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut counts = lock(&self.counts);
        let seconds = self.since.elapsed().as_secs_f64();
        counts.mean = Some(counts.mean.map_or(seconds, |mean| mean + RECENT * (seconds - mean)));
        counts.all.give_back();
        if counts.all.held == 0 {
            counts.all.refused = 0;
            counts.tenants.clear();
        } else if let Some((own, _)) = counts.tenants.get_mut(&self.tenant) {
            own.give_back();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids() -> (TenantId, TenantId) {
        (TenantId::new("a").unwrap(), TenantId::new("b").unwrap())
    }

    #[test]
    fn limits_hold_and_tickets_come_back() {
        let limits = Limits { max_queued: 3, max_queued_per_tenant: 2, ..Limits::default() };
        let tickets = Tickets::new(&limits);
        let (a, b) = ids();
        let held = [tickets.take(&a).unwrap(), tickets.take(&a).unwrap()];
        assert!(matches!(tickets.take(&a), Err(Error::Exhausted { limit: "max_queued_per_tenant", .. })));
        let other = tickets.take(&b).unwrap();
        assert_ne!(other.number, held[0].number);
        assert!(matches!(tickets.take(&b), Err(Error::Exhausted { limit: "max_queued", .. })));
        let number = other.number;
        drop(other);
        assert_eq!(tickets.take(&b).unwrap().number, number, "what it has had is not forgotten while others wait");
        drop(held);
        assert_eq!((tickets.held(), lock(&tickets.counts).tenants.len()), (0, 0));
        tickets.close();
        assert!(matches!(tickets.take(&a), Err(Error::Unavailable { .. })));
    }

    #[test]
    fn the_refused_are_told_when_a_place_may_be_theirs() {
        let limits = Limits { max_queued: 4, max_queued_per_tenant: 2, ..Limits::default() };
        let tickets = Tickets::new(&limits);
        let after = |tenant| match tickets.take(tenant) {
            Err(Error::Exhausted { retry_after: Some(after), .. }) => after.as_secs_f64(),
            other => panic!("{other:?}"),
        };
        let (a, b) = ids();
        let held = [tickets.take(&a).unwrap(), tickets.take(&a).unwrap()];
        assert_eq!(after(&a), 1.0, "nothing is known yet");
        lock(&tickets.counts).mean = Some(8.0);
        assert_eq!([after(&a), after(&a)], [8.0, 12.0], "two places in 8 seconds, and others wait too");
        let others = [tickets.take(&b).unwrap(), tickets.take(&b).unwrap()];
        assert_eq!(after(&b), 2.0, "four places, of the whole server");
        lock(&tickets.counts).mean = Some(1e6);
        assert_eq!(after(&b), 60.0);
        drop(others);
        lock(&tickets.counts).mean = Some(0.0);
        assert_eq!(after(&a), 0.1);
        drop(held);
    }
}
