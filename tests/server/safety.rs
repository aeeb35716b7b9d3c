//! The tenant's policy over what an answer streams.

use std::ops::Range;

use tenora::api::proto::generation_service_client::GenerationServiceClient;
use tenora::api::proto::*;

use super::common::{TestServer, Transport, generate};

const TOKENS: u32 = 20;

/// All that an answer's messages say, put together.
#[derive(Debug, Default, PartialEq)]
struct Whole {
    text: String,
    ids: Vec<u32>,
    logprobs: Vec<TokenLogprob>,
    reason: FinishReason,
}

async fn whole(client: &mut GenerationServiceClient<Transport>, request: GenerateRequest) -> Whole {
    let mut messages = client.generate(request).await.unwrap().into_inner();
    let mut whole = Whole::default();
    while let Some(message) = messages.message().await.unwrap() {
        whole.reason = message.finish_reason();
        whole.text += &message.text;
        whole.ids.extend(message.token_ids);
        whole.logprobs.extend(message.logprobs);
    }
    whole
}

/// The n-th request of many: greedy ones first, then drawn ones, which differ more.
fn request(n: u64) -> GenerateRequest {
    let temperature = if n < 16 { 0.0 } else { 1.0 };
    let sampling = Sampling { temperature: Some(temperature), seed: Some(n), ..Default::default() };
    GenerateRequest { sampling: Some(sampling), logprobs: Some(2), ..generate("", &format!("{n} is a number"), TOKENS) }
}

/// Two characters of plain ASCII, a letter among them, that the text has nowhere before in any case. What stands
/// before them is ASCII too, so that a character ends there.
fn piece(text: &str) -> Option<Range<usize>> {
    let lower = text.to_ascii_lowercase();
    let fits = |at: &usize| {
        let around = &text.as_bytes()[at - 1..at + 2];
        around.iter().all(u8::is_ascii_graphic)
            && around[1..].iter().any(u8::is_ascii_alphabetic)
            && lower.find(&lower[*at..at + 2]) == Some(*at)
    };
    (3..text.len().saturating_sub(1)).find(fits).map(|at| at..at + 2)
}

/// An answer with something in it to block, and its request.
async fn blockable(client: &mut GenerationServiceClient<Transport>) -> (GenerateRequest, Whole, Range<usize>) {
    for n in 0..80 {
        let free = whole(client, request(n)).await;
        if let Some(at) = piece(&free.text) {
            return (request(n), free, at);
        }
    }
    panic!("no answer has two characters of plain ASCII in a row");
}

fn in_other_case(text: &str) -> String {
    let other = |c: char| if c.is_ascii_lowercase() { c.to_ascii_uppercase() } else { c.to_ascii_lowercase() };
    text.chars().map(other).collect()
}

/// The tiny model's tokens below 256 are bytes; the others have no text.
fn text_of(ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().filter_map(|id| u8::try_from(*id).ok()).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

async fn block(server: &TestServer, key: &str, phrase: &str) {
    let policy = SafetyPolicy {
        name: "tenants/a/safetyPolicy".into(),
        blocked_phrases: vec![phrase.into()],
        ..Default::default()
    };
    let request = UpdateSafetyPolicyRequest { safety_policy: Some(policy) };
    server.safety(key).await.update_safety_policy(request).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_ends_before_a_phrase_of_its_tenants_policy() {
    let server = TestServer::start().await;
    let (key, other) = (server.tenant("a").await, server.tenant("b").await);
    let mut client = server.generation(&key).await;
    let (request, free, at) = blockable(&mut client).await;
    assert_eq!((free.reason, free.ids.len()), (FinishReason::Length, TOKENS as usize));
    let phrase = in_other_case(&free.text[at.clone()]);
    assert_ne!(phrase, free.text[at.clone()]);
    block(&server, &key, &phrase).await;

    let filtered = whole(&mut client, request.clone()).await;
    assert_eq!(filtered.reason, FinishReason::ContentFiltered);
    assert_eq!(filtered.text, free.text[..at.start]);
    assert_eq!(text_of(&filtered.ids), filtered.text, "no id says more or less than the text");
    assert!(free.ids.starts_with(&filtered.ids));
    assert_eq!(filtered.logprobs.len(), filtered.ids.len());
    assert!(free.logprobs.starts_with(&filtered.logprobs));

    let untouched = whole(&mut server.generation(&other).await, request).await;
    assert_eq!(untouched, free, "the policy is its tenant's alone");
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_finds_what_would_end_the_answer() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let (_, free, at) = blockable(&mut server.generation(&key).await).await;
    let phrase = in_other_case(&free.text[at.clone()]);
    block(&server, &key, &phrase).await;
    let request = CheckTextRequest { parent: "tenants/a".into(), text: free.text };
    let checked = server.safety(&key).await.check_text(request).await.unwrap().into_inner();
    assert!(!checked.allowed);
    let found = PhraseMatch { phrase, start: at.start as u64, end: at.end as u64 };
    assert_eq!(checked.matches.first(), Some(&found));
    server.stopped().await;
}
