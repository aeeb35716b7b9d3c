//! What a value is that is no record: where its records are, or what it lacks.

use serde_json::{Map, Value};

use super::fields::{Fields, Reason, is_absent, kind_of, shown};
use super::{advice, names};

/// Says what a value is that is no object.
pub fn not_an_object(value: &Value) -> Reason {
    let first = |list: &'_ [Value]| list.first().and_then(Value::as_object).map(is_record);
    match value {
        Value::String(text) if text.trim_start().starts_with('{') => {
            format!("is a string that holds JSON; unpack it: {}", advice::each("fromjson"))
        }
        Value::Array(list) if first(list) == Some(true) => {
            format!("is a list of records; take them out: {}", advice::each(".[]"))
        }
        Value::Array(list) if first(list) == Some(false) => {
            format!("is a bare list of messages; name it: {}", advice::each("{messages: .}"))
        }
        other => format!("must be a JSON object, not {}", kind_of(other)),
    }
}

/// Says what a record is that has no known shape.
pub fn unknown_shape(fields: &Fields<'_>) -> Reason {
    if fields.has("text") && !fields.has("parent_id") && !fields.has("message_id") {
        return "is plain text (\"text\"); training on plain text is not supported, and no prompt can be made of it"
            .into();
    }
    if names::STYLES.iter().any(|style| style.iter().all(|name| fields.has(name))) {
        return format!(
            "is one message, not a record, which holds the list of them; if the file is one conversation: {}",
            advice::whole("{messages: .}")
        );
    }
    if ["message_id", "parent_id", "role"].iter().all(|name| fields.map().contains_key(*name)) {
        return "is one message of a tree of messages; follow \"parent_id\" and write each path as \"messages\"".into();
    }
    records_inside(fields).or_else(|| empty(fields)).unwrap_or_else(|| lacking(fields))
}

/// Says where within an object its records are.
fn records_inside(fields: &Fields<'_>) -> Option<Reason> {
    let records = fields.map().values().filter(|value| value.as_object().is_some_and(is_record)).count();
    if records > 1 && records == fields.map().len() {
        return Some(format!("holds its records as an object's fields; take them out: {}", advice::each(".[]")));
    }
    let row = |value: &Value| {
        value
            .as_object()
            .is_some_and(|map| is_record(map) || map.get("row").and_then(Value::as_object).is_some_and(is_record))
    };
    let holds = |value: &Value| row(value) || value.as_array().and_then(|list| list.first()).is_some_and(row);
    let (name, value) = fields.map().iter().find(|(_, value)| holds(value))?;
    let path = serde_json::to_string(name).unwrap_or_default();
    let (each, first) = if value.is_array() { ("[]", &value[0]) } else { ("", value) };
    let row = if first.as_object().is_some_and(is_record) { "" } else { " | .row" };
    let command = advice::each(&format!(".[{path}]{each}{row}"));
    Some(format!("has its records inside of {}; take them out: {command}", shown(name)))
}

/// Says which field would make it a record, were there something in it.
fn empty(fields: &Fields<'_>) -> Option<Reason> {
    let asks = names::asked().any(|name| fields.has(name));
    let answers = names::ANSWERS.iter().any(|name| fields.has(name));
    let mut wanted: Box<dyn Iterator<Item = &str>> = match (asks, answers) {
        (true, _) => Box::new(names::ANSWERS.into_iter()),
        (false, true) => Box::new(names::asked()),
        (false, false) => {
            Box::new(names::CHATS.into_iter().chain(names::pair_answers()).chain(names::asked()).chain(names::ANSWERS))
        }
    };
    let name = wanted.find(|name| fields.is_empty(name))?;
    Some(format!("has {name:?}, but nothing is in it; fill it, or leave the record out"))
}

fn lacking(fields: &Fields<'_>) -> Reason {
    let says = fields.names();
    match names::asked().find(|name| fields.has(name)) {
        Some(prompt) => {
            let answers = names::ANSWERS.join(", ");
            let [chosen, rejected] = names::PAIRS[0];
            format!(
                "has {says}: a prompt ({prompt:?}), and no answer by a name that is known ({answers}; {chosen} and {rejected})"
            )
        }
        None => format!(
            "has {says}, which make none of the shapes \"messages\"; \"conversations\"; \"prompt\" and \"completion\"; \"instruction\" \
             (\"input\") and \"output\"; \"prompt\", \"chosen\" and \"rejected\""
        ),
    }
}

/// Whether an object has the fields of a shape.
fn is_record(map: &Map<String, Value>) -> bool {
    let has = |name: &str| map.get(name).is_some_and(|value| !is_absent(value));
    names::CHATS.into_iter().chain(names::pair_answers()).any(has)
        || (names::asked().any(has) && names::ANSWERS.into_iter().any(has))
}
