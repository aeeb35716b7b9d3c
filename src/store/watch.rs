//! What tests put between the store and the disk.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use futures::future::BoxFuture;

use crate::error::{Error, Result};

/// A write that changes the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskWrite {
    /// A file that is written once.
    Put,
    /// A file in place of another.
    Replace,
    /// A piece of a file that has no key yet.
    Part,
    /// Such a file gets its key.
    Finish,
    /// A file goes.
    Delete,
    /// A transaction of the catalogue.
    Commit,
}

/// When a [`DiskWrite`] is told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Nothing of it is on the disk.
    Before,
    /// All of it is.
    After,
}

/// Is told of every write, before it and after. May refuse it as a disk would, or keep it waiting for ever. A server has none.
pub trait Watch: Debug + Send + Sync {
    /// Returns once the write may go on, or the error that it ends with.
    fn reached(&self, write: DiskWrite, when: When) -> BoxFuture<'static, io::Result<()>>;
}

pub(super) async fn reach(watch: Option<&Arc<dyn Watch>>, write: DiskWrite, when: When) -> Result<()> {
    match watch {
        Some(watch) => watch.reached(write, when).await.map_err(Error::at(format!("{write:?}"))),
        None => Ok(()),
    }
}
