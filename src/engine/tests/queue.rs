//! What waits in the queue: it holds no adapter, it can lose its place to a tenant with fewer, and what is not read stays bounded.

use super::*;

fn ask(adapter: Option<usize>, max_tokens: u32) -> Request {
    Request { adapter, prompt: vec![1; 9], max_tokens, temperature: 0.0, seed: 0 }
}

async fn begin(engine: &Engine, tenant: &Tenant, request: &Request) -> GenerateStream {
    one(engine, tenant, request.spec()).await.unwrap()
}

/// The last thing that a stream says.
async fn end(stream: GenerateStream) -> Result<GenerateEvent> {
    stream.fold(None, |_, event| async { Some(event) }).await.unwrap()
}

/// Waits for the first token of an answer.
async fn runs(stream: &mut GenerateStream) {
    while !matches!(stream.next().await.unwrap().unwrap(), GenerateEvent::Delta { .. }) {}
}

#[test]
fn requests_that_wait_hold_no_adapter() {
    run(async {
        let w = make_world(Model::tiny(3)).await;
        let engine = start(w.model.clone(), w.text.clone(), w.hub.clone(), &tight(2, 40)).unwrap();
        let mut first = begin(&engine, &w.tenant, &ask(None, 200)).await;
        runs(&mut first).await;
        let mut waiting = Vec::new();
        for i in 0..60 {
            waiting.push(begin(&engine, &w.tenant, &ask(Some(i % 2), 3)).await);
        }
        // Its answer says that all have been taken in; where the first has ended meanwhile, one runs.
        let _ = engine.check_integrity().await;
        assert!(w.hub.stats().leases <= 1, "{:?}", w.hub.stats());
        drop(first);
        for stream in waiting {
            assert!(matches!(end(stream).await, Ok(GenerateEvent::Finished { .. })));
        }
        assert_idle(&engine).await;
        assert_eq!(w.hub.stats().leases, 0);
    });
}

#[test]
fn a_version_that_is_deleted_before_its_request_starts_is_named() {
    run(async {
        let w = make_world(Model::tiny(3)).await;
        let arbiter = Arbiter::new(0.4);
        let model = w.model.clone();
        let engine = start_beside(arbiter.clone(), model, w.text.clone(), w.hub.clone(), &tight(2, 40)).unwrap();
        // Nothing is computed until the version is gone.
        let nothing_runs = arbiter.train();
        let first = begin(&engine, &w.tenant, &ask(None, 240)).await;
        let (second, third) =
            (begin(&engine, &w.tenant, &ask(None, 3)).await, begin(&engine, &w.tenant, &ask(Some(1), 3)).await);
        let name = AdapterName::new(w.tenant.id(), "a1").unwrap();
        w.hub.delete_adapter(&w.tenant, &name, "").await.unwrap();
        drop((nothing_runs, first));
        assert!(end(second).await.is_ok());
        match end(third).await {
            Err(Error::Precondition { reason: "VERSION_DELETED", subject, .. }) => {
                assert_eq!(subject, "tenants/t/adapters/a1/versions/1")
            }
            other => panic!("{other:?}"),
        }
        assert_idle(&engine).await;
    });
}

/// A request that came later does not go before the other answers to one that has begun.
#[test]
fn several_answers_keep_their_places_while_the_first_computes_the_prompt() {
    run(async {
        let w = world();
        let layout = KvLayout { block_tokens: 8, blocks: 40, dtype: KvDtype::F16 };
        let executor = w.model.executor(layout).unwrap();
        // A place for one, whose prompt takes several steps.
        let limits = Limits { max_step_rows: 8, ..tight(2, 40) };
        let (mut state, bare) = bare_loop_beside(w.hub.clone(), &limits, layout, executor);
        let (first, _first) = submit_with(&bare, SequenceAdapter::Base, 3, 0, &|first| first.followers = 1..3);
        assert_eq!(first, 0);
        let follow = |_| submit_with(&bare, SequenceAdapter::Base, 3, 0, &|other| other.follows = Some(0));
        let _others = [1, 2].map(follow);
        let _later = submit(&bare, SequenceAdapter::Base, 3);
        let mut ended = Vec::new();
        assert!(state.turn());
        assert_eq!((state.scheduler.running(), state.scheduler.waiting()), (1, 3));
        while !state.sequences.is_empty() {
            let before: BTreeSet<u64> = state.sequences.keys().copied().collect();
            assert!(state.turn());
            ended.extend(before.into_iter().filter(|id| !state.sequences.contains_key(id)));
        }
        assert_eq!(ended, [0, 1, 2, 3]);

        // Where the first goes before it has computed the prompt, the next one does it.
        let (first, reader) = submit_with(&bare, SequenceAdapter::Base, 3, 0, &|first| first.followers = 5..6);
        let (other, _other) = submit_with(&bare, SequenceAdapter::Base, 3, 0, &|other| other.follows = Some(4));
        assert_eq!((first, other), (4, 5));
        assert!(state.turn());
        drop(reader);
        bare.sender.send(Message::Cancel(4..5)).unwrap();
        assert!(state.turn());
        assert_eq!((state.sequences.len(), state.scheduler.running()), (1, 1));
    });
}

#[test]
fn where_the_queue_is_full_a_tenant_with_fewer_gets_the_newest_place_of_the_one_with_most() {
    run(async {
        let (w, arbiter) = (world(), Arbiter::new(0.4));
        let limits = Limits { max_queued: 8, max_queued_per_tenant: 8, ..tight(2, 40) };
        let engine = start_beside(arbiter.clone(), w.model.clone(), w.text.clone(), w.hub.clone(), &limits).unwrap();
        let other = Tenant::proven(TenantId::new("u").unwrap());
        // None of the eight has ended before the ninth comes.
        let nothing_runs = arbiter.train();
        let mut held = Vec::new();
        for _ in 0..8 {
            held.push(begin(&engine, &w.tenant, &ask(None, 200)).await);
        }
        let served = begin(&engine, &other, &ask(None, 3)).await;
        drop(nothing_runs);
        match end(held.pop().unwrap()).await {
            Err(Error::Exhausted { limit: "max_queued", retry_after: Some(_), .. }) => {}
            last => panic!("{last:?}"),
        }
        assert!(matches!(end(served).await, Ok(GenerateEvent::Finished { .. })), "it runs beside the others");
        drop(held);
        assert_idle(&engine).await;
    });
}

/// A request that turns out to be none has ended nobody's, and several answers find room together or not at all.
#[test]
fn who_fails_or_is_refused_takes_nobodys_place() {
    run(async {
        let (w, arbiter) = (world(), Arbiter::new(0.4));
        // What has started gives its place to nobody, so no more than one may.
        let limits = Limits { max_queued: 8, max_queued_per_tenant: 8, max_running: 1, ..Limits::default() };
        let engine = start_beside(arbiter.clone(), w.model.clone(), w.text.clone(), w.hub.clone(), &limits).unwrap();
        let other = Tenant::proven(TenantId::new("u").unwrap());
        let nothing_runs = arbiter.train();
        let mut held = Vec::new();
        for _ in 0..8 {
            held.push(begin(&engine, &w.tenant, &ask(None, 200)).await);
        }
        let refused = async |change: &dyn Fn(&mut GenerateSpec)| {
            let mut spec = ask(None, 3).spec();
            change(&mut spec);
            engine.generate(&other, spec).await.err().expect("refused")
        };
        let long = refused(&|spec| spec.prompt = Prompt::Text("x".repeat(100_000))).await;
        assert!(matches!(long, Error::Invalid { reason: "PROMPT_TOO_LONG", .. }), "{long}");
        let bad_id = refused(&|spec| spec.prompt = Prompt::TokenIds(vec![9999])).await;
        assert!(matches!(bad_id, Error::Invalid { .. }), "{bad_id}");
        let not_theirs = refused(&|spec| spec.adapter = Some("tenants/u/adapters/none".parse().unwrap())).await;
        assert!(matches!(not_theirs, Error::NotFound { .. }), "{not_theirs}");
        let several = refused(&|spec| spec.sampling.n = 5).await;
        assert!(matches!(several, Error::Exhausted { limit: "max_queued", .. }), "{several}");
        let text = Prompt::Text("a".into());
        let tokenized = engine.tokenize(&other, text, false).await.expect_err("the queue is full");
        assert!(matches!(tokenized, Error::Exhausted { limit: "max_queued", .. }), "{tokenized}");
        assert_eq!(engine.queued(), 8, "nobody has gone");
        drop((held, nothing_runs));
        assert_idle(&engine).await;
    });
}

#[test]
fn a_score_counts_as_many_requests_as_it_has_inputs() {
    run(async {
        let (w, arbiter) = (world(), Arbiter::new(0.4));
        let limits = Limits { max_queued_per_tenant: 4, ..Limits::default() };
        let engine = start_beside(arbiter.clone(), w.model.clone(), w.text.clone(), w.hub.clone(), &limits).unwrap();
        let spec = |inputs: usize| ScoreSpec {
            adapter: None,
            inputs: vec![Prompt::TokenIds(vec![1; 9]); inputs],
            top_logprobs: 0,
            priority: 0,
            deadline: None,
            trace: None,
        };
        let refused = engine.score(&world().tenant, spec(5)).await.unwrap_err();
        assert!(matches!(refused, Error::Exhausted { limit: "max_queued_per_tenant", .. }), "{refused}");
        assert_eq!(engine.score(&world().tenant, spec(4)).await.unwrap().results.len(), 4);
        let nothing_runs = arbiter.train();
        let cancelled = engine.score(&world().tenant, spec(4));
        assert!(tokio::time::timeout(Duration::ZERO, cancelled).await.is_err());
        drop(nothing_runs);
        assert_idle(&engine).await;
    });
}

#[test]
fn an_answer_that_nobody_reads_ends_and_gives_its_place_back() {
    run(async {
        let w = world();
        let limits = Limits { max_unread_answer_bytes: 4096, max_queued_per_tenant: 2, ..tight(2, 40) };
        let engine = engine(&limits);
        let unread = begin(&engine, &w.tenant, &ask(None, 200)).await;
        // With one place in a step this one is computed after the other has ended.
        assert_eq!(tokens(&engine, &ask(None, 5)).await.len(), 5);
        let second = begin(&engine, &w.tenant, &ask(None, 5)).await;
        let third = begin(&engine, &w.tenant, &ask(None, 5)).await;
        match end(unread).await {
            Err(Error::Exhausted { limit: "max_unread_answer_bytes", retry_after: None, .. }) => {}
            last => panic!("{last:?}"),
        }
        assert!(end(second).await.is_ok() && end(third).await.is_ok());
        assert_idle(&engine).await;
        assert_eq!(engine.memory.used(), 0);
    });
}

#[test]
fn unread_answers_of_all_are_bounded_together() {
    run(async {
        let w = world();
        let limits = Limits { max_request_memory_bytes: 1 << 16, ..tight(2, 40) };
        let memory = Memory::new(1 << 16);
        let arbiter = Arbiter::new(0.4);
        let engine = {
            let _runtime = runtime().enter();
            let (model, text, hub) = (w.model.clone(), w.text.clone(), w.hub.clone());
            Engine::start(model, text, hub, arbiter.clone(), memory.clone(), KvCacheType::F16, &limits).unwrap()
        };
        // All have begun before any takes memory for what nobody reads.
        let nothing_runs = arbiter.train();
        let mut unread = Vec::new();
        for _ in 0..6 {
            unread.push(begin(&engine, &w.tenant, &ask(None, 100)).await);
        }
        drop(nothing_runs);
        // All have ended before any is read. A tenant may hold as much as is left to the others of a half of the memory.
        assert_idle(&engine).await;
        assert!(memory.used() <= 1 << 14, "{}", memory.used());
        let ends = futures::future::join_all(unread.into_iter().map(end)).await;
        let refused = |end: &&Result<GenerateEvent>| {
            matches!(end, Err(Error::Exhausted { limit: "max_request_memory_bytes", .. }))
        };
        assert!(ends.iter().filter(refused).count() >= 3, "{ends:?}");
        assert_eq!(memory.used(), 0);
    });
}
