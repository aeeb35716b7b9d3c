//! What is shared and what is not: computed prefixes, the engine's rows, and the tenants' weights.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tenora::api::proto::*;
use tenora::config::Limits;
use tonic::Code;
use tonic_types::StatusExt as _;

use super::common::{TestServer, answer, generate};

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_is_found_again_by_its_own_tenant_and_version_only() {
    let server = TestServer::start().await;
    let (a, b) = (server.tenant("a").await, server.tenant("b").await);
    // The same files are the same content, whatever their name; but not for another tenant.
    for (key, tenant) in [(&a, "a"), (&b, "b")] {
        server.import(key, tenant, "x", &server.package(1)).await.unwrap();
    }
    server.import(&a, "a", "y", &server.package(2)).await.unwrap();
    let prompt = "You answer in one short sentence, and you never say more than you know. ".repeat(2);
    let found = async |key: &str, adapter: &str, tail: &str| {
        let request = generate(adapter, &format!("{prompt}{tail}"), 3);
        answer(&mut server.generation(key).await, request).await.unwrap().usage.cached_tokens
    };
    let whole = Some(prompt.len() as u32 / 16 * 16);
    assert_eq!(found(&a, "", "one").await, Some(0));
    assert_eq!(found(&a, "", "two").await, whole);
    assert_eq!(found(&b, "", "two").await, Some(0), "another tenant");
    assert_eq!(found(&a, "tenants/a/adapters/x", "two").await, Some(0), "an adapter");
    assert_eq!(found(&a, "tenants/a/adapters/x/versions/1", "one").await, whole, "its live version by its own name");
    assert_eq!(found(&a, "tenants/a/adapters/y", "two").await, Some(0), "another adapter");
    assert_eq!(found(&b, "tenants/b/adapters/x", "two").await, Some(0), "another tenant's adapter of the same content");

    // A new version under the same name, which goes live.
    server.import(&a, "a", "x", &server.package(3)).await.unwrap();
    let name = "tenants/a/adapters/x".to_owned();
    let live = SetLiveVersionRequest { version: format!("{name}/versions/2"), name, ..Default::default() };
    server.adapters(&a).await.set_live_version(live).await.unwrap();
    assert_eq!(found(&a, "tenants/a/adapters/x", "two").await, Some(0), "another version");
    assert_eq!(found(&a, "tenants/a/adapters/x/versions/1", "three").await, whole, "the old one is still there");

    let input = ScoreInput { sequence: Some(score_input::Sequence::Text(prompt.clone())) };
    let scored = ScoreRequest { inputs: vec![input], ..Default::default() };
    let scored = server.generation(&a).await.score(scored).await.unwrap().into_inner();
    assert_eq!(scored.usage.unwrap().cached_tokens, None, "scores are computed, all of them");
    server.idle().await;
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_sets_weights() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let mut tenants = server.tenants(&server.operator).await;
    let listed = tenants.list_tenants(ListTenantsRequest::default()).await.unwrap().into_inner().tenants;
    let tenant = listed.into_iter().find(|tenant| tenant.name == "tenants/a").unwrap();
    assert_eq!(tenant.weight, 1);
    let mask = |path: &str| Some(prost_types::FieldMask { paths: vec![path.into()] });
    let update = |weight, path| UpdateTenantRequest {
        tenant: Some(Tenant { weight, ..tenant.clone() }),
        update_mask: mask(path),
    };
    let updated = tenants.update_tenant(update(3, "weight")).await.unwrap().into_inner();
    assert_eq!((updated.weight, &updated.display_name), (3, &tenant.display_name));
    assert_eq!(tenants.update_tenant(update(4, "weight")).await.unwrap_err().code(), Code::Aborted, "a stale etag");
    for (weight, path, field) in
        [(0, "weight", "tenant.weight"), (1001, "weight", "tenant.weight"), (1, "name", "update_mask")]
    {
        let status = tenants.update_tenant(update(weight, path)).await.unwrap_err();
        let details = status.get_error_details();
        assert_eq!(details.bad_request().unwrap().field_violations[0].field, field);
    }
    let heavy = CreateTenantRequest { tenant_id: "b".into(), weight: Some(7), ..Default::default() };
    assert_eq!(tenants.create_tenant(heavy).await.unwrap().into_inner().weight, 7);
    let own = server.tenants(&key).await.update_tenant(update(9, "weight")).await.unwrap_err();
    assert_eq!(own.code(), Code::PermissionDenied, "no tenant sets its own");
    server.stopped().await;
}

/// Two tenants with always more requests than places: the heavier one is served three times the tokens.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_shared_by_weight() {
    const CALLERS: u64 = 12;
    const TOKENS: u64 = 24_000;
    let few = |limits: Limits| Limits { max_running: 4, max_step_rows: 32, ..limits };
    let server = Arc::new(TestServer::start_with(|config| config.limits = few(config.limits.clone())).await);
    let keys = [server.tenant("light").await, server.tenant("heavy").await];
    let heavier = UpdateTenantRequest {
        tenant: Some(Tenant { name: "tenants/heavy".into(), weight: 3, ..Default::default() }),
        update_mask: Some(prost_types::FieldMask { paths: vec!["weight".into()] }),
    };
    server.tenants(&server.operator).await.update_tenant(heavier).await.unwrap();
    let served = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let total = |served: &[AtomicU64; 2]| served.iter().map(|n| n.load(Ordering::Relaxed)).sum::<u64>();
    let callers = (0..2 * CALLERS).map(|i| {
        let (tenant, server, served) = ((i % 2) as usize, server.clone(), served.clone());
        let key = keys[tenant].clone();
        tokio::spawn(async move {
            let mut client = server.generation(&key).await;
            for turn in 0.. {
                if total(&served) >= TOKENS {
                    break;
                }
                // No prompt begins like another: what is found is not counted. Answers are long, so that the engine is what they wait for.
                let request = generate("", &format!("{turn} {i} is how this begins"), 120 + (i % 5) as u32);
                let usage = answer(&mut client, request).await.unwrap().usage;
                let tokens = u64::from(usage.prompt_tokens + usage.completion_tokens);
                served[tenant].fetch_add(tokens, Ordering::Relaxed);
            }
        })
    });
    for caller in futures::future::join_all(callers).await {
        caller.unwrap();
    }
    let [light, heavy] = [0, 1].map(|tenant: usize| served[tenant].load(Ordering::Relaxed) as f64);
    assert!((2.0..4.0).contains(&(heavy / light)), "{heavy} and {light} tokens");
    server.idle().await;
    Arc::into_inner(server).unwrap().stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_refused_is_told_when_to_come_again() {
    let server = TestServer::start_with(|config| config.limits.max_queued_per_tenant = 0).await;
    let key = server.tenant("a").await;
    let mut client = server.generation(&key).await;
    let status = client.generate(generate("", "hello", 1)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    let details = status.get_error_details();
    assert!(details.retry_info().unwrap().retry_delay.is_some_and(|delay| !delay.is_zero()));
    assert_eq!(details.quota_failure().unwrap().violations[0].subject, "max_queued_per_tenant");
    let urgent = GenerateRequest { priority: Some(101), ..generate("", "hello", 1) };
    let status = client.generate(urgent).await.unwrap_err();
    assert_eq!(status.get_error_details().bad_request().unwrap().field_violations[0].field, "priority");
    server.idle().await;
    server.stopped().await;
}
