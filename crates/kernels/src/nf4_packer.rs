//! A matrix of floats that becomes NF4 as it is packed. The codes go into the tiles as rows come; what blocks' scales are
//! quantised by depends on all of them, so that they wait for the last row, 12 bytes for each 64 values.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::format::nested::NestedScales;
use crate::format::nf4::VALUES;
use crate::format::normal_float::{NF4_CODE, quantize_block};
use crate::format::{BlockFormat, Deviation, NF4, QType};
use crate::packed::{PackedMatrix, Packer};

/// What is kept of a block of values x with codes that stand for c.
#[derive(Debug, Clone, Copy, Default)]
struct Block {
    /// The largest magnitude.
    absmax: f32,
    /// The sum of x c.
    products: f32,
    /// The sum of c squared.
    squares: f32,
}

/// A matrix `[rows, cols]` that is being quantised.
#[derive(Debug)]
pub struct Nf4Packer {
    packer: Packer,
    cols: usize,
    blocks: Vec<Block>,
    /// The sum of the squared values.
    squares: f64,
}

/// The least blocks that a thread takes at a time.
const MIN_BLOCKS: usize = 1 << 8;

/// The sum of the squares.
fn squares(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(*x).powi(2)).sum()
}

impl Nf4Packer {
    /// A matrix without rows yet. `cols` is a multiple of 64.
    pub fn new(rows: usize, cols: usize) -> Self {
        let nested = vec![0; QType::NF4.nested_bytes(rows, cols)];
        let packer = Packer::nested(QType::NF4, rows, cols, &nested);
        Self { packer, cols, blocks: Vec::with_capacity(rows * (cols / VALUES)), squares: 0.0 }
    }

    /// Quantises the rows that come next, any number of them, finite float32 values; on rayon's pool.
    pub fn push(&mut self, rows: &[f32]) {
        assert!(rows.len().is_multiple_of(self.cols), "whole rows");
        let of_values = |x: &[f32], packed: &mut [u8]| {
            let mut codes = [0; VALUES];
            let mut block = Block { absmax: quantize_block(x, &mut codes), ..Block::default() };
            for (x, code) in x.iter().zip(codes) {
                let c = NF4_CODE[usize::from(code)];
                block.products += x * c;
                block.squares += c * c;
            }
            for (byte, [first, second]) in packed[1..].iter_mut().zip(codes.as_chunks().0) {
                *byte = first << 4 | second;
            }
            block
        };
        let mut file = vec![0; rows.len() / VALUES * NF4::BYTES];
        let pairs = rows.par_chunks_exact(VALUES).zip(file.par_chunks_exact_mut(NF4::BYTES));
        self.blocks.par_extend(pairs.with_min_len(MIN_BLOCKS).map(|(x, packed)| of_values(x, packed)));
        self.squares += rows.par_chunks(MIN_BLOCKS * VALUES).map(squares).sum::<f64>();
        self.packer.push(&file);
    }

    /// The matrix, once all of its rows have come, and what quantising has cost.
    ///
    /// # Errors
    /// [`Error::Internal`] where a value was not finite, or the sum of the blocks' largest magnitudes is not.
    pub fn finish(self) -> Result<(PackedMatrix, Deviation)> {
        let scales: Vec<f32> = self.blocks.iter().map(|block| block.absmax).collect();
        let mut codes = vec![0; scales.len()];
        let nested = NestedScales::quantize(&scales, &mut codes);
        if !(nested.is_sound() && self.squares.is_finite()) {
            return Err(Error::internal("values that are not finite, or too large, have no scales"));
        }
        let mut errors = 0.0;
        for (i, (block, code)) in self.blocks.iter().zip(&codes).enumerate() {
            let scale = f64::from(nested.of(i).scale_of(*code));
            // The sum of (scale c - x)^2 but for that of x^2.
            errors += scale * (scale * f64::from(block.squares) - 2.0 * f64::from(block.products));
        }
        let deviation = Deviation { errors: (errors + self.squares).max(0.0), squares: self.squares };
        let mut matrix = self.packer.finish();
        matrix.set_scales(nested, &codes);
        Ok((matrix, deviation))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{NESTED_BLOCK, dequantize_nf4, quantize_nf4};

    fn packed(values: &[f32], cols: usize) -> Result<(PackedMatrix, Deviation)> {
        let mut packer = Nf4Packer::new(values.len() / cols, cols);
        values.chunks(5 * cols).for_each(|piece| packer.push(piece));
        packer.finish()
    }

    /// A matrix in tiles has the codes, the scales and the values of the flattened one.
    #[test]
    fn tiles_hold_what_is_quantised() {
        let (rows, cols) = (37, 576);
        let values: Vec<f32> =
            (0..rows * cols).map(|i| (i as f32 * 0.7).sin() * (i as f32 * 0.003).cos() * 0.1).collect();
        let (matrix, deviation) = packed(&values, cols).unwrap();
        let nf4 = quantize_nf4(&values, 64);
        let mut codes = vec![0; nf4.absmax.len()];
        let nested = NestedScales::quantize(&nf4.absmax, &mut codes);
        let scales: Vec<f32> = codes.iter().enumerate().map(|(i, code)| nested.of(i).scale_of(*code)).collect();
        let (mut want, mut got) = (vec![0.0; values.len()], vec![0.0; values.len()]);
        dequantize_nf4(&nf4.codes, &scales, 64, &mut want);
        matrix.dequantize(0, &mut got);
        assert_eq!(got, want);
        let file = matrix.unpack();
        let (table, blocks) = file.split_at(nested.to_bytes().len());
        assert_eq!(table, nested.to_bytes());
        assert!(blocks.chunks_exact(33).map(|block| block[0]).eq(codes));
        assert!(blocks.chunks_exact(33).flat_map(|block| &block[1..]).eq(&nf4.codes));
        let errors: f64 = values.iter().zip(&got).map(|(x, y)| f64::from(x - y).powi(2)).sum();
        let squares: f64 = values.iter().map(|x| f64::from(*x).powi(2)).sum();
        assert!((deviation.errors - errors).abs() <= 1e-3 * errors, "{} {errors}", deviation.errors);
        assert!((deviation.squares - squares).abs() <= 1e-9 * squares);
    }

    /// What the data type costs where values are normal, which it is made for: 0.091 to 0.092 of their size.
    #[test]
    fn normal_values_cost_a_tenth() {
        let uniform = |i: usize| crate::testing::hash(1, i as u32) as f32 / 2.0f32.powi(32) - 0.5;
        let values: Vec<f32> = (0..1 << 16).map(|i| (0..12).map(|k| uniform(12 * i + k)).sum::<f32>() * 0.02).collect();
        let (_, deviation) = packed(&values, 1 << 10).unwrap();
        assert!((0.09..0.093).contains(&deviation.relative()), "{}", deviation.relative());
    }

    #[test]
    fn values_that_are_not_finite_are_refused() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![0.1; 8 * 64];
            values[100] = bad;
            assert!(matches!(packed(&values, 64), Err(Error::Internal(_))), "{bad}");
        }
        assert!(packed(&vec![f32::MAX; 8 * 64], 64).is_err(), "the sum of the scales is not finite");
        assert!(packed(&[0.0; 8 * 64], 64).is_ok_and(|(_, deviation)| deviation.relative() == 0.0));
    }

    #[test]
    #[should_panic(expected = "a format with nested scales has them")]
    fn rows_without_nested_scales_are_refused() {
        let _ = Packer::new(QType::NF4, 1, 64);
    }

    #[test]
    fn a_weight_takes_hardly_more_than_four_bits() {
        for (rows, cols) in [(576, 576), (1536, 576), (4864, 896), (2048, 2048)] {
            let bits = 8.0 * PackedMatrix::bytes_of(QType::NF4, rows, cols) as f64 / (rows * cols) as f64;
            assert!(bits <= 4.13, "{rows} {cols}: {bits}");
        }
        assert_eq!(QType::NF4.nested_bytes(1, 64 * NESTED_BLOCK + 64), 12);
    }
}
