//! Values as Python has them, and the meter that bounds what a rendering computes and holds.
//!
//! A text is a list of code points, as Python indexes it. The highest bit of each says that it comes from a message: whatever a template does
//! with a text, what it makes of it is known to be the message's.

use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::ast::Macro;
use super::{DEPTH, Failure, Outcome, error};

/// Set in a code point that comes from a message.
pub(in crate::text) const FOREIGN: u32 = 1 << 31;

/// The character of a code point.
pub(in crate::text) fn plain(ch: u32) -> char {
    char::from_u32(ch & !FOREIGN).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// What a rendering may still do.
#[derive(Debug)]
pub(super) struct Meter {
    steps: AtomicU64,
    most_steps: u64,
    /// Bytes of values that are alive.
    held: AtomicUsize,
    most_held: usize,
}

impl Meter {
    pub fn new(most_steps: u64, most_held: usize) -> Arc<Self> {
        Arc::new(Self { steps: AtomicU64::new(0), most_steps, held: AtomicUsize::new(0), most_held })
    }

    /// Counts operations.
    pub fn step(&self, count: u64) -> Outcome<()> {
        let before = self.steps.fetch_add(count, Ordering::Relaxed);
        match before.saturating_add(count) > self.most_steps {
            true => Err(Failure::TooManySteps(self.most_steps)),
            false => Ok(()),
        }
    }

    /// Counts work over so many items.
    pub fn work(&self, items: usize) -> Outcome<()> {
        self.step(1 + items as u64 / 32)
    }

    /// Counts bytes until what is returned goes.
    pub fn hold(self: &Arc<Self>, bytes: usize) -> Outcome<Charge> {
        self.room(bytes)?;
        self.held.fetch_add(bytes, Ordering::Relaxed);
        Ok(Charge { bytes, meter: self.clone() })
    }

    /// Fails where so many bytes are more than there is room for.
    pub fn room(&self, bytes: usize) -> Outcome<()> {
        match self.held.load(Ordering::Relaxed).saturating_add(bytes) > self.most_held {
            true => Err(Failure::TooMuchMemory(self.most_held)),
            false => Ok(()),
        }
    }

    /// Fails where a text of so many code points has no room; counts the work of making it.
    pub fn text_room(&self, chars: usize) -> Outcome<()> {
        self.room(chars.saturating_mul(4))?;
        self.work(chars)
    }

    /// Fails where a text that is being made has no room for more code points; counts the work of adding them.
    pub fn more_text(&self, chars: usize, more: usize) -> Outcome<()> {
        self.room(chars.saturating_add(more).saturating_mul(4))?;
        self.work(more)
    }

    /// A text of code points.
    pub fn text(self: &Arc<Self>, chars: Vec<u32>) -> Outcome<Value> {
        self.work(chars.len())?;
        let charge = self.hold(chars.len() * 4 + 64)?;
        Ok(Value::Text(Str(Arc::new(Chars { chars, charge: Some(charge) }))))
    }

    /// A text of the template's own.
    pub fn own(self: &Arc<Self>, text: &str) -> Outcome<Value> {
        self.text(text.chars().map(u32::from).collect())
    }

    pub fn sequence(self: &Arc<Self>, kind: SequenceKind, items: Vec<Value>) -> Outcome<Value> {
        self.work(items.len())?;
        let charge = self.hold(items.len() * size_of::<Value>() + 64)?;
        let depth = depth_over(&items)?;
        Ok(Value::Sequence(Rc::new(Sequence { kind, items, depth, _charge: charge })))
    }

    pub fn list(self: &Arc<Self>, items: Vec<Value>) -> Outcome<Value> {
        self.sequence(SequenceKind::List, items)
    }

    pub fn dict(self: &Arc<Self>, entries: Vec<(Value, Value)>) -> Outcome<Value> {
        let charge = self.hold(entries.len() * 2 * size_of::<Value>() + 64)?;
        let depth = depth_over(entries.iter().flat_map(|(key, value)| [key, value]))?;
        Ok(Value::Dict(Rc::new(Dict { entries, depth, _charge: charge })))
    }
}

/// How deep what holds these values is nested: what is deeper than the stack could not be dropped. No value holds a namespace, which could
/// come to hold that value.
fn depth_over<'v>(values: impl IntoIterator<Item = &'v Value>) -> Outcome<usize> {
    let mut deepest = 0;
    for value in values {
        deepest = deepest.max(value.depth()?);
    }
    match deepest >= DEPTH {
        true => error(format!("values are nested deeper than {DEPTH}")),
        false => Ok(deepest + 1),
    }
}

/// Bytes that are held.
#[derive(Debug)]
pub(super) struct Charge {
    bytes: usize,
    meter: Arc<Meter>,
}

impl Charge {
    /// Counts more bytes.
    pub fn grow(&mut self, bytes: usize) -> Outcome<()> {
        self.meter.room(bytes)?;
        self.meter.held.fetch_add(bytes, Ordering::Relaxed);
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.meter.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Chars {
    chars: Vec<u32>,
    #[expect(dead_code, reason = "counts the bytes until it is dropped")]
    charge: Option<Charge>,
}

/// A text; cloning it copies nothing.
#[derive(Debug, Clone)]
pub(in crate::text) struct Str(Arc<Chars>);

impl Str {
    /// A text of the template or of its caller.
    pub fn own(text: &str) -> Self {
        Self(Arc::new(Chars { chars: text.chars().map(u32::from).collect(), charge: None }))
    }

    /// A message's text.
    pub fn foreign(text: &str) -> Self {
        Self(Arc::new(Chars { chars: text.chars().map(|ch| u32::from(ch) | FOREIGN).collect(), charge: None }))
    }

    /// Code points, with [`FOREIGN`].
    pub fn chars(&self) -> &[u32] {
        &self.0.chars
    }

    /// Whether it is this text, whoever it comes from.
    pub fn is(&self, text: &str) -> bool {
        let mut chars = text.chars();
        self.chars().iter().all(|ch| chars.next() == Some(plain(*ch))) && chars.next().is_none()
    }

    pub fn to_text(&self) -> String {
        self.chars().iter().map(|ch| plain(*ch)).collect()
    }
}

/// Whether two texts are equal, whoever they come from.
pub(super) fn same(a: &[u32], b: &[u32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a & !FOREIGN == b & !FOREIGN)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SequenceKind {
    List,
    Tuple,
    /// What `map` and its like give: no length, and printed as no list.
    Generator,
    /// From, to, by.
    Range(i64, i64, i64),
    /// What a dict's `items` and its like give, by Python's name.
    View(&'static str),
}

impl SequenceKind {
    /// Whether Python finds its items by their places.
    pub fn has_places(self) -> bool {
        !matches!(self, Self::Generator | Self::View(_))
    }

    /// Whether two can be added.
    pub fn adds(self) -> bool {
        matches!(self, Self::List | Self::Tuple)
    }
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub kind: SequenceKind,
    pub items: Vec<Value>,
    depth: usize,
    _charge: Charge,
}

#[derive(Debug)]
pub(super) struct Dict {
    /// In the order in which they were put there.
    pub entries: Vec<(Value, Value)>,
    depth: usize,
    _charge: Charge,
}

/// Names that a block of the template has, and the block that it stands in.
#[derive(Debug)]
pub(super) struct Scope<'t> {
    pub names: RefCell<Vec<(&'t str, Value)>>,
    pub parent: Option<Rc<Scope<'t>>>,
}

/// A macro of the template.
#[derive(Debug)]
pub(super) struct MacroValue {
    /// Its place in the interpreter's list.
    pub number: usize,
    pub name: String,
}

/// What a loop knows of itself.
#[derive(Debug)]
pub(super) struct LoopState {
    pub items: Value,
    pub at: std::cell::Cell<usize>,
    pub depth: usize,
    /// What `changed` was given last.
    pub last: RefCell<Option<Vec<Value>>>,
    /// The loop's place in the interpreter's list, where it is recursive.
    pub recursive: Option<usize>,
}

#[derive(Debug, Clone)]
pub(super) enum Value {
    /// With what is said when it is used.
    Undefined(Rc<str>),
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(Str),
    Sequence(Rc<Sequence>),
    Dict(Rc<Dict>),
    Namespace(Rc<RefCell<Vec<(String, Value)>>>),
    Function(&'static str),
    /// A method that is not called yet.
    Method(Rc<(Value, String)>),
    Macro(Rc<MacroValue>),
    Loop(Rc<LoopState>),
    /// What `cycler` gives: its values and which is next.
    Cycler(Rc<(Vec<Value>, std::cell::Cell<usize>)>),
    /// What `joiner` gives: its separator and whether it was used.
    Joiner(Rc<(Str, std::cell::Cell<bool>)>),
}

impl Value {
    pub fn undefined(message: impl Into<Rc<str>>) -> Self {
        Self::Undefined(message.into())
    }

    /// Python's name of the type.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Text(_) => "str",
            Self::Sequence(sequence) => match sequence.kind {
                SequenceKind::List => "list",
                SequenceKind::Tuple => "tuple",
                SequenceKind::Generator => "generator",
                SequenceKind::Range(..) => "range",
                SequenceKind::View(name) => name,
            },
            Self::Dict(_) => "dict",
            Self::Namespace(_) => "Namespace",
            Self::Function(_) => "function",
            Self::Method(_) => "builtin_function_or_method",
            Self::Macro(_) => "Macro",
            Self::Loop(_) => "LoopContext",
            Self::Cycler(_) => "Cycler",
            Self::Joiner(_) => "Joiner",
        }
    }

    /// How deep it is nested.
    ///
    /// # Errors
    /// Where it is a namespace, which nothing may hold but a name.
    pub fn depth(&self) -> Outcome<usize> {
        match self {
            Self::Sequence(sequence) => Ok(sequence.depth),
            Self::Dict(dict) => Ok(dict.depth),
            Self::Method(method) => Ok(method.0.depth()? + 1),
            Self::Loop(state) => Ok(state.items.depth()? + 1),
            Self::Cycler(cycler) => depth_over(&cycler.0),
            Self::Namespace(_) => error("a namespace can't be held by another value"),
            _ => Ok(0),
        }
    }

    /// What Python takes for true.
    pub fn truth(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(value) => *value,
            Self::Int(value) => *value != 0,
            Self::Float(value) => *value != 0.0,
            Self::Text(text) => !text.chars().is_empty(),
            Self::Sequence(sequence) => sequence.kind == SequenceKind::Generator || !sequence.items.is_empty(),
            Self::Dict(dict) => !dict.entries.is_empty(),
            _ => true,
        }
    }

    /// A whole number, as Python takes booleans for.
    pub fn integer(&self) -> Option<i64> {
        match self {
            Self::Bool(value) => Some(i64::from(*value)),
            Self::Int(value) => Some(*value),
            _ => None,
        }
    }

    pub fn number(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            other => other.integer().map(|value| value as f64),
        }
    }

    /// The names of an entry's keys are mostly texts.
    pub fn is_text(&self, text: &str) -> bool {
        matches!(self, Self::Text(own) if own.is(text))
    }
}

impl Dict {
    /// The value of a key.
    pub fn get(&self, key: &Value) -> Option<&Value> {
        self.entries.iter().find(|(own, _)| super::ops::equal(own, key)).map(|(_, value)| value)
    }

    pub fn get_text(&self, key: &str) -> Option<&Value> {
        self.entries.iter().find(|(own, _)| own.is_text(key)).map(|(_, value)| value)
    }
}

/// A macro that was defined: its tree, and the names that it sees.
pub(super) struct Defined<'t> {
    pub tree: &'t Macro,
    pub scope: Weak<Scope<'t>>,
}
