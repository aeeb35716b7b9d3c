use super::*;

/// Every form that the build before versions wrote, as it wrote it.
const SPECS: [&str; 2] = [
    r#"{"adapter":{"tenant":"acme","adapter":"tone"},"dataset":{"tenant":"acme","dataset":"chats"},"objective":"Sft","start":{"Fresh":{"rank":2,"alpha":4.0,"dropout":0.125,"targets":["QProj","KProj","VProj","OProj","GateProj","UpProj","DownProj"],"layers":[1],"use_rslora":true}},"hyperparameters":{"learning_rate":0.01,"epochs":3,"max_steps":3,"batch_size":4,"gradient_accumulation_steps":1,"warmup_steps":1,"schedule":"Linear","weight_decay":0.0,"beta1":0.9,"beta2":0.999,"epsilon":1e-8,"max_grad_norm":1.0,"seed":18446744073709551615,"sequential":true,"validation_split":0.25,"eval_steps":1,"max_length":64},"publish":"Live"}"#,
    r#"{"adapter":{"tenant":"acme","adapter":"tone"},"dataset":{"tenant":"acme","dataset":"pairs"},"objective":{"Dpo":{"beta":0.2,"label_smoothing":0.125}},"start":{"From":{"adapter":{"tenant":"acme","adapter":"base"},"version":7}},"hyperparameters":{"learning_rate":0.01,"epochs":3,"max_steps":null,"batch_size":4,"gradient_accumulation_steps":1,"warmup_steps":null,"schedule":"Constant","weight_decay":0.0,"beta1":0.9,"beta2":0.999,"epsilon":1e-8,"max_grad_norm":1.0,"seed":0,"sequential":false,"validation_split":0.0,"eval_steps":null,"max_length":null},"publish":"VersionOnly"}"#,
];

const EVENTS: [&str; 6] = [
    r#"{"State":{"state":"Queued","error":null,"version":null}}"#,
    r#"{"State":{"state":"Succeeded","error":"e","version":{"adapter":{"tenant":"acme","adapter":"tone"},"version":1}}}"#,
    r#"{"Step":{"step":1,"total_steps":3,"loss":1.5,"learning_rate":0.01,"grad_norm":2.0,"tokens_per_second":12.5,"eta_seconds":3.0,"margin":null,"accuracy":0.5}}"#,
    r#"{"Evaluated":{"step":2,"loss":0.5,"margin":0.25,"accuracy":1.0}}"#,
    r#"{"Evaluated":{"step":2,"loss":0.5,"margin":null,"accuracy":null}}"#,
    r#"{"Message":"hello"}"#,
];

const PARITY: &str =
    r#"{"tokens":256,"mean_abs_difference":0.001,"mean_abs_effect":0.5,"threshold":0.05,"no_effect":false}"#;

fn recipe() -> Hyperparameters {
    Hyperparameters {
        learning_rate: 0.01,
        epochs: 3,
        max_steps: Some(3),
        batch_size: 4,
        gradient_accumulation_steps: 1,
        warmup_steps: Some(1),
        schedule: LrSchedule::Linear,
        weight_decay: 0.0,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        max_grad_norm: 1.0,
        seed: u64::MAX,
        sequential: true,
        validation_split: 0.25,
        eval_steps: Some(1),
        max_length: Some(64),
        gradient_checkpointing: GradientCheckpointing::Auto,
        optimizer: Optimizer::AdamW,
    }
}

fn specs() -> [JobSpec; 2] {
    let fresh = LoraSpec {
        rank: 2,
        alpha: 4.0,
        dropout: 0.125,
        targets: Target::ALL[..7].to_vec(),
        layers: Some(vec![1]),
        use_rslora: true,
        use_dora: false,
        lora_bias: false,
        trainable_token_indices: Vec::new(),
        init: LoraInit::Default,
    };
    let first = JobSpec {
        adapter: "tenants/acme/adapters/tone".parse().unwrap(),
        dataset: "tenants/acme/datasets/chats".parse().unwrap(),
        objective: Objective::Sft,
        start: Start::Fresh(fresh.into()),
        hyperparameters: recipe(),
        publish: Publish::Live,
        too_long: TooLong::Refuse,
    };
    let plain = Hyperparameters {
        max_steps: None,
        warmup_steps: None,
        schedule: LrSchedule::Constant,
        seed: 0,
        sequential: false,
        validation_split: 0.0,
        eval_steps: None,
        max_length: None,
        ..recipe()
    };
    let second = JobSpec {
        dataset: "tenants/acme/datasets/pairs".parse().unwrap(),
        objective: Objective::Dpo { beta: 0.2, label_smoothing: 0.125 },
        start: Start::From("tenants/acme/adapters/base/versions/7".parse().unwrap()),
        hyperparameters: plain,
        publish: Publish::VersionOnly,
        ..first.clone()
    };
    [first, second]
}

fn metrics(values: &[(&str, f64)]) -> BTreeMap<String, f64> {
    values.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
}

fn events() -> [JobEvent; 6] {
    let version: VersionName = "tenants/acme/adapters/tone/versions/1".parse().unwrap();
    [
        JobEvent::State { state: JobState::Queued, error: None, version: None, live: None },
        JobEvent::State { state: JobState::Succeeded, error: Some("e".into()), version: Some(version), live: None },
        JobEvent::Step {
            step: 1,
            total_steps: 3,
            loss: 1.5,
            learning_rate: 0.01,
            grad_norm: 2.0,
            tokens_per_second: 12.5,
            eta_seconds: 3.0,
            metrics: metrics(&[("rewards/accuracies", 0.5)]),
        },
        JobEvent::Evaluated {
            step: 2,
            loss: 0.5,
            metrics: metrics(&[("rewards/margins", 0.25), ("rewards/accuracies", 1.0)]),
        },
        JobEvent::Evaluated { step: 2, loss: 0.5, metrics: metrics(&[]) },
        JobEvent::Message("hello".into()),
    ]
}

fn parity() -> ParityReport {
    ParityReport { tokens: 256, mean_abs_difference: 0.001, mean_abs_effect: 0.5, threshold: 0.05, no_effect: false }
}

#[test]
fn what_the_build_before_versions_wrote_reads_as_it_was_meant() {
    for (text, spec) in SPECS.iter().zip(specs()) {
        assert_eq!(read_spec(text).unwrap(), spec);
    }
    for (text, event) in EVENTS.iter().zip(events()) {
        assert_eq!(read_event(text).unwrap(), event);
    }
    assert_eq!(read_parity(PARITY).unwrap(), parity());
    assert_eq!(
        read_metrics(r#"{"train_loss":1.25,"gone":null}"#).unwrap(),
        BTreeMap::from([("train_loss".into(), 1.25)])
    );
}

#[test]
fn what_is_written_reads_back_and_says_its_version() {
    let v = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap()["v"].clone();
    for spec in specs() {
        let text = write_spec(&spec).unwrap();
        assert_eq!((read_spec(&text).unwrap(), v(&text)), (spec, VERSION.into()));
    }
    let memory = TrainingMemory { adapter: 3, gradients: 1, optimizer: 2, activations: 70 };
    let planned = JobEvent::MemoryPlan(MemoryPlan { memory, gradient_checkpointing: true, paged_optimizer: 5 });
    for event in events().into_iter().chain([planned, JobEvent::MemoryPeak(memory)]) {
        let text = write_event(&event).unwrap();
        assert_eq!((read_event(&text).unwrap(), v(&text)), (event, VERSION.into()));
    }
    let data = TrainingData { records: 5, validation_records: 1, tokens: 70, dropped: 2, truncated: 3 };
    assert_eq!(read_data(Some(&write_data(&data).unwrap())).unwrap(), data);
    assert_eq!(read_data(None).unwrap(), TrainingData::default());
    let text = write_parity(&parity()).unwrap();
    assert_eq!((read_parity(&text).unwrap(), v(&text)), (parity(), VERSION.into()));
}

#[test]
fn every_word_reads_back() {
    use JobState::*;
    for state in [Queued, Running, Pausing, Paused, Interrupted, Succeeded, Failed, Cancelling, Cancelled] {
        let event = JobEvent::State { state, error: None, version: None, live: Some(true) };
        assert_eq!(read_event(&write_event(&event).unwrap()).unwrap(), event);
        assert!(write_event(&event).unwrap().contains(&format!("{state:?}")), "the word is the one first stored");
    }
    for init in [LoraInit::Default, LoraInit::Gaussian, LoraInit::Pissa, LoraInit::Olora] {
        let [spec, _] = specs();
        let spec = JobSpec { start: Start::Fresh(LoraSpec { init, ..LoraSpec::default() }.into()), ..spec };
        assert_eq!(read_spec(&write_spec(&spec).unwrap()).unwrap(), spec);
    }
    for optimizer in [Optimizer::AdamW, Optimizer::AdamW8Bit] {
        let [spec, _] = specs();
        let spec = JobSpec { hyperparameters: Hyperparameters { optimizer, ..recipe() }, ..spec };
        assert_eq!(read_spec(&write_spec(&spec).unwrap()).unwrap(), spec);
    }
    use GradientCheckpointing::{Auto, Off, On};
    let schedules = [(LrSchedule::Cosine, Auto), (LrSchedule::Linear, On), (LrSchedule::Constant, Off)];
    for (schedule, gradient_checkpointing) in schedules {
        for publish in [Publish::Auto, Publish::Live, Publish::VersionOnly] {
            let [spec, _] = specs();
            let too_long = if publish == Publish::Live { TooLong::Drop } else { TooLong::Truncate };
            let hyperparameters = Hyperparameters { schedule, gradient_checkpointing, ..recipe() };
            let spec = JobSpec { publish, too_long, hyperparameters, ..spec };
            assert_eq!(read_spec(&write_spec(&spec).unwrap()).unwrap(), spec);
        }
    }
}

/// Puts `"later": 1` into every object of a document.
fn with_later_fields(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(fields) => {
            fields.values_mut().for_each(with_later_fields);
            fields.insert("later".into(), 1.into());
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(with_later_fields),
        _ => {}
    }
}

#[test]
fn fields_of_a_later_build_are_passed_over() {
    let later = |text: &str| {
        let mut value = serde_json::from_str(text).unwrap();
        // An enumeration with a value is an object of one key, and stays one.
        if let serde_json::Value::Object(fields) = &mut value {
            for (_, inner) in fields.iter_mut().filter(|(key, _)| !["objective", "start"].contains(&key.as_str())) {
                with_later_fields(inner);
            }
            fields.insert("later".into(), serde_json::json!({"a": 1}));
        }
        value.to_string()
    };
    for (text, spec) in SPECS.iter().zip(specs()) {
        assert_eq!(read_spec(&later(text)).unwrap(), spec);
    }
    for (text, event) in EVENTS.iter().zip(events()) {
        assert_eq!(read_event(&later(text)).unwrap(), event, "{}", later(text));
    }
    assert_eq!(read_parity(&later(PARITY)).unwrap(), parity());
}

/// How a field comes: with a default, which is what its absence meant.
#[test]
fn a_field_that_comes_later_has_its_default_in_what_is_stored() {
    fn plain() -> String {
        "plain".into()
    }
    #[derive(Deserialize)]
    struct Later {
        #[serde(flatten)]
        today: RecipeDocument,
        #[serde(default)]
        z_loss: f64,
        #[serde(default = "plain")]
        optimizer: String,
    }
    for text in SPECS {
        let value: serde_json::Value = serde_json::from_str(text).unwrap();
        let later: Later = from_json(&value["hyperparameters"].to_string()).unwrap();
        assert_eq!((later.today.batch_size, later.z_loss, later.optimizer.as_str()), (4, 0.0, "plain"));
    }
}

#[test]
fn a_later_version_is_refused_and_says_so() {
    let later = |text: &str| text.replacen('{', &format!("{{\"v\":{},", VERSION + 1), 1);
    let refused = [
        read_spec(&later(SPECS[0])).map(drop),
        read_event(&later(EVENTS[0])).map(drop),
        read_parity(&later(PARITY)).map(drop),
    ];
    for error in refused {
        assert!(error.unwrap_err().to_string().contains("run the build that wrote it"));
    }
}

#[test]
fn figures_that_are_no_numbers_do_not_make_a_row_unreadable() {
    let metrics = metrics(&[("rewards/margins", f64::NAN), ("logps/chosen", -1.0)]);
    let step = JobEvent::Evaluated { step: 1, loss: f64::INFINITY, metrics };
    let read = read_event(&write_event(&step).unwrap()).unwrap();
    let JobEvent::Evaluated { step: 1, loss, metrics } = read else { panic!("{read:?}") };
    assert!(loss.is_nan() && metrics.keys().eq(["logps/chosen"]), "{metrics:?}");
    let report = ParityReport { mean_abs_effect: f32::NAN, ..parity() };
    assert!(read_parity(&write_parity(&report).unwrap()).unwrap().mean_abs_effect.is_nan());
}
