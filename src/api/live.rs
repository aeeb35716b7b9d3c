//! The calls under way, so that those of a key or a tenant can be ended at once when it is no more.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::task::{Context, Poll};
use std::time::Instant;

use http_body::{Frame, SizeHint};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Bytes;

use super::auth::{Caller, Entered};
use super::status;
use crate::error::Error;
use crate::ids::TenantId;
use crate::sync::lock;

/// All calls of tenants under way. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Live(Arc<Mutex<UnderWay>>);

#[derive(Debug, Default)]
struct UnderWay {
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

    /// Why the call ended.
    fn why(&self) -> Error {
        self.why.get().cloned().unwrap_or(Error::Cancelled)
    }

    /// The answer's body, unless it has been taken out.
    fn body(&self) -> MutexGuard<'_, Option<Body>> {
        lock(&self.body)
    }

    fn end(&self, why: &Error) {
        // A call ends for the first reason.
        let _ = self.why.set(why.clone());
        self.token.cancel();
        self.drop_body();
    }

    fn drop_body(&self) {
        let body = self.body().take();
        drop(body);
    }
}

/// An answer's body that ends where its call is cut, or at its deadline.
pub struct CutBody {
    cut: Arc<Cut>,
    cancelled: Pin<Box<WaitForCancellationFutureOwned>>,
    ended: bool,
    /// Cuts the call at its deadline, whether or not its client reads.
    _deadline: Option<AbortOnDropHandle<()>>,
}

impl CutBody {
    pub fn new(body: Body, cut: Arc<Cut>, deadline: Option<Instant>) -> Self {
        *cut.body() = Some(body);
        if cut.token.is_cancelled() {
            cut.drop_body();
        }
        let at_deadline = |deadline: Instant| {
            let cut = cut.clone();
            let wait = async move {
                tokio::time::sleep_until(deadline.into()).await;
                cut.end(&Error::DeadlineExceeded);
            };
            AbortOnDropHandle::new(tokio::spawn(wait))
        };
        let timer = deadline.map(at_deadline);
        let cancelled = Box::pin(cut.token.clone().cancelled_owned());
        Self { cut, cancelled, ended: false, _deadline: timer }
    }

    fn cut_off(&mut self) -> Frame<Bytes> {
        self.ended = true;
        status::trailers(&self.cut.why().into())
    }
}

impl Drop for CutBody {
    fn drop(&mut self) {
        // What is behind the answer ends with it, also where the call's entry stays a moment longer.
        self.cut.drop_body();
    }
}

impl http_body::Body for CutBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if self.cancelled.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Some(Ok(self.cut_off())));
        }
        let polled = self.cut.body().as_mut().map(|body| Pin::new(body).poll_frame(cx));
        polled.unwrap_or_else(|| Poll::Ready(Some(Ok(self.cut_off()))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.cut.body().as_ref().is_some_and(http_body::Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.cut.body().as_ref().map(http_body::Body::size_hint).unwrap_or_default()
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
    fn lock(&self) -> MutexGuard<'_, UnderWay> {
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
        cuts.iter().for_each(|cut| cut.end(why));
    }
}

impl Drop for LiveCall {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.live.lock().calls.remove(&id);
        }
    }
}
