//! `tenora jobs`: training jobs after they have been started.

use super::connection::Connection;
use super::{Result, show, watch};
use crate::api::client::proto;

/// Show, watch, cancel, resume and delete training jobs.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  tenora jobs --tenant acme list
  tenora jobs watch tenants/acme/trainingJobs/JOB
  tenora jobs --tenant acme cancel JOB")]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Show one job.
    Get {
        /// The job: its id, or its name in full.
        job: String,
    },
    /// List the tenant's jobs, newest first.
    List,
    /// Follow a job to its end: progress, then a plot of the loss.
    Watch {
        /// The job: its id, or its name in full.
        job: String,
    },
    /// Cancel a job; nothing is published.
    Cancel {
        /// The job: its id, or its name in full.
        job: String,
    },
    /// Queue an interrupted job again: it publishes what it has saved, or starts over.
    Resume {
        /// The job: its id, or its name in full.
        job: String,
    },
    /// Delete a job that has ended or is interrupted, with its events; its version stays.
    Delete {
        /// The job: its id, or its name in full.
        job: String,
    },
}

pub(super) async fn run(args: Args) -> Result<()> {
    let connection = &args.connection;
    let json = connection.json;
    let name = |given: &str| connection.name("trainingJobs", given);
    match args.command {
        Command::Get { job } => {
            let request = proto::GetTrainingJobRequest { name: name(&job)? };
            show::one(json, &connection.client().await?.get_training_job(request).await?)
        }
        Command::List => show::many(json, &list(connection).await?),
        Command::Watch { job } => {
            let name = name(&job)?;
            watch::to_the_end(&connection.client().await?, &name, json).await
        }
        Command::Cancel { job } => {
            let request = proto::CancelTrainingJobRequest { name: name(&job)? };
            show::one(json, &connection.client().await?.cancel_training_job(request).await?)
        }
        Command::Resume { job } => {
            let request = proto::ResumeTrainingJobRequest { name: name(&job)? };
            show::one(json, &connection.client().await?.resume_training_job(request).await?)
        }
        Command::Delete { job } => {
            let name = name(&job)?;
            connection
                .client()
                .await?
                .delete_training_job(proto::DeleteTrainingJobRequest { name: name.clone() })
                .await?;
            show::done(json, "deleted", &name)
        }
    }
}

async fn list(connection: &Connection) -> Result<Vec<proto::TrainingJob>> {
    let list = connection.list(connection.parent()?, async |client, parent, page_token| {
        let page =
            client.list_training_jobs(proto::ListTrainingJobsRequest { parent, page_size: 0, page_token }).await?;
        Ok((page.training_jobs, page.next_page_token))
    });
    list.await
}
