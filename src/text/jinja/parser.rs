//! From tokens to a tree: a template's expressions, with Jinja's precedences. Its tags are in `tags.rs`.

use super::ast::{Arguments, Arithmetic, Comparison, Constant, Expr, Postfix, Statement};
use super::lexer::{Token, tokens};
use super::value::Str;
use super::{Failure, Outcome};

/// How deep tags and parentheses may be nested.
const NESTING: usize = 48;

/// Parses a template.
pub(super) fn parse(source: &str) -> Outcome<Vec<Statement>> {
    let mut parser = Parser { tokens: tokens(source)?, at: 0, depth: 0 };
    let (body, end) = parser.body(&[])?;
    match end {
        None => Ok(body),
        Some(name) => parser.fail(format!("unexpected tag {name:?}")),
    }
}

/// Where the reading of a template stands.
pub(super) struct Parser {
    tokens: Vec<(Token, usize)>,
    pub(super) at: usize,
    depth: usize,
}

impl Parser {
    pub(super) fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|(token, _)| token)
    }

    fn line(&self) -> usize {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(1, |(_, line)| *line)
    }

    pub(super) fn fail<T>(&self, what: impl std::fmt::Display) -> Outcome<T> {
        Err(Failure::Syntax(format!("line {}: {what}", self.line())))
    }

    pub(super) fn is(&self, operator: &str) -> bool {
        matches!(self.peek(), Some(Token::Operator(own)) if *own == operator)
    }

    pub(super) fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Some(Token::Name(own)) if own == name)
    }

    pub(super) fn take(&mut self, operator: &str) -> bool {
        let found = self.is(operator);
        self.at += usize::from(found);
        found
    }

    pub(super) fn take_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        self.at += usize::from(found);
        found
    }

    pub(super) fn want(&mut self, operator: &str) -> Outcome<()> {
        match self.take(operator) {
            true => Ok(()),
            false => self.fail(format!("expected {operator:?}")),
        }
    }

    pub(super) fn name(&mut self) -> Outcome<String> {
        let Some(Token::Name(name)) = self.peek() else { return self.fail("expected a name") };
        let name = name.clone();
        self.at += 1;
        Ok(name)
    }

    pub(super) fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        self.depth += 1;
        if self.depth > NESTING {
            return self.fail(format!("is nested deeper than {NESTING}"));
        }
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    /// One expression, or several with commas between: a tuple.
    pub(super) fn tuple(&mut self) -> Outcome<Expr> {
        self.tuple_of(Self::expression)
    }

    pub(super) fn tuple_without_condition(&mut self) -> Outcome<Expr> {
        self.tuple_of(Self::disjunction)
    }

    fn tuple_of(&mut self, mut item: impl FnMut(&mut Self) -> Outcome<Expr>) -> Outcome<Expr> {
        let first = item(self)?;
        if !self.is(",") {
            return Ok(first);
        }
        let mut items = vec![first];
        while self.take(",") {
            if matches!(self.peek(), Some(Token::BlockEnd | Token::VariableEnd)) || self.is(")") || self.is_name("in") {
                break;
            }
            items.push(item(self)?);
        }
        Ok(Expr::Tuple(items))
    }

    pub(super) fn expression(&mut self) -> Outcome<Expr> {
        self.deeper(|parser| {
            let mut value = parser.disjunction()?;
            let line = parser.line();
            while parser.take_name("if") {
                let condition = parser.disjunction()?;
                let otherwise = if parser.take_name("else") { Ok(Box::new(parser.expression()?)) } else { Err(line) };
                value = Expr::Conditional(Box::new(condition), Box::new(value), otherwise);
            }
            Ok(value)
        })
    }

    fn disjunction(&mut self) -> Outcome<Expr> {
        self.chain("or", Self::conjunction, Expr::Or)
    }

    fn conjunction(&mut self) -> Outcome<Expr> {
        self.chain("and", Self::negation, Expr::And)
    }

    fn chain(
        &mut self,
        word: &str,
        mut part: impl FnMut(&mut Self) -> Outcome<Expr>,
        whole: impl FnOnce(Vec<Expr>) -> Expr,
    ) -> Outcome<Expr> {
        let first = part(self)?;
        if !self.is_name(word) {
            return Ok(first);
        }
        let mut parts = vec![first];
        while self.take_name(word) {
            parts.push(part(self)?);
        }
        Ok(whole(parts))
    }

    fn negation(&mut self) -> Outcome<Expr> {
        if self.take_name("not") {
            return self.deeper(|parser| Ok(Expr::Not(Box::new(parser.negation()?))));
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Outcome<Expr> {
        const SIGNS: [(&str, Comparison); 6] = [
            ("==", Comparison::Equal),
            ("!=", Comparison::NotEqual),
            ("<", Comparison::Less),
            ("<=", Comparison::LessEqual),
            (">", Comparison::Greater),
            (">=", Comparison::GreaterEqual),
        ];
        let first = self.sum()?;
        let mut compared = Vec::new();
        loop {
            let sign = SIGNS.iter().find(|(sign, _)| self.is(sign)).map(|(_, comparison)| *comparison);
            let next_is_in = matches!(self.tokens.get(self.at + 1), Some((Token::Name(name), _)) if name == "in");
            let comparison = match sign {
                Some(sign) => sign,
                None if self.is_name("in") => Comparison::In,
                None if self.is_name("not") && next_is_in => {
                    self.at += 1;
                    Comparison::NotIn
                }
                None => break,
            };
            self.at += 1;
            compared.push((comparison, self.sum()?));
        }
        match compared.is_empty() {
            true => Ok(first),
            false => Ok(Expr::Compare(Box::new(first), compared)),
        }
    }

    fn arithmetic(
        &mut self,
        signs: &[(&str, Arithmetic)],
        mut part: impl FnMut(&mut Self) -> Outcome<Expr>,
    ) -> Outcome<Expr> {
        let first = part(self)?;
        let mut rest = Vec::new();
        while let Some((_, sign)) = signs.iter().find(|(sign, _)| self.is(sign)) {
            self.at += 1;
            rest.push((*sign, part(self)?));
        }
        match rest.is_empty() {
            true => Ok(first),
            false => Ok(Expr::Arithmetic(Box::new(first), rest)),
        }
    }

    fn sum(&mut self) -> Outcome<Expr> {
        self.arithmetic(&[("+", Arithmetic::Add), ("-", Arithmetic::Subtract)], Self::concat)
    }

    fn concat(&mut self) -> Outcome<Expr> {
        let first = self.product()?;
        if !self.is("~") {
            return Ok(first);
        }
        let mut parts = vec![first];
        while self.take("~") {
            parts.push(self.product()?);
        }
        Ok(Expr::Concat(parts))
    }

    fn product(&mut self) -> Outcome<Expr> {
        const SIGNS: [(&str, Arithmetic); 4] = [
            ("*", Arithmetic::Multiply),
            ("/", Arithmetic::Divide),
            ("//", Arithmetic::FloorDivide),
            ("%", Arithmetic::Modulo),
        ];
        self.arithmetic(&SIGNS, |parser| parser.arithmetic(&[("**", Arithmetic::Power)], |parser| parser.unary(true)))
    }

    fn unary(&mut self, with_filters: bool) -> Outcome<Expr> {
        let signed: Option<fn(Box<Expr>) -> Expr> = match () {
            () if self.take("-") => Some(Expr::Negative),
            () if self.take("+") => Some(Expr::Positive),
            () => None,
        };
        let value = match signed {
            Some(signed) => signed(Box::new(self.deeper(|parser| parser.unary(false))?)),
            None => self.primary()?,
        };
        let mut after = Vec::new();
        if signed.is_none() {
            self.postfix(&mut after)?;
        }
        if with_filters {
            self.filters_and_tests(&mut after)?;
        }
        match after.is_empty() {
            true => Ok(value),
            false => Ok(Expr::Postfix(Box::new(value), after)),
        }
    }

    pub(super) fn filter(&mut self) -> Outcome<Postfix> {
        let mut name = self.name()?;
        while self.take(".") {
            name = format!("{name}.{}", self.name()?);
        }
        let arguments = if self.take("(") { self.arguments()? } else { Arguments::default() };
        Ok(Postfix::Filter(name, arguments))
    }

    fn filters_and_tests(&mut self, after: &mut Vec<Postfix>) -> Outcome<()> {
        loop {
            if self.take("|") {
                after.push(self.filter()?);
            } else if self.take_name("is") {
                after.push(self.test()?);
            } else if self.take("(") {
                after.push(Postfix::Call(self.arguments()?));
            } else {
                return Ok(());
            }
        }
    }

    fn postfix(&mut self, after: &mut Vec<Postfix>) -> Outcome<()> {
        loop {
            if self.take(".") {
                after.push(match self.peek() {
                    Some(Token::Int(index)) => {
                        let index = Expr::Constant(Constant::Int(*index));
                        self.at += 1;
                        Postfix::Item(index)
                    }
                    _ => Postfix::Attribute(self.name()?),
                });
            } else if self.take("[") {
                after.push(self.deeper(Self::subscript)?);
            } else if self.take("(") {
                after.push(Postfix::Call(self.arguments()?));
            } else {
                return Ok(());
            }
        }
    }

    /// What stands in brackets after a value.
    fn subscript(&mut self) -> Outcome<Postfix> {
        let mut parts = [None, None, None];
        let mut colons = 0;
        loop {
            if self.is(":") && colons < 2 {
                self.at += 1;
                colons += 1;
            } else if self.take("]") {
                break;
            } else if parts[colons].is_none() {
                parts[colons] = Some(self.expression()?);
            } else {
                return self.fail("expected \"]\"");
            }
        }
        let [from, to, by] = parts;
        match (colons, from) {
            (0, Some(item)) => Ok(Postfix::Item(item)),
            (0, None) => self.fail("expected an index"),
            (_, from) => Ok(Postfix::Slice(from, to, by)),
        }
    }

    fn test(&mut self) -> Outcome<Postfix> {
        let negated = self.take_name("not");
        let name = self.name()?;
        let mut arguments = Arguments::default();
        if self.take("(") {
            arguments = self.arguments()?;
        } else {
            let ends = ["else", "or", "and", "is", "if", "in", "not", "recursive"];
            let begins = match self.peek() {
                Some(Token::Name(name)) => !ends.contains(&name.as_str()),
                Some(Token::String(_) | Token::Int(_) | Token::Float(_)) => true,
                _ => self.is("[") || self.is("{"),
            };
            if begins {
                let value = self.primary()?;
                let mut after = Vec::new();
                self.postfix(&mut after)?;
                arguments.positional.push(match after.is_empty() {
                    true => value,
                    false => Expr::Postfix(Box::new(value), after),
                });
            }
        }
        Ok(Postfix::Test(name, arguments, negated))
    }

    /// After the opening parenthesis.
    fn arguments(&mut self) -> Outcome<Arguments> {
        self.deeper(|parser| {
            let mut arguments = Arguments::default();
            let mut first = true;
            while !parser.take(")") {
                if !first {
                    parser.want(",")?;
                    if parser.take(")") {
                        break;
                    }
                }
                first = false;
                parser.argument(&mut arguments)?;
            }
            Ok(arguments)
        })
    }

    fn argument(&mut self, arguments: &mut Arguments) -> Outcome<()> {
        if self.take("**") {
            arguments.spread_named = Some(Box::new(self.expression()?));
        } else if self.take("*") {
            arguments.spread = Some(Box::new(self.expression()?));
        } else if let (Some(Token::Name(name)), Some((Token::Operator("="), _))) =
            (self.peek(), self.tokens.get(self.at + 1))
        {
            let name = name.clone();
            self.at += 2;
            arguments.named.push((name, self.expression()?));
        } else {
            if !arguments.named.is_empty() {
                return self.fail("a positional argument follows a named one");
            }
            arguments.positional.push(self.expression()?);
        }
        Ok(())
    }

    fn primary(&mut self) -> Outcome<Expr> {
        let Some(token) = self.peek().cloned() else { return self.fail("expected a value") };
        self.at += 1;
        let constant = match token {
            Token::Name(name) => match name.as_str() {
                "true" | "True" => Constant::Bool(true),
                "false" | "False" => Constant::Bool(false),
                "none" | "None" => Constant::None,
                _ => return Ok(Expr::Name(name)),
            },
            Token::Int(value) => Constant::Int(value),
            Token::Float(value) => Constant::Float(value),
            Token::String(mut text) => {
                while let Some(Token::String(more)) = self.peek() {
                    text.push_str(more);
                    self.at += 1;
                }
                Constant::Text(Str::own(&text))
            }
            Token::Operator("(") => return self.deeper(Self::parenthesis),
            Token::Operator("[") => return self.deeper(|parser| Ok(Expr::List(parser.items("]")?))),
            Token::Operator("{") => return self.deeper(Self::dict),
            _ => {
                self.at -= 1;
                return self.fail("expected a value");
            }
        };
        Ok(Expr::Constant(constant))
    }

    fn parenthesis(&mut self) -> Outcome<Expr> {
        if self.take(")") {
            return Ok(Expr::Tuple(Vec::new()));
        }
        let value = self.tuple()?;
        self.want(")")?;
        Ok(value)
    }

    fn items(&mut self, close: &str) -> Outcome<Vec<Expr>> {
        let mut items = Vec::new();
        while !self.take(close) {
            if !items.is_empty() {
                self.want(",")?;
                if self.take(close) {
                    break;
                }
            }
            items.push(self.expression()?);
        }
        Ok(items)
    }

    fn dict(&mut self) -> Outcome<Expr> {
        let mut entries = Vec::new();
        while !self.take("}") {
            if !entries.is_empty() {
                self.want(",")?;
                if self.take("}") {
                    break;
                }
            }
            let key = self.expression()?;
            self.want(":")?;
            entries.push((key, self.expression()?));
        }
        Ok(Expr::Dict(entries))
    }
}
