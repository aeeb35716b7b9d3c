//! PEFT's `IA3Config`.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::adapter::peft::config::Known;
use crate::adapter::peft::selection::{Ends, Selection, module_name};
use crate::adapter::peft::{Selected, SiteTensors, refuse};
use crate::adapter::{BaseShape, ScaledSide, Site};
use crate::error::Result;
use crate::request::{Ia3Spec, Target};

/// The settings of an (IA)3.
const KNOWN: Known = Known {
    read: &["target_modules", "exclude_modules", "feedforward_modules"],
    without_meaning: &["init_ia3_weights"],
    refused: &[(
        "modules_to_save",
        "whole layers are served as the base has them: train again with modules_to_save empty",
    )],
};

/// A config that is read.
#[derive(Debug)]
pub(super) struct Settings {
    selection: Selection,
    feedforward: Ends,
    /// The settings that select modules, as the file has them.
    selecting: Value,
}

impl Settings {
    pub(super) fn read(config: &Map<String, Value>) -> Result<Self> {
        KNOWN.check(config)?;
        let selecting = ["target_modules", "exclude_modules", "feedforward_modules"];
        Ok(Self {
            selection: Selection::read(config)?,
            feedforward: Ends::read("feedforward_modules", config.get("feedforward_modules"))?,
            selecting: selecting.iter().map(|key| config.get(*key).cloned().unwrap_or_default()).collect(),
        })
    }

    /// The sites that the config selects, where the names of the base's modules begin with `root`.
    ///
    /// # Errors
    /// UNSUPPORTED_SETTING where an input is scaled that other layers share.
    pub(super) fn selected(&self, root: &str, shape: &BaseShape) -> Result<Vec<Selected>> {
        let own = |site: Site| {
            let feedforward = self.feedforward.matches(&module_name(root, site))?;
            if feedforward && shape.shares_input(site.target) {
                let message = format!(
                    "selects {}, whose input is that of other layers too, and their products are computed from it together: train again with \
                     o_proj or down_proj in it, and the others in target_modules alone",
                    site.target.name()
                );
                return Err(refuse("UNSUPPORTED_SETTING", "feedforward_modules", message));
            }
            let side = if feedforward { ScaledSide::Input } else { ScaledSide::Output };
            Ok(Selected { site, tensors: SiteTensors::Scales(side) })
        };
        self.selection.sites(root, shape)?.into_iter().map(own).collect()
    }

    /// How a fresh adapter would be shaped to have these sites; of what no such shape has, the targets that occur.
    pub(super) fn spec(&self, sites: &[Selected]) -> Ia3Spec {
        let of = |wanted: &dyn Fn(&Selected) -> bool| {
            let targets: BTreeSet<Target> =
                sites.iter().filter(|selected| wanted(selected)).map(|selected| selected.site.target).collect();
            targets.into_iter().collect()
        };
        let is_input = |selected: &Selected| selected.tensors == SiteTensors::Scales(ScaledSide::Input);
        Ia3Spec { targets: of(&|_| true), feedforward: of(&is_input) }
    }

    /// Gives a text that is equal for equal settings. What selects modules is in it as targets where it says no more than that.
    pub(super) fn canonical(&self) -> String {
        match (self.selection.plain(), self.feedforward.plain()) {
            (Some((targets, None)), Some(feedforward)) => {
                let names = |targets: &[Target]| targets.iter().map(|target| target.name()).collect::<Vec<_>>();
                json!([names(targets), names(&feedforward)]).to_string()
            }
            _ => self.selecting.to_string(),
        }
    }
}
