//! Sends a round of a load: in a closed loop, where each stream waits for its answer, or in an open one, where nobody waits.

use std::time::Duration;

use futures::future::join_all;
use tokio::time::{Instant, sleep_until};
use tokio_stream::StreamExt as _;

use super::load::Load;
use crate::api::client::{Client, proto};

/// When the next request is sent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Pace {
    /// Each of `streams` sends its next request when its last one has been answered.
    Closed { streams: u64 },
    /// `rate` requests a second arrive at random, however many are still under way.
    Open { rate: f64 },
}

/// When a round ends. Requests under way are answered to their end.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Extent {
    Requests(u64),
    Time(Duration),
}

/// An answer that came as asked.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sample {
    /// As the server counts them.
    pub prompt_tokens: u32,
    /// As the server counts them.
    pub generated_tokens: u32,
    /// From the moment the request was due to its first token.
    pub first_token: Duration,
    /// Between one token and the next.
    pub gaps: Vec<Duration>,
    /// From the moment the request was due to the end of its answer.
    pub end_to_end: Duration,
}

/// What became of one request: a sample, or what went wrong.
pub(super) type Outcome = Result<Sample, String>;

#[derive(Debug)]
pub(super) struct Round {
    pub outcomes: Vec<Outcome>,
    /// From the start to the end of the last answer.
    pub elapsed: Duration,
    /// One more than the highest index of a request.
    pub numbers: u64,
}

/// Sends the requests from number `first` on. `clients`: connections to share out.
pub(super) async fn round(clients: &[Client], load: &Load, first: u64, pace: Pace, extent: Extent) -> Round {
    let start = Instant::now();
    let client = |index: u64| &clients[index as usize % clients.len()];
    let (outcomes, numbers) = match pace {
        Pace::Closed { streams } => {
            let streams = (0..streams).map(async |stream| {
                let mut outcomes = Vec::new();
                let mut index = stream;
                while goes_on(extent, index, start.elapsed()) {
                    outcomes.push(ask(client(stream), load.request(first + index), Instant::now()).await);
                    index += streams;
                }
                (outcomes, (index + 1).saturating_sub(streams))
            });
            let (outcomes, numbers): (Vec<_>, Vec<_>) = join_all(streams).await.into_iter().unzip();
            (outcomes.into_iter().flatten().collect(), numbers.into_iter().max().unwrap_or(0))
        }
        Pace::Open { rate } => {
            let arrivals = (0..).zip(load.arrivals(first, rate));
            let requests = arrivals.take_while(|&(index, at)| goes_on(extent, index, at)).map(async |(index, at)| {
                sleep_until(start + at).await;
                ask(client(index), load.request(first + index), start + at).await
            });
            let outcomes = join_all(requests).await;
            let numbers = outcomes.len() as u64;
            (outcomes, numbers)
        }
    };
    Round { outcomes, elapsed: start.elapsed(), numbers }
}

/// Whether the round's request of this index is sent at this time.
fn goes_on(extent: Extent, index: u64, at: Duration) -> bool {
    match extent {
        Extent::Requests(count) => index < count,
        Extent::Time(time) => at < time,
    }
}

/// One request to the end of its answer. Times count from `due`, also where the request was sent a little later.
async fn ask(client: &Client, request: proto::GenerateRequest, due: Instant) -> Outcome {
    let adapter = request.adapter.clone();
    let mut parts = client.generate(request).await.map_err(|e| e.to_string())?;
    let mut version = None;
    let mut first_token = None;
    let mut last = due;
    let mut gaps = Vec::new();
    while let Some(part) = parts.next().await {
        let part = part.map_err(|e| e.to_string())?;
        let finish = part.finish_reason();
        version.get_or_insert(part.adapter_version);
        let tokens = part.token_ids.len() as u32;
        if tokens > 0 {
            let now = Instant::now();
            match first_token {
                None => first_token = Some(now - due),
                // Tokens that come together share the time since the last ones.
                Some(_) => gaps.extend(std::iter::repeat_n((now - last) / tokens, tokens as usize)),
            }
            last = now;
        }
        if let Some(usage) = part.usage {
            check(&adapter, &version.unwrap_or_default(), finish)?;
            return Ok(Sample {
                prompt_tokens: usage.prompt_tokens,
                generated_tokens: usage.completion_tokens,
                first_token: first_token.unwrap_or_else(|| due.elapsed()),
                gaps,
                end_to_end: due.elapsed(),
            });
        }
    }
    Err("an answer ended without a reason".into())
}

/// Whether it was answered by whom it was asked of, to the length that was asked for.
fn check(adapter: &str, version: &str, finish: proto::FinishReason) -> Result<(), String> {
    let of_adapter = version.strip_prefix(adapter).is_some_and(|rest| rest.starts_with("/versions/"));
    if version != adapter && (adapter.is_empty() || !of_adapter) {
        return Err(format!("{adapter:?} should have answered, but {version:?} has"));
    }
    match finish {
        proto::FinishReason::Length => Ok(()),
        other => Err(format!("an answer ended by {}", other.as_str_name())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_ends_by_number_or_by_time() {
        let second = Duration::from_secs(1);
        assert!(goes_on(Extent::Requests(3), 2, 100 * second));
        assert!(!goes_on(Extent::Requests(3), 3, Duration::ZERO));
        assert!(goes_on(Extent::Time(second), 1000, second / 2));
        assert!(!goes_on(Extent::Time(second), 0, second));
    }

    #[test]
    fn another_adapters_answer_is_a_fault() {
        let length = proto::FinishReason::Length;
        for (asked, answered, good) in [
            ("", "", true),
            ("tenants/t/adapters/a", "tenants/t/adapters/a/versions/2", true),
            ("tenants/t/adapters/a/versions/2", "tenants/t/adapters/a/versions/2", true),
            ("", "tenants/t/adapters/a/versions/2", false),
            ("tenants/t/adapters/a", "", false),
            ("tenants/t/adapters/a", "tenants/t/adapters/ab/versions/2", false),
            ("tenants/t/adapters/a/versions/2", "tenants/t/adapters/a/versions/20", false),
        ] {
            assert_eq!(check(asked, answered, length).is_ok(), good, "{asked} {answered}");
        }
        assert!(check("", "", proto::FinishReason::Cancelled).unwrap_err().contains("CANCELLED"));
    }
}
