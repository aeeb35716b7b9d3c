//! Places for work under way: so many in all, so many for one tenant. Operators take none, so that no tenant can lock them out.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::auth::Caller;
use crate::error::{Error, Result};
use crate::ids::TenantId;

/// A limit's name and value.
pub type Limit = (&'static str, u64);

/// Places that each tenant holds.
type Held = Arc<Mutex<HashMap<TenantId, u64>>>;

/// The places for one kind of work. Clones share them.
#[derive(Debug, Clone)]
pub struct Places {
    /// For people, e.g. `uploads`.
    what: &'static str,
    all: Arc<Semaphore>,
    all_limit: &'static str,
    tenants: Held,
    per_tenant: Limit,
    /// When a refused client may try again.
    retry_after: Duration,
}

impl Places {
    pub fn new(what: &'static str, all: Limit, per_tenant: Limit, retry_after: Duration) -> Self {
        let places = usize::try_from(all.1).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        let (all, all_limit) = (Arc::new(Semaphore::new(places)), all.0);
        Self { what, all, all_limit, tenants: Arc::default(), per_tenant, retry_after }
    }

    /// A place, or EXHAUSTED with the limit's name.
    pub fn take(&self, caller: &Caller) -> Result<Place> {
        let Caller::Tenant(tenant) = caller else { return Ok(Place { _all: None, tenant: None }) };
        let tenant = tenant.id();
        let full = |limit, whose: &str| Error::Exhausted {
            limit,
            message: format!("{whose} has as many {} under way as it may; try again", self.what),
            retry_after: Some(self.retry_after),
        };
        let all = self.all.clone().try_acquire_owned().map_err(|_| full(self.all_limit, "the server"))?;
        let mut tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        let held = tenants.entry(tenant.clone()).or_default();
        if *held >= self.per_tenant.1 {
            return Err(full(self.per_tenant.0, &tenant.to_string()));
        }
        *held += 1;
        Ok(Place { _all: Some(all), tenant: Some((self.tenants.clone(), tenant.clone())) })
    }
}

impl Places {
    /// Returns how many places a tenant holds.
    pub fn held_by(&self, tenant: &TenantId) -> u64 {
        self.tenants.lock().unwrap_or_else(PoisonError::into_inner).get(tenant).copied().unwrap_or_default()
    }
}

/// A place taken; given back when dropped.
#[derive(Debug)]
pub struct Place {
    _all: Option<OwnedSemaphorePermit>,
    tenant: Option<(Held, TenantId)>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some((tenants, tenant)) = &self.tenant else { return };
        let mut tenants = tenants.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = tenants.get_mut(tenant) {
            *held -= 1;
            if *held == 0 {
                tenants.remove(tenant);
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
        assert!(places.take(&Caller::Operator).is_ok());
        drop((held, other));
        assert!(places.tenants.lock().unwrap().is_empty());
        assert!(places.take(&a).is_ok());
    }
}
