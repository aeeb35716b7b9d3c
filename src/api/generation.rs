//! GenerationService: answers and scores, and counting what they used.

use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt as _;
use futures::stream::select_all;
use prost::Message as _;
use tonic::{Extensions, Request, Response};

use super::deadline::deadline_of;
use super::proto::generation_service_server::GenerationService;
use super::shared::Shared;
use super::{Answer, Streamed, convert, proto as pb, trace_of};
use crate::error::Result;
use crate::ids::{AdapterRef, Tenant, TenantId};
use crate::request::{GenerateEvent, Usage};
use crate::safety::score_too_large;
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

    fn meter(&self, tenant: &Tenant, deadline: Option<Instant>) -> Meter {
        Meter {
            shared: self.0.clone(),
            tenant: tenant.id().clone(),
            used: Usage::default(),
            finished: 0,
            seen: Vec::new(),
            failed: false,
            deadline,
        }
    }
}

#[tonic::async_trait]
impl GenerationService for Generation {
    type GenerateStream = Streamed<pb::GenerateResponse>;

    async fn generate(&self, request: Request<pb::GenerateRequest>) -> Answer<Self::GenerateStream> {
        let (_, call, request) = request.into_parts();
        let tenant = self.tenant(&call, &request.adapter).await?;
        let spec = convert::generate_spec(request, (deadline_of(&call), trace_of(&call)), &self.0.parts.limits)?;
        let answers = self.0.parts.guard.generate(&tenant, spec).await?;
        let count = answers.len();
        let mut events =
            select_all((0..).zip(answers).map(|(index, answer): (u32, _)| answer.map(move |event| (index, event))));
        let mut meter = self.meter(&tenant, deadline_of(&call));
        let text = self.0.parts.text.clone();
        let answer = async_stream::try_stream! {
            // An error of one answer ends the call, and with it the others.
            while let Some((index, event)) = events.next().await {
                let event = event.inspect_err(|_| meter.failed = true)?;
                meter.saw(index, &event);
                let usage = (meter.finished == count).then_some(meter.used);
                yield convert::response_of(index, event, usage, &text);
            }
        };
        Ok(Response::new(Box::pin(answer)))
    }

    async fn score(&self, request: Request<pb::ScoreRequest>) -> Answer<pb::ScoreResponse> {
        let (_, call, request) = request.into_parts();
        let tenant = self.tenant(&call, &request.adapter).await?;
        let text = (!request.omit_token_text).then_some(&*self.0.parts.text);
        let spec = convert::score_spec(request, (deadline_of(&call), trace_of(&call)))?;
        let answer = self.0.parts.guard.score(&tenant, spec).await?;
        self.meter(&tenant, None).used = answer.usage;
        let entries = answer.results.iter().flat_map(|result| &result.logprobs).map(|entry| 1 + entry.top.len()).sum();
        let response = convert::score_response(answer, text);
        let most = self.0.parts.limits.max_message_bytes;
        if response.encoded_len() as u64 > most {
            return Err(score_too_large(entries, most).into());
        }
        Ok(Response::new(response))
    }
}

/// Adds what an answered call used to its tenant's account when it is dropped: at the end, or when the client has gone.
struct Meter {
    shared: Arc<Shared>,
    tenant: TenantId,
    /// The prompt's tokens once, those of all answers, and what the first answer found in the prefix cache.
    used: Usage,
    /// Answers that have ended.
    finished: usize,
    /// Of each answer, the tokens seen.
    seen: Vec<u32>,
    /// The call has ended with an error.
    failed: bool,
    /// When it ends without one of its own.
    deadline: Option<Instant>,
}

impl Meter {
    fn saw(&mut self, index: u32, event: &GenerateEvent) {
        let at = index as usize;
        if self.seen.len() <= at {
            self.seen.resize(at + 1, 0);
        }
        match event {
            GenerateEvent::Started { prompt_tokens, virtual_tokens, .. } => {
                (self.used.prompt_tokens, self.used.virtual_tokens) = (*prompt_tokens, *virtual_tokens);
            }
            GenerateEvent::Delta { tokens, .. } => self.seen[at] += tokens.len() as u32,
            GenerateEvent::Finished { usage, .. } => {
                // Tokens that were held back to the end count too.
                self.seen[at] = usage.completion_tokens;
                self.finished += 1;
                if index == 0 {
                    self.used.cached_tokens = usage.cached_tokens;
                }
            }
        }
        self.used.completion_tokens = self.seen.iter().sum();
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        // What waited in vain has used nothing.
        let late = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        if (self.failed || late) && self.finished == 0 && self.used.completion_tokens == 0 {
            return;
        }
        let delta = UsageDelta {
            requests: 1,
            prompt_tokens: self.used.prompt_tokens.into(),
            completion_tokens: self.used.completion_tokens.into(),
            training_tokens: 0,
        };
        self.shared.parts.store.add_usage(&self.tenant, delta);
    }
}
