//! The CUDA kernels without a GPU: compiled for the CPU over an emulation of a block's threads (`tests/emulated`), and
//! held to sums in double precision, to the same bits in any batch, and to memory that holds no numbers where nothing
//! was written. Needs a C++ compiler: without one the tests say that they were skipped, and fail where `CI` is set.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test fails by them")]

use std::io::Write as _;
use std::path::Path;
use std::process::Command;

fn check(name: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let program = folder.path().join(name);
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let compiled = Command::new(&compiler)
        .args(["-std=c++20", "-O1", "-ffp-contract=off", "-Itests/emulated", "-Isrc/cuda", "-o"])
        .arg(&program)
        .arg(Path::new("tests/emulated").join(name).with_extension("cpp"))
        .status();
    match compiled {
        Err(error) => return skip(&format!("no C++ compiler ({compiler}: {error}); CXX names one")),
        Ok(status) => assert!(status.success(), "{name} compiles"),
    }
    let run = Command::new(&program).output().expect("the checks run");
    let said = String::from_utf8_lossy(&run.stdout);
    println!("{said}");
    assert!(run.status.success(), "{said}");
}

/// Says on the terminal, past what captures a test's output, that nothing was checked.
fn skip(why: &str) {
    let in_ci = std::env::var_os("CI").is_some_and(|set| !set.is_empty() && set != "false");
    assert!(!in_ci, "{why}");
    std::io::stderr().write_all(format!("cuda_kernels: skipped: {why}\n").as_bytes()).expect("standard error");
}

#[test]
fn attention() {
    check("attention");
}

#[test]
fn all_others() {
    check("rest");
}
