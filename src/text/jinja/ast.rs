//! A template's tree. Chains of one precedence are lists, so that the tree is as deep as the text is nested and no deeper.

use super::value::Str;

/// What stands in a template as it is.
#[derive(Debug, Clone)]
pub(super) enum Constant {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(Str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arithmetic {
    Add,
    Subtract,
    Multiply,
    Divide,
    FloorDivide,
    Modulo,
    Power,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    In,
    NotIn,
}

#[derive(Debug, Clone)]
pub(super) enum Expr {
    Constant(Constant),
    Name(String),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    /// What stands before, and what is done to it, one after the other.
    Postfix(Box<Expr>, Vec<Postfix>),
    Not(Box<Expr>),
    Negative(Box<Expr>),
    Positive(Box<Expr>),
    /// From left to right.
    Arithmetic(Box<Expr>, Vec<(Arithmetic, Expr)>),
    Concat(Vec<Expr>),
    Compare(Box<Expr>, Vec<(Comparison, Expr)>),
    And(Vec<Expr>),
    Or(Vec<Expr>),
    /// Condition, value, and value otherwise, or the line where there is none.
    Conditional(Box<Expr>, Box<Expr>, Result<Box<Expr>, usize>),
}

#[derive(Debug, Clone)]
pub(super) enum Postfix {
    Attribute(String),
    Item(Expr),
    Slice(Option<Expr>, Option<Expr>, Option<Expr>),
    Call(Arguments),
    Filter(String, Arguments),
    /// The name, its arguments, and whether it is negated.
    Test(String, Arguments, bool),
}

#[derive(Debug, Clone, Default)]
pub(super) struct Arguments {
    pub positional: Vec<Expr>,
    pub named: Vec<(String, Expr)>,
    /// `*list`.
    pub spread: Option<Box<Expr>>,
    /// `**dict`.
    pub spread_named: Option<Box<Expr>>,
}

/// What is assigned to.
#[derive(Debug, Clone)]
pub(super) enum Target {
    Name(String),
    /// An attribute of a namespace.
    Attribute(String, String),
    Tuple(Vec<Target>),
}

/// Names with their defaults.
pub(super) type Parameters = Vec<(String, Option<Expr>)>;

#[derive(Debug)]
pub(super) struct Macro {
    pub name: String,
    pub parameters: Parameters,
    pub body: Vec<Statement>,
}

#[derive(Debug)]
pub(super) struct For {
    pub target: Target,
    pub over: Expr,
    pub condition: Option<Expr>,
    pub recursive: bool,
    pub body: Vec<Statement>,
    pub otherwise: Vec<Statement>,
}

#[derive(Debug)]
pub(super) enum Statement {
    Text(Str),
    Print(Expr),
    /// Conditions with their bodies, in order.
    If(Vec<(Expr, Vec<Statement>)>, Vec<Statement>),
    For(Box<For>),
    Set(Target, Expr),
    /// A body's text, after filters.
    SetBlock(Target, Vec<Postfix>, Vec<Statement>),
    With(Vec<(Target, Expr)>, Vec<Statement>),
    Macro(Macro),
    /// The parameters of `caller`, the call, the body.
    CallBlock(Macro, Expr),
    FilterBlock(Vec<Postfix>, Vec<Statement>),
    /// A body with names of its own (`generation`).
    Scope(Vec<Statement>),
    Break,
    Continue,
}
