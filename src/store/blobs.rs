//! Immutable files below one folder, by key. Whole or not there: a file is written beside its place, synced, then renamed.

use std::fs::File;
use std::io;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::{Error as BlobError, MultipartUpload, ObjectStore, ObjectStoreExt, PutMode, PutPayload};

use crate::error::{Error, Result};
use crate::store::watch::{DiskWrite, Watch, When, reach};

/// The files. Cheap to clone. Keys are `/`-separated; the first segment is a tenant's id.
#[derive(Debug, Clone)]
pub struct Blobs {
    files: Arc<LocalFileSystem>,
    root: PathBuf,
    watch: Option<Arc<dyn Watch>>,
}

impl Blobs {
    pub(super) fn open(root: &FilePath, watch: Option<Arc<dyn Watch>>) -> Result<Self> {
        std::fs::create_dir_all(root).map_err(Error::at(root))?;
        let files = LocalFileSystem::new_with_prefix(root).map_err(|e| failed(root, e))?;
        let files = Arc::new(files.with_fsync(true).with_automatic_cleanup(true));
        Ok(Self { files, root: root.to_owned(), watch })
    }

    /// Makes a file without a name, which is gone when it is closed, for what is too large for memory and not kept.
    pub fn scratch(&self) -> Result<File> {
        tempfile::tempfile_in(&self.root).map_err(Error::at(&self.root))
    }

    /// Makes such a file of so many bytes, all zero, which the disk has.
    ///
    /// # Errors
    /// DISK_FULL.
    pub fn scratch_of(&self, bytes: u64) -> Result<File> {
        use rustix::fs::{FallocateFlags, fallocate};
        use rustix::io::Errno;
        let file = self.scratch()?;
        match fallocate(&file, FallocateFlags::empty(), 0, bytes) {
            Ok(()) => {}
            // Not every file system can promise them.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => file.set_len(bytes).map_err(Error::at(&self.root))?,
            Err(e) => return Err(Error::at(&self.root)(e.into())),
        }
        Ok(file)
    }

    /// Where the files are.
    pub fn folder(&self) -> &FilePath {
        &self.root
    }

    /// Writes a file once. Where the key exists with the same content nothing is written; with another one, which is damage, the file is
    /// put right.
    pub async fn put(&self, key: &str, bytes: Vec<u8>) -> Result<()> {
        reach(self.watch.as_ref(), DiskWrite::Put, When::Before).await?;
        let content = PutPayload::from(bytes);
        match self.files.put_opts(&parse(key)?, content.clone(), PutMode::Create.into()).await {
            Ok(_) => {}
            Err(BlobError::AlreadyExists { .. }) if self.holds(key, &content).await => {}
            Err(BlobError::AlreadyExists { .. }) => {
                tracing::warn!(key, "a damaged file is written again");
                let replaced = self.files.put_opts(&parse(key)?, content, PutMode::Overwrite.into()).await;
                replaced.map_err(|e| self.failed(key, e))?;
            }
            Err(e) => return Err(self.failed(key, e)),
        }
        reach(self.watch.as_ref(), DiskWrite::Put, When::After).await
    }

    /// Whether a file can be read and has this content, which is in one piece.
    async fn holds(&self, key: &str, content: &PutPayload) -> bool {
        if self.size(key).await.ok().flatten() != Some(content.content_length() as u64) {
            return false;
        }
        let found = self.get(key).await.ok().flatten();
        found.is_some_and(|found| content.iter().map(|piece| &piece[..]).eq([found.as_slice()]))
    }

    /// The bytes of a file; `None` where there is none.
    pub async fn size(&self, key: &str) -> Result<Option<u64>> {
        match self.files.head(&parse(key)?).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(BlobError::NotFound { .. }) => Ok(None),
            Err(e) => Err(self.failed(key, e)),
        }
    }

    /// Writes a file, in place of one that is there.
    pub async fn replace(&self, key: &str, bytes: Vec<u8>) -> Result<()> {
        reach(self.watch.as_ref(), DiskWrite::Replace, When::Before).await?;
        let written = self.files.put_opts(&parse(key)?, bytes.into(), PutMode::Overwrite.into()).await;
        written.map_err(|e| self.failed(key, e))?;
        reach(self.watch.as_ref(), DiskWrite::Replace, When::After).await
    }

    /// Starts a file that is written piece by piece. Nothing is seen of it before [`BlobUpload::finish`], which puts it in place of one
    /// that is there.
    pub async fn upload(&self, key: &str) -> Result<BlobUpload> {
        let upload = self.files.put_multipart(&parse(key)?).await.map_err(|e| self.failed(key, e))?;
        Ok(BlobUpload { upload, path: self.root.join(key), watch: self.watch.clone() })
    }

    /// A whole file; `None` where there is none. What cannot be read now, for want of file handles say, is an error and no file that is lost.
    pub async fn get(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let found = match self.files.get(&parse(key)?).await {
            Err(BlobError::NotFound { .. }) => return Ok(None),
            found => found.map_err(|e| self.failed(key, e))?,
        };
        Ok(Some(found.bytes().await.map_err(|e| self.failed(key, e))?.into()))
    }

    /// Opens a file, to be read on a thread that may block. INTERNAL where there is none.
    pub fn open_file(&self, key: &str) -> Result<File> {
        let path = self.files.path_to_filesystem(&parse(key)?).map_err(|e| self.failed(key, e))?;
        File::open(&path).map_err(Error::at(&path))
    }

    /// The keys below a folder, sorted.
    pub async fn list(&self, folder: &str) -> Result<Vec<String>> {
        let mut found = self.files.list(Some(&parse(folder)?));
        let mut keys = Vec::new();
        while let Some(file) = found.next().await {
            keys.push(file.map_err(|e| self.failed(folder, e))?.location.to_string());
        }
        keys.sort();
        Ok(keys)
    }

    /// Deletes a file, or all files below a folder. What is not there is no error; one that cannot be deleted keeps no other.
    pub async fn delete(&self, key: &str) -> Result<()> {
        let mut doomed = self.list(key).await?;
        if self.files.head(&parse(key)?).await.is_ok() {
            doomed.push(key.to_owned());
        }
        let mut failed = Ok(());
        for key in doomed {
            if let Err(error) = self.delete_file(&key).await {
                failed = Err(error);
            }
        }
        failed
    }

    async fn delete_file(&self, key: &str) -> Result<()> {
        reach(self.watch.as_ref(), DiskWrite::Delete, When::Before).await?;
        match self.files.delete(&parse(key)?).await {
            Ok(()) | Err(BlobError::NotFound { .. }) => {}
            Err(e) => return Err(self.failed(key, e)),
        }
        reach(self.watch.as_ref(), DiskWrite::Delete, When::After).await
    }

    /// Fails where the disk has fewer free bytes than `least` (limit `min_free_disk_bytes`).
    pub fn check_free(&self, least: u64) -> Result<()> {
        let disk = rustix::fs::statvfs(&self.root).map_err(|e| Error::at(&self.root)(e.into()))?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        if free >= least {
            return Ok(());
        }
        let message = format!(
            "{} has {free} bytes free on its disk, and training needs {least} to save what it makes; free some",
            self.root.display()
        );
        // Someone may free some.
        Err(Error::Exhausted { limit: "min_free_disk_bytes", message, retry_after: Some(Duration::from_secs(60)) })
    }

    fn failed(&self, key: &str, error: BlobError) -> Error {
        failed(&self.root.join(key), error)
    }
}

/// What a failure means, with the path: a disk that is full is nobody's mistake.
fn failed(path: &FilePath, error: BlobError) -> Error {
    let mut cause = Some(&error as &dyn std::error::Error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Error::at(path)(io::Error::new(io.kind(), io.to_string()));
        }
        cause = error.source();
    }
    Error::internal(format!("blobs: {}: {error}", path.display()))
}

/// A file being written. Dropped before [`BlobUpload::finish`] it leaves nothing.
#[derive(Debug)]
pub struct BlobUpload {
    upload: Box<dyn MultipartUpload>,
    path: PathBuf,
    watch: Option<Arc<dyn Watch>>,
}

impl BlobUpload {
    /// Adds bytes at the end.
    pub async fn write(&mut self, bytes: Vec<u8>) -> Result<()> {
        reach(self.watch.as_ref(), DiskWrite::Part, When::Before).await?;
        self.upload.put_part(bytes.into()).await.map_err(|e| failed(&self.path, e))
    }

    /// Syncs the file and gives it its key.
    pub async fn finish(mut self) -> Result<()> {
        reach(self.watch.as_ref(), DiskWrite::Finish, When::Before).await?;
        self.upload.complete().await.map_err(|e| failed(&self.path, e))?;
        reach(self.watch.as_ref(), DiskWrite::Finish, When::After).await
    }
}

fn parse(key: &str) -> Result<Key> {
    Key::parse(key).map_err(Error::internal)
}
