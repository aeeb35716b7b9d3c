//! What a dataset would be to training: its tokens, what is wrong with it, and some of its records as the model sees them.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use super::encode::{LongRecords, longest, reason, sequences};
use super::problems::Problems;
use super::reader::{Findings, Numbered};
use super::{Record, stored};
use crate::error::Result;
use crate::ids::{DatasetName, Tenant};
use crate::store::{DatasetRow, Store};
use crate::text::{Conversation, Text};
use crate::work::blocking;

/// Ids of all records that one report shows: it must fit into a message.
const SHOWN_IDS: usize = 100_000;

/// What is asked about a dataset.
#[derive(Debug, Clone, Copy)]
pub struct Question {
    /// The longest sequence that training would take, in tokens.
    pub max_length: usize,
    /// Records to show.
    pub show: usize,
}

/// Counts over the records of one dataset.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// What was looked at.
    pub dataset: DatasetRow,
    /// What its file turned out to be.
    pub findings: Findings,
    /// Ids of all records as training would see them; both answers of a pair count with their prompt.
    pub tokens: u64,
    /// Ids in the loss.
    pub loss_tokens: u64,
    /// Ids of the longest sequence.
    pub longest: u32,
    /// Records that say the same as an earlier one.
    pub duplicates: u32,
    /// What [`Question::max_length`] was.
    pub max_length: usize,
    /// Records with a sequence longer than that.
    pub too_long: LongRecords,
    /// The first sequences as they are rendered.
    pub shown: Vec<Shown>,
}

/// A sequence as the model sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Shown {
    /// Counted from 1.
    pub record: u64,
    /// The line it begins on, from 1.
    pub line: u64,
    /// Of a pair: `chosen` or `rejected`; else empty.
    pub answer: &'static str,
    /// In order.
    pub spans: Vec<Span>,
}

/// A part of a sequence that is in the loss or not, as a whole.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    pub text: String,
    pub ids: Vec<u32>,
    pub in_loss: bool,
}

/// Reads and tokenises a whole dataset.
///
/// # Errors
/// NOT_FOUND; INVALID_RECORD where a record can't be used with this base.
pub async fn inspect(
    store: &Store,
    text: &Arc<Text>,
    tenant: &Tenant,
    name: &DatasetName,
    question: Question,
) -> Result<Report> {
    tenant.check_owns(&name.tenant)?;
    let dataset = store.get_dataset(name).await?;
    let file = stored::open(store, &dataset).await?;
    let text = text.clone();
    blocking(move || count(dataset, file, &text, question)).await
}

fn count(dataset: DatasetRow, file: impl io::Read, text: &Arc<Text>, question: Question) -> Result<Report> {
    let mut report = Report {
        dataset: dataset.clone(),
        findings: Findings::default(),
        tokens: 0,
        loss_tokens: 0,
        longest: 0,
        duplicates: 0,
        max_length: question.max_length,
        too_long: LongRecords::default(),
        shown: Vec::new(),
    };
    let (mut seen, mut problems, mut records) = (HashSet::new(), Problems::default(), 0);
    let mut room = SHOWN_IDS;
    let findings = stored::read(file, &dataset, text, &mut |Numbered { line, record }| {
        records += 1;
        report.duplicates += u32::from(!seen.insert(record.digest()));
        match sequences(&record, text) {
            Ok(sequences) => {
                report.add(line, &sequences);
                if records <= question.show as u64 {
                    report.shown.extend(shown(text, records, line, &record, &sequences, &mut room));
                }
            }
            Err(error) => problems.add(line, reason(&error)),
        }
        Ok(())
    })?;
    match problems.into_error(records) {
        Some(error) => Err(stored::in_dataset(&dataset.name, error)),
        None => Ok(Report { findings, ..report }),
    }
}

impl Report {
    fn add(&mut self, line: u64, sequences: &[Conversation]) {
        let longest = longest(sequences);
        self.tokens += sequences.iter().map(|sequence| sequence.ids.len() as u64).sum::<u64>();
        self.loss_tokens += sequences.iter().flat_map(|s| &s.in_loss).filter(|in_loss| **in_loss).count() as u64;
        self.longest = self.longest.max(u32::try_from(longest).unwrap_or(u32::MAX));
        if longest > self.max_length {
            self.too_long.add(line, longest);
        }
    }
}

/// A record's sequences in spans, as far as there is room for their ids.
fn shown(
    text: &Text,
    number: u64,
    line: u64,
    record: &Record,
    sequences: &[Conversation],
    room: &mut usize,
) -> Vec<Shown> {
    let answers = match record {
        Record::Chat(_) => [""].as_slice(),
        Record::Preference(_) => &["chosen", "rejected"],
    };
    let show = |(answer, sequence): (&&'static str, &Conversation)| {
        let ids = &sequence.ids[..sequence.ids.len().min(*room)];
        *room -= ids.len();
        let spans = sequence.in_loss[..ids.len()].chunk_by(|a, b| a == b).scan(0, |at, mask| {
            let ids = &ids[*at..*at + mask.len()];
            *at += mask.len();
            Some(Span { text: text.decode(ids, false).unwrap_or_default(), ids: ids.to_vec(), in_loss: mask[0] })
        });
        Shown { record: number, line, answer, spans: spans.collect() }
    };
    answers.iter().zip(sequences).map(show).filter(|shown| !shown.spans.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Digest;
    use crate::store::{DatasetKind, NewDataset};

    fn report(kind: DatasetKind, file: &str, question: Question) -> Result<Report> {
        let dataset = NewDataset {
            name: "tenants/a/datasets/d".parse().unwrap(),
            kind,
            records: file.lines().filter(|line| !line.is_empty()).count() as u64,
            size_bytes: 0,
            unpacked_bytes: 0,
            digest: Digest::of(file.as_bytes()),
            blob: String::new(),
        };
        count(dataset.into_row(), file.as_bytes(), &Text::tiny(), question)
    }

    #[test]
    fn records_are_shown_as_rendered_with_their_loss() {
        let file = "{\"prompt\":\"Why?\",\"completion\":\"Sö.\"}\n\n{\"prompt\":\"a\",\"completion\":\"b\"}";
        let report = report(DatasetKind::Sft, file, Question { max_length: 25, show: 1 }).unwrap();
        let [one] = &report.shown[..] else { panic!("{:?}", report.shown) };
        assert_eq!((one.record, one.line, one.answer), (1, 1, ""));
        let spans: Vec<_> = one.spans.iter().map(|span| (span.text.as_str(), span.in_loss)).collect();
        let prompt = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(spans, [(prompt, false), ("Sö.<|im_end|>", true)]);
        assert_eq!(one.spans[1].ids, [b'S' as u32, 0xC3, 0xB6, b'.' as u32, 257]);
        assert_eq!((report.max_length, report.too_long.count), (25, 1));
        assert_eq!(report.too_long.first[0].0, 1);
    }

    #[test]
    fn pairs_are_shown_with_both_answers_and_bounded() {
        let file = "{\"prompt\":\"Why?\",\"chosen\":\"So.\",\"rejected\":\"No.\"}\n".repeat(3000);
        let question = Question { max_length: 100, show: 3000 };
        let report = report(DatasetKind::Preferences, &file, question).unwrap();
        assert_eq!((report.shown[0].answer, report.shown[1].answer), ("chosen", "rejected"));
        let ids: usize = report.shown.iter().flat_map(|shown| &shown.spans).map(|span| span.ids.len()).sum();
        assert_eq!(ids, SHOWN_IDS);
        assert_eq!(report.duplicates, 2999);
    }
}
