//! The whole server in this process, on a free port, with the tiny model: what a client sees, and what is left behind.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test fails by them")]

mod server {
    mod adapter_files;
    mod auth;
    mod backup;
    mod base;
    mod bench;
    mod cancel;
    mod common;
    mod datasets;
    mod drain;
    mod errors;
    mod fairness;
    mod faults;
    mod imports;
    mod killed;
    mod limits;
    mod load;
    mod loading;
    mod logs;
    mod metrics;
    mod reflection;
    mod residency;
    mod safety;
    mod sampling;
    mod scheduling;
    mod stored;
    mod swap;
    mod tenants;
    mod tls;
    mod traces;
    mod training;
}
