//! The adapter versions of the sequences that come next. Sequences that wait hold none; a version is leased when a sequence starts, and
//! loaded before where it is not on the device. The loop itself never waits for a load: it is told when one has ended.

use std::collections::HashMap;
use std::sync::{Arc, Weak, mpsc};

use tokio::runtime::Handle;

use crate::engine::run::Message;
use crate::error::Result;
use crate::hub::{Attempt, Claim, Hub, Lease, VersionRow};

/// Versions loaded or kept at once for sequences that have not started: those that start next, and a few whose files are slow.
const MOST_WARM: usize = 8;

/// Versions that are loaded, or were and wait for a sequence to start.
#[derive(Debug)]
pub struct Warm {
    hub: Arc<Hub>,
    runtime: Handle,
    /// Weak, so that the loop ends when all handles are gone.
    inbox: Weak<mpsc::Sender<Message>>,
    versions: HashMap<String, State>,
    /// Sequences that wait for each version, by its uid.
    wanted: HashMap<String, usize>,
}

#[derive(Debug)]
enum State {
    /// The sequences that were set aside for it.
    Loading(Vec<u64>),
    /// It stays on the device until the first sequence has it.
    Loaded(Lease),
    /// It could not be loaded ahead of its time; the sequence whose turn it is tries again.
    Failed,
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
        Self { hub, runtime, inbox, versions: HashMap::new(), wanted: HashMap::new() }
    }

    /// One more sequence waits for a version.
    pub fn want(&mut self, row: &VersionRow) {
        *self.wanted.entry(row.uid.clone()).or_default() += 1;
    }

    /// One of them waits no more: it has started, or is gone.
    pub fn unwant(&mut self, row: &VersionRow) {
        let Some(count) = self.wanted.get_mut(&row.uid) else { return };
        *count -= 1;
        if *count == 0 {
            self.wanted.remove(&row.uid);
            if !matches!(self.versions.get(&row.uid), Some(State::Loading(_))) {
                self.versions.remove(&row.uid);
            }
        }
    }

    /// Leases a version for a sequence whose turn it is, or begins to load it.
    pub fn lease(&mut self, id: u64, row: &Arc<VersionRow>) -> Wanted {
        match self.versions.get_mut(&row.uid) {
            Some(State::Loading(sequences)) => {
                sequences.push(id);
                return Wanted::Loading;
            }
            Some(State::Loaded(lease)) => {
                let lease = lease.clone();
                self.versions.remove(&row.uid);
                return Wanted::Lease(lease);
            }
            Some(State::Failed) | None => {}
        }
        self.versions.remove(&row.uid);
        if self.versions.len() >= MOST_WARM && !self.hub.is_resident(&row.uid) && !self.let_one_go() {
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

    /// Loads a version that will be wanted soon, where there is room for one more.
    pub fn prefetch(&mut self, row: &Arc<VersionRow>) {
        if self.versions.len() >= MOST_WARM || self.versions.contains_key(&row.uid) || self.hub.is_resident(&row.uid) {
            return;
        }
        if let Attempt::Cold(claim) = self.hub.try_lease(row) {
            self.load(row, claim, Vec::new());
        }
    }

    /// Takes the end of a load; gives the sequences that were set aside for it, and its error.
    pub fn loaded(&mut self, uid: &str, outcome: Result<Lease>) -> (Vec<u64>, Result<()>) {
        let Some(State::Loading(sequences)) = self.versions.remove(uid) else { return (Vec::new(), Ok(())) };
        let (state, outcome) = match outcome {
            Ok(lease) => (State::Loaded(lease), Ok(())),
            Err(error) => (State::Failed, Err(error)),
        };
        if self.wanted.contains_key(uid) {
            self.versions.insert(uid.to_owned(), state);
        }
        (sequences, outcome)
    }

    /// Forgets all; loads under way end by themselves.
    pub fn clear(&mut self) {
        self.versions.clear();
        self.wanted.clear();
    }

    /// A version that waits makes room for one whose turn has come. It stays on the device while there is room there.
    fn let_one_go(&mut self) -> bool {
        let idle = self.versions.iter().find(|(_, state)| !matches!(state, State::Loading(_)));
        let Some(uid) = idle.map(|(uid, _)| uid.clone()) else { return false };
        self.versions.remove(&uid).is_some()
    }

    fn load(&mut self, row: &Arc<VersionRow>, claim: Claim, sequences: Vec<u64>) {
        let Some(inbox) = self.inbox.upgrade() else { return };
        self.versions.insert(row.uid.clone(), State::Loading(sequences));
        let (hub, row) = (self.hub.clone(), row.clone());
        self.runtime.spawn(async move {
            let outcome = hub.load_claimed(&row, claim).await;
            // A loop that is gone wants no version.
            let _ = inbox.send(Message::Loaded(row.uid.clone(), outcome));
        });
    }
}
