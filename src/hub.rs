//! Which adapter versions are resident, and the only way a version becomes one: [`Hub::publish`].
//!
//! A lease keeps a version's tensors alive; names move under one lock; the last lease to drop frees the memory.

use std::sync::Arc;

use crate::adapter::Lora;
use crate::error::Result;
use crate::ids::{AdapterRef, Digest, Tenant, VersionName};
use crate::request::ParityReport;

/// Judges a version before it exists. Injected by `app`, so that the hub needs no model.
pub trait PublishGate: Send + Sync {
    /// Compares the serving with the training path on at least 256 scored tokens; blocking, seconds of compute.
    /// `probes`: sequences of ids to score (a job's validation rows); empty: the built-in probe set.
    fn check(&self, lora: &Lora, probes: &[Vec<u32>]) -> Result<ParityReport>;
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

/// The resident versions.
#[derive(Debug)]
pub struct Hub {}

impl Hub {
    /// Brings the version a name means into memory where it is not. NOT_FOUND for what does not exist, never the base.
    pub async fn lease(&self, _tenant: &Tenant, _adapter: &AdapterRef) -> Result<Lease> {
        todo!()
    }
}
