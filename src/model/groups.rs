//! Which layers share the pages of the KV cache, and from where on a row reads them.
//!
//! All pages have the same size, so that one pool serves all layers: a page holds a block of positions of a group of layers, and a sequence
//! has a page of each group for a block. The layers of a group see equally far back, so that a page that no row can see any more is free
//! for all groups. (vLLM's hybrid KV cache manager has the same layout.)

use std::sync::Arc;

use crate::arch::config::LayerConfig;

/// What is read begins at a multiple of so many positions, the kernels' span.
const SPAN: usize = 64;

/// Groups may leave one in so many of a pool's bytes unused, where they have fewer layers than a page has room for.
const MOST_UNUSED: usize = 8;

/// Groups must spare one in so many of a long sequence's bytes, else all layers are one group.
const LEAST_SPARED: usize = 8;

/// Returns the first position that rows at `position` and later ones may read, of layers with this window.
pub fn first_read(window: Option<usize>, position: usize) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window) / SPAN * SPAN)
}

/// Returns how many positions before its own a row may read at most, with this window.
pub fn most_read_before(window: usize) -> usize {
    window - 1 + SPAN - 1
}

/// The groups of a model's layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvGroups {
    /// Layers that a page has room for.
    pub layers_per_page: usize,
    /// Of each group, how many positions a row sees, its own included; `None` is all before it.
    pub windows: Arc<[Option<usize>]>,
    /// Of each layer.
    places: Vec<KvPlace>,
}

/// Where a layer's keys and values are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvPlace {
    /// Its group.
    pub group: usize,
    /// Its number within the group's pages.
    pub slot: usize,
}

/// Layers that see equally far.
type Kind = (Option<usize>, Vec<usize>);

impl KvGroups {
    /// Returns one group of all layers, of which nothing is given back.
    pub fn whole(layers: usize) -> Self {
        Self::new(layers, layers, &[(None, (0..layers).collect())])
    }

    /// Returns the groups by how far layers see in a context of so many tokens: few groups that waste little and spare much, else one.
    pub fn by_window(layers: &[LayerConfig], context: usize) -> Self {
        let mut kinds: Vec<Kind> = Vec::new();
        for (layer, config) in layers.iter().enumerate() {
            let window = config.window.filter(|window| *window < context);
            match kinds.iter_mut().find(|kind| kind.0 == window) {
                Some(kind) => kind.1.push(layer),
                None => kinds.push((window, vec![layer])),
            }
        }
        let all = layers.len();
        let wastes_little = |size: &usize| {
            [1, context].iter().all(|tokens| {
                held(&kinds, *size, *tokens) * MOST_UNUSED <= held(&kinds, 1, *tokens) * (MOST_UNUSED + 1)
            })
        };
        let groups = |size: usize| kinds.iter().map(|kind| kind.1.len().div_ceil(size)).sum::<usize>();
        let size =
            (1..=all).filter(wastes_little).min_by_key(|size| (groups(*size), held(&kinds, *size, 1))).unwrap_or(1);
        let whole = all * context;
        if kinds.len() > 1 && held(&kinds, size, context) > whole - whole / LEAST_SPARED {
            return Self::whole(all);
        }
        Self::new(all, size, &kinds)
    }

    fn new(layers: usize, layers_per_page: usize, kinds: &[Kind]) -> Self {
        let mut windows = Vec::new();
        let mut places = vec![KvPlace { group: 0, slot: 0 }; layers];
        for (window, of) in kinds {
            for group in of.chunks(layers_per_page.max(1)) {
                group
                    .iter()
                    .enumerate()
                    .for_each(|(slot, layer)| places[*layer] = KvPlace { group: windows.len(), slot });
                windows.push(*window);
            }
        }
        Self { layers_per_page, windows: windows.into(), places }
    }

    /// Returns how many groups there are.
    pub fn count(&self) -> usize {
        self.windows.len()
    }

    /// Returns where a layer's keys and values are.
    pub fn place(&self, layer: usize) -> KvPlace {
        self.places[layer]
    }
}

/// Positions times layers that a sequence of so many tokens holds, in groups of `size` layers.
fn held(kinds: &[Kind], size: usize, tokens: usize) -> usize {
    let of_kind =
        |(window, of): &Kind| of.len().div_ceil(size) * size * window.map_or(tokens, |window| window.min(tokens));
    kinds.iter().map(of_kind).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(count: usize, window: usize, context: usize, windowed: impl Fn(usize) -> bool) -> KvGroups {
        let layer = |i| LayerConfig { rope: None, window: windowed(i).then_some(window) };
        KvGroups::by_window(&(0..count).map(layer).collect::<Vec<_>>(), context)
    }

    /// Layers of a page, groups that see all, and groups with a window.
    fn shape(groups: &KvGroups) -> (usize, usize, usize) {
        let windowed = groups.windows.iter().flatten().count();
        (groups.layers_per_page, groups.count() - windowed, windowed)
    }

    #[test]
    fn layers_that_see_equally_far_share_pages() {
        assert_eq!(shape(&groups(26, 4096, 8192, |i| i % 2 == 0)), (13, 1, 1), "Gemma 2 2B");
        assert_eq!(shape(&groups(18, 512, 32_768, |i| i % 6 != 5)), (3, 1, 5), "Gemma 3 270M");
        assert_eq!(
            shape(&groups(26, 512, 32_768, |i| i % 6 != 5)),
            (4, 1, 6),
            "Gemma 3 1B, the last group with two layers"
        );
        assert_eq!(shape(&groups(34, 1024, 131_072, |i| i % 6 != 5)), (5, 1, 6), "Gemma 3 4B");
        assert_eq!(shape(&groups(32, 2048, 4096, |_| true)), (32, 0, 1), "one window for all");
    }

    #[test]
    fn where_nothing_is_to_be_spared_all_layers_are_one_group() {
        let whole = |layers| KvGroups::whole(layers);
        assert_eq!(groups(30, 512, 8192, |_| false), whole(30));
        assert_eq!(groups(26, 4096, 4096, |i| i % 2 == 0), whole(26), "a window that shows the whole context");
        assert_eq!(groups(28, 512, 8192, |i| i == 3), whole(28), "a single layer with a window");
        assert_eq!(groups(28, 3900, 4096, |i| i % 2 == 0), whole(28), "a window of nearly the whole context");
    }

    #[test]
    fn every_layer_has_a_place_of_its_own_in_a_group_that_sees_as_far() {
        for (count, every) in [(1, 2), (7, 3), (26, 6), (12, 4)] {
            let groups = groups(count, 64, 4096, |i| i % every != every - 1);
            let mut seen = std::collections::HashSet::new();
            for layer in 0..count {
                let place = groups.place(layer);
                assert!(place.slot < groups.layers_per_page && seen.insert((place.group, place.slot)));
                assert_eq!(groups.windows[place.group], (layer % every != every - 1).then_some(64));
            }
        }
    }

    #[test]
    fn what_is_read_begins_with_the_span_of_the_first_position_seen() {
        assert_eq!([62, 94, 95, 159].map(|position| first_read(Some(32), position)), [0, 0, 64, 128]);
        assert_eq!(first_read(None, 1000), 0);
        for (window, position) in (1..200).flat_map(|window| (0..400).map(move |position| (window, position))) {
            assert!(position - first_read(Some(window), position) <= most_read_before(window));
        }
    }
}
