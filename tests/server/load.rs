//! Clients that do not behave.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use tonic::{Code, Request};

use super::common::{TestServer, answer, generate};

const CALLS: u64 = 1000;

/// A generate call whose client, by chance, waits for the end, goes away, or has little time. The seed decides.
async fn call(server: &TestServer, key: &str, seed: u64) {
    let mut client = server.generation(key).await;
    let adapter = ["", "tenants/a/adapters/x", "tenants/a/adapters/y"][(seed % 3) as usize];
    let x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let tokens = 1 + (x % 60) as u32;
    let request = generate(adapter, &"hello ".repeat(1 + (x % 7) as usize), tokens);
    match x / 64 % 4 {
        0 => assert_eq!(answer(&mut client, request).await.unwrap().ids.len(), tokens as usize),
        1 => {
            let mut messages = client.generate(request).await.unwrap().into_inner();
            let wanted = (x / 256 % 20) as usize;
            for message in messages.by_ref().take(wanted).collect::<Vec<_>>().await {
                message.unwrap();
            }
        }
        2 => {
            // Gone before the answer begins, or soon after.
            let wait = Duration::from_micros(x / 256 % 5000);
            drop(tokio::time::timeout(wait, answer(&mut client, request)).await);
        }
        _ => {
            let mut request = Request::new(request);
            let time = format!("{}u", 1 + x / 256 % 20_000);
            request.metadata_mut().insert("grpc-timeout", time.parse().unwrap());
            let mut messages = match client.generate(request).await {
                Ok(messages) => messages.into_inner(),
                // The client's own timer may be the first: its word is CANCELLED.
                Err(status) => {
                    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status:?}");
                    return;
                }
            };
            while let Some(message) = messages.next().await {
                if let Err(status) = message {
                    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn misbehaving_clients_leave_nothing_behind() {
    let server = Arc::new(TestServer::start().await);
    let key = server.tenant("a").await;
    server.import(&key, "a", "x", &server.package(1)).await.unwrap();
    server.import(&key, "a", "y", &server.package(2)).await.unwrap();
    futures::stream::iter(0..CALLS)
        .for_each_concurrent(48, |seed| {
            let (server, key) = (server.clone(), key.clone());
            async move { tokio::spawn(async move { call(&server, &key, seed).await }).await.unwrap() }
        })
        .await;
    server.idle().await;
    let answered = answer(&mut server.generation(&key).await, generate("", "hello", 5)).await.unwrap();
    assert_eq!(answered.ids.len(), 5);
    // Calls left under way would hold up the drain for the whole of its 30 s.
    let stopped = Arc::into_inner(server).unwrap().stopped();
    tokio::time::timeout(Duration::from_secs(20), stopped).await.expect("no call is left under way");
}
