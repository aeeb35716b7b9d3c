//! Immutable files below one folder, by key. Whole or not there: a file is written beside its place, synced, then renamed.

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::{Error as BlobError, MultipartUpload, ObjectStore, ObjectStoreExt, PutMode};

use crate::error::{Error, Result};

/// The files. Cheap to clone. Keys are `/`-separated; the first segment is a tenant's id.
#[derive(Debug, Clone)]
pub struct Blobs {
    files: Arc<LocalFileSystem>,
    root: PathBuf,
}

impl Blobs {
    pub(super) fn open(root: &FilePath) -> Result<Self> {
        std::fs::create_dir_all(root).map_err(Error::at(root))?;
        let files = LocalFileSystem::new_with_prefix(root)?.with_fsync(true).with_automatic_cleanup(true);
        Ok(Self { files: Arc::new(files), root: root.to_owned() })
    }

    /// Writes a file once; where the key exists, its content stays.
    pub async fn put(&self, key: &str, bytes: Vec<u8>) -> Result<()> {
        match self.files.put_opts(&parse(key)?, bytes.into(), PutMode::Create.into()).await {
            Ok(_) | Err(BlobError::AlreadyExists { .. }) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Writes a file, in place of one that is there.
    pub async fn replace(&self, key: &str, bytes: Vec<u8>) -> Result<()> {
        self.files.put_opts(&parse(key)?, bytes.into(), PutMode::Overwrite.into()).await?;
        Ok(())
    }

    /// Starts a file that is written piece by piece. Nothing is seen of it before [`BlobUpload::finish`].
    pub async fn upload(&self, key: &str) -> Result<BlobUpload> {
        Ok(BlobUpload { upload: self.files.put_multipart(&parse(key)?).await? })
    }

    /// A whole file. INTERNAL where there is none: a row has told its key.
    pub async fn get(&self, key: &str) -> Result<Vec<u8>> {
        Ok(self.files.get(&parse(key)?).await?.bytes().await?.into())
    }

    /// Opens a file, to be read on a thread that may block. INTERNAL where there is none.
    pub fn open_file(&self, key: &str) -> Result<File> {
        let path = self.files.path_to_filesystem(&parse(key)?)?;
        File::open(&path).map_err(Error::at(path))
    }

    /// The keys below a folder, sorted.
    pub async fn list(&self, folder: &str) -> Result<Vec<String>> {
        let mut found = self.files.list(Some(&parse(folder)?));
        let mut keys = Vec::new();
        while let Some(file) = found.next().await {
            keys.push(file?.location.to_string());
        }
        keys.sort();
        Ok(keys)
    }

    /// Deletes a file, or all files below a folder. What is not there is no error.
    pub async fn delete(&self, key: &str) -> Result<()> {
        let mut doomed = self.list(key).await?;
        if self.files.head(&parse(key)?).await.is_ok() {
            doomed.push(key.to_owned());
        }
        for key in doomed {
            match self.files.delete(&parse(&key)?).await {
                Ok(()) | Err(BlobError::NotFound { .. }) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
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

    /// Deletes every file that is neither one of `owned` nor below one. Walks the folder itself, because half-written files are
    /// invisible by key.
    pub(super) async fn sweep(&self, owned: &HashSet<String>) -> Result<()> {
        let mut folders = vec![self.root.clone()];
        while let Some(folder) = folders.pop() {
            let mut entries = tokio::fs::read_dir(&folder).await.map_err(Error::at(&folder))?;
            while let Some(entry) = entries.next_entry().await.map_err(Error::at(&folder))? {
                let path = entry.path();
                if entry.file_type().await.map_err(Error::at(&path))?.is_dir() {
                    folders.push(path);
                } else if !self.is_owned(&path, owned) {
                    tracing::info!(file = %path.display(), "collecting a blob without an owner");
                    tokio::fs::remove_file(&path).await.map_err(Error::at(&path))?;
                }
            }
        }
        Ok(())
    }

    fn is_owned(&self, path: &FilePath, owned: &HashSet<String>) -> bool {
        let Ok(key) = path.strip_prefix(&self.root) else { return false };
        key.ancestors().filter_map(FilePath::to_str).any(|key| owned.contains(key)) && !is_half_written(path)
    }
}

/// `LocalFileSystem` stages `name` as `name#1`, `name#2`, ...
fn is_half_written(path: &FilePath) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().contains('#'))
}

/// A file being written. Dropped before [`BlobUpload::finish`] it leaves nothing.
#[derive(Debug)]
pub struct BlobUpload {
    upload: Box<dyn MultipartUpload>,
}

impl BlobUpload {
    /// Adds bytes at the end.
    pub async fn write(&mut self, bytes: Vec<u8>) -> Result<()> {
        Ok(self.upload.put_part(bytes.into()).await?)
    }

    /// Syncs the file and gives it its key.
    pub async fn finish(mut self) -> Result<()> {
        self.upload.complete().await?;
        Ok(())
    }
}

fn parse(key: &str) -> Result<Key> {
    Key::parse(key).map_err(Error::internal)
}

impl From<BlobError> for Error {
    fn from(e: BlobError) -> Self {
        Self::Internal(format!("blobs: {e}"))
    }
}
