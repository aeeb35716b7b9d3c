//! JSON as the standard has it, with the reasons where a text is something like it: errors say what stands there instead, and where.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// Why a text is not JSON, and the line of it (from 0) where that shows.
#[derive(Debug, Clone, PartialEq)]
pub struct SyntaxError {
    pub line: u64,
    pub message: String,
    /// The text is JSON as far as it goes.
    pub is_cut: bool,
}

/// Parses one value. A key that an object has twice is an error: one of the two would be lost.
pub fn parse(text: &[u8]) -> Result<Value, SyntaxError> {
    if let Err(e) = std::str::from_utf8(text) {
        let (line, message) = (newlines(&text[..e.valid_up_to()]), not_utf8(text, e.valid_up_to()));
        return Err(SyntaxError { line, message, is_cut: e.error_len().is_none() });
    }
    serde_json::from_slice::<Strict>(text).map(|strict| strict.0).map_err(|error| diagnose(text, &error))
}

fn newlines(text: &[u8]) -> u64 {
    text.iter().filter(|byte| **byte == b'\n').count() as u64
}

fn not_utf8(text: &[u8], at: usize) -> String {
    if text.contains(&0) {
        return "holds NUL bytes: this is binary data, not JSON".into();
    }
    let byte = text[at];
    format!(
        "is not UTF-8 (byte 0x{byte:02x} at column {}); if it is Latin-1: iconv -f LATIN1 -t UTF-8 IN > OUT",
        at + 1
    )
}

/// The command that rewrites what Python's `json` reads and JSON does not allow.
const PYTHON_JSON: &str = "python3 -c 'import json,sys; [print(json.dumps(json.loads(l, parse_constant=lambda c: None))) for l in sys.stdin if l.strip()]' < IN > OUT (it writes null; an array over several lines: json.load in place of the loop)";
/// The same for Python's own literals.
const PYTHON_LITERALS: &str = "python3 -c 'import ast,json,sys; [print(json.dumps(ast.literal_eval(l))) for l in sys.stdin if l.strip()]' < IN > OUT (a list over several lines: ast.literal_eval(sys.stdin.read()))";

/// Says what the text has in place of JSON.
fn diagnose(text: &[u8], error: &serde_json::Error) -> SyntaxError {
    let (line, column) = (error.line().saturating_sub(1), error.column());
    let start = text.split_inclusive(|byte| *byte == b'\n').take(line).map(<[u8]>::len).sum::<usize>();
    let at = (start + column).saturating_sub(1).min(text.len());
    let message = described(text, at, error).unwrap_or_else(|| {
        let full = error.to_string();
        let words = full.split(" at line ").next().unwrap_or_default();
        format!("is not JSON at column {column}: {words}")
    });
    SyntaxError { line: line as u64, message, is_cut: error.is_eof() }
}

fn described(text: &[u8], at: usize, error: &serde_json::Error) -> Option<String> {
    let words = error.to_string();
    if text.starts_with("\u{feff}".as_bytes()) {
        return Some(
            "begins with a byte order mark in the middle of the file, where files were joined; remove it".into(),
        );
    }
    if let Some(key) = words.strip_prefix(TWICE) {
        let key = key.rsplit_once(" at line ").map_or(key, |(key, _)| key);
        return Some(format!("has the key {key} twice; one of the two would be lost"));
    }
    if words.starts_with("recursion limit") {
        return Some("is nested more than 127 deep".into());
    }
    let column = at - text[..at].iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1) + 1;
    let before = text[..at].trim_ascii_end();
    let word: String = word_around(text, at);
    let bare = word.trim_start_matches(['-', '+']);
    Some(match text.get(at).copied() {
        _ if ["NaN", "nan", "Infinity", "Inf", "inf"].contains(&bare) => {
            format!("has {word} at column {column}, which JSON does not know; write null: {PYTHON_JSON}")
        }
        _ if ["None", "True", "False"].contains(&bare) => {
            format!("has Python's {word} at column {column}, not JSON; rewrite it: {PYTHON_LITERALS}")
        }
        Some(b'\'') => {
            format!("has single quotes (column {column}), which JSON does not know; rewrite it: {PYTHON_LITERALS}")
        }
        Some(b'}' | b']') if before.ends_with(b",") => {
            format!("has a comma before the closing bracket at column {column}; remove it")
        }
        _ if error.is_eof() => {
            "ends before its last bracket closes: the file was cut, or a bracket or a quote is missing".into()
        }
        Some(b'/' | b'#') => format!("has a comment at column {column}, which JSON does not know; remove it"),
        _ if words.starts_with("control character") => {
            format!(
                "has a line break or another control character inside of a string (column {column}); write it as \\n"
            )
        }
        Some(byte) if words.starts_with("key must be a string") && (byte.is_ascii_alphabetic() || byte == b'_') => {
            format!("has a key without quotes at column {column}: {word}; write \"{word}\"")
        }
        _ => return None,
    })
}

/// The letters and signs around a place.
fn word_around(text: &[u8], at: usize) -> String {
    let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'_');
    let start = text[..at].iter().rposition(|byte| !is_word(byte)).map_or(0, |before| before + 1);
    let word = text[start..].iter().copied().take_while(|byte| is_word(byte)).take(40);
    word.map(char::from).collect()
}

/// How the error about a repeated key begins.
const TWICE: &str = "repeated key ";

/// A value whose objects have each key once.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Self)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Strict(value)) = list.next_element()? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let Strict(value) = entries.next_value()?;
            if map.contains_key(&key) {
                let shown: String = key.chars().take(40).collect();
                return Err(A::Error::custom(format!("{TWICE}{shown:?}")));
            }
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_stands_in_place_of_json_is_named() {
        for (text, words) in [
            (r#"{"a": NaN}"#, "NaN at column 7"),
            (r#"{"a": [1, -Infinity]}"#, "-Infinity"),
            (r#"{"a": Infinity}"#, "Infinity"),
            (r#"{"a": None}"#, "Python's None"),
            (r#"{"a": True}"#, "Python's True"),
            (r#"{'a': 1}"#, "single quotes (column 2)"),
            (r#"{"a": 'x'}"#, "single quotes"),
            (r#"{"a": 1,}"#, "comma before the closing bracket"),
            (r#"{"a": [1,]}"#, "comma before the closing bracket"),
            (r#"{"a": "x"#, "ends before"),
            (r#"{"a": [1"#, "ends before"),
            ("{\"a\": \"x\ny\"}", "line break"),
            (r#"{a: 1}"#, "key without quotes at column 2: a"),
            (r#"{"a": 1 // x"#, "comment"),
            (r#"{"a": 1, "a": 2}"#, "the key \"a\" twice"),
            (r#"{"a": 1} x"#, "is not JSON at column 10"),
            (r#"{"a": "\ud800"}"#, "is not JSON"),
            ("\u{feff}{}", "byte order mark in the middle"),
        ] {
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(error.message.contains(words), "{text}: {error:?}");
            assert!(!error.message.contains("at line"), "{error:?}");
        }
        let latin = parse(b"{\"a\": \"caf\xe9\"}").unwrap_err();
        assert!(latin.message.contains("iconv -f LATIN1"), "{latin:?}");
        assert_eq!(parse(b"{\n\"a\": 1,\n\"b\": NaN}").unwrap_err().line, 2);
        let deep = "[".repeat(200) + &"]".repeat(200);
        assert!(parse(deep.as_bytes()).unwrap_err().message.contains("nested"));
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in prop::collection::vec(prop_oneof![any::<u8>(), prop::sample::select(b"{}[]\",:'NaI-\n \\".to_vec())], 0..60)) {
            let strict = parse(&text);
            let plain = serde_json::from_slice::<Value>(&text);
            if let Ok(value) = strict { prop_assert_eq!(plain.unwrap(), value); }
        }
    }
}
