//! The fields of a record. Null and empty mean absent. Whoever reads a field takes it; what nobody has taken at the end is refused, where
//! its name says that it changes what is learnt, or counted as ignored.

use std::cell::RefCell;

use serde_json::{Map, Value};

/// Why a record is refused, in one sentence that follows "line 7: ".
pub type Reason = String;

/// Whether a value says nothing.
pub fn is_absent(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// A name or value of a tenant's file, cut for a message.
pub fn shown(text: &str) -> String {
    let cut: String = text.chars().take(40).collect();
    if cut.len() < text.len() { format!("{cut:?}...") } else { format!("{cut:?}") }
}

/// What kind of value it is, for messages.
pub fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The fields of one object.
#[derive(Debug)]
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    taken: RefCell<Vec<&'a str>>,
}

impl<'a> Fields<'a> {
    pub fn new(map: &'a Map<String, Value>) -> Self {
        Self { map, taken: RefCell::default() }
    }

    /// Whether a field is there and says something.
    pub fn has(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(|value| !is_absent(value))
    }

    /// Takes a field; `None` where it is absent, null or empty.
    pub fn take(&self, name: &str) -> Option<&'a Value> {
        let (name, value) = self.map.get_key_value(name)?;
        self.taken.borrow_mut().push(name);
        Some(value).filter(|value| !is_absent(value))
    }

    /// Takes a field that must be there; an empty string is a value here.
    pub fn take_required(&self, name: &str) -> Option<&'a Value> {
        let (name, value) = self.map.get_key_value(name)?;
        self.taken.borrow_mut().push(name);
        Some(value).filter(|value| value.is_string() || !is_absent(value))
    }

    /// Takes a field that must be a string where it is present.
    pub fn take_text(&self, name: &str) -> Result<Option<&'a str>, Reason> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(format!("{name:?} must be a string, not {}", kind_of(other))),
        }
    }

    /// Those of these names that are present.
    pub fn present<'n>(&self, names: &[&'n str]) -> Vec<&'n str> {
        names.iter().copied().filter(|name| self.has(name)).collect()
    }

    /// The one of these names that is present. Two are an error: a record has one meaning.
    pub fn one_of<'n>(&self, names: &[&'n str]) -> Result<Option<&'n str>, Reason> {
        match self.present(names)[..] {
            [] => Ok(None),
            [name] => Ok(Some(name)),
            [first, second, ..] => Err(format!("has both {first:?} and {second:?}; keep the one that is meant")),
        }
    }

    /// All names that say something, for a message.
    pub fn names(&self) -> String {
        let names: Vec<String> =
            self.map.iter().filter(|(_, value)| !is_absent(value)).map(|(name, _)| shown(name)).take(8).collect();
        if names.is_empty() { "no field that says anything".into() } else { format!("the fields {}", names.join(", ")) }
    }

    pub fn map(&self) -> &'a Map<String, Value> {
        self.map
    }

    /// Refuses what may not be there, whether taken or not.
    ///
    /// # Errors
    /// The field and what it is.
    pub fn refuse_unsupported(&self) -> Result<(), Reason> {
        self.map.iter().filter(|(_, value)| !is_absent(value)).try_for_each(|(name, value)| unsupported(name, value))
    }

    /// The fields that nobody has taken and that say something.
    pub fn ignored(&self) -> Vec<String> {
        let taken = self.taken.borrow();
        let left = self.map.iter().filter(|(name, value)| !taken.contains(&name.as_str()) && !is_absent(value));
        left.map(|(name, _)| name.clone()).collect()
    }
}

const UNPAIRED: &str = "is an answer with an unpaired label (as for KTO); it can't be trained: preferences need a chosen and a rejected answer to one prompt";

/// Refuses a record's field that changes what is learnt and can't be honoured.
fn unsupported(name: &str, value: &Value) -> Result<(), Reason> {
    let lower = name.to_ascii_lowercase();
    let why = match lower.as_str() {
        "tools" | "functions" | "tool_choice" | "function_call" | "tool_calls" if holds_tools(value) => {
            format!("uses tools ({name:?}); chats with tools can't be trained yet")
        }
        "images" | "image" | "videos" | "video" | "audios" | "audio" | "image_path" => {
            format!("comes with {name:?}; only text can be trained")
        }
        "label" | "kto_tag" if is_verdict(value) => format!("{UNPAIRED} ({name:?})"),
        "label" | "kto_tag" => format!("has a label ({name:?}), which is not part of any shape that can be trained"),
        "labels" if is_numbers(value) => format!("is tokenised already ({name:?}); give text"),
        "labels" => format!("has labels of steps or answers ({name:?}); they can't be trained"),
        "input_ids" | "token_ids" | "attention_mask" | "token_type_ids" | "tokens" | "prompt_ids" => {
            format!("is tokenised already ({name:?}); give text")
        }
        "completions" => {
            "has several completions to one prompt; give one a record, or pairs of chosen and rejected".into()
        }
        "chat_template_kwargs" | "chat_template" | "documents" | "add_generation_prompt" | "continue_final_message" => {
            format!("changes how the chat template renders it ({name:?}), which is not supported")
        }
        "prefix" | "assistant_prefix" | "partial" if *value != Value::Bool(false) => {
            format!("gives the beginning of an answer ({name:?}), which is not supported")
        }
        other if says_loss(other) => {
            format!(
                "says which part is learnt ({name:?}), which is not supported; an assistant message's \"weight\" of 0 or 1 is"
            )
        }
        other if says_reasoning(other) => format!("has reasoning beside the answer ({name:?}), which is not supported"),
        _ => return Ok(()),
    };
    Err(why)
}

/// Names that set the loss.
pub fn says_loss(lower: &str) -> bool {
    let names = ["loss", "mask", "train", "trainable", "learn", "weight", "unmask", "masked", "no_loss", "ignore_loss"];
    let ends = ["_loss", "_mask", "_weight", "_weights"];
    let begins = ["loss_", "mask_", "train_on", "unmask_", "weight_", "learn_"];
    names.contains(&lower)
        || ends.iter().any(|end| lower.ends_with(end))
        || begins.iter().any(|begin| lower.starts_with(begin))
}

/// Names of thoughts that a template may show.
pub fn says_reasoning(lower: &str) -> bool {
    lower.starts_with("reasoning")
        || lower.starts_with("thinking")
        || matches!(lower, "thought" | "thoughts" | "chain_of_thought" | "cot")
}

/// A list of tools may come as JSON in a string.
fn holds_tools(value: &Value) -> bool {
    match value {
        Value::String(text) => !matches!(text.trim(), "" | "[]" | "{}" | "null" | "none" | "auto"),
        _ => true,
    }
}

/// Good or bad: true, false, 1, 0, -1.
fn is_verdict(value: &Value) -> bool {
    match value {
        Value::Bool(_) => true,
        Value::Number(number) => number.as_f64().is_some_and(|n| n == 0.0 || n.abs() == 1.0),
        Value::String(text) => matches!(text.to_ascii_lowercase().as_str(), "true" | "false"),
        _ => false,
    }
}

fn is_numbers(value: &Value) -> bool {
    value.as_array().is_some_and(|list| list.iter().all(Value::is_number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn null_and_empty_are_absent_and_what_is_left_is_named() {
        let value = json!({"tools": null, "label": [], "a": "x", "score": 3, "source": "", "meta": {}});
        let fields = Fields::new(value.as_object().unwrap());
        fields.refuse_unsupported().unwrap();
        assert_eq!(fields.take_text("a").unwrap(), Some("x"));
        assert!(fields.take("tools").is_none() && !fields.has("source"));
        assert_eq!(fields.ignored(), ["score"]);
        assert!(fields.take_text("score").unwrap_err().contains("a number"));
    }

    #[test]
    fn fields_that_change_the_meaning_are_refused_as_what_they_are() {
        for (value, words) in [
            (json!({"tools": [{"type": "function"}]}), "uses tools"),
            (json!({"tools": "[{\"name\": 1}]"}), "uses tools"),
            (json!({"images": ["a.png"]}), "only text"),
            (json!({"label": true}), "unpaired label"),
            (json!({"label": 0}), "unpaired label"),
            (json!({"kto_tag": false}), "unpaired label"),
            (json!({"label": "sports"}), "has a label"),
            (json!({"labels": [1, 2]}), "tokenised"),
            (json!({"labels": [true, false]}), "labels of steps"),
            (json!({"input_ids": [1]}), "tokenised"),
            (json!({"loss_weight": 0.5}), "which part is learnt"),
            (json!({"sample_weight": 1}), "which part is learnt"),
            (json!({"train_on_inputs": true}), "which part is learnt"),
            (json!({"unmask": true}), "which part is learnt"),
            (json!({"reasoning_content": "x"}), "reasoning"),
            (json!({"chat_template_kwargs": {"a": 1}}), "chat template"),
        ] {
            let error = Fields::new(value.as_object().unwrap()).refuse_unsupported().unwrap_err();
            assert!(error.contains(words), "{value}: {error}");
        }
        let harmless = json!({"tools": "[]", "tool_choice": "auto", "training_source": "x", "weighted_score": 1});
        Fields::new(harmless.as_object().unwrap()).refuse_unsupported().unwrap();
    }
}
