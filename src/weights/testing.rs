//! A small GGUF file for tests, and the pieces to make broken ones of.

use half::f16;

use crate::text::Vocabulary;

/// A file in pieces, each of which a test may change.
#[derive(Clone)]
pub(crate) struct File {
    pub(crate) version: u32,
    /// The counts that it says: entries and tensors, where they differ from what it has.
    pub(crate) counts: Option<(u64, u64)>,
    /// Key, type, value.
    pub(crate) metadata: Vec<(String, u32, Vec<u8>)>,
    /// Name, dimensions (innermost first), type, bytes.
    pub(crate) tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
    /// Offsets that it says, where they differ from where the tensors lie.
    pub(crate) offsets: Option<Vec<u64>>,
}

pub(crate) const U32: u32 = 4;
pub(crate) const F32: u32 = 6;
pub(crate) const TEXT: u32 = 8;
pub(crate) const LIST: u32 = 9;

pub(crate) fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

pub(crate) fn list(kind: u32, count: u64, values: impl IntoIterator<Item = Vec<u8>>) -> Vec<u8> {
    let mut bytes = [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
    values.into_iter().for_each(|value| bytes.extend(value));
    bytes
}

/// Blocks of 32 values, with a scale each: Q8_0.
fn q8_0(rows: usize, cols: usize, seed: usize) -> Vec<u8> {
    let block = |at: usize| {
        let values = (0..32).map(move |i| ((at * 32 + i * 7 + seed * 13) % 61) as u8 ^ 0x20);
        f16::from_f32(0.002).to_le_bytes().into_iter().chain(values)
    };
    (0..rows * cols / 32).flat_map(block).collect()
}

impl File {
    /// A base of one layer over the tests' vocabulary: width 32, two heads of 16.
    pub(crate) fn tiny() -> Self {
        let vocabulary = Vocabulary::tiny();
        let vocab = vocabulary.tokens.len();
        let numbers = [
            ("llama.block_count", 1),
            ("llama.embedding_length", 32),
            ("llama.attention.head_count", 2),
            ("llama.attention.head_count_kv", 1),
            ("llama.rope.dimension_count", 16),
            ("llama.feed_forward_length", 64),
            ("llama.context_length", 64),
            ("tokenizer.ggml.eos_token_id", vocabulary.eos),
        ];
        let texts = [
            ("general.architecture", "llama"),
            ("tokenizer.ggml.model", "gpt2"),
            ("tokenizer.ggml.pre", &vocabulary.pre),
            ("tokenizer.chat_template", &vocabulary.chat_template),
        ];
        let floats = [("llama.rope.freq_base", 10_000.0_f32), ("llama.attention.layer_norm_rms_epsilon", 1e-5)];
        let types = (0..vocab as u32).map(|id| if vocabulary.control.contains(&id) { 3_i32 } else { 1 });
        let types = list(5, vocab as u64, types.map(|kind| kind.to_le_bytes().to_vec()));
        let tokens = list(TEXT, vocab as u64, vocabulary.tokens.iter().map(|token| text(token)));
        let merges = list(TEXT, 0, []);
        let mut metadata: Vec<(String, u32, Vec<u8>)> = Vec::new();
        metadata.extend(texts.map(|(key, value)| (key.to_owned(), TEXT, text(value))));
        metadata.extend(numbers.map(|(key, value)| (key.to_owned(), U32, value.to_le_bytes().to_vec())));
        metadata.extend(floats.map(|(key, value)| (key.to_owned(), F32, value.to_le_bytes().to_vec())));
        let lists = [("tokens", tokens), ("token_type", types), ("merges", merges)];
        metadata.extend(lists.map(|(key, value)| (format!("tokenizer.ggml.{key}"), LIST, value)));

        let matrix = |name: &str, rows: usize, cols: usize| {
            (name.to_owned(), vec![cols as u64, rows as u64], 8, q8_0(rows, cols, name.len()))
        };
        let norm = |name: &str| (name.to_owned(), vec![32], 0, [1.0_f32.to_le_bytes(); 32].concat());
        let tensors = vec![
            matrix("token_embd.weight", vocab, 32),
            matrix("blk.0.attn_q.weight", 32, 32),
            matrix("blk.0.attn_k.weight", 16, 32),
            matrix("blk.0.attn_v.weight", 16, 32),
            matrix("blk.0.attn_output.weight", 32, 32),
            matrix("blk.0.ffn_gate.weight", 64, 32),
            matrix("blk.0.ffn_up.weight", 64, 32),
            matrix("blk.0.ffn_down.weight", 32, 64),
            norm("blk.0.attn_norm.weight"),
            norm("blk.0.ffn_norm.weight"),
            norm("output_norm.weight"),
        ];
        Self { version: 3, counts: None, metadata, tensors, offsets: None }
    }

    /// Sets a metadata entry; one of the key that is there is replaced.
    pub(crate) fn set(mut self, key: &str, kind: u32, value: Vec<u8>) -> Self {
        self.metadata.retain(|(of, ..)| of != key);
        self.metadata.push((key.to_owned(), kind, value));
        self
    }

    /// Changes a tensor.
    pub(crate) fn tensor(mut self, name: &str, change: impl FnOnce(&mut (String, Vec<u64>, u32, Vec<u8>))) -> Self {
        change(self.tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap());
        self
    }

    /// The file's bytes.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let (entries, tensors) = self.counts.unwrap_or((self.metadata.len() as u64, self.tensors.len() as u64));
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend(tensors.to_le_bytes());
        file.extend(entries.to_le_bytes());
        for (key, kind, value) in &self.metadata {
            file.extend(text(key));
            file.extend(kind.to_le_bytes());
            file.extend(value);
        }
        let mut at = 0;
        for (i, (name, dims, kind, data)) in self.tensors.iter().enumerate() {
            file.extend(text(name));
            file.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| file.extend(dim.to_le_bytes()));
            file.extend(kind.to_le_bytes());
            file.extend(self.offsets.as_ref().map_or(at, |offsets| offsets[i]).to_le_bytes());
            at += (data.len() as u64).next_multiple_of(32);
        }
        for (.., data) in &self.tensors {
            file.resize(file.len().next_multiple_of(32), 0);
            file.extend(data);
        }
        file
    }
}
