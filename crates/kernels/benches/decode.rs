//! Decode attention of one stream beside a plain read of as many bytes by the same threads, interleaved, medians and the least: `cargo
//! bench -p tenora-kernels --bench decode [ROUNDS]`. A cache a layer, so that what is read comes from memory where a
//! model's would.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a bench fails by them")]

use std::hint::black_box;
use std::sync::OnceLock;
use std::time::Instant;

use tenora_kernels::cpu::{AttentionScratch, GROUP_ROWS, KvDtype, KvShape, KvView, RowTile, Team, attention};
use tenora_kernels::spec::AttentionSpec;
use tenora_kernels::testing::sinusoid;

/// A base's attention.
struct Base {
    name: &'static str,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

const BASES: [Base; 4] = [
    Base { name: "SmolLM2-135M", layers: 30, heads: 9, kv_heads: 3, head_dim: 64 },
    Base { name: "Qwen2.5-0.5B", layers: 24, heads: 14, kv_heads: 2, head_dim: 64 },
    Base { name: "Qwen2.5-1.5B", layers: 28, heads: 12, kv_heads: 2, head_dim: 128 },
    Base { name: "Gemma-3-270M", layers: 18, heads: 4, kv_heads: 1, head_dim: 256 },
];

/// New rows and the position of the first.
const SPANS: [(usize, usize); 5] = [(1, 127), (1, 2047), (1, 8191), (256, 0), (256, 2048)];

const BLOCK_TOKENS: usize = 16;

/// Half-precision numbers around 1/16.
fn halves(len: usize) -> Vec<u16> {
    (0..len).map(|i| 0x2C00 + (i * 37 % 512) as u16).collect()
}

/// Reads all of it, and does next to nothing with it.
fn read(team: &Team, words: &[Vec<u16>]) {
    const PIECES: usize = 32;
    team.each(words.len() * PIECES, |i| {
        let words = &words[i / PIECES];
        let piece = words.len() / PIECES;
        let sum = words[i % PIECES * piece..][..piece].chunks_exact(32).fold([0u16; 32], |mut sum, line| {
            sum.iter_mut().zip(line).for_each(|(sum, word)| *sum ^= word);
            sum
        });
        black_box(sum);
    });
}

/// Time of the clock; of this thread on a core, where it is alone and the system says so: others on the machine then
/// disturb it less.
fn seconds(team: &Team) -> f64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let on_core =
        || std::fs::read_to_string("/proc/thread-self/schedstat").ok()?.split(' ').next()?.parse::<f64>().ok();
    match on_core().filter(|_| team.threads() == 1) {
        Some(nanoseconds) => nanoseconds / 1e9,
        None => START.get_or_init(Instant::now).elapsed().as_secs_f64(),
    }
}

/// The median and the least.
fn of(mut times: Vec<f64>) -> (f64, f64) {
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], times[0])
}

fn measure(base: &Base, (rows, position): (usize, usize), dtype: KvDtype, rounds: usize) {
    let Base { name, layers, heads, kv_heads, head_dim } = *base;
    let team = Team::get();
    let shape = KvShape { block_tokens: BLOCK_TOKENS, kv_heads, head_dim, dtype };
    let spec = AttentionSpec::causal(heads, head_dim);
    let count = (position + rows).div_ceil(BLOCK_TOKENS);
    let blocks: Vec<u32> = (0..count as u32).collect();
    let caches: Vec<_> = (0..2 * layers).map(|_| halves(count * shape.block_len())).collect();
    let (q, mut out) = (sinusoid(rows * heads * head_dim, 0), vec![0.0; rows * heads * head_dim]);
    let tile = |i: usize| {
        let first = GROUP_ROWS * i;
        RowTile { first, count: GROUP_ROWS.min(rows - first), position: position + first, blocks: &blocks }
    };
    let mut scratch = AttentionScratch::default();
    let mut pass = || {
        for layer in caches.chunks_exact(2) {
            let kv = KvView { shape, keys: &layer[0], values: &layer[1] };
            attention(team, rows.div_ceil(GROUP_ROWS), tile, &q, kv, spec, (&mut scratch, &mut out));
        }
    };
    // The system counts a thread's time in steps of some milliseconds.
    let timed = |f: &mut dyn FnMut()| {
        let (start, mut passes) = (seconds(team), 0.0);
        while passes == 0.0 || seconds(team) - start < 0.05 {
            f();
            passes += 1.0;
        }
        (seconds(team) - start) / passes
    };
    pass();
    let (reads, passes): (Vec<f64>, Vec<f64>) =
        (0..rounds).map(|_| (timed(&mut || read(team, &caches)), timed(&mut pass))).unzip();
    let ((read, least_read), (pass, least)) = (of(reads), of(passes));
    let bytes = caches.iter().map(|cache| size_of_val(&cache[..])).sum::<usize>() as f64 / 1e9;
    println!(
        "{name:13} {dtype:?} {rows:3} rows from {position:4}: {:8.3} ms (least {:8.3}), {:5.1} GB/s ({:5.1}); plain read {:5.1} GB/s ({:5.1})",
        pass * 1e3,
        least * 1e3,
        bytes / pass,
        bytes / least,
        bytes / read,
        bytes / least_read
    );
}

fn main() {
    let rounds = std::env::args().find_map(|arg| arg.parse().ok()).unwrap_or(9);
    let wanted = std::env::args().nth(2).unwrap_or_default();
    println!("{} threads, medians of {rounds} (and the least)", Team::get().threads());
    for base in BASES.iter().filter(|base| base.name.contains(&wanted)) {
        for span in SPANS {
            measure(base, span, KvDtype::F16, rounds);
        }
        measure(base, SPANS[2], KvDtype::Int8, rounds);
    }
}
