//! What `generate` and `score` send: a chat of one turn, or what standard input holds.

use std::io::{self, IsTerminal as _, read_to_string, stdin};

use super::{Failure, Result};
use crate::api::client::proto;

/// A chat of one user message; `begun` is how the answer to it begins.
pub(super) fn chat(system: Option<&str>, prompt: &str, begun: Option<&str>) -> proto::Chat {
    let message = |role: &str, content: &str| proto::ChatMessage {
        role: role.into(),
        content: content.into(),
        ..Default::default()
    };
    let system = system.map(|text| message("system", text));
    let begun = begun.map(|text| message("assistant", text));
    proto::Chat { messages: system.into_iter().chain([message("user", prompt)]).chain(begun).collect() }
}

/// Reads on a thread of its own: the future that waits for it gives way to a signal.
pub(super) async fn read_stdin() -> Result<String> {
    if stdin().is_terminal() {
        eprintln!("reading standard input; ctrl-d ends it");
    }
    let text = tokio::task::spawn_blocking(|| read_to_string(stdin()))
        .await
        .map_err(|e| Failure::other(format!("cannot read standard input: {e}")))?
        .map_err(|e| unread(&e))?;
    match text.trim_end_matches('\n') {
        "" => Err(Failure::other("there is nothing to send: give a text or standard input")),
        text => Ok(text.to_owned()),
    }
}

/// Why standard input could not be read.
fn unread(error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::InvalidData => Failure::other("standard input is not UTF-8 text"),
        _ => Failure::other(format!("cannot read standard input: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_that_is_no_text_is_named() {
        let error = read_to_string(&b"caf\xe9"[..]).unwrap_err();
        assert_eq!(unread(&error).to_string(), "standard input is not UTF-8 text");
        let error = io::Error::other("gone");
        assert_eq!(unread(&error).to_string(), "cannot read standard input: gone");
    }
}
