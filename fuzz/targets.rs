//! What the fuzzers run: one function a reader of foreign bytes. Each returns for any input, and whether the input was
//! accepted; a panic, a hang or memory out of proportion is a fault. Used by cargo-fuzz (`fuzz_targets/`) and by
//! `tests/fuzz.rs`, which needs no nightly toolchain.

use std::io::Write as _;
use std::sync::{Arc, LazyLock};

use tenora::adapter::{BaseShape, PackedAdapter, RowNorms};
use tenora::config::Limits;
use tenora::data::{Numbered, Reader, Record};
use tenora::hub::{Package, SizeLimits};
use tenora::ids::Digest;
use tenora::model::Model;
use tenora::request::ChatMessage;
use tenora::store::DatasetKind;
use tenora::text::matcher::{HoldBack, Patterns};
use tenora::text::{Text, Vocabulary};
use tenora::weights::{Outline, Weights};

/// A reader of foreign bytes.
pub type Target = fn(&[u8]) -> bool;

/// All of them, with their names, which are those of the folders of `corpus/`.
pub const ALL: [(&str, Target); 8] = [
    ("gguf", gguf),
    ("folder", folder),
    ("safetensors_and_config", safetensors_and_config),
    ("packed_file", packed_file),
    ("jsonl", jsonl),
    ("template", template),
    ("policy", policy),
    ("protos", protos),
];

/// The longest template and context a served base would have; more only makes the fuzzer slow.
const MAX_TEMPLATE: usize = 4 << 10;

/// The tiny base, its text, and an adapter's packed size on it.
static TINY: LazyLock<(Arc<Model>, Arc<Text>)> = LazyLock::new(|| Model::tiny(1));

fn shape() -> &'static BaseShape {
    TINY.0.shape()
}

/// Splits off a part whose length its first two bytes say, as far as there is so much.
fn split(data: &[u8]) -> (&[u8], &[u8]) {
    let Some((length, rest)) = data.split_first_chunk::<2>() else { return (data, &[]) };
    rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()))
}

/// A base as a whole: the file, its tokenizer and template, and the model over it. One with a seal as it lies, and with its
/// checksum put right, so that what the checksum protects is reached too.
pub fn gguf(data: &[u8]) -> bool {
    let as_it_is = base(data);
    if !data.windows(SEAL.len()).any(|window| window == SEAL) {
        return as_it_is;
    }
    let mut sealed = data[..data.len().saturating_sub(32)].to_vec();
    sealed.extend(Digest::of(&sealed).as_ref());
    base(&sealed) || as_it_is
}

/// What a file with a seal says of itself.
const SEAL: &[u8] = b"tenora.quantized.digest";

fn base(data: &[u8]) -> bool {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(data).expect("a temporary file can be written");
    let Ok((_, text)) = Model::load(file.path(), &candle_core::Device::Cpu, None) else { return false };
    let _ = text.encode("What can be loaded can be used.");
    let _ = text.encode_chat(&chat(), true);
    true
}

/// A base as a folder: its configuration, then its tensors' file.
pub fn folder(data: &[u8]) -> bool {
    let (config, tensors) = split(data);
    let dir = tempfile::tempdir().expect("a temporary folder");
    let put = |name: &str, data: &[u8]| std::fs::write(dir.path().join(name), data).expect("a file can be written");
    put("config.json", config);
    put("model.safetensors", tensors);
    let outline = Outline::read(dir.path());
    let Ok(weights) = Weights::from_folder(dir.path()) else { return false };
    let outline = outline.expect("what can be read has an outline");
    assert!(outline.problems.len() <= 1, "only the tokenizer is missing: {:?}", outline.problems);
    assert_eq!(outline.config.as_ref(), Some(&weights.config), "the outline says what is read");
    true
}

/// An adapter as it is imported: its configuration, then its tensors.
pub fn safetensors_and_config(data: &[u8]) -> bool {
    let (config, tensors) = split(data);
    let package = Package { config: config.to_vec(), tensors: tensors.to_vec() };
    let limits = SizeLimits { rank: 64, virtual_tokens: 64, trained_tokens: 64 };
    let checked = package.check(shape(), limits);
    let Ok(lora) = package.read(shape(), limits) else { return false };
    let norms: RowNorms = lora.pairs().map(|(site, pair)| (site, vec![1.0; pair.b.len() / pair.rank])).collect();
    let packed = PackedAdapter::new(&lora, shape(), &norms).expect("what can be read can be packed");
    assert_eq!(
        checked.expect("what can be read can be measured").memory_bytes,
        packed.byte_size(),
        "it takes what was reserved"
    );
    true
}

/// The packed form, after eight bytes that say what its tensors take in memory; as it lies, and with its checksum put
/// right, so that what the checksum protects is reached too.
pub fn packed_file(data: &[u8]) -> bool {
    let Some((bytes, file)) = data.split_first_chunk::<8>() else { return false };
    let bytes = u64::from_le_bytes(*bytes) & 0xff_ffff;
    let read = |file: &[u8]| PackedAdapter::from_file(file, Digest::of(b"fuzz"), bytes, shape()).is_ok();
    let as_it_is = read(file);
    let mut sealed = file[..file.len().saturating_sub(4)].to_vec();
    sealed.extend(crc32fast::hash(&sealed).to_ne_bytes());
    read(&sealed) || as_it_is
}

/// A dataset's file: what it holds does not depend on the pieces that it comes in, what is read comes back the same
/// from its own line, and is rendered and encoded.
pub fn jsonl(data: &[u8]) -> bool {
    let mut accepted = false;
    for kind in [DatasetKind::Sft, DatasetKind::Preferences] {
        let whole = records(kind, data, data.len());
        assert_eq!(records(kind, data, 7), whole, "in pieces as at once");
        for Numbered { record, .. } in whole.into_iter().flatten().take(64) {
            accepted = true;
            let again = Record::parse(kind, record.to_line().as_bytes()).expect("a record's own line can be read");
            assert_eq!(again, record);
            let _ = record.messages();
            match record {
                Record::Chat(chat) => drop(chat.encode(&TINY.1)),
                Record::Preference(pair) => drop(pair.encode(&TINY.1)),
            }
        }
    }
    accepted
}

/// The records of a file that comes in pieces; nothing where it is refused.
fn records(kind: DatasetKind, data: &[u8], piece: usize) -> Option<Vec<Numbered>> {
    let limits = Limits { max_dataset_bytes: 1 << 20, ..Limits::default() };
    let (mut reader, mut records) = (Reader::new(kind, TINY.1.clone(), &limits), Vec::new());
    let mut keep = |record| {
        records.push(record);
        Ok(())
    };
    for piece in data.chunks(piece.max(1)) {
        reader.push(piece, &mut keep).ok()?;
    }
    reader.finish(&mut keep).ok()?;
    Some(records)
}

/// A chat template, and then messages, one a line.
pub fn template(data: &[u8]) -> bool {
    let (template, content) = split(data);
    let template = String::from_utf8_lossy(&template[..template.len().min(MAX_TEMPLATE)]).into_owned();
    let mut tokens: Vec<String> = (0u32..256).filter_map(char::from_u32).map(String::from).collect();
    tokens.extend(["<|im_start|>".to_owned(), "<|im_end|>".to_owned()]);
    let vocabulary = Vocabulary { chat_template: template, tokens, ..tiny_vocabulary() };
    let Ok(text) = Text::new(vocabulary) else { return false };
    let content = String::from_utf8_lossy(content);
    let roles = ["system", "user", "assistant"].into_iter().cycle();
    let messages: Vec<ChatMessage> =
        roles.zip(content.lines().take(8)).map(|(role, line)| message(role, line)).collect();
    let mut accepted = false;
    for generation_prompt in [false, true] {
        accepted |= text.render_chat(&messages, generation_prompt).is_ok();
        let _ = text.encode_chat(&messages, generation_prompt);
    }
    let _ = text.encode_conversation(&messages, &|_| true);
    accepted
}

/// Phrases, one a line, then a text that comes in pieces: what leaves is the text before the first phrase and never a
/// phrase.
pub fn policy(data: &[u8]) -> bool {
    let (phrases, text) = split(data);
    let phrases: Vec<String> = String::from_utf8_lossy(phrases).lines().take(32).map(String::from).collect();
    let text = String::from_utf8_lossy(text).into_owned();
    let Ok(patterns) = Patterns::new(&phrases, true) else { return false };
    let found =
        patterns.find_all(&text).into_iter().map(|(_, range)| range).min_by_key(|range| (range.end, range.start));
    for piece in [1, 3, 16] {
        let mut hold = HoldBack::new(patterns.clone());
        let (mut sent, mut matched) = (String::new(), false);
        let chars: Vec<char> = text.chars().collect();
        for piece in chars.chunks(piece) {
            let released = hold.push(&piece.iter().collect::<String>(), Vec::new());
            sent += &released.text;
            matched |= released.matched;
        }
        sent += &hold.finish().text;
        assert_eq!(matched, found.is_some(), "a phrase is found however the text is cut");
        assert!(text.starts_with(&sent), "nothing is changed");
        assert!(patterns.find_all(&sent).is_empty(), "no phrase leaves");
        assert!(matched || sent == text, "nothing is kept back for good");
    }
    true
}

/// The first byte picks a request, the others are its encoding.
pub fn protos(data: &[u8]) -> bool {
    let Some((which, message)) = data.split_first() else { return false };
    tenora::api::convert_bytes(*which, message, &Limits::default())
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage::new(role, content)
}

fn chat() -> [ChatMessage; 2] {
    [message("system", "Be brief."), message("user", "Hello")]
}

fn tiny_vocabulary() -> Vocabulary {
    Vocabulary { tokens: Vec::new(), control: vec![256, 257], pre: "smollm".into(), eos: 257, ..Vocabulary::default() }
}
