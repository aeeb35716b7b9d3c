//! How many KV pages a sequence needs of each group of layers, as integers.
//!
//! Of a group without a window a sequence needs a page for each block of positions that it has. Of a group with one it needs those
//! that the rows of the next chunk read or write, and gives back those before them.

use std::sync::Arc;

use crate::model::groups::{first_read, most_read_before};

/// What decides how many pages a sequence needs.
#[derive(Debug, Clone)]
pub struct Paging {
    /// Positions of a page.
    block_tokens: usize,
    /// Most rows of a sequence in a step.
    chunk: usize,
    /// Of each group, how many positions a row sees.
    windows: Arc<[Option<usize>]>,
}

impl Paging {
    /// For pages of so many positions, chunks of so many rows at most, and groups with these windows.
    pub fn new(block_tokens: usize, chunk: usize, windows: Arc<[Option<usize>]>) -> Self {
        Self { block_tokens, chunk, windows }
    }

    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// Groups, and pages that a block of positions has at most.
    pub fn groups(&self) -> usize {
        self.windows.len()
    }

    /// How many positions a row sees in this group.
    pub fn window(&self, group: usize) -> Option<usize> {
        self.windows[group]
    }

    /// Groups of which all pages are kept.
    pub fn full(&self) -> impl Iterator<Item = usize> + '_ {
        self.windows.iter().enumerate().filter(|(_, window)| window.is_none()).map(|(group, _)| group)
    }

    /// Groups of which pages are given back, with their windows.
    pub fn windowed(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.windows.iter().enumerate().filter_map(|(group, window)| Some((group, (*window)?)))
    }

    /// Blocks of so many positions.
    pub fn blocks(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens)
    }

    /// The first block that rows at `position` and later ones read, with this window.
    pub fn first_block(&self, window: usize, position: usize) -> usize {
        first_read(Some(window), position) / self.block_tokens
    }

    /// Most blocks that a chunk reads or writes, with this window.
    pub fn of_chunk(&self, window: usize) -> usize {
        (most_read_before(window) + self.chunk - 1).div_ceil(self.block_tokens) + 1
    }

    /// The block up to which a sequence of `end` blocks holds pages of a group, where `first` is the first block whose page is its own.
    pub fn own_end(&self, group: usize, first: usize, end: usize) -> usize {
        self.windows[group].map_or(end, |window| end.min(first + self.of_chunk(window)))
    }

    /// Most pages of all groups that a sequence of so many tokens holds while its prompt is computed, what it shares included.
    pub fn most(&self, tokens: usize) -> usize {
        let blocks = self.blocks(tokens);
        let of_window = |window: usize| self.of_chunk(window) + self.blocks(most_read_before(window));
        self.windows.iter().map(|window| window.map_or(blocks, |window| blocks.min(of_window(window)))).sum()
    }

    /// Returns how long a sequence can be that so many pages hold, up to `longest`.
    pub fn holds(&self, pages: usize, longest: usize) -> usize {
        let (mut fits, mut too_long) = (0, longest + 1);
        while too_long - fits > 1 {
            let middle = fits.midpoint(too_long);
            if self.most(middle) <= pages { fits = middle } else { too_long = middle }
        }
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_group_without_a_window_needs_a_page_a_block() {
        let paging = Paging::new(16, 256, [None].into());
        assert_eq!([0, 1, 16, 17, 1000].map(|tokens| paging.most(tokens)), [0, 1, 1, 2, 63]);
        assert_eq!((paging.holds(10, 8192), paging.holds(1000, 8192), paging.windowed().count()), (160, 8192, 0));
    }

    /// Whatever its length, and wherever a chunk lies.
    #[test]
    fn a_group_with_a_window_needs_no_more_than_its_chunks_do() {
        for (block_tokens, chunk, window) in [(16, 256, 512), (8, 1, 32), (4, 7, 1), (64, 100, 100), (48, 5, 33)] {
            let paging = Paging::new(block_tokens, chunk, [Some(window)].into());
            for start in 0..1000 {
                let of_chunk = paging.blocks(start + chunk) - paging.first_block(window, start);
                assert!(of_chunk <= paging.of_chunk(window));
            }
            assert!(paging.most(1_000_000) <= (2 * (window + 64) + chunk) / block_tokens + 3);
        }
    }
}
