//! Client streams: a header, then pieces. Limits how many run at once and how long each may send nothing.

use std::time::Duration;

use tonic::{Extensions, Status, Streaming};

use super::auth::caller_of;
use super::places::{Place, Places};
use crate::config::Limits;
use crate::error::{Error, Result};
use crate::ids::TenantId;

/// The places for uploads. Clones share them.
#[derive(Debug, Clone)]
pub struct Uploads {
    places: Places,
    idle: Duration,
}

impl Uploads {
    pub fn new(places: Places, limits: &Limits) -> Self {
        Self { places, idle: Duration::from_secs(limits.upload_idle_seconds) }
    }

    /// Returns how many uploads of a tenant are under way.
    pub fn held_by(&self, tenant: &TenantId) -> u64 {
        self.places.held_by(tenant)
    }

    /// Takes a place until the upload is dropped.
    pub fn open<T>(&self, call: &Extensions, messages: Streaming<T>) -> Result<Incoming<T>> {
        let place = self.places.take(caller_of(call)?)?;
        Ok(Incoming { messages, idle: self.idle, place })
    }
}

/// An upload under way.
#[derive(Debug)]
pub struct Incoming<T> {
    messages: Streaming<T>,
    idle: Duration,
    place: Place,
}

impl<T> Incoming<T> {
    /// The place alone, for work that goes on after the stream.
    pub fn into_place(self) -> Place {
        self.place
    }

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
