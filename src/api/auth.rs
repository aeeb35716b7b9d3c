//! Who calls, and the only place where a call becomes a `Tenant`.
//!
//! The edge puts a [`Caller`] into every request it lets through. Handlers cannot act without a `Tenant`, and get one only here;
//! a request without a caller (a route that went round the edge) gets nothing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use tokio::sync::Semaphore;
use tonic::Extensions;
use tonic::codegen::http::HeaderMap;

use crate::error::{Error, Result};
use crate::ids::{Tenant, TenantId};
use crate::store::{KeyOwner, KeyRow, Store};
use crate::sync::lock;

/// The tenant that an operator's calls of the base are made for; `app` makes it.
pub const OPERATOR_TENANT: &str = "operator";

/// Whose key came with the call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// Holds an operator key: may administer, and act for any tenant.
    Operator,
    /// Holds a key of this tenant.
    Tenant(Tenant),
}

/// Who has come in, and by which key.
#[derive(Debug, Clone)]
pub struct Entered {
    /// On whose behalf the call acts.
    pub caller: Caller,
    /// The key's id; `None` where everyone is the operator.
    pub key: Option<String>,
}

/// How long a key that was found sound is not looked up again. It is forgotten at once when it is revoked.
const FRESH: Duration = Duration::from_secs(5);
/// Keys remembered at once.
const MOST_REMEMBERED: usize = 10_000;
/// Keys looked up at once: strangers with made-up keys cannot keep the catalogue busy.
const LOOKUPS: usize = 2;

/// Checks keys, against the store or by what it has said a moment ago: a revoked key is worthless at once. Clones share what they know.
#[derive(Debug, Clone)]
pub struct Auth {
    store: Store,
    /// Everyone is the operator.
    insecure: bool,
    known: Arc<Mutex<Known>>,
    lookups: Arc<Semaphore>,
}

/// Keys that were sound a moment ago, by id.
#[derive(Debug, Default)]
struct Known {
    keys: HashMap<String, (KeyRow, Instant)>,
    /// Counts what was forgotten: an answer that was on its way meanwhile is not remembered.
    forgotten: u64,
}

impl Auth {
    /// Returns what tells callers by the store's keys. `insecure` takes every caller for the operator.
    pub fn new(store: Store, insecure: bool) -> Self {
        Self { store, insecure, known: Arc::default(), lookups: Arc::new(Semaphore::new(LOOKUPS)) }
    }

    /// The owner of the bearer key in the `authorization` header. One text for every wrong key.
    pub async fn caller(&self, headers: &HeaderMap) -> Result<Entered> {
        if self.insecure {
            return Ok(Entered { caller: Caller::Operator, key: None });
        }
        let secret = bearer(headers)?;
        let key = match key_id(secret) {
            Some(id) => self.find(id, &Sha256::digest(secret).into()).await?,
            None => None,
        };
        let Some(KeyRow { id, owner, .. }) = key else {
            return Err(Error::Unauthenticated {
                message: "this key is unknown or has been revoked; ask the operator for a new one".into(),
            });
        };
        let caller = match owner {
            KeyOwner::Operator => Caller::Operator,
            KeyOwner::Tenant(id, weight) => Caller::Tenant(Tenant::proven(id).with_weight(weight)),
        };
        Ok(Entered { caller, key: Some(id) })
    }

    /// The key of this id, where its secret has this hash and it is not revoked.
    async fn find(&self, id: &str, given: &[u8; 32]) -> Result<Option<KeyRow>> {
        let is_sound = |key: &KeyRow| bool::from(key.hash.ct_eq(given)) && key.revoked.is_none();
        let forgotten = {
            let known = self.known();
            if let Some((key, since)) = known.keys.get(id)
                && since.elapsed() < FRESH
            {
                return Ok(Some(key.clone()).filter(is_sound));
            }
            known.forgotten
        };
        let _place = self.lookups.acquire().await.map_err(Error::internal)?;
        let key = self.store.find_key(id).await?.filter(is_sound);
        let mut known = self.known();
        if let Some(key) = &key
            && known.forgotten == forgotten
        {
            if known.keys.len() >= MOST_REMEMBERED {
                known.keys.clear();
            }
            known.keys.insert(id.to_owned(), (key.clone(), Instant::now()));
        }
        Ok(key)
    }

    /// Counts revocations and deletions: where it has not changed, no key that was found meanwhile has been revoked.
    pub fn forgotten(&self) -> u64 {
        self.known().forgotten
    }

    /// A key has been revoked.
    pub fn forget_key(&self, id: &str) {
        let mut known = self.known();
        known.forgotten += 1;
        known.keys.remove(id);
    }

    /// A tenant has been deleted, or has another weight.
    pub fn forget_tenant(&self, tenant: &TenantId) {
        let mut known = self.known();
        known.forgotten += 1;
        known.keys.retain(|_, (key, _)| !matches!(&key.owner, KeyOwner::Tenant(id, _) if id == tenant));
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        lock(&self.known)
    }

    /// Proof that the caller may act on `owner`'s names. A tenant is refused another's before anything is looked up; an operator
    /// may act on every tenant's that exists.
    pub async fn tenant_for(&self, call: &Extensions, owner: &TenantId) -> Result<Tenant> {
        match caller_of(call)? {
            Caller::Tenant(tenant) => {
                tenant.check_owns(owner)?;
                Ok(tenant.clone())
            }
            Caller::Operator => {
                let row = self.store.get_tenant(owner).await?;
                Ok(Tenant::proven(row.id).with_weight(row.weight))
            }
        }
    }

    /// The tenant that a call without a name is made for.
    pub fn own_tenant(&self, call: &Extensions) -> Result<Tenant> {
        match caller_of(call)? {
            Caller::Tenant(tenant) => Ok(tenant.clone()),
            Caller::Operator => Ok(Tenant::proven(TenantId::new(OPERATOR_TENANT)?)),
        }
    }

    /// Lets only operators through.
    pub fn operator(&self, call: &Extensions) -> Result<()> {
        match caller_of(call)? {
            Caller::Operator => Ok(()),
            Caller::Tenant(_) => Err(Error::PermissionDenied),
        }
    }
}

/// Who calls; the edge has put it there.
pub fn caller_of(call: &Extensions) -> Result<&Caller> {
    call.get().ok_or_else(no_key)
}

fn no_key() -> Error {
    Error::Unauthenticated { message: "send a key as metadata `authorization: Bearer tnr_...`".into() }
}

fn bearer(headers: &HeaderMap) -> Result<&str> {
    let value = headers.get("authorization").and_then(|value| value.to_str().ok()).ok_or_else(no_key)?;
    let (scheme, secret) = value.split_once(' ').ok_or_else(no_key)?;
    if scheme.eq_ignore_ascii_case("bearer") { Ok(secret.trim()) } else { Err(no_key()) }
}

/// The id inside `tnr_{id}_{random}`.
fn key_id(secret: &str) -> Option<&str> {
    Some(secret.strip_prefix("tnr_")?.split_once('_')?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(value: &str) -> HeaderMap {
        HeaderMap::from_iter([("authorization".parse().unwrap(), value.parse().unwrap())])
    }

    #[test]
    fn bearer_tokens_are_found() {
        assert_eq!(bearer(&headers("Bearer tnr_a_b")).unwrap(), "tnr_a_b");
        assert_eq!(bearer(&headers("bearer tnr_a_b")).unwrap(), "tnr_a_b");
        for wrong in ["", "tnr_a_b", "Basic tnr_a_b", "Bearer"] {
            assert!(matches!(bearer(&headers(wrong)), Err(Error::Unauthenticated { .. })), "{wrong:?}");
        }
        assert!(bearer(&HeaderMap::new()).is_err());
    }

    #[test]
    fn key_ids_are_found() {
        assert_eq!(key_id("tnr_k1_x_y"), Some("k1"));
        assert_eq!(key_id("tnr_k1"), None);
        assert_eq!(key_id("sk_k1_x"), None);
    }

    #[test]
    fn a_request_that_went_round_the_edge_gets_nothing() {
        assert!(matches!(caller_of(&Extensions::default()), Err(Error::Unauthenticated { .. })));
    }
}
