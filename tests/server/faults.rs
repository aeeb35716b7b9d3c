//! A disk that is full at every write of every call that changes something: what the call has not acknowledged has not
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

use super::common::TestServer;
use super::killed::{Call, State, client};

/// More writes than any call has.
const MANY: u64 = 60;
/// The steps before the disk is changed; at the others it has been.
const BEFORE: [&str; 6] = ["put", "replace", "part", "finish", "delete", "commit"];

/// A disk that is sound for so many more writes, and full from then on.
#[derive(Debug, Default)]
struct Disk {
    /// The writes that are left, where it is to become full, and whether a write has met that.
    state: Mutex<(Option<u64>, bool)>,
}

impl Disk {
    fn fill_after(&self, writes: u64) {
        *self.state.lock().unwrap() = (Some(writes), false);
    }

    /// Makes it sound again; gives whether any write has failed.
    fn mend(&self) -> bool {
        std::mem::take(&mut *self.state.lock().unwrap()).1
    }

    fn is_full(&self) -> bool {
        let mut state = self.state.lock().unwrap();
        match &mut state.0 {
            None => false,
            Some(0) => {
                state.1 = true;
                true
            }
            Some(left) => {
                *left -= 1;
                false
            }
        }
    }
}

impl Watch for Disk {
    fn reached(&self, step: &'static str) -> BoxFuture<'static, io::Result<()>> {
        let full = BEFORE.contains(&step) && self.is_full();
        async move { if full { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) } }.boxed()
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
        let (data, disk) = (TempDir::new().unwrap(), Arc::new(Disk::default()));
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
            bench.disk.fill_after(writes);
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
async fn a_job_outlives_a_full_disk_at_any_write() {
    let bench = Bench::new().await;
    for writes in 0.. {
        assert!(writes < MANY, "a job never ends without a full disk");
        let known = bench.state().await.jobs;
        bench.make(Call::Train("tenants/t/datasets/first".into())).await.unwrap();
        bench.disk.fill_after(writes);
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
