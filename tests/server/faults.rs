//! A disk that is full, or that hangs, at every write of every call that changes something: what the call has not acknowledged has not
//! happened, what it has acknowledged has, and with a sound disk the same call succeeds.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::{BoxFuture, FutureExt as _};
use tempfile::TempDir;
use tenora::api::client::Client;
use tenora::api::proto::*;
use tenora::model::Model;
use tenora::store::{Options, Store, Watch};
use tokio::sync::watch;

use super::common::TestServer;
use super::killed::{Call, State, client};

/// More writes than any call has.
const MANY: u64 = 60;
/// The steps before the disk is changed; at the others it has been.
const BEFORE: [&str; 6] = ["put", "replace", "part", "finish", "delete", "commit"];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    Full,
    Hangs,
}

/// A disk that is sound for so many more writes.
#[derive(Debug)]
struct Disk {
    /// The writes that are left, what comes then, and whether it has come.
    state: Mutex<(u64, Option<Fault>, bool)>,
    sound: watch::Sender<bool>,
}

impl Disk {
    fn new() -> Self {
        Self { state: Mutex::new((0, None, false)), sound: watch::channel(true).0 }
    }

    fn break_after(&self, writes: u64, fault: Fault) {
        *self.state.lock().unwrap() = (writes, Some(fault), false);
        self.sound.send_replace(false);
    }

    /// Makes it sound again; gives whether anything met the fault.
    fn mend(&self) -> bool {
        let (_, _, met) = std::mem::take(&mut *self.state.lock().unwrap());
        self.sound.send_replace(true);
        met
    }

    fn fault(&self) -> Option<Fault> {
        let mut state = self.state.lock().unwrap();
        let fault = state.1?;
        if state.0 > 0 {
            state.0 -= 1;
            return None;
        }
        state.2 = true;
        Some(fault)
    }

    /// Waits until something meets the fault.
    async fn met(&self) {
        while !self.state.lock().unwrap().2 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl Watch for Disk {
    fn reached(&self, step: &'static str) -> BoxFuture<'static, io::Result<()>> {
        let fault = if BEFORE.contains(&step) { self.fault() } else { None };
        let mut sound = self.sound.subscribe();
        async move {
            match fault {
                None => Ok(()),
                Some(Fault::Full) => Err(io::ErrorKind::StorageFull.into()),
                Some(Fault::Hangs) => {
                    // The disk is gone with the test.
                    let _ = sound.wait_for(|sound| *sound).await;
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
        let bench = Self { server, disk, tenant, operator };
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

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_hangs_keeps_readers_going_and_finishes_what_callers_left() {
    let bench = Bench::new().await;
    for call in calls() {
        let begun = bench.state().await;
        for writes in 0.. {
            assert!(writes < MANY, "{call:?} never succeeds");
            let before = bench.state().await;
            bench.disk.break_after(writes, Fault::Hangs);
            let outcome = tokio::select! {
                outcome = bench.make(call.clone()) => Some(outcome),
                // The caller goes away while the disk hangs.
                () = async { bench.disk.met().await; tokio::time::sleep(Duration::from_millis(20)).await } => None,
            };
            if outcome.is_none() {
                assert_eq!(bench.state().await.policy, before.policy, "reads go on");
            }
            bench.disk.mend();
            bench.server.idle().await;
            if let Some(outcome) = outcome {
                // Refused only for one before it, whose caller was gone, and which went on to its end since.
                if let Err(error) = outcome {
                    assert_ne!(bench.state().await, begun, "{error}");
                }
                break;
            }
            // It went on to its end, goes on, or never happened.
            let after = bench.state().await;
            if after != before {
                break;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_outlives_a_full_disk_at_any_write() {
    let bench = Bench::new().await;
    for writes in 0.. {
        assert!(writes < MANY, "a job never ends without a full disk");
        let known = bench.state().await.jobs;
        bench.make(Call::Train("tenants/t/datasets/first".into())).await.unwrap();
        bench.disk.break_after(writes, Fault::Full);
        let name = bench.state().await.jobs.difference(&known).next().cloned().unwrap();
        // Nothing is written for a while, or the job has ended with its writes.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let met = bench.disk.mend();
        let request = WatchTrainingJobRequest { name: name.clone(), ..Default::default() };
        let mut events = bench.tenant.watch_training_job(request).await.unwrap();
        let watched = async { while events.next().await.is_some() {} };
        tokio::time::timeout(Duration::from_secs(60), watched).await.expect("the job ends");
        let job = bench.tenant.get_training_job(GetTrainingJobRequest { name }).await.unwrap();
        assert_eq!(job.state(), JobState::Succeeded, "full after {writes} writes: {}", job.error);
        if !met {
            break;
        }
    }
}
