//! The memory that calls may take: one budget for the whole process (limit `max_request_memory_bytes`), in two halves.
//!
//! **Requests** take from the first what they bring and what waits to be read of their answers. Nothing waits for it: where there is too
//! little, a call is refused. A tenant may hold as much as it leaves to the others: the first to take all that it can get has a half, the
//! next a quarter, and so on, so that whoever comes after them finds room for small calls, though for ever smaller ones.
//!
//! **Bulk work** (publishing an import, reading a whole dataset or adapter) takes from the second and waits in the order of arrival; what
//! is larger than the half takes all of it, and so runs alone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{Error, Result};
use crate::ids::TenantId;
use crate::sync::lock;

/// The limit's name.
const LIMIT: &str = "max_request_memory_bytes";
/// When a refused client may try again: requests give their memory back soon.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Bytes of one permit of bulk work.
const BULK_UNIT: u64 = 64 << 10;

/// The budget. Shared by reference count.
#[derive(Debug)]
pub struct Memory {
    /// Bytes for requests.
    limit: u64,
    requests: Mutex<Requests>,
    bulk: Arc<Semaphore>,
    bulk_units: u32,
}

#[derive(Debug, Default)]
struct Requests {
    used: u64,
    tenants: HashMap<TenantId, u64>,
}

impl Memory {
    /// Makes the budget of so many bytes.
    pub fn new(bytes: u64) -> Arc<Self> {
        let half = bytes / 2;
        let bulk_units = u32::try_from(half / BULK_UNIT).unwrap_or(u32::MAX).clamp(1, Semaphore::MAX_PERMITS as u32);
        let bulk = Arc::new(Semaphore::new(bulk_units as usize));
        Arc::new(Self { limit: half, requests: Mutex::default(), bulk, bulk_units })
    }

    /// Returns an account that holds nothing yet, of a tenant, or of an operator, who is refused nothing.
    pub fn account(self: &Arc<Self>, owner: Option<&TenantId>) -> Account {
        Account { memory: Arc::clone(self), owner: owner.cloned(), bytes: 0 }
    }

    /// Takes bytes for bulk work, and waits for them behind those that came before.
    ///
    /// # Errors
    /// None but INTERNAL.
    pub async fn bulk(&self, bytes: u64) -> Result<Bulk> {
        let units = u32::try_from(bytes.div_ceil(BULK_UNIT)).unwrap_or(u32::MAX).clamp(1, self.bulk_units);
        let permit = Arc::clone(&self.bulk).acquire_many_owned(units).await.map_err(Error::internal)?;
        Ok(Bulk { _permit: permit })
    }

    /// Returns the bytes that are taken, by requests and by bulk work.
    pub fn used(&self) -> u64 {
        let bulk = u64::from(self.bulk_units) - self.bulk.available_permits() as u64;
        self.lock().used + bulk * BULK_UNIT
    }

    fn lock(&self) -> MutexGuard<'_, Requests> {
        lock(&self.requests)
    }

    /// `call`: what the call holds already.
    fn take(&self, owner: Option<&TenantId>, call: u64, bytes: u64) -> Result<()> {
        let mut requests = self.lock();
        if let Some(tenant) = owner {
            let needs = call.saturating_add(bytes);
            if needs > self.limit / 2 {
                let message = format!(
                    "this call needs {needs} bytes of memory, and no tenant's calls ever get more than {}; send less at once, or have the \
                     operator raise the limit",
                    self.limit / 2
                );
                return Err(Error::Exhausted { limit: LIMIT, message, retry_after: None });
            }
            let free = self.limit.saturating_sub(requests.used);
            let held = requests.tenants.get(tenant).copied().unwrap_or(0);
            // As much as it then holds must be left.
            if held.saturating_add(bytes) > free.saturating_sub(bytes) {
                let message =
                    format!("{tenant}'s calls hold {held} bytes of memory and this one needs {bytes}; {free} are left");
                return Err(Error::Exhausted { limit: LIMIT, message, retry_after: Some(RETRY_AFTER) });
            }
            *requests.tenants.entry(tenant.clone()).or_default() += bytes;
        }
        requests.used = requests.used.saturating_add(bytes);
        Ok(())
    }

    fn give_back(&self, owner: Option<&TenantId>, bytes: u64) {
        let mut requests = self.lock();
        requests.used = requests.used.saturating_sub(bytes);
        if let Some(tenant) = owner
            && let Some(held) = requests.tenants.get_mut(tenant)
        {
            *held = held.saturating_sub(bytes);
            if *held == 0 {
                requests.tenants.remove(tenant);
            }
        }
    }
}

/// What one call holds; given back when dropped.
#[derive(Debug)]
pub struct Account {
    memory: Arc<Memory>,
    owner: Option<TenantId>,
    bytes: u64,
}

impl Account {
    /// Takes more.
    ///
    /// # Errors
    /// EXHAUSTED where the tenant would hold more than is left to the others; without a time to try again where it always would.
    pub fn grow(&mut self, bytes: u64) -> Result<()> {
        if bytes > 0 {
            self.memory.take(self.owner.as_ref(), self.bytes, bytes)?;
            self.bytes += bytes;
        }
        Ok(())
    }

    /// Gives some back.
    pub fn shrink(&mut self, bytes: u64) {
        let bytes = bytes.min(self.bytes);
        if bytes > 0 {
            self.memory.give_back(self.owner.as_ref(), bytes);
            self.bytes -= bytes;
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.shrink(self.bytes);
    }
}

/// The memory of bulk work; given back when dropped.
#[derive(Debug)]
pub struct Bulk {
    _permit: OwnedSemaphorePermit,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_holds_nothing_finds_room_beside_those_who_take_all_they_get() {
        let memory = Memory::new(2 * 1000);
        let ids: Vec<_> = (0..5).map(|i| TenantId::new(&format!("t{i}")).unwrap()).collect();
        let mut greedy: Vec<Account> = ids.iter().map(|id| memory.account(Some(id))).collect();
        for account in &mut greedy[..4] {
            while account.grow(1).is_ok() {}
        }
        let held: Vec<u64> = greedy.iter().map(Account::bytes).collect();
        assert_eq!(held[..2], [500, 250]);
        let large = Memory::new(2 * 1000);
        let mut at_once = large.account(Some(&ids[0]));
        assert!(at_once.grow(501).is_err(), "in one step no more than in many");
        at_once.grow(500).unwrap();
        large.account(Some(&ids[1])).grow(250).unwrap();
        greedy[4].grow(30).unwrap();
        let mut operator = memory.account(None);
        operator.grow(5000).unwrap();
        assert!(greedy[4].grow(1).is_err(), "but never more than there is");
        drop(operator);
        greedy[0].shrink(400);
        assert!(greedy[4].grow(100).is_ok());
        drop(greedy);
        assert_eq!(memory.used(), 0);
        assert!(memory.lock().tenants.is_empty());
    }

    #[test]
    fn who_can_never_get_it_is_not_told_to_try_again() {
        let memory = Memory::new(2 * 1000);
        let [one, other] = ["one", "other"].map(|id| TenantId::new(id).unwrap());
        let mut account = memory.account(Some(&one));
        let refused = |result: Result<()>| match result {
            Err(Error::Exhausted { limit: LIMIT, message, retry_after }) => (message, retry_after),
            other => panic!("{other:?}"),
        };
        account.grow(400).unwrap();
        let (message, retry_after) = refused(account.grow(101));
        assert!(message.contains("501") && message.contains("500") && message.contains("send less"), "{message}");
        assert_eq!(retry_after, None);
        let (_, retry_after) = refused(memory.account(Some(&other)).grow(500));
        assert_eq!(retry_after, Some(RETRY_AFTER), "there will be room once the first is done");
        drop(account);
        memory.account(Some(&other)).grow(500).unwrap();
    }

    #[tokio::test]
    async fn bulk_work_waits_its_turn_and_the_largest_runs_alone() {
        let memory = Memory::new(2 * 10 * BULK_UNIT);
        let first = memory.bulk(3 * BULK_UNIT).await.unwrap();
        let huge = memory.bulk(u64::MAX);
        tokio::pin!(huge);
        assert!(futures::poll!(&mut huge).is_pending());
        let small = memory.bulk(1);
        tokio::pin!(small);
        assert!(futures::poll!(&mut small).is_pending(), "no one goes before another");
        drop(first);
        let huge = huge.await.unwrap();
        assert!(futures::poll!(&mut small).is_pending());
        assert_eq!(memory.used(), 10 * BULK_UNIT);
        drop(huge);
        drop(small.await.unwrap());
        assert_eq!(memory.used(), 0);
    }
}
