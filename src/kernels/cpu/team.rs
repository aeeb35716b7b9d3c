//! The threads that compute: the caller and its helpers, which wait awake between the regions of a step and asleep between steps.
//!
//! A step has some hundred regions of a few microseconds, too short for a general work-stealing pool to wake up for. Work is claimed
//! piece by piece from one counter, so a thread that the system takes away for a while delays a step by a piece at most.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, Thread};

use super::simd::prefetch;

/// How often a helper looks for the next region before it goes to sleep: some 50 microseconds.
const SPINS: u32 = 2000;

/// How often the caller looks for its helpers' end before it lets others run meanwhile.
const PATIENCE: u32 = 20_000;

/// Most bytes that a waiting helper fetches: what its own cache can hold beside the rest.
const MAX_IDLE_BYTES: usize = 384 << 10;

/// Bytes that it fetches between two looks for the next region.
const IDLE_STEP: usize = 4 * 64;

type Region = dyn Fn(usize) + Sync + 'static;

/// What the threads share. `epoch` counts regions; the region may be read between its epoch and the last of `busy`.
#[derive(Debug)]
struct Board {
    epoch: AtomicU64,
    region: UnsafeCell<Option<*const Region>>,
    /// Helpers that are not done with the region.
    busy: AtomicUsize,
    panicked: AtomicBool,
    /// What helpers fetch while they wait, and its bytes. A mixture of two such is harmless: nothing is read.
    next: AtomicPtr<u8>,
    next_bytes: AtomicUsize,
}

// SAFETY: `region` is written by the caller alone, while no helper is busy, and read by helpers only after they have seen the epoch that
// was set after it (release, acquire).
unsafe impl Sync for Board {}
// SAFETY: the pointer is followed only within `Team::run`, which holds the borrow it was made of.
unsafe impl Send for Board {}

#[derive(Debug)]
struct Helper {
    thread: Thread,
    asleep: Arc<AtomicBool>,
}

/// A caller with its helpers. Only one region runs at a time.
#[derive(Debug)]
pub struct Team {
    board: Arc<Board>,
    helpers: Vec<Helper>,
    turn: Mutex<()>,
}

static TEAM: OnceLock<Team> = OnceLock::new();

impl Team {
    /// The process's team: as many threads as rayon's pool has, which is the size that the device gave it. One of them is whoever calls.
    pub fn get() -> &'static Self {
        TEAM.get_or_init(|| Self::new(rayon::current_num_threads()))
    }

    fn new(threads: usize) -> Self {
        let board = Arc::new(Board {
            epoch: AtomicU64::new(0),
            region: UnsafeCell::new(None),
            busy: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            next: AtomicPtr::new(ptr::null_mut()),
            next_bytes: AtomicUsize::new(0),
        });
        // Where the system gives fewer threads, fewer compute.
        let helpers = (1..threads).filter_map(|worker| {
            let (board, asleep) = (Arc::clone(&board), Arc::new(AtomicBool::new(false)));
            let own = Arc::clone(&asleep);
            let builder = thread::Builder::new().name(format!("team-{worker}"));
            let thread = builder.spawn(move || help(&board, &own, worker)).ok()?.thread().clone();
            Some(Helper { thread, asleep })
        });
        Self { helpers: helpers.collect(), board, turn: Mutex::new(()) }
    }

    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Runs `f(worker)` on every thread, this one as worker 0, and waits for all. Allocates nothing. Panics where one did.
    pub fn run(&self, f: &(dyn Fn(usize) + Sync)) {
        let board = &*self.board;
        let _turn = self.turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // SAFETY: the lifetime is taken off the reference; no helper follows it after this function, which waits for all of them.
        let region: *const Region =
            unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const Region>(f) };
        // SAFETY: no helper is busy, so nobody reads.
        unsafe { *board.region.get() = Some(region) };
        board.busy.store(self.helpers.len(), Ordering::Relaxed);
        board.epoch.fetch_add(1, Ordering::SeqCst);
        for helper in &self.helpers {
            if helper.asleep.load(Ordering::SeqCst) {
                helper.thread.unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| f(0)));
        let mut looks = 0;
        while board.busy.load(Ordering::Acquire) > 0 {
            looks += 1;
            if looks < PATIENCE { std::hint::spin_loop() } else { thread::yield_now() }
        }
        let helper_panicked = board.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = own {
            std::panic::resume_unwind(panic);
        }
        assert!(!helper_panicked, "a kernel panicked on another thread");
    }

    /// Says what will be read soon: helpers that wait for the next region fetch its beginning meanwhile.
    pub fn fetch_when_idle(&self, bytes: &[u8]) {
        self.board.next_bytes.store(bytes.len().min(MAX_IDLE_BYTES), Ordering::Relaxed);
        self.board.next.store(bytes.as_ptr().cast_mut(), Ordering::Relaxed);
    }

    /// Runs `f(i, item)` once for each item, on whichever thread is free.
    pub fn each_mut<T: Send>(&self, items: &mut [T], f: impl Fn(usize, &mut T) + Sync) {
        let (count, items) = (items.len(), Items(items.as_mut_ptr()));
        // SAFETY: each number is given out once.
        self.each(count, |i| f(i, unsafe { items.get(i) }));
    }

    /// Runs `f` once for each of `0..count`, on whichever thread is free.
    pub fn each(&self, count: usize, f: impl Fn(usize) + Sync) {
        if count <= 1 || self.helpers.is_empty() {
            return (0..count).for_each(f);
        }
        let next = AtomicUsize::new(0);
        self.run(&|_| {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= count {
                    break;
                }
                f(i);
            }
        });
    }
}

/// A pointer to items of which each thread takes its own.
struct Items<T>(*mut T);

// SAFETY: `each_mut` hands every item to one thread.
unsafe impl<T: Send> Send for Items<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Items<T> {}

impl<T> Items<T> {
    /// # Safety
    /// `i` lies within the items, and nobody else has it.
    #[expect(clippy::mut_from_ref, reason = "the caller vouches that nobody else has it")]
    unsafe fn get(&self, i: usize) -> &mut T {
        // SAFETY: the caller vouches for it.
        unsafe { &mut *self.0.add(i) }
    }
}

/// A helper's life: it ends with the process.
fn help(board: &Board, asleep: &AtomicBool, worker: usize) {
    let mut seen = 0;
    let (mut fetching, mut fetched) = (ptr::null_mut(), 0);
    loop {
        let mut spins = 0;
        while board.epoch.load(Ordering::Acquire) == seen {
            let next = board.next.load(Ordering::Relaxed);
            if next != fetching {
                (fetching, fetched) = (next, 0);
            }
            if fetched < board.next_bytes.load(Ordering::Relaxed) {
                for at in (fetched..fetched + IDLE_STEP).step_by(64) {
                    prefetch(next.wrapping_add(at));
                }
                fetched += IDLE_STEP;
                continue;
            }
            if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
                continue;
            }
            // Said before the epoch is looked at for the last time: either the caller sees it and wakes us, or we see the epoch.
            asleep.store(true, Ordering::SeqCst);
            if board.epoch.load(Ordering::SeqCst) == seen {
                thread::park();
            }
            asleep.store(false, Ordering::SeqCst);
        }
        seen += 1;
        // SAFETY: the epoch is set after the region, and the caller waits until we are no longer busy before it lets go of it.
        let region = unsafe { (*board.region.get()).map(|region| &*region) };
        if let Some(region) = region
            && catch_unwind(AssertUnwindSafe(|| region(worker))).is_err()
        {
            board.panicked.store(true, Ordering::Relaxed);
        }
        board.busy.fetch_sub(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_piece_is_done_once() {
        let team = Team::new(3);
        for count in [0, 1, 2, 5, 1000] {
            let done: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            team.each(count, |i| {
                done[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(done.iter().all(|n| n.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn every_item_has_one_visitor() {
        let mut items = vec![1; 100];
        Team::new(3).each_mut(&mut items, |i, item| *item += i);
        assert!(items.iter().enumerate().all(|(i, item)| *item == i + 1));
    }

    #[test]
    fn sleepers_wake_and_callers_take_turns() {
        let team = Team::new(2);
        let sum = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        team.each(10, |i| {
                            sum.fetch_add(i, Ordering::Relaxed);
                        });
                        thread::sleep(std::time::Duration::from_millis(1));
                    }
                });
            }
        });
        assert_eq!(sum.load(Ordering::Relaxed), 3 * 20 * 45);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(3);
        for bad in 0..3 {
            let run = || team.run(&|worker| assert!(worker != bad, "planted"));
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        }
        let seen = AtomicUsize::new(0);
        team.run(&|_| {
            seen.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(seen.load(Ordering::Relaxed), 3);
    }
}
