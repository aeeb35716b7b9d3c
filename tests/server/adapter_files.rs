//! The adapters that people have: over a hundred folders, each with its verdict. One that is taken is served to the last bit as its plain
//! form, with the same tensors at the same sites; one that is refused names why, and says what to do.

#![allow(clippy::type_complexity, reason = "tables of cases")]

use std::collections::BTreeMap;

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tenora::adapter::{Adapter, BaseShape, LowRank, Site};
use tenora::api::proto::*;
use tenora::hub::{Package, TENSORS_FILE};
use tenora::request::{LoraSpec, Target};
use tonic::Code;

use super::common::{TestServer, reason};

const RANK: u32 = 4;
const ALPHA: f32 = 8.0;

/// A folder and what becomes of it.
struct Case {
    name: &'static str,
    /// What the tensors are, by the sites that the config selects.
    lora: Adapter,
    /// Put over the config of the plain form; null where the key is to be left out.
    config: Vec<(&'static str, Value)>,
    /// What the tensors are called, where PEFT would say `base_model.model.{module}.{lora_A or lora_B}.weight`.
    rename: fn(&str, &str) -> String,
    dtype: Dtype,
    /// The reason, and what the message must hold; `None` where it is taken.
    refused: Option<(&'static str, &'static [&'static str])>,
    /// Changes the finished files.
    spoil: Option<fn(&mut Package)>,
}

fn peft(module: &str, which: &str) -> String {
    format!("base_model.model.{module}.{which}.weight")
}

/// Values of a site's tensor, exact in every dtype.
fn values(len: usize, seed: usize) -> Vec<f32> {
    let at = |i: usize| (((i * 37 + seed * 101 + 13) * 2_654_435_761) >> 9) % 61;
    (0..len).map(|i| (at(i) as f32 - 30.0) / 256.0).collect()
}

/// An adapter of these sites, each with its rank and alpha.
fn adapter(shape: &BaseShape, sites: impl Iterator<Item = (Site, u32, f32)>, rslora: bool) -> Adapter {
    let spec = LoraSpec { rank: RANK, alpha: ALPHA, use_rslora: rslora, ..LoraSpec::default() };
    let layers = sites.map(|(site, rank, alpha)| {
        let (inputs, outputs) = shape.dims(site.target).unwrap();
        let seed = site.layer as usize * 7 + site.target as usize;
        let (a, b) = (values(rank as usize * inputs, 2 * seed), values(outputs * rank as usize, 2 * seed + 1));
        (
            site,
            LowRank { rank: rank as usize, alpha, scale: spec.scale(alpha, rank), a, b, magnitude: None, bias: None },
        )
    });
    Adapter::lora(spec.clone(), layers)
}

fn module(site: Site) -> String {
    let block = if (site.target as usize) < 4 { "self_attn" } else { "mlp" };
    format!("model.layers.{}.{block}.{}", site.layer, site.target.name())
}

fn encoded(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::F64 => values.iter().flat_map(|x| f64::from(*x).to_le_bytes()).collect(),
        other => panic!("{other:?}"),
    }
}

impl Case {
    /// The files, as a trainer would leave them.
    fn package(&self, shape: &BaseShape) -> Package {
        let mut tensors = BTreeMap::new();
        for (site, layer) in self.lora.pairs() {
            let (inputs, outputs) = shape.dims(site.target).unwrap();
            let mut put = |which, dims: [usize; 2], values: &[f32]| {
                tensors.insert((self.rename)(&module(site), which), (dims.to_vec(), encoded(values, self.dtype)));
            };
            put("lora_A", [layer.rank, inputs], &layer.a);
            put("lora_B", [outputs, layer.rank], &layer.b);
        }
        let views =
            tensors.iter().map(|(name, (dims, data))| (name, TensorView::new(self.dtype, dims.clone(), data).unwrap()));
        let mut config: Value =
            serde_json::from_slice(&Package::from_adapter(&self.lora, shape).unwrap().config).unwrap();
        config["layers_to_transform"] = json!(null);
        config["rank_pattern"] = json!({});
        config["alpha_pattern"] = json!({});
        for (key, value) in &self.config {
            config[*key] = value.clone();
            if *value == json!("LEFT OUT") {
                config.as_object_mut().unwrap().remove(*key);
            }
        }
        let notes = Some([("format".to_owned(), "pt".to_owned())].into());
        let tensors = safetensors::serialize(views, notes).unwrap();
        let mut package = Package { config: serde_json::to_vec_pretty(&config).unwrap(), tensors };
        if let Some(spoil) = self.spoil {
            spoil(&mut package);
        }
        package
    }
}

/// Makes the cases.
struct Table<'a> {
    shape: &'a BaseShape,
    cases: Vec<Case>,
}

type Settings = Vec<(&'static str, Value)>;

impl Table<'_> {
    fn lora(&self, selects: impl Fn(u32, Target) -> bool) -> Adapter {
        self.lora_of(|layer, target| selects(layer, target).then_some((RANK, ALPHA)), false)
    }

    fn lora_of(&self, of: impl Fn(u32, Target) -> Option<(u32, f32)>, rslora: bool) -> Adapter {
        let sites = self.shape.sites();
        let sites = sites.filter_map(|site| of(site.layer, site.target).map(|(rank, alpha)| (site, rank, alpha)));
        adapter(self.shape, sites, rslora)
    }

    fn add(&mut self, name: &'static str, lora: Adapter, config: Settings) -> &mut Case {
        self.cases.push(Case { name, lora, config, rename: peft, dtype: Dtype::F32, refused: None, spoil: None });
        self.cases.last_mut().unwrap()
    }

    /// Taken: the config selects these sites.
    fn taken(&mut self, name: &'static str, selects: impl Fn(u32, Target) -> bool, config: Settings) {
        let lora = self.lora(selects);
        self.add(name, lora, config);
    }

    fn taken_of(&mut self, name: &'static str, of: impl Fn(u32, Target) -> Option<(u32, f32)>, config: Settings) {
        let rslora = config.iter().any(|(key, value)| *key == "use_rslora" && *value == json!(true));
        let lora = self.lora_of(of, rslora);
        self.add(name, lora, config);
    }

    /// A plain adapter of q and v but for its config.
    fn refused(
        &mut self,
        name: &'static str,
        config: Settings,
        reason: &'static str,
        holds: &'static [&'static str],
    ) -> &mut Case {
        let lora = self.lora(qv);
        let case = self.add(name, lora, config);
        case.refused = Some((reason, holds));
        case
    }
}

fn qv(_: u32, target: Target) -> bool {
    matches!(target, Target::QProj | Target::VProj)
}

fn attention(_: u32, target: Target) -> bool {
    (target as usize) < 4
}

fn any(_: u32, _: Target) -> bool {
    true
}

fn targets(value: Value) -> Settings {
    vec![("target_modules", value)]
}

fn selections(t: &mut Table<'_>) {
    t.taken("suffixes", qv, targets(json!(["v_proj", "q_proj"])));
    t.taken("longer suffixes", qv, targets(json!(["self_attn.q_proj", "self_attn.v_proj"])));
    t.taken("full names", |l, t| l == 1 && t == Target::UpProj, targets(json!(["model.layers.1.mlp.up_proj"])));
    t.taken("names the base lacks", qv, targets(json!(["q_proj", "v_proj", "c_attn", "query_key_value"])));
    t.taken("expression", qv, targets(json!(r".*\.(q_proj|v_proj)")));
    t.taken("anchored expression", attention, targets(json!(r"^model\.layers\.\d+\.self_attn\.[qkvo]_proj$")));
    t.taken("expression of one layer", |l, t| l == 1 && !attention(l, t), targets(json!(r"model\.layers\.1\.mlp\..*")));
    t.taken("look-ahead", attention, targets(json!(r"^(?!.*mlp).*(?:q_proj|k_proj|v_proj|o_proj)$")));
    t.taken("look-ahead in the middle", qv, targets(json!(r"^model(?=\.).*\.(q_proj|v_proj)$")));
    t.taken("look-behind", |_, t| t != Target::GateProj, targets(json!(r"model\..*(?<!gate)_proj")));
    t.taken("named group", qv, targets(json!(r"model\.layers\.(?P<layer>\d+)\.self_attn\.(?:q|v)_proj")));
    t.taken("reference", |l, t| l == 0 && qv(l, t), targets(json!(r"(m)odel\.layers\.0\.self_attn\.(q|v)_proj|\1x")));
    t.taken("any case", qv, targets(json!(r"(?i).*\.(Q|V)_PROJ")));
    t.taken(
        "expression of a vision trainer",
        qv,
        targets(json!(
            r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|v_proj)))"
        )),
    );
    t.taken("all-linear", any, targets(json!("all-linear")));
    t.taken("All-Linear", any, targets(json!("All-Linear")));
    let excluded = |targets: Value, exclude: Value| vec![("target_modules", targets), ("exclude_modules", exclude)];
    let no_o = |_: u32, t: Target| t != Target::OProj;
    t.taken("all-linear without some", no_o, excluded(json!("all-linear"), json!(["o_proj"])));
    t.taken(
        "excluded by expression",
        |l, t| l == 0 && qv(l, t),
        excluded(json!(["q_proj", "v_proj"]), json!(r".*\.1\..*")),
    );
    let one = |l: u32, t: Target| qv(l, t) && !(l == 1 && t == Target::QProj);
    t.taken(
        "excluded by full name",
        one,
        excluded(json!(r".*\.(q|v)_proj"), json!(["model.layers.1.self_attn.q_proj"])),
    );
    t.taken(
        "excluded by part of a name: not at all",
        qv,
        excluded(json!(["q_proj", "v_proj"]), json!(["proj", "self_attn"])),
    );
    for (name, nothing) in [("empty list", json!([])), ("empty text", json!("")), ("null", json!(null))] {
        t.taken(name, qv, excluded(json!(["q_proj", "v_proj"]), nothing));
    }
}

fn layers(t: &mut Table<'_>) {
    let of = |layers: Value, pattern: Value| {
        let targets = ("target_modules", json!(["q_proj", "v_proj"]));
        vec![targets, ("layers_to_transform", layers), ("layers_pattern", pattern)]
    };
    let first = |l: u32, t: Target| l == 0 && qv(l, t);
    let second = |l: u32, t: Target| l == 1 && qv(l, t);
    t.taken("layers", first, of(json!([0]), json!(null)));
    t.taken("one layer", second, of(json!(1), json!(null)));
    t.taken("empty layers", qv, of(json!([]), json!(null)));
    t.taken("empty layers and a pattern", qv, of(json!([]), json!("layers")));
    t.taken("layers that the base lacks too", first, of(json!([0, 99]), json!(null)));
    t.taken("pattern", second, of(json!([1]), json!("layers")));
    t.taken("patterns", second, of(json!([1]), json!(["h", "layers"])));
    t.taken("pattern that is an expression", first, of(json!([0]), json!("lay.rs")));
    t.taken("pattern with a group", first, of(json!([0]), json!("(layers|h)")));
    t.taken("pattern from the beginning of the name", second, of(json!([1]), json!(r"model\.layers")));
    t.taken("empty pattern", first, of(json!([0]), json!("")));
    t.taken("no patterns", first, of(json!([0]), json!([])));
    t.taken(
        "a full name is taken whatever its layer",
        |l, t| (l == 0 && t == Target::QProj) || (l == 1 && t == Target::VProj),
        vec![
            ("target_modules", json!(["model.layers.0.self_attn.q_proj", "v_proj"])),
            ("layers_to_transform", json!([1])),
        ],
    );
    t.taken(
        "empty layers beside an expression",
        qv,
        vec![("target_modules", json!(r".*\.(q|v)_proj")), ("layers_to_transform", json!([]))],
    );
}

fn patterns(t: &mut Table<'_>) {
    let of = |key, pattern: Value| vec![("target_modules", json!(["q_proj", "v_proj"])), (key, pattern)];
    let own = |rank: u32, alpha: f32, when: fn(u32, Target) -> bool| {
        move |l: u32, t: Target| qv(l, t).then(|| if when(l, t) { (rank, alpha) } else { (RANK, ALPHA) })
    };
    let q = |_: u32, t: Target| t == Target::QProj;
    t.taken_of("rank by name", own(2, ALPHA, q), of("rank_pattern", json!({"q_proj": 2})));
    t.taken_of("rank by expression", own(2, ALPHA, q), of("rank_pattern", json!({".*q_proj": 2})));
    t.taken_of(
        "rank by anchored expression",
        own(3, ALPHA, |l, _| l == 0),
        of("rank_pattern", json!({r"^model\.layers\.0\..*": 3})),
    );
    t.taken_of(
        "rank by a name with dots",
        own(3, ALPHA, |l, _| l == 0),
        of("rank_pattern", json!({"^model.layers.0.self_attn.(q|v)_proj$": 3})),
    );
    t.taken_of(
        "rank by choice",
        own(1, ALPHA, q),
        of("rank_pattern", json!({r"layers\.(0|1)\.self_attn\.(q|k)_proj": 1})),
    );
    t.taken_of(
        "the first counts",
        own(2, ALPHA, q),
        of("rank_pattern", json!({".*q_proj": 2, "q_proj": 3, "k_proj": 7})),
    );
    t.taken_of(
        "a name begins after a dot",
        own(9, ALPHA, |_, _| false),
        of("rank_pattern", json!({"_proj": 9, "(q|v)": 9})),
    );
    t.taken_of("rank with look-ahead", own(2, ALPHA, |_, _| true), of("rank_pattern", json!({r"(?!.*\.0\.).*": 2})));
    t.taken_of("alpha by name", own(RANK, 3.0, q), of("alpha_pattern", json!({"q_proj": 3})));
    t.taken_of(
        "alpha by expression",
        own(RANK, 2.5, |l, _| l == 1),
        of("alpha_pattern", json!({r".*\.1\.self_attn\..*": 2.5})),
    );
    let both = vec![
        ("target_modules", json!(["q_proj", "v_proj"])),
        ("rank_pattern", json!({r"\w+\.q_proj": 2})),
        ("alpha_pattern", json!({"model.layers.0.self_attn.q_proj": 5, "model.layers.1.self_attn.q_proj": 5})),
        ("use_rslora", json!(true)),
    ];
    t.taken_of("rank, alpha and rslora", own(2, 5.0, q), both);
}

/// What says how an adapter was made and nothing about what it is.
fn notes(t: &mut Table<'_>) {
    for (name, init) in [
        ("initialised by EVA", json!("eva")),
        ("initialised by PiSSA", json!("pissa")),
        ("initialised by fast PiSSA", json!("pissa_niter_16")),
        ("initialised by OLoRA", json!("olora")),
        ("initialised by CorDA", json!("corda")),
        ("initialised by LoftQ", json!("loftq")),
        ("initialised by MiCA", json!("mica")),
        ("initialised orthogonal", json!("orthogonal")),
        ("initialised gaussian", json!("gaussian")),
        ("initialised Gaussian", json!("Gaussian")),
        ("initialised at random", json!(false)),
        ("initialised as null says", json!(null)),
    ] {
        t.taken(name, any, vec![("init_lora_weights", init)]);
    }
    t.taken(
        "blocks of initialisations",
        any,
        vec![
            ("eva_config", json!({"rho": 2.0, "tau": 0.99, "use_label_mask": true, "label_mask_value": -100})),
            ("corda_config", json!({"corda_method": "ipm", "cache_file": "c.pt", "verbose": false})),
            ("loftq_config", json!({"loftq_bits": 4, "loftq_iter": 1})),
            ("lora_ga_config", json!({"direction": "ArB2r", "scale": "stable"})),
            ("velora_config", json!({"num_groups": 8})),
        ],
    );
    t.taken(
        "notes of trainers",
        any,
        vec![
            ("auto_mapping", json!({"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"})),
            ("peft_version", json!("0.18.0")),
            ("runtime_config", json!({"ephemeral_gpu_offload": false})),
            ("megatron_core", json!("megatron.core")),
            ("qalora_group_size", json!(16)),
            ("task_type", json!(null)),
            ("revision", json!("main")),
            ("ensure_weight_tying", json!(false)),
        ],
    );
    t.taken("biases of a base that has none", any, vec![("bias", json!("all"))]);
    t.taken("biases of layers that have none", any, vec![("bias", json!("lora_only"))]);
    let off = [
        "use_dora",
        "use_qalora",
        "lora_bias",
        "megatron_config",
        "trainable_token_indices",
        "layer_replication",
        "target_parameters",
        "arrow_config",
        "alora_invocation_tokens",
    ];
    t.taken("kinds that are off", any, off.iter().map(|key| (*key, json!(null))).collect());
    t.taken(
        "kinds that are false",
        any,
        vec![("use_dora", json!(false)), ("use_qalora", json!(false)), ("lora_bias", json!(false))],
    );
    t.taken("settings to come that are off", any, vec![("use_next_thing", json!(false)), ("next_config", json!({}))]);
    t.taken("transposed for another base", any, vec![("fan_in_fan_out", json!(true))]);
    let lora = t.lora(any);
    t.add("config with a byte order mark", lora, vec![]).spoil =
        Some(|package| package.config = [b"\xef\xbb\xbf", package.config.as_slice()].concat());
}

fn names(t: &mut Table<'_>) {
    let forms: [(&str, fn(&str, &str) -> String); 10] = [
        ("adapter's name", |m, w| format!("base_model.model.{m}.{w}.default.weight")),
        ("adapter's own name", |m, w| format!("base_model.model.{m}.{w}.my-name_2.weight")),
        ("without the prefix", |m, w| format!("{m}.{w}.weight")),
        ("adapter's name without the prefix", |m, w| format!("{m}.{w}.policy.weight")),
        ("from the layers on", |m, w| format!("{}.{w}.weight", m.trim_start_matches("model."))),
        ("of the model without its head", |m, w| {
            format!("base_model.model.{}.{w}.weight", m.trim_start_matches("model."))
        }),
        ("in data parallel", |m, w| format!("module.base_model.model.{m}.{w}.weight")),
        ("compiled", |m, w| format!("_orig_mod.base_model.model.{m}.{w}.default.weight")),
        ("sharded", |m, w| {
            format!("base_model.model.{}.{w}.weight", m.replace(".self_attn", "._fsdp_wrapped_module.self_attn"))
        }),
        ("sharded with checkpoints", |m, w| format!("_fsdp_wrapped_module.{m}._checkpoint_wrapped_module.{w}.weight")),
    ];
    for (name, rename) in forms {
        let lora = t.lora(any);
        t.add(name, lora, vec![]).rename = rename;
    }
    let lora = t.lora(qv);
    t.add("expression for names without the head's", lora, targets(json!(r"layers\.\d+\.self_attn\.(q|v)_proj")))
        .rename = |m, w| format!("base_model.model.{}.{w}.weight", m.trim_start_matches("model."));
    let lora = t.lora(qv);
    t.add("expression for names with the head's", lora, targets(json!(r"model\.layers\.\d+\.self_attn\.(q|v)_proj")))
        .rename = |m, w| format!("{}.{w}.weight", m.trim_start_matches("model."));
    for (name, dtype) in [("bfloat16", Dtype::BF16), ("float16", Dtype::F16)] {
        let lora = t.lora(any);
        t.add(name, lora, vec![]).dtype = dtype;
    }
}

fn refused_kinds(t: &mut Table<'_>) {
    const SETTING: &str = "UNSUPPORTED_SETTING";
    for (name, kind) in [
        ("LoHa", json!("LOHA")),
        ("LoKr", json!("LOKR")),
        ("OFT", json!("OFT")),
        ("VeRA", json!("VERA")),
        ("AdaLoRA", json!("ADALORA")),
        ("P-tuning", json!("P_TUNING")),
        ("prompt tuning of several tasks", json!("MULTITASK_PROMPT_TUNING")),
        ("X-LoRA", json!("XLORA")),
        ("a kind that is a number", json!(7)),
        ("no kind", json!(null)),
        ("the config of a model", json!("LEFT OUT")),
    ] {
        // What else is wrong with it does not matter.
        let config = vec![("peft_type", kind), ("r", json!(null)), ("num_virtual_tokens", json!(20))];
        t.refused(name, config, SETTING, &["peft_type", "LoRA"]).refused = Some((SETTING, &["peft_type"]));
    }
    for (name, key, value, advice) in [
        ("QALoRA", "use_qalora", json!(true), &["use_qalora", "train again"][..]),
        ("BD-LoRA", "use_bdlora", json!({"nblocks": 2}), &["use_bdlora", "train again"]),
        (
            "whole layers",
            "modules_to_save",
            json!(["lm_head"]),
            &["modules_to_save", "train again", "trainable_token_indices", "full fine-tuning"],
        ),
        ("replicated layers", "layer_replication", json!([[0, 2], [1, 2]]), &["layer_replication", "train again"]),
        ("parameters", "target_parameters", json!(["experts.down_proj"]), &["target_parameters", "train again"]),
        (
            "tokens of another table",
            "trainable_token_indices",
            json!({"wpe": [1]}),
            &["trainable_token_indices", "wpe"],
        ),
        ("activated LoRA", "alora_invocation_tokens", json!([1, 2]), &["alora_invocation_tokens", "train again"]),
        ("KaSA", "kasa_config", json!({"beta": 0.1}), &["kasa_config", "train again"]),
        ("Arrow", "arrow_config", json!({"top_k": 3}), &["arrow_config", "one by one"]),
        ("a setting to come", "use_next_thing", json!(true), &["use_next_thing", "remove it"]),
        ("LoRA-GA", "init_lora_weights", json!("lora_ga"), &["lora_ga", "path_initial_model_for_weight_conversion"]),
        ("an initialisation to come", "init_lora_weights", json!("next"), &["init_lora_weights", "set it to true"]),
        ("PiSSA of no number", "init_lora_weights", json!("pissa_niter_x"), &["init_lora_weights", "set it to true"]),
        ("the head too", "target_modules", json!(["q_proj", "v_proj", "lm_head"]), &["lm_head", "train again"]),
        ("the head by expression", "target_modules", json!(r".*(q_proj|v_proj|lm_head)"), &["lm_head", "train again"]),
        (
            "the embedding too",
            "target_modules",
            json!(["q_proj", "v_proj", "embed_tokens"]),
            &["embed_tokens", "train again"],
        ),
        ("nothing of the base", "target_modules", json!(["c_attn"]), &["target_modules", "q_proj"]),
        ("no targets", "target_modules", json!([]), &["target_modules", "q_proj"]),
        ("targets left out", "target_modules", json!(null), &["target_modules", "name the modules"]),
        ("a broken expression", "target_modules", json!(r".*\.(q_proj"), &["target_modules", "list the modules"]),
        (
            "a bracket closed from outside",
            "target_modules",
            json!(r".*q_proj)|(v_proj"),
            &["target_modules", "list the modules"],
        ),
        (
            "an expression without end",
            "target_modules",
            json!(r"(?=(.*.*.*.*.*.*.*.*.*.*)*$)(.*)\1\1x"),
            &["target_modules", "steps"],
        ),
        (
            "an expression that grows",
            "target_modules",
            json!(r".*(q_proj|v_proj|(\w{40}){40})"),
            &["target_modules", "bytes when it is compiled", "list the modules"],
        ),
        ("a broken exclusion", "exclude_modules", json!("*"), &["exclude_modules", "list the modules"]),
        ("a broken rank pattern", "rank_pattern", json!({"q_proj)": 2}), &["rank_pattern", "list the modules"]),
    ] {
        t.refused(name, vec![(key, value)], SETTING, advice);
    }
    t.refused(
        "too long an expression",
        targets(json!("q_proj|".repeat(4000))),
        SETTING,
        &["bytes", "list the modules"],
    );
    let many: serde_json::Map<String, Value> = (0..300).map(|i| (format!("(q|v){i}"), json!(2))).collect();
    t.refused(
        "too many expressions",
        vec![("alpha_pattern", Value::Object(many))],
        SETTING,
        &["alpha_pattern", "name the modules"],
    );
}

fn refused_values(t: &mut Table<'_>) {
    const SETTING: &str = "INVALID_SETTING";
    let expression = ("target_modules", json!(r".*\.(q|v)_proj"));
    t.refused(
        "layers beside an expression",
        vec![expression.clone(), ("layers_to_transform", json!([0]))],
        SETTING,
        &["layers_to_transform", "list the modules"],
    );
    t.refused(
        "pattern beside an expression",
        vec![expression, ("layers_pattern", json!("layers"))],
        SETTING,
        &["layers_pattern", "leave it out"],
    );
    t.refused(
        "pattern without layers",
        vec![("layers_pattern", json!("layers"))],
        SETTING,
        &["layers_pattern", "layers_to_transform"],
    );
    for (name, key, value, holds) in [
        ("layers that are no numbers", "layers_to_transform", json!(["0"]), &["layers_to_transform", "must be"][..]),
        ("layers below zero", "layers_to_transform", json!([-1]), &["layers_to_transform", "must be"]),
        ("pattern that is a number", "layers_pattern", json!([1]), &["layers_pattern"]),
        ("targets that are a number", "target_modules", json!(7), &["target_modules", "must be"]),
        ("targets that are numbers", "target_modules", json!([7]), &["target_modules", "must hold"]),
        ("no rank", "r", json!(null), &["r: is missing"]),
        ("rank 0", "r", json!(0), &["r: is 0; must be"]),
        ("half a rank", "r", json!(4.5), &["must be a whole number"]),
        ("no alpha", "lora_alpha", json!(null), &["lora_alpha: is missing"]),
        ("alpha that is a text", "lora_alpha", json!("8"), &["lora_alpha", "must be a number"]),
        ("dropout over 1", "lora_dropout", json!(1.5), &["lora_dropout", "must be"]),
        ("rslora that is a text", "use_rslora", json!("yes"), &["use_rslora", "must be true or false"]),
        ("bias that is true", "bias", json!(true), &["bias", "must be"]),
        ("tokens twice", "trainable_token_indices", json!([1, 1]), &["trainable_token_indices", "each once"]),
        ("tokens below zero", "trainable_token_indices", json!([-1]), &["trainable_token_indices", "must be"]),
        ("tokens that the base lacks", "trainable_token_indices", json!([1_000_000]), &["1000000", "trained on"]),
        ("bias of a word", "bias", json!("some"), &["bias", "must be", "lora_only"]),
        ("LoRA's bias that is a text", "lora_bias", json!("yes"), &["lora_bias", "must be true or false"]),
        ("rank pattern that is a list", "rank_pattern", json!([1]), &["rank_pattern", "must be"]),
        ("rank pattern of 0", "rank_pattern", json!({"q_proj": 0}), &["rank_pattern.q_proj", "must be"]),
        ("rank pattern of a text", "rank_pattern", json!({".*q_proj": "4"}), &["rank_pattern", "must be"]),
    ] {
        let mut config = vec![(key, value)];
        if key == "layers_pattern" {
            config.push(("layers_to_transform", json!([0])));
        }
        t.refused(name, config, SETTING, holds);
    }
    t.refused("too large a rank", vec![("r", json!(4096))], "RANK_TOO_LARGE", &["max_rank", "lower rank"]);
    t.refused(
        "too large a rank of one",
        vec![("rank_pattern", json!({".*v_proj": 4096}))],
        "RANK_TOO_LARGE",
        &["max_rank", "lower rank"],
    );
    t.refused("another rank than the tensors", vec![("r", json!(8))], "SHAPE_MISMATCH", &["shape", "trained on"]);
    t.refused(
        "fewer tensors than selected",
        targets(json!("all-linear")),
        "MISSING_TENSOR",
        &["lora_A", "saved together"],
    );
    t.refused(
        "more tensors than selected",
        targets(json!(["q_proj"])),
        "EXTRA_TENSOR",
        &["v_proj", "saved with these tensors"],
    );
    t.refused("tensors that are excluded", vec![("exclude_modules", json!(["v_proj"]))], "EXTRA_TENSOR", &["v_proj"]);
}

const POINTER: &[u8] = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";

fn refused_files(t: &mut Table<'_>) {
    let spoilt: [(&str, fn(&mut Package), &str, &[&str]); 10] = [
        ("config that is no JSON", |p| p.config = b"r = 4".to_vec(), "MALFORMED_CONFIG", &["PEFT wrote"]),
        ("config that is a list", |p| p.config = b"[1]".to_vec(), "MALFORMED_CONFIG", &["PEFT wrote"]),
        ("config with NaN", |p| p.config = b"{\"lora_alpha\": NaN}".to_vec(), "MALFORMED_CONFIG", &["PEFT wrote"]),
        ("config that is a pointer", |p| p.config = POINTER.to_vec(), "GIT_LFS_POINTER", &["git lfs pull"]),
        ("tensors that are a pointer", |p| p.tensors = POINTER.to_vec(), "GIT_LFS_POINTER", &["git lfs pull"]),
        (
            "half of the tensors",
            |p| p.tensors.truncate(p.tensors.len() / 2),
            "MALFORMED_SAFETENSORS",
            &["copy it again"],
        ),
        ("bytes after the tensors", |p| p.tensors.push(0), "MALFORMED_SAFETENSORS", &["save"]),
        (
            "a header of 2^60 bytes",
            |p| p.tensors[..8].copy_from_slice(&(1_u64 << 60).to_le_bytes()),
            "MALFORMED_SAFETENSORS",
            &["header", "save"],
        ),
        (
            "a header of 90 MB",
            |p| p.tensors[..8].copy_from_slice(&90_000_000_u64.to_le_bytes()),
            "MALFORMED_SAFETENSORS",
            &["header", "save"],
        ),
        (
            "a number that is none",
            |p| {
                let end = p.tensors.len();
                p.tensors[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
            },
            "NOT_FINITE",
            &["NaN", "earlier checkpoint"],
        ),
    ];
    for (name, spoil, reason, holds) in spoilt {
        t.refused(name, vec![], reason, holds).spoil = Some(spoil);
    }
    let renamed: [(&str, fn(&str, &str) -> String, &[&str]); 10] = [
        (
            "two adapters",
            |m, w| peft(m, &format!("{w}.{}", if m.contains(".0.") { "one" } else { "two" })),
            &["more than one adapter", "by itself"],
        ),
        (
            "two prefixes",
            |m, w| if m.contains(".0.") { peft(m, w) } else { format!("{m}.{w}.weight") },
            &["more than one adapter"],
        ),
        (
            "biases of a norm",
            |m, w| match (m.contains("layers.0.self_attn.q_proj"), w) {
                (true, "lora_A") => "base_model.model.model.layers.0.input_layernorm.bias".to_owned(),
                _ => peft(m, w),
            },
            &["bias of no linear layer", "train again"],
        ),
        (
            "the head",
            |m, w| peft(&m.replace("model.layers.0.self_attn.q_proj", "lm_head"), w),
            &["head", "train again"],
        ),
        (
            "a head that was saved beside the adapter",
            |m, w| match (m.contains("layers.0.self_attn.q_proj"), w) {
                (true, "lora_A") => "base_model.model.lm_head.weight".to_owned(),
                _ => peft(m, w),
            },
            &["vocabulary", "save_embedding_layers=False"],
        ),
        (
            "a model that was wrapped twice",
            |m, w| format!("base_model.model.base_model.model.{m}.{w}.weight"),
            &["wrapped twice", "inner model"],
        ),
        ("a layer that the base lacks", |m, w| peft(&m.replace(".1.", ".7."), w), &["layer", "trained on"]),
        ("another spelling of a layer", |m, w| peft(&m.replace(".1.", ".01."), w), &["nothing may be left unapplied"]),
        (
            "a module that the base lacks",
            |m, w| peft(&m.replace("q_proj", "qkv_proj"), w),
            &["linear layer", "trained on"],
        ),
        ("a whole model", |m, _| format!("{m}.weight"), &["tensor of an adapter", "save the adapter alone"]),
    ];
    for (name, rename, holds) in renamed {
        t.refused(name, vec![], "EXTRA_TENSOR", holds).rename = rename;
    }
    for (name, spoil) in [
        ("the same names in another wrapper", doubled as fn(&mut Package)),
        ("empty tensors", emptied),
        ("magnitudes", |package| with_vector(package, "lora_magnitude_vector")),
        ("biases", |package| with_vector(package, "lora_B.bias")),
        ("biases of layers that have none", |package| with_vector(package, "base_layer.bias")),
    ] {
        let (reason, holds): (_, &[&str]) = match name {
            "empty tensors" => ("SHAPE_MISMATCH", &["gather"]),
            "magnitudes" => ("EXTRA_TENSOR", &["lora_magnitude_vector", "another kind"]),
            "biases" => ("EXTRA_TENSOR", &["lora_B.bias", "another kind"]),
            "biases of layers that have none" => ("EXTRA_TENSOR", &["base_layer.bias", "trained on"]),
            _ => ("EXTRA_TENSOR", &["more than one adapter"]),
        };
        t.refused(name, vec![], reason, holds).spoil = Some(spoil);
    }
    t.refused(
        "rows of tokens that are missing",
        vec![("trainable_token_indices", json!([1, 2]))],
        "MISSING_TENSOR",
        &["embed_tokens.token_adapter", "saved together"],
    );
    t.refused(
        "too many tokens",
        vec![("trainable_token_indices", (0..257).collect())],
        "TOO_MANY_TRAINED_TOKENS",
        &["trainable_token_indices", "max_trained_tokens", "train fewer"],
    );
    t.refused("biases that are missing", vec![("lora_bias", json!(true))], "MISSING_TENSOR", &["lora_B.bias"]);
    t.refused(
        "biases of a DoRA",
        vec![("lora_bias", json!(true)), ("use_dora", json!(true))],
        "INVALID_SETTING",
        &["lora_bias", "use_dora", "train again"],
    );
    t.refused(
        "biases beside an initialisation",
        vec![("lora_bias", json!(true)), ("init_lora_weights", json!("gaussian"))],
        "INVALID_SETTING",
        &["lora_bias", "init_lora_weights", "train again"],
    );
    t.refused(
        "a DoRA without magnitudes",
        vec![("use_dora", json!(true))],
        "MISSING_TENSOR",
        &["lora_magnitude_vector"],
    );
    t.refused(
        "a LoRA's tensors and settings called IA3",
        vec![("peft_type", json!("IA3"))],
        "UNSUPPORTED_SETTING",
        &["remove it"],
    );
    t.refused("tensors of float64", vec![], "UNSUPPORTED_DTYPE", &["F64", "convert"]).dtype = Dtype::F64;
}

/// Every tensor a second time, as a wrapper of the model names it.
fn doubled(package: &mut Package) {
    let file = safetensors::SafeTensors::deserialize(&package.tensors).unwrap();
    let views =
        file.tensors().into_iter().flat_map(|(name, view)| [(format!("module.{name}"), view.clone()), (name, view)]);
    let doubled = safetensors::serialize(views, None).unwrap();
    package.tensors = doubled;
}

/// With a value for each output of a layer, of which the config says nothing.
fn with_vector(package: &mut Package, end: &str) {
    let file = safetensors::SafeTensors::deserialize(&package.tensors).unwrap();
    let (name, b) = file.iter().find(|(name, _)| name.ends_with("lora_B.weight")).unwrap();
    let name = name.replace("lora_B.weight", end);
    let values = vec![0; 4 * b.shape()[0]];
    let vector = TensorView::new(Dtype::F32, vec![b.shape()[0]], &values).unwrap();
    let views = file.tensors().into_iter().chain([(name, vector)]);
    let more = safetensors::serialize(views, None).unwrap();
    package.tensors = more;
}

/// The tensors as a process saves them that has none of their values.
fn emptied(package: &mut Package) {
    let file = safetensors::SafeTensors::deserialize(&package.tensors).unwrap();
    let empty = |name: String| (name, TensorView::new(Dtype::F32, vec![0], &[]).unwrap());
    let emptied = safetensors::serialize(file.names().into_iter().map(|name| empty(name.to_owned())), None).unwrap();
    package.tensors = emptied;
}

/// What an adapter answers, to the last bit: ids and log-probabilities. The adapter is deleted.
async fn answers(server: &TestServer, key: &str, adapter: &str) -> Vec<ScoreResult> {
    let input = ScoreInput { sequence: Some(score_input::Sequence::Text("what is served".into())) };
    let name = format!("tenants/a/adapters/{adapter}");
    let request = ScoreRequest { adapter: name.clone(), inputs: vec![input], top_logprobs: 2, ..Default::default() };
    let results = server.generation(key).await.score(request).await.unwrap().into_inner().results;
    let request = DeleteAdapterRequest { name, etag: String::new() };
    server.adapters(key).await.delete_adapter(request).await.unwrap();
    results
}

/// Whether a refusal is the one that is meant, and short enough to be read.
fn refused_as((expected, holds): (&str, &[&str]), status: &tonic::Status) -> Result<(), String> {
    let message = status.message();
    let right = status.code() == Code::InvalidArgument && reason(status) == expected;
    let lacks = holds.iter().find(|part| !message.contains(**part));
    match lacks {
        None if right && message.len() < 1000 => Ok(()),
        _ => Err(format!("not {expected} with {holds:?}: {:?} {} {message}", status.code(), reason(status))),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_folder_is_served_as_its_plain_form_or_refused_with_advice() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let shape = server.model.shape().clone();
    let mut table = Table { shape: &shape, cases: Vec::new() };
    for make in [selections, layers, patterns, notes, names, refused_kinds, refused_values, refused_files] {
        make(&mut table);
    }
    assert!(table.cases.len() >= 120, "{}", table.cases.len());
    let mut plain: Vec<(Adapter, Vec<ScoreResult>)> = Vec::new();
    let mut wrong = Vec::new();
    for case in &table.cases {
        let outcome = server.import(&key, "a", "case", &case.package(&shape)).await;
        let verdict = match (case.refused, outcome) {
            (Some(expected), Err(status)) => refused_as(expected, &status),
            (Some(_), Ok(_)) => Err("was taken".to_owned()),
            (None, Err(status)) => Err(format!("was refused: {}", status.message())),
            (None, Ok(_)) => {
                let served = answers(&server, &key, "case").await;
                let known = plain.iter().find(|(lora, _)| lora.sites == case.lora.sites);
                let expected = match known {
                    Some((_, answers)) => answers.clone(),
                    None => {
                        let package = Package::from_adapter(&case.lora, &shape).unwrap();
                        server.import(&key, "a", "plain", &package).await.unwrap();
                        plain.push((case.lora.clone(), answers(&server, &key, "plain").await));
                        plain.last().unwrap().1.clone()
                    }
                };
                if served == expected { Ok(()) } else { Err("is served as something else".to_owned()) }
            }
        };
        wrong.extend(verdict.err().map(|why| format!("{}: {why}", case.name)));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // The plain forms are told apart, so that to be served as one of them says something.
    for (i, (lora, scores)) in plain.iter().enumerate() {
        assert!(plain[..i].iter().all(|(_, other)| other != scores), "{lora:?}");
    }
    assert_eq!(
        server.blobs(),
        Vec::<std::path::PathBuf>::new(),
        "{TENSORS_FILE} and the rest of what was refused is gone"
    );
    server.stopped().await;
}
