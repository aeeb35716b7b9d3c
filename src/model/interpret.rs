//! What a decoder's steps mean where values are tensors: for training and on a GPU alike, over each one's operations.

use candle_core::Tensor;

use crate::arch::decoder::{Attend, Merge, NormId, SiteId, Step, StepExecutor};
use crate::error::{Error, Result};
use crate::kernels::spec::Activation;
use crate::model::Model;

/// The operations on a batch's rows, float32 `[rows, width]`.
pub(super) trait TensorOps {
    /// The embeddings of the rows' ids, times `scale`.
    fn embed(&self, scale: f32) -> Result<Tensor>;
    fn norm(&self, x: &Tensor, norm: NormId) -> Result<Tensor>;
    /// The frozen layer, and on top each row's adapter.
    fn linear(&self, x: &Tensor, site: SiteId) -> Result<Tensor>;
    fn attend(&self, attend: &Attend, qkv: [Tensor; 3]) -> Result<Tensor>;
    /// activation(gate) * up.
    fn gated(&self, activation: Activation, gate: Tensor, up: &Tensor) -> Result<Tensor>;
    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor>;
    /// The rows that are wanted, in order.
    fn select(&self, x: &Tensor) -> Result<Tensor>;
}

/// Takes all steps of a model's decoder, and gives the head's input of the wanted rows, `[wanted, hidden_size]`.
pub(super) fn hidden(model: &Model, ops: impl TensorOps) -> Result<Tensor> {
    let mut pass = Interpreter { model, ops, x: None, y: None, projected: Vec::new() };
    pass.run(&model.decoder().steps)?;
    taken(&mut pass.x)
}

/// A pass, and what its steps hand on.
struct Interpreter<'a, O> {
    model: &'a Model,
    ops: O,
    /// The residual stream, `[rows, hidden_size]`; at the end the head's input.
    x: Option<Tensor>,
    /// The input of the next output layer.
    y: Option<Tensor>,
    /// q, k, v or gate, up.
    projected: Vec<Tensor>,
}

fn absent() -> Error {
    Error::internal("a step comes before what it needs")
}

fn taken(value: &mut Option<Tensor>) -> Result<Tensor> {
    value.take().ok_or_else(absent)
}

impl<O: TensorOps> Interpreter<'_, O> {
    fn projected<const N: usize>(&mut self) -> Result<[Tensor; N]> {
        std::mem::take(&mut self.projected).try_into().map_err(|_| absent())
    }

    fn merge(&self, x: Tensor, y: Tensor, merge: Merge) -> Result<Tensor> {
        let y = match merge {
            Merge::Add => y,
            Merge::Scaled(scale) => (y * f64::from(scale))?,
            Merge::Normed(norm) => self.ops.norm(&y, norm)?,
        };
        self.ops.add(x, &y)
    }
}

impl<O: TensorOps> StepExecutor for Interpreter<'_, O> {
    type Error = Error;

    fn take(&mut self, step: &Step, _next: &[Step]) -> Result<()> {
        match step {
            Step::Embed { scale } => self.x = Some(self.ops.embed(*scale)?),
            Step::Project { norm, sites, part } => {
                let input = self.ops.norm(self.x.as_ref().ok_or_else(absent)?, *norm)?;
                let outputs = sites.clone().map(|site| self.ops.linear(&input, site)).collect::<Result<Vec<_>>>()?;
                self.projected = match &outputs[..] {
                    [fused] => split(fused, &self.model.config().widths(*part))?,
                    _ => outputs,
                };
            }
            Step::Attend(attend) => {
                let qkv = self.projected()?;
                self.y = Some(self.ops.attend(attend, qkv)?);
            }
            Step::Gate { activation } => {
                let [gate, up] = self.projected()?;
                self.y = Some(self.ops.gated(*activation, gate, &up)?);
            }
            Step::Output { site, merge } => {
                let y = self.ops.linear(&taken(&mut self.y)?, *site)?;
                let x = taken(&mut self.x)?;
                self.x = Some(self.merge(x, y, *merge)?);
            }
            Step::Select => self.x = Some(self.ops.select(&taken(&mut self.x)?)?),
            Step::Finish { norm } => self.x = Some(self.ops.norm(&taken(&mut self.x)?, *norm)?),
        }
        Ok(())
    }
}

/// Columns that lie side by side, each of these widths as a tensor of its own.
fn split(all: &Tensor, widths: &[usize]) -> Result<Vec<Tensor>> {
    let mut from = 0;
    let part = |width: &usize| {
        let part = all.narrow(1, from, *width)?.contiguous()?;
        from += width;
        Ok(part)
    };
    widths.iter().map(part).collect()
}
