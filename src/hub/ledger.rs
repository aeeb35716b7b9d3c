//! What is known of each version since the start, and the tier in host memory: versions that had to leave the device stay there until
//! their room is needed, and come back without a read.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use dashmap::DashMap;

use crate::adapter::PackedLora;
use crate::hub::budget::{Budget, Reservation};
use crate::hub::stats;
use crate::ids::TenantId;

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
    /// Counts uses of all versions.
    turn: u64,
    last_use: Option<SystemTime>,
    last_load: Option<Duration>,
    kept: Option<Kept>,
}

/// A version in host memory.
#[derive(Debug)]
struct Kept {
    packed: PackedLora,
    /// Given back when it leaves.
    _reserved: Reservation,
}

/// The versions that have been in memory and still exist, by uid.
#[derive(Debug)]
pub(super) struct Ledger {
    entries: DashMap<String, Entry>,
    budget: Arc<Budget>,
}

impl Ledger {
    /// `limit`: bytes of host memory; 0 keeps nothing there.
    pub(super) fn new(limit: u64) -> Self {
        Self { entries: DashMap::new(), budget: Budget::new(limit) }
    }

    /// A version comes into memory; it is the `turn`-th use of one.
    pub(super) fn enter(&self, uid: &str, tenant: &TenantId, turn: u64) {
        let entry = || Entry { tenant: tenant.clone(), turn, last_use: None, last_load: None, kept: None };
        self.entries.entry(uid.to_owned()).or_insert_with(entry).turn = turn;
    }

    pub(super) fn used(&self, uid: &str) {
        if let Some(mut entry) = self.entries.get_mut(uid) {
            entry.last_use = Some(SystemTime::now());
        }
    }

    pub(super) fn loaded(&self, uid: &str, took: Duration) {
        if let Some(mut entry) = self.entries.get_mut(uid) {
            entry.last_load = Some(took);
        }
    }

    /// The version is gone for good.
    pub(super) fn forget(&self, uid: &str) {
        self.entries.remove(uid);
    }

    pub(super) fn forget_tenant(&self, tenant: &TenantId) {
        self.entries.retain(|_, entry| entry.tenant != *tenant);
    }

    /// Keeps a version that leaves the device, where it fits. The tensors are shared, not copied; whoever holds a copy of them on the
    /// device holds it by the lease's `Arc`, which is not this one.
    pub(super) fn keep(&self, uid: &str, packed: &PackedLora) {
        let Some(reserved) = self.budget.reserve(packed.byte_size(), || self.evict_one()) else { return };
        // A version that was deleted meanwhile has no entry.
        if let Some(mut entry) = self.entries.get_mut(uid) {
            entry.kept = Some(Kept { packed: packed.clone(), _reserved: reserved });
        }
    }

    /// Takes a version out of host memory, for the device. It goes back where it is not used up, if there is still room.
    pub(super) fn take<'a>(&'a self, uid: &'a str) -> Option<Taken<'a>> {
        let packed = self.entries.get_mut(uid)?.kept.take()?.packed;
        Some(Taken { ledger: self, uid, packed: Some(packed) })
    }

    /// What is known of a version, but for whether it is on the device.
    pub(super) fn residency(&self, uid: &str, memory_bytes: u64) -> Residency {
        let mut residency = Residency { tier: Tier::Disk, memory_bytes, last_use: None, last_load: None };
        if let Some(entry) = self.entries.get(uid) {
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
        let kept = self.entries.iter().filter(|entry| entry.kept.is_some());
        let oldest = kept.min_by_key(|entry| entry.turn).map(|entry| entry.key().clone());
        let Some(uid) = oldest else { return false };
        // It may have been taken meanwhile; then there is room too.
        let gone = self.entries.get_mut(&uid).and_then(|mut entry| entry.kept.take());
        if gone.is_some() {
            stats::count_eviction(Tier::Host);
        }
        true
    }
}

/// A version on its way from host memory to the device. Dropped on the way (no room, or its caller has gone) it goes back.
pub(super) struct Taken<'a> {
    ledger: &'a Ledger,
    uid: &'a str,
    /// Taken when it is used up.
    packed: Option<PackedLora>,
}

impl Taken<'_> {
    /// Returns the version; it does not go back.
    pub(super) fn use_up(mut self) -> Option<PackedLora> {
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
