//! `tenora tenants`: who may use the server. Needs an operator key; `get` and `usage` take the tenant's own key too.

use super::connection::{Connection, all_pages, tenant_name};
use super::{Result, request_id, show};
use crate::api::client::{FieldMask, proto};

/// Create, change, list and delete tenants; show what they have used.
///
/// Needs an operator key; `get` and `usage` take the tenant's own key too.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  tenora tenants create acme --display-name \"Acme Ltd\"
  tenora tenants update acme --weight 3
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
        #[arg(long, default_value = "", hide_default_value = true)]
        display_name: String,
        /// Its share of the engine: a tenant of weight 3 is served three times the tokens of one of weight 1, where both wait
        #[arg(long, value_name = "N", default_value_t = 1)]
        weight: u32,
    },
    /// Change a tenant's display name or weight.
    #[command(group = clap::ArgGroup::new("change").required(true).multiple(true))]
    Update {
        /// The tenant's id.
        id: String,
        /// For people.
        #[arg(long, group = "change")]
        display_name: Option<String>,
        /// Its share of the engine, 1 to 1000
        #[arg(long, value_name = "N", group = "change")]
        weight: Option<u32>,
    },
    /// Show a tenant, what it has used, and how much of its limits. The tenant's own key is enough.
    Get {
        /// The tenant's id [default: --tenant, else the tenant of the key]
        id: Option<String>,
    },
    /// List the tenants.
    List,
    /// Delete a tenant and all of its own: adapters, datasets, jobs, keys, policy.
    Delete {
        /// The tenant's id.
        id: String,
    },
    /// Show the tokens a tenant has used. The tenant's own key is enough.
    Usage {
        /// The tenant's id.
        id: String,
    },
}

pub(super) async fn run(args: Args) -> Result<()> {
    let json = args.connection.json;
    let client = args.connection.client().await?;
    match args.command {
        Command::Create { id, display_name, weight } => {
            let (request_id, weight) = (request_id(), Some(weight));
            let request = proto::CreateTenantRequest { tenant_id: id, display_name, request_id, weight };
            show::one(json, &client.create_tenant(request).await?)
        }
        Command::Update { id, display_name, weight } => {
            let given = [("display_name", display_name.is_some()), ("weight", weight.is_some())];
            let paths = given.iter().filter(|(_, given)| *given).map(|(path, _)| path.to_string()).collect();
            let tenant = proto::Tenant {
                name: tenant_name(&id),
                display_name: display_name.unwrap_or_default(),
                weight: weight.unwrap_or_default(),
                ..Default::default()
            };
            let request = proto::UpdateTenantRequest { tenant: Some(tenant), update_mask: Some(FieldMask { paths }) };
            show::one(json, &client.update_tenant(request).await?)
        }
        Command::Get { id } => {
            let name = id.map(|id| tenant_name(&id)).or_else(|| args.connection.parent().ok()).unwrap_or_default();
            show::one(json, &client.get_tenant(proto::GetTenantRequest { name }).await?)
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
