# What is done by hand while working on Tenora: `just` lists it. `.ci/run` is what must pass before anything lands.

# Lists the recipes.
default:
    @just --list

# Formats the code.
fmt:
    cargo fmt --all

# Formatting, lints and documentation, as CI checks them.
lint:
    cargo fmt --all --check
    cargo clippy --all-targets --locked -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --document-private-items --locked

# All tests. The first run fetches the default base.
test *ARGS:
    cargo test --release --locked {{ ARGS }}

# The tests that need no base: a few minutes less.
test-fast:
    cargo test --release --locked --lib --test architecture --test server --test fuzz

# The values of the reference implementation, on the default base.
golden:
    cargo test --release --locked --test golden -- --nocapture

# Every reader of foreign bytes over RUNS mutations of its corpus; `fuzz 100000 gguf` takes one of them.
fuzz RUNS="20000" TARGET="":
    TENORA_FUZZ_RUNS={{ RUNS }} {{ if TARGET == "" { "" } else { "TENORA_FUZZ_TARGET=" + TARGET } }} cargo test --release --locked --test fuzz -- --nocapture

# The kernels' speed and a roofline of the base's steps.
bench:
    cargo bench

# Compiles the CUDA kernels and the server for an NVIDIA GPU, without one.
cuda-check:
    scripts/build-cuda

# The documentation of the crate's modules.
docs:
    cargo doc --no-deps --document-private-items --open

# Licences, advisories and banned crates; needs cargo-deny.
deny:
    cargo deny check

# Crates in the build.
crates:
    cargo tree --locked -e normal,build --prefix none | sed 's/ (\*)//; s/ (proc-macro)//' | sort -u | wc -l
