//! The two files of a PEFT folder as an import brings them, on the disk until it is their turn.

use std::io::{Read as _, Seek as _, Write as _};
use std::path::PathBuf;
use std::sync::Arc;

use super::proto as pb;
use super::shared::Parts;
use crate::config::Limits;
use crate::error::{Error, Result};
use crate::hub::{BaseShape, CONFIG_FILE, MAX_CONFIG_BYTES, Package, TENSORS_FILE, check_beginning, most_file_bytes};
use crate::store::Store;
use crate::work::blocking;

/// What an import takes for each byte of its files: these, and what they become, as it is trained and as it is served, the latter perhaps in
/// twice the bits.
const IMPORT_FACTOR: u64 = 4;

/// Bytes of a file that are kept in memory before they go to the disk.
const IN_MEMORY: usize = 1 << 20;

/// The files of an import as they come in; nothing is taken by any name but the two that PEFT writes. What cannot be an adapter of the
/// base is refused as soon as that shows, so that no more of it is held. The tensors wait on the disk: they come into memory when it is
/// their turn.
pub struct PeftUpload {
    config: Vec<u8>,
    tensors: Vec<u8>,
    /// The limit `max_adapter_bytes`.
    limit: u64,
    /// Most bytes of tensors that an adapter of the base has.
    most: u64,
    shape: BaseShape,
    /// What has gone to the disk of the tensors.
    spilled: Option<Arc<std::fs::File>>,
    spilled_bytes: u64,
    store: Store,
}

impl PeftUpload {
    pub fn new(parts: &Parts) -> Self {
        Self::of(&parts.limits, parts.hub.shape(), parts.store.clone())
    }

    fn of(limits: &Limits, shape: &BaseShape, store: Store) -> Self {
        let most = most_file_bytes(shape, limits.into());
        let (config, tensors) = Default::default();
        let (limit, shape) = (limits.max_adapter_bytes, shape.clone());
        Self { config, tensors, limit, most, shape, spilled: None, spilled_bytes: 0, store }
    }

    /// Takes the next piece of a file.
    pub async fn add(&mut self, chunk: &pb::FileChunk) -> Result<()> {
        let size = (self.config.len() + self.tensors.len() + chunk.data.len()) as u64 + self.spilled_bytes;
        if size > self.limit {
            return Err(Error::Exhausted {
                limit: "max_adapter_bytes",
                message: format!(
                    "the adapter's files have more than {} bytes; save it in bfloat16 or with a lower rank",
                    self.limit
                ),
                retry_after: None,
            });
        }
        match chunk.filename.as_str() {
            CONFIG_FILE if self.config.len() + chunk.data.len() > MAX_CONFIG_BYTES => {
                let message =
                    format!("is over {MAX_CONFIG_BYTES} bytes; send the config that PEFT wrote beside the tensors");
                Err(Error::invalid_because("MALFORMED_CONFIG", CONFIG_FILE, message))
            }
            CONFIG_FILE => {
                self.config.extend_from_slice(&chunk.data);
                Ok(())
            }
            TENSORS_FILE => self.add_tensors(&chunk.data).await,
            other => Err(refused_file(other)),
        }
    }

    async fn add_tensors(&mut self, data: &[u8]) -> Result<()> {
        if (self.tensors.len() + data.len()) as u64 + self.spilled_bytes > self.most {
            let message = format!(
                "has more than the {} bytes that an adapter of this base can have at the limit max_rank; import it on a server that runs the \
                 base it was trained on, or save it in bfloat16 or with a lower rank",
                self.most
            );
            return Err(Error::invalid_because("ADAPTER_TOO_LARGE", TENSORS_FILE, message));
        }
        self.tensors.extend_from_slice(data);
        if self.spilled.is_none() {
            check_beginning(&self.tensors, &self.shape)?;
        }
        if self.tensors.len() >= IN_MEMORY { self.spill().await } else { Ok(()) }
    }

    /// Moves what there is of the tensors to the disk.
    async fn spill(&mut self) -> Result<()> {
        let file = match self.spilled.clone() {
            Some(file) => file,
            None => Arc::new(self.store.blobs().scratch()?),
        };
        let part = std::mem::take(&mut self.tensors);
        self.spilled_bytes += part.len() as u64;
        self.spilled = Some(file.clone());
        let folder = self.store.blobs().folder().to_owned();
        let write = move || (&*file).write_all(&part).map_err(Error::at(folder));
        blocking(write).await
    }

    /// Returns the files, once all pieces have come.
    pub fn finish(self) -> Result<Files> {
        for (name, bytes) in
            [(CONFIG_FILE, self.config.len() as u64), (TENSORS_FILE, self.tensors.len() as u64 + self.spilled_bytes)]
        {
            if bytes == 0 {
                let message =
                    format!("{name} was not sent, or is empty; send both files that PEFT's save_pretrained writes");
                return Err(Error::invalid_because("MISSING_FILE", "chunk.filename", message));
            }
        }
        let Self { config, tensors, spilled, spilled_bytes, store, .. } = self;
        let folder = store.blobs().folder().to_owned();
        Ok(Files { config, tail: tensors, spilled, spilled_bytes, folder })
    }
}

/// The files of an import, whole.
pub struct Files {
    config: Vec<u8>,
    /// What follows in the tensors' file on what is on the disk.
    tail: Vec<u8>,
    spilled: Option<Arc<std::fs::File>>,
    spilled_bytes: u64,
    /// Where the file without a name lies.
    folder: PathBuf,
}

impl Files {
    fn bytes(&self) -> u64 {
        self.config.len() as u64 + self.tail.len() as u64 + self.spilled_bytes
    }

    /// Returns what publishing them takes in memory.
    pub fn memory_bytes(&self) -> u64 {
        IMPORT_FACTOR * self.bytes()
    }

    /// Brings them into memory.
    pub async fn read(self) -> Result<Package> {
        let Self { config, tail, spilled, spilled_bytes, folder } = self;
        let Some(file) = spilled else { return Ok(Package { config, tensors: tail }) };
        let read = move || {
            let mut tensors = Vec::with_capacity(spilled_bytes as usize + tail.len());
            let mut file = &*file;
            file.rewind().and_then(|()| file.read_to_end(&mut tensors)).map_err(Error::at(folder))?;
            tensors.extend_from_slice(&tail);
            Ok(tensors)
        };
        let tensors = blocking(read).await?;
        Ok(Package { config, tensors })
    }
}

fn refused_file(name: &str) -> Error {
    let shown: String = name.chars().take(200).collect();
    let (reason, why) = if name.contains("..") || name.contains(['/', '\\']) {
        ("UNSAFE_FILE_NAME", "is a path")
    } else if [".bin", ".pt", ".pth", ".pkl"].iter().any(|ending| name.ends_with(ending)) {
        ("UNSUPPORTED_FILE", "is a pickle, which can run code; save it again with safe_serialization=True")
    } else {
        ("UNSUPPORTED_FILE", "is not part of an adapter")
    };
    let message = format!("{shown:?} {why}; send {CONFIG_FILE} and {TENSORS_FILE}, by these names");
    Error::invalid_because(reason, "chunk.filename", message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Digest;

    async fn add(folder: &mut PeftUpload, filename: &str, data: &[u8]) -> Result<()> {
        folder.add(&pb::FileChunk { filename: filename.into(), data: data.to_vec() }).await
    }

    async fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).await.unwrap();
        (dir, store)
    }

    fn folder(store: &Store, max_adapter_bytes: u64) -> PeftUpload {
        let shape = BaseShape::llama("base", Digest::of(b""), 1, [(8, 8); 7]);
        PeftUpload::of(&Limits { max_adapter_bytes, max_rank: 4, ..Limits::default() }, &shape, store.clone())
    }

    #[tokio::test]
    async fn chunks_of_the_two_files_are_joined() {
        let (_dir, store) = store().await;
        let mut folder = folder(&store, 100);
        for (name, data) in [(CONFIG_FILE, "{"), (CONFIG_FILE, "}"), (TENSORS_FILE, "abc"), (TENSORS_FILE, "def")] {
            add(&mut folder, name, data.as_bytes()).await.unwrap();
        }
        let package = folder.finish().unwrap().read().await.unwrap();
        assert_eq!(package, Package { config: b"{}".to_vec(), tensors: b"abcdef".to_vec() });
    }

    #[tokio::test]
    async fn large_files_wait_on_the_disk_and_come_back_as_they_were() {
        let (_dir, store) = store().await;
        let mut folder = PeftUpload { most: 1 << 30, ..folder(&store, 1 << 30) };
        let mut tensors: Vec<u8> = (0..3 * IN_MEMORY + 77).map(|i| (i * 31 % 251) as u8).collect();
        tensors[..8].fill(0);
        add(&mut folder, CONFIG_FILE, b"{}").await.unwrap();
        for chunk in tensors.chunks(100_003) {
            add(&mut folder, TENSORS_FILE, chunk).await.unwrap();
            assert!(folder.tensors.len() < IN_MEMORY);
        }
        let files = folder.finish().unwrap();
        assert_eq!(files.bytes(), tensors.len() as u64 + 2);
        assert!(files.read().await.unwrap().tensors == tensors);
    }

    #[tokio::test]
    async fn other_names_are_refused_by_name() {
        let (_dir, store) = store().await;
        for (name, expected) in [
            ("../adapter_config.json", "UNSAFE_FILE_NAME"),
            ("a/adapter_config.json", "UNSAFE_FILE_NAME"),
            ("a\\b", "UNSAFE_FILE_NAME"),
            ("adapter_model.bin", "UNSUPPORTED_FILE"),
            ("README.md", "UNSUPPORTED_FILE"),
            ("", "UNSUPPORTED_FILE"),
        ] {
            match add(&mut folder(&store, 100), name, b"x").await {
                Err(Error::Invalid { reason, message, .. }) => {
                    assert_eq!(reason, expected, "{name}");
                    assert!(message.contains(&format!("{name:?}")), "{message}");
                }
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn too_much_and_too_little_are_refused() {
        let (_dir, store) = store().await;
        let mut folder = folder(&store, 3);
        add(&mut folder, CONFIG_FILE, b"{}").await.unwrap();
        assert!(matches!(
            add(&mut folder, TENSORS_FILE, b"ab").await,
            Err(Error::Exhausted { limit: "max_adapter_bytes", .. })
        ));
        assert!(matches!(folder.finish(), Err(Error::Invalid { reason: "MISSING_FILE", .. })));
    }

    async fn refused(folder: &mut PeftUpload, data: &[u8], expected: &str) {
        match add(folder, TENSORS_FILE, data).await {
            Err(Error::Invalid { reason, message, .. }) => {
                assert_eq!(reason, expected);
                assert!(message.contains(';'), "{message}");
            }
            other => panic!("{other:?}"),
        }
    }

    /// A header that no adapter of the base has is refused when its length is there, and more tensors than one has when they come.
    #[tokio::test]
    async fn what_cannot_be_an_adapter_is_refused_as_it_comes() {
        let (_dir, store) = store().await;
        let roomy = || folder(&store, 1 << 30);
        let mut long = roomy();
        add(&mut long, TENSORS_FILE, &(90_u64 << 20).to_le_bytes()[..7]).await.unwrap();
        refused(&mut long, &[0], "MALFORMED_SAFETENSORS").await;
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n";
        refused(&mut roomy(), pointer, "GIT_LFS_POINTER").await;
        let header = br#"{"a":{"dtype":"U8","shape":[60000],"data_offsets":[0,60000]}}"#;
        let mut large = roomy();
        let beginning = [&(header.len() as u64).to_le_bytes()[..], header].concat();
        add(&mut large, TENSORS_FILE, &beginning).await.unwrap();
        refused(&mut large, &vec![0; 100_000], "ADAPTER_TOO_LARGE").await;
        let mut config = roomy();
        assert!(add(&mut config, CONFIG_FILE, &vec![b' '; MAX_CONFIG_BYTES]).await.is_ok());
        assert!(add(&mut config, CONFIG_FILE, b" ").await.is_err());
    }
}
