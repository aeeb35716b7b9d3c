//! The llama architecture, written once over [`Ops`].

use crate::adapter::Site;
use crate::error::Result;
use crate::model::Model;
use crate::request::Target;

/// One of the model's norms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    Attention(usize),
    Ffn(usize),
    Final,
}

/// The dozen operations that an executor offers. Which rows there are, their positions, their adapters and their KV are the
/// executor's; the architecture never sees them.
pub trait Ops {
    /// Activations `[rows, width]`, float32.
    type Rows;

    /// The embeddings of the executor's ids.
    fn embed(&mut self) -> Result<Self::Rows>;
    fn norm(&mut self, x: &Self::Rows, norm: Norm) -> Result<Self::Rows>;
    /// The frozen layer, and on top each row's adapter at this site.
    fn linear(&mut self, x: &Self::Rows, site: Site) -> Result<Self::Rows>;
    /// Rotates by the rows' positions.
    fn rope(&mut self, x: Self::Rows) -> Result<Self::Rows>;
    /// Causal attention over what each row's sequence holds up to the row, this batch included.
    fn attention(&mut self, layer: usize, q: Self::Rows, k: Self::Rows, v: Self::Rows) -> Result<Self::Rows>;
    /// silu(gate) * up.
    fn swiglu(&mut self, gate: Self::Rows, up: Self::Rows) -> Result<Self::Rows>;
    fn add(&mut self, x: Self::Rows, y: Self::Rows) -> Result<Self::Rows>;
    /// The rows that are wanted beyond the last layer.
    fn select(&mut self, x: Self::Rows) -> Result<Self::Rows>;
}

/// The final hidden states of the rows that are wanted, ready for the head.
pub fn hidden<O: Ops>(model: &Model, ops: &mut O) -> Result<O::Rows> {
    let mut x = ops.embed()?;
    for layer in 0..model.config().layers {
        let site = |target| Site { layer: layer as u32, target };
        let n = ops.norm(&x, Norm::Attention(layer))?;
        let q = ops.linear(&n, site(Target::QProj))?;
        let k = ops.linear(&n, site(Target::KProj))?;
        let v = ops.linear(&n, site(Target::VProj))?;
        let (q, k) = (ops.rope(q)?, ops.rope(k)?);
        let attended = ops.attention(layer, q, k, v)?;
        let o = ops.linear(&attended, site(Target::OProj))?;
        x = ops.add(x, o)?;
        let n = ops.norm(&x, Norm::Ffn(layer))?;
        let gate = ops.linear(&n, site(Target::GateProj))?;
        let up = ops.linear(&n, site(Target::UpProj))?;
        let h = ops.swiglu(gate, up)?;
        let down = ops.linear(&h, site(Target::DownProj))?;
        x = ops.add(x, down)?;
    }
    let x = ops.select(x)?;
    ops.norm(&x, Norm::Final)
}
