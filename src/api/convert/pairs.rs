//! Preference pairs: an upload sends them as messages or as JSON lines.

use super::messages;
use crate::api::proto as pb;
use crate::data::{Preference, Record};
use crate::error::{Error, Result};
use crate::request::ChatMessage;

/// Which of its two forms an upload of pairs has taken.
#[derive(Debug, Default)]
pub enum UploadEncoding {
    #[default]
    Unknown,
    Messages,
    Lines,
}

impl UploadEncoding {
    /// A pair sent as a message.
    pub fn record(&mut self, pair: pb::PreferencePair) -> Result<Record> {
        if matches!(self, Self::Lines) {
            return Err(mixed());
        }
        *self = Self::Messages;
        let answer = |content: String| vec![ChatMessage::new("assistant", content)];
        Ok(Record::Preference(Preference {
            prompt: messages("pair.prompt", pair.prompt.unwrap_or_default())?,
            chosen: answer(pair.chosen),
            rejected: answer(pair.rejected),
        }))
    }

    /// JSON lines as they are.
    pub fn data(&mut self, data: Vec<u8>) -> Result<Vec<u8>> {
        if matches!(self, Self::Messages) {
            return Err(mixed());
        }
        *self = Self::Lines;
        Ok(data)
    }
}

fn mixed() -> Error {
    Error::invalid("part", "send pairs or JSON lines, not both in one upload")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> pb::PreferencePair {
        let message = pb::ChatMessage { role: "user".into(), content: "hello".into(), ..Default::default() };
        pb::PreferencePair {
            prompt: Some(pb::Chat { messages: vec![message] }),
            chosen: "hi".into(),
            rejected: "no".into(),
        }
    }

    #[test]
    fn forms_do_not_mix() {
        let mut form = UploadEncoding::default();
        form.record(pair()).unwrap();
        assert!(form.data(b"{}".to_vec()).is_err());
        let mut form = UploadEncoding::default();
        form.data(b"{".to_vec()).unwrap();
        assert!(form.record(pair()).is_err());
    }
}
