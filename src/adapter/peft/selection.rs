//! Which modules an adapter's config selects, and the numbers it gives them: PEFT's rules, over the names that PEFT gives the base's
//! modules.
//!
//! - `target_modules` and `exclude_modules`: a text is a regular expression for the whole name; an entry of a list is the whole name or its
//!   end after a dot. "all-linear" is every linear layer but the head.
//! - `layers_to_transform` restricts what a list's entry selects as an end of a name; `layers_pattern` says where in the name the number of
//!   the layer stands, else it stands after the first two parts.
//! - keys of `rank_pattern` and `alpha_pattern` are regular expressions for the whole name or its end after a dot; the first counts.
//!
//! Python's expressions are read as they are, look-around and references included. A match may take [`MAX_STEPS`] steps back and no more.

use std::collections::{BTreeSet, HashSet};

use fancy_regex::{CompileError, Regex, RegexBuilder};
use serde_json::{Map, Value};

use crate::adapter::peft::refuse;
use crate::adapter::{BaseShape, Site};
use crate::error::Result;
use crate::request::Target;

/// Most bytes of one regular expression.
const MAX_EXPRESSION_BYTES: usize = 16 << 10;

/// Most regular expressions of one setting. Keys that are names are not counted.
const MAX_EXPRESSIONS: usize = 32;

/// Most steps back that one match may take.
const MAX_STEPS: usize = 5_000;

/// Most bytes of a compiled expression. All that a config may have take 16 MiB.
const MAX_COMPILED_BYTES: usize = 256 << 10;

/// What "all-linear" counts as where settings are compared, whatever the base has: digests have it in them.
const ALL_LINEAR: [Target; 7] =
    [Target::QProj, Target::KProj, Target::VProj, Target::OProj, Target::GateProj, Target::UpProj, Target::DownProj];

/// Modules of the base that PEFT could adapt and that are never adapted here.
const UNSERVED: [&str; 2] = ["lm_head", "embed_tokens"];

/// What PEFT calls a module of the base: `model.layers.0.self_attn.q_proj`, or without the first part where the adapter was made on the
/// model without its head.
pub(super) fn module_name(root: &str, site: Site) -> String {
    format!("{root}layers.{}.{}.{}", site.layer, site.target.block_part(), site.target.name())
}

/// A regular expression of Python's, with bounds on what it may cost.
#[derive(Debug, Clone)]
pub(super) struct Expression(Regex);

impl Expression {
    /// `around` puts the expression between what PEFT puts it between.
    fn new(field: &str, text: &str, around: impl Fn(&str) -> String) -> Result<Self> {
        let refused = |why: String| {
            let advice = "list the modules by name instead";
            refuse("UNSUPPORTED_SETTING", field, format!("is a regular expression that {why}; {advice}"))
        };
        if text.len() > MAX_EXPRESSION_BYTES {
            return Err(refused(format!("has more than {MAX_EXPRESSION_BYTES} bytes")));
        }
        let build = |text: &str| {
            let mut builder = RegexBuilder::new(text);
            builder.backtrack_limit(MAX_STEPS).delegate_size_limit(MAX_COMPILED_BYTES);
            builder.delegate_dfa_size_limit(MAX_COMPILED_BYTES).build().map_err(|e| match is_too_large(&e) {
                true => refused(format!("takes more than {MAX_COMPILED_BYTES} bytes when it is compiled")),
                false => refused(format!("cannot be read ({e})")),
            })
        };
        // By itself first: a bracket that it leaves open must not be closed by what comes around it.
        build(text)?;
        build(&around(text)).map(Self)
    }

    fn whole(field: &str, text: &str) -> Result<Self> {
        Self::new(field, text, |text| format!(r"^(?:{text})\z"))
    }

    fn costly(field: &str) -> crate::error::Error {
        let message = format!(
            "is a regular expression that takes more than {MAX_STEPS} steps to match a module's name; list the modules by name instead"
        );
        refuse("UNSUPPORTED_SETTING", field, message)
    }

    fn matches(&self, field: &str, name: &str) -> Result<bool> {
        self.0.is_match(name).map_err(|_| Self::costly(field))
    }
}

/// Whether an expression is sound and only too large.
fn is_too_large(error: &fancy_regex::Error) -> bool {
    let fancy_regex::Error::CompileError(error) = error else { return false };
    matches!(&**error, CompileError::InnerError(inner) if inner.size_limit().is_some())
}

/// `target_modules` or `exclude_modules`.
#[derive(Debug, Clone)]
enum Names {
    AllLinear,
    Expression(Expression),
    List(HashSet<String>),
}

/// How a name was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    No,
    /// As an end of the name.
    End,
    Whole,
}

impl Names {
    fn read(field: &str, value: &Value) -> Result<Self> {
        match value {
            Value::String(text) => Ok(Self::Expression(Expression::whole(field, text)?)),
            Value::Array(names) => {
                let name = |name: &Value| {
                    let wrong = || refuse("INVALID_SETTING", field, format!("holds {name}; must hold module names"));
                    name.as_str().map(str::to_owned).ok_or_else(wrong)
                };
                names.iter().map(name).collect::<Result<_>>().map(Self::List)
            }
            other => {
                let message = format!("is {other}; must be a list of module names, or a regular expression");
                Err(refuse("INVALID_SETTING", field, message))
            }
        }
    }

    fn find(&self, field: &str, name: &str) -> Result<Found> {
        let found = match self {
            Self::AllLinear if UNSERVED.iter().any(|unserved| name.ends_with(unserved)) => Found::No,
            Self::AllLinear => Found::Whole,
            Self::Expression(expression) if expression.matches(field, name)? => Found::Whole,
            Self::Expression(_) => Found::No,
            Self::List(names) if names.contains(name) => Found::Whole,
            Self::List(names) => {
                let ends = |(at, _): (usize, &str)| names.contains(&name[at + 1..]);
                if name.match_indices('.').any(ends) { Found::End } else { Found::No }
            }
        };
        Ok(found)
    }
}

/// `layers_to_transform` and `layers_pattern`.
#[derive(Debug, Clone)]
struct Layers {
    numbers: HashSet<u32>,
    /// Where the number stands; the first that matches counts.
    places: Vec<Expression>,
}

impl Layers {
    const FIELD: &str = "layers_pattern";

    fn contain(&self, name: &str) -> Result<bool> {
        for place in &self.places {
            let found = place.0.captures(name).map_err(|_| Expression::costly(Self::FIELD))?;
            if let Some(found) = found {
                let number = found.name("layer").and_then(|number| number.as_str().parse().ok());
                return Ok(number.is_some_and(|number| self.numbers.contains(&number)));
            }
        }
        Ok(false)
    }
}

/// Which modules a config selects.
#[derive(Debug, Clone)]
pub(super) struct Selection {
    targets: Names,
    exclude: Option<Names>,
    layers: Option<Layers>,
    /// Where the config says no more than that: the targets and the layers.
    plain: Option<(Vec<Target>, Option<Vec<u32>>)>,
}

impl Selection {
    /// Reads the four settings that select modules.
    pub(super) fn read(config: &Map<String, Value>) -> Result<Self> {
        let given = |key: &str| config.get(key).filter(|value| !says_nothing(value));
        let field = "target_modules";
        let targets = match config.get(field) {
            Some(Value::String(all)) if all.eq_ignore_ascii_case("all-linear") => Names::AllLinear,
            Some(value) if !value.is_null() => Names::read(field, value)?,
            _ => {
                let message = "is missing; name the modules that the adapter changes, such as [\"q_proj\", \"v_proj\"]";
                return Err(refuse("UNSUPPORTED_SETTING", field, message));
            }
        };
        let exclude = given("exclude_modules").map(|value| Names::read("exclude_modules", value)).transpose()?;
        let numbers = given("layers_to_transform").map(layer_numbers).transpose()?;
        let pattern = given(Layers::FIELD);
        if !matches!(targets, Names::List(_)) && (numbers.is_some() || pattern.is_some()) {
            let key = if numbers.is_some() { "layers_to_transform" } else { Layers::FIELD };
            let message = "cannot be used where target_modules is a text (PEFT refuses it too); list the modules by name, or leave it out";
            return Err(refuse("INVALID_SETTING", key, message));
        }
        if pattern.is_some() && config.get("layers_to_transform").is_none_or(Value::is_null) {
            let message = "needs layers_to_transform beside it (PEFT refuses it too); add that, or leave it out";
            return Err(refuse("INVALID_SETTING", Layers::FIELD, message));
        }
        let plain = plain_targets(&targets).filter(|_| exclude.is_none() && pattern.is_none());
        let plain = plain.map(|targets| (targets, numbers.clone()));
        let places = layer_places(pattern)?;
        let layers = numbers.map(|numbers| Layers { numbers: numbers.into_iter().collect(), places });
        Ok(Self { targets, exclude, layers, plain })
    }

    /// The targets and layers of a config that names nothing else, each sorted.
    pub(super) fn plain(&self) -> Option<&(Vec<Target>, Option<Vec<u32>>)> {
        self.plain.as_ref()
    }

    fn selects(&self, name: &str) -> Result<bool> {
        if let Some(exclude) = &self.exclude
            && exclude.find("exclude_modules", name)? != Found::No
        {
            return Ok(false);
        }
        match (self.targets.find("target_modules", name)?, &self.layers) {
            (Found::No, _) => Ok(false),
            (Found::End, Some(layers)) => layers.contain(name),
            _ => Ok(true),
        }
    }

    /// The sites it selects, in order, where the names of the modules begin with `root`. Refuses one that also selects the head or the
    /// embedding.
    pub(super) fn sites(&self, root: &str, shape: &BaseShape) -> Result<Vec<Site>> {
        for unserved in [UNSERVED[0].to_owned(), format!("{root}{}", UNSERVED[1])] {
            if self.selects(&unserved)? {
                let message = format!(
                    "selects {unserved}, which is served as the base has it; train again with modules of {} only",
                    shape.target_names()
                );
                return Err(refuse("UNSUPPORTED_SETTING", "target_modules", message));
            }
        }
        let mut sites = Vec::new();
        for site in shape.sites() {
            if self.selects(&module_name(root, site))? {
                sites.push(site);
            }
        }
        Ok(sites)
    }
}

/// Modules that are named by the ends of their names, whatever comes before, or by a regular expression for the whole name:
/// `feedforward_modules`.
#[derive(Debug, Clone)]
pub(super) enum Ends {
    List(Vec<String>),
    Expression(&'static str, Expression),
}

impl Ends {
    pub(super) fn read(field: &'static str, value: Option<&Value>) -> Result<Self> {
        match value {
            None | Some(Value::Null) => Ok(Self::List(Vec::new())),
            Some(Value::String(text)) => Ok(Self::Expression(field, Expression::whole(field, text)?)),
            Some(Value::Array(names)) => {
                let wrong =
                    |name: &Value| refuse("INVALID_SETTING", field, format!("holds {name}; must hold module names"));
                let name = |name: &Value| name.as_str().map(str::to_owned).ok_or_else(|| wrong(name));
                names.iter().map(name).collect::<Result<_>>().map(Self::List)
            }
            Some(other) => {
                let message = format!("is {other}; must be a list of module names, or a regular expression");
                Err(refuse("INVALID_SETTING", field, message))
            }
        }
    }

    /// Whether it names a module, by PEFT's name of it.
    pub(super) fn matches(&self, name: &str) -> Result<bool> {
        match self {
            Self::List(ends) => Ok(ends.iter().any(|end| name.ends_with(end.as_str()))),
            Self::Expression(field, expression) => expression.matches(field, name),
        }
    }

    /// The targets of a list of their names, sorted.
    pub(super) fn plain(&self) -> Option<Vec<Target>> {
        let Self::List(names) = self else { return None };
        let targets: Option<BTreeSet<Target>> = names.iter().map(|name| Target::from_name(name)).collect();
        Some(targets?.into_iter().collect())
    }
}

/// Whether a setting is there and says nothing.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

/// The targets of a list of their names, sorted.
fn plain_targets(names: &Names) -> Option<Vec<Target>> {
    let mut targets = match names {
        Names::AllLinear => ALL_LINEAR.to_vec(),
        Names::List(names) => names.iter().map(|name| Target::from_name(name)).collect::<Option<Vec<_>>>()?,
        Names::Expression(_) => return None,
    };
    targets.sort_unstable();
    Some(targets)
}

/// Layer numbers, sorted, each once.
fn layer_numbers(value: &Value) -> Result<Vec<u32>> {
    let wrong = || {
        let message = format!("is {value}; must be a layer's number or a list of them");
        refuse("INVALID_SETTING", "layers_to_transform", message)
    };
    let number = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok()).ok_or_else(wrong);
    let mut layers = match value {
        Value::Array(list) => list.iter().map(number).collect::<Result<Vec<_>>>()?,
        one => vec![number(one)?],
    };
    layers.sort_unstable();
    layers.dedup();
    Ok(layers)
}

/// The expressions that find a layer's number in a name, as PEFT makes them.
fn layer_places(pattern: Option<&Value>) -> Result<Vec<Expression>> {
    let field = Layers::FIELD;
    let wrong = || refuse("INVALID_SETTING", field, "must be a text or a list of texts, such as \"layers\"");
    let texts = match pattern {
        None => {
            return Ok(vec![Expression::new(field, r"[^.]*", |any| format!(r"^(?:.*?\.{any}\.(?P<layer>\d+)\.)"))?]);
        }
        Some(Value::String(one)) => vec![one.as_str()],
        Some(Value::Array(list)) => list.iter().map(Value::as_str).collect::<Option<_>>().ok_or_else(wrong)?,
        Some(_) => return Err(wrong()),
    };
    check_count(field, texts.len())?;
    let place = |text: &str| format!(r"^(?:(?:^|.*?\.){text}\.(?P<layer>\d+)\.)");
    texts.iter().map(|text| Expression::new(field, text, place)).collect()
}

fn check_count(field: &str, count: usize) -> Result<()> {
    if count > MAX_EXPRESSIONS {
        let message =
            format!("holds {count} regular expressions; at most {MAX_EXPRESSIONS} are read; name the modules instead");
        return Err(refuse("UNSUPPORTED_SETTING", field, message));
    }
    Ok(())
}

/// A key of `rank_pattern` or `alpha_pattern`.
#[derive(Debug, Clone)]
enum Key {
    /// Letters, digits, underscores and dots, which stand for any character.
    Plain(String),
    Expression(Expression),
}

impl Key {
    fn read(field: &str, key: &str) -> Result<Self> {
        if Self::is_plain(key) {
            return Ok(Self::Plain(key.to_owned()));
        }
        Expression::new(field, key, |key| format!(r"^(?:(.*\.)?({key})\z)")).map(Self::Expression)
    }

    fn is_plain(key: &str) -> bool {
        !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.')
    }

    fn matches(&self, field: &str, name: &str) -> Result<bool> {
        match self {
            Self::Expression(expression) => expression.matches(field, name),
            Self::Plain(key) => {
                let Some(at) = name.len().checked_sub(key.len()) else { return Ok(false) };
                let (head, tail) = name.split_at(at);
                let is_end = tail.bytes().zip(key.bytes()).all(|(c, k)| k == b'.' || k == c);
                Ok(is_end && (head.is_empty() || head.ends_with('.')))
            }
        }
    }
}

/// Numbers by module, in the order of the file: the first key that matches counts.
#[derive(Debug, Clone)]
pub(super) struct Pattern {
    field: &'static str,
    entries: Vec<(String, Key, f64)>,
}

impl Pattern {
    pub(super) fn read(field: &'static str, config: &Map<String, Value>) -> Result<Self> {
        let map = match config.get(field) {
            None | Some(Value::Null) => return Ok(Self { field, entries: Vec::new() }),
            Some(Value::Object(map)) => map,
            Some(other) => {
                let message = format!("is {other}; must be an object of numbers by module");
                return Err(refuse("INVALID_SETTING", field, message));
            }
        };
        let entry = |(key, value): (&String, &Value)| {
            let field = format!("{field}.{key}");
            let number = value.as_f64().filter(|x| x.is_finite());
            let number =
                number.ok_or_else(|| refuse("INVALID_SETTING", &*field, format!("is {value}; must be a number")))?;
            Ok((key.clone(), Key::read(&field, key)?, number))
        };
        check_count(field, map.keys().filter(|key| !Key::is_plain(key)).count())?;
        let entries = map.iter().map(entry).collect::<Result<_>>()?;
        Ok(Self { field, entries })
    }

    /// The number of a module, by PEFT's name of it.
    pub(super) fn get(&self, name: &str) -> Result<Option<f64>> {
        for (_, key, number) in &self.entries {
            if key.matches(self.field, name)? {
                return Ok(Some(*number));
            }
        }
        Ok(None)
    }

    /// (key, number), in the order of the file.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&str, f64)> {
        self.entries.iter().map(|(key, _, number)| (key.as_str(), *number))
    }
}
