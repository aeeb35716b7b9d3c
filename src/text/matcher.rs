//! Finding phrases in text that comes in pieces, and holding back what may become one.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use aho_corasick::Anchored;
use aho_corasick::automaton::{Automaton as _, StateID};
use aho_corasick::nfa::contiguous::NFA;

use crate::error::{Error, Result};
use crate::request::TokenOut;

/// A set of phrases to look for in a stream of text. Cheap to clone.
///
/// Wherever phrases overlap, the one that ends first counts, and among those the longest: only this rule can be decided without
/// knowing the text that is yet to come.
#[derive(Debug, Clone)]
pub struct Patterns(Arc<Automaton>);

#[derive(Debug)]
struct Automaton {
    nfa: NFA,
    start: StateID,
    /// How many bytes of a phrase a state has seen: the longest end of the text that begins a phrase.
    depths: HashMap<StateID, usize>,
}

impl Patterns {
    /// `ignore_ascii_case`: `a` and `A` are one; other letters differ from their capitals. Fails on an empty phrase.
    pub fn new(patterns: &[String], ignore_ascii_case: bool) -> Result<Self> {
        if let Some(i) = patterns.iter().position(String::is_empty) {
            return Err(Error::invalid(format!("patterns[{i}]"), "must not be empty"));
        }
        let nfa = NFA::builder().ascii_case_insensitive(ignore_ascii_case).build(patterns).map_err(Error::internal)?;
        let start = nfa.start_state(Anchored::No).map_err(Error::internal)?;
        // After n bytes of a phrase, and nothing before, the state is the one that has seen n bytes.
        let mut depths = HashMap::from([(start, 0)]);
        for pattern in patterns {
            let mut state = start;
            for (i, byte) in pattern.bytes().enumerate() {
                state = nfa.next_state(Anchored::No, state, byte);
                depths.insert(state, i + 1);
            }
        }
        Ok(Self(Arc::new(Automaton { nfa, start, depths })))
    }

    /// Returns whether there is nothing to find.
    pub fn is_empty(&self) -> bool {
        self.0.nfa.patterns_len() == 0
    }

    /// Memory of the compiled phrases, in bytes.
    pub fn memory_bytes(&self) -> usize {
        self.0.nfa.memory_usage() + self.0.depths.capacity() * size_of::<(StateID, usize)>()
    }

    /// All phrases in the text from left to right, none overlapping another: the index of the phrase, and where it stands in bytes.
    pub fn find_all(&self, text: &str) -> Vec<(usize, Range<usize>)> {
        let mut found = Vec::new();
        let mut state = self.0.start;
        for (i, byte) in text.bytes().enumerate() {
            state = self.next(state, byte);
            if let Some((pattern, len)) = self.found(state) {
                found.push((pattern, i + 1 - len..i + 1));
                state = self.0.start;
            }
        }
        found
    }

    fn next(&self, state: StateID, byte: u8) -> StateID {
        self.0.nfa.next_state(Anchored::No, state, byte)
    }

    /// The longest phrase that ends in this state, and its length in bytes.
    fn found(&self, state: StateID) -> Option<(usize, usize)> {
        let nfa = &self.0.nfa;
        if !nfa.is_match(state) {
            return None;
        }
        let ending = (0..nfa.match_len(state)).map(|i| nfa.match_pattern(state, i));
        ending.map(|id| (id.as_usize(), nfa.pattern_len(id))).max_by_key(|found| found.1)
    }

    fn depth(&self, state: StateID) -> usize {
        self.0.depths.get(&state).copied().unwrap_or_default()
    }
}

/// Holds back text that may begin a phrase, and the tokens whose text it is. Each byte is looked at once, however many phrases there are.
///
/// What is held begins a phrase, which is UTF-8: so no cut falls inside a character.
#[derive(Debug)]
pub struct HoldBack {
    patterns: Patterns,
    /// What the automaton knows of the text so far; it has seen `held` since a state that held nothing.
    state: StateID,
    held: String,
    /// Bytes that have left.
    released: usize,
    /// Tokens that are held, each with the byte of the stream that its text ends at.
    tokens: VecDeque<(usize, TokenOut)>,
    /// The phrase that was found.
    matched: Option<usize>,
}

/// What may go out.
#[derive(Debug, Default, PartialEq)]
pub struct Released {
    /// The text that may go out.
    pub text: String,
    /// The tokens whose text lies wholly within what has gone out.
    pub tokens: Vec<TokenOut>,
    /// A phrase stands right after this text. Nothing comes any more.
    pub matched: bool,
}

impl Released {
    /// Nothing to send.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.tokens.is_empty()
    }
}

impl HoldBack {
    /// Returns a buffer for one stream.
    pub fn new(patterns: Patterns) -> Self {
        let state = patterns.0.start;
        Self { patterns, state, held: String::new(), released: 0, tokens: VecDeque::new(), matched: None }
    }

    /// Takes the next piece of text and the tokens it came with, whose text ends with it; gives what may go out. At a phrase: the text
    /// before it and the tokens whose text lies wholly before it; then nothing.
    pub fn push(&mut self, text: &str, tokens: Vec<TokenOut>) -> Released {
        if self.matched.is_some() {
            return self.nothing();
        }
        let before = self.held.len();
        self.hold(text, tokens);
        for (i, byte) in text.bytes().enumerate() {
            self.state = self.patterns.next(self.state, byte);
            if let Some((phrase, len)) = self.patterns.found(self.state) {
                self.matched = Some(phrase);
                let released = self.release(before + i + 1 - len);
                self.held.clear();
                self.tokens.clear();
                return released;
            }
        }
        self.release(self.held.len() - self.patterns.depth(self.state))
    }

    /// Does the same with a piece in which no phrase may end yet; one that begins in it may end in a later piece.
    pub fn push_early(&mut self, text: &str, tokens: Vec<TokenOut>) -> Released {
        if self.matched.is_some() {
            return self.nothing();
        }
        self.hold(text, tokens);
        self.state = text.bytes().fold(self.state, |state, byte| self.patterns.next(state, byte));
        self.release(self.held.len() - self.patterns.depth(self.state))
    }

    fn hold(&mut self, text: &str, tokens: Vec<TokenOut>) {
        self.held.push_str(text);
        let end = self.released + self.held.len();
        self.tokens.extend(tokens.into_iter().map(|token| (end, token)));
    }

    /// The stream has ended: all that is held, unless a phrase was found.
    pub fn finish(&mut self) -> Released {
        if self.matched.is_some() { self.nothing() } else { self.release(self.held.len()) }
    }

    /// The index of the phrase that was found.
    pub fn matched(&self) -> Option<usize> {
        self.matched
    }

    /// Lets the first `len` bytes go, and the tokens that end there or before.
    fn release(&mut self, len: usize) -> Released {
        let held = self.held.split_off(len);
        let text = std::mem::replace(&mut self.held, held);
        self.released += len;
        let ready = self.tokens.partition_point(|(end, _)| *end <= self.released);
        let tokens = self.tokens.drain(..ready).map(|(_, token)| token).collect();
        Released { text, tokens, matched: self.matched.is_some() }
    }

    fn nothing(&self) -> Released {
        Released { matched: self.matched.is_some(), ..Released::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn patterns(of: &[&str], ignore_ascii_case: bool) -> Patterns {
        Patterns::new(&of.iter().map(|p| p.to_string()).collect::<Vec<_>>(), ignore_ascii_case).unwrap()
    }

    fn token(id: usize) -> TokenOut {
        TokenOut { id: id as u32, logprob: None }
    }

    /// What comes out when these texts come in, the i-th with token i: text, token ids, whether a phrase was found.
    fn run(patterns: &Patterns, texts: &[&str]) -> (String, Vec<u32>, bool) {
        let mut hold = HoldBack::new(patterns.clone());
        let mut all = Released::default();
        let pushed: Vec<_> = texts.iter().enumerate().map(|(i, text)| hold.push(text, vec![token(i)])).collect();
        for released in pushed.into_iter().chain([hold.finish()]) {
            all.text += &released.text;
            all.tokens.extend(released.tokens);
            all.matched |= released.matched;
        }
        (all.text, all.tokens.iter().map(|t| t.id).collect(), all.matched)
    }

    /// The definition, byte by byte: the phrase that ends first, the longest of those.
    fn first_match(patterns: &[String], text: &str) -> Option<Range<usize>> {
        (1..=text.len()).find_map(|end| {
            let ends_here = |p: &&String| text.as_bytes()[..end].ends_with(p.as_bytes());
            patterns.iter().filter(ends_here).map(|p| end - p.len()..end).min_by_key(|found| found.start)
        })
    }

    /// The definition: the longest end of the text that begins a phrase without being one.
    fn to_hold(patterns: &[String], text: &str) -> usize {
        let begins =
            |n: &usize| patterns.iter().any(|p| p.len() > *n && text.as_bytes().ends_with(&p.as_bytes()[..*n]));
        (0..=text.len()).rev().find(begins).unwrap_or(0)
    }

    #[test]
    fn a_phrase_over_several_pieces_does_not_leave() {
        let found = run(&patterns(&["secret"], false), &["the ", "se", "cr", "et is", " out"]);
        assert_eq!(found, ("the ".into(), vec![0], true));
    }

    #[test]
    fn a_token_waits_for_all_of_its_text() {
        let mut hold = HoldBack::new(patterns(&["xyz"], false));
        let released = hold.push("a x", vec![token(1)]);
        assert_eq!((released.text.as_str(), released.tokens), ("a ", vec![]));
        let released = hold.push("", vec![token(2)]);
        assert!(released.is_empty(), "a token without text goes with the text before it");
        let released = hold.push("y", vec![token(3)]);
        assert!(released.is_empty());
        let released = hold.push("?", vec![token(4)]);
        assert_eq!((released.text.as_str(), released.tokens.len()), ("xy?", 4));
        assert_eq!(hold.push("", vec![token(5)]).tokens, [token(5)], "nothing is held before it");
    }

    #[test]
    fn what_only_began_a_phrase_leaves_at_the_end() {
        assert_eq!(run(&patterns(&["secret"], false), &["my secre"]), ("my secre".into(), vec![0], false));
    }

    #[test]
    fn only_ascii_letters_lose_their_case() {
        assert!(run(&patterns(&["Été"], true), &["ÉTé"]).2);
        assert!(!run(&patterns(&["Été"], true), &["été"]).2);
        assert!(!run(&patterns(&["abc"], false), &["aBc"]).2);
    }

    #[test]
    fn phrases_in_a_text_do_not_overlap() {
        let found = patterns(&["bad", "badly", "ad", "no"], true).find_all("Badly, no BAD");
        assert_eq!(found, [(0, 0..3), (3, 7..9), (0, 10..13)]);
    }

    #[test]
    fn no_phrases_hold_nothing_and_an_empty_phrase_is_refused() {
        let none = patterns(&[], true);
        assert!(none.is_empty());
        assert_eq!(run(&none, &["a", "é"]), ("aé".into(), vec![0, 1], false));
        assert!(Patterns::new(&["a".into(), String::new()], true).unwrap_err().to_string().contains("patterns[1]"));
    }

    proptest! {
        /// Against the definition, over texts in which phrases and halves of phrases are frequent.
        #[test]
        fn any_cutting_gives_what_the_definition_says(
            patterns in prop::collection::vec("[abé]{1,4}", 0..5),
            pieces in prop::collection::vec(("[abé]{0,3}", any::<prop::sample::Index>()), 0..16),
        ) {
            let text: String = pieces.iter().map(|(piece, _)| piece.as_str()).collect();
            let found = first_match(&patterns, &text);
            let mut hold = HoldBack::new(Patterns::new(&patterns, false).unwrap());
            let (mut came, mut left, mut tokens, mut ends) = (String::new(), String::new(), Vec::new(), Vec::new());
            for (i, (piece, cut)) in pieces.iter().enumerate() {
                // A token's text may itself come in two parts, the token with the second.
                let cut = piece.floor_char_boundary(cut.index(piece.len() + 1));
                for (part, token) in [(&piece[..cut], vec![]), (&piece[cut..], vec![token(i)])] {
                    came += part;
                    let released = hold.push(part, token);
                    left += &released.text;
                    tokens.extend(released.tokens.iter().map(|t| t.id as usize));
                    match found.as_ref().filter(|found| found.end <= came.len()) {
                        Some(found) => {
                            prop_assert!(released.matched);
                            prop_assert_eq!(&left, &text[..found.start]);
                        }
                        None => {
                            prop_assert!(!released.matched);
                            prop_assert_eq!(left.len() + to_hold(&patterns, &came), came.len());
                            prop_assert!(came.starts_with(&left));
                        }
                    }
                }
                ends.push(came.len());
            }
            let last = hold.finish();
            left += &last.text;
            tokens.extend(last.tokens.iter().map(|t| t.id as usize));
            let until = found.as_ref().map_or(text.len(), |found| found.start);
            prop_assert_eq!(left, &text[..until]);
            // A token without text that comes after the phrase ends after it, and does not leave either.
            let whole: Vec<usize> = (0..ends.len()).filter(|&i| ends[i] <= until).collect();
            prop_assert_eq!(tokens, whole);
        }

        /// A phrase counts that ends behind the early pieces, wherever it begins.
        #[test]
        fn no_phrase_ends_early_and_one_over_the_border_is_found(
            patterns in prop::collection::vec("[abé]{1,4}", 0..5),
            early in prop::collection::vec("[abé]{0,3}", 0..5),
            late in prop::collection::vec("[abé]{0,3}", 0..5),
        ) {
            let (border, text) = (early.concat().len(), early.concat() + &late.concat());
            let mut hold = HoldBack::new(Patterns::new(&patterns, false).unwrap());
            let mut left = String::new();
            for piece in &early {
                let released = hold.push_early(piece, Vec::new());
                prop_assert!(!released.matched);
                left += &released.text;
            }
            late.iter().for_each(|piece| left += &hold.push(piece, Vec::new()).text);
            left += &hold.finish().text;
            let found = (border + 1..=text.len()).find_map(|end| {
                let ending = |p: &&String| text.as_bytes()[..end].ends_with(p.as_bytes());
                patterns.iter().filter(ending).map(|p| end - p.len()).min()
            });
            prop_assert_eq!(hold.matched().is_some(), found.is_some());
            prop_assert_eq!(left, &text[..found.unwrap_or(text.len())]);
        }

        #[test]
        fn the_first_phrase_found_is_the_one_the_stream_stops_at(
            patterns in prop::collection::vec("[ab]{1,4}", 1..5),
            text in "[ab]{0,24}",
        ) {
            let found = Patterns::new(&patterns, false).unwrap().find_all(&text);
            prop_assert_eq!(found.first().map(|f| f.1.clone()), first_match(&patterns, &text));
            prop_assert!(found.iter().all(|(i, range)| patterns[*i] == text[range.clone()]));
            prop_assert!(found.windows(2).all(|pair| pair[0].1.end <= pair[1].1.start));
        }
    }
}
