//! The form in which an adapter is served: its tensors in bf16, in the order in which the kernels read them, in one allocation.
//!
//! Of each adapted layer:
//! - A as PEFT has it, `[rank][in]`: shrinking is a dot product for each value of the rank;
//! - B as `[out / OUT_TILE][rank][OUT_TILE]`, the outputs padded with zeros: the outputs of one rank lie together, so expanding adds a
//!   vector for each value of the rank;
//! - the scale in float32, to be applied to what A gives: folded into a tensor it would be rounded with it;
//! - what (IA)3 multiplies with, or DoRA ([`Scales`]), in float32;
//! - what is added to what comes out ([`Bias`]), in float32;
//! - of a bottleneck adapter down as A, up as B, and their biases in float32.
//!
//! Virtual tokens lie behind the layers, in float32, and behind those the rows that some tokens have of the embedding or the head, by their ids.
//!
//! Where rounding to bf16 would show, a layer is packed as one of three times its rank (see [`PackedAdapter::precise`]): the kernels know of no
//! other form, so that all of them serve it, with the same bits.
//!
//! Rounding is to nearest, ties to even. What is not finite stays so and what overflows becomes infinite: no broken number looks good.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::adapter::{
    Adapter, BaseShape, Bottleneck, LowRank, RowNorms, ScaledSide, Site, SiteDelta, TokenRows, VirtualForm,
};
use crate::arch::decoder::{SiteId, Slot};
use crate::error::{Error, Result};
use crate::kernels::cpu::{self, LoraPair};
use crate::kernels::packed::TILE_ROWS;
use crate::kernels::spec::Activation;
use crate::request::NonLinearity;

/// Outputs in a tile of B.
const OUT_TILE: usize = TILE_ROWS;

/// Tensors begin at a multiple of so many values, 64 bytes: no vector load crosses a cache line.
const ALIGN: usize = 32;

/// An adapter as it is served. Immutable; a clone shares the tensors.
#[derive(Debug, Clone)]
pub struct PackedAdapter {
    /// By [`BaseShape::index`]; layers beyond the last adapted one are left out.
    places: Arc<[Option<Place>]>,
    values: Arc<Values>,
    rank: usize,
    changes_rows: bool,
    beside: BesidePlaces,
}

/// What an adapter has beside what it does at sites, but for the values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Beside {
    /// The form of virtual tokens, and their number.
    pub(super) virtual_tokens: Option<(VirtualForm, usize)>,
    /// How many tokens have rows of their own in the embedding, and in a head that is not the embedding.
    pub(super) tokens: [usize; 2],
}

impl Beside {
    fn of(adapter: &Adapter) -> Self {
        let count = |slot| adapter.tokens.get(&slot).map_or(0, |tokens| tokens.ids.len());
        let virtual_tokens = adapter.virtual_tokens.as_ref().map(|tokens| (tokens.form(), tokens.count));
        Self { virtual_tokens, tokens: [Slot::Embedding, Slot::Head].map(count) }
    }
}

/// Where that lies.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct BesidePlaces {
    pub(super) virtual_tokens: Option<VirtualPlace>,
    /// Of the embedding and of a head of its own.
    pub(super) tokens: [Option<TokenPlace>; 2],
    /// Whether the head has the embedding's rows.
    is_tied: bool,
}

/// Where the rows of some tokens lie.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TokenPlace {
    pub(super) count: usize,
    /// Sorted.
    ids: Range<usize>,
    rows: Range<usize>,
}

/// Where virtual tokens lie.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct VirtualPlace {
    pub(super) form: VirtualForm,
    pub(super) count: usize,
    range: Range<usize>,
}

/// What is multiplied, element by element, at a linear layer y = W x + b.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scales<'a> {
    /// x, `[in]`.
    Input(&'a [f32]),
    /// y, `[out]`.
    Output(&'a [f32]),
    /// y without b, the pair's product included, `[out]`: DoRA's magnitudes over the norms.
    Product(&'a [f32]),
}

/// Which of [`Scales`] a place has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ScaledPart {
    Input,
    Output,
    Product,
}

/// What is added to what comes out of a linear layer y = W x + b, `[out]`, element by element.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bias<'a> {
    /// Beside b.
    Beside(&'a [f32]),
    /// In the place of b.
    Instead(&'a [f32]),
}

/// Which of [`Bias`] a place has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BiasPart {
    Beside,
    Instead,
}

impl BiasPart {
    pub(super) const ALL: [Self; 2] = [Self::Beside, Self::Instead];
}

impl From<ScaledSide> for ScaledPart {
    fn from(side: ScaledSide) -> Self {
        match side {
            ScaledSide::Input => Self::Input,
            ScaledSide::Output => Self::Output,
        }
    }
}

impl ScaledPart {
    pub(super) const ALL: [Self; 3] = [Self::Input, Self::Output, Self::Product];

    fn len(self, (inputs, outputs): (usize, usize)) -> usize {
        if self == Self::Input { inputs } else { outputs }
    }
}

impl From<NonLinearity> for Activation {
    fn from(non_linearity: NonLinearity) -> Self {
        match non_linearity {
            NonLinearity::Silu => Self::Silu,
            NonLinearity::Gelu => Self::GeluTanh,
        }
    }
}

/// Where what belongs to one layer lies.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Place {
    /// 0 where there is no pair.
    pub(super) rank: usize,
    pub(super) scale: f32,
    a: Range<usize>,
    b: Range<usize>,
    pub(super) scaled: Option<(ScaledPart, Range<usize>)>,
    pub(super) bias: Option<(BiasPart, Range<usize>)>,
    /// The pair is down and up, and these are their biases.
    pub(super) bottleneck: Option<(NonLinearity, [Range<usize>; 2])>,
}

/// What lies in a place, but for the values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Layout {
    pub(super) rank: usize,
    pub(super) scale: f32,
    pub(super) scaled: Option<ScaledPart>,
    pub(super) bias: Option<BiasPart>,
    /// The pair is down and up, on what the layer gives.
    pub(super) bottleneck: Option<NonLinearity>,
}

impl Layout {
    /// Of A and B, a magnitude and a bias.
    pub(super) fn pair(rank: usize, scale: f32, magnitude: bool, bias: bool) -> Self {
        let (scaled, bias) = (magnitude.then_some(ScaledPart::Product), bias.then_some(BiasPart::Beside));
        Self { rank, scale, scaled, bias, bottleneck: None }
    }

    /// Of what (IA)3 multiplies with.
    pub(super) fn scales(side: ScaledSide) -> Self {
        Self { rank: 0, scale: 0.0, scaled: Some(side.into()), bias: None, bottleneck: None }
    }

    /// Of a bottleneck adapter.
    pub(super) fn bottleneck(size: usize, non_linearity: NonLinearity) -> Self {
        Self { rank: size, scale: 1.0, scaled: None, bias: None, bottleneck: Some(non_linearity) }
    }

    /// Of nothing but a bias of its own.
    fn bias() -> Self {
        Self { rank: 0, scale: 0.0, scaled: None, bias: Some(BiasPart::Instead), bottleneck: None }
    }

    /// The inputs and outputs of the pair, at a layer of (in, out).
    fn pair_dims(self, (inputs, outputs): (usize, usize)) -> (usize, usize) {
        (if self.bottleneck.is_some() { outputs } else { inputs }, outputs)
    }

    /// Of a layer in a form of so many times its rank.
    fn of(delta: &SiteDelta, times: usize) -> Self {
        match delta {
            SiteDelta::LowRank(LowRank { rank, scale, magnitude, bias, .. }) => {
                Self::pair(times * rank, *scale, magnitude.is_some(), bias.is_some())
            }
            SiteDelta::Scaled { side, .. } => Self::scales(*side),
            SiteDelta::Bottleneck(bottleneck) => Self::bottleneck(bottleneck.size(), bottleneck.non_linearity),
        }
    }
}

/// The tensors, from a multiple of 64 bytes on.
#[derive(Debug)]
pub(super) struct Values {
    /// With room to align.
    all: Vec<u16>,
    start: usize,
    len: usize,
}

impl Values {
    pub(super) fn zeros(len: usize) -> Self {
        let all = vec![0; len + ALIGN];
        let start = all.as_ptr().align_offset(2 * ALIGN).min(ALIGN);
        Self { all, start, len }
    }

    fn get(&self) -> &[u16] {
        &self.all[self.start..self.start + self.len]
    }

    pub(super) fn get_mut(&mut self) -> &mut [u16] {
        &mut self.all[self.start..self.start + self.len]
    }
}

/// What lies at sites that have biases in the place of the base's beside what else there is.
pub(super) fn with_biases(
    layouts: impl IntoIterator<Item = (Site, Layout)>,
    biases: impl IntoIterator<Item = Site>,
) -> BTreeMap<Site, Layout> {
    let mut all: BTreeMap<Site, Layout> = layouts.into_iter().collect();
    for site in biases {
        all.entry(site).or_insert_with(Layout::bias).bias = Some(BiasPart::Instead);
    }
    all
}

/// Lengths of A, of B, of the scales, of a bottleneck's biases and of the layer's own of a layer as they are packed.
fn lengths(layout: Layout, dims: (usize, usize)) -> [usize; 6] {
    let (inputs, outputs) = layout.pair_dims(dims);
    let scales = layout.scaled.map_or(0, |part| part.len(dims) * VALUES_OF_A_FLOAT);
    let biases = layout.bottleneck.map_or([0; 2], |_| [layout.rank, outputs].map(|len| len * VALUES_OF_A_FLOAT));
    let bias = layout.bias.map_or(0, |_| outputs * VALUES_OF_A_FLOAT);
    [inputs * layout.rank, outputs.next_multiple_of(OUT_TILE) * layout.rank, scales, biases[0], biases[1], bias]
}

/// Values of two bytes that a float32 takes.
const VALUES_OF_A_FLOAT: usize = 2;

/// Bytes that an adapter of these sites and virtual tokens takes when it is packed.
pub(super) fn adapter_bytes(sites: impl IntoIterator<Item = (Site, Layout)>, beside: Beside, shape: &BaseShape) -> u64 {
    let of_site = |(site, layout): (Site, Layout)| layer_bytes(layout, shape.dims(site.target).unwrap_or_default());
    let bytes = |len: usize| 2 * len.next_multiple_of(ALIGN) as u64;
    let virtual_tokens = beside.virtual_tokens.map_or(0, |tokens| bytes(virtual_length(tokens, shape)));
    let tokens = beside.tokens.iter().flat_map(|count| token_lengths(*count, shape)).map(bytes).sum::<u64>();
    sites.into_iter().map(of_site).sum::<u64>() + virtual_tokens + tokens
}

/// Values of two bytes that the ids of so many tokens take, and their rows.
fn token_lengths(count: usize, shape: &BaseShape) -> [usize; 2] {
    [count * VALUES_OF_A_FLOAT, count * shape.hidden_size * VALUES_OF_A_FLOAT]
}

/// Values of two bytes that virtual tokens take.
fn virtual_length((form, count): (VirtualForm, usize), shape: &BaseShape) -> usize {
    count * form.width(shape) * VALUES_OF_A_FLOAT
}

/// Bytes that a layer takes when it is packed.
fn layer_bytes(layout: Layout, dims: (usize, usize)) -> u64 {
    lengths(layout, dims).iter().map(|len| 2 * len.next_multiple_of(ALIGN) as u64).sum()
}

/// Bytes that an adapter takes in a form of so many times its rank.
fn form_bytes(adapter: &Adapter, shape: &BaseShape, times: usize) -> u64 {
    adapter_bytes(layouts(adapter, shape, times), Beside::of(adapter), shape)
}

/// What lies at each site of an adapter in a form of so many times its rank.
fn layouts(adapter: &Adapter, shape: &BaseShape, times: usize) -> BTreeMap<Site, Layout> {
    let layouts = adapter.sites.iter().map(|(site, delta)| (*site, Layout::of(delta, times)));
    with_biases(layouts, adapter.biases(shape).map(|(site, _)| site))
}

impl PackedAdapter {
    /// Packs an adapter that fits the base. `norms`: those that a DoRA's magnitudes are divided by, as `Model::row_norms` gives them.
    ///
    /// # Errors
    /// An internal one where something does not fit, or a norm is missing.
    pub fn new(adapter: &Adapter, shape: &BaseShape, norms: &RowNorms) -> Result<Self> {
        Self::in_form(adapter, shape, norms, 1, |pair| Cow::Borrowed(pair))
    }

    /// Packs each pair in a form of so many times its rank, one after the other.
    fn in_form(
        adapter: &Adapter,
        shape: &BaseShape,
        norms: &RowNorms,
        times: usize,
        form: impl Fn(&LowRank) -> Cow<'_, LowRank>,
    ) -> Result<Self> {
        if adapter.biases(shape).count() < adapter.copies.len() {
            return Err(Error::internal("copies of the base's tensors are another model, which is not served"));
        }
        let layers = layouts(adapter, shape, times);
        let (places, beside, len) = place(layers.into_iter(), Beside::of(adapter), shape).map_err(misfit)?;
        let mut values = Values::zeros(len);
        for (slot, place) in [Slot::Embedding, Slot::Head].iter().zip(&beside.tokens) {
            let (Some(tokens), Some(place)) = (adapter.tokens.get(slot), place) else { continue };
            put_tokens(tokens, place, values.get_mut())
                .ok_or_else(|| Error::internal("rows of tokens do not fit the base"))?;
        }
        if let (Some(tokens), Some(place)) = (&adapter.virtual_tokens, &beside.virtual_tokens) {
            put_floats(&tokens.folded(), place.range.clone(), values.get_mut())
                .ok_or_else(|| Error::internal("virtual tokens do not fit the base"))?;
        }
        let bias_place = |site: Site| Some(places.get(shape.index(site)?)?.as_ref()?.bias.clone()?.1);
        for (site, bias) in added_biases(adapter, shape) {
            let range = bias_place(site).ok_or_else(|| misfit(site))?;
            put_floats(&bias, range, values.get_mut()).ok_or_else(|| misfit(site))?;
        }
        for (site, delta) in &adapter.sites {
            let place = shape.index(*site).and_then(|at| places.get(at)?.as_ref());
            let (Some(place), Some(dims)) = (place, shape.dims(site.target)) else { return Err(misfit(*site)) };
            let packed = match delta {
                SiteDelta::LowRank(pair) => {
                    let scales = pair.magnitude.as_ref().map(|_| pair.row_scales(norms.get(site)?));
                    let form = form(pair);
                    pack(form.rank, [&form.a, &form.b], dims, place, values.get_mut()).and_then(|()| match scales {
                        Some(scales) => put_scales(&scales?, place, values.get_mut()),
                        None => Some(()),
                    })
                }
                SiteDelta::Scaled { values: scales, .. } => put_scales(scales, place, values.get_mut()),
                SiteDelta::Bottleneck(bottleneck) => pack_bottleneck(bottleneck, dims.1, place, values.get_mut()),
            };
            packed.ok_or_else(|| misfit(*site))?;
        }
        Ok(Self::of(places, beside, values))
    }

    pub(super) fn of(places: Vec<Option<Place>>, beside: BesidePlaces, values: Values) -> Self {
        let pairs = places.iter().flatten().filter(|place| place.bottleneck.is_none());
        let rank = pairs.map(|place| place.rank).max().unwrap_or_default();
        let changes = |place: &Place| place.scaled.is_some() || place.bias.is_some() || place.bottleneck.is_some();
        let has_tokens = beside.tokens.iter().any(Option::is_some);
        let changes_rows = has_tokens || places.iter().flatten().any(changes);
        Self { places: places.into(), values: Arc::new(values), rank, changes_rows, beside }
    }

    /// Returns how many tokens it puts before a sequence.
    pub fn virtual_count(&self) -> usize {
        self.beside.virtual_tokens.as_ref().map_or(0, |tokens| tokens.count)
    }

    /// The row of a token that takes the place of its embedding, `[hidden_size]`, before it is scaled.
    pub fn embedding(&self, id: u32) -> Option<&[f32]> {
        let (ids, mut rows) = self.token_rows(self.beside.tokens[0].as_ref()?);
        rows.nth(ids.binary_search(&id).ok()?)
    }

    /// The tokens whose rows of the head have others in their place, and those, `[hidden_size]` each.
    pub fn head_rows(&self) -> impl Iterator<Item = (u32, &[f32])> {
        let place = self.beside.tokens[usize::from(!self.beside.is_tied)].as_ref();
        let rows = place.map(|place| self.token_rows(place));
        rows.into_iter().flat_map(|(ids, rows)| ids.iter().copied().zip(rows))
    }

    /// The ids of each table's tokens.
    pub(super) fn token_ids(&self) -> impl Iterator<Item = &[u32]> {
        self.beside.tokens.iter().flatten().map(|place| self.token_rows(place).0)
    }

    fn token_rows(&self, place: &TokenPlace) -> (&[u32], std::slice::ChunksExact<'_, f32>) {
        let values = self.values.get();
        let rows: &[f32] = bytemuck::cast_slice(&values[place.rows.clone()]);
        (bytemuck::cast_slice(&values[place.ids.clone()]), rows.chunks_exact(rows.len() / place.count))
    }

    /// The embedding of a virtual token, `[hidden_size]`; `None` where it has keys and values instead.
    pub fn virtual_embedding(&self, token: usize) -> Option<&[f32]> {
        self.virtual_values(VirtualForm::Embeddings, token)
    }

    /// The keys, as attention reads them, and the values of a virtual token in a layer, `[kv_width]` each; `None` where it has an embedding
    /// instead.
    pub fn virtual_kv(&self, token: usize, layer: usize, kv_width: usize) -> Option<(&[f32], &[f32])> {
        let values = self.virtual_values(VirtualForm::KeysAndValues, token)?;
        values.chunks_exact(2 * kv_width).nth(layer).map(|both| both.split_at(kv_width))
    }

    fn virtual_values(&self, form: VirtualForm, token: usize) -> Option<&[f32]> {
        let place = self.beside.virtual_tokens.as_ref().filter(|place| place.form == form)?;
        let values: &[f32] = bytemuck::cast_slice(&self.values.get()[place.range.clone()]);
        values.chunks_exact(values.len() / place.count).nth(token)
    }

    pub(super) fn beside(&self) -> &BesidePlaces {
        &self.beside
    }

    /// What is to be added at the site of this number; `None` where nothing is.
    pub fn pair(&self, site: SiteId) -> Option<LoraPair<'_>> {
        let place = self.places.get(site)?.as_ref().filter(|place| place.rank > 0 && place.bottleneck.is_none())?;
        Some(self.pair_of(place))
    }

    fn pair_of(&self, place: &Place) -> LoraPair<'_> {
        let values = self.values.get();
        let (a, b) = (&values[place.a.clone()], &values[place.b.clone()]);
        LoraPair { rank: place.rank, scale: place.scale, a, b }
    }

    /// What the outputs go through at the site of this number; `None` where there is nothing.
    pub fn bottleneck(&self, site: SiteId) -> Option<cpu::Bottleneck<'_>> {
        let place = self.places.get(site)?.as_ref()?;
        let (non_linearity, biases) = place.bottleneck.as_ref()?;
        let [down_bias, up_bias] =
            biases.each_ref().map(|range| bytemuck::cast_slice(&self.values.get()[range.clone()]));
        let activation = (*non_linearity).into();
        Some(cpu::Bottleneck { pair: self.pair_of(place), down_bias, up_bias, activation })
    }

    /// What is to be multiplied at the site of this number; `None` where nothing is.
    pub fn scales(&self, site: SiteId) -> Option<Scales<'_>> {
        let (part, range) = self.places.get(site)?.as_ref()?.scaled.clone()?;
        let scales = bytemuck::cast_slice(&self.values.get()[range]);
        Some(match part {
            ScaledPart::Input => Scales::Input(scales),
            ScaledPart::Output => Scales::Output(scales),
            ScaledPart::Product => Scales::Product(scales),
        })
    }

    /// What is to be added to what comes out at the site of this number; `None` where nothing is.
    pub fn bias(&self, site: SiteId) -> Option<Bias<'_>> {
        let (part, range) = self.places.get(site)?.as_ref()?.bias.clone()?;
        let bias = bytemuck::cast_slice(&self.values.get()[range]);
        Some(match part {
            BiasPart::Beside => Bias::Beside(bias),
            BiasPart::Instead => Bias::Instead(bias),
        })
    }

    /// Returns whether it does anything anywhere but to add a product: multiplies, adds a bias, puts a bottleneck behind a layer, or has tokens of
    /// its own.
    pub fn changes_rows(&self) -> bool {
        self.changes_rows
    }

    /// Packs an adapter in twice the bits. A value x is held as hi + lo, hi its nearest bf16 and lo that of what is left: A = Ah + Al and
    /// B = Bh + Bl, and of B A all is kept but Bl Al, a part in 2^18. Bh Ah + Bh Al + Bl Ah is the product of [Bh Bh Bl] and
    /// [Ah; Al; Ah], an adapter of three times the rank whose values are bf16. For adapters whose product is small beside its factors, such as
    /// those made from differences of large ones (PiSSA converted to plain LoRA).
    ///
    /// # Errors
    /// As of [`PackedAdapter::new`].
    pub fn precise(adapter: &Adapter, shape: &BaseShape, norms: &RowNorms) -> Result<Self> {
        Self::in_form(adapter, shape, norms, PRECISE_TIMES, |pair| Cow::Owned(in_two_parts(pair)))
    }

    /// Returns the bytes that [`PackedAdapter::precise`] takes.
    pub fn precise_bytes(adapter: &Adapter, shape: &BaseShape) -> u64 {
        form_bytes(adapter, shape, PRECISE_TIMES)
    }

    /// Whether packing an adapter in bf16 changes any of its values.
    pub fn rounds(adapter: &Adapter) -> bool {
        let rounds = |values: &[f32]| values.iter().any(|x| x.to_bits() & 0xffff != 0);
        adapter.pairs().any(|(_, pair)| rounds(&pair.a) || rounds(&pair.b))
    }

    /// Packs an adapter in the form that has so many bytes: as it was published.
    ///
    /// # Errors
    /// As of [`PackedAdapter::new`].
    pub fn of_size(adapter: &Adapter, shape: &BaseShape, norms: &RowNorms, bytes: u64) -> Result<Self> {
        match form_bytes(adapter, shape, 1) == bytes {
            true => Self::new(adapter, shape, norms),
            false => Self::precise(adapter, shape, norms),
        }
    }

    pub(super) fn places(&self) -> &[Option<Place>] {
        &self.places
    }

    pub(super) fn values(&self) -> &[u16] {
        self.values.get()
    }

    /// The largest of its pairs.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Bytes of the tensors.
    pub fn byte_size(&self) -> u64 {
        2 * self.values.len as u64
    }
}

fn misfit(site: Site) -> Error {
    Error::internal(format!("an adapter does not fit the base at {site:?}"))
}

/// Places for layers and for what is beside them, and the length of all.
type Places = (Vec<Option<Place>>, BesidePlaces, usize);

/// Gives each layer its place, and what is beside them its own. Fails with a site that the base does not have.
pub(super) fn place(
    layers: impl Iterator<Item = (Site, Layout)>,
    beside: Beside,
    shape: &BaseShape,
) -> Result<Places, Site> {
    let (mut places, mut end) = (Vec::new(), 0);
    for (site, layout) in layers {
        let (Some(at), Some(dims)) = (shape.index(site), shape.dims(site.target)) else { return Err(site) };
        let [a, b, scales, down_bias, up_bias, of_layer] = lengths(layout, dims).map(|len| {
            let start = end;
            end += len.next_multiple_of(ALIGN);
            start..start + len
        });
        if places.len() <= at {
            places.resize(at + 1, None);
        }
        let Layout { rank, scale, scaled, bias, bottleneck } = layout;
        let (scaled, bias) = (scaled.map(|part| (part, scales)), bias.map(|part| (part, of_layer)));
        let bottleneck = bottleneck.map(|non_linearity| (non_linearity, [down_bias, up_bias]));
        places[at] = Some(Place { rank, scale, a, b, scaled, bias, bottleneck });
    }
    let mut next = |len: usize| {
        let start = end;
        end += len.next_multiple_of(ALIGN);
        start..start + len
    };
    let virtual_tokens = beside.virtual_tokens.map(|(form, count)| {
        let range = next(virtual_length((form, count), shape));
        VirtualPlace { form, count, range }
    });
    let tokens = beside.tokens.map(|count| {
        let [ids, rows] = token_lengths(count, shape).map(&mut next);
        (count > 0).then_some(TokenPlace { count, ids, rows })
    });
    Ok((places, BesidePlaces { virtual_tokens, tokens, is_tied: !shape.own_head }, end))
}

/// Writes the rows of tokens into their place, by their ids; `None` where they do not fit.
fn put_tokens(tokens: &TokenRows, place: &TokenPlace, values: &mut [u16]) -> Option<()> {
    let mut ids = tokens.ids.clone();
    ids.sort_unstable();
    let rows: Option<Vec<&[f32]>> = ids.iter().map(|id| tokens.row(*id)).collect();
    bytemuck::cast_slice_mut(values.get_mut(place.ids.clone())?).copy_from_slice(&ids);
    put_floats(&rows?.concat(), place.rows.clone(), values)
}

/// What is added to the outputs of each site that has a bias: its own in the place of the base's, that of its pair, or both.
fn added_biases(adapter: &Adapter, shape: &BaseShape) -> BTreeMap<Site, Vec<f32>> {
    let mut all: BTreeMap<Site, Vec<f32>> = adapter.biases(shape).map(|(site, bias)| (site, bias.to_vec())).collect();
    for (site, pair) in adapter.pairs() {
        let Some(bias) = &pair.bias else { continue };
        let all = all.entry(site).or_insert_with(|| vec![0.0; bias.len()]);
        all.iter_mut().zip(bias).for_each(|(all, bias)| *all += pair.scale * bias);
    }
    all
}

/// Writes scales into their place; `None` where they do not fit.
fn put_scales(scales: &[f32], place: &Place, values: &mut [u16]) -> Option<()> {
    put_floats(scales, place.scaled.clone()?.1, values)
}

/// Writes float32 values; `None` where they do not fit.
fn put_floats(floats: &[f32], range: Range<usize>, values: &mut [u16]) -> Option<()> {
    let to: &mut [f32] = bytemuck::cast_slice_mut(values.get_mut(range)?);
    (to.len() == floats.len()).then(|| to.copy_from_slice(floats))
}

/// Writes a bottleneck of so many outputs into its place; `None` where it does not fit.
fn pack_bottleneck(bottleneck: &Bottleneck, outputs: usize, place: &Place, values: &mut [u16]) -> Option<()> {
    let (_, [down_bias, up_bias]) = place.bottleneck.clone()?;
    put_floats(&bottleneck.down_bias, down_bias, values)?;
    put_floats(&bottleneck.up_bias, up_bias, values)?;
    pack(bottleneck.size(), [&bottleneck.down, &bottleneck.up], (outputs, outputs), place, values)
}

/// Writes A and B into their place; `None` where they do not fit.
fn pack(
    rank: usize,
    [a, b]: [&[f32]; 2],
    (inputs, outputs): (usize, usize),
    place: &Place,
    values: &mut [u16],
) -> Option<()> {
    if rank == 0 || a.len() != rank * inputs || b.len() != outputs * rank {
        return None;
    }
    values.get_mut(place.a.clone())?.iter_mut().zip(a).for_each(|(to, from)| *to = round(*from));
    let tiles = values.get_mut(place.b.clone())?.chunks_exact_mut(rank * OUT_TILE);
    for (rows, tile) in b.chunks(OUT_TILE * rank).zip(tiles) {
        transpose(rows, rank, tile, OUT_TILE);
    }
    Some(())
}

/// How many times the rank twice the bits take.
const PRECISE_TIMES: usize = 3;

/// The layer of three times the rank that holds hi and lo of each value, see [`PackedAdapter::precise`].
fn in_two_parts(layer: &LowRank) -> LowRank {
    let high = |x: &f32| f32::from_bits(u32::from(round(*x)) << 16);
    let low = |x: &f32| x - high(x);
    let rank = layer.rank;
    let part = |f: &dyn Fn(&f32) -> f32| layer.a.iter().map(f).collect::<Vec<f32>>();
    let a = [part(&high), part(&low), part(&high)].concat();
    let rows = layer.b.chunks_exact(rank.max(1));
    let b = rows
        .flat_map(|row| [row.iter().map(high), row.iter().map(high)].into_iter().flatten().chain(row.iter().map(low)));
    LowRank { rank: PRECISE_TIMES * rank, b: b.collect(), a, magnitude: None, bias: None, ..*layer }
}

/// Rows and columns that are transposed at a time: they fit the first-level cache, and the compiler keeps them in registers.
const BLOCK: usize = 8;

/// Rounds rows of `cols` values and writes them as columns: `to[col][row]`, `width` apart.
fn transpose(from: &[f32], cols: usize, to: &mut [u16], width: usize) {
    let rows = from.len() / cols;
    for row in (0..rows).step_by(BLOCK) {
        for col in (0..cols).step_by(BLOCK) {
            if row + BLOCK <= rows && col + BLOCK <= cols {
                let mut block = [[0; BLOCK]; BLOCK];
                for (i, line) in block.iter_mut().enumerate() {
                    let from = &from[(row + i) * cols + col..][..BLOCK];
                    line.iter_mut().zip(from).for_each(|(to, from)| *to = round(*from));
                }
                for (j, to) in to[col * width..].chunks_mut(width).take(BLOCK).enumerate() {
                    to[row..row + BLOCK].iter_mut().zip(&block).for_each(|(to, line)| *to = line[j]);
                }
            } else {
                for i in row..rows.min(row + BLOCK) {
                    (col..cols.min(col + BLOCK)).for_each(|j| to[j * width + i] = round(from[i * cols + j]));
                }
            }
        }
    }
}

/// The nearest bf16, ties to even; NaN stays NaN. Written without a branch, for the compiler to take eight at a time.
fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    // Rounding could carry a NaN over into another number.
    let quiet = bits | 0x0040_0000;
    (if x.is_nan() { quiet } else { nearest } >> 16) as u16
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;
    use crate::ids::Digest;
    use crate::request::{Ia3Spec, LoraSpec, TunerSpec};

    fn shape() -> BaseShape {
        let dims = [(8, 8), (8, 20), (24, 4), (9, 17), (8, 16), (31, 33), (16, 8)];
        BaseShape::llama("base", Digest::of(b""), 3, dims)
    }

    /// Values of any kind, a function of the seed.
    fn values(len: usize, seed: u64) -> Vec<f32> {
        let special = [0.0, -0.0, f32::MAX, f32::INFINITY, f32::NAN, 1e-40, f32::from_bits(0x7f80_0001)];
        let value = |i: u64| {
            let x = (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_mul(seed | 1) >> 32;
            if x.is_multiple_of(17) { special[(x / 17) as usize % special.len()] } else { f32::from_bits(x as u32) }
        };
        (0..len as u64).map(value).collect()
    }

    /// A and B in the order of [`LowRank`], and all padding.
    fn unpack(layer: LoraPair<'_>, outputs: usize) -> (Vec<u16>, Vec<u16>, Vec<u16>) {
        let (mut b, mut padding) = (vec![0; outputs * layer.rank], Vec::new());
        for (at, value) in layer.b.iter().enumerate() {
            let output = at / (layer.rank * OUT_TILE) * OUT_TILE + at % OUT_TILE;
            let rank = at / OUT_TILE % layer.rank;
            if output < outputs { b[output * layer.rank + rank] = *value } else { padding.push(*value) }
        }
        (layer.a.to_vec(), b, padding)
    }

    fn rounded(values: &[f32]) -> Vec<u16> {
        values.iter().map(|x| bf16::from_f32(*x).to_bits()).collect()
    }

    proptest! {
        #[test]
        fn packing_rounds_and_moves_and_no_more(sites in prop::collection::btree_map((0..3_u32, 0..7_usize), 1..20_usize, 1..8), seed: u64) {
            let shape = shape();
            let layer = |(i, (&(layer, target), &rank)): (usize, (&(u32, usize), &usize))| {
                let site = Site { layer, target: shape.linears[target].target };
                let (inputs, outputs) = shape.dims(site.target).unwrap();
                let (a, b) = (values(rank * inputs, seed ^ i as u64), values(outputs * rank, !seed ^ i as u64));
                (site, LowRank { rank, alpha: 1.0, scale: 0.3 + i as f32, a, b, magnitude: None, bias: None })
            };
            let adapter = Adapter::lora(LoraSpec::default(), sites.iter().enumerate().map(layer));
            let packed = PackedAdapter::new(&adapter, &shape, &RowNorms::new()).unwrap();
            prop_assert!(packed.pair(shape.sites().count()).is_none());
            for (id, site) in shape.sites().enumerate() {
                let (Some(layer), Some(found)) = (adapter.pair(site), packed.pair(id)) else {
                    prop_assert_eq!(adapter.pair(site).is_some(), packed.pair(id).is_some());
                    continue;
                };
                prop_assert_eq!((found.rank, found.scale), (layer.rank, layer.scale));
                let (a, b, padding) = unpack(found, shape.dims(site.target).unwrap().1);
                prop_assert_eq!((a, b), (rounded(&layer.a), rounded(&layer.b)));
                prop_assert!(padding.iter().all(|x| *x == 0));
                prop_assert!([found.a, found.b].iter().all(|tensor| tensor.as_ptr().addr() % 64 == 0));
            }
            let ranks = adapter.sites.iter().map(|(site, delta)| (Layout::of(delta, 1), shape.dims(site.target).unwrap())).map(|(layout, dims)| (layout.rank, layer_bytes(layout, dims)));
            let (ranks, bytes): (Vec<_>, Vec<_>) = ranks.unzip();
            prop_assert_eq!((packed.rank(), packed.byte_size()), (*ranks.iter().max().unwrap(), bytes.iter().sum::<u64>()));
        }

        #[test]
        fn rounding_is_that_of_bf16(bits: u32) {
            let x = f32::from_bits(bits);
            prop_assert_eq!(round(x), bf16::from_f32(x).to_bits());
        }
    }

    /// The rounded values in PEFT's order.
    fn rounded_pairs(packed: &PackedAdapter, shape: &BaseShape) -> Adapter {
        let value = |bits: u16| f32::from_bits(u32::from(bits) << 16);
        let pairs = shape.sites().enumerate().filter_map(|(at, site)| {
            let LoraPair { rank, scale, a, b } = packed.pair(at)?;
            let a = a.iter().map(|bits| value(*bits)).collect();
            let of = |i: usize| (i / rank / OUT_TILE * rank + i % rank) * OUT_TILE + i / rank % OUT_TILE;
            let b = (0..b.len()).map(|i| value(b[of(i)])).collect();
            Some((site, LowRank { rank, alpha: scale, scale, a, b, magnitude: None, bias: None }))
        });
        Adapter::lora(LoraSpec::default(), pairs)
    }

    /// What is added lies beside the pairs, in float32: a pair's bias times its scale, what takes the place of the base's, and both as one.
    #[test]
    fn biases_are_packed_as_what_is_added() {
        use crate::request::Target::{KProj, QProj, VProj};
        let mut shape = shape();
        let site = |target| Site { layer: 0, target };
        shape.biased = [QProj, KProj, VProj].map(site).into();
        let spec =
            LoraSpec { rank: 2, alpha: 6.0, targets: vec![QProj, VProj], lora_bias: true, ..LoraSpec::default() };
        let mut adapter = Adapter::fresh(&spec, &shape, 1).unwrap();
        assert_eq!(
            PackedAdapter::new(&adapter, &shape, &RowNorms::new()).unwrap().byte_size(),
            TunerSpec::from(spec).memory_bytes(&shape).unwrap()
        );
        adapter.pairs_mut().for_each(|(_, pair)| pair.bias.iter_mut().flatten().for_each(|x| *x = 0.5));
        for (target, len) in [(QProj, 8), (KProj, 20)] {
            adapter.copies.insert(Slot::Bias(shape.index(site(target)).unwrap()), vec![-1.0; len]);
        }
        let packed = PackedAdapter::new(&adapter, &shape, &RowNorms::new()).unwrap();
        assert!(packed.changes_rows());
        let bias = |layer, target| packed.bias(shape.index(Site { layer, target }).unwrap());
        assert_eq!(bias(0, QProj), Some(Bias::Instead(&[0.5; 8])));
        assert_eq!(bias(0, KProj), Some(Bias::Instead(&[-1.0; 20])));
        assert_eq!(bias(0, VProj), Some(Bias::Beside(&[1.5; 4])));
        assert_eq!((bias(1, QProj), bias(1, KProj)), (Some(Bias::Beside(&[1.5; 8])), None));
        adapter.copies.insert(Slot::Embedding, vec![0.0]);
        assert!(PackedAdapter::new(&adapter, &shape, &RowNorms::new()).is_err(), "another copy than of a bias");
    }

    /// Rows of tokens lie behind the layers by their ids, whatever order they came in; a head that is the embedding has those too.
    #[test]
    fn rows_of_tokens_are_packed_by_their_ids() {
        let mut shape = shape();
        let spec = LoraSpec { rank: 2, trainable_token_indices: vec![9, 2, 30], ..LoraSpec::default() };
        let mut adapter = Adapter::fresh(&spec, &shape, 1).unwrap();
        let own = adapter.tokens.get_mut(&Slot::Embedding).unwrap();
        own.rows.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
        let packed = PackedAdapter::new(&adapter, &shape, &RowNorms::new()).unwrap();
        assert!(packed.changes_rows());
        assert_eq!(packed.byte_size(), TunerSpec::from(spec).memory_bytes(&shape).unwrap());
        let row = |from: usize| (from * 8..from * 8 + 8).map(|x| x as f32).collect::<Vec<_>>();
        assert_eq!((packed.embedding(2), packed.embedding(3)), (Some(&row(1)[..]), None));
        let head: Vec<_> = packed.head_rows().collect();
        assert_eq!(head, [(2, &row(1)[..]), (9, &row(0)), (30, &row(2))]);
        shape.own_head = true;
        let packed = PackedAdapter::new(&adapter, &shape, &RowNorms::new()).unwrap();
        assert_eq!((packed.embedding(9), packed.head_rows().count()), (Some(&row(0)[..]), 0));
        adapter.tokens.insert(Slot::Head, TokenRows { ids: vec![7], rows: row(5) });
        let packed = PackedAdapter::new(&adapter, &shape, &RowNorms::new()).unwrap();
        assert_eq!(packed.head_rows().collect::<Vec<_>>(), [(7, &row(5)[..])]);
        assert_eq!(packed.embedding(7), None);
    }

    /// What is scaled lies beside the pairs, in float32; a DoRA's magnitudes are divided by the norms of the base's rows.
    #[test]
    fn scales_are_packed_as_they_are() {
        let (shape, norms) = (shape(), RowNorms::new());
        let mut scales = Adapter::fresh(&Ia3Spec::default(), &shape, 1).unwrap();
        scales.tensors_mut().flatten().enumerate().for_each(|(i, x)| *x = 1.0 + i as f32 / 1000.0);
        let packed = PackedAdapter::new(&scales, &shape, &norms).unwrap();
        assert!(packed.changes_rows() && packed.rank() == 0);
        for (id, site) in shape.sites().enumerate() {
            let want = match scales.sites.get(&site) {
                Some(SiteDelta::Scaled { side: ScaledSide::Input, values }) => Some(Scales::Input(values)),
                Some(SiteDelta::Scaled { side: ScaledSide::Output, values }) => Some(Scales::Output(values)),
                _ => None,
            };
            assert_eq!((packed.scales(id), packed.pair(id)), (want, None));
        }
        let spec = LoraSpec { rank: 3, use_dora: true, ..LoraSpec::default() };
        let mut dora = Adapter::fresh(&spec, &shape, 1).unwrap();
        assert!(PackedAdapter::new(&dora, &shape, &norms).is_err(), "without norms");
        let norms: RowNorms = dora.pairs().map(|(site, pair)| (site, vec![0.5; pair.b.len() / 3])).collect();
        dora.set_magnitudes(&norms);
        let packed = PackedAdapter::new(&dora, &shape, &norms).unwrap();
        let of_first = packed.scales(0).unwrap();
        assert_eq!((of_first, packed.pair(0).unwrap().rank), (Scales::Product(&[1.0; 8]), 3));
        assert_eq!(packed.byte_size(), TunerSpec::from(spec).memory_bytes(&shape).unwrap());
    }

    /// Where B A is a small difference of large products, bf16 loses it and two parts keep it.
    #[test]
    fn twice_the_bits_keep_what_cancels() {
        let shape = shape();
        let site = Site { layer: 1, target: crate::request::Target::UpProj };
        let (inputs, outputs) = shape.dims(site.target).unwrap();
        let wave = |i: usize, by: f32| (i as f32 * by).sin();
        // Two ranks that cancel but for a thousandth.
        let a = (0..2 * inputs).map(|i| wave(i % inputs, 0.7) * 5.0).collect::<Vec<_>>();
        let b = |o: usize| [wave(o, 0.3) * 5.0, -wave(o, 0.3) * 5.0 + 0.005 * wave(o, 1.1)];
        let b = (0..outputs).flat_map(b).collect();
        let layer = LowRank { rank: 2, alpha: 2.0, scale: 0.7, a, b, magnitude: None, bias: None };
        let adapter = Adapter::lora(LoraSpec::default(), [(site, layer)]);
        let product = |adapter: &Adapter| -> Vec<f64> {
            let layer = adapter.pair(site).unwrap();
            let at = |o: usize, i: usize, k: usize| {
                f64::from(layer.b[o * layer.rank + k]) * f64::from(layer.a[k * inputs + i])
            };
            let cell = |cell: usize| (0..layer.rank).map(|k| at(cell / inputs, cell % inputs, k)).sum();
            (0..outputs * inputs).map(cell).collect()
        };
        let wanted = product(&adapter);
        let error = |packed: &PackedAdapter| {
            let found = product(&rounded_pairs(packed, &shape));
            let size: f64 = wanted.iter().map(|x| x.abs()).sum();
            found.iter().zip(&wanted).map(|(x, y)| (x - y).abs()).sum::<f64>() / size
        };
        let (plain, precise) = (
            PackedAdapter::new(&adapter, &shape, &RowNorms::new()).unwrap(),
            PackedAdapter::precise(&adapter, &shape, &RowNorms::new()).unwrap(),
        );
        assert!(error(&plain) > 0.5, "{}", error(&plain));
        assert!(error(&precise) < 0.01, "{}", error(&precise));
        assert_eq!((plain.rank(), precise.rank()), (2, 6));
        for form in [plain, precise] {
            let again = PackedAdapter::of_size(&adapter, &shape, &RowNorms::new(), form.byte_size()).unwrap();
            let id = shape.index(site).unwrap();
            assert_eq!(again.pair(id), form.pair(id), "it is made again as it was");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let shape = shape();
        let adapter = Adapter::fresh(&LoraSpec { rank: 2, ..LoraSpec::default() }, &shape, 1).unwrap();
        let mut short = adapter.clone();
        short.pairs_mut().map(|(_, pair)| pair).for_each(|layer| layer.a.truncate(1));
        assert!(PackedAdapter::new(&short, &shape, &RowNorms::new()).is_err());
        assert!(PackedAdapter::new(&adapter, &shape, &RowNorms::new()).is_ok());
    }
}
