//! The roofline of the default base on this machine, as a table for RESULTS.md: `cargo bench --bench roofline`.
//!
//! Every round measures the machine's limits (reading memory, the dot product instruction) and then each kind of step,
//! so that both see the same machine; the table has medians. Bytes are those of the weights and of the keys and values
//! that a step must read once; multiply-adds those that the model has. Inputs have two bytes, so each multiply-add of a
//! frozen layer is two products of bytes.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a bench fails by them")]

use std::hint::black_box;

use tenora::device::{self, DeviceSpec};
use tenora::kernels::cpu::{Team, dot_products};
use tenora::kernels::testing::{median, read_bandwidth, seconds};
use tenora::model::Model;
use tenora::model::batch::{KvDtype, KvLayout, Readout, SequenceChunk};

const ROUNDS: usize = 9;
const BLOCK_TOKENS: usize = 16;
const PROMPT: usize = 512;
/// Positions before a decoded token.
const BEFORE: usize = 192;

/// A kind of step: so many sequences with so many rows each, after so many positions.
struct Step {
    name: &'static str,
    sequences: usize,
    rows: usize,
    before: usize,
}

const STEPS: [Step; 3] = [
    Step { name: "prefill of 512", sequences: 1, rows: PROMPT, before: 0 },
    Step { name: "decode, 1 stream", sequences: 1, rows: 1, before: BEFORE },
    Step { name: "decode, 16 streams", sequences: 16, rows: 1, before: BEFORE },
];

/// Products of bytes a second of all threads together.
fn instruction_peak(team: &Team) -> f64 {
    const ROUNDS: u64 = 1 << 22;
    let time = seconds(|| {
        team.each(team.threads(), |_| {
            black_box(dot_products(ROUNDS));
        })
    });
    (dot_products(1) * ROUNDS * team.threads() as u64) as f64 / time
}

fn main() {
    device::init_pool(std::env::var("THREADS").ok().and_then(|n| n.parse().ok()).unwrap_or(2));
    let path = tenora::bases::resolve(tenora::bases::DEFAULT, |_| {}).expect("the default base");
    let cpu = DeviceSpec::Cpu.open().expect("the CPU");
    let (model, _) = Model::load(&path, &cpu, None).expect("the base loads");
    let (config, shape, team) = (model.config(), model.shape(), Team::get());
    let frozen: usize =
        shape.layers as usize * shape.linears.iter().map(|linear| linear.inputs * linear.outputs).sum::<usize>();
    let head = config.hidden_size * model.vocab_size();
    // Q4_1 has 5 bits a weight, Q8_0 8.5.
    let weights = |logits: bool| frozen as f64 * 5.0 / 8.0 + if logits { head as f64 * 8.5 / 8.0 } else { 0.0 };

    let blocks_each = (PROMPT + BEFORE) / BLOCK_TOKENS;
    let tables: Vec<Vec<u32>> =
        (0..16).map(|s| (s * blocks_each as u32..(s + 1) * blocks_each as u32).collect()).collect();
    let mut executor = model
        .executor(KvLayout { block_tokens: BLOCK_TOKENS, blocks: 16 * blocks_each, dtype: KvDtype::F16 })
        .expect("a cache");
    let ids: Vec<u32> = (0..PROMPT as u32).map(|i| 1000 + i * 7919 % 40_000).collect();
    let mut run = |step: &Step| {
        let span = |s: usize| SequenceChunk {
            ids: &ids[..step.rows],
            start: step.before,
            blocks: &tables[s],
            adapter: None,
            logits: Readout::Last,
        };
        let spans: Vec<_> = (0..step.sequences).map(span).collect();
        seconds(|| {
            executor.forward(&spans).expect("a step");
        })
    };

    let memory = vec![1u64; 32 << 20];
    let (mut bandwidth, mut peak) = (Vec::new(), Vec::new());
    let mut times = STEPS.map(|_| Vec::new());
    for round in 0..=ROUNDS {
        let limits = (read_bandwidth(team, &memory), instruction_peak(team));
        let steps: Vec<f64> = STEPS.iter().map(|step| median((0..5).map(|_| run(step)).collect())).collect();
        // The first round warms up.
        if round > 0 {
            bandwidth.push(limits.0);
            peak.push(limits.1);
            times.iter_mut().zip(steps).for_each(|(times, time)| times.push(time));
        }
    }
    let (bandwidth, peak) = (median(bandwidth), median(peak));
    println!(
        "Limits, {} threads: {:.1} GB/s read, {:.0} G products of bytes a second.\n",
        team.threads(),
        bandwidth / 1e9,
        peak / 1e9
    );
    println!(
        "| step | time | tokens/s | bytes | multiply-adds | GB/s | of the bandwidth | G multiply-adds/s | of the instruction peak |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for (step, times) in STEPS.iter().zip(times) {
        let time = median(times);
        let rows = step.sequences * step.rows;
        let seen: usize = (0..step.rows).map(|row| step.before + row + 1).sum::<usize>() * step.sequences;
        let read = step.sequences * (step.before + step.rows);
        let bytes = weights(true) + read as f64 * model.kv_bytes_per_token(KvDtype::F16) as f64;
        let products = (rows * frozen + step.sequences * head) as f64;
        let attention = (seen * config.layers.len() * config.qkv_widths()[0] * 2) as f64;
        println!(
            "| {} | {:.2} ms | {:.0} | {:.0} MB | {:.2} G | {:.1} | {:.0} % | {:.1} | {:.0} % |",
            step.name,
            time * 1e3,
            rows as f64 / time,
            bytes / 1e6,
            (products + attention) / 1e9,
            bytes / time / 1e9,
            100.0 * bytes / time / bandwidth,
            (products + attention) / time / 1e9,
            100.0 * 2.0 * products / time / peak,
        );
    }
}
