//! What the services stand on.

use std::sync::Arc;

use super::auth::Auth;
use super::edge::Calls;
use super::places::{Places, WorkPlaces};
use super::uploads::Uploads;
use crate::config::Limits;
use crate::hub::Hub;
use crate::ids::Digest;
use crate::memory::Memory;
use crate::safety::Guard;
use crate::store::Store;
use crate::text::Text;
use crate::train::Trainer;

/// The inside of a server, put together by `app`.
#[derive(Debug, Clone)]
pub struct Parts {
    pub store: Store,
    pub hub: Arc<Hub>,
    pub guard: Guard,
    pub trainer: Trainer,
    pub text: Arc<Text>,
    /// Of the base's file, without the ending.
    pub base_name: String,
    /// Of the base's file.
    pub base_digest: Digest,
    pub memory: Arc<Memory>,
    pub places: WorkPlaces,
    /// The base's, in tokens.
    pub context_length: usize,
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
