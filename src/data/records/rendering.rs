//! A record's `text` beside its chat: the same once more, as a template renders it, or the record says more than is trained.

use serde_json::Value;

use super::fields::{Fields, Reason, is_absent, kind_of, shown};
use super::pair;
use crate::request::ChatMessage;

/// What Alpaca's templates say before the instruction.
const SENTENCES: [&str; 3] = [
    "Below is an instruction that describes a task, paired with an input that provides further context.",
    "Below is an instruction that describes a task.",
    "Write a response that appropriately completes the request.",
];
/// Words with which templates head the parts of a record.
const WORDS: [&str; 18] = [
    "system",
    "user",
    "assistant",
    "human",
    "gpt",
    "model",
    "bot",
    "ai",
    "instruction",
    "input",
    "prompt",
    "question",
    "query",
    "context",
    "response",
    "output",
    "completion",
    "answer",
];
/// Marks of templates that are not of the form `<|...|>`.
const MARKS: [&str; 11] = [
    "<s>",
    "</s>",
    "<bos>",
    "<eos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "[gMASK]",
];
/// Bytes of the longest control token that is passed over.
const MARK_BYTES: usize = 40;

/// Refuses a `text` that is not the record's own parts in their order, with nothing but a template's words around them.
pub fn check(fields: &Fields<'_>, messages: &[&ChatMessage]) -> Result<(), Reason> {
    let text = match fields.map().get("text").filter(|text| !is_absent(text)) {
        None => return Ok(()),
        Some(Value::String(text)) => text,
        Some(other) => {
            let kind = kind_of(other);
            return Err(format!("has \"text\" beside its chat that is {kind}; remove it, or make it part of the chat"));
        }
    };
    let pieces = pieces(fields, messages);
    let system = messages.first().filter(|first| first.role == "system").map(|first| first.content.trim());
    let mut rest = match pieces.first() {
        Some(first) if system.is_none() => after_own_system(text, first),
        _ => text.as_str(),
    };
    for piece in pieces {
        match skip_to(rest, Some(piece)) {
            Ok(after) => rest = after,
            // A text need not show the system message.
            Err(_) if system == Some(piece) => {}
            Err(extra) if text.contains(piece) => return Err(more(extra)),
            Err(_) => {
                return Err(
                    "has plain text (\"text\") beside its chat, and the two differ; remove the one that is not meant"
                        .into(),
                );
            }
        }
    }
    skip_to(rest, None).map(drop).map_err(more)
}

fn more(extra: &str) -> Reason {
    format!(
        "has plain text (\"text\") beside its chat that says more than the chat ({}); put that into the chat, or remove \"text\"",
        shown(extra)
    )
}

/// The parts that a rendering shows, in order. A prompt and what follows it are one message of a record, and two parts of Alpaca's text.
fn pieces<'m, 'a: 'm>(fields: &Fields<'a>, messages: &[&'m ChatMessage]) -> Vec<&'m str> {
    let parts = pair::texts(fields);
    let joined = parts.join("\n");
    let mut pieces: Vec<&'m str> = Vec::new();
    for message in messages {
        match message.role == "user" && message.content == joined {
            true => pieces.extend(parts.iter().copied()),
            false => pieces.push(message.content.as_str()),
        }
    }
    pieces.into_iter().map(str::trim).filter(|piece| !piece.is_empty()).collect()
}

/// The text behind the system message that the template itself gives to a chat without one; all of it where there is none.
fn after_own_system<'t>(text: &'t str, first: &str) -> &'t str {
    let mut rest = text.trim_start();
    while !(rest.starts_with("<<SYS>>") || rest.get(..6).is_some_and(|word| word.eq_ignore_ascii_case("system"))) {
        let Some(after) = mark(rest) else { return text };
        rest = after.trim_start();
    }
    text.find(first).map_or(text, |at| &text[at..])
}

/// Passes over a template's words up to a piece, or to the end; gives what follows the piece, or, as an error, what is no template's.
fn skip_to<'t>(mut text: &'t str, piece: Option<&str>) -> Result<&'t str, &'t str> {
    loop {
        if let Some(after) = piece.and_then(|piece| text.strip_prefix(piece).filter(|after| ends_a_word(piece, after)))
        {
            return Ok(after);
        }
        let Some(first) = text.chars().next() else {
            return if piece.is_none() { Ok(text) } else { Err(text) };
        };
        let sentence = SENTENCES.iter().find_map(|sentence| text.strip_prefix(sentence));
        text = match sentence.or_else(|| mark(text)).or_else(|| no_thoughts(text)) {
            Some(after) => after,
            None if first.is_whitespace() => &text[first.len_utf8()..],
            None if first.is_ascii_punctuation() && !matches!(first, '<' | '[') => &text[1..],
            None => word(text).ok_or(text)?,
        };
    }
}

/// Whether a piece is not the beginning of a longer word.
fn ends_a_word(piece: &str, after: &str) -> bool {
    !(piece.ends_with(|c: char| c.is_ascii_alphanumeric()) && after.starts_with(|c: char| c.is_ascii_alphanumeric()))
}

/// What follows a template's mark.
fn mark(text: &str) -> Option<&str> {
    MARKS.iter().find_map(|mark| text.strip_prefix(mark)).or_else(|| control_token(text))
}

/// What follows a token such as `<|im_start|>`, or `<｜User｜>` in DeepSeek's wide bars.
fn control_token(text: &str) -> Option<&str> {
    let (rest, end) = match text.strip_prefix("<|") {
        Some(rest) => (rest, "|>"),
        None => (text.strip_prefix("<｜")?, "｜>"),
    };
    let (name, after) = rest.split_once(end)?;
    (name.len() <= MARK_BYTES && !name.contains(char::is_whitespace)).then_some(after)
}

/// What follows a pair of marks for thoughts with nothing between, as Qwen's template writes it.
fn no_thoughts(text: &str) -> Option<&str> {
    text.strip_prefix("<think>")?.trim_start().strip_prefix("</think>")
}

/// What follows a template's word.
fn word(text: &str) -> Option<&str> {
    let end = text.find(|c: char| !c.is_alphanumeric()).unwrap_or(text.len());
    WORDS.contains(&text[..end].to_ascii_lowercase().as_str()).then(|| &text[end..])
}
