//! A strip of a matrix times rows of activations, for each kind of block: the rows of a panel share what is unpacked of
//! a tile, and their sums stay in registers.

use std::ops::Range;

use super::ahead::PrefetchPlan;
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2Maddubs, Avx512Vnni};
use super::lanes::{MicroKernel, Plain};
use super::matmul::Outputs;
use super::quantize::{Halves, PANEL, PanelBlock, QuantizedRows};
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use super::simd::{Level, unrolled};
use crate::format::float::Float;
use crate::format::{BLOCK, BlockFormat, Halved, Quants, Scaled, TILE_ROWS};

/// A strip's tiles, and the blocks of a panel of activations that they are multiplied with.
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a> {
    tiles: &'a [u8],
    panel: &'a [PanelBlock],
    halves: &'a [Halves],
    /// The first of the rows of the panel.
    first: usize,
}

/// How the tiles of a format are multiplied.
pub(crate) trait Multiply<F> {
    /// Whether it reads [`Halves`].
    const READS_HALVES: bool = false;

    /// The sums of the rows `at..at + L::ROWS` of a strip with N rows of activations, in the activations' units; P of
    /// these are multiplied side by side.
    fn sums<L: MicroKernel, const N: usize, const P: usize>(
        l: L,
        of: Operands<'_>,
        at: usize,
        ahead: &mut PrefetchPlan<'_>,
    ) -> [L::Float; N];
}

/// For blocks of integers with a scale for each 32 columns.
pub(crate) struct OneScale;

impl<F: Scaled> Multiply<F> for OneScale {
    #[inline(always)]
    fn sums<L: MicroKernel, const N: usize, const P: usize>(
        l: L,
        of: Operands<'_>,
        at: usize,
        ahead: &mut PrefetchPlan<'_>,
    ) -> [L::Float; N] {
        let mut sums = [l.zero(); N];
        for (tile, blocks) in of.tiles.chunks_exact(F::TILE_BYTES).zip(of.panel.chunks_exact(F::VALUES / BLOCK)) {
            for (b, block) in blocks.iter().enumerate() {
                ahead.fetch();
                let scale = F::scale(l, tile, b, at);
                let quants = F::quants(l, tile, b, at);
                let w = match F::QUANTS {
                    Quants::Nibbles => l.ready_nibbles::<P>(quants),
                    Quants::Fives => l.ready_fives(quants),
                    Quants::Bytes => l.ready_bytes(quants),
                };
                unrolled!(part in N by P => {
                    let from = of.first + part;
                    let t: [L::Int; P] = match F::QUANTS {
                        Quants::Nibbles => l.dot_nibbles(&w, block, from),
                        Quants::Fives => l.dot_fives(&w, block, from),
                        Quants::Bytes => l.dot_bytes(&w, block, from),
                    };
                    unrolled!(r in P => {
                        let mut sum = sums[part + r];
                        if let Some(m) = scale.m {
                            sum = l.mul_add(m, block.sum[from + r], sum);
                        }
                        sums[part + r] = l.add_product(t[r], block.shift[from + r], scale.d, sum);
                    });
                });
            }
        }
        sums
    }
}

/// For blocks of integers with a scale for each 16 columns.
pub(crate) struct TwoScales;

impl<F: Halved> Multiply<F> for TwoScales {
    const READS_HALVES: bool = true;

    #[inline(always)]
    fn sums<L: MicroKernel, const N: usize, const P: usize>(
        l: L,
        of: Operands<'_>,
        at: usize,
        ahead: &mut PrefetchPlan<'_>,
    ) -> [L::Float; N] {
        let mut sums = [l.zero(); N];
        assert_eq!(of.panel.len(), of.halves.len(), "the rows were quantised for this format");
        let panel = of.panel.chunks_exact(F::VALUES / BLOCK).zip(of.halves.chunks_exact(F::VALUES / BLOCK));
        for (tile, (blocks, halves)) in of.tiles.chunks_exact(F::TILE_BYTES).zip(panel) {
            for (b, (block, halves)) in blocks.iter().zip(halves).enumerate() {
                ahead.fetch();
                let (d, m) = F::scales(l, tile, b, at);
                let w = l.ready_halves(F::quants(l, tile, b, at), F::SHIFT);
                unrolled!(part in N by P => {
                    let from = of.first + part;
                    let t: [_; P] = l.dot_halves(&w, F::SHIFT, m.is_none().then_some(halves), block, from);
                    unrolled!(r in P => {
                        let (shift, mut sum) = (block.shift[from + r], sums[part + r]);
                        if let Some(m) = m {
                            // m0 first + m1 (sum - first).
                            sum = l.mul_add(l.sub(m[0], m[1]), halves.first_sum[from + r], sum);
                            sum = l.mul_add(m[1], block.sum[from + r], sum);
                        }
                        sum = l.add_product(t[r][0], shift, d[0], sum);
                        sums[part + r] = l.add_product(t[r][1], shift, d[1], sum);
                    });
                });
            }
        }
        sums
    }
}

/// For floats: what the activations stand for is exact in float32. Even and odd columns are summed by themselves, so
/// that a single row has two sums under way.
pub(crate) struct Floats;

impl<F: Float> Multiply<F> for Floats {
    #[inline(always)]
    fn sums<L: MicroKernel, const N: usize, const P: usize>(
        l: L,
        of: Operands<'_>,
        at: usize,
        ahead: &mut PrefetchPlan<'_>,
    ) -> [L::Float; N] {
        let mut sums = [l.zero(); N];
        for (tile, block) in of.tiles.chunks_exact(F::TILE_BYTES).zip(of.panel) {
            ahead.fetch();
            let mut x = [[0.0; BLOCK]; N];
            for (r, x) in x.iter_mut().enumerate() {
                *x = block.values(of.first + r);
            }
            let mut parts = [[l.zero(); 2]; N];
            for c in (0..BLOCK).step_by(2) {
                let (even, odd) = (F::column(l, tile, c, at), F::column(l, tile, c + 1, at));
                unrolled!(r in N => {
                    parts[r][0] = l.mul_add(even, x[r][c], parts[r][0]);
                    parts[r][1] = l.mul_add(odd, x[r][c + 1], parts[r][1]);
                });
            }
            unrolled!(r in N => {
                let [even, odd] = parts[r];
                sums[r] = l.mul_add(l.add(even, odd), block.shift[of.first + r].factor(), sums[r]);
            });
        }
        sums
    }
}

/// All outputs of a strip for rows of activations, in groups.
#[inline(always)]
fn strip<L: MicroKernel, F: BlockFormat>(
    l: L,
    tiles: &[u8],
    x: &QuantizedRows,
    rows: Range<usize>,
    mut ahead: PrefetchPlan<'_>,
    out: Outputs<'_>,
) {
    let mut row = rows.start;
    macro_rules! groups {
        ($($n:literal by $p:literal)*) => {
            $({
                const N: usize = $n;
                while N <= L::GROUP && row + N <= rows.end {
                    group::<L, F, N, $p>(l, tiles, &mut ahead, x, row, out);
                    row += N;
                }
            })*
        };
    }
    groups!(8 by 4 4 by 4 2 by 2 1 by 1);
}

/// A strip times the N rows from `row` on, which lie in one panel; the products of P of them are summed side by side.
#[inline(always)]
fn group<L: MicroKernel, F: BlockFormat, const N: usize, const P: usize>(
    l: L,
    tiles: &[u8],
    ahead: &mut PrefetchPlan<'_>,
    x: &QuantizedRows,
    row: usize,
    out: Outputs<'_>,
) {
    let of = Operands { tiles, panel: x.panel(row / PANEL), halves: x.halves(row / PANEL), first: row % PANEL };
    assert!(of.first + N <= PANEL, "the rows lie in one panel");
    for at in (0..TILE_ROWS).step_by(L::ROWS) {
        let sums = F::Kernel::sums::<L, N, P>(l, of, at, ahead);
        unrolled!(r in N => {
            out.put(l, row + r, at, l.scale(sums[r], x.unit(row + r)));
        });
    }
}

/// The tiles of a strip times some rows of activations, in the form of a level.
pub(super) fn run_strip<F: BlockFormat>(
    level: Level,
    tiles: &[u8],
    x: &QuantizedRows,
    rows: Range<usize>,
    ahead: PrefetchPlan<'_>,
    out: Outputs<'_>,
) {
    #[cfg(target_arch = "x86_64")]
    {
        type Rows = Range<usize>;
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
        fn avx512<F: BlockFormat>(
            tiles: &[u8],
            x: &QuantizedRows,
            rows: Rows,
            ahead: PrefetchPlan<'_>,
            out: Outputs<'_>,
        ) {
            // SAFETY: this function is called where the machine has what it uses.
            let proof = unsafe { Avx512::new() };
            strip::<_, F>(Avx512Vnni::new(proof), tiles, x, rows, ahead, out);
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<F: BlockFormat>(
            tiles: &[u8],
            x: &QuantizedRows,
            rows: Rows,
            ahead: PrefetchPlan<'_>,
            out: Outputs<'_>,
        ) {
            // SAFETY: this function is called where the machine has what it uses.
            let proof = unsafe { Avx2::new() };
            strip::<_, F>(Avx2Maddubs::new(proof), tiles, x, rows, ahead, out);
        }
        match level {
            // SAFETY: nobody has a level that the machine lacks.
            Level::Avx512 => unsafe { avx512::<F>(tiles, x, rows, ahead, out) },
            // SAFETY: as above.
            Level::Avx2 => unsafe { avx2::<F>(tiles, x, rows, ahead, out) },
            Level::Portable => strip::<_, F>(Plain, tiles, x, rows, ahead, out),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = level;
        strip::<_, F>(Plain, tiles, x, rows, ahead, out);
    }
}
