//! The one vocabulary of errors. `api/status.rs` maps each variant to a gRPC status; nothing else decides codes.
//!
//! Every error tells its reader what to do next. `reason` is UPPER_SNAKE and stable: clients may match on it.

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

/// What fallible functions of this crate give.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, in the caller's terms.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The request can never succeed as it is. `field` is its path, e.g. `sampling.top_p`.
    #[error("{field}: {message}")]
    Invalid {
        /// Stable, in UPPER_SNAKE.
        reason: &'static str,
        /// The field's path in the request.
        field: String,
        /// What is wrong and what to do.
        message: String,
    },
    /// A named thing of the caller's own does not exist.
    #[error("{name} does not exist")]
    NotFound {
        /// The name as the caller gave it.
        name: String,
    },
    /// A thing of that name is there.
    #[error("{name} already exists{}", hint(.message))]
    AlreadyExists {
        /// The name as the caller gave it.
        name: String,
        /// What is wrong and what to do.
        message: String,
    },
    /// No key, or one that is unknown or revoked.
    #[error("{message}")]
    Unauthenticated {
        /// What is wrong and what to do.
        message: String,
    },
    /// Another tenant's name, or an operator's method. The same text whether the name exists or not.
    #[error("this key may not use that name or method; names begin with tenants/{{your tenant}}")]
    PermissionDenied,
    /// Right request, wrong state of `subject`.
    #[error("{subject}: {message}")]
    Precondition {
        /// Stable, in UPPER_SNAKE.
        reason: &'static str,
        /// What is in the wrong state.
        subject: String,
        /// What is wrong and what to do.
        message: String,
    },
    /// The etag given is not the current one.
    #[error("{name} has changed since it was read; read it again and retry with its new etag")]
    Conflict {
        /// The name as the caller gave it.
        name: String,
    },
    /// A named limit is reached. `limit` is its name in `config::Limits`.
    #[error("{message} (limit {limit})")]
    Exhausted {
        /// The limit's name.
        limit: &'static str,
        /// What is wrong and what to do.
        message: String,
        /// When it may be tried again.
        retry_after: Option<Duration>,
    },
    /// The disk that holds a file is full.
    #[error("no room is left on the disk that holds {path}; nothing was stored: free some and retry")]
    DiskFull {
        /// The file or folder that was to be written.
        path: String,
    },
    /// The caller does not wait any longer.
    #[error("the deadline passed before the work was done")]
    DeadlineExceeded,
    /// The caller has gone.
    #[error("the call was cancelled")]
    Cancelled,
    /// Not now; the same call may succeed later.
    #[error("{message}")]
    Unavailable {
        /// What is wrong and what to do.
        message: String,
        /// When it may be tried again.
        retry_after: Option<Duration>,
    },
    /// Our fault. The message goes to the log, not to the client.
    #[error("{0}")]
    Internal(String),
}

fn hint(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!("; {message}") }
}

impl Error {
    /// Returns an error about a field whose reason is INVALID_ARGUMENT.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { reason: "INVALID_ARGUMENT", field: field.into(), message: message.into() }
    }

    /// Returns an error about a field with a reason of its own.
    pub fn invalid_because(reason: &'static str, field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { reason, field: field.into(), message: message.into() }
    }

    /// Returns the error that a name of the caller's own means nothing.
    pub fn not_found(name: impl std::fmt::Display) -> Self {
        Self::NotFound { name: name.to_string() }
    }

    /// Returns the error that `subject` is in the wrong state for the request.
    pub fn precondition(reason: &'static str, subject: impl std::fmt::Display, message: impl Into<String>) -> Self {
        Self::Precondition { reason, subject: subject.to_string(), message: message.into() }
    }

    /// Returns whether the same may succeed later: another time, with more room, or on a machine in order.
    pub fn may_pass(&self) -> bool {
        matches!(
            self,
            Self::Exhausted { .. }
                | Self::DiskFull { .. }
                | Self::DeadlineExceeded
                | Self::Unavailable { .. }
                | Self::Internal(_)
        )
    }

    /// Returns whether it may do so though nobody changes anything for it.
    pub fn passes_by_itself(&self) -> bool {
        self.may_pass() && !matches!(self, Self::Exhausted { retry_after: None, .. })
    }

    /// Makes an error of a file or a folder say which one; for `map_err`. There is no other way from an error of the system to one of
    /// ours, so that none reaches a person without its path.
    pub fn at(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        move |e| {
            let path = path.as_ref().display().to_string();
            match e.kind() {
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Self::DiskFull { path },
                _ => Self::Internal(format!("{path}: {e}")),
            }
        }
    }

    /// Returns an error that is our fault.
    pub fn internal(message: impl std::fmt::Display) -> Self {
        Self::Internal(message.to_string())
    }
}

impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        Self::Internal(format!("tensor: {e}"))
    }
}

impl From<tenora_kernels::error::Error> for Error {
    fn from(e: tenora_kernels::error::Error) -> Self {
        use tenora_kernels::error::Error as Kernels;
        match e {
            Kernels::UnsupportedBase(message) => Self::invalid_because("UNSUPPORTED_BASE", "base", message),
            Kernels::Unavailable(message) => Self::precondition("DEVICE_UNAVAILABLE", "cuda", message),
            Kernels::Internal(message) => Self::Internal(message),
            Kernels::Tensor(error) => error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn a_full_disk_is_no_fault_of_ours_and_names_the_path() {
        for kind in [ErrorKind::StorageFull, ErrorKind::QuotaExceeded] {
            let error = Error::at("/data/x")(io::Error::from(kind));
            assert!(matches!(&error, Error::DiskFull { path } if path == "/data/x"), "{error}");
        }
        let other = Error::at("/data/x")(io::Error::from(ErrorKind::PermissionDenied));
        assert!(matches!(&other, Error::Internal(message) if message.contains("/data/x")), "{other}");
    }
}
