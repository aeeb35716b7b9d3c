//! Locks by name: who may delete what while somebody else is about to own it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

use crate::ids::TenantId;
use crate::store::Store;
use crate::sync::lock;

type Shared = OwnedRwLockReadGuard<()>;
type Exclusive = OwnedRwLockWriteGuard<()>;

/// One lock for each name that is in use.
#[derive(Debug, Default)]
pub(super) struct Locks(Mutex<HashMap<String, Weak<RwLock<()>>>>);

impl Locks {
    pub(super) async fn shared(&self, name: &str) -> Shared {
        self.of(name).read_owned().await
    }

    pub(super) async fn exclusive(&self, name: &str) -> Exclusive {
        self.of(name).write_owned().await
    }

    pub(super) fn try_exclusive(&self, name: &str) -> Option<Exclusive> {
        self.of(name).try_write_owned().ok()
    }

    fn of(&self, name: &str) -> Arc<RwLock<()>> {
        let mut locks = lock(&self.0);
        if let Some(lock) = locks.get(name).and_then(Weak::upgrade) {
            return lock;
        }
        locks.retain(|_, lock| lock.strong_count() > 0);
        let lock = Arc::default();
        locks.insert(name.to_owned(), Arc::downgrade(&lock));
        lock
    }
}

/// While it is held its blob is not collected and its tenant is not deleted: taken by whoever puts a blob, until the row that
/// owns it is committed. One holder a blob.
#[derive(Debug)]
pub struct BlobGuard {
    _tenant: Shared,
    _blob: Exclusive,
}

impl Store {
    /// Waits for another custody of the same blob and for a deletion of the tenant under way.
    pub async fn custody(&self, tenant: &TenantId, blob: &str) -> BlobGuard {
        let locks = &self.inner.locks;
        BlobGuard { _tenant: locks.shared(&tenant.to_string()).await, _blob: locks.exclusive(blob).await }
    }
}
