//! From text to ids and back. Which text may become a control token is decided here; words and pieces are the models' own
//! ([`bpe`], [`spm`]).

mod bpe;
mod marks;
mod pre;
mod spm;
#[cfg(test)]
mod tests;

use std::borrow::Cow;

use aho_corasick::{AhoCorasick, MatchKind};
use unicode_normalization::UnicodeNormalization;

pub use marks::{is_marker, names_control, names_end};

use crate::error::{Error, Result};
use bpe::Bpe;
pub(super) use pre::HF_RAW;
use pre::Pre;
use spm::Spm;

/// How SentencePiece writes a space.
const SPACE: &str = "\u{2581}";

/// How a vocabulary's tokens are found in a text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TokenizerModel {
    /// Merges by rank within words, which a pre-tokenizer cuts (`gpt2` in GGUF).
    #[default]
    BytePairs,
    /// Merges by score over the whole text (`llama` in GGUF).
    SentencePiece,
}

/// What a base's file says of its text.
#[derive(Debug, Clone, Default)]
pub struct Vocabulary {
    /// How tokens are found.
    pub model: TokenizerModel,
    /// By id; byte-level BPE pieces in GPT-2's byte alphabet, SentencePiece's with U+2581 for spaces, all others as they are written.
    pub tokens: Vec<String>,
    /// The pairs that are merged, the first one first; of byte pairs.
    pub merges: Vec<(String, String)>,
    /// A score for each token; of SentencePiece.
    pub scores: Vec<f32>,
    /// Ids of the control tokens: they stand for no text, and no message's text becomes one.
    pub control: Vec<u32>,
    /// Ids of the tokens that are found in any text before all else, and are text.
    pub user_defined: Vec<u32>,
    /// Ids of the tokens for single bytes, `<0x00>` to `<0xFF>`.
    pub bytes: Vec<u32>,
    /// Ids of the tokens after which white space is dropped (Phi 3).
    pub strips_after: Vec<u32>,
    /// The pre-tokenizer, in llama.cpp's words: `smollm`, `gpt-2`. Of byte pairs.
    pub pre: String,
    /// Whether text is brought into Unicode's composed form (NFC) first.
    pub composes: bool,
    /// Whether a text begins with a space of its own; of SentencePiece, and of byte pairs that write spaces as it does.
    pub add_space_prefix: bool,
    /// What the template calls `eos_token`.
    pub eos: u32,
    /// Other ids that end an answer.
    pub ends: Vec<u32>,
    /// What the template calls `bos_token`.
    pub bos: Option<u32>,
    /// Whether raw text begins with BOS.
    pub add_bos: bool,
    /// What the template calls `unk_token`.
    pub unknown: Option<u32>,
    /// What the template calls `pad_token`.
    pub padding: Option<u32>,
    /// Jinja; empty where the base has none.
    pub chat_template: String,
}

impl Vocabulary {
    /// See [`super::Text::tiny`].
    pub fn tiny() -> Self {
        let alphabet = byte_alphabet();
        let mut tokens: Vec<String> = alphabet.iter().map(char::to_string).collect();
        tokens.extend(["<|im_start|>".to_owned(), "<|im_end|>".to_owned()]);
        Self {
            tokens,
            control: vec![256, 257],
            pre: "smollm".into(),
            eos: 257,
            chat_template: "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}\
                            {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
                .into(),
            ..Self::default()
        }
    }

    /// Looks whether it fits together.
    ///
    /// # Errors
    /// UNSUPPORTED_TOKENIZER where an id is beyond the tokens, or a token that is looked for in texts has no text itself.
    pub fn check(&self) -> Result<()> {
        let refuse = |message: String| Err(Error::invalid_because("UNSUPPORTED_TOKENIZER", "tokenizer", message));
        let lists = [&self.control, &self.user_defined, &self.bytes, &self.strips_after, &self.ends];
        let single = [Some(self.eos), self.bos, self.unknown, self.padding].into_iter().flatten();
        if let Some(id) =
            lists.into_iter().flatten().copied().chain(single).find(|id| *id as usize >= self.tokens.len())
        {
            return refuse(format!("names the token {id}, and there are {}", self.tokens.len()));
        }
        // One without a text would be found between any two characters.
        let empty = |id: &&u32| self.tokens[**id as usize].is_empty();
        if let Some(id) = self.control.iter().chain(&self.user_defined).find(empty) {
            return refuse(format!("has a control token without a text, {id}"));
        }
        match self.model {
            TokenizerModel::SentencePiece if self.scores.len() != self.tokens.len() => {
                refuse(format!("has {} scores for {} tokens", self.scores.len(), self.tokens.len()))
            }
            _ => Ok(()),
        }
    }
}

/// Whether raw text begins with BOS where a file does not say.
pub fn adds_bos(model: TokenizerModel, pre: &str) -> bool {
    match model {
        TokenizerModel::SentencePiece => true,
        TokenizerModel::BytePairs => Pre::find(pre).is_ok_and(|pre| pre.adds_bos),
    }
}

/// GPT-2's printable stand-in for each byte.
fn byte_alphabet() -> [char; 256] {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 256u32;
    std::array::from_fn(|b| {
        if printable(b as u8) {
            char::from(b as u8)
        } else {
            next += 1;
            char::from_u32(next - 1).unwrap_or('\u{FFFD}')
        }
    })
}

#[derive(Debug)]
enum Model {
    BytePairs(Bpe),
    SentencePiece(Spm),
}

/// Tokens that are looked for in a text as they are written: the leftmost first, of several there the longest.
#[derive(Debug)]
struct Finder {
    automaton: Option<AhoCorasick>,
    ids: Vec<u32>,
}

impl Finder {
    fn new(ids: &[u32], tokens: &[String]) -> Result<Self> {
        let names = ids.iter().map(|id| tokens[*id as usize].as_str());
        let automaton = match ids {
            [] => None,
            _ => {
                let built = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(names);
                Some(built.map_err(|e| Error::invalid("tokenizer", format!("control tokens: {e}")))?)
            }
        };
        Ok(Self { automaton, ids: ids.to_vec() })
    }

    /// Where tokens stand in a text, in order: from, to, id.
    fn find<'a>(&'a self, text: &'a str) -> impl Iterator<Item = (usize, usize, u32)> + 'a {
        let found = self.automaton.iter().flat_map(move |automaton| automaton.find_iter(text));
        found.map(|found| (found.start(), found.end(), self.ids[found.pattern().as_usize()]))
    }
}

#[derive(Debug)]
pub(super) struct Tokenizer {
    model: Model,
    add_space_prefix: bool,
    composes: bool,
    tokens: Vec<String>,
    /// All tokens' bytes end to end; token i is `bytes[starts[i]..starts[i + 1]]`. Control tokens have none.
    bytes: Vec<u8>,
    starts: Vec<u32>,
    control: Finder,
    user_defined: Finder,
    is_control: Vec<bool>,
    strips_after: Vec<u32>,
}

/// Ids as they come, and what stands before the next.
struct Encoding {
    ids: Vec<u32>,
    /// Whether nothing or a token that is no plain text stands before.
    fresh: bool,
    /// Whether white space is dropped that comes next.
    strips: bool,
}

impl Tokenizer {
    pub fn new(vocabulary: Vocabulary) -> Result<Self> {
        vocabulary.check()?;
        let mut is_control = vec![false; vocabulary.tokens.len()];
        vocabulary.control.iter().for_each(|id| is_control[*id as usize] = true);
        let is_text: Vec<bool> = is_control.iter().map(|control| !control).collect();
        let model = match vocabulary.model {
            TokenizerModel::BytePairs => Model::BytePairs(Bpe::new(&vocabulary, &is_text)?),
            TokenizerModel::SentencePiece => Model::SentencePiece(Spm::new(&vocabulary, &is_text)),
        };
        let control = Finder::new(&vocabulary.control, &vocabulary.tokens)?;
        let user_defined = Finder::new(&vocabulary.user_defined, &vocabulary.tokens)?;
        let (bytes, starts) =
            written(&vocabulary, &is_control, matches!(&model, Model::BytePairs(bpe) if !bpe.is_raw()));
        let add_space_prefix = vocabulary.add_space_prefix && !matches!(&model, Model::BytePairs(bpe) if !bpe.is_raw());
        let Vocabulary { tokens, strips_after, composes, .. } = vocabulary;
        Ok(Self {
            model,
            add_space_prefix,
            composes,
            tokens,
            bytes,
            starts,
            control,
            user_defined,
            is_control,
            strips_after,
        })
    }

    /// Recognises control tokens in `text`; what lies between them is encoded plain, after `map`.
    pub fn encode_with<'t>(&self, text: &'t str, map: impl Fn(&'t str) -> Cow<'t, str>) -> Result<Vec<u32>> {
        let mut encoding = Encoding { ids: Vec::new(), fresh: true, strips: false };
        let mut from = 0;
        for (start, end, id) in self.control.find(text) {
            self.plain(&map(&text[from..start]), &mut encoding)?;
            self.token_as_written(id, &mut encoding);
            from = end;
        }
        self.plain(&map(&text[from..]), &mut encoding)?;
        Ok(encoding.ids)
    }

    /// The ids of a text in which nothing is a control token; `before` stands before it.
    pub fn encode_plain(&self, text: &str, before: Option<u32>) -> Result<Vec<u32>> {
        let special = |id: u32| self.is_control(id) || self.user_defined.ids.contains(&id);
        let fresh = before.is_none_or(special);
        let strips = before.is_some_and(|id| self.strips_after.contains(&id));
        let mut encoding = Encoding { ids: Vec::new(), fresh, strips };
        self.plain(text, &mut encoding)?;
        Ok(encoding.ids)
    }

    fn token_as_written(&self, id: u32, encoding: &mut Encoding) {
        encoding.ids.push(id);
        (encoding.fresh, encoding.strips) = (true, self.strips_after.contains(&id));
    }

    fn plain(&self, text: &str, encoding: &mut Encoding) -> Result<()> {
        let mut from = 0;
        for (start, end, id) in self.user_defined.find(text) {
            self.pieces(&text[from..start], encoding)?;
            self.token_as_written(id, encoding);
            from = end;
        }
        self.pieces(&text[from..], encoding)
    }

    fn pieces(&self, text: &str, encoding: &mut Encoding) -> Result<()> {
        let text = match encoding.strips {
            true => text.trim_start_matches([' ', '\t', '\n', '\u{B}', '\u{C}', '\r']),
            false => text,
        };
        if text.is_empty() {
            return Ok(());
        }
        let composed: String;
        let text = match self.composes && !unicode_normalization::is_nfc(text) {
            true => {
                composed = text.nfc().collect();
                &composed
            }
            false => text,
        };
        let prefixed = self.add_space_prefix && encoding.fresh;
        match &self.model {
            Model::BytePairs(bpe) => bpe.encode(text, prefixed, &mut encoding.ids)?,
            Model::SentencePiece(spm) => spm.encode(text, prefixed, &mut encoding.ids),
        }
        (encoding.fresh, encoding.strips) = (false, false);
        Ok(())
    }

    /// Whether a text that stands after `before` begins with a space that is not its own.
    pub fn adds_space(&self, before: Option<u32>) -> bool {
        self.add_space_prefix && before.is_none_or(|id| self.is_control(id))
    }

    /// As written in the vocabulary.
    pub fn token(&self, id: u32) -> &str {
        self.tokens.get(id as usize).map_or("", String::as_str)
    }

    /// The bytes an id stands for; none for control tokens and ids beyond the vocabulary.
    pub fn bytes(&self, id: u32) -> &[u8] {
        match self.starts.get(id as usize..=id as usize + 1) {
            Some(&[start, end]) => &self.bytes[start as usize..end as usize],
            _ => &[],
        }
    }

    pub fn is_control(&self, id: u32) -> bool {
        self.is_control.get(id as usize).copied().unwrap_or_default()
    }

    /// Bytes of the longest token, at least 1.
    pub fn longest_token(&self) -> usize {
        let plain = self.starts.windows(2).map(|ends| (ends[1] - ends[0]) as usize);
        plain.chain(self.tokens.iter().map(String::len)).max().unwrap_or(0).max(1)
    }

    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }
}

/// All tokens' bytes end to end, and where each begins.
fn written(vocabulary: &Vocabulary, is_control: &[bool], byte_level: bool) -> (Vec<u8>, Vec<u32>) {
    let byte_of: std::collections::HashMap<char, u8> = byte_alphabet().into_iter().zip(0..=255).collect();
    let mut as_is = vec![false; is_control.len()];
    vocabulary.user_defined.iter().for_each(|id| as_is[*id as usize] = true);
    let mut is_byte = vec![false; is_control.len()];
    vocabulary.bytes.iter().for_each(|id| is_byte[*id as usize] = true);
    let (mut bytes, mut starts) = (Vec::new(), vec![0]);
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        let byte = || u8::from_str_radix(token.strip_prefix("<0x")?.strip_suffix('>')?, 16).ok();
        match byte().filter(|_| is_byte[id]) {
            _ if is_control[id] => {}
            Some(byte) => bytes.push(byte),
            None if as_is[id] => bytes.extend_from_slice(token.as_bytes()),
            None if byte_level => {
                match token.chars().map(|ch| byte_of.get(&ch).copied()).collect::<Option<Vec<u8>>>() {
                    Some(decoded) => bytes.extend(decoded),
                    None => bytes.extend_from_slice(token.as_bytes()),
                }
            }
            None => bytes.extend_from_slice(token.replace(SPACE, " ").as_bytes()),
        }
        starts.push(bytes.len() as u32);
    }
    (bytes, starts)
}
