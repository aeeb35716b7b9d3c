//! Spans of calls, as a collector gets them.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tonic::Request;

use super::common::{TestServer, generate};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

/// Takes messages until one has been seen that `enough` likes; gives all spans of [`TRACE`].
async fn collect(listener: TcpListener, enough: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    let mut spans = Vec::new();
    while !enough(&spans) {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut text = Vec::new();
        let mut piece = [0; 4096];
        while !is_whole(&text) {
            match stream.read(&mut piece).await.unwrap() {
                0 => break,
                n => text.extend_from_slice(&piece[..n]),
            }
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await.unwrap();
        let text = String::from_utf8(text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("POST /v1/traces HTTP/1.1"), "{head}");
        let message: Value = serde_json::from_str(body).unwrap();
        let all = message["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().unwrap().clone();
        spans.extend(all.into_iter().filter(|span| span["traceId"] == TRACE));
    }
    spans
}

fn is_whole(text: &[u8]) -> bool {
    let text = String::from_utf8_lossy(text);
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
    length.is_some_and(|length: usize| body.len() >= length)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_and_its_parts_are_spans_of_the_callers_trace() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let collector: SocketAddr = listener.local_addr().unwrap();
    let server = TestServer::start_with(|config| config.otlp_endpoint = Some(format!("http://{collector}"))).await;
    let key = server.tenant("traced").await;
    let with = |mut request: Request<_>, flags: &str| {
        let value = format!("00-{TRACE}-00f067aa0ba902b7-{flags}");
        request.metadata_mut().insert("traceparent", value.parse().unwrap());
        request
    };
    let mut client = server.generation(&key).await;
    // Not to be recorded.
    let mut unseen = client.generate(with(Request::new(generate("", "no", 2)), "00")).await.unwrap().into_inner();
    while unseen.message().await.unwrap().is_some() {}
    let mut answer = client.generate(with(Request::new(generate("", "hello", 5)), "01")).await.unwrap().into_inner();
    while answer.message().await.unwrap().is_some() {}
    client.generate(with(Request::new(generate("nothing", "hello", 5)), "01")).await.unwrap_err();

    let calls = |spans: &[Value]| spans.iter().filter(|span| span["kind"] == 2).count();
    let spans =
        tokio::time::timeout(Duration::from_secs(60), collect(listener, |spans| calls(spans) >= 2)).await.unwrap();
    assert_eq!((calls(&spans), spans.len()), (2, 5), "{spans:#?}");
    let named = |name: &str| spans.iter().find(|span| span["name"] == name).unwrap_or_else(|| panic!("no {name}"));
    let call = named("tenora.v1.GenerationService/Generate");
    assert_eq!(call["parentSpanId"], "00f067aa0ba902b7");
    let at = |span: &Value, edge: &str| span[edge].as_str().unwrap().parse::<u128>().unwrap();
    for name in ["queue", "prefill", "decode"] {
        assert_eq!(named(name)["parentSpanId"], call["spanId"], "{name}");
        assert!(at(named(name), "startTimeUnixNano") <= at(named(name), "endTimeUnixNano"), "{name}");
    }
    assert_eq!(named("decode")["attributes"][0]["value"]["stringValue"], "5");
    let failed = spans.iter().find(|span| span["status"]["code"] == 2).expect("the refused call");
    assert!(failed["status"]["message"].as_str().unwrap().contains("adapter"), "{failed}");
    assert!(failed["attributes"].to_string().contains("tenants/traced"), "{failed}");
    server.stopped().await;
}
