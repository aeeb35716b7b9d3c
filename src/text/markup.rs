//! Whether a text looks as if a chat template had made it already. Such a text inside of a message would be rendered twice, and its control
//! tokens would be learnt letter by letter.

use super::Vocabulary;

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

/// How rendered prompts of other families begin.
const FOREIGN: [&str; 9] = [
    "<s>[INST]",
    "[INST]",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<start_of_turn>",
    "<bos><start_of_turn>",
    "<|im_start|>",
    "<|user|>",
    "<|system|>",
];
const ROLES: [&str; 3] = ["system", "user", "assistant"];

/// The control tokens that the base's template writes, and those that end its answers.
#[derive(Debug)]
pub(super) struct Markers(Vec<String>);

impl Markers {
    pub fn new(vocabulary: &Vocabulary, ends: &[u32]) -> Self {
        let written = |id: &u32| {
            let token = vocabulary.tokens.get(*id as usize)?;
            (ends.contains(id) || vocabulary.chat_template.contains(token.as_str())).then(|| token.clone())
        };
        Self(vocabulary.control.iter().filter_map(written).filter(|token| !token.is_empty()).collect())
    }

    pub fn look_at(&self, text: &str) -> Markup {
        let trimmed = text.trim();
        let own = || self.0.iter().map(String::as_str);
        if let Some(token) = own().chain(FOREIGN).find(|token| trimmed.starts_with(token)) {
            return Markup::Rendered(token.to_owned());
        }
        let mut mentioned = false;
        for token in own() {
            for (at, _) in trimmed.match_indices(token) {
                mentioned = true;
                let rest = &trimmed[at + token.len()..];
                let ends_a_turn = rest.is_empty() && !trimmed[..at].ends_with(char::is_whitespace);
                if ends_a_turn || ROLES.iter().any(|role| begins_turn(rest, role)) {
                    return Markup::Rendered(token.to_owned());
                }
            }
        }
        if mentioned { Markup::Mentioned } else { Markup::None }
    }
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
        let markers = Markers::new(&vocabulary, &[257]);
        let rendered = |token: &str| Markup::Rendered(token.into());
        for (text, expected) in [
            ("<|im_start|>user\nhi<|im_end|>", rendered("<|im_start|>")),
            (" \n<|im_start|>", rendered("<|im_start|>")),
            ("You are kind.<|im_end|>\n<|im_start|>user\nhi", rendered("<|im_start|>")),
            ("Hello!<|im_end|>\n", rendered("<|im_end|>")),
            ("[INST] hi [/INST]", rendered("[INST]")),
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
