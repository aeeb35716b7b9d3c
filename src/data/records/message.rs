//! One message, in OpenAI's words (`role`, `content`) or ShareGPT's (`from`, `value`). Its fields are an allow-list: what is not in it and
//! says something is refused by name, for a template could show it or a trainer weigh it.

use serde_json::{Map, Value};

use super::advice;
use super::fields::{Reason, is_absent, kind_of, shown};
use super::names::{self, Role};
use super::unsupported::{self, Loss};
use crate::request::ChatMessage;

/// A message and its weight, where it has one.
#[derive(Debug, Clone, PartialEq)]
pub struct Weighted {
    pub message: ChatMessage,
    /// OpenAI's: whether an assistant's message is learnt.
    pub weight: Option<bool>,
    /// Whether a flag of another name says so.
    pub flagged: bool,
}

/// Fields that identify a message and mean nothing.
const IDENTITY: [&str; 5] = ["id", "message_id", "uuid", "timestamp", "created_at"];

/// A list of messages, or a single one.
pub fn list(path: &str, value: &Value) -> Result<Vec<Weighted>, Reason> {
    match value {
        Value::Array(list) if list.iter().all(Value::is_string) => Err(strings(path, list.len())),
        Value::Array(list) => list.iter().enumerate().map(|(i, value)| one(&format!("{path}[{i}]"), value)).collect(),
        Value::Object(map) if is_columns(map) => Err(format!("{path:?} is an object of {COLUMNS}")),
        Value::Object(_) => Ok(vec![one(path, value)?]),
        Value::String(text) => Err(match Notation::of(text) {
            Some(notation) => {
                format!("has its messages {} ({path:?}); unpack it: {}", notation.within(), notation.command(path))
            }
            None if text.trim_start().starts_with('[') => {
                format!(
                    "has its messages {} ({path:?}); unpack it: {}",
                    Notation::Json.within(),
                    Notation::Json.command(path)
                )
            }
            None => format!("{path:?} must be a list of messages, not a string"),
        }),
        other => Err(format!("{path:?} must be a list of messages, not {}", kind_of(other))),
    }
}

const COLUMNS: &str = "columns, not of rows; write rows (pandas: to_json(orient=\"records\", lines=True))";

/// Says what a list of strings may be where messages should be.
fn strings(path: &str, count: usize) -> Reason {
    if names::pair_answers().any(|name| name == path) {
        return format!(
            "{path:?} is a list of {count} strings; give one answer a record, or messages with role and content"
        );
    }
    if names::ANSWERS.contains(&path) && count == 2 {
        return format!(
            "{path:?} is a list of two strings; if they are a better and a worse answer, name them \"chosen\" and \"rejected\"; if it is a column of the file, write \
             rows (pandas: to_json(orient=\"records\", lines=True))"
        );
    }
    if names::CHATS.contains(&path) {
        return format!(
            "{path:?} is a list of strings; give each turn its role: {{\"role\": \"user\", \"content\": ...}}, then the assistant's"
        );
    }
    format!("{path:?} is a list of strings where messages should be; if the file holds {COLUMNS}")
}

/// pandas' columns by the numbers of their rows, or a list of messages turned into lists of their fields.
fn is_columns(map: &Map<String, Value>) -> bool {
    let numbered = map.keys().all(|key| !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_digit()));
    let listed = |name: &str| map.get(name).is_some_and(Value::is_array);
    !map.is_empty() && (numbered || names::STYLES.iter().any(|style| style.iter().all(|name| listed(name))))
}

/// How a text writes messages.
#[derive(Debug, Clone, Copy)]
enum Notation {
    Json,
    Python,
}

impl Notation {
    /// The notation of a text that is a message or begins a list of them; `None` for any other text.
    fn of(text: &str) -> Option<Self> {
        let text = text.trim_start();
        if !text.starts_with(['[', '{']) {
            return None;
        }
        let is_message = |value: &Value| {
            names::STYLES.iter().any(|[role, content]| {
                let role = value.get(role).and_then(Value::as_str).and_then(names::role);
                role.is_some() && value.get(content).is_some()
            })
        };
        match serde_json::from_str::<Value>(text) {
            Ok(value) => (is_message(&value) || value.get(0).is_some_and(is_message)).then_some(Self::Json),
            Err(_) => {
                let keys = |style: &[&str; 2]| style.iter().all(|name| text.contains(&format!("'{name}'")));
                let begins = text.starts_with("[{") || text.starts_with('{');
                (begins && names::STYLES.iter().any(keys)).then_some(Self::Python)
            }
        }
    }

    fn within(self) -> &'static str {
        match self {
            Self::Json => "as JSON within a string",
            Self::Python => "in Python's notation within a string",
        }
    }

    /// The command that makes messages of the text.
    fn command(self, path: &str) -> String {
        match self {
            Self::Json => advice::each(&format!(".{path} |= fromjson")),
            Self::Python => advice::python(&format!("dict(r, {path}=ast.literal_eval(r[\"{path}\"]))")),
        }
    }
}

/// Refuses a text that is a message or a list of them: it may be meant as messages, or be the text to learn.
///
/// # Errors
/// The field, and how to say which of the two it is.
pub fn check_text(path: &str, text: &str) -> Result<(), Reason> {
    let Some(notation) = Notation::of(text) else { return Ok(()) };
    Err(format!(
        "has in {path:?} what may be messages {}, or a text that is meant as it stands; if it is messages, unpack it: {}; if it is text, give \
         the record as \"messages\", whose content is always text",
        notation.within(),
        notation.command(path)
    ))
}

fn one(path: &str, value: &Value) -> Result<Weighted, Reason> {
    let fields = match value {
        Value::Object(fields) => fields,
        Value::String(_) => return Err(format!("{path} is a string where a message with role and content should be")),
        other => return Err(format!("{path} must be an object with role and content, not {}", kind_of(other))),
    };
    let [role_field, content_field] = style(path, fields)?;
    let role = role(&format!("{path}.{role_field}"), fields.get(role_field))?;
    fields.iter().try_for_each(|(name, value)| check_field(path, name, value, [role_field, content_field], role))?;
    let content = content(&format!("{path}.{content_field}"), fields.get(content_field))?;
    let weight = weight(&format!("{path}.weight"), fields.get("weight"), role)?;
    // What a flag says is kept, though it is what is done anyway: of a prompt nothing is learnt.
    let flagged = fields.iter().any(|(name, value)| is_default(name, value, role)).then_some(role == "assistant");
    if weight.is_some() && flagged.is_some() && weight != flagged {
        return Err(format!("{path}.weight says another thing than a flag beside it; keep the one that is meant"));
    }
    let weight = weight.or(flagged);
    let name = match fields.get("name").filter(|name| !is_absent(name)) {
        None => None,
        Some(Value::String(name)) => Some(name.clone()),
        Some(other) => return Err(format!("{path}.name must be a string, not {}", kind_of(other))),
    };
    let flagged = flagged.is_some();
    Ok(Weighted { message: ChatMessage { role: role.to_owned(), content, name }, weight, flagged })
}

/// The names of a message's role and content.
fn style(path: &str, fields: &Map<String, Value>) -> Result<[&'static str; 2], Reason> {
    let named = |style: &[&str; 2]| style.iter().filter(|name| fields.contains_key(**name)).count();
    let [openai, sharegpt] = &names::STYLES;
    let both = match (named(openai), named(sharegpt)) {
        (_, 0) => return Ok(*openai),
        (0, _) => return Ok(*sharegpt),
        (2, _) | (_, 2) => "keep one of the two",
        _ => "name both in one of the two ways",
    };
    let [[role, content], [from, value]] = names::STYLES;
    Err(format!("{path} has both of {role:?}/{content:?} and of {from:?}/{value:?}; {both}"))
}

/// Whether a field is a flag that says of a message what is done with its role anyway.
fn is_default(name: &str, value: &Value, role: &str) -> bool {
    unsupported::says_learnt(&name.to_ascii_lowercase(), value) == Some(role == "assistant")
}

fn check_field(path: &str, name: &str, value: &Value, known: [&str; 2], role: &str) -> Result<(), Reason> {
    if known.contains(&name) || ["weight", "name"].contains(&name) || IDENTITY.contains(&name) || is_absent(value) {
        return Ok(());
    }
    // Mistral's and DeepSeek's way to say that an answer is whole.
    if ["prefix", "partial"].contains(&name) && *value == Value::Bool(false) {
        return Ok(());
    }
    if is_default(name, value, role) {
        return Ok(());
    }
    let cut: String = name.chars().take(40).collect();
    let lower = name.to_ascii_lowercase();
    Err(match lower.as_str() {
        other if unsupported::says_tools(other) => {
            format!("uses tools ({path}.{cut}); chats with tools can't be trained yet")
        }
        other if unsupported::is_media(other, value) => format!("comes with {path}.{cut}; only text can be trained"),
        other if unsupported::loss(other, value, true) != Loss::Untouched => format!(
            "{path}.{cut} says which part is learnt, which is not supported; an assistant message's \"weight\" of 0 or 1 is"
        ),
        other if unsupported::is_reasoning(other, value) => {
            format!("has reasoning beside the answer ({path}.{cut}), which is not supported")
        }
        _ => format!("{path}.{cut} is not supported; a message has role, content, name and weight"),
    })
}

fn role(path: &str, value: Option<&Value>) -> Result<&'static str, Reason> {
    let Some(Value::String(given)) = value else {
        return Err(format!("{path} must be a string: system, user or assistant"));
    };
    match names::role(given) {
        Some(Role::Chat(role)) => Ok(role),
        Some(Role::Tool) => Err(format!("uses tools ({path} is {given:?}); chats with tools can't be trained yet")),
        None => Err(format!("{path} is {}; it must be system, user or assistant", shown(given))),
    }
}

/// A string, or OpenAI's list of parts, whose texts are joined with nothing between them.
fn content(path: &str, value: Option<&Value>) -> Result<String, Reason> {
    match value {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) if parts.is_empty() => Err(format!("{path} is an empty list; it must have a text")),
        Some(Value::Array(parts)) => {
            parts.iter().enumerate().map(|(i, part)| self::part(&format!("{path}[{i}]"), part)).collect()
        }
        None => Err(format!("{path} is missing")),
        Some(other) => Err(format!("{path} must be a string, not {}", kind_of(other))),
    }
}

fn part<'a>(path: &str, part: &'a Value) -> Result<&'a str, Reason> {
    let Value::Object(fields) = part else {
        return Err(format!("{path} must be an object with type and text, not {}", kind_of(part)));
    };
    match fields.get("type").and_then(Value::as_str) {
        Some("text" | "input_text" | "output_text") => {}
        Some(kind) => return Err(format!("{path} is of type {}; only text can be trained", shown(kind))),
        None => return Err(format!("{path}.type is missing; only parts of type \"text\" can be trained")),
    }
    let harmless = |name: &str| matches!(name, "type" | "text" | "annotations" | "cache_control");
    if let Some((name, _)) = fields.iter().find(|(name, value)| !harmless(name) && !is_absent(value)) {
        return Err(format!(
            "{path}.{} is not supported; a part has type and text",
            name.chars().take(40).collect::<String>()
        ));
    }
    fields.get("text").and_then(Value::as_str).ok_or_else(|| format!("{path}.text must be a string"))
}

fn weight(path: &str, value: Option<&Value>, role: &str) -> Result<Option<bool>, Reason> {
    let Some(value) = value.filter(|value| !is_absent(value)) else { return Ok(None) };
    match value.as_f64() {
        Some(1.0) if role == "assistant" => Ok(Some(true)),
        Some(0.0) => Ok(Some(false)),
        _ => Err(format!("{path} must be 0 or 1, and only an assistant's message can have 1")),
    }
}
