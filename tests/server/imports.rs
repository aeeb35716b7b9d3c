//! Uploads of adapters: good ones come back as they were, each bad one is refused by name and leaves nothing.

use std::collections::BTreeMap;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tenora::adapter::{Adapter, BaseShape};
use tenora::api::proto::*;
use tenora::hub::{CONFIG_FILE, Package, TENSORS_FILE};
use tenora::request::LoraSpec;
use tonic::Code;

use super::common::{TestServer, reason};

type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

fn tensors_of(package: &Package) -> Tensors {
    let file = SafeTensors::deserialize(&package.tensors).unwrap();
    file.iter().map(|(name, view)| (name.to_owned(), (view.shape().to_vec(), view.data().to_vec()))).collect()
}

/// The package with its tensors changed.
fn with_tensors(package: &Package, change: impl FnOnce(&mut Tensors)) -> Package {
    let mut tensors = tensors_of(package);
    change(&mut tensors);
    let views =
        tensors.iter().map(|(name, (shape, data))| (name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
    Package { config: package.config.clone(), tensors: safetensors::serialize(views, None).unwrap() }
}

/// The package with one setting changed.
fn with_setting(package: &Package, key: &str, value: Value) -> Package {
    let mut config: Value = serde_json::from_slice(&package.config).unwrap();
    config[key] = value;
    Package { config: serde_json::to_vec(&config).unwrap(), tensors: package.tensors.clone() }
}

fn of_another_base(shape: &BaseShape) -> Package {
    let mut other = shape.clone();
    for linear in &mut other.linears {
        (linear.inputs, linear.outputs) = (linear.inputs * 2, linear.outputs * 2);
    }
    let lora = Adapter::fresh(&LoraSpec { rank: 4, ..LoraSpec::default() }, &other, 1).unwrap();
    Package::from_adapter(&lora, &other).unwrap()
}

/// Each fault with what its error must name.
fn faults(server: &TestServer) -> Vec<(Package, &'static str)> {
    let good = server.package(1);
    let b = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";
    assert!(tensors_of(&good).contains_key(b), "{:?}", tensors_of(&good).keys().next());
    let huge = [&(1u64 << 60).to_le_bytes()[..], b"{}"].concat();
    vec![
        (with_tensors(&good, |tensors| drop(tensors.remove(b))), "q_proj.lora_B"),
        (
            with_tensors(&good, |tensors| drop(tensors.insert("extra.weight".into(), (vec![1], vec![0; 4])))),
            "extra.weight",
        ),
        (with_tensors(&good, |tensors| tensors.get_mut(b).unwrap().0.reverse()), "q_proj.lora_B"),
        (
            with_tensors(&good, |tensors| tensors.get_mut(b).unwrap().1[..4].copy_from_slice(&f32::NAN.to_le_bytes())),
            "q_proj.lora_B",
        ),
        (with_setting(&good, "r", json!(4096)), "max_rank"),
        (with_setting(&good, "modules_to_save", json!(["lm_head"])), "modules_to_save"),
        (with_setting(&good, "lora_bias", json!(true)), "lora_B.bias"),
        (Package { tensors: good.tensors[..good.tensors.len() / 2].to_vec(), ..good.clone() }, TENSORS_FILE),
        (Package { tensors: huge, ..good.clone() }, TENSORS_FILE),
        // Every tensor is wrong; which one is named is not settled.
        (of_another_base(server.model.shape()), "_proj.lora_"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_adapters_are_refused_by_name_and_leave_nothing() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    for (package, named) in faults(&server) {
        let status = server.import(&key, "a", "x", &package).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{named}: {status:?}");
        assert!(status.message().contains(named), "{named}: {}", status.message());
        reason(&status);
    }
    let good = server.package(1);
    for (name, expected) in [("adapter_model.bin", "UNSUPPORTED_FILE"), ("../adapter_config.json", "UNSAFE_FILE_NAME")]
    {
        let files = [(CONFIG_FILE, good.config.as_slice()), (name, b"x".as_slice())];
        let status = server.import_files(&key, "a", "x", &files).await.unwrap_err();
        assert_eq!((status.code(), reason(&status).as_str()), (Code::InvalidArgument, expected));
        assert!(status.message().contains(name), "{}", status.message());
    }
    let list = ListAdaptersRequest { parent: "tenants/a".into(), ..Default::default() };
    let listed = server.adapters(&key).await.list_adapters(list).await.unwrap().into_inner();
    assert_eq!(listed.adapters, []);
    assert_eq!(server.blobs(), Vec::<std::path::PathBuf>::new());
    assert_eq!(server.parts.hub.stats().resident_bytes, 0);
    server.stopped().await;
}

/// An adapter whose product is a small difference of large ones, as one that was started by PiSSA and converted to plain LoRA: ranks 2 and 3
/// undo ranks 0 and 1 but for a part.
fn small_beside_its_factors(shape: &BaseShape, part: f32) -> Package {
    let spec = LoraSpec { rank: 4, alpha: 4.0, ..LoraSpec::default() };
    let mut lora = Adapter::fresh(&spec, shape, 1).unwrap();
    for (i, (site, layer)) in lora.pairs_mut().enumerate() {
        let (inputs, outputs) = shape.dims(site.target).unwrap();
        let wave = |at: usize, by: f32| ((at + 17 * i) as f32 * by).sin();
        let a = |rank: usize, at: usize| {
            3.0 * wave(at + 977 * (rank % 2), 0.71) + part * (rank / 2) as f32 * wave(at, 1.37)
        };
        let b = |at: usize, rank: usize| [3.0, -3.0][rank / 2] * wave(at + 577 * (rank % 2), 0.43);
        layer.a = (0..4 * inputs).map(|j| a(j / inputs, j % inputs)).collect();
        layer.b = (0..4 * outputs).map(|j| b(j / 4, j % 4)).collect();
    }
    Package::from_adapter(&lora, shape).unwrap()
}

/// Where rounding to bf16 would show, a version is served in twice the bits, also after its packed file was lost; a usual one is not.
#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_whose_rounding_shows_is_served_in_twice_the_bits() {
    // Room for one of the small ones in both forms, so that another makes it leave.
    let server = TestServer::start_with(|config| {
        config.limits.adapter_host_bytes = 0;
        config.limits.adapter_cache_bytes = 100_000;
    })
    .await;
    let key = server.tenant("a").await;
    let usual = server.import(&key, "a", "usual", &server.package(1)).await.unwrap();
    let package = small_beside_its_factors(server.model.shape(), 0.04);
    let version = server.import(&key, "a", "small", &package).await.unwrap();
    let bytes = |version: &AdapterVersion| version.residency.as_ref().unwrap().memory_bytes;
    assert_eq!(bytes(&version), 3 * bytes(&usual), "both have rank 4 on all layers");
    assert_eq!(version.rank, 4, "its rank is the file's");
    let parity = version.parity.unwrap();
    assert!(parity.mean_abs_effect > 0.05 && parity.mean_abs_difference <= 0.0015, "{parity:?}");
    let before = scores(&server, &key, "tenants/a/adapters/small").await;
    let packed: Vec<_> = server.blobs().into_iter().filter(|path| path.ends_with("packed.bin")).collect();
    assert_eq!(packed.len(), 2);
    packed.iter().for_each(|path| std::fs::remove_file(path).unwrap());
    let other = small_beside_its_factors(server.model.shape(), 0.05);
    server.import(&key, "a", "other", &other).await.unwrap();
    assert_eq!(scores(&server, &key, "tenants/a/adapters/small").await, before);
    server.stopped().await;
}

/// Score to the last bit: the ids and log-probabilities under an adapter.
async fn scores(server: &TestServer, key: &str, adapter: &str) -> Vec<ScoreResult> {
    let input = ScoreInput { sequence: Some(score_input::Sequence::Text("the same text".into())) };
    let request = ScoreRequest { adapter: adapter.into(), inputs: vec![input], top_logprobs: 3, ..Default::default() };
    server.generation(key).await.score(request).await.unwrap().into_inner().results
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_imports_as_the_same_adapter() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let first = server.import(&key, "a", "x", &server.package(1)).await.unwrap();
    let request = ExportAdapterRequest { name: "tenants/a/adapters/x".into() };
    let mut messages = server.adapters(&key).await.export_adapter(request).await.unwrap().into_inner();
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    while let Some(message) = messages.message().await.unwrap() {
        match message.part.unwrap() {
            export_adapter_response::Part::Version(version) => assert_eq!(version, first),
            export_adapter_response::Part::Chunk(chunk) => files.entry(chunk.filename).or_default().extend(chunk.data),
        }
    }
    let files: Vec<_> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let second = server.import_files(&key, "a", "y", &files).await.unwrap();
    assert_eq!(second.digest, first.digest);
    let same = scores(&server, &key, "tenants/a/adapters/x").await;
    assert_eq!(scores(&server, &key, "tenants/a/adapters/y").await, same);
    assert_ne!(scores(&server, &key, "").await, same);
    server.stopped().await;
}
