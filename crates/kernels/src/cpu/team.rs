//! The threads that compute: the caller and its helpers, which wait awake between the regions of a step and asleep
//! between steps.
//!
//! A step has some hundred regions of a few microseconds, too short for a general work-stealing pool to wake up for.
//! Each thread has a share of a region's pieces, side by side and the same in every step, so that what it reads next
//! lies next to what it reads. Who is done takes pieces off the ends of others' shares, and a helper that comes when
//! nothing is left is not waited for, so a thread that the system takes away for a while delays a step by a piece at
//! most.

use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, Thread};

use super::simd::prefetch;

/// How often a helper looks for the next region before it goes to sleep: some 50 microseconds.
const SPINS: u32 = 2000;

/// How often the caller looks for its helpers' end before it lets others run meanwhile.
const PATIENCE: u32 = 20_000;

/// Most bytes that a waiting thread fetches: what its own cache can hold beside the rest.
const MAX_IDLE_BYTES: usize = 384 << 10;

/// Bytes that it fetches between two looks for the next region.
const IDLE_STEP: usize = 4 * 64;

type Region = dyn Fn(usize) + Sync + 'static;

/// The helpers that are inside a region, in the lower bits of a [`TeamState::door`].
const INSIDE: u64 = CLOSED - 1;

/// Set in a door once nobody may enter the region any more.
const CLOSED: u64 = 1 << 15;

/// The bits of a door below the region's number.
const NUMBER_SHIFT: u32 = 16;

/// What the threads share. The region may be read by who has entered it, until it has left.
#[derive(Debug)]
struct TeamState {
    /// The number of the region, counted from 1, whether it is closed, and the helpers inside: one word, so that nobody
    /// enters a region that has been closed meanwhile, nor the next one for this one.
    door: AtomicU64,
    region: UnsafeCell<Option<*const Region>>,
    panicked: AtomicBool,
    /// A slot a thread.
    slots: Box<[WorkerSlot]>,
}

// SAFETY: `region` is written by the caller alone, while the door is closed and no helper is inside, and read by helpers
// only after they have entered by the door that was opened after it (release, acquire).
unsafe impl Sync for TeamState {}
// SAFETY: the pointer is followed only within `Team::run`, which holds the borrow it was made of.
unsafe impl Send for TeamState {}

impl TeamState {
    /// Returns the number of the region.
    fn number(&self, order: Ordering) -> u64 {
        self.door.load(order) >> NUMBER_SHIFT
    }

    /// Enters the region that is open; gives its number, and false where it is closed by now.
    fn enter(&self) -> (u64, bool) {
        let mut door = self.door.load(Ordering::Acquire);
        while door & CLOSED == 0 {
            match self.door.compare_exchange_weak(door, door + 1, Ordering::Acquire, Ordering::Acquire) {
                Ok(_) => return (door >> NUMBER_SHIFT, true),
                Err(now) => door = now,
            }
        }
        (door >> NUMBER_SHIFT, false)
    }
}

/// What concerns one thread, on a line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct WorkerSlot {
    /// What nobody has begun of its share: the first piece in the upper half, the one after the last in the lower.
    share: AtomicU64,
    /// What it fetches while it waits, and its bytes. A mixture of two such is harmless: nothing is read.
    next: AtomicPtr<u8>,
    next_bytes: AtomicUsize,
}

impl WorkerSlot {
    fn set(&self, pieces: Range<usize>) {
        self.share.store((pieces.start as u64) << 32 | pieces.end as u64, Ordering::Relaxed);
    }

    /// Takes the first piece, or the last one.
    fn take(&self, first: bool) -> Option<usize> {
        let mut left = self.share.load(Ordering::Relaxed);
        loop {
            let (start, end) = (left >> 32, left & u64::from(u32::MAX));
            if start >= end {
                return None;
            }
            let (piece, rest) = if first { (start, (start + 1) << 32 | end) } else { (end - 1, left - 1) };
            match self.share.compare_exchange_weak(left, rest, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(piece as usize),
                Err(now) => left = now,
            }
        }
    }
}

#[derive(Debug)]
struct Helper {
    thread: Thread,
    asleep: Arc<AtomicBool>,
}

/// A caller with its helpers. Only one region runs at a time.
#[derive(Debug)]
pub struct Team {
    state: Arc<TeamState>,
    helpers: Vec<Helper>,
    turn: Mutex<()>,
}

static TEAM: OnceLock<Team> = OnceLock::new();

impl Team {
    /// The process's team: as many threads as rayon's pool has, which is the size that the device gave it. One of them
    /// is whoever calls.
    pub fn get() -> &'static Self {
        TEAM.get_or_init(|| Self::new(rayon::current_num_threads()))
    }

    fn new(threads: usize) -> Self {
        let state = Arc::new(TeamState {
            door: AtomicU64::new(CLOSED),
            region: UnsafeCell::new(None),
            panicked: AtomicBool::new(false),
            slots: (0..threads.max(1)).map(|_| WorkerSlot::default()).collect(),
        });
        // Where the system gives fewer threads, fewer compute.
        let helpers = (1..threads).filter_map(|worker| {
            let (state, asleep) = (Arc::clone(&state), Arc::new(AtomicBool::new(false)));
            let own = Arc::clone(&asleep);
            let builder = thread::Builder::new().name(format!("team-{worker}"));
            let thread = builder.spawn(move || worker_loop(&state, &own, worker)).ok()?.thread().clone();
            Some(Helper { thread, asleep })
        });
        Self { helpers: helpers.collect(), state, turn: Mutex::new(()) }
    }

    /// Returns how many threads compute, the caller's included.
    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `begin` while no region runs, then `f(worker)` on this thread as worker 0 and on every helper that comes
    /// before this one is done, and waits for those. Allocates nothing. Panics where one did.
    fn run(&self, begin: impl FnOnce(), f: &(dyn Fn(usize) + Sync)) {
        let state = &*self.state;
        // What it guards is whole between any two statements, also where a region has panicked.
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        begin();
        // SAFETY: the lifetime is taken off the reference; no helper follows it after this function, which lets none in
        // once it is done itself, and waits for those inside.
        let region: *const Region =
            unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const Region>(f) };
        // SAFETY: the region before is closed and no helper is inside, so nobody reads.
        unsafe { *state.region.get() = Some(region) };
        let number = state.number(Ordering::Relaxed) + 1;
        state.door.store(number << NUMBER_SHIFT, Ordering::SeqCst);
        for helper in &self.helpers {
            if helper.asleep.load(Ordering::SeqCst) {
                helper.thread.unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| f(0)));
        state.door.fetch_or(CLOSED, Ordering::Relaxed);
        let (mut looks, mut fetch) = (0, Fetch::new());
        while state.door.load(Ordering::Acquire) & INSIDE > 0 {
            if fetch.some(&state.slots[0]) {
                continue;
            }
            looks += 1;
            if looks < PATIENCE { std::hint::spin_loop() } else { thread::yield_now() }
        }
        let helper_panicked = state.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = own {
            std::panic::resume_unwind(panic);
        }
        assert!(!helper_panicked, "a kernel panicked on another thread");
    }

    /// Says what a thread will read soon: it fetches the beginning while it waits.
    pub fn fetch_when_idle(&self, worker: usize, bytes: &[u8]) {
        let slot = &self.state.slots[worker];
        slot.next_bytes.store(bytes.len().min(MAX_IDLE_BYTES), Ordering::Relaxed);
        slot.next.store(bytes.as_ptr().cast_mut(), Ordering::Relaxed);
    }

    /// The pieces of `count` that a thread begins with in [`Team::each`].
    pub fn share(&self, count: usize, worker: usize) -> Range<usize> {
        let threads = self.threads();
        count * worker / threads..count * (worker + 1) / threads
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
        assert!(u32::try_from(count).is_ok(), "a share counts in 32 bits");
        // Where the system gave fewer threads than were asked for, there are slots without one.
        let slots = &self.state.slots[..self.threads()];
        let begin = || slots.iter().enumerate().for_each(|(worker, slot)| slot.set(self.share(count, worker)));
        self.run(begin, &|worker| {
            while let Some(i) = slots[worker].take(true) {
                f(i);
            }
            for other in 1..slots.len() {
                while let Some(i) = slots[(worker + other) % slots.len()].take(false) {
                    f(i);
                }
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

/// What a waiting thread has fetched.
struct Fetch {
    of: *mut u8,
    done: usize,
}

impl Fetch {
    fn new() -> Self {
        Self { of: ptr::null_mut(), done: 0 }
    }

    /// Fetches some more of what is next, if there is more.
    fn some(&mut self, slot: &WorkerSlot) -> bool {
        let next = slot.next.load(Ordering::Relaxed);
        if next != self.of {
            *self = Self { of: next, done: 0 };
        }
        if self.done >= slot.next_bytes.load(Ordering::Relaxed) {
            return false;
        }
        for at in (self.done..self.done + IDLE_STEP).step_by(64) {
            prefetch(next.wrapping_add(at));
        }
        self.done += IDLE_STEP;
        true
    }
}

/// A helper's life: it ends with the process.
fn worker_loop(state: &TeamState, asleep: &AtomicBool, worker: usize) {
    let (mut seen, mut fetch) = (0, Fetch::new());
    loop {
        let mut spins = 0;
        while state.number(Ordering::Acquire) == seen {
            if fetch.some(&state.slots[worker]) {
                continue;
            }
            if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
                continue;
            }
            // Said before the number is looked at for the last time: either the caller sees it and wakes us, or we see
            // the number.
            asleep.store(true, Ordering::SeqCst);
            if state.number(Ordering::SeqCst) == seen {
                thread::park();
            }
            asleep.store(false, Ordering::SeqCst);
        }
        let (number, entered) = state.enter();
        seen = number;
        if !entered {
            continue;
        }
        // SAFETY: the door was opened after the region was written, and the caller waits until we have left before it
        // lets go of it.
        let region = unsafe { (*state.region.get()).map(|region| &*region) };
        if let Some(region) = region
            && catch_unwind(AssertUnwindSafe(|| region(worker))).is_err()
        {
            state.panicked.store(true, Ordering::Relaxed);
        }
        state.door.fetch_sub(1, Ordering::Release);
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

    /// The first piece waits for all others, those of its own thread's share too.
    #[test]
    fn who_is_done_takes_over_others_pieces() {
        let (team, done) = (Team::new(2), AtomicUsize::new(0));
        team.each(10, |i| {
            while i == 0 && done.load(Ordering::Relaxed) < 9 {
                thread::yield_now();
            }
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.load(Ordering::Relaxed), 10);
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

    /// A helper that sleeps and is not woken stands for one that the system has taken away.
    #[test]
    fn a_helper_that_does_not_come_is_not_waited_for() {
        let team = Team::new(2);
        let helper = &team.helpers[0];
        while !helper.asleep.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        helper.asleep.store(false, Ordering::SeqCst);
        let done = AtomicUsize::new(0);
        let count = |_| {
            done.fetch_add(1, Ordering::Relaxed);
        };
        team.each(10, count);
        assert_eq!(done.load(Ordering::Relaxed), 10);
        // It comes to a region that is closed, and then to one that is not.
        helper.thread.unpark();
        let (both, met) = (AtomicUsize::new(0), AtomicUsize::new(0));
        team.each(2, |_| {
            both.fetch_add(1, Ordering::Relaxed);
            while both.load(Ordering::Relaxed) < 2 {
                helper.thread.unpark();
                thread::yield_now();
            }
            met.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(met.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(3);
        // No thread takes a second piece before each has one, so that each panics once.
        let on_all = |bad: Option<usize>| {
            let begun = AtomicUsize::new(0);
            team.each(3, |piece| {
                begun.fetch_add(1, Ordering::Relaxed);
                while begun.load(Ordering::Relaxed) < 3 {
                    thread::yield_now();
                }
                assert!(bad != Some(piece), "planted");
            });
        };
        for bad in 0..3 {
            assert!(catch_unwind(AssertUnwindSafe(|| on_all(Some(bad)))).is_err());
        }
        on_all(None);
    }
}
