//! What a base is, from its header alone: no tensor is read, but the shape of each is looked at.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use super::gguf::{Said, name_of, naming, unreadable, vocabulary_of};
use super::header::{Header, TensorInfo, Value};
use super::hf::Folder;
use super::plan::{Plan, Planned};
use super::sealed::Seal;
use crate::arch::config::ModelConfig;
use crate::arch::decoder::Decoder;
use crate::error::{Error, Result};
use crate::kernels::packed::PackedMatrix;
use crate::text::Vocabulary;

/// A base that has not been read.
#[derive(Debug, Default)]
pub struct Outline {
    /// What its files call it.
    pub called: Vec<String>,
    /// Of all of its files of tensors.
    pub file_bytes: u64,
    /// The numbers; `None` where they are not sound.
    pub config: Option<ModelConfig>,
    /// The tokenizer and the chat template; `None` where they cannot be read.
    pub vocabulary: Option<Vocabulary>,
    /// How tensors are stored, the most bytes first.
    pub formats: Vec<FormatCount>,
    /// What the tensors take in memory; of those that fit.
    pub held_bytes: u64,
    /// All that speaks against it.
    pub problems: Vec<Error>,
}

/// Tensors that are stored alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormatCount {
    /// GGUF's name of the format.
    pub format: &'static str,
    /// How many.
    pub tensors: usize,
    /// What they take in the files.
    pub bytes: u64,
}

/// Most reasons that are kept.
const MAX_PROBLEMS: usize = 20;

impl Outline {
    /// Reads the header of a GGUF file, or those of a folder.
    ///
    /// # Errors
    /// BASE_UNREADABLE or UNSUPPORTED_BASE where nothing can be said of it.
    pub fn read(path: &Path) -> Result<Self> {
        let outline = if path.is_dir() { Self::of_folder(path) } else { Self::of_file(path) };
        outline.map_err(naming(path))
    }

    fn of_file(path: &Path) -> Result<Self> {
        let mut file = BufReader::new(File::open(path).map_err(unreadable)?);
        let file_bytes = file.get_ref().metadata().map_err(unreadable)?.len();
        let header = Header::read(&mut file)?;
        let mut outline = Self { file_bytes, formats: formats(&header.tensors), ..Self::default() };
        let tokens = match vocabulary_of(&header) {
            Ok(vocabulary) => outline.vocabulary.insert(vocabulary).tokens.len(),
            Err(problem) => {
                outline.problems.push(problem);
                match header.metadata.get("tokenizer.ggml.tokens") {
                    Some(Value::List(_, count, _)) => *count,
                    _ => 0,
                }
            }
        };
        let said =
            Said::by(&header).and_then(|said| Ok((Seal::read(&header, &mut file)?.is_some(), said.called()?, said)));
        let (sealed, called, said) = match said {
            Ok(said) => said,
            Err(problem) => return Ok(outline.with(problem)),
        };
        outline.called = called;
        match said.model_config(name_of(path), tokens) {
            Ok(mut config) => {
                let plan = said.plan(&config, &Decoder::new(&config), &header, sealed);
                said.mark_factors(&plan, &mut config)?;
                Ok(outline.planned(config, plan))
            }
            Err(problem) => Ok(outline.with(problem)),
        }
    }

    fn of_folder(path: &Path) -> Result<Self> {
        let folder = Folder::open(path)?;
        let (file_bytes, formats) = (folder.bytes(), formats(folder.tensors()));
        let mut outline = Self { file_bytes, formats, called: folder.called()?, ..Self::default() };
        match folder.vocabulary() {
            Ok(vocabulary) => outline.vocabulary = Some(vocabulary),
            Err(problem) => outline.problems.push(problem),
        }
        let planned = folder.model_config().and_then(|config| {
            let plan = folder.plan(&config, &Decoder::new(&config))?;
            Ok((config, plan))
        });
        Ok(match planned {
            Ok((config, plan)) => outline.planned(config, plan),
            Err(problem) => outline.with(problem),
        })
    }

    fn with(mut self, problem: Error) -> Self {
        self.problems.push(problem);
        self
    }

    fn planned(mut self, config: ModelConfig, plan: Plan) -> Self {
        self.held_bytes = plan.tensors.iter().map(held).sum();
        self.problems.extend(plan.problems);
        self.problems.truncate(MAX_PROBLEMS);
        self.config = Some(config);
        self
    }
}

/// What a tensor takes in memory: a matrix as it is packed, all else as float32.
fn held(planned: &Planned) -> u64 {
    match planned.slot.is_matrix() {
        true => PackedMatrix::bytes_of(planned.qtype, planned.rows, planned.cols) as u64,
        false => (planned.cols * size_of::<f32>()) as u64,
    }
}

fn formats(tensors: &BTreeMap<String, TensorInfo>) -> Vec<FormatCount> {
    let mut formats: Vec<FormatCount> = Vec::new();
    for info in tensors.values() {
        let format = info.storage.name;
        let at = formats.iter().position(|count| count.format == format).unwrap_or_else(|| {
            formats.push(FormatCount { format, tensors: 0, bytes: 0 });
            formats.len() - 1
        });
        formats[at].tensors += 1;
        formats[at].bytes += info.bytes;
    }
    formats.sort_by_key(|count| std::cmp::Reverse(count.bytes));
    formats
}
