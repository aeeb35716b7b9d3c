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
    /// Ignored fields of an object inside, by their paths.
    inner: RefCell<Vec<String>>,
}

impl<'a> Fields<'a> {
    pub fn new(map: &'a Map<String, Value>) -> Self {
        Self { map, taken: RefCell::default(), inner: RefCell::default() }
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
        let is_pair = self.has("chosen") && self.has("rejected");
        let present = || self.map.iter().filter(|(_, value)| !is_absent(value));
        present().try_for_each(|(name, value)| unsupported(name, value, is_pair))
    }

    /// The fields that nobody has taken and that say something.
    pub fn ignored(&self) -> Vec<String> {
        let taken = self.taken.borrow();
        let left = self.map.iter().filter(|(name, value)| !taken.contains(&name.as_str()) && !is_absent(value));
        left.map(|(name, _)| name.clone()).chain(self.inner.borrow().iter().cloned()).collect()
    }

    /// Counts what nobody has taken of an object inside of this one as ignored here.
    pub fn ignore_rest_of(&self, name: &str, inner: &Fields<'_>) {
        self.inner.borrow_mut().extend(inner.ignored().into_iter().map(|field| format!("{name}.{field}")));
    }

    /// The fields that are a system message by their names, however these are written.
    pub fn system_names(&self) -> Vec<&'a str> {
        let plain = |name: &str| name.chars().filter(|c| c.is_alphanumeric()).collect::<String>().to_ascii_lowercase();
        let is_system = |name: &str| {
            matches!(
                plain(name).as_str(),
                "system" | "systemprompt" | "systemmessage" | "developer" | "developermessage"
            )
        };
        let present = self.map.iter().filter(|(name, value)| is_system(name) && !is_absent(value));
        present.map(|(name, _)| name.as_str()).collect()
    }
}

const UNPAIRED: &str = "is an answer with an unpaired label (as for KTO); it can't be trained: preferences need a chosen and a rejected answer to one prompt";

const LOGPS: &str = "brings a reference's log-probabilities; they are computed here, by the base or the version that is continued: remove them";

/// Refuses a record's field that changes what is learnt and can't be honoured.
fn unsupported(name: &str, value: &Value, is_pair: bool) -> Result<(), Reason> {
    let lower = name.to_ascii_lowercase();
    let why = match lower.as_str() {
        other if says_tools(other) && holds_tools(value) => {
            format!("uses tools ({name:?}); chats with tools can't be trained yet")
        }
        other if says_media(other, value) => format!("comes with {name:?}; only text can be trained"),
        "label" | "kto_tag" if is_pair => {
            format!(
                "has a label ({name:?}) beside a chosen and a rejected answer; remove it, or swap the two where it says so"
            )
        }
        "label" | "kto_tag" if is_verdict(value) => format!("{UNPAIRED} ({name:?})"),
        "label" | "kto_tag" => format!("has a label ({name:?}), which is not part of any shape that can be trained"),
        other if VERDICTS.contains(&other) && is_verdict(value) => format!("{UNPAIRED} ({name:?})"),
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
        "instructions" => format!(
            "has {name:?}, which no shape has; call it \"system\" where it is the system message, \"instruction\" where it is the prompt"
        ),
        other if other.starts_with("ref") && other.ends_with("_logps") => format!("{LOGPS} ({name:?})"),
        // A split of a file, with its records.
        "train" | "training" if value.is_array() || value.is_object() || value.is_string() => return Ok(()),
        other if says_loss(other) => {
            format!(
                "says which part is learnt ({name:?}), which is not supported; an assistant message's \"weight\" of 0 or 1 is"
            )
        }
        other if says_reasoning(other) && holds_reasoning(value) && (!value.is_object() || begins_reasoning(other)) => {
            format!("has reasoning beside the answer ({name:?}), which is not supported")
        }
        _ => return Ok(()),
    };
    Err(why)
}

/// Names of a verdict on an answer.
const VERDICTS: [&str; 11] = [
    "desirable",
    "is_desirable",
    "undesirable",
    "thumbs_up",
    "thumbs_down",
    "is_good",
    "is_bad",
    "is_chosen",
    "is_preferred",
    "accepted",
    "liked",
];

/// The words of a name.
fn words(lower: &str) -> impl Iterator<Item = &str> {
    lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty())
}

/// Names that set the loss.
pub fn says_loss(lower: &str) -> bool {
    let names = ["train", "training", "weight", "weights"];
    let ends = ["_weight", "_weights", "_train", "_training"];
    let begins = ["train_on", "weight_"];
    let loss = |word: &str| {
        matches!(
            word,
            "loss"
                | "mask"
                | "masks"
                | "masked"
                | "unmask"
                | "unmasked"
                | "trainable"
                | "learn"
                | "learnt"
                | "learnable"
        )
    };
    names.contains(&lower)
        || ends.iter().any(|end| lower.ends_with(end))
        || begins.iter().any(|begin| lower.starts_with(begin))
        || words(lower).any(loss)
}

/// Names of thoughts that a template may show.
pub fn says_reasoning(lower: &str) -> bool {
    let thought = |word: &str| {
        matches!(
            word,
            "reasoning"
                | "thinking"
                | "think"
                | "thought"
                | "thoughts"
                | "cot"
                | "rationale"
                | "rationales"
                | "scratchpad"
        )
    };
    begins_reasoning(lower) || words(lower).any(thought)
}

/// Those that are nothing else, whatever their value.
fn begins_reasoning(lower: &str) -> bool {
    lower.starts_with("reasoning") || lower.starts_with("thinking")
}

/// Whether a field of such a name brings thoughts, or turns them on: not where it is a figure or turns them off.
pub fn holds_reasoning(value: &Value) -> bool {
    match value {
        Value::Bool(on) => *on,
        Value::Number(_) => false,
        Value::String(text) => {
            !matches!(text.trim().to_ascii_lowercase().as_str(), "" | "off" | "no" | "none" | "false" | "disabled")
        }
        _ => true,
    }
}

/// Names of tools and of calls of them.
fn says_tools(lower: &str) -> bool {
    let names = [
        "tools",
        "functions",
        "tool_choice",
        "function_call",
        "function_calls",
        "tool_calls",
        "tool_results",
        "tool_outputs",
    ];
    let ends = ["_tools", "_functions"];
    let begins = [
        "tools_",
        "functions_",
        "function_descriptions",
        "function_definitions",
        "function_schemas",
        "tool_definitions",
        "tool_schemas",
        "tool_descriptions",
    ];
    names.contains(&lower)
        || ends.iter().any(|end| lower.ends_with(end))
        || begins.iter().any(|begin| lower.starts_with(begin))
}

/// Names of what is not text, with a value that may be it: a path, bytes, or a list of them; no count and no object that only bears the word.
fn says_media(lower: &str, value: &Value) -> bool {
    let media = |word: &str| {
        matches!(
            word,
            "image"
                | "images"
                | "img"
                | "imgs"
                | "video"
                | "videos"
                | "audio"
                | "audios"
                | "picture"
                | "pictures"
                | "photo"
                | "photos"
        )
    };
    match value {
        Value::String(_) | Value::Array(_) => words(lower).any(media),
        Value::Object(_) => media(lower),
        _ => false,
    }
}

/// A list of tools may come as JSON in a string.
fn holds_tools(value: &Value) -> bool {
    match value {
        Value::String(text) => !matches!(text.trim(), "" | "[]" | "{}" | "null" | "none" | "auto"),
        Value::Bool(_) | Value::Number(_) => false,
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
            (json!({"Complex_CoT": "x"}), "reasoning"),
            (json!({"r1_reasoning": "x"}), "reasoning"),
            (json!({"rationale": "x"}), "reasoning"),
            (json!({"enable_thinking": true}), "reasoning"),
            (json!({"assistant_masks": [0, 1]}), "which part is learnt"),
            (json!({"is_train": false}), "which part is learnt"),
            (json!({"no_train": true}), "which part is learnt"),
            (json!({"trainable_turns": [1]}), "which part is learnt"),
            (json!({"image_url": "x.jpg"}), "only text"),
            (json!({"video_path": "x.mp4"}), "only text"),
            (json!({"thumbs_up": false}), "unpaired label"),
            (json!({"available_tools": [{"name": "f"}]}), "uses tools"),
            (json!({"function_descriptions": "[{}]"}), "uses tools"),
            (json!({"ref_chosen_logps": -3.5}), "log-probabilities"),
            (json!({"label": 1, "chosen": "a", "rejected": "b"}), "beside a chosen"),
            (json!({"instructions": "Be kind."}), "\"system\""),
        ] {
            let error = Fields::new(value.as_object().unwrap()).refuse_unsupported().unwrap_err();
            assert!(error.contains(words), "{value}: {error}");
        }
        let harmless = json!({
            "tools": "[]", "tool_choice": "auto", "training_source": "x", "weighted_score": 1, "thinking": false, "reasoning": "off",
            "reasoning_tokens": 12, "has_image": false, "num_images": 0, "train": "yes", "function": "def f(): pass", "rating": -1
        });
        Fields::new(harmless.as_object().unwrap()).refuse_unsupported().unwrap();
        let tools = json!({"tools": false});
        Fields::new(tools.as_object().unwrap()).refuse_unsupported().unwrap();
    }
}
