//! `tenora datasets`: training data, sent in pieces.

use std::path::PathBuf;

use async_stream::stream;

use super::connection::Connection;
use super::{Failure, Result, request_id, show};
use crate::api::client::{Client, proto};

/// Bytes of one message of an upload.
const PIECE: usize = 256 << 10;

/// Upload, inspect and delete training data.
///
/// Records are JSON lines. For SFT: {"messages": [{"role", "content"}...]} or {"prompt", "completion"}. Preferences:
/// {"prompt", "chosen", "rejected"}, or OpenAI's {"input", "preferred_output", "non_preferred_output"}.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  tenora datasets --tenant acme upload support support.jsonl
  tenora datasets --tenant acme upload-preferences tone-pairs pairs.jsonl
  tenora datasets --tenant acme inspect support")]
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
    Get { dataset: String },
    /// List the tenant's datasets.
    List,
    /// Count a dataset's tokens and what is wrong with it.
    Inspect { dataset: String },
    /// Delete a dataset.
    Delete { dataset: String },
}

#[derive(Debug, clap::Args)]
struct UploadArgs {
    /// What to call it.
    dataset: String,
    /// A file of JSON lines.
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
        Command::Upload(upload) => {
            let dataset = run_upload(connection, upload, proto::DatasetKind::Sft).await?;
            show::one(json, &dataset)
        }
        Command::UploadPreferences(upload) => {
            let dataset = run_upload(connection, upload, proto::DatasetKind::Preferences).await?;
            show::one(json, &dataset)
        }
        Command::Get { dataset } => {
            let request = proto::GetDatasetRequest { name: name(dataset)? };
            show::one(json, &connection.client().await?.get_dataset(request).await?)
        }
        Command::List => show::many(json, &list(connection).await?),
        Command::Inspect { dataset } => {
            let request = proto::InspectDatasetRequest { name: name(dataset)? };
            show::one(json, &connection.client().await?.inspect_dataset(request).await?)
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

async fn run_upload(connection: &Connection, args: &UploadArgs, kind: proto::DatasetKind) -> Result<proto::Dataset> {
    let (parent, dataset_id) = connection.split("datasets", &args.dataset)?;
    let header =
        proto::UploadHeader { parent, dataset_id, request_id: request_id(), validate_only: args.validate_only };
    let content = std::fs::read(&args.file).map_err(Failure::at(&args.file))?;
    upload(&connection.client().await?, header, kind, content).await
}

/// Sends JSON lines in pieces.
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
