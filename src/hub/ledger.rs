//! What is known of each version since the start, and the tier in host memory: versions that had to leave the device stay there until
//! their room is needed, and come back without a read.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use crate::adapter::PackedAdapter;
use crate::hub::budget::{Budget, Reservation};
use crate::hub::stats;
use crate::ids::TenantId;
use crate::sync::lock;

/// Where a version is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    /// Ready to serve.
    Device,
    /// In host memory.
    Host,
    /// In its files alone.
    Disk,
}

/// Where a version is and has been since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Residency {
    /// The fastest tier that has it.
    pub tier: Tier,
    /// Bytes it takes where it serves.
    pub memory_bytes: u64,
    /// When it was last leased.
    pub last_use: Option<SystemTime>,
    /// How long its last load took, from the moment there was room for it.
    pub last_load: Option<Duration>,
}

#[derive(Debug)]
struct Entry {
    tenant: TenantId,
    /// Counts uses of all versions; no two have the same.
    turn: u64,
    last_use: Option<SystemTime>,
    last_load: Option<Duration>,
    kept: Option<Kept>,
}

/// A version in host memory.
#[derive(Debug)]
struct Kept {
    packed: PackedAdapter,
    /// Given back when it leaves.
    _reserved: Reservation,
}

/// The versions that have been in memory and still exist.
#[derive(Debug, Default)]
struct Entries {
    by_uid: HashMap<String, Entry>,
    /// The uids of those in host memory by their last turn, so that the one used longest ago is found at once.
    kept: BTreeMap<u64, String>,
}

impl Entries {
    fn take(&mut self, uid: &str) -> Option<Kept> {
        let entry = self.by_uid.get_mut(uid)?;
        let kept = entry.kept.take()?;
        self.kept.remove(&entry.turn);
        Some(kept)
    }

    /// Gives back what was in host memory, to be dropped outside the lock.
    fn remove(&mut self, uid: &str) -> Option<Kept> {
        let kept = self.take(uid);
        self.by_uid.remove(uid);
        kept
    }
}

/// What is known of versions, by uid.
#[derive(Debug)]
pub(super) struct Ledger {
    entries: Mutex<Entries>,
    budget: Arc<Budget>,
}

impl Ledger {
    /// `limit`: bytes of host memory; 0 keeps nothing there.
    pub(super) fn new(limit: u64) -> Self {
        Self { entries: Mutex::default(), budget: Budget::new(limit) }
    }

    /// A version comes into memory; it is the `turn`-th use of one.
    pub(super) fn enter(&self, uid: &str, tenant: &TenantId, turn: u64) {
        let mut entries = lock(&self.entries);
        let Entries { by_uid, kept } = &mut *entries;
        match by_uid.get_mut(uid) {
            Some(entry) => {
                if kept.remove(&entry.turn).is_some() {
                    kept.insert(turn, uid.to_owned());
                }
                entry.turn = turn;
            }
            None => {
                let entry = Entry { tenant: tenant.clone(), turn, last_use: None, last_load: None, kept: None };
                by_uid.insert(uid.to_owned(), entry);
            }
        }
    }

    pub(super) fn used(&self, uid: &str) {
        if let Some(entry) = lock(&self.entries).by_uid.get_mut(uid) {
            entry.last_use = Some(SystemTime::now());
        }
    }

    pub(super) fn loaded(&self, uid: &str, took: Duration) {
        if let Some(entry) = lock(&self.entries).by_uid.get_mut(uid) {
            entry.last_load = Some(took);
        }
    }

    /// The version is gone for good.
    pub(super) fn forget(&self, uid: &str) {
        let kept = lock(&self.entries).remove(uid);
        drop(kept);
    }

    pub(super) fn forget_tenant(&self, tenant: &TenantId) {
        let mut entries = lock(&self.entries);
        let of_tenant = entries.by_uid.iter().filter(|(_, entry)| entry.tenant == *tenant);
        let uids: Vec<String> = of_tenant.map(|(uid, _)| uid.clone()).collect();
        let gone: Vec<Kept> = uids.iter().filter_map(|uid| entries.remove(uid)).collect();
        drop(entries);
        drop(gone);
    }

    /// Keeps a version that leaves the device, where it fits. The tensors are shared, not copied; whoever holds a copy of them on the
    /// device holds it by the lease's `Arc`, which is not this one.
    pub(super) fn keep(&self, uid: &str, packed: &PackedAdapter) {
        let Some(reserved) = self.budget.reserve(packed.byte_size(), || self.evict_one()) else { return };
        let kept = Kept { packed: packed.clone(), _reserved: reserved };
        let mut entries = lock(&self.entries);
        let Entries { by_uid, kept: order } = &mut *entries;
        // A version that was deleted meanwhile has no entry.
        let before = by_uid.get_mut(uid).and_then(|entry| {
            order.insert(entry.turn, uid.to_owned());
            entry.kept.replace(kept)
        });
        drop(entries);
        drop(before);
    }

    /// Takes a version out of host memory, for the device. It goes back where it is not used up, if there is still room.
    pub(super) fn take<'a>(&'a self, uid: &'a str) -> Option<Taken<'a>> {
        let packed = lock(&self.entries).take(uid)?.packed;
        Some(Taken { ledger: self, uid, packed: Some(packed) })
    }

    /// What is known of a version, but for whether it is on the device.
    pub(super) fn residency(&self, uid: &str, memory_bytes: u64) -> Residency {
        let mut residency = Residency { tier: Tier::Disk, memory_bytes, last_use: None, last_load: None };
        if let Some(entry) = lock(&self.entries).by_uid.get(uid) {
            (residency.last_use, residency.last_load) = (entry.last_use, entry.last_load);
            if entry.kept.is_some() {
                residency.tier = Tier::Host;
            }
        }
        residency
    }

    /// Bytes in host memory.
    pub(super) fn bytes(&self) -> u64 {
        self.budget.used()
    }

    /// Lets the kept version go that was used longest ago. False where none is kept.
    fn evict_one(&self) -> bool {
        let mut entries = lock(&self.entries);
        let Some((_, uid)) = entries.kept.pop_first() else { return false };
        let gone = entries.by_uid.get_mut(&uid).and_then(|entry| entry.kept.take());
        drop(entries);
        drop(gone);
        stats::count_eviction(Tier::Host);
        true
    }
}

/// A version on its way from host memory to the device. Dropped on the way (no room, or its caller has gone) it goes back.
pub(super) struct Taken<'a> {
    ledger: &'a Ledger,
    uid: &'a str,
    /// Taken when it is used up.
    packed: Option<PackedAdapter>,
}

impl Taken<'_> {
    /// Returns the version; it does not go back.
    pub(super) fn use_up(mut self) -> Option<PackedAdapter> {
        self.packed.take()
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if let Some(packed) = self.packed.take() {
            self.ledger.keep(self.uid, &packed);
        }
    }
}
