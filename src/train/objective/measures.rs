//! What is reported of examples beside their loss, under the names that TRL gives it.

use std::collections::BTreeMap;

/// Sums of named measurements, each with the number it is divided by.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Measures(BTreeMap<&'static str, (f64, f64)>);

impl Measures {
    /// Adds the measurements of `count` more tokens or pairs.
    pub fn add(&mut self, name: &'static str, sum: f64, count: usize) {
        let (all, counted) = self.0.entry(name).or_default();
        *all += sum;
        *counted += count as f64;
    }

    /// Adds the measurements of other examples.
    pub fn merge(&mut self, other: &Self) {
        for (name, (sum, count)) in &other.0 {
            let (all, counted) = self.0.entry(name).or_default();
            *all += sum;
            *counted += count;
        }
    }

    /// Returns the mean of each.
    pub fn means(&self) -> BTreeMap<String, f64> {
        self.0.iter().map(|(name, (sum, count))| ((*name).to_owned(), sum / count)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::metric::{MARGINS, TOKEN_ACCURACY};

    #[test]
    fn means_are_over_all_that_was_counted() {
        let (mut all, mut more) = (Measures::default(), Measures::default());
        all.add(TOKEN_ACCURACY, 1.0, 4);
        more.add(TOKEN_ACCURACY, 5.0, 6);
        more.add(MARGINS, -1.0, 2);
        all.merge(&more);
        let means = all.means();
        assert_eq!((means[TOKEN_ACCURACY], means[MARGINS], means.len()), (0.6, -0.5, 2));
    }
}
