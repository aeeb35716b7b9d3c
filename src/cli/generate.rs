//! `tenora generate`: answers, streamed to the terminal as they come.

use std::io::{IsTerminal as _, Write as _, stderr, stdout};
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use serde_json::{Value, json};
use tokio_stream::StreamExt as _;

use super::connection::Connection;
use super::prompt::{chat, read_stdin};
use super::show::{print_tokens, printable, token_json};
use super::{Failure, Result};
use crate::api::client::{Client, proto};

/// Answer prompts with the base or an adapter.
///
/// A prompt is one user message of a chat; --raw sends it as bare text. Several prompts are answered at once and printed in
/// their order. Without a prompt, standard input is read.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  tenora generate \"Why is the sea salty?\"
  tenora generate --adapter tone --temperature 0.7 --seed 1 \"Where is my parcel?\"
  tenora generate --adapter tone/versions/2 --json first second third
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
    /// The same seed gives the same answer [default: drawn by the server]
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Stopping")]
struct Stopping {
    /// Most tokens of an answer [default: 256]
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
pub(super) struct Answer {
    /// The version that answered; empty is the base.
    pub version: String,
    pub text: String,
    pub token_ids: Vec<u32>,
    pub logprobs: Vec<proto::TokenLogprob>,
    pub finish: proto::FinishReason,
    pub usage: proto::Usage,
    /// From the call to the first token.
    pub first_token: Duration,
    pub elapsed: Duration,
}

/// One call of Generate, to its end; `on_text` gets the text as it comes.
pub(super) async fn answer(
    client: &Client,
    request: proto::GenerateRequest,
    mut on_text: impl FnMut(&str) -> std::io::Result<()>,
) -> Result<Answer> {
    let start = Instant::now();
    let mut stream = client.generate(request).await?;
    let mut answer = Answer {
        version: String::new(),
        text: String::new(),
        token_ids: Vec::new(),
        logprobs: Vec::new(),
        finish: proto::FinishReason::Unspecified,
        usage: proto::Usage::default(),
        first_token: Duration::ZERO,
        elapsed: Duration::ZERO,
    };
    while let Some(part) = stream.next().await {
        let part = part?;
        if answer.token_ids.is_empty() && !part.token_ids.is_empty() {
            answer.first_token = start.elapsed();
        }
        if !part.adapter_version.is_empty() {
            answer.version.clone_from(&part.adapter_version);
        }
        if part.finish_reason() != proto::FinishReason::Unspecified {
            answer.finish = part.finish_reason();
        }
        if let Some(usage) = part.usage {
            answer.usage = usage;
        }
        if !part.text.is_empty() {
            on_text(&part.text)?;
        }
        answer.text.push_str(&part.text);
        answer.token_ids.extend(part.token_ids);
        answer.logprobs.extend(part.logprobs);
    }
    answer.elapsed = start.elapsed();
    match answer.finish {
        proto::FinishReason::Unspecified => {
            Err(Failure::other("the server ended the answer without a reason; see its log"))
        }
        _ => Ok(answer),
    }
}

pub(super) async fn run(mut args: Args) -> Result<()> {
    if args.prompts.is_empty() {
        args.prompts.push(read_stdin().await?);
    }
    let adapter = args.adapter.as_deref().map(|given| args.connection.name("adapters", given)).transpose()?;
    let client = args.connection.client().await?;
    let requests: Vec<_> =
        args.prompts.iter().map(|prompt| request(&args, adapter.clone().unwrap_or_default(), prompt)).collect();
    match <[_; 1]>::try_from(requests) {
        Ok([request]) if !args.connection.json => stream_one(&client, request).await,
        Ok([request]) => print_json(&answer(&client, request, |_| Ok(())).await?),
        Err(requests) => {
            let answers = requests.into_iter().map(|request| answer(&client, request, |_| Ok(())));
            for (prompt, answer) in args.prompts.iter().zip(try_join_all(answers).await?) {
                match args.connection.json {
                    true => print_json(&answer)?,
                    false => print_under(prompt, &answer)?,
                }
            }
            Ok(())
        }
    }
}

fn request(args: &Args, adapter: String, prompt: &str) -> proto::GenerateRequest {
    use proto::generate_request::Prompt;
    let (sampling, stopping) = (&args.sampling, &args.stopping);
    proto::GenerateRequest {
        adapter,
        prompt: Some(match args.raw {
            true => Prompt::Text(prompt.to_owned()),
            false => Prompt::Chat(chat(args.system.as_deref(), prompt)),
        }),
        sampling: Some(proto::Sampling {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            seed: sampling.seed,
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
    if stderr().is_terminal() || answer.finish == proto::FinishReason::ContentFiltered {
        eprintln!("[{}]", summary(&answer));
    }
    Ok(())
}

fn print_under(prompt: &str, answer: &Answer) -> Result<()> {
    writeln!(stdout(), "> {}\n{}", printable(prompt), printable(&answer.text))?;
    print_tokens(&answer.token_ids, &answer.logprobs)?;
    Ok(writeln!(stdout(), "[{}]\n", summary(answer))?)
}

/// Who answered and how fast.
fn summary(answer: &Answer) -> String {
    let version = if answer.version.is_empty() { "base" } else { &answer.version };
    let tokens = answer.usage.completion_tokens;
    let decoding = (answer.elapsed - answer.first_token).as_secs_f64();
    let rate = if tokens > 1 && decoding > 0.0 { f64::from(tokens - 1) / decoding } else { 0.0 };
    let first = answer.first_token.as_secs_f64() * 1e3;
    format!("{version}, {tokens} tokens, first after {first:.0} ms, then {rate:.1} tokens/s, {}", finish(answer.finish))
}

fn finish(reason: proto::FinishReason) -> &'static str {
    reason.as_str_name().trim_start_matches("FINISH_REASON_")
}

fn print_json(answer: &Answer) -> Result<()> {
    let logprobs: Vec<Value> = answer.logprobs.iter().map(token_json).collect();
    let value = json!({
        "adapter_version": answer.version, "text": answer.text, "token_ids": answer.token_ids, "logprobs": logprobs,
        "finish_reason": finish(answer.finish),
        "usage": {
            "prompt_tokens": answer.usage.prompt_tokens, "completion_tokens": answer.usage.completion_tokens,
            "cached_tokens": answer.usage.cached_tokens,
        },
        "first_token_seconds": answer.first_token.as_secs_f64(), "seconds": answer.elapsed.as_secs_f64(),
    });
    Ok(writeln!(stdout(), "{value}")?)
}
