//! One message, in OpenAI's words (`role`, `content`) or ShareGPT's (`from`, `value`). Its fields are an allow-list: what is not in it and
//! says something is refused by name, for a template could show it or a trainer weigh it.

use serde_json::{Map, Value};

use super::fields::{Reason, holds_reasoning, is_absent, kind_of, says_loss, says_reasoning, shown};
use crate::request::ChatMessage;

/// A message and its weight, where it has one.
#[derive(Debug, Clone, PartialEq)]
pub struct Weighted {
    pub message: ChatMessage,
    /// OpenAI's: whether an assistant's message is learnt.
    pub weight: Option<bool>,
}

/// The words for the three roles.
const ROLES: [(&str, &[&str]); 3] = [
    ("system", &["system", "developer"]),
    ("user", &["user", "human", "prompter"]),
    ("assistant", &["assistant", "gpt", "model", "bot", "chatgpt", "bing", "bard"]),
];
const TOOL_ROLES: [&str; 9] = [
    "tool",
    "function",
    "observation",
    "function_call",
    "tool_call",
    "function_response",
    "tool_response",
    "ipython",
    "environment",
];
/// Fields that identify a message and mean nothing.
const IDENTITY: [&str; 5] = ["id", "message_id", "uuid", "timestamp", "created_at"];

/// A list of messages, or a single one.
pub fn list(path: &str, value: &Value) -> Result<Vec<Weighted>, Reason> {
    match value {
        Value::Array(list) if list.iter().all(Value::is_string) => Err(strings(path, list.len())),
        Value::Array(list) => list.iter().enumerate().map(|(i, value)| one(&format!("{path}[{i}]"), value)).collect(),
        Value::Object(map) if is_columns(map) => Err(format!("{path:?} is an object of {COLUMNS}")),
        Value::Object(_) => Ok(vec![one(path, value)?]),
        Value::String(text) => {
            check_text(path, text)?;
            match text.trim_start().starts_with('[') {
                true => Err(json_within(path)),
                false => Err(format!("{path:?} must be a list of messages, not a string")),
            }
        }
        other => Err(format!("{path:?} must be a list of messages, not {}", kind_of(other))),
    }
}

const COLUMNS: &str = "columns, not of rows; write rows (pandas: to_json(orient=\"records\", lines=True))";

/// Says what a list of strings may be where messages should be.
fn strings(path: &str, count: usize) -> Reason {
    match path {
        "chosen" | "rejected" => format!(
            "{path:?} is a list of {count} strings; give one answer a record, or messages with role and content"
        ),
        "completion" | "response" | "output" | "answer" if count == 2 => format!(
            "{path:?} is a list of two strings; if they are a better and a worse answer, name them \"chosen\" and \"rejected\"; if it is a column of the file, write \
             rows (pandas: to_json(orient=\"records\", lines=True))"
        ),
        "messages" | "conversations" | "conversation" => {
            format!(
                "{path:?} is a list of strings; give each turn its role: {{\"role\": \"user\", \"content\": ...}}, then the assistant's"
            )
        }
        _ => format!("{path:?} is a list of strings where messages should be; if the file holds {COLUMNS}"),
    }
}

/// pandas' columns by the numbers of their rows, or a list of messages turned into lists of their fields.
fn is_columns(map: &Map<String, Value>) -> bool {
    let numbered = map.keys().all(|key| !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_digit()));
    let listed = |name| map.get(name).is_some_and(Value::is_array);
    !map.is_empty() && (numbered || (listed("role") && listed("content")) || (listed("from") && listed("value")))
}

fn json_within(path: &str) -> Reason {
    format!(
        "has its messages as JSON within a string ({path:?}); unpack it: jq -c '.{path} |= fromjson' IN > OUT.jsonl"
    )
}

/// Refuses a text that is a list of messages, in JSON or in Python's notation: it would be learnt letter by letter.
///
/// # Errors
/// The field, and the command that unpacks it.
pub fn check_text(path: &str, text: &str) -> Result<(), Reason> {
    let text = text.trim_start();
    if !text.starts_with(['[', '{']) {
        return Ok(());
    }
    let is_message = |value: &Value| {
        value.as_object().is_some_and(|map| {
            (map.contains_key("role") && map.contains_key("content"))
                || (map.contains_key("from") && map.contains_key("value"))
        })
    };
    match serde_json::from_str::<Value>(text) {
        Ok(value) if is_message(&value) || value.as_array().and_then(|list| list.first()).is_some_and(is_message) => {
            Err(format!(
                "has its messages as JSON within a string ({path:?}); unpack it: jq -c '.{path} |= fromjson' IN > OUT.jsonl"
            ))
        }
        Ok(_) => Ok(()),
        Err(_) => {
            let keys = |[a, b]: [&str; 2]| text.contains(&format!("'{a}'")) && text.contains(&format!("'{b}'"));
            let python = (text.starts_with("[{") || text.starts_with('{'))
                && (keys(["role", "content"]) || keys(["from", "value"]));
            if !python {
                return Ok(());
            }
            Err(format!(
                "has its messages in Python's notation within a string ({path:?}); unpack it: python3 -c 'import ast,json,sys; \
                 [print(json.dumps(dict(r, {path}=ast.literal_eval(r[\"{path}\"])))) for r in map(json.loads, sys.stdin)]' < IN > OUT.jsonl"
            ))
        }
    }
}

fn one(path: &str, value: &Value) -> Result<Weighted, Reason> {
    let fields = match value {
        Value::Object(fields) => fields,
        Value::String(_) => return Err(format!("{path} is a string where a message with role and content should be")),
        other => return Err(format!("{path} must be an object with role and content, not {}", kind_of(other))),
    };
    let (role_field, content_field) = style(path, fields)?;
    fields.iter().try_for_each(|(name, value)| check_field(path, name, value, [role_field, content_field]))?;
    let role = role(&format!("{path}.{role_field}"), fields.get(role_field))?;
    let content = content(&format!("{path}.{content_field}"), fields.get(content_field))?;
    let weight = weight(&format!("{path}.weight"), fields.get("weight"), role)?;
    let name = match fields.get("name").filter(|name| !is_absent(name)) {
        None => None,
        Some(Value::String(name)) => Some(name.clone()),
        Some(other) => return Err(format!("{path}.name must be a string, not {}", kind_of(other))),
    };
    Ok(Weighted { message: ChatMessage { role: role.to_owned(), content, name }, weight })
}

/// The names of a message's role and content.
fn style(path: &str, fields: &Map<String, Value>) -> Result<(&'static str, &'static str), Reason> {
    let openai = fields.contains_key("role") || fields.contains_key("content");
    let sharegpt = fields.contains_key("from") || fields.contains_key("value");
    match (openai, sharegpt) {
        (true, true) => Err(format!("{path} has both \"role\"/\"content\" and \"from\"/\"value\"; keep one of them")),
        (false, true) => Ok(("from", "value")),
        _ => Ok(("role", "content")),
    }
}

fn check_field(path: &str, name: &str, value: &Value, known: [&str; 2]) -> Result<(), Reason> {
    if known.contains(&name) || ["weight", "name"].contains(&name) || IDENTITY.contains(&name) || is_absent(value) {
        return Ok(());
    }
    // Mistral's and DeepSeek's way to say that an answer is whole.
    if ["prefix", "partial"].contains(&name) && *value == Value::Bool(false) {
        return Ok(());
    }
    let cut: String = name.chars().take(40).collect();
    let lower = name.to_ascii_lowercase();
    Err(match lower.as_str() {
        "tool_calls" | "function_call" | "tool_call_id" | "tools" | "functions" => {
            format!("uses tools ({path}.{cut}); chats with tools can't be trained yet")
        }
        "images" | "image" | "audio" | "audios" | "video" | "videos" => {
            format!("comes with {path}.{cut}; only text can be trained")
        }
        other if says_loss(other) => format!(
            "{path}.{cut} says which part is learnt, which is not supported; an assistant message's \"weight\" of 0 or 1 is"
        ),
        other if says_reasoning(other) && holds_reasoning(value) => {
            format!("has reasoning beside the answer ({path}.{cut}), which is not supported")
        }
        _ => format!("{path}.{cut} is not supported; a message has role, content, name and weight"),
    })
}

fn role(path: &str, value: Option<&Value>) -> Result<&'static str, Reason> {
    let Some(Value::String(given)) = value else {
        return Err(format!("{path} must be a string: system, user or assistant"));
    };
    let lower = given.to_ascii_lowercase();
    if let Some((role, _)) = ROLES.iter().find(|(_, words)| words.contains(&lower.as_str())) {
        return Ok(role);
    }
    if TOOL_ROLES.contains(&lower.as_str()) {
        return Err(format!("uses tools ({path} is {given:?}); chats with tools can't be trained yet"));
    }
    Err(format!("{path} is {}; it must be system, user or assistant", shown(given)))
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
