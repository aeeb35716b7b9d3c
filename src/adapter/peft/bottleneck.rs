//! Bottleneck adapters, which PEFT has no format for. The files are as PEFT's of other kinds: `adapter_config.json` with the `peft_type`
//! "BOTTLENECK", and in `adapter_model.safetensors` four tensors for each module that is selected, behind the module's name:
//! `adapter_down.weight` `[bottleneck_size, out]`, `adapter_down_bias` `[bottleneck_size]`, `adapter_up.weight` `[out, bottleneck_size]`,
//! `adapter_up_bias` `[out]`. What the module gives, y, becomes y + up act(down y + down_bias) + up_bias, before it is scaled, normed or added
//! to the residual stream.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::adapter::peft::config::{Known, setting};
use crate::adapter::peft::selection::Selection;
use crate::adapter::peft::{Selected, SiteTensors, refuse, selecting};
use crate::adapter::{Adapter, BaseShape};
use crate::error::Result;
use crate::request::{BottleneckSpec, NonLinearity, Placement, Target};

/// The settings of a bottleneck adapter.
const KNOWN: Known = Known {
    read: &[
        "bottleneck_size",
        "non_linearity",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
    ],
    without_meaning: &[],
    refused: &[(
        "modules_to_save",
        "whole layers are served as the base has them: train again with modules_to_save empty",
    )],
};

/// A config that is read.
#[derive(Debug)]
pub(super) struct Settings {
    size: u32,
    non_linearity: NonLinearity,
    selection: Selection,
    /// The settings that select modules, as the file has them.
    selecting: Value,
}

impl Settings {
    pub(super) fn read(config: &Map<String, Value>) -> Result<Self> {
        KNOWN.check(config)?;
        let missing = |key: &str| refuse("INVALID_SETTING", key, "is missing; it is in every config of this kind");
        let whole = |value: &Value| value.as_u64().and_then(|size| u32::try_from(size).ok()).filter(|size| *size > 0);
        let size = setting(config, "bottleneck_size", "a whole number of at least 1", whole)?;
        let known = |value: &Value| NonLinearity::from_name(value.as_str()?);
        let names = NonLinearity::ALL.map(NonLinearity::name).join(" or ");
        let non_linearity = setting(config, "non_linearity", &names, known)?;
        let selecting = ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"];
        Ok(Self {
            size: size.ok_or_else(|| missing("bottleneck_size"))?,
            non_linearity: non_linearity.ok_or_else(|| missing("non_linearity"))?,
            selection: Selection::read(config)?,
            selecting: selecting.iter().map(|key| config.get(*key).cloned().unwrap_or_default()).collect(),
        })
    }

    /// Refuses a size over the limit on ranks.
    pub(super) fn check_size(&self, max_rank: u64) -> Result<()> {
        if u64::from(self.size) <= max_rank {
            return Ok(());
        }
        let message = format!(
            "is {}, over the limit max_rank of {max_rank}; train with a smaller one, or ask the operator for a higher limit",
            self.size
        );
        Err(refuse("RANK_TOO_LARGE", "bottleneck_size", message))
    }

    /// The sites that the config selects, where the names of the base's modules begin with `root`.
    ///
    /// # Errors
    /// UNSUPPORTED_SETTING for a module that does not give to the residual stream.
    pub(super) fn selected(&self, root: &str, shape: &BaseShape) -> Result<Vec<Selected>> {
        let tensors = SiteTensors::Bottleneck { size: self.size as usize, non_linearity: self.non_linearity };
        let sites = self.selection.sites(root, shape)?;
        match sites.iter().find(|site| shape.shares_input(site.target)) {
            Some(site) => {
                let message = format!(
                    "selects {}; bottleneck adapters stand behind o_proj and down_proj: train again with these",
                    site.target.name()
                );
                Err(refuse("UNSUPPORTED_SETTING", "target_modules", message))
            }
            None => Ok(sites.into_iter().map(|site| Selected { site, tensors }).collect()),
        }
    }

    /// How a fresh adapter would be shaped to have these sites, about.
    pub(super) fn spec(&self, sites: &[Selected], shape: &BaseShape) -> BottleneckSpec {
        let behind_attention = sites.iter().any(|selected| selected.site.target == Target::OProj);
        let layers: BTreeSet<u32> = sites.iter().map(|selected| selected.site.layer).collect();
        BottleneckSpec {
            size: self.size,
            placement: if behind_attention { Placement::Both } else { Placement::FeedForward },
            non_linearity: self.non_linearity,
            layers: (layers.len() < shape.layers as usize).then(|| layers.into_iter().collect()),
        }
    }

    /// Gives a text that is equal for equal settings. What selects modules is in it as targets and layers where it says no more than that.
    pub(super) fn canonical(&self) -> String {
        let selecting = match self.selection.plain() {
            Some((targets, layers)) => json!([targets.iter().map(|target| target.name()).collect::<Vec<_>>(), layers]),
            None => self.selecting.clone(),
        };
        json!([self.size, self.non_linearity.name(), selecting]).to_string()
    }
}

/// The config of one trained here.
pub(super) fn config_json(spec: &BottleneckSpec, adapter: &Adapter, shape: &BaseShape) -> Value {
    let sites: Vec<_> = adapter.sites.keys().copied().collect();
    let (targets, layers) = selecting(&sites, spec.layers.is_some(), shape);
    json!({
        "base_model_name_or_path": shape.name,
        "bottleneck_size": spec.size,
        "inference_mode": true,
        "layers_to_transform": layers,
        "modules_to_save": null,
        "non_linearity": spec.non_linearity.name(),
        "peft_type": "BOTTLENECK",
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    })
}
