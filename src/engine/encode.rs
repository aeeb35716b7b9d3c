//! Prompts to ids: small ones at once, large ones a few at a time on threads of their own.

use std::sync::Arc;

use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};

use crate::engine::Engine;
use crate::engine::check::text_bytes;
use crate::engine::tickets::Ticket;
use crate::error::{Error, Result};
use crate::ids::TenantId;
use crate::request::Prompt;
use crate::sync::ByName;
use crate::text::Text;
use crate::work::block_holding;

/// Prompts of more bytes, or of more messages, are encoded off the runtime's threads.
const INLINE_BYTES: usize = 16 << 10;
const INLINE_MESSAGES: usize = 32;

/// Large prompts encoded at once: encoding takes a hundred times the memory of its text.
const AT_ONCE: usize = 2;

/// The places for encoding large prompts. They are given in the order of arrival, but no more than one prompt of a tenant stands in that
/// line at a time: its others stand behind that one, and keep nobody else waiting. Clones share the places.
#[derive(Debug, Clone)]
pub struct LargeEncodes {
    places: Arc<Semaphore>,
    /// Each tenant's own line, while somebody stands in it.
    lines: Arc<ByName<TenantId, Mutex<()>>>,
}

impl Default for LargeEncodes {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(AT_ONCE)), lines: Arc::default() }
    }
}

impl LargeEncodes {
    /// Waits for a place; it is given back on drop.
    async fn acquire(&self, tenant: &TenantId) -> Result<OwnedSemaphorePermit> {
        let line = self.lines.of(tenant);
        let _first = line.lock().await;
        Arc::clone(&self.places).acquire_owned().await.map_err(Error::internal)
    }
}

impl Engine {
    /// The ids of prompts that have been checked. Large ones hold the ticket to their end, also where the caller has gone.
    pub(super) async fn encode(
        &self,
        prompts: Vec<Prompt>,
        encode: impl Fn(&Text, usize, &Prompt) -> Result<Vec<u32>> + Send + 'static,
        tenant: &TenantId,
        ticket: &Arc<Ticket>,
    ) -> Result<Vec<Vec<u32>>> {
        let messages_of = |prompt: &Prompt| match prompt {
            Prompt::Text(_) => 1,
            Prompt::Chat(messages) | Prompt::ContinuedChat(messages) => messages.len(),
            Prompt::TokenIds(_) => 0,
        };
        let bytes: usize = prompts.iter().map(text_bytes).sum();
        let messages: usize = prompts.iter().map(messages_of).sum();
        if bytes <= INLINE_BYTES && messages <= INLINE_MESSAGES {
            return prompts.iter().enumerate().map(|(i, prompt)| encode(&self.text, i, prompt)).collect();
        }
        let place = self.large_encodes.acquire(tenant).await?;
        let text = self.text.clone();
        let work = move || prompts.iter().enumerate().map(|(i, prompt)| encode(&text, i, prompt)).collect();
        let (ids, _) = block_holding((place, ticket.clone()), work).await?;
        Ok(ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    /// However many large prompts one tenant has sent before, another's is the next but one.
    #[tokio::test]
    async fn one_tenants_large_prompts_keep_no_other_tenant_waiting() {
        let encodes = LargeEncodes::default();
        let (a, b) = (TenantId::new("a").unwrap(), TenantId::new("b").unwrap());
        let running = [encodes.acquire(&a).await.unwrap(), encodes.acquire(&a).await.unwrap()];
        let mut of_a: Vec<_> = (0..50).map(|_| Box::pin(encodes.acquire(&a))).collect();
        assert!(of_a.iter_mut().all(|waits| waits.as_mut().now_or_never().is_none()));
        let mut of_b = Box::pin(encodes.acquire(&b));
        assert!(of_b.as_mut().now_or_never().is_none());
        drop(running);
        assert!(of_a[0].as_mut().now_or_never().is_some());
        assert!(of_b.as_mut().now_or_never().is_some());
        drop((of_a, of_b));
        drop(encodes.acquire(&a).await.unwrap());
        assert_eq!(encodes.lines.remembered(), 1, "lines in which nobody stands are gone");
    }
}
