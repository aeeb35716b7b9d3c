//! A list of small integers in the order of their last use. It allocates nothing after its start.

/// Some of `0..count`, the least recently added first: a ring of links with one end marker, the link at `count`.
#[derive(Debug)]
pub struct Lru {
    /// (before, after) of each; its own number twice where it is not in the list.
    links: Vec<(u32, u32)>,
    len: usize,
}

impl Lru {
    pub fn new(count: usize) -> Self {
        Self { links: (0..=count as u32).map(|i| (i, i)).collect(), len: 0 }
    }

    /// Adds one that is not in the list, as the most recently used.
    pub fn push(&mut self, item: u32) {
        let end = self.end();
        let last = self.links[end as usize].0;
        self.links[item as usize] = (last, end);
        self.links[last as usize].1 = item;
        self.links[end as usize].0 = item;
        self.len += 1;
    }

    /// Takes out one that is in the list.
    pub fn remove(&mut self, item: u32) {
        let (before, after) = std::mem::replace(&mut self.links[item as usize], (item, item));
        self.links[before as usize].1 = after;
        self.links[after as usize].0 = before;
        self.len -= 1;
    }

    /// Takes out the least recently used.
    pub fn pop(&mut self) -> Option<u32> {
        let first = self.links[self.end() as usize].1;
        if first == self.end() {
            return None;
        }
        self.remove(first);
        Some(first)
    }

    pub fn len(&self) -> usize {
        self.len
    }

    fn end(&self) -> u32 {
        self.links.len() as u32 - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// As a plain list would have it.
        #[test]
        fn the_order_is_that_of_the_last_use(steps in prop::collection::vec(0u32..8, 0..80)) {
            let (mut lru, mut list) = (Lru::new(7), Vec::new());
            for item in steps {
                if item == 7 {
                    prop_assert_eq!(lru.pop(), (!list.is_empty()).then(|| list.remove(0)));
                } else if let Some(at) = list.iter().position(|other| *other == item) {
                    list.remove(at);
                    lru.remove(item);
                } else {
                    list.push(item);
                    lru.push(item);
                }
                prop_assert_eq!(lru.len(), list.len());
            }
            let rest: Vec<u32> = std::iter::from_fn(|| lru.pop()).collect();
            prop_assert_eq!(rest, list);
        }
    }
}
