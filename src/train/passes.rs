//! How a batch is cut into passes, how large these are, and how they multiply.

use crate::adapter::{Adapter, VirtualForm, VirtualTokens};
use crate::model::traced::{PassSize, Products};
use crate::train::objective::{Objective, loss_tokens};

/// Most ids of one forward and backward pass, unless one example alone has more: bounds the memory of the activations. The loss is
/// a sum over examples, so that cutting a batch into such pieces changes nothing but the rounding.
const PIECE_TOKENS: usize = 512;

/// Cuts a batch into passes of at most `most` examples and [`PIECE_TOKENS`] ids, at least one example each.
pub(super) fn passes<'b>(objective: &dyn Objective, batch: &'b [usize], most: usize) -> Vec<&'b [usize]> {
    let mut passes = Vec::new();
    let (mut start, mut tokens) = (0, 0);
    for (end, example) in batch.iter().enumerate() {
        let more = objective.tokens(*example);
        if end > start && (tokens + more > PIECE_TOKENS || end - start >= most) {
            passes.push(&batch[start..end]);
            (start, tokens) = (end, 0);
        }
        tokens += more;
    }
    if start < batch.len() {
        passes.push(&batch[start..]);
    }
    passes
}

/// Returns how large a pass over these examples is, each of their sequences behind so many virtual tokens.
pub(super) fn pass_size(objective: &dyn Objective, examples: &[usize], virtual_tokens: usize) -> PassSize {
    let sequences = objective.sequences(examples);
    let lengths = || sequences.iter().map(|conversation| virtual_tokens + conversation.ids.len());
    PassSize {
        tokens: lengths().sum(),
        longest: lengths().max().unwrap_or(0),
        selected: sequences.iter().map(|conversation| loss_tokens(conversation)).sum(),
    }
}

/// Returns how an adapter's frozen layers are multiplied in training. Embeddings that are free take steps as large as themselves, so that the
/// rounding of what serves, of no account to other kinds, comes back a hundred times larger in the losses that follow.
pub(super) fn products(adapter: &Adapter) -> Products {
    match adapter.virtual_tokens.as_ref().map(VirtualTokens::form) {
        Some(VirtualForm::Embeddings) => Products::Exact,
        Some(VirtualForm::KeysAndValues) | None => Products::Served,
    }
}
