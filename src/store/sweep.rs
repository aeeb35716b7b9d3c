//! What the start does about files that no row owns: half-written ones go, others move to `trash/`, and where the catalogue cannot be the
//! one that they belong to, nothing is touched.
//!
//! A process that is killed leaves a blob or two without an owner. Many, or those of tenants that the catalogue has never heard of, are
//! what a lost or an older catalogue looks like; then the files are all that is left.

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};
use crate::store::catalogue::FILE;
use crate::store::{Options, Store};
use crate::work::blocking;

/// Where swept blobs go, beside `blobs/`, in a folder named by the time (unix seconds).
const TRASH: &str = "trash";
/// At most one of so many blobs is swept without the operator's word.
const SHARE: usize = 10;
/// Tenants named in an error.
const NAMED: usize = 5;

/// The files below `blobs/`, by what they are.
#[derive(Debug, Default)]
struct Found {
    /// Half-written: they have never been anything.
    halves: Vec<PathBuf>,
    /// Keys of blobs, owned or not: `{tenant}/{kind}/{id}`, a folder or a file.
    blobs: BTreeSet<String>,
}

/// Refuses to make a new catalogue over blobs that are there.
///
/// # Errors
/// UNKNOWN_BLOBS where there is no catalogue and there are blobs, unless they are to be adopted.
pub(super) async fn check_before_open(data_dir: &Path, options: &Options) -> Result<()> {
    let blobs = data_dir.join("blobs");
    if options.adopt_orphans || data_dir.join(FILE).exists() || !blobs.exists() {
        return Ok(());
    }
    let found = walk(blobs).await?;
    if found.blobs.is_empty() { Ok(()) } else { Err(unknown(data_dir, &tenants_of(&found.blobs))) }
}

impl Store {
    /// Sweeps `blobs/`. Only blobs of unknown tenants stop the start; whatever else goes wrong is logged, and the files stay.
    pub(super) async fn sweep(&self, data_dir: &Path, options: &Options) -> Result<()> {
        let owned = self.owned_blobs().await?;
        let found = walk(data_dir.join("blobs")).await?;
        // Of tenants that were deleted, whose ids are never given again: those are no sign of a wrong catalogue, however many.
        let deleted = self.tenant_ids("SELECT tenant FROM deleted_tenants").await?;
        let is_left = |blob: &String| blob.split('/').next().is_some_and(|tenant| deleted.contains(tenant));
        let orphans = found.blobs.iter().filter(|blob| !is_owned(blob, &owned)).cloned();
        let (left, orphans): (BTreeSet<_>, BTreeSet<_>) = orphans.partition(is_left);
        if !options.adopt_orphans {
            let strangers: BTreeSet<_> = &tenants_of(&orphans) - &self.tenant_ids("SELECT tenant FROM tenants").await?;
            if !strangers.is_empty() {
                return Err(unknown(data_dir, &strangers));
            }
        }
        discard(data_dir, &left);
        for half in &found.halves {
            tracing::info!(file = %half.display(), "removing a half-written file");
            warn_of(half, std::fs::remove_file(half));
        }
        let most = (found.blobs.len() / SHARE).max(1);
        if orphans.len() > most && !options.adopt_orphans {
            let all = found.blobs.len();
            tracing::warn!(
                "{} of {all} blobs have no row in the catalogue, more than the {most} that a start may sweep: they stay where they are. If the \
                 catalogue is an older one, put the right one back (docs/BACKUP.md); else start with --adopt-orphans, which moves them to {TRASH}/",
                orphans.len()
            );
        } else {
            discard(data_dir, &orphans);
        }
        Ok(())
    }

    /// The tenants that a query gives.
    async fn tenant_ids(&self, query: &'static str) -> Result<BTreeSet<String>> {
        Ok(sqlx::query_scalar(query).fetch_all(self.pool()).await?.into_iter().collect())
    }

    /// Every blob that a row owns.
    async fn owned_blobs(&self) -> Result<HashSet<String>> {
        let blobs = sqlx::query_scalar(
            "SELECT blob FROM versions UNION SELECT blob FROM datasets UNION SELECT result FROM jobs WHERE result IS NOT NULL",
        );
        Ok(blobs.fetch_all(self.pool()).await?.into_iter().collect())
    }
}

fn unknown(data_dir: &Path, tenants: &BTreeSet<String>) -> Error {
    let mut names = tenants.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    if tenants.len() > NAMED {
        names.push_str(", ...");
    }
    let message = format!(
        "holds blobs of tenants that the catalogue {FILE} has never known ({names}): it is missing, new, or of another folder, and nothing \
         has been touched. Put the right {FILE} back (docs/BACKUP.md), choose another --data-dir, or start with --adopt-orphans, which moves \
         the blobs to {}",
        data_dir.join(TRASH).display()
    );
    Error::precondition("UNKNOWN_BLOBS", data_dir.join("blobs").display(), message)
}

fn tenants_of(blobs: &BTreeSet<String>) -> BTreeSet<String> {
    blobs.iter().filter_map(|blob| blob.split('/').next()).map(str::to_owned).collect()
}

/// By its own key, or that of a folder around it.
fn is_owned(blob: &str, owned: &HashSet<String>) -> bool {
    Path::new(blob).ancestors().filter_map(Path::to_str).any(|key| owned.contains(key))
}

/// Walks the folder itself, because half-written files are invisible by key. What cannot be read is logged and not seen.
async fn walk(root: PathBuf) -> Result<Found> {
    let walk = move || {
        let (mut found, mut folders) = (Found::default(), vec![root.clone()]);
        while let Some(folder) = folders.pop() {
            let Some(entries) = warn_of(&folder, std::fs::read_dir(&folder)) else { continue };
            for entry in entries {
                let Some(path) = warn_of(&folder, entry).map(|entry| entry.path()) else { continue };
                if path.is_dir() {
                    folders.push(path);
                } else if is_half_written(&path) {
                    found.halves.push(path);
                } else {
                    found.blobs.extend(blob_of(&root, &path));
                }
            }
        }
        Ok(found)
    };
    blocking(walk).await
}

/// The blob that a file belongs to; `None` for one that lies where the store puts none.
fn blob_of(root: &Path, file: &Path) -> Option<String> {
    let key = file.strip_prefix(root).ok()?;
    let mut parts = key.components().map(|part| part.as_os_str().to_str());
    Some([parts.next()??, parts.next()??, parts.next()??].join("/"))
}

/// `LocalFileSystem` stages `name` as `name#1`, `name#2`, ...
fn is_half_written(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().contains('#'))
}

/// Moves blobs to the trash of this moment.
fn discard(data_dir: &Path, orphans: &BTreeSet<String>) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    for orphan in orphans {
        let (from, to) = (data_dir.join("blobs").join(orphan), data_dir.join(TRASH).join(now.to_string()).join(orphan));
        let moved = to.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::rename(&from, &to));
        if warn_of(&from, moved).is_some() {
            tracing::warn!(from = %from.display(), to = %to.display(), "a blob without an owner was moved");
        }
    }
}

/// Deletes what has been in the trash for longer than `kept`. Blocks.
pub(super) fn empty_trash(data_dir: &Path, kept: Duration) {
    let trash = data_dir.join(TRASH);
    if !trash.exists() {
        return;
    }
    let since = |name: &str| Some(UNIX_EPOCH + Duration::from_secs(name.parse().ok()?));
    for entry in warn_of(&trash, std::fs::read_dir(&trash)).into_iter().flatten().flatten() {
        let old = entry
            .file_name()
            .to_str()
            .and_then(since)
            .is_some_and(|since| SystemTime::now().duration_since(since).is_ok_and(|age| age > kept));
        if old && warn_of(&entry.path(), std::fs::remove_dir_all(entry.path())).is_some() {
            tracing::info!(folder = %entry.path().display(), "removed from the trash");
        }
    }
}

/// The value, or a line in the log with the path.
fn warn_of<T>(path: &Path, result: std::io::Result<T>) -> Option<T> {
    result.inspect_err(|error| tracing::warn!(path = %path.display(), %error, "left as it is")).ok()
}

#[cfg(test)]
mod tests;
