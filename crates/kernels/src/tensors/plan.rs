//! What a batch is, in integers, and how it is packed into one array for the device.

use std::ops::Range;
use std::sync::Arc;

use super::{DeviceLora, HeadShape, LORA_ROWS};

/// Queries that a warp of the attention kernel takes, and warps of a block that takes a long span.
const QUERIES: usize = 16;
const LONG_WARPS: usize = 4;

/// Positions of a partition of a split task.
const PARTITION: usize = 256;

/// New rows of one sequence.
#[derive(Debug, Clone)]
pub struct Rows<'a> {
    /// A token a row.
    pub ids: &'a [u32],
    /// The first row's position.
    pub start: usize,
    /// The sequence's blocks, which cover all its rows.
    pub blocks: &'a [u32],
    /// The adapter of these rows.
    pub lora: Option<&'a Arc<DeviceLora>>,
    /// Last rows that are wanted beyond the last layer.
    pub wanted: usize,
}

/// A sequence of the batch, as the kernels read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Sequence {
    /// Its first row in the batch.
    pub first_row: u32,
    /// Its rows in the batch.
    pub rows: u32,
    /// The position of its first row.
    pub start: u32,
    /// Where its blocks begin in [`Plan::blocks`].
    pub table: u32,
}

/// Some queries of one sequence, as the attention kernel reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct AttentionTask {
    /// The sequence, by its number in the plan.
    pub sequence: u32,
    /// Of one KV head's queries, numbered row by row.
    pub first: u32,
    /// Partitions of the tasks before it.
    pub partial: u32,
}

/// Rows of one adapter: `first..first + count` of [`Plan::adapted`], as the adapter kernels read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct LoraTask {
    /// The address of the adapter's table of layers, as two words.
    pub layers: [u32; 2],
    /// The first row.
    pub first: u32,
    /// Rows, one after the other.
    pub count: u32,
}

/// A batch. Its vectors keep their room from one batch to the next.
#[derive(Debug, Default)]
pub struct Plan {
    pub(super) ids: Vec<u32>,
    pub(super) positions: Vec<u32>,
    /// Where each row's keys and values go.
    pub(super) slots: Vec<u32>,
    pub(super) sequences: Vec<Sequence>,
    pub(super) blocks: Vec<u32>,
    pub(super) wanted: Vec<u32>,
    /// Tasks of spans that one warp takes, a block a partition; and of all others.
    pub(super) short: Vec<AttentionTask>,
    pub(super) long: Vec<AttentionTask>,
    /// Of all short tasks, and of the longest.
    pub(super) partitions: usize,
    pub(super) most_partitions: usize,
    /// The rows that have an adapter, adapter by adapter, and each adapter's.
    pub(super) adapted: Vec<u32>,
    pub(super) adapters: Vec<(Arc<DeviceLora>, Range<usize>)>,
    pub(super) lora_tasks: Vec<LoraTask>,
}

/// Where each part of a plan lies in the packed array, in the order of `Plan::parts`.
pub type Places = [Range<usize>; 9];

impl Plan {
    /// Plans a batch in place of the one before. The rows fit the cache: the caller has checked them.
    pub fn fill<'a>(&mut self, batch: impl Iterator<Item = Rows<'a>> + Clone, shape: HeadShape) {
        self.clear();
        for rows in batch.clone() {
            self.add(&rows, shape);
        }
        self.group_by_adapter(batch);
    }

    fn clear(&mut self) {
        let numbers = [&mut self.ids, &mut self.positions, &mut self.slots, &mut self.blocks, &mut self.wanted];
        numbers.into_iter().for_each(Vec::clear);
        self.sequences.clear();
        [&mut self.short, &mut self.long].into_iter().for_each(Vec::clear);
        (self.partitions, self.most_partitions) = (0, 0);
        self.adapted.clear();
        self.adapters.clear();
        self.lora_tasks.clear();
    }

    fn add(&mut self, rows: &Rows<'_>, shape: HeadShape) {
        let (first_row, count, end) = (self.ids.len(), rows.ids.len(), rows.start + rows.ids.len());
        let slot = |position: usize| {
            rows.blocks[position / shape.block_tokens] as usize * shape.block_tokens + position % shape.block_tokens
        };
        self.ids.extend(rows.ids);
        self.positions.extend((rows.start..end).map(|position| position as u32));
        self.slots.extend((rows.start..end).map(|position| slot(position) as u32));
        self.wanted.extend((first_row + count - rows.wanted..first_row + count).map(|row| row as u32));
        let sequence = self.sequences.len() as u32;
        let table = self.blocks.len() as u32;
        self.blocks.extend(&rows.blocks[..end.div_ceil(shape.block_tokens)]);
        self.sequences.push(Sequence {
            first_row: first_row as u32,
            rows: count as u32,
            start: rows.start as u32,
            table,
        });

        let queries = count * shape.group();
        if queries <= QUERIES {
            let partitions = end.div_ceil(PARTITION);
            self.short.push(AttentionTask { sequence, first: 0, partial: self.partitions as u32 });
            self.partitions += partitions;
            self.most_partitions = self.most_partitions.max(partitions);
        } else {
            let firsts = (0..queries).step_by(LONG_WARPS * QUERIES);
            self.long.extend(firsts.map(|first| AttentionTask { sequence, first: first as u32, partial: 0 }));
        }
    }

    fn group_by_adapter<'a>(&mut self, batch: impl Iterator<Item = Rows<'a>> + Clone) {
        for rows in batch.clone() {
            let Some(lora) = rows.lora else { continue };
            if self.adapters.iter().any(|(known, _)| Arc::ptr_eq(known, lora)) {
                continue;
            }
            let start = self.adapted.len();
            for (of, sequence) in batch.clone().zip(&self.sequences) {
                if of.lora.is_some_and(|other| Arc::ptr_eq(other, lora)) {
                    self.adapted.extend(sequence.first_row..sequence.first_row + sequence.rows);
                }
            }
            let range = start..self.adapted.len();
            for first in range.clone().step_by(LORA_ROWS) {
                let layers = [lora.address as u32, (lora.address >> 32) as u32];
                let count = LORA_ROWS.min(range.end - first) as u32;
                self.lora_tasks.push(LoraTask { layers, first: first as u32, count });
            }
            self.adapters.push((lora.clone(), range));
        }
    }

    /// Rows of the batch.
    pub fn rows(&self) -> usize {
        self.ids.len()
    }

    /// Rows that are wanted beyond the last layer.
    pub fn wanted(&self) -> usize {
        self.wanted.len()
    }

    /// Whether some row's adapter has the site.
    pub fn adapts(&self, site: usize) -> bool {
        self.adapters.iter().any(|(lora, _)| lora.has(site))
    }

    /// The largest rank of the batch's adapters.
    pub fn rank(&self) -> usize {
        self.adapters.iter().map(|(lora, _)| lora.rank()).max().unwrap_or_default()
    }

    /// Attention tasks of short spans and of long ones.
    pub fn attention_tasks(&self) -> [usize; 2] {
        [self.short.len(), self.long.len()]
    }

    /// Partitions of all short tasks, and of the longest.
    pub fn partitions(&self) -> [usize; 2] {
        [self.partitions, self.most_partitions]
    }

    /// Rows that have an adapter, and tasks of such rows.
    pub fn lora_tasks(&self) -> [usize; 2] {
        [self.adapted.len(), self.lora_tasks.len()]
    }

    /// Whether every adapter fits a layer of this shape at the site.
    pub fn lora_fits(&self, site: usize, inputs: usize, outputs: usize) -> bool {
        self.adapters.iter().all(|(lora, _)| lora.fits(site, inputs, outputs))
    }

    /// Packs all parts, one after the other, into `to`, and says where each lies.
    pub fn pack(&self, to: &mut Vec<u32>) -> Places {
        to.clear();
        let mut place = |part: &mut dyn Iterator<Item = u32>| {
            let start = to.len();
            to.extend(part);
            start..to.len()
        };
        let task = |task: &AttentionTask| [task.sequence, task.first, task.partial];
        let lora = |task: &LoraTask| [task.layers[0], task.layers[1], task.first, task.count];
        let sequence = |of: &Sequence| [of.first_row, of.rows, of.start, of.table];
        [
            place(&mut self.ids.iter().copied()),
            place(&mut self.positions.iter().copied()),
            place(&mut self.slots.iter().copied()),
            place(&mut self.sequences.iter().flat_map(sequence)),
            place(&mut self.blocks.iter().copied()),
            place(&mut self.wanted.iter().copied()),
            place(&mut self.short.iter().chain(&self.long).flat_map(task)),
            place(&mut self.adapted.iter().copied()),
            place(&mut self.lora_tasks.iter().flat_map(lora)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: HeadShape = HeadShape { heads: 9, kv_heads: 3, head_dim: 64, block_tokens: 4 };

    #[test]
    fn a_batch_in_integers() {
        let (ids, blocks) = ([5; 600], (0..200).rev().collect::<Vec<u32>>());
        let rows =
            |count: usize, start, wanted| Rows { ids: &ids[..count], start, blocks: &blocks, lora: None, wanted };
        let mut plan = Plan::default();
        for _ in 0..2 {
            plan.fill([rows(2, 300, 1), rows(30, 0, 0), rows(5, 3, 5)].into_iter(), SHAPE);
        }
        assert_eq!((plan.rows(), plan.wanted()), (37, 6));
        assert_eq!(plan.positions[..3], [300, 301, 0]);
        assert_eq!(plan.slots[..3], [124 * 4, 124 * 4 + 1, 199 * 4]);
        assert_eq!(plan.wanted, [1, 32, 33, 34, 35, 36]);
        assert_eq!(plan.sequences[2], Sequence { first_row: 32, rows: 5, start: 3, table: 76 + 8 });
        assert_eq!(plan.blocks.len(), 76 + 8 + 2);
        let task = |sequence, first, partial| AttentionTask { sequence, first, partial };
        assert_eq!(plan.short, [task(0, 0, 0), task(2, 0, 2)]);
        assert_eq!(plan.long, [task(1, 0, 0), task(1, 64, 0)]);
        assert_eq!((plan.partitions, plan.most_partitions), (3, 2));
        let mut packed = Vec::new();
        let places = plan.pack(&mut packed);
        assert_eq!((places[2].clone(), packed.len()), (74..111, 37 * 3 + 12 + 86 + 6 + 12));
        assert_eq!(packed[places[6].clone()][..3], [0, 0, 0]);
    }
}
