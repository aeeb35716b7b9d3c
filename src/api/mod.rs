//! The interface: the only module that knows tonic and protobuf. Handlers translate and call; they decide nothing.
//!
//! A call passes [`edge`] (who is it, may we take it, how long has it), then its service's handler, which gets a `Tenant` from
//! [`auth`] or nothing. Errors become statuses in [`status`] only.

use tonic::{Extensions, Response, Status};

mod adapters;
pub mod auth;
mod base;
mod bodies;
pub mod client;
mod connections;
mod convert;
mod datasets;
mod deadline;
mod edge;
mod generation;
mod health;
mod live;
mod methods;
mod paced;
mod peft_upload;
mod places;
mod record;
mod safety;
mod server;
mod shared;
mod status;
mod tenants;
mod tls;
mod training;
mod uploads;

use crate::telemetry::traces;
#[doc(hidden)]
pub use convert::convert_bytes;
pub use places::WorkPlaces;
pub use server::serve;
pub use shared::Parts;

/// The messages and services of `tenora.v1`.
pub use tenora_proto as proto;

/// Makes ring the process's TLS library. It is the only one that is linked, but rustls chooses by itself only as long as that is so.
fn choose_tls_library() {
    // Where one has been chosen already, by us or by the program around us, it serves as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// What a handler gives.
type Answer<T> = Result<Response<T>, Status>;

/// What a streaming handler gives; dropping it ends the work behind it.
type Streamed<T> = std::pin::Pin<Box<dyn futures::Stream<Item = Result<T, Status>> + Send>>;

/// What the spans of a call's parts belong to, where its trace is recorded; the edge has begun it.
fn trace_of(call: &Extensions) -> Option<traces::Context> {
    call.get().copied()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::proto::DESCRIPTORS;

    /// What clients see of the interface says what it is.
    #[test]
    fn everything_in_the_protos_has_a_comment() {
        let set = FileDescriptorSet::decode(DESCRIPTORS).unwrap();
        let mut items = 0;
        for file in set.file.iter().filter(|file| file.package() == "tenora.v1") {
            let locations = &file.source_code_info.as_ref().expect("source information").location;
            let commented =
                locations.iter().filter(|at| at.leading_comments.is_some() || at.trailing_comments.is_some());
            let commented: HashSet<&[i32]> = commented.map(|at| at.path.as_slice()).collect();
            // The numbers of the fields of descriptor.proto: messages 4 with fields 2, enums 5 with values 2, services 6 with methods 2.
            let messages = file.message_type.iter().map(|m| (4, m.name(), m.field.iter().map(|f| f.name()).collect()));
            let enums = file.enum_type.iter().map(|e| (5, e.name(), e.value.iter().map(|v| v.name()).collect()));
            let services = file.service.iter().map(|s| (6, s.name(), s.method.iter().map(|m| m.name()).collect()));
            let kinds: [Vec<(i32, &str, Vec<&str>)>; 3] = [messages.collect(), enums.collect(), services.collect()];
            for (i, (kind, name, parts)) in kinds.iter().flat_map(|kind| kind.iter().enumerate()) {
                let path = [*kind, i as i32];
                assert!(commented.contains(&path[..]), "{}: {name} has no comment", file.name());
                for (j, part) in parts.iter().enumerate() {
                    let path = [path[0], path[1], 2, j as i32];
                    assert!(commented.contains(&path[..]), "{}: {name}.{part} has no comment", file.name());
                }
                items += 1 + parts.len();
            }
        }
        assert!(items > 300, "{items}");
    }
}
