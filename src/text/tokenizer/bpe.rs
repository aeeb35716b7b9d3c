//! Byte pairs: a word's symbols are merged, the pair of the lowest rank first, until none is left that can be.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use super::pre::{Pre, Splitter};
use super::{SPACE, Vocabulary, byte_alphabet};
use crate::error::Result;

/// Set in the symbol of a character that the vocabulary does not have; the other bits are the character.
const UNKNOWN: u32 = 1 << 31;
/// Symbols of a word up to which looking through all pairs is quicker than a heap.
const SHORT: usize = 24;

#[derive(Debug)]
pub(super) struct Bpe {
    splitter: Splitter,
    whole_words: bool,
    raw: bool,
    /// A run of newlines is one token, where there is one of its length.
    newline_runs: bool,
    /// What each byte begins as: a symbol of the byte alphabet, or a byte token of a raw vocabulary.
    bytes: Vec<u32>,
    /// What each character of a raw vocabulary begins as.
    chars: HashMap<char, u32>,
    /// Two symbols to the pair's rank and the symbol that it becomes.
    merges: HashMap<(u32, u32), (u32, u32)>,
    /// Whole words, where they go before merges.
    words: HashMap<String, u32>,
    /// What symbols that are no tokens of a text become.
    spelled: HashMap<u32, Vec<u32>>,
}

/// Names of symbols: a token's id, or a number beyond the vocabulary for a text that is no token.
struct Symbols {
    ids: HashMap<String, u32>,
    next: u32,
}

impl Symbols {
    fn of(&mut self, text: String) -> u32 {
        let next = &mut self.next;
        *self.ids.entry(text).or_insert_with(|| {
            *next += 1;
            *next - 1
        })
    }
}

impl Bpe {
    /// # Errors
    /// UNSUPPORTED_TOKENIZER where the pre-tokenizer is not known.
    pub fn new(vocabulary: &Vocabulary, is_text: &[bool]) -> Result<Self> {
        let pre = Pre::find(&vocabulary.pre)?;
        let plain = vocabulary.tokens.iter().zip(0_u32..).filter(|(_, id)| is_text[*id as usize]);
        let ids: HashMap<String, u32> = plain.map(|(token, id)| (token.clone(), id)).collect();
        let bytes = match pre.raw {
            true => (0..=255_u8).map(|byte| byte_token(&ids, byte)).collect(),
            false => byte_alphabet().iter().map(|ch| ids.get(ch.encode_utf8(&mut [0; 4])).copied()).collect::<Vec<_>>(),
        };
        let bytes: Vec<u32> = bytes.into_iter().map(|id| id.unwrap_or(UNKNOWN)).collect();
        let mut symbols = Symbols { ids, next: vocabulary.tokens.len() as u32 };
        let mut merges = HashMap::with_capacity(vocabulary.merges.len());
        for (rank, (left, right)) in (0_u32..).zip(&vocabulary.merges) {
            let both = format!("{left}{right}");
            let pair = (symbols.of(left.clone()), symbols.of(right.clone()));
            let merged = symbols.of(both);
            merges.entry(pair).or_insert((rank, merged));
        }
        let spelled = |(text, &symbol): (&String, &u32)| {
            (symbol >= vocabulary.tokens.len() as u32).then(|| (symbol, spell(text, pre.raw, &bytes, &symbols.ids)))
        };
        let spelled = symbols.ids.iter().filter_map(spelled).collect();
        let single = |text: &str| {
            let mut chars = text.chars();
            chars.next().filter(|_| chars.next().is_none())
        };
        let chars = match pre.raw {
            true => symbols.ids.iter().filter_map(|(text, id)| Some((single(text)?, *id))).collect(),
            false => HashMap::new(),
        };
        let known = |(text, id): (String, u32)| (id < vocabulary.tokens.len() as u32).then_some((text, id));
        let mut words = HashMap::new();
        if pre.whole_words || pre.newline_runs {
            words = symbols.ids.into_iter().filter_map(known).collect();
        }
        Ok(Self {
            splitter: pre.splitter()?,
            whole_words: pre.whole_words,
            raw: pre.raw,
            newline_runs: pre.newline_runs,
            bytes,
            chars,
            merges,
            words,
            spelled,
        })
    }

    /// Whether words are UTF-8, not GPT-2's byte alphabet.
    pub fn is_raw(&self) -> bool {
        self.raw
    }

    /// The ids of a text in which nothing is a control token; `prefixed` puts a space before a raw one.
    pub fn encode(&self, text: &str, prefixed: bool, ids: &mut Vec<u32>) -> Result<()> {
        let spaced;
        let mut text = text;
        if self.raw && (prefixed || text.contains(' ')) {
            spaced = format!("{}{}", if prefixed { SPACE } else { "" }, text.replace(' ', SPACE));
            text = &spaced;
        }
        let alphabet = byte_alphabet();
        let mut symbols = Vec::new();
        let mut written = String::new();
        for word in self.splitter.words(text)? {
            let whole = self.whole_words || (self.newline_runs && word.starts_with('\n'));
            if whole {
                written.clear();
                match self.raw {
                    true => written.push_str(word),
                    false => written.extend(word.bytes().map(|byte| alphabet[byte as usize])),
                }
                if let Some(id) = self.words.get(&written) {
                    ids.push(*id);
                    continue;
                }
            }
            symbols.clear();
            match self.raw {
                true => {
                    symbols.extend(word.chars().map(|ch| self.chars.get(&ch).copied().unwrap_or(UNKNOWN | ch as u32)))
                }
                false => symbols.extend(word.bytes().map(|byte| self.bytes[byte as usize])),
            }
            self.merge(&mut symbols);
            symbols.iter().for_each(|symbol| self.write(*symbol, ids));
        }
        Ok(())
    }

    /// A symbol's ids. What has none, not even by bytes, is left out.
    fn write(&self, symbol: u32, ids: &mut Vec<u32>) {
        if symbol & UNKNOWN != 0 {
            let ch = char::from_u32(symbol & !UNKNOWN).filter(|_| self.raw);
            let mut buffer = [0; 4];
            let bytes = ch.map_or(&[][..], |ch| ch.encode_utf8(&mut buffer).as_bytes());
            ids.extend(bytes.iter().map(|byte| self.bytes[*byte as usize]).filter(|id| id & UNKNOWN == 0));
        } else if let Some(spelled) = self.spelled.get(&symbol) {
            ids.extend_from_slice(spelled);
        } else {
            ids.push(symbol);
        }
    }

    fn merge(&self, symbols: &mut Vec<u32>) {
        match symbols.len() > SHORT {
            true => self.merge_long(symbols),
            false => self.merge_short(symbols),
        }
    }

    /// Looks through all pairs for each merge.
    pub(super) fn merge_short(&self, symbols: &mut Vec<u32>) {
        while let Some((_, at, merged)) = (1..symbols.len())
            .filter_map(|i| {
                self.merges.get(&(symbols[i - 1], symbols[i])).map(|(rank, merged)| (*rank, i - 1, *merged))
            })
            .min()
        {
            symbols[at] = merged;
            symbols.remove(at + 1);
        }
    }

    /// As [`Bpe::merge_short`], in n log n.
    pub(super) fn merge_long(&self, symbols: &mut Vec<u32>) {
        let count = symbols.len();
        let mut before: Vec<usize> = (0..count).map(|i| i.wrapping_sub(1)).collect();
        let mut after: Vec<usize> = (1..=count).collect();
        let mut gone = vec![false; count];
        let mut heap = BinaryHeap::new();
        let look = |heap: &mut BinaryHeap<_>, symbols: &[u32], left: usize, right: usize| {
            if left < count
                && right < count
                && let Some((rank, merged)) = self.merges.get(&(symbols[left], symbols[right]))
            {
                heap.push(Reverse((*rank, left, right, symbols[left], symbols[right], *merged)));
            }
        };
        (1..count).for_each(|i| look(&mut heap, symbols, i - 1, i));
        while let Some(Reverse((_, left, right, was_left, was_right, merged))) = heap.pop() {
            let stale = gone[left] || gone[right] || after[left] != right;
            if stale || symbols[left] != was_left || symbols[right] != was_right {
                continue;
            }
            symbols[left] = merged;
            gone[right] = true;
            after[left] = after[right];
            if after[right] < count {
                before[after[right]] = left;
            }
            look(&mut heap, symbols, before[left], left);
            look(&mut heap, symbols, left, after[left]);
        }
        let mut kept = gone.iter();
        symbols.retain(|_| kept.next().is_some_and(|gone| !gone));
    }
}

fn byte_token(ids: &HashMap<String, u32>, byte: u8) -> Option<u32> {
    ids.get(&format!("<0x{byte:02X}>")).copied()
}

/// A text that is no token, by its characters or bytes.
fn spell(text: &str, raw: bool, bytes: &[u32], ids: &HashMap<String, u32>) -> Vec<u32> {
    let spelled: Vec<u32> = match raw {
        true => text.bytes().map(|byte| bytes[byte as usize]).collect(),
        false => text.chars().map(|ch| ids.get(ch.encode_utf8(&mut [0; 4])).copied().unwrap_or(UNKNOWN)).collect(),
    };
    let of_byte = |id: &u32| raw || bytes.contains(id);
    spelled.into_iter().filter(|id| id & UNKNOWN == 0).filter(of_byte).collect()
}
