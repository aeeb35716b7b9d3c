//! Which records a step sees: the validation split and the order, functions of the seed alone.

use crate::random::{Purpose, Stream};

/// Record indices, each part ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// Indices of the records that are trained on.
    pub train: Vec<usize>,
    /// Indices of the records that are only evaluated.
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

    /// Splits records at random by the seed; `share` of them are held out.
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

/// The records of each optimizer step. An epoch is a pass over all records, in an order of its own, and ends a batch: the last batch of
/// an epoch is smaller where the records do not divide evenly, and none holds a record twice.
#[derive(Debug)]
pub struct Batches {
    records: usize,
    batch: usize,
    /// `None`: sequential.
    seed: Option<u64>,
    /// The order of the epoch that was asked for last.
    epoch: Option<(u64, Vec<usize>)>,
}

impl Batches {
    /// Returns the batches of at most `batch` of a positive number of records, shuffled by `seed` where there is one.
    pub fn new(records: usize, batch: usize, seed: Option<u64>) -> Self {
        Self { records: records.max(1), batch: batch.max(1), seed, epoch: None }
    }

    /// Returns the number of batches of one epoch.
    pub fn per_epoch(&self) -> u64 {
        self.records.div_ceil(self.batch) as u64
    }

    /// Returns the records of a step, counted from 0 over all epochs.
    pub fn of_step(&mut self, step: u64) -> Vec<usize> {
        let from = (step % self.per_epoch()) as usize * self.batch;
        let to = self.records.min(from + self.batch);
        let epoch = step / self.per_epoch();
        let Some(seed) = self.seed else { return (from..to).collect() };
        if self.epoch.as_ref().is_none_or(|(shuffled, _)| *shuffled != epoch) {
            self.epoch = Some((epoch, permutation(self.records, Stream::new(seed, Purpose::Order), epoch)));
        }
        self.epoch.as_ref().map_or_else(Vec::new, |(_, order)| order[from..to].to_vec())
    }

    /// Returns the records that the first `steps` steps see, ascending.
    pub fn seen_in(&mut self, steps: u64) -> Vec<usize> {
        // What an epoch is, the first one sees in full.
        let mut seen: Vec<usize> = (0..steps.min(self.per_epoch())).flat_map(|step| self.of_step(step)).collect();
        seen.sort_unstable();
        seen
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

        /// No record twice in an epoch and none left out, whatever the batch, so that no batch reaches into the next epoch.
        #[test]
        fn an_epoch_is_a_permutation_of_all_records(
            records in 1_usize..100, batch in 1_usize..120, shuffled: bool, seed: u64, epoch in 0_u64..5,
        ) {
            let mut batches = Batches::new(records, batch, shuffled.then_some(seed));
            let per_epoch = batches.per_epoch();
            prop_assert_eq!(per_epoch, records.div_ceil(batch) as u64);
            let steps: Vec<_> = (epoch * per_epoch..(epoch + 1) * per_epoch).map(|step| batches.of_step(step)).collect();
            let (last, full) = steps.split_last().unwrap();
            prop_assert!(full.iter().all(|step| step.len() == batch));
            prop_assert_eq!(last.len(), records - full.len() * batch);
            let mut seen = steps.concat();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..records).collect::<Vec<_>>());
        }

        #[test]
        fn what_steps_see_is_the_union_of_their_batches(records in 1_usize..40, batch in 1_usize..50, seed: u64, steps in 1_u64..30) {
            let mut batches = Batches::new(records, batch, Some(seed));
            let union: std::collections::BTreeSet<_> = (0..steps).flat_map(|step| batches.of_step(step)).collect();
            prop_assert_eq!(batches.seen_in(steps), union.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_seed_and_the_epoch_change_the_order() {
        let walk = |seed| {
            let mut batches = Batches::new(50, 1, Some(seed));
            (0..100).flat_map(|step| batches.of_step(step)).collect::<Vec<_>>()
        };
        assert_eq!(walk(3), walk(3));
        assert_ne!(walk(3), walk(4));
        assert_ne!(walk(3)[..50], walk(3)[50..]);
    }

    #[test]
    fn sequential_is_the_order_of_the_records() {
        let mut batches = Batches::new(5, 2, None);
        let steps: Vec<_> = (0..4).map(|step| batches.of_step(step)).collect();
        assert_eq!(steps, [vec![0, 1], vec![2, 3], vec![4], vec![0, 1]]);
    }
}
