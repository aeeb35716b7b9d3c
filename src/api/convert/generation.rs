//! Generate and Score. Values are checked by the engine, which names their fields as they are called here.

use std::time::Instant;

use super::{adapter, messages, or_empty};
use crate::api::proto as pb;
use crate::config::Limits;
use crate::error::{Error, Result};
use crate::request::{
    FinishReason, GenerateEvent, GenerateSpec, Prompt, Sampling, ScoreAnswer, ScoreOut, ScoreSpec, StopCause, Stopping,
    TokenLogprob, Usage,
};
use crate::telemetry::traces;
use crate::text::Text;

const DEFAULT_ANSWER_TOKENS: u64 = 256;

/// What the edge knows of a call: when its client stops waiting, and what its spans belong to.
pub type Call = (Option<Instant>, Option<traces::Context>);

pub fn generate_spec(request: pb::GenerateRequest, (deadline, trace): Call, limits: &Limits) -> Result<GenerateSpec> {
    let prompt = match request.prompt {
        Some(pb::generate_request::Prompt::Chat(chat)) if request.continue_final_message => {
            Prompt::ContinuedChat(messages("chat", chat)?)
        }
        Some(_) if request.continue_final_message => {
            return Err(Error::invalid(
                "continue_final_message",
                "is for a chat; a text or token_ids are continued as they are",
            ));
        }
        Some(pb::generate_request::Prompt::Text(text)) => Prompt::Text(text),
        Some(pb::generate_request::Prompt::Chat(chat)) => Prompt::Chat(messages("chat", chat)?),
        Some(pb::generate_request::Prompt::TokenIds(ids)) => Prompt::TokenIds(ids.ids),
        None => return Err(Error::invalid("prompt", "give one of text, chat and token_ids")),
    };
    Ok(GenerateSpec {
        adapter: adapter("adapter", &request.adapter)?,
        prompt,
        sampling: sampling(request.sampling.unwrap_or_default()),
        stopping: stopping(request.stopping.unwrap_or_default(), limits),
        logprobs: request.logprobs,
        priority: request.priority.unwrap_or_default(),
        deadline,
        trace,
    })
}

fn sampling(message: pb::Sampling) -> Sampling {
    let default = Sampling::default();
    Sampling {
        temperature: message.temperature.unwrap_or(default.temperature),
        top_p: message.top_p.unwrap_or(default.top_p),
        top_k: message.top_k.unwrap_or(default.top_k),
        min_p: message.min_p.unwrap_or(default.min_p),
        repetition_penalty: message.repetition_penalty.unwrap_or(default.repetition_penalty),
        presence_penalty: message.presence_penalty.unwrap_or(default.presence_penalty),
        frequency_penalty: message.frequency_penalty.unwrap_or(default.frequency_penalty),
        logit_bias: message.logit_bias.into_iter().collect(),
        min_tokens: message.min_tokens.unwrap_or(default.min_tokens),
        n: message.n.unwrap_or(default.n),
        seed: message.seed.unwrap_or_else(rand::random),
    }
}

fn stopping(message: pb::Stopping, limits: &Limits) -> Stopping {
    let default = DEFAULT_ANSWER_TOKENS.min(limits.max_answer_tokens) as u32;
    Stopping { max_tokens: message.max_tokens.unwrap_or(default), stop: message.stop, ignore_eos: message.ignore_eos }
}

/// One message for one event of answer `index`; `usage` comes with the last one of the call.
pub fn response_of(index: u32, event: GenerateEvent, usage: Option<Usage>, text: &Text) -> pb::GenerateResponse {
    let response = match event {
        GenerateEvent::Started { version, seed, .. } => {
            pb::GenerateResponse { adapter_version: or_empty(version), seed, ..Default::default() }
        }
        GenerateEvent::Delta { text: delta, tokens } => pb::GenerateResponse {
            text: delta,
            token_ids: tokens.iter().map(|token| token.id).collect(),
            logprobs: tokens.into_iter().filter_map(|token| token.logprob).map(|l| logprob(l, Some(text))).collect(),
            ..Default::default()
        },
        GenerateEvent::Finished { reason, stop, usage: _ } => pb::GenerateResponse {
            finish_reason: finish_reason(reason).into(),
            stopped_by: stop.map(stopped_by),
            ..Default::default()
        },
    };
    pb::GenerateResponse { index, usage: usage.map(usage_of), ..response }
}

fn stopped_by(cause: StopCause) -> pb::generate_response::StoppedBy {
    use pb::generate_response::StoppedBy;
    match cause {
        StopCause::Text(stop) => StoppedBy::StopString(stop),
        StopCause::Token(id) => StoppedBy::StopTokenId(id),
    }
}

fn finish_reason(reason: FinishReason) -> pb::FinishReason {
    match reason {
        FinishReason::Stop => pb::FinishReason::Stop,
        FinishReason::Length => pb::FinishReason::Length,
        FinishReason::ContentFiltered => pb::FinishReason::ContentFiltered,
        FinishReason::Cancelled => pb::FinishReason::Cancelled,
    }
}

fn usage_of(usage: Usage) -> pb::Usage {
    pb::Usage {
        prompt_tokens: usage.prompt_tokens,
        completion_tokens: usage.completion_tokens,
        cached_tokens: usage.cached_tokens,
        virtual_tokens: usage.virtual_tokens,
    }
}

/// With the tokens' text and bytes where `text` is given.
fn logprob(entry: TokenLogprob, text: Option<&Text>) -> pb::TokenLogprob {
    let TokenLogprob { id: token_id, logprob, top: entries } = entry;
    let (shown, bytes) = shown(token_id, text);
    pb::TokenLogprob { token_id, logprob, top: top(entries, text), text: shown, bytes }
}

fn top(entries: Vec<(u32, f32)>, text: Option<&Text>) -> Vec<pb::TopLogprob> {
    let one = |(token_id, logprob)| {
        let (text, bytes) = shown(token_id, text);
        pb::TopLogprob { token_id, logprob, text, bytes }
    };
    entries.into_iter().map(one).collect()
}

fn shown(id: u32, text: Option<&Text>) -> (String, Vec<u8>) {
    text.map(|text| (text.token_text(id).into_owned(), text.token_bytes(id).to_vec())).unwrap_or_default()
}

/// A token of the vocabulary.
pub fn token(text: &Text, id: u32) -> pb::Token {
    let (shown, bytes) = shown(id, Some(text));
    pb::Token { id, text: shown, bytes, control: text.is_control(id) }
}

/// What a Tokenize is about.
pub fn tokenize_input(input: Option<pb::tokenize_request::Input>) -> Result<Prompt> {
    match input {
        Some(pb::tokenize_request::Input::Text(text)) => Ok(Prompt::Text(text)),
        Some(pb::tokenize_request::Input::Chat(chat)) => Ok(Prompt::Chat(messages("chat", chat)?)),
        None => Err(Error::invalid("input", "give one of text and chat")),
    }
}

pub fn score_spec(request: pb::ScoreRequest, (deadline, trace): Call) -> Result<ScoreSpec> {
    Ok(ScoreSpec {
        adapter: adapter("adapter", &request.adapter)?,
        inputs: request.inputs.into_iter().enumerate().map(score_input).collect::<Result<_>>()?,
        top_logprobs: request.top_logprobs,
        priority: request.priority.unwrap_or_default(),
        deadline,
        trace,
    })
}

fn score_input((i, input): (usize, pb::ScoreInput)) -> Result<Prompt> {
    match input.sequence {
        Some(pb::score_input::Sequence::Text(text)) => Ok(Prompt::Text(text)),
        Some(pb::score_input::Sequence::TokenIds(ids)) => Ok(Prompt::TokenIds(ids.ids)),
        Some(pb::score_input::Sequence::Chat(chat)) => Ok(Prompt::Chat(messages(&format!("inputs[{i}].chat"), chat)?)),
        None => Err(Error::invalid(format!("inputs[{i}]"), "give one of text, token_ids and chat")),
    }
}

/// With the tokens' text and bytes where `text` is given.
pub fn score_response(answer: ScoreAnswer, text: Option<&Text>) -> pb::ScoreResponse {
    let result = |out: ScoreOut| pb::ScoreResult {
        token_ids: out.ids,
        logprobs: out.logprobs.into_iter().map(|entry| logprob(entry, text)).collect(),
        next: top(out.next, text),
    };
    pb::ScoreResponse {
        adapter_version: or_empty(answer.version),
        results: answer.results.into_iter().map(result).collect(),
        usage: Some(usage_of(answer.usage)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> pb::GenerateRequest {
        pb::GenerateRequest { prompt: Some(pb::generate_request::Prompt::Text("hello".into())), ..Default::default() }
    }

    fn field_of(request: pb::GenerateRequest) -> String {
        match generate_spec(request, (None, None), &Limits::default()) {
            Err(Error::Invalid { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn defaults_are_those_of_the_proto() {
        let spec = generate_spec(request(), (None, None), &Limits::default()).unwrap();
        assert_eq!(spec.adapter, None);
        assert_eq!(spec.stopping, Stopping { max_tokens: 256, stop: vec![], ignore_eos: false });
        assert_eq!(Sampling { seed: 0, ..spec.sampling }, Sampling::default());
        let other = generate_spec(request(), (None, None), &Limits::default()).unwrap();
        assert_ne!(spec.sampling.seed, other.sampling.seed, "a seed is drawn where none is given");
    }

    #[test]
    fn errors_name_the_path() {
        assert_eq!(field_of(pb::GenerateRequest { prompt: None, ..request() }), "prompt");
        assert_eq!(field_of(pb::GenerateRequest { adapter: "x".into(), ..request() }), "adapter");
        let chat = Some(pb::generate_request::Prompt::Chat(pb::Chat::default()));
        assert_eq!(field_of(pb::GenerateRequest { prompt: chat, ..request() }), "chat.messages");
    }
}
