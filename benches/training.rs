//! How fast the default base trains on this machine, and in how much memory, as a table for RESULTS.md: `cargo bench --bench training`.
//!
//! LoRA of rank 8 on all linear layers, 4 records of 256 tokens a step, every token in the loss. The kinds of pass take turns, so that all see
//! the same machine; the table has medians. Memory is that of activations.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a bench fails by them")]

use tenora::adapter::Adapter;
use tenora::device::{self, DeviceSpec};
use tenora::kernels::gemm::{Mat, Out, mul};
use tenora::kernels::testing::{median, seconds};
use tenora::model::Model;
use tenora::model::traced::{ForwardOptions, Products, Workspace};
use tenora::request::LoraSpec;

const ROUNDS: usize = 7;
const RECORDS: usize = 4;
const TOKENS: usize = 256;
/// A long record, and the layers of which one input is kept.
const LONG: usize = 8192;
const LONG_LAYERS: usize = 5;

struct Kind {
    name: &'static str,
    options: ForwardOptions<'static>,
}

fn main() {
    device::init_pool(std::env::var("THREADS").ok().and_then(|n| n.parse().ok()).unwrap_or(2));
    let path = tenora::bases::resolve(tenora::bases::DEFAULT, |_| {}).expect("the default base");
    let cpu = DeviceSpec::Cpu.open().expect("the CPU");
    let (model, _) = Model::load(&path, &cpu, None).expect("the base loads");
    let adapter = Adapter::fresh(&LoraSpec::default(), model.shape(), 1).expect("an adapter");
    let kinds = [
        Kind { name: "served products", options: ForwardOptions::default() },
        Kind {
            name: "served products, layers recomputed",
            options: ForwardOptions { recompute_layers: Some(1), ..ForwardOptions::default() },
        },
        Kind {
            name: "float32 products",
            options: ForwardOptions { products: Products::Exact, ..ForwardOptions::default() },
        },
    ];
    let workspaces: Vec<Workspace> = kinds.iter().map(|_| Workspace::default()).collect();
    let mut times = vec![Vec::new(); kinds.len()];
    for round in 0..=ROUNDS {
        for ((kind, workspace), times) in kinds.iter().zip(&workspaces).zip(&mut times) {
            let options = ForwardOptions { adapter: Some(&adapter), ..kind.options };
            let time = seconds(|| step(&model, options, &adapter, workspace));
            // The first one fetches its memory.
            if round > 0 {
                times.push(time);
            }
        }
    }
    let long = Workspace::default();
    let options = ForwardOptions { adapter: Some(&adapter), recompute_layers: Some(LONG_LAYERS), ..Default::default() };
    let time = seconds(|| pass(&model, &[record(&model, 0, LONG)], options, &mut adapter.zeros_like(), &long));
    println!("| pass | tokens/s | activations |\n|---|---|---|");
    for ((kind, workspace), times) in kinds.iter().zip(&workspaces).zip(times) {
        let speed = (RECORDS * TOKENS) as f64 / median(times);
        println!("| {} | {speed:.0} | {} MB |", kind.name, workspace.peak_bytes() / 1_000_000);
    }
    let (speed, bytes) = (LONG as f64 / time, long.peak_bytes() / 1_000_000);
    println!("| one record of {LONG} tokens, {LONG_LAYERS} layers at a time recomputed | {speed:.0} | {bytes} MB |");
    let weights: usize = model.shape().linears.iter().map(|linear| linear.inputs * linear.outputs).sum();
    // What the backward multiplies in float32 for a token in the loss: each frozen layer and the head once.
    let macs = weights * model.shape().layers as usize + model.vocab_size() * model.config().hidden_size;
    println!(
        "\nfloat32: {:.0} M multiply-adds a token backward; gemm does {:.0} G a second",
        macs as f64 / 1e6,
        gemm() / 1e9
    );
}

/// Multiply-adds a second of float32 products of a pass's size.
fn gemm() -> f64 {
    let (rows, inner, cols) = (RECORDS / 2 * TOKENS, 1536, 576);
    let values = |len: usize| (0..len).map(|i| (i as f32 * 0.7).sin()).collect::<Vec<f32>>();
    let (a, b, mut out) = (values(rows * inner), values(inner * cols), vec![0.0; rows * cols]);
    let mut times: Vec<f64> = Vec::new();
    for _ in 0..50 {
        let to = Out { data: &mut out, stride: cols, accumulate: false };
        times.push(seconds(|| mul(to, Mat::dense(&a, inner), Mat::dense(&b, cols), true)));
    }
    (rows * inner * cols) as f64 / median(times)
}

/// Ids that are random enough.
fn record(model: &Model, number: usize, len: usize) -> Vec<u32> {
    (0..len).map(|i| ((i * 7919 + number * 31) % model.vocab_size()) as u32).collect()
}

/// The passes of a step, two records each.
fn step(model: &Model, options: ForwardOptions<'_>, adapter: &Adapter, workspace: &Workspace) {
    let records: Vec<Vec<u32>> = (0..RECORDS).map(|number| record(model, number, TOKENS)).collect();
    let mut gradients = adapter.zeros_like();
    for records in records.chunks(RECORDS / 2) {
        pass(model, records, options, &mut gradients, workspace);
    }
}

/// A pass forward and backward, every token in the loss.
fn pass(
    model: &Model,
    records: &[Vec<u32>],
    options: ForwardOptions<'_>,
    gradients: &mut Adapter,
    workspace: &Workspace,
) {
    let ids: Vec<&[u32]> = records.iter().map(Vec::as_slice).collect();
    let of_record = |(record, ids): (usize, &&[u32])| (0..ids.len() - 1).map(move |i| (record, i)).collect::<Vec<_>>();
    let wanted: Vec<_> = ids.iter().enumerate().flat_map(of_record).collect();
    let trace = model.trace(&ids, &wanted, options, workspace).expect("a pass");
    let derivatives = vec![-1.0 / wanted.len() as f32; wanted.len()];
    trace.backward(&derivatives, gradients).expect("a pass backward");
}
