//! The one mapping from errors to gRPC statuses, with `google.rpc` details: always exactly one `ErrorInfo`, and what else fits.

use std::collections::HashMap;
use std::time::Duration;

use http_body::Frame;
use tonic::codegen::Bytes;
use tonic::codegen::http::HeaderMap;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::places::Limit;
use crate::error::Error;

const DOMAIN: &str = "tenora";

/// Longest word of a message. Names and file names that are allowed fit in.
const MAX_WORD: usize = 300;
/// Longest message. It stands in a status up to three times, percent-encoded or in base64, and clients take headers of 8 KiB.
const MAX_MESSAGE: usize = 2000;
/// When to look again whether a full disk has room.
const DISK_RETRY: Duration = Duration::from_secs(30);

impl From<Error> for Status {
    /// What callers have sent is shortened, so that every client can read the answer.
    fn from(error: Error) -> Self {
        let text = shortened(&error.to_string());
        match error {
            Error::Invalid { reason, field, message } => {
                let field = shortened(&field);
                let mut details = info(reason, [("field", field.as_str())]);
                details.add_bad_request_violation(field, shortened(&message));
                Self::with_error_details(Code::InvalidArgument, text, details)
            }
            Error::NotFound { name } => about(Code::NotFound, "NOT_FOUND", text, &name),
            Error::AlreadyExists { name, message: _ } => about(Code::AlreadyExists, "ALREADY_EXISTS", text, &name),
            Error::Unauthenticated { message: _ } => plain(Code::Unauthenticated, "UNAUTHENTICATED", text),
            Error::PermissionDenied => plain(Code::PermissionDenied, "PERMISSION_DENIED", text),
            Error::Precondition { reason, subject, message } => {
                let mut details = info(reason, []);
                details.add_precondition_failure_violation(reason, shortened(&subject), shortened(&message));
                Self::with_error_details(Code::FailedPrecondition, text, details)
            }
            Error::Conflict { name } => about(Code::Aborted, "ETAG_MISMATCH", text, &name),
            Error::Exhausted { limit, message, retry_after } => {
                let mut details = info("LIMIT_REACHED", [("limit", limit)]);
                details.add_quota_failure_violation(limit, shortened(&message));
                retry(&mut details, retry_after);
                Self::with_error_details(Code::ResourceExhausted, text, details)
            }
            Error::DiskFull { path } => {
                let mut details = info("DISK_FULL", [("path", path.as_str())]);
                retry(&mut details, Some(DISK_RETRY));
                Self::with_error_details(Code::ResourceExhausted, text, details)
            }
            Error::DeadlineExceeded => plain(Code::DeadlineExceeded, "DEADLINE_EXCEEDED", text),
            Error::Cancelled => plain(Code::Cancelled, "CANCELLED", text),
            Error::Unavailable { message: _, retry_after } => {
                let mut details = info("UNAVAILABLE", []);
                retry(&mut details, retry_after);
                Self::with_error_details(Code::Unavailable, text, details)
            }
            Error::Internal(message) => {
                let id = format!("{:016x}", rand::random::<u64>());
                tracing::error!(%id, %message, "internal error");
                plain(
                    Code::Internal,
                    "INTERNAL",
                    format!("internal error {id}; the server's log has more under this id"),
                )
            }
        }
    }
}

/// A message over its limit.
pub fn too_large((limit, most): Limit, has: u64) -> Status {
    let text = format!(
        "the message has {has} bytes, more than {most} (limit {limit}; no message may have more than max_message_bytes)"
    );
    Status::with_error_details(Code::OutOfRange, text, info("MESSAGE_TOO_LARGE", [("limit", limit)]))
}

/// A message over its limit whose size is not known, since no more of it was taken.
pub fn over((limit, most): Limit) -> Status {
    let text = format!("the message has more than {most} bytes (limit {limit})");
    Status::with_error_details(Code::OutOfRange, text, info("MESSAGE_TOO_LARGE", [("limit", limit)]))
}

/// The last frame of an answer that ends with a status.
pub fn trailers(status: &Status) -> Frame<Bytes> {
    let mut trailers = HeaderMap::new();
    // What a status says is percent-encoded or in base64, and so always a header.
    let _ = status.add_header(&mut trailers);
    Frame::trailers(trailers)
}

/// A message that is none of the method's.
pub fn malformed(why: &str) -> Status {
    let text = shortened(&format!("the message cannot be read: {why}"));
    plain(Code::InvalidArgument, "MALFORMED_MESSAGE", text)
}

/// The refusal that an answer's headers alone are, in full; `None` where the answer goes on, or has ended well.
pub fn refusal(headers: &HeaderMap) -> Option<Status> {
    Status::from_header_map(headers).filter(|status| status.code() != Code::Ok).map(with_details)
}

/// Gives statuses that tonic made (an unknown method, a message over the limit, one that does not decode) their `ErrorInfo`. What tonic
/// calls its own fault, a message that does not decode, is the caller's.
pub fn with_details(status: Status) -> Status {
    if !status.details().is_empty() {
        return status;
    }
    let said = status.message();
    let (code, reason, text) = match status.code() {
        // tonic says nothing of a method that it does not know, and says which encoding it does not.
        Code::Unimplemented if said.is_empty() => {
            (Code::Unimplemented, "UNKNOWN_METHOD", "this server has no such method".to_owned())
        }
        Code::Unimplemented => (Code::Unimplemented, "UNSUPPORTED_ENCODING", said.to_owned()),
        code @ (Code::OutOfRange | Code::ResourceExhausted) => {
            (code, "MESSAGE_TOO_LARGE", format!("{said} (limit max_message_bytes)"))
        }
        Code::DeadlineExceeded => (Code::DeadlineExceeded, "DEADLINE_EXCEEDED", said.to_owned()),
        Code::Cancelled => (Code::Cancelled, "CANCELLED", said.to_owned()),
        Code::NotFound => (Code::NotFound, "NOT_FOUND", said.to_owned()),
        Code::Internal | Code::Unknown | Code::InvalidArgument => {
            (Code::InvalidArgument, "MALFORMED_MESSAGE", format!("the message cannot be read: {said}"))
        }
        code => (code, "MALFORMED_MESSAGE", said.to_owned()),
    };
    let metadata = status.metadata().clone();
    Status::with_error_details_and_metadata(code, shortened(&text), info(reason, []), metadata)
}

fn info<const N: usize>(reason: &str, metadata: [(&str, &str); N]) -> ErrorDetails {
    let metadata: HashMap<String, String> = metadata.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    ErrorDetails::with_error_info(reason, DOMAIN, metadata)
}

fn plain(code: Code, reason: &str, text: String) -> Status {
    Status::with_error_details(code, text, info(reason, []))
}

/// A status about one named resource.
fn about(code: Code, reason: &str, text: String, name: &str) -> Status {
    let mut details = info(reason, []);
    details.set_resource_info(resource_type(name), shortened(name), "", text.as_str());
    Status::with_error_details(code, text, details)
}

/// `tenora/adapters` for `tenants/a/adapters/b`: the last collection of the name.
fn resource_type(name: &str) -> String {
    let collection = name.split('/').step_by(2).last().unwrap_or_default();
    shortened(&format!("{DOMAIN}/{collection}"))
}

/// A message with its long words cut, and its middle where it is still too long: what it is about stands at its beginning, what to do at
/// its end.
fn shortened(text: &str) -> String {
    let words = text.split_inclusive(char::is_whitespace);
    let text: String = words.map(|word| cut(word, MAX_WORD / 2, MAX_WORD / 4, MAX_WORD)).collect();
    cut(&text, MAX_MESSAGE / 2, MAX_MESSAGE / 4, MAX_MESSAGE)
}

/// The first `head` and the last `tail` bytes of a text of more than `most`, and how much is left out between.
fn cut(text: &str, head: usize, tail: usize, most: usize) -> String {
    if text.len() <= most {
        return text.to_owned();
    }
    let (head, tail) = (text.floor_char_boundary(head), text.ceil_char_boundary(text.len() - tail));
    format!("{}[... {} bytes ...]{}", &text[..head], tail - head, &text[tail..])
}

fn retry(details: &mut ErrorDetails, after: Option<Duration>) {
    if after.is_some() {
        details.set_retry_info(after);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<(Error, Code)> {
        let soon = Some(Duration::from_secs(2));
        vec![
            (Error::invalid("sampling.top_p", "must be in (0, 1]"), Code::InvalidArgument),
            (Error::not_found("tenants/a/adapters/b"), Code::NotFound),
            (Error::AlreadyExists { name: "tenants/a".into(), message: String::new() }, Code::AlreadyExists),
            (Error::Unauthenticated { message: "no key".into() }, Code::Unauthenticated),
            (Error::PermissionDenied, Code::PermissionDenied),
            (Error::precondition("JOB_RUNS", "tenants/a", "wait"), Code::FailedPrecondition),
            (Error::Conflict { name: "tenants/a/adapters/b".into() }, Code::Aborted),
            (
                Error::Exhausted { limit: "max_queued", message: "full".into(), retry_after: soon },
                Code::ResourceExhausted,
            ),
            (Error::DiskFull { path: "/data".into() }, Code::ResourceExhausted),
            (Error::DeadlineExceeded, Code::DeadlineExceeded),
            (Error::Cancelled, Code::Cancelled),
            (Error::Unavailable { message: "draining".into(), retry_after: soon }, Code::Unavailable),
            (Error::internal("the secret inside"), Code::Internal),
        ]
    }

    #[test]
    fn every_error_carries_its_reason() {
        for (error, code) in all() {
            let status = Status::from(error);
            assert_eq!(status.code(), code);
            let details = status.get_error_details();
            let info = details.error_info().expect("an ErrorInfo");
            assert_eq!(info.domain, "tenora");
            assert!(info.reason.bytes().all(|b| b.is_ascii_uppercase() || b == b'_'), "{}", info.reason);
        }
    }

    #[test]
    fn details_fit_the_error() {
        let details = |error: Error| Status::from(error).get_error_details();
        let invalid = details(Error::invalid("sampling.top_p", "must be in (0, 1]"));
        assert_eq!(invalid.bad_request().unwrap().field_violations[0].field, "sampling.top_p");
        let missing = details(Error::not_found("tenants/a/adapters/b/versions/3"));
        assert_eq!(missing.resource_info().unwrap().resource_type, "tenora/versions");
        let full = details(Error::Exhausted { limit: "max_queued", message: "full".into(), retry_after: None });
        assert_eq!(full.quota_failure().unwrap().violations[0].subject, "max_queued");
        assert!(full.retry_info().is_none());
    }

    #[test]
    fn internal_messages_stay_inside() {
        let status = Status::from(Error::internal("the secret inside"));
        assert!(!format!("{status:?}").contains("secret"));
    }

    #[test]
    fn long_values_are_cut_and_what_to_do_is_not() {
        let long = "x".repeat(5 << 20);
        let texts = "many short words ".repeat(100_000);
        for value in [long.as_str(), &texts, &"é".repeat(1 << 20), &"\"".repeat(3000)] {
            let errors = [
                Error::invalid(value, format!("{value:?} is no role; use user")),
                Error::invalid_because("INVALID_NAME", "name", format!("{value} is wrong; use user")),
                Error::not_found(value),
                Error::AlreadyExists { name: value.into(), message: "choose another".into() },
                Error::precondition("JOB_RUNS", value, format!("{value} runs; wait")),
                Error::Conflict { name: value.into() },
                Error::Exhausted { limit: "max_queued", message: value.into(), retry_after: None },
                Error::Unavailable { message: value.into(), retry_after: None },
                Error::Unauthenticated { message: value.into() },
            ];
            for error in errors {
                let status = Status::from(error);
                let headers = status.clone().into_http::<tonic::body::Body>().into_parts().0.headers;
                let size: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
                assert!(size <= 16 << 10, "{size} bytes: {}", status.message());
                assert!(status.message().contains("bytes ..."), "{}", status.message());
            }
        }
        let status = Status::from(Error::invalid("role", format!("{long:?} is no role; use user")));
        assert!(status.message().ends_with("is no role; use user"), "{}", status.message());
        let name = format!("tenants/{}/adapters/{}/versions/4294967295", "a".repeat(63), "b".repeat(63));
        assert_eq!(Status::from(Error::not_found(&name)).get_details_resource_info().unwrap().resource_name, name);
    }

    #[test]
    fn foreign_statuses_get_details() {
        let malformed = with_details(Status::internal("failed to decode Protobuf message: invalid wire type"));
        assert_eq!(malformed.code(), Code::InvalidArgument);
        assert_eq!(malformed.get_error_details().error_info().unwrap().reason, "MALFORMED_MESSAGE");
        let status = with_details(Status::out_of_range("decoded message length too large"));
        assert_eq!(status.get_error_details().error_info().unwrap().reason, "MESSAGE_TOO_LARGE");
        assert!(status.message().contains("max_message_bytes"));
        let reason = |status: Status| with_details(status).get_error_details().error_info().unwrap().reason.clone();
        assert_eq!(reason(Status::unimplemented("")), "UNKNOWN_METHOD");
        assert_eq!(reason(Status::unimplemented("Content is compressed with `gzip`")), "UNSUPPORTED_ENCODING");
    }
}
