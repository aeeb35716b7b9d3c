//! What is minimised. An objective owns its examples as ids and turns some of them into a loss; the loop in `fit` knows no more.

mod dpo;
pub mod measures;
mod sft;

use std::sync::Arc;

use candle_core::Tensor;

use crate::error::Result;
use crate::model::Model;
use crate::model::traced::{ForwardOptions, TokenScores};
use crate::text::Conversation;

pub use dpo::{Dpo, DpoLoss};
pub use measures::Measures;
pub use sft::Sft;

/// A loss over examples that never changes while a job runs.
pub trait Objective {
    /// How many examples it owns.
    fn count(&self) -> usize;

    /// Ids the model sees for this example.
    fn tokens(&self, example: usize) -> usize;

    /// What this example counts in the mean over a step: its tokens in the loss, or 1 for a pair.
    fn weight(&self, example: usize) -> f64;

    /// The sum of the loss over the examples, which a step divides by the sum of their weights.
    fn loss(&self, model: &Arc<Model>, examples: &[usize], pass: ForwardOptions<'_>) -> Result<LossSum>;

    /// Scores the examples once with the frozen policy that preferences are measured against, before any step or evaluation.
    fn score_reference(
        &mut self,
        _model: &Arc<Model>,
        _examples: &[usize],
        _reference: ForwardOptions<'_>,
    ) -> Result<()> {
        Ok(())
    }

    /// Whether [`Objective::score_reference`] does anything.
    fn needs_reference(&self) -> bool {
        false
    }
}

/// A summed loss and what else is reported about its examples.
#[derive(Debug)]
pub struct LossSum {
    /// Scalar, with gradients.
    pub loss: Tensor,
    /// Sums of what is measured beside the loss.
    pub measures: Measures,
}

/// For each sequence the positions i whose next token is in the loss, as `Model::score_tokens` wants them.
fn wanted(sequences: &[&Conversation]) -> Vec<(usize, usize)> {
    let of_one = |(sequence, conversation): (usize, &&Conversation)| {
        let positions = conversation.in_loss.iter().enumerate().skip(1).filter(|(_, in_loss)| **in_loss);
        positions.map(|(i, _)| (sequence, i - 1)).collect::<Vec<_>>()
    };
    sequences.iter().enumerate().flat_map(of_one).collect()
}

/// Tokens in the loss. The first id has no prediction.
pub fn loss_tokens(conversation: &Conversation) -> usize {
    conversation.in_loss.iter().skip(1).filter(|in_loss| **in_loss).count()
}

/// Scores the tokens in the loss of all sequences, in order.
fn score_loss_tokens(model: &Arc<Model>, sequences: &[&Conversation], pass: ForwardOptions<'_>) -> Result<TokenScores> {
    let ids: Vec<&[u32]> = sequences.iter().map(|conversation| conversation.ids.as_slice()).collect();
    model.score_tokens(&ids, &wanted(sequences), pass)
}
