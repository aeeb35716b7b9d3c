//! The prefix cache through the whole engine: what is found, and what is computed.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

/// The model, and the rows that it has computed.
struct Counting {
    model: Box<dyn Executor>,
    rows: Arc<AtomicUsize>,
}

impl Executor for Counting {
    fn forward(&mut self, chunks: &[SequenceChunk<'_>]) -> Result<&[f32]> {
        self.rows.fetch_add(chunks.iter().map(|chunk| chunk.ids.len()).sum(), Ordering::Relaxed);
        self.model.forward(chunks)
    }
}

#[test]
fn what_was_computed_before_is_not_computed_again() {
    run(async {
        let w = world();
        let layout = KvLayout { block_tokens: 8, blocks: 60, dtype: KvDtype::F16 };
        let rows = Arc::new(AtomicUsize::new(0));
        let counting = Box::new(Counting { model: w.model.executor(layout).unwrap(), rows: rows.clone() });
        let info = EngineInfo {
            base: w.model.shape().digest,
            context: w.model.context_length(),
            layout,
            paging: one_group(layout),
        };
        let (text, hub, arbiter) = (w.text.clone(), w.hub.clone(), Arbiter::new(0.4));
        let memory = Memory::new(1 << 30);
        let engine = Engine::start_with(counting, info, text, hub, arbiter, memory, &Limits::default()).unwrap();
        let ask = async |tenant: &Tenant, adapter, prompt: Vec<u32>| {
            let request = Request { adapter, prompt, max_tokens: 6, temperature: 0.0, seed: 0 };
            let before = rows.load(Ordering::Relaxed);
            let found = cached(&engine, tenant, &request).await;
            let computed = rows.load(Ordering::Relaxed) - before;
            assert_eq!(computed, request.prompt.len() + 5 - found as usize);
            found
        };
        let prompt: Vec<u32> = (0..100).collect();
        let with = |tail: &[u32]| [&prompt, tail].concat();
        assert_eq!(ask(&w.tenant, None, with(&[7; 5])).await, 0);
        assert_eq!(ask(&w.tenant, None, with(&[8; 20])).await, 96, "twelve whole blocks are the same");
        assert_eq!(ask(&w.tenant, None, prompt[..96].to_vec()).await, 88, "the last token is always computed");
        assert_eq!(ask(&w.tenant, None, prompt[1..].to_vec()).await, 0, "the same tokens at other positions");
        assert_eq!(ask(&w.tenant, Some(0), with(&[7; 5])).await, 0, "an adapter");
        assert_eq!(ask(&w.tenant, Some(1), with(&[7; 5])).await, 0, "another one");
        assert_eq!(ask(&w.tenant, Some(0), with(&[9; 5])).await, 96);
        let other = Tenant::proven(TenantId::new("u").unwrap());
        assert_eq!(ask(&other, None, with(&[7; 5])).await, 0, "another tenant");

        // The next turn of a chat finds the answer of the one before.
        let request = Request { adapter: None, prompt: vec![3; 20], max_tokens: 30, temperature: 0.0, seed: 0 };
        let answered: Vec<u32> = tokens(&engine, &request).await.iter().map(|token| token.id).collect();
        let next = [&request.prompt[..], &answered, &[4; 9]].concat();
        assert_eq!(ask(&w.tenant, None, next).await, 48, "all whole blocks of the 49 tokens that were computed");
        assert_idle(&engine).await;
    });
}

#[test]
fn a_prefix_cache_of_no_percent_finds_nothing() {
    run(async {
        let engine = engine(&Limits { prefix_cache_percent: 0, ..Limits::default() });
        let request = Request { adapter: None, prompt: vec![1; 100], max_tokens: 2, temperature: 0.0, seed: 0 };
        for _ in 0..2 {
            assert_eq!(cached(&engine, &world().tenant, &request).await, 0);
        }
    });
}
