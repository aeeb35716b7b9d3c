//! What a client can ask about the server: the base, its tokens, and the tenant of its own key.

use tenora::api::proto::*;
use tonic::Code;

use super::common::{TestServer, answer, generate, reason};

fn text(text: &str) -> TokenizeRequest {
    TokenizeRequest { input: Some(tokenize_request::Input::Text(text.into())), add_generation_prompt: None }
}

fn chat(content: &str, add_generation_prompt: Option<bool>) -> TokenizeRequest {
    let message = ChatMessage { role: "user".into(), content: content.into(), ..Default::default() };
    let chat = Chat { messages: vec![message] };
    TokenizeRequest { input: Some(tokenize_request::Input::Chat(chat)), add_generation_prompt }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_base_is_told_to_every_key() {
    let server = TestServer::start_with(|config| config.limits.max_tokenize_bytes = 77).await;
    let key = server.tenant("a").await;
    let base = server.base(&key).await.get_base(GetBaseRequest {}).await.unwrap().into_inner();
    assert_eq!((base.name.as_str(), base.context_length, base.vocabulary_size), ("tiny", 256, 258));
    assert_eq!(base.digest, server.model.shape().digest.to_string());
    assert_eq!(base.template_digest, server.parts.text.template_digest().to_string());
    assert!(base.chat_template.contains("<|im_start|>"), "{}", base.chat_template);
    let special: Vec<_> = base.special_tokens.iter().map(|t| (t.id, t.text.as_str(), t.control)).collect();
    assert_eq!(special, [(256, "<|im_start|>", true), (257, "<|im_end|>", true)]);
    assert_eq!((base.end_token_ids, base.end_of_turn_token_id), (vec![257], 257));
    let limit = base.limits.iter().find(|limit| limit.name == "max_tokenize_bytes").unwrap();
    assert_eq!((limit.value, limit.unit.as_str()), (77, "bytes"));
    let version = server.import(&key, "a", "x", &server.package(1)).await.unwrap();
    assert_eq!((version.base_digest, version.template_digest), (base.digest, base.template_digest));

    assert!(server.base(&server.operator).await.get_base(GetBaseRequest {}).await.is_ok());
    let stranger = server.base("").await.get_base(GetBaseRequest {}).await.unwrap_err();
    assert_eq!(stranger.code(), Code::Unauthenticated);
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn text_becomes_ids_and_text_again() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let mut client = server.base(&key).await;
    let written = "é<|im_end|>🦀 a";
    let tokens = client.tokenize(text(written)).await.unwrap().into_inner();
    assert_eq!(tokens.token_ids[..3], [0xC3, 0xA9, 257]);
    assert_eq!(tokens.tokens.iter().map(|t| t.id).collect::<Vec<_>>(), tokens.token_ids);
    assert_eq!((tokens.tokens[0].text.as_str(), &tokens.tokens[0].bytes[..]), ("\u{FFFD}", &[0xC3][..]));
    assert_eq!((tokens.tokens[2].text.as_str(), tokens.tokens[2].control), ("<|im_end|>", true));
    let bytes: Vec<u8> = tokens.tokens.iter().flat_map(|t| t.bytes.clone()).collect();
    assert_eq!(bytes, "é🦀 a".as_bytes(), "control tokens have no bytes");

    let ids = |skip| DetokenizeRequest { token_ids: tokens.token_ids.clone(), skip_special_tokens: skip };
    let back = client.detokenize(ids(false)).await.unwrap().into_inner();
    assert_eq!((back.text.as_str(), back.tokens), (written, tokens.tokens.clone()));
    assert_eq!(client.detokenize(ids(true)).await.unwrap().into_inner().text, "é🦀 a");

    // A chat's ids are those that Generate starts from, and its text is never a control token.
    let with = client.tokenize(chat("x<|im_end|>", None)).await.unwrap().into_inner().token_ids;
    let without = client.tokenize(chat("x<|im_end|>", Some(false))).await.unwrap().into_inner().token_ids;
    assert!(with.starts_with(&without) && with.len() > without.len());
    assert_eq!(without.iter().filter(|id| **id >= 256).count(), 2, "{without:?}");
    let Some(tokenize_request::Input::Chat(asked)) = chat("x<|im_end|>", None).input else { unreachable!() };
    let request = GenerateRequest { prompt: Some(generate_request::Prompt::Chat(asked)), ..generate("", "", 1) };
    let usage = answer(&mut server.generation(&key).await, request).await.unwrap().usage;
    assert_eq!(usage.prompt_tokens as usize, with.len());
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokenizing_is_bounded() {
    let server = TestServer::start_with(|config| {
        config.limits.max_tokenize_bytes = 4000;
        config.limits.max_detokenize_tokens = 5;
        config.limits.max_message_bytes = 8000;
    })
    .await;
    let key = server.tenant("a").await;
    let mut client = server.base(&key).await;
    let status = client.tokenize(text(&"x".repeat(4001))).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::InvalidArgument, "TEXT_TOO_LONG"));
    assert!(status.message().contains("max_tokenize_bytes"), "{}", status.message());
    let status = client.tokenize(chat(&"x".repeat(4001), None)).await.unwrap_err();
    assert_eq!(reason(&status), "TEXT_TOO_LONG");
    let status = client.tokenize(text(&"x".repeat(4000))).await.unwrap_err();
    assert_eq!(status.get_details_quota().as_deref(), Some("max_message_bytes"));
    let empty = TokenizeRequest { input: None, add_generation_prompt: None };
    assert_eq!(client.tokenize(empty).await.unwrap_err().code(), Code::InvalidArgument);
    assert!(client.tokenize(text("")).await.unwrap().into_inner().token_ids.is_empty());

    let ids = |token_ids| DetokenizeRequest { token_ids, skip_special_tokens: false };
    let status = client.detokenize(ids(vec![97; 6])).await.unwrap_err();
    assert_eq!(reason(&status), "TOO_MANY_TOKENS");
    assert_eq!(reason(&client.detokenize(ids(vec![258])).await.unwrap_err()), "TOKEN_OUT_OF_RANGE");
    assert_eq!(client.detokenize(ids(vec![97; 5])).await.unwrap().into_inner().text, "aaaaa");
    server.idle().await;
    server.stopped().await;
}

/// The limit that a RESOURCE_EXHAUSTED names.
trait Quota {
    fn get_details_quota(&self) -> Option<String>;
}

impl Quota for tonic::Status {
    fn get_details_quota(&self) -> Option<String> {
        use tonic_types::StatusExt as _;
        Some(self.get_details_quota_failure()?.violations.first()?.subject.clone())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_learns_who_it_is_and_what_it_uses() {
    let server = TestServer::start_with(|config| config.limits.max_datasets_per_tenant = 9).await;
    let (a, b) = (server.tenant("a").await, server.tenant("b").await);
    server.upload(&a, "a", "d").await.unwrap();
    answer(&mut server.generation(&a).await, generate("", "hello", 3)).await.unwrap();
    server.idle().await;
    let get = async |key: &str, name: &str| {
        let request = GetTenantRequest { name: name.into() };
        server.tenants(key).await.get_tenant(request).await.map(tonic::Response::into_inner)
    };
    // Usage is counted after the answer.
    let mut own = get(&a, "").await.unwrap();
    for _ in 0..200 {
        if own.usage.as_ref().unwrap().requests > 0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        own = get(&a, "").await.unwrap();
    }
    let tenant = own.tenant.unwrap();
    assert_eq!((tenant.name.as_str(), tenant.weight, own.is_operator), ("tenants/a", 1, false));
    assert_eq!(own.usage.unwrap().completion_tokens, 3);
    let used = |name: &str| own.limits.iter().find(|l| l.name == name).map(|l| (l.used, l.limit)).unwrap();
    assert_eq!(used("max_datasets_per_tenant"), (1, 9));
    assert_eq!(used("max_queued_per_tenant"), (0, server.parts.limits.max_queued_per_tenant));
    assert_eq!(used("max_calls_per_tenant").0, 1, "this call itself");
    assert_eq!(get(&a, "tenants/a").await.unwrap().tenant.unwrap().name, "tenants/a");
    assert_eq!(get(&b, "tenants/a").await.unwrap_err().code(), Code::PermissionDenied);
    let operator = get(&server.operator, "").await.unwrap();
    assert_eq!((operator.tenant.unwrap().name.as_str(), operator.is_operator), ("tenants/operator", true));
    assert!(get(&server.operator, "tenants/a").await.unwrap().is_operator);
    assert_eq!(get(&server.operator, "tenants/none").await.unwrap_err().code(), Code::NotFound);
    server.stopped().await;
}
