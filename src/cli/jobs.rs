//! `tenora jobs`: training jobs after they have been started.

use std::path::{Path, PathBuf};

use tokio_stream::StreamExt as _;

use super::connection::Connection;
use super::exported::ExportedFolder;
use super::{Failure, Result, show, watch};
use crate::api::client::{Client, proto};

/// Show, watch, cancel, resume, export and delete training jobs.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  tenora jobs --tenant acme list
  tenora jobs watch tenants/acme/trainingJobs/JOB
  tenora jobs --tenant acme cancel JOB
  tenora jobs --tenant acme export JOB ./model-folder
  tenora jobs --tenant acme export JOB ./model-folder --format gguf")]
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
    /// Write the model that a full fine-tuning has made into a folder, in float32.
    Export {
        /// The job: its id, or its name in full.
        job: String,
        /// Made if there is none; files in it are not overwritten.
        folder: PathBuf,
        /// As what.
        #[arg(long, value_enum, default_value = "hf")]
        format: Format,
    },
    /// Delete a job that has ended or is interrupted, with its events and the model it made; its version stays.
    Delete {
        /// The job: its id, or its name in full.
        job: String,
    },
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Format {
    /// A Hugging Face folder: config.json, safetensors.
    Hf,
    /// One GGUF file with the base's own tokenizer, where the base is one.
    Gguf,
}

impl From<Format> for proto::ModelFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Hf => Self::HuggingFace,
            Format::Gguf => Self::Gguf,
        }
    }
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
        Command::Export { job, folder, format } => {
            let format = proto::ModelFormat::from(format).into();
            let request = proto::ExportTrainedModelRequest { name: name(&job)?, format };
            show::one(json, &export(&connection.client().await?, request, &folder).await?)
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

/// Writes a model's files into `folder`.
async fn export(
    client: &Client,
    request: proto::ExportTrainedModelRequest,
    folder: &Path,
) -> Result<proto::TrainingJob> {
    use proto::export_trained_model_response::Part;
    let mut parts = client.export_trained_model(request).await?;
    let (mut job, mut files) = (None, ExportedFolder::create(folder)?);
    while let Some(part) = parts.next().await {
        match part?.part {
            Some(Part::Job(given)) => job = Some(given),
            Some(Part::Chunk(chunk)) => files.add(chunk).await?,
            None => {}
        }
    }
    job.ok_or_else(|| Failure::other("the server sent no job"))
}

async fn list(connection: &Connection) -> Result<Vec<proto::TrainingJob>> {
    let list = connection.list(connection.parent()?, async |client, parent, page_token| {
        let page =
            client.list_training_jobs(proto::ListTrainingJobsRequest { parent, page_size: 0, page_token }).await?;
        Ok((page.training_jobs, page.next_page_token))
    });
    list.await
}
