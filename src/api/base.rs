//! BaseService: what the server runs, and its tokenizer.

use std::sync::Arc;

use prost::Message;
use tonic::{Request, Response};

use super::proto::base_service_server::BaseService;
use super::shared::Shared;
use super::{Answer, convert, proto as pb};
use crate::adapter::LinearShape;
use crate::error::{Error, Result};

pub struct Base(pub Arc<Shared>);

impl Base {
    /// The tokens of an answer, which must fit one message.
    fn tokens(&self, ids: &[u32]) -> Vec<pb::Token> {
        ids.iter().map(|id| convert::token(&self.0.parts.text, *id)).collect()
    }

    fn fits<T: Message>(&self, answer: T) -> Result<Response<T>> {
        let (has, most) = (answer.encoded_len() as u64, self.0.parts.limits.max_message_bytes);
        if has <= most {
            return Ok(Response::new(answer));
        }
        let message = format!("the answer has {has} bytes, one message at most {most}; send less in one call");
        Err(Error::Exhausted { limit: "max_message_bytes", message, retry_after: None })
    }
}

#[tonic::async_trait]
impl BaseService for Base {
    async fn get_base(&self, request: Request<pb::GetBaseRequest>) -> Answer<pb::Base> {
        self.0.auth.own_tenant(request.extensions())?;
        let parts = &self.0.parts;
        let limit = |(name, value, unit): (&str, u64, &str)| pb::Limit { name: name.into(), value, unit: unit.into() };
        let shape = parts.hub.shape();
        let linear = |linear: &LinearShape| pb::LinearLayer {
            name: linear.target.name().to_owned(),
            inputs: linear.inputs as u32,
            outputs: linear.outputs as u32,
        };
        Ok(Response::new(pb::Base {
            name: parts.base_name.clone(),
            digest: parts.base_digest.to_string(),
            context_length: parts.context_length as u32,
            vocabulary_size: parts.text.vocab_size() as u32,
            chat_template: parts.text.template_source(),
            template_digest: parts.text.template_digest().to_string(),
            special_tokens: self.tokens(&parts.text.control_ids()),
            end_token_ids: parts.text.ends().to_vec(),
            end_of_turn_token_id: parts.text.end_of_turn(),
            limits: parts.limits.values().into_iter().map(limit).collect(),
            server_version: env!("CARGO_PKG_VERSION").to_owned(),
            architecture: parts.architecture.to_owned(),
            layers: shape.layers,
            linear_layers: shape.linears.iter().map(linear).collect(),
        }))
    }

    async fn tokenize(&self, request: Request<pb::TokenizeRequest>) -> Answer<pb::TokenizeResponse> {
        let (_, call, request) = request.into_parts();
        let tenant = self.0.auth.own_tenant(&call)?;
        let generation_prompt = request.add_generation_prompt.unwrap_or(true);
        let prompt = convert::tokenize_input(request.input)?;
        let token_ids = self.0.parts.guard.tokenize(&tenant, prompt, generation_prompt).await?;
        let tokens = self.tokens(&token_ids);
        Ok(self.fits(pb::TokenizeResponse { token_ids, tokens })?)
    }

    async fn detokenize(&self, request: Request<pb::DetokenizeRequest>) -> Answer<pb::DetokenizeResponse> {
        self.0.auth.own_tenant(request.extensions())?;
        let request = request.into_inner();
        let (has, most) = (request.token_ids.len() as u64, self.0.parts.limits.max_detokenize_tokens);
        if has > most {
            let message = format!("has {has} ids; send at most {most} (limit max_detokenize_tokens)");
            return Err(Error::invalid_because("TOO_MANY_TOKENS", "token_ids", message).into());
        }
        let text = self.0.parts.text.decode(&request.token_ids, request.skip_special_tokens)?;
        Ok(self.fits(pb::DetokenizeResponse { text, tokens: self.tokens(&request.token_ids) })?)
    }
}
