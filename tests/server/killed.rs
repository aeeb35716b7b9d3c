//! SIGKILL in front of and behind every write: a server of its own process stops at a step that is drawn, is killed there, and the next one
//! over the same folder must have everything that was acknowledged.
//!
//! `TENORA_KILLS` says how many kills (default 12), `TENORA_KILL_SEED` which ones.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt as _};
use tempfile::TempDir;
use tenora::api::client::{self, Client, Target};
use tenora::api::proto::*;
use tenora::app;
use tenora::model::Model;
use tenora::store::{DiskWrite, Options, Store, Watch, When};
use tokio::net::TcpListener;

use super::common::{config, package};

/// Set for the process that is to be killed: where its data, its address and its mark lie.
const FOLDER: &str = "TENORA_KILL_FOLDER";
/// The step at which it stops.
const STEP: &str = "TENORA_KILL_STEP";
/// Steps among which one is drawn. A life has fewer where its work is done before.
const STEPS: u64 = 60;
/// Calls of one life.
const CALLS: usize = 8;

/// Stops everything that writes at a step, and says so by a file.
#[derive(Debug)]
struct StopAt {
    left: AtomicU64,
    mark: PathBuf,
}

impl Watch for StopAt {
    fn reached(&self, write: DiskWrite, when: When) -> BoxFuture<'static, io::Result<()>> {
        let before = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| Some(left.saturating_sub(1)));
        if before.is_ok_and(|left| left > 1) {
            return async { Ok(()) }.boxed();
        }
        let marked = std::fs::write(&self.mark, format!("{when:?} {write:?}"));
        async move {
            marked?;
            std::future::pending().await
        }
        .boxed()
    }
}

/// The process that is killed: a server over the tests' model. Does nothing where no folder is named.
#[tokio::test(flavor = "multi_thread")]
async fn child() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let folder = Path::new(&folder);
    let left = AtomicU64::new(std::env::var(STEP).unwrap().parse().unwrap());
    let watch: Arc<dyn Watch> = Arc::new(StopAt { left, mark: folder.join("mark") });
    let config = config(&folder.join("data"));
    let options = Options { watch: Some(watch), ..Options::default() };
    let store = Store::open_with(&config.data_dir, options).await.unwrap();
    let show = |key: String| std::fs::write(folder.join("operator"), key).unwrap();
    app::bootstrap_operator_key(&store, false, show).await.unwrap();
    let parts = app::assemble(Model::tiny(1), store.clone(), &config).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let ready = || {
        std::fs::write(folder.join("address.new"), address).unwrap();
        std::fs::rename(folder.join("address.new"), folder.join("address")).unwrap();
    };
    let (parts, ready) = (Box::pin(async { Ok(parts) }), Box::new(ready));
    app::serve(&config, store, parts, ready, listener, Box::pin(std::future::pending())).await.unwrap();
}

/// A life of the server, killed when dropped.
struct Life {
    process: Child,
    folder: PathBuf,
}

impl Life {
    fn start(folder: &Path, step: u64) -> Self {
        for file in ["mark", "address"] {
            let _ = std::fs::remove_file(folder.join(file));
        }
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["server::killed::child", "--exact"]).env(FOLDER, folder).env(STEP, step.to_string());
        let process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        Self { process, folder: folder.to_owned() }
    }

    /// Waits for a file that it writes.
    async fn wrote(&self, file: &str) -> String {
        for _ in 0..30_000 {
            if let Ok(text) = std::fs::read_to_string(self.folder.join(file)) {
                return text;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        panic!("no {file} after a minute");
    }

    /// Where it listens; `None` where it stops before.
    async fn address(&self) -> Option<String> {
        tokio::select! {
            address = self.wrote("address") => Some(address),
            _ = self.wrote("mark") => None,
        }
    }

    /// Does it, unless it stops before.
    async fn unless_stopped<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            done = work => Some(done),
            _ = self.wrote("mark") => None,
        }
    }
}

impl Drop for Life {
    /// SIGKILL, and gone.
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub async fn client(address: &str, key: &str) -> Client {
    let target = Target { server: address.to_owned(), key: Some(key.to_owned()), tls_ca: None };
    Client::connect(&target).await.unwrap()
}

/// Random numbers by a seed (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

/// What a tenant has, as it was acknowledged or as it is found.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct State {
    /// Records of each dataset.
    pub datasets: BTreeMap<String, u64>,
    /// Versions of all adapters, and each adapter's live one.
    pub versions: BTreeSet<String>,
    pub live: BTreeMap<String, String>,
    pub policy: Vec<String>,
    pub jobs: BTreeSet<String>,
    pub keys: BTreeSet<String>,
}

impl State {
    /// Reads it, and proves that every dataset and every version can be used.
    pub async fn of(tenant: &Client, operator: &Client) -> Self {
        let read = tokio::time::timeout(Duration::from_secs(60), Self::read(tenant, operator));
        read.await.expect("reads wait for nothing that writes")
    }

    async fn read(tenant: &Client, operator: &Client) -> Self {
        let (parent, mut state) = ("tenants/t".to_owned(), Self::default());
        let request = ListDatasetsRequest { parent: parent.clone(), page_size: 1000, ..Default::default() };
        for dataset in tenant.list_datasets(request).await.unwrap().datasets {
            // Reads the file, against its digest.
            let request = InspectDatasetRequest { name: dataset.name.clone(), ..Default::default() };
            let report = tenant.inspect_dataset(request).await.unwrap();
            state.datasets.insert(dataset.name, report.dataset.unwrap().records.into());
        }
        let request = ListAdaptersRequest { parent: parent.clone(), page_size: 1000, ..Default::default() };
        for adapter in tenant.list_adapters(request).await.unwrap().adapters {
            let request = ListAdapterVersionsRequest { parent: adapter.name.clone(), ..Default::default() };
            for version in tenant.list_adapter_versions(request).await.unwrap().versions {
                let sequence = Some(score_input::Sequence::Text("abc".into()));
                let inputs = vec![ScoreInput { sequence }];
                let request = ScoreRequest { adapter: version.name.clone(), inputs, ..Default::default() };
                assert_eq!(tenant.score(request).await.unwrap().adapter_version, version.name);
                state.versions.insert(version.name);
            }
            state.live.insert(adapter.name, adapter.live_version);
        }
        let request = GetSafetyPolicyRequest { name: "tenants/t/safetyPolicy".into() };
        state.policy = tenant.get_safety_policy(request).await.unwrap().blocked_phrases;
        let request = ListTrainingJobsRequest { parent: parent.clone(), page_size: 1000, ..Default::default() };
        let jobs = tenant.list_training_jobs(request).await.unwrap().training_jobs;
        state.jobs = jobs.into_iter().map(|job| job.name).collect();
        let request = ListApiKeysRequest { parent, page_size: 1000, ..Default::default() };
        let keys = operator.list_api_keys(request).await.unwrap().api_keys;
        state.keys = keys.into_iter().filter(|key| key.revoke_time.is_none()).map(|key| key.name).collect();
        state
    }
}

/// Calls that change something.
#[derive(Debug, Clone)]
pub enum Call {
    Upload(String, u64),
    DeleteDataset(String),
    Import(String, u64),
    SetLive(String),
    DeleteAdapter(String),
    Policy(String),
    Train(String),
    MakeKey,
    Revoke(String),
}

impl Call {
    fn draw(state: &State, fresh: u64, random: &mut Random) -> Self {
        let of = |names: Vec<&String>, random: &mut Random| names[random.below(names.len() as u64) as usize].clone();
        let keys: Vec<_> = state.keys.iter().skip(1).collect();
        match random.below(9) {
            0 if state.datasets.len() > 3 => Self::DeleteDataset(of(state.datasets.keys().collect(), random)),
            0 | 1 => Self::Upload(format!("d{fresh}"), 1 + random.below(5)),
            2 if state.versions.len() > 3 => Self::DeleteAdapter(of(state.live.keys().collect(), random)),
            2..=4 => Self::Import(format!("a{}", random.below(3)), fresh),
            5 if !state.versions.is_empty() => Self::SetLive(of(state.versions.iter().collect(), random)),
            6 if !state.datasets.is_empty() => Self::Train(of(state.datasets.keys().collect(), random)),
            7 if !keys.is_empty() => Self::Revoke(of(keys, random)),
            7 => Self::MakeKey,
            _ => Self::Policy(format!("phrase {fresh}")),
        }
    }

    /// Makes it.
    ///
    /// # Errors
    /// What the server says, such as that a job uses what is to be deleted.
    pub async fn make(self, tenant: &Client, operator: &Client) -> client::Result<()> {
        let parent = "tenants/t".to_owned();
        match self {
            Self::Upload(dataset_id, records) => {
                let line = "{\"prompt\":\"a\",\"completion\":\"b\"}\n".repeat(records as usize);
                let header = UploadHeader { parent, dataset_id, ..Default::default() };
                let parts =
                    [upload_dataset_request::Part::Header(header), upload_dataset_request::Part::Data(line.into())];
                let parts = parts.map(|part| UploadDatasetRequest { part: Some(part) });
                tenant.upload_dataset(futures::stream::iter(parts)).await.map(drop)
            }
            Self::DeleteDataset(name) => tenant.delete_dataset(DeleteDatasetRequest { name }).await.map(drop),
            Self::Import(adapter_id, seed) => {
                let package = package(Model::tiny(1).0.shape(), seed);
                let header = ImportAdapterHeader { parent, adapter_id, ..Default::default() };
                let chunk = |(filename, data): (&str, Vec<u8>)| {
                    import_adapter_request::Part::Chunk(FileChunk { filename: filename.into(), data })
                };
                let files = [(tenora::hub::CONFIG_FILE, package.config), (tenora::hub::TENSORS_FILE, package.tensors)];
                let parts = std::iter::once(import_adapter_request::Part::Header(header)).chain(files.map(chunk));
                let parts: Vec<_> = parts.map(|part| ImportAdapterRequest { part: Some(part) }).collect();
                tenant.import_adapter(futures::stream::iter(parts)).await.map(drop)
            }
            Self::SetLive(version) => {
                let name = version.split("/versions/").next().unwrap().to_owned();
                tenant.set_live_version(SetLiveVersionRequest { name, version, ..Default::default() }).await.map(drop)
            }
            Self::DeleteAdapter(name) => {
                tenant.delete_adapter(DeleteAdapterRequest { name, ..Default::default() }).await.map(drop)
            }
            Self::Policy(phrase) => {
                let name = "tenants/t/safetyPolicy".to_owned();
                let policy = Some(SafetyPolicy { name, blocked_phrases: vec![phrase], ..Default::default() });
                tenant.update_safety_policy(UpdateSafetyPolicyRequest { safety_policy: policy }).await.map(drop)
            }
            Self::Train(dataset) => {
                let objective = Some(train_request::Objective::Sft(SftSpec {}));
                let hyperparameters =
                    Some(Hyperparameters { max_steps: Some(1), learning_rate: Some(1e-2), ..Default::default() });
                let adapter_id = "trained".to_owned();
                let request =
                    TrainRequest { parent, adapter_id, dataset, objective, hyperparameters, ..Default::default() };
                tenant.train(request).await.map(drop)
            }
            Self::MakeKey => {
                operator.create_api_key(CreateApiKeyRequest { parent, ..Default::default() }).await.map(drop)
            }
            Self::Revoke(name) => operator.revoke_api_key(RevokeApiKeyRequest { name }).await.map(drop),
        }
    }
}

/// What jobs do by themselves: their versions come when they come.
fn without_jobs(state: &State) -> State {
    let trained = |name: &String| name.contains("/adapters/trained");
    let mut state = state.clone();
    state.versions.retain(|name| !trained(name));
    state.live.retain(|name, _| !trained(name));
    state
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_by_kills_at_any_write() {
    let number = |name: &str, default: u64| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let (kills, seed) = (number("TENORA_KILLS", 12), number("TENORA_KILL_SEED", 1));
    let (folder, mut random) = (TempDir::new().unwrap(), Random(seed));
    let first = Life::start(folder.path(), u64::MAX);
    let address = first.address().await.unwrap();
    let operator_key = std::fs::read_to_string(folder.path().join("operator")).unwrap();
    let operator = client(&address, &operator_key).await;
    let request = CreateTenantRequest { tenant_id: "t".into(), ..Default::default() };
    operator.create_tenant(request).await.unwrap();
    let request = CreateApiKeyRequest { parent: "tenants/t".into(), ..Default::default() };
    let made = operator.create_api_key(request).await.unwrap();
    // Drawn keys are never the first by name, which is the one that is used.
    let (key, used) = (made.secret, made.api_key.unwrap().name);
    drop(first);

    let mut known = State { keys: BTreeSet::from([used.clone()]), ..State::default() };
    let (mut pending, mut stopped, mut fresh): (Option<Call>, u64, u64) = (None, 0, 0);
    for kill in 0..=kills {
        let context = |what: &str| format!("seed {seed}, kill {kill}, after {pending:?}: {what}");
        let step = if kill == kills { u64::MAX } else { 1 + random.below(STEPS) };
        let life = Life::start(folder.path(), step);
        let Some(address) = life.address().await else { continue };
        let connected = async { (client(&address, &key).await, client(&address, &operator_key).await) };
        let (tenant, operator) = connected.await;
        let found = State::of(&tenant, &operator).await;
        // All that was acknowledged, and perhaps what was under way.
        if pending.is_none() {
            assert_eq!(without_jobs(&found), without_jobs(&known), "{}", context("nothing was under way"));
        }
        check(&known, &found, pending.as_ref(), &context);
        assert!(found.keys.contains(&used));
        (known, pending) = (found, None);
        for _ in 0..CALLS {
            fresh += 1;
            let mut call = Call::draw(&known, fresh, &mut random);
            if matches!(&call, Call::Revoke(name) if *name == used) {
                call = Call::MakeKey;
            }
            pending = Some(call.clone());
            // What the state forbids is refused, and changes nothing.
            if life.unless_stopped(call.make(&tenant, &operator)).await.is_none() {
                stopped += 1;
                break;
            }
            // Acknowledged; reads go on where all that writes has stopped.
            (known, pending) = (State::of(&tenant, &operator).await, None);
        }
    }
    assert!(stopped * 4 >= kills, "{stopped} of {kills} kills were in the middle of a call");
}

/// Only what the call under way is about may be otherwise than known.
fn check(known: &State, found: &State, pending: Option<&Call>, context: &dyn Fn(&str) -> String) {
    let about = |name: &str| match pending {
        Some(Call::Upload(id, _)) => name == format!("tenants/t/datasets/{id}"),
        Some(Call::Import(id, _)) => name.starts_with(&format!("tenants/t/adapters/{id}")),
        Some(Call::DeleteAdapter(of)) => name.starts_with(of.as_str()),
        Some(Call::SetLive(version)) => version.starts_with(name),
        Some(Call::DeleteDataset(of) | Call::Revoke(of)) => name == of,
        Some(Call::MakeKey) => !known.keys.contains(name),
        _ => false,
    };
    let (before, after) = (without_jobs(known), without_jobs(found));
    let names = |state: &State| -> BTreeSet<String> {
        let State { datasets, versions, live, keys, .. } = state;
        datasets.keys().chain(versions).chain(live.keys()).chain(keys).cloned().collect()
    };
    for name in names(&before).symmetric_difference(&names(&after)) {
        assert!(about(name), "{}", context(&format!("{name} came or went")));
    }
    for (name, live) in &before.live {
        let same = after.live.get(name).is_none_or(|now| now == live);
        assert!(same || about(name), "{}", context(&format!("{name} has another live version")));
    }
    for (name, records) in &before.datasets {
        assert!(after.datasets.get(name).is_none_or(|now| now == records), "{}", context(name));
    }
    assert!(found.versions.is_superset(&known.versions) || pending.is_some(), "{}", context("a trained version"));
    assert!(found.jobs.is_superset(&known.jobs), "{}", context("a job"));
    let policy = found.policy == known.policy
        || matches!(pending, Some(Call::Policy(phrase)) if found.policy == [phrase.clone()]);
    assert!(policy, "{}", context("the policy"));
}
