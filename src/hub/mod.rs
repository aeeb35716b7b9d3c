//! Which adapter versions are resident, and the only way a version becomes one: [`Hub::publish`].
//!
//! A name lives in the catalogue alone: a lease reads it there once, and the transaction that moves it is the one lock. A lease keeps
//! its version's tensors alive whatever happens to the name; the last lease of a retired version frees the memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::adapter::format::Package;
use crate::adapter::{BaseShape, Lora};
use crate::config::Limits;
use crate::error::Result;
use crate::ids::{AdapterName, AdapterRef, Digest, JobName, Tenant, TenantId, VersionName};
use crate::request::{ParityReport, Publish};
use crate::store::{AdapterRow, Store, VersionRow};

/// Judges a version before it exists. Injected by `app`, so that the hub needs no model.
pub trait PublishGate: Send + Sync {
    /// Compares the serving with the training path on at least 256 scored tokens; blocking, seconds of compute.
    /// `probes`: sequences of ids to score (a job's validation rows); empty: the built-in probe set.
    fn check(&self, lora: &Lora, probes: &[Vec<u32>]) -> Result<ParityReport>;
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

/// A version in memory, for as long as the lease lives.
#[derive(Debug, Clone)]
pub struct Lease {
    resident: Arc<Resident>,
}

#[derive(Debug)]
struct Resident {
    name: VersionName,
    digest: Digest,
    lora: Arc<Lora>,
}

impl Lease {
    pub fn name(&self) -> &VersionName {
        &self.resident.name
    }

    pub fn digest(&self) -> Digest {
        self.resident.digest
    }

    pub fn lora(&self) -> &Arc<Lora> {
        &self.resident.lora
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
pub struct Hub {}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub").finish_non_exhaustive()
    }
}

impl Hub {
    /// `shape`: the base's; `gate` judges every version before it exists. Limit `adapter_cache_bytes`.
    pub fn new(
        _store: Store,
        _shape: BaseShape,
        _template_digest: Digest,
        _gate: Arc<dyn PublishGate>,
        _limits: &Limits,
    ) -> Arc<Self> {
        todo!()
    }

    /// Brings the version a name means into memory where it is not. NOT_FOUND for what does not exist, never the base;
    /// EXHAUSTED where every resident version is leased and the budget is spent.
    pub async fn lease(&self, _tenant: &Tenant, _adapter: &AdapterRef) -> Result<Lease> {
        todo!()
    }

    /// Makes a version of an adapter, or leaves nothing. Runs to its end even where the caller goes away.
    pub async fn publish(self: &Arc<Self>, _tenant: &Tenant, _new: NewVersion) -> Result<VersionRow> {
        todo!()
    }

    /// Makes a version the live one, once it is known to load. CONFLICT where `etag` (empty: none) is not the current one.
    pub async fn set_live(&self, _tenant: &Tenant, _version: &VersionName, _etag: &str) -> Result<AdapterRow> {
        todo!()
    }

    /// A version's files.
    pub async fn package(&self, _tenant: &Tenant, _adapter: &AdapterRef) -> Result<(VersionRow, Package)> {
        todo!()
    }

    /// Deletes an adapter and its versions; leases go on until they drop. See [`Store::delete_adapter`].
    pub async fn delete_adapter(&self, _tenant: &Tenant, _name: &AdapterName, _etag: &str) -> Result<()> {
        todo!()
    }

    /// Lets go of the versions of a tenant that has been deleted; leases go on until they drop.
    pub async fn forget_tenant(&self, _tenant: &TenantId) {
        todo!()
    }

    pub fn stats(&self) -> HubStats {
        todo!()
    }
}
