//! The block formats that a base's matrices may have: GGUF's, and NF4. Each has a file of its own, which says how the
//! file's blocks lie in a tile and back, their exact values, and what the matmul's inner loop reads; the list of them is
//! [`for_all_formats!`], the only place that names them all. To add a format: its file here, and its name in the list.
//!
//! A row is a run of blocks. All integers are little-endian; scales (`d`, `m`) are IEEE half precision.

#![expect(non_camel_case_types, reason = "GGUF's names of its formats")]

mod bfloat16;
mod dynamic;
pub(crate) mod float;
mod float16;
mod float32;
mod iq4_nl;
mod iq4_xs;
mod k_scales;
mod layout;
pub(crate) mod nested;
pub(crate) mod nf4;
pub(crate) mod normal_float;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
mod search;

#[cfg(test)]
mod golden;

use candle_core::quantized::GgmlDType;

use crate::cpu::lanes::{MicroKernel, WordTable};
use crate::cpu::products::Multiply;

pub use bfloat16::BF16;
pub use dynamic::DYNAMIC_CODE;
pub use float16::F16;
pub use float32::F32;
pub use iq4_nl::IQ4_NL;
pub use iq4_xs::IQ4_XS;
pub use nested::{NESTED_BLOCK, Nested, NestedScales};
pub use nf4::NF4;
pub use normal_float::{NF4_CODE, NormalFloats, dequantize_nf4, quantize_nf4};
pub use q2_k::Q2_K;
pub use q3_k::Q3_K;
pub use q4_0::Q4_0;
pub use q4_1::Q4_1;
pub use q4_k::Q4_K;
pub use q5_0::Q5_0;
pub use q5_1::Q5_1;
pub use q5_k::Q5_K;
pub use q6_k::Q6_K;
pub use q8_0::Q8_0;

/// Columns of which activations share a scale; the columns of every matrix are a multiple of it.
pub const BLOCK: usize = 32;

/// Rows of a tile.
pub const TILE_ROWS: usize = 16;

/// Vectors of quants in 32 columns of a tile: four columns each.
pub(crate) const FOURS: usize = BLOCK / 4;

/// The list of the formats: `for_all_formats!({macro} args)` calls `macro!{ args names... }`.
macro_rules! for_all_formats {
    ({$($do:tt)*} $args:tt) => {
        $($do)*! {
            $args F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS NF4
        }
    };
}

/// Writes finite values as a block.
pub(crate) type Quantizer = fn(&[f32], &mut [u8]);

/// How one format is stored and multiplied. A tile is [`TILE_ROWS`] rows by [`VALUES`](BlockFormat::VALUES) columns.
pub(crate) trait BlockFormat: Sized {
    /// GGUF's name of it, or the name that it has in papers.
    const NAME: &'static str;
    /// GGUF's number of it; of NF4, which GGUF does not have, one of ours.
    const NUMBER: u32;
    /// Values of a block, a multiple of [`BLOCK`].
    const VALUES: usize;
    /// Values of a block as GGUF counts them; tensors that are not multiplied may have rows of as few.
    const FILE_VALUES: usize = Self::VALUES;
    /// Bytes of a block.
    const BYTES: usize;
    /// Bytes of a tile.
    const TILE_BYTES: usize;
    /// Where a block has the half-precision numbers that must be finite.
    const HALVES: &'static [usize];
    /// candle's name of it, where it has one.
    const CANDLE: Option<GgmlDType> = None;
    /// Whether the GPU's kernels read it.
    const CUDA: bool = false;
    /// Whether blocks' scales are quantised themselves, with numbers that belong to the matrix (see [`NestedScales`]).
    const NESTED: bool = false;
    /// Quantises the values of a block, all finite; `None` where we do not write the format, or not block by block.
    const QUANTIZE: Option<Quantizer> = None;
    /// What a tile's sums are made by.
    type Kernel: Multiply<Self>;

    /// Puts the block of row `r` into a tile, which has zeros in its place.
    fn pack(block: &[u8], r: usize, tile: &mut [u8]);

    /// Takes the block of row `r` out of a tile.
    fn unpack(tile: &[u8], r: usize, block: &mut [u8]);

    /// The exact values of a block; of one with a nested scale in units of that.
    fn dequantize(block: &[u8], out: &mut [f32]);

    /// The exact values of a block with the nested scale that it has, if any.
    fn dequantize_nested(block: &[u8], _: Nested, out: &mut [f32]) {
        Self::dequantize(block, out);
    }

    /// Whether all numbers of a block are finite.
    fn is_sound(block: &[u8]) -> bool {
        Self::HALVES.iter().all(|at| half_at(block, *at).is_finite())
    }

    /// Makes the numbers of a block of random bytes small ones; for tests.
    fn tame(block: &mut [u8]) {
        Self::HALVES.iter().for_each(|at| block[at + 1] = block[at + 1] & 0x83 | 0x24);
    }
}

/// How quants of 32 columns are multiplied with activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Quants {
    /// From 0 to 15.
    Nibbles,
    /// From -16 to 15.
    Fives,
    /// Bytes that are 128 more than they stand for.
    Bytes,
}

/// A format of blocks of integers with a scale for each 32 columns: `d * q + m`.
pub(crate) trait Scaled: BlockFormat {
    /// What the quants are.
    const QUANTS: Quants;

    /// The quants of columns `32 b..32 b + 32` of a tile, four columns a vector, of the rows from `at` on.
    fn quants<L: MicroKernel>(l: L, tile: &[u8], b: usize, at: usize) -> [L::Bytes; FOURS];

    /// What the same columns are multiplied by.
    fn scale<L: MicroKernel>(l: L, tile: &[u8], b: usize, at: usize) -> Scale<L>;
}

/// What some rows' quants stand for: `d * q + m`.
#[derive(Clone, Copy)]
pub(crate) struct Scale<L: MicroKernel> {
    pub d: L::Float,
    /// `None` for zero.
    pub m: Option<L::Float>,
}

/// A format of blocks of integers with a scale for each 16 columns: `d * q + m`, or `d * (q - 128)`.
pub(crate) trait Halved: BlockFormat {
    /// Quants lie in the highest bits of their bytes; so many are below them, zeros.
    const SHIFT: u32;

    /// As [`Scaled::quants`].
    fn quants<L: MicroKernel>(l: L, tile: &[u8], b: usize, at: usize) -> [L::Bytes; FOURS];

    /// d, and m where 128 is not what quants are too large by, of the first and the second 16 of the same columns.
    fn scales<L: MicroKernel>(l: L, tile: &[u8], b: usize, at: usize) -> ([L::Float; 2], Option<[L::Float; 2]>);
}

/// A format of blocks of indices into a table of 16 integers of two bytes, with nested scales.
pub(crate) trait Tabled: BlockFormat {
    /// What the indices stand for. Of eight products with the integers of activations the sum fits an int32.
    const TABLE: &'static WordTable;

    /// The indices of columns `8 eight..8 eight + 8` of a tile, of the rows from `at` on, as
    /// [`MicroKernel::look_up_words`] takes them.
    fn indices(tile: &[u8], eight: usize, at: usize) -> &[u8];

    /// What the block's integers are multiplied by, with the nested scales of all rows and the offset.
    fn scale<L: MicroKernel>(l: L, tile: &[u8], nested: &[f32; TILE_ROWS], offset: f32, at: usize) -> L::Float;
}

/// A half-precision number in a block.
#[inline(always)]
fn half_at(block: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The enumeration of the formats and what is asked of a format that is known at run time only.
macro_rules! define {
    (() $($format:ident)*) => {
        /// How a matrix's values are stored, by GGUF's names; NF4 is not GGUF's.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum QType {
            $(
                #[doc = concat!("Blocks of ", stringify!($format), ".")]
                $format,
            )*
        }

        impl QType {
            /// All formats.
            pub const ALL: &[Self] = &[$(Self::$format),*];
        }
    };
}
for_all_formats!({ define }());

macro_rules! pick {
    (($qtype:expr, $name:ident => $body:expr) $($format:ident)*) => {
        match $qtype {
            $($crate::format::QType::$format => {
                type $name = $crate::format::$format;
                $body
            })*
        }
    };
}
pub(crate) use pick;

/// `with_format!(qtype, F => body)`: the body with F the type of the format.
macro_rules! with_format {
    ($qtype:expr, $name:ident => $body:expr) => {
        $crate::format::for_all_formats!({$crate::format::pick} ($qtype, $name => $body))
    };
}
pub(crate) use {for_all_formats, with_format};

/// What quantising has cost.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Deviation {
    /// The sum of the squared errors.
    pub errors: f64,
    /// The sum of the squared values.
    pub squares: f64,
}

impl Deviation {
    /// The errors' root mean square over the values'.
    pub fn relative(self) -> f64 {
        if self.squares > 0.0 { (self.errors / self.squares).sqrt() } else { 0.0 }
    }
}

impl std::ops::Add for Deviation {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { errors: self.errors + other.errors, squares: self.squares + other.squares }
    }
}

/// Quantises a row of finite values to `qtype`: `row.len()` fits it, and `out` holds `qtype.row_bytes(row.len())` bytes.
/// `None` where we do not write the format (see [`QType::is_written`]).
pub fn quantize(qtype: QType, row: &[f32], out: &mut [u8]) -> Option<Deviation> {
    assert!(qtype.fits(row.len()) && out.len() == qtype.row_bytes(row.len()), "a row is whole blocks");
    with_format!(qtype, F => {
        let write = F::QUANTIZE?;
        let (mut deviation, mut values) = (Deviation::default(), [0.0; MAX_VALUES]);
        let values = &mut values[..F::VALUES];
        for (row, block) in row.chunks_exact(F::VALUES).zip(out.chunks_exact_mut(F::BYTES)) {
            write(row, block);
            F::dequantize(block, values);
            for (x, value) in row.iter().zip(&*values) {
                deviation.errors += f64::from(value - x).powi(2);
                deviation.squares += f64::from(*x).powi(2);
            }
        }
        Some(deviation)
    })
}

/// The most values of a block.
const MAX_VALUES: usize = 256;

impl QType {
    /// Whether [`quantize`] writes the format. What NF4's scales are depends on the whole matrix: it is written by
    /// [`Nf4Packer`](crate::nf4_packer::Nf4Packer).
    pub fn is_written(self) -> bool {
        with_format!(self, F => F::QUANTIZE.is_some())
    }

    /// Returns GGUF's name of it, or the name that it has in papers.
    pub fn name(self) -> &'static str {
        with_format!(self, F => F::NAME)
    }

    /// Returns its number in a file's header: GGUF's, or ours of NF4.
    pub fn number(self) -> u32 {
        with_format!(self, F => F::NUMBER)
    }

    /// Returns the format of a number in a file's header, where it is served.
    pub fn of_number(number: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|qtype| qtype.number() == number)
    }

    /// Returns the values of a block.
    pub fn block_values(self) -> usize {
        with_format!(self, F => F::VALUES)
    }

    /// Returns the bytes of a block.
    pub fn block_bytes(self) -> usize {
        with_format!(self, F => F::BYTES)
    }

    /// Returns the values and the bytes of a block in a file.
    pub fn file_block(self) -> (usize, usize) {
        with_format!(self, F => (F::FILE_VALUES, F::BYTES / (F::VALUES / F::FILE_VALUES)))
    }

    /// Returns the bytes of a tile: [`TILE_ROWS`] rows by one block.
    pub(crate) fn tile_bytes(self) -> usize {
        with_format!(self, F => F::TILE_BYTES)
    }

    /// Returns candle's name of it, where it has one.
    pub(crate) fn candle(self) -> Option<GgmlDType> {
        with_format!(self, F => F::CANDLE)
    }

    /// Whether the GPU's kernels read it.
    pub fn has_cuda_kernels(self) -> bool {
        with_format!(self, F => F::CUDA)
    }

    /// Bytes of a row of `cols` values; `cols` is a multiple of [`QType::block_values`].
    pub fn row_bytes(self, cols: usize) -> usize {
        cols / self.block_values() * self.block_bytes()
    }

    /// Whether blocks' scales are quantised by numbers that belong to the matrix.
    pub fn is_nested(self) -> bool {
        with_format!(self, F => F::NESTED)
    }

    /// Returns the bytes of what a matrix's blocks have in common, which come before its rows: the offset and the nested
    /// scales (see [`NestedScales::to_bytes`]); zero for all formats but NF4.
    pub fn nested_bytes(self, rows: usize, cols: usize) -> usize {
        if self.is_nested() { NestedScales::bytes_of(rows * (cols / self.block_values())) } else { 0 }
    }

    /// Whether the CPU's products read the halves of the activations' blocks by themselves.
    pub(crate) fn reads_halves(self) -> bool {
        with_format!(self, F => <<F as BlockFormat>::Kernel as Multiply<F>>::READS_HALVES)
    }

    /// Whether the CPU's products read the activations as integers of two bytes.
    pub(crate) fn reads_words(self) -> bool {
        with_format!(self, F => <<F as BlockFormat>::Kernel as Multiply<F>>::READS_WORDS)
    }

    /// Whether rows may have this many values.
    pub fn fits(self, cols: usize) -> bool {
        cols.is_multiple_of(self.block_values())
    }

    /// The exact values of one row: `row` holds `row_bytes(out.len())` bytes. Not for NF4, whose rows have not all that
    /// their values are made of.
    pub fn dequantize_row(self, row: &[u8], out: &mut [f32]) {
        assert!(!self.is_nested(), "the values of a row do not depend on its matrix");
        with_format!(self, F => {
            for (block, out) in row.chunks_exact(F::BYTES).zip(out.chunks_exact_mut(F::VALUES)) {
                F::dequantize(block, out);
            }
        });
    }

    /// The first of some blocks that has a number that is not finite.
    pub fn broken_block(self, blocks: &[u8]) -> Option<usize> {
        with_format!(self, F => blocks.chunks_exact(F::BYTES).position(|block| !F::is_sound(block)))
    }

    /// Makes the numbers of a block of random bytes small ones; for tests.
    pub(crate) fn tame(self, block: &mut [u8]) {
        with_format!(self, F => F::tame(block));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random_matrix;

    /// FNV-1a over the bits of the values of `random_matrix(format, 3, 1024, 11)`, which gguf-py 0.19.0 dequantised.
    const VALUES: [(QType, u64); 15] = [
        (QType::F32, 0xe510effea450376c),
        (QType::F16, 0x31416faab279b325),
        (QType::BF16, 0xb6d9900a3ac21325),
        (QType::Q4_0, 0xc5307402215a4325),
        (QType::Q4_1, 0x935961f850093725),
        (QType::Q5_0, 0x5a6d39d884cff325),
        (QType::Q5_1, 0x23e9d77ba6797625),
        (QType::Q8_0, 0x1155231a3a6fb625),
        (QType::Q2_K, 0x557ea88b05762aa5),
        (QType::Q3_K, 0x48bf1372e36ae425),
        (QType::Q4_K, 0x1c0c0a37d1ab8ec5),
        (QType::Q5_K, 0x96afd0ae193058d5),
        (QType::Q6_K, 0xd0577f9d94689d31),
        (QType::IQ4_NL, 0xe9f03520d208c4e5),
        (QType::IQ4_XS, 0xb5b15cd1f134ef87),
    ];

    #[test]
    fn values_are_those_of_another_implementation() {
        let of_gguf = QType::ALL.iter().filter(|qtype| !qtype.is_nested());
        assert!(of_gguf.eq(VALUES.iter().map(|(qtype, _)| qtype)), "every format of GGUF's has its values here");
        for (qtype, want) in VALUES {
            let file = random_matrix(qtype, 3, 1024, 11);
            let mut values = vec![0.0f32; 3 * 1024];
            for (row, values) in file.chunks_exact(qtype.row_bytes(1024)).zip(values.chunks_exact_mut(1024)) {
                qtype.dequantize_row(row, values);
            }
            let step = |hash: u64, x: &f32| (hash ^ u64::from(x.to_bits())).wrapping_mul(0x0100_0000_01b3);
            assert_eq!(values.iter().fold(0xcbf2_9ce4_8422_2325, step), want, "{qtype:?}");
        }
    }

    #[test]
    fn numbers_that_are_not_finite_are_found() {
        // Blocks of NF4 have no numbers.
        for qtype in QType::ALL.iter().copied().filter(|qtype| *qtype != QType::NF4) {
            let sound = random_matrix(qtype, 1, 1024, 3);
            assert_eq!(qtype.broken_block(&sound), None);
            let last = sound.len() / qtype.block_bytes() - 1;
            let at = with_format!(qtype, F => F::HALVES.last().copied().unwrap_or(F::BYTES - 2));
            // The sign and the exponent, all ones.
            let mut broken = sound.clone();
            broken[last * qtype.block_bytes() + at..][..2].fill(0xFF);
            assert_eq!(qtype.broken_block(&broken), Some(last), "{qtype:?}");
        }
    }

    #[test]
    fn tiles_are_hardly_larger_than_the_file() {
        for qtype in QType::ALL {
            let (tile, file) = (qtype.tile_bytes() as f64, (TILE_ROWS * qtype.block_bytes()) as f64);
            assert!((file..=1.06 * file).contains(&tile), "{qtype:?}: {tile} of {file}");
            assert_eq!(QType::of_number(qtype.number()), Some(*qtype));
        }
    }

    /// Values as weights have them: about normal, a few much larger.
    fn weights(len: usize, seed: u32) -> Vec<f32> {
        let uniform = |i: usize| crate::testing::hash(seed, i as u32) as f32 / 2.0f32.powi(32) - 0.5;
        let normal = |i: usize| (0..12).map(|k| uniform(12 * i + k)).sum::<f32>();
        (0..len).map(|i| 0.02 * normal(i) * if i % 97 == 5 { 4.0 } else { 1.0 }).collect()
    }

    fn quantized(qtype: QType, row: &[f32]) -> (Deviation, Vec<f32>) {
        let (mut bytes, mut values) = (vec![0; qtype.row_bytes(row.len())], vec![0.0; row.len()]);
        let deviation = quantize(qtype, row, &mut bytes).unwrap();
        assert_eq!(qtype.broken_block(&bytes), None);
        qtype.dequantize_row(&bytes, &mut values);
        (deviation, values)
    }

    /// The largest relative error of each format that we write.
    const ERRORS: [(QType, f64); 8] = [
        (QType::Q4_0, 0.105),
        (QType::Q4_1, 0.08),
        (QType::Q5_0, 0.052),
        (QType::Q5_1, 0.039),
        (QType::Q8_0, 0.007),
        (QType::Q4_K, 0.08),
        (QType::Q5_K, 0.04),
        (QType::Q6_K, 0.02),
    ];

    #[test]
    fn quantised_rows_are_close() {
        assert!(QType::ALL.iter().filter(|q| q.is_written()).eq(ERRORS.iter().map(|(qtype, _)| qtype)));
        for (qtype, most) in ERRORS {
            let row = weights(1 << 14, 3);
            let (deviation, values) = quantized(qtype, &row);
            let errors: f64 = row.iter().zip(&values).map(|(x, y)| f64::from(x - y).powi(2)).sum();
            assert!((deviation.errors - errors).abs() <= 1e-9 * errors);
            let error = deviation.relative();
            assert!((0.5 * most..most).contains(&error), "{qtype:?}: {error}");
            for constant in [0.0, 1e-30, 1e30, -3.0] {
                quantized(qtype, &vec![constant; 256]);
            }
        }
        assert_eq!(quantize(QType::IQ4_NL, &[0.0; 32], &mut [0; 18]), None);
    }

    #[test]
    fn representable_rows_come_back() {
        for (qtype, _) in ERRORS {
            for seed in 0..20 {
                let mut file = random_matrix(qtype, 1, 1024, seed);
                file.chunks_exact_mut(qtype.block_bytes()).for_each(|block| extremes(qtype, block));
                let mut row = vec![0.0; 1024];
                qtype.dequantize_row(&file, &mut row);
                let (deviation, values) = quantized(qtype, &row);
                assert_eq!(values, row, "{qtype:?} {}", deviation.relative());
            }
        }
    }

    /// Gives a block of random bytes what shows its scales: the least and the largest quants, and the largest scales.
    fn extremes(qtype: QType, block: &mut [u8]) {
        let positive = |block: &mut [u8]| block[1] &= 0x7F;
        match qtype {
            QType::Q4_0 => block[2] = 0,
            QType::Q5_0 => (block[2], block[6]) = (0, 0),
            QType::Q8_0 => {
                // -128 is not written.
                block[2..].iter_mut().for_each(|q| *q = (*q).max(0x81).max(1));
                block[2] = 127;
            }
            QType::Q4_1 => {
                positive(block);
                (block[4], block[5]) = (0, 0xFF);
            }
            QType::Q5_1 => {
                positive(block);
                block[4] = block[4] & 0xFC | 2;
                (block[8], block[9]) = (block[8] & 0xF0, block[9] | 15);
            }
            QType::Q4_K | QType::Q5_K => {
                positive(block);
                positive(&mut block[2..]);
                (block[4], block[8]) = (block[4] | 63, block[8] | 63);
                let from = if qtype == QType::Q4_K { 16 } else { 48 };
                (block[16], block[17]) = (0, 0xFF);
                block[from..].chunks_exact_mut(32).for_each(|part| (part[0], part[1]) = (0, 0xFF));
            }
            _ => {
                block[192] = 0x80;
                block[..192].chunks_exact_mut(16).for_each(|part| part[0] = 0);
            }
        }
    }
}
