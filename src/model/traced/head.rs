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
                self.logit_slopes(&mut logits, targets);
                let slopes = &mut slopes[i * most * width..][..x.len()];
                slopes.fill(0.0);
                self.frozen_backward(self.head(), &logits, slopes);
            }
        }
        scores
    }

    /// Returns the logits of rows, `[rows, vocab_size]`.
    pub(super) fn logits(&self, x: &mut [f32]) -> Buffer {
        let mut products = self.products(x, &[(self.head(), None)]);
        let mut logits = products.swap_remove(0);
        let config = self.model.config().logits;
        logits.par_chunks_exact_mut(self.model.vocab_size()).for_each(|logits| config.apply(logits));
        logits
    }

    /// Adds to `dw`, the gradient of a copy of the output matrix, from the derivatives of the loss by the log-probabilities. The logits are
    /// computed again. `x`: as in [`Scope::score`].
    pub(super) fn head_backward(&self, x: &mut [f32], targets: &[u32], derivatives: &[f32], dw: &mut [f32]) {
        let (width, vocab) = (self.model.config().hidden_size, self.model.vocab_size());
        let most = (MAX_LOGITS / vocab).max(1);
        let rows = x.chunks_mut(most * width).zip(targets.chunks(most)).zip(derivatives.chunks(most));
        for ((x, targets), derivatives) in rows {
            let mut logits = self.logits(x);
            self.logit_slopes(&mut logits, targets);
            let scale = |(row, by): (&mut [f32], &f32)| row.iter_mut().for_each(|d| *d *= by);
            logits.par_chunks_exact_mut(vocab).zip(derivatives).for_each(scale);
            self.copy_backward(self.head(), x, &logits, dw);
        }
    }

    /// Logits become the gradients of the targets' log-probabilities to them.
    fn logit_slopes(&self, logits: &mut [f32], targets: &[u32]) {
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
    }
}

/// Rows whose logits are held at a time.
pub(super) fn rows_at_a_time(vocab: usize) -> usize {
    (MAX_LOGITS / vocab).max(1)
}
