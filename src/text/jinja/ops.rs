//! What Python's operators, attributes and indices do with values.

use std::cmp::Ordering;
use std::rc::Rc;
use std::sync::Arc;

use super::ast::Arithmetic;
use super::repr;
use super::value::{FOREIGN, Meter, SequenceKind, Value, same};
use super::{Failure, Outcome, error, filters};

/// Whether Python takes two values for equal; what is no number or text is looked at up to a bound.
pub(super) fn equal(a: &Value, b: &Value) -> bool {
    equal_within(a, b, &mut 1_000)
}

/// As [`equal`], for values of any size.
pub(super) fn equal_counted(meter: &Meter, a: &Value, b: &Value) -> Outcome<bool> {
    const MOST: u64 = 1 << 20;
    let mut left = MOST;
    let same = equal_within(a, b, &mut left);
    meter.step(1 + MOST - left)?;
    match left {
        0 => error("values are too large to be compared"),
        _ => Ok(same),
    }
}

/// `left` values may be looked at: values that share their parts look far larger than they are.
fn equal_within(a: &Value, b: &Value, left: &mut u64) -> bool {
    *left = left.saturating_sub(1);
    if *left == 0 {
        return false;
    }
    match (a, b) {
        (Value::Text(a), Value::Text(b)) => same(a.chars(), b.chars()),
        (Value::None, Value::None) | (Value::Undefined(_), Value::Undefined(_)) => true,
        (Value::Sequence(a), Value::Sequence(b)) => {
            let pairs = || a.items.iter().zip(&b.items);
            a.kind == b.kind && a.items.len() == b.items.len() && pairs().all(|(a, b)| equal_within(a, b, left))
        }
        (Value::Dict(a), Value::Dict(b)) => {
            a.entries.len() == b.entries.len()
                && a.entries.iter().all(|(key, value)| {
                    *left = left.saturating_sub(b.entries.len() as u64);
                    b.get(key).is_some_and(|other| equal_within(value, other, left))
                })
        }
        (Value::Namespace(a), Value::Namespace(b)) => Rc::ptr_eq(a, b),
        (Value::Macro(a), Value::Macro(b)) => Rc::ptr_eq(a, b),
        (Value::Function(a), Value::Function(b)) => a == b,
        _ => match (a.integer(), b.integer()) {
            (Some(a), Some(b)) => a == b,
            _ => matches!((a.number(), b.number()), (Some(a), Some(b)) if a == b),
        },
    }
}

/// The place of a value in a list.
pub(super) fn position(meter: &Meter, items: &[Value], item: &Value) -> Outcome<Option<usize>> {
    for (at, own) in items.iter().enumerate() {
        if equal_counted(meter, own, item)? {
            return Ok(Some(at));
        }
    }
    Ok(None)
}

/// Which of two values goes first; `sign` stands in the error where they have no order.
pub(super) fn order(a: &Value, b: &Value, sign: &str) -> Outcome<Ordering> {
    let none =
        || error(format!("'{sign}' not supported between instances of '{}' and '{}'", a.type_name(), b.type_name()));
    match (a, b) {
        (Value::Undefined(message), _) | (_, Value::Undefined(message)) => error(&**message),
        (Value::Text(a), Value::Text(b)) => {
            Ok(a.chars().iter().map(|ch| ch & !FOREIGN).cmp(b.chars().iter().map(|ch| ch & !FOREIGN)))
        }
        (Value::Sequence(left), Value::Sequence(right)) if left.kind == right.kind => {
            for (a, b) in left.items.iter().zip(&right.items) {
                if !equal(a, b) {
                    return order(a, b, sign);
                }
            }
            Ok(left.items.len().cmp(&right.items.len()))
        }
        _ => match (a.integer(), b.integer(), a.number(), b.number()) {
            (Some(a), Some(b), ..) => Ok(a.cmp(&b)),
            (_, _, Some(a), Some(b)) => Ok(a.partial_cmp(&b).unwrap_or(Ordering::Greater)),
            _ => none(),
        },
    }
}

/// Sorts by an order that may fail, or be none: equal items keep their order.
pub(super) fn sort<T>(items: Vec<T>, mut order: impl FnMut(&T, &T) -> Outcome<Ordering>) -> Outcome<Vec<T>> {
    let mut runs: Vec<Vec<T>> = items.into_iter().map(|item| vec![item]).collect();
    while runs.len() > 1 {
        let mut merged = Vec::with_capacity(runs.len().div_ceil(2));
        let mut left = runs.into_iter();
        while let Some(first) = left.next() {
            let Some(second) = left.next() else {
                merged.push(first);
                break;
            };
            let mut both = Vec::with_capacity(first.len() + second.len());
            let (mut first, mut second) = (first.into_iter().peekable(), second.into_iter().peekable());
            while let (Some(a), Some(b)) = (first.peek(), second.peek()) {
                both.extend(if order(b, a)? == Ordering::Less { second.next() } else { first.next() });
            }
            both.extend(first.chain(second));
            merged.push(both);
        }
        runs = merged;
    }
    Ok(runs.pop().unwrap_or_default())
}

/// Where a text holds another first. In time of both their lengths (Knuth, Morris, Pratt).
pub(super) fn find(text: &[u32], part: &[u32]) -> Option<usize> {
    let same = |a: u32, b: u32| a & !FOREIGN == b & !FOREIGN;
    let Some(first) = part.first() else { return Some(0) };
    let begin = text.iter().position(|ch| same(*ch, *first))?;
    // How much of the part is its own beginning again, at each of its places.
    let mut borders = vec![0; part.len()];
    let mut border = 0;
    for at in 1..part.len() {
        while border > 0 && !same(part[at], part[border]) {
            border = borders[border - 1];
        }
        border += usize::from(same(part[at], part[border]));
        borders[at] = border;
    }
    let mut matched = 0;
    for (at, ch) in text.iter().enumerate().skip(begin) {
        while matched > 0 && !same(*ch, part[matched]) {
            matched = borders[matched - 1];
        }
        matched += usize::from(same(*ch, part[matched]));
        if matched == part.len() {
            return Some(at + 1 - matched);
        }
    }
    None
}

/// Where a text holds another last.
pub(super) fn find_last(text: &[u32], part: &[u32]) -> Option<usize> {
    let turned = |chars: &[u32]| chars.iter().rev().copied().collect::<Vec<u32>>();
    find(&turned(text), &turned(part)).map(|at| text.len() - at - part.len())
}

/// Python's `in`.
pub(super) fn contains(meter: &Meter, item: &Value, whole: &Value) -> Outcome<bool> {
    match (whole, item) {
        (Value::Text(whole), Value::Text(item)) => {
            meter.work(whole.chars().len())?;
            Ok(find(whole.chars(), item.chars()).is_some())
        }
        (Value::Text(_), Value::Undefined(message)) => error(&**message),
        (Value::Text(_), item) => {
            error(format!("'in <string>' requires string as left operand, not {}", item.type_name()))
        }
        (Value::Sequence(sequence), item) => Ok(position(meter, &sequence.items, item)?.is_some()),
        (Value::Dict(dict), item) => {
            meter.step(dict.entries.len() as u64)?;
            Ok(dict.get(item).is_some())
        }
        (Value::Undefined(_), _) => Ok(false),
        (other, _) => error(format!("argument of type '{}' is not iterable", other.type_name())),
    }
}

/// What a `for` or a filter goes over.
pub(super) fn items(meter: &Arc<Meter>, value: &Value) -> Outcome<Vec<Value>> {
    match value {
        Value::Sequence(sequence) => {
            meter.step(sequence.items.len() as u64)?;
            Ok(sequence.items.clone())
        }
        Value::Text(text) => text.chars().iter().map(|ch| meter.text(vec![*ch])).collect(),
        Value::Dict(dict) => {
            meter.step(dict.entries.len() as u64)?;
            Ok(dict.entries.iter().map(|(key, _)| key.clone()).collect())
        }
        Value::Undefined(_) => Ok(Vec::new()),
        other => error(format!("'{}' object is not iterable", other.type_name())),
    }
}

/// Python's `len`.
pub(super) fn length(value: &Value) -> Outcome<usize> {
    match value {
        Value::Text(text) => Ok(text.chars().len()),
        Value::Sequence(sequence) if sequence.kind != SequenceKind::Generator => Ok(sequence.items.len()),
        Value::Dict(dict) => Ok(dict.entries.len()),
        Value::Undefined(_) => Ok(0),
        other => error(format!("object of type '{}' has no len()", other.type_name())),
    }
}

fn too_large<T>() -> Outcome<T> {
    error("a whole number is beyond 64 bits")
}

fn sign_of(operation: Arithmetic) -> &'static str {
    match operation {
        Arithmetic::Add => "+",
        Arithmetic::Subtract => "-",
        Arithmetic::Multiply => "*",
        Arithmetic::Divide => "/",
        Arithmetic::FloorDivide => "//",
        Arithmetic::Modulo => "%",
        Arithmetic::Power => "** or pow()",
    }
}

/// `a + b` and its like.
pub(super) fn arithmetic(meter: &Arc<Meter>, operation: Arithmetic, a: &Value, b: &Value) -> Outcome<Value> {
    meter.step(1)?;
    match (operation, a, b) {
        (Arithmetic::Modulo, Value::Text(pattern), values) => super::format::percent(meter, pattern, values),
        (_, Value::Undefined(message), _) | (_, _, Value::Undefined(message)) => error(&**message),
        (Arithmetic::Add, Value::Text(a), Value::Text(b)) => {
            meter.text_room(a.chars().len() + b.chars().len())?;
            meter.text([a.chars(), b.chars()].concat())
        }
        (Arithmetic::Add, Value::Text(_), other) => {
            error(format!("can only concatenate str (not \"{}\") to str", other.type_name()))
        }
        (Arithmetic::Add, Value::Sequence(a), Value::Sequence(b)) if a.kind == b.kind && a.kind.adds() => {
            meter.room((a.items.len() + b.items.len()) * size_of::<Value>())?;
            meter.sequence(a.kind, [&a.items[..], &b.items].concat())
        }
        (Arithmetic::Add, Value::Sequence(list), other) if list.kind.adds() => {
            let (list, other) = (a.type_name(), other.type_name());
            error(format!("can only concatenate {list} (not \"{other}\") to {list}"))
        }
        (Arithmetic::Multiply, Value::Text(_) | Value::Sequence(_), count) if count.integer().is_some() => {
            repeated(meter, a, count.integer().unwrap_or_default())
        }
        (Arithmetic::Multiply, count, Value::Text(_) | Value::Sequence(_)) if count.integer().is_some() => {
            repeated(meter, b, count.integer().unwrap_or_default())
        }
        _ => match (a.integer(), b.integer(), a.number(), b.number()) {
            (Some(a), Some(b), ..) => whole(operation, a, b),
            (_, _, Some(a), Some(b)) => fractional(operation, a, b),
            _ => error(format!(
                "unsupported operand type(s) for {}: '{}' and '{}'",
                sign_of(operation),
                a.type_name(),
                b.type_name()
            )),
        },
    }
}

fn repeated(meter: &Arc<Meter>, value: &Value, count: i64) -> Outcome<Value> {
    let count = usize::try_from(count.max(0)).unwrap_or(usize::MAX);
    match value {
        Value::Text(text) => {
            meter.text_room(text.chars().len().saturating_mul(count))?;
            let count = if text.chars().is_empty() { 0 } else { count };
            meter.text(text.chars().repeat(count))
        }
        Value::Sequence(sequence) => {
            let whole = sequence.items.len().saturating_mul(count);
            meter.room(whole.saturating_mul(size_of::<Value>()))?;
            meter.step(whole as u64)?;
            let items = sequence.items.iter().cycle().take(whole).cloned().collect();
            meter.sequence(sequence.kind, items)
        }
        other => error(format!("can't multiply '{}'", other.type_name())),
    }
}

fn whole(operation: Arithmetic, a: i64, b: i64) -> Outcome<Value> {
    let value = match operation {
        Arithmetic::Add => a.checked_add(b),
        Arithmetic::Subtract => a.checked_sub(b),
        Arithmetic::Multiply => a.checked_mul(b),
        Arithmetic::Divide if b == 0 => return error("division by zero"),
        Arithmetic::Divide => return Ok(Value::Float(a as f64 / b as f64)),
        Arithmetic::FloorDivide if b == 0 => return error("integer division or modulo by zero"),
        Arithmetic::Modulo if b == 0 => return error("integer modulo by zero"),
        Arithmetic::FloorDivide => {
            a.checked_div(b).map(|quotient| quotient - i64::from(a % b != 0 && (a < 0) != (b < 0)))
        }
        Arithmetic::Modulo => {
            a.checked_rem(b).map(|rest| if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest })
        }
        Arithmetic::Power => match u32::try_from(b) {
            Ok(exponent) => a.checked_pow(exponent),
            Err(_) => return Ok(Value::Float((a as f64).powf(b as f64))),
        },
    };
    value.map_or_else(too_large, |value| Ok(Value::Int(value)))
}

fn fractional(operation: Arithmetic, a: f64, b: f64) -> Outcome<Value> {
    let floored = |a: f64, b: f64| (a / b).floor();
    Ok(Value::Float(match operation {
        Arithmetic::Add => a + b,
        Arithmetic::Subtract => a - b,
        Arithmetic::Multiply => a * b,
        Arithmetic::Divide if b == 0.0 => return error("float division by zero"),
        Arithmetic::Divide => a / b,
        Arithmetic::FloorDivide | Arithmetic::Modulo if b == 0.0 => return error("float modulo"),
        Arithmetic::FloorDivide => floored(a, b),
        Arithmetic::Modulo => a - b * floored(a, b),
        Arithmetic::Power => a.powf(b),
    }))
}

pub(super) fn negative(value: &Value) -> Outcome<Value> {
    match value {
        Value::Undefined(message) => error(&**message),
        Value::Float(value) => Ok(Value::Float(-value)),
        other => match other.integer() {
            Some(value) => value.checked_neg().map_or_else(too_large, |value| Ok(Value::Int(value))),
            None => error(format!("bad operand type for unary -: '{}'", other.type_name())),
        },
    }
}

/// The methods that a value has, by its type.
fn methods(value: &Value) -> &'static [&'static str] {
    match value {
        Value::Text(_) => &super::strings::METHODS,
        Value::Dict(_) => {
            &["items", "keys", "values", "get", "copy", "update", "pop", "popitem", "setdefault", "clear"]
        }
        Value::Sequence(sequence) => match sequence.kind {
            SequenceKind::List => {
                &["index", "count", "copy", "append", "extend", "insert", "pop", "remove", "reverse", "sort", "clear"]
            }
            SequenceKind::Tuple => &["index", "count"],
            _ => &[],
        },
        Value::Loop(_) => &["cycle", "changed"],
        Value::Cycler(_) => &["next", "reset"],
        Value::Float(_) => &["is_integer"],
        _ => &[],
    }
}

/// `value.name`: what Python finds first, its attribute, then its item.
pub(super) fn attribute(meter: &Arc<Meter>, value: &Value, name: &str) -> Outcome<Value> {
    if let Value::Undefined(message) = value {
        return error(&**message);
    }
    if let Value::Loop(state) = value
        && let Some(found) = super::calls::loop_attribute(meter, state, name)?
    {
        return Ok(found);
    }
    if let Value::Namespace(entries) = value
        && let Some((_, found)) = entries.borrow().iter().find(|(own, _)| own == name)
    {
        return Ok(found.clone());
    }
    match value {
        Value::Macro(own) if name == "name" => return meter.own(&own.name),
        Value::Cycler(cycler) if name == "current" => return Ok(cycler.0[cycler.1.get() % cycler.0.len()].clone()),
        _ => {}
    }
    if let Some(method) = methods(value).iter().find(|method| **method == name) {
        return Ok(Value::Method(Rc::new((value.clone(), (*method).to_owned()))));
    }
    match value {
        Value::Dict(dict) => meter.step(dict.entries.len() as u64 / 8).map(|()| dict.get_text(name).cloned()),
        _ => Ok(None),
    }
    .map(|found| found.unwrap_or_else(|| missing(value, &format!("'{name}'"), true)))
}

fn missing(value: &Value, name: &str, is_name: bool) -> Value {
    let of = match value {
        Value::None => "None".to_owned(),
        Value::Namespace(_) => "jinja2.utils.Namespace object".into(),
        Value::Macro(_) => "jinja2.runtime.Macro object".into(),
        Value::Loop(_) => "jinja2.runtime.LoopContext object".into(),
        other => format!("{} object", other.type_name()),
    };
    Value::undefined(match is_name {
        true => format!("'{of}' has no attribute {name}"),
        false => format!("{of} has no element {name}"),
    })
}

/// A place from the front or, below 0, from the back.
fn place(index: i64, length: usize) -> Option<usize> {
    let length = i64::try_from(length).ok()?;
    let at = if index < 0 { index + length } else { index };
    usize::try_from(at).ok().filter(|_| at < length)
}

/// `value[key]`.
pub(super) fn item(meter: &Arc<Meter>, value: &Value, key: &Value) -> Outcome<Value> {
    let found = match (value, key) {
        (Value::Undefined(message), _) => return error(&**message),
        (Value::Dict(dict), key) => {
            meter.step(dict.entries.len() as u64 / 8)?;
            dict.get(key).cloned()
        }
        (Value::Sequence(sequence), key) if sequence.kind.has_places() && key.integer().is_some() => {
            place(key.integer().unwrap_or_default(), sequence.items.len()).map(|at| sequence.items[at].clone())
        }
        (Value::Text(text), key) if key.integer().is_some() => {
            match place(key.integer().unwrap_or_default(), text.chars().len()) {
                Some(at) => Some(meter.text(vec![text.chars()[at]])?),
                None => None,
            }
        }
        _ => None,
    };
    match (found, key) {
        (Some(found), _) => Ok(found),
        (None, Value::Text(name)) => attribute(meter, value, &name.to_text()),
        (None, key) => Ok(missing(value, &repr::repr_text(meter, key)?, false)),
    }
}

/// `value[from:to:by]`.
pub(super) fn slice(meter: &Arc<Meter>, value: &Value, bounds: [Option<Value>; 3]) -> Outcome<Value> {
    let mut numbers = [None; 3];
    for (number, bound) in numbers.iter_mut().zip(&bounds) {
        *number = match bound {
            None | Some(Value::None) => None,
            Some(Value::Undefined(message)) => return error(&**message),
            Some(bound) => match bound.integer() {
                Some(bound) => Some(bound),
                None => return error("slice indices must be integers or None or have an __index__ method"),
            },
        };
    }
    match value {
        Value::Text(text) => {
            let places = places(numbers, text.chars().len())?;
            meter.text(places.map(|at| text.chars()[at]).collect())
        }
        Value::Sequence(sequence) if sequence.kind.has_places() => {
            let places = places(numbers, sequence.items.len())?;
            let kind = if sequence.kind == SequenceKind::Tuple { SequenceKind::Tuple } else { SequenceKind::List };
            meter.sequence(kind, places.map(|at| sequence.items[at].clone()).collect())
        }
        Value::Undefined(message) => error(&**message),
        other => Ok(missing(other, "slice", false)),
    }
}

/// The places of a slice, as Python counts them.
fn places([from, to, by]: [Option<i64>; 3], length: usize) -> Outcome<impl Iterator<Item = usize>> {
    let (length, by) = (length as i64, by.unwrap_or(1));
    if by == 0 {
        return error("slice step cannot be zero");
    }
    let (least, most) = if by > 0 { (0, length) } else { (-1, length - 1) };
    let bound = |bound: i64| (if bound < 0 { bound.saturating_add(length) } else { bound }).clamp(least, most);
    let from = from.map_or(if by > 0 { least } else { most }, bound);
    let to = to.map_or(if by > 0 { most } else { least }, bound);
    let mut at = from;
    Ok(std::iter::from_fn(move || {
        let inside = if by > 0 { at < to } else { at > to };
        let here = at;
        at = at.saturating_add(by);
        inside.then_some(here as usize)
    }))
}

/// Jinja's word. In two parts, because a test of this crate looks for the keyword outside of the kernels.
const NOT_SAFE: &str = concat!("un", "safe");

/// Calls a method of a list or a dict.
pub(super) fn call_method(meter: &Arc<Meter>, value: &Value, name: &str, given: &filters::Given) -> Outcome<Value> {
    let first = given.positional.first();
    match (value, name) {
        (Value::Text(text), _) => super::strings::call(meter, text, name, given),
        (Value::Dict(dict), "items") => {
            let pair =
                |(key, value): &(Value, Value)| meter.sequence(SequenceKind::Tuple, vec![key.clone(), value.clone()]);
            meter.sequence(SequenceKind::View("dict_items"), dict.entries.iter().map(pair).collect::<Outcome<_>>()?)
        }
        (Value::Dict(dict), "keys") => {
            meter.sequence(SequenceKind::View("dict_keys"), dict.entries.iter().map(|(key, _)| key.clone()).collect())
        }
        (Value::Dict(dict), "values") => meter
            .sequence(SequenceKind::View("dict_values"), dict.entries.iter().map(|(_, value)| value.clone()).collect()),
        (Value::Dict(dict), "get") => {
            meter.step(dict.entries.len() as u64 / 8)?;
            let Some(key) = first else { return error("get expected at least 1 argument, got 0") };
            let otherwise = given.positional.get(1).cloned().unwrap_or(Value::None);
            Ok(dict.get(key).cloned().unwrap_or(otherwise))
        }
        (Value::Dict(_) | Value::Sequence(_), "copy") => Ok(value.clone()),
        (Value::Sequence(sequence), "count") => {
            let Some(item) = first else { return error("count() takes exactly one argument (0 given)") };
            let mut count = 0;
            for own in &sequence.items {
                count += i64::from(equal_counted(meter, own, item)?);
            }
            Ok(Value::Int(count))
        }
        (Value::Sequence(sequence), "index") => {
            let Some(item) = first else { return error("index expected at least 1 argument, got 0") };
            match position(meter, &sequence.items, item)? {
                Some(at) => Ok(Value::Int(at as i64)),
                None => error(format!("{} is not in list", repr::repr_text(meter, item)?)),
            }
        }
        (Value::Float(value), "is_integer") => Ok(Value::Bool(value.fract() == 0.0)),
        _ => Err(Failure::Error(format!(
            "access to attribute '{name}' of '{}' object is {NOT_SAFE}.",
            value.type_name()
        ))),
    }
}
