//! Double quantisation (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3): the scales of a matrix's blocks, less
//! their mean, are quantised themselves, to 8 bits in blocks of 256 with float32 scales of their own, the nested ones.
//! Blocks are counted row by row and go on over the ends of rows.

use super::TILE_ROWS;
use super::dynamic::{DYNAMIC_CODE, dynamic_code_of};

/// Scales that share a nested scale.
pub const NESTED_BLOCK: usize = 256;

/// Bytes of a number.
const NUMBER: usize = size_of::<f32>();

/// What the scales of a matrix's blocks have in common.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NestedScales {
    /// The mean of the scales, float32.
    pub offset: f32,
    /// The nested scales, float32, one for each [`NESTED_BLOCK`] blocks.
    pub scales: Vec<f32>,
}

/// What a block's scale is made of but its code.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Nested {
    /// The block's nested scale.
    pub scale: f32,
    /// The matrix's offset.
    pub offset: f32,
}

impl Nested {
    /// Scales are what their codes stand for.
    pub(crate) const UNIT: Self = Self { scale: 1.0, offset: 0.0 };

    /// The scale that a code stands for, rounded as bitsandbytes does: the product, then the sum.
    pub fn scale_of(self, code: u8) -> f32 {
        DYNAMIC_CODE[usize::from(code)] * self.scale + self.offset
    }
}

impl NestedScales {
    /// Quantises float32 scales, all finite and not negative, to uint8 codes, into `codes`, which holds as many.
    pub fn quantize(scales: &[f32], codes: &mut [u8]) -> Self {
        let offset = mean(scales);
        let blocks = scales.chunks(NESTED_BLOCK).zip(codes.chunks_mut(NESTED_BLOCK));
        let nested = blocks.map(|(scales, codes)| {
            let largest = scales.iter().fold(0.0f32, |largest, x| largest.max((x - offset).abs()));
            let inverse = 1.0 / largest;
            let inverse = if inverse.is_finite() { inverse } else { 0.0 };
            let part = |x: &f32| ((x - offset) * inverse).clamp(-1.0, 1.0);
            codes.iter_mut().zip(scales).for_each(|(code, x)| *code = dynamic_code_of(part(x)));
            largest
        });
        Self { scales: nested.collect(), offset }
    }

    /// What belongs to a block.
    pub fn of(&self, block: usize) -> Nested {
        Nested { scale: self.scales[block / NESTED_BLOCK], offset: self.offset }
    }

    /// Returns the bytes of the numbers of a matrix of so many blocks.
    pub fn bytes_of(blocks: usize) -> usize {
        NUMBER * (1 + blocks.div_ceil(NESTED_BLOCK))
    }

    /// The numbers as little-endian float32: the offset, then the nested scales.
    pub fn to_bytes(&self) -> Vec<u8> {
        std::iter::once(&self.offset).chain(&self.scales).flat_map(|x| x.to_le_bytes()).collect()
    }

    /// The numbers of such bytes, of which there is at least one number.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        let mut numbers = bytes.as_chunks::<NUMBER>().0.iter().map(|x| f32::from_le_bytes(*x));
        Self { offset: numbers.next().unwrap_or_default(), scales: numbers.collect() }
    }

    /// Whether every scale that a code can stand for is finite.
    pub fn is_sound(&self) -> bool {
        self.scales.iter().all(|scale| (scale.abs() + self.offset.abs()).is_finite())
    }
}

/// The nested scales of a strip's rows, which begin anywhere within blocks of [`NESTED_BLOCK`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct StripScales<'a> {
    all: &'a NestedScales,
    /// The number of the first row's first block.
    first: usize,
    /// Blocks of a row.
    of_row: usize,
}

impl<'a> StripScales<'a> {
    /// Those of rows of `of_row` blocks each, from the strip `strip` on.
    pub fn new(all: &'a NestedScales, strip: usize, of_row: usize) -> Self {
        Self { all, first: strip * TILE_ROWS * of_row, of_row }
    }

    /// Those of a later strip.
    #[inline(always)]
    pub fn later(self, strips: usize) -> Self {
        Self { first: self.first + strips * TILE_ROWS * self.of_row, ..self }
    }

    /// The matrix's offset.
    #[inline(always)]
    pub fn offset(self) -> f32 {
        self.all.offset
    }

    /// The nested scale of each row's block `t`, and the block from which on another row's, or all, are others. Rows beyond
    /// the matrix's last one have zero.
    pub fn at(self, t: usize) -> ([f32; TILE_ROWS], usize) {
        let (mut scales, mut until) = ([0.0; TILE_ROWS], usize::MAX);
        for (r, scale) in scales.iter_mut().enumerate() {
            let block = self.first + r * self.of_row + t;
            *scale = self.all.scales.get(block / NESTED_BLOCK).copied().unwrap_or_default();
            until = until.min(t + NESTED_BLOCK - block % NESTED_BLOCK);
        }
        (scales, until)
    }
}

/// The mean of some numbers with the rounding of torch's sum over up to 32,768 of them (beyond, it depends on torch's
/// threads): in 8 lanes of 4 sums each, which are added up level by level so that long sums keep their last bits.
fn mean(x: &[f32]) -> f32 {
    const LANES: usize = 8;
    const SUMS: usize = 4;
    const LEVELS: usize = 4;
    type Sums = [f32; LANES * SUMS];
    fn add(to: &mut Sums, more: &Sums) {
        to.iter_mut().zip(more).for_each(|(to, more)| *to += more);
    }
    let (rows, rest) = x.as_chunks::<{ LANES * SUMS }>();
    let log = rows.len().max(2).next_power_of_two().trailing_zeros() as usize;
    let power = (log / LEVELS).max(4);
    let mut levels = [[0.0; LANES * SUMS]; LEVELS];
    for (i, row) in rows.iter().enumerate() {
        add(&mut levels[0], row);
        for level in 1..LEVELS {
            if !(i + 1).is_multiple_of(1 << (level * power)) {
                break;
            }
            let below = std::mem::replace(&mut levels[level - 1], [0.0; LANES * SUMS]);
            add(&mut levels[level], &below);
        }
    }
    let [mut all, higher @ ..] = levels;
    higher.iter().for_each(|level| add(&mut all, level));
    let (sums, _) = all.as_chunks::<LANES>();
    let (vectors, singles) = rest.as_chunks::<LANES>();
    let [mut lanes, others @ ..] = [sums[0], sums[1], sums[2], sums[3]];
    for more in vectors.iter().chain(&others) {
        lanes.iter_mut().zip(more).for_each(|(lane, more)| *lane += more);
    }
    singles.iter().chain(&lanes).sum::<f32>() / x.len().max(1) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_come_back_nearly() {
        let scales: Vec<f32> = (0..1000).map(|i| 0.1 + 0.05 * (i as f32 * 0.7).sin()).collect();
        let mut codes = vec![0; scales.len()];
        let nested = NestedScales::quantize(&scales, &mut codes);
        assert_eq!(nested.scales.len(), 4);
        for (i, (scale, code)) in scales.iter().zip(codes).enumerate() {
            assert!((nested.of(i).scale_of(code) - scale).abs() <= 0.008 * 0.05, "{i}");
        }
        assert_eq!(NestedScales::of_bytes(&nested.to_bytes()), nested);
        assert_eq!(nested.to_bytes().len(), NestedScales::bytes_of(1000));
    }

    #[test]
    fn equal_scales_are_the_offset() {
        let mut codes = [0; 300];
        let nested = NestedScales::quantize(&[0.25; 300], &mut codes);
        assert!(codes.iter().enumerate().all(|(i, code)| nested.of(i).scale_of(*code) == 0.25));
        let (tiny, nested) = ([1e-42, 3e-42], NestedScales::quantize(&[1e-42, 3e-42], &mut codes[..2]));
        assert!(tiny.iter().zip(codes).all(|(x, code)| (nested.of(0).scale_of(code) - x).abs() < 1e-41));
        assert_eq!(NestedScales::quantize(&[], &mut []), NestedScales::default());
    }

    #[test]
    fn means_are_means() {
        for len in [1, 7, 8, 33, 262, 1047, 1 << 16] {
            let x: Vec<f32> = (0..len).map(|i| 1.0 + (i % 10) as f32).collect();
            let want = x.iter().map(|x| f64::from(*x)).sum::<f64>() / len as f64;
            assert!((f64::from(mean(&x)) - want).abs() < 1e-6 * want, "{len}");
        }
    }

    #[test]
    fn numbers_that_are_not_finite_are_found() {
        let of = |offset, scale| NestedScales { offset, scales: vec![1.0, scale] };
        assert!(of(0.1, 0.2).is_sound());
        for (offset, scale) in [(f32::NAN, 1.0), (1.0, f32::INFINITY), (f32::MAX, f32::MAX), (f32::NEG_INFINITY, 0.0)] {
            assert!(!of(offset, scale).is_sound());
        }
    }

    /// Strips begin anywhere within a nested block, and rows of 300 blocks cross more than one.
    #[test]
    fn strips_have_their_own_scales() {
        for of_row in [1usize, 9, 24, 300] {
            let blocks = 37 * of_row;
            let all = NestedScales { offset: 0.0, scales: (0..blocks.div_ceil(256)).map(|i| 1.0 + i as f32).collect() };
            for strip in 0..3 {
                let (own, mut until) = (StripScales::new(&all, 0, of_row).later(strip), 0);
                let mut scales = [0.0; TILE_ROWS];
                for t in 0..of_row {
                    if t == until {
                        (scales, until) = own.at(t);
                    }
                    for (row, scale) in (TILE_ROWS * strip..37).zip(scales) {
                        assert_eq!(scale, all.of(row * of_row + t).scale, "{of_row} {row} {t}");
                    }
                }
            }
        }
    }
}
