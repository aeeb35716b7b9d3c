//! The CPU's kernels. **A row's bits depend on that row alone**: every kernel computes each row (and each output of a row) by the same
//! operations in the same order, whatever else is in the batch and however the work is cut among threads. The AVX2 and the portable
//! forms give the same bits too: no fused multiply-add, the same lanes, the same order of sums.

mod attention;
mod matmul;
mod rows;
mod simd;

pub use attention::{KvView, MAX_HEAD_DIM, attention};
pub use matmul::{QuantizedRows, matmul};
pub use rows::{add, lora, rms_norm, rope, softmax, softmax_backward, swiglu, swiglu_backward};
pub use simd::{f16_bits, f16_value};

/// A pointer that the workers of one kernel share; each writes to places of its own.
#[derive(Clone, Copy)]
struct Shared(*mut f32);

// SAFETY: a kernel hands every worker a disjoint set of elements, as said where it is used.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// # Safety
    /// `at..at + len` lies in the slice the pointer was taken from, which outlives the use, and no other worker touches it.
    #[expect(clippy::mut_from_ref, reason = "the caller vouches that the parts are disjoint")]
    unsafe fn part(&self, at: usize, len: usize) -> &mut [f32] {
        // SAFETY: the caller vouches for it.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at), len) }
    }
}
