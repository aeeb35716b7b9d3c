//! Quantising a base as it is loaded, and what that costs. Floats become any format that is written; NF4 (QLoRA) takes what is quantised
//! already too, of the linear layers of blocks alone, as bitsandbytes does: embedding and head stay as they are.

use std::sync::Mutex;

use rayon::prelude::*;
use sha2::{Digest as _, Sha256};

use super::plan::Planned;
use super::stream::float_values;
use crate::arch::decoder::Slot;
use crate::error::{Error, Result};
use crate::ids::Digest;
use crate::kernels::format::{Deviation, QType, quantize};
use crate::sync::lock;

/// Quantises the matrices of floats of a base.
#[derive(Debug)]
pub(super) struct Quantiser {
    format: QType,
    cost: Mutex<Deviation>,
}

/// Of matrices whose rows are no whole blocks of what is asked for.
const OTHERWISE: QType = QType::Q8_0;

impl Quantiser {
    /// To a format by its name, GGUF's where that has one, in any case.
    pub(super) fn named(name: &str) -> Result<Self> {
        let written = || QType::ALL.iter().copied().filter(|qtype| qtype.is_written() || *qtype == QType::NF4);
        let Some(format) = written().find(|qtype| qtype.name().eq_ignore_ascii_case(name)) else {
            let known = written().map(|qtype| qtype.name().to_lowercase()).collect::<Vec<_>>().join(", ");
            return Err(Error::invalid(
                "quantize",
                format!("{name:?} is no format that is written; give one of {known}"),
            ));
        };
        Ok(Self { format, cost: Mutex::default() })
    }

    /// The format that a matrix is held in: what is quantised already stays as it is, unless NF4 is asked for.
    pub(super) fn format_of(&self, planned: &Planned) -> QType {
        if self.format == QType::NF4 {
            let taken = matches!(planned.slot, Slot::Matrix(_)) && QType::NF4.fits(planned.cols);
            return if taken { QType::NF4 } else { planned.qtype };
        }
        if !matches!(planned.qtype, QType::F32 | QType::F16 | QType::BF16) {
            return planned.qtype;
        }
        [self.format, OTHERWISE].into_iter().find(|format| format.fits(planned.cols)).unwrap_or(planned.qtype)
    }

    /// Quantises rows, on all cores.
    pub(super) fn quantise(&self, planned: &Planned, rows: &[u8], quantised: &mut Vec<u8>) {
        let (to, cols) = (self.format_of(planned), planned.cols);
        let bytes = planned.qtype.row_bytes(cols);
        quantised.resize(rows.len() / bytes * to.row_bytes(cols), 0);
        let pairs = rows.par_chunks_exact(bytes).zip(quantised.par_chunks_exact_mut(to.row_bytes(cols)));
        let of_rows = pairs.map_init(
            || vec![0.0; cols],
            |values, (row, out)| {
                float_values(planned.qtype, row, values);
                quantize(to, values, out).unwrap_or_default()
            },
        );
        let cost = of_rows.reduce(Deviation::default, |one, other| one + other);
        self.add(cost);
    }

    /// Counts what a matrix has cost.
    pub(super) fn add(&self, cost: Deviation) {
        let mut all = lock(&self.cost);
        *all = *all + cost;
    }

    /// Says what it has cost, and names the base that has come to be.
    pub(super) fn end(&self, of: Digest) -> Digest {
        let error = lock(&self.cost).relative();
        tracing::info!(format = self.format.name(), relative_error = error, "the base was quantised as it was loaded");
        let mut hasher = Sha256::new();
        hasher.update(b"tenora quantised 1");
        hasher.update(self.format.name());
        hasher.update(of);
        hasher.into()
    }

    /// The errors' root mean square over the values'.
    #[cfg(test)]
    pub(super) fn error(&self) -> f64 {
        lock(&self.cost).relative()
    }
}
