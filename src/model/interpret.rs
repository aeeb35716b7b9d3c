//! What steps hand on to later ones, in the executors whose values are tensors.

use candle_core::Tensor;

use crate::error::{Error, Result};

/// Activations between two steps.
#[derive(Debug, Default)]
pub(super) struct Values {
    /// The residual stream, `[rows, hidden_size]`; at the end the head's input.
    pub x: Value,
    /// The input of the next output layer.
    pub y: Value,
    projected: Vec<Tensor>,
}

/// A value that a step leaves and a later one takes.
#[derive(Debug, Default)]
pub(super) struct Value(Option<Tensor>);

fn absent() -> Error {
    Error::internal("a step comes before what it needs")
}

impl Value {
    pub fn put(&mut self, value: Tensor) {
        self.0 = Some(value);
    }

    pub fn take(&mut self) -> Result<Tensor> {
        self.0.take().ok_or_else(absent)
    }

    pub fn get(&self) -> Result<&Tensor> {
        self.0.as_ref().ok_or_else(absent)
    }
}

impl Values {
    /// Leaves what was projected: q, k, v or gate, up, of these widths; or one tensor with all of them side by side.
    pub fn put_projected(&mut self, values: Vec<Tensor>, widths: &[usize]) -> Result<()> {
        self.projected = values;
        if let [all] = &self.projected[..] {
            let ends = widths.iter().scan(0, |end, width| {
                *end += width;
                Some(*end)
            });
            let parts = ends.zip(widths).map(|(end, width)| Ok(all.narrow(1, end - width, *width)?.contiguous()?));
            self.projected = parts.collect::<Result<_>>()?;
        }
        Ok(())
    }

    pub fn take_projected<const N: usize>(&mut self) -> Result<[Tensor; N]> {
        std::mem::take(&mut self.projected).try_into().map_err(|_| absent())
    }
}
