//! Virtual tokens: what prompt tuning and prefix tuning put before a sequence. They take its first positions, and nobody wrote them.

use crate::adapter::BaseShape;
use crate::kernels::gemm::{Mat, Out, mul, mul_nt, mul_tn};
use crate::random::{Purpose, Stream};
use crate::request::{PrefixSpec, TunerSpec};

/// The virtual tokens of an adapter, as they are trained.
#[derive(Debug, Clone, PartialEq)]
pub struct VirtualTokens {
    /// How many.
    pub count: usize,
    /// What they are.
    pub values: VirtualValues,
}

/// What stands for virtual tokens.
#[derive(Debug, Clone, PartialEq)]
pub enum VirtualValues {
    /// Prompt tuning (Lester et al. 2021): embeddings, `[count, hidden_size]`.
    Embeddings(Vec<f32>),
    /// Prefix tuning (Li & Liang 2021): keys as attention reads them, behind norms and rotation, and values, `[count, layers, 2, kv_width]`.
    KeysAndValues(Vec<f32>),
    /// The same, reparametrised.
    Projected(Projection),
}

/// What virtual tokens are to a model, trained or served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VirtualForm {
    /// Embeddings.
    Embeddings,
    /// Keys and values of every layer.
    KeysAndValues,
}

impl VirtualForm {
    /// All forms.
    pub(super) const ALL: [Self; 2] = [Self::Embeddings, Self::KeysAndValues];

    /// Returns the values of one token.
    pub fn width(self, shape: &BaseShape) -> usize {
        match self {
            Self::Embeddings => shape.hidden_size,
            Self::KeysAndValues => shape.layers as usize * 2 * shape.kv_width(),
        }
    }

    /// Returns the form that a tuner's virtual tokens have, and their number; `None` where it has none.
    pub fn of(spec: &TunerSpec) -> Option<(Self, usize)> {
        match spec {
            TunerSpec::Prompt(spec) => Some((Self::Embeddings, spec.virtual_tokens as usize)),
            TunerSpec::Prefix(spec) => Some((Self::KeysAndValues, spec.virtual_tokens as usize)),
            TunerSpec::Lora(_) | TunerSpec::Ia3(_) | TunerSpec::Bottleneck(_) | TunerSpec::Full(_) => None,
        }
    }
}

/// Keys and values as two layers make them of smaller embeddings: up tanh(down e + down_bias) + up_bias. They train better so, and once
/// trained stand by themselves ([`VirtualTokens::folded`]).
#[derive(Debug, Clone, PartialEq)]
pub struct Projection {
    /// `[count, kv_width]`.
    embeddings: Vec<f32>,
    /// `[width, kv_width]`.
    down: Vec<f32>,
    /// `[width]`.
    down_bias: Vec<f32>,
    /// `[layers * 2 * kv_width, width]`.
    up: Vec<f32>,
    /// `[layers * 2 * kv_width]`.
    up_bias: Vec<f32>,
}

impl Projection {
    /// As PEFT starts one: embeddings normal, the layers uniform in +-1/sqrt(in).
    fn fresh(count: usize, width: usize, shape: &BaseShape, seed: u64) -> Self {
        let stream = Stream::new(seed, Purpose::Initialisation);
        let (inputs, outputs) = (shape.kv_width(), VirtualForm::KeysAndValues.width(shape));
        let uniform = |place: u64, len: usize, inputs: usize| -> Vec<f32> {
            let bound = 1.0 / (inputs as f32).sqrt();
            (0..len).map(|i| bound * (2.0 * stream.uniform(place, i as u32) - 1.0)).collect()
        };
        Self {
            embeddings: (0..count * inputs).map(|i| stream.normal(0, i as u32)).collect(),
            down: uniform(1, width * inputs, inputs),
            down_bias: uniform(2, width, inputs),
            up: uniform(3, outputs * width, width),
            up_bias: uniform(4, outputs, width),
        }
    }

    fn count(&self) -> usize {
        self.embeddings.len() / (self.down.len() / self.down_bias.len())
    }

    /// tanh(down e + down_bias), `[count, width]`.
    fn inner(&self) -> Vec<f32> {
        let (width, inputs) = (self.down_bias.len(), self.down.len() / self.down_bias.len());
        let mut inner = self.down_bias.repeat(self.count());
        let out = Out { data: &mut inner, stride: width, accumulate: true };
        mul_nt(out, Mat::dense(&self.embeddings, inputs), Mat::dense(&self.down, inputs), false);
        inner.iter_mut().for_each(|x| *x = x.tanh());
        inner
    }

    /// The keys and values, `[count, layers, 2, kv_width]`.
    fn values(&self) -> Vec<f32> {
        let (width, outputs) = (self.down_bias.len(), self.up_bias.len());
        let inner = self.inner();
        let mut values = self.up_bias.repeat(self.count());
        let out = Out { data: &mut values, stride: outputs, accumulate: true };
        mul_nt(out, Mat::dense(&inner, width), Mat::dense(&self.up, width), true);
        values
    }

    /// Adds to `gradient` that of its tensors, from that of the keys and values.
    fn backward(&self, d: &[f32], gradient: &mut Self) {
        let (width, outputs, inputs) =
            (self.down_bias.len(), self.up_bias.len(), self.down.len() / self.down_bias.len());
        let inner = self.inner();
        let d_mat = Mat::dense(d, outputs);
        let add_rows = |to: &mut [f32], rows: &[f32]| {
            for row in rows.chunks_exact(to.len()) {
                to.iter_mut().zip(row).for_each(|(to, x)| *to += x);
            }
        };
        add_rows(&mut gradient.up_bias, d);
        let up = Out { data: &mut gradient.up, stride: width, accumulate: true };
        mul_tn(up, d_mat, Mat::dense(&inner, width), true);
        let mut d_inner = vec![0.0; inner.len()];
        let out = Out { data: &mut d_inner, stride: width, accumulate: false };
        mul(out, d_mat, Mat::dense(&self.up, width), true);
        d_inner.iter_mut().zip(&inner).for_each(|(d, y)| *d *= 1.0 - y * y);
        add_rows(&mut gradient.down_bias, &d_inner);
        let d_inner = Mat::dense(&d_inner, width);
        let down = Out { data: &mut gradient.down, stride: inputs, accumulate: true };
        mul_tn(down, d_inner, Mat::dense(&self.embeddings, inputs), false);
        let embeddings = Out { data: &mut gradient.embeddings, stride: inputs, accumulate: true };
        mul(embeddings, d_inner, Mat::dense(&self.down, inputs), false);
    }
}

impl VirtualTokens {
    /// A tuner's virtual tokens before they have begun as anything: zeros, or reparametrised random ones. `None` where it has none.
    pub(super) fn fresh(spec: &TunerSpec, shape: &BaseShape, seed: u64) -> Option<Self> {
        let (form, count) = VirtualForm::of(spec)?;
        let zeros = || vec![0.0; count * form.width(shape)];
        let values = match (form, spec) {
            (_, TunerSpec::Prefix(PrefixSpec { projection: Some(width), .. })) => {
                VirtualValues::Projected(Projection::fresh(count, *width as usize, shape, seed))
            }
            (VirtualForm::Embeddings, _) => VirtualValues::Embeddings(zeros()),
            (VirtualForm::KeysAndValues, _) => VirtualValues::KeysAndValues(zeros()),
        };
        Some(Self { count, values })
    }

    /// Of values that stand by themselves.
    pub(super) fn of(form: VirtualForm, count: usize, values: Vec<f32>) -> Self {
        let values = match form {
            VirtualForm::Embeddings => VirtualValues::Embeddings(values),
            VirtualForm::KeysAndValues => VirtualValues::KeysAndValues(values),
        };
        Self { count, values }
    }

    /// Returns what they are to a model.
    pub fn form(&self) -> VirtualForm {
        match self.values {
            VirtualValues::Embeddings(_) => VirtualForm::Embeddings,
            VirtualValues::KeysAndValues(_) | VirtualValues::Projected(_) => VirtualForm::KeysAndValues,
        }
    }

    /// Returns the values themselves, `[count, width]`; computed where they are reparametrised.
    pub fn folded(&self) -> std::borrow::Cow<'_, [f32]> {
        match &self.values {
            VirtualValues::Embeddings(values) | VirtualValues::KeysAndValues(values) => values.into(),
            VirtualValues::Projected(projection) => projection.values().into(),
        }
    }

    /// Returns the values where they are to begin as something.
    pub fn to_begin(&mut self) -> Option<&mut [f32]> {
        match &mut self.values {
            VirtualValues::Embeddings(values) | VirtualValues::KeysAndValues(values) => Some(values),
            VirtualValues::Projected(_) => None,
        }
    }

    /// Adds to `gradient`, of the same shape, that of the trained tensors, from that of the values themselves.
    pub fn backward(&self, d: &[f32], gradient: &mut Self) {
        match (&self.values, &mut gradient.values) {
            (VirtualValues::Projected(projection), VirtualValues::Projected(gradient)) => {
                projection.backward(d, gradient);
            }
            (_, VirtualValues::Embeddings(gradient) | VirtualValues::KeysAndValues(gradient)) => {
                gradient.iter_mut().zip(d).for_each(|(to, d)| *to += d);
            }
            (_, VirtualValues::Projected(_)) => {}
        }
    }

    /// Returns the tensors that are trained, in a fixed order.
    pub(super) fn tensors(&self) -> impl Iterator<Item = &[f32]> {
        let tensors = match &self.values {
            VirtualValues::Embeddings(values) | VirtualValues::KeysAndValues(values) => vec![values],
            VirtualValues::Projected(Projection { embeddings, down, down_bias, up, up_bias }) => {
                vec![embeddings, down, down_bias, up, up_bias]
            }
        };
        tensors.into_iter().map(Vec::as_slice)
    }

    /// As [`VirtualTokens::tensors`], to be changed.
    pub(super) fn tensors_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        let tensors = match &mut self.values {
            VirtualValues::Embeddings(values) | VirtualValues::KeysAndValues(values) => vec![values],
            VirtualValues::Projected(Projection { embeddings, down, down_bias, up, up_bias }) => {
                vec![embeddings, down, down_bias, up, up_bias]
            }
        };
        tensors.into_iter().map(Vec::as_mut_slice)
    }
}
