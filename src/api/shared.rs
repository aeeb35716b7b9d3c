//! What the services stand on.

use std::sync::Arc;

use super::auth::Auth;
use super::edge::Calls;
use super::places::{Places, WorkPlaces};
use super::uploads::Uploads;
use crate::config::Limits;
use crate::data;
use crate::error::Result;
use crate::hub::Hub;
use crate::ids::DatasetName;
use crate::ids::Digest;
use crate::memory::{Bulk, Memory};
use crate::safety::Guard;
use crate::store::Store;
use crate::text::Text;
use crate::train::Trainer;

/// The inside of a server, put together by `app`.
#[derive(Debug, Clone)]
pub struct Parts {
    /// The catalogue and the blobs.
    pub store: Store,
    /// The adapters' versions in memory.
    pub hub: Arc<Hub>,
    /// The way to the engine.
    pub guard: Guard,
    /// The training jobs.
    pub trainer: Trainer,
    /// The base's tokenizer and template.
    pub text: Arc<Text>,
    /// Of the base's file, without the ending.
    pub base_name: String,
    /// Of the base's file.
    pub base_digest: Digest,
    /// What the base's file calls its architecture.
    pub architecture: &'static str,
    /// The bytes that requests, imports and reads may take together.
    pub memory: Arc<Memory>,
    /// The places for calls and for the work behind them.
    pub places: WorkPlaces,
    /// The base's, in tokens.
    pub context_length: usize,
    /// The limits that this server was started with.
    pub limits: Limits,
}

/// What the handlers share.
pub struct Shared {
    pub parts: Parts,
    pub auth: Auth,
    pub calls: Calls,
    pub uploads: Uploads,
    /// For reading whole datasets and adapters.
    pub reads: Places,
}

impl Shared {
    /// Waits for the memory to read a dataset whole.
    pub async fn bulk_of_dataset(&self, name: &DatasetName) -> Result<Bulk> {
        let row = self.parts.store.get_dataset(name).await?;
        let bytes = data::memory_bytes(&self.parts.store, &row).await?;
        self.parts.memory.bulk(bytes).await
    }
}
