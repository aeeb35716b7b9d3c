//! What a request may ask of the draw: penalties, biases, least lengths, several answers; and what the answer tells of it.

use super::*;
use crate::request::StopCause;

/// An answer as its events tell it.
#[derive(Debug, Clone, PartialEq)]
struct Told {
    seed: Option<u64>,
    ids: Vec<u32>,
    text: String,
    reason: FinishReason,
    stop: Option<StopCause>,
    usage: Usage,
}

async fn told(mut stream: GenerateStream) -> Told {
    let Some(Ok(GenerateEvent::Started { seed, .. })) = stream.next().await else { panic!("no start") };
    let (mut ids, mut text) = (Vec::new(), String::new());
    while let Some(event) = stream.next().await {
        match event.unwrap() {
            GenerateEvent::Delta { text: delta, tokens } => {
                text += &delta;
                ids.extend(tokens.iter().map(|token| token.id));
            }
            GenerateEvent::Finished { reason, stop, usage } => return Told { seed, ids, text, reason, stop, usage },
            GenerateEvent::Started { .. } => panic!("a second start"),
        }
    }
    panic!("no end");
}

async fn all(engine: &Engine, spec: GenerateSpec) -> Vec<Told> {
    futures::future::join_all(engine.generate(&world().tenant, spec).await.unwrap().into_iter().map(told)).await
}

async fn alone(engine: &Engine, spec: GenerateSpec) -> Told {
    all(engine, spec).await.remove(0)
}

fn spec(prompt: Vec<u32>, max_tokens: u32, change: impl FnOnce(&mut GenerateSpec)) -> GenerateSpec {
    let mut spec = Request { adapter: None, prompt, max_tokens, temperature: 0.0, seed: 7 }.spec();
    change(&mut spec);
    spec
}

/// Every setting of the draw.
fn settings() -> impl Strategy<Value = Sampling> {
    let penalties = (-2.0f32..2.0, -2.0f32..2.0, prop::sample::select(vec![1.0f32, 1.3]));
    let bias = prop::collection::btree_map(0u32..258, prop::sample::select(vec![-100.0f32, -3.0, 2.5]), 0..6);
    (penalties, bias, 0u32..6, prop::sample::select(vec![0.0f32, 0.9]), 1u32..4, any::<u64>()).prop_map(
        |((presence_penalty, frequency_penalty, repetition_penalty), bias, min_tokens, temperature, n, seed)| {
            Sampling {
                temperature,
                presence_penalty,
                frequency_penalty,
                repetition_penalty,
                logit_bias: bias.into_iter().collect(),
                min_tokens,
                n,
                seed,
                ..Sampling::default()
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Whatever is asked of the draw: answer i of several is the answer to a request with seed + i alone, in a tight engine full of
    /// others as in an empty one; what is banned never comes, and no end before its time.
    #[test]
    fn each_of_several_answers_is_that_of_its_seed_alone(
        requests in prop::collection::vec((settings(), prop::collection::vec(0u32..256, 1..30)), 1..4),
        blocks in 12u64..20,
    ) {
        run(async {
            let (empty, crowded) = (engine(&Limits::default()), engine(&tight(9, blocks)));
            let make = |(sampling, prompt): &(Sampling, Vec<u32>)| spec(prompt.clone(), 12, |spec| {
                spec.sampling = sampling.clone();
                spec.stopping.ignore_eos = false;
            });
            let together = futures::future::join_all(requests.iter().map(|request| all(&crowded, make(request)))).await;
            for (request, answers) in requests.iter().zip(together) {
                let sampling = &request.0;
                assert_eq!(answers.len(), sampling.n as usize);
                for (i, answer) in answers.into_iter().enumerate() {
                    let mut single = make(request);
                    single.sampling.n = 1;
                    single.sampling.seed = sampling.seed.wrapping_add(i as u64);
                    assert_eq!(answer.seed, (sampling.temperature > 0.0).then_some(single.sampling.seed));
                    let want = alone(&empty, single).await;
                    assert_eq!((&answer.ids, &answer.text, &answer.stop), (&want.ids, &want.text, &want.stop));
                    assert!(answer.ids.len() >= sampling.min_tokens as usize);
                    let banned = |id: &u32| sampling.logit_bias.contains(&(*id, -100.0));
                    assert!(!answer.ids.iter().any(banned), "{:?}", answer.ids);
                }
            }
            assert_idle(&crowded).await;
        });
    }
}

#[test]
fn the_prompt_of_several_answers_is_computed_once() {
    run(async {
        let engine = engine(&Limits::default());
        let asked = spec((0..100).collect(), 4, |s| (s.sampling.n, s.sampling.temperature) = (3, 1.0));
        let answers = all(&engine, asked).await;
        assert_eq!(answers.iter().map(|a| a.seed).collect::<Vec<_>>(), [Some(7), Some(8), Some(9)]);
        // Whole blocks of 16 tokens are found.
        let cached: Vec<_> = answers.iter().map(|a| a.usage.cached_tokens).collect();
        assert_eq!(cached, [Some(0), Some(96), Some(96)]);
    });
}

#[test]
fn what_ended_an_answer_is_named() {
    run(async {
        let engine = engine(&Limits::default());
        let ended_by_bias = spec(vec![1, 2], 9, |s| {
            s.sampling.logit_bias = vec![(257, 100.0)];
            s.stopping.ignore_eos = false;
        });
        let answer = alone(&engine, ended_by_bias.clone()).await;
        assert_eq!(
            (answer.reason, answer.stop, answer.ids),
            (FinishReason::Stop, Some(StopCause::Token(257)), vec![257])
        );

        let mut later = ended_by_bias;
        later.sampling.min_tokens = 5;
        let answer = alone(&engine, later).await;
        assert_eq!((answer.ids.len(), answer.usage.completion_tokens), (6, 6), "five tokens, then the end");
        assert_eq!(answer.stop, Some(StopCause::Token(257)));

        // "a" and nothing else.
        let letters = |stop: &[&str], min_tokens| {
            spec(vec![1, 2], 9, |s| {
                s.sampling.logit_bias = vec![(97, 100.0)];
                s.sampling.min_tokens = min_tokens;
                s.stopping.stop = stop.iter().map(|stop| stop.to_string()).collect();
            })
        };
        let answer = alone(&engine, letters(&["zz", "aaa"], 0)).await;
        assert_eq!((answer.text.as_str(), answer.stop), ("", Some(StopCause::Text("aaa".into()))));
        let answer = alone(&engine, letters(&["zz", "aaa"], 4)).await;
        assert_eq!((answer.text.as_str(), answer.stop), ("aa", Some(StopCause::Text("aaa".into()))));
        assert_eq!(answer.usage.completion_tokens, 5, "it begins before the fourth token and ends after it");
        let answer = alone(&engine, letters(&[], 9)).await;
        assert_eq!((answer.reason, answer.stop, answer.text.len()), (FinishReason::Length, None, 9));
    });
}

#[test]
fn draws_that_cannot_be_are_refused_by_name() {
    run(async {
        let engine = engine(&Limits { max_logit_biases: 300, ..Limits::default() });
        let refused = async |change: &dyn Fn(&mut GenerateSpec)| {
            let refused = engine.generate(&world().tenant, spec(vec![1], 4, |s| change(s))).await.err();
            refused.expect("refused").to_string()
        };
        assert!(refused(&|s| s.sampling.n = 0).await.contains("sampling.n"));
        assert!(refused(&|s| s.sampling.n = 17).await.contains("max_sequences_per_request"));
        assert!(refused(&|s| s.sampling.min_tokens = 5).await.contains("sampling.min_tokens"));
        assert!(refused(&|s| s.sampling.presence_penalty = 2.1).await.contains("sampling.presence_penalty"));
        assert!(refused(&|s| s.sampling.frequency_penalty = f32::NAN).await.contains("sampling.frequency_penalty"));
        assert!(refused(&|s| s.sampling.logit_bias = vec![(3, -100.5)]).await.contains("sampling.logit_bias[3]"));
        assert!(refused(&|s| s.sampling.logit_bias = vec![(3, f32::NAN)]).await.contains("sampling.logit_bias[3]"));
        assert!(refused(&|s| s.sampling.logit_bias = vec![(258, 1.0)]).await.contains("258"));
        let many = |n| (0..n).map(|id| (id, 1.0)).collect::<Vec<_>>();
        assert!(refused(&|s| s.sampling.logit_bias = many(301)).await.contains("max_logit_biases"));
        let banned = |n| (0..n).map(|id| (id, -100.0)).collect::<Vec<_>>();
        assert!(refused(&|s| s.sampling.logit_bias = banned(258)).await.contains("bans every token"));
        let only_the_end = |s: &mut GenerateSpec| {
            s.sampling.logit_bias = banned(257);
            s.sampling.min_tokens = 1;
            s.stopping.ignore_eos = false;
        };
        assert!(refused(&only_the_end).await.contains("bans every token"));
        let last = alone(&engine, spec(vec![1], 2, |s| s.sampling.logit_bias = banned(257))).await;
        assert_eq!(last.ids, [257, 257], "one token is left, and comes");
        assert_idle(&engine).await;
    });
}

#[test]
fn each_of_several_answers_counts_as_a_request() {
    run(async {
        let engine = engine(&Limits { max_queued_per_tenant: 3, ..Limits::default() });
        let several = |n| spec(vec![1; 20], 3, |s| s.sampling.n = n);
        let refused = engine.generate(&world().tenant, several(4)).await.err().expect("refused");
        assert!(matches!(refused, Error::Exhausted { limit: "max_queued_per_tenant", .. }), "{refused}");
        assert_eq!(engine.held_by(world().tenant.id()), 0, "and holds nothing");
        assert_eq!(all(&engine, several(3)).await.len(), 3);
        // Readers that go away while the others wait for the prompt.
        drop(engine.generate(&world().tenant, several(3)).await.unwrap());
        assert_idle(&engine).await;
        let mut left = engine.generate(&world().tenant, several(3)).await.unwrap();
        drop(left.remove(0));
        let others = futures::future::join_all(left.into_iter().map(told)).await;
        assert!(others.iter().all(|answer| answer.ids.len() == 3), "{others:?}");
        assert_idle(&engine).await;
    });
}
