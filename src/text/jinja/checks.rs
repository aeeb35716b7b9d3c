//! Jinja's tests (`is defined`) and comparisons.

use std::cmp::Ordering;
use std::sync::Arc;

use super::ast::Comparison;
use super::value::{Meter, Value, plain};
use super::{Outcome, error, ops};

/// Compares two values.
pub(super) fn compare(meter: &Arc<Meter>, comparison: Comparison, a: &Value, b: &Value) -> Outcome<bool> {
    meter.step(1)?;
    if let (Value::Text(a), Value::Text(b)) = (a, b) {
        meter.work(a.chars().len().min(b.chars().len()))?;
    }
    let order = |sign: &str| ops::order(a, b, sign);
    Ok(match comparison {
        Comparison::Equal => ops::equal_counted(meter, a, b)?,
        Comparison::NotEqual => !ops::equal_counted(meter, a, b)?,
        Comparison::Less => order("<")? == Ordering::Less,
        Comparison::LessEqual => order("<=")? != Ordering::Greater,
        Comparison::Greater => order(">")? == Ordering::Greater,
        Comparison::GreaterEqual => order(">=")? != Ordering::Less,
        Comparison::In => ops::contains(meter, a, b)?,
        Comparison::NotIn => !ops::contains(meter, a, b)?,
    })
}

/// The tests that there are.
pub(super) const TESTS: [&str; 34] = [
    "boolean",
    "callable",
    "defined",
    "divisibleby",
    "eq",
    "equalto",
    "==",
    "escaped",
    "even",
    "odd",
    "false",
    "true",
    "float",
    "integer",
    "number",
    "ge",
    "gt",
    "greaterthan",
    "le",
    "lt",
    "lessthan",
    "ne",
    "in",
    "iterable",
    "lower",
    "upper",
    "mapping",
    "none",
    "sameas",
    "sequence",
    "string",
    "undefined",
    "filter",
    "test",
];

/// Whether a value passes a test.
pub(super) fn check(meter: &Arc<Meter>, name: &str, value: &Value, given: &[Value]) -> Outcome<bool> {
    let other = || match given.first() {
        Some(other) => Ok(other),
        None => error(format!("the test '{name}' needs a value to compare with")),
    };
    let comparison = match name {
        "eq" | "equalto" | "==" => Some(Comparison::Equal),
        "ne" | "!=" => Some(Comparison::NotEqual),
        "lt" | "lessthan" | "<" => Some(Comparison::Less),
        "le" | "<=" => Some(Comparison::LessEqual),
        "gt" | "greaterthan" | ">" => Some(Comparison::Greater),
        "ge" | ">=" => Some(Comparison::GreaterEqual),
        "in" => Some(Comparison::In),
        _ => None,
    };
    if let Some(comparison) = comparison {
        return compare(meter, comparison, value, other()?);
    }
    Ok(match name {
        "defined" => !matches!(value, Value::Undefined(_)),
        "undefined" => matches!(value, Value::Undefined(_)),
        "none" => matches!(value, Value::None),
        "boolean" => matches!(value, Value::Bool(_)),
        "true" => matches!(value, Value::Bool(true)),
        "false" => matches!(value, Value::Bool(false)),
        "integer" => matches!(value, Value::Int(_)),
        "float" => matches!(value, Value::Float(_)),
        "number" => value.number().is_some(),
        "string" => matches!(value, Value::Text(_)),
        "mapping" => matches!(value, Value::Dict(_)),
        "iterable" => {
            matches!(value, Value::Text(_) | Value::Sequence(_) | Value::Dict(_) | Value::Undefined(_) | Value::Loop(_))
        }
        "sequence" => match value {
            Value::Sequence(sequence) => sequence.kind.has_places(),
            Value::Text(_) | Value::Dict(_) | Value::Undefined(_) => true,
            _ => false,
        },
        "callable" => {
            matches!(value, Value::Function(_) | Value::Method(_) | Value::Macro(_) | Value::Loop(_) | Value::Joiner(_))
        }
        "escaped" => false,
        "even" | "odd" | "divisibleby" => return divides(meter, name, value, given),
        "lower" | "upper" => return in_case(meter, value, name == "upper"),
        "sameas" => same(value, other()?),
        "filter" => matches!(value, Value::Text(name) if super::filters::NAMES.iter().any(|own| name.is(own))),
        "test" => matches!(value, Value::Text(name) if TESTS.iter().any(|own| name.is(own))),
        _ => return error(format!("No test named '{name}'.")),
    })
}

fn divides(meter: &Arc<Meter>, name: &str, value: &Value, given: &[Value]) -> Outcome<bool> {
    let by = match (name, given.first()) {
        ("divisibleby", Some(by)) => by.clone(),
        _ => Value::Int(2),
    };
    let rest = ops::arithmetic(meter, super::ast::Arithmetic::Modulo, value, &by)?;
    Ok((rest.number() == Some(0.0)) == (name != "odd"))
}

/// Python's `islower` and `isupper`.
fn in_case(meter: &Arc<Meter>, value: &Value, upper: bool) -> Outcome<bool> {
    let Value::Text(text) = super::repr::string(meter, value)? else { return Ok(false) };
    let wrong = |ch: char| if upper { ch.is_lowercase() } else { ch.is_uppercase() };
    let right = |ch: char| if upper { ch.is_uppercase() } else { ch.is_lowercase() };
    let mut chars = text.chars().iter().map(|ch| plain(*ch));
    Ok(!chars.clone().any(wrong) && chars.any(right))
}

/// Python's `is`.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Bool(a), Value::Bool(b)) => a == b,
        (Value::Bool(_), _) | (_, Value::Bool(_)) => false,
        (Value::Int(_), Value::Float(_)) | (Value::Float(_), Value::Int(_)) => false,
        (Value::Sequence(a), Value::Sequence(b)) => std::rc::Rc::ptr_eq(a, b),
        (Value::Dict(a), Value::Dict(b)) => std::rc::Rc::ptr_eq(a, b),
        _ => ops::equal(a, b),
    }
}
