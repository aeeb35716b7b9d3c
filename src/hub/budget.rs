//! Bytes that are reserved before they are used and given back by `Drop`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// The bytes of one tier.
#[derive(Debug)]
pub(super) struct Budget {
    limit: u64,
    used: AtomicU64,
    /// Told when there may be more room than before.
    changed: Notify,
}

/// Some of a budget's bytes, given back on drop.
#[derive(Debug)]
pub(super) struct Reservation {
    bytes: u64,
    budget: Arc<Budget>,
}

impl Budget {
    pub(super) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicU64::new(0), changed: Notify::new() })
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Acquire)
    }

    /// Takes bytes. Where there are too few, `evict` is asked to free some until it cannot: `None`.
    pub(super) fn reserve(self: &Arc<Self>, bytes: u64, evict: impl Fn() -> bool) -> Option<Reservation> {
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.limit);
        while self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits).is_err() {
            if bytes > self.limit || !evict() {
                return None;
            }
        }
        Some(Reservation { bytes, budget: Arc::clone(self) })
    }

    /// The next time that there may be more room. Made before a look at the budget, it misses no change after it.
    pub(super) fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }

    /// Something can leave that could not before.
    pub(super) fn tell(&self) {
        self.changed.notify_waiters();
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::AcqRel);
        self.budget.tell();
    }
}

/// Tells of room when it is dropped. As the last field of what holds a version, it speaks when the version has been let go.
#[derive(Debug)]
pub(super) struct NotifyOnDrop(pub(super) Arc<Budget>);

impl Drop for NotifyOnDrop {
    fn drop(&mut self) {
        self.0.tell();
    }
}
