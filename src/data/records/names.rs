//! The names by which fields, roles and values are known: each closed set, once.

/// Names of the prompt.
pub const PROMPTS: [&str; 3] = ["prompt", "question", "instruction"];
/// Names of what follows the prompt in the user's message, and of the prompt where none of its own names is there.
pub const EXTRAS: [&str; 2] = ["input", "query"];
/// Names of the answer.
pub const ANSWERS: [&str; 4] = ["completion", "response", "output", "answer"];
/// Names of a chat's list of messages.
pub const CHATS: [&str; 3] = ["messages", "conversations", "conversation"];
/// Names of the two answers of a preference, in each of the ways to write them.
pub const PAIRS: [[&str; 2]; 3] = [["chosen", "rejected"], ["chosen_messages", "rejected_messages"], OPENAI_PAIR];
/// OpenAI's, whose prompt is an object with messages.
pub const OPENAI_PAIR: [&str; 2] = ["preferred_output", "non_preferred_output"];
/// Alpaca's earlier rounds.
pub const HISTORY: &str = "history";

/// Names of a system message beside a chat or a prompt, written as [`plain`] has them.
const SYSTEMS: [&str; 13] = [
    "system",
    "systemprompt",
    "systemmessage",
    "systemmsg",
    "systeminstruction",
    "systeminstructions",
    "sysprompt",
    "sysmessage",
    "sysinstruction",
    "developer",
    "developerprompt",
    "developermessage",
    "developerinstruction",
];
/// Names of what a question is about, so that it makes no sense without, written as [`plain`] has them.
const CONTEXTS: [&str; 20] = [
    "context",
    "contexts",
    "article",
    "articles",
    "passage",
    "passages",
    "paragraph",
    "paragraphs",
    "document",
    "excerpt",
    "story",
    "background",
    "knowledge",
    "evidence",
    "sourcetext",
    "referencetext",
    "choices",
    "options",
    "answerchoices",
    "answeroptions",
];

/// The ways to name a message's role and content: OpenAI's, ShareGPT's.
pub const STYLES: [[&str; 2]; 2] = [["role", "content"], ["from", "value"]];
/// Other words for each of [`crate::text::ROLES`], in their order.
const ROLE_WORDS: [&[&str]; 3] =
    [&["developer"], &["human", "prompter"], &["gpt", "model", "bot", "chatgpt", "bing", "bard"]];
/// Roles of messages to and from tools.
const TOOL_ROLES: [&str; 9] = [
    "tool",
    "function",
    "observation",
    "function_call",
    "tool_call",
    "function_response",
    "tool_response",
    "ipython",
    "environment",
];

/// Names of the prompt, alone or with others.
pub fn asked() -> impl Iterator<Item = &'static str> {
    PROMPTS.into_iter().chain(EXTRAS)
}

/// Names of answers of a preference.
pub fn pair_answers() -> impl Iterator<Item = &'static str> {
    PAIRS.into_iter().flatten()
}

/// A name without case, signs and spaces.
fn plain(name: &str) -> String {
    name.chars().filter(|c| c.is_alphanumeric()).collect::<String>().to_ascii_lowercase()
}

/// Whether a field of this name is a system message.
pub fn is_system(name: &str) -> bool {
    SYSTEMS.contains(&plain(name).as_str())
}

/// Whether a field of this name is what a question is about.
pub fn is_context(name: &str) -> bool {
    CONTEXTS.contains(&plain(name).as_str())
}

/// What a message's role is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// One of [`crate::text::ROLES`].
    Chat(&'static str),
    Tool,
}

/// The role that a word names; `None` for one that is not known.
pub fn role(word: &str) -> Option<Role> {
    let lower = word.to_ascii_lowercase();
    let names = |(role, others): &(&str, &[&str])| *role == lower || others.contains(&lower.as_str());
    match crate::text::ROLES.into_iter().zip(ROLE_WORDS).find(names) {
        Some((role, _)) => Some(Role::Chat(role)),
        None => TOOL_ROLES.contains(&lower.as_str()).then_some(Role::Tool),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_known_however_they_are_written() {
        for system in ["system", "system_prompt", "systemInstruction", "sys-prompt", "System Message"] {
            assert!(is_system(system), "{system}");
        }
        for context in ["context", "Context", "answer_choices", "sourceText"] {
            assert!(is_context(context), "{context}");
        }
        assert!(!is_system("operating_system") && !is_context("context_length"));
        assert_eq!(role("GPT"), Some(Role::Chat("assistant")));
        assert_eq!((role("observation"), role("wizard")), (Some(Role::Tool), None));
    }
}
