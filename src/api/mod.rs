//! The interface: the only module that knows tonic and protobuf. Handlers translate and call; they decide nothing.
//!
//! A call passes [`edge`] (who is it, may we take it, how long has it), then its service's handler, which gets a `Tenant` from
//! [`auth`] or nothing. Errors become statuses in [`status`] only.

use std::time::Instant;

use tonic::{Extensions, Response, Status};

mod adapters;
pub mod auth;
pub mod client;
mod convert;
mod datasets;
mod edge;
mod generation;
mod places;
mod safety;
mod server;
mod shared;
mod status;
mod tenants;
mod training;
mod uploads;

pub use server::serve;
pub use shared::Parts;

/// The messages and services of `tenora.v1`.
#[expect(clippy::large_enum_variant, reason = "generated")]
pub mod proto {
    tonic::include_proto!("tenora.v1");

    /// All files of the package, for reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}

/// Makes ring the process's TLS library. Two are linked (the downloads of bases bring theirs), and rustls does not choose.
fn choose_tls_library() {
    // Where one has been chosen already, by us or by the program around us, it serves as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// What a handler gives.
type Answer<T> = Result<Response<T>, Status>;

/// What a streaming handler gives; dropping it ends the work behind it.
type Streamed<T> = std::pin::Pin<Box<dyn futures::Stream<Item = Result<T, Status>> + Send>>;

/// When the client stops waiting; the edge reads it from `grpc-timeout`.
#[derive(Debug, Clone, Copy)]
struct Deadline(Instant);

fn deadline_of(call: &Extensions) -> Option<Instant> {
    call.get::<Deadline>().map(|deadline| deadline.0)
}
