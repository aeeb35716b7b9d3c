//! Bases that are quantised into files are the bases that are quantised as they are loaded; and files that are damaged.

use std::io::Cursor;
use std::path::PathBuf;

use candle_core::Device;

use super::*;
use crate::model::batch::{KvDtype, KvLayout, Readout, SequenceChunk};
use crate::model::{LoadOptions, Model};
use crate::weights::Outline;
use crate::weights::testing::{self, TEXT, text};

/// A base as a file of ours.
pub(in crate::weights) fn written(source: &Path, format: &str) -> Vec<u8> {
    let quantised = Quantised::read(source, format, &mut |_, _| {}).unwrap_or_else(|e| panic!("{e}"));
    let mut file = Vec::new();
    quantised.write(&mut file).unwrap();
    file
}

/// What is read from a base's file is what is quantised from the base, to the bit. Gives the bits of a weight of the layers in NF4.
pub(in crate::weights) fn check_comes_back(source: &Path) -> f64 {
    let (name, file) = (source.display(), written(source, "nf4"));
    let (want, vocabulary) = Weights::load(source, Some("nf4"), &mut |_, _| {}).unwrap();
    let (got, read) = Weights::from_bytes(&file).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!((got.digest, &got.decoder.steps), (want.digest, &want.decoder.steps), "{name}");
    let mut config = got.config.clone();
    config.name.clone_from(&want.config.name);
    assert_eq!(config, want.config, "{name}");
    assert_eq!(format!("{read:?}"), format!("{vocabulary:?}"), "{name}");
    assert!(got.norms == want.norms, "{name}");
    let (mut bytes, mut values) = (0, 0);
    for (got, want) in got.linears.iter().zip(&want.linears) {
        assert!(same(&got.matrix, &want.matrix) && got.bias == want.bias, "{name}");
        if got.matrix.qtype() == QType::NF4 {
            bytes += got.matrix.unpack().len();
            values += got.matrix.rows() * got.matrix.cols();
        }
    }
    assert!(same(&got.embedding, &want.embedding), "{name}");
    assert_eq!(got.head.is_some(), want.head.is_some(), "{name}");
    assert!(got.head.iter().zip(&want.head).all(|(got, want)| same(got, want)), "{name}");
    8.0 * bytes as f64 / values.max(1) as f64
}

fn same(one: &PackedMatrix, other: &PackedMatrix) -> bool {
    (one.qtype(), one.rows(), one.cols()) == (other.qtype(), other.rows(), other.cols())
        && one.unpack() == other.unpack()
}

fn golden() -> PathBuf {
    std::env::var_os("TENORA_GOLDEN_BASES").map_or_else(|| "tests/golden/bases".into(), PathBuf::from)
}

/// Of every architecture and every format of blocks, 4.13 bits a weight at most.
#[test]
fn files_are_what_is_quantised_from_their_sources() {
    let folders = std::fs::read_dir(golden()).unwrap().map(|entry| entry.unwrap().path().join("base.gguf"));
    let files: Vec<_> = folders.filter(|file| file.is_file()).collect();
    assert!(!files.is_empty());
    for file in files {
        let bits = check_comes_back(&file);
        // Rows of 224 and 480 are no blocks of 64.
        assert!(bits <= 4.13 && (bits > 4.0 || file.to_string_lossy().contains("896")), "{}: {bits}", file.display());
    }
}

/// The logits of some ids.
fn logits(path: &Path, quantize: Option<&str>) -> (Vec<u32>, crate::ids::Digest) {
    let options = LoadOptions { quantize, ..LoadOptions::default() };
    let (model, _) = Model::load_watched(path, &Device::Cpu, options, &mut |_, _| {}).unwrap();
    let layout = KvLayout { block_tokens: 16, blocks: 1, dtype: KvDtype::F16 };
    let span = SequenceChunk { ids: &[1, 77, 200, 3], start: 0, blocks: &[0], adapter: None, logits: Readout::All };
    let mut exec = model.executor(layout).unwrap();
    let logits = exec.forward(&[span]).unwrap();
    (logits.iter().map(|x| x.to_bits()).collect(), model.shape().digest)
}

#[test]
fn a_file_serves_the_logits_of_its_source_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    for (name, format) in [("llama-bias-q4_0", "nf4"), ("gemma2-q4_k_m", "nf4"), ("type-bf16", "q8_0")] {
        let (source, file) =
            (Path::new("tests/golden/bases").join(name).join("base.gguf"), dir.path().join(format!("{name}.gguf")));
        std::fs::write(&file, written(&source, format)).unwrap();
        assert!(logits(&file, None) == logits(&source, Some(format)), "{name}");
        let outline = Outline::read(&file).unwrap();
        assert!(outline.problems.is_empty(), "{:?}", outline.problems);
        let held = Weights::load(&file, None, &mut |_, _| {}).unwrap().0.held_bytes();
        assert_eq!(outline.held_bytes, held, "{name}");
        let formats: Vec<_> = outline.formats.iter().map(|count| count.format.to_lowercase()).collect();
        assert!(formats.contains(&format.to_owned()), "{formats:?}");
        let again = Weights::load(&file, Some("nf4"), &mut |_, _| {}).map(drop).unwrap_err().to_string();
        assert!(again.contains("quantised already"), "{again}");
    }
}

/// The tests' base, whose down projection alone has rows of 64, as a file of ours.
fn tiny() -> Vec<u8> {
    let source = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(source.path(), testing::File::tiny().bytes()).unwrap();
    written(source.path(), "nf4")
}

fn refusal(file: &[u8]) -> String {
    match Weights::from_bytes(file).map(drop) {
        Err(error @ Error::Invalid { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

/// A changed file with the checksum that it then has.
fn resealed(mut file: Vec<u8>) -> Vec<u8> {
    file.truncate(file.len() - CHECKSUM_BYTES as usize);
    let checksum = Sha256::digest(&file);
    file.extend(checksum);
    file
}

#[test]
fn a_damaged_file_is_refused() {
    let file = tiny();
    assert!(Weights::from_bytes(&file).is_ok());
    for at in (0..file.len()).step_by(61).chain(file.len() - 40..file.len()) {
        let mut damaged = file.clone();
        damaged[at] ^= 0x10;
        refusal(&damaged);
        refusal(&file[..at]);
    }
    refusal(&[&file[..], &[0]].concat());
}

#[test]
fn a_file_that_lies_is_refused_by_name() {
    let file = tiny();
    let place = |what: &[u8]| file.windows(what.len()).position(|window| window == what).unwrap();
    let changed = |at: usize, to: &[u8]| {
        let mut file = file.clone();
        file[at..at + to.len()].copy_from_slice(to);
        refusal(&resealed(file))
    };
    // The matrix is the only one whose blocks have scales in common: its offset, then a nested scale.
    let header = Header::read(&mut Cursor::new(&file)).unwrap();
    let name = "blk.0.ffn_down.weight";
    let start = header.tensors[name].start as usize;
    for (at, number) in [(start, f32::NAN), (start + 4, f32::INFINITY)] {
        assert!(changed(at, &number.to_le_bytes()).contains(&format!("{name}: has a scale that is not a number")));
    }
    assert!(
        changed(place(DIGEST.as_bytes()) + DIGEST.len() + 12, b"sha257")
            .contains("tenora.quantized.digest: is no digest")
    );
    // Other files than ours may not hold it: their rows may be in another order than their scales.
    assert!(changed(place(DIGEST.as_bytes()), b"x").contains(&format!("{name}: is stored as NF4; F32")));
    let plain = testing::File::tiny().set(DIGEST, TEXT, text(&crate::ids::Digest::of(b"x").to_string()));
    assert!(refusal(&plain.bytes()).contains("checksum"));
}

/// Every kind of value of a header comes back.
#[test]
fn headers_are_read_as_they_are_written() {
    let source = testing::File::tiny();
    let integers = [(0_u32, 1), (1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (10, 8), (11, 8)];
    let mut source = integers
        .into_iter()
        .fold(source, |file, (kind, bytes)| file.set(&format!("int.{kind}"), kind, vec![0xFE; bytes]));
    for (key, kind, value) in [
        ("float.4", 6, 0.1_f32.to_le_bytes().to_vec()),
        ("float.8", 12, 0.1_f64.to_le_bytes().to_vec()),
        ("yes", 7, vec![1]),
        ("list", testing::LIST, testing::list(3, 2, [vec![1, 2], vec![3, 4]])),
        ("texts", testing::LIST, testing::list(TEXT, 2, [text("a"), text("")])),
    ] {
        source = source.set(key, kind, value);
    }
    let read = |file: &[u8]| Header::read(&mut Cursor::new(file)).unwrap();
    let header = read(&source.bytes());
    let mut described = header.tensors.clone().into_iter().collect::<Vec<_>>();
    described.sort_by_key(|(_, info)| info.start);
    let as_stored = |(name, info): &(String, TensorInfo)| {
        let qtype = QType::ALL.iter().copied().find(|qtype| qtype.name() == info.storage.name);
        (name.clone(), info.dims.clone(), qtype.unwrap())
    };
    let tensors: Vec<_> = described.iter().map(as_stored).collect();
    let mut file =
        write_header(&header.metadata, tensors.iter().map(|(name, dims, qtype)| (name.as_str(), dims.clone(), *qtype)));
    file.resize(file.len() + source.bytes().len(), 0);
    let again = read(&file);
    assert_eq!(again.metadata, header.metadata);
    let sizes = |header: &Header| {
        header.tensors.iter().map(|(name, info)| (name.clone(), info.dims.clone(), info.bytes)).collect::<Vec<_>>()
    };
    assert_eq!(sizes(&again), sizes(&header));
}
