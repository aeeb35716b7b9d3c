//! The llama architecture, written once over [`Ops`].

use crate::adapter::Site;
use crate::error::Result;
use crate::model::Model;
use crate::request::Target;

/// One of the model's norms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    /// The one before a layer's attention.
    Attention(usize),
    /// The one before a layer's feed-forward network.
    Ffn(usize),
    /// The one before the head.
    Final,
}

/// The operations that an executor offers, as coarse as serving fuses them. Which rows there are, their positions, their adapters and
/// their KV are the executor's; the architecture never sees them.
pub trait Ops {
    /// Activations `[rows, width]`, float32.
    type Rows;

    /// The embeddings of the executor's ids.
    fn embed(&mut self) -> Result<Self::Rows>;
    /// Computes the RMS norm of every row, with that norm's weights.
    fn norm(&mut self, x: &Self::Rows, norm: Norm) -> Result<Self::Rows>;
    /// The frozen layers q, k and v of one input, and on top each row's adapter.
    fn qkv(&mut self, x: &Self::Rows, layer: usize) -> Result<[Self::Rows; 3]>;
    /// Turns q and k by the rows' positions; causal attention over what each row's sequence holds up to the row, this batch included.
    fn attention(&mut self, layer: usize, qkv: [Self::Rows; 3]) -> Result<Self::Rows>;
    /// The frozen layers gate and up of one input, and on top each row's adapter.
    fn gate_up(&mut self, x: &Self::Rows, layer: usize) -> Result<[Self::Rows; 2]>;
    /// silu(gate) * up.
    fn swiglu(&mut self, layer: usize, gate_up: [Self::Rows; 2]) -> Result<Self::Rows>;
    /// x + the frozen layer of y, and on top each row's adapter.
    fn residual_linear(&mut self, x: Self::Rows, y: Self::Rows, site: Site) -> Result<Self::Rows>;
    /// The rows that are wanted beyond the last layer.
    fn select(&mut self, x: Self::Rows) -> Result<Self::Rows>;
}

/// The final hidden states of the rows that are wanted, ready for the head.
pub fn hidden<O: Ops>(model: &Model, ops: &mut O) -> Result<O::Rows> {
    let mut x = ops.embed()?;
    for layer in 0..model.config().layers {
        let site = |target| Site { layer: layer as u32, target };
        let n = ops.norm(&x, Norm::Attention(layer))?;
        let qkv = ops.qkv(&n, layer)?;
        let attended = ops.attention(layer, qkv)?;
        x = ops.residual_linear(x, attended, site(Target::OProj))?;
        let n = ops.norm(&x, Norm::Ffn(layer))?;
        let gate_up = ops.gate_up(&n, layer)?;
        let gated = ops.swiglu(layer, gate_up)?;
        x = ops.residual_linear(x, gated, site(Target::DownProj))?;
    }
    let x = ops.select(x)?;
    ops.norm(&x, Norm::Final)
}
