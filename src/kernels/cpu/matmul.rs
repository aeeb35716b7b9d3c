//! y = x W^T for frozen W in a block format: activations are quantised per row to int16 in blocks of 32, products summed exactly in
//! integers within a block, blocks summed in float32 in a fixed order.
//!
//! Int16 because int8 is not enough for this base: a few huge activations take the range of their block, and log-probabilities moved
//! by 0.06 nats in the mean (`docs/LOG.md`). On AVX2 a block costs eight instructions a row instead of six.

use rayon::prelude::*;

use super::Shared;
use super::simd::{f16_value, has_avx2, multiversion};
use crate::kernels::blocks::{BLOCK, QMatrixRef, QType};

/// Rows of activations that share one decoding of a weight block.
const TILE: usize = 4;

/// The largest quantised activation.
const LARGEST: f32 = 32767.0;

/// Activations `[rows, cols]` in int16: x is about `scale * q`, |q| <= 32767, in blocks of 32; `sum` is `scale * (q_0 + ... + q_31)`.
#[derive(Debug, Default)]
pub struct QuantizedRows {
    rows: usize,
    blocks: usize,
    q: Vec<i16>,
    scale: Vec<f32>,
    sum: Vec<f32>,
}

multiversion! {
    fn quantize_row(x: &[f32], q: &mut [i16], scale: &mut [f32], sum: &mut [f32]) {
        let blocks = x.as_chunks::<BLOCK>().0.iter().zip(q.as_chunks_mut::<BLOCK>().0);
        for ((x, q), (scale, sum)) in blocks.zip(scale.iter_mut().zip(sum)) {
            let (mut largest, mut finite) = (0.0f32, true);
            for x in x {
                largest = largest.max(x.abs());
                finite &= x.is_finite();
            }
            // What is broken must not look like zeros.
            *scale = if finite { largest / LARGEST } else { f32::NAN };
            let inverse = if largest > 0.0 { LARGEST / largest } else { 0.0 };
            let mut total = 0i32;
            for (x, q) in x.iter().zip(q) {
                // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even.
                let rounded = (*x * inverse + 12_582_912.0) - 12_582_912.0;
                *q = rounded as i32 as i16;
                total += i32::from(*q);
            }
            *sum = *scale * total as f32;
        }
    }
}

impl QuantizedRows {
    /// Quantises `x`, reusing the buffers. `cols` is a multiple of 32.
    pub fn fill(&mut self, x: &[f32], cols: usize) {
        self.blocks = cols / BLOCK;
        self.rows = x.len() / cols;
        self.q.resize(x.len(), 0);
        self.scale.resize(x.len() / BLOCK, 0.0);
        self.sum.resize(x.len() / BLOCK, 0.0);
        let blocks = self.blocks;
        x.par_chunks_exact(cols)
            .zip(self.q.par_chunks_exact_mut(cols))
            .zip(self.scale.par_chunks_exact_mut(blocks).zip(self.sum.par_chunks_exact_mut(blocks)))
            .with_min_len(4)
            .for_each(|((x, q), (scale, sum))| quantize_row(x, q, scale, sum));
    }

    fn row(&self, row: usize) -> QRow<'_> {
        let at = row * self.blocks;
        QRow {
            q: self.q[at * BLOCK..][..self.blocks * BLOCK].as_chunks().0,
            scale: &self.scale[at..][..self.blocks],
            sum: &self.sum[at..][..self.blocks],
        }
    }
}

/// One quantised row.
#[derive(Clone, Copy)]
struct QRow<'a> {
    q: &'a [[i16; BLOCK]],
    scale: &'a [f32],
    sum: &'a [f32],
}

/// A block format that the kernels multiply: 32 weights `d * q + m`.
trait Format {
    /// Bytes a block.
    const BYTES: usize;
    /// Where the packed q begin.
    const AT: usize;
    /// Whether q is 32 int8; else 32 nibbles.
    const SIGNED: bool;
    /// d and m; `half` gives the value of half-precision bits.
    fn scales(block: &[u8], half: impl Fn(u16) -> f32) -> (f32, f32);

    /// The q of the block, for the portable form.
    #[inline(always)]
    fn values(block: &[u8]) -> [i8; BLOCK] {
        let packed = &block[Self::AT..];
        std::array::from_fn(|i| match (Self::SIGNED, i < BLOCK / 2) {
            (true, _) => packed[i] as i8,
            (false, true) => (packed[i] & 15) as i8,
            (false, false) => (packed[i - BLOCK / 2] >> 4) as i8,
        })
    }

    /// The q of the block as int16, the first 16 and the last 16.
    ///
    /// # Safety
    /// The machine has AVX2 and `block` holds `BYTES` bytes.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn load(block: &[u8]) -> [std::arch::x86_64::__m256i; 2] {
        use std::arch::x86_64::*;
        debug_assert_eq!(block.len(), Self::BYTES);
        let packed = block[Self::AT..].as_ptr().cast::<__m128i>();
        // SAFETY: 16 bytes follow, 32 where signed, and the loads may be unaligned.
        unsafe {
            let first = _mm_loadu_si128(packed);
            if Self::SIGNED {
                return [_mm256_cvtepi8_epi16(first), _mm256_cvtepi8_epi16(_mm_loadu_si128(packed.add(1)))];
            }
            let bytes = _mm256_cvtepu8_epi16(first);
            [_mm256_and_si256(bytes, _mm256_set1_epi16(15)), _mm256_srli_epi16(bytes, 4)]
        }
    }
}

#[inline(always)]
fn bits(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

struct Q4_0;
struct Q4_1;
struct Q8_0;

impl Format for Q4_0 {
    const BYTES: usize = 18;
    const AT: usize = 2;
    const SIGNED: bool = false;
    #[inline(always)]
    fn scales(block: &[u8], half: impl Fn(u16) -> f32) -> (f32, f32) {
        let d = half(bits(block, 0));
        (d, -8.0 * d)
    }
}

impl Format for Q4_1 {
    const BYTES: usize = 20;
    const AT: usize = 4;
    const SIGNED: bool = false;
    #[inline(always)]
    fn scales(block: &[u8], half: impl Fn(u16) -> f32) -> (f32, f32) {
        (half(bits(block, 0)), half(bits(block, 2)))
    }
}

impl Format for Q8_0 {
    const BYTES: usize = 34;
    const AT: usize = 2;
    const SIGNED: bool = true;
    #[inline(always)]
    fn scales(block: &[u8], half: impl Fn(u16) -> f32) -> (f32, f32) {
        (half(bits(block, 0)), 0.0)
    }
}

/// The order in which the eight lanes are summed.
#[inline(always)]
fn sum_lanes(l: [f32; 8]) -> f32 {
    ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]))
}

/// One weight row times N rows of activations. Lane j of a block sums its products 2j, 2j + 1, 16 + 2j, 17 + 2j.
fn dots_portable<F: Format, const N: usize>(weights: &[u8], x: [QRow<'_>; N]) -> [f32; N] {
    let mut lanes = [[0.0f32; 8]; N];
    let mut offset = [0.0f32; N];
    for (b, block) in weights.chunks_exact(F::BYTES).enumerate() {
        let (d, m) = F::scales(block, f16_value);
        let w = F::values(block);
        for r in 0..N {
            let scale = d * x[r].scale[b];
            for (j, lane) in lanes[r].iter_mut().enumerate() {
                let products =
                    [2 * j, 2 * j + 1, 16 + 2 * j, 17 + 2 * j].map(|i| i32::from(w[i]) * i32::from(x[r].q[b][i]));
                *lane += scale * products.iter().sum::<i32>() as f32;
            }
            offset[r] += m * x[r].sum[b];
        }
    }
    std::array::from_fn(|r| sum_lanes(lanes[r]) + offset[r])
}

/// As [`dots_portable`], to the bit.
///
/// # Safety
/// The machine has AVX2 and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
unsafe fn dots_avx2<F: Format, const N: usize>(weights: &[u8], x: [QRow<'_>; N]) -> [f32; N] {
    use std::arch::x86_64::*;
    // One check here in place of one at every block.
    let blocks = weights.len() / F::BYTES;
    let x = x.map(|row| QRow { q: &row.q[..blocks], scale: &row.scale[..blocks], sum: &row.sum[..blocks] });
    let mut lanes = [_mm256_setzero_ps(); N];
    let mut offset = [0.0f32; N];
    for (b, block) in weights.chunks_exact(F::BYTES).enumerate() {
        let (d, m) = F::scales(block, |bits| _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits.into()))));
        // SAFETY: AVX2 is there, and the block is whole.
        let w = unsafe { F::load(block) };
        for r in 0..N {
            let q = x[r].q[b].as_ptr().cast::<__m256i>();
            // SAFETY: a block of activations is 64 bytes, and the loads may be unaligned.
            let q = unsafe { [_mm256_loadu_si256(q), _mm256_loadu_si256(q.add(1))] };
            // At most 4 * 128 * 32767 < 2^31 a lane.
            let sums = _mm256_add_epi32(_mm256_madd_epi16(w[0], q[0]), _mm256_madd_epi16(w[1], q[1]));
            let products = _mm256_cvtepi32_ps(sums);
            lanes[r] = _mm256_add_ps(lanes[r], _mm256_mul_ps(_mm256_set1_ps(d * x[r].scale[b]), products));
            offset[r] += m * x[r].sum[b];
        }
    }
    std::array::from_fn(|r| {
        let mut l = [0.0f32; 8];
        // SAFETY: eight floats are there.
        unsafe { _mm256_storeu_ps(l.as_mut_ptr(), lanes[r]) };
        sum_lanes(l) + offset[r]
    })
}

#[inline]
fn dots<F: Format, const N: usize>(avx2: bool, weights: &[u8], x: [QRow<'_>; N]) -> [f32; N] {
    #[cfg(target_arch = "x86_64")]
    if avx2 {
        // SAFETY: the machine has AVX2 and F16C.
        return unsafe { dots_avx2::<F, N>(weights, x) };
    }
    let _ = avx2;
    dots_portable::<F, N>(weights, x)
}

/// y = x W^T. `x`: `[rows, w.cols]`; `y`: `[rows, w.rows]`, overwritten. W is Q4_0, Q4_1 or Q8_0.
pub fn matmul(w: QMatrixRef<'_>, x: &QuantizedRows, y: &mut [f32]) {
    matmul_with(w, x, y, has_avx2());
}

fn matmul_with(w: QMatrixRef<'_>, x: &QuantizedRows, y: &mut [f32], avx2: bool) {
    assert_eq!((x.blocks * BLOCK, y.len()), (w.cols, x.rows * w.rows), "shapes fit");
    match w.qtype {
        QType::Q4_0 => run::<Q4_0>(w, x, y, avx2),
        QType::Q4_1 => run::<Q4_1>(w, x, y, avx2),
        QType::Q8_0 => run::<Q8_0>(w, x, y, avx2),
        QType::F32 => unreachable!("a float32 matrix has no quantised kernel; the model refuses it"),
    }
}

fn run<F: Format>(w: QMatrixRef<'_>, x: &QuantizedRows, y: &mut [f32], avx2: bool) {
    let out = w.rows;
    let shared = Shared(y.as_mut_ptr());
    // Weight rows a task takes: enough work to be worth a task, few enough to stay in the cache and to balance.
    let chunk = out.div_ceil(4 * rayon::current_num_threads()).clamp(16, 256);
    let task = |c: usize| {
        let columns = c * chunk..out.min((c + 1) * chunk);
        for row in (0..x.rows).step_by(TILE) {
            for column in columns.clone() {
                let weights = w.row(column);
                let put = |r: usize, value: f32| {
                    // SAFETY: this task alone writes these columns, and (row + r, column) lies in y.
                    unsafe { shared.part((row + r) * out + column, 1)[0] = value };
                };
                if row + TILE <= x.rows {
                    let tile = std::array::from_fn(|r| x.row(row + r));
                    dots::<F, TILE>(avx2, weights, tile).into_iter().enumerate().for_each(|(r, v)| put(r, v));
                } else {
                    (0..x.rows - row).for_each(|r| put(r, dots::<F, 1>(avx2, weights, [x.row(row + r)])[0]));
                }
            }
        }
    };
    (0..out.div_ceil(chunk)).into_par_iter().for_each(task);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A matrix of random bytes whose scales are small normal numbers.
    fn matrix(qtype: QType, rows: usize, cols: usize, seed: u64) -> Vec<u8> {
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Both forms agree to the bit, rows do not depend on their batch, and the values are those of the exact product of the
        /// quantised activations with the dequantised weights.
        #[test]
        fn agrees_with_dequantised_weights(
            qtype in prop::sample::select(vec![QType::Q4_0, QType::Q4_1, QType::Q8_0]),
            rows in 1usize..10, out in 1usize..40, blocks in 1usize..6, seed in any::<u64>(),
        ) {
            let cols = blocks * BLOCK;
            let data = matrix(qtype, out, cols, seed);
            let w = QMatrixRef { qtype, rows: out, cols, data: &data };
            let x: Vec<f32> = (0..rows * cols).map(|i| ((i as f32 + (seed % 100) as f32) * 0.7).sin() * 3.0).collect();
            let mut q = QuantizedRows::default();
            q.fill(&x, cols);
            let (mut y, mut portable) = (vec![0.0; rows * out], vec![0.0; rows * out]);
            matmul(w, &q, &mut y);
            matmul_with(w, &q, &mut portable, false);
            prop_assert_eq!(&y, &portable);
            let mut dense = vec![0.0; out * cols];
            w.dequantize(0, &mut dense);
            for row in 0..rows {
                let mut alone = QuantizedRows::default();
                alone.fill(&x[row * cols..][..cols], cols);
                let mut single = vec![0.0; out];
                matmul(w, &alone, &mut single);
                prop_assert_eq!(&single[..], &y[row * out..][..out]);
                for column in 0..out {
                    let r = q.row(row);
                    let terms = (0..cols).map(|i| {
                        f64::from(r.scale[i / BLOCK]) * f64::from(r.q[i / BLOCK][i % BLOCK]) * f64::from(dense[column * cols + i])
                    });
                    let (want, size) = terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
                    prop_assert!((f64::from(y[row * out + column]) - want).abs() <= 1e-5 * size + 1e-6);
                    let exact: f64 = (0..cols).map(|i| f64::from(x[row * cols + i]) * f64::from(dense[column * cols + i])).sum();
                    prop_assert!((want - exact).abs() <= 1e-4 * size + 1e-6, "activations lose little: {} {}", want, exact);
                }
            }
        }
    }

    #[test]
    fn extreme_weights_do_not_saturate() {
        let mut data = vec![0x80u8; 34];
        data[..2].copy_from_slice(&half::f16::from_f32(1.0).to_le_bytes());
        let w = QMatrixRef { qtype: QType::Q8_0, rows: 1, cols: BLOCK, data: &data };
        let mut q = QuantizedRows::default();
        q.fill(&[-1.0; BLOCK], BLOCK);
        let mut y = [0.0];
        matmul(w, &q, &mut y);
        assert!((y[0] - 32.0 * 128.0).abs() < 0.1, "{}", y[0]);
    }
}
