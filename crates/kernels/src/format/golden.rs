//! NF4 against bitsandbytes: `nf4.json` in the folder that `TENORA_GOLDEN` names, or where it has none in the
//! repository's.

use std::path::Path;

use super::nested::NestedScales;
use super::normal_float::{NF4_CODE, dequantize_nf4, quantize_nf4};
use super::{DYNAMIC_CODE, NESTED_BLOCK};

/// The text behind a key, up to the end of its value: a string, a list of numbers, or a word.
fn field<'a>(json: &'a str, key: &str) -> Option<&'a str> {
    let (_, value) = json.split_once(&format!("\"{key}\": "))?;
    let end = match value.as_bytes()[0] {
        b'"' => return value[1..].split('"').next(),
        b'[' => return value[1..].split(']').next(),
        _ => value.find([',', '}']),
    };
    Some(&value[..end.unwrap_or(value.len())])
}

/// What base64 stands for.
fn bytes(text: &str) -> Vec<u8> {
    const DIGITS: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = Vec::new();
    for four in text.trim_end_matches('=').as_bytes().chunks(4) {
        let digits = four.iter().map(|digit| DIGITS.find(char::from(*digit)).unwrap());
        let word = digits.fold(0, |word, digit| word << 6 | digit as u32) << (6 * (4 - four.len()));
        bytes.extend(&word.to_be_bytes()[1..four.len()]);
    }
    bytes
}

fn floats(text: &str) -> Vec<f32> {
    bytes(text).as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect()
}

fn numbers(list: &str) -> Vec<f32> {
    list.split(',').map(|x| x.trim().parse().unwrap()).collect()
}

#[test]
fn quantises_as_bitsandbytes_does() {
    let named = std::env::var_os("TENORA_GOLDEN").map(|folder| Path::new(&folder).join("nf4.json"));
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/nf4.json");
    let json = std::fs::read_to_string(named.filter(|file| file.exists()).unwrap_or(own)).unwrap();
    let (head, cases) = json.split_once("\"cases\": [").unwrap();
    assert_eq!(numbers(field(&json, "nf4_code_16").unwrap()), NF4_CODE);
    assert_eq!(numbers(field(&json, "dynamic_code_256").unwrap()), DYNAMIC_CODE);
    let values = floats(field(head, "input_f32").unwrap());
    let shape = numbers(field(head, "shape").unwrap());
    assert_eq!(values.len() as f32, shape[0] * shape[1]);
    let (mut seen, mut nested_seen) = (0, 0);
    for case in cases.split("\"blocksize\": ").skip(1) {
        let block: usize = case.split(',').next().unwrap().parse().unwrap();
        let nf4 = quantize_nf4(&values, block);
        assert!(nf4.codes == bytes(field(case, "codes").unwrap()), "{block}");
        let mut absmax = nf4.absmax.clone();
        if let Some(want) = field(case, "absmax_f32") {
            assert_eq!(absmax, floats(want), "{block}");
        }
        if field(case, "double_quant").unwrap() == "true" {
            assert_eq!(field(case, "blocksize2").unwrap().parse(), Ok(NESTED_BLOCK));
            let mut codes = vec![0; absmax.len()];
            let nested = NestedScales::quantize(&absmax, &mut codes);
            assert_eq!(Ok(nested.offset), field(case, "offset").unwrap().parse(), "{block}");
            assert_eq!(nested.scales, numbers(field(case, "absmax2").unwrap()), "{block}");
            assert_eq!(codes, bytes(field(case, "absmax_codes").unwrap()), "{block}");
            for (i, code) in codes.iter().enumerate() {
                absmax[i] = nested.of(i).scale_of(*code);
            }
            nested_seen += 1;
        }
        if let Some(want) = field(case, "dequantised_f32") {
            let mut got = vec![0.0; values.len()];
            dequantize_nf4(&nf4.codes, &absmax, block, &mut got);
            let near = |(got, want): (&f32, f32)| (got - want).abs() <= f32::EPSILON * want.abs();
            assert!(got.iter().zip(floats(want)).all(near), "{block}");
        }
        seen += 1;
    }
    assert_eq!((seen, nested_seen), (3, 2));
}
