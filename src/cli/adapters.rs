//! `tenora adapters`: PEFT folders in and out, versions, the swap and the rollback.

use std::path::{Path, PathBuf};

use async_stream::stream;
use tokio_stream::StreamExt as _;

use super::connection::Connection;
use super::exported::ExportedFolder;
use super::peft_folder::PeftFolder;
use super::{Failure, Result, request_id, show};
use crate::api::client::{Client, proto};

/// Bytes of one message of an upload.
const PIECE: usize = 256 << 10;

/// Import, export, swap and delete adapters.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  tenora adapters --tenant acme import tone ./peft-folder
  tenora adapters --tenant acme versions tone
  tenora adapters --tenant acme set-live tone 1
  tenora adapters --tenant acme export tone/versions/2 ./peft-folder")]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Upload a PEFT folder (adapter_config.json, adapter_model.safetensors) as a new version. What lies beside the two files is not read.
    Import {
        /// The adapter that gets the version; made if there is none.
        adapter: String,
        /// Holds adapter_config.json and adapter_model.safetensors, or one folder that does.
        folder: PathBuf,
        #[command(flatten)]
        publish: PublishArg,
        /// Check everything and keep nothing.
        #[arg(long)]
        validate_only: bool,
    },
    /// Write a version as a PEFT folder.
    Export {
        /// ADAPTER for its live version, or ADAPTER/versions/N.
        name: String,
        /// Made if there is none; files in it are not overwritten.
        folder: PathBuf,
    },
    /// Show one adapter.
    Get {
        /// The adapter.
        adapter: String,
    },
    /// List the tenant's adapters.
    List,
    /// List an adapter's versions, newest first.
    Versions {
        /// The adapter.
        adapter: String,
    },
    /// Make a version the live one: the swap and the rollback. Answers under way finish on the version they began with.
    SetLive {
        /// The adapter.
        adapter: String,
        /// The version's number.
        version: String,
        /// Refuse if the adapter has changed since it had this etag.
        #[arg(long, default_value = "", hide_default_value = true)]
        etag: String,
    },
    /// Delete an adapter and its versions.
    Delete {
        /// The adapter.
        adapter: String,
        /// Refuse if the adapter has changed since it had this etag.
        #[arg(long, default_value = "", hide_default_value = true)]
        etag: String,
    },
}

#[derive(Debug, Clone, Copy, clap::Args)]
pub(super) struct PublishArg {
    /// Whether the new version goes live. auto: where the adapter has no live version.
    #[arg(long, value_enum, default_value = "auto")]
    publish: Publish,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Publish {
    Auto,
    Live,
    VersionOnly,
}

impl PublishArg {
    pub(super) fn proto(self) -> proto::Publish {
        match self.publish {
            Publish::Auto => proto::Publish::Unspecified,
            Publish::Live => proto::Publish::Live,
            Publish::VersionOnly => proto::Publish::VersionOnly,
        }
    }
}

pub(super) async fn run(args: Args) -> Result<()> {
    let connection = &args.connection;
    let json = connection.json;
    let name = |given: &str| connection.name("adapters", given);
    match args.command {
        Command::Import { adapter, folder, publish, validate_only } => {
            let (parent, adapter_id) = connection.split("adapters", &adapter)?;
            let publish = publish.proto() as i32;
            let header =
                proto::ImportAdapterHeader { parent, adapter_id, request_id: request_id(), validate_only, publish };
            let client = connection.client().await?;
            let version = import(&client, header, &folder).await?;
            show::one(json, &version)?;
            match validate_only {
                true => eprintln!("valid; nothing was kept"),
                false => say_whether_live(&client, &version.name).await?,
            }
            Ok(())
        }
        Command::Export { name: given, folder } => {
            let request = proto::ExportAdapterRequest { name: name(&given)? };
            let version = export(&connection.client().await?, request, &folder).await?;
            show::one(json, &version)
        }
        Command::Get { adapter } => {
            let request = proto::GetAdapterRequest { name: name(&adapter)? };
            show::one(json, &connection.client().await?.get_adapter(request).await?)
        }
        Command::List => show::many(json, &list(connection).await?),
        Command::Versions { adapter } => show::many(json, &versions(connection, name(&adapter)?).await?),
        Command::SetLive { adapter, version, etag } => {
            let name = name(&adapter)?;
            let version = if version.contains('/') { version } else { format!("{name}/versions/{version}") };
            let request = proto::SetLiveVersionRequest { name, version, etag };
            show::one(json, &connection.client().await?.set_live_version(request).await?)
        }
        Command::Delete { adapter, etag } => {
            let name = name(&adapter)?;
            let request = proto::DeleteAdapterRequest { name: name.clone(), etag };
            connection.client().await?.delete_adapter(request).await?;
            show::done(json, "deleted", &name)
        }
    }
}

async fn list(connection: &Connection) -> Result<Vec<proto::Adapter>> {
    let list = connection.list(connection.parent()?, async |client, parent, page_token| {
        let page = client.list_adapters(proto::ListAdaptersRequest { parent, page_size: 0, page_token }).await?;
        Ok((page.adapters, page.next_page_token))
    });
    list.await
}

async fn versions(connection: &Connection, parent: String) -> Result<Vec<proto::AdapterVersion>> {
    let list = connection.list(parent, async |client, parent, page_token| {
        let page = client
            .list_adapter_versions(proto::ListAdapterVersionsRequest { parent, page_size: 0, page_token })
            .await?;
        Ok((page.versions, page.next_page_token))
    });
    list.await
}

/// Sends the adapter of a folder, and says on standard error what of the folder it was.
async fn import(client: &Client, header: proto::ImportAdapterHeader, folder: &Path) -> Result<proto::AdapterVersion> {
    let read = PeftFolder::read(folder)?;
    if let Some(note) = read.note(folder) {
        eprintln!("{note}");
    }
    let version = upload(client, header, read.files).await?;
    if !version.note.is_empty() {
        eprintln!("warning: {}", version.note);
    }
    Ok(version)
}

/// Says on standard error whether requests for the adapter get this version, and the command that makes it so.
pub(super) async fn say_whether_live(client: &Client, version: &str) -> Result<()> {
    let Some((adapter, number)) = version.rsplit_once("/versions/") else { return Ok(()) };
    let live = client.get_adapter(proto::GetAdapterRequest { name: adapter.to_owned() }).await?.live_version;
    eprintln!("{}", whether_live(adapter, number, &live));
    Ok(())
}

fn whether_live(adapter: &str, number: &str, live: &str) -> String {
    if live == format!("{adapter}/versions/{number}") {
        return format!("version {number} is live: requests for {adapter} get it");
    }
    let now = match live.rsplit_once('/') {
        Some((_, other)) => format!("version {other} is"),
        None => "none is yet".to_owned(),
    };
    format!("version {number} is not live, {now}; to make it so: tenora adapters set-live {adapter} {number}")
}

/// Sends files by their names.
pub(super) async fn upload(
    client: &Client,
    header: proto::ImportAdapterHeader,
    files: Vec<(String, Vec<u8>)>,
) -> Result<proto::AdapterVersion> {
    use proto::import_adapter_request::Part;
    let part = |part| proto::ImportAdapterRequest { part: Some(part) };
    let parts = stream! {
        yield part(Part::Header(header));
        for (filename, content) in files {
            for piece in content.chunks(PIECE) {
                yield part(Part::Chunk(proto::FileChunk { filename: filename.clone(), data: piece.to_vec() }));
            }
        }
    };
    Ok(client.import_adapter(parts).await?)
}

/// Writes a version's files into `folder`; a file that is there already is not touched.
async fn export(client: &Client, request: proto::ExportAdapterRequest, folder: &Path) -> Result<proto::AdapterVersion> {
    use proto::export_adapter_response::Part;
    let mut parts = client.export_adapter(request).await?;
    let mut version = None;
    let mut files = ExportedFolder::create(folder)?;
    while let Some(part) = parts.next().await {
        match part?.part {
            Some(Part::Version(given)) => version = Some(given),
            Some(Part::Chunk(chunk)) => files.add(chunk).await?,
            None => {}
        }
    }
    version.ok_or_else(|| Failure::other("the server sent no version"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_import_says_whether_it_is_live() {
        let adapter = "tenants/acme/adapters/tone";
        assert!(whether_live(adapter, "2", &format!("{adapter}/versions/2")).starts_with("version 2 is live"));
        let not = whether_live(adapter, "12", &format!("{adapter}/versions/1"));
        assert_eq!(
            not,
            "version 12 is not live, version 1 is; to make it so: tenora adapters set-live tenants/acme/adapters/tone 12"
        );
        assert!(whether_live(adapter, "1", "").contains("none is yet"));
    }
}
