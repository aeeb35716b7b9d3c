//! The time that a client gives its call.

use std::task::Poll;
use std::time::{Duration, Instant};

use tonic::Extensions;
use tonic::codegen::http::HeaderMap;

use crate::error::{Error, Result};

/// How much earlier than its deadline a call that has not been answered ends.
const HEADWAY: Duration = Duration::from_millis(2);

/// When the client stops waiting; the edge reads it from `grpc-timeout`.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(pub Instant);

/// When the client of a call stops waiting; `None` where it waits for ever.
pub fn deadline_of(call: &Extensions) -> Option<Instant> {
    call.get::<Deadline>().map(|deadline| deadline.0)
}

/// What the work gives, or `None` where the deadline comes first.
///
/// tonic has a timer of its own for the same header and asks it right after this future; its status would be CANCELLED and without
/// details. So this one ends a little earlier, and looks at the clock after every piece of work.
pub async fn within<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Option<T> {
    let Some(deadline) = deadline else { return Some(work.await) };
    let end = deadline.checked_sub(HEADWAY).unwrap_or(deadline);
    let mut timer = std::pin::pin!(tokio::time::sleep_until(end.into()));
    let mut work = std::pin::pin!(work);
    std::future::poll_fn(|cx| {
        if Instant::now() < end
            && let Poll::Ready(done) = work.as_mut().poll(cx)
        {
            return Poll::Ready(Some(done));
        }
        if Instant::now() >= end { Poll::Ready(None) } else { timer.as_mut().poll(cx).map(|()| None) }
    })
    .await
}

/// The time that the client gives the call: at most eight digits and a unit.
pub fn timeout_of(headers: &HeaderMap) -> Result<Option<Duration>> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    let wrong = || {
        let message = "must be one to eight digits and a unit of H, M, S, m, u and n, such as 250m";
        Error::invalid_because("INVALID_TIMEOUT", "grpc-timeout", message)
    };
    let value = value.to_str().map_err(|_| wrong())?;
    let (digits, unit) = value.len().checked_sub(1).and_then(|at| value.split_at_checked(at)).ok_or_else(wrong)?;
    if digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    let n: u64 = digits.parse().map_err(|_| wrong())?;
    Ok(Some(match unit {
        "H" => Duration::from_secs(n * 3600),
        "M" => Duration::from_secs(n * 60),
        "S" => Duration::from_secs(n),
        "m" => Duration::from_millis(n),
        "u" => Duration::from_micros(n),
        "n" => Duration::from_nanos(n),
        _ => return Err(wrong()),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read() {
        let read = |value: &str| {
            let value = tonic::codegen::http::HeaderValue::from_bytes(value.as_bytes()).unwrap();
            timeout_of(&HeaderMap::from_iter([("grpc-timeout".parse().unwrap(), value)]))
        };
        assert_eq!(timeout_of(&HeaderMap::new()).unwrap(), None);
        assert_eq!(read("250m").unwrap(), Some(Duration::from_millis(250)));
        assert_eq!(read("0n").unwrap(), Some(Duration::ZERO));
        assert_eq!(read("99999999H").unwrap(), Some(Duration::from_secs(99_999_999 * 3600)));
        for wrong in ["", "m", "1", "1x", "123456789S", "-1S", "1é", "1 S"] {
            assert!(matches!(read(wrong), Err(Error::Invalid { reason: "INVALID_TIMEOUT", .. })), "{wrong:?}");
        }
    }
}
