//! What can go wrong where a device computes.

/// What fallible functions of this crate give.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a device does not compute. The CPU's own kernels cannot fail.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device's kernels do not fit this base.
    #[error("{0}")]
    UnsupportedBase(String),
    /// The device or its kernels cannot be used as they are.
    #[error("{0}")]
    Unavailable(String),
    /// A mistake of the caller's.
    #[error("{0}")]
    Internal(String),
    /// An operation of candle's failed.
    #[error("tensor: {0}")]
    Tensor(#[from] candle_core::Error),
}

impl Error {
    /// A mistake of the caller's.
    pub fn internal(what: impl std::fmt::Display) -> Self {
        Self::Internal(what.to_string())
    }
}
