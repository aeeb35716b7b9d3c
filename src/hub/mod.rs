//! Which adapter versions are resident, and the only way a version becomes one: [`Hub::publish`].
//!
//! A name lives in the catalogue alone: a lease reads it there once, and the transaction that moves it is the one lock. A lease keeps
//! its version's tensors alive whatever happens to the name; the last lease of a retired version frees the memory.
//!
//! Versions lie in three tiers: on the **device**, packed and ready to serve (limit `adapter_cache_bytes`; on the CPU that is the host's
//! memory); in **host** memory, packed, when they had to leave the device (limit `adapter_host_bytes`); and on **disk**, where all are.
//! In the first two the version used longest ago leaves when room is needed, on the device never one that is leased.

mod budget;
mod ledger;
mod load;
mod publish;
mod residents;
mod share;
mod stats;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;

use budget::NotifyOnDrop;
use load::LOADS_AT_ONCE;
use residents::{Resident, Residents};
pub use share::Claim;
use share::Shares;

pub use crate::adapter::BaseShape;
pub use crate::adapter::peft::{
    CONFIG_FILE, MAX_CONFIG_BYTES, Package, SizeLimits, TENSORS_FILE, check_beginning, most_file_bytes,
};
pub use ledger::{Residency, Tier};
pub use stats::HubStats;

use crate::adapter::{Adapter, Initialisation, PackedAdapter, RowNorms};
use crate::config::Limits;
use crate::error::{Error, Result};
use crate::ids::{AdapterName, AdapterRef, Digest, JobName, Tenant, TenantId, VersionName};
use crate::request::{ParityReport, Publish};
pub use crate::store::VersionRow;
use crate::store::{AdapterRow, Store};
use crate::work::spawn_uncancellable;

/// Judges a version before it exists. Injected by `app`, so that the hub needs no model.
pub trait PublishGate: Send + Sync {
    /// Compares serving `packed` with training's use of `adapter`, of which it was made, on at least 256 scored tokens; blocking, seconds of
    /// compute. `probes`: sequences of ids to score (a job's validation rows); empty: the built-in probe set.
    fn check(&self, packed: &Arc<PackedAdapter>, adapter: &Arc<Adapter>, probes: &[Vec<u32>]) -> Result<ParityReport>;

    /// Gives the adapter for the base as it is, of one that began as a part of the base; `None` where it is that already. Blocking.
    fn plain_form(&self, adapter: &Adapter, initialisation: Initialisation) -> Result<Option<Adapter>>;

    /// Gives the norms that a DoRA's magnitudes are divided by, of the rows of the base and the adapter together. Blocking.
    fn row_norms(&self, _adapter: &Adapter) -> Result<RowNorms> {
        Ok(RowNorms::new())
    }
}

/// An adapter on its way to become a version.
#[derive(Debug, Clone)]
pub struct NewVersion {
    /// The adapter that gets the version; it is made where there is none.
    pub adapter: AdapterName,
    /// The PEFT files.
    pub package: Package,
    /// Ids to score in the gate; empty: the built-in probe set.
    pub probes: Vec<Vec<u32>>,
    /// Whether the version becomes the live one.
    pub publish: Publish,
    /// What trained it; `None` for an import.
    pub job: Option<JobName>,
    /// Final measurements by name.
    pub metrics: BTreeMap<String, f64>,
    /// The same id gives the first call's version. Empty: none.
    pub request_id: String,
    /// Does everything, the gate included, and keeps nothing.
    pub validate_only: bool,
    /// Why its job keeps it from going live; only with [`Publish::VersionOnly`].
    pub held_reason: Option<String>,
    /// What was done to the files, where their owner must know it.
    pub note: Option<String>,
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
    _claim: Claim,
    /// Dropped last.
    _counted: Counted,
}

/// One of all leases.
#[derive(Debug)]
struct Counted {
    leases: Arc<AtomicUsize>,
    _tells: NotifyOnDrop,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.leases.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Lease {
    /// Returns the version that the lease holds.
    pub fn name(&self) -> &VersionName {
        &self.held.name
    }

    /// Returns the digest of the version's content.
    pub fn digest(&self) -> Digest {
        self.held.resident.digest
    }

    /// What serves.
    pub fn packed(&self) -> &Arc<PackedAdapter> {
        &self.held.resident.packed
    }
}

/// What there is of a version that is asked for without waiting.
#[derive(Debug)]
pub enum Attempt {
    /// It was on the device.
    Leased(Lease),
    /// It has to be loaded: [`Hub::load_claimed`].
    Cold(Claim),
    /// Its tenant's leases hold as much of the device as they may (limit `adapter_cache_percent_per_tenant`).
    ShareUsed,
}

/// The resident versions.
pub struct Hub {
    store: Store,
    shape: Arc<BaseShape>,
    template_digest: Digest,
    gate: Arc<dyn PublishGate>,
    limits: Limits,
    residents: Residents,
    shares: Arc<Shares>,
    /// Places for reading versions.
    loads: Arc<Semaphore>,
    leases: Arc<AtomicUsize>,
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub").field("base", &self.shape.name).field("stats", &self.stats()).finish_non_exhaustive()
    }
}

/// A version's files on their way out.
#[derive(Debug)]
pub struct Exported {
    /// `adapter_config.json`.
    pub config: Vec<u8>,
    /// `adapter_model.safetensors`, at its beginning.
    pub tensors: std::fs::File,
}

impl Hub {
    /// `shape`: the base's; `gate` judges every version before it exists. Limits `adapter_cache_bytes`, `adapter_host_bytes`,
    /// `adapter_wait_seconds`.
    pub fn new(
        store: Store,
        shape: BaseShape,
        template_digest: Digest,
        gate: Arc<dyn PublishGate>,
        limits: &Limits,
    ) -> Arc<Self> {
        let wait = Duration::from_secs(limits.adapter_wait_seconds);
        let residents = Residents::new(limits.adapter_cache_bytes, limits.adapter_host_bytes, wait);
        let (shape, limits, leases) = (Arc::new(shape), limits.clone(), Arc::default());
        let loads = Arc::new(Semaphore::new(LOADS_AT_ONCE));
        let percent = u128::from(limits.adapter_cache_percent_per_tenant);
        let share = (u128::from(limits.adapter_cache_bytes) * percent / 100) as u64;
        let shares = Shares::new(share);
        Arc::new(Self { store, shape, template_digest, gate, limits, residents, shares, loads, leases })
    }

    /// Brings the version a name means into memory where it is not. NOT_FOUND for what does not exist, never the base;
    /// EXHAUSTED where the versions that others lease leave it no room for `adapter_wait_seconds`.
    pub async fn lease(self: &Arc<Self>, tenant: &Tenant, adapter: &AdapterRef) -> Result<Lease> {
        let row = self.resolve(tenant, adapter).await?;
        match self.claim(&row, true) {
            Some(claim) => self.load_claimed(&row, claim).await,
            None => Err(Error::internal("a forced claim was refused")),
        }
    }

    /// Returns the version that a name means now, which holds nothing yet. NOT_FOUND for what does not exist, WRONG_BASE and EXHAUSTED for
    /// what this server can never serve.
    pub async fn resolve(&self, tenant: &Tenant, adapter: &AdapterRef) -> Result<VersionRow> {
        tenant.check_owns(adapter.tenant())?;
        let row = self.store.resolve(adapter).await?;
        self.check_base(&row)?;
        self.check_size(row.memory_bytes)?;
        Ok(row)
    }

    /// Leases a version where it is on the device; never waits. Else claims its tenant's share for the load.
    pub fn try_lease(&self, row: &VersionRow) -> Attempt {
        let Some(claim) = self.claim(row, false) else { return Attempt::ShareUsed };
        match self.residents.get(&row.uid) {
            Some(resident) => Attempt::Leased(self.leased(row, resident, claim)),
            None => Attempt::Cold(claim),
        }
    }

    /// Leases a version, and loads it where it is not on the device. NOT_FOUND where it has been deleted meanwhile.
    pub async fn load_claimed(self: &Arc<Self>, row: &VersionRow, claim: Claim) -> Result<Lease> {
        let resident = self.residents.get_or_load(&row.uid, row.name.tenant(), self.load(row)).await?;
        Ok(self.leased(row, resident, claim))
    }

    /// Whether a version is on the device.
    pub fn is_resident(&self, uid: &str) -> bool {
        self.residents.is_loaded(uid)
    }

    fn claim(&self, row: &VersionRow, forced: bool) -> Option<Claim> {
        self.shares.claim(row.name.tenant(), &row.uid, row.memory_bytes, forced)
    }

    fn leased(&self, row: &VersionRow, resident: Arc<Resident>, claim: Claim) -> Lease {
        self.residents.ledger.used(&row.uid);
        self.leases.fetch_add(1, Ordering::AcqRel);
        let counted = Counted { leases: Arc::clone(&self.leases), _tells: self.residents.tells() };
        Lease { held: Arc::new(Held { name: row.name.clone(), resident, _claim: claim, _counted: counted }) }
    }

    /// Makes a version the live one, once it is known to load. CONFLICT where `etag` (empty: none) is not the current one.
    pub async fn set_live(self: &Arc<Self>, tenant: &Tenant, version: &VersionName, etag: &str) -> Result<AdapterRow> {
        let _loads = self.lease(tenant, &AdapterRef::Version(version.clone())).await?;
        let row = self.store.set_live(version, etag).await?;
        tracing::info!(tenant = %tenant.id(), %version, "live version set");
        Ok(row)
    }

    /// A version's files, as they go out: what was trained here calls the base as the server does. The tensors are checked here and then read
    /// as they are sent, so that a slow reader holds none of them; the file stays though the version is deleted.
    pub async fn export(&self, tenant: &Tenant, adapter: &AdapterRef) -> Result<(VersionRow, Exported)> {
        let (row, mut package) = self.package(tenant, adapter).await?;
        if row.job.is_some() {
            package.name_base(&self.shape.name)?;
        }
        let tensors = self.store.blobs().open_file(&format!("{}/{TENSORS_FILE}", row.blob));
        match tensors {
            Ok(tensors) => Ok((row, Exported { config: package.config, tensors })),
            Err(_) if !self.store.has_version(&row.uid).await? => Err(Error::not_found(&row.name)),
            Err(error) => Err(error),
        }
    }

    /// A version's files, as they are stored.
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
            tracing::info!(tenant = %name.tenant, adapter = %name, versions = uids.len(), "adapter deleted");
            Ok(())
        };
        spawn_uncancellable(delete).await
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
        spawn_uncancellable(delete).await
    }

    /// Where a version is, and what is known of its use. `memory_bytes`: its row's.
    pub fn residency(&self, uid: &str, memory_bytes: u64) -> Residency {
        self.residents.residency(uid, memory_bytes)
    }

    /// The base's shape, which every adapter fits.
    pub fn shape(&self) -> &BaseShape {
        &self.shape
    }

    /// Fails where an adapter of so many bytes could never be in memory.
    pub fn check_size(&self, bytes: u64) -> Result<()> {
        self.residents.check_size(bytes)
    }

    /// Returns what is in memory now.
    pub fn stats(&self) -> HubStats {
        HubStats {
            resident: self.residents.count(),
            resident_bytes: self.residents.bytes(),
            host_bytes: self.residents.ledger.bytes(),
            leases: self.leases.load(Ordering::Acquire),
        }
    }
}
