//! Every kind of adapter against PEFT's values: what its own files score, served and in float32, and how it is trained from fixed starts.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tenora::adapter::Adapter;
use tenora::api::proto::{ScoreInput, ScoreRequest, TokenIds, score_input};
use tenora::data::Examples;
use tenora::device::DeviceSpec;
use tenora::model::{LoadOptions, Model};
use tenora::request::Objective;
use tenora::train::plan::plan;

use super::{adapter, assert_steps, base, entries, exact, example, file, floats, ids, served_name, train};

#[test]
fn the_float32_reference_gives_the_golden_logprobs_of_every_kind() {
    let Some(tuners) = file("tuners.json") else { return };
    let mut seen = 0;
    for (name, entry) in entries(&tuners) {
        let (adapter, ids) = (adapter(name), ids(&entry["ids"]));
        let wanted: Vec<_> = (0..ids.len() - 1).map(|i| (0, i)).collect();
        let logprobs = base().0.token_logprobs(&[&ids], &wanted, exact(adapter.as_ref())).expect("scores");
        for (i, (got, want)) in logprobs.iter().zip(floats(&entry["logprobs"])).enumerate() {
            assert!((f64::from(*got) - want).abs() <= 2e-3, "{name} {i}: {got} {want}");
        }
        seen += 1;
    }
    assert!(seen > 0);
}

/// Imported through the gate, scored alone and then all at once with the base, in one batch: the same bits, close to PEFT's.
#[tokio::test(flavor = "multi_thread")]
async fn every_kind_is_served_beside_the_others_as_alone() {
    let Some(tuners) = file("tuners.json") else { return };
    let mut served: BTreeMap<String, Value> = tuners.as_object().expect("an object").clone().into_iter().collect();
    let (server, key) = super::serve(&json!(served)).await;
    let client = server.generation(&key).await;
    let score = |name: &str, list: &Value| {
        let inputs = list.as_array().expect("a list").iter().map(|entry| {
            let sequence = score_input::Sequence::TokenIds(TokenIds { ids: ids(&entry["ids"]) });
            ScoreInput { sequence: Some(sequence) }
        });
        let request = ScoreRequest { adapter: served_name(name), inputs: inputs.collect(), ..Default::default() };
        let mut client = client.clone();
        async move { client.score(request).await.expect("scores").into_inner().results }
    };
    let mut alone = BTreeMap::new();
    // The base beside them, on sequences of one of them.
    let of_base = served.values().next().expect("an adapter").clone();
    served.insert("base".to_owned(), of_base);
    let all = || served.iter();
    for (name, list) in all() {
        alone.insert(name.clone(), score(name, list).await);
    }
    let together = futures::future::join_all(all().map(|(name, list)| score(name, list))).await;
    for ((name, list), together) in all().zip(together) {
        assert_eq!(alone[name], together, "{name}: bits depend on the batch");
        if name == "base" {
            continue;
        }
        let golden = list.as_array().expect("a list").iter().flat_map(|entry| floats(&entry["logprobs"]));
        let scored = together.iter().flat_map(|result| result.logprobs.iter().map(|token| f64::from(token.logprob)));
        let differences: Vec<f64> = golden.zip(scored).map(|(want, got)| (want - got).abs()).collect();
        let mean = differences.iter().sum::<f64>() / differences.len() as f64;
        println!("{name:8} mean absolute difference {mean:.4} nats over {} tokens", differences.len());
        assert!(mean <= 0.02, "{name}: {mean}");
    }
}

/// The curves of `training.json`, on the examples and by the recipe of `sft.json`.
#[test]
fn every_kind_follows_its_golden_curve() {
    let (Some(training), Some(sft)) = (file("training.json"), file("sft.json")) else { return };
    let examples: Vec<_> = sft["examples"].as_array().expect("examples").iter().collect();
    let examples: Vec<_> =
        examples.iter().map(|e| example(&ids(&e["prompt_ids"]), &ids(&e["completion_ids"]))).collect();
    let of_kind = |(name, run): (&String, &Value)| name.starts_with("sft_").then(|| (name.clone(), run.clone()));
    let runs: Vec<(String, Value)> = training.as_object().expect("an object").iter().filter_map(of_kind).collect();
    assert!(!runs.is_empty());
    for (name, run) in runs {
        let mut recipe = sft["recipe"].clone();
        (recipe["lr"], recipe["init"]) = (run["lr"].clone(), run["start"].clone());
        let batch = recipe["batch"].as_u64().expect("a batch") as usize;
        let file = json!({"recipe": recipe, "curve": run["curve"]});
        let (outcome, steps) = train(&file, &Examples::Sft(examples.clone()), Objective::Sft, batch);
        println!("{name}");
        // Tokens that are free take large steps, and what is rounded is seen in those that follow.
        assert_steps(run["curve"].as_array().expect("a curve"), &steps, 0.02);
        check_after(&outcome.adapter, &examples[0], &floats(&run["after_completion_logprobs_of_example_0"]), &name);
    }
}

/// The log-probabilities of a completion after the training.
fn check_after(adapter: &Adapter, example: &tenora::text::Conversation, golden: &[f64], name: &str) {
    let wanted: Vec<_> = (1..example.ids.len()).filter(|i| example.in_loss[*i]).map(|i| (0, i - 1)).collect();
    let logprobs = base().0.token_logprobs(&[&example.ids], &wanted, exact(Some(adapter))).expect("scores");
    for (i, (got, want)) in logprobs.iter().zip(golden).enumerate() {
        assert!((f64::from(*got) - want).abs() <= 2e-2, "{name} after training, {i}: {got} {want}");
    }
}

/// QLoRA: the linear layers in NF4, made as the base is loaded. It serves, passes the gate, and learns.
#[tokio::test(flavor = "multi_thread")]
async fn an_nf4_base_serves_trains_and_passes_the_gate() {
    let (Some(sft), Some(tuners)) = (file("sft.json"), file("tuners.json")) else { return };
    let load = || {
        let path = tenora::bases::resolve(tenora::bases::DEFAULT, |_| {}).expect("the default base can be fetched");
        let options = LoadOptions { quantize: Some("nf4"), ..LoadOptions::default() };
        Model::load_watched(&path, &DeviceSpec::Cpu.open().expect("the CPU"), options, &mut |_, _| {})
            .expect("the default base loads")
    };
    let nf4 = std::thread::spawn(load).join().expect("loaded");
    // Of a base whose linear layers alone have changed, what has gone is theirs: 5 bits a weight with Q4_1's scales.
    let shape = nf4.0.shape();
    let of_block: usize = shape.linears.iter().map(|linear| linear.inputs * linear.outputs).sum();
    let weights = (of_block * shape.layers as usize) as f64;
    let saved = base().0.held_bytes() as f64 - nf4.0.held_bytes() as f64;
    let bits = 5.0 - 8.0 * saved / weights;
    println!("NF4: {bits:.3} bits a weight of the linear layers");
    assert!(bits <= 4.13, "{bits}");
    let mut losses = Vec::new();
    let conversations = sft["examples"].as_array().expect("examples").iter();
    let conversations: Vec<_> =
        conversations.map(|e| example(&ids(&e["prompt_ids"]), &ids(&e["completion_ids"]))).collect();
    let start = adapter("sft_init").expect("an adapter");
    let recipe = super::recipe(&sft["recipe"], 8, 4);
    let (train, validation) = (Examples::Sft(conversations), Examples::Sft(Vec::new()));
    let plan = plan(&nf4.0, &start, (&train, &validation), Objective::Sft, &recipe, u64::MAX).expect("it fits");
    let inputs = tenora::train::fit::FitInputs {
        model: &nf4.0,
        start: &start,
        reference: None,
        train: &train,
        validation: &validation,
        objective: Objective::Sft,
        recipe: &recipe,
        plan,
        optimizer_file: None,
        arbiter: &tenora::device::Arbiter::new(0.5),
        control: &tenora::train::fit::CancelToken::default(),
    };
    let mut observe = |event| {
        if let tenora::request::JobEvent::Step { loss, .. } = event {
            losses.push(loss);
        }
    };
    tenora::train::fit::fit(inputs, &mut observe).expect("the run ends well");
    // The same two batches take turns.
    assert!(losses[6] < losses[0] - 0.1 && losses[7] < losses[1] - 0.1, "{losses:?}");
    let server = super::TestServer::start_on(nf4, |config| config.limits = super::Limits::default()).await;
    let key = server.tenant("golden").await;
    for name in tuners.as_object().expect("an object").keys() {
        let imported = server.import(&key, "golden", name, &super::package(name)).await;
        let version = imported.unwrap_or_else(|e| panic!("{name} passes the gate: {e}"));
        let parity = version.parity.expect("the gate's figures");
        println!("{name:8} {:.4} nats between serving and training", parity.mean_abs_difference);
    }
}
