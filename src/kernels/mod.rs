//! Arithmetic: quantised matmul, attention, batched adapters. `unsafe` lives here and nowhere else.

pub mod blocks;
pub mod cpu;
pub mod gemm;
pub mod packed;
#[cfg(test)]
pub mod testing;

pub use cpu::{argmax, log_sum_exp};
