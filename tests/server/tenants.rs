//! Tenants, their keys, their pages, their usage, their policy.

use std::sync::Arc;
use std::time::Duration;

use tenora::api::proto::*;
use tokio::sync::Notify;
use tonic::Code;

use super::common::{TestServer, answer, generate};

#[tokio::test(flavor = "multi_thread")]
async fn lists_come_in_pages() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let package = server.package(1);
    for id in ["x", "y", "z"] {
        server.import(&key, "a", id, &package).await.unwrap();
    }
    let mut client = server.adapters(&key).await;
    let mut names = Vec::new();
    let mut page_token = String::new();
    for expected in [2, 1] {
        let request = ListAdaptersRequest { parent: "tenants/a".into(), page_size: 2, page_token };
        let page = client.list_adapters(request).await.unwrap().into_inner();
        assert_eq!(page.adapters.len(), expected);
        names.extend(page.adapters.into_iter().map(|adapter| adapter.name));
        page_token = page.next_page_token;
    }
    assert_eq!(page_token, "");
    assert_eq!(names, ["x", "y", "z"].map(|id| format!("tenants/a/adapters/{id}")));
    let request = ListAdaptersRequest { parent: "tenants/a".into(), page_size: -1, ..Default::default() };
    assert_eq!(client.list_adapters(request).await.unwrap_err().code(), Code::InvalidArgument);
    server.stopped().await;
}

async fn usage(server: &TestServer, key: &str) -> TenantUsage {
    let request = GetUsageRequest { name: "tenants/a".into() };
    server.tenants(key).await.get_usage(request).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_used_is_counted() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let mut client = server.generation(&key).await;
    let answered = answer(&mut client, generate("", "hello", 7)).await.unwrap();
    assert_eq!(
        (answered.usage, answered.reason),
        (
            Usage { prompt_tokens: 5, completion_tokens: 7, cached_tokens: Some(0), virtual_tokens: 0 },
            FinishReason::Length
        )
    );
    let input = ScoreInput { sequence: Some(score_input::Sequence::Text("abc".into())) };
    client.score(ScoreRequest { inputs: vec![input], ..Default::default() }).await.unwrap();
    // A client that goes away after the first token.
    let mut messages = client.generate(generate("", "hello", 200)).await.unwrap().into_inner();
    while messages.message().await.unwrap().unwrap().token_ids.is_empty() {}
    drop(messages);
    server.idle().await;
    let mut counted = usage(&server, &key).await;
    for _ in 0..100 {
        if counted.requests == 3 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        counted = usage(&server, &key).await;
    }
    assert_eq!(counted.requests, 3);
    assert_eq!(counted.prompt_tokens, 5 + 3 + 5);
    assert!(counted.completion_tokens > 7, "{counted:?}");
    // An operator's own calls are counted apart.
    answer(&mut server.generation(&server.operator).await, generate("", "hello", 7)).await.unwrap();
    assert_eq!(usage(&server, &server.operator).await.requests, 3);
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_is_read_written_and_applied() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let mut client = server.safety(&key).await;
    let name = "tenants/a/safetyPolicy".to_owned();
    let read = client.get_safety_policy(GetSafetyPolicyRequest { name: name.clone() }).await.unwrap().into_inner();
    assert_eq!((read.name.as_str(), read.blocked_phrases.len()), (name.as_str(), 0));
    let new = SafetyPolicy { blocked_phrases: vec!["Secret".into()], ..read.clone() };
    let request = UpdateSafetyPolicyRequest { safety_policy: Some(new) };
    let written = client.update_safety_policy(request.clone()).await.unwrap().into_inner();
    assert_ne!(written.etag, read.etag);
    let stale = client.update_safety_policy(request).await.unwrap_err();
    assert_eq!(stale.code(), Code::Aborted);
    let request = CheckTextRequest { parent: "tenants/a".into(), text: "a SECRET word".into() };
    let checked = client.check_text(request).await.unwrap().into_inner();
    assert!(!checked.allowed);
    assert_eq!(checked.matches, [PhraseMatch { phrase: "Secret".into(), start: 2, end: 8 }]);
    server.stopped().await;
}

/// Jobs that are made without an end, by the tenant and by an operator, while it is deleted.
#[tokio::test(flavor = "multi_thread")]
async fn no_job_keeps_a_tenant_from_being_deleted() {
    let server = Arc::new(TestServer::start().await);
    let key = server.tenant("a").await;
    server.upload(&key, "a", "d").await.unwrap();
    let mut callers = Vec::new();
    for (caller, key) in [&key, &key, &server.operator].into_iter().enumerate() {
        let (mut client, begun) = (server.training(key).await, Arc::new(Notify::new()));
        let told = begun.clone();
        let submit = async move {
            for n in 0.. {
                let train = TrainRequest {
                    parent: "tenants/a".into(),
                    adapter_id: format!("x{caller}-{n}"),
                    dataset: "tenants/a/datasets/d".into(),
                    objective: Some(train_request::Objective::Sft(SftSpec {})),
                    hyperparameters: Some(Hyperparameters { max_steps: Some(100_000), ..Default::default() }),
                    ..Default::default()
                };
                match client.train(train).await {
                    Err(status) if status.code() != Code::ResourceExhausted => return status,
                    Err(_) => tokio::task::yield_now().await,
                    Ok(_) => told.notify_one(),
                }
            }
            unreachable!("it goes on until it is refused");
        };
        callers.push((tokio::spawn(submit), begun));
    }
    for (_, begun) in &callers {
        begun.notified().await;
    }
    let mut tenants = server.tenants(&server.operator).await;
    tenants.delete_tenant(DeleteTenantRequest { name: "tenants/a".into() }).await.expect("its jobs end for it");
    for (caller, _) in callers {
        let status = caller.await.unwrap();
        assert!(matches!(status.code(), Code::NotFound | Code::Unauthenticated), "{status:?}");
    }
    Arc::into_inner(server).unwrap().stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_tenant_is_gone_with_its_keys() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    server.import(&key, "a", "x", &server.package(1)).await.unwrap();
    let mut tenants = server.tenants(&server.operator).await;
    tenants.delete_tenant(DeleteTenantRequest { name: "tenants/a".into() }).await.unwrap();
    let status = answer(&mut server.generation(&key).await, generate("", "x", 1)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert_eq!(server.blobs(), Vec::<std::path::PathBuf>::new());
    let status = tenants.delete_tenant(DeleteTenantRequest { name: "tenants/operator".into() }).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    server.stopped().await;
}
