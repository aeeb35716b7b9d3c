//! Whole chats: OpenAI's and TRL's `messages`, ShareGPT's `conversations`. Every assistant message is learnt unless its weight is 0.

use serde_json::Value;

use super::fields::{Fields, Reason};
use super::message::{self, Weighted};
use super::{Chat, Shape, add_system, check_beginning, names, rendering, system_of};
use crate::request::ChatMessage;

pub fn read(fields: &Fields<'_>) -> Result<(Chat, Shape), Reason> {
    let name = fields.one_of(names::CHATS)?.unwrap_or(names::CHATS[0]);
    let value = fields.take(name).unwrap_or(&Value::Null);
    if let Some(answer) = names::ANSWERS.iter().find(|answer| fields.has(answer)) {
        return Err(format!("has both {name:?} and {answer:?}; keep the one that is to be learnt"));
    }
    let list = message::list(name, value)?;
    let of_assistant = || list.iter().filter(|weighted| weighted.message.role == "assistant");
    if of_assistant().any(|one| one.flagged) && !of_assistant().all(|one| one.weight.is_some()) {
        return Err("has assistant messages with a flag that they are learnt and others without; give each one a \"weight\" of 0 or 1".into());
    }
    let learn: Vec<bool> = list.iter().map(learnt).collect();
    let messages: Vec<ChatMessage> = list.into_iter().map(|weighted| weighted.message).collect();
    for name in fields.present(names::asked()) {
        let agrees = fields.take(name).is_some_and(|prompt| is_beginning(prompt, &messages));
        if !agrees {
            return Err(format!(
                "has a {name:?} that is not the beginning of its chat; remove the one that is not meant"
            ));
        }
    }
    check_no_history(fields)?;
    let chat = whole(fields, messages, learn)?;
    check_context(fields, &chat.messages, "chat")?;
    Ok((chat, shape(value)))
}

/// Makes the record of its messages and which of them are learnt: puts the record's system message first, and refuses what is rendered
/// already, begins with the assistant or does not end with it, or teaches nothing.
pub fn whole(fields: &Fields<'_>, mut messages: Vec<ChatMessage>, mut learn: Vec<bool>) -> Result<Chat, Reason> {
    if add_system(system_of(fields)?, &mut messages)? {
        learn.insert(0, false);
    }
    if messages.last().is_none_or(|last| last.role != "assistant") {
        return Err("the last message must be the assistant's".into());
    }
    rendering::check(fields, &messages.iter().collect::<Vec<_>>())?;
    check_beginning(&messages)?;
    if !learn.contains(&true) {
        return Err("no assistant message has a weight of 1, so there is nothing to learn".into());
    }
    Ok(Chat { messages, learn })
}

/// Whether a message is in the loss.
pub fn learnt(weighted: &Weighted) -> bool {
    weighted.message.role == "assistant" && weighted.weight.unwrap_or(true)
}

fn shape(value: &Value) -> Shape {
    match value.get(0).and_then(|first| first.get("from")) {
        Some(_) => Shape::ShareGpt,
        None => Shape::Messages,
    }
}

/// Whether a prompt beside the whole chat is its beginning.
fn is_beginning(prompt: &Value, messages: &[ChatMessage]) -> bool {
    match prompt {
        Value::String(text) => super::preference::is_prompt_of(text, messages),
        list => message::list("prompt", list).is_ok_and(|list| {
            list.len() < messages.len()
                && list.iter().zip(messages).all(|(weighted, message)| weighted.message == *message)
        }),
    }
}

/// Refuses Alpaca's earlier rounds where a chat has them all.
pub fn check_no_history(fields: &Fields<'_>) -> Result<(), Reason> {
    let name = names::HISTORY;
    match fields.has(name) {
        true => {
            Err(format!("has {name:?} beside its chat, where it would be lost; put it into the chat, or remove it"))
        }
        false => Ok(()),
    }
}

/// Refuses what the question is about where the messages before the answer do not have it: the answer would be learnt without. A single word (but
/// by the name of context), a number or a setting is no such thing, and is counted as other fields are. `beside`: what a person would put it into.
pub fn check_context(fields: &Fields<'_>, messages: &[ChatMessage], beside: &str) -> Result<(), Reason> {
    let holds = |text: &str| {
        messages.iter().any(|message| message.role != "assistant" && message.content.contains(text.trim()))
    };
    let is_lost = |name: &str, value: &Value| match value {
        Value::String(text) => (name == "context" || text.trim().contains(char::is_whitespace)) && !holds(text),
        Value::Array(_) | Value::Object(_) => !texts_within(value).into_iter().all(holds),
        _ => false,
    };
    let Some((name, value)) = fields.said().find(|(name, value)| names::is_context(name) && is_lost(name, value))
    else {
        return Ok(());
    };
    let input = match value.is_string() && beside == "prompt" {
        true => "call it \"input\" if it follows the prompt in the user's message, ",
        false => "",
    };
    Err(format!(
        "has {name:?} beside its {beside}, where it would be lost; {input}put it into the {beside} where that lacks it, or remove it"
    ))
}

/// All texts in a list or an object.
fn texts_within(value: &Value) -> Vec<&str> {
    match value {
        Value::String(text) => vec![text],
        Value::Array(list) => list.iter().flat_map(texts_within).collect(),
        Value::Object(map) => map.values().flat_map(texts_within).collect(),
        _ => Vec::new(),
    }
}
