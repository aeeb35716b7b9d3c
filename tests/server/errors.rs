//! Errors as clients see them: a code, one `ErrorInfo`, and the details that fit.

use std::time::Duration;

use tenora::api::proto::*;
use tonic::{Code, Request};
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
    assert_eq!(reason(&status), "MALFORMED_MESSAGE");
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
