//! `tenora score`: the log-probability of every token of a text under the base or an adapter.

use std::io::{Write as _, stdout};

use serde_json::{Value, json};

use super::connection::Connection;
use super::prompt::{chat, read_stdin};
use super::show::{print_tokens, token_json, top_json, top_text};
use super::{Failure, Result};
use crate::api::client::proto;

/// Give the log-probability of every token of a text.
///
/// Line i is token i of the sequence and ln p(token i | the tokens before it); the first token has none. Without a text,
/// standard input is read.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  tenora score \"The sea is salty.\"
  tenora score --adapter tone --user \"Where is my parcel?\" --assistant \"On its way.\"
  tenora score --ids 504,2672 --top 5 --json")]
pub(super) struct Args {
    /// Texts to score, as they are: control tokens in them are recognised.
    texts: Vec<String>,
    /// Token ids to score, with commas between; may be repeated.
    #[arg(long, value_parser = parse_ids, value_name = "ID,ID...")]
    ids: Vec<Ids>,
    /// Score a chat: the user's message...
    #[arg(long, requires = "assistant")]
    user: Option<String>,
    /// ...and the answer to it...
    #[arg(long, requires = "user")]
    assistant: Option<String>,
    /// ...with this system message before.
    #[arg(long, requires = "user")]
    system: Option<String>,
    /// An adapter (its live version) or ADAPTER/versions/N [default: the base]
    #[arg(long, short)]
    adapter: Option<String>,
    /// Also print this many most likely tokens at each position.
    #[arg(long, default_value_t = 0, value_name = "N")]
    top: u32,
    /// Leave the tokens' text out: ids and log-probabilities only, for long texts.
    #[arg(long)]
    omit_token_text: bool,
    /// Higher goes first among the tenant's own requests, -100 to 100 [default: 0]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    priority: Option<i32>,
    #[command(flatten)]
    connection: Connection,
}

/// Ids as a person writes them.
#[derive(Debug, Clone)]
pub(super) struct Ids(pub Vec<u32>);

pub(super) fn parse_ids(text: &str) -> std::result::Result<Ids, String> {
    let parse = |id: &str| id.trim().parse().map_err(|_| format!("{id:?} is no token id"));
    text.split(',').map(parse).collect::<std::result::Result<_, _>>().map(Ids)
}

pub(super) async fn run(args: Args) -> Result<()> {
    let adapter = args.adapter.as_deref().map(|given| args.connection.name("adapters", given)).transpose()?;
    let inputs = inputs(&args).await?;
    let (adapter, priority) = (adapter.unwrap_or_default(), args.priority);
    let omit_token_text = args.omit_token_text;
    let request = proto::ScoreRequest { adapter, inputs, top_logprobs: args.top, priority, omit_token_text };
    let answer = args.connection.client().await?.score(request).await?;
    for (i, result) in answer.results.iter().enumerate() {
        match args.connection.json {
            true => print_json(&answer.adapter_version, result)?,
            false => print(i, &answer.adapter_version, result)?,
        }
    }
    eprintln!("[{} tokens scored]", answer.usage.unwrap_or_default().prompt_tokens);
    Ok(())
}

async fn inputs(args: &Args) -> Result<Vec<proto::ScoreInput>> {
    use proto::score_input::Sequence;
    let mut sequences: Vec<Sequence> = args.texts.iter().cloned().map(Sequence::Text).collect();
    sequences.extend(args.ids.iter().map(|ids| Sequence::TokenIds(proto::TokenIds { ids: ids.0.clone() })));
    if let (Some(user), Some(assistant)) = (&args.user, &args.assistant) {
        let mut chat = chat(args.system.as_deref(), user, None);
        chat.messages.push(proto::ChatMessage {
            role: "assistant".into(),
            content: assistant.clone(),
            ..Default::default()
        });
        sequences.push(Sequence::Chat(chat));
    }
    if sequences.is_empty() {
        sequences.push(Sequence::Text(read_stdin().await?));
    }
    Ok(sequences.into_iter().map(|sequence| proto::ScoreInput { sequence: Some(sequence) }).collect())
}

fn print(i: usize, version: &str, result: &proto::ScoreResult) -> Result<()> {
    let version = if version.is_empty() { "base" } else { version };
    let Some(scored) = result.token_ids.get(1..) else {
        return Err(Failure::other("the server scored an empty sequence"));
    };
    let sum: f64 = result.logprobs.iter().map(|token| f64::from(token.logprob)).sum();
    let mean = sum / scored.len().max(1) as f64;
    let tokens = result.token_ids.len();
    writeln!(
        stdout(),
        "sequence {}, {version}: {tokens} tokens, sum {sum:.4}, mean {mean:.4}, perplexity {:.3}",
        i + 1,
        (-mean).exp()
    )?;
    print_tokens(scored, &result.logprobs)?;
    let next: Vec<String> = result.next.iter().map(top_text).collect();
    if !next.is_empty() {
        writeln!(stdout(), "{:>8}  {:>9}  {}", "next", "", next.join(" "))?;
    }
    Ok(())
}

fn print_json(version: &str, result: &proto::ScoreResult) -> Result<()> {
    let logprobs: Vec<Value> = result.logprobs.iter().map(token_json).collect();
    let next = top_json(&result.next);
    let value =
        json!({ "adapter_version": version, "token_ids": result.token_ids, "logprobs": logprobs, "next": next });
    Ok(writeln!(stdout(), "{value}")?)
}
