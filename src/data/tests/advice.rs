//! The commands that refusals advise, applied by what they mean: the file that they make trains.

use serde_json::{Value, from_str, json};

use super::*;

#[test]
fn advice_makes_files_that_train() {
    let record = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#;
    let chat = r#"[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]"#;
    let text = |json: &str| Value::from(json).to_string();
    let values = [
        chat.to_owned(),
        text(record),
        format!(r#"{{"messages":{}}}"#, text(chat)),
        format!(r#"{{"data":[{record}]}}"#),
        format!(r#"{{"rows":[{{"row":{record}}}]}}"#),
        format!(r#"{{"0":{record},"1":{record}}}"#),
    ];
    // A line that is a list of records is an array that trains as it is.
    let nested = format!("[[{record}],[{record}]]");
    for value in values {
        let files = [format!("{value}\n"), format!("[{value}]"), format!("[\n{value},\n{value}\n]"), nested.clone()];
        for file in files {
            let error = sft(&file).unwrap_err().to_string();
            let (_, command) = error.split_once("jq -c '").unwrap_or_else(|| panic!("{file}: {error}"));
            let (filter, _) = command.split_once("' IN > OUT.jsonl").unwrap();
            let rewritten: String = apply(filter, from_str(&file).unwrap());
            sft(&rewritten).unwrap_or_else(|e| panic!("{file}: {filter}: {rewritten}: {e}"));
        }
    }
}

/// What jq makes of a value by the few filters that are advised: one value a line.
fn apply(filter: &str, value: Value) -> String {
    let mut values = vec![value];
    for step in filter.split(" | ") {
        let one = |value: Value| -> Vec<Value> {
            match step {
                "{messages: .}" => vec![json!({ "messages": value })],
                "fromjson" => vec![from_str(value.as_str().unwrap()).unwrap()],
                ".messages |= fromjson" => {
                    vec![json!({"messages": from_str::<Value>(value["messages"].as_str().unwrap()).unwrap()})]
                }
                path => {
                    let (path, each) = path.strip_suffix("[]").map_or((path, false), |path| (path, true));
                    let inner = match path.trim_start_matches('.') {
                        "" => value,
                        name => value[name.trim_matches(['[', ']', '"'])].clone(),
                    };
                    match inner {
                        inner if !each => vec![inner],
                        Value::Array(list) => list,
                        Value::Object(map) => map.into_iter().map(|(_, value)| value).collect(),
                        other => panic!("{other}"),
                    }
                }
            }
        };
        values = values.into_iter().flat_map(one).collect();
    }
    values.iter().map(|value| format!("{value}\n")).collect()
}
