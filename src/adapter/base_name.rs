//! Whether the base that an adapter names is the one that is served, as far as names tell.

use crate::adapter::peft::refuse;
use crate::error::Result;

/// By which names a base is known, and what becomes of adapters that name another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BaseNames {
    /// Repositories, files and titles of the base.
    pub names: Vec<String>,
    /// Whether adapters that name another base are refused.
    pub strict: bool,
}

/// Longest name that is shown.
const MAX_SHOWN: usize = 120;

impl BaseNames {
    /// Says that an adapter names another base; `None` where it does not, or where names do not tell.
    ///
    /// # Errors
    /// BASE_MISMATCH where only adapters of this base are taken.
    pub fn warning(&self, given: &str) -> Result<Option<String>> {
        if !self.are_of_another(given) {
            return Ok(None);
        }
        let given: String = given.chars().filter(|c| !c.is_control()).take(MAX_SHOWN).collect();
        let served = self.names.iter().find(|name| has_size(&model(name))).map_or("", String::as_str);
        if self.strict {
            let message = format!(
                "is {given:?}, and this server runs {served:?} and takes adapters of that base only (--strict-base): import it on a server that \
                 runs its base, or correct the name if it is this one"
            );
            return Err(refuse("BASE_MISMATCH", "base_model_name_or_path", message));
        }
        Ok(Some(format!(
            "its files say that it was trained on {given:?}, and this server runs {served:?}: on another base than its own an adapter does \
             something else than it was trained for"
        )))
    }

    /// Whether a name is clearly another model's: a repository whose name says a size, where no name of the base, of which one says a size,
    /// is the same.
    fn are_of_another(&self, given: &str) -> bool {
        let name = model(given);
        let known: Vec<String> = self.names.iter().map(|name| model(name)).collect();
        is_repository(given) && has_size(&name) && known.iter().any(|name| has_size(name)) && !known.contains(&name)
    }
}

/// `OWNER/NAME`, and no path.
fn is_repository(name: &str) -> bool {
    let plain = |part: &str| {
        let first = part.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
        first && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    name.split_once('/').is_some_and(|(owner, name)| plain(owner) && plain(name))
}

/// What files of a model in other forms add to its name.
const SUFFIXES: [&str; 22] = [
    "gguf",
    "ggml",
    "safetensors",
    "mlx",
    "onnx",
    "hf",
    "awq",
    "gptq",
    "exl2",
    "bnb",
    "unsloth",
    "4bit",
    "8bit",
    "int4",
    "int8",
    "fp8",
    "f16",
    "fp16",
    "bf16",
    "f32",
    "fp32",
    "dynamic",
];

/// A model's name, of its repository, file or title: lower case, words separated by one dash, without what says in which form it is.
fn model(name: &str) -> String {
    let last = name.trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next().unwrap_or_default().to_lowercase();
    let mut words: Vec<&str> = last.split(['-', ' ', '_']).filter(|word| !word.is_empty()).collect();
    // `model.Q4_K_M.gguf` has its suffixes after dots, and `q4_k_m` falls apart in three.
    let mut dotted = Vec::new();
    if let Some(word) = words.pop() {
        dotted.extend(word.split('.'));
    }
    let stays = |part: &&str| !part.is_empty() && !SUFFIXES.contains(part);
    let kept = dotted.iter().rposition(stays).map_or(0, |last| last + 1);
    let joined = dotted[..kept].join(".");
    if !joined.is_empty() {
        words.push(&joined);
    }
    let mut name = words.join("-");
    while let Some(shorter) = without_form(&name) {
        name = shorter;
    }
    name
}

/// A name without its last word or words where they say a form.
fn without_form(name: &str) -> Option<String> {
    if let Some(found) = SUFFIXES.iter().find_map(|suffix| name.strip_suffix(suffix)?.strip_suffix(['-', '.'])) {
        return Some(found.to_owned());
    }
    // q8-0, q4-k-m, iq4-xs, also after a dot.
    let at = name.rmatch_indices(['-', '.']).map(|(at, _)| at).take(3).find(|at| is_quantisation(&name[at + 1..]))?;
    Some(name[..at].to_owned())
}

fn is_quantisation(words: &str) -> bool {
    let Some(rest) = words.strip_prefix("iq").or_else(|| words.strip_prefix('q')) else { return false };
    let mut parts = rest.split('-');
    let bits = parts.next().is_some_and(|bits| bits.len() == 1 && bits.as_bytes()[0].is_ascii_digit());
    bits && parts.all(|part| ["0", "1", "k", "s", "m", "l", "xs", "xxs", "nl"].contains(&part))
}

/// Whether a name says how many parameters there are: 135m, 1.5b, 8x7b.
fn has_size(name: &str) -> bool {
    name.split('-').any(|word| {
        let number = word.strip_suffix(['b', 'm']);
        number.is_some_and(|number| {
            number.starts_with(|c: char| c.is_ascii_digit())
                && number.chars().all(|c| c.is_ascii_digit() || c == '.' || c == 'x')
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_of_a_model_is_no_part_of_its_name() {
        let coder = "qwen2.5-coder-1.5b-instruct";
        for name in [
            "Qwen/Qwen2.5-Coder-1.5B-Instruct",
            "Qwen2.5 Coder 1.5B Instruct",
            "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            "/models/Qwen2.5-Coder-1.5B-Instruct.Q4_K_M",
            "bartowski/Qwen2.5-Coder-1.5B-Instruct-GGUF",
            "unsloth/Qwen2.5-Coder-1.5B-Instruct-unsloth-bnb-4bit/",
            "Qwen2.5-Coder-1.5B-Instruct-IQ4_XS.gguf",
            "Qwen2.5-Coder-1.5B-Instruct-f16.gguf",
        ] {
            assert_eq!(model(name), coder, "{name}");
        }
        assert_eq!(model("base.gguf"), "base");
        assert_eq!(model("mistralai/Mistral-7B-v0.3"), "mistral-7b-v0.3");
        assert_eq!(model("gguf"), "");
        assert_eq!(model(""), "");
    }

    #[test]
    fn only_a_name_that_is_clearly_another_models_is_warned_of() {
        let of =
            |names: &[&str], strict| BaseNames { names: names.iter().map(|&name| name.to_owned()).collect(), strict };
        let served = of(&["base", "HuggingFaceTB/SmolLM2-135M-Instruct"], false);
        for same_or_unknown in [
            "",
            "base",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "someone/smollm2-135m-instruct-GGUF",
            "./out",
            "/data/models/Llama-3.2-1B",
            "../Llama-3.2-1B",
            "C:\\models\\Llama-3.2-1B",
            "out/checkpoint-100",
            "Llama-3.2-1B",
            "a/b/Llama-3.2-1B",
            "microsoft/phi-2",
            "null",
        ] {
            assert_eq!(served.warning(same_or_unknown).unwrap(), None, "{same_or_unknown}");
        }
        for other in ["meta-llama/Llama-3.2-1B", "HuggingFaceTB/SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-135M"] {
            let warning = served.warning(other).unwrap().unwrap();
            assert!(warning.contains(other) && warning.contains("SmolLM2-135M-Instruct"), "{warning}");
        }
        assert_eq!(
            of(&["base"], true).warning("meta-llama/Llama-3.2-1B").unwrap(),
            None,
            "nobody knows what is served"
        );
        let refused = of(&["SmolLM2-135M"], true).warning("meta-llama/Llama-3.2-1B").unwrap_err().to_string();
        assert!(refused.contains("--strict-base"), "{refused}");
    }
}
