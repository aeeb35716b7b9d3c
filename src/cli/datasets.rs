//! `tenora datasets`: training data, sent in pieces.

use std::io::{IsTerminal as _, Write as _, stdout};
use std::path::PathBuf;

use async_stream::stream;

use super::connection::Connection;
use super::{Failure, Result, request_id, show};
use crate::api::client::{Client, proto};

/// Bytes of one message of an upload.
const PIECE: usize = 256 << 10;

/// Upload, inspect and delete training data.
///
/// A file is JSON Lines, a JSON array, or JSON objects one after another, plain or gzip; its shape is told by its content. For SFT:
/// {"messages": [{"role", "content"}...]}, ShareGPT's {"conversations"}, {"prompt", "completion"} or Alpaca's {"instruction", "input",
/// "output"}. Preferences: {"prompt", "chosen", "rejected"}, where both may be whole chats, the same with "conversations" or "instruction" as
/// the prompt, or OpenAI's {"input", "preferred_output", "non_preferred_output"}.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  tenora datasets --tenant acme upload support support.jsonl
  tenora datasets --tenant acme upload-preferences tone-pairs pairs.jsonl
  tenora datasets --tenant acme inspect support --show 3")]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Upload chat or prompt/completion records, for SFT.
    Upload(UploadArgs),
    /// Upload preference pairs, for DPO.
    UploadPreferences(UploadArgs),
    /// Show one dataset.
    Get {
        /// The dataset.
        dataset: String,
    },
    /// List the tenant's datasets.
    List,
    /// Count a dataset's tokens and what is wrong with it.
    Inspect(InspectArgs),
    /// Delete a dataset.
    Delete {
        /// The dataset.
        dataset: String,
    },
}

#[derive(Debug, clap::Args)]
struct InspectArgs {
    /// The dataset.
    dataset: String,
    /// Show so many records as the model sees them; what is learnt is marked.
    #[arg(long, value_name = "N", default_value_t = 0)]
    show: u32,
    /// Measure records by this length, in tokens [default: what training takes]
    #[arg(long, value_name = "TOKENS")]
    max_length: Option<u32>,
}

#[derive(Debug, clap::Args)]
struct UploadArgs {
    /// What to call it.
    dataset: String,
    /// A file of records.
    file: PathBuf,
    /// Check every record and keep nothing.
    #[arg(long)]
    validate_only: bool,
}

pub(super) async fn run(args: Args) -> Result<()> {
    let connection = &args.connection;
    let json = connection.json;
    let name = |given: &str| connection.name("datasets", given);
    match &args.command {
        Command::Upload(args) => run_upload(connection, args, proto::DatasetKind::Sft).await,
        Command::UploadPreferences(args) => run_upload(connection, args, proto::DatasetKind::Preferences).await,
        Command::Get { dataset } => {
            let request = proto::GetDatasetRequest { name: name(dataset)? };
            show::one(json, &connection.client().await?.get_dataset(request).await?)
        }
        Command::List => show::many(json, &list(connection).await?),
        Command::Inspect(inspect) => {
            let InspectArgs { dataset, show, max_length } = inspect;
            // 0 is how the call says that it is left to the server.
            let max_length = max_length.unwrap_or(0);
            let request = proto::InspectDatasetRequest { name: name(dataset)?, show: *show, max_length };
            print_report(json, connection.client().await?.inspect_dataset(request).await?)
        }
        Command::Delete { dataset } => {
            let name = name(dataset)?;
            connection.client().await?.delete_dataset(proto::DeleteDatasetRequest { name: name.clone() }).await?;
            show::done(json, "deleted", &name)
        }
    }
}

async fn list(connection: &Connection) -> Result<Vec<proto::Dataset>> {
    let list = connection.list(connection.parent()?, async |client, parent, page_token| {
        let page = client.list_datasets(proto::ListDatasetsRequest { parent, page_size: 0, page_token }).await?;
        Ok((page.datasets, page.next_page_token))
    });
    list.await
}

async fn run_upload(connection: &Connection, args: &UploadArgs, kind: proto::DatasetKind) -> Result<()> {
    let (parent, dataset_id) = connection.split("datasets", &args.dataset)?;
    let header =
        proto::UploadHeader { parent, dataset_id, request_id: request_id(), validate_only: args.validate_only };
    let content = std::fs::read(&args.file).map_err(Failure::at(&args.file))?;
    let sent = upload(&connection.client().await?, header, kind, content).await;
    print_upload(connection.json, sent.map_err(|failure| failure.in_file(&args.file))?)?;
    if args.validate_only {
        eprintln!("valid; nothing was kept");
    }
    Ok(())
}

fn print_upload(json: bool, mut dataset: proto::Dataset) -> Result<()> {
    if json {
        return show::one(json, &dataset);
    }
    let content = dataset.content.take();
    show::one(json, &dataset)?;
    print_content(content.as_ref())
}

fn print_report(json: bool, mut report: proto::DatasetReport) -> Result<()> {
    if json {
        return show::one(json, &report);
    }
    let (content, rendered) = (report.content.take(), std::mem::take(&mut report.rendered));
    let too_long = std::mem::take(&mut report.too_long_records);
    show::one(json, &report)?;
    print_content(content.as_ref())?;
    if !too_long.is_empty() {
        let listed: Vec<String> = too_long.iter().map(|r| format!("line {} ({} tokens)", r.line, r.tokens)).collect();
        let more = (report.too_long as usize).saturating_sub(listed.len());
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        writeln!(stdout(), "longer than {} tokens: {}{more}", report.max_length, listed.join(", "))?;
    }
    rendered.iter().try_for_each(print_rendered)
}

/// What a file was taken for, and what of it was not used.
pub(super) fn print_content(content: Option<&proto::DatasetContent>) -> Result<()> {
    let Some(content) = content else { return Ok(()) };
    let mut out = stdout().lock();
    writeln!(out, "recognised: {}: {}", show::printable(&content.format), named(&content.shapes))?;
    if !content.ignored_fields.is_empty() {
        let more = match content.more_ignored_fields {
            0 => String::new(),
            more => format!(" and {} of other names", thousands(more)),
        };
        writeln!(out, "ignored: {}{more}", named(&content.ignored_fields))?;
    }
    if content.control_token_mentions > 0 {
        let count = thousands(content.control_token_mentions);
        writeln!(out, "note: records that mention a control token, which is taken as text: {count}")?;
    }
    if content.empty_answers > 0 {
        writeln!(out, "note: records with an answer of no text: {}", thousands(content.empty_answers))?;
    }
    Ok(())
}

/// "score (24,545), source (300)".
fn named(counts: &[proto::NamedCount]) -> String {
    let one = |count: &proto::NamedCount| format!("{} ({})", show::printable(&count.name), thousands(count.count));
    counts.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// With commas.
fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    groups.join(",")
}

/// A sequence: its text with what is learnt marked, by colour on a terminal, then its ids.
fn print_rendered(sequence: &proto::RenderedSequence) -> Result<()> {
    let mut out = stdout().lock();
    let answer = if sequence.answer.is_empty() { String::new() } else { format!(", {}", sequence.answer) };
    writeln!(out, "\n--- record {} (line {}){answer}", sequence.record, sequence.line)?;
    let (begin, end) = if out.is_terminal() { ("\u{1b}[32m", "\u{1b}[0m") } else { ("[[", "]]") };
    for span in &sequence.spans {
        let text = show::printable(&span.text);
        match span.in_loss {
            true => write!(out, "{begin}{text}{end}")?,
            false => write!(out, "{text}")?,
        }
    }
    let ids = |span: &proto::RenderedSpan| {
        let ids = span.token_ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
        if span.in_loss { format!("{begin}{ids}{end}") } else { ids }
    };
    Ok(writeln!(out, "\nids: {}", sequence.spans.iter().map(ids).collect::<Vec<_>>().join(" "))?)
}

/// Sends a file in pieces, whatever of the formats it is.
pub(super) async fn upload(
    client: &Client,
    header: proto::UploadHeader,
    kind: proto::DatasetKind,
    content: Vec<u8>,
) -> Result<proto::Dataset> {
    use proto::{upload_dataset_request as sft, upload_preferences_request as preferences};
    Ok(match kind {
        proto::DatasetKind::Preferences => {
            let part = |part| proto::UploadPreferencesRequest { part: Some(part) };
            let parts = stream! {
                yield part(preferences::Part::Header(header));
                for piece in content.chunks(PIECE) { yield part(preferences::Part::Data(piece.to_vec())); }
            };
            client.upload_preferences(parts).await?
        }
        _ => {
            let part = |part| proto::UploadDatasetRequest { part: Some(part) };
            let parts = stream! {
                yield part(sft::Part::Header(header));
                for piece in content.chunks(PIECE) { yield part(sft::Part::Data(piece.to_vec())); }
            };
            client.upload_dataset(parts).await?
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_named() {
        let count = |name: &str, count| proto::NamedCount { name: name.into(), count };
        assert_eq!(named(&[count("score", 24_545), count("source", 300)]), "score (24,545), source (300)");
        assert_eq!(thousands(1_234_567), "1,234,567");
    }
}
