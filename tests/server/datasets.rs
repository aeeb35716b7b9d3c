//! The files that people bring, over the wire: what is recognised, what is refused and how, records as rendered, and what becomes of long
//! ones in a job.

use std::io::Write as _;

use futures::StreamExt as _;
use tenora::api::proto::train_request::Objective;
use tenora::api::proto::training_event::Event;
use tenora::api::proto::*;
use tenora::config::Limits;
use tonic::{Code, Status};

use super::common::{TestServer, reason};

async fn upload(server: &TestServer, key: &str, id: &str, file: &[u8], pairs: bool) -> Result<Dataset, Status> {
    let header = UploadHeader { parent: "tenants/a".into(), dataset_id: id.into(), ..Default::default() };
    let pieces = file.chunks(1000).map(<[u8]>::to_vec);
    let mut client = server.datasets(key).await;
    let answer = if pairs {
        use upload_preferences_request::Part;
        let parts: Vec<_> = std::iter::once(Part::Header(header)).chain(pieces.map(Part::Data)).collect();
        let messages = parts.into_iter().map(|part| UploadPreferencesRequest { part: Some(part) });
        client.upload_preferences(futures::stream::iter(messages)).await?
    } else {
        use upload_dataset_request::Part;
        let parts: Vec<_> = std::iter::once(Part::Header(header)).chain(pieces.map(Part::Data)).collect();
        let messages = parts.into_iter().map(|part| UploadDatasetRequest { part: Some(part) });
        client.upload_dataset(futures::stream::iter(messages)).await?
    };
    Ok(answer.into_inner())
}

async fn inspect(server: &TestServer, key: &str, request: InspectDatasetRequest) -> Result<DatasetReport, Status> {
    Ok(server.datasets(key).await.inspect_dataset(request).await?.into_inner())
}

fn named(counts: &[NamedCount]) -> Vec<(&str, u64)> {
    counts.iter().map(|count| (count.name.as_str(), count.count)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_says_what_it_took_the_file_for_and_a_report_shows_it() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let file =
        br#"[{"conversations":[{"from":"human","value":"Why?"},{"from":"gpt","value":"So."}],"score":1,"tools":null},
        {"instruction":"Why?","input":"","output":"So.","score":2}]"#;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(file).unwrap();
    let packed = encoder.finish().unwrap();
    let dataset = upload(&server, &key, "mixed", &packed, false).await.unwrap();
    assert_eq!((dataset.records, dataset.size_bytes), (2, packed.len() as u64));
    let content = dataset.content.unwrap();
    assert_eq!(content.format, "JSON array, gzip");
    assert_eq!(named(&content.shapes), [("ShareGPT conversations", 1), ("Alpaca instruction", 1)]);
    assert_eq!(named(&content.ignored_fields), [("score", 2)]);

    let request = InspectDatasetRequest { name: dataset.name.clone(), show: 1, max_length: 20 };
    let report = inspect(&server, &key, request.clone()).await.unwrap();
    assert_eq!(report.content, Some(content));
    assert_eq!((report.duplicates, report.max_length, report.too_long), (1, 20, 2));
    assert_eq!(report.too_long_records.iter().map(|record| record.line).collect::<Vec<_>>(), [1, 2]);
    let [one] = &report.rendered[..] else { panic!("{:?}", report.rendered) };
    let spans: Vec<_> = one.spans.iter().map(|span| (span.text.as_str(), span.in_loss)).collect();
    assert_eq!(spans, [("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", false), ("So.<|im_end|>", true)]);
    assert_eq!(one.spans[1].token_ids, [83, 111, 46, 257]);

    let default = inspect(&server, &key, InspectDatasetRequest { name: dataset.name.clone(), ..Default::default() });
    let limits = Limits::default();
    assert!(u64::from(default.await.unwrap().max_length) <= limits.max_record_tokens);
    for wrong in
        [InspectDatasetRequest { show: 101, ..request.clone() }, InspectDatasetRequest { max_length: 1, ..request }]
    {
        assert_eq!(inspect(&server, &key, wrong).await.unwrap_err().code(), Code::InvalidArgument);
    }
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_file_is_told_with_its_lines_and_leaves_nothing() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let bad = "{\"prompt\":\"a\",\"completion\":\"b\"}\n{\"prompt\":\"é\",\"label\":true}\n".repeat(500);
    let status = upload(&server, &key, "bad", bad.as_bytes(), false).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::InvalidArgument, "INVALID_RECORD"));
    let message = status.message();
    assert!(
        message.starts_with("data: 500 of 1000 records can't be used; the first 20:\nlines 2, 4, 6, "),
        "{message}"
    );
    let fits = (0..2000)
        .map(|i| format!("{{\"prompt\":\"a\",\"completion\":\"b\",\"train_{i}é\":NaN}}\n"))
        .collect::<String>();
    let status = upload(&server, &key, "bad", fits.as_bytes(), false).await.unwrap_err();
    assert!(status.message().starts_with("data: 2000 of 2000"), "{status:?}");
    let status = upload(&server, &key, "bad", b"PAR1....", false).await.unwrap_err();
    assert_eq!(reason(&status), "UNSUPPORTED_FORMAT");
    server.wait_for_no_blobs().await;
    server.stopped().await;
}

/// One step: its loss and the norm of its gradient.
async fn first_step(server: &TestServer, key: &str, dataset: &str) -> (f64, f64) {
    let dpo = Objective::Dpo(DpoSpec { beta: None, label_smoothing: None });
    let events = train(server, key, dataset, dpo, Hyperparameters { max_steps: Some(1), ..Default::default() }).await;
    let step = events.iter().find_map(|event| if let Event::Step(step) = event { Some(step.clone()) } else { None });
    let step = step.unwrap_or_else(|| panic!("{events:?}"));
    (step.loss, step.grad_norm)
}

async fn train(
    server: &TestServer,
    key: &str,
    dataset: &str,
    objective: Objective,
    hyperparameters: Hyperparameters,
) -> Vec<Event> {
    run(server, key, request(dataset, objective, hyperparameters)).await.0
}

/// A job's events to its end, and what it is then.
async fn run(server: &TestServer, key: &str, request: TrainRequest) -> (Vec<Event>, TrainingJob) {
    let mut client = server.training(key).await;
    let name = client.train(request).await.unwrap().into_inner().name;
    let watch = WatchTrainingJobRequest { name: name.clone(), after_sequence: 0 };
    let events = client.watch_training_job(watch).await.unwrap().into_inner();
    let events = events.map(|event| event.unwrap().event.unwrap()).collect().await;
    (events, client.get_training_job(GetTrainingJobRequest { name }).await.unwrap().into_inner())
}

fn request(dataset: &str, objective: Objective, hyperparameters: Hyperparameters) -> TrainRequest {
    TrainRequest {
        parent: "tenants/a".into(),
        adapter_id: dataset.into(),
        dataset: format!("tenants/a/datasets/{dataset}"),
        objective: Some(objective),
        hyperparameters: Some(hyperparameters),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_beside_whole_chats_is_trained_once() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let chats = r#""chosen":[{"role":"user","content":"P"},{"role":"assistant","content":"good"}],"rejected":[{"role":"user","content":"P"},{"role":"assistant","content":"bad"}]"#;
    let beside = format!("{{\"prompt\":\"P\",{chats}}}\n").repeat(4);
    let without = format!("{{{chats}}}\n").repeat(4);
    upload(&server, &key, "beside", beside.as_bytes(), true).await.unwrap();
    upload(&server, &key, "without", without.as_bytes(), true).await.unwrap();
    let (with, plain) = (first_step(&server, &key, "beside").await, first_step(&server, &key, "without").await);
    assert_eq!(with, plain, "loss and norm of the gradient");
    let mut tokens = Vec::new();
    for id in ["beside", "without"] {
        let request = InspectDatasetRequest { name: format!("tenants/a/datasets/{id}"), ..Default::default() };
        let report = inspect(&server, &key, request).await.unwrap();
        tokens.push((report.tokens, report.loss_tokens));
    }
    assert_eq!(tokens[0], tokens[1]);
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn long_records_are_refused_together_or_treated_as_asked() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let line = |n: usize| format!("{{\"prompt\":\"a\",\"completion\":\"{}\"}}\n", "b".repeat(n));
    let file = [1, 60, 2, 70, 3].map(line).concat();
    upload(&server, &key, "long", file.as_bytes(), false).await.unwrap();
    let sft = || Objective::Sft(SftSpec {});
    let recipe = || Hyperparameters { max_length: Some(40), max_steps: Some(1), ..Default::default() };
    let validate = TrainRequest { validate_only: true, ..request("long", sft(), recipe()) };
    let status = server.training(&key).await.train(validate).await.unwrap_err();
    assert_eq!(reason(&status), "RECORD_TOO_LONG");
    let words = "2 of 5 records are longer than 40 tokens (max_length): line 2 (";
    assert!(status.message().contains(words) && status.message().contains("line 4 ("), "{status:?}");
    for (too_long, dropped, truncated) in [(TooLong::Drop, 2, 0), (TooLong::Truncate, 0, 2)] {
        let request = TrainRequest { too_long: too_long.into(), ..request("long", sft(), recipe()) };
        let (events, job) = run(&server, &key, request).await;
        assert!(
            matches!(events.last(), Some(Event::State(change)) if change.state() == JobState::Succeeded),
            "{events:?}"
        );
        assert_eq!((job.dropped_records, job.truncated_records), (dropped, truncated));
    }
    server.stopped().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_that_ends_with_the_assistant_is_continued_where_asked() {
    let server = TestServer::start().await;
    let key = server.tenant("a").await;
    let message =
        |role: &str, content: &str| ChatMessage { role: role.into(), content: content.into(), ..Default::default() };
    let ask = |messages: Vec<ChatMessage>, continue_final_message: bool| GenerateRequest {
        prompt: Some(generate_request::Prompt::Chat(Chat { messages })),
        stopping: Some(Stopping { max_tokens: Some(4), ignore_eos: true, ..Default::default() }),
        continue_final_message,
        ..Default::default()
    };
    let begun = || vec![message("developer", "d"), message("user", "q"), message("assistant", "So")];
    let mut client = server.generation(&key).await;
    let refused = client.generate(ask(begun(), false)).await.unwrap_err();
    assert_eq!(reason(&refused), "CHAT_ENDS_WITH_ASSISTANT");
    assert!(refused.message().contains("continue_final_message"), "{refused:?}");
    let wrong = client.generate(ask(vec![message("user", "q")], true)).await.unwrap_err();
    assert_eq!(wrong.code(), Code::InvalidArgument);
    let continued = super::common::answer(&mut client, ask(begun(), true)).await.unwrap();
    let text = "<|im_start|>system\nd<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nSo";
    let raw = super::common::answer(&mut client, super::common::generate("", text, 4)).await.unwrap();
    assert_eq!((continued.ids, continued.usage.prompt_tokens), (raw.ids, raw.usage.prompt_tokens));
    server.stopped().await;
}
