//! The head: log-probabilities of the tokens that follow, and their gradients, without holding the logits of many rows.

use rayon::prelude::*;

use super::buffers::Buffer;
use super::{Scope, TokenScores};
use crate::kernels::cpu;

/// Logits that are held at a time.
const MAX_LOGITS: usize = 1 << 24;

impl Scope<'_> {
    /// Scores each row's target. `x`: `[targets, hidden_size]`, the head's input. With `slopes`, of the same size, that becomes the
    /// gradient of each row's log-probability to its input: the row of W of the target less the mean of all by their probabilities.
    pub(super) fn score(&self, x: &mut [f32], targets: &[u32], mut slopes: Option<&mut [f32]>) -> TokenScores {
        let (width, vocab) = (self.model.config().hidden_size, self.model.vocab_size());
        let most = rows_at_a_time(vocab);
        let mut scores = TokenScores { logprobs: Vec::with_capacity(targets.len()), is_greedy: Vec::new() };
        for (i, (x, targets)) in x.chunks_mut(most * width).zip(targets.chunks(most)).enumerate() {
            let mut logits = self.logits(x);
            let of_row = |(logits, target): (&mut [f32], &u32)| {
                let logprob = f64::from(logits[*target as usize]) - cpu::log_sum_exp(logits);
                (logprob as f32, cpu::argmax(logits) == Some(*target as usize))
            };
            let found: Vec<(f32, bool)> = logits.par_chunks_exact_mut(vocab).zip(targets).map(of_row).collect();
            scores.logprobs.extend(found.iter().map(|(logprob, _)| logprob));
            scores.is_greedy.extend(found.iter().map(|(_, greedy)| greedy));
            if let Some(slopes) = &mut slopes {
                self.slopes(&mut logits, targets, &mut slopes[i * most * width..][..x.len()]);
            }
        }
        scores
    }

    /// Returns the logits of rows, `[rows, vocab_size]`.
    pub(super) fn logits(&self, x: &mut [f32]) -> Buffer {
        let mut products = self.products(x, &[(self.model.head(), None)]);
        let mut logits = products.swap_remove(0);
        let config = self.model.config().logits;
        logits.par_chunks_exact_mut(self.model.vocab_size()).for_each(|logits| config.apply(logits));
        logits
    }

    /// The gradients of the targets' log-probabilities to the head's input; of the logits nothing is left.
    fn slopes(&self, logits: &mut [f32], targets: &[u32], slopes: &mut [f32]) {
        let (config, vocab) = (self.model.config().logits, self.model.vocab_size());
        logits.par_chunks_exact_mut(vocab).zip(targets).for_each(|(logits, target)| {
            let before = (!config.is_plain()).then(|| logits.to_vec());
            cpu::softmax(logits, 1.0);
            logits.iter_mut().for_each(|p| *p = -*p);
            logits[*target as usize] += 1.0;
            if let Some(before) = before {
                config.backward(&before, logits);
            }
        });
        slopes.fill(0.0);
        self.frozen_backward(self.model.head(), logits, slopes);
    }
}

/// Rows whose logits are held at a time.
pub(super) fn rows_at_a_time(vocab: usize) -> usize {
    (MAX_LOGITS / vocab).max(1)
}
