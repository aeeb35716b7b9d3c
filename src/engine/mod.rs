//! The engine that serves: this handle, and behind it one thread that runs the loop ([`run`]).
//!
//! The handle checks the request, takes a ticket, encodes the prompt, finds out which version its name means, and submits; the loop does
//! the rest, and leases the version when the sequence starts. Dropping a stream cancels its sequence.

mod answer;
mod blocks;
mod check;
mod encode;
mod lru;
mod paging;
mod prefix;
mod run;
mod sampler;
mod scheduler;
mod sequence;
mod stats;
mod tickets;
mod warm;

#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};
use std::pin::Pin;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use futures::Stream;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::config::{KvCacheType, Limits};
use crate::device::Arbiter;
use crate::error::{Error, Result};
use crate::hub::{Hub, VersionRow};
use crate::ids::{AdapterRef, Digest, Tenant, TenantId};
use crate::memory::Memory;
use crate::model::Model;
use crate::model::batch::{Executor, KvDtype, KvLayout, VIRTUAL_TOKEN};
use crate::request::{GenerateEvent, GenerateSpec, Prompt, ScoreAnswer, ScoreSpec, Usage};
use crate::text::Text;
use crate::text::matcher::{HoldBack, Patterns};
use answer::{Answer, AnswerStream, CancelOnDrop};
pub use check::score_too_large;
use check::{check_logprobs, check_priority};
use encode::LargeEncodes;
use paging::Paging;
use prefix::{CacheNamespace, PrefixHashes};
use run::{EngineLoop, Message};
use sampler::TokenCounts;
use scheduler::{Scheduler, SchedulerConfig, SequenceRequest};
use sequence::{Generation, Scoring, Sequence, SequenceAdapter, Work};
use stats::Figures;
use tickets::{Ticket, Tickets};
use warm::Warm;

/// Most tokens listed beside each log-probability.
pub const MAX_LOGPROBS: u32 = 20;

/// Most sequences of one call of Score.
pub const MAX_SCORE_INPUTS: usize = 64;

/// Priorities go from minus this to this.
pub const MAX_PRIORITY: i32 = 100;

/// How often a draining engine is looked at.
const DRAIN_TICK: Duration = Duration::from_millis(20);

/// `Started`, deltas, `Finished`; or an error as the last item. Dropping it cancels.
pub type GenerateStream = Pin<Box<dyn Stream<Item = Result<GenerateEvent>> + Send>>;

/// The handle. Cheap to clone; the loop ends when the last one is gone.
#[derive(Debug, Clone)]
pub struct Engine {
    inbox: Arc<mpsc::Sender<Message>>,
    text: Arc<Text>,
    hub: Arc<Hub>,
    tickets: Tickets,
    memory: Arc<Memory>,
    limits: Arc<Limits>,
    large_encodes: LargeEncodes,
    info: EngineInfo,
    /// Whose figures are shown by name.
    tenants: stats::Tenants,
}

/// What the handle knows of the base and its cache.
#[derive(Debug, Clone)]
struct EngineInfo {
    base: Digest,
    /// Tokens.
    context: usize,
    layout: KvLayout,
    paging: Paging,
}

impl Engine {
    /// Starts the loop's thread. What waits to be read of answers is taken from `memory`. Call it in a runtime: versions are loaded there.
    pub fn start(
        model: Arc<Model>,
        text: Arc<Text>,
        hub: Arc<Hub>,
        arbiter: Arc<Arbiter>,
        memory: Arc<Memory>,
        kv: KvCacheType,
        limits: &Limits,
    ) -> Result<Self> {
        let dtype = match kv {
            KvCacheType::F16 => KvDtype::F16,
            KvCacheType::Q8_0 => KvDtype::Int8,
        };
        let block_tokens = limits.kv_block_tokens.clamp(1, 4096) as usize;
        let (groups, context) = (model.kv_groups(), model.context_length());
        let paging = Paging::new(block_tokens, limits.max_step_rows as usize, groups.windows.clone());
        // No more than all sequences at once could use at their longest.
        let useful = limits.max_running.saturating_mul(paging.most(context) as u64);
        let blocks = (limits.kv_cache_bytes / model.kv_page_bytes(&groups, block_tokens, dtype)).min(useful) as usize;
        let layout = KvLayout { block_tokens, blocks, dtype };
        let info = EngineInfo { base: model.shape().digest, context, layout, paging };
        let executor = model.serving_executor(layout)?;
        Self::start_with(executor, info, text, hub, arbiter, memory, limits)
    }

    fn start_with(
        executor: Box<dyn Executor>,
        info: EngineInfo,
        text: Arc<Text>,
        hub: Arc<Hub>,
        arbiter: Arc<Arbiter>,
        memory: Arc<Memory>,
        limits: &Limits,
    ) -> Result<Self> {
        let (sender, inbox) = mpsc::channel();
        let sender = Arc::new(sender);
        let config = scheduler_config(info.layout, info.paging.clone(), limits)?;
        let runtime = Handle::try_current().map_err(Error::internal)?;
        let state = EngineLoop {
            inbox,
            scheduler: Scheduler::new(config),
            plan: Vec::new(),
            chunks: Vec::new(),
            outputs: Vec::new(),
            executor,
            arbiter,
            text: text.clone(),
            context: info.context,
            sequences: HashMap::new(),
            deadlines: BTreeSet::new(),
            warm: Warm::new(hub.clone(), runtime, Arc::downgrade(&sender)),
            stuck: false,
            closed: false,
        };
        std::thread::Builder::new().name("engine".into()).spawn(move || state.run()).map_err(Error::internal)?;
        let tickets = Tickets::new(limits);
        let large_encodes = LargeEncodes::default();
        let tenants = stats::Tenants::new(limits.max_metric_tenants);
        let limits = Arc::new(limits.clone());
        Ok(Self { inbox: sender, text, hub, tickets, memory, limits, large_encodes, info, tenants })
    }

    /// Starts the answers that the spec asks for, a stream each. Errors before the first token are given here: bad settings, NOT_FOUND,
    /// limits.
    ///
    /// The first answer computes the prompt. The others keep their places in the queue until it is there to be found in
    /// the prefix cache.
    pub async fn generate(&self, tenant: &Tenant, spec: GenerateSpec) -> Result<Vec<GenerateStream>> {
        let since = Instant::now();
        self.check_sampling(&spec)?;
        self.check_stopping(&spec.stopping)?;
        check_logprobs("logprobs", spec.logprobs.unwrap_or(0))?;
        check_priority(spec.priority)?;
        self.check_prompt("prompt", &spec.prompt)?;
        let patterns = Patterns::new(&spec.stopping.stop, false)?;
        let ticket = Arc::new(self.tickets.take(tenant.id(), u64::from(spec.sampling.n))?);
        let encode = |text: &Text, _: usize, prompt: &Prompt| text.encode_prompt(prompt);
        let ids = self.encode(vec![spec.prompt], encode, tenant.id(), &ticket).await?.pop().unwrap_or_default();
        let version = self.resolve(tenant, spec.adapter.as_ref()).await?;
        let virtual_tokens = virtual_tokens(version.as_deref());
        let longest = self.check_length("prompt", &ids, virtual_tokens, spec.stopping.max_tokens as usize)?;
        let counts = TokenCounts::new(&spec.sampling, &ids);
        let prompt_tokens = ids.len() as u32;
        let ids = behind_virtual(virtual_tokens, &ids, longest);
        let hashes = self.prefix_hashes(tenant, version.as_deref(), &ids, longest);
        let withheld = match spec.stopping.ignore_eos || spec.sampling.min_tokens == 0 {
            true => Vec::new(),
            false => self.text.ends().to_vec(),
        };
        // Else there is nothing to wait for.
        let shares = hashes.is_some();
        let (mut streams, mut submissions) = (Vec::new(), Vec::new());
        for (i, id) in ticket.ids.clone().enumerate() {
            let mut sampling = spec.sampling.clone();
            sampling.seed = sampling.seed.wrapping_add(i as u64);
            let name = version.as_ref().map(|version| version.name.clone());
            let seed = (sampling.temperature > 0.0).then_some(sampling.seed);
            let account = self.memory.account(Some(tenant.id()));
            let (answer, events) = Answer::new(account, self.limits.max_unread_answer_bytes);
            let before = virtual_tokens as u32;
            answer.send(GenerateEvent::Started { version: name, prompt_tokens, virtual_tokens: before, seed })?;
            let cancel = CancelOnDrop::new(self.inbox.clone(), id..id + 1);
            streams.push(Box::pin(AnswerStream { events, cancel }) as GenerateStream);
            let generation = Generation {
                prompt_length: ids.len(),
                virtual_tokens,
                cached_tokens: None,
                sampling,
                counts: counts.clone(),
                stopping: spec.stopping.clone(),
                withheld: withheld.clone(),
                follows: (i > 0 && shares).then_some(ticket.ids.start),
                followers: if i == 0 && shares { id + 1..ticket.ids.end } else { 0..0 },
                logprobs: spec.logprobs,
                decoder: self.text.decoder_after(&ids[virtual_tokens..]),
                hold_back: HoldBack::new(patterns.clone()),
                open: Default::default(),
                answer,
                unsent: None,
                end: None,
            };
            let (weight, priority, length) = (tenant.weight(), spec.priority, ids.len());
            let hashes = hashes.clone();
            let request = SequenceRequest { tenant: ticket.number, weight, priority, length, longest, hashes };
            // With room for the answer, so that no step has to move it.
            let mut own_ids = Vec::with_capacity(longest);
            own_ids.extend_from_slice(&ids);
            let (ids, work) = (own_ids, Work::Generate(Box::new(generation)));
            let (adapter, ticket) = (adapter_of(version.clone()), ticket.clone());
            let figures = Figures::new(&self.tenants, tenant.id(), since, spec.trace);
            submissions.push((id, request, Sequence { ids, deadline: spec.deadline, adapter, ticket, figures, work }));
        }
        self.claim_places(&ticket)?;
        for (id, request, sequence) in submissions {
            self.submit(id, request, sequence)?;
        }
        Ok(streams)
    }

    /// Scores every sequence under one version; they ride in the same batches as generation.
    pub async fn score(&self, tenant: &Tenant, spec: ScoreSpec) -> Result<ScoreAnswer> {
        let since = Instant::now();
        check_logprobs("top_logprobs", spec.top_logprobs)?;
        check_priority(spec.priority)?;
        if spec.inputs.is_empty() || spec.inputs.len() > MAX_SCORE_INPUTS {
            return Err(Error::invalid("inputs", format!("must hold 1 to {MAX_SCORE_INPUTS} sequences")));
        }
        for (i, input) in spec.inputs.iter().enumerate() {
            self.check_prompt(&format!("inputs[{i}]"), input)?;
        }
        let ticket = Arc::new(self.tickets.take(tenant.id(), spec.inputs.len() as u64)?);
        let inputs = self.encode(spec.inputs, encode_input, tenant.id(), &ticket).await?;
        let row = self.resolve(tenant, spec.adapter.as_ref()).await?;
        let virtual_tokens = virtual_tokens(row.as_deref());
        for (i, ids) in inputs.iter().enumerate() {
            self.check_length(&format!("inputs[{i}]"), ids, virtual_tokens, 0)?;
        }
        self.check_score_size(&inputs, spec.top_logprobs as usize)?;
        let version = row.as_ref().map(|row| row.name.clone());
        self.claim_places(&ticket)?;
        let mut cancel = CancelOnDrop::new(self.inbox.clone(), ticket.ids.clone());
        let mut answers = Vec::with_capacity(inputs.len());
        let mut usage = Usage::default();
        for (id, ids) in ticket.ids.clone().zip(inputs) {
            usage.prompt_tokens += ids.len() as u32;
            usage.virtual_tokens += virtual_tokens as u32;
            let ids = behind_virtual(virtual_tokens, &ids, 0);
            let (sender, answer) = oneshot::channel();
            let top = spec.top_logprobs as usize;
            let scoring = Scoring { top, virtual_tokens, logprobs: Vec::new(), answer: Some(sender), end: None };
            let work = Work::Score(Box::new(scoring));
            let (number, weight, priority, length) = (ticket.number, tenant.weight(), spec.priority, ids.len());
            // Every row's logits are asked for, so none can be left out, and such texts are seldom begun again.
            let request = SequenceRequest { tenant: number, weight, priority, length, longest: length, hashes: None };
            let (adapter, ticket) = (adapter_of(row.clone()), ticket.clone());
            let figures = Figures::new(&self.tenants, tenant.id(), since, spec.trace);
            self.submit(id, request, Sequence { ids, deadline: spec.deadline, adapter, ticket, figures, work })?;
            answers.push(answer);
        }
        // Its places are the sequences' alone from now on: they are given back before the answer is.
        drop(ticket);
        let mut results = Vec::with_capacity(answers.len());
        for answer in answers {
            results.push(answer.await.map_err(|_| sequence::lost())??);
        }
        cancel.disarm();
        Ok(ScoreAnswer { version, results, usage })
    }

    /// Gives the ids of a text, or of a chat with or without what begins an answer; it counts as a sequence meanwhile.
    ///
    /// # Errors
    /// TEXT_TOO_LONG, TOO_MANY_MESSAGES, the tokenizer's and the template's, and the limits on sequences.
    pub async fn tokenize(&self, tenant: &Tenant, prompt: Prompt, generation_prompt: bool) -> Result<Vec<u32>> {
        self.check_tokenize(&prompt)?;
        let ticket = Arc::new(self.tickets.take_unqueued(tenant.id(), 1)?);
        let encode = move |text: &Text, _: usize, prompt: &Prompt| match prompt {
            Prompt::Chat(messages) => text.encode_chat(messages, generation_prompt),
            other => text.encode_prompt(other),
        };
        Ok(self.encode(vec![prompt], encode, tenant.id(), &ticket).await?.pop().unwrap_or_default())
    }

    /// Returns how many of a tenant's sequences wait or run.
    pub fn held_by(&self, tenant: &TenantId) -> u64 {
        self.tickets.held_by(tenant)
    }

    /// Refuses new requests, waits for those under way, and after `timeout` ends them with what they have.
    pub async fn drain(&self, timeout: Duration) {
        self.tickets.close();
        let end = Instant::now() + timeout;
        while self.tickets.held() > 0 && Instant::now() < end {
            tokio::time::sleep(DRAIN_TICK).await;
        }
        // A loop that is gone has nothing to cancel. Once it answers the second message it has seen to the first.
        let _ = self.inbox.send(Message::CancelAll);
        let _ = self.check_integrity().await;
    }

    /// Sequences that wait or run.
    pub fn queued(&self) -> u64 {
        self.tickets.held()
    }

    /// Fails unless the engine is idle and holds no block, entry or ticket.
    pub async fn check_integrity(&self) -> Result<()> {
        let (sender, answer) = oneshot::channel();
        let gone = || Error::internal("the engine's loop has ended");
        self.inbox.send(Message::CheckIntegrity(sender)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())??;
        match self.tickets.held() {
            0 => Ok(()),
            held => Err(Error::internal(format!("{held} sequences are under way"))),
        }
    }

    /// Takes places from others for a request that is about to be submitted, where the queue was full; those are ended.
    fn claim_places(&self, ticket: &Ticket) -> Result<()> {
        for ids in ticket.claim()? {
            // One that has not been submitted yet is told when it is.
            let _ = self.inbox.send(Message::Displace(ids));
        }
        Ok(())
    }

    fn submit(&self, id: u64, request: SequenceRequest, sequence: Sequence) -> Result<()> {
        let message = Message::Submit(id, request, Box::new(sequence));
        self.inbox.send(message).map_err(|_| Error::internal("the engine's loop has ended"))
    }

    /// The version that a name means now; the request holds nothing of it before it starts.
    async fn resolve(&self, tenant: &Tenant, adapter: Option<&AdapterRef>) -> Result<Option<Arc<VersionRow>>> {
        match adapter {
            Some(adapter) => Ok(Some(Arc::new(self.hub.resolve(tenant, adapter).await?))),
            None => Ok(None),
        }
    }

    /// The keys under which a sequence's blocks are found, unless none are kept.
    fn prefix_hashes(
        &self,
        tenant: &Tenant,
        version: Option<&VersionRow>,
        ids: &[u32],
        longest: usize,
    ) -> Option<PrefixHashes> {
        let EngineInfo { base, layout, .. } = self.info;
        let (template, version) = (self.text.template_digest(), version.map(|version| version.digest));
        let namespace = CacheNamespace { tenant: tenant.id(), base, template, version };
        (self.limits.prefix_cache_percent > 0).then(|| PrefixHashes::new(&namespace, layout.block_tokens, ids, longest))
    }
}

/// Tokens that a version puts before a sequence.
fn virtual_tokens(version: Option<&VersionRow>) -> usize {
    version.map_or(0, |version| version.virtual_tokens as usize)
}

/// The ids of a sequence behind those that stand for virtual tokens, with room for `longest` of all.
fn behind_virtual(virtual_tokens: usize, ids: &[u32], longest: usize) -> Vec<u32> {
    let mut all = Vec::with_capacity(longest.max(virtual_tokens + ids.len()));
    all.resize(virtual_tokens, VIRTUAL_TOKEN);
    all.extend_from_slice(ids);
    all
}

fn adapter_of(version: Option<Arc<VersionRow>>) -> SequenceAdapter {
    version.map_or(SequenceAdapter::Base, SequenceAdapter::Wanted)
}

/// Errors name the input.
fn encode_input(text: &Text, i: usize, prompt: &Prompt) -> Result<Vec<u32>> {
    text.encode_sequence(prompt).map_err(|error| match error {
        Error::Invalid { reason, field, message } => {
            Error::Invalid { reason, field: format!("inputs[{i}].{field}"), message }
        }
        other => other,
    })
}

fn scheduler_config(layout: KvLayout, paging: Paging, limits: &Limits) -> Result<SchedulerConfig> {
    let Limits { max_running, max_step_rows, .. } = *limits;
    if max_running == 0 {
        return Err(Error::invalid("max_running", "must be at least 1"));
    }
    if max_step_rows <= max_running {
        let message = format!("is {max_step_rows}; it must be more than max_running, {max_running}");
        return Err(Error::invalid("max_step_rows", message));
    }
    Ok(SchedulerConfig {
        paging,
        blocks: layout.blocks,
        max_idle_blocks: layout.blocks * limits.prefix_cache_percent.min(100) as usize / 100,
        max_running: max_running as usize,
        max_step_rows: max_step_rows as usize,
        max_prefill_rows: limits.max_prefill_rows_while_decoding as usize,
    })
}
