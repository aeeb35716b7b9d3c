//! Float32 matrix products for the training path, on strided views, through the `gemm` crate.

use gemm::Parallelism;

/// A row-major matrix whose rows lie `stride` apart.
#[derive(Debug, Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<'a> Mat<'a> {
    /// `data` begins at the first element and reaches at least the last.
    pub fn new(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(reaches(data.len(), rows, cols, stride), "a view lies within its data");
        Self { data, rows, cols, stride }
    }

    /// Returns how many rows it has.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Rows without gaps.
    pub fn dense(data: &'a [f32], cols: usize) -> Self {
        Self::new(data, data.len() / cols, cols, cols)
    }
}

fn reaches(len: usize, rows: usize, cols: usize, stride: usize) -> bool {
    stride >= cols && (rows == 0 || (rows - 1) * stride + cols <= len)
}

/// Where a product goes: as [`Mat`], writable; added to what is there if `accumulate`.
#[derive(Debug)]
pub struct Out<'a> {
    /// Where the rows lie.
    pub data: &'a mut [f32],
    /// Values from one row's begin to the next one's.
    pub stride: usize,
    /// Adds to what is there in place of overwriting it.
    pub accumulate: bool,
}

/// out (+)= a b, with `a`: `[m, k]`, `b`: `[k, n]`.
pub fn mul(out: Out<'_>, a: Mat<'_>, b: Mat<'_>, parallel: bool) {
    run(out, (a.rows, b.cols, a.cols), (a, 1, a.stride), (b, 1, b.stride), a.cols == b.rows, parallel);
}

/// out (+)= a b^T, with `a`: `[m, k]`, `b`: `[n, k]`.
pub fn mul_nt(out: Out<'_>, a: Mat<'_>, b: Mat<'_>, parallel: bool) {
    run(out, (a.rows, b.rows, a.cols), (a, 1, a.stride), (b, b.stride, 1), a.cols == b.cols, parallel);
}

/// out (+)= a^T b, with `a`: `[k, m]`, `b`: `[k, n]`.
pub fn mul_tn(out: Out<'_>, a: Mat<'_>, b: Mat<'_>, parallel: bool) {
    run(out, (a.cols, b.cols, a.rows), (a, a.stride, 1), (b, 1, b.stride), a.rows == b.rows, parallel);
}

/// Operands come with the distance between their columns and their rows.
fn run(
    out: Out<'_>,
    (m, n, k): (usize, usize, usize),
    (a, a_cs, a_rs): (Mat<'_>, usize, usize),
    (b, b_cs, b_rs): (Mat<'_>, usize, usize),
    fits: bool,
    parallel: bool,
) {
    assert!(fits && reaches(out.data.len(), m, n, out.stride), "shapes fit");
    let parallelism = if parallel { Parallelism::Rayon(rayon::current_num_threads()) } else { Parallelism::None };
    // SAFETY: `Mat::new` and the assertion above keep every access within the three slices; `out` is borrowed mutably,
    // so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.data.as_mut_ptr(),
            1,
            out.stride as isize,
            out.accumulate,
            a.data.as_ptr(),
            a_cs as isize,
            a_rs as isize,
            b.data.as_ptr(),
            b_cs as isize,
            b_rs as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_by_hand() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]);
        let (a, b) = (Mat::dense(&a, 2), Mat::dense(&b, 2));
        let mut c = [1.0; 4];
        mul(Out { data: &mut c, stride: 2, accumulate: true }, a, b, false);
        assert_eq!(c, [20.0, 23.0, 44.0, 51.0]);
        mul_nt(Out { data: &mut c, stride: 2, accumulate: false }, a, b, false);
        assert_eq!(c, [17.0, 23.0, 39.0, 53.0]);
        mul_tn(Out { data: &mut c, stride: 2, accumulate: false }, a, b, false);
        assert_eq!(c, [26.0, 30.0, 38.0, 44.0]);
    }
}
