//! `docs/BACKUP.md`, done as it says: the shell lines are those of the page.

use std::path::Path;
use std::process::Command;

use sqlx::Connection as _;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use tempfile::TempDir;
use tenora::api::proto::*;
use tenora::model::Model;
use tonic::Code;

use super::common::{TestServer, answer, generate};

/// The page's shell block under a heading.
fn lines_of(heading: &str) -> String {
    let page = std::fs::read_to_string("docs/BACKUP.md").unwrap();
    let (_, section) = page.split_once(&format!("## {heading}\n")).unwrap_or_else(|| panic!("no heading {heading:?}"));
    let section = section.split("\n## ").next().unwrap();
    section.split("```sh\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a shell block").to_owned()
}

/// Does what a block says. SQLite's program may be missing here, so its line is done by the library, with the same SQL.
async fn follow(heading: &str, places: &[(&str, &Path)]) {
    for line in lines_of(heading).lines() {
        let mut line = line.to_owned();
        for (name, path) in places {
            line = line.replace(&format!("${name}"), path.to_str().unwrap());
        }
        if let Some(rest) = line.strip_prefix("sqlite3 ") {
            let (file, sql) = rest.trim_matches('"').split_once("\" \"").unwrap();
            let options = SqliteConnectOptions::new().filename(file);
            let mut db = SqliteConnection::connect_with(&options).await.unwrap();
            sqlx::query(sqlx::AssertSqlSafe(sql.to_owned())).execute(&mut db).await.unwrap();
            db.close().await.unwrap();
        } else {
            let done = Command::new("sh").args(["-ec", &line]).status().unwrap();
            assert!(done.success(), "{line}");
        }
    }
}

async fn start(data: TempDir, operator: &str) -> TestServer {
    let mut server = TestServer::start_in(data, std::future::ready(Ok(())), Model::tiny(1), |_| {}).await;
    server.operator = operator.to_owned();
    server.ready().await;
    server
}

/// Stops a server and keeps its folder.
async fn stop(mut server: TestServer) -> TempDir {
    let data = std::mem::replace(&mut server.data, TempDir::new().unwrap());
    server.stopped().await;
    assert!(!data.path().join("tenora.db-wal").exists(), "an orderly stop closes the catalogue");
    data
}

async fn ids(server: &TestServer, key: &str) -> Vec<u32> {
    let request = generate("tenants/a/adapters/tone", "hello", 6);
    answer(&mut server.generation(key).await, request).await.unwrap().ids
}

async fn report(server: &TestServer, key: &str, dataset: &str) -> Result<DatasetReport, tonic::Status> {
    let request = InspectDatasetRequest { name: format!("tenants/a/datasets/{dataset}"), ..Default::default() };
    server.datasets(key).await.inspect_dataset(request).await.map(tonic::Response::into_inner)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_running_server_restores() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    server.upload(&key, "a", "kept").await.unwrap();
    let package = server.package(3);
    server.import(&key, "a", "tone", &package).await.unwrap();
    let before = ids(&server, &key).await;
    let (backup, restored) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let data = server.data.path().to_owned();
    follow("Back up, while the server runs", &[("DATA", &data), ("BACKUP", backup.path())]).await;
    server.upload(&key, "a", "next").await.unwrap();
    follow("Bring a backup up to date", &[("DATA", &data), ("BACKUP", backup.path())]).await;
    server.upload(&key, "a", "later").await.unwrap();
    server.stopped().await;

    let places = [("BACKUP", backup.path()), ("RESTORED", restored.path())];
    follow("Restore a whole backup", &places).await;
    let server = start(restored, "").await;
    assert_eq!(ids(&server, &key).await, before);
    for id in ["kept", "next"] {
        assert_eq!(report(&server, &key, id).await.unwrap().dataset.unwrap().records, 4);
    }
    assert_eq!(report(&server, &key, "later").await.unwrap_err().code(), Code::NotFound);
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_catalogue_over_newer_blobs_loses_none_of_them() {
    let server = TestServer::start().await;
    let (operator, key) = (server.operator.clone(), server.tenant("a").await);
    server.upload(&key, "a", "kept").await.unwrap();
    let data = stop(server).await;
    let backup = TempDir::new().unwrap();
    follow("Back up, with the server stopped", &[("DATA", data.path()), ("BACKUP", backup.path())]).await;

    let server = start(data, &operator).await;
    for id in ["later-1", "later-2"] {
        server.upload(&key, "a", id).await.unwrap();
    }
    let newer = TempDir::new().unwrap();
    let running = server.data.path().to_owned();
    follow("Back up, while the server runs", &[("DATA", &running), ("BACKUP", newer.path())]).await;
    let data = stop(server).await;
    let older = [("DATA", data.path()), ("BACKUP", backup.path())];
    follow("Restore an older catalogue over newer blobs", &older).await;

    let server = start(data, &operator).await;
    assert_eq!(report(&server, &key, "kept").await.unwrap().dataset.unwrap().records, 4);
    assert_eq!(server.blobs().len(), 3, "two of three are more than a tenth: none is touched");
    let data = stop(server).await;
    // The newer catalogue is found after all.
    follow("Restore an older catalogue over newer blobs", &[("DATA", data.path()), ("BACKUP", newer.path())]).await;
    let server = start(data, &operator).await;
    for id in ["kept", "later-1", "later-2"] {
        assert_eq!(report(&server, &key, id).await.unwrap().dataset.unwrap().records, 4, "{id}");
    }
    server.stopped().await;
}
