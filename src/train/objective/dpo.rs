//! Direct preference optimisation (Rafailov et al. 2023), sigmoid loss, with label smoothing (conservative DPO).

use crate::data::Pair;
use crate::error::{Error, Result};
use crate::model::traced::TokenScores;
use crate::request::metric::{ACCURACIES, CHOSEN_LOGPS, CHOSEN_REWARDS, MARGINS, REJECTED_LOGPS, REJECTED_REWARDS};
use crate::text::Conversation;
use crate::train::objective::{LossSum, Measures, Objective, loss_tokens};

/// The loss of pairs of sequence log-probabilities.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DpoLoss {
    /// How much a preference counts against moving away from the reference.
    pub beta: f64,
    /// Share of labels taken as flipped.
    pub label_smoothing: f64,
}

/// The loss of pairs.
#[derive(Debug)]
pub struct PairLoss {
    /// Summed over the pairs, nats.
    pub loss: f64,
    /// The derivative by each chosen answer's log-probability; that by the rejected one's is its negative.
    pub slopes: Vec<f64>,
    /// What else is reported of them.
    pub measures: Measures,
}

impl DpoLoss {
    /// For pairs' log-probabilities under the policy and the reference: the sum of -(1 - s) ln sigmoid(h) - s ln sigmoid(-h), where h is the
    /// margin.
    pub fn sum(&self, policy: &[PairLogprobs], reference: &[PairLogprobs]) -> PairLoss {
        let margin = |pair: &PairLogprobs| pair.chosen - pair.rejected;
        let margins = policy.iter().zip(reference).map(|(policy, of)| self.beta * (margin(policy) - margin(of)));
        let margins: Vec<f64> = margins.collect();
        // -ln sigmoid(-h) = h - ln sigmoid(h)
        let loss = margins.iter().map(|h| softplus(-h) + self.label_smoothing * h).sum();
        let slopes = margins.iter().map(|h| self.beta * (self.label_smoothing - 1.0 / (1.0 + h.exp()))).collect();
        PairLoss { loss, slopes, measures: self.measures(&margins, policy, reference) }
    }

    fn measures(&self, margins: &[f64], policy: &[PairLogprobs], reference: &[PairLogprobs]) -> Measures {
        let sum = |of: fn(&PairLogprobs) -> f64| -> f64 { policy.iter().map(of).sum() };
        let reward = |of: fn(&PairLogprobs) -> f64| self.beta * (sum(of) - reference.iter().map(of).sum::<f64>());
        let correct = margins.iter().filter(|margin| **margin > 0.0).count() as f64;
        let sums = [
            (CHOSEN_REWARDS, reward(|pair| pair.chosen)),
            (REJECTED_REWARDS, reward(|pair| pair.rejected)),
            (MARGINS, margins.iter().sum()),
            (ACCURACIES, correct),
            (CHOSEN_LOGPS, sum(|pair| pair.chosen)),
            (REJECTED_LOGPS, sum(|pair| pair.rejected)),
        ];
        let mut measures = Measures::default();
        sums.into_iter().for_each(|(name, sum)| measures.add(name, sum, margins.len()));
        measures
    }
}

/// ln p of both answers of a pair, each summed over its tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairLogprobs {
    pub chosen: f64,
    pub rejected: f64,
}

/// ln(1 + e^x) = max(x, 0) + ln(1 + e^-|x|), which never overflows.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// Pairs and the log-probabilities that the reference gives them.
#[derive(Debug)]
pub struct Dpo<'a> {
    pairs: &'a [Pair],
    loss: DpoLoss,
    /// Under the reference; `None` until scored.
    reference: Vec<Option<PairLogprobs>>,
}

impl<'a> Dpo<'a> {
    /// Returns the objective over pairs.
    pub fn new(pairs: &'a [Pair], loss: DpoLoss) -> Self {
        Self { pairs, loss, reference: vec![None; pairs.len()] }
    }

    /// The sides of some examples: first all chosen answers, then all rejected ones.
    fn sides(&self, examples: &[usize]) -> impl Iterator<Item = &Conversation> {
        let side = |pick: fn(&Pair) -> &Conversation| examples.iter().map(move |e| pick(&self.pairs[*e]));
        side(|pair| &pair.chosen).chain(side(|pair| &pair.rejected))
    }

    /// Sums over each answer's tokens.
    fn pair_logprobs(&self, examples: &[usize], scores: &TokenScores) -> Vec<PairLogprobs> {
        let mut left = &scores.logprobs[..];
        let sum = |answer: &Conversation| -> f64 {
            let (own, rest) = left.split_at(loss_tokens(answer));
            left = rest;
            own.iter().map(|logprob| f64::from(*logprob)).sum()
        };
        let sums: Vec<f64> = self.sides(examples).map(sum).collect();
        let (chosen, rejected) = sums.split_at(examples.len());
        chosen.iter().zip(rejected).map(|(&chosen, &rejected)| PairLogprobs { chosen, rejected }).collect()
    }
}

impl Objective for Dpo<'_> {
    fn count(&self) -> usize {
        self.pairs.len()
    }

    fn tokens(&self, example: usize) -> usize {
        self.pairs[example].tokens()
    }

    fn weight(&self, _example: usize) -> f64 {
        1.0
    }

    fn sequences(&self, examples: &[usize]) -> Vec<&Conversation> {
        self.sides(examples).collect()
    }

    fn loss(&self, examples: &[usize], scores: &TokenScores) -> Result<LossSum> {
        let known: Option<Vec<_>> = examples.iter().map(|example| self.reference[*example]).collect();
        let known = known.ok_or_else(|| Error::internal("a pair was used before the reference had scored it"))?;
        let PairLoss { loss, slopes, measures } = self.loss.sum(&self.pair_logprobs(examples, scores), &known);
        let of_answers = slopes.iter().copied().chain(slopes.iter().map(|slope| -slope));
        let of_tokens = |(answer, slope): (&Conversation, f64)| std::iter::repeat_n(slope as f32, loss_tokens(answer));
        let derivatives = self.sides(examples).zip(of_answers).flat_map(of_tokens).collect();
        Ok(LossSum { loss, derivatives, measures })
    }

    fn take_reference(&mut self, examples: &[usize], scores: &TokenScores) {
        for (example, logprobs) in examples.iter().zip(self.pair_logprobs(examples, scores)) {
            self.reference[*example] = Some(logprobs);
        }
    }

    fn needs_reference(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs<const N: usize>(values: [(f64, f64); N]) -> [PairLogprobs; N] {
        values.map(|(chosen, rejected)| PairLogprobs { chosen, rejected })
    }

    #[test]
    fn an_indifferent_policy_costs_ln_2_a_pair() {
        let loss = DpoLoss { beta: 0.1, label_smoothing: 0.0 };
        let reference = pairs([(-5.0, -9.0), (-7.0, -3.0)]);
        let sum = loss.sum(&reference, &reference);
        assert!((sum.loss - 2.0 * 2_f64.ln()).abs() < 1e-12);
        let means = sum.measures.means();
        assert_eq!((means[MARGINS], means[ACCURACIES], means[CHOSEN_REWARDS]), (0.0, 0.0, 0.0));
        assert_eq!((means[CHOSEN_LOGPS], means[REJECTED_LOGPS]), (-6.0, -6.0));
    }

    #[test]
    fn loss_and_derivatives_agree_with_the_closed_form() {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let loss = DpoLoss { beta: 0.5, label_smoothing: 0.2 };
        let reference = pairs([(-2.0, -3.0), (-1.0, -1.5)]);
        let policy = pairs([(-1.0, -3.0), (-6.0, -2.0)]);
        let sum = loss.sum(&policy, &reference);
        let margins = [0.5 * (2.0 - 1.0), 0.5 * (-4.0 - 0.5)];
        let expected: f64 = margins.iter().map(|h| -0.8 * sigmoid(*h).ln() - 0.2 * sigmoid(-h).ln()).sum();
        assert!((sum.loss - expected).abs() < 1e-12);
        let means = sum.measures.means();
        // Half of beta * (pi - ref) of either answer.
        let expected = [
            (MARGINS, margins.iter().sum::<f64>() / 2.0),
            (ACCURACIES, 0.5),
            (CHOSEN_REWARDS, (0.5 * 1.0 - 0.5 * 5.0) / 2.0),
            (REJECTED_REWARDS, (0.0 - 0.5 * 0.5) / 2.0),
            (CHOSEN_LOGPS, -3.5),
            (REJECTED_LOGPS, -2.5),
        ];
        for (name, expected) in expected {
            assert!((means[name] - expected).abs() < 1e-12, "{name}: {} {expected}", means[name]);
        }
        for (slope, margin) in sum.slopes.iter().zip(margins) {
            assert!((slope - 0.5 * (sigmoid(margin) - 0.8)).abs() < 1e-12);
        }
    }

    #[test]
    fn extreme_margins_stay_finite() {
        let loss = DpoLoss { beta: 1.0, label_smoothing: 0.0 };
        for (margin, expected, slope) in [(1e4, 0.0, 0.0), (-1e4, 1e4, -1.0)] {
            let sum = loss.sum(&pairs([(margin, 0.0)]), &pairs([(0.0, 0.0)]));
            assert_eq!((sum.loss, sum.slopes[0]), (expected, slope));
        }
    }
}
