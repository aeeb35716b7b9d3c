//! What a dataset would be to training: its tokens, and what is wrong with it.

use std::collections::HashSet;
use std::sync::Arc;

use crate::data::{Record, lines};
use crate::error::{Error, Result};
use crate::ids::{DatasetName, Digest, Tenant};
use crate::store::{DatasetRow, Store};
use crate::text::{Conversation, Text};

/// Counts over the records of one dataset.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    pub dataset: DatasetRow,
    /// Ids of all records as training would see them; both answers of a pair count with their prompt.
    pub tokens: u64,
    /// Ids in the loss.
    pub loss_tokens: u64,
    /// Ids of the longest sequence.
    pub longest: u32,
    /// Records that repeat an earlier one to the byte.
    pub duplicates: u32,
    /// Records with a sequence longer than the base's context.
    pub too_long: u32,
}

/// Reads and tokenises a whole dataset. `context`: the base's context, in tokens.
pub async fn inspect(
    store: &Store,
    text: &Arc<Text>,
    tenant: &Tenant,
    name: &DatasetName,
    context: usize,
) -> Result<Report> {
    tenant.check_owns(&name.tenant)?;
    let dataset = store.get_dataset(name).await?;
    let bytes = store.blobs().get(&dataset.blob).await?;
    let text = text.clone();
    let count = move || count(dataset, &bytes, &text, context);
    tokio::task::spawn_blocking(count).await.map_err(Error::internal)?
}

fn count(dataset: DatasetRow, bytes: &[u8], text: &Text, context: usize) -> Result<Report> {
    let mut seen = HashSet::new();
    let kind = dataset.kind;
    let mut report = Report { dataset, tokens: 0, loss_tokens: 0, longest: 0, duplicates: 0, too_long: 0 };
    for line in lines(bytes) {
        report.duplicates += u32::from(!seen.insert(Digest::of(line)));
        let sequences = sequences(&Record::parse(kind, line)?, text)?;
        let longest = sequences.iter().map(|sequence| sequence.ids.len()).max().unwrap_or(0);
        report.tokens += sequences.iter().map(|sequence| sequence.ids.len() as u64).sum::<u64>();
        report.loss_tokens += sequences.iter().flat_map(|s| &s.in_loss).filter(|in_loss| **in_loss).count() as u64;
        report.longest = report.longest.max(u32::try_from(longest).unwrap_or(u32::MAX));
        report.too_long += u32::from(longest > context);
    }
    Ok(report)
}

fn sequences(record: &Record, text: &Text) -> Result<Vec<Conversation>> {
    Ok(match record {
        Record::Chat(chat) => vec![chat.encode(text)?],
        Record::Preference(preference) => {
            let pair = preference.encode(text)?;
            vec![pair.chosen, pair.rejected]
        }
    })
}
