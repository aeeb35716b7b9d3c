//! From tokens to a tree, with Jinja's precedences.

use super::ast::{
    Arguments, Arithmetic, Comparison, Constant, Expr, For, Macro, Parameters, Postfix, Statement, Target,
};
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

struct Parser {
    tokens: Vec<(Token, usize)>,
    at: usize,
    depth: usize,
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|(token, _)| token)
    }

    fn line(&self) -> usize {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(1, |(_, line)| *line)
    }

    fn fail<T>(&self, what: impl std::fmt::Display) -> Outcome<T> {
        Err(Failure::Syntax(format!("line {}: {what}", self.line())))
    }

    fn is(&self, operator: &str) -> bool {
        matches!(self.peek(), Some(Token::Operator(own)) if *own == operator)
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Some(Token::Name(own)) if own == name)
    }

    fn take(&mut self, operator: &str) -> bool {
        let found = self.is(operator);
        self.at += usize::from(found);
        found
    }

    fn take_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        self.at += usize::from(found);
        found
    }

    fn want(&mut self, operator: &str) -> Outcome<()> {
        match self.take(operator) {
            true => Ok(()),
            false => self.fail(format!("expected {operator:?}")),
        }
    }

    fn name(&mut self) -> Outcome<String> {
        let Some(Token::Name(name)) = self.peek() else { return self.fail("expected a name") };
        let name = name.clone();
        self.at += 1;
        Ok(name)
    }

    fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        self.depth += 1;
        if self.depth > NESTING {
            return self.fail(format!("is nested deeper than {NESTING}"));
        }
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    // Statements.

    fn block_end(&mut self) -> Outcome<()> {
        match self.peek() {
            Some(Token::BlockEnd) => {
                self.at += 1;
                Ok(())
            }
            _ => self.fail("expected the end of the tag"),
        }
    }

    /// Statements up to a tag of one of these names, which is taken but for what stands in it.
    fn body(&mut self, ends: &[&str]) -> Outcome<(Vec<Statement>, Option<String>)> {
        let mut body = Vec::new();
        while let Some(token) = self.peek() {
            match token {
                Token::Text(text) => {
                    body.push(Statement::Text(Str::own(text)));
                    self.at += 1;
                }
                Token::VariableBegin => {
                    self.at += 1;
                    body.push(Statement::Print(self.tuple()?));
                    match self.peek() {
                        Some(Token::VariableEnd) => self.at += 1,
                        _ => return self.fail("expected the end of the print statement"),
                    }
                }
                _ => {
                    self.at += 1;
                    let name = self.name()?;
                    if ends.contains(&name.as_str()) {
                        return Ok((body, Some(name)));
                    }
                    body.push(self.deeper(|parser| parser.statement(&name))?);
                }
            }
        }
        match ends {
            [] => Ok((body, None)),
            [first, ..] => self.fail(format!("a block has no {first:?}")),
        }
    }

    /// A body and the rest of its end's tag.
    fn whole_body(&mut self, end: &str) -> Outcome<Vec<Statement>> {
        self.block_end()?;
        let (body, _) = self.body(&[end])?;
        self.block_end()?;
        Ok(body)
    }

    fn statement(&mut self, name: &str) -> Outcome<Statement> {
        match name {
            "if" => self.branches(),
            "for" => self.for_loop(),
            "set" => self.set(),
            "with" => self.with(),
            "macro" => {
                let name = self.name()?;
                let parameters = self.parameters()?;
                Ok(Statement::Macro(Macro { name, parameters, body: self.whole_body("endmacro")? }))
            }
            "call" => {
                let parameters = if self.is("(") { self.parameters()? } else { Vec::new() };
                let call = self.expression()?;
                let body = self.whole_body("endcall")?;
                Ok(Statement::CallBlock(Macro { name: "caller".into(), parameters, body }, call))
            }
            "filter" => {
                let filters = self.filters(true)?;
                Ok(Statement::FilterBlock(filters, self.whole_body("endfilter")?))
            }
            "generation" => Ok(Statement::Scope(self.whole_body("endgeneration")?)),
            "autoescape" | "block" | "extends" | "include" | "import" | "from" | "do" | "trans" | "debug" => {
                self.fail(format!("the tag {name:?} is not known to chat templates"))
            }
            "break" | "continue" => {
                self.block_end()?;
                Ok(if name == "break" { Statement::Break } else { Statement::Continue })
            }
            _ => self.fail(format!("unknown tag {name:?}")),
        }
    }

    fn branches(&mut self) -> Outcome<Statement> {
        let mut branches = Vec::new();
        loop {
            let condition = self.tuple()?;
            self.block_end()?;
            let (body, end) = self.body(&["endif", "elif", "else"])?;
            branches.push((condition, body));
            if end.as_deref() == Some("elif") {
                continue;
            }
            let otherwise = match end.as_deref() {
                Some("else") => self.whole_body("endif")?,
                _ => {
                    self.block_end()?;
                    Vec::new()
                }
            };
            return Ok(Statement::If(branches, otherwise));
        }
    }

    fn for_loop(&mut self) -> Outcome<Statement> {
        let target = self.target()?;
        if !self.take_name("in") {
            return self.fail("expected \"in\"");
        }
        let over = self.tuple_without_condition()?;
        let condition = if self.take_name("if") { Some(self.expression()?) } else { None };
        let recursive = self.take_name("recursive");
        self.block_end()?;
        let (body, end) = self.body(&["endfor", "else"])?;
        let otherwise = match end.as_deref() {
            Some("else") => self.whole_body("endfor")?,
            _ => {
                self.block_end()?;
                Vec::new()
            }
        };
        Ok(Statement::For(Box::new(For { target, over, condition, recursive, body, otherwise })))
    }

    fn set(&mut self) -> Outcome<Statement> {
        let target = self.target()?;
        if self.take("=") {
            let value = self.tuple()?;
            self.block_end()?;
            return Ok(Statement::Set(target, value));
        }
        let filters = self.filters(false)?;
        Ok(Statement::SetBlock(target, filters, self.whole_body("endset")?))
    }

    fn with(&mut self) -> Outcome<Statement> {
        let mut assigned = Vec::new();
        while !matches!(self.peek(), Some(Token::BlockEnd)) {
            if !assigned.is_empty() {
                self.want(",")?;
            }
            let target = Target::Name(self.name()?);
            self.want("=")?;
            assigned.push((target, self.expression()?));
        }
        Ok(Statement::With(assigned, self.whole_body("endwith")?))
    }

    /// Names that are assigned to, or an attribute of a namespace.
    fn target(&mut self) -> Outcome<Target> {
        let mut targets = Vec::new();
        let mut is_tuple = false;
        loop {
            targets.push(self.single_target()?);
            if !self.take(",") {
                break;
            }
            is_tuple = true;
            if !matches!(self.peek(), Some(Token::Name(name)) if name != "in") && !self.is("(") {
                break;
            }
        }
        match targets.pop() {
            Some(only) if !is_tuple => Ok(only),
            last => Ok(Target::Tuple(targets.into_iter().chain(last).collect())),
        }
    }

    fn single_target(&mut self) -> Outcome<Target> {
        if self.take("(") {
            let target = self.deeper(Self::target)?;
            self.want(")")?;
            return Ok(target);
        }
        let name = self.name()?;
        match self.take(".") {
            true => Ok(Target::Attribute(name, self.name()?)),
            false => Ok(Target::Name(name)),
        }
    }

    fn parameters(&mut self) -> Outcome<Parameters> {
        self.want("(")?;
        let mut parameters = Parameters::new();
        while !self.take(")") {
            if !parameters.is_empty() {
                self.want(",")?;
                if self.take(")") {
                    break;
                }
            }
            let name = self.name()?;
            let default = if self.take("=") { Some(self.expression()?) } else { None };
            if default.is_none() && parameters.last().is_some_and(|(_, default)| default.is_some()) {
                return self.fail("non-default argument follows default argument");
            }
            parameters.push((name, default));
        }
        Ok(parameters)
    }

    /// Filters one after the other; `bare` where the first has no bar before it.
    fn filters(&mut self, bare: bool) -> Outcome<Vec<Postfix>> {
        let mut filters = Vec::new();
        if bare {
            filters.push(self.filter()?);
        }
        while self.take("|") {
            filters.push(self.filter()?);
        }
        Ok(filters)
    }

    fn filter(&mut self) -> Outcome<Postfix> {
        let mut name = self.name()?;
        while self.take(".") {
            name = format!("{name}.{}", self.name()?);
        }
        let arguments = if self.take("(") { self.arguments()? } else { Arguments::default() };
        Ok(Postfix::Filter(name, arguments))
    }

    // Expressions.

    /// One expression, or several with commas between: a tuple.
    fn tuple(&mut self) -> Outcome<Expr> {
        self.tuple_of(Self::expression)
    }

    fn tuple_without_condition(&mut self) -> Outcome<Expr> {
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

    fn expression(&mut self) -> Outcome<Expr> {
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
