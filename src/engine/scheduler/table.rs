//! A sequence's block table: which KV pages it holds, of every group.

use crate::engine::blocks::Blocks;
use crate::engine::paging::Paging;
use crate::engine::prefix::PageKey;
use crate::ids::Digest;
use crate::model::batch::NO_PAGE;

/// The pages of a sequence. Of a group with a window it holds those from the first that its next row reads on, as far ahead as its next
/// chunk can go.
#[derive(Debug, Default)]
pub struct Table {
    /// Block by block, of each block the page of every group; [`NO_PAGE`] where it holds none.
    pages: Vec<u32>,
    /// Blocks from the first on that were found or have been made findable.
    published: usize,
}

impl Table {
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Blocks from the first on that can be found.
    pub fn published(&self) -> usize {
        self.published
    }

    /// Takes the memory for so many tokens, so that no step has to.
    pub fn reserve(&mut self, tokens: usize, paging: &Paging) {
        self.pages.reserve_exact(paging.blocks(tokens) * paging.groups());
    }

    /// Takes what is there by these keys, and pages of its own for the rest of so many tokens; says how many tokens' KV is there. `None`,
    /// and nothing is held, where there are too few pages.
    ///
    /// Its own pages suffice for all chunks of these tokens: what [`Table::slide`] gives back of them is what it takes.
    pub fn start(&mut self, length: usize, keys: &[Digest], blocks: &mut Blocks, paging: &Paging) -> Option<usize> {
        let found = longest_found(keys, blocks, paging);
        self.reuse(&keys[..found], blocks, paging);
        self.published = found;
        let end = paging.blocks(length);
        let own_end = |group| paging.own_end(group, found, end);
        let needed: usize = (0..paging.groups()).map(|group| own_end(group) - found).sum();
        if needed > blocks.available() {
            self.release(blocks);
            return None;
        }
        for index in found..end {
            for group in 0..paging.groups() {
                let page = (index < own_end(group)).then(|| blocks.take_one()).flatten();
                self.pages.push(page.unwrap_or(NO_PAGE));
            }
        }
        Some(found * paging.block_tokens())
    }

    /// Holds the pages of the blocks with these keys, without those that no row behind them reads.
    fn reuse(&mut self, keys: &[Digest], blocks: &mut Blocks, paging: &Paging) {
        let next = keys.len() * paging.block_tokens();
        for (index, block) in keys.iter().enumerate() {
            for group in 0..paging.groups() {
                let first = paging.window(group).map_or(0, |window| paging.first_block(window, next));
                let page = blocks.find(PageKey { block: *block, group }).filter(|_| index >= first);
                page.into_iter().for_each(|page| blocks.hold(page));
                self.pages.push(page.unwrap_or(NO_PAGE));
            }
        }
    }

    /// Gives back the pages that rows from `position` on do not read, and takes as many for the rows that come; false where they are not
    /// there, which cannot be for a sequence that has [started](Table::start).
    pub fn slide(&mut self, position: usize, blocks: &mut Blocks, paging: &Paging) -> bool {
        let groups = paging.groups();
        for (group, window) in paging.windowed() {
            let first = paging.first_block(window, position);
            for at in (0..first).rev().map(|index| index * groups + group) {
                match std::mem::replace(&mut self.pages[at], NO_PAGE) {
                    // Those before it have been given back.
                    NO_PAGE => break,
                    page => blocks.release_one(page),
                }
            }
            let end = paging.own_end(group, first.max(self.published), self.pages.len() / groups);
            let is_there = |index: &usize| self.pages[index * groups + group] != NO_PAGE;
            let from = (first..end).rev().find(is_there).map_or(first, |index| index + 1);
            for index in from..end {
                let Some(page) = blocks.take_one() else { return false };
                self.pages[index * groups + group] = page;
            }
        }
        true
    }

    /// Sees that there are pages for so many tokens in all; false, and nothing has changed, where they are not there.
    pub fn grow(&mut self, tokens: usize, blocks: &mut Blocks, paging: &Paging) -> bool {
        let needed = (paging.blocks(tokens) * paging.groups()).saturating_sub(self.pages.len());
        blocks.take(needed, &mut self.pages)
    }

    /// Makes the first `whole` blocks findable by their keys, as far as their pages are held.
    pub fn publish(&mut self, whole: usize, keys: &[Digest], blocks: &mut Blocks, paging: &Paging) {
        let of_blocks = self.pages.chunks_exact_mut(paging.groups()).zip(keys);
        for (pages, block) in of_blocks.take(whole).skip(self.published) {
            for (group, page) in pages.iter_mut().enumerate().filter(|(_, page)| **page != NO_PAGE) {
                *page = blocks.publish(PageKey { block: *block, group }, *page);
            }
        }
        self.published = whole;
    }

    /// Gives everything back.
    pub fn release(&mut self, blocks: &mut Blocks) {
        blocks.release(&mut self.pages);
        self.published = 0;
    }
}

/// Of blocks with these keys, how many from the first on need not be computed again: all pages are there of the groups without a window, and
/// of the others those that the row behind them reads.
fn longest_found(keys: &[Digest], blocks: &Blocks, paging: &Paging) -> usize {
    let is_there = |index: usize, group| blocks.find(PageKey { block: keys[index], group }).is_some();
    let all_full = |index: &usize| paging.full().all(|group| is_there(*index, group));
    let mut found = (0..keys.len()).take_while(all_full).count();
    // Of the prefixes up to here, all that end behind a page that is missing within the window need it too.
    loop {
        let missing = |(group, window)| {
            let first = paging.first_block(window, found * paging.block_tokens());
            (first..found).rev().find(|index| !is_there(*index, group))
        };
        match paging.windowed().filter_map(missing).min() {
            Some(index) => found = index,
            None => return found,
        }
    }
}
