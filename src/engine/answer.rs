//! The way of an answer from the loop to its reader. The loop never waits for a reader: what is not read is counted, and an answer of
//! which too much is unread ends.

use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Poll, ready};

use futures::Stream;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::engine::run::Message;
use crate::error::{Error, Result};
use crate::memory::Account;
use crate::request::{GenerateEvent, TokenOut};
use crate::sync::lock;

/// What an event takes beside what is in it.
const EVENT_BYTES: usize = 128;

/// What is sent and not read of one answer.
type Unread = Arc<Mutex<Account>>;

/// The loop's end.
#[derive(Debug)]
pub struct Answer {
    events: UnboundedSender<(Result<GenerateEvent>, u64)>,
    unread: Unread,
    /// Bytes.
    max_unread: u64,
}

impl Answer {
    /// Makes both ends. `account`: what is unread is taken from it; `max_unread`: bytes of one answer (limit `max_unread_answer_bytes`).
    pub fn new(account: Account, max_unread: u64) -> (Self, UnreadEvents) {
        let (events, receiver) = unbounded_channel();
        let unread = Arc::new(Mutex::new(account));
        (Self { events, unread: unread.clone(), max_unread }, UnreadEvents { events: receiver, unread })
    }

    /// Sends an event.
    ///
    /// # Errors
    /// EXHAUSTED where too much is unread: the event is not sent, and the answer must end with this error.
    pub fn send(&self, event: GenerateEvent) -> Result<()> {
        let bytes = size_of_event(&event);
        let mut unread = lock(&self.unread);
        if unread.bytes() + bytes > self.max_unread {
            let message = format!(
                "the answer was not read: {} bytes of it wait; read it faster, or ask for fewer log-probabilities",
                unread.bytes()
            );
            return Err(Error::Exhausted { limit: "max_unread_answer_bytes", message, retry_after: None });
        }
        unread.grow(bytes)?;
        drop(unread);
        // A receiver that is gone has said so to the loop.
        let _ = self.events.send((Ok(event), bytes));
        Ok(())
    }

    /// Whether its reader has gone.
    pub fn is_closed(&self) -> bool {
        self.events.is_closed()
    }

    /// Sends the last event, or how the answer failed. It is small, and is never refused.
    pub fn end(&self, end: Result<GenerateEvent>) {
        let _ = self.events.send((end, 0));
    }
}

fn size_of_event(event: &GenerateEvent) -> u64 {
    let bytes = match event {
        GenerateEvent::Delta { text, tokens } => {
            let top = |token: &TokenOut| token.logprob.as_ref().map_or(0, |logprob| size_of_val(&logprob.top[..]));
            text.len() + size_of_val(&tokens[..]) + tokens.iter().map(top).sum::<usize>()
        }
        _ => 0,
    };
    (EVENT_BYTES + bytes) as u64
}

/// The reader's end.
#[derive(Debug)]
pub struct UnreadEvents {
    events: UnboundedReceiver<(Result<GenerateEvent>, u64)>,
    unread: Unread,
}

impl UnreadEvents {
    /// Takes the next event; it counts as read.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<GenerateEvent>>> {
        let next = ready!(self.events.poll_recv(cx));
        Poll::Ready(next.map(|(event, bytes)| {
            lock(&self.unread).shrink(bytes);
            event
        }))
    }

    #[cfg(test)]
    pub async fn recv(&mut self) -> Option<Result<GenerateEvent>> {
        std::future::poll_fn(|cx| self.poll(cx)).await
    }
}

/// Tells the loop that nobody waits for sequences any more, unless they have ended.
#[derive(Debug)]
pub struct CancelOnDrop {
    inbox: Arc<mpsc::Sender<Message>>,
    ids: Range<u64>,
}

impl CancelOnDrop {
    pub fn new(inbox: Arc<mpsc::Sender<Message>>, ids: Range<u64>) -> Self {
        Self { inbox, ids }
    }

    /// The sequences have ended.
    pub fn disarm(&mut self) {
        self.ids = 0..0;
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if !self.ids.is_empty() {
            // A loop that is gone has nothing to cancel.
            let _ = self.inbox.send(Message::Cancel(self.ids.clone()));
        }
    }
}

/// An answer as its reader gets it. The request's places are given back when its sequence ends, not when it is read: what is not read is
/// bounded by itself, and must keep nobody out.
#[derive(Debug)]
pub struct AnswerStream {
    pub events: UnreadEvents,
    pub cancel: CancelOnDrop,
}

impl Stream for AnswerStream {
    type Item = Result<GenerateEvent>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let event = ready!(self.events.poll(cx));
        if !matches!(&event, Some(Ok(GenerateEvent::Started { .. } | GenerateEvent::Delta { .. }))) {
            self.cancel.disarm();
        }
        Poll::Ready(event)
    }
}
