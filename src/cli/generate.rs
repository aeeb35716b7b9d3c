//! `tenora generate`: answers, streamed to the terminal as they come.

use std::io::{Write as _, stdout};
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use serde_json::{Value, json};
use tokio_stream::StreamExt as _;

use super::connection::Connection;
use super::prompt::{chat, read_stdin};
use super::show::{print_tokens, printable, token_json};
use super::{Failure, Result};
use crate::api::client::{Client, proto};
use proto::generate_response::StoppedBy;

/// Answer prompts with the base or an adapter.
///
/// A prompt is one user message of a chat; --raw sends it as bare text. Several prompts are answered at once and printed in
/// their order. Without a prompt, standard input is read.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  tenora generate \"Why is the sea salty?\"
  tenora generate --adapter tone --temperature 0.7 --seed 1 \"Where is my parcel?\"
  tenora generate --adapter tone/versions/2 --json first second third
  tenora generate --temperature 1 --n 3 --presence-penalty 0.5 \"Name a colour.\"
  tenora generate --raw --max-tokens 20 \"Once upon a time\"")]
pub(super) struct Args {
    /// What to answer.
    prompts: Vec<String>,
    /// An adapter (its live version answers) or ADAPTER/versions/N [default: the base]
    #[arg(long, short)]
    adapter: Option<String>,
    /// A system message before the prompt.
    #[arg(long, conflicts_with = "raw")]
    system: Option<String>,
    /// Begin the answer with this text; the model goes on from its end. Only what it adds is printed.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    continue_from: Option<String>,
    /// No chat template: the text is continued as it is, control tokens in it are recognised.
    #[arg(long)]
    raw: bool,
    /// Also print each token's log-probability, with this many most likely tokens beside it.
    #[arg(long, value_name = "N")]
    logprobs: Option<u32>,
    /// Higher goes first among the tenant's own requests, -100 to 100 [default: 0]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    priority: Option<i32>,
    #[command(flatten)]
    sampling: Sampling,
    #[command(flatten)]
    stopping: Stopping,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Sampling")]
struct Sampling {
    /// 0 is greedy [default: 0]
    #[arg(long, short)]
    temperature: Option<f32>,
    /// Keep the smallest set of tokens whose probabilities sum to this.
    #[arg(long)]
    top_p: Option<f32>,
    /// Keep this many most likely tokens.
    #[arg(long)]
    top_k: Option<u32>,
    /// Drop tokens less likely than this times the most likely one's probability.
    #[arg(long)]
    min_p: Option<f32>,
    /// Make tokens that are in the sequence already less likely; 1 is off.
    #[arg(long)]
    repetition_penalty: Option<f32>,
    /// Make tokens that the answer has already less likely, however often it has them; -2 to 2, 0 is off
    #[arg(long, allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Make tokens less likely for each time that the answer has them; -2 to 2, 0 is off
    #[arg(long, allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Add BIAS to the logit of token ID, -100 (never) to 100; may be repeated. `tenora tokenize` gives ids
    #[arg(long, value_name = "ID=BIAS", value_parser = parse_bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Generate this many tokens before the answer may end.
    #[arg(long, value_name = "N")]
    min_tokens: Option<u32>,
    /// Give this many answers to each prompt; answer i is that of the seed SEED + i (-n is --max-tokens).
    #[arg(long, value_name = "N")]
    n: Option<u32>,
    /// The same seed gives the same answer [default: drawn by the server, which tells it]
    #[arg(long)]
    seed: Option<u64>,
}

fn parse_bias(text: &str) -> std::result::Result<(u32, f32), String> {
    let (id, bias) = text.split_once('=').ok_or("must be ID=BIAS")?;
    let id = id.trim().parse().map_err(|_| format!("{id:?} is no token id"))?;
    let bias = bias.trim().parse().map_err(|_| format!("{bias:?} is no number"))?;
    Ok((id, bias))
}

#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Stopping")]
struct Stopping {
    /// Maximum number of tokens of an answer; --n is the number of answers [default: 256]
    #[arg(long, short = 'n')]
    max_tokens: Option<u32>,
    /// End before this text; may be repeated.
    #[arg(long)]
    stop: Vec<String>,
    /// Go on past the model's end of turn.
    #[arg(long)]
    ignore_eos: bool,
}

/// A whole answer and how long it took.
#[derive(Debug, Clone, Default)]
pub(super) struct Answer {
    /// The version that answered; empty is the base.
    pub version: String,
    /// What its tokens were drawn with; `None` where they were not.
    pub seed: Option<u64>,
    pub text: String,
    pub token_ids: Vec<u32>,
    pub logprobs: Vec<proto::TokenLogprob>,
    pub finish: proto::FinishReason,
    pub stopped_by: Option<StoppedBy>,
    /// Of the whole call, all its answers together.
    pub usage: proto::Usage,
    /// From the call to the first token.
    pub first_token: Duration,
    pub elapsed: Duration,
}

/// One call of Generate for one answer, to its end; `on_text` gets the text as it comes.
pub(super) async fn answer(
    client: &Client,
    request: proto::GenerateRequest,
    on_text: impl FnMut(&str) -> std::io::Result<()>,
) -> Result<Answer> {
    let mut answers = answers(client, request, on_text).await?;
    answers.pop().ok_or_else(|| Failure::other("the server ended the call without an answer; see its log"))
}

/// One call of Generate, to its end: its answers by index; `on_text` gets the first one's text as it comes.
async fn answers(
    client: &Client,
    request: proto::GenerateRequest,
    mut on_text: impl FnMut(&str) -> std::io::Result<()>,
) -> Result<Vec<Answer>> {
    let start = Instant::now();
    let mut stream = client.generate(request).await?;
    let mut answers: Vec<Answer> = Vec::new();
    let mut usage = proto::Usage::default();
    while let Some(part) = stream.next().await {
        let part = part?;
        let index = part.index as usize;
        if answers.len() <= index {
            answers.resize_with(index + 1, Answer::default);
        }
        let answer = &mut answers[index];
        if answer.token_ids.is_empty() && !part.token_ids.is_empty() {
            answer.first_token = start.elapsed();
        }
        if index == 0 && !part.text.is_empty() {
            on_text(&part.text)?;
        }
        if part.finish_reason() != proto::FinishReason::Unspecified {
            answer.finish = part.finish_reason();
            answer.elapsed = start.elapsed();
        }
        usage = part.usage.unwrap_or(usage);
        answer.version += &part.adapter_version;
        answer.seed = answer.seed.or(part.seed);
        answer.stopped_by = part.stopped_by.or(answer.stopped_by.take());
        answer.text += &part.text;
        answer.token_ids.extend(part.token_ids);
        answer.logprobs.extend(part.logprobs);
    }
    if answers.iter().any(|answer| answer.finish == proto::FinishReason::Unspecified) {
        return Err(Failure::other("the server ended the answer without a reason; see its log"));
    }
    answers.iter_mut().for_each(|answer| answer.usage = usage);
    Ok(answers)
}

pub(super) async fn run(mut args: Args) -> Result<()> {
    if args.prompts.is_empty() {
        args.prompts.push(read_stdin().await?);
    }
    let adapter = args.adapter.as_deref().map(|given| args.connection.name("adapters", given)).transpose()?;
    let client = args.connection.client().await?;
    let requests: Vec<_> =
        args.prompts.iter().map(|prompt| request(&args, adapter.clone().unwrap_or_default(), prompt)).collect();
    let streamed = !args.connection.json && args.sampling.n.unwrap_or(1) == 1;
    match <[_; 1]>::try_from(requests) {
        Ok([request]) if streamed => stream_one(&client, request).await,
        Ok([request]) => print_all(&args, None, &answers(&client, request, |_| Ok(())).await?),
        Err(requests) => {
            let calls = requests.into_iter().map(|request| answers(&client, request, |_| Ok(())));
            for (prompt, answers) in args.prompts.iter().zip(try_join_all(calls).await?) {
                print_all(&args, Some(prompt), &answers)?;
            }
            Ok(())
        }
    }
}

/// The answers to one prompt, as JSON or for people.
fn print_all(args: &Args, prompt: Option<&String>, answers: &[Answer]) -> Result<()> {
    let of = answers.len();
    if args.connection.json {
        answers.iter().enumerate().try_for_each(|(index, answer)| print_json(index, of, answer))?;
        return whole(answers);
    }
    if let Some(prompt) = prompt {
        writeln!(stdout(), "> {}", printable(prompt))?;
    }
    answers.iter().try_for_each(|answer| print_answer(answer, of))?;
    if let [_, .., last] = answers {
        writeln!(stdout(), "[{of} answers: {}]\n", counts(&last.usage))?;
    }
    whole(answers)
}

fn request(args: &Args, adapter: String, prompt: &str) -> proto::GenerateRequest {
    use proto::generate_request::Prompt;
    let (sampling, stopping) = (&args.sampling, &args.stopping);
    proto::GenerateRequest {
        adapter,
        prompt: Some(match args.raw {
            true => Prompt::Text(prompt.to_owned()),
            false => Prompt::Chat(chat(args.system.as_deref(), prompt, args.continue_from.as_deref())),
        }),
        continue_final_message: args.continue_from.is_some(),
        sampling: Some(proto::Sampling {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            seed: sampling.seed,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            logit_bias: sampling.logit_bias.iter().copied().collect(),
            min_tokens: sampling.min_tokens,
            n: sampling.n,
        }),
        stopping: Some(proto::Stopping {
            max_tokens: stopping.max_tokens,
            stop: stopping.stop.clone(),
            ignore_eos: stopping.ignore_eos,
        }),
        logprobs: args.logprobs,
        priority: args.priority,
    }
}

async fn stream_one(client: &Client, request: proto::GenerateRequest) -> Result<()> {
    let answer = answer(client, request, |text| {
        let mut out = stdout().lock();
        out.write_all(printable(text).as_bytes())?;
        out.flush()
    })
    .await?;
    writeln!(stdout())?;
    print_tokens(&answer.token_ids, &answer.logprobs)?;
    eprintln!("[{}]", summary(&answer, 1));
    whole(std::slice::from_ref(&answer))
}

/// Fails where an answer was cut off, after what there is of it has been printed.
fn whole(answers: &[Answer]) -> Result<()> {
    if answers.iter().any(|answer| answer.finish == proto::FinishReason::Cancelled) {
        return Err(Failure::other("the server is shutting down and ended an answer before its end; ask again"));
    }
    Ok(())
}

/// One of `of` answers.
fn print_answer(answer: &Answer, of: usize) -> Result<()> {
    writeln!(stdout(), "{}", printable(&answer.text))?;
    print_tokens(&answer.token_ids, &answer.logprobs)?;
    Ok(writeln!(stdout(), "[{}]\n", summary(answer, of))?)
}

/// Tokens of a call.
fn counts(usage: &proto::Usage) -> String {
    let cached = usage.cached_tokens.filter(|n| *n > 0).map(|n| format!(" ({n} cached)")).unwrap_or_default();
    let before = if usage.virtual_tokens > 0 { format!("virtual {} + ", usage.virtual_tokens) } else { String::new() };
    format!("{before}prompt {}{cached} + answer {} tokens", usage.prompt_tokens, usage.completion_tokens)
}

/// Who answered, what it took, and why it ended. Of several answers each tells its own tokens only.
fn summary(answer: &Answer, of: usize) -> String {
    let version = if answer.version.is_empty() { "base" } else { &answer.version };
    let tokens = answer.token_ids.len();
    let counts = if of > 1 { format!("answer {tokens} tokens") } else { counts(&answer.usage) };
    let decoding = answer.elapsed.saturating_sub(answer.first_token).as_secs_f64();
    let rate = if tokens > 1 && decoding > 0.0 { (tokens - 1) as f64 / decoding } else { 0.0 };
    let first = answer.first_token.as_secs_f64() * 1e3;
    let seed = answer.seed.map(|seed| format!(", seed {seed}")).unwrap_or_default();
    format!("{version}, {counts}, first after {first:.0} ms, then {rate:.1} tokens/s, {}{seed}", ending(answer))
}

/// Why an answer ended: `STOP at "END"`, `STOP at token 2`, `LENGTH`.
fn ending(answer: &Answer) -> String {
    let reason = finish(answer.finish);
    match &answer.stopped_by {
        Some(StoppedBy::StopString(text)) => format!("{reason} at {text:?}"),
        Some(StoppedBy::StopTokenId(id)) => format!("{reason} at token {id}"),
        None => reason.to_owned(),
    }
}

fn finish(reason: proto::FinishReason) -> &'static str {
    reason.as_str_name().trim_start_matches("FINISH_REASON_")
}

fn print_json(index: usize, of: usize, answer: &Answer) -> Result<()> {
    Ok(writeln!(stdout(), "{}", json_of(index, of, answer))?)
}

fn usage_json(usage: &proto::Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens,
        "cached_tokens": usage.cached_tokens, "virtual_tokens": usage.virtual_tokens,
    })
}

/// One of `of` answers. Of several, each tells its own tokens, and the last one the call's too.
fn json_of(index: usize, of: usize, answer: &Answer) -> Value {
    let logprobs: Vec<Value> = answer.logprobs.iter().map(token_json).collect();
    let (stop_string, stop_token_id) = match &answer.stopped_by {
        Some(StoppedBy::StopString(text)) => (Some(text), None),
        Some(StoppedBy::StopTokenId(id)) => (None, Some(id)),
        None => (None, None),
    };
    let usage = match of {
        1 => usage_json(&answer.usage),
        _ => json!({ "completion_tokens": answer.token_ids.len() }),
    };
    let mut value = json!({
        "index": index, "adapter_version": answer.version, "text": answer.text, "token_ids": answer.token_ids,
        "logprobs": logprobs, "finish_reason": finish(answer.finish), "stop_string": stop_string,
        "stop_token_id": stop_token_id, "seed": answer.seed,
        "usage": usage,
        "first_token_seconds": answer.first_token.as_secs_f64(), "seconds": answer.elapsed.as_secs_f64(),
    });
    if of > 1 && index + 1 == of {
        value["call_usage"] = usage_json(&answer.usage);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(tokens: u32) -> Answer {
        let usage = proto::Usage { prompt_tokens: 7, completion_tokens: 10, cached_tokens: Some(3), virtual_tokens: 2 };
        Answer { token_ids: (0..tokens).collect(), usage, ..Answer::default() }
    }

    #[test]
    fn one_answer_tells_what_the_call_took() {
        // Two tokens of a stop string were not sent.
        let answer = answer(8);
        assert!(
            summary(&answer, 1)
                .starts_with("base, virtual 2 + prompt 7 (3 cached) + answer 10 tokens, first after 0 ms")
        );
        let value = json_of(0, 1, &answer);
        assert_eq!(
            value["usage"],
            json!({ "prompt_tokens": 7, "completion_tokens": 10, "cached_tokens": 3, "virtual_tokens": 2 })
        );
        assert!(value.get("call_usage").is_none());
    }

    #[test]
    fn several_answers_tell_their_own_tokens_and_the_last_the_calls() {
        let answers = [answer(4), answer(6)];
        assert!(summary(&answers[0], 2).starts_with("base, answer 4 tokens, first after"));
        let values: Vec<_> = answers.iter().enumerate().map(|(index, answer)| json_of(index, 2, answer)).collect();
        let own: Vec<_> = values.iter().map(|value| value["usage"].clone()).collect();
        assert_eq!(own, [json!({ "completion_tokens": 4 }), json!({ "completion_tokens": 6 })]);
        assert!(values[0].get("call_usage").is_none());
        assert_eq!(values[1]["call_usage"], usage_json(&answers[1].usage));
    }
}
