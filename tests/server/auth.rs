//! Keys on every method, and tenants that see only their own.

use std::collections::BTreeMap;

use tenora::api::proto::*;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::common::{TestServer, reason};
use super::reflection::{Api, call};

const HEALTH: &str = "/grpc.health.v1.Health/";

/// Requests of these carry no resource name. A method that is new here must be meant to.
const NAMELESS: [&str; 7] = [
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/tenora.v1.BaseService/Detokenize",
    "/tenora.v1.BaseService/GetBase",
    "/tenora.v1.BaseService/Tokenize",
    "/tenora.v1.TenantService/CreateTenant",
    "/tenora.v1.TenantService/ListTenants",
];

/// Need an operator even for a tenant's own names.
fn is_for_operators(path: &str) -> bool {
    path.starts_with("/tenora.v1.TenantService/") && !path.ends_with("/GetUsage") && !path.ends_with("/GetTenant")
}

/// A tenant with one of everything; gives what `{a}`, `{d}`, `{j}` and `{k}` stand for.
async fn furnish(server: &TestServer, tenant: &str) -> (String, BTreeMap<&'static str, String>) {
    let key = server.tenant(tenant).await;
    server.import(&key, tenant, "real", &server.package(1)).await.unwrap();
    server.upload(&key, tenant, "real").await.unwrap();
    let train = TrainRequest {
        parent: format!("tenants/{tenant}"),
        adapter_id: "real".into(),
        dataset: format!("tenants/{tenant}/datasets/real"),
        objective: Some(train_request::Objective::Sft(SftSpec {})),
        ..Default::default()
    };
    let job = server.training(&key).await.train(train).await.unwrap().into_inner().name;
    let keys = ListApiKeysRequest { parent: format!("tenants/{tenant}"), ..Default::default() };
    let keys = server.tenants(&server.operator).await.list_api_keys(keys).await.unwrap().into_inner().api_keys;
    let last = |name: &str| name.rsplit('/').next().unwrap().to_owned();
    let ids = [
        ("{t}", tenant.to_owned()),
        ("{a}", "real".to_owned()),
        ("{v}", "1".to_owned()),
        ("{d}", "real".to_owned()),
        ("{j}", last(&job)),
        ("{k}", last(&keys[0].name)),
    ];
    (key, ids.into())
}

fn borrowed<'a>(ids: &'a BTreeMap<&'static str, String>) -> Vec<(&'a str, &'a str)> {
    ids.iter().map(|(id, value)| (*id, value.as_str())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_reaches_only_its_own_names() {
    let server = TestServer::start().await;
    let (_, theirs) = furnish(&server, "b").await;
    let stranger = server.tenant("a").await;
    let absent = |tenant: &str| -> BTreeMap<&'static str, String> {
        let ids = ["{a}", "{d}", "{j}", "{k}"].map(|id| (id, "absent".to_owned()));
        ids.into_iter().chain([("{v}", "99".to_owned()), ("{t}", tenant.to_owned())]).collect()
    };
    let api = Api::discover(server.transport(&stranger).await).await;
    let mut nameless = Vec::new();
    let mut named = 0;
    for method in api.methods.iter().filter(|method| !method.path.starts_with(HEALTH)) {
        let Some(existing) = api.request(method, &borrowed(&theirs)) else {
            nameless.push(method.path.clone());
            continue;
        };
        named += 1;
        let missing = api.request(method, &borrowed(&absent("b"))).unwrap();
        let nobody = api.request(method, &borrowed(&absent("nobody"))).unwrap();
        let mut texts = Vec::new();
        for message in [existing, missing, nobody] {
            let transport = server.transport(&stranger).await;
            let status = call(transport, &method.path, message).await.expect_err(&method.path);
            assert_eq!(status.code(), Code::PermissionDenied, "{}: {status:?}", method.path);
            assert_eq!(reason(&status), "PERMISSION_DENIED");
            texts.push((status.message().to_owned(), status.details().to_vec()));
        }
        assert!(texts.iter().all(|text| *text == texts[0]), "{}: {texts:?}", method.path);
    }
    assert_eq!(nameless, NAMELESS);
    assert!(named >= 25, "only {named} methods have names: are there comments in the descriptors?");
    for path in NAMELESS.iter().filter(|path| is_for_operators(path)) {
        let status = call(server.transport(&stranger).await, path, Vec::new()).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied, "{path}");
    }
    server.stopped().await;
}

/// Where a request has several names, each must be the caller's own.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_name_is_refused_as_the_first_is() {
    let server = TestServer::start().await;
    furnish(&server, "b").await;
    let (key, _) = furnish(&server, "a").await;
    let mut training = server.training(&key).await;
    let mut adapters = server.adapters(&key).await;
    let mut refusals = Vec::new();
    for id in ["real", "absent"] {
        let (adapter, dataset) = (format!("tenants/b/adapters/{id}"), format!("tenants/b/datasets/{id}"));
        let train = TrainRequest {
            parent: "tenants/a".into(),
            adapter_id: "x".into(),
            dataset: "tenants/a/datasets/real".into(),
            objective: Some(train_request::Objective::Sft(SftSpec {})),
            ..Default::default()
        };
        refusals.push(training.train(TrainRequest { dataset, ..train.clone() }).await.unwrap_err());
        let start = Some(train_request::Start::FromVersion(adapter.clone()));
        refusals.push(training.train(TrainRequest { start, ..train }).await.unwrap_err());
        let version = format!("{adapter}/versions/1");
        let swap = SetLiveVersionRequest { name: "tenants/a/adapters/real".into(), version, ..Default::default() };
        refusals.push(adapters.set_live_version(swap).await.unwrap_err());
    }
    for status in &refusals {
        assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
        assert_eq!(status.message(), refusals[0].message());
    }
    server.stopped().await;
}

/// The same requests with the owner's key are let through, so that the test above tests what it says.
#[tokio::test(flavor = "multi_thread")]
async fn owners_and_operators_are_let_through() {
    let server = TestServer::start().await;
    let (key, own) = furnish(&server, "b").await;
    let api = Api::discover(server.transport(&key).await).await;
    // What is needed by others goes after them, the tenant last of all.
    let turn = |path: &str| match path {
        "/tenora.v1.TenantService/DeleteTenant" => 3,
        _ if path.contains("/Revoke") => 2,
        _ => u8::from(path.contains("/Delete")),
    };
    let mut methods: Vec<_> = api.methods.iter().collect();
    methods.sort_by_key(|method| turn(&method.path));
    for method in methods {
        let Some(message) = api.request(method, &borrowed(&own)) else { continue };
        for (key, who) in [(&key, "owner"), (&server.operator, "operator")] {
            if who == "owner" && is_for_operators(&method.path) {
                continue;
            }
            if let Err(status) = call(server.transport(key).await, &method.path, message.clone()).await {
                let refused = matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated | Code::Internal);
                assert!(!refused, "{who} on {}: {status:?}", method.path);
            }
        }
    }
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_method_wants_a_key_that_is_good() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let api = Api::discover(server.transport(&key).await).await;
    let name = ListApiKeysRequest { parent: "tenants/a".into(), ..Default::default() };
    let mut tenants = server.tenants(&server.operator).await;
    let name = tenants.list_api_keys(name).await.unwrap().into_inner().api_keys[0].name.clone();
    tenants.revoke_api_key(RevokeApiKeyRequest { name }).await.unwrap();
    let id = key.split('_').nth(1).unwrap();
    let forged = format!("tnr_{id}_{}", "0".repeat(64));
    let unknown = format!("tnr_0000_{}", "0".repeat(64));
    for method in api.methods.iter().filter(|method| !method.path.starts_with(HEALTH)) {
        let mut texts = Vec::new();
        for wrong in ["", "nonsense", &unknown, &forged, &key] {
            let status = call(server.transport(wrong).await, &method.path, Vec::new()).await.expect_err(&method.path);
            assert_eq!(status.code(), Code::Unauthenticated, "{} with {wrong:?}: {status:?}", method.path);
            assert_eq!(reason(&status), "UNAUTHENTICATED");
            texts.push(status.message().to_owned());
        }
        assert!(texts[1..].iter().all(|text| *text == texts[1]), "a wrong key must not tell what is wrong with it");
    }
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_open_and_knows_every_service() {
    let server = TestServer::start().await;
    let api = Api::discover(server.transport(&server.operator).await).await;
    let mut services: Vec<_> = api.methods.iter().map(|m| m.path[1..].split_once('/').unwrap().0.to_owned()).collect();
    services.retain(|service| service.starts_with("tenora."));
    services.push(String::new());
    let mut health = HealthClient::new(server.transport("").await);
    for service in services {
        let answer = health.check(HealthCheckRequest { service: service.clone() }).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service}");
    }
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_authentication_everyone_is_the_operator() {
    let server = TestServer::start_with(|config| config.insecure_no_auth = true).await;
    let mut tenants = server.tenants("").await;
    tenants.create_tenant(CreateTenantRequest { tenant_id: "a".into(), ..Default::default() }).await.unwrap();
    let version = server.import("", "a", "x", &server.package(1)).await.unwrap();
    assert_eq!(version.name, "tenants/a/adapters/x/versions/1");
    let missing = server.import("", "nobody", "x", &server.package(1)).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
    server.stopped().await;
}
