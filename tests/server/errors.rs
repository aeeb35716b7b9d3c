//! Errors as clients see them: a code, one `ErrorInfo`, and the details that fit.

use std::time::Duration;

use prost::Message as _;
use tenora::api::proto::*;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

use super::common::{TestServer, generate, reason};
use super::reflection::call;

#[tokio::test(flavor = "multi_thread")]
async fn errors_say_what_and_where() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let mut client = server.generation(&key).await;

    let sampling = Some(Sampling { top_p: Some(2.0), ..Default::default() });
    let status = client.generate(GenerateRequest { sampling, ..generate("", "x", 1) }).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(reason(&status), "INVALID_ARGUMENT");
    assert_eq!(status.get_details_bad_request().unwrap().field_violations[0].field, "sampling.top_p");

    let status = client.generate(generate("tenants/a/adapters/none", "x", 1)).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::NotFound, "NOT_FOUND"));
    assert_eq!(status.get_details_resource_info().unwrap().resource_name, "tenants/a/adapters/none");

    let status = client.generate(generate("", &"x".repeat(1000), 1)).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("1000") && status.message().contains("256"), "{}", status.message());
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_tonic_refuses_has_details_too() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let too_large = generate("", &"x".repeat(5 << 20), 1);
    let status = server.generation(&key).await.generate(too_large).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::OutOfRange, "MESSAGE_TOO_LARGE"));
    assert!(status.message().contains("max_message_bytes"), "{}", status.message());

    let transport = server.transport(&key).await;
    let status = call(transport.clone(), "/tenora.v1.GenerationService/Nothing", Vec::new()).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Unimplemented, "UNKNOWN_METHOD"));
    let status = call(transport, "/tenora.v1.AdapterService/GetAdapter", vec![0xff; 9]).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::InvalidArgument, "MALFORMED_MESSAGE"));
    server.stopped().await;
}

/// Every method, also those that take streams: what does not decode is the caller's mistake.
#[tokio::test(flavor = "multi_thread")]
async fn malformed_messages_are_invalid_arguments() {
    let server = TestServer::start().await;
    let transport = server.transport(&server.operator).await;
    let api = super::reflection::Api::discover(transport.clone()).await;
    assert!(api.methods.len() > 30, "{}", api.methods.len());
    for method in &api.methods {
        for message in [vec![0xff; 9], vec![0x0a, 0x7f, 1], vec![0x07]] {
            let answer = call(transport.clone(), &method.path, message.clone()).await;
            let status = answer.expect_err(&method.path);
            let got = (status.code(), reason(&status));
            assert_eq!(got, (Code::InvalidArgument, "MALFORMED_MESSAGE".into()), "{} {message:?}", method.path);
        }
        // A message of some type: one without such a field passes over it, and the reflection service over what does not decode.
        if let Err(status) = call(transport.clone(), &method.path, vec![0x0a, 0x02, 0xff, 0xfe]).await {
            assert_eq!(status.code(), Code::InvalidArgument, "{}: {status:?}", method.path);
        }
    }
    server.stopped().await;
}

/// tonic refuses such an answer when it has begun.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_too_large_is_refused_with_details() {
    let server = TestServer::start_with(|config| config.limits.max_message_bytes = 1024).await;
    let mut tenants = server.tenants(&server.operator).await;
    for n in 0..10 {
        let display_name = "x".repeat(200);
        let create = CreateTenantRequest { tenant_id: format!("t{n}"), display_name, ..Default::default() };
        tenants.create_tenant(create).await.unwrap();
    }
    let status = tenants.list_tenants(ListTenantsRequest::default()).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::OutOfRange, "MESSAGE_TOO_LARGE"));
    assert!(status.message().contains("max_message_bytes"), "{}", status.message());
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn compressed_messages_are_taken_and_bounded_unpacked() {
    use tonic::codec::CompressionEncoding::Gzip;
    let server = TestServer::start_with(|config| config.limits.max_message_bytes = 64 << 10).await;
    let key = server.tenant("a").await;
    let mut client = server.base(&key).await.send_compressed(Gzip).accept_compressed(Gzip);
    let text = |n| TokenizeRequest { input: Some(tokenize_request::Input::Text("x".repeat(n))), ..Default::default() };
    let answer = client.tokenize(text(1000)).await.unwrap();
    assert_eq!(answer.metadata().get("grpc-encoding").map(|v| v.to_str().unwrap()), Some("gzip"));
    assert_eq!(answer.into_inner().token_ids.len(), 1000);
    // A few kilobytes on the wire, megabytes unpacked.
    let status = client.tokenize(text(8 << 20)).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::OutOfRange, "MESSAGE_TOO_LARGE"));
    let mut plain = server.base(&key).await;
    let answer = plain.get_base(GetBaseRequest {}).await.unwrap();
    assert!(answer.metadata().get("grpc-encoding").is_none(), "nobody gets what they did not ask for");
    server.stopped().await;
}

/// One call with this `grpc-timeout`, to its end. Not by tonic's client, which would end it by a timer of its own.
async fn timed(server: &TestServer, key: &str, path: &str, message: Vec<u8>, timeout: &str) -> Status {
    let connection = tokio::net::TcpStream::connect(server.addr).await.unwrap();
    let (mut client, connection) = h2::client::handshake(connection).await.unwrap();
    let connection = tokio::spawn(connection);
    let request = tonic::codegen::http::Request::post(format!("http://{}{path}", server.addr))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("authorization", format!("Bearer {key}"))
        .header("grpc-timeout", timeout)
        .body(())
        .unwrap();
    let (answer, mut body) = client.send_request(request, false).unwrap();
    let mut frame = vec![0];
    frame.extend((message.len() as u32).to_be_bytes());
    frame.extend(message);
    // The answer may have come already, and the server wants no more.
    let _ = body.send_data(frame.into(), true);
    let answer = answer.await.unwrap();
    let mut status = Status::from_header_map(answer.headers());
    let mut body = answer.into_body();
    while let Some(data) = body.data().await {
        body.flow_control().release_capacity(data.unwrap().len()).unwrap();
    }
    if let Some(trailers) = body.trailers().await.unwrap() {
        status = Status::from_header_map(&trailers);
    }
    connection.abort();
    status.expect("a status")
}

#[tokio::test(flavor = "multi_thread")]
async fn tiny_and_malformed_deadlines_are_told_apart() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let path = "/tenora.v1.GenerationService/Generate";
    let message = generate("", "hello", 200).encode_to_vec();
    for round in 0..10 {
        for timeout in ["0n", "1n", "1u", "999u", "1m"] {
            let ended = timed(&server, &key, path, message.clone(), timeout).await;
            let got = (ended.code(), reason(&ended));
            assert_eq!(got, (Code::DeadlineExceeded, "DEADLINE_EXCEEDED".into()), "{timeout} {round}");
        }
    }
    for timeout in ["x", "1", "123456789S", "-1S"] {
        let status = timed(&server, &key, path, message.clone(), timeout).await;
        assert_eq!((status.code(), reason(&status).as_str()), (Code::InvalidArgument, "INVALID_TIMEOUT"), "{timeout}");
    }
    let status = timed(&server, &key, "/grpc.health.v1.Health/Check", Vec::new(), "0n").await;
    assert_eq!(status.code(), Code::DeadlineExceeded);
    let status = timed(&server, &key, "/grpc.health.v1.Health/Check", Vec::new(), "9S").await;
    assert_eq!(status.code(), Code::Ok);
    server.idle().await;
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_reflections_tell_of_everything() {
    use tonic_reflection::pb::v1alpha::ServerReflectionRequest;
    use tonic_reflection::pb::v1alpha::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1alpha::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1alpha::server_reflection_response::MessageResponse;
    let server = TestServer::start().await;
    let transport = server.transport(&server.operator).await;
    let mut client = ServerReflectionClient::new(transport.clone());
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = client.server_reflection_info(futures::stream::iter([request])).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else { panic!("no list") };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    for name in
        ["tenora.v1.BaseService", "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"]
    {
        assert!(names.iter().any(|known| known == name), "{name} in {names:?}");
    }
    let methods = super::reflection::Api::discover(transport).await.methods;
    assert!(methods.iter().any(|m| m.path == "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"));
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_of_megabytes_gets_an_answer_that_fits_a_header() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let status = server.generation(&key).await.generate(generate(&"x/".repeat(1 << 20), "x", 1)).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().len() < 2000, "{}", status.message().len());
    server.stopped().await;
}

/// A client's own timer covers the time to the first answer; what comes after is the server's to end.
#[tokio::test(flavor = "multi_thread")]
async fn deadlines_end_streams() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    server.upload(&key, "a", "d").await.unwrap();
    let train = TrainRequest {
        parent: "tenants/a".into(),
        adapter_id: "x".into(),
        dataset: "tenants/a/datasets/d".into(),
        objective: Some(train_request::Objective::Sft(SftSpec {})),
        hyperparameters: Some(Hyperparameters { max_steps: Some(10_000), ..Default::default() }),
        ..Default::default()
    };
    let mut client = server.training(&key).await;
    let name = client.train(train).await.unwrap().into_inner().name;
    let mut request = Request::new(WatchTrainingJobRequest { name, after_sequence: 0 });
    request.set_timeout(Duration::from_millis(500));
    let mut events = client.watch_training_job(request).await.unwrap().into_inner();
    let status = loop {
        match events.message().await {
            Ok(event) => drop(event.expect("the job goes on for longer")),
            Err(status) => break status,
        }
    };
    assert_eq!((status.code(), reason(&status).as_str()), (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"));
    server.stopped().await;
}

/// Also answers that wait for the client, of services that know no deadline.
#[tokio::test(flavor = "multi_thread")]
async fn deadlines_end_every_stream() {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    let server = TestServer::start().await;
    let transport = server.transport(&server.operator).await;
    let mut watch = Request::new(HealthCheckRequest::default());
    watch.set_timeout(Duration::from_millis(500));
    let mut watched = HealthClient::new(transport.clone()).watch(watch).await.unwrap().into_inner();
    let mut silent = Request::new(futures::stream::pending());
    silent.set_timeout(Duration::from_millis(500));
    let asked = ServerReflectionClient::new(transport).server_reflection_info(silent).await;
    let mut asked = asked.unwrap().into_inner();
    let ended = async {
        let health = loop {
            if let Err(status) = watched.message().await {
                break status;
            }
        };
        [health, asked.message().await.unwrap_err()]
    };
    for status in tokio::time::timeout(Duration::from_secs(60), ended).await.expect("they end") {
        assert_eq!((status.code(), reason(&status).as_str()), (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"));
    }
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_uploads_end_and_leave_nothing() {
    let server = TestServer::start_with(|config| {
        config.limits.upload_idle_seconds = 1;
        config.limits.max_uploads = 1;
    })
    .await;
    let key = server.tenant("a").await;
    let header = UploadHeader { parent: "tenants/a".into(), dataset_id: "d".into(), ..Default::default() };
    let first = UploadDatasetRequest { part: Some(upload_dataset_request::Part::Header(header)) };
    let (sender, messages) = tokio::sync::mpsc::channel(4);
    sender.send(first).await.unwrap();
    let mut client = server.datasets(&key).await;
    let messages = tokio_stream::wrappers::ReceiverStream::new(messages);
    let silent = tokio::spawn(async move { client.upload_dataset(messages).await });
    // There is one place, and it is taken.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let status = server.upload(&key, "a", "e").await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::ResourceExhausted, "LIMIT_REACHED"));
    assert_eq!(status.get_details_quota_failure().unwrap().violations[0].subject, "max_uploads");
    assert!(status.get_details_retry_info().is_some());

    let status = silent.await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("upload_idle_seconds"), "{}", status.message());
    drop(sender);
    server.wait_for_no_blobs().await;
    server.upload(&key, "a", "e").await.unwrap();
    server.stopped().await;
}
