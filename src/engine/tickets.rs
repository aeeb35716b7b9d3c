//! Admission: how many requests wait or run, in all and for each tenant.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::config::Limits;
use crate::error::{Error, Result};
use crate::ids::TenantId;

/// When a refused client may try again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Hands out [`Ticket`]s within `max_queued` and `max_queued_per_tenant`.
#[derive(Debug, Clone)]
pub struct Tickets {
    counts: Arc<Mutex<Counts>>,
    max_queued: u64,
    max_queued_per_tenant: u64,
}

#[derive(Debug, Default)]
struct Counts {
    all: u64,
    /// Tenants since the engine was last idle: their tickets, and the number that the scheduler knows each by. It stays the same while
    /// others are served, so that a tenant who comes back comes back with what it has had.
    tenants: HashMap<TenantId, (u64, u32)>,
    next_number: u32,
    closed: bool,
}

/// One request's place; given back when dropped.
#[derive(Debug)]
pub struct Ticket {
    counts: Arc<Mutex<Counts>>,
    tenant: TenantId,
    /// The tenant as the scheduler's number.
    pub number: u32,
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
        if counts.closed {
            let message = "the server is shutting down; send the call again".to_owned();
            return Err(Error::Unavailable { message, retry_after: Some(RETRY_AFTER) });
        }
        let full = |limit, message: String| Err(Error::Exhausted { limit, message, retry_after: Some(RETRY_AFTER) });
        if counts.all >= self.max_queued {
            return full("max_queued", format!("the server has {} requests waiting or running", counts.all));
        }
        let next = counts.next_number;
        let (held, number) = counts.tenants.entry(tenant.clone()).or_insert((0, next));
        if *held >= self.max_queued_per_tenant {
            return full("max_queued_per_tenant", format!("{tenant} has {held} requests waiting or running"));
        }
        *held += 1;
        let number = *number;
        counts.all += 1;
        counts.next_number = counts.next_number.wrapping_add(u32::from(number == next));
        Ok(Ticket { counts: self.counts.clone(), tenant: tenant.clone(), number })
    }

    /// Tickets that are out.
    pub fn held(&self) -> u64 {
        lock(&self.counts).all
    }

    /// Refuses all from now on.
    pub fn close(&self) {
        lock(&self.counts).closed = true;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut counts = lock(&self.counts);
        counts.all -= 1;
        if counts.all == 0 {
            counts.tenants.clear();
        } else if let Some((held, _)) = counts.tenants.get_mut(&self.tenant) {
            *held -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_hold_and_tickets_come_back() {
        let limits = Limits { max_queued: 3, max_queued_per_tenant: 2, ..Limits::default() };
        let tickets = Tickets::new(&limits);
        let (a, b) = (TenantId::new("a").unwrap(), TenantId::new("b").unwrap());
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
}
