//! From logits to a token. The same logits, history, settings, seed and position give the same token.

use std::borrow::Cow;
use std::collections::HashMap;

use crate::kernels::{argmax, log_sum_exp};
use crate::random::{Purpose, Stream};
use crate::request::{BAN, Sampling, TokenLogprob};

/// First guess of how many tokens a nucleus holds; doubled until it fits.
const NUCLEUS: usize = 128;

/// What a token is drawn after.
#[derive(Debug, Clone, Copy, Default)]
pub struct History<'a> {
    /// Where penalties are on, the tokens before it.
    pub counts: Option<&'a TokenCounts>,
    /// Ids that may not come yet.
    pub withheld: &'a [u32],
}

/// The tokens that penalties look at. Kept from token to token: to count all that came before for each new one would make an answer cost
/// the square of its length.
#[derive(Debug, Clone)]
pub struct TokenCounts {
    /// How often each token stands in the answer; 0: only in the prompt.
    in_answer: HashMap<u32, u32>,
}

impl TokenCounts {
    /// Counts the tokens of a prompt; `None` where no penalty is on.
    pub fn new(sampling: &Sampling, prompt: &[u32]) -> Option<Self> {
        let repetition = sampling.repetition_penalty != 1.0;
        let any = repetition || sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0;
        // The prompt counts for repetition alone.
        let prompt = if repetition { prompt } else { &[] };
        any.then(|| Self { in_answer: prompt.iter().map(|id| (*id, 0)).collect() })
    }

    /// Counts one more token of the answer.
    pub fn push(&mut self, id: u32) {
        *self.in_answer.entry(id).or_default() += 1;
    }
}

/// Draws the token at `position`. `None` where the logits are not numbers.
pub fn sample(logits: &[f32], history: History<'_>, sampling: &Sampling, position: usize) -> Option<u32> {
    let logits = adjusted(logits, history, sampling);
    let best = argmax(&logits)? as u32;
    if sampling.temperature == 0.0 {
        return Some(best);
    }
    let largest = logits[best as usize];
    let weights: Vec<f64> = logits.iter().map(|l| f64::from((l - largest) / sampling.temperature).exp()).collect();
    let kept = candidates(&weights, sampling);
    let total: f64 = kept.iter().map(|id| weights[*id as usize]).sum();
    let uniform = Stream::new(sampling.seed, Purpose::Sampling).uniform(position as u64, 0);
    let mut left = f64::from(uniform) * total;
    for id in &kept {
        left -= weights[*id as usize];
        if left < 0.0 {
            return Some(*id);
        }
    }
    // Rounding may leave a trace: the last token that can be drawn.
    kept.into_iter().rfind(|id| weights[*id as usize] > 0.0)
}

/// The logits after what is withheld, biases and penalties, in this order.
fn adjusted<'a>(logits: &'a [f32], history: History<'_>, sampling: &Sampling) -> Cow<'a, [f32]> {
    let mut logits = Cow::Borrowed(logits);
    let mut change = |id: u32, new: &dyn Fn(f32) -> f32| {
        if let Some(logit) = logits.to_mut().get_mut(id as usize) {
            *logit = new(*logit);
        }
    };
    history.withheld.iter().for_each(|id| change(*id, &|_| f32::NEG_INFINITY));
    for (id, bias) in &sampling.logit_bias {
        change(*id, &|logit| if *bias <= BAN { f32::NEG_INFINITY } else { logit + bias });
    }
    let (repetition, presence, frequency) =
        (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty);
    for (id, count) in history.counts.iter().flat_map(|counts| &counts.in_answer) {
        // Keskar et al. 2019.
        change(*id, &|logit| if logit > 0.0 { logit / repetition } else { logit * repetition });
        if *count > 0 {
            change(*id, &|logit| logit - presence - frequency * *count as f32);
        }
    }
    logits
}

/// The ids that top-k, then top-p, then min-p leave.
fn candidates(weights: &[f64], sampling: &Sampling) -> Vec<u32> {
    let limit = if sampling.top_k == 0 { weights.len() } else { weights.len().min(sampling.top_k as usize) };
    let mut kept = if sampling.top_p < 1.0 {
        nucleus(weights, limit, f64::from(sampling.top_p))
    } else if limit < weights.len() {
        ranked(weights, limit)
    } else {
        (0..weights.len() as u32).collect()
    };
    if sampling.min_p > 0.0 {
        // The largest weight is 1.
        kept.retain(|id| weights[*id as usize] >= f64::from(sampling.min_p));
    }
    kept
}

/// The `n` heaviest ids, heaviest first; among equals the lowest id first.
fn ranked(weights: &[f64], n: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..weights.len() as u32).collect();
    let order = |a: &u32, b: &u32| weights[*b as usize].total_cmp(&weights[*a as usize]).then(a.cmp(b));
    if n < ids.len() {
        ids.select_nth_unstable_by(n, order);
        ids.truncate(n);
    }
    ids.sort_unstable_by(order);
    ids
}

/// The fewest of the `limit` heaviest ids that hold the share `top_p` of their weight.
fn nucleus(weights: &[f64], limit: usize, top_p: f64) -> Vec<u32> {
    let sum = |ids: &[u32]| ids.iter().map(|id| weights[*id as usize]).sum::<f64>();
    let total = if limit < weights.len() { sum(&ranked(weights, limit)) } else { weights.iter().sum() };
    let mut n = NUCLEUS.min(limit);
    loop {
        let mut ids = ranked(weights, n);
        let mut mass = 0.0;
        let end = ids.iter().position(|id| {
            mass += weights[*id as usize];
            mass >= top_p * total
        });
        if let Some(end) = end {
            ids.truncate(end + 1);
            return ids;
        }
        if n == limit {
            return ids;
        }
        n = (2 * n).min(limit);
    }
}

/// ln softmax of a row, at `id` and at the `top` most likely ids. Always summed in the order of the ids.
pub fn logprob(logits: &[f32], id: u32, top: usize) -> TokenLogprob {
    let log_sum = log_sum_exp(logits);
    let at = |id: u32| logits.get(id as usize).map_or(f32::NEG_INFINITY, |l| (f64::from(*l) - log_sum) as f32);
    TokenLogprob { id, logprob: at(id), top: top_ids(logits, top).into_iter().map(|id| (id, at(id))).collect() }
}

/// The most likely ids of a row with their log-probabilities, best first.
pub fn top_logprobs(logits: &[f32], top: usize) -> Vec<(u32, f32)> {
    logprob(logits, 0, top).top
}

fn top_ids(logits: &[f32], n: usize) -> Vec<u32> {
    let mut best: Vec<u32> = Vec::with_capacity(n + 1);
    for (id, logit) in logits.iter().enumerate().filter(|_| n > 0) {
        if best.len() == n && best.last().is_some_and(|last| logits[*last as usize] >= *logit) {
            continue;
        }
        let at = best.partition_point(|other| logits[*other as usize] >= *logit);
        best.insert(at, id as u32);
        best.truncate(n);
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling() -> Sampling {
        Sampling { temperature: 1.0, ..Sampling::default() }
    }

    fn drawn(logits: &[f32], sampling: &Sampling) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        (0..4000)
            .for_each(|position| counts[sample(logits, History::default(), sampling, position).unwrap() as usize] += 1);
        counts
    }

    #[test]
    fn greedy_takes_the_lowest_of_the_largest() {
        assert_eq!(sample(&[1.0, 3.0, 3.0], History::default(), &Sampling::default(), 0), Some(1));
        assert_eq!(sample(&[f32::NAN; 3], History::default(), &Sampling::default(), 0), None);
        assert_eq!(sample(&[f32::NAN, 1.0], History::default(), &sampling(), 0), None);
        assert_eq!(sample(&[f32::NAN, 1.0], History::default(), &Sampling::default(), 0), None);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.5f32, 0.25, 0.125, 0.125].map(f32::ln);
        for (count, p) in drawn(&logits, &sampling()).into_iter().zip([0.5, 0.25, 0.125, 0.125]) {
            assert!((count as f64 / 4000.0 - p).abs() < 0.03, "{count} {p}");
        }
    }

    #[test]
    fn truncation_keeps_what_it_says() {
        let logits = [0.5f32, 0.25, 0.125, 0.125].map(f32::ln);
        let kept = |s: Sampling| drawn(&logits, &s).iter().map(|c| usize::from(*c > 0)).collect::<Vec<_>>();
        assert_eq!(kept(Sampling { top_k: 2, ..sampling() }), [1, 1, 0, 0]);
        assert_eq!(kept(Sampling { top_p: 0.7, ..sampling() }), [1, 1, 0, 0]);
        assert_eq!(kept(Sampling { min_p: 0.4, ..sampling() }), [1, 1, 0, 0]);
        assert_eq!(kept(Sampling { top_k: 3, top_p: 0.99, ..sampling() }), [1, 1, 1, 0]);
    }

    #[test]
    fn a_wide_nucleus_is_found() {
        let logits = vec![0.0; 1000];
        let weights = vec![1.0; 1000];
        assert_eq!(nucleus(&weights, 1000, 0.5).len(), 500);
        assert!(sample(&logits, History::default(), &Sampling { top_p: 0.9, ..sampling() }, 3).is_some());
    }

    /// The counts after a prompt and the tokens of an answer.
    fn after(sampling: &Sampling, prompt: &[u32], answer: &[u32]) -> TokenCounts {
        let mut counts = TokenCounts::new(sampling, prompt).unwrap();
        answer.iter().for_each(|id| counts.push(*id));
        counts
    }

    fn history(counts: &TokenCounts) -> History<'_> {
        History { counts: Some(counts), withheld: &[] }
    }

    #[test]
    fn repetition_is_penalised() {
        let s = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(sample(&[3.0, 2.0], history(&after(&s, &[0], &[])), &s, 0), Some(1));
        assert_eq!(sample(&[3.0, 2.0], history(&after(&s, &[], &[0])), &s, 0), Some(1));
        assert_eq!(sample(&[-1.0, -1.5], history(&after(&s, &[0, 0, 99], &[])), &s, 0), Some(1));
        assert!(TokenCounts::new(&Sampling::default(), &[1, 2]).is_none(), "nothing is counted that nothing looks at");
    }

    #[test]
    fn presence_counts_once_and_frequency_each_time_in_the_answer_alone() {
        let logits = [3.0, 2.0, 0.0];
        let presence = Sampling { presence_penalty: 1.5, ..Sampling::default() };
        let frequency = Sampling { frequency_penalty: 0.6, ..Sampling::default() };
        let once = after(&presence, &[0, 0, 0], &[0, 1, 0]);
        assert_eq!(*adjusted(&logits, history(&once), &presence), [1.5, 0.5, 0.0]);
        let twice = after(&frequency, &[9], &[0, 1, 0, 77]);
        let twice = adjusted(&logits, history(&twice), &frequency);
        assert_eq!(*twice, [3.0 - 0.6 * 2.0, 2.0 - 0.6, 0.0], "an id that no logit has is passed over");
        let prompt = after(&presence, &[0, 0, 0, 0], &[]);
        assert_eq!(sample(&logits, history(&prompt), &presence, 0), Some(0), "the prompt does not count");
        assert_eq!(sample(&logits, history(&after(&presence, &[], &[0])), &presence, 0), Some(1));
        let liked = Sampling { presence_penalty: -2.0, ..Sampling::default() };
        let answer = after(&liked, &[], &[1]);
        assert_eq!(sample(&[1.0, 0.0], history(&answer), &liked, 0), Some(1), "a negative one makes it likelier");
    }

    #[test]
    fn all_penalties_add_up() {
        let s =
            Sampling { repetition_penalty: 2.0, presence_penalty: 0.5, frequency_penalty: 0.25, ..Sampling::default() };
        let counts = after(&s, &[0, 1, 1], &[1, 2, 2]);
        assert_eq!(*adjusted(&[4.0, 4.0, -4.0, 4.0], history(&counts), &s), [2.0, 1.25, -9.0, 4.0]);
    }

    #[test]
    fn biases_move_logits_and_ban() {
        let biased = |logit_bias: &[(u32, f32)]| Sampling { logit_bias: logit_bias.to_vec(), ..Sampling::default() };
        assert_eq!(sample(&[3.0, 2.0, 1.0], History::default(), &biased(&[(2, 2.5)]), 0), Some(2));
        assert_eq!(
            sample(&[3.0, -400.0], History::default(), &biased(&[(0, -100.0)]), 0),
            Some(1),
            "a ban is no number"
        );
        let drawn = drawn(&[0.0; 4], &Sampling { temperature: 1.0, ..biased(&[(3, -100.0), (1, -100.0)]) });
        assert!(drawn[0] > 0 && drawn[2] > 0 && drawn[1] == 0 && drawn[3] == 0, "{drawn:?}");
        let withheld = History { withheld: &[0], ..History::default() };
        assert_eq!(sample(&[3.0, 2.0], withheld, &Sampling::default(), 0), Some(1));
    }

    #[test]
    fn logprobs_sum_to_one_and_rank() {
        let logits = [1.0, 3.0, 2.0, 3.0];
        let all: f32 = (0..4).map(|id| logprob(&logits, id, 0).logprob.exp()).sum();
        assert!((all - 1.0).abs() < 1e-6);
        assert_eq!(top_logprobs(&logits, 3).iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 3, 2]);
        assert!(top_logprobs(&logits, 0).is_empty());
    }

    #[test]
    fn a_draw_depends_on_seed_and_position() {
        let logits = vec![0.0; 512];
        let at = |seed, position| sample(&logits, History::default(), &Sampling { seed, ..sampling() }, position);
        assert_eq!(at(7, 3), at(7, 3));
        assert!(at(7, 3) != at(8, 3) || at(7, 4) != at(8, 4));
    }
}
