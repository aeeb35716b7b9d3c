//! The shapes of records: what people's files hold, read into two types. A record is judged by its own fields, so one file may hold
//! several shapes of one kind; the report counts them. [`Shape`] is the closed list.
//!
//! Whatever a record says is honoured, refused by name ([`unsupported`]), or counted as ignored ([`fields`]); nothing is dropped in silence.

mod advice;
mod chat;
mod fields;
mod message;
mod names;
mod pair;
mod preference;
mod rendering;
mod unknown;
mod unsupported;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

pub use advice::fit;

use super::container::Format;
use super::json;
use crate::error::{Error, Result};
use crate::ids::Digest;
use crate::request::ChatMessage;
use crate::store::DatasetKind;
use crate::text::{Conversation, Text};
use fields::{Fields, Reason, is_absent};

/// A record of a dataset.
///
/// ```
/// use tenora::data::Record;
/// use tenora::store::DatasetKind;
///
/// let line = br#"{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}"#;
/// let record = Record::parse(DatasetKind::Sft, line)?;
/// assert_eq!(record.messages(), 2);
///
/// let line = br#"{"messages": [{"role": "user", "content": "no answer"}]}"#;
/// assert!(Record::parse(DatasetKind::Sft, line).is_err(), "there is nothing to learn in it");
/// # Ok::<(), tenora::error::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// A conversation to learn from (SFT).
    Chat(Chat),
    /// Two answers, one of them better (DPO).
    Preference(Preference),
}

/// A conversation that ends with an assistant's turn; `learn[i]` says whether message i is in the loss.
#[derive(Debug, Clone, PartialEq)]
pub struct Chat {
    /// In their order, the system message first where there is one.
    pub messages: Vec<ChatMessage>,
    /// One for each message.
    pub learn: Vec<bool>,
}

/// A prompt and two answers to it, each of which ends with an assistant's turn.
#[derive(Debug, Clone, PartialEq)]
pub struct Preference {
    /// What both answers begin with; learnt by neither.
    pub prompt: Vec<ChatMessage>,
    /// The better answer, without the prompt.
    pub chosen: Vec<ChatMessage>,
    /// The worse answer, without the prompt.
    pub rejected: Vec<ChatMessage>,
}

/// A preference as ids; the loss covers the assistant's turns of the answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// The prompt with the better answer.
    pub chosen: Conversation,
    /// The prompt with the worse answer.
    pub rejected: Conversation,
}

/// How a record is written. Closed: a record that has none of these is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Shape {
    /// `messages` with `role` and `content`: OpenAI, TRL.
    Messages,
    /// `conversations` with `from` and `value`: ShareGPT.
    ShareGpt,
    /// `prompt` and `completion`, or other names of the two.
    PromptCompletion,
    /// `instruction`, `input` and `output`: Alpaca.
    Instruction,
    /// `prompt`, `chosen` and `rejected`: TRL.
    Preference,
    /// `chosen` and `rejected` as whole chats, whose common beginning is the prompt.
    PreferenceChats,
    /// `conversations` or `messages` as the prompt of `chosen` and `rejected`: LLaMA-Factory.
    PreferenceConversations,
    /// `instruction` and `input` as the prompt of `chosen` and `rejected`: LLaMA-Factory.
    PreferenceInstruction,
    /// `input`, `preferred_output` and `non_preferred_output`: OpenAI.
    PreferenceOpenAi,
}

impl Shape {
    /// For people and clients.
    pub fn name(self) -> &'static str {
        match self {
            Self::Messages => "messages",
            Self::ShareGpt => "ShareGPT conversations",
            Self::PromptCompletion => "prompt with completion",
            Self::Instruction => "Alpaca instruction",
            Self::Preference => "prompt with chosen and rejected",
            Self::PreferenceChats => "chosen and rejected chats",
            Self::PreferenceConversations => "conversations with chosen and rejected",
            Self::PreferenceInstruction => "instruction with chosen and rejected",
            Self::PreferenceOpenAi => "OpenAI preferred_output",
        }
    }
}

/// What one value of a file is.
#[derive(Debug, Clone, PartialEq)]
pub struct Parsed {
    pub record: Record,
    pub shape: Shape,
    /// Fields that said something and were not used.
    pub ignored: Vec<String>,
}

impl Record {
    /// Reads one record.
    ///
    /// # Errors
    /// INVALID_RECORD with the reason.
    pub fn parse(kind: DatasetKind, text: &[u8]) -> Result<Self> {
        let parsed = parse(kind, text).map_err(|(_, reason)| {
            Error::invalid_because("INVALID_RECORD", "record", advice::fit(&reason, Format::default()))
        })?;
        Ok(parsed.record)
    }

    /// Messages of the longest chat in it.
    pub fn messages(&self) -> usize {
        match self {
            Self::Chat(chat) => chat.messages.len(),
            Self::Preference(Preference { prompt, chosen, rejected }) => {
                prompt.len() + chosen.len().max(rejected.len())
            }
        }
    }

    /// Returns the digest over all that it says.
    pub fn digest(&self) -> Digest {
        let mut hash = Sha256::new();
        // Lengths and counts go first, so that no two records are the same bytes.
        let text = |hash: &mut Sha256, text: &str| {
            hash.update(text.len().to_le_bytes());
            hash.update(text);
        };
        let list = |hash: &mut Sha256, messages: &[ChatMessage]| {
            hash.update(messages.len().to_le_bytes());
            for message in messages {
                text(hash, &message.role);
                text(hash, &message.content);
                hash.update([u8::from(message.name.is_some())]);
                text(hash, message.name.as_deref().unwrap_or_default());
            }
        };
        match self {
            Self::Chat(chat) => {
                list(&mut hash, &chat.messages);
                chat.learn.iter().for_each(|learn| hash.update([u8::from(*learn)]));
            }
            Self::Preference(Preference { prompt, chosen, rejected }) => {
                [prompt, chosen, rejected].into_iter().for_each(|messages| list(&mut hash, messages));
            }
        }
        hash.into()
    }

    /// The line that [`Record::parse`] reads back as this record.
    pub fn to_line(&self) -> String {
        match self {
            Self::Chat(chat) => {
                let weighted = chat.messages.iter().zip(&chat.learn).map(|(message, learn)| {
                    let mut value = json!(message);
                    if message.role == "assistant" {
                        value["weight"] = u8::from(*learn).into();
                    }
                    value
                });
                json!({"messages": weighted.collect::<Vec<_>>()})
            }
            Self::Preference(Preference { prompt, chosen, rejected }) => {
                json!({"prompt": prompt, "chosen": chosen, "rejected": rejected})
            }
        }
        .to_string()
    }
}

/// Reads the text of one value. An error says in which line of the text, from 0, and why, to be made to [`fit`] the file.
pub fn parse(kind: DatasetKind, text: &[u8]) -> Result<Parsed, (u64, Reason)> {
    let value = json::parse(text).map_err(|error| (error.line, error.message))?;
    let map = match &value {
        Value::Object(map) => map,
        other => return Err((0, unknown::not_an_object(other))),
    };
    read(kind, &Fields::new(map)).map_err(|reason| (0, reason))
}

fn read(kind: DatasetKind, fields: &Fields<'_>) -> Result<Parsed, Reason> {
    unsupported::refuse(fields)?;
    // A flag or a figure by the name of an answer is none.
    let is_answer = |name| {
        fields.map().get(name).is_some_and(|value| !is_absent(value) && !value.is_boolean() && !value.is_number())
    };
    let is_preference = unsupported::is_pair(fields) || names::pair_answers().any(is_answer);
    let (record, shape) = match (kind, is_preference) {
        (DatasetKind::Preferences, true) => {
            let (preference, shape) = preference::read(fields)?;
            (Record::Preference(preference), shape)
        }
        (DatasetKind::Sft, true) => {
            return Err(
                "is a preference pair (chosen and rejected); train it with DPO: upload it as preferences".into()
            );
        }
        (DatasetKind::Sft, false) => {
            let (chat, shape) = conversation(fields)?;
            (Record::Chat(chat), shape)
        }
        (DatasetKind::Preferences, false) => {
            conversation(fields)?;
            return Err("has one answer, not a chosen and a rejected one; upload it for SFT".into());
        }
    };
    Ok(Parsed { record, shape, ignored: fields.ignored() })
}

/// A record with one answer.
fn conversation(fields: &Fields<'_>) -> Result<(Chat, Shape), Reason> {
    if names::CHATS.iter().any(|name| fields.has(name)) {
        return chat::read(fields);
    }
    if let Some(read) = pair::read(fields)? {
        return Ok(read);
    }
    Err(unknown::unknown_shape(fields))
}

/// No template can ask for an answer to nothing.
fn check_beginning(messages: &[ChatMessage]) -> Result<(), Reason> {
    match messages.first() {
        Some(first) if first.role == "assistant" => Err("the first message must not be the assistant's".into()),
        Some(_) => Ok(()),
        None => Err("the prompt must have at least one message".into()),
    }
}

/// Puts the `system` column's text before the other messages. `true` where a message was added.
fn add_system(system: Option<&str>, messages: &mut Vec<ChatMessage>) -> Result<bool, Reason> {
    let Some(system) = system else { return Ok(false) };
    match messages.first() {
        Some(first) if first.role == "system" && first.content == system => Ok(false),
        Some(first) if first.role == "system" => {
            Err("has a system message in its chat and another one beside it; keep the one that is meant".into())
        }
        _ => {
            messages.insert(0, ChatMessage::new("system", system));
            Ok(true)
        }
    }
}

/// The text of the `system` column, by any of its names.
fn system_of<'a>(fields: &Fields<'a>) -> Result<Option<&'a str>, Reason> {
    let systems = fields.said().map(|(name, _)| name).filter(|name| names::is_system(name));
    match fields.one_of(systems)? {
        Some(name) => fields.take_text(name),
        None => Ok(None),
    }
}

impl Chat {
    /// As ids, with the loss on every assistant turn that is to be learnt.
    pub fn encode(&self, text: &Text) -> Result<Conversation> {
        text.encode_conversation(&self.messages, &|i| self.learn.get(i).copied().unwrap_or(false))
    }
}

impl Preference {
    /// As ids, with the loss on the assistant turns after the prompt.
    pub fn encode(&self, text: &Text) -> Result<Pair> {
        let encode = |answer: &[ChatMessage]| {
            let messages = [&self.prompt, answer].concat();
            text.encode_conversation(&messages, &|i| i >= self.prompt.len())
        };
        Ok(Pair { chosen: encode(&self.chosen)?, rejected: encode(&self.rejected)? })
    }
}

impl Pair {
    /// Ids of both sequences.
    pub fn tokens(&self) -> usize {
        self.chosen.ids.len() + self.rejected.ids.len()
    }
}
