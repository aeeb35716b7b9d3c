//! KV blocks as integers: which are free, and how many hold each.

/// Hands out the blocks of the KV cache. A block is free again when its last holder has released it.
#[derive(Debug)]
pub struct Blocks {
    free: Vec<u32>,
    /// Holders of each block.
    holders: Vec<u32>,
}

impl Blocks {
    pub fn new(count: usize) -> Self {
        Self { free: (0..count as u32).rev().collect(), holders: vec![0; count] }
    }

    /// Adds `count` blocks to `held`, or none where fewer are free.
    pub fn take(&mut self, count: usize, held: &mut Vec<u32>) -> bool {
        if count > self.free.len() {
            return false;
        }
        let taken = self.free.split_off(self.free.len() - count);
        taken.iter().for_each(|block| self.holders[*block as usize] = 1);
        held.extend(taken);
        true
    }

    /// Gives up one hold on each.
    pub fn release(&mut self, held: &mut Vec<u32>) {
        for block in held.drain(..) {
            let holders = &mut self.holders[block as usize];
            *holders -= 1;
            if *holders == 0 {
                self.free.push(block);
            }
        }
    }

    pub fn total(&self) -> usize {
        self.holders.len()
    }

    pub fn free(&self) -> usize {
        self.free.len()
    }

    pub fn used(&self) -> usize {
        self.holders.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_block_is_lost_or_handed_out_twice(steps in prop::collection::vec((0usize..4, 0usize..6), 0..60)) {
            let mut blocks = Blocks::new(10);
            let mut holders: [Vec<u32>; 4] = Default::default();
            for (who, count) in steps {
                let free = blocks.total() - blocks.used();
                if count == 0 {
                    blocks.release(&mut holders[who]);
                } else {
                    prop_assert_eq!(blocks.take(count, &mut holders[who]), count <= free);
                }
                let mut all = holders.concat();
                prop_assert_eq!(all.len(), blocks.used());
                all.sort_unstable();
                all.dedup();
                prop_assert_eq!(all.len(), blocks.used());
            }
        }
    }
}
