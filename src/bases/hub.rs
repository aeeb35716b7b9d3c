//! Downloads one file of a repository on the Hugging Face hub.
//!
//! The hub answers for a large file with its SHA-256 and a redirect to a store of blobs. What has come is kept under
//! the name of that content: a fetch that was interrupted goes on where it stopped, also in another process, and one of
//! changed content begins anew. The whole is checked against the digest before anybody sees it.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::TokioExecutor;
use rustls::{ClientConfig, RootCertStore};
use sha2::{Digest as _, Sha256};
use url::Url;

use super::{Progress, Stage, TICK, check, entries};
use crate::error::{Error, Result};

/// Where the hub is, unless `HF_ENDPOINT` names a mirror.
const ENDPOINT: &str = "https://huggingface.co";

/// How long a connection may take to open.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long an answer may bring nothing before the download is tried again.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// How many tries in a row may bring nothing.
const ATTEMPTS: u32 = 6;

/// The pause after the first try that brought nothing; it doubles.
const PAUSE: Duration = Duration::from_millis(500);

const MAX_REDIRECTS: usize = 10;

/// The hub, and who asks it.
pub(super) struct Hub {
    endpoint: Url,
    token: Option<HeaderValue>,
    pause: Duration,
}

/// A file of a repository.
#[derive(Clone, Copy)]
pub(super) struct RepoFile<'a> {
    pub owner: &'a str,
    pub repo: &'a str,
    pub path: &'a str,
}

impl std::fmt::Display for RepoFile<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "hf:{}/{}/{}", self.owner, self.repo, self.path)
    }
}

/// What the hub says of a file.
struct Content {
    /// The file at the commit that was found, so that all tries read the same content.
    url: Url,
    bytes: Option<u64>,
    /// In hex; none for a small file that lies in the repository itself.
    sha256: Option<String>,
    /// Names this content among others of the same file.
    tag: String,
}

/// Why a try has not brought the file.
enum Failure {
    /// Another try may bring the rest.
    Passing(String),
    Final(Error),
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Self::Final(e)
    }
}

impl Hub {
    /// Returns the hub that the environment names: `HF_ENDPOINT`; and its token: `HF_TOKEN`, the file `HF_TOKEN_PATH`,
    /// or the file that the hub's own tools keep it in.
    ///
    /// # Errors
    /// `INVALID_ENDPOINT` and `INVALID_TOKEN` where one of them is no URL or no token.
    pub fn from_env() -> Result<Self> {
        let set = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into());
        let token = set("HF_TOKEN").or_else(|| fs::read_to_string(token_file(set)?).ok());
        Self::new(endpoint.trim(), token.as_deref().map(str::trim).filter(|token| !token.is_empty()))
    }

    fn new(endpoint: &str, token: Option<&str>) -> Result<Self> {
        let invalid = |reason, name, why: &str| Error::invalid_because(reason, name, why.to_owned());
        let parsed = Url::parse(endpoint).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        let endpoint = parsed.ok_or_else(|| {
            invalid("INVALID_ENDPOINT", "HF_ENDPOINT", "is no URL that begins with https:// or http://")
        })?;
        let token = token.map(|token| {
            let mut value = HeaderValue::try_from(format!("Bearer {token}"))
                .map_err(|_| invalid("INVALID_TOKEN", "HF_TOKEN", "holds characters that no token has"))?;
            value.set_sensitive(true);
            Ok::<_, Error>(value)
        });
        Ok(Self { endpoint, token: token.transpose()?, pause: PAUSE })
    }

    /// Downloads a file into the folder `kept`, goes on with what is there of the same content, and returns its path.
    /// What has come stays where the download fails or the future is dropped.
    ///
    /// # Errors
    /// `DOWNLOAD_FAILED` says what the hub or the network said and what to do, `DIGEST_MISMATCH` that the content is
    /// not the hub's (it is removed then), [`Error::DiskFull`] names the file that could not grow.
    pub async fn fetch(&self, file: RepoFile<'_>, kept: &Path, progress: &mut impl FnMut(Progress)) -> Result<PathBuf> {
        progress(Progress { stage: Stage::Downloading, done: 0, total: None });
        let content = self.retried(file, async || self.find(file).await, || 0).await?;
        fs::create_dir_all(kept).map_err(|e| io_error(kept, e))?;
        for other in entries(kept)? {
            if !other.ends_with(&content.tag) {
                fs::remove_file(&other).map_err(|e| io_error(&other, e))?;
            }
        }
        let part = kept.join(&content.tag);
        let size = || fs::metadata(&part).map_or(0, |meta| meta.len());
        self.retried(file, async || self.go_on(file, &content, &part, progress).await, size).await?;
        if let Some(sha256) = &content.sha256 {
            progress(Progress { stage: Stage::Checking, done: 0, total: None });
            if let Err(e) = check(&part, sha256).await {
                fs::remove_file(&part).map_err(|e| io_error(&part, e))?;
                return Err(e);
            }
        }
        let name = file.path.rsplit('/').next().unwrap_or(file.path);
        let whole = kept.join(name);
        fs::rename(&part, &whole).map_err(|e| io_error(&part, e))?;
        Ok(whole)
    }

    /// Tries until it succeeds, fails for good, or has brought nothing [`ATTEMPTS`] times in a row. `brought` is how
    /// much there is.
    async fn retried<T>(
        &self,
        file: RepoFile<'_>,
        mut work: impl AsyncFnMut() -> Result<T, Failure>,
        brought: impl Fn() -> u64,
    ) -> Result<T> {
        let mut failures = 0;
        loop {
            let before = brought();
            let why = match work().await {
                Ok(value) => return Ok(value),
                Err(Failure::Final(e)) => return Err(e),
                Err(Failure::Passing(why)) => why,
            };
            failures = if brought() > before { 1 } else { failures + 1 };
            if failures == ATTEMPTS {
                let advice = match brought() {
                    0 => {
                        "check the network and the proxy (HTTPS_PROXY), or download the file yourself and give its path"
                    }
                    _ => "what has come is kept: the next try goes on there",
                };
                return Err(failed(file, format!("{why}; tried {ATTEMPTS} times; {advice}")));
            }
            tokio::time::sleep(self.pause * 2u32.pow(failures - 1)).await;
        }
    }

    /// Asks what the file is. Follows the hub's own redirects (a repository that was renamed), not the one to the
    /// content.
    async fn find(&self, file: RepoFile<'_>) -> Result<Content, Failure> {
        let first = self.url(file, "main");
        let mut url = first.clone();
        for _ in 0..MAX_REDIRECTS {
            let answer = self.ask(Method::HEAD, &url, 0).await?;
            let headers = answer.headers();
            let target = redirect(&answer, &url)?;
            let elsewhere = target.as_ref().is_none_or(|target| target.origin() != url.origin());
            if !elsewhere && !headers.contains_key("x-linked-etag") {
                url = target.unwrap_or(url);
                continue;
            }
            if target.is_none() && !answer.status().is_success() {
                return Err(self.refused(file, &answer, &url));
            }
            return Ok(self.content(file, headers, target.is_some()));
        }
        Err(Failure::Final(failed(file, format!("{first} redirects without end"))))
    }

    fn content(&self, file: RepoFile<'_>, headers: &HeaderMap, redirected: bool) -> Content {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let etag = text("x-linked-etag").or(text("etag")).unwrap_or_default();
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_ascii_lowercase();
        // The length of a redirect is that of its own text.
        let length = text("x-linked-size").or(text("content-length").filter(|_| !redirected));
        let commit = text("x-repo-commit").filter(|id| id.len() == 40 && id.bytes().all(|b| b.is_ascii_hexdigit()));
        let is_sha256 = etag.len() == 64 && etag.bytes().all(|b| b.is_ascii_hexdigit());
        let tag: crate::ids::Digest =
            Sha256::new().chain_update(etag.as_bytes()).chain_update(commit.unwrap_or("")).into();
        Content {
            url: self.url(file, commit.unwrap_or("main")),
            bytes: length.and_then(|length| length.parse().ok()),
            tag: if is_sha256 { etag.clone() } else { tag.hex() },
            sha256: is_sha256.then_some(etag),
        }
    }

    fn url(&self, file: RepoFile<'_>, revision: &str) -> Url {
        let mut url = self.endpoint.clone();
        let base = url.path().trim_end_matches('/').to_owned();
        url.set_path(&format!("{base}/{}/{}/resolve/{revision}/{}", file.owner, file.repo, file.path));
        url
    }

    /// Downloads what `part` still lacks.
    async fn go_on(
        &self,
        file: RepoFile<'_>,
        content: &Content,
        part: &Path,
        progress: &mut impl FnMut(Progress),
    ) -> Result<(), Failure> {
        let open = OpenOptions::new().create(true).append(true).open(part);
        let mut out = Partial::new(part, open.map_err(|e| io_error(part, e))?)?;
        if content.bytes.is_some_and(|bytes| out.len > bytes) {
            out.restart()?;
        }
        if out.len > 0 && content.bytes == Some(out.len) {
            return Ok(());
        }
        let (answer, url) = self.follow(file, &content.url, out.len).await?;
        match answer.status() {
            StatusCode::PARTIAL_CONTENT if range_start(answer.headers()) == Some(out.len) => {}
            // The server cannot go on: it sends all, or something else than what was asked for.
            StatusCode::OK => out.restart()?,
            StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                out.restart()?;
                return Err(Failure::Passing(format!("{} sent another part than was asked for", host(&url))));
            }
            _ => return Err(self.refused(file, &answer, &url)),
        }
        self.receive(file, answer.into_body(), content.bytes, &mut out, progress).await
    }

    async fn receive(
        &self,
        file: RepoFile<'_>,
        mut body: Incoming,
        total: Option<u64>,
        out: &mut Partial<'_>,
        progress: &mut impl FnMut(Progress),
    ) -> Result<(), Failure> {
        let mut shown = None::<Instant>;
        loop {
            if shown.is_none_or(|at| at.elapsed() >= TICK) {
                shown = Some(Instant::now());
                progress(Progress { stage: Stage::Downloading, done: out.len, total });
            }
            let silent = || Failure::Passing(format!("nothing came for {} s", IDLE_TIMEOUT.as_secs()));
            let frame = tokio::time::timeout(IDLE_TIMEOUT, body.frame()).await.map_err(|_| silent())?;
            let Some(frame) = frame else { break };
            let broke = |e| Failure::Passing(format!("the connection broke after {} bytes: {}", out.len, chain(&e)));
            let frame = frame.map_err(broke)?;
            if let Ok(data) = frame.into_data() {
                out.write(&data)?;
            }
            if total.is_some_and(|total| out.len > total) {
                out.restart()?;
                return Err(Failure::Final(failed(file, "the server sends more than the file holds; try again later")));
            }
        }
        match total {
            Some(total) if out.len < total => {
                Err(Failure::Passing(format!("the connection ended after {} of {total} bytes", out.len)))
            }
            _ => Ok(()),
        }
    }

    /// Asks for the content from a byte on, by way of any redirects. The answer, and who gave it.
    async fn follow(&self, file: RepoFile<'_>, url: &Url, from: u64) -> Result<(Response<Incoming>, Url), Failure> {
        let mut url = url.clone();
        for _ in 0..MAX_REDIRECTS {
            let answer = self.ask(Method::GET, &url, from).await?;
            match redirect(&answer, &url)? {
                Some(target) => url = target,
                None => return Ok((answer, url)),
            }
        }
        Err(Failure::Final(failed(file, format!("{url} redirects without end"))))
    }

    /// Sends one request. The token goes to the hub itself and to nobody that it redirects to.
    async fn ask(&self, method: Method, url: &Url, from: u64) -> Result<Response<Incoming>, Failure> {
        let mut request = Request::builder()
            .method(method)
            .uri(url.as_str())
            .header(header::USER_AGENT, concat!("tenora/", env!("CARGO_PKG_VERSION")))
            .header(header::ACCEPT_ENCODING, "identity");
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        if let Some(token) = self.token.as_ref().filter(|_| url.origin() == self.endpoint.origin()) {
            request = request.header(header::AUTHORIZATION, token);
        }
        let request = request.body(String::new()).map_err(Error::internal)?;
        let silent = || Failure::Passing(format!("{} did not answer for {} s", host(url), IDLE_TIMEOUT.as_secs()));
        tokio::time::timeout(IDLE_TIMEOUT, send(request))
            .await
            .map_err(|_| silent())?
            .map_err(|why| Failure::Passing(format!("{}: {why}", host(url))))
    }

    /// What an answer means that brings nothing.
    fn refused(&self, file: RepoFile<'_>, answer: &Response<Incoming>, url: &Url) -> Failure {
        let status = answer.status();
        let text = |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let ours = url.origin() == self.endpoint.origin();
        let said = format!("{} answers {status} {}", host(url), text("x-error-message"));
        let said = said.trim_end();
        let page = format!("{}/{}/{}", self.endpoint.as_str().trim_end_matches('/'), file.owner, file.repo);
        let advice = match (status, text("x-error-code")) {
            // A signed address of the content has run out; the hub gives a new one.
            (StatusCode::FORBIDDEN, _) if !ours => return Failure::Passing(said.to_owned()),
            (StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS, _) => return Failure::Passing(said.to_owned()),
            (status, _) if status.is_server_error() => return Failure::Passing(said.to_owned()),
            (_, "GatedRepo") | (StatusCode::FORBIDDEN, _) => {
                format!("accept the model's terms at {page}, and set HF_TOKEN to a token of that account that may read it")
            }
            (StatusCode::UNAUTHORIZED, _) if self.token.is_some() => {
                "check the name, and that HF_TOKEN is valid and may read this repository".into()
            }
            (StatusCode::UNAUTHORIZED, _) => {
                "there is no such repository, or it is private: check the name, or set HF_TOKEN to a token that may read it"
                    .into()
            }
            (StatusCode::NOT_FOUND, "EntryNotFound") => {
                format!("the repository holds no such file; {page}/tree/main lists what it holds")
            }
            (StatusCode::NOT_FOUND, _) => format!("check the name: there is no such file or repository; see {page}"),
            _ => "check the name and HF_ENDPOINT, or download the file yourself and give its path".into(),
        };
        Failure::Final(failed(file, format!("{said}; {advice}")))
    }
}

/// The file that has come so far.
struct Partial<'a> {
    path: &'a Path,
    file: File,
    len: u64,
}

impl<'a> Partial<'a> {
    fn new(path: &'a Path, file: File) -> Result<Self> {
        let len = file.metadata().map_err(|e| io_error(path, e))?.len();
        Ok(Self { path, file, len })
    }

    fn restart(&mut self) -> Result<()> {
        if self.len == 0 {
            return Ok(());
        }
        self.file.set_len(0).map_err(|e| io_error(self.path, e))?;
        self.len = 0;
        Ok(())
    }

    fn write(&mut self, data: &[u8]) -> Result<()> {
        self.file.write_all(data).map_err(|e| io_error(self.path, e))?;
        self.len += data.len() as u64;
        Ok(())
    }
}

/// Sends a request through the proxy that the environment names for it, or directly.
async fn send(request: Request<String>) -> Result<Response<Incoming>, String> {
    let mut http = HttpConnector::new();
    http.set_connect_timeout(Some(CONNECT_TIMEOUT));
    http.enforce_http(false);
    let builder = Client::builder(TokioExecutor::new());
    let tls = HttpsConnectorBuilder::new().with_tls_config(tls_config()?).https_or_http().enable_http1();
    let answer = match Matcher::from_env().intercept(request.uri()) {
        None => builder.build(tls.wrap_connector(http)).request(request).await,
        Some(proxy) => {
            let mut tunnel = Tunnel::new(proxy.uri().clone(), http);
            if let Some(auth) = proxy.basic_auth() {
                tunnel = tunnel.with_auth(auth.clone());
            }
            builder.build(tls.wrap_connector(tunnel)).request(request).await
        }
    };
    answer.map_err(|e| chain(&e))
}

/// Returns a client's configuration that trusts what the system trusts (or `SSL_CERT_FILE`, `SSL_CERT_DIR`).
fn tls_config() -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    // A certificate that cannot be read is not trusted; without any, the error of the handshake says so.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    Ok(config.map_err(|e| e.to_string())?.with_root_certificates(roots).with_no_client_auth())
}

/// Returns where an answer redirects to. One from https to http is refused: what comes that way may be anybody's.
fn redirect<B>(answer: &Response<B>, from: &Url) -> Result<Option<Url>, Failure> {
    if !answer.status().is_redirection() {
        return Ok(None);
    }
    let location = answer.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
    let target = location.and_then(|location| from.join(location).ok());
    match target {
        Some(target) if target.scheme() == "https" || target.scheme() == from.scheme() => Ok(Some(target)),
        _ => Err(Failure::Passing(format!("{} redirects to nowhere that is safe", host(from)))),
    }
}

/// Returns the first byte of a partial answer, from `bytes 5-9/10`.
fn range_start(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

fn host(url: &Url) -> &str {
    url.host_str().unwrap_or(url.as_str())
}

/// Returns an error's text with those of its causes, each once.
fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut next = e.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    if text.contains("UnknownIssuer") {
        text += " (where a proxy signs with its own certificate, name it in SSL_CERT_FILE; where the system has no certificates, install ca-certificates)";
    }
    text
}

fn token_file(set: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let cache = || set("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| Some(Path::new(&set("HOME")?).join(".cache")));
    let home = || set("HF_HOME").map(PathBuf::from).or_else(|| Some(cache()?.join("huggingface")));
    set("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(home()?.join("token")))
}

fn failed(file: RepoFile<'_>, why: impl Into<String>) -> Error {
    Error::precondition("DOWNLOAD_FAILED", file, why)
}

/// Returns what became of a file on this machine, with its path.
fn io_error(path: &Path, e: std::io::Error) -> Error {
    match Error::at(path)(e) {
        Error::Internal(why) => Error::precondition(
            "CACHE_UNUSABLE",
            path.display(),
            format!("{why}; TENORA_HOME says where downloads are kept"),
        ),
        full => full,
    }
}

#[cfg(test)]
mod tests;
