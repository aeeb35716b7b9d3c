//! Values as text: Python's `str` and `repr`, and `json.dumps`. What comes from a message stays known as such.

use std::sync::Arc;

use super::value::{FOREIGN, Meter, SequenceKind, Value};
use super::{Outcome, error};

fn push(out: &mut Vec<u32>, text: &str) {
    out.extend(text.chars().map(u32::from));
}

/// A float as Python prints it: the shortest that is read back, with an exponent where it is long.
pub(super) fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{value:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    let power: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&power) {
        return format!("{digits}e{}{:02}", if power < 0 { '-' } else { '+' }, power.abs());
    }
    let plain = format!("{value}");
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// Python's `str`.
pub(super) fn string(meter: &Arc<Meter>, value: &Value) -> Outcome<Value> {
    match value {
        Value::Text(_) => Ok(value.clone()),
        _ => {
            let mut out = Vec::new();
            write(meter, value, &mut out)?;
            meter.text(out)
        }
    }
}

/// Writes a value as Python's `str` does.
pub(super) fn write(meter: &Arc<Meter>, value: &Value, out: &mut Vec<u32>) -> Outcome<()> {
    match value {
        Value::Text(text) => {
            meter.more_text(out.len(), text.chars().len())?;
            out.extend_from_slice(text.chars());
            Ok(())
        }
        Value::Undefined(_) => Ok(()),
        other => repr(meter, other, out),
    }
}

/// `repr` as a text of the template's own, for errors.
pub(super) fn repr_text(meter: &Arc<Meter>, value: &Value) -> Outcome<String> {
    let mut out = Vec::new();
    repr(meter, value, &mut out)?;
    Ok(out.iter().map(|ch| super::plain(*ch)).collect())
}

/// Writes a value as Python's `repr` does.
pub(super) fn repr(meter: &Arc<Meter>, value: &Value, out: &mut Vec<u32>) -> Outcome<()> {
    meter.step(1)?;
    meter.room(out.len() * 4)?;
    match value {
        Value::Undefined(_) => push(out, "Undefined"),
        Value::None => push(out, "None"),
        Value::Bool(value) => push(out, if *value { "True" } else { "False" }),
        Value::Int(value) => push(out, &value.to_string()),
        Value::Float(value) => push(out, &float(*value)),
        Value::Text(text) => {
            meter.more_text(out.len(), text.chars().len())?;
            quoted(text.chars(), out);
        }
        Value::Sequence(sequence) => match sequence.kind {
            SequenceKind::List => listed(meter, &sequence.items, ("[", "]"), out)?,
            SequenceKind::Tuple if sequence.items.len() == 1 => listed(meter, &sequence.items, ("(", ",)"), out)?,
            SequenceKind::Tuple => listed(meter, &sequence.items, ("(", ")"), out)?,
            SequenceKind::Generator => push(out, "<generator object>"),
            SequenceKind::View(name) => {
                push(out, name);
                listed(meter, &sequence.items, ("([", "])"), out)?;
            }
            SequenceKind::Range(from, to, 1) => push(out, &format!("range({from}, {to})")),
            SequenceKind::Range(from, to, by) => push(out, &format!("range({from}, {to}, {by})")),
        },
        Value::Dict(dict) => {
            push(out, "{");
            for (i, (key, value)) in dict.entries.iter().enumerate() {
                push(out, if i > 0 { ", " } else { "" });
                repr(meter, key, out)?;
                push(out, ": ");
                repr(meter, value, out)?;
            }
            push(out, "}");
        }
        Value::Namespace(entries) => {
            push(out, "<Namespace {");
            for (i, (key, value)) in entries.borrow().iter().enumerate() {
                push(out, &format!("{}'{key}': ", if i > 0 { ", " } else { "" }));
                repr(meter, value, out)?;
            }
            push(out, "}>");
        }
        Value::Macro(own) => push(out, &format!("<Macro '{}'>", own.name)),
        other => push(out, &format!("<{} object>", other.type_name())),
    }
    Ok(())
}

fn listed(meter: &Arc<Meter>, items: &[Value], (open, close): (&str, &str), out: &mut Vec<u32>) -> Outcome<()> {
    push(out, open);
    for (i, item) in items.iter().enumerate() {
        push(out, if i > 0 { ", " } else { "" });
        repr(meter, item, out)?;
    }
    push(out, close);
    Ok(())
}

/// Whether Python shows a character as it is.
fn printable(ch: char) -> bool {
    let hidden = matches!(ch, '\u{AD}' | '\u{600}'..='\u{605}' | '\u{61C}' | '\u{6DD}' | '\u{70F}' | '\u{180E}' | '\u{200B}'..='\u{200F}'
        | '\u{2028}'..='\u{202E}' | '\u{2060}'..='\u{206F}' | '\u{E000}'..='\u{F8FF}' | '\u{FEFF}' | '\u{FDD0}'..='\u{FDEF}'
        | '\u{FFF0}'..='\u{FFFB}' | '\u{FFFE}'..='\u{FFFF}' | '\u{E0000}'..='\u{E007F}' | '\u{F0000}'..='\u{10FFFF}');
    ch == ' ' || !(ch.is_control() || ch.is_whitespace() || hidden)
}

fn quoted(chars: &[u32], out: &mut Vec<u32>) {
    let has = |quote: char| chars.iter().any(|ch| super::plain(*ch) == quote);
    let quote = if has('\'') && !has('"') { '"' } else { '\'' };
    out.push(quote.into());
    for &code in chars {
        let escaped = match super::plain(code) {
            '\n' => "\\n".into(),
            '\r' => "\\r".into(),
            '\t' => "\\t".into(),
            '\\' => "\\\\".into(),
            ch if ch == quote => format!("\\{ch}"),
            ch if printable(ch) => {
                out.push(code);
                continue;
            }
            ch if u32::from(ch) < 0x100 => format!("\\x{:02x}", u32::from(ch)),
            ch if u32::from(ch) < 0x10000 => format!("\\u{:04x}", u32::from(ch)),
            ch => format!("\\U{:08x}", u32::from(ch)),
        };
        out.extend(escaped.chars().map(|ch| u32::from(ch) | (code & FOREIGN)));
    }
    out.push(quote.into());
}

/// How `json.dumps` writes.
#[derive(Debug, Clone)]
pub(super) struct Json {
    pub ascii: bool,
    /// What a level is indented by.
    pub indent: Option<String>,
    pub item_separator: String,
    pub key_separator: String,
    pub sort_keys: bool,
}

impl Json {
    pub fn write(&self, meter: &Arc<Meter>, value: &Value, level: usize, out: &mut Vec<u32>) -> Outcome<()> {
        meter.step(1)?;
        meter.room(out.len() * 4)?;
        match value {
            Value::None => push(out, "null"),
            Value::Bool(value) => push(out, if *value { "true" } else { "false" }),
            Value::Int(value) => push(out, &value.to_string()),
            Value::Float(value) => push(out, &json_float(*value)),
            Value::Text(text) => {
                meter.more_text(out.len(), text.chars().len())?;
                self.text(text.chars(), out);
            }
            Value::Sequence(sequence) if matches!(sequence.kind, SequenceKind::List | SequenceKind::Tuple) => {
                let mut items = sequence.items.iter();
                self.group(
                    meter,
                    ("[", "]"),
                    level,
                    out,
                    |out| match items.next() {
                        Some(item) => Ok(Some(self.write(meter, item, level + 1, out)?)),
                        None => Ok(None),
                    },
                    sequence.items.len(),
                )?;
            }
            Value::Dict(dict) => self.dict(meter, &dict.entries, level, out)?,
            other => return error(format!("Object of type {} is not JSON serializable", other.type_name())),
        }
        Ok(())
    }

    fn dict(&self, meter: &Arc<Meter>, entries: &[(Value, Value)], level: usize, out: &mut Vec<u32>) -> Outcome<()> {
        let mut entries: Vec<&(Value, Value)> = entries.iter().collect();
        if self.sort_keys {
            entries = super::ops::sort(entries, |(a, _), (b, _)| super::ops::order(a, b, "<"))?;
        }
        let count = entries.len();
        let mut entries = entries.into_iter();
        self.group(
            meter,
            ("{", "}"),
            level,
            out,
            |out| {
                let Some((key, value)) = entries.next() else { return Ok(None) };
                match key {
                    Value::Text(text) => self.text(text.chars(), out),
                    Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) => {
                        push(out, "\"");
                        self.write(meter, key, 0, out)?;
                        push(out, "\"");
                    }
                    other => {
                        return error(format!("keys must be str, int, float, bool or None, not {}", other.type_name()));
                    }
                }
                push(out, &self.key_separator);
                Ok(Some(self.write(meter, value, level + 1, out)?))
            },
            count,
        )
    }

    fn group(
        &self,
        meter: &Arc<Meter>,
        (open, close): (&str, &str),
        level: usize,
        out: &mut Vec<u32>,
        mut next: impl FnMut(&mut Vec<u32>) -> Outcome<Option<()>>,
        count: usize,
    ) -> Outcome<()> {
        push(out, open);
        for i in 0..count {
            push(out, if i > 0 { &self.item_separator } else { "" });
            self.line(meter, level + 1, out)?;
            next(out)?;
        }
        if count > 0 {
            self.line(meter, level, out)?;
        }
        push(out, close);
        Ok(())
    }

    fn line(&self, meter: &Arc<Meter>, level: usize, out: &mut Vec<u32>) -> Outcome<()> {
        if let Some(indent) = &self.indent {
            meter.more_text(out.len(), indent.len() * level)?;
            push(out, "\n");
            push(out, &indent.repeat(level));
        }
        Ok(())
    }

    fn text(&self, chars: &[u32], out: &mut Vec<u32>) {
        push(out, "\"");
        for &code in chars {
            let ch = super::plain(code);
            let escaped = match ch {
                '"' => "\\\"".to_owned(),
                '\\' => "\\\\".into(),
                '\n' => "\\n".into(),
                '\r' => "\\r".into(),
                '\t' => "\\t".into(),
                '\u{8}' => "\\b".into(),
                '\u{C}' => "\\f".into(),
                ch if u32::from(ch) < 0x20 => format!("\\u{:04x}", u32::from(ch)),
                ch if self.ascii && u32::from(ch) > 0x7E => {
                    ch.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect()
                }
                _ => {
                    out.push(code);
                    continue;
                }
            };
            out.extend(escaped.chars().map(|ch| u32::from(ch) | (code & FOREIGN)));
        }
        push(out, "\"");
    }
}

fn json_float(value: f64) -> String {
    match value {
        _ if value.is_nan() => "NaN".into(),
        f64::INFINITY => "Infinity".into(),
        f64::NEG_INFINITY => "-Infinity".into(),
        _ => float(value),
    }
}
