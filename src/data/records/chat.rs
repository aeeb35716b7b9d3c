//! Whole chats: OpenAI's and TRL's `messages`, ShareGPT's `conversations`. Every assistant message is learnt unless its weight is 0.

use serde_json::Value;

use super::fields::{Fields, Reason};
use super::message::{self, Weighted};
use super::{CHAT_NAMES, Chat, Shape, add_system, check_beginning, check_rendering, pair, system_of};
use crate::request::ChatMessage;

pub fn read(fields: &Fields<'_>) -> Result<(Chat, Shape), Reason> {
    let name = fields.one_of(&CHAT_NAMES)?.unwrap_or(CHAT_NAMES[0]);
    let value = fields.take(name).unwrap_or(&Value::Null);
    if let Some(answer) = pair::ANSWERS.iter().find(|answer| fields.has(answer)) {
        return Err(format!("has both {name:?} and {answer:?}; keep the one that is to be learnt"));
    }
    let list = message::list(name, value)?;
    let learn: Vec<bool> = list.iter().map(learnt).collect();
    let messages: Vec<ChatMessage> = list.into_iter().map(|weighted| weighted.message).collect();
    if messages.last().is_none_or(|last| last.role != "assistant") {
        return Err("the last message must be the assistant's".into());
    }
    for name in fields.present(&["prompt", "question", "instruction", "query"]) {
        let agrees = fields.take(name).is_some_and(|prompt| is_beginning(prompt, &messages));
        if !agrees {
            return Err(format!(
                "has a {name:?} that is not the beginning of its chat; remove the one that is not meant"
            ));
        }
    }
    check_nothing_beside(fields, &["input", "history", "context"])?;
    Ok((whole(fields, messages, learn)?, shape(value)))
}

/// Makes the record of its messages and which of them are learnt: puts the record's system message first, and refuses what is rendered
/// already, begins with the assistant, or teaches nothing.
pub fn whole(fields: &Fields<'_>, mut messages: Vec<ChatMessage>, mut learn: Vec<bool>) -> Result<Chat, Reason> {
    if add_system(system_of(fields)?, &mut messages)? {
        learn.insert(0, false);
    }
    check_rendering(fields, &messages.iter().filter(|message| message.role != "system").collect::<Vec<_>>())?;
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

/// Refuses fields that say something of the prompt where a chat has all of it.
pub fn check_nothing_beside(fields: &Fields<'_>, names: &[&str]) -> Result<(), Reason> {
    match fields.present(names).first() {
        None => Ok(()),
        Some(name) => {
            Err(format!("has {name:?} beside its chat, where it would be lost; put it into the chat, or remove it"))
        }
    }
}
