//! TLS from PEM files.

use std::path::PathBuf;
use std::time::Duration;

use tenora::api::client::{Client, Target};
use tenora::api::proto::ListTenantsRequest;
use tenora::config::TlsFiles;
use tokio::net::{TcpListener, TcpStream};

use super::common::TestServer;

fn certificate(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/server/certificates", name].iter().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_travel_encrypted() {
    let files = TlsFiles { cert: certificate("server.pem"), key: certificate("server.key") };
    let server = TestServer::start_with(|config| config.tls = Some(files)).await;
    let target = |scheme: &str| Target {
        server: format!("{scheme}://localhost:{}", server.addr.port()),
        key: Some(server.operator.clone()),
        tls_ca: Some(certificate("ca.pem")),
    };
    let client = Client::connect(&target("https")).await.unwrap();
    assert_eq!(client.list_tenants(ListTenantsRequest::default()).await.unwrap().tenants.len(), 1);
    let plain = Target { tls_ca: None, ..target("http") };
    // The client's half of a connection may be open before the server has read what is no handshake.
    let answered = match Client::connect(&plain).await {
        Ok(client) => client.list_tenants(ListTenantsRequest::default()).await.map(drop),
        Err(error) => Err(error),
    };
    answered.expect_err("a key is not taken in plain text");
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_not_trusted_is_explained() {
    let files = TlsFiles { cert: certificate("server.pem"), key: certificate("server.key") };
    let server = TestServer::start_with(|config| config.tls = Some(files)).await;
    // Another address of this machine, from which the server can be reached too.
    let elsewhere = TcpListener::bind("127.0.0.2:0").await.unwrap();
    let (addr, other) = (server.addr, elsewhere.local_addr().unwrap());
    let forward = tokio::spawn(async move {
        let (mut client, _) = elsewhere.accept().await.unwrap();
        let mut server = TcpStream::connect(addr).await.unwrap();
        // The client ends it.
        drop(tokio::io::copy_bidirectional(&mut client, &mut server).await);
    });
    let connect = async |address: String, ca: Option<&str>| {
        let server = format!("https://{address}");
        let target = Target { server, key: None, tls_ca: ca.map(certificate) };
        Client::connect(&target).await.map(drop).map_err(|e| e.message)
    };
    let localhost = || format!("localhost:{}", addr.port());
    assert_eq!(connect(localhost(), Some("ca.pem")).await, Ok(()));
    // The system's authorities do not know the tests'.
    let said = connect(localhost(), None).await.unwrap_err();
    assert!(said.contains("does not know") && said.contains("--tls-ca FILE"), "{said}");
    let said = connect(other.to_string(), Some("ca.pem")).await.unwrap_err();
    assert!(said.contains("names"), "{said}");
    forward.await.unwrap();
    server.stopped().await;
}

/// New files are served without a restart; what is no certificate with its key is not.
#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let files = TlsFiles { cert: folder.path().join("cert.pem"), key: folder.path().join("key.pem") };
    let copy = |from: &str, to: &PathBuf| {
        // In one step, and with a time of change of its own.
        let new = folder.path().join("new");
        std::fs::write(&new, std::fs::read(certificate(from)).unwrap()).unwrap();
        std::fs::rename(&new, to).unwrap();
    };
    copy("server.pem", &files.cert);
    copy("server.key", &files.key);
    let served = files.clone();
    let server = TestServer::start_with(|config| config.tls = Some(served)).await;
    let is_trusted = async |ca: &str| {
        let address = format!("https://localhost:{}", server.addr.port());
        let target = Target { server: address, key: None, tls_ca: Some(certificate(ca)) };
        Client::connect(&target).await.is_ok()
    };
    assert!(is_trusted("ca.pem").await && !is_trusted("renewed-ca.pem").await);
    // A certificate without its key, until that comes too.
    copy("renewed.pem", &files.cert);
    for _ in 0..30 {
        assert!(is_trusted("ca.pem").await, "what was read before is served on");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    copy("renewed.key", &files.key);
    let taken_over = async {
        while !is_trusted("renewed-ca.pem").await {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), taken_over).await.expect("it is read again");
    assert!(!is_trusted("ca.pem").await);
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn https_to_a_server_without_tls_says_so() {
    let server = TestServer::start().await;
    let target = |address: String| Target { server: address, key: None, tls_ca: Some(certificate("ca.pem")) };
    let said = Client::connect(&target(format!("https://{}", server.addr))).await.map(drop).unwrap_err().message;
    assert!(said.contains("http://"), "{said}");
    // Without a scheme, this machine's is http.
    let plain = Target { tls_ca: None, ..target(server.addr.to_string()) };
    assert!(Client::connect(&plain).await.is_ok());
    server.stopped().await;
}
