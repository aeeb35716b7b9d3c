//! The base's chat template (Jinja, as Hugging Face sets it up), rendered so that content can be told from control tokens.
//!
//! Before rendering, a mark (U+FDD0, a noncharacter) goes after every character of the content that could begin a control token, and
//! marks that were there are doubled. So no control token of the vocabulary occurs in rendered content, whatever the template does
//! with it, and [`unmark`] gives the rendering that Hugging Face's would be.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Value, context};

use super::Vocabulary;
use crate::error::{Error, Result};
use crate::ids::Digest;
use crate::request::ChatMessage;

const MARK: char = '\u{FDD0}';
const ROLES: [&str; 3] = ["system", "user", "assistant"];

#[derive(Debug)]
pub(super) struct Template {
    environment: Environment<'static>,
    digest: Digest,
    /// The first characters of all control tokens.
    openers: Vec<char>,
    eos: String,
}

impl Template {
    pub fn new(vocabulary: &Vocabulary) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::internal(format!("template syntax: {e}")))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, message))
        });
        environment
            .add_template_owned("chat", vocabulary.chat_template.clone())
            .map_err(|e| Error::invalid("tokenizer.chat_template", format!("does not parse: {e}")))?;
        let name = |id: u32| vocabulary.tokens.get(id as usize);
        let mut openers: Vec<char> =
            vocabulary.control.iter().filter_map(|&id| name(id)).filter_map(|token| token.chars().next()).collect();
        openers.sort_unstable();
        openers.dedup();
        let eos = name(vocabulary.end_of_turn).cloned().unwrap_or_default();
        let digest = Digest::of(vocabulary.chat_template.as_bytes());
        Ok(Self { environment, digest, openers, eos })
    }

    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Returns the template's text.
    pub fn source(&self) -> String {
        self.environment.get_template("chat").map(|template| template.source().to_owned()).unwrap_or_default()
    }

    /// Breaks every control token in `content`.
    pub fn mark(&self, content: &str) -> String {
        let mut marked = String::with_capacity(content.len() + 8);
        for ch in content.chars() {
            marked.push(ch);
            if ch == MARK || self.openers.contains(&ch) {
                marked.push(MARK);
            }
        }
        marked
    }

    /// The rendering, with its content marked.
    pub fn render_marked(&self, messages: &[ChatMessage], generation_prompt: bool) -> Result<String> {
        let Some(last) = messages.len().checked_sub(1) else {
            return Err(Error::invalid("messages", "must hold at least one message"));
        };
        let mut rendered = Vec::with_capacity(last + 1);
        for (i, message) in messages.iter().enumerate() {
            if !ROLES.contains(&message.role.as_str()) {
                let role: String = message.role.chars().take(40).collect();
                return Err(Error::invalid(
                    format!("messages[{i}].role"),
                    format!("{role:?} is not one of system, user, assistant"),
                ));
            }
            rendered.push(context! { role => &message.role, content => self.mark(&message.content) });
        }
        self.environment
            .get_template("chat")
            .and_then(|t| {
                t.render(context! { messages => rendered, add_generation_prompt => generation_prompt, eos_token => &self.eos })
            })
            .map_err(|e| Error::invalid_because("TEMPLATE_REFUSED", "messages", format!("the chat template says: {e}")))
    }
}

/// Takes the marks out.
pub(super) fn unmark(marked: &str) -> String {
    let mut text = String::with_capacity(marked.len());
    let mut chars = marked.chars().peekable();
    while let Some(ch) = chars.next() {
        if ch != MARK {
            text.push(ch);
        } else if chars.next_if_eq(&MARK).is_some() {
            text.push(MARK);
        }
    }
    text
}
