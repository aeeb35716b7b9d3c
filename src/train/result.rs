//! A finished run on disk, from its last step until it is published: what a crash, a full disk or a busy catalogue must not lose.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::adapter::peft::{CONFIG_FILE, Package, TENSORS_FILE};
use crate::error::{Error, Result};
use crate::ids::Digest;
use crate::store::{JobRow, RESULT_MANIFEST, Store};
use crate::work::blocking;

/// The newest form of the manifest that this build writes and reads.
const VERSION: u32 = 1;

/// What a run leaves, and what its publication needs.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingResult {
    pub package: Package,
    /// Final measurements, finite numbers.
    pub metrics: BTreeMap<String, f64>,
    /// Sequences of ids that the gate scores.
    pub probes: Vec<Vec<u32>>,
    /// Why the adapter must not serve, where the training has gone wrong.
    pub diverged: Option<String>,
}

/// All of it but the adapter's files.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    v: u32,
    config: String,
    tensors: String,
    metrics: BTreeMap<String, f64>,
    probes: Vec<Vec<u32>>,
    #[serde(default)]
    diverged: Option<String>,
}

impl TrainingResult {
    /// Writes the result to the job's folder. Once it returns, [`TrainingResult::load`] finds it, also in another process. Needs nothing of
    /// the catalogue, which may be locked at the moment when the server has to stop.
    pub async fn save(&self, store: &Store, job: &JobRow) -> Result<()> {
        let Some(folder) = &job.result else { return Err(Error::internal("a job without a claim has no result")) };
        let (package, [config, tensors]) = digests_of(self.package.clone()).await?;
        let manifest = Manifest {
            v: VERSION,
            config,
            tensors,
            metrics: self.metrics.clone(),
            probes: self.probes.clone(),
            diverged: self.diverged.clone(),
        };
        let manifest = serde_json::to_vec(&manifest).map_err(Error::internal)?;
        let blobs = store.blobs();
        blobs.replace(&format!("{folder}/{CONFIG_FILE}"), package.config).await?;
        blobs.replace(&format!("{folder}/{TENSORS_FILE}"), package.tensors).await?;
        blobs.replace(&format!("{folder}/{RESULT_MANIFEST}"), manifest).await
    }

    /// Reads the result that a job has saved. `None` where there is none that is whole and readable: the job has to train again.
    pub async fn load(store: &Store, job: &JobRow) -> Result<Option<Self>> {
        let Some(folder) = &job.result else { return Ok(None) };
        let file = async |name: &str| store.blobs().get(&format!("{folder}/{name}")).await;
        let Some(manifest) = file(RESULT_MANIFEST).await? else { return Ok(None) };
        let (Some(config), Some(tensors)) = (file(CONFIG_FILE).await?, file(TENSORS_FILE).await?) else {
            return Ok(unusable(job, &"a file is missing"));
        };
        let manifest: Manifest = match serde_json::from_slice(&manifest) {
            Ok(manifest) => manifest,
            Err(error) => return Ok(unusable(job, &error)),
        };
        if manifest.v > VERSION {
            return Ok(unusable(job, &format!("it has version {}", manifest.v)));
        }
        let (package, digests) = digests_of(Package { config, tensors }).await?;
        if digests != [manifest.config, manifest.tensors] {
            return Ok(unusable(job, &"its files have other digests"));
        }
        let probes = manifest.probes;
        Ok(Some(Self { package, metrics: manifest.metrics, probes, diverged: manifest.diverged }))
    }
}

/// The digests of the two files, which may be large, and the files again.
async fn digests_of(package: Package) -> Result<(Package, [String; 2])> {
    let hash = move || {
        let digests = [&package.config, &package.tensors].map(|file| Digest::of(file).to_string());
        Ok((package, digests))
    };
    blocking(hash).await
}

/// Says in the log why a saved result is passed over.
fn unusable<T>(job: &JobRow, why: &dyn std::fmt::Display) -> Option<T> {
    tracing::error!(job = %job.name, %why, "the saved result cannot be used; the job trains again");
    None
}
