//! `tenora models quantize`: a base quantised once, into a file that is served like any other.

use std::fs::{File, Permissions};
use std::io::{BufWriter, Write as _, stdout};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::{Failure, Loading, Result, fetch, inspect};
use crate::bases;
use crate::weights::{Outline, Quantised};
use crate::work::blocking;

/// Quantise a base into one file, which `tenora serve --base FILE` takes like any other.
///
/// The file holds what `serve --quantize` would hold in memory, with the tokenizer and the chat template, and serves without the source. What
/// was trained on the one serves on the other.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  tenora models quantize --output smollm2-nf4.gguf
  tenora models quantize ./Qwen2.5-0.5B-Instruct --to nf4 --output qwen-nf4.gguf")]
pub(super) struct Args {
    /// Which base.
    #[arg(env = "TENORA_BASE", default_value = bases::DEFAULT)]
    spec: String,
    /// The format, as of `serve --quantize`: nf4 takes the linear layers of blocks of any base, with double quantisation, as QLoRA does; q8_0,
    /// q4_k and so on take matrices of floats.
    #[arg(long, default_value = "nf4", value_name = "FORMAT")]
    to: String,
    /// The file to write; there must be none yet.
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
}

pub(super) async fn run(Args { spec, to, output }: Args) -> Result<()> {
    if output.symlink_metadata().is_ok() {
        return Err(Failure::other(format!("{} exists; give another name, or remove it first", output.display())));
    }
    let folder = match output.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    // Here, and not where it is written: what is stopped leaves nothing.
    let mut named = tempfile::Builder::new();
    named.prefix(".quantize-").suffix(".partial").permissions(Permissions::from_mode(0o666));
    let part = named.tempfile_in(&folder).map_err(Failure::at(&folder))?;
    let source = fetch(&spec).await?;
    let mut loading = Loading::default();
    let read = move || Quantised::read(&source, &to, &mut |done, total| loading.show(done, total));
    let quantised = blocking(read).await?;
    let file = part.reopen().map_err(Failure::at(&output))?;
    let written = tokio::task::spawn_blocking(move || write(&quantised, file)).await;
    written.map_err(|e| Failure::other(e.to_string()))?.map_err(Failure::at(&output))?;
    let outline = Outline::read(part.path())?;
    if let Some(problem) = outline.problems.first() {
        return Err(Failure::other(format!("what was written can't be served: {problem}; nothing was kept")));
    }
    keep(part, &output, &folder)?;
    let (bytes, tensors) = (inspect::megabytes(outline.file_bytes), inspect::formats(&outline));
    Ok(writeln!(stdout(), "{}  {bytes}: {tensors}", output.display())?)
}

fn write(quantised: &Quantised, file: File) -> std::io::Result<()> {
    let mut file = BufWriter::new(file);
    quantised.write(&mut file)?;
    file.into_inner()?.sync_all()
}

/// Gives what is written its name, which nothing has got meanwhile.
fn keep(part: NamedTempFile, output: &Path, folder: &Path) -> Result<()> {
    part.persist_noclobber(output).map_err(|e| Failure::at(output)(e.error))?;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Failure::at(folder))
}
