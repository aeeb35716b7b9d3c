//! How a version comes to be: check the headers, reserve the bytes, read and hash, put the files, gate it without a name, one transaction.
//! Whatever fails before the transaction leaves nothing.
//!
//! An adapter is served in bf16. Where the gate finds serving further from training than usual, and twice the bits bring it nearer, the version
//! is served in those: the figures of the form that is served are the version's.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::SystemTime;

use crate::adapter::peft::{CONFIG_FILE, Package, SizeLimits, TENSORS_FILE};
use crate::adapter::{Adapter, PackedAdapter, RowNorms};
use crate::error::{Error, Result};
use crate::hub::budget::Reservation;
use crate::hub::residents::{PendingVersion, Resident};
use crate::hub::{Hub, NewVersion};
use crate::ids::{AdapterName, Digest, Tenant, TenantId, VersionName};
use crate::request::ParityReport;
use crate::store::{NewVersionRow, VersionRow, random_id};
use crate::work::{blocking, spawn_uncancellable};

/// A difference between serving and training, in nats a token, above which the rounding to bf16 may be what it comes from. Usual adapters
/// stay below it: on the default base they have 0.001 to 0.002, which is the rounding of activations.
const ROUNDING_SHOWS: f32 = 0.003;

/// The share of that difference that twice the bits may leave to be worth three times the work.
const WORTH_TWICE_THE_BITS: f32 = 0.7;

/// An adapter that fits the base.
struct Checked {
    new: NewVersion,
    /// As it is trained, and as it is served.
    adapter: Adapter,
    norms: RowNorms,
    packed: PackedAdapter,
    digest: Digest,
}

/// What is said of an adapter whose files still held a part of the base.
const CONVERTED: &str = "its files held a part of the base that its initialisation (PiSSA, OLoRA) had taken out; that part was computed from this server's base and \
     taken out of the adapter. Where it was trained on the same model in other precision the part is another one: then convert the adapter with \
     PEFT (save_pretrained, path_initial_model_for_weight_conversion) and import that";

/// Fails where the plain form of an adapter that began as a part of the base, which has twice its rank, could not be imported itself.
fn check_plain_rank(rank: u32, max_rank: u64) -> Result<()> {
    if 2 * u64::from(rank) <= max_rank {
        return Ok(());
    }
    let message = format!(
        "is {rank}: an adapter that holds a part of the base takes twice its rank, over the limit max_rank of {max_rank}; ask the operator for a \
         higher limit, or train with a lower rank"
    );
    Err(Error::invalid_because("RANK_TOO_LARGE", "r", message))
}

impl Hub {
    /// Makes a version of an adapter, or leaves nothing. Runs to its end even where the caller goes away, so that what it holds
    /// is always given back. PARITY_FAILED where serving and training disagree; NO_EFFECT where a job trained nothing.
    pub async fn publish(self: &Arc<Self>, tenant: &Tenant, new: NewVersion) -> Result<VersionRow> {
        tenant.check_owns(&new.adapter.tenant)?;
        let hub = Arc::clone(self);
        spawn_uncancellable(async move { hub.run_publish(new).await }).await
    }

    async fn run_publish(&self, new: NewVersion) -> Result<VersionRow> {
        // The limits on sizes are for what comes in; a job was held to it when it was accepted.
        let limits = if new.job.is_some() { SizeLimits::NONE } else { (&self.limits).into() };
        let shape = Arc::clone(&self.shape);
        let (gate, mut new) = (Arc::clone(&self.gate), new);
        let (new, bytes, digest) = blocking(move || {
            let mut checked = new.package.check(&shape, limits)?;
            // The base of a job is this one, whatever an adapter that it goes on with has called it.
            let warning = match checked.base.take().filter(|_| new.job.is_none()) {
                Some(base) => shape.names.warning(&base)?,
                None => None,
            };
            let plain = match checked.initialisation {
                Some(initialisation) if new.job.is_none() => {
                    gate.plain_form(&new.package.read(&shape, limits)?, initialisation)?
                }
                _ => None,
            };
            if let Some(plain) = plain {
                check_plain_rank(checked.rank, limits.rank)?;
                new.package = Package::from_adapter(&plain, &shape)?;
                new.note = Some(CONVERTED.to_owned());
                checked = new.package.check(&shape, limits)?;
            }
            if let Some(warning) = warning {
                new.note = Some(new.note.map_or(warning.clone(), |note| format!("{note}; {warning}")));
            }
            Ok((new, checked.memory_bytes, checked.digest))
        })
        .await?;
        // Before it waits for room: a retry needs none.
        if let Some(row) = self.published_before(&new, digest).await? {
            return Ok(row);
        }
        let reserved = self.residents.room(bytes).await?;
        let (shape, gate) = (Arc::clone(&self.shape), Arc::clone(&self.gate));
        let checked = blocking(move || {
            let adapter = new.package.read(&shape, limits)?;
            let norms = gate.row_norms(&adapter)?;
            let packed = PackedAdapter::new(&adapter, &shape, &norms)?;
            Ok(Checked { new, adapter, norms, packed, digest })
        })
        .await?;
        let tenant = checked.new.adapter.tenant.clone();
        // By content and by tenant: two versions of a tenant may share files, two tenants never do.
        let blob = format!("{}/adapters/{}", tenant.as_str(), checked.digest.hex());
        let custody = self.store.custody(&tenant, &blob).await;
        let outcome = self.make_version(checked, reserved, &blob).await;
        drop(custody);
        self.store.collect_blobs(&[blob]).await;
        outcome
    }

    /// The steps that leave something, each given back unless the last one commits.
    async fn make_version(&self, checked: Checked, reserved: Reservation, blob: &str) -> Result<VersionRow> {
        let Checked { new, adapter, norms, packed, digest } = checked;
        let tenant = &new.adapter.tenant;
        // Again with the custody: the same call may have been under way.
        if let Some(row) = self.published_before(&new, digest).await? {
            return Ok(row);
        }
        let size_bytes = new.package.tensors.len() as u64;
        self.store.blobs().put(&format!("{blob}/{CONFIG_FILE}"), new.package.config).await?;
        self.store.blobs().put(&format!("{blob}/{TENSORS_FILE}"), new.package.tensors).await?;

        let (kind, virtual_tokens) = (adapter.kind(), adapter.virtual_count() as u32);
        let (rank, targets) = rank_and_targets(&adapter);
        let probed = Probed { adapter: Arc::new(adapter), norms: Arc::new(norms), probes: Arc::new(new.probes) };
        let plain = self.measure(tenant, digest, packed, reserved, &probed).await?;
        let Measured { uid, unnamed, parity } = self.better_form(plain, tenant, digest, probed).await?;
        judge(&new.adapter, &parity, new.job.is_some())?;
        let packed = Arc::clone(&unnamed.resident().packed);
        let memory_bytes = packed.byte_size();
        if !new.validate_only {
            self.write_packed(blob, digest, &packed).await?;
        }
        let draft = VersionRow {
            name: VersionName { adapter: new.adapter, version: 0 },
            digest,
            base_digest: self.shape.digest,
            template_digest: self.template_digest,
            size_bytes,
            kind,
            rank,
            targets,
            virtual_tokens,
            parity,
            job: new.job,
            // JSON has no infinities.
            metrics: new.metrics.into_iter().filter(|(_, value)| value.is_finite()).collect(),
            create_time: SystemTime::now(),
            uid,
            memory_bytes,
            blob: blob.to_owned(),
            held_reason: new.held_reason,
            note: new.note,
            live: false,
        };
        let (publish, request_id, validate_only) = (new.publish, new.request_id, new.validate_only);
        let row = NewVersionRow { draft, publish, request_id, validate_only };
        let row = self.store.insert_version(row, &self.limits).await?;
        if !validate_only {
            unnamed.keep(&row.uid);
            let (job, live) = (row.job.as_ref().map(ToString::to_string), row.live);
            let from = job.as_deref().unwrap_or("import");
            tracing::info!(tenant = %row.name.tenant(), version = %row.name, from, live, rank, size_bytes, "version published");
        }
        Ok(row)
    }

    /// What the same call made before.
    async fn published_before(&self, new: &NewVersion, digest: Digest) -> Result<Option<VersionRow>> {
        let NewVersion { adapter, request_id, publish, .. } = new;
        self.store.published_before(adapter, request_id, digest, *publish).await
    }

    /// Takes a form of an adapter into memory, without a name, and measures it.
    async fn measure(
        &self,
        tenant: &TenantId,
        digest: Digest,
        packed: PackedAdapter,
        reserved: Reservation,
        probed: &Probed,
    ) -> Result<Measured<'_>> {
        let uid = random_id();
        let unnamed = self.residents.admit(&uid, tenant, Resident::new(digest, packed, reserved));
        let (gate, packed) = (Arc::clone(&self.gate), Arc::clone(&unnamed.resident().packed));
        let Probed { adapter, probes, .. } = probed.clone();
        let parity = blocking(move || gate.check(&packed, &adapter, &probes)).await?;
        Ok(Measured { uid, unnamed, parity })
    }

    /// Of an adapter in bf16 and in twice the bits, the form to serve; the other leaves memory. What has passed the gate is not refused for
    /// want of room for more bits.
    async fn better_form<'a>(
        &'a self,
        plain: Measured<'a>,
        tenant: &TenantId,
        digest: Digest,
        probed: Probed,
    ) -> Result<Measured<'a>> {
        if plain.parity.mean_abs_difference <= ROUNDING_SHOWS {
            return Ok(plain);
        }
        let (adapter, shape) = (Arc::clone(&probed.adapter), Arc::clone(&self.shape));
        let size = move || Ok(PackedAdapter::rounds(&adapter).then(|| PackedAdapter::precise_bytes(&adapter, &shape)));
        let Some(bytes) = blocking(size).await? else { return Ok(plain) };
        let reserved = match self.residents.room(bytes).await {
            Ok(reserved) => reserved,
            Err(error @ Error::Exhausted { .. }) => {
                tracing::warn!(%error, "an adapter is served in bf16, where twice the bits might serve it better");
                return Ok(plain);
            }
            Err(error) => return Err(error),
        };
        let (Probed { adapter, norms, .. }, shape) = (probed.clone(), Arc::clone(&self.shape));
        let precise = blocking(move || PackedAdapter::precise(&adapter, &shape, &norms)).await?;
        let precise = self.measure(tenant, digest, precise, reserved, &probed).await?;
        let worth = plain.parity.mean_abs_difference * WORTH_TWICE_THE_BITS;
        Ok(if precise.parity.mean_abs_difference <= worth { precise } else { plain })
    }
}

/// What is measured, and on what.
#[derive(Clone)]
struct Probed {
    adapter: Arc<Adapter>,
    norms: Arc<RowNorms>,
    probes: Arc<Vec<Vec<u32>>>,
}

/// A form of an adapter in memory, and its figures.
struct Measured<'a> {
    uid: String,
    unnamed: PendingVersion<'a>,
    parity: ParityReport,
}

/// Refuses what the gate's figures speak against.
fn judge(adapter: &AdapterName, parity: &ParityReport, trained: bool) -> Result<()> {
    let ParityReport { tokens, mean_abs_difference, mean_abs_effect, threshold, no_effect } = parity;
    let finite = mean_abs_effect.is_finite() && threshold.is_finite();
    if !(finite && mean_abs_difference <= threshold) {
        let message = format!(
            "serving and training disagree by {mean_abs_difference} nats a token over {tokens} tokens, more than {threshold} \
             (the adapter's effect is {mean_abs_effect}); nothing was published"
        );
        return Err(Error::precondition("PARITY_FAILED", adapter, message));
    }
    if *no_effect && trained {
        let message =
            "the training changed nothing: every delta is zero; raise the learning rate or the number of steps";
        return Err(Error::precondition("NO_EFFECT", adapter, message));
    }
    Ok(())
}

/// The largest rank, and the targets in PEFT's words, sorted.
fn rank_and_targets(adapter: &Adapter) -> (u32, Vec<String>) {
    let rank = adapter.pairs().map(|(_, pair)| pair.rank).max().unwrap_or_default();
    let targets: BTreeSet<_> = adapter.sites.keys().map(|site| site.target.name().to_owned()).collect();
    (rank as u32, targets.into_iter().collect())
}
