//! Random calls to a hub, and a model of what it should be after each.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// What may happen to a hub. Adapters and contents are numbers below 2 and 4; a content has its number plus 1 units.
#[derive(Debug, Clone)]
enum Op {
    Publish { adapter: usize, content: usize, publish: Publish, good: bool },
    Lease { adapter: usize, version: Option<u32> },
    Drop { lease: usize },
    SetLive { adapter: usize, version: u32 },
    Delete { adapter: usize },
}

fn op() -> impl Strategy<Value = Op> {
    let publish = prop_oneof![Just(Publish::Auto), Just(Publish::Live), Just(Publish::VersionOnly)];
    prop_oneof![
        4 => (0..2_usize, 0..4_usize, publish, prop::bool::weighted(0.8))
            .prop_map(|(adapter, content, publish, good)| Op::Publish { adapter, content, publish, good }),
        4 => (0..2_usize, prop::option::of(1..6_u32)).prop_map(|(adapter, version)| Op::Lease { adapter, version }),
        2 => (0..8_usize).prop_map(|lease| Op::Drop { lease }),
        2 => (0..2_usize, 1..6_u32).prop_map(|(adapter, version)| Op::SetLive { adapter, version }),
        1 => (0..2_usize).prop_map(|adapter| Op::Delete { adapter }),
    ]
}

/// What the hub should be: names, versions and leases, in plain collections.
#[derive(Default)]
struct Model {
    adapters: [Option<ModelAdapter>; 2],
    last_numbers: [u32; 2],
    leases: Vec<(Lease, VersionName, usize)>,
}

#[derive(Default)]
struct ModelAdapter {
    live: Option<u32>,
    contents: BTreeMap<u32, usize>,
}

/// Bytes of a content, in units.
fn units(content: usize) -> u64 {
    content as u64 + 1
}

const ROOM: u64 = 6;
const ADAPTERS: [&str; 2] = ["x", "y"];

impl Model {
    /// Units that cannot be evicted.
    fn leased(&self) -> u64 {
        let distinct: BTreeMap<_, _> = self.leases.iter().map(|(_, name, content)| (name, *content)).collect();
        distinct.into_values().map(units).sum()
    }

    /// Whether a version can be in memory: it is held there, or fits beside what is.
    fn fits(&self, name: &VersionName, content: usize) -> bool {
        self.leases.iter().any(|(_, held, _)| held == name) || self.leased() + units(content) <= ROOM
    }

    fn find(&self, adapter: usize, version: Option<u32>) -> Option<(u32, usize)> {
        let found = self.adapters[adapter].as_ref()?;
        let version = version.or(found.live)?;
        found.contents.get(&version).map(|content| (version, *content))
    }

    async fn apply(&mut self, bench: &Bench, op: Op) {
        let name = |adapter: usize| AdapterName::new(bench.tenant.id(), ADAPTERS[adapter]).unwrap();
        let version_name = |adapter: usize, version: u32| VersionName { adapter: name(adapter), version };
        match op {
            Op::Publish { adapter, content, publish, good } => {
                bench.gate.says(ParityReport { mean_abs_difference: if good { 0.0 } else { 1.0 }, ..GOOD });
                let new = bench.new_version(ADAPTERS[adapter], content + 1, 0.5);
                let made = bench.hub.publish(&bench.tenant, NewVersion { publish, ..new }).await;
                assert_eq!(made.is_ok(), good && self.leased() + units(content) <= ROOM, "{made:?}");
                if let Ok(row) = made {
                    self.last_numbers[adapter] += 1;
                    assert_eq!(row.name, version_name(adapter, self.last_numbers[adapter]));
                    let known = self.adapters[adapter].get_or_insert_default();
                    known.contents.insert(row.name.version, content);
                    let moves = publish == Publish::Live || publish == Publish::Auto && known.live.is_none();
                    known.live = if moves { Some(row.name.version) } else { known.live };
                }
            }
            Op::Lease { adapter, version } => {
                let asked = match version {
                    None => AdapterRef::Live(name(adapter)),
                    Some(version) => AdapterRef::Version(version_name(adapter, version)),
                };
                let lease = bench.hub.lease(&bench.tenant, &asked).await;
                let found = self.find(adapter, version).map(|(v, content)| (version_name(adapter, v), content));
                match (lease, found) {
                    (Ok(lease), Some((name, content))) if self.fits(&name, content) => {
                        self.leases.push((lease, name, content));
                    }
                    (Err(Error::Exhausted { .. }), Some((name, content))) => assert!(!self.fits(&name, content)),
                    (Err(Error::NotFound { .. } | Error::Precondition { .. }), None) => {}
                    (lease, found) => panic!("{lease:?} for {found:?}"),
                }
            }
            Op::Drop { lease } => {
                if lease < self.leases.len() {
                    self.leases.swap_remove(lease);
                }
            }
            Op::SetLive { adapter, version } => {
                let name = version_name(adapter, version);
                let may = self.find(adapter, Some(version)).is_some_and(|(_, content)| self.fits(&name, content));
                let moved = bench.hub.set_live(&bench.tenant, &name, "").await;
                assert_eq!(moved.is_ok(), may, "{moved:?}");
                if let (true, Some(known)) = (may, &mut self.adapters[adapter]) {
                    known.live = Some(version);
                }
            }
            Op::Delete { adapter } => {
                let gone = bench.hub.delete_adapter(&bench.tenant, &name(adapter), "").await;
                assert_eq!(gone.is_ok(), self.adapters[adapter].take().is_some(), "{gone:?}");
            }
        }
    }

    async fn assert_equals(&self, bench: &Bench) {
        let stats = bench.hub.stats();
        assert!(stats.resident_bytes <= ROOM * UNIT, "{stats:?}");
        assert!(stats.resident_bytes >= self.leased() * UNIT, "{stats:?}");
        assert_eq!(stats.leases, self.leases.len());
        for (lease, name, content) in &self.leases {
            assert_eq!(lease.name(), name);
            assert_serves(lease, &lora(content + 1, 0.5));
        }
        for (adapter, known) in ADAPTERS.into_iter().zip(&self.adapters) {
            let name = AdapterName::new(bench.tenant.id(), adapter).unwrap();
            let live = bench.store.get_adapter(&name).await.ok().map(|row| row.live.map(|v| v.version));
            assert_eq!(live, known.as_ref().map(|known| known.live));
            for (version, content) in known.iter().flat_map(|known| &known.contents) {
                let row = bench.store.get_version(&VersionName { adapter: name.clone(), version: *version }).await;
                assert_eq!(row.unwrap().memory_bytes, UNIT * units(*content));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any sequence of calls: the budget is never exceeded, no lease is lost or changed, names point to versions that exist, and
    /// in the end memory and disk are as in the beginning.
    #[test]
    fn the_hub_is_its_model(ops in prop::collection::vec(op(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (bench, mut model) = (Bench::new(ROOM).await, Model::default());
            for op in ops {
                model.apply(&bench, op).await;
                model.assert_equals(&bench).await;
            }
            model.leases.clear();
            for adapter in 0..ADAPTERS.len() {
                model.apply(&bench, Op::Delete { adapter }).await;
            }
            bench.assert_nothing_left().await;
        });
    }
}
