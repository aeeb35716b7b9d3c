//! `tenora tenants`: who may use the server. Needs an operator key; `usage` takes the tenant's own key too.

use super::connection::{Connection, all_pages, tenant_name};
use super::{Result, request_id, show};
use crate::api::client::proto;

/// Create, list and delete tenants; show what they have used.
///
/// Needs an operator key; `usage` takes the tenant's own key too.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  tenora tenants create acme --display-name \"Acme Ltd\"
  tenora tenants usage acme")]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make a tenant.
    Create {
        /// Lower-case letters, digits and dashes.
        id: String,
        /// For people.
        #[arg(long, default_value = "")]
        display_name: String,
    },
    /// List the tenants.
    List,
    /// Delete a tenant and all of its own: adapters, datasets, jobs, keys, policy.
    Delete { id: String },
    /// Show the tokens a tenant has used. The tenant's own key is enough.
    Usage { id: String },
}

pub(super) async fn run(args: Args) -> Result<()> {
    let json = args.connection.json;
    let client = args.connection.client().await?;
    match args.command {
        Command::Create { id, display_name } => {
            let request = proto::CreateTenantRequest { tenant_id: id, display_name, request_id: request_id() };
            show::one(json, &client.create_tenant(request).await?)
        }
        Command::List => {
            let tenants = all_pages(async |page_token| {
                let page = client.list_tenants(proto::ListTenantsRequest { page_size: 0, page_token }).await?;
                Ok((page.tenants, page.next_page_token))
            });
            show::many(json, &tenants.await?)
        }
        Command::Delete { id } => {
            let name = tenant_name(&id);
            client.delete_tenant(proto::DeleteTenantRequest { name: name.clone() }).await?;
            show::done(json, "deleted", &name)
        }
        Command::Usage { id } => {
            show::one(json, &client.get_usage(proto::GetUsageRequest { name: tenant_name(&id) }).await?)
        }
    }
}
