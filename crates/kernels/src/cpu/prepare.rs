//! The making of a frozen layer's input, fused: a row is produced (normed, gated, or there already), quantised, and
//! shrunk by its adapter while it lies in the cache.

use super::Shared;
use super::lora::{Adapters, RowGroup, shrink};
use super::quantize::QuantizedRows;
use super::simd::Level;
use super::team::Team;

/// For each row of the groups, which are all rows of `x`, `[rows, width]`: `produce(row, x)`, then x quantised, then
/// shrunk for each layer of the adapters into `[layers, rows, rank]`.
pub fn prepare(
    team: &Team,
    groups: &[RowGroup],
    (x, width): (&mut [f32], usize),
    quantized: &mut QuantizedRows,
    adapters: Option<(&Adapters<'_>, &mut Vec<f32>)>,
    produce: impl Fn(usize, &mut [f32]) + Sync,
) {
    let rows = x.len() / width;
    let writer = quantized.resize(rows, width);
    let x = Shared(x.as_mut_ptr());
    let adapters = adapters.map(|(adapters, shrunk)| {
        shrunk.resize(adapters.shrunk_len(rows), 0.0);
        (adapters, Shared(shrunk.as_mut_ptr()))
    });
    let level = Level::best();
    // Of many groups several at a time: neighbours share a panel, whose lines should not go to and fro between threads.
    let piece = (groups.len() / (8 * team.threads())).clamp(1, 4);
    team.each(groups.len().div_ceil(piece), |i| {
        for group in &groups[i * piece..groups.len().min((i + 1) * piece)] {
            assert!(group.rows().end <= rows, "groups lie within the batch");
            // SAFETY: groups do not overlap, so this task alone touches these rows of x, of `quantized` and of the
            // shrunk ones.
            let x = unsafe { x.part(group.first * width, group.count * width) };
            for (row, x) in group.rows().zip(x.chunks_exact_mut(width)) {
                produce(row, x);
                // SAFETY: as above.
                unsafe { writer.write(row, x) };
            }
            let (Some(adapter), Some((adapters, shrunk))) = (group.adapter, &adapters) else { continue };
            for layer in 0..adapters.layers() {
                if let Some(pair) = adapters.pair(adapter, layer) {
                    assert!(pair.rank <= adapters.rank && pair.a.len() == pair.rank * width, "the pair fits");
                    let at = (layer * rows + group.first) * adapters.rank;
                    // SAFETY: as above, and the rows of a layer lie apart from those of another.
                    let out = unsafe { shrunk.part(at, group.count * adapters.rank) };
                    shrink(level, pair, x, out, adapters.rank);
                }
            }
        }
    });
}
