//! What a tenant's answers may say. [`Guard`] is the only door to the engine, so that no answer leaves without having passed the policy.

mod filter;
mod policy;

use std::time::Duration;

use crate::config::Limits;
pub use crate::engine::score_too_large;
use crate::engine::{Engine, GenerateStream};
use crate::error::Result;
use crate::ids::{Tenant, TenantId};
use crate::request::{GenerateSpec, Prompt, ScoreAnswer, ScoreSpec};
use crate::store::{PolicyRow, Store};
pub use policy::PhraseMatch;
use policy::Policies;

/// The engine behind the policies of its tenants. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Guard {
    engine: Engine,
    policies: Policies,
}

impl Guard {
    /// Returns the door to an engine, with the store's policies.
    pub fn new(engine: Engine, store: Store, limits: &Limits) -> Self {
        Self { engine, policies: Policies::new(store, limits) }
    }

    /// Starts the answers and ends each with `ContentFiltered` before the first phrase of the tenant's policy. The policy is the one of now: a
    /// later change is for later answers. Errors: the engine's.
    pub async fn generate(&self, tenant: &Tenant, spec: GenerateSpec) -> Result<Vec<GenerateStream>> {
        let phrases = self.policies.phrases(tenant).await?;
        let answers = self.engine.generate(tenant, spec).await?;
        Ok(match phrases {
            Some(phrases) => answers.into_iter().map(|events| filter::filter(events, phrases.clone())).collect(),
            None => answers,
        })
    }

    /// As [`Engine::tokenize`].
    pub async fn tokenize(&self, tenant: &Tenant, prompt: Prompt, generation_prompt: bool) -> Result<Vec<u32>> {
        self.engine.tokenize(tenant, prompt, generation_prompt).await
    }

    /// As [`Engine::held_by`].
    pub fn held_by(&self, tenant: &TenantId) -> u64 {
        self.engine.held_by(tenant)
    }

    /// Scores sequences. The tenant gave all of their text, so there is nothing to filter. Errors: the engine's.
    pub async fn score(&self, tenant: &Tenant, spec: ScoreSpec) -> Result<ScoreAnswer> {
        self.engine.score(tenant, spec).await
    }

    /// Returns the tenant's policy.
    pub async fn policy(&self, tenant: &Tenant) -> Result<PolicyRow> {
        self.policies.get(tenant).await
    }

    /// Replaces the policy's phrases. `etag`: CONFLICT where it is not empty and not the current one.
    pub async fn update_policy(&self, tenant: &Tenant, phrases: Vec<String>, etag: &str) -> Result<PolicyRow> {
        self.policies.update(tenant, phrases, etag).await
    }

    /// The policy's phrases in a text, from left to right, none overlapping another; the first is where an answer with this text would end.
    pub async fn check_text(&self, tenant: &Tenant, text: &str) -> Result<Vec<PhraseMatch>> {
        self.policies.check_text(tenant, text).await
    }

    /// As [`Engine::queued`].
    pub fn queued(&self) -> u64 {
        self.engine.queued()
    }

    /// As [`Engine::drain`].
    pub async fn drain(&self, timeout: Duration) {
        self.engine.drain(timeout).await;
    }

    /// As [`Engine::check_integrity`].
    pub async fn check_integrity(&self) -> Result<()> {
        self.engine.check_integrity().await
    }
}
