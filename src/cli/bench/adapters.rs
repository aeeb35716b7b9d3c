//! The adapters that a load asks for: small random ones, imported once and found again by their names.

use std::collections::HashSet;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use candle_core::quantized::gguf_file::Content;
use futures::stream::{StreamExt as _, TryStreamExt as _, iter};
use half::f16;
use indicatif::{ProgressBar, ProgressStyle};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use crate::api::client::{Client, proto};
use crate::cli::adapters::upload;
use crate::cli::connection::all_pages;
use crate::cli::{Failure, Result, models, request_id};
use crate::random::{Purpose, Stream};
use crate::request::Target;

/// Imports under way at once: one is sent while the server checks another. Fewer than the limit `max_uploads_per_tenant`.
const IMPORTS_AT_ONCE: usize = 2;

/// Values of B lie within this: the answers differ from the base's, and not by much.
const LARGEST_B: f32 = 0.02;

/// What the adapters are like. An adapter's values are a function of this and its index.
#[derive(Debug, Clone)]
pub(super) struct Kind {
    pub rank: u32,
    /// Sorted, none twice.
    pub targets: Vec<Target>,
}

impl Kind {
    /// `bench-r16-all`, `bench-r8-q-v`: what the names begin with, so that adapters of different kinds never mix.
    pub(super) fn prefix(&self) -> String {
        let short = |target: &Target| target.name().trim_end_matches("_proj");
        let targets = match self.targets.len() == Target::ALL.len() {
            true => "all".into(),
            false => self.targets.iter().map(short).collect::<Vec<_>>().join("-"),
        };
        format!("bench-r{}-{targets}", self.rank)
    }
}

/// Full names of `count` adapters `PREFIX-0`, `PREFIX-1` and so on. Those that the tenant does not have are made first, for the base
/// that `base` names.
pub(super) async fn ensure(
    client: &Client,
    parent: &str,
    prefix: &str,
    count: usize,
    kind: &Kind,
    base: &str,
) -> Result<Vec<String>> {
    let ids: Vec<String> = (0..count).map(|index| format!("{prefix}-{index}")).collect();
    let names: Vec<String> = ids.iter().map(|id| format!("{parent}/adapters/{id}")).collect();
    let live = live_adapters(client, parent).await?;
    let missing: Vec<usize> = (0..).zip(&names).filter(|(_, name)| !live.contains(*name)).map(|(i, _)| i).collect();
    if missing.is_empty() {
        return Ok(names);
    }
    let shape = Shape::read(&models::fetch(base).await?)?;
    let bar = progress(missing.len());
    let import = async |index: usize| {
        let header = proto::ImportAdapterHeader {
            parent: parent.to_owned(),
            adapter_id: ids.get(index).cloned().unwrap_or_default(),
            request_id: request_id(),
            validate_only: false,
            publish: proto::Publish::Live as i32,
        };
        upload(client, header, files(kind, &shape, index as u64)?).await?;
        bar.inc(1);
        Ok::<_, Failure>(())
    };
    let imports = iter(missing).map(import).buffer_unordered(IMPORTS_AT_ONCE);
    let made = imports.try_collect::<()>().await;
    bar.finish_and_clear();
    made.map(|()| names)
}

/// Names of the tenant's adapters that can be asked.
async fn live_adapters(client: &Client, parent: &str) -> Result<HashSet<String>> {
    let adapters = all_pages(async |page_token| {
        let request = proto::ListAdaptersRequest { parent: parent.to_owned(), page_size: 1000, page_token };
        let page = client.list_adapters(request).await?;
        Ok((page.adapters, page.next_page_token))
    });
    Ok(adapters.await?.into_iter().filter(|a| !a.live_version.is_empty()).map(|a| a.name).collect())
}

fn progress(count: usize) -> ProgressBar {
    let bar = ProgressBar::new(count as u64);
    if let Ok(style) = ProgressStyle::with_template("importing adapters  [{bar:30}] {pos}/{len}  {eta} left") {
        bar.set_style(style.progress_chars("=> "));
    }
    if bar.is_hidden() {
        eprintln!("importing {count} adapters");
    }
    bar
}

/// What an adapter has to fit.
#[derive(Debug, Clone, PartialEq)]
struct Shape {
    layers: usize,
    /// Inputs and outputs of each linear layer of a block, in [`Target`]'s order.
    dims: [(usize, usize); Target::ALL.len()],
}

impl Shape {
    /// From the header of a GGUF file.
    fn read(path: &Path) -> Result<Self> {
        let unusable = |why: String| Failure::other(format!("{}: {why}", path.display()));
        let file = File::open(path).map_err(Failure::at(path))?;
        let content = Content::read(&mut BufReader::new(file)).map_err(|e| unusable(e.to_string()))?;
        let dims = |name: &str| match content.tensor_infos.get(name).map(|info| info.shape.dims()) {
            Some(&[outputs, inputs]) => Ok((inputs, outputs)),
            _ => Err(unusable(format!("has no matrix {name}"))),
        };
        let mut shape = Self { layers: 0, dims: [(0, 0); Target::ALL.len()] };
        for (target, dim) in Target::ALL.iter().zip(&mut shape.dims) {
            *dim = dims(&format!("blk.0.{}.weight", gguf_name(*target)))?;
        }
        shape.layers = (0..).take_while(|layer| dims(&format!("blk.{layer}.attn_q.weight")).is_ok()).count();
        Ok(shape)
    }
}

fn gguf_name(target: Target) -> &'static str {
    match target {
        Target::QProj => "attn_q",
        Target::KProj => "attn_k",
        Target::VProj => "attn_v",
        Target::OProj => "attn_output",
        Target::GateProj => "ffn_gate",
        Target::UpProj => "ffn_up",
        Target::DownProj => "ffn_down",
    }
}

/// The PEFT folder of an adapter: both factors uniform, A within PEFT's own bounds, in half precision.
fn files(kind: &Kind, shape: &Shape, index: u64) -> Result<Vec<(String, Vec<u8>)>> {
    let values = Stream::new(index, Purpose::Initialisation);
    let matrix = |tensor: u64, rows: usize, columns: usize, bound: f32| -> (Vec<usize>, Vec<u8>) {
        let value = |place| f16::from_f32(bound * (2.0 * values.uniform(tensor, place) - 1.0));
        let bytes = (0..(rows * columns) as u32).flat_map(|place| value(place).to_le_bytes());
        (vec![rows, columns], bytes.collect())
    };
    let rank = kind.rank as usize;
    let mut tensors = Vec::new();
    for layer in 0..shape.layers {
        for (target, &(inputs, outputs)) in Target::ALL.iter().zip(&shape.dims) {
            if kind.targets.contains(target) {
                let module = module_name(layer, *target);
                let tensor = tensors.len() as u64;
                let a = matrix(tensor, rank, inputs, (inputs as f32).powf(-0.5));
                let b = matrix(tensor + 1, outputs, rank, LARGEST_B);
                tensors.extend([(format!("{module}.lora_A.weight"), a), (format!("{module}.lora_B.weight"), b)]);
            }
        }
    }
    let broken = |e: safetensors::SafeTensorError| Failure::other(format!("cannot make an adapter: {e}"));
    let views = tensors
        .iter()
        .map(|(name, (dims, bytes))| Ok((name, TensorView::new(Dtype::F16, dims.clone(), bytes).map_err(broken)?)))
        .collect::<Result<Vec<_>>>()?;
    let tensors = safetensors::serialize(views, None).map_err(broken)?;
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": kind.rank, "lora_alpha": kind.rank,
        "target_modules": kind.targets.iter().map(|target| target.name()).collect::<Vec<_>>(),
    });
    Ok(vec![
        ("adapter_config.json".into(), config.to_string().into_bytes()),
        ("adapter_model.safetensors".into(), tensors),
    ])
}

/// PEFT's name of a linear layer.
fn module_name(layer: usize, target: Target) -> String {
    let part = match target {
        Target::QProj | Target::KProj | Target::VProj | Target::OProj => "self_attn",
        Target::GateProj | Target::UpProj | Target::DownProj => "mlp",
    };
    format!("base_model.model.model.layers.{layer}.{part}.{}", target.name())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::BaseShape;
    use crate::adapter::format::Package;
    use crate::ids::Digest;

    fn kind(targets: &[Target]) -> Kind {
        Kind { rank: 4, targets: targets.to_vec() }
    }

    /// Two layers, every matrix of its own shape.
    fn shape() -> Shape {
        Shape { layers: 2, dims: [(8, 8), (8, 4), (8, 4), (8, 8), (8, 12), (8, 12), (12, 8)] }
    }

    #[test]
    fn kinds_have_names_of_their_own() {
        assert_eq!(kind(&Target::ALL).prefix(), "bench-r4-all");
        assert_eq!(kind(&[Target::QProj, Target::VProj]).prefix(), "bench-r4-q-v");
        assert_eq!(kind(&[Target::GateProj]).prefix(), "bench-r4-gate");
    }

    #[test]
    fn the_server_takes_what_is_made() {
        let kind = kind(&[Target::KProj, Target::DownProj]);
        let base = BaseShape { name: "b".into(), digest: Digest::of(b"b"), layers: 2, dims: shape().dims };
        let read = |index| {
            let files = files(&kind, &shape(), index).unwrap();
            let [(_, config), (_, tensors)] = <[_; 2]>::try_from(files).unwrap();
            Package { config, tensors }.read(&base, 8).unwrap()
        };
        let lora = read(0);
        assert_eq!(lora.layers.len(), 4);
        for layer in lora.layers.values() {
            assert_eq!((layer.rank, layer.scale), (4, 1.0));
            assert!(layer.b.iter().any(|x| x.abs() > LARGEST_B / 4.0));
            assert!(layer.b.iter().all(|x| x.abs() <= LARGEST_B));
        }
        assert_eq!(lora, read(0));
        assert_ne!(lora, read(1));
    }
}
