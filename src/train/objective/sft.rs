//! Supervised fine-tuning: the cross-entropy of the tokens in the loss.

use crate::error::Result;
use crate::model::traced::TokenScores;
use crate::request::metric::TOKEN_ACCURACY;
use crate::text::Conversation;
use crate::train::objective::{LossSum, Measures, Objective, loss_tokens};

/// Cross-entropy, averaged over the loss tokens of the whole step.
#[derive(Debug)]
pub struct Sft<'a> {
    examples: &'a [Conversation],
}

impl<'a> Sft<'a> {
    /// Returns the objective over conversations.
    pub fn new(examples: &'a [Conversation]) -> Self {
        Self { examples }
    }
}

impl Objective for Sft<'_> {
    fn count(&self) -> usize {
        self.examples.len()
    }

    fn tokens(&self, example: usize) -> usize {
        self.examples[example].ids.len()
    }

    fn weight(&self, example: usize) -> f64 {
        loss_tokens(&self.examples[example]) as f64
    }

    fn sequences(&self, examples: &[usize]) -> Vec<&Conversation> {
        examples.iter().map(|example| &self.examples[*example]).collect()
    }

    fn loss(&self, _examples: &[usize], scores: &TokenScores) -> Result<LossSum> {
        let mut measures = Measures::default();
        let right = scores.is_greedy.iter().filter(|greedy| **greedy).count();
        measures.add(TOKEN_ACCURACY, right as f64, scores.is_greedy.len());
        let loss = -scores.logprobs.iter().map(|logprob| f64::from(*logprob)).sum::<f64>();
        Ok(LossSum { loss, derivatives: vec![-1.0; scores.logprobs.len()], measures })
    }
}
