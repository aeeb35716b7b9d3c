//! Which tokens are marks of a chat's form, by how they are written: files are not at one about their types.

/// Tokens that end an answer, in the vocabularies of the supported families. Where they are in a vocabulary they are control tokens.
const ENDS: [&str; 16] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<|EOT|>",
    "<EOT>",
    "[EOT]",
    "<turn|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|return|>",
    "<|call|>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
];

/// Ends too, but plain text in some vocabularies: only where the file says that they are control tokens.
const ENDS_IF_CONTROL: [&str; 3] = ["</s>", "<eos>", "[EOS]"];

/// Marks of a chat's or a text's form that no other rule of [`is_marker`] finds.
const MARKS: [&str; 9] = ["<start_of_turn>", "<s>", "</s>", "<bos>", "<eos>", "<unk>", "<pad>", "<sop>", "[gMASK]"];

/// What messages hold as text although templates write it too: reasoning and calls of tools, which answers are trained on.
const CONTENT_TAGS: [&str; 14] = [
    "think",
    "thinking",
    "reasoning",
    "answer",
    "tool_call",
    "tool_calls",
    "tool_response",
    "tool_result",
    "tool_results",
    "tools",
    "function",
    "arg_key",
    "arg_value",
    "scratchpad",
];

/// Whether a token is a control token by its name, whatever its type.
pub fn names_control(token: &str) -> bool {
    ENDS.contains(&token)
}

/// Whether a token ends an answer; `control` says whether it is a control token.
pub fn names_end(token: &str, control: bool) -> bool {
    ENDS.contains(&token) || (control && ENDS_IF_CONTROL.contains(&token))
}

/// Whether a token that the file calls user-defined is a mark of the chat's form all the same: it has a mark's look, or the base's template
/// writes it. White space, words, HTML's and the content's own tags are text.
pub fn is_marker(token: &str, template: &str) -> bool {
    let between = |open: &str, close: &str| token.strip_prefix(open).and_then(|rest| rest.strip_suffix(close));
    if token.trim().is_empty() || token.chars().count() < 2 {
        return false;
    }
    let tag = between("<", ">").map(|name| name.strip_prefix('/').unwrap_or(name));
    if tag.is_some_and(|name| CONTENT_TAGS.contains(&name)) {
        return false;
    }
    let capitals = |name: &str| !name.is_empty() && name.chars().all(|ch| ch.is_ascii_uppercase() || "/_".contains(ch));
    let barred = ["<|", "<\u{ff5c}"].iter().any(|open| token.starts_with(open))
        || ["|>", "\u{ff5c}>"].iter().any(|close| token.ends_with(close));
    names_end(token, true)
        || MARKS.contains(&token)
        || barred
        || between("[", "]").is_some_and(capitals)
        || template.contains(token)
}
