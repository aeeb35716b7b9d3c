//! `tenora bench`: sends a load to a running server and reports how fast it was answered.
//!
//! [`load`] says what is sent, [`adapters`] makes the adapters it asks for, [`drive`] sends it, [`report`] sums up.

mod adapters;
mod drive;
mod load;
mod report;

use std::io::{Write as _, stdout};
use std::time::Duration;

use serde_json::{Value, json};

use super::connection::Connection;
use super::{Failure, Result};
use crate::api::client::Client;
use crate::request::Target;
use drive::{Extent, Pace, Round};
use load::{Choice, Length, Load, Spread, Text};
use report::Figures;

/// Requests that go over one connection at once: fewer than the limit `max_streams_per_connection`.
const CALLS_PER_CONNECTION: u64 = 64;

/// Connections of an open loop, in which nobody knows how many requests are under way at once.
const OPEN_CONNECTIONS: u64 = 16;

/// Measure a server under load: throughput, time to first token, time between tokens, end-to-end latency.
///
/// Answers are greedy and go on past the end of turn, so that each has the length that was asked for. Every prompt is fresh from its first token
/// on, unless --shared-prefix says otherwise. Tokens are counted by the server. Times run from the moment a request is due.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  tenora bench --streams 16 --prompt-tokens 116 --max-tokens 64 --rounds 5
  tenora bench --streams 16 --adapters distinct --rank 16 --tenant acme
  tenora bench --rate 2 --duration 60 --prompt-tokens 64..512 --max-tokens 16..128
  tenora bench --streams 8 --requests 400 --adapters zipf --adapter-count 1000 --rank 8 --targets q_proj,v_proj --tenant acme
  tenora bench --rounds 2 --prompt-tokens 420 --shared-prefix 400 --max-tokens 1

Adapters bench-rR-TARGETS-0, -1, ... with small random weights are imported under the tenant where they are missing, and left there.")]
pub(super) struct Args {
    #[command(flatten)]
    pace: PaceArgs,
    #[command(flatten)]
    requests: RequestArgs,
    #[command(flatten)]
    adapters: AdapterArgs,
    /// Repeat, and report the median of each figure.
    #[arg(long, default_value = "1", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Send one more round before, and do not count it.
    #[arg(long)]
    warm_up: bool,
    /// Everything random is a function of it [default: drawn, so that no two runs send the same prompts]
    #[arg(long)]
    seed: Option<u64>,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Pace")]
struct PaceArgs {
    /// Closed loop: so many requests are under way at any time.
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u64).range(1..=1024))]
    streams: u64,
    /// Open loop: so many requests a second arrive, at random (a Poisson process), whether or not others have been answered.
    #[arg(long, value_name = "PER_SECOND", conflicts_with = "streams", value_parser = positive)]
    rate: Option<f64>,
    /// Requests of a round [default: one a stream]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    requests: Option<u64>,
    /// Send requests for so long; those under way are answered to their end.
    #[arg(long, value_name = "SECONDS", conflicts_with = "requests", value_parser = positive)]
    duration: Option<f64>,
}

#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Requests")]
struct RequestArgs {
    /// Tokens of a prompt, a number or a range such as 64..128 to draw from. The prompt is random ids.
    #[arg(long, value_name = "N|A..B", default_value = "128")]
    prompt_tokens: Length,
    /// Tokens of an answer, a number or a range to draw from.
    #[arg(long, short = 'n', value_name = "N|A..B", default_value = "64")]
    max_tokens: Length,
    /// Send this text behind a fresh number, in place of random ids.
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["prompt_tokens", "shared_prefix"])]
    prompt: Option<String>,
    /// All prompts begin with the same so many tokens.
    #[arg(long, value_name = "N", default_value = "0")]
    shared_prefix: u32,
}

#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Adapters")]
struct AdapterArgs {
    /// How the requests spread over adapters.
    #[arg(long, value_enum, value_name = "SPREAD", default_value = "none")]
    adapters: Spread,
    /// How many adapters there are [default: one a stream; with --rate 16]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    adapter_count: Option<u32>,
    /// The exponent s of --adapters zipf.
    #[arg(long, value_name = "S", default_value = "1", value_parser = positive)]
    zipf_s: f64,
    /// Rank of adapters to be made.
    #[arg(long, default_value = "16", value_parser = clap::value_parser!(u32).range(1..))]
    rank: u32,
    /// The base's linear layers to adapt, such as q_proj,v_proj [default: all]
    #[arg(long, alias = "target-modules", value_delimiter = ',', value_name = "MODULE,...", value_parser = target)]
    targets: Vec<Target>,
    /// Take the adapters PREFIX-0, PREFIX-1, ... [default: from rank and targets, e.g. bench-r8-q-v]
    #[arg(long, value_name = "PREFIX")]
    adapter_prefix: Option<String>,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if number > 0.0 && f64::is_finite(number) => Ok(number),
        _ => Err("must be a number above 0".into()),
    }
}

fn target(text: &str) -> Result<Target, String> {
    let names = Target::ALL.map(Target::name).join(", ");
    Target::from_name(text).ok_or_else(|| format!("must be one of {names}"))
}

pub(super) async fn run(args: Args) -> Result<()> {
    let (pace, extent) = args.pace.read()?;
    let clients = connect(&args.connection, pace).await?;
    let load = args.load(&clients[0], pace).await?;
    let rounds = send(&args, &clients, &load, pace, extent).await?;
    let figures: Vec<Figures> = rounds.iter().map(Figures::of).collect();
    match args.connection.json {
        true => writeln!(stdout(), "{}", to_json(&load, &rounds, &figures))?,
        false => print(&load, &rounds, &figures)?,
    }
    let failed = |round: &Round| round.outcomes.iter().all(Result::is_err);
    match rounds.iter().any(failed) {
        true => Err(Failure::other("no request of a round was answered; the figures mean nothing")),
        false => Ok(()),
    }
}

impl PaceArgs {
    fn read(&self) -> Result<(Pace, Extent)> {
        let pace = match self.rate {
            Some(rate) => Pace::Open { rate },
            None => Pace::Closed { streams: self.streams },
        };
        let extent = match (self.requests, self.duration, pace) {
            (Some(requests), ..) => Extent::Requests(requests),
            (None, Some(seconds), _) => Extent::Time(Duration::from_secs_f64(seconds)),
            (None, None, Pace::Closed { streams }) => Extent::Requests(streams),
            (None, None, Pace::Open { .. }) => {
                return Err(Failure::other("for how long? give --requests or --duration beside --rate"));
            }
        };
        Ok((pace, extent))
    }
}

impl Args {
    async fn load(&self, client: &Client, pace: Pace) -> Result<Load> {
        let AdapterArgs { adapters: spread, zipf_s, rank, .. } = self.adapters;
        let count = match (spread, self.adapters.adapter_count, pace) {
            (Spread::None, ..) => 0,
            (Spread::Identical, ..) => 1,
            (_, Some(count), _) => count as usize,
            (_, None, Pace::Closed { streams }) => streams as usize,
            (_, None, Pace::Open { .. }) => 16,
        };
        let mut targets = self.adapters.targets.clone();
        targets.sort();
        targets.dedup();
        let kind = adapters::Kind { rank, targets };
        let prefix = self.adapters.adapter_prefix.clone().unwrap_or_else(|| kind.prefix());
        let adapters = match count {
            0 => Vec::new(),
            _ => {
                let parent = self.connection.parent()?;
                adapters::ensure(client, &parent, &prefix, count, &kind).await?
            }
        };
        let RequestArgs { prompt_tokens: length, max_tokens, shared_prefix: shared, .. } = self.requests;
        Ok(Load {
            seed: self.seed.unwrap_or_else(|| u64::from(rand::random::<u32>())),
            text: self.requests.prompt.clone().map_or(Text::Ids { length, shared }, Text::Given),
            max_tokens,
            choice: Choice::new(spread, count, zipf_s),
            adapters,
        })
    }
}

/// As many connections as the requests under way need.
async fn connect(connection: &Connection, pace: Pace) -> Result<Vec<Client>> {
    let count = match pace {
        Pace::Closed { streams } => streams.div_ceil(CALLS_PER_CONNECTION),
        Pace::Open { .. } => OPEN_CONNECTIONS,
    };
    let mut clients = Vec::new();
    for _ in 0..count {
        clients.push(connection.client().await?);
    }
    Ok(clients)
}

/// All rounds, one after the other. No two requests have the same number.
async fn send(args: &Args, clients: &[Client], load: &Load, pace: Pace, extent: Extent) -> Result<Vec<Round>> {
    let mut next = 0;
    let mut rounds = Vec::new();
    for number in u32::from(!args.warm_up)..=args.rounds {
        let round = drive::round(clients, load, next, pace, extent).await;
        next += round.numbers;
        if !args.connection.json {
            let name = if number == 0 { "warm-up".into() } else { format!("round {number}") };
            writeln!(stdout(), "{name}: {}", Figures::of(&round).line())?;
        }
        if number > 0 {
            rounds.push(round);
        }
    }
    Ok(rounds)
}

fn print(load: &Load, rounds: &[Round], figures: &[Figures]) -> Result<()> {
    let mut out = stdout().lock();
    if rounds.len() > 1 {
        writeln!(out, "\nmedians of {} rounds (seed {})", rounds.len(), load.seed)?;
    } else {
        writeln!(out, "\none round (seed {})", load.seed)?;
    }
    write!(out, "{}{}", Figures::median(figures).table(), report::histograms(rounds))?;
    for (fault, count) in report::faults(rounds) {
        writeln!(out, "\n{count} failed: {fault}")?;
    }
    Ok(())
}

fn to_json(load: &Load, rounds: &[Round], figures: &[Figures]) -> Value {
    let faults = report::faults(rounds).into_iter().map(|(fault, count)| json!({ "error": fault, "count": count }));
    json!({
        "seed": load.seed, "median": Figures::median(figures), "rounds": figures,
        "errors": faults.collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn pace(line: &str) -> Result<(Pace, Extent)> {
        Line::try_parse_from(["bench"].into_iter().chain(line.split_whitespace()))
            .map_err(|e| Failure::other(e.to_string()))?
            .args
            .pace
            .read()
    }

    #[test]
    fn paces_are_understood() {
        let second = Extent::Time(Duration::from_secs(1));
        for (line, want) in [
            ("", (Pace::Closed { streams: 1 }, Extent::Requests(1))),
            ("--streams 16", (Pace::Closed { streams: 16 }, Extent::Requests(16))),
            ("--streams 2 --requests 9", (Pace::Closed { streams: 2 }, Extent::Requests(9))),
            ("--rate 2.5 --duration 1", (Pace::Open { rate: 2.5 }, second)),
        ] {
            assert_eq!(pace(line).unwrap(), want, "{line}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "--rate 2",
            "--rate 0 --duration 1",
            "--rate 1 --streams 2 --requests 3",
            "--requests 1 --duration 1",
            "--streams 0",
            "--prompt-tokens 5..2",
            "--prompt hello --prompt-tokens 3",
            "--targets q_proj,x",
            "--adapters some",
        ] {
            assert!(pace(line).is_err(), "{line}");
        }
    }
}
