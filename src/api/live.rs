//! The calls under way, so that those of a key or a tenant can be ended at once when it is no more.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use tokio_util::sync::CancellationToken;
use tonic::body::Body;

use super::auth::{Caller, Entered};
use crate::error::Error;
use crate::ids::TenantId;
use crate::sync::lock;

/// All calls of tenants under way. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Live(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    next: u64,
    calls: HashMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    key: Option<String>,
    tenant: TenantId,
    cut: Arc<Cut>,
}

/// What ends a call from outside.
#[derive(Debug, Default)]
pub struct Cut {
    token: CancellationToken,
    why: OnceLock<Error>,
    /// The answer's body; taken out to end what is behind it, whether or not its client reads.
    body: Mutex<Option<Body>>,
}

impl Cut {
    /// Waits until the call is to end.
    pub async fn wait(&self) -> Error {
        self.token.cancelled().await;
        self.why()
    }

    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }

    /// Why the call ended.
    pub fn why(&self) -> Error {
        self.why.get().cloned().unwrap_or(Error::Cancelled)
    }

    /// The answer's body, unless it has been taken out.
    pub fn body(&self) -> MutexGuard<'_, Option<Body>> {
        lock(&self.body)
    }
}

/// A call in the table; dropped with the call.
#[derive(Debug)]
pub struct LiveCall {
    live: Live,
    /// `None` for operators' calls, which are in no table.
    id: Option<u64>,
    pub cut: Arc<Cut>,
}

impl Live {
    fn lock(&self) -> MutexGuard<'_, Table> {
        lock(&self.0)
    }

    pub fn enter(&self, who: &Entered) -> LiveCall {
        let cut = Arc::new(Cut::default());
        let id = match &who.caller {
            Caller::Operator => None,
            Caller::Tenant(tenant) => {
                let mut table = self.lock();
                let id = table.next;
                table.next += 1;
                let entry = Entry { key: who.key.clone(), tenant: tenant.id().clone(), cut: cut.clone() };
                table.calls.insert(id, entry);
                Some(id)
            }
        };
        LiveCall { live: self.clone(), id, cut }
    }

    /// Ends the calls that were made with a key.
    pub fn end_key(&self, key: &str, why: &Error) {
        self.end(|entry| entry.key.as_deref() == Some(key), why);
    }

    /// Ends the calls of a tenant.
    pub fn end_tenant(&self, tenant: &TenantId, why: &Error) {
        self.end(|entry| entry.tenant == *tenant, why);
    }

    fn end(&self, which: impl Fn(&Entry) -> bool, why: &Error) {
        let cuts: Vec<_> = self.lock().calls.values().filter(|entry| which(entry)).map(|e| e.cut.clone()).collect();
        for cut in cuts {
            let _ = cut.why.set(why.clone());
            cut.token.cancel();
            let body = cut.body().take();
            drop(body);
        }
    }
}

impl Drop for LiveCall {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.live.lock().calls.remove(&id);
        }
    }
}
