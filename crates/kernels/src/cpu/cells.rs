//! How the paged cache is read: numbers of either kind, 16 at a time, and where those of some positions lie.

use std::ops::Range;

use super::attention::{MAX_HEAD_DIM, SPAN, Task};
use super::kv::{KvView, SCALE_BLOCK};
use super::simd::{LANES, Simd, f16_value};

/// Units of 16 positions of a span.
pub(super) const UNITS: usize = SPAN / LANES;

/// The numbers of a cache, as they are read.
pub(super) trait Cells {
    /// Bytes of one.
    const BYTES: usize;

    /// 16 of them.
    ///
    /// # Safety
    /// They lie at `at`.
    unsafe fn load<S: Simd>(s: S, at: *const u8, scale: S::F) -> S::F;

    /// The scales of 16 positions, for the keys of one block of dimensions.
    ///
    /// # Safety
    /// Where numbers have scales, these lie at `at`.
    unsafe fn scales<S: Simd>(s: S, at: *const u16) -> S::F;

    /// One position's scale.
    ///
    /// # Safety
    /// As of [`Cells::scales`].
    unsafe fn scale<S: Simd>(s: S, at: *const u16) -> S::F;
}

/// [`KvDtype::F16`](super::KvDtype::F16), which has no scales.
pub(super) struct Halves;

impl Cells for Halves {
    const BYTES: usize = size_of::<u16>();

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, at: *const u8, _: S::F) -> S::F {
        // SAFETY: the caller vouches for it, and the cache is made of words.
        s.load_f16(unsafe { &*at.cast() })
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(s: S, _: *const u16) -> S::F {
        s.splat(1.0)
    }

    #[inline(always)]
    unsafe fn scale<S: Simd>(s: S, _: *const u16) -> S::F {
        s.splat(1.0)
    }
}

/// [`KvDtype::Int8`](super::KvDtype::Int8).
pub(super) struct Bytes;

impl Cells for Bytes {
    const BYTES: usize = size_of::<i8>();

    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, at: *const u8, scale: S::F) -> S::F {
        // SAFETY: the caller vouches for it.
        s.mul_add(s.load_i8(unsafe { &*at.cast() }), scale, s.splat(0.0))
    }

    #[inline(always)]
    unsafe fn scales<S: Simd>(s: S, at: *const u16) -> S::F {
        // SAFETY: the caller vouches for it.
        s.load_f16(unsafe { &*at.cast() })
    }

    #[inline(always)]
    unsafe fn scale<S: Simd>(s: S, at: *const u16) -> S::F {
        // SAFETY: the caller vouches for it.
        s.splat(f16_value(unsafe { at.read() }))
    }
}

/// Keys, of either kind, and their scales.
pub(super) struct Gathered {
    words: [u16; MAX_HEAD_DIM * LANES],
    scales: [u16; MAX_HEAD_DIM / SCALE_BLOCK * LANES],
}

impl Gathered {
    pub const EMPTY: Self = Self { words: [0; MAX_HEAD_DIM * LANES], scales: [0; MAX_HEAD_DIM / SCALE_BLOCK * LANES] };
}

/// Where the keys or values of a span's units begin. Null where there are none, or not in a row.
pub(super) type Units = [*const u8; UNITS];

/// The span that is read next.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    pub keys: Units,
    pub values: Units,
}

impl Ahead {
    pub const NONE: Self = Self { keys: [std::ptr::null(); UNITS], values: [std::ptr::null(); UNITS] };

    /// The span of a sequence that begins at `start`, up to `end`.
    #[inline(always)]
    pub fn new(kv: KvView<'_>, (blocks, kv_head): (&[u32], usize), start: usize, end: usize) -> Self {
        let (shape, mut ahead) = (kv.shape, Self::NONE);
        // In larger blocks the keys of 16 positions do not lie in a row.
        if shape.block_tokens == LANES {
            for (unit, position) in (start..end.min(start + SPAN)).step_by(LANES).enumerate() {
                let at = shape.head(blocks[position / LANES], kv_head);
                (ahead.keys[unit], ahead.values[unit]) =
                    (kv.keys[at..].as_ptr().cast(), kv.values[at..].as_ptr().cast());
            }
        }
        ahead
    }
}

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Values of a span that lie in a row.
#[derive(Clone, Copy)]
pub(super) struct Stretch {
    pub first: *const u8,
    /// Of the first position, for the first block of dimensions; the next block's lie `block_tokens` further.
    pub scales: *const u16,
    /// Within the span, after those of the stretch before.
    pub end: usize,
}

impl Stretch {
    pub const NONE: Self = Self { first: std::ptr::null(), scales: std::ptr::null(), end: 0 };
}

/// The values of the positions `seen` of the span from `start` on, block by block.
#[inline(always)]
pub(super) fn value_stretches<'s, C: Cells>(
    task: &Task<'_>,
    start: usize,
    seen: Range<usize>,
    stretches: &'s mut [Stretch; SPAN],
) -> &'s [Stretch] {
    let shape = task.kv.shape;
    let (mut position, mut count) = (seen.start, 0);
    while position < seen.end {
        let (block, within) = (task.tile.blocks[position / shape.block_tokens], position % shape.block_tokens);
        let end = seen.end.min(position + shape.block_tokens - within);
        let head = head_of(task.kv.values, task, block);
        let first = head.wrapping_add(within * shape.head_dim * C::BYTES);
        let scales = head.cast::<u16>().wrapping_add(shape.scales() + within);
        stretches[count] = Stretch { first, scales, end: end - start };
        (position, count) = (end, count + 1);
    }
    &stretches[..count]
}

/// Where a block's keys or values of the task's KV head begin. Panics where they do not lie in the cache.
#[inline(always)]
fn head_of(cells: &[u16], task: &Task<'_>, block: u32) -> *const u8 {
    let shape = task.kv.shape;
    let at = shape.head(block, task.kv_head);
    cells[at..][..shape.block_len() / shape.kv_heads].as_ptr().cast()
}

/// The keys of 16 positions: `head_dim` vectors of 16, `stride` bytes apart, and for each block of dimensions their
/// scales, `apart` words apart.
#[derive(Clone, Copy)]
pub(super) struct Keys {
    pub first: *const u8,
    pub stride: usize,
    pub scales: *const u16,
    pub apart: usize,
}

/// The keys of the positions from `position` on, where a block holds a multiple of 16.
#[inline(always)]
pub(super) fn keys_of<C: Cells>(task: &Task<'_>, position: usize) -> Keys {
    let shape = task.kv.shape;
    let (tokens, within) = (shape.block_tokens, position % shape.block_tokens);
    let head = head_of(task.kv.keys, task, task.tile.blocks[position / tokens]);
    Keys {
        first: head.wrapping_add(within * C::BYTES),
        stride: tokens * C::BYTES,
        scales: head.cast::<u16>().wrapping_add(shape.scales() + within),
        apart: tokens,
    }
}

/// The same, put together from any blocks; what lies outside `seen` is anything.
pub(super) fn gather_keys<C: Cells>(task: &Task<'_>, position: usize, seen: Range<usize>, to: &mut Gathered) -> Keys {
    let shape = task.kv.shape;
    let tokens = shape.block_tokens;
    let bytes = to.words.as_mut_ptr().cast::<u8>();
    for lane in seen.start.saturating_sub(position)..LANES.min(seen.end - position) {
        let (block, within) = (task.tile.blocks[(position + lane) / tokens], (position + lane) % tokens);
        let head = head_of(task.kv.keys, task, block);
        for d in 0..shape.head_dim.min(MAX_HEAD_DIM) {
            // SAFETY: the block holds the head's dimensions of its positions, and `to` as many of 16.
            unsafe {
                let from = head.add((d * tokens + within) * C::BYTES);
                from.copy_to_nonoverlapping(bytes.add((d * LANES + lane) * C::BYTES), C::BYTES);
            }
        }
        if C::BYTES == Bytes::BYTES {
            let scales = &task.kv.keys[shape.head(block, task.kv_head) + shape.scales() + within..];
            for block in 0..shape.head_dim.div_ceil(SCALE_BLOCK) {
                to.scales[block * LANES + lane] = scales[block * tokens];
            }
        }
    }
    Keys { first: bytes, stride: LANES * C::BYTES, scales: to.scales.as_ptr(), apart: LANES }
}
