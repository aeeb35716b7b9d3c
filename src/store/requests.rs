//! Calls that carry a request id: the first makes something, the same again gets that, and anything else under the id is refused.
//!
//! Every create goes through [`Claim`]. What "the same" is, is the target's name and the content: a digest, a spec, a display name. The row is
//! written in the transaction that makes the thing, so of two calls at once one makes it and the other finds it.

use sqlx::SqliteConnection;

use crate::error::{Error, Result};
use crate::ids::TenantId;
use crate::store::rows::now;

/// A request id and the content that came with it, where the caller has to say what the content is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RequestKey {
    /// Empty: none.
    pub id: String,
    /// The same for the same request, e.g. a digest.
    pub content: String,
}

/// A create as it was asked for.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    pub tenant: &'a TenantId,
    /// Ids are each method's own.
    pub method: &'static str,
    /// Empty: none.
    pub request_id: &'a str,
    /// The name of what is to be made, or of what it is made for.
    pub target: String,
    /// `None` where it is not known yet: then names alone are compared.
    pub content: Option<String>,
}

/// A first call as it was recorded. What a build before 0004 recorded has no content, and any matches it.
#[derive(Debug)]
struct First {
    result: String,
    target: Option<String>,
    content: Option<String>,
}

impl First {
    fn of((result, target, content): (String, Option<String>, Option<String>)) -> Self {
        Self { result, target, content }
    }

    fn is(&self, claim: &Claim<'_>) -> bool {
        let same = |first: &Option<String>, now: Option<&String>| match (first, now) {
            (Some(first), Some(now)) => first == now,
            _ => true,
        };
        same(&self.target, Some(&claim.target)) && same(&self.content, claim.content.as_ref())
    }

    /// For people. A dataset's result is its blob, which tells them nothing.
    fn name(&self) -> &str {
        match &self.target {
            Some(target) if !self.result.starts_with("tenants/") => target,
            _ => &self.result,
        }
    }
}

impl Claim<'_> {
    /// What the first call with this request id made.
    ///
    /// # Errors
    /// REQUEST_ID_REUSED where that call asked for something else.
    pub(super) async fn first_result(&self, db: &mut SqliteConnection) -> Result<Option<String>> {
        if self.request_id.is_empty() {
            return Ok(None);
        }
        let first = sqlx::query_as(
            "SELECT result, target, content FROM requests WHERE tenant = ? AND method = ? AND request_id = ?",
        )
        .bind(self.tenant.as_str())
        .bind(self.method)
        .bind(self.request_id)
        .fetch_optional(db)
        .await?;
        match first.map(First::of) {
            Some(first) if !first.is(self) => Err(self.reused(first.name())),
            first => Ok(first.map(|first| first.result)),
        }
    }

    /// The same for what operators make: their ids are one space, whichever tenant a call is about.
    pub(super) async fn first_result_anywhere(&self, db: &mut SqliteConnection) -> Result<Option<String>> {
        if self.request_id.is_empty() {
            return Ok(None);
        }
        let rows = sqlx::query_as("SELECT result, target, content FROM requests WHERE method = ? AND request_id = ?")
            .bind(self.method)
            .bind(self.request_id)
            .fetch_all(db)
            .await?;
        let first: Vec<_> = rows.into_iter().map(First::of).collect();
        match first.iter().find(|first| first.is(self)) {
            Some(same) => Ok(Some(same.result.clone())),
            None => first.first().map_or(Ok(None), |other| Err(self.reused(other.name()))),
        }
    }

    /// Keeps what the first call made, in the transaction that makes it.
    pub(super) async fn record(&self, db: &mut SqliteConnection, result: &str) -> Result<()> {
        if self.request_id.is_empty() {
            return Ok(());
        }
        sqlx::query(
            "INSERT INTO requests (tenant, method, request_id, result, target, content, create_time) VALUES (?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(self.tenant.as_str())
        .bind(self.method)
        .bind(self.request_id)
        .bind(result)
        .bind(&self.target)
        .bind(&self.content)
        .bind(now())
        .execute(db)
        .await?;
        Ok(())
    }

    fn reused(&self, first: &str) -> Error {
        let message = format!(
            "{:?} came before with another request, which made {first}; nothing was done now. Repeat that request unchanged, or give this one \
             a request_id of its own",
            self.request_id
        );
        Error::invalid_because("REQUEST_ID_REUSED", "request_id", message)
    }
}
