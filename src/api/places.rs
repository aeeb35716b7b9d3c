//! Places for work under way: so many in all, so many for one tenant. Operators take none, so that no tenant can lock them out; and no
//! number of tenants can lock out another: each may hold no more than is left to the others, and one place whatever is left.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::auth::Caller;
use crate::config::Limits;
use crate::error::{Error, Result};
use crate::ids::TenantId;
use crate::sync::lock;

/// A limit's name and value.
pub type Limit = (&'static str, u64);

/// The places that are taken, in all and by each tenant.
#[derive(Debug, Default)]
struct Held {
    all: u64,
    tenants: HashMap<TenantId, u64>,
}

/// The places for one kind of work. Clones share them.
#[derive(Debug, Clone)]
pub struct Places {
    /// For people, e.g. `uploads`.
    what: &'static str,
    held: Arc<Mutex<Held>>,
    all: Limit,
    per_tenant: Limit,
    /// When a refused client may try again.
    retry_after: Duration,
}

impl Places {
    pub fn new(what: &'static str, all: Limit, per_tenant: Limit, retry_after: Duration) -> Self {
        Self { what, held: Arc::default(), all, per_tenant, retry_after }
    }

    /// Takes a place.
    ///
    /// # Errors
    /// EXHAUSTED with the limit's name: of the tenant, or of all where the tenant holds a place already and as many as are left.
    pub fn take(&self, caller: &Caller) -> Result<Place> {
        let Caller::Tenant(tenant) = caller else { return Ok(Place { taken: None }) };
        let tenant = tenant.id();
        let full = |limit, whose: &str| Error::Exhausted {
            limit,
            message: format!("{whose} has as many {} under way as it may; try again", self.what),
            retry_after: Some(self.retry_after),
        };
        let mut held = lock(&self.held);
        let own = held.tenants.get(tenant).copied().unwrap_or(0);
        if own >= self.per_tenant.1 {
            return Err(full(self.per_tenant.0, &tenant.to_string()));
        }
        let left = self.all.1.saturating_sub(held.all);
        if own > 0 && own >= left {
            return Err(full(self.all.0, "the server, but for the places that are kept for others,"));
        }
        held.all += 1;
        *held.tenants.entry(tenant.clone()).or_default() += 1;
        Ok(Place { taken: Some((self.held.clone(), tenant.clone())) })
    }

    /// Places that are taken by tenants.
    pub fn held(&self) -> u64 {
        lock(&self.held).all
    }
}

/// The places for work that takes much memory or disk.
#[derive(Debug, Clone)]
pub struct WorkPlaces {
    /// Imports and uploads of datasets.
    pub uploads: Places,
    /// Reading whole datasets and adapters.
    pub reads: Places,
}

impl WorkPlaces {
    /// Returns the places that the limits allow.
    pub fn new(limits: &Limits) -> Self {
        let places = |what, all, per_tenant| Places::new(what, all, per_tenant, Duration::from_secs(5));
        Self {
            uploads: places(
                "uploads",
                ("max_uploads", limits.max_uploads),
                ("max_uploads_per_tenant", limits.max_uploads_per_tenant),
            ),
            reads: places(
                "reads",
                ("max_reads", limits.max_reads),
                ("max_reads_per_tenant", limits.max_reads_per_tenant),
            ),
        }
    }
}

impl Places {
    /// Returns how many places a tenant holds.
    pub fn held_by(&self, tenant: &TenantId) -> u64 {
        lock(&self.held).tenants.get(tenant).copied().unwrap_or_default()
    }
}

/// A place taken; given back when dropped.
#[derive(Debug)]
pub struct Place {
    taken: Option<(Arc<Mutex<Held>>, TenantId)>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some((held, tenant)) = &self.taken else { return };
        let mut held = lock(held);
        held.all -= 1;
        if let Some(own) = held.tenants.get_mut(tenant) {
            *own -= 1;
            if *own == 0 {
                held.tenants.remove(tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Tenant;

    fn tenant(id: &str) -> Caller {
        Caller::Tenant(Tenant::proven(TenantId::new(id).unwrap()))
    }

    fn limit_of(result: Result<Place>) -> &'static str {
        match result {
            Err(Error::Exhausted { limit, retry_after: Some(_), .. }) => limit,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_tenant_cannot_take_the_others_places_nor_all_the_operators() {
        let places = Places::new("uploads", ("all", 3), ("each", 2), Duration::from_secs(1));
        let (a, b) = (tenant("a"), tenant("b"));
        let held = [places.take(&a).unwrap(), places.take(&a).unwrap()];
        assert_eq!(limit_of(places.take(&a)), "each");
        let other = places.take(&b).unwrap();
        assert_eq!(limit_of(places.take(&b)), "all");
        places.take(&Caller::Operator).unwrap();
        drop(held);
        let held = [places.take(&b).unwrap(), places.take(&a).unwrap()];
        drop((other, held));
        assert_eq!(places.held(), 0);
        assert!(lock(&places.held).tenants.is_empty());
    }

    #[test]
    fn no_number_of_tenants_locks_out_another() {
        let places = Places::new("calls", ("all", 64), ("each", 64), Duration::from_secs(1));
        let mut held = Vec::new();
        for id in ["a", "b", "c", "d"] {
            let tenant = tenant(id);
            let before = held.len();
            while let Ok(place) = places.take(&tenant) {
                held.push(place);
            }
            assert!(held.len() > before);
        }
        assert_eq!(held.len(), 32 + 16 + 8 + 4);
        let more: Vec<_> = (0..100).map(|i| places.take(&tenant(&format!("t{i}"))).unwrap()).collect();
        assert_eq!(places.held(), 60 + 100, "whoever holds nothing gets in");
        drop((held, more));
        assert_eq!(places.held(), 0);
    }
}
