//! Client streams: a header, then pieces. Limits how many run at once, how little each may send, and how long it may take: whoever holds a
//! place uses it.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tonic::{Extensions, Status, Streaming};

use super::auth::caller_of;
use super::places::{Place, Places};
use super::proto as pb;
use crate::config::Limits;
use crate::error::{Error, Result};
use crate::ids::TenantId;

/// The places for uploads. Clones share them.
#[derive(Debug, Clone)]
pub struct Uploads {
    places: Places,
    idle: Duration,
    /// Bytes that each must send in `idle`.
    least: u64,
    longest: Duration,
}

impl Uploads {
    pub fn new(places: Places, limits: &Limits) -> Self {
        let least = limits.upload_min_bytes_per_second.saturating_mul(limits.upload_idle_seconds);
        let (idle, longest) = (limits.upload_idle_seconds, limits.upload_seconds);
        Self { places, idle: Duration::from_secs(idle), least, longest: Duration::from_secs(longest) }
    }

    /// Returns how many uploads of a tenant are under way.
    pub fn held_by(&self, tenant: &TenantId) -> u64 {
        self.places.held_by(tenant)
    }

    /// Takes a place until the upload is dropped.
    pub fn open<T>(&self, call: &Extensions, messages: Streaming<T>) -> Result<Incoming<T>> {
        let place = self.places.take(caller_of(call)?)?;
        let begun = Instant::now();
        let (uploads, sent) = (self.clone(), 0);
        Ok(Incoming { messages, place, due: begun + self.idle, end: begun + self.longest, sent, uploads })
    }
}

/// An upload under way.
#[derive(Debug)]
pub struct Incoming<T> {
    messages: Streaming<T>,
    place: Place,
    uploads: Uploads,
    /// When as much must have come as is due in `idle`; each time it has, this begins again.
    due: Instant,
    /// Bytes since then.
    sent: u64,
    end: Instant,
}

/// A message of an upload.
pub trait Piece {
    /// Bytes of data in it: what brings the upload forward. Names, headers and empty messages do not.
    fn data_bytes(&self) -> usize;
}

impl Piece for pb::ImportAdapterRequest {
    fn data_bytes(&self) -> usize {
        match &self.part {
            Some(pb::import_adapter_request::Part::Chunk(chunk)) => chunk.data.len(),
            _ => 0,
        }
    }
}

impl Piece for pb::UploadDatasetRequest {
    fn data_bytes(&self) -> usize {
        match &self.part {
            Some(pb::upload_dataset_request::Part::Data(data)) => data.len(),
            _ => 0,
        }
    }
}

impl Piece for pb::UploadPreferencesRequest {
    fn data_bytes(&self) -> usize {
        use pb::upload_preferences_request::Part;
        match &self.part {
            Some(Part::Data(data)) => data.len(),
            Some(Part::Pair(pair)) => prost::Message::encoded_len(pair),
            _ => 0,
        }
    }
}

impl<T: Piece> Incoming<T> {
    /// The place alone, for work that goes on after the stream.
    pub fn into_place(self) -> Place {
        self.place
    }

    /// The next message; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<T>, Status> {
        if Instant::now() >= self.due.min(self.end) {
            // Messages without data come as fast as they like.
            return Err(self.too_slow().into());
        }
        let Ok(message) = timeout_at(self.due.min(self.end), self.messages.message()).await else {
            return Err(self.too_slow().into());
        };
        let message = message?;
        self.sent += message.as_ref().map_or(0, |message| message.data_bytes() as u64);
        if self.sent >= self.uploads.least.max(1) {
            self.sent = 0;
            self.due = Instant::now() + self.uploads.idle;
        }
        Ok(message)
    }

    fn too_slow(&self) -> Error {
        let idle = self.uploads.idle.as_secs();
        let (limit, message) = if Instant::now() >= self.end {
            let longest = self.uploads.longest.as_secs();
            ("upload_seconds", format!("the upload took more than {longest} s; send it faster, or in parts"))
        } else if self.sent == 0 {
            ("upload_idle_seconds", format!("the upload sent no data for {idle} s; send it again without a pause"))
        } else {
            let (sent, least) = (self.sent, self.uploads.least);
            let message = format!("the upload sent {sent} bytes in {idle} s, less than {least}; send it faster");
            ("upload_min_bytes_per_second", message)
        };
        Error::Exhausted { limit, message, retry_after: None }
    }
}

/// The first message was not the header, or a later one was.
pub fn misplaced_header() -> Error {
    Error::invalid_because("MISPLACED_HEADER", "header", "must be the first message of the stream, and only that")
}
