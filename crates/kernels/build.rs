//! Compiles the kernels for a GPU with nvcc, for the feature `cuda`, to machine code of one GPU generation.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Sources in `src/cuda`, each to a module of its own.
const KERNELS: [&str; 5] = ["attention", "lora", "matmul", "rows", "sampling"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some() {
        compile_kernels(&PathBuf::from(std::env::var("OUT_DIR")?))?;
    }
    Ok(())
}

/// `NVCC` or `CUDA_HOME` says where the compiler is, `CUDA_COMPUTE_CAP` for which GPU (90: Hopper).
fn compile_kernels(out: &Path) -> Result<(), Box<dyn Error>> {
    for variable in ["NVCC", "CUDA_HOME", "CUDA_COMPUTE_CAP"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed=src/cuda");
    let in_home = |home| Path::new(&home).join("bin/nvcc");
    let nvcc = std::env::var_os("NVCC").map(PathBuf::from).or_else(|| std::env::var_os("CUDA_HOME").map(in_home));
    let nvcc = nvcc.unwrap_or_else(|| "nvcc".into());
    let capability = std::env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "90".to_owned());
    println!("cargo:rustc-env=TENORA_COMPUTE_CAP={capability}");
    for name in KERNELS {
        let status = Command::new(&nvcc)
            .args(["-cubin", "-O3", "-std=c++17", &format!("-arch=sm_{capability}"), "-o"])
            .arg(out.join(name).with_extension("cubin"))
            .arg(Path::new("src/cuda").join(name).with_extension("cu"))
            .status()
            .map_err(|e| format!("cannot run {}: {e}; scripts/build-cuda brings a compiler", nvcc.display()))?;
        if !status.success() {
            return Err(format!("{} cannot compile src/cuda/{name}.cu", nvcc.display()).into());
        }
    }
    Ok(())
}
