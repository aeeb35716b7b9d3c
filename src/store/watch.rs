//! What tests put between the store and the disk.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use futures::future::BoxFuture;

use crate::error::{Error, Result};

/// Is told of every step that changes the disk, before it is taken and after: `put`, `replace`, `part`, `finish`, `delete` and `commit`,
/// then `stored`, `written`, `finished`, `deleted` and `committed`. May refuse a step as a disk would, or keep it waiting for ever. A
/// server has none.
pub trait Watch: Debug + Send + Sync {
    /// Returns once the step may be taken, or the error that it ends with.
    fn reached(&self, step: &'static str) -> BoxFuture<'static, io::Result<()>>;
}

pub(super) async fn reach(watch: Option<&Arc<dyn Watch>>, step: &'static str) -> Result<()> {
    match watch {
        Some(watch) => watch.reached(step).await.map_err(Error::at(step)),
        None => Ok(()),
    }
}
