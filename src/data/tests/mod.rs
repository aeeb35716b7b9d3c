//! The files that people have, each with its verdict: it trains to the ids and the loss of its plain form, or it is refused for the reason
//! that is true of it.

mod advice;
mod refused;
mod trains;

use std::io::Write as _;

use super::records::Record;
use super::{Findings, Reader, Sink};
use crate::error::Result;
use crate::ids::Tenant;
use crate::store::{DatasetKind, Store};
use crate::text::{Conversation, Text};

/// The sequences that training would see, the format, and what was ignored.
type Seen = (Vec<Conversation>, String, Vec<(String, u64)>);

/// A store in a folder of its own, with one tenant.
pub async fn store() -> (tempfile::TempDir, Store, Tenant) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).await.unwrap();
    let tenant = Tenant::proven("tenants/one".parse().unwrap());
    store.create_tenant(tenant.id(), "", 1, "").await.unwrap();
    (folder, store, tenant)
}

/// Reads a whole file.
pub fn read_all(mut reader: Reader, bytes: &[u8], sink: Sink<'_>) -> Result<Findings> {
    reader.push(bytes, sink)?;
    Ok(reader.finish(sink)?.1)
}

fn read(kind: DatasetKind, file: &[u8]) -> Result<Seen> {
    let text = Text::tiny();
    let mut sequences = Vec::new();
    let findings = read_all(Reader::of_stored(kind, text.clone()), file, &mut |numbered| {
        match numbered.record {
            Record::Chat(chat) => sequences.push(chat.encode(&text).unwrap()),
            Record::Preference(pair) => {
                let pair = pair.encode(&text).unwrap();
                sequences.extend([pair.chosen, pair.rejected]);
            }
        }
        Ok(())
    })?;
    Ok((sequences, findings.format, findings.ignored.into_iter().collect()))
}

fn sft(file: impl AsRef<[u8]>) -> Result<Vec<Conversation>> {
    read(DatasetKind::Sft, file.as_ref()).map(|read| read.0)
}

fn dpo(file: impl AsRef<[u8]>) -> Result<Vec<Conversation>> {
    read(DatasetKind::Preferences, file.as_ref()).map(|read| read.0)
}

pub fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

fn utf16(text: &str, mark: bool) -> Vec<u8> {
    let mark = if mark { vec![0xff, 0xfe] } else { vec![] };
    [mark, text.encode_utf16().flat_map(u16::to_le_bytes).collect()].concat()
}
