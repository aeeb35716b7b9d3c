//! A disk that is full, or hangs, at every write of every call that changes something. Full: what the call has not acknowledged has not
//! happened, what it has acknowledged has, and with a sound disk the same call succeeds. Hanging: everyone else is answered meanwhile, and the
//! call ends as it would have, also where its caller has left.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::{BoxFuture, FutureExt as _};
use tempfile::TempDir;
use tenora::api::client::Client;
use tenora::api::proto::*;
use tenora::model::Model;
use tenora::store::{DiskWrite, Options, Store, Watch, When};
use tokio::sync::watch;

use super::common::{TestServer, answer, generate};
use super::killed::{Call, State, client};

/// More writes than any call has.
const MANY: u64 = 60;

/// What a disk does at a write.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    Full,
    Hangs,
}

/// The fault that is to come, and after how many more writes; whether a write has met it.
#[derive(Debug, Default)]
struct Next {
    fault: Option<(u64, Fault)>,
    met: bool,
}

/// A disk that is sound for so many more writes, and full or hanging from then on.
#[derive(Debug)]
struct Disk {
    state: watch::Sender<Next>,
}

impl Disk {
    fn new() -> Self {
        Self { state: watch::Sender::new(Next::default()) }
    }

    fn break_after(&self, writes: u64, fault: Fault) {
        self.state.send_replace(Next { fault: Some((writes, fault)), met: false });
    }

    /// Makes it sound again, and lets go what hangs; gives whether any write has met the fault.
    fn mend(&self) -> bool {
        self.state.send_replace(Next::default()).met
    }

    /// Waits until a write meets the fault.
    async fn met(&self) {
        self.state.subscribe().wait_for(|state| state.met).await.unwrap();
    }

    /// Counts a write; gives the fault that it meets.
    fn fault(&self) -> Option<Fault> {
        let mut fault = None;
        self.state.send_modify(|state| match &mut state.fault {
            Some((0, kind)) => {
                fault = Some(*kind);
                state.met = true;
            }
            Some((left, _)) => *left -= 1,
            None => {}
        });
        fault
    }
}

impl Watch for Disk {
    fn reached(&self, _: DiskWrite, when: When) -> BoxFuture<'static, io::Result<()>> {
        let fault = if when == When::Before { self.fault() } else { None };
        let mut state = self.state.subscribe();
        async move {
            match fault {
                None => Ok(()),
                Some(Fault::Full) => Err(io::ErrorKind::StorageFull.into()),
                Some(Fault::Hangs) => {
                    // An error means that the disk is gone, with the test.
                    let _ = state.wait_for(|state| state.fault.is_none()).await;
                    Ok(())
                }
            }
        }
        .boxed()
    }
}

struct Bench {
    server: TestServer,
    disk: Arc<Disk>,
    tenant: Client,
    operator: Client,
    /// The key of a tenant `u` with an adapter, which changes nothing.
    bystander: String,
}

impl Bench {
    /// A tenant `t` with a dataset and two versions of an adapter.
    async fn new() -> Self {
        let (data, disk) = (TempDir::new().unwrap(), Arc::new(Disk::new()));
        let options = Options { watch: Some(disk.clone()), ..Options::default() };
        let store = Store::open_with(data.path(), options).await.unwrap();
        let loaded = std::future::ready(Ok(()));
        let mut server = TestServer::start_over(data, store, loaded, Model::tiny(1), |_| {}).await;
        server.ready().await;
        let (address, key) = (format!("http://{}", server.addr), server.tenant("t").await);
        let (tenant, operator) = (client(&address, &key).await, client(&address, &server.operator).await);
        let bystander = server.tenant("u").await;
        server.import(&bystander, "u", "x", &server.package(1)).await.unwrap();
        let bench = Self { server, disk, tenant, operator, bystander };
        for call in [Call::Upload("first".into(), 4), Call::Import("a".into(), 1), Call::Import("a".into(), 2)] {
            bench.make(call).await.unwrap();
        }
        bench
    }

    async fn make(&self, call: Call) -> tenora::api::client::Result<()> {
        call.make(&self.tenant, &self.operator).await
    }

    async fn state(&self) -> State {
        State::of(&self.tenant, &self.operator).await
    }

    /// The other tenant is let in, reads and is answered, whatever the disk does at a write.
    async fn others_are_answered(&self) {
        let all = async {
            let request = ListAdaptersRequest { parent: "tenants/u".into(), ..Default::default() };
            let listed = self.server.adapters(&self.bystander).await.list_adapters(request).await.unwrap();
            assert_eq!(listed.into_inner().adapters.len(), 1);
            let request = generate("tenants/u/adapters/x", "hello", 3);
            answer(&mut self.server.generation(&self.bystander).await, request).await.unwrap();
        };
        tokio::time::timeout(Duration::from_secs(60), all).await.expect("others do not wait for the disk");
    }
}

/// One of each kind that succeeds once.
fn calls() -> [Call; 7] {
    [
        Call::Upload("d".into(), 3),
        Call::Import("b".into(), 3),
        Call::SetLive("tenants/t/adapters/a/versions/2".into()),
        Call::Policy("phrase".into()),
        Call::MakeKey,
        Call::DeleteDataset("tenants/t/datasets/first".into()),
        Call::DeleteAdapter("tenants/t/adapters/a".into()),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_at_any_write_leaves_all_or_nothing() {
    let bench = Bench::new().await;
    let mut met = 0;
    for call in calls() {
        for writes in 0.. {
            assert!(writes < MANY, "{call:?} never succeeds");
            let before = bench.state().await;
            bench.disk.break_after(writes, Fault::Full);
            let outcome = bench.make(call.clone()).await;
            met += u64::from(bench.disk.mend());
            let after = bench.state().await;
            match outcome {
                Ok(()) => {
                    assert_ne!(after, before, "{call:?} was acknowledged after {writes} writes");
                    break;
                }
                Err(error) => {
                    assert_eq!((error.code, error.reason.as_str()), ("RESOURCE_EXHAUSTED", "DISK_FULL"), "{error}");
                    assert_eq!(after, before, "{call:?} failed after {writes} writes");
                }
            }
        }
    }
    assert!(met > 8, "only {met} writes failed");
    bench.server.idle().await;
}

/// A call of each kind that can be made once for each `n`, with what it needs made before, and whether a state shows that it was made.
async fn fresh(bench: &Bench, kind: usize, n: u64) -> (Call, Box<dyn Fn(&State) -> bool>) {
    let (dataset, adapter) = (format!("tenants/t/datasets/k{kind}-{n}"), format!("tenants/t/adapters/k{kind}-{n}"));
    let id = format!("k{kind}-{n}");
    match kind {
        0 => (Call::Upload(id, 3), Box::new(move |state| state.datasets.contains_key(&dataset))),
        1 => (Call::Import(id, n), Box::new(move |state| state.live.contains_key(&adapter))),
        2 => {
            let live = bench.state().await.live.remove("tenants/t/adapters/a").unwrap();
            let version = format!("tenants/t/adapters/a/versions/{}", if live.ends_with('1') { 2 } else { 1 });
            (Call::SetLive(version.clone()), Box::new(move |state| state.live["tenants/t/adapters/a"] == version))
        }
        3 => (Call::Policy(id.clone()), Box::new(move |state| state.policy == [id.clone()])),
        4 => {
            let keys = bench.state().await.keys.len();
            (Call::MakeKey, Box::new(move |state| state.keys.len() > keys))
        }
        5 => {
            bench.make(Call::Upload(id, 2)).await.unwrap();
            (Call::DeleteDataset(dataset.clone()), Box::new(move |state| !state.datasets.contains_key(&dataset)))
        }
        _ => {
            bench.make(Call::Import(id, n)).await.unwrap();
            (Call::DeleteAdapter(adapter.clone()), Box::new(move |state| !state.live.contains_key(&adapter)))
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_hangs_keeps_nobody_else_and_loses_nothing() {
    let bench = Bench::new().await;
    let mut n = 0;
    for (kind, leaves) in (0..calls().len()).flat_map(|kind| [(kind, false), (kind, true)]) {
        for writes in 0.. {
            assert!(writes < MANY, "{kind} never succeeds");
            n += 1;
            let (call, made) = fresh(&bench, kind, n).await;
            bench.disk.break_after(writes, Fault::Hangs);
            let mut work = Box::pin(bench.make(call.clone()));
            let outcome = tokio::select! {
                outcome = &mut work => Some(outcome),
                () = bench.disk.met() => None,
            };
            if let Some(outcome) = outcome {
                outcome.unwrap();
                bench.disk.mend();
                break;
            }
            bench.others_are_answered().await;
            if leaves {
                drop(work);
                bench.disk.mend();
                // What goes on behind the caller is done, or refuses the same call until it is.
                let again = async {
                    while let Err(error) = bench.make(call.clone()).await {
                        if ["ALREADY_EXISTS", "NOT_FOUND"].contains(&error.code) {
                            break;
                        }
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                };
                tokio::time::timeout(Duration::from_secs(60), again).await.expect("the call can be made again");
            } else {
                bench.disk.mend();
                work.await.unwrap();
            }
            assert!(made(&bench.state().await), "{call:?} after a write {writes} that hung, leaves: {leaves}");
        }
    }
    bench.server.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_outlives_a_fault_of_the_disk_at_any_write() {
    let bench = Bench::new().await;
    for fault in [Fault::Full, Fault::Hangs] {
        for writes in 0.. {
            assert!(writes < MANY, "a job never ends without a fault");
            let known = bench.state().await.jobs;
            bench.make(Call::Train("tenants/t/datasets/first".into())).await.unwrap();
            let name = bench.state().await.jobs.difference(&known).next().cloned().unwrap();
            bench.disk.break_after(writes, fault);
            // Nothing is written for a while, or the job has ended with its writes.
            tokio::time::sleep(Duration::from_millis(300)).await;
            bench.others_are_answered().await;
            let met = bench.disk.mend();
            let request = WatchTrainingJobRequest { name: name.clone(), ..Default::default() };
            let mut events = bench.tenant.watch_training_job(request).await.unwrap();
            let watched = async { while events.next().await.is_some() {} };
            tokio::time::timeout(Duration::from_secs(60), watched).await.expect("the job ends");
            let job = bench.tenant.get_training_job(GetTrainingJobRequest { name }).await.unwrap();
            assert_eq!(job.state(), JobState::Succeeded, "{fault:?} after {writes} writes: {}", job.error);
            if !met {
                break;
            }
        }
    }
}
