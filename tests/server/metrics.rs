//! The metrics port. Its figures are the process's, so one test looks at them.

use std::net::{SocketAddr, TcpListener};

use tenora::api::proto::*;
use tenora::error::Error;
use tenora::model::Model;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::common::{TestServer, answer, generate};

fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// The whole answer to one question.
async fn ask(addr: SocketAddr, question: &str) -> String {
    let mut connection = TcpStream::connect(addr).await.unwrap();
    connection.write_all(format!("{question} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
    let mut text = String::new();
    connection.read_to_string(&mut text).await.unwrap();
    text
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_and_tokens_are_measured() {
    let addr = free_port();
    let server = TestServer::start_with(|config| {
        config.metrics_listen = Some(addr);
        config.limits.max_metric_tenants = 1;
        // Of 14 blocks: an answer of 200 tokens fits, and next to nothing of another beside it.
        config.limits.kv_cache_bytes = 56 << 10;
    })
    .await;
    let (key, other) = (server.tenant("measured").await, server.tenant("later").await);
    // To its end: a client that goes after the last message may have cancelled the call.
    let mut whole = server.generation(&key).await.generate(generate("", "hello", 3)).await.unwrap().into_inner();
    while whole.message().await.unwrap().is_some() {}
    answer(&mut server.generation(&other).await, generate("", "hello!", 4)).await.unwrap();
    answer(&mut server.generation("").await, generate("", "hello", 3)).await.unwrap_err();
    server.idle().await;
    let ended = "tenora_calls_total{method=\"/tenora.v1.GenerationService/Generate\",code=\"Ok\"}";
    let counted = async {
        while !ask(addr, "GET /metrics").await.contains(ended) {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), counted)
        .await
        .expect("a call is counted when it has ended");
    let text = ask(addr, "GET /metrics").await;
    for line in [
        "tenora_calls_total{method=\"/tenora.v1.GenerationService/Generate\",code=\"Unauthenticated\"}",
        "tenora_call_seconds_bucket{method=\"/tenora.v1.GenerationService/Generate\",le=\"0.001\"}",
        // Gauges are the process's, and other tests' servers set them too: that they are there is all that can be said.
        "\ntenora_adapters_resident ",
        "\ntenora_adapters_host_bytes ",
        "\ntenora_kv_blocks_used ",
        "\ntenora_calls_under_way ",
        "\ntenora_uploads_under_way ",
        "\ntenora_reads_under_way ",
        "\ntenora_request_memory_bytes ",
        // Of one tenant each: no other test's server shows tenants.
        "\ntenora_generated_tokens_total{tenant=\"measured\"} 3\n",
        "\ntenora_prompt_tokens_total{tenant=\"measured\"} 5\n",
        "\ntenora_generated_tokens_total{tenant=\"other\"} 4\n",
        "\ntenora_prompt_tokens_total{tenant=\"other\"} 6\n",
        "\ntenora_queue_seconds_count{tenant=\"measured\"} 1\n",
        "\ntenora_time_to_first_token_seconds_count{tenant=\"measured\"} 1\n",
        "\ntenora_time_between_tokens_seconds_count{tenant=\"measured\"} 2\n",
        "tenora_time_between_tokens_seconds_bucket{tenant=\"measured\",le=\"0.03\"}",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    assert!(!text.contains("tenant=\"later\""), "one tenant has a name of its own");
    // Two answers to one prompt run side by side, unless the first is done before the second has begun.
    let mut preempted = false;
    for seed in 0..50 {
        let sampling = Sampling { n: Some(2), temperature: Some(1.0), seed: Some(seed), ..Default::default() };
        let two = GenerateRequest { sampling: Some(sampling), ..generate("", "hello", 200) };
        let mut answers = server.generation(&key).await.generate(two).await.unwrap().into_inner();
        while answers.message().await.unwrap().is_some() {}
        let text = ask(addr, "GET /metrics").await;
        let count = text.split("\ntenora_preemptions_total{tenant=\"measured\"} ").nth(1).expect("it is there");
        preempted = !count.starts_with("0\n");
        if preempted {
            break;
        }
    }
    assert!(preempted, "two answers took turns");
    assert!(ask(addr, "GET /other").await.starts_with("HTTP/1.1 404"));
    assert!(ask(addr, "POST /metrics").await.starts_with("HTTP/1.1 405"));
    server.stopped().await;
}

/// As gRPC's health: not while the base loads, then, and not while the server drains.
#[tokio::test(flavor = "multi_thread")]
async fn health_is_that_of_grpc() {
    let addr = free_port();
    let (loaded, told) = oneshot::channel::<()>();
    let wait = async { told.await.map_err(Error::internal) };
    let mut server = TestServer::start_after(wait, Model::tiny(1), |config| config.metrics_listen = Some(addr)).await;
    while TcpStream::connect(addr).await.is_err() {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert!(ask(addr, "GET /health").await.starts_with("HTTP/1.1 503"), "it loads");
    loaded.send(()).unwrap();
    while !ask(addr, "GET /health").await.starts_with("HTTP/1.1 200") {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let key = server.tenant("a").await;
    // An answer under way, so that the drain lasts.
    let mut stream = server.generation(&key).await.generate(generate("", "hello", 200)).await.unwrap().into_inner();
    server.begin_stop();
    let mut seen = false;
    while let Ok(Some(GenerateResponse { .. })) = stream.message().await {
        seen = seen || ask(addr, "GET /health").await.starts_with("HTTP/1.1 503");
    }
    assert!(seen, "it drains");
    server.stopped().await;
}
