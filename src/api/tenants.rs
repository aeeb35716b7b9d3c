//! TenantService: tenants, their keys, their usage. For operators, but for how a tenant itself stands.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tonic::{Request, Response};

use super::auth::OPERATOR_TENANT;
use super::proto::tenant_service_server::TenantService;
use super::shared::Shared;
use super::{Answer, convert, proto as pb};
use crate::error::{Error, Result};
use crate::ids::{KeyName, Tenant, TenantId};
use crate::store::Page;
use crate::work::spawn_uncancellable;

pub struct Tenants(pub Arc<Shared>);

/// How long the jobs of a tenant that is deleted may take to end.
const JOBS_END_WITHIN: Duration = Duration::from_secs(60);
/// How often they are looked at.
const LOOK: Duration = Duration::from_millis(100);

impl Tenants {
    /// Deletes a tenant that has no calls; its jobs are cancelled first.
    async fn delete(&self, tenant: &Tenant) -> Result<()> {
        let until = Instant::now() + JOBS_END_WITHIN;
        loop {
            self.cancel_jobs(tenant).await?;
            match self.0.parts.hub.delete_tenant(tenant.id()).await {
                Err(Error::Precondition { reason: "TENANT_IN_USE", .. }) if Instant::now() < until => {
                    tokio::time::sleep(LOOK).await;
                }
                outcome => return outcome,
            }
        }
    }

    async fn cancel_jobs(&self, tenant: &Tenant) -> Result<()> {
        let mut page = Page::default();
        loop {
            let listed = self.0.parts.store.list_jobs(tenant.id(), &page).await?;
            for job in listed.items.iter().filter(|job| !job.state.is_final()) {
                match self.0.parts.trainer.cancel(tenant, &job.name).await {
                    // It has ended meanwhile.
                    Ok(_) | Err(Error::Precondition { .. } | Error::NotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            if listed.next.is_empty() {
                return Ok(());
            }
            page.token = listed.next;
        }
    }
}

impl Tenants {
    /// The limits that a tenant is held to, each with what is used of it.
    async fn limits_of(&self, id: &TenantId) -> Result<Vec<pb::LimitUsage>> {
        let Shared { parts, calls, uploads, reads, .. } = &*self.0;
        let counts = parts.store.count_of(id).await?;
        let phrases = parts.store.get_policy(id).await?.phrases.len() as u64;
        let used = [
            ("max_queued_per_tenant", parts.guard.held_by(id)),
            ("max_calls_per_tenant", calls.held_by(id)),
            ("max_uploads_per_tenant", uploads.held_by(id)),
            ("max_reads_per_tenant", reads.held_by(id)),
            ("max_jobs_per_tenant", counts.jobs),
            ("max_datasets_per_tenant", counts.datasets),
            ("max_adapters_per_tenant", counts.adapters),
            ("max_blocked_phrases", phrases),
        ];
        let limits = parts.limits.values();
        let usage = |(name, used): (&str, u64)| {
            let (_, limit, unit) = *limits.iter().find(|(limit, ..)| *limit == name)?;
            Some(pb::LimitUsage { name: name.to_owned(), used, limit, unit: unit.to_owned() })
        };
        Ok(used.into_iter().filter_map(usage).collect())
    }
}

#[tonic::async_trait]
impl TenantService for Tenants {
    async fn create_tenant(&self, request: Request<pb::CreateTenantRequest>) -> Answer<pb::Tenant> {
        self.0.auth.operator(request.extensions())?;
        let request = request.into_inner();
        let id = TenantId::new(&request.tenant_id)?;
        let display_name = convert::display_name(request.display_name)?;
        let weight = convert::weight("weight", request.weight.unwrap_or(1))?;
        let request_id = convert::request_id(request.request_id)?;
        let row = self.0.parts.store.create_tenant(&id, &display_name, weight, &request_id).await?;
        tracing::info!(tenant = %id, weight, "tenant created");
        Ok(Response::new(convert::tenant(row)))
    }

    async fn update_tenant(&self, request: Request<pb::UpdateTenantRequest>) -> Answer<pb::Tenant> {
        self.0.auth.operator(request.extensions())?;
        let request = request.into_inner();
        let tenant = request.tenant.unwrap_or_default();
        let id: TenantId = convert::name("tenant.name", &tenant.name)?;
        let etag = tenant.etag.clone();
        let change = convert::tenant_change(tenant, request.update_mask)?;
        let shared = self.0.clone();
        // To the end, also where the caller goes away: no key goes on with the old weight.
        let update = async move {
            let updated = shared.parts.store.update_tenant(&id, &change, &etag).await;
            // Also where it may have changed in spite of an error: it is looked up again.
            shared.auth.forget_tenant(&id);
            let row = updated?;
            tracing::info!(tenant = %id, weight = row.weight, "tenant updated");
            Ok(row)
        };
        Ok(Response::new(convert::tenant(spawn_uncancellable(update).await?)))
    }

    async fn get_tenant(&self, request: Request<pb::GetTenantRequest>) -> Answer<pb::GetTenantResponse> {
        let call = request.extensions();
        let id = match request.get_ref().name.as_str() {
            "" => self.0.auth.own_tenant(call)?.id().clone(),
            name => convert::name("name", name)?,
        };
        self.0.auth.tenant_for(call, &id).await?;
        let store = &self.0.parts.store;
        let (row, usage) = (store.get_tenant(&id).await?, store.get_usage(&id).await?);
        Ok(Response::new(pb::GetTenantResponse {
            tenant: Some(convert::tenant(row)),
            is_operator: self.0.auth.operator(call).is_ok(),
            usage: Some(convert::usage(&id, usage)),
            limits: self.limits_of(&id).await?,
        }))
    }

    async fn list_tenants(&self, request: Request<pb::ListTenantsRequest>) -> Answer<pb::ListTenantsResponse> {
        self.0.auth.operator(request.extensions())?;
        let request = request.into_inner();
        let list = convert::List::of("tenants", "the server");
        let page = list.page(request.page_size, request.page_token)?;
        let listed = self.0.parts.store.list_tenants(&page).await?;
        let tenants = listed.items.into_iter().map(convert::tenant).collect();
        Ok(Response::new(pb::ListTenantsResponse { tenants, next_page_token: list.token(&listed.next) }))
    }

    async fn delete_tenant(&self, request: Request<pb::DeleteTenantRequest>) -> Answer<pb::DeleteTenantResponse> {
        self.0.auth.operator(request.extensions())?;
        let id: TenantId = convert::name("name", &request.get_ref().name)?;
        if id.as_str() == OPERATOR_TENANT {
            return Err(Error::precondition("TENANT_IN_USE", id, "operators' own calls are counted under it").into());
        }
        let (tenant, leaving) = self.0.auth.begin_deleting(&id).await?;
        let this = Self(self.0.clone());
        // To the end, also where the caller goes away: a tenant that is gone has no calls. They end first, so that none makes a job
        // while the others are cancelled.
        spawn_uncancellable(async move {
            this.0.calls.live.end_tenant(&id, &Error::not_found(&id));
            this.delete(&tenant).await?;
            drop(leaving);
            tracing::info!(tenant = %id, "tenant deleted");
            Ok(())
        })
        .await?;
        Ok(Response::new(pb::DeleteTenantResponse {}))
    }

    async fn create_api_key(&self, request: Request<pb::CreateApiKeyRequest>) -> Answer<pb::CreateApiKeyResponse> {
        self.0.auth.operator(request.extensions())?;
        let request = request.into_inner();
        let owner: TenantId = convert::name("parent", &request.parent)?;
        let display_name = convert::display_name(request.display_name)?;
        let request_id = convert::request_id(request.request_id)?;
        let (row, secret) = self.0.parts.store.create_key(&owner, &display_name, &request_id).await?;
        tracing::info!(tenant = %owner, key = %row.id, "key created");
        Ok(Response::new(pb::CreateApiKeyResponse { api_key: Some(convert::key(&owner, row)), secret }))
    }

    async fn list_api_keys(&self, request: Request<pb::ListApiKeysRequest>) -> Answer<pb::ListApiKeysResponse> {
        self.0.auth.operator(request.extensions())?;
        let request = request.into_inner();
        let owner: TenantId = convert::name("parent", &request.parent)?;
        let list = convert::List::of("apiKeys", &owner);
        let page = list.page(request.page_size, request.page_token)?;
        let listed = self.0.parts.store.list_keys(&owner, &page).await?;
        let api_keys = listed.items.into_iter().map(|row| convert::key(&owner, row)).collect();
        Ok(Response::new(pb::ListApiKeysResponse { api_keys, next_page_token: list.token(&listed.next) }))
    }

    async fn revoke_api_key(&self, request: Request<pb::RevokeApiKeyRequest>) -> Answer<pb::RevokeApiKeyResponse> {
        self.0.auth.operator(request.extensions())?;
        let name: KeyName = convert::name("name", &request.get_ref().name)?;
        let shared = self.0.clone();
        // To the end, also where the caller goes away: a key that is revoked has no calls.
        spawn_uncancellable(async move {
            let revoked = shared.parts.store.revoke_key(&name).await;
            // Also where it may have been revoked in spite of an error: it is looked up again.
            shared.auth.forget_key(&name.key);
            revoked?;
            tracing::info!(tenant = %name.tenant, key = %name.key, "key revoked");
            let message = "this key was revoked while the call was under way; ask the operator for a new one".into();
            shared.calls.live.end_key(&name.key, &Error::Unauthenticated { message });
            Ok(())
        })
        .await?;
        Ok(Response::new(pb::RevokeApiKeyResponse {}))
    }

    async fn get_usage(&self, request: Request<pb::GetUsageRequest>) -> Answer<pb::TenantUsage> {
        let owner: TenantId = convert::name("name", &request.get_ref().name)?;
        self.0.auth.tenant_for(request.extensions(), &owner).await?;
        let row = self.0.parts.store.get_usage(&owner).await?;
        Ok(Response::new(convert::usage(&owner, row)))
    }
}
