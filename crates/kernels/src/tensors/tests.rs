//! The contract of [`TensorKernels`], held to every device that is here: the CPU, whose form is the reference itself,
//! and the first GPU. The reference of a GPU's result is computed on the CPU from the same values.

use std::sync::Arc;

use super::reference::Reference;
use super::*;
use crate::testing::{hash, random_matrix};

const SHAPE: HeadShape = HeadShape { heads: 9, kv_heads: 3, head_dim: 64, block_tokens: 16 };

/// Rows of values.
type Table = Vec<Vec<f32>>;

/// The kernels of every device that is here, by name. What is not here is said.
fn devices(shape: HeadShape) -> Vec<(&'static str, Box<dyn TensorKernels>)> {
    let mut all: Vec<(_, Box<dyn TensorKernels>)> = vec![("cpu", Box::new(Reference::new(&Device::Cpu)))];
    match std::panic::catch_unwind(|| Device::new_cuda_with_stream(0)) {
        Ok(Ok(device)) => all.push(("cuda:0", open(&device, shape).unwrap())),
        Ok(Err(error)) => println!("cuda:0 is skipped: {error}"),
        Err(_) => println!("cuda:0 is skipped: the driver or a CUDA library cannot be loaded"),
    }
    all
}

/// Values in [-1, 1), a function of the seed.
fn values(len: usize, seed: u32) -> Vec<f32> {
    let at = |i: usize| hash(seed, i as u32);
    (0..len).map(|i| at(i) as f32 / 2.0_f32.powi(31) - 1.0).collect()
}

fn tensor(values: Vec<f32>, width: usize, device: &Device) -> Tensor {
    Tensor::from_vec(values.clone(), (values.len() / width, width), device).unwrap()
}

fn rows(x: &Tensor) -> Table {
    x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap().to_vec2().unwrap()
}

/// |x - y| / |y|.
fn difference(x: &[Vec<f32>], y: &[Vec<f32>]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    assert_eq!((x.len(), x[0].len()), (y.len(), y[0].len()));
    let pairs = || x.iter().flatten().zip(y.iter().flatten());
    norm(&mut pairs().map(|(x, y)| f64::from(x - y))) / norm(&mut pairs().map(|(_, y)| f64::from(*y)))
}

fn assert_close(name: &str, x: &[Vec<f32>], y: &[Vec<f32>], most: f64) {
    let difference = difference(x, y);
    assert!(difference <= most, "{name}: {difference:.2e}, at most {most:.0e}");
}

fn plan<'a>(batch: impl Iterator<Item = Rows<'a>> + Clone, shape: HeadShape) -> Plan {
    let mut plan = Plan::default();
    plan.fill(batch, shape);
    plan
}

/// The exact values of a matrix.
fn dequantized(matrix: &PackedMatrix) -> Vec<f32> {
    let mut values = vec![0.0; matrix.rows() * matrix.cols()];
    matrix.dequantize(0, &mut values);
    values
}

/// Widths that are no multiple of 256 included, and more rows than one kernel takes; the exact embeddings too.
#[test]
fn frozen_matrices() {
    for (name, mut kernels) in devices(SHAPE) {
        let served = QType::ALL.iter().copied().filter(|qtype| name == "cpu" || qtype.has_cuda_kernels());
        for (i, qtype) in served.enumerate() {
            let (cols, out) = (if qtype.fits(576) { 576 } else { 1536 }, [40, 200, 65][i % 3]);
            let bytes = random_matrix(qtype, out, cols, 1);
            let packed = PackedMatrix::pack(qtype, out, cols, &bytes);
            let matrix = DeviceMatrix::new(&packed, kernels.device()).unwrap();
            let exact = dequantized(&packed);
            let weights = Tensor::from_slice(&exact, (out, cols), &Device::Cpu).unwrap();
            let mut first: Table = Vec::new();
            for count in [1, 8, 9, 17, 64] {
                let x = values(count * cols, 2);
                let y = rows(&kernels.matmul(&tensor(x.clone(), cols, kernels.device()), &matrix).unwrap());
                let reference = tensor(x, cols, &Device::Cpu).matmul(&weights.t().unwrap()).unwrap();
                // candle's products on the CPU round activations to int8.
                let most = if name == "cpu" { 2e-2 } else { 1e-3 };
                assert_close(&format!("{name} {qtype:?} {count} rows"), &y, &rows(&reference), most);
                if name != "cpu" {
                    first.iter().zip(&y).for_each(|(a, b)| assert_eq!(a, b, "the same bits in every batch"));
                    first = y;
                }
            }
            let ids = [0, out as u32 - 1, 7];
            let plan = plan([Rows { ids: &ids, start: 0, blocks: &[0], lora: None, wanted: 0 }].into_iter(), SHAPE);
            kernels.upload(&plan).unwrap();
            let embedded = rows(&kernels.embed(&matrix, &plan).unwrap());
            let exact: Vec<_> = ids.iter().map(|id| exact[*id as usize * cols..][..cols].to_vec()).collect();
            assert_close(&format!("{name} embed"), &embedded, &exact, 1e-6);
        }
    }
}

/// Widths that are no multiple of 256 with more than 8 rows read beyond the last row, whose bytes must be zeros.
#[cfg(feature = "cuda")]
#[test]
fn candle_multiplies_odd_widths_rightly() {
    let Ok(device) = DeviceSpec::Cuda(0).open() else {
        return println!("cuda:0 is skipped");
    };
    let bytes = random_matrix(QType::Q4_1, 200, 576, 1);
    let packed = PackedMatrix::pack(QType::Q4_1, 200, 576, &bytes);
    let matrix = DeviceMatrix::new(&packed, &device).unwrap();
    let exact = dequantized(&packed);
    let weights = Tensor::from_vec(exact, (200, 576), &Device::Cpu).unwrap();
    for count in [1, 8, 9, 17, 64] {
        let x = values(count * 576, 2);
        let y = rows(&matrix.forward(&tensor(x.clone(), 576, &device)).unwrap());
        let reference = tensor(x, 576, &Device::Cpu).matmul(&weights.t().unwrap()).unwrap();
        assert_close(&format!("{count} rows"), &y, &rows(&reference), 2e-2);
    }
}

#[test]
fn row_by_row() {
    let reference = Reference::new(&Device::Cpu);
    for (name, mut kernels) in devices(SHAPE) {
        let (width, count) = (576, 5);
        let on = |seed, device: &Device| tensor(values(count * width, seed), width, device);
        let (x, y) = (on(1, kernels.device()), on(2, kernels.device()));
        let (a, b) = (on(1, &Device::Cpu), on(2, &Device::Cpu));
        let weight = |device: &Device| Tensor::from_vec(values(width, 3), width, device).unwrap();
        let got = kernels.rms_norm(&x, &weight(kernels.device()), 1e-5).unwrap();
        assert_close(name, &rows(&got), &rows(&reference.rms_norm(&a, &weight(&Device::Cpu), 1e-5).unwrap()), 1e-5);
        let plan = plan([Rows { ids: &[0; 5], start: 0, blocks: &[0], lora: None, wanted: 2 }].into_iter(), SHAPE);
        kernels.upload(&plan).unwrap();
        assert_eq!(rows(&kernels.select(&x, &plan).unwrap()), rows(&a)[3..]);
        let copy = |x: &Tensor| x.copy().unwrap();
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let got = kernels.gated(activation, copy(&x), &y).unwrap();
            let want = reference.gated(activation, copy(&a), &b).unwrap();
            assert_close(name, &rows(&got), &rows(&want), 1e-5);
            let mut ours = values(count * width, 1);
            crate::cpu::gated(activation, &mut ours, &values(count * width, 2));
            assert_close("the CPU's", &[ours], &[rows(&want).concat()], 1e-5);
        }
        assert_eq!(rows(&kernels.add(copy(&x), &y).unwrap()), rows(&reference.add(copy(&a), &b).unwrap()));
    }
}

/// A form of attention, and whether heads are normed and q is scaled; the values of each head that turn.
#[derive(Debug, Clone, Copy)]
struct Form {
    spec: AttentionSpec,
    norms: bool,
    rotary_dim: Option<usize>,
}

impl Form {
    fn plain(shape: HeadShape) -> Self {
        let spec = AttentionSpec::causal(shape.heads, shape.head_dim);
        Self { spec, norms: false, rotary_dim: Some(shape.head_dim) }
    }
}

/// Sequences of all lengths in one batch, over scattered blocks: short and long spans, one partition and several, heads
/// of both widths in groups of all sizes, in every form.
#[test]
fn attention_over_the_paged_cache() {
    for (heads, kv_heads, head_dim, block_tokens) in [(9, 3, 64, 16), (4, 4, 128, 5), (20, 1, 64, 32)] {
        let shape = HeadShape { heads, kv_heads, head_dim, block_tokens };
        let plain = Form::plain(shape);
        let capped = AttentionSpec { scale: 0.2, softcap: Some(5.0), ..plain.spec };
        let narrow = AttentionSpec { window: Some(100), ..plain.spec };
        let forms = [
            plain,
            Form { spec: capped, norms: true, rotary_dim: Some(head_dim / 2) },
            Form { spec: narrow, norms: false, rotary_dim: None },
        ];
        for ((name, _), form) in devices(shape).iter().flat_map(|device| forms.map(|form| (device, form))) {
            let kernels = devices(shape).into_iter().find(|(of, _)| of == name).unwrap().1;
            let got = attended(kernels, shape, form, &[(0, 1), (0, 70), (300, 1), (250, 30), (511, 1)]);
            let reference = Box::new(Reference::new(&Device::Cpu));
            let want = attended(reference, shape, form, &[(0, 1), (0, 70), (300, 1), (250, 30), (511, 1)]);
            for ((q, out), (want_q, want_out)) in got.iter().zip(&want) {
                assert_close(&format!("{name} {shape:?} {form:?} q"), q, want_q, 1e-5);
                assert_close(&format!("{name} {shape:?} {form:?}"), out, want_out, 3e-3);
            }
        }
    }
}

/// Prepared q and attention of each sequence, given as (start, new rows). What a sequence holds before `start` is
/// computed in a step of its own, and each sequence's values are a function of its place in the list.
fn attended(
    mut kernels: Box<dyn TensorKernels>,
    shape: HeadShape,
    form: Form,
    sequences: &[(usize, usize)],
) -> Vec<(Table, Table)> {
    let device = kernels.device().clone();
    let ids = vec![0; 1024];
    let blocks = |sequence: usize| {
        (0..600 / shape.block_tokens as u32 + 1).rev().map(|block| block * 8 + sequence as u32).collect::<Vec<_>>()
    };
    let tables: Vec<_> = (0..sequences.len()).map(blocks).collect();
    let kv = KvLayer::new(shape, (600 / shape.block_tokens + 1) * 8, &device).unwrap();
    let half = form.rotary_dim.unwrap_or(2) / 2;
    let angles = |f: fn(f32) -> f32| {
        let angle = |i: usize| f((i / half) as f32 * 0.3_f32.powi((i % half) as i32 % 8));
        tensor((0..1024 * half).map(angle).collect(), half, &device)
    };
    let rope = Rope { cos: angles(f32::cos), sin: angles(f32::sin) };
    let vector = |len: usize, seed: u32| Tensor::from_vec(values(len, seed), len, &device).unwrap();
    let (q_norm, k_norm, q_factors) = (vector(shape.head_dim, 1), vector(shape.head_dim, 2), vector(1024, 3));
    let prep = HeadPrep {
        norms: form.norms.then_some(HeadNorms { q: &q_norm, k: &k_norm, eps: 1e-5 }),
        rope: form.rotary_dim.is_some().then_some(&rope),
        q_factors: form.norms.then_some(&q_factors),
    };
    let mut step = |spans: &[(usize, usize, usize)]| {
        let batch = spans.iter().map(|(sequence, start, count)| Rows {
            ids: &ids[..*count],
            start: *start,
            blocks: &tables[*sequence],
            lora: None,
            wanted: 0,
        });
        let plan = plan(batch, shape);
        kernels.upload(&plan).unwrap();
        let made = |width: usize, salt: u32| {
            let of = |(sequence, start, count): &(usize, usize, usize)| {
                values((start + count) * width, salt + *sequence as u32)[start * width..].to_vec()
            };
            tensor(spans.iter().flat_map(of).collect(), width, &device)
        };
        let (width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let (q, k, v) = (made(width, 100), made(kv_width, 200), made(kv_width, 300));
        let q = kernels.rotate_and_store(((q * 3.0).unwrap(), &k, &v), prep, &kv, &plan).unwrap();
        (rows(&q), rows(&kernels.attention(&q, &form.spec, &kv, &plan).unwrap()))
    };
    for (sequence, (start, _)) in sequences.iter().enumerate().filter(|(_, (start, _))| *start > 0) {
        step(&[(sequence, 0, *start)]);
    }
    let spans: Vec<_> = sequences.iter().enumerate().map(|(i, (start, count))| (i, *start, *count)).collect();
    let (mut q, mut out) = step(&spans);
    let take =
        |(_, count): &(usize, usize)| (q.drain(..count).collect::<Vec<_>>(), out.drain(..count).collect::<Vec<_>>());
    sequences.iter().map(take).collect()
}

/// The reference against the CPU's serving kernels: q as it is prepared, what the cache holds, and what comes out.
#[test]
fn the_reference_and_the_serving_kernels_agree() {
    use crate::cpu;
    let shape = HeadShape { heads: 6, kv_heads: 2, head_dim: 32, block_tokens: 16 };
    let spec = AttentionSpec { heads: 6, scale: 0.1, softcap: Some(3.0), window: Some(20) };
    let (rows_of, blocks) = (50, [3, 0, 2, 1]);
    let [mut q, mut k, v] = [(192, 1), (64, 2), (64, 3)].map(|(width, seed)| values(rows_of * width, seed));
    let weights = [4, 5].map(|seed| values(32, seed));
    let table: [Vec<f32>; 2] = [f32::cos, f32::sin].map(|f| (0..rows_of * 8).map(|i| f(i as f32 * 0.3)).collect());
    let factors = values(rows_of, 6);
    let device = Device::Cpu;
    let (tensors, rope) = (
        [(&q, 192), (&k, 64), (&v, 64)].map(|(x, width)| tensor(x.clone(), width, &device)),
        Rope { cos: tensor(table[0].clone(), 8, &device), sin: tensor(table[1].clone(), 8, &device) },
    );
    let vector = |values: &[f32]| Tensor::from_slice(values, values.len(), &device).unwrap();
    let (q_norm, k_norm, q_factors) = (vector(&weights[0]), vector(&weights[1]), vector(&factors));
    let norms = Some(HeadNorms { q: &q_norm, k: &k_norm, eps: 1e-5 });
    let prep = HeadPrep { norms, rope: Some(&rope), q_factors: Some(&q_factors) };
    let (mut reference, kv) = (Reference::new(&device), KvLayer::new(shape, 4, &device).unwrap());
    let batch = Rows { ids: &vec![0; rows_of], start: 0, blocks: &blocks, lora: None, wanted: 0 };
    let plan = plan([batch].into_iter(), shape);
    reference.upload(&plan).unwrap();
    let [tq, tk, tv] = tensors;
    let want_q = reference.rotate_and_store((tq, &tk, &tv), prep, &kv, &plan).unwrap();
    let want = reference.attention(&want_q, &spec, &kv, &plan).unwrap();

    let team = cpu::Team::get();
    let cache = cpu::KvShape { block_tokens: 16, kv_heads: 2, head_dim: 32, dtype: cpu::KvDtype::F16 };
    let (mut keys, mut cached) = (vec![0; 4 * cache.block_len()], vec![0; 4 * cache.block_len()]);
    let angles = |position: usize| (&table[0][position * 8..][..8], &table[1][position * 8..][..8]);
    let factor = |position: usize| factors[position];
    let norms = Some(cpu::HeadNorms { q: &weights[0], k: &weights[1], eps: 1e-5 });
    let prep = cpu::HeadPrep { norms, angles: Some(&angles), q_factor: Some(&factor) };
    let tile = |i: usize| cpu::RowTile { first: 2 * i, count: 2, position: 2 * i, blocks: &blocks };
    let kv = cpu::KvViewMut { shape: cache, keys: &mut keys, values: &mut cached };
    cpu::rope_and_store(team, 25, tile, (&mut q, &mut k, &v), kv, prep);
    let mut out = vec![0.0; q.len()];
    let kv = cpu::KvView { shape: cache, keys: &keys, values: &cached };
    let mut scratch = cpu::AttentionScratch::default();
    cpu::attention(team, 25, tile, &q, kv, spec, (&mut scratch, &mut out));
    assert_close("q", &[q], &[rows(&want_q).concat()], 1e-5);
    assert_close("out", &[out], &[rows(&want).concat()], 1e-4);
}

/// A row's bits are the same in a long span, in a short one, and beside others.
#[test]
fn attention_does_not_depend_on_the_batch() {
    for (name, _) in devices(SHAPE).iter().filter(|(name, _)| *name != "cpu") {
        let of = |sequences: &[(usize, usize)]| {
            let kernels = devices(SHAPE).pop().unwrap().1;
            attended(kernels, SHAPE, Form::plain(SHAPE), sequences).swap_remove(0).1
        };
        let long = of(&[(0, 600)]);
        assert_eq!(of(&[(590, 10)]), long[590..], "{name}");
        assert_eq!(of(&[(599, 1), (0, 40), (300, 2)]), long[599..], "{name}");
        assert_eq!(of(&[(256, 100)]), long[256..356], "{name}");
    }
}

/// Adapters of many ranks on some rows, in pieces that are no multiple of anything, and rows without one.
#[test]
fn batched_adapters() {
    let want = adapted(Box::new(Reference::new(&Device::Cpu)), &[1, 3, 9, 20, 2]);
    for (name, kernels) in devices(SHAPE) {
        let got = adapted(kernels, &[1, 3, 9, 20, 2]);
        for (site, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_close(&format!("{name} site {site}"), got, want, 1e-4);
            assert_eq!(got[..1], want[..1], "{name}: a row without an adapter keeps its bits");
        }
        if name != "cpu" {
            let alone = adapted(devices(SHAPE).pop().unwrap().1, &[1, 3, 1]);
            alone.iter().zip(&got).for_each(|(a, b)| assert_eq!(a[..5], b[..5], "the same bits in every batch"));
        }
    }
}

/// y of two sites (576 to 200, and 64 to 33), for spans of these lengths: the first of the base, then adapters in turn.
/// The last adapter leaves the second site alone.
fn adapted(mut kernels: Box<dyn TensorKernels>, lengths: &[usize]) -> Vec<Table> {
    let dims = [(576, 200), (64, 33)];
    let adapters: Vec<_> = [1, 8, 40, 16]
        .into_iter()
        .zip(1..)
        .map(|(rank, seed)| {
            let sites = dims
                .iter()
                .zip(0..)
                .map(|(dims, site)| (site == 0 || seed < 4).then(|| PackedSite::new(rank, *dims, seed * 10)));
            let sites: Vec<_> = sites.collect();
            let sites: Vec<_> = sites.iter().map(|site| site.as_ref().map(PackedSite::view)).collect();
            Arc::new(kernels.adapter(&sites).unwrap())
        })
        .collect();
    let ids = [0; 64];
    let batch = lengths.iter().enumerate().map(|(i, count)| Rows {
        ids: &ids[..*count],
        start: 0,
        blocks: &[0, 1, 2, 3],
        lora: i.checked_sub(1).map(|i| &adapters[i % adapters.len()]),
        wanted: 0,
    });
    let plan = plan(batch, SHAPE);
    kernels.upload(&plan).unwrap();
    let device = kernels.device().clone();
    let of_site = |(site, (inputs, outputs)): (usize, &(usize, usize))| {
        let x = tensor(values(plan.rows() * inputs, 50), *inputs, &device);
        let y = tensor(values(plan.rows() * outputs, 60), *outputs, &device);
        rows(&kernels.lora(&x, y, site, &plan).unwrap())
    };
    dims.iter().enumerate().map(of_site).collect()
}

/// A pair of random tensors, packed.
struct PackedSite {
    rank: usize,
    a: Vec<u16>,
    b: Vec<u16>,
}

impl PackedSite {
    fn new(rank: usize, (inputs, outputs): (usize, usize), seed: u32) -> Self {
        let bits = |x: f32| bf16::from_f32(x).to_bits();
        let a = values(inputs * rank, seed).into_iter().map(bits).collect();
        let b = values(outputs.next_multiple_of(OUT_TILE) * rank, seed + 1).into_iter().map(bits).collect();
        Self { rank, a, b }
    }

    fn view(&self) -> LoraPair<'_> {
        LoraPair { rank: self.rank, scale: 0.5, a: &self.a, b: &self.b }
    }
}

#[test]
fn the_best_id() {
    for (name, kernels) in devices(SHAPE) {
        let vocab = 49_152;
        let mut logits = values(5 * vocab, 9);
        (logits[777], logits[40_000]) = (2.0, 2.0);
        logits[vocab + 48_000] = 3.0;
        logits[2 * vocab + 5] = f32::NAN;
        logits[3 * vocab + 5] = f32::INFINITY;
        logits[4 * vocab..].fill(f32::NEG_INFINITY);
        let best = kernels.best(&tensor(logits, vocab, kernels.device())).unwrap();
        assert_eq!(
            best.iter().map(|best| best.id).collect::<Vec<_>>(),
            [Some(777), Some(48_000), None, None, None],
            "{name}"
        );
        let reference = Reference::new(&Device::Cpu);
        let mut logits = values(2 * vocab, 9);
        (logits[777], logits[40_000], logits[vocab + 48_000]) = (2.0, 2.0, 3.0);
        let want = reference.best(&tensor(logits, vocab, &Device::Cpu)).unwrap();
        best.iter().zip(&want).for_each(|(a, b)| assert!((a.logprob - b.logprob).abs() < 1e-5, "{name}: {a:?} {b:?}"));
    }
}
