//! The adapter versions of the sequences that come next. Sequences that wait hold none; a version is leased when a sequence starts, and
//! loaded before where it is not on the device. The loop itself never waits for a load: it is told when one has ended.
//!
//! What is loaded ahead of its time stays on the device while there is room, and nobody holds it there. Only a sequence whose turn had
//! come, and that was set aside for the load, is kept its version for a while: else another load could take the room again before it is
//! looked at, and it would never start.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Weak, mpsc};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use crate::engine::run::Message;
use crate::error::Result;
use crate::hub::{Attempt, Claim, Hub, Lease, VersionRow};

/// Versions loaded at once.
const MOST_LOADS: usize = 8;

/// As many of them may be under way when another is loaded ahead of its time: the rest is for sequences whose turn it is.
const MOST_LOADS_AHEAD: usize = 4;

/// How long a version is kept for sequences that were set aside for it. They start at once where there is room for them; those that others
/// pass meanwhile hold no memory, and load it again.
const KEPT: Duration = Duration::from_secs(10);

/// Versions that are loaded, or are kept for sequences that were set aside.
#[derive(Debug)]
pub struct Warm {
    hub: Arc<Hub>,
    runtime: Handle,
    /// Weak, so that the loop ends when all handles are gone.
    inbox: Weak<mpsc::Sender<Message>>,
    /// By uid.
    versions: HashMap<String, Version>,
    /// The sequences whose version has been loaded ahead. Once each: where there is no room for the versions of all that come next,
    /// they would take it from each other in every step.
    prefetched: HashSet<u64>,
}

#[derive(Debug)]
struct Version {
    /// `None` while it loads; then since when it is kept.
    lease: Option<(Lease, Instant)>,
    /// The sequences that were set aside for it and have not started.
    sequences: Vec<u64>,
}

/// What a sequence gets that could start.
#[derive(Debug)]
pub enum Wanted {
    Lease(Lease),
    /// It is told when the version is there.
    Loading,
    /// Not now.
    Later,
}

impl Warm {
    pub fn new(hub: Arc<Hub>, runtime: Handle, inbox: Weak<mpsc::Sender<Message>>) -> Self {
        Self { hub, runtime, inbox, versions: HashMap::new(), prefetched: HashSet::new() }
    }

    /// Leases a version for a sequence whose turn it is, or begins to load it.
    pub fn lease(&mut self, id: u64, row: &Arc<VersionRow>) -> Wanted {
        self.versions.retain(|_, version| version.lease.as_ref().is_none_or(|(_, since)| since.elapsed() < KEPT));
        if let Some(version) = self.versions.get_mut(&row.uid) {
            if let Some((lease, _)) = &version.lease {
                return Wanted::Lease(lease.clone());
            }
            version.sequences.push(id);
            return Wanted::Loading;
        }
        if self.loads() >= MOST_LOADS && !self.hub.is_resident(&row.uid) {
            return Wanted::Later;
        }
        match self.hub.try_lease(row) {
            Attempt::Leased(lease) => Wanted::Lease(lease),
            Attempt::ShareUsed => Wanted::Later,
            Attempt::Cold(claim) => {
                self.load(row, claim, vec![id]);
                Wanted::Loading
            }
        }
    }

    /// Loads the version of a sequence that starts soon, where there is room for one more.
    pub fn prefetch(&mut self, id: u64, row: &Arc<VersionRow>) {
        let known = self.prefetched.contains(&id) || self.versions.contains_key(&row.uid);
        if known || self.loads() >= MOST_LOADS_AHEAD || self.hub.is_resident(&row.uid) {
            return;
        }
        if let Attempt::Cold(claim) = self.hub.try_lease(row) {
            self.prefetched.insert(id);
            self.load(row, claim, Vec::new());
        }
    }

    /// Keeps nothing for a sequence any more: it has started, or is gone.
    pub fn forget(&mut self, id: u64, row: &VersionRow) {
        self.prefetched.remove(&id);
        let Some(version) = self.versions.get_mut(&row.uid) else { return };
        version.sequences.retain(|other| *other != id);
        if version.sequences.is_empty() && version.lease.is_some() {
            self.versions.remove(&row.uid);
        }
    }

    /// Takes the end of a load; gives the sequences that were set aside for it, and its error.
    pub fn loaded(&mut self, uid: &str, outcome: Result<Lease>) -> (Vec<u64>, Result<()>) {
        let Some(mut version) = self.versions.remove(uid) else { return (Vec::new(), Ok(())) };
        let sequences = version.sequences.clone();
        match outcome {
            Ok(lease) => {
                // One that nobody waits for yet is let go of, and stays on the device while there is room.
                if !sequences.is_empty() {
                    version.lease = Some((lease, Instant::now()));
                    self.versions.insert(uid.to_owned(), version);
                }
                (sequences, Ok(()))
            }
            Err(error) => (sequences, Err(error)),
        }
    }

    /// Forgets all; loads under way end by themselves.
    pub fn clear(&mut self) {
        self.versions.clear();
        self.prefetched.clear();
    }

    /// Versions that load.
    fn loads(&self) -> usize {
        self.versions.values().filter(|version| version.lease.is_none()).count()
    }

    fn load(&mut self, row: &Arc<VersionRow>, claim: Claim, sequences: Vec<u64>) {
        let Some(inbox) = self.inbox.upgrade() else { return };
        self.versions.insert(row.uid.clone(), Version { lease: None, sequences });
        let (hub, row) = (self.hub.clone(), row.clone());
        self.runtime.spawn(async move {
            let outcome = hub.load_claimed(&row, claim).await;
            // A loop that is gone wants no version.
            let _ = inbox.send(Message::Loaded(row.uid.clone(), outcome));
        });
    }
}
