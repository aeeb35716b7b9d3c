//! Small vocabularies of each kind; the families' own stand in `tests/tokenizers.rs`.

use super::*;
use proptest::prelude::*;

/// SentencePiece's bytes, and pieces with scores: the later one goes before.
fn pieces() -> Vocabulary {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).into();
    tokens.extend((0..=255_u8).map(|byte| format!("<0x{byte:02X}>")));
    let words =
        ["\u{2581}", "h", "e", "l", "o", "s", ">", "<", "/", "</", "s>", "he", "ll", "llo", "hello", "\u{2581}hello"];
    tokens.extend(words.map(String::from));
    tokens.push("[X]".into());
    let scores = (0..tokens.len()).map(|id| id as f32).collect();
    Vocabulary {
        model: TokenizerModel::SentencePiece,
        scores,
        control: vec![0, 1, 2],
        user_defined: vec![tokens.len() as u32 - 1],
        bytes: (3..259).collect(),
        tokens,
        add_space_prefix: true,
        eos: 2,
        bos: Some(1),
        add_bos: true,
        unknown: Some(0),
        ..Vocabulary::default()
    }
}

fn names(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    ids.iter().map(|id| tokenizer.token(*id).to_owned()).collect()
}

#[test]
fn pieces_are_merged_by_score_and_the_rest_goes_by_bytes() {
    let tokenizer = Tokenizer::new(pieces()).unwrap();
    let plain = |text: &str| names(&tokenizer, &tokenizer.encode_plain(text, None).unwrap());
    assert_eq!(plain("hello"), ["\u{2581}hello"]);
    assert_eq!(plain("hell"), ["\u{2581}", "he", "ll"]);
    assert_eq!(plain("\u{e9}"), ["\u{2581}", "<0xC3>", "<0xA9>"]);
    assert_eq!(plain(""), [""; 0]);
    let whole = tokenizer.encode_with("<s>hello[X] hello</s>", Cow::Borrowed).unwrap();
    assert_eq!(names(&tokenizer, &whole), ["<s>", "\u{2581}hello", "[X]", "\u{2581}", "\u{2581}hello", "</s>"]);
    assert_eq!(tokenizer.bytes(whole[1]), b" hello");
    assert_eq!((tokenizer.bytes(3 + 0xC3), tokenizer.bytes(whole[2])), (&[0xC3][..], &b"[X]"[..]));
    let after = tokenizer.encode_plain("hello", whole.get(1).copied()).unwrap();
    assert_eq!(names(&tokenizer, &after), ["hello"], "no space of its own in the middle of a text");
}

/// `</` and `s>` are pieces, and `</s>` has a score.
#[test]
fn merges_give_no_control_token() {
    let tokenizer = Tokenizer::new(pieces()).unwrap();
    let ids = tokenizer.encode_plain("</s><s><unk>", None).unwrap();
    assert!(ids.iter().all(|id| !tokenizer.is_control(*id)), "{:?}", names(&tokenizer, &ids));
    assert_eq!(names(&tokenizer, &ids)[..3], ["\u{2581}", "</", "s>"]);
}

#[test]
fn white_space_goes_where_a_token_takes_it() {
    let vocabulary = Vocabulary { strips_after: vec![2], ..pieces() };
    let tokenizer = Tokenizer::new(vocabulary).unwrap();
    let ids = tokenizer.encode_with("</s> \n hello", Cow::Borrowed).unwrap();
    assert_eq!(names(&tokenizer, &ids), ["</s>", "\u{2581}hello"]);
}

/// Merges of byte pairs: whole words first where the pre-tokenizer says so, spelled out where the merged text is no token.
#[test]
fn byte_pairs_are_merged_by_rank() {
    let mut vocabulary = Vocabulary::tiny();
    vocabulary.tokens.extend(["ab", "abc", "bc"].map(String::from));
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    vocabulary.merges = vec![pair("b", "c"), pair("a", "b"), pair("c", "d")];
    let encode = |vocabulary: &Vocabulary, text: &str| {
        let tokenizer = Tokenizer::new(vocabulary.clone()).unwrap();
        let ids = tokenizer.encode_plain(text, None).unwrap();
        names(&tokenizer, &ids)
    };
    assert_eq!(encode(&vocabulary, "abc"), ["a", "bc"]);
    assert_eq!(encode(&vocabulary, "acd"), ["a", "c", "d"]);
    assert_eq!(encode(&Vocabulary { pre: "llama-bpe".into(), ..vocabulary.clone() }, "abc"), ["abc"]);
    let long = "ab".repeat(40);
    assert_eq!(encode(&vocabulary, &long), ["ab"; 40], "the long way is the short one's");
}

#[test]
fn vocabularies_that_contradict_themselves_are_refused() {
    let refused = |vocabulary: Vocabulary| {
        let error = Tokenizer::new(vocabulary).unwrap_err();
        assert!(matches!(error, Error::Invalid { reason: "UNSUPPORTED_TOKENIZER", .. }), "{error}");
    };
    refused(Vocabulary { eos: 9_999, ..pieces() });
    refused(Vocabulary { control: vec![9_999], ..pieces() });
    refused(Vocabulary { scores: vec![0.0], ..pieces() });
    refused(Vocabulary { pre: "unheard-of".into(), ..Vocabulary::tiny() });
    let mut unnamed = pieces();
    unnamed.tokens[1].clear();
    refused(unnamed);
}

#[test]
fn markers_are_told_from_text() {
    for marker in [
        "<|user|>",
        "<\u{ff5c}User\u{ff5c}>",
        "<start_of_turn>",
        "</s>",
        "[INST]",
        "[/INST]",
        "<turn|>",
        "<|tool_call>",
        "<eos>",
    ] {
        assert!(is_marker(marker, ""), "{marker}");
    }
    assert!(is_marker("<role>", "{{ '<role>' + m.role }}"));
    for text in
        ["\n\n", "    ", "<table>", "<think>", "</think>", "<tool_call>", "\u{f5}", "[PAD151646]", "<role>", "0"]
    {
        assert!(!is_marker(text, "{{ '<think>' + '<tool_call>' }}\n\n    0"), "{text}");
    }
}

proptest! {
    #[test]
    fn decoding_gives_the_text_back(text in "[helos </>\u{e9}\u{1f980}\n]{0,80}") {
        let tokenizer = Tokenizer::new(pieces()).unwrap();
        let ids = tokenizer.encode_plain(&text, None).unwrap();
        prop_assert!(ids.iter().all(|id| !tokenizer.is_control(*id)));
        let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.bytes(*id)).copied().collect();
        let decoded = String::from_utf8(bytes).unwrap();
        prop_assert_eq!(decoded, if text.is_empty() { text } else { format!(" {text}") });
    }

    #[test]
    fn the_long_way_merges_as_the_short_one(text in "[abc]{25,80}") {
        let mut vocabulary = Vocabulary::tiny();
        vocabulary.tokens.extend(["ab", "abc", "bc", "ca", "cab"].map(String::from));
        let pair = |(a, b): (&str, &str)| (a.to_owned(), b.to_owned());
        vocabulary.merges = [("b", "c"), ("a", "bc"), ("a", "b"), ("c", "a"), ("c", "ab"), ("ab", "c")].map(pair).into();
        let bpe = Bpe::new(&vocabulary, &vec![true; vocabulary.tokens.len()]).unwrap();
        let symbols: Vec<u32> = text.bytes().map(|byte| vocabulary.tokens.iter().position(|t| t.as_bytes() == [byte]).unwrap() as u32).collect();
        let (mut short, mut long) = (symbols.clone(), symbols);
        bpe.merge_short(&mut short);
        bpe.merge_long(&mut long);
        prop_assert_eq!(short, long);
    }
}
