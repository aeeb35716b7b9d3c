//! A sequence under way: its tokens, its lease, and where its results go. What to compute is the scheduler's; what a row of logits means
//! is decided here.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::oneshot;

use crate::engine::answer::Answer;
use crate::engine::sampler::{History, TokenCounts, logprob, sample, top_logprobs};
use crate::engine::scheduler::ScheduledChunk;
use crate::engine::stats::{self, Figures};
use crate::engine::tickets::Ticket;
use crate::error::{Error, Result};
use crate::hub::{Lease, VersionRow};
use crate::model::batch::Readout;
use crate::request::{
    FinishReason, GenerateEvent, Sampling, ScoreOut, StopCause, Stopping, TokenLogprob, TokenOut, Usage,
};
use crate::text::matcher::{HoldBack, Released};
use crate::text::{Decoder, Text};

/// What a sequence brings along, whatever it is for.
///
/// The fields are dropped in their order: what the sequence holds is given back before its reader learns the end, so that a client
/// which asks again at once finds the room it has just left.
#[derive(Debug)]
pub struct Sequence {
    pub ids: Vec<u32>,
    pub deadline: Option<Instant>,
    pub adapter: SequenceAdapter,
    /// Counts the request against the limits for as long as one of its sequences lives.
    pub ticket: Arc<Ticket>,
    pub figures: Figures,
    pub work: Work,
}

/// What a sequence runs under.
#[derive(Debug)]
pub enum SequenceAdapter {
    Base,
    /// A version that its name meant when it came. While it waits it holds nothing of it.
    Wanted(Arc<VersionRow>),
    /// The version it has started with, which it keeps to its end, also where it starts over.
    Leased(Lease),
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
    /// Tokens of the prompt, and what the adapter puts before it.
    pub prompt_length: usize,
    /// What the adapter puts before it.
    pub virtual_tokens: usize,
    /// Of the prompt's, those that did not have to be computed; known from the first step on.
    pub cached_tokens: Option<usize>,
    pub sampling: Sampling,
    /// Where penalties are on, the tokens so far.
    pub counts: Option<TokenCounts>,
    pub stopping: Stopping,
    /// The ids that may not come before `min_tokens`.
    pub withheld: Vec<u32>,
    /// The first answer to its prompt, where it is another one: it waits until that one has computed the prompt.
    pub follows: Option<u64>,
    /// Those that wait for this one.
    pub followers: Range<u64>,
    pub logprobs: Option<u32>,
    pub decoder: Decoder,
    pub hold_back: HoldBack,
    pub open: Open,
    /// Never blocks the engine.
    pub answer: Answer,
    /// Why no more of the answer is sent.
    pub unsent: Option<Error>,
    /// How it ended; sent by the drop.
    pub end: Option<Result<GenerateEvent>>,
}

/// Text and tokens that end inside a character. They go on with the rest of it, so that a character's first token does not leave before
/// it is known what it begins.
#[derive(Debug, Default)]
pub struct Open {
    text: String,
    /// Bytes of the text that came with the first `min_tokens` tokens: no stop string ends in them.
    early: usize,
    tokens: Vec<TokenOut>,
}

impl Drop for Generation {
    fn drop(&mut self) {
        let end = self.end.take().unwrap_or_else(|| Err(lost()));
        self.answer.end(end);
    }
}

/// A sequence being scored.
#[derive(Debug)]
pub struct Scoring {
    pub top: usize,
    /// What the adapter puts before the sequence.
    pub virtual_tokens: usize,
    /// Of the rows so far; a sequence that starts over scores only what is missing.
    pub logprobs: Vec<TokenLogprob>,
    /// Taken when the answer is sent.
    pub answer: Option<oneshot::Sender<Result<ScoreOut>>>,
    /// How it ended; sent by the drop.
    pub end: Option<Result<ScoreOut>>,
}

impl Drop for Scoring {
    fn drop(&mut self) {
        let end = self.end.take().unwrap_or_else(|| Err(lost()));
        // As above.
        let _ = self.answer.take().map(|answer| answer.send(end));
    }
}

/// What the reader of a sequence gets that was dropped without an end.
pub fn lost() -> Error {
    Error::internal("the engine dropped a sequence")
}

/// What the logits of a step say.
#[derive(Debug, Default)]
pub enum StepOutput {
    /// None were asked for.
    #[default]
    Nothing,
    /// The next token.
    Token(TokenOut),
    Scores {
        logprobs: Vec<TokenLogprob>,
        /// The most likely ids after the last one; empty where the chunk does not end the sequence.
        next: Vec<(u32, f32)>,
    },
    NonFinite,
}

/// Whether a sequence goes on after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// It has one more token to compute.
    Extended,
    /// More of what it has is to be computed.
    Unchanged,
    Finished,
    /// What was computed is not to be used.
    Failed,
}

impl Sequence {
    /// Whether nobody waits for the results any more.
    pub fn is_abandoned(&self) -> bool {
        match &self.work {
            Work::Generate(generation) => generation.answer.is_closed(),
            Work::Score(scoring) => scoring.answer.as_ref().is_none_or(oneshot::Sender::is_closed),
        }
    }

    /// The sequence that has to compute the prompt before this one starts.
    pub fn follows(&self) -> Option<u64> {
        match &self.work {
            Work::Generate(generation) => generation.follows,
            Work::Score(_) => None,
        }
    }

    /// The sequences that wait for this one to compute the prompt; none where it has.
    pub fn followers(&mut self) -> Option<&mut Range<u64>> {
        match &mut self.work {
            Work::Generate(generation) => Some(&mut generation.followers),
            Work::Score(_) => None,
        }
    }

    /// The rows of a chunk whose logits are needed; `completes` says that the chunk ends the sequence.
    pub fn logit_rows(&self, completes: bool) -> Readout {
        match &self.work {
            Work::Score(_) => Readout::All,
            Work::Generate(_) if completes => Readout::Last,
            Work::Generate(_) => Readout::None,
        }
    }

    /// Reads the logits `[rows, vocab]` that [`Sequence::logit_rows`] asked for, of a chunk that began at `start`.
    pub fn read(&self, start: usize, logits: &[f32], vocab: usize) -> StepOutput {
        match &self.work {
            Work::Score(scoring) => scoring.read(&self.ids, start, logits, vocab),
            Work::Generate(_) if logits.is_empty() => StepOutput::Nothing,
            Work::Generate(generation) => generation.read(&self.ids, logits),
        }
    }

    /// Takes what was read of the planned rows.
    pub fn commit(&mut self, planned: &ScheduledChunk, output: StepOutput, text: &Text, context: usize) -> Next {
        if let Work::Generate(generation) = &mut self.work
            && generation.cached_tokens.is_none()
        {
            let cached = planned.start.saturating_sub(generation.virtual_tokens);
            generation.cached_tokens = Some(cached);
            stats::count_prompt(generation.prompt_tokens(), cached);
        }
        match (&mut self.work, output) {
            (_, StepOutput::Nothing) => Next::Unchanged,
            (Work::Generate(generation), StepOutput::Token(token)) => {
                if self.ids.len() == generation.prompt_length {
                    self.figures.prompt(generation.prompt_tokens());
                }
                self.ids.push(token.id);
                self.figures.token(Instant::now());
                generation.commit(token, self.ids.len(), text, context)
            }
            (Work::Score(scoring), StepOutput::Scores { logprobs, next }) => {
                scoring.logprobs.extend(logprobs);
                if planned.completes {
                    self.figures.prompt(self.ids.len() - scoring.virtual_tokens);
                    scoring.finish(self.ids.split_off(scoring.virtual_tokens), next);
                    return Next::Finished;
                }
                Next::Unchanged
            }
            _ => {
                self.set_error(Error::internal("the model gave logits that are not numbers"));
                Next::Failed
            }
        }
    }

    /// Ends it with an error.
    pub fn fail(mut self, error: Error) {
        self.set_error(error);
    }

    /// Ends it because another tenant has its place.
    pub fn fail_displaced(self) {
        let error = self.ticket.displaced().unwrap_or_else(lost);
        self.fail(error);
    }

    /// Ends it because its adapter could not be loaded.
    pub fn fail_unloaded(self, error: &Error) {
        let error = match (&self.adapter, error) {
            (SequenceAdapter::Wanted(row), Error::NotFound { .. }) => {
                let message = "was deleted before the request could start; name another version and send it again";
                Error::precondition("VERSION_DELETED", &row.name, message)
            }
            _ => error.clone(),
        };
        self.fail(error);
    }

    fn set_error(&mut self, error: Error) {
        match &mut self.work {
            Work::Generate(generation) => generation.end = Some(Err(error)),
            Work::Score(scoring) => scoring.end = Some(Err(error)),
        }
    }

    /// Ends it because the server goes away: an answer keeps what it has.
    pub fn cancel(mut self) {
        match &mut self.work {
            Work::Generate(generation) => generation.finish(FinishReason::Cancelled, None, self.ids.len()),
            Work::Score(_) => {
                let message = "the server is shutting down; send the call again".to_owned();
                self.fail(Error::Unavailable { message, retry_after: None });
            }
        }
    }
}

impl Scoring {
    fn read(&self, ids: &[u32], start: usize, logits: &[f32], vocab: usize) -> StepOutput {
        // No row before the sequence's own is asked what follows.
        let known = (self.virtual_tokens + self.logprobs.len()).saturating_sub(start);
        let rows: Vec<(usize, &[f32])> = (start..).zip(logits.chunks_exact(vocab)).skip(known).collect();
        let logprobs = rows.iter().filter_map(|(position, row)| Some((ids.get(position + 1)?, row)));
        let logprobs: Vec<_> = logprobs.map(|(target, row)| logprob(row, *target, self.top)).collect();
        let last = rows.last().filter(|(position, _)| position + 1 == ids.len());
        let next = last.map(|(_, row)| top_logprobs(row, self.top)).unwrap_or_default();
        if logprobs.iter().any(|scored| scored.logprob.is_nan()) || next.iter().any(|(_, logprob)| logprob.is_nan()) {
            return StepOutput::NonFinite;
        }
        StepOutput::Scores { logprobs, next }
    }

    fn finish(&mut self, ids: Vec<u32>, next: Vec<(u32, f32)>) {
        self.end = Some(Ok(ScoreOut { ids, logprobs: std::mem::take(&mut self.logprobs), next }));
    }
}

impl Generation {
    /// Tokens of the prompt itself.
    fn prompt_tokens(&self) -> usize {
        self.prompt_length - self.virtual_tokens
    }

    /// Draws the next token.
    fn read(&self, ids: &[u32], logits: &[f32]) -> StepOutput {
        let Self { sampling, withheld, .. } = self;
        let early = ids.len() - self.prompt_length < sampling.min_tokens as usize;
        let history = History { counts: self.counts.as_ref(), withheld: if early { withheld } else { &[] } };
        let Some(id) = sample(logits, history, sampling, ids.len()) else { return StepOutput::NonFinite };
        StepOutput::Token(TokenOut { id, logprob: self.logprobs.map(|top| logprob(logits, id, top as usize)) })
    }

    /// Passes on what may go out now that the sequence has `length` tokens.
    fn commit(&mut self, token: TokenOut, length: usize, text: &Text, context: usize) -> Next {
        if let Some(counts) = &mut self.counts {
            counts.push(token.id);
        }
        if text.is_end(token.id) && !self.stopping.ignore_eos {
            self.finish(FinishReason::Stop, Some(token), length);
            return Next::Finished;
        }
        let text = self.decoder.push(token.id);
        self.add_text(&text, length);
        self.open.tokens.push(token);
        if !self.decoder.is_mid_character() && self.send_open() {
            self.set_stopped_by_text(length);
            return Next::Finished;
        }
        if let Some(error) = self.unsent.take() {
            self.end = Some(Err(error));
            return Next::Failed;
        }
        if length - self.prompt_length >= self.stopping.max_tokens as usize || length >= context {
            self.finish(FinishReason::Length, None, length);
            return Next::Finished;
        }
        Next::Extended
    }

    /// Lets out what was held back, then the token that ended the answer, and ends the stream.
    fn finish(&mut self, reason: FinishReason, end: Option<TokenOut>, length: usize) {
        let text = self.decoder.finish();
        self.add_text(&text, length);
        if self.send_open() {
            return self.set_stopped_by_text(length);
        }
        let held = self.hold_back.finish();
        self.send(held);
        let stop = end.as_ref().map(|token| StopCause::Token(token.id));
        self.send(Released { tokens: end.into_iter().collect(), ..Released::default() });
        self.set_finished(reason, stop, length);
    }

    /// Adds the text of the last of `length` tokens.
    fn add_text(&mut self, text: &str, length: usize) {
        self.open.text += text;
        if length - self.prompt_length <= self.sampling.min_tokens as usize {
            self.open.early = self.open.text.len();
        }
    }

    /// Lets out what cannot begin a stop string any more; true at one. None ends within the first `min_tokens` tokens.
    fn send_open(&mut self) -> bool {
        let Open { text, early, tokens } = std::mem::take(&mut self.open);
        if early > 0 {
            let released = self.hold_back.push_early(&text[..early], Vec::new());
            self.send(released);
        }
        let released = self.hold_back.push(&text[early..], tokens);
        let matched = released.matched;
        self.send(released);
        matched
    }

    fn send(&mut self, released: Released) {
        if !released.is_empty() && self.unsent.is_none() {
            let sent = self.answer.send(GenerateEvent::Delta { text: released.text, tokens: released.tokens });
            self.unsent = sent.err();
        }
    }

    fn set_stopped_by_text(&mut self, length: usize) {
        let met = self.hold_back.matched().and_then(|phrase| self.stopping.stop.get(phrase));
        let stop = met.cloned().map(StopCause::Text);
        self.set_finished(FinishReason::Stop, stop, length);
    }

    fn set_finished(&mut self, reason: FinishReason, stop: Option<StopCause>, length: usize) {
        let usage = Usage {
            prompt_tokens: self.prompt_tokens() as u32,
            completion_tokens: (length - self.prompt_length) as u32,
            cached_tokens: self.cached_tokens.map(|tokens| tokens as u32),
            virtual_tokens: self.virtual_tokens as u32,
        };
        self.end = Some(match self.unsent.take() {
            Some(error) => Err(error),
            None => Ok(GenerateEvent::Finished { reason, stop, usage }),
        });
    }
}
