//! Who calls, and the only place where a call becomes a `Tenant`.
//!
//! The edge puts a [`Caller`] into every request it lets through. Handlers cannot act without a `Tenant`, and get one only here;
//! a request without a caller (a route that went round the edge) gets nothing.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt as _, Shared, TryFutureExt as _};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use tokio::sync::Semaphore;
use tonic::Extensions;
use tonic::codegen::http::HeaderMap;

use super::places::Places;
use crate::config::Limits;
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

/// Keys remembered at once.
const MOST_REMEMBERED: usize = 10_000;
/// Keys looked up at once: strangers with made-up keys cannot keep the catalogue busy.
const LOOKUPS: usize = 2;
/// When a call may come again that found too many in line for a lookup.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Checks keys, against the store or by what it has said before. A key that was found sound is not looked up again, so that strangers with
/// made-up keys delay nobody whose key has been seen. What revokes keys goes through this process and says so here: a revoked key is
/// worthless at once. Clones share what they know.
#[derive(Debug, Clone)]
pub struct Auth {
    store: Store,
    /// Everyone is the operator.
    insecure: bool,
    remembered: Arc<Mutex<Remembered>>,
    lookups: Arc<Semaphore>,
    /// The lookups that wait or are under way, by the address that began each.
    in_line: Places<IpAddr>,
}

/// What the store says of a key, for all who wait for it; an error where the lookup has panicked.
type Lookup = Shared<BoxFuture<'static, Result<Result<Option<KeyRow>>, ()>>>;

/// What is known without asking the store.
#[derive(Debug, Default)]
struct Remembered {
    /// Keys that were found sound, by id.
    keys: HashMap<String, KeyRow>,
    /// Lookups that wait or are under way, by the key's id.
    lookups: HashMap<String, Lookup>,
    /// Counts what was forgotten: an answer that was on its way meanwhile is not remembered.
    forgotten: u64,
    /// The tenants that are being deleted, each with how many calls do so.
    leaving: HashMap<TenantId, u64>,
}

impl Remembered {
    // Who comes after something was forgotten asks anew.
    fn forget_key(&mut self, id: &str) {
        self.forgotten += 1;
        self.keys.remove(id);
        self.lookups.remove(id);
    }

    fn forget_tenant(&mut self, tenant: &TenantId) {
        self.forgotten += 1;
        self.lookups.clear();
        self.keys.retain(|_, key| !matches!(&key.owner, KeyOwner::Tenant(id, _) if id == tenant));
    }
}

/// A tenant that is being deleted has no calls until this is dropped.
#[derive(Debug)]
#[must_use = "the tenant's calls are let in again once this is dropped"]
pub struct Leaving {
    auth: Auth,
    tenant: TenantId,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        let mut remembered = self.auth.remembered();
        // What was found sound meanwhile may be gone.
        remembered.forget_tenant(&self.tenant);
        if let Some(count) = remembered.leaving.get_mut(&self.tenant) {
            *count -= 1;
            if *count == 0 {
                remembered.leaving.remove(&self.tenant);
            }
        }
    }
}

impl Auth {
    /// Returns what tells callers by the store's keys. `insecure` takes every caller for the operator.
    pub fn new(store: Store, insecure: bool, limits: &Limits) -> Self {
        let most = ("max_keyless_calls", limits.max_keyless_calls);
        let in_line = Places::new("calls whose key is looked up", most, most, RETRY_AFTER);
        let (remembered, lookups) = (Arc::default(), Arc::new(Semaphore::new(LOOKUPS)));
        Self { store, insecure, remembered, lookups, in_line }
    }

    /// The owner of the bearer key in the `authorization` header of a call from this address. One text for every wrong key.
    pub async fn caller(&self, headers: &HeaderMap, address: IpAddr) -> Result<Entered> {
        if self.insecure {
            return Ok(Entered { caller: Caller::Operator, key: None });
        }
        let secret = bearer(headers)?;
        let key = match key_id(secret) {
            Some(id) => self.find(id, &Sha256::digest(secret).into(), address).await?,
            None => None,
        };
        let key = key.filter(|key| !matches!(&key.owner, KeyOwner::Tenant(id, _) if self.is_leaving(id)));
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
    async fn find(&self, id: &str, given: &[u8; 32], address: IpAddr) -> Result<Option<KeyRow>> {
        let is_sound = |key: &KeyRow| bool::from(key.hash.ct_eq(given)) && key.revoked.is_none();
        let lookup = {
            let mut remembered = self.remembered();
            if let Some(key) = remembered.keys.get(id) {
                return Ok(Some(key.clone()).filter(is_sound));
            }
            self.look_up(&mut remembered, id, address)?
        };
        let Ok(found) = lookup.await else {
            self.remembered().lookups.remove(id);
            return Err(Error::internal("a lookup of a key has ended"));
        };
        Ok(found?.filter(is_sound))
    }

    /// The lookup of a key that is under way, or a new one. One call of an address takes a place for it, whoever else waits for the same; it
    /// goes on where they all go away, and its place goes with it.
    fn look_up(&self, remembered: &mut Remembered, id: &str, address: IpAddr) -> Result<Lookup> {
        if let Some(lookup) = remembered.lookups.get(id) {
            return Ok(lookup.clone());
        }
        let place = self.in_line.take_for(&address)?;
        let (this, key) = (self.clone(), id.to_owned());
        let work = tokio::spawn(async move {
            let found = this.ask_store(&key).await;
            this.remembered().lookups.remove(&key);
            drop(place);
            found
        });
        let lookup = work.map_err(drop).boxed().shared();
        remembered.lookups.insert(id.to_owned(), lookup.clone());
        Ok(lookup)
    }

    async fn ask_store(&self, id: &str) -> Result<Option<KeyRow>> {
        let _permit = self.lookups.acquire().await.map_err(Error::internal)?;
        let forgotten = self.forgotten();
        let key = self.store.find_key(id).await?.filter(|key| key.revoked.is_none());
        let mut remembered = self.remembered();
        if let Some(key) = &key
            && remembered.forgotten == forgotten
        {
            if remembered.keys.len() >= MOST_REMEMBERED {
                remembered.keys.clear();
            }
            remembered.keys.insert(id.to_owned(), key.clone());
        }
        Ok(key)
    }

    /// Counts revocations and deletions: where it has not changed, no key that was found meanwhile has been revoked.
    pub fn forgotten(&self) -> u64 {
        self.remembered().forgotten
    }

    /// A key is being revoked, or has been.
    pub fn forget_key(&self, id: &str) {
        self.remembered().forget_key(id);
    }

    /// A tenant has another weight.
    pub fn forget_tenant(&self, tenant: &TenantId) {
        self.remembered().forget_tenant(tenant);
    }

    /// Proof that `owner` may be deleted by who has been let through as an operator. It has no new calls from now on, nor do operators act
    /// for it, until the deletion has ended.
    pub async fn begin_deleting(&self, owner: &TenantId) -> Result<(Tenant, Leaving)> {
        let row = self.store.get_tenant(owner).await?;
        let mut remembered = self.remembered();
        *remembered.leaving.entry(owner.clone()).or_default() += 1;
        remembered.forget_tenant(owner);
        drop(remembered);
        Ok((Tenant::proven(row.id), Leaving { auth: self.clone(), tenant: owner.clone() }))
    }

    fn is_leaving(&self, tenant: &TenantId) -> bool {
        self.remembered().leaving.contains_key(tenant)
    }

    fn remembered(&self) -> MutexGuard<'_, Remembered> {
        lock(&self.remembered)
    }

    /// Proof that the caller may act on `owner`'s names. A tenant is refused another's before anything is looked up; an operator
    /// may act on every tenant's that exists.
    pub async fn tenant_for(&self, call: &Extensions, owner: &TenantId) -> Result<Tenant> {
        match caller_of(call)? {
            Caller::Tenant(tenant) => {
                tenant.check_owns(owner)?;
                Ok(tenant.clone())
            }
            Caller::Operator if self.is_leaving(owner) => Err(Error::not_found(owner)),
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
    use std::task::Poll;

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

    async fn auth(limits: &Limits) -> (tempfile::TempDir, Auth, HeaderMap, TenantId) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).await.unwrap();
        let tenant = TenantId::new("a").unwrap();
        store.create_tenant(&tenant, "", 1, "").await.unwrap();
        let (_, secret) = store.create_key(&tenant, "", "").await.unwrap();
        (dir, Auth::new(store, false, limits), headers(&format!("Bearer {secret}")), tenant)
    }

    fn address(n: u8) -> IpAddr {
        [10, 0, 0, n].into()
    }

    #[tokio::test]
    async fn who_waits_for_a_lookup_delays_nobody_whose_key_is_known() {
        let (_dir, auth, good, _) = auth(&Limits { max_keyless_calls: 2, ..Limits::default() }).await;
        auth.caller(&good, address(1)).await.unwrap();
        let _all = auth.lookups.acquire_many(LOOKUPS as u32).await.unwrap();
        let made_up = headers("Bearer tnr_1_2");
        let waits = auth.caller(&made_up, address(1));
        tokio::pin!(waits);
        assert!(futures::poll!(&mut waits).is_pending());
        let same = auth.caller(&made_up, address(1));
        tokio::pin!(same);
        assert!(futures::poll!(&mut same).is_pending(), "who asks for the same key waits with the first");
        let other = headers("Bearer tnr_3_4");
        let one_more = auth.caller(&other, address(1));
        tokio::pin!(one_more);
        let refused = futures::poll!(&mut one_more);
        let Poll::Ready(Err(Error::Exhausted { limit: "max_keyless_calls", .. })) = refused else {
            panic!("it waits too: {refused:?}");
        };
        let elsewhere = auth.caller(&other, address(2));
        tokio::pin!(elsewhere);
        assert!(futures::poll!(&mut elsewhere).is_pending(), "another address has a place");
        auth.caller(&good, address(1)).await.unwrap();
    }

    #[tokio::test]
    async fn a_tenant_that_is_being_deleted_has_no_calls() {
        let (_dir, auth, good, tenant) = auth(&Limits::default()).await;
        auth.caller(&good, address(1)).await.unwrap();
        let before = auth.forgotten();
        let (_, leaving) = auth.begin_deleting(&tenant).await.unwrap();
        assert_ne!(auth.forgotten(), before, "calls that are coming in look again");
        assert!(matches!(auth.caller(&good, address(1)).await, Err(Error::Unauthenticated { .. })));
        let mut operator = Extensions::default();
        operator.insert(Caller::Operator);
        assert!(matches!(auth.tenant_for(&operator, &tenant).await, Err(Error::NotFound { .. })));
        let (_, second) = auth.begin_deleting(&tenant).await.unwrap();
        drop(leaving);
        auth.caller(&good, address(1)).await.unwrap_err();
        drop(second);
        auth.caller(&good, address(1)).await.expect("it was not deleted after all");
        auth.tenant_for(&operator, &tenant).await.unwrap();
    }

    #[test]
    fn a_request_that_went_round_the_edge_gets_nothing() {
        assert!(matches!(caller_of(&Extensions::default()), Err(Error::Unauthenticated { .. })));
    }
}
