//! y = x W^T for frozen W in tile order and quantised activations: products summed exactly in integers within a block,
//! blocks summed in float32 in their order. Every output is computed by itself, whatever rows and columns are computed
//! beside it.

use std::ops::Range;

use super::Shared;
use super::ahead::Prefetcher;
use super::lanes::MicroKernel;
use super::lora::{Adapters, expand, expand_reads, shrink_reads};
use super::products::{Strips, run_strips};
use super::quantize::{AMX_ROWS, AmxBlock, PANEL, QuantizedRows};
use super::simd::Level;
use super::team::Team;
use crate::format::{BLOCK, TILE_ROWS, with_format};
use crate::packed::PackedMatrix;

/// Most rows of activations that pass over a strip while it lies in the cache, before the next strip's turn.
pub(super) const MAX_PASS: usize = 128;

/// Bytes between what is read of a matrix and what is fetched meanwhile, where all rows are one panel: more than the memory
/// gives a core while a line is on its way. More rows have the time that they pass over a strip to fetch the whole next one.
const AHEAD: usize = 8 << 10;

/// Strips that many rows pass over together, where the machine's registers have room for it.
pub(super) const MAX_STRIPS: usize = 2;

/// A frozen layer and where its result goes.
pub struct Linear<'a> {
    /// The frozen weights.
    pub matrix: &'a PackedMatrix,
    /// Added to each row's products, `[matrix.rows()]`.
    pub bias: Option<&'a [f32]>,
    /// `[rows, matrix.rows()]`.
    pub y: &'a mut [f32],
    /// Adds to `y` in place of overwriting it.
    pub accumulate: bool,
}

/// What the next call will read.
#[derive(Debug, Clone, Copy, Default)]
pub struct Next<'a> {
    /// Its layers.
    pub matrices: [Option<&'a PackedMatrix>; MAX_LAYERS],
    /// What its input will be shrunk by.
    pub adapters: Option<&'a Adapters<'a>>,
}

/// y = x W^T for the layers of one input, and on top what the rows' adapters add, from the input they have shrunk (see
/// [`super::prepare()`]). What comes next is fetched meanwhile.
pub fn linear(
    team: &Team,
    x: &QuantizedRows,
    layers: &mut [Linear<'_>],
    adapters: Option<(&Adapters<'_>, &[f32])>,
    next: Next<'_>,
) {
    linear_at(Level::best(), team, x, layers, adapters, next);
}

fn linear_at(
    level: Level,
    team: &Team,
    x: &QuantizedRows,
    layers: &mut [Linear<'_>],
    adapters: Option<(&Adapters<'_>, &[f32])>,
    next: Next<'_>,
) {
    assert!(layers.len() <= MAX_LAYERS, "at most {MAX_LAYERS} layers share an input");
    if let Some((adapters, shrunk)) = adapters {
        let fits = adapters.layers() == layers.len() && shrunk.len() == adapters.shrunk_len(x.rows());
        assert!(fits, "each layer has its shrunk rows");
    }
    for layer in &*layers {
        assert_eq!((layer.matrix.cols(), layer.y.len()), (x.cols(), x.rows() * layer.matrix.rows()), "shapes fit");
        assert!(layer.bias.is_none_or(|bias| bias.len() == layer.matrix.rows()), "each output has its bias");
    }
    let total: usize = layers.iter().map(|layer| layer.matrix.strips()).sum();
    let piece = strips_of_a_piece(team, total);
    let jobs: [Option<Job<'_, '_>>; MAX_LAYERS] = std::array::from_fn(|i| {
        let layer = layers.get_mut(i)?;
        let adapted = adapters.map(|(adapters, shrunk)| {
            let len = shrunk.len() / adapters.layers();
            (adapters, (i, &shrunk[i * len..][..len]))
        });
        let y = Shared(layer.y.as_mut_ptr());
        Some(Job { matrix: layer.matrix, y, bias: layer.bias, accumulate: layer.accumulate, adapted })
    });
    let pass = rows_of_a_pass(x);
    fetch_when_idle(team, next.matrices);
    team.each(total.div_ceil(piece), |i| {
        let mut ahead = Prefetcher::new();
        for row in (0..x.rows()).step_by(pass) {
            let rows = row..x.rows().min(row + pass);
            let (mut at, end) = (i * piece, total.min((i + 1) * piece));
            while let Some((job, strip)) = find(jobs.iter().flatten(), |job| job.matrix, at).filter(|_| at < end) {
                let side_by_side = if rows.len() <= PANEL { 1 } else { MAX_STRIPS };
                let count = side_by_side.min(job.matrix.strips() - strip).min(end - at);
                ahead.clear();
                if let Some(next) = next.adapters.filter(|_| row == 0) {
                    (at..at + count).for_each(|at| shrink_reads(next, at, total, &mut ahead));
                }
                job.run(level, strip..strip + count, x, rows.clone(), &mut ahead);
                at += count;
            }
        }
    });
}

/// Most layers of one call.
pub const MAX_LAYERS: usize = 4;

/// Rows of activations that pass over a strip together: where AMX reads them as many as leave room for weights in the
/// second cache, whole groups of them.
fn rows_of_a_pass(x: &QuantizedRows) -> usize {
    /// Of the second cache, which has 2 MiB on machines with AMX.
    const BYTES: usize = 5 << 18;
    if !x.has_amx_blocks() {
        return MAX_PASS / 2;
    }
    let groups = BYTES / (x.cols() / BLOCK * size_of::<AmxBlock>());
    groups.clamp(1, MAX_PASS / AMX_ROWS) * AMX_ROWS
}

/// Enough pieces to balance, few enough that claiming one costs nothing beside it.
fn strips_of_a_piece(team: &Team, total: usize) -> usize {
    (total / (8 * team.threads())).clamp(1, 32)
}

/// Has each thread fetch what its share of the next call begins with.
fn fetch_when_idle(team: &Team, matrices: [Option<&PackedMatrix>; MAX_LAYERS]) {
    let total = matrices.iter().flatten().map(|matrix| matrix.strips()).sum();
    let piece = strips_of_a_piece(team, total);
    for worker in 0..team.threads() {
        let at = team.share(total.div_ceil(piece), worker).start * piece;
        if let Some((matrix, strip)) = find(matrices.iter().flatten(), |matrix| matrix, at) {
            team.fetch_when_idle(worker, matrix.strips_from(strip));
        }
    }
}

/// Which of the layers the strip `at` of all of them lies in, and its place there.
fn find<T>(layers: impl Iterator<Item = T>, matrix: impl Fn(&T) -> &PackedMatrix, mut at: usize) -> Option<(T, usize)> {
    for layer in layers {
        let strips = matrix(&layer).strips();
        if at < strips {
            return Some((layer, at));
        }
        at -= strips;
    }
    None
}

/// A layer as the tasks see it.
struct Job<'a, 'p> {
    matrix: &'a PackedMatrix,
    y: Shared,
    bias: Option<&'a [f32]>,
    accumulate: bool,
    adapted: Option<(&'a Adapters<'p>, (usize, &'a [f32]))>,
}

impl Job<'_, '_> {
    /// The outputs of some strips, [`MAX_STRIPS`] at most, for some rows.
    fn run(&self, level: Level, strips: Range<usize>, x: &QuantizedRows, rows: Range<usize>, ahead: &mut Prefetcher) {
        if let Some((adapters, (layer, _))) = self.adapted {
            strips.clone().for_each(|strip| expand_reads(adapters, layer, strip, &rows, ahead));
        }
        let all = self.matrix.strips_from(strips.start);
        let own = strips.len() * self.matrix.strip(strips.start).len();
        let later = all.get(if rows.len() <= PANEL { AHEAD } else { own }..).unwrap_or_default();
        ahead.push(&later[..later.len().min(own)]);
        let (y, width, strip) = (self.y, self.matrix.rows(), strips.start);
        let out = Outputs { y, width, strip, bias: self.bias, accumulate: self.accumulate };
        let of = Strips { tiles: &all[..own], nested: self.matrix.nested_from(strip) };
        with_format!(self.matrix.qtype(), F => run_strips::<F>(level, of, (x, rows.clone()), ahead, out));
        if let Some((adapters, shrunk)) = self.adapted {
            for strip in strips {
                // SAFETY: this task alone touches this strip of `y`.
                unsafe { expand(level, adapters, shrunk, strip, rows.clone(), (y, width)) };
            }
        }
    }
}

/// Where the 16 outputs of a strip go.
#[derive(Clone, Copy)]
pub(super) struct Outputs<'a> {
    y: Shared,
    width: usize,
    strip: usize,
    bias: Option<&'a [f32]>,
    accumulate: bool,
}

impl Outputs<'_> {
    /// Where those of a later strip go.
    #[inline(always)]
    pub fn of(self, later: usize) -> Self {
        Self { strip: self.strip + later, ..self }
    }

    /// Puts the outputs of the strip from `at` on for a row.
    #[inline(always)]
    pub fn put<L: MicroKernel>(self, l: L, row: usize, at: usize, values: L::Float) {
        let column = self.strip * TILE_ROWS + at;
        let n = L::ROWS.min(self.width.saturating_sub(column));
        if n == 0 {
            return;
        }
        // SAFETY: the strip is this task's alone, and (row, column..column + n) lies in y.
        let y = unsafe { self.y.part(row * self.width + column, n) };
        if n == L::ROWS {
            let values = match self.bias {
                Some(bias) => l.add(values, l.load(&bias[column..])),
                None => values,
            };
            return l.store(if self.accumulate { l.add(l.load(y), values) } else { values }, y);
        }
        let mut whole = [0.0; TILE_ROWS];
        l.store(values, &mut whole[..L::ROWS]);
        for (i, y) in y.iter_mut().enumerate() {
            let value = match self.bias {
                Some(bias) => whole[i] + bias[column + i],
                None => whole[i],
            };
            *y = if self.accumulate { *y + value } else { value };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::QType;
    use crate::testing::{random_matrix, sinusoid};
    use proptest::prelude::*;

    fn product(level: Level, w: &PackedMatrix, x: &QuantizedRows) -> Vec<f32> {
        let mut y = vec![0.0; x.rows() * w.rows()];
        linear_at(
            level,
            Team::get(),
            x,
            &mut [Linear { matrix: w, bias: None, y: &mut y, accumulate: false }],
            None,
            Next::default(),
        );
        y
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// All forms agree to the bit, rows do not depend on their batch, and the values are those of the exact product
        /// of the quantised activations with the dequantised weights.
        #[test]
        fn agrees_with_dequantised_weights(
            qtype in prop::sample::select(QType::ALL),
            rows in 1usize..20, out in 1usize..40, blocks in 1usize..4, outlier in any::<bool>(), seed in any::<u64>(),
        ) {
            let cols = blocks * qtype.block_values();
            let w = PackedMatrix::pack(qtype, out, cols, &random_matrix(qtype, out, cols, seed));
            let mut x = sinusoid(rows * cols, seed);
            if outlier {
                x[seed as usize % (rows * cols)] = 1000.0;
            }
            let q = QuantizedRows::of(&x, cols);
            let y = product(Level::Portable, &w, &q);
            for level in Level::all() {
                prop_assert_eq!(&product(level, &w, &q), &y, "{:?}", level);
            }
            let mut dense = vec![0.0; out * cols];
            w.dequantize(0, &mut dense);
            // NF4's numbers are multiplied as integers of two bytes.
            let rounding = if qtype == QType::NF4 { 2e-5 } else { 0.0 };
            for row in 0..rows {
                let alone = product(Level::best(), &w, &QuantizedRows::of(&x[row * cols..][..cols], cols));
                prop_assert_eq!(&alone[..], &y[row * out..][..out]);
                for column in 0..out {
                    let terms = (0..cols).map(|i| q.value(row, i) * f64::from(dense[column * cols + i]));
                    let (want, size) = terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
                    let largest = dense[column * cols..][..cols].iter().fold(0.0f32, |a, b| a.max(b.abs()));
                    let inputs: f64 = (0..cols).map(|i| q.value(row, i).abs()).sum();
                    let most = 1e-5 * size + 1e-5 + rounding * f64::from(largest) * inputs;
                    prop_assert!((f64::from(y[row * out + column]) - want).abs() <= most);
                }
            }
        }

        /// Several layers of one input in one call, on top of what is there or with a bias.
        #[test]
        fn layers_share_an_input(rows in 1usize..6, first in 1usize..70, second in 1usize..40, seed in any::<u64>()) {
            let matrices = [first, second].map(|out| PackedMatrix::pack(QType::Q4_1, out, 64, &random_matrix(QType::Q4_1, out, 64, seed)));
            let q = QuantizedRows::of(&sinusoid(rows * 64, seed), 64);
            let mut ys = [vec![2.0; rows * first], vec![0.0; rows * second]];
            let bias = sinusoid(second, seed);
            let [a, b] = &mut ys;
            linear(Team::get(), &q, &mut [
                Linear { matrix: &matrices[0], bias: None, y: a, accumulate: true },
                Linear { matrix: &matrices[1], bias: Some(&bias), y: b, accumulate: false },
            ], None, Next::default());
            let alone = matrices.each_ref().map(|w| product(Level::best(), w, &q));
            let biased = alone[1].iter().zip(bias.iter().cycle()).map(|(y, bias)| y + bias).collect::<Vec<_>>();
            prop_assert_eq!(&ys[1], &biased);
            prop_assert!(ys[0].iter().zip(&alone[0]).all(|(y, alone)| *y == 2.0 + alone));
        }
    }

    /// More rows than pass over a strip together, in whole groups, panels and the rest.
    #[test]
    fn many_rows() {
        for qtype in [QType::Q4_K, QType::Q6_K, QType::Q8_0, QType::NF4] {
            let (out, cols, rows) = (3 * TILE_ROWS + 5, 512, 2 * MAX_PASS + 2 * PANEL + 3);
            let w = PackedMatrix::pack(qtype, out, cols, &random_matrix(qtype, out, cols, 5));
            let q = QuantizedRows::of(&sinusoid(rows * cols, 7), cols);
            let y = product(Level::Portable, &w, &q);
            assert!(Level::all().all(|level| product(level, &w, &q) == y), "{qtype:?}");
        }
    }

    /// Products that are zeros though neither the scales nor the activations are.
    #[test]
    fn zeros_are_zeros() {
        for qtype in [QType::Q4_0, QType::Q8_0, QType::Q6_K, QType::Q4_K] {
            // Quants of zero: the least, or in the middle.
            let mut blocks = vec![if qtype == QType::Q4_0 { 0x88u8 } else { 0 }; qtype.row_bytes(256)];
            for block in blocks.chunks_exact_mut(qtype.block_bytes()) {
                let d = half::f16::MAX.to_le_bytes();
                match qtype {
                    QType::Q6_K => {
                        // 32 is 16 * 2, and the scales are 127.
                        block[128..192].fill(0b1010_1010);
                        block[192..208].fill(127);
                        block[208..].copy_from_slice(&d);
                    }
                    QType::Q4_K => {
                        block[..2].copy_from_slice(&d);
                        block[4..16].fill(0x3F);
                    }
                    _ => block[..2].copy_from_slice(&d),
                }
            }
            let w = PackedMatrix::pack(qtype, 1, 256, &blocks);
            let mut dense = [1.0; 256];
            w.dequantize(0, &mut dense);
            assert_eq!(dense, [0.0; 256], "{qtype:?}");
            let q = QuantizedRows::of(&[1e30; PANEL * 256], 256);
            for level in Level::all() {
                assert_eq!(product(level, &w, &q), [0.0; PANEL], "{qtype:?} {level:?}");
            }
        }
    }

    /// NF4's zeros under a large scale, and its largest numbers, whose integers' sums are the largest that there are.
    #[test]
    fn extremes_of_nf4() {
        for (codes, offset, x, want) in
            [(0x77, 6e4f32, 1e30f32, 0.0f32), (0xFF, 1.0, 1.0, 64.0), (0x00, 1.0, 1.0, -64.0)]
        {
            // A scale code of zero: the scale is the offset.
            let mut file = [offset.to_le_bytes(), 1f32.to_le_bytes()].concat();
            file.push(127);
            file.extend([codes; 32]);
            let w = PackedMatrix::pack(QType::NF4, 1, 64, &file);
            for (level, rows) in Level::all().flat_map(|level| [1, 2, PANEL].map(|rows| (level, rows))) {
                for x in [x, -x] {
                    let y = product(level, &w, &QuantizedRows::of(&vec![x; rows * 64], 64));
                    let near = |y: &f32| (y - want * x.signum()).abs() <= 1e-3 * want.abs();
                    assert!(y.iter().all(near), "{level:?} {codes} {x} {y:?}");
                }
            }
        }
    }

    /// The largest quants and activations of either sign, whose sums of bytes and products are the largest there are.
    #[test]
    fn extremes_do_not_saturate() {
        for (qtype, quant, want) in [
            (QType::Q8_0, 0x80u8, -128.0f32),
            (QType::Q8_0, 0x7F, 127.0),
            (QType::Q4_0, 0x00, -8.0),
            (QType::Q4_0, 0xFF, 7.0),
            (QType::Q4_0, 0x0F, -0.5),
        ] {
            let mut block = vec![quant; qtype.row_bytes(BLOCK)];
            block[..2].copy_from_slice(&half::f16::from_f32(1.0).to_le_bytes());
            let w = PackedMatrix::pack(qtype, 1, BLOCK, &block);
            for (x, rows, level) in Level::all().flat_map(|level| {
                [-1.0f32, 1.0].into_iter().flat_map(move |x| [1, 2, PANEL].map(move |rows| (x, rows, level)))
            }) {
                let y = product(level, &w, &QuantizedRows::of(&vec![x; rows * BLOCK], BLOCK));
                assert!(y.iter().all(|y| (y - 32.0 * want * x).abs() < 0.1), "{level:?} {qtype:?} {quant} {y:?}");
            }
        }
    }
}
