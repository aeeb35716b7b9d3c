//! The fields of a record. Null and empty mean absent. Whoever reads a field takes it; what nobody has taken at the end is counted as
//! ignored.

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
        self.take_required(name).filter(|value| !is_absent(value))
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
    pub fn present<'n>(&self, names: impl IntoIterator<Item = &'n str>) -> Vec<&'n str> {
        names.into_iter().filter(|name| self.has(name)).collect()
    }

    /// The one of these names that is present. Two are an error: a record has one meaning.
    pub fn one_of<'n>(&self, names: impl IntoIterator<Item = &'n str>) -> Result<Option<&'n str>, Reason> {
        match self.present(names)[..] {
            [] => Ok(None),
            [name] => Ok(Some(name)),
            [first, second, ..] => Err(format!("has both {first:?} and {second:?}; keep the one that is meant")),
        }
    }

    /// The fields that say something.
    pub fn said(&self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        self.map.iter().filter(|(_, value)| !is_absent(value)).map(|(name, value)| (name.as_str(), value))
    }

    /// Whether a field is there and says nothing.
    pub fn is_empty(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(is_absent)
    }

    /// All names that say something, for a message.
    pub fn names(&self) -> String {
        let names: Vec<String> = self.said().map(|(name, _)| shown(name)).take(8).collect();
        if names.is_empty() { "no field that says anything".into() } else { format!("the fields {}", names.join(", ")) }
    }

    pub fn map(&self) -> &'a Map<String, Value> {
        self.map
    }

    /// The fields that nobody has taken and that say something.
    pub fn ignored(&self) -> Vec<String> {
        let taken = self.taken.borrow();
        let left = self.said().filter(|(name, _)| !taken.contains(name));
        left.map(|(name, _)| name.to_owned()).chain(self.inner.borrow().iter().cloned()).collect()
    }

    /// Counts what nobody has taken of an object inside of this one as ignored here.
    pub fn ignore_rest_of(&self, name: &str, inner: &Fields<'_>) {
        self.inner.borrow_mut().extend(inner.ignored().into_iter().map(|field| format!("{name}.{field}")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn null_and_empty_are_absent_and_what_is_left_is_named() {
        let value = json!({"tools": null, "label": [], "a": "x", "score": 3, "source": "", "meta": {}});
        let fields = Fields::new(value.as_object().unwrap());
        assert_eq!(fields.take_text("a").unwrap(), Some("x"));
        assert!(fields.take("tools").is_none() && !fields.has("source") && fields.is_empty("source"));
        assert_eq!(fields.ignored(), ["score"]);
        assert!(fields.take_text("score").unwrap_err().contains("a number"));
    }
}
