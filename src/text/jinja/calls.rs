//! What a template may call: functions, macros, loops, methods.

use std::rc::Rc;
use std::sync::Arc;

use chrono::format::{Item, StrftimeItems};

use super::ast::{Expr, Macro, Postfix};
use super::eval::Interpreter;
use super::filters::Given;
use super::value::{Defined, LoopState, MacroValue, Meter, SequenceKind, Value};
use super::{Failure, Outcome, error, ops, repr};

/// The functions that a template is given.
pub(super) const FUNCTIONS: [&str; 7] =
    ["range", "dict", "namespace", "raise_exception", "strftime_now", "cycler", "joiner"];

/// Most numbers of a `range`, as Jinja's sandbox has it.
const MAX_RANGE: i64 = 100_000;

/// Sets an entry of a namespace.
pub(super) fn set_entry(entries: &mut Vec<(String, Value)>, name: String, value: Value) {
    match entries.iter_mut().find(|(own, _)| *own == name) {
        Some((_, old)) => *old = value,
        None => entries.push((name, value)),
    }
}

/// Sets an entry of a dict that is being made.
pub(super) fn insert(meter: &Meter, entries: &mut Vec<(Value, Value)>, key: Value, value: Value) -> Outcome<()> {
    meter.step(1 + entries.len() as u64 / 8)?;
    if matches!(&key, Value::Dict(_))
        || matches!(&key, Value::Sequence(sequence) if sequence.kind == SequenceKind::List)
    {
        return error(format!("unhashable type: '{}'", key.type_name()));
    }
    match entries.iter_mut().find(|(own, _)| ops::equal(own, &key)) {
        Some((_, old)) => *old = value,
        None => entries.push((key, value)),
    }
    Ok(())
}

/// An attribute of `loop`; `None` where it has none of the name.
pub(super) fn loop_attribute(meter: &Arc<Meter>, state: &Rc<LoopState>, name: &str) -> Outcome<Option<Value>> {
    let Value::Sequence(sequence) = &state.items else { return Ok(None) };
    let (at, count) = (state.at.get(), sequence.items.len());
    let number = |value: usize| Some(Value::Int(value as i64));
    let neighbour = |place: usize, what: &str| {
        Some(sequence.items.get(place).cloned().unwrap_or_else(|| Value::undefined(format!("there is no {what} item"))))
    };
    meter.step(1)?;
    Ok(match name {
        "index" => number(at + 1),
        "index0" => number(at),
        "revindex" => number(count - at),
        "revindex0" => number(count - at - 1),
        "first" => Some(Value::Bool(at == 0)),
        "last" => Some(Value::Bool(at + 1 == count)),
        "length" => number(count),
        "depth" => number(state.depth),
        "depth0" => number(state.depth - 1),
        "previtem" => neighbour(at.wrapping_sub(1), "previous"),
        "nextitem" => neighbour(at + 1, "next"),
        _ => None,
    })
}

impl<'t> Interpreter<'t> {
    /// A macro, or the body of a call block, that sees the names around it.
    pub fn define(&mut self, tree: &'t Macro) -> Value {
        let scope = Rc::downgrade(&self.scope);
        self.macros.push(Defined { tree, scope });
        Value::Macro(Rc::new(MacroValue { number: self.macros.len() - 1, name: tree.name.clone() }))
    }

    /// The call of a call block, whose body is its `caller`.
    pub fn call_with(&mut self, call: &'t Expr, caller: Value) -> Outcome<Value> {
        let Expr::Postfix(value, postfixes) = call else { return error("a call block needs a call") };
        let Some((Postfix::Call(arguments), before)) = postfixes.split_last() else {
            return error("a call block needs a call");
        };
        let mut callee = self.eval(value)?;
        for postfix in before {
            callee = match postfix {
                Postfix::Attribute(name) => ops::attribute(&self.meter, &callee, name)?,
                _ => return error("a call block needs a call of a name"),
            };
        }
        let mut given = self.arguments(arguments)?;
        given.named.push(("caller".into(), caller));
        self.call(&callee, given)
    }

    pub fn call(&mut self, callee: &Value, given: Given) -> Outcome<Value> {
        match callee {
            Value::Undefined(message) => error(&**message),
            Value::Function(name) => self.function(name, given),
            Value::Method(method) => match &method.0 {
                Value::Loop(state) => loop_method(state, &method.1, given),
                Value::Cycler(cycler) => {
                    let at = if method.1 == "reset" { 0 } else { cycler.1.get() + 1 };
                    let value = cycler.0[cycler.1.get() % cycler.0.len()].clone();
                    cycler.1.set(at);
                    Ok(if method.1 == "reset" { Value::None } else { value })
                }
                value => ops::call_method(&self.meter, value, &method.1, &given),
            },
            Value::Macro(value) => self.call_macro(value, given),
            Value::Loop(state) => self.call_loop(state, &given),
            Value::Joiner(joiner) => Ok(match joiner.1.replace(true) {
                true => Value::Text(joiner.0.clone()),
                false => self.meter.own("")?,
            }),
            other => error(format!("'{}' object is not callable", other.type_name())),
        }
    }

    fn call_loop(&mut self, state: &Rc<LoopState>, given: &Given) -> Outcome<Value> {
        let Some((tree, scope)) = state.recursive.and_then(|number| self.loops.get(number).cloned()) else {
            return error("The loop must have the 'recursive' marker to be called recursively.");
        };
        let over = given.positional.first().cloned().unwrap_or(Value::None);
        self.captured(|this| this.run_loop(tree, over, scope, state.depth + 1))
    }

    fn call_macro(&mut self, value: &MacroValue, given: Given) -> Outcome<Value> {
        let Some(Defined { tree, scope }) = self.macros.get(value.number) else { return error("no such macro") };
        let tree: &'t Macro = tree;
        let Some(scope) = scope.upgrade() else {
            return error(format!("macro '{}' is called outside of the block that it was defined in", value.name));
        };
        let Given { positional, mut named } = given;
        let caller = named.iter().position(|(name, _)| name == "caller").map(|at| named.remove(at).1);
        let text = self.captured(|this| {
            this.within(scope, |this| {
                let mut positional = positional.into_iter();
                for (name, default) in &tree.parameters {
                    let by_name = named.iter().position(|(own, _)| own == name).map(|at| named.remove(at).1);
                    let value = match (positional.next(), by_name, default) {
                        (Some(_), Some(_), _) => {
                            return error(format!("macro '{}' got multiple values for argument '{name}'", tree.name));
                        }
                        (Some(value), None, _) | (None, Some(value), _) => value,
                        (None, None, Some(default)) => this.eval(default)?,
                        (None, None, None) => Value::undefined(format!("parameter '{name}' was not provided")),
                    };
                    this.assign(name, value);
                }
                this.assign("caller", caller.unwrap_or_else(|| Value::undefined("No caller defined")));
                let rest = this.meter.sequence(SequenceKind::Tuple, positional.collect())?;
                this.assign("varargs", rest);
                let mut entries = Vec::new();
                for (name, value) in named {
                    entries.push((this.meter.own(&name)?, value));
                }
                let rest = this.meter.dict(entries)?;
                this.assign("kwargs", rest);
                this.body(&tree.body).map(drop)
            })
        })?;
        Ok(text)
    }

    fn function(&mut self, name: &str, given: Given) -> Outcome<Value> {
        let meter = &self.meter;
        match name {
            "range" => range(meter, &given),
            "dict" => {
                let mut entries = Vec::new();
                for pair in given.positional.first().map_or(Ok(Vec::new()), |pairs| pairs_of(meter, pairs))? {
                    insert(meter, &mut entries, pair.0, pair.1)?;
                }
                for (name, value) in given.named {
                    insert(meter, &mut entries, meter.own(&name)?, value)?;
                }
                meter.dict(entries)
            }
            "namespace" => {
                let mut entries = Vec::new();
                for (key, value) in given.positional.first().map_or(Ok(Vec::new()), |pairs| pairs_of(meter, pairs))? {
                    let Value::Text(key) = key else { return error("attribute name must be string") };
                    set_entry(&mut entries, key.to_text(), value);
                }
                given.named.into_iter().for_each(|(name, value)| set_entry(&mut entries, name, value));
                entries.iter().try_for_each(|(_, value)| value.depth().map(drop))?;
                Ok(Value::Namespace(Rc::new(entries.into())))
            }
            "raise_exception" => {
                let mut said = Vec::new();
                repr::write(meter, given.argument(0, "message").unwrap_or(&Value::None), &mut said)?;
                Err(Failure::Said(said.iter().map(|ch| super::plain(*ch)).collect()))
            }
            "strftime_now" => {
                let Some(Value::Text(format)) = given.argument(0, "format") else {
                    return error("strftime() needs a format");
                };
                meter.own(&time(&format.to_text(), self.now)?)
            }
            "cycler" => match given.positional.is_empty() {
                true => error("at least one item has to be provided"),
                false => {
                    let cycler = Value::Cycler(Rc::new((given.positional, 0.into())));
                    cycler.depth()?;
                    Ok(cycler)
                }
            },
            _ => {
                let separator = match given.argument(0, "sep") {
                    Some(Value::Text(separator)) => separator.clone(),
                    _ => super::Str::own(", "),
                };
                Ok(Value::Joiner(Rc::new((separator, false.into()))))
            }
        }
    }
}

fn loop_method(state: &LoopState, name: &str, given: Given) -> Outcome<Value> {
    if name == "cycle" {
        return match given.positional.len() {
            0 => error("no items for cycling given"),
            count => Ok(given.positional[state.at.get() % count].clone()),
        };
    }
    for value in &given.positional {
        if matches!(value, Value::Loop(_)) || value.depth().is_err() {
            return error("a loop can't tell whether this has changed");
        }
    }
    let mut last = state.last.borrow_mut();
    let same = last.as_ref().is_some_and(|last| {
        last.len() == given.positional.len() && last.iter().zip(&given.positional).all(|(a, b)| ops::equal(a, b))
    });
    *last = Some(given.positional);
    Ok(Value::Bool(!same))
}

/// The pairs of a dict, or of a list of pairs.
fn pairs_of(meter: &Arc<Meter>, value: &Value) -> Outcome<Vec<(Value, Value)>> {
    if let Value::Dict(dict) = value {
        return Ok(dict.entries.clone());
    }
    let pair = |item: &Value| match <[Value; 2]>::try_from(ops::items(meter, item)?) {
        Ok([key, value]) => Ok((key, value)),
        Err(items) => error(format!("dictionary update sequence element has length {}; 2 is required", items.len())),
    };
    ops::items(meter, value)?.iter().map(pair).collect()
}

fn range(meter: &Arc<Meter>, given: &Given) -> Outcome<Value> {
    let number = |value: &Value| match (value, value.integer()) {
        (Value::Undefined(message), _) => error(&**message),
        (_, Some(value)) => Ok(value),
        (other, None) => error(format!("'{}' object cannot be interpreted as an integer", other.type_name())),
    };
    let numbers = given.positional.iter().map(number).collect::<Outcome<Vec<i64>>>()?;
    let (from, to, by) = match numbers[..] {
        [to] => (0, to, 1),
        [from, to] => (from, to, 1),
        [from, to, by] => (from, to, by),
        _ => return error(format!("range expected 1 to 3 arguments, got {}", numbers.len())),
    };
    if by == 0 {
        return error("range() arg 3 must not be zero");
    }
    let span = if by > 0 { to.saturating_sub(from) } else { from.saturating_sub(to) };
    let count = span.max(0).saturating_add(by.saturating_abs() - 1) / by.saturating_abs();
    if count > MAX_RANGE {
        return error(format!("Range too big. The sandbox blocks ranges larger than MAX_RANGE ({MAX_RANGE})."));
    }
    meter.step(count as u64 / 4)?;
    let items = (0..count).map(|i| Value::Int(from + i * by)).collect();
    meter.sequence(SequenceKind::Range(from, to, by), items)
}

/// A time as C's `strftime` writes it.
fn time(format: &str, now: chrono::NaiveDateTime) -> Outcome<String> {
    const MOST: usize = 1 << 10;
    let items: Vec<Item<'_>> = StrftimeItems::new(format).collect();
    // A time without a zone has none to write, as Python's.
    let known = |item: &Item<'_>| !matches!(item, Item::Error);
    if format.len() > MOST || !items.iter().all(known) {
        return error("Invalid format string");
    }
    let local = chrono::TimeZone::from_utc_datetime(&chrono::Utc, &now);
    let mut out = String::new();
    match std::fmt::Write::write_fmt(&mut out, format_args!("{}", local.format_with_items(items.iter()))) {
        Ok(()) => Ok(out),
        Err(_) => error("Invalid format string"),
    }
}
