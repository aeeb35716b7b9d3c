//! What tests share: random matrices, and the count of a thread's allocations.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use super::blocks::{BLOCK, QType};

/// The bytes of a matrix of random blocks whose scales are small normal numbers.
pub fn random_matrix(qtype: QType, rows: usize, cols: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u8
    };
    let bytes = qtype.row_bytes(cols) / (cols / BLOCK);
    let mut data: Vec<u8> = (0..rows * qtype.row_bytes(cols)).map(|_| next()).collect();
    for block in data.chunks_exact_mut(bytes) {
        block[1] = block[1] & 0x83 | 0x24;
        if qtype == QType::Q4_1 {
            block[3] = block[3] & 0x83 | 0x24;
        }
    }
    data
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

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

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
