//! Incremental detokenisation: never emits half a character.

use std::sync::Arc;

use super::Text;

/// Turns ids into text piece by piece.
#[derive(Debug)]
pub struct Decoder {
    text: Arc<Text>,
    /// The first bytes of a character that is not complete; at most 3.
    pending: Vec<u8>,
    /// Whether a space that comes first is the vocabulary's, not the text's.
    leads: bool,
}

impl Decoder {
    pub(super) fn new(text: Arc<Text>, leads: bool) -> Self {
        Self { text, pending: Vec::new(), leads }
    }

    /// The text that this id completes; empty while a character is incomplete. Control tokens give no text. Bytes that can't be
    /// UTF-8 become U+FFFD.
    pub fn push(&mut self, id: u32) -> String {
        let bytes = self.text.token_bytes(id);
        self.pending.extend_from_slice(bytes.strip_prefix(b" ").filter(|_| self.leads).unwrap_or(bytes));
        self.leads &= bytes.is_empty();
        let mut out = String::new();
        let mut chunks = self.pending.utf8_chunks().peekable();
        let mut keep = 0;
        while let Some(chunk) = chunks.next() {
            out.push_str(chunk.valid());
            let invalid = chunk.invalid();
            if chunks.peek().is_none() && is_incomplete(invalid) {
                keep = invalid.len();
            } else if !invalid.is_empty() {
                out.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..self.pending.len() - keep);
        out
    }

    /// Whether the last id left a character incomplete.
    pub fn is_mid_character(&self) -> bool {
        !self.pending.is_empty()
    }

    /// What is left at the end: incomplete bytes as U+FFFD.
    pub fn finish(&mut self) -> String {
        let out = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        out
    }
}

/// Whether more bytes could complete the character.
fn is_incomplete(bytes: &[u8]) -> bool {
    !bytes.is_empty() && std::str::from_utf8(bytes).is_err_and(|e| e.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn characters_come_whole() {
        let mut decoder = Text::tiny().decoder();
        let pieces: Vec<String> = "é🦀".bytes().map(|b| decoder.push(b.into())).collect();
        assert_eq!(pieces, ["", "é", "", "", "", "🦀"]);
        assert_eq!(decoder.push(0xF0), "");
        assert_eq!(decoder.push(b'a'.into()), "\u{FFFD}a");
        assert_eq!(decoder.push(0xC3), "");
        assert!(decoder.is_mid_character());
        assert_eq!(decoder.finish(), "\u{FFFD}");
        assert!(!decoder.is_mid_character());
        assert_eq!(decoder.push(257), "", "control tokens have no text");
    }

    proptest! {
        #[test]
        fn the_pieces_are_the_whole(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let mut decoder = Text::tiny().decoder();
            let mut text: String = bytes.iter().map(|&b| decoder.push(b.into())).collect();
            text += &decoder.finish();
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }
}
