//! `tenora base`, `tokenize` and `detokenize`: what a server runs, and its tokenizer.

use std::io::{Write as _, stdout};

use serde_json::{Value, json};

use super::connection::Connection;
use super::prompt::{chat, read_stdin};
use super::score::{Ids, parse_ids};
use super::show::printable;
use super::{Result, show};
use crate::api::client::proto;

/// Show the base that a server runs: name, digest, context, vocabulary, chat template, end tokens and limits.
///
/// Any key may ask. `tenora models` is about the bases on this machine's disk.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  tenora base\n  tenora base --json")]
pub(super) struct Args {
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn run(args: Args) -> Result<()> {
    let base = args.connection.client().await?.get_base(proto::GetBaseRequest {}).await?;
    show::one(args.connection.json, &base)
}

/// Give the token ids of a text as the server's base sees it.
///
/// Line i is token i: its id and its text. Without a text, standard input is read.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  tenora tokenize \"The sea is salty.\"
  tenora tokenize --chat --system \"Be brief.\" \"Why is the sea salty?\"")]
pub(super) struct TokenizeArgs {
    /// The text, as it is: control tokens in it are recognised.
    text: Option<String>,
    /// Take the text as a user's message and apply the chat template.
    #[arg(long)]
    chat: bool,
    /// A system message before it.
    #[arg(long, requires = "chat")]
    system: Option<String>,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn tokenize(args: TokenizeArgs) -> Result<()> {
    use proto::tokenize_request::Input;
    let text = match args.text {
        Some(text) => text,
        None => read_stdin().await?,
    };
    let input = match args.chat {
        true => Input::Chat(chat(args.system.as_deref(), &text, None)),
        false => Input::Text(text),
    };
    let request = proto::TokenizeRequest { input: Some(input), add_generation_prompt: None };
    let answer = args.connection.client().await?.tokenize(request).await?;
    if args.connection.json {
        let value = json!({ "token_ids": answer.token_ids, "tokens": tokens_json(&answer.tokens) });
        return Ok(writeln!(stdout(), "{value}")?);
    }
    for token in &answer.tokens {
        writeln!(stdout(), "{:>8}  {:?}", token.id, token.text)?;
    }
    eprintln!("[{} tokens]", answer.token_ids.len());
    Ok(())
}

/// Give the text of token ids.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  tenora detokenize 504,2672,314")]
pub(super) struct DetokenizeArgs {
    /// The ids, with commas between.
    #[arg(value_parser = parse_ids, value_name = "ID,ID...")]
    ids: Ids,
    /// Leave control tokens out.
    #[arg(long)]
    skip_special_tokens: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn detokenize(args: DetokenizeArgs) -> Result<()> {
    let request = proto::DetokenizeRequest { token_ids: args.ids.0, skip_special_tokens: args.skip_special_tokens };
    let answer = args.connection.client().await?.detokenize(request).await?;
    let line = match args.connection.json {
        true => json!({ "text": answer.text, "tokens": tokens_json(&answer.tokens) }).to_string(),
        false => printable(&answer.text),
    };
    Ok(writeln!(stdout(), "{line}")?)
}

fn tokens_json(tokens: &[proto::Token]) -> Vec<Value> {
    let one = |t: &proto::Token| json!({ "id": t.id, "text": t.text, "bytes": t.bytes, "control": t.control });
    tokens.iter().map(one).collect()
}
