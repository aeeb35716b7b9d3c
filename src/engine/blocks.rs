//! KV blocks as integers: which are free, how many hold each, and which are found again by what they hold. A block here is a page of the
//! cache: of one group of layers.
//!
//! A block with a key is never written again. Where nobody holds it, it stays findable until its room is needed: the least recently
//! used goes first. Of a group without a window holders hold whole prefixes, and they give up the last block first: so there a block goes
//! before the one that it follows.

use std::collections::HashMap;

use crate::engine::lru::Lru;
use crate::engine::prefix::PageKey;
use crate::model::batch::NO_PAGE;

/// Hands out the blocks of the KV cache. A block is there for others when its last holder has released it.
#[derive(Debug)]
pub struct Blocks {
    /// Neither held nor with a key.
    free: Vec<u32>,
    /// With a key, and not held.
    idle: Lru,
    /// Most idle ones.
    max_idle: usize,
    /// Holders of each block.
    ref_count: Vec<u32>,
    /// What each block is found by.
    keys: Vec<Option<PageKey>>,
    by_key: HashMap<PageKey, u32>,
}

impl Blocks {
    /// `max_idle`: blocks that are kept for others while nobody holds them, at most.
    pub fn new(count: usize, max_idle: usize) -> Self {
        Self {
            free: (0..count as u32).rev().collect(),
            idle: Lru::new(count),
            max_idle,
            ref_count: vec![0; count],
            keys: vec![None; count],
            // With twice the room it needs, the map cleans itself up in place and never grows.
            by_key: HashMap::with_capacity(2 * count),
        }
    }

    /// Adds `count` blocks to `held`, or none where fewer are available.
    pub fn take(&mut self, count: usize, held: &mut Vec<u32>) -> bool {
        if count > self.available() {
            return false;
        }
        for _ in 0..count {
            let Some(block) = self.take_one() else { return false };
            held.push(block);
        }
        true
    }

    /// Gives a block to hold, if one is available.
    pub fn take_one(&mut self) -> Option<u32> {
        let block = self.free.pop().or_else(|| self.evict_lru())?;
        self.ref_count[block as usize] = 1;
        Some(block)
    }

    /// The block with this key, to be held before anything else is done.
    pub fn find(&self, key: PageKey) -> Option<u32> {
        self.by_key.get(&key).copied()
    }

    /// Makes a held block findable by what it holds. Where another with the same contents is, the hold moves to that one, which is given
    /// back: so two that have computed the same at once share it from now on.
    pub fn publish(&mut self, key: PageKey, block: u32) -> u32 {
        match self.by_key.get(&key).copied() {
            Some(known) if known != block => {
                self.hold(known);
                self.release_one(block);
                known
            }
            Some(_) => block,
            None => {
                self.keys[block as usize] = Some(key);
                self.by_key.insert(key, block);
                block
            }
        }
    }

    /// Gives up one hold on each, from the last to the first; what says [`NO_PAGE`] is passed over.
    pub fn release(&mut self, held: &mut Vec<u32>) {
        while let Some(block) = held.pop() {
            if block != NO_PAGE {
                self.release_one(block);
            }
        }
    }

    /// Adds a hold.
    pub fn hold(&mut self, block: u32) {
        let ref_count = &mut self.ref_count[block as usize];
        if *ref_count == 0 {
            self.idle.remove(block);
        }
        *ref_count += 1;
    }

    /// Gives up one hold.
    pub fn release_one(&mut self, block: u32) {
        let ref_count = &mut self.ref_count[block as usize];
        *ref_count -= 1;
        if *ref_count > 0 {
            return;
        }
        if self.keys[block as usize].is_none() {
            return self.free.push(block);
        }
        self.idle.push(block);
        if self.idle.len() > self.max_idle {
            let oldest = self.evict_lru();
            self.free.extend(oldest);
        }
    }

    /// The least recently used idle block, which is found no more.
    fn evict_lru(&mut self) -> Option<u32> {
        let block = self.idle.pop()?;
        if let Some(key) = self.keys[block as usize].take() {
            self.by_key.remove(&key);
        }
        Some(block)
    }

    /// Of these held blocks, those that nobody else holds.
    pub fn held_alone(&self, held: &[u32]) -> usize {
        held.iter().filter(|block| **block != NO_PAGE && self.ref_count[**block as usize] == 1).count()
    }

    pub fn total(&self) -> usize {
        self.ref_count.len()
    }

    /// Blocks that nobody holds.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Blocks that somebody holds.
    pub fn used(&self) -> usize {
        self.total() - self.available()
    }

    /// Blocks that are kept for others while nobody holds them.
    pub fn idle(&self) -> usize {
        self.idle.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Digest;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// A key for each prefix of a sequence of small numbers, for this group of layers.
    fn keys(contents: &[u8], group: usize) -> Vec<PageKey> {
        (1..=contents.len()).map(|end| PageKey { block: Digest::of(&contents[..end]), group }).collect()
    }

    /// Holds the blocks found by these keys, up to the first that is not; says how many.
    fn reuse(blocks: &mut Blocks, keys: &[PageKey], held: &mut Vec<u32>) -> usize {
        let found: Vec<u32> = keys.iter().map_while(|key| blocks.find(*key)).collect();
        found.iter().for_each(|block| blocks.hold(*block));
        held.extend(&found);
        found.len()
    }

    /// Holders of whole prefixes in one of two groups, as sequences are, against what must be true of any pool.
    struct Pool {
        blocks: Blocks,
        /// What each sequence holds, and what its blocks contain; how many of them are published. Its group is its number's last bit.
        sequences: Vec<(Vec<u32>, Vec<u8>, usize)>,
        parents: HashMap<PageKey, PageKey>,
    }

    impl Pool {
        fn check(&self) -> Result<(), TestCaseError> {
            let blocks = &self.blocks;
            let mut ref_count = vec![0; blocks.total()];
            self.sequences.iter().flat_map(|s| &s.0).for_each(|block| ref_count[*block as usize] += 1);
            prop_assert_eq!(&ref_count, &blocks.ref_count, "holds are counted");
            let held: BTreeSet<u32> = (0..).zip(&ref_count).filter(|(_, n)| **n > 0).map(|(block, _)| block).collect();
            let free: BTreeSet<u32> = blocks.free.iter().copied().collect();
            prop_assert_eq!(free.len(), blocks.free.len(), "none is free twice");
            prop_assert!(free.is_disjoint(&held), "none is free and held");
            prop_assert_eq!(held.len() + blocks.available(), blocks.total(), "none is lost");
            prop_assert!(blocks.idle() <= blocks.max_idle);
            prop_assert!(free.iter().all(|block| blocks.keys[*block as usize].is_none()), "what is free is not found");
            let named = blocks.keys.iter().flatten().count();
            prop_assert_eq!(named, blocks.by_key.len());
            for (key, block) in &blocks.by_key {
                prop_assert_eq!(blocks.keys[*block as usize], Some(*key));
                let parent = self.parents.get(key);
                prop_assert!(
                    parent.is_none_or(|parent| blocks.by_key.contains_key(parent)),
                    "children go before parents"
                );
            }
            for (who, (held, contents, published)) in self.sequences.iter().enumerate() {
                for (block, key) in held.iter().zip(keys(contents, who % 2)).take(*published) {
                    prop_assert_eq!(blocks.keys[*block as usize], Some(key), "what is held stays what it is");
                }
            }
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn no_block_is_lost_or_two_things(
            steps in prop::collection::vec((0usize..4, 0u8..8, 0u8..3), 0..80),
            max_idle in 0usize..12,
        ) {
            let mut pool = Pool { blocks: Blocks::new(10, max_idle), sequences: vec![Default::default(); 4], parents: HashMap::new() };
            for (who, what, value) in steps {
                let Pool { blocks, sequences, parents } = &mut pool;
                let (held, contents, published) = &mut sequences[who];
                match what {
                    // Ends, whatever it has published.
                    0 => {
                        blocks.release(held);
                        contents.clear();
                        *published = 0;
                    }
                    // Publishes what it has.
                    1 | 2 => {
                        let keys = keys(contents, who % 2);
                        parents.extend(keys.windows(2).map(|pair| (pair[1], pair[0])));
                        for (block, key) in held.iter_mut().zip(keys).skip(*published) {
                            *block = blocks.publish(key, *block);
                        }
                        *published = held.len();
                    }
                    // Starts with what is there of three equal blocks.
                    3 if held.is_empty() => {
                        contents.extend([value; 3]);
                        *published = reuse(blocks, &keys(contents, who % 2), held);
                        contents.truncate(held.len());
                    }
                    // Goes on with a block of its own.
                    _ => {
                        let there = blocks.available() > 0;
                        prop_assert_eq!(blocks.take(1, held), there);
                        contents.extend(there.then_some(value));
                    }
                }
                pool.check()?;
            }
            pool.sequences.iter_mut().for_each(|(held, ..)| pool.blocks.release(held));
            prop_assert_eq!(pool.blocks.used(), 0);
        }
    }

    #[test]
    fn the_least_recently_used_block_goes_first_and_children_before_parents() {
        let mut blocks = Blocks::new(4, 4);
        let [first, second] = [keys(&[1, 1], 0), keys(&[2, 2], 0)];
        for keys in [&first, &second] {
            let mut held = Vec::new();
            assert!(blocks.take(2, &mut held));
            held.iter_mut().zip(keys).for_each(|(block, key)| *block = blocks.publish(*key, *block));
            blocks.release(&mut held);
        }
        let mut held = Vec::new();
        assert_eq!(reuse(&mut blocks, &first, &mut held), 2);
        blocks.release(&mut held);
        assert_eq!((blocks.used(), blocks.idle()), (0, 4));
        assert!(blocks.take(3, &mut held));
        let mut found = Vec::new();
        assert_eq!([&second, &first].map(|keys| reuse(&mut blocks, keys, &mut found)), [0, 1]);
    }
}
