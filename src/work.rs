//! Work that keeps what it has taken (a place, a permit, a reservation) until it ends, also where its caller goes away.
//!
//! A call's future can be dropped at every await: its client vanished or its deadline passed. Work on a thread that blocks goes on all the
//! same. What counts that work must therefore move with it, and never be a local of the caller.

use crate::error::{Error, Result};

/// Runs work to its end and holds `held` until then; gives both back to a caller that is still there.
///
/// # Errors
/// The work's own, and INTERNAL where it panics. `held` has been let go then.
pub async fn run_holding<H: Send + 'static, T: Send + 'static>(
    held: H,
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<(T, H)> {
    tokio::spawn(async move { work.await.map(|done| (done, held)) }).await.map_err(Error::internal)?
}

/// Does the same with work that blocks, on a thread of its own.
///
/// # Errors
/// As [`run_holding`].
pub async fn block_holding<H: Send + 'static, T: Send + 'static>(
    held: H,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<(T, H)> {
    tokio::task::spawn_blocking(move || work().map(|done| (done, held))).await.map_err(Error::internal)?
}

/// Runs work to its end, also where the caller goes away in the middle.
///
/// # Errors
/// As [`run_holding`].
pub async fn spawn_uncancellable<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    run_holding((), work).await.map(|(done, ())| done)
}

/// Runs work that blocks on a thread of its own.
///
/// # Errors
/// As [`run_holding`].
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    block_holding((), work).await.map(|(done, ())| done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, mpsc};

    #[tokio::test]
    async fn what_is_held_goes_when_the_work_ends_and_not_before() {
        let held = Arc::new(());
        let (go, gate) = mpsc::channel::<()>();
        let (begun, begins) = tokio::sync::oneshot::channel();
        let work = move || {
            let _ = begun.send(());
            gate.recv().map_err(Error::internal)
        };
        let call = tokio::spawn(block_holding(held.clone(), work));
        begins.await.unwrap();
        call.abort();
        assert!(call.await.unwrap_err().is_cancelled());
        assert_eq!(Arc::strong_count(&held), 2, "the caller has gone, the work has not");
        drop(go);
        while Arc::strong_count(&held) > 1 {
            tokio::task::yield_now().await;
        }
        let (done, back) = run_holding(held, async { Ok(7) }).await.unwrap();
        assert_eq!((done, Arc::strong_count(&back)), (7, 1));
    }
}
