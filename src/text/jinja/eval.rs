//! Goes through a template's tree.

use std::rc::Rc;
use std::sync::Arc;

use chrono::NaiveDateTime;

use super::ast::{Arguments, Arithmetic, Comparison, Constant, Expr, For, Postfix, Statement, Target};
use super::filters::Given;
use super::value::{Charge, Defined, LoopState, Meter, Scope, SequenceKind, Str, Value};
use super::{DEPTH, Failure, Limits, Outcome, Rendered, calls, checks, error, filters, ops, repr};

/// Renders a template.
pub(super) fn render(
    body: &[Statement],
    given: &[(&'static str, super::Given)],
    limits: Limits,
    now: NaiveDateTime,
) -> Outcome<Rendered> {
    let meter = Meter::new(limits.steps, limits.held);
    let names = given.iter().map(|(name, given)| Ok((*name, value_of(&meter, given)?))).collect::<Outcome<Vec<_>>>()?;
    let context = Rc::new(Scope { names: names.into(), parent: None });
    let root = Rc::new(Scope { names: Vec::new().into(), parent: Some(context) });
    let out = Buffer { chars: Vec::new(), charge: meter.hold(0)? };
    let mut interpreter = Interpreter {
        meter,
        now,
        scope: root,
        macros: Vec::new(),
        loops: Vec::new(),
        out: vec![out],
        depth: 0,
        most_output: limits.output,
        unknown: Vec::new(),
    };
    interpreter.body(body)?;
    let chars = interpreter.out.pop().map(|buffer| buffer.chars).unwrap_or_default();
    Ok(Rendered { chars, unknown: interpreter.unknown })
}

fn value_of(meter: &Arc<Meter>, given: &super::Given) -> Outcome<Value> {
    Ok(match given {
        super::Given::Own(text) => Value::Text(Str::own(text)),
        super::Given::Foreign(text) => Value::Text(Str::foreign(text)),
        super::Given::Wrapped(before, text, after) => {
            let (before, text, after) = (Str::own(before), Str::foreign(text), Str::own(after));
            meter.text([before.chars(), text.chars(), after.chars()].concat())?
        }
        super::Given::None => Value::None,
        super::Given::Bool(value) => Value::Bool(*value),
        super::Given::List(items) => {
            meter.list(items.iter().map(|item| value_of(meter, item)).collect::<Outcome<_>>()?)?
        }
        super::Given::Dict(entries) => {
            let entry = |(name, given): &(&'static str, super::Given)| {
                Ok((Value::Text(Str::own(name)), value_of(meter, given)?))
            };
            meter.dict(entries.iter().map(entry).collect::<Outcome<_>>()?)?
        }
    })
}

/// Whether a loop goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Next,
    Break,
    Continue,
}

/// Text that is being written.
#[derive(Debug)]
struct Buffer {
    chars: Vec<u32>,
    charge: Charge,
}

pub(super) struct Interpreter<'t> {
    pub meter: Arc<Meter>,
    pub now: NaiveDateTime,
    pub scope: Rc<Scope<'t>>,
    pub macros: Vec<Defined<'t>>,
    pub loops: Vec<(&'t For, Rc<Scope<'t>>)>,
    /// The innermost last.
    out: Vec<Buffer>,
    depth: usize,
    most_output: usize,
    unknown: Vec<String>,
}

impl<'t> Interpreter<'t> {
    /// Does something one level deeper.
    fn deeper<T>(&mut self, what: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        self.depth += 1;
        if self.depth > DEPTH {
            return error("maximum recursion depth exceeded");
        }
        let done = what(self);
        self.depth -= 1;
        done
    }

    fn write(&mut self, chars: &[u32]) -> Outcome<()> {
        self.meter.work(chars.len())?;
        let outermost = self.out.len() == 1;
        if let Some(buffer) = self.out.last_mut() {
            buffer.charge.grow(chars.len() * 4)?;
            buffer.chars.extend_from_slice(chars);
            if outermost && buffer.chars.len() > self.most_output {
                return Err(Failure::TooMuchOutput(self.most_output));
            }
        }
        Ok(())
    }

    /// What a body writes, as a text of its own.
    pub fn captured(&mut self, what: impl FnOnce(&mut Self) -> Outcome<()>) -> Outcome<Value> {
        let charge = self.meter.hold(0)?;
        self.out.push(Buffer { chars: Vec::new(), charge });
        let done = what(self);
        let written = self.out.pop().map(|buffer| buffer.chars).unwrap_or_default();
        done?;
        self.meter.text(written)
    }

    /// Does something with names of its own, in a scope within this one.
    pub fn within<T>(&mut self, parent: Rc<Scope<'t>>, what: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        let inner = Rc::new(Scope { names: Vec::new().into(), parent: Some(parent) });
        let outer = std::mem::replace(&mut self.scope, inner);
        let done = what(self);
        self.scope = outer;
        done
    }

    pub fn assign(&mut self, name: &'t str, value: Value) {
        let mut names = self.scope.names.borrow_mut();
        match names.iter_mut().find(|(own, _)| *own == name) {
            Some((_, old)) => *old = value,
            None => names.push((name, value)),
        }
    }

    fn lookup(&self, name: &str) -> Value {
        let mut scope = Some(&self.scope);
        while let Some(here) = scope {
            if let Some((_, value)) = here.names.borrow().iter().find(|(own, _)| *own == name) {
                return value.clone();
            }
            scope = here.parent.as_ref();
        }
        match calls::FUNCTIONS.iter().find(|function| **function == name) {
            Some(function) => Value::Function(function),
            None => Value::undefined(format!("'{name}' is undefined")),
        }
    }

    // Statements.

    pub fn body(&mut self, body: &'t [Statement]) -> Outcome<Flow> {
        self.deeper(|this| {
            for statement in body {
                this.meter.step(1)?;
                match this.statement(statement)? {
                    Flow::Next => {}
                    flow => return Ok(flow),
                }
            }
            Ok(Flow::Next)
        })
    }

    fn statement(&mut self, statement: &'t Statement) -> Outcome<Flow> {
        match statement {
            Statement::Text(text) => self.write(text.chars())?,
            Statement::Print(expr) => self.print(expr)?,
            Statement::If(branches, otherwise) => {
                for (condition, body) in branches {
                    if self.eval(condition)?.truth() {
                        return self.body(body);
                    }
                }
                return self.body(otherwise);
            }
            Statement::For(tree) => {
                let over = self.eval(&tree.over)?;
                let scope = self.scope.clone();
                self.run_loop(tree, over, scope, 1)?;
            }
            Statement::Set(target, expr) => {
                let value = self.eval(expr)?;
                self.bind(target, value)?;
            }
            Statement::Scope(body) => return self.within(self.scope.clone(), |this| this.body(body)),
            Statement::Break => return Ok(Flow::Break),
            Statement::Continue => return Ok(Flow::Continue),
            other => self.rarer_statement(other)?,
        }
        Ok(Flow::Next)
    }

    fn rarer_statement(&mut self, statement: &'t Statement) -> Outcome<()> {
        let scope = self.scope.clone();
        match statement {
            Statement::SetBlock(target, filters, body) => {
                let text = self.captured(|this| this.within(scope, |this| this.body(body)).map(drop))?;
                let value = self.postfixes(text, filters)?;
                self.bind(target, value)
            }
            Statement::FilterBlock(filters, body) => {
                let text = self.captured(|this| this.within(scope, |this| this.body(body)).map(drop))?;
                let value = self.postfixes(text, filters)?;
                self.print_value(&value)
            }
            Statement::With(assigned, body) => {
                let values = assigned.iter().map(|(_, expr)| self.eval(expr)).collect::<Outcome<Vec<_>>>()?;
                self.within(scope, |this| {
                    for ((target, _), value) in assigned.iter().zip(values) {
                        this.bind(target, value)?;
                    }
                    this.body(body).map(drop)
                })
            }
            Statement::Macro(tree) => {
                let value = self.define(tree);
                self.assign(&tree.name, value);
                Ok(())
            }
            Statement::CallBlock(tree, call) => {
                let caller = self.define(tree);
                let value = self.call_with(call, caller)?;
                self.print_value(&value)
            }
            _ => Ok(()),
        }
    }

    fn print(&mut self, expr: &'t Expr) -> Outcome<()> {
        let value = self.eval(expr)?;
        if let (Value::Undefined(_), Expr::Name(name)) = (&value, expr)
            && !self.unknown.contains(name)
        {
            self.unknown.push(name.clone());
        }
        self.print_value(&value)
    }

    fn print_value(&mut self, value: &Value) -> Outcome<()> {
        match repr::string(&self.meter, value)? {
            Value::Text(text) => self.write(text.chars()),
            _ => Ok(()),
        }
    }

    fn bind(&mut self, target: &'t Target, value: Value) -> Outcome<()> {
        match target {
            Target::Name(name) => {
                self.assign(name, value);
                Ok(())
            }
            Target::Attribute(name, attribute) => match self.lookup(name) {
                Value::Namespace(entries) => {
                    value.depth()?;
                    if attribute.starts_with('_') {
                        return error(format!("a namespace has no attribute {attribute:?} of a template's own"));
                    }
                    calls::set_entry(&mut entries.borrow_mut(), attribute.clone(), value);
                    Ok(())
                }
                _ => error("cannot assign attribute on non-namespace object"),
            },
            Target::Tuple(targets) => {
                let values = match &value {
                    Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) => {
                        return error(format!("cannot unpack non-iterable {} object", value.type_name()));
                    }
                    _ => ops::items(&self.meter, &value)?,
                };
                if values.len() < targets.len() {
                    let (expected, got) = (targets.len(), values.len());
                    return error(format!("not enough values to unpack (expected {expected}, got {got})"));
                }
                if values.len() > targets.len() {
                    return error(format!("too many values to unpack (expected {})", targets.len()));
                }
                targets.iter().zip(values).try_for_each(|(target, value)| self.bind(target, value))
            }
        }
    }

    /// A loop over a value, with names looked up from a scope.
    pub fn run_loop(&mut self, tree: &'t For, over: Value, scope: Rc<Scope<'t>>, depth: usize) -> Outcome<()> {
        let mut items = ops::items(&self.meter, &over)?;
        if let Some(condition) = &tree.condition {
            let mut kept = Vec::new();
            for item in items {
                let keeps = self.within(scope.clone(), |this| {
                    this.bind(&tree.target, item.clone())?;
                    this.eval(condition)
                })?;
                kept.extend(Some(item).filter(|_| keeps.truth()));
            }
            items = kept;
        }
        if items.is_empty() {
            return self.within(scope, |this| this.body(&tree.otherwise)).map(drop);
        }
        let recursive = tree.recursive.then(|| {
            self.loops.push((tree, scope.clone()));
            self.loops.len() - 1
        });
        let items = self.meter.list(items)?;
        let state = LoopState { items, at: 0.into(), depth, last: None.into(), recursive };
        self.iterate(tree, &Rc::new(state), &scope)
    }

    fn iterate(&mut self, tree: &'t For, state: &Rc<LoopState>, scope: &Rc<Scope<'t>>) -> Outcome<()> {
        let Value::Sequence(sequence) = &state.items else { return Ok(()) };
        for (at, item) in sequence.items.iter().enumerate() {
            self.meter.step(1)?;
            state.at.set(at);
            let flow = self.within(scope.clone(), |this| {
                this.assign("loop", Value::Loop(state.clone()));
                this.bind(&tree.target, item.clone())?;
                this.body(&tree.body)
            })?;
            if flow == Flow::Break {
                break;
            }
        }
        Ok(())
    }

    // Expressions.

    pub fn eval(&mut self, expr: &'t Expr) -> Outcome<Value> {
        self.meter.step(1)?;
        match expr {
            Expr::Constant(constant) => Ok(match constant {
                Constant::None => Value::None,
                Constant::Bool(value) => Value::Bool(*value),
                Constant::Int(value) => Value::Int(*value),
                Constant::Float(value) => Value::Float(*value),
                Constant::Text(text) => Value::Text(text.clone()),
            }),
            Expr::Name(name) => Ok(self.lookup(name)),
            compound => self.deeper(|this| this.compound(compound)),
        }
    }

    fn compound(&mut self, expr: &'t Expr) -> Outcome<Value> {
        match expr {
            Expr::Postfix(value, postfixes) => {
                let value = self.eval(value)?;
                self.postfixes(value, postfixes)
            }
            Expr::Not(value) => Ok(Value::Bool(!self.eval(value)?.truth())),
            Expr::And(parts) => self.until(parts, false),
            Expr::Or(parts) => self.until(parts, true),
            Expr::Conditional(condition, value, otherwise) => match (self.eval(condition)?.truth(), otherwise) {
                (true, _) => self.eval(value),
                (false, Ok(otherwise)) => self.eval(otherwise),
                (false, Err(line)) => Ok(Value::undefined(format!(
                    "the inline if-expression on line {line} evaluated to false and no else section was defined."
                ))),
            },
            Expr::Compare(first, compared) => self.compare(first, compared),
            Expr::Arithmetic(first, rest) => self.arithmetic(first, rest),
            Expr::Concat(parts) => self.concat(parts),
            Expr::Negative(value) => ops::negative(&self.eval(value)?),
            Expr::Positive(value) => ops::negative(&ops::negative(&self.eval(value)?)?),
            other => self.collection(other),
        }
    }

    fn collection(&mut self, expr: &'t Expr) -> Outcome<Value> {
        match expr {
            Expr::List(items) => {
                let items = items.iter().map(|item| self.eval(item)).collect::<Outcome<_>>()?;
                self.meter.list(items)
            }
            Expr::Tuple(items) => {
                let items = items.iter().map(|item| self.eval(item)).collect::<Outcome<_>>()?;
                self.meter.sequence(SequenceKind::Tuple, items)
            }
            Expr::Dict(entries) => {
                let mut dict: Vec<(Value, Value)> = Vec::new();
                for (key, value) in entries {
                    let (key, value) = (self.eval(key)?, self.eval(value)?);
                    calls::insert(&self.meter, &mut dict, key, value)?;
                }
                self.meter.dict(dict)
            }
            _ => Ok(Value::None),
        }
    }

    /// The first value whose truth is `wanted`, else the last.
    fn until(&mut self, parts: &'t [Expr], wanted: bool) -> Outcome<Value> {
        let mut value = Value::None;
        for part in parts {
            value = self.eval(part)?;
            if value.truth() == wanted {
                break;
            }
        }
        Ok(value)
    }

    fn arithmetic(&mut self, first: &'t Expr, rest: &'t [(Arithmetic, Expr)]) -> Outcome<Value> {
        let mut value = self.eval(first)?;
        for (operation, other) in rest {
            let other = self.eval(other)?;
            value = ops::arithmetic(&self.meter, *operation, &value, &other)?;
        }
        Ok(value)
    }

    fn concat(&mut self, parts: &'t [Expr]) -> Outcome<Value> {
        let mut chars = Vec::new();
        for part in parts {
            let value = self.eval(part)?;
            repr::write(&self.meter, &value, &mut chars)?;
        }
        self.meter.text(chars)
    }

    fn compare(&mut self, first: &'t Expr, compared: &'t [(Comparison, Expr)]) -> Outcome<Value> {
        let mut left = self.eval(first)?;
        for (comparison, right) in compared {
            let right = self.eval(right)?;
            if !checks::compare(&self.meter, *comparison, &left, &right)? {
                return Ok(Value::Bool(false));
            }
            left = right;
        }
        Ok(Value::Bool(true))
    }

    fn postfixes(&mut self, value: Value, postfixes: &'t [Postfix]) -> Outcome<Value> {
        let mut value = value;
        for postfix in postfixes {
            self.meter.step(1)?;
            value = self.postfix(value, postfix)?;
        }
        Ok(value)
    }

    fn postfix(&mut self, value: Value, postfix: &'t Postfix) -> Outcome<Value> {
        match postfix {
            Postfix::Attribute(name) => ops::attribute(&self.meter, &value, name),
            Postfix::Item(key) => {
                let key = self.eval(key)?;
                ops::item(&self.meter, &value, &key)
            }
            Postfix::Slice(from, to, by) => {
                let mut bound = |expr: &'t Option<Expr>| expr.as_ref().map(|expr| self.eval(expr)).transpose();
                let bounds = [bound(from)?, bound(to)?, bound(by)?];
                ops::slice(&self.meter, &value, bounds)
            }
            Postfix::Call(arguments) => {
                let given = self.arguments(arguments)?;
                self.call(&value, given)
            }
            Postfix::Filter(name, arguments) => {
                let given = self.arguments(arguments)?;
                filters::apply(self, name, value, &given)
            }
            Postfix::Test(name, arguments, negated) => {
                let given = self.arguments(arguments)?;
                Ok(Value::Bool(checks::check(&self.meter, name, &value, &given.positional)? != *negated))
            }
        }
    }

    pub fn arguments(&mut self, arguments: &'t Arguments) -> Outcome<Given> {
        let mut given = Given::default();
        for expr in &arguments.positional {
            given.positional.push(self.eval(expr)?);
        }
        if let Some(spread) = &arguments.spread {
            let spread = self.eval(spread)?;
            given.positional.extend(ops::items(&self.meter, &spread)?);
        }
        for (name, expr) in &arguments.named {
            given.named.push((name.clone(), self.eval(expr)?));
        }
        if let Some(spread) = &arguments.spread_named {
            match self.eval(spread)? {
                Value::Dict(dict) => {
                    self.meter.step(dict.entries.len() as u64)?;
                    let named = |(key, value): &(Value, Value)| match key {
                        Value::Text(key) => Ok((key.to_text(), value.clone())),
                        _ => error("keywords must be strings"),
                    };
                    given.named.extend(dict.entries.iter().map(named).collect::<Outcome<Vec<_>>>()?);
                }
                other => return error(format!("argument after ** must be a mapping, not {}", other.type_name())),
            }
        }
        Ok(given)
    }
}
