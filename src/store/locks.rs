//! Locks by name: who may delete what while somebody else is about to own it.

use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

use crate::ids::TenantId;
use crate::store::Store;
use crate::sync::ByName;

type Shared = OwnedRwLockReadGuard<()>;
type Exclusive = OwnedRwLockWriteGuard<()>;

/// One lock for each name that is in use.
#[derive(Debug, Default)]
pub(super) struct Locks(ByName<String, RwLock<()>>);

impl Locks {
    pub(super) async fn shared(&self, name: &str) -> Shared {
        self.0.of(name).read_owned().await
    }

    pub(super) async fn exclusive(&self, name: &str) -> Exclusive {
        self.0.of(name).write_owned().await
    }

    pub(super) fn try_exclusive(&self, name: &str) -> Option<Exclusive> {
        self.0.of(name).try_write_owned().ok()
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
