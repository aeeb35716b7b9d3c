//! Whether a base can be served and trained, what it would take, and what it is: from its header alone.

use std::path::Path;
use std::sync::Arc;

use super::batch::KvDtype;
use super::{Model, kv_bytes_per_token};
use crate::error::{Error, Result};
use crate::text::Text;
use crate::weights::Outline;

/// What is known of a base before it is loaded.
#[derive(Debug)]
pub struct Inspection {
    /// What its files say. The context of its numbers is the one that it would be served with.
    pub outline: Outline,
    /// Tokens that it was trained for.
    pub longest_context: Option<usize>,
    /// The tokenizer and the chat template; `None` where they cannot be used.
    pub text: Option<Arc<Text>>,
    /// Bytes of the KV cache for one token, in half precision.
    pub kv_bytes_per_token: Option<u64>,
    /// Why it can't be served and trained on the CPU; empty where it can.
    pub problems: Vec<Error>,
}

/// Looks at a GGUF file or a folder, to be served with a context of so many tokens.
///
/// # Errors
/// BASE_UNREADABLE or UNSUPPORTED_BASE where nothing can be said of it.
pub fn inspect(path: &Path, context: Option<usize>) -> Result<Inspection> {
    let mut outline = Outline::read(path)?;
    let mut problems = std::mem::take(&mut outline.problems);
    let longest_context = outline.config.as_ref().map(|config| config.context_length);
    if let Some(config) = &mut outline.config {
        problems.extend(Model::check(config).err());
        problems.extend(config.take_context(context).err());
    }
    let text = outline.vocabulary.clone().and_then(|vocabulary| match Text::new(vocabulary) {
        Ok(text) => Some(text),
        Err(problem) => {
            problems.push(problem);
            None
        }
    });
    let kv_bytes_per_token = outline.config.as_ref().map(|config| kv_bytes_per_token(config, KvDtype::F16));
    Ok(Inspection { outline, longest_context, text, kv_bytes_per_token, problems })
}
