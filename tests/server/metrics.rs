//! The figures for Prometheus. They are the process's, so one test starts the exporter.

use std::net::TcpListener;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::common::{TestServer, answer, generate};

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_measured_by_method_and_code() {
    let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let server = TestServer::start_with(|config| config.metrics_listen = Some(addr)).await;
    let key = server.tenant("a").await;
    answer(&mut server.generation(&key).await, generate("", "hello", 3)).await.unwrap();
    answer(&mut server.generation("").await, generate("", "hello", 3)).await.unwrap_err();
    server.idle().await;
    let mut connection = TcpStream::connect(addr).await.unwrap();
    connection.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut text = String::new();
    connection.read_to_string(&mut text).await.unwrap();
    for line in [
        "tenora_calls_total{method=\"/tenora.v1.GenerationService/Generate\",code=\"Ok\"}",
        "tenora_calls_total{method=\"/tenora.v1.GenerationService/Generate\",code=\"Unauthenticated\"}",
        "tenora_call_seconds_bucket{method=\"/tenora.v1.GenerationService/Generate\",le=\"0.001\"}",
        // Gauges are the process's, and other tests' servers set them too: that they are there is all that can be said.
        "\ntenora_adapters_resident ",
        "\ntenora_adapters_host_bytes ",
        "\ntenora_kv_blocks_used ",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    server.stopped().await;
}
