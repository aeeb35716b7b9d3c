//! What all tables share: times, JSON columns, pages and random tokens.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rand::RngCore;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};

use crate::error::{Error, Result};
use crate::ids::TenantId;

const DEFAULT_PAGE: u32 = 50;
const MAX_PAGE: u32 = 1000;

/// The states of jobs that have ended, as SQL: those of [`JobState::is_final`](crate::request::JobState::is_final).
macro_rules! ended {
    () => {
        "('SUCCEEDED', 'FAILED', 'CANCELLED')"
    };
}

/// The states of jobs that the worker holds, as SQL.
macro_rules! held_by_worker {
    () => {
        "('RUNNING', 'PAUSING', 'CANCELLING')"
    };
}

pub(super) use {ended, held_by_worker};

/// Which part of a list: at most `size` items (0: the default of 50; at most 1000) after the `token` of the page before (empty: the first).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    /// Items at most; 0 leaves it to the server.
    pub size: u32,
    /// Where the page begins; empty is the beginning.
    pub token: String,
}

impl Page {
    /// Items of this page.
    pub(super) fn limit(&self) -> usize {
        (if self.size == 0 { DEFAULT_PAGE } else { self.size.min(MAX_PAGE) }) as usize
    }

    /// Rows to ask the database for: one more than the page has, to know whether there is another page.
    pub(super) fn rows(&self) -> i64 {
        self.limit() as i64 + 1
    }

    /// The token where it is a number; `first` on the first page.
    pub(super) fn number(&self, first: i64) -> Result<i64> {
        if self.token.is_empty() {
            return Ok(first);
        }
        self.token.parse().map_err(|_| bad_token())
    }
}

/// What a token that no page has given is told.
pub(super) fn bad_token() -> Error {
    Error::invalid("page_token", "must be the next_page_token of the page before")
}

/// A page of a list; `next` is empty on the last one.
#[derive(Debug, Clone, PartialEq)]
pub struct Listed<T> {
    /// The page.
    pub items: Vec<T>,
    /// The token of the next page; empty where this is the last.
    pub next: String,
}

impl<T> Listed<T> {
    /// Reads a page's rows and drops the surplus one; `token` is the sort key of a row. One that cannot be read is left out and logged:
    /// what is damaged, or of a later build, must not hide the rest.
    pub(super) fn read(
        mut rows: Vec<SqliteRow>,
        page: &Page,
        read: impl Fn(&SqliteRow) -> Result<T>,
        token: impl Fn(&SqliteRow) -> Result<String>,
    ) -> Result<Self> {
        let more = rows.len() > page.limit();
        rows.truncate(page.limit());
        let next = match rows.last() {
            Some(last) if more => token(last)?,
            _ => String::new(),
        };
        Ok(Self { items: rows.iter().filter_map(|row| readable(read(row))).collect(), next })
    }
}

/// A row where it can be read; else it is logged.
pub(super) fn readable<T>(row: Result<T>) -> Option<T> {
    row.inspect_err(|error| tracing::error!(%error, "a row of the catalogue cannot be read and is left out")).ok()
}

/// Now, in unix milliseconds.
pub(super) fn now() -> i64 {
    to_millis(SystemTime::now())
}

/// Unix milliseconds; 0 before 1970.
pub(super) fn to_millis(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| int(d.as_millis() as u64))
}

pub(super) fn from_millis(millis: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(millis.max(0) as u64)
}

/// SQLite's integers are signed.
pub(super) fn int(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// A count of a row; SQLite has no unsigned ones.
pub(super) fn count(row: &SqliteRow, column: &str) -> Result<u64> {
    Ok(row.try_get::<i64, _>(column)?.max(0).unsigned_abs())
}

pub(super) fn to_json<T: Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::internal(format!("catalogue: a value has no JSON: {e}")))
}

pub(super) fn from_json<T: DeserializeOwned>(text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|e| Error::internal(format!("catalogue: a column is damaged: {e}")))
}

/// 128 random bits as 32 hex digits: for etags and ids that must never come twice.
pub fn random_id() -> String {
    format!("{:032x}", u128::from_le_bytes(random()))
}

pub(super) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::rng().fill_bytes(&mut bytes);
    bytes
}

/// NOT_FOUND where there is no such tenant.
pub(super) async fn require_tenant(db: &mut SqliteConnection, tenant: &TenantId) -> Result<()> {
    let found = sqlx::query("SELECT 1 FROM tenants WHERE tenant = ?").bind(tenant.as_str()).fetch_optional(db).await?;
    found.map(|_| ()).ok_or_else(|| Error::not_found(tenant))
}
