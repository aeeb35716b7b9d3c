//! The arbiter of compute: who computes now, engine steps or training.
//!
//! Where the model serves on the CPU, serving and training share the cores. The engine takes a [`ServePermit`] for each step; training
//! holds a [`TrainPermit`] and offers to give way at every frozen linear layer. Training yields whenever a step is waiting, except that it
//! is owed a share of the compute (`train_share_percent`), so that a busy server does not starve it. The share holds for long steps too:
//! after a step of 180 ms and at a share of 40 %, training has 120 ms.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use crate::sync::lock;

/// Compute that one side may be ahead of the other where its turns are short: steps wait at most about this long for training. Where one
/// engine step, or one piece of training, takes longer, what that one is worth counts.
const MAX_DEFICIT: f64 = 0.02;

/// How much longer than it is owed training may keep a waiting step before the log says so.
const OVERDUE: Duration = Duration::from_secs(1);

/// Who is owed compute. Seconds.
#[derive(Debug)]
struct Share {
    /// What training is owed for each second of serving.
    per_second: f64,
    /// What training is owed now; below 0, what it owes.
    deficit: f64,
}

impl Share {
    fn new(train_share: f64) -> Self {
        let share = train_share.clamp(0.0, 0.95);
        Self { per_second: share / (1.0 - share), deficit: 0.0 }
    }

    /// Counts an engine step. Training that nobody asks for saves up no more than one step is worth.
    fn served(&mut self, seconds: f64) {
        let worth = seconds * self.per_second;
        self.deficit = (self.deficit + worth).min(worth.max(MAX_DEFICIT));
    }

    /// Counts training, of which `contended` while a step waited. What it takes while nobody waits is not held against it for long.
    fn trained(&mut self, seconds: f64, contended: f64) {
        let most = -contended.max(MAX_DEFICIT);
        self.deficit = (self.deficit - seconds).max(most.min(self.deficit));
    }

    /// Returns whether training goes before a waiting step, having used `used` since the deficit was last counted.
    fn training_is_owed(&self, used: f64) -> bool {
        self.deficit > used
    }
}

#[derive(Debug)]
struct State {
    busy: bool,
    serve_waiting: usize,
    /// Since when an engine step waits; `None` where none does.
    contended_since: Option<Instant>,
    /// Trainers take turns in the order in which they asked: the number of the next one to ask, and of the next one to run.
    next_turn: u64,
    turn: u64,
    share: Share,
    /// Waits that the log has called too long.
    overdue: u64,
}

impl State {
    fn train_waiting(&self) -> bool {
        self.next_turn > self.turn
    }
}

/// Hands out the compute, to one holder at a time.
#[derive(Debug)]
pub struct Arbiter {
    state: Mutex<State>,
    freed: Condvar,
    /// Tests bring a clock of their own.
    now: fn() -> Instant,
    overdue: Duration,
}

impl Arbiter {
    /// `train_share`: the part of the compute, in [0, 1), that training gets while requests are running.
    pub fn new(train_share: f64) -> Arc<Self> {
        Self::with_clock(train_share, Instant::now, OVERDUE)
    }

    fn with_clock(train_share: f64, now: fn() -> Instant, overdue: Duration) -> Arc<Self> {
        let share = Share::new(train_share);
        let state =
            State { busy: false, serve_waiting: 0, contended_since: None, next_turn: 0, turn: 0, share, overdue: 0 };
        Arc::new(Self { state: Mutex::new(state), freed: Condvar::new(), now, overdue })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Waits for the compute, ahead of training that has had its share. Warns where training keeps it for too long.
    pub fn serve(&self) -> ServePermit<'_> {
        let mut state = self.lock();
        state.serve_waiting += 1;
        state.contended_since.get_or_insert_with(self.now);
        let asked = (self.now)();
        // What training may take before this step without being late.
        let mut patience = self.overdue + Duration::from_secs_f64(state.share.deficit.max(0.0));
        while state.busy || (state.train_waiting() && state.share.training_is_owed(0.0)) {
            let (woken, waited) =
                self.freed.wait_timeout(state, patience).unwrap_or_else(|poisoned| poisoned.into_inner());
            state = woken;
            if waited.timed_out() && state.busy {
                state.overdue += 1;
                patience *= 2;
                let (waited, times) = ((self.now)() - asked, state.overdue);
                tracing::warn!(
                    ?waited,
                    times,
                    "an engine step waits for the compute, which its holder does not give back"
                );
            }
        }
        state.serve_waiting -= 1;
        if state.serve_waiting == 0 {
            state.contended_since = None;
        }
        state.busy = true;
        ServePermit { arbiter: self, since: (self.now)() }
    }

    /// Waits for the compute, behind serving.
    pub fn train(self: &Arc<Self>) -> TrainPermit {
        self.wait_to_train(self.lock());
        let since = Mutex::new(Some((self.now)()));
        TrainPermit { turn: Arc::new(Turn { arbiter: self.clone(), since }) }
    }

    /// Asks for a turn and waits for it.
    fn wait_to_train(&self, mut state: MutexGuard<'_, State>) {
        let turn = state.next_turn;
        state.next_turn += 1;
        while state.busy || state.turn < turn || (state.serve_waiting > 0 && !state.share.training_is_owed(0.0)) {
            state = self.freed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        state.turn += 1;
        state.busy = true;
    }

    /// Takes back what training has had since `since`. The caller still holds the state: it may ask for another turn before anybody takes this
    /// one, so that training never looks as if it wanted none.
    fn release_training(&self, since: Instant) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        let now = (self.now)();
        let contended = state.contended_since.map(|waiting| now - waiting.max(since)).unwrap_or_default();
        state.share.trained((now - since).as_secs_f64(), contended.as_secs_f64());
        state.busy = false;
        self.freed.notify_all();
        state
    }
}

/// Whom serving asks for what it computes on, and whom training asks. Training computes on the CPU, whatever serves.
#[derive(Debug, Clone)]
pub struct Compute {
    /// For engine steps, and for the serving side of the parity gate.
    pub serving: Arc<Arbiter>,
    /// For training, and for the training side of the parity gate.
    pub training: Arc<Arbiter>,
}

impl Compute {
    /// Returns one arbiter for both sides where they share the cores, and two where a GPU serves: neither waits for the other then.
    pub fn new(serves_on_cpu: bool, train_share: f64) -> Self {
        let serving = Arbiter::new(train_share);
        let training = if serves_on_cpu { serving.clone() } else { Arbiter::new(train_share) };
        Self { serving, training }
    }
}

/// The right to run one engine step.
#[derive(Debug)]
pub struct ServePermit<'a> {
    arbiter: &'a Arbiter,
    since: Instant,
}

impl Drop for ServePermit<'_> {
    fn drop(&mut self) {
        let mut state = self.arbiter.lock();
        let took = (self.arbiter.now)() - self.since;
        state.share.served(took.as_secs_f64());
        state.busy = false;
        self.arbiter.freed.notify_all();
    }
}

/// The right to train until it is dropped; given up and taken back at its [`YieldPoint`]s.
#[derive(Debug)]
pub struct TrainPermit {
    turn: Arc<Turn>,
}

/// One trainer's turn at the compute.
#[derive(Debug)]
struct Turn {
    arbiter: Arc<Arbiter>,
    /// Since when it has had the compute; `None` once it has been given back for good.
    since: Mutex<Option<Instant>>,
}

impl Turn {
    fn since(&self) -> MutexGuard<'_, Option<Instant>> {
        lock(&self.since)
    }

    fn yield_to_serving(&self) {
        let mut since = self.since();
        let Some(began) = *since else { return };
        let arbiter = &self.arbiter;
        let used = ((arbiter.now)() - began).as_secs_f64();
        let wanted = {
            let state = arbiter.lock();
            state.train_waiting() || state.serve_waiting > 0 && !state.share.training_is_owed(used)
        };
        if wanted {
            arbiter.wait_to_train(arbiter.release_training(began));
            *since = Some((arbiter.now)());
        }
    }
}

impl TrainPermit {
    /// Lets waiting engine steps run, unless training is owed the time, and other trainers. Call it at least every few milliseconds of
    /// work.
    pub fn yield_to_serving(&self) {
        self.turn.yield_to_serving();
    }

    /// Returns what may be kept in a graph of tensors: it gives way but holds nothing.
    pub fn yield_point(&self) -> YieldPoint {
        YieldPoint(Arc::downgrade(&self.turn))
    }
}

impl Drop for TrainPermit {
    fn drop(&mut self) {
        // Here and not in `Turn`, which a yield point may keep alive for a moment.
        if let Some(began) = self.turn.since().take() {
            drop(self.turn.arbiter.release_training(began));
        }
    }
}

/// Gives way for the [`TrainPermit`] that it came from, and does nothing once that is gone: a tensor that outlives its pass keeps no compute.
#[derive(Debug, Clone, Default)]
pub struct YieldPoint(Weak<Turn>);

impl YieldPoint {
    /// As [`TrainPermit::yield_to_serving`].
    pub fn yield_to_serving(&self) {
        if let Some(turn) = self.0.upgrade() {
            turn.yield_to_serving();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    #[test]
    fn training_does_not_wait_for_a_gpu() {
        let apart = Compute::new(false, 0.4);
        let _step = apart.serving.serve();
        drop(apart.training.train());
        let shared = Compute::new(true, 0.4);
        assert!(Arc::ptr_eq(&shared.serving, &shared.training));
    }

    /// Both sides always have work: the share of training over ten minutes of engine steps and of pieces so long.
    fn simulated(train_share: f64, step: f64, piece: f64) -> f64 {
        let mut share = Share::new(train_share);
        let (mut served, mut trained) = (0.0, 0.0);
        while served + trained < 600.0 {
            let mut used = 0.0;
            while share.training_is_owed(used) {
                used += piece;
            }
            share.trained(used, used);
            share.served(step);
            (served, trained) = (served + step, trained + used);
        }
        trained / (served + trained)
    }

    #[test]
    fn training_gets_its_share_however_long_steps_and_pieces_take() {
        for train_share in [0.0, 0.1, 0.4, 0.8] {
            for step in [0.001, 0.02, 0.1, 0.18, 2.0] {
                for piece in [0.0005, 0.005, 0.05, 0.4] {
                    let share = simulated(train_share, step, piece);
                    assert!(
                        (share - train_share).abs() < 0.01,
                        "{share} of {train_share}: steps {step}, pieces {piece}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_nobody_waited_for_is_soon_forgotten() {
        let mut share = Share::new(0.4);
        share.trained(3600.0, 0.0);
        assert_eq!(share.deficit, -MAX_DEFICIT);
        // Nor does training that nobody asks for save up more than a step is worth.
        (0..1000).for_each(|_| share.served(0.3));
        assert!((share.deficit - 0.2).abs() < 1e-9, "{share:?}");
        (0..1000).for_each(|_| share.served(0.001));
        assert_eq!(share.deficit, MAX_DEFICIT);
    }

    /// Simulated nanoseconds.
    static CLOCK: AtomicU64 = AtomicU64::new(0);

    fn simulated_now() -> Instant {
        static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        *START.get_or_init(Instant::now) + Duration::from_nanos(CLOCK.load(Ordering::SeqCst))
    }

    fn pass(millis: u64) {
        CLOCK.fetch_add(millis * 1_000_000, Ordering::SeqCst);
    }

    /// The arbiter itself: one thread with a long step always ready, one that trains, and a clock that only a holder moves.
    #[test]
    fn long_steps_leave_training_its_share() {
        const STEP: u64 = 180;
        let arbiter = Arbiter::with_clock(0.4, simulated_now, OVERDUE);
        let (steps, done) = (AtomicU64::new(0), AtomicBool::new(false));
        let mut trained = 0;
        std::thread::scope(|scope| {
            let permit = arbiter.train();
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    let _permit = arbiter.serve();
                    pass(STEP);
                    steps.fetch_add(1, Ordering::SeqCst);
                }
            });
            while steps.load(Ordering::SeqCst) < 300 {
                while arbiter.lock().serve_waiting == 0 {
                    std::thread::yield_now();
                }
                pass(5);
                trained += 5;
                permit.yield_to_serving();
            }
            done.store(true, Ordering::SeqCst);
            drop(permit);
        });
        let served = STEP * steps.load(Ordering::SeqCst);
        let share = trained as f64 / (trained + served) as f64;
        assert!((share - 0.4).abs() < 0.02, "{share}");
    }

    #[test]
    fn a_yield_point_holds_no_compute() {
        let arbiter = Arbiter::new(0.4);
        let permit = arbiter.train();
        let kept = permit.yield_point();
        kept.yield_to_serving();
        assert!(arbiter.lock().busy);
        drop(permit);
        assert!(!arbiter.lock().busy);
        drop(arbiter.serve());
        kept.yield_to_serving();
        assert!(!arbiter.lock().busy && !arbiter.lock().train_waiting());
    }

    /// A permit that is not given back is said in the log, and again ever more rarely.
    #[test]
    fn a_step_that_waits_too_long_is_noticed() {
        let arbiter = Arbiter::with_clock(0.0, Instant::now, Duration::from_millis(1));
        let permit = arbiter.train();
        std::thread::scope(|scope| {
            scope.spawn(|| drop(arbiter.serve()));
            while arbiter.lock().overdue < 3 {
                std::thread::yield_now();
            }
            drop(permit);
        });
        assert!(!arbiter.lock().busy);
    }

    /// A short training (the gate's) does not wait for the end of a long one that never pauses.
    #[test]
    fn trainers_take_turns() {
        let arbiter = Arbiter::new(0.4);
        let done = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let long = arbiter.train();
            for _ in 0..3 {
                scope.spawn(|| {
                    let short = arbiter.train();
                    (0..5).for_each(|_| short.yield_to_serving());
                    done.fetch_add(1, Ordering::Relaxed);
                });
            }
            while done.load(Ordering::Relaxed) < 3 {
                std::thread::sleep(Duration::from_micros(200));
                long.yield_to_serving();
            }
        });
        assert!(!arbiter.lock().busy && !arbiter.lock().train_waiting());
    }

    /// While training holds the compute and gives way, steps run; and training goes on between them.
    #[test]
    fn both_make_progress() {
        let arbiter = Arbiter::new(0.4);
        let steps = AtomicU64::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..50 {
                    let _permit = arbiter.serve();
                    std::thread::sleep(Duration::from_millis(1));
                    steps.fetch_add(1, Ordering::Relaxed);
                }
            });
            let permit = arbiter.train();
            let mut pieces = 0;
            while steps.load(Ordering::Relaxed) < 50 {
                std::thread::sleep(Duration::from_micros(200));
                permit.yield_to_serving();
                pieces += 1;
            }
            assert!(pieces > 5, "training starved: {pieces} pieces");
        });
    }
}
