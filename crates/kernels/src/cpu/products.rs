//! Strips of a matrix times rows of activations, for each kind of block: the rows of a panel share what is unpacked of
//! a tile, and two strips what is read of a panel.

use std::ops::Range;

use super::ahead::{PrefetchPlan, Prefetcher};
#[cfg(target_arch = "x86_64")]
use super::lanes::amx::{Amx, Exact};
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2Maddubs, Avx512Vnni};
use super::lanes::{EIGHTS, MicroKernel, Plain};
use super::matmul::Outputs;
use super::quantize::{Halves, PANEL, PanelBlock, PanelWords, QuantizedRows};
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use super::simd::{Level, unrolled};
#[cfg(target_arch = "x86_64")]
use super::tiles::{self, Unpacked};
use crate::format::float::Float;
use crate::format::nested::StripScales;
use crate::format::{BLOCK, BlockFormat, Halved, Quants, Scaled, TILE_ROWS, Tabled};

/// The tiles of S strips, and the blocks of a panel of activations that they are multiplied with.
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a, const S: usize> {
    tiles: [&'a [u8]; S],
    nested: [StripScales<'a>; S],
    panel: &'a [PanelBlock],
    halves: &'a [Halves],
    words: &'a [PanelWords],
    /// The first of the rows of the panel.
    first: usize,
}

impl<const S: usize> Operands<'_, S> {
    /// Each strip's tile `t`.
    #[inline(always)]
    fn tiles_at<F: BlockFormat>(&self, t: usize) -> [&[u8]; S] {
        let mut tiles = self.tiles;
        for tile in &mut tiles {
            *tile = &tile[t * F::TILE_BYTES..][..F::TILE_BYTES];
        }
        tiles
    }
}

/// How the tiles of a format are multiplied.
pub(crate) trait Multiply<F> {
    /// Whether it reads [`Halves`].
    const READS_HALVES: bool = false;
    /// Whether it reads [`PanelWords`].
    const READS_WORDS: bool = false;
    /// Whether two strips share what is read of a panel where the machine has room for it.
    const SIDE_BY_SIDE: bool = true;

    /// The sums of the rows `at..at + L::ROWS` of S strips with N rows of activations, in the activations' units; P of
    /// these are multiplied side by side.
    fn sums<L: MicroKernel, const N: usize, const P: usize, const S: usize>(
        l: L,
        of: Operands<'_, S>,
        at: usize,
        ahead: &mut PrefetchPlan<'_>,
    ) -> [[L::Float; N]; S];

    /// What AMX's tiles sum together; `None` where they are not used.
    #[cfg(target_arch = "x86_64")]
    const EXACT: Option<Exact> = None;

    /// Unpacks columns `32 b..32 b + 32` of a tile for them.
    #[cfg(target_arch = "x86_64")]
    fn unpack(_: Amx, _tile: &[u8], _b: usize, _to: &mut Unpacked) {}
}

/// Runs a body for N rows, P at a time. The sums of one strip stay in registers; those of more are indexed at run time,
/// which keeps them in memory, since the registers are full of quants.
macro_rules! each_part {
    ($part:ident in $n:ident by $p:ident of $s:ident => $body:block) => {
        if $s == 1 {
            unrolled!($part in $n by $p => $body);
        } else {
            for $part in (0..$n).step_by($p) $body
        }
    };
}

/// For blocks of integers with a scale for each 32 columns.
pub(crate) struct OneScale;

impl<F: Scaled> Multiply<F> for OneScale {
    #[inline(always)]
    fn sums<L: MicroKernel, const N: usize, const P: usize, const S: usize>(
        l: L,
        of: Operands<'_, S>,
        at: usize,
        ahead: &mut PrefetchPlan<'_>,
    ) -> [[L::Float; N]; S] {
        let mut sums = [[l.zero(); N]; S];
        for (t, blocks) in of.panel.chunks_exact(F::VALUES / BLOCK).enumerate() {
            let tiles = of.tiles_at::<F>(t);
            for (b, block) in blocks.iter().enumerate() {
                ahead.fetch();
                let mut scales = [F::scale(l, tiles[0], b, at); S];
                let mut w = [ready::<L, F, P>(l, tiles[0], b, at); S];
                unrolled!(s in S up to 2 => {
                    scales[s] = F::scale(l, tiles[s], b, at);
                    w[s] = ready::<L, F, P>(l, tiles[s], b, at);
                });
                each_part!(part in N by P of S => {
                    let from = of.first + part;
                    let t: [[L::Int; P]; S] = match F::QUANTS {
                        Quants::Nibbles => l.dot_nibbles(&w, block, from),
                        Quants::Fives => l.dot_fives(&w, block, from),
                        Quants::Bytes => l.dot_bytes(&w, block, from),
                    };
                    unrolled!(r in P up to 4 => {
                        unrolled!(s in S up to 2 => {
                            let mut sum = sums[s][part + r];
                            if let Some(m) = scales[s].m {
                                sum = l.mul_add(m, block.sum[from + r], sum);
                            }
                            sums[s][part + r] = l.add_product(t[s][r], block.shift[from + r], scales[s].d, sum);
                        });
                    });
                });
            }
        }
        sums
    }

    #[cfg(target_arch = "x86_64")]
    const EXACT: Option<Exact> = match F::QUANTS {
        Quants::Nibbles | Quants::Fives => Some(Exact::All),
        Quants::Bytes => Some(Exact::Bytes),
    };

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn unpack(amx: Amx, tile: &[u8], b: usize, to: &mut Unpacked) {
        let l = amx.lanes();
        let (quants, scale) = (F::quants(l, tile, b, 0), F::scale(l, tile, b, 0));
        match F::QUANTS {
            Quants::Nibbles | Quants::Fives => amx.widen_fives(quants, &mut to.weights),
            Quants::Bytes => amx.widen_bytes(quants, &mut to.weights),
        }
        l.store(scale.d, &mut to.d[0]);
        to.has_m = scale.m.is_some();
        if let Some(m) = scale.m {
            l.store(m, &mut to.m[1]);
        }
    }
}

/// For blocks of integers with a scale for each 16 columns.
pub(crate) struct TwoScales;

/// Halves of a block.
const HALVES: usize = 2;

impl<F: Halved> Multiply<F> for TwoScales {
    const READS_HALVES: bool = true;

    #[inline(always)]
    fn sums<L: MicroKernel, const N: usize, const P: usize, const S: usize>(
        l: L,
        of: Operands<'_, S>,
        at: usize,
        ahead: &mut PrefetchPlan<'_>,
    ) -> [[L::Float; N]; S] {
        let mut sums = [[l.zero(); N]; S];
        assert_eq!(of.panel.len(), of.halves.len(), "the rows were quantised for this format");
        let panel = of.panel.chunks_exact(F::VALUES / BLOCK).zip(of.halves.chunks_exact(F::VALUES / BLOCK));
        for (t, (blocks, halves)) in panel.enumerate() {
            let tiles = of.tiles_at::<F>(t);
            for (b, (block, halves)) in blocks.iter().zip(halves).enumerate() {
                ahead.fetch();
                let mut scales = [F::scales(l, tiles[0], b, at); S];
                let mut w = [l.ready_halves(F::quants(l, tiles[0], b, at), F::SHIFT); S];
                unrolled!(s in S up to 2 => {
                    scales[s] = F::scales(l, tiles[s], b, at);
                    w[s] = l.ready_halves(F::quants(l, tiles[s], b, at), F::SHIFT);
                });
                let centred = scales[0].1.is_none().then_some(halves);
                each_part!(part in N by P of S => {
                    let from = of.first + part;
                    let mut new = [[l.zero(); P]; S];
                    unrolled!(r in P up to 4 => {
                        unrolled!(s in S up to 2 => {
                            new[s][r] = sums[s][part + r];
                            if let Some(m) = scales[s].1 {
                                // m0 first + m1 (sum - first).
                                let first = l.mul_add(l.sub(m[0], m[1]), halves.first_sum[from + r], new[s][r]);
                                new[s][r] = l.mul_add(m[1], block.sum[from + r], first);
                            }
                        });
                    });
                    unrolled!(half in HALVES up to 2 => {
                        let t: [[_; P]; S] = l.dot_half(half, &w, F::SHIFT, centred, block, from);
                        unrolled!(r in P up to 4 => {
                            unrolled!(s in S up to 2 => {
                                new[s][r] = l.add_product(t[s][r], block.shift[from + r], scales[s].0[half], new[s][r]);
                            });
                        });
                    });
                    unrolled!(r in P up to 4 => {
                        unrolled!(s in S up to 2 => {
                            sums[s][part + r] = new[s][r];
                        });
                    });
                });
            }
        }
        sums
    }

    #[cfg(target_arch = "x86_64")]
    const EXACT: Option<Exact> = Some(Exact::Halves);

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn unpack(amx: Amx, tile: &[u8], b: usize, to: &mut Unpacked) {
        let l = amx.lanes();
        let (d, m) = F::scales(l, tile, b, 0);
        amx.widen_highest(F::quants(l, tile, b, 0), F::SHIFT, m.is_none(), &mut to.weights);
        unrolled!(half in HALVES up to 2 => {
            l.store(d[half], &mut to.d[half]);
        });
        to.has_m = m.is_some();
        if let Some([first, second]) = m {
            l.store(l.sub(first, second), &mut to.m[0]);
            l.store(second, &mut to.m[1]);
        }
    }
}

/// For floats: what the activations stand for is exact in float32. Even and odd columns are summed by themselves, so
/// that a single row has two sums under way.
pub(crate) struct Floats;

impl<F: Float> Multiply<F> for Floats {
    #[inline(always)]
    fn sums<L: MicroKernel, const N: usize, const P: usize, const S: usize>(
        l: L,
        of: Operands<'_, S>,
        at: usize,
        ahead: &mut PrefetchPlan<'_>,
    ) -> [[L::Float; N]; S] {
        let mut sums = [[l.zero(); N]; S];
        for (t, block) in of.panel.iter().enumerate() {
            ahead.fetch();
            let tiles = of.tiles_at::<F>(t);
            let mut x = [[0.0; BLOCK]; N];
            for (r, x) in x.iter_mut().enumerate() {
                *x = block.values(of.first + r);
            }
            unrolled!(s in S up to 2 => {
                let mut parts = [[l.zero(); 2]; N];
                for c in (0..BLOCK).step_by(2) {
                    let (even, odd) = (F::column(l, tiles[s], c, at), F::column(l, tiles[s], c + 1, at));
                    unrolled!(r in N => {
                        parts[r][0] = l.mul_add(even, x[r][c], parts[r][0]);
                        parts[r][1] = l.mul_add(odd, x[r][c + 1], parts[r][1]);
                    });
                }
                unrolled!(r in N => {
                    let [even, odd] = parts[r];
                    sums[s][r] = l.mul_add(l.add(even, odd), block.shift[of.first + r].factor(), sums[s][r]);
                });
            });
        }
        sums
    }
}

/// For blocks of indices into a table of integers of two bytes, with a scale for all of a tile's columns.
///
/// AMX has no form of its own: products of two bytes by two bytes are exact in its tiles for four pairs of bytes and eight
/// columns at a time, 16 products of tiles a quarter full, which the dot products of AVX-512 are as fast as.
pub(crate) struct LookedUp;

impl<F: Tabled> Multiply<F> for LookedUp {
    const READS_WORDS: bool = true;
    const SIDE_BY_SIDE: bool = false;

    #[inline(always)]
    fn sums<L: MicroKernel, const N: usize, const P: usize, const S: usize>(
        l: L,
        of: Operands<'_, S>,
        at: usize,
        ahead: &mut PrefetchPlan<'_>,
    ) -> [[L::Float; N]; S] {
        let mut sums = [[l.zero(); N]; S];
        assert_eq!(of.panel.len(), of.words.len(), "the rows were quantised for this format");
        let (mut nested, mut until) = ([[0.0; TILE_ROWS]; S], [0; S]);
        let panel = of.panel.chunks_exact(F::VALUES / BLOCK).zip(of.words.chunks_exact(F::VALUES / BLOCK));
        for (t, (blocks, words)) in panel.enumerate() {
            let tiles = of.tiles_at::<F>(t);
            unrolled!(s in S up to 2 => {
                if t == until[s] {
                    (nested[s], until[s]) = of.nested[s].at(t);
                }
                let d = F::scale(l, tiles[s], &nested[s], of.nested[s].offset(), at);
                for (b, (block, words)) in blocks.iter().zip(words).enumerate() {
                    if s == 0 {
                        ahead.fetch();
                    }
                    let mut w = [l.look_up_words(F::indices(tiles[s], EIGHTS * b, at), F::TABLE); EIGHTS];
                    for (eight, w) in w.iter_mut().enumerate().skip(1) {
                        *w = l.look_up_words(F::indices(tiles[s], EIGHTS * b + eight, at), F::TABLE);
                    }
                    unrolled!(r in N => {
                        let t = l.dot_words(&w, &words.0[of.first + r]);
                        sums[s][r] = l.add_shifted(t, block.shift[of.first + r], d, sums[s][r]);
                    });
                }
            });
        }
        sums
    }
}

/// The tiles of one or two strips, one after the other, with the nested scales of their blocks.
#[derive(Clone, Copy)]
pub(super) struct Strips<'a> {
    pub tiles: &'a [u8],
    pub nested: StripScales<'a>,
}

/// All outputs of some strips for rows of activations, in groups.
#[inline(always)]
fn strips<L: MicroKernel, F: BlockFormat>(
    l: L,
    Strips { tiles, nested }: Strips<'_>,
    (x, rows): (&QuantizedRows, Range<usize>),
    ahead: &Prefetcher,
    out: Outputs<'_>,
) {
    let mut ahead = ahead.parts(x.cols() / BLOCK * rows.len().div_ceil(PANEL));
    let (mut row, strip_bytes) = (rows.start, x.cols() / F::VALUES * F::TILE_BYTES);
    macro_rules! groups {
        ($($n:literal by $p:literal)*) => {
            $({
                const N: usize = $n;
                while N <= L::GROUP && row + N <= rows.end {
                    for (strip, tiles) in tiles.chunks_exact(strip_bytes).enumerate() {
                        let nested = nested.later(strip);
                        group::<L, F, N, $p, 1>(l, ([tiles], [nested]), &mut ahead, x, row, out.of(strip));
                    }
                    row += N;
                }
            })*
        };
    }
    if L::STRIPS == 2 && F::Kernel::SIDE_BY_SIDE && tiles.len() == 2 * strip_bytes {
        let (one, two) = tiles.split_at(strip_bytes);
        while row + PANEL <= rows.end {
            let nested = [nested, nested.later(1)];
            group::<L, F, PANEL, 2, 2>(l, ([one, two], nested), &mut ahead, x, row, out);
            row += PANEL;
        }
    }
    groups!(8 by 4 4 by 4 2 by 2 1 by 1);
}

/// S strips times the N rows from `row` on, which lie in one panel; the products of P of them are summed side by side.
#[inline(always)]
fn group<L: MicroKernel, F: BlockFormat, const N: usize, const P: usize, const S: usize>(
    l: L,
    (tiles, nested): ([&[u8]; S], [StripScales<'_>; S]),
    ahead: &mut PrefetchPlan<'_>,
    x: &QuantizedRows,
    row: usize,
    out: Outputs<'_>,
) {
    let (i, first) = (row / PANEL, row % PANEL);
    let of = Operands { tiles, nested, panel: x.panel(i), halves: x.halves(i), words: x.words(i), first };
    assert!(of.first + N <= PANEL, "the rows lie in one panel");
    for at in (0..TILE_ROWS).step_by(L::ROWS) {
        let sums = F::Kernel::sums::<L, N, P, S>(l, of, at, ahead);
        unrolled!(s in S up to 2 => {
            unrolled!(r in N => {
                out.of(s).put(l, row + r, at, l.finish(sums[s][r], x.unit(row + r)));
            });
        });
    }
}

/// The quants of columns `32 b..32 b + 32` of a tile, of the rows from `at` on, ready for products with P rows.
#[inline(always)]
fn ready<L: MicroKernel, F: Scaled, const P: usize>(l: L, tile: &[u8], b: usize, at: usize) -> L::Quants {
    let quants = F::quants(l, tile, b, at);
    match F::QUANTS {
        Quants::Nibbles => l.ready_nibbles::<P>(quants),
        Quants::Fives => l.ready_fives(quants),
        Quants::Bytes => l.ready_bytes(quants),
    }
}

/// One or two strips times some rows of activations, in the form of a level.
pub(super) fn run_strips<F: BlockFormat>(
    level: Level,
    of: Strips<'_>,
    x: (&QuantizedRows, Range<usize>),
    ahead: &Prefetcher,
    out: Outputs<'_>,
) {
    #[cfg(target_arch = "x86_64")]
    {
        type Rows<'a> = (&'a QuantizedRows, Range<usize>);
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
        fn amx<F: BlockFormat>(of: Strips<'_>, x: Rows<'_>, ahead: &Prefetcher, out: Outputs<'_>) {
            // SAFETY: this function is called where the machine has what it uses.
            let proof = unsafe { Amx::new() };
            tiles::strips::<F>(proof, of.tiles, x, ahead, out);
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
        fn avx512<F: BlockFormat>(of: Strips<'_>, x: Rows<'_>, ahead: &Prefetcher, out: Outputs<'_>) {
            // SAFETY: this function is called where the machine has what it uses.
            let proof = unsafe { Avx512::new() };
            strips::<_, F>(Avx512Vnni::new(proof), of, x, ahead, out);
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<F: BlockFormat>(of: Strips<'_>, x: Rows<'_>, ahead: &Prefetcher, out: Outputs<'_>) {
            // SAFETY: this function is called where the machine has what it uses.
            let proof = unsafe { Avx2::new() };
            strips::<_, F>(Avx2Maddubs::new(proof), of, x, ahead, out);
        }
        let takes_tiles = F::Kernel::EXACT.is_some() && x.0.has_amx_blocks();
        match level {
            // SAFETY: nobody has a level that the machine lacks.
            Level::Amx if takes_tiles => unsafe { amx::<F>(of, x, ahead, out) },
            // SAFETY: as above.
            Level::Amx | Level::Avx512 => unsafe { avx512::<F>(of, x, ahead, out) },
            // SAFETY: as above.
            Level::Avx2 => unsafe { avx2::<F>(of, x, ahead, out) },
            Level::Portable => strips::<_, F>(Plain, of, x, ahead, out),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = level;
        strips::<_, F>(Plain, of, x, ahead, out);
    }
}
