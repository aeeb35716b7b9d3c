//! Files that lie are refused, whatever they say, and none makes room for what it does not have.

use half::f16;
use proptest::prelude::*;

use super::testing::{F32, File, LIST, TEXT, U32, list, text};
use super::*;
use crate::error::Error;
use crate::text::Text;

/// The refusal of a file, as people read it.
fn refusal(file: &[u8]) -> String {
    match Weights::from_bytes(file).map(|_| ()) {
        Err(error @ Error::Invalid { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_sound_file_is_read() {
    let (weights, vocabulary) = Weights::from_bytes(&File::tiny().bytes()).unwrap();
    assert_eq!((weights.config.layers.len(), weights.config.hidden_size, weights.config.vocab_size), (1, 32, 258));
    assert_eq!(vocabulary.control, [256, 257]);
    Text::new(vocabulary).unwrap();
    let second = File { version: 2, ..File::tiny() };
    assert!(Weights::from_bytes(&second.bytes()).is_ok());
    let wide = File::tiny().set("general.alignment", U32, 8_u32.to_le_bytes().to_vec());
    assert!(Weights::from_bytes(&wide.bytes()).is_ok(), "a multiple of 32 is one of 8");
}

fn u32_of(key: &str, value: u32) -> File {
    File::tiny().set(key, U32, value.to_le_bytes().to_vec())
}

fn tokens(count: u64, given: usize) -> Vec<u8> {
    list(TEXT, count, (0..given).map(|i| text(&format!("t{i}"))))
}

/// Each with what its refusal must name.
fn lies() -> Vec<(File, &'static str)> {
    let tiny = File::tiny;
    let float = |key: &str, value: f32| tiny().set(key, F32, value.to_le_bytes().to_vec());
    let types = |count: usize| list(5, count as u64, (0..count).map(|_| 1_i32.to_le_bytes().to_vec()));
    let mut empty_control = crate::text::Vocabulary::tiny().tokens;
    empty_control[256].clear();
    let empty_control = list(TEXT, 258, empty_control.iter().map(|token| text(token)));
    let offsets = |change: fn(&mut Vec<u64>)| {
        let mut offsets = Vec::new();
        let mut at = 0;
        for (.., data) in &tiny().tensors {
            offsets.push(at);
            at += (data.len() as u64).next_multiple_of(32);
        }
        change(&mut offsets);
        File { offsets: Some(offsets), ..tiny() }
    };
    let norm = "blk.0.attn_norm.weight";
    let matrix = "blk.0.ffn_up.weight";
    let scale =
        |bits: u16| tiny().tensor(matrix, |tensor| tensor.3[34 * 5..34 * 5 + 2].copy_from_slice(&bits.to_le_bytes()));
    // 64 rows of 32 values in other blocks.
    let stored_as =
        |kind: u32, bytes: usize| tiny().tensor(matrix, |tensor| (tensor.2, tensor.3) = (kind, vec![0; 64 * bytes]));
    let halves = |last: f16| {
        let values = [f16::ONE].repeat(64 * 32 - 1).into_iter().chain([last]);
        let data = values.flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        tiny().tensor(matrix, |tensor| (tensor.2, tensor.3) = (1, data))
    };
    vec![
        (File { version: 9, ..tiny() }, "version 9"),
        (File { version: 3_u32.swap_bytes(), ..tiny() }, "big-endian"),
        (File { counts: Some((1 << 63, 11)), ..tiny() }, "metadata entries"),
        (File { counts: Some((17, 1 << 63)), ..tiny() }, "tensors"),
        (File { counts: Some((18, 11)), ..tiny() }, "file"),
        (File { counts: Some((16, 11)), ..tiny() }, "file"),
        (File { counts: Some((17, 12)), ..tiny() }, "file"),
        (u32_of("general.alignment", 0), "general.alignment"),
        (u32_of("general.alignment", 33), "general.alignment"),
        (u32_of("general.alignment", 1 << 31), "general.alignment"),
        (u32_of("general.alignment", 64), "no multiple of 64"),
        (tiny().set("general.alignment", TEXT, text("32")), "general.alignment"),
        (offsets(|at| at[1] = at[2]), "overlaps"),
        (offsets(|at| at[1] -= 32), "overlaps"),
        (offsets(|at| at[1] += 1), "multiple"),
        (offsets(|at| at[10] = 1 << 40), "output_norm.weight ends at byte"),
        (offsets(|at| at[10] += 64), "output_norm.weight"),
        (offsets(|at| at[10] = u64::MAX - 31), "beyond"),
        (u32_of("llama.context_length", u32::MAX / 2), "llama.context_length"),
        (u32_of("llama.context_length", 0), "llama.context_length: is 0"),
        (u32_of("llama.block_count", 2), "blk.1.attn_q.weight"),
        (u32_of("llama.block_count", u32::MAX / 2), "llama.block_count: is 2147483647"),
        (u32_of("llama.block_count", u32::MAX), "llama.block_count"),
        (u32_of("llama.embedding_length", 64), "token_embd.weight"),
        (u32_of("llama.attention.head_count", 0), "llama.attention.head_count: is 0"),
        (u32_of("llama.attention.head_count_kv", 0), "llama.attention.head_count_kv: is 0"),
        (u32_of("llama.attention.head_count", 1 << 30), "llama.attention.key_length: is 0"),
        (u32_of("llama.rope.dimension_count", 1 << 30), "llama.rope.dimension_count: is 1073741824"),
        (u32_of("llama.rope.dimension_count", 11), "llama.rope.dimension_count: is 11"),
        (u32_of("tokenizer.ggml.eos_token_id", 258), "eos_token_id"),
        (float("llama.rope.freq_base", f32::NAN), "freq_base"),
        (float("llama.rope.freq_base", 0.0), "freq_base"),
        (float("llama.attention.layer_norm_rms_epsilon", f32::INFINITY), "epsilon"),
        (float("llama.attention.layer_norm_rms_epsilon", -1.0), "epsilon"),
        (tiny().set("tokenizer.ggml.tokens", LIST, tokens(200, 200)), "token_type"),
        (tiny().set("tokenizer.ggml.tokens", LIST, tokens(300, 300)), "token_type"),
        (
            tiny().set("tokenizer.ggml.tokens", LIST, tokens(300, 300)).set(
                "tokenizer.ggml.token_type",
                LIST,
                types(300),
            ),
            "token_embd.weight",
        ),
        (tiny().set("tokenizer.ggml.tokens", LIST, tokens(1 << 63, 3)), "tokenizer.ggml.tokens"),
        (tiny().set("tokenizer.ggml.tokens", LIST, tokens(4000, 258)), "file"),
        (tiny().set("tokenizer.ggml.tokens", U32, vec![1, 0, 0, 0]), "tokenizer.ggml.tokens"),
        (tiny().set("tokenizer.ggml.tokens", LIST, empty_control), "control token without a text, 256"),
        (tiny().set("tokenizer.ggml.token_type", LIST, types(257)), "token_type"),
        (tiny().set("tokenizer.ggml.token_type", LIST, types(0)), "token_type"),
        (tiny().set("tokenizer.ggml.merges", LIST, list(TEXT, 1, [text("ab")])), "merges"),
        (
            tiny().set("tokenizer.chat_template", TEXT, u64::MAX.to_le_bytes().to_vec()),
            "tokenizer.chat_template is longer",
        ),
        (tiny().set("tokenizer.chat_template", TEXT, [&2_u64.to_le_bytes()[..], b"\xff\xfe"].concat()), "no UTF-8"),
        (tiny().set("note", 99, vec![]), "type 99"),
        (tiny().set("note", LIST, list(LIST, 1, [list(U32, 0, [])])), "list of lists"),
        (tiny().set("note", LIST, list(U32, 1 << 62, [])), "note says that it has"),
        (tiny().set("general.architecture", TEXT, text("mamba")), "general.architecture"),
        (tiny().tensor(matrix, |tensor| tensor.2 = 4), "type 4"),
        (stored_as(39, 17), "is stored as MXFP4; F32, F16, BF16, Q4_0"),
        (stored_as(15, 292), matrix),
        (tiny().tensor("blk.0.ffn_down.weight", |tensor| tensor.1 = vec![72, 32]), "blk.0.ffn_down.weight"),
        (halves(f16::NAN), "not a number, in row 63"),
        (halves(f16::INFINITY), "not a number, in row 63"),
        (tiny().tensor(matrix, |tensor| tensor.2 = 14), matrix),
        (tiny().tensor(matrix, |tensor| tensor.1 = vec![32, u64::MAX]), matrix),
        (tiny().tensor(matrix, |tensor| tensor.1 = vec![0, 64]), matrix),
        (tiny().tensor(matrix, |tensor| tensor.1 = vec![64, 32]), matrix),
        (tiny().tensor(matrix, |tensor| tensor.1 = vec![]), "dimensions"),
        (tiny().tensor(matrix, |tensor| tensor.1 = vec![1; 9]), "dimensions"),
        (tiny().tensor(matrix, |tensor| "blk.0.ffn_down.weight".clone_into(&mut tensor.0)), "twice"),
        (tiny().tensor(matrix, |tensor| "blk.0.ffn_side.weight".clone_into(&mut tensor.0)), "ffn_up"),
        (tiny().tensor(norm, |tensor| tensor.3[..4].copy_from_slice(&f32::NAN.to_le_bytes())), norm),
        (tiny().tensor(norm, |tensor| tensor.2 = 24), norm),
        (scale(f16::NAN.to_bits()), "scale"),
        (scale(f16::INFINITY.to_bits()), "scale"),
    ]
}

#[test]
fn files_that_lie_are_refused_by_name() {
    let wrong = |(file, named): (File, &str)| {
        let refusal = match Weights::from_bytes(&file.bytes()) {
            Ok(_) => "was read".to_owned(),
            Err(error) => error.to_string(),
        };
        (!refusal.contains(named)).then(|| format!("{named}: {refusal}"))
    };
    let wrong: Vec<_> = lies().into_iter().filter_map(wrong).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let mut twice = File::tiny();
    twice.metadata.push(twice.metadata[0].clone());
    assert!(refusal(&twice.bytes()).contains("twice"));
    for other in [&b""[..], b"GGU", b"PK\x03\x04 a zip", b"version https://git-lfs.github.com/spec/v1"] {
        assert!(refusal(other).contains("fetch it again"), "{other:?}");
    }
}

/// Rows of heads that are restored, and pieces that end within a matrix: the bytes are those of the file, and so is the digest.
#[test]
fn a_file_is_read_once_in_pieces() {
    let file = File::tiny();
    let bytes = file.bytes();
    let mut heard = Vec::new();
    let read =
        gguf::read(std::io::Cursor::new(&bytes), "base".into(), None, &mut |done, total| heard.push((done, total)));
    let (weights, _) = read.unwrap();
    assert_eq!(weights.digest, crate::ids::Digest::of(&bytes));
    assert!(heard.is_sorted() && heard.last() == Some(&(bytes.len() as u64, bytes.len() as u64)), "{heard:?}");
    let tensor = |name: &str| &file.tensors.iter().find(|tensor| tensor.0 == name).unwrap().3;
    let linear = |target| {
        let at = weights.decoder.sites.iter().position(|site| site.site.target == target).unwrap();
        weights.linears[at].matrix.unpack()
    };
    assert_eq!(linear(crate::request::Target::DownProj), *tensor("blk.0.ffn_down.weight"));
    // Heads of 16 rows: 0, 2, .., 14, then 1, 3, .., 15.
    let (q, got) = (tensor("blk.0.attn_q.weight"), linear(crate::request::Target::QProj));
    let rows: Vec<_> = q.chunks_exact(34).collect();
    let order = [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15];
    let want: Vec<u8> = (0..2).flat_map(|head| order.map(|row| rows[16 * head + row])).flatten().copied().collect();
    assert_eq!(got, want);
}

#[test]
fn a_file_that_is_cut_is_refused_wherever() {
    let file = File::tiny().bytes();
    for len in (0..file.len()).step_by(97).chain(file.len() - 40..file.len()) {
        refusal(&file[..len]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever the bytes, there is an answer, and a base that is read has a tokenizer or says why not.
    #[test]
    fn no_damage_panics(changes in prop::collection::vec((0_usize..9000, any::<u8>()), 1..6), cut in prop::option::of(0_usize..30_000)) {
        let mut file = File::tiny().bytes();
        for (at, to) in changes {
            let at = at % file.len();
            file[at] = to;
        }
        file.truncate(cut.unwrap_or(usize::MAX));
        if let Ok((_, vocabulary)) = Weights::from_bytes(&file) {
            drop(Text::new(vocabulary));
        }
    }
}
