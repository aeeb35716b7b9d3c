//! Answers that hold something scarce while they are read.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use tokio::fs::File;
use tokio::io::AsyncReadExt as _;
use tokio::sync::mpsc;
use tonic::Status;

use super::Streamed;
use crate::config::Limits;
use crate::error::Error;

/// Most bytes of a file that one message of an export carries.
const EXPORT_CHUNK: u64 = 256 << 10;

/// Returns how many bytes of a file one message of an export carries.
pub fn export_chunk(limits: &Limits) -> u64 {
    (limits.max_message_bytes / 2).clamp(1, EXPORT_CHUNK)
}

/// Reads up to `size` more bytes of a file; `None` at its end.
pub async fn next_chunk(file: &mut File, name: &str, size: u64) -> Result<Option<Vec<u8>>, Error> {
    let mut data = Vec::new();
    file.take(size).read_to_end(&mut data).await.map_err(Error::at(name))?;
    Ok((!data.is_empty()).then_some(data))
}

/// Sends messages from a task of its own, which ends, and lets go of all that it holds, where the client takes none for `idle`. The client
/// is told so if it comes back.
pub fn paced<T: Send + 'static>(
    messages: impl Stream<Item = Result<T, Error>> + Send + 'static,
    idle: Duration,
) -> Streamed<T> {
    let (sender, mut receiver) = mpsc::channel(1);
    let slow = Arc::new(AtomicBool::new(false));
    let told = slow.clone();
    tokio::spawn(async move {
        let mut messages = std::pin::pin!(messages);
        while let Some(message) = messages.next().await {
            match sender.send_timeout(message, idle).await {
                Ok(()) => {}
                Err(mpsc::error::SendTimeoutError::Closed(_)) => return,
                Err(mpsc::error::SendTimeoutError::Timeout(_)) => return told.store(true, Ordering::Release),
            }
        }
    });
    Box::pin(async_stream::stream! {
        while let Some(message) = receiver.recv().await {
            yield message.map_err(Status::from);
        }
        if slow.load(Ordering::Acquire) {
            let message = format!("nothing was taken for {} s; ask again and read without a pause", idle.as_secs());
            yield Err(Error::Exhausted { limit: "export_idle_seconds", message, retry_after: None }.into());
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_reader_that_pauses_too_long_is_told_and_holds_nothing() {
        let held = Arc::new(());
        let inside = held.clone();
        let messages = futures::stream::iter(0..5).map(move |n| {
            let _ = &inside;
            Ok(n)
        });
        let mut answer = paced(messages, Duration::from_millis(50));
        assert_eq!(answer.next().await.unwrap().unwrap(), 0);
        // The place is given back, whatever the client does.
        while Arc::strong_count(&held) > 1 {
            tokio::task::yield_now().await;
        }
        let mut rest = Vec::new();
        while let Some(message) = answer.next().await {
            rest.push(message);
        }
        assert!(rest.len() < 5 && rest.pop().unwrap().unwrap_err().message().contains("export_idle_seconds"));
    }
}
