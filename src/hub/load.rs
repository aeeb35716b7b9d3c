//! How a version comes into memory: from host memory, else by one read of its packed file, else from its PEFT files, from which the
//! packed file is then made again.
//!
//! The file is read on a thread that the engine's steps share the cores with, so a load costs them what it computes: that is why there
//! is a packed file, and why few are read at once.

use std::sync::Arc;
use std::time::Instant;

use crate::adapter::PackedAdapter;
use crate::adapter::peft::{CONFIG_FILE, Package, SizeLimits, TENSORS_FILE};
use crate::error::{Error, Result};
use crate::hub::ledger::Taken;
use crate::hub::residents::Resident;
use crate::hub::{Hub, Tier, stats};
use crate::ids::Digest;
use crate::store::VersionRow;
use crate::work::{blocking, run_holding};

/// Beside the PEFT files of a version; derived from them.
pub(super) const PACKED_FILE: &str = "packed.bin";

/// Versions read at once. One that is slow to read leaves a place to the others; more would take more of the cores from the engine at
/// a time, to no version's good.
pub(super) const LOADS_AT_ONCE: usize = 2;

impl Hub {
    /// Waits for room, then loads. A caller that goes away while it waits leaves nothing; a read that has begun keeps its bytes and its
    /// place among the loads until it ends.
    pub(super) async fn load(self: &Arc<Self>, row: &VersionRow) -> Result<Arc<Resident>> {
        // It leaves host memory first: what has to leave the device for it may take its place there.
        let kept = self.residents.ledger.take(&row.uid);
        let reserved = self.residents.room(row.memory_bytes).await?;
        let begun = Instant::now();
        let (packed, reserved, from) = match kept.and_then(Taken::use_up) {
            Some(packed) => (packed, reserved, Tier::Host),
            None => {
                let place = Arc::clone(&self.loads).acquire_owned().await.map_err(Error::internal)?;
                let (hub, row) = (Arc::clone(self), row.clone());
                let read = async move { hub.fetch(&row).await };
                let (packed, (_, reserved)) = run_holding((place, reserved), read).await?;
                (packed, reserved, Tier::Disk)
            }
        };
        let took = begun.elapsed();
        stats::count_load(from, took);
        self.residents.ledger.loaded(&row.uid, took);
        // Deleted before or while it loaded: the deletion may have looked for it before it was here.
        if !self.store.has_version(&row.uid).await? {
            self.residents.retire(&row.uid);
            return Err(Error::not_found(&row.name));
        }
        Ok(Arc::new(Resident::new(row.digest, packed, reserved)))
    }

    /// Fails where a version was made for another base.
    pub(super) fn check_base(&self, row: &VersionRow) -> Result<()> {
        if row.base_digest == self.shape.digest {
            return Ok(());
        }
        let message = format!("was made for base {}, this server runs {}", row.base_digest, self.shape.digest);
        Err(Error::precondition("WRONG_BASE", &row.name, message))
    }

    /// Reads its files.
    async fn fetch(&self, row: &VersionRow) -> Result<PackedAdapter> {
        match self.read_packed(row).await {
            Ok(packed) => Ok(packed),
            Err(error) => self.pack_again(row, error).await,
        }
    }

    async fn read_packed(&self, row: &VersionRow) -> Result<PackedAdapter> {
        let (blobs, key) = (self.store.blobs().clone(), format!("{}/{PACKED_FILE}", row.blob));
        let (digest, bytes, shape) = (row.digest, row.memory_bytes, Arc::clone(&self.shape));
        blocking(move || {
            PackedAdapter::from_file(blobs.open_file(&key)?, digest, bytes, &shape).map_err(Error::at(&key))
        })
        .await
    }

    /// From the PEFT files, which are checked in full.
    async fn pack_again(&self, row: &VersionRow, why: Error) -> Result<PackedAdapter> {
        let package = self.read_package(row).await?;
        tracing::warn!(version = %row.name, error = %why, "its packed file cannot be used and is made again");
        let shape = Arc::clone(&self.shape);
        // The limit on ranks is for what comes in: a version that exists loads whatever the limit is now.
        let bytes = row.memory_bytes;
        let gate = Arc::clone(&self.gate);
        let pack = move || {
            let adapter = package.read(&shape, SizeLimits::NONE)?;
            PackedAdapter::of_size(&adapter, &shape, &gate.row_norms(&adapter)?, bytes)
        };
        let packed = blocking(pack).await?;
        let custody = self.store.custody(row.name.tenant(), &row.blob).await;
        let written = self.write_packed(&row.blob, row.digest, &packed).await;
        drop(custody);
        // Deleted meanwhile.
        self.store.collect_blobs(std::slice::from_ref(&row.blob)).await;
        if let Err(error) = written {
            tracing::warn!(version = %row.name, %error, "its packed file cannot be written");
        }
        Ok(packed)
    }

    /// Puts the packed file beside the PEFT files, in place of one that is there. The caller has the blob's custody.
    pub(super) async fn write_packed(&self, blob: &str, digest: Digest, packed: &PackedAdapter) -> Result<()> {
        let packed = packed.clone();
        let file = blocking(move || Ok(packed.to_file(digest))).await?;
        self.store.blobs().replace(&format!("{blob}/{PACKED_FILE}"), file).await
    }

    /// The PEFT files of a version, as they were hashed when it was made.
    pub(super) async fn read_package(&self, row: &VersionRow) -> Result<Package> {
        let file = async |name: &str| self.store.blobs().get(&format!("{}/{name}", row.blob)).await;
        let (Some(config), Some(tensors)) = (file(CONFIG_FILE).await?, file(TENSORS_FILE).await?) else {
            return Err(match self.store.has_version(&row.uid).await? {
                true => damaged(row, &"a file is missing"),
                false => Error::not_found(&row.name),
            });
        };
        let package = Package { config, tensors };
        let (digest, package) = blocking(move || Ok((package.digest(), package))).await?;
        match digest {
            Ok(digest) if digest == row.digest => Ok(package),
            Ok(digest) => Err(damaged(row, &format!("their digest is {digest}, not {}", row.digest))),
            Err(e) => Err(damaged(row, &e)),
        }
    }
}

/// Its files are not what they were when it was made.
fn damaged(row: &VersionRow, why: &dyn std::fmt::Display) -> Error {
    tracing::error!(version = %row.name, blob = row.blob, %why, "the files of a version are damaged");
    let message = "its stored files are damaged or missing; import the same files again, under any name, to repair it, or restore them from \
                   a backup";
    Error::precondition("VERSION_DAMAGED", &row.name, message)
}
