//! The tenants' blocked phrases: checked, stored, and kept compiled.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::config::Limits;
use crate::error::{Error, Result};
use crate::ids::Tenant;
use crate::store::{PolicyRow, Store};
use crate::sync::lock;
use crate::text::matcher::Patterns;
use crate::work::block_holding;

const PHRASES_FIELD: &str = "safety_policy.blocked_phrases";

/// A phrase of the policy as the policy has it, and where it stands in the text, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PhraseMatch {
    /// The phrase as the policy has it.
    pub phrase: String,
    /// The first byte of where it stands.
    pub start: usize,
    /// The byte after the last.
    pub end: usize,
}

/// All tenants' policies. The catalogue is asked every time: only compiling is saved. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Policies {
    store: Store,
    compiled: Arc<Mutex<Compiled>>,
    /// One policy is compiled at a time, and each once, however many wait for it.
    compiling: Arc<tokio::sync::Mutex<()>>,
    max_phrases: u64,
    max_phrase_bytes: u64,
    max_text_bytes: u64,
}

impl Policies {
    pub fn new(store: Store, limits: &Limits) -> Self {
        Self {
            store,
            compiled: Arc::new(Mutex::new(Compiled::new(limits.policy_cache_bytes))),
            compiling: Arc::default(),
            max_phrases: limits.max_blocked_phrases,
            max_phrase_bytes: limits.max_phrase_bytes,
            max_text_bytes: limits.max_check_text_bytes,
        }
    }

    pub async fn get(&self, tenant: &Tenant) -> Result<PolicyRow> {
        self.store.get_policy(tenant.id()).await
    }

    /// Replaces the phrases. `etag`: CONFLICT where it is not empty and not the current one.
    pub async fn update(&self, tenant: &Tenant, phrases: Vec<String>, etag: &str) -> Result<PolicyRow> {
        if phrases.len() as u64 > self.max_phrases {
            let (has, most) = (phrases.len(), self.max_phrases);
            let message = format!("has {has} phrases; send at most {most} (limit max_blocked_phrases)");
            return Err(Error::invalid_because("TOO_MANY_PHRASES", PHRASES_FIELD, message));
        }
        let bad = |phrase: &String| phrase.is_empty() || phrase.len() as u64 > self.max_phrase_bytes;
        if let Some(i) = phrases.iter().position(bad) {
            let message = format!("must have 1 to {} bytes (limit max_phrase_bytes)", self.max_phrase_bytes);
            return Err(Error::invalid_because("BAD_PHRASE", format!("{PHRASES_FIELD}[{i}]"), message));
        }
        self.store.set_policy(tenant.id(), &phrases, (!etag.is_empty()).then_some(etag)).await
    }

    /// What the tenant's answers must not say; `None` where they may say everything.
    pub async fn phrases(&self, tenant: &Tenant) -> Result<Option<Patterns>> {
        self.compile(&self.get(tenant).await?).await
    }

    /// The phrases in a text, from left to right, none overlapping another.
    pub async fn check_text(&self, tenant: &Tenant, text: &str) -> Result<Vec<PhraseMatch>> {
        if text.len() as u64 > self.max_text_bytes {
            let (has, most) = (text.len(), self.max_text_bytes);
            let message = format!("has {has} bytes; send at most {most} (limit max_check_text_bytes)");
            return Err(Error::invalid_because("TEXT_TOO_LONG", "text", message));
        }
        let policy = self.get(tenant).await?;
        let found = self.compile(&policy).await?.map(|phrases| phrases.find_all(text)).unwrap_or_default();
        let named = |(i, at): (usize, std::ops::Range<usize>)| {
            policy.phrases.get(i).map(|phrase| PhraseMatch { phrase: phrase.clone(), start: at.start, end: at.end })
        };
        Ok(found.into_iter().filter_map(named).collect())
    }

    async fn compile(&self, policy: &PolicyRow) -> Result<Option<Patterns>> {
        if policy.phrases.is_empty() {
            return Ok(None);
        }
        if let Some(patterns) = self.compiled().get(&policy.etag) {
            return Ok(Some(patterns));
        }
        let turn = self.compiling.clone().lock_owned().await;
        if let Some(patterns) = self.compiled().get(&policy.etag) {
            return Ok(Some(patterns));
        }
        let phrases = policy.phrases.clone();
        let (patterns, _turn) = block_holding(turn, move || Patterns::new(&phrases, true)).await?;
        self.compiled().put(&policy.etag, &patterns);
        Ok(Some(patterns))
    }

    fn compiled(&self) -> MutexGuard<'_, Compiled> {
        lock(&self.compiled)
    }
}

/// Compiled phrases by the etag of their policy, the least used of late dropped to stay within a budget of memory.
///
/// An etag comes once in all time, so that no entry can be of an older policy.
#[derive(Debug)]
struct Compiled {
    budget_bytes: u64,
    used_bytes: u64,
    /// Counts uses.
    clock: u64,
    /// With the time of its last use.
    entries: HashMap<String, (u64, Patterns)>,
}

impl Compiled {
    fn new(budget_bytes: u64) -> Self {
        Self { budget_bytes, used_bytes: 0, clock: 0, entries: HashMap::new() }
    }

    fn get(&mut self, etag: &str) -> Option<Patterns> {
        self.clock += 1;
        let (used, patterns) = self.entries.get_mut(etag)?;
        *used = self.clock;
        Some(patterns.clone())
    }

    fn put(&mut self, etag: &str, patterns: &Patterns) {
        self.clock += 1;
        if self.entries.insert(etag.to_owned(), (self.clock, patterns.clone())).is_none() {
            self.used_bytes += patterns.memory_bytes() as u64;
        }
        while self.used_bytes > self.budget_bytes {
            let oldest = self.entries.iter().min_by_key(|(_, (used, _))| *used).map(|(etag, _)| etag.clone());
            let Some((_, dropped)) = oldest.and_then(|etag| self.entries.remove(&etag)) else { return };
            self.used_bytes -= dropped.memory_bytes() as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::ids::TenantId;

    async fn policies(limits: Limits) -> (TempDir, Policies, Tenant) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).await.unwrap();
        let tenant = Tenant::proven(TenantId::new("acme").unwrap());
        store.create_tenant(tenant.id(), "", 1, "").await.unwrap();
        (dir, Policies::new(store, &limits), tenant)
    }

    fn strings(of: &[&str]) -> Vec<String> {
        of.iter().map(|s| s.to_string()).collect()
    }

    async fn found(policies: &Policies, tenant: &Tenant, text: &str) -> Vec<(String, usize, usize)> {
        let found = policies.check_text(tenant, text).await.unwrap();
        found.into_iter().map(|m| (m.phrase, m.start, m.end)).collect()
    }

    #[tokio::test]
    async fn a_changed_policy_holds_at_once() {
        let (_dir, policies, tenant) = policies(Limits::default()).await;
        assert!(policies.phrases(&tenant).await.unwrap().is_none());
        let first = policies.update(&tenant, strings(&["Bad"]), "").await.unwrap();
        assert_eq!(found(&policies, &tenant, "é BAD good").await, [("Bad".into(), 3, 6)]);
        policies.update(&tenant, strings(&["good"]), &first.etag).await.unwrap();
        assert_eq!(found(&policies, &tenant, "é BAD good").await, [("good".into(), 7, 11)]);
        assert!(matches!(policies.update(&tenant, Vec::new(), &first.etag).await, Err(Error::Conflict { .. })));
        policies.update(&tenant, Vec::new(), "").await.unwrap();
        assert!(policies.phrases(&tenant).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_tenant_that_is_gone_has_no_policy() {
        let (_dir, policies, tenant) = policies(Limits::default()).await;
        policies.update(&tenant, strings(&["old"]), "").await.unwrap();
        assert!(policies.phrases(&tenant).await.unwrap().is_some());
        policies.store.delete_tenant(tenant.id()).await.unwrap();
        assert!(matches!(policies.phrases(&tenant).await, Err(Error::NotFound { .. })));
    }

    #[tokio::test]
    async fn limits_are_named_and_a_refused_policy_changes_nothing() {
        let limits =
            Limits { max_blocked_phrases: 2, max_phrase_bytes: 3, max_check_text_bytes: 4, ..Limits::default() };
        let (_dir, policies, tenant) = policies(limits).await;
        let kept = policies.update(&tenant, strings(&["abc", "d"]), "").await.unwrap();
        for (phrases, part) in [
            (strings(&["a", "b", "c"]), "max_blocked_phrases"),
            (strings(&["a", "abcd"]), "blocked_phrases[1]"),
            (strings(&["abcd"]), "max_phrase_bytes"),
            (strings(&[""]), "blocked_phrases[0]"),
        ] {
            let error = policies.update(&tenant, phrases, "").await.unwrap_err();
            assert!(matches!(error, Error::Invalid { .. }) && error.to_string().contains(part), "{error}");
        }
        assert_eq!(policies.get(&tenant).await.unwrap(), kept);
        let error = policies.check_text(&tenant, "12345").await.unwrap_err();
        assert!(error.to_string().contains("max_check_text_bytes"), "{error}");
    }

    #[tokio::test]
    async fn the_largest_policy_works_and_the_cache_stays_within_its_budget() {
        let limits = Limits::default();
        let (most, bytes) = (limits.max_blocked_phrases as usize, limits.max_phrase_bytes as usize);
        let (_dir, policies, tenant) = policies(Limits { policy_cache_bytes: 32 << 20, ..limits }).await;
        let phrases: Vec<_> = (0..most).map(|i| format!("{i:04}").repeat(bytes / 4)).collect();
        for round in 0..4 {
            policies.update(&tenant, phrases[round..].to_vec(), "").await.unwrap();
            assert_eq!(found(&policies, &tenant, &phrases[most - 1]).await.len(), 1);
            let cache = policies.compiled();
            assert!(cache.used_bytes <= cache.budget_bytes);
            assert_eq!(cache.used_bytes, cache.entries.values().map(|e| e.1.memory_bytes() as u64).sum::<u64>());
        }
    }

    #[test]
    fn the_least_used_of_late_is_dropped() {
        let of = |phrase: &str| Patterns::new(&strings(&[phrase]), true).unwrap();
        let mut cache = Compiled::new(2 * of("x").memory_bytes() as u64);
        cache.put("a", &of("a"));
        cache.put("b", &of("b"));
        assert!(cache.get("a").is_some());
        cache.put("c", &of("c"));
        assert!(cache.get("b").is_none());
        assert!(cache.get("a").is_some() && cache.get("c").is_some());
    }
}
