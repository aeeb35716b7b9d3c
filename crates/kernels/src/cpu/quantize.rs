//! Activations for the quantised matmul: each row by itself, in 15 bits as two bytes a value, with one unit for the row
//! and a shift for each block of 32.
//!
//! A block's values are `unit * (128 * high + low) << shift`: a block without large values keeps finer steps than the
//! row's largest would leave it, and the matmul still adds all of a row's blocks up in one unit. Not one byte a value:
//! a few huge activations take the range of their block, and what that does to log-probabilities the parity gate takes
//! for an adapter that is served otherwise than it was trained (`docs/LOG.md`).

use super::simd::{LANES, Level, Simd, dispatch};
use crate::format::{BLOCK, QType};

/// The largest quantised value: a high byte of at most 112, to which a quant of four bits can be added within a byte.
const LARGEST: f32 = 112.0 * 128.0;

/// The largest shift, that of the row's largest values.
const MAX_SHIFT: u32 = 4;

/// Rows whose largest magnitude is less are taken for zeros: their unit's inverse would be no number.
const SMALLEST: f32 = 1e-30;

/// Rows of a panel.
pub(super) const PANEL: usize = 8;

/// A block of 32 columns of a panel's rows, as the matmul reads them: one stream of memory for all of its rows. What only
/// some formats read lies elsewhere, in [`Halves`]: a panel of many columns just fits a core's first cache.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct PanelBlock {
    /// Of each row the high bytes and the low ones, which have no sign.
    pub quants: [[[i8; BLOCK]; 2]; PANEL],
    pub shift: [Shift; PANEL],
    /// The sum of the block's values, in the row's unit.
    pub sum: [f32; PANEL],
    /// The sum of the block's values before the shift, negative: what a product with quants that are 128 too large has
    /// too much, in high bytes.
    pub less: [i32; PANEL],
    /// See [`Split::pairs`](super::simd::Split::pairs).
    pub pairs: [i32; PANEL],
}

/// What formats with a scale for each half of a block need to know of a [`PanelBlock`] beside it.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct Halves {
    /// The sum of the first half's values, in the row's unit.
    pub first_sum: [f32; PANEL],
    /// As [`PanelBlock::less`], of each half.
    pub less: [[i32; PANEL]; 2],
}

/// A row's block as integers of two bytes, before the shift.
pub(crate) type RowWords = [i16; BLOCK];

/// The [`RowWords`] of a [`PanelBlock`]'s rows, for formats that read them in place of its bytes.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct PanelWords(pub [RowWords; PANEL]);

/// Rows of an [`AmxBlock`].
pub(super) const AMX_ROWS: usize = 16;

/// Rows from which on AMX multiplies them: with fewer the weights take longer to come and to be unpacked than products
/// take by any instructions.
const AMX_FROM: usize = 5;

/// A bfloat16 number's bits.
pub(super) type Bf16 = u16;

/// A block of 32 columns of 16 rows, as AMX takes them.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct AmxBlock {
    /// 128 times the high bytes, then the low ones, all shifted as the block is. Of four columns the second and the third
    /// have changed places: in a vector of weights, four columns of each row, the even bytes are together at hand, and
    /// the odd ones.
    pub parts: [[[Bf16; BLOCK]; AMX_ROWS]; 2],
    /// As [`PanelBlock::sum`].
    pub sum: [f32; AMX_ROWS],
    /// As [`Halves::first_sum`].
    pub first_sum: [f32; AMX_ROWS],
}

/// A power of two, as what is to be added to a float's bits for a multiplication by it: the exponent in its place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Shift(pub u32);

impl Shift {
    /// The power of two.
    #[inline(always)]
    pub fn factor(self) -> f32 {
        f32::from_bits((127 << EXPONENT) + self.0)
    }
}

/// Where a float's exponent begins.
const EXPONENT: u32 = 23;

impl PanelBlock {
    /// A row's values, before the shift.
    #[inline(always)]
    pub fn values(&self, row: usize) -> [f32; BLOCK] {
        let [high, low] = &self.quants[row];
        let mut values = [0.0; BLOCK];
        for ((value, high), low) in values.iter_mut().zip(high).zip(low) {
            *value = (128 * i32::from(*high) + i32::from(*low)) as f32;
        }
        values
    }
}

const EMPTY: PanelBlock = PanelBlock {
    quants: [[[0; BLOCK]; 2]; PANEL],
    shift: [Shift(0); PANEL],
    sum: [0.0; PANEL],
    less: [0; PANEL],
    pairs: [0; PANEL],
};

const NO_AMX_BLOCK: AmxBlock =
    AmxBlock { parts: [[[0; BLOCK]; AMX_ROWS]; 2], sum: [0.0; AMX_ROWS], first_sum: [0.0; AMX_ROWS] };

const NO_WORDS: PanelWords = PanelWords([[0; BLOCK]; PANEL]);

const NO_HALVES: Halves = Halves { first_sum: [0.0; PANEL], less: [[0; PANEL]; 2] };

/// Quantised rows `[rows, cols]`, in panels of 8 rows, the last one filled up.
#[derive(Debug)]
pub struct QuantizedRows {
    rows: usize,
    blocks: usize,
    /// `[panels, blocks]`, and what an earlier use had more.
    panels: Vec<PanelBlock>,
    /// As many, where formats that read them are among those that the rows are multiplied with.
    halves: Option<Vec<Halves>>,
    /// As `halves`.
    words: Option<Vec<PanelWords>>,
    /// `[groups of 16 rows, blocks]`, where the machine has AMX and there are rows enough for it.
    amx: Vec<AmxBlock>,
    has_amx_blocks: bool,
    /// Of each row.
    units: Vec<f32>,
}

/// All rows, to be written by several threads, each its own.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowWriter {
    rows: usize,
    blocks: usize,
    panels: *mut PanelBlock,
    halves: Option<*mut Halves>,
    words: Option<*mut PanelWords>,
    amx: Option<*mut AmxBlock>,
    units: *mut f32,
}

// SAFETY: `write` is unsafe and asks that no two threads write the same row.
unsafe impl Send for RowWriter {}
// SAFETY: as above.
unsafe impl Sync for RowWriter {}

impl QuantizedRows {
    /// Returns room for rows that are multiplied with matrices of some formats.
    pub fn new(formats: impl IntoIterator<Item = QType>) -> Self {
        let (mut halves, mut words) = (None, None);
        for format in formats {
            halves = halves.or(format.reads_halves().then(Vec::new));
            words = words.or(format.reads_words().then(Vec::new));
        }
        Self {
            rows: 0,
            blocks: 0,
            panels: Vec::new(),
            halves,
            words,
            amx: Vec::new(),
            has_amx_blocks: false,
            units: Vec::new(),
        }
    }

    /// Makes room for `rows` rows, reusing the buffers. `cols` is a multiple of 32.
    pub(super) fn resize(&mut self, rows: usize, cols: usize) -> RowWriter {
        let blocks = cols / BLOCK;
        (self.rows, self.blocks) = (rows, blocks);
        let count = rows.div_ceil(PANEL) * blocks;
        let panels = with_room(&mut self.panels, count, EMPTY);
        let halves = self.halves.as_mut().map(|halves| with_room(halves, count, NO_HALVES));
        let words = self.words.as_mut().map(|words| with_room(words, count, NO_WORDS));
        self.has_amx_blocks = takes_amx(rows);
        let amx = self.has_amx_blocks.then(|| with_room(&mut self.amx, rows.div_ceil(AMX_ROWS) * blocks, NO_AMX_BLOCK));
        self.units.resize(rows, 0.0);
        RowWriter { rows, blocks, panels, halves, words, amx, units: self.units.as_mut_ptr() }
    }

    /// Returns the bytes that it holds, which are those of the largest use so far.
    pub fn bytes(&self) -> u64 {
        let halves = self.halves.as_ref().map_or(0, Vec::capacity) * size_of::<Halves>();
        let words = self.words.as_ref().map_or(0, Vec::capacity) * size_of::<PanelWords>();
        let blocks = self.panels.capacity() * size_of::<PanelBlock>() + self.amx.capacity() * size_of::<AmxBlock>();
        (blocks + halves + words + self.units.capacity() * size_of::<f32>()) as u64
    }

    /// Returns the bytes that `rows` rows of `cols` columns take.
    pub fn bytes_for(&self, rows: usize, cols: usize) -> u64 {
        let halves = self.halves.as_ref().map_or(0, |_| size_of::<Halves>());
        let words = self.words.as_ref().map_or(0, |_| size_of::<PanelWords>());
        let panels = rows.div_ceil(PANEL) * (size_of::<PanelBlock>() + halves + words);
        let amx = if takes_amx(rows) { rows.div_ceil(AMX_ROWS) * size_of::<AmxBlock>() } else { 0 };
        ((panels + amx) * (cols / BLOCK) + rows * size_of::<f32>()) as u64
    }

    /// Returns how many rows there are.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns how many values a row has.
    pub fn cols(&self) -> usize {
        self.blocks * BLOCK
    }

    /// The blocks of rows `8 i..8 i + 8`.
    #[inline(always)]
    pub(super) fn panel(&self, i: usize) -> &[PanelBlock] {
        &self.panels[i * self.blocks..][..self.blocks]
    }

    /// What belongs to [`QuantizedRows::panel`]; none where no format reads it.
    #[inline(always)]
    pub(super) fn halves(&self, i: usize) -> &[Halves] {
        self.halves.as_ref().map_or(&[], |halves| &halves[i * self.blocks..][..self.blocks])
    }

    /// As [`QuantizedRows::halves`].
    #[inline(always)]
    pub(super) fn words(&self, i: usize) -> &[PanelWords] {
        self.words.as_ref().map_or(&[], |words| &words[i * self.blocks..][..self.blocks])
    }

    /// Whether there are [`QuantizedRows::amx_blocks`].
    #[inline(always)]
    pub(super) fn has_amx_blocks(&self) -> bool {
        self.has_amx_blocks
    }

    /// The blocks of rows `16 i..16 i + 16`.
    #[inline(always)]
    pub(super) fn amx_blocks(&self, i: usize) -> &[AmxBlock] {
        &self.amx[i * self.blocks..][..self.blocks]
    }

    #[inline(always)]
    pub(super) fn unit(&self, row: usize) -> f32 {
        self.units[row]
    }
}

/// Whether AMX multiplies so many rows.
fn takes_amx(rows: usize) -> bool {
    Level::best() == Level::Amx && rows >= AMX_FROM
}

/// Where `count` items begin. There may be more: steps with few and with many columns take turns, and what is given up
/// would have to be cleared again.
fn with_room<T: Copy>(items: &mut Vec<T>, count: usize, empty: T) -> *mut T {
    if items.len() < count {
        // As many as there are, and not the double as a growing list takes.
        items.reserve_exact(count - items.len());
        items.resize(count, empty);
    }
    items.as_mut_ptr()
}

impl RowWriter {
    /// Quantises `x` as row `row`.
    ///
    /// # Safety
    /// The rows this was made of are alive, and nobody else reads or writes this one.
    pub unsafe fn write(&self, row: usize, x: &[f32]) {
        // SAFETY: the caller vouches for it.
        unsafe { self.write_at(Level::best(), row, x) };
    }

    /// # Safety
    /// As of [`RowWriter::write`].
    unsafe fn write_at(&self, level: Level, row: usize, x: &[f32]) {
        assert!(row < self.rows && x.len() == self.blocks * BLOCK, "a row fits");
        // SAFETY: the row lies within the panels and the units, which were made for `rows` rows, and is ours.
        let to = unsafe {
            Place {
                blocks: self.panels.add(row / PANEL * self.blocks),
                halves: self.halves.map(|halves| halves.add(row / PANEL * self.blocks)),
                words: self.words.map(|words| words.add(row / PANEL * self.blocks)),
                amx: self.amx.map(|amx| amx.add(row / AMX_ROWS * self.blocks)),
                row,
                unit: &mut *self.units.add(row),
            }
        };
        dispatch!(level, quantize, x: &[f32], to: Place<'_>);
    }
}

/// Where a quantised row goes: the blocks of its panel and what belongs to them, and those of its group, in which this
/// row's places alone are ours.
struct Place<'a> {
    blocks: *mut PanelBlock,
    halves: Option<*mut Halves>,
    words: Option<*mut PanelWords>,
    amx: Option<*mut AmxBlock>,
    row: usize,
    unit: &'a mut f32,
}

#[inline(always)]
fn quantize<S: Simd>(s: S, x: &[f32], to: Place<'_>) {
    let (in_panel, in_group) = (to.row % PANEL, to.row % AMX_ROWS);
    let blocks = x.as_chunks::<BLOCK>().0;
    let load = |x: &[f32; BLOCK]| [0, 1].map(|half| s.load(&x.as_chunks::<LANES>().0[half]));
    let largest = blocks.iter().fold(s.splat(0.0), |largest, x| s.max_abs(largest, load(x)));
    let largest = s.largest(largest);
    let row = f32::from_bits(largest);
    let inverse = if row >= SMALLEST { LARGEST / row } else { 0.0 };
    // What is broken must not look like zeros.
    *to.unit = if row.is_finite() { row / LARGEST / (1 << MAX_SHIFT) as f32 } else { f32::NAN };
    for (b, x) in blocks.iter().enumerate() {
        let x = load(x);
        let own = s.largest(s.max_abs(s.splat(0.0), x));
        // How often the block's largest value can be doubled within the row's: the difference of the exponents, less
        // one where the mantissa is larger.
        let finer = ((largest - own) >> EXPONENT).min(MAX_SHIFT);
        let by = inverse * f32::from_bits((127 + finer) << EXPONENT);
        let shift = MAX_SHIFT - finer;
        // SAFETY: the panel and the group have as many blocks as the row, and within them the row's places are ours.
        unsafe {
            let block = to.blocks.add(b);
            let quants = &mut (*block).quants[in_panel];
            let [high, low] = quants;
            let split = s.split(x, by, high, low);
            let (sum, first_sum) = ((split.sum << shift) as f32, (split.first_sum << shift) as f32);
            (*block).shift[in_panel] = Shift(shift << EXPONENT);
            (*block).sum[in_panel] = sum;
            (*block).less[in_panel] = -split.sum;
            (*block).pairs[in_panel] = split.pairs;
            if let Some(halves) = to.halves {
                let halves = halves.add(b);
                (*halves).first_sum[in_panel] = first_sum;
                (*halves).less[0][in_panel] = -split.first_sum;
                (*halves).less[1][in_panel] = split.first_sum - split.sum;
            }
            if let Some(words) = to.words {
                (*words.add(b)).0[in_panel] = joined(quants);
            }
            if let Some(amx) = to.amx {
                let amx = amx.add(b);
                (*amx).parts[0][in_group] = widened(&quants[0], 7 + shift);
                (*amx).parts[1][in_group] = widened(&quants[1], shift);
                (*amx).sum[in_group] = sum;
                (*amx).first_sum[in_group] = first_sum;
            }
        }
    }
}

/// High and low bytes as the integers that they are.
#[inline(always)]
fn joined([high, low]: &[[i8; BLOCK]; 2]) -> RowWords {
    let mut words = [0; BLOCK];
    for ((word, high), low) in words.iter_mut().zip(high).zip(low) {
        *word = 128 * i16::from(*high) + i16::from(*low);
    }
    words
}

/// Some bytes of a block, shifted, as a row of [`AmxBlock::parts`].
#[inline(always)]
fn widened(bytes: &[i8; BLOCK], shift: u32) -> [Bf16; BLOCK] {
    let power = (1u32 << shift) as f32;
    let mut row = [0; BLOCK];
    for (place, byte) in row.iter_mut().zip(bytes) {
        *place = ((f32::from(*byte) * power).to_bits() >> 16) as Bf16;
    }
    for [_, second, third, _] in row.as_chunks_mut::<4>().0 {
        std::mem::swap(second, third);
    }
    row
}

#[cfg(test)]
impl QuantizedRows {
    /// Quantises whole rows on this thread, for any format.
    pub fn of(x: &[f32], cols: usize) -> Self {
        let mut q = Self::new(QType::ALL.iter().copied());
        let writer = q.resize(x.len() / cols, cols);
        // SAFETY: the rows are alive and written one by one.
        x.chunks_exact(cols).enumerate().for_each(|(row, x)| unsafe { writer.write(row, x) });
        q
    }

    /// The value that a place stands for.
    pub fn value(&self, row: usize, col: usize) -> f64 {
        let block = &self.panel(row / PANEL)[col / BLOCK];
        let [high, low] = block.quants[row % PANEL].map(|part| i64::from(part[col % BLOCK]));
        f64::from(self.unit(row)) * ((128 * high + low) << (block.shift[row % PANEL].0 >> EXPONENT)) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_forms_give_the_same_numbers() {
        let mut sound: Vec<f32> = (0..320).map(|i| (i as f32 * 1.7).sin() * (i as f32 / 40.0).exp()).collect();
        sound[130] = 1e-40;
        sound[200..260].fill(0.0);
        let mut broken = sound.clone();
        (broken[3], broken[70]) = (f32::NAN, f32::INFINITY);
        let tiny: Vec<f32> = sound.iter().map(|x| x * 1e-38).collect();
        let quantized = |level, x: &[f32]| {
            let mut q = QuantizedRows::new(QType::ALL.iter().copied());
            let writer = q.resize(PANEL + 2, 320);
            // SAFETY: the rows are alive and written one by one.
            [1, PANEL + 1].into_iter().for_each(|row| unsafe { writer.write_at(level, row, x) });
            let row = |row: usize| {
                let own = |((block, halves), words): ((&PanelBlock, &Halves), &PanelWords)| {
                    let sums = (block.sum[1], halves.first_sum[1], block.less[1], halves.less.map(|half| half[1]));
                    (block.quants[1], words.0[1], block.shift[1], sums, block.pairs[1])
                };
                let amx =
                    q.amx.iter().map(|block| (block.parts.map(|part| part[row]), block.sum[row], block.first_sum[row]));
                // The quants of a row whose unit is not a number are anything.
                let unit = q.unit(row);
                (!unit.is_nan()).then(|| {
                    let panels = q.panel(row / PANEL).iter().zip(q.halves(row / PANEL)).zip(q.words(row / PANEL));
                    let panels = panels.map(own).collect::<Vec<_>>();
                    (unit, panels, amx.collect::<Vec<_>>())
                })
            };
            assert_eq!(row(1), row(PANEL + 1), "the same row wherever it lies");
            row(1)
        };
        assert_eq!(quantized(Level::Portable, &broken), None);
        for (level, x) in Level::all().flat_map(|level| [&sound, &broken, &tiny].map(|x| (level, x))) {
            assert_eq!(quantized(level, x), quantized(Level::Portable, x), "{level:?}");
        }
    }

    /// A block's step is at most twice what its own largest value would ask for, and never more than a sixteenth of the
    /// row's.
    #[test]
    fn values_are_kept_to_half_a_step() {
        let mut x: Vec<f32> = (0..128).map(|i| (i as f32 * 0.7).sin()).collect();
        x[40] = -500.0;
        x[96..].iter_mut().for_each(|x| *x *= 100.0);
        let q = QuantizedRows::of(&x, 128);
        for (col, value) in x.iter().enumerate() {
            let own = x[col / BLOCK * BLOCK..][..BLOCK].iter().fold(0.0f32, |a, b| a.max(b.abs()));
            let step = f64::from((own * 2.0).clamp(500.0 / 16.0, 500.0) / LARGEST);
            assert!((q.value(0, col) - f64::from(*value)).abs() <= 0.51 * step, "{col}");
        }
    }

    /// What AMX reads of a row are the same values, each as a sum of two that are bfloat16.
    #[test]
    fn amx_reads_the_same_values() {
        let x: Vec<f32> = (0..AMX_FROM * 96).map(|i| (i as f32 * 1.7).sin() * (i as f32 / 40.0).exp()).collect();
        let q = QuantizedRows::of(&x, 96);
        assert_eq!(q.has_amx_blocks(), Level::best() == Level::Amx);
        for (row, block, col) in (0..AMX_FROM).flat_map(|row| (0..96).map(move |col| (row, col / BLOCK, col % BLOCK))) {
            let place = col / 4 * 4 + [0, 2, 1, 3][col % 4];
            if let Some(amx) = q.amx.get(block) {
                let [high, low] = amx.parts.map(|part| f32::from_bits(u32::from(part[row][place]) << 16));
                assert_eq!(f64::from(q.unit(row)) * f64::from(high + low), q.value(row, block * BLOCK + col));
            }
        }
    }

    #[test]
    fn what_is_broken_does_not_look_like_zeros() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; 64];
            x[3] = bad;
            assert!(QuantizedRows::of(&x, 64).unit(0).is_nan());
        }
        let tiny = QuantizedRows::of(&[1e-31; 64], 64);
        assert!((0..64).all(|col| tiny.value(0, col) == 0.0));
    }
}
