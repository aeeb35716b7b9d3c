//! Direct preference optimisation (Rafailov et al. 2023), sigmoid loss, with label smoothing (conservative DPO).

use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::data::Pair;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::traced::ForwardOptions;
use crate::request::metric::{ACCURACIES, CHOSEN_LOGPS, CHOSEN_REWARDS, MARGINS, REJECTED_LOGPS, REJECTED_REWARDS};
use crate::text::Conversation;
use crate::train::objective::{LossSum, Measures, Objective, loss_tokens, score_loss_tokens};

/// The loss of pairs of sequence log-probabilities.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DpoLoss {
    /// How much a preference counts against moving away from the reference.
    pub beta: f64,
    /// Share of labels taken as flipped.
    pub label_smoothing: f64,
}

impl DpoLoss {
    /// For `[pairs]` log-probabilities under the policy and their references: the sum of
    /// -(1 - s) ln sigmoid(h) - s ln sigmoid(-h), where h is the margin.
    pub fn sum(&self, chosen: &Tensor, rejected: &Tensor, reference: &[PairLogprobs]) -> Result<LossSum> {
        let reference_margin: Vec<f32> = reference.iter().map(|pair| pair.chosen - pair.rejected).collect();
        let reference_margin = Tensor::from_vec(reference_margin, reference.len(), chosen.device())?;
        let margins = (((chosen - rejected)? - reference_margin)? * self.beta)?;
        // -ln sigmoid(-h) = h - ln sigmoid(h)
        let losses = (softplus(&margins.neg()?)? + (&margins * self.label_smoothing)?)?;
        let measures = self.measures(&values(&margins)?, [&values(chosen)?, &values(rejected)?], reference);
        Ok(LossSum { loss: losses.sum_all()?, measures })
    }

    fn measures(&self, margins: &[f64], [chosen, rejected]: [&[f64]; 2], reference: &[PairLogprobs]) -> Measures {
        let reward = |policy: &[f64], of: fn(&PairLogprobs) -> f32| -> f64 {
            policy.iter().zip(reference).map(|(policy, pair)| self.beta * (policy - f64::from(of(pair)))).sum()
        };
        let correct = margins.iter().filter(|margin| **margin > 0.0).count() as f64;
        let sums = [
            (CHOSEN_REWARDS, reward(chosen, |pair| pair.chosen)),
            (REJECTED_REWARDS, reward(rejected, |pair| pair.rejected)),
            (MARGINS, margins.iter().sum()),
            (ACCURACIES, correct),
            (CHOSEN_LOGPS, chosen.iter().sum()),
            (REJECTED_LOGPS, rejected.iter().sum()),
        ];
        let mut measures = Measures::default();
        sums.into_iter().for_each(|(name, sum)| measures.add(name, sum, margins.len()));
        measures
    }
}

fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_dtype(DType::F64)?.to_vec1()?)
}

/// ln p of both answers of a pair, each summed over its tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairLogprobs {
    pub chosen: f32,
    pub rejected: f32,
}

/// ln(1 + e^x) = max(x, 0) + ln(1 + e^-|x|), which never overflows.
fn softplus(x: &Tensor) -> Result<Tensor> {
    Ok((x.relu()? + ((x.abs()?.neg()?.exp()? + 1.0)?.log()?))?)
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

    /// Sums over the answer's tokens, `[examples]` each: chosen, rejected.
    fn sequence_logprobs(
        &self,
        model: &Arc<Model>,
        examples: &[usize],
        pass: ForwardOptions<'_>,
    ) -> Result<(Tensor, Tensor)> {
        let side = |pick: fn(&Pair) -> &Conversation| examples.iter().map(move |e| pick(&self.pairs[*e]));
        let sequences: Vec<_> = side(|pair| &pair.chosen).chain(side(|pair| &pair.rejected)).collect();
        let logprobs = score_loss_tokens(model, &sequences, pass)?.logprobs;
        let mut sums = Vec::with_capacity(sequences.len());
        let mut start = 0;
        for count in sequences.iter().map(|conversation| loss_tokens(conversation)) {
            sums.push(logprobs.narrow(0, start, count)?.sum_all()?);
            start += count;
        }
        let (chosen, rejected) = sums.split_at(examples.len());
        Ok((Tensor::stack(chosen, 0)?, Tensor::stack(rejected, 0)?))
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

    fn loss(&self, model: &Arc<Model>, examples: &[usize], pass: ForwardOptions<'_>) -> Result<LossSum> {
        let known: Option<Vec<_>> = examples.iter().map(|example| self.reference[*example]).collect();
        let known = known.ok_or_else(|| Error::internal("a pair was used before the reference had scored it"))?;
        let (chosen, rejected) = self.sequence_logprobs(model, examples, pass)?;
        self.loss.sum(&chosen, &rejected, &known)
    }

    fn score_reference(&mut self, model: &Arc<Model>, examples: &[usize], reference: ForwardOptions<'_>) -> Result<()> {
        let (chosen, rejected) = self.sequence_logprobs(model, examples, reference)?;
        let sides = chosen.to_vec1::<f32>()?.into_iter().zip(rejected.to_vec1::<f32>()?);
        for (example, (chosen, rejected)) in examples.iter().zip(sides) {
            self.reference[*example] = Some(PairLogprobs { chosen, rejected });
        }
        Ok(())
    }

    fn needs_reference(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    fn pairs<const N: usize>(values: [(f32, f32); N]) -> [PairLogprobs; N] {
        values.map(|(chosen, rejected)| PairLogprobs { chosen, rejected })
    }

    fn scalar(sum: &LossSum) -> f64 {
        f64::from(sum.loss.to_scalar::<f32>().unwrap())
    }

    #[test]
    fn an_indifferent_policy_costs_ln_2_a_pair() {
        let loss = DpoLoss { beta: 0.1, label_smoothing: 0.0 };
        let reference = pairs([(-5.0, -9.0), (-7.0, -3.0)]);
        let sum = loss.sum(&tensor(&[-5.0, -7.0]), &tensor(&[-9.0, -3.0]), &reference).unwrap();
        assert!((scalar(&sum) - 2.0 * 2_f64.ln()).abs() < 1e-6);
        let means = sum.measures.means();
        assert_eq!((means[MARGINS], means[ACCURACIES], means[CHOSEN_REWARDS]), (0.0, 0.0, 0.0));
        assert_eq!((means[CHOSEN_LOGPS], means[REJECTED_LOGPS]), (-6.0, -6.0));
    }

    #[test]
    fn loss_and_gradient_agree_with_the_closed_form() {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let loss = DpoLoss { beta: 0.5, label_smoothing: 0.2 };
        let chosen = Var::from_tensor(&tensor(&[-1.0, -6.0])).unwrap();
        let rejected = Var::from_tensor(&tensor(&[-3.0, -2.0])).unwrap();
        let reference = pairs([(-2.0, -3.0), (-1.0, -1.5)]);
        let sum = loss.sum(chosen.as_tensor(), rejected.as_tensor(), &reference).unwrap();
        let margins = [0.5 * (2.0 - 1.0), 0.5 * (-4.0 - 0.5)];
        let expected: f64 = margins.iter().map(|h| -0.8 * sigmoid(*h).ln() - 0.2 * sigmoid(-h).ln()).sum();
        assert!((scalar(&sum) - expected).abs() < 1e-6);
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
            assert!((means[name] - expected).abs() < 1e-6, "{name}: {} {expected}", means[name]);
        }
        let gradients = sum.loss.backward().unwrap();
        let by_chosen = gradients.get(&chosen).unwrap().to_vec1::<f32>().unwrap();
        let by_rejected = gradients.get(&rejected).unwrap().to_vec1::<f32>().unwrap();
        for i in 0..2 {
            let slope = 0.5 * (sigmoid(margins[i]) - 0.8);
            assert!((f64::from(by_chosen[i]) - slope).abs() < 1e-6);
            assert!((f64::from(by_rejected[i]) + slope).abs() < 1e-6);
        }
    }

    #[test]
    fn extreme_margins_stay_finite() {
        let loss = DpoLoss { beta: 1.0, label_smoothing: 0.0 };
        let (zero, reference) = (tensor(&[0.0]), pairs([(0.0, 0.0)]));
        assert_eq!(scalar(&loss.sum(&tensor(&[1e4]), &zero, &reference).unwrap()), 0.0);
        assert_eq!(scalar(&loss.sum(&tensor(&[-1e4]), &zero, &reference).unwrap()), 1e4);
    }
}
