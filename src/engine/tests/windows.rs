//! A base of which some layers see a window: what no row can see is given back, and no bit of an answer tells.

use super::*;
use crate::model::groups::KvGroups;

fn windowed_world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| runtime().block_on(make_world(Model::tiny_windowed(3))))
}

fn run_windowed<T>(future: impl Future<Output = T>) -> T {
    windowed_world();
    run(future)
}

/// Gives back what no row can see.
fn giving_back(limits: &Limits) -> Engine {
    let w = windowed_world();
    start(w.model.clone(), w.text.clone(), w.hub.clone(), limits).unwrap()
}

/// Keeps everything: all layers are one group.
fn keeping() -> Engine {
    let w = windowed_world();
    let layout = KvLayout { block_tokens: 16, blocks: 64, dtype: KvDtype::F16 };
    let info = EngineInfo {
        base: w.model.shape().digest,
        context: w.model.context_length(),
        layout,
        paging: one_group(layout),
    };
    let limits = Limits { prefix_cache_percent: 0, ..Limits::default() };
    let executor = w.model.executor(layout).unwrap();
    let (text, hub, memory) = (w.text.clone(), w.hub.clone(), Memory::new(1 << 30));
    let _runtime = runtime().enter();
    Engine::start_with(executor, info, text, hub, Arbiter::new(0.4), memory, &limits).unwrap()
}

/// As [`tight`]: so many pages of 8 tokens.
fn tight_pages(step_rows: u64, pages: u64) -> Limits {
    let model = &windowed_world().model;
    let kv_cache_bytes = model.kv_page_bytes(&model.kv_groups(), 8, KvDtype::F16) * pages;
    Limits { kv_cache_bytes, ..tight(step_rows, 1) }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Any company, chunking, preemption and reuse, with pages that go and come: the bits of an engine that keeps everything.
    #[test]
    fn an_answer_does_not_depend_on_what_is_given_back(
        requests in requests_of(140, 100, 6),
        step_rows in 2u64..40,
        spare in 0u64..30,
        percent in prop::sample::select(vec![0u64, 30, 100]),
    ) {
        run_windowed(async {
            let pages = Paging::new(8, step_rows as usize, windowed_world().model.kv_groups().windows.clone()).most(256);
            let alone = keeping();
            let limits = Limits { prefix_cache_percent: percent, ..tight_pages(step_rows, pages as u64 + spare) };
            let crowded = giving_back(&limits);
            let together = futures::future::join_all(requests.iter().map(|r| tokens(&crowded, r))).await;
            for (request, got) in requests.iter().zip(together) {
                assert_eq!(got, tokens(&alone, request).await);
                assert_eq!(got, tokens(&crowded, request).await, "and again, when more is there to be found");
                assert_eq!(got.len(), request.max_tokens as usize);
            }
            assert_idle(&crowded).await;
        });
    }
}

#[test]
fn what_was_given_back_is_found_again_and_gives_the_same_bits() {
    run_windowed(async {
        let (engine, keeps) = (giving_back(&tight_pages(24, 100)), keeping());
        let tenant = &windowed_world().tenant;
        let ask = |prompt: Vec<u32>| Request { adapter: Some(1), prompt, max_tokens: 6, temperature: 0.0, seed: 0 };
        let first = Request { max_tokens: 150, ..ask((0..40).collect()) };
        let answered: Vec<u32> = tokens(&engine, &first).await.iter().map(|token| token.id).collect();
        let all = [&first.prompt[..], &answered].concat();
        // Within the answer, whose pages have been given back one by one; and at its end.
        for (cut, found) in [(100, 96), (130, 128), (189, 184)] {
            let next = ask([&all[..cut], &[7; 9]].concat());
            assert_eq!(cached(&engine, tenant, &next).await, found);
            assert_eq!(tokens(&engine, &next).await, tokens(&keeps, &next).await);
        }
        let other = Request { adapter: Some(0), ..ask(all) };
        assert_eq!(cached(&engine, tenant, &other).await, 0, "another version finds nothing");
        assert_idle(&engine).await;
    });
}

/// Pages of a long answer's groups: the one that sees everything grows, the other does not; and a step takes no memory.
#[test]
fn a_long_answer_holds_what_its_windows_show_and_its_steps_allocate_nothing() {
    run_windowed(async {
        let w = windowed_world();
        let layout = KvLayout { block_tokens: 8, blocks: 200, dtype: KvDtype::F16 };
        let executor = w.model.serving_executor(layout).unwrap();
        let (mut state, bare) = bare_loop(layout, executor);
        let KvGroups { windows, layers_per_page, .. } = w.model.kv_groups();
        assert_eq!((&windows[..], layers_per_page), (&[Some(32), None][..], 2));
        let limits = tight(16, 16);
        let paging = Paging::new(8, limits.max_step_rows as usize, windows);
        state.scheduler = Scheduler::new(scheduler_config(layout, paging, &limits).unwrap());
        state.context = w.model.context_length();
        let readers = [submit(&bare, SequenceAdapter::Base, 220), submit(&bare, SequenceAdapter::Base, 220)];
        (0..10).for_each(|_| assert!(state.turn()));
        let mut most = 0;
        for _ in 0..200 {
            state.schedule();
            let before = allocations();
            let done = state.compute();
            assert_eq!(allocations() - before, 0);
            let length = state.plan[0].start + 1;
            most = most.max(state.scheduler.blocks().used() - 2 * length.div_ceil(8));
            state.commit(done);
        }
        // 32 positions, from a multiple of 64 on: at most 95 and the next, in 12 pages of each sequence.
        assert_eq!(most, 2 * 12);
        drop(readers);
    });
}

#[test]
fn what_fits_the_cache_is_counted_in_pages_of_all_groups() {
    run_windowed(async {
        let paging = Paging::new(8, 16, windowed_world().model.kv_groups().windows.clone());
        let (pages, longest) = (paging.most(200), 200);
        let engine = giving_back(&tight_pages(16, pages as u64));
        let ask =
            |tokens| Request { adapter: None, prompt: vec![1; 190], max_tokens: tokens, temperature: 0.0, seed: 0 };
        assert_eq!(tokens(&engine, &ask(longest - 190)).await.len(), 10);
        let refused = one(&engine, &windowed_world().tenant, ask(11).spec()).await.err().unwrap().to_string();
        assert!(refused.contains("201 tokens of KV cache; the cache holds 200 (limit kv_cache_bytes)"), "{refused}");
        assert_idle(&engine).await;
    });
}
