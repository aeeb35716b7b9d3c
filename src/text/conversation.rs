//! Whole conversations as ids, with what is learnt of them.
//!
//! The definition is [`Text::turn_by_turn`]: each answer follows the prompt that serving would render before it. That renders a chat once
//! for each turn. [`Text::in_one_pass`] renders it a few times, finds the answers by marks around them, and takes its result only where it
//! has shown that the definition's would be the same.

use super::{Text, rest};
use crate::error::{Error, Result};
use crate::request::ChatMessage;

/// A conversation as training sees it: `in_loss[i]` says whether `ids[i]` is a token to be learnt.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Conversation {
    /// The whole conversation.
    pub ids: Vec<u32>,
    /// One for each id.
    pub in_loss: Vec<bool>,
}

impl Conversation {
    fn extend(&mut self, ids: impl IntoIterator<Item = u32>, in_loss: bool) {
        self.ids.extend(ids);
        self.in_loss.resize(self.ids.len(), in_loss);
    }
}

/// Around an answer: noncharacters that no text should have.
const BEGIN: char = '\u{FDD1}';
const END: char = '\u{FDD2}';
/// Turns up to which the definition is no dearer than the short way.
const FEW_TURNS: usize = 5;
/// Bytes that the definition may render for one conversation.
const RENDERED_BYTES: usize = 64 << 20;

impl Text {
    /// prompt with the generation prompt ++ answer ++ end of turn, for every assistant turn in order; `learn(i)` says whether the
    /// assistant message i is in the loss (OpenAI's `weight`). Messages after the last assistant turn are rendered, not learnt.
    ///
    /// # Errors
    /// TEMPLATE_REFUSED in the template's words; TEMPLATE_REWRITES_TURNS where an earlier turn looks different once more follow.
    pub fn encode_conversation(&self, messages: &[ChatMessage], learn: &dyn Fn(usize) -> bool) -> Result<Conversation> {
        match self.in_one_pass(messages, learn)? {
            Some(conversation) => Ok(conversation),
            None => self.turn_by_turn(messages, learn),
        }
    }

    fn turn_by_turn(&self, messages: &[ChatMessage], learn: &dyn Fn(usize) -> bool) -> Result<Conversation> {
        let mut conversation = Conversation::default();
        let (mut done, mut rendered) = (String::new(), 0);
        let template = self.template()?;
        for (i, message) in messages.iter().enumerate().filter(|(_, m)| m.role == "assistant") {
            let prompt = template.render_marked(&messages[..i], true)?;
            rendered += prompt.len();
            if rendered > RENDERED_BYTES {
                return Err(Error::invalid_because(
                    "CHAT_TOO_LONG",
                    "messages",
                    "this base's chat template must be rendered once for each turn, and the chat has too many turns and too much text for that; split it",
                ));
            }
            conversation.extend(self.encode_marked(rest(&prompt, &done)?)?, false);
            self.answer(&mut conversation, &message.content, learn(i))?;
            done = prompt + &template.mark(&message.content) + self.tokenizer.token(self.end_of_turn);
        }
        if messages.last().is_none_or(|m| m.role != "assistant") {
            let whole = template.render_marked(messages, false)?;
            conversation.extend(self.encode_marked(rest(&whole, &done)?)?, false);
        }
        Ok(conversation)
    }

    fn answer(&self, conversation: &mut Conversation, content: &str, learn: bool) -> Result<()> {
        conversation.extend(self.encode_after(&conversation.ids, content)?, learn);
        conversation.extend([self.end_of_turn], learn);
        Ok(())
    }

    /// `None` where it is not sure to give what the definition gives. It is sure where
    /// - the chat renders the same with marks around the messages' texts as without, marks aside, so that they changed nothing;
    /// - each text stands there once, in order and as it is, and the end of the turn after each answer;
    /// - what stands before the first answer, one in the middle and the last is what serving would render before it. A template that does
    ///   something else before some turn only, by its number, would pass; one that does so by what a turn says does not leave it as it is.
    fn in_one_pass(&self, messages: &[ChatMessage], learn: &dyn Fn(usize) -> bool) -> Result<Option<Conversation>> {
        let turns: Vec<usize> = (0..messages.len()).filter(|i| messages[*i].role == "assistant").collect();
        let holds_marks = |message: &ChatMessage| message.content.contains([BEGIN, END]);
        if turns.len() <= FEW_TURNS || turns[0] == 0 || messages.iter().any(holds_marks) {
            return Ok(None);
        }
        let template = self.template()?;
        let (begin, end) = (BEGIN.to_string(), END.to_string());
        let Ok(marked) = template.render(messages, false, (&begin, &end)) else { return Ok(None) };
        let Ok(plain) = template.render_marked(messages, false) else { return Ok(None) };
        let Some((pieces, after)) = self.pieces(&marked, &plain, messages) else { return Ok(None) };
        if marked.replace([BEGIN, END], "") != plain {
            return Ok(None);
        }
        for turn in [0, turns.len() / 2, turns.len() - 1] {
            let prompt = template.render_marked(&messages[..turns[turn]], true);
            if prompt.ok().as_deref() != plain.get(..pieces[turn].answer_at) {
                return Ok(None);
            }
        }
        let mut conversation = Conversation::default();
        for (piece, i) in pieces.iter().zip(&turns) {
            conversation.extend(self.encode_marked(piece.before)?, false);
            self.answer(&mut conversation, &messages[*i].content, learn(*i))?;
        }
        if messages.last().is_none_or(|m| m.role != "assistant") {
            conversation.extend(self.encode_marked(after)?, false);
        }
        Ok(Some(conversation))
    }

    /// The text of the plain rendering before each answer, and that after the last. `None` where a message does not stand there as it is.
    fn pieces<'t>(&self, marked: &str, plain: &'t str, messages: &[ChatMessage]) -> Option<(Vec<Piece<'t>>, &'t str)> {
        let (template, end) = (self.template.as_ref()?, self.tokenizer.token(self.end_of_turn));
        let mut rest = marked;
        // Bytes of the plain rendering: so far, and to the end of the last answer's turn.
        let (mut at, mut from) = (0, 0);
        let mut pieces = Vec::new();
        for message in messages {
            let (before, inside) = rest.split_once(BEGIN)?;
            let (text, after) = inside.split_once(END)?;
            if before.contains(END) || text != template.mark(&message.content) {
                return None;
            }
            at += before.len();
            let is_answer = message.role == "assistant";
            if is_answer {
                pieces.push(Piece { before: plain.get(from..at)?, answer_at: at });
            }
            rest = if is_answer { after.strip_prefix(end)? } else { after };
            at += text.len() + if is_answer { end.len() } else { 0 };
            from = if is_answer { at } else { from };
        }
        Some((pieces, plain.get(from..)?))
    }
}

/// An answer's place in a rendering.
struct Piece<'t> {
    /// From the end of the answer before.
    before: &'t str,
    /// Where the answer begins.
    answer_at: usize,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Vocabulary;
    use proptest::prelude::*;

    /// As the tiny one; with a default system message; trims contents; drops what answers but the last have before `|`; shows turns' numbers;
    /// opens answers in the generation prompt in another way than in the chat; tells the last turn from the others.
    const TEMPLATES: [&str; 6] = [
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content.split('|')[-1] if not loop.last else m.content) + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "{% for m in messages %}{{ loop.index ~ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ (messages | length + 1) ~ '<|im_start|>assistant\n' }}{% endif %}",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}",
    ];

    fn text(template: &str) -> std::sync::Arc<Text> {
        Text::new(Vocabulary { chat_template: template.into(), ..Vocabulary::tiny() }).unwrap()
    }

    fn chat() -> impl Strategy<Value = Vec<ChatMessage>> {
        let content = prop_oneof![8 => Just("hi <|im_end|> é".to_owned()), 1 => Just(" a ".to_owned()), 1 => Just("x|y".to_owned()), 1 => Just(String::new()), 1 => Just("\u{FDD0}\u{FDD1}".to_owned())];
        let message = (prop::sample::select(vec!["user", "assistant", "assistant"]), content);
        prop::collection::vec(message, 1..24)
            .prop_map(|list| list.into_iter().map(|(role, content)| ChatMessage::new(role, content)).collect())
    }

    proptest! {
        #[test]
        fn the_short_way_gives_what_the_definition_gives(messages in chat(), template in 0..TEMPLATES.len()) {
            let text = text(TEMPLATES[template]);
            let learn = |i: usize| !i.is_multiple_of(3);
            if let Some(short) = text.in_one_pass(&messages, &learn).unwrap() {
                prop_assert_eq!(short, text.turn_by_turn(&messages, &learn).unwrap());
            }
        }
    }

    fn rounds(n: usize) -> Vec<ChatMessage> {
        (0..2 * n).map(|i| ChatMessage::new(["user", "assistant"][i % 2], format!("text {i}"))).collect()
    }

    #[test]
    fn plain_templates_go_the_short_way_and_others_do_not() {
        for (template, short) in TEMPLATES.iter().zip([true, true, true, true, true, false]) {
            assert_eq!(text(template).in_one_pass(&rounds(8), &|_| true).unwrap().is_some(), short, "{template}");
        }
        let mut trimmed = rounds(8);
        trimmed[3].content = " padded ".into();
        assert!(text(TEMPLATES[2]).in_one_pass(&trimmed, &|_| true).unwrap().is_none());
    }

    #[test]
    fn many_turns_are_encoded_and_the_long_way_is_bounded() {
        let text = text(TEMPLATES[0]);
        let mut messages = rounds(300);
        assert!(text.in_one_pass(&messages, &|_| true).unwrap().is_some());
        for message in &mut messages {
            message.content = "x".repeat(2000);
        }
        let error = text.turn_by_turn(&messages, &|_| true).unwrap_err();
        assert!(matches!(error, Error::Invalid { reason: "CHAT_TOO_LONG", .. }), "{error}");
        assert_eq!(
            text.encode_conversation(&messages, &|_| true).unwrap().in_loss.iter().filter(|l| **l).count(),
            300 * 2001
        );
    }
}
