//! Jinja as chat templates use it, rendered as Python's does: its printing, its truth, its indices, its errors.
//!
//! A template comes from a stranger's file. A rendering has a number of steps, of bytes that its values may hold, and of bytes that it may
//! write; each is looked at before the work is done or the memory taken.

mod ast;
mod calls;
mod checks;
mod eval;
mod filters;
mod format;
mod lexer;
mod ops;
mod parser;
mod repr;
mod strings;
mod tags;
#[cfg(test)]
mod tests;
mod value;

use chrono::NaiveDateTime;

pub(super) use value::{FOREIGN, Str, plain};

/// How deep a template and what it calls may be nested.
const DEPTH: usize = 120;
/// Most bytes of a template.
const MAX_SOURCE: usize = 1 << 20;

/// Why a template does not parse or render.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Failure {
    /// With the line.
    Syntax(String),
    /// In the words of the template's `raise_exception`.
    Said(String),
    /// In Python's words.
    Error(String),
    /// How many there may be.
    TooManySteps(u64),
    /// How many bytes values may hold.
    TooMuchMemory(usize),
    /// How many bytes there may be written.
    TooMuchOutput(usize),
}

type Outcome<T> = Result<T, Failure>;

fn error<T>(message: impl Into<String>) -> Outcome<T> {
    Err(Failure::Error(message.into()))
}

/// What a rendering may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Operations.
    pub steps: u64,
    /// Bytes that its values may hold at a time.
    pub held: usize,
    /// Bytes of the text that it writes.
    pub output: usize,
}

/// What a template is given.
#[derive(Debug, Clone)]
pub(super) enum Given {
    /// A text that is the caller's own.
    Own(String),
    /// A text of a message.
    Foreign(String),
    /// With marks around it that are the caller's own.
    Wrapped(String, String, String),
    /// Python's none.
    None,
    /// True or false.
    Bool(bool),
    /// In order.
    List(Vec<Given>),
    /// Names with their values, in order.
    Dict(Vec<(&'static str, Given)>),
}

/// What was rendered.
#[derive(Debug)]
pub(super) struct Rendered {
    /// Code points, with [`FOREIGN`].
    pub chars: Vec<u32>,
    /// Names that were printed and that nothing had given a value, in order.
    pub unknown: Vec<String>,
}

/// A template that was parsed.
#[derive(Debug)]
pub(super) struct Template {
    source: String,
    body: Vec<ast::Statement>,
}

impl Template {
    /// # Errors
    /// Where it does not parse.
    pub fn parse(source: String) -> Outcome<Self> {
        if source.len() > MAX_SOURCE {
            return Err(Failure::Syntax(format!("has {} bytes; at most {MAX_SOURCE} are read", source.len())));
        }
        let body = parser::parse(&source)?;
        Ok(Self { source, body })
    }

    pub fn source(&self) -> &str {
        &self.source
    }

    /// # Errors
    /// What the template says, or which limit it has reached.
    pub fn render(&self, given: &[(&'static str, Given)], limits: Limits, now: NaiveDateTime) -> Outcome<Rendered> {
        eval::render(&self.body, given, limits, now)
    }
}
