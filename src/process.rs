//! A child process that is gone when its owner is: pip while a base is fetched, the quickstart's server.

use std::io::Result;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, ChildStdout, Command};

/// How long a killed process may take to be gone.
const EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// Dropping it kills the process and waits until it has ended, so that what it was writing can be removed.
#[derive(Debug)]
pub struct Owned(Child);

impl Owned {
    /// Starts a process that cannot read; its standard output is piped.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map(Self)
    }

    /// The other end of its standard output, once.
    pub fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.0.stdout.take()
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let start = Instant::now();
        // It fails where the process has ended already.
        let _ = self.0.start_kill();
        while matches!(self.0.try_wait(), Ok(None)) && start.elapsed() < EXIT_TIMEOUT {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Runs a program to its end: its exit status and what it has said on standard error.
pub async fn run(command: &mut Command) -> Result<(ExitStatus, String)> {
    let mut child = Owned(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?);
    let mut said = Vec::new();
    if let Some(mut stderr) = child.0.stderr.take() {
        stderr.read_to_end(&mut said).await?;
    }
    Ok((child.0.wait().await?, String::from_utf8_lossy(&said).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_program_says_how_it_went() {
        let (status, said) = run(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).await.unwrap();
        assert_eq!((status.code(), said.as_str()), (Some(3), "why\n"));
    }

    #[tokio::test]
    async fn no_child_outlives_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("alive");
        let script = format!("touch {}; sleep 0.4; rm {}", mark.display(), mark.display());
        let mut command = Command::new("sh");
        let work = run(command.args(["-c", &script]));
        assert!(tokio::time::timeout(Duration::from_millis(200), work).await.is_err());
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(mark.exists(), "the shell went on after its owner was gone");
    }
}
