//! AMX: tiles of up to 16 rows of 64 bytes, whose products of bfloat16 numbers are summed in float32 (Intel 64 and IA-32
//! Architectures Software Developer's Manual, volume 1, chapter 18).
//!
//! The sums are as exact as integers' would be: a quant and either byte of an activation, shifted as its block is, are
//! bfloat16 numbers, their products need no more than a float32's 24 bits, and neither do a block's sums of them (see
//! [`Exact`]). Integers' tiles would be as fast, but their sums of high and low bytes were to be shifted and added,
//! converted, and shifted again for each block, which takes longer than the products.

use std::arch::asm;
use std::arch::x86_64::*;

use super::Avx512Vnni;
use crate::cpu::quantize::{AMX_ROWS, AmxBlock, Bf16};
use crate::cpu::simd::Avx512;
use crate::format::{BLOCK, FOURS, TILE_ROWS};

/// Bytes of a tile's row.
const ROW: usize = 64;

/// The bits of a number that is one in bfloat16.
const fn bf16(n: i32) -> Bf16 {
    ((n as f32).to_bits() >> 16) as Bf16
}

/// 32 columns of 16 rows of weights as a tile: each of its rows has two columns of all of them, in the order of
/// [`AmxBlock::parts`].
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Weights([[Bf16; BLOCK]; BLOCK / 2]);

impl Weights {
    /// Zeros.
    pub const ZERO: Self = Self([[0; BLOCK]; BLOCK / 2]);
}

/// Sums of products, of each row of activations those with 16 rows of weights.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Sums([[f32; TILE_ROWS]; AMX_ROWS]);

impl Sums {
    /// Zeros.
    pub const ZERO: Self = Self([[0.0; TILE_ROWS]; AMX_ROWS]);

    /// Those of a row of activations.
    #[inline(always)]
    pub fn of_row(&self, row: usize) -> &[f32; TILE_ROWS] {
        &self.0[row]
    }
}

/// What of a block's products is summed together, so that the sums are exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exact {
    /// All of them: quants of five bits at most, 32 * 14336 * 16 < 2^24.
    All,
    /// Those of the high bytes and those of the low ones: quants of eight bits, 32 * 112 * 128 < 2^24.
    Bytes,
    /// Those of columns 0 to 15 and those of 16 to 31, which have scales of their own: quants of six bits, in
    /// steps of what is below them in a byte.
    Halves,
}

impl Exact {
    /// Sums of a block.
    pub const fn parts(self) -> usize {
        match self {
            Self::All => 1,
            Self::Bytes | Self::Halves => 2,
        }
    }
}

/// AMX with tiles of bfloat16, beside AVX-512 with VNNI.
///
/// A value of it holds the proof that the machine has the instructions and the system lets the process use them.
#[derive(Clone, Copy)]
pub struct Amx(Avx512Vnni);

impl Amx {
    /// # Safety
    /// The machine is of [`Level::Amx`](crate::cpu::simd::Level::Amx).
    #[inline(always)]
    pub unsafe fn new() -> Self {
        // SAFETY: the caller vouches for more.
        Self(Avx512Vnni::new(unsafe { Avx512::new() }))
    }

    /// The form for all else.
    #[inline(always)]
    pub fn lanes(self) -> Avx512Vnni {
        self.0
    }

    /// Quants of five bits with a sign, or of four without, whatever the upper bits of their bytes are.
    #[inline(always)]
    pub fn widen_fives(self, bytes: [__m512i; FOURS], to: &mut Weights) {
        const VALUES: [Bf16; 32] = {
            let mut values = [0; 32];
            let mut i = 0;
            while i < 32 {
                values[i] = bf16(if i < 16 { i as i32 } else { i as i32 - 32 });
                i += 1;
            }
            values
        };
        // SAFETY: `self` proves the features, and what is read lies within the array.
        unsafe {
            let values = _mm512_loadu_si512(VALUES.as_ptr().cast());
            for (g, bytes) in bytes.into_iter().enumerate() {
                let odd = _mm512_srli_epi16::<8>(bytes);
                self.put(g, [bytes, odd].map(|index| _mm512_permutexvar_epi16(index, values)), to);
            }
        }
    }

    /// Quants in the highest bits of their bytes, of which at least two below are zeros; less 128 where they are
    /// `centred`.
    #[inline(always)]
    pub fn widen_highest(self, bytes: [__m512i; FOURS], shift: u32, centred: bool, to: &mut Weights) {
        // SAFETY: `self` proves the features, and what is read lies within the arrays.
        unsafe {
            let values = steps(shift, if centred { -128 } else { 0 });
            let values = [0, 32].map(|at| _mm512_loadu_si512(values[at..].as_ptr().cast()));
            let shift = [0, 8].map(|of_byte| _mm_cvtsi32_si128(shift as i32 + of_byte));
            for (g, bytes) in bytes.into_iter().enumerate() {
                let index = shift.map(|by| _mm512_srl_epi16(bytes, by));
                self.put(g, index.map(|index| _mm512_permutex2var_epi16(values[0], index, values[1])), to);
            }
        }
    }

    /// Bytes less 128.
    #[inline(always)]
    pub fn widen_bytes(self, bytes: [__m512i; FOURS], to: &mut Weights) {
        // SAFETY: `self` proves the features.
        unsafe {
            // A byte as the last of a float32 that begins with 2^23 is so much more than 2^23.
            let (byte, power) = (_mm512_set1_epi32(0xFF), _mm512_set1_epi32(0x4B00_0000));
            let offset = _mm512_set1_ps(8_388_608.0 + 128.0);
            let value = |byte_first: __m512i| {
                const AND_OR: i32 = 0xF8;
                let float = _mm512_ternarylogic_epi32::<AND_OR>(power, byte_first, byte);
                _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(float), offset))
            };
            for (g, bytes) in bytes.into_iter().enumerate() {
                let [a, b, c, d] = [
                    value(bytes),
                    value(_mm512_srli_epi32::<8>(bytes)),
                    value(_mm512_srli_epi32::<16>(bytes)),
                    value(_mm512_srli_epi32::<24>(bytes)),
                ];
                let pair = |first, second| _mm512_or_si512(_mm512_srli_epi32::<16>(first), second);
                self.put(g, [pair(a, c), pair(b, d)], to);
            }
        }
    }

    /// Puts the even and the odd columns of the four from `4 g` on.
    #[inline(always)]
    fn put(self, g: usize, pairs: [__m512i; 2], to: &mut Weights) {
        for (pair, to) in pairs.into_iter().zip(&mut to.0[2 * g..2 * g + 2]) {
            // SAFETY: `self` proves the features, and what is written lies within the array.
            unsafe { _mm512_store_si512(to.as_mut_ptr().cast(), pair) };
        }
    }
}

/// The values of quants by their lowest six bits, in steps of what `shift` bits below them count, from `first` on; what
/// is above the quants' own bits is another's.
const fn steps(shift: u32, first: i32) -> [Bf16; 64] {
    assert!(shift >= 2 && shift < 8);
    let mut values = [0; 64];
    let mut i = 0;
    while i < 64 {
        values[i] = bf16(first + ((i as i32) << shift & 0xFF));
        i += 1;
    }
    values
}

/// This thread's tiles, set up for as long as it lives for what it says.
pub(crate) struct Tiles(Exact);

impl Tiles {
    /// Sets them up for up to `rows` rows of activations at a time.
    #[inline(always)]
    pub fn new(_: Amx, rows: usize, exact: Exact) -> Self {
        /// What `ldtilecfg` reads.
        #[repr(C, align(64))]
        struct Config {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        let columns = if exact == Exact::Halves { BLOCK / 2 } else { BLOCK };
        let (rows, depth) = (rows.min(AMX_ROWS) as u8, (columns / 2) as u8);
        let (whole, part) = (ROW as u16, (columns * size_of::<Bf16>()) as u16);
        let config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            // Four tiles of sums, two of activations, two of weights.
            row_bytes: [whole, whole, whole, whole, part, part, whole, whole, 0, 0, 0, 0, 0, 0, 0, 0],
            rows: [rows, rows, rows, rows, rows, rows, depth, depth, 0, 0, 0, 0, 0, 0, 0, 0],
        };
        // SAFETY: the proof says that there are tiles, and the sizes are within theirs.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
        Self(exact)
    }

    /// The exact sums of a block's products with the weights of S strips, into `sums`, `[parts, S]`.
    #[inline(always)]
    pub fn multiply<const S: usize>(&self, x: &AmxBlock, weights: [&Weights; S], sums: &mut [Sums]) {
        const { assert!(S == 1 || S == 2) };
        assert!(sums.len() == S * self.0.parts());
        let (x, to) = (x.parts.as_ptr(), sums.as_mut_ptr());
        let [w0, w1] = [weights[0], weights[S - 1]].map(|w| w.0.as_ptr());
        /// Both parts of the activations in tmm4 and tmm5, weights in tmm6, and what is done with what begins at `w1` and
        /// `to`.
        macro_rules! run {
            ($x:expr, $w0:expr, $w1:expr, $to:expr; $($line:literal)*) => {
                // SAFETY: there are tiles, set up so that what they read and write lies within the arrays: the parts of
                // the activations are 1 KiB apart, and so are sums.
                unsafe {
                    asm!(
                        "tileloadd tmm6, [{w0} + {row} * 1]",
                        "tileloadd tmm4, [{x} + {row} * 1]",
                        "tileloadd tmm5, [{x} + {row} * 1 + 1024]",
                        $($line,)*
                        "/* {w1} */",
                        x = in(reg) $x, w0 = in(reg) $w0, w1 = in(reg) $w1, to = in(reg) $to, row = in(reg) ROW,
                        options(nostack, preserves_flags),
                    );
                }
            };
        }
        macro_rules! one {
            ($x:expr, $w:expr, $to:expr) => {
                run! {
                    $x, $w, $w, $to;
                    "tilezero tmm0"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tdpbf16ps tmm0, tmm5, tmm6"
                    "tilestored [{to} + {row} * 1], tmm0"
                }
            };
        }
        macro_rules! two {
            ($x:expr, $w0:expr, $w1:expr, $to:expr) => {
                run! {
                    $x, $w0, $w1, $to;
                    "tileloadd tmm7, [{w1} + {row} * 1]"
                    "tilezero tmm0"
                    "tilezero tmm1"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                    "tdpbf16ps tmm0, tmm5, tmm6"
                    "tdpbf16ps tmm1, tmm5, tmm7"
                    "tilestored [{to} + {row} * 1], tmm0"
                    "tilestored [{to} + {row} * 1 + 1024], tmm1"
                }
            };
        }
        // Where the second half of the columns begins in a row of activations, and in which row of the weights.
        let (second, half) = (x.cast::<Bf16>().wrapping_add(BLOCK / 2), BLOCK / 4);
        match (self.0, S) {
            (Exact::All, 1) => one!(x, w0, to),
            (Exact::All, _) => two!(x, w0, w1, to),
            (Exact::Halves, 1) => {
                one!(x, w0, to);
                one!(second, w0.wrapping_add(half), to.wrapping_add(S));
            }
            (Exact::Halves, _) => {
                two!(x, w0, w1, to);
                two!(second, w0.wrapping_add(half), w1.wrapping_add(half), to.wrapping_add(S));
            }
            (Exact::Bytes, 1) => run! {
                x, w0, w1, to;
                "tilezero tmm0"
                "tilezero tmm1"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tdpbf16ps tmm1, tmm5, tmm6"
                "tilestored [{to} + {row} * 1], tmm0"
                "tilestored [{to} + {row} * 1 + 1024], tmm1"
            },
            (Exact::Bytes, _) => run! {
                x, w0, w1, to;
                "tileloadd tmm7, [{w1} + {row} * 1]"
                "tilezero tmm0"
                "tilezero tmm1"
                "tilezero tmm2"
                "tilezero tmm3"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tdpbf16ps tmm1, tmm4, tmm7"
                "tdpbf16ps tmm2, tmm5, tmm6"
                "tdpbf16ps tmm3, tmm5, tmm7"
                "tilestored [{to} + {row} * 1], tmm0"
                "tilestored [{to} + {row} * 1 + 1024], tmm1"
                "tilestored [{to} + {row} * 1 + 2048], tmm2"
                "tilestored [{to} + {row} * 1 + 3072], tmm3"
            },
        }
    }
}

/// Executes about `rounds` times a dozen products of tiles, which wait neither for memory nor for each other. Gives the
/// products of numbers that were summed.
pub(crate) fn products(amx: Amx, rounds: u64) -> u64 {
    const UNROLLED: u64 = 12;
    let _tiles = Tiles::new(amx, AMX_ROWS, Exact::All);
    for _ in 0..rounds {
        // SAFETY: there are tiles; zeros are as good as other numbers.
        unsafe {
            asm!(
                ".rept 3",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm5, tmm6",
                "tdpbf16ps tmm2, tmm4, tmm7",
                "tdpbf16ps tmm3, tmm5, tmm7",
                ".endr",
                options(nostack, nomem, preserves_flags),
            );
        }
    }
    rounds * UNROLLED * (AMX_ROWS * TILE_ROWS * BLOCK) as u64
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: there are tiles.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}
