//! Arithmetic: quantised matmul, attention, batched adapters. `unsafe` lives here and nowhere else.

pub mod blocks;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod gemm;
pub mod packed;
pub mod tensors;
#[cfg(test)]
mod testing;

/// ln of the sum of e^x over a row, summed in its order in double precision: what every log-probability of the serving path rests on.
pub fn log_sum_exp(row: &[f32]) -> f64 {
    let largest = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    f64::from(largest) + row.iter().map(|x| f64::from((x - largest).exp())).sum::<f64>().ln()
}
