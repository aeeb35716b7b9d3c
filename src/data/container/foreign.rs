//! What a file is that is not JSON: each kind with the sentence that names it and the command that makes JSON Lines of it.

/// A kind of file, by the bytes it begins with.
struct Magic {
    at: usize,
    bytes: &'static [u8],
    is: &'static str,
}

const PARQUET: &str = "is a Parquet file; convert it: python3 -c 'import pandas; pandas.read_parquet(\"IN\").to_json(\"OUT.jsonl\", orient=\"records\", lines=True)'";
const ARROW: &str = "is an Arrow file; convert it: python3 -c 'import datasets; datasets.Dataset.from_file(\"IN\").to_json(\"OUT.jsonl\")'";
const ZIP: &str =
    "is a zip archive (or a spreadsheet); unpack it (unzip IN) and send the JSON Lines file that is in it";
const UTF16: &str = "is UTF-16 text, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 IN > OUT.jsonl";

const MAGICS: [Magic; 19] = [
    Magic { at: 0, bytes: b"PAR1", is: PARQUET },
    Magic { at: 0, bytes: b"ARROW1", is: ARROW },
    // The stream format: a continuation mark, then the length of the schema's message.
    Magic { at: 0, bytes: b"\xff\xff\xff\xff", is: ARROW },
    Magic { at: 0, bytes: b"FEA1", is: ARROW },
    Magic { at: 0, bytes: b"PK\x03\x04", is: ZIP },
    Magic { at: 0, bytes: b"PK\x05\x06", is: ZIP },
    Magic {
        at: 0,
        bytes: b"\xff\xfe\x00\x00",
        is: "is UTF-32 text, not UTF-8; convert it: iconv -f UTF-32 -t UTF-8 IN > OUT.jsonl",
    },
    Magic {
        at: 0,
        bytes: b"\x00\x00\xfe\xff",
        is: "is UTF-32 text, not UTF-8; convert it: iconv -f UTF-32 -t UTF-8 IN > OUT.jsonl",
    },
    Magic { at: 0, bytes: b"\xff\xfe", is: UTF16 },
    Magic { at: 0, bytes: b"\xfe\xff", is: UTF16 },
    Magic { at: 0, bytes: b"BZh", is: "is compressed with bzip2; unpack it: bunzip2 IN" },
    Magic { at: 0, bytes: b"\xfd7zXZ\x00", is: "is compressed with xz; unpack it: unxz IN" },
    Magic { at: 0, bytes: b"\x28\xb5\x2f\xfd", is: "is compressed with zstd; unpack it: zstd -d IN" },
    Magic { at: 0, bytes: b"\x1f\x8b", is: "is compressed with gzip twice; unpack it once: gunzip IN" },
    Magic {
        at: 257,
        bytes: b"ustar",
        is: "is a tar archive; unpack it (tar xf IN) and send the JSON Lines file that is in it",
    },
    Magic {
        at: 0,
        bytes: b"SQLite format 3",
        is: "is an SQLite database; export its rows: sqlite3 -json IN 'SELECT * FROM table' > OUT.json",
    },
    Magic { at: 0, bytes: b"\x89HDF", is: "is an HDF5 file; export its records as JSON Lines" },
    Magic {
        at: 0,
        bytes: b"\x80",
        is: "is a Python pickle or other binary data; export its records as JSON Lines (json.dumps, one a line)",
    },
    Magic {
        at: 0,
        bytes: b"version https://git-lfs",
        is: "is a Git LFS pointer, not the file itself; fetch that first: git lfs pull",
    },
];

/// What a file is that begins so (after its byte order mark), where that is not JSON. `None`: it may be JSON.
pub fn named(head: &[u8]) -> Option<String> {
    let magic = MAGICS.iter().find(|magic| head.get(magic.at..).is_some_and(|rest| rest.starts_with(magic.bytes)));
    if let Some(magic) = magic {
        return Some(magic.is.into());
    }
    if let Some(is) = wide(head) {
        return Some(is);
    }
    let text = head.trim_ascii_start();
    match text.first()? {
        b'{' => None,
        b'[' if begins_array(&text[1..]) => None,
        b'\'' | b'(' => Some("is Python's own notation, not JSON; write it with json.dumps, one object a line".into()),
        _ => Some(plain_text(text)),
    }
}

/// What may follow the bracket of a JSON array; a link in Markdown or a section of TOML begins with one too.
fn begins_array(rest: &[u8]) -> bool {
    let rest = rest.trim_ascii_start();
    let words: [&[u8]; 4] = [b"null", b"true", b"false", b"NaN"];
    rest.first().is_none_or(|byte| b"{[\"]'-".contains(byte) || byte.is_ascii_digit())
        || words
            .iter()
            .any(|word| rest.strip_prefix(*word).is_some_and(|rest| rest.trim_ascii_start().starts_with(b",")))
}

/// UTF-16 without a byte order mark has a zero beside every ASCII character.
fn wide(head: &[u8]) -> Option<String> {
    match head {
        [a, 0, b, 0, ..] if *a != 0 && *b != 0 => Some(UTF16.replace("-f UTF-16", "-f UTF-16LE")),
        [0, a, 0, b, ..] if *a != 0 && *b != 0 => Some(UTF16.replace("-f UTF-16", "-f UTF-16BE")),
        _ if head.contains(&0) => Some("is binary data, not JSON; export its records as JSON Lines".into()),
        _ => None,
    }
}

/// Text that begins neither with `{` nor with `[`.
fn plain_text(text: &[u8]) -> String {
    let broken = std::str::from_utf8(text).is_err_and(|e| e.error_len().is_some());
    let text = String::from_utf8_lossy(text);
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    let first = lines.next().unwrap_or_default().trim();
    let second = lines.next().unwrap_or_default();
    if first.starts_with('<') {
        return "is HTML or XML, not JSON; was a web page saved in place of the file?".into();
    }
    if first.starts_with('"') && first.ends_with('"') && first.contains("\\\"") {
        return "holds JSON within strings; unpack it: jq -c 'fromjson' IN > OUT.jsonl".into();
    }
    for (separator, name, python) in [('\t', "TSV", "\"\\t\""), (',', "CSV", "\",\""), (';', "CSV", "\";\"")] {
        if is_header(first, second, separator) {
            return format!(
                "is {name}, not JSON; convert it: python3 -c 'import csv,json; [print(json.dumps(r)) for r in csv.DictReader(open(\"IN\", encoding=\"utf-8-sig\", newline=\"\"), delimiter={python})]' > OUT.jsonl"
            );
        }
    }
    if is_yaml(first, second) {
        return "is YAML, not JSON; if it holds records: python3 -c 'import yaml,json; [print(json.dumps(r)) for r in yaml.safe_load(open(\"IN\"))]' > OUT.jsonl".into();
    }
    let mut rest = text.lines().map(str::trim).skip_while(|line| line.is_empty() || line.starts_with(['#', '/']));
    if first.starts_with(['#', '/']) && rest.next().is_some_and(|line| line.starts_with(['{', '['])) {
        return "begins with a comment, which JSON does not know; remove it: sed -E '/^[[:space:]]*(#|\\/\\/)/d' IN > OUT.jsonl".into();
    }
    if broken {
        return "is neither UTF-8 text nor a kind of file that can be read; export its records as JSON Lines".into();
    }
    "is plain text, not JSON records; training on plain text is not supported: give prompts with answers, one JSON object a line".into()
}

/// Column names: short words, two at least, and a second line that is separated too.
fn is_header(first: &str, second: &str, separator: char) -> bool {
    let names: Vec<&str> = first.split(separator).map(|name| name.trim().trim_matches('"')).collect();
    let word = |name: &&str| {
        name.len() <= 40 && name.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | ' ' | '.'))
    };
    // pandas leaves the first one empty: the number of the row.
    let words = names.iter().all(word)
        && names.iter().all(|name| name.split(' ').count() <= 3)
        && names.iter().skip(1).all(|name| !name.is_empty());
    // Prose may have commas in each line; no column is called by the beginning of a sentence.
    let prose = separator == ',' && first.contains(", ") && first.starts_with(char::is_uppercase);
    names.len() > 1 && words && !prose && (second.contains(separator) || second.starts_with('"') || second.is_empty())
}

/// `---`, `key:`, `key: value` or `- key: value`. A transcript (`Human: ...`) begins its lines with a capital.
fn is_yaml(first: &str, second: &str) -> bool {
    let key = first.trim_start_matches("- ");
    let name = key.split(':').next().unwrap_or_default();
    let simple = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
    let transcript =
        name.starts_with(|c: char| c.is_uppercase()) && !first.starts_with("- ") && !second.starts_with([' ', '-']);
    first == "---"
        || first.starts_with("%YAML")
        || (simple && !transcript && name != "data" && (key.ends_with(':') || key.contains(": ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_other_kinds_are_named() {
        let tar = [vec![b'a'; 257], b"ustar".to_vec()].concat();
        for (head, word) in [
            (&b"PAR1\x15\x04"[..], "Parquet"),
            (b"ARROW1\0\0", "Arrow"),
            (b"\xff\xff\xff\xff\x10\x01", "Arrow"),
            (b"PK\x03\x04\x14\0", "zip"),
            (b"\xff\xfe{\0\"\0", "UTF-16"),
            (b"\xfe\xff\0{\0\"", "UTF-16"),
            (b"{\0\"\0m\0", "UTF-16"),
            (b"\0{\0\"\0m", "UTF-16"),
            (b"BZh91AY", "bzip2"),
            (b"\xfd7zXZ\0\0", "xz"),
            (b"\x28\xb5\x2f\xfd\x04", "zstd"),
            (b"\x1f\x8b\x08", "gzip twice"),
            (b"SQLite format 3\0", "SQLite"),
            (b"\x80\x04\x95", "pickle"),
            (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
            (b"prompt,completion\nhello,hi\n", "CSV"),
            (b"\"prompt\",\"completion\"\n\"a, b\",\"c\"\n", "CSV"),
            (b"prompt;completion\na;b\n", "CSV"),
            (b"prompt\tcompletion\na\tb\n", "TSV"),
            (b",prompt,completion\n0,a,b\n", "CSV"),
            (b"Roses, violets\nAre red, and blue\n", "plain text"),
            (b"Human: hi\nAssistant: hello\n", "plain text"),
            (b"Question: Why?\nAnswer: So.\n", "plain text"),
            (b"data: {\"prompt\": 1}\n", "plain text"),
            (b"- messages:\n  - role: user\n", "YAML"),
            (b"---\n- prompt: a\n", "YAML"),
            (b"dpo_zh_demo:\n  path: x\n", "YAML"),
            (b"<!DOCTYPE html>\n<html>", "HTML"),
            (b"\"{\\\"prompt\\\": 1}\"\n", "within strings"),
            (b"Anarchism is a philosophy, and a movement.\nMore, of it.\n", "plain text"),
            (b"# README\n\nwords\n", "plain text"),
            (b"# made by x\n# y\n{\"prompt\":1}\n", "begins with a comment"),
            (b"// made by x\n\n[{\"prompt\":1}]\n", "begins with a comment"),
            (b"[dataset_info.json](x) holds all, and more.\n", "plain text"),
            (b"[section]\nkey = 1\n", "plain text"),
            (b"\0\0\0\x01", "binary"),
            (b"\x93NUMPY\x01", "neither UTF-8"),
            (&tar, "tar"),
        ] {
            let is = named(head).unwrap_or_else(|| panic!("{head:?}"));
            assert!(is.contains(word), "{is}");
        }
        for head in [&b"{\"a\":1}"[..], b" \n[{", b"", b"{'a': 1}", b"[null, {}]"] {
            assert_eq!(named(head), None);
        }
    }
}
