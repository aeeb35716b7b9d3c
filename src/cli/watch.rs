//! Following a training job: its events, a progress bar (lines where there is no terminal), a plot of the loss at the end.

use std::collections::{BTreeMap, HashMap};
use std::io::{Write as _, stdout};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tokio_stream::StreamExt as _;

use super::show::{printable, state, whether_live};
use super::{Failure, Result, plot as draw};
use crate::api::client::{Client, proto};
use proto::training_event::Event;

/// Without a terminal: time between two lines of progress.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// The plot's size in characters.
const PLOT: (usize, usize) = (60, 6);

/// A job that has ended well.
pub(super) struct TrainingHistory {
    pub steps: Vec<proto::StepTaken>,
    /// The version it made.
    pub version: String,
    /// Whether that is its adapter's live one.
    pub live: bool,
}

/// Follows a job until it succeeds; any other end is an error that says what to do.
pub(super) async fn follow(
    client: &Client,
    job: &str,
    mut on_event: impl FnMut(&proto::TrainingEvent) -> Result<()>,
) -> Result<TrainingHistory> {
    let request = proto::WatchTrainingJobRequest { name: job.to_owned(), after_sequence: 0 };
    let mut events = client.watch_training_job(request).await?;
    let mut steps: Vec<proto::StepTaken> = Vec::new();
    while let Some(event) = events.next().await {
        let event = event?;
        on_event(&event)?;
        match event.event {
            Some(Event::Step(step)) => {
                // A job that was interrupted and resumed starts over.
                steps.retain(|earlier| earlier.step < step.step);
                steps.push(step);
            }
            Some(Event::State(change)) => match change.state() {
                proto::JobState::Succeeded => {
                    let live = change.live.unwrap_or_default();
                    return Ok(TrainingHistory { steps, version: change.adapter_version, live });
                }
                proto::JobState::Failed => {
                    let kept = match change.adapter_version.as_str() {
                        "" => String::new(),
                        version => format!("\n{}", whether_live(version, false)),
                    };
                    return Err(Failure::other(format!("{job} failed: {}{kept}", printable(&change.error))));
                }
                proto::JobState::Cancelled => return Err(Failure::other(format!("{job} was cancelled"))),
                // It may be an interruption of the past, after which the job was resumed.
                proto::JobState::Interrupted => {
                    let request = proto::GetTrainingJobRequest { name: job.to_owned() };
                    still_interrupted(&client.get_training_job(request).await?)?;
                }
                _ => {}
            },
            _ => {}
        }
    }
    let resume =
        format!("look with `tenora jobs get {job}`, go on with `tenora jobs resume {job}` if it was interrupted");
    Err(Failure::other(format!("the server stopped before {job} ended; {resume}")))
}

/// A job that is interrupted has no more events until someone resumes it.
fn still_interrupted(job: &proto::TrainingJob) -> Result<()> {
    if job.state() != proto::JobState::Interrupted {
        return Ok(());
    }
    let (name, why) = (&job.name, printable(&job.error));
    Err(Failure::other(format!("{name} was interrupted: {why}; `tenora jobs resume {name}` does so")))
}

/// Follows a job and prints its progress, the plot and the new version; as JSON: its events, a line each.
pub(super) async fn to_the_end(client: &Client, job: &str, json: bool) -> Result<()> {
    if json {
        follow(client, job, |event| Ok(writeln!(stdout(), "{}", event_json(event))?)).await?;
        return Ok(());
    }
    let mut progress = Progress::new();
    let course = follow(client, job, |event| progress.show(event)).await;
    progress.clear();
    let course = course?;
    Ok(writeln!(stdout(), "{}{}", plot(&course.steps), summary(&course))?)
}

/// The last figures of a training.
pub(super) fn summary(course: &TrainingHistory) -> String {
    let loss = match (course.steps.first(), course.steps.last()) {
        (Some(first), Some(last)) => {
            format!("{} steps, loss {:.3} -> {:.3}", last.step, first.loss, last.loss)
        }
        _ => "no steps".into(),
    };
    match course.version.as_str() {
        "" => format!("{loss}; the model is kept with the job, and `tenora jobs export` writes it as a folder"),
        version => format!("{loss}, published as {}", whether_live(version, course.live)),
    }
}

/// Mean tokens a second over all steps.
pub(super) fn tokens_per_second(steps: &[proto::StepTaken]) -> f64 {
    // Every step weighs the same: their harmonic mean, since steps hold about as many tokens each.
    let slowness: f64 = steps.iter().map(|step| 1.0 / step.tokens_per_second.max(1e-9)).sum();
    if slowness > 0.0 { steps.len() as f64 / slowness } else { 0.0 }
}

/// The progress of one job on the terminal.
pub(super) struct Progress {
    bar: ProgressBar,
    last_line: Option<Instant>,
}

impl Progress {
    pub(super) fn new() -> Self {
        let bar = ProgressBar::new(1);
        if let Ok(style) = ProgressStyle::with_template("  [{bar:24}] {pos}/{len} {msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message("waiting for its turn");
        Self { bar, last_line: None }
    }

    pub(super) fn show(&mut self, event: &proto::TrainingEvent) -> Result<()> {
        match &event.event {
            Some(Event::Step(step)) => self.step(step)?,
            Some(Event::Evaluated(evaluated)) => {
                let measured = measured_text(&evaluated.metrics);
                self.line(&format!("  step {}: validation loss {:.4}{measured}", evaluated.step, evaluated.loss))?;
            }
            Some(Event::MemoryPlan(plan)) => self.line(&format!("  {}", plan_text(plan)))?,
            Some(Event::MemoryPeak(peak)) => self.line(&format!("  {}", peak_text(peak)))?,
            Some(Event::Message(text)) => self.line(&format!("  {}", printable(text)))?,
            Some(Event::State(change)) => self.bar.set_message(state(change.state()).to_lowercase()),
            None => {}
        }
        Ok(())
    }

    fn step(&mut self, step: &proto::StepTaken) -> Result<()> {
        let text = step_text(step);
        self.bar.set_length(u64::from(step.total_steps));
        self.bar.set_position(u64::from(step.step));
        self.bar.set_message(text.clone());
        let due = self.last_line.is_none_or(|last| last.elapsed() >= LINE_EVERY) || step.step == step.total_steps;
        if self.bar.is_hidden() && due {
            self.last_line = Some(Instant::now());
            writeln!(stdout(), "  step {}/{} {text}", step.step, step.total_steps)?;
        }
        Ok(())
    }

    fn line(&self, text: &str) -> Result<()> {
        match self.bar.is_hidden() {
            true => writeln!(stdout(), "{text}")?,
            false => self.bar.println(text),
        }
        Ok(())
    }

    pub(super) fn clear(self) {
        self.bar.finish_and_clear();
    }
}

fn step_text(step: &proto::StepTaken) -> String {
    let (loss, rate, measured) = (step.loss, step.learning_rate, measured_text(&step.metrics));
    let (speed, left) = (step.tokens_per_second, step.eta_seconds);
    format!("loss {loss:.4}  lr {rate:.1e}{measured}  {speed:.0} tokens/s  {left:.0} s left")
}

/// What is measured beside the loss, in short: of SFT the accuracy, of DPO rewards and log-probabilities too.
fn measured_text(metrics: &HashMap<String, f64>) -> String {
    let value = |name: &str| metrics.get(name).copied();
    let mut text = String::new();
    if let Some(accuracy) = value("mean_token_accuracy").or(value("rewards/accuracies")) {
        text += &format!("  accuracy {:.0} %", accuracy * 100.0);
    }
    if let Some(margin) = value("rewards/margins") {
        text += &format!("  margin {margin:.2}");
    }
    for (name, label) in [("rewards", "rewards"), ("logps", "log-probabilities")] {
        if let (Some(chosen), Some(rejected)) = (value(&format!("{name}/chosen")), value(&format!("{name}/rejected"))) {
            text += &format!("  {label} {chosen:.2} / {rejected:.2}");
        }
    }
    text
}

/// The memory that a training takes, by parts.
pub(super) fn plan_text(plan: &proto::MemoryPlan) -> String {
    let parts = memory_parts([plan.adapter_bytes, plan.gradient_bytes, plan.optimizer_bytes, plan.activation_bytes]);
    let layers = if plan.gradient_checkpointing { "; layers are computed again" } else { "" };
    let paged = match plan.paged_optimizer_bytes {
        0 => String::new(),
        bytes => format!("; the optimizer's {} MB are in a file", megabytes(bytes)),
    };
    format!("memory: {} MB planned ({parts}){layers}{paged}", megabytes(plan.total_bytes))
}

fn peak_text(peak: &proto::MemoryPeak) -> String {
    let parts = memory_parts([peak.adapter_bytes, peak.gradient_bytes, peak.optimizer_bytes, peak.activation_bytes]);
    format!("memory: {} MB at the peak ({parts})", megabytes(peak.total_bytes))
}

fn memory_parts(bytes: [u64; 4]) -> String {
    let [adapter, gradients, optimizer, activations] = bytes.map(megabytes);
    format!("adapter {adapter}, gradients {gradients}, optimizer {optimizer}, activations {activations}")
}

/// To the nearest.
fn megabytes(bytes: u64) -> u64 {
    bytes.saturating_add(500_000) / 1_000_000
}

pub(super) fn plan_json(plan: &proto::MemoryPlan) -> Value {
    json!({
        "adapter_bytes": plan.adapter_bytes, "gradient_bytes": plan.gradient_bytes,
        "optimizer_bytes": plan.optimizer_bytes, "activation_bytes": plan.activation_bytes,
        "total_bytes": plan.total_bytes, "gradient_checkpointing": plan.gradient_checkpointing,
        "paged_optimizer_bytes": plan.paged_optimizer_bytes,
    })
}

/// In the order of their names.
fn metrics_json(metrics: &HashMap<String, f64>) -> Value {
    let sorted: BTreeMap<_, _> = metrics.iter().collect();
    json!(sorted)
}

/// The loss over the steps; nothing where there is no curve to see.
pub(super) fn plot(steps: &[proto::StepTaken]) -> String {
    let finite = steps.iter().filter(|step| step.loss.is_finite());
    let points: Vec<(f64, f64)> = finite.map(|step| (f64::from(step.step), step.loss)).collect();
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return String::new() };
    let lowest = points.iter().map(|point| point.1).fold(f64::INFINITY, f64::min);
    let highest = points.iter().map(|point| point.1).fold(f64::NEG_INFINITY, f64::max);
    if first.0 >= last.0 || lowest >= highest {
        return String::new();
    }
    let (columns, rows) = PLOT;
    let mut text = String::from("  loss by step\n");
    for (i, row) in draw::lines(&points, columns, rows).iter().enumerate() {
        let label = match i {
            0 => format!("{highest:.3}"),
            _ if i + 1 == rows => format!("{lowest:.3}"),
            _ => String::new(),
        };
        text += format!("  ⡇{row} {label}").trim_end();
        text.push('\n');
    }
    text + &format!("   {:<left$}{:>right$}\n", first.0, last.0, left = columns / 2, right = columns - columns / 2)
}

fn event_json(event: &proto::TrainingEvent) -> Value {
    let time = event.time.as_ref().map(ToString::to_string);
    let mut value = json!({ "sequence": event.sequence, "time": time });
    let (kind, content) = match &event.event {
        Some(Event::State(change)) => (
            "state",
            json!({
                "state": state(change.state()), "error": change.error, "adapter_version": change.adapter_version,
                "live": change.live,
            }),
        ),
        Some(Event::Step(step)) => (
            "step",
            json!({
                "step": step.step, "total_steps": step.total_steps, "loss": step.loss,
                "learning_rate": step.learning_rate, "grad_norm": step.grad_norm,
                "tokens_per_second": step.tokens_per_second, "eta_seconds": step.eta_seconds,
                "margin": step.margin, "accuracy": step.accuracy, "metrics": metrics_json(&step.metrics),
            }),
        ),
        Some(Event::Evaluated(evaluated)) => (
            "evaluated",
            json!({
                "step": evaluated.step, "loss": evaluated.loss, "margin": evaluated.margin,
                "accuracy": evaluated.accuracy, "metrics": metrics_json(&evaluated.metrics),
            }),
        ),
        Some(Event::MemoryPlan(plan)) => ("memory_plan", plan_json(plan)),
        Some(Event::MemoryPeak(peak)) => (
            "memory_peak",
            json!({
                "adapter_bytes": peak.adapter_bytes, "gradient_bytes": peak.gradient_bytes,
                "optimizer_bytes": peak.optimizer_bytes, "activation_bytes": peak.activation_bytes,
                "total_bytes": peak.total_bytes,
            }),
        ),
        Some(Event::Message(text)) => ("message", json!(text)),
        None => return value,
    };
    value[kind] = content;
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(losses: &[f64]) -> Vec<proto::StepTaken> {
        let step = |(i, &loss): (usize, &f64)| proto::StepTaken {
            step: i as u32 + 1,
            total_steps: losses.len() as u32,
            loss,
            tokens_per_second: 100.0,
            ..Default::default()
        };
        losses.iter().enumerate().map(step).collect()
    }

    #[test]
    fn a_curve_is_plotted_and_none_where_there_is_none() {
        let drawn = plot(&steps(&[3.0, 2.0, 1.5, f64::NAN, 1.0]));
        assert!(drawn.contains("3.000") && drawn.contains("1.000"), "{drawn}");
        for flat in [&[][..], &[1.0], &[1.0, 1.0], &[f64::NAN, f64::NAN]] {
            assert_eq!(plot(&steps(flat)), "");
        }
    }

    #[test]
    fn the_end_tells_whether_the_version_is_live_and_what_makes_it_so() {
        let version = "tenants/a/adapters/tone/versions/2".to_owned();
        let course = |live| TrainingHistory { steps: steps(&[2.0, 1.0]), version: version.clone(), live };
        assert_eq!(
            summary(&course(true)),
            format!("2 steps, loss 2.000 -> 1.000, published as {version}, which is live")
        );
        let waits = summary(&course(false));
        assert!(
            waits.contains("is not live") && waits.contains("`tenora adapters set-live tenants/a/adapters/tone 2`"),
            "{waits}"
        );
    }

    #[test]
    fn an_interrupted_job_is_not_waited_for() {
        let mut job = proto::TrainingJob { name: "tenants/a/trainingJobs/j".into(), ..Default::default() };
        job.error = "the disk is full; then resume the job to publish it".into();
        job.set_state(proto::JobState::Running);
        assert!(still_interrupted(&job).is_ok(), "it was resumed");
        job.set_state(proto::JobState::Interrupted);
        let told = still_interrupted(&job).unwrap_err().to_string();
        assert!(
            told.contains("the disk is full") && told.contains("`tenora jobs resume tenants/a/trainingJobs/j`"),
            "{told}"
        );
    }

    #[test]
    fn steps_tell_what_dpo_adds() {
        let mut step = steps(&[0.5]).remove(0);
        assert!(!step_text(&step).contains("margin"));
        step.metrics = HashMap::from([("mean_token_accuracy".to_owned(), 0.5)]);
        assert!(step_text(&step).contains("  accuracy 50 %  100 tokens/s"), "{}", step_text(&step));
        let pairs = [
            ("rewards/accuracies", 0.75),
            ("rewards/margins", 1.25),
            ("rewards/chosen", 1.0),
            ("rewards/rejected", -0.25),
            ("logps/chosen", -20.5),
            ("logps/rejected", -31.0),
        ];
        step.metrics = pairs.map(|(name, value)| (name.to_owned(), value)).into();
        let text = step_text(&step);
        let wanted =
            "  accuracy 75 %  margin 1.25  rewards 1.00 / -0.25  log-probabilities -20.50 / -31.00  100 tokens/s";
        assert!(text.contains(wanted), "{text}");
        let json = metrics_json(&step.metrics).to_string();
        assert!(
            json.starts_with(r#"{"logps/chosen":-20.5,"logps/rejected":-31.0,"rewards/accuracies":0.75"#),
            "{json}"
        );
    }
}
