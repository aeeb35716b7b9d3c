//! What is minimised. An objective owns its examples as ids, says which log-probabilities it needs of some of them, and turns those into a
//! loss and its derivatives; the loop in `fit` knows no more.

mod dpo;
pub mod measures;
mod sft;

use crate::data::Examples;
use crate::error::{Error, Result};
use crate::model::traced::TokenScores;
use crate::request;
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

    /// The sequences of some examples, of which the tokens in the loss are scored, in order.
    fn sequences(&self, examples: &[usize]) -> Vec<&Conversation>;

    /// The sum of the loss over the examples, which a step divides by the sum of their weights. `scores`: of the tokens in the loss of
    /// [`Objective::sequences`].
    fn loss(&self, examples: &[usize], scores: &TokenScores) -> Result<LossSum>;

    /// Takes the scores that the frozen policy gives by which preferences are measured: of examples, once, before any step or evaluation of
    /// theirs.
    fn take_reference(&mut self, _examples: &[usize], _scores: &TokenScores) {}

    /// Whether [`Objective::take_reference`] does anything.
    fn needs_reference(&self) -> bool {
        false
    }
}

/// Returns the objective that a job names, over its examples.
///
/// # Errors
/// An internal one where the examples are of another kind.
pub(super) fn objective<'a>(spec: request::Objective, examples: &'a Examples) -> Result<Box<dyn Objective + 'a>> {
    match (spec, examples) {
        (request::Objective::Sft, Examples::Sft(examples)) => Ok(Box::new(Sft::new(examples))),
        (request::Objective::Dpo { beta, label_smoothing }, Examples::Dpo(pairs)) => {
            let loss = DpoLoss { beta: beta.into(), label_smoothing: label_smoothing.into() };
            Ok(Box::new(Dpo::new(pairs, loss)))
        }
        _ => Err(Error::internal("the examples are not of the kind the objective needs")),
    }
}

/// A summed loss and what else is reported about its examples.
#[derive(Debug)]
pub struct LossSum {
    /// The loss, nats.
    pub loss: f64,
    /// Its derivative by each of the log-probabilities, in their order.
    pub derivatives: Vec<f32>,
    /// Sums of what is measured beside the loss.
    pub measures: Measures,
}

/// For each sequence the positions i whose next token is in the loss, as `Model::score_tokens` wants them.
pub(super) fn wanted(sequences: &[&Conversation]) -> Vec<(usize, usize)> {
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
