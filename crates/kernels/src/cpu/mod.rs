//! The CPU's kernels. **A row's bits depend on that row alone**: every kernel computes each row (and each output of a
//! row) by the same operations in the same order, whatever else is in the batch and however the work is cut among
//! threads. All forms (AMX, AVX-512, AVX2, portable) give the same bits too: the same lanes, the same order of sums, fused
//! where written so.

mod ahead;
mod attend;
mod attention;
mod bottleneck;
mod cells;
mod kv;
pub(crate) mod lanes;
mod lora;
mod matmul;
mod peak;
mod prepare;
pub(crate) mod products;
mod quantize;
mod rows;
mod simd;
mod team;
#[cfg(target_arch = "x86_64")]
pub(crate) mod tiles;

pub use attention::{AttentionScratch, HEAD_DIM_STEP, MAX_GROUP, MAX_HEAD_DIM, attention};
pub use bottleneck::{Bottleneck, bottleneck};
pub use kv::{Angles, HeadNorms, HeadPrep, KvDtype, KvShape, KvView, KvViewMut, RowTile, rope_and_store};
pub use lora::{Adapters, GROUP_ROWS, LoraPair, RowGroup, shrinks};
pub use matmul::{Linear, MAX_LAYERS, Next, linear};
pub use peak::dot_products;
pub use prepare::prepare;
pub use quantize::QuantizedRows;
pub use rows::{
    add_rms_norm, add_rms_norm_row, argmax, gated, gated_backward, gated_row, log_sum_exp, rms_norm, rms_norm_backward,
    rms_norm_row, rope, rope_backward, softcap, softcap_backward, softmax, softmax_backward,
};
pub use simd::{f16_bits, f16_value};
pub use team::Team;

/// A pointer that the workers of one kernel share; each writes to places of its own.
#[derive(Clone, Copy)]
struct Shared(*mut f32);

// SAFETY: a kernel hands every worker a disjoint set of elements, as said where it is used.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// # Safety
    /// `at..at + len` lies in the slice the pointer was taken from, which outlives the use, and no other worker touches
    /// it.
    #[expect(clippy::mut_from_ref, reason = "the caller vouches that the parts are disjoint")]
    unsafe fn part(&self, at: usize, len: usize) -> &mut [f32] {
        // SAFETY: the caller vouches for it.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at), len) }
    }
}
