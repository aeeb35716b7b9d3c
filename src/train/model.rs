//! The model that a full fine-tuning makes, as files in its job's folder: a Hugging Face folder, and after all of it the manifest, which says
//! that it is whole.

use std::collections::BTreeMap;
use std::io::{BufWriter, Seek as _};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::Model;
use crate::store::{BlobUpload, JobRow, RESULT_MANIFEST, Store};
use crate::train::TrainingContext;
use crate::train::fit::FitOutcome;
use crate::work::blocking;

/// The newest form of the manifest that this build writes and reads.
const VERSION: u32 = 1;

/// The name of a model as one file.
const GGUF_FILE: &str = "model.gguf";

/// What the folder holds.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    v: u32,
    /// In the order in which they are exported.
    files: Vec<String>,
    /// Final measurements, finite numbers.
    metrics: BTreeMap<String, f64>,
}

/// A file of a model.
#[derive(Debug)]
pub struct ModelFile {
    /// Its name in the folder.
    pub name: String,
    /// Open at its beginning.
    pub file: std::fs::File,
}

/// Writes the model to the job's folder. Once it returns, [`is_saved`] says so, also in another process.
pub(super) async fn save(context: &TrainingContext, job: &JobRow, trained: &Arc<FitOutcome>) -> Result<()> {
    let Some(folder) = job.result.clone() else { return Err(Error::internal("a job without a claim has no folder")) };
    let (context, trained, runtime) = (context.clone(), trained.clone(), tokio::runtime::Handle::current());
    let write = move || {
        let blobs = context.store.blobs();
        let mut files: Vec<String> = Vec::new();
        let mut open: Option<BlobUpload> = None;
        let finish = |upload: Option<BlobUpload>| upload.map_or(Ok(()), |upload| runtime.block_on(upload.finish()));
        let mut put = |name: &str, piece: Vec<u8>| {
            if files.last().is_none_or(|last| last != name) {
                finish(open.take())?;
                files.push(name.to_owned());
            }
            let upload = match &mut open {
                Some(upload) => upload,
                None => open.insert(runtime.block_on(blobs.upload(&format!("{folder}/{name}")))?),
            };
            runtime.block_on(upload.write(piece))
        };
        context.model.write_folder(&trained.adapter, &context.base, &mut put)?;
        finish(open)?;
        // JSON has no infinities.
        let metrics = trained.metrics.clone().into_iter().filter(|(_, value)| value.is_finite()).collect();
        let manifest = serde_json::to_vec(&Manifest { v: VERSION, files, metrics }).map_err(Error::internal)?;
        runtime.block_on(blobs.replace(&format!("{folder}/{RESULT_MANIFEST}"), manifest))
    };
    tokio::task::spawn_blocking(write).await.map_err(|panic| Error::internal(format!("saving a model: {panic}")))?
}

/// Whether an earlier run of the job has saved its model.
pub(super) async fn is_saved(store: &Store, job: &JobRow) -> Result<bool> {
    Ok(manifest(store, job).await?.is_some())
}

/// Opens the files of a job that has made a model.
pub(super) async fn files(store: &Store, job: &JobRow) -> Result<Vec<ModelFile>> {
    let none = || {
        Error::precondition(
            "NO_MODEL",
            &job.name,
            "has made no model: a full fine-tuning without extract_rank does, once it succeeds",
        )
    };
    let folder = job.result.as_ref().filter(|_| job.has_model()).ok_or_else(none)?;
    let Some(Manifest { files, .. }) = manifest(store, job).await? else {
        return Err(Error::internal(format!("the model of {} cannot be read", job.name)));
    };
    let open = |name: String| Ok(ModelFile { file: store.blobs().open_file(&format!("{folder}/{name}"))?, name });
    files.into_iter().map(open).collect()
}

/// Makes a GGUF file of a job's model, which has no name and is gone once it is closed.
pub(super) async fn gguf(context: &TrainingContext, job: &JobRow) -> Result<ModelFile> {
    let folder = files(&context.store, job).await?;
    let tensors = folder.into_iter().find(|file| file.name == Model::TENSORS_FILE);
    let tensors = tensors.ok_or_else(|| Error::internal(format!("the model of {} has no tensors", job.name)))?.file;
    let (blobs, least) = (context.store.blobs(), context.limits.min_free_disk_bytes);
    blobs.check_free(least.saturating_add(context.model.folder_bytes()))?;
    let (file, model, base) = (blobs.scratch()?, context.model.clone(), context.base.clone());
    let write = move || {
        let mut to = BufWriter::new(file);
        model.write_gguf(tensors, &base, &mut to)?;
        let mut file = to.into_inner().map_err(|e| Error::internal(e.error()))?;
        file.rewind().map_err(Error::internal)?;
        Ok(ModelFile { name: GGUF_FILE.to_owned(), file })
    };
    blocking(write).await
}

/// What a job has saved; `None` where that is not whole or of a later build.
async fn manifest(store: &Store, job: &JobRow) -> Result<Option<Manifest>> {
    let Some(folder) = &job.result else { return Ok(None) };
    let Some(bytes) = store.blobs().get(&format!("{folder}/{RESULT_MANIFEST}")).await? else { return Ok(None) };
    let read = serde_json::from_slice::<Manifest>(&bytes).ok().filter(|manifest| manifest.v <= VERSION);
    if read.is_none() {
        tracing::error!(job = %job.name, "the manifest of a saved model cannot be read");
    }
    Ok(read)
}
