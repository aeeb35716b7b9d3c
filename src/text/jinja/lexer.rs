//! From a template's text to tokens, with white space trimmed as transformers sets Jinja up: `trim_blocks`, `lstrip_blocks`, no newline at the end.

use super::{Failure, Outcome};

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Token {
    Text(String),
    VariableBegin,
    VariableEnd,
    BlockBegin,
    BlockEnd,
    Name(String),
    String(String),
    Int(i64),
    Float(f64),
    Operator(&'static str),
}

/// The longest first.
const OPERATORS: [&str; 27] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<", "=", ".",
    ":", "|", ",", ";", "!",
];

/// Tokens with the lines that they stand in.
pub(super) fn tokens(source: &str) -> Outcome<Vec<(Token, usize)>> {
    let mut source = source.replace("\r\n", "\n").replace('\r', "\n");
    if source.ends_with('\n') {
        source.pop();
    }
    let mut lexer = Lexer { source: &source, at: 0, tokens: Vec::new(), line_starts: true, counted: (0, 1) };
    while lexer.at < source.len() {
        lexer.text()?;
    }
    Ok(lexer.tokens)
}

struct Lexer<'s> {
    source: &'s str,
    at: usize,
    tokens: Vec<(Token, usize)>,
    /// Whether a line begins here, so far as a tag's end before it tells.
    line_starts: bool,
    /// A place and its line.
    counted: (usize, usize),
}

impl<'s> Lexer<'s> {
    fn rest(&self) -> &'s str {
        &self.source[self.at..]
    }

    fn line(&mut self) -> usize {
        let (from, line) = self.counted;
        let lines = self.source.as_bytes()[from..self.at].iter().filter(|byte| **byte == b'\n').count();
        self.counted = (self.at, line + lines);
        self.counted.1
    }

    fn fail<T>(&mut self, what: impl std::fmt::Display) -> Outcome<T> {
        Err(Failure::Syntax(format!("line {}: {what}", self.line())))
    }

    fn push(&mut self, token: Token) {
        let line = self.line();
        self.tokens.push((token, line));
    }

    fn push_text(&mut self, text: &str) {
        if !text.is_empty() {
            self.push(Token::Text(text.to_owned()));
        }
    }

    /// Text up to the next tag, and that tag.
    fn text(&mut self) -> Outcome<()> {
        let rest = self.rest();
        let begins = |at: &usize| ["{{", "{%", "{#"].iter().any(|open| rest[*at..].starts_with(open));
        let Some(found) = rest.match_indices('{').map(|(at, _)| at).find(begins) else {
            self.push_text(rest);
            self.at = self.source.len();
            return Ok(());
        };
        let (text, tag) = rest.split_at(found);
        let sign = tag[2..].chars().next().filter(|ch| "+-".contains(*ch));
        self.push_text(match sign {
            Some('-') => text.trim_end(),
            None if !tag.starts_with("{{") => self.without_indent(text),
            _ => text,
        });
        self.at += found + 2 + usize::from(sign.is_some());
        match &tag[..2] {
            "{{" => self.inside(Token::VariableBegin),
            "{#" => self.comment(),
            _ => match self.raw_begins() {
                Some(after) => self.raw(after),
                None => self.inside(Token::BlockBegin),
            },
        }
    }

    /// Without the white space of a line in which a block's tag is the first.
    fn without_indent<'t>(&self, text: &'t str) -> &'t str {
        let line = text.rfind('\n').map_or(0, |at| at + 1);
        let starts = line > 0 || self.line_starts;
        match starts && text[line..].chars().all(char::is_whitespace) {
            true => &text[..line],
            false => text,
        }
    }

    /// The end of a tag at this place: its bytes, with the white space that it takes along.
    fn end(&self, close: &str) -> Option<usize> {
        let rest = self.rest();
        let signed = |sign: &str| rest.strip_prefix(sign).and_then(|rest| rest.strip_prefix(close));
        if let Some(after) = signed("-") {
            return Some(rest.len() - after.trim_start().len());
        }
        if close != "}}" && signed("+").is_some() {
            return Some(1 + close.len());
        }
        let after = rest.strip_prefix(close)?;
        Some(close.len() + usize::from(close != "}}" && after.starts_with('\n')))
    }

    fn finish(&mut self, bytes: usize) {
        self.at += bytes;
        self.line_starts = self.source[..self.at].ends_with('\n');
    }

    fn comment(&mut self) -> Outcome<()> {
        let from = self.at;
        let Some(found) = self.rest().find("#}") else { return self.fail("a comment has no end") };
        let signed = found > 0 && matches!(self.source.as_bytes()[from + found - 1], b'+' | b'-');
        self.at += found - usize::from(signed);
        let bytes = self.end("#}").unwrap_or(2);
        self.finish(bytes);
        Ok(())
    }

    /// Where the text of a `raw` block begins, if this tag is one.
    fn raw_begins(&self) -> Option<usize> {
        let after = self.rest().trim_start().strip_prefix("raw")?.trim_start();
        let text = match after.strip_prefix("-%}") {
            Some(text) => text.trim_start(),
            None => after.strip_prefix("%}")?,
        };
        Some(self.source.len() - text.len())
    }

    fn raw(&mut self, begin: usize) -> Outcome<()> {
        self.at = begin;
        let mut from = begin;
        while let Some(found) = self.source[from..].find("{%") {
            let open = from + found;
            let mut tag = &self.source[open + 2..];
            let sign = tag.chars().next().filter(|ch| "+-".contains(*ch));
            tag = &tag[usize::from(sign.is_some())..];
            if let Some(after) = tag.trim_start().strip_prefix("endraw") {
                let text = &self.source[begin..open];
                self.line_starts = self.source[..begin].ends_with('\n');
                self.push_text(match sign {
                    Some('-') => text.trim_end(),
                    None => self.without_indent(text),
                    _ => text,
                });
                self.at = self.source.len() - after.trim_start().len();
                if let Some(bytes) = self.end("%}") {
                    self.finish(bytes);
                    return Ok(());
                }
            }
            from = open + 2;
        }
        self.fail("a raw block has no end")
    }

    /// The tokens of a tag, up to its end.
    fn inside(&mut self, begin: Token) -> Outcome<()> {
        let (close, end) = match begin {
            Token::VariableBegin => ("}}", Token::VariableEnd),
            _ => ("%}", Token::BlockEnd),
        };
        self.push(begin);
        let mut open = Vec::new();
        loop {
            self.at = self.source.len() - self.rest().trim_start().len();
            if self.at == self.source.len() {
                return self.fail("a tag has no end");
            }
            if open.is_empty()
                && let Some(bytes) = self.end(close)
            {
                self.push(end);
                self.finish(bytes);
                return Ok(());
            }
            self.token(&mut open)?;
        }
    }

    fn token(&mut self, open: &mut Vec<&'static str>) -> Outcome<()> {
        let rest = self.rest();
        let first = rest.chars().next().unwrap_or_default();
        if first.is_alphabetic() || first == '_' {
            let len = rest.find(|ch: char| !ch.is_alphanumeric() && ch != '_').unwrap_or(rest.len());
            self.push(Token::Name(rest[..len].to_owned()));
            self.at += len;
            return Ok(());
        }
        if first.is_ascii_digit() {
            return self.number();
        }
        if first == '\'' || first == '"' {
            return self.string(first);
        }
        let Some(operator) = OPERATORS.iter().find(|operator| rest.starts_with(**operator)) else {
            return self.fail(format!("unexpected character {first:?}"));
        };
        match *operator {
            "(" => open.push(")"),
            "[" => open.push("]"),
            "{" => open.push("}"),
            ")" | "]" | "}" if open.pop() != Some(*operator) => return self.fail(format!("unexpected {operator:?}")),
            _ => {}
        }
        self.push(Token::Operator(operator));
        self.at += operator.len();
        Ok(())
    }

    fn number(&mut self) -> Outcome<()> {
        let rest = self.rest();
        let digits = |from: usize| {
            from + rest[from..].find(|ch: char| !ch.is_ascii_digit() && ch != '_').unwrap_or(rest.len() - from)
        };
        for (prefix, radix) in [("0x", 16), ("0o", 8), ("0b", 2)] {
            if rest.get(..2).is_some_and(|begin| begin.eq_ignore_ascii_case(prefix)) {
                let len = 2 + rest[2..].find(|ch: char| !ch.is_digit(radix) && ch != '_').unwrap_or(rest.len() - 2);
                let Ok(value) = i64::from_str_radix(&rest[2..len].replace('_', ""), radix) else {
                    return self.fail("a bad number");
                };
                self.push(Token::Int(value));
                self.at += len;
                return Ok(());
            }
        }
        let whole = digits(0);
        let mut len = whole;
        let is_attribute = matches!(self.tokens.last(), Some((Token::Operator("."), _)));
        // `list.0.1` is two steps.
        if !is_attribute && rest[len..].starts_with('.') && rest[len + 1..].starts_with(|ch: char| ch.is_ascii_digit())
        {
            len = digits(len + 1);
        }
        if !is_attribute && rest[len..].starts_with(['e', 'E']) {
            let signed = len + 1 + usize::from(rest[len + 1..].starts_with(['+', '-']));
            if rest[signed..].starts_with(|ch: char| ch.is_ascii_digit()) {
                len = digits(signed);
            }
        }
        let text = rest[..len].replace('_', "");
        let token = match len == whole {
            true => text.parse().ok().map(Token::Int),
            false => text.parse().ok().map(Token::Float),
        };
        let Some(token) = token else { return self.fail("a number is too large") };
        self.push(token);
        self.at += len;
        Ok(())
    }

    fn string(&mut self, quote: char) -> Outcome<()> {
        let rest = &self.rest()[1..];
        let mut escaped = false;
        let ends = |(_, ch): &(usize, char)| {
            let end = *ch == quote && !escaped;
            escaped = *ch == '\\' && !escaped;
            end
        };
        let Some((len, _)) = rest.char_indices().find(ends) else { return self.fail("a string has no end") };
        let Some(text) = unescaped(&rest[..len]) else { return self.fail("a string has a bad escape") };
        self.push(Token::String(text));
        self.at += len + 2;
        Ok(())
    }
}

/// Python's escapes.
fn unescaped(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let Some(ch) = rest.chars().next() else {
            out.push('\\');
            break;
        };
        rest = &rest[ch.len_utf8()..];
        let width = match ch {
            'x' => 2,
            'u' => 4,
            'U' => 8,
            _ => 0,
        };
        if width > 0 {
            out.push(char::from_u32(u32::from_str_radix(rest.get(..width)?, 16).ok()?)?);
            rest = &rest[width..];
            continue;
        }
        match ch {
            '\n' => {}
            'n' => out.push('\n'),
            't' => out.push('\t'),
            'r' => out.push('\r'),
            'a' => out.push('\u{7}'),
            'b' => out.push('\u{8}'),
            'f' => out.push('\u{C}'),
            'v' => out.push('\u{B}'),
            '\\' | '\'' | '"' => out.push(ch),
            '0'..='7' => {
                let more = rest.bytes().take(2).take_while(|byte| (b'0'..=b'7').contains(byte)).count();
                let digits = format!("{ch}{}", &rest[..more]);
                out.push(char::from_u32(u32::from_str_radix(&digits, 8).ok()?)?);
                rest = &rest[more..];
            }
            other => out.extend(['\\', other]),
        }
    }
    out.push_str(rest);
    Some(out)
}
