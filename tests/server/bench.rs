//! `tenora bench`, the program itself, against the tiny server.

use std::process::Output;

use serde_json::Value;
use tokio::process::Command;

use super::common::TestServer;

async fn bench(server: &TestServer, key: &str, line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tenora"));
    command.args(["bench", "--tenant", "a", "--server"]).arg(format!("http://{}", server.addr)).env("TENORA_KEY", key);
    command.args(line.split(' ')).output().await.unwrap()
}

async fn report(server: &TestServer, key: &str, line: &str) -> Value {
    let output = bench(server, key, line).await;
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn loads_are_answered_and_counted() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let closed =
        report(&server, &key, "--streams 3 --requests 7 --prompt-tokens 20 -n 5 --rounds 2 --warm-up --json").await;
    let rounds = closed["rounds"].as_array().unwrap();
    assert_eq!(rounds.len(), 2);
    for figures in rounds.iter().chain([&closed["median"]]) {
        let count = |name: &str| figures[name].as_f64().unwrap();
        assert_eq!([count("answered"), count("failed")], [7.0, 0.0]);
        assert_eq!([count("prompt_tokens"), count("generated_tokens")], [140.0, 35.0]);
        assert!(count("generated_per_second") > 0.0);
        for latency in ["first_token_ms", "between_tokens_ms", "end_to_end_ms"] {
            let at = |name: &str| figures[latency][name].as_f64().unwrap();
            assert!(0.0 < at("p50") && at("p50") <= at("p95") && at("p95") <= at("p99"), "{figures}");
        }
    }
    let open = report(&server, &key, "--rate 200 --requests 9 --prompt-tokens 8..16 -n 1..4 --seed 5 --json").await;
    assert_eq!((&open["seed"], open["median"]["answered"].as_f64()), (&5.into(), Some(9.0)));
    server.stopped().await;
}

/// Adapters of the tenant with the right names are taken as they are, each answers for itself, and a missing one is made.
#[tokio::test(flavor = "multi_thread")]
async fn adapters_are_asked_by_name() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    for seed in 0..3 {
        server.import(&key, "a", &format!("mine-{seed}"), &server.package(seed)).await.unwrap();
    }
    let spreads = ["identical", "distinct", "uniform", "zipf"];
    for spread in spreads {
        let line = format!("--streams 3 --adapters {spread} --adapter-prefix mine --prompt-tokens 9 -n 3 --json");
        assert_eq!(report(&server, &key, &line).await["median"]["answered"], 3.0, "{spread}");
    }
    // The fourth would have to be made, of a layer that the base does not have.
    let missing = "--streams 4 --adapters distinct --adapter-prefix mine --targets qkv_proj";
    let output = bench(&server, &key, missing).await;
    assert!(
        !output.status.success()
            && String::from_utf8_lossy(&output.stderr)
                .contains("the base has no qkv_proj; its linear layers are q_proj")
    );
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_counted_and_told() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let output = bench(&server, &key, "--streams 2 --prompt-tokens 100000 --rounds 1").await;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!output.status.success() && out.contains("2 failed: ") && err.contains("no request"), "{out}{err}");
    server.stopped().await;
}
