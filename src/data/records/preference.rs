//! A prompt with a chosen and a rejected answer. The answers may be whole chats: then they begin with the prompt, which is trained once,
//! that is, not at all: only what comes after it is compared.

use serde_json::Value;

use super::fields::{Fields, Reason};
use super::message::Weighted;
use super::names::{CHATS, OPENAI_PAIR, PAIRS};
use super::{Preference, Shape, add_system, chat, check_beginning, names, pair, rendering, system_of, unsupported};
use crate::request::ChatMessage;

/// Where the prompt is said.
enum Prompt {
    /// Nowhere: it is what both chats begin with.
    Common,
    Text(String),
    Messages(Vec<ChatMessage>),
}

pub fn read(fields: &Fields<'_>) -> Result<(Preference, Shape), Reason> {
    let [chosen_name, rejected_name] = names(fields)?;
    let chosen = answer(fields, chosen_name)?;
    let rejected = answer(fields, rejected_name)?;
    let (prompt, shape) = prompt(fields, chosen_name, &chosen)?;
    let mut pair = assemble(prompt, chosen, rejected)?;
    add_system(system_of(fields)?, &mut pair.prompt)?;
    check_beginning(&pair.prompt)?;
    for (name, answer) in [(chosen_name, &pair.chosen), (rejected_name, &pair.rejected)] {
        if answer.first().is_some_and(|first| first.role != "assistant") {
            return Err(
                "has chosen and rejected chats that part before an answer; both must answer the same prompt".into()
            );
        }
        if answer.last().is_none_or(|last| last.role != "assistant") {
            return Err(match answer.is_empty() {
                true => "has a chat that is the beginning of the other one; both must answer the same prompt".into(),
                false => format!("the {name} answer must end with the assistant's message"),
            });
        }
    }
    if pair.chosen == pair.rejected {
        return Err("the chosen and the rejected answer are the same".into());
    }
    chat::check_context(fields, &pair.prompt, "prompt")?;
    rendering::check(fields, &pair.prompt.iter().chain(&pair.chosen).collect::<Vec<_>>())?;
    Ok((pair, shape))
}

/// What the two answers are called.
fn names(fields: &Fields<'_>) -> Result<[&'static str; 2], Reason> {
    let present: Vec<_> = PAIRS.iter().filter(|names| names.iter().any(|name| fields.has(name))).collect();
    match present[..] {
        [names] => Ok(*names),
        [[first, _], [second, _], ..] => Err(format!("has both {first:?} and {second:?}; keep the one that is meant")),
        [] => Ok(PAIRS[0]),
    }
}

/// One of the two answers; all of its assistant's turns are learnt.
fn answer(fields: &Fields<'_>, name: &str) -> Result<Vec<Weighted>, Reason> {
    let value = fields
        .take_required(name)
        .ok_or_else(|| format!("{name:?} is missing or empty: a preference needs both answers"))?;
    let list = pair::answer_list(name, value)?;
    match list.iter().position(|weighted| weighted.message.role == "assistant" && weighted.weight == Some(false)) {
        Some(i) => Err(format!("{name}[{i}].weight is not supported in a preference")),
        None => Ok(list),
    }
}

/// A whole chat begins with what is asked.
fn is_whole(answer: &[Weighted]) -> bool {
    answer.first().is_some_and(|first| first.message.role != "assistant")
}

fn prompt(fields: &Fields<'_>, chosen_name: &str, chosen: &[Weighted]) -> Result<(Prompt, Shape), Reason> {
    if chosen_name == OPENAI_PAIR[0] {
        return openai_prompt(fields);
    }
    if fields.has("input") && !fields.has("instruction") && fields.map()["input"].is_object() {
        return Err("has OpenAI's \"input\" with answers that are not OpenAI's; call them preferred_output and non_preferred_output".into());
    }
    let chat = match fields.one_of(CHATS)? {
        None => None,
        Some(name) => Some(pair::prompt_list(name, fields.take(name).unwrap_or(&Value::Null))?),
    };
    let given = pair::prompt(fields)?;
    if given.is_none() || chat.is_some() {
        chat::check_no_history(fields)?;
    }
    match (given, chat) {
        (None, None) => Ok((Prompt::Common, Shape::PreferenceChats)),
        // The chat is the prompt, or the prompt and the chosen answer once more.
        (None, Some(chat)) if is_whole(chosen) && same(chosen, &chat) => Ok((Prompt::Common, Shape::PreferenceChats)),
        (None, Some(mut chat)) if !is_whole(chosen) && ends_with(&chat, chosen) => {
            chat.truncate(chat.len() - chosen.len());
            Ok((Prompt::Messages(chat), Shape::PreferenceConversations))
        }
        (None, Some(chat)) => Ok((Prompt::Messages(chat), Shape::PreferenceConversations)),
        (Some(given), chat) => {
            let given_shape =
                if given.shape == Shape::Instruction { Shape::PreferenceInstruction } else { Shape::Preference };
            if let Some(chat) = chat {
                check_chat(&chat, &given, chosen)?;
            }
            Ok(match <[ChatMessage; 1]>::try_from(given.messages) {
                Ok([user]) if given.is_text => (Prompt::Text(user.content), given_shape),
                Ok(one) => (Prompt::Messages(one.into()), given_shape),
                Err(messages) => (Prompt::Messages(messages), given_shape),
            })
        }
    }
}

fn openai_prompt(fields: &Fields<'_>) -> Result<(Prompt, Shape), Reason> {
    let others = names::asked().filter(|name| *name != "input").chain(CHATS).chain([names::HISTORY]);
    if let Some(name) = fields.present(others).first() {
        return Err(format!("must have either \"input\" or {name:?}, not both"));
    }
    let form = || "\"input\" must be an object with \"messages\"".to_owned();
    let input = Fields::new(fields.take("input").and_then(Value::as_object).ok_or_else(form)?);
    unsupported::refuse(&input)?;
    let mut messages = pair::prompt_list("input.messages", input.take("messages").ok_or_else(form)?)?;
    add_system(system_of(&input)?, &mut messages)?;
    fields.ignore_rest_of("input", &input);
    Ok((Prompt::Messages(messages), Shape::PreferenceOpenAi))
}

/// A chat beside a prompt must be the prompt, or the prompt with the chosen answer.
fn check_chat(chat: &[ChatMessage], given: &pair::Prompt, chosen: &[Weighted]) -> Result<(), Reason> {
    let is_prompt = chat == given.messages;
    let answered = [given.messages.clone(), chosen.iter().map(|weighted| weighted.message.clone()).collect()].concat();
    if is_prompt || same(chosen, chat) || chat == answered {
        return Ok(());
    }
    Err("has a chat beside its prompt that is neither the prompt nor the chosen answer to it; remove the one that is not meant".into())
}

fn ends_with(chat: &[ChatMessage], answer: &[Weighted]) -> bool {
    chat.len() > answer.len()
        && chat[chat.len() - answer.len()..].iter().zip(answer).all(|(message, weighted)| weighted.message == *message)
}

fn same(answer: &[Weighted], chat: &[ChatMessage]) -> bool {
    answer.len() == chat.len() && pair::repeats(answer, chat)
}

fn assemble(prompt: Prompt, chosen: Vec<Weighted>, rejected: Vec<Weighted>) -> Result<Preference, Reason> {
    let wholes = is_whole(&chosen) && is_whole(&rejected);
    let prompt = match prompt {
        Prompt::Common if !wholes => {
            return Err("has answers without a prompt; give \"prompt\", or both answers as whole chats".into());
        }
        Prompt::Text(text) if wholes => {
            let pair = split_common(messages_of(chosen), messages_of(rejected));
            return match is_prompt_of(&text, &pair.prompt) {
                true => Ok(pair),
                false => Err(
                    "has a \"prompt\" that is not what its chosen and rejected chats begin with; the two must agree"
                        .into(),
                ),
            };
        }
        Prompt::Common => return Ok(split_common(messages_of(chosen), messages_of(rejected))),
        Prompt::Text(text) => {
            if pair::begins_with(&text, &chosen) && pair::begins_with(&text, &rejected) {
                return Err("has answers that begin with its prompt; give what comes after it".into());
            }
            vec![ChatMessage::new("user", &text)]
        }
        Prompt::Messages(messages) => messages,
    };
    let rest = |mut answer: Vec<Weighted>| match is_whole(&answer) {
        false => pair::check_open(&prompt).map(|()| messages_of(answer)),
        true if pair::repeats(&answer, &prompt) => Ok(messages_of(answer.split_off(prompt.len()))),
        true => Err("has an answer that begins with another prompt than its own; the two must agree".to_owned()),
    };
    Ok(Preference { chosen: rest(chosen)?, rejected: rest(rejected)?, prompt })
}

fn messages_of(list: Vec<Weighted>) -> Vec<ChatMessage> {
    list.into_iter().map(|weighted| weighted.message).collect()
}

fn split_common(mut chosen: Vec<ChatMessage>, mut rejected: Vec<ChatMessage>) -> Preference {
    let common = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
    rejected.drain(..common);
    Preference { prompt: chosen.drain(..common).collect(), chosen, rejected }
}

/// Whether a text is the first or the last thing that a chat's user says.
pub fn is_prompt_of(text: &str, messages: &[ChatMessage]) -> bool {
    let mut users = messages.iter().filter(|message| message.role == "user");
    let (first, last) = (users.next(), users.next_back());
    first.into_iter().chain(last).any(|user| user.content == text)
}
