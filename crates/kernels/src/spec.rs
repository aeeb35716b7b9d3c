//! What a layer's attention and gate compute, said once for every device and for training.

/// How one layer attends. The scores of a query at position p are `scale * q . k`, capped where there is a cap, over the
/// positions up to p that its window shows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec {
    /// Heads of queries, a multiple of the heads of keys and values.
    pub heads: usize,
    /// What the products of queries and keys are multiplied with; 1 / sqrt(head_dim) in most models.
    pub scale: f32,
    /// A scaled score s becomes `cap * tanh(s / cap)`, before what is not seen is left out. Positive.
    pub softcap: Option<f32>,
    /// How many positions a query sees, its own included; all before it where there is none. At least 1.
    pub window: Option<usize>,
}

impl AttentionSpec {
    /// Full causal attention with the scale 1 / sqrt(head_dim).
    pub fn causal(heads: usize, head_dim: usize) -> Self {
        Self { heads, scale: 1.0 / (head_dim as f32).sqrt(), softcap: None, window: None }
    }

    /// Returns the first position that a query at `position` sees.
    #[inline(always)]
    pub fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// What a gate goes through before it multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// x * sigmoid(x) (SwiGLU; Shazeer 2020).
    Silu,
    /// x * Phi(x) by its approximation with tanh (GeGLU; Hendrycks & Gimpel 2016), `gelu_pytorch_tanh`.
    GeluTanh,
}
