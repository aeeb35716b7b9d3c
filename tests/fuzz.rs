//! The fuzz targets on the stable toolchain: each runs over its corpus (`fuzz/corpus`) and over seeded mutations of it.
//! A panic, an input that takes too long and memory out of proportion to the input are faults. `TENORA_FUZZ_RUNS` says
//! how many mutations a target gets; a failure names target and run, and the same run makes the same input again.

#![expect(unsafe_code, reason = "an allocator that counts and refuses")]
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test fails by them")]

#[path = "../fuzz/targets.rs"]
mod targets;

use std::alloc::{GlobalAlloc, Layout, System};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tenora::random::philox4x32;

/// Mutations a target gets without `TENORA_FUZZ_RUNS`.
const RUNS: u32 = 3000;

/// Longest input that mutations make.
const MAX_INPUT: usize = 256 << 10;

/// No input may take longer. Generous: a busy machine must not fail it.
const TIME: Duration = Duration::from_secs(30);

/// What an input may take at once: this, and [`BYTES_PER_BYTE`] for each of its bytes.
const BYTES: usize = 64 << 20;
const BYTES_PER_BYTE: usize = 256;

/// Counts what is allocated; one test runs at a time, so it is the target's.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// A single allocation beyond this fails, as it would where memory is short, and is a fault.
const LARGEST: usize = 1 << 30;
static TOO_LARGE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes on to the system's allocator with what it was given; one that is refused returns null, as it
// may.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() > LARGEST {
            TOO_LARGE.fetch_max(layout.size(), Ordering::Relaxed);
            return std::ptr::null_mut();
        }
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the pointer comes from `alloc` above, so from the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Random numbers of a target's run.
struct Random {
    key: [u32; 2],
    counter: u32,
}

impl Random {
    fn new(target: usize, run: u32) -> Self {
        Self { key: [target as u32, run], counter: 0 }
    }

    fn below(&mut self, end: usize) -> usize {
        self.counter += 1;
        philox4x32(self.key, [self.counter, 0, 0, 0])[0] as usize % end.max(1)
    }
}

/// Numbers at which readers go wrong.
const INTEGERS: [u64; 12] =
    [0, 1, 2, 7, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 32, i64::MAX as u64, u64::MAX];

/// Pieces of the formats that are read.
const WORDS: [&str; 22] = [
    "{",
    "}",
    "[",
    "]",
    "\"",
    ":",
    ",",
    "null",
    "true",
    "-1",
    "1e999",
    "\\ud800",
    "\n",
    "{{",
    "}}",
    "{%",
    "%}",
    "for x in range(99999)",
    "<|im_start|>",
    "\"role\":\"assistant\"",
    "\u{FDD0}",
    "\u{0}",
];

/// Makes an input from the corpus: one of its files, changed in one to eight places.
fn mutate(corpus: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut data = corpus[random.below(corpus.len())].clone();
    for _ in 0..=random.below(8) {
        let at = random.below(data.len() + 1);
        let end = at + random.below((data.len() - at).min(64) + 1);
        match random.below(9) {
            0 if at < data.len() => data[at] ^= 1 << random.below(8),
            1 if at < data.len() => data[at] = random.below(256) as u8,
            2 => data.truncate(at),
            3 => drop(data.drain(at..end)),
            4 => {
                let piece = data[at..end].to_vec();
                data.splice(at..at, piece.repeat(1 + random.below(40)));
            }
            5 => {
                let number = INTEGERS[random.below(INTEGERS.len())].to_le_bytes();
                let width = [1, 2, 4, 8][random.below(4)];
                let end = (at + width).min(data.len());
                data[at..end].copy_from_slice(&number[..end - at]);
            }
            6 => {
                let other = &corpus[random.below(corpus.len())];
                let from = random.below(other.len() + 1);
                data.truncate(at);
                data.extend(&other[from..]);
            }
            _ => drop(data.splice(at..end, WORDS[random.below(WORDS.len())].bytes())),
        }
        data.truncate(MAX_INPUT);
    }
    data
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new("fuzz/corpus").join(target);
    let mut paths: Vec<_> =
        std::fs::read_dir(folder).expect("a corpus").map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).expect("a file")).collect()
}

/// The input under way, for the watchdog: since when, and its name.
static UNDER_WAY: Mutex<Option<(Instant, String)>> = Mutex::new(None);

fn under_way() -> std::sync::MutexGuard<'static, Option<(Instant, String)>> {
    UNDER_WAY.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Tells the watchdog to end when it is dropped, so also where a test fails.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Ends the process where an input takes too long: a hang cannot be caught.
fn watch(done: &AtomicBool) {
    while !done.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(100));
        if let Some((since, name)) = &*under_way()
            && since.elapsed() > TIME
        {
            eprintln!("{name} takes longer than {TIME:?}");
            std::process::abort();
        }
    }
}

/// One test at a time: what is counted is the process's.
static ALONE: Mutex<()> = Mutex::new(());

/// Runs a target on an input and says what is wrong with it.
fn check(name: &str, run: targets::Target, data: &[u8]) -> Option<String> {
    *under_way() = Some((Instant::now(), name.to_owned()));
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    TOO_LARGE.store(0, Ordering::Relaxed);
    let result = catch_unwind(AssertUnwindSafe(|| run(data)));
    let (took, too_large) = (PEAK.load(Ordering::Relaxed).saturating_sub(before), TOO_LARGE.load(Ordering::Relaxed));
    *under_way() = None;
    let shown = String::from_utf8_lossy(&data[..data.len().min(400)]).escape_debug().to_string();
    let wrong = match result {
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            format!("panics: {}", text.unwrap_or_default())
        }
        Ok(_) if too_large > 0 => format!("asks for {too_large} bytes at once"),
        Ok(_) if took > BYTES + BYTES_PER_BYTE * data.len() => format!("takes {took} bytes for {}", data.len()),
        Ok(_) => return None,
    };
    Some(format!("{name} {wrong}\n  input ({} bytes): {shown}", data.len()))
}

#[test]
fn readers_of_foreign_bytes_neither_panic_nor_hang_nor_fill_the_memory() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let runs = std::env::var("TENORA_FUZZ_RUNS").map_or(RUNS, |runs| runs.parse().expect("TENORA_FUZZ_RUNS: a number"));
    let only = std::env::var("TENORA_FUZZ_TARGET").ok();
    let done = AtomicBool::new(false);
    let faults = std::thread::scope(|scope| {
        scope.spawn(|| watch(&done));
        let _done = Done(&done);
        let mut faults = Vec::new();
        for (number, (target, run)) in targets::ALL.into_iter().enumerate() {
            if only.as_deref().is_some_and(|only| only != target) {
                continue;
            }
            let corpus = corpus(target);
            assert!(!corpus.is_empty(), "{target} has a corpus");
            // This makes what is made once, such as the tiny base, so that it counts for no input.
            let accepted = corpus.iter().filter(|data| run(data)).count();
            assert!(accepted > 0, "{target} accepts none of its corpus: mutations would begin from nothing");
            let begun = Instant::now();
            for (i, data) in corpus.iter().enumerate() {
                faults.extend(check(&format!("{target}, file {i} of the corpus,"), run, data));
            }
            for i in 0..runs {
                let data = mutate(&corpus, &mut Random::new(number, i));
                faults.extend(check(&format!("{target}, run {i},"), run, &data));
            }
            println!(
                "{target}: {accepted} of {} files accepted, {runs} mutations in {:.1} s",
                corpus.len(),
                begun.elapsed().as_secs_f64()
            );
        }
        faults
    });
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults[..faults.len().min(20)].join("\n"));
}

#[test]
fn faults_are_seen() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let panics = check("x", |_| panic!("on purpose"), b"1").expect("a fault");
    assert!(panics.starts_with("x panics: on purpose"), "{panics}");
    let takes = check("x", |_| std::hint::black_box(vec![1u8; BYTES + 2000]).is_empty(), b"1").expect("a fault");
    assert!(takes.contains("takes"), "{takes}");
    let asks = |_: &[u8]| Vec::<u8>::new().try_reserve(LARGEST + 1).is_ok();
    assert!(check("x", asks, b"1").expect("a fault").contains("at once"));
    assert_eq!(check("x", |_| true, b"1"), None);
    assert_ne!(mutate(&[vec![0; 64]], &mut Random::new(0, 1)), mutate(&[vec![0; 64]], &mut Random::new(0, 2)));
}
