//! What `adapter_config.json` says, whatever the kind. Every setting is one of four: it is read, it says nothing about the tensors, it has the
//! value that turns it off, or it is refused by name.

use serde_json::{Map, Value};

use crate::adapter::peft::tensors::check_no_pointer;
use crate::adapter::peft::{CONFIG_FILE, MAX_CONFIG_BYTES, refuse};
use crate::error::Result;

/// Settings that are about the training, or about where the adapter comes from.
const WITHOUT_MEANING: [&str; 8] = [
    "auto_mapping",
    "base_model_name_or_path",
    // Of a layer that stores its weight transposed; PEFT takes it for false at the base's layers.
    "fan_in_fan_out",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
];

/// The settings of a kind.
pub(super) struct Known {
    /// Those that are read.
    pub(super) read: &'static [&'static str],
    /// Those that say nothing about the tensors, beside what is so for all kinds.
    pub(super) without_meaning: &'static [&'static str],
    /// Those that change what the tensors mean, and what helps.
    pub(super) refused: &'static [(&'static str, &'static str)],
}

impl Known {
    /// Refuses what is neither known nor off.
    pub(super) fn check(&self, config: &Map<String, Value>) -> Result<()> {
        for (key, value) in config {
            let name = key.as_str();
            let known =
                self.read.contains(&name) || self.without_meaning.contains(&name) || WITHOUT_MEANING.contains(&name);
            if known || is_off(value) {
                continue;
            }
            let value: String = value.to_string().chars().take(100).collect();
            let unknown = "this setting is not known, and could change what the tensors mean: remove it from the config if it does not";
            let advice = self.refused.iter().find(|(name, _)| name == key).map_or(unknown, |(_, advice)| advice);
            return Err(refuse(
                "UNSUPPORTED_SETTING",
                key.chars().take(100).collect::<String>(),
                format!("is {value}; {advice}"),
            ));
        }
        Ok(())
    }
}

/// Reads the file.
pub(super) fn object(config: &[u8]) -> Result<Map<String, Value>> {
    check_no_pointer(CONFIG_FILE, config)?;
    if config.len() > MAX_CONFIG_BYTES {
        let message = format!("is over {MAX_CONFIG_BYTES} bytes; send the config that PEFT wrote beside the tensors");
        return Err(refuse("MALFORMED_CONFIG", CONFIG_FILE, message));
    }
    // Some editors begin a file with it.
    let config = config.strip_prefix(b"\xef\xbb\xbf").unwrap_or(config);
    serde_json::from_slice(config).map_err(|e| {
        let message = format!("is not a JSON object ({e}); send the config that PEFT wrote beside the tensors");
        refuse("MALFORMED_CONFIG", CONFIG_FILE, message)
    })
}

/// Gives what a setting says, `None` where it says nothing; a value of another type is refused, never taken for the default.
pub(super) fn setting<'v, T>(
    config: &'v Map<String, Value>,
    key: &str,
    want: &str,
    read: impl Fn(&'v Value) -> Option<T>,
) -> Result<Option<T>> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            let shown: String = value.to_string().chars().take(100).collect();
            read(value).map(Some).ok_or_else(|| refuse("INVALID_SETTING", key, format!("is {shown}; must be {want}")))
        }
    }
}

/// Whether a setting has the value that turns it off.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}
