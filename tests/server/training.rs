//! Training and its data over the wire: pairs in both forms, a job that continues a version, retries, cancelling.

use tenora::api::proto::train_request::{Objective, Start};
use tenora::api::proto::training_event::Event;
use tenora::api::proto::training_service_client::TrainingServiceClient;
use tenora::api::proto::upload_preferences_request::Part;
use tenora::api::proto::virtual_tokens_init::Tokens;
use tenora::api::proto::*;
use tonic::{Code, Status, Streaming};

use super::common::{TestServer, Transport, answer, generate, reason};

const LINE: &str = "{\"prompt\":\"a\",\"chosen\":\"b\",\"rejected\":\"no\"}\n";
const SFT: Objective = Objective::Sft(SftSpec {});
const DPO: Objective = Objective::Dpo(DpoSpec { beta: None, label_smoothing: None });
const ADAPTER: &str = "tenants/a/adapters/tone";

fn header(id: &str, request_id: &str) -> UploadHeader {
    UploadHeader {
        parent: "tenants/a".into(),
        dataset_id: id.into(),
        request_id: request_id.into(),
        ..Default::default()
    }
}

/// What [`LINE`] says.
fn pair() -> Part {
    let message = ChatMessage { role: "user".into(), content: "a".into(), ..Default::default() };
    let prompt = Some(Chat { messages: vec![message] });
    Part::Pair(PreferencePair { prompt, chosen: "b".into(), rejected: "no".into() })
}

fn data(text: &str) -> Part {
    Part::Data(text.as_bytes().to_vec())
}

async fn upload_pairs(
    server: &TestServer,
    key: &str,
    header: UploadHeader,
    parts: Vec<Part>,
) -> Result<Dataset, Status> {
    let parts = std::iter::once(Part::Header(header)).chain(parts);
    let messages: Vec<_> = parts.map(|part| UploadPreferencesRequest { part: Some(part) }).collect();
    Ok(server.datasets(key).await.upload_preferences(futures::stream::iter(messages)).await?.into_inner())
}

async fn upload_chats(server: &TestServer, key: &str, header: UploadHeader) -> Result<Dataset, Status> {
    let line = b"{\"prompt\":\"a\",\"completion\":\"b\"}\n".to_vec();
    let parts = [upload_dataset_request::Part::Header(header), upload_dataset_request::Part::Data(line)];
    let messages = parts.map(|part| UploadDatasetRequest { part: Some(part) });
    Ok(server.datasets(key).await.upload_dataset(futures::stream::iter(messages)).await?.into_inner())
}

async fn datasets(server: &TestServer, key: &str) -> Vec<Dataset> {
    let request = ListDatasetsRequest { parent: "tenants/a".into(), ..Default::default() };
    server.datasets(key).await.list_datasets(request).await.unwrap().into_inner().datasets
}

async fn inspect(server: &TestServer, key: &str, dataset: &Dataset) -> DatasetReport {
    let request = InspectDatasetRequest { name: dataset.name.clone(), ..Default::default() };
    server.datasets(key).await.inspect_dataset(request).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_mixes_the_forms_of_pairs_leaves_nothing() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    for parts in [vec![pair(), data(LINE)], vec![data(LINE), pair()]] {
        let status = upload_pairs(&server, &key, header("mixed", ""), parts).await.unwrap_err();
        assert_eq!((status.code(), reason(&status).as_str()), (Code::InvalidArgument, "INVALID_ARGUMENT"));
    }
    assert_eq!(datasets(&server, &key).await, []);
    server.wait_for_no_blobs().await;
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_forms_of_pairs_mean_the_same() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let of_messages = upload_pairs(&server, &key, header("messages", ""), vec![pair(), pair()]).await.unwrap();
    // Cut in the middle of a line.
    let lines = LINE.repeat(2);
    let (head, tail) = lines.split_at(LINE.len() + 7);
    let of_lines = upload_pairs(&server, &key, header("lines", ""), vec![data(head), data(tail)]).await.unwrap();
    for dataset in [&of_messages, &of_lines] {
        assert_eq!((dataset.kind(), dataset.records), (DatasetKind::Preferences, 2));
    }
    let measured = |report: DatasetReport| DatasetReport { dataset: None, ..report };
    let by_messages = measured(inspect(&server, &key, &of_messages).await);
    assert_eq!(by_messages, measured(inspect(&server, &key, &of_lines).await));
    assert!(by_messages.loss_tokens > 0);
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_id_is_its_methods_own_and_outlives_its_dataset() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let chats = upload_chats(&server, &key, header("chats", "r")).await.unwrap();
    let pairs = upload_pairs(&server, &key, header("pairs", "r"), vec![pair()]).await.unwrap();
    assert_eq!((pairs.name.as_str(), pairs.kind()), ("tenants/a/datasets/pairs", DatasetKind::Preferences));
    assert_eq!(upload_chats(&server, &key, header("chats", "r")).await.unwrap(), chats);
    assert_eq!(upload_pairs(&server, &key, header("pairs", "r"), vec![pair()]).await.unwrap(), pairs);

    let request = DeleteDatasetRequest { name: pairs.name };
    server.datasets(&key).await.delete_dataset(request).await.unwrap();
    let gone = upload_pairs(&server, &key, header("pairs", "r"), vec![pair()]).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound, "{gone:?}");
    let other = upload_pairs(&server, &key, header("others", "r"), vec![pair()]).await.unwrap_err();
    assert_eq!(reason(&other), "REQUEST_ID_REUSED");
    assert_eq!(datasets(&server, &key).await, [Dataset { content: None, ..chats }]);
    upload_pairs(&server, &key, header("pairs", "r2"), vec![pair()]).await.unwrap();
    server.stopped().await;
}

/// Trains `tone`, fast enough that a few steps show.
fn recipe(dataset: &str, objective: Objective, max_steps: u32) -> TrainRequest {
    let hyperparameters =
        Hyperparameters { max_steps: Some(max_steps), learning_rate: Some(1e-2), ..Default::default() };
    TrainRequest {
        parent: "tenants/a".into(),
        adapter_id: "tone".into(),
        dataset: format!("tenants/a/datasets/{dataset}"),
        objective: Some(objective),
        hyperparameters: Some(hyperparameters),
        ..Default::default()
    }
}

async fn watch(client: &mut TrainingServiceClient<Transport>, job: &str) -> Streaming<TrainingEvent> {
    let request = WatchTrainingJobRequest { name: job.into(), after_sequence: 0 };
    client.watch_training_job(request).await.unwrap().into_inner()
}

async fn next(events: &mut Streaming<TrainingEvent>) -> Option<Event> {
    events.message().await.unwrap().map(|event| event.event.unwrap())
}

/// All events that are left, up to the job's end.
async fn rest(mut events: Streaming<TrainingEvent>) -> Vec<Event> {
    let mut all = Vec::new();
    while let Some(event) = next(&mut events).await {
        all.push(event);
    }
    all
}

async fn job(client: &mut TrainingServiceClient<Transport>, name: &str) -> TrainingJob {
    client.get_training_job(GetTrainingJobRequest { name: name.into() }).await.unwrap().into_inner()
}

/// Runs a job to its success: its events, and what it is then.
async fn run(client: &mut TrainingServiceClient<Transport>, request: TrainRequest) -> (Vec<Event>, TrainingJob) {
    let name = client.train(request).await.unwrap().into_inner().name;
    let events = rest(watch(client, &name).await).await;
    assert_eq!(last_state(&events), JobState::Succeeded, "{events:?}");
    (events, job(client, &name).await)
}

fn last_state(events: &[Event]) -> JobState {
    match events.last() {
        Some(Event::State(change)) => change.state(),
        other => panic!("{other:?}"),
    }
}

fn steps(events: &[Event]) -> Vec<&StepTaken> {
    events.iter().filter_map(|event| if let Event::Step(step) = event { Some(step) } else { None }).collect()
}

/// Whether the version was live when the job ended.
fn live_at_the_end(events: &[Event]) -> Option<bool> {
    match events.last() {
        Some(Event::State(change)) => change.live,
        other => panic!("{other:?}"),
    }
}

async fn jobs(client: &mut TrainingServiceClient<Transport>) -> Vec<String> {
    let request = ListTrainingJobsRequest { parent: "tenants/a".into(), ..Default::default() };
    let listed = client.list_training_jobs(request).await.unwrap().into_inner().training_jobs;
    listed.into_iter().map(|job| job.name).collect()
}

async fn versions(server: &TestServer, key: &str) -> Result<Vec<String>, Status> {
    let request = ListAdapterVersionsRequest { parent: ADAPTER.into(), ..Default::default() };
    let listed = server.adapters(key).await.list_adapter_versions(request).await?.into_inner().versions;
    Ok(listed.into_iter().map(|version| version.name).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn preferences_continue_a_version_that_is_their_reference() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    server.upload(&key, "a", "chats").await.unwrap();
    upload_pairs(&server, &key, header("pairs", ""), vec![data(&LINE.repeat(4))]).await.unwrap();
    let mut training = server.training(&key).await;
    let (events, first) = run(&mut training, recipe("chats", SFT, 10)).await;
    let learnt = steps(&events);
    assert!(learnt[9].loss < learnt[0].loss, "what was not learnt would be its own reference: {learnt:?}");
    assert_eq!(first.adapter_version, format!("{ADAPTER}/versions/1"));

    let start = Some(Start::FromVersion(first.adapter_version.clone()));
    let (events, second) = run(&mut training, TrainRequest { start, ..recipe("pairs", DPO, 2) }).await;
    let taken = steps(&events);
    assert_eq!(taken.iter().map(|step| step.step).collect::<Vec<_>>(), [1, 2]);
    assert!(taken[0].margin.expect("a margin").abs() < 1e-3, "{taken:?}");
    assert_eq!((second.state(), second.step, second.total_steps), (JobState::Succeeded, 2, 2));
    assert_eq!(second.adapter_version, format!("{ADAPTER}/versions/2"));
    for name in ["rewards/chosen", "rewards/rejected", "rewards/margins"] {
        assert!(taken[0].metrics[name].abs() < 1e-3, "{name}: {taken:?}");
    }
    assert!(taken[0].metrics["logps/chosen"] < 0.0 && taken[0].metrics.contains_key("logps/rejected"), "{taken:?}");
    assert_eq!(taken[1].metrics["rewards/accuracies"], taken[1].accuracy.expect("an accuracy"));
    assert!(learnt.iter().all(|step| (0.0..=1.0).contains(&step.metrics["mean_token_accuracy"])));
    assert_eq!((live_at_the_end(&events), second.live), (Some(false), false));
    assert!(job(&mut training, &first.name).await.live);
    assert_eq!(versions(&server, &key).await.unwrap(), [second.adapter_version, first.adapter_version.clone()]);
    let request = GetAdapterRequest { name: ADAPTER.into() };
    let adapter = server.adapters(&key).await.get_adapter(request).await.unwrap().into_inner();
    assert_eq!(adapter.live_version, first.adapter_version, "the next version waits to be set live");
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retried_call_makes_one_job_and_a_validated_one_none() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    server.upload(&key, "a", "chats").await.unwrap();
    let mut training = server.training(&key).await;
    let request = recipe("chats", SFT, 1);
    let validate = TrainRequest { validate_only: true, ..request.clone() };
    let validated = training.train(validate.clone()).await.unwrap().into_inner();
    assert_eq!((validated.name.as_str(), validated.state()), ("", JobState::Unspecified), "there is no job");
    assert_eq!((validated.total_steps, validated.records), (1, 4));
    assert!(validated.tokens > 0 && validated.create_time.is_none(), "{validated:?}");
    assert_eq!(jobs(&mut training).await, Vec::<String>::new());

    let request = TrainRequest { request_id: "r".into(), ..request };
    let first = training.train(request.clone()).await.unwrap().into_inner();
    training.train(validate).await.unwrap();
    let retried = training.train(request).await.unwrap().into_inner();
    assert_eq!(retried.name, first.name);
    assert_eq!(jobs(&mut training).await, [first.name]);
    server.stopped().await;
}

/// A retry means what its names meant at first; another request under the id is refused and makes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_id_stands_for_one_request() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    server.upload(&key, "a", "chats").await.unwrap();
    for seed in [1, 2] {
        server.import(&key, "a", "base", &server.package(seed)).await.unwrap();
    }
    let mut training = server.training(&key).await;
    let start = Some(Start::FromVersion("tenants/a/adapters/base".into()));
    let request = TrainRequest { request_id: "r".into(), start, ..recipe("chats", SFT, 1) };
    let first = training.train(request.clone()).await.unwrap().into_inner();
    rest(watch(&mut training, &first.name).await).await;
    let live = SetLiveVersionRequest {
        name: "tenants/a/adapters/base".into(),
        version: "tenants/a/adapters/base/versions/2".into(),
        ..Default::default()
    };
    server.adapters(&key).await.set_live_version(live).await.unwrap();
    let retried = training.train(request.clone()).await.unwrap().into_inner();
    assert_eq!(retried.name, first.name, "the name meant version 1 when it was first said");
    // Spelling out a default changes nothing.
    let mut spelled = request.clone();
    spelled.hyperparameters.as_mut().unwrap().batch_size = Some(4);
    assert_eq!(training.train(spelled).await.unwrap().into_inner().name, first.name);

    let target = TrainRequest { adapter_id: "other".into(), ..request.clone() };
    let steps = TrainRequest { hyperparameters: recipe("chats", SFT, 2).hyperparameters, ..request.clone() };
    let version = Some(Start::FromVersion("tenants/a/adapters/base/versions/1".into()));
    let start = TrainRequest { start: version, ..request };
    for other in [target, steps, start] {
        let status = training.train(other).await.unwrap_err();
        assert_eq!((status.code(), reason(&status).as_str()), (Code::InvalidArgument, "REQUEST_ID_REUSED"));
        assert!(status.message().contains(&first.name), "it names the first result: {status:?}");
    }
    assert_eq!(jobs(&mut training).await, [first.name]);
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_leaves_no_version() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    server.upload(&key, "a", "chats").await.unwrap();
    let mut training = server.training(&key).await;
    let name = training.train(recipe("chats", SFT, 100_000)).await.unwrap().into_inner().name;
    let mut events = watch(&mut training, &name).await;
    while !matches!(next(&mut events).await.expect("the job goes on"), Event::Step(_)) {}
    let request = CancelTrainingJobRequest { name: name.clone() };
    let cancelled = training.cancel_training_job(request).await.unwrap().into_inner();
    assert_eq!(cancelled.state(), JobState::Cancelling);
    assert_eq!(last_state(&rest(events).await), JobState::Cancelled);
    assert_eq!(job(&mut training, &name).await.state(), JobState::Cancelled);
    assert_eq!(versions(&server, &key).await.unwrap_err().code(), Code::NotFound);
    server.stopped().await;
}

/// A learning rate at which nothing can be learnt: the version is there, is not live, and says why.
#[tokio::test(flavor = "multi_thread")]
async fn a_diverged_adapter_never_goes_live() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    server.upload(&key, "a", "chats").await.unwrap();
    let mut training = server.training(&key).await;
    let taught = TrainRequest { publish: Publish::VersionOnly.into(), ..recipe("chats", SFT, 60) };
    let (_, taught) = run(&mut training, taught).await;
    assert!(!taught.live);
    let mut request = recipe("chats", SFT, 4);
    (request.publish, request.start) = (Publish::Live.into(), Some(Start::FromVersion(taught.adapter_version.clone())));
    request.hyperparameters.as_mut().unwrap().learning_rate = Some(1.0);
    let name = training.train(request).await.unwrap().into_inner().name;
    let events = rest(watch(&mut training, &name).await).await;
    assert_eq!((last_state(&events), live_at_the_end(&events)), (JobState::Failed, Some(false)), "{events:?}");
    let ended = job(&mut training, &name).await;
    assert!(ended.error.starts_with("TRAINING_DIVERGED: ") && !ended.live, "{ended:?}");
    assert_eq!(versions(&server, &key).await.unwrap(), [ended.adapter_version.clone(), taught.adapter_version]);
    let mut adapters = server.adapters(&key).await;
    let request = ListAdapterVersionsRequest { parent: ADAPTER.into(), ..Default::default() };
    let kept = adapters.list_adapter_versions(request).await.unwrap().into_inner().versions.remove(0);
    assert!(kept.held_reason.starts_with("TRAINING_DIVERGED: ") && !kept.live, "{kept:?}");
    let adapter = adapters.get_adapter(GetAdapterRequest { name: ADAPTER.into() }).await.unwrap().into_inner();
    assert_eq!(adapter.live_version, "");

    // It is its owner's, who may see for himself.
    let request = SetLiveVersionRequest { name: ADAPTER.into(), version: kept.name, ..Default::default() };
    assert_eq!(adapters.set_live_version(request).await.unwrap().into_inner().live_version, ended.adapter_version);
    assert!(job(&mut training, &name).await.live);
    server.stopped().await;
}

/// What an import answers says too whether the version serves.
#[tokio::test(flavor = "multi_thread")]
async fn an_import_says_whether_its_version_is_live() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let first = server.import(&key, "a", "tone", &server.package(1)).await.unwrap();
    let second = server.import(&key, "a", "tone", &server.package(2)).await.unwrap();
    assert_eq!((first.live, second.live), (true, false));
    server.stopped().await;
}

/// A job gives back its whole recipe.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_tells_what_it_was_asked_for() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    upload_pairs(&server, &key, header("pairs", ""), vec![data(&LINE.repeat(4))]).await.unwrap();
    let mut training = server.training(&key).await;
    let request = TrainRequest { too_long: TooLong::Drop.into(), ..recipe("pairs", DPO, 1) };
    let (_, done) = run(&mut training, request).await;
    let spec = done.spec.unwrap();
    assert_eq!(spec.objective, Some(Objective::Dpo(DpoSpec { beta: Some(0.1), label_smoothing: Some(0.0) })));
    assert_eq!((spec.dataset.as_str(), spec.too_long()), ("tenants/a/datasets/pairs", TooLong::Drop));
    assert!(matches!(spec.start, Some(Start::Lora(lora)) if lora.rank == Some(8) && lora.target_modules.len() == 7));
    let all = spec.hyperparameters.unwrap();
    assert_eq!((all.learning_rate, all.max_steps, all.beta2), (Some(1e-2), Some(1), Some(0.999)));
    assert_eq!((done.records, done.validation_records, done.dropped_records), (4, 0, 0));
    server.stopped().await;
}

/// What an adapter answers, to the last bit.
async fn scores(server: &TestServer, key: &str, adapter: &str) -> Vec<ScoreResult> {
    let input = ScoreInput { sequence: Some(score_input::Sequence::Text("a question, and b an answer".into())) };
    let request = ScoreRequest { adapter: adapter.into(), inputs: vec![input; 2], ..Default::default() };
    server.generation(key).await.score(request).await.unwrap().into_inner().results
}

/// Fresh and continued; served in one batch with all others and the base as alone; exported, and imported under the same digest.
/// A DoRA with rows of these tokens.
fn of_tokens(ids: &[u32]) -> LoraSpec {
    LoraSpec { rank: Some(4), use_dora: true, trainable_token_indices: ids.to_vec(), ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_is_trained_and_served_beside_the_others_and_comes_back_whole() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    server.upload(&key, "a", "chats").await.unwrap();
    let mut training = server.training(&key).await;
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let scaled_output = Ia3Spec { target_modules: names(&["o_proj"]), ..Default::default() };
    // Every rank that the tiny model's layers have, so that it goes on from where it was.
    let of_full = FullSpec { target_modules: names(&["all-linear"]), extract_rank: Some(64), ..Default::default() };
    let starts = [
        ("lora", "lora", Start::Lora(LoraSpec { rank: Some(4), ..Default::default() })),
        ("rslora", "lora", Start::Lora(LoraSpec { rank: Some(2), use_rslora: true, ..Default::default() })),
        ("dora", "dora", Start::Lora(LoraSpec { rank: Some(4), use_dora: true, ..Default::default() })),
        ("biased", "lora", Start::Lora(LoraSpec { rank: Some(4), lora_bias: true, ..Default::default() })),
        ("tokens", "dora", Start::Lora(of_tokens(&[101, 32, 7]))),
        ("ia3", "ia3", Start::Ia3(Ia3Spec::default())),
        ("ia3-of-outputs", "ia3", Start::Ia3(scaled_output)),
        // More than a block of the KV cache, and less.
        ("prompt", "prompt", prompt_of_text(20)),
        ("short-prompt", "prompt", Start::PromptTuning(PromptTuningSpec { num_virtual_tokens: Some(3), init: None })),
        ("prefix", "prefix", prefix(18, 0)),
        ("projected-prefix", "prefix", prefix(5, 8)),
        ("pfeiffer", "bottleneck", Start::Bottleneck(BottleneckSpec::default())),
        ("houlsby", "bottleneck", houlsby(4)),
        ("of-full", "lora", Start::Full(of_full)),
    ];
    let mut served = vec![String::new()];
    for (id, kind, start) in &starts {
        let request = TrainRequest { adapter_id: (*id).into(), start: Some(start.clone()), ..recipe("chats", SFT, 12) };
        let (events, job) = run(&mut training, request).await;
        let taken = steps(&events);
        assert!(taken[11].loss < taken[0].loss, "{id}: {taken:?}");
        let spec = job.spec.expect("a spec");
        assert_eq!(std::mem::discriminant(&spec.start.expect("a start")), std::mem::discriminant(start));
        let again = Some(Start::FromVersion(job.adapter_version.clone()));
        let request = TrainRequest { adapter_id: (*id).into(), start: again, ..recipe("chats", SFT, 2) };
        let (events, _) = run(&mut training, request).await;
        assert!((steps(&events)[0].loss - taken[11].loss).abs() < 0.5, "{id} goes on from where it was");
        let name = format!("tenants/a/adapters/{id}");
        let request = ListAdapterVersionsRequest { parent: name.clone(), ..Default::default() };
        let listed = server.adapters(&key).await.list_adapter_versions(request).await.unwrap().into_inner().versions;
        assert!(listed.iter().all(|version| version.kind == *kind && !version.no_effect), "{listed:?}");
        served.push(name);
    }
    let mut alone = Vec::new();
    for name in &served {
        alone.push(scores(&server, &key, name).await);
    }
    assert!((1..alone.len()).all(|i| !alone[..i].contains(&alone[i])), "each does something of its own");
    let together = futures::future::join_all(served.iter().map(|name| scores(&server, &key, name))).await;
    assert_eq!(together, alone, "bits depend on the batch");
    for (name, scored) in served.iter().zip(&alone).skip(1) {
        let request = ExportAdapterRequest { name: name.clone() };
        let mut messages = server.adapters(&key).await.export_adapter(request).await.unwrap().into_inner();
        let (mut files, mut exported) = (std::collections::BTreeMap::<String, Vec<u8>>::new(), None);
        while let Some(message) = messages.message().await.unwrap() {
            match message.part.unwrap() {
                export_adapter_response::Part::Version(version) => exported = Some(version),
                export_adapter_response::Part::Chunk(chunk) => {
                    files.entry(chunk.filename).or_default().extend(chunk.data);
                }
            }
        }
        let files: Vec<_> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
        let id = format!("{}-again", name.rsplit('/').next().unwrap());
        let imported = server.import_files(&key, "a", &id, &files).await.unwrap();
        let exported = exported.expect("the version");
        assert_eq!((imported.digest, imported.kind), (exported.digest, exported.kind));
        assert_eq!(&scores(&server, &key, &format!("tenants/a/adapters/{id}")).await, scored);
    }
    server.stopped().await;
}

fn houlsby(size: u32) -> Start {
    Start::Bottleneck(BottleneckSpec {
        bottleneck_size: Some(size),
        placement: BottleneckPlacement::Houlsby.into(),
        non_linearity: NonLinearity::Gelu.into(),
        layers_to_transform: Vec::new(),
    })
}

fn prompt_of_text(count: u32) -> Start {
    let init = Some(VirtualTokensInit { tokens: Some(Tokens::Text("Answer in rhymes.".into())) });
    Start::PromptTuning(PromptTuningSpec { num_virtual_tokens: Some(count), init })
}

fn prompt_of(tokens: Tokens) -> Start {
    let init = Some(VirtualTokensInit { tokens: Some(tokens) });
    Start::PromptTuning(PromptTuningSpec { num_virtual_tokens: None, init })
}

fn prefix(count: u32, projection_size: u32) -> Start {
    Start::PrefixTuning(PrefixTuningSpec { num_virtual_tokens: Some(count), init: None, projection_size })
}

/// Virtual tokens take positions, and are told apart from the prompt's in what is counted.
#[tokio::test(flavor = "multi_thread")]
async fn virtual_tokens_are_no_tokens_of_the_prompt() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    server.upload(&key, "a", "chats").await.unwrap();
    let mut training = server.training(&key).await;
    let request = TrainRequest { adapter_id: "x".into(), start: Some(prefix(20, 0)), ..recipe("chats", SFT, 2) };
    run(&mut training, request).await;
    let mut generation = server.generation(&key).await;
    let request = |adapter: &str, ids: &[u32]| {
        let prompt = Some(generate_request::Prompt::TokenIds(TokenIds { ids: ids.to_vec() }));
        GenerateRequest { prompt, ..generate(adapter, "", 3) }
    };
    let ids: Vec<u32> = (0..40).collect();
    let mut usages = Vec::new();
    for adapter in ["", "tenants/a/adapters/x", "tenants/a/adapters/x"] {
        usages.push(answer(&mut generation, request(adapter, &ids)).await.unwrap().usage);
    }
    let counted = |usage: &Usage| (usage.prompt_tokens, usage.completion_tokens, usage.virtual_tokens);
    assert_eq!(usages.iter().map(counted).collect::<Vec<_>>(), [(40, 3, 0), (40, 3, 20), (40, 3, 20)]);
    assert_eq!(usages[1].cached_tokens, Some(0));
    assert!(usages[2].cached_tokens > Some(0) && usages[2].cached_tokens < Some(40), "{usages:?}");
    // What fits the base's context no longer does behind them.
    let long: Vec<u32> = (0..240).collect();
    answer(&mut generation, request("", &long)).await.unwrap();
    let refused = answer(&mut generation, request("tenants/a/adapters/x", &long)).await.unwrap_err();
    assert!(refused.message().contains("20 virtual tokens"), "{refused:?}");
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_kind_cannot_do_is_refused_by_name() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    server.upload(&key, "a", "chats").await.unwrap();
    let mut training = server.training(&key).await;
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let ia3 = |targets: &[&str], feedforward: &[&str]| {
        Start::Ia3(Ia3Spec { target_modules: names(targets), feedforward_modules: names(feedforward) })
    };
    for (start, field) in [
        (ia3(&["q_proj"], &["q_proj"]), "ia3.feedforward_modules"),
        (ia3(&["q_proj"], &["o_proj"]), "ia3.feedforward_modules"),
        (ia3(&["qkv_proj"], &[]), "ia3.target_modules"),
        (ia3(&["lm_head"], &[]), "ia3.target_modules[0]"),
        (Start::Lora(LoraSpec { rank: Some(0), use_dora: true, ..Default::default() }), "lora.rank"),
        (Start::Lora(LoraSpec { lora_bias: true, use_dora: true, ..Default::default() }), "lora.lora_bias"),
        (
            Start::Lora(LoraSpec { lora_bias: true, init: LoraInit::Pissa.into(), ..Default::default() }),
            "lora.lora_bias",
        ),
        (Start::Lora(of_tokens(&[7, 1 << 20])), "lora.trainable_token_indices"),
        (Start::Lora(of_tokens(&(0..257).collect::<Vec<_>>())), "max_trained_tokens"),
        (prompt_of_text(0), "prompt_tuning.num_virtual_tokens"),
        (prompt_of_text(257), "max_virtual_tokens"),
        (prompt_of_text(255), "context"),
        (prompt_of(Tokens::Text(String::new())), "prompt_tuning.init"),
        (prompt_of(Tokens::TokenIds(TokenIds { ids: vec![1, 1 << 20] })), "prompt_tuning.init.token_ids"),
        (prefix(4, 4097), "prefix_tuning.projection_size"),
        (houlsby(0), "bottleneck.bottleneck_size"),
        (houlsby(257), "max_rank"),
    ] {
        let request = TrainRequest { start: Some(start), ..recipe("chats", SFT, 1) };
        let refused = training.train(request).await.unwrap_err();
        assert!(refused.code() == Code::InvalidArgument && refused.message().contains(field), "{field}: {refused:?}");
    }
    server.stopped().await;
}

/// The model is streamed as a folder that is read as a base; the LoRA of a high rank scores about as it does.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_fine_tuning_is_exported_or_becomes_a_lora_near_to_it() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    server.upload(&key, "a", "chats").await.unwrap();
    let mut training = server.training(&key).await;
    let mut request = recipe("chats", SFT, 6);
    request.hyperparameters.as_mut().unwrap().learning_rate = Some(1e-3);
    let of = |extract_rank| {
        Some(Start::Full(FullSpec { target_modules: vec!["all-linear".into()], extract_rank, ..Default::default() }))
    };
    let (events, kept) = run(&mut training, TrainRequest { start: of(None), ..request.clone() }).await;
    let taken = steps(&events);
    assert!(taken[5].loss < taken[0].loss, "{taken:?}");
    assert!(kept.has_model && kept.adapter_version.is_empty() && live_at_the_end(&events).is_none());
    let folder = tempfile::tempdir().unwrap();
    let export = ExportTrainedModelRequest { name: kept.name.clone(), ..Default::default() };
    let mut parts = training.export_trained_model(export.clone()).await.unwrap().into_inner();
    let first = parts.message().await.unwrap().unwrap().part;
    assert_eq!(first, Some(export_trained_model_response::Part::Job(kept.clone())));
    while let Some(part) = parts.message().await.unwrap() {
        let Some(export_trained_model_response::Part::Chunk(chunk)) = part.part else { panic!("{part:?}") };
        let path = folder.path().join(chunk.filename);
        let mut file = std::fs::File::options().create(true).append(true).open(path).unwrap();
        std::io::Write::write_all(&mut file, &chunk.data).unwrap();
    }
    let trained = tenora::weights::Weights::from_folder(folder.path()).unwrap();
    assert_eq!(trained.config.vocab_size, server.model.vocab_size());

    // Which this server's base is not.
    let gguf = ExportTrainedModelRequest { format: ModelFormat::Gguf.into(), ..export.clone() };
    let refused = training.export_trained_model(gguf).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::FailedPrecondition, "NO_GGUF_FORM"));

    // Every rank of the tiny model's layers: nothing of the change is left out.
    let (_, made) = run(&mut training, TrainRequest { start: of(Some(64)), ..request.clone() }).await;
    assert!(!made.has_model && made.adapter_version == format!("{ADAPTER}/versions/1"));
    let request = ListAdapterVersionsRequest { parent: ADAPTER.into(), ..Default::default() };
    let version =
        server.adapters(&key).await.list_adapter_versions(request).await.unwrap().into_inner().versions.remove(0);
    assert!(version.metrics["extracted_share"] > 0.999, "{version:?}");
    assert_eq!(version.kind, "lora");
    let none = training
        .export_trained_model(ExportTrainedModelRequest { name: made.name.clone(), ..Default::default() })
        .await
        .unwrap_err();
    assert_eq!((none.code(), reason(&none).as_str()), (Code::FailedPrecondition, "NO_MODEL"));

    let other = server.tenant("b").await;
    let stranger = server.training(&other).await.export_trained_model(export.clone()).await.unwrap_err();
    assert_eq!(stranger.code(), Code::PermissionDenied);
    training.delete_training_job(DeleteTrainingJobRequest { name: kept.name }).await.unwrap();
    assert_eq!(training.export_trained_model(export).await.unwrap_err().code(), Code::NotFound);
    server.stopped().await;
}
