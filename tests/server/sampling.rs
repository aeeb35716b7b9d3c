//! The draw as clients ask for it and are told of it.

use futures::StreamExt as _;
use tenora::api::proto::generate_response::StoppedBy;
use tenora::api::proto::*;
use tonic::Code;

use super::common::{TestServer, generate};

/// All messages of one call.
async fn messages(server: &TestServer, key: &str, request: GenerateRequest) -> Vec<GenerateResponse> {
    let stream = server.generation(key).await.generate(request).await.unwrap().into_inner();
    stream.map(|message| message.unwrap()).collect().await
}

fn with(sampling: Sampling, max_tokens: u32) -> GenerateRequest {
    GenerateRequest { sampling: Some(sampling), logprobs: Some(1), ..generate("", "hello", max_tokens) }
}

fn ids_of(messages: &[GenerateResponse], index: u32) -> Vec<u32> {
    messages.iter().filter(|m| m.index == index).flat_map(|m| m.token_ids.clone()).collect()
}

fn seed_of(messages: &[GenerateResponse], index: u32) -> Option<u64> {
    messages.iter().find(|m| m.index == index).unwrap().seed
}

#[tokio::test(flavor = "multi_thread")]
async fn several_answers_come_in_one_stream_and_are_counted_rightly() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let several = with(Sampling { temperature: Some(1.0), n: Some(3), ..Default::default() }, 6);
    let all = messages(&server, &key, several).await;
    let first = seed_of(&all, 0).expect("the drawn seed is told");
    for index in 0..3 {
        assert_eq!(seed_of(&all, index), Some(first.wrapping_add(u64::from(index))));
        let finished = |m: &&GenerateResponse| m.index == index && m.finish_reason() == FinishReason::Length;
        assert_eq!(all.iter().filter(finished).count(), 1);
        let alone = Sampling { temperature: Some(1.0), seed: seed_of(&all, index), ..Default::default() };
        let alone = messages(&server, &key, with(alone, 6)).await;
        assert_eq!(ids_of(&all, index), ids_of(&alone, 0), "answer {index} again by its seed");
    }
    let usages: Vec<_> = all.iter().filter_map(|m| m.usage).collect();
    assert_eq!((usages.len(), usages[0].prompt_tokens, usages[0].completion_tokens), (1, 5, 18));
    assert!(all.last().unwrap().usage.is_some());
    server.idle().await;
    // The account has the same: this call, and three of one answer each.
    let mut counted = TenantUsage::default();
    for _ in 0..200 {
        let request = GetUsageRequest { name: "tenants/a".into() };
        counted = server.tenants(&key).await.get_usage(request).await.unwrap().into_inner();
        if counted.requests == 4 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!((counted.requests, counted.prompt_tokens, counted.completion_tokens), (4, 20, 36));
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_greedy_answer_has_no_seed_and_each_unseeded_draw_its_own() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    assert_eq!(seed_of(&messages(&server, &key, with(Sampling::default(), 1)).await, 0), None);
    let drawn = || with(Sampling { temperature: Some(0.5), ..Default::default() }, 1);
    let seeds = [messages(&server, &key, drawn()).await, messages(&server, &key, drawn()).await];
    assert_ne!(seed_of(&seeds[0], 0), seed_of(&seeds[1], 0));
    let zero = with(Sampling { temperature: Some(0.5), seed: Some(0), ..Default::default() }, 1);
    assert_eq!(seed_of(&messages(&server, &key, zero).await, 0), Some(0), "a seed of 0 is one");
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn biases_bans_and_ends_are_told() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let forced = |id, min_tokens| {
        let sampling =
            Sampling { logit_bias: [(id, 100.0)].into(), min_tokens: Some(min_tokens), ..Default::default() };
        let stopping = Stopping { max_tokens: Some(8), stop: vec!["aaa".into()], ..Default::default() };
        GenerateRequest { stopping: Some(stopping), ..with(sampling, 8) }
    };
    let all = messages(&server, &key, forced(257, 2)).await;
    assert_eq!(all.last().unwrap().stopped_by, Some(StoppedBy::StopTokenId(257)));
    assert_eq!(ids_of(&all, 0).len(), 3);
    let all = messages(&server, &key, forced(97, 0)).await;
    assert_eq!(all.last().unwrap().stopped_by, Some(StoppedBy::StopString("aaa".into())));

    let refused = |sampling| with(sampling, 4);
    for (sampling, field) in [
        (Sampling { presence_penalty: Some(3.0), ..Default::default() }, "sampling.presence_penalty"),
        (Sampling { frequency_penalty: Some(-3.0), ..Default::default() }, "sampling.frequency_penalty"),
        (Sampling { logit_bias: [(1, 101.0)].into(), ..Default::default() }, "sampling.logit_bias[1]"),
        (Sampling { min_tokens: Some(5), ..Default::default() }, "sampling.min_tokens"),
        (Sampling { n: Some(0), ..Default::default() }, "sampling.n"),
        (Sampling { n: Some(1000), ..Default::default() }, "sampling.n"),
    ] {
        let status = server.generation(&key).await.generate(refused(sampling)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(field), "{}", status.message());
    }
    server.idle().await;
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_carry_text_and_bytes() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    // The two bytes of a character, one after the other.
    let halves =
        Sampling { logit_bias: [(0xC3, 50.0), (0xA9, 49.0)].into(), presence_penalty: Some(2.0), ..Default::default() };
    let all = messages(&server, &key, with(halves, 2)).await;
    let logprobs: Vec<_> = all.iter().flat_map(|m| &m.logprobs).collect();
    let text: String = all.iter().map(|m| m.text.as_str()).collect();
    let bytes: Vec<u8> = logprobs.iter().flat_map(|l| l.bytes.clone()).collect();
    assert_eq!(text, String::from_utf8_lossy(&bytes), "the bytes are the answer's");
    assert_eq!(logprobs[0].text, "\u{FFFD}");
    let top = &logprobs[0].top[0];
    assert_eq!(top.bytes, if top.token_id < 256 { vec![top.token_id as u8] } else { vec![] });

    let input = ScoreInput { sequence: Some(score_input::Sequence::Text("ab<|im_end|>".into())) };
    let score = |omit_token_text| ScoreRequest {
        inputs: vec![input.clone()],
        top_logprobs: 1,
        omit_token_text,
        ..Default::default()
    };
    let mut client = server.generation(&key).await;
    let scored = client.score(score(false)).await.unwrap().into_inner().results.remove(0);
    let texts: Vec<_> = scored.logprobs.iter().map(|l| (l.text.as_str(), &l.bytes[..])).collect();
    assert_eq!(texts, [("b", &b"b"[..]), ("<|im_end|>", &[][..])]);
    assert!(!scored.next[0].text.is_empty());
    let bare = client.score(score(true)).await.unwrap().into_inner().results.remove(0);
    assert!(bare.logprobs.iter().all(|l| l.text.is_empty() && l.bytes.is_empty()));
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_score_that_fits_only_without_text_says_so() {
    let server = TestServer::start_with(|config| config.limits.max_message_bytes = 4500).await;
    let key = server.tenant("a").await;
    let score = |omit_token_text| ScoreRequest {
        // Tokens with long names: 16 bytes for each are within the limit, what they come to is not.
        inputs: vec![ScoreInput { sequence: Some(score_input::Sequence::Text("<|im_end|>".repeat(240))) }],
        omit_token_text,
        ..Default::default()
    };
    let mut client = server.generation(&key).await;
    assert!(client.score(score(true)).await.is_ok());
    let status = client.score(score(false)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("omit_token_text"), "{}", status.message());
    server.stopped().await;
}
