//! Files that are refused, each with words of the true reason.

use super::*;

/// Name, file, words of the reason.
const CHATS: &[(&str, &str, &str)] = &[
    ("CSV", "prompt,completion\nWhy?,So.\n", "is CSV, not JSON; convert it: python3"),
    ("CSV with quotes", "\"prompt\",\"completion\"\n\"Why, then?\",\"So.\"\n", "is CSV"),
    ("TSV", "prompt\tcompletion\nWhy?\tSo.\n", "is TSV"),
    ("YAML", "- prompt: Why?\n  completion: So.\n", "is YAML"),
    ("HTML", "<!DOCTYPE html>\n<html></html>", "is HTML"),
    ("plain text", "Anarchism is a political philosophy, and more.\n", "is plain text"),
    ("a Git LFS pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    ("Parquet", "PAR1\u{15}\u{4}", "is a Parquet file"),
    ("Arrow", "ARROW1\0\0", "is an Arrow file"),
    ("zip", "PK\u{3}\u{4}", "is a zip archive"),
    ("single quotes", "{'prompt': 'Why?', 'completion': 'So.'}\n", "single quotes"),
    (
        "a comma after each object",
        "{\"prompt\":\"a\",\"completion\":\"b\"},\n{\"prompt\":\"a\",\"completion\":\"b\"}\n",
        "comma after the object",
    ),
    ("NaN", r#"{"prompt":"a","completion":"b","score":NaN}"#, "has NaN at column 40"),
    ("Infinity", r#"{"prompt":"a","completion":"b","score":-Infinity}"#, "Infinity"),
    ("Python's None", r#"{"prompt":"a","completion":None}"#, "Python's None"),
    ("a trailing comma", r#"{"prompt":"a","completion":"b",}"#, "comma before the closing bracket"),
    (
        "a trailing comma in an array",
        r#"[{"prompt":"a","completion":"b"},]"#,
        "comma before the array's closing bracket",
    ),
    ("an array cut short", r#"[{"prompt":"a","completion":"b"},"#, "cut short"),
    ("a line cut short", "{\"prompt\":\"a\",\"completion\":\"b\"}\n{\"prompt\":\"a\",\"comp", "line 2: ends before"),
    ("a comment", "{\"prompt\":\"a\", // x\n\"completion\":\"b\"}", "comment"),
    ("keys without quotes", "{prompt: \"a\", completion: \"b\"}", "key without quotes"),
    ("a line break in a string", "{\"prompt\":\"a\nb\",\"completion\":\"c\"}", "line break"),
    ("a key twice", r#"{"prompt":"a","completion":"b","completion":"c"}"#, "the key \"completion\" twice"),
    ("JSON within strings", "\"{\\\"prompt\\\":\\\"a\\\"}\"\n", "within strings"),
    (
        "a bare list of messages",
        r#"[[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]]"#,
        "jq -c '.[] | {messages: .}' IN",
    ),
    ("JSON within strings in an array", r#"["{\"prompt\":\"a\",\"completion\":\"b\"}"]"#, "jq -c '.[] | fromjson' IN"),
    (
        "messages as JSON in a string in an array",
        r#"[{"messages":"[{\"role\":\"user\",\"content\":\"a\"}]"}]"#,
        "jq -c '.[] | .messages |= fromjson' IN",
    ),
    ("an array with null", r#"[null, {"prompt":"a","completion":"b"}]"#, "must be a JSON object"),
    ("a comment before the records", "# made by x\n{\"prompt\":\"a\",\"completion\":\"b\"}\n", "begins with a comment"),
    (
        "messages one by one",
        r#"[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]"#,
        "if the file is one conversation: jq -c '{messages: .}' IN",
    ),
    ("records inside of a field", r#"{"data":[{"prompt":"a","completion":"b"}]}"#, "jq -c '.[\"data\"][]'"),
    ("a record inside of a field", r#"{"row_idx":0,"row":{"prompt":"a","completion":"b"}}"#, "jq -c '.[\"row\"]'"),
    ("columns", r#"{"prompt":["a","b"],"completion":["c","d"]}"#, "columns"),
    ("messages as JSON in a string", r#"{"messages":"[{\"role\":\"user\"}]"}"#, "fromjson"),
    ("plain text as JSON", r#"{"text":"Once upon a time"}"#, "is plain text (\"text\")"),
    (
        "a rendered text that says more",
        r####"{"prompt":"a","completion":"b","text":"### Instruction:\na\n\n### Response:\nb<think>secret</think>"}"####,
        "says more than the chat (\"<think>secret</think>\")",
    ),
    (
        "a rendered text with another input",
        r####"{"instruction":"a","input":"x","output":"b","text":"### Instruction:\na\n\n### Input:\nSomething else.\n\n### Response:\nb"}"####,
        "the two differ",
    ),
    (
        "text that differs from the chat beside it",
        r#"{"prompt":"a","completion":"b","text":"something else"}"#,
        "the two differ",
    ),
    ("unpaired labels", r#"{"prompt":"a","completion":"b","label":true}"#, "unpaired label"),
    (
        "unpaired labels of chats",
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"label":false}"#,
        "unpaired label",
    ),
    ("kto_tag", r#"{"instruction":"a","output":"b","kto_tag":true}"#, "unpaired label"),
    ("stepwise labels", r#"{"prompt":"a","completions":["b","c"],"labels":[true,false]}"#, "several completions"),
    (
        "tools",
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"tools":[{"type":"function"}]}"#,
        "uses tools",
    ),
    (
        "tools as text",
        r#"{"conversations":[{"from":"human","value":"a"},{"from":"gpt","value":"b"}],"tools":"[{\"name\":\"f\"}]"}"#,
        "uses tools",
    ),
    (
        "tool calls",
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":null,"tool_calls":[{"id":"1"}]}]}"#,
        "uses tools (messages[1].tool_calls)",
    ),
    (
        "tool messages",
        r#"{"messages":[{"role":"user","content":"a"},{"role":"tool","content":"x"},{"role":"assistant","content":"b"}]}"#,
        "uses tools (messages[1].role",
    ),
    (
        "ShareGPT's function calls",
        r#"{"conversations":[{"from":"human","value":"a"},{"from":"function_call","value":"{}"},{"from":"gpt","value":"b"}]}"#,
        "uses tools (conversations[1].from",
    ),
    (
        "images",
        r#"{"messages":[{"role":"user","content":"<image>a"},{"role":"assistant","content":"b"}],"images":["1.jpg"]}"#,
        "only text can be trained",
    ),
    (
        "image parts",
        r#"{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]},{"role":"assistant","content":"b"}]}"#,
        "messages[0].content[0] is of type \"image_url\"",
    ),
    (
        "loss weights of messages",
        r#"{"messages":[{"role":"user","content":"a","loss_weight":0.0},{"role":"assistant","content":"b","loss_weight":1.0}]}"#,
        "messages[0].loss_weight says which part is learnt",
    ),
    (
        "training flags of messages",
        r#"{"conversations":[{"from":"human","value":"a"},{"from":"gpt","value":"b","train":false}]}"#,
        "conversations[1].train says which part",
    ),
    (
        "masks of messages",
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","mask":1}]}"#,
        "messages[1].mask says which part",
    ),
    (
        "reasoning",
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","reasoning_content":"c"}]}"#,
        "reasoning beside the answer",
    ),
    (
        "thinking",
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","thinking":"c"}]}"#,
        "reasoning beside the answer",
    ),
    (
        "a prefix flag",
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","prefix":true}]}"#,
        "messages[1].prefix is not supported",
    ),
    (
        "any other field of a message",
        r#"{"messages":[{"role":"user","content":"a","mood":"sad"},{"role":"assistant","content":"b"}]}"#,
        "messages[0].mood is not supported",
    ),
    (
        "a refusal",
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","refusal":"no"}]}"#,
        "messages[1].refusal is not supported",
    ),
    (
        "weights between 0 and 1",
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":0.5}]}"#,
        "weight must be 0 or 1",
    ),
    (
        "nothing to learn",
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":0}]}"#,
        "nothing to learn",
    ),
    (
        "an unknown role",
        r#"{"messages":[{"role":"wizard","content":"a"},{"role":"assistant","content":"b"}]}"#,
        "messages[0].role is \"wizard\"",
    ),
    (
        "content that is null",
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":null}]}"#,
        "messages[1].content must be a string, not null",
    ),
    (
        "a chat that ends with the user",
        r#"{"messages":[{"role":"user","content":"a"}]}"#,
        "last message must be the assistant's",
    ),
    (
        "a chat that begins with the assistant",
        r#"{"conversations":[{"from":"gpt","value":"a"},{"from":"human","value":"b"},{"from":"gpt","value":"c"}]}"#,
        "first message must not be",
    ),
    (
        "both words for one message",
        r#"{"messages":[{"role":"user","from":"human","content":"a"},{"role":"assistant","content":"b"}]}"#,
        "has both",
    ),
    (
        "two system messages",
        r#"{"system":"x","messages":[{"role":"system","content":"y"},{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#,
        "another one beside it",
    ),
    ("two prompts", r#"{"prompt":"a","question":"b","completion":"c"}"#, "has both \"prompt\" and \"question\""),
    ("two answers", r#"{"prompt":"a","completion":"b","response":"c"}"#, "has both \"completion\" and \"response\""),
    (
        "a chat and an answer",
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"completion":"c"}"#,
        "has both \"messages\" and \"completion\"",
    ),
    (
        "a prompt that is not its chat's",
        r#"{"prompt":"x","messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#,
        "not the beginning of its chat",
    ),
    (
        "an article that would be lost",
        r#"{"article":"long text","question":"a","answer":"b"}"#,
        "has \"article\" beside its prompt, where it would be lost; call it \"input\"",
    ),
    (
        "choices that would be lost",
        r#"{"question":"a","choices":["x","y"],"answer":"x"}"#,
        "has \"choices\" beside its prompt",
    ),
    (
        "a completion that may be a message",
        r#"{"prompt":"Give JSON.","completion":"{\"role\":\"assistant\",\"content\":\"Hi\"}"}"#,
        "if it is text, give the record as \"messages\"",
    ),
    (
        "a flag on one of two answers",
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"user","content":"c"},{"role":"assistant","content":"d","train":true}]}"#,
        "with a flag that they are learnt and others without",
    ),
    (
        "a mask of 0, which is the opposite to some",
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","mask":0}]}"#,
        "messages[1].mask says which part",
    ),
    ("a chat with nothing in it", r#"{"id":"x","conversations":[]}"#, "has \"conversations\", but nothing is in it"),
    ("a prompt with nothing in it", r#"{"prompt":"","completion":"b"}"#, "has \"prompt\", but nothing is in it"),
    ("an answer that is null", r#"{"prompt":"a","completion":null}"#, "has \"completion\", but nothing is in it"),
    (
        "words of both ways in one message",
        r#"{"messages":[{"role":"user","value":"a"}]}"#,
        "name both in one of the two ways",
    ),
    ("a verdict by the name of an answer", r#"{"prompt":"a","completion":"b","chosen":true}"#, "unpaired label"),
    (
        "settings of datasets",
        r#"{"adgen_train":{"file_name":"x.json"},"loss_demo":{"file_name":"y.json"}}"#,
        "make none of the shapes",
    ),
    (
        "splits by other names",
        r#"{"my_train":[{"prompt":"a","completion":"c"}],"my_test":[{"prompt":"b","completion":"d"}]}"#,
        "jq -c '.[\"my_train\"][]' IN",
    ),
    (
        "a weight and a flag that differ",
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b","train":true,"weight":0},{"role":"user","content":"c"},{"role":"assistant","content":"d"}]}"#,
        "another thing than a flag",
    ),
    (
        "a turn of the prompt that asks to be learnt by its flag",
        r#"{"prompt":[{"role":"user","content":"a"},{"role":"assistant","content":"b","train":true},{"role":"user","content":"c"}],"completion":"d"}"#,
        "a prompt is not learnt",
    ),
    ("a context that would be lost", r#"{"instruction":"a","context":"long text","response":"b"}"#, "\"context\""),
    (
        "a weight in a prompt",
        r#"{"prompt":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":1},{"role":"user","content":"c"}],"completion":"d"}"#,
        "a prompt is not learnt",
    ),
    ("token ids", r#"{"input_ids":[1,2],"labels":[1,2],"attention_mask":[1,1]}"#, "tokenised already"),
    (
        "template arguments",
        r#"{"prompt":"a","completion":"b","chat_template_kwargs":{"thinking":true}}"#,
        "chat template",
    ),
    ("a preference", r#"{"prompt":"a","chosen":"b","rejected":"c"}"#, "is a preference pair"),
    (
        "messages in Python's notation in a string",
        r#"{"messages":"[{'role': 'user', 'content': 'q'}]"}"#,
        "ast.literal_eval(r[\"messages\"])",
    ),
    (
        "a prompt that is JSON in a string",
        r#"{"prompt":"[{\"role\":\"user\",\"content\":\"q\"}]","completion":"a"}"#,
        "jq -c '.prompt |= fromjson'",
    ),
    (
        "a prompt that is answered",
        r#"{"prompt":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"completion":"b"}"#,
        "answered already",
    ),
    (
        "a weight in a turn that is the prompt's",
        r#"{"prompt":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"user","content":"c"}],"completion":[{"role":"user","content":"a"},{"role":"assistant","content":"b","weight":1},{"role":"user","content":"c"},{"role":"assistant","content":"d"}]}"#,
        "a prompt is not learnt",
    ),
    (
        "an instruction beside a chat",
        r#"{"instruction":"Translate.","messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#,
        "\"instruction\" that is not the beginning",
    ),
    (
        "a history beside a chat",
        r#"{"history":[["a","b"]],"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#,
        "\"history\" beside its chat",
    ),
    (
        "a context beside a chat",
        r#"{"context":"x","messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#,
        "\"context\" beside its chat",
    ),
    ("a text that is a list", r#"{"prompt":"a","completion":"b","text":["x"]}"#, "that is a list"),
    (
        "an empty content",
        r#"{"messages":[{"role":"user","content":[]},{"role":"assistant","content":"b"}]}"#,
        "messages[0].content is an empty list",
    ),
    (
        "two answers as a list",
        r#"{"instruction":"q","output":["good","bad"]}"#,
        "name them \"chosen\" and \"rejected\"",
    ),
    ("turns without roles", r#"{"conversations":["q","a"]}"#, "give each turn its role"),
    ("columns by row", r#"{"prompt":{"0":"a","1":"b"},"completion":{"0":"c","1":"d"}}"#, "columns, not of rows"),
    (
        "Alpaca's columns by row",
        r#"{"instruction":{"0":"a"},"input":{"0":""},"output":{"0":"c"}}"#,
        "columns, not of rows",
    ),
    (
        "messages as columns",
        r#"{"messages":{"role":["user","assistant"],"content":["q","a"]}}"#,
        "columns, not of rows",
    ),
    (
        "records as fields",
        r#"{"0":{"prompt":"a","completion":"c"},"1":{"prompt":"b","completion":"d"}}"#,
        "jq -c '.[]'",
    ),
    (
        "splits",
        r#"{"train":[{"prompt":"a","completion":"c"}],"test":[{"prompt":"b","completion":"d"}]}"#,
        "jq -c '.[\"train\"][]'",
    ),
    (
        "rows of a viewer",
        r#"{"features":[{"name":"prompt"}],"rows":[{"row_idx":0,"row":{"prompt":"a","completion":"c"}}]}"#,
        "jq -c '.[\"rows\"][] | .row'",
    ),
    ("a tree of messages", r#"{"message_id":"1","parent_id":null,"text":"hi","role":"prompter"}"#, "tree of messages"),
    (
        "thoughts by another name",
        r#"{"question":"a","Complex_CoT":"hm","response":"b"}"#,
        "reasoning beside the answer",
    ),
    (
        "masks by another name",
        r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"assistant_masks":[0,1]}"#,
        "which part is learnt",
    ),
    (
        "a rendered prompt with a space",
        r#"{"prompt":"<s> [INST] a [/INST]","completion":"b"}"#,
        "rendered for a chat already (by \"[INST]\")",
    ),
    (
        "an answer with another family's end",
        r#"{"prompt":"a","completion":"b<|eot_id|>"}"#,
        "rendered for a chat already",
    ),
    (
        "a configuration with a word for media",
        r#"{"mllm_audio_demo":{"file_name":"x.json"}}"#,
        "make none of the shapes",
    ),
    ("a configuration with a word for thoughts", r#"{"alpaca_cot":{"file_name":"x.json"}}"#, "make none of the shapes"),
    ("a configuration", r#"{"identity":{"file_name":"identity.json"}}"#, "make none of the shapes"),
    (
        "a rendered prompt",
        r#"{"prompt":"<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n","completion":"b"}"#,
        "rendered for a chat already (by \"<|im_start|>\")",
    ),
    (
        "a rendered answer",
        r#"{"prompt":"a","completion":"b<|im_end|>"}"#,
        "rendered for a chat already (by \"<|im_end|>\")",
    ),
    (
        "a prompt rendered for another family",
        r#"{"prompt":"<s>[INST] a [/INST]","completion":"b"}"#,
        "rendered for a chat already",
    ),
    ("a prompt without an answer", r#"{"prompt":"a","category":"x"}"#, "a prompt (\"prompt\"), and no answer"),
    ("an empty object", "{}", "no field that says anything"),
    ("an empty file", "", "holds no record"),
    ("an empty array", "[]", "holds no record"),
];

const PAIRS: &[(&str, &str, &str)] = &[
    ("one answer", r#"{"prompt":"a","completion":"b"}"#, "upload it for SFT"),
    ("one answer of two", r#"{"prompt":"a","chosen":"b"}"#, "\"rejected\" is missing"),
    ("the same answer twice", r#"{"prompt":"a","chosen":"b","rejected":"b"}"#, "are the same"),
    ("no prompt", r#"{"chosen":"b","rejected":"c"}"#, "without a prompt"),
    (
        "chats in Python's notation in strings",
        r#"{"prompt":"q","chosen":"[{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]","rejected":"x"}"#,
        "ast.literal_eval(r[\"chosen\"])",
    ),
    (
        "a prompt that is answered by another",
        r#"{"prompt":[{"role":"user","content":"a"},{"role":"assistant","content":"z"}],"chosen":"b","rejected":"c"}"#,
        "answered already",
    ),
    (
        "answers that begin with the prompt",
        r#"{"prompt":"\n\nHuman: a\n\nAssistant:","chosen":"\n\nHuman: a\n\nAssistant: b","rejected":"\n\nHuman: a\n\nAssistant: c"}"#,
        "begin with its prompt",
    ),
    (
        "a history beside chats",
        r#"{"history":[["a","b"]],"conversations":[{"from":"human","value":"a"}],"chosen":"b","rejected":"c"}"#,
        "\"history\" beside its chat",
    ),
    (
        "OpenAI's form with another chat",
        r#"{"input":{"messages":[{"role":"user","content":"a"}]},"messages":[{"role":"user","content":"x"}],"preferred_output":[{"role":"assistant","content":"b"}],"non_preferred_output":[{"role":"assistant","content":"c"}]}"#,
        "not both",
    ),
    ("a label beside both answers", r#"{"prompt":"a","chosen":"b","rejected":"c","label":1}"#, "swap the two"),
    ("several rejected answers", r#"{"prompt":"a","chosen":"b","rejected":["c","d"]}"#, "one answer a record"),
    (
        "a chat that is the beginning of the other",
        r#"{"chosen":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"rejected":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"user","content":"c"},{"role":"assistant","content":"d"}]}"#,
        "beginning of the other",
    ),
    (
        "a reference's log-probabilities",
        r#"{"prompt":"a","chosen":"b","rejected":"c","ref_chosen_logps":-1.5}"#,
        "log-probabilities",
    ),
    (
        "transcripts",
        r#"{"chosen":"\n\nHuman: a\n\nAssistant: b","rejected":"\n\nHuman: a\n\nAssistant: c"}"#,
        "without a prompt",
    ),
    ("unpaired labels", r#"{"prompt":"a","completion":"b","label":true}"#, "unpaired label"),
    (
        "a prompt that the chats do not begin with",
        r#"{"prompt":"x","chosen":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"rejected":[{"role":"user","content":"a"},{"role":"assistant","content":"c"}]}"#,
        "the two must agree",
    ),
    (
        "a prompt list that the chats do not begin with",
        r#"{"prompt":[{"role":"user","content":"x"}],"chosen":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"rejected":[{"role":"user","content":"a"},{"role":"assistant","content":"c"}]}"#,
        "the two must agree",
    ),
    (
        "chats with nothing in common",
        r#"{"chosen":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"rejected":[{"role":"user","content":"x"},{"role":"assistant","content":"c"}]}"#,
        "at least one message",
    ),
    (
        "chats that part at a question",
        r#"{"chosen":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"user","content":"c"},{"role":"assistant","content":"d"}],"rejected":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"user","content":"x"},{"role":"assistant","content":"y"}]}"#,
        "part before an answer",
    ),
    (
        "an answer that ends with the user",
        r#"{"prompt":"a","chosen":[{"role":"assistant","content":"b"},{"role":"user","content":"c"}],"rejected":"d"}"#,
        "chosen answer must end",
    ),
    (
        "weights",
        r#"{"prompt":"a","chosen":[{"role":"assistant","content":"b","weight":0}],"rejected":"c"}"#,
        "chosen[0].weight",
    ),
    (
        "tools",
        r#"{"input":{"messages":[{"role":"user","content":"a"}],"tools":[{"type":"function"}]},"preferred_output":[{"role":"assistant","content":"b"}],"non_preferred_output":[{"role":"assistant","content":"c"}]}"#,
        "uses tools",
    ),
    (
        "loss weights",
        r#"{"chosen_messages":[{"role":"user","content":"a","loss_weight":0.0},{"role":"assistant","content":"b","loss_weight":1.0}],"rejected_messages":[{"role":"user","content":"a"},{"role":"assistant","content":"c"}]}"#,
        "chosen_messages[0].loss_weight",
    ),
    (
        "two names for the answers",
        r#"{"prompt":"a","chosen":"b","rejected":"c","preferred_output":[{"role":"assistant","content":"b"}]}"#,
        "has both",
    ),
    (
        "OpenAI's input without messages",
        r#"{"input":"a","preferred_output":[{"role":"assistant","content":"b"}],"non_preferred_output":[{"role":"assistant","content":"c"}]}"#,
        "object with \"messages\"",
    ),
    (
        "another chat beside the prompt",
        r#"{"prompt":"a","messages":[{"role":"user","content":"x"}],"chosen":"b","rejected":"c"}"#,
        "neither the prompt nor",
    ),
    (
        "two system messages",
        r#"{"system":"x","prompt":[{"role":"system","content":"y"},{"role":"user","content":"a"}],"chosen":"b","rejected":"c"}"#,
        "another one beside it",
    ),
    (
        "an answer that is a number",
        r#"{"prompt":"a","chosen":1,"rejected":2}"#,
        "must be a string or a list of messages",
    ),
];

#[test]
fn chats_are_refused_for_the_true_reason() {
    for (name, file, words) in CHATS {
        let error = sft(file).expect_err(name).to_string();
        assert!(error.contains(words), "{name}: {error}");
        assert_eq!(error.matches("line 1").count().min(2), usize::from(error.contains("line 1")), "{name}: {error}");
    }
}

#[test]
fn preferences_are_refused_for_the_true_reason() {
    for (name, file, words) in PAIRS {
        let error = dpo(file).expect_err(name).to_string();
        assert!(error.contains(words), "{name}: {error}");
    }
}

#[test]
fn other_encodings_are_named() {
    let line = "{\"prompt\":\"é\",\"completion\":\"b\"}\n";
    let latin: Vec<u8> = line.chars().map(|c| c as u8).collect();
    for (file, words) in [
        (utf16(line, true), "is UTF-16 text, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8"),
        (utf16(line, false), "iconv -f UTF-16LE"),
        (latin, "iconv -f LATIN1"),
        (gzip("prompt,completion\na,b\n"), "is CSV"),
        (gzip(line)[..30].to_vec(), "damaged or cut short"),
        (b"BZh91AY&SY".to_vec(), "bunzip2"),
        (b"\x28\xb5\x2f\xfd\x04\x00".to_vec(), "zstd -d"),
    ] {
        let error = sft(&file).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn errors_name_the_lines_of_the_file() {
    let good = r#"{"prompt":"a","completion":"b"}"#;
    let file = format!("{good}\n\n{{\"prompt\":\"a\"}}\n{good}\n{{\"prompt\":\"a\"}}\n{{'x': 1}}\n");
    let error = sft(&file).unwrap_err().to_string();
    assert!(
        error.starts_with("data: 3 of 5 records can't be used:\nlines 3, 5: has the fields \"prompt\": a prompt"),
        "{error}"
    );
    assert!(error.contains("\nline 6: has single quotes"), "{error}");
    let commas = format!("{good},\n").repeat(2) + good;
    let error = sft(&commas).unwrap_err().to_string();
    assert!(error.starts_with("data: 2 faults in a file of 3 records:\nlines 1, 2: has a comma"), "{error}");
    let pretty = format!("[\n  {good},\n  {{\n    \"prompt\": \"a\",\n    \"completion\": NaN\n  }}\n]");
    let error = sft(&pretty).unwrap_err().to_string();
    assert!(error.starts_with("line 5: has NaN at column 19"), "{error}");
    let many = "{\"prompt\":\"a\"}\n".repeat(1000);
    let error = sft(&many).unwrap_err().to_string();
    assert!(error.starts_with("data: 1000 of 1000 records can't be used; the first 20:\nlines 1, 2, 3,"), "{error}");
}
