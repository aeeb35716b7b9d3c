//! Fields that change what is learnt and can't be honoured. A name alone says little: a field is refused where its value can be what its
//! name says, and where that is in doubt the reason says so.

use serde_json::Value;

use super::fields::{Fields, Reason};
use super::names;

const UNPAIRED: &str = "is an answer with an unpaired label (as for KTO); it can't be trained: preferences need a chosen and a rejected answer to one prompt";

const LOGPS: &str = "brings a reference's log-probabilities; they are computed here, by the base or the version that is continued: remove them";

/// What else a record has.
#[derive(Debug, Clone, Copy)]
struct Beside {
    /// Both answers of a preference.
    is_pair: bool,
    /// A field that a shape is recognised by.
    has_shape: bool,
}

/// Refuses a record's fields that may not be there, whether taken or not.
///
/// # Errors
/// The first such field and what it is.
pub fn refuse(fields: &Fields<'_>) -> Result<(), Reason> {
    let mut known = names::CHATS.into_iter().chain(names::asked()).chain(names::ANSWERS).chain(names::pair_answers());
    let beside = Beside { is_pair: is_pair(fields), has_shape: known.any(|name| fields.has(name)) };
    fields.said().try_for_each(|(name, value)| unsupported(name, value, beside))
}

/// Whether a record has both answers of a preference.
pub fn is_pair(fields: &Fields<'_>) -> bool {
    names::PAIRS.iter().any(|names| names.iter().all(|name| fields.has(name)))
}

fn unsupported(name: &str, value: &Value, beside: Beside) -> Result<(), Reason> {
    let lower = name.to_ascii_lowercase();
    let why = match lower.as_str() {
        other if says_tools(other) && holds_tools(value) => {
            format!("uses tools ({name:?}); chats with tools can't be trained yet")
        }
        other if is_media(other, value) => format!("comes with {name:?}; only text can be trained"),
        "label" | "kto_tag" if beside.is_pair => {
            format!(
                "has a label ({name:?}) beside a chosen and a rejected answer; remove it, or swap the two where it says so"
            )
        }
        "label" | "kto_tag" if is_verdict(value) => format!("{UNPAIRED} ({name:?})"),
        "label" | "kto_tag" => format!("has a label ({name:?}), which is not part of any shape that can be trained"),
        other if VERDICTS.contains(&other) && is_verdict(value) => format!("{UNPAIRED} ({name:?})"),
        other if names::pair_answers().any(|answer| answer == other) && !beside.is_pair && is_verdict(value) => {
            format!("{UNPAIRED} ({name:?})")
        }
        "labels" if is_numbers(value) => format!("is tokenised already ({name:?}); give text"),
        "labels" => format!("has labels of steps or answers ({name:?}); they can't be trained"),
        "input_ids" | "token_ids" | "attention_mask" | "token_type_ids" | "tokens" | "prompt_ids"
            if is_numbers(value) =>
        {
            format!("is tokenised already ({name:?}); give text")
        }
        "completions" if !value.is_number() => {
            "has several completions to one prompt; give one a record, or pairs of chosen and rejected".into()
        }
        "chat_template_kwargs" | "chat_template" | "documents" | "add_generation_prompt" | "continue_final_message"
            if *value != Value::Bool(false) =>
        {
            format!("changes how the chat template renders it ({name:?}), which is not supported")
        }
        "prefix" | "assistant_prefix" | "partial" if *value != Value::Bool(false) => {
            format!("gives the beginning of an answer ({name:?}), which is not supported")
        }
        "instructions" => format!(
            "has {name:?}, which no shape has; call it \"system\" where it is the system message, \"instruction\" where it is the prompt"
        ),
        other if other.starts_with("ref") && other.ends_with("_logps") => format!("{LOGPS} ({name:?})"),
        other => match loss(other, value, beside.has_shape) {
            Loss::Untouched if is_reasoning(other, value) && !(beside.is_pair && is_of_a_judge(other)) => {
                format!("has reasoning beside the answer ({name:?}), which is not supported")
            }
            Loss::Untouched => return Ok(()),
            Loss::Set => format!(
                "says which part is learnt ({name:?}), which is not supported; an assistant message's \"weight\" of 0 or 1 is"
            ),
            Loss::InDoubt => format!(
                "has {name:?}, which may say which part is learnt, or how much; that is not supported but for an assistant message's \"weight\" \
                 of 0 or 1: remove it, or call it something else if it says something else"
            ),
        },
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

/// What a field says of the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Nothing, or what is done anyway.
    Untouched,
    /// What is learnt.
    Set,
    /// Perhaps what is learnt, perhaps something else by the same name.
    InDoubt,
}

/// Flags of a record that say what is done anyway: answers are learnt, prompts are not.
const DEFAULTS: [(&str, bool); 12] = [
    ("train", true),
    ("training", true),
    ("is_train", true),
    ("trainable", true),
    ("learn", true),
    ("learnable", true),
    ("unmask", false),
    ("no_train", false),
    ("train_on_inputs", false),
    ("train_on_input", false),
    ("train_on_prompts", false),
    ("train_on_prompt", false),
];

/// Returns what a field says of the loss, by its name (in lower case) and its value.
pub fn loss(lower: &str, value: &Value, has_shape: bool) -> Loss {
    let is_split = splits(lower);
    if !is_split && !weighs(lower) && !masks(lower) {
        return Loss::Untouched;
    }
    match value {
        Value::Bool(flag) if DEFAULTS.contains(&(lower, *flag)) => Loss::Untouched,
        Value::Number(weight) if weighs(lower) && weight.as_f64() == Some(1.0) => Loss::Untouched,
        // Records under a name of their own, or the settings of a file.
        Value::Object(_) if is_split || !has_shape => Loss::Untouched,
        Value::Array(list) if (is_split || !has_shape) && list.iter().all(Value::is_object) => Loss::Untouched,
        Value::String(_) if matches!(lower, "train" | "training") => Loss::Untouched,
        Value::Number(_) | Value::String(_) => Loss::InDoubt,
        _ => Loss::Set,
    }
}

/// Names of what is trained on, which may be a part of a file.
fn splits(lower: &str) -> bool {
    matches!(lower, "train" | "training")
        || ["_train", "_training"].iter().any(|end| lower.ends_with(end))
        || lower.starts_with("train_on")
}

/// Names of weights.
fn weighs(lower: &str) -> bool {
    matches!(lower, "weight" | "weights")
        || ["_weight", "_weights"].iter().any(|end| lower.ends_with(end))
        || lower.starts_with("weight_")
}

/// Names of masks and the loss itself.
fn masks(lower: &str) -> bool {
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
    words(lower).any(loss)
}

/// Whether a message's flag says that it is learnt; `None` for what is no such flag.
pub fn says_learnt(lower: &str, value: &Value) -> Option<bool> {
    let flag = match value {
        Value::Bool(flag) => *flag,
        Value::Number(number) => match number.as_f64()? {
            0.0 => false,
            1.0 => true,
            _ => return None,
        },
        _ => return None,
    };
    match lower {
        "train" | "training" | "trainable" | "learn" | "learnt" | "learnable" => Some(flag),
        // A "mask" of 1 is what is learnt to some and what is not to others.
        "masked" => Some(!flag),
        _ => None,
    }
}

/// Whether a field brings thoughts that a template may show, or turns them on.
pub fn is_reasoning(lower: &str, value: &Value) -> bool {
    let begins = lower.starts_with("reasoning") || lower.starts_with("thinking");
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
    // An object by such a name may be a file's settings.
    (begins || (words(lower).any(thought) && !value.is_object())) && holds_reasoning(lower, value)
}

/// Not a figure, nor a statement about the thoughts, nor what turns them off.
fn holds_reasoning(lower: &str, value: &Value) -> bool {
    match value {
        Value::Bool(on) => *on && !["is_", "has_"].iter().any(|begin| lower.starts_with(begin)),
        Value::Null | Value::Number(_) => false,
        Value::String(text) => {
            !matches!(text.trim().to_ascii_lowercase().as_str(), "" | "off" | "no" | "none" | "false" | "disabled")
        }
        Value::Array(list) => list.iter().any(|item| !matches!(item, Value::Bool(_) | Value::Number(_) | Value::Null)),
        Value::Object(_) => true,
    }
}

/// Names of what a judge says of two answers.
fn is_of_a_judge(lower: &str) -> bool {
    let judge = |word: &str| {
        matches!(word, "rationale" | "rationales" | "judge" | "judgement" | "judgment" | "verdict" | "preference")
    };
    words(lower).any(judge) && !names::pair_answers().any(|answer| words(lower).any(|word| word == answer))
}

/// Names of tools and of calls of them.
pub fn says_tools(lower: &str) -> bool {
    let names = [
        "tools",
        "functions",
        "tool_choice",
        "tool_call_id",
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

/// A list of tools may come as JSON in a string.
pub fn holds_tools(value: &Value) -> bool {
    match value {
        Value::String(text) => {
            !matches!(text.trim().to_ascii_lowercase().as_str(), "" | "[]" | "{}" | "null" | "none" | "auto" | "false")
        }
        Value::Bool(_) | Value::Number(_) => false,
        _ => true,
    }
}

/// Whether a field is what is not text: a path, bytes, or a list of them; no count, no words about it.
pub fn is_media(lower: &str, value: &Value) -> bool {
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
    let place = |word: &str| {
        matches!(
            word,
            "path"
                | "paths"
                | "url"
                | "urls"
                | "uri"
                | "file"
                | "files"
                | "filename"
                | "filenames"
                | "bytes"
                | "data"
                | "base64"
                | "b64"
                | "content"
                | "list"
        )
    };
    // "image", "input_images", "image_url": not "image_caption".
    let is_it = || {
        let mut last = words(lower).skip_while(|word| !media(word)).peekable();
        last.peek().is_some() && last.all(|word| media(word) || place(word) || word.bytes().all(|b| b.is_ascii_digit()))
    };
    match value {
        Value::String(_) | Value::Array(_) => is_it() || (words(lower).any(media) && is_file(value)),
        Value::Object(_) => media(lower),
        _ => false,
    }
}

/// Whether a text is the name or the address of a picture, a film or a sound, or holds one.
fn is_file(value: &Value) -> bool {
    const ENDS: [&str; 14] = [
        ".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".mp4", ".webm", ".mov", ".mp3", ".wav",
        ".flac",
    ];
    match value {
        Value::String(text) => {
            let lower = text.trim().to_ascii_lowercase();
            lower.starts_with("data:") || ENDS.iter().any(|end| lower.ends_with(end))
        }
        Value::Array(list) => list.iter().any(is_file),
        _ => false,
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

/// A list of numbers, or of such lists.
fn is_numbers(value: &Value) -> bool {
    value.as_array().is_some_and(|list| list.iter().all(|item| item.is_number() || is_numbers(item)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn refusal(value: &Value) -> Result<(), Reason> {
        refuse(&Fields::new(value.as_object().unwrap()))
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
            (json!({"labels": [[1, 2], [3]]}), "tokenised"),
            (json!({"labels": [true, false]}), "labels of steps"),
            (json!({"input_ids": [1]}), "tokenised"),
            (json!({"loss_weight": 0.5}), "may say which part is learnt"),
            (json!({"sample_weight": 2}), "may say which part is learnt"),
            (json!({"weight": 72}), "may say which part is learnt"),
            (json!({"loss": 1.25}), "may say which part is learnt"),
            (json!({"mask": "x"}), "may say which part is learnt"),
            (json!({"mask": [0, 1]}), "says which part is learnt"),
            (json!({"prompt": "a", "masks": [{"start": 0}]}), "says which part is learnt"),
            (json!({"train_on_inputs": true}), "says which part is learnt"),
            (json!({"unmask": true}), "says which part is learnt"),
            (json!({"train": false}), "says which part is learnt"),
            (json!({"reasoning_content": "x"}), "reasoning"),
            (json!({"chat_template_kwargs": {"a": 1}}), "chat template"),
            (json!({"Complex_CoT": "x"}), "reasoning"),
            (json!({"r1_reasoning": "x"}), "reasoning"),
            (json!({"rationale": "x"}), "reasoning"),
            (json!({"thoughts": ["x"]}), "reasoning"),
            (json!({"enable_thinking": true}), "reasoning"),
            (json!({"chosen": "a", "rejected": "b", "chosen_rationale": "x"}), "reasoning"),
            (json!({"assistant_masks": [0, 1]}), "which part is learnt"),
            (json!({"is_train": false}), "which part is learnt"),
            (json!({"no_train": true}), "which part is learnt"),
            (json!({"trainable_turns": [1]}), "which part is learnt"),
            (json!({"image_url": "x"}), "only text"),
            (json!({"video_path": "x.mp4"}), "only text"),
            (json!({"input_images": ["x"]}), "only text"),
            (json!({"image_1": "x"}), "only text"),
            (json!({"image_ref": "x.JPG"}), "only text"),
            (json!({"thumbs_up": false}), "unpaired label"),
            (json!({"chosen": true}), "unpaired label"),
            (json!({"available_tools": [{"name": "f"}]}), "uses tools"),
            (json!({"function_descriptions": "[{}]"}), "uses tools"),
            (json!({"ref_chosen_logps": -3.5}), "log-probabilities"),
            (json!({"label": 1, "chosen": "a", "rejected": "b"}), "beside a chosen"),
            (json!({"label": 1, "chosen_messages": "a", "rejected_messages": "b"}), "beside a chosen"),
            (json!({"instructions": "Be kind."}), "\"system\""),
        ] {
            let error = refusal(&value).unwrap_err();
            assert!(error.contains(words), "{value}: {error}");
        }
    }

    #[test]
    fn what_only_bears_such_a_name_passes() {
        for value in [
            json!({"tools": "[]", "tool_choice": "auto", "function": "def f(): pass"}),
            json!({"tools": false}),
            json!({"tools": "None"}),
            json!({"training_source": "x", "train": "yes", "train_on_inputs": false, "unmask": false}),
            json!({"train": true, "weight": 1, "sample_weight": 1.0, "weighted_score": 3, "rating": -1}),
            json!({"prompt": "a", "my_train": [{"prompt": "a"}], "train": {"file": "x"}}),
            json!({"loss_demo": {"file": "x"}, "adgen_train": {"file": "x"}}),
            json!({"tokens": 12, "prompt_ids": "x-1"}),
            json!({"thinking": false, "reasoning": "off", "reasoning_tokens": 12, "is_reasoning_complete": [true, false]}),
            json!({"is_reasoning": true}),
            json!({"chosen": "a", "rejected": "b", "rationale": "the first is right"}),
            json!({"has_image": false, "num_images": 0, "video_title": "Cats", "video_id": "x", "image_caption": "a cat"}),
            json!({"add_generation_prompt": false, "completions": 4}),
        ] {
            refusal(&value).unwrap_or_else(|error| panic!("{value}: {error}"));
        }
    }
}
