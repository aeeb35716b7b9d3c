//! A prompt and its answer: TRL's `prompt` and `completion`, Alpaca's `instruction`, `input` and `output`, and other names of the same.
//! The answer is learnt, the prompt is not; of Alpaca's `history` the answers are learnt too, as its own trainers do.

use serde_json::Value;

use super::fields::{Fields, Reason, kind_of};
use super::message::{self, Weighted};
use super::names::{ANSWERS, EXTRAS, HISTORY, PROMPTS};
use super::{Chat, Shape, chat};
use crate::request::ChatMessage;

/// `None` where the record has no answer of this kind.
pub fn read(fields: &Fields<'_>) -> Result<Option<(Chat, Shape)>, Reason> {
    let has_answer = |name: &&&str| fields.map().get(**name).is_some_and(|value| !value.is_null());
    let answer = match fields.one_of(ANSWERS)? {
        Some(name) => name,
        // An answer that is an empty string is one, if it is the only one.
        None => match ANSWERS.iter().find(has_answer) {
            Some(name) => name,
            None => return Ok(None),
        },
    };
    let Some(prompt) = prompt(fields)? else { return Ok(None) };
    let answer_value = fields.take_required(answer).ok_or_else(|| format!("{answer:?} is empty"))?;
    let answer = answer_list(answer, answer_value)?;
    let shape = prompt.shape;
    let (mut messages, mut learn) = (prompt.messages, prompt.learn);
    let rest = after_prompt(&mut messages, &mut learn, prompt.is_text, answer)?;
    learn.extend(rest.iter().map(chat::learnt));
    messages.extend(rest.into_iter().map(|weighted| weighted.message));
    let chat = chat::whole(fields, messages, learn)?;
    chat::check_context(fields, &chat.messages, "prompt")?;
    Ok(Some((chat, shape)))
}

/// What comes before the answer.
#[derive(Debug)]
pub struct Prompt {
    pub messages: Vec<ChatMessage>,
    /// Of the history's answers.
    pub learn: Vec<bool>,
    /// One user message of text, not a list.
    pub is_text: bool,
    pub shape: Shape,
}

/// The name of the prompt, and those of what follows it in the user's message.
fn asked(fields: &Fields<'_>) -> Result<Option<(&'static str, Vec<&'static str>)>, Reason> {
    match fields.one_of(PROMPTS)? {
        Some(main) => Ok(Some((main, fields.present(EXTRAS)))),
        None => Ok(fields.one_of(EXTRAS)?.map(|main| (main, Vec::new()))),
    }
}

/// The texts of the user's message in their order, as they stand in the record; none where they are no texts.
pub fn texts<'a>(fields: &Fields<'a>) -> Vec<&'a str> {
    let Ok(Some((main, extras))) = asked(fields) else { return Vec::new() };
    [main].into_iter().chain(extras).filter_map(|name| fields.map()[name].as_str()).collect()
}

/// The prompt under any of its names; `None` where there is none.
pub fn prompt(fields: &Fields<'_>) -> Result<Option<Prompt>, Reason> {
    let Some((main, extras)) = asked(fields)? else { return Ok(None) };
    let shape = if main == "instruction" { Shape::Instruction } else { Shape::PromptCompletion };
    match fields.take(main) {
        Some(Value::String(text)) => {
            message::check_text(main, text)?;
            let mut user = text.clone();
            for extra in extras {
                let more = fields.take_text(extra)?.unwrap_or_default();
                user = format!("{user}\n{more}");
            }
            let (mut messages, mut learn) = history(fields)?;
            messages.push(ChatMessage::new("user", &user));
            learn.push(false);
            let is_text = messages.len() == 1;
            Ok(Some(Prompt { messages, learn, is_text, shape }))
        }
        Some(list) => {
            let messages = prompt_list(main, list)?;
            if let Some(other) = extras.first().copied().or_else(|| fields.has(HISTORY).then_some(HISTORY)) {
                return Err(format!(
                    "has {other:?} beside a {main:?} that is a list of messages; put it into the list"
                ));
            }
            let learn = vec![false; messages.len()];
            Ok(Some(Prompt { messages, learn, is_text: false, shape }))
        }
        None => Ok(None),
    }
}

/// A prompt given as messages; none of it is learnt, so none may ask to be.
pub fn prompt_list(name: &str, value: &Value) -> Result<Vec<ChatMessage>, Reason> {
    let list = message::list(name, value)?;
    match list.iter().position(|weighted| weighted.weight == Some(true)) {
        Some(i) => Err(format!(
            "{name}[{i}] says that it is learnt, but a prompt is not learnt; give the whole chat as \"messages\""
        )),
        None => Ok(list.into_iter().map(|weighted| weighted.message).collect()),
    }
}

/// Alpaca's earlier rounds: pairs of a prompt and an answer.
fn history(fields: &Fields<'_>) -> Result<(Vec<ChatMessage>, Vec<bool>), Reason> {
    let Some(value) = fields.take(HISTORY) else { return Ok((Vec::new(), Vec::new())) };
    let form = || "\"history\" must be a list of pairs [prompt, answer] of strings".to_owned();
    let (mut messages, mut learn) = (Vec::new(), Vec::new());
    for round in value.as_array().ok_or_else(form)? {
        let Some([Value::String(prompt), Value::String(answer)]) = round.as_array().map(Vec::as_slice) else {
            return Err(form());
        };
        messages.extend([ChatMessage::new("user", prompt), ChatMessage::new("assistant", answer)]);
        learn.extend([false, true]);
    }
    Ok((messages, learn))
}

/// An answer: a string is the assistant's message.
pub fn answer_list(name: &str, value: &Value) -> Result<Vec<Weighted>, Reason> {
    match value {
        Value::String(text) => {
            message::check_text(name, text)?;
            Ok(vec![Weighted { message: ChatMessage::new("assistant", text), weight: None, flagged: false }])
        }
        Value::Array(_) | Value::Object(_) => message::list(name, value),
        other => Err(format!("{name:?} must be a string or a list of messages, not {}", kind_of(other))),
    }
}

/// What of a completion comes after the prompt, where it may repeat it. A prompt that is text may come with a system message there, which
/// then belongs to it.
fn after_prompt(
    prompt: &mut Vec<ChatMessage>,
    learn: &mut Vec<bool>,
    is_text: bool,
    mut answer: Vec<Weighted>,
) -> Result<Vec<Weighted>, Reason> {
    if answer.first().is_none_or(|first| first.message.role == "assistant") {
        check_open(prompt)?;
        return Ok(answer);
    }
    if repeats(&answer, prompt) {
        let rest = answer.split_off(prompt.len());
        check_unweighted(&answer)?;
        return Ok(rest);
    }
    let user = answer.iter().position(|weighted| weighted.message.role == "user");
    match user.filter(|at| is_text && prompt.first().is_some_and(|text| text.content == answer[*at].message.content)) {
        Some(at) => {
            let rest = answer.split_off(at + 1);
            check_unweighted(&answer)?;
            *prompt = answer.into_iter().map(|weighted| weighted.message).collect();
            *learn = vec![false; prompt.len()];
            Ok(rest)
        }
        None => Err("has a completion that begins with another prompt than its own; the two must agree".into()),
    }
}

/// Whether an answer's text is the prompt's and more in one: the prompt would be learnt. Two short words may begin alike.
pub fn begins_with(prompt: &str, answer: &[Weighted]) -> bool {
    const SHORTEST: usize = 16;
    let is_begun = |first: &Weighted| first.message.role == "assistant" && first.message.content.starts_with(prompt);
    prompt.trim().len() >= SHORTEST && answer.first().is_some_and(is_begun)
}

/// Whether a list begins with the prompt's own messages.
pub fn repeats(answer: &[Weighted], prompt: &[ChatMessage]) -> bool {
    answer.len() >= prompt.len() && prompt.iter().zip(answer).all(|(message, weighted)| weighted.message == *message)
}

/// A prompt that has its answer already would be answered twice.
pub fn check_open(prompt: &[ChatMessage]) -> Result<(), Reason> {
    match prompt.last() {
        Some(last) if last.role == "assistant" => Err(
            "has a prompt that ends with the assistant's message, which is answered already; end it with the user's"
                .into(),
        ),
        _ => Ok(()),
    }
}

/// The turns of the prompt that an answer repeats are not learnt, so none may ask to be.
fn check_unweighted(repeated: &[Weighted]) -> Result<(), Reason> {
    match repeated.iter().any(|weighted| weighted.weight == Some(true)) {
        true => Err("has a weight of 1 in a turn of its prompt, but a prompt is not learnt; give the whole chat as \"messages\"".into()),
        false => Ok(()),
    }
}
