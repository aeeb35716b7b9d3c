//! `config.json` as the architectures read it.

use serde_json::{Map, Value};

use crate::arch::settings::{self as keys, Key, Pattern, Settings};
use crate::arch::{Architecture, unsupported};
use crate::error::{Error, Result};
use crate::kernels::spec::Activation;

/// A configuration, with what it says of the rotation in one place.
pub(in crate::weights) struct HfConfig {
    values: Map<String, Value>,
    /// Of the rotation: `rope_parameters`, or `rope_scaling` with what stands beside it.
    rope: Map<String, Value>,
    pub(in crate::weights) architecture: &'static Architecture,
}

/// What stands beside `rope_scaling` where it does not stand in it.
const ROPE_KEYS: [&str; 3] = ["rope_theta", "partial_rotary_factor", "original_max_position_embeddings"];

impl HfConfig {
    /// Reads a configuration; of a model with several parts the text's.
    pub(in crate::weights) fn read(json: &[u8]) -> Result<Self> {
        let mut values = object("config.json", json)?;
        if let Some(Value::Object(text)) = values.remove("text_config") {
            values = text;
        }
        let model_type = values.get("model_type").and_then(Value::as_str);
        let model_type = model_type.ok_or_else(|| unsupported("model_type", "is missing from config.json"))?;
        let architecture = Architecture::of_model_type(model_type)?;
        if values.get("quantization_config").is_some_and(|value| !value.is_null()) {
            let message = "says that the weights are quantised by another tool; give the folder with bf16, f16 or f32, or a GGUF file";
            return Err(unsupported("quantization_config", message));
        }
        let mut config = Self { rope: Map::new(), values, architecture };
        config.find_rope();
        Ok(config)
    }

    fn find_rope(&mut self) {
        let given = |key: &str| self.values.get(key).and_then(Value::as_object).cloned();
        let mut rope = given("rope_parameters").or_else(|| given("rope_scaling")).unwrap_or_default();
        // One for each kind of block.
        if let Some(windowed) = rope.get("sliding_attention").and_then(|of| of.get("rope_theta")).cloned() {
            self.values.insert(keys::ROPE_BASE_WINDOWED.hf.to_owned(), windowed);
        }
        if let Some(Value::Object(full)) = rope.remove("full_attention") {
            rope = full;
        }
        for key in ROPE_KEYS {
            if let Some(value) = self.values.get(key).filter(|_| rope.get(key).is_none_or(Value::is_null)) {
                rope.insert(key.to_owned(), value.clone());
            }
        }
        self.rope = rope;
    }

    /// What the configuration has under a key of [`Key::hf`]'s form; null is nothing.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        let found = match key.strip_prefix("rope.") {
            Some(key) => self.rope.get(key),
            None => self.values.get(key),
        };
        found.filter(|value| !value.is_null())
    }

    /// A number; `None` where there is none.
    pub(super) fn float(&self, key: &str) -> Result<Option<f64>> {
        let read = |value: &Value| value.as_f64().filter(|number| (*number as f32).is_finite());
        self.get(key).map(|value| read(value).ok_or_else(|| wrong(key, value, "a number"))).transpose()
    }

    /// A text; `None` where there is none.
    pub(super) fn word(&self, key: &str) -> Result<Option<&str>> {
        self.get(key).map(|value| value.as_str().ok_or_else(|| wrong(key, value, "a text"))).transpose()
    }

    /// Yes or no; `None` where the configuration does not say.
    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(key).map(|value| value.as_bool().ok_or_else(|| wrong(key, value, "true or false"))).transpose()
    }

    /// Numbers; `None` where there are none.
    pub(super) fn floats(&self, key: &str) -> Result<Option<Vec<f32>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = |value: &Value| value.as_f64().map(|number| number as f32).filter(|number| number.is_finite());
        let numbers = value.as_array().and_then(|list| list.iter().map(number).collect());
        numbers.map(Some).ok_or_else(|| wrong(key, value, "a list of numbers"))
    }

    /// Refuses what would compute something else than is served.
    pub(super) fn check(&self, activation: Activation) -> Result<()> {
        let known: &[&str] = match activation {
            Activation::Silu => &["silu", "swish"],
            Activation::GeluTanh => &["gelu_pytorch_tanh", "gelu_new"],
        };
        let key = if self.get("hidden_activation").is_some() { "hidden_activation" } else { "hidden_act" };
        if let Some(other) = self.word(key)?.filter(|word| !known.contains(word)) {
            return Err(unsupported(key, format!("is {other:?}; this architecture is served with {}", known[0])));
        }
        if self.flag("use_bidirectional_attention")? == Some(true) {
            return Err(unsupported("use_bidirectional_attention", "is true; causal attention is served"));
        }
        Ok(())
    }

    /// A whole number over 0.
    pub(super) fn count_of(&self, key: &'static str) -> Result<usize> {
        (self as &dyn Settings).count(Key { gguf: "", hf: key })
    }

    fn has_windows(&self) -> Result<bool> {
        Ok(self.flag("use_sliding_window")? != Some(false))
    }

    fn count(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let count = value.as_u64().and_then(|count| usize::try_from(count).ok()).filter(|count| *count < 1 << 31);
        count.map(Some).ok_or_else(|| wrong(key, value, "a whole number from 0 to 2^31 - 1"))
    }

    /// Values of a head that turn.
    fn turned(&self) -> Result<Option<usize>> {
        let Some(part) = self.float(keys::ROPE_DIMS.hf)? else { return Ok(None) };
        let head_dim = match self.count(keys::HEAD_DIM.hf)? {
            Some(head_dim) => head_dim,
            None => self.count_of(keys::HIDDEN_SIZE.hf)? / self.count_of(keys::NUM_HEADS.hf)?,
        };
        Ok(Some((head_dim as f64 * part) as usize))
    }
}

/// An object of JSON.
pub(super) fn object(file: &str, json: &[u8]) -> Result<Map<String, Value>> {
    let unreadable = |why: String| {
        Error::invalid_because("BASE_UNREADABLE", file, format!("{why}: the file is damaged; fetch it again"))
    };
    match serde_json::from_slice(json).map_err(|e| unreadable(format!("is no JSON ({e})")))? {
        Value::Object(object) => Ok(object),
        _ => Err(unreadable("holds no object".to_owned())),
    }
}

fn wrong(key: &str, value: &Value, wanted: &str) -> Error {
    let shown: String = value.to_string().chars().take(80).collect();
    unsupported(key.replace("rope.", "rope_parameters."), format!("is {shown} in config.json; must be {wanted}"))
}

/// Which blocks have a window, by the names of their kinds.
fn windowed(key: &str, kinds: &[Value]) -> Result<Vec<bool>> {
    let windowed = |kind: &Value| match kind.as_str() {
        Some("sliding_attention") => Ok(true),
        Some("full_attention") => Ok(false),
        _ => Err(wrong(key, kind, "full_attention or sliding_attention in each place")),
    };
    kinds.iter().map(windowed).collect()
}

impl Settings for HfConfig {
    fn name(&self, key: Key) -> String {
        key.hf.replace("rope.", "rope_parameters.")
    }

    fn integer(&self, key: Key) -> Result<Option<usize>> {
        match key {
            keys::ROPE_DIMS => self.turned(),
            keys::SLIDING_WINDOW if !self.has_windows()? => Ok(None),
            key => self.count(key.hf),
        }
    }

    fn number(&self, key: Key) -> Result<Option<f32>> {
        Ok(self.float(key.hf)?.map(|number| number as f32))
    }

    fn pattern(&self, key: Key) -> Result<Option<Pattern>> {
        if let Some(value) = self.get(key.hf) {
            let list = value.as_array().ok_or_else(|| wrong(key.hf, value, "a list with an entry for each block"))?;
            let flag = |value: &Value| value.as_bool().or_else(|| value.as_u64().map(|number| number != 0));
            let flags = match key {
                keys::SLIDING_WINDOW_PATTERN => windowed(key.hf, list)?,
                _ => list
                    .iter()
                    .map(flag)
                    .collect::<Option<_>>()
                    .ok_or_else(|| wrong(key.hf, value, "a list of 0 and 1"))?,
            };
            return Ok(Some(Pattern::Each(flags)));
        }
        match key {
            keys::SLIDING_WINDOW_PATTERN => Ok(match self.count("sliding_window_pattern")? {
                Some(period) => Some(Pattern::Period(period)),
                None => self.count("max_window_layers")?.map(|full| {
                    // A bound on what a stranger says: there are never more blocks.
                    Pattern::Each((0..1024).map(|layer| layer >= full).collect())
                }),
            }),
            keys::TURNED_BLOCKS => Ok(self.count("no_rope_layer_interval")?.map(Pattern::Period)),
            _ => Ok(None),
        }
    }

    fn text(&self, key: Key) -> Result<Option<String>> {
        Ok(self.word(key.hf)?.map(str::to_owned))
    }
}
