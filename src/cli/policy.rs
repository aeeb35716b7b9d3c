//! `tenora policy`: what a tenant's answers may say.

use super::connection::Connection;
use super::{Result, show};
use crate::api::client::proto;

/// Show, replace and try a tenant's list of blocked phrases.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  tenora policy --tenant acme set \"internal use only\" \"project bluebird\"
  tenora policy --tenant acme check \"This is for internal use only.\"")]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Show the policy.
    Get,
    /// Replace all blocked phrases; none given: nothing is blocked.
    Set {
        /// The phrases, in place of all that were blocked; none lifts the policy.
        phrases: Vec<String>,
        /// Refuse if the policy has changed since it had this etag.
        #[arg(long, default_value = "", hide_default_value = true)]
        etag: String,
    },
    /// Say what the policy finds in a text.
    Check {
        /// The text.
        text: String,
    },
}

pub(super) async fn run(args: Args) -> Result<()> {
    let json = args.connection.json;
    let parent = args.connection.parent()?;
    let name = format!("{parent}/safetyPolicy");
    let client = args.connection.client().await?;
    match args.command {
        Command::Get => show::one(json, &client.get_safety_policy(proto::GetSafetyPolicyRequest { name }).await?),
        Command::Set { phrases, etag } => {
            let policy = proto::SafetyPolicy { name, blocked_phrases: phrases, etag };
            let request = proto::UpdateSafetyPolicyRequest { safety_policy: Some(policy) };
            show::one(json, &client.update_safety_policy(request).await?)
        }
        Command::Check { text } => show::one(json, &client.check_text(proto::CheckTextRequest { parent, text }).await?),
    }
}
