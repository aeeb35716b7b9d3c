//! The head: log-probabilities of the tokens that follow, and their gradients, without holding the logits of many rows.

use rayon::prelude::*;

use super::buffers::Buffer;
use super::{Scope, TokenScores};
use crate::adapter::TokenRows;
use crate::kernels::cpu;
use crate::kernels::gemm::{Mat, Out, mul, mul_nt, mul_tn};

/// Logits that are held at a time.
const MAX_LOGITS: usize = 1 << 24;

/// Where the gradients of log-probabilities go.
pub(super) struct Slopes<'s> {
    /// To the head's input, `[targets, hidden_size]`: the row of W of the target less the mean of all by their probabilities.
    pub(super) x: &'s mut [f32],
    /// To the logits of the tokens that have rows of their own, `[targets, tokens]`.
    pub(super) tokens: &'s mut [f32],
}

impl Scope<'_> {
    /// The rows that some tokens have in the place of the head's.
    fn head_tokens(&self) -> Option<&TokenRows> {
        self.tokens_of(self.model.head_slot())
    }

    /// Scores each row's target. `x`: `[targets, hidden_size]`, the head's input. With `slopes` those become the gradients of each row's
    /// log-probability.
    pub(super) fn score(&self, x: &mut [f32], targets: &[u32], mut slopes: Option<Slopes<'_>>) -> TokenScores {
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
                let to_x = &mut slopes.x[i * most * width..][..x.len()];
                to_x.fill(0.0);
                if let Some(TokenRows { ids, rows }) = self.head_tokens() {
                    let to_tokens = &mut slopes.tokens[i * most * ids.len()..][..targets.len() * ids.len()];
                    for (logits, to) in logits.chunks_exact_mut(vocab).zip(to_tokens.chunks_exact_mut(ids.len())) {
                        to.iter_mut().zip(ids).for_each(|(to, id)| *to = std::mem::take(&mut logits[*id as usize]));
                    }
                    let out = Out { data: &mut *to_x, stride: width, accumulate: true };
                    mul(out, Mat::dense(to_tokens, ids.len()), Mat::dense(rows, width), true);
                }
                self.frozen_backward(self.head(), &logits, to_x);
            }
        }
        scores
    }

    /// Returns the logits of rows, `[rows, vocab_size]`.
    pub(super) fn logits(&self, x: &mut [f32]) -> Buffer {
        let mut products = self.products(x, &[(self.head(), None)]);
        let mut logits = products.swap_remove(0);
        if let Some(TokenRows { ids, rows }) = self.head_tokens() {
            let (width, count) = (self.model.config().hidden_size, ids.len());
            let mut own = self.take(x.len() / width * count);
            let out = Out { data: &mut own, stride: count, accumulate: false };
            mul_nt(out, Mat::dense(x, width), Mat::dense(rows, width), true);
            let of_rows = logits.chunks_exact_mut(self.model.vocab_size()).zip(own.chunks_exact(count));
            of_rows.for_each(|(logits, own)| ids.iter().zip(own).for_each(|(id, own)| logits[*id as usize] = *own));
        }
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

    /// Adds the gradient of the rows that some tokens have of the head, from those of the log-probabilities to their logits and the derivatives
    /// of the loss by the log-probabilities. `x`: as in [`Scope::score`].
    pub(super) fn head_tokens_backward(
        &self,
        x: &[f32],
        slopes: &mut [f32],
        derivatives: &[f32],
        gradient: &mut TokenRows,
    ) {
        let (width, count) = (self.model.config().hidden_size, gradient.ids.len());
        for (slopes, derivative) in slopes.chunks_exact_mut(count).zip(derivatives) {
            slopes.iter_mut().for_each(|d| *d *= derivative);
        }
        let out = Out { data: &mut gradient.rows, stride: width, accumulate: true };
        mul_tn(out, Mat::dense(slopes, count), Mat::dense(x, width), true);
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
