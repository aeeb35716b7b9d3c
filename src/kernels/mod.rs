//! Arithmetic: quantised matmul, attention, batched adapters. `unsafe` lives here and nowhere else.

pub mod blocks;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod gemm;
pub mod packed;
pub mod tensors;
#[cfg(test)]
pub mod testing;

pub use cpu::{argmax, log_sum_exp};
