use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::*;
use crate::bases::tests::remote;
use crate::bases::{Cache, cached_in};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const FILE: RepoFile<'static> = RepoFile { owner: "owner", repo: "repo", path: "sub/base.gguf" };
const SPEC: &str = "hf:owner/repo/sub/base.gguf";

/// The content of the file.
fn whole() -> Vec<u8> {
    (0..200_000u32).map(|i| (i * 7 % 251) as u8).collect()
}

fn sha256(data: &[u8]) -> String {
    let digest: crate::ids::Digest = Sha256::new().chain_update(data).into();
    digest.hex()
}

/// A request as the server has read it.
#[derive(Debug, Clone)]
struct Asked {
    method: String,
    path: String,
    range: Option<String>,
    token: Option<String>,
}

impl Asked {
    /// The first byte that is asked for.
    fn from(&self) -> usize {
        let range = self.range.as_deref().map(|range| range.trim_start_matches("bytes=").trim_end_matches('-'));
        range.map_or(0, |from| from.parse().expect("a number"))
    }
}

/// A server that answers every request with the bytes that a function gives, and then closes the connection.
struct Server {
    url: String,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Server {
    async fn start(answer: impl Fn(&Asked) -> Vec<u8> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = asked.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = stream.read_u8().await else { break };
                    head.push(byte);
                }
                let request = parse(&String::from_utf8_lossy(&head));
                let answer = answer(&request);
                seen.lock().expect("no panic").push(request);
                // The client may have gone.
                let _ = stream.write_all(&answer).await;
                let _ = stream.shutdown().await;
            }
        });
        Self { url, asked }
    }

    fn asked(&self) -> Vec<Asked> {
        self.asked.lock().expect("no panic").clone()
    }

    fn hub(&self, token: Option<&str>) -> Hub {
        Hub { pause: Duration::from_millis(1), ..Hub::new(&self.url, token).expect("a URL") }
    }
}

fn parse(head: &str) -> Asked {
    let mut lines = head.lines();
    let mut words = lines.next().unwrap_or_default().split(' ').map(String::from);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let headers: Vec<(String, String)> =
        lines.filter_map(|line| line.split_once(": ")).map(|(k, v)| (k.to_ascii_lowercase(), v.to_owned())).collect();
    let header = |name| headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
    Asked { method, path, range: header("range"), token: header("authorization") }
}

fn reply(status: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 {status}\r\nconnection: close\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    [text.as_bytes(), b"\r\n", body].concat()
}

/// What the hub says of the file: its digest, its size, and where the content is.
fn found(location: &str) -> Vec<u8> {
    let etag = format!("\"{}\"", sha256(&whole()));
    let size = whole().len().to_string();
    let headers =
        [("x-linked-etag", &*etag), ("x-linked-size", &size), ("x-repo-commit", COMMIT), ("location", location)];
    reply("302 Found", &[&headers[..], &[("content-length", "0")]].concat(), b"")
}

/// The content from a byte on, of which only the first `sent` bytes are sent.
fn part(data: &[u8], from: usize, sent: usize) -> Vec<u8> {
    let length = (data.len() - from).to_string();
    let range = format!("bytes {from}-{}/{}", data.len() - 1, data.len());
    let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
    let headers = [("content-length", &*length), ("content-range", &range)];
    reply(status, &headers[..if from > 0 { 2 } else { 1 }], &data[from..(from + sent).min(data.len())])
}

fn cache(root: &Path, hub: Hub) -> Cache {
    Cache { root: root.to_owned(), python: "nothing".into(), hub }
}

fn text<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.expect_err("an error").to_string()
}

/// What lies in the cache besides locks.
fn left(root: &Path) -> Vec<String> {
    let names = entries(root).expect("a folder").into_iter();
    let names = names.map(|path| path.file_name().expect("a name").to_string_lossy().into_owned());
    names.filter(|name| !name.ends_with(".lock")).collect()
}

#[tokio::test]
async fn a_file_comes_by_way_of_the_store_without_the_token() {
    let store = Server::start(|asked| part(&whole(), asked.from(), usize::MAX)).await;
    let location = format!("{}/blobs/1?signature=a%2Fb", store.url);
    let hub = Server::start(move |_| found(&location)).await;
    let dir = tempfile::tempdir().expect("a folder");
    let cache = cache(dir.path(), hub.hub(Some("hf_secret")));
    let mut seen = Vec::new();
    let path = cache.fetch(remote(SPEC), |progress| seen.push(progress)).await.expect("fetched");
    assert_eq!(fs::read(&path).expect("a file"), whole());
    assert!(path.ends_with("hf--owner--repo--sub--base.gguf/base.gguf"), "{path:?}");
    assert_eq!(left(dir.path()), ["hf--owner--repo--sub--base.gguf"]);
    assert_eq!(cached_in(dir.path()).expect("listed")[0].spec, SPEC);
    let stages: Vec<_> = seen.iter().map(|progress| progress.stage).collect();
    assert!(stages.starts_with(&[Stage::Downloading]) && stages.ends_with(&[Stage::Checking]), "{stages:?}");
    assert!(seen.iter().any(|progress| progress.total == Some(200_000)), "{seen:?}");

    let asked: Vec<_> = hub.asked().into_iter().map(|asked| (asked.method, asked.path, asked.token)).collect();
    let token = Some("Bearer hf_secret".to_owned());
    assert_eq!(
        asked,
        [
            ("HEAD".into(), "/owner/repo/resolve/main/sub/base.gguf".into(), token.clone()),
            ("GET".into(), format!("/owner/repo/resolve/{COMMIT}/sub/base.gguf"), token),
        ],
        "the content is asked for at the commit that was found"
    );
    assert_eq!(store.asked()[0].token, None, "the token stays with the hub");
    assert_eq!(store.asked()[0].path, "/blobs/1?signature=a%2Fb");
    cache.fetch(remote(SPEC), |_| {}).await.expect("it is in the cache");
    assert_eq!(store.asked().len(), 1);
}

#[tokio::test]
async fn a_repository_that_was_renamed_and_a_small_file_are_found() {
    let hub = Server::start(|asked| match (&*asked.method, &*asked.path) {
        (_, path) if path.starts_with("/owner/") => {
            let moved = path.replace("/owner/", "/new/");
            reply("307 Temporary Redirect", &[("location", &moved), ("content-length", "9")], b"Moved to ")
        }
        ("HEAD", _) => reply("200 OK", &[("etag", "W/\"abc\""), ("content-length", "4")], b""),
        _ => part(b"tiny", asked.from(), usize::MAX),
    })
    .await;
    let dir = tempfile::tempdir().expect("a folder");
    let path = hub.hub(None).fetch(FILE, dir.path(), &mut |_| {}).await.expect("fetched");
    assert_eq!(fs::read(path).expect("a file"), b"tiny");
}

/// The connection breaks after each 30,000 bytes: every try asks for what is lacking and nothing else.
#[tokio::test]
async fn a_connection_that_breaks_is_gone_on_with() {
    let hub = Server::start(|asked| match &*asked.method {
        "HEAD" => found("/content"),
        _ if asked.path != "/content" => found("/content"),
        _ => part(&whole(), asked.from(), 30_000),
    })
    .await;
    let dir = tempfile::tempdir().expect("a folder");
    let path = hub.hub(None).fetch(FILE, dir.path(), &mut |_| {}).await.expect("fetched");
    assert_eq!(fs::read(path).expect("a file"), whole());
    let asked: Vec<usize> = hub.asked().iter().filter(|asked| asked.path == "/content").map(Asked::from).collect();
    assert_eq!(asked, [0, 30_000, 60_000, 90_000, 120_000, 150_000, 180_000]);
}

#[tokio::test]
async fn a_later_fetch_goes_on_and_changed_content_begins_anew() {
    let allowed = Arc::new(AtomicUsize::new(50_000));
    let limit = allowed.clone();
    let hub = Server::start(move |asked| match &*asked.method {
        "HEAD" => found("/content"),
        _ => part(&whole(), asked.from(), limit.load(Ordering::Relaxed).saturating_sub(asked.from())),
    })
    .await;
    let dir = tempfile::tempdir().expect("a folder");
    let cache = cache(dir.path(), hub.hub(None));
    let said = text(cache.fetch(remote(SPEC), |_| {}).await);
    assert!(said.contains("after 50000 bytes") && said.contains("goes on there"), "{said}");
    assert_eq!(left(dir.path()), [".hf--owner--repo--sub--base.gguf.partial"]);
    assert!(cached_in(dir.path()).expect("listed").is_empty(), "no half of a base is shown");

    allowed.store(usize::MAX, Ordering::Relaxed);
    let before = hub.asked().len();
    let path = cache.fetch(remote(SPEC), |_| {}).await.expect("fetched");
    assert_eq!(fs::read(path).expect("a file"), whole());
    assert_eq!(hub.asked()[before + 1].from(), 50_000);
    assert_eq!(left(dir.path()), ["hf--owner--repo--sub--base.gguf"]);

    let other = tempfile::tempdir().expect("a folder");
    fs::write(other.path().join("of-another-content"), "old").expect("written");
    let path = hub.hub(None).fetch(FILE, other.path(), &mut |_| {}).await.expect("fetched");
    assert_eq!((fs::read(path).expect("a file"), left(other.path())), (whole(), vec!["base.gguf".into()]));
}

#[tokio::test]
async fn a_dropped_fetch_keeps_what_has_come() {
    let hub = Server::start(|asked| match &*asked.method {
        "HEAD" => found("/content"),
        _ => part(&whole(), asked.from(), 70_000),
    })
    .await;
    // It tries again after a minute; the fetch is dropped meanwhile.
    let patient = Hub { pause: Duration::from_secs(60), ..hub.hub(None) };
    let dir = tempfile::tempdir().expect("a folder");
    let cache = cache(dir.path(), patient);
    let fetch = cache.fetch(remote(SPEC), |_| {});
    let part = dir.path().join(".hf--owner--repo--sub--base.gguf.partial").join(sha256(&whole()));
    let come = async {
        while fs::metadata(&part).map_or(0, |meta| meta.len()) < 70_000 {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        result = fetch => panic!("{result:?}"),
        _ = tokio::time::timeout(Duration::from_secs(60), come) => {}
    }
    assert_eq!(fs::read(&part).expect("kept"), whole()[..70_000]);
    assert!(dir.path().join(".hf--owner--repo--sub--base.gguf.lock").exists());
}

#[tokio::test]
async fn a_server_that_cannot_go_on_sends_all_again() {
    let hub = Server::start(|asked| match &*asked.method {
        "HEAD" => found("/content"),
        _ => part(&whole(), 0, if asked.range.is_none() { 1_000 } else { usize::MAX }),
    })
    .await;
    let dir = tempfile::tempdir().expect("a folder");
    let path = hub.hub(None).fetch(FILE, dir.path(), &mut |_| {}).await.expect("fetched");
    assert_eq!(fs::read(path).expect("a file"), whole());
}

#[tokio::test]
async fn content_of_another_digest_or_length_is_not_kept() {
    for (length, reason) in [(200_000, "SHA-256"), (200_001, "more than the file holds")] {
        let hub = Server::start(move |asked| match &*asked.method {
            "HEAD" => found("/content"),
            _ => part(&vec![7; length], asked.from(), usize::MAX),
        })
        .await;
        let dir = tempfile::tempdir().expect("a folder");
        let said = text(hub.hub(None).fetch(FILE, dir.path(), &mut |_| {}).await);
        assert!(said.contains(reason), "{said}");
        let bytes: u64 =
            entries(dir.path()).expect("a folder").iter().map(|p| p.metadata().expect("there").len()).sum();
        assert_eq!(bytes, 0, "nothing of it is left");
    }
}

#[tokio::test]
async fn a_refusal_says_what_to_do() {
    let cases: [(&str, &str, Option<&str>, &str); 6] = [
        ("401 Unauthorized", "RepoNotFound", None, "set HF_TOKEN"),
        ("401 Unauthorized", "RepoNotFound", Some("hf_x"), "HF_TOKEN is valid"),
        ("401 Unauthorized", "GatedRepo", None, "accept the model's terms at"),
        ("403 Forbidden", "", Some("hf_x"), "accept the model's terms at"),
        ("404 Not Found", "EntryNotFound", None, "/owner/repo/tree/main"),
        ("404 Not Found", "RepoNotFound", None, "check the name"),
    ];
    for (status, code, token, advice) in cases {
        let headers = [("x-error-code", code), ("x-error-message", "so it is"), ("content-length", "0")];
        let hub = Server::start(move |_| reply(status, &headers, b"")).await;
        let dir = tempfile::tempdir().expect("a folder");
        let said = text(hub.hub(token).fetch(FILE, dir.path(), &mut |_| {}).await);
        let named = said.starts_with(SPEC) && said.contains(status) && said.contains("so it is");
        assert!(named && said.contains(advice), "{status} {code}: {said}");
        assert!(!said.contains("hf_x"), "the token is not shown: {said}");
        assert_eq!(hub.asked().len(), 1, "asking again would not help");
    }
}

/// The hub is busy twice; a signed address has run out once.
#[tokio::test]
async fn what_passes_is_tried_again() {
    let count = AtomicUsize::new(0);
    let store = Server::start(move |asked| match count.fetch_add(1, Ordering::Relaxed) {
        0 => reply("403 Forbidden", &[("content-length", "0")], b""),
        _ => part(&whole(), asked.from(), usize::MAX),
    })
    .await;
    let location = format!("{}/blob", store.url);
    let count = AtomicUsize::new(0);
    let hub = Server::start(move |_| match count.fetch_add(1, Ordering::Relaxed) {
        0 => reply("503 Service Unavailable", &[("content-length", "0")], b""),
        1 => reply("429 Too Many Requests", &[("content-length", "0")], b""),
        _ => found(&location),
    })
    .await;
    let dir = tempfile::tempdir().expect("a folder");
    let path = hub.hub(None).fetch(FILE, dir.path(), &mut |_| {}).await.expect("fetched");
    assert_eq!(fs::read(path).expect("a file"), whole());

    let busy = Server::start(|_| reply("503 Service Unavailable", &[("content-length", "0")], b"")).await;
    let said = text(busy.hub(None).fetch(FILE, dir.path(), &mut |_| {}).await);
    assert!(said.contains("503") && said.contains("HTTPS_PROXY"), "{said}");
    assert_eq!(busy.asked().len(), ATTEMPTS as usize);
}

#[tokio::test]
async fn redirects_end_and_never_leave_tls() {
    let circle = Server::start(|asked| reply("302 Found", &[("location", &*asked.path), ("content-length", "0")], b""));
    let circle = circle.await;
    let dir = tempfile::tempdir().expect("a folder");
    let said = text(circle.hub(None).fetch(FILE, dir.path(), &mut |_| {}).await);
    assert!(said.contains("redirects without end"), "{said}");
    assert_eq!(circle.asked().len(), MAX_REDIRECTS);

    let answer = |location: &str| {
        let builder = Response::builder().status(302).header("location", location);
        builder.body(()).expect("an answer")
    };
    let secure = Url::parse("https://hub.test/a/b").expect("a URL");
    assert!(redirect(&answer("http://store.test/x"), &secure).is_err());
    let target = redirect(&answer("c?d"), &secure).ok().flatten().expect("a target");
    assert_eq!(target.as_str(), "https://hub.test/a/c?d");
}

/// A device on which nothing can be written stands in for a full disk.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_full_disk_is_named_with_the_path() {
    let hub = Server::start(|asked| match &*asked.method {
        "HEAD" => found("/content"),
        _ => part(&whole(), asked.from(), usize::MAX),
    })
    .await;
    let dir = tempfile::tempdir().expect("a folder");
    let part = dir.path().join(sha256(&whole()));
    std::os::unix::fs::symlink("/dev/full", &part).expect("a link");
    let error = hub.hub(None).fetch(FILE, dir.path(), &mut |_| {}).await.expect_err("no room");
    assert!(matches!(&error, Error::DiskFull { path } if *path == part.to_string_lossy()), "{error:?}");
}

#[test]
fn the_environment_is_read_with_care() {
    for endpoint in ["", "hub.test", "ftp://hub.test", "file:///etc"] {
        assert!(text(Hub::new(endpoint, None).map(|_| ())).contains("HF_ENDPOINT"), "{endpoint}");
    }
    let error = text(Hub::new("https://hub.test", Some("a\nb")).map(|_| ()));
    assert!(error.contains("HF_TOKEN") && !error.contains("a\nb"), "{error}");
    let mirror = Hub::new("https://mirror.test/hub/", None).expect("a URL");
    assert_eq!(mirror.url(FILE, "main").as_str(), "https://mirror.test/hub/owner/repo/resolve/main/sub/base.gguf");

    let file = |set: &[(&str, &str)]| {
        token_file(|name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    };
    assert_eq!(file(&[("HF_TOKEN_PATH", "/t"), ("HF_HOME", "/h"), ("HOME", "/u")]), Some("/t".into()));
    assert_eq!(file(&[("HF_HOME", "/h"), ("HOME", "/u")]), Some("/h/token".into()));
    assert_eq!(file(&[("XDG_CACHE_HOME", "/c"), ("HOME", "/u")]), Some("/c/huggingface/token".into()));
    assert_eq!(file(&[("HOME", "/u")]), Some("/u/.cache/huggingface/token".into()));
    assert_eq!(file(&[]), None);
}
