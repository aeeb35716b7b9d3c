//! api

pub mod client;

/// The messages and services of `tenora.v1`.
pub mod proto {
    tonic::include_proto!("tenora.v1");
}
