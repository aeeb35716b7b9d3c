//! The device, the compute pool, and the one arbiter of compute.
//!
//! Serving and training share the cores. The engine takes a [`ServePermit`] for each step; training holds a [`TrainPermit`] and
//! offers to give way at every frozen linear layer. Training yields whenever a step is waiting, except that it is owed a share of
//! the compute (`train_share_percent`), so that a busy server does not starve it.

use std::str::FromStr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use candle_core::Device;

use crate::error::{Error, Result};

/// Where the model serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceSpec {
    /// A GPU where the build and the machine have one, else the CPU.
    Auto,
    Cpu,
    Cuda(usize),
}

impl FromStr for DeviceSpec {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let bad = || Error::invalid("device", format!("{text:?} is none of auto, cpu, cuda:0, cuda:1, ..."));
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            _ => text.strip_prefix("cuda:").and_then(|n| n.parse().ok()).map(Self::Cuda).ok_or_else(bad),
        }
    }
}

impl DeviceSpec {
    /// The device to serve on, or an error that says what is missing.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(ordinal) => open_cuda(ordinal).map_err(|why| {
                Error::precondition("DEVICE_UNAVAILABLE", format!("cuda:{ordinal}"), format!("{why}, or --device cpu"))
            }),
            Self::Auto => Ok(open_cuda(0).unwrap_or_else(|why| {
                tracing::debug!(why, "serving on the CPU");
                Device::Cpu
            })),
        }
    }
}

/// Opens a GPU; else says what to do about it.
#[cfg(feature = "cuda")]
fn open_cuda(ordinal: usize) -> Result<Device, String> {
    // The driver and its libraries are looked for now, and where one is missing the lookup panics: that is no fault to be shown.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    // With a stream of its own: all threads then submit to the same one, in the order in which the arbiter lets them.
    let opened = std::panic::catch_unwind(|| Device::new_cuda_with_stream(ordinal));
    std::panic::set_hook(hook);
    match opened {
        Ok(Ok(device)) => Ok(device),
        Ok(Err(e)) => Err(format!("it cannot be opened ({e}); see what nvidia-smi says, take another one")),
        Err(_) => {
            Err("the NVIDIA driver or a CUDA library cannot be loaded; set LD_LIBRARY_PATH to where they are"
                .to_owned())
        }
    }
}

/// As above, in a build that knows no GPU.
#[cfg(not(feature = "cuda"))]
fn open_cuda(_ordinal: usize) -> Result<Device, String> {
    Err("this build has no CUDA; take one that was built with --features cuda".to_owned())
}

/// Makes the compute pool of `threads` workers: rayon's global pool, which candle's matmul uses too. The first call wins.
pub fn init_pool(threads: usize) {
    // An earlier call (another server in the same test process) has made the pool already; both share it.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("compute-{i}")).build_global();
}

/// Longest time that training may be owed: how long a step waits at most for it, give or take one operation.
const MAX_CREDIT: Duration = Duration::from_millis(20);

#[derive(Debug, Default)]
struct State {
    busy: bool,
    serve_waiting: usize,
    /// Trainers take turns in the order in which they asked: the number of the next one to ask, and of the next one to run.
    next_turn: u64,
    turn: u64,
    /// Compute that training is owed; serving adds to it, training's own use takes from it. Seconds.
    credit: f64,
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
    /// Seconds that training is owed for each second of serving.
    owed_per_second: f64,
}

impl Arbiter {
    /// `train_share`: the part of the compute, in [0, 1), that training gets while requests are running.
    pub fn new(train_share: f64) -> Arc<Self> {
        let share = train_share.clamp(0.0, 0.95);
        Arc::new(Self { state: Mutex::default(), freed: Condvar::new(), owed_per_second: share / (1.0 - share) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Waits for the compute, ahead of training that has had its share.
    pub fn serve(&self) -> ServePermit<'_> {
        let mut state = self.lock();
        state.serve_waiting += 1;
        while state.busy || (state.train_waiting() && state.credit > 0.0) {
            state = self.freed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        state.serve_waiting -= 1;
        state.busy = true;
        ServePermit { arbiter: self, since: Instant::now() }
    }

    /// Waits for the compute, behind serving.
    pub fn train(self: &Arc<Self>) -> TrainPermit {
        self.take_for_training();
        TrainPermit { arbiter: self.clone(), since: Mutex::new(Instant::now()) }
    }

    fn take_for_training(&self) {
        let mut state = self.lock();
        let turn = state.next_turn;
        state.next_turn += 1;
        while state.busy || state.turn < turn || (state.serve_waiting > 0 && state.credit <= 0.0) {
            state = self.freed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        state.turn += 1;
        state.busy = true;
    }

    fn release(&self, credit: f64) {
        let mut state = self.lock();
        state.busy = false;
        state.credit = (state.credit + credit).clamp(-MAX_CREDIT.as_secs_f64(), MAX_CREDIT.as_secs_f64());
        drop(state);
        self.freed.notify_all();
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
        self.arbiter.release(self.since.elapsed().as_secs_f64() * self.arbiter.owed_per_second);
    }
}

/// The right to train, given up and taken back in [`TrainPermit::give_way`].
#[derive(Debug)]
pub struct TrainPermit {
    arbiter: Arc<Arbiter>,
    since: Mutex<Instant>,
}

impl TrainPermit {
    fn used(&self) -> f64 {
        self.since.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).elapsed().as_secs_f64()
    }

    /// Lets waiting engine steps run, unless training is owed the time, and other trainers. Call it at least every few milliseconds of
    /// work.
    pub fn give_way(&self) {
        let wanted = {
            let state = self.arbiter.lock();
            state.train_waiting() || state.serve_waiting > 0 && state.credit <= self.used()
        };
        if wanted {
            self.arbiter.release(-self.used());
            self.arbiter.take_for_training();
            *self.since.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Instant::now();
        }
    }
}

impl Drop for TrainPermit {
    fn drop(&mut self) {
        self.arbiter.release(-self.used());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn specs_parse() {
        assert_eq!("cuda:1".parse::<DeviceSpec>().unwrap(), DeviceSpec::Cuda(1));
        assert!("cuda".parse::<DeviceSpec>().is_err());
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
                    (0..5).for_each(|_| short.give_way());
                    done.fetch_add(1, Ordering::Relaxed);
                });
            }
            while done.load(Ordering::Relaxed) < 3 {
                std::thread::sleep(Duration::from_micros(200));
                long.give_way();
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
                permit.give_way();
                pieces += 1;
            }
            assert!(pieces > 5, "training starved: {pieces} pieces");
        });
    }
}
