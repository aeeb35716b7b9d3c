//! y = x W^T for frozen W in tile order and quantised activations: products summed exactly in integers within a block, blocks summed in
//! float32 in their order. Every output is computed by itself, whatever rows and columns are computed beside it.

use super::Shared;
use super::ahead::{Ahead, Parts};
use super::lora::{Adapters, expand, expand_reads, shrink_reads};
use super::quantize::{PANEL, QuantizedRows, Shift};
use super::simd::{Level, f16_value, unrolled};
use super::team::Team;
use crate::kernels::blocks::{BLOCK, QType};
use crate::kernels::packed::{PackedMatrix, TILE_ROWS, tile_bytes};

/// Rows of activations that pass over a strip while it lies in the cache, before the next strip's turn.
const ROW_BLOCK: usize = 64;

/// Vectors of quants in a block: four columns each.
const FOURS: usize = BLOCK / 4;

/// A frozen layer and where its result goes.
pub struct Linear<'a> {
    pub matrix: &'a PackedMatrix,
    /// `[rows, matrix.rows()]`.
    pub y: &'a mut [f32],
    /// Adds to `y` in place of overwriting it.
    pub accumulate: bool,
}

/// What the next call will read.
#[derive(Debug, Clone, Copy, Default)]
pub struct Next<'a> {
    /// Its first layer.
    pub matrix: Option<&'a PackedMatrix>,
    /// What its input will be shrunk by.
    pub adapters: Option<&'a Adapters<'a>>,
}

/// y = x W^T for the layers of one input, and on top what the rows' adapters add, from the input they have shrunk (see
/// [`super::prepare`]). What comes next is fetched meanwhile.
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
    }
    let total: usize = layers.iter().map(|layer| layer.matrix.strips()).sum();
    // Enough pieces to balance, few enough that claiming one costs nothing beside it.
    let piece = (total / (8 * team.threads())).clamp(1, 32);
    let jobs: [Option<Job<'_, '_>>; MAX_LAYERS] = std::array::from_fn(|i| {
        let layer = layers.get_mut(i)?;
        let adapted = adapters.map(|(adapters, shrunk)| {
            let len = shrunk.len() / adapters.layers();
            (adapters, (i, &shrunk[i * len..][..len]))
        });
        let y = Shared(layer.y.as_mut_ptr());
        Some(Job { matrix: layer.matrix, y, accumulate: layer.accumulate, adapted })
    });
    if let Some(matrix) = next.matrix {
        team.fetch_when_idle(matrix.bytes());
    }
    team.each(total.div_ceil(piece), |i| {
        let mut ahead = Ahead::new();
        for row in (0..x.rows()).step_by(ROW_BLOCK) {
            let rows = row..x.rows().min(row + ROW_BLOCK);
            for at in i * piece..total.min((i + 1) * piece) {
                ahead.clear();
                if let Some(next) = next.adapters.filter(|_| row == 0) {
                    shrink_reads(next, at, total, &mut ahead);
                }
                let mut strip = at;
                for job in jobs.iter().flatten() {
                    if strip < job.matrix.strips() {
                        job.run(level, strip, x, rows.clone(), &mut ahead);
                        break;
                    }
                    strip -= job.matrix.strips();
                }
            }
        }
    });
}

/// Most layers of one call.
const MAX_LAYERS: usize = 4;

/// A layer as the tasks see it.
struct Job<'a, 'p> {
    matrix: &'a PackedMatrix,
    y: Shared,
    accumulate: bool,
    adapted: Option<(&'a Adapters<'p>, (usize, &'a [f32]))>,
}

impl Job<'_, '_> {
    /// One strip's outputs of some rows.
    fn run(&self, level: Level, strip: usize, x: &QuantizedRows, rows: std::ops::Range<usize>, ahead: &mut Ahead) {
        if let Some((adapters, (layer, _))) = self.adapted {
            expand_reads(adapters, layer, strip, &rows, ahead);
        }
        // A single row is through before the next strip could arrive.
        if rows.len() > 1 && strip + 1 < self.matrix.strips() {
            ahead.push(self.matrix.strip(strip + 1));
        }
        let steps = rows.len().div_ceil(PANEL) * x.cols() / BLOCK;
        let ahead = ahead.parts(steps);
        let out = Outputs { y: self.y, width: self.matrix.rows(), strip, accumulate: self.accumulate };
        match self.matrix.qtype() {
            QType::Q4_0 => run_strip::<Q4_0>(level, self.matrix, x, rows.clone(), ahead, out),
            QType::Q4_1 => run_strip::<Q4_1>(level, self.matrix, x, rows.clone(), ahead, out),
            QType::Q8_0 => run_strip::<Q8_0>(level, self.matrix, x, rows.clone(), ahead, out),
        }
        if let Some((adapters, shrunk)) = self.adapted {
            // SAFETY: this task alone touches this strip of `y`.
            unsafe { expand(level, adapters, shrunk, strip, rows, (self.y, self.matrix.rows())) };
        }
    }
}

/// Where the 16 outputs of a strip go.
#[derive(Clone, Copy)]
struct Outputs {
    y: Shared,
    width: usize,
    strip: usize,
    accumulate: bool,
}

impl Outputs {
    /// Puts the outputs of the strip from `at` on for a row.
    #[inline(always)]
    fn put<L: Lanes>(self, l: L, row: usize, at: usize, values: L::Float) {
        let column = self.strip * TILE_ROWS + at;
        let n = L::ROWS.min(self.width.saturating_sub(column));
        if n == 0 {
            return;
        }
        // SAFETY: the strip is this task's alone, and (row, column..column + n) lies in y.
        let y = unsafe { self.y.part(row * self.width + column, n) };
        if n == L::ROWS {
            return l.store(if self.accumulate { l.add(l.load(y), values) } else { values }, y);
        }
        let mut whole = [0.0; TILE_ROWS];
        l.store(values, &mut whole[..L::ROWS]);
        for (y, value) in y.iter_mut().zip(whole) {
            *y = if self.accumulate { *y + value } else { value };
        }
    }
}

/// A block format: 32 weights `d * q + m`, q from 0.
trait Format {
    const QTYPE: QType;
    /// Where the quants begin in a tile.
    const QUANTS: usize;
    /// Whether q has four bits, else eight.
    const NIBBLES: bool;
    /// m in multiples of d, where the format keeps no m.
    const OFFSET: Option<f32>;
}

struct Q4_0;
struct Q4_1;
struct Q8_0;

impl Format for Q4_0 {
    const QTYPE: QType = QType::Q4_0;
    const QUANTS: usize = 2 * TILE_ROWS;
    const NIBBLES: bool = true;
    const OFFSET: Option<f32> = Some(-8.0);
}

impl Format for Q4_1 {
    const QTYPE: QType = QType::Q4_1;
    const QUANTS: usize = 4 * TILE_ROWS;
    const NIBBLES: bool = true;
    const OFFSET: Option<f32> = None;
}

impl Format for Q8_0 {
    const QTYPE: QType = QType::Q8_0;
    const QUANTS: usize = 2 * TILE_ROWS;
    const NIBBLES: bool = false;
    const OFFSET: Option<f32> = Some(-128.0);
}

/// Some rows of a tile at a time, one a lane.
trait Lanes: Copy {
    /// Lanes; they divide [`TILE_ROWS`].
    const ROWS: usize;
    /// Rows of activations that share the unpacking of a block.
    const GROUP: usize;
    /// Four unsigned bytes a lane.
    type Bytes: Copy;
    type Int: Copy;
    type Float: Copy;

    fn zero(self) -> Self::Float;
    /// The values of `ROWS` half-precision numbers.
    fn halves(self, bytes: &[u8]) -> Self::Float;
    fn scale(self, a: Self::Float, by: f32) -> Self::Float;
    /// a * b + c, rounded once.
    fn mul_add(self, a: Self::Float, b: f32, c: Self::Float) -> Self::Float;
    /// (float(t) << shift) * d + c, the product and the sum rounded once together. The shift is added to the exponent, which costs less
    /// than to shift t; the least of numbers that makes of a zero is lost in any sum.
    fn add_product(self, t: Self::Int, shift: Shift, d: Self::Float, c: Self::Float) -> Self::Float;
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float;
    /// `ROWS` floats.
    fn load(self, from: &[f32]) -> Self::Float;
    fn store(self, a: Self::Float, out: &mut [f32]);

    /// The quants of a block, `ROWS * 4` bytes of each 64: four or eight bits.
    fn nibbles(self, quants: &[u8], at: usize) -> [Self::Bytes; FOURS];
    fn bytes(self, quants: &[u8], at: usize) -> [Self::Bytes; FOURS];
    /// The sum of the 32 products, w of at most 15 or of at most 255.
    fn dot_nibbles(self, w: &[Self::Bytes; FOURS], x: &[i8; BLOCK]) -> Self::Int;
    fn dot_bytes(self, w: &[Self::Bytes; FOURS], x: &[i8; BLOCK]) -> Self::Int;
    /// 128 * high + low.
    fn join(self, high: Self::Int, low: Self::Int) -> Self::Int;
}

/// All outputs of a strip for rows of activations, in groups.
#[inline(always)]
fn strip<L: Lanes, F: Format>(
    l: L,
    w: &PackedMatrix,
    x: &QuantizedRows,
    rows: std::ops::Range<usize>,
    mut ahead: Parts<'_>,
    out: Outputs,
) {
    let tiles = w.strip(out.strip);
    let mut row = rows.start;
    macro_rules! groups {
        ($($n:literal)*) => {
            $({
                const N: usize = $n;
                while N <= L::GROUP && row + N <= rows.end {
                    group::<L, F, N>(l, tiles, &mut ahead, x, row, out);
                    row += N;
                }
            })*
        };
    }
    groups!(8 4 2 1);
}

/// A strip times the N rows from `row` on, which lie in one panel.
#[inline(always)]
fn group<L: Lanes, F: Format, const N: usize>(
    l: L,
    tiles: &[u8],
    ahead: &mut Parts<'_>,
    x: &QuantizedRows,
    row: usize,
    out: Outputs,
) {
    let (panel, first) = (x.panel(row / PANEL), row % PANEL);
    assert!(first + N <= PANEL, "the rows lie in one panel");
    for at in (0..TILE_ROWS).step_by(L::ROWS) {
        let mut sums = [l.zero(); N];
        for (b, block) in panel.iter().enumerate() {
            let tile = &tiles[b * tile_bytes(F::QTYPE)..][..tile_bytes(F::QTYPE)];
            ahead.fetch();
            let d = l.halves(&tile[2 * at..]);
            let m = match F::OFFSET {
                Some(offset) => l.scale(d, offset),
                None => l.halves(&tile[2 * (TILE_ROWS + at)..]),
            };
            let quants = &tile[F::QUANTS..];
            let w = if F::NIBBLES { l.nibbles(quants, 4 * at) } else { l.bytes(quants, 4 * at) };
            unrolled!(r in N => {
                let r0 = first + r;
                let [high, low] = &block.quants[r0];
                let t = l.join(dot::<L, F>(l, &w, high), dot::<L, F>(l, &w, low));
                sums[r] = l.mul_add(m, block.sum[r0], sums[r]);
                sums[r] = l.add_product(t, block.shift[r0], d, sums[r]);
            });
        }
        unrolled!(r in N => {
            out.put(l, row + r, at, l.scale(sums[r], x.unit(row + r)));
        });
    }
}

#[inline(always)]
fn dot<L: Lanes, F: Format>(l: L, w: &[L::Bytes; FOURS], x: &[i8; BLOCK]) -> L::Int {
    if F::NIBBLES { l.dot_nibbles(w, x) } else { l.dot_bytes(w, x) }
}

fn run_strip<F: Format>(
    level: Level,
    w: &PackedMatrix,
    x: &QuantizedRows,
    rows: std::ops::Range<usize>,
    ahead: Parts<'_>,
    out: Outputs,
) {
    #[cfg(target_arch = "x86_64")]
    {
        type Rows = std::ops::Range<usize>;
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
        fn avx512<F: Format>(w: &PackedMatrix, x: &QuantizedRows, rows: Rows, ahead: Parts<'_>, out: Outputs) {
            strip::<_, F>(x86::Vnni, w, x, rows, ahead, out);
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<F: Format>(w: &PackedMatrix, x: &QuantizedRows, rows: Rows, ahead: Parts<'_>, out: Outputs) {
            strip::<_, F>(x86::Maddubs, w, x, rows, ahead, out);
        }
        match level {
            // SAFETY: nobody has a level that the machine lacks.
            Level::Avx512 => unsafe { avx512::<F>(w, x, rows, ahead, out) },
            // SAFETY: as above.
            Level::Avx2 => unsafe { avx2::<F>(w, x, rows, ahead, out) },
            Level::Portable => strip::<_, F>(Plain, w, x, rows, ahead, out),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = level;
        strip::<_, F>(Plain, w, x, rows, ahead, out);
    }
}

/// Any machine.
#[derive(Clone, Copy)]
struct Plain;

impl Lanes for Plain {
    const ROWS: usize = TILE_ROWS;
    const GROUP: usize = 4;
    type Bytes = [u8; 4 * TILE_ROWS];
    type Int = [i32; TILE_ROWS];
    type Float = [f32; TILE_ROWS];

    #[inline(always)]
    fn zero(self) -> Self::Float {
        [0.0; TILE_ROWS]
    }
    #[inline(always)]
    fn halves(self, bytes: &[u8]) -> Self::Float {
        std::array::from_fn(|r| f16_value(u16::from_le_bytes([bytes[2 * r], bytes[2 * r + 1]])))
    }
    #[inline(always)]
    fn scale(self, a: Self::Float, by: f32) -> Self::Float {
        a.map(|a| a * by)
    }
    #[inline(always)]
    fn mul_add(self, a: Self::Float, b: f32, c: Self::Float) -> Self::Float {
        std::array::from_fn(|r| a[r].mul_add(b, c[r]))
    }
    #[inline(always)]
    fn add_product(self, t: Self::Int, shift: Shift, d: Self::Float, c: Self::Float) -> Self::Float {
        std::array::from_fn(|r| f32::from_bits((t[r] as f32).to_bits().wrapping_add(shift.0)).mul_add(d[r], c[r]))
    }
    #[inline(always)]
    fn add(self, a: Self::Float, b: Self::Float) -> Self::Float {
        std::array::from_fn(|r| a[r] + b[r])
    }
    #[inline(always)]
    fn load(self, from: &[f32]) -> Self::Float {
        std::array::from_fn(|r| from[r])
    }
    #[inline(always)]
    fn store(self, a: Self::Float, out: &mut [f32]) {
        out.copy_from_slice(&a);
    }
    #[inline(always)]
    fn nibbles(self, quants: &[u8], at: usize) -> [Self::Bytes; FOURS] {
        std::array::from_fn(|g| {
            let shift = if g < FOURS / 2 { 0 } else { 4 };
            std::array::from_fn(|i| quants[64 * (g % (FOURS / 2)) + at + i] >> shift & 15)
        })
    }
    #[inline(always)]
    fn bytes(self, quants: &[u8], at: usize) -> [Self::Bytes; FOURS] {
        std::array::from_fn(|g| std::array::from_fn(|i| quants[64 * g + at + i]))
    }
    #[inline(always)]
    fn dot_nibbles(self, w: &[Self::Bytes; FOURS], x: &[i8; BLOCK]) -> Self::Int {
        self.dot_bytes(w, x)
    }
    #[inline(always)]
    fn dot_bytes(self, w: &[Self::Bytes; FOURS], x: &[i8; BLOCK]) -> Self::Int {
        std::array::from_fn(|r| {
            let of_four = |(w, x): (&Self::Bytes, &[i8; 4])| {
                (0..4).map(|i| i32::from(w[4 * r + i]) * i32::from(x[i])).sum::<i32>()
            };
            w.iter().zip(x.as_chunks::<4>().0).map(of_four).sum()
        })
    }
    #[inline(always)]
    fn join(self, high: Self::Int, low: Self::Int) -> Self::Int {
        std::array::from_fn(|r| 128 * high[r] + low[r])
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{BLOCK, FOURS, Lanes, Shift};

    /// Where x's bytes `4 g..4 g + 4` begin, as one integer.
    #[inline(always)]
    fn four(x: &[i8; BLOCK], g: usize) -> i32 {
        let [a, b, c, d] = x.as_chunks::<4>().0[g];
        i32::from_le_bytes([a as u8, b as u8, c as u8, d as u8])
    }

    // SAFETY of all blocks below: these types are used only within functions that enable the features they need, and every load is from
    // a slice that was cut to its length.

    /// AVX-512 with VNNI: 16 lanes, 64 products an instruction.
    #[derive(Clone, Copy)]
    pub struct Vnni;

    impl Lanes for Vnni {
        const ROWS: usize = 16;
        const GROUP: usize = 8;
        type Bytes = __m512i;
        type Int = __m512i;
        type Float = __m512;

        #[inline(always)]
        fn zero(self) -> __m512 {
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        fn halves(self, bytes: &[u8]) -> __m512 {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bytes[..32].as_ptr().cast())) }
        }
        #[inline(always)]
        fn scale(self, a: __m512, by: f32) -> __m512 {
            unsafe { _mm512_mul_ps(a, _mm512_set1_ps(by)) }
        }
        #[inline(always)]
        fn mul_add(self, a: __m512, b: f32, c: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, _mm512_set1_ps(b), c) }
        }
        #[inline(always)]
        fn add_product(self, t: __m512i, shift: Shift, d: __m512, c: __m512) -> __m512 {
            unsafe {
                let t = _mm512_castps_si512(_mm512_cvtepi32_ps(t));
                let t = _mm512_add_epi32(t, _mm512_set1_epi32(shift.0 as i32));
                _mm512_fmadd_ps(_mm512_castsi512_ps(t), d, c)
            }
        }
        #[inline(always)]
        fn add(self, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        fn load(self, from: &[f32]) -> __m512 {
            unsafe { _mm512_loadu_ps(from[..16].as_ptr()) }
        }
        #[inline(always)]
        fn store(self, a: __m512, out: &mut [f32]) {
            unsafe { _mm512_storeu_ps(out[..16].as_mut_ptr(), a) }
        }
        #[inline(always)]
        fn nibbles(self, quants: &[u8], at: usize) -> [__m512i; FOURS] {
            let quants = quants[at..at + 4 * 64].as_ptr().cast::<__m512i>();
            unsafe {
                let mask = _mm512_set1_epi8(15);
                let mut w = [mask; FOURS];
                for g in 0..4 {
                    let both = _mm512_loadu_si512(quants.add(g));
                    w[g] = _mm512_and_si512(both, mask);
                    w[g + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(both), mask);
                }
                w
            }
        }
        #[inline(always)]
        fn bytes(self, quants: &[u8], at: usize) -> [__m512i; FOURS] {
            let quants = quants[at..at + 8 * 64].as_ptr().cast::<__m512i>();
            unsafe {
                let mut w = [_mm512_setzero_si512(); FOURS];
                for (g, w) in w.iter_mut().enumerate() {
                    *w = _mm512_loadu_si512(quants.add(g));
                }
                w
            }
        }
        #[inline(always)]
        fn dot_nibbles(self, w: &[__m512i; FOURS], x: &[i8; BLOCK]) -> __m512i {
            self.dot_bytes(w, x)
        }
        #[inline(always)]
        fn dot_bytes(self, w: &[__m512i; FOURS], x: &[i8; BLOCK]) -> __m512i {
            unsafe {
                let mut sum = _mm512_setzero_si512();
                for (g, w) in w.iter().enumerate() {
                    sum = _mm512_dpbusd_epi32(sum, *w, _mm512_set1_epi32(four(x, g)));
                }
                sum
            }
        }
        #[inline(always)]
        fn join(self, high: __m512i, low: __m512i) -> __m512i {
            unsafe { _mm512_add_epi32(_mm512_slli_epi32::<7>(high), low) }
        }
    }

    /// AVX2: 8 lanes, 32 products an instruction, summed in pairs in int16.
    #[derive(Clone, Copy)]
    pub struct Maddubs;

    impl Lanes for Maddubs {
        const ROWS: usize = 8;
        const GROUP: usize = 4;
        type Bytes = __m256i;
        type Int = __m256i;
        type Float = __m256;

        #[inline(always)]
        fn zero(self) -> __m256 {
            unsafe { _mm256_setzero_ps() }
        }
        #[inline(always)]
        fn halves(self, bytes: &[u8]) -> __m256 {
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(bytes[..16].as_ptr().cast())) }
        }
        #[inline(always)]
        fn scale(self, a: __m256, by: f32) -> __m256 {
            unsafe { _mm256_mul_ps(a, _mm256_set1_ps(by)) }
        }
        #[inline(always)]
        fn mul_add(self, a: __m256, b: f32, c: __m256) -> __m256 {
            unsafe { _mm256_fmadd_ps(a, _mm256_set1_ps(b), c) }
        }
        #[inline(always)]
        fn add_product(self, t: __m256i, shift: Shift, d: __m256, c: __m256) -> __m256 {
            unsafe {
                let t = _mm256_castps_si256(_mm256_cvtepi32_ps(t));
                let t = _mm256_add_epi32(t, _mm256_set1_epi32(shift.0 as i32));
                _mm256_fmadd_ps(_mm256_castsi256_ps(t), d, c)
            }
        }
        #[inline(always)]
        fn add(self, a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        fn load(self, from: &[f32]) -> __m256 {
            unsafe { _mm256_loadu_ps(from[..8].as_ptr()) }
        }
        #[inline(always)]
        fn store(self, a: __m256, out: &mut [f32]) {
            unsafe { _mm256_storeu_ps(out[..8].as_mut_ptr(), a) }
        }
        #[inline(always)]
        fn nibbles(self, quants: &[u8], at: usize) -> [__m256i; FOURS] {
            let quants = quants[at..at + 3 * 64 + 32].as_ptr();
            unsafe {
                let mask = _mm256_set1_epi8(15);
                let mut w = [mask; FOURS];
                for g in 0..4 {
                    let both = _mm256_loadu_si256(quants.add(64 * g).cast());
                    w[g] = _mm256_and_si256(both, mask);
                    w[g + 4] = _mm256_and_si256(_mm256_srli_epi16::<4>(both), mask);
                }
                w
            }
        }
        #[inline(always)]
        fn bytes(self, quants: &[u8], at: usize) -> [__m256i; FOURS] {
            let quants = quants[at..at + 7 * 64 + 32].as_ptr();
            unsafe {
                let mut w = [_mm256_setzero_si256(); FOURS];
                for (g, w) in w.iter_mut().enumerate() {
                    *w = _mm256_loadu_si256(quants.add(64 * g).cast());
                }
                w
            }
        }
        #[inline(always)]
        fn dot_nibbles(self, w: &[__m256i; FOURS], x: &[i8; BLOCK]) -> __m256i {
            unsafe {
                // A lane's two halves each sum 16 products of at most 15 * 127: 30,480.
                let mut sum = _mm256_setzero_si256();
                for (g, w) in w.iter().enumerate() {
                    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(*w, _mm256_set1_epi32(four(x, g))));
                }
                _mm256_madd_epi16(sum, _mm256_set1_epi16(1))
            }
        }
        #[inline(always)]
        fn dot_bytes(self, w: &[__m256i; FOURS], x: &[i8; BLOCK]) -> __m256i {
            unsafe {
                // As two nibbles: int16 would not hold products of 255.
                let mask = _mm256_set1_epi8(15);
                let (mut low, mut high) = (*w, *w);
                for g in 0..FOURS {
                    low[g] = _mm256_and_si256(w[g], mask);
                    high[g] = _mm256_and_si256(_mm256_srli_epi16::<4>(w[g]), mask);
                }
                let (low, high) = (self.dot_nibbles(&low, x), self.dot_nibbles(&high, x));
                _mm256_add_epi32(_mm256_slli_epi32::<4>(high), low)
            }
        }
        #[inline(always)]
        fn join(self, high: __m256i, low: __m256i) -> __m256i {
            unsafe { _mm256_add_epi32(_mm256_slli_epi32::<7>(high), low) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{random_matrix, wave};
    use proptest::prelude::*;

    fn product(level: Level, w: &PackedMatrix, x: &QuantizedRows) -> Vec<f32> {
        let mut y = vec![0.0; x.rows() * w.rows()];
        linear_at(
            level,
            Team::get(),
            x,
            &mut [Linear { matrix: w, y: &mut y, accumulate: false }],
            None,
            Next::default(),
        );
        y
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// All forms agree to the bit, rows do not depend on their batch, and the values are those of the exact product of the quantised
        /// activations with the dequantised weights.
        #[test]
        fn agrees_with_dequantised_weights(
            qtype in prop::sample::select(vec![QType::Q4_0, QType::Q4_1, QType::Q8_0]),
            rows in 1usize..20, out in 1usize..40, blocks in 1usize..6, outlier in any::<bool>(), seed in any::<u64>(),
        ) {
            let cols = blocks * BLOCK;
            let w = PackedMatrix::pack(qtype, out, cols, &random_matrix(qtype, out, cols, seed));
            let mut x = wave(rows * cols, seed);
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
            for row in 0..rows {
                let alone = product(Level::best(), &w, &QuantizedRows::of(&x[row * cols..][..cols], cols));
                prop_assert_eq!(&alone[..], &y[row * out..][..out]);
                for column in 0..out {
                    let terms = (0..cols).map(|i| q.value(row, i) * f64::from(dense[column * cols + i]));
                    let (want, size) = terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
                    prop_assert!((f64::from(y[row * out + column]) - want).abs() <= 1e-5 * size + 1e-5);
                }
            }
        }

        /// Several layers of one input in one call, on top of what is there.
        #[test]
        fn layers_share_an_input(rows in 1usize..6, first in 1usize..70, second in 1usize..40, seed in any::<u64>()) {
            let matrices = [first, second].map(|out| PackedMatrix::pack(QType::Q4_1, out, 64, &random_matrix(QType::Q4_1, out, 64, seed)));
            let q = QuantizedRows::of(&wave(rows * 64, seed), 64);
            let mut ys = [vec![2.0; rows * first], vec![0.0; rows * second]];
            let [a, b] = &mut ys;
            linear(Team::get(), &q, &mut [
                Linear { matrix: &matrices[0], y: a, accumulate: true },
                Linear { matrix: &matrices[1], y: b, accumulate: false },
            ], None, Next::default());
            let alone = matrices.each_ref().map(|w| product(Level::best(), w, &q));
            prop_assert_eq!(&ys[1], &alone[1]);
            prop_assert!(ys[0].iter().zip(&alone[0]).all(|(y, alone)| *y == 2.0 + alone));
        }
    }

    #[test]
    fn extreme_weights_do_not_saturate() {
        for (qtype, quant, want) in
            [(QType::Q8_0, 0x80u8, -128.0f32), (QType::Q8_0, 0x7F, 127.0), (QType::Q4_0, 0xFF, 7.0)]
        {
            let mut block = vec![quant; qtype.row_bytes(BLOCK)];
            block[..2].copy_from_slice(&half::f16::from_f32(1.0).to_le_bytes());
            let w = PackedMatrix::pack(qtype, 1, BLOCK, &block);
            for level in Level::all() {
                let y = product(level, &w, &QuantizedRows::of(&[-1.0; BLOCK], BLOCK));
                assert!((y[0] + 32.0 * want).abs() < 0.1, "{level:?} {qtype:?} {}", y[0]);
            }
        }
    }
}
