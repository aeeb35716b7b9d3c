//! The matmul in every block format beside the memory's bandwidth, as a table: `cargo bench --bench formats [-- NAME...]`.
//!
//! Every round reads memory, before and after a pass with one row, and multiplies each format's matrices, which are more
//! than the caches hold, with 1, 8, 16 and 64 rows, so that all see the same machine; the table has medians, also of the
//! one row's share of the bandwidth that its own round had. `RAYON_NUM_THREADS` says how many threads.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a bench fails by them")]

use tenora_kernels::cpu::{Linear, Next, QuantizedRows, RowGroup, Team, linear, prepare};
use tenora_kernels::format::QType;
use tenora_kernels::packed::PackedMatrix;
use tenora_kernels::testing::{median, random_matrix, read_bandwidth, seconds, sinusoid};

const ROUNDS: usize = 15;
const COLS: usize = 1536;
const ROWS: usize = 4096;
/// Bytes of a format's matrices together: more than the caches hold.
const BYTES: usize = 96 << 20;
const BATCHES: [usize; 4] = [1, 8, 16, 64];

fn quantized(team: &Team, rows: usize) -> QuantizedRows {
    let groups: Vec<_> = (0..rows).map(|first| RowGroup { first, count: 1, adapter: None }).collect();
    let (mut x, mut q) = (sinusoid(rows * COLS, 1), QuantizedRows::new(FORMATS.iter().copied()));
    prepare(team, &groups, (&mut x, COLS), &mut q, None, |_, _| {});
    q
}

/// Seconds that one pass over the matrices takes.
fn pass(team: &Team, matrices: &[PackedMatrix], q: &QuantizedRows, y: &mut [f32]) -> f64 {
    let y = &mut y[..q.rows() * ROWS];
    seconds(|| {
        for (matrix, next) in matrices.iter().zip(matrices.iter().cycle().skip(1)) {
            let layer = Linear { matrix, bias: None, y, accumulate: false };
            let next = Next { matrices: [Some(next), None, None, None], adapters: None };
            linear(team, q, &mut [layer], None, next);
        }
    })
}

fn main() {
    let names: Vec<String> = std::env::args().skip(1).filter(|name| !name.starts_with("--")).collect();
    let team = Team::get();
    let inputs = BATCHES.map(|rows| quantized(team, rows));
    let mut y = vec![0.0; ROWS * BATCHES[BATCHES.len() - 1]];
    let memory = vec![1u64; 12 << 20];
    println!(
        "| format | bytes a weight | read GB/s | 1 row GB/s | of the bandwidth | 1, 8, 16, 64 rows: G multiply-adds/s |"
    );
    println!("|---|---|---|---|---|---|");
    for qtype in FORMATS.iter().filter(|q| names.is_empty() || names.iter().any(|name| *name == format!("{q:?}"))) {
        let one = PackedMatrix::pack(*qtype, ROWS, COLS, &random_matrix(*qtype, ROWS, COLS, 1));
        let count = BYTES.div_ceil(one.bytes().len());
        let file = one.unpack();
        let matrices: Vec<_> = (0..count).map(|_| PackedMatrix::pack(*qtype, ROWS, COLS, &file)).collect();
        let bytes = count * one.bytes().len();
        let (mut bandwidth, mut share, mut times) = (Vec::new(), Vec::new(), BATCHES.map(|_| Vec::new()));
        for round in 0..=ROUNDS {
            let before = read_bandwidth(team, &memory);
            let one = pass(team, &matrices, &inputs[0], &mut y);
            let read = (before + read_bandwidth(team, &memory)) / 2.0;
            let others = inputs[1..].iter().map(|q| pass(team, &matrices, q, &mut y));
            let new: Vec<f64> = std::iter::once(one).chain(others).collect();
            // The first round warms up.
            if round > 0 {
                bandwidth.push(read);
                share.push(bytes as f64 / one / read);
                times.iter_mut().zip(new).for_each(|(times, time)| times.push(time));
            }
        }
        let (bandwidth, times) = (median(bandwidth), times.map(median));
        let speeds = std::array::from_fn::<_, { BATCHES.len() }, _>(|i| {
            format!("{:.1}", (count * ROWS * COLS * BATCHES[i]) as f64 / times[i] / 1e9)
        });
        println!(
            "| {qtype:?} | {:.3} | {:.1} | {:.1} | {:.0} % | {} |",
            bytes as f64 / (count * ROWS * COLS) as f64,
            bandwidth / 1e9,
            bytes as f64 / times[0] / 1e9,
            100.0 * median(share),
            speeds.join(" "),
        );
    }
}

const FORMATS: &[QType] = QType::ALL;
