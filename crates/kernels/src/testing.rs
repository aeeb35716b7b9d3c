//! What tests and benches share: random matrices, the count of a thread's allocations, and measures of the machine.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;
use std::time::Instant;

use super::format::QType;
use crate::cpu::Team;

/// The bytes of a matrix of random blocks whose scales are small normal numbers, nested ones included.
pub fn random_matrix(qtype: QType, rows: usize, cols: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u8
    };
    let mut data: Vec<u8> = (0..rows * qtype.row_bytes(cols)).map(|_| next()).collect();
    for block in data.chunks_exact_mut(qtype.block_bytes()) {
        qtype.tame(block);
    }
    let mut file = Vec::with_capacity(qtype.nested_bytes(rows, cols) + data.len());
    while file.len() < qtype.nested_bytes(rows, cols) {
        file.extend((0.05 + f32::from(next()) / 4096.0).to_le_bytes());
    }
    file.extend(data);
    file
}

/// A number that looks random, of a seed and a place.
pub fn hash(seed: u32, at: u32) -> u32 {
    // SplitMix64's finaliser.
    let mut x = (u64::from(seed) << 32 | u64::from(at)).wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    (x ^ x >> 31) as u32
}

/// Smooth values in [-3, 3].
pub fn sinusoid(len: usize, seed: u64) -> Vec<f32> {
    (0..len).map(|i| ((i as f32 + (seed % 100) as f32) * 0.7).sin() * 3.0).collect()
}

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// Allocations of this thread so far.
pub fn allocations() -> u64 {
    ALLOCATIONS.get()
}

/// The system's allocator, which counts; a test's program makes it its `#[global_allocator]`.
#[derive(Debug)]
pub struct Counting;

// SAFETY: everything is the system's; counting allocates nothing, and a thread that is ending counts no more.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the rules of the trait.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

/// The middle of some numbers.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Seconds that something takes.
pub fn seconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

/// Bytes a second that all threads read together.
pub fn read_bandwidth(team: &Team, memory: &[u64]) -> f64 {
    let parts = memory.len() / (1 << 16);
    let time = seconds(|| {
        team.each(parts, |i| {
            let part = &memory[i << 16..][..1 << 16];
            let sums = part.as_chunks::<32>().0.iter();
            black_box(sums.fold([0u64; 32], |sums, chunk| std::array::from_fn(|i| sums[i] ^ chunk[i])));
        });
    });
    (parts << 19) as f64 / time
}
