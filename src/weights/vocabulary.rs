//! The vocabulary of a GGUF file, from its header alone: tokens, types, scores or merges, special ids, the chat template.

use std::collections::BTreeMap;

use super::header::Value;
use crate::error::{Error, Result};
use crate::text::{TokenizerModel, Vocabulary, is_marker, names_control, names_end};

/// The types of tokens in a file.
mod kind {
    pub const NORMAL: i64 = 1;
    pub const UNKNOWN: i64 = 2;
    pub const CONTROL: i64 = 3;
    pub const USER_DEFINED: i64 = 4;
    pub const BYTE: i64 = 6;
}

fn refused(key: &str, message: impl Into<String>) -> Error {
    Error::invalid_because("UNSUPPORTED_BASE", key, message)
}

/// A file's entries; a key of the tokenizer's is given without `tokenizer.`.
struct Entries<'a>(&'a BTreeMap<String, Value>);

impl Entries<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(&format!("tokenizer.{key}"))
    }

    fn needed(&self, key: &str) -> Result<&Value> {
        self.get(key).ok_or_else(|| refused(&format!("tokenizer.{key}"), "is missing from the file's metadata"))
    }

    fn text(&self, key: &str) -> Result<Option<&str>> {
        let wrong = |what: &str| refused(&format!("tokenizer.{key}"), what);
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => std::str::from_utf8(text).map(Some).map_err(|_| wrong("is no UTF-8")),
            Some(_) => Err(wrong("is not a text")),
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(refused(&format!("tokenizer.{key}"), "is not true or false")),
        }
    }

    fn texts(&self, key: &str) -> Result<Vec<String>> {
        let texts = self.needed(key)?.texts();
        texts.ok_or_else(|| refused(&format!("tokenizer.{key}"), "is not a list of texts in UTF-8"))
    }

    /// A token's id; `None` where the file does not say it.
    fn id(&self, name: &str, tokens: usize) -> Result<Option<u32>> {
        let key = format!("ggml.{name}_token_id");
        match self.get(&key) {
            None => Ok(None),
            // Written for "none".
            Some(Value::Integer(-1 | 0xFFFF_FFFF)) => Ok(None),
            Some(Value::Integer(id)) => match usize::try_from(*id).ok().filter(|id| *id < tokens) {
                Some(id) => Ok(Some(id as u32)),
                None => Err(refused(&format!("tokenizer.{key}"), format!("is {id}, and there are {tokens} tokens"))),
            },
            Some(_) => Err(refused(&format!("tokenizer.{key}"), "is not a whole number")),
        }
    }

    /// Each token's type.
    fn kinds(&self, tokens: usize) -> Result<Vec<i64>> {
        const KEY: &str = "ggml.token_type";
        if self.get(KEY).is_none() {
            return Ok(vec![kind::NORMAL; tokens]);
        }
        let kinds = self.needed(KEY)?.integers();
        let kinds = kinds.ok_or_else(|| refused("tokenizer.ggml.token_type", "is not a list of whole numbers"))?;
        self.as_many(KEY, kinds, tokens)
    }

    fn as_many<T>(&self, key: &str, values: Vec<T>, tokens: usize) -> Result<Vec<T>> {
        if values.len() == tokens {
            return Ok(values);
        }
        let message = format!("has {} entries, and tokenizer.ggml.tokens {tokens}", values.len());
        Err(refused(&format!("tokenizer.{key}"), message))
    }

    /// SentencePiece's scores.
    fn scores(&self, tokens: usize) -> Result<Vec<f32>> {
        const KEY: &str = "ggml.scores";
        let scores = self.needed(KEY)?.numbers();
        let scores = scores.ok_or_else(|| refused("tokenizer.ggml.scores", "is not a list of numbers"))?;
        if let Some(at) = scores.iter().position(|score| score.is_nan()) {
            return Err(refused("tokenizer.ggml.scores", format!("is not a number at {at}: the file is damaged")));
        }
        self.as_many(KEY, scores, tokens)
    }

    fn merges(&self) -> Result<Vec<(String, String)>> {
        // A piece may begin with a space: the border is the first one after its first byte.
        let pair = |merge: &String| {
            let at = 1 + merge.as_bytes().get(1..)?.iter().position(|byte| *byte == b' ')?;
            Some((merge[..at].to_owned(), merge[at + 1..].to_owned()))
        };
        let merges = self.texts("ggml.merges")?.iter().map(pair).collect::<Option<_>>();
        merges.ok_or_else(|| refused("tokenizer.ggml.merges", "holds an entry that is no pair"))
    }
}

/// What a file says of its text.
///
/// # Errors
/// UNSUPPORTED_BASE or UNSUPPORTED_TOKENIZER for what is missing, damaged or not known.
pub(super) fn vocabulary(metadata: &BTreeMap<String, Value>) -> Result<Vocabulary> {
    let entries = Entries(metadata);
    let (model, mut pre) = model(&entries)?;
    let tokens = entries.texts("ggml.tokens")?;
    let kinds = entries.kinds(tokens.len())?;
    let mut vocabulary = Vocabulary {
        model,
        chat_template: entries.text("chat_template")?.unwrap_or_default().to_owned(),
        bos: entries.id("bos", tokens.len())?,
        unknown: entries.id("unknown", tokens.len())?,
        padding: entries.id("padding", tokens.len())?,
        ..Vocabulary::default()
    };
    match model {
        TokenizerModel::BytePairs => vocabulary.merges = entries.merges()?,
        TokenizerModel::SentencePiece => {
            vocabulary.scores = entries.scores(tokens.len())?;
            vocabulary.add_space_prefix = entries.flag("ggml.add_space_prefix")?.unwrap_or(true);
            let spelled = |id: u32| Some(id).filter(|id| (*id as usize) < tokens.len());
            vocabulary.bos = vocabulary.bos.or(spelled(1));
            vocabulary.unknown = vocabulary.unknown.or(spelled(0));
            pre.clear();
        }
    }
    let wants_bos = entries.flag("ggml.add_bos_token")?;
    vocabulary.add_bos = wants_bos.unwrap_or(crate::text::adds_bos(model, &pre)) || pre == "gemma4";
    vocabulary.pre = pre;
    let eos = entries.id("eos", tokens.len())?;
    vocabulary.eos =
        eos.ok_or_else(|| refused("tokenizer.ggml.eos_token_id", "is missing from the file's metadata"))?;
    sort_kinds(&mut vocabulary, &kinds, &tokens);
    for name in ["eot", "eom"] {
        vocabulary.ends.extend(entries.id(name, tokens.len())?);
    }
    vocabulary.strips_after = strips_after(metadata, &vocabulary, &tokens);
    vocabulary.tokens = tokens;
    vocabulary.check()?;
    Ok(vocabulary)
}

/// The model, and the name of the pre-tokenizer.
fn model(entries: &Entries<'_>) -> Result<(TokenizerModel, String)> {
    let pre = entries.text("ggml.pre")?.filter(|pre| !pre.is_empty()).unwrap_or("default").to_owned();
    match entries.text("ggml.model")? {
        Some("gpt2") => Ok((TokenizerModel::BytePairs, pre)),
        Some("gemma4") => Ok((TokenizerModel::BytePairs, "gemma4".to_owned())),
        Some("llama") => Ok((TokenizerModel::SentencePiece, pre)),
        Some(other) => {
            let other: String = other.chars().take(80).collect();
            let message =
                format!("is {other:?}; byte pairs (\"gpt2\", \"gemma4\") and SentencePiece (\"llama\") can be read");
            Err(Error::invalid_because("UNSUPPORTED_TOKENIZER", "tokenizer.ggml.model", message))
        }
        None => Err(refused("tokenizer.ggml.model", "is missing from the file's metadata")),
    }
}

/// Sorts the tokens by what they are: control, found as they are written, bytes; and those that end an answer.
fn sort_kinds(vocabulary: &mut Vocabulary, kinds: &[i64], tokens: &[String]) {
    for ((id, token), kind) in (0_u32..).zip(tokens).zip(kinds) {
        let special = matches!(*kind, kind::CONTROL | kind::UNKNOWN);
        let marker = *kind == kind::USER_DEFINED && is_marker(token, &vocabulary.chat_template);
        let control = special || marker || names_control(token);
        match *kind {
            _ if control => vocabulary.control.push(id),
            kind::USER_DEFINED => vocabulary.user_defined.push(id),
            kind::BYTE => vocabulary.bytes.push(id),
            _ => {}
        }
        if names_end(token, special) {
            vocabulary.ends.push(id);
        }
    }
    // Harmony ends messages within an answer with it.
    let has = |name: &str| vocabulary.ends.iter().any(|id| tokens[*id as usize] == name);
    if has("<|return|>") && has("<|call|>") {
        vocabulary.ends.retain(|id| tokens[*id as usize] != "<|end|>");
    }
}

/// Phi 3's special tokens, but for those that begin or end a text, take the white space after them; its files say so by their name alone.
fn strips_after(metadata: &BTreeMap<String, Value>, vocabulary: &Vocabulary, tokens: &[String]) -> Vec<u32> {
    let Some(Value::Text(name)) = metadata.get("general.name") else { return Vec::new() };
    let name = String::from_utf8_lossy(name).to_lowercase();
    if !["phi-3", "phi3"].iter().any(|family| name.contains(family)) {
        return Vec::new();
    }
    let all = vocabulary.control.iter().chain(&vocabulary.user_defined).copied();
    all.filter(|id| !["<unk>", "<s>", "<|endoftext|>"].contains(&tokens[*id as usize].as_str())).collect()
}
