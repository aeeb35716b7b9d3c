//! The base's chat template (Jinja, as Hugging Face sets it up), rendered so that content can be told from control tokens.
//!
//! Before rendering, a mark (U+FDD0, a noncharacter) goes after every character of the content that could begin a control token, and
//! marks that were there are doubled. So no control token of the vocabulary occurs in rendered content, whatever the template does
//! with it, and [`unmark`] gives the rendering that Hugging Face's would be.
//!
//! A template comes from a stranger's file: it has fuel for so many operations, its output is capped, and it is tried once at the start.

use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value, context};

use super::{ROLES, Vocabulary};
use crate::error::{Error, Result};
use crate::ids::Digest;
use crate::request::ChatMessage;

const MARK: char = '\u{FDD0}';
/// Operations of one rendering, by the chat's messages: so few may be rendered on a thread that others wait for. The largest templates in
/// use take some thousands and a few hundred a message.
const FUEL: [(usize, u64); 2] = [(32, 300_000), (usize::MAX, 5_000_000)];
/// What a rendering may add to the messages' text: bytes in all, and for each message.
const FRAME_BYTES: usize = 256 << 10;
const MESSAGE_BYTES: usize = 4 << 10;
/// How often a template may repeat the messages' text.
const REPEATS: usize = 4;

#[derive(Debug)]
pub(super) struct Template {
    /// Which [`FUEL`] says how many messages each is for.
    environments: [Environment<'static>; 2],
    digest: Digest,
    /// The first characters of all control tokens.
    openers: Vec<char>,
    bos: Option<String>,
    eos: String,
}

impl Template {
    /// Compiles a base's template and tries it on a chat of one message.
    ///
    /// # Errors
    /// INVALID_ARGUMENT where it does not parse, or does not render that chat, or renders it without the message's text.
    pub fn new(vocabulary: &Vocabulary) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::internal(format!("template syntax: {e}")))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment
            .add_template_owned("chat", vocabulary.chat_template.clone())
            .map_err(|e| Error::invalid("tokenizer.chat_template", format!("does not parse: {e}")))?;
        let name = |id: u32| vocabulary.tokens.get(id as usize);
        let mut openers: Vec<char> =
            vocabulary.control.iter().filter_map(|&id| name(id)).filter_map(|token| token.chars().next()).collect();
        openers.sort_unstable();
        openers.dedup();
        let bos = vocabulary.bos.and_then(name).cloned();
        let eos = name(vocabulary.eos).cloned().unwrap_or_default();
        let digest = Digest::of(vocabulary.chat_template.as_bytes());
        let environments = FUEL.map(|(_, fuel)| {
            let mut fuelled = environment.clone();
            fuelled.set_fuel(Some(fuel));
            fuelled
        });
        let template = Self { environments, digest, openers, bos, eos };
        template.try_out()?;
        Ok(template)
    }

    /// Renders a chat that every template must know.
    fn try_out(&self) -> Result<()> {
        const TEXT: &str = "hello";
        let refuse = |message: String| Err(Error::invalid("tokenizer.chat_template", message));
        match self.render_marked(&[ChatMessage::new("user", TEXT)], true) {
            Ok(rendered) if rendered.contains(TEXT) => Ok(()),
            Ok(_) => refuse("renders a chat without its message's text".into()),
            Err(Error::Invalid { message, .. }) => refuse(format!("does not render a chat of one message: {message}")),
            Err(other) => Err(other),
        }
    }

    /// Which of these ids the template writes first after an answer's text; `None` where it writes none there.
    pub fn end_of_turn(&self, ends: &[u32], tokens: &[String]) -> Option<u32> {
        const ANSWER: &str = "yes";
        let chat = [ChatMessage::new("user", "hello"), ChatMessage::new("assistant", ANSWER)];
        let rendered = self.render_marked(&chat, false).ok()?;
        let (_, after) = rendered.rsplit_once(ANSWER)?;
        let after = after.trim_start();
        let mut written = ends.iter().copied().filter(|id| after.starts_with(tokens[*id as usize].as_str()));
        written.next()
    }

    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Returns the template's text.
    pub fn source(&self) -> String {
        self.environments[0].get_template("chat").map(|template| template.source().to_owned()).unwrap_or_default()
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
        self.render(messages, generation_prompt, &|_, marked| marked)
    }

    /// The rendering, with its content marked and then changed by `wrap`, which is given the message's index.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        generation_prompt: bool,
        wrap: &dyn Fn(usize, String) -> String,
    ) -> Result<String> {
        if messages.is_empty() {
            return Err(Error::invalid("messages", "must hold at least one message"));
        }
        let mut listed = Vec::with_capacity(messages.len());
        for (i, message) in messages.iter().enumerate() {
            let role = match message.role.as_str() {
                "developer" => "system",
                role => role,
            };
            if !ROLES.contains(&role) {
                let role: String = message.role.chars().take(40).collect();
                return Err(Error::invalid(
                    format!("messages[{i}].role"),
                    format!("{role:?} is not one of system (or developer), user, assistant"),
                ));
            }
            let content = wrap(i, self.mark(&message.content));
            listed.push(match &message.name {
                Some(name) => context! { role, content, name => self.mark(name) },
                None => context! { role, content },
            });
        }
        self.write(listed, messages, generation_prompt)
    }

    fn write(&self, listed: Vec<Value>, messages: &[ChatMessage], generation_prompt: bool) -> Result<String> {
        // As transformers calls it: what is not given is none or false, not undefined.
        let values = context! {
            messages => listed, add_generation_prompt => generation_prompt, eos_token => &self.eos,
            tools => Value::from(()), documents => Value::from(()),
        };
        let values = match &self.bos {
            Some(bos) => context! { bos_token => bos, ..values },
            None => values,
        };
        let said: usize = messages.iter().map(|message| 2 * message.content.len()).sum();
        let room = REPEATS * said + FRAME_BYTES + MESSAGE_BYTES * messages.len();
        let mut out = Capped { bytes: Vec::new(), room };
        let which = usize::from(messages.len() > FUEL[0].0);
        let template = self.environments[which].get_template("chat");
        let rendered = template.and_then(|template| template.render_captured_to(values, &mut out).map(drop));
        rendered.map_err(|e| refused(&e, FUEL[which].1, room))?;
        String::from_utf8(out.bytes).map_err(Error::internal)
    }
}

/// What a template says to a chat, in its own words where it has any.
fn refused(error: &minijinja::Error, fuel: u64, room: usize) -> Error {
    let message = match error.kind() {
        ErrorKind::OutOfFuel => format!("the chat template takes more than {fuel} operations for this chat"),
        ErrorKind::WriteFailure => format!("the chat template makes more than {room} bytes of this chat"),
        ErrorKind::InvalidOperation => {
            format!("the chat template says: {}", error.detail().unwrap_or("this can't be rendered"))
        }
        _ => format!("the chat template fails: {error}"),
    };
    Error::invalid_because("TEMPLATE_REFUSED", "messages", message)
}

/// Bytes up to a limit.
struct Capped {
    bytes: Vec<u8>,
    room: usize,
}

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.room {
            return Err(io::Error::other("too much output"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> Result<Template> {
        Template::new(&Vocabulary { chat_template: source.into(), ..Vocabulary::tiny() })
    }

    fn error(result: Result<impl std::fmt::Debug>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn templates_that_never_end_or_fill_memory_are_refused_at_the_start() {
        let loops =
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ messages[0].content }}";
        assert!(error(template(loops)).contains("operations"), "{}", error(template(loops)));
        let long = "{% for i in range(99999) %}{{ 'xxxxxxxxxxxxxxxxxxxx' }}{% endfor %}{{ messages[0].content }}";
        assert!(error(template(long)).contains("bytes of this chat"), "{}", error(template(long)));
        assert!(error(template("{{ raise_exception('no') }}")).contains("does not render a chat of one message"));
        assert!(error(template("nothing")).contains("without its message's text"));
        assert!(error(template("{% for %}")).contains("does not parse"));
    }

    #[test]
    fn templates_have_what_transformers_gives_them() {
        let rendered =
            |source: &str, messages: &[ChatMessage]| template(source).unwrap().render_marked(messages, false);
        let hello = [ChatMessage::new("user", "a")];
        let tools = "{% if tools is not none %}tools{% endif %}{% if documents %}x{% endif %}{{ messages[0].content }}";
        assert_eq!(rendered(tools, &hello).unwrap(), "a");
        let unset = "{{ no_such }}{{ messages[0].content }}{% if no_such is defined %}x{% endif %}";
        assert_eq!(rendered(unset, &hello).unwrap(), "a");
        assert!(error(template("{{ no_such.field }}{{ messages[0].content }}")).contains("does not render"));
        let bos = Vocabulary {
            bos: Some(256),
            chat_template: "{{ bos_token + messages[0].content }}".into(),
            ..Vocabulary::tiny()
        };
        assert_eq!(Template::new(&bos).unwrap().render_marked(&hello, false).unwrap(), "<|im_start|>a");
        let named = "{% for m in messages %}{{ m.name ~ ': ' if m.name is defined }}{{ m.content }}{% endfor %}";
        let ann = ChatMessage { name: Some("Ann".into()), ..ChatMessage::new("user", "hi") };
        assert_eq!(rendered(named, &[ann]).unwrap(), "Ann: hi");
    }

    #[test]
    fn what_a_template_raises_comes_back_in_its_words() {
        let strict = "{% for m in messages %}{% if loop.index0 > 0 and m.role == messages[loop.index0 - 1].role %}\
            {{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}";
        let twice = [ChatMessage::new("user", "a"), ChatMessage::new("user", "b")];
        let refused = template(strict).unwrap().render_marked(&twice, false);
        assert!(matches!(&refused, Err(Error::Invalid { reason: "TEMPLATE_REFUSED", .. })), "{refused:?}");
        assert_eq!(error(refused), "messages: the chat template says: roles must alternate");
        assert!(
            Template::new(&Vocabulary::tiny()).unwrap().render_marked(&twice, false).is_ok(),
            "the template decides"
        );
        let developer = [ChatMessage::new("developer", "d"), ChatMessage::new("user", "a")];
        let system = [ChatMessage::new("system", "d"), ChatMessage::new("user", "a")];
        let tiny = Template::new(&Vocabulary::tiny()).unwrap();
        assert_eq!(tiny.render_marked(&developer, false).unwrap(), tiny.render_marked(&system, false).unwrap());
    }
}
