//! The adapters that a load asks for: small random ones, imported once and found again by their names.

use std::collections::HashSet;

use futures::stream::{StreamExt as _, TryStreamExt as _, iter};
use half::f16;
use indicatif::{ProgressBar, ProgressStyle};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use crate::api::client::{Client, proto};
use crate::cli::adapters::upload;
use crate::cli::connection::all_pages;
use crate::cli::{Failure, Result, request_id};
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
    /// Sorted, none twice; empty is every linear layer of the base.
    pub targets: Vec<Target>,
}

impl Kind {
    /// `bench-r16-all`, `bench-r8-q-v`: what the names begin with, so that adapters of different kinds never mix.
    pub(super) fn prefix(&self) -> String {
        let short = |target: &Target| target.name().trim_end_matches("_proj");
        let targets = match self.targets.is_empty() {
            true => "all".into(),
            false => self.targets.iter().map(short).collect::<Vec<_>>().join("-"),
        };
        format!("bench-r{}-{targets}", self.rank)
    }
}

/// Full names of `count` adapters `PREFIX-0`, `PREFIX-1` and so on. Those that the tenant does not have are made first, for the server's
/// base.
pub(super) async fn ensure(
    client: &Client,
    parent: &str,
    prefix: &str,
    count: usize,
    kind: &Kind,
) -> Result<Vec<String>> {
    let ids: Vec<String> = (0..count).map(|index| format!("{prefix}-{index}")).collect();
    let names: Vec<String> = ids.iter().map(|id| format!("{parent}/adapters/{id}")).collect();
    let live = live_adapters(client, parent).await?;
    let missing: Vec<usize> = (0..).zip(&names).filter(|(_, name)| !live.contains(*name)).map(|(i, _)| i).collect();
    if missing.is_empty() {
        return Ok(names);
    }
    let base = client.get_base(proto::GetBaseRequest {}).await?;
    let bar = progress(missing.len());
    let import = async |index: usize| {
        let header = proto::ImportAdapterHeader {
            parent: parent.to_owned(),
            adapter_id: ids.get(index).cloned().unwrap_or_default(),
            request_id: request_id(),
            validate_only: false,
            publish: proto::Publish::Live as i32,
        };
        upload(client, header, files(kind, &base, index as u64)?).await?;
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

/// The linear layers that the adapters change, of those that the base has.
fn linears(base: &proto::Base, kind: &Kind) -> Result<Vec<(Target, usize, usize)>> {
    let known = base
        .linear_layers
        .iter()
        .filter_map(|linear| Some((Target::from_name(&linear.name)?, linear.inputs as usize, linear.outputs as usize)));
    let known: Vec<_> = known.collect();
    if let Some(target) = kind.targets.iter().find(|target| known.iter().all(|(of, ..)| of != *target)) {
        let names: Vec<_> = base.linear_layers.iter().map(|linear| linear.name.as_str()).collect();
        let message = format!("the base has no {}; its linear layers are {}", target.name(), names.join(", "));
        return Err(Failure::other(message));
    }
    let wanted = |target: &Target| kind.targets.is_empty() || kind.targets.contains(target);
    Ok(known.into_iter().filter(|(target, ..)| wanted(target)).collect())
}

/// The PEFT folder of an adapter: both factors uniform, A within PEFT's own bounds, in half precision.
fn files(kind: &Kind, base: &proto::Base, index: u64) -> Result<Vec<(String, Vec<u8>)>> {
    let values = Stream::new(index, Purpose::Initialisation);
    let matrix = |tensor: u64, rows: usize, columns: usize, bound: f32| -> (Vec<usize>, Vec<u8>) {
        let value = |place| f16::from_f32(bound * (2.0 * values.uniform(tensor, place) - 1.0));
        let bytes = (0..(rows * columns) as u32).flat_map(|place| value(place).to_le_bytes());
        (vec![rows, columns], bytes.collect())
    };
    let rank = kind.rank as usize;
    let mut tensors = Vec::new();
    let linears = linears(base, kind)?;
    for layer in 0..base.layers {
        for &(target, inputs, outputs) in &linears {
            let module = format!("base_model.model.model.layers.{layer}.{}.{}", target.block_part(), target.name());
            let tensor = tensors.len() as u64;
            let a = matrix(tensor, rank, inputs, (inputs as f32).powf(-0.5));
            let b = matrix(tensor + 1, outputs, rank, LARGEST_B);
            tensors.extend([(format!("{module}.lora_A.weight"), a), (format!("{module}.lora_B.weight"), b)]);
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
        "target_modules": linears.iter().map(|(target, ..)| target.name()).collect::<Vec<_>>(),
    });
    Ok(vec![
        ("adapter_config.json".into(), config.to_string().into_bytes()),
        ("adapter_model.safetensors".into(), tensors),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::peft::{Package, SizeLimits};
    use crate::adapter::{BaseShape, LinearShape};
    use crate::ids::Digest;

    fn kind(targets: &[Target]) -> Kind {
        Kind { rank: 4, targets: targets.to_vec() }
    }

    /// Two layers, every matrix of its own shape.
    fn shape() -> BaseShape {
        let dims = [(8, 8), (8, 4), (8, 4), (8, 8), (8, 12), (8, 12), (12, 8)];
        BaseShape::llama("b", Digest::of(b"b"), 2, dims)
    }

    fn base() -> proto::Base {
        let linear = |linear: &LinearShape| proto::LinearLayer {
            name: linear.target.name().to_owned(),
            inputs: linear.inputs as u32,
            outputs: linear.outputs as u32,
        };
        let shape = shape();
        proto::Base {
            layers: shape.layers,
            linear_layers: shape.linears.iter().map(linear).collect(),
            ..proto::Base::default()
        }
    }

    #[test]
    fn kinds_have_names_of_their_own() {
        assert_eq!(kind(&[]).prefix(), "bench-r4-all");
        assert_eq!(kind(&[Target::QProj, Target::VProj]).prefix(), "bench-r4-q-v");
        assert_eq!(kind(&[Target::GateProj]).prefix(), "bench-r4-gate");
    }

    #[test]
    fn the_server_takes_what_is_made() {
        let kind = kind(&[Target::KProj, Target::DownProj]);
        let read = |index| {
            let files = files(&kind, &base(), index).unwrap();
            let [(_, config), (_, tensors)] = <[_; 2]>::try_from(files).unwrap();
            Package { config, tensors }.read(&shape(), SizeLimits::NONE).unwrap()
        };
        let lora = read(0);
        assert_eq!(lora.sites.len(), 4);
        for layer in lora.pairs().map(|(_, pair)| pair) {
            assert_eq!((layer.rank, layer.scale), (4, 1.0));
            assert!(layer.b.iter().any(|x| x.abs() > LARGEST_B / 4.0));
            assert!(layer.b.iter().all(|x| x.abs() <= LARGEST_B));
        }
        assert_eq!(lora, read(0));
        assert_ne!(lora, read(1));
    }
}
