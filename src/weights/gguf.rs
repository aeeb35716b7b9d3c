//! A GGUF file as a base: what its header says, how it names its tensors, and reading it, fail-closed.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use super::header::Header;
use super::hf::{self, HfConfig};
use super::metadata::Metadata;
use super::plan::{Form, Plan, Sought};
use super::quantise::Quantiser;
use super::sealed::{Seal, folder_file};
use super::stream::{self, Parts, Progress};
use super::vocabulary::vocabulary;
use super::{LinearWeights, Weights};
use crate::arch::config::ModelConfig;
use crate::arch::decoder::{Decoder, FactorKind, NormKind, NormSpec, Site, Slot};
use crate::arch::rope::RopeScaling;
use crate::arch::settings::{ROPE_ORIGINAL_CONTEXT, Settings};
use crate::arch::{Architecture, unsupported};
use crate::error::{Error, Result};
use crate::ids::Digest;
use crate::kernels::format::QType;
use crate::request::Target;
use crate::text::Vocabulary;

/// What cannot be read of a base's file; [`naming`] adds the path.
pub(super) fn unreadable(error: std::io::Error) -> Error {
    Error::invalid_because("BASE_UNREADABLE", "base", error.to_string())
}

/// Adds to a refusal which file it is about.
pub(super) fn naming(path: &Path) -> impl Fn(Error) -> Error {
    move |error| match error {
        Error::Invalid { reason, field, message } => {
            Error::Invalid { reason, field, message: format!("{message} ({})", path.display()) }
        }
        other => other,
    }
}

pub(super) fn load(
    path: &Path,
    quantiser: Option<&Quantiser>,
    progress: &mut Progress<'_>,
) -> Result<(Weights, Vocabulary)> {
    let mut read_file =
        || read(BufReader::new(File::open(path).map_err(unreadable)?), name_of(path), quantiser, progress);
    read_file().map_err(naming(path))
}

/// A base's name: that of its file or folder, without its extension.
pub(super) fn name_of(path: &Path) -> String {
    path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned())
}

/// Reads a base of this name.
pub(super) fn read(
    mut file: impl Read + Seek + Send,
    name: String,
    quantiser: Option<&Quantiser>,
    progress: &mut Progress<'_>,
) -> Result<(Weights, Vocabulary)> {
    let header = Header::read(&mut file)?;
    let seal = Seal::read(&header, &mut file)?;
    if seal.is_some() && quantiser.is_some() {
        let message = "the base was quantised already, by `tenora models quantize`; serve it without --quantize, or quantise its source again";
        return Err(Error::invalid("quantize", message));
    }
    let said = Said::by(&header)?;
    let vocabulary = vocabulary_of(&header)?;
    let mut config = said.model_config(name, vocabulary.tokens.len())?;
    let decoder = Decoder::new(&config);
    let plan = said.plan(&config, &decoder, &header, seal.is_some());
    if let Some(problem) = plan.problems.into_iter().next() {
        return Err(problem);
    }
    let bytes = match &seal {
        Some(seal) => seal.bytes,
        None => file.seek(SeekFrom::End(0)).map_err(unreadable)?,
    };
    let (mut parts, digests) = stream::read(&mut [(file, bytes)], &plan.tensors, quantiser, progress)?;
    said.take_factors(&mut parts, &mut config)?;
    let mut digest = digests.first().copied().unwrap_or_else(|| Digest::of(b""));
    if let Some(seal) = seal {
        digest = seal.check(digest)?;
    }
    let digest = quantiser.map_or(digest, |quantiser| quantiser.end(digest));
    Ok((parts.into_weights(config, decoder, said.called()?, digest)?, vocabulary))
}

/// Reads what a file says of its text.
pub(super) fn vocabulary_of(header: &Header) -> Result<Vocabulary> {
    if folder_file(&header.metadata, hf::CONFIG).is_none() {
        return vocabulary(&header.metadata);
    }
    let rows = header.tensors.get("token_embd.weight").and_then(|info| info.dims.get(1).copied());
    let rows = rows.ok_or_else(|| unsupported("token_embd.weight", "is missing"))?;
    hf::vocabulary(|name| folder_file(&header.metadata, name), rows)
}

/// Where a file says what it is.
pub(super) enum Said<'a> {
    /// In GGUF's keys.
    Keys(Metadata<'a>),
    /// In the `config.json` of the folder that it was made of.
    Config(Box<HfConfig>),
}

impl<'a> Said<'a> {
    pub(super) fn by(header: &'a Header) -> Result<Self> {
        match folder_file(&header.metadata, hf::CONFIG) {
            Some(json) => Ok(Self::Config(Box::new(HfConfig::read(json)?))),
            None => Ok(Self::Keys(Metadata::new(&header.metadata)?)),
        }
    }

    /// What the model is called.
    pub(super) fn called(&self) -> Result<Vec<String>> {
        match self {
            Self::Keys(metadata) => Ok(metadata.called()),
            Self::Config(config) => config.called(),
        }
    }

    /// The numbers of a base of this name and so many tokens.
    pub(super) fn model_config(&self, name: String, tokens: usize) -> Result<ModelConfig> {
        match self {
            Self::Keys(metadata) => ModelConfig::read(metadata.architecture, metadata, name, tokens),
            Self::Config(config) => config.model_config(name),
        }
    }

    /// Looks for the file's tensors.
    pub(super) fn plan(&self, config: &ModelConfig, decoder: &Decoder, header: &Header, sealed: bool) -> Plan {
        let (architecture, of_folder) = match self {
            Self::Keys(metadata) => (metadata.architecture, false),
            Self::Config(config) => (config.architecture, true),
        };
        let form = if sealed { Gguf::Sealed { of_folder } } else { Gguf::Plain };
        plan(architecture, config, decoder, form, header)
    }

    /// Gives the rotation the factors of its frequencies, where the file has some.
    fn take_factors(&self, parts: &mut Parts, config: &mut ModelConfig) -> Result<()> {
        match self {
            Self::Keys(metadata) => take_factors(parts, config, metadata),
            Self::Config(_) => Ok(()),
        }
    }

    /// Marks which factors a file has, whose values have not been read.
    pub(super) fn mark_factors(&self, plan: &Plan, config: &mut ModelConfig) -> Result<()> {
        let mut parts = Parts::default();
        let factors = plan.tensors.iter().filter(|tensor| matches!(tensor.slot, Slot::Factors(_)));
        factors.for_each(|tensor| parts.put_vector(tensor.slot, Vec::new()));
        self.take_factors(&mut parts, config)
    }
}

fn plan(
    architecture: &'static Architecture,
    config: &ModelConfig,
    decoder: &Decoder,
    form: Gguf,
    Header { tensors, .. }: &Header,
) -> Plan {
    let mut plan = Sought { architecture, config, decoder, form: &form, tensors }.plan();
    let has = |name: &str| tensors.contains_key(name);
    if has("rope_factors_short.weight") != has("rope_factors_long.weight") {
        plan.problems.push(unsupported("rope_factors", "has only one of short and long: the file is damaged"));
    }
    plan
}

fn take_factors(parts: &mut Parts, config: &mut ModelConfig, metadata: &Metadata<'_>) -> Result<()> {
    let asked = Settings::integer(metadata, ROPE_ORIGINAL_CONTEXT)?;
    let original_context = asked.unwrap_or(config.context_length);
    let Some(rope) = config.ropes.first_mut() else { return Ok(()) };
    match std::mem::take(&mut parts.factors) {
        [_, Some(short), Some(long)] => rope.scaling = RopeScaling::LongRope { short, long, original_context },
        [Some(all), ..] => rope.scaling = RopeScaling::Factors(all),
        _ => {}
    }
    Ok(())
}

/// GGUF's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gguf {
    /// As other tools write it.
    Plain,
    /// With a seal (`sealed.rs`): rows are in Hugging Face's order.
    Sealed {
        /// The factors of the rotation are in its `config.json`, and no tensors.
        of_folder: bool,
    },
}

impl Form for Gguf {
    fn tensor_name(&self, slot: Slot, decoder: &Decoder) -> Option<String> {
        let of_site = |id: usize, what: &str| {
            let Site { layer, target } = decoder.sites[id].site;
            format!("blk.{layer}.{}.{what}", linear_name(target))
        };
        Some(match slot {
            Slot::Embedding => "token_embd.weight".to_owned(),
            Slot::Head => "output.weight".to_owned(),
            Slot::Matrix(id) => of_site(id, "weight"),
            Slot::Bias(id) => of_site(id, "bias"),
            Slot::Norm(id) => norm_name(&decoder.norms[id]),
            Slot::Factors(_) if *self == (Self::Sealed { of_folder: true }) => return None,
            Slot::Factors(FactorKind::All) => "rope_freqs.weight".to_owned(),
            Slot::Factors(FactorKind::Short) => "rope_factors_short.weight".to_owned(),
            Slot::Factors(FactorKind::Long) => "rope_factors_long.weight".to_owned(),
        })
    }

    fn interleaves(&self) -> bool {
        *self == Self::Plain
    }

    fn vector_formats(&self) -> &'static [QType] {
        &[QType::F32]
    }

    fn ties_head(&self) -> Option<bool> {
        None
    }
}

/// What GGUF calls a linear layer of a block.
fn linear_name(target: Target) -> &'static str {
    match target {
        Target::QProj => "attn_q",
        Target::KProj => "attn_k",
        Target::VProj => "attn_v",
        Target::QkvProj => "attn_qkv",
        Target::OProj => "attn_output",
        Target::GateProj => "ffn_gate",
        // One that is gate and up in one has up's name.
        Target::UpProj | Target::GateUpProj => "ffn_up",
        Target::DownProj => "ffn_down",
    }
}

/// What GGUF calls a norm's weights.
fn norm_name(norm: &NormSpec) -> String {
    let kind = match norm.kind {
        NormKind::Attention => "attn_norm",
        NormKind::Query => "attn_q_norm",
        NormKind::Key => "attn_k_norm",
        NormKind::PostAttention => "post_attention_norm",
        NormKind::FeedForward => "ffn_norm",
        NormKind::PostFeedForward => "post_ffw_norm",
        NormKind::Final => "output_norm",
    };
    match norm.layer {
        Some(layer) => format!("blk.{layer}.{kind}.weight"),
        None => format!("{kind}.weight"),
    }
}

impl Parts {
    /// A base of all of its parts.
    pub(super) fn into_weights(
        self,
        config: ModelConfig,
        decoder: Decoder,
        mut called: Vec<String>,
        digest: Digest,
    ) -> Result<Weights> {
        called.push(config.name.clone());
        let lost = || Error::internal("a tensor that was planned has not been read");
        let Self { embedding, head, matrices, mut biases, norms, .. } = self;
        biases.resize(matrices.len(), None);
        let linear = |(matrix, bias): (Option<_>, _)| Ok(LinearWeights { matrix: matrix.ok_or_else(lost)?, bias });
        let linears = matrices.into_iter().zip(biases).map(linear).collect::<Result<_>>()?;
        let norms = norms.into_iter().map(|norm| norm.ok_or_else(lost)).collect::<Result<_>>()?;
        Ok(Weights { config, decoder, called, digest, embedding: embedding.ok_or_else(lost)?, linears, norms, head })
    }
}
