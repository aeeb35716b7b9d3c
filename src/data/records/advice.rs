//! Commands that rewrite a file into one that can be read. Whoever refuses a record does not know how the file's records lie in it; the
//! command has marks for that, and [`fit`] puts in their place what the file's format needs.

use crate::data::container::Format;

/// Stands for what takes a file's records one by one. A noncharacter: no text of a file has it.
const EACH: char = '\u{FDD3}';
/// Stands for the flag that takes the values of a file as one list.
const AS_LIST: char = '\u{FDD4}';
/// Stands for the beginning of a command, before `jq`.
const READ: char = '\u{FDD5}';
/// Stands for the file's name, behind `jq`.
const IN: char = '\u{FDD6}';
/// Stands for what gives each record on a line of its own to the next command.
const AS_LINES: char = '\u{FDD7}';

/// The command that puts each record of the file through a filter.
pub fn each(filter: &str) -> String {
    format!("{READ}jq -c '{EACH}{filter}'{IN} > OUT.jsonl")
}

/// The command that puts the list of all values of the file through a filter.
pub fn whole(filter: &str) -> String {
    format!("{READ}jq -c{AS_LIST} '{filter}'{IN} > OUT.jsonl")
}

/// The command that puts each record, as Python's `r`, through an expression.
pub fn python(expression: &str) -> String {
    format!(
        "{AS_LINES}python3 -c 'import ast,json,sys; [print(json.dumps({expression})) for r in map(json.loads, sys.stdin)]' > OUT.jsonl"
    )
}

/// Puts into a reason's command what the file's format needs.
pub fn fit(reason: &str, format: Format) -> String {
    let unpack = if format.gzip { "gunzip -c IN | " } else { "" };
    let file = if format.gzip { "" } else { " IN" };
    let each = if format.array { ".[] | " } else { "" };
    let as_list = if format.array { "" } else { "s" };
    let lines = format!("{unpack}jq -c '{}'{file} | ", if format.array { ".[]" } else { "." });
    let marks: [(char, &str); 5] = [(READ, unpack), (IN, file), (EACH, each), (AS_LIST, as_list), (AS_LINES, &lines)];
    marks.iter().fold(reason.to_owned(), |reason, (mark, text)| reason.replace(*mark, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_fit_the_file() {
        let lines = Format::default();
        let (array, packed) = (Format { array: true, ..lines }, Format { gzip: true, array: true, ..lines });
        let filter = each("{messages: .}");
        assert_eq!(fit(&filter, lines), "jq -c '{messages: .}' IN > OUT.jsonl");
        assert_eq!(fit(&filter, array), "jq -c '.[] | {messages: .}' IN > OUT.jsonl");
        assert_eq!(fit(&filter, packed), "gunzip -c IN | jq -c '.[] | {messages: .}' > OUT.jsonl");
        assert_eq!(fit(&whole("."), lines), "jq -cs '.' IN > OUT.jsonl");
        assert_eq!(fit(&whole("."), array), "jq -c '.' IN > OUT.jsonl");
        assert!(fit(&python("r"), array).starts_with("jq -c '.[]' IN | python3 -c '"));
        assert!(fit(&python("r"), lines).starts_with("jq -c '.' IN | python3 -c '"));
    }
}
