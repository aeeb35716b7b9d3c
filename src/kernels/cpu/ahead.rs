//! What will be read soon: lines of memory that are fetched one by one while something else is computed. A burst of prefetches would wait for
//! itself, and what fetches memory by its own judgement stops at every page.

use super::simd::prefetch;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Most lines; what does not fit is read when it is needed.
const MAX_LINES: usize = 1024;

/// A list of lines. The slices they are of outlive their fetching.
pub(super) struct Ahead {
    lines: [*const u8; MAX_LINES],
    count: usize,
}

impl Ahead {
    pub fn new() -> Self {
        Self { lines: [std::ptr::null(); MAX_LINES], count: 0 }
    }

    pub fn clear(&mut self) {
        self.count = 0;
    }

    pub fn push<T>(&mut self, values: &[T]) {
        let first = values.as_ptr().cast::<u8>();
        let lines = size_of_val(values).div_ceil(LINE).min(MAX_LINES - self.count);
        for (i, line) in self.lines[self.count..][..lines].iter_mut().enumerate() {
            *line = first.wrapping_add(i * LINE);
        }
        self.count += lines;
    }

    /// The lines in `steps` parts of about the same length.
    pub fn parts(&self, steps: usize) -> Parts<'_> {
        Parts { lines: &self.lines[..self.count], step: self.count.div_ceil(steps.max(1)) }
    }
}

/// Some lines, to be fetched part by part.
#[derive(Clone, Copy)]
pub(super) struct Parts<'a> {
    lines: &'a [*const u8],
    step: usize,
}

impl Parts<'_> {
    /// Fetches the next part.
    #[inline(always)]
    pub fn fetch(&mut self) {
        let (now, later) = self.lines.split_at(self.step.min(self.lines.len()));
        for line in now {
            prefetch(*line);
        }
        self.lines = later;
    }
}
