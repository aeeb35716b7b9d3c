//! From text to token ids and back: the base's tokenizer and chat template.
//!
//! One rule protects every prompt: **the text of a chat message never yields control tokens**, in serving and in training;
//! raw text does. Unlike other stacks, rendering and encoding are one step here, so that the rule cannot be bypassed.

use std::sync::Arc;

use crate::error::Result;
use crate::ids::Digest;
use crate::request::{ChatMessage, Prompt};

/// The tokenizer and the template of a base. Shared as `Arc<Text>`.
#[derive(Debug)]
pub struct Text {}

/// A conversation as training sees it: `in_loss[i]` says whether `ids[i]` is a token to be learnt.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    pub ids: Vec<u32>,
    pub in_loss: Vec<bool>,
}

impl Text {
    /// A byte-level toy vocabulary: ids 0..256 are bytes, 256 is `<|im_start|>`, 257 `<|im_end|>` (the end of a turn). For tests.
    pub fn tiny() -> Arc<Self> {
        todo!()
    }

    /// Raw text; control tokens in it are recognised.
    pub fn encode(&self, _text: &str) -> Result<Vec<u32>> {
        todo!()
    }

    /// Text in which nothing is a control token: an answer, a message.
    pub fn encode_plain(&self, _text: &str) -> Result<Vec<u32>> {
        todo!()
    }

    /// The template's rendering, for people; [`Text::encode_chat`] is what the model sees.
    pub fn render_chat(&self, _messages: &[ChatMessage], _generation_prompt: bool) -> Result<String> {
        todo!()
    }

    /// The ids of a chat, with the generation prompt appended where an answer is wanted.
    pub fn encode_chat(&self, _messages: &[ChatMessage], _generation_prompt: bool) -> Result<Vec<u32>> {
        todo!()
    }

    /// The ids that a generation starts from.
    pub fn encode_prompt(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        match prompt {
            Prompt::Text(text) => self.encode(text),
            Prompt::Chat(messages) => self.encode_chat(messages, true),
            Prompt::TokenIds(ids) => Ok(ids.clone()), // vocabulary range is checked here
        }
    }

    /// prompt with the generation prompt ++ answer ++ end of turn, for every assistant turn in order; `learn(i)` says whether the
    /// assistant message i is in the loss (OpenAI's `weight`).
    pub fn encode_conversation(
        &self,
        _messages: &[ChatMessage],
        _learn: &dyn Fn(usize) -> bool,
    ) -> Result<Conversation> {
        todo!()
    }

    /// Whether this id ends an answer.
    pub fn is_end(&self, _id: u32) -> bool {
        todo!()
    }

    /// The id that ends a turn (`<|im_end|>`).
    pub fn end_of_turn(&self) -> u32 {
        todo!()
    }

    pub fn vocab_size(&self) -> usize {
        todo!()
    }

    pub fn template_digest(&self) -> Digest {
        todo!()
    }

    /// Turns ids into text piece by piece.
    pub fn decoder(self: &Arc<Self>) -> Decoder {
        todo!()
    }
}

/// Incremental detokenisation: never emits half a character.
#[derive(Debug)]
pub struct Decoder {}

impl Decoder {
    /// The text that this id completes; empty while a character is incomplete. Control tokens give no text.
    pub fn push(&mut self, _id: u32) -> String {
        todo!()
    }

    /// What is left at the end: incomplete bytes as U+FFFD.
    pub fn finish(&mut self) -> String {
        todo!()
    }
}
