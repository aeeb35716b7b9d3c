//! The versions on the device: each is loaded once however many ask, bytes are reserved before a load and released by `Drop`, and the
//! least recently used version without a lease leaves when room is needed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dashmap::DashMap;
use tokio::sync::OnceCell;

use crate::adapter::PackedAdapter;
use crate::error::{Error, Result};
use crate::hub::budget::{Budget, NotifyOnDrop, Reservation};
use crate::hub::ledger::{Ledger, Residency, Tier};
use crate::hub::stats;
use crate::ids::{Digest, TenantId};

/// Leases are short: a caller that finds the memory full may try again soon.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A version's tensors and the bytes reserved for them.
#[derive(Debug)]
pub(super) struct Resident {
    pub(super) digest: Digest,
    pub(super) packed: Arc<PackedAdapter>,
    /// Given back when the version leaves memory.
    _reserved: Reservation,
}

impl Resident {
    pub(super) fn new(digest: Digest, packed: PackedAdapter, reserved: Reservation) -> Self {
        Self { digest, packed: Arc::new(packed), _reserved: reserved }
    }
}

/// The place of one version: empty while it loads.
#[derive(Debug)]
struct Slot {
    tenant: TenantId,
    loaded: OnceCell<Arc<Resident>>,
    last_used: AtomicU64,
}

impl Slot {
    /// Loaded, and nobody but the table holds the slot or the version. Stable while the slot's place in the table is locked.
    fn is_idle(self: &Arc<Self>) -> bool {
        Arc::strong_count(self) == 1 && self.loaded.get().is_some_and(|resident| Arc::strong_count(resident) == 1)
    }
}

/// All versions on the device, by uid.
#[derive(Debug)]
pub(super) struct Residents {
    slots: DashMap<String, Arc<Slot>>,
    budget: Arc<Budget>,
    /// Longest wait for room.
    wait: Duration,
    /// Counts uses; orders versions by their last one.
    clock: AtomicU64,
    /// What is known of versions wherever they are.
    pub(super) ledger: Ledger,
}

impl Residents {
    /// `limit` and `host_limit`: bytes on the device and in host memory.
    pub(super) fn new(limit: u64, host_limit: u64, wait: Duration) -> Self {
        let (budget, ledger) = (Budget::new(limit), Ledger::new(host_limit));
        Self { slots: DashMap::new(), budget, wait, clock: AtomicU64::new(0), ledger }
    }

    /// Takes bytes of the budget; idle versions leave to make room. Where those that are leased leave none it waits for them, and is
    /// EXHAUSTED if that takes too long.
    pub(super) async fn room(&self, bytes: u64) -> Result<Reservation> {
        self.check_size(bytes)?;
        let deadline = tokio::time::Instant::now() + self.wait;
        loop {
            let changed = self.budget.changed();
            if let Some(reserved) = self.budget.reserve(bytes, || self.evict_one()) {
                return Ok(reserved);
            }
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                return Err(no_room(bytes, self.budget.limit(), "all others are in use; retry", Some(RETRY_AFTER)));
            }
        }
    }

    /// Fails where so many bytes never fit.
    pub(super) fn check_size(&self, bytes: u64) -> Result<()> {
        match self.budget.limit() {
            limit if bytes > limit => Err(no_room(bytes, limit, "it never fits; raise the limit", None)),
            _ => Ok(()),
        }
    }

    /// To be kept by what holds a version, as the last thing that it lets go.
    pub(super) fn tells(&self) -> NotifyOnDrop {
        NotifyOnDrop(Arc::clone(&self.budget))
    }

    /// The version of a uid; the first to ask awaits `load`, the others wait for it. A failure is each caller's own: the next one
    /// to wait tries again.
    pub(super) async fn get_or_load(
        &self,
        uid: &str,
        tenant: &TenantId,
        load: impl Future<Output = Result<Arc<Resident>>>,
    ) -> Result<Arc<Resident>> {
        // Declared first, dropped last: the slot's own hold is gone when the visit looks, and the visit when the room is told of.
        let _tells = self.tells();
        let _visit = LoadAttempt { residents: self, uid };
        let slot = self.slot(uid, tenant);
        slot.loaded.get_or_try_init(|| load).await.cloned()
    }

    /// The version of a uid where it is loaded, marked as used now.
    pub(super) fn get(&self, uid: &str) -> Option<Arc<Resident>> {
        let slot = self.slots.get(uid)?;
        let resident = slot.loaded.get().cloned()?;
        let turn = self.tick();
        slot.last_used.store(turn, Ordering::Relaxed);
        self.ledger.enter(uid, &slot.tenant, turn);
        Some(resident)
    }

    /// Whether the version of a uid is loaded.
    pub(super) fn is_loaded(&self, uid: &str) -> bool {
        self.slots.get(uid).is_some_and(|slot| slot.loaded.initialized())
    }

    /// Puts a version in its place before it has a name. It leaves again unless [`PendingVersion::keep`] is called.
    pub(super) fn admit(&self, uid: &str, tenant: &TenantId, resident: Resident) -> PendingVersion<'_> {
        let resident = Arc::new(resident);
        let loaded = OnceCell::new_with(Some(Arc::clone(&resident)));
        let slot = Slot { tenant: tenant.clone(), loaded, last_used: AtomicU64::new(self.tick()) };
        self.ledger.enter(uid, tenant, self.tick());
        self.slots.insert(uid.to_owned(), Arc::new(slot));
        PendingVersion { residents: self, uid: uid.to_owned(), resident, kept: false, _tells: self.tells() }
    }

    /// Takes a version out; its leases go on and free its memory when the last one drops.
    pub(super) fn retire(&self, uid: &str) {
        self.slots.remove(uid);
        self.ledger.forget(uid);
    }

    pub(super) fn retire_tenant(&self, tenant: &TenantId) {
        self.ledger.forget_tenant(tenant);
        self.slots.retain(|_, slot| slot.tenant != *tenant);
    }

    /// Loaded versions in the table.
    pub(super) fn count(&self) -> usize {
        self.slots.iter().filter(|slot| slot.loaded.initialized()).count()
    }

    /// Bytes reserved, for versions in the table or not.
    pub(super) fn bytes(&self) -> u64 {
        self.budget.used()
    }

    pub(super) fn residency(&self, uid: &str, memory_bytes: u64) -> Residency {
        let residency = self.ledger.residency(uid, memory_bytes);
        if self.is_loaded(uid) { Residency { tier: Tier::Device, ..residency } } else { residency }
    }

    /// The slot of a uid, marked as used now.
    fn slot(&self, uid: &str, tenant: &TenantId) -> Arc<Slot> {
        let empty = || Slot { tenant: tenant.clone(), loaded: OnceCell::new(), last_used: AtomicU64::new(0) };
        let slot = Arc::clone(&self.slots.entry(uid.to_owned()).or_insert_with(|| Arc::new(empty())));
        let turn = self.tick();
        slot.last_used.store(turn, Ordering::Relaxed);
        self.ledger.enter(uid, tenant, turn);
        slot
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }

    /// Lets the idle version go that was used longest ago, to the host's memory if it fits there. False where none is idle.
    fn evict_one(&self) -> bool {
        loop {
            let idle = self.slots.iter().filter(|slot| slot.is_idle());
            let oldest = idle.min_by_key(|slot| slot.last_used.load(Ordering::Relaxed)).map(|slot| slot.key().clone());
            let Some(uid) = oldest else { return false };
            // Leased since it was found: look for another one.
            if let Some((uid, slot)) = self.slots.remove_if(&uid, |_, slot| slot.is_idle()) {
                stats::count_eviction(Tier::Device);
                slot.loaded.get().inspect(|resident| self.ledger.keep(&uid, &resident.packed));
                return true;
            }
        }
    }
}

fn no_room(bytes: u64, limit: u64, what_to_do: &str, retry_after: Option<Duration>) -> Error {
    let message =
        format!("no room for an adapter of {bytes} bytes in {limit} bytes of memory for adapters: {what_to_do}");
    Error::Exhausted { limit: "adapter_cache_bytes", message, retry_after }
}

/// A look at a slot. The last one to leave a slot that stayed empty (its load failed or was cancelled) takes it out of the table.
struct LoadAttempt<'a> {
    residents: &'a Residents,
    uid: &'a str,
}

impl Drop for LoadAttempt<'_> {
    fn drop(&mut self) {
        let abandoned = |_: &String, slot: &Arc<Slot>| !slot.loaded.initialized() && Arc::strong_count(slot) == 1;
        self.residents.slots.remove_if(self.uid, abandoned);
    }
}

/// A version in memory that has no name yet.
pub(super) struct PendingVersion<'a> {
    residents: &'a Residents,
    uid: String,
    resident: Arc<Resident>,
    kept: bool,
    _tells: NotifyOnDrop,
}

impl PendingVersion<'_> {
    pub(super) fn resident(&self) -> &Resident {
        &self.resident
    }

    /// The version of this uid has a name now; nothing is kept where that is another version (an earlier call's).
    pub(super) fn keep(mut self, named: &str) {
        self.kept = self.uid == named;
    }
}

impl Drop for PendingVersion<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.residents.retire(&self.uid);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_load_that_fails_or_is_cancelled_leaves_no_slot() {
        let residents = Residents::new(1, 0, Duration::ZERO);
        let tenant = TenantId::new("a").unwrap();
        let fails = || residents.get_or_load("u", &tenant, async { Err(Error::Cancelled) });
        let (one, two) = tokio::join!(fails(), fails());
        assert!(one.is_err() && two.is_err());
        assert!(residents.slots.is_empty());

        let never = residents.get_or_load("u", &tenant, std::future::pending());
        tokio::select! {
            biased;
            _ = never => unreachable!(),
            () = tokio::task::yield_now() => {}
        }
        assert!(residents.slots.is_empty());
    }
}
