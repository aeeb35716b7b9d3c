//! Which adapter versions are resident, and the only way a version becomes one: [`Hub::publish`].
//!
//! A name lives in the catalogue alone: a lease reads it there once, and the transaction that moves it is the one lock. A lease keeps
//! its version's tensors alive whatever happens to the name; the last lease of a retired version frees the memory.

mod publish;
mod residents;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use residents::{Resident, Residents};

pub use crate::adapter::format::{CONFIG_FILE, Package, TENSORS_FILE};
use crate::adapter::{BaseShape, Lora};
use crate::config::Limits;
use crate::error::{Error, Result};
use crate::ids::{AdapterName, AdapterRef, Digest, JobName, Tenant, TenantId, VersionName};
use crate::request::{ParityReport, Publish};
use crate::store::{AdapterRow, Store, VersionRow, uninterrupted};

/// Judges a version before it exists. Injected by `app`, so that the hub needs no model.
pub trait PublishGate: Send + Sync {
    /// Compares the serving with the training path on at least 256 scored tokens; blocking, seconds of compute.
    /// `probes`: sequences of ids to score (a job's validation rows); empty: the built-in probe set.
    fn check(&self, lora: &Arc<Lora>, probes: &[Vec<u32>]) -> Result<ParityReport>;
}

/// An adapter on its way to become a version.
#[derive(Debug, Clone)]
pub struct NewVersion {
    pub adapter: AdapterName,
    pub package: Package,
    /// Ids to score in the gate; empty: the built-in probe set.
    pub probes: Vec<Vec<u32>>,
    pub publish: Publish,
    /// What trained it; `None` for an import.
    pub job: Option<JobName>,
    /// Final measurements by name.
    pub metrics: BTreeMap<String, f64>,
    /// The same id gives the first call's version. Empty: none.
    pub request_id: String,
    /// Does everything, the gate included, and keeps nothing.
    pub validate_only: bool,
}

/// A version in memory, for as long as the lease or a clone of it lives.
#[derive(Debug, Clone)]
pub struct Lease {
    held: Arc<Held>,
}

#[derive(Debug)]
struct Held {
    name: VersionName,
    resident: Arc<Resident>,
    /// Counts all leases.
    leases: Arc<AtomicUsize>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.leases.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Lease {
    fn new(name: VersionName, resident: Arc<Resident>, leases: &Arc<AtomicUsize>) -> Self {
        leases.fetch_add(1, Ordering::AcqRel);
        Self { held: Arc::new(Held { name, resident, leases: Arc::clone(leases) }) }
    }

    pub fn name(&self) -> &VersionName {
        &self.held.name
    }

    pub fn digest(&self) -> Digest {
        self.held.resident.digest
    }

    pub fn lora(&self) -> &Arc<Lora> {
        &self.held.resident.lora
    }
}

/// What is in memory now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HubStats {
    /// Versions ready to be leased.
    pub resident: usize,
    /// Bytes of them, of those that load, and of deleted ones that are still leased.
    pub resident_bytes: u64,
    /// Leases that are held; a lease and its clones count once.
    pub leases: usize,
}

/// The resident versions.
pub struct Hub {
    store: Store,
    shape: Arc<BaseShape>,
    template_digest: Digest,
    gate: Arc<dyn PublishGate>,
    limits: Limits,
    residents: Residents,
    leases: Arc<AtomicUsize>,
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub").field("base", &self.shape.name).field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl Hub {
    /// `shape`: the base's; `gate` judges every version before it exists. Limit `adapter_cache_bytes`.
    pub fn new(
        store: Store,
        shape: BaseShape,
        template_digest: Digest,
        gate: Arc<dyn PublishGate>,
        limits: &Limits,
    ) -> Arc<Self> {
        let residents = Residents::new(limits.adapter_cache_bytes);
        let (shape, limits, leases) = (Arc::new(shape), limits.clone(), Arc::default());
        Arc::new(Self { store, shape, template_digest, gate, limits, residents, leases })
    }

    /// Brings the version a name means into memory where it is not. NOT_FOUND for what does not exist, never the base;
    /// EXHAUSTED where every resident version is leased and the budget is spent.
    pub async fn lease(&self, tenant: &Tenant, adapter: &AdapterRef) -> Result<Lease> {
        tenant.check_owns(adapter.tenant())?;
        let row = self.store.resolve(adapter).await?;
        let resident = self.residents.get_or_load(&row.uid, row.name.tenant(), self.load(&row)).await?;
        Ok(Lease::new(row.name, resident, &self.leases))
    }

    /// Makes a version the live one, once it is known to load. CONFLICT where `etag` (empty: none) is not the current one.
    pub async fn set_live(&self, tenant: &Tenant, version: &VersionName, etag: &str) -> Result<AdapterRow> {
        let _loads = self.lease(tenant, &AdapterRef::Version(version.clone())).await?;
        self.store.set_live(version, etag).await
    }

    /// A version's files.
    pub async fn package(&self, tenant: &Tenant, adapter: &AdapterRef) -> Result<(VersionRow, Package)> {
        tenant.check_owns(adapter.tenant())?;
        let row = self.store.resolve(adapter).await?;
        let package = self.read_package(&row).await?;
        Ok((row, package))
    }

    /// Deletes an adapter and its versions; leases go on until they drop. See [`Store::delete_adapter`].
    pub async fn delete_adapter(self: &Arc<Self>, tenant: &Tenant, name: &AdapterName, etag: &str) -> Result<()> {
        tenant.check_owns(&name.tenant)?;
        let (hub, name, etag) = (Arc::clone(self), name.clone(), etag.to_owned());
        let delete = async move {
            let (uids, blobs) = hub.store.delete_adapter(&name, &etag).await?;
            uids.iter().for_each(|uid| hub.residents.retire(uid));
            hub.store.collect_blobs(&blobs).await;
            Ok(())
        };
        uninterrupted(delete).await
    }

    /// Deletes a tenant with all of its own; leases go on until they drop. See [`Store::delete_tenant`].
    pub async fn delete_tenant(self: &Arc<Self>, tenant: &TenantId) -> Result<()> {
        let (hub, tenant) = (Arc::clone(self), tenant.clone());
        let delete = async move {
            let deleted = hub.store.delete_tenant(&tenant).await;
            if hub.store.get_tenant(&tenant).await.is_err() {
                hub.residents.retire_tenant(&tenant);
            }
            deleted
        };
        uninterrupted(delete).await
    }

    /// Fails where an adapter of so many bytes could never be in memory.
    pub fn check_size(&self, bytes: u64) -> Result<()> {
        self.residents.check_size(bytes)
    }

    pub fn stats(&self) -> HubStats {
        HubStats {
            resident: self.residents.count(),
            resident_bytes: self.residents.bytes(),
            leases: self.leases.load(Ordering::Acquire),
        }
    }

    async fn load(&self, row: &VersionRow) -> Result<Arc<Resident>> {
        if row.base_digest != self.shape.digest {
            let message = format!("was made for base {}, this server runs {}", row.base_digest, self.shape.digest);
            return Err(Error::precondition("WRONG_BASE", &row.name, message));
        }
        let reserved = self.residents.reserve(row.memory_bytes)?;
        let package = self.read_package(row).await?;
        // The limit on ranks is for what comes in: a version that exists loads whatever the limit is now.
        let shape = Arc::clone(&self.shape);
        let lora = blocking(move || package.read(&shape, u64::MAX)).await?;
        // Deleted while it loaded: the deletion may have looked for it before it was here.
        if !self.store.has_version(&row.uid).await? {
            self.residents.retire(&row.uid);
        }
        Ok(Arc::new(Resident::new(row.digest, lora, reserved)))
    }

    /// The files of a version, as they were hashed when it was made.
    async fn read_package(&self, row: &VersionRow) -> Result<Package> {
        let files = async {
            let config = self.store.blobs().get(&format!("{}/{CONFIG_FILE}", row.blob)).await?;
            let tensors = self.store.blobs().get(&format!("{}/{TENSORS_FILE}", row.blob)).await?;
            Ok(Package { config, tensors })
        };
        let package = match files.await {
            Ok(package) => package,
            Err(_) if !self.store.has_version(&row.uid).await? => return Err(Error::not_found(&row.name)),
            Err(e) => return Err(e),
        };
        let (package, digest) = blocking(move || package.digest().map(|digest| (package, digest))).await?;
        if digest == row.digest {
            Ok(package)
        } else {
            Err(Error::internal(format!("the files of {} are damaged: digest {digest}, not {}", row.name, row.digest)))
        }
    }
}

/// Runs work of more than a moment off the async threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(Error::internal)?
}
