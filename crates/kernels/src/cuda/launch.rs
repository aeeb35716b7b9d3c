//! How a kernel is launched, and where tensors lie in device memory.

use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaSlice, DevicePtr as _, DeviceRepr, LaunchConfig, PushKernelArg as _, result, sys,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaDType, CudaDevice, CudaStorage, WrapErr as _};
use candle_core::op::BackpropOp;
use candle_core::{Shape, Storage, Tensor};

use crate::error::{Error, Result};

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub enum Arg {
    Address(u64),
    Int(i32),
    Count(u32),
    Float(f32),
}

/// How many blocks a kernel has, of how many threads, with how many bytes of memory of their own.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    pub blocks: [usize; 3],
    pub threads: u32,
    pub shared: usize,
}

impl Grid {
    pub fn new(blocks: [usize; 3], threads: u32) -> Self {
        Self { blocks, threads, shared: 0 }
    }
}

/// A number of rows, outputs and so on, as kernels take it.
pub fn int(n: usize) -> Result<Arg> {
    Ok(Arg::Int(i32::try_from(n).map_err(|_| Error::internal("a batch is too large for the kernels"))?))
}

/// Queues a kernel on the device's stream; does nothing for an empty grid.
///
/// # Safety
/// The arguments are those that the kernel takes, in its order, and every address reaches as far as the kernel goes
/// with this grid.
pub unsafe fn launch(device: &CudaDevice, function: &CudaFunction, grid: Grid, args: &[Arg]) -> Result<()> {
    let [x, y, z] = grid.blocks.map(|n| n as u32);
    if x == 0 || y == 0 || z == 0 {
        return Ok(());
    }
    let stream = device.cuda_stream();
    let mut builder = stream.launch_builder(function);
    for arg in args {
        match arg {
            Arg::Address(x) => builder.arg(x),
            Arg::Int(x) => builder.arg(x),
            Arg::Count(x) => builder.arg(x),
            Arg::Float(x) => builder.arg(x),
        };
    }
    let config =
        LaunchConfig { grid_dim: (x, y, z), block_dim: (grid.threads, 1, 1), shared_mem_bytes: grid.shared as u32 };
    // SAFETY: the caller vouches for the arguments; tensors that are dropped meanwhile are freed in the stream's order.
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

/// A module that `build.rs` has compiled.
pub fn load(device: &CudaDevice, code: &[u8], names: &[&str]) -> Result<Vec<CudaFunction>> {
    let stream = device.cuda_stream();
    let module = stream.context().load_module(Ptx::from_binary(code.to_vec())).map_err(|e| {
        let message = format!(
            "the kernels were compiled for compute capability {} ({e}); build again with the GPU's own in CUDA_COMPUTE_CAP",
            env!("TENORA_COMPUTE_CAP")
        );
        Error::Unavailable(message)
    })?;
    names.iter().map(|name| Ok(module.load_function(name).w()?)).collect()
}

/// Lets memory that steps free stay with the process, and tensors go without the events that only several streams would
/// need.
pub fn prepare(device: &CudaDevice) -> Result<()> {
    let stream = device.cuda_stream();
    let context = stream.context();
    // SAFETY: all work of this device is queued on its one stream, which is what makes tracking by events unnecessary.
    unsafe { device.disable_event_tracking() };
    if context.has_async_alloc() {
        let mut kept = u64::MAX;
        // SAFETY: the device is the context's own, and the attribute is a u64.
        unsafe {
            let pool = result::device::get_default_mem_pool(context.cu_device()).w()?;
            let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            result::mem_pool::set_attribute(pool, attribute, (&raw mut kept).cast()).w()?;
        }
    }
    Ok(())
}

/// Where a tensor's values begin, as a kernel takes it.
pub fn address<T: CudaDType + DeviceRepr>(tensor: &Tensor) -> Result<Arg> {
    Ok(Arg::Address(pointer::<T>(tensor)?))
}

/// Where a tensor's values begin. Fails where they are not `T`, contiguous, on a GPU.
pub fn pointer<T: CudaDType + DeviceRepr>(tensor: &Tensor) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { return Err(Error::internal("a tensor is not on the GPU")) };
    let Some((start, _)) = layout.contiguous_offsets() else {
        return Err(Error::internal("a tensor is not contiguous"));
    };
    Ok(start_of(storage.as_cuda_slice::<T>()?) + (start * size_of::<T>()) as u64)
}

/// Where a slice begins.
pub fn start_of<T>(slice: &CudaSlice<T>) -> u64 {
    slice.device_ptr(slice.stream()).0
}

/// A tensor whose values a kernel is about to write, all of them.
pub fn output(device: &CudaDevice, shape: impl Into<Shape>) -> Result<Tensor> {
    let shape = shape.into();
    // SAFETY: whoever asks launches a kernel that writes all of it before anything reads it.
    let slice = unsafe { device.alloc::<f32>(shape.elem_count()) }?;
    let storage = CudaStorage::wrap_cuda_slice(slice, device.clone());
    Ok(Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false))
}
