//! Records as ids, and what becomes of those that are longer than may be. Inspection and training measure by the same function.

use std::io;
use std::sync::Arc;

use super::problems::{Noted, Problems};
use super::records::{Pair, Record};
use super::{Numbered, Split, stored};
use crate::error::{Error, Result};
use crate::request::TooLong;
use crate::store::{DatasetKind, DatasetRow};
use crate::text::{Conversation, Text};

/// Many records of one kind as ids.
#[derive(Debug, Clone, PartialEq)]
pub enum Examples {
    /// Conversations.
    Sft(Vec<Conversation>),
    /// Preferences.
    Dpo(Vec<Pair>),
}

impl Examples {
    /// Returns how many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Sft(examples) => examples.len(),
            Self::Dpo(pairs) => pairs.len(),
        }
    }

    /// Returns whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Parts them into those that train and those that are held out.
    pub fn split(self, share: f32, seed: u64) -> (Self, Self) {
        let split = Split::new(self.len(), share, seed);
        match self {
            Self::Sft(examples) => {
                let (train, validation) = part(examples, &split);
                (Self::Sft(train), Self::Sft(validation))
            }
            Self::Dpo(pairs) => {
                let (train, validation) = part(pairs, &split);
                (Self::Dpo(train), Self::Dpo(validation))
            }
        }
    }
}

fn part<T>(all: Vec<T>, split: &Split) -> (Vec<T>, Vec<T>) {
    let (mut train, mut validation) = (Vec::new(), Vec::new());
    for (i, example) in all.into_iter().enumerate() {
        let held_out = split.validation.binary_search(&i).is_ok();
        if held_out { validation.push(example) } else { train.push(example) }
    }
    (train, validation)
}

/// A dataset as ids.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    /// The records as ids.
    pub examples: Examples,
    /// Records left out for their length.
    pub dropped: u64,
    /// Records that lost their end.
    pub truncated: u64,
}

/// How long a record may be.
#[derive(Debug, Clone, Copy)]
pub struct Length {
    /// Ids of a sequence.
    pub max: usize,
    /// What becomes of longer ones.
    pub too_long: TooLong,
}

/// Turns the records of a dataset's file into ids, one by one. `go_on` is asked before each and ends the work with its error. Blocks.
///
/// # Errors
/// Those of [`stored::read`]; INVALID_RECORD for records that the template refuses, RECORD_TOO_LONG where those are to be refused: each
/// lists the first ones and counts all.
pub fn encode(
    file: impl io::Read,
    dataset: &DatasetRow,
    text: &Arc<Text>,
    length: Length,
    go_on: impl Fn() -> Result<()>,
) -> Result<Encoded> {
    let mut encoder = Encoder::new(dataset.kind, length);
    stored::read(file, dataset, text, &mut |numbered| {
        go_on()?;
        encoder.take(&numbered, text)
    })?;
    encoder.finish()
}

/// Keeps the ids of the records that it is given, and nothing else of them.
struct Encoder {
    length: Length,
    encoded: Encoded,
    records: u64,
    problems: Problems,
    long: LongRecords,
}

impl Encoder {
    fn new(kind: DatasetKind, length: Length) -> Self {
        let examples = match kind {
            DatasetKind::Sft => Examples::Sft(Vec::new()),
            DatasetKind::Preferences => Examples::Dpo(Vec::new()),
        };
        let encoded = Encoded { examples, dropped: 0, truncated: 0 };
        Self { length, encoded, records: 0, problems: Problems::default(), long: LongRecords::default() }
    }

    fn take(&mut self, numbered: &Numbered, text: &Text) -> Result<()> {
        self.records += 1;
        let mut sequences = match sequences(&numbered.record, text) {
            Ok(sequences) => sequences,
            Err(error) => {
                self.problems.add(numbered.line, reason(&error));
                return Ok(());
            }
        };
        let tokens = longest(&sequences);
        if tokens > self.length.max {
            match self.length.too_long {
                TooLong::Refuse => {
                    self.long.add(numbered.line, tokens);
                    return Ok(());
                }
                TooLong::Truncate if sequences.iter_mut().all(|sequence| truncate(sequence, self.length.max)) => {
                    self.encoded.truncated += 1
                }
                TooLong::Truncate | TooLong::Drop => {
                    self.encoded.dropped += 1;
                    return Ok(());
                }
            }
        }
        for sequence in &mut sequences {
            // They grew by doubling, and stay for the whole run.
            sequence.ids.shrink_to_fit();
            sequence.in_loss.shrink_to_fit();
        }
        match (&mut self.encoded.examples, <[Conversation; 2]>::try_from(sequences)) {
            (Examples::Dpo(pairs), Ok([chosen, rejected])) => pairs.push(Pair { chosen, rejected }),
            (Examples::Sft(chats), Err(one)) => chats.extend(one),
            _ => return Err(Error::internal("a record is not of its dataset's kind")),
        }
        Ok(())
    }

    fn finish(self) -> Result<Encoded> {
        let Self { length, encoded, records, problems, long } = self;
        if let Some(error) = problems.into_error(records) {
            return Err(error);
        }
        check_lengths(&long, records, length.max)?;
        if encoded.examples.is_empty() {
            let message =
                format!("every record is longer than {} tokens (max_length); nothing is left to train on", length.max);
            return Err(Error::invalid_because("NOTHING_TO_LEARN", "dataset", message));
        }
        Ok(encoded)
    }
}

/// A record's sequences: one of a chat, two of a pair.
pub fn sequences(record: &Record, text: &Text) -> Result<Vec<Conversation>> {
    Ok(match record {
        Record::Chat(chat) => vec![chat.encode(text)?],
        Record::Preference(preference) => {
            let pair = preference.encode(text)?;
            vec![pair.chosen, pair.rejected]
        }
    })
}

/// Ids of the longest sequence.
pub fn longest(sequences: &[Conversation]) -> usize {
    sequences.iter().map(|sequence| sequence.ids.len()).max().unwrap_or(0)
}

/// An error about a record without the path that it has within a request.
pub fn reason(error: &Error) -> String {
    match error {
        Error::Invalid { message, .. } => message.clone(),
        other => other.to_string(),
    }
}

/// Tokens in the loss. The first id has no prediction.
fn loss_tokens(conversation: &Conversation) -> usize {
    conversation.in_loss.iter().skip(1).filter(|in_loss| **in_loss).count()
}

/// Cuts the end off. `false` where no token to learn would be left: such a record is of no use.
fn truncate(conversation: &mut Conversation, max: usize) -> bool {
    conversation.ids.truncate(max);
    conversation.in_loss.truncate(max);
    loss_tokens(conversation) > 0
}

/// The records that are longer than may be, with their tokens.
pub type LongRecords = Noted<usize>;

/// Fails where there is one that is to be refused.
fn check_lengths(long: &LongRecords, records: u64, max: usize) -> Result<()> {
    if long.count == 0 {
        return Ok(());
    }
    let listed: Vec<String> =
        long.first.iter().map(|(line, tokens)| format!("line {line} ({tokens} tokens)")).collect();
    let more = match long.count - listed.len() as u64 {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let message = format!(
        "{} of {records} records are longer than {max} tokens (max_length): {}{more}; shorten them, raise hyperparameters.max_length, or set \
         too_long to drop or truncate them",
        long.count,
        listed.join(", ")
    );
    Err(Error::invalid_because("RECORD_TOO_LONG", "dataset", message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::reader::Reader;
    use crate::data::tests::read_all;

    fn encoded(file: &str, kind: DatasetKind, max: usize, too_long: TooLong) -> Result<Encoded> {
        let text = Text::tiny();
        let mut encoder = Encoder::new(kind, Length { max, too_long });
        read_all(Reader::of_stored(kind, text.clone()), file.as_bytes(), &mut |numbered| {
            encoder.take(&numbered, &text)
        })?;
        encoder.finish()
    }

    fn chats() -> String {
        let line = |answer: usize| format!("{{\"prompt\":\"a\",\"completion\":\"{}\"}}\n", "b".repeat(answer));
        [1, 100, 2, 200].map(line).concat()
    }

    #[test]
    fn long_records_are_refused_together() {
        let error = encoded(&chats(), DatasetKind::Sft, 40, TooLong::Refuse).unwrap_err().to_string();
        assert!(error.starts_with("dataset: 2 of 4 records are longer than 40 tokens"), "{error}");
        assert!(error.contains("line 2 (") && error.contains("line 4 (") && error.contains("too_long"), "{error}");
        let many = chats().repeat(30);
        let error = encoded(&many, DatasetKind::Sft, 40, TooLong::Refuse).unwrap_err().to_string();
        assert!(error.starts_with("dataset: 60 of 120") && error.contains(" and 40 more"), "{error}");
    }

    #[test]
    fn long_records_are_dropped_or_cut_and_counted() {
        let dropped = encoded(&chats(), DatasetKind::Sft, 40, TooLong::Drop).unwrap();
        assert_eq!((dropped.examples.len(), dropped.dropped, dropped.truncated), (2, 2, 0));
        let cut = encoded(&chats(), DatasetKind::Sft, 40, TooLong::Truncate).unwrap();
        assert_eq!((cut.examples.len(), cut.dropped, cut.truncated), (4, 0, 2));
        let Examples::Sft(examples) = &cut.examples else { panic!() };
        assert!(examples.iter().all(|example| example.ids.len() <= 40 && loss_tokens(example) > 0));
        assert_eq!(
            examples[1].ids,
            encoded(&chats(), DatasetKind::Sft, 4000, TooLong::Refuse)
                .map(|all| match all.examples {
                    Examples::Sft(all) => all[1].ids[..40].to_vec(),
                    Examples::Dpo(_) => panic!(),
                })
                .unwrap()
        );
    }

    #[test]
    fn no_cut_leaves_nothing_to_learn() {
        let file = format!(
            "{{\"prompt\":\"a\",\"completion\":\"b\"}}\n{{\"prompt\":\"{}\",\"completion\":\"b\"}}",
            "a".repeat(100)
        );
        let cut = encoded(&file, DatasetKind::Sft, 50, TooLong::Truncate).unwrap();
        assert_eq!((cut.examples.len(), cut.dropped, cut.truncated), (1, 1, 0));
        let pair = format!("{{\"prompt\":\"a\",\"chosen\":\"{}\",\"rejected\":\"c\"}}", "b".repeat(100));
        let cut = encoded(&pair, DatasetKind::Preferences, 50, TooLong::Truncate).unwrap();
        let Examples::Dpo(pairs) = &cut.examples else { panic!() };
        assert_eq!((pairs[0].chosen.ids.len(), cut.truncated), (50, 1));
        let all = encoded(&chats(), DatasetKind::Sft, 5, TooLong::Drop).unwrap_err().to_string();
        assert!(all.contains("every record is longer"), "{all}");
    }
}
