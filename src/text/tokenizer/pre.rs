//! The pre-tokenizers of byte-pair vocabularies: one closed table from the name in a file to what splits a text into words.
//!
//! The expressions are those of the models' own tokenizers. An unknown name is refused: any guess would give other ids without an error.

use fancy_regex::Regex;

use crate::error::{Error, Result};

/// What a pre-tokenizer does before merges.
#[derive(Debug)]
pub(super) struct Pre {
    /// As files write it (`tokenizer.ggml.pre`).
    names: &'static [&'static str],
    /// Each cuts all pieces of the one before: what matches becomes a piece of its own, and so does what lies between matches.
    splits: &'static [&'static str],
    /// A word that is a token as a whole is not built by merges.
    pub whole_words: bool,
    /// Whether a text begins with BOS where the file does not say.
    pub adds_bos: bool,
    /// Words are UTF-8 with spaces written as U+2581 and single bytes as tokens `<0xNN>`, not in GPT-2's byte alphabet.
    pub raw: bool,
    /// A run of newlines is one token, where there is one of its length.
    pub newline_runs: bool,
}

/// Merges over the whole text, as Hugging Face's files have SentencePiece's vocabularies. No GGUF file says this.
pub(in crate::text) const HF_RAW: &str = "hf-raw";

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
const LLAMA3: &str = concat!(
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN2: &str = concat!(
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN35: &str = concat!(
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}",
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Words are cut where small letters end and capitals begin.
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const GPT4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\x{1F7D}ᾀ-ᾴᾶ-ᾼ\x{1FBE}ῂ-ῄῆ-ῌῐ-\x{1FD3}ῖ-\x{1FDB}ῠ-Ῥῲ-ῴῶ-ῼ",
    r"ℂℇℊ-ℓℕℙ-ℝℤ\x{2126}ℨ\x{212A}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
);
const CJK: &str = r"[一-龥ࠀ-一가-퟿]+";
const DEEPSEEK_V3: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    concat!(
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
];
const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";

/// A row of byte-level words that says nothing of BOS.
const fn row(names: &'static [&'static str], splits: &'static [&'static str]) -> Pre {
    Pre { names, splits, whole_words: false, adds_bos: false, raw: false, newline_runs: false }
}

/// A row whose words need no merges where they are tokens.
const fn whole(names: &'static [&'static str], splits: &'static [&'static str], adds_bos: bool) -> Pre {
    Pre { names, splits, whole_words: true, adds_bos, raw: false, newline_runs: false }
}

const TABLE: [Pre; 25] = [
    row(
        &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "gigachat",
            "mellum",
            "exaone4",
            "a.x-4.0",
        ],
        &[GPT2],
    ),
    // Every numeric character alone.
    row(
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"],
        &[r"\p{N}", GPT2],
    ),
    whole(&["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"], &[LLAMA3], true),
    row(&["dbrx", "smaug-bpe", "chatglm-bpe"], &[LLAMA3]),
    whole(&["glm4", "glm5"], &[LLAMA3], false),
    whole(&["minicpm5"], &[r"\p{N}{1,3}", QWEN2], false),
    row(
        &["qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2", "kormo", "f2llmv2"],
        &[QWEN2],
    ),
    row(&["qwen35"], &[QWEN35]),
    whole(&["tekken"], &[TEKKEN], true),
    row(&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], &[GPT4O]),
    row(&["tiny_aya", "cohere2moe"], &[r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O]),
    row(&["falcon"], &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"]),
    row(&["default"], &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
    row(&["deepseek-llm"], &[r"[\r\n]", DEEPSEEK_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", CJK, r"\p{N}+"]),
    row(&["deepseek-coder"], &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"]),
    row(&["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"], &DEEPSEEK_V3),
    row(&["poro-chat", "bloom", "gpt3-finnish"], &[BLOOM]),
    row(&["viking"], &[BLOOM, r"\p{N}"]),
    row(
        &["seed-coder"],
        &[concat!(
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
            r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
        )],
    ),
    row(
        &["bailingmoe", "bailingmoe2", "llada-moe"],
        &[concat!(
            r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
        )],
    ),
    row(
        &["exaone-moe"],
        &[concat!(
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
        )],
    ),
    row(&["ufakzeka"], &[r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"]),
    row(&["laguna"], &[r"[^\n]+|[\n]+", QWEN2]),
    // The merges of a whole line: no word borders.
    Pre {
        names: &["gemma4"],
        splits: &[r"[^\n]+|[\n]+"],
        whole_words: false,
        adds_bos: true,
        raw: true,
        newline_runs: true,
    },
    Pre { names: &[HF_RAW], splits: &[], whole_words: false, adds_bos: false, raw: true, newline_runs: false },
];

impl Pre {
    /// Finds a pre-tokenizer by the name in the file.
    ///
    /// # Errors
    /// UNSUPPORTED_TOKENIZER where the name is not in the table.
    pub fn find(name: &str) -> Result<&'static Self> {
        const ROWS: &[Pre] = &TABLE;
        ROWS.iter().find(|row| row.names.contains(&name)).ok_or_else(|| {
            let name: String = name.chars().take(80).collect();
            let known: Vec<&str> = TABLE.iter().flat_map(|row| row.names).copied().collect();
            let message =
                format!("{name:?} is not one of {}; another pre-tokenizer would give wrong ids", known.join(", "));
            Error::invalid_because("UNSUPPORTED_TOKENIZER", "tokenizer.ggml.pre", message)
        })
    }

    /// The expressions, ready to split.
    pub fn splitter(&self) -> Result<Splitter> {
        let compiled = self.splits.iter().map(|split| Regex::new(split)).collect::<Result<_, _>>();
        Ok(Splitter(compiled.map_err(Error::internal)?))
    }
}

/// Cuts a text into words.
#[derive(Debug)]
pub(super) struct Splitter(Vec<Regex>);

impl Splitter {
    /// The words of a text, in order; together they are the text.
    ///
    /// # Errors
    /// INVALID_ARGUMENT where an expression gives up on this text.
    pub fn words<'t>(&self, text: &'t str) -> Result<Vec<&'t str>> {
        let mut pieces = vec![text];
        for split in &self.0 {
            let mut cut = Vec::with_capacity(pieces.len() * 2);
            for piece in pieces {
                let mut from = 0;
                for found in split.find_iter(piece) {
                    let found = found.map_err(|e| Error::invalid("text", format!("can't be split into words: {e}")))?;
                    cut.extend(
                        [&piece[from..found.start()], found.as_str()].into_iter().filter(|part| !part.is_empty()),
                    );
                    from = found.end();
                }
                cut.extend(Some(&piece[from..]).filter(|part| !part.is_empty()));
            }
            pieces = cut;
        }
        Ok(pieces)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(pre: &str, text: &str) -> Vec<String> {
        Pre::find(pre).unwrap().splitter().unwrap().words(text).unwrap().into_iter().map(str::to_owned).collect()
    }

    #[test]
    fn words_are_cut_as_their_families_cut_them() {
        assert_eq!(words("gpt-2", "It's  1234 ok\n\n x"), ["It", "'s", " ", " 1234", " ok", "\n\n", " x"]);
        assert_eq!(words("smollm", "a 12"), ["a", " ", "1", "2"]);
        assert_eq!(words("llama-bpe", "IT'S 1234567\n\n"), ["IT", "'S", " ", "123", "456", "7", "\n\n"]);
        assert_eq!(words("qwen2", "a12 b"), ["a", "1", "2", " b"]);
        assert_eq!(words("tekken", "camelCase ABC/"), ["camel", "Case", " ABC", "/"]);
        assert_eq!(words("falcon", "a.b 1234"), ["a", ".", "b", " ", "123", "4"]);
        assert_eq!(words("gemma4", "a b\n\nc"), ["a b", "\n\n", "c"]);
    }

    #[test]
    fn unknown_names_are_refused_and_no_name_stands_twice() {
        let error = Pre::find("no-such-pre").unwrap_err();
        assert!(matches!(&error, Error::Invalid { reason: "UNSUPPORTED_TOKENIZER", .. }), "{error}");
        assert!(error.to_string().contains("\"no-such-pre\" is not one of gpt-2"), "{error}");
        let mut names: Vec<&str> = TABLE.iter().flat_map(|row| row.names).copied().collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    proptest! {
        #[test]
        fn words_are_the_text(text in "[a-zA-Z0-9 \n\r\t'é我½².,<>|]{0,60}", row in 0..TABLE.len()) {
            let words = TABLE[row].splitter().unwrap().words(&text).unwrap().concat();
            prop_assert_eq!(words, text);
        }
    }
}
