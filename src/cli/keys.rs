//! `tenora keys`: bearer keys of tenants. Needs an operator key.

use super::connection::Connection;
use super::{Result, request_id, show};
use crate::api::client::proto;

/// Create, list and revoke a tenant's keys. Needs an operator key.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  tenora keys --tenant acme create --display-name \"web shop\"
  tenora keys --tenant acme revoke KEY")]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make a key. Its secret is printed now and never again.
    Create {
        /// For people.
        #[arg(long, default_value = "", hide_default_value = true)]
        display_name: String,
    },
    /// List the keys, without their secrets.
    List,
    /// Revoke a key. Calls that it has made end at once.
    Revoke {
        /// The key's id, as `list` shows it, or its name in full.
        #[arg(value_name = "KEY")]
        id: String,
    },
}

pub(super) async fn run(args: Args) -> Result<()> {
    let connection = &args.connection;
    let json = connection.json;
    match args.command {
        Command::Create { display_name } => {
            let request =
                proto::CreateApiKeyRequest { parent: connection.parent()?, display_name, request_id: request_id() };
            show::one(json, &connection.client().await?.create_api_key(request).await?)
        }
        Command::List => {
            let keys = connection.list(connection.parent()?, async |client, parent, page_token| {
                let page = client.list_api_keys(proto::ListApiKeysRequest { parent, page_size: 0, page_token }).await?;
                Ok((page.api_keys, page.next_page_token))
            });
            show::many(json, &keys.await?)
        }
        Command::Revoke { id } => {
            let name = connection.name("apiKeys", &id)?;
            connection.client().await?.revoke_api_key(proto::RevokeApiKeyRequest { name: name.clone() }).await?;
            show::done(json, "revoked", &name)
        }
    }
}
