//! The loop: drain the inbox, plan, compute, commit. One thread runs it and owns the executor and the KV cache.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::device::Arbiter;
use crate::engine::scheduler::{Planned, Scheduler};
use crate::engine::sequence::{Next, Sequence};
use crate::engine::stats::Stats;
use crate::error::{Error, Result};
use crate::model::exec::{Exec, Span};
use crate::text::Text;

/// How often an idle loop looks up.
const IDLE: Duration = Duration::from_millis(500);

/// What runs the model: the executor, or a fake in tests.
pub trait Forward: Send {
    /// See [`Exec::forward`].
    fn forward(&mut self, spans: &[Span<'_>]) -> Result<&[f32]>;
}

impl Forward for Exec {
    fn forward(&mut self, spans: &[Span<'_>]) -> Result<&[f32]> {
        Exec::forward(self, spans)
    }
}

/// What reaches the loop from outside.
pub enum Message {
    Submit(Box<Sequence>),
    /// Ends every sequence with what it has.
    CancelAll,
    /// Fails where an idle engine still holds something.
    CheckIntegrity(oneshot::Sender<Result<()>>),
}

/// The engine's state, owned by its thread.
pub struct Loop<F> {
    pub inbox: Receiver<Message>,
    pub scheduler: Scheduler,
    pub forward: F,
    pub arbiter: Arc<Arbiter>,
    pub text: Arc<Text>,
    /// Tokens.
    pub context: usize,
    pub stats: Arc<Stats>,
    pub sequences: HashMap<u64, Sequence>,
    pub next_id: u64,
}

impl<F: Forward> Loop<F> {
    /// Runs until every handle is gone.
    pub fn run(mut self) {
        while self.drain_inbox() {
            self.drop_lost();
            let plan = self.scheduler.plan();
            if !plan.is_empty() {
                self.step(&plan);
            }
            self.stats.observe(&self.scheduler, self.sequences.len());
        }
        self.cancel_all();
    }

    /// Takes what has come; waits where there is nothing to compute. False once every handle is gone.
    fn drain_inbox(&mut self) -> bool {
        if self.sequences.is_empty() {
            match self.inbox.recv_timeout(IDLE) {
                Ok(message) => self.take(message),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return false,
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
            Message::Submit(sequence) => {
                self.next_id += 1;
                self.scheduler.add(self.next_id, sequence.tenant, sequence.ids.len());
                self.sequences.insert(self.next_id, *sequence);
            }
            Message::CancelAll => self.cancel_all(),
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

    /// Computes the planned rows and hands each sequence its logits. Where the model fails, the sequences of the step fail, and no others.
    fn step(&mut self, plan: &[Planned]) {
        let arbiter = self.arbiter.clone();
        let permit = arbiter.serve();
        let computed = catch_unwind(AssertUnwindSafe(|| self.compute(plan)))
            .unwrap_or_else(|_| Err(Error::internal("the model panicked")));
        drop(permit);
        self.stats.count_step(plan.iter().map(|p| p.count).sum());
        match computed {
            Ok(nexts) => {
                for (planned, next) in plan.iter().zip(nexts) {
                    match next {
                        Next::Extended => self.scheduler.extend(planned.id),
                        Next::Unchanged => {}
                        Next::Finished => drop(self.remove(planned.id)),
                    }
                }
            }
            Err(error) => {
                tracing::error!(%error, "an engine step failed");
                for sequence in plan.iter().filter_map(|planned| self.remove(planned.id)).collect::<Vec<_>>() {
                    sequence.fail(error.clone());
                }
            }
        }
    }

    fn compute(&mut self, plan: &[Planned]) -> Result<Vec<Next>> {
        let span = |planned: &'_ Planned| {
            let sequence =
                self.sequences.get(&planned.id).ok_or_else(|| Error::internal("a planned sequence is gone"))?;
            Ok(Span {
                ids: &sequence.ids[planned.start..planned.start + planned.count],
                start: planned.start,
                blocks: &[],
                lora: sequence.lease.as_ref().map(|lease| lease.lora()),
                logits: sequence.logit_rows(planned.completes),
            })
        };
        let mut spans = plan.iter().map(span).collect::<Result<Vec<_>>>()?;
        spans.iter_mut().zip(plan).for_each(|(span, planned)| span.blocks = &planned.blocks);
        let rows: Vec<usize> = spans.iter().map(|span| span.logits.count(span.ids.len())).collect();
        let logits = self.forward.forward(&spans)?;
        let vocab = self.text.vocab_size();
        let mut nexts = Vec::with_capacity(plan.len());
        let mut at = 0;
        for (planned, rows) in plan.iter().zip(rows) {
            let logits = &logits[at..at + rows * vocab];
            at += logits.len();
            let sequence = self.sequences.get_mut(&planned.id);
            let sequence = sequence.ok_or_else(|| Error::internal("a planned sequence is gone"))?;
            nexts.push(sequence.commit(&self.text, self.context, planned.start, planned.completes, logits));
        }
        Ok(nexts)
    }

    fn check_integrity(&self) -> Result<()> {
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
