//! What a GGUF file says of itself, as the architectures and the vocabulary read it.

use std::collections::BTreeMap;

use super::header::Value;
use crate::arch::settings::{Key, Pattern, Settings};
use crate::arch::{ARCHITECTURES, Architecture, unsupported};
use crate::error::Result;

/// A file's metadata, with its keys in the errors.
pub(super) struct Metadata<'a> {
    entries: &'a BTreeMap<String, Value>,
    /// What the file is.
    pub(super) architecture: &'static Architecture,
}

impl<'a> Metadata<'a> {
    /// Looks up which architecture the file is of.
    pub(super) fn new(entries: &'a BTreeMap<String, Value>) -> Result<Self> {
        let mut metadata = Self { entries, architecture: ARCHITECTURES[0] };
        metadata.architecture = Architecture::named(metadata.text("general.architecture")?)?;
        Ok(metadata)
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    fn get(&self, key: &str) -> Result<&Value> {
        self.entries.get(key).ok_or_else(|| unsupported(key, "is missing from the file's metadata"))
    }

    pub(super) fn integer(&self, key: &str) -> Result<usize> {
        let value = match self.get(key)? {
            Value::Integer(value) => usize::try_from(*value).ok(),
            _ => None,
        };
        value.filter(|v| *v < 1 << 31).ok_or_else(|| unsupported(key, "is not a sane number"))
    }

    /// What the file calls the model: its title, and what that is made of.
    pub(super) fn called(&self) -> Vec<String> {
        let text = |key: &str| self.text(&format!("general.{key}")).ok().map(str::to_owned);
        let parts = [text("basename"), text("size_label"), text("finetune")];
        let parts = parts.into_iter().flatten().collect::<Vec<_>>().join("-");
        text("name").into_iter().chain(Some(parts).filter(|parts| !parts.is_empty())).collect()
    }

    pub(super) fn text(&self, key: &str) -> Result<&str> {
        match self.get(key)? {
            Value::Text(text) => std::str::from_utf8(text).map_err(|_| unsupported(key, "is no UTF-8")),
            _ => Err(unsupported(key, "is not a text")),
        }
    }
}

impl Settings for Metadata<'_> {
    fn name(&self, key: Key) -> String {
        format!("{}.{}", self.architecture.name, key.gguf)
    }

    fn integer(&self, key: Key) -> Result<Option<usize>> {
        let name = self.name(key);
        self.has(&name).then(|| Metadata::integer(self, &name)).transpose()
    }

    fn number(&self, key: Key) -> Result<Option<f32>> {
        let name = self.name(key);
        match self.entries.get(&name) {
            None => Ok(None),
            Some(Value::Integer(value)) => Ok(Some(*value as f32)),
            Some(Value::Float(value)) if (*value as f32).is_finite() => Ok(Some(*value as f32)),
            Some(other) => Err(unsupported(name, format!("is {other:?}; must be a number"))),
        }
    }

    fn pattern(&self, key: Key) -> Result<Option<Pattern>> {
        let name = self.name(key);
        let Some(value) = self.entries.get(&name) else { return Ok(None) };
        match (value, value.flags()) {
            (Value::Integer(period), _) if *period >= 0 => Ok(Some(Pattern::Period(*period as usize))),
            (_, Some(flags)) => Ok(Some(Pattern::Each(flags))),
            _ => Err(unsupported(name, "is no number and no list of yes and no")),
        }
    }

    fn text(&self, key: Key) -> Result<Option<String>> {
        let name = self.name(key);
        self.has(&name).then(|| Metadata::text(self, &name).map(str::to_owned)).transpose()
    }
}
