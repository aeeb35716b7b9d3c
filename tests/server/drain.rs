//! The way out: what is under way ends well, what is new goes elsewhere, and nothing holds the server up for ever.

use std::time::Duration;

use tenora::api::proto::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt as _;

use super::common::{TestServer, answer, generate};

fn part(part: upload_dataset_request::Part) -> UploadDatasetRequest {
    UploadDatasetRequest { part: Some(part) }
}

/// An upload that has begun and waits for more.
async fn begin_upload(
    server: &TestServer,
    key: &str,
) -> (mpsc::Sender<UploadDatasetRequest>, tokio::task::JoinHandle<Result<Dataset, tonic::Status>>) {
    let (sender, messages) = mpsc::channel(4);
    let header = UploadHeader { parent: "tenants/a".into(), dataset_id: "d".into(), ..Default::default() };
    sender.send(part(upload_dataset_request::Part::Header(header))).await.unwrap();
    let mut client = server.datasets(key).await;
    let call = async move { Ok(client.upload_dataset(ReceiverStream::new(messages)).await?.into_inner()) };
    let upload = tokio::spawn(call);
    // Time for the header to arrive; if it did not, the upload would be refused and the test fail.
    tokio::time::sleep(Duration::from_millis(300)).await;
    (sender, upload)
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_under_way_end_and_new_ones_are_refused() {
    let mut server = TestServer::start().await;
    let key = server.tenant("a").await;
    let mut generation = server.generation(&key).await;
    let mut health = HealthClient::new(server.channel().await);
    answer(&mut generation, generate("", "hello", 3)).await.unwrap();
    let (sender, upload) = begin_upload(&server, &key).await;

    server.begin_stop();
    let not_serving = async {
        let check = HealthCheckRequest::default();
        while health.check(check.clone()).await.unwrap().into_inner().status() == ServingStatus::Serving {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), not_serving).await.expect("health says NOT_SERVING");
    let mut refused = answer(&mut generation, generate("", "hello", 3)).await;
    while refused.is_ok() {
        refused = answer(&mut generation, generate("", "hello", 3)).await;
    }
    let status = refused.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.get_details_retry_info().is_some());

    let line = b"{\"prompt\":\"a\",\"completion\":\"b\"}".to_vec();
    sender.send(part(upload_dataset_request::Part::Data(line))).await.unwrap();
    drop(sender);
    assert_eq!(upload.await.unwrap().unwrap().records, 1);
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_ends_does_not_hold_the_server() {
    let server = TestServer::start_with(|config| config.limits.drain_timeout_seconds = 0).await;
    let key = server.tenant("a").await;
    let (_sender, _upload) = begin_upload(&server, &key).await;
    let mut health = HealthClient::new(server.channel().await);
    let _watch = health.watch(HealthCheckRequest::default()).await.unwrap();
    tokio::time::timeout(Duration::from_secs(20), server.stopped()).await.expect("the server ends");
}
