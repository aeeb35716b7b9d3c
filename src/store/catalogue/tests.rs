use std::time::Duration;

use super::*;
use crate::ids::TenantId;
use crate::store::Options;

async fn open(busy_timeout: Duration) -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_with(dir.path(), Options { busy_timeout, ..Options::default() }).await.unwrap();
    (dir, store)
}

fn tenant(id: &str) -> TenantId {
    TenantId::new(id).unwrap()
}

#[tokio::test]
async fn commits_are_synced_and_readers_do_not_write() {
    let (_dir, store) = open(Duration::from_secs(1)).await;
    let synchronous: i64 = sqlx::query_scalar("PRAGMA synchronous").fetch_one(store.writer()).await.unwrap();
    assert_eq!(synchronous, 2, "FULL");
    for pool in [store.pool(), store.lookups()] {
        let refused = sqlx::query("DELETE FROM tenants").execute(pool).await.unwrap_err();
        assert!(refused.to_string().contains("readonly"), "{refused}");
    }
}

#[tokio::test]
async fn keys_are_found_while_readers_and_the_writer_are_all_busy() {
    let (_dir, store) = open(Duration::from_secs(10)).await;
    store.create_tenant(&tenant("a"), "", 1, "").await.unwrap();
    let (key, _) = store.create_key(&tenant("a"), "", "").await.unwrap();
    let mut readers = Vec::new();
    for _ in 0..READERS {
        readers.push(store.pool().acquire().await.unwrap());
    }
    let _writing = store.write().await.unwrap();
    let found = tokio::time::timeout(Duration::from_secs(5), async {
        (store.find_key(&key.id).await.unwrap(), store.get_tenant(&tenant("a")).await.unwrap())
    });
    let (found, row) = found.await.expect("look-ups do not wait for readers");
    assert_eq!((found, row.id), (Some(key), tenant("a")));
}

#[tokio::test]
async fn a_locked_catalogue_is_unavailable_and_nothing_is_lost() {
    let (dir, store) = open(Duration::from_millis(50)).await;
    store.create_tenant(&tenant("a"), "", 1, "").await.unwrap();
    store.add_usage(&tenant("a"), crate::store::UsageDelta { requests: 1, ..Default::default() });
    // Another process that holds the lock for longer than the busy timeout.
    let other = SqliteConnectOptions::new().filename(dir.path().join(FILE)).busy_timeout(Duration::from_secs(5));
    let mut other = SqliteConnection::connect_with(&other).await.unwrap();
    sqlx::query("BEGIN IMMEDIATE").execute(&mut other).await.unwrap();
    for outcome in [store.create_tenant(&tenant("b"), "", 1, "").await.map(drop), store.flush_usage().await] {
        assert!(matches!(&outcome, Err(Error::Unavailable { retry_after: Some(_), .. })), "{outcome:?}");
    }
    assert_eq!(store.get_tenant(&tenant("a")).await.unwrap().id, tenant("a"), "reads go on");
    sqlx::query("ROLLBACK").execute(&mut other).await.unwrap();
    store.create_tenant(&tenant("b"), "", 1, "").await.unwrap();
    store.flush_usage().await.unwrap();
    assert_eq!(store.get_usage(&tenant("a")).await.unwrap().requests, 1, "counted once");
}

#[tokio::test]
async fn a_row_without_its_owner_is_not_found() {
    let (_dir, store) = open(Duration::from_secs(1)).await;
    let insert = sqlx::query("INSERT INTO version_numbers VALUES ('nobody', 'a', 1)");
    let error = Error::from(insert.execute(store.writer()).await.unwrap_err());
    assert!(matches!(error, Error::NotFound { .. }), "{error:?}");
}

#[tokio::test]
async fn a_full_disk_is_said_and_leaves_the_catalogue_as_it_was() {
    let (_dir, store) = open(Duration::from_secs(1)).await;
    store.create_tenant(&tenant("a"), "", 1, "").await.unwrap();
    let pages: i64 = sqlx::query_scalar("PRAGMA page_count").fetch_one(store.writer()).await.unwrap();
    let limit = |pages: i64| sqlx::AssertSqlSafe(format!("PRAGMA max_page_count = {pages}"));
    sqlx::query(limit(pages)).execute(store.writer()).await.unwrap();
    let long = vec!["x".repeat(200_000)];
    let full = store.set_policy(&tenant("a"), &long, None).await;
    assert!(matches!(&full, Err(Error::DiskFull { path }) if path.contains(FILE)), "{full:?}");
    assert!(store.get_policy(&tenant("a")).await.unwrap().phrases.is_empty());
    sqlx::query(limit(1 << 20)).execute(store.writer()).await.unwrap();
    store.set_policy(&tenant("a"), &long, None).await.unwrap();
    assert_eq!(store.get_policy(&tenant("a")).await.unwrap().phrases, long);
}
