//! The way in: while the base loads, health and errors are answered.

use std::time::Duration;

use tenora::error::Error;
use tenora::model::Model;
use tokio::sync::oneshot;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt as _;

use super::common::{TestServer, answer, generate};

/// A server that loads until it is told that its base is there, or why not.
async fn loading() -> (TestServer, oneshot::Sender<Result<(), Error>>) {
    let (sender, told) = oneshot::channel();
    let loaded = async { told.await.unwrap_or(Err(Error::internal("nobody told"))) };
    (TestServer::start_after(loaded, Model::tiny(1), |_| {}).await, sender)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_loads_says_so_and_then_serves_on_the_same_connection() {
    let (server, loaded) = loading().await;
    let mut health = HealthClient::new(server.channel().await);
    let mut generation = server.generation(&server.operator).await;
    let check = HealthCheckRequest::default();
    let status = health.check(check.clone()).await.unwrap().into_inner().status();
    assert_eq!(status, ServingStatus::NotServing);
    let refused = answer(&mut generation, generate("", "hello", 3)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(refused.message().contains("loading") && refused.get_details_retry_info().is_some(), "{refused:?}");
    let stranger = answer(&mut server.generation("").await, generate("", "hello", 3)).await.unwrap_err();
    assert_eq!(stranger.code(), Code::Unauthenticated, "a stranger learns nothing");

    let mut watch = health.watch(check).await.unwrap().into_inner();
    loaded.send(Ok(())).unwrap();
    let serving = async { while watch.message().await.unwrap().unwrap().status() != ServingStatus::Serving {} };
    tokio::time::timeout(Duration::from_secs(10), serving).await.expect("health says SERVING");
    answer(&mut generation, generate("", "hello", 3)).await.unwrap();
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_base_that_does_not_load_ends_the_server_with_the_reason() {
    let (server, loaded) = loading().await;
    loaded.send(Err(Error::invalid("base", "is no base"))).unwrap();
    assert!(server.ended().await.unwrap_err().to_string().contains("is no base"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_loads_can_be_stopped() {
    let (server, _loaded) = loading().await;
    tokio::time::timeout(Duration::from_secs(10), server.stopped()).await.expect("the server ends");
}
