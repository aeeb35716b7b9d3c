//! GenerationService: answers and scores, and counting what they used.

use std::sync::Arc;

use futures::StreamExt as _;
use tonic::{Extensions, Request, Response};

use super::proto::generation_service_server::GenerationService;
use super::shared::Shared;
use super::{Answer, Streamed, convert, deadline_of, proto as pb};
use crate::error::Result;
use crate::ids::{AdapterRef, Tenant, TenantId};
use crate::request::{GenerateEvent, Usage};
use crate::store::UsageDelta;

pub struct Generation(pub Arc<Shared>);

impl Generation {
    /// The tenant that a call under this adapter is made for.
    async fn tenant(&self, call: &Extensions, adapter: &str) -> Result<Tenant> {
        if adapter.is_empty() {
            return self.0.auth.own_tenant(call);
        }
        let adapter: AdapterRef = convert::name("adapter", adapter)?;
        self.0.auth.tenant_for(call, adapter.tenant()).await
    }

    fn meter(&self, tenant: &Tenant) -> Meter {
        Meter { shared: self.0.clone(), tenant: tenant.id().clone(), used: Usage::default() }
    }
}

#[tonic::async_trait]
impl GenerationService for Generation {
    type GenerateStream = Streamed<pb::GenerateResponse>;

    async fn generate(&self, request: Request<pb::GenerateRequest>) -> Answer<Self::GenerateStream> {
        let (_, call, request) = request.into_parts();
        let tenant = self.tenant(&call, &request.adapter).await?;
        let spec = convert::generate_spec(request, deadline_of(&call), &self.0.parts.limits)?;
        let mut events = self.0.parts.guard.generate(&tenant, spec).await?;
        let mut meter = self.meter(&tenant);
        let answer = async_stream::try_stream! {
            while let Some(event) = events.next().await {
                let event = event?;
                meter.saw(&event);
                yield convert::response_of(event);
            }
        };
        Ok(Response::new(Box::pin(answer)))
    }

    async fn score(&self, request: Request<pb::ScoreRequest>) -> Answer<pb::ScoreResponse> {
        let (_, call, request) = request.into_parts();
        let tenant = self.tenant(&call, &request.adapter).await?;
        let spec = convert::score_spec(request, deadline_of(&call))?;
        let answer = self.0.parts.guard.score(&tenant, spec).await?;
        self.meter(&tenant).used = answer.usage;
        Ok(Response::new(convert::score_response(answer)))
    }
}

/// Adds what an answered call used to its tenant's account when it is dropped: at the end, or when the client has gone.
struct Meter {
    shared: Arc<Shared>,
    tenant: TenantId,
    used: Usage,
}

impl Meter {
    fn saw(&mut self, event: &GenerateEvent) {
        match event {
            GenerateEvent::Started { prompt_tokens, .. } => self.used.prompt_tokens = *prompt_tokens,
            GenerateEvent::Delta { tokens, .. } => self.used.completion_tokens += tokens.len() as u32,
            GenerateEvent::Finished { usage, .. } => self.used = *usage,
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        let delta = UsageDelta {
            requests: 1,
            prompt_tokens: self.used.prompt_tokens.into(),
            completion_tokens: self.used.completion_tokens.into(),
            training_tokens: 0,
        };
        let (shared, tenant) = (self.shared.clone(), self.tenant.clone());
        self.shared.calls.afterwards(async move {
            if let Err(error) = shared.parts.store.add_usage(&tenant, delta).await {
                tracing::error!(%tenant, %error, "usage was not counted");
            }
        });
    }
}
