//! Full fine-tuning: copies of the base's tensors in float32, which are trained in their place; and what becomes of them, a Hugging Face folder
//! or the LoRA that comes nearest to the change.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use crate::adapter::{Adapter, LowRank};
use crate::arch::decoder::Slot;
use crate::device::TrainPermit;
use crate::error::{Error, Result};
use crate::model::{Model, initial};
use crate::request::{FullSpec, LoraSpec, TunerSpec};
use crate::weights::folder::Written;
use crate::weights::{Put, floats, folder};

impl Model {
    /// Returns the tensors that a full fine-tuning trains.
    ///
    /// # Errors
    /// INVALID_ARGUMENT names the field: a layer that the base lacks.
    pub fn trained_slots(&self, spec: &FullSpec) -> Result<Vec<Slot>> {
        if spec.linear.is_none() {
            return Ok(self.weights.slots().collect());
        }
        let sites = spec.sites(&self.shape)?.into_iter().filter_map(|site| self.shape.index(site));
        let of_site = |id| [Some(Slot::Matrix(id)), self.bias(id).map(|_| Slot::Bias(id))].into_iter().flatten();
        Ok(sites.flat_map(of_site).collect())
    }

    /// Returns how many values a full fine-tuning trains.
    ///
    /// # Errors
    /// As of [`Model::trained_slots`].
    pub fn trained_values(&self, spec: &FullSpec) -> Result<usize> {
        let len = |slot: Slot| self.weights.dims(slot).into_iter().product::<usize>();
        Ok(self.trained_slots(spec)?.into_iter().map(len).sum())
    }

    /// Copies what a full fine-tuning trains; the base stays as it is. Gives way to serving.
    ///
    /// # Errors
    /// As of [`Model::trained_slots`].
    pub fn copies(&self, spec: &FullSpec, permit: &TrainPermit) -> Result<Adapter> {
        let copy = |slot: Slot| {
            permit.yield_to_serving();
            (slot, self.weights.values(slot))
        };
        let copies = self.trained_slots(spec)?.into_iter().map(copy).collect();
        let spec = TunerSpec::Full(spec.clone());
        Ok(Adapter { spec, sites: Default::default(), virtual_tokens: None, copies, tokens: Default::default() })
    }

    /// Computes the LoRA of a rank that comes nearest to what training has changed in the linear layers (truncated singular values, Eckart &
    /// Young 1936), and which share it has of the whole change, as Frobenius norms: what is trained beside the linear layers counts as not
    /// held. Gives way to serving.
    ///
    /// # Errors
    /// An internal one where the adapter is no full fine-tuning of this base.
    pub fn nearest_lora(&self, trained: &Adapter, rank: u32, permit: &TrainPermit) -> Result<(Adapter, f64)> {
        let TunerSpec::Full(spec) = &trained.spec else { return Err(Error::internal("no copies of the base")) };
        let (mut pairs, mut held, mut whole) = (Vec::new(), 0.0, 0.0);
        for (slot, values) in &trained.copies {
            let mut change = self.weights.values(*slot);
            change.iter_mut().zip(values).for_each(|(base, trained)| *base = trained - *base);
            whole += square(&change);
            let Slot::Matrix(site) = *slot else { continue };
            let dims = (self.matrix(site).rows(), self.matrix(site).cols());
            let rank = (rank as usize).min(dims.0).min(dims.1);
            let part = initial::singular(&change, dims, rank, &[], &|| permit.yield_to_serving());
            held += square(&part.a);
            let pair =
                LowRank { rank, alpha: rank as f32, scale: 1.0, a: part.a, b: part.u, magnitude: None, bias: None };
            pairs.push((self.site(site), pair));
        }
        let layers = spec.linear.as_ref().and_then(|linear| linear.layers.clone());
        let mut lora = LoraSpec { rank, alpha: rank as f32, layers, ..LoraSpec::default() };
        lora.targets = pairs.iter().map(|(site, _)| site.target).collect();
        lora.targets.sort_unstable();
        lora.targets.dedup();
        let share = if whole > 0.0 { (held / whole).sqrt() } else { 0.0 };
        Ok((Adapter::lora(lora, pairs), share))
    }

    /// The file of the tensors in what [`Model::write_folder`] writes.
    pub const TENSORS_FILE: &str = folder::TENSORS;

    /// Fails where [`Model::write_folder`] could not say what the base is. `base`: the file or folder it was read from.
    ///
    /// # Errors
    /// NO_FOLDER_FORM where its settings cannot be written as a `config.json`.
    pub fn check_folder(&self, base: &Path) -> Result<()> {
        folder::config(&self.weights, base).map(drop)
    }

    /// Returns the bytes of the folder's tensors.
    pub fn folder_bytes(&self) -> u64 {
        folder::tensor_bytes(&self.weights)
    }

    /// Writes the base with what is trained in it as a Hugging Face folder, all tensors in float32: `put` takes its files one after the other,
    /// in pieces.
    ///
    /// # Errors
    /// As of [`Model::check_folder`], and those of `put`.
    pub fn write_folder(&self, trained: &Adapter, base: &Path, put: &mut Put<'_>) -> Result<()> {
        folder::write(&self.weights, &trained.copies, base, put)
    }

    /// Writes the GGUF file that the base was read from once more, with the tensors of a folder that [`Model::write_folder`] has written, all in
    /// float32; `tensors` is that folder's file of them.
    ///
    /// # Errors
    /// NO_GGUF_FORM where the base was read from no such file; those of the files.
    pub fn write_gguf(&self, tensors: File, base: &Path, to: &mut impl Write) -> Result<()> {
        floats::write(&self.weights, Written::open(tensors)?, base, to)
    }
}

fn square(values: &[f32]) -> f64 {
    values.iter().map(|x| f64::from(*x).powi(2)).sum()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::device::Arbiter;
    use crate::model::traced::{ForwardOptions, Products};
    use crate::request::{LinearLayers, Target};
    use crate::weights::Weights;

    /// The tiny model's copies, moved by a change of this rank in the linear layers.
    fn moved(model: &Model, spec: &FullSpec, rank: usize) -> Adapter {
        let mut trained = model.copies(spec, &Arbiter::new(0.5).train()).unwrap();
        for (slot, values) in &mut trained.copies {
            let Slot::Matrix(site) = *slot else { continue };
            let cols = model.matrix(site).cols();
            let wave = |i: usize, k: usize| ((i * (k + 2) + site) as f32 * 0.37).sin();
            for (i, x) in values.iter_mut().enumerate() {
                *x += 0.02 * (0..rank).map(|k| wave(i / cols, k) * wave(i % cols, k + 5)).sum::<f32>();
            }
        }
        trained
    }

    #[test]
    fn a_change_of_a_rank_is_a_lora_of_that_rank() {
        let (model, _) = Model::tiny(1);
        let permit = Arbiter::new(0.5).train();
        let linear = LinearLayers { targets: vec![Target::QProj, Target::DownProj], layers: Some(vec![1]) };
        let spec = FullSpec { linear: Some(linear), extract_rank: None };
        let trained = moved(&model, &spec, 3);
        assert_eq!(trained.copies.len(), 2);
        let (lora, share) = model.nearest_lora(&trained, 3, &permit).unwrap();
        assert!((share - 1.0).abs() < 1e-4, "{share}");
        for (site, pair) in lora.pairs() {
            let id = model.shape().index(site).unwrap();
            let cols = model.matrix(id).cols();
            let base = model.weights.values(Slot::Matrix(id));
            for (i, (base, trained)) in base.iter().zip(&trained.copies[&Slot::Matrix(id)]).enumerate() {
                let at = |k: usize| pair.b[i / cols * 3 + k] * pair.a[k * cols + i % cols];
                let product: f32 = (0..3).map(at).sum();
                assert!((product - (trained - base)).abs() < 1e-5, "{site:?} {i}");
            }
        }
        let (_, less) = model.nearest_lora(&trained, 1, &permit).unwrap();
        assert!(less > 0.3 && less < 0.99, "{less}");
    }

    #[test]
    fn the_folder_is_the_trained_model() {
        let (model, _) = Model::tiny(1);
        let mut trained = moved(&model, &FullSpec::default(), 3);
        for (slot, values) in &mut trained.copies {
            let by = if matches!(slot, Slot::Norm(_)) { 0.1 } else { 0.002 };
            values.iter_mut().enumerate().for_each(|(i, x)| *x += by * (i as f32 * 0.7).sin());
        }
        let dir = tempfile::tempdir().unwrap();
        let mut put = |name: &str, piece: Vec<u8>| {
            let mut file = File::options().create(true).append(true).open(dir.path().join(name)).unwrap();
            file.write_all(&piece).map_err(Error::internal)
        };
        model.write_folder(&trained, Path::new("tiny.gguf"), &mut put).unwrap();
        let read = Model::new(Weights::from_folder(dir.path()).unwrap(), &Device::Cpu).unwrap();
        let ids: Vec<u32> = (0..40).map(|i| i * 7 % 256).collect();
        let wanted: Vec<(usize, usize)> = (0..39).map(|i| (0, i)).collect();
        let score = |model: &Model, adapter: Option<&Adapter>| {
            let options = ForwardOptions { adapter, products: Products::Exact, ..ForwardOptions::default() };
            model.token_logprobs(&[&ids], &wanted, options).unwrap()
        };
        let (expected, found) = (score(&model, Some(&trained)), score(&read, None));
        assert!(expected.iter().zip(&found).all(|(x, y)| (x - y).abs() < 1e-5), "{expected:?} {found:?}");
        let base = score(&model, None);
        assert!(expected.iter().zip(&base).any(|(x, y)| (x - y).abs() > 0.1), "training has changed something");
    }

    #[test]
    fn what_is_not_linear_counts_as_not_held_and_no_change_is_no_share() {
        let (model, _) = Model::tiny(1);
        let permit = Arbiter::new(0.5).train();
        let mut trained = moved(&model, &FullSpec::default(), 2);
        assert_eq!(trained.copies.len(), model.weights.slots().count());
        let (lora, share) = model.nearest_lora(&trained, 2, &permit).unwrap();
        assert_eq!(lora.sites.len(), model.decoder().sites.len());
        assert!((share - 1.0).abs() < 1e-4, "{share}");
        trained.copies.get_mut(&Slot::Embedding).unwrap().iter_mut().for_each(|x| *x += 0.01);
        assert!(model.nearest_lora(&trained, 2, &permit).unwrap().1 < 0.99);
        let unmoved = model.copies(&FullSpec::default(), &permit).unwrap();
        let (lora, share) = model.nearest_lora(&unmoved, 2, &permit).unwrap();
        assert_eq!(share, 0.0);
        assert!(lora.is_finite());
    }
}
