//! candle's autograd, which the tests compare gradients with.

use candle_core::{Device, Tensor, Var};

pub fn tensor(values: &[f32], shape: (usize, usize)) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

pub fn sinusoid(rows: usize, width: usize, step: f32) -> Var {
    let values: Vec<f32> = (0..rows * width).map(|i| (i as f32 * step).sin()).collect();
    Var::from_tensor(&tensor(&values, (rows, width))).unwrap()
}

pub fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Fails where a value is far from candle's.
pub fn assert_close(ours: &[f32], plain: &Tensor) {
    let plain = values(plain);
    assert_eq!(ours.len(), plain.len());
    let difference = ours.iter().zip(&plain).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(difference < 2e-4, "{difference}");
}

/// The gradients of the variables, from that of y, `d`.
pub fn gradients(y: &Tensor, d: &[f32], vars: &[Var]) -> Vec<Tensor> {
    let d = Tensor::from_slice(d, y.shape(), &Device::Cpu).unwrap();
    let all = (y * d).unwrap().sum_all().unwrap().backward().unwrap();
    vars.iter().map(|var| all.get(var).unwrap().clone()).collect()
}
