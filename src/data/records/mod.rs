//! The shapes of records: what people's files hold, read into two types. A record is judged by its own fields, so one file may hold
//! several shapes of one kind; the report counts them. [`Shape`] is the closed list.
//!
//! Whatever a record says is honoured, refused by name, or counted as ignored ([`fields`]); nothing is dropped in silence.

mod chat;
mod fields;
mod message;
mod pair;
mod preference;

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

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

/// Names of the two answers of a preference, in each of the ways to write them.
const ANSWER_NAMES: [[&str; 2]; 3] =
    [["chosen", "rejected"], ["chosen_messages", "rejected_messages"], ["preferred_output", "non_preferred_output"]];
/// Names of a chat's list of messages.
const CHAT_NAMES: [&str; 3] = ["messages", "conversations", "conversation"];
const SHAPES: &str = "\"messages\"; \"conversations\"; \"prompt\" and \"completion\"; \"instruction\" (\"input\") and \"output\"; \"prompt\", \"chosen\" and \"rejected\"";

impl Record {
    /// Reads one record.
    ///
    /// # Errors
    /// INVALID_RECORD with the reason.
    pub fn parse(kind: DatasetKind, text: &[u8]) -> Result<Self> {
        let parsed =
            parse(kind, text).map_err(|(_, reason)| Error::invalid_because("INVALID_RECORD", "record", reason))?;
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

/// Reads the text of one value. An error says in which line of the text, from 0, and why.
pub fn parse(kind: DatasetKind, text: &[u8]) -> Result<Parsed, (u64, Reason)> {
    let value = json::parse(text).map_err(|error| (error.line, error.message))?;
    let map = match &value {
        Value::Object(map) => map,
        other => return Err((0, not_an_object(other))),
    };
    read(kind, &Fields::new(map)).map_err(|reason| (0, reason))
}

fn not_an_object(value: &Value) -> Reason {
    match value {
        Value::String(text) if text.trim_start().starts_with('{') => {
            "is a string that holds JSON; unpack it: jq -c 'fromjson' IN > OUT.jsonl".into()
        }
        Value::Array(list) if list.first().is_some_and(Value::is_object) => {
            "is a bare list of messages; name it: jq -c '{messages: .}' IN > OUT.jsonl".into()
        }
        other => format!("must be a JSON object, not {}", fields::kind_of(other)),
    }
}

fn read(kind: DatasetKind, fields: &Fields<'_>) -> Result<Parsed, Reason> {
    fields.refuse_unsupported()?;
    let is_preference = ANSWER_NAMES.iter().flatten().any(|name| fields.has(name));
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
    if CHAT_NAMES.iter().any(|name| fields.has(name)) {
        return chat::read(fields);
    }
    if let Some(read) = pair::read(fields)? {
        return Ok(read);
    }
    Err(unknown_shape(fields))
}

/// Says what a record is that has no known shape.
fn unknown_shape(fields: &Fields<'_>) -> Reason {
    if fields.has("text") && !fields.has("parent_id") && !fields.has("message_id") {
        return "is plain text (\"text\"); training on plain text is not supported, and no prompt can be made of it"
            .into();
    }
    if (fields.has("role") && fields.has("content")) || (fields.has("from") && fields.has("value")) {
        return "is one message, not a record; a record holds the list: jq -c '{messages: .}' IN > OUT.jsonl for lists"
            .into();
    }
    if ["message_id", "parent_id", "role"].iter().all(|name| fields.map().contains_key(*name)) {
        return "is one message of a tree of messages; follow \"parent_id\" and write each path as \"messages\"".into();
    }
    let records = fields.map().values().filter(|value| value.as_object().is_some_and(is_record)).count();
    if records > 1 && records == fields.map().len() {
        return "holds its records as an object's fields; take them out: jq -c '.[]' IN > OUT.jsonl".into();
    }
    let row = |value: &Value| {
        value
            .as_object()
            .is_some_and(|map| is_record(map) || map.get("row").and_then(Value::as_object).is_some_and(is_record))
    };
    let holds = |value: &Value| row(value) || value.as_array().and_then(|list| list.first()).is_some_and(row);
    if let Some((name, value)) = fields.map().iter().find(|(_, value)| holds(value)) {
        let path = serde_json::to_string(name).unwrap_or_default();
        let (each, first) = if value.is_array() { ("[]", &value[0]) } else { ("", value) };
        let row = if first.as_object().is_some_and(is_record) { "" } else { " | .row" };
        return format!(
            "has its records inside of {}; take them out: jq -c '.[{path}]{each}{row}' IN > OUT.jsonl",
            fields::shown(name)
        );
    }
    let names = fields.names();
    match pair::PROMPTS.iter().find(|name| fields.has(name)) {
        Some(prompt) => format!(
            "has {names}: a prompt ({prompt:?}), and no answer by a name that is known (completion, response, output, answer; chosen and \
             rejected)"
        ),
        None => format!("has {names}, which make none of the shapes {SHAPES}"),
    }
}

fn is_record(map: &Map<String, Value>) -> bool {
    let has = |name: &str| map.get(name).is_some_and(|value| !is_absent(value));
    CHAT_NAMES.iter().chain(ANSWER_NAMES.iter().flatten()).any(|name| has(name))
        || (pair::PROMPTS.iter().any(|name| has(name)) && pair::ANSWERS.iter().any(|name| has(name)))
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
    match fields.system_names()[..] {
        [] => Ok(None),
        [name] => fields.take_text(name),
        [first, second, ..] => Err(format!("has both {first:?} and {second:?}; keep the one that is meant")),
    }
}

/// A `text` beside a chat must be the same chat, rendered: then nothing is lost with it.
fn check_rendering(fields: &Fields<'_>, messages: &[&ChatMessage]) -> Result<(), Reason> {
    let text = match fields.map().get("text").filter(|text| !is_absent(text)) {
        None => return Ok(()),
        Some(Value::String(text)) => text,
        Some(other) => {
            let kind = fields::kind_of(other);
            return Err(format!("has \"text\" beside its chat that is {kind}; remove it, or make it part of the chat"));
        }
    };
    let mut rest = text.as_str();
    for message in messages {
        let content = message.content.trim();
        let Some(at) = rest.find(content) else {
            return Err(
                "has plain text (\"text\") beside its chat, and the two differ; remove the one that is not meant"
                    .into(),
            );
        };
        rest = &rest[at + content.len()..];
    }
    Ok(())
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
