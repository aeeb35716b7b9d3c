//! The one mapping from errors to gRPC statuses, with `google.rpc` details: always exactly one `ErrorInfo`, and what else fits.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::error::Error;

const DOMAIN: &str = "tenora";

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match error {
            Error::Invalid { reason, field, message } => {
                let mut details = info(reason, [("field", field.as_str())]);
                details.add_bad_request_violation(field, message);
                Self::with_error_details(Code::InvalidArgument, text, details)
            }
            Error::NotFound { name } => about(Code::NotFound, "NOT_FOUND", text, &name),
            Error::AlreadyExists { name, message: _ } => about(Code::AlreadyExists, "ALREADY_EXISTS", text, &name),
            Error::Unauthenticated { message: _ } => plain(Code::Unauthenticated, "UNAUTHENTICATED", text),
            Error::PermissionDenied => plain(Code::PermissionDenied, "PERMISSION_DENIED", text),
            Error::Precondition { reason, subject, message } => {
                let mut details = info(reason, []);
                details.add_precondition_failure_violation(reason, subject, message);
                Self::with_error_details(Code::FailedPrecondition, text, details)
            }
            Error::Conflict { name } => about(Code::Aborted, "ETAG_MISMATCH", text, &name),
            Error::Exhausted { limit, message, retry_after } => {
                let mut details = info("LIMIT_REACHED", [("limit", limit)]);
                details.add_quota_failure_violation(limit, message);
                retry(&mut details, retry_after);
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

/// Gives statuses that tonic made (an unknown method, a message over the limit, one that does not decode) their `ErrorInfo`.
pub fn with_details(status: Status) -> Status {
    if !status.details().is_empty() {
        return status;
    }
    let reason = match status.code() {
        // tonic says nothing of a method that it does not know, and says which encoding it does not.
        Code::Unimplemented if status.message().is_empty() => "UNKNOWN_METHOD",
        Code::Unimplemented => "UNSUPPORTED_ENCODING",
        Code::OutOfRange | Code::ResourceExhausted => "MESSAGE_TOO_LARGE",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::Cancelled => "CANCELLED",
        _ => "MALFORMED_MESSAGE",
    };
    let text = match status.code() {
        Code::Unimplemented if status.message().is_empty() => "this server has no such method".to_owned(),
        Code::OutOfRange | Code::ResourceExhausted => format!("{} (limit max_message_bytes)", status.message()),
        _ => status.message().to_owned(),
    };
    let metadata = status.metadata().clone();
    Status::with_error_details_and_metadata(status.code(), text, info(reason, []), metadata)
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
    details.set_resource_info(resource_type(name), name, "", text.as_str());
    Status::with_error_details(code, text, details)
}

/// `tenora/adapters` for `tenants/a/adapters/b`: the last collection of the name.
fn resource_type(name: &str) -> String {
    let collection = name.split('/').step_by(2).last().unwrap_or_default();
    format!("{DOMAIN}/{collection}")
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
    fn foreign_statuses_get_details() {
        let status = with_details(Status::out_of_range("decoded message length too large"));
        assert_eq!(status.get_error_details().error_info().unwrap().reason, "MESSAGE_TOO_LARGE");
        assert!(status.message().contains("max_message_bytes"));
        let reason = |status: Status| with_details(status).get_error_details().error_info().unwrap().reason.clone();
        assert_eq!(reason(Status::unimplemented("")), "UNKNOWN_METHOD");
        assert_eq!(reason(Status::unimplemented("Content is compressed with `gzip`")), "UNSUPPORTED_ENCODING");
    }
}
