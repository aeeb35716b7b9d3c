//! Upload of a dataset's file, cut anywhere: every record is checked as it arrives, and what is not finished leaves nothing. The file is
//! kept as it was sent; whoever reads it reads it with the same reader.

use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use crate::config::Limits;
use crate::data::Record;
use crate::data::reader::{Findings, Reader};
use crate::data::stored::is_sound;
use crate::error::{Error, Result};
use crate::ids::{DatasetName, Digest, Tenant};
use crate::store::{BlobUpload, DatasetBefore, DatasetKind, DatasetRow, NewDataset, Store, random_id, taken};
use crate::text::Text;
use crate::work::{blocking, spawn_uncancellable};

/// Least bytes that go to the disk at once: as many as the CLI sends in a piece, which then is not copied.
const PART_BYTES: usize = 256 << 10;
/// Bytes that are checked on the caller's own thread; more go to one that may be busy.
const INLINE_BYTES: usize = 16 << 10;

/// An upload under way. Dropped before [`Upload::finish`], or after an error, it leaves nothing.
#[derive(Debug)]
pub struct Upload {
    store: Store,
    name: DatasetName,
    request_id: String,
    most_datasets: u64,
    kind: DatasetKind,
    /// `None` after an error.
    checker: Option<Checker>,
    destination: Destination,
}

/// Where the bytes go.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there are as many as uploads, a few")]
enum Destination {
    Blob {
        key: String,
        file: BlobUpload,
        part: Vec<u8>,
        /// The dataset whose damaged file this is to replace.
        repairs: Option<DatasetRow>,
    },
    /// Nothing is kept.
    Nowhere,
    /// The same call with this request id has made the dataset already.
    Made,
}

impl Destination {
    async fn blob(store: &Store, key: String, repairs: Option<DatasetRow>) -> Result<Self> {
        Ok(Self::Blob { file: store.blobs().upload(&key).await?, key, part: Vec::new(), repairs })
    }
}

impl Upload {
    /// Starts one; refuses a name that is taken, unless the file of that dataset is damaged: then the same content repairs it.
    #[expect(clippy::too_many_arguments, reason = "what a call to upload says, one by one")]
    pub async fn begin(
        store: &Store,
        text: &Arc<Text>,
        limits: &Limits,
        tenant: &Tenant,
        name: DatasetName,
        kind: DatasetKind,
        request_id: &str,
        validate_only: bool,
    ) -> Result<Self> {
        tenant.check_owns(&name.tenant)?;
        let destination = match store.dataset_before(&name, kind, request_id, None).await? {
            DatasetBefore::Free if validate_only => Destination::Nowhere,
            DatasetBefore::Free => {
                let key = format!("{}/datasets/{}", name.tenant.as_str(), random_id());
                Destination::blob(store, key, None).await?
            }
            DatasetBefore::Made(row) | DatasetBefore::Taken(row)
                if !validate_only && !is_sound(store, &row).await? =>
            {
                Destination::blob(store, row.blob.clone(), Some(row)).await?
            }
            DatasetBefore::Made(_) => Destination::Made,
            DatasetBefore::Taken(_) => return Err(taken(&name)),
        };
        Ok(Self {
            store: store.clone(),
            name,
            request_id: request_id.to_owned(),
            most_datasets: limits.max_datasets_per_tenant,
            kind,
            checker: Some(Checker::new(kind, text, limits)),
            destination,
        })
    }

    /// The next bytes, cut anywhere.
    pub async fn write(&mut self, bytes: Vec<u8>) -> Result<()> {
        let bytes = self.check(bytes).await?;
        if let Destination::Blob { file, part, .. } = &mut self.destination {
            match part.is_empty() {
                true => *part = bytes,
                false => part.extend(bytes),
            }
            if part.len() >= PART_BYTES {
                file.write(std::mem::take(part)).await?;
            }
        }
        Ok(())
    }

    /// One record, already typed.
    pub async fn write_record(&mut self, record: &Record) -> Result<()> {
        self.write(format!("{}\n", record.to_line()).into_bytes()).await
    }

    /// Checks the next bytes, where no call waits for it, and gives them back.
    async fn check(&mut self, bytes: Vec<u8>) -> Result<Vec<u8>> {
        let mut checker = self.checker.take().ok_or_else(ended)?;
        let is_short = bytes.len() <= INLINE_BYTES;
        let push = move || checker.push(&bytes).map(|()| (checker, bytes));
        let (checker, bytes) = if is_short { push()? } else { blocking(push).await? };
        self.checker = Some(checker);
        Ok(bytes)
    }

    /// Ends the file and makes the dataset; gives what was found in it.
    ///
    /// # Errors
    /// INVALID_RECORD with the first bad records and their count, EMPTY_DATASET, a limit.
    pub async fn finish(mut self) -> Result<(DatasetRow, Findings)> {
        let checker = self.checker.take().ok_or_else(ended)?;
        let checked = blocking(move || checker.finish()).await?;
        let Checked { records, size_bytes, digest, findings } = checked;
        let kind = self.kind;
        let unpacked_bytes = findings.unpacked_bytes;
        let new = |name, blob| NewDataset { name, kind, records, size_bytes, unpacked_bytes, digest, blob };
        let (store, request_id, name) = (self.store, self.request_id, self.name);
        let row = match self.destination {
            Destination::Made => match store.dataset_before(&name, kind, &request_id, Some(digest)).await? {
                DatasetBefore::Made(row) => row,
                _ => return Err(Error::not_found(name)),
            },
            Destination::Nowhere => new(name, String::new()).into_row(),
            Destination::Blob { file, part, repairs: Some(row), .. } => {
                // The request id stands for its own content, whatever has become of the file.
                store.dataset_before(&name, kind, &request_id, Some(digest)).await?;
                if (row.kind, row.digest) != (kind, digest) {
                    let message = "its file is damaged: the content that it was made of would repair it, and this is another; delete it first, \
                                   or upload under another name";
                    return Err(Error::AlreadyExists { name: name.to_string(), message: message.into() });
                }
                spawn_uncancellable(repair(store, row, file, part)).await?
            }
            Destination::Blob { key, mut file, part, repairs: None } => {
                let (dataset, most) = (new(name, key), self.most_datasets);
                let make = async move {
                    file.write(part).await?;
                    let custody = store.custody(&dataset.name.tenant, &dataset.blob).await;
                    file.finish().await?;
                    let row = store.insert_dataset(&dataset, &request_id, most).await;
                    drop(custody);
                    // It has no owner where it was refused, or where another call with this request id was quicker.
                    store.collect_blobs(&[dataset.blob]).await;
                    if let Ok(row) = &row {
                        let (tenant, dataset) = (&row.name.tenant, &row.name);
                        tracing::info!(%tenant, %dataset, records, size_bytes, "dataset uploaded");
                    }
                    row
                };
                spawn_uncancellable(make).await?
            }
        };
        Ok((row, findings))
    }
}

fn ended() -> Error {
    Error::internal("an upload that has failed was written to")
}

/// Puts a dataset's content in the place of what is damaged.
async fn repair(store: Store, row: DatasetRow, mut file: BlobUpload, part: Vec<u8>) -> Result<DatasetRow> {
    file.write(part).await?;
    let custody = store.custody(&row.name.tenant, &row.blob).await;
    file.finish().await?;
    drop(custody);
    tracing::warn!(dataset = %row.name, "its damaged file was replaced by the same content");
    // The dataset may have been deleted meanwhile.
    store.collect_blobs(std::slice::from_ref(&row.blob)).await;
    Ok(row)
}

/// Checks the bytes as they come, and sums them up.
#[derive(Debug)]
struct Checker {
    reader: Reader,
    max_bytes: u64,
    bytes: u64,
    hash: Sha256,
}

#[derive(Debug, Clone, PartialEq)]
struct Checked {
    records: u64,
    size_bytes: u64,
    digest: Digest,
    findings: Findings,
}

impl Checker {
    fn new(kind: DatasetKind, text: &Arc<Text>, limits: &Limits) -> Self {
        let reader = Reader::new(kind, text.clone(), limits);
        Self { reader, max_bytes: limits.max_dataset_bytes, bytes: 0, hash: Sha256::new() }
    }

    fn push(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes += bytes.len() as u64;
        if self.bytes > self.max_bytes {
            let message = format!("the dataset is larger than {} bytes", self.max_bytes);
            return Err(Error::Exhausted { limit: "max_dataset_bytes", message, retry_after: None });
        }
        self.hash.update(bytes);
        self.reader.push(bytes, &mut |_| Ok(()))
    }

    fn finish(self) -> Result<Checked> {
        let (records, findings) = self.reader.finish(&mut |_| Ok(()))?;
        Ok(Checked { records, size_bytes: self.bytes, digest: Digest::from(self.hash), findings })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tests::store;
    use crate::data::{Numbered, stored};

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
        let mut checker = Checker::new(DatasetKind::Sft, &Text::tiny(), &limits());
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
        assert_eq!((checked.records, checked.size_bytes), (2, text.len() as u64));
        assert_eq!(checked.digest, Digest::of(text.as_bytes()));
        assert_eq!(checked.findings.format, "JSON Lines");
    }

    #[test]
    fn errors_name_the_line() {
        let error = check_text(&format!("{GOOD}\n\n{{\"prompt\":1}}\n{GOOD}")).unwrap_err();
        assert!(error.to_string().starts_with("line 3: "), "{error}");
        let unended = check_text(&format!("{GOOD}\n{{")).unwrap_err();
        assert!(unended.to_string().starts_with("line 2: ends before its last bracket"), "{unended}");
        let two = check_text("{}\n{}").unwrap_err().to_string();
        assert!(two.starts_with("data: 2 of 2 records can't be used:\nlines 1, 2: has no field"), "{two}");
        assert!(matches!(check_text("\n \n"), Err(Error::Invalid { reason: "EMPTY_DATASET", .. })));
    }

    #[test]
    fn limits_are_named() {
        let limit = |text: &str| match check_text(text) {
            Err(Error::Exhausted { limit, .. }) => limit,
            other => panic!("{other:?}"),
        };
        assert_eq!(limit(&format!("{GOOD}\n").repeat(6)), "max_dataset_records");
        assert_eq!(limit(&format!("{{\"{}", "a".repeat(61))), "max_record_bytes");
        assert_eq!(limit(&"\n".repeat(401)), "max_dataset_bytes");
        let turn = r#"{"role":"assistant","content":""}"#;
        let mut checker = Checker::new(DatasetKind::Sft, &Text::tiny(), &Limits { max_record_bytes: 1000, ..limits() });
        let user = r#"{"role":"user","content":""}"#;
        checker.push(format!("{{\"messages\":[{user},{turn},{turn}]}}\n").as_bytes()).unwrap();
        let error = checker.finish().unwrap_err();
        assert!(matches!(error, Error::Exhausted { limit: "max_chat_messages", .. }));
    }

    async fn begin(store: &Store, tenant: &Tenant, id: &str, request_id: &str, validate_only: bool) -> Result<Upload> {
        let name = DatasetName::new(tenant.id(), id).unwrap();
        let limits = Limits { max_datasets_per_tenant: 2, max_record_bytes: 200, ..limits() };
        Upload::begin(store, &Text::tiny(), &limits, tenant, name, DatasetKind::Sft, request_id, validate_only).await
    }

    async fn read_back(store: &Store, row: &DatasetRow) -> Result<Vec<Numbered>> {
        let mut records = Vec::new();
        let file = stored::open(store, row).await?;
        stored::read(file, row, &Text::tiny(), &mut |numbered| {
            records.push(numbered);
            Ok(())
        })?;
        Ok(records)
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

    /// The second line of a dataset as stored.
    async fn row_text(store: &Store, row: &DatasetRow) -> String {
        let bytes = store.blobs().get(&row.blob).await.unwrap().unwrap();
        String::from_utf8(bytes).unwrap().lines().nth(1).unwrap().to_owned()
    }

    #[tokio::test]
    async fn what_is_uploaded_is_what_is_read() {
        let (folder, store, tenant) = store().await;
        let mut upload = begin(&store, &tenant, "d", "r", false).await.unwrap();
        let record = Record::parse(DatasetKind::Sft, GOOD.as_bytes()).unwrap();
        upload.write(GOOD.as_bytes()[..9].into()).await.unwrap();
        upload.write(GOOD.as_bytes()[9..].into()).await.unwrap();
        upload.write(b"\n".into()).await.unwrap();
        upload.write_record(&record).await.unwrap();
        let (row, _) = upload.finish().await.unwrap();
        assert_eq!(row.records, 2);
        let read = read_back(&store, &row).await.unwrap();
        assert_eq!(
            read.iter().map(|numbered| (numbered.line, &numbered.record)).collect::<Vec<_>>(),
            [(1, &record), (2, &record)]
        );
        assert_eq!(row, store.get_dataset(&row.name).await.unwrap());

        let mut retried = begin(&store, &tenant, "d", "r", false).await.unwrap();
        retried.write(format!("{GOOD}\n{}\n", row_text(&store, &row).await).into_bytes()).await.unwrap();
        assert_eq!(retried.finish().await.unwrap().0, row);
        let mut other = begin(&store, &tenant, "d", "r", false).await.unwrap();
        other.write(GOOD.into()).await.unwrap();
        for refused in [other.finish().await.map(drop), begin(&store, &tenant, "e", "r", false).await.map(drop)] {
            assert!(matches!(&refused, Err(Error::Invalid { reason: "REQUEST_ID_REUSED", .. })), "{refused:?}");
            assert!(refused.unwrap_err().to_string().contains("tenants/one/datasets/d"), "it names the first result");
        }
        let taken = begin(&store, &tenant, "d", "", false).await;
        assert!(matches!(taken, Err(Error::AlreadyExists { .. })));
        crate::data::delete_dataset(&store, &tenant, &row.name).await.unwrap();
        assert_eq!(files(&folder), 0);
    }

    #[tokio::test]
    async fn what_does_not_finish_leaves_nothing() {
        let (folder, store, tenant) = store().await;
        let mut dropped = begin(&store, &tenant, "a", "", false).await.unwrap();
        dropped.write(GOOD.into()).await.unwrap();
        drop(dropped);
        let mut wrong = begin(&store, &tenant, "b", "", false).await.unwrap();
        wrong.write(b"{\n".into()).await.unwrap();
        assert!(wrong.finish().await.is_err());
        let empty = begin(&store, &tenant, "c", "", false).await.unwrap();
        assert!(empty.finish().await.is_err());
        let mut validated = begin(&store, &tenant, "d", "", true).await.unwrap();
        validated.write(GOOD.into()).await.unwrap();
        assert_eq!(validated.finish().await.unwrap().0.records, 1);
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
            upload.write(GOOD.into()).await.unwrap();
            uploads.push(upload.finish());
        }
        let results = futures::future::join_all(uploads).await;
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 2, "{results:?}");
        settles_to(&folder, 2).await;
        let stranger = Tenant::proven("tenants/two".parse().unwrap());
        let name = DatasetName::new(tenant.id(), "x").unwrap();
        let limits = limits();
        let refused = Upload::begin(&store, &Text::tiny(), &limits, &stranger, name, DatasetKind::Sft, "", false).await;
        assert!(matches!(refused, Err(Error::PermissionDenied)));
    }

    #[tokio::test]
    async fn damage_is_an_error_and_the_same_content_repairs_it() {
        let (folder, store, tenant) = store().await;
        let text = format!("{GOOD}\n").repeat(3);
        let upload = async |id: &str, request_id: &str, text: &str| {
            let mut upload = begin(&store, &tenant, id, request_id, false).await?;
            upload.write(text.into()).await?;
            upload.finish().await.map(|(row, _)| row)
        };
        let row = upload("d", "r", &text).await.unwrap();
        let path = folder.path().join("blobs").join(&row.blob);
        let read = async || read_back(&store, &row).await;
        // Truncated at a record's end, one byte changed, gone.
        type Damage<'a> = Box<dyn Fn() + 'a>;
        let damages: [(&str, Damage<'_>); 3] = [
            ("truncated", Box::new(|| std::fs::write(&path, &text[..text.len() / 3]).unwrap())),
            ("changed", Box::new(|| std::fs::write(&path, text.replacen("\"p\"", "\"q\"", 1)).unwrap())),
            ("gone", Box::new(|| std::fs::remove_file(&path).unwrap())),
        ];
        for (what, damage) in damages {
            for request_id in ["", "r"] {
                assert_eq!(read().await.unwrap().len(), 3);
                damage();
                let error = read().await.unwrap_err();
                assert!(matches!(&error, Error::Precondition { reason: "DATASET_DAMAGED", .. }), "{what}: {error:?}");
                let other = upload("d", "", &format!("{GOOD}\n")).await.unwrap_err();
                assert!(other.to_string().contains("damaged"), "{what}: {other}");
                assert_eq!(upload("d", request_id, &text).await.unwrap(), row, "{what}");
                assert_eq!(read().await.unwrap().len(), 3, "{what}");
            }
        }
        settles_to(&folder, 1).await;
    }

    #[tokio::test]
    async fn retries_at_once_make_one_dataset() {
        let (folder, store, tenant) = store().await;
        let one = async || {
            let mut upload = begin(&store, &tenant, "d", "r", false).await?;
            upload.write(GOOD.into()).await?;
            upload.finish().await.map(|(row, _)| row)
        };
        let (a, b, c) = tokio::join!(one(), one(), one());
        let row = a.unwrap();
        assert_eq!((b.unwrap(), c.unwrap()), (row.clone(), row));
        settles_to(&folder, 1).await;
    }
}
