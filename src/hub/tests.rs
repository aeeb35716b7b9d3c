//! The hub's promises, with a gate that says what the test wants and adapters of a few bytes.

mod model;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use tempfile::TempDir;

use super::load::PACKED_FILE;
use super::*;
use crate::adapter::{BaseNames, Initialisation, LowRank, Site};
use crate::request::{LoraSpec, Target};

/// Ranks of an adapter of one unit: they are packed without padding.
const RANKS: usize = 8;

/// Bytes of an adapter of one unit: A and B, padded to a tile, of one 4 x 4 layer.
const UNIT: u64 = 2 * RANKS as u64 * (4 + 16);

/// Says what it is told to; counts its calls; can be held shut.
struct FakeGate {
    report: Mutex<Result<ParityReport>>,
    calls: AtomicUsize,
    shut: Mutex<bool>,
    opened: Condvar,
}

const GOOD: ParityReport =
    ParityReport { tokens: 256, mean_abs_difference: 0.001, mean_abs_effect: 0.5, threshold: 0.05, no_effect: false };

impl FakeGate {
    fn says(&self, report: ParityReport) {
        *self.report.lock().unwrap() = Ok(report);
    }

    fn shut(&self, shut: bool) {
        *self.shut.lock().unwrap() = shut;
        self.opened.notify_all();
    }

    fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }
}

impl PublishGate for FakeGate {
    fn check(&self, _packed: &Arc<PackedAdapter>, _lora: &Arc<Adapter>, _probes: &[Vec<u32>]) -> Result<ParityReport> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let _open = self.opened.wait_while(self.shut.lock().unwrap(), |shut| *shut).unwrap();
        self.report.lock().unwrap().clone()
    }

    fn plain_form(&self, _lora: &Adapter, _initialisation: Initialisation) -> Result<Option<Adapter>> {
        Ok(None)
    }
}

struct Bench {
    dir: TempDir,
    store: Store,
    hub: Arc<Hub>,
    gate: Arc<FakeGate>,
    tenant: Tenant,
}

impl Bench {
    /// A hub with room for so many units and none in host memory, that does not wait for room, and one tenant, `a`.
    async fn new(units: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).await.unwrap();
        let tenant = add_tenant(&store, "a").await;
        let gate = Arc::new(FakeGate {
            report: Mutex::new(Ok(GOOD)),
            calls: AtomicUsize::new(0),
            shut: Mutex::new(false),
            opened: Condvar::new(),
        });
        let hub = hub(&store, &gate, b"base", units);
        Self { dir, store, hub, gate, tenant }
    }

    /// As after a restart: nothing is in memory.
    fn forget(&mut self, units: u64) {
        self.hub = hub(&self.store, &self.gate, b"base", units);
    }

    fn new_version(&self, adapter: &str, units: usize, fill: f32) -> NewVersion {
        NewVersion {
            adapter: AdapterName::new(self.tenant.id(), adapter).unwrap(),
            package: Package::from_adapter(&lora(units, fill), &shape(b"base")).unwrap(),
            probes: Vec::new(),
            publish: Publish::Auto,
            job: None,
            metrics: BTreeMap::from([("loss".into(), 0.5), ("broken".into(), f64::NAN)]),
            request_id: String::new(),
            validate_only: false,
            held_reason: None,
            note: None,
        }
    }

    async fn publish(&self, adapter: &str, units: usize, fill: f32) -> Result<VersionRow> {
        self.hub.publish(&self.tenant, self.new_version(adapter, units, fill)).await
    }

    async fn lease(&self, name: impl ToString) -> Result<Lease> {
        self.hub.lease(&self.tenant, &name.to_string().parse().unwrap()).await
    }

    fn blobs(&self) -> usize {
        count_files(&self.dir.path().join("blobs"))
    }

    /// Nothing in memory or on disk, as at the beginning.
    async fn assert_nothing_left(&self) {
        assert_eq!(self.hub.stats(), HubStats { resident: 0, resident_bytes: 0, leases: 0, host_bytes: 0 });
        assert_eq!(self.blobs(), 0);
        let adapters = self.store.list_adapters(self.tenant.id(), &Default::default()).await.unwrap();
        assert!(adapters.items.is_empty(), "{adapters:?}");
    }
}

fn hub(store: &Store, gate: &Arc<FakeGate>, base: &[u8], units: u64) -> Arc<Hub> {
    hub_with(store, gate, base, |limits| limits.adapter_cache_bytes = units * UNIT)
}

fn hub_with(store: &Store, gate: &Arc<FakeGate>, base: &[u8], change: impl FnOnce(&mut Limits)) -> Arc<Hub> {
    let mut limits = Limits { adapter_host_bytes: 0, adapter_wait_seconds: 0, ..Limits::default() };
    change(&mut limits);
    let gate: Arc<dyn PublishGate> = gate.clone();
    Hub::new(store.clone(), shape(base), Digest::of(b"template"), gate, &limits)
}

fn shape(base: &[u8]) -> BaseShape {
    BaseShape::llama("tiny", Digest::of(base), 1, [(4, 4); 7])
}

async fn add_tenant(store: &Store, id: &str) -> Tenant {
    let id = TenantId::new(id).unwrap();
    store.create_tenant(&id, "", 1, "").await.unwrap();
    Tenant::proven(id)
}

fn lora(units: usize, fill: f32) -> Adapter {
    let rank = RANKS * units;
    let spec = LoraSpec { rank: rank as u32, alpha: rank as f32, targets: vec![Target::QProj], ..LoraSpec::default() };
    let layer = LowRank {
        rank,
        alpha: rank as f32,
        scale: 1.0,
        a: vec![fill; rank * 4],
        b: vec![-fill; rank * 4],
        magnitude: None,
        bias: None,
    };
    Adapter::lora(spec, [(Site { layer: 0, target: Target::QProj }, layer)])
}

/// Asserts that a lease serves this adapter.
fn assert_serves(lease: &Lease, lora: &Adapter) {
    let want = PackedAdapter::new(lora, &shape(b"base"), &RowNorms::new()).unwrap();
    assert_eq!(lease.packed().byte_size(), want.byte_size());
    for site in 0..shape(b"base").linears.len() {
        assert_eq!(lease.packed().pair(site), want.pair(site));
    }
}

fn count_files(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { count_files(&path) } else { 1 }).sum()
}

fn reason(error: &Error) -> &'static str {
    match error {
        Error::Precondition { reason, .. } => reason,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_is_published_can_be_leased() {
    let bench = Bench::new(8).await;
    let row = bench.publish("x", 2, 0.5).await.unwrap();
    assert_eq!((row.name.version, row.rank, row.targets.as_slice()), (1, 16, &["q_proj".to_owned()][..]));
    assert_eq!((row.memory_bytes, row.parity), (2 * UNIT, GOOD));
    assert_eq!(row.metrics, BTreeMap::from([("loss".into(), 0.5)]), "only finite numbers are kept");

    let lease = bench.lease("tenants/a/adapters/x").await.unwrap();
    assert_eq!((lease.name(), lease.digest()), (&row.name, row.digest));
    assert_serves(&lease, &lora(2, 0.5));
    assert_eq!(bench.hub.stats(), HubStats { resident: 1, resident_bytes: 2 * UNIT, leases: 1, host_bytes: 0 });
    let clone = lease.clone();
    drop(lease);
    assert_eq!(bench.hub.stats().leases, 1, "a clone is the same lease");
    drop(clone);
    assert_eq!(bench.hub.stats().leases, 0);

    let (same, package) = bench.hub.package(&bench.tenant, &AdapterRef::Version(row.name.clone())).await.unwrap();
    assert_eq!(same, row);
    assert_eq!(package, bench.new_version("x", 2, 0.5).package);
}

#[tokio::test]
async fn unknown_is_not_found_and_never_the_base() {
    let bench = Bench::new(8).await;
    bench.publish("x", 1, 0.5).await.unwrap();
    for name in ["tenants/a/adapters/y", "tenants/a/adapters/y/versions/1", "tenants/a/adapters/x/versions/2"] {
        let refused = bench.lease(name).await.unwrap_err();
        assert!(matches!(&refused, Error::NotFound { name: told } if told == name), "{refused:?}");
    }
    let waiting = NewVersion { publish: Publish::VersionOnly, ..bench.new_version("w", 1, 0.5) };
    bench.hub.publish(&bench.tenant, waiting).await.unwrap();
    assert_eq!(reason(&bench.lease("tenants/a/adapters/w").await.unwrap_err()), "NO_LIVE_VERSION");
}

#[tokio::test]
async fn another_tenants_names_are_refused_alike() {
    let bench = Bench::new(8).await;
    let row = bench.publish("x", 1, 0.5).await.unwrap();
    let other = add_tenant(&bench.store, "b").await;
    let mut told = Vec::new();
    for adapter in ["x", "none"] {
        let name = AdapterName::new(bench.tenant.id(), adapter).unwrap();
        let version = VersionName { adapter: name.clone(), version: 1 };
        let live = AdapterRef::Live(name.clone());
        told.push(bench.hub.lease(&other, &live).await.unwrap_err());
        told.push(bench.hub.package(&other, &live).await.unwrap_err());
        told.push(bench.hub.set_live(&other, &version, "").await.unwrap_err());
        told.push(bench.hub.delete_adapter(&other, &name, "").await.unwrap_err());
        told.push(bench.hub.publish(&other, bench.new_version(adapter, 1, 0.5)).await.unwrap_err());
    }
    assert!(told.iter().all(|e| matches!(e, Error::PermissionDenied)), "{told:?}");
    assert_eq!(bench.lease(&row.name).await.unwrap().digest(), row.digest);
}

#[tokio::test]
async fn the_gate_decides_and_a_refusal_leaves_nothing() {
    let bench = Bench::new(8).await;
    let bad = [
        ParityReport { mean_abs_difference: 0.051, ..GOOD },
        ParityReport { mean_abs_difference: f32::NAN, ..GOOD },
        ParityReport { threshold: f32::INFINITY, mean_abs_effect: f32::INFINITY, ..GOOD },
    ];
    for report in bad {
        bench.gate.says(report);
        let refused = bench.publish("x", 1, 0.5).await.unwrap_err();
        assert_eq!(reason(&refused), "PARITY_FAILED");
        assert!(refused.to_string().contains(&report.mean_abs_difference.to_string()), "{refused}");
        bench.assert_nothing_left().await;
    }
    *bench.gate.report.lock().unwrap() = Err(Error::internal("broken"));
    bench.publish("x", 1, 0.5).await.unwrap_err();
    bench.assert_nothing_left().await;

    bench.gate.says(ParityReport { mean_abs_difference: 0.05, ..GOOD });
    bench.publish("x", 1, 0.5).await.unwrap();
}

#[tokio::test]
async fn a_refusal_leaves_the_same_content_of_another_version() {
    let mut bench = Bench::new(8).await;
    let row = bench.publish("x", 1, 0.5).await.unwrap();
    bench.gate.says(ParityReport { mean_abs_difference: 1.0, ..GOOD });
    bench.publish("y", 1, 0.5).await.unwrap_err();
    bench.forget(8);
    assert_serves(&bench.lease(&row.name).await.unwrap(), &lora(1, 0.5));
}

#[tokio::test]
async fn what_does_not_fit_the_base_leaves_nothing() {
    let bench = Bench::new(8).await;
    let mut new = bench.new_version("x", 1, 0.5);
    new.package.tensors.truncate(40);
    assert!(matches!(bench.hub.publish(&bench.tenant, new).await, Err(Error::Invalid { .. })));
    let refused = bench.publish("x", 33, 0.5).await.unwrap_err();
    assert!(matches!(&refused, Error::Invalid { message, .. } if message.contains("256")), "{refused:?}");
    assert_eq!(bench.gate.calls(), 0);
    bench.assert_nothing_left().await;
}

#[tokio::test]
async fn no_effect_is_noted_for_an_import_and_an_error_for_a_job() {
    let bench = Bench::new(8).await;
    bench.gate.says(ParityReport { no_effect: true, ..GOOD });
    let trained =
        NewVersion { job: Some(JobName::new(bench.tenant.id(), "1").unwrap()), ..bench.new_version("x", 1, 0.0) };
    let refused = bench.hub.publish(&bench.tenant, trained).await.unwrap_err();
    assert_eq!(reason(&refused), "NO_EFFECT");
    bench.assert_nothing_left().await;
    assert!(bench.publish("x", 1, 0.0).await.unwrap().parity.no_effect);
}

#[tokio::test]
async fn imports_that_name_another_base_are_noted_or_refused() {
    let bench = Bench::new(8).await;
    let hub = |strict| {
        let names = BaseNames { names: vec!["owner/Small-135M".into()], strict };
        let gate: Arc<dyn PublishGate> = bench.gate.clone();
        let shape = BaseShape { names, ..shape(b"base") };
        Hub::new(bench.store.clone(), shape, Digest::of(b"template"), gate, &Limits::default())
    };
    let new = |base: &str| {
        let mut new = bench.new_version("x", 1, 0.5);
        new.package.name_base(base).unwrap();
        new
    };
    for (base, noted) in [("someone/small-135m-GGUF", false), ("./out", false), ("other/Large-7B", true)] {
        let row = hub(false).publish(&bench.tenant, new(base)).await.unwrap();
        let note = row.note.unwrap_or_default();
        assert_eq!(note.contains(base) && note.contains("owner/Small-135M"), noted, "{base}: {note}");
        assert!(noted || note.is_empty(), "{note}");
        let stored = bench.store.resolve(&row.name.to_string().parse().unwrap()).await.unwrap();
        assert_eq!(stored.note.unwrap_or_default(), note);
        let strict = hub(true).publish(&bench.tenant, new(base)).await;
        match strict {
            Err(Error::Invalid { reason, .. }) => assert!(noted && reason == "BASE_MISMATCH", "{reason}"),
            other => assert!(!noted && other.is_ok(), "{other:?}"),
        }
    }
    let trained = NewVersion { job: Some(JobName::new(bench.tenant.id(), "1").unwrap()), ..new("other/Large-7B") };
    assert_eq!(hub(true).publish(&bench.tenant, trained).await.unwrap().note, None, "a job's base is the server's");
}

#[tokio::test]
async fn validating_asks_the_gate_and_keeps_nothing() {
    let bench = Bench::new(8).await;
    let new = NewVersion { validate_only: true, request_id: "r".into(), ..bench.new_version("x", 1, 0.5) };
    let row = bench.hub.publish(&bench.tenant, new.clone()).await.unwrap();
    assert_eq!((row.name.version, bench.gate.calls()), (1, 1));
    bench.assert_nothing_left().await;

    bench.hub.publish(&bench.tenant, NewVersion { validate_only: false, ..new }).await.unwrap();
    assert_eq!(bench.gate.calls(), 2, "validating does not use the request id up");
}

#[tokio::test]
async fn a_retried_publish_gives_the_first_version() {
    let bench = Bench::new(8).await;
    let new = NewVersion { request_id: "r".into(), ..bench.new_version("x", 1, 0.5) };
    let both =
        tokio::join!(bench.hub.publish(&bench.tenant, new.clone()), bench.hub.publish(&bench.tenant, new.clone()));
    let (one, two) = (both.0.unwrap(), both.1.unwrap());
    assert_eq!((one.name.version, &one), (1, &two));
    assert_eq!(bench.gate.calls(), 1);

    let files = bench.blobs();
    let again = NewVersion { package: bench.new_version("x", 1, 0.5).package, ..new.clone() };
    assert_eq!(bench.hub.publish(&bench.tenant, again).await.unwrap(), one);
    let content = NewVersion { package: bench.new_version("x", 2, 0.5).package, ..new.clone() };
    let target = NewVersion { adapter: bench.new_version("y", 1, 0.5).adapter, ..new.clone() };
    let publish = NewVersion { publish: Publish::VersionOnly, ..new };
    for other in [content, target, publish] {
        let refused = bench.hub.publish(&bench.tenant, other).await.unwrap_err();
        assert!(matches!(&refused, Error::Invalid { reason: "REQUEST_ID_REUSED", .. }), "{refused:?}");
        assert!(refused.to_string().contains(&one.name.to_string()), "it names the first result: {refused}");
    }
    assert_eq!(bench.blobs(), files);
    assert_eq!(bench.hub.stats(), HubStats { resident: 1, resident_bytes: UNIT, leases: 0, host_bytes: 0 });
}

#[tokio::test]
async fn a_publish_ends_though_its_caller_is_gone() {
    let bench = Bench::new(8).await;
    bench.gate.shut(true);
    let call = tokio::spawn({
        let (hub, tenant, new) = (Arc::clone(&bench.hub), bench.tenant.clone(), bench.new_version("x", 1, 0.5));
        async move { hub.publish(&tenant, new).await }
    });
    until(|| bench.gate.calls() == 1).await;
    assert_eq!(bench.hub.stats().resident_bytes, UNIT, "reserved before it has a name");
    assert!(matches!(bench.lease("tenants/a/adapters/x").await, Err(Error::NotFound { .. })));
    call.abort();
    bench.gate.shut(false);
    while bench.lease("tenants/a/adapters/x").await.is_err() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn until(done: impl Fn() -> bool) {
    while !done() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_leases_load_once() {
    let mut bench = Bench::new(8).await;
    let row = bench.publish("x", 1, 0.5).await.unwrap();
    // Room for one copy: a second load would be refused.
    bench.forget(1);
    let lease = async || bench.lease(&row.name).await.unwrap();
    let leases = futures::future::join_all((0..32).map(|_| lease())).await;
    assert!(leases.iter().all(|lease| Arc::ptr_eq(lease.packed(), leases[0].packed())));
    assert_eq!(bench.hub.stats(), HubStats { resident: 1, resident_bytes: UNIT, leases: 32, host_bytes: 0 });
}

#[tokio::test]
async fn the_version_used_longest_ago_makes_room() {
    let bench = Bench::new(2).await;
    for adapter in ["x", "y"] {
        bench.publish(adapter, 1, 0.5).await.unwrap();
    }
    let [x, y, z] = ["x", "y", "z"].map(|adapter| format!("tenants/a/adapters/{adapter}"));
    let held = bench.lease(&y).await.unwrap();
    bench.lease(&x).await.unwrap();
    bench.publish("z", 1, 0.25).await.unwrap();
    assert_eq!(bench.hub.stats(), HubStats { resident: 2, resident_bytes: 2 * UNIT, leases: 1, host_bytes: 0 });

    let back = bench.lease(&x).await.unwrap();
    assert_serves(&back, &lora(1, 0.5));
    let full = bench.lease(&z).await.unwrap_err();
    assert!(matches!(full, Error::Exhausted { limit: "adapter_cache_bytes", retry_after: Some(_), .. }), "{full:?}");
    drop(held);
    assert_serves(&bench.lease(&z).await.unwrap(), &lora(1, 0.25));

    let never = bench.publish("big", 3, 0.5).await.unwrap_err();
    assert!(matches!(never, Error::Exhausted { retry_after: None, .. }), "{never:?}");
}

#[tokio::test]
async fn a_deleted_version_lives_until_its_leases_drop() {
    let bench = Bench::new(8).await;
    let old = bench.publish("x", 1, 0.5).await.unwrap();
    let lease = bench.lease(&old.name).await.unwrap();
    bench.hub.delete_adapter(&bench.tenant, &old.name.adapter, "").await.unwrap();
    assert!(matches!(bench.lease(&old.name).await, Err(Error::NotFound { .. })));
    assert_eq!(bench.hub.stats(), HubStats { resident: 0, resident_bytes: UNIT, leases: 1, host_bytes: 0 });

    let new = bench.publish("x", 2, 0.25).await.unwrap();
    let fresh = bench.lease(&new.name.adapter).await.unwrap();
    assert_serves(&fresh, &lora(2, 0.25));
    assert_serves(&lease, &lora(1, 0.5));
    assert!(matches!(bench.lease(&old.name).await, Err(Error::NotFound { .. })));
    drop(lease);
    assert_eq!(bench.hub.stats().resident_bytes, 2 * UNIT);
}

#[tokio::test]
async fn a_version_deleted_while_it_loads_does_not_stay_in_memory() {
    let mut bench = Bench::new(8).await;
    let row = bench.publish("x", 1, 0.5).await.unwrap();
    bench.forget(8);
    let load = async || bench.hub.residents.get_or_load(&row.uid, row.name.tenant(), bench.hub.load(&row)).await;
    // A lease has read the row; the deletion comes before its load, first sparing the files, then with them.
    let files_stay = bench.store.custody(bench.tenant.id(), &row.blob).await;
    bench.hub.delete_adapter(&bench.tenant, &row.name.adapter, "").await.unwrap();
    assert!(matches!(load().await, Err(Error::NotFound { .. })), "its files are there, it is not");
    assert_eq!(bench.hub.stats(), HubStats { resident: 0, resident_bytes: 0, leases: 0, host_bytes: 0 });
    drop(files_stay);
    bench.store.collect_blobs(std::slice::from_ref(&row.blob)).await;
    assert!(matches!(load().await, Err(Error::NotFound { .. })));
    bench.assert_nothing_left().await;
}

#[tokio::test]
async fn a_tenants_memory_goes_with_it() {
    let bench = Bench::new(8).await;
    bench.publish("x", 1, 0.5).await.unwrap();
    let other = add_tenant(&bench.store, "b").await;
    let new = NewVersion { adapter: AdapterName::new(other.id(), "x").unwrap(), ..bench.new_version("x", 1, 0.5) };
    let kept = bench.hub.publish(&other, new).await.unwrap();
    bench.hub.delete_tenant(bench.tenant.id()).await.unwrap();
    assert_eq!(bench.hub.stats(), HubStats { resident: 1, resident_bytes: UNIT, leases: 0, host_bytes: 0 });
    let lease = bench.hub.lease(&other, &AdapterRef::Live(kept.name.adapter.clone())).await.unwrap();
    assert_eq!(lease.name(), &kept.name);
    drop(lease);
    let again = hub(&bench.store, &bench.gate, b"base", 8);
    again.lease(&other, &AdapterRef::Version(kept.name)).await.unwrap();
}

#[tokio::test]
async fn versions_of_another_base_are_refused() {
    let mut bench = Bench::new(8).await;
    let row = bench.publish("x", 1, 0.5).await.unwrap();
    bench.hub = hub(&bench.store, &bench.gate, b"another base", 8);
    assert_eq!(reason(&bench.lease(&row.name).await.unwrap_err()), "WRONG_BASE");
    assert_eq!(bench.hub.stats(), HubStats { resident: 0, resident_bytes: 0, leases: 0, host_bytes: 0 });
}

fn path_of(bench: &Bench, row: &VersionRow, file: &str) -> std::path::PathBuf {
    bench.dir.path().join("blobs").join(&row.blob).join(file)
}

/// Flips a bit near the end of a version's file.
fn damage(bench: &Bench, row: &VersionRow, file: &str) {
    let file = path_of(bench, row, file);
    let mut bytes = std::fs::read(&file).unwrap();
    let last = bytes.len() - 10;
    bytes[last] ^= 1;
    std::fs::write(&file, bytes).unwrap();
}

#[tokio::test]
async fn damaged_files_are_never_served() {
    let mut bench = Bench::new(8).await;
    let row = bench.publish("x", 1, 0.5).await.unwrap();
    damage(&bench, &row, PACKED_FILE);
    damage(&bench, &row, TENSORS_FILE);
    bench.forget(8);
    let refused = bench.lease(&row.name).await.unwrap_err();
    assert!(matches!(&refused, Error::Precondition { reason: "VERSION_DAMAGED", .. }), "{refused:?}");
    assert_eq!(bench.hub.stats(), HubStats::default());
}

/// The same content under another name is the same blob.
#[tokio::test]
async fn the_same_files_again_repair_damaged_ones() {
    let mut bench = Bench::new(8).await;
    let row = bench.publish("x", 1, 0.5).await.unwrap();
    let file = path_of(&bench, &row, TENSORS_FILE);
    let sound = std::fs::read(&file).unwrap();
    let faults: [fn(&Bench, &VersionRow, &std::path::Path); 3] = [
        |bench, row, _| damage(bench, row, TENSORS_FILE),
        |_, _, file| std::fs::write(file, b"cut").unwrap(),
        |_, _, file| std::fs::remove_file(file).unwrap(),
    ];
    for (n, fault) in faults.into_iter().enumerate() {
        fault(&bench, &row, &file);
        damage(&bench, &row, PACKED_FILE);
        bench.forget(8);
        assert_eq!(reason(&bench.lease(&row.name).await.unwrap_err()), "VERSION_DAMAGED");
        let again = bench.publish(&format!("again-{n}"), 1, 0.5).await.unwrap();
        assert_eq!((again.digest, &again.blob), (row.digest, &row.blob));
        assert_eq!(std::fs::read(&file).unwrap(), sound);
        bench.forget(8);
        assert_serves(&bench.lease(&row.name).await.unwrap(), &lora(1, 0.5));
    }
}

#[tokio::test]
async fn a_packed_file_that_cannot_be_used_is_made_again() {
    let mut bench = Bench::new(8).await;
    let row = bench.publish("x", 1, 0.5).await.unwrap();
    let file = path_of(&bench, &row, PACKED_FILE);
    let sound = std::fs::read(&file).unwrap();
    for missing in [false, true] {
        if missing {
            std::fs::remove_file(&file).unwrap()
        } else {
            damage(&bench, &row, PACKED_FILE)
        }
        bench.forget(8);
        assert_serves(&bench.lease(&row.name).await.unwrap(), &lora(1, 0.5));
        assert_eq!(std::fs::read(&file).unwrap(), sound);
    }
    // Whole, it is all that a load needs.
    damage(&bench, &row, TENSORS_FILE);
    bench.forget(8);
    assert_serves(&bench.lease(&row.name).await.unwrap(), &lora(1, 0.5));
}

#[tokio::test]
async fn what_leaves_the_device_waits_in_host_memory_while_there_is_room() {
    let bench = Bench::new(8).await;
    let limits = |limits: &mut Limits| (limits.adapter_cache_bytes, limits.adapter_host_bytes) = (UNIT, 2 * UNIT);
    let hub = hub_with(&bench.store, &bench.gate, b"base", limits);
    let fills = [0.5, 0.25, 0.125, 2.0];
    let mut rows = Vec::new();
    for (adapter, fill) in ["w", "x", "y", "z"].into_iter().zip(fills) {
        rows.push(bench.publish(adapter, 1, fill).await.unwrap());
    }
    let tiers = || rows.iter().map(|row| hub.residency(&row.uid, row.memory_bytes).tier).collect::<Vec<_>>();
    let lease = async |i: usize| hub.lease(&bench.tenant, &AdapterRef::Version(rows[i].name.clone())).await.unwrap();
    assert_eq!(tiers(), [Tier::Disk; 4]);
    for (i, fill) in fills.iter().enumerate() {
        assert_serves(&lease(i).await, &lora(1, *fill));
    }
    assert_eq!(tiers(), [Tier::Disk, Tier::Host, Tier::Host, Tier::Device], "the one used longest ago has left");
    assert_eq!(hub.stats(), HubStats { resident: 1, resident_bytes: UNIT, host_bytes: 2 * UNIT, leases: 0 });

    damage(&bench, &rows[1], PACKED_FILE);
    damage(&bench, &rows[1], TENSORS_FILE);
    assert_serves(&lease(1).await, &lora(1, fills[1]));
    assert_eq!(tiers(), [Tier::Disk, Tier::Device, Tier::Host, Tier::Host], "it came back without a read");
    let known = hub.residency(&rows[1].uid, UNIT);
    assert!(known.last_use.is_some() && known.last_load.is_some(), "{known:?}");

    bench.hub.delete_adapter(&bench.tenant, &rows[0].name.adapter, "").await.unwrap();
    hub.delete_adapter(&bench.tenant, &rows[2].name.adapter, "").await.unwrap();
    hub.delete_tenant(bench.tenant.id()).await.unwrap();
    assert_eq!(hub.stats(), HubStats::default());
    assert!(rows.iter().all(|row| hub.residency(&row.uid, UNIT).last_use.is_none()));
}

#[tokio::test]
async fn a_lease_waits_for_room() {
    let bench = Bench::new(8).await;
    let row = bench.publish("x", 1, 0.5).await.unwrap();
    bench.publish("y", 1, 0.25).await.unwrap();
    let hub = hub_with(&bench.store, &bench.gate, b"base", |limits| {
        (limits.adapter_cache_bytes, limits.adapter_wait_seconds) = (UNIT, 60);
    });
    let lease = async |adapter: &str| {
        let name = AdapterName::new(bench.tenant.id(), adapter).unwrap();
        hub.lease(&bench.tenant, &AdapterRef::Live(name)).await
    };
    let held = lease("x").await.unwrap();
    let (x_again, y) = tokio::join!(
        async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            drop(held);
            tokio::time::sleep(Duration::from_millis(50)).await;
            lease("x").await.unwrap()
        },
        async {
            let lease = lease("y").await.unwrap();
            assert_serves(&lease, &lora(1, 0.25));
            tokio::time::sleep(Duration::from_millis(100)).await;
        },
    );
    assert_eq!((y, x_again.name()), ((), &row.name));
    drop(x_again);
    let big = NewVersion { publish: Publish::Live, ..bench.new_version("x", 2, 0.5) };
    let never = hub.publish(&bench.tenant, big).await.unwrap_err();
    assert!(matches!(never, Error::Exhausted { retry_after: None, .. }), "{never:?}");
}

/// A version's packed file becomes a pipe that gives nothing: whoever opens it waits.
#[cfg(target_os = "linux")]
fn stall(bench: &Bench, row: &VersionRow) -> std::path::PathBuf {
    let file = path_of(bench, row, PACKED_FILE);
    std::fs::remove_file(&file).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&file).status().unwrap().success());
    file
}

/// What is read is counted until it has been read, whoever has gone meanwhile.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn cancelled_loads_keep_their_places_and_their_bytes_until_they_end() {
    let mut bench = Bench::new(32).await;
    let mut rows = Vec::new();
    for i in 0..20 {
        rows.push(bench.publish(&format!("x{i}"), 1, 0.25 + i as f32).await.unwrap());
    }
    let good = bench.publish("good", 1, 0.5).await.unwrap();
    let pipes: Vec<_> = rows.iter().map(|row| stall(&bench, row)).collect();
    bench.forget(32);
    let calls: Vec<_> = rows
        .iter()
        .map(|row| {
            let (hub, tenant, name) = (Arc::clone(&bench.hub), bench.tenant.clone(), row.name.clone());
            tokio::spawn(async move { hub.lease(&tenant, &AdapterRef::Version(name)).await })
        })
        .collect();
    until(|| bench.hub.stats().resident_bytes == 20 * UNIT && bench.hub.loads.available_permits() == 0).await;
    calls.iter().for_each(tokio::task::JoinHandle::abort);
    for call in calls {
        assert!(call.await.is_err_and(|e| e.is_cancelled()));
    }
    // Those that had only waited are gone; those that read go on, and count.
    assert_eq!(bench.hub.stats().resident_bytes, LOADS_AT_ONCE as u64 * UNIT);
    assert_eq!(bench.hub.loads.available_permits(), 0, "their places are taken");
    let waits = bench.lease(&good.name);
    tokio::pin!(waits);
    assert!(futures::poll!(&mut waits).is_pending());
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut waits).await.is_err(), "it has no place");

    // Opening without waiting for a reader fails where nobody reads: so all that read are let go, and no more.
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = std::fs::File::options();
    const O_NONBLOCK: i32 = 0o4000;
    options.write(true).custom_flags(O_NONBLOCK);
    until(|| {
        pipes.iter().for_each(|pipe| drop(options.open(pipe)));
        bench.hub.loads.available_permits() > 0 || bench.hub.stats().resident == 1
    })
    .await;
    assert_serves(&waits.await.unwrap(), &lora(1, 0.5));
    until(|| {
        pipes.iter().for_each(|pipe| drop(options.open(pipe)));
        bench.hub.stats().resident_bytes == UNIT
    })
    .await;
    assert_eq!(bench.hub.loads.available_permits(), LOADS_AT_ONCE);
}

#[tokio::test]
async fn a_kept_copy_that_finds_no_room_stays_in_host_memory() {
    let bench = Bench::new(8).await;
    let limits = |limits: &mut Limits| (limits.adapter_cache_bytes, limits.adapter_host_bytes) = (UNIT, 2 * UNIT);
    let hub = hub_with(&bench.store, &bench.gate, b"base", limits);
    let (x, y) = (bench.publish("x", 1, 0.5).await.unwrap(), bench.publish("y", 1, 0.25).await.unwrap());
    let lease = async |row: &VersionRow| hub.lease(&bench.tenant, &AdapterRef::Version(row.name.clone())).await;
    lease(&x).await.unwrap();
    let held = lease(&y).await.unwrap();
    assert_eq!(hub.residency(&x.uid, UNIT).tier, Tier::Host);
    assert!(matches!(lease(&x).await, Err(Error::Exhausted { .. })));
    assert_eq!(hub.residency(&x.uid, UNIT).tier, Tier::Host, "it came back");
    drop(held);
    damage(&bench, &x, PACKED_FILE);
    damage(&bench, &x, TENSORS_FILE);
    assert_serves(&lease(&x).await.unwrap(), &lora(1, 0.5));
}

#[tokio::test]
async fn versions_come_back_after_a_restart() {
    let bench = Bench::new(8).await;
    let row = bench.publish("x", 1, 0.5).await.unwrap();
    let Bench { dir, store, hub: old, gate, tenant } = bench;
    drop((store, old));
    let store = Store::open(dir.path()).await.unwrap();
    let lease = hub(&store, &gate, b"base", 8).lease(&tenant, &AdapterRef::Live(row.name.adapter)).await.unwrap();
    assert_eq!(lease.digest(), row.digest);
    assert_serves(&lease, &lora(1, 0.5));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_lease_during_swaps_is_one_whole_version() {
    let bench = Bench::new(2).await;
    let fills = [0.5, 0.25];
    let one = bench.publish("x", 1, fills[0]).await.unwrap().name;
    let two = bench.publish("x", 1, fills[1]).await.unwrap().name;
    let client = async || {
        for _ in 0..50 {
            let lease = bench.lease(&one.adapter).await.unwrap();
            assert_serves(&lease, &lora(1, fills[lease.name().version as usize - 1]));
        }
    };
    let swaps = async {
        for version in [&two, &one].into_iter().cycle().take(50) {
            bench.hub.set_live(&bench.tenant, version, "").await.unwrap();
        }
    };
    tokio::join!(futures::future::join_all((0..8).map(|_| client())), swaps);
    assert_eq!(bench.hub.stats(), HubStats { resident: 2, resident_bytes: 2 * UNIT, leases: 0, host_bytes: 0 });
}
