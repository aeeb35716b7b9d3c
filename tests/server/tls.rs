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
