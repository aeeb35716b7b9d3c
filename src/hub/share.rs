//! What each tenant's leases hold of the device's memory: none may hold more than its share at once, so that none can take it all.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::ids::TenantId;
use crate::sync::lock;

/// The versions that each tenant holds, by uid.
#[derive(Debug)]
pub(super) struct Shares {
    /// Bytes that one tenant may hold.
    limit: u64,
    tenants: Mutex<HashMap<TenantId, HashMap<String, Held>>>,
}

#[derive(Debug, Clone, Copy)]
struct Held {
    leases: usize,
    bytes: u64,
}

/// A part of a tenant's share, for as long as it lives.
#[derive(Debug)]
pub struct Claim {
    shares: Arc<Shares>,
    tenant: TenantId,
    uid: String,
}

impl Shares {
    pub(super) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit, tenants: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TenantId, HashMap<String, Held>>> {
        lock(&self.tenants)
    }

    /// Claims the memory of a version for a tenant, which counts once however often it is claimed. `None` where the tenant would hold more
    /// than its share; one version it may always hold, and all that is `forced`.
    pub(super) fn claim(self: &Arc<Self>, tenant: &TenantId, uid: &str, bytes: u64, forced: bool) -> Option<Claim> {
        let mut tenants = self.lock();
        let versions = tenants.entry(tenant.clone()).or_default();
        if let Some(held) = versions.get_mut(uid) {
            held.leases += 1;
        } else {
            let sum: u64 = versions.values().map(|held| held.bytes).sum();
            if sum > 0 && sum.saturating_add(bytes) > self.limit && !forced {
                return None;
            }
            versions.insert(uid.to_owned(), Held { leases: 1, bytes });
        }
        Some(Claim { shares: Arc::clone(self), tenant: tenant.clone(), uid: uid.to_owned() })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut tenants = self.shares.lock();
        let Some(versions) = tenants.get_mut(&self.tenant) else { return };
        if let Some(held) = versions.get_mut(&self.uid) {
            held.leases -= 1;
            if held.leases == 0 {
                versions.remove(&self.uid);
            }
        }
        if versions.is_empty() {
            tenants.remove(&self.tenant);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_holds_its_share_and_no_more() {
        let shares = Shares::new(10);
        let (a, b) = (TenantId::new("a").unwrap(), TenantId::new("b").unwrap());
        let first = shares.claim(&a, "u", 6, false).unwrap();
        let again = shares.claim(&a, "u", 6, false).unwrap();
        assert!(shares.claim(&a, "v", 5, false).is_none());
        let fits = shares.claim(&a, "w", 4, false).unwrap();
        assert!(shares.claim(&b, "x", 50, false).is_some(), "one version is always allowed");
        drop(first);
        assert!(shares.claim(&a, "v", 5, false).is_none(), "it is still held by the other");
        drop(again);
        assert!(shares.claim(&a, "v", 5, false).is_some());
        assert!(shares.claim(&a, "y", 50, true).is_some());
        drop(fits);
        assert!(shares.lock().is_empty());
    }
}
