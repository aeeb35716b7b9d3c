//! SentencePiece: characters are merged, the pair whose token has the highest score first; what is no token goes by its bytes.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::{SPACE, Vocabulary};

#[derive(Debug)]
pub(super) struct Spm {
    ids: HashMap<String, u32>,
    scores: Vec<f32>,
    /// `<0xNN>`.
    bytes: Vec<Option<u32>>,
    unknown: Option<u32>,
    /// Bytes of the longest token.
    longest: usize,
}

/// Two neighbours that are a token together.
#[derive(Debug)]
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    /// Of both, to know whether they are what they were.
    bytes: usize,
    id: u32,
}

impl Ord for Pair {
    /// The highest score first, then the leftmost.
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

/// A stretch of the text; its neighbours by number.
#[derive(Debug, Clone, Copy)]
struct Symbol {
    start: usize,
    /// 0 where it went into the one before.
    len: usize,
    before: usize,
    after: usize,
    /// The token that it is, once it was merged.
    id: Option<u32>,
}

impl Spm {
    pub fn new(vocabulary: &Vocabulary, is_text: &[bool]) -> Self {
        let mut of_text = is_text.to_vec();
        vocabulary.bytes.iter().for_each(|id| of_text[*id as usize] = false);
        let plain = vocabulary.tokens.iter().zip(0_u32..).filter(|(_, id)| of_text[*id as usize]);
        let ids: HashMap<String, u32> = plain.map(|(token, id)| (token.clone(), id)).collect();
        let by_text: HashMap<&str, u32> =
            vocabulary.bytes.iter().map(|id| (vocabulary.tokens[*id as usize].as_str(), *id)).collect();
        let byte = |byte: u8| by_text.get(format!("<0x{byte:02X}>").as_str()).copied();
        Self {
            longest: ids.keys().map(String::len).max().unwrap_or(0),
            ids,
            scores: vocabulary.scores.clone(),
            bytes: (0..=255).map(byte).collect(),
            unknown: vocabulary.unknown,
        }
    }

    /// The ids of a text in which nothing is a control token; `prefixed` puts a space before it.
    pub fn encode(&self, text: &str, prefixed: bool, ids: &mut Vec<u32>) {
        let mut spaced = String::with_capacity(text.len() + SPACE.len());
        spaced.push_str(if prefixed { SPACE } else { "" });
        for (i, piece) in text.split(' ').enumerate() {
            spaced.push_str(if i > 0 { SPACE } else { "" });
            spaced.push_str(piece);
        }
        for symbol in self.merged(&spaced) {
            let text = &spaced[symbol.start..][..symbol.len];
            match symbol.id.or_else(|| self.ids.get(text).copied()) {
                Some(id) => ids.push(id),
                None => match text.bytes().map(|byte| self.bytes[byte as usize]).collect::<Option<Vec<u32>>>() {
                    Some(bytes) => ids.extend(bytes),
                    None => ids.extend(self.unknown),
                },
            }
        }
    }

    fn merged(&self, text: &str) -> Vec<Symbol> {
        let place = |(i, (start, ch)): (usize, (usize, char))| Symbol {
            start,
            len: ch.len_utf8(),
            before: i.wrapping_sub(1),
            after: i + 1,
            id: None,
        };
        let mut symbols: Vec<Symbol> = text.char_indices().enumerate().map(place).collect();
        let mut heap: BinaryHeap<Pair> =
            (1..symbols.len()).filter_map(|i| self.pair(text, &symbols, i - 1, i)).collect();
        while let Some(pair) = heap.pop() {
            let (left, right) = (symbols[pair.left], symbols[pair.right]);
            if left.len == 0 || right.len == 0 || left.len + right.len != pair.bytes {
                continue;
            }
            symbols[pair.right].len = 0;
            symbols[pair.left] = Symbol { len: pair.bytes, after: right.after, id: Some(pair.id), ..left };
            if let Some(next) = symbols.get_mut(right.after) {
                next.before = pair.left;
            }
            heap.extend(self.pair(text, &symbols, left.before, pair.left));
            heap.extend(self.pair(text, &symbols, pair.left, right.after));
        }
        symbols.retain(|symbol| symbol.len > 0);
        symbols
    }

    /// Two neighbours, where they are a token together.
    fn pair(&self, text: &str, symbols: &[Symbol], left: usize, right: usize) -> Option<Pair> {
        let (first, second) = (symbols.get(left)?, symbols.get(right)?);
        let bytes = first.len + second.len;
        if bytes > self.longest {
            return None;
        }
        let id = *self.ids.get(&text[first.start..][..bytes])?;
        Some(Pair { score: self.scores.get(id as usize).copied().unwrap_or_default(), left, right, bytes, id })
    }
}
