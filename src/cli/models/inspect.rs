//! `tenora models inspect`: what a base is, what it would take, and whether it can be served, from its header alone.

use std::io::{Write as _, stdout};
use std::num::NonZeroUsize;
use std::path::Path;

use serde_json::{Value, json};

use super::{Failure, Result, fetch};
use crate::bases;
use crate::model::{Inspection, inspect};
use crate::request::ChatMessage;
use crate::text::{Text, TokenizerModel, Vocabulary};
use crate::weights::{FormatCount, Outline};

/// Show what a base is, what it takes in memory, and whether it can be served and trained, or why not.
///
/// Reads the file's header and looks at the shape of every tensor, but reads none. Ends with status 1 where the base can't be served.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Which base.
    #[arg(env = "TENORA_BASE", default_value = bases::DEFAULT)]
    spec: String,
    /// Tokens of the context [default: what the base was trained for; of bases with LongRoPE their original context]
    #[arg(long, value_name = "N")]
    context: Option<NonZeroUsize>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(args: Args) -> Result<()> {
    let path = fetch(&args.spec).await?;
    let found = inspect(&path, args.context.map(NonZeroUsize::get))?;
    match args.json {
        true => writeln!(stdout(), "{:#}", as_json(&path, &found))?,
        false => write!(stdout(), "{}", as_text(&path, &found))?,
    }
    match found.problems.len() {
        0 => Ok(()),
        1 => Err(Failure::other("this base can't be served: see the reason above")),
        count => Err(Failure::other(format!("this base can't be served: see the {count} reasons above"))),
    }
}

pub(super) fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// How tensors are stored.
pub(super) fn formats(outline: &Outline) -> String {
    let count =
        |FormatCount { format, tensors, bytes }: &FormatCount| format!("{format} {tensors} ({})", megabytes(*bytes));
    outline.formats.iter().map(count).collect::<Vec<_>>().join(", ")
}

/// Lines of a name and a value.
fn as_text(path: &Path, found: &Inspection) -> String {
    let outline = &found.outline;
    let mut lines = vec![("file", format!("{}, {}", path.display(), megabytes(outline.file_bytes)))];
    if !outline.called.is_empty() {
        lines.push(("called", outline.called.join("; ")));
    }
    if let Some(config) = &outline.config {
        lines.push(("architecture", config.architecture.to_owned()));
        lines.extend(config.describe());
    }
    lines.push(("tensors", formats(outline)));
    if let Some(vocabulary) = &outline.vocabulary {
        lines.extend(tokenizer(vocabulary, found.text.as_deref()));
    }
    if let (Some(config), Some(of_token)) = (&outline.config, found.kv_bytes_per_token) {
        let context = config.context_length as u64;
        let kv = format!("{of_token} bytes a token, {} for {context}", megabytes(of_token * context));
        lines.push(("weights in memory", megabytes(outline.held_bytes)));
        lines.push(("KV cache", kv));
    }
    match &found.problems[..] {
        [] => lines.push(("can be served and trained", "yes, on the CPU".to_owned())),
        problems => lines.extend(problems.iter().map(|problem| ("can't be served", problem.to_string()))),
    }
    let template = found.text.as_deref().map(|text| rendered(text).unwrap_or_else(|| "none".to_owned()));
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    let mut shown: String = lines.iter().map(|(name, value)| format!("{name:width$}  {value}\n")).collect();
    match template {
        Some(template) if template.contains('\n') => {
            let indented: String = template.lines().map(|line| format!("    {line}\n")).collect();
            shown += &format!("chat template, on an example:\n{indented}");
        }
        Some(template) => shown += &format!("{:width$}  {template}\n", "chat template"),
        None => {}
    }
    shown
}

/// The example through the base's template; without a system message where the template takes none. `None` where there is no template.
fn rendered(text: &Text) -> Option<String> {
    if !text.has_template() {
        return None;
    }
    let example = [ChatMessage::new("system", "You are brief."), ChatMessage::new("user", "Hello!")];
    let shown = text.render_chat(&example, true).or_else(|_| text.render_chat(&example[1..], true));
    Some(shown.unwrap_or_else(|error| format!("can't be rendered: {error}")))
}

fn token(vocabulary: &Vocabulary, id: u32) -> String {
    format!("{:?} ({id})", vocabulary.tokens.get(id as usize).map_or("", String::as_str))
}

fn model_name(vocabulary: &Vocabulary) -> &'static str {
    match vocabulary.model {
        TokenizerModel::BytePairs => "byte pairs",
        TokenizerModel::SentencePiece => "SentencePiece",
    }
}

fn tokenizer(vocabulary: &Vocabulary, text: Option<&Text>) -> Vec<(&'static str, String)> {
    let pre = if vocabulary.pre.is_empty() { String::new() } else { format!(", pre-tokenizer {}", vocabulary.pre) };
    let bos = vocabulary.bos.map_or("none".to_owned(), |bos| {
        format!(
            "{}, {}",
            token(vocabulary, bos),
            if vocabulary.add_bos { "before raw text" } else { "not before raw text" }
        )
    });
    let ends = text.map(|text| text.ends().iter().map(|id| token(vocabulary, *id)).collect::<Vec<_>>().join(", "));
    let mut lines = vec![
        ("tokenizer", format!("{}{pre}, {} tokens", model_name(vocabulary), vocabulary.tokens.len())),
        ("BOS", bos),
        ("EOS", token(vocabulary, vocabulary.eos)),
    ];
    lines.extend(ends.map(|ends| ("an answer ends with", ends)));
    lines
}

fn as_json(path: &Path, found: &Inspection) -> Value {
    let outline = &found.outline;
    let formats: Vec<_> = outline
        .formats
        .iter()
        .map(|of| json!({"format": of.format, "tensors": of.tensors, "bytes": of.bytes}))
        .collect();
    let config = outline.config.as_ref();
    let described = config.map(|config| {
        config
            .describe()
            .into_iter()
            .map(|(name, value)| (name.to_owned(), Value::from(value)))
            .collect::<serde_json::Map<_, _>>()
    });
    let tokenizer = outline.vocabulary.as_ref().map(|vocabulary| {
        json!({
            "model": model_name(vocabulary), "pre_tokenizer": vocabulary.pre, "tokens": vocabulary.tokens.len(), "bos": vocabulary.bos,
            "adds_bos": vocabulary.add_bos, "eos": vocabulary.eos, "ends": found.text.as_ref().map(|text| text.ends().to_vec()),
        })
    });
    let problems: Vec<_> = found.problems.iter().map(ToString::to_string).collect();
    json!({
        "path": path, "file_bytes": outline.file_bytes, "called": outline.called, "architecture": config.map(|config| config.architecture),
        "layers": config.map(|config| config.layers.len()), "hidden_size": config.map(|config| config.hidden_size),
        "heads": config.map(|config| config.attention.heads), "kv_heads": config.map(|config| config.attention.kv_heads),
        "head_dim": config.map(|config| config.attention.head_dim), "intermediate_size": config.map(|config| config.intermediate_size),
        "vocab_size": config.map(|config| config.vocab_size), "longest_context": found.longest_context,
        "context": config.map(|config| config.context_length), "in_words": described, "formats": formats, "tokenizer": tokenizer,
        "chat_template": found.text.as_deref().and_then(rendered), "weights_bytes": config.map(|_| outline.held_bytes),
        "kv_bytes_per_token": found.kv_bytes_per_token,
        "kv_bytes": config.zip(found.kv_bytes_per_token).map(|(config, of)| of * config.context_length as u64),
        "can_be_served": problems.is_empty(), "problems": problems,
    })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::model::batch::KvDtype;
    use crate::weights::testing::{File, U32};

    fn shown(file: &File, context: Option<usize>) -> (String, Value, bool) {
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(path.path(), file.bytes()).unwrap();
        let found = inspect(path.path(), context).unwrap();
        (as_text(path.path(), &found), as_json(path.path(), &found), found.problems.is_empty())
    }

    #[test]
    fn a_base_is_shown_with_what_it_takes() {
        let (text, json, sound) = shown(&File::tiny(), Some(32));
        assert!(sound, "{text}");
        for line in [
            "architecture               llama",
            "attention                  2 heads of 16, 1 of keys and values",
            "context                    32 tokens",
            "RoPE                       base 10000, 16 of 16 values turn, not scaled, in 1 of 1 blocks",
            "tensors                    Q8_0 8 (0.0 MB), F32 3 (0.0 MB)",
            "tokenizer                  byte pairs, pre-tokenizer smollm, 258 tokens",
            "an answer ends with        \"<|im_end|>\" (257)",
            "KV cache                   64 bytes a token, 0.0 MB for 32",
            "can be served and trained  yes, on the CPU",
            "    <|im_start|>user\n    Hello!<|im_end|>\n    <|im_start|>assistant\n",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        assert_eq!((&json["kv_bytes"], &json["longest_context"]), (&json!(64 * 32), &json!(64)));
        assert_eq!(json["can_be_served"], json!(true));
    }

    #[test]
    fn all_reasons_are_given_at_once() {
        let file = File::tiny().set("tokenizer.ggml.eos_token_id", U32, 9999_u32.to_le_bytes().to_vec());
        let file = file.tensor("blk.0.ffn_up.weight", |tensor| tensor.2 = 24);
        let file = file.tensor("output_norm.weight", |tensor| "output_side.weight".clone_into(&mut tensor.0));
        let (text, json, sound) = shown(&file, Some(1 << 20));
        assert!(!sound);
        for reason in [
            "tokenizer.ggml.eos_token_id: is 9999",
            "blk.0.ffn_up.weight: is stored as I8",
            "output_norm.weight: is missing",
            "output_side.weight: is a tensor that this architecture does not have",
            "context: is 1048576; must be from 1 to 64",
        ] {
            assert!(text.contains(reason), "{reason}\n{text}");
        }
        assert_eq!(json["problems"].as_array().unwrap().len(), 5);
        let other = File::tiny().set("general.architecture", 8, crate::weights::testing::text("mamba"));
        assert!(shown(&other, None).0.contains("general.architecture: is \"mamba\"; this version runs llama"));
    }

    /// What is said of a base from its header is what it is once it is read.
    #[test]
    fn golden_bases_are_what_inspection_says() {
        let all = std::env::var_os("TENORA_GOLDEN_BASES").map_or_else(|| "tests/golden/bases".into(), PathBuf::from);
        let files = std::fs::read_dir(&all).unwrap().map(|entry| entry.unwrap().path().join("base.gguf"));
        let files: Vec<_> = files.filter(|file| file.is_file()).collect();
        assert!(!files.is_empty(), "{} holds no base.gguf", all.display());
        for file in files {
            let found = inspect(&file, None).unwrap();
            let (model, text) = crate::model::Model::load(&file, &candle_core::Device::Cpu, None).unwrap();
            assert!(found.problems.is_empty(), "{}: {:?}", file.display(), found.problems);
            let config = found.outline.config.clone().unwrap();
            assert_eq!(config.layers, model.config().layers, "{}", file.display());
            assert_eq!(config.context_length, model.context_length(), "{}", file.display());
            assert_eq!(found.kv_bytes_per_token, Some(model.kv_bytes_per_token(KvDtype::F16)));
            assert_eq!(found.outline.held_bytes, model.held_bytes(), "{}", file.display());
            assert_eq!(found.text.as_deref().and_then(rendered), rendered(&text));
            assert!(as_text(&file, &found).contains("yes, on the CPU"));
        }
    }
}
