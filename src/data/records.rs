//! One line of a dataset: the JSON shapes of TRL and OpenAI, read into typed records. Whatever would change a record's meaning
//! and is not supported is refused by name.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::request::ChatMessage;
use crate::store::DatasetKind;
use crate::text::{Conversation, Text};

/// Fields that change what a record means; ignoring them would train something else.
const UNSUPPORTED_FIELDS: [&str; 6] = ["tools", "functions", "images", "videos", "text", "label"];
/// The same within a message.
const UNSUPPORTED_MESSAGE_FIELDS: [&str; 5] = ["tool_calls", "function_call", "tool_call_id", "refusal", "audio"];

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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Record {
    Chat(Chat),
    Preference(Preference),
}

/// A conversation that ends with an assistant's turn; `learn[i]` says whether message i is in the loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Chat {
    pub messages: Vec<ChatMessage>,
    pub learn: Vec<bool>,
}

/// A prompt and two answers to it, each of which ends with an assistant's turn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Preference {
    pub prompt: Vec<ChatMessage>,
    pub chosen: Vec<ChatMessage>,
    pub rejected: Vec<ChatMessage>,
}

/// A preference as ids; the loss covers the assistant's turns of the answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    pub chosen: Conversation,
    pub rejected: Conversation,
}

/// Many records of one kind as ids.
#[derive(Debug, Clone, PartialEq)]
pub enum Examples {
    Sft(Vec<Conversation>),
    Dpo(Vec<Pair>),
}

impl Record {
    /// Reads one line. The error's field is `line`, for the caller to say which.
    pub fn parse(kind: DatasetKind, line: &[u8]) -> Result<Self> {
        let value: Value = serde_json::from_slice(line).map_err(|e| bad(format!("not JSON: {e}")))?;
        let Value::Object(fields) = value else { return Err(bad("must be a JSON object, one a line")) };
        refuse_unsupported(&fields)?;
        match kind {
            DatasetKind::Sft => chat(&fields).map(Self::Chat),
            DatasetKind::Preferences => preference(&fields).map(Self::Preference),
        }
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

    /// The line that [`Record::parse`] reads back as this record.
    pub fn to_line(&self) -> String {
        match self {
            Self::Chat(chat) => {
                let weighted = chat.messages.iter().zip(&chat.learn).map(|(message, learn)| {
                    if message.role == "assistant" {
                        json!({"role": message.role, "content": message.content, "weight": u8::from(*learn)})
                    } else {
                        json!(message)
                    }
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

impl Examples {
    pub fn len(&self) -> usize {
        match self {
            Self::Sft(examples) => examples.len(),
            Self::Dpo(pairs) => pairs.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn refuse_unsupported(fields: &Map<String, Value>) -> Result<()> {
    match UNSUPPORTED_FIELDS.iter().find(|name| fields.contains_key(**name)) {
        Some(name) => Err(bad(format!("{name:?} is not supported; remove it if the record means the same without it"))),
        None => Ok(()),
    }
}

/// No template can ask for an answer to nothing.
fn check_beginning(messages: &[ChatMessage]) -> Result<()> {
    match messages.first() {
        Some(first) if first.role == "assistant" => Err(bad("the first message must not be the assistant's")),
        Some(_) => Ok(()),
        None => Err(bad("the prompt must have at least one message")),
    }
}

fn bad(message: impl Into<String>) -> Error {
    Error::invalid_because("INVALID_RECORD", "line", message)
}

/// `{"messages"}`, or `{"prompt", "completion"}` where only the completion is learnt.
fn chat(fields: &Map<String, Value>) -> Result<Chat> {
    let (messages, learn) = match (fields.get("messages"), fields.get("prompt"), fields.get("completion")) {
        (Some(value), None, None) => weighted_messages("messages", value)?,
        (None, Some(prompt), Some(completion)) => {
            let mut messages = prompt_messages("prompt", prompt)?;
            let mut learn = vec![false; messages.len()];
            let (answer, answer_learn) = answer_messages("completion", completion)?;
            messages.extend(answer);
            learn.extend(answer_learn);
            (messages, learn)
        }
        _ => return Err(bad("must have either \"messages\", or \"prompt\" and \"completion\"")),
    };
    if messages.last().is_none_or(|last| last.role != "assistant") {
        return Err(bad("the last message must be the assistant's"));
    }
    check_beginning(&messages)?;
    if !learn.contains(&true) {
        return Err(bad("no assistant message has a weight of 1, so there is nothing to learn"));
    }
    Ok(Chat { messages, learn })
}

/// TRL's `{"prompt", "chosen", "rejected"}`, the same without a prompt (the answers' common beginning is it), or OpenAI's
/// `{"input": {"messages"}, "preferred_output", "non_preferred_output"}`.
fn preference(fields: &Map<String, Value>) -> Result<Preference> {
    let record = if let Some(input) = fields.get("input") {
        if let Some(name) = ["prompt", "chosen", "rejected"].iter().find(|name| fields.contains_key(**name)) {
            return Err(bad(format!("must have either \"input\" or {name:?}, not both")));
        }
        let input = input.as_object().ok_or_else(|| bad("\"input\" must be an object with \"messages\""))?;
        refuse_unsupported(input)?;
        let messages = input.get("messages").ok_or_else(|| bad("\"input\" must be an object with \"messages\""))?;
        Preference {
            prompt: prompt_messages("input.messages", messages)?,
            chosen: preferred("preferred_output", fields)?,
            rejected: preferred("non_preferred_output", fields)?,
        }
    } else {
        let (chosen, rejected) = (preferred("chosen", fields)?, preferred("rejected", fields)?);
        match fields.get("prompt") {
            Some(prompt) => Preference { prompt: prompt_messages("prompt", prompt)?, chosen, rejected },
            None => split_common_prompt(chosen, rejected),
        }
    };
    check_beginning(&record.prompt)?;
    for (field, answer) in [("chosen", &record.chosen), ("rejected", &record.rejected)] {
        if answer.last().is_none_or(|last| last.role != "assistant") {
            return Err(bad(format!("the {field} answer must end with the assistant's message")));
        }
    }
    if record.chosen == record.rejected {
        return Err(bad("the chosen and the rejected answer are the same"));
    }
    Ok(record)
}

/// One of the two answers; all of its assistant's turns are learnt.
fn preferred(field: &str, fields: &Map<String, Value>) -> Result<Vec<ChatMessage>> {
    let value = fields.get(field).ok_or_else(|| bad(format!("{field:?} is missing")))?;
    let (messages, learn) = answer_messages(field, value)?;
    match messages.iter().zip(learn).position(|(message, learn)| message.role == "assistant" && !learn) {
        Some(i) => Err(bad(format!("{field}[{i}].weight is not supported in a preference"))),
        None => Ok(messages),
    }
}

fn split_common_prompt(mut chosen: Vec<ChatMessage>, mut rejected: Vec<ChatMessage>) -> Preference {
    let common = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
    rejected.drain(..common);
    Preference { prompt: chosen.drain(..common).collect(), chosen, rejected }
}

/// A string is the user's message.
fn prompt_messages(field: &str, value: &Value) -> Result<Vec<ChatMessage>> {
    match value {
        Value::String(content) => Ok(vec![ChatMessage { role: "user".into(), content: content.clone() }]),
        _ => weighted_messages(field, value).map(|(messages, _)| messages),
    }
}

/// A string is the assistant's message.
fn answer_messages(field: &str, value: &Value) -> Result<(Vec<ChatMessage>, Vec<bool>)> {
    match value {
        Value::String(content) => {
            Ok((vec![ChatMessage { role: "assistant".into(), content: content.clone() }], vec![true]))
        }
        _ => weighted_messages(field, value),
    }
}

/// A list of messages and which of them are learnt: the assistant's, unless their weight is 0.
fn weighted_messages(field: &str, value: &Value) -> Result<(Vec<ChatMessage>, Vec<bool>)> {
    let list = value.as_array().ok_or_else(|| bad(format!("{field:?} must be a list of messages")))?;
    let read = |(i, value): (usize, &Value)| weighted_message(&format!("{field}[{i}]"), value);
    list.iter().enumerate().map(read).collect::<Result<Vec<_>>>().map(|pairs| pairs.into_iter().unzip())
}

fn weighted_message(path: &str, value: &Value) -> Result<(ChatMessage, bool)> {
    let fields = value.as_object().ok_or_else(|| bad(format!("{path} must be an object with role and content")))?;
    if let Some(name) = UNSUPPORTED_MESSAGE_FIELDS.iter().find(|name| fields.get(**name).is_some_and(|v| !v.is_null()))
    {
        return Err(bad(format!("{path}.{name} is not supported")));
    }
    let string = |name: &str| {
        let value = fields.get(name).and_then(Value::as_str);
        value.map(str::to_owned).ok_or_else(|| bad(format!("{path}.{name} must be a string")))
    };
    let (role, content) = (string("role")?, string("content")?);
    if !matches!(role.as_str(), "system" | "user" | "assistant") {
        let shown: String = role.chars().take(40).collect();
        return Err(bad(format!("{path}.role is {shown:?}; it must be system, user or assistant")));
    }
    let is_assistant = role == "assistant";
    let learn = match fields.get("weight").filter(|weight| !weight.is_null()).map(Value::as_f64) {
        None => is_assistant,
        Some(Some(1.0)) if is_assistant => true,
        Some(Some(0.0)) if is_assistant => false,
        Some(_) => return Err(bad(format!("{path}.weight must be 0 or 1, and only an assistant's message has one"))),
    };
    Ok((ChatMessage { role, content }, learn))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, content: &str) -> ChatMessage {
        ChatMessage { role: role.into(), content: content.into() }
    }

    fn sft(line: &str) -> Result<Chat> {
        match Record::parse(DatasetKind::Sft, line.as_bytes())? {
            Record::Chat(chat) => Ok(chat),
            Record::Preference(_) => unreachable!(),
        }
    }

    fn dpo(line: &str) -> Result<Preference> {
        match Record::parse(DatasetKind::Preferences, line.as_bytes())? {
            Record::Preference(preference) => Ok(preference),
            Record::Chat(_) => unreachable!(),
        }
    }

    #[test]
    fn chats_learn_every_assistant_turn_unless_its_weight_is_zero() {
        let line = r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"a"},
            {"role":"assistant","content":"b","weight":0},{"role":"user","content":"c"},{"role":"assistant","content":"d"}]}"#;
        let chat = sft(line).unwrap();
        assert_eq!(chat.learn, [false, false, false, false, true]);
        assert_eq!(chat.messages[4], message("assistant", "d"));
        let both = sft(&line.replace(r#","weight":0"#, "")).unwrap();
        assert_eq!(both.learn, [false, false, true, false, true]);
    }

    #[test]
    fn prompts_with_completions_learn_the_completion_alone() {
        let expected =
            Chat { messages: vec![message("user", "p"), message("assistant", "c")], learn: vec![false, true] };
        assert_eq!(sft(r#"{"prompt":"p","completion":"c","id":7}"#).unwrap(), expected);
        let lists = r#"{"prompt":[{"role":"user","content":"p"}],"completion":[{"role":"assistant","content":"c"}]}"#;
        assert_eq!(sft(lists).unwrap(), expected);
        let earlier = r#"{"prompt":[{"role":"user","content":"p"},{"role":"assistant","content":"x"},
            {"role":"user","content":"q"}],"completion":"c"}"#;
        assert_eq!(sft(earlier).unwrap().learn, [false, false, false, true]);
    }

    #[test]
    fn preferences_have_one_meaning_in_every_shape() {
        let expected = Preference {
            prompt: vec![message("user", "p")],
            chosen: vec![message("assistant", "good")],
            rejected: vec![message("assistant", "bad")],
        };
        let (p, g, b) = (
            r#"{"role":"user","content":"p"}"#,
            r#"{"role":"assistant","content":"good"}"#,
            r#"{"role":"assistant","content":"bad"}"#,
        );
        for line in [
            r#"{"prompt":"p","chosen":"good","rejected":"bad"}"#.to_owned(),
            format!(r#"{{"prompt":[{p}],"chosen":[{g}],"rejected":[{b}]}}"#),
            format!(r#"{{"chosen":[{p},{g}],"rejected":[{p},{b}]}}"#),
            format!(r#"{{"input":{{"messages":[{p}]}},"preferred_output":[{g}],"non_preferred_output":[{b}]}}"#),
        ] {
            assert_eq!(dpo(&line).unwrap(), expected, "{line}");
        }
    }

    #[test]
    fn lines_read_back_what_records_write() {
        let chat = sft(r#"{"messages":[{"role":"user","content":"\"\n"},{"role":"assistant","content":"x","weight":0},
            {"role":"assistant","content":"é"}]}"#)
        .unwrap();
        assert_eq!(sft(&Record::Chat(chat.clone()).to_line()).unwrap(), chat);
        let pair = dpo(r#"{"prompt":"p","chosen":"good","rejected":"bad"}"#).unwrap();
        assert_eq!(dpo(&Record::Preference(pair.clone()).to_line()).unwrap(), pair);
    }

    #[test]
    fn refusals_say_why() {
        let user = r#"{"messages":[{"role":"user","content":"a"}]}"#;
        for (line, words) in [
            ("{", "not JSON"),
            ("[1]", "JSON object"),
            ("{}", "\"prompt\" and \"completion\""),
            (r#"{"text":"a"}"#, "\"text\" is not supported"),
            (r#"{"messages":"a"}"#, "list of messages"),
            (r#"{"messages":[]}"#, "last message must be the assistant's"),
            (user, "last message must be the assistant's"),
            (r#"{"messages":[{"role":"tool","content":"a"}]}"#, "messages[0].role"),
            (r#"{"messages":[{"role":"assistant","content":null}]}"#, "messages[0].content"),
            (r#"{"messages":[{"role":"assistant","content":"a","weight":0.5}]}"#, "messages[0].weight"),
            (r#"{"messages":[{"role":"user","content":"a","weight":1}]}"#, "messages[0].weight"),
            (
                r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a","weight":0}]}"#,
                "nothing to learn",
            ),
            (r#"{"messages":[{"role":"assistant","content":"","tool_calls":[]}]}"#, "tool_calls"),
            (r#"{"prompt":"a","completion":"b","messages":[]}"#, "either"),
            (r#"{"prompt":1,"completion":"b"}"#, "\"prompt\" must be a list of messages"),
            (r#"{"prompt":[],"completion":"b"}"#, "first message must not be"),
            (r#"{"messages":[{"role":"assistant","content":"a"}]}"#, "first message must not be"),
        ] {
            let error = sft(line).unwrap_err().to_string();
            assert!(error.contains(words), "{line}: {error}");
        }
        for (line, words) in [
            (r#"{"prompt":"p","chosen":"a"}"#, "\"rejected\" is missing"),
            (r#"{"prompt":"p","chosen":"a","rejected":"a"}"#, "the same"),
            (r#"{"chosen":"a","rejected":"b"}"#, "at least one message"),
            (r#"{"prompt":"p","chosen":[],"rejected":"b"}"#, "chosen answer must end"),
            (r#"{"input":{},"preferred_output":[],"non_preferred_output":[]}"#, "\"messages\""),
            (r#"{"input":{"messages":[],"tools":[]},"preferred_output":[],"non_preferred_output":[]}"#, "\"tools\""),
            (r#"{"input":{},"chosen":"a","rejected":"b"}"#, "not both"),
            (r#"{"prompt":[{"role":"assistant","content":"x"}],"chosen":"a","rejected":"b"}"#, "first message"),
            (
                r#"{"prompt":"p","chosen":[{"role":"assistant","content":"a","weight":0}],"rejected":"b"}"#,
                "chosen[0].weight",
            ),
        ] {
            let error = dpo(line).unwrap_err().to_string();
            assert!(error.contains(words), "{line}: {error}");
        }
    }
}
