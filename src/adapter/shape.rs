//! The shapes that an adapter must fit.

use std::collections::BTreeSet;

use crate::adapter::BaseNames;
use crate::arch::decoder::{Site, SiteSpec};
use crate::ids::Digest;
use crate::request::Target;

/// The shapes an adapter must fit.
#[derive(Debug, Clone, PartialEq)]
pub struct BaseShape {
    /// For people, e.g. `SmolLM2-135M-Instruct.Q4_1`.
    pub name: String,
    /// By which adapters may call it.
    pub names: BaseNames,
    /// SHA-256 of the base's file.
    pub digest: Digest,
    /// Transformer blocks.
    pub layers: u32,
    /// The linear layers of a block, in the order in which they are computed; every block has the same.
    pub linears: Vec<LinearShape>,
    /// The linear layers that have a bias.
    pub biased: BTreeSet<Site>,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Whether the output matrix is not the embedding.
    pub own_head: bool,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys, and of values.
    pub kv_heads: usize,
    /// Values of a head.
    pub head_dim: usize,
}

/// The shape of a linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearShape {
    /// Its name within the block.
    pub target: Target,
    /// Values that go in.
    pub inputs: usize,
    /// Values that come out.
    pub outputs: usize,
}

impl From<&SiteSpec> for LinearShape {
    fn from(spec: &SiteSpec) -> Self {
        Self { target: spec.site.target, inputs: spec.inputs, outputs: spec.outputs }
    }
}

impl BaseShape {
    /// A base whose blocks have the seven linear layers of llama's, of these (in, out); for tests.
    pub fn llama(name: &str, digest: Digest, layers: u32, dims: [(usize, usize); 7]) -> Self {
        use Target::{DownProj, GateProj, KProj, OProj, QProj, UpProj, VProj};
        let targets = [QProj, KProj, VProj, OProj, GateProj, UpProj, DownProj];
        let linears = targets.into_iter().zip(dims);
        let linears = linears.map(|(target, (inputs, outputs))| LinearShape { target, inputs, outputs }).collect();
        let (hidden_size, heads, kv_heads, head_dim) = (dims[0].0, 1, 1, dims[1].1);
        let (name, names, biased) = (name.to_owned(), BaseNames::default(), BTreeSet::new());
        let (vocab_size, own_head) = (64, false);
        Self {
            name,
            names,
            digest,
            layers,
            linears,
            biased,
            vocab_size,
            own_head,
            hidden_size,
            heads,
            kv_heads,
            head_dim,
        }
    }

    /// Returns how many values the keys of a position have in a layer; its values are as many.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Returns (in, out) of a linear layer; `None` where the base has none of that name.
    pub fn dims(&self, target: Target) -> Option<(usize, usize)> {
        let linear = self.linears.iter().find(|linear| linear.target == target)?;
        Some((linear.inputs, linear.outputs))
    }

    /// Returns a site's number, counted through the blocks; `None` where the base does not have it.
    pub fn index(&self, site: Site) -> Option<usize> {
        let within = self.linears.iter().position(|linear| linear.target == site.target)?;
        (site.layer < self.layers).then(|| site.layer as usize * self.linears.len() + within)
    }

    /// Returns the sites by their numbers.
    pub fn sites(&self) -> impl Iterator<Item = Site> + '_ {
        (0..self.layers).flat_map(|layer| self.targets().map(move |target| Site { layer, target }))
    }

    /// Returns the linear layers of a block.
    pub fn targets(&self) -> impl Iterator<Item = Target> + '_ {
        self.linears.iter().map(|linear| linear.target)
    }

    /// Returns whether a linear layer is computed from an input that others of its block share.
    pub fn shares_input(&self, target: Target) -> bool {
        !matches!(target, Target::OProj | Target::DownProj)
    }

    /// Returns the names of a block's linear layers, for people.
    pub fn target_names(&self) -> String {
        self.targets().map(Target::name).collect::<Vec<_>>().join(", ")
    }
}
