//! Many more adapters than there is room for: each answers as itself, whatever had to leave for it.

use futures::StreamExt as _;
use tenora::api::proto::*;
use tenora::hub::NewVersion;
use tenora::ids::{AdapterName, Tenant, TenantId};
use tenora::request::Publish;

use super::common::{TestServer, generate};

const ADAPTERS: usize = 1000;
/// Different ones among them.
const CONTENTS: usize = 40;
/// Versions that there is room for on the device, and beside it in host memory.
const ROOM: u64 = 32;
const HOST_ROOM: u64 = 8;
const REQUESTS: u64 = 1500;
/// At once; more adapters than there is room for.
const CLIENTS: usize = 48;

/// What an answer is to the bit.
#[derive(Debug, PartialEq)]
struct Answer {
    ids: Vec<u32>,
    logprobs: Vec<u32>,
}

async fn ask(server: &TestServer, key: &str, adapter: usize) -> Answer {
    let mut request = generate(&format!("tenants/a/adapters/{}", id(adapter)), "hello", 6);
    request.logprobs = Some(0);
    let mut client = server.generation(key).await;
    let mut messages = client.generate(request).await.unwrap().into_inner();
    let mut answer = Answer { ids: Vec::new(), logprobs: Vec::new() };
    while let Some(message) = messages.next().await {
        let message = message.unwrap();
        answer.ids.extend(message.token_ids);
        answer.logprobs.extend(message.logprobs.iter().map(|token| token.logprob.to_bits()));
    }
    assert_eq!((answer.ids.len(), answer.logprobs.len()), (6, 6));
    answer
}

fn id(adapter: usize) -> String {
    format!("a{adapter:03}")
}

/// Adapters 0 to `count`, of [`CONTENTS`] contents in turn.
async fn publish(server: &TestServer, count: usize) {
    let tenant = TenantId::new("a").unwrap();
    for adapter in 0..count {
        let new = NewVersion {
            adapter: AdapterName::new(&tenant, &id(adapter)).unwrap(),
            package: server.package((adapter % CONTENTS) as u64),
            probes: Vec::new(),
            publish: Publish::Live,
            job: None,
            metrics: Default::default(),
            request_id: String::new(),
            validate_only: false,
            held_reason: None,
            note: None,
        };
        server.parts.hub.publish(&Tenant::proven(tenant.clone()), new).await.unwrap();
    }
}

/// An adapter for each request: that of rank k by Zipf's law about as often as 1/k says.
fn zipf(request: u64) -> usize {
    let weights: Vec<f64> = (1..=ADAPTERS).map(|rank| 1.0 / rank as f64).collect();
    let x = (request + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11;
    let mut at = x as f64 / (1_u64 << 53) as f64 * weights.iter().sum::<f64>();
    weights
        .iter()
        .position(|weight| {
            at -= weight;
            at < 0.0
        })
        .unwrap_or(ADAPTERS - 1)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_adapters_share_the_room_of_thirty_two() {
    let roomy = TestServer::start().await;
    let roomy_key = roomy.tenant("a").await;
    publish(&roomy, CONTENTS).await;
    let expected =
        futures::stream::iter(0..CONTENTS).then(|content| ask(&roomy, &roomy_key, content)).collect::<Vec<_>>().await;
    let bytes = roomy.parts.hub.stats().resident_bytes / CONTENTS as u64;
    roomy.stopped().await;

    let server = TestServer::start_with(|config| {
        config.limits.adapter_cache_bytes = ROOM * bytes;
        config.limits.adapter_host_bytes = HOST_ROOM * bytes;
    })
    .await;
    let key = server.tenant("a").await;
    publish(&server, ADAPTERS).await;
    futures::stream::iter(0..REQUESTS)
        .for_each_concurrent(CLIENTS, |request| {
            let (server, key, expected) = (&server, &key, &expected);
            async move {
                let adapter = zipf(request);
                assert_eq!(ask(server, key, adapter).await, expected[adapter % CONTENTS], "{}", id(adapter));
            }
        })
        .await;
    server.idle().await;
    let stats = server.parts.hub.stats();
    assert_eq!((stats.resident as u64, stats.resident_bytes), (ROOM, ROOM * bytes));
    assert!(stats.host_bytes > 0 && stats.host_bytes <= HOST_ROOM * bytes, "{stats:?}");

    let request = ListAdaptersRequest { parent: "tenants/a".into(), page_size: ADAPTERS as i32, ..Default::default() };
    let listed = server.adapters(&key).await.list_adapters(request).await.unwrap().into_inner().adapters;
    let places: Vec<Residency> = listed.into_iter().map(|adapter| adapter.residency.unwrap()).collect();
    let of = |tier: Tier| places.iter().filter(|place| place.tier() == tier).collect::<Vec<_>>();
    assert_eq!((places.len(), of(Tier::Device).len()), (ADAPTERS, ROOM as usize));
    assert!((1..=HOST_ROOM as usize).contains(&of(Tier::Host).len()));
    assert!(places.iter().all(|place| place.memory_bytes == bytes));
    assert!(of(Tier::Disk).iter().any(|place| place.last_use_time.is_some()), "some have had to leave");
    let most_used = ListAdapterVersionsRequest { parent: "tenants/a/adapters/a000".into(), ..Default::default() };
    let versions = server.adapters(&key).await.list_adapter_versions(most_used).await.unwrap().into_inner().versions;
    let place = versions[0].residency.as_ref().unwrap();
    assert!(place.last_use_time.is_some() && place.last_load_duration.is_some(), "{place:?}");
    server.stopped().await;
}
