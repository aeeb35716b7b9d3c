//! Whole passes against a model in double precision, written as the definition says: a value at a time.

use std::ops::Range;

use super::*;
use crate::adapter::peft::{Package, SizeLimits};
use crate::adapter::{LowRank, ScaledSide, Site, SiteDelta, TokenRows, VirtualForm};
use crate::arch::decoder::{SiteId, Slot, Step};
use crate::device::Arbiter;
use crate::kernels::packed::PackedMatrix;
use crate::request::{
    AdapterKind, BottleneckSpec, FullSpec, Ia3Spec, LinearLayers, LoraInit, LoraSpec, Placement, PrefixSpec,
    PromptSpec, Target, TunerSpec, VirtualInit,
};

/// The tiny model's weights in double precision.
struct Exact<'m> {
    model: &'m Model,
    sites: Vec<Vec<f64>>,
    head: Vec<f64>,
    /// By which magnitudes are divided; held while values change, as training holds them.
    norms: RowNorms,
    /// What is taken out of the base.
    without: Option<&'m Adapter>,
}

/// An adapter in double precision: the values of its tensors, in their order.
type Values = Vec<Vec<f64>>;

fn dense(matrix: &PackedMatrix) -> Vec<f64> {
    let mut values = vec![0.0; matrix.rows() * matrix.cols()];
    matrix.dequantize(0, &mut values);
    values.into_iter().map(f64::from).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// w x of each row of w.
fn times(w: &[f64], x: &[f64]) -> Vec<f64> {
    w.chunks_exact(x.len()).map(|w| dot(w, x)).collect()
}

fn exactly(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

impl<'m> Exact<'m> {
    fn new(model: &'m Model, adapter: &Adapter, without: Option<&'m Adapter>) -> Self {
        let sites = (0..model.decoder().sites.len()).map(|site| dense(model.matrix(site))).collect();
        let norms = match without {
            Some(start) => model.row_norms(&adapter.without(start), None),
            None => model.row_norms(adapter, None),
        };
        Self { model, sites, head: dense(model.head()), norms, without }
    }

    fn norm(&self, x: &[f64], norm: usize, adapter: &Adapter, values: &Values) -> Vec<f64> {
        let rms = (dot(x, x) / x.len() as f64 + f64::from(self.model.config().norm_eps)).sqrt();
        let weights =
            copy(adapter, values, Slot::Norm(norm)).map_or_else(|| exactly(self.model.norm(norm)), Vec::clone);
        x.iter().zip(weights).map(|(x, w)| x / rms * w).collect()
    }

    fn linear(&self, site: SiteId, x: &[f64], adapter: &Adapter, values: &Values) -> Vec<f64> {
        let name = self.model.site(site);
        let first: usize = adapter.sites.range(..name).map(|(_, delta)| tensors(delta)).sum();
        match adapter.sites.get(&name) {
            None => times(copy(adapter, values, Slot::Matrix(site)).unwrap_or(&self.sites[site]), x),
            Some(SiteDelta::LowRank(LowRank { scale, magnitude, bias, .. })) => {
                let h = times(&values[first], x);
                let mut pair = times(&values[first + 1], &h);
                if bias.is_some() {
                    pair.iter_mut().zip(&values[first + 2]).for_each(|(y, bias)| *y += bias);
                }
                if let Some(start) = self.without.and_then(|start| start.pair(name)) {
                    let h = times(&exactly(&start.a), x);
                    pair.iter_mut().zip(times(&exactly(&start.b), &h)).for_each(|(y, start)| *y -= start);
                }
                let sum =
                    times(&self.sites[site], x).into_iter().zip(pair).map(|(y, pair)| y + f64::from(*scale) * pair);
                match magnitude {
                    None => sum.collect(),
                    Some(_) => {
                        let scales = values[first + 2].iter().zip(&self.norms[&name]).map(|(m, n)| m / f64::from(*n));
                        sum.zip(scales).map(|(y, scale)| y * scale).collect()
                    }
                }
            }
            Some(SiteDelta::Bottleneck(_)) => {
                let [down, down_bias, up, up_bias] = &values[first..first + 4] else { panic!() };
                let u = times(&self.sites[site], x);
                let inner = times(down, &u).into_iter().zip(down_bias).map(|(x, bias)| x + bias);
                let inner: Vec<f64> = inner.map(|x| x / (1.0 + (-x).exp())).collect();
                let added = times(up, &inner).into_iter().zip(up_bias).map(|(y, bias)| y + bias);
                u.iter().zip(added).map(|(u, y)| u + y).collect()
            }
            Some(SiteDelta::Scaled { side: ScaledSide::Input, .. }) => {
                let x: Vec<f64> = x.iter().zip(&values[first]).map(|(x, scale)| x * scale).collect();
                times(&self.sites[site], &x)
            }
            Some(SiteDelta::Scaled { side: ScaledSide::Output, .. }) => {
                times(&self.sites[site], x).into_iter().zip(&values[first]).map(|(y, scale)| y * scale).collect()
            }
        }
    }

    /// The adapter's virtual tokens, `[count][width]`, and whether they are embeddings.
    fn virtual_tokens(&self, adapter: &Adapter, values: &Values) -> Option<(bool, Vec<Vec<f64>>)> {
        let tokens = adapter.virtual_tokens.as_ref()?;
        let first: usize = adapter.sites.values().map(tensors).sum();
        let folded = match &values[first..] {
            [values] => values.clone(),
            [embeddings, down, down_bias, up, up_bias] => {
                let layer = |w: &[f64], bias: &[f64], x: &[f64]| -> Vec<f64> {
                    times(w, x).iter().zip(bias).map(|(y, bias)| y + bias).collect()
                };
                let token = |e: &[f64]| {
                    let inner: Vec<f64> = layer(down, down_bias, e).iter().map(|x| x.tanh()).collect();
                    layer(up, up_bias, &inner)
                };
                embeddings.chunks_exact(embeddings.len() / tokens.count).flat_map(token).collect()
            }
            _ => panic!(),
        };
        let width = folded.len() / tokens.count;
        Some((tokens.form() == VirtualForm::Embeddings, folded.chunks_exact(width).map(<[f64]>::to_vec).collect()))
    }

    /// The sum of the log-probabilities of a sequence's tokens but the first, each with its weight.
    fn weighted_logprobs(&self, ids: &[u32], weights: &[f64], adapter: &Adapter, values: &Values) -> f64 {
        let config = self.model.config();
        let before = self.virtual_tokens(adapter, values);
        let (prompt, prefix) = match before {
            Some((true, prompt)) => (prompt, Vec::new()),
            Some((false, prefix)) => (Vec::new(), prefix),
            None => (Vec::new(), Vec::new()),
        };
        let mut x: Vec<Vec<f64>> = Vec::new();
        let (mut projected, mut y) = (Vec::new(), Vec::new());
        for step in &self.model.decoder().steps {
            match step {
                Step::Embed { scale } => {
                    let embed = |id: &u32| {
                        let copy = copy(adapter, values, Slot::Embedding);
                        let row = copy.map(|copy| &copy[*id as usize * config.hidden_size..][..config.hidden_size]);
                        if let Some(row) = own_row(adapter, values, Slot::Embedding, *id).or(row) {
                            return row.iter().map(|x| x * f64::from(*scale)).collect();
                        }
                        let mut row = vec![0.0; config.hidden_size];
                        self.model.embed(*id, *scale, &mut row);
                        exactly(&row)
                    };
                    x = prompt.iter().cloned().chain(ids.iter().map(embed)).collect();
                }
                Step::Project { norm, sites, .. } => {
                    let of_row = |x: &Vec<f64>| {
                        let normed = self.norm(x, *norm, adapter, values);
                        sites.clone().map(|site| self.linear(site, &normed, adapter, values)).collect::<Vec<_>>()
                    };
                    projected = x.iter().map(of_row).collect();
                }
                Step::Attend(attend) => y = self.attend(&projected, &prefix, attend.layer),
                Step::Gate { .. } => {
                    let gated = |row: &Vec<Vec<f64>>| {
                        row[0].iter().zip(&row[1]).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
                    };
                    y = projected.iter().map(gated).collect();
                }
                Step::Output { site, .. } => {
                    for (x, y) in x.iter_mut().zip(&y) {
                        let branch = self.linear(*site, y, adapter, values);
                        x.iter_mut().zip(branch).for_each(|(x, y)| *x += y);
                    }
                }
                Step::Select => {}
                Step::Finish { norm } => x = x.iter().map(|x| self.norm(x, *norm, adapter, values)).collect(),
            }
        }
        let head = copy(adapter, values, self.model.head_slot()).unwrap_or(&self.head);
        let of_token = |i: usize| {
            let mut logits = times(head, &x[prompt.len() + i]);
            for (id, logit) in (0..).zip(&mut logits) {
                if let Some(row) = own_row(adapter, values, self.model.head_slot(), id) {
                    *logit = dot(row, &x[prompt.len() + i]);
                }
            }
            let sum = logits.iter().map(|logit| logit.exp()).sum::<f64>();
            weights[i] * (logits[ids[i + 1] as usize] - sum.ln())
        };
        (0..ids.len() - 1).map(of_token).sum()
    }

    /// Attention's answers, of queries behind a prefix.
    fn attend(&self, qkv: &[Vec<Vec<f64>>], prefix: &[Vec<f64>], layer: usize) -> Vec<Vec<f64>> {
        let attention = self.model.config().attention;
        let dim = attention.head_dim;
        let turned = |position: usize, values: &[f64]| {
            let (cos, sin) = self.model.ropes[0].at(position);
            let head = |head: &[f64]| {
                let half = cos.len();
                let at = |i: usize| match i < half {
                    true => head[i] * f64::from(cos[i]) - head[i + half] * f64::from(sin[i]),
                    false => head[i] * f64::from(cos[i - half]) + head[i - half] * f64::from(sin[i - half]),
                };
                (0..dim).map(at).collect::<Vec<_>>()
            };
            values.chunks_exact(dim).map(head).collect::<Vec<_>>()
        };
        let (n, width) = (prefix.len(), attention.kv_heads * dim);
        let heads = |values: &[f64]| values.chunks_exact(dim).map(<[f64]>::to_vec).collect::<Vec<_>>();
        let of_prefix =
            |part: usize| prefix.iter().map(move |token| heads(&token[(2 * layer + part) * width..][..width]));
        let q: Vec<_> = qkv.iter().enumerate().map(|(i, row)| turned(n + i, &row[0])).collect();
        let own_k = qkv.iter().enumerate().map(|(i, row)| turned(n + i, &row[1]));
        let k: Vec<_> = of_prefix(0).chain(own_k).collect();
        let v: Vec<_> = of_prefix(1).chain(qkv.iter().map(|row| heads(&row[2]))).collect();
        let group = attention.heads / attention.kv_heads;
        let of_head = |row: usize, head: usize| {
            let weight = |j: usize| (dot(&q[row][head], &k[j][head / group]) * f64::from(attention.scale)).exp();
            let weights: Vec<f64> = (0..=n + row).map(weight).collect();
            let sum: f64 = weights.iter().sum();
            let value = |d: usize| (0..=n + row).map(|j| weights[j] / sum * v[j][head / group][d]).sum::<f64>();
            (0..dim).map(value).collect::<Vec<f64>>()
        };
        (0..qkv.len()).map(|row| (0..attention.heads).flat_map(|head| of_head(row, head)).collect()).collect()
    }
}

/// The values of a copy of the base's tensor.
fn copy<'v>(adapter: &Adapter, values: &'v Values, slot: Slot) -> Option<&'v Vec<f64>> {
    let first: usize = adapter.sites.values().map(tensors).sum();
    Some(&values[first + adapter.copies.keys().position(|key| *key == slot)?])
}

/// The row that a token has in the place of the base's.
fn own_row<'v>(adapter: &Adapter, values: &'v Values, slot: Slot, id: u32) -> Option<&'v [f64]> {
    let first = values.len() - adapter.tokens.len();
    let rows = &values[first + adapter.tokens.keys().position(|key| *key == slot)?];
    let at = adapter.tokens[&slot].ids.iter().position(|own| *own == id)?;
    rows.chunks_exact(rows.len() / adapter.tokens[&slot].ids.len()).nth(at)
}

fn tensors(delta: &SiteDelta) -> usize {
    match delta {
        SiteDelta::LowRank(pair) => 2 + usize::from(pair.magnitude.is_some()) + usize::from(pair.bias.is_some()),
        SiteDelta::Scaled { .. } => 1,
        SiteDelta::Bottleneck(_) => 4,
    }
}

/// Tuners of every kind, of some sites each.
fn tuners() -> Vec<TunerSpec> {
    let lora = LoraSpec { rank: 3, alpha: 4.0, ..LoraSpec::default() };
    let prefix = PrefixSpec { virtual_tokens: 3, ..PrefixSpec::default() };
    vec![
        lora.clone().into(),
        LoraSpec {
            use_rslora: true,
            layers: Some(vec![1]),
            targets: vec![Target::KProj, Target::OProj],
            ..lora.clone()
        }
        .into(),
        LoraSpec { use_dora: true, ..lora.clone() }.into(),
        LoraSpec { lora_bias: true, ..lora.clone() }.into(),
        LoraSpec { trainable_token_indices: vec![77, 1, 40], ..lora.clone() }.into(),
        LoraSpec { init: LoraInit::Pissa, ..lora.clone() }.into(),
        LoraSpec { init: LoraInit::Olora, use_dora: true, ..lora }.into(),
        Ia3Spec::default().into(),
        Ia3Spec { targets: vec![Target::QProj, Target::OProj, Target::UpProj], feedforward: vec![Target::OProj] }
            .into(),
        PromptSpec { virtual_tokens: 3, init: VirtualInit::Random }.into(),
        prefix.clone().into(),
        PrefixSpec { projection: Some(5), ..prefix }.into(),
        BottleneckSpec { size: 3, placement: Placement::Both, ..BottleneckSpec::default() }.into(),
        FullSpec::default().into(),
        FullSpec {
            linear: Some(LinearLayers { targets: vec![Target::VProj, Target::DownProj], layers: Some(vec![1]) }),
            extract_rank: None,
        }
        .into(),
    ]
}

/// An adapter before its first step.
fn fresh(model: &Model, tuner: &TunerSpec) -> Adapter {
    let mut adapter = match tuner {
        TunerSpec::Full(spec) => model.copies(spec, &Arbiter::new(0.5).train()).unwrap(),
        _ => Adapter::fresh(tuner, model.shape(), 3).unwrap(),
    };
    model.begin(&mut adapter, &[7, 30, 211], None).unwrap();
    if adapter.is_of_base() {
        model.start_as_part(&mut adapter, &Arbiter::new(0.5).train(), || Ok(())).unwrap();
    }
    adapter
}

/// What is taken out of the base for an adapter that began so.
fn taken_out(start: &Adapter) -> Option<&Adapter> {
    Some(start).filter(|start| start.is_of_base())
}

/// An adapter of which no tensor is at its start.
fn moved(model: &Model, start: &Adapter) -> Adapter {
    let mut adapter = start.clone();
    // Shares of their norms, below.
    adapter.pairs_mut().for_each(|(_, pair)| pair.magnitude.iter_mut().for_each(|magnitude| magnitude.fill(0.0)));
    // Copies have values already, of which the embedding's are small.
    let by = if adapter.copies.is_empty() { 0.1 } else { 0.01 };
    for (t, tensor) in adapter.tensors_mut().enumerate() {
        tensor.iter_mut().enumerate().for_each(|(i, x)| *x += by * ((t * 31 + i) as f32 * 0.7).sin());
    }
    let norms = Exact::new(model, &adapter, taken_out(start)).norms;
    for (site, pair) in adapter.pairs_mut() {
        for (magnitude, norm) in pair.magnitude.iter_mut().flatten().zip(norms.get(&site).into_iter().flatten()) {
            *magnitude = norm * (1.0 + *magnitude);
        }
    }
    adapter
}

const SEQUENCES: [&[u32]; 2] = [&[3, 77, 12, 200, 5, 9, 41], &[250, 1, 1, 90]];

fn all_wanted() -> Vec<(usize, usize)> {
    let of_one = |(sequence, ids): (usize, &&[u32])| (0..ids.len() - 1).map(|i| (sequence, i)).collect::<Vec<_>>();
    SEQUENCES.iter().enumerate().flat_map(of_one).collect()
}

/// What each log-probability counts in the loss.
fn weight(i: usize) -> f64 {
    0.3 + (i as f64 * 0.9).sin()
}

fn gradients(
    model: &Model,
    adapter: &Adapter,
    without: Option<&Adapter>,
    recompute_layers: Option<usize>,
) -> (TokenScores, Adapter) {
    let workspace = Workspace::default();
    let options = ForwardOptions {
        adapter: Some(adapter),
        without,
        products: Products::Exact,
        recompute_layers,
        ..ForwardOptions::default()
    };
    let wanted = all_wanted();
    let trace = model.trace(&SEQUENCES, &wanted, options, &workspace).unwrap();
    let (scores, mut gradients) = (trace.scores().clone(), adapter.zeros_like());
    let derivatives: Vec<f32> = (0..wanted.len()).map(|i| weight(i) as f32).collect();
    trace.backward(&derivatives, &mut gradients).unwrap();
    (scores, gradients)
}

/// The rows of the scores that belong to each sequence.
fn rows() -> [Range<usize>; 2] {
    let first = SEQUENCES[0].len() - 1;
    [0..first, first..first + SEQUENCES[1].len() - 1]
}

/// Of each kind: gradients against central differences, in the norm over the values that are looked at.
#[test]
fn gradients_of_every_kind_are_those_of_central_differences() {
    let (model, _) = Model::tiny(1);
    for tuner in tuners() {
        let start = fresh(&model, &tuner);
        let adapter = moved(&model, &start);
        let exact = Exact::new(&model, &adapter, taken_out(&start));
        let values: Values = adapter.tensors().map(exactly).collect();
        let loss = |values: &Values| -> f64 {
            let of_one = |(ids, rows): (&&[u32], Range<usize>)| {
                let weights: Vec<f64> = rows.map(weight).collect();
                exact.weighted_logprobs(ids, &weights, &adapter, values)
            };
            SEQUENCES.iter().zip(rows()).map(of_one).sum()
        };
        let (scores, gradients) = gradients(&model, &adapter, taken_out(&start), None);
        let forward: f64 = scores.logprobs.iter().enumerate().map(|(i, x)| weight(i) * f64::from(*x)).sum();
        assert!((forward - loss(&values)).abs() < 1e-5 * forward.abs(), "{tuner:?}: {forward} {}", loss(&values));
        let (mut apart, mut size) = (0.0, 0.0);
        for (t, gradient) in gradients.tensors().enumerate() {
            // Some values of each tensor, at other places in each; of the embedding also rows of ids that the sequences have.
            let rows =
                [1, 77].map(|id| id * model.config().hidden_size + 9).into_iter().filter(|i| *i < gradient.len());
            for i in (t % 7..gradient.len()).step_by(gradient.len() / 3 + 1).chain(rows) {
                let at = |by: f64| {
                    let mut values = values.clone();
                    values[t][i] += by;
                    loss(&values)
                };
                let difference = (at(1e-4) - at(-1e-4)) / 2e-4;
                apart += (f64::from(gradient[i]) - difference).powi(2);
                size += difference.powi(2);
            }
        }
        let error = (apart / size).sqrt();
        println!("{:5} relative error {error:.1e}", adapter.kind().name());
        assert!(error <= 1e-5, "{tuner:?}: {error}");
    }
}

/// An adapter of a few pairs that trains beside them the base's biases, and the rows of some tokens.
fn beside_pairs(model: &Model) -> Adapter {
    let spec = LoraSpec {
        targets: vec![model.shape().linears[0].target],
        layers: Some(vec![1]),
        use_dora: true,
        trainable_token_indices: vec![77, 1, 40],
        ..LoraSpec::default()
    };
    let mut adapter = Adapter::fresh(&spec, model.shape(), 3).unwrap();
    if model.shape().own_head {
        let rows = vec![0.0; 2 * model.config().hidden_size];
        adapter.tokens.insert(Slot::Head, TokenRows { ids: vec![90, 12], rows });
    }
    model.begin(&mut adapter, &[], None).unwrap();
    assert!(apart(model, with(&adapter, None), ForwardOptions::default()) < 1e-4, "a fresh one changes nothing");
    let biases = model.shape().biased.iter().filter_map(|site| model.shape().index(*site));
    adapter.copies = biases.filter_map(|id| Some((Slot::Bias(id), model.bias(id)?.to_vec()))).collect();
    adapter
}

/// What the tiny model does not have, on small bases: biases, norms of heads and of branches, a head of its own, caps. The loss changes along each
/// tensor's gradient as that says. So it does where biases and rows of tokens are trained beside a LoRA.
#[test]
fn every_tensor_of_a_base_moves_the_loss_along_its_gradient() {
    let mut kinds = std::collections::BTreeSet::new();
    for name in ["qwen2-q4_k_m", "qwen3-q4_k_m", "gemma2-q4_k_m", "llama-bias-q4_0", "granite-q4_k_m"] {
        let path = std::path::Path::new("tests/golden/bases").join(name).join("base.gguf");
        let (model, _) = Model::load(&path, &candle_core::Device::Cpu, None).unwrap();
        let full = moved(&model, &fresh(&model, &FullSpec::default().into()));
        for adapter in [full, moved(&model, &beside_pairs(&model))] {
            let (_, gradients) = gradients(&model, &adapter, None, None);
            let loss = |adapter: &Adapter| -> f64 {
                let options =
                    ForwardOptions { adapter: Some(adapter), products: Products::Exact, ..ForwardOptions::default() };
                let logprobs = model.token_logprobs(&SEQUENCES, &all_wanted(), options).unwrap();
                logprobs.iter().enumerate().map(|(i, x)| weight(i) * f64::from(*x)).sum()
            };
            let copies = gradients.copies.iter().map(|(slot, gradient)| (slot, gradient, false));
            let tokens = gradients.tokens.iter().map(|(slot, tokens)| (slot, &tokens.rows, true));
            for (slot, gradient, of_tokens) in copies.chain(tokens) {
                fn tensor(adapter: &mut Adapter, slot: Slot, of_tokens: bool) -> &mut Vec<f32> {
                    match of_tokens {
                        true => &mut adapter.tokens.get_mut(&slot).unwrap().rows,
                        false => adapter.copies.get_mut(&slot).unwrap(),
                    }
                }
                let size = dot(&exactly(gradient), &exactly(gradient)).sqrt();
                // Far enough to be seen in 24 bits, where that is not far for the tensor.
                let by = 0.02 / size;
                let values = exactly(tensor(&mut adapter.clone(), *slot, of_tokens));
                if by > 0.1 * dot(&values, &values).sqrt() {
                    continue;
                }
                let at = |by: f64| {
                    let mut moved = adapter.clone();
                    let values = tensor(&mut moved, *slot, of_tokens).iter_mut().zip(gradient);
                    values.for_each(|(x, d)| *x += (by / size * f64::from(*d)) as f32);
                    loss(&moved)
                };
                let slope = (at(by) - at(-by)) / (2.0 * by);
                assert!((slope - size).abs() < 0.03 * size, "{name} {slot:?}: {slope} {size}");
                kinds.insert(match slot {
                    slot if of_tokens => format!("Tokens{slot:?}"),
                    Slot::Norm(norm) => format!("{:?}", model.decoder().norms[*norm].kind),
                    slot => format!("{slot:?}").split('(').next().unwrap_or_default().to_owned(),
                });
            }
        }
    }
    let all = [
        "Attention",
        "Bias",
        "Embedding",
        "FeedForward",
        "Final",
        "Head",
        "Key",
        "Matrix",
        "PostAttention",
        "PostFeedForward",
        "Query",
        "TokensEmbedding",
        "TokensHead",
    ];
    assert!(kinds.iter().eq(all), "{kinds:?}");
}

/// Layers that are computed again give the same bits as those that are kept.
#[test]
fn recomputed_layers_change_no_bit() {
    let (model, _) = Model::tiny_windowed(1);
    for tuner in tuners() {
        let start = fresh(&model, &tuner);
        let adapter = moved(&model, &start);
        let kept = gradients(&model, &adapter, taken_out(&start), None);
        for layers in [1, 2, 3, 100] {
            assert!(gradients(&model, &adapter, taken_out(&start), Some(layers)) == kept, "{tuner:?} {layers}");
        }
    }
}

/// Virtual tokens that have not been trained say what the tokens say that they began as.
#[test]
fn fresh_virtual_tokens_are_the_tokens_that_they_began_as() {
    let (model, _) = Model::tiny(1);
    let (before, ids) = ([7, 30, 211], [3, 77, 12, 200]);
    fn exact(adapter: Option<&Adapter>) -> ForwardOptions<'_> {
        ForwardOptions { adapter, products: Products::Exact, ..ForwardOptions::default() }
    }
    let wanted = |from: usize, len: usize| (from..len - 1).map(|i| (0, i)).collect::<Vec<_>>();
    let whole = [&before[..], &ids].concat();
    let want = model.token_logprobs(&[&whole], &wanted(3, whole.len()), exact(None)).unwrap();
    let specs: [TunerSpec; 2] = [
        PromptSpec { virtual_tokens: 3, init: VirtualInit::Random }.into(),
        PrefixSpec { virtual_tokens: 3, ..PrefixSpec::default() }.into(),
    ];
    for spec in specs {
        let mut adapter = Adapter::fresh(&spec, model.shape(), 1).unwrap();
        model.begin(&mut adapter, &before, None).unwrap();
        let got = model.token_logprobs(&[&ids], &wanted(0, ids.len()), exact(Some(&adapter))).unwrap();
        // A prefix is computed by the kernels that serve, whose inputs are rounded.
        assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-3), "{spec:?} {got:?} {want:?}");
    }
}

fn with<'a>(adapter: &'a Adapter, without: Option<&'a Adapter>) -> ForwardOptions<'a> {
    ForwardOptions { adapter: Some(adapter), without, ..ForwardOptions::default() }
}

/// The largest difference of two adapters' logits.
fn apart(model: &Model, one: ForwardOptions<'_>, other: ForwardOptions<'_>) -> f32 {
    let logits = |options: ForwardOptions<'_>| {
        let options = ForwardOptions { products: Products::Exact, ..options };
        model.logits(&SEQUENCES, &all_wanted(), options).unwrap()
    };
    logits(one).iter().zip(logits(other)).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

/// A fresh one changes nothing; and what a moved one does while what it began as is out of the base, it does as a
/// plain adapter on the base as it is.
#[test]
fn an_adapter_that_began_as_a_part_of_the_base_is_a_plain_one_on_the_base_as_it_is() {
    let (model, _) = Model::tiny(1);
    for tuner in tuners() {
        let start = fresh(&model, &tuner);
        let without = taken_out(&start);
        if without.is_none() {
            continue;
        }
        let changed = apart(&model, with(&start, without), ForwardOptions::default());
        assert!(changed < 1e-4, "{tuner:?}: {changed}");
        assert!(
            apart(&model, with(&start, None), ForwardOptions::default()) > 0.1,
            "{tuner:?}: the part is one that counts"
        );
        let adapter = moved(&model, &start);
        let published = adapter.without(&start);
        assert!(apart(&model, with(&adapter, without), with(&published, None)) < 1e-4, "{tuner:?}");
        assert!(
            apart(&model, with(&adapter, without), ForwardOptions::default()) > 0.1,
            "{tuner:?}: it does something"
        );
        // Nothing of the part is dropped: of an adapter that is the part no more, nothing is left to drop.
        let mut gone = start.clone();
        gone.pairs_mut().for_each(|(_, pair)| pair.b.fill(0.0));
        let dropout = Some(Dropout { rate: 0.5, seed: 1, step: 1 });
        let dropped = ForwardOptions { dropout, ..with(&gone, without) };
        assert_eq!(apart(&model, dropped, with(&gone, without)), 0.0, "{tuner:?}");
        // What is exported says so in PEFT's words, and comes back as it is.
        let limits = SizeLimits { rank: 6, ..SizeLimits::NONE };
        let package = Package::from_adapter(&published, model.shape()).unwrap();
        let read = package.read(model.shape(), limits).unwrap();
        assert!(read.sites == published.sites, "{tuner:?}");
        let checked = package.check(model.shape(), limits).unwrap();
        let again = Package::from_adapter(&read, model.shape()).unwrap();
        assert_eq!((checked.rank, checked.initialisation, checked.digest), (6, None, again.digest().unwrap()));
        assert_eq!(checked.memory_bytes, tuner.memory_bytes(model.shape()).unwrap(), "{tuner:?}");
    }
}

/// A sequence of a site's names, in the order of an adapter's sites.
#[test]
fn sites_are_numbered_in_the_order_of_their_names() {
    let (model, _) = Model::tiny(1);
    let sites: Vec<Site> = (0..model.decoder().sites.len()).map(|site| model.site(site)).collect();
    assert!(sites.is_sorted());
}

/// What a pass is found to take beforehand is what its workspace holds in the end.
#[test]
fn a_pass_takes_what_was_found_beforehand() {
    let (model, _) = Model::tiny_windowed(1);
    let batches: [&[usize]; 3] = [&[64], &[100; 4], &[40, 7, 60, 9]];
    let ways = [(None, None), (Some(1), Some(0.1)), (Some(2), None)];
    for (tuner, lengths) in tuners().iter().flat_map(|tuner| batches.map(|lengths| (tuner, lengths))) {
        let start = fresh(&model, tuner);
        let adapter = moved(&model, &start);
        // How many values the base has, its shape does not say.
        if adapter.kind() != AdapterKind::Full {
            assert_eq!(adapter.parameters(), tuner.parameters(model.shape()).unwrap());
        }
        let sequences: Vec<Vec<u32>> = lengths.iter().map(|len| (0..*len as u32).collect()).collect();
        let ids: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
        // Every token in the loss, or a few.
        for every in [1, 9] {
            let of_one = |(sequence, len): (usize, &usize)| {
                (0..len - 1).step_by(every).map(move |i| (sequence, i)).collect::<Vec<_>>()
            };
            let wanted: Vec<(usize, usize)> = lengths.iter().enumerate().flat_map(of_one).collect();
            let longest = lengths.iter().copied().max().unwrap();
            let before = adapter.virtual_count();
            let size = PassSize {
                tokens: lengths.iter().map(|len| before + len).sum(),
                longest: before + longest,
                selected: wanted.len(),
            };
            for (recompute_layers, rate) in ways {
                let dropout = rate.map(|rate| Dropout { rate, seed: 1, step: 1 });
                let (adapter, without) = (Some(&adapter), taken_out(&start));
                let options =
                    ForwardOptions { adapter, without, recompute_layers, dropout, ..ForwardOptions::default() };
                let found = model.trace_bytes(size, options);
                let workspace = Workspace::with_room(found);
                for _ in 0..2 {
                    let trace = model.trace(&ids, &wanted, options, &workspace).unwrap();
                    trace.backward(&vec![1.0; wanted.len()], &mut start.zeros_like()).unwrap();
                }
                let scored = model.score_bytes(size, options);
                let scoring = Workspace::with_room(scored);
                model.score_tokens(&ids, &wanted, options, &scoring).unwrap();
                for (found, workspace) in [(found, workspace), (scored, scoring)] {
                    let part = workspace.peak_bytes() as f64 / found as f64;
                    assert!((part - 1.0).abs() <= 0.15, "{tuner:?} {size:?} {options:?}: {part} of {found}");
                }
            }
        }
    }
}
