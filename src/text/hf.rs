//! The vocabulary of a Hugging Face folder: `tokenizer.json` with the files beside it, as what a GGUF file says of the same text.
//!
//! What a file may ask for is a closed list: a normalizer, pre-tokenizer or kind of token that is not in it is refused by name, because a
//! tokenizer that leaves it out gives other ids without an error.

use std::collections::HashMap;
use std::fmt;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::tokenizer::{HF_RAW, TokenizerModel, Vocabulary, is_marker, names_end};
use crate::error::{Error, Result};

/// The texts of a folder's files; those beside `tokenizer.json` may be missing.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokenizerFiles<'a> {
    /// `tokenizer.json`.
    pub tokenizer: &'a [u8],
    /// `tokenizer_config.json`.
    pub config: Option<&'a [u8]>,
    /// `generation_config.json`, for the ids that end an answer.
    pub generation: Option<&'a [u8]>,
    /// `chat_template.jinja`, which goes before the template in `tokenizer_config.json`.
    pub template: Option<&'a str>,
}

fn refused(field: &str, message: impl Into<String>) -> Error {
    Error::invalid_because("UNSUPPORTED_TOKENIZER", field, message)
}

fn json<'a, T: Deserialize<'a>>(name: &str, text: &'a [u8]) -> Result<T> {
    serde_json::from_slice(text).map_err(|e| refused(name, format!("can't be read: {e}")))
}

#[derive(Deserialize)]
struct TokenizerJson {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    model: ModelJson,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct ModelJson {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    vocab: Value,
    #[serde(default)]
    merges: Vec<Merge>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    unk_token: Option<String>,
    dropout: Option<f64>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

/// Two pieces: written as one text with a space between, or as two.
struct Merge(String, String);

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(MergeVisitor)
    }
}

struct MergeVisitor;

impl<'de> Visitor<'de> for MergeVisitor {
    type Value = Merge;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a merge of two pieces")
    }

    fn visit_str<E: de::Error>(self, both: &str) -> std::result::Result<Merge, E> {
        let pair = both.split_once(' ').map(|(left, right)| Merge(left.to_owned(), right.to_owned()));
        pair.ok_or_else(|| E::custom("a merge that is no pair"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Merge, A::Error> {
        let two = (list.next_element()?, list.next_element()?, list.next_element::<de::IgnoredAny>()?);
        match two {
            (Some(left), Some(right), None) => Ok(Merge(left, right)),
            _ => Err(de::Error::custom("a merge that is no pair")),
        }
    }
}

/// A token in `tokenizer_config.json`: its text, or an object that holds it.
fn named(config: &Value, name: &str) -> Option<String> {
    let token = config.get(name)?;
    token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
}

impl Vocabulary {
    /// Reads a folder's tokenizer for an embedding of so many rows.
    ///
    /// # Errors
    /// UNSUPPORTED_TOKENIZER for what is damaged, not known, or does not fit the embedding.
    pub fn of_hugging_face(files: &TokenizerFiles<'_>, rows: usize) -> Result<Self> {
        let mut tokenizer: TokenizerJson = json("tokenizer.json", files.tokenizer)?;
        let config: Value = files.config.map_or(Ok(Value::Null), |text| json("tokenizer_config.json", text))?;
        let generation: Value =
            files.generation.map_or(Ok(Value::Null), |text| json("generation_config.json", text))?;
        let tokens = tokens(&tokenizer, rows)?;
        let ids: HashMap<&str, u32> = tokens.iter().map(String::as_str).zip(0..).collect();
        let id = |name: Option<String>| name.and_then(|name| ids.get(name.as_str()).copied());
        let (form, prefixed) = form(&tokenizer)?;
        let begin = begins_with(&tokenizer.post_processor);
        let mut vocabulary = Self {
            model: TokenizerModel::BytePairs,
            composes: form.composes,
            pre: form.pre.to_owned(),
            add_space_prefix: prefixed,
            merges: std::mem::take(&mut tokenizer.model.merges)
                .into_iter()
                .map(|Merge(left, right)| (left, right))
                .collect(),
            chat_template: template(files, &config),
            add_bos: begin.is_some() || config.get("add_bos_token").and_then(Value::as_bool).unwrap_or(false),
            bos: id(begin).or_else(|| id(named(&config, "bos_token"))),
            unknown: id(named(&config, "unk_token").or(tokenizer.model.unk_token.clone())),
            padding: id(named(&config, "pad_token")),
            ..Self::default()
        };
        if form.pre == HF_RAW {
            vocabulary.bytes = (0..=255_u8).filter_map(|byte| id(Some(format!("<0x{byte:02X}>")))).collect();
        }
        let mut ends = ends(&generation);
        let eos = id(named(&config, "eos_token")).or_else(|| ends.first().copied());
        vocabulary.eos =
            eos.ok_or_else(|| refused("tokenizer_config.json", "names no eos_token that is in tokenizer.json"))?;
        add_special(&mut vocabulary, &tokenizer.added_tokens, &mut ends)?;
        vocabulary.ends = ends;
        vocabulary.tokens = tokens;
        vocabulary.check()?;
        Ok(vocabulary)
    }
}

/// All tokens by id, with names for the rows that have none.
fn tokens(tokenizer: &TokenizerJson, rows: usize) -> Result<Vec<String>> {
    const FIELD: &str = "tokenizer.json";
    let Value::Object(vocab) = &tokenizer.model.vocab else {
        return Err(refused(FIELD, "has no vocabulary of texts and ids"));
    };
    let mut tokens: Vec<Option<String>> = vec![None; rows];
    let model = vocab.iter().map(|(token, id)| (token, id.as_u64().unwrap_or(u64::MAX)));
    let added = tokenizer.added_tokens.iter().map(|token| (&token.content, u64::from(token.id)));
    for (token, id) in model.chain(added) {
        let place = usize::try_from(id).ok().and_then(|id| tokens.get_mut(id));
        let Some(place) = place else {
            let message = format!("gives the token {token:?} the id {id}, and the embedding has {rows} rows");
            return Err(refused(FIELD, message));
        };
        match place {
            Some(other) if other != token => {
                return Err(refused(FIELD, format!("gives the id {id} to {other:?} and to {token:?}")));
            }
            place => *place = Some(token.clone()),
        }
    }
    Ok((0..).zip(tokens).map(|(id, token): (usize, _)| token.unwrap_or_else(|| format!("[PAD{id}]"))).collect())
}

/// How a text is brought to words.
struct Form {
    composes: bool,
    pre: &'static str,
}

/// The expressions of the families' own files, with whether whole words go before merges.
const SPLITS: [(&str, bool, &str); 8] = [
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        false,
        "qwen2",
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        false,
        "qwen35",
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        true,
        "llama-bpe",
    ),
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        false,
        "dbrx",
    ),
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        false,
        "dbrx",
    ),
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        true,
        "tekken",
    ),
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        false,
        "gpt-4o",
    ),
    (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", false, "gpt-2"),
];

/// How words come to be, and whether a text begins with a space of its own.
fn form(tokenizer: &TokenizerJson) -> Result<(Form, bool)> {
    const FIELD: &str = "tokenizer.json";
    let model = &tokenizer.model;
    let empty = |text: &Option<String>| text.as_deref().is_none_or(str::is_empty);
    match model.kind.as_deref() {
        Some("BPE") | None => {}
        Some(other) => return Err(refused(FIELD, format!("has the model {other:?}; \"BPE\" can be read"))),
    }
    if model.dropout.is_some_and(|dropout| dropout != 0.0) {
        return Err(refused(FIELD, "drops merges at random (model.dropout)"));
    }
    if !empty(&model.continuing_subword_prefix) || !empty(&model.end_of_word_suffix) {
        return Err(refused(FIELD, "marks words by prefixes or suffixes, which is not known"));
    }
    let (normalizers, splits) =
        (steps(&tokenizer.normalizer, "normalizers"), steps(&tokenizer.pre_tokenizer, "pretokenizers"));
    let Normal { composes, spaces, mut prefixed } = normal(&normalizers)?;
    let mut raw = spaces;
    let mut words: Vec<&Value> = Vec::new();
    for step in splits {
        match kind(step) {
            "Metaspace" if step["replacement"] == "\u{2581}" && step["split"] == false => {
                raw = true;
                prefixed |= step["prepend_scheme"] != "never";
            }
            // Of spaces, which are written as something else by now.
            "Split" if raw && step["pattern"]["String"] == " " => {}
            _ => words.push(step),
        }
    }
    if raw {
        return match (words.first(), model.byte_fallback && !model.ignore_merges) {
            (None, true) => Ok((Form { composes, pre: HF_RAW }, prefixed)),
            (None, false) => {
                Err(refused(FIELD, "has no bytes for characters that it does not know (model.byte_fallback)"))
            }
            (Some(step), _) => Err(unknown("pre_tokenizer", step)),
        };
    }
    Ok((Form { composes, pre: byte_level(&words, model.ignore_merges)? }, false))
}

/// What is done to a text first.
struct Normal {
    composes: bool,
    /// Whether spaces are written as U+2581.
    spaces: bool,
    prefixed: bool,
}

fn normal(normalizers: &[&Value]) -> Result<Normal> {
    let mut normal = Normal { composes: false, spaces: false, prefixed: false };
    for step in normalizers {
        match kind(step) {
            "NFC" => normal.composes = true,
            "Replace" if step["pattern"]["String"] == " " && step["content"] == "\u{2581}" => normal.spaces = true,
            "Prepend" if step["prepend"] == "\u{2581}" => normal.prefixed = true,
            _ => return Err(unknown("normalizer", step)),
        }
    }
    match normal.prefixed && !normal.spaces {
        true => Err(refused("tokenizer.json", "puts a space before a text and leaves others as they are")),
        false => Ok(normal),
    }
}

/// The pre-tokenizer that a file's steps are.
fn byte_level(steps: &[&Value], whole_words: bool) -> Result<&'static str> {
    let plain = |step: &Value| kind(step) == "ByteLevel" && step["add_prefix_space"] != true;
    let by_words = |step: &Value| plain(step) && step["use_regex"] != false;
    let digits = |step: &Value| kind(step) == "Digits" && step["individual_digits"] == true;
    let isolated = |step: &Value| kind(step) == "Split" && step["behavior"] == "Isolated" && step["invert"] != true;
    match steps {
        [words] if by_words(words) && !whole_words => Ok("gpt-2"),
        [single, words] if digits(single) && by_words(words) && !whole_words => Ok("smollm"),
        [split, bytes] if isolated(split) && plain(bytes) && bytes["use_regex"] == false => {
            let expression = split["pattern"]["Regex"].as_str().unwrap_or_default();
            let known = SPLITS.iter().find(|(own, whole, _)| *own == expression && *whole == whole_words);
            known.map(|(_, _, pre)| *pre).ok_or_else(|| unknown("pre_tokenizer", split))
        }
        [] => Err(refused("tokenizer.json", "has no pre_tokenizer, and no spaces as U+2581 either")),
        [step, ..] => Err(unknown("pre_tokenizer", step)),
    }
}

/// The steps of a sequence, or the only one.
fn steps<'v>(value: &'v Value, list: &str) -> Vec<&'v Value> {
    match (value, kind(value)) {
        (Value::Null, _) => Vec::new(),
        (_, "Sequence") => value[list].as_array().map(|steps| steps.iter().collect()).unwrap_or_default(),
        _ => vec![value],
    }
}

fn kind(step: &Value) -> &str {
    step["type"].as_str().unwrap_or_default()
}

fn unknown(what: &str, step: &Value) -> Error {
    let shown: String = step.to_string().chars().take(200).collect();
    refused("tokenizer.json", format!("has the {what} {shown}, which is not known; another would give wrong ids"))
}

/// The token that the post-processor puts before a text.
fn begins_with(processor: &Value) -> Option<String> {
    let steps = steps(processor, "processors");
    let template = steps.into_iter().find(|step| kind(step) == "TemplateProcessing")?;
    template["single"][0]["SpecialToken"]["id"].as_str().map(str::to_owned)
}

/// The ids that end an answer, as generation is told.
fn ends(generation: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match generation.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(one) => id(one).into_iter().collect(),
        None => Vec::new(),
    }
}

/// The template: a file of its own, or an entry of the configuration, of several the one called "default".
fn template(files: &TokenizerFiles<'_>, config: &Value) -> String {
    let own = files.template.map(str::to_owned);
    let entry = || match config.get("chat_template")? {
        Value::Array(list) => {
            let default = list.iter().find(|entry| entry["name"] == "default")?;
            default["template"].as_str().map(str::to_owned)
        }
        text => text.as_str().map(str::to_owned),
    };
    own.or_else(entry).unwrap_or_default()
}

/// Sorts the added tokens by what they are.
fn add_special(vocabulary: &mut Vocabulary, added: &[AddedToken], ends: &mut Vec<u32>) -> Result<()> {
    for token in added {
        let (id, content) = (token.id, &token.content);
        if token.lstrip || token.single_word {
            let message = format!("has the added token {content:?} with lstrip or single_word, which is not known");
            return Err(refused("tokenizer.json", message));
        }
        match token.special || is_marker(content, &vocabulary.chat_template) {
            true => vocabulary.control.push(id),
            false => vocabulary.user_defined.push(id),
        }
        if token.rstrip {
            vocabulary.strips_after.push(id);
        }
        if names_end(content, token.special) {
            ends.push(id);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Text;
    use serde_json::json;

    /// Bytes, one merge, two added tokens.
    fn folder(change: impl FnOnce(&mut Value)) -> Result<Vocabulary> {
        let tiny = Vocabulary::tiny();
        let mut vocab: serde_json::Map<String, Value> =
            (0..256).map(|id| (tiny.tokens[id].clone(), json!(id))).collect();
        vocab.insert("ab".into(), json!(256));
        let added = |id: u32, content: &str| json!({"id": id, "content": content, "special": true});
        let mut file = json!({
            "added_tokens": [added(257, "<|im_start|>"), added(258, "<|im_end|>")],
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
            "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|im_start|>"}}, {"Sequence": {"id": "A"}}]},
            "model": {"type": "BPE", "vocab": vocab, "merges": ["a b"]},
        });
        change(&mut file);
        let config =
            json!({"eos_token": "<|im_end|>", "chat_template": [{"name": "default", "template": tiny.chat_template}]});
        let (file, config) = (file.to_string(), config.to_string());
        let generation = br#"{"eos_token_id": [258, 257]}"#;
        let files = TokenizerFiles {
            tokenizer: file.as_bytes(),
            config: Some(config.as_bytes()),
            generation: Some(generation),
            template: None,
        };
        Vocabulary::of_hugging_face(&files, 260)
    }

    #[test]
    fn a_folder_is_read() {
        let vocabulary = folder(|_| {}).unwrap();
        assert_eq!((vocabulary.eos, vocabulary.bos, vocabulary.add_bos), (258, Some(257), true));
        assert_eq!((vocabulary.control.as_slice(), vocabulary.tokens[259].as_str()), (&[257, 258][..], "[PAD259]"));
        let text = Text::new(vocabulary).unwrap();
        assert_eq!(text.encode("ab").unwrap(), [257, 256]);
        assert_eq!(text.encode_plain("e\u{301}").unwrap(), text.encode_plain("\u{e9}").unwrap(), "composed first");
        assert_eq!(text.ends(), [257, 258]);
        let pairs = folder(|file| file["model"]["merges"] = json!([["a", "b"]])).unwrap();
        assert_eq!(pairs.merges, [("a".to_owned(), "b".to_owned())]);
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let refused = |change: fn(&mut Value), expected: &str| {
            let error = folder(change).unwrap_err();
            assert!(matches!(error, Error::Invalid { reason: "UNSUPPORTED_TOKENIZER", .. }), "{error}");
            assert!(error.to_string().contains(expected), "{error} does not say {expected}");
        };
        refused(|file| file["model"]["type"] = json!("Unigram"), "\"Unigram\"");
        refused(|file| file["normalizer"] = json!({"type": "Lowercase"}), "Lowercase");
        refused(|file| file["pre_tokenizer"] = json!({"type": "Whitespace"}), "Whitespace");
        refused(|file| file["pre_tokenizer"] = Value::Null, "no pre_tokenizer");
        refused(|file| file["pre_tokenizer"]["add_prefix_space"] = json!(true), "add_prefix_space");
        refused(|file| file["model"]["dropout"] = json!(0.1), "dropout");
        refused(|file| file["model"]["continuing_subword_prefix"] = json!("##"), "prefixes");
        refused(|file| file["model"]["merges"] = json!(["ab"]), "no pair");
        refused(|file| file["model"]["vocab"] = json!([["a", 0.5]]), "no vocabulary");
        refused(|file| file["model"]["vocab"]["zz"] = json!(5000), "the embedding has 260 rows");
        refused(|file| file["model"]["vocab"]["zz"] = json!(-1), "\"zz\"");
        refused(|file| file["added_tokens"][0]["id"] = json!(3), "gives the id 3 to");
        refused(|file| file["added_tokens"][0]["lstrip"] = json!(true), "lstrip");
        refused(|file| *file = json!([]), "can't be read");
    }
}
