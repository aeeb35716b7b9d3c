//! The loop: drain the inbox, plan, compute (build the batch, forward, sample), commit. One thread runs it and owns the executor and the KV cache.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

use tokio::sync::oneshot;

use crate::device::Arbiter;
use crate::engine::scheduler::{Demand, Planned, Scheduler};
use crate::engine::sequence::{Next, Reading, Sequence};
use crate::engine::stats;
use crate::error::{Error, Result};
use crate::kernels::cpu::Team;
use crate::model::batch::{Executor, Span, reused};
use crate::text::Text;

/// What reaches the loop from outside.
pub enum Message {
    Submit(Demand, Box<Sequence>),
    /// Ends every sequence with what it has, and from now on every new one.
    CancelAll,
    /// Fails where an idle engine still holds something.
    CheckIntegrity(oneshot::Sender<Result<()>>),
}

/// The engine's state, owned by its thread.
pub struct Loop {
    pub inbox: Receiver<Message>,
    pub scheduler: Scheduler,
    /// The rows of the step; the buffer of all plans.
    pub plan: Vec<Planned>,
    /// The buffers of all steps.
    pub spans: Vec<Span<'static>>,
    pub readings: Vec<Reading>,
    pub executor: Box<dyn Executor>,
    pub arbiter: Arc<Arbiter>,
    pub text: Arc<Text>,
    /// Tokens.
    pub context: usize,
    pub sequences: HashMap<u64, Sequence>,
    pub next_id: u64,
    /// Everything has been cancelled, and so is what comes now: a request that was still encoded or leased meanwhile.
    pub closed: bool,
}

impl Loop {
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
        self.drop_lost();
        self.scheduler.plan(&mut self.plan);
        if !self.plan.is_empty() {
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
        for (_, sequence) in self.sequences.drain() {
            sequence.fail(Error::internal("the engine's loop panicked"));
        }
    }

    /// Takes what has come; waits where there is nothing to compute. False once every handle is gone.
    fn drain_inbox(&mut self) -> bool {
        if self.sequences.is_empty() {
            match self.inbox.recv() {
                Ok(message) => self.take(message),
                Err(_) => return false,
            }
        }
        loop {
            match self.inbox.try_recv() {
                Ok(message) => self.take(message),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return !self.sequences.is_empty(),
            }
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Submit(_, sequence) if self.closed => sequence.cancel(),
            Message::Submit(demand, sequence) => {
                self.next_id += 1;
                self.scheduler.add(self.next_id, demand);
                self.sequences.insert(self.next_id, *sequence);
            }
            Message::CancelAll => {
                self.closed = true;
                self.cancel_all();
            }
            // A receiver that is gone needs no answer.
            Message::CheckIntegrity(answer) => drop(answer.send(self.check_integrity())),
        }
    }

    /// Lets go of sequences that nobody waits for or whose time is up.
    fn drop_lost(&mut self) {
        let now = Instant::now();
        let lost = self.sequences.iter().filter(|(_, s)| s.is_abandoned() || s.is_late(now));
        for id in lost.map(|(id, _)| *id).collect::<Vec<_>>() {
            if let Some(sequence) = self.remove(id) {
                sequence.fail(Error::DeadlineExceeded);
            }
        }
    }

    fn remove(&mut self, id: u64) -> Option<Sequence> {
        self.scheduler.remove(id);
        self.sequences.remove(&id)
    }

    fn cancel_all(&mut self) {
        for id in self.sequences.keys().copied().collect::<Vec<_>>() {
            if let Some(sequence) = self.remove(id) {
                sequence.cancel();
            }
        }
    }

    /// Computes the planned rows and reads their logits into `readings`, one of each planned sequence. A model that panics has failed, no
    /// more. Allocates nothing once its buffers have grown, but for what log-probabilities hold.
    pub(super) fn compute(&mut self) -> Result<()> {
        let arbiter = self.arbiter.clone();
        let _permit = arbiter.serve();
        catch_unwind(AssertUnwindSafe(|| {
            let mut spans = reused(std::mem::take(&mut self.spans));
            let done = fill(&mut spans, &self.plan, &self.scheduler, &self.sequences).and_then(|()| {
                let logits = self.executor.forward(&spans)?;
                read(&self.plan, &spans, logits, &self.sequences, self.text.vocab_size(), &mut self.readings)
            });
            self.spans = reused(spans);
            done
        }))
        .unwrap_or_else(|_| Err(Error::internal("the model panicked")))
    }

    /// Hands each sequence what was read for it. Where the step failed, the sequences of the step fail, and no others.
    pub(super) fn commit(&mut self, done: Result<()>) {
        let (plan, mut readings) = (std::mem::take(&mut self.plan), std::mem::take(&mut self.readings));
        stats::count_step(plan.iter().map(|planned| planned.count).sum());
        match done {
            Ok(()) => {
                let readings = readings.iter_mut().map(std::mem::take);
                plan.iter().zip(readings).for_each(|(planned, reading)| self.commit_one(planned, reading));
            }
            Err(error) => {
                tracing::error!(%error, "an engine step failed");
                for sequence in plan.iter().filter_map(|planned| self.remove(planned.id)).collect::<Vec<_>>() {
                    sequence.fail(error.clone());
                }
            }
        }
        (self.plan, self.readings) = (plan, readings);
    }

    fn commit_one(&mut self, planned: &Planned, reading: Reading) {
        let Some(sequence) = self.sequences.get_mut(&planned.id) else { return };
        let next = sequence.commit(planned, reading, &self.text, self.context);
        if matches!(next, Next::Extended | Next::Finished) {
            // Its logits are numbers, and all that it has computed went into them.
            self.scheduler.publish(planned.id, &sequence.ids);
        }
        match next {
            Next::Extended => self.scheduler.extend(planned.id),
            Next::Unchanged => {}
            // Its reader is told the end by the drop, after all that it held has been given back.
            Next::Finished | Next::Failed => drop(self.remove(planned.id)),
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

/// The plan's rows as the model takes them.
fn fill<'a>(
    spans: &mut Vec<Span<'a>>,
    plan: &[Planned],
    scheduler: &'a Scheduler,
    sequences: &'a HashMap<u64, Sequence>,
) -> Result<()> {
    for planned in plan {
        let span = || {
            let sequence = sequences.get(&planned.id)?;
            Some(Span {
                ids: sequence.ids.get(planned.start..planned.start + planned.count)?,
                start: planned.start,
                blocks: scheduler.blocks_of(planned)?,
                lora: sequence.lease.as_ref().map(|lease| lease.packed()),
                logits: sequence.logit_rows(planned.completes),
            })
        };
        spans.push(span().ok_or_else(|| Error::internal("a planned sequence is gone"))?);
    }
    Ok(())
}

/// What the logits say to each sequence of the plan; every row is read by itself, on all cores.
fn read(
    plan: &[Planned],
    spans: &[Span<'_>],
    logits: &[f32],
    sequences: &HashMap<u64, Sequence>,
    vocab: usize,
    readings: &mut Vec<Reading>,
) -> Result<()> {
    let count = |span: &Span<'_>| span.logits.count(span.ids.len()) * vocab;
    if logits.len() != spans.iter().map(count).sum::<usize>() {
        return Err(Error::internal("the model gave another number of logits"));
    }
    readings.clear();
    readings.resize_with(plan.len(), Reading::default);
    let own = |i: usize| {
        let from = spans[..i].iter().map(count).sum::<usize>();
        (sequences.get(&plan[i].id), plan[i].start, &logits[from..from + count(&spans[i])])
    };
    Team::get().each_mut(readings, |i, reading| {
        if let (Some(sequence), start, logits) = own(i) {
            *reading = sequence.read(start, logits, vocab);
        }
    });
    Ok(())
}
