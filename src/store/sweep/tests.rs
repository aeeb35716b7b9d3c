use super::*;
use crate::ids::{DatasetName, Digest, TenantId};
use crate::store::{DatasetKind, NewDataset};

/// A store with a tenant `a` that has so many datasets.
async fn folder(datasets: usize) -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    let tenant = TenantId::new("a").unwrap();
    store.create_tenant(&tenant, "", 1, "").await.unwrap();
    for n in 0..datasets {
        let (name, blob) = (DatasetName::new(&tenant, &format!("d{n}")).unwrap(), format!("a/datasets/{n}"));
        store.blobs().put(&blob, b"content".to_vec()).await.unwrap();
        let digest = Digest::of(b"content");
        let kind = DatasetKind::Sft;
        let new = NewDataset { name, kind, records: 1, size_bytes: 7, unpacked_bytes: 7, digest, blob };
        store.insert_dataset(&new, "", u64::MAX).await.unwrap();
    }
    (dir, store)
}

/// Makes rows go as an older catalogue would have it, and leaves the files.
async fn forget(store: &Store, datasets: usize) {
    sqlx::query("DELETE FROM datasets WHERE rowid <= ?").bind(datasets as i64).execute(store.writer()).await.unwrap();
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// Files in `blobs/` and in `trash/`.
fn counts(dir: &Path) -> (usize, usize) {
    (files(&dir.join("blobs")).len(), files(&dir.join(TRASH)).len())
}

async fn refusal(dir: &Path) -> String {
    match Store::open(dir).await {
        Err(Error::Precondition { reason: "UNKNOWN_BLOBS", subject, message }) => format!("{subject}: {message}"),
        other => panic!("{other:?}"),
    }
}

fn adopting() -> Options {
    Options { adopt_orphans: true, ..Options::default() }
}

#[tokio::test]
async fn a_start_without_its_catalogue_touches_nothing_and_says_the_ways_out() {
    let (dir, store) = folder(3).await;
    drop(store);
    for file in ["tenora.db", "tenora.db-wal", "tenora.db-shm"] {
        let _ = std::fs::remove_file(dir.path().join(file));
    }
    let text = refusal(dir.path()).await;
    for part in ["blobs: ", "(a)", "BACKUP.md", "--data-dir", "--adopt-orphans", "trash"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(counts(dir.path()), (3, 0));
    assert!(!dir.path().join(FILE).exists(), "no new catalogue stands in the way of the right one");
    // An empty file, or another folder's, is no better.
    std::fs::write(dir.path().join(FILE), b"").unwrap();
    refusal(dir.path()).await;
    assert_eq!(counts(dir.path()), (3, 0));
}

#[tokio::test]
async fn adopting_moves_them_to_the_trash_where_they_stay_for_a_while() {
    let (dir, store) = folder(3).await;
    drop(store);
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    drop(Store::open_with(dir.path(), adopting()).await.unwrap());
    assert_eq!(counts(dir.path()), (0, 3));
    drop(Store::open(dir.path()).await.unwrap());
    assert_eq!(counts(dir.path()), (0, 3));
    let moment = std::fs::read_dir(dir.path().join(TRASH)).unwrap().next().unwrap().unwrap().path();
    assert_eq!(std::fs::read(moment.join("a/datasets/1")).unwrap(), b"content");
    let old = dir.path().join(TRASH).join("1000000");
    std::fs::rename(&moment, &old).unwrap();
    let _store = Store::open(dir.path()).await.unwrap();
    let gone = async {
        while old.exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), gone).await.expect("its time is over");
}

#[tokio::test]
async fn more_than_a_tenth_stays_until_the_operator_says_so() {
    let (dir, store) = folder(30).await;
    forget(&store, 4).await;
    drop(store);
    drop(Store::open(dir.path()).await.unwrap());
    assert_eq!(counts(dir.path()), (30, 0));
    drop(Store::open_with(dir.path(), adopting()).await.unwrap());
    assert_eq!(counts(dir.path()), (26, 4));
}

#[tokio::test]
async fn a_tenth_at_most_is_moved_without_a_word() {
    let (dir, store) = folder(30).await;
    forget(&store, 3).await;
    std::fs::write(dir.path().join("blobs/a/datasets/8#1"), b"half").unwrap();
    drop(store);
    drop(Store::open(dir.path()).await.unwrap());
    assert_eq!(counts(dir.path()), (27, 3));
}

#[tokio::test]
async fn what_a_deleted_tenant_left_behind_is_swept() {
    let (dir, store) = folder(1).await;
    store.delete_tenant(&TenantId::new("a").unwrap()).await.unwrap();
    store.blobs().put("a/datasets/late", b"content".to_vec()).await.unwrap();
    drop(store);
    drop(Store::open(dir.path()).await.unwrap());
    assert_eq!(counts(dir.path()), (0, 1));
}

#[tokio::test]
async fn a_sweep_that_fails_stops_no_start() {
    let (dir, store) = folder(2).await;
    forget(&store, 1).await;
    // There is no place for the trash.
    std::fs::write(dir.path().join(TRASH), b"a file").unwrap();
    drop(store);
    let store = Store::open(dir.path()).await.unwrap();
    assert_eq!(counts(dir.path()).0, 2);
    let name = DatasetName::new(&TenantId::new("a").unwrap(), "d1").unwrap();
    assert_eq!(store.get_dataset(&name).await.unwrap().blob, "a/datasets/1");
}

/// A kill between the row and the files of a tenant that is deleted leaves them all, and many.
#[tokio::test]
async fn what_is_left_of_a_deleted_tenant_goes_however_much_it_is() {
    let (dir, store) = folder(3).await;
    let b = TenantId::new("b").unwrap();
    store.create_tenant(&b, "", 1, "").await.unwrap();
    store.delete_tenant(&b).await.unwrap();
    for n in 0..5 {
        store.blobs().put(&format!("b/datasets/{n}"), b"left".to_vec()).await.unwrap();
    }
    // Beside it one orphan of a tenant that is there, which is within the tenth.
    forget(&store, 1).await;
    drop(store);
    drop(Store::open(dir.path()).await.unwrap());
    assert_eq!(counts(dir.path()), (2, 6));
}
