//! What a load consists of: when each request comes, which adapter it asks for, its prompt and its length. All of it is a function
//! of the seed and the request's number.

use std::str::FromStr;
use std::time::Duration;

use crate::api::client::proto;
use crate::random::{Purpose, Stream};
use proto::generate_request::Prompt;

/// Ids that prompts are made of: every vocabulary has them, and the first ones, which may steer, are left out. Which ids they are
/// changes nothing about the work.
const FIRST_ID: u32 = 32;
const IDS: u32 = 224;

/// A text's number lies in this range: always four digits, so that it takes the same number of tokens.
const FIRST_NUMBER: u64 = 1000;
const NUMBERS: u64 = 9000;

/// Where the tokens are drawn that all prompts begin with: no request has this number.
const SHARED: u64 = u64::MAX;

/// A count of tokens, drawn for each request from `least..=most`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Length {
    least: u32,
    most: u32,
}

impl Length {
    fn pick(self, uniform: f64) -> u32 {
        let span = f64::from(self.most - self.least) + 1.0;
        self.least + ((uniform * span) as u32).min(self.most - self.least)
    }
}

impl FromStr for Length {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.trim().parse::<u32>().ok().filter(|n| *n > 0);
        let (least, most) = match text.split_once("..") {
            Some((least, most)) => (number(least), number(most.trim_start_matches('='))),
            None => (number(text), number(text)),
        };
        match (least, most) {
            (Some(least), Some(most)) if least <= most => Ok(Self { least, most }),
            _ => Err("give a number of tokens, or a range such as 64..128 (both ends count)".into()),
        }
    }
}

/// How requests spread over the adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Spread {
    /// The base alone.
    None,
    /// All ask for the first adapter.
    Identical,
    /// In turn: with as many adapters as streams, every stream has its own.
    Distinct,
    /// Drawn, all equally likely.
    Uniform,
    /// Drawn, the k-th with a probability proportional to 1/k^s.
    Zipf,
}

/// Which of `count` adapters a request asks for.
#[derive(Debug, Clone)]
pub(super) struct Choice {
    spread: Spread,
    count: usize,
    /// Zipf's law summed up: entry k is the probability of one of the first k + 1.
    cumulative: Vec<f64>,
}

impl Choice {
    pub(super) fn new(spread: Spread, count: usize, exponent: f64) -> Self {
        let count = count.max(1);
        let weights = (1..=count).map(|k| (k as f64).powf(-exponent));
        let total: f64 = weights.clone().sum();
        let mut sum = 0.0;
        let cumulative = weights.map(|weight| {
            sum += weight / total;
            sum
        });
        Self { spread, count, cumulative: cumulative.collect() }
    }

    fn pick(&self, number: u64, uniform: f64) -> Option<usize> {
        let last = self.count - 1;
        match self.spread {
            Spread::None => None,
            Spread::Identical => Some(0),
            Spread::Distinct => Some((number % self.count as u64) as usize),
            Spread::Uniform => Some(((uniform * self.count as f64) as usize).min(last)),
            Spread::Zipf => Some(self.cumulative.partition_point(|sum| *sum <= uniform).min(last)),
        }
    }
}

/// What every request is asked.
#[derive(Debug, Clone)]
pub(super) enum Text {
    /// Random ids: the first `shared` are those of every request, the others fresh.
    Ids { length: Length, shared: u32 },
    /// This text behind a number that is fresh for each request.
    Given(String),
}

/// A draw of one request; the numbers of different draws are independent.
#[derive(Debug, Clone, Copy)]
enum Draw {
    Arrival,
    Adapter,
    PromptLength,
    MaxTokens,
}

/// A load: the requests by their number.
#[derive(Debug)]
pub(super) struct Load {
    pub seed: u64,
    pub text: Text,
    pub max_tokens: Length,
    pub choice: Choice,
    /// Full names, by index.
    pub adapters: Vec<String>,
}

impl Load {
    pub(super) fn request(&self, number: u64) -> proto::GenerateRequest {
        let chosen = self.choice.pick(number, self.draw(number, Draw::Adapter));
        proto::GenerateRequest {
            adapter: chosen.and_then(|index| self.adapters.get(index)).cloned().unwrap_or_default(),
            prompt: Some(self.prompt(number)),
            stopping: Some(proto::Stopping {
                max_tokens: Some(self.max_tokens.pick(self.draw(number, Draw::MaxTokens))),
                ignore_eos: true,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn prompt(&self, number: u64) -> Prompt {
        match &self.text {
            Text::Given(text) => {
                Prompt::Text(format!("{} {text}", FIRST_NUMBER + (self.seed % NUMBERS + number % NUMBERS) % NUMBERS))
            }
            Text::Ids { length, shared } => {
                let ids = Stream::new(self.seed, Purpose::Order);
                let length = length.pick(self.draw(number, Draw::PromptLength));
                let id = |place| FIRST_ID + ids.bits(if place < *shared { SHARED } else { number }, place) % IDS;
                Prompt::TokenIds(proto::TokenIds { ids: (0..length).map(id).collect() })
            }
        }
    }

    /// When the requests from `first` on come, `rate` a second on average: the gaps of a Poisson process are exponential.
    pub(super) fn arrivals(&self, first: u64, rate: f64) -> impl Iterator<Item = Duration> {
        (first..).scan(0.0, move |at, number| {
            *at -= (1.0 - self.draw(number, Draw::Arrival)).ln() / rate;
            Some(Duration::from_secs_f64(*at))
        })
    }

    /// Uniform in [0, 1).
    fn draw(&self, number: u64, draw: Draw) -> f64 {
        f64::from(Stream::new(self.seed, Purpose::Sampling).uniform(number, draw as u32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(spread: Spread, count: usize) -> Load {
        Load {
            seed: 7,
            text: Text::Ids { length: "20..30".parse().unwrap(), shared: 8 },
            max_tokens: "5".parse().unwrap(),
            choice: Choice::new(spread, count, 1.0),
            adapters: (0..count).map(|i| format!("a{i}")).collect(),
        }
    }

    fn ids(load: &Load, number: u64) -> Vec<u32> {
        match load.request(number).prompt {
            Some(Prompt::TokenIds(ids)) => ids.ids,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn lengths_are_a_number_or_a_range() {
        for (text, want) in [("64", (64, 64)), ("64..128", (64, 128)), ("64..=128", (64, 128))] {
            assert_eq!(text.parse(), Ok(Length { least: want.0, most: want.1 }));
        }
        for wrong in ["", "0", "-1", "8..4", "..4", "4..", "x"] {
            assert!(wrong.parse::<Length>().is_err(), "{wrong}");
        }
        let length = Length { least: 3, most: 5 };
        assert_eq!([0.0, 0.34, 0.999_999].map(|u| length.pick(u)), [3, 4, 5]);
    }

    #[test]
    fn prompts_share_their_beginning_and_nothing_else() {
        let load = load(Spread::None, 1);
        let prompts: Vec<_> = (0..200).map(|number| ids(&load, number)).collect();
        for (i, prompt) in prompts.iter().enumerate() {
            assert!((20..=30).contains(&prompt.len()));
            assert_eq!(prompt[..8], prompts[0][..8]);
            assert!(prompts[..i].iter().all(|other| other[8..16] != prompt[8..16]), "{i}");
            assert!(prompt.iter().all(|id| (FIRST_ID..FIRST_ID + IDS).contains(id)));
        }
        assert_eq!(ids(&load, 3), prompts[3], "a function of the seed and the number");
        assert_ne!(ids(&Load { seed: 8, ..load }, 3)[..8], prompts[3][..8]);
    }

    #[test]
    fn texts_begin_with_a_fresh_number_of_four_digits() {
        for seed in [0, 7, u64::MAX / 2] {
            let load = Load { seed, text: Text::Given("x".into()), ..load(Spread::None, 1) };
            let mut numbers: Vec<String> = (0..NUMBERS)
                .map(|i| match load.request(i).prompt {
                    Some(Prompt::Text(text)) => text,
                    other => panic!("{other:?}"),
                })
                .collect();
            assert!(numbers.iter().all(|text| text.len() == "1000 x".len()));
            numbers.sort();
            numbers.dedup();
            assert_eq!(numbers.len(), NUMBERS as usize);
        }
    }

    #[test]
    fn adapters_are_spread_as_asked() {
        let picks = |spread| -> Vec<String> { (0..8).map(|i| load(spread, 4).request(i).adapter).collect() };
        assert!(picks(Spread::None).iter().all(String::is_empty));
        assert!(picks(Spread::Identical).iter().all(|name| name == "a0"));
        assert_eq!(picks(Spread::Distinct), ["a0", "a1", "a2", "a3", "a0", "a1", "a2", "a3"]);
    }

    /// How often each of `count` adapters comes in `n` requests.
    fn counts(spread: Spread, count: usize, n: u64) -> Vec<f64> {
        let load = load(spread, count);
        let mut counts = vec![0.0; count];
        for number in 0..n {
            let index: usize = load.request(number).adapter[1..].parse().unwrap();
            counts[index] += 1.0 / n as f64;
        }
        counts
    }

    #[test]
    fn zipf_and_uniform_have_their_probabilities() {
        for share in counts(Spread::Uniform, 4, 20_000) {
            assert!((share - 0.25).abs() < 0.02, "{share}");
        }
        // 1, 1/2, 1/3, 1/4 over their sum.
        for (share, want) in counts(Spread::Zipf, 4, 20_000).into_iter().zip([0.48, 0.24, 0.16, 0.12]) {
            assert!((share - want).abs() < 0.02, "{share} {want}");
        }
    }

    #[test]
    fn arrivals_are_a_poisson_process() {
        let load = load(Spread::None, 1);
        let arrivals: Vec<f64> = load.arrivals(0, 50.0).take(20_000).map(|at| at.as_secs_f64()).collect();
        let gaps: Vec<f64> = arrivals.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((mean * 50.0 - 1.0).abs() < 0.03, "{mean}");
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.05, "the deviation of an exponential is its mean");
        assert!(arrivals.is_sorted());
    }
}
