//! Client streams: a header, then pieces. Limits how many run at once and how long each may send nothing.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Status, Streaming};

use crate::config::Limits;
use crate::error::{Error, Result};

/// The places for uploads. Clones share them.
#[derive(Debug, Clone)]
pub struct Uploads {
    places: Arc<Semaphore>,
    idle: Duration,
}

impl Uploads {
    pub fn new(limits: &Limits) -> Self {
        let places = usize::try_from(limits.max_uploads).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        Self { places: Arc::new(Semaphore::new(places)), idle: Duration::from_secs(limits.upload_idle_seconds) }
    }

    /// Takes a place until the upload is dropped.
    pub fn open<T>(&self, messages: Streaming<T>) -> Result<Incoming<T>> {
        let place = self.places.clone().try_acquire_owned().map_err(|_| Error::Exhausted {
            limit: "max_uploads",
            message: "the server has as many uploads under way as it takes; try again".into(),
            retry_after: Some(Duration::from_secs(5)),
        })?;
        Ok(Incoming { messages, idle: self.idle, _place: place })
    }
}

/// An upload under way.
#[derive(Debug)]
pub struct Incoming<T> {
    messages: Streaming<T>,
    idle: Duration,
    _place: OwnedSemaphorePermit,
}

impl<T> Incoming<T> {
    /// The next message; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<T>, Status> {
        match tokio::time::timeout(self.idle, self.messages.message()).await {
            Ok(message) => message,
            Err(_) => Err(Status::from(Error::Exhausted {
                limit: "upload_idle_seconds",
                message: format!(
                    "the upload sent nothing for {} s; send it again without a pause",
                    self.idle.as_secs()
                ),
                retry_after: None,
            })),
        }
    }
}

/// The first message was not the header, or a later one was.
pub fn misplaced_header() -> Error {
    Error::invalid_because("MISPLACED_HEADER", "header", "must be the first message of the stream, and only that")
}
