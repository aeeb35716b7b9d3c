//! The parity gate's measurement: does serving apply an adapter as training does?
//!
//! With D = logp(adapter) - logp(base), both on the same path, an adapter passes where mean |D_serve - D_train| is at most
//! max(0.02, 0.1 * mean |D_train|) nats over at least 256 scored tokens. An adapter whose delta is not zero must also change the
//! serving path's logits; one that changes nothing on either path is reported as `no_effect`.

use std::sync::{Arc, OnceLock};

use crate::adapter::{Adapter, Initialisation, PackedAdapter, RowNorms};
use crate::device::Compute;
use crate::error::{Error, Result};
use crate::kernels::log_sum_exp;
use crate::model::batch::{KvDtype, KvLayout, Readout, SequenceChunk, VIRTUAL_TOKEN};
use crate::model::traced::{ForwardOptions, Products};
use crate::model::{Model, initial};
use crate::request::ParityReport;
use crate::text::Text;

/// Fewest tokens a judgement rests on.
pub const MIN_TOKENS: usize = 256;

/// Most tokens of a job's own rows that are scored, about: more would only cost time. Of the built-in sequences [`MIN_TOKENS`] suffice: an
/// import takes as long as its gate.
const MAX_TOKENS: usize = 512;

/// The least threshold, nats.
const FLOOR: f32 = 0.02;

/// The threshold's share of the adapter's mean effect.
const SHARE: f32 = 0.1;

/// Longest built-in probe sequence, and rows between two offers to give way to serving. Tokens.
const CHUNK: usize = 64;

/// What the built-in probe sequences say.
const PROBE: &str = include_str!("probe.txt");

/// The scores of some sequences on one path: ln p of every token but the first of each.
type Logprobs = Vec<f32>;

/// Scores of the base, and a fingerprint of its logits on the serving path.
#[derive(Debug)]
struct BaseScores {
    serve: (Logprobs, Fingerprint),
    train: Logprobs,
}

/// The sum of all logits' bits: equal for equal logits.
type Fingerprint = u64;

/// Measures adapters against one base.
#[derive(Debug)]
pub struct Parity {
    model: Arc<Model>,
    compute: Compute,
    probes: Vec<Vec<u32>>,
    /// Of the built-in probes; the same for every adapter.
    base: OnceLock<BaseScores>,
}

impl Parity {
    /// Returns the gate for a base, with the text that it compares on encoded once.
    pub fn new(model: Arc<Model>, text: &Text, compute: Compute) -> Result<Self> {
        let ids = text.encode_plain(PROBE)?;
        let probes: Vec<Vec<u32>> = ids.chunks(CHUNK.min(model.context_length())).map(<[u32]>::to_vec).collect();
        Ok(Self { model, compute, probes: limited(&probes, MIN_TOKENS), base: OnceLock::new() })
    }

    /// Scores `probes` (where they hold fewer than 256 tokens to score: the built-in ones) with and without the adapter: serving `served`,
    /// and training with `trained`, of which it was made. Takes seconds of compute, and gives way to serving.
    pub fn measure(&self, served: &Arc<PackedAdapter>, trained: &Adapter, probes: &[Vec<u32>]) -> Result<ParityReport> {
        let own;
        // Behind virtual tokens there is less room.
        let room = self.model.context_length().saturating_sub(trained.virtual_count());
        if room < 2 {
            let message = format!("leaves no room in the base's context of {} tokens", self.model.context_length());
            return Err(Error::invalid_because("TOO_MANY_VIRTUAL_TOKENS", "num_virtual_tokens", message));
        }
        let with_own = scored(probes) >= MIN_TOKENS;
        let (probes, base) = if with_own || room < CHUNK || !trained.tokens.is_empty() {
            let mut probes = if with_own { limited(probes, MAX_TOKENS) } else { self.probes.clone() };
            probes.iter_mut().for_each(|ids| ids.truncate(room));
            strew(&mut probes, trained);
            own = (self.base_scores(&probes)?, probes);
            (&own.1, &own.0)
        } else {
            let base = match self.base.get() {
                Some(base) => base,
                None => {
                    let scores = self.base_scores(&self.probes)?;
                    self.base.get_or_init(|| scores)
                }
            };
            (&self.probes, base)
        };
        let (serve, fingerprint) = self.serve(probes, Some(served))?;
        let train = self.train(probes, Some(trained))?;
        report(base, &serve, &train, fingerprint == base.serve.1)
    }

    /// Gives the adapter for the base as it is, of one that began as a part of the base; `None` where it is that already. Yields to serving
    /// after every layer.
    ///
    /// # Errors
    /// UNSUPPORTED_SETTING where that part cannot be found again.
    pub fn plain_form(&self, adapter: &Adapter, initialisation: Initialisation) -> Result<Option<Adapter>> {
        let permit = self.compute.training.train();
        initial::plain_form(&self.model, adapter, initialisation, &|| permit.yield_to_serving())
    }

    /// Gives the norms that a DoRA's magnitudes are divided by; see [`Model::row_norms`].
    pub fn row_norms(&self, adapter: &Adapter) -> RowNorms {
        let permit = self.compute.training.train();
        self.model.row_norms(adapter, Some(&permit))
    }

    fn base_scores(&self, probes: &[Vec<u32>]) -> Result<BaseScores> {
        Ok(BaseScores { serve: self.serve(probes, None)?, train: self.train(probes, None)? })
    }

    fn serve(&self, probes: &[Vec<u32>], adapter: Option<&Arc<PackedAdapter>>) -> Result<(Logprobs, Fingerprint)> {
        let permit = self.compute.serving.train();
        let before = adapter.map_or(0, |adapter| adapter.virtual_count());
        let longest = before + probes.iter().map(Vec::len).max().unwrap_or(0);
        let layout = KvLayout { block_tokens: CHUNK, blocks: longest.div_ceil(CHUNK), dtype: KvDtype::F16 };
        let blocks: Vec<u32> = (0..layout.blocks as u32).collect();
        let mut exec = self.model.executor(layout)?;
        let (mut logprobs, mut fingerprint) = (Vec::new(), 0u64);
        for ids in probes {
            let ids = [&vec![VIRTUAL_TOKEN; before], ids.as_slice()].concat();
            for start in (0..ids.len()).step_by(CHUNK) {
                let chunk = &ids[start..ids.len().min(start + CHUNK)];
                let span = SequenceChunk { ids: chunk, start, blocks: &blocks, adapter, logits: Readout::All };
                let logits = exec.forward(&[span])?;
                // Of virtual tokens nobody asks what follows.
                let own = before.saturating_sub(start).min(chunk.len());
                let (logits, start) = (&logits[own * self.model.vocab_size()..], start + own);
                for (row, target) in logits.chunks_exact(self.model.vocab_size()).zip(&ids[start + 1..]) {
                    logprobs.push((f64::from(row[*target as usize]) - log_sum_exp(row)) as f32);
                }
                let bits = logits.iter().map(|x| u64::from(x.to_bits()));
                fingerprint = bits.fold(fingerprint, |sum, bits| sum.rotate_left(5).wrapping_add(bits));
                permit.yield_to_serving();
            }
        }
        Ok((logprobs, fingerprint))
    }

    fn train(&self, probes: &[Vec<u32>], adapter: Option<&Adapter>) -> Result<Logprobs> {
        let permit = self.compute.training.train();
        let ids: Vec<&[u32]> = probes.iter().map(Vec::as_slice).collect();
        let wanted: Vec<_> =
            ids.iter().enumerate().flat_map(|(s, ids)| (0..ids.len().saturating_sub(1)).map(move |i| (s, i))).collect();
        // In float32: what serving is compared with shares no kernel with it.
        let options =
            ForwardOptions { adapter, permit: Some(&permit), products: Products::Exact, ..ForwardOptions::default() };
        self.model.token_logprobs(&ids, &wanted, options)
    }
}

fn report(base: &BaseScores, serve: &[f32], train: &[f32], serves_the_base: bool) -> Result<ParityReport> {
    let effect = |with: &[f32], without: &[f32]| with.iter().zip(without).map(|(a, b)| a - b).collect::<Vec<f32>>();
    let served = effect(serve, &base.serve.0);
    let trained = effect(train, &base.train);
    let mean = |values: &mut dyn Iterator<Item = f32>| values.map(f32::abs).sum::<f32>() / trained.len() as f32;
    let mean_abs_effect = mean(&mut trained.iter().copied());
    let mean_abs_difference = mean(&mut served.iter().zip(&trained).map(|(s, t)| s - t));
    if !mean_abs_difference.is_finite() {
        return Err(Error::precondition(
            "PARITY_FAILED",
            "parity gate",
            "the adapter gives log-probabilities that are not numbers; its values are too large for this base",
        ));
    }
    let no_effect = serves_the_base && trained.iter().all(|d| *d == 0.0);
    if serves_the_base && !no_effect {
        return Err(Error::precondition(
            "PARITY_FAILED",
            "parity gate",
            format!(
                "training sees an effect of {mean_abs_effect:.4} nats and serving none: the adapter is not applied"
            ),
        ));
    }
    let threshold = FLOOR.max(SHARE * mean_abs_effect);
    Ok(ParityReport { tokens: trained.len() as u32, mean_abs_difference, mean_abs_effect, threshold, no_effect })
}

/// Returns those of a job's own sequences that [`Parity::measure`] uses.
pub fn own_probes(sequences: &[&[u32]]) -> Vec<Vec<u32>> {
    limited(sequences, MAX_TOKENS)
}

/// Puts the tokens that have rows of their own in the place of every other token, one after the other: a text may have none of them.
fn strew(probes: &mut [Vec<u32>], adapter: &Adapter) {
    let own = adapter.tokens.values().flat_map(|tokens| tokens.ids.iter()).cycle();
    probes.iter_mut().flatten().step_by(2).zip(own).for_each(|(id, own)| *id = *own);
}

/// Tokens that have a prediction.
fn scored(probes: &[Vec<u32>]) -> usize {
    probes.iter().map(|ids| ids.len().saturating_sub(1)).sum()
}

/// The first sequences, as many as have so many tokens to score.
fn limited(probes: &[impl AsRef<[u32]>], enough: usize) -> Vec<Vec<u32>> {
    let mut tokens = 0;
    let fits = |ids: &&[u32]| {
        let room = tokens < enough;
        tokens += ids.len().saturating_sub(1);
        room
    };
    probes.iter().map(AsRef::as_ref).take_while(fits).map(<[u32]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::SiteDelta;
    use crate::request::LoraSpec;

    fn setup() -> (Parity, Adapter) {
        let (model, text) = Model::tiny(1);
        let mut adapter = Adapter::fresh(&LoraSpec::default(), model.shape(), 5).unwrap();
        for (i, layer) in adapter.pairs_mut().map(|(_, pair)| pair).enumerate() {
            layer.b.iter_mut().enumerate().for_each(|(j, b)| *b = ((i * 31 + j) as f32).sin() * 0.1);
        }
        (Parity::new(model, &text, Compute::new(true, 0.5)).unwrap(), adapter)
    }

    fn packed(adapter: &Adapter, parity: &Parity) -> Arc<PackedAdapter> {
        Arc::new(PackedAdapter::new(adapter, parity.model.shape(), &RowNorms::new()).unwrap())
    }

    #[test]
    fn a_sound_adapter_passes() {
        let (parity, adapter) = setup();
        let report = parity.measure(&packed(&adapter, &parity), &adapter, &[]).unwrap();
        assert!(report.tokens as usize >= MIN_TOKENS && !report.no_effect, "{report:?}");
        assert!(report.mean_abs_difference <= report.threshold, "{report:?}");
        let probes: Vec<Vec<u32>> = (0..4).map(|s| (0..100).map(|i| (i * 7 + s) % 256).collect()).collect();
        let report = parity.measure(&packed(&adapter, &parity), &adapter, &probes).unwrap();
        assert_eq!(report.tokens, 396);
        assert!(report.mean_abs_difference <= report.threshold, "{report:?}");
    }

    /// The planted fault: serving skips one layer's adapter.
    #[test]
    fn a_skipped_layer_is_refused() {
        let (parity, adapter) = setup();
        let mut faulty = adapter.clone();
        faulty.sites.retain(|site, _| site.layer != 1);
        let report = parity.measure(&packed(&faulty, &parity), &adapter, &[]).unwrap();
        assert!(report.mean_abs_difference > report.threshold, "{report:?}");
    }

    #[test]
    fn an_adapter_that_is_not_served_is_refused_however_small() {
        let (parity, mut adapter) = setup();
        let unserved = Adapter { sites: Default::default(), ..adapter.clone() };
        adapter.pairs_mut().map(|(_, pair)| pair).for_each(|layer| layer.b.iter_mut().for_each(|b| *b *= 1e-3));
        assert!(parity.measure(&packed(&unserved, &parity), &adapter, &[]).is_err());
    }

    /// Tokens that no text of the gate has are looked at all the same.
    #[test]
    fn rows_of_tokens_that_are_not_served_are_refused() {
        let (parity, _) = setup();
        let spec = LoraSpec { trainable_token_indices: vec![257, 3], ..LoraSpec::default() };
        let mut adapter = Adapter::fresh(&spec, parity.model.shape(), 5).unwrap();
        parity.model.begin(&mut adapter, &[], None).unwrap();
        assert!(parity.measure(&packed(&adapter, &parity), &adapter, &[]).unwrap().mean_abs_effect < 1e-3);
        adapter.tokens.values_mut().flat_map(|tokens| &mut tokens.rows).for_each(|x| *x += 0.3);
        let report = parity.measure(&packed(&adapter, &parity), &adapter, &[]).unwrap();
        assert!(!report.no_effect && report.mean_abs_difference <= report.threshold, "{report:?}");
        let unserved = Adapter { tokens: Default::default(), ..adapter.clone() };
        assert!(parity.measure(&packed(&unserved, &parity), &adapter, &[]).is_err());
    }

    #[test]
    fn a_zero_adapter_has_no_effect() {
        let (parity, adapter) = setup();
        let (model, _) = Model::tiny(1);
        let zero = Adapter::fresh(&adapter.spec, model.shape(), 5).unwrap();
        assert!(parity.measure(&packed(&zero, &parity), &zero, &[]).unwrap().no_effect);
    }

    #[test]
    fn an_exploding_adapter_is_refused() {
        let (parity, mut adapter) = setup();
        adapter.pairs_mut().map(|(_, pair)| pair).for_each(|layer| layer.b.iter_mut().for_each(|b| *b = 1e38));
        assert!(parity.measure(&packed(&adapter, &parity), &adapter, &[]).is_err());
    }

    /// Where B A is a small difference of large products bf16 loses it, and twice the bits serve it at the error that the same change has when
    /// its factors are small.
    #[test]
    fn twice_the_bits_are_served_at_the_usual_error() {
        let (parity, adapter) = setup();
        let shape = parity.model.shape().clone();
        let (mut cancelling, mut small) = (adapter.clone(), adapter);
        for (i, (site, layer)) in cancelling.pairs_mut().enumerate() {
            let ((inputs, outputs), rank) = (shape.dims(site.target).unwrap(), layer.rank);
            let half = rank / 2;
            let wave = |at: usize, by: f32| ((at + 17 * i) as f32 * by).sin();
            let part = |at: usize| 0.04 * wave(at, 1.37);
            let a = |k: usize, at: usize| 3.0 * wave(at + 977 * (k % half), 0.71) + (k / half) as f32 * part(at);
            let b = |at: usize, k: usize| [3.0, -3.0][k / half] * wave(at + 577 * (k % half), 0.43);
            layer.a = (0..rank * inputs).map(|j| a(j / inputs, j % inputs)).collect();
            layer.b = (0..rank * outputs).map(|j| b(j / rank, j % rank)).collect();
            let Some(SiteDelta::LowRank(same)) = small.sites.get_mut(&site) else { panic!() };
            same.a = (0..rank * inputs).map(|j| (j / inputs / half) as f32 * part(j % inputs)).collect();
            same.b.clone_from(&layer.b);
        }
        for scale in [2.0, 4.0, 16.0] {
            cancelling.pairs_mut().chain(small.pairs_mut()).for_each(|(_, layer)| layer.scale = scale);
            let precise = Arc::new(PackedAdapter::precise(&cancelling, &shape, &RowNorms::new()).unwrap());
            let difference = |form, of| parity.measure(&form, of, &[]).unwrap().mean_abs_difference;
            let plain = difference(packed(&cancelling, &parity), &cancelling);
            let (precise, usual) = (difference(precise, &cancelling), difference(packed(&small, &parity), &small));
            assert!(precise <= 0.02 * plain && precise <= 1.5 * usual, "{scale}: {plain} {precise} {usual}");
        }
    }
}
