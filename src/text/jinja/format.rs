//! Python's two ways to put values into a text: `%` and `format`.

use std::sync::Arc;

use super::filters::Given;
use super::value::{Meter, SequenceKind, Str, Value, plain};
use super::{Outcome, error, ops, repr};

/// Most characters that a value is filled up to.
const MAX_WIDTH: usize = 10_000;

/// How a value is written.
#[derive(Debug, Default)]
struct Spec {
    fill: Option<char>,
    align: Option<char>,
    sign: Option<char>,
    alternate: bool,
    comma: bool,
    width: usize,
    precision: Option<usize>,
    kind: Option<char>,
}

/// Digits at the beginning.
fn digits(chars: &mut &[char]) -> Outcome<Option<usize>> {
    let count = chars.iter().take_while(|ch| ch.is_ascii_digit()).count();
    let (number, rest) = chars.split_at(count);
    *chars = rest;
    if count == 0 {
        return Ok(None);
    }
    match number.iter().collect::<String>().parse() {
        Ok(number) if number <= MAX_WIDTH => Ok(Some(number)),
        _ => error(format!("a width is over {MAX_WIDTH}")),
    }
}

fn take(chars: &mut &[char], set: &str) -> Option<char> {
    let (first, rest) = chars.split_first()?;
    set.contains(*first).then(|| {
        *chars = rest;
        *first
    })
}

/// The values of a `%`.
enum Values<'v> {
    InOrder(std::slice::Iter<'v, Value>),
    ByName(&'v Value),
}

/// `pattern % values`.
pub(super) fn percent(meter: &Arc<Meter>, pattern: &Str, values: &Value) -> Outcome<Value> {
    let one = [values.clone()];
    let mut left = match values {
        Value::Sequence(sequence) if sequence.kind == SequenceKind::Tuple => Values::InOrder(sequence.items.iter()),
        Value::Dict(_) => Values::ByName(values),
        _ => Values::InOrder(one.iter()),
    };
    let codes = pattern.chars();
    let chars: Vec<char> = codes.iter().map(|code| plain(*code)).collect();
    let mut rest = &chars[..];
    let mut out: Vec<u32> = Vec::new();
    while let Some(at) = rest.iter().position(|ch| *ch == '%') {
        let from = chars.len() - rest.len();
        out.extend_from_slice(&codes[from..from + at]);
        rest = &rest[at + 1..];
        if take(&mut rest, "%").is_some() {
            out.push(u32::from('%'));
            continue;
        }
        let value = next_value(meter, &mut rest, &mut left)?;
        let (spec, value) = percent_spec(meter, &mut rest, value, &mut left)?;
        write(meter, &value, &spec, &mut out)?;
    }
    out.extend_from_slice(&codes[chars.len() - rest.len()..]);
    match left {
        Values::InOrder(left) if left.len() > 0 => error("not all arguments converted during string formatting"),
        _ => meter.text(out),
    }
}

/// A value that is named before its form; `None` where it comes in order.
fn next_value(meter: &Arc<Meter>, rest: &mut &[char], values: &mut Values<'_>) -> Outcome<Option<Value>> {
    if take(rest, "(").is_none() {
        return Ok(None);
    }
    let Some(end) = rest.iter().position(|ch| *ch == ')') else { return error("incomplete format key") };
    let name: String = rest[..end].iter().collect();
    *rest = &rest[end + 1..];
    match values {
        Values::ByName(Value::Dict(dict)) => match dict.get_text(&name) {
            Some(value) => {
                meter.step(1)?;
                Ok(Some(value.clone()))
            }
            None => error(format!("'{name}'")),
        },
        _ => error("format requires a mapping"),
    }
}

fn percent_spec(
    meter: &Arc<Meter>,
    rest: &mut &[char],
    value: Option<Value>,
    values: &mut Values<'_>,
) -> Outcome<(Spec, Value)> {
    let mut spec = Spec { align: Some('>'), ..Spec::default() };
    while let Some(flag) = take(rest, "-+ #0") {
        match flag {
            '-' => spec.align = Some('<'),
            '#' => spec.alternate = true,
            '0' => spec.fill = Some('0'),
            sign => spec.sign = Some(sign),
        }
    }
    spec.width = digits(rest)?.unwrap_or(0);
    if take(rest, ".").is_some() {
        spec.precision = Some(digits(rest)?.unwrap_or(0));
    }
    let Some(kind) = take(rest, "sradiufFeEgGxXoc") else { return error("unsupported format character") };
    let value = match (value, values) {
        (Some(value), _) => value,
        (None, Values::InOrder(values)) => match values.next() {
            Some(value) => value.clone(),
            None => return error("not enough arguments for format string"),
        },
        (None, Values::ByName(whole)) => (*whole).clone(),
    };
    let value = match kind {
        's' => repr::string(meter, &value)?,
        'r' | 'a' => represented(meter, &value)?,
        'c' => value,
        _ if value.number().is_none() => {
            return error(format!("%{kind} format: a real number is required, not {}", value.type_name()));
        }
        'd' | 'i' | 'u' => Value::Int(value.integer().unwrap_or(value.number().unwrap_or_default() as i64)),
        _ => value,
    };
    if spec.align == Some('<') || matches!(value, Value::Text(_)) {
        spec.fill = None;
    } else if spec.fill.is_some() {
        spec.align = Some('=');
    }
    spec.kind = match kind {
        's' | 'r' | 'a' => Some('s'),
        'd' | 'i' | 'u' => Some('d'),
        other => Some(other),
    };
    Ok((spec, value))
}

fn represented(meter: &Arc<Meter>, value: &Value) -> Outcome<Value> {
    let mut out = Vec::new();
    repr::repr(meter, value, &mut out)?;
    meter.text(out)
}

/// `text.format(...)`.
pub(super) fn format(meter: &Arc<Meter>, pattern: &Str, given: &Given) -> Outcome<Value> {
    let codes = pattern.chars();
    let chars: Vec<char> = codes.iter().map(|code| plain(*code)).collect();
    let mut out: Vec<u32> = Vec::new();
    let (mut at, mut automatic) = (0, 0);
    while at < chars.len() {
        match chars[at] {
            ch @ ('{' | '}') if chars.get(at + 1) == Some(&ch) => {
                out.push(codes[at]);
                at += 2;
            }
            '}' => return error("Single '}' encountered in format string"),
            '{' => {
                let Some(len) = chars[at..].iter().position(|ch| *ch == '}') else {
                    return error("expected '}' before end of string");
                };
                field(meter, &chars[at + 1..at + len], given, &mut automatic, &mut out)?;
                at += len + 1;
            }
            _ => {
                out.push(codes[at]);
                at += 1;
            }
        }
    }
    meter.text(out)
}

/// What stands in braces: which value, how it is turned into text, and its form.
fn field(meter: &Arc<Meter>, inside: &[char], given: &Given, automatic: &mut usize, out: &mut Vec<u32>) -> Outcome<()> {
    let text: String = inside.iter().collect();
    let (name, spec) = text.split_once(':').unwrap_or((&text, ""));
    let (name, conversion) = match name.split_once('!') {
        Some((name, conversion)) => (name, Some(conversion)),
        None => (name, None),
    };
    let end = name.find(['.', '[']).unwrap_or(name.len());
    let (first, mut path) = name.split_at(end);
    let mut value = match first.parse::<usize>() {
        Ok(at) => given.positional.get(at),
        Err(_) if first.is_empty() => {
            *automatic += 1;
            given.positional.get(*automatic - 1)
        }
        Err(_) => given.named.iter().find(|(own, _)| own == first).map(|(_, value)| value),
    }
    .cloned();
    while let Some(of) = &value
        && !path.is_empty()
    {
        let (step, rest) = match path.strip_prefix('[') {
            Some(inner) => inner.split_once(']').unwrap_or((inner, "")),
            None => {
                let inner = &path[1..];
                inner.split_at(inner.find(['.', '[']).unwrap_or(inner.len()))
            }
        };
        value = Some(match (path.starts_with('['), step.parse::<i64>()) {
            (true, Ok(index)) => ops::item(meter, of, &Value::Int(index))?,
            (true, Err(_)) => ops::item(meter, of, &meter.own(step)?)?,
            (false, _) => ops::attribute(meter, of, step)?,
        });
        path = rest;
    }
    let Some(value) = value else { return error("Replacement index out of range for positional args tuple") };
    let value = match conversion {
        Some("r" | "a") => represented(meter, &value)?,
        Some("s") => repr::string(meter, &value)?,
        _ => value,
    };
    let spec: Vec<char> = spec.chars().collect();
    write(meter, &value, &format_spec(&spec)?, out)
}

fn format_spec(chars: &[char]) -> Outcome<Spec> {
    let mut spec = Spec::default();
    let mut rest = chars;
    if let [fill, align, after @ ..] = rest
        && "<>^=".contains(*align)
    {
        (spec.fill, spec.align, rest) = (Some(*fill), Some(*align), after);
    } else {
        spec.align = take(&mut rest, "<>^=");
    }
    spec.sign = take(&mut rest, "+- ");
    spec.alternate = take(&mut rest, "#").is_some();
    if take(&mut rest, "0").is_some() {
        spec.fill = spec.fill.or(Some('0'));
        spec.align = spec.align.or(Some('='));
    }
    spec.width = digits(&mut rest)?.unwrap_or(0);
    spec.comma = take(&mut rest, ",").is_some();
    if take(&mut rest, ".").is_some() {
        spec.precision = digits(&mut rest)?;
    }
    spec.kind = take(&mut rest, "sdfFeEgGxXobc%n");
    match rest.is_empty() {
        true => Ok(spec),
        false => error("Invalid format specifier"),
    }
}

fn write(meter: &Arc<Meter>, value: &Value, spec: &Spec, out: &mut Vec<u32>) -> Outcome<()> {
    let (sign, mut body): (String, Vec<u32>) = match (value, value.number()) {
        (Value::Bool(_), _) if spec.kind.is_none() => (String::new(), string_chars(meter, value)?),
        (_, Some(_)) if !matches!(spec.kind, Some('s')) => number(value, spec)?,
        _ => {
            let mut chars = string_chars(meter, value)?;
            chars.truncate(spec.precision.unwrap_or(usize::MAX));
            (String::new(), chars)
        }
    };
    let missing = spec.width.saturating_sub(body.len() + sign.chars().count());
    meter.room((out.len() + body.len() + spec.width) * 4)?;
    meter.work(body.len() + spec.width)?;
    let fill = |count: usize| std::iter::repeat_n(u32::from(spec.fill.unwrap_or(' ')), count);
    let is_number = value.number().is_some() && spec.kind != Some('s');
    let align = spec.align.unwrap_or(if is_number { '>' } else { '<' });
    let left = match align {
        '<' | '=' => 0,
        '^' => missing / 2,
        _ => missing,
    };
    out.extend(fill(left));
    out.extend(sign.chars().map(u32::from));
    out.extend(fill(if align == '=' { missing } else { 0 }));
    out.append(&mut body);
    out.extend(fill(if align == '=' { 0 } else { missing - left }));
    Ok(())
}

fn string_chars(meter: &Arc<Meter>, value: &Value) -> Outcome<Vec<u32>> {
    let mut chars = Vec::new();
    repr::write(meter, value, &mut chars)?;
    Ok(chars)
}

/// A number's sign and its digits.
fn number(value: &Value, spec: &Spec) -> Outcome<(String, Vec<u32>)> {
    let number = value.number().unwrap_or_default();
    let negative = number < 0.0 || (number == 0.0 && number.is_sign_negative());
    let whole = value.integer().map(i64::unsigned_abs);
    let precision = spec.precision.unwrap_or(6);
    let size = number.abs();
    let digits = match (spec.kind, whole) {
        (Some('d' | 'n') | None, Some(whole)) => whole.to_string(),
        (Some('x'), Some(whole)) => format!("{}{whole:x}", if spec.alternate { "0x" } else { "" }),
        (Some('X'), Some(whole)) => format!("{}{whole:X}", if spec.alternate { "0X" } else { "" }),
        (Some('o'), Some(whole)) => format!("{}{whole:o}", if spec.alternate { "0o" } else { "" }),
        (Some('b'), Some(whole)) => format!("{}{whole:b}", if spec.alternate { "0b" } else { "" }),
        (Some('c'), Some(whole)) => {
            let ch = u32::try_from(whole).ok().and_then(char::from_u32);
            ch.map(String::from).unwrap_or_default()
        }
        (Some('%'), _) => format!("{:.precision$}%", size * 100.0),
        (Some('f' | 'F'), _) => format!("{size:.precision$}"),
        (Some('e' | 'E'), _) => exponent(&format!("{size:.precision$e}"), spec.kind == Some('E')),
        (Some('g' | 'G'), _) => general(size, spec.precision.unwrap_or(6).max(1)),
        (None, None) => match spec.precision {
            Some(precision) => general(size, precision.max(1)),
            None => repr::float(size),
        },
        (Some(kind), _) => {
            return error(format!("Unknown format code '{kind}' for object of type '{}'", value.type_name()));
        }
    };
    let digits = if spec.comma { grouped(&digits) } else { digits };
    let sign = match (negative, spec.sign) {
        (true, _) => "-",
        (false, Some('+')) => "+",
        (false, Some(' ')) => " ",
        _ => "",
    };
    Ok((sign.to_owned(), digits.chars().map(u32::from).collect()))
}

fn exponent(scientific: &str, upper: bool) -> String {
    let (digits, power) = scientific.split_once('e').unwrap_or((scientific, "0"));
    let power: i32 = power.parse().unwrap_or(0);
    format!("{digits}{}{}{:02}", if upper { 'E' } else { 'e' }, if power < 0 { '-' } else { '+' }, power.abs())
}

/// So many significant digits, without zeros at the end.
fn general(value: f64, precision: usize) -> String {
    let scientific = format!("{value:.*e}", precision - 1);
    let power: i32 = scientific.split_once('e').and_then(|(_, power)| power.parse().ok()).unwrap_or(0);
    let trimmed = |text: &str| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text.to_owned(),
    };
    if power < -4 || power >= precision as i32 {
        let (digits, power) = scientific.split_once('e').unwrap_or((&scientific, "0"));
        return exponent(&format!("{}e{power}", trimmed(digits)), false);
    }
    trimmed(&format!("{value:.*}", (precision as i32 - 1 - power).max(0) as usize))
}

/// With a comma before every third digit from the back.
fn grouped(digits: &str) -> String {
    let (whole, rest) = digits.split_at(digits.find(['.', 'e', '%']).unwrap_or(digits.len()));
    let mut out = String::new();
    for (i, ch) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(ch);
    }
    out + rest
}
