//! Strips of a matrix times many rows of activations in AMX's tiles: some columns of the strips are unpacked once for
//! all rows, multiplied block by block, and the blocks' sums then added up row by row, in their order and with the
//! same operations as [`super::products`] has.

use std::cell::UnsafeCell;
use std::ops::Range;

use super::ahead::Prefetcher;
use super::lanes::amx::{Amx, Exact, Sums, Tiles, Weights};
use super::lanes::{Avx512Vnni, MicroKernel};
use super::matmul::{MAX_PASS, MAX_STRIPS, Outputs};
use super::products::Multiply;
use super::quantize::{AMX_ROWS, AmxBlock, PANEL, QuantizedRows};
use super::simd::unrolled;
use crate::format::{BLOCK, BlockFormat, TILE_ROWS};

/// Blocks that are unpacked and multiplied before they are added up: their products stay in the first cache.
const CHUNK: usize = 4;

/// Most sums of a block's products with a strip.
const MAX_PARTS: usize = 2;

/// 32 columns of a strip.
#[derive(Clone, Copy)]
pub(crate) struct Unpacked {
    pub weights: Weights,
    /// What each part of the sums is multiplied by, of each row.
    pub d: [[f32; TILE_ROWS]; MAX_PARTS],
    /// Whether there is m.
    pub has_m: bool,
    /// What the sum of the activations is multiplied by; of halves that of the first half less that of the second, then
    /// that of the second.
    pub m: [[f32; TILE_ROWS]; 2],
}

/// Where a thread keeps what it is at; nothing of it outlasts a call.
struct Scratch {
    unpacked: [[Unpacked; CHUNK]; MAX_STRIPS],
    products: [Sums; MAX_STRIPS * MAX_PARTS * CHUNK],
    /// Of each strip, of each row.
    sums: [[[f32; TILE_ROWS]; MAX_PASS]; MAX_STRIPS],
}

thread_local! {
    static SCRATCH: UnsafeCell<Scratch> = const {
        let none =
            Unpacked { weights: Weights::ZERO, d: [[0.0; TILE_ROWS]; MAX_PARTS], has_m: false, m: [[0.0; TILE_ROWS]; 2] };
        UnsafeCell::new(Scratch {
            unpacked: [[none; CHUNK]; MAX_STRIPS],
            products: [Sums::ZERO; MAX_STRIPS * MAX_PARTS * CHUNK],
            sums: [[[0.0; TILE_ROWS]; MAX_PASS]; MAX_STRIPS],
        })
    };
}

/// The outputs of one or two strips, one after the other, for some rows, [`MAX_PASS`] at most.
#[inline(always)]
pub(super) fn strips<F: BlockFormat>(
    amx: Amx,
    tiles: &[u8],
    x: (&QuantizedRows, Range<usize>),
    ahead: &Prefetcher,
    out: Outputs<'_>,
) {
    let strip_bytes = x.0.cols() / F::VALUES * F::TILE_BYTES;
    // SAFETY: it is this thread's, and nothing that is called with it comes here again.
    let scratch = unsafe { &mut *SCRATCH.with(UnsafeCell::get) };
    if tiles.len() == MAX_STRIPS * strip_bytes {
        let (one, two) = tiles.split_at(strip_bytes);
        some_strips::<F, 2>(amx, [one, two], x, ahead, out, scratch);
    } else {
        some_strips::<F, 1>(amx, [tiles], x, ahead, out, scratch);
    }
}

#[inline(always)]
fn some_strips<F: BlockFormat, const S: usize>(
    amx: Amx,
    strips: [&[u8]; S],
    (x, rows): (&QuantizedRows, Range<usize>),
    ahead: &Prefetcher,
    out: Outputs<'_>,
    scratch: &mut Scratch,
) {
    let Some(exact) = F::Kernel::EXACT else { return };
    let l = amx.lanes();
    let (blocks, groups) = (x.cols() / BLOCK, rows.len().div_ceil(AMX_ROWS));
    let mut ahead = ahead.parts(blocks * groups);
    let Scratch { unpacked, products, sums } = scratch;
    let tiles = Tiles::new(amx, rows.len(), exact);
    for at in (0..blocks).step_by(CHUNK) {
        let chunk = at..blocks.min(at + CHUNK);
        for (unpacked, strip) in unpacked.iter_mut().zip(strips) {
            for (unpacked, block) in unpacked.iter_mut().zip(chunk.clone()) {
                let tile = &strip[block / (F::VALUES / BLOCK) * F::TILE_BYTES..][..F::TILE_BYTES];
                F::Kernel::unpack(amx, tile, block % (F::VALUES / BLOCK), unpacked);
            }
        }
        for group in 0..groups {
            let x = &x.amx_blocks(rows.start / AMX_ROWS + group)[chunk.clone()];
            let all = x.iter().zip(products.chunks_exact_mut(S * exact.parts()));
            for (b, (x, products)) in all.enumerate() {
                ahead.fetch();
                let mut weights = [&unpacked[0][b].weights; S];
                unrolled!(s in S up to 2 => {
                    weights[s] = &unpacked[s][b].weights;
                });
                tiles.multiply(x, weights, products);
            }
            let first = group * AMX_ROWS;
            for row in (0..AMX_ROWS.min(rows.len() - first)).step_by(PANEL) {
                unrolled!(s in S up to 2 => {
                    let to = &mut sums[s][first + row..][..PANEL];
                    if at == 0 {
                        to.fill([0.0; TILE_ROWS]);
                    }
                    add_up::<S>(l, exact, x, (&*products, s), &unpacked[s], row, to);
                });
            }
        }
    }
    for (i, row) in rows.enumerate() {
        unrolled!(s in S up to 2 => {
            out.of(s).put(l, row, 0, l.finish(l.load(&sums[s][i]), x.unit(row)));
        });
    }
}

/// Adds the blocks of a chunk to the sums of a panel's rows, which are those from `first` on of the group `x`.
#[inline(always)]
fn add_up<const S: usize>(
    l: Avx512Vnni,
    exact: Exact,
    x: &[AmxBlock],
    (products, strip): (&[Sums], usize),
    unpacked: &[Unpacked; CHUNK],
    first: usize,
    to: &mut [[f32; TILE_ROWS]],
) {
    let mut sums = [l.zero(); PANEL];
    unrolled!(r in PANEL => {
        sums[r] = l.load(&to[r]);
    });
    for ((x, products), unpacked) in x.iter().zip(products.chunks_exact(S * exact.parts())).zip(unpacked) {
        let d = [l.load(&unpacked.d[0]), l.load(&unpacked.d[1])];
        if unpacked.has_m {
            let m = [l.load(&unpacked.m[0]), l.load(&unpacked.m[1])];
            unrolled!(r in PANEL => {
                if exact == Exact::Halves {
                    sums[r] = l.mul_add(m[0], x.first_sum[first + r], sums[r]);
                }
                sums[r] = l.mul_add(m[1], x.sum[first + r], sums[r]);
            });
        }
        unrolled!(r in PANEL => {
            let mut t = l.load(products[strip].of_row(first + r));
            if exact == Exact::Bytes {
                t = l.add(t, l.load(products[S + strip].of_row(first + r)));
            }
            sums[r] = l.fused(t, d[0], sums[r]);
            if exact == Exact::Halves {
                sums[r] = l.fused(l.load(products[S + strip].of_row(first + r)), d[1], sums[r]);
            }
        });
    }
    unrolled!(r in PANEL => {
        l.store(sums[r], &mut to[r]);
    });
}
