//! What comes of a call, before it is decoded: its bytes are counted as they arrive, and a message is passed on once it is known what its
//! decoded form may take at most, and that there is room for it.
//!
//! protobuf can be two bytes on the wire and fifty in memory, so the length of a message says little. [`decoded_bytes`] walks the wire
//! format without knowing the types, and counts what the largest of our types takes for each field.

use std::collections::VecDeque;
use std::io::Read as _;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http_body::{Body as _, Frame};
use tokio::time::Sleep;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Bytes;
use tonic::codegen::http::HeaderMap;

use super::places::Limit;
use super::status;
use crate::error::{Error, Result};
use crate::memory::Account;
use crate::sync::lock;

/// Bytes before a message: whether it is compressed, and its length.
pub const HEAD: usize = 5;
/// What a field of a length takes in memory beside what is in it: our largest message, and the growth of the list that it is in.
const FIELD_BYTES: u64 = 192;
/// What a number takes in a list that grows.
const NUMBER_BYTES: u64 = 16;
/// What a byte may become: a packed number of one byte has four, in a list that grows.
pub const PACKED: u64 = 8;
/// The same where there are no packed numbers: it is there encoded and decoded.
pub const PLAIN: u64 = 2;
/// Messages within messages that are looked into; ours have fewer.
const DEPTH: u32 = 6;

/// How a call's messages are taken.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Bytes of one message.
    pub most: Limit,
    /// For calls of one message: the whole body is awaited so long before anything is passed on, so that nobody holds a decoded message by
    /// not ending the call. `None` for streams.
    pub whole_within: Option<Duration>,
    /// What a byte of a field may become: [`PACKED`] or [`PLAIN`].
    pub factor: u64,
}

/// What a call holds, shared with what outlives its body.
pub type SharedAccount = Arc<Mutex<Account>>;

/// Gives back all that a call's messages hold.
pub fn settle(account: &SharedAccount) {
    let mut account = lock(account);
    let all = account.bytes();
    account.shrink(all);
}

/// Why a call's body could not be read on, for whoever ends the answer: some handlers end theirs as if the body had ended.
pub type Fault = Arc<OnceLock<Status>>;

/// A call's body, counted.
pub struct Measured {
    body: Body,
    rules: Rules,
    account: SharedAccount,
    fault: Fault,
    time: Option<Pin<Box<Sleep>>>,
    /// The message that is coming.
    partial: Vec<u8>,
    /// Whole messages and what each holds.
    messages: VecDeque<(Bytes, u64)>,
    /// What the message that was passed on last holds; it is decoded and used until the next one is asked for.
    passed: u64,
    trailers: Option<HeaderMap>,
    ended: bool,
}

impl Measured {
    pub fn new(body: Body, rules: Rules, account: SharedAccount) -> Self {
        let time = rules.whole_within.map(|time| Box::pin(tokio::time::sleep(time)));
        let (partial, messages, fault) = (Vec::new(), VecDeque::new(), Fault::default());
        Self { body, rules, account, fault, time, partial, messages, passed: 0, trailers: None, ended: false }
    }

    /// Where the error will be that ends the body early.
    pub fn fault(&self) -> Fault {
        self.fault.clone()
    }

    /// Takes the next bytes.
    fn take(&mut self, data: &[u8]) -> Result<(), Status> {
        lock(&self.account).grow(data.len() as u64)?;
        self.partial.extend_from_slice(data);
        let mut at = 0;
        while let Some(head) = self.partial[at..].first_chunk::<HEAD>() {
            let [compressed, length @ ..] = *head;
            let length = u64::from(u32::from_be_bytes(length));
            if length > self.rules.most.1 {
                return Err(status::too_large(self.rules.most, length));
            }
            let end = HEAD + length as usize;
            let Some(message) = self.partial.get(at..at + end) else { break };
            at += end;
            let decoded = match compressed {
                0 => message_bytes(&message[HEAD..], self.rules.factor)?,
                _ => inflated_bytes(&message[HEAD..], self.rules)?,
            };
            if self.rules.whole_within.is_some() && !self.messages.is_empty() {
                return Err(status::malformed("the method takes one message, and more have come"));
            }
            lock(&self.account).grow(decoded)?;
            self.messages.push_back((Bytes::copy_from_slice(message), decoded + end as u64));
        }
        self.partial.drain(..at);
        Ok(())
    }

    /// The next message, or the end.
    fn pass(&mut self) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some((message, held)) = self.messages.pop_front() {
            lock(&self.account).shrink(self.passed);
            self.passed = if self.rules.whole_within.is_some() { 0 } else { held };
            return Poll::Ready(Some(Ok(Frame::data(message))));
        }
        if !self.partial.is_empty() {
            // A message that was cut off; the decoder says so.
            return Poll::Ready(Some(Ok(Frame::data(Bytes::from(std::mem::take(&mut self.partial))))));
        }
        Poll::Ready(self.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            if self.ended || self.rules.whole_within.is_none() && !self.messages.is_empty() {
                return self.pass();
            }
            let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
                let (Some(time), Some(within)) = (&mut self.time, self.rules.whole_within) else {
                    return Poll::Pending;
                };
                ready!(time.as_mut().poll(cx));
                return Poll::Ready(Some(Err(too_slow(within).into())));
            };
            match frame.transpose()? {
                None => self.ended = true,
                Some(frame) => match frame.into_data() {
                    Ok(data) => self.take(&data)?,
                    Err(frame) => {
                        self.trailers = frame.into_trailers().ok();
                        self.ended = true;
                    }
                },
            }
        }
    }
}

/// The request did not come in time.
fn too_slow(within: Duration) -> Error {
    let seconds = within.as_secs();
    let message = format!("the request did not arrive within {seconds} s; send it without a pause and end it");
    Error::Exhausted { limit: "request_seconds", message, retry_after: None }
}

impl http_body::Body for Measured {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = self.poll(cx);
        if let Poll::Ready(Some(Err(error))) = &polled {
            // The first error is why the body ended.
            let _ = self.fault.set(error.clone());
        }
        polled
    }
}

/// Returns what a message takes at most when it is decoded.
fn message_bytes(message: &[u8], factor: u64) -> Result<u64, Status> {
    decoded_bytes(message, factor, DEPTH).map_err(|_| status::malformed("its bytes are no protobuf message"))
}

/// Returns what a gzip message takes at most when it is decompressed and decoded. It is decompressed to look at it, within the limit.
fn inflated_bytes(message: &[u8], rules: Rules) -> Result<u64, Status> {
    let mut plain = Vec::new();
    let most = rules.most.1;
    let read = flate2::read::GzDecoder::new(message).take(most.saturating_add(1)).read_to_end(&mut plain);
    match read {
        Ok(_) if plain.len() as u64 > most => Err(status::too_large(rules.most, plain.len() as u64)),
        Ok(_) => Ok(plain.len() as u64 + message_bytes(&plain, rules.factor)?),
        Err(error) => Err(status::malformed(&format!("it is no gzip: {error}"))),
    }
}

/// Returns what a message takes in memory at most when it is decoded. Where the bytes are no message, whatever its type, the error is what
/// stands before the fault takes: that is decoded all the same. Each byte is looked at no more than once for each level.
fn decoded_bytes(mut bytes: &[u8], factor: u64, depth: u32) -> Result<u64, u64> {
    let mut sum = 0;
    while !bytes.is_empty() {
        sum += field_bytes(&mut bytes, factor, depth).ok_or(sum)?;
    }
    Ok(sum)
}

/// What the next field takes; `None` where there is no whole one.
fn field_bytes(bytes: &mut &[u8], factor: u64, depth: u32) -> Option<u64> {
    let tag = varint(bytes)?;
    if tag >> 3 == 0 {
        return None;
    }
    Some(match tag & 7 {
        0 => {
            varint(bytes)?;
            NUMBER_BYTES
        }
        1 => skip(bytes, 8).map(|_| NUMBER_BYTES)?,
        5 => skip(bytes, 4).map(|_| NUMBER_BYTES)?,
        // The ends of a group, which we have none of: its fields are passed over.
        3 | 4 => 0,
        2 => {
            let length = varint(bytes)?;
            let content = skip(bytes, length)?;
            let within = match depth {
                0 => 0,
                // No type is known, so that what is no message may be text; if it was to be one, its beginning is decoded.
                _ => decoded_bytes(content, factor, depth - 1).unwrap_or_else(|beginning| beginning),
            };
            FIELD_BYTES + (length * factor).max(within)
        }
        _ => return None,
    })
}

fn skip<'a>(bytes: &mut &'a [u8], count: u64) -> Option<&'a [u8]> {
    let (head, tail) = bytes.split_at_checked(usize::try_from(count).ok()?)?;
    *bytes = tail;
    Some(head)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::proto as pb;
    use crate::ids::TenantId;
    use crate::memory::Memory;
    use prost::Message as _;

    fn framed(message: &[u8]) -> Vec<u8> {
        [&[0][..], &(message.len() as u32).to_be_bytes(), message].concat()
    }

    /// A body of these pieces.
    fn body(pieces: Vec<Vec<u8>>) -> Body {
        struct Pieces(VecDeque<Vec<u8>>);
        impl http_body::Body for Pieces {
            type Data = Bytes;
            type Error = Status;
            fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
                Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece.into()))))
            }
        }
        Body::new(Pieces(pieces.into()))
    }

    async fn next(measured: &mut Measured) -> Option<Result<Vec<u8>, Status>> {
        let frame = std::future::poll_fn(|cx| Pin::new(&mut *measured).poll_frame(cx)).await?;
        Some(frame.map(|frame| frame.into_data().unwrap().to_vec()))
    }

    #[test]
    fn what_a_message_takes_is_known_from_its_bytes() {
        let empty = pb::ChatMessage::default();
        let chat = pb::Chat { messages: vec![empty; 100_000] };
        let request =
            pb::GenerateRequest { prompt: Some(pb::generate_request::Prompt::Chat(chat)), ..Default::default() };
        let bytes = request.encode_to_vec();
        let counted = decoded_bytes(&bytes, PACKED, DEPTH).unwrap();
        let takes = (100_000 * size_of::<pb::ChatMessage>() * 2) as u64;
        assert!(counted >= takes, "{} bytes on the wire, {counted} counted, up to {takes} taken", bytes.len());
        let text = pb::GenerateRequest {
            prompt: Some(pb::generate_request::Prompt::Text("word ".repeat(1000))),
            ..Default::default()
        };
        let counted = decoded_bytes(&text.encode_to_vec(), PACKED, DEPTH).unwrap();
        assert!((5000..50_000).contains(&counted), "{counted}");
        assert_eq!(decoded_bytes(&[0xff; 20], PACKED, DEPTH), Err(0));
        assert_eq!(decoded_bytes(&[], PACKED, DEPTH), Ok(0));

        // A chat whose last byte is wrong is decoded up to there.
        let mut broken = vec![bytes[0]];
        prost::encoding::encode_varint(200_001, &mut broken);
        broken.extend([0x0a, 0x00].repeat(100_000));
        broken.push(0x07);
        assert!(pb::GenerateRequest::decode(broken.as_slice()).is_err());
        let counted = decoded_bytes(&broken, PACKED, DEPTH).unwrap();
        assert!(counted >= takes, "{counted} counted, up to {takes} taken before the fault");
    }

    #[tokio::test]
    async fn a_compressed_message_is_counted_by_what_it_holds() {
        use std::io::Write as _;
        let gzip = |plain: &[u8]| {
            let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            writer.write_all(plain).unwrap();
            let message = writer.finish().unwrap();
            [&[1][..], &(message.len() as u32).to_be_bytes(), &message].concat()
        };
        // The default limits: a text of 12 kB has room beside others, one that is a bomb is refused as too large.
        let memory = Memory::new(512 << 20);
        let tenant = TenantId::new("a").unwrap();
        let account = || Arc::new(Mutex::new(memory.account(Some(&tenant))));
        let rules = Rules { most: ("most", 4 << 20), whole_within: None, factor: PACKED };
        let text: String = (0..3000).map(|i| format!("{:x} ", i * 7919)).collect();
        let request =
            pb::TokenizeRequest { input: Some(pb::tokenize_request::Input::Text(text)), ..Default::default() };
        let mut measured = Measured::new(body(vec![gzip(&request.encode_to_vec())]), rules, account());
        next(&mut measured).await.unwrap().unwrap();
        assert!(memory.used() < 1 << 20, "{}", memory.used());
        let mut bomb = Measured::new(body(vec![gzip(&vec![0; 5 << 20])]), rules, account());
        assert_eq!(next(&mut bomb).await.unwrap().unwrap_err().code(), tonic::Code::OutOfRange);
        let mut corrupt = Measured::new(body(vec![[&[1, 0, 0, 0, 3][..], b"abc"].concat()]), rules, account());
        assert_eq!(next(&mut corrupt).await.unwrap().unwrap_err().code(), tonic::Code::InvalidArgument);
    }

    #[tokio::test]
    async fn messages_pass_whole_and_what_they_hold_is_counted() {
        let memory = Memory::new(1 << 20);
        let tenant = TenantId::new("a").unwrap();
        let account = || Arc::new(Mutex::new(memory.account(Some(&tenant))));
        let (one, two) = (framed(b"\x0a\x03abc"), framed(b"\x0a\x01d"));
        let both = [&one[..], &two].concat();
        let rules = Rules { most: ("most", 100), whole_within: None, factor: PACKED };
        let mut stream = Measured::new(body(both.chunks(3).map(Vec::from).collect()), rules, account());
        assert_eq!(next(&mut stream).await.unwrap().unwrap(), one);
        let held = memory.used();
        assert!(held > one.len() as u64);
        assert_eq!(next(&mut stream).await.unwrap().unwrap(), two);
        assert!(next(&mut stream).await.is_none());
        drop(stream);
        assert_eq!(memory.used(), 0);

        let rules = Rules { most: ("most", 4), ..rules };
        let mut large = Measured::new(body(vec![one.clone()]), rules, account());
        assert_eq!(next(&mut large).await.unwrap().unwrap_err().code(), tonic::Code::OutOfRange);

        // A decoded form that does not fit is refused before it is made.
        let many = framed(&b"\x12\x00".repeat(10_000));
        let rules = Rules { most: ("most", 1 << 20), whole_within: Some(Duration::from_secs(60)), factor: PACKED };
        let mut amplified = Measured::new(body(vec![many]), rules, account());
        let refused = next(&mut amplified).await.unwrap().unwrap_err();
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted, "{refused:?}");
        drop((large, amplified));
        assert_eq!(memory.used(), 0);

        let whole = account();
        let mut unary = Measured::new(body(vec![one.clone()]), rules, whole.clone());
        assert_eq!(next(&mut unary).await.unwrap().unwrap(), one);
        assert!(next(&mut unary).await.is_none());
        drop(unary);
        assert!(memory.used() > 0, "the decoded form lives on in its handler");
        settle(&whole);
        assert_eq!(memory.used(), 0);
    }

    #[tokio::test]
    async fn what_is_no_message_and_one_too_many_are_refused() {
        let memory = Memory::new(1 << 20);
        let one = Rules { most: ("most", 100), whole_within: Some(Duration::from_secs(60)), factor: PACKED };
        let stream = Rules { whole_within: None, ..one };
        let two = [framed(b"\x0a\x01a"), framed(b"\x0a\x01b")].concat();
        let refused = async |bytes: Vec<u8>, rules| {
            let account = Arc::new(Mutex::new(memory.account(None)));
            let error = next(&mut Measured::new(body(vec![bytes]), rules, account)).await.unwrap().err();
            error.map(|status| status.code())
        };
        assert_eq!(refused(two.clone(), one).await, Some(tonic::Code::InvalidArgument));
        assert_eq!(refused(two, stream).await, None);
        for rules in [one, stream] {
            assert_eq!(refused(framed(&[0xff; 9]), rules).await, Some(tonic::Code::InvalidArgument));
            assert_eq!(refused(framed(b"\x0b\x08\x01\x0c"), rules).await, None, "an unknown group");
        }
    }
}
