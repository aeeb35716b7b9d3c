//! The adapters of the sequences that come next, turn by turn of a loop without its thread.

use std::collections::BTreeSet;

use super::*;
use crate::hub::Attempt;

/// Longer than anything that is waited for takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// A loop whose hub has nothing in memory yet, and `a0` and `a1` as the catalogue has them.
struct Cold {
    hub: Arc<Hub>,
    rows: [Arc<VersionRow>; 2],
    state: EngineLoop,
    bare: Bare,
}

/// `cache_bytes`: the room for adapters, by the sizes of both.
async fn cold(places: u64, cache_bytes: impl Fn(u64, u64) -> u64, limits: Limits) -> Cold {
    let w = world();
    let row = async |name: &str| {
        let name = format!("tenants/t/adapters/{name}").parse().unwrap();
        Arc::new(w.hub.resolve(&w.tenant, &name).await.unwrap())
    };
    let rows = [row("a0").await, row("a1").await];
    let adapter_cache_bytes = cache_bytes(rows[0].memory_bytes, rows[1].memory_bytes);
    let limits = Limits { adapter_cache_bytes, adapter_host_bytes: 0, ..limits };
    let (shape, digest) = (w.model.shape().clone(), w.text.template_digest());
    let hub = Hub::new(w.store.clone(), shape, digest, Arc::new(PassingGate), &limits);
    let layout = KvLayout { block_tokens: 8, blocks: 40, dtype: KvDtype::F16 };
    let executor = w.model.executor(layout).unwrap();
    let (state, bare) = bare_loop_beside(hub.clone(), &tight(places + 1, 40), layout, executor);
    Cold { hub, rows, state, bare }
}

/// Room for both versions, of which the tenant's share holds one at a time.
async fn cold_of_one_share(places: u64) -> Cold {
    cold(places, |a, b| a + b, Limits { adapter_cache_percent_per_tenant: 50, ..Limits::default() }).await
}

impl Cold {
    fn wanted(&self, i: usize) -> SequenceAdapter {
        SequenceAdapter::Wanted(self.rows[i].clone())
    }

    fn turn(&mut self) {
        assert!(self.state.turn());
    }

    /// Takes turns until every sequence has come to its end.
    fn finish(&mut self) {
        let end = Instant::now() + PATIENCE;
        while !self.state.sequences.is_empty() {
            assert!(Instant::now() < end, "these wait for ever: {:?}", self.state.sequences.keys());
            self.turn();
        }
    }

    /// Waits for the end of a load, and lets the loop take it.
    fn take_load(&mut self) {
        let loaded = self.state.inbox.recv_timeout(PATIENCE).unwrap();
        assert!(matches!(loaded, Message::Loaded(_, Ok(_))), "{loaded:?}");
        self.bare.sender.send(loaded).unwrap();
        self.turn();
    }

    /// The versions that sequences hold, and how many hold one.
    fn leased(&self) -> (BTreeSet<String>, usize) {
        let leases = self.state.sequences.values().filter_map(|sequence| match &sequence.adapter {
            SequenceAdapter::Leased(lease) => Some(lease.name().to_string()),
            _ => None,
        });
        let leases: Vec<String> = leases.collect();
        (leases.iter().cloned().collect(), leases.len())
    }
}

async fn finished(mut reader: UnreadEvents) {
    let mut last = None;
    while let Some(event) = reader.recv().await {
        last = Some(event);
    }
    assert!(matches!(last, Some(Ok(GenerateEvent::Finished { .. }))), "{last:?}");
}

/// A request that is gone keeps no version, though another waits for the same one: that one is behind one that wants the share.
#[test]
fn a_version_is_not_kept_for_a_request_that_is_gone() {
    run(async {
        let mut cold = cold_of_one_share(4).await;
        let (gone, _reader) = submit_with(&cold.bare, cold.wanted(0), 3, 0, &|_| ());
        let others = [1, 0].map(|i| submit(&cold.bare, cold.wanted(i), 3));
        cold.turn();
        cold.bare.sender.send(Message::Cancel(gone..gone + 1)).unwrap();
        cold.finish();
        for reader in others {
            finished(reader).await;
        }
        assert_eq!(cold.hub.stats().leases, 0);
    });
}

/// What was loaded ahead of its time keeps the tenant's share from nobody.
#[test]
fn a_version_that_was_loaded_ahead_leaves_the_share_to_a_request_that_goes_before() {
    run(async {
        let mut cold = cold_of_one_share(1).await;
        let mut readers = vec![submit(&cold.bare, SequenceAdapter::Base, 60)];
        cold.turn();
        readers.push(submit(&cold.bare, cold.wanted(0), 3));
        cold.turn();
        cold.take_load();
        readers.push(submit_with(&cold.bare, cold.wanted(1), 3, 5, &|_| ()).1);
        cold.finish();
        for reader in readers {
            finished(reader).await;
        }
    });
}

/// With room for one version: what was loaded for a request that waits makes room for another at once.
#[test]
fn a_version_that_was_loaded_ahead_is_held_by_nobody() {
    run(async {
        let limits = Limits { adapter_wait_seconds: 0, adapter_cache_percent_per_tenant: 100, ..Limits::default() };
        let mut cold = cold(1, u64::max, limits).await;
        let mut readers = vec![submit(&cold.bare, SequenceAdapter::Base, 60)];
        cold.turn();
        readers.push(submit(&cold.bare, cold.wanted(0), 3));
        cold.turn();
        cold.take_load();
        assert_eq!((cold.hub.stats().leases, cold.state.sequences.len()), (0, 2));
        let other = "tenants/t/adapters/a1".parse().unwrap();
        drop(cold.hub.lease(&world().tenant, &other).await.expect("there is room"));
        assert!(!cold.hub.is_resident(&cold.rows[0].uid));
        cold.finish();
        for reader in readers {
            finished(reader).await;
        }
    });
}

/// Else versions for which there is no room together would be loaded in turns while their requests wait.
#[test]
fn a_version_is_loaded_ahead_once_for_a_request() {
    run(async {
        let limits = Limits { adapter_cache_percent_per_tenant: 100, ..Limits::default() };
        let Cold { hub, rows: [row, other], mut state, bare: _bare } = cold(1, u64::max, limits).await;
        state.warm.prefetch(7, &row);
        let Message::Loaded(uid, outcome) = state.inbox.recv_timeout(PATIENCE).unwrap() else { panic!("a load") };
        state.warm.loaded(&uid, outcome).1.unwrap();
        drop(hub.lease(&world().tenant, &"tenants/t/adapters/a1".parse().unwrap()).await.unwrap());
        state.warm.prefetch(7, &row);
        assert!(matches!(hub.try_lease(&other), Attempt::Leased(_)), "no load has claimed the share");
        state.warm.forget(7, &row);
        state.warm.prefetch(7, &row);
        assert!(matches!(state.inbox.recv_timeout(PATIENCE).unwrap(), Message::Loaded(_, Ok(_))));
    });
}

#[test]
fn a_tenant_runs_no_more_versions_at_once_than_its_share_holds() {
    run(async {
        let mut cold = cold_of_one_share(8).await;
        let readers = [0, 1, 0, 1].map(|i| submit(&cold.bare, cold.wanted(i), 9));
        let end = Instant::now() + PATIENCE;
        cold.turn();
        while !cold.state.sequences.is_empty() {
            assert!(Instant::now() < end);
            cold.turn();
            let (versions, _) = cold.leased();
            assert!(versions.len() <= 1, "{versions:?}");
        }
        for reader in readers {
            finished(reader).await;
        }
        // Requests for one version share it; one of the two is in memory.
        let there = usize::from(!cold.hub.is_resident(&cold.rows[0].uid));
        let readers = [there; 2].map(|i| submit(&cold.bare, cold.wanted(i), 9));
        cold.turn();
        while cold.leased().1 < 2 {
            assert!(Instant::now() < end && cold.state.sequences.len() == 2);
            cold.turn();
        }
        cold.finish();
        for reader in readers {
            finished(reader).await;
        }
    });
}
