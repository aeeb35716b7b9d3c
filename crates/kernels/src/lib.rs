//! Arithmetic: quantised matmul, attention, batched adapters. `unsafe` lives here and nowhere else.

#![expect(unsafe_code, reason = "instructions of processors, and memory that threads share")]

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod error;
pub mod format;
pub mod gemm;
pub mod nf4_packer;
pub mod packed;
pub mod spec;
pub mod tensors;
pub mod testing;

pub use cpu::{argmax, log_sum_exp};
