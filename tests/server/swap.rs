//! The hot swap under load.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tenora::api::proto::*;

use super::common::{Answered, TestServer, answer, generate};

const NAME: &str = "tenants/a/adapters/tone";
const CLIENTS: usize = 8;
const SWAPS: usize = 50;

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_those_of_the_version_they_name() {
    let server = Arc::new(TestServer::start().await);
    let key = server.tenant("a").await;
    let mut adapters = server.adapters(&key).await;
    let mut alone = Vec::new();
    for seed in [1, 2] {
        let version = server.import(&key, "a", "tone", &server.package(seed)).await.unwrap().name;
        let expected = answer(&mut server.generation(&key).await, generate(&version, "hello", 40)).await.unwrap();
        alone.push(expected);
    }
    assert_ne!(alone[0].ids, alone[1].ids, "the two versions must be told apart by their answers");
    server.idle().await;
    let before = server.parts.hub.stats();

    let done = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (server, key, done) = (server.clone(), key.clone(), done.clone());
            tokio::spawn(async move {
                let mut client = server.generation(&key).await;
                let mut answers = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    answers.push(answer(&mut client, generate(NAME, "hello", 40)).await.unwrap());
                }
                answers
            })
        })
        .collect();
    let mut etag = String::new();
    for swap in 0..SWAPS {
        let version = alone[(swap + 1) % 2].version.clone();
        let request = SetLiveVersionRequest { name: NAME.into(), version: version.clone(), etag };
        let adapter = adapters.set_live_version(request).await.unwrap().into_inner();
        assert_eq!(adapter.live_version, version);
        etag = adapter.etag;
        // A request sent after the swap has been confirmed gets the new version.
        let now = answer(&mut server.generation(&key).await, generate(NAME, "hello", 1)).await.unwrap();
        assert_eq!(now.version, version);
    }
    done.store(true, Ordering::Relaxed);
    let mut answers: Vec<Answered> = Vec::new();
    for client in clients {
        answers.extend(client.await.unwrap());
    }
    for answered in &answers {
        assert!(alone.contains(answered), "{answered:?} is not what its version gives alone");
    }
    assert!(answers.len() >= CLIENTS);
    server.idle().await;
    assert_eq!(server.parts.hub.stats(), before, "memory must return to where it was");
    Arc::into_inner(server).unwrap().stopped().await;
}
