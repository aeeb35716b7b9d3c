//! A folder that a server streams: files one after the other, in pieces.

use std::path::{Path, PathBuf};

use tokio::fs::File;
use tokio::io::AsyncWriteExt as _;

use super::{Failure, Result};
use crate::api::client::proto;

/// A folder that is being written. A file that is there already is not touched.
#[derive(Debug)]
pub(super) struct ExportedFolder {
    folder: PathBuf,
    /// The file whose pieces come.
    open: Option<(String, File)>,
}

impl ExportedFolder {
    /// Makes the folder where there is none.
    pub(super) fn create(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Failure::at(folder))?;
        Ok(Self { folder: folder.to_owned(), open: None })
    }

    /// Writes a piece.
    pub(super) async fn add(&mut self, chunk: proto::FileChunk) -> Result<()> {
        let path = self.folder.join(&chunk.filename);
        let file = match &mut self.open {
            Some((name, file)) if *name == chunk.filename => file,
            _ => {
                let file = create(&path, &chunk.filename).await?;
                &mut self.open.insert((chunk.filename, file)).1
            }
        };
        file.write_all(&chunk.data).await.map_err(Failure::at(&path))?;
        file.flush().await.map_err(Failure::at(&path))
    }
}

/// A new file. The name comes from the server: it must not leave the folder.
async fn create(path: &Path, name: &str) -> Result<File> {
    if Path::new(name).file_name() != Some(name.as_ref()) {
        return Err(Failure::other(format!("the server sent a file called {name:?}; nothing is written there")));
    }
    File::create_new(path).await.map_err(Failure::at(path))
}
