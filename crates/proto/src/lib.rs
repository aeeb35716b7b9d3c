//! The messages and services of `tenora.v1`, as generated from the protos.

#![forbid(unsafe_code)]
#![expect(clippy::large_enum_variant, reason = "generated")]
#![allow(clippy::allow_attributes_without_reason, rustdoc::invalid_html_tags, reason = "generated")]

tonic::include_proto!("tenora.v1");

/// All files of the package, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
