//! Whether a text looks as if a chat template had made it already. Such a text inside of a message would be rendered twice, and its control
//! tokens would be learnt letter by letter.

use aho_corasick::{AhoCorasick, Span};

use super::{ROLES, Vocabulary};
use crate::error::{Error, Result};

/// What a message's text has of the base's control tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Markup {
    /// Nothing.
    None,
    /// It mentions one, as prose about them does.
    Mentioned,
    /// It begins or ends as a rendered turn does, or holds the beginning of one; by this token.
    Rendered(String),
}

/// Tokens with which a template of another family begins a turn or a chat.
const FOREIGN: [&str; 20] = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<start_of_turn>",
    "<bos>",
    "<|im_start|>",
    "<|im_user|>",
    "<|user|>",
    "<|system|>",
    "<|assistant|>",
    "<|start|>",
    "<|message|>",
    "<|start_of_role|>",
    "<|START_OF_TURN_TOKEN|>",
    "<|BOS_TOKEN|>",
    "<|startoftext|>",
    "<\u{ff5c}begin\u{2581}of\u{2581}sentence\u{ff5c}>",
    "<\u{ff5c}User\u{ff5c}>",
    "<\u{ff5c}Assistant\u{ff5c}>",
    "[gMASK]",
    "<<SYS>>",
];

/// Tokens with which one ends a turn.
const FOREIGN_ENDS: [&str; 10] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|im_end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|return|>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
];

/// How transcripts in plain words ask for the next turn, with how they begin one. No control tokens: counted, not refused.
const TRANSCRIPTS: [(&str, &str); 5] = [
    ("Human:", "Assistant:"),
    ("USER:", "ASSISTANT:"),
    ("User:", "Assistant:"),
    ("### Instruction:", "### Response:"),
    ("### Human:", "### Assistant:"),
];

/// The end of Mistral's and Llama 2's instructions: mentioned, where nothing of a template is about it.
const INSTRUCTION_END: &str = "[/INST]";

/// The control tokens that the base's template writes, those that end its answers, and those of other families.
#[derive(Debug)]
pub(super) struct Markers {
    tokens: Vec<String>,
    /// How many of them begin a text only where it is rendered: all but the last, which end turns.
    begins: usize,
    /// Finds all of them and, last, [`INSTRUCTION_END`], in one pass.
    finder: AhoCorasick,
}

impl Markers {
    pub fn new(vocabulary: &Vocabulary, ends: &[u32]) -> Result<Self> {
        let written = |id: &u32| {
            let token = vocabulary.tokens.get(*id as usize)?;
            (ends.contains(id) || vocabulary.chat_template.contains(token.as_str())).then(|| token.clone())
        };
        let own = vocabulary.control.iter().filter_map(written).filter(|token| !token.is_empty());
        let mut tokens: Vec<String> = own.chain(FOREIGN.map(str::to_owned)).collect();
        let begins = tokens.len();
        tokens.extend(FOREIGN_ENDS.map(str::to_owned));
        let finder = AhoCorasick::new(tokens.iter().map(String::as_str).chain([INSTRUCTION_END]));
        Ok(Self { tokens, begins, finder: finder.map_err(Error::internal)? })
    }

    pub fn look_at(&self, text: &str) -> Markup {
        let trimmed = text.trim();
        if let Some(token) = instruction(trimmed) {
            return Markup::Rendered(token.to_owned());
        }
        // Real chats have a stray `</s>` at an end; HTML's struck text has both.
        let mut mentioned = (trimmed.ends_with("</s>") && !trimmed.contains("<s>"))
            || TRANSCRIPTS.iter().any(|transcript| is_transcript(trimmed, transcript));
        // Of several that show it the first in order is told; what the text begins with goes before all.
        let (mut begin, mut rendered) = (None, None);
        for found in self.finder.find_overlapping_iter(trimmed) {
            mentioned = true;
            let which = found.pattern().as_usize();
            if which >= self.tokens.len() {
                continue;
            }
            if found.start() == 0 && which < self.begins {
                begin = Some(begin.map_or(which, |first: usize| first.min(which)));
            } else if begin.is_none()
                && rendered.is_none_or(|first| which < first)
                && self.is_turn(trimmed, found.span())
            {
                rendered = Some(which);
            }
        }
        match begin.or(rendered) {
            Some(which) => Markup::Rendered(self.tokens[which].clone()),
            None if mentioned => Markup::Mentioned,
            None => Markup::None,
        }
    }

    /// Whether a token ends the text without a space before it, or is followed by another or by a role.
    fn is_turn(&self, text: &str, token: Span) -> bool {
        let (before, rest) = (&text[..token.start], &text[token.end..]);
        let next = rest.trim_start();
        (rest.is_empty() && !before.ends_with(char::is_whitespace))
            || self.tokens.iter().any(|token| next.starts_with(token.as_str()))
            || ROLES.iter().any(|role| begins_turn(rest, role))
    }
}

/// Mistral's and Llama 2's marks, which are no control tokens by their look: `[INST]` with its end, after `<s>` or not; `<s>` at the beginning
/// without its end, which HTML's struck text has.
fn instruction(trimmed: &str) -> Option<&'static str> {
    let opened = trimmed.strip_prefix("<s>");
    let asks = opened.unwrap_or(trimmed).trim_start().starts_with("[INST]");
    if asks && (opened.is_some() || trimmed.contains(INSTRUCTION_END)) {
        return Some("[INST]");
    }
    opened.filter(|rest| !rest.contains("</s>")).map(|_| "<s>")
}

/// Whether a text has a turn of the user's, and ends where the assistant's is to begin.
fn is_transcript(trimmed: &str, (user, assistant): &(&str, &str)) -> bool {
    trimmed.ends_with(assistant) && trimmed.contains(user)
}

/// The role and a line's end, as a template writes them after the token.
fn begins_turn(rest: &str, role: &str) -> bool {
    rest.strip_prefix(role).is_some_and(|rest| rest.starts_with(['\n', '\r', '<']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rendered_text_is_told_from_prose() {
        let vocabulary = Vocabulary::tiny();
        let markers = Markers::new(&vocabulary, &[257]).unwrap();
        let rendered = |token: &str| Markup::Rendered(token.into());
        for (text, expected) in [
            ("<|im_start|>user\nhi<|im_end|>", rendered("<|im_start|>")),
            (" \n<|im_start|>", rendered("<|im_start|>")),
            ("You are kind.<|im_end|>\n<|im_start|>user\nhi", rendered("<|im_start|>")),
            ("Hello!<|im_end|>\n", rendered("<|im_end|>")),
            ("[INST] hi [/INST]", rendered("[INST]")),
            ("<s> [INST] hi [/INST]", rendered("[INST]")),
            ("<s>Why?", rendered("<s>")),
            ("So.</s>", Markup::Mentioned),
            ("So.<|eot_id|>", rendered("<|eot_id|>")),
            ("So.<end_of_turn>\n", rendered("<end_of_turn>")),
            ("So.<|im_end|>\n<|im_start|>tool\nx", rendered("<|im_end|>")),
            ("So.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nmore", rendered("<|start_header_id|>")),
            ("<\u{ff5c}User\u{ff5c}>Why?<\u{ff5c}Assistant\u{ff5c}>", rendered("<\u{ff5c}User\u{ff5c}>")),
            ("<|start|>user<|message|>Why?<|end|>", rendered("<|start|>")),
            ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>x", rendered("<|START_OF_TURN_TOKEN|>")),
            ("[gMASK]<sop><|user|>x", rendered("[gMASK]")),
            ("[INST] marks the beginning of an instruction.", Markup::None),
            ("[INST] and [/INST] are marks.", rendered("[INST]")),
            ("A turn of Llama 3 ends with <|eot_id|>", Markup::Mentioned),
            ("\n\nHuman: Why?\n\nAssistant:", Markup::Mentioned),
            ("### Instruction:\nWhy?\n\n### Response:\n", Markup::Mentioned),
            ("<|begin_of_text|>x", rendered("<|begin_of_text|>")),
            ("What does <|im_end|> mean?", Markup::Mentioned),
            ("The token is <|im_end|>", Markup::Mentioned),
            ("In HTML <s>x</s> strikes out", Markup::None),
            ("<s>struck</s>", Markup::None),
            ("arr[INST] = 1", Markup::None),
            ("plain", Markup::None),
        ] {
            assert_eq!(markers.look_at(text), expected, "{text:?}");
        }
    }
}
