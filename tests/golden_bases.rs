//! Small random bases of every architecture and block format against values made with transformers and peft: one table, every folder of
//! `tests/golden/bases`, or of what `TENORA_GOLDEN_BASES` names. What a folder holds: README there.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used, reason = "a test fails by them")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[path = "server/common.rs"]
#[expect(dead_code, reason = "the server's own tests use the rest")]
mod common;
#[path = "golden/values.rs"]
mod values;

use common::TestServer;
use futures::StreamExt as _;
use serde_json::Value;
use tenora::adapter::peft::{CONFIG_FILE, Package, SizeLimits, TENSORS_FILE};
use tenora::adapter::{Adapter, PackedAdapter};
use tenora::api::proto::{ExportAdapterRequest, export_adapter_response};
use tenora::data::Examples;
use tenora::device::Arbiter;
use tenora::kernels::log_sum_exp;
use tenora::model::Model;
use tenora::model::batch::{KvDtype, KvLayout, Readout, SequenceChunk};
use tenora::model::traced::{ForwardOptions, Products};
use tenora::request::{JobEvent, Objective};
use tenora::text::{Conversation, Text};
use tenora::train::fit::{CancelToken, FitInputs, fit};
use tenora::train::plan::plan;
use values::{floats, ids, recipe};

/// Of every log-probability on the float32 path, nats.
const FLOAT_BOUND: f64 = 2e-3;
/// Of every loss of the training curve.
const LOSS_BOUND: f64 = 1e-3;
/// In the mean on the serving path, nats.
const SERVING_BOUND: f64 = 0.02;

fn folders() -> Vec<PathBuf> {
    let all = std::env::var_os("TENORA_GOLDEN_BASES").map_or_else(|| "tests/golden/bases".into(), PathBuf::from);
    let entries = std::fs::read_dir(&all).unwrap_or_else(|e| panic!("{}: {e}", all.display()));
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
    folders.sort();
    assert!(!folders.is_empty(), "{} holds no bases", all.display());
    folders
}

/// One base with its values.
struct Base {
    model: Arc<Model>,
    text: Arc<Text>,
    values: Value,
    folder: PathBuf,
}

/// A sequence with the log-probabilities of its tokens, on the base or with an adapter.
struct Scored {
    adapter: Option<String>,
    ids: Vec<u32>,
    logprobs: Vec<f64>,
}

impl Base {
    /// The base in the folder of its values.
    fn load(folder: &Path) -> Self {
        Self::load_from(&folder.join("base.gguf"), folder)
    }

    fn load_from(file: &Path, folder: &Path) -> Self {
        let (model, text) =
            Model::load(file, &candle_core::Device::Cpu, None).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let values = std::fs::read(folder.join("values.json")).expect("values.json");
        Self { model, text, values: serde_json::from_slice(&values).expect("values"), folder: folder.to_owned() }
    }

    fn package(&self, name: &str) -> Package {
        values::package(&self.folder.join(name))
    }

    fn adapter(&self, name: &str) -> Adapter {
        self.package(name)
            .read(self.model.shape(), SizeLimits::NONE)
            .unwrap_or_else(|e| panic!("{}: {e}", self.folder.display()))
    }

    /// Of the adapter, and of others that some bases have.
    fn adapters(&self) -> impl Iterator<Item = (&str, &Value)> {
        let others = self.values.get("others").and_then(Value::as_object).into_iter().flatten();
        std::iter::once(("adapter", &self.values["adapter"])).chain(others.map(|(name, list)| (name.as_str(), list)))
    }

    /// On the base, and with each adapter.
    fn scored(&self) -> Vec<Scored> {
        let of = |(adapter, list): (Option<&str>, &Value)| {
            let adapter = adapter.map(str::to_owned);
            let entries = list.as_array().expect("a list").clone().into_iter();
            entries.map(move |entry| Scored {
                adapter: adapter.clone(),
                ids: ids(&entry["ids"]),
                logprobs: floats(&entry["logprobs"]),
            })
        };
        let adapted = self.adapters().map(|(name, list)| (Some(name), list));
        std::iter::once((None, &self.values["base"])).chain(adapted).flat_map(of).collect()
    }

    /// The largest difference on the float32 path.
    fn float_difference(&self) -> f64 {
        let differences = self.scored().into_iter().flat_map(|scored| {
            let wanted: Vec<_> = (0..scored.ids.len() - 1).map(|i| (0, i)).collect();
            let adapter = scored.adapter.as_ref().map(|name| self.adapter(name));
            let adapter = adapter.as_ref();
            let exact = ForwardOptions { adapter, products: Products::Exact, ..ForwardOptions::default() };
            let logprobs = self.model.token_logprobs(&[&scored.ids], &wanted, exact).expect("scores");
            differences(&logprobs, &scored.logprobs)
        });
        differences.fold(0.0, f64::max)
    }

    /// The mean difference on the serving path, where the sequences are served together, in chunks; each must be, to the bit, what it is
    /// alone and whole.
    fn serving_difference(&self) -> f64 {
        let packed = |(name, _): (&str, &Value)| {
            let adapter = self.adapter(name);
            let norms = self.model.row_norms(&adapter, None);
            (name.to_owned(), Arc::new(PackedAdapter::new(&adapter, self.model.shape(), &norms).expect("it fits")))
        };
        let adapters: Packed = self.adapters().map(packed).collect();
        let scored = self.scored();
        let (mut sum, mut count) = (0.0, 0);
        let together = self.served(&scored, &adapters, 13);
        for (one, together) in scored.into_iter().zip(together) {
            let [alone] = &self.served(&[one], &adapters, usize::MAX)[..] else { panic!("one") };
            assert!(
                alone.0.iter().zip(&together.0).all(|(a, b)| a.to_bits() == b.to_bits()),
                "{}: bits depend on the batch",
                self.folder.display()
            );
            let differences = differences(&together.1, &together.2);
            (sum, count) = (sum + differences.iter().sum::<f64>(), count + differences.len());
        }
        sum / count as f64
    }

    /// Of each sequence its logits, the log-probabilities of its tokens, and the golden ones.
    fn served(&self, scored: &[Scored], adapters: &Packed, chunk: usize) -> Vec<(Vec<f32>, Vec<f32>, Vec<f64>)> {
        let longest = scored.iter().map(|scored| scored.ids.len()).max().expect("sequences");
        let of_each = longest.div_ceil(16);
        let layout = KvLayout { block_tokens: 16, blocks: of_each * scored.len(), dtype: KvDtype::F16 };
        let mut exec = self.model.executor(layout).expect("an executor");
        let tables: Vec<Vec<u32>> =
            (0..scored.len()).map(|i| (0..of_each).map(|b| (b * scored.len() + i) as u32).collect()).collect();
        let mut logits: Vec<Vec<f32>> = vec![Vec::new(); scored.len()];
        for start in (0..longest).step_by(chunk.min(longest)) {
            let living: Vec<usize> = (0..scored.len()).filter(|i| scored[*i].ids.len() > start).collect();
            let spans: Vec<_> = living
                .iter()
                .map(|&i| {
                    let Scored { adapter, ids, .. } = &scored[i];
                    let ids = &ids[start..ids.len().min(start.saturating_add(chunk))];
                    let adapter = adapter.as_ref().map(|name| &adapters[name]);
                    SequenceChunk { ids, start, blocks: &tables[i], adapter, logits: Readout::All }
                })
                .collect();
            let rows = exec.forward(&spans).expect("a forward");
            let mut at = 0;
            for (i, span) in living.iter().zip(&spans) {
                let len = span.ids.len() * self.model.vocab_size();
                logits[*i].extend(&rows[at..at + len]);
                at += len;
            }
        }
        let of = |(logits, scored): (Vec<f32>, &Scored)| {
            let rows = logits.chunks_exact(self.model.vocab_size()).zip(&scored.ids[1..]);
            let logprobs = rows.map(|(row, id)| (f64::from(row[*id as usize]) - log_sum_exp(row)) as f32).collect();
            (logits, logprobs, scored.logprobs.clone())
        };
        logits.into_iter().zip(scored).map(of).collect()
    }

    /// The largest difference of a loss when it is trained as the values were.
    fn loss_difference(&self) -> f64 {
        let sft = &self.values["sft"];
        let from = ids(&sft["loss_from"]);
        let examples = sft["examples"].as_array().expect("examples").iter().zip(from).map(|(example, from)| {
            let ids = ids(example);
            let in_loss = (0..ids.len()).map(|i| i >= from as usize).collect();
            Conversation { ids, in_loss }
        });
        let examples: Vec<_> = examples.collect();
        let curve = sft["curve"].as_array().expect("a curve");
        let recipe = &recipe(sft, curve.len(), examples.len());
        let (arbiter, control) = (Arbiter::new(0.5), CancelToken::default());
        let mut losses = Vec::new();
        let mut observe = |event| {
            if let JobEvent::Step { loss, .. } = event {
                losses.push(loss as f32);
            }
        };
        let start = self.adapter(sft["start"].as_str().expect("a start"));
        let (train, validation) = (Examples::Sft(examples), Examples::Sft(Vec::new()));
        let plan = plan(&self.model, &start, (&train, &validation), Objective::Sft, recipe, u64::MAX).expect("it fits");
        let inputs = FitInputs {
            model: &self.model,
            start: &start,
            reference: None,
            train: &train,
            validation: &validation,
            objective: Objective::Sft,
            recipe,
            plan,
            optimizer_file: None,
            arbiter: &arbiter,
            control: &control,
        };
        fit(inputs, &mut observe).expect("the run ends well");
        let wanted: Vec<f64> = curve.iter().map(|step| step["loss"].as_f64().expect("a loss")).collect();
        assert_eq!(losses.len(), wanted.len());
        differences(&losses, &wanted).into_iter().fold(0.0, f64::max)
    }
}

fn differences(got: &[f32], want: &[f64]) -> Vec<f64> {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(got, want)| (f64::from(*got) - want).abs()).collect()
}

#[test]
fn every_base_gives_the_golden_values() {
    for folder in folders() {
        let base = Base::load(&folder);
        let found = (base.float_difference(), base.serving_difference(), base.loss_difference());
        let name = folder.file_name().expect("a name").to_string_lossy();
        println!("{name:24} float32 {:.1e}  serving {:.1e}  loss {:.1e}", found.0, found.1, found.2);
        assert!(found.0 <= FLOAT_BOUND, "{name}: {} nats off on the float32 path", found.0);
        assert!(found.1 <= SERVING_BOUND, "{name}: {} nats off on the serving path", found.1);
        assert!(found.2 <= LOSS_BOUND, "{name}: losses {} off", found.2);
    }
}

/// Where the real bases are, which `scripts/real-bases` fetches.
fn real_bases() -> PathBuf {
    let home = std::env::var_os("TENORA_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/tenora")));
    home.expect("a home").join("real")
}

/// Real bases of other families, where they are in the cache; with `TENORA_REAL_BASES` set they are fetched first.
#[test]
fn real_bases_give_the_golden_values() {
    let mut folders: Vec<_> =
        std::fs::read_dir("tests/golden/real").expect("values").map(|e| e.unwrap().path()).collect();
    folders.retain(|path| path.is_dir());
    for folder in folders {
        let name = folder.file_name().expect("a name").to_string_lossy().into_owned();
        if std::env::var_os("TENORA_REAL_BASES").is_some_and(|set| !set.is_empty() && set != "0") {
            let fetched = std::process::Command::new("scripts/real-bases").arg(&name).status().expect("python3");
            assert!(fetched.success(), "{name} can be fetched");
        }
        let file = real_bases().join(format!("{name}.gguf"));
        if !file.is_file() {
            println!("{name}: skipped, not in the cache; TENORA_REAL_BASES=1 fetches it");
            continue;
        }
        let base = Base::load_from(&file, &folder);
        let found = (base.float_difference(), base.serving_difference());
        println!("{name:36} float32 {:.1e}  serving {:.1e}", found.0, found.1);
        assert!(found.0 <= FLOAT_BOUND, "{name}: {} nats off on the float32 path", found.0);
        assert!(found.1 <= SERVING_BOUND, "{name}: {} nats off on the serving path", found.1);
    }
}

/// As they are served, by name.
type Packed = BTreeMap<String, Arc<PackedAdapter>>;

/// Every adapter passes the gate over the wire, and what is exported is what was imported.
#[tokio::test(flavor = "multi_thread")]
async fn every_adapter_is_imported_and_exported() {
    for folder in folders() {
        let base = Base::load(&folder);
        let server = TestServer::start_on((base.model.clone(), base.text.clone()), |_| {}).await;
        let key = server.tenant("golden").await;
        for (name, _) in base.adapters() {
            let package = base.package(name);
            let version = server.import(&key, "golden", "a", &package).await;
            let version = version.unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(version.digest, package.digest().expect("a digest").to_string(), "{name}");
            let request = ExportAdapterRequest { name: version.name };
            let mut stream = server.adapters(&key).await.export_adapter(request).await.expect("an export").into_inner();
            let mut exported = Package::default();
            while let Some(message) = stream.next().await {
                let Some(export_adapter_response::Part::Chunk(chunk)) = message.expect("a message").part else {
                    continue;
                };
                match chunk.filename.as_str() {
                    CONFIG_FILE => exported.config.extend(chunk.data),
                    TENSORS_FILE => exported.tensors.extend(chunk.data),
                    _ => {}
                }
            }
            assert_eq!(exported.digest().expect("a digest"), package.digest().expect("a digest"), "{name}");
        }
        server.stopped().await;
    }
}
