//! The loop: drain the inbox, plan, compute (build the batch, forward, sample), commit. One thread runs it and owns the executor and the KV cache.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::device::Arbiter;
use crate::engine::scheduler::{Readiness, ScheduledChunk, Scheduler, SequenceRequest};
use crate::engine::sequence::{Next, Sequence, SequenceAdapter, StepOutput};
use crate::engine::stats;
use crate::engine::warm::{Wanted, Warm};
use crate::error::{Error, Result};
use crate::hub::Lease;
use crate::kernels::cpu::Team;
use crate::model::batch::{Executor, SequenceChunk, reused};
use crate::text::Text;

/// Messages taken between two steps: a flood of them does not stop those who run.
const MESSAGES_A_TURN: usize = 256;

/// Tenants whose next sequence has its adapter loaded ahead of its turn.
const PREFETCHED_TENANTS: usize = 4;

/// How often sequences that cannot start are looked at where nothing runs. A load that ends is told at once.
const STUCK_TICK: Duration = Duration::from_millis(20);

/// What reaches the loop from outside.
#[derive(Debug)]
pub enum Message {
    /// A sequence, by an id of its ticket.
    Submit(u64, SequenceRequest, Box<Sequence>),
    /// Nobody waits for these any more.
    Cancel(Range<u64>),
    /// The request of these has lost its place.
    Displace(Range<u64>),
    /// A load has ended.
    Loaded(String, Result<Lease>),
    /// Ends every sequence with what it has, and from now on every new one.
    CancelAll,
    /// Fails where an idle engine still holds something.
    CheckIntegrity(oneshot::Sender<Result<()>>),
}

/// The engine's state, owned by its thread.
pub struct EngineLoop {
    pub inbox: Receiver<Message>,
    pub scheduler: Scheduler,
    /// The rows of the step; the buffer of all plans.
    pub plan: Vec<ScheduledChunk>,
    /// The buffers of all steps.
    pub chunks: Vec<SequenceChunk<'static>>,
    pub outputs: Vec<StepOutput>,
    pub executor: Box<dyn Executor>,
    pub arbiter: Arc<Arbiter>,
    pub text: Arc<Text>,
    /// Tokens.
    pub context: usize,
    pub sequences: HashMap<u64, Sequence>,
    /// When the time of those ends that have a deadline.
    pub deadlines: BTreeSet<(Instant, u64)>,
    pub warm: Warm,
    /// There are sequences, and none could be planned.
    pub stuck: bool,
    /// Everything has been cancelled, and so is what comes now: a request that was still being encoded meanwhile.
    pub closed: bool,
}

impl EngineLoop {
    /// Runs until every handle is gone.
    pub fn run(mut self) {
        loop {
            match catch_unwind(AssertUnwindSafe(|| self.turn())) {
                Ok(true) => {}
                Ok(false) => break,
                Err(_) => self.start_over(),
            }
        }
        self.cancel_all();
    }

    /// One step; false once every handle is gone.
    pub(super) fn turn(&mut self) -> bool {
        if !self.drain_inbox() {
            return false;
        }
        self.drop_late();
        self.schedule();
        if !self.plan.is_empty() {
            let now = Instant::now();
            for planned in &self.plan {
                if let Some(sequence) = self.sequences.get_mut(&planned.id) {
                    sequence.figures.planned(now);
                }
            }
            let done = self.compute();
            self.commit(done);
        }
        stats::observe(&self.scheduler, self.sequences.len());
        true
    }

    /// A panic outside the model leaves the plan in doubt: everything under way fails, and the next request finds an empty engine.
    pub(super) fn start_over(&mut self) {
        tracing::error!("the engine's loop panicked; {} sequences fail", self.sequences.len());
        self.scheduler.reset();
        self.warm.clear();
        self.deadlines.clear();
        for (_, sequence) in self.sequences.drain() {
            sequence.fail(Error::internal("the engine's loop panicked"));
        }
    }

    /// Chooses the rows of the next step, leases the adapters of those that start, and loads those of the next in line.
    pub(super) fn schedule(&mut self) {
        let Self { scheduler, plan, sequences, warm, .. } = self;
        scheduler.plan(plan, &mut |id| readiness(id, sequences, warm));
        for sequence in scheduler.take_preempted().filter_map(|id| sequences.get(&id)) {
            sequence.figures.preempted();
        }
        for id in scheduler.next_in_line(PREFETCHED_TENANTS) {
            if let Some(Sequence { adapter: SequenceAdapter::Wanted(row), .. }) = sequences.get(&id) {
                warm.prefetch(id, row);
            }
        }
        self.stuck = self.plan.is_empty() && !self.sequences.is_empty();
    }

    /// Takes what has come, so much at most; waits where there is nothing to compute. False once every handle is gone.
    fn drain_inbox(&mut self) -> bool {
        if self.sequences.is_empty() {
            match self.inbox.recv() {
                Ok(message) => self.take(message),
                Err(_) => return false,
            }
        } else if self.stuck {
            match self.inbox.recv_timeout(STUCK_TICK) {
                Ok(message) => self.take(message),
                Err(RecvTimeoutError::Timeout) => {}
                // Nobody is left to be answered, nor a load to wait for.
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
        for _ in 0..MESSAGES_A_TURN {
            match self.inbox.try_recv() {
                Ok(message) => self.take(message),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return !self.sequences.is_empty(),
            }
        }
        true
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Submit(_, _, sequence) if self.closed => sequence.cancel(),
            Message::Submit(id, request, sequence) => self.submit(id, request, *sequence),
            Message::Cancel(ids) => ids.for_each(|id| drop(self.remove(id))),
            Message::Displace(ids) => ids.for_each(|id| {
                if let Some(sequence) = self.remove(id) {
                    sequence.fail_displaced();
                }
            }),
            Message::Loaded(uid, outcome) => self.loaded(&uid, outcome),
            Message::CancelAll => {
                self.closed = true;
                self.cancel_all();
            }
            // A receiver that is gone needs no answer.
            Message::CheckIntegrity(answer) => drop(answer.send(self.check_integrity())),
        }
    }

    fn submit(&mut self, id: u64, request: SequenceRequest, sequence: Sequence) {
        if sequence.ticket.displaced().is_some() {
            return sequence.fail_displaced();
        }
        if sequence.is_abandoned() {
            // Its cancellation has come already.
            return;
        }
        if let Some(deadline) = sequence.deadline {
            self.deadlines.insert((deadline, id));
        }
        let first = sequence.follows().and_then(|first| self.sequences.get_mut(&first));
        if first.and_then(Sequence::followers).is_some_and(|followers| followers.contains(&id)) {
            self.scheduler.add_aside(id, request);
        } else {
            self.scheduler.add(id, request);
        }
        self.sequences.insert(id, sequence);
    }

    /// The sequences that were set aside for a version wait in their places again, or fail with the load.
    fn loaded(&mut self, uid: &str, outcome: Result<Lease>) {
        let (sequences, outcome) = self.warm.loaded(uid, outcome);
        for id in sequences {
            match &outcome {
                Ok(()) => self.scheduler.resume(id),
                Err(error) => {
                    if let Some(sequence) = self.remove(id) {
                        sequence.fail_unloaded(error);
                    }
                }
            }
        }
    }

    /// Lets go of sequences whose time is up.
    fn drop_late(&mut self) {
        let now = Instant::now();
        while let Some((_, id)) = self.deadlines.first().filter(|(deadline, _)| *deadline <= now).copied() {
            self.deadlines.pop_first();
            if let Some(sequence) = self.remove(id) {
                sequence.fail(Error::DeadlineExceeded);
            }
        }
    }

    fn remove(&mut self, id: u64) -> Option<Sequence> {
        self.scheduler.remove(id);
        let mut sequence = self.sequences.remove(&id)?;
        resume_followers(&mut sequence, &mut self.scheduler);
        if let Some(deadline) = sequence.deadline {
            self.deadlines.remove(&(deadline, id));
        }
        if let SequenceAdapter::Wanted(row) = &sequence.adapter {
            self.warm.forget(id, row);
        }
        Some(sequence)
    }

    fn cancel_all(&mut self) {
        for id in self.sequences.keys().copied().collect::<Vec<_>>() {
            if let Some(sequence) = self.remove(id) {
                sequence.cancel();
            }
        }
    }

    /// Computes the planned rows and reads their logits into `outputs`, one of each planned sequence. A model that panics has failed, no
    /// more. Allocates nothing once its buffers have grown, but for what log-probabilities hold.
    pub(super) fn compute(&mut self) -> Result<()> {
        let arbiter = self.arbiter.clone();
        let _permit = arbiter.serve();
        catch_unwind(AssertUnwindSafe(|| {
            let mut chunks = reused(std::mem::take(&mut self.chunks));
            let done = fill(&mut chunks, &self.plan, &self.scheduler, &self.sequences).and_then(|()| {
                let logits = self.executor.forward(&chunks)?;
                read(&self.plan, &chunks, logits, &self.sequences, self.text.vocab_size(), &mut self.outputs)
            });
            self.chunks = reused(chunks);
            done
        }))
        .unwrap_or_else(|_| Err(Error::internal("the model panicked")))
    }

    /// Hands each sequence what was read for it. Where the step failed, the sequences of the step fail, and no others.
    pub(super) fn commit(&mut self, done: Result<()>) {
        let (plan, mut outputs) = (std::mem::take(&mut self.plan), std::mem::take(&mut self.outputs));
        stats::count_step(plan.iter().map(|planned| planned.count).sum());
        match done {
            Ok(()) => {
                let outputs = outputs.iter_mut().map(std::mem::take);
                plan.iter().zip(outputs).for_each(|(planned, output)| self.commit_one(planned, output));
            }
            Err(error) => {
                tracing::error!(%error, "an engine step failed");
                for sequence in plan.iter().filter_map(|planned| self.remove(planned.id)).collect::<Vec<_>>() {
                    sequence.fail(error.clone());
                }
            }
        }
        (self.plan, self.outputs) = (plan, outputs);
    }

    fn commit_one(&mut self, planned: &ScheduledChunk, output: StepOutput) {
        let Some(sequence) = self.sequences.get_mut(&planned.id) else { return };
        let next = sequence.commit(planned, output, &self.text, self.context);
        if matches!(next, Next::Extended | Next::Finished) {
            // Its logits are numbers, and all that it has computed went into them.
            self.scheduler.publish(planned.id, &sequence.ids);
        }
        match next {
            Next::Extended => {
                self.scheduler.extend(planned.id);
                resume_followers(sequence, &mut self.scheduler);
            }
            Next::Unchanged => {}
            // Its reader is told the end by the drop, after all that it held has been given back.
            Next::Finished | Next::Failed => {
                if next == Next::Finished {
                    sequence.ticket.set_answered();
                }
                drop(self.remove(planned.id));
            }
        }
    }

    pub(super) fn check_integrity(&self) -> Result<()> {
        let (blocks, waiting, running) =
            (self.scheduler.blocks().used(), self.scheduler.waiting(), self.scheduler.running());
        let idle = self.sequences.is_empty();
        if idle && (blocks, waiting, running) != (0, 0, 0) {
            let left =
                format!("an idle engine holds {blocks} KV blocks, {waiting} waiting and {running} running entries");
            return Err(Error::internal(left));
        }
        if idle { Ok(()) } else { Err(Error::internal(format!("{} sequences are under way", self.sequences.len()))) }
    }
}

/// The other answers to a prompt wait in their places from when it is computed, or its first answer is gone.
fn resume_followers(sequence: &mut Sequence, scheduler: &mut Scheduler) {
    if let Some(followers) = sequence.followers() {
        std::mem::take(followers).for_each(|id| scheduler.resume(id));
    }
}

/// Whether a sequence can start; one that can has its adapter.
fn readiness(id: u64, sequences: &mut HashMap<u64, Sequence>, warm: &mut Warm) -> Readiness {
    let Some(sequence) = sequences.get_mut(&id) else { return Readiness::Gone };
    let lease = match &sequence.adapter {
        SequenceAdapter::Base | SequenceAdapter::Leased(_) => None,
        SequenceAdapter::Wanted(row) => match warm.lease(id, row) {
            Wanted::Lease(lease) => Some(lease),
            Wanted::Loading => return Readiness::Loading,
            Wanted::Later => return Readiness::Later,
        },
    };
    if !sequence.ticket.start() {
        // Its end is on the way.
        return Readiness::Gone;
    }
    if let Some(lease) = lease
        && let SequenceAdapter::Wanted(row) = std::mem::replace(&mut sequence.adapter, SequenceAdapter::Leased(lease))
    {
        warm.forget(id, &row);
    }
    Readiness::Ready
}

/// The plan's rows as the model takes them.
fn fill<'a>(
    chunks: &mut Vec<SequenceChunk<'a>>,
    plan: &[ScheduledChunk],
    scheduler: &'a Scheduler,
    sequences: &'a HashMap<u64, Sequence>,
) -> Result<()> {
    for planned in plan {
        let chunk = || {
            let sequence = sequences.get(&planned.id)?;
            Some(SequenceChunk {
                ids: sequence.ids.get(planned.start..planned.start + planned.count)?,
                start: planned.start,
                blocks: scheduler.blocks_of(planned)?,
                adapter: match &sequence.adapter {
                    SequenceAdapter::Base => None,
                    SequenceAdapter::Leased(lease) => Some(lease.packed()),
                    // Never the base in its place.
                    SequenceAdapter::Wanted(_) => return None,
                },
                logits: sequence.logit_rows(planned.completes),
            })
        };
        chunks.push(chunk().ok_or_else(|| Error::internal("a planned sequence is gone, or has no adapter"))?);
    }
    Ok(())
}

/// What the logits say to each sequence of the plan; every row is read by itself, on all cores.
fn read(
    plan: &[ScheduledChunk],
    chunks: &[SequenceChunk<'_>],
    logits: &[f32],
    sequences: &HashMap<u64, Sequence>,
    vocab: usize,
    outputs: &mut Vec<StepOutput>,
) -> Result<()> {
    let count = |chunk: &SequenceChunk<'_>| chunk.logits.count(chunk.ids.len()) * vocab;
    if logits.len() != chunks.iter().map(count).sum::<usize>() {
        return Err(Error::internal("the model gave another number of logits"));
    }
    outputs.clear();
    outputs.resize_with(plan.len(), StepOutput::default);
    let own = |i: usize| {
        let from = chunks[..i].iter().map(count).sum::<usize>();
        (sequences.get(&plan[i].id), plan[i].start, &logits[from..from + count(&chunks[i])])
    };
    Team::get().each_mut(outputs, |i, output| {
        if let (Some(sequence), start, logits) = own(i) {
            *output = sequence.read(start, logits, vocab);
        }
    });
    Ok(())
}
