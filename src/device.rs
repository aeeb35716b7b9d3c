//! The device that serves, the compute pool, and the arbiters of compute.

mod arbiter;

use std::str::FromStr;

use candle_core::Device;

use crate::error::{Error, Result};
pub use arbiter::{Arbiter, Compute, ServePermit, TrainPermit, YieldPoint};

/// Where the model serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceSpec {
    /// A GPU where the build and the machine have one, else the CPU.
    Auto,
    /// The processor, with the kernels of `kernels::cpu`.
    Cpu,
    /// The NVIDIA GPU of this number.
    Cuda(usize),
}

impl FromStr for DeviceSpec {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let bad = || Error::invalid("device", format!("{text:?} is none of auto, cpu, cuda:0, cuda:1, ..."));
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            _ => text.strip_prefix("cuda:").and_then(|n| n.parse().ok()).map(Self::Cuda).ok_or_else(bad),
        }
    }
}

impl DeviceSpec {
    /// The device to serve on, or an error that says what is missing.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(ordinal) => open_cuda(ordinal).map_err(|why| {
                Error::precondition("DEVICE_UNAVAILABLE", format!("cuda:{ordinal}"), format!("{why}, or --device cpu"))
            }),
            Self::Auto => Ok(open_cuda(0).unwrap_or_else(|why| {
                tracing::debug!(why, "serving on the CPU");
                Device::Cpu
            })),
        }
    }
}

/// Opens a GPU; else says what to do about it.
#[cfg(feature = "cuda")]
fn open_cuda(ordinal: usize) -> Result<Device, String> {
    // The driver and its libraries are looked for now, and where one is missing the lookup panics: that is no fault to be shown.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    // With a stream of its own: all threads then submit to the same one, in the order in which the arbiter lets them.
    let opened = std::panic::catch_unwind(|| Device::new_cuda_with_stream(ordinal));
    std::panic::set_hook(hook);
    match opened {
        Ok(Ok(device)) => Ok(device),
        Ok(Err(e)) => Err(format!("it cannot be opened ({e}); see what nvidia-smi says, take another one")),
        Err(_) => {
            Err("the NVIDIA driver or a CUDA library cannot be loaded; set LD_LIBRARY_PATH to where they are"
                .to_owned())
        }
    }
}

/// As above, in a build that knows no GPU.
#[cfg(not(feature = "cuda"))]
fn open_cuda(_ordinal: usize) -> Result<Device, String> {
    Err("this build has no CUDA; take one that was built with --features cuda".to_owned())
}

/// Makes the compute pool of `threads` workers: rayon's global pool, which candle's matmul uses too. The first call wins.
pub fn init_pool(threads: usize) {
    // An earlier call (another server in the same test process) has made the pool already; both share it.
    let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("compute-{i}")).build_global();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_parse() {
        assert_eq!("cuda:1".parse::<DeviceSpec>().unwrap(), DeviceSpec::Cuda(1));
        assert!("cuda".parse::<DeviceSpec>().is_err());
    }
}
