//! The kernels of an NVIDIA GPU, in CUDA C++ beside this file, compiled to machine code by `build.rs`.
//!
//! Everything runs on the device's one stream, in the order in which it is launched, and nothing waits for it but
//! [`Kernels::best`]: positions, places and tasks are read from one array in device memory that [`Kernels::upload`]
//! fills, so that a step can be captured as a graph. Shapes are checked before each launch. Every sum has an order that
//! depends on neither the batch nor its size; only [`Matmul::Int8`] breaks that.

mod launch;

use std::str::FromStr;

use candle_core::cuda_backend::cudarc::driver::{CudaFunction, CudaSlice, sys};
use candle_core::cuda_backend::{CudaDevice, WrapErr as _};
use candle_core::{Device, Tensor};
use half::{bf16, f16};

use self::launch::{Arg, Grid, address, int, launch, load, output, pointer, prepare, start_of};
use super::cpu::LoraPair;
use super::format::QType;
use super::spec::{Activation, AttentionSpec};
use super::tensors::{
    AttentionTask, Best, DeviceLora, DeviceMatrix, HeadPrep, HeadShape, KvLayer, LORA_ROWS, Places, Plan, TensorKernels,
};
use crate::error::{Error, Result};

/// Threads of kernels that leave their number open, and of each that does not.
const THREADS: u32 = 256;
const MATMUL_THREADS: u32 = 128;
const BEST_THREADS: u32 = 512;
const EXPAND_THREADS: u32 = 128;

/// Rows and outputs of a block of the matmul for few rows, and of the one for many.
const FEW: (usize, usize) = (8, 16);
const MANY: (usize, usize) = (64, 32);

/// Queries of a warp of attention, warps of a block that takes a long span, and keys of a tile.
const QUERIES: usize = 16;
const LONG_WARPS: u32 = 4;
const TILE: usize = 64;

/// Ranks of a block of the shrinking kernel, outputs of one of the expanding kernel, and bytes that the latter may
/// keep.
const SHRINK_RANKS: usize = 8;
const EXPAND_OUTPUTS: usize = 256;
const EXPAND_BYTES: usize = 48 * 1024;

/// Which multiplication is used, for measuring; `exact` where it is not set.
const MATMUL_VARIABLE: &str = "TENORA_CUDA_MATMUL";

/// How frozen matrices are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Matmul {
    /// Our kernel: weights and activations in tf32, a row's bits independent of the batch.
    Exact,
    /// candle's: activations rounded to int8 in blocks of 32, other kernels and other bits for 1 to 4, 5 to 8 and more
    /// rows.
    Int8,
}

impl FromStr for Matmul {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "exact" => Ok(Self::Exact),
            "int8" => Ok(Self::Int8),
            _ => Err(Error::Unavailable(format!("{MATMUL_VARIABLE} is {name:?}, neither exact nor int8"))),
        }
    }
}

/// A device's kernels, and the batch they work on.
#[derive(Debug)]
pub struct Kernels {
    candle: Device,
    device: CudaDevice,
    functions: Functions,
    multiply: Matmul,
    batch: Batch,
}

#[derive(Debug)]
struct Functions {
    rms_norm: CudaFunction,
    swiglu: CudaFunction,
    geglu: CudaFunction,
    add: CudaFunction,
    gather: CudaFunction,
    rotate_and_store: CudaFunction,
    attention_short: CudaFunction,
    attention_long: CudaFunction,
    combine: CudaFunction,
    lora_shrink: CudaFunction,
    lora_expand: CudaFunction,
    best: CudaFunction,
    formats: Vec<Format>,
}

/// What reads one block format.
#[derive(Debug)]
struct Format {
    qtype: QType,
    few: CudaFunction,
    many: CudaFunction,
    embed: CudaFunction,
}

/// The packed plan, here and on the device, and where its parts lie.
#[derive(Debug)]
struct Batch {
    host: Vec<u32>,
    device: CudaSlice<u32>,
    places: Places,
}

/// The parts of a plan, as [`Places`] orders them.
#[derive(Debug, Clone, Copy)]
enum Part {
    Ids,
    Positions,
    Slots,
    Sequences,
    Blocks,
    Wanted,
    AttentionTasks,
    Adapted,
    LoraTasks,
}

impl Batch {
    fn address(&self, part: Part) -> Arg {
        self.at(part, 0)
    }

    /// So many words into a part.
    fn at(&self, part: Part, word: usize) -> Arg {
        let word = self.places[part as usize].start + word;
        Arg::Address(start_of(&self.device) + (word * size_of::<u32>()) as u64)
    }
}

/// The machine code of a source file.
macro_rules! code {
    ($name:literal) => {
        include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".cubin"))
    };
}

impl Functions {
    fn load(device: &CudaDevice, dim: usize) -> Result<Self> {
        let names = ["rms_norm", "swiglu", "geglu", "add", "gather", "rotate_and_store"];
        let [rms_norm, swiglu, geglu, add, gather, rotate_and_store] = some(load(device, code!("rows"), &names)?)?;
        let names = [format!("attention_short_{dim}"), format!("attention_long_{dim}"), format!("combine_{dim}")];
        let [attention_short, attention_long, combine] =
            some(load(device, code!("attention"), &names.each_ref().map(String::as_str))?)?;
        let [lora_shrink, lora_expand] = some(load(device, code!("lora"), &["lora_shrink", "lora_expand"])?)?;
        let [best] = some(load(device, code!("sampling"), &["best"])?)?;
        let mut formats = Vec::new();
        for qtype in QType::ALL.iter().copied().filter(|qtype| qtype.has_cuda_kernels()) {
            let format = qtype.name().to_lowercase();
            let names = ["matmul_few", "matmul_many", "embed"].map(|kernel| format!("{kernel}_{format}"));
            let [few, many, embed] = some(load(device, code!("matmul"), &names.each_ref().map(String::as_str))?)?;
            formats.push(Format { qtype, few, many, embed });
        }
        for function in [&attention_short, &attention_long] {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, tile_bytes(dim) as i32).w()?;
        }
        Ok(Self {
            rms_norm,
            swiglu,
            geglu,
            add,
            gather,
            rotate_and_store,
            attention_short,
            attention_long,
            combine,
            lora_shrink,
            lora_expand,
            best,
            formats,
        })
    }
}

fn some<const N: usize>(functions: Vec<CudaFunction>) -> Result<[CudaFunction; N]> {
    functions.try_into().map_err(|_| Error::internal("a module holds other kernels"))
}

/// Bytes of two stages of keys and values, each row padded by 16 bytes.
fn tile_bytes(dim: usize) -> usize {
    2 * 2 * TILE * (dim + 8) * size_of::<f16>()
}

/// Fails where tensors are not as a kernel takes them.
fn check(fits: bool, kernel: &str) -> Result<()> {
    if fits { Ok(()) } else { Err(Error::internal(format!("{kernel}: the shapes do not fit"))) }
}

impl Kernels {
    /// Loads the kernels for a model's heads. Fails for heads that are not 64 or 128 wide, and on a GPU of another
    /// generation.
    pub fn new(device: &CudaDevice, shape: HeadShape) -> Result<Self> {
        if ![64, 128].contains(&shape.head_dim) || !shape.heads.is_multiple_of(shape.kv_heads) {
            let message = format!(
                "has {} heads of {} over {} KV heads; a GPU serves heads of 64 and 128, in equal groups; take --device cpu",
                shape.heads, shape.head_dim, shape.kv_heads
            );
            return Err(Error::UnsupportedBase(message));
        }
        prepare(device)?;
        let multiply = match std::env::var(MATMUL_VARIABLE) {
            Ok(name) => name.parse()?,
            Err(_) => Matmul::Exact,
        };
        Ok(Self {
            candle: Device::Cuda(device.clone()),
            functions: Functions::load(device, shape.head_dim)?,
            multiply,
            batch: Batch { host: Vec::new(), device: device.alloc_zeros(1)?, places: Default::default() },
            device: device.clone(),
        })
    }

    /// The quantised bytes.
    fn matrix(&self, matrix: &DeviceMatrix) -> Result<Arg> {
        Ok(Arg::Address(matrix.tensor().device_ptr()? as u64))
    }

    fn format(&self, matrix: &DeviceMatrix) -> Result<&Format> {
        let found = self.functions.formats.iter().find(|format| format.qtype == matrix.qtype);
        found.ok_or_else(|| Error::internal("a matrix has a format that the kernels do not read"))
    }

    /// An elementwise kernel, four values a thread, its result in `x`.
    fn each(&self, function: &CudaFunction, x: Tensor, y: &Tensor) -> Result<Tensor> {
        let len = x.elem_count();
        check(x.dims() == y.dims() && len.is_multiple_of(4), "elementwise")?;
        let quads = u32::try_from(len / 4).map_err(Error::internal)?;
        let grid = Grid::new([(quads as usize).div_ceil(THREADS as usize), 1, 1], THREADS);
        let args = [address::<f32>(&x)?, address::<f32>(y)?, Arg::Count(quads)];
        // SAFETY: both hold four times `quads` values, and the kernel goes no further.
        unsafe { launch(&self.device, function, grid, &args) }?;
        Ok(x)
    }

    /// Attention of the tasks from `first` on.
    fn attend(
        &self,
        of: &Attention<'_>,
        function: &CudaFunction,
        first: usize,
        grid: Grid,
        out: &Tensor,
    ) -> Result<()> {
        let (shape, form) = (of.kv.shape, Form::new(of.spec)?);
        let tasks = self.batch.at(Part::AttentionTasks, first * size_of::<AttentionTask>() / size_of::<u32>());
        let args = [
            address::<f32>(of.q)?,
            address::<f16>(&of.kv.keys)?,
            address::<f16>(&of.kv.values)?,
            self.batch.address(Part::Blocks),
            int(shape.block_tokens)?,
            address::<f32>(out)?,
            tasks,
            self.batch.address(Part::Sequences),
            int(shape.heads)?,
            int(shape.kv_heads)?,
            Arg::Float(form.scale),
            Arg::Float(form.cap),
            form.window,
        ];
        // SAFETY: the plan's tasks, sequences and blocks stay within its rows and the cache, as its caller has checked;
        // `q` has those rows, and `out` is as large as the grid writes.
        unsafe { launch(&self.device, function, Grid { shared: tile_bytes(shape.head_dim), ..grid }, &args) }
    }
}

/// What attention reads.
struct Attention<'a> {
    q: &'a Tensor,
    spec: &'a AttentionSpec,
    kv: &'a KvLayer,
}

/// A layer's attention as the kernels take it: scores are exponents of 2.
struct Form {
    /// Of the products: with a cap they are what tanh takes.
    scale: f32,
    /// What tanh of a product is multiplied with, 0 for none.
    cap: f32,
    window: Arg,
}

impl Form {
    fn new(spec: &AttentionSpec) -> Result<Self> {
        let (scale, cap) = match spec.softcap {
            Some(cap) => (spec.scale / cap, cap * std::f32::consts::LOG2_E),
            None => (spec.scale * std::f32::consts::LOG2_E, 0.0),
        };
        // A window that is wider than any context shows all.
        let window = spec.window.map_or(i32::MAX, |window| i32::try_from(window).unwrap_or(i32::MAX));
        check(window > 0, "attention")?;
        Ok(Self { scale, cap, window: Arg::Int(window) })
    }
}

impl TensorKernels for Kernels {
    fn device(&self) -> &Device {
        &self.candle
    }

    fn upload(&mut self, plan: &Plan) -> Result<()> {
        let batch = &mut self.batch;
        batch.places = plan.pack(&mut batch.host);
        let len = batch.host.len();
        if batch.device.len() < len {
            batch.device = self.device.alloc_zeros(len.next_power_of_two())?;
        }
        self.device.memcpy_htod(&batch.host, &mut batch.device.slice_mut(..len))?;
        Ok(())
    }

    fn embed(&self, embedding: &DeviceMatrix, plan: &Plan) -> Result<Tensor> {
        let out = output(&self.device, (plan.rows(), embedding.cols))?;
        let args =
            [self.matrix(embedding)?, self.batch.address(Part::Ids), address::<f32>(&out)?, int(embedding.cols)?];
        let grid = Grid::new([plan.rows(), 1, 1], THREADS);
        // SAFETY: the ids are below the vocabulary, as the plan's caller has checked, and `out` has a row for each.
        unsafe { launch(&self.device, &self.format(embedding)?.embed, grid, &args) }?;
        Ok(out)
    }

    fn matmul(&self, x: &Tensor, matrix: &DeviceMatrix) -> Result<Tensor> {
        if self.multiply == Matmul::Int8 {
            return matrix.forward(x);
        }
        let (rows, inputs) = x.dims2()?;
        check(inputs == matrix.cols, "matmul")?;
        let out = output(&self.device, (rows, matrix.rows))?;
        let format = self.format(matrix)?;
        let (function, (row_tile, out_tile)) = if rows <= FEW.0 { (&format.few, FEW) } else { (&format.many, MANY) };
        let grid = Grid::new([matrix.rows.div_ceil(out_tile), rows.div_ceil(row_tile), 1], MATMUL_THREADS);
        let args = [
            self.matrix(matrix)?,
            address::<f32>(x)?,
            address::<f32>(&out)?,
            int(rows)?,
            int(matrix.rows)?,
            int(inputs)?,
        ];
        // SAFETY: the matrix has `rows` rows of `inputs` values in its format, whole blocks of 32; x and out are as the
        // arguments say.
        unsafe { launch(&self.device, function, grid, &args) }?;
        Ok(out)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        check(weight.dims() == [width], "rms_norm")?;
        let out = output(&self.device, (rows, width))?;
        let args = [address::<f32>(x)?, address::<f32>(weight)?, address::<f32>(&out)?, int(width)?, Arg::Float(eps)];
        // SAFETY: one block a row of x and of out, and the weight is as wide.
        unsafe { launch(&self.device, &self.functions.rms_norm, Grid::new([rows, 1, 1], THREADS), &args) }?;
        Ok(out)
    }

    fn gated(&self, activation: Activation, gate: Tensor, up: &Tensor) -> Result<Tensor> {
        let function = match activation {
            Activation::Silu => &self.functions.swiglu,
            Activation::GeluTanh => &self.functions.geglu,
        };
        self.each(function, gate, up)
    }

    fn add(&self, x: Tensor, y: &Tensor) -> Result<Tensor> {
        self.each(&self.functions.add, x, y)
    }

    fn rotate_and_store(
        &self,
        (q, k, v): (Tensor, &Tensor, &Tensor),
        prep: HeadPrep<'_>,
        kv: &KvLayer,
        plan: &Plan,
    ) -> Result<Tensor> {
        let (shape, rows) = (kv.shape, plan.rows());
        let (width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let half = prep.rope.map_or(Ok(0), |rope| rope.cos.dim(1))?;
        let tables = prep.rope.is_none_or(|rope| rope.cos.dims() == rope.sin.dims()) && 2 * half <= shape.head_dim;
        let fits = q.dims() == [rows, width] && k.dims() == [rows, kv_width] && v.dims() == [rows, kv_width];
        check(fits && tables, "rotate_and_store")?;
        let (mut q, mut k) = (q, k.clone());
        if let Some(norms) = prep.norms {
            let normed = |x: &Tensor, weight: &Tensor| -> Result<Tensor> {
                let heads = x.reshape((x.elem_count() / shape.head_dim, shape.head_dim))?;
                Ok(self.rms_norm(&heads, weight, norms.eps)?.reshape(x.dims())?)
            };
            (q, k) = (normed(&q, norms.q)?, normed(&k, norms.k)?);
        }
        let [cos, sin] = match prep.rope {
            Some(rope) => [address::<f32>(&rope.cos)?, address::<f32>(&rope.sin)?],
            None => [Arg::Address(0); 2],
        };
        let args = [
            address::<f32>(&q)?,
            address::<f32>(&k)?,
            address::<f32>(v)?,
            address::<f16>(&kv.keys)?,
            address::<f16>(&kv.values)?,
            cos,
            sin,
            prep.q_factors.map_or(Ok(Arg::Address(0)), address::<f32>)?,
            self.batch.address(Part::Positions),
            self.batch.address(Part::Slots),
            int(shape.heads)?,
            int(shape.kv_heads)?,
            int(shape.head_dim)?,
            int(half)?,
        ];
        // SAFETY: positions lie within the tables and slots within the cache, as the plan's caller has checked; no two
        // rows share a slot.
        unsafe { launch(&self.device, &self.functions.rotate_and_store, Grid::new([rows, 1, 1], THREADS), &args) }?;
        Ok(q)
    }

    fn attention(&self, q: &Tensor, spec: &AttentionSpec, kv: &KvLayer, plan: &Plan) -> Result<Tensor> {
        let (shape, [short, long]) = (kv.shape, plan.attention_tasks());
        let out = output(&self.device, (plan.rows(), shape.heads * shape.head_dim))?;
        check(q.dims() == out.dims() && spec.heads == shape.heads, "attention")?;
        let of = Attention { q, spec, kv };
        if short > 0 {
            let [all, most] = plan.partitions();
            let partial = output(&self.device, (all * shape.kv_heads * QUERIES, shape.head_dim + 2))?;
            let grid = Grid::new([short, shape.kv_heads, most], 32);
            self.attend(&of, &self.functions.attention_short, 0, grid, &partial)?;
            let args = [
                address::<f32>(&partial)?,
                address::<f32>(&out)?,
                self.batch.address(Part::AttentionTasks),
                self.batch.address(Part::Sequences),
                int(shape.heads)?,
                int(shape.kv_heads)?,
                Form::new(spec)?.window,
            ];
            let grid = Grid::new([short, shape.kv_heads, QUERIES], shape.head_dim as u32);
            // SAFETY: the kernel above has written every partition that this one reads, none before a window, and `out` has the plan's rows.
            unsafe { launch(&self.device, &self.functions.combine, grid, &args) }?;
        }
        let grid = Grid::new([long, shape.kv_heads, 1], 32 * LONG_WARPS);
        self.attend(&of, &self.functions.attention_long, short, grid, &out)?;
        Ok(out)
    }

    fn lora(&self, x: &Tensor, y: Tensor, site: usize, plan: &Plan) -> Result<Tensor> {
        if !plan.adapts(site) {
            return Ok(y);
        }
        let ((rows, inputs), (out_rows, outputs), rank) = (x.dims2()?, y.dims2()?, plan.rank());
        let shared = LORA_ROWS * rank * size_of::<f32>();
        let fits = rows == plan.rows() && out_rows == rows && plan.lora_fits(site, inputs, outputs);
        check(fits && inputs.is_multiple_of(2) && shared <= EXPAND_BYTES, "lora")?;
        let [adapted, tasks] = plan.lora_tasks();
        let shrunk = output(&self.device, (adapted, rank))?;
        let args = |x: &Tensor, width: usize, to: &Tensor| -> Result<[Arg; 7]> {
            Ok([
                address::<f32>(x)?,
                self.batch.address(Part::LoraTasks),
                self.batch.address(Part::Adapted),
                int(site)?,
                int(width)?,
                address::<f32>(to)?,
                int(rank)?,
            ])
        };
        let grid = Grid::new([tasks, rank.div_ceil(SHRINK_RANKS), 1], THREADS);
        // SAFETY: each task's adapter has descriptors of all sites and tensors of this one's shape; the plan keeps both
        // alive.
        unsafe { launch(&self.device, &self.functions.lora_shrink, grid, &args(x, inputs, &shrunk)?) }?;
        let grid = Grid { shared, ..Grid::new([tasks, outputs.div_ceil(EXPAND_OUTPUTS), 1], EXPAND_THREADS) };
        // SAFETY: as above; what the kernel reads of `shrunk` and does not use may be unwritten.
        unsafe { launch(&self.device, &self.functions.lora_expand, grid, &args(&shrunk, outputs, &y)?) }?;
        Ok(y)
    }

    fn select(&self, x: &Tensor, plan: &Plan) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        check(rows == plan.rows(), "select")?;
        let out = output(&self.device, (plan.wanted(), width))?;
        let args = [address::<f32>(x)?, self.batch.address(Part::Wanted), address::<f32>(&out)?, int(width)?];
        // SAFETY: the wanted rows are rows of the plan, which are those of x.
        unsafe { launch(&self.device, &self.functions.gather, Grid::new([plan.wanted(), 1, 1], THREADS), &args) }?;
        Ok(out)
    }

    fn best(&self, logits: &Tensor) -> Result<Vec<Best>> {
        let (rows, vocab) = logits.dims2()?;
        let found = self.device.alloc_zeros::<u32>(2 * rows)?;
        let args = [address::<f32>(logits)?, int(vocab)?, Arg::Address(start_of(&found))];
        // SAFETY: one block a row, and two words of `found` for each.
        unsafe { launch(&self.device, &self.functions.best, Grid::new([rows, 1, 1], BEST_THREADS), &args) }?;
        let found = self.device.clone_dtoh(&found)?;
        let best =
            |[id, logprob]: &[u32; 2]| Best { id: (*id != u32::MAX).then_some(*id), logprob: f32::from_bits(*logprob) };
        Ok(found.as_chunks().0.iter().map(best).collect())
    }

    fn adapter(&self, sites: &[Option<LoraPair<'_>>]) -> Result<DeviceLora> {
        let lora = DeviceLora::new(sites, &self.candle)?;
        let words = lora.descriptors(pointer::<bf16>(lora.values())?);
        let len = words.len();
        let descriptors = Tensor::from_vec(words, len, &self.candle)?;
        Ok(lora.described(pointer::<u32>(&descriptors)?, descriptors))
    }
}
