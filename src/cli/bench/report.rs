//! What a load has shown: tokens, throughput and latencies of every round, their medians, and histograms.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::drive::{Round, Sample};

/// Rows of a histogram, and characters of its longest bar.
const ROWS: usize = 12;
const BAR: f64 = 48.0;

/// Latencies in milliseconds: half, 95 and 99 of 100 requests (or tokens) took at most this.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub(super) struct Percentiles {
    pub p50: f64,
    pub p95: f64,
    pub p99: f64,
}

impl Percentiles {
    /// Of milliseconds in any order; all 0 where there are none.
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |share| quantile(&values, share);
        Self { p50: at(0.5), p95: at(0.95), p99: at(0.99) }
    }
}

/// The figures of one round, or the median of each over all rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Figures {
    /// Answered as asked.
    pub answered: f64,
    pub failed: f64,
    /// As the server counts them.
    pub prompt_tokens: f64,
    /// As the server counts them.
    pub generated_tokens: f64,
    pub seconds: f64,
    pub requests_per_second: f64,
    pub generated_per_second: f64,
    /// Prompt tokens and generated ones.
    pub tokens_per_second: f64,
    pub first_token_ms: Percentiles,
    pub between_tokens_ms: Percentiles,
    pub end_to_end_ms: Percentiles,
}

impl Figures {
    pub(super) fn of(round: &Round) -> Self {
        let samples = || round.outcomes.iter().flatten();
        let sum = |count: fn(&Sample) -> u32| samples().map(count).map(f64::from).sum::<f64>();
        let (prompt_tokens, generated_tokens) = (sum(|s| s.prompt_tokens), sum(|s| s.generated_tokens));
        let answered = samples().count() as f64;
        let seconds = round.elapsed.as_secs_f64();
        Self {
            answered,
            failed: round.outcomes.len() as f64 - answered,
            prompt_tokens,
            generated_tokens,
            seconds,
            requests_per_second: answered / seconds,
            generated_per_second: generated_tokens / seconds,
            tokens_per_second: (prompt_tokens + generated_tokens) / seconds,
            first_token_ms: Percentiles::of(samples().map(|s| millis(s.first_token)).collect()),
            between_tokens_ms: Percentiles::of(samples().flat_map(|s| &s.gaps).copied().map(millis).collect()),
            end_to_end_ms: Percentiles::of(samples().map(|s| millis(s.end_to_end)).collect()),
        }
    }

    /// Each figure's median over the rounds.
    pub(super) fn median(rounds: &[Self]) -> Self {
        let median = |get: &dyn Fn(&Self) -> f64| {
            let mut values: Vec<f64> = rounds.iter().map(get).collect();
            values.sort_by(f64::total_cmp);
            quantile(&values, 0.5)
        };
        let percentiles = |get: fn(&Self) -> Percentiles| Percentiles {
            p50: median(&|f| get(f).p50),
            p95: median(&|f| get(f).p95),
            p99: median(&|f| get(f).p99),
        };
        Self {
            answered: median(&|f| f.answered),
            failed: median(&|f| f.failed),
            prompt_tokens: median(&|f| f.prompt_tokens),
            generated_tokens: median(&|f| f.generated_tokens),
            seconds: median(&|f| f.seconds),
            requests_per_second: median(&|f| f.requests_per_second),
            generated_per_second: median(&|f| f.generated_per_second),
            tokens_per_second: median(&|f| f.tokens_per_second),
            first_token_ms: percentiles(|f| f.first_token_ms),
            between_tokens_ms: percentiles(|f| f.between_tokens_ms),
            end_to_end_ms: percentiles(|f| f.end_to_end_ms),
        }
    }

    /// One line of it, while the rounds go on.
    pub(super) fn line(&self) -> String {
        let failed = if self.failed > 0.0 { format!(" ({:.0} failed)", self.failed) } else { String::new() };
        format!(
            "{:.0} requests{failed} in {:.1} s: {:.1} generated tokens/s, {:.1} with the prompts'; first token {:.0} ms (p50)",
            self.answered + self.failed,
            self.seconds,
            self.generated_per_second,
            self.tokens_per_second,
            self.first_token_ms.p50
        )
    }

    /// All of it.
    pub(super) fn table(&self) -> String {
        let mut text = format!(
            "requests answered   {:.0}, {:.2} a second\nrequests failed     {:.0}\n\
             prompt tokens       {:.0}\ngenerated tokens    {:.0}\n\
             tokens/s            {:.1} generated, {:.1} with the prompts'\n\n{:22}{:>10}{:>10}{:>10}\n",
            self.answered,
            self.requests_per_second,
            self.failed,
            self.prompt_tokens,
            self.generated_tokens,
            self.generated_per_second,
            self.tokens_per_second,
            "",
            "p50",
            "p95",
            "p99"
        );
        for (what, p) in [
            ("time to first token", self.first_token_ms),
            ("time between tokens", self.between_tokens_ms),
            ("end to end", self.end_to_end_ms),
        ] {
            // Answers of one token have nothing between two.
            if p != Percentiles::default() {
                text += &format!("{what:22}{:>7.1} ms{:>7.1} ms{:>7.1} ms\n", p.p50, p.p95, p.p99);
            }
        }
        text
    }
}

/// The histograms of all rounds' latencies.
pub(super) fn histograms(rounds: &[Round]) -> String {
    let samples = || rounds.iter().flat_map(|round| &round.outcomes).flatten();
    let first = samples().map(|s| millis(s.first_token)).collect::<Vec<_>>();
    let between = samples().flat_map(|s| &s.gaps).copied().map(millis).collect::<Vec<_>>();
    let whole = samples().map(|s| millis(s.end_to_end)).collect::<Vec<_>>();
    [("time to first token", first), ("time between tokens", between), ("end to end", whole)]
        .iter()
        .map(|(title, values)| histogram(title, values))
        .collect()
}

/// How often each failure has come, the most frequent first.
pub(super) fn faults(rounds: &[Round]) -> Vec<(String, usize)> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for fault in rounds.iter().flat_map(|round| &round.outcomes).filter_map(|outcome| outcome.as_ref().err()) {
        *counts.entry(fault).or_default() += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().map(|(fault, count)| (fault.to_owned(), count)).collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    counts
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Between the two nearest of the sorted values; 0 of none.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let place = share * sorted.len().saturating_sub(1) as f64;
    let at = |index: f64| sorted.get(index as usize).copied().unwrap_or(0.0);
    at(place.floor()) + place.fract() * (at(place.ceil()) - at(place.floor()))
}

/// Bars over milliseconds, each row the same factor wider than the last: tails are long. Empty where there is nothing to see.
fn histogram(title: &str, values: &[f64]) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min).max(1e-3);
    let most = values.iter().copied().fold(0.0, f64::max).max(1e-3);
    if values.len() < 2 {
        return String::new();
    }
    let factor = (most / least).powf(1.0 / ROWS as f64).max(1.0 + 1e-6);
    let mut counts = [0usize; ROWS];
    for value in values {
        let row = (value.max(least) / least).ln() / factor.ln();
        if let Some(count) = counts.get_mut((row as usize).min(ROWS - 1)) {
            *count += 1;
        }
    }
    let highest = counts.iter().copied().max().unwrap_or(1).max(1);
    let mut text = format!("\n  {title}, ms\n");
    for (row, count) in (0..).zip(counts) {
        let from = least * factor.powi(row);
        text += &format!("  {from:>9.1}  {} {count}\n", bar(BAR * count as f64 / highest as f64));
    }
    text
}

/// A bar of so many characters, to an eighth of one.
fn bar(length: f64) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = (length * 8.0).ceil() as usize;
    "█".repeat(eighths / 8) + EIGHTHS.get(eighths % 8).unwrap_or(&"")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(first: u64, gaps: &[u64]) -> Sample {
        let gaps: Vec<_> = gaps.iter().map(|ms| Duration::from_millis(*ms)).collect();
        let first_token = Duration::from_millis(first);
        let end_to_end = first_token + gaps.iter().sum::<Duration>();
        Sample { prompt_tokens: 10, generated_tokens: 1 + gaps.len() as u32, first_token, gaps, end_to_end }
    }

    fn round(outcomes: Vec<Result<Sample, String>>, seconds: u64) -> Round {
        Round { numbers: outcomes.len() as u64, elapsed: Duration::from_secs(seconds), outcomes }
    }

    #[test]
    fn quantiles_lie_between_values() {
        let values: Vec<f64> = (1..=101).map(f64::from).collect();
        assert_eq!([0.0, 0.5, 0.95, 0.99, 1.0].map(|share| quantile(&values, share)), [1.0, 51.0, 96.0, 100.0, 101.0]);
        assert_eq!(quantile(&[1.0, 2.0], 0.5), 1.5);
        assert_eq!((quantile(&[3.0], 0.99), quantile(&[], 0.5)), (3.0, 0.0));
    }

    #[test]
    fn figures_count_what_was_answered() {
        let figures =
            Figures::of(&round(vec![Ok(sample(100, &[10, 20])), Err("no".into()), Ok(sample(300, &[30]))], 2));
        assert_eq!((figures.answered, figures.failed), (2.0, 1.0));
        assert_eq!((figures.prompt_tokens, figures.generated_tokens), (20.0, 5.0));
        assert_eq!((figures.generated_per_second, figures.tokens_per_second), (2.5, 12.5));
        assert_eq!((figures.first_token_ms.p50, figures.between_tokens_ms.p50), (200.0, 20.0));
        assert_eq!(figures.end_to_end_ms.p50, 230.0);
    }

    #[test]
    fn medians_are_of_each_figure() {
        let rounds = [4, 1, 2].map(|seconds| Figures::of(&round(vec![Ok(sample(100 * seconds, &[10]))], seconds)));
        let median = Figures::median(&rounds);
        assert_eq!((median.seconds, median.generated_per_second, median.first_token_ms.p99), (2.0, 1.0, 200.0));
    }

    #[test]
    fn faults_are_counted() {
        let outcomes = ["a", "b", "b"].map(|fault| Err(fault.to_owned())).into();
        assert_eq!(faults(&[round(outcomes, 1)]), [("b".to_owned(), 2), ("a".to_owned(), 1)]);
    }

    #[test]
    fn histograms_hold_every_value() {
        let drawn = histogram("x", &[1.0, 1.0, 10.0, 1000.0]);
        let counts: Vec<usize> = drawn.lines().filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
        assert_eq!(
            (counts.len(), counts.iter().sum::<usize>(), counts[0], counts[ROWS - 1]),
            (ROWS, 4, 2, 1),
            "{drawn}"
        );
        assert_eq!(histogram("x", &[1.0]), "");
        assert!(histogram("x", &[5.0, 5.0]).contains("█ 2"), "equal values are one bar");
    }
}
