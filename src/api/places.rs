//! Places for work under way: so many in all, so many for one tenant, or for one address where nobody knows yet who calls. Operators take
//! none, so that no tenant can lock them out; and no number of tenants can lock out another: each may hold no more than is left to the
//! others, and one place whatever is left.

use std::collections::HashMap;
use std::fmt::Display;
use std::hash::Hash;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::auth::Caller;
use crate::config::Limits;
use crate::error::{Error, Result};
use crate::ids::TenantId;
use crate::sync::lock;

/// A limit's name and value.
pub type Limit = (&'static str, u64);

/// The places that are taken, in all and by each.
#[derive(Debug)]
struct Held<K> {
    all: u64,
    each: HashMap<K, u64>,
}

/// The places for one kind of work. Clones share them.
#[derive(Debug, Clone)]
pub struct Places<K = TenantId> {
    /// For people, e.g. `uploads`.
    what: &'static str,
    held: Arc<Mutex<Held<K>>>,
    all: Limit,
    each: Limit,
    /// When a refused client may try again.
    retry_after: Duration,
}

impl<K: Clone + Display + Eq + Hash> Places<K> {
    /// Makes `all` places, of which one tenant or address may have `each`.
    pub fn new(what: &'static str, all: Limit, each: Limit, retry_after: Duration) -> Self {
        let held = Arc::new(Mutex::new(Held { all: 0, each: HashMap::new() }));
        Self { what, held, all, each, retry_after }
    }

    /// Takes a place.
    ///
    /// # Errors
    /// EXHAUSTED with the limit's name: of each, or of all where `who` holds a place already and as many as are left.
    pub fn take_for(&self, who: &K) -> Result<Place<K>> {
        let full = |limit, whose: &str| Error::Exhausted {
            limit,
            message: format!("{whose} has as many {} under way as it may; try again", self.what),
            retry_after: Some(self.retry_after),
        };
        let mut held = lock(&self.held);
        let own = held.each.get(who).copied().unwrap_or(0);
        if own >= self.each.1 {
            return Err(full(self.each.0, &who.to_string()));
        }
        let left = self.all.1.saturating_sub(held.all);
        if own > 0 && own >= left {
            return Err(full(self.all.0, "the server, but for the places that are kept for others,"));
        }
        held.all += 1;
        *held.each.entry(who.clone()).or_default() += 1;
        Ok(Place { taken: Some((self.held.clone(), who.clone())) })
    }

    /// Returns how many places are taken.
    pub fn held(&self) -> u64 {
        lock(&self.held).all
    }

    /// Returns how many of them one tenant or address has.
    pub fn held_by(&self, who: &K) -> u64 {
        lock(&self.held).each.get(who).copied().unwrap_or_default()
    }
}

impl Places {
    /// Takes a place for a caller's work; an operator's takes none.
    ///
    /// # Errors
    /// As [`Places::take_for`].
    pub fn take(&self, caller: &Caller) -> Result<Place> {
        match caller {
            Caller::Tenant(tenant) => self.take_for(tenant.id()),
            Caller::Operator => Ok(Place { taken: None }),
        }
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

/// A place taken; given back when dropped.
#[derive(Debug)]
pub struct Place<K: Eq + Hash = TenantId> {
    taken: Option<(Arc<Mutex<Held<K>>>, K)>,
}

impl<K: Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let Some((held, who)) = &self.taken else { return };
        let mut held = lock(held);
        held.all -= 1;
        if let Some(own) = held.each.get_mut(who) {
            *own -= 1;
            if *own == 0 {
                held.each.remove(who);
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
        assert!(lock(&places.held).each.is_empty());
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
