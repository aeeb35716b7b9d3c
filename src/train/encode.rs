//! The records of a job as ids, split into training and validation, and what becomes of those that are too long.

use crate::data::{Examples, Pair, Record, Split};
use crate::error::{Error, Result};
use crate::request::{TooLong, TrainingData};
use crate::store::DatasetKind;
use crate::text::{Conversation, Text};
use crate::train::fit::Control;
use crate::train::objective::loss_tokens;

/// Records that an error names; it counts the others.
const NAMED_RECORDS: usize = 20;

/// How records become ids.
#[derive(Debug, Clone, Copy)]
pub struct Encoder<'a> {
    pub text: &'a Text,
    pub kind: DatasetKind,
    /// Tokens of the longest record.
    pub max_length: usize,
    pub too_long: TooLong,
    pub control: &'a Control,
}

/// All records as ids.
#[derive(Debug)]
pub struct Encoded {
    pub train: Examples,
    pub validation: Examples,
    dropped: u64,
    truncated: u64,
}

impl Encoded {
    /// Counts all but the tokens, which depend on the steps.
    pub fn data(&self) -> TrainingData {
        let (records, validation_records) = (self.train.len() as u64, self.validation.len() as u64);
        TrainingData { records, validation_records, tokens: 0, dropped: self.dropped, truncated: self.truncated }
    }
}

/// A record as ids.
trait Example: Sized {
    fn encode(record: &Record, text: &Text) -> Result<Option<Self>>;

    /// Its sequences.
    fn sequences(&mut self) -> Vec<&mut Conversation>;
}

impl Example for Conversation {
    fn encode(record: &Record, text: &Text) -> Result<Option<Self>> {
        match record {
            Record::Chat(chat) => chat.encode(text).map(Some),
            Record::Preference(_) => Ok(None),
        }
    }

    fn sequences(&mut self) -> Vec<&mut Conversation> {
        vec![self]
    }
}

impl Example for Pair {
    fn encode(record: &Record, text: &Text) -> Result<Option<Self>> {
        match record {
            Record::Preference(preference) => preference.encode(text).map(Some),
            Record::Chat(_) => Ok(None),
        }
    }

    fn sequences(&mut self) -> Vec<&mut Conversation> {
        vec![&mut self.chosen, &mut self.rejected]
    }
}

/// The parts of the split, and what was too long.
struct Parts<T> {
    train: Vec<T>,
    validation: Vec<T>,
    /// Number and tokens of each record that is refused.
    refused: Vec<(usize, usize)>,
    dropped: u64,
    truncated: u64,
}

impl Encoder<'_> {
    /// Turns every record into ids.
    ///
    /// # Errors
    ///
    /// RECORD_TOO_LONG names all records that are, where they are to be refused; NOTHING_TO_LEARN where a record, or the whole dataset, has
    /// no token to learn; CANCELLED once the job is.
    pub fn encode(&self, records: &[Record], split: &Split) -> Result<Encoded> {
        match self.kind {
            DatasetKind::Sft => self.parts(records, split)?.finish(self.max_length, Examples::Sft),
            DatasetKind::Preferences => self.parts(records, split)?.finish(self.max_length, Examples::Dpo),
        }
    }

    /// In the order of the records, so that an error names the first bad one.
    fn parts<T: Example>(&self, records: &[Record], split: &Split) -> Result<Parts<T>> {
        let mut parts = Parts { train: vec![], validation: vec![], refused: vec![], dropped: 0, truncated: 0 };
        for (index, record) in records.iter().enumerate() {
            self.control.check()?;
            let number = index + 1;
            let example = T::encode(record, self.text).map_err(|error| in_record(number, error))?;
            let wrong = || Error::internal(format!("record {number} is not of its dataset's kind"));
            let Some(example) = self.fit(example.ok_or_else(wrong)?, number, &mut parts)? else { continue };
            let held_out = split.validation.binary_search(&index).is_ok();
            let part = if held_out { &mut parts.validation } else { &mut parts.train };
            part.push(example);
        }
        Ok(parts)
    }

    /// Gives the record back where it may be trained on.
    fn fit<T: Example>(&self, mut example: T, number: usize, parts: &mut Parts<T>) -> Result<Option<T>> {
        if !teaches(&mut example) {
            let message = format!("record {number} has no token to learn");
            return Err(Error::invalid_because("NOTHING_TO_LEARN", "dataset", message));
        }
        let longest = example.sequences().iter().map(|sequence| sequence.ids.len()).max().unwrap_or_default();
        if longest <= self.max_length {
            return Ok(Some(example));
        }
        match self.too_long {
            TooLong::Refuse => parts.refused.push((number, longest)),
            TooLong::Drop => parts.dropped += 1,
            TooLong::Truncate => {
                for sequence in example.sequences() {
                    sequence.ids.truncate(self.max_length);
                    sequence.in_loss.truncate(self.max_length);
                }
                if teaches(&mut example) {
                    parts.truncated += 1;
                    return Ok(Some(example));
                }
                // What was to be learnt lay behind the cut.
                parts.dropped += 1;
            }
        }
        Ok(None)
    }
}

fn teaches(example: &mut impl Example) -> bool {
    example.sequences().iter().all(|sequence| loss_tokens(sequence) > 0)
}

impl<T> Parts<T> {
    fn finish(self, max_length: usize, examples: fn(Vec<T>) -> Examples) -> Result<Encoded> {
        let Self { train, validation, refused, dropped, truncated } = self;
        if let Some((first, tokens)) = refused.first() {
            let others: Vec<String> =
                refused[1..].iter().map(|(number, tokens)| format!("{number} ({tokens})")).collect();
            let message = format!(
                "record {first} has {tokens} tokens and max_length is {max_length}{}; shorten the records, raise \
                 hyperparameters.max_length, or set too_long to drop or truncate",
                also(&others)
            );
            return Err(Error::invalid_because("RECORD_TOO_LONG", "dataset", message));
        }
        if train.is_empty() {
            let message = format!("no record is left to train on: {dropped} are longer than {max_length} tokens");
            return Err(Error::invalid_because("NOTHING_TO_LEARN", "dataset", message));
        }
        Ok(Encoded { train: examples(train), validation: examples(validation), dropped, truncated })
    }
}

/// The other records of a message, the first of them by number.
fn also(others: &[String]) -> String {
    match others {
        [] => String::new(),
        named if named.len() < NAMED_RECORDS => format!("; so are too long: {}", named.join(", ")),
        all => {
            let named = &all[..NAMED_RECORDS - 1];
            format!("; so are too long: {} and {} more", named.join(", "), all.len() - named.len())
        }
    }
}

/// Says in which record it is wrong, unless it does already.
fn in_record(number: usize, error: Error) -> Error {
    match error {
        Error::Invalid { reason, field, message } if field != "dataset" => Error::Invalid {
            reason,
            field: "dataset".to_owned(),
            message: format!("record {number}: {field}: {message}"),
        },
        other => other,
    }
}
