//! The engine on the tiny model: an answer does not depend on its company, and nothing is left behind.

mod figures;
mod queue;
mod reuse;
mod sampling;
mod warm;
mod windows;

use std::collections::BTreeMap;
use std::sync::OnceLock;

use futures::StreamExt as _;
use proptest::prelude::*;
use tempfile::TempDir;

use super::answer::UnreadEvents;
use super::*;
use crate::adapter::peft::Package;
use crate::adapter::{Adapter, Initialisation, PackedAdapter};
use crate::config::KvCacheType;
use crate::hub::{NewVersion, PublishGate};
use crate::ids::{AdapterName, TenantId};
use crate::kernels::testing::allocations;
use crate::model::batch::{KvDtype, SequenceChunk};
use crate::request::{
    ChatMessage, FinishReason, LoraSpec, ParityReport, Publish, Sampling, Stopping, Target, TokenOut,
};
use crate::store::Store;

struct PassingGate;

impl PublishGate for PassingGate {
    fn check(&self, _packed: &Arc<PackedAdapter>, _lora: &Arc<Adapter>, _probes: &[Vec<u32>]) -> Result<ParityReport> {
        Ok(ParityReport {
            tokens: 256,
            mean_abs_difference: 0.0,
            mean_abs_effect: 1.0,
            threshold: 0.1,
            no_effect: false,
        })
    }

    fn plain_form(&self, _lora: &Adapter, _initialisation: Initialisation) -> Result<Option<Adapter>> {
        Ok(None)
    }
}

/// A hub with adapters `a0` (rank 4 on q and v) and `a1` (rank 7 on all).
struct World {
    dir: TempDir,
    model: Arc<Model>,
    text: Arc<Text>,
    store: Store,
    hub: Arc<Hub>,
    tenant: Tenant,
}

fn runtime() -> &'static tokio::runtime::Runtime {
    static RUNTIME: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| tokio::runtime::Runtime::new().unwrap())
}

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| runtime().block_on(make_world(Model::tiny(3))))
}

fn run<T>(future: impl Future<Output = T>) -> T {
    world();
    runtime().block_on(future)
}

async fn make_world((model, text): (Arc<Model>, Arc<Text>)) -> World {
    let dir = TempDir::new().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    let id = TenantId::new("t").unwrap();
    store.create_tenant(&id, "", 1, "").await.unwrap();
    let tenant = Tenant::proven(id.clone());
    let hub = Hub::new(
        store.clone(),
        model.shape().clone(),
        text.template_digest(),
        Arc::new(PassingGate),
        &Limits::default(),
    );
    let specs = [
        LoraSpec { rank: 4, targets: vec![Target::QProj, Target::VProj], ..LoraSpec::default() },
        LoraSpec { rank: 7, ..LoraSpec::default() },
    ];
    for (i, spec) in specs.iter().enumerate() {
        let mut lora = Adapter::fresh(spec, model.shape(), i as u64).unwrap();
        for layer in lora.pairs_mut().map(|(_, pair)| pair) {
            layer.b.iter_mut().enumerate().for_each(|(j, b)| *b = ((i + 3 * j) as f32).sin() * 0.2);
        }
        let new = NewVersion {
            adapter: AdapterName::new(&id, &format!("a{i}")).unwrap(),
            package: Package::from_adapter(&lora, model.shape()).unwrap(),
            probes: Vec::new(),
            publish: Publish::Auto,
            job: None,
            metrics: BTreeMap::new(),
            request_id: String::new(),
            validate_only: false,
            held_reason: None,
            note: None,
        };
        hub.publish(&tenant, new).await.unwrap();
    }
    World { dir, model, text, store, hub, tenant }
}

fn start(model: Arc<Model>, text: Arc<Text>, hub: Arc<Hub>, limits: &Limits) -> Result<Engine> {
    start_beside(Arbiter::new(0.4), model, text, hub, limits)
}

/// Where the test holds the arbiter's turn of training, the engine computes nothing until it is dropped.
fn start_beside(
    arbiter: Arc<Arbiter>,
    model: Arc<Model>,
    text: Arc<Text>,
    hub: Arc<Hub>,
    limits: &Limits,
) -> Result<Engine> {
    let memory = Memory::new(limits.max_request_memory_bytes);
    let _runtime = runtime().enter();
    Engine::start(model, text, hub, arbiter, memory, KvCacheType::F16, limits)
}

fn engine(limits: &Limits) -> Engine {
    let w = world();
    start(w.model.clone(), w.text.clone(), w.hub.clone(), limits).unwrap()
}

#[derive(Debug, Clone)]
struct Request {
    adapter: Option<usize>,
    prompt: Vec<u32>,
    max_tokens: u32,
    temperature: f32,
    seed: u64,
}

impl Request {
    fn spec(&self) -> GenerateSpec {
        let adapter = self.adapter.map(|i| format!("tenants/t/adapters/a{i}").parse().unwrap());
        GenerateSpec {
            adapter,
            prompt: Prompt::TokenIds(self.prompt.clone()),
            sampling: Sampling { temperature: self.temperature, seed: self.seed, ..Sampling::default() },
            stopping: Stopping { max_tokens: self.max_tokens, stop: Vec::new(), ignore_eos: true },
            logprobs: Some(2),
            priority: 0,
            deadline: None,
            trace: None,
        }
    }
}

/// Prompts that begin alike for a while.
fn requests() -> impl Strategy<Value = Vec<Request>> {
    requests_of(60, 24, 9)
}

/// Fewer than `count` prompts, of which fewer than `alike` tokens are alike, each for fewer than `answer` tokens.
fn requests_of(alike: u32, answer: u32, count: usize) -> impl Strategy<Value = Vec<Request>> {
    let request = (
        prop::option::of(0usize..2),
        (0..alike, prop::collection::vec(0u32..256, 1..12)),
        1..answer,
        prop::sample::select(vec![0.0f32, 0.9]),
        0u64..4,
    );
    let request = request.prop_map(|(adapter, (alike, tail), max_tokens, temperature, seed)| Request {
        adapter,
        prompt: (0..alike).chain(tail).collect(),
        max_tokens,
        temperature,
        seed,
    });
    prop::collection::vec(request, 1..count)
}

/// The stream of a spec that asks for one answer.
async fn one(engine: &Engine, tenant: &Tenant, spec: GenerateSpec) -> Result<GenerateStream> {
    let mut streams = engine.generate(tenant, spec).await?;
    assert_eq!(streams.len(), 1);
    Ok(streams.remove(0))
}

async fn tokens(engine: &Engine, request: &Request) -> Vec<TokenOut> {
    let mut stream = one(engine, &world().tenant, request.spec()).await.unwrap();
    let mut all = Vec::new();
    while let Some(event) = stream.next().await {
        if let GenerateEvent::Delta { tokens, .. } = event.unwrap() {
            all.extend(tokens);
        }
    }
    all
}

/// Blocks of 8 tokens, enough for little more than the longest sequence; as many sequences as the rows of a step allow.
fn tight(step_rows: u64, blocks: u64) -> Limits {
    let bytes = world().model.kv_bytes_per_token(KvDtype::F16) * 8 * blocks;
    let max_running = step_rows - 1;
    Limits { kv_block_tokens: 8, kv_cache_bytes: bytes, max_step_rows: step_rows, max_running, ..Limits::default() }
}

async fn assert_idle(engine: &Engine) {
    for _ in 0..500 {
        if engine.check_integrity().await.is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    engine.check_integrity().await.unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any company, any chunking, any preemption, any reuse of what others have computed: the same tokens and the same
    /// log-probabilities, to the bit.
    #[test]
    fn an_answer_does_not_depend_on_its_company(
        requests in requests(),
        step_rows in 2u64..40,
        blocks in 12u64..20,
        percent in prop::sample::select(vec![0u64, 30, 100]),
    ) {
        run(async {
            let alone = engine(&Limits { prefix_cache_percent: 0, ..Limits::default() });
            let crowded = engine(&Limits { prefix_cache_percent: percent, ..tight(step_rows, blocks) });
            let together = futures::future::join_all(requests.iter().map(|r| tokens(&crowded, r))).await;
            for (request, got) in requests.iter().zip(together) {
                assert_eq!(got, tokens(&alone, request).await);
                assert_eq!(got, tokens(&crowded, request).await, "and again, when more is there to be found");
                assert_eq!(got.len(), request.max_tokens as usize);
            }
            assert_idle(&crowded).await;
        });
    }

    /// Clients that vanish, deadlines and drops leave nothing, and the others get their answers.
    #[test]
    fn vanished_clients_leave_nothing(requests in requests(), fates in prop::collection::vec(0u8..3, 9)) {
        run(async {
            let engine = engine(&tight(16, 14));
            let answers = requests.iter().zip(&fates).map(|(request, fate)| {
                let engine = &engine;
                async move {
                    let mut spec = request.spec();
                    if *fate == 1 {
                        spec.deadline = Some(Instant::now() + Duration::from_millis(u64::from(request.max_tokens) / 4));
                    }
                    let mut stream = one(engine, &world().tenant, spec).await.unwrap();
                    if *fate == 2 {
                        stream.next().await;
                        return true;
                    }
                    let last = stream.fold(None, |_, event| async { Some(event) }).await.unwrap();
                    matches!(last, Ok(GenerateEvent::Finished { .. })) || (*fate == 1 && matches!(last, Err(Error::DeadlineExceeded)))
                }
            });
            assert!(futures::future::join_all(answers).await.into_iter().all(|ok| ok));
            assert_idle(&engine).await;
        });
    }
}

/// A client that asks one thing after the other is never refused for what it has just been told the end of.
#[test]
fn the_end_of_an_answer_comes_after_its_room_is_given_back() {
    run(async {
        let engine = engine(&Limits { max_queued_per_tenant: 1, ..Limits::default() });
        let request = Request { adapter: Some(0), prompt: vec![1; 9], max_tokens: 2, temperature: 0.0, seed: 0 };
        let score = || ScoreSpec {
            adapter: None,
            inputs: vec![request.spec().prompt],
            top_logprobs: 0,
            priority: 0,
            deadline: None,
            trace: None,
        };
        for _ in 0..200 {
            let mut stream = one(&engine, &world().tenant, request.spec()).await.unwrap();
            while !matches!(stream.next().await.unwrap().unwrap(), GenerateEvent::Finished { .. }) {}
            assert!(engine.score(&world().tenant, score()).await.is_ok());
        }
    });
}

/// All layers in one group, as [`Model::executor`] has them.
fn one_group(layout: KvLayout) -> Paging {
    Paging::new(layout.block_tokens, 256, [None].into())
}

/// The loop without its thread.
fn bare_loop(layout: KvLayout, executor: Box<dyn Executor>) -> (EngineLoop, Bare) {
    bare_loop_beside(world().hub.clone(), &tight(16, 16), layout, executor)
}

fn bare_loop_beside(
    hub: Arc<Hub>,
    limits: &Limits,
    layout: KvLayout,
    executor: Box<dyn Executor>,
) -> (EngineLoop, Bare) {
    let (sender, inbox) = mpsc::channel();
    let sender = Arc::new(sender);
    let state = EngineLoop {
        inbox,
        scheduler: Scheduler::new(scheduler_config(layout, one_group(layout), limits).unwrap()),
        plan: Vec::new(),
        chunks: Vec::new(),
        outputs: Vec::new(),
        executor,
        arbiter: Arbiter::new(0.4),
        text: world().text.clone(),
        context: 100,
        sequences: HashMap::new(),
        deadlines: BTreeSet::new(),
        warm: Warm::new(hub, runtime().handle().clone(), Arc::downgrade(&sender)),
        stuck: false,
        closed: false,
    };
    (state, Bare { sender, tickets: Tickets::new(&Limits::default()) })
}

/// The handle of a bare loop.
struct Bare {
    sender: Arc<mpsc::Sender<Message>>,
    tickets: Tickets,
}

/// Sends a sequence of 20 tokens to a bare loop.
fn submit(bare: &Bare, adapter: SequenceAdapter, max_tokens: u32) -> UnreadEvents {
    submit_with(bare, adapter, max_tokens, 0, &|_| ()).1
}

/// As [`submit`], with a priority and a change; gives the sequence's id too.
fn submit_with(
    bare: &Bare,
    adapter: SequenceAdapter,
    max_tokens: u32,
    priority: i32,
    change: &dyn Fn(&mut Generation),
) -> (u64, UnreadEvents) {
    let w = world();
    let (answer, reader) = Answer::new(Memory::new(1 << 30).account(None), 1 << 20);
    let mut generation = Generation {
        prompt_length: 20,
        virtual_tokens: 0,
        cached_tokens: None,
        sampling: Sampling::default(),
        counts: None,
        stopping: Stopping { max_tokens, stop: Vec::new(), ignore_eos: true },
        withheld: Vec::new(),
        follows: None,
        followers: 0..0,
        logprobs: None,
        decoder: w.text.decoder(),
        hold_back: HoldBack::new(Patterns::new(&[], false).unwrap()),
        open: Default::default(),
        answer,
        unsent: None,
        end: None,
    };
    change(&mut generation);
    let ticket = Arc::new(bare.tickets.take(w.tenant.id(), 1).unwrap());
    let id = ticket.ids.start;
    let work = Work::Generate(Box::new(generation));
    let longest = 20 + max_tokens as usize;
    let request = SequenceRequest { tenant: 0, weight: 1, priority, length: 20, longest, hashes: None };
    let figures = stats::Figures::new(&stats::Tenants::new(1), w.tenant.id(), Instant::now(), None);
    let sequence = Sequence { ids: vec![1; 20], deadline: None, adapter, ticket, figures, work };
    bare.sender.send(Message::Submit(id, request, Box::new(sequence))).unwrap();
    (id, reader)
}

/// A steady batch, adapters of two ranks in it, is computed in the memory of the steps before.
#[test]
fn a_steady_step_allocates_nothing() {
    run(async {
        let w = world();
        let layout = KvLayout { block_tokens: 8, blocks: 64, dtype: KvDtype::F16 };
        let (mut state, bare) = bare_loop(layout, w.model.executor(layout).unwrap());
        let mut readers = Vec::new();
        for adapter in [None, Some("a0"), Some("a1"), None] {
            let adapter = match adapter {
                Some(name) => {
                    let name = format!("tenants/t/adapters/{name}").parse().unwrap();
                    SequenceAdapter::Wanted(Arc::new(w.hub.resolve(&w.tenant, &name).await.unwrap()))
                }
                None => SequenceAdapter::Base,
            };
            readers.push(submit(&bare, adapter, 60));
        }
        // The prompts, and one step with all of them.
        (0..10).for_each(|_| assert!(state.turn()));
        for _ in 0..20 {
            state.schedule();
            assert!(state.plan.len() == 4 && state.plan.iter().all(|planned| planned.count == 1));
            let before = allocations();
            let done = state.compute();
            assert_eq!(allocations() - before, 0);
            state.commit(done);
        }
        drop(readers);
    });
}

#[test]
fn after_a_panic_of_the_loop_everything_has_an_end_and_the_pool_is_whole() {
    run(async {
        let layout = KvLayout { block_tokens: 8, blocks: 16, dtype: KvDtype::F16 };
        let faulty = Box::new(Faulty { steps: 3, logits: Vec::new() });
        let (mut state, bare) = bare_loop(layout, faulty);
        let readers: Vec<_> = (0..3).map(|_| submit(&bare, SequenceAdapter::Base, 5)).collect();
        assert!(state.turn());
        assert!(state.scheduler.blocks().used() > 0);
        state.start_over();
        for mut reader in readers {
            assert!(matches!(reader.recv().await, Some(Err(Error::Internal(_)))));
            assert!(reader.recv().await.is_none());
        }
        state.check_integrity().unwrap();
    });
}

#[test]
fn limits_that_leave_prompts_no_row_are_refused() {
    let w = world();
    let limits = Limits { max_running: 64, max_step_rows: 64, ..Limits::default() };
    let engine = start(w.model.clone(), w.text.clone(), w.hub.clone(), &limits);
    assert!(engine.unwrap_err().to_string().contains("max_running"));
}

#[test]
fn scoring_rides_along_and_agrees_with_generation() {
    run(async {
        let engine = engine(&tight(5, 14));
        let request =
            Request { adapter: Some(1), prompt: (0..30).collect(), max_tokens: 12, temperature: 0.0, seed: 0 };
        let generated = tokens(&engine, &request).await;
        let ids = [request.prompt.clone(), generated.iter().map(|t| t.id).collect()].concat();
        let spec = ScoreSpec {
            adapter: request.spec().adapter,
            inputs: vec![Prompt::TokenIds(ids.clone()), Prompt::TokenIds(vec![5])],
            top_logprobs: 2,
            priority: 0,
            deadline: None,
            trace: None,
        };
        let (scored, _) = tokio::join!(engine.score(&world().tenant, spec), tokens(&engine, &request));
        let results = scored.unwrap().results;
        assert_eq!(results[0].logprobs.len(), ids.len() - 1);
        let last: Vec<_> = generated.into_iter().filter_map(|t| t.logprob).collect();
        assert_eq!(results[0].logprobs[29..], last[..], "the same bits by either way");
        assert_eq!((results[1].logprobs.len(), results[1].next.len()), (0, 2));
        assert_idle(&engine).await;
    });
}

#[test]
fn stop_strings_end_an_answer_before_them() {
    run(async {
        let engine = engine(&Limits::default());
        let request = Request { adapter: None, prompt: vec![97, 98], max_tokens: 20, temperature: 0.0, seed: 0 };
        let collect = async |stop: Vec<String>| {
            let mut spec = request.spec();
            spec.stopping.stop = stop;
            let mut stream = one(&engine, &world().tenant, spec).await.unwrap();
            let (mut text, mut reason, mut usage) = (String::new(), None, Usage::default());
            while let Some(event) = stream.next().await {
                match event.unwrap() {
                    GenerateEvent::Delta { text: delta, .. } => text += &delta,
                    GenerateEvent::Finished { reason: r, usage: u, .. } => (reason, usage) = (Some(r), u),
                    GenerateEvent::Started { .. } => {}
                }
            }
            (text, reason.unwrap(), usage)
        };
        let (whole, reason, usage) = collect(Vec::new()).await;
        assert_eq!((reason, usage.completion_tokens), (FinishReason::Length, 20));
        let (at, stop) = whole
            .char_indices()
            .skip(3)
            .map(|(at, _)| at)
            .zip(whole[whole.char_indices().nth(3).unwrap().0..].split_inclusive(char::is_whitespace))
            .next()
            .unwrap();
        let stop: String = stop.chars().take(3).collect();
        let at = whole.find(&stop).unwrap_or(at);
        let (text, reason, _) = collect(vec![stop]).await;
        assert_eq!((text.as_str(), reason), (&whole[..at], FinishReason::Stop));
    });
}

#[test]
fn bad_requests_say_what_is_wrong() {
    run(async {
        let engine = engine(&tight(16, 14));
        let refused = async |change: &dyn Fn(&mut GenerateSpec)| {
            let base = Request { adapter: None, prompt: vec![1], max_tokens: 4, temperature: 0.0, seed: 0 };
            let mut spec = base.spec();
            change(&mut spec);
            engine.generate(&world().tenant, spec).await.err().expect("refused").to_string()
        };
        let long = refused(&|s| s.prompt = Prompt::TokenIds(vec![1; 300])).await;
        assert!(long.contains("300") && long.contains("256"), "both lengths: {long}");
        let far_too_long = refused(&|s| s.prompt = Prompt::Text("x".repeat(100_000))).await;
        assert!(far_too_long.contains("100000 bytes") && far_too_long.contains("256"), "{far_too_long}");
        let named = ChatMessage { name: Some("x".repeat(100_000)), ..ChatMessage::new("user", "hi") };
        let name = refused(&|s| s.prompt = Prompt::Chat(vec![named.clone()])).await;
        assert!(name.contains("100002 bytes"), "a name is text too: {name}");
        let message = ChatMessage::new("user", "");
        let turns = refused(&|s| s.prompt = Prompt::Chat(vec![message.clone(); 1001])).await;
        assert!(turns.contains("max_chat_messages"), "{turns}");
        assert!(refused(&|s| s.prompt = Prompt::TokenIds(Vec::new())).await.contains("no token"));
        assert!(refused(&|s| s.prompt = Prompt::TokenIds(vec![9999])).await.contains("9999"));
        assert!(refused(&|s| s.stopping.max_tokens = 0).await.contains("max_tokens"));
        assert!(refused(&|s| s.stopping.max_tokens = 200).await.contains("kv_cache_bytes"));
        assert!(refused(&|s| s.stopping.stop = vec![String::new()]).await.contains("stop"));
        assert!(refused(&|s| s.sampling.top_p = 0.0).await.contains("top_p"));
        assert!(refused(&|s| s.sampling.repetition_penalty = 1e-38).await.contains("repetition_penalty"));
        assert!(refused(&|s| s.logprobs = Some(21)).await.contains("20"));
        assert!(
            refused(&|s| s.adapter = Some("tenants/t/adapters/none".parse().unwrap())).await.contains("does not exist")
        );
        assert_idle(&engine).await;
    });
}

#[test]
fn a_score_that_no_message_can_hold_is_refused_before_it_is_computed() {
    run(async {
        let engine = engine(&Limits { max_message_bytes: 64 << 10, ..Limits::default() });
        let inputs = vec![Prompt::TokenIds(vec![1; 200]); 20];
        let spec = |top_logprobs| ScoreSpec {
            adapter: None,
            inputs: inputs.clone(),
            top_logprobs,
            priority: 0,
            deadline: None,
            trace: None,
        };
        let refused = engine.score(&world().tenant, spec(1)).await.unwrap_err();
        assert!(matches!(refused, Error::Exhausted { limit: "max_message_bytes", .. }), "{refused}");
        assert_eq!(engine.score(&world().tenant, spec(0)).await.unwrap().results.len(), 20);
    });
}

#[test]
fn draining_ends_answers_with_what_they_have() {
    run(async {
        let engine = engine(&Limits::default());
        let request = Request { adapter: None, prompt: vec![1; 10], max_tokens: 240, temperature: 0.0, seed: 0 };
        let mut stream = one(&engine, &world().tenant, request.spec()).await.unwrap();
        stream.next().await;
        engine.drain(Duration::ZERO).await;
        let last = stream.fold(None, |_, event| async { Some(event) }).await.unwrap().unwrap();
        assert!(matches!(last, GenerateEvent::Finished { reason: FinishReason::Cancelled | FinishReason::Length, .. }));
        assert!(matches!(engine.generate(&world().tenant, request.spec()).await, Err(Error::Unavailable { .. })));
        assert_idle(&engine).await;
    });
}

/// The text of the answer to `request` with these stop strings, its ids, and why it ended.
async fn answer(engine: &Engine, request: &Request, stop: &[String]) -> (String, Vec<u32>, FinishReason) {
    let mut spec = request.spec();
    spec.stopping.stop = stop.to_vec();
    let mut stream = one(engine, &world().tenant, spec).await.unwrap();
    let (mut text, mut ids, mut reason) = (String::new(), Vec::new(), None);
    while let Some(event) = stream.next().await {
        match event.unwrap() {
            GenerateEvent::Delta { text: delta, tokens } => {
                text += &delta;
                ids.extend(tokens.iter().map(|token| token.id));
            }
            GenerateEvent::Finished { reason: why, .. } => reason = Some(why),
            GenerateEvent::Started { .. } => {}
        }
    }
    (text, ids, reason.unwrap())
}

/// Draws, from a model whose tokens are bytes, an answer with a character of several tokens in it.
#[test]
fn no_token_of_a_stop_string_leaves_not_even_the_first_byte_of_a_character() {
    run(async {
        let engine = engine(&Limits::default());
        for seed in 0..200 {
            let request = Request { adapter: None, prompt: vec![97], max_tokens: 100, temperature: 2.0, seed };
            let (whole, ids, _) = answer(&engine, &request, &[]).await;
            let of_two = |c: &char| c.len_utf8() == 2 && *c != char::REPLACEMENT_CHARACTER;
            let Some(stop) = whole.chars().find(of_two).map(String::from) else { continue };
            let first = ids.windows(2).position(|pair| pair == [0, 1].map(|i| u32::from(stop.as_bytes()[i]))).unwrap();
            let (text, sent, reason) = answer(&engine, &request, std::slice::from_ref(&stop)).await;
            assert_eq!((text.as_str(), reason), (&whole[..whole.find(&stop).unwrap()], FinishReason::Stop));
            assert_eq!(sent, ids[..first], "up to the first byte of {stop:?}");
            return;
        }
        panic!("no seed gave a character of two bytes");
    });
}

/// Panics, then fails, then gives what is no number, then always prefers token 65.
struct Faulty {
    steps: usize,
    logits: Vec<f32>,
}

impl Executor for Faulty {
    fn forward(&mut self, chunks: &[SequenceChunk<'_>]) -> Result<&[f32]> {
        let vocab = world().text.vocab_size();
        let rows: usize = chunks.iter().map(|chunk| chunk.logits.count(chunk.ids.len())).sum();
        self.steps += 1;
        let value = match self.steps {
            1 => panic!("on purpose"),
            2 => return Err(Error::internal("on purpose")),
            3 => f32::NAN,
            _ => 0.0,
        };
        self.logits = vec![value; rows * vocab];
        self.logits.iter_mut().skip(65).step_by(vocab).for_each(|logit| *logit += 1.0);
        Ok(&self.logits)
    }
}

#[test]
fn a_step_that_fails_ends_its_own_sequences_and_no_more() {
    run(async {
        let w = world();
        let layout = KvLayout { block_tokens: 8, blocks: 16, dtype: KvDtype::F16 };
        let faulty = Box::new(Faulty { steps: 0, logits: Vec::new() });
        let (text, hub, arbiter) = (w.text.clone(), w.hub.clone(), Arbiter::new(0.4));
        let info = EngineInfo { base: w.model.shape().digest, context: 100, layout, paging: one_group(layout) };
        let memory = Memory::new(1 << 30);
        let engine = Engine::start_with(faulty, info, text, hub, arbiter, memory, &Limits::default()).unwrap();
        let request = Request { adapter: Some(0), prompt: vec![1; 25], max_tokens: 3, temperature: 0.0, seed: 0 };
        for fault in ["panic", "error", "no number"] {
            let stream = one(&engine, &w.tenant, request.spec()).await.unwrap();
            let last = stream.fold(None, |_, event| async { Some(event) }).await.unwrap();
            assert!(matches!(last, Err(Error::Internal(_))), "{fault}: {last:?}");
            assert_idle(&engine).await;
        }
        assert_eq!(cached(&engine, &w.tenant, &request).await, 0, "nothing of a failed step is found");
        assert_eq!(cached(&engine, &w.tenant, &request).await, 24);
        let (text, ids, _) = answer(&engine, &request, &[]).await;
        assert_eq!((text.as_str(), &ids[..]), ("AAA", &[65; 3][..]));
        assert_idle(&engine).await;
    });
}

/// The tokens of the prompt that were found in the cache.
async fn cached(engine: &Engine, tenant: &Tenant, request: &Request) -> u32 {
    let stream = one(engine, tenant, request.spec()).await.unwrap();
    match stream.fold(None, |_, event| async { Some(event) }).await {
        Some(Ok(GenerateEvent::Finished { usage, .. })) => usage.cached_tokens.unwrap(),
        other => panic!("{other:?}"),
    }
}

/// One adapter's file is a pipe that gives nothing: who asks for it waits, and nobody else.
#[cfg(unix)]
#[test]
fn nobody_waits_for_what_another_request_loads() {
    run(async {
        let w = make_world(Model::tiny(3)).await;
        let shape = w.model.shape().clone();
        let cold =
            Hub::new(w.store.clone(), shape, w.text.template_digest(), Arc::new(PassingGate), &Limits::default());
        let engine = start(w.model.clone(), w.text.clone(), cold, &Limits::default()).unwrap();
        let mut files = packed_files(w.dir.path());
        files.sort_by_key(|file| file.metadata().unwrap().len());
        // Of `a1`, which has the higher rank.
        let pipe = files.pop().unwrap();
        std::fs::remove_file(&pipe).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());

        let ask = |adapter| Request { adapter, prompt: vec![1; 9], max_tokens: 3, temperature: 0.0, seed: 0 };
        let waits = async { one(&engine, &w.tenant, ask(Some(1)).spec()).await.unwrap().collect::<Vec<_>>().await };
        tokio::pin!(waits);
        let others = async {
            for adapter in [None, Some(0), None] {
                assert_eq!(tokens(&engine, &ask(adapter)).await.len(), 3);
            }
        };
        tokio::select! {
            _ = &mut waits => panic!("the pipe has given nothing"),
            done = tokio::time::timeout(Duration::from_secs(60), others) => done.expect("the others are answered"),
        }
        let closed =
            tokio::task::spawn_blocking(move || drop(std::fs::File::options().write(true).open(pipe).unwrap()));
        assert!(waits.await.iter().all(Result::is_ok), "an empty file is made again");
        closed.await.unwrap();
    });
}

#[cfg(unix)]
fn packed_files(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths
        .flat_map(|path| match path.is_dir() {
            true => packed_files(&path),
            false => Vec::from_iter(path.ends_with("packed.bin").then_some(path)),
        })
        .collect()
}
