//! What will be read soon: lines of memory that are fetched one by one while something else is computed. A burst of
//! prefetches would wait for itself, and what fetches memory by its own judgement stops at every page.

use std::mem::MaybeUninit;

use super::simd::{Level, prefetch, prefetch_far};

/// Bytes of a cache line.
const LINE: usize = 64;

/// Most slices; what does not fit is read when it is needed.
const MAX_SLICES: usize = 96;

/// Some slices, which outlive their fetching.
pub(super) struct Prefetcher {
    /// The first `count` are there: to clear all for every piece of work would cost more than they are worth.
    slices: [MaybeUninit<Lines>; MAX_SLICES],
    count: usize,
    lines: usize,
}

/// Lines in a row.
#[derive(Clone, Copy)]
struct Lines {
    first: *const u8,
    count: usize,
}

impl Prefetcher {
    pub fn new() -> Self {
        Self { slices: [const { MaybeUninit::uninit() }; MAX_SLICES], count: 0, lines: 0 }
    }

    pub fn clear(&mut self) {
        (self.count, self.lines) = (0, 0);
    }

    pub fn push<T>(&mut self, values: &[T]) {
        if let Some(slice) = self.slices.get_mut(self.count) {
            let count = size_of_val(values).div_ceil(LINE);
            slice.write(Lines { first: values.as_ptr().cast(), count });
            self.count += 1;
            self.lines += count;
        }
    }

    /// All lines in `steps` parts of about the same length.
    pub fn parts(&self, steps: usize) -> PrefetchPlan<'_> {
        // SAFETY: `push` has written the first `count`.
        let slices = unsafe { self.slices[..self.count].assume_init_ref() };
        let far = Level::best() == Level::Amx;
        PrefetchPlan { slices, done: 0, step: self.lines.div_ceil(steps.max(1)), far }
    }
}

/// Some slices, to be fetched part by part.
pub(crate) struct PrefetchPlan<'a> {
    slices: &'a [Lines],
    /// Lines of the first slice that have been fetched.
    done: usize,
    /// Lines of a part.
    step: usize,
    /// Into the second cache: the first one of cores with AMX waits for fewer lines at a time than the memory gives
    /// meanwhile.
    far: bool,
}

impl PrefetchPlan<'_> {
    /// Fetches the next part.
    #[inline(always)]
    pub fn fetch(&mut self) {
        let mut left = self.step;
        while let Some(slice) = self.slices.first() {
            let now = left.min(slice.count - self.done);
            for line in self.done..self.done + now {
                let line = slice.first.wrapping_add(line * LINE);
                if self.far { prefetch_far(line) } else { prefetch(line) }
            }
            self.done += now;
            left -= now;
            if self.done < slice.count {
                break;
            }
            (self.slices, self.done) = (&self.slices[1..], 0);
        }
    }
}
