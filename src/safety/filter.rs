//! Ends a stream of events before the first blocked phrase.

use async_stream::stream;
use futures::StreamExt as _;
use futures::stream::empty;

use crate::engine::GenerateStream;
use crate::request::{FinishReason, GenerateEvent, Usage};
use crate::text::matcher::{HoldBack, Patterns, Released};

/// The same events, held back while their text may begin a phrase: text, token ids and log-probabilities alike. At a phrase the events
/// are dropped, which cancels the sequence, and the answer ends with what was generated so far as its usage.
pub fn filter(mut events: GenerateStream, phrases: Patterns) -> GenerateStream {
    Box::pin(stream! {
        let mut hold_back = HoldBack::new(phrases);
        let mut usage = Usage::default();
        while let Some(event) = events.next().await {
            match event {
                Ok(GenerateEvent::Started { version, prompt_tokens, virtual_tokens, seed }) => {
                    (usage.prompt_tokens, usage.virtual_tokens) = (prompt_tokens, virtual_tokens);
                    yield Ok(GenerateEvent::Started { version, prompt_tokens, virtual_tokens, seed });
                }
                Ok(GenerateEvent::Delta { text, tokens }) => {
                    usage.completion_tokens += tokens.len() as u32;
                    let released = hold_back.push(&text, tokens);
                    let matched = released.matched;
                    if matched {
                        // Before anything is handed on, so that a slow reader does not keep the sequence running.
                        events = Box::pin(empty());
                    }
                    if let Some(delta) = delta_of(released) {
                        yield Ok(delta);
                    }
                    if matched {
                        yield Ok(GenerateEvent::Finished { reason: FinishReason::ContentFiltered, stop: None, usage });
                    }
                }
                Ok(GenerateEvent::Finished { reason, stop, usage }) => {
                    if let Some(delta) = delta_of(hold_back.finish()) {
                        yield Ok(delta);
                    }
                    yield Ok(GenerateEvent::Finished { reason, stop, usage });
                }
                Err(error) => yield Err(error),
            }
        }
    })
}

/// The delta that says this, unless there is nothing to say.
fn delta_of(released: Released) -> Option<GenerateEvent> {
    (!released.is_empty()).then_some(GenerateEvent::Delta { text: released.text, tokens: released.tokens })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::error::{Error, Result};
    use crate::request::{TokenLogprob, TokenOut};

    const PROMPT_TOKENS: u32 = 7;
    const VIRTUAL_TOKENS: u32 = 3;

    fn phrases(of: &[&str]) -> Patterns {
        Patterns::new(&of.iter().map(|p| p.to_string()).collect::<Vec<_>>(), true).unwrap()
    }

    fn token(id: usize) -> TokenOut {
        let logprob = TokenLogprob { id: id as u32, logprob: -(id as f32), top: vec![(id as u32, -0.5)] };
        TokenOut { id: id as u32, logprob: Some(logprob) }
    }

    fn started() -> Result<GenerateEvent> {
        Ok(GenerateEvent::Started {
            version: None,
            prompt_tokens: PROMPT_TOKENS,
            virtual_tokens: VIRTUAL_TOKENS,
            seed: None,
        })
    }

    fn finished(reason: FinishReason, completion_tokens: usize) -> GenerateEvent {
        let usage = Usage {
            prompt_tokens: PROMPT_TOKENS,
            completion_tokens: completion_tokens as u32,
            virtual_tokens: VIRTUAL_TOKENS,
            cached_tokens: None,
        };
        GenerateEvent::Finished { reason, stop: None, usage }
    }

    /// One token a text, numbered from 0; ends at the longest answer.
    fn events(texts: &[&str]) -> Vec<Result<GenerateEvent>> {
        let delta =
            |(i, text): (usize, &&str)| Ok(GenerateEvent::Delta { text: text.to_string(), tokens: vec![token(i)] });
        let deltas = texts.iter().enumerate().map(delta);
        [started()].into_iter().chain(deltas).chain([Ok(finished(FinishReason::Length, texts.len()))]).collect()
    }

    /// What a client gets of it.
    #[derive(Debug, PartialEq)]
    struct Answer {
        text: String,
        tokens: Vec<TokenOut>,
        last: GenerateEvent,
    }

    async fn answer(blocked: &[&str], texts: &[&str]) -> Answer {
        let out: Vec<_> = filter(Box::pin(futures::stream::iter(events(texts))), phrases(blocked)).collect().await;
        let mut out: Vec<_> = out.into_iter().map(Result::unwrap).collect();
        let mut answer = Answer { text: String::new(), tokens: Vec::new(), last: out.pop().unwrap() };
        assert_eq!(out[0], started().unwrap());
        for event in out.drain(1..) {
            let GenerateEvent::Delta { text, tokens } = event else { panic!("{event:?} is no delta") };
            assert!(!text.is_empty() || !tokens.is_empty());
            answer.text += &text;
            answer.tokens.extend(tokens);
        }
        answer
    }

    fn filtered(text: &str, tokens: usize, generated: usize) -> Answer {
        let last = finished(FinishReason::ContentFiltered, generated);
        Answer { text: text.into(), tokens: (0..tokens).map(token).collect(), last }
    }

    fn whole(texts: &[&str]) -> Answer {
        let last = finished(FinishReason::Length, texts.len());
        Answer { text: texts.concat(), tokens: (0..texts.len()).map(token).collect(), last }
    }

    #[tokio::test]
    async fn a_phrase_over_several_tokens_ends_the_answer_before_it() {
        assert_eq!(answer(&["secret"], &["the ", "sec", "ret", " is"]).await, filtered("the ", 1, 3));
        assert_eq!(answer(&["secret"], &["secret"]).await, filtered("", 0, 1));
    }

    #[tokio::test]
    async fn case_does_not_matter() {
        assert_eq!(answer(&["SeCret"], &["a ", "sEC", "reT"]).await, filtered("a ", 1, 3));
    }

    #[tokio::test]
    async fn a_phrase_at_the_very_end_is_found() {
        assert_eq!(answer(&["end"], &["the", " en", "d"]).await, filtered("the ", 1, 3));
    }

    #[tokio::test]
    async fn what_only_began_a_phrase_comes_with_the_end() {
        assert_eq!(answer(&["secret"], &["my", " sec", "re"]).await, whole(&["my", " sec", "re"]));
        assert_eq!(answer(&["secret"], &[]).await, whole(&[]));
    }

    #[tokio::test]
    async fn of_overlapping_phrases_the_first_to_end_counts() {
        assert_eq!(answer(&["black cat", "cat food"], &["a black", " cat", " food"]).await, filtered("a ", 0, 2));
        assert_eq!(answer(&["black cat food", "cat"], &["a black", " cat", " food"]).await, filtered("a black ", 1, 2));
    }

    #[tokio::test]
    async fn log_probabilities_wait_with_their_tokens() {
        let mut stream = filter(Box::pin(futures::stream::iter(events(&["se", "c", "ond"]))), phrases(&["secret"]));
        assert_eq!(stream.next().await.unwrap().unwrap(), started().unwrap());
        let delta = GenerateEvent::Delta { text: "second".into(), tokens: (0..3).map(token).collect() };
        assert_eq!(stream.next().await.unwrap().unwrap(), delta, "nothing came while it could be the phrase");
    }

    #[tokio::test]
    async fn an_error_ends_the_answer_and_what_was_held_stays() {
        let mut input = events(&["ok", " sec"]);
        *input.last_mut().unwrap() = Err(Error::DeadlineExceeded);
        let out: Vec<_> = filter(Box::pin(futures::stream::iter(input)), phrases(&["secret"])).collect().await;
        assert!(matches!(out.last(), Some(Err(Error::DeadlineExceeded))));
        let text: String = out
            .iter()
            .filter_map(|e| if let Ok(GenerateEvent::Delta { text, .. }) = e { Some(text.as_str()) } else { None })
            .collect();
        assert_eq!(text, "ok ");
    }

    #[tokio::test]
    async fn the_sequence_is_cancelled_before_the_reader_has_the_end() {
        let alive = Arc::new(());
        let held = alive.clone();
        let input = futures::stream::iter(events(&["a ", "b secret"])).inspect(move |_| _ = &held);
        let mut stream = filter(Box::pin(input), phrases(&["secret"]));
        while Arc::strong_count(&alive) > 1 {
            stream.next().await.unwrap().unwrap();
        }
        assert_eq!(stream.next().await.unwrap().unwrap(), finished(FinishReason::ContentFiltered, 2));
        assert!(stream.next().await.is_none());
    }

    proptest! {
        #[test]
        fn no_answer_has_a_phrase_in_any_case(
            blocked in prop::collection::vec("[abAB]{1,4}", 1..4),
            texts in prop::collection::vec("[abAB]{0,3}", 0..12),
        ) {
            let blocked: Vec<_> = blocked.iter().map(String::as_str).collect();
            let texts: Vec<_> = texts.iter().map(String::as_str).collect();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let answer = runtime.block_on(answer(&blocked, &texts));
            let has_phrase = |text: &str| blocked.iter().any(|p| text.to_lowercase().contains(&p.to_lowercase()));
            prop_assert!(!has_phrase(&answer.text));
            prop_assert!(texts.concat().starts_with(&answer.text));
            if has_phrase(&texts.concat()) {
                let clean = matches!(answer.last, GenerateEvent::Finished { reason: FinishReason::ContentFiltered, .. });
                prop_assert!(clean);
            } else {
                prop_assert_eq!(answer, whole(&texts));
            }
        }
    }
}
