//! The catalogue's promises, each on a store in a temporary folder.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use super::*;
use crate::config::Limits;
use crate::ids::{AdapterName, AdapterRef, Digest, JobName, KeyName, TenantId, VersionName};
use crate::request::{AdapterKind, ParityReport, Publish};

async fn open() -> (TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).await.unwrap();
    (dir, store)
}

async fn tenant(store: &Store, id: &str) -> TenantId {
    let id = TenantId::new(id).unwrap();
    store.create_tenant(&id, "", 1, "").await.unwrap();
    id
}

fn adapter(tenant: &TenantId, id: &str) -> AdapterName {
    AdapterName::new(tenant, id).unwrap()
}

/// A version of some content that belongs to the tenant.
fn new_version(adapter: &AdapterName, content: &str) -> NewVersionRow {
    let digest = Digest::of(content.as_bytes());
    let draft = VersionRow {
        name: VersionName { adapter: adapter.clone(), version: 0 },
        digest,
        base_digest: Digest::of(b"base"),
        template_digest: Digest::of(b"template"),
        size_bytes: 10,
        kind: AdapterKind::Dora,
        rank: 4,
        virtual_tokens: 3,
        targets: vec!["q_proj".into()],
        parity: ParityReport {
            tokens: 256,
            mean_abs_difference: 0.001,
            mean_abs_effect: 0.5,
            threshold: 0.05,
            no_effect: false,
        },
        job: None,
        metrics: BTreeMap::from([("train_loss".into(), 1.25)]),
        create_time: SystemTime::UNIX_EPOCH,
        uid: random_id(),
        memory_bytes: 20,
        blob: format!("{}/adapters/{}", adapter.tenant.as_str(), digest.hex()),
        held_reason: None,
        note: None,
        live: false,
    };
    NewVersionRow { draft, publish: Publish::Auto, request_id: String::new(), validate_only: false }
}

/// Puts the files, then the row, as a publish does.
async fn add(store: &Store, new: NewVersionRow) -> Result<VersionRow> {
    store.blobs().put(&format!("{}/file", new.draft.blob), b"content".to_vec()).await?;
    store.insert_version(new, &Limits::default()).await
}

async fn add_job(store: &Store, tenant: &TenantId, state: &str, from_adapter: Option<&str>) {
    sqlx::query(
        "INSERT INTO jobs (tenant, job, adapter, from_adapter, from_version, dataset, state, spec, create_time)
         VALUES (?, ?, 'target', ?, 1, 'data', ?, '{}', 0)",
    )
    .bind(tenant.as_str())
    .bind(random_id())
    .bind(from_adapter)
    .bind(state)
    .execute(store.writer())
    .await
    .unwrap();
}

fn page(size: u32, token: &str) -> Page {
    Page { size, token: token.into() }
}

#[tokio::test]
async fn pages_give_everything_once_in_order() {
    let (_dir, store) = open().await;
    for id in ["c", "a", "e", "b", "d"] {
        tenant(&store, id).await;
    }
    let (mut ids, mut token) = (Vec::new(), String::new());
    loop {
        let listed = store.list_tenants(&page(2, &token)).await.unwrap();
        ids.extend(listed.items.into_iter().map(|t| t.id.as_str().to_owned()));
        token = listed.next;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(ids, ["a", "b", "c", "d", "e"]);
    assert_eq!(store.list_tenants(&page(5, "")).await.unwrap().next, "", "a full last page has no next one");

    let name = adapter(&TenantId::new("a").unwrap(), "x");
    for content in ["1", "2", "3"] {
        add(&store, new_version(&name, content)).await.unwrap();
    }
    let first = store.list_versions(&name, &page(2, "")).await.unwrap();
    let rest = store.list_versions(&name, &page(2, &first.next)).await.unwrap();
    let numbers: Vec<_> = first.items.iter().chain(&rest.items).map(|v| v.name.version).collect();
    assert_eq!((numbers, rest.next.as_str()), (vec![3, 2, 1], ""));
    assert!(store.list_versions(&name, &page(2, "x")).await.is_err());
}

#[test]
fn page_sizes_have_a_default_and_a_cap() {
    assert_eq!([0, 1, 999, 5000].map(|size| page(size, "").limit()), [50, 1, 999, 1000]);
}

#[tokio::test]
async fn a_version_reads_back_as_it_was_inserted() {
    let (_dir, store) = open().await;
    let name = adapter(&tenant(&store, "a").await, "x");
    let mut new = new_version(&name, "1");
    new.draft.job = Some(JobName::new(&name.tenant, "7").unwrap());
    let row = add(&store, new.clone()).await.unwrap();
    let want = VersionRow {
        name: VersionName { adapter: name, version: 1 },
        create_time: row.create_time,
        live: true,
        ..new.draft
    };
    assert_eq!(row, want);
    assert!(row.create_time > SystemTime::UNIX_EPOCH);
    assert_eq!(store.get_version(&row.name).await.unwrap(), want);
}

#[tokio::test]
async fn publishing_moves_the_live_name_as_asked() {
    let (_dir, store) = open().await;
    let name = adapter(&tenant(&store, "a").await, "x");
    let live = AdapterRef::Live(name.clone());
    assert!(matches!(store.resolve(&live).await, Err(Error::NotFound { .. })));
    for (publish, want) in [
        (Publish::VersionOnly, None),
        (Publish::Auto, Some(2)),
        (Publish::Auto, Some(2)),
        (Publish::Live, Some(4)),
        (Publish::VersionOnly, Some(4)),
    ] {
        add(&store, NewVersionRow { publish, ..new_version(&name, "1") }).await.unwrap();
        let adapter = store.get_adapter(&name).await.unwrap();
        assert_eq!(adapter.live.map(|v| v.version), want);
        match want {
            Some(version) => assert_eq!(store.resolve(&live).await.unwrap().name.version, version),
            None => {
                let refused = store.resolve(&live).await.unwrap_err();
                assert!(matches!(refused, Error::Precondition { reason: "NO_LIVE_VERSION", .. }));
            }
        }
    }
}

#[tokio::test]
async fn an_old_etag_is_a_conflict() {
    let (_dir, store) = open().await;
    let name = adapter(&tenant(&store, "a").await, "x");
    let one = add(&store, new_version(&name, "1")).await.unwrap().name;
    let two = add(&store, new_version(&name, "2")).await.unwrap().name;
    let before = store.get_adapter(&name).await.unwrap();
    let after = store.set_live(&two, &before.etag).await.unwrap();
    assert_eq!(after.live.as_ref(), Some(&two));
    assert_ne!(after.etag, before.etag);

    assert!(matches!(store.set_live(&one, &before.etag).await, Err(Error::Conflict { .. })));
    assert!(matches!(store.delete_adapter(&name, &before.etag).await, Err(Error::Conflict { .. })));
    assert_eq!(store.get_adapter(&name).await.unwrap(), after);
    assert_eq!(store.set_live(&one, "").await.unwrap().live, Some(one), "no etag is no check");

    let missing = VersionName { adapter: name.clone(), version: 9 };
    assert!(matches!(store.set_live(&missing, "").await, Err(Error::NotFound { .. })));
}

#[tokio::test]
async fn policies_are_replaced_whole_and_by_etag() {
    let (_dir, store) = open().await;
    let id = tenant(&store, "a").await;
    let empty = store.get_policy(&id).await.unwrap();
    assert!(empty.phrases.is_empty());
    let set = store.set_policy(&id, &["one".into()], Some(&empty.etag)).await.unwrap();
    assert_eq!(store.get_policy(&id).await.unwrap(), set);
    assert!(matches!(store.set_policy(&id, &[], Some(&empty.etag)).await, Err(Error::Conflict { .. })));
    assert_eq!(store.get_policy(&id).await.unwrap(), set);
    store.set_policy(&id, &[], None).await.unwrap();
    let other = TenantId::new("b").unwrap();
    assert!(matches!(store.set_policy(&other, &[], None).await, Err(Error::NotFound { .. })));
}

#[tokio::test]
async fn a_request_id_gives_the_first_result_again() {
    let (_dir, store) = open().await;
    let id = TenantId::new("a").unwrap();
    let first = store.create_tenant(&id, "first", 1, "r1").await.unwrap();
    assert_eq!(store.create_tenant(&id, "first", 1, "r1").await.unwrap(), first);
    let reused = |outcome: Result<()>| {
        assert!(matches!(&outcome, Err(Error::Invalid { reason: "REQUEST_ID_REUSED", .. })), "{outcome:?}");
    };
    reused(store.create_tenant(&id, "again", 1, "r1").await.map(drop));
    reused(store.create_tenant(&id, "first", 2, "r1").await.map(drop));
    reused(store.create_tenant(&TenantId::new("c").unwrap(), "first", 1, "r1").await.map(drop));
    store.create_key(&id, "key", "k1").await.unwrap();
    assert!(matches!(store.create_key(&id, "key", "k1").await, Err(Error::AlreadyExists { .. })));
    reused(store.create_key(&id, "other", "k1").await.map(drop));
    assert!(matches!(store.create_tenant(&id, "other", 1, "r2").await, Err(Error::AlreadyExists { .. })));
    assert!(matches!(store.create_tenant(&id, "none", 1, "").await, Err(Error::AlreadyExists { .. })));

    let name = adapter(&id, "x");
    let with_id = |content: &str| NewVersionRow { request_id: "r1".into(), ..new_version(&name, content) };
    let one = add(&store, with_id("1")).await.unwrap();
    assert_eq!(add(&store, with_id("1")).await.unwrap(), one);
    reused(add(&store, with_id("2")).await.map(drop));
    reused(add(&store, NewVersionRow { publish: Publish::Live, ..with_id("1") }).await.map(drop));
    reused(
        add(&store, NewVersionRow { request_id: "r1".into(), ..new_version(&adapter(&id, "y"), "1") }).await.map(drop),
    );
    let digest = Digest::of(b"1");
    let before = async |name: &AdapterName| store.published_before(name, "r1", digest, Publish::Auto).await;
    assert_eq!(before(&name).await.unwrap(), Some(one));
    let other = tenant(&store, "b").await;
    assert_eq!(before(&adapter(&other, "x")).await.unwrap(), None, "a tenant's ids are its own");

    store.delete_adapter(&name, "").await.unwrap();
    assert!(matches!(before(&name).await, Err(Error::NotFound { .. })));
}

#[tokio::test]
async fn a_version_name_never_means_two_contents() {
    let (_dir, store) = open().await;
    let name = adapter(&tenant(&store, "a").await, "x");
    add(&store, new_version(&name, "1")).await.unwrap();
    let before = store.get_adapter(&name).await.unwrap();
    store.delete_adapter(&name, "").await.unwrap();
    let again = add(&store, new_version(&name, "2")).await.unwrap();
    assert_eq!(again.name.version, 2);
    assert_ne!(store.get_adapter(&name).await.unwrap().etag, before.etag);
    assert_eq!(add(&store, new_version(&adapter(&name.tenant, "y"), "3")).await.unwrap().name.version, 1);
}

#[tokio::test]
async fn validating_leaves_no_row() {
    let (_dir, store) = open().await;
    let name = adapter(&tenant(&store, "a").await, "x");
    let new = NewVersionRow { validate_only: true, request_id: "r".into(), ..new_version(&name, "1") };
    let row = store.insert_version(new, &Limits::default()).await.unwrap();
    assert_eq!(row.name.version, 1, "the name it would have");
    assert!(matches!(store.get_adapter(&name).await, Err(Error::NotFound { .. })));
    let before = store.published_before(&name, "r", Digest::of(b"1"), Publish::Auto).await;
    assert_eq!(before.unwrap(), None);
}

#[tokio::test]
async fn the_catalogue_keeps_its_limits() {
    let (_dir, store) = open().await;
    let id = tenant(&store, "a").await;
    let mut limits = Limits::default();
    limits.set("max_adapters_per_tenant", 1).unwrap();
    limits.set("max_versions_per_adapter", 2).unwrap();
    for content in ["1", "2"] {
        store.insert_version(new_version(&adapter(&id, "x"), content), &limits).await.unwrap();
    }
    let limit = |outcome: Result<VersionRow>| match outcome {
        Err(Error::Exhausted { limit, .. }) => limit,
        other => panic!("{other:?}"),
    };
    let third = store.insert_version(new_version(&adapter(&id, "x"), "3"), &limits).await;
    assert_eq!(limit(third), "max_versions_per_adapter");
    let second = store.insert_version(new_version(&adapter(&id, "y"), "1"), &limits).await;
    assert_eq!(limit(second), "max_adapters_per_tenant");
    assert!(matches!(store.get_adapter(&adapter(&id, "y")).await, Err(Error::NotFound { .. })));
    store.insert_version(new_version(&adapter(&tenant(&store, "b").await, "y"), "1"), &limits).await.unwrap();
}

#[tokio::test]
async fn an_adapter_in_use_by_a_job_is_not_deleted() {
    let (_dir, store) = open().await;
    let id = tenant(&store, "a").await;
    for name in ["start", "target", "free"] {
        add(&store, new_version(&adapter(&id, name), name)).await.unwrap();
    }
    add_job(&store, &id, "SUCCEEDED", Some("free")).await;
    add_job(&store, &id, "INTERRUPTED", Some("start")).await;
    for used in ["start", "target"] {
        let refused = store.delete_adapter(&adapter(&id, used), "").await.unwrap_err();
        assert!(matches!(refused, Error::Precondition { reason: "ADAPTER_IN_USE", .. }), "{used}");
    }
    store.delete_adapter(&adapter(&id, "free"), "").await.unwrap();
}

#[tokio::test]
async fn a_blob_goes_with_its_last_owner() {
    let (_dir, store) = open().await;
    let id = tenant(&store, "a").await;
    let row = add(&store, new_version(&adapter(&id, "x"), "same")).await.unwrap();
    add(&store, new_version(&adapter(&id, "y"), "same")).await.unwrap();
    let file = format!("{}/file", row.blob);
    let (uids, blobs) = store.delete_adapter(&adapter(&id, "x"), "").await.unwrap();
    assert_eq!(uids, [row.uid]);
    store.collect_blobs(&blobs).await;
    assert_eq!(store.blobs().get(&file).await.unwrap().unwrap(), b"content");

    let custody = store.custody(&id, &row.blob).await;
    store.delete_adapter(&adapter(&id, "y"), "").await.unwrap();
    store.collect_blobs(&blobs).await;
    assert_eq!(store.blobs().get(&file).await.unwrap().unwrap(), b"content", "somebody is about to own it");
    drop(custody);
    store.collect_blobs(&blobs).await;
    assert!(store.blobs().list("").await.unwrap().is_empty());
}

#[tokio::test]
async fn deleting_a_tenant_takes_its_own_and_nothing_else() {
    let (_dir, store) = open().await;
    let mut tables: Vec<String> =
        sqlx::query_scalar("SELECT name FROM pragma_table_list WHERE schema = 'main' AND name NOT LIKE '%sql%'")
            .fetch_all(store.pool())
            .await
            .unwrap();
    // The ids of those that are gone stay, so that they are never given again.
    tables.retain(|table| table != "deleted_tenants");
    tables.sort();
    for id in ["a", "a-b"] {
        let id = tenant(&store, id).await;
        let new = NewVersionRow { request_id: "r".into(), ..new_version(&adapter(&id, "x"), "same") };
        add(&store, new).await.unwrap();
        store.create_key(&id, "", "").await.unwrap();
        add_job(&store, &id, "QUEUED", Some("x")).await;
        fill(&store, &id).await;
    }
    let (a, b) = (TenantId::new("a").unwrap(), TenantId::new("a-b").unwrap());
    let (of_a, of_b) = (count_rows(&store, &tables, &a).await, count_rows(&store, &tables, &b).await);
    assert!(of_a.iter().all(|(_, rows)| *rows > 0), "{of_a:?}");

    store.delete_tenant(&a).await.unwrap();
    assert!(count_rows(&store, &tables, &a).await.iter().all(|(_, rows)| *rows == 0));
    assert_eq!(count_rows(&store, &tables, &b).await, of_b);
    let files = store.blobs().list("").await.unwrap();
    assert!(files.len() == 1 && files[0].starts_with("a-b/"), "{files:?}");
    assert!(matches!(store.delete_tenant(&a).await, Err(Error::NotFound { .. })));
    let again = store.create_tenant(&a, "", 1, "").await.unwrap_err();
    assert!(matches!(again, Error::AlreadyExists { .. }) && again.to_string().contains("never given again"), "{again}");

    add_job(&store, &b, "RUNNING", None).await;
    let refused = store.delete_tenant(&b).await.unwrap_err();
    assert!(matches!(refused, Error::Precondition { reason: "TENANT_IN_USE", .. }));
    assert_eq!(store.blobs().list("").await.unwrap(), files);
}

/// A row in the tables that the other helpers leave empty.
async fn fill(store: &Store, tenant: &TenantId) {
    let job: String = sqlx::query_scalar("SELECT job FROM jobs WHERE tenant = ?")
        .bind(tenant.as_str())
        .fetch_one(store.pool())
        .await
        .unwrap();
    sqlx::query("INSERT INTO job_events (tenant, job, sequence, time, event) VALUES (?, ?, 1, 0, '{}')")
        .bind(tenant.as_str())
        .bind(job)
        .execute(store.writer())
        .await
        .unwrap();
    sqlx::query("INSERT INTO datasets VALUES (?, 'd', 'SFT', 1, 1, '', ?, 0, NULL)")
        .bind(tenant.as_str())
        .bind(format!("{}/datasets/d", tenant.as_str()))
        .execute(store.writer())
        .await
        .unwrap();
}

/// Rows of a tenant in each table.
async fn count_rows(store: &Store, tables: &[String], tenant: &TenantId) -> Vec<(String, i64)> {
    let mut counts = Vec::new();
    for table in tables {
        let sql = sqlx::AssertSqlSafe(format!("SELECT COUNT(*) FROM {table} WHERE tenant = ?"));
        let rows = sqlx::query_scalar(sql).bind(tenant.as_str()).fetch_one(store.pool()).await.unwrap();
        counts.push((table.clone(), rows));
    }
    counts
}

#[tokio::test]
async fn opening_collects_what_no_row_owns() {
    let (dir, store) = open().await;
    let id = tenant(&store, "a").await;
    let row = add(&store, new_version(&adapter(&id, "x"), "1")).await.unwrap();
    store.blobs().put("a/adapters/orphan/file", b"left by a kill".to_vec()).await.unwrap();
    let mut upload = store.blobs().upload(&format!("{}/half", row.blob)).await.unwrap();
    upload.write(b"half".to_vec()).await.unwrap();
    #[expect(clippy::mem_forget, reason = "a process that is killed runs no destructors")]
    std::mem::forget(upload);
    drop(store);

    let store = Store::open(dir.path()).await.unwrap();
    assert_eq!(files(dir.path()), [format!("{}/file", row.blob)]);
    assert_eq!(store.get_version(&row.name).await.unwrap(), row);
}

/// Every file below `blobs`, the half-written ones too.
fn files(data_dir: &Path) -> Vec<String> {
    let root = data_dir.join("blobs");
    let (mut folders, mut files) = (vec![root.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.push(path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    files
}

#[tokio::test]
async fn an_upload_is_whole_or_not_there() {
    let (dir, store) = open().await;
    let mut upload = store.blobs().upload("a/datasets/1").await.unwrap();
    upload.write(b"one ".to_vec()).await.unwrap();
    assert!(store.blobs().list("a").await.unwrap().is_empty());
    upload.write(b"two".to_vec()).await.unwrap();
    upload.finish().await.unwrap();
    assert_eq!(store.blobs().get("a/datasets/1").await.unwrap().unwrap(), b"one two");

    let mut dropped = store.blobs().upload("a/datasets/2").await.unwrap();
    dropped.write(b"one".to_vec()).await.unwrap();
    drop(dropped);
    store.blobs().delete("a/datasets/1").await.unwrap();
    store.blobs().delete("a/datasets/1").await.unwrap();
    // The dropped upload removes its file off this thread.
    while !files(dir.path()).is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(store.blobs().get("a/datasets/1").await.unwrap(), None);
    assert!(store.blobs().put("a/../../b", Vec::new()).await.is_err());
}

#[tokio::test]
async fn one_process_a_folder() {
    let (dir, store) = open().await;
    let refused = lock_folder(dir.path(), Duration::ZERO).await.unwrap_err();
    assert!(matches!(refused, Error::Precondition { reason: "DATA_DIR_IN_USE", .. }));
    drop(store);
    lock_folder(dir.path(), FOLDER_WAIT).await.unwrap();
}

#[tokio::test]
async fn a_tenants_weight_is_changed_and_comes_with_its_keys() {
    let (_dir, store) = open().await;
    let id = tenant(&store, "a").await;
    let (key, _) = store.create_key(&id, "", "").await.unwrap();
    let first = store.get_tenant(&id).await.unwrap();
    let heavier = TenantChange { weight: Some(3), ..TenantChange::default() };
    let second = store.update_tenant(&id, &heavier, &first.etag).await.unwrap();
    assert_eq!(second, TenantRow { weight: 3, etag: second.etag.clone(), ..first.clone() });
    assert_ne!(second.etag, first.etag);
    let stale = store.update_tenant(&id, &heavier, &first.etag).await;
    assert!(matches!(stale, Err(Error::Conflict { .. })));
    let named = TenantChange { display_name: Some("A".into()), weight: None };
    assert_eq!(store.update_tenant(&id, &named, "").await.unwrap().weight, 3);
    let key = store.find_key(&key.id).await.unwrap().unwrap();
    assert_eq!(key.owner, KeyOwner::Tenant(id, 3));
    let other = TenantId::new("b").unwrap();
    assert!(matches!(store.update_tenant(&other, &named, "").await, Err(Error::NotFound { .. })));
}

#[tokio::test]
async fn keys_keep_a_hash_and_nothing_more() {
    let (dir, store) = open().await;
    let id = tenant(&store, "a").await;
    assert!(!store.has_operator_key().await.unwrap());
    let (key, secret) = store.create_key(&id, "laptop", "r").await.unwrap();
    let retried = store.create_key(&id, "laptop", "r").await.unwrap_err();
    assert!(matches!(retried, Error::AlreadyExists { name, .. } if name.ends_with(&key.id)));
    assert!(!store.has_operator_key().await.unwrap(), "a tenant's key is no operator's");
    assert!(secret.starts_with(&format!("tnr_{}_", key.id)));
    assert_eq!(key.hash, <[u8; 32]>::from(Sha256::digest(secret.as_bytes())));
    assert_eq!((&key.owner, key.revoked), (&KeyOwner::Tenant(id.clone(), 1), None));
    assert_eq!(store.find_key(&key.id).await.unwrap(), Some(key.clone()));
    assert_eq!(store.find_key("nothing").await.unwrap(), None);

    let operator = NewKey::new();
    store.insert_operator_key(&operator, "").await.unwrap();
    assert!(store.has_operator_key().await.unwrap());
    let operator = operator.secret.split('_').nth(1).unwrap().to_owned();
    assert_eq!(store.list_keys(&id, &Page::default()).await.unwrap().items, std::slice::from_ref(&key));
    let not_its_own = KeyName::new(&id, &operator).unwrap();
    assert!(matches!(store.revoke_key(&not_its_own).await, Err(Error::NotFound { .. })));

    store.revoke_operator_keys().await.unwrap();
    assert!(!store.has_operator_key().await.unwrap());
    assert_eq!(store.find_key(&key.id).await.unwrap().unwrap().revoked, None, "tenants keep theirs");

    let name = KeyName::new(&id, &key.id).unwrap();
    store.revoke_key(&name).await.unwrap();
    let revoked = store.find_key(&key.id).await.unwrap().unwrap().revoked;
    assert!(revoked.is_some());
    store.revoke_key(&name).await.unwrap();
    assert_eq!(store.find_key(&key.id).await.unwrap().unwrap().revoked, revoked);

    drop(store);
    let random = secret.rsplit('_').next().unwrap().as_bytes();
    for file in std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file())
    {
        let bytes = std::fs::read(&file).unwrap();
        assert!(!bytes.windows(random.len()).any(|window| window == random), "{}", file.display());
    }
}

#[tokio::test]
async fn usage_adds_up() {
    let (_dir, store) = open().await;
    let id = tenant(&store, "a").await;
    let used = UsageDelta { requests: 1, prompt_tokens: 10, completion_tokens: 3, training_tokens: 0 };
    let adding = (0..20).map(|n| {
        let (store, id) = (store.clone(), id.clone());
        tokio::spawn(async move {
            store.add_usage(&id, used);
            if n % 4 == 0 {
                store.flush_usage().await.unwrap();
            }
        })
    });
    for added in futures::future::join_all(adding).await {
        added.unwrap();
    }
    let want = UsageRow { requests: 20, prompt_tokens: 200, completion_tokens: 60, training_tokens: 0 };
    assert_eq!(store.get_usage(&id).await.unwrap(), want);
    assert!(matches!(store.get_usage(&TenantId::new("b").unwrap()).await, Err(Error::NotFound { .. })));
}

/// Every way in which the data folder or a file in it can be of no use: the error says which one.
#[tokio::test]
async fn a_folder_that_cannot_be_used_is_named() {
    let dir = TempDir::new().unwrap();
    let refused = async |path: &std::path::Path, named: &std::path::Path| {
        let error = Store::open(path).await.expect_err("refused").to_string();
        assert!(error.contains(&named.display().to_string()), "{named:?} is not in {error}");
    };
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    refused(&file, &file).await;
    refused(&file.join("below"), &file).await;
    for name in ["lock", "tenora.db"] {
        let data = dir.path().join(format!("with-{name}"));
        std::fs::create_dir_all(data.join(name)).unwrap();
        refused(&data, &data.join(name)).await;
    }
    let data = dir.path().join("no-catalogue");
    std::fs::create_dir_all(&data).unwrap();
    std::fs::write(data.join("tenora.db"), "this is no catalogue, but a text that is long enough".repeat(100)).unwrap();
    refused(&data, &data.join("tenora.db")).await;
    let data = dir.path().join("with-blobs");
    std::fs::create_dir_all(&data).unwrap();
    std::fs::write(data.join("blobs"), "x").unwrap();
    refused(&data, &data.join("blobs")).await;
}

#[tokio::test]
async fn counted_usage_outlives_an_orderly_stop_and_goes_with_its_tenant() {
    let (dir, store) = open().await;
    let (kept, gone) = (tenant(&store, "a").await, tenant(&store, "b").await);
    let used = UsageDelta { requests: 1, prompt_tokens: 2, completion_tokens: 3, training_tokens: 4 };
    for id in [&kept, &gone] {
        store.add_usage(id, used);
    }
    store.delete_tenant(&gone).await.unwrap();
    store.flush_usage().await.unwrap();
    assert_eq!(store.get_usage(&kept).await.unwrap(), used);
    drop(store);
    let store = Store::open(dir.path()).await.unwrap();
    assert_eq!(store.get_usage(&kept).await.unwrap(), used);
}

#[tokio::test]
async fn usage_is_written_without_being_asked_for() {
    let (_dir, store) = open().await;
    let id = tenant(&store, "a").await;
    store.add_usage(&id, UsageDelta { requests: 1, ..UsageDelta::default() });
    for _ in 0..200 {
        let requests: i64 = sqlx::query_scalar("SELECT requests FROM tenants WHERE tenant = 'a'")
            .fetch_one(store.pool())
            .await
            .unwrap();
        if requests == 1 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("nothing was written");
}
