//! Jinja's filters, and `tojson` as transformers has it.

use std::sync::Arc;

use super::ast::Arithmetic;
use super::eval::Interpreter;
use super::repr::Json;
use super::strings::{self, number};
use super::value::{Meter, SequenceKind, Str, Value, plain};
use super::{Outcome, checks, error, ops, repr};

/// The values of a call.
#[derive(Debug, Default)]
pub(super) struct Given {
    pub positional: Vec<Value>,
    pub named: Vec<(String, Value)>,
}

impl Given {
    /// The argument of a place or a name.
    pub fn argument(&self, at: usize, name: &str) -> Option<&Value> {
        self.positional.get(at).or_else(|| self.named.iter().find(|(own, _)| own == name).map(|(_, value)| value))
    }
}

/// The filters that there are.
pub(super) const NAMES: [&str; 45] = [
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "sum",
    "title",
    "tojson",
    "trim",
    "unique",
    "upper",
    "wordcount",
];

/// Applies a filter.
pub(super) fn apply<'t>(of: &mut Interpreter<'t>, name: &str, value: Value, given: &Given) -> Outcome<Value> {
    let meter = of.meter.clone();
    let meter = &meter;
    match name {
        "default" | "d" => {
            let when_false = given.argument(1, "boolean").is_some_and(Value::truth);
            let missing = matches!(value, Value::Undefined(_)) || (when_false && !value.truth());
            match (missing, given.argument(0, "default_value")) {
                (true, Some(default)) => Ok(default.clone()),
                (true, None) => meter.own(""),
                (false, _) => Ok(value),
            }
        }
        "tojson" => to_json(meter, &value, given),
        "map" => map(of, &value, given),
        "select" | "reject" | "selectattr" | "rejectattr" => select(meter, name, &value, given),
        "upper" | "lower" | "title" | "capitalize" | "trim" | "replace" | "center" | "string" | "safe" | "e"
        | "escape" | "forceescape" | "indent" | "wordcount" | "format" => of_text(meter, name, &value, given),
        "length" | "count" => Ok(Value::Int(ops::length(&value)? as i64)),
        "abs" | "int" | "float" | "round" => of_number(meter, name, &value, given),
        "list" => meter.list(ops::items(meter, &value)?),
        "join" => join(meter, &value, given),
        "attr" => {
            let attribute = needed(given, 0, "name", name)?;
            match &value {
                Value::Dict(_) => match attribute.is_text("items") {
                    true => ops::attribute(meter, &value, "items"),
                    false => Ok(Value::undefined("'dict object' has no such attribute")),
                },
                _ => ops::item(meter, &value, attribute),
            }
        }
        "items" => match &value {
            Value::Undefined(_) => meter.list(Vec::new()),
            Value::Dict(_) => ops::call_method(meter, &value, "items", given),
            _ => error("Can only get item pairs from a mapping."),
        },
        _ => of_sequence(meter, name, &value, given),
    }
}

fn needed<'g>(given: &'g Given, at: usize, name: &str, filter: &str) -> Outcome<&'g Value> {
    match given.argument(at, name) {
        Some(value) => Ok(value),
        None => error(format!("the filter '{filter}' needs {name}")),
    }
}

fn to_json(meter: &Arc<Meter>, value: &Value, given: &Given) -> Outcome<Value> {
    let flag = |at, name| given.argument(at, name).is_some_and(Value::truth);
    let indent = match given.argument(1, "indent") {
        None | Some(Value::None) => None,
        Some(Value::Text(text)) if text.chars().len() <= 100 => Some(text.to_text()),
        Some(value) => {
            match value.integer().and_then(|width| usize::try_from(width.max(0)).ok()).filter(|width| *width <= 100) {
                Some(width) => Some(" ".repeat(width)),
                None => return error("an indent is at most 100 characters"),
            }
        }
    };
    let separators = match given.argument(2, "separators") {
        None | Some(Value::None) => None,
        Some(pair) => match &ops::items(meter, pair)?[..] {
            [Value::Text(item), Value::Text(key)] => Some((item.to_text(), key.to_text())),
            _ => return error("separators are two texts"),
        },
    };
    let usual = || (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned());
    let (item_separator, key_separator) = separators.unwrap_or_else(usual);
    let json =
        Json { ascii: flag(0, "ensure_ascii"), indent, item_separator, key_separator, sort_keys: flag(3, "sort_keys") };
    let mut out = Vec::new();
    json.write(meter, value, 0, &mut out)?;
    meter.text(out)
}

fn text_of(meter: &Arc<Meter>, value: &Value) -> Outcome<Str> {
    match repr::string(meter, value)? {
        Value::Text(text) => Ok(text),
        _ => Ok(Str::own("")),
    }
}

fn of_text(meter: &Arc<Meter>, name: &str, value: &Value, given: &Given) -> Outcome<Value> {
    let own = text_of(meter, value)?;
    let chars = own.chars();
    match name {
        "upper" | "lower" | "capitalize" => meter.text(strings::cased(chars, name)),
        "title" => meter.text(titled(chars)),
        "trim" => strings::call(meter, &own, "strip", given),
        "replace" => {
            let (old, new) =
                (text_of(meter, needed(given, 0, "old", name)?)?, text_of(meter, needed(given, 1, "new", name)?)?);
            strings::replace(meter, chars, old.chars(), new.chars(), number(given, 2, "count")?)
        }
        "center" => {
            let width = given.argument(0, "width").cloned().unwrap_or(Value::Int(80));
            strings::call(meter, &own, "center", &Given { positional: vec![width], named: Vec::new() })
        }
        "e" | "escape" | "forceescape" => meter.text(escaped(meter, chars)?),
        "indent" => indent(meter, chars, given),
        "wordcount" => {
            let mut words = 0;
            let mut inside = false;
            for code in chars {
                let ch = plain(*code);
                let word = ch.is_alphanumeric() || ch == '_';
                words += i64::from(word && !inside);
                inside = word;
            }
            Ok(Value::Int(words))
        }
        "format" => {
            let values = match given.named.is_empty() {
                true => meter.sequence(SequenceKind::Tuple, given.positional.clone())?,
                false => {
                    let named = given.named.iter().map(|(name, value)| Ok((meter.own(name)?, value.clone())));
                    meter.dict(named.collect::<Outcome<_>>()?)?
                }
            };
            super::format::percent(meter, &own, &values)
        }
        _ => Ok(Value::Text(own)),
    }
}

/// As Jinja's filter does: words begin after white space, a hyphen or an opening bracket.
fn titled(chars: &[u32]) -> Vec<u32> {
    let begins = |code: u32| strings::is_space(code) || "-({[<".contains(plain(code));
    let mut out = Vec::with_capacity(chars.len());
    let mut from = 0;
    for at in 0..=chars.len() {
        if at == chars.len() || (at > from && begins(chars[at]) != begins(chars[at - 1])) {
            out.extend(strings::cased(&chars[from..at], "capitalize"));
            from = at;
        }
    }
    out
}

fn escaped(meter: &Arc<Meter>, chars: &[u32]) -> Outcome<Vec<u32>> {
    meter.text_room(chars.len() * 5)?;
    let mut out = Vec::with_capacity(chars.len());
    for &code in chars {
        let entity = match plain(code) {
            '&' => "&amp;",
            '<' => "&lt;",
            '>' => "&gt;",
            '"' => "&#34;",
            '\'' => "&#39;",
            _ => {
                out.push(code);
                continue;
            }
        };
        out.extend(entity.chars().map(|ch| u32::from(ch) | (code & super::FOREIGN)));
    }
    Ok(out)
}

fn indent(meter: &Arc<Meter>, chars: &[u32], given: &Given) -> Outcome<Value> {
    let by: Vec<u32> = match given.argument(0, "width") {
        Some(Value::Text(text)) => text.chars().to_vec(),
        Some(value) => {
            let width = usize::try_from(value.integer().unwrap_or(4).max(0)).unwrap_or(usize::MAX);
            meter.text_room(width)?;
            vec![u32::from(' '); width]
        }
        None => vec![u32::from(' '); 4],
    };
    let (first, blank) =
        (given.argument(1, "first").is_some_and(Value::truth), given.argument(2, "blank").is_some_and(Value::truth));
    let mut out = Vec::new();
    // Jinja adds a line's end before it takes the lines apart, so that one at the end leaves an empty line.
    for (i, line) in chars.split(|code| plain(*code) == '\n').enumerate() {
        meter.more_text(out.len(), line.len() + by.len())?;
        out.extend((i > 0).then_some(u32::from('\n')));
        let wanted = if i == 0 { first } else { blank || !line.is_empty() };
        out.extend_from_slice(if wanted { &by } else { &[] });
        out.extend_from_slice(line);
    }
    meter.text(out)
}

fn of_number(meter: &Arc<Meter>, name: &str, value: &Value, given: &Given) -> Outcome<Value> {
    let parsed = |value: &Value| -> Outcome<Option<f64>> {
        Ok(match value {
            Value::Undefined(message) => return error(&**message),
            Value::Text(text) => text.to_text().trim().replace('_', "").parse::<f64>().ok(),
            other => other.number(),
        })
    };
    match name {
        "abs" => match (value, value.integer()) {
            (Value::Float(value), _) => Ok(Value::Float(value.abs())),
            (_, Some(value)) => Ok(Value::Int(value.saturating_abs())),
            _ => error(format!("bad operand type for abs(): '{}'", value.type_name())),
        },
        "int" => {
            let base = number(given, 1, "base")?
                .and_then(|base| u32::try_from(base).ok())
                .filter(|base| (2..=36).contains(base));
            if let Value::Text(text) = value {
                let text = text.to_text().trim().to_lowercase().replace('_', "");
                let base = base.unwrap_or(10);
                let digits = match base {
                    16 => text.trim_start_matches("0x"),
                    8 => text.trim_start_matches("0o"),
                    2 => text.trim_start_matches("0b"),
                    _ => &text,
                };
                if let Ok(whole) = i64::from_str_radix(digits, base) {
                    return Ok(Value::Int(whole));
                }
            }
            if let Some(whole) = value.integer() {
                return Ok(Value::Int(whole));
            }
            match parsed(value)?.filter(|number| number.is_finite()) {
                Some(number) => Ok(Value::Int(number as i64)),
                None => Ok(given.argument(0, "default").cloned().unwrap_or(Value::Int(0))),
            }
        }
        "float" => match parsed(value)? {
            Some(number) => Ok(Value::Float(number)),
            None => Ok(given.argument(0, "default").cloned().unwrap_or(Value::Float(0.0))),
        },
        _ => {
            let precision = number(given, 0, "precision")?.unwrap_or(0).clamp(-300, 300) as i32;
            let Some(own) = value.number() else {
                return error(format!("type {} doesn't define __round__ method", value.type_name()));
            };
            let factor = 10_f64.powi(precision);
            let rounded = match given.argument(1, "method") {
                Some(method) if method.is_text("ceil") => (own * factor).ceil() / factor,
                Some(method) if method.is_text("floor") => (own * factor).floor() / factor,
                _ if precision >= 0 => format!("{own:.*}", precision as usize).parse().unwrap_or(own),
                _ => (own * factor).round_ties_even() / factor,
            };
            meter.step(1)?;
            match value.integer() {
                Some(_) if given.argument(1, "method").is_none() => Ok(Value::Int(rounded as i64)),
                _ => Ok(Value::Float(rounded)),
            }
        }
    }
}

/// An attribute with dots between its steps, or a number.
fn path(meter: &Arc<Meter>, value: &Value, attribute: &Value) -> Outcome<Value> {
    let Value::Text(name) = attribute else { return ops::item(meter, value, attribute) };
    let mut value = value.clone();
    for step in name.to_text().split('.') {
        let key = match step.parse::<i64>() {
            Ok(index) => Value::Int(index),
            Err(_) => meter.own(step)?,
        };
        value = ops::item(meter, &value, &key)?;
    }
    Ok(value)
}

fn join(meter: &Arc<Meter>, value: &Value, given: &Given) -> Outcome<Value> {
    let separator = match given.argument(0, "d") {
        Some(separator) => text_of(meter, separator)?,
        None => Str::own(""),
    };
    let mut texts = Vec::new();
    for item in ops::items(meter, value)? {
        let item = match given.argument(1, "attribute") {
            Some(attribute) => path(meter, &item, attribute)?,
            None => item,
        };
        texts.push(repr::string(meter, &item)?);
    }
    strings::join(meter, separator.chars(), &meter.list(texts)?)
}

/// What Jinja takes for false is empty to filters that pick or map, none too.
fn items_if_true(meter: &Arc<Meter>, value: &Value) -> Outcome<Vec<Value>> {
    if value.truth() { ops::items(meter, value) } else { Ok(Vec::new()) }
}

fn map<'t>(of: &mut Interpreter<'t>, value: &Value, given: &Given) -> Outcome<Value> {
    let meter = of.meter.clone();
    let named = |name: &str| given.named.iter().find(|(own, _)| own == name).map(|(_, value)| value);
    let mut mapped = Vec::new();
    for item in items_if_true(&meter, value)? {
        mapped.push(match named("attribute") {
            Some(attribute) => match (path(&meter, &item, attribute)?, named("default")) {
                (Value::Undefined(_), Some(default)) => default.clone(),
                (value, _) => value,
            },
            None => {
                let Some(Value::Text(filter)) = given.positional.first() else {
                    return error("map requires a filter argument");
                };
                let rest = Given { positional: given.positional[1..].to_vec(), named: given.named.clone() };
                apply(of, &filter.to_text(), item, &rest)?
            }
        });
    }
    meter.sequence(SequenceKind::Generator, mapped)
}

fn select(meter: &Arc<Meter>, name: &str, value: &Value, given: &Given) -> Outcome<Value> {
    let by_attribute = name.ends_with("attr");
    let (attribute, rest) = match (by_attribute, &given.positional[..]) {
        (true, [attribute, rest @ ..]) => (Some(attribute), rest),
        (true, []) => return error("Missing parameter for attribute name"),
        (false, rest) => (None, rest),
    };
    let mut kept = Vec::new();
    for item in items_if_true(meter, value)? {
        let tested = match attribute {
            Some(attribute) => path(meter, &item, attribute)?,
            None => item.clone(),
        };
        let passes = match rest {
            [Value::Text(test), rest @ ..] => checks::check(meter, &test.to_text(), &tested, rest)?,
            _ => tested.truth(),
        };
        kept.extend(Some(item).filter(|_| passes == name.starts_with("select")));
    }
    meter.sequence(SequenceKind::Generator, kept)
}

fn of_sequence(meter: &Arc<Meter>, name: &str, value: &Value, given: &Given) -> Outcome<Value> {
    if !NAMES.contains(&name) {
        return error(format!("No filter named '{name}'."));
    }
    let mut items = match (name, value) {
        ("reverse", Value::Text(text)) => return meter.text(text.chars().iter().rev().copied().collect()),
        ("dictsort", Value::Dict(_)) => {
            ops::items(meter, &ops::call_method(meter, value, "items", &Given::default())?)?
        }
        _ => ops::items(meter, value)?,
    };
    match name {
        "first" | "last" => {
            let found = if name == "first" { items.first() } else { items.last() };
            Ok(found.cloned().unwrap_or_else(|| Value::undefined("No first item, sequence was empty.")))
        }
        "reverse" => {
            items.reverse();
            meter.sequence(SequenceKind::Generator, items)
        }
        "sort" => {
            let reverse = given.argument(0, "reverse").is_some_and(Value::truth);
            let sensitive = given.argument(1, "case_sensitive").is_some_and(Value::truth);
            let items = sorted(meter, items, given.argument(2, "attribute"), sensitive, reverse)?;
            meter.list(items)
        }
        "dictsort" => {
            let by_value = given.argument(1, "by").is_some_and(|by| by.is_text("value"));
            let sensitive = given.argument(0, "case_sensitive").is_some_and(Value::truth);
            let reverse = given.argument(2, "reverse").is_some_and(Value::truth);
            let items = sorted(meter, items, Some(&Value::Int(i64::from(by_value))), sensitive, reverse)?;
            meter.list(items)
        }
        "min" | "max" => {
            let sensitive = given.argument(0, "case_sensitive").is_some_and(Value::truth);
            let reverse = name == "max";
            let items = sorted(meter, items, given.argument(1, "attribute"), sensitive, reverse)?;
            Ok(items.first().cloned().unwrap_or_else(|| Value::undefined("No aggregated item, sequence was empty.")))
        }
        "sum" => {
            let mut sum = given.argument(1, "start").cloned().unwrap_or(Value::Int(0));
            for item in items {
                let item = match given.argument(0, "attribute") {
                    Some(attribute) => path(meter, &item, attribute)?,
                    None => item,
                };
                sum = ops::arithmetic(meter, Arithmetic::Add, &sum, &item)?;
            }
            Ok(sum)
        }
        "unique" => {
            let mut seen = Vec::new();
            let mut kept = Vec::new();
            for item in items {
                let key = key(
                    meter,
                    &item,
                    given.argument(1, "attribute"),
                    given.argument(0, "case_sensitive").is_some_and(Value::truth),
                )?;
                if ops::position(meter, &seen, &key)?.is_none() {
                    seen.push(key);
                    kept.push(item);
                }
            }
            meter.sequence(SequenceKind::Generator, kept)
        }
        _ => grouped(meter, name, items, given),
    }
}

/// What an item is sorted by.
fn key(meter: &Arc<Meter>, item: &Value, attribute: Option<&Value>, sensitive: bool) -> Outcome<Value> {
    let key = match attribute {
        None | Some(Value::None) => item.clone(),
        Some(attribute) => path(meter, item, attribute)?,
    };
    match &key {
        Value::Text(text) if !sensitive => meter.text(strings::cased(text.chars(), "lower")),
        _ => Ok(key),
    }
}

fn sorted(
    meter: &Arc<Meter>,
    items: Vec<Value>,
    attribute: Option<&Value>,
    sensitive: bool,
    reverse: bool,
) -> Outcome<Vec<Value>> {
    meter.step(items.len() as u64 * u64::from(items.len().checked_ilog2().unwrap_or(0) + 1))?;
    let mut keyed = Vec::with_capacity(items.len());
    for item in items {
        keyed.push((key(meter, &item, attribute, sensitive)?, item));
    }
    let keyed = ops::sort(keyed, |(a, _), (b, _)| {
        let ordering = ops::order(a, b, "<")?;
        Ok(if reverse { ordering.reverse() } else { ordering })
    })?;
    Ok(keyed.into_iter().map(|(_, item)| item).collect())
}

/// `batch`, `slice` and `groupby`.
fn grouped(meter: &Arc<Meter>, name: &str, items: Vec<Value>, given: &Given) -> Outcome<Value> {
    let mut groups = Vec::new();
    if name == "groupby" {
        let attribute = needed(given, 0, "attribute", name)?;
        let mut open: Option<(Value, Vec<Value>)> = None;
        for item in sorted(meter, items, Some(attribute), false, false)? {
            let own = path(meter, &item, attribute)?;
            match &mut open {
                Some((value, group)) if ops::equal_counted(meter, value, &own)? => group.push(item),
                _ => {
                    let closed = open.replace((own, vec![item]));
                    groups.extend(closed.map(|(value, group)| pair(meter, value, group)).transpose()?);
                }
            }
        }
        groups.extend(open.map(|(value, group)| pair(meter, value, group)).transpose()?);
        return meter.list(groups);
    }
    let count = number(given, 0, "linecount")?.and_then(|count| usize::try_from(count).ok()).filter(|count| *count > 0);
    let Some(count) = count.filter(|count| *count <= 1 << 16) else {
        return error(format!("the filter '{name}' needs a count"));
    };
    let fill = given.argument(1, "fill_with");
    let (each, more) = (items.len() / count, items.len() % count);
    let mut items = items.into_iter();
    let groups_wanted = if name == "batch" { items.len().div_ceil(count) } else { count };
    for i in 0..groups_wanted {
        let wanted = if name == "batch" { count } else { each + usize::from(i < more) };
        let mut group: Vec<Value> = items.by_ref().take(wanted).collect();
        if let Some(fill) = fill.filter(|fill| !matches!(fill, Value::None)) {
            let short = if name == "batch" { group.len() < count } else { more > 0 && i >= more };
            let missing = if name == "batch" { count - group.len() } else { 1 };
            group.extend(std::iter::repeat_n(fill.clone(), if short { missing } else { 0 }));
        }
        groups.push(meter.list(group)?);
    }
    meter.sequence(SequenceKind::Generator, groups)
}

fn pair(meter: &Arc<Meter>, value: Value, group: Vec<Value>) -> Outcome<Value> {
    let group = meter.list(group)?;
    meter.sequence(SequenceKind::Tuple, vec![value, group])
}
