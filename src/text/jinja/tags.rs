//! From tokens to a tree: text and tags.

use super::Outcome;
use super::ast::{For, Macro, Parameters, Postfix, Statement, Target};
use super::lexer::Token;
use super::parser::Parser;
use super::value::Str;

impl Parser {
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
    pub(super) fn body(&mut self, ends: &[&str]) -> Outcome<(Vec<Statement>, Option<String>)> {
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
}
