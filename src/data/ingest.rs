//! Upload of a dataset as JSON lines, cut anywhere: every record is checked as it arrives, and what is not finished leaves nothing.

use sha2::{Digest as _, Sha256};

use crate::config::Limits;
use crate::data::{Record, is_blank};
use crate::error::{Error, Result};
use crate::ids::{DatasetName, Digest, Tenant};
use crate::store::{BlobUpload, DatasetKind, DatasetRow, NewDataset, Store, fresh_token, uninterrupted};

/// Bytes that go to the disk at once.
const PART_BYTES: usize = 1 << 20;

/// An upload under way. Dropped before [`Upload::finish`], or after an error, it leaves nothing.
#[derive(Debug)]
pub struct Upload {
    store: Store,
    name: DatasetName,
    request_id: String,
    most_datasets: u64,
    checker: Checker,
    destination: Destination,
}

/// Where the bytes go.
#[derive(Debug)]
enum Destination {
    Blob {
        key: String,
        file: BlobUpload,
        part: Vec<u8>,
    },
    /// Nothing is kept.
    Nowhere,
    /// A call with this request id has made the dataset already.
    Made(DatasetRow),
}

impl Upload {
    /// Starts one; refuses a name that is taken.
    pub async fn begin(
        store: &Store,
        limits: &Limits,
        tenant: &Tenant,
        name: DatasetName,
        kind: DatasetKind,
        request_id: &str,
        validate_only: bool,
    ) -> Result<Self> {
        tenant.check_owns(&name.tenant)?;
        let destination = match store.dataset_to_make(&name, kind, request_id).await? {
            Some(made) => Destination::Made(made),
            None if validate_only => Destination::Nowhere,
            None => {
                let key = format!("{}/datasets/{}", name.tenant.as_str(), fresh_token());
                Destination::Blob { file: store.blobs().upload(&key).await?, key, part: Vec::new() }
            }
        };
        Ok(Self {
            store: store.clone(),
            name,
            request_id: request_id.to_owned(),
            most_datasets: limits.max_datasets_per_tenant,
            checker: Checker::new(kind, limits),
            destination,
        })
    }

    /// The next bytes, cut anywhere.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.checker.push(bytes)?;
        if let Destination::Blob { file, part, .. } = &mut self.destination {
            part.extend_from_slice(bytes);
            if part.len() >= PART_BYTES {
                file.write(std::mem::take(part)).await?;
            }
        }
        Ok(())
    }

    /// One record, already typed.
    pub async fn write_record(&mut self, record: &Record) -> Result<()> {
        self.write(format!("{}\n", record.to_line()).as_bytes()).await
    }

    /// Ends the last line and makes the dataset.
    pub async fn finish(mut self) -> Result<DatasetRow> {
        let Checked { records, size_bytes, digest } = self.checker.finish()?;
        let kind = self.checker.kind;
        let new = |blob| NewDataset { name: self.name, kind, records, size_bytes, digest, blob };
        match self.destination {
            Destination::Made(row) => Ok(row),
            Destination::Nowhere => Ok(new(String::new()).into_row()),
            Destination::Blob { key, mut file, part } => {
                let (dataset, store, request_id, most) = (new(key), self.store, self.request_id, self.most_datasets);
                let make = async move {
                    file.write(part).await?;
                    let custody = store.custody(&dataset.name.tenant, &dataset.blob).await;
                    file.finish().await?;
                    let row = store.insert_dataset(&dataset, &request_id, most).await;
                    drop(custody);
                    // It has no owner where it was refused, or where another call with this request id was quicker.
                    store.collect_blobs(&[dataset.blob]).await;
                    row
                };
                uninterrupted(make).await
            }
        }
    }
}

/// Cuts bytes into lines and checks each; the result does not depend on how the bytes are cut.
#[derive(Debug)]
struct Checker {
    kind: DatasetKind,
    max_bytes: u64,
    max_records: u64,
    max_record_bytes: u64,
    max_messages: u64,
    /// The line under way.
    partial: Vec<u8>,
    lines: u64,
    records: u64,
    bytes: u64,
    hash: Sha256,
}

#[derive(Debug, Clone, PartialEq)]
struct Checked {
    records: u64,
    size_bytes: u64,
    digest: Digest,
}

impl Checker {
    fn new(kind: DatasetKind, limits: &Limits) -> Self {
        Self {
            kind,
            max_bytes: limits.max_dataset_bytes,
            max_records: limits.max_dataset_records,
            max_record_bytes: limits.max_record_bytes,
            max_messages: limits.max_chat_messages,
            partial: Vec::new(),
            lines: 0,
            records: 0,
            bytes: 0,
            hash: Sha256::new(),
        }
    }

    fn push(&mut self, bytes: &[u8]) -> Result<()> {
        let room = usize::try_from(self.max_bytes - self.bytes).unwrap_or(usize::MAX);
        let fits = &bytes[..bytes.len().min(room)];
        self.bytes += fits.len() as u64;
        self.hash.update(fits);
        let mut pieces = fits.split(|byte| *byte == b'\n').peekable();
        while let Some(piece) = pieces.next() {
            if (self.partial.len() + piece.len()) as u64 > self.max_record_bytes {
                let message = format!("line {} is longer than {} bytes", self.lines + 1, self.max_record_bytes);
                return Err(exhausted("max_record_bytes", message));
            }
            self.partial.extend_from_slice(piece);
            if pieces.peek().is_some() {
                self.end_line()?;
            }
        }
        if fits.len() < bytes.len() {
            return Err(exhausted("max_dataset_bytes", format!("the dataset is larger than {} bytes", self.max_bytes)));
        }
        Ok(())
    }

    fn end_line(&mut self) -> Result<()> {
        self.lines += 1;
        if !is_blank(&self.partial) {
            if self.records == self.max_records {
                let message = format!("the dataset has more than {} records", self.max_records);
                return Err(exhausted("max_dataset_records", message));
            }
            let record = Record::parse(self.kind, &self.partial).map_err(|e| at_line(e, self.lines))?;
            if record.messages() as u64 > self.max_messages {
                let message = format!("line {} has more than {} messages", self.lines, self.max_messages);
                return Err(exhausted("max_chat_messages", message));
            }
            self.records += 1;
        }
        self.partial.clear();
        Ok(())
    }

    fn finish(&mut self) -> Result<Checked> {
        self.end_line()?;
        if self.records == 0 {
            return Err(Error::invalid_because(
                "EMPTY_DATASET",
                "data",
                "holds no record; send one JSON object a line",
            ));
        }
        let digest = Digest::from(self.hash.clone());
        Ok(Checked { records: self.records, size_bytes: self.bytes, digest })
    }
}

fn exhausted(limit: &'static str, message: String) -> Error {
    Error::Exhausted { limit, message, retry_after: None }
}

fn at_line(error: Error, line: u64) -> Error {
    match error {
        Error::Invalid { reason, message, .. } => Error::Invalid { reason, field: format!("line {line}"), message },
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = r#"{"prompt":"p","completion":"é"}"#;

    fn limits() -> Limits {
        Limits {
            max_dataset_bytes: 400,
            max_dataset_records: 5,
            max_record_bytes: 60,
            max_chat_messages: 2,
            ..Limits::default()
        }
    }

    fn check<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> Result<Checked> {
        let mut checker = Checker::new(DatasetKind::Sft, &limits());
        chunks.into_iter().try_for_each(|chunk| checker.push(chunk))?;
        checker.finish()
    }

    fn check_text(text: &str) -> Result<Checked> {
        check([text.as_bytes()])
    }

    #[test]
    fn records_are_counted_and_blank_lines_are_not() {
        let text = format!("{GOOD}\r\n\n  \n{GOOD}");
        let checked = check_text(&text).unwrap();
        assert_eq!(checked, Checked { records: 2, size_bytes: text.len() as u64, digest: Digest::of(text.as_bytes()) });
    }

    #[test]
    fn errors_name_the_line() {
        let error = check_text(&format!("{GOOD}\n\n{{\"prompt\":1}}\n{GOOD}")).unwrap_err();
        assert!(error.to_string().starts_with("line 3: "), "{error}");
        let unended = check_text(&format!("{GOOD}\n{{")).unwrap_err();
        assert!(unended.to_string().starts_with("line 2: not JSON"), "{unended}");
        assert!(matches!(check_text("\n \n"), Err(Error::Invalid { reason: "EMPTY_DATASET", .. })));
    }

    #[test]
    fn limits_are_named() {
        let limit = |text: &str| match check_text(text) {
            Err(Error::Exhausted { limit, .. }) => limit,
            other => panic!("{other:?}"),
        };
        assert_eq!(limit(&format!("{GOOD}\n").repeat(6)), "max_dataset_records");
        assert_eq!(limit(&"a".repeat(61)), "max_record_bytes");
        assert_eq!(limit(&"\n".repeat(401)), "max_dataset_bytes");
        let turn = r#"{"role":"assistant","content":""}"#;
        let mut checker = Checker::new(DatasetKind::Sft, &Limits { max_record_bytes: 1000, ..limits() });
        let user = r#"{"role":"user","content":""}"#;
        let error = checker.push(format!("{{\"messages\":[{user},{turn},{turn}]}}\n").as_bytes()).unwrap_err();
        assert!(matches!(error, Error::Exhausted { limit: "max_chat_messages", .. }));
    }

    fn line() -> impl Strategy<Value = String> {
        prop_oneof![
            8 => Just(GOOD.to_owned()),
            2 => Just(String::new()),
            1 => Just("{\"prompt\":".to_owned()),
            1 => (55_usize..65).prop_map(|n| " ".repeat(n)),
            1 => Just("\u{2028}".to_owned()),
        ]
    }

    proptest! {
        #[test]
        fn cutting_changes_nothing(lines in prop::collection::vec(line(), 0..20), cuts in prop::collection::vec(1_usize..50, 1..60)) {
            let text = lines.join("\n");
            let mut chunks = Vec::new();
            let mut rest = text.as_bytes();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break }
                let (chunk, more) = rest.split_at((*cut).min(rest.len()));
                chunks.push(chunk);
                rest = more;
            }
            prop_assert_eq!(format!("{:?}", check(chunks)), format!("{:?}", check_text(&text)));
        }
    }

    async fn store() -> (tempfile::TempDir, Store, Tenant) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).await.unwrap();
        let tenant = Tenant::proven("tenants/one".parse().unwrap());
        store.create_tenant(tenant.id(), "", 1, "").await.unwrap();
        (folder, store, tenant)
    }

    async fn begin(store: &Store, tenant: &Tenant, id: &str, request_id: &str, validate_only: bool) -> Result<Upload> {
        let name = DatasetName::new(tenant.id(), id).unwrap();
        let limits = Limits { max_datasets_per_tenant: 2, max_record_bytes: 200, ..limits() };
        Upload::begin(store, &limits, tenant, name, DatasetKind::Sft, request_id, validate_only).await
    }

    /// Every file below the blob folder, staged ones too.
    fn files(folder: &tempfile::TempDir) -> usize {
        fn count(path: &std::path::Path) -> usize {
            let entries = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
            entries.map(|path| if path.is_dir() { count(&path) } else { 1 }).sum()
        }
        count(&folder.path().join("blobs"))
    }

    async fn settles_to(folder: &tempfile::TempDir, expected: usize) {
        for _ in 0..200 {
            if files(folder) == expected {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        assert_eq!(files(folder), expected);
    }

    #[tokio::test]
    async fn what_is_uploaded_is_what_is_read() {
        let (folder, store, tenant) = store().await;
        let mut upload = begin(&store, &tenant, "d", "r", false).await.unwrap();
        let record = Record::parse(DatasetKind::Sft, GOOD.as_bytes()).unwrap();
        upload.write(&GOOD.as_bytes()[..9]).await.unwrap();
        upload.write(&GOOD.as_bytes()[9..]).await.unwrap();
        upload.write(b"\n").await.unwrap();
        upload.write_record(&record).await.unwrap();
        let row = upload.finish().await.unwrap();
        assert_eq!(row.records, 2);
        assert_eq!(crate::data::read(&store, &row).await.unwrap(), [record.clone(), record]);
        assert_eq!(row, store.get_dataset(&row.name).await.unwrap());

        let mut retried = begin(&store, &tenant, "d", "r", false).await.unwrap();
        retried.write(GOOD.as_bytes()).await.unwrap();
        assert_eq!(retried.finish().await.unwrap(), row);
        let taken = begin(&store, &tenant, "d", "", false).await;
        assert!(matches!(taken, Err(Error::AlreadyExists { .. })));
        crate::data::delete_dataset(&store, &tenant, &row.name).await.unwrap();
        assert_eq!(files(&folder), 0);
    }

    #[tokio::test]
    async fn what_does_not_finish_leaves_nothing() {
        let (folder, store, tenant) = store().await;
        let mut dropped = begin(&store, &tenant, "a", "", false).await.unwrap();
        dropped.write(GOOD.as_bytes()).await.unwrap();
        drop(dropped);
        let mut wrong = begin(&store, &tenant, "b", "", false).await.unwrap();
        assert!(wrong.write(b"{\n").await.is_err());
        drop(wrong);
        let empty = begin(&store, &tenant, "c", "", false).await.unwrap();
        assert!(empty.finish().await.is_err());
        let mut validated = begin(&store, &tenant, "d", "", true).await.unwrap();
        validated.write(GOOD.as_bytes()).await.unwrap();
        assert_eq!(validated.finish().await.unwrap().records, 1);
        settles_to(&folder, 0).await;
        let page = crate::store::Page::default();
        assert!(store.list_datasets(tenant.id(), &page).await.unwrap().items.is_empty());
    }

    #[tokio::test]
    async fn a_race_for_one_name_has_one_winner() {
        let (folder, store, tenant) = store().await;
        let mut uploads = Vec::new();
        for id in ["d", "d", "e", "f"] {
            let mut upload = begin(&store, &tenant, id, "", false).await.unwrap();
            upload.write(GOOD.as_bytes()).await.unwrap();
            uploads.push(upload.finish());
        }
        let results = futures::future::join_all(uploads).await;
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 2, "{results:?}");
        settles_to(&folder, 2).await;
        let stranger = Tenant::proven("tenants/two".parse().unwrap());
        let name = DatasetName::new(tenant.id(), "x").unwrap();
        let limits = limits();
        let refused = Upload::begin(&store, &limits, &stranger, name, DatasetKind::Sft, "", false).await;
        assert!(matches!(refused, Err(Error::PermissionDenied)));
    }
}
