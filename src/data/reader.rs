//! From the bytes of a dataset to its records, with what was found on the way. The only reader: an upload checks with it, training and
//! inspection read the stored file with it, so that all three see the same records.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::container::{Bounds, Container, Format, Piece};
use super::problems::Problems;
use super::records::{self, Record, Shape};
use crate::config::Limits;
use crate::error::{Error, Result};
use crate::request::ChatMessage;
use crate::store::DatasetKind;
use crate::text::{Markup, Text};

/// Names of ignored fields that are counted by name.
const NAMES: usize = 32;
/// Characters of such a name that are kept.
const NAME_CHARS: usize = 64;

/// What a dataset's file turned out to be.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Findings {
    /// "JSON Lines" and so on.
    pub format: String,
    /// Records of each shape.
    pub shapes: BTreeMap<Shape, u64>,
    /// Fields that said something and were not used, with the records that have them.
    pub ignored: BTreeMap<String, u64>,
    /// Occurrences of further names, beyond those that are counted.
    pub more_ignored: u64,
    /// Records with a text that mentions a control token of the base: it stays text.
    pub mentions: u64,
    /// Records with an answer of no text, which teach to say nothing, or not to.
    pub empty_answers: u64,
    /// Bytes of the file, unpacked.
    pub unpacked_bytes: u64,
}

/// What is done with each good record; its error ends the reading.
pub type Sink<'a> = &'a mut dyn FnMut(Numbered) -> Result<()>;

/// A record and the line it begins on.
#[derive(Debug, Clone, PartialEq)]
pub struct Numbered {
    /// The line, from 1.
    pub line: u64,
    /// The record.
    pub record: Record,
}

/// Reads a dataset as its bytes come.
#[derive(Debug)]
pub struct Reader {
    container: Container,
    check: Check,
}

/// What is done with each record.
#[derive(Debug)]
struct Check {
    kind: DatasetKind,
    text: Arc<Text>,
    max_records: u64,
    max_messages: u64,
    /// Good and bad.
    records: u64,
    findings: Findings,
    problems: Problems,
}

impl Reader {
    /// With the limits for what comes in.
    pub fn new(kind: DatasetKind, text: Arc<Text>, limits: &Limits) -> Self {
        let bounds = Bounds { bytes: limits.max_dataset_bytes, record_bytes: limits.max_record_bytes };
        Self::bounded(kind, text, bounds, limits.max_dataset_records, limits.max_chat_messages)
    }

    /// Without limits, for what has been accepted.
    pub fn of_stored(kind: DatasetKind, text: Arc<Text>) -> Self {
        Self::bounded(kind, text, Bounds { bytes: u64::MAX, record_bytes: u64::MAX }, u64::MAX, u64::MAX)
    }

    fn bounded(kind: DatasetKind, text: Arc<Text>, bounds: Bounds, max_records: u64, max_messages: u64) -> Self {
        let (findings, problems) = (Findings::default(), Problems::default());
        let check = Check { kind, text, max_records, max_messages, records: 0, findings, problems };
        Self { container: Container::new(bounds), check }
    }

    /// Takes the next bytes, cut anywhere; gives the good records to `sink`.
    ///
    /// # Errors
    /// UNSUPPORTED_FORMAT for a file that is none of the formats; a limit by its name; what `sink` says. Bad records are told at the end.
    pub fn push(&mut self, bytes: &[u8], sink: Sink<'_>) -> Result<()> {
        let Self { container, check } = self;
        container.push(bytes, &mut |piece| check.take(piece, sink))
    }

    /// Ends the file; gives its number of records and what was found.
    ///
    /// # Errors
    /// INVALID_RECORD with the first bad records and their count; EMPTY_DATASET.
    pub fn finish(mut self, sink: Sink<'_>) -> Result<(u64, Findings)> {
        let Self { container, check } = &mut self;
        let format: Format = container.finish(&mut |piece| check.take(piece, sink))?;
        let unpacked_bytes = container.unpacked_bytes();
        let Check { records, mut problems, findings, .. } = self.check;
        problems.rewrite(|reason| records::fit(reason, format));
        if let Some(error) = problems.into_error(records) {
            return Err(error);
        }
        if records == 0 {
            return Err(Error::invalid_because(
                "EMPTY_DATASET",
                "data",
                "holds no record; send one JSON object a line",
            ));
        }
        Ok((records, Findings { format: format.describe(), unpacked_bytes, ..findings }))
    }
}

impl Check {
    fn take(&mut self, piece: Piece<'_>, sink: Sink<'_>) -> Result<()> {
        let (line, text) = match piece {
            Piece::Value { line, text } => (line, text),
            Piece::Stray { line, why } => {
                self.problems.add_stray(line, why);
                return Ok(());
            }
        };
        self.records += 1;
        if self.records > self.max_records {
            let message = format!("the dataset has more than {} records", self.max_records);
            return Err(exhausted("max_dataset_records", message));
        }
        match records::parse(self.kind, text) {
            Err((offset, reason)) => self.problems.add(line + offset, reason),
            Ok(parsed) => {
                if parsed.record.messages() as u64 > self.max_messages {
                    let message = format!("line {line} has more than {} messages", self.max_messages);
                    return Err(exhausted("max_chat_messages", message));
                }
                match self.look_at(&parsed) {
                    Some(reason) => self.problems.add(line, reason),
                    None => sink(Numbered { line, record: parsed.record })?,
                }
            }
        }
        Ok(())
    }

    /// Counts what is worth telling; gives why the record can't be used after all.
    fn look_at(&mut self, parsed: &records::Parsed) -> Option<String> {
        let mut mentions = false;
        for message in messages_of(&parsed.record) {
            match self.text.markup(&message.content) {
                Markup::None => {}
                Markup::Mentioned => mentions = true,
                Markup::Rendered(token) => {
                    return Some(format!(
                        "the {}'s text is rendered for a chat already (by {token:?}); give the messages without control tokens: the template adds them",
                        message.role
                    ));
                }
            }
        }
        let findings = &mut self.findings;
        findings.mentions += u64::from(mentions);
        findings.empty_answers += u64::from(has_empty_answer(&parsed.record));
        *findings.shapes.entry(parsed.shape).or_default() += 1;
        for name in &parsed.ignored {
            let name: String = name.chars().take(NAME_CHARS).collect();
            match findings.ignored.contains_key(&name) || findings.ignored.len() < NAMES {
                true => *findings.ignored.entry(name).or_default() += 1,
                false => findings.more_ignored += 1,
            }
        }
        None
    }
}

fn messages_of(record: &Record) -> Vec<&ChatMessage> {
    match record {
        Record::Chat(chat) => chat.messages.iter().collect(),
        Record::Preference(pair) => pair.prompt.iter().chain(&pair.chosen).chain(&pair.rejected).collect(),
    }
}

fn has_empty_answer(record: &Record) -> bool {
    let empty = |message: &ChatMessage| message.role == "assistant" && message.content.trim().is_empty();
    match record {
        Record::Chat(chat) => chat.messages.iter().zip(&chat.learn).any(|(message, learn)| *learn && empty(message)),
        Record::Preference(pair) => pair.chosen.iter().chain(&pair.rejected).any(empty),
    }
}

fn exhausted(limit: &'static str, message: String) -> Error {
    Error::Exhausted { limit, message, retry_after: None }
}
