//! Supervised fine-tuning: the cross-entropy of the tokens in the loss.

use std::sync::Arc;

use crate::error::Result;
use crate::model::Model;
use crate::model::traced::ForwardOptions;
use crate::request::metric::TOKEN_ACCURACY;
use crate::text::Conversation;
use crate::train::objective::{LossSum, Measures, Objective, loss_tokens, score_loss_tokens};

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

    fn loss(&self, model: &Arc<Model>, examples: &[usize], pass: ForwardOptions<'_>) -> Result<LossSum> {
        let sequences: Vec<_> = examples.iter().map(|example| &self.examples[*example]).collect();
        let scores = score_loss_tokens(model, &sequences, pass)?;
        let mut measures = Measures::default();
        let right = scores.is_greedy.iter().filter(|greedy| **greedy).count();
        measures.add(TOKEN_ACCURACY, right as f64, scores.is_greedy.len());
        Ok(LossSum { loss: scores.logprobs.sum_all()?.neg()?, measures })
    }
}
