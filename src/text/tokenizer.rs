//! Byte-level BPE with control tokens. The merges are the `tokenizers` crate's; which text may become a control token is decided here.

use std::borrow::Cow;

use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;

use crate::error::{Error, Result};

/// What a base's file says of its text.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    /// By id; byte-level BPE pieces in GPT-2's byte alphabet, control tokens as they are written.
    pub tokens: Vec<String>,
    /// The pairs that are merged, the first one first.
    pub merges: Vec<(String, String)>,
    /// Ids of the control tokens.
    pub control: Vec<u32>,
    /// The pre-tokenizer, in llama.cpp's words: `smollm`, `gpt-2`.
    pub pre: String,
    /// The id that ends an assistant's turn.
    pub end_of_turn: u32,
    /// What the template calls `bos_token`.
    pub bos: Option<u32>,
    /// Jinja.
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
            merges: Vec::new(),
            control: vec![256, 257],
            pre: "smollm".into(),
            end_of_turn: 257,
            bos: None,
            chat_template: "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}\
                            {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
                .into(),
        }
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
pub(super) struct Tokenizer {
    bpe: tokenizers::Tokenizer,
    tokens: Vec<String>,
    /// All tokens' bytes end to end; token i is `bytes[starts[i]..starts[i + 1]]`. Control tokens have none.
    bytes: Vec<u8>,
    starts: Vec<u32>,
    control: Option<AhoCorasick>,
    control_ids: Vec<u32>,
    is_control: Vec<bool>,
}

impl Tokenizer {
    pub fn new(vocabulary: Vocabulary) -> Result<Self> {
        let bad = |what: &str, e: &dyn std::fmt::Display| Error::invalid("tokenizer", format!("{what}: {e}"));
        let pre: PreTokenizerWrapper = match vocabulary.pre.as_str() {
            // Every numeric character alone, then byte-level without a prefix space.
            "smollm" => Sequence::new(vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()]).into(),
            "gpt-2" => ByteLevel::new(false, true, true).into(),
            other => {
                let known = "smollm, gpt-2";
                return Err(Error::invalid_because(
                    "UNSUPPORTED_TOKENIZER",
                    "tokenizer.ggml.pre",
                    format!("{other:?} is not one of {known}; another pre-tokenizer would give wrong ids"),
                ));
            }
        };
        let is_control = |id: usize| vocabulary.control.contains(&(id as u32));
        let plain = vocabulary.tokens.iter().enumerate().filter(|(id, _)| !is_control(*id));
        let vocab: Vocab = plain.map(|(id, token)| (token.clone(), id as u32)).collect();
        let model = BPE::builder().vocab_and_merges(vocab, vocabulary.merges).build().map_err(|e| bad("merges", &e))?;
        let mut bpe = tokenizers::Tokenizer::new(model);
        bpe.with_pre_tokenizer(Some(pre));

        let mut byte_of = std::collections::HashMap::new();
        for (byte, ch) in byte_alphabet().into_iter().enumerate() {
            byte_of.insert(ch, byte as u8);
        }
        let (mut bytes, mut starts) = (Vec::new(), vec![0]);
        for (id, token) in vocabulary.tokens.iter().enumerate() {
            if !is_control(id) {
                bytes.extend(token.chars().filter_map(|ch| byte_of.get(&ch)));
            }
            starts.push(bytes.len() as u32);
        }
        let names: Vec<&str> = vocabulary
            .control
            .iter()
            .filter_map(|&id| vocabulary.tokens.get(id as usize))
            .map(String::as_str)
            .collect();
        let control = if names.is_empty() {
            None
        } else {
            let mut builder = AhoCorasick::builder();
            Some(builder.match_kind(MatchKind::LeftmostLongest).build(names).map_err(|e| bad("control tokens", &e))?)
        };
        let is_control = (0..vocabulary.tokens.len()).map(is_control).collect();
        let (tokens, control_ids) = (vocabulary.tokens, vocabulary.control);
        Ok(Self { bpe, tokens, bytes, starts, control, control_ids, is_control })
    }

    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, Cow::Borrowed)
    }

    /// Recognises control tokens in `text`; what lies between them is encoded plain, after `map`.
    pub fn encode_with<'t>(&self, text: &'t str, map: impl Fn(&'t str) -> Cow<'t, str>) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        let mut from = 0;
        for found in self.control.iter().flat_map(|control| control.find_iter(text)) {
            ids.extend(self.encode_plain(&map(&text[from..found.start()]))?);
            ids.push(self.control_ids[found.pattern().as_usize()]);
            from = found.end();
        }
        ids.extend(self.encode_plain(&map(&text[from..]))?);
        Ok(ids)
    }

    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let encoding = self.bpe.encode_fast(text, false).map_err(|e| Error::internal(format!("tokenizer: {e}")))?;
        Ok(encoding.get_ids().to_vec())
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
