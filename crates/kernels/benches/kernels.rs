//! The CPU's kernels on the default base's shapes: `cargo bench --bench kernels`. Criterion compares with the last run.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a bench fails by them")]

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tenora_kernels::cpu::{
    Adapters, AttentionScratch, GROUP_ROWS, KvDtype, KvShape, KvView, Linear, LoraPair, Next, QuantizedRows, RowGroup,
    RowTile, Team, attention, linear, prepare,
};
use tenora_kernels::format::QType;
use tenora_kernels::packed::PackedMatrix;
use tenora_kernels::spec::AttentionSpec;
use tenora_kernels::testing::random_matrix;

const WIDTH: usize = 576;
const FFN: usize = 1536;

/// Matrices of a pass, more than the caches hold, as in a model.
const MATRICES: usize = 100;

fn sinusoid(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.37).sin()).collect()
}

fn matrix(qtype: QType) -> PackedMatrix {
    PackedMatrix::pack(qtype, FFN, WIDTH, &random_matrix(qtype, FFN, WIDTH, 1))
}

fn groups(rows: usize, adapter: impl Fn(usize) -> Option<usize>) -> Vec<RowGroup> {
    (0..rows).map(|first| RowGroup { first, count: 1, adapter: adapter(first) }).collect()
}

/// y = x W^T, rows at a time; a throughput of one element is one multiply-add.
fn matmul(c: &mut Criterion) {
    let team = Team::get();
    for qtype in QType::ALL.iter().copied().filter(|qtype| qtype.fits(WIDTH)) {
        let matrices: Vec<_> = (0..MATRICES).map(|_| matrix(qtype)).collect();
        let mut group = c.benchmark_group(format!("matmul {qtype:?} {WIDTH}x{FFN}"));
        group.sample_size(10).measurement_time(Duration::from_secs(2));
        for rows in [1, 4, 16, 256] {
            let (mut x, mut q) = (sinusoid(rows * WIDTH), QuantizedRows::new([qtype]));
            prepare(team, &groups(rows, |_| None), (&mut x, WIDTH), &mut q, None, |_, _| {});
            let mut y = vec![0.0; rows * FFN];
            group.throughput(Throughput::Elements((MATRICES * rows * WIDTH * FFN) as u64));
            group.bench_with_input(BenchmarkId::from_parameter(rows), &rows, |b, _| {
                b.iter(|| {
                    for matrix in &matrices {
                        let layer = Linear { bias: None, matrix, y: &mut y, accumulate: false };
                        linear(team, &q, &mut [layer], None, Next::default());
                    }
                });
            });
        }
    }
}

/// 16 rows of 16 adapters of rank 16, made, shrunk, multiplied and expanded; beside the same rows of the base.
fn adapters(c: &mut Criterion) {
    const ROWS: usize = 16;
    const RANK: usize = 16;
    let team = Team::get();
    let matrices: Vec<_> = (0..MATRICES).map(|_| matrix(QType::Q4_1)).collect();
    let values: Vec<u16> =
        sinusoid(MATRICES * ROWS * RANK * (WIDTH + FFN)).iter().map(|x| (x.to_bits() >> 16) as u16).collect();
    let mut group = c.benchmark_group("16 rows, prepared and multiplied");
    group.sample_size(10).measurement_time(Duration::from_secs(2));
    for name in ["base", "16 adapters of rank 16"] {
        let adapted = name != "base";
        let groups = groups(ROWS, |row| adapted.then_some(row));
        let (mut x, mut q, mut shrunk, mut y) =
            (sinusoid(ROWS * WIDTH), QuantizedRows::new([QType::Q4_1]), Vec::new(), vec![0.0; ROWS * FFN]);
        group.bench_function(name, |b| {
            b.iter(|| {
                for (i, matrix) in matrices.iter().enumerate() {
                    let pairs: [_; ROWS] = std::array::from_fn(|row| {
                        let own = &values[(i * ROWS + row) * RANK * (WIDTH + FFN)..][..RANK * (WIDTH + FFN)];
                        let (a, b) = own.split_at(RANK * WIDTH);
                        Some(LoraPair { rank: RANK, scale: 1.0, a, b })
                    });
                    let adapters = Adapters { groups: &groups, pairs: &pairs, count: ROWS, rank: RANK };
                    let shrinking = adapted.then_some((&adapters, &mut shrunk));
                    prepare(team, &groups, (&mut x, WIDTH), &mut q, shrinking, |_, _| {});
                    let expanding = adapted.then_some((&adapters, &shrunk[..]));
                    linear(
                        team,
                        &q,
                        &mut [Linear { bias: None, matrix, y: &mut y, accumulate: false }],
                        expanding,
                        Next::default(),
                    );
                }
            });
        });
    }
}

/// Rows of one sequence that begin at a position; a throughput of one element is one multiply-add.
fn attend(c: &mut Criterion) {
    const HEADS: usize = 9;
    let (team, mut scratch) = (Team::get(), AttentionScratch::default());
    let spec = AttentionSpec::causal(HEADS, 64);
    let shape = KvShape { block_tokens: 16, kv_heads: 3, head_dim: 64, dtype: KvDtype::F16 };
    let blocks: Vec<u32> = (0..64).collect();
    let (keys, values) = (vec![0x2C00; 64 * shape.block_len()], vec![0x3400; 64 * shape.block_len()]);
    let mut group = c.benchmark_group("attention, 9 heads, 3 KV heads of 64");
    group.sample_size(10).measurement_time(Duration::from_secs(2));
    for (rows, position) in [(256, 0), (256, 256), (1, 255), (1, 1000)] {
        let (q, mut out) = (sinusoid(rows * WIDTH), vec![0.0; rows * WIDTH]);
        let tile = |i: usize| {
            let first = GROUP_ROWS * i;
            RowTile { first, count: GROUP_ROWS.min(rows - first), position: position + first, blocks: &blocks }
        };
        let macs: usize = (0..rows).map(|row| (position + row + 1) * HEADS * shape.head_dim * 2).sum();
        group.throughput(Throughput::Elements(macs as u64));
        group.bench_function(format!("{rows} rows from {position}"), |b| {
            let kv = KvView { shape, keys: &keys, values: &values };
            b.iter(|| attention(team, rows.div_ceil(GROUP_ROWS), tile, &q, kv, spec, (&mut scratch, &mut out)));
        });
    }
}

criterion_group!(benches, matmul, adapters, attend);
criterion_main!(benches);
