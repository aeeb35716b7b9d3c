//! The command line: which commands there are and how they end. All but `serve` and `models` are thin clients of a server.

mod adapters;
mod base;
mod bench;
mod connection;
mod datasets;
mod exported;
mod generate;
mod jobs;
mod keys;
mod models;
mod peft_folder;
mod plot;
mod policy;
mod prompt;
mod quickstart;
mod score;
mod serve;
mod show;
mod tenants;
mod train;
mod watch;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use futures::future::{BoxFuture, LocalBoxFuture};

pub use models::Loading;

use crate::api::client::ClientError;
use crate::config::Config;
use crate::error::Error;

type Result<T, E = Failure> = std::result::Result<T, E>;

/// Why a command ends with status 1.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// A server has said no, or none could be reached.
    #[error(transparent)]
    Server(#[from] ClientError),
    /// Found on this side.
    #[error(transparent)]
    Local(#[from] Error),
    /// A server has said no to a file.
    #[error("{}: {source}", path.display())]
    InFile { path: PathBuf, source: ClientError },
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error("cannot read the terminal or write to it: {0}")]
    Terminal(#[from] std::io::Error),
    /// The command line asks for something that makes no sense, or what was asked for did not come about.
    #[error("{0}")]
    Other(String),
}

impl Failure {
    fn other(message: impl Into<String>) -> Self {
        Self::Other(message.into())
    }

    /// Names the file that a server has said no to.
    fn in_file(self, path: impl Into<PathBuf>) -> Self {
        match self {
            Self::Server(source) => Self::InFile { path: path.into(), source },
            other => other,
        }
    }

    /// For `map_err` where a file is read or written.
    fn at(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        |source| Self::File { path: path.into(), source }
    }
}

const EXAMPLES: &str = "\
Examples:
  tenora quickstart                      see what it does, in a temporary folder
  tenora serve                           start a server; the first start prints the operator key
  tenora tenants create acme             with TENORA_KEY=<operator key>
  tenora keys create --tenant acme       prints acme's key
  tenora train data.jsonl --adapter tone --tenant acme
  tenora generate --adapter tone --tenant acme \"How do I return a parcel?\"

Client commands take the server, key and tenant from TENORA_SERVER, TENORA_KEY and TENORA_TENANT where no option says otherwise.";

/// Trains many LoRA adapters on one frozen quantised language model and serves them from the same bytes, over gRPC.
#[derive(Debug, clap::Parser)]
#[command(name = "tenora", version, about, after_help = EXAMPLES, propagate_version = true)]
pub struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Quickstart(quickstart::Args),
    Serve(serve::Args),
    Generate(Box<generate::Args>),
    Score(score::Args),
    Base(base::Args),
    Tokenize(base::TokenizeArgs),
    Detokenize(base::DetokenizeArgs),
    Train(Box<train::Args>),
    Adapters(adapters::Args),
    Datasets(datasets::Args),
    Jobs(jobs::Args),
    Tenants(tenants::Args),
    Keys(keys::Args),
    Policy(policy::Args),
    Models(models::Args),
    Bench(Box<bench::Args>),
}

/// Serves at an address until told to stop.
pub type Server = fn(Config, SocketAddr) -> BoxFuture<'static, Result<(), Error>>;

impl CommandLine {
    /// Workers of the compute pool, where this command computes. To be made before any other thread.
    pub fn compute_threads(&self) -> Option<usize> {
        match &self.command {
            Command::Serve(args) => Some(args.threads()),
            _ => None,
        }
    }

    /// Runs the command; `server` serves until told to stop. Ctrl-c and SIGTERM end every other command at once, with its
    /// temporary files and child processes.
    pub fn run(self, server: Server) -> LocalBoxFuture<'static, ExitCode> {
        Box::pin(self.run_to_the_end(server))
    }

    async fn run_to_the_end(self, server: Server) -> ExitCode {
        let result = match self.command {
            Command::Serve(args) => match unless_stopped(args.prepare()).await {
                Some(Ok(Some((config, listen)))) => server(config, listen).await.map_err(Failure::Local),
                Some(Ok(None)) => Ok(()),
                Some(Err(failure)) => Err(failure),
                None => return stopped(),
            },
            command => match unless_stopped(command.run()).await {
                Some(result) => result,
                None => return stopped(),
            },
        };
        match result {
            Ok(()) => ExitCode::SUCCESS,
            // The reader of our output, e.g. `head`, has seen enough.
            Err(Failure::Terminal(e)) if e.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
            Err(failure) => {
                eprintln!("error: {failure}");
                ExitCode::FAILURE
            }
        }
    }
}

impl Command {
    async fn run(self) -> Result<()> {
        match self {
            Self::Quickstart(args) => quickstart::run(args).await,
            Self::Generate(args) => generate::run(*args).await,
            Self::Score(args) => score::run(args).await,
            Self::Base(args) => base::run(args).await,
            Self::Tokenize(args) => base::tokenize(args).await,
            Self::Detokenize(args) => base::detokenize(args).await,
            Self::Train(args) => train::run(*args).await,
            Self::Adapters(args) => adapters::run(args).await,
            Self::Datasets(args) => datasets::run(args).await,
            Self::Jobs(args) => jobs::run(args).await,
            Self::Tenants(args) => tenants::run(args).await,
            Self::Keys(args) => keys::run(args).await,
            Self::Policy(args) => policy::run(args).await,
            Self::Models(args) => models::run(args).await,
            Self::Bench(args) => bench::run(*args).await,
            Self::Serve(_) => unreachable!("CommandLine::run hands it to the server"),
        }
    }
}

/// The work's result, or `None` where a signal came first; the work is dropped then.
async fn unless_stopped<T>(work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        result = work => Some(result),
        () = stop_signal() => None,
    }
}

fn stopped() -> ExitCode {
    eprintln!("stopped");
    ExitCode::from(130)
}

/// Waits for ctrl-c or SIGTERM. Listens from the call on, not from the first poll: no signal in between is lost.
pub fn stop_signal() -> impl Future<Output = ()> + Send {
    use tokio::signal::unix::{SignalKind, signal};
    let signals = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()));
    async {
        match signals {
            (Ok(mut interrupt), Ok(mut terminate)) => {
                tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
            }
            // Without handlers the signals end the process, which is what they are for.
            _ => std::future::pending().await,
        }
    }
}

/// An id for a call that may be retried.
fn request_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory as _, Parser as _};

    #[test]
    fn the_command_line_is_well_formed() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn commands_are_understood() {
        for line in [
            "quickstart",
            "serve --metrics-listen localhost:9090 --metrics-by-tenant",
            "serve --listen 127.0.0.1:0 --limit max_rank=16 --limit max_queued=3 --threads 1",
            "generate --adapter a --tenant t --temperature 0.7 --stop x --stop y hello world",
            "generate --raw --json --logprobs 3",
            "generate --n 3 -n 20 --presence-penalty -0.5 --frequency-penalty 1 --logit-bias 3=-100 --min-tokens 2 hello",
            "base --json",
            "tokenize --chat --system s hello",
            "detokenize 1,2 --skip-special-tokens",
            "tenants get",
            "score --ids 1,2,3 --top 5",
            "train data.jsonl --adapter a --tenant t --rank 4 --targets q_proj,v_proj --epochs 2 --publish live",
            "train pairs --adapter a --dpo --beta 0.2 --from a",
            "adapters --tenant t list",
            "adapters list --tenant t --json",
            "adapters set-live a 3",
            "datasets upload d data.jsonl",
            "jobs watch j",
            "tenants create t --display-name T",
            "keys revoke tenants/t/apiKeys/k",
            "policy set one two",
            "models fetch",
            "models inspect base.gguf --context 512 --json",
            "models quantize base.gguf --to nf4 --output base-nf4.gguf",
            "bench --streams 16 --adapters distinct --rank 16 --rounds 5 --warm-up",
            "bench --rate 2 --duration 60 --prompt-tokens 64..512 -n 16..128 --adapters zipf --adapter-count 1000 --json",
        ] {
            let parsed = CommandLine::try_parse_from(["tenora"].into_iter().chain(line.split(' ')));
            assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
        }
    }

    /// Every command and every argument says what it is, and every example can be typed.
    #[test]
    fn help_is_whole_and_its_examples_are_understood() {
        let mut examples = 0;
        check_help(&CommandLine::command(), &mut examples);
        assert!(examples > 25, "{examples}");
    }

    fn check_help(command: &clap::Command, examples: &mut usize) {
        let name = command.get_name();
        assert!(command.get_about().is_some(), "{name} says nothing of itself");
        for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
            let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.len() > 3 && !help.starts_with('['), "{name}: {} has no help: {help:?}", argument.get_id());
        }
        let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        for line in after.lines().filter(|line| line.starts_with("  tenora")) {
            let words = words_of(line.split("   ").find(|part| part.trim().starts_with("tenora")).unwrap_or_default());
            let parsed = CommandLine::try_parse_from(&words);
            assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
            *examples += 1;
        }
        command.get_subcommands().for_each(|inner| check_help(inner, examples));
    }

    /// An argument of a command with the name of one that all have would be both at once.
    #[test]
    fn no_argument_has_the_name_of_a_global_one() {
        check_names(&CommandLine::command(), &[]);
    }

    fn check_names(command: &clap::Command, above: &[String]) {
        let ids = |global: bool| {
            let arguments = command.get_arguments().filter(move |argument| argument.is_global_set() == global);
            arguments.map(|argument| argument.get_id().to_string())
        };
        for id in ids(false) {
            assert!(!above.contains(&id), "{}: {id}", command.get_name());
        }
        let globals: Vec<_> = above.iter().cloned().chain(ids(true)).collect();
        command.get_subcommands().for_each(|inner| check_names(inner, &globals));
    }

    /// As a shell cuts a line without escapes.
    fn words_of(line: &str) -> Vec<String> {
        let (mut words, mut quoted) = (vec![String::new()], false);
        for c in line.trim().chars() {
            match c {
                '"' => quoted = !quoted,
                ' ' if !quoted => words.push(String::new()),
                c => words.last_mut().unwrap().push(c),
            }
        }
        words.retain(|word| !word.is_empty());
        words
    }

    #[test]
    fn contradictions_are_refused() {
        for line in [
            "serve --tls-cert a.pem",
            "serve --metrics-by-tenant",
            "serve --limit max_rank",
            "serve --limit no_such_limit=1",
            "serve --threads 0",
            "generate --raw --system s hello",
            "train d --adapter a --beta 0.2",
            "train d --adapter a --from a --rank 4",
            "bench --rate 2 --streams 3",
        ] {
            assert!(CommandLine::try_parse_from(["tenora"].into_iter().chain(line.split(' '))).is_err(), "{line}");
        }
    }

    #[test]
    fn threads_default_to_the_cores_for_serving_only() {
        let threads =
            |line: &str| CommandLine::parse_from(["tenora"].into_iter().chain(line.split(' '))).compute_threads();
        assert_eq!(threads("serve --threads 3"), Some(3));
        assert!(threads("serve").is_some_and(|n| n > 0));
        assert_eq!(threads("models list"), None);
    }
}
