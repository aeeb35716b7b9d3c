//! Compiles the protos without protoc.

use std::error::Error;
use std::path::PathBuf;

/// Where they are.
const FOLDER: &str = "../../proto";

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let protos = ["common", "base", "generation", "adapters", "datasets", "training", "safety", "tenants"]
        .map(|name| format!("{FOLDER}/tenora/v1/{name}.proto"));
    println!("cargo:rerun-if-changed={FOLDER}");
    let descriptors = protox::compile(protos, [FOLDER])?;
    std::fs::write(out.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
