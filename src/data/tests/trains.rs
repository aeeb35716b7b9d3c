//! Files that train, each beside its plain form.

use super::*;

/// One question and its answer.
const PLAIN: &str = r#"{"messages":[{"role":"user","content":"Why?"},{"role":"assistant","content":"So."}]}"#;
/// The same under a system message.
const SYSTEM: &str = r#"{"messages":[{"role":"system","content":"Be kind."},{"role":"user","content":"Why?"},{"role":"assistant","content":"So."}]}"#;
/// Two rounds, both learnt.
const ROUNDS: &str = r#"{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello"},{"role":"user","content":"Why?"},{"role":"assistant","content":"So."}]}"#;
/// Two rounds, the last learnt.
const LAST: &str = r#"{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello","weight":0},{"role":"user","content":"Why?"},{"role":"assistant","content":"So."}]}"#;
const INPUT: &str = r#"{"messages":[{"role":"user","content":"Why?\nBlue"},{"role":"assistant","content":"So."}]}"#;

/// Name, plain form, file.
const CHATS: &[(&str, &str, &str)] = &[
    ("prompt and completion", PLAIN, r#"{"prompt":"Why?","completion":"So."}"#),
    (
        "prompt and completion as lists",
        PLAIN,
        r#"{"prompt":[{"role":"user","content":"Why?"}],"completion":[{"role":"assistant","content":"So."}]}"#,
    ),
    ("completion as one message", PLAIN, r#"{"prompt":"Why?","completion":{"role":"assistant","content":"So."}}"#),
    (
        "completion that repeats its prompt",
        PLAIN,
        r#"{"prompt":[{"role":"user","content":"Why?"}],"completion":[{"role":"user","content":"Why?"},{"role":"assistant","content":"So."}]}"#,
    ),
    (
        "completion that repeats a text prompt",
        PLAIN,
        r#"{"prompt":"Why?","completion":[{"role":"user","content":"Why?"},{"role":"assistant","content":"So."}]}"#,
    ),
    (
        "completion that brings the system message of its prompt",
        SYSTEM,
        r#"{"prompt":"Why?","completion":[{"role":"system","content":"Be kind."},{"role":"user","content":"Why?"},{"role":"assistant","content":"So."}]}"#,
    ),
    ("question and answer", PLAIN, r#"{"question":"Why?","answer":"So."}"#),
    ("a system message by another name", SYSTEM, r#"{"system_message":"Be kind.","prompt":"Why?","completion":"So."}"#),
    ("a system message in camel case", SYSTEM, r#"{"systemPrompt":"Be kind.","prompt":"Why?","completion":"So."}"#),
    (
        "a chat beside the question it begins with",
        PLAIN,
        r#"{"question":"Why?","messages":[{"role":"user","content":"Why?"},{"role":"assistant","content":"So."}]}"#,
    ),
    (
        "flags that turn off what they name",
        PLAIN,
        r#"{"prompt":"Why?","completion":"So.","thinking":false,"reasoning":"off","tools":false,"has_image":false}"#,
    ),
    (
        "a message that is whole by its flag",
        PLAIN,
        r#"{"messages":[{"role":"user","content":"Why?"},{"role":"assistant","content":"So.","prefix":false}]}"#,
    ),
    ("question and response", PLAIN, r#"{"question":"Why?","response":"So."}"#),
    ("query and response", PLAIN, r#"{"query":"Why?","response":"So."}"#),
    ("input and output", PLAIN, r#"{"input":"Why?","output":"So."}"#),
    ("prompt, query and response", INPUT, r#"{"prompt":"Why?","query":"Blue","response":"So."}"#),
    (
        "prompt list with an answer before",
        LAST,
        r#"{"prompt":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello"},{"role":"user","content":"Why?"}],"completion":"So."}"#,
    ),
    ("Alpaca", PLAIN, r#"{"instruction":"Why?","input":"","output":"So."}"#),
    ("Alpaca without input", PLAIN, r#"{"instruction":"Why?","output":"So."}"#),
    ("Alpaca with null input", PLAIN, r#"{"instruction":"Why?","input":null,"output":"So."}"#),
    ("Alpaca with input", INPUT, r#"{"instruction":"Why?","input":"Blue","output":"So."}"#),
    ("Alpaca with system", SYSTEM, r#"{"instruction":"Why?","input":"","output":"So.","system":"Be kind."}"#),
    (
        "Alpaca with empty system and history",
        PLAIN,
        r#"{"instruction":"Why?","input":"","output":"So.","system":"","history":[]}"#,
    ),
    ("Alpaca with history", ROUNDS, r#"{"instruction":"Why?","input":"","output":"So.","history":[["Hi","Hello"]]}"#),
    (
        "Alpaca with its rendered text",
        PLAIN,
        r#"{"instruction":"Why?","input":"","output":"So.","text":"Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\nWhy?\n\n### Response:\nSo."}"#,
    ),
    (
        "Alpaca with an input and its rendered text",
        INPUT,
        r#"{"instruction":"Why?","input":"Blue","output":"So.","text":"Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n### Instruction:\nWhy?\n\n### Input:\nBlue\n\n### Response:\nSo."}"#,
    ),
    (
        "a chat with its rendered text",
        SYSTEM,
        r#"{"system":"Be kind.","prompt":"Why?","completion":"So.","text":"<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"}"#,
    ),
    (
        "a chat with its rendered text, without the system message",
        SYSTEM,
        r#"{"system":"Be kind.","prompt":"Why?","completion":"So.","text":"<s>[INST] Why? [/INST] So. </s>"}"#,
    ),
    ("Gemini's system instruction", SYSTEM, r#"{"systemInstruction":"Be kind.","prompt":"Why?","completion":"So."}"#),
    ("sys_prompt", SYSTEM, r#"{"sys_prompt":"Be kind.","prompt":"Why?","completion":"So."}"#),
    (
        "a chat with its rendered text, and the template's own system message and empty thoughts",
        PLAIN,
        r#"{"prompt":"Why?","completion":"So.","text":"<|im_start|>system\nYou are a helpful model.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nSo.<|im_end|>\n"}"#,
    ),
    (
        "a chat with its text as DeepSeek renders it",
        PLAIN,
        r#"{"prompt":"Why?","completion":"So.","text":"<｜begin▁of▁sentence｜><｜User｜>Why?<｜Assistant｜>So.<｜end▁of▁sentence｜>"}"#,
    ),
    (
        "an answer that is its prompt, mended",
        r#"{"messages":[{"role":"user","content":"hello how are you today"},{"role":"assistant","content":"hello how are you today?"}]}"#,
        r#"{"input":"hello how are you today","output":"hello how are you today?"}"#,
    ),
    (
        "choices that the prompt has, and words about the record",
        r#"{"prompt":"Is it Yes or No?","completion":"Yes"}"#,
        r#"{"prompt":"Is it Yes or No?","completion":"Yes","choices":["Yes","No"],"document":"manual.pdf","options":{"temperature":0.2},"context":[1,2]}"#,
    ),
    (
        "a document that the system message has",
        r#"{"system":"The sea is salty by its rocks.","prompt":"Why?","completion":"So."}"#,
        r#"{"system":"The sea is salty by its rocks.","document":"The sea is salty by its rocks.","prompt":"Why?","completion":"So."}"#,
    ),
    (
        "a context that the prompt has",
        r#"{"prompt":"The sea is salty by its rocks. Why?","completion":"So."}"#,
        r#"{"prompt":"The sea is salty by its rocks. Why?","context":"The sea is salty by its rocks.","completion":"So."}"#,
    ),
    (
        "flags that say what is done anyway",
        PLAIN,
        r#"{"unmask":false,"messages":[{"role":"user","content":"Why?","train":false},{"role":"assistant","content":"So.","train":true}]}"#,
    ),
    (
        "figures and words by the names of what is refused",
        PLAIN,
        r#"{"prompt":"Why?","completion":"So.","tokens":12,"video_title":"Cats","tools":"None","is_reasoning_complete":[true],"chosen":7}"#,
    ),
    (
        "an answer that looks like a message and is none",
        r#"{"messages":[{"role":"user","content":"Where?"},{"role":"assistant","content":"{\"from\":\"Berlin\",\"value\":3}"}]}"#,
        r#"{"prompt":"Where?","completion":"{\"from\":\"Berlin\",\"value\":3}"}"#,
    ),
    ("Alpaca with response", PLAIN, r#"{"instruction":"Why?","response":"So."}"#),
    ("ShareGPT", PLAIN, r#"{"conversations":[{"from":"human","value":"Why?"},{"from":"gpt","value":"So."}]}"#),
    (
        "ShareGPT with an id",
        PLAIN,
        r#"{"id":"x_0","conversations":[{"from":"human","value":"Why?"},{"from":"gpt","value":"So."}]}"#,
    ),
    (
        "ShareGPT with a system turn",
        SYSTEM,
        r#"{"conversations":[{"from":"system","value":"Be kind."},{"from":"human","value":"Why?"},{"from":"gpt","value":"So."}]}"#,
    ),
    (
        "ShareGPT with a system column",
        SYSTEM,
        r#"{"system":"Be kind.","conversations":[{"from":"human","value":"Why?"},{"from":"gpt","value":"So."}]}"#,
    ),
    (
        "ShareGPT with user and assistant",
        PLAIN,
        r#"{"conversations":[{"from":"user","value":"Why?"},{"from":"assistant","value":"So."}]}"#,
    ),
    (
        "ShareGPT with weights",
        LAST,
        r#"{"conversations":[{"from":"human","value":"Hi","weight":0},{"from":"gpt","value":"Hello","weight":0},{"from":"human","value":"Why?"},{"from":"gpt","value":"So.","weight":1}]}"#,
    ),
    (
        "ShareGPT with empty columns",
        PLAIN,
        r#"{"conversations":[{"from":"human","value":"Why?","markdown":null},{"from":"gpt","value":"So.","text":""}],"system":"","tools":""}"#,
    ),
    (
        "ShareGPT with an empty list of tools as text",
        PLAIN,
        r#"{"conversations":[{"from":"human","value":"Why?"},{"from":"gpt","value":"So."}],"tools":"[]"}"#,
    ),
    (
        "conversations in OpenAI's words",
        PLAIN,
        r#"{"conversations":[{"role":"user","content":"Why?"},{"role":"assistant","content":"So."}]}"#,
    ),
    (
        "messages in ShareGPT's words",
        PLAIN,
        r#"{"messages":[{"from":"human","value":"Why?"},{"from":"gpt","value":"So."}]}"#,
    ),
    (
        "a system column beside messages",
        SYSTEM,
        r#"{"messages":[{"role":"user","content":"Why?"},{"role":"assistant","content":"So."}],"system":"Be kind."}"#,
    ),
    (
        "a system column that repeats the system message",
        SYSTEM,
        r#"{"messages":[{"role":"system","content":"Be kind."},{"role":"user","content":"Why?"},{"role":"assistant","content":"So."}],"system":"Be kind."}"#,
    ),
    (
        "system_prompt, question and response",
        SYSTEM,
        r#"{"system_prompt":"Be kind.","question":"Why?","response":"So."}"#,
    ),
    (
        "developer is system",
        SYSTEM,
        r#"{"messages":[{"role":"developer","content":"Be kind."},{"role":"user","content":"Why?"},{"role":"assistant","content":"So."}]}"#,
    ),
    (
        "content parts of type text",
        PLAIN,
        r#"{"messages":[{"role":"user","content":[{"type":"text","text":"Wh"},{"type":"text","text":"y?"}]},{"role":"assistant","content":[{"type":"text","text":"So."}]}]}"#,
    ),
    (
        "nulls and empties in messages",
        PLAIN,
        r#"{"messages":[{"role":"user","content":"Why?","name":null,"weight":null},{"role":"assistant","content":"So.","tool_calls":[],"refusal":null,"function_call":null,"audio":null,"reasoning_content":""}]}"#,
    ),
    (
        "nulls and empties in the record",
        PLAIN,
        r#"{"messages":[{"role":"user","content":"Why?"},{"role":"assistant","content":"So."}],"tools":null,"label":null,"images":[],"functions":[],"system":null,"text":"","chosen":null}"#,
    ),
    (
        "a weight of 0 on the user",
        PLAIN,
        r#"{"messages":[{"role":"user","content":"Why?","weight":0},{"role":"assistant","content":"So.","weight":1}]}"#,
    ),
    (
        "a weight of 0.0",
        LAST,
        r#"{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello","weight":0.0},{"role":"user","content":"Why?"},{"role":"assistant","content":"So.","weight":1.0}]}"#,
    ),
    (
        "messages with their prompt",
        PLAIN,
        r#"{"prompt":"Why?","prompt_id":"8f","messages":[{"role":"user","content":"Why?"},{"role":"assistant","content":"So."}]}"#,
    ),
    (
        "ids of messages",
        PLAIN,
        r#"{"messages":[{"id":"1","role":"user","content":"Why?"},{"id":"2","role":"assistant","content":"So."}]}"#,
    ),
    ("escapes", PLAIN, r#"{"prompt":"\u0057hy?","completion":"So."}"#),
];

const PAIR: &str = r#"{"prompt":[{"role":"user","content":"Why?"}],"chosen":[{"role":"assistant","content":"So."}],"rejected":[{"role":"assistant","content":"No."}]}"#;
const PAIR_SYSTEM: &str = r#"{"prompt":[{"role":"system","content":"Be kind."},{"role":"user","content":"Why?"}],"chosen":[{"role":"assistant","content":"So."}],"rejected":[{"role":"assistant","content":"No."}]}"#;
const PAIR_ROUNDS: &str = r#"{"prompt":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello"},{"role":"user","content":"Why?"}],"chosen":"So.","rejected":"No."}"#;
const PAIR_INPUT: &str = r#"{"prompt":"Why?\nBlue","chosen":"So.","rejected":"No."}"#;
/// The whole chats.
const GOOD: &str = r#"[{"role":"user","content":"Why?"},{"role":"assistant","content":"So."}]"#;
const BAD: &str = r#"[{"role":"user","content":"Why?"},{"role":"assistant","content":"No."}]"#;

fn pairs() -> Vec<(&'static str, &'static str, String)> {
    let wholes = |prompt: &str| format!(r#"{{{prompt}"chosen":{GOOD},"rejected":{BAD}}}"#);
    let two = |name, plain, file: &str| (name, plain, file.to_owned());
    vec![
        two("strings", PAIR, r#"{"prompt":"Why?","chosen":"So.","rejected":"No."}"#),
        two(
            "a judge's rationale",
            PAIR,
            r#"{"prompt":"Why?","chosen":"So.","rejected":"No.","rationale":"The first one answers."}"#,
        ),
        two("question", PAIR, r#"{"question":"Why?","chosen":"So.","rejected":"No."}"#),
        two(
            "system, question",
            PAIR_SYSTEM,
            r#"{"system":"Be kind.","question":"Why?","chosen":"So.","rejected":"No."}"#,
        ),
        two("an empty system", PAIR, r#"{"system":"","question":"Why?","chosen":"So.","rejected":"No."}"#),
        ("implicit prompt", PAIR, wholes("")),
        ("a prompt of text beside whole chats", PAIR, wholes(r#""prompt":"Why?","#)),
        ("an empty prompt beside whole chats", PAIR, wholes(r#""prompt":"","#)),
        ("a prompt list that the chats repeat", PAIR, wholes(r#""prompt":[{"role":"user","content":"Why?"}],"#)),
        (
            "a prompt, the chats, and the chosen chat again",
            PAIR,
            wholes(&format!(r#""prompt":"Why?","prompt_id":"1","messages":{GOOD},"score_chosen":8.0,"#)),
        ),
        ("the chosen chat again without a prompt", PAIR, wholes(&format!(r#""messages":{GOOD},"#))),
        ("a system column beside whole chats", PAIR_SYSTEM, wholes(r#""system":"Be kind.","#)),
        two(
            "one side a whole chat",
            PAIR,
            r#"{"prompt":"Why?","chosen":[{"role":"user","content":"Why?"},{"role":"assistant","content":"So."}],"rejected":"No."}"#,
        ),
        two(
            "whole chats with a system message and a prompt of text",
            PAIR_SYSTEM,
            r#"{"prompt":"Why?","chosen":[{"role":"system","content":"Be kind."},{"role":"user","content":"Why?"},{"role":"assistant","content":"So."}],"rejected":[{"role":"system","content":"Be kind."},{"role":"user","content":"Why?"},{"role":"assistant","content":"No."}]}"#,
        ),
        two(
            "whole chats of two rounds and their first prompt",
            PAIR_ROUNDS,
            r#"{"prompt":"Hi","chosen":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello"},{"role":"user","content":"Why?"},{"role":"assistant","content":"So."}],"rejected":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello"},{"role":"user","content":"Why?"},{"role":"assistant","content":"No."}]}"#,
        ),
        two(
            "single objects",
            PAIR,
            r#"{"prompt":"Why?","chosen":{"role":"assistant","content":"So."},"rejected":{"role":"assistant","content":"No."}}"#,
        ),
        two(
            "LLaMA-Factory's conversations",
            PAIR,
            r#"{"conversations":[{"from":"human","value":"Why?"}],"chosen":{"from":"gpt","value":"So."},"rejected":{"from":"gpt","value":"No."}}"#,
        ),
        two(
            "LLaMA-Factory's conversations with a system turn",
            PAIR_SYSTEM,
            r#"{"conversations":[{"from":"system","value":"Be kind."},{"from":"human","value":"Why?"}],"chosen":{"from":"gpt","value":"So."},"rejected":{"from":"gpt","value":"No."}}"#,
        ),
        two(
            "LLaMA-Factory's conversations with a system column",
            PAIR_SYSTEM,
            r#"{"conversations":[{"from":"human","value":"Why?"}],"system":"Be kind.","chosen":{"from":"gpt","value":"So."},"rejected":{"from":"gpt","value":"No."}}"#,
        ),
        two(
            "messages as the prompt",
            PAIR,
            r#"{"messages":[{"role":"user","content":"Why?"}],"chosen":{"role":"assistant","content":"So."},"rejected":{"role":"assistant","content":"No."}}"#,
        ),
        two("Alpaca's preferences", PAIR, r#"{"instruction":"Why?","input":"","chosen":"So.","rejected":"No."}"#),
        two(
            "Alpaca's preferences with input",
            PAIR_INPUT,
            r#"{"instruction":"Why?","input":"Blue","chosen":"So.","rejected":"No."}"#,
        ),
        two(
            "Alpaca's preferences with history",
            PAIR_ROUNDS,
            r#"{"instruction":"Why?","history":[["Hi","Hello"]],"chosen":"So.","rejected":"No."}"#,
        ),
        two(
            "OpenAI",
            PAIR,
            r#"{"input":{"messages":[{"role":"user","content":"Why?"}],"tools":[],"parallel_tool_calls":true},"preferred_output":[{"role":"assistant","content":"So."}],"non_preferred_output":[{"role":"assistant","content":"No."}]}"#,
        ),
        two(
            "OpenAI with parts",
            PAIR,
            r#"{"input":{"messages":[{"role":"user","content":[{"type":"text","text":"Why?"}]}]},"preferred_output":[{"role":"assistant","content":"So."}],"non_preferred_output":[{"role":"assistant","content":"No."}]}"#,
        ),
        two(
            "chosen_messages",
            PAIR,
            r#"{"chosen_messages":[{"role":"user","content":"Why?"},{"role":"assistant","content":"So."}],"rejected_messages":[{"role":"user","content":"Why?"},{"role":"assistant","content":"No."}]}"#,
        ),
        two(
            "scores beside the answers",
            PAIR,
            r#"{"prompt":"Why?","chosen":"So.","rejected":"No.","label":null,"score_chosen":9,"score_rejected":2}"#,
        ),
    ]
}

#[test]
fn chats_train_as_their_plain_form() {
    for (name, plain, file) in CHATS {
        let expected = sft(plain).unwrap();
        assert!(expected[0].in_loss.contains(&true));
        assert_eq!(sft(file).unwrap_or_else(|e| panic!("{name}: {e}")), expected, "{name}");
    }
}

#[test]
fn preferences_train_as_their_plain_form() {
    for (name, plain, file) in pairs() {
        let expected = dpo(plain).unwrap();
        assert_eq!(dpo(&file).unwrap_or_else(|e| panic!("{name}: {e}")), expected, "{name}");
    }
}

#[test]
fn containers_hold_the_same_records() {
    let lines = format!("{PLAIN}\n{ROUNDS}\n{SYSTEM}\n");
    let expected = sft(&lines).unwrap();
    let values: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let objects: String = values.iter().map(|value| format!("{value:#}\n")).collect();
    let array = serde_json::to_string(&values).unwrap();
    for (format, file) in [
        ("JSON Lines", lines.replace('\n', "\r\n").into_bytes()),
        ("JSON Lines", lines.trim_end().into()),
        ("JSON Lines", lines.replace('\n', "\n\n \n").into_bytes()),
        ("JSON Lines, byte order mark", format!("\u{feff}{lines}").into_bytes()),
        ("JSON Lines, gzip", gzip(&lines)),
        ("JSON Lines, gzip", [gzip(&format!("{PLAIN}\n")), gzip(&format!("{ROUNDS}\n{SYSTEM}"))].concat()),
        ("JSON array", array.clone().into_bytes()),
        ("JSON array", serde_json::to_vec_pretty(&values).unwrap()),
        ("JSON array", format!("[\n{}\n]", lines.trim_end().replace('\n', ",\n")).into_bytes()),
        ("JSON array, byte order mark", format!("\u{feff}{array}").into_bytes()),
        ("JSON array, gzip, byte order mark", gzip(&format!("\u{feff}{array}"))),
        // As Python writes it with indent=0.
        (
            "JSON objects",
            objects.lines().map(|line| format!("{}\n", line.trim_start())).collect::<String>().into_bytes(),
        ),
        ("JSON objects", objects.into_bytes()),
    ] {
        let (sequences, found, _) = read(DatasetKind::Sft, &file).unwrap_or_else(|e| panic!("{format}: {e}"));
        assert_eq!(found, format);
        assert_eq!(sequences, expected, "{format}");
    }
}

#[test]
fn what_is_not_used_is_counted_by_name() {
    let file = r#"{"prompt":"a","completion":"b","score":0.5,"source":"x","meta":null}
        {"prompt":"a","completion":"b","score":0.1,"tags":[]}
        {"messages":[{"id":"1","role":"user","content":"a"},{"role":"assistant","content":"b"}],"score":1}"#;
    let (_, _, ignored) = read(DatasetKind::Sft, file.as_bytes()).unwrap();
    assert_eq!(ignored, [("score".to_owned(), 3), ("source".to_owned(), 1)]);
    let many: String =
        (0..50).map(|i| format!("{{\"prompt\":\"a\",\"completion\":\"b\",\"field{i:02}\":1}}\n")).collect();
    let text = Text::tiny();
    let findings = read_all(Reader::of_stored(DatasetKind::Sft, text), many.as_bytes(), &mut |_| Ok(())).unwrap();
    assert_eq!((findings.ignored.len(), findings.more_ignored), (32, 18));
}
