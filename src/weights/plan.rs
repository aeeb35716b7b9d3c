//! Which tensors a base must have, of which shapes, and what becomes of them: told from the header alone, for loading and for inspection.

use std::collections::{BTreeMap, BTreeSet};

use super::header::TensorInfo;
use crate::arch::config::ModelConfig;
use crate::arch::decoder::{Decoder, FactorKind, Slot};
use crate::arch::{Architecture, unsupported};
use crate::error::Error;
use crate::kernels::format::QType;
use crate::request::Target;

/// How a kind of file names and stores the tensors.
pub(super) trait Form {
    /// What it calls a tensor; `None` where it has no such tensor.
    fn tensor_name(&self, slot: Slot, decoder: &Decoder) -> Option<String>;

    /// Whether rows of q and k lie as the architecture says of GGUF, and not as Hugging Face has them. Nested scales are numbered over the rows as
    /// they are served: there are none where rows move.
    fn interleaves(&self) -> bool;

    /// The formats in which it has norms, biases and factors.
    fn vector_formats(&self) -> &'static [QType];

    /// Whether the head is the embedding, where there is a matrix for it; `None`: then it is not.
    fn ties_head(&self) -> Option<bool>;
}

/// A tensor that is read.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Planned {
    pub(super) name: String,
    pub(super) slot: Slot,
    pub(super) info: TensorInfo,
    pub(super) qtype: QType,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Heads whose rows are put in Hugging Face's order; 0: rows stay where they are.
    pub(super) heads: usize,
}

/// A base whose tensors are looked for.
pub(super) struct Sought<'a> {
    pub(super) architecture: &'static Architecture,
    pub(super) config: &'a ModelConfig,
    pub(super) decoder: &'a Decoder,
    pub(super) form: &'a dyn Form,
    pub(super) tensors: &'a BTreeMap<String, TensorInfo>,
}

/// The tensors that are read, in the order of the files, and all that speaks against them.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) tensors: Vec<Planned>,
    pub(super) problems: Vec<Error>,
    used: BTreeSet<String>,
}

impl Sought<'_> {
    /// Looks for all tensors, and for tensors that nobody looks for.
    pub(super) fn plan(&self) -> Plan {
        let mut plan = Plan::default();
        let (vocab, hidden) = (self.config.vocab_size, self.config.hidden_size);
        let half = self.config.ropes.first().map_or(0, |rope| rope.dims / 2);
        for kind in [FactorKind::All, FactorKind::Short, FactorKind::Long] {
            self.optional(&mut plan, Slot::Factors(kind), 1, half);
        }
        self.required(&mut plan, Slot::Embedding, vocab, hidden);
        for (id, spec) in self.decoder.sites.iter().enumerate() {
            self.required(&mut plan, Slot::Matrix(id), spec.outputs, spec.inputs);
            let needs_bias = self.architecture.biased.contains(&spec.site.target);
            let bias = if needs_bias { Self::required } else { Self::optional };
            bias(self, &mut plan, Slot::Bias(id), 1, spec.outputs);
        }
        for (id, norm) in self.decoder.norms.iter().enumerate() {
            self.required(&mut plan, Slot::Norm(id), 1, norm.width);
        }
        self.head(&mut plan, vocab, hidden);
        let unused = self.tensors.keys().filter(|name| !plan.used.contains(*name));
        let unused = unused.map(|name| unsupported(name, "is a tensor that this architecture does not have"));
        plan.problems.extend(unused);
        plan.tensors.sort_by_key(|tensor| (tensor.info.file, tensor.info.start));
        plan
    }

    fn head(&self, plan: &mut Plan, vocab: usize, hidden: usize) {
        match self.form.ties_head() {
            None => self.optional(plan, Slot::Head, vocab, hidden),
            Some(false) => self.required(plan, Slot::Head, vocab, hidden),
            // A matrix that is there all the same is not used.
            Some(true) => plan.used.extend(self.form.tensor_name(Slot::Head, self.decoder)),
        }
    }

    fn optional(&self, plan: &mut Plan, slot: Slot, rows: usize, cols: usize) {
        let name = self.form.tensor_name(slot, self.decoder);
        if name.is_some_and(|name| self.tensors.contains_key(&name)) {
            self.required(plan, slot, rows, cols);
        }
    }

    fn required(&self, plan: &mut Plan, slot: Slot, rows: usize, cols: usize) {
        let Some(name) = self.form.tensor_name(slot, self.decoder) else { return };
        let Some(info) = self.tensors.get(&name) else {
            plan.problems.push(unsupported(name, "is missing"));
            return;
        };
        plan.used.insert(name.clone());
        match self.fit(&name, slot, info, (rows, cols)) {
            Ok(qtype) => {
                let heads = match self.form.interleaves() {
                    true => interleaved_heads(self.architecture, self.config, self.decoder, slot),
                    false => 0,
                };
                let info = info.clone();
                plan.tensors.push(Planned { name, slot, info, qtype, rows, cols, heads });
            }
            Err(problem) => plan.problems.push(problem),
        }
    }

    /// The format of a tensor that must have this shape, `cols` innermost.
    fn fit(&self, name: &str, slot: Slot, info: &TensorInfo, (rows, cols): (usize, usize)) -> Result<QType, Error> {
        let values = info.dims.iter().product::<u64>();
        if info.dims.first() != Some(&(cols as u64)) || Some(values) != (rows as u64).checked_mul(cols as u64) {
            let message = format!(
                "has rows of {} values, {values} in all, where the metadata and the list of tokens say {rows} rows of {cols}",
                info.dims.first().unwrap_or(&0)
            );
            return Err(unsupported(name, message));
        }
        let (storage, served) = (
            info.storage.name,
            QType::ALL.iter().copied().filter(|qtype| !(qtype.is_nested() && self.form.interleaves())),
        );
        if !slot.is_matrix() {
            let formats = self.form.vector_formats();
            let found = formats.iter().copied().find(|qtype| qtype.name() == storage);
            let expected = || format!("is stored as {storage}; {} was expected", names(formats));
            return found.ok_or_else(|| unsupported(name, expected()));
        }
        let found = served.clone().find(|qtype| qtype.name() == storage);
        let qtype = found.ok_or_else(|| {
            unsupported(name, format!("is stored as {storage}; {} are served", names(&served.collect::<Vec<_>>())))
        })?;
        if qtype.fits(cols) {
            return Ok(qtype);
        }
        let block = qtype.block_values();
        Err(unsupported(name, format!("has rows of {cols} values; as {storage} it must be a multiple of {block}")))
    }
}

/// Returns how many heads' rows GGUF holds in another order than Hugging Face; 0: the rows of both are the same.
pub(super) fn interleaved_heads(
    architecture: &Architecture,
    config: &ModelConfig,
    decoder: &Decoder,
    slot: Slot,
) -> usize {
    let (Slot::Matrix(id) | Slot::Bias(id)) = slot else { return 0 };
    match decoder.sites[id].site.target {
        Target::QProj if architecture.interleaved => config.attention.heads,
        Target::KProj if architecture.interleaved => config.attention.kv_heads,
        _ => 0,
    }
}

/// Formats, by name.
fn names(formats: &[QType]) -> String {
    formats.iter().map(|qtype| qtype.name()).collect::<Vec<_>>().join(", ")
}

/// GGUF holds the rows of q and k for interleaved RoPE: row 2j + p of a head is Hugging Face's row p * half + j. Gives the place in the
/// file of each of a head's rows in Hugging Face's order. Whole rows move, so no value changes, and adapters need no inverse.
pub(super) fn restored_order(head_rows: usize) -> impl Iterator<Item = usize> {
    let half = (head_rows / 2).max(1);
    (0..head_rows).map(move |row| 2 * (row % half) + row / half)
}
