//! TLS from PEM files.

use std::path::PathBuf;

use tenora::api::client::{Client, Target};
use tenora::api::proto::ListTenantsRequest;
use tenora::config::TlsFiles;

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
    if let Ok(client) = Client::connect(&plain).await {
        client.list_tenants(ListTenantsRequest::default()).await.unwrap_err();
    }
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_not_trusted_is_explained() {
    let files = TlsFiles { cert: certificate("server.pem"), key: certificate("server.key") };
    let server = TestServer::start_with(|config| config.tls = Some(files)).await;
    let connect = async |host: &str, ca: Option<&str>| {
        let server = format!("https://{host}:{}", server.addr.port());
        let target = Target { server, key: None, tls_ca: ca.map(certificate) };
        Client::connect(&target).await.map(drop).map_err(|e| e.message)
    };
    assert_eq!(connect("localhost", Some("ca.pem")).await, Ok(()));
    // The system's authorities do not know the tests'.
    let said = connect("localhost", None).await.unwrap_err();
    assert!(said.contains("does not know") && said.contains("--tls-ca FILE"), "{said}");
    let said = connect("[::1]", Some("ca.pem")).await.unwrap_err();
    assert!(said.contains("names") || said.contains("no server answers"), "{said}");
    let said = connect("127.0.0.2", Some("ca.pem")).await.unwrap_err();
    assert!(said.contains("names") || said.contains("no server answers"), "{said}");
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
