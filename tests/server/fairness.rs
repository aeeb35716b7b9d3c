//! Tenants who take all that they can get, and those who come after them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tonic::transport::Endpoint;
use tonic::{Code, Request};
use tonic_types::StatusExt as _;

use tenora::api::proto::generation_service_client::GenerationServiceClient;

use super::common::{TestServer, Transport, answer, generate};

const GREEDY: usize = 4;
const REQUESTS: usize = 256;

/// One request after the other without an end; those refused come again when they were told to.
async fn endless(
    server: Arc<TestServer>,
    mut client: GenerationServiceClient<Transport>,
    stop: Arc<AtomicBool>,
    refused: Arc<AtomicUsize>,
) {
    while !stop.load(Ordering::Relaxed) {
        match answer(&mut client, generate("", "without end", 150)).await {
            Ok(_) => {}
            Err(status) => {
                assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
                let after =
                    status.get_details_retry_info().and_then(|info| info.retry_delay).expect("when to come again");
                refused.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(after.min(Duration::from_millis(200))).await;
            }
        }
    }
    drop(server);
}

/// Four tenants fill the queue for good. A fifth that holds nothing is served, and so is the operator.
#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_that_holds_nothing_is_served_beside_four_who_fill_the_queue() {
    let server = Arc::new(TestServer::start().await);
    let (stop, refused) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut callers = Vec::new();
    for tenant in 0..GREEDY {
        let key = server.tenant(&format!("greedy{tenant}")).await;
        // A connection has 256 streams at most.
        let client = server.generation(&key).await;
        for _ in 0..REQUESTS {
            callers.push(tokio::spawn(endless(server.clone(), client.clone(), stop.clone(), refused.clone())));
        }
    }
    let fifth = server.tenant("fifth").await;
    // Full, or as good as.
    while server.parts.guard.queued() < (GREEDY * REQUESTS) as u64 - 8 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let served = async {
        for key in [&fifth, &server.operator, &fifth, &server.operator, &fifth] {
            let answered = answer(&mut server.generation(key).await, generate("", "hello", 5)).await.unwrap();
            assert_eq!(answered.ids.len(), 5);
        }
    };
    tokio::time::timeout(Duration::from_secs(60), served).await.expect("nobody is locked out");
    stop.store(true, Ordering::Relaxed);
    for caller in callers {
        caller.await.unwrap();
    }
    server.idle().await;
    Arc::into_inner(server).unwrap().stopped().await;
}

/// Four tenants who never read the answers that they ask for. They are computed and wait to be read; their places are others'.
#[tokio::test(flavor = "multi_thread")]
async fn answers_that_nobody_reads_keep_nobody_out() {
    let server = TestServer::start().await;
    let mut unread = Vec::new();
    for tenant in 0..GREEDY {
        let key = server.tenant(&format!("greedy{tenant}")).await;
        let endpoint = Endpoint::from_shared(format!("http://{}", server.addr)).unwrap();
        // Not a byte of an answer is let through.
        let channel = endpoint.initial_stream_window_size(0).connect().await.unwrap();
        for _ in 0..200 {
            let mut request = Request::new(generate("", "hello", 1));
            request.metadata_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
            let mut client = GenerationServiceClient::new(channel.clone());
            unread.push(client.generate(request).await.unwrap().into_inner());
        }
    }
    let computed = async {
        while server.parts.guard.queued() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), computed).await.expect("what is computed gives its place back");
    assert!(server.parts.memory.used() > 0, "what is unread is counted");
    let fifth = server.tenant("fifth").await;
    for key in [&fifth, &server.operator] {
        answer(&mut server.generation(key).await, generate("", "hello", 5)).await.unwrap();
    }
    drop(unread);
    server.idle().await;
    server.stopped().await;
}
