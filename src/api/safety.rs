//! SafetyService: the tenant's policy.

use std::sync::Arc;

use tonic::{Request, Response};

use super::proto::safety_service_server::SafetyService;
use super::shared::Shared;
use super::{Answer, convert, proto as pb};
use crate::ids::TenantId;

pub struct Safety(pub Arc<Shared>);

#[tonic::async_trait]
impl SafetyService for Safety {
    async fn get_safety_policy(&self, request: Request<pb::GetSafetyPolicyRequest>) -> Answer<pb::SafetyPolicy> {
        let owner = convert::policy_owner("name", &request.get_ref().name)?;
        let tenant = self.0.auth.tenant_for(request.extensions(), &owner).await?;
        let row = self.0.parts.guard.policy(&tenant).await?;
        Ok(Response::new(convert::policy(&owner, row)))
    }

    async fn update_safety_policy(&self, request: Request<pb::UpdateSafetyPolicyRequest>) -> Answer<pb::SafetyPolicy> {
        let (_, call, request) = request.into_parts();
        let policy = request.safety_policy.unwrap_or_default();
        let owner = convert::policy_owner("safety_policy.name", &policy.name)?;
        let tenant = self.0.auth.tenant_for(&call, &owner).await?;
        let row = self.0.parts.guard.update_policy(&tenant, policy.blocked_phrases, &policy.etag).await?;
        tracing::info!(tenant = %owner, phrases = row.phrases.len(), "safety policy updated");
        Ok(Response::new(convert::policy(&owner, row)))
    }

    async fn check_text(&self, request: Request<pb::CheckTextRequest>) -> Answer<pb::CheckTextResponse> {
        let (_, call, request) = request.into_parts();
        let parent: TenantId = convert::name("parent", &request.parent)?;
        let tenant = self.0.auth.tenant_for(&call, &parent).await?;
        let found = self.0.parts.guard.check_text(&tenant, &request.text).await?;
        let matches: Vec<_> = found.into_iter().map(convert::phrase_match).collect();
        Ok(Response::new(pb::CheckTextResponse { allowed: matches.is_empty(), matches }))
    }
}
