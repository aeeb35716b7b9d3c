//! The methods of Python's texts.

use std::sync::Arc;

use super::filters::Given;
use super::value::{FOREIGN, Meter, SequenceKind, Str, Value, plain, same};
use super::{Outcome, error, ops};

/// The methods that a template may call.
pub(super) const METHODS: [&str; 42] = [
    "upper",
    "lower",
    "title",
    "capitalize",
    "swapcase",
    "casefold",
    "strip",
    "lstrip",
    "rstrip",
    "split",
    "rsplit",
    "splitlines",
    "join",
    "replace",
    "startswith",
    "endswith",
    "find",
    "rfind",
    "index",
    "rindex",
    "count",
    "format",
    "isdigit",
    "isalpha",
    "isalnum",
    "isspace",
    "isupper",
    "islower",
    "istitle",
    "isnumeric",
    "isdecimal",
    "isascii",
    "isidentifier",
    "removeprefix",
    "removesuffix",
    "partition",
    "rpartition",
    "zfill",
    "center",
    "ljust",
    "rjust",
    "expandtabs",
];

/// What Python strips and splits at.
pub(super) fn is_space(code: u32) -> bool {
    let ch = plain(code);
    ch.is_whitespace() || matches!(ch, '\u{1C}'..='\u{1F}')
}

/// A text that is given, where one is needed.
fn text<'g>(given: &'g Given, at: usize, name: &str, method: &str) -> Outcome<&'g [u32]> {
    match given.argument(at, name) {
        Some(Value::Text(text)) => Ok(text.chars()),
        Some(Value::Undefined(message)) => error(&**message),
        Some(other) => error(format!("{method}() argument {} must be str, not {}", at + 1, other.type_name())),
        None => error(format!("{method}() takes at least {} argument ({at} given)", at + 1)),
    }
}

/// A whole number that may be given.
pub(super) fn number(given: &Given, at: usize, name: &str) -> Outcome<Option<i64>> {
    match given.argument(at, name) {
        None | Some(Value::None) => Ok(None),
        Some(Value::Undefined(message)) => error(&**message),
        Some(value) => match value.integer() {
            Some(value) => Ok(Some(value)),
            None => error(format!("'{}' object cannot be interpreted as an integer", value.type_name())),
        },
    }
}

/// Calls a method.
pub(super) fn call(meter: &Arc<Meter>, own: &Str, name: &str, given: &Given) -> Outcome<Value> {
    let chars = own.chars();
    meter.work(chars.len())?;
    match name {
        "upper" | "lower" | "title" | "capitalize" | "swapcase" | "casefold" => meter.text(cased(chars, name)),
        "strip" | "lstrip" | "rstrip" => stripped(meter, own, name, given),
        "split" | "rsplit" => split(meter, chars, name == "rsplit", given),
        "splitlines" => lines(meter, chars, given.argument(0, "keepends").is_some_and(Value::truth)),
        "join" => join(meter, chars, given.argument(0, "iterable").unwrap_or(&Value::None)),
        "replace" => {
            let (old, new) = (text(given, 0, "old", "replace")?, text(given, 1, "new", "replace")?);
            replace(meter, chars, old, new, number(given, 2, "count")?)
        }
        "startswith" | "endswith" => affix(meter, chars, name, given),
        "find" | "rfind" | "index" | "rindex" | "count" => look(meter, chars, name, given),
        "format" => super::format::format(meter, own, given),
        "removeprefix" => {
            let prefix = text(given, 0, "prefix", name)?;
            let has = chars.len() >= prefix.len() && same(&chars[..prefix.len()], prefix);
            meter.text(chars[if has { prefix.len() } else { 0 }..].to_vec())
        }
        "removesuffix" => {
            let suffix = text(given, 0, "suffix", name)?;
            let at = chars.len().saturating_sub(suffix.len());
            let has = chars.len() >= suffix.len() && same(&chars[at..], suffix);
            meter.text(chars[..if has { at } else { chars.len() }].to_vec())
        }
        "partition" | "rpartition" => partition(meter, chars, text(given, 0, "sep", name)?, name == "rpartition"),
        "zfill" | "center" | "ljust" | "rjust" => padded(meter, chars, name, given),
        "expandtabs" => replace(meter, chars, &[u32::from('\t')], &[u32::from(' '); 8], None),
        _ => Ok(Value::Bool(is(chars, name))),
    }
}

/// In another case. One character may become several.
pub(super) fn cased(chars: &[u32], how: &str) -> Vec<u32> {
    let mut out = Vec::with_capacity(chars.len());
    let mut after_letter = false;
    for (i, &code) in chars.iter().enumerate() {
        let ch = plain(code);
        let upper = match how {
            "upper" => true,
            "title" => !after_letter,
            "capitalize" => i == 0,
            "swapcase" => ch.is_lowercase(),
            _ => false,
        };
        after_letter = ch.is_alphabetic();
        let from = code & FOREIGN;
        match upper {
            true if matches!(how, "title" | "capitalize") => {
                out.extend(titled(ch).into_iter().map(|ch| u32::from(ch) | from))
            }
            true => out.extend(ch.to_uppercase().map(|ch| u32::from(ch) | from)),
            // Python's lower case of the last sigma of a word is another letter than Rust's of one alone.
            false if ch == 'Σ' && how != "casefold" && ends_word(chars, i) => out.push(u32::from('ς') | from),
            false if ch == 'ß' && how == "casefold" => out.extend(['s', 's'].map(|ch| u32::from(ch) | from)),
            false => out.extend(ch.to_lowercase().map(|ch| u32::from(ch) | from)),
        }
    }
    out
}

/// A letter as the first of a word.
fn titled(ch: char) -> Vec<char> {
    match ch {
        'Ǆ'..='ǆ' => vec!['ǅ'],
        'Ǉ'..='ǉ' => vec!['ǈ'],
        'Ǌ'..='ǌ' => vec!['ǋ'],
        'Ǳ'..='ǳ' => vec!['ǲ'],
        _ => {
            let mut upper = ch.to_uppercase();
            upper.next().into_iter().chain(upper.flat_map(char::to_lowercase)).collect()
        }
    }
}

fn ends_word(chars: &[u32], at: usize) -> bool {
    let letter = |at: Option<&u32>| at.is_some_and(|code| plain(*code).is_alphabetic());
    at > 0 && letter(chars.get(at - 1)) && !letter(chars.get(at + 1))
}

fn stripped(meter: &Arc<Meter>, own: &Str, name: &str, given: &Given) -> Outcome<Value> {
    let set = match given.argument(0, "chars") {
        None | Some(Value::None) => None,
        _ => Some(text(given, 0, "chars", name)?),
    };
    let chars = own.chars();
    let kept = strip(chars, set, name != "rstrip", name != "lstrip");
    if let Some(set) = set {
        meter.step((set.len() * (1 + chars.len() - kept.len())) as u64 / 8)?;
    }
    match kept.len() == chars.len() {
        true => Ok(Value::Text(own.clone())),
        false => meter.text(kept.to_vec()),
    }
}

/// Without white space, or without these characters, at its ends.
pub(super) fn strip<'c>(chars: &'c [u32], set: Option<&[u32]>, front: bool, back: bool) -> &'c [u32] {
    let goes = |code: &u32| match set {
        None => is_space(*code),
        Some(set) => set.iter().any(|own| own & !FOREIGN == code & !FOREIGN),
    };
    let from = if front { chars.iter().take_while(|code| goes(code)).count() } else { 0 };
    let rest = &chars[from..];
    let cut = if back { rest.iter().rev().take_while(|code| goes(code)).count() } else { 0 };
    &rest[..rest.len() - cut]
}

fn split(meter: &Arc<Meter>, chars: &[u32], from_back: bool, given: &Given) -> Outcome<Value> {
    let most = number(given, 1, "maxsplit")?.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
    let separator = match given.argument(0, "sep") {
        None | Some(Value::None) => None,
        _ => Some(text(given, 0, "sep", "split")?),
    };
    if separator.is_some_and(<[u32]>::is_empty) {
        return error("empty separator");
    }
    // A split from the back is one from the front of what is read backwards.
    let turned: Vec<u32>;
    let (mut rest, back): (&[u32], Option<Vec<u32>>) = match from_back {
        true => {
            turned = chars.iter().rev().copied().collect();
            (&turned, separator.map(|separator| separator.iter().rev().copied().collect()))
        }
        false => (chars, separator.map(<[u32]>::to_vec)),
    };
    let mut parts = Vec::new();
    match back {
        Some(separator) => {
            while parts.len() < most
                && let Some(at) = ops::find(rest, &separator)
            {
                parts.push(rest[..at].to_vec());
                rest = &rest[at + separator.len()..];
            }
            parts.push(rest.to_vec());
        }
        None => loop {
            rest = strip(rest, None, true, false);
            if rest.is_empty() {
                break;
            }
            let at = rest.iter().position(|code| is_space(*code)).filter(|_| parts.len() < most);
            match at {
                Some(at) => {
                    parts.push(rest[..at].to_vec());
                    rest = &rest[at..];
                }
                None => {
                    parts.push(rest.to_vec());
                    break;
                }
            }
        },
    }
    if from_back {
        parts.iter_mut().for_each(|part| part.reverse());
        parts.reverse();
    }
    let parts = parts.into_iter().map(|part| meter.text(part)).collect::<Outcome<_>>()?;
    meter.list(parts)
}

fn lines(meter: &Arc<Meter>, chars: &[u32], keep: bool) -> Outcome<Value> {
    let ends = |code: u32| {
        matches!(
            plain(code),
            '\n' | '\r' | '\u{B}' | '\u{C}' | '\u{1C}'..='\u{1E}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let (mut lines, mut from) = (Vec::new(), 0);
    while from < chars.len() {
        let end = from + chars[from..].iter().position(|code| ends(*code)).unwrap_or(chars.len() - from);
        let crlf = chars.get(end).is_some_and(|code| plain(*code) == '\r')
            && chars.get(end + 1).is_some_and(|code| plain(*code) == '\n');
        let next = (end + 1 + usize::from(crlf)).min(chars.len());
        lines.push(meter.text(chars[from..if keep { next } else { end }].to_vec())?);
        from = next;
    }
    meter.list(lines)
}

/// Texts with this one between them.
pub(super) fn join(meter: &Arc<Meter>, separator: &[u32], items: &Value) -> Outcome<Value> {
    let items = match items {
        Value::None => return error("can only join an iterable"),
        items => ops::items(meter, items)?,
    };
    let mut out = Vec::new();
    for (i, item) in items.iter().enumerate() {
        let Value::Text(text) = item else {
            return error(format!("sequence item {i}: expected str instance, {} found", item.type_name()));
        };
        meter.more_text(out.len(), separator.len() + text.chars().len())?;
        out.extend_from_slice(if i > 0 { separator } else { &[] });
        out.extend_from_slice(text.chars());
    }
    meter.text(out)
}

/// With a part replaced, as often as it is there or `most` times.
pub(super) fn replace(
    meter: &Arc<Meter>,
    chars: &[u32],
    old: &[u32],
    new: &[u32],
    most: Option<i64>,
) -> Outcome<Value> {
    let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
    let (mut out, mut rest, mut count) = (Vec::new(), chars, 0);
    while count < most {
        let Some(at) = ops::find(rest, old).filter(|_| !old.is_empty() || count <= chars.len()) else { break };
        meter.more_text(out.len(), at + new.len())?;
        out.extend_from_slice(&rest[..at]);
        out.extend_from_slice(new);
        rest = &rest[at + old.len()..];
        if old.is_empty() {
            let Some((first, after)) = rest.split_first() else { break };
            out.push(*first);
            rest = after;
        }
        count += 1;
    }
    if !old.is_empty() || count == most {
        out.extend_from_slice(rest);
    }
    meter.text(out)
}

/// The part between two places that may be given.
fn between<'c>(chars: &'c [u32], given: &Given, at: usize) -> Outcome<(usize, &'c [u32])> {
    let length = chars.len() as i64;
    let place = |place: i64| (if place < 0 { place.saturating_add(length) } else { place }).clamp(0, length) as usize;
    let from = number(given, at, "start")?.map_or(0, place);
    let to = number(given, at + 1, "end")?.map_or(chars.len(), place);
    Ok((from, &chars[from.min(to)..to]))
}

fn affix(meter: &Arc<Meter>, chars: &[u32], name: &str, given: &Given) -> Outcome<Value> {
    let (_, chars) = between(chars, given, 1)?;
    let affixes = match given.argument(0, "prefix") {
        Some(Value::Sequence(sequence)) if sequence.kind == SequenceKind::Tuple => sequence.items.clone(),
        Some(Value::Undefined(message)) => return error(&**message),
        Some(one) => vec![one.clone()],
        None => return error(format!("{name}() takes at least 1 argument (0 given)")),
    };
    for affix in &affixes {
        let Value::Text(affix) = affix else {
            return error(format!("{name} first arg must be str or a tuple of str, not {}", affix.type_name()));
        };
        meter.work(affix.chars().len())?;
        let affix = affix.chars();
        let from = if name == "startswith" { 0 } else { chars.len().saturating_sub(affix.len()) };
        if chars.len() >= affix.len() && same(&chars[from..from + affix.len()], affix) {
            return Ok(Value::Bool(true));
        }
    }
    Ok(Value::Bool(false))
}

fn look(meter: &Arc<Meter>, chars: &[u32], name: &str, given: &Given) -> Outcome<Value> {
    let part = text(given, 0, "sub", name)?;
    let (from, inside) = between(chars, given, 1)?;
    if name == "count" {
        let (mut count, mut rest) = (0_i64, inside);
        if part.is_empty() {
            return Ok(Value::Int(inside.len() as i64 + 1));
        }
        while let Some(at) = ops::find(rest, part) {
            (count, rest) = (count + 1, &rest[at + part.len()..]);
        }
        return Ok(Value::Int(count));
    }
    let found = match name.starts_with('r') {
        false => ops::find(inside, part),
        true => ops::find_last(inside, part),
    };
    meter.work(inside.len())?;
    match found {
        Some(at) => Ok(Value::Int((from + at) as i64)),
        None if name.ends_with("index") => error("substring not found"),
        None => Ok(Value::Int(-1)),
    }
}

fn partition(meter: &Arc<Meter>, chars: &[u32], separator: &[u32], last: bool) -> Outcome<Value> {
    if separator.is_empty() {
        return error("empty separator");
    }
    let found = match last {
        false => ops::find(chars, separator),
        true => ops::find_last(chars, separator),
    };
    let parts: [&[u32]; 3] = match found {
        Some(at) => [&chars[..at], &chars[at..at + separator.len()], &chars[at + separator.len()..]],
        None if last => [&[], &[], chars],
        None => [chars, &[], &[]],
    };
    let parts = parts.into_iter().map(|part| meter.text(part.to_vec())).collect::<Outcome<_>>()?;
    meter.sequence(SequenceKind::Tuple, parts)
}

fn padded(meter: &Arc<Meter>, chars: &[u32], name: &str, given: &Given) -> Outcome<Value> {
    let width = number(given, 0, "width")?.and_then(|width| usize::try_from(width).ok()).unwrap_or(0);
    let fill = match given.argument(1, "fillchar") {
        Some(Value::Text(fill)) if fill.chars().len() == 1 => fill.chars()[0],
        Some(_) => return error("The fill character must be exactly one character long"),
        None => u32::from(if name == "zfill" { '0' } else { ' ' }),
    };
    let missing = width.saturating_sub(chars.len());
    meter.text_room(width)?;
    // Python puts the odd one to the left where the width is odd too.
    let left = match name {
        "ljust" => 0,
        "center" => missing / 2 + (missing & width & 1),
        _ => missing,
    };
    let signed = usize::from(name == "zfill" && chars.first().is_some_and(|code| matches!(plain(*code), '+' | '-')));
    let mut out = chars[..signed].to_vec();
    out.extend(std::iter::repeat_n(fill, left));
    out.extend_from_slice(&chars[signed..]);
    out.extend(std::iter::repeat_n(fill, missing - left));
    meter.text(out)
}

/// Python's questions about all characters of a text.
fn is(chars: &[u32], name: &str) -> bool {
    let mut plain_chars = chars.iter().map(|code| plain(*code));
    let all = |what: fn(char) -> bool| !chars.is_empty() && chars.iter().all(|code| what(plain(*code)));
    match name {
        "isascii" => plain_chars.all(|ch| ch.is_ascii()),
        "isdigit" | "isdecimal" => all(|ch| {
            ch.is_ascii_digit() || (!ch.is_ascii() && ch.is_numeric() && ch.to_digit(10).is_none() && is_decimal(ch))
        }),
        "isnumeric" => all(char::is_numeric),
        "isalpha" => all(char::is_alphabetic),
        "isalnum" => all(char::is_alphanumeric),
        "isspace" => !chars.is_empty() && chars.iter().all(|code| is_space(*code)),
        "isupper" => !plain_chars.clone().any(char::is_lowercase) && plain_chars.any(char::is_uppercase),
        "islower" => !plain_chars.clone().any(char::is_uppercase) && plain_chars.any(char::is_lowercase),
        "istitle" => {
            let cased = chars.iter().any(|code| plain(*code).is_uppercase() || plain(*code).is_lowercase());
            cased && same(&self::cased(chars, "title"), chars)
        }
        _ => {
            let first = plain_chars.next().is_some_and(|ch| ch.is_alphabetic() || ch == '_');
            first && plain_chars.all(|ch| ch.is_alphanumeric() || ch == '_')
        }
    }
}

/// Digits of other scripts, in their blocks of ten.
fn is_decimal(ch: char) -> bool {
    const ZEROS: [u32; 22] = [
        0x660, 0x6F0, 0x7C0, 0x966, 0x9E6, 0xA66, 0xAE6, 0xB66, 0xBE6, 0xC66, 0xCE6, 0xD66, 0xE50, 0xED0, 0xF20,
        0x1040, 0x17E0, 0x1810, 0xFF10, 0x1D7CE, 0x104A0, 0xA620,
    ];
    ZEROS.iter().any(|zero| (*zero..zero + 10).contains(&u32::from(ch)))
}
