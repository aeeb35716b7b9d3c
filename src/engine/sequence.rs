//! A sequence under way: its tokens, its lease, and where its results go. What to compute is the scheduler's; what a row of logits means
//! is decided here.

use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

use crate::engine::sampler::{logprob, sample, top_logprobs};
use crate::engine::tickets::Ticket;
use crate::error::{Error, Result};
use crate::hub::Lease;
use crate::model::exec::LogitRows;
use crate::request::{FinishReason, GenerateEvent, Sampling, ScoreOut, Stopping, TokenLogprob, TokenOut, Usage};
use crate::text::matcher::{HoldBack, Released};
use crate::text::{Decoder, Text};

/// What a sequence brings along, whatever it is for.
#[derive(Debug)]
pub struct Sequence {
    pub ids: Vec<u32>,
    pub tenant: u32,
    /// `None` is the base. Keeps the version it started with.
    pub lease: Option<Lease>,
    pub deadline: Option<Instant>,
    pub work: Work,
    /// Counts the request against the limits for as long as it lives.
    pub _ticket: Ticket,
}

/// What the logits are for.
#[derive(Debug)]
pub enum Work {
    Generate(Box<Generation>),
    Score(Box<Scoring>),
}

/// An answer being generated.
#[derive(Debug)]
pub struct Generation {
    pub prompt_tokens: usize,
    pub sampling: Sampling,
    pub stopping: Stopping,
    pub logprobs: Option<u32>,
    pub decoder: Decoder,
    pub hold_back: HoldBack,
    /// Never blocks the engine; `max_tokens` bounds what it can hold.
    pub events: UnboundedSender<Result<GenerateEvent>>,
}

/// A sequence being scored.
#[derive(Debug)]
pub struct Scoring {
    pub top: usize,
    /// Of the rows so far; a sequence that starts over scores only what is missing.
    pub logprobs: Vec<TokenLogprob>,
    pub next: Vec<(u32, f32)>,
    /// Taken when the answer is sent.
    pub answer: Option<oneshot::Sender<Result<ScoreOut>>>,
}

/// Whether a sequence goes on after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// It has one more token to compute.
    Extended,
    /// More of what it has is to be computed.
    Unchanged,
    Finished,
}

impl Sequence {
    /// Whether nobody waits for the results any more.
    pub fn is_abandoned(&self) -> bool {
        match &self.work {
            Work::Generate(generation) => generation.events.is_closed(),
            Work::Score(scoring) => scoring.answer.as_ref().is_none_or(oneshot::Sender::is_closed),
        }
    }

    pub fn is_late(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// The rows of a chunk whose logits are needed; `completes` says that the chunk ends the sequence.
    pub fn logit_rows(&self, completes: bool) -> LogitRows {
        match &self.work {
            Work::Score(_) => LogitRows::All,
            Work::Generate(_) if completes => LogitRows::Last,
            Work::Generate(_) => LogitRows::None,
        }
    }

    /// Takes the logits `[rows, vocab]` that [`Sequence::logit_rows`] asked for, of a chunk that began at `start`.
    pub fn commit(&mut self, text: &Text, context: usize, start: usize, completes: bool, logits: &[f32]) -> Next {
        match &mut self.work {
            Work::Score(scoring) => {
                scoring.commit(&self.ids, start, completes, logits, text.vocab_size());
                if completes { Next::Finished } else { Next::Unchanged }
            }
            Work::Generate(_) if !completes => Next::Unchanged,
            Work::Generate(generation) => generation.commit(&mut self.ids, text, context, logits),
        }
    }

    /// Ends it with an error.
    pub fn fail(self, error: Error) {
        // A receiver that is gone needs no answer.
        match self.work {
            Work::Generate(generation) => drop(generation.events.send(Err(error))),
            Work::Score(mut scoring) => drop(scoring.answer.take().map(|answer| answer.send(Err(error)))),
        }
    }

    /// Ends it because the server goes away: an answer keeps what it has.
    pub fn cancel(mut self) {
        match &mut self.work {
            Work::Generate(generation) => generation.finish(FinishReason::Cancelled, self.ids.len()),
            Work::Score(_) => {
                let message = "the server is shutting down; send the call again".to_owned();
                self.fail(Error::Unavailable { message, retry_after: None });
            }
        }
    }
}

impl Scoring {
    fn commit(&mut self, ids: &[u32], start: usize, completes: bool, logits: &[f32], vocab: usize) {
        let known = self.logprobs.len().saturating_sub(start);
        for (position, row) in (start..).zip(logits.chunks_exact(vocab)).skip(known) {
            match ids.get(position + 1) {
                Some(target) => self.logprobs.push(logprob(row, *target, self.top)),
                None => self.next = top_logprobs(row, self.top),
            }
        }
        if completes && let Some(answer) = self.answer.take() {
            let (logprobs, next) = (std::mem::take(&mut self.logprobs), std::mem::take(&mut self.next));
            // A receiver that is gone needs no answer.
            let _ = answer.send(Ok(ScoreOut { ids: ids.to_vec(), logprobs, next }));
        }
    }
}

impl Generation {
    /// Draws the next token and passes on what may go out.
    fn commit(&mut self, ids: &mut Vec<u32>, text: &Text, context: usize, logits: &[f32]) -> Next {
        let Some(id) = sample(logits, ids, &self.sampling, ids.len()) else {
            let message = "the model gave logits that are not numbers";
            let _ = self.events.send(Err(Error::internal(message)));
            return Next::Finished;
        };
        ids.push(id);
        let logprob = self.logprobs.map(|top| logprob(logits, id, top as usize));
        let ends = text.is_end(id) && !self.stopping.ignore_eos;
        let piece = if ends { String::new() } else { self.decoder.push(id) };
        let released = self.hold_back.push(&piece, vec![TokenOut { id, logprob }]);
        let matched = released.matched;
        self.send(released);
        let generated = ids.len() - self.prompt_tokens;
        let reason = if ends || matched {
            FinishReason::Stop
        } else if generated >= self.stopping.max_tokens as usize || ids.len() >= context {
            FinishReason::Length
        } else {
            return Next::Extended;
        };
        if matched {
            self.send_finished(reason, ids.len());
        } else {
            self.finish(reason, ids.len());
        }
        Next::Finished
    }

    /// Lets out what was held back, and ends the stream.
    fn finish(&mut self, reason: FinishReason, length: usize) {
        let rest = self.decoder.finish();
        let last = self.hold_back.push(&rest, Vec::new());
        let matched = last.matched;
        self.send(last);
        if matched {
            return self.send_finished(FinishReason::Stop, length);
        }
        let held = self.hold_back.finish();
        self.send(held);
        self.send_finished(reason, length);
    }

    fn send(&self, Released { text, tokens, .. }: Released) {
        if !text.is_empty() || !tokens.is_empty() {
            // A receiver that is gone is noticed at the next step.
            let _ = self.events.send(Ok(GenerateEvent::Delta { text, tokens }));
        }
    }

    fn send_finished(&self, reason: FinishReason, length: usize) {
        let usage =
            Usage { prompt_tokens: self.prompt_tokens as u32, completion_tokens: (length - self.prompt_tokens) as u32 };
        // As above.
        let _ = self.events.send(Ok(GenerateEvent::Finished { reason, usage }));
    }
}
