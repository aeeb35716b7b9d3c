//! Clients who hold what others need: places, connections, memory; and what ends the calls of those who may not call any more.

use std::time::Duration;

use futures::StreamExt as _;
use prost::Message as _;
use tenora::api::proto::*;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Endpoint;
use tonic::{Code, Request, Status};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_client::HealthClient};
use tonic_prost::ProstCodec;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_types::StatusExt as _;

use super::common::{TestServer, answer, generate, reason};
use super::reflection::call;

/// The limit that an error names.
fn limit_of(status: &Status) -> String {
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    status.get_details_quota_failure().unwrap().violations[0].subject.clone()
}

/// An upload that sends these bytes again and again, with a pause between.
async fn slow_upload(server: &TestServer, key: &str, data: Vec<u8>, pause: Duration) -> Status {
    let (sender, messages) = tokio::sync::mpsc::channel(1);
    let header = UploadHeader { parent: "tenants/a".into(), dataset_id: "d".into(), ..Default::default() };
    let part = |part| UploadDatasetRequest { part: Some(part) };
    let send = async move {
        let mut next = upload_dataset_request::Part::Header(header);
        while sender.send(part(next)).await.is_ok() {
            tokio::time::sleep(pause).await;
            next = upload_dataset_request::Part::Data(data.clone());
        }
    };
    let mut client = server.datasets(key).await;
    let (answered, ()) = tokio::join!(client.upload_dataset(ReceiverStream::new(messages)), send);
    answered.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_makes_no_progress_ends() {
    let server = TestServer::start_with(|config| {
        let limits = &mut config.limits;
        (limits.upload_idle_seconds, limits.upload_seconds, limits.upload_min_bytes_per_second) = (1, 3, 1000);
    })
    .await;
    let key = server.tenant("a").await;
    let pause = Duration::from_millis(20);
    let line = b"{\"prompt\":\"a\",\"completion\":\"b\"}\n";
    assert_eq!(limit_of(&slow_upload(&server, &key, Vec::new(), pause).await), "upload_idle_seconds", "empty messages");
    let status = slow_upload(&server, &key, b"\n".to_vec(), pause).await;
    assert_eq!(limit_of(&status), "upload_min_bytes_per_second");
    let status = slow_upload(&server, &key, line.repeat(10), pause).await;
    assert_eq!(limit_of(&status), "upload_seconds", "fast enough, and without an end");
    server.upload(&key, "a", "d").await.unwrap();
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_message_becomes_is_known_before_it_is_made() {
    let server = TestServer::start_with(|config| config.limits.max_request_memory_bytes = 32 << 20).await;
    let key = server.tenant("a").await;
    let chat = Chat { messages: vec![ChatMessage::default(); 900_000] };
    let request = GenerateRequest { prompt: Some(generate_request::Prompt::Chat(chat)), ..generate("", "", 1) };
    let bytes = request.encode_to_vec();
    assert!(bytes.len() < 4 << 20);
    let transport = server.transport(&key).await;
    let status = call(transport.clone(), "/tenora.v1.GenerationService/Generate", bytes).await.unwrap_err();
    assert_eq!(limit_of(&status), "max_request_memory_bytes");
    assert_eq!(server.parts.memory.used(), 0);
    let status = call(transport, "/tenora.v1.GenerationService/Generate", vec![0; (4 << 20) + 1]).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::OutOfRange, "MESSAGE_TOO_LARGE"));
    assert!(status.message().contains("max_request_bytes"), "{}", status.message());
    let text = "word ".repeat(40);
    assert_eq!(answer(&mut server.generation(&key).await, generate("", &text, 2)).await.unwrap().ids.len(), 2);
    server.idle().await;
    assert_eq!(server.parts.memory.used(), 0);
    server.stopped().await;
}

/// A client that sends its message and never ends the call would keep the decoded form in memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_does_not_end_in_time_is_refused() {
    let server = TestServer::start_with(|config| config.limits.request_seconds = 1).await;
    let key = server.tenant("a").await;
    let mut client = Grpc::new(server.transport(&key).await);
    client.ready().await.unwrap();
    let request = GetUsageRequest { name: "tenants/a".into() };
    let endless = futures::stream::once(async { request }).chain(futures::stream::pending());
    let path = PathAndQuery::from_static("/tenora.v1.TenantService/GetUsage");
    let codec: ProstCodec<GetUsageRequest, TenantUsage> = ProstCodec::default();
    let refused = client.client_streaming(Request::new(endless), path, codec).await.unwrap_err();
    assert_eq!(limit_of(&refused), "request_seconds");
    server.stopped().await;
}

/// Waits until the server closes a connection.
async fn closed(connection: &mut TcpStream) {
    let mut rest = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(30), connection.read_to_end(&mut rest));
    // A reset says the same.
    drop(read.await.expect("it is closed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_do_nothing_make_room_and_end() {
    let server = TestServer::start_with(|config| {
        (config.limits.max_connections, config.limits.handshake_seconds) = (6, 3600);
    })
    .await;
    let key = server.tenant("a").await;
    let mut silent = Vec::new();
    for _ in 0..12 {
        silent.push(TcpStream::connect(server.addr).await.unwrap());
    }
    // The oldest strangers had to go for the others; whoever has a key gets in all the same.
    closed(&mut silent[0]).await;
    let mut client = server.generation(&key).await;
    answer(&mut client, generate("", "hello", 2)).await.unwrap();
    for _ in 0..12 {
        silent.push(TcpStream::connect(server.addr).await.unwrap());
    }
    closed(&mut silent[12]).await;
    answer(&mut client, generate("", "hello", 2)).await.expect("a connection that has shown a key stays");
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_does_not_begin_to_speak_ends() {
    for tls in [false, true] {
        let server = TestServer::start_with(|config| {
            config.limits.handshake_seconds = 1;
            let file = |name| [env!("CARGO_MANIFEST_DIR"), "tests/server/certificates", name].iter().collect();
            let files = tenora::config::TlsFiles { cert: file("server.pem"), key: file("server.key") };
            config.tls = tls.then_some(files);
        })
        .await;
        closed(&mut TcpStream::connect(server.addr).await.unwrap()).await;
        server.stopped().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn few_may_watch_the_servers_health() {
    // A quarter for each address.
    let server = TestServer::start_with(|config| config.limits.max_health_watches = 8).await;
    let mut health = HealthClient::new(server.channel().await);
    let mut watches = Vec::new();
    for _ in 0..2 {
        watches.push(health.watch(HealthCheckRequest::default()).await.unwrap());
    }
    let refused = health.watch(HealthCheckRequest::default()).await.unwrap_err();
    assert_eq!(limit_of(&refused), "max_health_watches");
    health.check(HealthCheckRequest::default()).await.unwrap();
    drop(watches);
    let mut again = health.watch(HealthCheckRequest::default()).await;
    for _ in 0..200 {
        if again.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        again = health.watch(HealthCheckRequest::default()).await;
    }
    drop(again.unwrap());
    server.stopped().await;
}

/// A question that is never asked to its end.
async fn endless_check(server: &TestServer) -> Result<(), Status> {
    let mut client = Grpc::new(server.channel().await);
    client.ready().await.unwrap();
    let path = PathAndQuery::from_static("/grpc.health.v1.Health/Check");
    let codec: ProstCodec<HealthCheckRequest, HealthCheckResponse> = ProstCodec::default();
    client.client_streaming(Request::new(futures::stream::pending()), path, codec).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn questions_about_health_are_small_and_come_in_time() {
    let server = TestServer::start().await;
    let mut health = HealthClient::new(server.channel().await);
    let large = health.check(HealthCheckRequest { service: "x".repeat(2000) }).await.unwrap_err();
    assert_eq!((large.code(), reason(&large).as_str()), (Code::OutOfRange, "MESSAGE_TOO_LARGE"));
    assert!(large.message().contains("1024 bytes (limit max_health_request_bytes)"), "{}", large.message());
    let small = health.check(HealthCheckRequest { service: "x".repeat(200) }).await.unwrap_err();
    assert_eq!((small.code(), reason(&small).as_str()), (Code::NotFound, "NOT_FOUND"));
    let slow = endless_check(&server).await.unwrap_err();
    assert_eq!(slow.code(), Code::DeadlineExceeded, "{slow:?}");
    server.stopped().await;
}

/// Whoever has no key holds little, from as many connections as they like.
#[tokio::test(flavor = "multi_thread")]
async fn few_calls_without_a_key_are_under_way() {
    let server = TestServer::start_with(|config| config.limits.max_keyless_calls = 8).await;
    let key = server.tenant("a").await;
    // An address has half at most.
    let mut held: futures::stream::FuturesUnordered<_> = (0..5).map(|_| endless_check(&server)).collect();
    let refused = held.next().await.unwrap().unwrap_err();
    assert_eq!(limit_of(&refused), "max_keyless_calls");
    assert!(refused.get_details_retry_info().is_some());
    let mut health = HealthClient::new(server.channel().await);
    let refused = health.check(HealthCheckRequest::default()).await.unwrap_err();
    assert_eq!(limit_of(&refused), "max_keyless_calls");
    answer(&mut server.generation(&key).await, generate("", "hello", 2)).await.expect("a key is let in");
    drop(held);
    let given_back = async {
        while health.check(HealthCheckRequest::default()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), given_back).await.expect("the places are given back");
    server.stopped().await;
}

/// Calls that last keep no more connections for one tenant than it leaves to others.
#[tokio::test(flavor = "multi_thread")]
async fn one_tenant_does_not_hold_all_connections() {
    let server = TestServer::start_with(|config| config.limits.max_connections = 6).await;
    let [greedy, other] = [server.tenant("a").await, server.tenant("b").await];
    let mut streams = Vec::new();
    for _ in 0..6 {
        let mut client = ServerReflectionClient::new(server.transport(&greedy).await);
        let message_request = Some(MessageRequest::ListServices(String::new()));
        let list = ServerReflectionRequest { host: String::new(), message_request };
        let endless = futures::stream::iter([list]).chain(futures::stream::pending());
        let mut answers = client.server_reflection_info(endless).await.unwrap().into_inner();
        answers.message().await.unwrap().expect("a list");
        streams.push(answers);
    }
    for key in [&server.operator, &other] {
        answer(&mut server.generation(key).await, generate("", "hello", 2)).await.expect("there is room");
    }
    drop(streams);
    server.stopped().await;
}

/// An answer that goes on for as long as it is read, and whose first token has been read.
async fn running(server: &TestServer, key: &str) -> tonic::Streaming<GenerateResponse> {
    let mut messages = server.generation(key).await.generate(generate("", "hello", 240)).await.unwrap().into_inner();
    while messages.message().await.unwrap().unwrap().token_ids.is_empty() {}
    messages
}

async fn last(mut messages: tonic::Streaming<GenerateResponse>) -> Result<(), Status> {
    while let Some(message) = messages.next().await {
        message?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_and_a_deleted_tenant_end_what_runs() {
    // One at a time, so that what waits cannot end by itself.
    let server = TestServer::start_with(|config| {
        (config.limits.max_running, config.limits.max_step_rows) = (1, 2);
    })
    .await;
    let (first, busy) = (server.tenant("a").await, server.tenant("b").await);
    let mut tenants = server.tenants(&server.operator).await;
    let create = CreateApiKeyRequest { parent: "tenants/a".into(), ..Default::default() };
    let second = tenants.create_api_key(create).await.unwrap().into_inner();
    let holder = running(&server, &busy).await;
    let mut waits = Vec::new();
    // So many that the last one cannot have its turn while the tenant is deleted.
    for key in std::iter::repeat_n(&first, 200).chain([&second.secret]) {
        waits.push(server.generation(key).await.generate(generate("", "hello", 240)).await.unwrap().into_inner());
    }
    let name = second.api_key.unwrap().name;
    tenants.revoke_api_key(RevokeApiKeyRequest { name }).await.unwrap();
    let status = last(waits.pop().unwrap()).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Unauthenticated, "UNAUTHENTICATED"));
    assert!(status.message().contains("revoked"), "{}", status.message());
    let refused = server.generation(&second.secret).await.generate(generate("", "x", 1)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "and at once for new calls");

    server.upload(&first, "a", "d").await.unwrap();
    let train = TrainRequest {
        parent: "tenants/a".into(),
        adapter_id: "t".into(),
        dataset: "tenants/a/datasets/d".into(),
        objective: Some(train_request::Objective::Sft(SftSpec::default())),
        hyperparameters: Some(Hyperparameters { max_steps: Some(100_000), ..Default::default() }),
        ..Default::default()
    };
    server.training(&first).await.train(train).await.unwrap();
    tenants.delete_tenant(DeleteTenantRequest { name: "tenants/a".into() }).await.expect("its job ends for it");
    let status = last(waits.pop().unwrap()).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::NotFound, "NOT_FOUND"));
    assert!(status.message().contains("tenants/a"), "{}", status.message());
    assert!(last(holder).await.is_ok(), "others go on");
    server.idle().await;
    server.stopped().await;
}

/// The answer of a call of one message is counted until it is sent.
#[tokio::test(flavor = "multi_thread")]
async fn whole_answers_that_nobody_reads_are_counted() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let endpoint = Endpoint::from_shared(format!("http://{}", server.addr)).unwrap();
    let channel = endpoint.initial_stream_window_size(0).connect().await.unwrap();
    let mut calls = Vec::new();
    for _ in 0..4 {
        let text = "word ".repeat(20_000);
        let input = Some(tokenize_request::Input::Text(text));
        let mut request = Request::new(TokenizeRequest { input, ..Default::default() });
        request.metadata_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
        let mut client = base_service_client::BaseServiceClient::new(channel.clone());
        calls.push(tokio::spawn(async move { client.tokenize(request).await }));
    }
    let counted = async {
        while server.parts.memory.used() < 4 * 100_000 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), counted).await.expect("they wait, and are counted");
    calls.iter().for_each(tokio::task::JoinHandle::abort);
    drop(channel);
    let given_back = async {
        while server.parts.memory.used() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), given_back).await.expect("a client that goes gives all back");
    server.stopped().await;
}
