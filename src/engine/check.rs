//! What a request must be before anything is taken or computed for it. Errors name the field as the protocol calls it.

use crate::engine::{Engine, EngineInfo, MAX_LOGPROBS, MAX_PRIORITY};
use crate::error::{Error, Result};
use crate::request::{BAN, GenerateSpec, Prompt, Sampling, Stopping};

/// Bytes that are reckoned for each log-probability of a Score; the text of its token comes on top.
const SCORE_ENTRY_BYTES: usize = 16;

/// Returns the bytes of a prompt's text: of a chat, what its messages say and the names of who speaks.
pub(super) fn text_bytes(prompt: &Prompt) -> usize {
    match prompt {
        Prompt::Text(text) => text.len(),
        Prompt::Chat(messages) | Prompt::ContinuedChat(messages) => {
            messages.iter().map(|message| message.content.len() + message.name.as_ref().map_or(0, String::len)).sum()
        }
        Prompt::TokenIds(_) => 0,
    }
}

impl Engine {
    /// What is known of a prompt before it is encoded: more text than the context's tokens could hold, or too many messages.
    pub(super) fn check_prompt(&self, field: &str, prompt: &Prompt) -> Result<()> {
        self.check_messages(field, prompt)?;
        let bytes = text_bytes(prompt);
        let (least, context) = (bytes.div_ceil(self.text.longest_token()), self.info.context);
        if least <= context {
            return Ok(());
        }
        let message = format!(
            "has {bytes} bytes, at least {least} tokens; the base's context is {context} tokens, the answer's included"
        );
        Err(Error::invalid_because("PROMPT_TOO_LONG", field, message))
    }

    /// What is known of a text to tokenize before it is encoded.
    pub(super) fn check_tokenize(&self, prompt: &Prompt) -> Result<()> {
        let (bytes, most) = (text_bytes(prompt), self.limits.max_tokenize_bytes);
        if bytes as u64 > most {
            let message = format!("has {bytes} bytes; send at most {most} (limit max_tokenize_bytes)");
            return Err(Error::invalid_because("TEXT_TOO_LONG", "input", message));
        }
        self.check_messages("chat", prompt)
    }

    fn check_messages(&self, field: &str, prompt: &Prompt) -> Result<()> {
        let most = self.limits.max_chat_messages;
        match prompt {
            Prompt::Chat(messages) | Prompt::ContinuedChat(messages) if messages.len() as u64 > most => {
                let message = format!("has {} messages, over the limit max_chat_messages of {most}", messages.len());
                Err(Error::invalid_because("TOO_MANY_MESSAGES", field, message))
            }
            _ => Ok(()),
        }
    }

    /// The answer must fit one message, reckoned without the text of its tokens.
    pub(super) fn check_score_size(&self, inputs: &[Vec<u32>], top: usize) -> Result<()> {
        let entries = inputs.iter().map(Vec::len).sum::<usize>() * (1 + top);
        let most = self.limits.max_message_bytes;
        if (entries * SCORE_ENTRY_BYTES) as u64 > most {
            return Err(score_too_large(entries, most));
        }
        Ok(())
    }

    /// Each value, and what only the base and the limits can tell: ids, counts, and that a token is left to draw.
    pub(super) fn check_sampling(&self, spec: &GenerateSpec) -> Result<()> {
        let (sampling, stopping) = (&spec.sampling, &spec.stopping);
        sampling.check()?;
        let Sampling { n, min_tokens, logit_bias, .. } = sampling;
        let most = self.limits.max_sequences_per_request;
        if *n == 0 || u64::from(*n) > most {
            return Err(Error::invalid("sampling.n", format!("must be 1 to {most} (limit max_sequences_per_request)")));
        }
        if *min_tokens > stopping.max_tokens {
            let message = format!("is over stopping.max_tokens, {}", stopping.max_tokens);
            return Err(Error::invalid("sampling.min_tokens", message));
        }
        let most = self.limits.max_logit_biases;
        if logit_bias.len() as u64 > most {
            let message = format!("has {} entries, over the limit max_logit_biases of {most}", logit_bias.len());
            return Err(Error::invalid("sampling.logit_bias", message));
        }
        let vocabulary = self.text.vocab_size();
        if let Some((id, _)) = logit_bias.iter().find(|(id, _)| *id as usize >= vocabulary) {
            let message = format!("{id} is not below the vocabulary's size, {vocabulary}");
            return Err(Error::invalid_because("TOKEN_OUT_OF_RANGE", "sampling.logit_bias", message));
        }
        let banned = |id: &u32| logit_bias.iter().any(|(other, bias)| other == id && *bias <= BAN);
        let withheld = if *min_tokens > 0 && !stopping.ignore_eos { self.text.ends() } else { &[] };
        let bans = logit_bias.iter().filter(|(_, bias)| *bias <= BAN).count();
        if bans + withheld.iter().filter(|id| !banned(id)).count() >= vocabulary {
            return Err(Error::invalid("sampling.logit_bias", "bans every token that could be drawn"));
        }
        Ok(())
    }

    pub(super) fn check_stopping(&self, stopping: &Stopping) -> Result<()> {
        let limits = &self.limits;
        if stopping.max_tokens == 0 {
            return Err(Error::invalid("stopping.max_tokens", "must be at least 1"));
        }
        if u64::from(stopping.max_tokens) > limits.max_answer_tokens {
            let message = format!("is over the limit max_answer_tokens of {} tokens", limits.max_answer_tokens);
            return Err(Error::invalid("stopping.max_tokens", message));
        }
        if stopping.stop.len() as u64 > limits.max_stop_strings {
            let message = format!("holds more than max_stop_strings, {}", limits.max_stop_strings);
            return Err(Error::invalid("stopping.stop", message));
        }
        let bad = |stop: &&String| stop.is_empty() || stop.len() as u64 > limits.max_stop_bytes;
        if stopping.stop.iter().any(|stop| bad(&stop)) {
            let message = format!("each string must have 1 to {} bytes (limit max_stop_bytes)", limits.max_stop_bytes);
            return Err(Error::invalid("stopping.stop", message));
        }
        Ok(())
    }

    /// The ids must fit the context with a token of the answer, and at their longest the whole KV cache. Gives how many they may become.
    pub(super) fn check_length(&self, field: &str, ids: &[u32], virtual_tokens: usize, answer: usize) -> Result<usize> {
        if ids.is_empty() {
            return Err(Error::invalid_because("PROMPT_EMPTY", field, "has no token"));
        }
        let EngineInfo { context, layout, paging, .. } = &self.info;
        let context = *context;
        let length = virtual_tokens + ids.len();
        if length + answer.min(1) > context {
            let has = ids.len();
            let of_adapter = match virtual_tokens {
                0 => String::new(),
                count => format!(" and the {count} virtual tokens of the adapter"),
            };
            let message =
                format!("has {has} tokens; the base's context is {context} tokens, the answer's{of_adapter} included");
            return Err(Error::invalid_because("PROMPT_TOO_LONG", field, message));
        }
        let longest = (length + answer).min(context);
        if paging.most(longest) > layout.blocks {
            let holds = paging.holds(layout.blocks, context);
            let message = format!(
                "and its answer may need {longest} tokens of KV cache; the cache holds {holds} (limit kv_cache_bytes)"
            );
            return Err(Error::invalid_because("KV_CACHE_TOO_SMALL", field, message));
        }
        Ok(longest)
    }
}

/// What a Score gets whose answer does not fit one message.
pub fn score_too_large(entries: usize, most: u64) -> Error {
    let message = format!(
        "{entries} log-probabilities do not fit one message of {most} bytes; score fewer tokens a call, lower top_logprobs, or set \
         omit_token_text"
    );
    Error::Exhausted { limit: "max_message_bytes", message, retry_after: None }
}

pub(super) fn check_logprobs(field: &str, top: u32) -> Result<()> {
    if top > MAX_LOGPROBS { Err(Error::invalid(field, format!("must be at most {MAX_LOGPROBS}"))) } else { Ok(()) }
}

pub(super) fn check_priority(priority: i32) -> Result<()> {
    if (-MAX_PRIORITY..=MAX_PRIORITY).contains(&priority) {
        return Ok(());
    }
    Err(Error::invalid("priority", format!("must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]")))
}
