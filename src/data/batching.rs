//! Which records a step sees: the validation split and the order, functions of the seed alone.

use crate::random::{Purpose, Stream};

/// Record indices, each part ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    pub train: Vec<usize>,
    pub validation: Vec<usize>,
}

impl Split {
    /// How many of `records` a share holds out: rounded, at least one where asked for and possible, never all.
    pub fn held_out(records: usize, share: f32) -> usize {
        if share <= 0.0 || records < 2 {
            return 0;
        }
        ((records as f64 * f64::from(share)).round() as usize).clamp(1, records - 1)
    }

    pub fn new(records: usize, share: f32, seed: u64) -> Self {
        let shuffled = permutation(records, Stream::new(seed, Purpose::Split), 0);
        let (validation, train) = shuffled.split_at(Self::held_out(records, share));
        let sorted = |part: &[usize]| {
            let mut part = part.to_vec();
            part.sort_unstable();
            part
        };
        Self { train: sorted(train), validation: sorted(validation) }
    }
}

/// An endless walk over the records, epoch after epoch; a batch may straddle two.
#[derive(Debug)]
pub struct Order {
    records: usize,
    /// `None`: sequential.
    seed: Option<u64>,
    epoch: Option<(u64, Vec<usize>)>,
}

impl Order {
    /// Over a positive number of records.
    pub fn new(records: usize, seed: Option<u64>) -> Self {
        Self { records: records.max(1), seed, epoch: None }
    }

    /// The record at a position counted from the start of training.
    pub fn at(&mut self, position: u64) -> usize {
        let (epoch, index) = (position / self.records as u64, (position % self.records as u64) as usize);
        let Some(seed) = self.seed else { return index };
        if self.epoch.as_ref().is_none_or(|(shuffled, _)| *shuffled != epoch) {
            self.epoch = Some((epoch, permutation(self.records, Stream::new(seed, Purpose::Order), epoch)));
        }
        self.epoch.as_ref().map_or(index, |(_, order)| order[index])
    }
}

/// Fisher-Yates.
fn permutation(n: usize, stream: Stream, epoch: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for last in (1..n).rev() {
        // The high half of the product is uniform over 0..=last to within 2^-32 of its share.
        let pick = (u64::from(stream.bits(epoch, last as u32)) * (last as u64 + 1)) >> 32;
        order.swap(last, pick as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_split_is_a_partition(records in 0_usize..200, share in 0.0_f32..=0.5, seed: u64) {
            let split = Split::new(records, share, seed);
            prop_assert_eq!(&split, &Split::new(records, share, seed));
            prop_assert_eq!(split.validation.len(), Split::held_out(records, share));
            prop_assert!(records == 0 || !split.train.is_empty());
            let mut all = [split.train, split.validation].concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..records).collect::<Vec<_>>());
        }

        #[test]
        fn an_epoch_sees_every_record_once(records in 1_usize..100, seed: u64, epoch in 0_u64..5) {
            let mut order = Order::new(records, Some(seed));
            let start = epoch * records as u64;
            let mut seen: Vec<_> = (start..start + records as u64).map(|p| order.at(p)).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..records).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_seed_and_the_epoch_change_the_order() {
        let walk = |seed| {
            let mut order = Order::new(50, Some(seed));
            (0..100).map(|p| order.at(p)).collect::<Vec<_>>()
        };
        assert_eq!(walk(3), walk(3));
        assert_ne!(walk(3), walk(4));
        assert_ne!(walk(3)[..50], walk(3)[50..]);
    }

    #[test]
    fn sequential_is_the_order_of_the_records() {
        let mut order = Order::new(3, None);
        assert_eq!((0..7).map(|p| order.at(p)).collect::<Vec<_>>(), [0, 1, 2, 0, 1, 2, 0]);
    }
}
