//! The tensors of `adapter_model.safetensors`: read within what the base can need, and told apart by their names.
//!
//! A name is PEFT's (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`), or that with the adapter's name in it
//! (`lora_A.default.weight`), or without PEFT's prefix, or with what trainers wrap a model in. All names of a file are of one form: two
//! forms are two adapters.

use std::collections::BTreeMap;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::adapter::peft::selection::module_name;
use crate::adapter::peft::{SizeLimits, TENSORS_FILE, refuse};
use crate::adapter::{BaseShape, Site, VirtualForm};
use crate::arch::decoder::Slot;
use crate::error::{Error, Result};
use crate::request::Target;

/// Bytes of the length that a safetensors file begins with.
const LENGTH_BYTES: usize = 8;

/// Most bytes that the header says of one tensor.
const ENTRY_BYTES: u64 = 512;

/// Most tensors of an adapter at a site.
const MOST_PARTS: u64 = 4;

/// Most bytes of a header beside its tensors: what trainers note in `__metadata__`.
const NOTES_BYTES: u64 = 64 << 10;

/// Parts of names that wrappers of models add.
const WRAPPERS: [&str; 4] = ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];

/// Most characters of a name that an error shows.
const SHOWN: usize = 200;

/// Most bytes of a file's header: what an adapter of every linear layer of the base needs. What has more is no adapter of it, and is
/// refused before it is read: a header takes many times its size in memory.
fn most_header_bytes(shape: &BaseShape) -> u64 {
    NOTES_BYTES + ENTRY_BYTES * MOST_PARTS * u64::from(shape.layers) * shape.linears.len() as u64
}

/// Most bytes of a whole file for this base within the limits, in float32.
pub fn most_file_bytes(shape: &BaseShape, limits: SizeLimits) -> u64 {
    let values: u64 = shape.linears.iter().map(|linear| (linear.inputs + linear.outputs) as u64).sum();
    // Two more for magnitudes and biases.
    let of_sites = values.saturating_mul(u64::from(shape.layers)).saturating_mul(limits.rank.saturating_add(2));
    let width = VirtualForm::Embeddings.width(shape).max(VirtualForm::KeysAndValues.width(shape)) as u64;
    let rows = limits.trained_tokens.saturating_mul(2 * shape.hidden_size as u64);
    let values = of_sites.saturating_add(rows).max(limits.virtual_tokens.saturating_mul(width));
    values.saturating_mul(4).saturating_add(most_header_bytes(shape)).saturating_add(LENGTH_BYTES as u64)
}

/// Checks the length that a file says its header has, as soon as so much of the file is there.
///
/// # Errors
/// MALFORMED_SAFETENSORS where the header is longer than the base can need, GIT_LFS_POINTER where the file only points at one.
pub fn check_beginning(file: &[u8], shape: &BaseShape) -> Result<()> {
    check_no_pointer(TENSORS_FILE, file)?;
    let Some(length) = file.first_chunk::<LENGTH_BYTES>() else { return Ok(()) };
    let (length, most) = (u64::from_le_bytes(*length), most_header_bytes(shape));
    if length > most {
        let message = format!(
            "says that its header has {length} bytes; an adapter of this base needs {most} at most: it is not a safetensors file, or not an \
             adapter of this base; save the adapter with PEFT's save_pretrained"
        );
        return Err(refuse("MALFORMED_SAFETENSORS", TENSORS_FILE, message));
    }
    Ok(())
}

/// Refuses what a clone without Git LFS leaves in a file's place.
pub(super) fn check_no_pointer(name: &str, file: &[u8]) -> Result<()> {
    if file.starts_with(b"version https://git-lfs.github.com/spec/") {
        let message =
            "is a Git LFS pointer and not the file itself; run `git lfs pull` in its folder and import it again";
        return Err(refuse("GIT_LFS_POINTER", name, message));
    }
    Ok(())
}

/// A tensor that adapters have at a site, by the end of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    LoraA,
    LoraB,
    LoraBias,
    Magnitude,
    /// The bias of a layer itself, where it has an A and B beside it.
    AdaptedBias,
    /// The bias of a layer itself, where it has not.
    OwnBias,
    Ia3,
    Down,
    DownBias,
    Up,
    UpBias,
}

impl Part {
    const ALL: [Self; 11] = [
        Self::LoraA,
        Self::LoraB,
        Self::LoraBias,
        Self::Magnitude,
        Self::AdaptedBias,
        Self::OwnBias,
        Self::Ia3,
        Self::Down,
        Self::DownBias,
        Self::Up,
        Self::UpBias,
    ];

    /// Its name, behind the module's; nothing where it is the module's own.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::LoraA => "lora_A",
            Self::LoraB | Self::LoraBias => "lora_B",
            Self::AdaptedBias => "base_layer",
            Self::OwnBias => "",
            Self::Magnitude => "lora_magnitude_vector",
            Self::Ia3 => "ia3_l",
            Self::Down => "adapter_down",
            Self::DownBias => "adapter_down_bias",
            Self::Up => "adapter_up",
            Self::UpBias => "adapter_up_bias",
        }
    }

    /// How a file's name of it may end behind that, the way that it is written first. PEFT keeps a magnitude in a module of its own, and saves it
    /// without its end.
    fn ends(self) -> &'static [&'static str] {
        match self {
            Self::LoraA | Self::LoraB | Self::Down | Self::Up => &[".weight"],
            Self::LoraBias | Self::AdaptedBias | Self::OwnBias => &[".bias"],
            Self::Magnitude => &["", ".weight"],
            Self::Ia3 | Self::DownBias | Self::UpBias => &[""],
        }
    }

    /// Whether it is the base's own, in whose name no adapter's name can be.
    pub(super) fn is_of_base(self) -> bool {
        matches!(self, Self::AdaptedBias | Self::OwnBias)
    }
}

/// A tensor of a file with its name.
pub(super) type Named<'a> = (String, TensorView<'a>);

/// A file that holds what it should: tensors by site, rows of tokens by what they are rows of, and how their names are made.
pub(super) struct Tensors<'a> {
    pub(super) by_site: BTreeMap<Site, BTreeMap<Part, Named<'a>>>,
    pub(super) tokens: BTreeMap<Slot, Named<'a>>,
    /// What the names of the base's modules begin with: "model." or nothing.
    pub(super) root: &'static str,
}

/// Reads the header, which the caller has checked with [`check_beginning`].
pub(super) fn open(file: &[u8]) -> Result<SafeTensors<'_>> {
    SafeTensors::deserialize(file).map_err(|e| {
        let message =
            format!("is truncated or not a safetensors file ({e}); save the adapter with PEFT's save_pretrained, or copy it again");
        refuse("MALFORMED_SAFETENSORS", TENSORS_FILE, message)
    })
}

/// Gives the tensor of this name, the only one that the file may have.
///
/// # Errors
/// MISSING_TENSOR where it is not there, EXTRA_TENSOR where another one is.
pub(super) fn alone<'a>(file: &'a [u8], name: &str, shape: &BaseShape) -> Result<Named<'a>> {
    check_beginning(file, shape)?;
    let mut sorted: BTreeMap<_, _> = open(file)?.tensors().into_iter().collect();
    let Some(view) = sorted.remove(name) else {
        let message =
            "is missing from adapter_model.safetensors; send the tensors and the config that were saved together";
        return Err(refuse("MISSING_TENSOR", name, message));
    };
    match sorted.keys().next() {
        Some(other) => {
            let message = format!(
                "is beside {name}, which is all that an adapter of this kind has, and nothing may be left unapplied; save the adapter alone, \
                 with PEFT's save_pretrained"
            );
            Err(refuse("EXTRA_TENSOR", shown(other), message))
        }
        None => Ok((name.to_owned(), view)),
    }
}

impl<'a> Tensors<'a> {
    /// Reads the header; every tensor is a part of an adapter of a linear layer of the base.
    pub(super) fn read(file: &'a [u8], shape: &BaseShape) -> Result<Self> {
        check_beginning(file, shape)?;
        // By name, so that of several faults it is always the same one that is named.
        let sorted: BTreeMap<_, _> = open(file)?.tensors().into_iter().collect();
        let parsed = sorted.keys().map(|name| Name::parse(name, shape)).collect::<Result<Vec<_>>>()?;
        let infix = parsed.iter().find(|name| !name.place.is_of_base()).and_then(|name| name.form.infix.clone());
        let mut form: Option<(Form, String)> = None;
        let mut by_site: BTreeMap<Site, BTreeMap<Part, Named<'a>>> = BTreeMap::new();
        let mut tokens: BTreeMap<Slot, Named<'a>> = BTreeMap::new();
        for ((name, view), mut parsed) in sorted.into_iter().zip(parsed) {
            if parsed.place.is_of_base() {
                parsed.form.infix.clone_from(&infix);
            }
            match &form {
                None => form = Some((parsed.form, name.clone())),
                Some((form, _)) if *form == parsed.form => {}
                Some((_, first)) => {
                    let message = format!(
                        "is named in another way than {}: the file holds more than one adapter; save one adapter by itself",
                        shown(first)
                    );
                    return Err(refuse("EXTRA_TENSOR", shown(&name), message));
                }
            }
            let replaced = match parsed.place {
                Place::Site(site, part) => by_site.entry(site).or_default().insert(part, (name.clone(), view)),
                Place::Tokens(slot) => tokens.insert(slot, (name.clone(), view)),
            };
            if let Some((first, _)) = replaced {
                // Names that differ by what wraps the model.
                let message = format!(
                    "is another tensor of the same place as {}: the file holds more than one adapter; save one adapter by itself",
                    shown(&first)
                );
                return Err(refuse("EXTRA_TENSOR", shown(&name), message));
            }
        }
        let root = form.map_or("model.", |(form, _)| form.root);
        Ok(Self { by_site, tokens, root })
    }
}

fn shown(name: &str) -> String {
    name.chars().take(SHOWN).collect()
}

/// PEFT's name of a tensor.
pub(super) fn tensor_name(site: Site, part: Part) -> String {
    let dot = if part.name().is_empty() { "" } else { "." };
    format!("base_model.model.{}{dot}{}{}", module_name("model.", site), part.name(), part.ends()[0])
}

/// PEFT's name of the rows of some tokens.
pub(super) fn token_tensor_name(slot: Slot) -> String {
    let root = if slot == Slot::Head { "" } else { "model." };
    format!("base_model.model.{root}{}.{TOKEN_ADAPTER}.{TOKEN_ROWS}", token_module(slot))
}

/// PEFT's name of the module of a table of all tokens, behind where it stands.
pub(super) fn token_module(slot: Slot) -> &'static str {
    if slot == Slot::Head { "lm_head" } else { "embed_tokens" }
}

/// What the names of rows of tokens have behind the module's.
const TOKEN_ADAPTER: &str = "token_adapter";
const TOKEN_ROWS: &str = "trainable_tokens_delta";

/// What is the same in all names of a file.
#[derive(Debug, Clone, PartialEq)]
struct Form {
    /// What comes before `layers`.
    head: Vec<String>,
    root: &'static str,
    /// The adapter's name, where the file has it.
    infix: Option<String>,
}

impl Form {
    fn new(head: &[&str], infix: Option<String>) -> Option<Self> {
        let root = match *head {
            [] | ["base_model", "model"] => "",
            ["model"] | ["base_model", "model", "model"] => "model.",
            _ => return None,
        };
        Some(Self { head: head.iter().map(|part| (*part).to_owned()).collect(), root, infix })
    }
}

/// What a tensor's name says.
struct Name {
    form: Form,
    place: Place,
}

/// Where a tensor belongs.
enum Place {
    Site(Site, Part),
    /// Rows of some tokens.
    Tokens(Slot),
}

impl Place {
    fn is_of_base(&self) -> bool {
        matches!(self, Self::Site(_, part) if part.is_of_base())
    }
}

impl Name {
    fn parse(name: &str, shape: &BaseShape) -> Result<Self> {
        let parts: Vec<&str> = name.split('.').filter(|part| !WRAPPERS.contains(part)).collect();
        Self::of_parts(&parts, shape).ok_or_else(|| refuse("EXTRA_TENSOR", shown(name), why_not(&parts, shape)))
    }

    /// Of the rows of some tokens.
    fn of_tokens(parts: &[&str]) -> Option<Self> {
        let (parts, infix) = match parts {
            [parts @ .., TOKEN_ADAPTER, TOKEN_ROWS] => (parts, None),
            [parts @ .., TOKEN_ADAPTER, TOKEN_ROWS, infix] => (parts, Some((*infix).to_owned())),
            _ => return None,
        };
        let (module, head) = parts.split_last()?;
        let slot = [Slot::Embedding, Slot::Head].into_iter().find(|slot| token_module(*slot) == *module)?;
        // A model with a head has its layers a part further in.
        let head = if slot == Slot::Head { [head, &["model"]].concat() } else { head.to_vec() };
        Some(Self { form: Form::new(&head, infix)?, place: Place::Tokens(slot) })
    }

    fn of_parts(parts: &[&str], shape: &BaseShape) -> Option<Self> {
        if let Some(name) = Self::of_tokens(parts) {
            return Some(name);
        }
        let at = parts.iter().rposition(|part| *part == "layers")?;
        let (head, tail) = (&parts[..at], &parts[at + 1..]);
        let (tail, end) = match tail {
            [tail @ .., "weight"] => (tail, ".weight"),
            [tail @ .., "bias"] => (tail, ".bias"),
            tail => (tail, ""),
        };
        let (layer, block, target, part, infix) = match *tail {
            [layer, block, target] => (layer, block, target, "", None),
            [layer, block, target, part] => (layer, block, target, part, None),
            [layer, block, target, part, infix] => (layer, block, target, part, Some(infix.to_owned())),
            _ => return None,
        };
        let part = Part::ALL.into_iter().find(|of| of.name() == part && of.ends().contains(&end))?;
        if part.is_of_base() && infix.is_some() {
            return None;
        }
        let site = Site { layer: layer.parse().ok()?, target: Target::from_name(target)? };
        // The whole name of the module, so that no other block and no other spelling of the number passes.
        if shape.index(site).is_none() || module_name("", site) != format!("layers.{layer}.{block}.{target}") {
            return None;
        }
        Some(Self { form: Form::new(head, infix)?, place: Place::Site(site, part) })
    }
}

/// Why a tensor is no A or B of the base, and what to do.
fn why_not(parts: &[&str], shape: &BaseShape) -> String {
    let has = |part: &str| parts.contains(&part);
    let layer = parts.iter().skip_while(|part| **part != "layers").nth(1).and_then(|layer| layer.parse::<u64>().ok());
    let (what, advice) = if parts.iter().filter(|part| **part == "base_model").count() > 1 {
        (
            "is of a model that PEFT has wrapped twice",
            "save the inner model, which get_peft_model was given the second time",
        )
    } else if matches!(parts, [.., "embed_tokens" | "lm_head", "weight"]) {
        (
            "is the embedding or the head, which PEFT saves beside the adapter where the vocabulary was resized or modules_to_save names it",
            "save the adapter again with save_embedding_layers=False if it was not trained, else train again with trainable_token_indices",
        )
    } else if has("lora_embedding_A") || has("lora_embedding_B") || has("embed_tokens") || has("lm_head") {
        (
            "changes the embedding or the head",
            "train again with modules of the layers only and modules_to_save empty; rows of single tokens are trained by trainable_token_indices",
        )
    } else if parts.last() == Some(&"bias") && !has("lora_B") {
        ("is a bias of no linear layer of this base", "train again with bias \"none\"")
    } else if Part::ALL.iter().any(|part| has(part.name())) {
        if layer.is_some_and(|layer| layer >= u64::from(shape.layers)) {
            ("is of a layer that this base does not have", "import it on a server that runs the base it was trained on")
        } else {
            ("is of no linear layer of this base", "import it on a server that runs the base it was trained on")
        }
    } else {
        (
            "is no tensor of an adapter of a linear layer of this base",
            "save the adapter alone, with PEFT's save_pretrained",
        )
    };
    format!("{what}, and nothing may be left unapplied; {advice}")
}

/// Float32 values of a tensor.
///
/// # Errors
/// NOT_FINITE for NaN and infinity, UNSUPPORTED_DTYPE for what is not float32, float16 or bfloat16.
pub(super) fn values(name: &str, view: &TensorView<'_>) -> Result<Vec<f32>> {
    let data = view.data();
    let values: Vec<f32> = match view.dtype() {
        Dtype::F32 => data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => data.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => data.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
        other => return Err(unsupported_dtype(name, other)),
    };
    match values.iter().position(|x| !x.is_finite()) {
        Some(at) => {
            let message =
                format!("holds {} at element {at}: the training diverged; import an earlier checkpoint", values[at]);
            Err(refuse("NOT_FINITE", name, message))
        }
        None => Ok(values),
    }
}

fn unsupported_dtype(name: &str, dtype: Dtype) -> Error {
    let message =
        format!("is {dtype:?}; F32, F16 and BF16 can be read: convert the tensors to one of these and save them again");
    refuse("UNSUPPORTED_DTYPE", name, message)
}
